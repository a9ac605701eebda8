//! `ploop info`: what a disk is, from its descriptor and images, without changing anything.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::{Runtime, State};
use ploop_core::error::{one_line, shown};
use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::ops::info::{InfoOptions, InfoReport, info};
use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::condition::{Condition, Word};
use crate::disk_bytes::ShownDisk;
use crate::exit::Outcome;
use crate::full_host::Promised;
use crate::open::{self, Wanted, followed};
use crate::output::{Output, Report, human_bytes};
use crate::partition_table::{self, Table};
use crate::resize_plan::Closed;
use crate::space_used::{self, SpaceUsed};

/// Show what a disk is
///
/// `fragmented` compares clusters that follow each other on the guest's disk and lie in one image: the share of those
/// that do not follow each other in the file.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print size, cluster size and version only, as `size: N blocksize: N fmt_version: N`, in sectors
    #[arg(short = 's', long = "size")]
    size_only: bool,

    /// A disk that is served, by its block device
    #[arg(short = 'd', long = "device", value_name = "DEVICE", conflicts_with = "disk")]
    device: Option<PathBuf>,

    /// Take images that lie outside of the bundle, as a linked clone has them, from this folder; may be repeated
    #[arg(long = "allow-parent", value_name = "DIR")]
    parents: Vec<PathBuf>,

    /// The DiskDescriptor.xml of the disk, its folder or its image file; of a running one also its device or mount point
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// All of it.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    disk: &'a InfoReport,
    /// How full its file system is, or was when it was last unmounted; none when that is not known.
    file_system: Option<SpaceUsed>,
    /// The partitions; none where there is no table, or where it could not be read.
    partition_table: Option<Table>,
    /// How the disk is served; none when it is not.
    condition: Option<Condition>,
    /// What the disks of its host's file system could still ask for.
    host: Option<Promised>,
}

/// Size, cluster size and version, as the original prints them.
#[derive(Serialize)]
struct Sizes {
    /// Sectors.
    size: u64,
    /// Sectors.
    blocksize: u64,
    /// 0 for a raw disk.
    fmt_version: u8,
}

impl Report for Sizes {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "size:\t\t{}", self.size)?;
        writeln!(out, "blocksize:\t{}", self.blocksize)?;
        writeln!(out, "fmt_version:\t{}", self.fmt_version)
    }
}

impl Report for Whole<'_> {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let disk = self.disk;
        if let Some(descriptor) = &disk.descriptor {
            writeln!(out, "descriptor:  {}", shown(descriptor))?;
        }
        let sectors = disk.disk_bytes / SECTOR_BYTES;
        writeln!(out, "size:        {} ({sectors} sectors)", human_bytes(disk.disk_bytes))?;
        match disk.cluster_bytes {
            0 => writeln!(out, "cluster:     unknown")?,
            bytes => writeln!(out, "cluster:     {} ({} sectors)", human_bytes(bytes), bytes / SECTOR_BYTES)?,
        }
        match disk.version {
            Some(version) => writeln!(out, "format:      {}, version {version}", disk.mode)?,
            None => writeln!(out, "format:      {}", disk.mode)?,
        }
        if disk.storages > 1 {
            writeln!(
                out,
                "split:       into {} storages: it can be read, not changed (ploop import)",
                disk.storages
            )?;
        }
        if let Some(encryption) = &disk.encryption {
            writeln!(out, "encrypted:   {encryption}")?;
        }
        let state = match (disk.open_by_program, disk.in_use) {
            (true, _) => "in use by a program",
            (false, true) => "not closed: the program or machine that wrote it died",
            (false, false) => "closed",
        };
        writeln!(out, "state:       {state}")?;
        if let Some(condition) = &self.condition {
            let explanation = condition.explanation();
            let gap = if explanation.is_empty() { "" } else { ": " };
            writeln!(out, "served:      {}{gap}{explanation}", condition.word.text())?;
        }
        let taken = (human_bytes(disk.file_bytes), human_bytes(disk.host_bytes));
        writeln!(out, "files:       {} long, {} on the host", taken.0, taken.1)?;
        if let Some(host) = &self.host {
            let (free, bytes) = (human_bytes(host.free_bytes), human_bytes(host.bytes));
            let disks = if host.disks == 1 { "1 disk".to_owned() } else { format!("{} disks", host.disks) };
            let more = if host.bytes > host.free_bytes { ": more than there is" } else { "" };
            writeln!(out, "host:        {free} free, {disks} could still ask for {bytes}{more}")?;
        }
        writeln!(
            out,
            "clusters:    {} allocated, {} free inside",
            disk.allocated_clusters, disk.free_clusters
        )?;
        let per_mille = disk.fragmentation_per_mille;
        writeln!(out, "fragmented:  {}.{} % of neighbouring clusters", per_mille / 10, per_mille % 10)?;
        writeln!(out, "snapshots:   {}", disk.snapshots)?;
        for image in &disk.images {
            let current = if image.current { "*" } else { " " };
            let guid = image.guid.as_deref().unwrap_or("-");
            let lengths = (human_bytes(image.file_bytes), human_bytes(image.host_bytes));
            writeln!(
                out,
                "image:     {current} {guid} {} ({} long, {} on the host)",
                one_line(&image.file),
                lengths.0,
                lengths.1
            )?;
            writeln!(
                out,
                "             {} clusters, {} free inside, {} of {} neighbours apart",
                image.allocated_clusters, image.free_clusters, image.breaks, image.neighbours
            )?;
            for bitmap in &image.bitmaps {
                let id = bitmap.id.as_deref().unwrap_or("without a name");
                let valid = bitmap.invalid.as_ref().map_or_else(
                    || "valid".to_owned(),
                    |why| format!("not valid, all counts as dirty: {why}"),
                );
                let granularity = human_bytes(bitmap.granularity_bytes);
                writeln!(out, "             dirty bitmap {id}, {granularity} for a bit, {valid}")?;
            }
            if let Some(problem) = &image.problem {
                writeln!(out, "             problem: {problem}")?;
            }
        }
        if let Some(table) = &self.partition_table {
            for partition in &table.partitions {
                let label = partition.label.as_ref().map_or_else(String::new, |label| format!(" {label:?}"));
                writeln!(
                    out,
                    "partition:   {} {}{label}, {} from byte {}, type {}",
                    table.scheme.name(),
                    partition.number,
                    human_bytes(partition.len),
                    partition.offset,
                    partition.kind
                )?;
            }
        }
        for found in &disk.disagreements {
            writeln!(out, "problem:     {}", found.describe())?;
        }
        if let Some(used) = &self.file_system {
            // Read by scripts, which look for the first word.
            writeln!(out, "{:<11} {:>14} {:>14}", "resource", "Size", "Used")?;
            let (blocks, inodes) = (used.kib(), used.inodes());
            writeln!(out, "{:<11} {:>14} {:>14}", "1k-blocks", blocks.0, blocks.1)?;
            writeln!(out, "{:<11} {:>14} {:>14}", "inodes", inodes.0, inodes.1)?;
        }
        Ok(())
    }
}

