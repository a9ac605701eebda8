//! The command as people and scripts meet it: one test binary, a module per subject.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a failed test panics")]

mod end_to_end;
mod errors;
mod originals;
mod stage;
mod support;
mod usage;
mod witness;
