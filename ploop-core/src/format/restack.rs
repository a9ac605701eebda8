//! A chain made of another one's open deltas: with a new top, without a merged child, with the parent as the top again.
//!
//! No table is read or copied that is open already: the new chain shares the deltas of the old one, and with them what
//! [`holders`](super::holders) know. So the price of putting a new chain under a running disk does not depend on the
//! size of the disk, and everything that takes time is done before guest writes are held. The old chain stays valid for
//! reads; nobody writes through it any more.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::Access;

use super::chain::{Chain, DEPTH_MAX, Source, check_fits};
use super::delta::{Delta, RepairSummary, Role};
use super::holders::Lookup;

impl Chain {
    pub(super) fn of_deltas(
        deltas: Vec<Arc<Delta>>,
        lookup: Option<Lookup>,
        writable: bool,
    ) -> Result<Arc<Self>> {
        let geometry = match deltas.last() {
            Some(delta) => delta.geometry.clone(),
            None => return Err(Error::new(ErrorKind::Parameter, "open disk: no file")),
        };
        Ok(Arc::new(Self { deltas, geometry, writable, repairs: RepairSummary::default(), lookup }))
    }

    /// This chain with `top` above it: an image of the same sizes that holds nothing yet. The new top is opened for
    /// writing and marked as in use, durably, before this returns; this chain's top may still be written through this
    /// chain until the new one is used, and never again afterwards (I7).
    pub fn stacked(&self, top: Source) -> Result<Arc<Self>> {
        let refuse = |message: String| {
            Err(Error::new(ErrorKind::Parameter, format!("stack a new top: {message}")).at_path(&top.name))
        };
        if top.raw {
            return refuse("it is raw".into());
        }
        if self.depth() >= DEPTH_MAX {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("stack a new top: the chain has {DEPTH_MAX} files, the most there may be"),
            )
            .advise("delete snapshots first"));
        }
        let name = top.name.clone();
        let mut repairs = RepairSummary::default();
        let role = Role::TopReadWrite { repair: true };
        let mut delta =
            Delta::open_image(top.name.clone(), Arc::clone(&top.storage), role, false, &mut repairs)?;
        if !self.geometry.is_raw() {
            check_fits(&delta, &self.geometry)?;
        }
        let (own, new) = (&self.geometry, &delta.geometry);
        if (own.disk_bytes(), own.cluster_bytes()) != (new.disk_bytes(), new.cluster_bytes()) {
            return refuse(format!(
                "it is a disk of {} bytes, not of {}",
                new.disk_bytes(),
                own.disk_bytes()
            ));
        }
        if delta.image.as_ref().is_some_and(|image| image.bat.allocated() > 0) {
            return refuse("it is not empty".into());
        }
        delta.make_writable(&mut repairs)?;
        let mut deltas = self.deltas.clone();
        let lookup = match self.lookup.as_ref().and_then(|lookup| lookup.stacked(self.top())) {
            Some(lookup) => lookup,
            None => {
                // The first snapshot, or the slots are used up. What is below the old top is frozen.
                let built = Lookup::build(&deltas[..self.top()], self.geometry.entries())?;
                built.stacked(self.top()).ok_or_else(|| {
                    Error::new(ErrorKind::Parameter, "stack a new top: the chain is too long").at_path(&name)
                })?
            }
        };
        deltas.push(Arc::new(delta));
        let chain = Self::of_deltas(deltas, Some(lookup), true)?;
        chain.mark_open()?;
        Ok(chain)
    }

    /// Enters the lower deltas into the map that finds them at one look, as far as they are not in it. Called once the
    /// chain is in use: until then the youngest lower delta is walked through, which is only slower.
    pub fn cover(&self) {
        if let Some(lookup) = &self.lookup {
            lookup.cover(&self.deltas[..self.top()]);
        }
    }

    /// One lower delta alone, as a chain open for writing, for a merge into it: `parent` is its file, open for writing,
    /// and is marked as in use. What this chain knows of the file stays as it is.
    pub fn parent_for_merge(&self, delta: usize, parent: Source) -> Result<Arc<Self>> {
        let raw_cluster =
            parent.raw.then(|| crate::units::Sectors(u64::from(self.geometry.cluster_sectors())));
        let options = super::ChainOptions { access: Access::ReadWrite, raw_cluster, accept_in_use: false };
        let name = parent.name.clone();
        let chain = Self::open(vec![parent], &options)?;
        if self.delta_geometry(delta).cluster_bytes() != chain.geometry().cluster_bytes() {
            return Err(
                Error::new(ErrorKind::Parameter, "merge: the parent changed its clusters").at_path(&name)
            );
        }
        Ok(chain)
    }

    /// This chain without delta `child`, whose clusters `merged` (the delta below it, from
    /// [`parent_for_merge`](Self::parent_for_merge)) has taken over and made durable. `child` is neither base nor top.
    pub fn without(&self, child: usize, merged: &Self) -> Result<Arc<Self>> {
        if child == 0 || child >= self.top() || merged.depth() != 1 {
            return Err(Error::new(ErrorKind::Parameter, "merge: only a delta between two others can go"));
        }
        self.cover();
        let mut deltas = self.deltas.clone();
        deltas.remove(child);
        deltas[child - 1] = Arc::clone(&merged.deltas[0]);
        let lookup = self.lookup.as_ref().map(|lookup| lookup.without(child));
        Self::of_deltas(deltas, lookup, self.writable)
    }

    /// This chain with `merged`, which is the delta below the top, as its top again: it has taken over all that this top
    /// holds. Opening the new chain reads no table; it is as writable as `merged` is.
    pub fn promoted(&self, merged: &Self) -> Result<Arc<Self>> {
        if self.top() == 0 || merged.depth() != 1 {
            return Err(Error::new(ErrorKind::Parameter, "merge: the top has no parent"));
        }
        let mut deltas: Vec<Arc<Delta>> = self.deltas[..self.top() - 1].to_vec();
        let lookup = match deltas.len() {
            0 => None,
            _ => Some(Lookup::build(&deltas, self.geometry.entries())?),
        };
        deltas.push(Arc::clone(&merged.deltas[0]));
        Self::of_deltas(deltas, lookup, merged.writable)
    }

    /// This chain with the one image of `merged` in the place of the deltas from `lower` up to `upper`: it holds, durably,
    /// all that they hold and the guest sees. With `upper` the top, `merged` is the new top, and the new chain is as writable
    /// as `merged` is.
    pub fn with_range_merged(&self, lower: usize, upper: usize, merged: &Self) -> Result<Arc<Self>> {
        if lower >= upper || upper > self.top() || merged.depth() != 1 {
            return Err(Error::new(ErrorKind::Parameter, "merge: these are no deltas on each other"));
        }
        let delta = Arc::clone(&merged.deltas[0]);
        check_fits(&delta, &self.deltas[upper].geometry)?;
        if delta.geometry.disk_bytes() != self.deltas[upper].geometry.disk_bytes() {
            return Err(Error::new(ErrorKind::Parameter, "merge: the new image is a disk of another size")
                .at_path(merged.name(0)));
        }
        let is_top = upper == self.top();
        let mut deltas = self.deltas.clone();
        deltas.splice(lower..=upper, [delta]);
        let frozen = deltas.len() - 1;
        let lookup = match &self.lookup {
            _ if frozen == 0 => None,
            // What a raw base holds was in no map.
            Some(lookup) if !is_top && self.deltas[lower].image.is_some() => {
                self.cover();
                // One after the other: the clusters of each are those of the one below it, in the end of the new one.
                let mut lookup = lookup.without(upper);
                (lower + 1..upper).rev().for_each(|child| lookup = lookup.without(child));
                Some(lookup)
            }
            _ => Some(Lookup::build(&deltas[..frozen], self.geometry.entries())?),
        };
        Self::of_deltas(deltas, lookup, if is_top { merged.writable } else { self.writable })
    }

    /// Clusters that a delta holds, in order, with where they lie and how many of their bytes are there; a raw base holds
    /// all. `delta` is below [`depth`](Self::depth).
    pub fn for_each_held(
        &self,
        delta: usize,
        mut visit: impl FnMut(crate::units::GuestCluster, crate::units::FileOffset, u64) -> Result<()>,
    ) -> Result<()> {
        let held = &self.deltas[delta];
        let mut clusters = Vec::new();
        match &held.image {
            Some(image) => {
                image
                    .bat
                    .table()
                    .for_each_entry(held.geometry.entries(), |cluster, _| clusters.push(cluster));
            }
            None => clusters.extend((0..held.geometry.entries()).map(crate::units::GuestCluster)),
        }
        for cluster in clusters {
            if let Some((offset, len)) = held.find(cluster) {
                visit(cluster, offset, len)?;
            }
        }
        Ok(())
    }

    /// Where a delta holds a cluster, and how many of its bytes are there; `delta` is below [`depth`](Self::depth).
    pub fn held_bytes(
        &self,
        delta: usize,
        cluster: crate::units::GuestCluster,
    ) -> Option<(crate::units::FileOffset, u64)> {
        self.deltas[delta].find(cluster)
    }

    /// Clusters that a delta holds; of a raw base, all. `delta` is below [`depth`](Self::depth).
    pub fn clusters_held(&self, delta: usize) -> u64 {
        let delta = &self.deltas[delta];
        delta.image.as_ref().map_or(u64::from(delta.geometry.entries()), |image| image.bat.allocated())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::WriteTarget;
    use crate::format::testing::{flush, guest_content, image, open};
    use crate::io::sim::{Random, SimStorage};
    use crate::io::{Storage, StorageExt};
    use crate::units::GuestCluster;

    const CLUSTERS: u64 = 40;

    fn source(file: &SimStorage) -> Source {
        Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false }
    }

    fn write(chain: &Arc<Chain>, cluster: u32, byte: u8) {
        let storage = chain.storage(chain.top());
        match chain.prepare_write(GuestCluster(cluster)).unwrap() {
            WriteTarget::InPlace(offset) => storage.write_all_at(offset.0, &[byte; 4096]).unwrap(),
            WriteTarget::Fresh(prepared) => {
                storage.write_all_at(prepared.offset().0, &[byte; 4096]).unwrap();
                prepared.publish();
            }
        }
    }

    fn merge(chain: &Chain, child: usize, parent: &Arc<Chain>) {
        chain
            .for_each_held(child, |cluster, offset, len| {
                let mut bytes = vec![0; 4096];
                chain
                    .storage(child)
                    .read_exact_at(offset.0, &mut bytes[..usize::try_from(len).unwrap()])
                    .unwrap();
                let storage = parent.storage(0);
                match parent.prepare_write(cluster).unwrap() {
                    WriteTarget::InPlace(offset) => storage.write_all_at(offset.0, &bytes).unwrap(),
                    WriteTarget::Fresh(prepared) => {
                        storage.write_all_at(prepared.offset().0, &bytes).unwrap();
                        prepared.publish();
                    }
                }
                Ok(())
            })
            .unwrap();
        flush(parent);
    }

    fn check(chain: &Chain, model: &[u8]) {
        for (cluster, bytes) in guest_content(chain).chunks(4096).enumerate() {
            assert!(bytes.iter().all(|byte| *byte == model[cluster]), "cluster {cluster}");
            let cluster = GuestCluster(u32::try_from(cluster).unwrap());
            for count in [chain.top(), chain.depth()] {
                assert_eq!(chain.find(count, cluster), chain.walk(count, cluster));
            }
        }
    }

    /// Snapshots, merges of any delta, and of the top, in any order: each chain shows what was written, the old ones what
    /// they showed.
    #[test]
    fn chains_made_of_chains_show_the_same_disk() {
        for seed in 0..40 {
            let mut random = Random::new(seed);
            let mut files = vec![image(CLUSTERS)];
            let mut chain = open(&[&files[0]], Access::ReadWrite).unwrap();
            let mut model = vec![0u8; usize::try_from(CLUSTERS).unwrap()];
            let mut value = 0;
            for _ in 0..60 {
                match random.index(10) {
                    0..=5 => {
                        let cluster = random.index(model.len());
                        value = value % 250 + 1;
                        write(&chain, u32::try_from(cluster).unwrap(), value);
                        model[cluster] = value;
                    }
                    6 | 7 if chain.depth() < 8 => {
                        flush(&chain);
                        let file = image(CLUSTERS);
                        let new = chain.stacked(source(&file)).unwrap();
                        chain.close().unwrap();
                        check(&new, &model);
                        if random.index(2) == 0 {
                            new.cover();
                        }
                        check(&chain, &model);
                        files.push(file);
                        chain = new;
                    }
                    8 if chain.depth() > 2 => {
                        let child = 1 + random.index(chain.depth() - 2);
                        let parent = chain.parent_for_merge(child - 1, source(&files[child - 1])).unwrap();
                        merge(&chain, child, &parent);
                        let new = chain.without(child, &parent).unwrap();
                        parent.close().unwrap();
                        check(&new, &model);
                        check(&chain, &model);
                        files.remove(child);
                        chain = new;
                    }
                    9 if chain.depth() > 1 && random.index(2) == 0 => {
                        flush(&chain);
                        let upper = 1 + random.index(chain.top());
                        let lower = random.index(upper);
                        let file = image(CLUSTERS);
                        let new = open(&[&file], Access::ReadWrite).unwrap();
                        (lower..=upper).for_each(|delta| merge(&chain, delta, &new));
                        if upper < chain.top() {
                            new.close().unwrap();
                        }
                        let next = chain.with_range_merged(lower, upper, &new).unwrap();
                        check(&next, &model);
                        check(&chain, &model);
                        assert!(next.is_writable() && chain.with_range_merged(upper, lower, &new).is_err());
                        files.splice(lower..=upper, [file]);
                        chain = next;
                    }
                    9 if chain.depth() > 1 => {
                        flush(&chain);
                        let top = chain.top();
                        let parent = chain.parent_for_merge(top - 1, source(&files[top - 1])).unwrap();
                        merge(&chain, top, &parent);
                        let new = chain.promoted(&parent).unwrap();
                        files.pop();
                        chain = new;
                    }
                    _ => {
                        let cluster = random.index(model.len());
                        if chain.clear(GuestCluster(u32::try_from(cluster).unwrap())).unwrap() {
                            model[cluster] = 0;
                        }
                        for freed in flush(&chain) {
                            chain.release(freed, false);
                        }
                    }
                }
                check(&chain, &model);
            }
            flush(&chain);
            chain.close().unwrap();
            let again = open(&files.iter().collect::<Vec<_>>(), Access::ReadOnly).unwrap();
            check(&again, &model);
        }
    }

    #[test]
    fn slots_that_are_used_up_are_given_anew() {
        let files = [image(CLUSTERS), image(CLUSTERS)];
        let mut chain = open(&[&files[0]], Access::ReadWrite).unwrap();
        write(&chain, 3, 9);
        for round in 0..300 {
            flush(&chain);
            let top = image(CLUSTERS);
            let new = chain.stacked(source(&top)).unwrap();
            new.cover();
            let parent = new.parent_for_merge(0, source(&files[0])).unwrap();
            chain = new.promoted(&parent).unwrap();
            let _ = round;
        }
        assert_eq!(guest_content(&chain)[3 * 4096], 9);
    }

    #[test]
    fn only_an_empty_image_of_the_same_size_becomes_the_top() {
        let file = image(CLUSTERS);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        assert!(chain.stacked(source(&image(CLUSTERS + 1))).is_err());
        let full = image(CLUSTERS);
        crate::format::testing::set_entry(&full, 0, 1);
        full.set_len(2 * 4096).unwrap();
        assert!(chain.stacked(source(&full)).is_err());
        let raw = Source { raw: true, ..source(&image(CLUSTERS)) };
        assert!(chain.stacked(raw).is_err());
    }
}
