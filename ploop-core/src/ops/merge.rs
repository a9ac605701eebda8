//! Merging: images that stand on each other become one.
//!
//! The usual merge copies down into the lowest image of a range. Its order is that of the crash model, section 5:
//!
//! 1. the descriptor marks all but the highest as being merged: they can no longer be used;
//! 2. the lowest gets the size of the highest, if that differs ([`fitting`]);
//! 3. what the others hold is copied into it, content before pointer, in groups;
//! 4. it is synced and closed;
//! 5. **commit**: the descriptor names it as the image of the highest state;
//! 6. the other files are removed.
//!
//! Until 5 the others still shadow all that changes below them, so what a guest sees is the same at every instant.
//! Undoing is impossible once 3 began; `complete_in`, which every later command on the snapshots of the disk runs
//! first, goes on from 3. A merge into a new file changes none of the old ones until its commit, and is forgotten
//! when cut before.
//!
//! [`MergeCopy`] is step 3 by itself: the server of a running disk uses it on images that its guest no longer writes.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    self, Chain, DESCRIPTOR_NAME, DiskDescriptor, Guid, MergeInto, Source, Transition, create_image,
};
use crate::io::{Access, Folder, Storage, ownership};
use crate::mutant::{self, Mutant};
use crate::ops::agreement;
use crate::ops::descriptor_lock::DescriptorLock;
use crate::ops::image_files::{
    LockedFolder, check_free, create_file, is_shared, open_chain, open_image, remove_early, remove_obsolete,
    source,
};
use crate::ops::open::{Place, place};
use crate::ops::progress::Progress;

pub(crate) mod copy;
pub mod files;
pub(crate) mod fitting;

pub use copy::{CopyStep, MergeCopy, Wins};
pub use files::{MergeFilesOptions, MergeFilesReport, merge_files};

/// What to merge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeOptions {
    /// The state to merge into the one below it; the current state if none is named.
    pub snapshot: Option<Guid>,
    /// The other end of a range: everything from the one to the other becomes one.
    pub other: Option<Guid>,
    /// Everything under the current state.
    pub all: bool,
    /// Merge into a new file of this name and leave the old ones as they are until it is complete.
    pub new_file: Option<String>,
}

/// What was merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeReport {
    /// The state that remains.
    pub state: Option<Guid>,
    /// The states that were merged into it.
    pub merged: Vec<Guid>,
    /// The image that holds it now.
    pub file: String,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// The command found a merge that had been cut, and finished it.
    pub resumed: bool,
}

/// Merges images of the closed disk at `path`, a descriptor or its folder.
pub fn merge(
    path: &std::path::Path,
    options: &MergeOptions,
    lock_timeout: Duration,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    let bundle = OpenBundle::open(path, lock_timeout)?;
    merge_in(&bundle.folder, options, progress).map_err(|error| error.at_path(&bundle.path))
}

/// What a merge is made for: what is remembered of it until its files are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The same merge again finds itself done.
    Merge,
    /// The same deletion again finds itself done; a merge into what remains is another operation.
    Delete,
}

/// The folder of a closed disk, and the lock on its descriptor.
pub(crate) struct OpenBundle {
    pub(crate) folder: LockedFolder,
    pub(crate) path: PathBuf,
    _lock: DescriptorLock,
}

impl OpenBundle {
    /// Locks the disk at `path` against other commands.
    pub(crate) fn open(path: &std::path::Path, lock_timeout: Duration) -> Result<Self> {
        let Place::Bundle(path) = place(path)? else {
            return Err(Error::new(ErrorKind::Parameter, "only a disk with a descriptor has snapshots")
                .at_path(path)
                .advise(format!("give its {DESCRIPTOR_NAME} or its folder")));
        };
        let folder = LockedFolder::open(&path)?;
        let lock = DescriptorLock::take(&path.join(DESCRIPTOR_NAME), lock_timeout)?;
        Ok(Self { folder, path, _lock: lock })
    }
}

/// As [`merge`], in an open folder that no other command works on.
pub fn merge_in(folder: &dyn Folder, options: &MergeOptions, progress: &dyn Progress) -> Result<MergeReport> {
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    agreement::require(folder, &descriptor)?;
    let completed = complete_in(folder, &mut descriptor, Asked::Merge, progress)?;
    let top = descriptor.top_guid();
    let named = options.snapshot.unwrap_or(top);
    // The same command again, after a crash: what it asked for is done.
    let is_done = |report: &MergeReport| {
        let gone = |guid: Guid| report.merged.contains(&guid);
        options.all
            || report.state == Some(named) && options.other.is_none_or(gone)
            || gone(named) && options.other == report.state
    };
    if let Some(report) = completed.into_iter().find(is_done)
        && (!options.all || descriptor.chain_for(top)?.len() == 1)
    {
        return Ok(report);
    }
    let (lower, upper) = range_of(&descriptor, options, named)?;
    if let Some(file) = &options.new_file {
        return merge_into_new(folder, &mut descriptor, lower, upper, file, progress);
    }
    merge_range(folder, &mut descriptor, (lower, upper), (Wins::Source, Asked::Merge), progress)
}

