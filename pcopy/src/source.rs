//! Where a copy comes from: a disk that may be written to while it is read.
//!
//! The order that keeps a copy complete is the sender's; the traits say what each call must mean:
//!
//! * tracking starts **before** the first byte is read (T6),
//! * a loan is taken **before** the bytes it names are read (T2), and goes back on drop unless acknowledged,
//! * [`Source::close_gate`] returns when writes are held and those in flight have finished and are marked (T4).
//!
//! This file, `target.rs`, `legacy.rs` and `main.rs` are the only ones that know images and disks.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ploop_core::device::{Client, Disk, DiskOptions, Frozen, Op};
use ploop_core::format::{Chain, Mapping, Version};
use ploop_core::io::{Access, IoBuf, pool};
use ploop_core::ops::open::{OpenOptions, Which, open};
use ploop_core::tracker::{Taken, Tracker};
use ploop_core::units::{GuestOffset, Sectors};
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::wire::ImageKind;

/// What a source is, for the `Hello` and for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceDescription {
    /// Name for messages.
    pub name: PathBuf,
    /// Format version, 1 or 2.
    pub version: u8,
    /// Cluster size in sectors.
    pub cluster_sectors: u32,
    /// Kind of image.
    pub image: ImageKind,
    /// Bytes that hold data, as far as is known without looking; 0 when it is not.
    pub data_bytes: u64,
    /// Whether it is one delta on another: what it does not hold itself is not zero but the other's.
    pub has_parent: bool,
}

/// Runs of a disk that are looked at for a prediction; what lies behind them counts as data.
const DIRTY_RUNS_MAX: u32 = 65_536;

/// Reads one disk, several ranges at a time. Used by one thread.
pub trait Reader: Send {
    /// The first run at or after guest byte `from` that may hold data: all before it reads as zeros. `None` when
    /// everything up to the end does.
    fn next_data(&mut self, from: u64) -> Result<Option<Extent>>;
    /// As [`next_data`](Self::next_data). Of one delta on another: the first run that it holds itself, zeros included;
    /// all before it is as in the other.
    fn next_own(&mut self, from: u64) -> Result<Option<Extent>> {
        self.next_data(from)
    }
    /// Starts filling `buffer` from guest byte `at`; `token` comes back with it.
    fn submit(&mut self, token: u64, at: u64, buffer: IoBuf) -> Result<()>;
    /// Waits until one of the reads under way has finished; `None` when none is under way. They finish in any order.
    fn finish(&mut self) -> Result<Option<(u64, IoBuf)>>;
    /// Reads under way.
    fn in_flight(&self) -> usize;
}

/// Bytes that changed, lent by a tracker: dropped, they are dirty again.
pub trait Loan: Send {
    /// Which bytes.
    fn extent(&self) -> Extent;
    /// They are durable on the other side.
    fn acknowledge(self: Box<Self>);
}

impl Loan for Taken {
    fn extent(&self) -> Extent {
        Taken::extent(self)
    }
    fn acknowledge(self: Box<Self>) {
        Taken::acknowledge(*self);
    }
}

/// A closed gate: writes are held. Dropping it opens the gate.
pub trait Gate: Send {}

/// A disk to copy from.
pub trait Source: Send {
    /// Size in bytes, a multiple of a sector.
    fn size_bytes(&self) -> u64;
    /// What it is.
    fn description(&self) -> SourceDescription;
    /// From now on, changes are remembered. A source that nobody can write to has nothing to do.
    fn start_tracking(&mut self) -> Result<()>;
    /// Changes need not be remembered any more. Can be called at any time.
    fn stop_tracking(&mut self);
    /// The next changed run at or after guest byte `from`, at most `len_max` bytes; `None` when there is none.
    fn take_dirty(&mut self, from: u64, len_max: u64) -> Option<Box<dyn Loan>>;
    /// Bytes changed and not taken. Never 0 while there are some.
    fn dirty_bytes(&self) -> u64;
    /// Of these, what would be sent as data: what was discarded meanwhile is sent as so many zeros, in no time. A look at
    /// a disk that goes on; at most [`dirty_bytes`](Self::dirty_bytes).
    fn dirty_data_bytes(&self) -> u64 {
        self.dirty_bytes()
    }
    /// Nothing changed, and nothing on loan.
    fn is_clean(&self) -> bool;
    /// A way to read it.
    fn reader(&self) -> Result<Box<dyn Reader>>;
    /// Holds new writes and waits until those in flight have finished and are marked; gives up after `timeout`.
    fn close_gate(&mut self, timeout: Duration) -> Result<Box<dyn Gate>>;
}

