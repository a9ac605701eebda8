//! Whether reads that began with a former chain are still under way.
//!
//! Reads of lower deltas take no lock: those are never written (I7). When the top has been merged into the delta below
//! it, that one is written again, and a read that began before still has its address there. Writing in place does not
//! hurt such a read, which then ran beside the write. But no place of that file may be punched, given to another cluster or
//! made part of the table as long as one is under way (I4 b).
//!
//! Each queue says in one word of its own which chain the oldest thing it works on began with. It says so *before* it looks
//! which chain is current; who replaces the chain says so before looking at the words (both sequentially consistent): of
//! the two, one sees the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Nothing is being worked on.
const ABSENT: u64 = u64::MAX;

/// One queue's word.
#[derive(Debug)]
pub(super) struct Presence(AtomicU64);

impl Presence {
    /// Something is about to be begun, with the chain of `epoch` or a later one.
    pub(super) fn enter(&self, epoch: u64) {
        if self.0.load(Ordering::Relaxed) == ABSENT {
            self.0.store(epoch, Ordering::SeqCst);
        }
    }

    /// Everything that is left began with the chain of `epoch` or a later one.
    pub(super) fn advance(&self, epoch: u64) {
        if self.0.load(Ordering::Relaxed) != ABSENT {
            self.0.store(epoch, Ordering::SeqCst);
        }
    }

    /// Nothing is left.
    pub(super) fn leave(&self) {
        self.0.store(ABSENT, Ordering::SeqCst);
    }
}

/// The words of all queues of a disk.
#[derive(Debug, Default)]
pub(super) struct Readers(Mutex<Vec<Weak<Presence>>>);

impl Readers {
    /// A word for a new queue; it counts until it is dropped.
    pub(super) fn add(&self) -> Arc<Presence> {
        let presence = Arc::new(Presence(AtomicU64::new(ABSENT)));
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&presence));
        presence
    }

    /// Whether everything under way began with the chain of `epoch` or a later one.
    pub(super) fn are_past(&self, epoch: u64) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(Weak::upgrade).all(|one| one.0.load(Ordering::SeqCst) >= epoch)
    }
}
