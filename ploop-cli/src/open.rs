//! From what was typed to an open chain: descriptor or image files, locked, validated.
//!
//! A lock is taken on every file before anything is read from it, and held as long as the chain is used. A server
//! that succeeds a dead one waits for those locks: the kernel releases them only when the last transfer of the dead
//! one has ended, so no write of it can come late and undo a newer one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ploop_core::device::fuse::survivor::FileIdentity;
use ploop_core::device::runtime::{ImageFile, OpenRequest};
pub(crate) use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::format::agreement::Accepted;
use ploop_core::format::{Chain, DiskDescriptor, Guid};
use ploop_core::io::Access;
use ploop_core::io::file::DirectoryFolder;
use ploop_core::ops;
use ploop_core::ops::open::{OpenOptions, Opened, Which};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};

/// How often a lock that is still taken is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// The cluster size of a raw base unless said otherwise: 1 MiB.
const CLUSTER_SECTORS_DEFAULT: u64 = 2048;

/// What was typed about how to open a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// A descriptor (or its folder), or image files, base first.
    pub(crate) disks: Vec<PathBuf>,
    /// Open nothing for writing.
    pub(crate) read_only: bool,
    /// The base is raw.
    pub(crate) raw_base: bool,
    /// Cluster size of a raw base, in sectors.
    pub(crate) cluster_sectors: Option<u64>,
    /// The snapshot to open instead of the top.
    pub(crate) snapshot: Option<String>,
    /// Contradictions between descriptor and images that are taken as they are.
    pub(crate) accepted: Accepted,
}

/// How to go about a chain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manner {
    /// How long a lock that somebody else holds is waited for.
    pub(crate) lock_wait: Duration,
    /// Take an in-use mark as that of a dead server whose pending entries are known: no check, no repair.
    pub(crate) is_successor: bool,
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|cause| not_found(path, cause))
}

/// What a name stands for, or that it stands for nothing.
pub(crate) fn look_at(path: &Path) -> Result<std::fs::Metadata> {
    std::fs::metadata(path).map_err(|cause| not_found(path, cause))
}

fn not_found(path: &Path, cause: std::io::Error) -> Error {
    Error::io(ErrorKind::Open, "find the disk", cause).at_path(path).advise(
        "give its DiskDescriptor.xml, the folder that has it, an image, or of a mounted disk the device or mount point",
    )
}

/// Whether the path names a descriptor: by its name, as everywhere.
fn is_descriptor(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("xml"))
}

/// Turns what was typed into paths that hold in any working folder.
///
/// One image that a descriptor beside it knows is opened through that descriptor. If it is only a part of the disk,
/// that is refused: without the images below it, or behind the back of those above, it would be damaged.
pub(crate) fn resolve(wanted: &Wanted) -> Result<OpenRequest> {
    let mut request = OpenRequest {
        snapshot: wanted.snapshot.clone(),
        raw_base: wanted.raw_base,
        cluster_sectors: wanted.cluster_sectors,
        read_only: wanted.read_only,
        accepted: wanted.accepted,
        ..OpenRequest::default()
    };
    let paths = wanted.disks.iter().map(|path| absolute(path)).collect::<Result<Vec<_>>>()?;
    let [single] = paths.as_slice() else {
        if paths.iter().any(|path| path.is_dir() || is_descriptor(path)) {
            return Err(Error::new(
                ErrorKind::Parameter,
                "a descriptor stands alone, images are listed base first",
            ));
        }
        request.images = paths;
        return without_snapshot(request);
    };
    if single.is_dir() {
        request.descriptor = Some(absolute(&single.join(DESCRIPTOR_NAME))?);
        return Ok(request);
    }
    if is_descriptor(single) {
        request.descriptor = Some(single.clone());
        return Ok(request);
    }
    if let Some(descriptor) = descriptor_of(single)? {
        request.descriptor = Some(descriptor);
        return Ok(request);
    }
    request.images = paths;
    without_snapshot(request)
}

fn without_snapshot(request: OpenRequest) -> Result<OpenRequest> {
    match &request.snapshot {
        None => Ok(request),
        Some(_) => Err(Error::new(ErrorKind::Parameter, "only a disk with a descriptor has snapshots")
            .advise(format!("give its {DESCRIPTOR_NAME}"))),
    }
}

