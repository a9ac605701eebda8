//! A closed disk gets another size: image (or raw file) and descriptor. File systems and partitions inside are the
//! caller's: grown afterwards, shrunk before.
//!
//! Only the top of a chain changes. The images below it may belong to other disks as well; they keep their sizes, each
//! snapshot the one that its image says. What a smaller one lacks reads as zeros; what a larger one holds past the end of
//! the top is hidden by clusters of zeros when the top grows ([`format::sizes`](crate::format::sizes)).
//!
//! Steps and recovery are those of section 5 of the crash model ([`device::growing`](crate::device::growing) does those
//! in the image):
//!
//! * larger: move what is in the way, empty the room of the longer table, **the header**, then the descriptor;
//! * smaller: **the descriptor**, then clear the entries past the end, then the header; on snapshots the header, then
//!   the slots of the entries past the end.
//!
//! The same command, given again, finishes what was cut. Between header and descriptor the image counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::device::growing::{self, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::CLUSTER_SECTORS_DEFAULT;
use crate::format::{
    Chain, ChainOptions, DESCRIPTOR_NAME, DiskDescriptor, Geometry, InUse, Mode, Probe, ResizePlan, Source,
    probe, scrub_slots,
};
use crate::io::file::{Caching, DirectoryFolder};
use crate::io::{Access, Allocation, Folder};
use crate::mutant::{self, Mutant};
use crate::ops::agreement::Accepted;
use crate::ops::descriptor_lock::{DescriptorLock, lock_timeout};
use crate::ops::guest_bytes::GuestBytes;
use crate::ops::image_files::remove_obsolete;
use crate::ops::open::{self, OpenOptions, Which};
use crate::ops::progress::Progress;
use crate::units::{FileCluster, SECTOR_BYTES, Sectors};

/// What may happen to what lies past the end of a smaller disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// The disk must not become smaller.
    Refuse,
    /// Nothing but zeros may lie there.
    IfEmpty,
    /// It goes. The caller has seen to it that it holds nothing of value: the file system ends before it.
    Discard,
}

/// What to resize, and to what.
#[derive(Clone, Debug)]
pub struct ResizeOptions {
    /// A descriptor, its folder, or a single image.
    pub path: PathBuf,
    /// The new size, rounded up to whole clusters.
    pub disk: Sectors,
    /// Whether it may become smaller.
    pub shrink: Shrink,
    /// The image is raw, in clusters of this size. For a file without descriptor; a descriptor says so itself.
    pub raw_cluster: Option<Sectors>,
    /// Contradictions between descriptor and image that are settled with this: the disk has the new size afterwards.
    pub accepted: Accepted,
    /// How long to wait for the descriptor's lock.
    pub lock_timeout: Duration,
}

impl ResizeOptions {
    /// Makes the disk at `path` larger.
    pub fn new(path: impl Into<PathBuf>, disk: Sectors) -> Self {
        Self {
            path: path.into(),
            disk,
            shrink: Shrink::Refuse,
            raw_cluster: None,
            accepted: Accepted::default(),
            lock_timeout: lock_timeout(),
        }
    }
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResizeReport {
    /// The descriptor, if there is one.
    pub descriptor: Option<PathBuf>,
    /// The image that has another size now: the top.
    pub image: PathBuf,
    /// Size of the disk before, in bytes, as its image said.
    pub disk_bytes_before: u64,
    /// Size of the disk now, in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Clusters that were moved because they lay in the way of the longer table.
    pub moved_clusters: u64,
    /// Clusters past the new end whose content is gone.
    pub freed_clusters: u64,
    /// Length of the image file in bytes.
    pub file_bytes: u64,
    /// Whether anything had to be changed.
    pub changed: bool,
}

/// Resizes a closed disk. Fails with `InUse` while it is served, with `Parameter` beyond a limit and where data past the
/// new end are not accounted for; nothing is changed then.
pub fn resize(options: &ResizeOptions, progress: &dyn Progress) -> Result<ResizeReport> {
    let mut locked = open::lock(&OpenOptions {
        which: Which::Path(options.path.clone()),
        raw_cluster: options.raw_cluster,
        accepted: options.accepted,
        caching: Caching::Cached,
        lock_timeout: options.lock_timeout,
        ..OpenOptions::new(options.path.clone(), Access::ReadWrite)
    })?;
    if let Some(bundle) = &mut locked.bundle {
        remove_obsolete(&bundle.folder, &mut bundle.descriptor)?;
    }
    let bundle =
        locked.bundle.as_ref().map(|bundle| (&bundle.folder as &dyn Folder, bundle.descriptor.clone()));
    let mut report = resize_files(bundle, &locked.sources, options, progress)?;
    if locked.bundle.is_some() {
        report.descriptor = Some(locked.folder_path.join(DESCRIPTOR_NAME));
    }
    Ok(report)
}

/// As [`resize`], for the bundle in an open folder; `options.path` is only for messages. Takes no locks.
pub fn resize_in(
    folder: &dyn Folder,
    options: &ResizeOptions,
    progress: &dyn Progress,
) -> Result<ResizeReport> {
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    remove_obsolete(folder, &mut descriptor)?;
    let images = descriptor.chain_for(descriptor.top_guid())?;
    let raw = descriptor.is_raw();
    let mut sources = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let access = if number + 1 == images.len() { Access::ReadWrite } else { Access::ReadOnly };
        let name = options.path.join(image.file());
        let storage = folder
            .open(image.file(), access)
            .map_err(|cause| Error::io(ErrorKind::Open, "open image", cause).at_path(&name))?;
        sources.push(Source { name, storage, raw: number == 0 && raw });
    }
    resize_files(Some((folder, descriptor)), &sources, options, progress)
}

