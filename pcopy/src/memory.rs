//! A source and a target in memory, with the rules of real ones: for tests, fuzzing and benchmarks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop_core::io::{IoBuf, buffer::is_zero};
use ploop_core::tracker::Tracker;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::source::{Gate, Loan, Reader, Source, SourceDescription};
use crate::target::{Destination, FileTarget, Target};
use crate::wire::{Hello, ImageKind};

/// Granularity of the map of a disk in memory.
const MAP_BYTES: u64 = 64 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn range(at: u64, len: usize) -> Result<std::ops::Range<usize>> {
    let start = usize::try_from(at).ok();
    start
        .and_then(|start| Some(start..start.checked_add(len)?))
        .ok_or_else(|| Error::new(ErrorKind::Parameter, format!("no place in memory for byte {at}")))
}

/// A disk in memory that can be written to while it is copied.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<SharedDisk>,
}

struct SharedDisk {
    bytes: Mutex<Vec<u8>>,
    tracker: Mutex<Option<Arc<Tracker>>>,
    /// Whether the gate is closed, and writes under way.
    gate: Mutex<(bool, usize)>,
    moved: Condvar,
    /// How often the gate was closed and opened.
    closings: AtomicU64,
    openings: AtomicU64,
}

impl MemoryDisk {
    /// A disk with that content; its length is a multiple of a sector.
    pub fn new(bytes: Vec<u8>) -> Self {
        let shared = SharedDisk {
            bytes: Mutex::new(bytes),
            tracker: Mutex::new(None),
            gate: Mutex::new((false, 0)),
            moved: Condvar::new(),
            closings: AtomicU64::new(0),
            openings: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Writes as a guest does: waits at a closed gate, then the bytes, then the mark. The range lies on the disk.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        {
            let mut gate = lock(&self.shared.gate);
            while gate.0 {
                gate = self.shared.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
            }
            gate.1 += 1;
        }
        if let Ok(range) = range(at, bytes.len())
            && let Some(place) = lock(&self.shared.bytes).get_mut(range)
        {
            place.copy_from_slice(bytes);
        }
        if let Some(tracker) = lock(&self.shared.tracker).as_ref() {
            tracker.mark(Extent::between(at, at.saturating_add(bytes.len() as u64)));
        }
        lock(&self.shared.gate).1 -= 1;
        self.shared.moved.notify_all();
    }

    /// The content now.
    pub fn content(&self) -> Vec<u8> {
        lock(&self.shared.bytes).clone()
    }

    /// How often the gate was closed, and opened again.
    pub fn gate_moves(&self) -> (u64, u64) {
        (self.shared.closings.load(Ordering::SeqCst), self.shared.openings.load(Ordering::SeqCst))
    }

    /// Whether a tracker runs.
    pub fn is_tracked(&self) -> bool {
        lock(&self.shared.tracker).is_some()
    }
}

struct MemoryGate(Arc<SharedDisk>);

impl Gate for MemoryGate {}

impl Drop for MemoryGate {
    fn drop(&mut self) {
        self.0.openings.fetch_add(1, Ordering::SeqCst);
        lock(&self.0.gate).0 = false;
        self.0.moved.notify_all();
    }
}

impl Source for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        lock(&self.shared.bytes).len() as u64
    }

    fn description(&self) -> SourceDescription {
        SourceDescription {
            name: "memory".into(),
            version: 2,
            cluster_sectors: 64,
            image: ImageKind::Expanded,
            data_bytes: 0,
        }
    }

    fn start_tracking(&mut self) -> Result<()> {
        let tracker = Tracker::new(self.size_bytes())?;
        *lock(&self.shared.tracker) = Some(tracker);
        Ok(())
    }

    fn stop_tracking(&mut self) {
        *lock(&self.shared.tracker) = None;
    }

    fn take_dirty(&mut self, from: u64, len_max: u64) -> Option<Box<dyn Loan>> {
        let tracker = lock(&self.shared.tracker).clone()?;
        Some(Box::new(tracker.take(from, len_max)?))
    }

    fn dirty_bytes(&self) -> u64 {
        lock(&self.shared.tracker).as_ref().map_or(0, |tracker| tracker.dirty_bytes())
    }

    fn is_clean(&self) -> bool {
        lock(&self.shared.tracker).as_ref().is_none_or(|tracker| tracker.is_clean())
    }

    fn reader(&self) -> Result<Box<dyn Reader>> {
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(MemoryReader::new(Box::new(move |use_bytes| use_bytes(&lock(&shared.bytes))))))
    }

    fn close_gate(&mut self, timeout: Duration) -> Result<Box<dyn Gate>> {
        let end = Instant::now() + timeout;
        let mut gate = lock(&self.shared.gate);
        gate.0 = true;
        self.shared.closings.fetch_add(1, Ordering::SeqCst);
        let guard = Box::new(MemoryGate(Arc::clone(&self.shared)));
        while gate.1 > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(gate);
                return Err(Error::new(ErrorKind::NotQuiet, "close the gate: writes do not finish"));
            }
            gate = self.shared.moved.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(guard)
    }
}