/// The descriptor that lies beside `image` and says that this image is the whole disk.
fn descriptor_of(image: &Path) -> Result<Option<PathBuf>> {
    let Some(folder) = image.parent() else { return Ok(None) };
    let path = folder.join(DESCRIPTOR_NAME);
    if !path.is_file() {
        return Ok(None);
    }
    let (_, descriptor) = load(&path)?;
    let image = ImageFile::at(image)?;
    let is_this = |file: &str| ImageFile::at(&folder.join(file)).is_ok_and(|file| file.is_same_file(&image));
    match descriptor.images() {
        [only] if is_this(only.file()) => Ok(Some(path)),
        images if images.iter().any(|one| is_this(one.file())) => {
            Err(Error::new(ErrorKind::Parameter, "the image is one of several of a disk")
                .at_path(&image.path)
                .advise(format!("give {}", path.display())))
        }
        _ => Ok(None),
    }
}

/// Reads a descriptor and opens the folder it lies in.
pub(crate) fn load(path: &Path) -> Result<(DirectoryFolder, DiskDescriptor)> {
    let folder = DirectoryFolder::open(path.parent().unwrap_or(Path::new("/")))?;
    let descriptor = DiskDescriptor::load(&folder, path.parent())?;
    Ok((folder, descriptor))
}

/// The snapshot meant by what was typed; `None` for the current state.
fn snapshot(request: &OpenRequest, descriptor: &DiskDescriptor) -> Result<Option<Guid>> {
    match request.snapshot.as_deref() {
        None => Ok(None),
        // The original's word for the lowest image.
        Some("base") => Ok(descriptor.chain_for(descriptor.top_guid())?.first().map(|base| base.guid())),
        Some(text) => text.parse().map(Some),
    }
}

/// The snapshot that opening `request` would open; `None` for the current state.
pub(crate) fn snapshot_of(request: &OpenRequest) -> Result<Option<Guid>> {
    match &request.descriptor {
        Some(descriptor) => snapshot(request, &load(descriptor)?.1),
        None => Ok(None),
    }
}

/// The clusters of a raw base that no descriptor tells of; `None` if the base is an image.
pub(crate) fn raw_cluster_of(request: &OpenRequest) -> Option<Sectors> {
    request.raw_base.then(|| Sectors(request.cluster_sectors.unwrap_or(CLUSTER_SECTORS_DEFAULT)))
}

/// The descriptor and the image files that opening `request` would open, base first.
pub(crate) fn files(request: &OpenRequest) -> Result<(Option<ImageFile>, Vec<ImageFile>)> {
    let Some(path) = &request.descriptor else {
        let images = request.images.iter().map(|path| ImageFile::at(path)).collect::<Result<_>>()?;
        return Ok((None, images));
    };
    let (_, descriptor) = load(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let state = snapshot(request, &descriptor)?.unwrap_or(descriptor.top_guid());
    let images = descriptor
        .chain_for(state)?
        .into_iter()
        .map(|image| ImageFile::at(&folder.join(image.file())))
        .collect::<Result<_>>()?;
    Ok((Some(ImageFile::at(path)?), images))
}

/// Opens the chain; only its top for writing, all of it locked.
pub(crate) fn open(request: &OpenRequest, manner: Manner) -> Result<Opened> {
    let which = match &request.descriptor {
        Some(descriptor) => Which::Path(descriptor.clone()),
        None => Which::Files(request.images.clone()),
    };
    let snapshot = snapshot_of(request)?;
    let access = if request.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let options = OpenOptions {
        which,
        snapshot,
        raw_cluster: raw_cluster_of(request),
        accept_in_use: manner.is_successor,
        // A guest may have written anything since the disk was opened first.
        accepted: if manner.is_successor { Accepted::ALL } else { request.accepted },
        block_device: request.descriptor.is_none(),
        ..OpenOptions::new("", access)
    };
    let deadline = Instant::now() + manner.lock_wait;
    loop {
        match ops::open::open(&options) {
            Err(error) if error.kind() == ErrorKind::InUse && Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            other => return other,
        }
    }
}

/// The files of an open chain, base first.
pub(crate) fn files_of(chain: &Chain) -> Result<Vec<ImageFile>> {
    let file = |delta: usize| {
        let path = chain.name(delta).to_path_buf();
        let identity = chain.storage(delta).descriptor().map(FileIdentity::of);
        match identity {
            Some(Ok(FileIdentity { device, inode })) => Ok(ImageFile { path, device, inode }),
            Some(Err(cause)) => Err(Error::io(ErrorKind::Stat, "examine the image", cause).at_path(path)),
            None => ImageFile::at(&path),
        }
    };
    (0..chain.depth()).map(file).collect()
}
