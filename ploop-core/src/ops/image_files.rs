//! The images of a closed disk, as its operations open, lock and remove them.
//!
//! An operation works on a `&dyn Folder`. For a real disk that is a [`LockedFolder`]: an image is locked when it is
//! opened, for as long as it is open, and is read and written past the page cache where its layout allows. So an
//! operation that has opened its images knows that nobody else has them. It opens each image once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Chain, ChainOptions, DESCRIPTOR_NAME, DiskDescriptor, Guid, Image, Probe, Source, probe,
};
use crate::io::file::{self, DirectoryFolder, FileStorage};
use crate::io::latch::Latched;
use crate::io::lock::{ImageLock, Ownership};
use crate::io::{Access, Folder, Storage, sys};
use crate::mutant::{self, Mutant};
use crate::ops::open::LockedStorage;

/// The folder of a disk, whose images are locked while they are open.
pub(crate) struct LockedFolder {
    folder: DirectoryFolder,
    path: PathBuf,
}

impl LockedFolder {
    /// Opens the folder `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Ok(Self { folder: DirectoryFolder::open(path)?, path: path.to_path_buf() })
    }

    /// The same of a folder that is open.
    pub(crate) fn of(folder: DirectoryFolder) -> Self {
        let path = folder.path().to_path_buf();
        Self { folder, path }
    }

    fn open_locked(&self, name: &str, access: Access) -> Result<Arc<dyn Storage>> {
        let path = self.path.join(name);
        let explain = |error| file::explain(error, ErrorKind::Open, "open", &path);
        let options = file::OpenOptions::new(access);
        let storage = self.folder.open_file(name, &options)?;
        let ownership = match access {
            Access::ReadWrite => Ownership::Writer,
            Access::ReadOnly => Ownership::Reader,
        };
        let lock = ImageLock::take(&storage, &path, ownership)?;
        let direct = storage.again(&options.direct()).map_err(explain)?;
        let storage = if direct.is_direct() && fits(&direct)? {
            direct
        } else {
            drop(direct);
            storage.again(&options).map_err(explain)?
        };
        Ok(Arc::new(Latched::new(LockedStorage::new(storage, &path, lock))))
    }
}

/// Whether all places of a file are whole units of its unbuffered transfers.
fn fits(storage: &FileStorage) -> Result<bool> {
    let unit = u64::from(storage.alignment().offset);
    let len = storage.len().map_err(|error| Error::io(ErrorKind::Stat, "measure the image", error))?;
    // Only for the alignment: what the file is, the descriptor says.
    let places = match probe(storage) {
        Ok(Probe::Image(header)) => [header.geometry().cluster_bytes(), header.geometry().phase_bytes(), len],
        Ok(Probe::NotAnImage) | Err(_) => [len, 0, 0],
    };
    Ok(places.iter().all(|place| place.is_multiple_of(unit)))
}

/// An error of a lock as one of I/O, keeping what it says.
fn as_io(error: Error) -> io::Error {
    let kind =
        if error.kind() == ErrorKind::InUse { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    let kind = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .map_or(kind, io::Error::kind);
    io::Error::new(kind, error)
}

impl Folder for LockedFolder {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        if name.starts_with(DESCRIPTOR_NAME) {
            return self.folder.open(name, access);
        }
        self.open_locked(name, access).map_err(as_io)
    }
    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.folder.create_exclusive(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.folder.rename(from, to)
    }
    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
        self.folder.rename_exclusive(from, to)
    }
    fn unlink(&self, name: &str) -> io::Result<()> {
        self.folder.unlink(name)
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        self.folder.exists(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.folder.list()
    }
    fn sync(&self) -> io::Result<()> {
        self.folder.sync()
    }
    fn real_path(&self) -> Option<PathBuf> {
        self.folder.real_path()
    }
    fn open_folder(&self, name: &str) -> io::Result<Box<dyn Folder>> {
        let folder = self.folder.open_folder(name).map_err(as_io)?;
        Ok(Box::new(Self { folder, path: self.path.join(name) }))
    }
}

impl AsFd for LockedFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// `NAME` or `FOLDER/NAME` of a descriptor, as the folder it lies in and its name there.
fn with_folder<T>(
    folder: &dyn Folder,
    file: &str,
    run: impl FnOnce(&dyn Folder, &str) -> io::Result<T>,
) -> io::Result<T> {
    match file.split_once('/') {
        None => run(folder, file),
        Some((inner, name)) => run(&*folder.open_folder(inner)?, name),
    }
}

