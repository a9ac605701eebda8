//! Deltas of different sizes in one chain.
//!
//! A disk has the size of its top. A lower delta that is smaller lacks what lies past its end: zeros. One that is larger,
//! because the disk was made smaller since, keeps what lies past the end of the top for its own state, and no state that
//! stands on it may see that: not now, for a chain reads up to the end of its top, and not when the top grows again.
//! The format has no mark for "nothing, whatever lies below". So a top that grows gets a cluster of zeros, with an entry
//! of its own, for each cluster of the new range that a lower delta holds ([`Chain::hidden_by_growth`]).
//!
//! Chains that other programs have made may lack those. What a guest sees through such a gap stays what it sees: whoever
//! cuts a lower delta asks [`Chain::shown_past`] first.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Storage, StorageExt};
use crate::units::GuestCluster;

use super::chain::Chain;
use super::delta::Delta;
use super::geometry::Geometry;

/// Bytes zeroed at once.
const PIECE_BYTES: u64 = 1 << 20;

impl Delta {
    /// Calls `visit` for the clusters in `from..to` that this file holds; of a raw one, those that are no hole.
    fn for_each_from(&self, from: u32, to: u32, mut visit: impl FnMut(GuestCluster)) -> Result<()> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let clusters = u32::try_from(self.geometry.disk_bytes().div_ceil(cluster_bytes)).unwrap_or(u32::MAX);
        let to = to.min(clusters);
        if let Some(image) = &self.image {
            image.bat.table().for_each_entry(self.geometry.entries().min(to), |cluster, _| {
                if cluster.0 >= from {
                    visit(cluster);
                }
            });
            return Ok(());
        }
        let mut next = from;
        while next < to {
            let at = u64::from(next) * cluster_bytes;
            let found = self.storage.next_data(at).map_err(|cause| {
                Error::io(ErrorKind::Read, "look for data past the end of the disk", cause)
                    .at_path(&self.name)
                    .at_offset(at)
            })?;
            let Some((start, end)) = found else { break };
            let first = u32::try_from(start / cluster_bytes).unwrap_or(u32::MAX).max(next);
            let last = u32::try_from(end.div_ceil(cluster_bytes)).unwrap_or(u32::MAX).min(to);
            (first..last).map(GuestCluster).for_each(&mut visit);
            next = last.max(first).max(next + 1);
        }
        Ok(())
    }
}

impl Chain {
    /// Clusters between the ends `old` and `new` of a top that grows that some lower delta holds, ascending. Fails with
    /// `Parameter` where the old end lies inside such a cluster, which no image of this program does.
    pub(super) fn hidden_by_growth(&self, old: &Geometry, new: &Geometry) -> Result<Vec<u32>> {
        let mut held = Vec::new();
        let first = u32::try_from(old.disk_bytes().div_ceil(old.cluster_bytes())).unwrap_or(u32::MAX);
        let within = old.disk_bytes() % old.cluster_bytes();
        for delta in &self.deltas()[..self.top()] {
            if delta.geometry.disk_bytes() <= old.disk_bytes() {
                continue;
            }
            let boundary = GuestCluster(first.saturating_sub(1));
            if within > 0
                && self.held_at(self.top(), boundary).is_none()
                && delta.find(boundary).is_some_and(|(_, len)| len > within)
            {
                return Err(Error::new(
                    ErrorKind::Parameter,
                    "make the disk larger: it ends inside a cluster, the rest of which a snapshot below holds",
                )
                .at_path(&delta.name)
                .at_cluster(u64::from(boundary.0))
                .advise("write to the last sectors of the disk, or merge the snapshots, then try again"));
            }
            delta.for_each_from(first, new.entries(), |cluster| held.push(cluster.0))?;
        }
        held.sort_unstable();
        held.dedup();
        Ok(held)
    }

