//! Compaction: clusters from the end of the file move into free places further ahead, and the free end is cut off.
//!
//! The plan is the same for a closed and for a running disk. A file of `n` clusters in use needs no place past the
//! first `n`: this is the *limit*. Whatever lies past it moves below it, the highest first, so that the end becomes
//! free from behind and a cut operation has already given back what it moved.
//!
//! Per cluster (crash model, section 5): copy to a free place, sync, rewrite the one entry, sync; only then may the old
//! place be used again. Syncs are shared by many clusters. The file is cut only past the highest place that a durable
//! entry names. A crash leaves each cluster at its old or its new place and some leaks; the same command goes on.
//!
//! On a running disk each move is a request like a guest's ([`Op::Relocate`](crate::device::Op)): it waits for the
//! requests on its one cluster, and they for it. The guest may take free places meanwhile or free others; then the plan
//! is made again, a few times at most.
//!
//! Only the top of a chain is compacted: what lies below may have other children and is never written (I7).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{Client, Destination, Disk, Op};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, ChainOptions, DiskDescriptor, Source};
use crate::io::{Access, Folder, IoBuf, StorageExt, best_io_queue};
use crate::mutant::{Mutant, is_active};
use crate::ops::image_files::remove_obsolete;
use crate::ops::open::{Bundle, OpenOptions, Place, open_for_work, place};
use crate::ops::progress::Progress;
use crate::units::{FileCluster, GuestCluster};

/// Clusters looked for in one scan of the table: half a MiB of memory.
const BATCH_CLUSTERS: usize = 1 << 16;
/// Bytes of a closed image that are moved between two groups of syncs.
const COMMIT_BYTES: u64 = 64 << 20;
/// Bytes of a cluster that are copied at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// Moves of a running disk in flight.
const MOVES_IN_FLIGHT: u32 = 4;
/// Bytes of a running disk that are moved between two flushes.
const FLUSH_BYTES: u64 = 256 << 20;
/// How often the plan for a running disk is made.
const PLANS_MAX: usize = 8;

/// What to compact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactOptions {
    /// The closed disk: a descriptor, its folder, or an image that needs no other. Says nothing for a running disk.
    #[serde(skip)]
    pub path: PathBuf,
    /// Be content when the file has become shorter by this many bytes; as short as possible if none.
    #[serde(default)]
    pub free_bytes: Option<u64>,
}

/// What compaction has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactReport {
    /// The image file: the top of the chain.
    pub image: PathBuf,
    /// Whether the disk was in use meanwhile.
    pub running: bool,
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// Clusters that the image holds.
    pub allocated_clusters: u64,
    /// Clusters that were moved.
    pub moved_clusters: u64,
    /// Length of the file in bytes, before and after.
    pub file_bytes_before: u64,
    /// See `file_bytes_before`.
    pub file_bytes_after: u64,
    /// What the file takes on the host in bytes, before and after.
    pub host_bytes_before: u64,
    /// See `host_bytes_before`.
    pub host_bytes_after: u64,
    /// Whether everything lies where it was to go. A guest that writes a lot may keep some at the end.
    pub complete: bool,
}

/// Compacts a closed disk. Fails with [`ErrorKind::InUse`] if somebody has it; with `Cancelled` when `progress` says so:
/// what was moved by then is moved, the image is closed.
pub fn compact(options: &CompactOptions, progress: &dyn Progress) -> Result<CompactReport> {
    let (opened, _lock) = open_for_work(&OpenOptions::new(&options.path, Access::ReadWrite))?;
    if let Place::Bundle(folder) = place(&options.path)? {
        let mut bundle = Bundle::open(&folder)?;
        remove_obsolete(&bundle.folder, &mut bundle.descriptor)?;
    }
    compact_chain(&opened.chain, options, progress)
}

/// As [`compact`], in an open folder whose disk nobody else uses; the folder of `options` is only for messages.
pub fn compact_in(
    folder: &dyn Folder,
    options: &CompactOptions,
    progress: &dyn Progress,
) -> Result<CompactReport> {
    let mut descriptor = DiskDescriptor::load(folder, Some(&options.path))?;
    remove_obsolete(folder, &mut descriptor)?;
    let images = descriptor.chain_for(descriptor.top_guid())?;
    let mut sources = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let access = if number + 1 == images.len() { Access::ReadWrite } else { Access::ReadOnly };
        let (None, name) = image.place() else {
            return Err(Error::new(ErrorKind::Parameter, "compact: an image lies in another folder"));
        };
        let storage = folder.open(name, access).map_err(|cause| {
            Error::io(ErrorKind::Open, "compact: open an image", cause).at_path(options.path.join(name))
        })?;
        let raw = number == 0 && descriptor.is_raw();
        sources.push(Source { name: options.path.join(name), storage, raw });
    }
    let raw_cluster = descriptor.is_raw().then(|| descriptor.cluster_sectors());
    let chain_options = ChainOptions { access: Access::ReadWrite, raw_cluster, accept_in_use: false };
    compact_chain(&Chain::open(sources, &chain_options)?, options, progress)
}

