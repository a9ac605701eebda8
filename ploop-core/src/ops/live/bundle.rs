//! The files of a running disk.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::file::{self, Caching, DirectoryFolder};
use crate::io::identity::FileIdentity;
use crate::io::{Access, Folder, Storage};
use crate::ops::image_files::LockedFolder;
use crate::ops::open::LockedStorage;

/// Where the images and the descriptor of a running disk lie.
pub trait Bundle: Send + Sync {
    /// The folder of the descriptor.
    fn folder(&self) -> &dyn Folder;
    /// Its path, for messages.
    fn path(&self) -> &Path;
    /// Opens an image as the server needs it: locked for what `access` says, past the page cache where that is done.
    fn open_image(&self, file: &str, access: Access, raw: bool) -> Result<Arc<dyn Storage>>;
    /// The same folder for images that the running disk does not use: each is locked while it is open.
    fn unused_images(&self) -> &dyn Folder;
    /// Which file has this name now; `None` where files have no identity.
    fn identity_of(&self, file: &str) -> Result<Option<FileIdentity>> {
        let _unused = file;
        Ok(None)
    }
    /// Removes an image file, if it is there.
    fn remove_image(&self, file: &str) -> Result<()>;
    /// An image that is about to be removed, for giving its space back afterwards; `None`: that is left to the host. It is not
    /// locked yet: a [claim](Storage::claim) of it fails as long as somebody else has the file.
    fn keep_image(&self, file: &str) -> Option<Arc<dyn Storage>> {
        let _unused = file;
        None
    }
}

/// A bundle in a folder of the host.
pub struct RunningBundle {
    folder: DirectoryFolder,
    unused_images: LockedFolder,
    path: PathBuf,
    caching: Caching,
}

impl RunningBundle {
    /// The bundle in the folder at `path`.
    pub fn open(path: &Path, caching: Caching) -> Result<Self> {
        Self::of(&DirectoryFolder::open(path)?, caching)
    }

    /// The bundle in a folder that is open, wherever it is by now.
    pub fn of(folder: &DirectoryFolder, caching: Caching) -> Result<Self> {
        let path = folder.real_path().unwrap_or_else(|| folder.path().to_path_buf());
        let again = || DirectoryFolder::held(folder.as_fd(), &path);
        Ok(Self { folder: again()?, unused_images: LockedFolder::of(again()?), path: path.clone(), caching })
    }
}

impl Bundle for RunningBundle {
    fn folder(&self) -> &dyn Folder {
        &self.folder
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn open_image(&self, file: &str, access: Access, raw: bool) -> Result<Arc<dyn Storage>> {
        crate::ops::open::open_locked(&self.folder, &self.path, file, (access, raw, self.caching))
    }

    fn unused_images(&self) -> &dyn Folder {
        &self.unused_images
    }

    fn identity_of(&self, file: &str) -> Result<Option<FileIdentity>> {
        self.folder.identity_of(file).map(Some)
    }

    fn keep_image(&self, file: &str) -> Option<Arc<dyn Storage>> {
        let options = file::OpenOptions::new(Access::ReadWrite);
        let opened = match file.split_once('/') {
            Some((inner, name)) => self.folder.open_folder(inner).ok()?.open_file(name, &options),
            None => self.folder.open_file(file, &options),
        };
        Some(Arc::new(LockedStorage::unlocked(opened.ok()?, &self.path.join(file))))
    }

    fn remove_image(&self, file: &str) -> Result<()> {
        let removed = match file.split_once('/') {
            Some((inner, name)) => self.folder.open_folder(inner)?.unlink(name),
            None => self.folder.unlink(file),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(ErrorKind::Unlink, "remove an image", error).at_path(self.path.join(file)))
            }
            _ => Ok(()),
        }
    }
}