/// The lowest and the highest state that the options mean.
fn range_of(descriptor: &DiskDescriptor, options: &MergeOptions, named: Guid) -> Result<(Guid, Guid)> {
    let below = |guid: Guid| {
        let shot = descriptor.shot(guid).ok_or_else(|| no_snapshot(guid))?;
        if shot.parent() == Guid::NONE {
            return Err(Error::new(ErrorKind::Parameter, format!("merge {guid}: nothing lies below it"))
                .advise("a state is merged into the one that it stands on; `ploop snapshot-list --tree` shows which"));
        }
        Ok(shot.parent())
    };
    if options.all {
        if options.snapshot.is_some() || options.other.is_some() {
            return Err(Error::new(ErrorKind::Parameter, "merge: all of it, or a snapshot; not both"));
        }
        let top = descriptor.top_guid();
        below(top)?;
        return Ok((descriptor.base_guid()?, top));
    }
    match options.other {
        None => Ok((below(named)?, named)),
        Some(other) if descriptor.range(other, named).is_ok() => Ok((other, named)),
        Some(other) => descriptor.range(named, other).map(|_| (named, other)),
    }
}

fn no_snapshot(guid: Guid) -> Error {
    Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {guid}"))
        .advise("`ploop snapshot-list` shows the snapshots of the disk")
}

/// Files of a range of states, open and locked.
struct Range {
    /// Lowest first.
    sources: Vec<Source>,
    merged: Vec<Guid>,
    on_nothing: bool,
}

/// Opens the images from `lower` to `upper`, the `written`-th of them for writing.
fn open_range(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    lower: Guid,
    upper: Guid,
    written: Option<usize>,
) -> Result<Range> {
    let mut merged: Vec<Guid> = descriptor.range(lower, upper)?.iter().map(|shot| shot.guid()).collect();
    let mut sources = Vec::new();
    for (number, &guid) in merged.iter().enumerate() {
        let image = descriptor.image(guid).ok_or_else(|| no_snapshot(guid))?;
        let access = if written == Some(number) { Access::ReadWrite } else { Access::ReadOnly };
        sources.push(source(descriptor, image, open_image(folder, image.file(), access)?));
    }
    let on_nothing = descriptor.shot(lower).is_some_and(|shot| shot.parent() == Guid::NONE);
    merged.pop();
    Ok(Range { sources, merged, on_nothing })
}

fn again(source: &Source) -> Source {
    Source { name: source.name.clone(), storage: Arc::clone(&source.storage), raw: source.raw }
}

/// Merges `upper` and all between down into the file of `lower` ([`Wins::Source`]), or `lower` up into the file of
/// `upper` that stands on it ([`Wins::Target`]). What was done of it before is done once more.
pub(crate) fn merge_range(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    (lower, upper): (Guid, Guid),
    (wins, asked): (Wins, Asked),
    progress: &dyn Progress,
) -> Result<MergeReport> {
    let mut finished = descriptor.clone();
    let into = if wins == Wins::Source { MergeInto::Lower } else { MergeInto::Upper };
    finished.finish_merge(lower, upper, into)?;
    if asked == Asked::Delete {
        finished.was_a_deletion(upper);
    }
    let count = descriptor.range(lower, upper)?.len();
    let written = if wins == Wins::Source { 0 } else { count.saturating_sub(1) };
    // Opened first: whoever has one of them open keeps us from changing anything.
    let mut range = open_range(folder, descriptor, lower, upper, Some(written)).map_err(|error| {
        not_into_shared(folder, descriptor, if written == 0 { lower } else { upper }, error)
    })?;
    let target = range.sources.remove(written);
    let others = range.sources.iter().map(again).collect();
    let source = open_chain(descriptor, others, Access::ReadOnly)?;
    let before = open_chain(descriptor, vec![again(&target)], Access::ReadOnly)?;
    check_sizes(&before, &source, wins)?;
    if wins == Wins::Source {
        check_cut(folder, descriptor, (lower, upper), &before, &source)?;
    }
    drop(before);
    let disk = source.geometry().disk_sectors();
    if wins == Wins::Source {
        let mut marked = descriptor.clone();
        marked.begin_merge(lower, upper)?;
        // Also where it says so already: the sync of the run that was cut may have failed.
        if !mutant::is_active(Mutant::MergeUnmarked) {
            marked.store(folder)?;
        }
        *descriptor = marked;
    }
    if wins == Wins::Source && target.raw {
        let bytes = source.geometry().disk_bytes();
        fitting::fit_raw(&*target.storage, bytes).map_err(|error| going_on(error, &target.name))?;
    }
    let name = target.name.clone();
    let mut target = open_chain(descriptor, vec![target], Access::ReadWrite)?;
    if wins == Wins::Source {
        target = fitting::fit(target, disk, progress).map_err(|error| going_on(error, &name))?;
    }
    if mutant::is_active(Mutant::CommitBeforeMerge) {
        finished.store(folder)?;
    }
    let copied_bytes = run_copy(&target, &source, wins, range.on_nothing, progress)
        .map_err(|error| going_on(error, target.name(0)))?;
    drop(target);
    drop(source);
    remove_early(folder, &finished);
    finished.store(folder)?;
    *descriptor = finished;
    remove_obsolete(folder, descriptor)?;
    let file = descriptor.image(upper).map(|image| image.file().to_owned()).unwrap_or_default();
    Ok(MergeReport { state: Some(upper), merged: range.merged, file, copied_bytes, resumed: false })
}

