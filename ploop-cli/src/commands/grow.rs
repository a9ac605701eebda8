//! `ploop grow`: makes a disk larger; what is on it is left alone.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::ops::resize::Shrink;
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::args;
use crate::commands::mount::BaseFormat;
use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::sizing::{self, ImageSize, Target};

/// Make a disk larger: the image and its descriptor, not what is on it
///
/// Works on a closed disk and on a mounted one. `ploop resize` also enlarges the partition and the file system.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A grow that was cut is finished by the same command. Exit codes: 17 a copy of the disk is running; \
                        37 somebody else has it; 38 the size is smaller than the disk or beyond a limit."
)]
pub(crate) struct Arguments {
    /// The new size; rounded up to whole clusters
    #[arg(short = 's', long = "size", value_name = "SIZE", value_parser = args::size)]
    size: Sectors,

    /// The device of a mounted disk
    #[arg(
        short = 'd',
        long = "device",
        value_name = "DEVICE",
        conflicts_with = "disk",
        required_unless_present = "disk"
    )]
    device: Option<PathBuf>,

    /// Format of an image without descriptor
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "ploop1")]
    format: BaseFormat,

    /// DiskDescriptor.xml or its folder, or an image file
    #[arg(value_name = "DISK")]
    disk: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Grew {
    disk_bytes_before: u64,
    disk_bytes: u64,
    moved_clusters: u64,
    held_ms: Option<u64>,
}

impl Report for Grew {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let (before, now) = (human_bytes(self.disk_bytes_before), human_bytes(self.disk_bytes));
        if self.disk_bytes_before == self.disk_bytes {
            return writeln!(out, "size: {now}, as before");
        }
        write!(out, "size: {now}, before {before}; {} clusters moved", self.moved_clusters)?;
        match self.held_ms {
            Some(held_ms) => writeln!(out, "; writes waited {held_ms} ms"),
            None => writeln!(out),
        }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let Some(name) = arguments.device.as_ref().or(arguments.disk.as_ref()) else {
        return Err(Error::new(ErrorKind::Parameter, "grow: no disk is named").into());
    };
    let size: ImageSize = match sizing::find(name, arguments.format == BaseFormat::Raw)? {
        Target::Served(served) => sizing::served(&served, arguments.size, output)?,
        Target::Closed(request) => sizing::closed(&request, arguments.size, Shrink::Refuse, output)?.into(),
    };
    output.report(&Grew {
        disk_bytes_before: size.disk_bytes_before,
        disk_bytes: size.disk_bytes,
        moved_clusters: size.moved_clusters,
        held_ms: size.held_ms,
    })
}
