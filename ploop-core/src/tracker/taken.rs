//! Dirty blocks on loan to a harvester.
//!
//! Invariant: every block of a loan counts in the tracker's total of loans until the loan ends, and it ends exactly
//! once: acknowledged, or given back. A harvester that fails, panics or forgets gives back.

use std::sync::Arc;

use crate::Extent;
use crate::tracker::Tracker;

/// A run of guest bytes taken from a [`Tracker`]. Read them now, after taking, never before.
///
/// Dropped without [`acknowledge`](Self::acknowledge) the run is dirty again.
#[must_use = "a loan that is dropped makes its bytes dirty again"]
pub struct Taken {
    tracker: Arc<Tracker>,
    extent: Extent,
    acknowledged: bool,
}

impl Taken {
    pub(super) fn new(tracker: Arc<Tracker>, extent: Extent) -> Self {
        Self { tracker, extent, acknowledged: false }
    }

    /// The guest bytes: whole blocks of 4 KiB, the last one of the disk cut at its end. Never empty.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The bytes are durable where they were sent: the loan ends. Writes that came meanwhile stay marked.
    pub fn acknowledge(mut self) {
        self.acknowledged = true;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.tracker.end_loan(self.extent, self.acknowledged);
    }
}

impl std::fmt::Debug for Taken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Taken({})", self.extent)
    }
}
