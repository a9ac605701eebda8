//! The descriptor on disk: read within limits, replaced atomically.
//!
//! At every instant the folder holds wholly the old descriptor or wholly the new one (I10): the new one is written
//! under a temporary name of its own, synced, renamed over the old one, and the folder synced. The caller has made
//! durable every file that the new one names *before*. A temporary file that a crash leaves behind is never adopted.

use std::io;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::io::file::host_trouble;
use crate::io::{Access, Folder, Storage, StorageExt, ownership};
use crate::mutant::{self, Mutant};

use super::descriptor::{DESCRIPTOR_NAME, Described, DiskDescriptor, Names};
use super::guid::Guid;
use super::xml::DOCUMENT_BYTES_MAX;

/// The copy that other programs keep.
const BACKUP_NAME: &str = "DiskDescriptor.xml.Backup";

/// What the names of our temporary descriptors begin with.
pub const TEMPORARY_PREFIX: &str = "DiskDescriptor.xml.tmp.";

impl Described {
    /// Reads the descriptor of the bundle in `folder`, of a whole or of a split disk. `path` is that folder's, for absolute
    /// names written by old tools, and for messages. With `outside`, names that lead out of the bundle are kept
    /// ([`Image::is_outside`](super::Image::is_outside)) and not refused.
    pub fn load(folder: &dyn Folder, path: Option<&Path>, outside: bool) -> Result<Self> {
        Self::read(folder, path, outside)
            .map_err(|error| error.at_path(path.unwrap_or(Path::new("")).join(DESCRIPTOR_NAME)))
    }

    fn read(folder: &dyn Folder, path: Option<&Path>, outside: bool) -> Result<Self> {
        let bytes = read_document(folder, DESCRIPTOR_NAME)?;
        let real = folder.real_path();
        let is_there = |name: &str| match name.split_once('/') {
            None => folder.exists(name).unwrap_or(false),
            Some((inner, name)) => {
                folder.open_folder(inner).is_ok_and(|inner| inner.exists(name).unwrap_or(false))
            }
        };
        Self::parse(&bytes, &Names { folder: real.as_deref().or(path), is_there: &is_there, outside })
    }
}

impl DiskDescriptor {
    /// Reads the descriptor of the bundle in `folder`. `path` is that folder's, for absolute names written by old
    /// tools, and for messages; without it the folder itself says where it is.
    pub fn load(folder: &dyn Folder, path: Option<&Path>) -> Result<Self> {
        let whole = || Described::read(folder, path, false)?.whole();
        whole().map_err(|error| error.at_path(path.unwrap_or(Path::new("")).join(DESCRIPTOR_NAME)))
    }

    /// Replaces the descriptor of the bundle in `folder` by this one, or makes the first one; it is durable when this
    /// returns. A top without the constant GUID is converted on the way; owner and mode of the old file are kept.
    ///
    /// After an error before the rename the old descriptor stands. An error of the folder's sync
    /// ([`ErrorKind::OutcomeUnknown`]) leaves open which of the two is there after a power loss: the caller treats
    /// the bundle as poisoned and does nothing that relies on either.
    pub fn store(&self, folder: &dyn Folder) -> Result<()> {
        self.store_as(folder, Replace::Always)
    }

    /// As [`store`](Self::store), for a bundle that must not have a descriptor yet ([`ErrorKind::Create`]).
    pub fn store_new(&self, folder: &dyn Folder) -> Result<()> {
        self.store_as(folder, Replace::Never)
    }

    fn store_as(&self, folder: &dyn Folder, replace: Replace) -> Result<()> {
        self.stage_as(folder, replace)?.commit()
    }