type WithBytes = Box<dyn Fn(&mut dyn FnMut(&[u8])) + Send>;

/// Reads memory at once and hands out the results in another order than asked for.
struct MemoryReader {
    with_bytes: WithBytes,
    done: Vec<(u64, IoBuf)>,
    turn: usize,
}

impl MemoryReader {
    fn new(with_bytes: WithBytes) -> Self {
        Self { with_bytes, done: Vec::new(), turn: 0 }
    }
}

impl Reader for MemoryReader {
    fn next_data(&mut self, from: u64) -> Result<Option<Extent>> {
        let mut found = None;
        (self.with_bytes)(&mut |bytes| {
            let disk = Extent::between(from, bytes.len() as u64);
            found = disk.pieces(MAP_BYTES).find(|piece| {
                let len = usize::try_from(piece.len()).unwrap_or(0);
                range(piece.start(), len)
                    .ok()
                    .and_then(|range| bytes.get(range))
                    .is_some_and(|part| !is_zero(part))
            });
        });
        Ok(found)
    }

    fn submit(&mut self, token: u64, at: u64, mut buffer: IoBuf) -> Result<()> {
        let range = range(at, buffer.len())?;
        let mut inside = false;
        (self.with_bytes)(&mut |bytes| {
            if let Some(part) = bytes.get(range.clone()) {
                buffer.as_mut_slice().copy_from_slice(part);
                inside = true;
            }
        });
        if !inside {
            return Err(Error::new(ErrorKind::Read, format!("read past the end at byte {at}")));
        }
        self.done.push((token, buffer));
        Ok(())
    }

    fn finish(&mut self) -> Result<Option<(u64, IoBuf)>> {
        if self.done.is_empty() {
            return Ok(None);
        }
        self.turn += 1;
        let index = self.turn % self.done.len();
        Ok(Some(self.done.swap_remove(index)))
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

/// What a target in memory has become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was created, or it was discarded.
    #[default]
    Nothing,
    /// It is being written.
    Incoming,
    /// It stands under its final name.
    Committed,
}

/// A failure to be provoked in a target in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The write with that number fails.
    Write(u64),
    /// The write with that number goes wrong without saying so.
    WrongWrite(u64),
    /// The sync with that number fails.
    Sync(u64),
    /// Putting it in place fails.
    Commit,
}

/// A destination in memory; clones are the same.
#[derive(Clone, Default)]
pub struct MemoryDestination {
    shared: Arc<Mutex<Arrived>>,
    fault: Option<Fault>,
}

#[derive(Default)]
struct Arrived {
    bytes: Vec<u8>,
    outcome: Outcome,
    largest_disk_bytes: u64,
}

impl MemoryDestination {
    /// An empty destination.
    pub fn new() -> Self {
        Self::default()
    }

    /// A destination where something goes wrong.
    pub fn with_fault(fault: Fault) -> Self {
        Self { fault: Some(fault), ..Self::default() }
    }

    /// What has become of the copy.
    pub fn outcome(&self) -> Outcome {
        lock(&self.shared).outcome.clone()
    }

    /// The content that has arrived.
    pub fn content(&self) -> Vec<u8> {
        lock(&self.shared).bytes.clone()
    }
}

