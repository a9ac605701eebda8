//! The ordered stack of deltas, from base to top: where to read a guest byte, and where to write it.
//!
//! Only the top is ever written. [`Chain::map`] reads atomic table entries without a lock. A write to a cluster that
//! the top lacks goes through [`Chain::prepare_write`] and [`PreparedWrite::publish`]; a discard through
//! [`Chain::clear`]. Both change the table in memory at once and the file with the next [`CommitPlan`].
//!
//! What this layer leaves to its caller (the device):
//! * to serialise allocation, discard and copy-up of one cluster, and to write a fresh cluster *whole*, unless it is
//!   [known to be zero](PreparedWrite::known_zero) and [nothing below](Chain::held_below) holds it;
//! * to keep a [`PreparedWrite`] until no write to its place is in flight;
//! * to have one plan at a time, used in the order its module says;
//! * to [release](Chain::release) a cluster that left quarantine only when no request uses its old mapping and a
//!   punch over it has completed.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, Storage};
use crate::mutant::{self, Mutant};
use crate::units::{FileCluster, FileOffset, GuestCluster, GuestOffset, Sectors};

use super::alloc::Taken;
use super::commit::CommitPlan;
use super::delta::{Delta, Image, RepairSummary, Role};
use super::extension::{self, Found};
use super::geometry::{CLUSTER_SECTORS_DEFAULT, Geometry};
use super::header::Header;
use super::holders::{Held, Lookup};

/// Most files of a chain.
pub const DEPTH_MAX: usize = 128;

/// One file of a chain, open.
#[derive(Clone)]
pub struct Source {
    /// How messages name it.
    pub name: PathBuf,
    /// The file, open for writing if it is the top and is to be written.
    pub storage: Arc<dyn Storage>,
    /// Whether it is a raw base. The descriptor or the caller says so; it is never guessed (M5).
    pub raw: bool,
}

/// How to open a chain.
#[derive(Clone, Debug)]
pub struct ChainOptions {
    /// Access to the top; lower deltas are read only.
    pub access: Access,
    /// Cluster of a raw base; when it stands alone 2048 sectors if not given, else that of the images above it.
    pub raw_cluster: Option<Sectors>,
    /// Take the in-use mark of a top that is opened for writing as it is: no tail is cut, no entry cleared, and what
    /// would need that is refused. Without it, such an image is repaired. Locks guard against a live owner, not
    /// this mark. Opening for reading never changes the file.
    pub accept_in_use: bool,
}

/// Where to read guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// In the file of a delta.
    Data {
        /// Its number; the base is 0.
        delta: usize,
        /// Where in its file.
        offset: FileOffset,
        /// For how many bytes; at least 1.
        len: u64,
    },
    /// Nowhere: zeros.
    Zero {
        /// For how many bytes; at least 1.
        len: u64,
    },
}

impl Mapping {
    /// For how many bytes it holds.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Zero { len } => *len,
        }
    }

    /// Never: a mapping holds for at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where to write a cluster.
#[derive(Debug)]
pub enum WriteTarget {
    /// The top has it: here its cluster begins in the top's file.
    InPlace(FileOffset),
    /// The top lacks it: a reserved place.
    Fresh(PreparedWrite),
}

/// A place for a cluster that the top does not hold yet. [`publish`](Self::publish) enters it into the table once its
/// content is complete; dropping it gives the place back. Neither may happen while a write to it is in flight.
#[must_use = "dropping it gives the reserved cluster back"]
pub struct PreparedWrite {
    chain: Arc<Chain>,
    cluster: GuestCluster,
    taken: Taken,
    entry: u32,
    published: bool,
    /// Of a move: where the cluster is until this is published.
    moved_from: Option<FileCluster>,
}

impl PreparedWrite {
    /// On an error the reservation goes back.
    pub(super) fn new(
        chain: &Arc<Chain>,
        cluster: GuestCluster,
        taken: Taken,
        moved_from: Option<FileCluster>,
    ) -> Result<Self> {
        let mut prepared =
            Self { chain: Arc::clone(chain), cluster, taken, entry: 0, published: false, moved_from };
        prepared.entry = chain.geometry.cluster_to_entry(taken.cluster)?;
        Ok(prepared)
    }

    /// Whether it replaces another place that the top has for the cluster.
    pub fn is_move(&self) -> bool {
        self.moved_from.is_some()
    }

    /// The guest cluster it is for.
    pub fn cluster(&self) -> GuestCluster {
        self.cluster
    }

    /// The reserved place, as a cluster of the top's file.
    pub fn place(&self) -> FileCluster {
        self.taken.cluster
    }

    /// Where the cluster begins in the top's file.
    pub fn offset(&self) -> FileOffset {
        if self.taken.reused && mutant::is_active(Mutant::CopyUpMisplaced) {
            return self.taken.tail;
        }
        self.chain.geometry.file_offset(self.taken.cluster)
    }

    /// Whether the place reads as zeros now and after any crash: what is not written need not be zeroed.
    pub fn known_zero(&self) -> bool {
        self.taken.known_zero
    }

