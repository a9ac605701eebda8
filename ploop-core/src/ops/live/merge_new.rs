//! States of a running disk become one in a new file, and the old files stay as they are until it is complete.
//!
//! | step | gate | a crash after it leaves |
//! |---|---|---|
//! | 1 descriptor announces the new file | open | the old chain; a name of no use |
//! | 2 new image made, synced, marked as in use | open | the same and a file that the next command removes |
//! | 3 what the states hold copied into it, the highest holder of each cluster | open | the same |
//! | 4 *the upper state is the running top*: what changed meanwhile is copied, until little is left ([`catching_up`](super::catching_up)) | open, held in slices | the same |
//! | 5 the rest copied, everything in the new image durable | closed | the same |
//! | 6 descriptor with the new file for the old ones put in place (commit) | closed | the new chain |
//! | 7 chain replaced, keeper told | closed | the same |
//! | 8 old files removed, their space given back little by little ([`space`](super::space)) | open | nothing more |
//!
//! Before step 6 nothing has happened to anybody: a failure or a cancellation takes the new file away. So no state is marked as
//! being merged, and the snapshots can be read throughout.
//!
//! While the running top is copied no entry of it is cleared ([`Disk::keep_entries`]): a discard writes zeros, which are copied
//! like any write. This ends with the command, also when it fails, for no image of the chain in use has changed. It is not
//! begun while a state of the disk is marked as being merged: then entries are kept for that merge, and for longer.
//!
//! Should the folder's sync of step 6 fail, the descriptor of step 1 is put back, for a running top before the gate opens; if that
//! fails as well, its writes are refused for good, as in a [merge into the parent](super::delete).
//!
//! The new image has the size of the upper state. A lower state that is larger (the disk was made smaller since) is refused: what it
//! holds past the end would be lost, and only a closed disk can be asked whether anybody shows it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::catching_up::{CatchingUp, check_clean, not_quiet};
use super::copier::{self, Copier};
use super::delete::{DeleteOptions, freeze, put_back};
use super::space::Held;
use super::{Bundle, DRAIN_TIMEOUT, at_descriptor, check_same, load, milliseconds, remove_obsolete, told};
use crate::device::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::MergeInto;
use crate::format::{
    Chain, ChainOptions, CreateOptions, DESCRIPTOR_NAME, DiskDescriptor, Guid, Source, create_image,
};
use crate::io::lock::Ownership;
use crate::io::{Access, ownership};
use crate::ops::Progress;
use crate::ops::image_files::check_free;
use crate::ops::merge::merge_into_new;
use crate::units::{FileOffset, GuestCluster};

/// What to merge into a new file.
#[derive(Clone, Debug)]
pub struct MergeNewOptions {
    /// The lowest of the states that become one.
    pub lower: Guid,
    /// The highest, which stays; it may be the current state.
    pub upper: Guid,
    /// Name of the new file, in the folder of the disk.
    pub file: String,
    /// How long writes in flight may take to end, and a freeze by somebody else may last.
    pub drain_timeout: Duration,
    /// As in [`DeleteOptions`], in bytes.
    pub rest_bytes_max: u64,
    /// As in [`DeleteOptions`].
    pub hold_max: Duration,
}

impl MergeNewOptions {
    /// The usual way.
    pub fn new(lower: Guid, upper: Guid, file: impl Into<String>) -> Self {
        let DeleteOptions { rest_bytes_max, hold_max, .. } = DeleteOptions::new(lower);
        Self { lower, upper, file: file.into(), drain_timeout: DRAIN_TIMEOUT, rest_bytes_max, hold_max }
    }

