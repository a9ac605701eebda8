//! `ploop snapshot`: keep the current state of a disk, running or not.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::Guid;
use ploop_core::ops::{self, SnapshotOptions};
use ploop_core::{Error, ErrorKind};
use serde::Serialize;
use serde_json::Value;

use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::progress::Job;
use crate::snapshot_service::{self, SnapshotRequest};
use crate::snapshots::{Target, guid, lock_timeout};

/// Keep the current state of a disk as a snapshot
///
/// What is written from now on goes into a new image. A running disk goes on: its file system is frozen for the moment of the
/// snapshot, so that the snapshot is clean. Prints the GUID of the snapshot.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 37 the disk is open elsewhere; 38 the GUID is taken, or the chain has 128 images; \
                        23 another command is at work on the disk."
)]
pub(crate) struct Arguments {
    /// The GUID of the snapshot, in braces; a random one by default
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Option<Guid>,

    /// Write out the mounted file system first, without freezing it unless --fsfreeze is given as well
    #[arg(short = 'F', long = "sync")]
    sync: bool,

    /// Freeze the mounted file system for the moment of the snapshot; that is the default
    #[arg(long, overrides_with = "no_fsfreeze")]
    fsfreeze: bool,

    /// Do not freeze it: the snapshot is as after a power loss
    #[arg(long, overrides_with = "fsfreeze")]
    no_fsfreeze: bool,

    /// Device for the low-level form, which is not supported
    #[arg(short = 'd', long = "device", value_name = "DEVICE", hide = true)]
    device: Option<PathBuf>,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// A snapshot. The fields are those of whoever made it, this process or a server of another version.
#[derive(Serialize)]
#[serde(transparent)]
struct Made(Value);

impl Report for Made {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.0["snapshot"].as_str().unwrap_or("-"))
    }
}

/// A report as a JSON value, whoever made it.
pub(crate) fn to_value(report: &impl Serialize) -> ploop_core::Result<Value> {
    serde_json::to_value(report)
        .map_err(|cause| Error::io(ErrorKind::System, "write the report", cause.into()))
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    if arguments.device.is_some() {
        return Err(Error::new(
            ErrorKind::Parameter,
            "a snapshot is made of a disk with a descriptor, not of a device and a delta",
        )
        .advise("give the DiskDescriptor.xml, or the device as DISK: ploop snapshot /dev/loop0")
        .into());
    }
    let target = Target::find(&arguments.disk)?;
    if let Some((entry, state)) = &target.served {
        let request =
            SnapshotRequest { snapshot: arguments.snapshot.map(|guid| guid.to_string()), temporary: false };
        let freezes = !arguments.no_fsfreeze && (!arguments.sync || arguments.fsfreeze);
        if !freezes && arguments.sync {
            settle(state)?;
        }
        let report = snapshot_service::ask_snapshot(state, entry, &request, freezes, output)?;
        return output.report(&Made(report));
    }
    let job = Job::begin(output, None)?;
    let options = SnapshotOptions { snapshot: arguments.snapshot, temporary: false };
    let report = ops::snapshot(&target.descriptor, &options, lock_timeout(), &job.meter())?;
    for deleted in &report.deleted {
        output.note(&format!("the temporary snapshot {deleted} was deleted"));
    }
    output.report(&Made(to_value(&report)?))
}

/// Writes out what the file systems on a device hold in memory.
fn settle(state: &ploop_core::device::runtime::State) -> ploop_core::Result<()> {
    let Some(device) = &state.loop_device else { return Ok(()) };
    for point in ploop_core::device::runtime::mount_points_of(device)? {
        let folder = ploop_core::io::file::DirectoryFolder::open(&point)?;
        ploop_core::io::sys::sync_file_system(std::os::fd::AsFd::as_fd(&folder)).map_err(|cause| {
            Error::io(ErrorKind::Sync, "write out the file system", cause).at_path(&point)
        })?;
    }
    Ok(())
}