    /// Enters the mapping into the table in memory: reads follow it at once. The whole content of the cluster has
    /// been written; the next plan makes it durable.
    pub fn publish(mut self) {
        if let Some(image) = &self.chain.top_delta().image {
            image.bat.publish(self.cluster, self.entry);
            self.published = true;
            if let (Some(from), Some(allocator)) = (self.moved_from, &image.allocator)
                && mutant::is_active(Mutant::ReuseBeforeClearDurable)
            {
                allocator.release(from, false);
            }
        }
    }
}

impl Drop for PreparedWrite {
    fn drop(&mut self) {
        if let Some(Image { allocator: Some(allocator), .. }) = &self.chain.top_delta().image {
            allocator.settle(self.cluster, self.taken.cluster, self.published);
        }
    }
}

impl fmt::Debug for PreparedWrite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PreparedWrite({} at {})", self.cluster, self.offset())
    }
}

/// An open chain. All methods may be called from any thread.
pub struct Chain {
    pub(super) deltas: Vec<Arc<Delta>>,
    pub(super) geometry: Geometry,
    pub(super) writable: bool,
    pub(super) repairs: RepairSummary,
    /// Of a chain with lower deltas.
    pub(super) lookup: Option<Lookup>,
}

impl fmt::Debug for Chain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.deltas.iter().map(|delta| &delta.name)).finish()
    }
}

impl Chain {
    /// Opens the files of a disk, base first. All images have the same version and cluster size (else `Parameter`);
    /// only the base may be raw. A top opened for writing is repaired if it was not closed, and then marked as in
    /// use, durably, before this returns.
    pub fn open(sources: Vec<Source>, options: &ChainOptions) -> Result<Arc<Self>> {
        let chain = Self::open_files(sources, options, false)?;
        if chain.writable {
            chain.mark_open()?;
        }
        Ok(Arc::new(chain))
    }

    /// Opens a damaged chain for reading only, to save what there is: entries that point nowhere are left out,
    /// clusters named twice are read twice. [`repairs`](Self::repairs) says how much that was.
    pub fn open_salvaging(sources: Vec<Source>, raw_cluster: Option<Sectors>) -> Result<Arc<Self>> {
        let options = ChainOptions { access: Access::ReadOnly, raw_cluster, accept_in_use: true };
        Self::open_files(sources, &options, true).map(Arc::new)
    }