/// Says how to merge all the same what clones share.
fn not_into_shared(folder: &dyn Folder, descriptor: &DiskDescriptor, target: Guid, error: Error) -> Error {
    let image = descriptor.image(target).filter(|_| error.kind() == ErrorKind::InUse);
    let storage = image.and_then(|image| open_image(folder, image.file(), Access::ReadOnly).ok());
    if storage.is_some_and(|storage| is_shared(&*storage)) {
        return error.advise(
            "clones share the image, and it is never changed: merge into a new file (snapshot-merge -n NAME), or delete \
             the clones first",
        );
    }
    error
}

fn going_on(error: Error, name: &std::path::Path) -> Error {
    let error = error.at_path(name);
    if error.advice().is_some() {
        return error;
    }
    error.advise("the disk is whole; run the same command again: the merge goes on and cannot be undone")
}

/// The images are of one disk: a parent of another one is not written, nor given another size. And an upward merge, which
/// only other programs begin, has a target that is large enough.
fn check_sizes(target: &Chain, source: &Chain, wins: Wins) -> Result<()> {
    let (own, other) = (target.geometry().cluster_sectors(), source.geometry().cluster_sectors());
    if own != other {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("merge: the image has clusters of {own} sectors, what is merged into it of {other}"),
        )
        .at_path(target.name(0))
        .advise("it is of another disk: put the right file in its place; nothing was changed"));
    }
    let (to, from) = (target.geometry().disk_bytes(), source.geometry().disk_bytes());
    if wins == Wins::Source || to >= from {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Parameter,
        format!("merge: the upper image is of {to} bytes, the lower, which goes into it, of {from}"),
    )
    .at_path(target.name(0))
    .advise("finish the merge with the program that began it"))
}

/// Before images that are larger than the highest are cut: nobody else shows what goes.
fn check_cut(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    (lower, upper): (Guid, Guid),
    target: &Chain,
    source: &Chain,
) -> Result<()> {
    let disk = source.geometry().disk_bytes();
    let is_larger = (0..source.top()).any(|delta| source.delta_geometry(delta).disk_bytes() > disk);
    if target.geometry().disk_bytes() <= disk && !is_larger {
        return Ok(());
    }
    fitting::check_nothing_shows(folder, descriptor, (lower, upper), false)
}

/// Copies and closes the target.
fn run_copy(
    target: &Arc<Chain>,
    source: &Arc<Chain>,
    wins: Wins,
    on_nothing: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut copy = MergeCopy::new(Arc::clone(target), Arc::clone(source), wins, on_nothing)?;
    progress.begin("merge", copy.total_bytes());
    loop {
        let step = copy.step()?;
        if step.is_last {
            break;
        }
        progress.advance(step.bytes)?;
    }
    copy.finish()?;
    target.close()?;
    progress.end();
    Ok(copy.copied_bytes())
}

/// Merges a range into a new file. Until the descriptor names it, nothing has changed.
pub(crate) fn merge_into_new(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    lower: Guid,
    upper: Guid,
    file: &str,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    if file.contains('/') {
        return Err(Error::new(ErrorKind::Parameter, format!("merge: {file:?} is not the name of a file"))
            .advise("the new file lies in the folder of the disk: give its name alone"));
    }
    let mut announced = descriptor.clone();
    announced.announce(file)?;
    let mut finished = announced.clone();
    finished.finish_merge(lower, upper, MergeInto::New(file))?;
    check_free(folder, file)?;
    let range = open_range(folder, descriptor, lower, upper, None)?;
    let old = range.sources.first().map(|source| Arc::clone(&source.storage));
    let source = open_chain(descriptor, range.sources, Access::ReadOnly)?;
    check_cut(folder, descriptor, (lower, upper), &source, &source)?;
    announced.store(folder)?;
    *descriptor = announced;
    let built = build_new(folder, &source, old.as_deref(), file, range.on_nothing, progress);
    let copied_bytes = match built {
        Ok(copied_bytes) => copied_bytes,
        Err(error) => {
            // Nothing has changed but that file, which goes now or with the next command.
            return Err(match remove_obsolete(folder, descriptor) {
                Ok(()) => error,
                Err(_) => {
                    error.advise("nothing was merged; the next snapshot command removes the unfinished file")
                }
            });
        }
    };
    drop(source);
    finished.store(folder)?;
    *descriptor = finished;
    remove_obsolete(folder, descriptor)?;
    Ok(MergeReport {
        state: Some(upper),
        merged: range.merged,
        file: file.to_owned(),
        copied_bytes,
        resumed: false,
    })
}