/// One delta of a disk, for the frame that announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaDescription {
    /// The GUID of its state.
    pub guid: [u8; 16],
    /// That state as messages name it.
    pub name: String,
    /// The index of the delta it stands on, smaller than its own; only the first stands on none.
    pub parent: Option<u32>,
    /// Its place in the list of snapshots.
    pub place: u32,
    /// Its state goes as soon as nobody uses it.
    pub temporary: bool,
    /// Bytes it holds, about.
    pub data_bytes: u64,
    /// When it was last written, in seconds since 1970; 0 when that is not known.
    pub modified_seconds: u64,
}

/// The states of a disk beside its current one. None of them changes while they are sent.
pub trait Snapshots: Send {
    /// Every delta of the disk; the last is that of the current state.
    fn deltas(&self) -> &[DeltaDescription];
    /// The frozen delta `index` as a source: it shows its state, and says which part of it the delta holds itself.
    fn source(&mut self, index: usize) -> Result<Box<dyn Source>>;
    /// Fails unless they still are what they were at first.
    fn check(&self) -> Result<()>;
}

/// How far ahead the map of a disk is asked at once.
const MAP_BYTES: u64 = 64 << 20;
/// From this size on a mapped run is also looked at for holes in its file.
const HOLES_FROM_BYTES: u64 = 64 << 10;
/// Runs that are looked at when the data of a disk is counted; past them an estimate is good enough.
const RUNS_COUNTED_MAX: usize = 1 << 16;
/// Operations in flight in the queue of a reader or of a target.
pub(crate) const QUEUE_DEPTH: u32 = 64;

/// The first run at or after `from` that the chain maps to a file and, if `holes` are looked at, that the file holds.
fn next_mapped(chain: &Chain, from: u64, holes: bool) -> Result<Option<Extent>> {
    let look = |delta, offset| {
        chain.storage(delta).next_data(offset).map_err(|error| {
            Error::io(ErrorKind::Read, "look for holes", error).at_path(chain.name(delta)).at_offset(offset)
        })
    };
    let map = |at, len_max| chain.map(GuestOffset(at), len_max);
    next_held_by_file(Extent::between(from, chain.geometry().disk_bytes()), map, holes.then_some(look))
}

/// As [`next_mapped`] on that part of a disk, with a way to map it and one to look for holes: the first run of data in a delta at or
/// after an offset.
fn next_held_by_file(
    part: Extent,
    map: impl Fn(u64, u64) -> Mapping,
    look: Option<impl Fn(usize, u64) -> Result<Option<(u64, u64)>>>,
) -> Result<Option<Extent>> {
    let (mut at, end) = (part.start(), part.end());
    while at < end {
        let len_max = MAP_BYTES.min(end - at);
        let mapping = map(at, len_max);
        let (delta, offset, len) = match mapping {
            Mapping::Zero { len } => {
                at += len.max(1);
                continue;
            }
            Mapping::Data { delta, offset, len } => (delta, offset.0, len),
        };
        let run = Extent::between(at, at + len);
        let Some(look) = look.as_ref().filter(|_| len >= HOLES_FROM_BYTES) else { return Ok(Some(run)) };
        let held = look(delta, offset)?.map(|(start, end)| Extent::between(start, end));
        let held = held.map_or(Extent::between(offset, offset), |held| {
            held.clip(&Extent::between(offset, offset + len))
        });
        if (held.is_empty() || held.start() > offset) && map(at, len_max) != mapping {
            // A compaction has moved a part of it meanwhile: the hole may be where that was.
            return Ok(Some(run));
        }
        if !held.is_empty() {
            // Outwards to whole sectors: the ends of a hole may lie anywhere.
            let skipped = held.start() - offset;
            let found = Extent::between(at + skipped, at + skipped + held.len());
            return Ok(Some(found.widen(4096, run.end()).clip(&run)));
        }
        at = run.end();
    }
    Ok(None)
}

/// The first run at or after `from` that the top of the chain holds itself, whatever is in it.
fn next_held(chain: &Chain, from: u64) -> Option<Extent> {
    let end = chain.geometry().disk_bytes();
    let mut at = from;
    while at < end {
        let mapping = chain.map(GuestOffset(at), MAP_BYTES.min(end - at));
        let run = Extent::between(at, at + mapping.len().max(1));
        if matches!(mapping, Mapping::Data { delta, .. } if delta == chain.top()) {
            return Some(run);
        }
        at = run.end();
    }
    None
}

