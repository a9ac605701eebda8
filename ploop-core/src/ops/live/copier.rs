//! Moves what one delta holds into the delta below it, for a merge.
//!
//! The parent is written as any image is: content, then a sync, then its table, then a sync (I3). A cluster that the
//! parent lacks is written whole and entered into its table once all of it is written. In one that the parent has, only
//! what changed is written: the rest is the same in both, for the child's cluster began as a copy of it, or was copied
//! whole before. Nobody reads what is written: the child holds each of these clusters, too, and shadows the parent's.
//!
//! What changed comes as loans of [`Changes`]: taken first, read then, acknowledged once all of the batch is written
//! (T2); after a failure they are given back by being dropped.
//!
//! Extra work is one read and one write per piece, and two syncs per [`FLUSH_BYTES`]. Pieces that lie close to each
//! other in one cluster are moved as one, and several are under way at once, so that scattered small writes of a guest are
//! followed as fast as the host allows. How large a piece is, how many are under way, and what a guest gets that is at work
//! says [`pace`](super::pace).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::pace::{PIECE_BYTES_MAX, Pace, THREADS_MAX};
use crate::device::{Change, Changes, Disk};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::{Chain, PreparedWrite, WriteTarget};
use crate::io::{IoBuf, StorageExt};
use crate::ops::Progress;
use crate::units::GuestCluster;

/// Bytes of changes that are moved as one batch.
const BATCH_BYTES: u64 = 16 << 20;
/// Pieces of a batch.
const BATCH_PIECES: usize = 2048;
/// Bytes between two changes that are moved along rather than left out.
const GAP_BYTES: u64 = 16 << 10;
/// So many pieces are worth a thread of their own.
const PIECES_PER_THREAD: usize = 4;
/// The table of the parent is written after so many bytes. Not often: a sync of one file makes the host's file system
/// commit what it has, and the guest's writes to another file may wait for that.
const FLUSH_BYTES: u64 = 256 << 20;

/// One transfer out of the child's file into the parent's.
struct Piece {
    cluster: GuestCluster,
    from: u64,
    to: u64,
    len: u64,
    /// Here end the bytes that the child's file has; the rest reads as zeros.
    held_end: u64,
}

/// Changes that are moved together.
#[derive(Default)]
struct Batch {
    pieces: Vec<Piece>,
    loans: Vec<Change>,
    /// Entered into the table when all is written.
    fresh: Vec<PreparedWrite>,
    /// The last cluster that is moved whole.
    whole: Option<GuestCluster>,
    bytes: u64,
    clusters: u64,
    last: Option<GuestCluster>,
}

impl Batch {
    /// Adds a piece, to the last one if that is close.
    fn add(&mut self, piece: Piece, len_max: u64) {
        self.bytes += piece.len;
        if self.last.replace(piece.cluster) != Some(piece.cluster) {
            self.clusters += 1;
        }
        if let Some(last) = self.pieces.last_mut()
            && last.cluster == piece.cluster
            && let Some(gap) = piece.from.checked_sub(last.from + last.len)
            && gap <= GAP_BYTES
            && last.len + gap + piece.len <= len_max
        {
            last.len += gap + piece.len;
            return;
        }
        self.pieces.push(piece);
    }
}

/// What one sweep over the changes did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Swept {
    /// Bytes that had changed.
    pub(super) bytes: u64,
    /// How long their transfers took.
    pub(super) took: Duration,
}

/// From where to where.
struct Route<'a> {
    chain: &'a Chain,
    child: usize,
    /// The parent alone, open for writing.
    parent: &'a Arc<Chain>,
}

impl Route<'_> {
    /// `buffer` holds the piece.
    fn transfer(&self, piece: &Piece, buffer: &mut IoBuf) -> Result<()> {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(buffer.len());
        let bytes = &mut buffer.as_mut_slice()[..len];
        let there = piece.held_end.saturating_sub(piece.from);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(len);
        let (held, rest) = bytes.split_at_mut(there);
        self.chain.storage(self.child).read_exact_at(piece.from, held).map_err(|cause| {
            Error::io(ErrorKind::Read, "merge: read a cluster", cause)
                .at_path(self.chain.name(self.child))
                .at_offset(piece.from)
        })?;
        rest.fill(0);
        self.parent.storage(0).write_all_at(piece.to, bytes).map_err(|cause| {
            Error::io(ErrorKind::Write, "merge: write a cluster", cause)
                .at_path(self.parent.name(0))
                .at_offset(piece.to)
        })
    }
}

/// Copies what one delta of a chain holds into its parent.
pub(super) struct Copier<'a> {
    route: Route<'a>,
    progress: &'a dyn Progress,
    /// One for each transfer under way, each of `piece_bytes`; the first is always there.
    buffers: Vec<IoBuf>,
    piece_bytes: u64,
    threads: usize,
    unflushed: u64,
    pub(super) pace: Pace<'a>,
    /// Whether a rate limit is kept; not while the guest is held.
    pub(super) is_limited: bool,
    pub(super) bytes: u64,
    pub(super) clusters: u64,
}

