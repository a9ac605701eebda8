//! Which files an operation makes and which it replaces, kept beside the descriptor while it runs.
//!
//! The plan is durable before the first new file; the descriptor that names the new files is the moment of change; the
//! plan goes last. So whoever comes after a crash knows what is left over, and no file is ever removed that the
//! descriptor names or that is not in the plan.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::ENTRIES_MAX;
use crate::format::{DESCRIPTOR_NAME, DiskDescriptor};
use crate::io::file::component;
use crate::io::{Access, Folder, Storage, StorageExt};

/// The name of the plan. No image can have it: names that begin as the descriptor's are refused there.
pub(super) const PLAN_NAME: &str = "DiskDescriptor.xml.plan";
/// A plan names at most [`ENTRIES_MAX`] files twice, each of at most 255 bytes.
const PLAN_BYTES_MAX: u64 = 1 << 20;

/// The files of an operation.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Files that are made.
    pub(super) new: Vec<String>,
    /// Files that they replace.
    pub(super) old: Vec<String>,
}

impl Plan {
    /// Makes the plan durable: before any file of it is made.
    pub(super) fn store(&self, folder: &dyn Folder) -> Result<()> {
        let failed = |kind| move |cause| Error::io(kind, "plan: write the plan", cause);
        let bytes = serde_json::to_vec(self).map_err(io::Error::from).map_err(failed(ErrorKind::Write))?;
        let storage = folder.create_exclusive(PLAN_NAME).map_err(failed(ErrorKind::Create))?;
        let written = storage
            .write_all_at(0, &bytes)
            .map_err(failed(ErrorKind::Write))
            .and_then(|()| storage.sync_data().map_err(failed(ErrorKind::Sync)))
            .and_then(|()| folder.sync().map_err(failed(ErrorKind::Sync)));
        written.map_err(|error| remove(folder, PLAN_NAME).err().unwrap_or(error))
    }

    /// The plan of an operation that was cut, if there is one. An unreadable one was never durable: then no file of
    /// it was ever made.
    fn load(folder: &dyn Folder) -> Result<Option<Self>> {
        let failed = |cause| {
            Error::io(ErrorKind::Read, "plan: read the plan of a cut operation", cause).at_path(PLAN_NAME).advise(
                "it names the files that a conversion or an import has made and not finished; if it stays unreadable, remove \
                 it, run the command again, and look for files that the descriptor does not name",
            )
        };
        let storage = match folder.open(PLAN_NAME, Access::ReadOnly) {
            Ok(storage) => storage,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(failed(cause)),
        };
        let len = storage.len().map_err(failed)?.min(PLAN_BYTES_MAX);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        storage.read_exact_at(0, &mut bytes).map_err(failed)?;
        let none = Self { new: Vec::new(), old: Vec::new() };
        let plan: Self = serde_json::from_slice(&bytes).unwrap_or(none);
        if plan.new.len() > ENTRIES_MAX || plan.old.len() > ENTRIES_MAX {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "plan: the plan of a cut operation names too many files",
            ));
        }
        Ok(Some(plan))
    }

    /// The old files if `descriptor` names one of the new ones, else the new ones; none that it names. Nothing at all if
    /// it names neither old nor new ones: it is another descriptor by now, and cannot say which of them count.
    fn useless(self, descriptor: Option<&DiskDescriptor>) -> Vec<String> {
        let images = descriptor.map_or(&[][..], DiskDescriptor::images);
        let is_named = |name: &String| images.iter().any(|image| image.file() == *name);
        let committed = self.new.iter().any(is_named);
        if descriptor.is_some() && !self.old.is_empty() && !committed && !self.old.iter().any(is_named) {
            return Vec::new();
        }
        let left = if committed { self.old } else { self.new };
        // Whoever wrote the plan may have written anything: only what can be an image goes, never the descriptor.
        let may_go = |name: &String| component(name).is_ok() && !name.starts_with(DESCRIPTOR_NAME);
        left.into_iter().filter(|name| !is_named(name) && may_go(name)).collect()
    }
}

fn remove(folder: &dyn Folder, name: &str) -> Result<bool> {
    match folder.unlink(name) {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(Error::io(ErrorKind::Unlink, "plan: remove a left-over file", cause).at_path(name)),
    }
}

/// Removes what a cut operation left over: the old files if `descriptor` names the new ones, else the new ones. A file
/// that the descriptor names stays in any case, and every file if it names neither. Returns the names of what was removed; nothing without a plan.
pub(super) fn recover(folder: &dyn Folder, descriptor: Option<&DiskDescriptor>) -> Result<Vec<String>> {
    let Some(plan) = Plan::load(folder)? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    for name in plan.useless(descriptor) {
        if remove(folder, &name)? {
            removed.push(name);
        }
    }
    // The plan goes last: until then the same removal can be repeated.
    sync(folder)?;
    finish(folder)?;
    Ok(removed)
}

/// What [`recover`] would remove, and the plan itself; nothing without a plan.
pub(super) fn left_over(folder: &dyn Folder, descriptor: &DiskDescriptor) -> Result<Vec<String>> {
    let Some(plan) = Plan::load(folder)? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for name in plan.useless(Some(descriptor)) {
        let exists = folder.exists(&name);
        if exists
            .map_err(|cause| Error::io(ErrorKind::Stat, "plan: look for a file", cause).at_path(&name))?
        {
            names.push(name);
        }
    }
    names.push(PLAN_NAME.to_owned());
    Ok(names)
}

/// Whether `name` is a file that an operation began to make, and was cut.
pub(super) fn is_unfinished(folder: &dyn Folder, name: &str) -> Result<bool> {
    Ok(Plan::load(folder)?.is_some_and(|plan| plan.new.iter().any(|new| new == name)))
}

/// Removes the plan of an operation that has left nothing over.
pub(super) fn finish(folder: &dyn Folder) -> Result<()> {
    remove(folder, PLAN_NAME)?;
    sync(folder)
}

fn sync(folder: &dyn Folder) -> Result<()> {
    folder.sync().map_err(|cause| Error::io(ErrorKind::Sync, "plan: sync the folder", cause))
}

/// Takes back what was built, after `error`; says so if that fails as well.
pub(super) fn withdraw(folder: &dyn Folder, descriptor: Option<&DiskDescriptor>, error: Error) -> Error {
    match recover(folder, descriptor) {
        Ok(_) => error,
        Err(second) => error.advise(format!("the same command tidies up later; now it failed: {second}")),
    }
}
