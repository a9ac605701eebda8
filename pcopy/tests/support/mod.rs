//! Both sides of a copy in one process, with a writer at work and faults in between.
#![allow(dead_code, unreachable_pub)]

#[path = "../../../ploop-core/tests/patience/mod.rs"]
pub mod patience;
#[path = "../../../ploop-core/tests/referee/mod.rs"]
pub mod referee;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pcopy::converge::ConvergenceOptions;
use pcopy::memory::MemoryDisk;
use pcopy::{
    Destination, Event, Link, Observer, Quiesce, ReceiveOptions, ReceiveReport, SendOptions, SendReport,
    Snapshots, Source,
};
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::format::Guid;
use ploop_core::io::{Access, pool};
use ploop_core::ops;
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::ops::open::{OpenOptions, Which, open};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Extent, Result};

use patience::{PATIENCE, becomes};

/// Small numbers without a library, the same for the same seed.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// A disk with runs of data and of zeros.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(64 << 10) {
        match random.below(4) {
            0 => {}
            1 => chunk[..4096].fill(u8::try_from(random.below(255)).unwrap() + 1),
            _ => {
                for word in chunk.chunks_mut(8) {
                    word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
                }
            }
        }
    }
    bytes
}

/// What can be written to while it is copied.
pub trait Writable: Clone + Send + 'static {
    fn write(&self, at: u64, bytes: &[u8]);
    fn content(&self) -> Vec<u8>;
}

impl Writable for MemoryDisk {
    fn write(&self, at: u64, bytes: &[u8]) {
        MemoryDisk::write(self, at, bytes);
    }
    fn content(&self) -> Vec<u8> {
        MemoryDisk::content(self)
    }
}

/// A disk with a client that writes to it.
#[derive(Clone)]
pub struct Served {
    pub disk: Arc<Disk>,
    pub client: Arc<Mutex<Client>>,
}

impl Served {
    pub fn open(path: &Path, raw_cluster: Option<Sectors>, access: Access) -> Self {
        let options = OpenOptions {
            which: Which::Path(path.to_path_buf()),
            raw_cluster,
            ..OpenOptions::new(path, access)
        };
        let read_only = access == Access::ReadOnly;
        let disk = Disk::open(open(&options).unwrap().chain, DiskOptions { read_only, ..Default::default() })
            .unwrap();
        let client = Client::new(&disk, pool::best_io_queue(16).unwrap()).unwrap();
        Self { disk, client: Arc::new(Mutex::new(client)) }
    }

    pub fn close(self) {
        drop(Arc::into_inner(self.client).unwrap());
        self.disk.close().unwrap();
    }
}

impl Writable for Served {
    fn write(&self, at: u64, bytes: &[u8]) {
        self.client.lock().unwrap().write(at, bytes).unwrap();
    }
    fn content(&self) -> Vec<u8> {
        let mut client = Client::new(&self.disk, pool::best_io_queue(16).unwrap()).unwrap();
        client.read(Extent::between(0, self.disk.size_bytes())).unwrap().as_slice().to_vec()
    }
}

/// A new disk of `len` bytes in `folder`, half of it written, as `adjust` wants it; open for writing.
pub fn new_disk(folder: &Path, len: u64, seed: u64, adjust: impl FnOnce(&mut CreateOptions)) -> Served {
    std::fs::create_dir_all(folder).unwrap();
    let mut options = CreateOptions::new(folder, "root.hds", Sectors(len / 512));
    adjust(&mut options);
    create(&options).unwrap();
    let served = Served::open(folder, None, Access::ReadWrite);
    for (index, chunk) in content(seed, usize::try_from(len / 2).unwrap()).chunks(48 << 10).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            served.write(index as u64 * (96 << 10), chunk);
        }
    }
    served
}