    /// The first half of [`store`](Self::store): the new descriptor is durable under a temporary name, and nothing but
    /// [`commit`](StagedDescriptor::commit) is left to do. Dropping it takes the temporary file away.
    pub fn stage<'a>(&self, folder: &'a dyn Folder) -> Result<StagedDescriptor<'a>> {
        self.stage_as(folder, Replace::Always)
    }

    fn stage_as<'a>(&self, folder: &'a dyn Folder, replace: Replace) -> Result<StagedDescriptor<'a>> {
        let name = temporary_name();
        self.write_as(folder, &name, replace)?;
        Ok(StagedDescriptor { folder, name: Some(name), replace })
    }

    /// Makes this descriptor durable in the new file `name`, for whoever renames it to [`DESCRIPTOR_NAME`] in the end. After an
    /// error the file is not there, unless the error is one of the folder's sync.
    pub fn write_aside(&self, folder: &dyn Folder, name: &str) -> Result<()> {
        self.write_as(folder, name, Replace::Never)?;
        folder.sync().map_err(|error| {
            Error::io(ErrorKind::Sync, "write descriptor: sync the folder", error).at_path(name)
        })
    }

    /// The descriptor that [`write_aside`](Self::write_aside) wrote to `name`. [`ErrorKind::Read`] when it cannot be read; any other error when it
    /// is none.
    pub fn load_aside(folder: &dyn Folder, name: &str) -> Result<Self> {
        read_document(folder, name)
            .and_then(|bytes| Self::parse_in(&bytes, None))
            .map_err(|error| error.at_path(name))
    }

    fn write_as(&self, folder: &dyn Folder, name: &str, replace: Replace) -> Result<()> {
        let mut converted = self.clone();
        converted.convert_top()?;
        let bytes = converted.to_bytes();
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Descriptor,
                format!("write descriptor: {} bytes are more than anybody reads", bytes.len()),
            ));
        }
        write_temporary(folder, name, &bytes, replace)
            .map_err(|error| remove_temporary(folder, name, error).at_path(DESCRIPTOR_NAME))
    }
}

/// What the names of copies begin with that are kept when something of a descriptor is given up.
const COPY_PREFIX: &str = "DiskDescriptor.xml.saved.";

/// Makes a copy of the descriptor in `folder`, byte for byte and durable, beside it; its name.
pub fn keep_copy(folder: &dyn Folder) -> Result<String> {
    let bytes = read_document(folder, DESCRIPTOR_NAME)?;
    let name = format!("{COPY_PREFIX}{}", Guid::random().to_string().trim_matches(['{', '}']));
    write_temporary(folder, &name, &bytes, Replace::Always)
        .map_err(|error| remove_temporary(folder, &name, error).at_path(&name))?;
    folder.sync().map_err(|error| {
        Error::io(ErrorKind::Sync, "copy descriptor: sync the folder", error).at_path(&name)
    })?;
    Ok(name)
}

/// A descriptor that is durable under a temporary name; see [`DiskDescriptor::stage`].
#[must_use]
pub struct StagedDescriptor<'a> {
    folder: &'a dyn Folder,
    name: Option<String>,
    replace: Replace,
}

impl<'a> StagedDescriptor<'a> {
    /// Puts it in place of the present one, durably; errors are those of [`DiskDescriptor::store`].
    pub fn commit(self) -> Result<()> {
        self.rename()?.settle()
    }

    /// Puts it in place of the present one. Until it is [settled](RenamedDescriptor::settle), either may be there after a
    /// power loss; everybody who reads it finds the new one.
    pub fn rename(mut self) -> Result<RenamedDescriptor<'a>> {
        let folder = self.folder;
        let Some(name) = self.name.take() else { return Ok(RenamedDescriptor { folder }) };
        let renamed = match self.replace {
            Replace::Always => self.folder.rename(&name, DESCRIPTOR_NAME),
            Replace::Never => self.folder.rename_exclusive(&name, DESCRIPTOR_NAME),
        };
        let renamed = renamed.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                Error::io(ErrorKind::Create, "write descriptor: there is one", error)
            }
            _ => Error::io(ErrorKind::Rename, "write descriptor: rename it into place", error),
        });
        if let Err(error) = renamed {
            return Err(remove_temporary(self.folder, &name, error).at_path(DESCRIPTOR_NAME));
        }
        Ok(RenamedDescriptor { folder })
    }
}

/// A descriptor that is in place, though not durably yet; see [`StagedDescriptor::rename`].
#[must_use]
pub struct RenamedDescriptor<'a> {
    folder: &'a dyn Folder,
}

