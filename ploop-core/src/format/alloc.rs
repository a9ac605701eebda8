//! Free clusters of a writable image: where the next guest cluster goes.
//!
//! The lowest free cluster is handed out first; when none is left the file grows, in steps ahead of need so that
//! clusters are durably zero by the time they are used (crash model 4.3). Space is reserved before it is handed
//! out: a full host shows here, where nothing has changed yet (E3), and not in a sync.
//!
//! Invariants:
//! * a cluster is *used* while a table entry names it, while it is reserved, and in quarantine: from the clearing
//!   of its entry until [`release`](ClusterAllocator::release) (I4);
//! * *known zero* is claimed only for bytes past the durable end of the file at open, once a sync has covered the
//!   growth, and for punched clusters once a sync has covered the punch; never for a cluster handed out since.
//!
//! Locking: one mutex, taken after that of the table or alone, held while the file grows.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Allocation, Storage};
use crate::mutant::{self, Mutant};
use crate::units::{FileCluster, FileOffset, GuestCluster};

use super::geometry::Geometry;

/// The file grows by this much at most.
const STEP_BYTES_MAX: u64 = 64 << 20;
/// A disk is filled in at least this many steps, so that small images grow by little.
const STEPS_PER_DISK: u64 = 64;

/// A dense set of cluster numbers; as long as its highest member asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterSet {
    words: Vec<u64>,
    count: u64,
}

fn place(cluster: u32) -> (usize, u64) {
    // A u32 fits usize on every host this runs on.
    ((cluster / 64) as usize, 1 << (cluster % 64))
}

impl ClusterSet {
    /// Adds a cluster; `false` if it was there.
    pub(crate) fn insert(&mut self, cluster: u32) -> bool {
        let (word, bit) = place(cluster);
        if word >= self.words.len() {
            self.words.resize((word + 1).next_multiple_of(64), 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.count += u64::from(new);
        new
    }

    /// Adds `count` clusters from `first` on; `false`, and none is added, if one of them was there.
    pub(crate) fn insert_run(&mut self, first: u32, count: u32) -> bool {
        let Some(last) = count.checked_sub(1).map(|more| first.checked_add(more)) else { return true };
        let Some(last) = last else { return false };
        let (from, to) = (place(first).0, place(last).0);
        let (head, tail) = (u64::MAX << (first % 64), u64::MAX >> (63 - last % 64));
        if to >= self.words.len() {
            self.words.resize((to + 1).next_multiple_of(64), 0);
        }
        let words = &mut self.words[from..=to];
        let free = match words {
            [only] => *only & head & tail == 0,
            [start, middle @ .., end] => {
                *start & head == 0 && *end & tail == 0 && middle.iter().all(|&word| word == 0)
            }
            [] => true,
        };
        if free {
            match words {
                [only] => *only |= head & tail,
                [start, middle @ .., end] => {
                    *start |= head;
                    *end |= tail;
                    middle.fill(u64::MAX);
                }
                [] => {}
            }
            self.count += u64::from(count);
        }
        free
    }

    /// Takes a cluster out; `false` if it was not there.
    pub(crate) fn remove(&mut self, cluster: u32) -> bool {
        let (word, bit) = place(cluster);
        match self.words.get_mut(word) {
            Some(value) if *value & bit != 0 => {
                *value &= !bit;
                self.count -= 1;
                true
            }
            _ => false,
        }
    }

    /// Whether a cluster is in the set.
    pub(crate) fn contains(&self, cluster: u32) -> bool {
        let (word, bit) = place(cluster);
        self.words.get(word).is_some_and(|value| value & bit != 0)
    }

    /// Members.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The highest member.
    pub(crate) fn highest(&self) -> Option<u32> {
        let word = self.words.iter().rposition(|&value| value != 0)?;
        u32::try_from(word).ok().map(|index| index * 64 + 63 - self.words[word].leading_zeros())
    }

    /// The lowest cluster in `from..end` that is not in the set.
    pub(crate) fn first_absent(&self, from: u32, end: u32) -> Option<u32> {
        let mut at = from;
        while at < end {
            let (word, _) = place(at);
            let free = match self.words.get(word) {
                None => return Some(at),
                Some(value) => !value >> (at % 64),
            };
            if free != 0 {
                let found = at + free.trailing_zeros();
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1).checked_mul(64)?;
        }
        None
    }
}

/// Which free cluster to hand out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// The lowest; the file grows if it must.
    Lowest,
    /// The lowest, if it is below this one; the file does not grow.
    Below(u32),
    /// The lowest at or past this one; the file grows if it must.
    From(u32),
}

/// A cluster handed out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) cluster: FileCluster,
    /// It reads as zeros now and after any crash.
    pub(crate) known_zero: bool,
    /// It had been handed out before, in this or an earlier life of the image.
    pub(crate) reused: bool,
    /// Where the file ended when it was handed out.
    pub(crate) tail: FileOffset,
}