/// Compacts the top of a chain that nobody else uses, and closes it.
fn compact_chain(
    chain: &Arc<Chain>,
    options: &CompactOptions,
    progress: &dyn Progress,
) -> Result<CompactReport> {
    let mut report = begin(chain, false)?;
    let plan = Plan::make(chain, options);
    let moved = move_closed(chain, &plan, &mut report, progress);
    // A failed sync has ended all writing, and the mark stays set. Anything else leaves an image that can be closed.
    let closed = chain.close();
    moved?;
    closed?;
    report.complete = Plan::make(chain, options).clusters == 0;
    end(chain, &mut report)?;
    Ok(report)
}

/// Compacts the top of a running disk while its guest goes on, with a queue of its own.
pub fn compact_running(
    disk: &Arc<Disk>,
    options: &CompactOptions,
    progress: &dyn Progress,
) -> Result<CompactReport> {
    let queue = best_io_queue(2 * MOVES_IN_FLIGHT)
        .map_err(|cause| Error::io(ErrorKind::System, "start a queue for the compaction", cause))?;
    compact_with(&mut Client::new(disk, queue)?, options, progress)
}

/// As [`compact_running`], through a client of the disk.
pub fn compact_with(
    client: &mut Client,
    options: &CompactOptions,
    progress: &dyn Progress,
) -> Result<CompactReport> {
    let disk = Arc::clone(client.disk());
    if disk.is_read_only() {
        return Err(Error::new(ErrorKind::Parameter, "compact: the disk is mounted read-only"));
    }
    if disk.keeps_entries() {
        return Err(Error::new(
            ErrorKind::Busy,
            "compact: a snapshot is being deleted, or its deletion was cut",
        )
        .advise("delete the snapshot first"));
    }
    let chain = disk.chain();
    let mut report = begin(&chain, true)?;
    // What was freed before is free only once that is durable.
    disk.flush()?;
    disk.settle_freed()?;
    let mut plan = Plan::make(&chain, options);
    progress.begin("move clusters", plan.clusters.saturating_mul(report.cluster_bytes));
    let mut outcome = Ok(());
    for _ in 0..PLANS_MAX {
        let before = report.moved_clusters;
        outcome = move_running(client, &chain, &plan, &mut report, progress);
        disk.flush()?;
        disk.settle_freed()?;
        let left = plan.again(&chain);
        report.complete = left.clusters == 0;
        if outcome.is_err() || report.complete || report.moved_clusters == before {
            break;
        }
        plan = left;
    }
    // Also after a cancellation: what was moved shall have been of use.
    disk.cut_tail()?;
    disk.flush()?;
    outcome?;
    progress.end();
    end(&chain, &mut report)?;
    Ok(report)
}

/// The figures before.
fn begin(chain: &Chain, running: bool) -> Result<CompactReport> {
    let image = chain.name(chain.top()).to_path_buf();
    if chain.geometry().is_raw() {
        return Err(Error::new(ErrorKind::Parameter, "compact: a raw disk has nothing to move")
            .at_path(image)
            .advise("trim its file system: a hole in a raw disk takes no space"));
    }
    let (file_bytes_before, host_bytes_before) = sizes(chain)?;
    Ok(CompactReport {
        image,
        running,
        cluster_bytes: chain.geometry().cluster_bytes(),
        file_bytes_before,
        host_bytes_before,
        ..CompactReport::default()
    })
}

/// The figures after.
fn end(chain: &Chain, report: &mut CompactReport) -> Result<()> {
    (report.file_bytes_after, report.host_bytes_after) = sizes(chain)?;
    report.allocated_clusters = chain.allocated_clusters();
    Ok(())
}

/// Length of the top's file and what it takes on the host, in bytes.
fn sizes(chain: &Chain) -> Result<(u64, u64)> {
    let top = chain.top();
    let storage = chain.storage(top);
    let sizes = || Ok((storage.len()?, storage.allocated_bytes()?));
    sizes().map_err(|cause| {
        Error::io(ErrorKind::Stat, "compact: measure the image", cause).at_path(chain.name(top))
    })
}

/// What is to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Nothing shall lie at or past this place.
    limit: FileCluster,
    /// How many clusters do.
    clusters: u64,
}

