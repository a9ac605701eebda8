//! Going back: an earlier state becomes the current one.
//!
//! A new, empty image on the snapshot becomes the current state, so the snapshot itself stays as it is. The former
//! current state is removed, or kept as a snapshot. Order (crash model, section 5): the new image, announced as by
//! [`snapshot`](crate::ops::snapshot); **commit**: the descriptor; the old file is removed.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskDescriptor, Guid};
use crate::io::{Access, Folder};
use crate::ops::agreement;
use crate::ops::image_files::{check_free, open_chain, open_image, remove_early, remove_obsolete, source};
use crate::ops::merge::{Asked, OpenBundle, complete_in};
use crate::ops::progress::Progress;
use crate::ops::snapshot::{closed_top, create_top, give_up};
use crate::ops::snapshot_delete::hold_to_remove;

/// Where to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchOptions {
    /// The snapshot.
    pub snapshot: Guid,
    /// Keep the current state as a snapshot of this name instead of removing it.
    pub keep: Option<Guid>,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchReport {
    /// The snapshot that the disk stands on now.
    pub snapshot: Guid,
    /// The new image on top of it.
    pub top_file: String,
    /// The former current state, if it was kept.
    pub kept: Option<Guid>,
    /// The file of the former current state, if it was removed.
    pub removed: Option<String>,
}

/// Switches the closed disk at `path`, a descriptor or its folder, to a snapshot.
pub fn switch(
    path: &Path,
    options: &SwitchOptions,
    lock_timeout: Duration,
    progress: &dyn Progress,
) -> Result<SwitchReport> {
    let bundle = OpenBundle::open(path, lock_timeout)?;
    switch_in(&bundle.folder, options, progress).map_err(|error| error.at_path(&bundle.path))
}

/// As [`switch`], in an open folder that no other command works on.
pub fn switch_in(
    folder: &dyn Folder,
    options: &SwitchOptions,
    progress: &dyn Progress,
) -> Result<SwitchReport> {
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    // A current state that goes may go short.
    if options.keep.is_some() {
        agreement::require(folder, &descriptor)?;
    }
    complete_in(folder, &mut descriptor, Asked::Merge, progress)?;
    let top_file = descriptor.new_file_name();
    let old_file = descriptor.image(descriptor.top_guid()).map(|image| image.file().to_owned());
    let plan = |descriptor: &DiskDescriptor| {
        let mut next = descriptor.clone();
        next.switch(options.snapshot, &top_file, options.keep)?;
        Ok::<_, Error>(next)
    };
    plan(&descriptor)?;
    check_free(folder, &top_file)?;
    // The current state is kept, and then sound; or it goes, be it damaged. In either case nobody else has it.
    let _held = match options.keep {
        Some(_) => Some(closed_top(folder, &descriptor)?.0),
        None => hold_to_remove(folder, descriptor.image(descriptor.top_guid()))?,
    };
    let image = descriptor.image(options.snapshot).ok_or_else(|| {
        Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {}", options.snapshot))
    })?;
    let below = open_image(folder, image.file(), Access::ReadOnly)?;
    let geometry =
        open_chain(&descriptor, vec![source(&descriptor, image, below.clone())], Access::ReadOnly)?
            .geometry()
            .clone();
    descriptor.announce(&top_file)?;
    descriptor.store(folder)?;
    if let Err(error) = create_top(folder, &top_file, &geometry, &*below) {
        return Err(give_up(folder, &mut descriptor, error));
    }
    let mut next = plan(&descriptor)?;
    if next.disk_sectors() != geometry.disk_sectors() {
        // The snapshot is of another size: the disk has that again.
        next.set_disk_sectors(geometry.disk_sectors())?;
    }
    remove_early(folder, &next);
    next.store(folder)?;
    remove_obsolete(folder, &mut next)?;
    Ok(SwitchReport {
        snapshot: options.snapshot,
        top_file,
        kept: options.keep,
        removed: old_file.filter(|_| options.keep.is_none()),
    })
}

#[cfg(test)]
mod tests;
