//! Which guest bytes changed since: the write tracker, for live copies and backups.
//!
//! A [`Tracker`] keeps one bit per [`GRANULARITY_BYTES`] of the guest's disk, in guest coordinates, so a small
//! scattered write costs one block to copy whatever the cluster size. Its bitmap is sized when it starts (32 MiB of
//! address space per TiB, touched as bits are set), so marking never allocates and never fails. Several trackers
//! may run at once ([`Trackers`]); each sees every write.
//!
//! Rules (crash model, section 6), and who keeps them:
//!
//! * T1 The device marks **after** the write completed, successfully or not, and **before** it answers. Marking only
//!   before would lose the write: a harvester could take the bit and read the old bytes in between.
//! * T2 [`Tracker::take`] clears the bits **first** and hands them out; only then are the bytes read. A loan
//!   ([`Taken`]) that is not acknowledged gives its bits back.
//! * T3 Discards, zeroing, failed writes and resizes mark like writes; moves inside the image do not.
//! * T4 The last harvest comes after writers were stopped and drained: only then does [`Tracker::is_clean`] mean that
//!   nothing will follow.
//! * T6 Start the tracker, then take the first pass over the data: [`Trackers::add`] before reading.
//!
//! Why no write is lost: mark and take of one block are read-modify-writes of one word with acquire and release.
//! If the mark comes first, the take acquires it, and the bytes written before the mark are seen by the read after
//! the take. If the take comes first, the mark stays for the next take. (`bitmap.rs` argues the same for summaries.)
//!
//! Locking: marking takes no lock. Takes and the ends of loans exclude each other by one mutex, so that a block
//! moves between "dirty" and "on loan" unseen by `is_clean`. Nothing else is locked inside it. `Trackers` holds its
//! read lock while it marks; a tracker's mutex is never taken inside that.

mod bitmap;
mod taken;

use std::sync::{Arc, PoisonError};

use bitmap::DirtyBitmap;
pub use taken::Taken;

use crate::sync::{
    AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Mutex, Ordering, RwLock, RwLockWriteGuard, fence,
};
use crate::{Error, ErrorKind, Extent, Result};

/// Bytes that one bit stands for.
pub const GRANULARITY_BYTES: u64 = 4096;

/// The dirty blocks of one disk since a moment, for one harvester or several.
pub struct Tracker {
    disk: Extent,
    bitmap: DirtyBitmap,
    /// Set bits of the bitmap, counted after they change: exact when nothing runs, for a moment too low or too high
    /// while something does.
    dirty_blocks: AtomicI64,
    /// Blocks on loan. Its lock also makes takes and ends of loans exclude each other.
    loaned_blocks: Mutex<u64>,
    stopped: AtomicBool,
}

impl Tracker {
    /// A tracker of a disk of `disk_bytes`, all clean. Fails ([`ErrorKind::Memory`]) only when there is no address
    /// space for the bitmap.
    pub fn new(disk_bytes: u64) -> Result<Arc<Self>> {
        Self::over(disk_bytes, DirtyBitmap::new(disk_bytes.div_ceil(GRANULARITY_BYTES)))
    }

    fn over(disk_bytes: u64, bitmap: Option<DirtyBitmap>) -> Result<Arc<Self>> {
        let bitmap = bitmap.ok_or_else(|| {
            Error::new(
                ErrorKind::Memory,
                format!("start write tracker: no memory for the bitmap of a disk of {disk_bytes} bytes"),
            )
        })?;
        Ok(Arc::new(Self {
            disk: Extent::between(0, disk_bytes),
            bitmap,
            dirty_blocks: AtomicI64::new(0),
            loaned_blocks: Mutex::new(0),
            stopped: AtomicBool::new(false),
        }))
    }

    /// The first and the last block of the part of `extent` that lies on the disk.
    fn blocks(&self, extent: Extent) -> Option<(u64, u64)> {
        let inside = extent.clip(&self.disk);
        (!inside.is_empty())
            .then(|| (inside.start() / GRANULARITY_BYTES, (inside.end() - 1) / GRANULARITY_BYTES))
    }

