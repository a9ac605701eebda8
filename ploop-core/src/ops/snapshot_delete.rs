//! Deleting a snapshot: its state goes, every other state stays as it is.
//!
//! | what stands on it | what is done |
//! |---|---|
//! | nothing | the descriptor forgets it (**commit**), its file is removed |
//! | one state | they are merged: see [`merge`](crate::ops::merge) |
//! | several | it is marked temporary: it goes as soon as only one is left |
//!
//! Deleting the current state goes back to the one below it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor_store::keep_copy;
use crate::format::{DiskDescriptor, Guid, Image, Transition};
use crate::io::{Access, Folder, Storage};
use crate::ops::agreement;
use crate::ops::image_files::{is_shared, open_chain, open_image, remove_early, remove_obsolete, source};
use crate::ops::merge::{Asked, MergeReport, OpenBundle, Wins, complete_in, merge_range};
use crate::ops::progress::Progress;
use crate::units::Sectors;

/// What to delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteOptions {
    /// The snapshot.
    pub snapshot: Guid,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteReport {
    /// The snapshot.
    pub snapshot: Guid,
    /// It was merged with the one state that stood on it.
    pub merged: Option<MergeReport>,
    /// It is only marked, for several states stand on it.
    pub marked: bool,
    /// It was an entry without image, or without snapshot, and is no longer in the descriptor; the former descriptor is kept
    /// in this file beside it.
    #[serde(default)]
    pub descriptor_copy: Option<String>,
}

/// Drops an entry that hangs in the air, behind a copy of the descriptor; its file, if it has one, stays.
fn drop_dead(folder: &dyn Folder, descriptor: &DiskDescriptor, entry: Guid) -> Result<DeleteReport> {
    let mut next = descriptor.clone();
    next.drop_dead(entry)?;
    let copy = keep_copy(folder)?;
    next.store(folder)?;
    Ok(DeleteReport { snapshot: entry, merged: None, marked: false, descriptor_copy: Some(copy) })
}

/// Deletes a snapshot of the closed disk at `path`, a descriptor or its folder. [`ErrorKind::NoSnapshot`] if there is
/// none of that name, [`ErrorKind::InUse`] if somebody has it open.
pub fn delete(
    path: &Path,
    options: &DeleteOptions,
    lock_timeout: Duration,
    progress: &dyn Progress,
) -> Result<DeleteReport> {
    let bundle = OpenBundle::open(path, lock_timeout)?;
    delete_in(&bundle.folder, options, progress).map_err(|error| error.at_path(&bundle.path))
}

/// As [`delete`], in an open folder that no other command works on.
pub fn delete_in(
    folder: &dyn Folder,
    options: &DeleteOptions,
    progress: &dyn Progress,
) -> Result<DeleteReport> {
    let snapshot = options.snapshot;
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    if descriptor.is_dead(snapshot) {
        return drop_dead(folder, &descriptor, snapshot);
    }
    // A current state that goes may go short.
    if snapshot != descriptor.top_guid() {
        agreement::require(folder, &descriptor)?;
    }
    // What this very command committed before it was cut.
    let already = descriptor.has_removed(snapshot);
    let completed = complete_in(folder, &mut descriptor, Asked::Delete, progress)?;
    let merged = completed.into_iter().find(|report| report.merged.contains(&snapshot));
    if merged.is_some() || already {
        return Ok(DeleteReport { snapshot, merged, marked: false, descriptor_copy: None });
    }
    let mut gone = vec![snapshot];
    if snapshot == descriptor.top_guid() {
        gone.extend(descriptor.shot(snapshot).map(|shot| shot.parent()));
    }
    let report = delete_one(folder, &mut descriptor, snapshot, progress)?;
    if !report.marked {
        delete_marked(folder, &mut descriptor, &gone, progress)?;
    } else {
        delete_temporary(folder, &mut descriptor, progress)?;
    }
    Ok(report)
}

