//! `ploop clone`: a writable disk that shares the images of another one.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::Guid;
use ploop_core::ops::{CloneOptions, CloneReport, clone};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::snapshots::{Target, guid, lock_timeout};

/// Make a writable disk that begins as another one, at once
///
/// The clone shares the images of the base and takes space only for what is written to it. As long as it exists, the shared
/// images do not change: make a snapshot of the base to go on with it. Prints the descriptor of the clone.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 1 there is a disk or file in the folder, or it lies on another file system; 37 the base is \
                        being written to: clone a snapshot of it; 43 there is no such snapshot."
)]
pub(crate) struct Arguments {
    /// Begin as this snapshot, by its GUID; as the current state by default
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Option<Guid>,

    /// DiskDescriptor.xml of the base, or its folder
    #[arg(value_name = "DISK")]
    disk: PathBuf,

    /// The folder of the clone; made if it does not exist
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Cloned(CloneReport);

impl Report for Cloned {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", ploop_core::error::shown(&self.0.descriptor))
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let target = Target::find(&arguments.disk)?;
    let report = clone(&CloneOptions {
        path: target.descriptor,
        new_folder: arguments.folder.clone(),
        snapshot: arguments.snapshot,
        lock_timeout: lock_timeout(),
    })?;
    output.report(&Cloned(report))
}
