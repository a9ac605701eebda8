//! Live copy of a disk over a pair of pipes.
//!
//! [`send`] moves a disk, while it is written to, through a [`Link`] to [`receive`]: everything that holds data, then
//! again and again what changed meanwhile, then with the writers standing still the little that is left. Both sides
//! prove that exactly what was sent was stored, and only then does the copy get its name.
//!
//! ```text
//!  Source ─► sender ─► pass (hash, write) ─► transport ═══► transport ─► intake (read, check) ─► receiver ─► Target
//!    ▲         │                                  ◄═══ answers ═══                                 │           │
//!  Quiesce ◄───┘ converge: next pass, freeze or give up                          verify: reads back ◄──────────┘
//! ```
//!
//! * [`wire`]: the frames and what may come when. [`transport`]: bytes with a time-out. `work` and `answering`: what a
//!   receiver reports while it is waited for. [`peer`] and `terminal`: the receiver's command.
//! * [`source`], [`target`]: what is copied and into what; the only files that know images and disks. [`source_chain`]
//!   and `target_chain`: the same for a disk with all its snapshots, which [`send_chain`] sends delta by delta.
//! * [`converge`]: when to freeze. [`freeze`]: making writers stand still, and going on whatever happens.
//! * `sender` and `original`: the two streams that can be sent; `standstill`: the freeze of both.
//! * [`legacy`]: the original's one-way stream. [`memory`]: both ends without files.
//!
//! Two-way, success of the sender means a copy in place; one-way, the receiver's exit code is the verdict. The source
//! keeps running and stays the owner of the disk in any case.

mod answering;
pub mod converge;
mod course;
mod exchange;
pub mod freeze;
mod freeze_limit;
mod intake;
pub mod legacy;
mod loans;
pub mod memory;
mod original;
mod pass;
pub mod peer;

mod receiver;
mod sender;
pub mod source;
pub mod source_chain;
mod standstill;
pub mod stats;
pub mod target;
mod target_chain;
mod target_placing;
mod target_synthesis;
mod terminal;
pub mod transport;
mod verify;
pub mod wire;
mod work;

pub use exchange::is_told_by_receiver;
pub use freeze::{
    Helper, HelperQuiesce, LocalQuiesce, MountedFileSystem, NothingToQuiesce, Quiesce, QuiesceOptions,
    helper_main,
};
pub use original::send_original;
pub use peer::{Peer, PeerEnd};
pub use receiver::{ReceiveOptions, receive};
pub use sender::{SendOptions, send, send_chain};
pub use source::{Snapshots, Source};
pub use stats::{Event, Observer, ReceiveReport, SendReport, Silent};
pub use target::{Destination, Target};
pub use transport::{Cancel, Link};
