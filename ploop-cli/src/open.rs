//! From what was typed to an open chain: descriptor or image files, locked, validated.
//!
//! A lock is taken on every file before anything is read from it, and held as long as the chain is used. A server
//! that succeeds a dead one waits for those locks: the kernel releases them only when the last transfer of the dead
//! one has ended, so no write of it can come late and undo a newer one.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ploop_core::device::fuse::held::HeldFiles;
use ploop_core::device::runtime::{ImageFile, OpenRequest, State};
use ploop_core::error::shown;
pub(crate) use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::format::agreement::Accepted;
use ploop_core::format::{Chain, Described, DiskDescriptor, Encryption, Guid, Image};
use ploop_core::io::file::DirectoryFolder;
use ploop_core::io::identity::{self, FileIdentity};
use ploop_core::io::{Access, Folder};
use ploop_core::ops;
pub(crate) use ploop_core::ops::open::followed;
use ploop_core::ops::open::{OpenOptions, Opened, Which, image_paths};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};

use crate::output::Output;
use crate::qemu::DiskFormat;

mod order;

/// How often a lock that is still taken is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(2);
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
    /// Folders that images outside of the bundle may be taken from.
    pub(crate) parents: Vec<PathBuf>,
    /// Contradictions between descriptor and images that are taken as they are.
    pub(crate) accepted: Accepted,
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
        parents: wanted.parents.iter().map(|path| absolute(path)).collect::<Result<Vec<_>>>()?,
        accepted: wanted.accepted,
        ..OpenRequest::default()
    };
    let paths = wanted.disks.iter().map(|path| absolute(&followed(path)?)).collect::<Result<Vec<_>>>()?;
    let [single] = paths.as_slice() else {
        if paths.iter().any(|path| path.is_dir() || is_descriptor(path)) {
            return Err(Error::new(
                ErrorKind::Parameter,
                "a descriptor stands alone, images are listed base first",
            ));
        }
        order::check(&paths)?;
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
    let described = Described::load(&DirectoryFolder::open(folder)?, Some(folder), true)?;
    let image = ImageFile::at(image)?;
    let is_this = |one: &Image| {
        !one.is_outside()
            && ImageFile::at(&folder.join(one.file())).is_ok_and(|file| file.is_same_file(&image))
    };
    let images: Vec<&Image> = match &described {
        Described::Whole(descriptor) => descriptor.images().iter().collect(),
        Described::Split(split) => split.parts().iter().flat_map(|part| part.descriptor.images()).collect(),
    };
    match images.as_slice() {
        [only] if is_this(only) => Ok(Some(path)),
        images if images.iter().any(|one| is_this(one)) => {
            Err(Error::new(ErrorKind::Parameter, "the image is one of several of a disk")
                .at_path(&image.path)
                .advise(format!("give {}", shown(&path))))
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

/// Reads a descriptor of a disk that is only looked at, or is about to be opened as `request` says.
fn load_to_read(path: &Path, request: &OpenRequest) -> Result<Described> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let described =
        Described::load(&DirectoryFolder::open(parent)?, Some(parent), !request.parents.is_empty())?;
    match request.read_only {
        true => Ok(described),
        false => described.whole().map(Box::new).map(Described::Whole).map_err(|error| error.at_path(path)),
    }
}

/// Refuses what `what` would do to an encrypted disk: take ciphertext for a file system.
pub(crate) fn refuse_encrypted(request: &OpenRequest, what: &str) -> Result<()> {
    let Some(path) = &request.descriptor else { return Ok(()) };
    match load_to_read(path, request)?.first().encryption() {
        None => Ok(()),
        Some(encryption) => Err(Error::new(ErrorKind::Parameter, format!("{what}: the disk is {encryption}"))
            .at_path(path)
            .advise(match encryption {
                Encryption::Engine(_) => {
                    "only the program it belongs to can read it: decrypt it there, or copy its content out of there"
                }
                Encryption::Key(_) => {
                    "make the device without -m, open it with cryptsetup, and mount or change what appears then"
                }
            })),
    }
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
        Some(descriptor) => snapshot(request, load_to_read(descriptor, request)?.first()),
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
    let described = load_to_read(path, request)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let state = snapshot(request, described.first())?;
    let images = image_paths(&described, folder, state, &request.parents)?
        .iter()
        .map(|path| ImageFile::at(path))
        .collect::<Result<_>>()?;
    Ok((Some(ImageFile::at(path)?), images))
}

/// Who encrypted the disk of a request, and what is odd about it; nothing for images without descriptor.
pub(crate) fn oddities_of(request: &OpenRequest) -> Result<(Option<String>, Vec<String>)> {
    let Some(path) = &request.descriptor else { return Ok((None, Vec::new())) };
    let described = load_to_read(path, request)?;
    let descriptor = described.first();
    let folder = path.parent().unwrap_or(Path::new("/"));
    let encryption = descriptor.encryption().map(|encryption| encryption.to_string());
    Ok((encryption, ops::open::oddities(descriptor, folder)))
}

/// Warns of a name for an image of ours that ends like one of another format.
pub(crate) fn warn_of_name(image: &Path, output: &Output) {
    if let Some(named) = DiskFormat::of_name(image).filter(|&named| named != DiskFormat::Raw) {
        output.warn(&format!(
            "{} will be an image of ploop, though its name says {named}; `ploop export` writes that format",
            shown(image)
        ));
    }
}

/// Refuses to make a file among the devices: a name mistyped there would fill the memory of the host.
pub(crate) fn check_new_file(what: &str, path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(real) = std::fs::canonicalize(parent) else { return Ok(()) };
    let is_device_folder = real.starts_with("/dev") && !real.starts_with("/dev/shm");
    if !is_device_folder || path.symlink_metadata().is_ok() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Device,
        format!("{what}: there is no such device, and no file is made in /dev"),
    )
    .at_path(path)
    .advise("check the name of the device (lsblk), or give a file elsewhere"))
}

