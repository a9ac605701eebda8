//! A simulated host: files, one folder, faults, and every state a crash may leave.
//!
//! A [`SimDisk`] is a whole world made from a seed. It keeps two contents of each file: *live*, what reads see, and
//! *durable*, what certainly survives a power loss, with an ordered log of the changes between them. A sync moves
//! into durable what had **completed before it was called**; what a [`SimQueue`] still has in flight stays in the log.
//! Names are kept the same way; a folder sync makes them durable.
//!
//! [`Snapshot`] is that world at one instant, cheap to take (pages are shared), also after every single operation:
//! see [`SimDisk::capture_every_operation`]. [`Snapshot::crash_states`] lists what a crash there may leave, by the
//! failure model R1-R5; each state makes a new world to open and to judge.
//!
//! Faults ([`Fault`]) make chosen calls fail, short, interrupted, out of space, or lose data at a sync (R6, R7).
//!
//! Locking: one mutex around the world, held for one call at a time and never while anything else is called.
//! Invariant: without threads the same seed and calls give the same [`SimDisk::log_hash`].

mod content;
mod crash;
mod fault;
mod files;
mod queue;
mod random;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::content::{Content, hash_bytes, mix};
use super::file::component;
use super::{Access, Alignment};
use crate::extent::{Extent, ExtentSet};

pub use self::crash::{CrashLevel, CrashOptions, CrashState, CrashStates, Snapshot};
pub use self::fault::{Call, Fault};
pub use self::files::{SimFolder, SimStorage};
pub use self::queue::SimQueue;
pub use self::random::Random;

/// Bytes that persist wholly or not at all.
pub const SECTOR_BYTES: u64 = 512;

/// The host's unit of space.
const BLOCK_BYTES: u64 = 4096;

/// One change of a file, not yet known to be durable.
#[derive(Clone)]
enum Change {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    SetLen {
        len: u64,
    },
    /// A reservation past the end: never shortens.
    Extend {
        len: u64,
    },
}

impl Change {
    fn apply(&self, content: &mut Content) {
        match self {
            Self::Write { offset, data } => content.write(*offset, data),
            Self::Zero { offset, len } => content.zero(*offset, *len),
            Self::SetLen { len } => content.set_len(*len),
            Self::Extend { len } => content.set_len(content.len().max(*len)),
        }
    }
}

#[derive(Clone)]
struct Entry {
    change: Change,
    /// The queue operation it belongs to, until that is reaped.
    in_flight: Option<u64>,
    /// Its place among all changes of the world.
    sequence: u64,
}

#[derive(Clone, Default)]
struct SimFile {
    live: Content,
    durable: Content,
    log: Vec<Entry>,
    /// Blocks given to the file, in bytes, rounded to blocks.
    allocated: ExtentSet,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create { name: String, file: usize },
    Rename { from: String, to: String, file: usize },
    Unlink { name: String },
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Create { name, file } => {
                names.insert(name.clone(), *file);
            }
            Self::Rename { from, to, file } => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
            Self::Unlink { name } => {
                names.remove(name);
            }
        }
    }
}

#[derive(Clone)]
struct NameEntry {
    change: NameChange,
    sequence: u64,
}

/// The latest operation before a snapshot, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was called.
    pub call: Call,
    /// Number of the file in order of creation; meaningless for the folder.
    pub file: usize,
    /// Byte offset, or new length.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

struct World {
    random: Random,
    files: Vec<Arc<SimFile>>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    name_log: Vec<NameEntry>,
    sequence: u64,
    tickets: u64,
    hash: u64,
    calls: [u64; Call::ALL.len()],
    faults: Vec<Fault>,
    short_transfers: bool,
    interruptions: bool,
    capacity_bytes: Option<u64>,
    alignment: Alignment,
    captures: bool,
    captured: Vec<Snapshot>,
    trace: Vec<Operation>,
}

/// A simulated host with one folder. Cloning gives another handle to the same world.
#[derive(Clone)]
pub struct SimDisk {
    world: Arc<Mutex<World>>,
}