fn delete_one(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    snapshot: Guid,
    progress: &dyn Progress,
) -> Result<DeleteReport> {
    let report = DeleteReport { snapshot, merged: None, marked: false, descriptor_copy: None };
    if descriptor.shot(snapshot).is_none() {
        return Err(Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {snapshot}"))
            .advise("`ploop snapshot-list` shows the snapshots of the disk"));
    }
    let children: Vec<Guid> = descriptor.children(snapshot).map(|shot| shot.guid()).collect();
    match children.as_slice() {
        [] => {
            let mut next = descriptor.clone();
            next.remove(snapshot)?;
            if snapshot == descriptor.top_guid() {
                // What becomes the current state may be smaller: a disk grows in its top alone.
                next.set_disk_sectors(sectors_below(folder, descriptor, snapshot)?)?;
            }
            remove_leaf(folder, descriptor, snapshot, next)?;
            Ok(report)
        }
        &[child] => {
            let merged =
                merge_range(folder, descriptor, (snapshot, child), (Wins::Source, Asked::Delete), progress)?;
            Ok(DeleteReport { merged: Some(merged), ..report })
        }
        _ => {
            let mut next = descriptor.clone();
            next.mark(snapshot, Transition::Temporary)?;
            if next != *descriptor {
                next.store(folder)?;
                *descriptor = next;
            }
            Ok(DeleteReport { marked: true, ..report })
        }
    }
}

/// The size of the state under `snapshot`.
fn sectors_below(folder: &dyn Folder, descriptor: &DiskDescriptor, snapshot: Guid) -> Result<Sectors> {
    let below = descriptor.shot(snapshot).map_or(Guid::NONE, |shot| shot.parent());
    let image = descriptor
        .image(below)
        .ok_or_else(|| Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {below}")))?;
    let storage = open_image(folder, image.file(), Access::ReadOnly)?;
    let chain = open_chain(descriptor, vec![source(descriptor, image, storage)], Access::ReadOnly)?;
    Ok(chain.geometry().disk_sectors())
}

/// Opens a file that is about to go, so that whoever has it open keeps it.
pub(crate) fn hold_to_remove(folder: &dyn Folder, image: Option<&Image>) -> Result<Option<Arc<dyn Storage>>> {
    let Some(image) = image else { return Ok(None) };
    match open_image(folder, image.file(), Access::ReadWrite) {
        Ok(storage) => Ok(Some(storage)),
        Err(error) if is_missing(&error) => Ok(None),
        // Only its name here goes, and clones have their own.
        Err(error) => match open_image(folder, image.file(), Access::ReadOnly) {
            Ok(storage) if is_shared(&*storage) => Ok(Some(storage)),
            _ => Err(error),
        },
    }
}

/// Commits to `next`, which lacks `snapshot`, and removes its file.
fn remove_leaf(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    snapshot: Guid,
    next: DiskDescriptor,
) -> Result<()> {
    // Held until the file is gone: whoever has it open keeps it.
    let _held = hold_to_remove(folder, descriptor.image(snapshot))?;
    remove_early(folder, &next);
    next.store(folder)?;
    *descriptor = next;
    remove_obsolete(folder, descriptor)
}

/// A file that cannot be opened because it is not there hinders nobody from forgetting it.
fn is_missing(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|source| source.kind() == std::io::ErrorKind::NotFound)
}

/// Deletes the snapshots that are marked temporary and that nobody uses; says which. What cannot be deleted now,
/// because it is in use, or several states stand on it, stays marked.
pub(crate) fn delete_temporary(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    progress: &dyn Progress,
) -> Result<Vec<Guid>> {
    delete_marked(folder, descriptor, &[], progress)
}

/// As [`delete_temporary`], for an operation that has removed the states `gone` and would not find them again if it was
/// cut now and run once more.
fn delete_marked(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    gone: &[Guid],
    progress: &dyn Progress,
) -> Result<Vec<Guid>> {
    let marked: Vec<Guid> = descriptor
        .shots()
        .iter()
        .filter(|shot| shot.transition() == Some(Transition::Temporary))
        .map(|shot| shot.guid())
        .collect();
    let mut deleted = Vec::new();
    for snapshot in marked {
        if descriptor.children(snapshot).count() > 1 {
            continue;
        }
        descriptor.remember_gone(gone);
        match delete_one(folder, descriptor, snapshot, progress) {
            Ok(_) => deleted.push(snapshot),
            // In use: later. A base, or one with a marked state below, cannot go by itself.
            Err(error) if matches!(error.kind(), ErrorKind::InUse | ErrorKind::Parameter) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests;