/// Storage that is no file (a simulated one) is used from one thread, so that its order of operations repeats.
fn threads(chain: &Chain, child: usize, parent: &Chain) -> usize {
    let are_files = chain.storage(child).descriptor().is_some() && parent.storage(0).descriptor().is_some();
    if are_files { THREADS_MAX } else { 1 }
}

impl<'a> Copier<'a> {
    pub(super) fn new(
        disk: &'a Disk,
        (chain, child): (&'a Chain, usize),
        parent: &'a Arc<Chain>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let mut copier = Self {
            pace: Pace::new(disk),
            threads: threads(chain, child, parent),
            piece_bytes: chain.geometry().cluster_bytes().min(PIECE_BYTES_MAX),
            route: Route { chain, child, parent },
            progress,
            buffers: Vec::new(),
            unflushed: 0,
            is_limited: true,
            bytes: 0,
            clusters: 0,
        };
        copier.add_buffer()?;
        Ok(copier)
    }

    fn add_buffer(&mut self) -> Result<()> {
        let len = usize::try_from(self.piece_bytes).unwrap_or(usize::MAX);
        let buffer = IoBuf::try_zeroed(len)
            .map_err(|cause| Error::io(ErrorKind::Memory, "merge: take a buffer", cause))?;
        self.buffers.push(buffer);
        Ok(())
    }

    /// Bytes of a cluster that are written when the parent gets it whole.
    fn whole_bytes(&self, cluster: GuestCluster) -> u64 {
        let geometry = self.route.parent.geometry();
        match geometry.is_raw() {
            true => geometry.cluster_extent(cluster).len(),
            false => geometry.cluster_bytes(),
        }
    }

    /// The pieces of `len` bytes at byte `at` of a cluster, of which the child's file has `held` bytes at `from`.
    fn pieces(
        &self,
        cluster: GuestCluster,
        (from, held): (u64, u64),
        to: u64,
        (at, len): (u64, u64),
    ) -> impl Iterator<Item = Piece> + use<> {
        let (end, step) = (at + len, self.piece_bytes.min(self.pace.piece_bytes()));
        let mut at = at;
        std::iter::from_fn(move || {
            let len = (end - at).min(step);
            let piece = Piece { cluster, from: from + at, to: to + at, len, held_end: from + held };
            at += len;
            (len > 0).then_some(piece)
        })
    }

    /// Copies a cluster, if the child holds it.
    pub(super) fn copy(&mut self, cluster: GuestCluster) -> Result<()> {
        let Some((from, held)) = self.route.chain.held_bytes(self.route.child, cluster) else {
            return Ok(());
        };
        let whole = self.whole_bytes(cluster);
        let target = self.route.parent.prepare_write(cluster)?;
        let to = match &target {
            WriteTarget::InPlace(offset) => *offset,
            WriteTarget::Fresh(prepared) => prepared.offset(),
        };
        for piece in self.pieces(cluster, (from.0, held), to.0, (0, whole)) {
            let begun = Instant::now();
            if let Some(buffer) = self.buffers.first_mut() {
                self.route.transfer(&piece, buffer)?;
            }
            self.pace.pause(begun.elapsed());
        }
        if let WriteTarget::Fresh(prepared) = target {
            prepared.publish();
        }
        self.clusters += 1;
        self.account(whole)?;
        self.progress.advance(whole)
    }

    /// Copies what has changed since it was copied, once over the disk. What changes meanwhile behind the sweep stays for the
    /// next one. With a gate that is closed and drained, nothing is left.
    pub(super) fn sweep(&mut self, changes: &Changes) -> Result<Swept> {
        let (mut from, mut swept) = (0, Swept::default());
        loop {
            let batch = self.gather(changes, &mut from)?;
            if batch.loans.is_empty() {
                return Ok(swept);
            }
            let begun = Instant::now();
            self.transfer_all(&batch.pieces)?;
            let took = begun.elapsed();
            let Batch { loans, fresh, bytes, clusters, .. } = batch;
            fresh.into_iter().for_each(PreparedWrite::publish);
            swept.bytes += loans.iter().map(|loan| loan.extent().len()).sum::<u64>();
            swept.took += took;
            loans.into_iter().for_each(Change::acknowledge);
            self.clusters += clusters;
            self.account(bytes)?;
            // The limit is kept by sleeping.
            self.progress.advance(if self.is_limited { bytes } else { 0 })?;
            self.pace.pause(took);
        }
    }