/// Opens an image.
pub(crate) fn open_image(folder: &dyn Folder, file: &str, access: Access) -> Result<Arc<dyn Storage>> {
    with_folder(folder, file, |folder, name| folder.open(name, access)).map_err(|cause| {
        // Ours, with its own kind and advice.
        match cause.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(error) => error.clone(),
            None => Error::io(ErrorKind::Open, "open image", cause).at_path(file),
        }
    })
}

/// Whether clones share an open image: it has more than one name.
pub(crate) fn is_shared(storage: &dyn Storage) -> bool {
    storage.descriptor().is_some_and(|file| sys::link_count(file).is_ok_and(|count| count > 1))
}

/// Makes an empty file for an image. The blocks and its name are not durable yet.
pub(crate) fn create_file(folder: &dyn Folder, file: &str) -> Result<Arc<dyn Storage>> {
    with_folder(folder, file, |folder, name| folder.create_exclusive(name))
        .map_err(|cause| Error::io(ErrorKind::Create, "create image", cause).at_path(file))
}

/// Whether there is a file of that name.
pub(crate) fn exists(folder: &dyn Folder, file: &str) -> Result<bool> {
    with_folder(folder, file, |folder, name| folder.exists(name))
        .map_err(|cause| Error::io(ErrorKind::Stat, "look for a file of that name", cause).at_path(file))
}

/// Refuses a name that is taken.
pub(crate) fn check_free(folder: &dyn Folder, file: &str) -> Result<()> {
    if exists(folder, file)? {
        return Err(Error::new(ErrorKind::Parameter, "the file exists")
            .at_path(file)
            .advise("choose another name; nothing was changed"));
    }
    Ok(())
}

/// Where a mutant removes the files that `next` will call obsolete before it is stored.
pub(crate) fn remove_early(folder: &dyn Folder, next: &DiskDescriptor) {
    if mutant::is_active(Mutant::RemovedBeforeCommit) {
        for file in next.obsolete() {
            drop(folder.unlink(file));
        }
    }
}

/// Removes the files that the descriptor says are obsolete, durably, and makes it forget them.
pub(crate) fn remove_obsolete(folder: &dyn Folder, descriptor: &mut DiskDescriptor) -> Result<()> {
    if !descriptor.has_obsolete() {
        return Ok(());
    }
    let mut removed = false;
    for file in descriptor.obsolete() {
        let unlinked = with_folder(folder, file, |folder, name| {
            folder.unlink(name)?;
            // A folder of the bundle is synced here, the bundle itself once below.
            if file.contains('/') { folder.sync() } else { Ok(()) }
        });
        match unlinked {
            Ok(()) => removed = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Error::io(ErrorKind::Unlink, "remove a file that is no longer needed", error)
                    .at_path(file)
                    .advise("the disk is whole without it; any later snapshot command tries again"));
            }
        }
    }
    if removed {
        folder.sync().map_err(|error| Error::io(ErrorKind::Sync, "sync the folder of the disk", error))?;
    }
    let mut next = descriptor.clone();
    next.forget_obsolete();
    next.store(folder)?;
    *descriptor = next;
    Ok(())
}

/// Whether the image of a state is raw: the base of a raw disk.
pub(crate) fn is_raw(descriptor: &DiskDescriptor, guid: Guid) -> bool {
    crate::format::agreement::says_raw(descriptor, guid)
}

/// The source of a chain for an open image.
pub(crate) fn source(descriptor: &DiskDescriptor, image: &Image, storage: Arc<dyn Storage>) -> Source {
    Source { name: image.file().into(), storage, raw: is_raw(descriptor, image.guid()) }
}

/// Opens sources as a chain; a raw base in clusters as the descriptor says.
pub(crate) fn open_chain(
    descriptor: &DiskDescriptor,
    sources: Vec<Source>,
    access: Access,
) -> Result<Arc<Chain>> {
    let raw = sources.first().is_some_and(|source| source.raw);
    let raw_cluster = raw.then(|| descriptor.cluster_sectors());
    Chain::open(sources, &ChainOptions { access, raw_cluster, accept_in_use: false })
}
