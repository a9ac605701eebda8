//! `ploop umount`: the file system is unmounted and the device goes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::{Runtime, State};
use ploop_core::format::{Shot, Transition};
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::unmount_all;
use serde::Serialize;

use crate::exit::Outcome;
use crate::freeze_service;
use crate::full_host::SpaceWatch;
use crate::output::{Output, Report};
use crate::serving::{self, Served};
use crate::{open, space_used};

/// Unmount a disk and stop its device
///
/// Unmounts the file system wherever it is mounted, takes the block device away, and closes the image. When it returns with
/// success, everything is durable and the image is marked as closed. A temporary snapshot is deleted with its last use.
#[derive(Debug, clap::Args)]
#[command(
    group(clap::ArgGroup::new("which").args(["device", "mount_point", "disk"]).required(true)),
    after_help = "Exit codes: 40 the disk is not mounted; 46 it is in use and stays, also when \
                  writes wait for space on a full host; others tell that a server had failed \
                  and what was left of it is cleared now."
)]
pub(crate) struct Arguments {
    /// The block device
    #[arg(short = 'd', long = "device", value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// Where the file system is mounted
    #[arg(short = 'm', long = "mount-point", value_name = "DIR")]
    mount_point: Option<PathBuf>,

    /// The use of the disk that was mounted with this name
    #[arg(short = 'c', long = "component", value_name = "COMPONENT", requires = "disk", value_parser = super::mount::component)]
    component: Option<String>,

    /// Also a disk whose image was removed or replaced while it was mounted: everything in it is gone then
    #[arg(long)]
    discard: bool,
    /// Let writes fail that wait for space on a full host: what they would have written is lost
    #[arg(long)]
    give_up_waiting: bool,

    /// Device, mount point, DiskDescriptor.xml, its folder, or an image file
    #[arg(value_name = "DISK")]
    disk: Option<PathBuf>,
}

/// What was unmounted.
#[derive(Debug, Serialize)]
struct Unmounted {
    id: String,
    device: Option<PathBuf>,
}

impl Report for Unmounted {
    fn write_human(&self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

/// Deletes the snapshot that was mounted, if it is temporary and this was its last use.
fn delete_temporary(runtime: &Runtime, ended: &State, output: &Output) -> Result<()> {
    let (Some(path), Some(snapshot)) = (&ended.open.descriptor, open::snapshot_of(&ended.open)?) else {
        return Ok(());
    };
    open::check_names(ended)?;
    let (_, descriptor) = open::load(path)?;
    let is_temporary = descriptor.shot(snapshot).and_then(Shot::transition) == Some(Transition::Temporary);
    let is_used = |other: &State| {
        other.open.descriptor == ended.open.descriptor
            && open::snapshot_of(&other.open).is_ok_and(|state| state == Some(snapshot))
    };
    if !is_temporary || runtime.states()?.iter().any(is_used) {
        return Ok(());
    }
    super::tsnapshot::delete(path, snapshot, output)
}

/// The kernel keeps an image that was removed for as long as it is served: the unmount would be its end. Nothing is changed
/// before this is known.
fn refuse_to_lose(runtime: &Runtime, state: &State, discard: bool, output: &Output) -> Result<()> {
    let entry = runtime.entry(&state.id);
    let status = match serving::status_of(&entry) {
        Ok(status) => status,
        // One that cannot be asked has no image open, or hangs, and its file system with it.
        Err(_) => return serving::check_alive(&entry.state()?),
    };
    if let Some(image) = status.nameless.filter(|_| !discard && !status.read_only) {
        return Err(Error::new(
            ErrorKind::UnmountBusy,
            "unmount the disk: its image was removed or replaced while it was mounted, and would be gone for good",
        )
        .at_path(image)
        .advise(
            "the disk is whole as long as it is mounted: copy it first (ploop export or ploop copy, by its mount point or \
             device), then unmount it with --discard",
        ));
    }
    status.warnings.iter().for_each(|text| output.warn(text));
    Ok(())
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let named = [&arguments.device, &arguments.mount_point, &arguments.disk];
    let name: &Path = named
        .into_iter()
        .flatten()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "say which disk to unmount"))?;
    let runtime = Runtime::of_user()?;
    let found = match &arguments.component {
        Some(component) => runtime.find_component(name, component)?,
        None => runtime.find(name)?,
    };
    let state = found.ok_or_else(|| {
        let message = match &arguments.component {
            Some(component) => format!("the disk is not mounted as {component}"),
            None => "the disk is not mounted".to_owned(),
        };
        Error::new(ErrorKind::NotMounted, message).at_path(name).advise("`ploop list` shows what is mounted")
    })?;
    refuse_to_lose(&runtime, &state, arguments.discard, output)?;
    let entry = runtime.entry(&state.id);
    let watch = SpaceWatch::begin(&entry, name, "the umount", arguments.give_up_waiting, *output)
        .map_err(|error| error.with_kind(ErrorKind::UnmountBusy))?;
    if let Some(folder) = space_used::record_folder(&state)
        && open::check_names(&state).is_ok()
        && let Some(used) = space_used::of_served(&state)
        && let Err(cause) = used.remember(&folder)
    {
        output.warn(&format!("{}: how full the disk is was not remembered: {cause}", folder.display()));
    }
    // A file system that is unmounted while it is frozen stays so, where nobody can thaw it.
    freeze_service::thaw_abandoned(&runtime.entry(&state.id), output)?;
    if let Some(device) = &state.loop_device {
        unmount_all(device)?;
    }
    let served = Served { entry, state };
    serving::end(&served)?;
    drop(watch);
    if let Err(error) = delete_temporary(&runtime, &served.state, output) {
        output.warn("the temporary snapshot stays, and goes with the next command that deletes a snapshot:");
        output.error(&error);
    }
    output.report(&Unmounted { id: served.state.id, device: served.state.loop_device })
}
