//! The command as people and scripts meet it: one test binary, a module per subject.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a failed test panics")]

mod chain;
mod check;
mod compat;
mod end_to_end;
mod errors;
mod foreign;
mod forms;
mod half_disks;
mod hostile;
mod looks;
mod originals;
#[path = "../../../ploop-core/tests/patience/mod.rs"]
mod patience;
#[path = "../../../ploop-core/tests/referee/mod.rs"]
mod referee;
mod snapshots;
mod space;
mod stage;
mod support;
mod two_commands;
mod two_ends;
mod usage;
mod witness;
