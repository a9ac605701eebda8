//! `ploop balloon`: the original's spelling of compaction, and what is left of the rest.
//!
//! The original keeps space away from the guest with a balloon file, and gives the free space of the image back with
//! `balloon discard`. Disks here have no balloon that holds anything: a smaller disk is a smaller file system. So
//! `discard` does all of it, `show` and `status` tell the truth (nothing is held), and the rest is refused.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::Runtime;
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::args;
use crate::commands::compact::{self, Compacted, Wishes};
use crate::commands::mount::run_program;
use crate::exit::Outcome;
use crate::open::{self, Wanted};
use crate::output::{Output, Report};
use crate::progress::Job;
use crate::serving::{self, ServeOptions, Served};

/// Give free space back to the host (discard), in the original's words
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Give the free space of a mounted disk back to the host; see `ploop compact`
    Discard(Discard),
    /// Show how much space the balloon holds: nothing
    Show(Named),
    /// Show what the balloon does: nothing
    Status(Named),
    /// Not here: see `ploop resize`
    #[command(hide = true)]
    Change(Anything),
    /// Not here
    #[command(hide = true)]
    Clear(Anything),
    /// Not here
    #[command(hide = true)]
    Complete(Anything),
    /// Not here: see `ploop check`
    #[command(hide = true)]
    Check(Anything),
    /// Not here: see `ploop check`
    #[command(hide = true)]
    Repair(Anything),
}

#[derive(Debug, clap::Args)]
struct Discard {
    /// Mount a disk that is not mounted, for as long as it takes
    #[arg(long)]
    automount: bool,

    /// Stop once the image takes this much less
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    to_free: Option<Sectors>,

    /// Leave free runs of the file system that are shorter than this
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    min_block: Option<Sectors>,

    /// Not here: run the file system's own program (e4defrag, xfs_fsr) before
    #[arg(long)]
    defrag: bool,

    /// Move no more than this per second
    #[arg(long, value_name = "RATE", value_parser = args::size)]
    limit: Option<Sectors>,

    /// The DiskDescriptor.xml of the disk
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Named {
    /// The device of the disk
    #[arg(short = 'd', long = "device", value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// Where it is mounted
    #[arg(short = 'm', long = "mount-point", value_name = "DIR")]
    mount_point: Option<PathBuf>,

    /// The DiskDescriptor.xml of the disk
    #[arg(value_name = "DISK")]
    disk: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Anything {
    /// Whatever the original took
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<OsString>,
}

/// How much the balloon holds.
#[derive(Serialize)]
struct Held {
    /// Bytes kept away from the guest.
    balloon_bytes: u64,
    #[serde(skip)]
    is_status: bool,
}

impl Report for Held {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.is_status {
            writeln!(out, "No balloon operation is in progress")
        } else {
            writeln!(out, "Current balloon size: {}", self.balloon_bytes)
        }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    match &arguments.command {
        Command::Discard(wanted) => output.report(&discard(wanted, output)?),
        Command::Show(named) => show(named, false, output),
        Command::Status(named) => show(named, true, output),
        Command::Change(words) => {
            refuse("change", words, "`ploop resize` makes file system and disk smaller")
        }
        Command::Clear(words) => refuse("clear", words, "there is nothing to clear"),
        Command::Complete(words) => refuse("complete", words, "there is nothing to complete"),
        Command::Check(words) => refuse("check", words, "`ploop check` checks the image"),
        Command::Repair(words) => refuse("repair", words, "`ploop check` repairs the image"),
    }
}

fn refuse(verb: &str, words: &Anything, advice: &str) -> Outcome {
    let typed: Vec<_> = words.words.iter().map(|word| word.to_string_lossy()).collect();
    let message = format!("balloon {verb} {}: disks have no balloon here", typed.join(" "));
    Err(Error::new(ErrorKind::Parameter, message).advise(advice).into())
}

fn show(named: &Named, is_status: bool, output: &Output) -> Outcome {
    let names = [&named.device, &named.mount_point, &named.disk];
    let name = names
        .into_iter()
        .flatten()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "say which disk"))?;
    // The answer is always the same, but not for something that is no disk.
    if Runtime::of_user()?.find(name)?.is_none() {
        open::look_at(name)?;
    }
    output.report(&Held { balloon_bytes: 0, is_status })
}

fn discard(wanted: &Discard, output: &Output) -> Result<Compacted> {
    if wanted.defrag {
        return Err(Error::new(
            ErrorKind::Parameter,
            "--defrag: the file system is not defragmented from here",
        )
        .advise("run e4defrag or xfs_fsr in the mounted file system, then this command without --defrag"));
    }
    let run_bytes_min = wanted.min_block.map_or(Some(0), Sectors::checked_bytes);
    let wishes = Wishes {
        disk: &wanted.disk,
        limit: wanted.limit,
        trim: true,
        run_bytes_min: run_bytes_min
            .ok_or_else(|| Error::new(ErrorKind::Parameter, "the size does not fit 64 bits"))?,
        to_free: wanted.to_free,
    };
    let job = compact::begin(&wishes, output)?;
    if Runtime::of_user()?.find(&wanted.disk)?.is_some() {
        return compact::carry_out(&wishes, &job, output);
    }
    open::look_at(&wanted.disk)?;
    if !wanted.automount {
        return Err(Error::new(ErrorKind::NotMounted, "the disk is not mounted")
            .at_path(&wanted.disk)
            .advise("--automount mounts it meanwhile; `ploop compact` works without, on a closed disk"));
    }
    let request = open::resolve(&Wanted { disks: vec![wanted.disk.clone()], ..Wanted::default() })?;
    let served = serving::start(request, &ServeOptions::default())?;
    let done = mounted(&served, &wishes, &job, output);
    let ended = unmount(&served);
    match (done, ended) {
        (Ok(done), Ok(())) => Ok(done),
        (Err(error), Ok(())) | (Ok(_), Err(error)) => Err(error),
        (Err(error), Err(second)) => {
            output.error(&second);
            Err(error)
        }
    }
}

/// Where the disk is mounted meanwhile.
fn point_of(served: &Served) -> PathBuf {
    served.entry.path().join("automount")
}

fn mounted(served: &Served, wishes: &Wishes<'_>, job: &Job, output: &Output) -> Result<Compacted> {
    let device = served.state.loop_device.as_deref().ok_or_else(|| {
        Error::new(ErrorKind::Device, "the disk has no loop device").at_path(served.entry.path())
    })?;
    let point = point_of(served);
    std::fs::create_dir(&point)
        .map_err(|cause| Error::io(ErrorKind::MakeFolder, "make a mount point", cause).at_path(&point))?;
    let line: [&Path; 3] = [Path::new("--"), device, &point];
    let (status, text) = run_program("mount", &line.map(OsString::from), ErrorKind::Mount)?;
    if status != 0 {
        return Err(Error::new(
            ErrorKind::Mount,
            format!("mount {} for the time of the discard: {}", device.display(), text.trim()),
        )
        .advise("`ploop compact` works without a file system, on a closed disk"));
    }
    compact::carry_out(&Wishes { disk: device, ..*wishes }, job, output)
}

/// Undoes the mount and ends the server.
fn unmount(served: &Served) -> Result<()> {
    if let Some(device) = &served.state.loop_device {
        serving::unmount_all(device)?;
    }
    let point = point_of(served);
    match std::fs::remove_dir(&point) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io(ErrorKind::Unlink, "remove the mount point", cause).at_path(point));
        }
        _ => {}
    }
    serving::end(served)
}