fn build_new(
    folder: &dyn Folder,
    source: &Arc<Chain>,
    old: Option<&dyn Storage>,
    file: &str,
    on_nothing: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let storage = create_file(folder, file)?;
    if let Some(old) = old {
        ownership::copy(old, &*storage).map_err(|error| {
            Error::io(ErrorKind::System, "merge: keep owner and mode of the image", error).at_path(file)
        })?;
    }
    let geometry = source.geometry().for_child()?;
    create_image(&*storage, &format::CreateOptions { geometry, preallocated: false })
        .map_err(|error| error.at_path(file))?;
    let target = Chain::open(
        vec![Source { name: file.into(), storage, raw: false }],
        &format::ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false },
    )?;
    let copied_bytes = run_copy(&target, source, Wins::Source, on_nothing, progress)?;
    folder.sync().map_err(|error| Error::io(ErrorKind::Sync, "merge: sync the folder", error))?;
    Ok(copied_bytes)
}

/// Finishes what earlier commands, ours or others', left half done: removes files that nobody needs, and goes on with
/// merges that were cut, as if they had been begun for what is `asked` now. Plain `Temporary` marks are left to [`delete`](crate::ops::snapshot_delete).
pub(crate) fn complete_in(
    folder: &dyn Folder,
    descriptor: &mut DiskDescriptor,
    asked: Asked,
    progress: &dyn Progress,
) -> Result<Vec<MergeReport>> {
    let mut reports = Vec::new();
    if let Some((&state, merged)) = descriptor.gone().split_last()
        && let Some(image) = descriptor.image(state)
        // Else a state was removed or switched away from, and nothing merged.
        && !merged.is_empty()
    {
        reports.push(MergeReport {
            state: Some(state),
            merged: merged.to_vec(),
            file: image.file().to_owned(),
            copied_bytes: 0,
            resumed: true,
        });
    }
    remove_obsolete(folder, descriptor)?;
    while let Some((lower, upper, wins)) = cut_merge(descriptor)? {
        let report = merge_range(folder, descriptor, (lower, upper), (wins, asked), progress)?;
        reports.push(MergeReport { resumed: true, ..report });
    }
    Ok(reports)
}

/// A merge that was begun and not finished: from where to where, and who wins.
fn cut_merge(descriptor: &DiskDescriptor) -> Result<Option<(Guid, Guid, Wins)>> {
    let transition = |guid: Guid| descriptor.shot(guid).and_then(|shot| shot.transition());
    let cut = descriptor.shots().iter().find(|shot| {
        let is_cut = shot.transition().is_some_and(|transition| !transition.is_readable());
        // The lowest of a run of images that are merged at once.
        is_cut
            && !(transition(shot.guid()) == Some(Transition::Merging)
                && transition(shot.parent()) == Some(Transition::Merging))
    });
    let Some(cut) = cut else { return Ok(None) };
    let lower = cut.guid();
    let mut upper = lower;
    let mut seen = BTreeSet::new();
    loop {
        let mut children = descriptor.children(upper);
        let (Some(child), None) = (children.next(), children.next()) else {
            return Err(Error::new(
                ErrorKind::Descriptor,
                format!("a merge of {lower} was cut, and not one state stands on {upper}"),
            )
            .advise("restore the descriptor from a copy; the images are as they were"));
        };
        upper = child.guid();
        if !seen.insert(upper) {
            return Err(Error::new(ErrorKind::Descriptor, format!("the shots go in a circle at {upper}")));
        }
        if transition(lower) != Some(Transition::Merging) || transition(upper) != Some(Transition::Merging) {
            break;
        }
    }
    // In the other implementation's upward merge the files have been exchanged: the upper state now has the large old
    // base, in which what the other one holds was cleared.
    let wins = match transition(lower) {
        Some(Transition::TemporaryZeroSwap) => Wins::Target,
        _ => Wins::Source,
    };
    Ok(Some((lower, upper, wins)))
}

#[cfg(test)]
mod tests;
