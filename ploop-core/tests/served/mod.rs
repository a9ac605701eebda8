//! What the tests of the served disk share: a file in memory with faults, a queue whose transfers are stepped, chains
//! made of them, and a judge of concurrent reads.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ploop_core::Extent;
use ploop_core::device::{Completion, Disk, DiskOptions, Op, Queue, Request};
use ploop_core::format::{Chain, ChainOptions, CreateOptions, Geometry, Source, Version, create_image};
use ploop_core::io::{
    Access, Alignment, Allocation, FileSlot, IoBuf, IoDone, IoKind, IoOp, IoQueue, Reaped, Storage,
    StorageExt, Wait, Waker,
};
use ploop_core::units::Sectors;

/// A small generator of random numbers: the same seed gives the same run.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Which calls of a [`MemoryFile`] fail.
#[derive(Clone, Default)]
pub struct Faults {
    /// Syncs fail from the n-th on, counted from 1 since the faults were set.
    pub sync_from: Option<u64>,
    /// Only that one sync fails.
    pub sync_once: bool,
    /// Writes touching these file bytes fail with this error.
    pub write: Option<(std::ops::Range<u64>, i32)>,
    /// Reads touching these file bytes fail with EIO.
    pub read: Option<std::ops::Range<u64>>,
    /// The file cannot become longer than this.
    pub len_max: Option<u64>,
    /// Punching and zeroing are not supported.
    pub no_allocate: bool,
    /// Transfers longer than this are cut short.
    pub transfer_max: Option<usize>,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    faults: Faults,
    syncs: u64,
    log: Vec<Call>,
}

/// A call that changed a [`MemoryFile`], in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Write(u64, u64),
    Sync,
    Allocate(u64, u64, Allocation),
    SetLen(u64),
}

/// A file in memory. It insists on its alignment.
pub struct MemoryFile {
    content: Mutex<Content>,
    alignment: Alignment,
}

impl MemoryFile {
    pub fn new(unit: u32) -> Arc<Self> {
        let alignment = Alignment { offset: unit, memory: if unit > 1 { 512 } else { 1 } };
        Arc::new(Self { content: Mutex::default(), alignment })
    }

    pub fn with_bytes(unit: u32, bytes: &[u8]) -> Arc<Self> {
        let file = Self::new(unit);
        file.content.lock().unwrap().bytes = bytes.to_vec();
        file
    }

    pub fn set_faults(&self, faults: Faults) {
        let mut content = self.content.lock().unwrap();
        content.faults = faults;
        content.syncs = 0;
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.content.lock().unwrap().bytes.clone()
    }

    pub fn take_log(&self) -> Vec<Call> {
        std::mem::take(&mut self.content.lock().unwrap().log)
    }

