//! `ploop thaw`: let a disk go on that a copy or a snapshot has stopped.

use std::io::{self, Write};
use std::path::PathBuf;

use nix::sys::signal::SigSet;
use pcopy::freeze::FreezeRecord;
use ploop_core::device::runtime::Runtime;
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::exit::Outcome;
use crate::freeze_service;
use crate::output::{Output, Report};

/// Let a disk go on that a copy or a snapshot has stopped
///
/// Undoes a freeze of ploop's own: ends the freeze command if it still runs, thaws the file systems, and runs the thaw command
/// where it was typed. A copy or snapshot that is just under way fails by it. Nothing is done to a disk that does not stand.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A disk that has to go on is thawed by itself, whatever dies; `ploop list` shows one that stands, and since when.\n\n\
                        Exit codes: 14 it still stands, and the message says what frees it; 40 the disk is not mounted."
)]
pub(crate) struct Arguments {
    /// What the freeze command has stopped was let go by hand: the thaw command is not run
    #[arg(long)]
    freed: bool,

    /// The device, the mount point, the image or the DiskDescriptor.xml of a mounted disk
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// What was done.
#[derive(Serialize)]
struct Thawed {
    id: String,
    thawed: bool,
    frozen_since_ms: Option<u64>,
    file_systems: Vec<String>,
}

impl Report for Thawed {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        if !self.thawed {
            return writeln!(out, "nothing of the disk was frozen by ploop");
        }
        match self.file_systems.as_slice() {
            [] => writeln!(out, "thawed"),
            names => writeln!(out, "thawed: {}", names.join(", ")),
        }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    // A server, which starts this, holds them back; what the thaw command starts shall get them as usual.
    SigSet::all()
        .thread_unblock()
        .map_err(|errno| Error::io(ErrorKind::System, "let signals through", errno.into()))?;
    let runtime = Runtime::of_user()?;
    let state = runtime.find(&arguments.disk)?.ok_or_else(|| {
        Error::new(ErrorKind::NotMounted, "the disk is not mounted").at_path(&arguments.disk).advise(
            "`ploop list` shows what is mounted; what somebody else has frozen is thawed with fsfreeze -u",
        )
    })?;
    let entry = runtime.entry(&state.id);
    let record = FreezeRecord::read(&entry.frozen_file())?;
    let thawed = freeze_service::thaw(&entry, !arguments.freed)?;
    let file_systems =
        record.iter().flat_map(|record| &record.file_systems).map(|frozen| frozen.name.clone());
    output.report(&Thawed {
        id: state.id,
        thawed,
        frozen_since_ms: record.as_ref().map(|record| record.since_ms),
        file_systems: file_systems.collect(),
    })
}
