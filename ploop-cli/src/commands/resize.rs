//! `ploop resize`: a disk and what is on it get another size.
//!
//! | | larger | smaller |
//! |---|---|---|
//! | served | image in the server, descriptor, partition table, device, file system | refused |
//! | closed | image and descriptor, then served for a moment for the rest | served for a moment: file system, partition table; then descriptor and image |
//!
//! Every step leaves a disk that works, and does nothing where it was done before: the same command finishes what was cut.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::loop_device;
use ploop_core::device::runtime::{OpenRequest, PartitionRange, mount_points_of};
use ploop_core::ops::descriptor_lock::{DescriptorLock, lock_timeout};
use ploop_core::ops::resize::Shrink;
use ploop_core::units::{SECTOR_BYTES, Sectors};
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::accepting::Accepting;
use crate::args;
use crate::exit::Outcome;
use crate::inner_size::{self, Inner};
use crate::output::{Output, Report, human_bytes};
use crate::repartition;
use crate::serving::{self, ServeOptions, Served};
use crate::sizing::{self, ImageSize, Target};

/// Give a disk another size, with the partition and the file system on it
///
/// Larger: also while it is mounted. Smaller: only while it is not, and only with ext2, ext3 or ext4 on it, or nothing.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A resize that was cut is finished by the same command. Exit codes: 17 a copy of the disk is \
                        running; 26 the file system cannot have this size; 33 the partition table cannot be changed; 37 \
                        the disk is in use; 38 the size is beyond a limit; 41 the file system has errors."
)]
pub(crate) struct Arguments {
    /// The new size of the disk; rounded up to whole clusters
    #[arg(short = 's', long = "size", value_name = "SIZE", value_parser = args::size)]
    size: Sectors,

    /// Only while nobody uses the disk: refuse one that is mounted
    #[arg(short = 'o', long = "offline")]
    offline: bool,

    /// Change the balloon only; not available
    #[arg(short = 'b', long = "balloon")]
    balloon: bool,

    /// A process whose mount namespace has the file system; not available
    #[arg(short = 'p', long = "pid", value_name = "PID")]
    process: Option<u32>,

    /// Make a disk without a known file system smaller although it holds data past the new end: they are lost
    #[arg(long)]
    force: bool,

    /// Serve also where the kernel refuses to protect the server against waiting for its own device when memory is
    /// short; see `ploop mount`
    #[arg(long)]
    allow_reclaim_stall: bool,

    #[command(flatten)]
    accepting: Accepting,

    /// DiskDescriptor.xml or its folder, an image file, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

#[derive(Debug, Serialize)]
struct Resized {
    disk_bytes_before: u64,
    disk_bytes: u64,
    moved_clusters: u64,
    /// How long writes of a mounted disk were held.
    held_ms: Option<u64>,
    /// The partition as it is now.
    partition: Option<PartitionRange>,
    /// The file system that fills it now.
    file_system: Option<&'static str>,
}

impl Report for Resized {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let (before, now) = (human_bytes(self.disk_bytes_before), human_bytes(self.disk_bytes));
        if self.disk_bytes_before == self.disk_bytes {
            writeln!(out, "size:        {now}, as before")?;
        } else {
            writeln!(out, "size:        {now}, before {before}")?;
        }
        if self.moved_clusters > 0 {
            writeln!(out, "moved:       {} clusters", self.moved_clusters)?;
        }
        if let Some(held_ms) = self.held_ms {
            writeln!(out, "writes held: {held_ms} ms")?;
        }
        if let Some(partition) = self.partition {
            writeln!(out, "partition:   {}", human_bytes(partition.len))?;
        }
        writeln!(out, "file system: {}", self.file_system.unwrap_or("none that is known"))
    }
}

/// What became of the inside.
struct Inside {
    partition: Option<PartitionRange>,
    file_system: Option<Inner>,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    refuse_what_is_not_there(arguments)?;
    let (size, inside) = match sizing::find(&arguments.disk, false)? {
        Target::Served(served) if arguments.offline => return Err(in_use(&served, &arguments.disk).into()),
        Target::Served(served) => {
            let size = sizing::served(&served, arguments.size, output)?;
            let inside = grow_inside(&served, size.disk_bytes)?;
            (size, inside)
        }
        Target::Closed(request) => {
            let request = OpenRequest { accepted: arguments.accepting.into(), ..request };
            closed(arguments, &request, output)?
        }
    };
    output.report(&Resized {
        disk_bytes_before: size.disk_bytes_before,
        disk_bytes: size.disk_bytes,
        moved_clusters: size.moved_clusters,
        held_ms: size.held_ms,
        partition: inside.partition,
        file_system: inside.file_system.map(Inner::name),
    })
}

