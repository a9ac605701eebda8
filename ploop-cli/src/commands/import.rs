//! `ploop import`: a new disk from a raw file, from stdin, or from a file of other programs.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::OpenRequest;
use ploop_core::error::shown;
use ploop_core::ops::create::{CreateOptions, CreateReport, create};
use ploop_core::ops::import::{ImportOptions, ImportReport, Input, import, import_disk, import_from};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use super::convert::limit_bytes;
use super::init::{Format, ImageVersion};
use crate::args;
use crate::exit::Outcome;
use crate::open::{self, Wanted};
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::qemu::{self, DiskFormat};
use crate::serving::{self, ServeOptions};
use crate::signals;

/// The image's name when only a folder is given.
const IMAGE_NAME: &str = "root.hds";

/// Make a disk of a raw file, of stdin, or of a file of another program
///
/// Makes the image and DiskDescriptor.xml beside it, as init does, with the content of FILE. Holes and zeros of the input
/// take no space. The disk is there when all of it is durable and compared.
#[derive(Debug, clap::Args)]
#[command(after_help = "The size of the disk is that of the input, to the sector of 512 bytes.\n\n\
                        Formats other than raw are read by qemu-img into the new disk, served by ploop; this needs root, \
                        /dev/fuse and qemu-img. Files that stand on others (backing files, parts) are refused.")]
pub(crate) struct Arguments {
    /// Format of the input, if it is a file of its own; raw by default, but one that its name or first bytes call otherwise
    /// is then refused
    #[arg(long = "format", value_name = "FORMAT")]
    input_format: Option<DiskFormat>,

    /// The snapshot of a disk with a descriptor to import, by its GUID; base for the lowest image
    #[arg(short = 'u', long = "uuid", value_name = "UUID")]
    snapshot: Option<String>,

    /// Size of the disk, if it shall be larger than the input; saves work when the input is a pipe
    #[arg(short = 's', long = "size", value_name = "SIZE", value_parser = args::size)]
    size: Option<Sectors>,

    /// Round the size up to whole clusters, with zeros: for the kernel driver of the original, which opens no other image.
    /// A second copy of a GPT is then no longer at the end
    #[arg(long)]
    round: bool,

    /// How the disk lies in its image
    #[arg(short = 'f', value_name = "FORMAT", default_value = "expanded")]
    format: Format,

    /// Version of the image format
    #[arg(short = 'v', long = "version", value_name = "1|2", default_value = "2")]
    version: ImageVersion,

    /// Cluster size in sectors: a power of two from 64 (32 KiB) to 131072 (64 MiB)
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", default_value = "2048", value_parser = args::sectors)]
    cluster_sectors: u64,

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

    /// The file or block device to read, or - for stdin; or a disk with a descriptor, of this or another program: its folder
    /// (NAME.hdd, NAME.pvm) or DiskDescriptor.xml
    #[arg(value_name = "FILE")]
    input: PathBuf,

    /// The image to make, or a folder for it, made if its name ends with /
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Imported(ImportReport);

impl Report for Imported {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = &self.0;
        writeln!(
            out,
            "{}: {} of {}, clusters of {}, {} on the host",
            shown(&report.image),
            report.mode,
            human_bytes(report.disk_bytes),
            human_bytes(report.cluster_bytes),
            human_bytes(report.host_bytes),
        )
    }
}

fn refused(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Parameter, format!("import: {message}"))
}

/// Whether a name ends with a separator: it can only mean a folder.
fn is_folder_name(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

/// Folder and name of the new image.
fn place(image: &Path) -> Result<(PathBuf, String)> {
    if is_folder_name(image) && !image.exists() {
        std::fs::create_dir(image).map_err(|cause| {
            Error::io(ErrorKind::MakeFolder, "import: make the folder of the new disk", cause).at_path(image)
        })?;
    }
    if image.is_dir() {
        return Ok((image.to_path_buf(), IMAGE_NAME.to_owned()));
    }
    let name = image.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| refused("this names no file").at_path(image))?;
    let folder = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok((folder.to_path_buf(), name.to_owned()))
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let source = disk_of(arguments)?;
    if source.is_none() {
        check_format(arguments)?;
    }
    open::check_new_file("import", &arguments.image)?;
    open::warn_of_name(&arguments.image, output);
    let (folder, file) = place(&arguments.image)?;
    let options = ImportOptions {
        disk: arguments.size,
        round: arguments.round,
        version: arguments.version.version(),
        cluster: Sectors(arguments.cluster_sectors),
        mode: arguments.format.mode(),
        read_back: !arguments.no_verify,
        ..ImportOptions::new(folder, file)
    };
    if let Some(request) = source {
        let job = Job::begin(output, limit_bytes(arguments.limit))?;
        let disk = open::options_of(&request)?;
        let (report, warnings) = import_disk(&options, &disk, arguments.ciphertext, &job.meter())?;
        warnings.iter().for_each(|text| output.warn(text));
        return output.report(&Imported(report));
    }
    if let Some(format) = arguments.input_format.filter(|&format| format != DiskFormat::Raw) {
        return output.report(&Imported(other_format(&options, arguments, format)?));
    }
    let job = Job::begin(output, limit_bytes(arguments.limit))?;
    let report = if arguments.input == Path::new("-") {
        // The lock of the standard library is buffered, and pieces are large.
        import_from(&options, Input::Stream(&mut io::stdin().lock()), &job.meter())?
    } else {
        import(&options, &arguments.input, &job.meter())?
    };
    output.report(&Imported(report))
}

