//! `ploop umount`: the file system is unmounted and the device goes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::Runtime;
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::serving::{self, Served};

/// Unmount a disk and stop its device
///
/// Unmounts the file system wherever it is mounted, takes the block device away, and closes the image. When it returns with
/// success, everything is durable and the image is marked as closed.
#[derive(Debug, clap::Args)]
#[command(
    group(clap::ArgGroup::new("which").args(["device", "mount_point", "disk"]).required(true)),
    after_help = "Exit codes: 40 the disk is not mounted; 46 it is in use and stays; others tell that a server had failed \
                  and what was left of it is cleared now."
)]
pub(crate) struct Arguments {
    /// The block device
    #[arg(short = 'd', long = "device", value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// Where the file system is mounted
    #[arg(short = 'm', long = "mount-point", value_name = "DIR")]
    mount_point: Option<PathBuf>,

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

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let named = [&arguments.device, &arguments.mount_point, &arguments.disk];
    let name: &Path = named
        .into_iter()
        .flatten()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "say which disk to unmount"))?;
    let runtime = Runtime::of_user()?;
    let state = runtime.find(name)?.ok_or_else(|| {
        Error::new(ErrorKind::NotMounted, "the disk is not mounted")
            .at_path(name)
            .advise("`ploop list` shows what is mounted")
    })?;
    if let Some(device) = &state.loop_device {
        serving::unmount_all(device)?;
    }
    let served = Served { entry: runtime.entry(&state.id), state };
    serving::end(&served)?;
    output.report(&Unmounted { id: served.state.id, device: served.state.loop_device })
}