    fn check(&self, offset: u64, buffer: &[u8]) {
        let unit = u64::from(self.alignment.offset);
        assert!(offset.is_multiple_of(unit), "offset {offset} is not aligned");
        assert!((buffer.len() as u64).is_multiple_of(unit), "length {} is not aligned", buffer.len());
        let address = buffer.as_ptr().addr();
        assert!(address.is_multiple_of(self.alignment.memory as usize), "memory is not aligned");
    }
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn overlaps(range: &std::ops::Range<u64>, offset: u64, len: u64) -> bool {
    range.start < offset + len && offset < range.end
}

impl Storage for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.check(offset, buffer);
        let content = self.content.lock().unwrap();
        if content.faults.read.as_ref().is_some_and(|range| overlaps(range, offset, buffer.len() as u64)) {
            return Err(error(libc::EIO));
        }
        let len = content.faults.transfer_max.map_or(buffer.len(), |max| buffer.len().min(max));
        let start = content.bytes.len().min(offset as usize);
        let count = len.min(content.bytes.len() - start);
        buffer[..count].copy_from_slice(&content.bytes[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        self.check(offset, buffer);
        let mut content = self.content.lock().unwrap();
        if let Some((range, number)) = &content.faults.write
            && overlaps(range, offset, buffer.len() as u64)
        {
            return Err(error(*number));
        }
        let len = content.faults.transfer_max.map_or(buffer.len(), |max| buffer.len().min(max));
        let end = offset as usize + len;
        if end > content.bytes.len() {
            if content.faults.len_max.is_some_and(|max| end as u64 > max) {
                return Err(error(libc::ENOSPC));
            }
            content.bytes.resize(end, 0);
        }
        content.bytes[offset as usize..end].copy_from_slice(&buffer[..len]);
        content.log.push(Call::Write(offset, len as u64));
        Ok(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.content.lock().unwrap();
        content.syncs += 1;
        if let Some(from) = content.faults.sync_from
            && (content.syncs == from || (content.syncs > from && !content.faults.sync_once))
        {
            return Err(error(libc::EIO));
        }
        content.log.push(Call::Sync);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut content = self.content.lock().unwrap();
        if content.faults.len_max.is_some_and(|max| len > max && len > content.bytes.len() as u64) {
            return Err(error(libc::ENOSPC));
        }
        content.bytes.resize(len as usize, 0);
        content.log.push(Call::SetLen(len));
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        let mut content = self.content.lock().unwrap();
        let end = (offset + len) as usize;
        match how {
            Allocation::Reserve => {
                if content.faults.len_max.is_some_and(|max| end as u64 > max) {
                    return Err(error(libc::ENOSPC));
                }
                if end > content.bytes.len() {
                    content.bytes.resize(end, 0);
                }
            }
            Allocation::Zero | Allocation::Punch => {
                if content.faults.no_allocate {
                    return Err(error(libc::EOPNOTSUPP));
                }
                let end = end.min(content.bytes.len());
                let start = (offset as usize).min(end);
                content.bytes[start..end].fill(0);
            }
        }
        content.log.push(Call::Allocate(offset, len, how));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().unwrap().bytes.len() as u64)
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }
}

/// A queue that takes each transfer in two steps, in an order drawn from a seed: done, then reported.
pub struct StepQueue {
    files: Vec<Arc<dyn Storage>>,
    submitted: Vec<IoOp>,
    performed: VecDeque<IoDone>,
    random: Random,
    depth: usize,
    /// Nothing is performed while this is set and nobody waits.
    hold: Arc<AtomicBool>,
    woken: Arc<AtomicBool>,
}

impl StepQueue {
    pub fn new(seed: u64, depth: usize) -> Self {
        Self {
            files: Vec::new(),
            submitted: Vec::new(),
            performed: VecDeque::new(),
            random: Random::new(seed),
            depth,
            hold: Arc::default(),
            woken: Arc::default(),
        }
    }

    /// A switch that keeps transfers from being performed.
    pub fn hold(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.hold)
    }

    fn perform(&self, operation: IoOp) -> IoDone {
        let IoOp { token, file, offset, kind } = operation;
        let file = &self.files[file.0 as usize];
        match kind {
            IoKind::Read(mut buffer) => {
                let result = file.read_at(offset, buffer.as_mut_slice());
                IoDone { token, result, buffer: Some(buffer) }
            }
            IoKind::Write(buffer) => {
                let result = file.write_at(offset, buffer.as_slice());
                IoDone { token, result, buffer: Some(buffer) }
            }
            IoKind::Allocate(len, how) => {
                IoDone { token, result: file.allocate(offset, len, how).map(|()| 0), buffer: None }
            }
        }
    }

    /// Performs one transfer chosen by chance, if there is any.
    fn step(&mut self) {
        if !self.submitted.is_empty() {
            let chosen = self.random.below(self.submitted.len() as u64) as usize;
            let operation = self.submitted.swap_remove(chosen);
            let done = self.perform(operation);
            self.performed.push_back(done);
        }
    }
}

impl IoQueue for StepQueue {
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot> {
        self.files.push(storage);
        Ok(FileSlot(self.files.len() as u32 - 1))
    }

