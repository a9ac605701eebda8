//! `ploop balloon`: the original's spelling of compaction, and what is left of the rest.
//!
//! The original keeps space away from the guest with a balloon: a file in the root of the inner file system, as long as what it
//! holds, which only its own kernels hide from users and let be changed (an ioctl of their ext4). Here disks are made without
//! one, and a smaller disk is a smaller file system. A disk that was made there may have one; on this kernel it is a file like
//! any other. So `discard` does all it does there, `show` and `status` look at that file, and the rest is refused.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::{Runtime, State};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::{OpenedFileSystem, unmount_all};
use serde::Serialize;

use crate::args;
use crate::commands::compact::{self, Compacted, Wishes};
use crate::commands::mount::run_program;
use crate::exit::Outcome;
use crate::open::{self, Wanted};
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::serving::{self, ServeOptions, Served};
use crate::space_used::{self, SpaceUsed};

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
    /// Show how much space the balloon of a mounted disk holds
    Show(Named),
    /// Show whether the balloon is being changed, and how much it holds
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

    /// Only show how much there is: of data, disk, image and balloon; nothing is changed
    #[arg(long, conflicts_with_all = ["automount", "to_free", "min_block", "limit", "defrag"])]
    stat: bool,

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

/// Name of the balloon in the root of the inner file system; that of the original.
const BALLOON: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";

/// How much the balloon holds.
#[derive(Debug, Default, Serialize)]
struct Held {
    /// Bytes kept away from the guest: the length of the file; 0 without one.
    balloon_bytes: u64,
    /// Bytes that it takes in the file system.
    allocated_bytes: u64,
    /// The file, if there is one.
    file: Option<PathBuf>,
    #[serde(skip)]
    is_status: bool,
}

impl Report for Held {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.is_status {
            writeln!(out, "No balloon operation is in progress")?;
        }
        writeln!(out, "Current balloon size: {}", self.balloon_bytes)
    }
}

/// How much there is, as the original's `discard --stat` says it.
#[derive(Debug, Serialize)]
struct Stat {
    /// Bytes in use in the file system.
    data_bytes: u64,
    /// Size of the disk.
    disk_bytes: u64,
    /// What its images take on the host.
    image_bytes: u64,
    /// What the balloon holds.
    balloon_bytes: u64,
}

impl Report for Stat {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "data:    {}", human_bytes(self.data_bytes))?;
        writeln!(out, "disk:    {}", human_bytes(self.disk_bytes))?;
        writeln!(out, "image:   {}", human_bytes(self.image_bytes))?;
        writeln!(out, "balloon: {}", human_bytes(self.balloon_bytes))
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let unneeded = "the balloon is a file like any other: remove it in the mounted file system, and its space is the guest's";
    match &arguments.command {
        Command::Discard(wanted) if wanted.stat => output.report(&stat(&wanted.disk)?),
        Command::Discard(wanted) => output.report(&discard(wanted, output)?),
        Command::Show(named) => output.report(&show(named, false)?),
        Command::Status(named) => output.report(&show(named, true)?),
        Command::Change(words) => {
            refuse("change", words, "`ploop resize` makes file system and disk smaller or larger")
        }
        Command::Clear(words) => refuse("clear", words, unneeded),
        Command::Complete(words) => refuse("complete", words, unneeded),
        Command::Check(words) => refuse(
            "check",
            words,
            "`ploop check` checks the image, e2fsck the file system; `ploop balloon show` tells what the balloon holds",
        ),
        Command::Repair(words) => {
            refuse("repair", words, "`ploop check` repairs the image, e2fsck the file system")
        }
    }
}

fn refuse(verb: &str, words: &Anything, advice: &str) -> Outcome {
    let typed: Vec<_> = words.words.iter().map(|word| word.to_string_lossy()).collect();
    let typed = if typed.is_empty() { String::new() } else { format!(" {}", typed.join(" ")) };
    let message = format!(
        "balloon {verb}{typed}: it needs ioctls of the original's patched kernels, which no other has"
    );
    Err(Error::new(ErrorKind::Parameter, message).advise(advice).into())
}

/// A served disk and its mounted file system, wherever that is.
fn mounted_at(name: &Path) -> Result<(State, OpenedFileSystem)> {
    let not_mounted = || {
        Error::new(ErrorKind::NotMounted, "the disk is not mounted; its balloon is a file in its file system")
            .at_path(name)
            .advise("mount it (ploop mount -m DIR DISK), then ask again")
    };
    let Some(state) = Runtime::of_user()?.find(name)? else {
        open::look_at(name)?;
        return Err(not_mounted());
    };
    let opened = space_used::open_of(&state)?.ok_or_else(not_mounted)?;
    Ok((state, opened))
}

/// The balloon in a file system. What the guest calls so may be anything.
fn balloon_on(file_system: &OpenedFileSystem) -> Result<Held> {
    let file = file_system.point.join(BALLOON);
    // By the descriptor: the path may lead elsewhere.
    let way = format!("/proc/self/fd/{}/{BALLOON}", file_system.folder.as_raw_fd());
    match std::fs::symlink_metadata(way) {
        Ok(metadata) if metadata.is_file() => Ok(Held {
            balloon_bytes: metadata.len(),
            allocated_bytes: metadata.blocks().saturating_mul(512),
            file: Some(file),
            is_status: false,
        }),
        Ok(_) => Ok(Held::default()),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Held::default()),
        Err(cause) => Err(Error::io(ErrorKind::Stat, "look for the balloon", cause).at_path(file)),
    }
}

fn show(named: &Named, is_status: bool) -> Result<Held> {
    let names = [&named.device, &named.mount_point, &named.disk];
    let name = names
        .into_iter()
        .flatten()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "say which disk"))?;
    let (_, file_system) = mounted_at(name)?;
    Ok(Held { is_status, ..balloon_on(&file_system)? })
}

fn stat(disk: &Path) -> Result<Stat> {
    let (state, file_system) = mounted_at(disk)?;
    let used = SpaceUsed::of_mounted(&file_system)?;
    let blocks = used.blocks.saturating_sub(used.blocks_free);
    let mut image_bytes = 0_u64;
    for image in &state.images {
        let metadata = std::fs::metadata(&image.path)
            .map_err(|cause| Error::io(ErrorKind::Stat, "measure the image", cause).at_path(&image.path))?;
        image_bytes = image_bytes.saturating_add(metadata.blocks().saturating_mul(512));
    }
    Ok(Stat {
        data_bytes: blocks.saturating_mul(used.block_bytes),
        disk_bytes: state.size_bytes.unwrap_or(0),
        image_bytes,
        balloon_bytes: balloon_on(&file_system)?.balloon_bytes,
    })
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
    open::refuse_encrypted(&request, "mount its file system")?;
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
        unmount_all(device)?;
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
