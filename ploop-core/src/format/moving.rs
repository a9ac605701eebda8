//! Clusters that change their place in the file while the guest sees the same bytes: for compaction, and to make room
//! for a longer table.
//!
//! A move is a write to a fresh place ([`PreparedWrite`]) whose content is what the old place holds. Publishing it
//! replaces the entry and puts the old place into quarantine, exactly as a discard does: until the new entry is durable
//! the file's table still names the old place, which keeps its content (I3, I4). The caller owns the guest cluster
//! alone from before [`Chain::prepare_move`] until it has published or dropped what it got, so nobody writes to the old
//! place meanwhile, and nobody is at it when it is freed.
//!
//! The tail of the file is cut past the highest place in use. *In use* includes quarantine, so a place that a durable
//! entry names is never cut off.

use std::sync::Arc;

use super::alloc::Wanted;
use super::chain::{Chain, PreparedWrite};
use super::delta::Image;
use crate::error::Result;
use crate::units::{FileCluster, FileOffset, GuestCluster};

/// Where a cluster shall move to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The lowest free place below this one; the file does not grow for it.
    Below(FileCluster),
    /// The lowest free place at or past this one.
    From(FileCluster),
}

impl Destination {
    /// Whether `place` is where it should be.
    pub fn contains(self, place: FileCluster) -> bool {
        match self {
            Self::Below(limit) => place < limit,
            Self::From(limit) => place >= limit,
        }
    }
}

impl Chain {
    /// Reserves another place for a cluster that the top holds; with it comes where the content is now. `None` when there
    /// is nothing to move: the top lacks the cluster, has no table, or holds it in such a place already, or no such place
    /// is free. Fails with `Allocate` when the host is full, with `Busy` while a write to the cluster has a reservation.
    pub fn prepare_move(
        self: &Arc<Self>,
        cluster: GuestCluster,
        destination: Destination,
    ) -> Result<Option<(PreparedWrite, FileOffset)>> {
        let top = self.top_delta();
        let prepare = || {
            let Some(image @ Image { allocator: Some(allocator), .. }) = &top.image else { return Ok(None) };
            image.bat.check_open("move a cluster")?;
            let Some(from) = self.place_of(cluster).filter(|&place| !destination.contains(place)) else {
                return Ok(None);
            };
            let wanted = match destination {
                Destination::Below(limit) => Wanted::Below(limit.0),
                Destination::From(limit) => Wanted::From(limit.0),
            };
            let Some(taken) = allocator.take_where(&top.storage, cluster, wanted, || false)? else {
                return Ok(None);
            };
            let prepared = PreparedWrite::new(self, cluster, taken, Some(from))?;
            Ok(Some((prepared, self.geometry().file_offset(from))))
        };
        prepare().map_err(|error: crate::Error| error.at_path(&top.name).at_cluster(u64::from(cluster.0)))
    }

    /// Where in its file the top holds a cluster, as the table in memory has it; `None` when it does not, or is raw.
    pub fn place_of(&self, cluster: GuestCluster) -> Option<FileCluster> {
        let image = self.top_delta().image.as_ref()?;
        if cluster.0 >= self.geometry().entries() {
            return None;
        }
        self.geometry().entry_to_cluster(image.bat.table().entry(cluster)).ok().flatten()
    }

    /// Calls `visit` for each cluster that the top holds, in the order of the guest's disk. Entries may change meanwhile.
    pub fn for_each_place(&self, mut visit: impl FnMut(GuestCluster, FileCluster)) {
        let Some(image) = &self.top_delta().image else { return };
        image.bat.table().for_each_entry(self.geometry().entries(), |cluster, raw| {
            if let Ok(Some(place)) = self.geometry().entry_to_cluster(raw) {
                visit(cluster, place);
            }
        });
    }

    /// From now on no cluster below `floor` is handed out, so that the table can grow up to there. A lower floor than
    /// before allows those places again. What already lies below stays: see [`prepare_move`](Self::prepare_move).
    pub fn reserve_floor(&self, floor: FileCluster) {
        if let Some(Image { allocator: Some(allocator), .. }) = &self.top_delta().image {
            allocator.reserve_floor(floor);
        }
    }