impl Plan {
    fn make(chain: &Chain, options: &CompactOptions) -> Self {
        let geometry = chain.geometry();
        let (mut allocated, mut end) = (0_u32, 0_u32);
        chain.for_each_place(|_, place| {
            allocated = allocated.saturating_add(1);
            end = end.max(place.0.saturating_add(1));
        });
        let dense = geometry.first_data_cluster().0.saturating_add(allocated);
        let wanted = options.free_bytes.map_or(0, |bytes| {
            let clusters = bytes.div_ceil(geometry.cluster_bytes());
            end.saturating_sub(u32::try_from(clusters).unwrap_or(u32::MAX))
        });
        Self { limit: FileCluster(dense.max(wanted)), clusters: 0 }.again(chain)
    }

    /// The same limit, unless the disk now holds more than fits below it; what is left to do.
    fn again(self, chain: &Chain) -> Self {
        let (mut allocated, mut clusters) = (0_u32, 0);
        chain.for_each_place(|_, place| {
            allocated = allocated.saturating_add(1);
            clusters += u64::from(place >= self.limit);
        });
        let dense = FileCluster(chain.geometry().first_data_cluster().0.saturating_add(allocated));
        if dense <= self.limit {
            return Self { clusters, ..self };
        }
        clusters = 0;
        chain.for_each_place(|_, place| clusters += u64::from(place >= dense));
        Self { limit: dense, clusters }
    }

    /// The clusters with the highest places at or past the limit and below `end`, highest first.
    fn batch(&self, chain: &Chain, end: FileCluster) -> Vec<(FileCluster, GuestCluster)> {
        let mut found = BinaryHeap::new();
        chain.for_each_place(|cluster, place| {
            if place >= self.limit && place < end {
                found.push(Reverse((place, cluster)));
                if found.len() > BATCH_CLUSTERS {
                    found.pop();
                }
            }
        });
        // Ascending in reverse: the highest place first.
        found.into_sorted_vec().into_iter().map(|Reverse(entry)| entry).collect()
    }

    fn destination(&self) -> Destination {
        Destination::Below(self.limit)
    }
}

/// Moves what the plan says in a closed image, in groups of syncs.
fn move_closed(
    chain: &Arc<Chain>,
    plan: &Plan,
    report: &mut CompactReport,
    progress: &dyn Progress,
) -> Result<()> {
    let cluster_bytes = report.cluster_bytes;
    let piece_bytes = usize::try_from(cluster_bytes.min(PIECE_BYTES)).unwrap_or(usize::MAX);
    let mut piece = IoBuf::try_zeroed(piece_bytes)
        .map_err(|cause| Error::io(ErrorKind::Memory, "compact: no memory", cause))?;
    progress.begin("move clusters", plan.clusters.saturating_mul(cluster_bytes));
    let mut end = FileCluster(u32::MAX);
    let mut outcome = Ok(());
    let mut uncommitted_bytes = 0;
    'all: loop {
        let batch = plan.batch(chain, end);
        let Some(&(last, _)) = batch.last() else { break };
        end = last;
        for (_, cluster) in batch {
            match move_one(chain, cluster, plan.destination(), &mut piece) {
                Ok(moved) => report.moved_clusters += u64::from(moved),
                Err(error) => outcome = Err(error),
            }
            uncommitted_bytes += cluster_bytes;
            outcome = outcome.and_then(|()| progress.advance(cluster_bytes));
            if outcome.is_err() || uncommitted_bytes >= COMMIT_BYTES {
                uncommitted_bytes = 0;
                commit(chain)?;
            }
            if outcome.is_err() {
                break 'all;
            }
        }
    }
    commit(chain)?;
    outcome?;
    progress.end();
    Ok(())
}

/// Copies one cluster and enters its new place; whether there was one.
fn move_one(
    chain: &Arc<Chain>,
    cluster: GuestCluster,
    destination: Destination,
    piece: &mut IoBuf,
) -> Result<bool> {
    let Some((prepared, from)) = chain.prepare_move(cluster, destination)? else { return Ok(false) };
    let top = chain.top();
    let storage = chain.storage(top);
    let (to, end) = (prepared.offset().0, chain.geometry().cluster_bytes());
    let mut done = 0;
    while done < end {
        let len = usize::try_from(end - done).unwrap_or(usize::MAX).min(piece.len());
        let bytes = &mut piece.as_mut_slice()[..len];
        let failed = |kind, operation, offset| {
            move |cause| {
                Error::io(kind, operation, cause)
                    .at_path(chain.name(top))
                    .at_offset(offset)
                    .at_cluster(u64::from(cluster.0))
            }
        };
        storage.read_exact_at(from.0 + done, bytes).map_err(failed(
            ErrorKind::Relocation,
            "compact: read a cluster",
            from.0 + done,
        ))?;
        if !(prepared.known_zero() && crate::io::buffer::is_zero(bytes)) {
            storage.write_all_at(to + done, bytes).map_err(failed(
                ErrorKind::Relocation,
                "compact: write a cluster",
                to + done,
            ))?;
        }
        done += len as u64;
    }
    prepared.publish();
    Ok(true)
}