    fn open_files(sources: Vec<Source>, options: &ChainOptions, salvage: bool) -> Result<Self> {
        if sources.is_empty() || sources.len() > DEPTH_MAX {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("open disk: {} files where 1 to {DEPTH_MAX} may be", sources.len()),
            )
            .advise("merge snapshots to shorten the chain"));
        }
        if let Some(source) = sources.iter().skip(1).find(|source| source.raw) {
            return Err(
                Error::new(ErrorKind::Parameter, "open disk: only the base may be raw").at_path(&source.name)
            );
        }
        let top = sources.len() - 1;
        let mut repairs = RepairSummary::default();
        let mut deltas: Vec<Delta> = Vec::new();
        // From the top down: the images say in what clusters a raw base is seen.
        for (index, source) in sources.into_iter().enumerate().rev() {
            let role = match options.access {
                _ if index < top => Role::Lower,
                Access::ReadOnly => Role::TopReadOnly,
                Access::ReadWrite => Role::TopReadWrite { repair: !options.accept_in_use },
            };
            let Source { name, storage, raw } = source;
            let above = deltas.last().map(|delta| &delta.geometry);
            let delta = if raw {
                let cluster =
                    raw_cluster(above, options.raw_cluster).map_err(|error| error.at_path(&name))?;
                Delta::open_raw(name, storage, cluster, role)?
            } else {
                let delta = Delta::open_image(name, storage, role, salvage, &mut repairs)?;
                if let Some(above) = above {
                    check_fits(&delta, above)?;
                }
                delta
            };
            if role == Role::Lower && delta.image.as_ref().is_some_and(|image| is_in_use(&image.bat.header()))
            {
                repairs.stale_marks.push(index);
            }
            deltas.push(delta);
        }
        deltas.reverse();
        if let Some(delta) = deltas.last_mut() {
            delta.make_writable(&mut repairs)?;
        }
        let geometry = match deltas.last() {
            Some(delta) => delta.geometry.clone(),
            None => return Err(Error::new(ErrorKind::Parameter, "open disk: no file")),
        };
        let deltas: Vec<Arc<Delta>> = deltas.into_iter().map(Arc::new).collect();
        let lookup = match deltas.as_slice() {
            [lower @ .., _] if !lower.is_empty() => Some(Lookup::build(lower, geometry.entries())?),
            _ => None,
        };
        Ok(Self { deltas, geometry, writable: options.access == Access::ReadWrite, repairs, lookup })
    }

    /// The same files opened anew, as their headers and tables are now; the top stays in use. For changes of size: this
    /// chain does not write to the files any more. The new one puts no cluster before `floor`.
    pub(crate) fn reopened(&self, floor: FileCluster) -> Result<Arc<Self>> {
        let sources = self.deltas.iter().map(|delta| Source {
            name: delta.name.clone(),
            storage: Arc::clone(&delta.storage),
            raw: delta.image.is_none(),
        });
        let options = ChainOptions {
            access: Access::ReadWrite,
            raw_cluster: Some(Sectors(u64::from(self.geometry.cluster_sectors()))),
            accept_in_use: true,
        };
        let chain = Self::open(sources.collect(), &options)?;
        if let Some(Image { allocator: Some(allocator), .. }) = &chain.top_delta().image {
            allocator.reserve_floor(floor);
        }
        Ok(chain)
    }

    pub(super) fn deltas(&self) -> &[Arc<Delta>] {
        &self.deltas
    }

    pub(super) fn top_delta(&self) -> &Delta {
        // A chain has at least one delta: `open_files` refuses an empty list.
        &self.deltas[self.top()]
    }

    /// Sizes of the disk, which are those of the top.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Files in the chain.
    pub fn depth(&self) -> usize {
        self.deltas.len()
    }

    /// Number of the top delta; the base is 0.
    pub fn top(&self) -> usize {
        self.deltas.len().saturating_sub(1)
    }

    /// The file of a delta; `delta` is below [`depth`](Self::depth).
    pub fn storage(&self, delta: usize) -> &Arc<dyn Storage> {
        &self.deltas[delta].storage
    }

    /// How messages name a delta; `delta` is below [`depth`](Self::depth).
    pub fn name(&self, delta: usize) -> &Path {
        &self.deltas[delta].name
    }

    /// Sizes of a delta, which may be smaller than the disk; `delta` is below [`depth`](Self::depth).
    pub fn delta_geometry(&self, delta: usize) -> &Geometry {
        &self.deltas[delta].geometry
    }

    /// The header of a delta as it is now; `None` for a raw base. `delta` is below [`depth`](Self::depth).
    pub fn header(&self, delta: usize) -> Option<Header> {
        self.deltas[delta].image.as_ref().map(|image| image.bat.header())
    }

    /// Whether the top may be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// What opening found and repaired.
    pub fn repairs(&self) -> &RepairSummary {
        &self.repairs
    }

    /// The format extension of a delta. Always absent in a top that is open for writing.
    pub fn extension(&self, delta: usize) -> Result<Found> {
        let delta = &self.deltas[delta];
        let Some(image) = &delta.image else { return Ok(Found::Absent) };
        let failed = |error: Error| error.at_path(&delta.name);
        let file_bytes = delta
            .storage
            .len()
            .map_err(|source| failed(Error::io(ErrorKind::Stat, "read extension", source)))?;
        let mut used = super::alloc::ClusterSet::default();
        image.bat.table().for_each_entry(delta.geometry.entries(), |_, raw| {
            if let Ok(Some(cluster)) = delta.geometry.entry_to_cluster(raw) {
                used.insert(cluster.0);
            }
        });
        extension::load(&delta.storage, &image.bat.header(), file_bytes, &|cluster| used.contains(cluster.0))
            .map_err(failed)
    }

    /// Where to read guest byte `at`, and for how many bytes, at most `len_max` (at least 1), that holds: a run in one
    /// file, or of zeros. Takes no lock. Past the end of the disk there are only zeros.
    pub fn map(&self, at: GuestOffset, len_max: u64) -> Mapping {
        self.map_through(self.deltas.len(), at, len_max)
    }

    /// As [`map`](Self::map), without the top: what a copy-up copies.
    pub fn map_below(&self, at: GuestOffset, len_max: u64) -> Mapping {
        self.map_through(self.top(), at, len_max)
    }

    /// Whether some lower delta holds a cluster, so that without an entry in the top its bytes would be seen.
    pub fn held_below(&self, cluster: GuestCluster) -> bool {
        self.find(self.top(), cluster).is_some()
    }

    /// Where one delta holds a cluster; `delta` is below [`depth`](Self::depth).
    pub fn held_at(&self, delta: usize, cluster: GuestCluster) -> Option<FileOffset> {
        self.deltas[delta].find(cluster).map(|(offset, _)| offset)
    }

    /// The highest of the first `count` deltas that holds a cluster, where, and how many of its bytes are there.
    pub(super) fn find(&self, count: usize, cluster: GuestCluster) -> Option<(usize, FileOffset, u64)> {
        let Some(lookup) = &self.lookup else { return self.walk(count, cluster) };
        let covered = lookup.covered().min(count);
        if let Some(found) = self.walk_range(covered..count, cluster) {
            return Some(found);
        }
        let at = |index: usize| self.deltas[index].find(cluster).map(|(offset, len)| (index, offset, len));
        match lookup.holder(cluster) {
            Held::Nowhere if self.deltas[0].image.is_some() || covered == 0 => None,
            Held::Nowhere => at(0),
            Held::By(index) if index < covered => at(index).or_else(|| self.walk(covered, cluster)),
            Held::By(_) | Held::Unknown => self.walk(covered, cluster),
        }
    }

    /// As [`find`](Self::find), delta by delta.
    pub(super) fn walk(&self, count: usize, cluster: GuestCluster) -> Option<(usize, FileOffset, u64)> {
        self.walk_range(0..count, cluster)
    }

    fn walk_range(&self, range: Range<usize>, cluster: GuestCluster) -> Option<(usize, FileOffset, u64)> {
        let found = |index: usize| self.deltas[index].find(cluster).map(|(offset, len)| (index, offset, len));
        range.rev().find_map(found)
    }

    /// Entries of the longest table of the first `count` deltas.
    fn entries_max(&self, count: usize) -> u32 {
        self.deltas[..count].iter().map(|delta| delta.geometry.entries()).max().unwrap_or(0)
    }

    fn map_through(&self, count: usize, at: GuestOffset, len_max: u64) -> Mapping {
        let len_max = len_max.max(1);
        let cluster_bytes = self.geometry.cluster_bytes();
        if at.0 >= self.geometry.disk_bytes() {
            return Mapping::Zero { len: len_max };
        }
        let limit = len_max.min(self.geometry.disk_bytes() - at.0);
        let (first, within) = self.geometry.guest_cluster(at);
        let mut next = first;
        let mut advance = || {
            next.0 = next.0.checked_add(1)?;
            Some(next)
        };
        match self.find(count, first) {
            // Behind every table there is nothing to look through, however large the header says the disk is.
            None if first.0 >= self.entries_max(count) => Mapping::Zero { len: limit },
            None => {
                let mut run = cluster_bytes - within;
                let entries_max = self.entries_max(count);
                while run < limit
                    && let Some(cluster) = advance()
                    && self.find(count, cluster).is_none()
                {
                    if cluster.0 >= entries_max {
                        return Mapping::Zero { len: limit };
                    }
                    run += cluster_bytes;
                }
                Mapping::Zero { len: run.min(limit) }
            }
            Some((_, _, present)) if within >= present => {
                Mapping::Zero { len: (cluster_bytes - within).min(limit) }
            }
            Some((delta, offset, mut present)) => {
                let mut run = present - within;
                let mut end = offset.0 + cluster_bytes;
                while run < limit
                    && present == cluster_bytes
                    && let Some(cluster) = advance()
                    && let Some((next_delta, next_offset, next_present)) = self.find(count, cluster)
                    && (next_delta, next_offset.0) == (delta, end)
                {
                    run += next_present;
                    end += cluster_bytes;
                    present = next_present;
                }
                Mapping::Data { delta, offset: FileOffset(offset.0 + within), len: run.min(limit) }
            }
        }
    }

    /// Where to write a cluster of the disk. A fresh place is reserved for it; the file grows ahead of need. Fails with
    /// `Busy` while another write to this cluster has a reservation, with `Allocate` when the host is full or the
    /// table cannot point further; the disk is then as it was.
    pub fn prepare_write(self: &Arc<Self>, cluster: GuestCluster) -> Result<WriteTarget> {
        let top = self.top_delta();
        self.prepare(top, cluster).map_err(|error| error.at_path(&top.name).at_cluster(u64::from(cluster.0)))
    }

    fn prepare(self: &Arc<Self>, top: &Delta, cluster: GuestCluster) -> Result<WriteTarget> {
        let past_end = u64::from(cluster.0) * self.geometry.cluster_bytes() >= self.geometry.disk_bytes();
        if past_end || cluster.0 >= self.geometry.entries() {
            return Err(Error::new(ErrorKind::Parameter, "write: the cluster is not on the disk"));
        }
        let (image, allocator) = match &top.image {
            None if self.writable => {
                return Ok(WriteTarget::InPlace(self.geometry.file_offset(FileCluster(cluster.0))));
            }
            Some(image @ Image { allocator: Some(allocator), .. }) => (image, allocator),
            _ => return Err(read_only("write")),
        };
        image.bat.check_open("write")?;
        let entry = || image.bat.table().entry(cluster);
        let in_place = |raw| Ok(WriteTarget::InPlace(self.geometry.entry_offset(raw)));
        match entry() {
            0 => {}
            raw => return in_place(raw),
        }
        let Some(taken) = allocator.take(&top.storage, cluster, || entry() != 0)? else {
            return in_place(entry());
        };
        let prepared = PreparedWrite::new(self, cluster, taken, None)?;
        Ok(WriteTarget::Fresh(prepared))
    }

    /// From now on the top takes no space that would leave its host's file system less than `bytes` free: it fails as on a
    /// full host then. A raw top does not ask for space.
    pub fn keep_host_free(&self, bytes: u64) {
        if let Some(Image { allocator: Some(allocator), .. }) = &self.top_delta().image {
            allocator.keep_host_free(bytes);
        }
    }

    /// Discards a cluster: its entry is cleared in memory and its place in the file quarantined. `false` if there is
    /// nothing to do: the top does not hold it, or a lower delta does, whose bytes would come back (the caller writes
    /// zeros then).
    pub fn clear(&self, cluster: GuestCluster) -> Result<bool> {
        let top = self.top_delta();
        let Some(image) = &top.image else { return Ok(false) };
        if self.held_below(cluster) || cluster.0 >= self.geometry.entries() {
            return Ok(false);
        }
        let cleared = image
            .bat
            .clear(cluster)
            .map_err(|error| error.at_path(&top.name).at_cluster(u64::from(cluster.0)))?;
        if let (Some(place), Some(allocator)) = (cleared, &image.allocator)
            && mutant::is_active(Mutant::ReuseBeforeClearDurable)
        {
            allocator.release(place, false);
        }
        Ok(cleared.is_some())
    }

    /// Mappings published or cleared that are not durable yet.
    pub fn pending(&self) -> usize {
        self.top_delta().image.as_ref().map_or(0, |image| image.bat.pending())
    }

    /// Whether the file has grown since the last plan that was committed. Until the next one, fresh clusters are not
    /// known to be zero and partial writes to them cost a whole cluster: a reason to flush early.
    pub fn has_unsynced_growth(&self) -> bool {
        match &self.top_delta().image {
            Some(Image { allocator: Some(allocator), .. }) => allocator.has_unsynced_growth(),
            _ => false,
        }
    }

    /// Copies the table sectors that changed: everything published or cleared so far, nothing later. The previous
    /// plan has gone back to [`committed`](Self::committed) or [`failed`](Self::failed).
    pub fn seal(&self) -> CommitPlan {
        match &self.top_delta().image {
            Some(Image { bat, allocator: Some(allocator), .. }) => bat.seal(allocator.sync_mark()),
            _ => CommitPlan::default(),
        }
    }

    /// The plan is durable: the sync before it, its writes and the sync behind them have succeeded. Returns the clusters
    /// that leave quarantine: to be punched once no request uses them, then [released](Self::release).
    ///
    /// An empty plan may come back without any sync: nothing is concluded from it.
    pub fn committed(&self, plan: CommitPlan) -> Vec<FileCluster> {
        let top = self.top_delta();
        let Some(Image { bat, allocator: Some(allocator), .. }) = &top.image else { return Vec::new() };
        let sync_mark = (!plan.is_empty()).then_some(plan.sync_mark);
        let cleared = bat.committed(plan);
        if let Some(sync_mark) = sync_mark {
            allocator.synced(&top.storage, sync_mark);
        }
        cleared
    }

    /// Gives a cluster that left quarantine back to the pool. `punched`: a punch over it has completed, so it will be
    /// known to be zero after the next group of flushes.
    pub fn release(&self, cluster: FileCluster, punched: bool) {
        if let Some(Image { allocator: Some(allocator), .. }) = &self.top_delta().image {
            allocator.release(cluster, punched);
        }
    }

    /// The plan failed at some step: what the file holds is not known. Its changes are pending again and the chain
    /// takes no more writes, discards or a clean close (E1).
    pub fn failed(&self, plan: CommitPlan) {
        if let Some(image) = &self.top_delta().image {
            image.bat.failed(plan);
        }
    }

    /// Sets the in-use mark of the top and drops its extension, durably. [`open`](Self::open) has done so.
    pub fn mark_open(&self) -> Result<()> {
        let top = self.top_delta();
        match &top.image {
            _ if !self.writable => Err(read_only("set the in-use mark").at_path(&top.name)),
            Some(image) => image.bat.mark_open(&top.storage).map_err(|error| error.at_path(&top.name)),
            None => Ok(()),
        }
    }

    /// Closes the top after the last commit: cuts its unused tail, syncs, clears the in-use mark, syncs. Fails with
    /// `Busy` while something is pending or reserved. After any error the mark is still set. A chain that is open
    /// for reading has nothing to close.
    pub fn close(&self) -> Result<()> {
        let top = self.top_delta();
        let close = || match &top.image {
            _ if !self.writable => Ok(()),
            Some(Image { bat, allocator: Some(allocator), .. }) => {
                if bat.pending() > 0 || !allocator.close() {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        "close the image: writes to it are not finished",
                    ));
                }
                bat.close(&top.storage)
            }
            _ => top
                .storage
                .sync_data()
                .map_err(|source| Error::io(ErrorKind::Sync, "close the image", source)),
        };
        close().map_err(|error| error.at_path(&top.name))
    }

    /// Clusters that the top holds; of a raw top, all.
    pub fn allocated_clusters(&self) -> u64 {
        match &self.top_delta().image {
            Some(image) => image.bat.allocated(),
            None => u64::from(self.geometry.entries()),
        }
    }
}