impl RenamedDescriptor<'_> {
    /// Makes it durable; fails with [`ErrorKind::OutcomeUnknown`].
    pub fn settle(self) -> Result<()> {
        if mutant::is_active(Mutant::RenameWithoutFolderSync) {
            return Ok(());
        }
        self.folder.sync().map_err(|error| {
            Error::io(
                ErrorKind::OutcomeUnknown,
                "write descriptor: the folder cannot be synced; the old or the new one may be there later",
                error,
            )
            .at_path(DESCRIPTOR_NAME)
            .advise(
                "stop using this disk, repair its file system, then look at the descriptor before going on",
            )
        })
    }
}

impl Drop for StagedDescriptor<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            // A temporary file that stays harms nobody.
            let _ = self.folder.unlink(&name);
        }
    }
}

/// Whether an existing descriptor is replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replace {
    Always,
    Never,
}

fn temporary_name() -> String {
    let random = Guid::random().to_string();
    format!("{TEMPORARY_PREFIX}{}", random.trim_matches(['{', '}']))
}

fn read_document(folder: &dyn Folder, name: &str) -> Result<Vec<u8>> {
    // That there is none is a word about the disk; that it cannot be read is one about the host.
    let open_failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound if folder.exists(BACKUP_NAME).unwrap_or(false) => {
            Error::io(ErrorKind::Descriptor, "read descriptor", error)
                .advise(format!("a copy of it lies beside it, {BACKUP_NAME}: copy that to {DESCRIPTOR_NAME}"))
        }
        io::ErrorKind::NotFound => Error::io(ErrorKind::Descriptor, "read descriptor", error).advise(
            "check the path; `ploop restore-descriptor` makes one anew for an image without snapshots",
        ),
        _ => host_trouble(ErrorKind::Open, "open descriptor", error),
    };
    let failed = |error: io::Error| host_trouble(ErrorKind::Read, "read descriptor", error);
    let storage = folder.open(name, Access::ReadOnly).map_err(open_failed)?;
    let len = storage.len().map_err(failed)?;
    let len = usize::try_from(len).ok().filter(|&len| len <= DOCUMENT_BYTES_MAX).ok_or_else(|| {
        Error::new(ErrorKind::Descriptor, format!("read descriptor: {len} bytes are too many"))
    })?;
    let mut bytes = vec![0; len];
    storage.read_exact_at(0, &mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn write_temporary(folder: &dyn Folder, name: &str, bytes: &[u8], replace: Replace) -> Result<()> {
    let failed = |kind: ErrorKind| move |error: io::Error| Error::io(kind, "write descriptor", error);
    let storage = folder.create_exclusive(name).map_err(failed(ErrorKind::Create))?;
    if replace == Replace::Always {
        keep_ownership(folder, &*storage)?;
    }
    storage.write_all_at(0, bytes).map_err(failed(ErrorKind::Write))?;
    if mutant::is_active(Mutant::RenameUnsyncedFile) {
        return Ok(());
    }
    storage.sync_data().map_err(failed(ErrorKind::Sync))
}

fn keep_ownership(folder: &dyn Folder, new: &dyn Storage) -> Result<()> {
    match folder.open(DESCRIPTOR_NAME, Access::ReadOnly) {
        Ok(old) => ownership::copy(&*old, new).map_err(|error| {
            Error::io(ErrorKind::System, "write descriptor: keep the owner and mode of the old one", error)
                .advise("run this as the owner of the descriptor, or as root")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(ErrorKind::Open, "write descriptor: open the old one", error)),
    }
}

/// Takes the temporary file away after `error`; says so if that fails as well.
fn remove_temporary(folder: &dyn Folder, name: &str, error: Error) -> Error {
    match folder.unlink(name) {
        Ok(()) => error,
        Err(cleaning) if cleaning.kind() == io::ErrorKind::NotFound => error,
        Err(cleaning) => {
            error.advise(format!("remove the file {name}, which could not be removed: {cleaning}"))
        }
    }
}

#[cfg(test)]
mod tests;
