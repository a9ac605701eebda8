//! TOP layer: what a guest, a client or a copy talks to.
//!
//! [`Disk`] is one open chain that serves many requests; a frontend holds nothing else. Each of its threads drives
//! one [`Queue`]: submit [`Request`]s, run it, collect [`Completion`]s. [`Client`] is the blocking convenience.
//!
//! ```text
//!   frontend thread ── Queue ──┬─ Gate       may writes start? (freeze and thaw)
//!                              ├─ ClusterLocks  who works on which cluster
//!                              ├─ Chain      where is it, where may it be written
//!                              ├─ IoQueue    the transfers
//!                              └─ Trackers   what changed
//!   flusher thread ── Flusher: content sync, table write, table sync, then punch what was freed
//! ```
//!
//! What the layer promises (rule numbers of the crash document):
//!
//! * A completed flush makes every write durable that was answered before the flush was submitted (G1); content is
//!   durable before the pointer to it (I3): `flusher`.
//! * A read returns what was last written and answered, also while a cluster is allocated, copied up or discarded
//!   (G3): `allocating`.
//! * A failed write fails one request (E2); a failed sync or table write poisons the disk (E1): every later write,
//!   flush and close fails, reads go on, the in-use mark stays.
//! * The tracker is marked after the data may have changed and before anybody is told (T1, T3): [`queue`].
//!
//! Order of locks, outermost first: gate → cluster locks → the chain's own. None but the cluster locks, which are
//! states and no mutexes, is held across a transfer.
//!
//! Memory of one disk, at most: per queue `requests_max` requests of a few hundred bytes and `bounce_buffers`
//! buffers of up to 1 MiB (see [`DiskOptions`]); the buffers of requests are the frontend's.

mod allocating;
mod assembling;
mod changes;
pub mod client;
pub mod control;
pub mod disk;
mod flusher;
mod folding;
mod full_host;
pub mod fuse;
mod gate;
pub mod growing;
mod inbox;
pub mod loop_device;
pub mod mount_table;
pub mod pending;
mod placing;
mod presence;
pub mod queue;
mod resizing;
pub mod runtime;
mod settling;
mod slab;
pub mod split;
mod ticket;
mod transferring;
mod waiting;

pub use changes::{Change, Changes};
pub use client::Client;
pub use disk::{Disk, DiskOptions, EntriesKept, Freezing, Frozen, Statistics};
pub use full_host::{OnFull, Waiting};
pub use queue::Queue;
pub use resizing::{GrowOptions, Grown};
pub use settling::Unsettled;

use crate::extent::Extent;
pub use crate::format::Destination;
use crate::io::IoBuf;

/// What a request does with its extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write {
        /// Answer only once it is durable.
        fua: bool,
    },
    /// Make the extent read as zeros.
    WriteZeroes {
        /// Answer only once it is durable.
        fua: bool,
        /// Host space may be given back.
        may_unmap: bool,
    },
    /// Give host space back where possible. The extent reads as zeros afterwards, without exception.
    Discard,
    /// Make everything durable that was answered before this was submitted. The extent means nothing.
    Flush,
    /// Move the one cluster that the extent covers to another place in the top's file, if the top holds it and such a
    /// place is free. The guest sees the same bytes at every moment; trackers are not marked (T3). Not for guests.
    Relocate(Destination),
}

impl Op {
    /// Whether it may change what the guest reads.
    pub fn changes_data(self) -> bool {
        matches!(self, Self::Write { .. } | Self::WriteZeroes { .. } | Self::Discard)
    }

    /// Whether it changes the top's file or its table: what a freeze holds and a read-only disk refuses.
    pub fn changes_image(self) -> bool {
        self.changes_data() || matches!(self, Self::Relocate(_))
    }

    /// Whether the answer has to wait until the change is durable.
    pub fn is_fua(self) -> bool {
        matches!(self, Self::Write { fua: true } | Self::WriteZeroes { fua: true, .. })
    }
}

/// One request of a guest.
///
/// The extent may have any alignment; what the image file cannot transfer directly goes through a bounce buffer.
#[derive(Debug)]
pub struct Request {
    /// The submitter's own mark, returned in the completion.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// Which guest bytes.
    pub extent: Extent,
    /// For [`Op::Read`] and [`Op::Write`], as long as the extent; `None` for all others.
    pub buffer: Option<IoBuf>,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Completion {
    /// The mark of the request.
    pub id: u64,
    /// Done, or the error number for the guest: `EIO`, `ENOSPC`, `EDQUOT`, `EROFS`, `EINVAL`, or `EAGAIN` when more
    /// than `requests_max` requests are in flight.
    pub result: std::result::Result<(), i32>,
    /// The buffer of the request. After a failed read its content is undefined. A write that had to wait for space may come
    /// back without it.
    pub buffer: Option<IoBuf>,
}
