//! A new disk: one image and its descriptor.
//!
//! The image is built under a temporary name, synced, and only then given its name, which must be free; the
//! descriptor comes last and is the moment the disk exists (crash model, section 5). Until then a crash leaves at
//! most a file that no descriptor names, and an error leaves nothing.
//!
//! The same command again finishes what a crash cut: an image under the final name that is byte for byte the empty
//! one this command makes is taken as it is. It is never replaced or removed, since it may be somebody else's.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{CLUSTER_SECTORS_DEFAULT, Geometry, Version};
use crate::format::{self, DESCRIPTOR_NAME, DiskDescriptor, Guid, Mode, Probe, create_image};
use crate::io::file::DirectoryFolder;
use crate::io::{Access, Allocation, Folder, Storage, StorageExt, temporary};
use crate::mutant::{self, Mutant};
use crate::ops::plan;
use crate::units::Sectors;

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The folder of the new disk. It exists, and has no descriptor yet.
    pub folder: PathBuf,
    /// Name of the image in it; must be free.
    pub file: String,
    /// Size of the disk, rounded up to whole clusters unless it is exact.
    pub disk: Sectors,
    /// The disk may end inside its last cluster.
    pub exact: bool,
    /// Version of the image format; says nothing for a raw disk.
    pub version: Version,
    /// Size of a cluster: a power of two from 64 to 131072 sectors.
    pub cluster: Sectors,
    /// How the disk lies in the image.
    pub mode: Mode,
    /// Reserve the host's space for all of a raw disk; else it is one hole. Without effect on other modes.
    pub reserve_raw: bool,
}

impl CreateOptions {
    /// An expanded image of version 2 with clusters of 1 MiB.
    pub fn new(folder: impl Into<PathBuf>, file: impl Into<String>, disk: Sectors) -> Self {
        Self {
            folder: folder.into(),
            file: file.into(),
            disk,
            exact: false,
            version: Version::V2,
            cluster: Sectors(u64::from(CLUSTER_SECTORS_DEFAULT)),
            mode: Mode::Expanded,
            reserve_raw: false,
        }
    }
}

/// What was created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CreateReport {
    /// The image file.
    pub image: PathBuf,
    /// The descriptor.
    pub descriptor: PathBuf,
    /// Size of the disk in bytes, after rounding.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Version of the image format: 1 or 2; none for a raw disk.
    pub version: Option<u8>,
    /// `raw`, `expanded` or `preallocated`.
    pub mode: &'static str,
    /// Length of the image file in bytes.
    pub file_bytes: u64,
}

/// Creates a disk. Fails with [`ErrorKind::Parameter`] for sizes beyond a limit and for names that are taken.
pub fn create(options: &CreateOptions) -> Result<CreateReport> {
    create_in(&DirectoryFolder::open(&options.folder)?, options)
}

/// As [`create`], in an open folder; `options.folder` is only for messages.
pub fn create_in(folder: &dyn Folder, options: &CreateOptions) -> Result<CreateReport> {
    let geometry = geometry(options)?;
    let descriptor =
        DiskDescriptor::new_single(&options.file, options.mode, geometry.disk_sectors(), options.cluster)
            .map_err(|error| error.with_kind(ErrorKind::Parameter))?;
    if options.file.contains('/') {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("create disk: {:?} is not the name of a file", options.file),
        ));
    }
    let exists = |name: &str| {
        folder.exists(name).map_err(|error| {
            Error::io(ErrorKind::Stat, "create disk: look for a file of that name", error)
                .at_path(options.folder.join(name))
        })
    };
    if exists(DESCRIPTOR_NAME)? {
        return Err(is_taken(&options.folder.join(DESCRIPTOR_NAME)));
    }
    let image = options.folder.join(&options.file);
    if plan::is_unfinished(folder, &options.file)? {
        return Err(Error::new(
            ErrorKind::Parameter,
            "create disk: an import into this file is under way, or was cut",
        )
        .at_path(image)
        .advise("run that import again, or choose another name; nothing was changed"));
    }
    let found = exists(&options.file)?;
    let file_bytes =
        if found { adopt_image(folder, options, &geometry) } else { place_image(folder, options, &geometry) };
    let file_bytes = file_bytes.map_err(|error| error.at_path(&image))?;
    if let Err(error) = descriptor.store_new(folder) {
        let error = error.at_path(options.folder.join(DESCRIPTOR_NAME));
        return Err(match error.kind() {
            ErrorKind::OutcomeUnknown => withdraw(folder, options, found, error),
            // Somebody else's descriptor may name the image by now.
            _ if found || exists(DESCRIPTOR_NAME)? => error,
            _ => remove(folder, &options.file, error),
        });
    }
    Ok(CreateReport {
        image,
        descriptor: options.folder.join(DESCRIPTOR_NAME),
        disk_bytes: geometry.disk_bytes(),
        cluster_bytes: geometry.cluster_bytes(),
        version: version_number(&geometry),
        mode: options.mode.name(),
        file_bytes,
    })
}