    fn set(&self, extent: Extent) {
        if let Some((first, last)) = self.blocks(extent) {
            let newly_set = self.bitmap.set(first, last);
            if newly_set > 0 {
                self.dirty_blocks.fetch_add(signed(newly_set), Ordering::Relaxed);
            }
        }
    }

    /// Records that `extent` may have changed. Call it after the write completed (also when it failed) and before
    /// the guest is answered. What lies past the end of the disk is ignored. Lock-free, cannot fail.
    pub fn mark(&self, extent: Extent) {
        if !self.stopped.load(Ordering::Relaxed) {
            self.set(extent);
        }
    }

    /// Records that the whole disk may have changed. Touches the whole bitmap.
    pub fn mark_all(&self) {
        self.mark(self.disk);
    }

    /// The next dirty run at or after guest byte `from`, cleared and lent; `None` when there is none (no wrap: start
    /// again from 0), or the tracker was stopped. It starts at a block boundary, which is before `from` if `from` is
    /// inside a dirty block, and holds `len_max` bytes at most, but at least one block.
    pub fn take(self: &Arc<Self>, from: u64, len_max: u64) -> Option<Taken> {
        if from >= self.disk.end() || self.is_stopped() {
            return None;
        }
        let mut loaned_blocks = self.loaned_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.bitmap.next_set(from / GRANULARITY_BYTES)?;
        let count = self.bitmap.clear(first, (len_max / GRANULARITY_BYTES).max(1));
        if count == 0 {
            return None;
        }
        self.dirty_blocks.fetch_sub(signed(count), Ordering::Relaxed);
        *loaned_blocks += count;
        let start = first * GRANULARITY_BYTES;
        let extent =
            Extent::between(start, (first + count).saturating_mul(GRANULARITY_BYTES)).clip(&self.disk);
        Some(Taken::new(Arc::clone(self), extent))
    }

    /// Ends a loan: the bits are set again first, unless acknowledged.
    fn end_loan(&self, extent: Extent, acknowledged: bool) {
        let mut loaned_blocks = self.loaned_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if !acknowledged {
            self.set(extent);
        }
        if let Some((first, last)) = self.blocks(extent) {
            *loaned_blocks = loaned_blocks.saturating_sub(last - first + 1);
        }
    }

    /// About how many bytes are dirty (loans not counted): exact while nothing is marked or taken, off by what is
    /// under way otherwise, never 0 when something is dirty. The whole disk after [`stop`](Self::stop).
    pub fn dirty_bytes(&self) -> u64 {
        if self.is_stopped() {
            return self.disk.len();
        }
        let blocks = u64::try_from(self.dirty_blocks.load(Ordering::Relaxed)).unwrap_or(0);
        if blocks > 0 {
            return blocks.saturating_mul(GRANULARITY_BYTES).min(self.disk.len());
        }
        // The count may lag behind; the bitmap does not, once nobody is clearing it.
        let _no_takes = self.loaned_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        self.bitmap.next_set(0).map_or(0, |_| GRANULARITY_BYTES.min(self.disk.len()))
    }

    /// The first dirty byte at or after guest byte `from`, or `from` itself inside a dirty block. A look, no more: it says
    /// nothing about a moment later.
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.disk.end() {
            return None;
        }
        let block = self.bitmap.next_set(from / GRANULARITY_BYTES)?;
        Some((block * GRANULARITY_BYTES).max(from)).filter(|&at| at < self.disk.end())
    }

    /// How many bytes of `extent` are dirty, in whole blocks. As exact as [`next_dirty`](Self::next_dirty).
    pub fn dirty_bytes_in(&self, extent: Extent) -> u64 {
        self.blocks(extent).map_or(0, |(first, last)| self.bitmap.count(first, last) * GRANULARITY_BYTES)
    }

    /// Whether nothing is dirty and nothing on loan. Says something about the future only when writers are stopped
    /// and drained. False after [`stop`](Self::stop): a tracker that does not look knows nothing.
    pub fn is_clean(&self) -> bool {
        let loaned_blocks = self.loaned_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        !self.is_stopped() && *loaned_blocks == 0 && self.bitmap.next_set(0).is_none()
    }

    /// Ends tracking for good: nothing more is marked or taken, and the tracker no longer claims to be clean.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The disk this tracks: bytes from 0 to its size.
    pub fn disk(&self) -> Extent {
        self.disk
    }
}