thread_local! {
    /// The queue operation this thread is carrying out.
    static TICKET: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Calls `run`; what it changes in a simulated world belongs to a queue's operation that is still in flight.
fn run_as_ticket<T>(ticket: u64, run: impl FnOnce() -> T) -> T {
    let outer = TICKET.replace(Some(ticket));
    let result = run();
    TICKET.set(outer);
    result
}

impl SimDisk {
    /// An empty world.
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Vec::new(), BTreeMap::new())
    }

    fn with(seed: u64, files: Vec<Arc<SimFile>>, names: BTreeMap<String, usize>) -> Self {
        let world = World {
            random: Random::new(seed),
            files,
            durable_names: names.clone(),
            names,
            name_log: Vec::new(),
            sequence: 0,
            tickets: 0,
            hash: seed,
            calls: [0; Call::ALL.len()],
            faults: Vec::new(),
            short_transfers: false,
            interruptions: false,
            capacity_bytes: None,
            alignment: Alignment::NONE,
            captures: false,
            captured: Vec::new(),
            trace: Vec::new(),
        };
        Self { world: Arc::new(Mutex::new(world)) }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        // A test that panicked elsewhere must still be able to report.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of this world.
    pub fn folder(&self) -> SimFolder {
        SimFolder { disk: self.clone() }
    }

    /// A queue over files of this world.
    pub fn queue(&self, depth: usize, seed: u64) -> io::Result<SimQueue> {
        SimQueue::new(self, depth, seed)
    }

    /// Creates the file `name`, which must not exist; as the folder does, with the concrete type.
    pub fn create(&self, name: &str) -> io::Result<SimStorage> {
        let mut world = self.lock();
        world.enter(Call::Create)?;
        let name = component(name)?;
        if world.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = world.files.len();
        world.files.push(Arc::new(SimFile::default()));
        world.change_names(Call::Create, NameChange::Create { name: name.to_owned(), file });
        Ok(SimStorage { disk: self.clone(), file, access: Access::ReadWrite })
    }

    /// Opens the file `name`; as the folder does, with the concrete type.
    pub fn open(&self, name: &str, access: Access) -> io::Result<SimStorage> {
        let mut world = self.lock();
        world.enter(Call::Open)?;
        let file = *world.names.get(component(name)?).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimStorage { disk: self.clone(), file, access })
    }

    /// Makes calls fail from now on.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Ends all faults.
    pub fn heal(&self) {
        let mut world = self.lock();
        world.faults.clear();
        world.short_transfers = false;
        world.interruptions = false;
        world.capacity_bytes = None;
    }

    /// Whether every injected fault that ends has happened.
    pub fn faults_happened(&self) -> bool {
        self.lock().faults.is_empty()
    }

    /// Whether reads and writes move fewer bytes than asked, by seed.
    pub fn set_short_transfers(&self, on: bool) {
        self.lock().short_transfers = on;
    }

    /// Whether one read or write in eight is interrupted, by seed.
    pub fn set_interruptions(&self, on: bool) {
        self.lock().interruptions = on;
    }

    /// How many bytes the host can give to all files together.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity_bytes = bytes;
    }

    /// What transfers must keep; others fail as unbuffered ones do.
    pub fn set_alignment(&self, alignment: Alignment) {
        self.lock().alignment = alignment;
    }

    /// From now on a sector of the file `name` cannot be read, until it is wholly written.
    pub fn lose_sector(&self, name: &str, sector: u64) -> io::Result<()> {
        let mut world = self.lock();
        let file = *world.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        let state = world.file(file);
        state.live.lose_sector(sector);
        state.durable.lose_sector(sector);
        Ok(())
    }

    /// The sectors that cannot be read: the file's name, and the sector in it. Files without a name are left out.
    pub fn unreadable_sectors(&self) -> Vec<(String, u64)> {
        let world = self.lock();
        let sectors = |(name, &file): (&String, &usize)| -> Vec<(String, u64)> {
            world.files[file].live.unreadable().iter().map(|&sector| (name.clone(), sector)).collect()
        };
        world.names.iter().flat_map(sectors).collect()
    }

    /// How often a kind of call was made.
    pub fn calls(&self, call: Call) -> u64 {
        self.lock().calls[call as usize]
    }

    /// A hash over every operation so far: equal seeds and calls give equal hashes.
    pub fn log_hash(&self) -> u64 {
        self.lock().hash
    }

    /// Every change and sync so far, in order.
    pub fn trace(&self) -> Vec<Operation> {
        self.lock().trace.clone()
    }

    /// The world at this instant.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().snapshot()
    }

    /// Whether a snapshot is kept after every operation that changes or syncs anything.
    pub fn capture_every_operation(&self, on: bool) {
        self.lock().captures = on;
    }

    /// The snapshots kept since the last call, in order.
    pub fn take_captured(&self) -> Vec<Snapshot> {
        std::mem::take(&mut self.lock().captured)
    }

    fn new_ticket(&self) -> u64 {
        let mut world = self.lock();
        world.tickets += 1;
        world.tickets
    }

    /// The queue told its owner about this operation: a sync called from now on covers it.
    fn complete(&self, ticket: u64) {
        let mut world = self.lock();
        for file in &mut world.files {
            if file.log.iter().any(|entry| entry.in_flight == Some(ticket)) {
                for entry in &mut Arc::make_mut(file).log {
                    if entry.in_flight == Some(ticket) {
                        entry.in_flight = None;
                    }
                }
            }
        }
    }
}