/// Reads a [`Disk`] through a client of its own.
pub(crate) struct DiskReader {
    client: Client,
    /// Only what the top holds is its own.
    is_delta: bool,
    waiting: HashMap<u64, (u64, Extent)>,
}

impl DiskReader {
    pub(crate) fn new(disk: &Arc<Disk>) -> Result<Self> {
        let queue = pool::best_io_queue(QUEUE_DEPTH)
            .map_err(|error| Error::io(ErrorKind::System, "make a queue to read with", error))?;
        Ok(Self { client: Client::new(disk, queue)?, is_delta: false, waiting: HashMap::new() })
    }

    fn top(&self) -> PathBuf {
        let chain = self.chain();
        chain.name(chain.top()).to_path_buf()
    }

    /// The chain as it is now: a snapshot that is made meanwhile puts another one under the disk.
    fn chain(&self) -> Arc<Chain> {
        self.client.disk().chain()
    }
}

impl Reader for DiskReader {
    fn next_data(&mut self, from: u64) -> Result<Option<Extent>> {
        next_mapped(&self.chain(), from, true)
    }

    fn next_own(&mut self, from: u64) -> Result<Option<Extent>> {
        if self.is_delta { Ok(next_held(&self.chain(), from)) } else { self.next_data(from) }
    }

    fn submit(&mut self, token: u64, at: u64, buffer: IoBuf) -> Result<()> {
        let extent = Extent::between(at, at.saturating_add(buffer.len() as u64));
        let id = self.client.submit(Op::Read, extent, Some(buffer));
        self.waiting.insert(id, (token, extent));
        Ok(())
    }

