//! A snapshot of a running disk is deleted: what stands on it is merged down into its image.
//!
//! | step | a crash after it leaves |
//! |---|---|
//! | 1 descriptor marks the snapshot as being merged; its image gets the size of the child ([`fitting`](super::fitting)) | the same chain; the snapshot cannot be used any more, only this command can be run again |
//! | 2 clusters of the child copied into the parent, flushed, any number of times | the same: the child shadows all of them |
//! | 3 everything copied is durable; descriptor without the snapshot put in place (commit) | the shorter chain |
//! | 4 chain replaced behind the closed gate | the same |
//! | 5 file of the child removed; its space given back little by little ([`space`](super::space)) | nothing more |
//!
//! *A child that is frozen itself* does not change: one pass, and the gate is closed only for the descriptor and step 4.
//!
//! *A child that is the running top* is written to meanwhile. As in a copy to another machine, a tracker
//! ([`Disk::watch_changes`]) says, in units of 4 KiB, what changed since it was copied, discards and zeroing included: it
//! is copied again until little is left ([`catching_up`](super::catching_up): a guest that writes faster than that is
//! slowed down), which is copied behind the closed gate together with steps 3 and 4. Two things make the partly merged
//! parent harmless after a crash, be its clusters copied whole or in part. No entry of the top is cleared meanwhile
//! ([`Disk::keep_entries`]): a discard writes zeros instead, so whatever is durable in the top shadows what was merged.
//! That stays so when the merge fails or is cancelled, until a later one has ended or the disk is closed: the chain in use
//! does not know what the parent has got.
//! And a cluster whose entry is not durable in the top was allocated since the last flush: its bytes in the parent are
//! those of the snapshot, with some of what was written since then, which is allowed (G2).
//!
//! Should the folder's sync of step 3 fail, the descriptor of step 1 is put back before the gate opens; if that fails as well,
//! writes are refused for good: either descriptor is right for what was written until then, not for what would come.
//!
//! A snapshot on which nothing stands is taken out of the descriptor, then its file is removed. One in another branch than the
//! running chain is merged as on a closed disk: nobody has its images open, or they cannot be locked.
//!
//! Behind the snapshot that was named, those marked temporary go that nobody uses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::catching_up::{CatchingUp, check_clean, not_quiet};
use super::copier::{self, Copier};
use super::space::Held;
use super::{
    Bundle, DRAIN_TIMEOUT, at_descriptor, check_same, check_same_file, load, milliseconds, remove_obsolete,
    told,
};
use crate::device::{Disk, Frozen};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::MergeInto;
use crate::format::{Chain, DiskDescriptor, Guid, Source, Transition};
use crate::io::lock::Ownership;
use crate::io::{Access, Storage};
use crate::ops::Progress;
use crate::ops::merge::{Asked, Wins, merge_range};

/// How often a gate that somebody else has closed is tried again.
const GATE_RETRY: Duration = Duration::from_millis(20);

/// How to delete a snapshot of a running disk.
#[derive(Clone, Debug)]
pub struct DeleteOptions {
    /// Which.
    pub snapshot: Guid,
    /// How long writes in flight may take to end, and a freeze by somebody else may last.
    pub drain_timeout: Duration,
    /// The gate is closed for the last time once this little is left to be copied, in bytes.
    pub rest_bytes_max: u64,
    /// And once copying it is expected to take no longer than this. A guest that writes too fast for that is held this long
    /// at a time meanwhile, and longer only if it is still too fast when held ten times as long as not.
    pub hold_max: Duration,
}

