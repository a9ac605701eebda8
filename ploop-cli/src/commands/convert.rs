//! `ploop convert`: a disk in another form, offline.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::ops::convert::{ConvertOptions, ConvertReport, convert};
use ploop_core::units::Sectors;
use serde::Serialize;

use super::init::{Format, ImageVersion};
use crate::args;
use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;

/// Give a disk another form: raw, expanded or preallocated, version 1 or 2, other clusters
///
/// Every file of the disk is written anew beside the old one, read back and compared; then the descriptor names the new
/// files and the old ones are removed. The new files have new names.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The disk must not be mounted. Its content and that of every snapshot stays the same. A raw or preallocated \
                        disk has no snapshots.\n\n\
                        Cut at any moment, the disk is wholly the old or wholly the new one; the same command removes what \
                        is left over and goes on.\n\n\
                        Exit codes: 37 the disk is in use; 17 a snapshot is temporary or half merged; 38 it cannot be \
                        converted like that."
)]
pub(crate) struct Arguments {
    /// How the disk shall lie in its image
    #[arg(short = 'f', long = "format", value_name = "FORMAT", conflicts_with = "version")]
    format: Option<Format>,

    /// Version of the image format
    #[arg(short = 'v', long = "version", value_name = "1|2")]
    version: Option<ImageVersion>,

    /// Cluster size in sectors: a power of two from 64 (32 KiB) to 131072 (64 MiB)
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", value_parser = args::sectors)]
    cluster_sectors: Option<u64>,

    /// Go through no more than this much data in a second: sectors, or with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    limit: Option<Sectors>,

    /// Do not read back what was written: faster, but a disk that lies is not noticed
    #[arg(long)]
    no_verify: bool,

    /// The DiskDescriptor.xml of the disk, or its folder
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Converted<'a>(&'a ConvertReport);

impl Report for Converted<'_> {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = self.0;
        if report.images.is_empty() {
            writeln!(out, "nothing to convert")?;
        }
        for image in &report.images {
            let (length, host) = (human_bytes(image.file_bytes), human_bytes(image.host_bytes));
            writeln!(out, "{} -> {}: {length} long, {host} on the host", image.from, image.file)?;
        }
        let version = report.version.map_or_else(String::new, |version| format!(", version {version}"));
        let (size, cluster) = (human_bytes(report.disk_bytes), human_bytes(report.cluster_bytes));
        writeln!(out, "the disk: {size}, {}{version}, clusters of {cluster}", report.mode)
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let job = Job::begin(output, limit_bytes(arguments.limit))?;
    let options = ConvertOptions {
        mode: arguments.format.map(Format::mode),
        version: arguments.version.map(ImageVersion::version),
        cluster: arguments.cluster_sectors.map(Sectors),
        read_back: !arguments.no_verify,
        ..ConvertOptions::new(&arguments.disk)
    };
    let report = convert(&options, &job.meter())?;
    for name in &report.tidied {
        output.warn(&format!("removed {name}, left over by a conversion that was cut"));
    }
    report.warnings.iter().for_each(|text| output.warn(text));
    output.report(&Converted(&report))
}

/// A limit as bytes in a second.
pub(crate) fn limit_bytes(limit: Option<Sectors>) -> Option<u64> {
    limit.map(|sectors| sectors.checked_bytes().unwrap_or(u64::MAX))
}