    fn finish(&mut self) -> Result<Option<(u64, IoBuf)>> {
        let Some(done) = self.client.next_completion()? else { return Ok(None) };
        let lost = || Error::new(ErrorKind::Read, "a read was lost");
        let (token, extent) = self.waiting.remove(&done.id).ok_or_else(lost)?;
        match done.result {
            Ok(()) => Ok(Some((token, done.buffer.ok_or_else(lost)?))),
            Err(errno) => {
                let cause = std::io::Error::from_raw_os_error(errno);
                Err(Error::io(ErrorKind::Read, format!("read {extent}"), cause)
                    .at_path(self.top())
                    .advise("see the kernel's log for the storage below; the disk cannot be copied while it cannot be read"))
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.client.in_flight()
    }
}

impl Gate for Frozen {}

/// A served or closed disk of this machine.
pub struct DiskSource {
    disk: Arc<Disk>,
    description: SourceDescription,
    tracker: Option<Arc<Tracker>>,
}

impl DiskSource {
    /// A disk that may be written to while it is copied.
    pub fn new(disk: &Arc<Disk>) -> Result<Self> {
        Self::describe(disk, false)
    }

    /// The top of a chain as one delta: what is below it is sent, or has been, by itself.
    pub fn delta(disk: &Arc<Disk>) -> Result<Self> {
        Self::describe(disk, disk.chain().depth() > 1)
    }

    fn describe(disk: &Arc<Disk>, has_parent: bool) -> Result<Self> {
        let chain = disk.chain();
        let geometry = chain.geometry();
        let next = |from, runs| match has_parent {
            true => Ok(next_held(&chain, from)),
            false => next_mapped(&chain, from, runs < RUNS_COUNTED_MAX),
        };
        let mut data_bytes: u64 = 0;
        let (mut at, mut runs) = (0, 0);
        while let Some(run) = next(at, runs)? {
            data_bytes = data_bytes.saturating_add(run.len());
            at = run.end();
            runs += 1;
        }
        let description = SourceDescription {
            name: chain.name(chain.top()).to_path_buf(),
            version: if geometry.version() == Version::V1 { 1 } else { 2 },
            cluster_sectors: geometry.cluster_sectors(),
            image: if geometry.is_raw() { ImageKind::Raw } else { ImageKind::Expanded },
            data_bytes,
            has_parent,
        };
        Ok(Self { disk: Arc::clone(disk), description, tracker: None })
    }

    /// A disk that nobody serves: the image, bundle or descriptor at `path`, or a raw file or block device seen in
    /// clusters of `raw_cluster`. [`ErrorKind::InUse`] when somebody has it open for writing.
    pub fn open_closed(path: &Path, raw_cluster: Option<Sectors>) -> Result<Self> {
        let options = OpenOptions {
            which: Which::Path(path.to_path_buf()),
            raw_cluster,
            block_device: raw_cluster.is_some(),
            ..OpenOptions::new(path, Access::ReadOnly)
        };
        let opened = open(&options)?;
        // The receiver would call what it has complete.
        if let Some(found) = opened.report.disagreements.first() {
            return Err(found.failure());
        }
        Self::new(&Disk::open(opened.chain, DiskOptions { read_only: true, ..Default::default() })?)
    }
}

impl Source for DiskSource {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn description(&self) -> SourceDescription {
        self.description.clone()
    }

    fn start_tracking(&mut self) -> Result<()> {
        if !self.disk.is_read_only() {
            self.tracker = Some(self.disk.start_tracker()?);
        }
        Ok(())
    }

    fn stop_tracking(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            self.disk.stop_tracker(&tracker);
        }
    }

    fn take_dirty(&mut self, from: u64, len_max: u64) -> Option<Box<dyn Loan>> {
        Some(Box::new(self.tracker.as_ref()?.take(from, len_max)?))
    }

    fn dirty_bytes(&self) -> u64 {
        self.tracker.as_ref().map_or(0, |tracker| tracker.dirty_bytes())
    }

    fn dirty_data_bytes(&self) -> u64 {
        let dirty = self.dirty_bytes();
        let Some(tracker) = self.tracker.as_ref().filter(|_| dirty > 0) else { return dirty };
        if self.description.has_parent || tracker.is_stopped() {
            return dirty;
        }
        let (chain, end) = (self.disk.chain(), self.disk.size_bytes());
        let (mut at, mut zeros) = (0, 0_u64);
        for _ in 0..DIRTY_RUNS_MAX {
            let Some(first) = tracker.next_dirty(at) else { break };
            let mapping = chain.map(GuestOffset(first), MAP_BYTES.min(end.saturating_sub(first)));
            let run = Extent::between(first, first.saturating_add(mapping.len().max(1)).min(end));
            if matches!(mapping, Mapping::Zero { .. }) {
                zeros = zeros.saturating_add(tracker.dirty_bytes_in(run));
            }
            at = run.end();
        }
        dirty.saturating_sub(zeros)
    }

    fn is_clean(&self) -> bool {
        self.tracker.as_ref().is_none_or(|tracker| tracker.is_clean())
    }

    fn reader(&self) -> Result<Box<dyn Reader>> {
        let is_delta = self.description.has_parent;
        Ok(Box::new(DiskReader { is_delta, ..DiskReader::new(&self.disk)? }))
    }

    fn close_gate(&mut self, timeout: Duration) -> Result<Box<dyn Gate>> {
        Ok(Box::new(self.disk.freeze(timeout)?))
    }
}

impl Drop for DiskSource {
    fn drop(&mut self) {
        self.stop_tracking();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test says so by panicking")]
mod tests {
    use super::*;
    use ploop_core::units::FileOffset;
    use std::cell::Cell;

    const MIB: u64 = 1 << 20;

    /// The compaction of a running disk moves a cluster to the front and cuts the file, just between the look at the table and
    /// the look for holes. What was there is no hole of the disk.
    #[test]
    fn a_cluster_that_moves_meanwhile_is_no_hole() {
        // What the file holds after the move: its whole end, or its beginning, is gone.
        for held in [None, Some((9 * MIB, 10 * MIB))] {
            let place = Cell::new(8 * MIB);
            let map = |at: u64, len: u64| match at {
                0 => Mapping::Data { delta: 0, offset: FileOffset(place.get()), len: len.min(2 * MIB) },
                _ => Mapping::Zero { len },
            };
            let look = |_: usize, offset: u64| {
                assert_eq!(offset, 8 * MIB);
                place.set(MIB);
                Ok(held)
            };
            let found = next_held_by_file(Extent::between(0, 64 * MIB), map, Some(look)).unwrap();
            assert_eq!(found, Some(Extent::between(0, 2 * MIB)), "{held:?}");
        }
        // Where nothing moves holes are skipped.
        let map = |at: u64, len: u64| match at {
            0 => Mapping::Data { delta: 0, offset: FileOffset(8 * MIB), len: len.min(2 * MIB) },
            _ => Mapping::Zero { len },
        };
        for (held, expected) in
            [(None, None), (Some((9 * MIB, 12 * MIB)), Some(Extent::between(MIB, 2 * MIB)))]
        {
            let look = |_: usize, _: u64| Ok(held);
            let found = next_held_by_file(Extent::between(0, 64 * MIB), map, Some(look)).unwrap();
            assert_eq!(found, expected);
        }
    }
}