/// Writes the size of a disk into its descriptor, `path`: the last step for a disk that has grown while it was served.
/// Nothing is written to one that says so already.
pub fn record_size(path: &Path, disk: Sectors) -> Result<()> {
    let _lock = DescriptorLock::take(path, lock_timeout())?;
    let folder = DirectoryFolder::open(path.parent().unwrap_or(Path::new(".")))?;
    let mut descriptor = DiskDescriptor::load(&folder, path.parent())?;
    if descriptor.disk_sectors() == disk {
        return Ok(());
    }
    descriptor.set_disk_sectors(disk)?;
    descriptor.store(&folder)
}

/// What an image says of itself before anything is changed.
struct Present {
    geometry: Geometry,
    /// It was not closed: an earlier run was cut, or somebody else died.
    unclean: bool,
}

fn look(top: &Source, raw_cluster: Sectors) -> Result<Present> {
    let failed = |error: Error| error.at_path(&top.name);
    if top.raw {
        let len = top
            .storage
            .len()
            .map_err(|cause| failed(Error::io(ErrorKind::Stat, "resize: measure the raw disk", cause)))?;
        return Ok(Present { geometry: Geometry::raw(raw_cluster, len).map_err(failed)?, unclean: false });
    }
    match probe(&top.storage).map_err(failed)? {
        Probe::Image(header) => {
            Ok(Present { geometry: header.geometry().clone(), unclean: header.in_use() == InUse::Open })
        }
        Probe::NotAnImage => Err(failed(
            Error::new(ErrorKind::Corrupt, "resize: this is not a ploop image")
                .advise("if it is a raw disk, say so: -f raw"),
        )),
    }
}

fn resize_files(
    bundle: Option<(&dyn Folder, DiskDescriptor)>,
    sources: &[Source],
    options: &ResizeOptions,
    progress: &dyn Progress,
) -> Result<ResizeReport> {
    let Some(top) = sources.last() else {
        return Err(Error::new(ErrorKind::Descriptor, "resize: the disk has no image").at_path(&options.path));
    };
    let raw_cluster = bundle
        .as_ref()
        .map(|(_, descriptor)| descriptor.cluster_sectors())
        .or(options.raw_cluster)
        .unwrap_or(Sectors(u64::from(CLUSTER_SECTORS_DEFAULT)));
    let present = look(top, raw_cluster)?;
    let disk = present.geometry.rounded(options.disk);
    let wanted = present.geometry.resized(disk).map_err(|error| error.at_path(&top.name))?;
    let before = present.geometry.disk_bytes();
    if wanted.disk_bytes() < before && options.shrink == Shrink::Refuse {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("the disk has {before} bytes already, more than the {} asked for", wanted.disk_bytes()),
        )
        .at_path(&top.name)
        .advise("growing cannot make a disk smaller; nothing was changed"));
    }
    let mut descriptor_is_stale = false;
    if let Some((_, descriptor)) = &bundle {
        descriptor_is_stale = descriptor.disk_sectors() != disk;
    }
    let mut report = ResizeReport {
        descriptor: None,
        image: top.name.clone(),
        disk_bytes_before: before,
        disk_bytes: wanted.disk_bytes(),
        cluster_bytes: wanted.cluster_bytes(),
        moved_clusters: 0,
        freed_clusters: 0,
        file_bytes: 0,
        changed: wanted.disk_bytes() != before || descriptor_is_stale,
    };
    let store = || match bundle.clone() {
        Some((folder, mut descriptor)) if descriptor_is_stale => {
            descriptor.set_disk_sectors(disk)?;
            descriptor.store(folder)
        }
        _ => Ok(()),
    };
    if top.raw {
        round_length(top)?;
    }
    if mutant::is_active(Mutant::LargerBeforeImage) {
        store()?;
    }
    if wanted.disk_bytes() != before || present.unclean {
        let chain = Chain::open(
            sources.to_vec(),
            &ChainOptions {
                access: Access::ReadWrite,
                raw_cluster: sources.first().filter(|base| base.raw).map(|_| raw_cluster),
                accept_in_use: false,
            },
        )?;
        let preallocate = sources.len() == 1
            && bundle.as_ref().is_some_and(|(_, descriptor)| descriptor.mode() == Mode::Preallocated);
        let prepared = chain.plan_resize(disk, preallocate).and_then(|plan| {
            if wanted.disk_bytes() < before {
                account_for_the_rest(&chain, &plan, options.shrink)?;
                // The commit point of a disk that becomes smaller.
                if !mutant::is_active(Mutant::SmallerBeforeDescriptor) {
                    store()?;
                }
            }
            Ok(plan)
        });
        let done = match prepared {
            Err(error) => Err(closed_after(&chain, error)),
            // What was not closed is repaired by now.
            Ok(_) if wanted.disk_bytes() == before => finish_cut(&chain),
            Ok(plan) => {
                report.moved_clusters = plan.moves.len() as u64;
                report.freed_clusters = plan.freed.len() as u64;
                change(&chain, &plan, progress)
            }
        };
        done?;
    }
    // The last step of a disk that becomes larger.
    store()?;
    report.file_bytes = top
        .storage
        .len()
        .map_err(|cause| Error::io(ErrorKind::Stat, "resize: measure the image", cause).at_path(&top.name))?;
    Ok(report)
}