/// What a sync that starts after this was made will have made durable.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SyncMark {
    file_clusters: u32,
    generation: u64,
}

struct Inner {
    used: ClusterSet,
    /// No cluster from the first data cluster up to here is free.
    lowest_free: u32,
    /// No cluster before this one is handed out.
    floor: u32,
    /// From here on no cluster has been handed out in this session.
    fresh: u32,
    /// The first cluster wholly past the end of the file as it was opened.
    zero_start: u32,
    /// Whole clusters that the file covers.
    file_clusters: u32,
    /// The same, durably.
    durable_clusters: u32,
    /// Free and durably zero.
    zeroed: HashSet<u32>,
    /// Free and punched, by the generation in which that happened.
    punched: HashMap<u32, u64>,
    generation: u64,
    /// Guest clusters with a reservation.
    reserved: HashSet<GuestCluster>,
    /// Growing ahead has failed: wait until it must be.
    ahead_refused: bool,
    closed: bool,
    /// Of a mutant: a growth that is still to be done.
    deferred: bool,
    /// Bytes of the host's file system that stay free.
    host_reserve_bytes: u64,
}

impl Inner {
    /// As [`reserve`], within what is to stay free on the host.
    fn reserve(&self, storage: &dyn Storage, offset: u64, len: u64) -> io::Result<()> {
        if self.host_reserve_bytes > 0 {
            let free = storage.host_free_bytes()?;
            if free.is_some_and(|free| free < self.host_reserve_bytes.saturating_add(len)) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        reserve(storage, offset, len)
    }
}

/// See the module.
pub(crate) struct ClusterAllocator {
    geometry: Geometry,
    inner: Mutex<Inner>,
}

impl ClusterAllocator {
    /// The allocator of an image whose table names `used`, in a file of `file_bytes` durable bytes.
    pub(crate) fn new(geometry: Geometry, used: ClusterSet, file_bytes: u64) -> Self {
        let first = geometry.first_data_cluster().0;
        let file_clusters = geometry.clusters_in(file_bytes).max(first);
        let past_phase = file_bytes.saturating_sub(geometry.phase_bytes());
        let zero_start = u32::try_from(past_phase.div_ceil(geometry.cluster_bytes())).unwrap_or(u32::MAX);
        let inner = Inner {
            used,
            lowest_free: first,
            floor: first,
            fresh: zero_start.max(first),
            zero_start: zero_start.max(first),
            file_clusters,
            durable_clusters: file_clusters,
            zeroed: HashSet::new(),
            punched: HashMap::new(),
            generation: 0,
            reserved: HashSet::new(),
            ahead_refused: false,
            closed: false,
            deferred: false,
            host_reserve_bytes: 0,
        };
        Self { geometry, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds this lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clusters to grow by, at most.
    fn step_clusters(&self) -> u32 {
        let step_bytes = (self.geometry.disk_bytes() / STEPS_PER_DISK).min(STEP_BYTES_MAX);
        u32::try_from(step_bytes / self.geometry.cluster_bytes()).unwrap_or(u32::MAX).max(1)
    }

    /// Reserves a cluster for `guest`; `None` when `is_mapped` says, under the lock, that it has one by now.
    /// Fails with `Busy` if it is reserved already, with `Allocate` when there is no room.
    pub(crate) fn take(
        &self,
        storage: &dyn Storage,
        guest: GuestCluster,
        is_mapped: impl FnOnce() -> bool,
    ) -> Result<Option<Taken>> {
        self.take_where(storage, guest, Wanted::Lowest, is_mapped)
    }

    /// As [`take`](Self::take), from certain places; `None` also when no such place is free and the file is not to grow.
    pub(crate) fn take_where(
        &self,
        storage: &dyn Storage,
        guest: GuestCluster,
        wanted: Wanted,
        is_mapped: impl FnOnce() -> bool,
    ) -> Result<Option<Taken>> {
        let mut inner = self.lock();
        if is_mapped() {
            return Ok(None);
        }
        if inner.closed {
            return Err(Error::new(ErrorKind::Write, "allocate a cluster: the image is closed"));
        }
        if inner.reserved.contains(&guest) {
            return Err(Error::new(ErrorKind::Busy, "allocate a cluster: another write is allocating it"));
        }
        let Some(mut cluster) = self.choose(storage, &mut inner, wanted)? else { return Ok(None) };
        if cluster < inner.fresh && !mutant::is_active(Mutant::ExtensionNotSynced) {
            // A free place may be a hole: its blocks are taken now, or the host being full would show in a sync.
            let offset = self.geometry.file_offset(FileCluster(cluster)).0;
            let reserved = inner.reserve(storage, offset, self.geometry.cluster_bytes());
            // Then one of those that were reserved ahead.
            let ahead = matches!(wanted, Wanted::Lowest)
                .then(|| inner.used.first_absent(inner.fresh.max(inner.floor), inner.file_clusters));
            match (reserved, ahead.flatten()) {
                (Ok(()), _) => {}
                (Err(_), Some(ahead)) => cluster = ahead,
                (Err(source), None) => return Err(no_room(source, offset, self.geometry.cluster_bytes())),
            }
        }
        let reused = cluster < inner.fresh;
        let was_zeroed = inner.zeroed.remove(&cluster);
        inner.punched.remove(&cluster);
        let fresh_zero = !reused && cluster >= inner.zero_start && cluster < inner.durable_clusters;
        inner.used.insert(cluster);
        inner.reserved.insert(guest);
        if inner.used.first_absent(inner.lowest_free, cluster).is_none() {
            inner.lowest_free = cluster + 1;
        }
        inner.fresh = inner.fresh.max(cluster + 1);
        let taken = Taken {
            cluster: FileCluster(cluster),
            known_zero: was_zeroed || fresh_zero,
            reused,
            tail: FileOffset(self.end_of(inner.file_clusters)),
        };
        let ahead = inner.file_clusters.saturating_sub(inner.fresh);
        if ahead < self.step_clusters() / 2 && !inner.ahead_refused && self.needed(&inner) > u64::from(ahead)
        {
            // This request has its cluster. The one that finds no room is told so.
            inner.ahead_refused = self.grow(storage, &mut inner).is_err();
        }
        Ok(Some(taken))
    }

    /// A free cluster as wanted, after growing the file as often as that takes.
    fn choose(&self, storage: &dyn Storage, inner: &mut Inner, wanted: Wanted) -> Result<Option<u32>> {
        let lowest = inner.lowest_free.max(inner.floor);
        let from = match wanted {
            Wanted::Below(limit) => {
                return Ok(inner.used.first_absent(lowest, inner.file_clusters.min(limit)));
            }
            Wanted::Lowest => lowest,
            Wanted::From(from) => lowest.max(from),
        };
        loop {
            if let Some(cluster) = inner.used.first_absent(from, inner.file_clusters) {
                return Ok(Some(cluster));
            }
            let before = inner.file_clusters;
            self.grow(storage, inner)?;
            if inner.file_clusters == before {
                return Err(Error::new(ErrorKind::Allocate, "allocate a cluster: the file did not grow"));
            }
        }
    }

    /// From now on the file takes no space that would leave the host less than `bytes`: to it, the host is full then.
    pub(crate) fn keep_host_free(&self, bytes: u64) {
        self.lock().host_reserve_bytes = bytes;
    }

    /// From now on no cluster below `floor` is handed out.
    pub(crate) fn reserve_floor(&self, floor: FileCluster) {
        self.lock().floor = floor.0;
    }

    /// Cuts the free clusters off the end of the file; how many bytes that was. No plan is between its seal and its
    /// commit: a sync that has begun would count the cut clusters as durable.
    pub(crate) fn cut_tail(&self, storage: &dyn Storage) -> Result<u64> {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let highest = inner.used.highest().map(FileCluster);
        let end_bytes = trimmed_bytes(&self.geometry, highest);
        // At least one cluster, as at rest; whole clusters, as the allocator counts.
        let end = self.geometry.clusters_in(end_bytes).max(self.geometry.first_data_cluster().0);
        if end >= inner.file_clusters {
            return Ok(0);
        }
        let cut_bytes = self.end_of(inner.file_clusters).saturating_sub(end_bytes);
        storage.set_len(end_bytes).map_err(|source| {
            Error::io(ErrorKind::Truncate, "cut the tail of the image", source).at_offset(end_bytes)
        })?;
        inner.file_clusters = end;
        // What grows here again is known to be zero only once that growth has been synced.
        inner.durable_clusters = inner.durable_clusters.min(end);
        inner.zeroed.retain(|&cluster| cluster < end);
        inner.punched.retain(|&cluster, _| cluster < end);
        Ok(cut_bytes)
    }

    /// Clusters the disk can still ask for.
    fn needed(&self, inner: &Inner) -> u64 {
        u64::from(self.geometry.entries()).saturating_sub(inner.used.count())
    }

    /// The file length that covers `clusters` whole clusters.
    fn end_of(&self, clusters: u32) -> u64 {
        self.geometry.file_offset(FileCluster(clusters)).0
    }

    fn grow(&self, storage: &dyn Storage, inner: &mut Inner) -> Result<()> {
        let room = self.geometry.file_clusters_max().saturating_sub(inner.file_clusters);
        if room == 0 {
            return Err(self
                .geometry
                .cluster_to_entry(FileCluster(inner.file_clusters))
                .err()
                .unwrap_or_else(|| {
                    Error::new(ErrorKind::Allocate, "grow the image: the table cannot point further")
                }));
        }
        let needed = u32::try_from(self.needed(inner)).unwrap_or(u32::MAX).max(1);
        let step = self.step_clusters().min(needed).min(room);
        if mutant::is_active(Mutant::ExtensionNotSynced) {
            inner.file_clusters += step;
            inner.durable_clusters = inner.file_clusters;
            inner.deferred = true;
            return Ok(());
        }
        let start = self.end_of(inner.file_clusters);
        let cluster_bytes = self.geometry.cluster_bytes();
        let grown = match inner.reserve(storage, start, u64::from(step) * cluster_bytes) {
            Ok(()) => step,
            Err(_) if step > 1 => {
                // There may be room for the one that is needed.
                inner
                    .reserve(storage, start, cluster_bytes)
                    .map_err(|source| no_room(source, start, cluster_bytes))?;
                1
            }
            Err(source) => return Err(no_room(source, start, cluster_bytes)),
        };
        inner.file_clusters += grown;
        Ok(())
    }

    /// Ends a reservation. `published`: a table entry names the cluster now; else it is free again, with any content.
    pub(crate) fn settle(&self, guest: GuestCluster, cluster: FileCluster, published: bool) {
        let mut inner = self.lock();
        inner.reserved.remove(&guest);
        if !published {
            inner.used.remove(cluster.0);
            inner.lowest_free = inner.lowest_free.min(cluster.0);
        }
    }

    /// Marks clusters as used that an earlier owner of the image had handed out. Fails with [`ErrorKind::Corrupt`], and
    /// marks none, if one is used already, named twice, or not a whole cluster behind the table.
    pub(crate) fn adopt(&self, clusters: &[FileCluster]) -> Result<()> {
        let mut inner = self.lock();
        let first = self.geometry.first_data_cluster().0;
        for (index, cluster) in clusters.iter().enumerate() {
            let is_in_file = (first..inner.file_clusters).contains(&cluster.0);
            if !is_in_file || !inner.used.insert(cluster.0) {
                for done in &clusters[..index] {
                    inner.used.remove(done.0);
                }
                let why = if is_in_file { "is in use already" } else { "is not in the file" };
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("enter a pending change: {cluster} {why}"),
                ));
            }
        }
        Ok(())
    }

