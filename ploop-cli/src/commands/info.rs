//! `ploop info`: what a disk is, from its descriptor and images, without changing anything.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::ops::info::{InfoOptions, InfoReport, info};
use ploop_core::units::SECTOR_BYTES;
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};

/// Show what a disk is
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print size, cluster size and version only, as `size: N blocksize: N fmt_version: N`, in sectors
    #[arg(short = 's', long = "size")]
    size_only: bool,

    /// The DiskDescriptor.xml of the disk, its folder or its image file
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// All of it.
#[derive(Serialize)]
struct Whole<'a>(&'a InfoReport);

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
        let disk = self.0;
        if let Some(descriptor) = &disk.descriptor {
            writeln!(out, "descriptor:  {}", descriptor.display())?;
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
        let state = match (disk.open_by_program, disk.in_use) {
            (true, _) => "in use by a program",
            (false, true) => "not closed: the program or machine that wrote it died",
            (false, false) => "closed",
        };
        writeln!(out, "state:       {state}")?;
        let taken = (human_bytes(disk.file_bytes), human_bytes(disk.host_bytes));
        writeln!(out, "files:       {} long, {} on the host", taken.0, taken.1)?;
        writeln!(out, "clusters:    {} allocated", disk.allocated_clusters)?;
        writeln!(out, "snapshots:   {}", disk.snapshots)?;
        for image in &disk.images {
            let current = if image.current { "*" } else { " " };
            let guid = image.guid.as_deref().unwrap_or("-");
            writeln!(out, "image:     {current} {guid} {} ({})", image.file, human_bytes(image.file_bytes))?;
            if let Some(problem) = &image.problem {
                writeln!(out, "             problem: {problem}")?;
            }
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let report = info(&InfoOptions { path: arguments.disk.clone() })?;
    if arguments.size_only {
        return output.report(&Sizes {
            size: report.disk_bytes / SECTOR_BYTES,
            blocksize: report.cluster_bytes / SECTOR_BYTES,
            fmt_version: report.version.unwrap_or(0),
        });
    }
    output.report(&Whole(&report))
}
