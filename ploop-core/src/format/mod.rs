//! MIDDLE layer: where a guest cluster lives. It maps; it never moves guest data and has no threads, clocks or rings.
//!
//! ```text
//!   Chain      deltas from base to top: map, prepare_write, clear, seal, committed
//!     Delta    one image file (or a raw base)
//!       Header, Geometry     the first 64 bytes, and what they mean
//!       Bat                  the table in memory: read without a lock, written sector by sector
//!       ClusterAllocator     free clusters of the writable top
//! ```
//!
//! A write to a cluster that the top does not hold is prepared ([`PreparedWrite`]), written by the caller and then
//! published into the table in memory. [`Chain::seal`] turns what was published or cleared since into a
//! [`CommitPlan`]: the caller syncs, writes the plan, syncs again. So a table entry on disk never precedes what it
//! points to (I3 of the crash model), and a cleared cluster is free only when its clearing is durable (I4).
//!
//! Locks: `Bat` before `ClusterAllocator`; neither is held while the other side of this layer is called.

mod adopt;
pub mod agreement;
pub(crate) mod alloc;
pub(crate) mod bat;
pub mod chain;
pub mod commit;
pub mod delta;
pub mod descriptor;
pub mod descriptor_store;
pub mod extension;
pub mod geometry;
pub mod guid;
pub mod header;
mod holders;
#[cfg(test)]
mod model;
pub mod moving;
pub mod relocate;
mod restack;
mod sizes;
pub mod stored_bitmap;
pub(crate) mod survey;
#[cfg(test)]
pub(crate) mod testing;
pub mod verify;
mod xml;

pub use chain::{Chain, ChainOptions, Mapping, PreparedWrite, Source, WriteTarget};
pub use commit::CommitPlan;
pub use delta::{CreateOptions, Probe, RepairSummary, create_image, examine, probe};
pub use descriptor::{
    DESCRIPTOR_NAME, Described, DiskDescriptor, Encryption, Image, ImageKind, MergeInto, Mode, Part, Shot,
    SplitDescriptor, Transition, TreeState, image_name,
};
pub use geometry::{Geometry, Version};
pub use guid::Guid;
pub use header::{Header, InUse, RawHeader};
pub use moving::Destination;
pub use relocate::{Move, Preallocation, ResizePlan};
pub(crate) use sizes::scrub_slots;
pub use verify::{Finding, Verdict, WrongEntry};
