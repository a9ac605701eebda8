//! `ploop resize`: a disk and what is on it get another size.
//!
//! | | larger | smaller |
//! |---|---|---|
//! | served | image in the server, descriptor, partition table, device, file system | refused |
//! | closed | image and descriptor, then served for a moment for the rest | served for a moment: file system, partition table; then descriptor and image |
//!
//! What can be refused is refused before the first step ([`resize_plan`]). Every step leaves a disk that works, and does
//! nothing where it was done before: the same command finishes what was cut.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::loop_device;
use ploop_core::device::runtime::{OpenRequest, PartitionRange};
use ploop_core::ops::resize::Shrink;
use ploop_core::units::{SECTOR_BYTES, Sectors};
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::Holders;
use serde::Serialize;

use crate::accepting::Accepting;
use crate::args;
use crate::disk_bytes::{DiskBytes, ShownDisk};
use crate::exit::Outcome;
use crate::inner_size::{self, Inner};
use crate::open;
use crate::output::{Output, Report, human_bytes};
use crate::partition_table::{self, Partition, Table};
use crate::repartition;
use crate::resize_plan::{self, Closed, Plan};
use crate::serving::{self, ServeOptions, Served};
use crate::signature;
use crate::sizing::{self, ImageSize, Target};

/// Give a disk another size, with the partition and the file system on it
///
/// Larger: also while it is mounted; the last partition grows, and ext2, ext3, ext4 or xfs on it. Smaller: only while it is
/// not mounted, and only with ext2, ext3 or ext4 where it is cut, or nothing.
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

    /// Make the disk smaller although something is there that cannot become smaller, or data past the new end: they are
    /// lost
    #[arg(long)]
    force: bool,

    /// The partition that changes: its number, or its label or UUID; only the last one can, which is the default
    #[arg(long, value_name = "N|LABEL|UUID")]
    partition: Option<String>,

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
    /// What is there that was left as it is.
    left_alone: Option<String>,
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
        match (self.file_system, &self.left_alone) {
            (Some(name), _) => writeln!(out, "file system: {name}"),
            (None, Some(name)) => writeln!(out, "left alone:  {name}"),
            (None, None) => writeln!(out, "file system: none that is known"),
        }
    }
}

/// What became of the disk.
struct Done {
    size: ImageSize,
    partition: Option<PartitionRange>,
    plan: Plan,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    refuse_what_is_not_there(arguments)?;
    let done = match sizing::find(&arguments.disk, false)? {
        Target::Served(served) if arguments.offline => return Err(in_use(&served, &arguments.disk).into()),
        Target::Served(served) => {
            open::refuse_encrypted(&served.state.open, "resize what is inside")?;
            served_disk(arguments, &served, output)?
        }
        Target::Closed(request) => {
            open::refuse_encrypted(&request, "resize what is inside")?;
            let request = OpenRequest { accepted: arguments.accepting.into(), ..request };
            closed_disk(arguments, &request, output)?
        }
    };
    let left_alone = done.plan.inner.is_none() && !done.plan.content.is_nothing();
    output.report(&Resized {
        disk_bytes_before: done.size.disk_bytes_before,
        disk_bytes: done.size.disk_bytes,
        moved_clusters: done.size.moved_clusters,
        held_ms: done.size.held_ms,
        partition: done.partition,
        file_system: done.plan.inner.map(Inner::name),
        left_alone: left_alone.then(|| done.plan.content.name()),
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

/// The size in whole clusters of the disk.
fn rounded(arguments: &Arguments, cluster_bytes: u64) -> Result<u64> {
    arguments
        .size
        .checked_bytes()
        .and_then(|bytes| bytes.checked_next_multiple_of(cluster_bytes.max(SECTOR_BYTES)))
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "resize: the size does not fit 64 bits"))
}

/// The partition that was asked for.
fn wanted<'t>(arguments: &Arguments, table: Option<&'t Table>, file: &Path) -> Result<Option<&'t Partition>> {
    match (&arguments.partition, table) {
        (None, _) => Ok(None),
        (Some(wanted), Some(table)) => table.choose(wanted, file).map(Some),
        (Some(wanted), None) => Err(Error::new(
            ErrorKind::Parameter,
            format!("partition {wanted:?}: the disk has no partition table"),
        )
        .advise("leave out --partition; nothing was changed")),
    }
}

/// What went wrong after the image had changed: said with what is there now.
fn half_way(error: Error, disk_bytes: u64) -> Error {
    let advice = error.advice().map_or_else(String::new, |advice| format!("{advice}; "));
    error.advise(format!(
        "{advice}the disk has its new size, {}; what is on it may still have its old one: the same command goes on from there",
        human_bytes(disk_bytes)
    ))
}

