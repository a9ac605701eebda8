//! `ploop snapshot-switch`: an earlier state becomes the current one.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::Guid;
use ploop_core::ops::{self, SwitchOptions, SwitchReport};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::progress::Job;
use crate::snapshots::{Target, guid, lock_timeout};

/// Go back to a snapshot
///
/// The disk must not be mounted. The snapshot stays as it is; what was written since the last snapshot is dropped, unless -D
/// keeps it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit codes: 43 there is no such snapshot; 37 the disk is mounted or open elsewhere.")]
pub(crate) struct Arguments {
    /// The GUID of the snapshot
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Guid,

    /// Keep the current state as a snapshot; prints its GUID
    #[arg(short = 'D', long = "keep-top")]
    keep: bool,

    /// DiskDescriptor.xml or its folder
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Switched(SwitchReport);

impl Report for Switched {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        match self.0.kept {
            Some(kept) => writeln!(out, "{kept}"),
            None => Ok(()),
        }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let target = Target::find(&arguments.disk)?;
    target.need_closed("switch to a snapshot")?;
    let job = Job::begin(output, None)?;
    let options = SwitchOptions { snapshot: arguments.snapshot, keep: arguments.keep.then(Guid::random) };
    let report = ops::switch(&target.descriptor, &options, lock_timeout(), &job.meter())?;
    output.report(&Switched(report))
}
