//! `ploop export`: the content of a disk as a raw file, as a stream, or in a format of other programs.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use ploop_core::error::shown;
use ploop_core::ops::agreement;
use ploop_core::ops::export::{ExportOptions, ExportReport, export, export_to};
use ploop_core::ops::open::Which;
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use super::convert::limit_bytes;
use super::mount::BaseFormat;
use crate::accepting::refuse_success;
use crate::args;
use crate::exit::Outcome;
use crate::open::{self, Wanted};
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::qemu::{self, DiskFormat, Layout};
use crate::serving::{self, ServeOptions};
use crate::signals;
use crate::snapshots::guid_or_word;

/// Write the content of a disk, or of a snapshot, into a new file or to stdout
///
/// The file appears when it is complete, durable and compared. Zeros become holes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The disk must not be mounted for writing; export a snapshot of a running one with -u, or move it with \
                        ploop copy.\n\n\
                        Formats other than raw are written by qemu-img, which reads the disk served read-only by ploop; \
                        this needs root, /dev/fuse and qemu-img."
)]
pub(crate) struct Arguments {
    /// The snapshot to export, by its GUID; base for the lowest image
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid_or_word)]
    snapshot: Option<String>,

    /// Format of the new file; by default what its name ends with (.qcow2, .vmdk, .vdi, .vhdx, .vhd, .qed), else raw
    #[arg(long = "format", value_name = "FORMAT")]
    format: Option<DiskFormat>,

    /// Options of that format, as cluster_size=64K,compat=v3; may be repeated. Those that name files are refused
    #[arg(short = 'o', value_name = "NAME=VALUE,...")]
    layout: Vec<String>,

    /// Compress the content (qcow2, and vmdk with -o subformat=streamOptimized)
    #[arg(short = 'c', long = "compress")]
    compress: bool,

    /// Format of the base image when there is no descriptor
    #[arg(short = 'f', value_name = "FORMAT", default_value = "ploop1")]
    base: BaseFormat,

    /// Cluster size for a raw base without descriptor, in sectors
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", value_parser = args::sectors)]
    cluster_sectors: Option<u64>,

    /// Go through no more than this much data in a second: sectors, or with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    limit: Option<Sectors>,

    /// Do not read back what was written: faster, but a disk that lies is not noticed
    #[arg(long)]
    no_verify: bool,

    /// Take images that lie outside of the bundle, as a linked clone has them, from this folder; may be repeated
    #[arg(long = "allow-parent", value_name = "DIR")]
    parents: Vec<PathBuf>,

    /// Take the bytes of an encrypted disk as they are, unreadable without its key
    #[arg(long)]
    ciphertext: bool,

    /// DiskDescriptor.xml or its folder, or image files, base first; then the new file, or - for stdout
    #[arg(value_name = "DISK... FILE", required = true, num_args = 2..)]
    paths: Vec<PathBuf>,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Exported(ExportReport);