/// A served disk grows, and what it shows.
fn served_disk(arguments: &Arguments, served: &Served, output: &Output) -> Result<Done> {
    let state = served.entry.state()?;
    let device = device_of(served)?;
    let file = served.entry.disk_file();
    let disk = ShownDisk::open(&file, false)?;
    let new = rounded(arguments, serving::status_of(&served.entry)?.cluster_bytes)?;
    if new < disk.disk_bytes() {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("the disk has {} bytes and is mounted: it does not become smaller", disk.disk_bytes()),
        )
        .at_path(&device)
        .advise("unmount it first: ploop umount; nothing was changed"));
    }
    // A disk that is shown whole is its user's: a table on it may be anybody's.
    let table = match state.partition {
        Some(_) => partition_table::read(&disk).map_err(|error| error.at_path(&file))?,
        None => None,
    };
    let meant = wanted(arguments, table.as_ref(), &file)?.cloned();
    // What the device shows, with what its cache holds.
    let probe = |_: Option<(u64, u64)>| signature::probe(&device, None);
    let plan = resize_plan::larger(&disk, table, &probe, new, (meant.as_ref(), state.partition))?;
    if let Some(inner) = plan.inner {
        // Found out before anything is changed.
        let is_mounted = Holders::of(&device)?.usable_mount("resize a mounted file system")?.is_some();
        inner_size::require(inner, is_mounted)?;
    }
    drop(disk);
    let size = sizing::served(served, arguments.size, output)?;
    let partition =
        grow_inside(served, &plan, size.disk_bytes).map_err(|error| half_way(error, size.disk_bytes))?;
    Ok(Done { size, partition, plan })
}

/// A disk that nobody serves: changes it, serving it for a moment where that is needed for what is on it.
fn closed_disk(arguments: &Arguments, request: &OpenRequest, output: &Output) -> Result<Done> {
    let closed = Closed::open(request)?;
    let disk = closed.bytes();
    let (old, new) = (disk.disk_bytes(), rounded(arguments, closed.cluster_bytes())?);
    let is_smaller = new < old.next_multiple_of(closed.cluster_bytes().max(SECTOR_BYTES));
    let nothing = disk.first_data(0, old)?.is_none();
    let (plan, shrink) = if nothing && arguments.partition.is_none() {
        (Plan::default(), if is_smaller { Shrink::IfEmpty } else { Shrink::Refuse })
    } else {
        closed.with_probe(request, arguments.allow_reclaim_stall, |(view, probe)| {
            let table = partition_table::read(&disk).map_err(|error| {
                let advice = error.advice().unwrap_or_default().to_owned();
                error.advise(format!("{advice}; nothing was changed"))
            })?;
            let meant = wanted(arguments, table.as_ref(), view)?.cloned();
            if is_smaller {
                return resize_plan::smaller(&disk, table, probe, new, (meant.as_ref(), arguments.force));
            }
            let plan = resize_plan::larger(&disk, table, probe, new, (meant.as_ref(), None))?;
            Ok((plan, Shrink::Refuse))
        })?
    };
    drop(closed);
    if let Some(inner) = plan.inner {
        inner_size::require(inner, false)?;
    }
    let options = plan.serve_options(arguments.allow_reclaim_stall);
    let mut partition = None;
    if is_smaller && plan.concerns_the_inside() {
        partition = for_a_moment(request, &options, output, |served| shrink_inside(served, &plan, new))?;
    }
    let size: ImageSize = sizing::closed(request, arguments.size, shrink, output)?.into();
    if !is_smaller && plan.concerns_the_inside() {
        let disk_bytes = size.disk_bytes;
        partition = for_a_moment(request, &options, output, |served| grow_inside(served, &plan, disk_bytes))
            .map_err(|error| half_way(error, disk_bytes))?;
    }
    Ok(Done { size, partition, plan })
}

/// Serves a closed disk while `work` is done on it. Nobody mounts it meanwhile but `work`.
fn for_a_moment<T>(
    request: &OpenRequest,
    options: &ServeOptions,
    output: &Output,
    work: impl FnOnce(&Served) -> Result<T>,
) -> Result<T> {
    let served = serving::start(request.clone(), options)?;
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

/// The table, the device and the file system follow an image that has grown. The partition then.
fn grow_inside(served: &Served, plan: &Plan, disk_bytes: u64) -> Result<Option<PartitionRange>> {
    let file = served.entry.disk_file();
    let mut partition = None;
    if plan.table.is_some() {
        partition = repartition::fit(&file, disk_bytes, plan.target)?;
        if let Some(range) = partition {
            loop_device::set_len(&device_of(served)?, &file, range.len)?;
            served.entry.update(|state| state.partition = Some(range))?;
        }
    }
    if let Some(inner) = plan.inner {
        inner_size::grow(inner, &device_of(served)?, &moment_folder(served))?;
    }
    Ok(partition)
}

/// The file system, then the table, make room before the image becomes smaller. The partition then.
fn shrink_inside(served: &Served, plan: &Plan, disk_bytes: u64) -> Result<Option<PartitionRange>> {
    let file = served.entry.disk_file();
    let table = partition_table::read(&ShownDisk::open(&file, false)?)?;
    let mut is_as_seen = table == plan.table;
    if let Some(inner) = plan.inner {
        let device = device_of(served)?;
        if let Some(mounted) = Holders::of(&device)?.mounts.first() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("the file system was mounted meanwhile: {mounted}"),
            ));
        }
        is_as_seen &= signature::probe(&device, None)? == plan.content;
        if is_as_seen {
            inner_size::shrink(inner, &device, plan.inner_bytes)?;
        }
    }
    if !is_as_seen {
        return Err(Error::new(ErrorKind::Busy, "the disk was changed by somebody else meanwhile")
            .at_path(&file)
            .advise("give the command again; nothing was changed"));
    }
    match plan.table {
        Some(_) => repartition::fit(&file, disk_bytes, plan.target),
        None => Ok(None),
    }
}

/// Where a file system is mounted that grows only when mounted: beside the folder of the server, for the folder itself
/// must be empty in the end, also after a kill.
fn moment_folder(served: &Served) -> PathBuf {
    let path = served.entry.path();
    let name = format!(".grow-{}", served.state.id);
    path.parent().unwrap_or(path).join(name)
}
