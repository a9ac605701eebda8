//! `ploop tsnapshot`: a temporary snapshot, mounted read-only, for a backup.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::device::runtime::Runtime;
use ploop_core::format::Guid;
use ploop_core::ops::{self, DeleteOptions, SnapshotOptions};
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::commands::mount;
use crate::commands::snapshot::ADVICE;
use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::progress::Job;
use crate::quiesce::{Allowed, AsOf};
use crate::snapshot_service::{self, SnapshotRequest};
use crate::snapshots::{Target, guid, lock_timeout};

/// Take a temporary snapshot and mount it read-only
///
/// For a backup: the state of this moment can be read while the disk goes on, and goes when it is unmounted. Prints the block
/// device.
#[derive(Debug, clap::Args)]
#[command(after_help = "`ploop umount -c COMPONENT DISK` ends it and deletes the snapshot.\n\n\
                        Exit codes: 37 the component is in use; 38 the GUID is taken, or the chain has 128 images; 23 another \
                        command is at work on the disk; 21 the file system cannot be mounted (the snapshot is deleted again); 14 something uses the disk that cannot be frozen.")]
pub(crate) struct Arguments {
    /// The GUID of the snapshot; a random one by default
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Option<Guid>,

    /// A name for this use: `umount -c` finds it by it
    #[arg(short = 'c', long = "component", value_name = "COMPONENT", value_parser = mount::component)]
    component: String,

    /// Where to mount the file system
    #[arg(short = 'm', long = "mount-point", value_name = "DIR")]
    mount_point: Option<PathBuf>,

    /// Type of the file system; found out by default
    #[arg(short = 't', long = "fstype", value_name = "FSTYPE", requires = "mount_point")]
    file_system: Option<String>,

    /// Options for mount(8); XFS needs nouuid beside the running disk
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", requires = "mount_point")]
    options: Option<String>,

    /// Where something uses the disk that cannot be frozen: go on, and say so; the snapshot is as after a power loss
    #[arg(long)]
    crash_consistent: bool,
    /// The partition to show, as of `ploop mount`; the first by default
    #[arg(long, value_name = "N|LABEL|UUID")]
    partition: Option<String>,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// What was made.
#[derive(Serialize)]
struct Kept {
    snapshot: Guid,
    component: String,
    /// What made its state one that a file system understands.
    as_of: String,
    #[serde(flatten)]
    mounted: mount::Mounted,
}

impl Report for Kept {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", ploop_core::error::shown(&self.mounted.device))
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let target = Target::find(&arguments.disk)?;
    let component = &arguments.component;
    // Found out before there is a snapshot.
    if Runtime::of_user()?.find_component(&target.descriptor, component)?.is_some() {
        return Err(Error::new(ErrorKind::InUse, format!("the disk is mounted already as {component}"))
            .at_path(&target.descriptor)
            .advise("choose another name for -c, or unmount that one")
            .into());
    }
    let mount_point = arguments.mount_point.as_deref().map(mount::check_mount_point).transpose()?;
    let snapshot = arguments.snapshot.unwrap_or_else(Guid::random);
    let as_of = make(&target, snapshot, arguments.crash_consistent, output)?;
    let how = mount::Arguments::of_snapshot(
        target.descriptor.clone(),
        snapshot.to_string(),
        component.clone(),
        mount_point,
    )
    .with_options(arguments.file_system.clone(), arguments.options.clone())
    .with_partition(arguments.partition.clone());
    match mount::serve(&how, output) {
        Ok(mounted) => output.report(&Kept { snapshot, component: component.clone(), as_of, mounted }),
        Err(error) => {
            if let Err(second) = delete(&target.descriptor, snapshot, output) {
                output.warn(&format!(
                    "the snapshot {snapshot} stays; delete it with: ploop snapshot-delete -u {snapshot} {}",
                    target.descriptor.display()
                ));
                output.error(&second);
            }
            Err(error.into())
        }
    }
}

/// As of what it was made.
fn make(target: &Target, snapshot: Guid, crash_consistent: bool, output: &Output) -> Result<String> {
    let Some((entry, state)) = &target.served else {
        let options = SnapshotOptions { snapshot: Some(snapshot), temporary: true };
        let job = Job::begin(output, None)?;
        ops::snapshot(&target.descriptor, &options, lock_timeout(), &job.meter())?;
        return Ok(AsOf::Unused.word().to_owned());
    };
    let request =
        SnapshotRequest { snapshot: Some(snapshot.to_string()), temporary: true, ..Default::default() };
    let allowed = Allowed { crash_consistent, advice: ADVICE, ..Allowed::default() };
    let made = snapshot_service::ask_snapshot(state, entry, request, allowed, output)?;
    for warning in made["warnings"].as_array().into_iter().flatten() {
        output.warn(warning.as_str().unwrap_or_default());
    }
    Ok(made["as_of"].as_str().unwrap_or_default().to_owned())
}

/// Deletes a snapshot of a disk, running or not.
pub(crate) fn delete(descriptor: &std::path::Path, snapshot: Guid, output: &Output) -> Result<()> {
    let target = Target::find(descriptor)?;
    let job = Job::begin(output, None)?;
    match &target.served {
        Some((entry, _)) => snapshot_service::ask_delete(entry, &snapshot.to_string(), &job).map(drop),
        None => {
            let options = DeleteOptions { snapshot };
            ops::delete(&target.descriptor, &options, lock_timeout(), &job.meter()).map(drop)
        }
    }
}