fn read_only(operation: &str) -> Error {
    Error::new(ErrorKind::Write, format!("{operation}: the image is open for reading only"))
}

fn is_in_use(header: &Header) -> bool {
    header.in_use() == super::header::InUse::Open
}

/// The cluster in which a raw base is seen.
fn raw_cluster(above: Option<&Geometry>, asked: Option<Sectors>) -> Result<Sectors> {
    let above = above.map(|geometry| Sectors(u64::from(geometry.cluster_sectors())));
    match (above, asked) {
        (Some(above), Some(asked)) if above != asked => Err(Error::new(
            ErrorKind::Parameter,
            format!("open disk: a raw base in clusters of {asked} under images with clusters of {above}"),
        )),
        (Some(cluster), _) | (None, Some(cluster)) => Ok(cluster),
        (None, None) => Ok(Sectors(u64::from(CLUSTER_SECTORS_DEFAULT))),
    }
}

/// All images of a chain have the same version and cluster size.
pub(super) fn check_fits(delta: &Delta, above: &Geometry) -> Result<()> {
    let own = &delta.geometry;
    if (own.version(), own.cluster_sectors()) == (above.version(), above.cluster_sectors()) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Parameter,
        format!(
            "open disk: version {} with clusters of {} sectors under version {} with clusters of {} sectors",
            own.version(),
            own.cluster_sectors(),
            above.version(),
            above.cluster_sectors()
        ),
    )
    .at_path(&delta.name)
    .advise("this file belongs to another disk, or a conversion was cut"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::delta::{CreateOptions, create_image};
    use crate::format::geometry::Version;
    use crate::format::testing::{content, file_of, flush, guest_content, image, open, set_entry, small};
    use crate::io::StorageExt;
    use crate::io::sim::SimStorage;

    const CLUSTER: u64 = 4096;

    /// Writes a whole cluster of one byte, as the device does.
    fn write(chain: &Arc<Chain>, cluster: u32, byte: u8) {
        let storage = chain.storage(chain.top());
        match chain.prepare_write(GuestCluster(cluster)).unwrap() {
            WriteTarget::InPlace(offset) => storage.write_all_at(offset.0, &[byte; 4096]).unwrap(),
            WriteTarget::Fresh(prepared) => {
                storage.write_all_at(prepared.offset().0, &[byte; 4096]).unwrap();
                prepared.publish();
            }
        }
    }

    fn fresh(chain: &Arc<Chain>, cluster: u32) -> PreparedWrite {
        match chain.prepare_write(GuestCluster(cluster)).unwrap() {
            WriteTarget::Fresh(prepared) => prepared,
            WriteTarget::InPlace(_) => panic!("the top holds it"),
        }
    }

    fn map(chain: &Chain, at: u64, len: u64) -> Mapping {
        chain.map(GuestOffset(at), len)
    }

    fn data(delta: usize, offset: u64, len: u64) -> Mapping {
        Mapping::Data { delta, offset: FileOffset(offset), len }
    }

    #[test]
    fn runs_are_as_long_as_they_are_contiguous() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        for cluster in [3, 4, 5, 9, 6] {
            write(&chain, cluster, 1);
        }
        assert_eq!(map(&chain, 0, u64::MAX), Mapping::Zero { len: 3 * CLUSTER });
        assert_eq!(map(&chain, 100, 200), Mapping::Zero { len: 200 });
        assert_eq!(map(&chain, 3 * CLUSTER, u64::MAX), data(0, CLUSTER, 3 * CLUSTER));
        assert_eq!(map(&chain, 3 * CLUSTER + 5, CLUSTER), data(0, CLUSTER + 5, CLUSTER));
        assert_eq!(map(&chain, 6 * CLUSTER, u64::MAX), data(0, 5 * CLUSTER, CLUSTER));
        assert_eq!(map(&chain, 9 * CLUSTER, u64::MAX), data(0, 4 * CLUSTER, CLUSTER));
        assert_eq!(map(&chain, 10 * CLUSTER, u64::MAX), Mapping::Zero { len: 10 * CLUSTER });
        assert_eq!(map(&chain, 20 * CLUSTER, 7), Mapping::Zero { len: 7 });
        assert_eq!(map(&chain, u64::MAX, 0), Mapping::Zero { len: 1 });
    }

    /// Found by a fuzzer: it took a quarter of a minute.
    #[test]
    fn a_disk_far_larger_than_its_table_is_looked_through_at_once() {
        let file = image(20);
        file.write_all_at(36, &(1u64 << 45).to_le_bytes()).unwrap();
        let chain = open(&[&file], Access::ReadOnly).unwrap();
        let disk_bytes = chain.geometry().disk_bytes();
        assert_eq!(disk_bytes, 1 << 54);
        let started = std::time::Instant::now();
        assert_eq!(map(&chain, 0, u64::MAX), Mapping::Zero { len: disk_bytes });
        assert_eq!(map(&chain, disk_bytes - 5, u64::MAX), Mapping::Zero { len: 5 });
        assert!(started.elapsed().as_secs() < 10, "it looked at every cluster");
    }

    #[test]
    fn lower_deltas_show_through_also_when_they_are_smaller() {
        let raw = file_of(&[7; 3 * 4096 + 512]);
        let (middle, top) = (image(8), image(20));
        let source = |name: &str, file: &SimStorage, raw| Source {
            name: name.into(),
            storage: Arc::new(file.clone()),
            raw,
        };
        {
            let sources = vec![source("raw", &raw, true), source("middle", &middle, false)];
            let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false };
            let chain = Chain::open(sources, &options).unwrap();
            assert!(chain.held_below(GuestCluster(3)) && !chain.held_below(GuestCluster(4)));
            write(&chain, 1, 1);
            write(&chain, 6, 2);
            flush(&chain);
            chain.close().unwrap();
        }
        let sources =
            vec![source("raw", &raw, true), source("middle", &middle, false), source("top", &top, false)];
        let options =
            ChainOptions { access: Access::ReadWrite, raw_cluster: Some(Sectors(8)), accept_in_use: false };
        let chain = Chain::open(sources, &options).unwrap();
        assert_eq!((chain.depth(), chain.top(), chain.name(1)), (3, 2, Path::new("middle")));
        assert_eq!(map(&chain, 0, u64::MAX), data(0, 0, CLUSTER));
        assert_eq!(map(&chain, CLUSTER, u64::MAX), data(1, CLUSTER, CLUSTER));
        assert_eq!(map(&chain, 2 * CLUSTER, u64::MAX), data(0, 2 * CLUSTER, CLUSTER + 512));
        assert_eq!(map(&chain, 3 * CLUSTER + 512, u64::MAX), Mapping::Zero { len: CLUSTER - 512 });
        assert_eq!(map(&chain, 4 * CLUSTER, u64::MAX), Mapping::Zero { len: 2 * CLUSTER });
        assert_eq!(map(&chain, 6 * CLUSTER, u64::MAX), data(1, 2 * CLUSTER, CLUSTER));
        assert_eq!(map(&chain, 7 * CLUSTER, u64::MAX), Mapping::Zero { len: 13 * CLUSTER });
        write(&chain, 1, 9);
        assert_eq!(map(&chain, CLUSTER, u64::MAX), data(2, CLUSTER, CLUSTER));
        assert_eq!(chain.map_below(GuestOffset(CLUSTER), u64::MAX), data(1, CLUSTER, CLUSTER));
        assert!(!chain.clear(GuestCluster(1)).unwrap(), "its old bytes would come back");
        assert!(!chain.clear(GuestCluster(7)).unwrap(), "there is nothing to clear");
        assert_eq!(chain.pending(), 1);
    }

    #[test]
    fn the_part_of_a_cluster_past_a_smaller_disk_is_zeros() {
        let base = image(4);
        {
            let chain = open(&[&base], Access::ReadWrite).unwrap();
            write(&chain, 3, 5);
            flush(&chain);
            chain.close().unwrap();
        }
        // Another writer's disk that ends inside its last cluster.
        base.write_all_at(36, &(3 * 8 + 3u64).to_le_bytes()).unwrap();
        let chain = open(&[&base, &image(10)], Access::ReadOnly).unwrap();
        assert_eq!(map(&chain, 3 * CLUSTER, u64::MAX), data(0, CLUSTER, 3 * 512));
        assert_eq!(map(&chain, 3 * CLUSTER + 3 * 512, u64::MAX), Mapping::Zero { len: 5 * 512 });
        assert!(chain.held_below(GuestCluster(3)));
    }

    #[test]
    fn a_dropped_reservation_leaves_no_trace() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        let prepared = fresh(&chain, 5);
        assert_eq!((prepared.cluster(), prepared.offset()), (GuestCluster(5), FileOffset(CLUSTER)));
        assert_eq!(chain.prepare_write(GuestCluster(5)).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(chain.close().unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(map(&chain, 5 * CLUSTER, 1), Mapping::Zero { len: 1 });
        drop(prepared);
        assert_eq!((chain.pending(), chain.allocated_clusters()), (0, 0));
        assert_eq!(fresh(&chain, 6).offset(), FileOffset(CLUSTER));
        chain.close().unwrap();
        assert_eq!(file.len().unwrap(), CLUSTER);
    }

    #[test]
    fn a_cleared_cluster_is_reused_only_after_its_release() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 0, 1);
        write(&chain, 1, 2);
        flush(&chain);
        assert!(chain.clear(GuestCluster(0)).unwrap());
        assert!(!chain.clear(GuestCluster(0)).unwrap());
        assert_eq!(map(&chain, 0, 1), Mapping::Zero { len: 1 });
        write(&chain, 2, 3);
        assert_eq!(map(&chain, 2 * CLUSTER, 1), data(0, 3 * CLUSTER, 1), "the clearing is not durable");
        let plan = chain.seal();
        write(&chain, 3, 4);
        assert_eq!(map(&chain, 3 * CLUSTER, 1), data(0, 4 * CLUSTER, 1), "nor now");
        assert_eq!(chain.committed(plan), [FileCluster(1)]);
        write(&chain, 4, 5);
        assert_eq!(map(&chain, 4 * CLUSTER, 1), data(0, 5 * CLUSTER, 1), "requests may still use it");
        chain.release(FileCluster(1), true);
        let reused = fresh(&chain, 5);
        assert_eq!(
            (reused.offset(), reused.known_zero()),
            (FileOffset(CLUSTER), false),
            "the punch is not durable"
        );
        assert_eq!(chain.allocated_clusters(), 4);
    }

    #[test]
    fn closing_forgets_clusters_that_were_not_released() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 0, 1);
        write(&chain, 1, 1);
        flush(&chain);
        assert!(chain.clear(GuestCluster(1)).unwrap());
        assert_eq!(flush(&chain), [FileCluster(2)]);
        chain.close().unwrap();
        assert_eq!(file.len().unwrap(), 2 * CLUSTER);
    }

    #[test]
    fn a_full_host_is_told_and_leaves_a_sound_image() {
        let file = image(100);
        file.disk().set_capacity(Some(3 * CLUSTER));
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 0, 1);
        write(&chain, 1, 2);
        let error = chain.prepare_write(GuestCluster(2)).unwrap_err();
        assert!(error.is_out_of_space());
        assert_eq!((error.kind(), error.context().cluster), (ErrorKind::Allocate, Some(2)));
        assert!(error.advice().is_some());
        write(&chain, 1, 3);
        flush(&chain);
        chain.close().unwrap();
        let seen = guest_content(&open(&[&file], Access::ReadOnly).unwrap());
        assert_eq!((seen[0], seen[4096], seen[8192]), (1, 3, 0));
    }

    #[test]
    fn after_a_failed_plan_only_reads_go_on() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        write(&chain, 0, 1);
        let plan = chain.seal();
        chain.failed(plan);
        assert_eq!(map(&chain, 0, 1), data(0, CLUSTER, 1));
        assert!(
            chain.prepare_write(GuestCluster(0)).is_err() && chain.prepare_write(GuestCluster(1)).is_err()
        );
        assert!(chain.clear(GuestCluster(0)).is_err() && chain.close().is_err());
        assert_eq!(chain.pending(), 1);
        assert_eq!(content(&file)[44..48], 0x746F_6E59u32.to_le_bytes());
    }

    #[test]
    fn reading_chains_cannot_be_written() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadOnly).unwrap();
        assert!(!chain.is_writable());
        assert_eq!(chain.prepare_write(GuestCluster(0)).unwrap_err().kind(), ErrorKind::Write);
        assert!(chain.mark_open().is_err());
        assert!(!chain.clear(GuestCluster(0)).unwrap_or(false));
        assert!(chain.seal().is_empty());
        chain.close().unwrap();
    }

    #[test]
    fn clusters_off_the_disk_are_refused() {
        let file = image(20);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        for cluster in [20, u32::MAX] {
            assert_eq!(chain.prepare_write(GuestCluster(cluster)).unwrap_err().kind(), ErrorKind::Parameter);
            assert!(!chain.clear(GuestCluster(cluster)).unwrap());
            assert!(!chain.held_below(GuestCluster(cluster)));
        }
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        let other = |version, cluster: u64| {
            let geometry = Geometry::for_testing(version, Sectors(cluster), Sectors(cluster * 20)).unwrap();
            let file = file_of(&[]);
            create_image(&file, &CreateOptions { geometry, preallocated: false }).unwrap();
            file
        };
        for base in [other(Version::V1, 8), other(Version::V2, 16)] {
            let error = open(&[&base, &image(20)], Access::ReadWrite).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Parameter);
        }
        assert_eq!(open(&[], Access::ReadOnly).unwrap_err().kind(), ErrorKind::Parameter);
        let many: Vec<_> = (0..=DEPTH_MAX).map(|_| image(1)).collect();
        assert!(open(&many[..DEPTH_MAX].iter().collect::<Vec<_>>(), Access::ReadOnly).is_ok());
        assert!(open(&many.iter().collect::<Vec<_>>(), Access::ReadOnly).is_err());
        let options =
            ChainOptions { access: Access::ReadOnly, raw_cluster: Some(Sectors(16)), accept_in_use: false };
        let source = |raw| Source { name: "x".into(), storage: Arc::new(image(20)), raw };
        assert!(Chain::open(vec![source(false), source(true)], &options).is_err());
        assert!(
            Chain::open(vec![source(true), source(false)], &options).is_err(),
            "another cluster was asked for"
        );
    }

    #[test]
    fn odd_images_of_version_1_are_written_in_step() {
        let geometry = Geometry::from_header(Version::V1, 63, 630, 10, 1024).unwrap();
        let mut raw = crate::format::Header::create(&small(10)).unwrap().raw().clone();
        raw.signature = crate::format::header::SIGNATURE_V1;
        (raw.cluster_sectors, raw.disk_sectors, raw.data_offset_sectors) = (63, 630, 2);
        let file = file_of(&raw.encode());
        let cluster_bytes = 63 * 512;
        file.set_len(1024 + 2 * cluster_bytes).unwrap();
        set_entry(&file, 4, 2 + 63);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        assert_eq!(chain.geometry(), &geometry);
        assert_eq!(map(&chain, 4 * cluster_bytes, 1), data(0, 1024 + cluster_bytes, 1));
        assert_eq!(fresh(&chain, 0).offset(), FileOffset(1024), "the free cluster before it");
        for (cluster, place) in [(0, 0), (9, 2)] {
            let prepared = fresh(&chain, cluster);
            assert_eq!(prepared.offset(), FileOffset(1024 + place * cluster_bytes));
            prepared.publish();
        }
        flush(&chain);
        chain.close().unwrap();
        assert_eq!(file.len().unwrap(), 1024 + 3 * cluster_bytes);
        assert_eq!(content(&file)[64..68], 2u32.to_le_bytes());
    }

    #[test]
    fn threads_allocate_disjoint_clusters() {
        let file = image(400);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let chain = &chain;
                scope.spawn(move || {
                    for cluster in (u32::from(thread)..400).step_by(4) {
                        write(chain, cluster, thread + 1);
                        map(chain, 0, u64::MAX);
                    }
                });
            }
            for _ in 0..20 {
                flush(&chain);
            }
        });
        flush(&chain);
        chain.close().unwrap();
        let seen = guest_content(&open(&[&file], Access::ReadOnly).unwrap());
        assert!(
            seen.chunks(4096)
                .zip(0usize..)
                .all(|(bytes, cluster)| { bytes.iter().all(|&byte| usize::from(byte) == cluster % 4 + 1) })
        );
    }
}
