//! Measured claims. Each bench prints JSON lines with the figure, the peer's figure from the same run, and their
//! ratio; `docs/benchmarks.md` keeps them. None of this is a timed test: a slow machine fails nothing.

pub mod chain_reads;
pub mod check;
pub mod convert;
pub mod copy;
pub mod device;
pub mod downtime;
pub mod merge;
pub mod open;
pub mod report;
pub mod scattered_writes;
pub mod snapshot_hold;
pub mod sparse;
pub mod tracker;
pub mod work;
