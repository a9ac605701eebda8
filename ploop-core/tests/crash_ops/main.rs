//! Every operation on a closed bundle × every crash point × the states a crash may leave × the same operation again;
//! and a fault at every single call (test programme, sections 1 and 4; crash model, section 5).
//!
//! What is done with an operation is in `harness.rs`, the bundles it is done to are in `bundle.rs`. In short: in every
//! state that a power loss may leave, the descriptor parses, all files it names exist and are sound (findings of
//! class A and B at most), every snapshot reads as before (or as the operation says), the disk opens for writing, and
//! **the same operation started again ends as an uncut run**, also when that second run is cut.
//!
//! # How to add an operation
//!
//! A file of its own here, with a `mod` line below (`create.rs` and `repair.rs` are examples):
//!
//! ```ignore
//! use crate::bundle::{Shape, View, unchanged_but};
//! use crate::harness::{Case, survives};
//!
//! #[test]
//! fn deleting_a_snapshot_survives_every_crash() {
//!     for shape in Shape::several() {                          // or those that make sense: Shape::of(3).version_1()
//!         let bundle = shape.bundle();                         // states: Guid::TOP, and shape.snapshot(0), (1) below it
//!         let gone = shape.snapshot(0);
//!         survives(
//!             &Case::new("delete", bundle, move |folder| {     // the very code of the command: *_in(folder, …)
//!                 match delete_in(folder, &options(gone)) {
//!                     // "Run it again" of a run that was complete finds nothing left to do.
//!                     Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
//!                     other => other.map(drop),
//!                 }
//!             })
//!             .expecting(move |before, found| unchanged_but(before, found, &[gone])),
//!         );
//!     }
//! }
//! ```
//!
//! * The operation must be the same at every call: fixed GUIDs in its options, not random ones, or every run again
//!   would make another snapshot. Random *file* names are fine.
//! * `expecting` judges every state in between; without it [`bundle::unchanged`] does: all states that were there are
//!   there, with the same content; further ones hold what some state held. The state at the end of an uncut run is
//!   what every run again must lead to, all of it: states, parents, contents, size; so look at that one yourself with
//!   [`harness::Case::ending`].
//! * Files that no descriptor names may be there after a crash, but not after the run again, except for temporary ones
//!   of ours (`*.tmp.*`); `leaving` allows more.
//! * `ignoring(&[Call::Unlink])`: a failure of these calls need not be reported, because it is repaired later.
//!
//! `PLOOP_CRASH_OPS_STATES` says how many distinct states are judged for each case (default 1500). A failure names the
//! case, the operation on the host, and what had persisted; all is seeded, so the same test shows it again.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: it stops at the first surprise, its numbers are small, and fixtures are for operations to come"
)]

#[path = "../crash/pattern.rs"]
mod pattern;
#[path = "../crash/reading.rs"]
mod reading;

mod bundle;
mod harness;

mod check;
mod commands;
mod compact;
mod convert;
mod create;
mod descriptor;
mod histories;
mod live;
mod repair;
mod resize;
mod running;
mod settling;
mod sizes;
mod snapshots;
mod threads;