/// The fault that hit a call.
struct Hit {
    error: io::Error,
    drops_data: bool,
}

impl World {
    /// Counts a call and lets it fail if a fault says so.
    fn check(&mut self, call: Call) -> Result<(), Hit> {
        self.calls[call as usize] += 1;
        let mut hit = None;
        self.faults.retain_mut(|fault| {
            if fault.call.is_some_and(|kind| kind != call) || hit.is_some() {
                return true;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                return true;
            }
            let error = io::Error::from_raw_os_error(fault.errno);
            hit = Some(Hit { error, drops_data: fault.drops_data });
            fault.for_ever
        });
        if let Some(hit) = hit {
            self.hash = mix(self.hash, 0xfa17 ^ call as u64);
            return Err(hit);
        }
        if self.interruptions && matches!(call, Call::Read | Call::Write) && self.random.chance(12) {
            return Err(Hit { error: io::ErrorKind::Interrupted.into(), drops_data: false });
        }
        Ok(())
    }

    fn enter(&mut self, call: Call) -> io::Result<()> {
        self.check(call).map_err(|hit| hit.error)
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            files: self.files.clone(),
            durable_names: self.durable_names.clone(),
            name_log: self.name_log.clone(),
            after: self.trace.last().copied(),
            operations: self.trace.len(),
        }
    }

    fn note(&mut self, operation: Operation, data_hash: u64) {
        for value in
            [operation.call as u64, operation.file as u64, operation.offset, operation.len, data_hash]
        {
            self.hash = mix(self.hash, value);
        }
        self.trace.push(operation);
        if self.captures {
            let snapshot = self.snapshot();
            self.captured.push(snapshot);
        }
    }

    fn file(&mut self, file: usize) -> &mut SimFile {
        Arc::make_mut(&mut self.files[file])
    }

    fn log(&mut self, file: usize, change: Change) {
        self.sequence += 1;
        let sequence = self.sequence;
        let state = self.file(file);
        change.apply(&mut state.live);
        state.log.push(Entry { change, in_flight: TICKET.get(), sequence });
    }

    fn change_names(&mut self, call: Call, change: NameChange) {
        self.sequence += 1;
        change.apply(&mut self.names);
        let hash = hash_bytes(format!("{change:?}").as_bytes());
        self.name_log.push(NameEntry { change, sequence: self.sequence });
        self.note(Operation { call, file: 0, offset: 0, len: 0 }, hash);
    }

    /// Gives blocks to a range of a file, or refuses when the host is full.
    fn take_space(&mut self, file: usize, offset: u64, len: u64) -> io::Result<()> {
        let blocks = Extent::between(offset, offset.saturating_add(len)).widen(BLOCK_BYTES, u64::MAX);
        if let Some(capacity) = self.capacity_bytes {
            let others: u64 = (0..self.files.len())
                .filter(|&at| at != file)
                .map(|at| self.files[at].allocated.bytes())
                .sum();
            let mut own = self.files[file].allocated.clone();
            own.insert(blocks);
            // What is written in place needs no more, also where there is too little already.
            let grows = own.bytes() > self.files[file].allocated.bytes();
            if grows && others.saturating_add(own.bytes()) > capacity {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        self.file(file).allocated.insert(blocks);
        Ok(())
    }

    fn give_space_back(&mut self, file: usize, start: u64, end: u64) {
        let inner = Extent::between(start.next_multiple_of(BLOCK_BYTES), end - end % BLOCK_BYTES);
        self.file(file).allocated.remove(inner);
    }

    /// How much of a transfer of `len` bytes takes place: all, or by seed less.
    fn shorten(&mut self, len: usize) -> usize {
        // Whole sectors: hosts stop at their own blocks, and what is cut inside a sector would be torn there.
        let unit = usize::try_from(self.alignment.offset.max(512)).unwrap_or(512);
        let units = len / unit;
        if !self.short_transfers || units < 2 || self.random.chance(50) {
            return len;
        }
        (1 + self.random.index(units - 1)) * unit
    }

    fn check_alignment(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        if super::is_aligned(self.alignment, offset, buffer) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        }
    }
}

#[cfg(test)]
mod tests;