impl DeleteOptions {
    /// The usual way to delete a snapshot.
    pub fn new(snapshot: Guid) -> Self {
        Self {
            snapshot,
            drain_timeout: DRAIN_TIMEOUT,
            rest_bytes_max: 4 << 20,
            hold_max: Duration::from_millis(20),
        }
    }
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeleteReport {
    /// The snapshot.
    pub snapshot: Guid,
    /// It is only marked, for several states stand on it.
    pub marked: bool,
    /// Bytes copied from the child into its parent, repetitions included.
    pub merged_bytes: u64,
    /// Clusters copied, repetitions included.
    pub merged_clusters: u64,
    /// Passes over a running top; 1 over a frozen child.
    pub passes: u32,
    /// The longest time that guest writes were held at once, in milliseconds.
    pub held_ms: f64,
    /// Images in the chain now.
    pub depth: usize,
    /// Snapshots marked temporary, used by nobody, that were deleted as well.
    pub temporary: Vec<Guid>,
    /// What went wrong without harm.
    pub warnings: Vec<String>,
}

/// Deletes a snapshot of a running disk. Cancelled or failed, the disk goes on as it was; if the merge had begun, the
/// snapshot can only be deleted, by the same command.
///
/// Fails with `NoSnapshot`; with `Parameter` for the current state; with
/// `InUse` when somebody has the snapshot open; with `NotQuiet` when the gate of a running top cannot be closed: writes in
/// flight do not end, or somebody else keeps it closed.
pub fn delete(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    progress: &dyn Progress,
    options: &DeleteOptions,
) -> Result<DeleteReport> {
    let cut = load(disk, bundle)?;
    let was_done = cut.gone().contains(&options.snapshot) && cut.shot(options.snapshot).is_none();
    let mut report = delete_one(disk, bundle, progress, options, &[])?;
    // While those go that were waiting for it, the same command, cut there and run again, still finds itself done.
    let gone = if report.marked { &[][..] } else { &[options.snapshot][..] };
    if let Err(error) = delete_temporary(disk, bundle, progress, options, (gone, was_done), &mut report) {
        report.warnings.push(format!("a temporary snapshot was not deleted: {}", told(&error)));
    }
    Ok(report)
}

/// Deletes the snapshots marked temporary that nobody uses. What cannot go now stays marked.
fn delete_temporary(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    progress: &dyn Progress,
    options: &DeleteOptions,
    (gone, was_done): (&[Guid], bool),
    report: &mut DeleteReport,
) -> Result<()> {
    let marked: Vec<Guid> = load(disk, bundle)?
        .shots()
        .iter()
        .filter(|shot| match shot.transition() {
            Some(Transition::Temporary) => true,
            // The run that was cut had begun it.
            Some(Transition::Merging) => was_done,
            _ => false,
        })
        .map(|shot| shot.guid())
        .collect();
    for guid in marked {
        if load(disk, bundle)?.children(guid).count() > 1 {
            continue;
        }
        let options = DeleteOptions { snapshot: guid, ..options.clone() };
        match delete_one(disk, bundle, progress, &options, gone) {
            Ok(done) => {
                report.temporary.push(guid);
                report.merged_bytes += done.merged_bytes;
                report.merged_clusters += done.merged_clusters;
                report.passes += done.passes;
                report.held_ms = report.held_ms.max(done.held_ms);
                report.depth = done.depth;
                report.warnings.extend(done.warnings);
            }
            // In use, or of another size: later.
            Err(error) if matches!(error.kind(), ErrorKind::InUse | ErrorKind::Parameter) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `gone`: what the operation that this is a part of has removed before.
fn delete_one(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    progress: &dyn Progress,
    options: &DeleteOptions,
    gone: &[Guid],
) -> Result<DeleteReport> {
    let mut descriptor = load(disk, bundle)?;
    let guid = options.snapshot;
    // What this very command committed before it was cut.
    let is_done = descriptor.gone().contains(&guid) && descriptor.shot(guid).is_none();
    remove_obsolete(bundle, &mut descriptor)?;
    if !gone.is_empty() {
        descriptor.remember_gone(gone);
    }
    let nothing = DeleteReport {
        snapshot: guid,
        marked: false,
        merged_bytes: 0,
        merged_clusters: 0,
        passes: 0,
        held_ms: 0.0,
        depth: disk.chain().depth(),
        temporary: Vec::new(),
        warnings: Vec::new(),
    };
    if is_done {
        return Ok(nothing);
    }
    let refuse = |message: &str, advice: &str| {
        Err(Error::new(ErrorKind::Parameter, format!("delete snapshot {guid}: {message}")).advise(advice))
    };
    let chain: Vec<Guid> =
        descriptor.chain_for(descriptor.top_guid())?.iter().map(|image| image.guid()).collect();
    if descriptor.shot(guid).is_none() {
        return Err(Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {guid}"))
            .advise("list the snapshots of the disk and use one of their GUIDs")
            .at_path(bundle.path()));
    }
    if guid == descriptor.top_guid() {
        return refuse("it is what the disk runs on", "give the GUID of a snapshot");
    }
    let children: Vec<Guid> = descriptor.children(guid).map(|shot| shot.guid()).collect();
    let parent = chain.iter().position(|&one| one == guid);
    match (children.as_slice(), parent) {
        ([], _) => delete_leaf(bundle, descriptor, nothing),
        ([_], Some(parent)) => {
            let (in_use, child) = (disk.chain(), parent + 1);
            let merge = Merge { disk, bundle, progress, options, chain: in_use, child, is_refreshed: false };
            merge.run(descriptor, (guid, chain[child]))
        }
        (&[child], None) => {
            let folder = bundle.unused_images();
            let merged =
                merge_range(folder, &mut descriptor, (guid, child), (Wins::Source, Asked::Delete), progress)?;
            Ok(DeleteReport { merged_bytes: merged.copied_bytes, passes: 1, ..nothing })
        }
        _ => {
            // It goes as soon as only one is left.
            descriptor.mark(guid, Transition::Temporary).map_err(at_descriptor(bundle))?;
            descriptor.store(bundle.folder()).map_err(at_descriptor(bundle))?;
            Ok(DeleteReport { marked: true, ..nothing })
        }
    }
}

fn delete_leaf(
    bundle: &dyn Bundle,
    mut descriptor: DiskDescriptor,
    report: DeleteReport,
) -> Result<DeleteReport> {
    let guid = report.snapshot;
    let file = descriptor.image(guid).map(|image| image.file().to_owned());
    // Held by whoever has it mounted.
    let _own = match &file {
        Some(file) => Some(bundle.open_image(file, Access::ReadWrite, false)?),
        None => None,
    };
    descriptor.remove(guid).map_err(at_descriptor(bundle))?;
    descriptor.store(bundle.folder()).map_err(at_descriptor(bundle))?;
    remove_obsolete(bundle, &mut descriptor)?;
    Ok(report)
}

/// The parent's file while it is written: the reader's lock of the chain in use gives way to the writer's, and comes
/// back when that has gone.
struct Borrowed<'a>(Option<&'a Arc<dyn Storage>>);

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if let Some(storage) = self.0 {
            // Who has taken it meanwhile only reads, too, or this program would not have had it.
            let _ = storage.claim(Some(Ownership::Reader));
        }
    }
}

/// Closes the gate, waiting for others that have closed it and for writes in flight.
pub(super) fn freeze(disk: &Arc<Disk>, time_max: Duration) -> Result<Frozen> {
    let deadline = Instant::now() + time_max;
    loop {
        match disk.freeze(deadline.saturating_duration_since(Instant::now())) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                std::thread::sleep(GATE_RETRY);
            }
            other => return other,
        }
    }
}