    fn submit(&mut self, operation: IoOp) -> Result<(), IoOp> {
        if self.submitted.len() + self.performed.len() >= self.depth {
            return Err(operation);
        }
        self.submitted.push(operation);
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        // Who waits in earnest, as a queue does that is dropped, is served in spite of the switch.
        if wait != Wait::No {
            self.step();
        }
        while self.random.chance(50) && !self.submitted.is_empty() && !self.hold.load(Ordering::SeqCst) {
            self.step();
        }
        let mut finished = 0;
        while !self.performed.is_empty() && (finished == 0 && wait != Wait::No || self.random.chance(60)) {
            let chosen = self.random.below(self.performed.len() as u64) as usize;
            done.extend(self.performed.remove(chosen));
            finished += 1;
        }
        Ok(Reaped { finished, woken: self.woken.swap(false, Ordering::SeqCst), watched_ready: false })
    }

    fn in_flight(&self) -> usize {
        self.submitted.len() + self.performed.len()
    }

    fn waker(&self) -> Waker {
        let woken = Arc::clone(&self.woken);
        Waker::new(move || woken.store(true, Ordering::SeqCst))
    }

    fn watch(&mut self, _descriptor: Option<RawFd>) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StepQueue {
    fn drop(&mut self) {
        while !self.submitted.is_empty() {
            self.step();
        }
    }
}

/// Sectors of a cluster in these tests: the smallest the format allows.
pub const CLUSTER_SECTORS: u64 = 64;
/// The same in bytes.
pub const CLUSTER: u64 = CLUSTER_SECTORS * 512;

/// Writes an empty image.
pub fn create(storage: &dyn Storage, clusters: u64) {
    let geometry =
        Geometry::new(Version::V2, Sectors(CLUSTER_SECTORS), Sectors(clusters * CLUSTER_SECTORS)).unwrap();
    create_image(storage, &CreateOptions { geometry, preallocated: false }).unwrap();
}

/// Opens a chain of images, base first; the first may be raw.
pub fn open_chain(files: &[Arc<dyn Storage>], raw_base: bool) -> Arc<Chain> {
    let source = |(number, storage): (usize, &Arc<dyn Storage>)| Source {
        name: PathBuf::from(format!("delta-{number}")),
        storage: Arc::clone(storage),
        raw: raw_base && number == 0,
    };
    let sources = files.iter().enumerate().map(source).collect();
    let options = ChainOptions {
        access: Access::ReadWrite,
        raw_cluster: Some(Sectors(CLUSTER_SECTORS)),
        accept_in_use: false,
    };
    Chain::open(sources, &options).unwrap()
}

/// Serves a chain without a thread.
pub fn serve(chain: Arc<Chain>, options: DiskOptions) -> Arc<Disk> {
    Disk::open(chain, DiskOptions { manual_flusher: true, ..options }).unwrap()
}

/// Fills clusters of an image through a disk of its own, then closes it.
pub fn fill(files: &[Arc<dyn Storage>], raw_base: bool, writes: &[(u64, Vec<u8>)]) {
    let disk = serve(open_chain(files, raw_base), DiskOptions::default());
    let mut client = ploop_core::device::Client::new(&disk, Box::new(StepQueue::new(1, 32))).unwrap();
    for (at, bytes) in writes {
        client.write(*at, bytes).unwrap();
    }
    drop(client);
    disk.close().unwrap();
}

/// Runs a queue until `id` has ended; other completions are appended to `others`.
pub fn run_until(queue: &mut Queue, id: u64, others: &mut Vec<Completion>) -> Completion {
    let disk = Arc::clone(queue.disk());
    for _ in 0..100_000 {
        let mut batch = Vec::new();
        queue.run(Wait::Yes, &mut batch).unwrap();
        disk.step_flusher();
        let mut found = None;
        for completion in batch {
            if completion.id == id { found = Some(completion) } else { others.push(completion) }
        }
        if let Some(found) = found {
            return found;
        }
    }
    panic!("request {id} does not end");
}

pub fn request(id: u64, op: Op, start: u64, len: u64, buffer: Option<IoBuf>) -> Request {
    Request { id, op, extent: Extent::new(start, len).unwrap(), buffer }
}

pub fn write_request(id: u64, start: u64, bytes: &[u8]) -> Request {
    request(id, Op::Write { fua: false }, start, bytes.len() as u64, Some(IoBuf::try_copy_of(bytes).unwrap()))
}

pub fn read_request(id: u64, start: u64, len: u64) -> Request {
    let buffer = IoBuf::try_copy_of(&vec![0xEE; len as usize]).unwrap();
    request(id, Op::Read, start, len, Some(buffer))
}

/// Reads a whole storage.
pub fn read_all(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_available_at(0, &mut bytes).unwrap();
    bytes
}

/// Judges reads that run at the same time as writes: a read may return what some write put there unless that had
/// certainly been overwritten before the read began. One value per sector.
pub struct Judge {
    clock: u64,
    sectors: Vec<Vec<Written>>,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    stamp: u64,
    id: u64,
    began: u64,
    ended: Option<u64>,
    /// It may or may not have happened, for ever.
    is_doubtful: bool,
}

impl Judge {
    /// A disk that holds these stamps, one per sector.
    pub fn new(initial: &[u64]) -> Self {
        let written =
            |&stamp| vec![Written { stamp, id: u64::MAX, began: 0, ended: Some(0), is_doubtful: false }];
        Self { clock: 1, sectors: initial.iter().map(written).collect() }
    }

