//! What a guest changes, for whoever copies it meanwhile: the tracker of a disk as operations see it.
//!
//! In units of 4 KiB, discards, zeroing and failed writes included (T3). What is taken here is read only afterwards; a write
//! that races with the reading is reported again (T1, T2 of the crash model).

use std::sync::Arc;

use super::disk::Disk;
use crate::error::Result;
use crate::extent::Extent;
use crate::tracker::{Taken, Tracker};

/// The changes of a disk since this was made. Dropping it ends the watch.
pub struct Changes {
    disk: Arc<Disk>,
    tracker: Arc<Tracker>,
}

/// Changed bytes on loan. Read them now; dropped without [`acknowledge`](Self::acknowledge) they count as changed again.
#[must_use = "dropped, its bytes count as changed again"]
#[derive(Debug)]
pub struct Change(Taken);

impl Disk {
    /// Begins to watch. What is read after this returns, together with what is reported, is complete (T6).
    pub fn watch_changes(self: &Arc<Self>) -> Result<Changes> {
        Ok(Changes { disk: Arc::clone(self), tracker: self.start_tracker()? })
    }
}

impl Changes {
    /// The next run of changed bytes at or after guest byte `from`, of `len_max` bytes at most but one unit at least;
    /// `None` when there is none up to the end of the disk.
    pub fn take(&self, from: u64, len_max: u64) -> Option<Change> {
        self.tracker.take(from, len_max).map(Change)
    }

    /// About how many bytes have changed and are not on loan: exact on a frozen disk, never 0 when there are some.
    pub fn bytes(&self) -> u64 {
        self.tracker.dirty_bytes()
    }

    /// Whether nothing has changed that was not acknowledged. On a frozen disk that stays so (T4).
    pub fn is_clean(&self) -> bool {
        self.tracker.is_clean()
    }
}

impl Change {
    /// The guest bytes: whole units, the last one of the disk cut at its end.
    pub fn extent(&self) -> Extent {
        self.0.extent()
    }

    /// The bytes have been copied.
    pub fn acknowledge(self) {
        self.0.acknowledge();
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.disk.stop_tracker(&self.tracker);
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Changes").finish_non_exhaustive()
    }
}