/// Whether a path is that of a descriptor, of its folder, or of an image, rather than of a device or a mount point.
fn names_files(path: &Path) -> bool {
    path.is_file() || path.join(DESCRIPTOR_NAME).is_file()
}

/// What could still be asked for where the disk's current image lies.
fn host_of(report: &InfoReport, folder: Option<&Path>, runtime: Option<&Runtime>) -> Option<Promised> {
    let image = report.images.iter().find(|image| image.current)?;
    let own = report.disk_bytes.saturating_sub(image.allocated_clusters.saturating_mul(report.cluster_bytes));
    Promised::on_the_host_of(&folder?.join(&image.file), Some(own), runtime)
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let named = &followed(arguments.device.as_ref().unwrap_or(&arguments.disk))?;
    // Of a running disk its server knows more than the files: what is not in the table yet. Whether it runs is an
    // extra: a user without a run-time folder has mounted nothing.
    let runtime = Runtime::of_user();
    let served = match &runtime {
        Ok(runtime) => runtime.find(named).unwrap_or_default(),
        Err(error) if arguments.device.is_some() => return Err(error.clone().into()),
        Err(_) => None,
    };
    let path = match &served {
        // Named by its device or mount point, or in another way that is no file of the disk.
        Some(state) if arguments.device.is_some() || !names_files(named) => {
            let top = state.images.last();
            state.descriptor.as_ref().or(top).map(|file| file.path.clone()).unwrap_or_else(|| named.clone())
        }
        None if arguments.device.is_some() => {
            return Err(Error::new(ErrorKind::NotMounted, "this is no mounted disk of ploop")
                .at_path(named)
                .advise("`ploop list` shows what is mounted")
                .into());
        }
        _ => named.clone(),
    };
    let parents = arguments.parents.clone();
    let mut condition = None;
    let mut report = info(&InfoOptions { path: path.clone(), parents })?;
    report.warnings.iter().for_each(|text| output.warn(text));
    if let (Ok(runtime), Some(state)) = (&runtime, &served) {
        let (found, status) = Condition::of(&runtime.entry(&state.id), state);
        if found.word == Word::Unguarded {
            output.warn(&found.explanation());
        }
        condition = Some(found);
        let (space, warnings) = status.map(|status| (status.space, status.warnings)).unwrap_or_default();
        warnings.iter().for_each(|text| output.warn(text));
        if let Some(space) = space.filter(|_| state.open.snapshot.is_none()) {
            report = report.with_running_top(&space);
        }
    }
    if arguments.size_only {
        return output.report(&Sizes {
            size: report.disk_bytes / SECTOR_BYTES,
            blocksize: report.cluster_bytes / SECTOR_BYTES,
            fmt_version: report.version.unwrap_or(0),
        });
    }
    let folder = if path.is_dir() { Some(path.as_path()) } else { path.parent() };
    let file_system =
        served.as_ref().and_then(space_used::of_served).or_else(|| SpaceUsed::remembered(folder?));
    // What another program has open may change under a look.
    let partition_table = match served.is_some() || !report.open_by_program {
        true => partitions(&runtime, served.as_ref(), &path),
        false => None,
    };
    let host = host_of(&report, folder, runtime.as_ref().ok());
    output.report(&Whole { disk: &report, file_system, partition_table, condition, host })
}

/// The partitions of a disk that can be read. An extra: what is wrong with the disk is for others to say.
fn partitions(runtime: &Result<Runtime>, served: Option<&State>, path: &Path) -> Option<Table> {
    if let (Ok(runtime), Some(state)) = (runtime, served)
        && state.open.snapshot.is_none()
    {
        let disk = ShownDisk::open(&runtime.entry(&state.id).disk_file(), false).ok()?;
        return partition_table::read(&disk).ok()?;
    }
    let wanted = Wanted { disks: vec![path.to_path_buf()], read_only: true, ..Wanted::default() };
    let closed = Closed::glance(&open::resolve(&wanted).ok()?).ok()?;
    partition_table::read(&closed.bytes()).ok()?
}