    pub fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write of `stamp` (0 for zeros) to these sectors was submitted.
    pub fn begin_write(&mut self, sectors: std::ops::Range<u64>, id: u64, stamp: u64) {
        let began = self.now();
        for sector in sectors {
            self.sectors[sector as usize].push(Written { stamp, id, began, ended: None, is_doubtful: false });
        }
    }

    /// It was answered.
    pub fn end_write(&mut self, sectors: std::ops::Range<u64>, id: u64, is_failed: bool) {
        let now = self.now();
        for sector in sectors {
            let history = &mut self.sectors[sector as usize];
            let written = history.iter_mut().find(|written| written.id == id);
            let written = written.expect("a write that never began has ended");
            written.ended = Some(now);
            written.is_doubtful = is_failed;
        }
    }

    /// Forgets what can be seen no more by reads that begin from now on. To be called when no read is in flight.
    pub fn prune(&mut self) {
        for history in &mut self.sectors {
            let newest = history.iter().filter(|written| !written.is_doubtful && written.ended.is_some());
            let newest = newest.map(|written| written.began).max().unwrap_or(0);
            history.retain(|written| written.ended.is_none_or(|ended| ended >= newest));
        }
    }

    /// Whether a read that began at `began` may have seen `stamp`.
    pub fn may_see(&self, sector: u64, began: u64, stamp: u64) -> bool {
        let history = &self.sectors[sector as usize];
        history.iter().any(|written| {
            written.stamp == stamp
                && !history.iter().any(|later| {
                    !later.is_doubtful
                        && later.ended.is_some_and(|ended| ended < began)
                        && written.ended.is_some_and(|ended| ended < later.began)
                })
        })
    }

    pub fn describe(&self, sector: u64) -> String {
        format!("{:?}", self.sectors[sector as usize])
    }
}

/// A sector's bytes for a stamp; 0 is all zeros.
pub fn sector_of(stamp: u64, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    if stamp != 0 {
        for chunk in bytes.as_chunks_mut::<16>().0 {
            chunk[..8].copy_from_slice(&stamp.to_le_bytes());
            chunk[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

/// The stamp of a sector's bytes, if they are what a stamp makes.
pub fn stamp_of(bytes: &[u8], sector: u64) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (bytes == sector_of(stamp, sector)).then_some(stamp)
}
