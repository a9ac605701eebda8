//! The parent of a merge gets the size of the child, while the chain with both is served.
//!
//! | step | gate |
//! |---|---|
//! | 1 clusters in the way of a longer table are copied to new places, entered, durable; their old places stay as they are | open |
//! | 2 the chain in use is replaced by one that knows the new places | closed for a moment |
//! | 3 reads that began with the former chain end | open |
//! | 4 the room of the longer table is emptied, the header written | open |
//!
//! A parent that is cut, or that grows without moves, needs only 4: nobody reads what lies past its new end, for the child
//! ends there, and what stands on the child hides it (which is looked at first) and goes on doing so: no entry of
//! the top is cleared as long as the chain in use has the parent with that cluster.
//!
//! All of it comes behind the mark "being merged" in the descriptor: whatever is left of it after a crash, the chain shows
//! the same, and the same command goes on. In a run that follows one that failed between 1 and 2, the chain in use has
//! places that the file calls free: step 2 comes first then.

use std::sync::Arc;

use super::check_same;
use super::delete::Merge;
use crate::device::growing;
use crate::error::Result;
use crate::format::{Chain, DiskDescriptor, Guid};
use crate::ops::merge::fitting::{Cancellable, check_nothing_shows, fit_raw, shown};
use crate::ops::resize::give_back;
use crate::units::FileCluster;

impl Merge<'_> {
    /// Fails if cutting the parent would take something away from what stands on the child. Changes nothing.
    pub(super) fn check_cut(&self, descriptor: &DiskDescriptor, range: (Guid, Guid)) -> Result<()> {
        let (parent, child) =
            (self.chain.delta_geometry(self.child - 1), self.chain.delta_geometry(self.child));
        if parent.disk_bytes() <= child.disk_bytes() {
            return Ok(());
        }
        // What hides it is durable.
        self.disk.flush()?;
        shown(&self.chain, self.child)?;
        check_nothing_shows(self.bundle.unused_images(), descriptor, range, true)
    }

    /// Gives the parent the size of the child. `parent` is the parent's file alone, opened for the merge; afterwards, also
    /// after a failure, it is as the file is then, unless that is not known.
    pub(super) fn fit(&mut self, parent: &mut Arc<Chain>) -> Result<()> {
        self.show_places(parent)?;
        let disk = self.chain.delta_geometry(self.child).disk_sectors();
        if parent.geometry().is_raw() {
            fit_raw(&**parent.storage(0), self.chain.delta_geometry(self.child).disk_bytes())?;
            *parent = parent.reopened(FileCluster(0))?;
            return Ok(());
        }
        if parent.geometry().disk_sectors() == disk {
            return Ok(());
        }
        let plan = parent.plan_resize(disk, false)?;
        if !plan.moves.is_empty() {
            growing::move_some(parent, &plan, u64::MAX, &mut Cancellable(self.progress))
                .map_err(|cut| cut.error)?;
            *parent = parent.reopened(plan.geometry.first_data_cluster())?;
            self.show_places(parent)?;
        }
        let plan = parent.plan_resize(disk, false)?;
        *parent = growing::apply(parent, &plan, &mut Cancellable(self.progress)).map_err(|cut| cut.error)?;
        give_back(parent, &plan)
    }

    /// Sees to it that the chain in use has the clusters of the parent where its file has them, and nobody reads others.
    fn show_places(&mut self, parent: &Arc<Chain>) -> Result<()> {
        let index = self.child - 1;
        if self.chain.has_places_of(index, parent) {
            return Ok(());
        }
        let view = parent.reopened(FileCluster(0))?;
        let new = self.chain.with_lower(index, &view)?;
        self.disk.prepare_chain(&new)?;
        let frozen = self.freeze()?;
        frozen.replace_chain(|in_use| {
            check_same(in_use, &self.chain)?;
            Ok(Arc::clone(&new))
        })?;
        drop(frozen);
        self.chain = new;
        self.is_refreshed = true;
        self.disk.former_reads_end()
    }
}
