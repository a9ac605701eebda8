//! `ploop compact`: an image becomes as short as what it holds, while the disk runs or when it is closed.
//!
//! A mounted file system is trimmed first (by this process: a server that waited for a file system that waits for the
//! server could not even be killed), so that what it has freed is free in the image, too. Then the server, or this
//! process for a closed disk, moves clusters from the end of the file into free places and cuts the end off.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::{Entry, Runtime, State};
use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::io::sys;
use ploop_core::ops::Progress;
use ploop_core::ops::compact::{CompactOptions, CompactReport, compact};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::OpenedFileSystem;
use serde::Serialize;

use crate::args;
use crate::exit::Outcome;
use crate::job_service::{self, Company};
use crate::open::{self, Wanted};
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::space_used;

/// The verb of the control socket, and what may run beside it.
pub(crate) const VERB: (&str, Company) = ("compact", Company::BesideCopy);

/// How much of a file system is trimmed between two looks at whether that is still wanted, in bytes.
const TRIM_BYTES: u64 = 16 << 30;

/// Give the free space of a disk back to the host
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What the mounted file system has freed is discarded first; then clusters move from the end of the image \
                  into free places, and the end is cut off. A running disk stays in use meanwhile. Interrupted, it has \
                  done a part; the same command goes on.\n\n\
                  Only the image that is written to is compacted: snapshots below it stay as they are."
)]
pub(crate) struct Arguments {
    /// The DiskDescriptor.xml of the disk, its folder or image file; of a running one also its device or mount point
    #[arg(value_name = "DISK")]
    disk: PathBuf,

    /// Move no more than this per second
    #[arg(long, value_name = "RATE", value_parser = args::size)]
    limit: Option<Sectors>,

    /// Do not trim the mounted file system
    #[arg(long)]
    no_trim: bool,

    /// Stop once the image is shorter by this much
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    to_free: Option<Sectors>,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Wishes<'a> {
    pub(crate) disk: &'a Path,
    pub(crate) limit: Option<Sectors>,
    pub(crate) trim: bool,
    /// Shorter free runs of the file system are not discarded.
    pub(crate) run_bytes_min: u64,
    pub(crate) to_free: Option<Sectors>,
}

/// What was done.
#[derive(Debug, Serialize)]
pub(crate) struct Compacted {
    /// Bytes that the file system says it discarded; none when it was not trimmed.
    trimmed_bytes: Option<u64>,
    #[serde(flatten)]
    report: CompactReport,
}

