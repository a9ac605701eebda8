//! A source and a target in memory, with the rules of real ones: for tests, fuzzing and benchmarks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop_core::io::{IoBuf, buffer::is_zero};
use ploop_core::tracker::Tracker;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::source::{DeltaDescription, Gate, Loan, Reader, Snapshots, Source, SourceDescription};
use crate::target::{Destination, FileTarget, Target};
use crate::wire::{Delta, Hello, ImageKind};

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
    /// What it stands on, if it is one delta.
    below: Option<Arc<Vec<u8>>>,
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
        Self::with(bytes, None)
    }

    /// One delta: it shows that content, and holds itself what differs from `below`.
    pub fn on(below: Vec<u8>, bytes: Vec<u8>) -> Self {
        Self::with(bytes, Some(Arc::new(below)))
    }

    fn with(bytes: Vec<u8>, below: Option<Arc<Vec<u8>>>) -> Self {
        let shared = SharedDisk {
            bytes: Mutex::new(bytes),
            below,
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
            has_parent: self.shared.below.is_some(),
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
        let (shared, below) = (Arc::clone(&self.shared), self.shared.below.clone());
        let reader = MemoryReader::new(Box::new(move |use_bytes| use_bytes(&lock(&shared.bytes))));
        Ok(Box::new(MemoryReader { below, ..reader }))
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
    below: Option<Arc<Vec<u8>>>,
    done: Vec<(u64, IoBuf)>,
    turn: usize,
}

impl MemoryReader {
    fn new(with_bytes: WithBytes) -> Self {
        Self { with_bytes, below: None, done: Vec::new(), turn: 0 }
    }

    /// The first piece of the map from `from` on whose bytes `fit`.
    fn next_piece(&self, from: u64, fit: impl Fn(&[u8], std::ops::Range<usize>) -> bool) -> Option<Extent> {
        let mut found = None;
        (self.with_bytes)(&mut |bytes| {
            let disk = Extent::between(from, bytes.len() as u64);
            found = disk.pieces(MAP_BYTES).find(|piece| {
                let len = usize::try_from(piece.len()).unwrap_or(0);
                let place = range(piece.start(), len).ok();
                place.is_some_and(|place| {
                    bytes.get(place.clone()).is_some_and(|part| fit(part, place.clone()))
                })
            });
        });
        found
    }
}

impl Reader for MemoryReader {
    fn next_data(&mut self, from: u64) -> Result<Option<Extent>> {
        Ok(self.next_piece(from, |part, _| !is_zero(part)))
    }

    fn next_own(&mut self, from: u64) -> Result<Option<Extent>> {
        let Some(below) = &self.below else { return self.next_data(from) };
        Ok(self.next_piece(from, |part, place| {
            // What lies past the end of a smaller disk below is zero there.
            let differs = |held: &[u8]| held != part;
            below.get(place).map_or(!is_zero(part), differs)
        }))
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

/// Frozen states in memory, and the place of the current one among them.
pub struct MemorySnapshots {
    deltas: Vec<DeltaDescription>,
    contents: Vec<Arc<Vec<u8>>>,
    changed: Arc<AtomicBool>,
}

impl MemorySnapshots {
    /// States, each with the index of the one it stands on and its content, base first; then what the current state stands
    /// on. The GUID of a state is its number, from 1, sixteen times.
    pub fn new(states: Vec<(Option<u32>, Vec<u8>)>, current: u32) -> Self {
        let count = u32::try_from(states.len()).unwrap_or(u32::MAX);
        let parents = states.iter().map(|(parent, _)| *parent).chain([Some(current)]);
        let describe = |(index, parent): (u32, Option<u32>)| DeltaDescription {
            guid: [u8::try_from(index % 255).unwrap_or(0) + 1; 16],
            name: format!("state {index}"),
            parent,
            // Listed the other way round.
            place: count - index,
            temporary: index != 0 && index != count && index % 2 == 0,
            data_bytes: 0,
            modified_seconds: u64::from(index),
        };
        Self {
            deltas: (0..).zip(parents).map(describe).collect(),
            contents: states.into_iter().map(|(_, content)| Arc::new(content)).collect(),
            changed: Arc::default(),
        }
    }

    /// What makes its [`check`](Snapshots::check) fail.
    pub fn changed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.changed)
    }
}

impl Snapshots for MemorySnapshots {
    fn deltas(&self) -> &[DeltaDescription] {
        &self.deltas
    }

    fn source(&mut self, index: usize) -> Result<Box<dyn Source>> {
        let none = || Error::new(ErrorKind::Parameter, "no such state");
        let content = self.contents.get(index).ok_or_else(none)?.to_vec();
        let parent = self.deltas.get(index).and_then(|delta| delta.parent);
        let below = parent.and_then(|parent| self.contents.get(usize::try_from(parent).ok()?).cloned());
        Ok(Box::new(MemoryDisk::with(content, below)))
    }

    fn check(&self) -> Result<()> {
        if self.changed.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "the states changed (provoked)"));
        }
        Ok(())
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
    /// Beginning the delta with that number fails, from 0.
    BeginDelta(u32),
    /// Closing the delta with that number fails, from 0.
    EndDelta(u32),
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
    /// Deltas that were begun, with the content of those that were ended.
    deltas: Vec<(Delta, Vec<u8>)>,
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

    /// The deltas that have arrived, in the order of the stream, each with the content of its state.
    pub fn deltas(&self) -> Vec<(Delta, Vec<u8>)> {
        let arrived = lock(&self.shared);
        let mut deltas = arrived.deltas.clone();
        if let Some((_, current)) = deltas.last_mut() {
            current.clone_from(&arrived.bytes);
        }
        deltas
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
        arrived.deltas.clear();
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

    fn begin_delta(&mut self, delta: &Delta) -> Result<()> {
        if self.fault == Some(Fault::BeginDelta(delta.index)) {
            return Err(Error::new(ErrorKind::Create, "create a delta (provoked)"));
        }
        let mut arrived = lock(&self.shared);
        let len = usize::try_from(delta.disk_bytes).ok().filter(|_| delta.disk_bytes <= MEMORY_BYTES_MAX);
        let len = len.ok_or_else(|| Error::new(ErrorKind::Memory, "no memory for a delta of that size"))?;
        let parent = delta.parent.and_then(|parent| usize::try_from(parent).ok());
        arrived.bytes = parent.and_then(|at| arrived.deltas.get(at)).map_or(Vec::new(), |one| one.1.clone());
        arrived.bytes.resize(len, 0);
        arrived.deltas.push((delta.clone(), Vec::new()));
        Ok(())
    }

    fn end_delta(&mut self) -> Result<()> {
        let mut arrived = lock(&self.shared);
        let bytes = arrived.bytes.clone();
        if let Some((delta, content)) = arrived.deltas.last_mut() {
            if self.fault == Some(Fault::EndDelta(delta.index)) {
                return Err(Error::new(ErrorKind::Sync, "close a delta (provoked)"));
            }
            *content = bytes;
        }
        Ok(())
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