    /// Ends the quarantine of a cluster whose clearing is durable and that no request uses. `punched`: a hole was
    /// punched over it, and that has completed.
    pub(crate) fn release(&self, cluster: FileCluster, punched: bool) {
        let mut inner = self.lock();
        if !inner.used.remove(cluster.0) {
            return;
        }
        inner.lowest_free = inner.lowest_free.min(cluster.0);
        inner.ahead_refused = false;
        if punched {
            let generation = inner.generation;
            inner.punched.insert(cluster.0, generation);
        }
    }

    /// Taken before a sync, given to [`synced`](Self::synced) after it.
    pub(crate) fn sync_mark(&self) -> SyncMark {
        let mut inner = self.lock();
        let mark = SyncMark { file_clusters: inner.file_clusters, generation: inner.generation };
        inner.generation += 1;
        mark
    }

    /// A sync that began after `mark` was taken has succeeded.
    pub(crate) fn synced(&self, storage: &dyn Storage, mark: SyncMark) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.durable_clusters = inner.durable_clusters.max(mark.file_clusters);
        if !inner.punched.is_empty() {
            let zeroed = &mut inner.zeroed;
            inner.punched.retain(|&cluster, &mut generation| {
                let durable = generation <= mark.generation;
                if durable {
                    zeroed.insert(cluster);
                }
                !durable
            });
        }
        if inner.deferred {
            inner.deferred = false;
            // Only a mutant comes here; what it breaks is the point.
            let _ = storage.set_len(self.end_of(inner.file_clusters));
        }
    }