impl Report for Compacted {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = &self.report;
        writeln!(out, "image:       {}", ploop_core::error::shown(&report.image))?;
        if let Some(bytes) = self.trimmed_bytes {
            writeln!(out, "trimmed:     {}", human_bytes(bytes))?;
        }
        let moved = report.moved_clusters.saturating_mul(report.cluster_bytes);
        writeln!(out, "moved:       {} clusters ({})", report.moved_clusters, human_bytes(moved))?;
        let change = |before, after| format!("{} before, {} now", human_bytes(before), human_bytes(after));
        writeln!(out, "file:        {}", change(report.file_bytes_before, report.file_bytes_after))?;
        writeln!(out, "on the host: {}", change(report.host_bytes_before, report.host_bytes_after))?;
        if !report.complete {
            writeln!(out, "             not all could be moved: the disk was written to meanwhile")?;
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let wishes = Wishes {
        disk: &arguments.disk,
        limit: arguments.limit,
        trim: !arguments.no_trim,
        run_bytes_min: 0,
        to_free: arguments.to_free,
    };
    let job = begin(&wishes, output)?;
    output.report(&carry_out(&wishes, &job, output)?)
}

/// The job of a command; before any thread is started.
pub(crate) fn begin(wishes: &Wishes<'_>, output: &Output) -> Result<Job> {
    let limit = wishes.limit.map(|limit| bytes(limit, "the rate")).transpose()?;
    if limit == Some(0) {
        return Err(Error::new(ErrorKind::Parameter, "a rate of nothing never ends"));
    }
    Job::begin(output, limit)
}

fn bytes(sectors: Sectors, what: &str) -> Result<u64> {
    sectors
        .checked_bytes()
        .ok_or_else(|| Error::new(ErrorKind::Parameter, format!("{what} does not fit 64 bits")))
}

/// Compacts a running or a closed disk.
pub(crate) fn carry_out(wishes: &Wishes<'_>, job: &Job, output: &Output) -> Result<Compacted> {
    let free_bytes = wishes.to_free.map(|size| bytes(size, "the size")).transpose()?;
    let runtime = Runtime::of_user()?;
    if let Some(state) = runtime.find(wishes.disk)? {
        return compact_served(wishes, free_bytes, &runtime.entry(&state.id), &state, job, output);
    }
    let kind = open::look_at(wishes.disk)?;
    if kind.file_type().is_block_device() || (kind.is_dir() && !wishes.disk.join(DESCRIPTOR_NAME).exists()) {
        return Err(not_mounted(wishes.disk));
    }
    let request = open::resolve(&Wanted { disks: vec![wishes.disk.to_owned()], ..Wanted::default() })?;
    open::oddities_of(&request)?.1.iter().for_each(|text| output.warn(text));
    let path = request.descriptor.or_else(|| request.images.into_iter().next()).unwrap_or_default();
    let report = compact(&CompactOptions { path, free_bytes }, &job.meter())?;
    Ok(Compacted { trimmed_bytes: None, report })
}

/// The error for a device or folder that is no disk of ours.
pub(crate) fn not_mounted(disk: &Path) -> Error {
    Error::new(ErrorKind::NotMounted, "this is no mounted disk of ploop")
        .at_path(disk)
        .advise("`ploop list` shows what is mounted; a disk that is not is given by its image or descriptor")
}

fn compact_served(
    wishes: &Wishes<'_>,
    free_bytes: Option<u64>,
    entry: &Entry,
    state: &State,
    job: &Job,
    output: &Output,
) -> Result<Compacted> {
    let ask = |free_bytes| -> Result<CompactReport> {
        let options = CompactOptions { free_bytes, ..CompactOptions::default() };
        let report = job_service::ask(entry, VERB.0, &options, job)?;
        serde_json::from_value(report)
            .map_err(|cause| Error::io(ErrorKind::System, "read the report of the server", cause.into()))
    };
    let before = state.images.last().and_then(|image| std::fs::metadata(&image.path).ok());
    let trimmed_bytes = if wishes.trim { trim(wishes, state, job, output)? } else { None };
    let Some(free_bytes) = free_bytes else {
        return Ok(Compacted { trimmed_bytes, report: ask(None)? });
    };
    // What the trim has freed counts. The server has punched it when it has been asked once.
    let first = ask(Some(0))?;
    let host_bytes_before = before.map_or(first.host_bytes_before, |file| file.blocks().saturating_mul(512));
    let freed = host_bytes_before.saturating_sub(first.host_bytes_after);
    let report = match free_bytes.checked_sub(freed).filter(|&left| left > 0) {
        None => first,
        Some(left) => {
            let second = ask(Some(left))?;
            CompactReport { file_bytes_before: first.file_bytes_before, ..second }
        }
    };
    Ok(Compacted { trimmed_bytes, report: CompactReport { host_bytes_before, ..report } })
}

/// Has the file system on a served disk discard what is free; how much. `None` when nothing is mounted, or the file
/// system cannot.
fn trim(wishes: &Wishes<'_>, state: &State, job: &Job, output: &Output) -> Result<Option<u64>> {
    if state.open.read_only {
        return Ok(None);
    }
    let Some(OpenedFileSystem { name, folder, .. }) = space_used::open_of(state)? else { return Ok(None) };
    let failed = |cause| Error::io(ErrorKind::DeviceCommand, "trim the file system", cause).at_path(&name);
    let total = state.partition.map(|partition| partition.len).or(state.size_bytes).unwrap_or(0);
    let meter = job.meter();
    // The rate limit is for moving: here nothing is moved.
    meter.begin("trim", 0);
    let (mut at, mut trimmed) = (0_u64, 0_u64);
    loop {
        let is_last = total.saturating_sub(at) <= TRIM_BYTES;
        let len = if is_last { u64::MAX - at } else { TRIM_BYTES };
        match sys::trim_file_system(folder.as_fd(), at, len, wishes.run_bytes_min) {
            Ok(bytes) => trimmed = trimmed.saturating_add(bytes),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
                output.warn(&format!("the file system {name} cannot be trimmed"));
                return Ok(None);
            }
            // The file system is smaller than its device: there is nothing out there.
            Err(error) if at > 0 && error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(failed(error)),
        }
        meter.advance(0)?;
        if is_last {
            break;
        }
        at += TRIM_BYTES;
    }
    meter.end();
    Ok(Some(trimmed))
}