    fn pace(&self) -> DeleteOptions {
        DeleteOptions {
            snapshot: self.lower,
            drain_timeout: self.drain_timeout,
            rest_bytes_max: self.rest_bytes_max,
            hold_max: self.hold_max,
        }
    }
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MergeNewReport {
    /// The states that are gone, lowest first; none if a run that was cut had done it.
    pub merged: Vec<Guid>,
    /// The file that holds them and the one that stays.
    pub file: String,
    /// Bytes copied, repetitions included.
    pub merged_bytes: u64,
    /// Passes over a running top; 1 over frozen images.
    pub passes: u32,
    /// The longest time that guest writes were held at once, in milliseconds.
    pub held_ms: f64,
    /// Images in the chain now.
    pub depth: usize,
    /// What went wrong without harm.
    pub warnings: Vec<String>,
}

/// Merges the states from `lower` up to `upper` into a new file. Cancelled or failed, the disk is as it was.
///
/// Fails with `NoSnapshot`; with `Parameter` where other states stand on one that would go, and for a name that cannot be
/// a new file's; with `Busy` while another merge is to be finished first; with `InUse` and `NotQuiet` as
/// [`delete`](super::delete()).
pub fn merge_new(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    progress: &dyn Progress,
    options: &MergeNewOptions,
) -> Result<MergeNewReport> {
    let mut descriptor = load(disk, bundle)?;
    let (lower, upper, file) = (options.lower, options.upper, options.file.as_str());
    // What this very command committed before it was cut.
    let is_done = descriptor.gone().contains(&lower)
        && descriptor.shot(lower).is_none()
        && descriptor.image(upper).is_some_and(|image| image.file() == file);
    remove_obsolete(bundle, &mut descriptor)?;
    let nothing =
        MergeNewReport { file: file.to_owned(), depth: disk.chain().depth(), ..MergeNewReport::default() };
    if is_done {
        return Ok(nothing);
    }
    check_wishes(&descriptor, file)?;
    let states: Vec<Guid> = descriptor.range(lower, upper)?.iter().map(|shot| shot.guid()).collect();
    let chain = disk.chain();
    let running: Vec<Guid> =
        descriptor.chain_for(descriptor.top_guid())?.iter().map(|image| image.guid()).collect();
    let position = |guid: Guid| running.iter().position(|&one| one == guid);
    let mut after = descriptor.clone();
    after.announce(file)?;
    let announced = after.clone();
    after.finish_merge(lower, upper, MergeInto::New(file)).map_err(at_descriptor(bundle))?;
    let (Some(from), Some(to)) = (position(lower), position(upper)) else {
        // In another branch: nobody has these images open, or they cannot be locked.
        let merged = merge_into_new(bundle.unused_images(), &mut descriptor, lower, upper, file, progress)?;
        return Ok(MergeNewReport {
            merged: merged.merged,
            merged_bytes: merged.copied_bytes,
            passes: 1,
            ..nothing
        });
    };
    check_sizes(&chain, from, to)?;
    check_free(bundle.folder(), file)?;
    announced.store(bundle.folder()).map_err(at_descriptor(bundle))?;
    descriptor = announced;
    let former: Vec<_> = (from..=to).map(|delta| Arc::clone(chain.storage(delta))).collect();
    let merge = MergeNew { disk, bundle, progress, options, chain, lower: from, upper: to };
    let mut report = match merge.run(&descriptor, &after) {
        Ok(report) => report,
        Err(error) => return Err(undo(bundle, &mut descriptor, file, error)),
    };
    report.merged = states.into_iter().filter(|&state| state != upper).collect();
    let held = Held::obsolete(bundle, &after);
    if let Err(error) = remove_obsolete(bundle, &mut after) {
        report
            .warnings
            .push(format!("the states are merged, but not all old files removed: {}", told(&error)));
    }
    held.give_back(disk, &former, progress);
    Ok(report)
}

fn check_wishes(descriptor: &DiskDescriptor, file: &str) -> Result<()> {
    if file.contains('/') {
        return Err(Error::new(ErrorKind::Parameter, format!("merge: {file:?} is not the name of a file"))
            .advise("the new file lies in the folder of the disk: give its name alone"));
    }
    if file.starts_with(DESCRIPTOR_NAME) {
        return Err(Error::new(ErrorKind::Parameter, format!("merge: {file:?} is no name for an image"))
            .advise("choose another name"));
    }
    let is_cut = |shot: &&crate::format::Shot| shot.transition().is_some_and(|one| !one.is_readable());
    if let Some(cut) = descriptor.shots().iter().find(is_cut) {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("merge into a new file: a merge of {} was begun and is not finished", cut.guid()),
        )
        .advise(format!("finish it first: ploop snapshot-delete -u {}", cut.guid())));
    }
    Ok(())
}

