//! `ploop init`: a new disk in an image file, with its descriptor, a partition and a file system.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use ploop_core::device::runtime::OpenRequest;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::format::{Mode, Version};
use ploop_core::io::best_io_queue;
use ploop_core::ops::create::{CreateOptions, CreateReport, create};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::args;
use crate::exit::Outcome;
use crate::file_system;
use crate::open::{self, Wanted};
use crate::output::{Output, Report, human_bytes};
use crate::partition::{self, Layout};
use crate::serving::{self, ServeOptions, Served};
use crate::signals;

/// Make a new disk: image file, DiskDescriptor.xml beside it, partition and file system inside
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The file system is made through the mounted disk, which needs root, /dev/fuse and a loop device; \
                        -t none needs none of them. A failed init leaves no file behind."
)]
pub(crate) struct Arguments {
    /// Size of the disk: a number counts sectors of 512 bytes, with K, M, G or T units of 1024^n bytes
    #[arg(short = 's', long = "size", value_name = "SIZE", value_parser = args::size)]
    size: Sectors,

    /// Format of the image
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "expanded")]
    format: Format,

    /// Leave a raw image as one hole; without this the host's space is reserved for all of it
    #[arg(short = 'S', long = "sparse")]
    sparse: bool,

    /// Version of the image format
    #[arg(short = 'v', long = "version", value_name = "1|2", default_value = "2")]
    version: ImageVersion,

    /// File system to make; none leaves the disk empty, without a partition
    #[arg(short = 't', long = "fstype", value_name = "FSTYPE", default_value = "ext4")]
    file_system: FileSystem,

    /// Cluster size in sectors: a power of two from 64 (32 KiB) to 131072 (64 MiB)
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", default_value = "2048", value_parser = args::sectors)]
    cluster_sectors: u64,

    /// Block size of the file system in bytes
    #[arg(short = 'B', long = "fsblocksize", value_name = "BYTES", value_parser = args::integer)]
    fs_block_bytes: Option<u64>,

    /// Initialise all of the file system now, not when it is first mounted
    #[arg(short = 'n', long = "nolazy")]
    no_lazy: bool,

    /// Label of the file system
    #[arg(short = 'L', long = "label", value_name = "LABEL")]
    label: Option<String>,

    /// Make the file system on the whole disk, without a partition
    #[arg(short = 'P', long = "no-partition")]
    no_partition: bool,

    /// The image file to make; it must not exist
    #[arg(value_name = "FILE")]
    image: PathBuf,
}
/// How guest clusters lie in an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Clusters are allocated when they are first written
    #[value(alias = "ploop1")]
    Expanded,
    /// All clusters are allocated at once
    Preallocated,
    /// The bytes of the disk as they are, no table
    Raw,
}

/// The version of the image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageVersion {
    /// Disks to 2 TiB
    #[value(name = "1")]
    One,
    /// Any size
    #[value(name = "2")]
    Two,
}

/// A file system that init can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileSystem {
    /// Fourth extended file system
    Ext4,
    /// XFS
    Xfs,
    /// Third extended file system
    Ext3,
    /// No partition and no file system
    None,
}

/// Requests in flight while the table is written: it is small.
const QUEUE_DEPTH: u32 = 8;

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    #[serde(flatten)]
    disk: CreateReport,
    /// Where the file system lies, in guest bytes; none without a partition.
    partition: Option<PartitionBytes>,
    /// Its type; none without a file system.
    file_system: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct PartitionBytes {
    offset: u64,
    len: u64,
}

impl Report for Made {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let file_system = self.file_system.unwrap_or("no file system");
        writeln!(
            out,
            "{}: {} of {}, clusters of {}, {file_system}",
            ploop_core::error::shown(&self.disk.image),
            self.disk.mode,
            human_bytes(self.disk.disk_bytes),
            human_bytes(self.disk.cluster_bytes),
        )
    }
}

impl Format {
    /// The library's word.
    pub(crate) fn mode(self) -> Mode {
        match self {
            Self::Expanded => Mode::Expanded,
            Self::Preallocated => Mode::Preallocated,
            Self::Raw => Mode::Raw,
        }
    }
}