/// 1 or 2; none for a raw image.
pub(super) fn version_number(geometry: &Geometry) -> Option<u8> {
    match (geometry.is_raw(), geometry.version()) {
        (true, _) => None,
        (false, Version::V1) => Some(1),
        (false, Version::V2) => Some(2),
    }
}

fn geometry(options: &CreateOptions) -> Result<Geometry> {
    let too_large =
        || Error::new(ErrorKind::Parameter, format!("create disk: {} are too many", options.disk));
    let disk = match options.cluster.0 {
        0 => options.disk,
        cluster if !options.exact => {
            Sectors(options.disk.0.checked_next_multiple_of(cluster).ok_or_else(too_large)?)
        }
        _ => options.disk,
    };
    // The limits of an image hold for a raw disk as well: it may get snapshots.
    let version = if options.mode == Mode::Raw { Version::V2 } else { options.version };
    let geometry = Geometry::exact(version, options.cluster, disk)?;
    match options.mode {
        Mode::Raw => Geometry::raw(options.cluster, geometry.disk_bytes()),
        Mode::Expanded | Mode::Preallocated => Ok(geometry),
    }
}

fn is_taken(path: &Path) -> Error {
    Error::new(ErrorKind::Parameter, "create disk: the file exists")
        .at_path(path)
        .advise("choose another name or folder; nothing was changed")
}

/// Takes the image that a cut run left under the final name, if it is the very one that would be made; else the name
/// is taken.
fn adopt_image(folder: &dyn Folder, options: &CreateOptions, geometry: &Geometry) -> Result<u64> {
    let taken = || is_taken(&options.folder.join(&options.file));
    let existing = folder
        .open(&options.file, Access::ReadOnly)
        .map_err(|error| Error::io(ErrorKind::Open, "create disk: look at the file of that name", error))?;
    let len = existing
        .len()
        .map_err(|error| Error::io(ErrorKind::Stat, "create disk: measure the file of that name", error))?;
    // Before the comparison, which costs a whole new image.
    let is_alike = match options.mode {
        Mode::Raw => len == geometry.disk_bytes(),
        Mode::Expanded | Mode::Preallocated => {
            matches!(format::probe(&*existing), Ok(Probe::Image(header)) if header.geometry() == geometry)
        }
    };
    if !is_alike {
        return Err(taken());
    }
    let temporary = temporary_name(options);
    let fresh = folder
        .create_exclusive(&temporary)
        .map_err(|error| Error::io(ErrorKind::Create, "create disk: create a file", error))?;
    let same = build(&*fresh, options, geometry).and_then(|file_bytes| {
        let same = is_same(&*existing, &*fresh, file_bytes)
            .map_err(|error| Error::io(ErrorKind::Read, "create disk: read the file of that name", error))?;
        Ok(same.then_some(file_bytes))
    });
    drop(fresh);
    let same = same.map_err(|error| remove(folder, &temporary, error))?;
    folder
        .unlink(&temporary)
        .map_err(|error| Error::io(ErrorKind::Unlink, "create disk: remove a temporary file", error))?;
    let file_bytes = same.ok_or_else(taken)?;
    let failed = |error| Error::io(ErrorKind::Sync, "create disk: sync", error);
    existing.sync_data().map_err(failed)?;
    folder.sync().map_err(failed)?;
    Ok(file_bytes)
}

