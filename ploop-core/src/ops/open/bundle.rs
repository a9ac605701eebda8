//! A bundle that is open: its folder, and what its descriptor says.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{DESCRIPTOR_NAME, Described, DiskDescriptor, Guid, Image};
use crate::io::Folder;
use crate::io::file::{self, DirectoryFolder, FileStorage};

use super::READ_TRIES;

/// An open bundle whose disk can be changed.
pub(in crate::ops) struct Bundle {
    pub(in crate::ops) folder: DirectoryFolder,
    pub(in crate::ops) descriptor: DiskDescriptor,
}

impl Bundle {
    pub(in crate::ops) fn open(path: &Path) -> Result<Self> {
        let folder = DirectoryFolder::open(path)?;
        let real = real_folder(path)?;
        let descriptor = DiskDescriptor::load(&folder, Some(&real))?;
        Ok(Self { folder, descriptor })
    }

    /// Makes durable what was read: who wrote the descriptor may have been killed between a rename and the sync of the
    /// folder, and what is done now, or answered to a flush, relies on it (S6).
    pub(super) fn settle(&self, path: &Path) -> Result<()> {
        self.folder
            .sync()
            .map_err(|cause| Error::io(ErrorKind::Sync, "open disk: sync its folder", cause).at_path(path))
    }

    /// Opens one of its images, following no link.
    pub(in crate::ops) fn open_image(
        &self,
        image: &Image,
        options: &file::OpenOptions,
    ) -> Result<FileStorage> {
        open_image(&self.folder, Path::new(""), image, options, &[]).map(|(storage, _)| storage)
    }
}

/// An open bundle that is only read: whole or split.
pub(in crate::ops) struct ReadBundle {
    pub(in crate::ops) folder: DirectoryFolder,
    pub(in crate::ops) described: Described,
}

impl ReadBundle {
    /// Opens the bundle `path`; `outside` as in [`Described::load`].
    pub(in crate::ops) fn open(path: &Path, outside: bool) -> Result<Self> {
        let folder = DirectoryFolder::open(path)?;
        let real = real_folder(path)?;
        let described = Described::load(&folder, Some(&real), outside)?;
        Ok(Self { folder, described })
    }
}

fn real_folder(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|error| file::explain(error, ErrorKind::Open, "find the folder of the disk", path))
}

/// Opens what the descriptor in the folder `path` names, for a reader, who holds no lock on it: a command may replace it
/// after it was read and before all images are locked. A file may hold another state by then, so it is read once more.
pub(in crate::ops) fn while_it_stands<T>(
    path: &Path,
    outside: bool,
    mut open: impl FnMut(&ReadBundle) -> Result<T>,
) -> Result<T> {
    for _ in 0..READ_TRIES {
        let bundle = ReadBundle::open(path, outside)?;
        let opened = open(&bundle);
        if ReadBundle::open(path, outside)?.described == bundle.described {
            return opened;
        }
    }
    Err(Error::new(ErrorKind::Busy, "open disk: its descriptor changes all the time")
        .at_path(path.join(DESCRIPTOR_NAME))
        .advise("wait for the end of the commands that change the disk, then try again"))
}

/// Opens an image of the bundle in `folder`, which is at `path`, following no link; its path, for messages. One that lies
/// outside of the bundle is taken from one of the folders `parents` or not at all.
pub(in crate::ops) fn open_image(
    folder: &DirectoryFolder,
    path: &Path,
    image: &Image,
    options: &file::OpenOptions,
    parents: &[PathBuf],
) -> Result<(FileStorage, PathBuf)> {
    if image.is_outside() {
        return open_outside(path, image, options, parents);
    }
    let storage = match image.place() {
        (None, name) => folder.open_file(name, options),
        (Some(inner), name) => folder.open_folder(inner)?.open_file(name, options),
    };
    Ok((storage?, path.join(image.file())))
}

/// Where in the allowed folders an image outside of the bundle may be, best first: where its path leads, if that is in
/// there, and the file of that name in the folder itself. Each as a folder and the components below it.
fn candidates(path: &Path, image: &Image, parents: &[PathBuf]) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let bundle = real_folder(path)?;
    let meant = lexical(&bundle.join(image.file()));
    let last = image.file().rsplit(['/', '\\']).next().unwrap_or_default();
    let mut found = Vec::new();
    for parent in parents {
        let real = real_folder(parent)?;
        for typed in [&real, parent] {
            if let Ok(below) = meant.strip_prefix(typed) {
                let components = below.components().map(|one| one.as_os_str().to_str().map(str::to_owned));
                found.extend(components.collect::<Option<Vec<_>>>().map(|below| (real.clone(), below)));
            }
        }
        found.push((real, vec![last.to_owned()]));
    }
    Ok(found)
}

/// The path without `.` and `..`, by its letters alone.
fn lexical(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

fn open_outside(
    path: &Path,
    image: &Image,
    options: &file::OpenOptions,
    parents: &[PathBuf],
) -> Result<(FileStorage, PathBuf)> {
    for (parent, below) in candidates(path, image, parents)? {
        let Some((name, folders)) = below.split_last() else { continue };
        let file = below.iter().fold(parent.clone(), |file, component| file.join(component));
        // Component by component: a link in there leads nowhere.
        let mut folder = DirectoryFolder::open(&parent)?;
        let inner = folders.iter().try_for_each(|inner| {
            folder = folder.open_folder(inner)?;
            Ok::<_, Error>(())
        });
        if inner.is_ok() && folder.exists(name).unwrap_or(false) {
            return Ok((folder.open_file(name, options)?, file));
        }
    }
    Err(Error::new(
        ErrorKind::Open,
        format!(
            "open disk: the image {:?} lies outside of the bundle, and in no folder that was allowed",
            image.file()
        ),
    )
    .at_path(path.join(DESCRIPTOR_NAME))
    .advise("give the folder that holds this file with --allow-parent DIR"))
}

/// The paths of the images that make up the state `guid` (the current one if none) of a bundle at `path`, base first, a
/// split disk part after part; for whoever wants to know what files a disk uses. Errors are those of
/// [`DiskDescriptor::chain_for`] and of files that are not where they may be.
pub fn image_paths(
    described: &Described,
    path: &Path,
    guid: Option<Guid>,
    parents: &[PathBuf],
) -> Result<Vec<PathBuf>> {
    let folder = DirectoryFolder::open(path)?;
    let mut found = Vec::new();
    let mut add = |descriptor: &DiskDescriptor| -> Result<()> {
        for image in descriptor.chain_for(guid.unwrap_or(descriptor.top_guid()))? {
            found.push(match image.is_outside() {
                false => path.join(image.file()),
                true => {
                    let reading = file::OpenOptions::new(crate::io::Access::ReadOnly);
                    open_image(&folder, path, image, &reading, parents)?.1
                }
            });
        }
        Ok(())
    };
    match described {
        Described::Whole(descriptor) => add(descriptor)?,
        Described::Split(split) => split.parts().iter().try_for_each(|part| add(&part.descriptor))?,
    }
    Ok(found)
}
