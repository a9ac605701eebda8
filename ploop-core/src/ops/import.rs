//! A new disk from the bytes of a raw file or of a stream.
//!
//! As [`create`](super::create()), but with content: the image is built, made durable and read back; the descriptor that
//! names it comes last and is the moment the disk exists. Until then a [plan](super::plan) names what is unfinished, so
//! that the same command, run again after a crash, begins anew. Holes and zeros of the input take no space.
//!
//! A stream does not say how long it is. Its image is begun with room for as much as a table of one cluster covers
//! (256 GiB with clusters of 1 MiB) and gets its real size at the end; a longer one continues in a raw file beside it, and
//! both are then put into an image of the right size. With the size given, neither is needed.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::geometry::{CLUSTER_SECTORS_DEFAULT, Geometry, Version};
use crate::format::{DESCRIPTOR_NAME, DiskDescriptor, Mode};
use crate::io::file::{self, DirectoryFolder, FileStorage};
use crate::io::lock::{ImageLock, Ownership};
use crate::io::{Access, Folder, Storage};
use crate::units::Sectors;

use super::convert::{fill_new, verify_new};
use super::create::version_number;
use super::descriptor_lock::{DescriptorLock, lock_timeout};
use super::open::{ChainStorage, OpenOptions, open, refuse_ciphertext};
use super::plan::{self, Plan};
use super::progress::Progress;
use super::transfer::{self, Pipeline, StorageContent};

mod stream;

/// What disk to make of the input.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// The folder of the new disk. It exists, and has no descriptor yet.
    pub folder: PathBuf,
    /// Name of the image in it; must be free.
    pub file: String,
    /// Size of the disk; as long as the input if none. What the input lacks of it is zeros, a longer input is refused.
    pub disk: Option<Sectors>,
    /// Round the size up to whole clusters, with zeros: the kernel driver of the original opens no other image. Else the
    /// disk ends where its input does, to the sector, as its partition table says.
    pub round: bool,
    /// Version of the image format; says nothing for a raw disk.
    pub version: Version,
    /// Size of a cluster: a power of two from 64 to 131072 sectors.
    pub cluster: Sectors,
    /// How the disk lies in the image. Preallocated needs the size of a stream.
    pub mode: Mode,
    /// What was written is read back and compared before the disk is there.
    pub read_back: bool,
}

impl ImportOptions {
    /// An expanded image of version 2 with clusters of 1 MiB, as large as its input.
    pub fn new(folder: impl Into<PathBuf>, file: impl Into<String>) -> Self {
        Self {
            folder: folder.into(),
            file: file.into(),
            disk: None,
            round: false,
            version: Version::V2,
            cluster: Sectors(u64::from(CLUSTER_SECTORS_DEFAULT)),
            mode: Mode::Expanded,
            read_back: true,
        }
    }
}