/// A closed disk with snapshots in `folder`, and their names: the current state stands on the second of four, the third
/// and the fourth are a branch. Each holds data of its own, zeros over data of others, and things of others.
pub fn disk_with_snapshots(
    folder: &Path,
    len: u64,
    seed: u64,
    adjust: impl FnOnce(&mut CreateOptions),
) -> Vec<Guid> {
    let guids: Vec<Guid> = (1..=4).map(|number| Guid::from_bytes([number; 16])).collect();
    let change = |number: u64| {
        let served = Served::open(folder, None, Access::ReadWrite);
        let mut random = Random(seed ^ number << 32);
        for _ in 0..12 {
            let count = 512 * (1 + random.below(400));
            let at = 512 * random.below((len - count) / 512);
            let extent = Extent::between(at, at + count);
            let fill = u8::try_from(random.below(200)).unwrap() + 1;
            match random.below(4) {
                0 => served.client.lock().unwrap().discard(extent).unwrap(),
                1 => served.client.lock().unwrap().write_zeroes(extent, true).unwrap(),
                _ => served.write(at, &vec![fill; usize::try_from(count).unwrap()]),
            }
        }
        served.close();
    };
    new_disk(folder, len, seed, adjust).close();
    for (number, guid) in (1..).zip(&guids[..3]) {
        let options = ops::SnapshotOptions { snapshot: Some(*guid), temporary: number == 3 };
        ops::snapshot(folder, &options, Duration::from_secs(60), &ops::Silent).unwrap();
        change(number);
    }
    let options = ops::SwitchOptions { snapshot: guids[1], keep: Some(guids[3]) };
    ops::switch(folder, &options, Duration::from_secs(60), &ops::Silent).unwrap();
    change(4);
    guids
}

/// What the state `state` of the disk in `folder` holds.
pub fn content_of_state(folder: &Path, state: Guid) -> Vec<u8> {
    let options = OpenOptions { snapshot: Some(state), ..OpenOptions::new(folder, Access::ReadOnly) };
    let options_of_disk = DiskOptions { read_only: true, ..Default::default() };
    let disk = Disk::open(open(&options).unwrap().chain, options_of_disk).unwrap();
    let mut client = Client::new(&disk, pool::best_io_queue(16).unwrap()).unwrap();
    client.read(Extent::between(0, disk.size_bytes())).unwrap().as_slice().to_vec()
}

/// What the closed disk at `path` holds.
pub fn content_of(path: &Path, raw_cluster: Option<Sectors>) -> Vec<u8> {
    let served = Served::open(path, raw_cluster, Access::ReadOnly);
    let content = served.content();
    served.close();
    content
}

#[derive(Default)]
pub struct WriterState {
    pause: AtomicBool,
    idle: AtomicBool,
    stop: AtomicBool,
    pub writes: AtomicU64,
}