    /// Takes what has changed at or after guest byte `from`.
    fn gather(&self, changes: &Changes, from: &mut u64) -> Result<Batch> {
        let mut batch = Batch::default();
        while batch.bytes < BATCH_BYTES && batch.pieces.len() < BATCH_PIECES {
            let Some(loan) = changes.take(*from, BATCH_BYTES - batch.bytes) else { break };
            let extent = loan.extent();
            // Given back whatever happens from here on, until it is acknowledged.
            batch.loans.push(loan);
            self.plan(&mut batch, extent)?;
            *from = extent.end();
        }
        Ok(batch)
    }

    fn plan(&self, batch: &mut Batch, extent: Extent) -> Result<()> {
        let (chain, parent) = (self.route.chain, self.route.parent);
        let cluster_bytes = chain.geometry().cluster_bytes();
        let mut at = extent.start();
        while at < extent.end() {
            let number = at / cluster_bytes;
            let start = number * cluster_bytes;
            let end = (start + cluster_bytes).min(extent.end());
            let (rel, len) = (at - start, end - at);
            at = end;
            let Ok(number) = u32::try_from(number) else { break };
            let cluster = GuestCluster(number);
            if batch.whole == Some(cluster) {
                continue;
            }
            // What the child does not hold reads as before: no entry is cleared meanwhile.
            let Some((from, held)) = chain.held_bytes(self.route.child, cluster) else { continue };
            let (to, range) = match parent.prepare_write(cluster)? {
                WriteTarget::InPlace(offset) => (offset, (rel, len)),
                WriteTarget::Fresh(prepared) => {
                    let offset = prepared.offset();
                    batch.fresh.push(prepared);
                    batch.whole = Some(cluster);
                    (offset, (0, self.whole_bytes(cluster)))
                }
            };
            for piece in self.pieces(cluster, (from.0, held), to.0, range) {
                batch.add(piece, self.piece_bytes.min(self.pace.piece_bytes()));
            }
        }
        Ok(())
    }

    /// Several at a time, in any order: they do not overlap. None is under way any more afterwards.
    fn transfer_all(&mut self, pieces: &[Piece]) -> Result<()> {
        let threads = (pieces.len() / PIECES_PER_THREAD).clamp(1, self.threads.min(self.pace.threads()));
        while self.buffers.len() < threads {
            self.add_buffer()?;
        }
        let (route, next) = (&self.route, AtomicUsize::new(0));
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let work = |buffer: &mut IoBuf| {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = route.transfer(piece, buffer) {
                    // Nobody begins another one.
                    next.store(pieces.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        };
        let (own, others) = self.buffers.split_at_mut(1);
        std::thread::scope(|scope| {
            for buffer in others.iter_mut().take(threads - 1) {
                let named = std::thread::Builder::new().name("ploop-merge".into());
                // One that cannot be started is missed only in speed.
                if named.spawn_scoped(scope, || work(buffer)).is_err() {
                    break;
                }
            }
            own.iter_mut().for_each(work);
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn account(&mut self, bytes: u64) -> Result<()> {
        self.bytes += bytes;
        self.unflushed += bytes;
        if self.unflushed >= FLUSH_BYTES { self.flush() } else { Ok(()) }
    }

    /// Fails when the operation was cancelled; sleeps for nobody.
    pub(super) fn check_cancelled(&self) -> Result<()> {
        self.progress.advance(0)
    }

    /// From here on nothing sleeps, and nothing can be cancelled: the guest is held.
    pub(super) fn hold(&mut self) {
        (self.pace.is_fair, self.is_limited, self.progress) = (false, false, &crate::ops::Silent);
    }

    /// Makes everything copied so far durable in the parent, table included. Nothing to do if nothing was copied since.
    pub(super) fn flush(&mut self) -> Result<()> {
        if self.unflushed == 0 {
            return Ok(());
        }
        self.unflushed = 0;
        flush(self.route.parent)
    }
}

/// Makes everything that is in a parent durable, table included. A failure is of kind `Sync`, and nothing more may be
/// written to it.
pub(super) fn flush(parent: &Chain) -> Result<()> {
    let storage = parent.storage(0);
    let plan = parent.seal();
    let written = || -> std::io::Result<()> {
        storage.sync_data()?;
        for (offset, bytes) in &plan.writes {
            storage.write_all_at(offset.0, bytes)?;
        }
        if !plan.is_empty() {
            storage.sync_data()?;
        }
        Ok(())
    };
    match written() {
        Ok(()) => {
            // Nothing was cleared: nothing leaves quarantine.
            parent.committed(plan);
            Ok(())
        }
        Err(cause) => {
            parent.failed(plan);
            Err(Error::io(ErrorKind::Sync, "merge: make the parent durable", cause)
                .at_path(parent.name(0))
                .advise("see the kernel's messages about the host disk; the disk itself is as it was"))
        }
    }
}