/// Where the bytes come from.
pub enum Input<'a> {
    /// A file or block device, and its length in bytes.
    Storage(Arc<dyn Storage>, u64),
    /// A stream that is read to its end.
    Stream(&'a mut dyn Read),
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImportReport {
    /// The image file.
    pub image: PathBuf,
    /// The descriptor.
    pub descriptor: PathBuf,
    /// Bytes of the input.
    pub input_bytes: u64,
    /// Size of the disk in bytes: the input, rounded up to whole clusters.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Version of the image format; none for a raw disk.
    pub version: Option<u8>,
    /// `raw`, `expanded` or `preallocated`.
    pub mode: &'static str,
    /// Length of the image file in bytes.
    pub file_bytes: u64,
    /// What it takes on the host in bytes.
    pub host_bytes: u64,
}

/// Makes a disk of the raw file or block device `input`, which nobody may be writing to.
pub fn import(options: &ImportOptions, input: &Path, progress: &dyn Progress) -> Result<ImportReport> {
    let explain = |cause| file::explain(cause, ErrorKind::Read, "import: examine the input", input);
    let reading = file::OpenOptions::new(Access::ReadOnly).or_block_device();
    let storage = FileStorage::open(input, &reading)?;
    let _lock = ImageLock::take(&storage, input, Ownership::Reader)?;
    let len = storage.len().map_err(explain)?;
    let source: Arc<dyn Storage> = match FileStorage::open(input, &reading.direct()) {
        // Whole pages can be read past the page cache; the odd end of a file is read around it.
        Ok(direct) => Arc::new(direct),
        Err(_) => Arc::new(storage),
    };
    import_from(options, Input::Storage(source, len), progress)
}

/// Makes a disk of the state that `source` opens: the bundle of another program, whole or split, or images; read-only
/// whatever its access. With `ciphertext`, an encrypted one is taken as it is, else refused with
/// [`ErrorKind::Parameter`]. Second, what is odd about it.
pub fn import_disk(
    options: &ImportOptions,
    source: &OpenOptions,
    ciphertext: bool,
    progress: &dyn Progress,
) -> Result<(ImportReport, Vec<String>)> {
    let opened = open(&OpenOptions { access: Access::ReadOnly, ..source.clone() })?;
    if !ciphertext {
        refuse_ciphertext(&opened.report, "import")?;
    }
    let storage = Arc::new(ChainStorage::new(vec![opened.chain]));
    let report = import_from(options, Input::Storage(storage, opened.report.disk_bytes), progress)?;
    Ok((report, opened.report.warnings))
}

/// Makes a disk of an input that is open already.
pub fn import_from(
    options: &ImportOptions,
    input: Input<'_>,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    let folder = DirectoryFolder::open(&options.folder)?;
    let _lock = DescriptorLock::take(&options.folder.join(DESCRIPTOR_NAME), lock_timeout())?;
    let images = DirectoryFolder::open(&options.folder)?.direct();
    import_in(&folder, &images, options, input, progress)
}

fn refused(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Parameter, format!("import: {message}"))
}

/// As [`import_from`], in an open folder. `folder` is for the descriptor and names, `images` is the same folder with its
/// files opened for large transfers; `options.folder` is only for messages.
pub fn import_in(
    folder: &dyn Folder,
    images: &dyn Folder,
    options: &ImportOptions,
    input: Input<'_>,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    if options.file.contains('/') {
        return Err(refused(format!("{:?} is not the name of a file", options.file)));
    }
    // The limits of cluster and version, before anything is read.
    Geometry::new(options.version, options.cluster, options.cluster)?;
    let exists = |name: &str| {
        folder.exists(name).map_err(|cause| {
            Error::io(ErrorKind::Stat, "import: look for a file of that name", cause)
                .at_path(options.folder.join(name))
        })
    };
    let taken = |name: &str| {
        refused("the file exists")
            .at_path(options.folder.join(name))
            .advise("choose another name or folder; nothing was changed")
    };
    // What a run before this one has left goes first, also when that one was complete.
    if exists(DESCRIPTOR_NAME)? {
        plan::recover(folder, Some(&DiskDescriptor::load(folder, None)?))?;
        return Err(taken(DESCRIPTOR_NAME));
    }
    plan::recover(folder, None)?;
    let whole = format!("{}.whole", options.file);
    for name in [&options.file, &whole] {
        if exists(name)? {
            return Err(taken(name));
        }
    }
    let image = options.folder.join(&options.file);
    let plan = Plan { new: vec![options.file.clone(), whole], old: Vec::new() };
    plan.store(folder)?;
    let made = build(images, options, input, &Pipeline { progress, read_back: options.read_back }).and_then(
        |made| {
            folder.sync().map_err(|cause| Error::io(ErrorKind::Sync, "import: sync the folder", cause))?;
            let disk = made.geometry.disk_sectors();
            DiskDescriptor::new_single(&options.file, options.mode, disk, options.cluster)
                .map_err(|error| error.with_kind(ErrorKind::Parameter))?
                .store_new(folder)?;
            Ok(made)
        },
    );
    let made = match made {
        Ok(made) => made,
        // The descriptor may be there after a power loss, or not: the image stays, and the plan with it.
        Err(error) if error.kind() == ErrorKind::OutcomeUnknown => return Err(error.at_path(&image)),
        Err(error) => return Err(plan::withdraw(folder, None, error).at_path(&image)),
    };
    plan::finish(folder)?;
    Ok(ImportReport {
        image,
        descriptor: options.folder.join(DESCRIPTOR_NAME),
        input_bytes: made.input_bytes,
        disk_bytes: made.geometry.disk_bytes(),
        cluster_bytes: options.cluster.0.saturating_mul(crate::units::SECTOR_BYTES),
        version: version_number(&made.geometry),
        mode: options.mode.name(),
        file_bytes: made.file_bytes,
        host_bytes: made.host_bytes,
    })
}