/// The largest disk that is made in memory.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

impl Destination for MemoryDestination {
    fn create(&mut self, hello: &Hello) -> Result<Box<dyn Target>> {
        let mut arrived = lock(&self.shared);
        if arrived.outcome == Outcome::Committed {
            return Err(Error::new(ErrorKind::Create, "create the copy: it exists"));
        }
        let len = usize::try_from(hello.disk_bytes).ok().filter(|_| hello.disk_bytes <= MEMORY_BYTES_MAX);
        let len = len.ok_or_else(|| Error::new(ErrorKind::Memory, "no memory for a disk of that size"))?;
        arrived.bytes = vec![0; len];
        arrived.outcome = Outcome::Incoming;
        arrived.largest_disk_bytes = arrived.largest_disk_bytes.max(hello.disk_bytes);
        Ok(Box::new(MemoryTarget {
            shared: Arc::clone(&self.shared),
            fault: self.fault,
            writes: 0,
            syncs: 0,
            done: Vec::new(),
        }))
    }

    fn create_file(&mut self) -> Result<Box<dyn FileTarget>> {
        let mut arrived = lock(&self.shared);
        arrived.bytes.clear();
        arrived.outcome = Outcome::Incoming;
        Ok(Box::new(MemoryFile(Arc::clone(&self.shared))))
    }
}

struct MemoryTarget {
    shared: Arc<Mutex<Arrived>>,
    fault: Option<Fault>,
    writes: u64,
    syncs: u64,
    done: Vec<u64>,
}

impl Target for MemoryTarget {
    fn write(&mut self, token: u64, offset: u64, mut buffer: IoBuf) -> Result<()> {
        self.writes += 1;
        if self.fault == Some(Fault::Write(self.writes)) {
            return Err(Error::new(ErrorKind::Write, "write (provoked)").at_offset(offset));
        }
        if self.fault == Some(Fault::WrongWrite(self.writes)) {
            buffer.as_mut_slice()[0] ^= 1;
        }
        let range = range(offset, buffer.len())?;
        match lock(&self.shared).bytes.get_mut(range) {
            Some(place) => place.copy_from_slice(buffer.as_slice()),
            None => return Err(Error::new(ErrorKind::Write, "write past the end").at_offset(offset)),
        }
        self.done.push(token);
        Ok(())
    }

    fn zero(&mut self, extent: Extent) -> Result<()> {
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX);
        if let Some(place) = lock(&self.shared).bytes.get_mut(range(extent.start(), len)?) {
            place.fill(0);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(self.done.pop())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn sync(&mut self) -> Result<()> {
        self.syncs += 1;
        if self.fault == Some(Fault::Sync(self.syncs)) {
            return Err(Error::new(ErrorKind::Sync, "sync (provoked)"));
        }
        Ok(())
    }

    fn reader(&self) -> Result<Box<dyn Reader>> {
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(MemoryReader::new(Box::new(move |use_bytes| use_bytes(&lock(&shared).bytes)))))
    }

    fn commit(&mut self) -> Result<()> {
        if self.fault == Some(Fault::Commit) {
            return Err(Error::new(ErrorKind::Rename, "rename (provoked)"));
        }
        lock(&self.shared).outcome = Outcome::Committed;
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        let mut arrived = lock(&self.shared);
        if arrived.outcome == Outcome::Incoming {
            arrived.outcome = Outcome::Nothing;
        }
        Ok(())
    }
}

struct MemoryFile(Arc<Mutex<Arrived>>);

impl FileTarget for MemoryFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset.saturating_add(bytes.len() as u64) > MEMORY_BYTES_MAX {
            return Err(Error::new(ErrorKind::Memory, "no memory for a file of that size"));
        }
        let range = range(offset, bytes.len())?;
        let file = &mut lock(&self.0).bytes;
        if file.len() < range.end {
            file.resize(range.end, 0);
        }
        file[range].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        lock(&self.0).outcome = Outcome::Committed;
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        let mut arrived = lock(&self.0);
        if arrived.outcome == Outcome::Incoming {
            arrived.outcome = Outcome::Nothing;
        }
        Ok(())
    }
}
