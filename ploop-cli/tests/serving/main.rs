//! Disks served for real: keeper, server, FUSE file, loop device, file system.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod death;
mod ground;
mod life;