fn build(
    images: &dyn Folder,
    options: &ImportOptions,
    input: Input<'_>,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let storage = images
        .create_exclusive(&options.file)
        .map_err(|cause| Error::io(ErrorKind::Create, "import: create the image", cause))?;
    match input {
        Input::Storage(source, len) => from_storage(options, &storage, &*source, len, pipeline),
        Input::Stream(source) => stream::build(images, options, &storage, source, pipeline),
    }
}

/// A finished image, not yet named by a descriptor.
struct Made {
    geometry: Geometry,
    input_bytes: u64,
    file_bytes: u64,
    host_bytes: u64,
}

impl Made {
    fn new(storage: &dyn Storage, geometry: Geometry, input_bytes: u64) -> Result<Self> {
        let failed = |cause| Error::io(ErrorKind::Stat, "import: measure the image", cause);
        let file_bytes = storage.len().map_err(failed)?;
        let host_bytes = storage.allocated_bytes().map_err(failed)?;
        Ok(Self { geometry, input_bytes, file_bytes, host_bytes })
    }
}

/// The sizes of a disk for `input_bytes` of input.
fn geometry(options: &ImportOptions, input_bytes: u64) -> Result<Geometry> {
    let input = Sectors::covering(input_bytes);
    let disk = options.disk.unwrap_or(input);
    if input > disk {
        return Err(refused(format!("the input has {} sectors, more than the disk of {}", input.0, disk.0))
            .advise("give a larger size, or none"));
    }
    if disk.0 == 0 {
        return Err(refused("the input is empty").advise("give the size of the disk"));
    }
    let too_large = || refused(format!("{} sectors are too many", disk.0));
    let disk = match options.cluster.0 {
        cluster if options.round && cluster > 0 => {
            Sectors(disk.0.checked_next_multiple_of(cluster).ok_or_else(too_large)?)
        }
        _ => disk,
    };
    // The limits of an image hold for a raw disk as well: it may get snapshots.
    let version = if options.mode == Mode::Raw { Version::V2 } else { options.version };
    let geometry = Geometry::exact(version, options.cluster, disk)?;
    match options.mode {
        Mode::Raw => Geometry::raw(options.cluster, geometry.disk_bytes()),
        Mode::Expanded | Mode::Preallocated => Ok(geometry),
    }
}

fn from_storage(
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    source: &dyn Storage,
    input_bytes: u64,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let geometry = geometry(options, input_bytes)?;
    let content = StorageContent::new(source, input_bytes);
    let preallocated = options.mode == Mode::Preallocated;
    let name = Path::new(&options.file);
    let ((), layout) = fill_new(storage, name, &geometry, preallocated, |target, storage| {
        let unit = target.unit_bytes();
        let data = transfer::data_bytes(&content, unit, input_bytes)?;
        pipeline.progress.begin("import", pipeline.total_bytes(data));
        let threads = transfer::threads(storage, transfer::piece_bytes(unit));
        transfer::copy(&content, target, input_bytes, threads, pipeline)
    })?;
    pipeline.progress.end();
    verify_new(storage, name, &geometry, layout)?;
    Made::new(storage, geometry, input_bytes)
}

/// Whole of `bytes` read from a stream, less at its end.
fn read_full(source: &mut dyn Read, bytes: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match source.read(&mut bytes[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(Error::io(ErrorKind::Read, "import: read the input", cause)),
        }
    }
    Ok(done)
}

/// The extent of a piece of a stream.
fn extent_of(at: u64, len: usize) -> Result<Extent> {
    Extent::new(at, len as u64).ok_or_else(|| refused("the input is longer than any disk"))
}

#[cfg(test)]
mod tests;
