//! `ploop restore-descriptor`: DiskDescriptor.xml for a disk that has lost it.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::ops::restore_descriptor::{RestoreOptions, RestoreReport, restore_descriptor};
use ploop_core::units::Sectors;
use serde::Serialize;

use super::mount::BaseFormat;
use crate::args;
use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};

/// Write DiskDescriptor.xml anew for a disk without snapshots
///
/// Only the descriptor is written, and only if there is none.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Only for a disk of one image. If it had snapshots, its newest file alone is not the disk: take the \
                        descriptor from a backup.\n\n\
                        Exit codes: 1 there is a descriptor; 11 the image is none."
)]
pub(crate) struct Arguments {
    /// Format of the image
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "ploop1")]
    format: BaseFormat,

    /// Cluster size of a raw disk in sectors; by default the largest from 2048 (1 MiB) to 64 (32 KiB) that divides it
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", value_parser = args::sectors)]
    cluster_sectors: Option<u64>,

    /// The folder of the disk
    #[arg(value_name = "DIR")]
    folder: PathBuf,

    /// Its image
    #[arg(value_name = "BASE")]
    base: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Restored(RestoreReport);

impl Report for Restored {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = &self.0;
        writeln!(
            out,
            "{}: {}, {} of {}, clusters of {}",
            ploop_core::error::shown(&report.descriptor),
            report.image,
            report.mode,
            human_bytes(report.disk_bytes),
            human_bytes(report.cluster_bytes),
        )
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let report = restore_descriptor(&RestoreOptions {
        raw: arguments.format == BaseFormat::Raw,
        cluster: arguments.cluster_sectors.map(Sectors),
        ..RestoreOptions::new(&arguments.folder, &arguments.base)
    })?;
    report.warnings.iter().for_each(|text| output.warn(text));
    output.report(&Restored(report))
}