/// One group: content, then the table, each synced (4.2). What was freed lies at the end of the file and is cut off by
/// the close; it needs no punch.
fn commit(chain: &Chain) -> Result<()> {
    if chain.pending() == 0 {
        return Ok(());
    }
    let top = chain.top();
    let storage = chain.storage(top);
    let plan = chain.seal();
    let is_early = [Mutant::TableBeforeContentSync, Mutant::NoContentSync, Mutant::SingleSync]
        .into_iter()
        .any(is_active);
    let synced = if is_early { Ok(()) } else { storage.sync_data() };
    let written = synced
        .map_err(|cause| (ErrorKind::Sync, "compact: sync the image", cause))
        .and_then(|()| {
            plan.writes
                .iter()
                .try_for_each(|(offset, bytes)| storage.write_all_at(offset.0, bytes))
                .map_err(|cause| (ErrorKind::Write, "compact: write the table", cause))
        })
        .and_then(|()| {
            if is_active(Mutant::CutBeforeTableSync) {
                return Ok(());
            }
            storage.sync_data().map_err(|cause| (ErrorKind::Sync, "compact: sync the table", cause))
        });
    match written {
        Ok(()) => {
            for place in chain.committed(plan) {
                chain.release(place, false);
            }
            Ok(())
        }
        Err((kind, operation, cause)) => {
            chain.failed(plan);
            Err(Error::io(kind, operation, cause)
                .at_path(chain.name(top))
                .advise("look at the host's storage, check the image, then run the same command again"))
        }
    }
}

/// Moves what the plan says on a running disk. Ends early, without an error, when the guest has taken the free places.
fn move_running(
    client: &mut Client,
    chain: &Arc<Chain>,
    plan: &Plan,
    report: &mut CompactReport,
    progress: &dyn Progress,
) -> Result<()> {
    let mut moves = Moves { in_flight: VecDeque::new(), unflushed_bytes: 0 };
    let mut outcome = Ok(true);
    let mut end = FileCluster(u32::MAX);
    'all: loop {
        let batch = plan.batch(chain, end);
        let Some(&(last, _)) = batch.last() else { break };
        end = last;
        for (_, cluster) in batch {
            if moves.in_flight.len() >= MOVES_IN_FLIGHT as usize {
                outcome = moves.finish_one(client, chain, plan, report, progress);
                if !matches!(outcome, Ok(true)) {
                    break 'all;
                }
            }
            let extent = chain.geometry().cluster_extent(cluster);
            let id = client.submit(Op::Relocate(plan.destination()), extent, None);
            moves.in_flight.push_back((id, cluster));
        }
    }
    while !moves.in_flight.is_empty() {
        let finished = moves.finish_one(client, chain, plan, report, progress);
        outcome = outcome.and_then(|so_far| finished.map(|has_room| so_far && has_room));
    }
    outcome.map(drop)
}

/// Moves on their way.
struct Moves {
    in_flight: VecDeque<(u64, GuestCluster)>,
    unflushed_bytes: u64,
}

impl Moves {
    /// Waits for the oldest; false when there was no room for it.
    fn finish_one(
        &mut self,
        client: &mut Client,
        chain: &Chain,
        plan: &Plan,
        report: &mut CompactReport,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let Some((id, cluster)) = self.in_flight.pop_front() else { return Ok(true) };
        if let Err(errno) = client.wait_for(id)?.result {
            let cause = std::io::Error::from_raw_os_error(errno);
            return Err(Error::io(ErrorKind::Relocation, "compact: move a cluster", cause)
                .at_path(chain.name(chain.top()))
                .at_cluster(u64::from(cluster.0))
                .advise("the disk goes on as it is; the kernel's messages tell about the host's storage"));
        }
        // Discarded meanwhile is as good as moved.
        let is_low = chain.place_of(cluster).is_none_or(|place| plan.destination().contains(place));
        report.moved_clusters += u64::from(is_low);
        self.unflushed_bytes += report.cluster_bytes;
        if self.unflushed_bytes >= FLUSH_BYTES {
            self.unflushed_bytes = 0;
            client.disk().flush()?;
        }
        progress.advance(report.cluster_bytes)?;
        Ok(is_low)
    }
}

#[cfg(test)]
mod tests;