fn check_sizes(chain: &Chain, lower: usize, upper: usize) -> Result<()> {
    let end = chain.delta_geometry(upper).disk_bytes();
    match (lower..upper).find(|&delta| chain.delta_geometry(delta).disk_bytes() > end) {
        None => Ok(()),
        Some(larger) => Err(Error::new(
            ErrorKind::Parameter,
            format!(
                "merge into a new file: this image is a disk of {} bytes, what stands on it of {end}",
                chain.delta_geometry(larger).disk_bytes()
            ),
        )
        .at_path(chain.name(larger))
        .advise("merge without -n, or unmount the disk first")),
    }
}

/// Takes back what was prepared; unless the new descriptor is, or may be, in place: then the new file may be the disk's.
fn undo(bundle: &dyn Bundle, announced: &mut DiskDescriptor, file: &str, error: Error) -> Error {
    // Only what is durably the descriptor says that nobody needs the file.
    let is_back = error.kind() != ErrorKind::OutcomeUnknown || announced.store(bundle.folder()).is_ok();
    let there = DiskDescriptor::load(bundle.folder(), Some(bundle.path()));
    if is_back && there.is_ok_and(|there| there.images().iter().all(|image| image.file() != file)) {
        // What cannot be removed is announced: the next command removes it.
        let _is_announced = remove_obsolete(bundle, announced);
        return error;
    }
    match error.advice() {
        Some(_) => error,
        None => error.advise(format!(
            "{file} may be an image of the disk by now: unmount the disk and mount it again before changing its snapshots"
        )),
    }
}

struct MergeNew<'a> {
    disk: &'a Arc<Disk>,
    bundle: &'a dyn Bundle,
    progress: &'a dyn Progress,
    options: &'a MergeNewOptions,
    chain: Arc<Chain>,
    lower: usize,
    upper: usize,
}