/// The disk with a descriptor that the input is, if it is one.
fn disk_of(arguments: &Arguments) -> Result<Option<OpenRequest>> {
    let input = open::followed(&arguments.input)?;
    let is_disk = input.is_dir() || input.file_name().is_some_and(|name| name == open::DESCRIPTOR_NAME);
    if !is_disk {
        if arguments.snapshot.is_some() || !arguments.parents.is_empty() || arguments.ciphertext {
            let message = "-u, --allow-parent and --ciphertext are for a disk with a descriptor";
            return Err(refused(message).at_path(&arguments.input));
        }
        return Ok(None);
    }
    if let Some(format) = arguments.input_format {
        return Err(refused(format!("a disk with a descriptor is not in the format {format}"))
            .at_path(&arguments.input)
            .advise("leave --format out"));
    }
    open::resolve(&Wanted {
        disks: vec![input],
        read_only: true,
        snapshot: arguments.snapshot.clone(),
        parents: arguments.parents.clone(),
        ..Wanted::default()
    })
    .map(Some)
}

/// Refuses to take a file for the bytes of a disk that its name or its first bytes call something else. Nothing is opened
/// by them: what a guest may have written decides no format.
fn check_format(arguments: &Arguments) -> Result<()> {
    if arguments.input_format.is_some() {
        return Ok(());
    }
    let input = &arguments.input;
    let looks_like = match DiskFormat::of_name(input) {
        Some(format) => Some(format.to_string()),
        None => qemu::signature_of(input).map(str::to_owned),
    };
    match looks_like.filter(|format| format != "raw") {
        None => Ok(()),
        Some(format) => Err(refused(format!("this looks like a file of the format {format}, and --format does not say so"))
            .at_path(input)
            .advise(match format.as_str() {
                "ploop" => "import the disk by its DiskDescriptor.xml or folder (restore-descriptor makes one); or --format raw, \
                            if these bytes are really a disk"
                    .to_owned(),
                format => format!("--format {format}; or --format raw, if these bytes are really a disk"),
            })),
    }
}

/// Through `qemu-img`, into the new disk served by this program.
fn other_format(options: &ImportOptions, arguments: &Arguments, format: DiskFormat) -> Result<ImportReport> {
    if arguments.input == Path::new("-") {
        return Err(refused(format!("{format} cannot be read from a pipe")).advise("give a file"));
    }
    if arguments.limit.is_some() {
        return Err(refused("--limit is for raw files only"));
    }
    if arguments.no_verify {
        return Err(refused("--no-verify is for raw files only"));
    }
    qemu::require()?;
    let input = qemu::inspect(&arguments.input, format)?;
    let size = Sectors::covering(input.disk_bytes);
    let disk = options.disk.unwrap_or(size);
    if disk < size {
        return Err(refused(format!("the input has {} sectors, more than the disk of {}", size.0, disk.0))
            .advise("give a larger size, or none"));
    }
    signals::hold()?;
    let made = create(&CreateOptions {
        version: options.version,
        cluster: options.cluster,
        mode: options.mode,
        exact: !options.round,
        ..CreateOptions::new(&options.folder, &options.file, disk)
    })?;
    let filled = fill(&made, &input, format).and_then(|()| {
        let metadata = std::fs::metadata(&made.image)
            .map_err(|cause| Error::io(ErrorKind::Stat, "import: measure the image", cause))?;
        Ok(ImportReport {
            image: made.image.clone(),
            descriptor: made.descriptor.clone(),
            input_bytes: input.disk_bytes,
            disk_bytes: made.disk_bytes,
            cluster_bytes: made.cluster_bytes,
            version: made.version,
            mode: made.mode,
            file_bytes: metadata.len(),
            host_bytes: std::os::unix::fs::MetadataExt::blocks(&metadata).saturating_mul(512),
        })
    });
    filled.map_err(|error| super::init::withdraw(&made, error))
}

fn fill(made: &CreateReport, input: &qemu::Inspected, format: DiskFormat) -> Result<()> {
    let request = open::resolve(&Wanted { disks: vec![made.descriptor.clone()], ..Wanted::default() })?;
    let served = serving::start(request, &ServeOptions { without_device: true, ..ServeOptions::default() })?;
    let filled = qemu::convert_from(&input.path, format, &served.entry.disk_file());
    // Everything is durable and closed when this succeeds.
    let ended = serving::end(&served);
    filled.and(ended)
}