/// Whether both files are `len` bytes long and the same. What both say is no data is not read.
fn is_same(one: &dyn Storage, other: &dyn Storage, len: u64) -> io::Result<bool> {
    const PIECE_BYTES: u64 = 1 << 20;
    if one.len()? != len || other.len()? != len {
        return Ok(false);
    }
    let mut at = 0;
    while at < len {
        let next =
            |storage: &dyn Storage| Ok::<_, io::Error>(storage.next_data(at)?.map_or(len, |run| run.0));
        at = next(one)?.min(next(other)?);
        let piece = usize::try_from(PIECE_BYTES.min(len - at)).unwrap_or(0);
        let mut bytes = [vec![0; piece], vec![0; piece]];
        one.read_exact_at(at, &mut bytes[0])?;
        other.read_exact_at(at, &mut bytes[1])?;
        if bytes[0] != bytes[1] {
            return Ok(false);
        }
        at += piece as u64;
    }
    Ok(true)
}

fn temporary_name(options: &CreateOptions) -> String {
    let random = Guid::random().to_string();
    temporary::new_name(&options.file, &random)
}

/// Builds the image under a temporary name and gives it its own; says how long it is.
fn place_image(folder: &dyn Folder, options: &CreateOptions, geometry: &Geometry) -> Result<u64> {
    let temporary = temporary_name(options);
    let storage = folder
        .create_exclusive(&temporary)
        .map_err(|error| Error::io(ErrorKind::Create, "create disk: create a file", error))?;
    let built = build(&*storage, options, geometry).and_then(|file_bytes| {
        folder.rename_exclusive(&temporary, &options.file).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => is_taken(&options.folder.join(&options.file)),
            _ => Error::io(ErrorKind::Rename, "create disk: give the image its name", error),
        })?;
        Ok(file_bytes)
    });
    let file_bytes = built.map_err(|error| remove(folder, &temporary, error))?;
    if mutant::is_active(Mutant::RenameWithoutFolderSync) {
        return Ok(file_bytes);
    }
    folder.sync().map_err(|error| {
        let error = Error::io(ErrorKind::Sync, "create disk: sync the folder", error);
        remove(folder, &options.file, error)
    })?;
    Ok(file_bytes)
}

fn build(storage: &dyn Storage, options: &CreateOptions, geometry: &Geometry) -> Result<u64> {
    match options.mode {
        Mode::Raw => {
            storage
                .set_len(geometry.disk_bytes())
                .map_err(|error| Error::io(ErrorKind::Truncate, "create disk: extend the image", error))?;
            if options.reserve_raw {
                storage.allocate(0, geometry.disk_bytes(), Allocation::Reserve).map_err(|error| {
                    Error::io(ErrorKind::Allocate, "create disk: reserve the image's space", error)
                        .advise("free space on the host, or make the raw image sparse")
                })?;
            }
            if !mutant::is_active(Mutant::RenameUnsyncedFile) {
                storage
                    .sync_data()
                    .map_err(|error| Error::io(ErrorKind::Sync, "create disk: sync the image", error))?;
            }
        }
        Mode::Expanded | Mode::Preallocated => create_image(
            storage,
            &format::CreateOptions {
                geometry: geometry.clone(),
                preallocated: options.mode == Mode::Preallocated,
            },
        )?,
    }
    storage.len().map_err(|error| Error::io(ErrorKind::Stat, "create disk: measure the image", error))
}

/// Takes a file away after `error`; says so if that fails as well.
fn remove(folder: &dyn Folder, name: &str, error: Error) -> Error {
    match folder.unlink(name) {
        Ok(()) => error,
        Err(cleaning) if cleaning.kind() == io::ErrorKind::NotFound => error,
        Err(cleaning) => {
            error.advise(format!("remove the file {name}, which could not be removed: {cleaning}"))
        }
    }
}

/// Takes a disk back whose descriptor may or may not be durable: the descriptor first, and the image only when no
/// descriptor can name it any more (I10).
fn withdraw(folder: &dyn Folder, options: &CreateOptions, was_there: bool, error: Error) -> Error {
    let withdrawn = folder.unlink(DESCRIPTOR_NAME).and_then(|()| folder.sync());
    match withdrawn {
        Ok(()) if was_there => error.with_kind(ErrorKind::Sync),
        Ok(()) => remove(folder, &options.file, error.with_kind(ErrorKind::Sync)),
        Err(_) => error.advise(format!(
            "repair the file system; then remove {DESCRIPTOR_NAME} and {}, or keep them if both are there",
            options.file
        )),
    }
}

#[cfg(test)]
mod tests;