impl MergeNew<'_> {
    fn run(&self, before: &DiskDescriptor, after: &DiskDescriptor) -> Result<MergeNewReport> {
        let new = self.make()?;
        if self.upper < self.chain.top() {
            return self.merge_frozen(&new, after);
        }
        let next = self.chain.with_range_merged(self.lower, self.upper, &new)?;
        self.disk.prepare_chain(&next)?;
        let kept = self.disk.keep_entries();
        let done = self.merge_top(&new, &next, (before, after));
        // Committed, or nothing below the top in use has changed.
        kept.end();
        done
    }

    /// Makes the new image, empty and in use.
    fn make(&self) -> Result<Arc<Chain>> {
        let (file, path) = (self.options.file.as_str(), self.bundle.path().join(&self.options.file));
        let failed = |kind, operation: &'static str| {
            let path = path.clone();
            move |cause| Error::io(kind, operation, cause).at_path(path)
        };
        let geometry = self.chain.delta_geometry(self.upper).for_child()?;
        {
            let storage = self
                .bundle
                .folder()
                .create_exclusive(file)
                .map_err(failed(ErrorKind::Create, "merge: make the new image"))?;
            ownership::copy(&**self.chain.storage(self.lower), &*storage)
                .map_err(failed(ErrorKind::System, "merge: give the new image the owner of the old one"))?;
            create_image(&*storage, &CreateOptions { geometry, preallocated: false })
                .map_err(|error| error.at_path(&path))?;
        }
        self.bundle.folder().sync().map_err(failed(ErrorKind::Sync, "sync the folder of the disk"))?;
        let storage = self.bundle.open_image(file, Access::ReadWrite, false)?;
        let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false };
        Chain::open(vec![Source { name: path, storage, raw: false }], &options)
    }

    /// One pass over everything; the copier of the highest state goes on afterwards.
    fn copy_all<'a>(&'a self, new: &'a Arc<Chain>) -> Result<(Copier<'a>, u64)> {
        let chain = &*self.chain;
        let cluster_bytes = chain.geometry().cluster_bytes();
        let total: u64 = (self.lower..=self.upper).map(|delta| chain.clusters_held(delta)).sum();
        self.progress.begin("merge", total.saturating_mul(cluster_bytes));
        let mut below = 0;
        for delta in self.lower..self.upper {
            let mut copier = Copier::new(self.disk, (chain, delta), new, self.progress)?;
            chain.for_each_held(delta, |cluster, offset, _| {
                if self.is_hidden(delta, cluster) || self.is_hole(delta, offset)? {
                    return self.progress.advance(0);
                }
                copier.copy(cluster)
            })?;
            copier.flush()?;
            below += copier.bytes;
        }
        let mut copier = Copier::new(self.disk, (chain, self.upper), new, self.progress)?;
        chain.for_each_held(self.upper, |cluster, _, _| copier.copy(cluster))?;
        self.progress.end();
        Ok((copier, below))
    }

    /// Whether a state above it holds a cluster. What the running top takes over from now on counts as changed.
    fn is_hidden(&self, delta: usize, cluster: GuestCluster) -> bool {
        (delta + 1..=self.upper).any(|above| self.chain.held_bytes(above, cluster).is_some())
    }

    /// Whether a cluster of a raw base is a hole of its file: nothing lies below it, so it need not be held.
    fn is_hole(&self, delta: usize, offset: FileOffset) -> Result<bool> {
        if delta > 0 || !self.chain.delta_geometry(delta).is_raw() {
            return Ok(false);
        }
        let end = offset.0.saturating_add(self.chain.geometry().cluster_bytes());
        let data = self.chain.storage(delta).next_data(offset.0).map_err(|cause| {
            Error::io(ErrorKind::Read, "merge: look for holes of the raw base", cause)
                .at_path(self.chain.name(delta))
        })?;
        Ok(data.is_none_or(|(start, _)| start >= end))
    }

    fn report(&self, bytes: u64, passes: u32, held: Duration, depth: usize) -> MergeNewReport {
        MergeNewReport {
            merged: Vec::new(),
            file: self.options.file.clone(),
            merged_bytes: bytes,
            passes,
            held_ms: milliseconds(held),
            depth,
            warnings: Vec::new(),
        }
    }

    fn merge_frozen(&self, new: &Arc<Chain>, after: &DiskDescriptor) -> Result<MergeNewReport> {
        let (mut copier, below) = self.copy_all(new)?;
        copier.flush()?;
        new.close()?;
        let next = self.chain.with_range_merged(self.lower, self.upper, new)?;
        self.disk.prepare_chain(&next)?;
        let staged = after.stage(self.bundle.folder()).map_err(at_descriptor(self.bundle))?;
        self.disk.flush()?;
        let closed = Instant::now();
        // Before the commit: a gate that somebody else keeps closed fails what has not happened.
        let frozen = freeze(self.disk, self.options.drain_timeout).map_err(not_quiet)?;
        // In doubt either descriptor is right for what was written and for what comes.
        frozen.replace_chain(|in_use| {
            check_same(in_use, &self.chain)?;
            staged.commit().map_err(at_descriptor(self.bundle))?;
            Ok(Arc::clone(&next))
        })?;
        drop(frozen);
        let held = closed.elapsed();
        new.storage(0).claim(Some(Ownership::Reader))?;
        Ok(self.report(copier.bytes + below, 1, held, next.depth()))
    }

    fn merge_top(
        &self,
        new: &Arc<Chain>,
        next: &Arc<Chain>,
        (before, after): (&DiskDescriptor, &DiskDescriptor),
    ) -> Result<MergeNewReport> {
        let (disk, pace) = (self.disk, self.options.pace());
        // Discards that did not know that entries are kept have ended.
        drop(freeze(disk, self.options.drain_timeout).map_err(not_quiet)?);
        let changes = disk.watch_changes()?;
        let (mut copier, below) = self.copy_all(new)?;
        let staged = after.stage(self.bundle.folder()).map_err(at_descriptor(self.bundle))?;
        let mut catching_up = CatchingUp::new(disk, &changes, self.progress, &pace);
        let frozen = catching_up.run(&mut copier, || freeze(disk, self.options.drain_timeout))?;
        copier.hold();
        copier.sweep(&changes)?;
        copier::flush(new)?;
        check_clean(&changes)?;
        let replaced = frozen.replace_chain(|in_use| {
            check_same(in_use, &self.chain)?;
            staged.commit().map_err(at_descriptor(self.bundle))?;
            Ok(Arc::clone(next))
        });
        if let Err(error) = replaced {
            return Err(put_back(self.bundle, frozen, before, error));
        }
        drop(frozen);
        let held = catching_up.held();
        Ok(self.report(copier.bytes + below, catching_up.passes(), held, next.depth()))
    }
}