    /// The first cluster found past the end of delta `delta` that one below it holds and a state above it shows: with
    /// that gone, what a guest reads would change. `None` in all chains that this program made. `delta` is below
    /// [`depth`](Self::depth).
    pub fn shown_past(&self, delta: usize) -> Result<Option<GuestCluster>> {
        let end = self.deltas()[delta].geometry.disk_bytes();
        let above = &self.deltas()[delta + 1..];
        let mut shown = None;
        for below in &self.deltas()[..delta] {
            let geometry = &below.geometry;
            if geometry.disk_bytes() <= end {
                continue;
            }
            let first = u32::try_from(end.div_ceil(geometry.cluster_bytes())).unwrap_or(u32::MAX);
            below.for_each_from(first, u32::MAX, |cluster| {
                let start = u64::from(cluster.0) * geometry.cluster_bytes();
                for state in above {
                    if state.find(cluster).is_some() {
                        return;
                    }
                    if start < state.geometry.disk_bytes() {
                        shown.get_or_insert(cluster);
                        return;
                    }
                }
            })?;
        }
        Ok(shown)
    }

    /// Whether lower delta `delta` of this chain has each cluster where `other`, the same file opened anew and alone,
    /// says.
    pub(crate) fn has_places_of(&self, delta: usize, other: &Self) -> bool {
        let (Some(own), Some(new)) = (&self.deltas()[delta].image, &other.top_delta().image) else {
            return true;
        };
        let entries = self.delta_geometry(delta).entries();
        let mut same = own.bat.allocated() == new.bat.allocated();
        own.bat.table().for_each_entry(entries, |cluster, raw| same &= new.bat.table().entry(cluster) == raw);
        same
    }

    /// This chain with the only delta of `lower`, the same file with clusters at other places, as its lower delta `delta`.
    /// Opening the new chain reads no table.
    pub(crate) fn with_lower(&self, delta: usize, lower: &Self) -> Result<Arc<Self>> {
        if delta >= self.top() || lower.depth() != 1 {
            return Err(Error::new(ErrorKind::Parameter, "replace an image of a chain: it is no lower one"));
        }
        let mut deltas = self.deltas().to_vec();
        deltas[delta] = Arc::clone(&lower.deltas()[0]);
        Self::of_deltas(deltas, self.lookup.as_ref().map(super::holders::Lookup::again), self.is_writable())
    }

    /// Lets clusters be put anywhere again, after a growth that has not come to its end.
    pub(crate) fn lift_floor(&self) {
        if let Some(super::delta::Image { allocator: Some(allocator), .. }) = &self.top_delta().image {
            allocator.reserve_floor(crate::units::FileCluster(0));
        }
    }
}

