//! What a successor must know of a server that died: entries that are acknowledged and not yet in the table on disk.
//!
//! A write into a new cluster is acknowledged when its bytes are in the image file and its entry is in the table in
//! memory; the entry reaches the disk with the next flush. When the server process dies in between, the kernel above
//! still counts the write as done: its page cache is clean, and a later flush sent to a successor would succeed
//! without the write. A [`PendingLog`] keeps those entries in memory that outlives the process.
//!
//! What holds at every moment: *the table in the file, with the log entered over it, is the table in memory*, but for
//! changes of requests that are not acknowledged. The table in memory never names a place twice nor one that was given
//! back, so neither does what a successor serves. The order of calls that keeps it so:
//!
//! 1. The table in memory changes, [`entered`](PendingLog::entered) is called, and only then the request is
//!    acknowledged. Records for one guest cluster come in the order of its changes (its lock is held).
//! 2. [`seal`](PendingLog::seal) and the seal of the dirty table are *one step against each change and its record*: the
//!    records before the seal are exactly the changes that will be durable with it. Were they two, a cluster could be
//!    placed and recorded between them and then cleared: its clearing would be written with this round, its place
//!    punched and given to somebody else, while the record of the old place came after the seal and stayed.
//! 3. [`committed`](PendingLog::committed) is called after the table is durable, with that seal, *before* any cluster
//!    freed by it is punched or handed out again. Before this call the records repeat what the file says, or will when
//!    its writes are through: the last record for a cluster is never older than the file's entry.
//! 4. [`top_replaced`](PendingLog::top_replaced) is called when nothing is pending and no write is running.
//! 5. A chain is [prepared](PendingLog::chain_prepared) before a descriptor names it, and said to be
//!    [in use](PendingLog::chain_replaced) before the first write goes there: at every moment the successor has the files
//!    of the chain in use, and those of the one the descriptor may name already.
//!
//! `tests/succession.rs` tries every order of a write, a discard, their records, both seals, the syncs, the table write,
//! the cut of the log and the punch, with a death after each (mutant M17: the steps of 2 apart).

use crate::error::Result;
use crate::format::Chain;
use crate::io::Storage;
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
    /// Where the log ends now; called while the table is sealed and nobody changes it.
    fn seal(&self) -> Seal;
    /// Everything before `seal` is durable.
    fn committed(&self, seal: Seal);
    /// A sync or a write of the table failed: nobody may go on writing to this disk. Called before any request that
    /// waited for it is failed.
    fn poisoned(&self);
    /// Another delta, in the file `top`, becomes the top; nothing is pending and no write is running.
    fn top_replaced(&self, top: &dyn Storage);
    /// `chain` is about to become the one in use: called before anything on disk says so. Whoever keeps the log sees to
    /// it that a successor can open these very files, whatever their names are by then. An error means that the chain in
    /// use must stay.
    fn chain_prepared(&self, chain: &Chain) -> Result<()> {
        let _unused = chain;
        Ok(())
    }
    /// `chain` is in use from now on; called after [`top_replaced`](Self::top_replaced) and before any write goes there.
    fn chain_replaced(&self, chain: &Chain) {
        let _unused = chain;
    }
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
    fn top_replaced(&self, _top: &dyn Storage) {}
}