/// Fails if the names by which a served disk was opened lead to other files by now. For what a command does to the files
/// itself, by their names: the server needs none.
pub(crate) fn check_names(state: &State) -> Result<()> {
    let found = files(&state.open)?.1;
    let is_same = found.len() == state.images.len()
        && found.iter().zip(&state.images).all(|(found, served)| found.is_same_file(served));
    if is_same {
        return Ok(());
    }
    let path = state.open.descriptor.clone().or_else(|| state.images.last().map(|image| image.path.clone()));
    Err(Error::new(
        ErrorKind::Busy,
        "the names of the disk's files belong to other files than those it runs on",
    )
    .at_path(path.unwrap_or_default())
    .advise("put the files back under their names, or unmount the disk, then run the same command again"))
}

/// How to open the chain of a request; only its top for writing.
pub(crate) fn options_of(request: &OpenRequest) -> Result<OpenOptions> {
    let which = match &request.descriptor {
        Some(descriptor) => Which::Path(descriptor.clone()),
        None => Which::Files(request.images.clone()),
    };
    Ok(OpenOptions {
        which,
        snapshot: snapshot_of(request)?,
        raw_cluster: raw_cluster_of(request),
        accepted: request.accepted,
        block_device: request.descriptor.is_none(),
        parents: request.parents.clone(),
        ..OpenOptions::new("", access_of(request))
    })
}

/// Opens the chain for a look, after which nothing is done: without locks, in nobody's way.
pub(crate) fn glance(request: &OpenRequest) -> Result<Opened> {
    let request = OpenRequest { read_only: true, ..request.clone() };
    ops::open::open(&OpenOptions { unlocked: true, ..options_of(&request)? })
}

/// Opens the chain; only its top for writing, all of it locked.
pub(crate) fn open(request: &OpenRequest) -> Result<Opened> {
    ops::open::open(&options_of(request)?)
}

fn access_of(request: &OpenRequest) -> Access {
    if request.read_only { Access::ReadOnly } else { Access::ReadWrite }
}

/// Opens the very files that a dead server had open. An in-use mark is its own: no check, no repair. A lock that is taken
/// is waited for.
pub(crate) fn open_held(
    held: &HeldFiles,
    folder: Option<&DirectoryFolder>,
    lock_wait: Duration,
) -> Result<Opened> {
    let request = &held.terms.open;
    let options = OpenOptions {
        raw_cluster: held.terms.raw_cluster_sectors.map(Sectors),
        accept_in_use: true,
        // A guest may have written anything since the disk was opened first.
        accepted: Accepted::ALL,
        block_device: request.descriptor.is_none(),
        ..OpenOptions::new("", access_of(request))
    };
    let images: Vec<_> =
        held.images.iter().map(|image| (image.current_path(), image.descriptor.as_fd())).collect();
    let deadline = Instant::now() + lock_wait;
    loop {
        match ops::open::open_held(&images, folder, &options) {
            Err(error) if error.kind() == ErrorKind::InUse && Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            other => return other,
        }
    }
}

/// The descriptor in the folder of a served disk, as a file.
pub(crate) fn descriptor_in(folder: Option<&DirectoryFolder>) -> Option<ImageFile> {
    let folder = folder?;
    let FileIdentity { device, inode } = folder.identity_of(DESCRIPTOR_NAME).ok()?;
    let path = folder.real_path().unwrap_or_else(|| folder.path().to_path_buf());
    Some(ImageFile { path: path.join(DESCRIPTOR_NAME), device, inode })
}

/// Which files a chain has open, base first.
pub(crate) fn identities_of(chain: &Chain) -> Result<Vec<FileIdentity>> {
    let identity = |file: ImageFile| FileIdentity { device: file.device, inode: file.inode };
    Ok(files_of(chain)?.into_iter().map(identity).collect())
}

/// The files of an open chain, base first.
pub(crate) fn files_of(chain: &Chain) -> Result<Vec<ImageFile>> {
    let file = |delta: usize| {
        let open = chain.storage(delta).descriptor();
        // Where it is now, if it has been moved.
        let path = open.and_then(identity::current_path).unwrap_or_else(|| chain.name(delta).to_path_buf());
        let identity = open.map(FileIdentity::of);
        match identity {
            Some(Ok(FileIdentity { device, inode })) => Ok(ImageFile { path, device, inode }),
            Some(Err(cause)) => Err(Error::io(ErrorKind::Stat, "examine the image", cause).at_path(path)),
            None => ImageFile::at(&path),
        }
    };
    (0..chain.depth()).map(file).collect()
}