/// A guest that writes all the time, until paused.
pub struct Writer {
    pub state: Arc<WriterState>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub fn start<D: Writable>(disk: &D, len: u64, seed: u64, interval: Duration) -> Self {
        let state = Arc::new(WriterState::default());
        let (shared, disk) = (Arc::clone(&state), disk.clone());
        let thread = std::thread::spawn(move || {
            let mut random = Random(seed);
            while !shared.stop.load(Ordering::SeqCst) {
                if shared.pause.load(Ordering::SeqCst) {
                    shared.idle.store(true, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                }
                shared.idle.store(false, Ordering::SeqCst);
                let count = 512 * (1 + random.below(16));
                let at = 512 * random.below((len - count) / 512);
                let fill = u8::try_from(random.below(4)).unwrap();
                disk.write(at, &vec![fill; usize::try_from(count).unwrap()]);
                shared.writes.fetch_add(1, Ordering::SeqCst);
                if !interval.is_zero() {
                    std::thread::sleep(interval);
                }
            }
        });
        Self { state, thread: Some(thread) }
    }

    pub fn pause(state: &WriterState) {
        state.idle.store(false, Ordering::SeqCst);
        state.pause.store(true, Ordering::SeqCst);
        while !state.idle.load(Ordering::SeqCst) && !state.stop.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Whether it still gets writes through: nobody left it frozen.
    pub fn is_alive(&self) -> bool {
        let before = self.state.writes.load(Ordering::SeqCst);
        becomes(|| self.state.writes.load(Ordering::SeqCst) > before)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Pauses a writer and remembers the disk's content at that moment; counts.
pub struct TestQuiesce<D: Writable> {
    pub disk: D,
    pub writer: Option<Arc<WriterState>>,
    pub fail_hook: bool,
    pub freezes: u64,
    pub thaws: u64,
    pub frozen: bool,
    pub hook_begun: bool,
    pub snapshot: Option<Vec<u8>>,
}

impl<D: Writable> TestQuiesce<D> {
    pub fn new(disk: &D, writer: Option<&Writer>) -> Self {
        Self {
            disk: disk.clone(),
            writer: writer.map(|writer| Arc::clone(&writer.state)),
            fail_hook: false,
            freezes: 0,
            thaws: 0,
            frozen: false,
            hook_begun: false,
            snapshot: None,
        }
    }
}

impl<D: Writable> Quiesce for TestQuiesce<D> {
    fn sync_file_system(&mut self) -> Result<bool> {
        Ok(true)
    }
    fn run_hook(&mut self) -> Result<()> {
        self.hook_begun = true;
        if self.fail_hook {
            return Err(Error::new(ErrorKind::NotQuiet, "the hook failed"));
        }
        Ok(())
    }
    fn freeze_file_system(&mut self) -> Result<()> {
        if let Some(writer) = &self.writer {
            Writer::pause(writer);
        }
        self.freezes += 1;
        self.frozen = true;
        self.snapshot = Some(self.disk.content());
        Ok(())
    }
    fn thaw(&mut self) -> Result<()> {
        if std::mem::take(&mut self.frozen) {
            self.thaws += 1;
            if let Some(writer) = &self.writer {
                writer.pause.store(false, Ordering::SeqCst);
            }
        }
        self.hook_begun = false;
        Ok(())
    }
}

/// A pair of connected descriptors: writing end, reading end.
pub fn pair(socket: bool) -> (OwnedFd, OwnedFd) {
    if socket {
        let (left, right) = UnixStream::pair().unwrap();
        (left.into(), right.into())
    } else {
        let (read, write) = nix::unistd::pipe().unwrap();
        (write, read)
    }
}

pub struct Ends {
    pub sender: Link,
    pub receiver: Link,
}

pub fn ends(two_way: bool, socket: bool) -> Ends {
    let (write, read) = pair(socket);
    let back = two_way.then(|| pair(socket));
    let (back_write, back_read) = back.unzip();
    Ends {
        sender: Link { input: back_read, output: Some(write) },
        receiver: Link { input: Some(read), output: back_write },
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// The connection ends at that byte.
    Cut(u64),
    /// One bit of that byte changes.
    Flip(u64, u8),
    /// Bytes vanish.
    Drop(u64, u64),
    /// Bytes come twice.
    Double(u64, u64),
    /// Nothing passes any more.
    Stall(u64),
}

/// Carries bytes in ragged pieces, with trouble. Ends when either side does. Counts what it carried.
pub fn carry(
    input: OwnedFd,
    output: OwnedFd,
    trouble: Trouble,
    mut random: Random,
    stalled: Duration,
) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let (mut input, mut output) = (std::fs::File::from(input), std::fs::File::from(output));
        let mut position = 0u64;
        let mut skip = 0u64;
        let mut buffer = vec![0; 64 << 10];
        loop {
            // Near the trouble byte by byte, elsewhere in any pieces.
            let limit = 1 + random.below(buffer.len() as u64);
            let at = match trouble {
                Trouble::None => u64::MAX,
                Trouble::Cut(at) | Trouble::Stall(at) | Trouble::Flip(at, _) | Trouble::Drop(at, _) => at,
                Trouble::Double(at, len) => at.saturating_add(len),
            };
            let until = at.saturating_sub(position);
            if until == 0 && matches!(trouble, Trouble::Cut(_)) {
                return position;
            }
            if until == 0 && matches!(trouble, Trouble::Stall(_)) {
                std::thread::sleep(stalled);
                return position;
            }
            let limit = if until == 0 { limit } else { limit.min(until) };
            let limit = if position == at && matches!(trouble, Trouble::Flip(..)) { 1 } else { limit };
            let count = match input.read(&mut buffer[..usize::try_from(limit).unwrap()]) {
                Ok(0) | Err(_) => return position,
                Ok(count) => count,
            };
            let piece = &mut buffer[..count];
            if let Trouble::Flip(at, bit) = trouble
                && position == at
            {
                piece[0] ^= 1 << bit;
            }
            if let Trouble::Drop(at, len) = trouble
                && position == at
            {
                skip = len;
            }
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= skipped as u64;
            if output.write_all(&piece[skipped..]).is_err() {
                return position;
            }
            position += count as u64;
            if let Trouble::Double(at, len) = trouble
                && position == at.saturating_add(len)
            {
                let again = usize::try_from(len).unwrap().min(count);
                if output.write_all(&piece[count - again..]).is_err() {
                    return position;
                }
            }
        }
    })
}

pub struct Both {
    pub sent: Result<SendReport>,
    pub received: Result<ReceiveReport>,
}

pub fn send_options(stall: Duration) -> SendOptions {
    SendOptions {
        stall_timeout: stall,
        gate_timeout: PATIENCE,
        convergence: ConvergenceOptions { passes_max: 5, ..Default::default() },
        ..Default::default()
    }
}

/// Runs both sides to their ends.
pub fn copy<S: Source, D: Destination + Send>(
    source: &mut S,
    quiesce: &mut dyn Quiesce,
    destination: &mut D,
    ends: Ends,
    options: &SendOptions,
) -> Both {
    copy_observed(source, quiesce, destination, ends, options, &|_: &Event| {})
}

/// As `copy`, with all snapshots.
pub fn copy_chain<S: Source, D: Destination + Send>(
    (snapshots, source): (&mut dyn Snapshots, &mut S),
    quiesce: &mut dyn Quiesce,
    destination: &mut D,
    ends: Ends,
    options: &SendOptions,
    observer: &dyn Observer,
) -> Both {
    let receive_options = ReceiveOptions { stall_timeout: options.stall_timeout, ..Default::default() };
    std::thread::scope(|scope| {
        let receiver = ends.receiver;
        let receiving =
            scope.spawn(move || pcopy::receive(receiver, destination, &receive_options, &pcopy::Silent));
        let sent = pcopy::send_chain(snapshots, source, quiesce, ends.sender, options, observer);
        Both { sent, received: receiving.join().unwrap() }
    })
}

/// As `copy`, with an observer of the sender.
pub fn copy_observed<S: Source, D: Destination + Send>(
    source: &mut S,
    quiesce: &mut dyn Quiesce,
    destination: &mut D,
    ends: Ends,
    options: &SendOptions,
    observer: &dyn Observer,
) -> Both {
    let receive_options = ReceiveOptions { stall_timeout: options.stall_timeout, ..Default::default() };
    std::thread::scope(|scope| {
        let receiver = ends.receiver;
        let receiving =
            scope.spawn(move || pcopy::receive(receiver, destination, &receive_options, &pcopy::Silent));
        let sent = pcopy::send(source, quiesce, ends.sender, options, observer);
        Both { sent, received: receiving.join().unwrap() }
    })
}

/// Fails when the body takes too long: a copy that hangs.
pub fn must_end<T>(what: &str, body: impl FnOnce() -> T) -> T {
    let watched = Arc::new(AtomicBool::new(false));
    let (done, name) = (Arc::clone(&watched), what.to_string());
    let watchdog = std::thread::spawn(move || {
        if !becomes(|| done.load(Ordering::SeqCst)) {
            eprintln!("hangs: {name}");
            std::process::abort();
        }
    });
    let result = body();
    watched.store(true, Ordering::SeqCst);
    watchdog.join().unwrap();
    result
}
