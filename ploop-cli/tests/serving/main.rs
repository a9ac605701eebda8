//! Disks served for real: keeper, server, FUSE file, loop device, file system.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod death;
mod full_host;
mod ground;
mod guests;
mod killed;
mod life;
#[path = "../../../ploop-core/tests/patience/mod.rs"]
mod patience;
#[path = "../../../ploop-core/tests/referee/mod.rs"]
mod referee;
mod resize;
mod snapshot_commands;
mod snapshots;
mod space;