impl ImageVersion {
    /// The library's word.
    pub(crate) fn version(self) -> Version {
        match self {
            Self::One => Version::V1,
            Self::Two => Version::V2,
        }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let file_system = file_system::Options {
        file_system: arguments.file_system,
        block_bytes: arguments.fs_block_bytes,
        lazy: !arguments.no_lazy,
        label: arguments.label.clone(),
    };
    file_system::validate(&file_system)?;
    let options = create_options(arguments)?;
    let partition = plan(arguments, &options)?;
    if arguments.file_system != FileSystem::None {
        require_mounting(arguments.file_system)?;
    }
    // An interrupted init takes its files away, too: mkfs dies of the terminal's signal, this program does not.
    signals::hold()?;
    let disk = create(&options)?;
    let made =
        fill(&disk, partition.as_ref(), &file_system, output).map_err(|error| withdraw(&disk, error))?;
    output.report(&Made {
        partition: partition
            .map(|layout| PartitionBytes { offset: layout.partition.start(), len: layout.partition.len() }),
        file_system: made,
        disk,
    })
}

fn create_options(arguments: &Arguments) -> Result<CreateOptions> {
    let image = &arguments.image;
    let named =
        |problem: &str| Error::new(ErrorKind::Parameter, format!("create disk: {problem}")).at_path(image);
    let file = image.file_name().ok_or_else(|| named("this names no file"))?;
    let file = file.to_str().ok_or_else(|| named("the name of the file is no text"))?;
    let folder = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if let Err(cause) = std::fs::metadata(folder) {
        return Err(Error::io(ErrorKind::Create, "create disk: look for the folder", cause)
            .at_path(folder)
            .advise("make the folder first"));
    }
    if arguments.sparse && arguments.format != Format::Raw {
        return Err(named("only a raw image can be made sparse (-S)").advise(
            "an expanded image takes no more space than it holds data; a preallocated one is all there",
        ));
    }
    Ok(CreateOptions {
        version: arguments.version.version(),
        reserve_raw: arguments.format == Format::Raw && !arguments.sparse,
        cluster: Sectors(arguments.cluster_sectors),
        mode: arguments.format.mode(),
        ..CreateOptions::new(folder, file, arguments.size)
    })
}

/// The partition table, computed before there is any file.
fn plan(arguments: &Arguments, options: &CreateOptions) -> Result<Option<Layout>> {
    if arguments.file_system == FileSystem::None || arguments.no_partition {
        return Ok(None);
    }
    let cluster_bytes = options.cluster.checked_bytes().filter(|bytes| bytes.is_power_of_two());
    let rounded =
        |bytes: u64| options.disk.checked_bytes().and_then(|disk| disk.checked_next_multiple_of(bytes));
    match cluster_bytes.and_then(|bytes| rounded(bytes).map(|disk| (disk, bytes))) {
        Some((disk_bytes, cluster_bytes)) => partition::layout(disk_bytes, cluster_bytes).map(Some),
        // Refused by the library, which knows the limits and says them.
        None => Ok(None),
    }
}

/// What making a file system needs of the machine; said before there is any file.
fn require_mounting(file_system: FileSystem) -> Result<()> {
    const ADVICE: &str = "make the disk without a file system (-t none) and fill it where it is mounted";
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(ErrorKind::MakeFileSystem, "making a file system needs root").advise(ADVICE));
    }
    for path in ["/dev/fuse", "/dev/loop-control"].map(Path::new) {
        if !path.exists() {
            return Err(Error::new(ErrorKind::MakeFileSystem, "making a file system needs this device")
                .at_path(path)
                .advise(ADVICE));
        }
    }
    file_system::require(file_system)
}

/// Writes the partition table and makes the file system, through the served disk.
fn fill(
    disk: &CreateReport,
    partition: Option<&Layout>,
    options: &file_system::Options,
    output: &Output,
) -> Result<Option<&'static str>> {
    if options.file_system == FileSystem::None {
        return Ok(None);
    }
    let request = open::resolve(&Wanted { disks: vec![disk.descriptor.clone()], ..Wanted::default() })?;
    if let Some(layout) = partition {
        write_table(&request, layout)?;
    }
    let served = serving::start(
        request,
        &ServeOptions { whole_disk: partition.is_none(), ..ServeOptions::default() },
    )?;
    let made = make(&served, options, output);
    // Everything is durable and closed when this succeeds.
    let ended = serving::end(&served);
    made.and(ended)?;
    Ok(Some(options.file_system.name()))
}

fn write_table(request: &OpenRequest, layout: &Layout) -> Result<()> {
    let opened = open::open(request)?;
    let disk = Disk::open(Arc::clone(&opened.chain), DiskOptions::default())?;
    let written = (|| {
        let io = best_io_queue(QUEUE_DEPTH)
            .map_err(|cause| Error::io(ErrorKind::Memory, "prepare writing to the new disk", cause))?;
        let mut client = Client::new(&disk, io)?;
        for (offset, bytes) in &layout.pieces {
            client.write(*offset, bytes)?;
        }
        client.flush()
    })();
    let closed = disk.close();
    written.and(closed)
}

fn make(served: &Served, options: &file_system::Options, output: &Output) -> Result<()> {
    let device = served.state.loop_device.as_deref().ok_or_else(|| {
        Error::new(ErrorKind::Device, "the disk has no loop device").at_path(served.entry.path())
    })?;
    file_system::make(options, device)?;
    if let Err(error) =
        file_system::add_balloon(options.file_system, device, &served.entry.path().join("balloon"))
    {
        // The disk is whole without it; only the original's balloon commands would miss it.
        output.warn(&format!("the balloon file was not made: {error}"));
    }
    Ok(())
}

/// Takes the files of a failed init away.
pub(crate) fn withdraw(disk: &CreateReport, error: Error) -> Error {
    // The descriptor first: it must never name an image that is gone. Its lock file guards nothing any more.
    let lock = disk.descriptor.with_extension("xml.lck");
    for path in [&disk.descriptor, &disk.image, &lock] {
        if let Err(cause) = std::fs::remove_file(path)
            && cause.kind() != io::ErrorKind::NotFound
        {
            return error.advise(format!("remove {}, which could not be removed: {cause}", path.display()));
        }
    }
    error
}
