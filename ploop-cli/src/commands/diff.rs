//! `ploop diff`: where two states of a disk differ.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::Guid;
use ploop_core::ops::{DiffOptions, DiffReport, diff};
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::snapshots::{Target, guid};

/// Show where two states of a disk differ
///
/// Found from the tables alone, in no time: extents that come from the same place of the same image are equal, all others are
/// told. Snapshots can be compared while the disk is in use.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The earlier state by its GUID; a second time: the later one, else the current state
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid, required = true)]
    snapshots: Vec<Guid>,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Differences(DiffReport);

impl Report for Differences {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{:>16} {:>16}  NOW", "START", "LENGTH")?;
        for extent in &self.0.extents {
            let now = if extent.present { "data" } else { "zero" };
            writeln!(out, "{:>16} {:>16}  {now}", extent.start, extent.length)?;
        }
        writeln!(out, "{} in {} extents", human_bytes(self.0.changed_bytes), self.0.extents.len())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let (from, to) = match *arguments.snapshots.as_slice() {
        [from] => (from, None),
        [from, to] => (from, Some(to)),
        _ => return Err(Error::new(ErrorKind::Parameter, "diff: give one or two snapshots").into()),
    };
    let target = Target::find(&arguments.disk)?;
    let report = diff(&DiffOptions { path: target.descriptor, from, to })?;
    output.report(&Differences(report))
}
