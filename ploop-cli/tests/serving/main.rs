//! Disks served for real: keeper, server, FUSE file, loop device, file system.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod death;
mod freezing;
mod full_host;
mod ground;
mod guests;
mod holders;
mod identity;
mod killed;
mod life;
mod partitions;
#[path = "../../../ploop-core/tests/patience/mod.rs"]
mod patience;
#[path = "../../../ploop-core/tests/referee/mod.rs"]
mod referee;
mod refused;
mod resize;
mod shrink;
mod snapshot_commands;
mod snapshots;
mod space;
mod takeover;
