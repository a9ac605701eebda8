//! A snapshot of a closed disk: the current state is kept, and what is written from now on goes into a new, empty
//! image on top of it.
//!
//! Order (crash model, section 5): the name of the new image is announced in the descriptor, so that what a crash
//! leaves of it can be told from other files and removed; the image is made and synced, and the folder; **commit**:
//! the descriptor names it. The image below is closed all the time: one that was not is repaired and closed first.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::Geometry;
use crate::format::{self, DiskDescriptor, Guid, InUse, Transition, create_image};
use crate::io::{Access, Folder, Storage, ownership};
use crate::mutant::{self, Mutant};
use crate::ops::agreement;
use crate::ops::image_files::{check_free, create_file, open_chain, open_image, remove_obsolete, source};
use crate::ops::merge::{Asked, OpenBundle, complete_in};
use crate::ops::progress::Progress;
use crate::ops::snapshot_delete::delete_temporary;

/// What to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOptions {
    /// Name of the snapshot; a random one if none is given.
    pub snapshot: Option<Guid>,
    /// It is to be deleted as soon as nobody uses it.
    pub temporary: bool,
}

/// What was kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Name of the snapshot.
    pub snapshot: Guid,
    /// Its image, relative to the folder of the disk.
    pub file: String,
    /// The new image on top of it.
    pub top_file: String,
    /// Snapshots marked temporary, used by nobody, that were deleted on the way.
    pub deleted: Vec<Guid>,
}

/// Makes a snapshot of the closed disk at `path`, a descriptor or its folder. Fails with [`ErrorKind::InUse`] if the
/// disk is served or otherwise open for writing.
pub fn snapshot(
    path: &Path,
    options: &SnapshotOptions,
    lock_timeout: Duration,
    progress: &dyn Progress,
) -> Result<SnapshotReport> {
    let bundle = OpenBundle::open(path, lock_timeout)?;
    snapshot_in(&bundle.folder, options, progress).map_err(|error| error.at_path(&bundle.path))
}

/// As [`snapshot`], in an open folder that no other command works on.
pub fn snapshot_in(
    folder: &dyn Folder,
    options: &SnapshotOptions,
    progress: &dyn Progress,
) -> Result<SnapshotReport> {
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    agreement::require(folder, &descriptor)?;
    match complete_in(folder, &mut descriptor, Asked::Merge, progress) {
        Ok(_) => {}
        // Somebody reads what a cut merge writes to: it can wait, as it did until now.
        Err(error) if error.kind() == ErrorKind::InUse => {}
        Err(error) => return Err(error),
    }
    let snapshot = options.snapshot.unwrap_or_else(Guid::random);
    let top_file = descriptor.new_file_name();
    let deleted = delete_temporary(folder, &mut descriptor, progress)?;
    let plan = |descriptor: &DiskDescriptor| {
        let mut next = descriptor.clone();
        next.add_snapshot(snapshot, &top_file)?;
        if options.temporary {
            next.mark(snapshot, Transition::Temporary)?;
        }
        Ok(next)
    };
    // Refused before anything changes.
    plan(&descriptor)?;
    check_free(folder, &top_file)?;
    check_whole(folder, &descriptor)?;
    let (top, geometry) = closed_top(folder, &descriptor)?;
    descriptor.announce(&top_file)?;
    if !mutant::is_active(Mutant::NotAnnounced) {
        descriptor.store(folder)?;
    }
    if let Err(error) = create_top(folder, &top_file, &geometry, &*top) {
        return Err(give_up(folder, &mut descriptor, error));
    }
    let next = plan(&descriptor)?;
    next.store(folder)?;
    let file = next.image(snapshot).map(|image| image.file().to_owned()).unwrap_or_default();
    Ok(SnapshotReport { snapshot, file, top_file, deleted })
}

/// A disk that cannot be read has no state worth keeping: every image of it is there, and they fit on each other.
fn check_whole(folder: &dyn Folder, descriptor: &DiskDescriptor) -> Result<()> {
    let mut sources = Vec::new();
    for image in descriptor.chain_for(descriptor.top_guid())? {
        sources.push(source(descriptor, image, open_image(folder, image.file(), Access::ReadOnly)?));
    }
    open_chain(descriptor, sources, Access::ReadOnly).map(drop)
}

/// Removes what an operation that failed before its commit has announced.
pub(crate) fn give_up(folder: &dyn Folder, descriptor: &mut DiskDescriptor, error: Error) -> Error {
    match remove_obsolete(folder, descriptor) {
        Ok(()) => error,
        Err(_) if error.advice().is_some() => error,
        Err(_) => error.advise("nothing was changed; the next snapshot command removes the unfinished file"),
    }
}

/// Makes an empty image to stand on one of the same `geometry`, with the owner and mode of `below`, durably.
pub(crate) fn create_top(
    folder: &dyn Folder,
    file: &str,
    geometry: &Geometry,
    below: &dyn Storage,
) -> Result<()> {
    let storage = create_file(folder, file)?;
    ownership::copy(below, &*storage).map_err(|error| {
        Error::io(ErrorKind::System, "make image: give it the owner and mode of the one below", error)
            .at_path(file)
            .advise("run this as the owner of the disk, or as root")
    })?;
    create_image(&*storage, &format::CreateOptions { geometry: geometry.for_child()?, preallocated: false })
        .map_err(|error| error.at_path(file))?;
    if mutant::is_active(Mutant::NewNameUnsynced) {
        return Ok(());
    }
    folder.sync().map_err(|error| Error::io(ErrorKind::Sync, "make image: sync the folder", error))
}

/// The image of the current state, locked against writers, sound and closed, and its geometry.
pub(crate) fn closed_top(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
) -> Result<(Arc<dyn Storage>, Geometry)> {
    let top = descriptor.top_guid();
    let image = descriptor
        .image(top)
        .ok_or_else(|| Error::new(ErrorKind::Descriptor, "the current state has no image"))?;
    let open = |access| {
        let storage = open_image(folder, image.file(), access)?;
        let chain = open_chain(descriptor, vec![source(descriptor, image, Arc::clone(&storage))], access)?;
        Ok::<_, Error>((storage, chain))
    };
    // As a reader: that keeps writers away, too, and an image that clones share lets nobody in as a writer.
    let (storage, chain) = open(Access::ReadOnly)?;
    let geometry = chain.geometry().clone();
    if chain.header(0).is_none_or(|header| header.in_use() != InUse::Open) {
        return Ok((storage, geometry));
    }
    drop((storage, chain));
    let (storage, chain) = open(Access::ReadWrite)?;
    chain.close()?;
    Ok((storage, geometry))
}

#[cfg(test)]
mod tests;
