//! An open disk as a file, and through a loop device as a block device: works on every kernel with FUSE and loop.
//!
//! * [`wire`]: the protocol as bytes. [`sys`]: system calls. Neither knows a disk.
//! * [`server`]: answers the kernel's requests from a [`Disk`](super::Disk), with threads that are workers.
//! * [`survivor`]: the memory that outlives a server, so that a successor serves what was acknowledged.
//! * [`held`]: the files of the disk as the keeper holds them, so that a successor serves these and no others.
//! * [`life`]: one server as its keeper sees it. [`notes`]: what a keeper writes into the record of its disk.
//! * [`keeper`]: the process that holds the FUSE descriptor and that memory while servers come and go.

pub mod held;
pub mod keeper;
pub mod life;
pub mod notes;
pub mod server;
pub mod survivor;
pub mod sys;
pub mod wire;
mod worker;