fn refuse_what_is_not_there(arguments: &Arguments) -> Result<()> {
    let refuse = |message: &str, advice: &str| {
        Err(Error::new(ErrorKind::Parameter, format!("resize: {message}")).advise(advice))
    };
    if arguments.balloon || arguments.size.0 == 0 {
        return refuse(
            "there are no balloons here",
            "to give host space back without another size, use `ploop compact`; to make the disk smaller, unmount it \
             and give the new size without -b",
        );
    }
    if arguments.process.is_some() {
        return refuse(
            "the mount namespace of a process (-p) is not entered",
            "run the command in that namespace: nsenter -t PID -m ploop resize ...",
        );
    }
    Ok(())
}

fn in_use(served: &Served, name: &Path) -> Error {
    let device = served.state.loop_device.as_deref().unwrap_or(served.entry.path());
    Error::new(ErrorKind::InUse, format!("the disk is served as {}", device.display()))
        .at_path(name)
        .advise("unmount it first: ploop umount; or, to make it larger, leave out -o")
}

/// A disk that nobody serves: changes it, serving it for a moment where that is needed for what is on it.
fn closed(arguments: &Arguments, request: &OpenRequest, output: &Output) -> Result<(ImageSize, Inside)> {
    let before = open_size(request)?;
    let shrinks = arguments.size.checked_bytes().is_some_and(|bytes| bytes < before.disk_bytes)
        && arguments.size.0.div_ceil(before.cluster_sectors.max(1))
            < before.disk_sectors.div_ceil(before.cluster_sectors.max(1));
    if !shrinks {
        let size: ImageSize = sizing::closed(request, arguments.size, Shrink::Refuse, output)?.into();
        if !before.has_something_on_it {
            return Ok((size, Inside { partition: None, file_system: None }));
        }
        let disk_bytes = size.disk_bytes;
        let inside = for_a_moment(arguments, request, output, |served| grow_inside(served, disk_bytes))?;
        return Ok((size, inside));
    }
    let cluster_bytes = before.cluster_sectors * SECTOR_BYTES;
    let disk_bytes = (arguments.size.0 * SECTOR_BYTES).next_multiple_of(cluster_bytes);
    let (inside, shrink) = if before.has_something_on_it {
        let force = arguments.force;
        for_a_moment(arguments, request, output, |served| shrink_inside(served, disk_bytes, force))?
    } else {
        let shrink = if arguments.force { Shrink::Discard } else { Shrink::IfEmpty };
        (Inside { partition: None, file_system: None }, shrink)
    };
    let size = sizing::closed(request, arguments.size, shrink, output).map_err(|error| {
        if shrink == Shrink::IfEmpty && error.to_string().contains("holds data past its new end") {
            error.advise("with --force what lies there is lost; nothing was changed")
        } else {
            error
        }
    })?;
    Ok((size.into(), inside))
}

/// What must be known of a closed disk before anything is changed.
struct Before {
    disk_bytes: u64,
    disk_sectors: u64,
    cluster_sectors: u64,
    /// There is a partition table, or a file system without one.
    has_something_on_it: bool,
}

fn open_size(request: &OpenRequest) -> Result<Before> {
    // Another command that works on the disk is waited for, as by every other command.
    let _lock = match &request.descriptor {
        Some(descriptor) => Some(DescriptorLock::take(descriptor, lock_timeout())?),
        None => None,
    };
    let request = OpenRequest { read_only: true, ..request.clone() };
    let opened = crate::open::open(&request, crate::open::Manner::default())?;
    let geometry = opened.chain.geometry();
    let mut head = vec![0; 4096];
    let mut at = 0usize;
    while at < head.len() && (at as u64) < geometry.disk_bytes() {
        let wanted = (head.len() - at) as u64;
        let mapping = opened.chain.map(ploop_core::units::GuestOffset(at as u64), wanted);
        let len = usize::try_from(mapping.len()).unwrap_or(usize::MAX).min(head.len() - at);
        if let ploop_core::format::Mapping::Data { delta, offset, .. } = mapping {
            use ploop_core::io::StorageExt;
            opened.chain.storage(delta).read_padded_at(offset.0, &mut head[at..at + len]).map_err(
                |cause| {
                    Error::io(ErrorKind::Read, "read the start of the disk", cause)
                        .at_path(opened.chain.name(delta))
                },
            )?;
        }
        at += len;
    }
    Ok(Before {
        disk_bytes: geometry.disk_bytes(),
        disk_sectors: geometry.disk_sectors().0,
        cluster_sectors: u64::from(geometry.cluster_sectors()),
        has_something_on_it: head[512..].starts_with(b"EFI PART")
            || head.starts_with(b"XFSB")
            || head[1080..1082] == [0x53, 0xEF],
    })
}

