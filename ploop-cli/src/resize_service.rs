//! Growing a served disk: what the command asks of the server, and the server's part.
//!
//! The server changes image, chain and size; the command does what concerns the descriptor, the loop device, the
//! partition table and the file system, each step so that the same command finishes what was cut.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ploop_core::device::control::Connection;
use ploop_core::device::runtime::Entry;
use ploop_core::device::{Disk, GrowOptions, Grown};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::job_service::{self, Company, Turns};
use crate::progress::Job;

/// The verb of the control socket.
pub(crate) const VERB: &str = "resize";

/// What is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct GrowRequest {
    disk_sectors: u64,
    preallocate: bool,
}

/// Serves the verb.
pub(crate) fn serve(
    turns: &Arc<Turns>,
    entry: &Entry,
    disk: &Arc<Disk>,
    asked: (&Connection, Value, Vec<OwnedFd>),
) -> Result<Value> {
    job_service::serve(turns, (VERB, Company::Alone), asked, |request: GrowRequest, _progress| {
        let options = GrowOptions {
            preallocate: request.preallocate,
            ..GrowOptions::new(Sectors(request.disk_sectors))
        };
        let grown = disk.grow(&options)?;
        entry.update(|state| state.size_bytes = Some(disk.size_bytes()))?;
        Ok(grown)
    })
}

/// Asks the server of a disk to grow it.
pub(crate) fn ask(entry: &Entry, disk: Sectors, preallocate: bool, job: &Job) -> Result<Grown> {
    let answer = job_service::ask(entry, VERB, &GrowRequest { disk_sectors: disk.0, preallocate }, job)?;
    serde_json::from_value(answer)
        .map_err(|cause| Error::io(ErrorKind::System, "read the server's answer", cause.into()))
}