impl Report for Exported {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let file = self.0.file.as_deref().unwrap_or(Path::new("-"));
        let host = self
            .0
            .host_bytes
            .map_or_else(String::new, |bytes| format!(", {} on the host", human_bytes(bytes)));
        writeln!(out, "{}: {}{host}", shown(file), human_bytes(self.0.disk_bytes))
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let Some((target, disks)) = arguments.paths.split_last() else {
        return Err(Error::new(ErrorKind::Parameter, "export: no disk and no file").into());
    };
    let wanted = Wanted {
        disks: disks.to_vec(),
        read_only: true,
        raw_base: arguments.base == BaseFormat::Raw,
        cluster_sectors: arguments.cluster_sectors,
        snapshot: arguments.snapshot.clone(),
        parents: arguments.parents.clone(),
        ..Wanted::default()
    };
    let named = DiskFormat::of_name(target);
    let format = arguments.format.or(named).unwrap_or(DiskFormat::Raw);
    if let Some(named) = named.filter(|&named| named != format) {
        output.warn(&format!("{} is written as {format}, though its name says {named}", shown(target)));
    }
    open::check_new_file("export", target)?;
    let layout = Layout::new(format, arguments.compress, &arguments.layout)?;
    if format != DiskFormat::Raw {
        return finish(other_format(&wanted, arguments, (format, &layout), target)?, output);
    }
    let request = open::resolve(&wanted)?;
    let which = match &request.descriptor {
        Some(descriptor) => Which::Path(descriptor.clone()),
        None => Which::Files(request.images.clone()),
    };
    let options = ExportOptions {
        which,
        snapshot: open::snapshot_of(&request)?,
        raw_cluster: open::raw_cluster_of(&request),
        read_back: !arguments.no_verify,
        parents: request.parents.clone(),
        ciphertext: arguments.ciphertext,
    };
    let job = Job::begin(output, limit_bytes(arguments.limit))?;
    if target != Path::new("-") {
        let report = export(&options, target, &job.meter())?;
        return finish(report, output);
    }
    if arguments.no_verify {
        return Err(Error::new(
            ErrorKind::Parameter,
            "export: --no-verify is for files: a stream is not read back",
        )
        .into());
    }
    if io::stdout().is_terminal() {
        return Err(Error::new(ErrorKind::Parameter, "export: stdout is a terminal")
            .advise("redirect it to a file or a pipe")
            .into());
    }
    // The descriptor itself: the standard library would look for ends of lines in it.
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    let stdout = stdout.map_err(|cause| Error::io(ErrorKind::Write, "export: take over stdout", cause))?;
    let report = export_to(&options, &mut File::from(stdout), &job.meter())?;
    report.warnings.iter().for_each(|text| output.warn(text));
    // stdout is the disk: programs read the figures from stderr.
    job.progress().done(&serde_json::json!(report));
    refuse_success(&report.disagreements, EXPORTED, output)?;
    Ok(())
}

/// What a file that was written is worth.
const EXPORTED: &str = "what is there was exported";

/// Reports a file that was written.
fn finish(report: ExportReport, output: &Output) -> Outcome {
    report.warnings.iter().for_each(|text| output.warn(text));
    let report = Exported(report);
    output.report(&report)?;
    refuse_success(&report.0.disagreements, EXPORTED, output)?;
    Ok(())
}

/// Through `qemu-img`, from the disk served read-only.
fn other_format(
    wanted: &Wanted,
    arguments: &Arguments,
    (format, layout): (DiskFormat, &Layout),
    target: &Path,
) -> Result<ExportReport> {
    let refused = |message: String| Error::new(ErrorKind::Parameter, format!("export: {message}"));
    if target == Path::new("-") {
        return Err(refused(format!("{format} cannot be written to a pipe")).advise("give a file"));
    }
    if arguments.limit.is_some() {
        return Err(refused("--limit is for raw files only".to_owned()));
    }
    if arguments.no_verify {
        return Err(refused("--no-verify is for raw files only".to_owned()));
    }
    if target.symlink_metadata().is_ok() {
        return Err(refused("the file exists".to_owned())
            .at_path(target)
            .advise("choose another name; nothing was changed"));
    }
    qemu::require()?;
    let request = open::resolve(wanted)?;
    let (encryption, warnings) = open::oddities_of(&request)?;
    if let Some(encryption) = encryption.filter(|_| !arguments.ciphertext) {
        return Err(ploop_core::ops::open::ciphertext_refused("export", &encryption).at_path(target));
    }
    let disagreements = match &request.descriptor {
        Some(descriptor) => agreement::of_disk(descriptor, open::snapshot_of(&request)?)?,
        None => Vec::new(),
    };
    signals::hold()?;
    let served = serving::start(request, &ServeOptions { without_device: true, ..ServeOptions::default() })?;
    let written = qemu::Unfinished::beside(target).and_then(|file| {
        qemu::convert_to(&served.entry.disk_file(), format, layout, file.path())?;
        let disk_bytes = served.entry.state()?.size_bytes.unwrap_or(0);
        let host_bytes = file.finish(target)?;
        Ok(ExportReport {
            file: Some(target.to_path_buf()),
            disk_bytes,
            host_bytes: Some(host_bytes),
            warnings,
            disagreements,
        })
    });
    let ended = serving::end(&served);
    let report = written?;
    ended?;
    Ok(report)
}