/// Makes the length of a raw file whole sectors: a crash while it changed may have left anything.
fn round_length(top: &Source) -> Result<()> {
    let failed = |cause| {
        Error::io(ErrorKind::Truncate, "resize: make the raw disk whole sectors", cause).at_path(&top.name)
    };
    let len = top.storage.len().map_err(failed)?;
    if len.is_multiple_of(SECTOR_BYTES) {
        return Ok(());
    }
    top.storage.set_len(len.next_multiple_of(SECTOR_BYTES)).map_err(failed)
}

/// Fails unless what lies past the new end may go.
fn account_for_the_rest(chain: &Chain, plan: &ResizePlan, shrink: Shrink) -> Result<()> {
    if shrink == Shrink::Discard {
        return Ok(());
    }
    let (end, old_end) = (plan.geometry.disk_bytes(), chain.geometry().disk_bytes());
    let Some(found) = GuestBytes::of(chain).first_data(end, old_end)? else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Parameter,
        format!("the disk holds data past its new end, byte {end}: at byte {found}"),
    )
    .at_path(chain.name(chain.top()))
    .advise("shrink what is on the disk first; nothing was changed"))
}

/// Closes an image that has its size already and was not closed: the run that gave it that size may have been cut.
fn finish_cut(chain: &Chain) -> Result<()> {
    if chain.top() == 0 {
        return chain.close();
    }
    let failed = |error: Error| error.at_path(chain.name(chain.top()));
    scrub_slots(&**chain.storage(chain.top()), chain.geometry()).map_err(failed)?;
    chain.reopened(FileCluster(0))?.close()
}

/// Closes an image that nothing was done to, after `error`.
fn closed_after(chain: &Chain, error: Error) -> Error {
    match chain.close() {
        Ok(()) => error,
        Err(closing) => error.advise(format!("the image could not be closed either ({closing}): check it")),
    }
}

/// Tells the progress of the moves.
struct Forward<'a>(&'a dyn Progress);

impl Watch for Forward<'_> {
    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.0.advance(bytes)
    }
}

/// The steps in the image, and its clean end.
fn change(chain: &Chain, plan: &ResizePlan, progress: &dyn Progress) -> Result<()> {
    progress.begin("move clusters", plan.moved_bytes());
    let resized = match growing::apply(chain, plan, &mut Forward(progress)) {
        Ok(resized) => resized,
        Err(cut) if cut.poisoned => return Err(cut.error),
        Err(cut) => return Err(closed_after(chain, cut.error)),
    };
    progress.end();
    give_back(&resized, plan)?;
    resized.close()
}

/// Gives the blocks of clusters back that no entry names any more. Those at the end of the file go with its tail.
pub(crate) fn give_back(chain: &Chain, plan: &ResizePlan) -> Result<()> {
    let storage = chain.storage(chain.top());
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &place in &plan.freed {
        if place.0 < plan.geometry.first_data_cluster().0 {
            continue;
        }
        let (start, end) = (plan.geometry.file_offset(place).0, plan.geometry.file_end(place).0);
        match runs.last_mut() {
            Some((_, run_end)) if *run_end == start => *run_end = end,
            _ => runs.push((start, end)),
        }
    }
    for (start, end) in runs {
        match storage.allocate(start, end - start, Allocation::Punch) {
            Ok(()) => {}
            // The host keeps the blocks; nothing else is wrong.
            Err(cause)
                if cause.kind() == std::io::ErrorKind::Unsupported
                    || cause.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                break;
            }
            Err(cause) => {
                return Err(Error::io(ErrorKind::Write, "give the blocks of freed clusters back", cause)
                    .at_path(chain.name(chain.top()))
                    .at_offset(start)
                    .advise("the disk has its new size; check the image"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