/// Serves a closed disk while `work` is done on it. Nobody mounts it meanwhile but `work`.
fn for_a_moment<T>(
    arguments: &Arguments,
    request: &OpenRequest,
    output: &Output,
    work: impl FnOnce(&Served) -> Result<T>,
) -> Result<T> {
    let options =
        ServeOptions { allow_reclaim_stall: arguments.allow_reclaim_stall, ..ServeOptions::default() };
    let served = serving::start(request.clone(), &options)?;
    let done = work(&served);
    let ended = serving::end(&served);
    match (done, ended) {
        (Err(error), Err(second)) => {
            output.error(&second);
            Err(error)
        }
        (Err(error), Ok(())) => Err(error),
        (Ok(_), Err(error)) => Err(error),
        (Ok(done), Ok(())) => Ok(done),
    }
}

fn device_of(served: &Served) -> Result<PathBuf> {
    served.entry.state()?.loop_device.ok_or_else(|| {
        Error::new(ErrorKind::Device, "the disk has no loop device").at_path(served.entry.path())
    })
}

/// The table, the device and the file system follow an image that has grown.
fn grow_inside(served: &Served, disk_bytes: u64) -> Result<Inside> {
    let state = served.entry.state()?;
    let device = device_of(served)?;
    let file = served.entry.disk_file();
    // A disk that is shown whole is its user's: a table on it may be anybody's.
    let partition = match state.partition {
        None => None,
        Some(_) => {
            let range = repartition::fit(&file, disk_bytes)?;
            if let Some(range) = range {
                loop_device::set_len(&device, &file, range.len)?;
                served.entry.update(|state| state.partition = Some(range))?;
            }
            range
        }
    };
    let inner = Inner::find(&device)?;
    if let Some(inner) = inner {
        inner_size::grow(inner, &device, &moment_folder(served))?;
    }
    Ok(Inside { partition, file_system: inner })
}

/// The file system, then the table, make room before the image becomes smaller.
fn shrink_inside(served: &Served, disk_bytes: u64, force: bool) -> Result<(Inside, Shrink)> {
    let state = served.entry.state()?;
    let device = device_of(served)?;
    if let Some(point) = mount_points_of(&device)?.pop() {
        return Err(Error::new(ErrorKind::InUse, "the file system was mounted meanwhile").at_path(point));
    }
    let end = match state.partition {
        Some(partition) => repartition::partition_end(disk_bytes).saturating_sub(partition.offset),
        None => disk_bytes,
    };
    let inner = Inner::find(&device)?;
    let shrink = match inner {
        Some(inner) => {
            inner_size::shrink(inner, &device, end)?;
            Shrink::Discard
        }
        None if force => Shrink::Discard,
        None if state.partition.is_some() => {
            return Err(Error::new(
                ErrorKind::Parameter,
                "the partition holds nothing that could be made smaller by itself",
            )
            .at_path(&device)
            .advise("with --force what lies past the new end is lost; nothing was changed"));
        }
        None => Shrink::IfEmpty,
    };
    let partition = match state.partition {
        Some(_) => repartition::fit(&served.entry.disk_file(), disk_bytes)?,
        None => None,
    };
    Ok((Inside { partition, file_system: inner }, shrink))
}

/// Where a file system is mounted that grows only when mounted: beside the folder of the server, for the folder itself
/// must be empty in the end, also after a kill.
fn moment_folder(served: &Served) -> PathBuf {
    let path = served.entry.path();
    let name = format!(".grow-{}", served.state.id);
    path.parent().unwrap_or(path).join(name)
}
