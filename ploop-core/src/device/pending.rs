//! What a successor must know of a server that died: entries that are acknowledged and not yet in the table on disk.
//!
//! A write into a new cluster is acknowledged when its bytes are in the image file and its entry is in the table in
//! memory; the entry reaches the disk with the next flush. When the server process dies in between, the kernel above
//! still counts the write as done: its page cache is clean, and a later flush sent to a successor would succeed
//! without the write. A [`PendingLog`] keeps those entries in memory that outlives the process.
//!
//! Order of calls, and why it loses nothing:
//!
//! 1. The table in memory changes, *then* [`entered`](PendingLog::entered) is called, *then* the request is
//!    acknowledged. Calls for one guest cluster come in the order of its changes (its lock is held).
//! 2. [`seal`](PendingLog::seal) is called *before* the dirty table is sealed for writing: every entry logged before
//!    is part of what will be written.
//! 3. [`committed`](PendingLog::committed) is called after the table is durable, with that seal, *before* any cluster
//!    freed by it is punched or handed out again. Entries logged after the seal stay, also those that were written
//!    already: entering one again changes nothing.

use crate::units::{FileCluster, GuestCluster};

/// One change of the table of the top delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEntry {
    /// Whose entry.
    pub cluster: GuestCluster,
    /// Where its content is now; `None` when the entry was cleared.
    pub file: Option<FileCluster>,
}

/// A position in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seal(pub u64);

/// A record of pending entries that outlives the process. All methods may be called from any thread; none fails: an
/// implementation that cannot keep an entry keeps the fact that one is missing.
pub trait PendingLog: Send + Sync + std::fmt::Debug {
    /// The table in memory has changed; called before the request that did it is acknowledged.
    fn entered(&self, entry: PendingEntry);
    /// Where the log ends now; called before the table is sealed.
    fn seal(&self) -> Seal;
    /// Everything before `seal` is durable.
    fn committed(&self, seal: Seal);
    /// A sync or a write of the table failed: nobody may go on writing to this disk. Called before any request that
    /// waited for it is failed.
    fn poisoned(&self);
    /// Another delta has become the top, with an empty table and nothing pending; called while no write is running.
    fn top_replaced(&self);
}

/// Keeps nothing: for disks without a keeper, whose users die with the server or repeat what was not flushed.
#[derive(Debug, Default)]
pub struct NoPendingLog;

impl PendingLog for NoPendingLog {
    fn entered(&self, _entry: PendingEntry) {}
    fn seal(&self) -> Seal {
        Seal(0)
    }
    fn committed(&self, _seal: Seal) {}
    fn poisoned(&self) {}
    fn top_replaced(&self) {}
}