    /// Whether the file has grown since the last sync: clusters handed out now are not known to be zero.
    pub(crate) fn has_unsynced_growth(&self) -> bool {
        let inner = self.lock();
        inner.durable_clusters < inner.file_clusters
    }

    /// Admits no further reservation; `false` while there is one.
    pub(crate) fn close(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.reserved.is_empty();
        inner.closed
    }
}

/// The file length at rest: the end of the highest cluster that the table names, at least one cluster.
pub(crate) fn trimmed_bytes(geometry: &Geometry, highest: Option<FileCluster>) -> u64 {
    let data_end = highest.map_or(0, |cluster| geometry.file_end(cluster).0);
    data_end.max(geometry.data_start().0).max(geometry.cluster_bytes())
}

fn no_room(source: io::Error, offset: u64, len: u64) -> Error {
    Error::io(ErrorKind::Allocate, format!("reserve {len} bytes for the image"), source)
        .at_offset(offset)
        .advise("make room on the host file system; what the disk holds is not affected")
}

/// Reserves blocks, or just extends the file where the host cannot reserve.
pub(crate) fn reserve(storage: &dyn Storage, offset: u64, len: u64) -> io::Result<()> {
    let reserved = loop {
        match storage.allocate(offset, len, Allocation::Reserve) {
            // A signal, not a full host: what was reserved so far stays, and asking again goes on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result,
        }
    };
    match reserved {
        Err(error) if is_unsupported(&error) => {
            let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
            if storage.len()? < end { storage.set_len(end) } else { Ok(()) }
        }
        result => result,
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{file_with_len, small as geometry};
    use crate::io::sim::SimStorage;

    fn take(allocator: &ClusterAllocator, file: &SimStorage, guest: u32) -> Taken {
        allocator.take(file, GuestCluster(guest), || false).unwrap().unwrap()
    }

    #[test]
    fn a_run_is_added_whole_or_not_at_all() {
        let mut state = 7u64;
        for _ in 0..2000 {
            let mut random = |below: u32| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                u32::try_from(state >> 33).unwrap() % below
            };
            let (mut runs, mut singles) = (ClusterSet::default(), ClusterSet::default());
            for _ in 0..random(6) {
                let member = random(300);
                assert_eq!(runs.insert(member), singles.insert(member));
            }
            let (first, count) = (random(200), random(200));
            let is_free = (first..first + count).all(|cluster| !singles.contains(cluster));
            assert_eq!(runs.insert_run(first, count), is_free, "{first} {count}");
            if is_free {
                (first..first + count).for_each(|cluster| assert!(singles.insert(cluster)));
            }
            assert!((0..500).all(|cluster| runs.contains(cluster) == singles.contains(cluster)));
            assert_eq!((runs.count(), runs.highest()), (singles.count(), singles.highest()));
        }
        assert!(!ClusterSet::default().insert_run(u32::MAX, 2));
    }

    #[test]
    fn set_finds_gaps_and_its_highest_member() {
        let mut set = ClusterSet::default();
        for cluster in (0..130).filter(|cluster| cluster % 64 != 5) {
            assert!(set.insert(cluster));
        }
        assert!(!set.insert(0));
        assert_eq!(set.first_absent(0, 200), Some(5));
        assert_eq!(set.first_absent(6, 200), Some(69));
        assert_eq!(set.first_absent(70, 130), None);
        assert_eq!(set.first_absent(70, 131), Some(130));
        assert_eq!(set.first_absent(90_000, 100_000), Some(90_000));
        assert_eq!(set.highest(), Some(129));
        assert!(set.remove(129) && !set.remove(129) && !set.remove(1 << 30));
        assert_eq!((set.highest(), set.count()), (Some(128), 127));
    }

    #[test]
    fn lowest_free_first_then_growth() {
        let geometry = geometry(100);
        let mut used = ClusterSet::default();
        used.insert(1);
        used.insert(3);
        let file = file_with_len(4 * 4096);
        let allocator = ClusterAllocator::new(geometry, used, 4 * 4096);
        assert_eq!(take(&allocator, &file, 0).cluster, FileCluster(2));
        let fresh = take(&allocator, &file, 1);
        assert_eq!((fresh.cluster, fresh.known_zero, fresh.reused), (FileCluster(4), false, false));
        assert!(file.len().unwrap() >= 5 * 4096);
    }

    #[test]
    fn a_signal_is_no_full_host() {
        use crate::io::sim::{Call, Fault};
        let file = file_with_len(4096);
        file.disk().inject(Fault::once(Call::Allocate, libc::EINTR));
        reserve(&file, 4096, 8192).unwrap();
        assert_eq!(file.len().unwrap(), 3 * 4096);
        file.disk().inject(Fault::once(Call::Allocate, libc::ENOSPC));
        assert_eq!(reserve(&file, 4096, 1 << 20).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn growth_is_zero_only_after_a_sync() {
        let file = file_with_len(4096);
        let allocator = ClusterAllocator::new(geometry(1000), ClusterSet::default(), 4096);
        assert!(!take(&allocator, &file, 0).known_zero);
        assert!(allocator.has_unsynced_growth());
        let mark = allocator.sync_mark();
        allocator.synced(&file, mark);
        assert!(!allocator.has_unsynced_growth());
        let taken = take(&allocator, &file, 1);
        assert!(taken.known_zero);
        allocator.settle(GuestCluster(1), taken.cluster, false);
        let again = take(&allocator, &file, 1);
        assert_eq!(again.cluster, taken.cluster);
        assert!(!again.known_zero, "it was handed out: anything may be in it");
    }

    #[test]
    fn a_punched_cluster_is_zero_after_the_next_sync_and_not_if_taken_meanwhile() {
        let file = file_with_len(3 * 4096);
        let mut used = ClusterSet::default();
        used.insert(1);
        used.insert(2);
        let allocator = ClusterAllocator::new(geometry(100), used, 3 * 4096);
        let early = allocator.sync_mark();
        allocator.release(FileCluster(1), true);
        allocator.synced(&file, early);
        let taken = take(&allocator, &file, 0);
        assert_eq!(
            (taken.cluster, taken.known_zero),
            (FileCluster(1), false),
            "that sync began before the punch"
        );
        allocator.settle(GuestCluster(0), taken.cluster, true);
        allocator.release(FileCluster(1), true);
        let mark = allocator.sync_mark();
        allocator.synced(&file, mark);
        assert!(take(&allocator, &file, 0).known_zero);
    }

    #[test]
    fn one_reservation_per_guest_cluster() {
        let file = file_with_len(4096);
        let allocator = ClusterAllocator::new(geometry(100), ClusterSet::default(), 4096);
        let taken = take(&allocator, &file, 7);
        let error = allocator.take(&file, GuestCluster(7), || false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(!allocator.close(), "a reservation is out");
        allocator.settle(GuestCluster(7), taken.cluster, true);
        assert!(allocator.close());
        assert!(allocator.take(&file, GuestCluster(8), || false).is_err());
    }

    #[test]
    fn a_full_host_changes_nothing() {
        let file = file_with_len(4096);
        file.disk().set_capacity(Some(2 * 4096));
        let allocator = ClusterAllocator::new(geometry(1000), ClusterSet::default(), 4096);
        take(&allocator, &file, 0);
        take(&allocator, &file, 1);
        let error = allocator.take(&file, GuestCluster(2), || false).unwrap_err();
        assert!(error.is_out_of_space(), "{error:?}");
        allocator.settle(GuestCluster(1), FileCluster(2), false);
        assert_eq!(take(&allocator, &file, 2).cluster, FileCluster(2));
    }

    #[test]
    fn never_grows_past_what_the_disk_can_use() {
        let file = file_with_len(4096);
        let allocator = ClusterAllocator::new(geometry(3), ClusterSet::default(), 4096);
        for guest in 0..3 {
            take(&allocator, &file, guest);
        }
        assert_eq!(file.len().unwrap(), 4 * 4096);
    }
}