/// A count of blocks for the signed counter. There are fewer than 2^52.
fn signed(blocks: u64) -> i64 {
    i64::try_from(blocks).unwrap_or(i64::MAX)
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tracker")
            .field("disk_bytes", &self.disk.len())
            .field("blocks", &self.bitmap.bits())
            .field("stopped", &self.is_stopped())
            .finish_non_exhaustive()
    }
}

/// No tracker is active, and none can be started, as long as this exists.
#[derive(Debug)]
pub struct Resizing<'a> {
    disk_bytes: &'a AtomicU64,
    _active: RwLockWriteGuard<'a, Vec<Arc<Tracker>>>,
}

impl Resizing<'_> {
    /// Later trackers are for a disk of this size.
    pub fn set_disk_bytes(&self, disk_bytes: u64) {
        self.disk_bytes.store(disk_bytes, Ordering::Release);
    }
}

/// The trackers active on one disk.
#[derive(Debug)]
pub struct Trackers {
    /// Changes only while [`Resizing`] exists.
    disk_bytes: AtomicU64,
    /// How many there are, for the usual case that there are none.
    count: AtomicUsize,
    active: RwLock<Vec<Arc<Tracker>>>,
}

impl Trackers {
    /// None active, for a disk of `disk_bytes`.
    pub fn new(disk_bytes: u64) -> Self {
        Self {
            disk_bytes: AtomicU64::new(disk_bytes),
            count: AtomicUsize::new(0),
            active: RwLock::new(Vec::new()),
        }
    }

    /// Starts a tracker. A write whose [`mark`](Self::mark) missed it had completed before
    /// this returns, so data read afterwards has it (T6).
    pub fn add(&self) -> Result<Arc<Tracker>> {
        loop {
            let tracker = Tracker::new(self.disk_bytes.load(Ordering::Acquire))?;
            if self.insert(&tracker) {
                return Ok(tracker);
            }
        }
    }

    /// False, and nothing is done, when the disk has another size by now.
    fn insert(&self, tracker: &Arc<Tracker>) -> bool {
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        if self.disk_bytes.load(Ordering::Acquire) != tracker.disk().len() {
            return false;
        }
        active.push(Arc::clone(tracker));
        self.count.store(active.len(), Ordering::Relaxed);
        // Pairs with the fence in `mark`: of the two, one sees what the other did before its fence. Either the mark
        // sees the count, or what was written before the mark is seen by whoever reads after this call.
        fence(Ordering::SeqCst);
        true
    }

    /// Keeps trackers from being started while the size of the disk changes; `None` while one is active: it could not
    /// cover the new range.
    pub fn resizing(&self) -> Option<Resizing<'_>> {
        let active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        active.is_empty().then_some(Resizing { disk_bytes: &self.disk_bytes, _active: active })
    }

    /// Stops `tracker` and takes it out of the set; nothing happens if it is not in it.
    pub fn remove(&self, tracker: &Arc<Tracker>) {
        tracker.stop();
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        active.retain(|one| !Arc::ptr_eq(one, tracker));
        self.count.store(active.len(), Ordering::Relaxed);
    }

    /// Marks `extent` in every active tracker; without one it costs a fence and a load.
    pub fn mark(&self, extent: Extent) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        for tracker in self.active.read().unwrap_or_else(PoisonError::into_inner).iter() {
            tracker.mark(extent);
        }
    }

    /// How many are active.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether none is active.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_models;

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
