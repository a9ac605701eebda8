//! `ploop snapshot-delete`: a snapshot goes, all other states stay.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::Guid;
use ploop_core::ops::{self, DeleteOptions};
use serde::Serialize;
use serde_json::Value;

use crate::commands::snapshot::to_value;
use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::progress::Job;
use crate::snapshot_service;
use crate::snapshots::{Target, guid, lock_timeout};

/// Delete a snapshot
///
/// All other states stay as they are: what stands on the snapshot is merged with it. If several states do, it is only marked,
/// and goes as soon as one of them is left. Works on a running disk.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 43 there is no such snapshot; 37 it is mounted, or clones share its image."
)]
pub(crate) struct Arguments {
    /// The GUID of the snapshot
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Guid,

    /// Copy at most this much in a second, as 100M
    #[arg(long, value_name = "SIZE", value_parser = crate::snapshots::rate)]
    limit: Option<u64>,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Deleted(Value);

impl Report for Deleted {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.0["marked"].as_bool() == Some(true) {
            writeln!(out, "marked: it goes as soon as only one state stands on it")?;
        }
        if let Some(copy) = self.0["descriptor_copy"].as_str() {
            writeln!(out, "dropped from the descriptor; the former one is kept as {copy}")?;
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let target = Target::find(&arguments.disk)?;
    if target.served.is_some() && target.load()?.is_dead(arguments.snapshot) {
        target.need_closed("drop a snapshot without image")?;
    }
    let job = Job::begin(output, arguments.limit)?;
    let report = match &target.served {
        Some((entry, _)) => snapshot_service::ask_delete(entry, &arguments.snapshot.to_string(), &job)?,
        None => {
            let options = DeleteOptions { snapshot: arguments.snapshot };
            to_value(&ops::delete(&target.descriptor, &options, lock_timeout(), &job.meter())?)?
        }
    };
    output.report(&Deleted(report))
}
