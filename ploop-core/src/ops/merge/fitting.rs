//! Images of different sizes are merged: the lower one gets the size of the upper one first.
//!
//! The state that remains is the upper one, with its size. A lower image that is smaller grows: what the upper one holds
//! past its end finds a place. A larger one is cut: what it held past the end of the upper one was its own state's alone,
//! and that state is being merged, so nobody misses it, and it cannot come back when the disk grows again.
//!
//! Both happen after the descriptor has marked the lower state as being merged and before anything is copied. Cut
//! anywhere, the lower image has its old or its new size, the upper one still shows what it showed, and the same
//! command goes on.

use std::sync::Arc;

use crate::device::growing::{self, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, DiskDescriptor, Guid};
use crate::io::{Access, Folder, Storage};
use crate::ops::image_files::{open_chain, open_image, source};
use crate::ops::progress::Progress;
use crate::ops::resize::give_back;
use crate::units::Sectors;

/// Lets the work be cancelled; what it does is little.
pub(crate) struct Cancellable<'a>(pub(crate) &'a dyn Progress);

impl Watch for Cancellable<'_> {
    fn advance(&mut self, _bytes: u64) -> Result<()> {
        self.0.advance(0)
    }
}

/// Gives the target of a merge, one image open for writing, the size `disk`; the target as it is then. After a failure
/// it is closed, unless what the file holds is not known.
pub(crate) fn fit(target: Arc<Chain>, disk: Sectors, progress: &dyn Progress) -> Result<Arc<Chain>> {
    if target.geometry().disk_sectors() == disk {
        return Ok(target);
    }
    let plan = match target.plan_resize(disk, false) {
        Ok(plan) => plan,
        Err(error) => return Err(closed_after(&target, error)),
    };
    let fitted =
        growing::apply(&target, &plan, &mut Cancellable(progress)).map_err(|cut| match cut.poisoned {
            true => cut.error,
            false => closed_after(&target, cut.error),
        })?;
    give_back(&fitted, &plan)?;
    Ok(fitted)
}

fn closed_after(target: &Chain, error: Error) -> Error {
    match target.close() {
        Ok(()) => error,
        Err(closing) => error.advise(format!("the image could not be closed either: {closing}")),
    }
}

/// Gives a raw base that is merged into the size `bytes`. Also one that seems to have it: the sync of an earlier run may
/// have failed.
pub(crate) fn fit_raw(storage: &dyn Storage, bytes: u64) -> Result<()> {
    let failed = |kind| move |error| Error::io(kind, "merge: give the raw base its size", error);
    storage.set_len(bytes).map_err(failed(ErrorKind::Truncate))?;
    storage.sync_data().map_err(failed(ErrorKind::Sync))
}

/// Fails if a state that stands on `upper` shows something that an image from `lower` on holds past the end of
/// `upper`'s: it would be lost. `served`: the current state is left out, its images are in use.
pub(crate) fn check_nothing_shows(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    (lower, upper): (Guid, Guid),
    served: bool,
) -> Result<()> {
    for shot in descriptor.shots() {
        let leaf = shot.guid();
        let is_leaf = descriptor.children(leaf).next().is_none();
        if leaf == upper || !is_leaf || served && leaf == descriptor.top_guid() {
            continue;
        }
        // Of another branch.
        let Ok(range) = descriptor.range(lower, leaf) else { continue };
        let Some(index) = range.iter().position(|shot| shot.guid() == upper) else { continue };
        let mut sources = Vec::new();
        for shot in &range {
            let image = descriptor.image(shot.guid()).ok_or_else(|| {
                Error::new(ErrorKind::Descriptor, format!("the shot {} has no image", shot.guid()))
            })?;
            sources.push(source(descriptor, image, open_image(folder, image.file(), Access::ReadOnly)?));
        }
        let chain = open_chain(descriptor, sources, Access::ReadOnly)?;
        shown(&chain, index)?;
    }
    Ok(())
}

/// Fails if a delta of a chain above `index` shows what one below holds past the end of `index`.
pub(crate) fn shown(chain: &Chain, index: usize) -> Result<()> {
    let Some(cluster) = chain.shown_past(index)? else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Parameter,
        "merge: a later state shows what lies below past the end of this one, which the merge would cut off",
    )
    .at_path(chain.name(index))
    .at_cluster(u64::from(cluster.0))
    .advise(
        "another program has made the disk larger without hiding that; unmount the disk and merge up to that later state \
         at once (snapshot-merge -u -U); nothing was changed",
    ))
}