/// Zeroes what lies between the end of a table and the first place of data, where entries of a longer table may have
/// been left, and syncs. Nobody reads there, but a program that makes the table longer again may take them for its own.
pub(crate) fn scrub_slots(storage: &dyn Storage, geometry: &Geometry) -> Result<()> {
    let (mut at, end) = (geometry.table_bytes(), geometry.data_start().0);
    let failed = |kind, offset: u64| {
        move |cause| Error::io(kind, "zero the rest of the former table", cause).at_offset(offset)
    };
    while at < end {
        let Some((start, stop)) = storage.next_data(at).map_err(failed(ErrorKind::Read, at))? else { break };
        let (start, stop) = (start.max(at), stop.min(end).min(start.max(at).saturating_add(PIECE_BYTES)));
        if start >= stop {
            break;
        }
        let zeros = vec![0; usize::try_from(stop - start).unwrap_or(0)];
        storage.write_all_at(start, &zeros).map_err(failed(ErrorKind::Write, start))?;
        at = stop;
    }
    storage.sync_data().map_err(failed(ErrorKind::Sync, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{image, open, set_entry};
    use crate::format::{ChainOptions, Source};
    use crate::io::Access;
    use crate::io::sim::SimStorage;
    use crate::units::Sectors;

    /// An image of so many clusters of 4 KiB that holds some.
    fn holding(clusters: u64, held: &[u64]) -> SimStorage {
        let file = image(clusters);
        for (number, &cluster) in held.iter().enumerate() {
            let place = u32::try_from(number + 1).unwrap();
            file.write_all_at(u64::from(place) * 4096, &[7; 4096]).unwrap();
            set_entry(&file, cluster, place);
        }
        file
    }

    fn hidden(files: &[&SimStorage], clusters: u64) -> Vec<u32> {
        let chain = open(files, Access::ReadOnly).unwrap();
        let new = chain.geometry().resized(Sectors(clusters * 8)).unwrap();
        chain.hidden_by_growth(chain.geometry(), &new).unwrap()
    }

    #[test]
    fn a_top_that_grows_hides_what_lies_below_and_nothing_else() {
        let (base, middle, top) =
            (holding(20, &[2, 9, 12, 13, 19]), holding(14, &[3, 11, 12]), holding(10, &[9]));
        assert_eq!(hidden(&[&base, &middle, &top], 16), [11, 12, 13]);
        assert_eq!(hidden(&[&base, &middle, &top], 40), [11, 12, 13, 19]);
        assert_eq!(hidden(&[&base], 40), Vec::<u32>::new());
        assert_eq!(hidden(&[&top, &base], 40), Vec::<u32>::new());
    }

    #[test]
    fn of_a_raw_base_only_data_are_hidden() {
        let base = crate::format::testing::file_with_len(20 * 4096);
        base.write_all_at(12 * 4096 + 5, &[1; 4096]).unwrap();
        let top = holding(10, &[]);
        let source =
            |file: &SimStorage, raw| Source { name: "image".into(), storage: Arc::new(file.clone()), raw };
        let options = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
        let chain = Chain::open(vec![source(&base, true), source(&top, false)], &options).unwrap();
        let new = chain.geometry().resized(Sectors(30 * 8)).unwrap();
        assert_eq!(chain.hidden_by_growth(chain.geometry(), &new).unwrap(), [12, 13]);
    }

    #[test]
    fn what_a_later_state_shows_is_found() {
        let shown = |files: &[&SimStorage], delta| {
            let chain = open(files, Access::ReadOnly).unwrap();
            chain.shown_past(delta).unwrap().map(|cluster| cluster.0)
        };
        let (base, middle) = (holding(20, &[2, 12, 13]), holding(10, &[3]));
        assert_eq!(shown(&[&base, &middle], 1), None, "nothing stands on it");
        assert_eq!(shown(&[&base, &middle, &holding(12, &[])], 1), None, "smaller than what is held");
        assert_eq!(shown(&[&base, &middle, &holding(13, &[])], 1), Some(12));
        assert_eq!(shown(&[&base, &middle, &holding(13, &[12])], 1), None, "hidden");
        assert_eq!(shown(&[&base, &middle, &holding(13, &[12]), &holding(20, &[])], 1), Some(13));
        assert_eq!(shown(&[&base, &middle, &holding(20, &[12, 13]), &holding(20, &[])], 1), None);
        assert_eq!(shown(&[&base, &middle, &holding(20, &[12])], 0), None, "nothing lies below");
    }

    #[test]
    fn slots_of_a_former_table_are_scrubbed() {
        let file = image(3);
        file.write_all_at(64, &[1; 4000]).unwrap();
        file.write_all_at(4096, &[2; 4096]).unwrap();
        let header = crate::format::examine(&file).unwrap().0;
        scrub_slots(&file, header.geometry()).unwrap();
        let mut bytes = vec![0; 8192];
        file.read_exact_at(0, &mut bytes).unwrap();
        assert!(bytes[64..76].iter().all(|&byte| byte == 1), "the table itself");
        assert!(bytes[76..4096].iter().all(|&byte| byte == 0));
        assert!(bytes[4096..].iter().all(|&byte| byte == 2));
    }
}
