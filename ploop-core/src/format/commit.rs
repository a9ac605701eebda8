//! What a group of flushes has to write, and in which order, as data.
//!
//! The flusher's part: `seal` the chain, sync the top, write [`CommitPlan::writes`], sync again, hand the plan to
//! `committed`. With an empty plan the first sync is all. On any error it hands the plan to `failed`.

use crate::units::{FileCluster, FileOffset};

use super::alloc::SyncMark;

/// The table sectors to be written by one group of flushes. One plan at a time: it goes back to
/// [`Chain::committed`](super::Chain::committed) or [`Chain::failed`](super::Chain::failed) before the next seal.
#[derive(Debug, Default)]
#[must_use = "a plan that is not written loses what it sealed"]
pub struct CommitPlan {
    /// Whole sectors of the table as they were at the seal: ascending, not overlapping, not adjacent unless cut for
    /// size; each begins and ends at a multiple of the storage's alignment.
    pub writes: Vec<(FileOffset, Vec<u8>)>,
    /// Number of the group; rises by one with each seal.
    pub epoch: u64,
    /// Table sectors that were dirty.
    pub(crate) sectors: Vec<u32>,
    /// Changes it makes durable.
    pub(crate) changes: usize,
    /// Clusters whose clearing it makes durable.
    pub(crate) cleared: Vec<FileCluster>,
    /// Growth and punches that its first sync makes durable.
    pub(crate) sync_mark: SyncMark,
}

impl CommitPlan {
    /// Whether there is nothing to write: one sync is enough.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}