    /// Cuts the file behind the highest place in use, reserved or in quarantine; by how many bytes. Nothing is synced: the
    /// cut is durable with the next group of flushes. Called between two groups, when no plan is out.
    pub fn cut_tail(&self) -> Result<u64> {
        let top = self.top_delta();
        let Some(image @ Image { allocator: Some(allocator), .. }) = &top.image else { return Ok(0) };
        image
            .bat
            .check_open("cut the tail of the image")
            .and_then(|()| allocator.cut_tail(&top.storage))
            .map_err(|error| error.at_path(&top.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::testing::{file_of, flush, guest_content, open, small};
    use crate::format::{CreateOptions, WriteTarget, create_image};
    use crate::io::sim::SimStorage;
    use crate::io::{Access, Storage, StorageExt};

    const CLUSTER: usize = 4096;

    fn image() -> SimStorage {
        let file = file_of(&[]);
        create_image(&file, &CreateOptions { geometry: small(20), preallocated: false }).unwrap();
        file
    }

    fn write(chain: &Arc<Chain>, cluster: u32, byte: u8) {
        let WriteTarget::Fresh(prepared) = chain.prepare_write(GuestCluster(cluster)).unwrap() else {
            panic!("cluster {cluster} has a place")
        };
        chain.storage(0).write_all_at(prepared.offset().0, &[byte; CLUSTER]).unwrap();
        prepared.publish();
    }

    fn relocate(chain: &Arc<Chain>, cluster: u32, destination: Destination) -> Option<FileCluster> {
        let (prepared, from) = chain.prepare_move(GuestCluster(cluster), destination).unwrap()?;
        let mut content = [0; CLUSTER];
        chain.storage(0).read_exact_at(from.0, &mut content).unwrap();
        chain.storage(0).write_all_at(prepared.offset().0, &content).unwrap();
        let place = prepared.place();
        prepared.publish();
        Some(place)
    }

    /// A group of flushes, and everything it frees given back.
    fn settle(chain: &Chain) {
        for place in flush(chain) {
            chain.release(place, false);
        }
    }

    #[test]
    fn a_moved_cluster_keeps_its_content_and_frees_its_old_place_late() {
        let file = image();
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        (0..5).for_each(|cluster| write(&chain, cluster, u8::try_from(cluster).unwrap() + 1));
        settle(&chain);
        let before = guest_content(&chain);
        assert!(chain.clear(GuestCluster(0)).unwrap());
        assert!(
            relocate(&chain, 4, Destination::Below(FileCluster(5))).is_none(),
            "the place is in quarantine"
        );
        settle(&chain);
        let old = chain.place_of(GuestCluster(4)).unwrap();
        assert_eq!(relocate(&chain, 4, Destination::Below(FileCluster(5))), Some(FileCluster(1)));
        assert!(relocate(&chain, 4, Destination::Below(FileCluster(5))).is_none(), "it lies there");
        assert_eq!(chain.cut_tail().unwrap() % CLUSTER as u64, 0);
        assert_eq!(file.len().unwrap(), 6 * CLUSTER as u64, "a durable entry names the last place");
        settle(&chain);
        assert_eq!(chain.cut_tail().unwrap(), CLUSTER as u64);
        assert_eq!(file.len().unwrap(), u64::from(old.0) * CLUSTER as u64);
        let after = guest_content(&chain);
        assert!(after[..CLUSTER].iter().all(|&byte| byte == 0));
        assert!(after[CLUSTER..] == before[CLUSTER..]);
        assert_eq!(chain.allocated_clusters(), 4);
        chain.close().unwrap();
        let chain = open(&[&file], Access::ReadOnly).unwrap();
        assert!(guest_content(&chain) == after);
    }

    #[test]
    fn a_dropped_move_changes_nothing() {
        let file = image();
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 3, 7);
        settle(&chain);
        let from = FileCluster(9);
        let (prepared, _) = chain.prepare_move(GuestCluster(3), Destination::From(from)).unwrap().unwrap();
        assert!(prepared.place() >= from);
        let error = chain.prepare_move(GuestCluster(3), Destination::From(from)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        drop(prepared);
        assert_eq!(chain.place_of(GuestCluster(3)), Some(FileCluster(1)));
        assert_eq!(chain.pending(), 0);
        chain.close().unwrap();
        assert_eq!(file.len().unwrap(), 2 * CLUSTER as u64);
    }

    #[test]
    fn nothing_is_handed_out_below_the_floor() {
        let file = image();
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 0, 1);
        write(&chain, 1, 2);
        settle(&chain);
        chain.reserve_floor(FileCluster(6));
        write(&chain, 2, 3);
        assert_eq!(chain.place_of(GuestCluster(2)), Some(FileCluster(6)));
        assert_eq!(relocate(&chain, 0, Destination::From(FileCluster(6))), Some(FileCluster(7)));
        assert_eq!(relocate(&chain, 1, Destination::From(FileCluster(6))), Some(FileCluster(8)));
        settle(&chain);
        write(&chain, 5, 5);
        assert_eq!(chain.place_of(GuestCluster(5)), Some(FileCluster(9)));
        chain.reserve_floor(FileCluster(0));
        write(&chain, 6, 6);
        assert_eq!(chain.place_of(GuestCluster(6)), Some(FileCluster(1)));
        settle(&chain);
        let seen = guest_content(&chain);
        let first_bytes: Vec<u8> = [0, 1, 2, 5, 6].iter().map(|cluster| seen[cluster * CLUSTER]).collect();
        assert_eq!(first_bytes, [1, 2, 3, 5, 6]);
        chain.close().unwrap();
    }
}
