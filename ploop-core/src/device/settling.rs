//! A chain that has taken over while a power loss may still bring the old one back.
//!
//! Writes need not wait for that: what was not flushed may be lost. A flush must: it would be answered for a top that no
//! descriptor names after the power loss. So between the moment when a new chain is served and the one when its descriptor
//! is durable, the flusher begins no round (S6). The gate can be open meanwhile, and a guest is held for a sync less.

use std::sync::Arc;

use super::disk::Disk;
use crate::error::{Error, ErrorKind, Result};

/// No flush of the disk is answered until this is [settled](Self::settle). Dropped without, the disk is poisoned.
#[must_use = "dropped without being settled, it poisons the disk"]
pub struct Unsettled {
    disk: Option<Arc<Disk>>,
}

impl Unsettled {
    pub(super) fn new(disk: Option<&Arc<Disk>>) -> Self {
        Self { disk: disk.cloned() }
    }

    /// The new chain is durably that of the disk, and flushes go on. With an error that is not known, and never will be: the
    /// disk is poisoned with it.
    pub fn settle(mut self, result: Result<()>) {
        if let Some(disk) = self.disk.take() {
            disk.flusher.settle(&result);
        }
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.flusher.settle(&Err(Error::new(
                ErrorKind::Sync,
                "replace the chain of a disk: whether the new one is durable was not found out",
            )));
        }
    }
}