/// A chain was not replaced. Nobody may write to the top in use as long as the descriptor may say that it is not part of
/// the disk any more.
pub(super) fn put_back(bundle: &dyn Bundle, frozen: Frozen, before: &DiskDescriptor, error: Error) -> Error {
    if error.kind() != ErrorKind::OutcomeUnknown {
        return error;
    }
    match before.store(bundle.folder()) {
        Ok(()) => error,
        Err(again) => {
            frozen.hand_over();
            error.advise(format!(
                "which descriptor is there is not known ({again}), and either is right for what was written so far; \
                 further writes are refused: unmount the disk, repair the host's file system, then mount it again"
            ))
        }
    }
}

pub(super) struct Merge<'a> {
    pub(super) disk: &'a Arc<Disk>,
    pub(super) bundle: &'a dyn Bundle,
    pub(super) progress: &'a dyn Progress,
    options: &'a DeleteOptions,
    /// The chain in use.
    pub(super) chain: Arc<Chain>,
    pub(super) child: usize,
    /// The chain in use has the parent by the file that was opened for this merge.
    pub(super) is_refreshed: bool,
}

impl Merge<'_> {
    fn run(mut self, mut descriptor: DiskDescriptor, (lower, upper): (Guid, Guid)) -> Result<DeleteReport> {
        let (chain, index) = (Arc::clone(&self.chain), self.child - 1);
        self.check_cut(&descriptor, (lower, upper))?;
        let image = descriptor
            .image(lower)
            .ok_or_else(|| Error::new(ErrorKind::Descriptor, "merge: the snapshot has no image"))?;
        let file = image.file().to_owned();
        let raw = index == 0 && descriptor.is_raw();
        // Whoever has the snapshot mounted keeps it from being written; found out before anything is changed.
        let old = chain.storage(index);
        old.claim(None)?;
        let mut borrowed = Borrowed(Some(old));
        let storage = self.bundle.open_image(&file, Access::ReadWrite, raw)?;
        check_same_file(&**old, &*storage)?;
        let mut after = descriptor.clone();
        after.finish_merge(lower, upper, MergeInto::Lower).map_err(at_descriptor(self.bundle))?;
        after.was_a_deletion(upper);
        descriptor.begin_merge(lower, upper).map_err(at_descriptor(self.bundle))?;
        descriptor.store(self.bundle.folder()).map_err(at_descriptor(self.bundle))?;
        let source = Source { name: chain.name(index).to_path_buf(), storage: Arc::clone(&storage), raw };
        let mut parent = chain.parent_for_merge(index, source)?;
        let done = self.fit(&mut parent).and_then(|()| match self.child == chain.top() {
            true => self.merge_top(&parent, &descriptor, &after),
            false => self.merge_frozen(&parent, &descriptor, &after),
        });
        let mut report = match done {
            Ok(report) => report,
            Err(error) => {
                // As tidy as can be; if not, the next opening repairs it. The lock goes before the reader's comes back.
                if error.kind() != ErrorKind::Sync && copier::flush(&parent).is_ok() {
                    let _ = parent.close();
                }
                if self.is_refreshed {
                    borrowed.0 = None;
                    let _ = storage.claim(Some(Ownership::Reader));
                }
                drop((parent, storage));
                drop(borrowed);
                return Err(error);
            }
        };
        // The chain in use has the parent by its new file.
        borrowed.0 = None;
        let held = Held::obsolete(self.bundle, &after);
        if let Err(error) = remove_obsolete(self.bundle, &mut after) {
            report.warnings.push(format!("the snapshot is deleted, but not its file: {}", told(&error)));
        }
        held.give_back(self.disk, &[Arc::clone(self.chain.storage(self.child))], self.progress);
        Ok(report)
    }

    fn report(&self, copier: &Copier<'_>, passes: u32, held: Duration, depth: usize) -> DeleteReport {
        DeleteReport {
            snapshot: self.options.snapshot,
            marked: false,
            merged_bytes: copier.bytes,
            merged_clusters: copier.clusters,
            passes,
            held_ms: milliseconds(held),
            depth,
            temporary: Vec::new(),
            warnings: Vec::new(),
        }
    }

    pub(super) fn freeze(&self) -> Result<Frozen> {
        freeze(self.disk, self.options.drain_timeout)
    }

    fn merge_frozen(
        &self,
        parent: &Arc<Chain>,
        before: &DiskDescriptor,
        after: &DiskDescriptor,
    ) -> Result<DeleteReport> {
        let chain = &*self.chain;
        let mut copier = Copier::new(self.disk, (chain, self.child), parent, self.progress)?;
        let cluster_bytes = chain.geometry().cluster_bytes();
        self.progress.begin("merge", chain.clusters_held(self.child).saturating_mul(cluster_bytes));
        chain.for_each_held(self.child, |cluster, _, _| copier.copy(cluster))?;
        copier.flush()?;
        self.progress.end();
        parent.close()?;
        let new = chain.without(self.child, parent)?;
        self.disk.prepare_chain(&new)?;
        let staged = after.stage(self.bundle.folder()).map_err(at_descriptor(self.bundle))?;
        self.disk.flush()?;
        let closed = Instant::now();
        // Before the commit: a gate that somebody else keeps closed fails what has not happened.
        let frozen = self.freeze().map_err(not_quiet)?;
        let replaced = frozen.replace_chain(|in_use| {
            check_same(in_use, &self.chain)?;
            staged.commit().map_err(at_descriptor(self.bundle))?;
            Ok(Arc::clone(&new))
        });
        if let Err(error) = replaced {
            if error.kind() == ErrorKind::OutcomeUnknown {
                // Either descriptor is right for what was written and for what comes: this one is that of the chain in use.
                let _ = before.store(self.bundle.folder());
            }
            return Err(error);
        }
        drop(frozen);
        let held = closed.elapsed();
        parent.storage(0).claim(Some(Ownership::Reader))?;
        Ok(self.report(&copier, 1, held, new.depth()))
    }

    fn merge_top(
        &self,
        parent: &Arc<Chain>,
        before: &DiskDescriptor,
        after: &DiskDescriptor,
    ) -> Result<DeleteReport> {
        let (disk, chain) = (self.disk, &*self.chain);
        let new = chain.promoted(parent)?;
        disk.prepare_chain(&new)?;
        let kept = disk.keep_entries();
        // Discards that did not know of it have ended, and what they cleared is durably cleared.
        drop(self.freeze().map_err(not_quiet)?);
        disk.flush()?;
        let changes = disk.watch_changes()?;
        let cluster_bytes = chain.geometry().cluster_bytes();
        let mut copier = Copier::new(disk, (chain, self.child), parent, self.progress)?;
        self.progress.begin("merge", chain.clusters_held(self.child).saturating_mul(cluster_bytes));
        chain.for_each_held(self.child, |cluster, _, _| copier.copy(cluster))?;
        self.progress.end();
        let staged = after.stage(self.bundle.folder()).map_err(at_descriptor(self.bundle))?;
        let mut catching_up = CatchingUp::new(disk, &changes, self.progress, self.options);
        let frozen = catching_up.run(&mut copier, || self.freeze())?;
        let held = {
            copier.hold();
            copier.sweep(&changes)?;
            copier.flush()?;
            check_clean(&changes)?;
            let replaced = frozen.replace_chain(|in_use| {
                check_same(in_use, &self.chain)?;
                staged.commit().map_err(at_descriptor(self.bundle))?;
                Ok(Arc::clone(&new))
            });
            if let Err(error) = replaced {
                return Err(put_back(self.bundle, frozen, before, error));
            }
            kept.end();
            drop(frozen);
            catching_up.held()
        };
        Ok(self.report(&copier, catching_up.passes(), held, new.depth()))
    }
}
