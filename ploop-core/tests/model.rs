//! Random requests against a model, sector by sector: several queues at once, overlapping requests, discards, flushes,
//! freezes, faults, queues that come and go, closing and opening; on chains of one to three deltas, with a raw base or
//! without, on files that demand alignment and files that do not.
//!
//! `SEED=n cargo test -p ploop-core --test model` repeats one run; `ROUNDS=n` makes more of them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod referee;
mod served;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ploop_core::Extent;
use ploop_core::device::{Client, Completion, Destination, Disk, DiskOptions, Freezing, Op, Queue};
use ploop_core::io::file::{Caching, FileStorage, OpenOptions};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::uring::UringQueue;
use ploop_core::io::{Access, Alignment, IoBuf, IoQueue, QueueChoice, Storage, Wait};
use ploop_core::units::FileCluster;
use served::*;

const CLUSTERS: u64 = 12;
const SECTORS: u64 = CLUSTERS * CLUSTER_SECTORS;
const QUEUES: usize = 3;

/// Where a run takes place.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// Files in memory that insist on this alignment.
    Memory(u32),
    /// The simulator.
    Simulated,
}

struct Flight {
    op: Op,
    sectors: Range<u64>,
    began: u64,
}

struct Run {
    seed: u64,
    random: Random,
    place: Place,
    sim: SimDisk,
    files: Vec<Arc<dyn Storage>>,
    lower: Vec<Vec<u8>>,
    raw_base: bool,
    options: DiskOptions,
    disk: Arc<Disk>,
    queues: Vec<Queue>,
    flights: Vec<HashMap<u64, Flight>>,
    freezing: Option<Freezing>,
    judge: Judge,
    next: u64,
}

fn stamped(random: &mut Random, next: &mut u64, sectors: Range<u64>, stamps: &mut [u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sector in sectors {
        *next += 1;
        let stamp = if random.chance(90) { *next } else { 0 };
        stamps[sector as usize] = stamp;
        bytes.extend_from_slice(&sector_of(stamp, sector));
    }
    bytes
}

impl Run {
    fn new(seed: u64, is_hostile: bool) -> Self {
        let mut random = Random::new(seed);
        let place = match random.below(4) {
            _ if is_hostile => Place::Simulated,
            0 => Place::Memory(1),
            1 => Place::Memory(512),
            2 => Place::Memory(4096),
            _ => Place::Simulated,
        };
        let sim = SimDisk::new(seed);
        if is_hostile {
            // Sectors stay whole when a transfer is cut short.
            sim.set_alignment(Alignment { offset: 512 << (3 * random.below(2)), memory: 512 });
        }
        let raw_base = random.chance(25);
        let depth = 1 + random.below(3) as usize;
        let mut stamps = vec![0; SECTORS as usize];
        let mut next = 0;
        let mut files: Vec<Arc<dyn Storage>> = Vec::new();
        for delta in 0..depth {
            if raw_base && delta == 0 {
                // Under an image it is shorter than the disk, and in most runs its end lies inside a cluster.
                let sectors = if depth == 1 { SECTORS } else { 1 + random.below(SECTORS) };
                let bytes = stamped(&mut random, &mut next, 0..sectors.min(SECTORS), &mut stamps);
                files.push(MemoryFile::with_bytes(
                    if let Place::Memory(unit) = place { unit } else { 1 },
                    &bytes,
                ));
                continue;
            }
            let file: Arc<dyn Storage> = match place {
                Place::Memory(unit) => MemoryFile::new(unit),
                Place::Simulated => Arc::new(sim.create(&format!("delta-{delta}")).unwrap()),
            };
            create(&*file, CLUSTERS);
            files.push(file);
            if delta + 1 < depth {
                let mut writes = Vec::new();
                for cluster in 0..CLUSTERS {
                    if random.chance(50) {
                        let start = cluster * CLUSTER_SECTORS + random.below(CLUSTER_SECTORS);
                        let end = start + 1 + random.below((cluster + 1) * CLUSTER_SECTORS - start);
                        writes.push((start * 512, stamped(&mut random, &mut next, start..end, &mut stamps)));
                    }
                }
                fill(&files, raw_base, &writes);
            }
        }
        let lower = files[..depth - 1].iter().map(|file| read_all(&**file)).collect();
        let options = DiskOptions {
            bounce_buffers: 1 + random.below(3) as usize,
            requests_max: 8 + random.below(60) as usize,
            pending_clusters_max: random.below(20) as usize,
            ..DiskOptions::default()
        };
        let disk = serve(open_chain(&files, raw_base), options.clone());
        let mut run = Self {
            seed,
            random,
            place,
            sim,
            files,
            lower,
            raw_base,
            options,
            disk,
            queues: Vec::new(),
            flights: Vec::new(),
            freezing: None,
            judge: Judge::new(&stamps),
            next,
        };
        run.add_queues();
        run
    }

    fn add_queues(&mut self) {
        while self.queues.len() < QUEUES {
            let seed = self.random.next();
            let depth = 1 + self.random.below(24) as usize;
            let io: Box<dyn IoQueue> = match self.place {
                Place::Memory(_) => Box::new(StepQueue::new(seed, depth)),
                Place::Simulated => Box::new(self.sim.queue(depth, seed).unwrap()),
            };
            self.queues.push(self.disk.queue(io).unwrap());
            self.flights.push(HashMap::new());
        }
    }

    fn submit(&mut self) {
        let queue = self.random.below(QUEUES as u64) as usize;
        if self.queues[queue].in_flight() >= self.options.requests_max {
            return;
        }
        let start = self.random.below(SECTORS);
        let len = match self.random.below(4) {
            0 => 1 + self.random.below(8),
            1 => 1 + self.random.below(CLUSTER_SECTORS),
            2 => 1 + self.random.below(3 * CLUSTER_SECTORS),
            _ => CLUSTER_SECTORS,
        };
        let aligned = if self.random.chance(40) { start - start % CLUSTER_SECTORS } else { start };
        let sectors = aligned..(aligned + len).min(SECTORS);
        let op = match self.random.below(11) {
            0..=3 => Op::Read,
            4..=6 => Op::Write { fua: self.random.chance(10) },
            7 => Op::WriteZeroes { fua: self.random.chance(10), may_unmap: self.random.chance(50) },
            8 => Op::Discard,
            9 => Op::Flush,
            _ => {
                let place = FileCluster(1 + self.random.below(2 * CLUSTERS) as u32);
                Op::Relocate(if self.random.chance(60) {
                    Destination::Below(place)
                } else {
                    Destination::From(place)
                })
            }
        };
        let sectors = match op {
            Op::Relocate(_) => {
                let first = start - start % CLUSTER_SECTORS;
                first..first + CLUSTER_SECTORS
            }
            _ => sectors,
        };
        self.next += 1;
        let id = self.next;
        let bytes = (sectors.end - sectors.start) * 512;
        let request = match op {
            Op::Read => read_request(id, sectors.start * 512, bytes),
            Op::Write { .. } => {
                let content: Vec<u8> = sectors.clone().flat_map(|sector| sector_of(id, sector)).collect();
                // Some buffers lie askew in memory.
                let skew = if self.random.chance(20) { 8 } else { 0 };
                let mut buffer = IoBuf::try_zeroed(content.len() + skew).unwrap();
                drop(buffer.split_to(skew));
                buffer.as_mut_slice().copy_from_slice(&content);
                self.judge.begin_write(sectors.clone(), id, id);
                request(id, op, sectors.start * 512, bytes, Some(buffer))
            }
            Op::Flush => request(id, op, 0, 0, None),
            Op::Relocate(_) => request(id, op, sectors.start * 512, bytes, None),
            _ => {
                self.judge.begin_write(sectors.clone(), id, 0);
                request(id, op, sectors.start * 512, bytes, None)
            }
        };
        let began = self.judge.now();
        self.flights[queue].insert(id, Flight { op, sectors, began });
        self.queues[queue].submit(request);
    }

    fn run_queue(&mut self, queue: usize) {
        let mut completions = Vec::new();
        self.queues[queue].run(Wait::No, &mut completions).unwrap();
        for completion in completions {
            self.ended(queue, completion);
        }
    }

    fn ended(&mut self, queue: usize, completion: Completion) {
        let seed = self.seed;
        let flight = self.flights[queue].remove(&completion.id).expect("an answer without a request");
        if completion.result.is_err() {
            panic!("SEED={seed}: {:?} of {:?} failed: {:?}", flight.op, flight.sectors, completion.result);
        }
        let len = (flight.sectors.end - flight.sectors.start) as usize * 512;
        match flight.op {
            Op::Read if completion.result.is_ok() => {
                let buffer = completion.buffer.expect("a read gives its buffer back");
                assert_eq!(buffer.len(), len);
                for (bytes, sector) in buffer.as_slice().as_chunks::<512>().0.iter().zip(flight.sectors) {
                    let stamp = stamp_of(bytes, sector).unwrap_or_else(|| {
                        panic!("SEED={seed}: sector {sector} is torn: {:?}", &bytes[..32])
                    });
                    assert!(
                        self.judge.may_see(sector, flight.began, stamp),
                        "SEED={seed}: sector {sector} read {stamp}, history {}",
                        self.judge.describe(sector)
                    );
                }
            }
            Op::Write { .. } => {
                assert_eq!(completion.buffer.expect("a write gives its buffer back").len(), len);
                self.judge.end_write(flight.sectors, completion.id, completion.result.is_err());
            }
            Op::WriteZeroes { .. } | Op::Discard => {
                self.judge.end_write(flight.sectors, completion.id, completion.result.is_err());
            }
            _ => {}
        }
    }

    fn drain(&mut self) {
        self.freezing = None;
        for _ in 0..200_000 {
            if self.queues.iter().all(|queue| queue.in_flight() == 0) {
                assert!(self.flights.iter().all(HashMap::is_empty));
                self.judge.prune();
                return;
            }
            for queue in 0..self.queues.len() {
                self.run_queue(queue);
            }
            self.disk.step_flusher();
        }
        panic!("SEED={}: requests do not end", self.seed);
    }

    /// A queue goes away in the middle of its work; what it was writing may or may not have happened.
    fn drop_queue(&mut self) {
        let queue = self.random.below(QUEUES as u64) as usize;
        drop(self.queues.swap_remove(queue));
        for (id, flight) in self.flights.swap_remove(queue) {
            if flight.op.changes_data() {
                self.judge.end_write(flight.sectors, id, true);
            }
        }
        self.add_queues();
    }

    fn freeze_or_thaw(&mut self) {
        match self.freezing.take() {
            None => self.freezing = self.disk.begin_freeze().ok(),
            Some(freezing) => match freezing.finish() {
                // Dropped: thawed.
                Ok(_frozen) => {}
                Err(freezing) => self.freezing = Some(freezing),
            },
        }
    }

    fn reopen(&mut self) {
        self.drain();
        self.queues.clear();
        self.flights.clear();
        self.disk.close().unwrap_or_else(|error| panic!("SEED={}: {error}", self.seed));
        self.disk = serve(open_chain(&self.files, self.raw_base), self.options.clone());
        self.add_queues();
    }

    fn verify(&mut self) {
        self.drain();
        let io: Box<dyn IoQueue> = match self.place {
            Place::Memory(_) => Box::new(StepQueue::new(self.seed, 8)),
            Place::Simulated => Box::new(self.sim.queue(8, self.seed).unwrap()),
        };
        let mut client = Client::new(&self.disk, io).unwrap();
        let began = self.judge.now();
        let content = client.read(Extent::new(0, SECTORS * 512).unwrap()).unwrap();
        for (bytes, sector) in content.as_slice().as_chunks::<512>().0.iter().zip(0..) {
            let stamp =
                stamp_of(bytes, sector).unwrap_or_else(|| panic!("SEED={}: sector {sector}", self.seed));
            assert!(
                self.judge.may_see(sector, began, stamp),
                "SEED={}: sector {sector} is {stamp} in the end, history {}",
                self.seed,
                self.judge.describe(sector)
            );
        }
    }

    fn steps(&mut self, steps: u64) {
        for step in 0..steps {
            match self.random.below(100) {
                0..=44 => self.submit(),
                45..=79 => {
                    let queue = self.random.below(QUEUES as u64) as usize;
                    self.run_queue(queue);
                }
                80..=94 => {
                    self.disk.step_flusher();
                }
                95..=96 => self.freeze_or_thaw(),
                97 if self.random.chance(10) => self.drop_queue(),
                98 if self.random.chance(30) => self.verify(),
                99 if self.random.chance(10) => self.reopen(),
                _ => {}
            }
            if step % 512 == 0 {
                self.verify();
            }
        }
        self.verify();
        self.reopen();
        self.verify();
        for (file, before) in self.files.iter().zip(&self.lower) {
            assert!(read_all(&**file) == *before, "SEED={}: a lower delta was written", self.seed);
        }
        self.queues.clear();
        self.disk.close().unwrap();
    }
}

fn seeds(count: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    match number("SEED") {
        Some(seed) => vec![seed],
        None => (0..number("ROUNDS").unwrap_or(count)).collect(),
    }
}

#[test]
fn served_disk_equals_the_model() {
    for seed in seeds(60) {
        Run::new(seed, false).steps(1500);
    }
}

#[test]
fn served_disk_equals_the_model_on_a_hostile_host() {
    for seed in seeds(40) {
        let mut run = Run::new(seed, true);
        run.sim.set_short_transfers(true);
        run.steps(600);
        run.sim.heal();
    }
}

const THREADS: u64 = 3;
const REAL_CLUSTERS: u64 = 256;
const REAL_SECTORS: u64 = REAL_CLUSTERS * CLUSTER_SECTORS;
/// Sectors of which one thread is the only writer; neighbours belong to others.
const SHARE: u64 = 8;

/// One thread's requests: writes, zeros, discards of its own sectors, many at once; reads of everything.
fn work(disk: &Arc<Disk>, choice: QueueChoice, thread: u64, rounds: u64) -> Vec<(u64, u64)> {
    let mut random = Random::new(thread);
    let mut client = Client::new(disk, choice.queue(16).unwrap()).unwrap();
    let mut stamps: HashMap<u64, u64> = HashMap::new();
    let mut next = (thread + 1) << 40;
    for round in 0..rounds {
        let mut busy = HashSet::new();
        for _ in 0..1 + random.below(24) {
            let share = random.below(REAL_SECTORS / SHARE / THREADS) * THREADS + thread;
            if !busy.insert(share) {
                continue;
            }
            let start = share * SHARE + random.below(SHARE);
            let end = start + 1 + random.below((share + 1) * SHARE - start);
            let extent = Extent::between(start * 512, end * 512);
            let op = match random.below(10) {
                0 => Op::Discard,
                1 => Op::WriteZeroes { fua: false, may_unmap: random.chance(50) },
                _ => Op::Write { fua: random.chance(2) },
            };
            let mut bytes = Vec::new();
            for sector in start..end {
                next += 1;
                let stamp = if matches!(op, Op::Write { .. }) { next } else { 0 };
                bytes.extend_from_slice(&sector_of(stamp, sector));
                stamps.insert(sector, stamp);
            }
            let buffer = matches!(op, Op::Write { .. }).then(|| IoBuf::try_copy_of(&bytes).unwrap());
            client.submit(op, extent, buffer);
        }
        while let Some(completion) = client.next_completion().unwrap() {
            assert_eq!(completion.result, Ok(()));
        }
        let start = random.below(REAL_SECTORS);
        let end = (start + 1 + random.below(512)).min(REAL_SECTORS);
        let found = client.read(Extent::between(start * 512, end * 512)).unwrap();
        for (bytes, sector) in found.as_slice().as_chunks::<512>().0.iter().zip(start..) {
            if sector / SHARE % THREADS == thread {
                let expected = stamps.get(&sector).copied().unwrap_or(0);
                assert_eq!(stamp_of(bytes, sector), Some(expected), "sector {sector}");
            }
        }
        if round % 16 == thread {
            client.flush().unwrap();
        }
    }
    stamps.into_iter().collect()
}

/// Follows a disk that is being written to with a tracker, as a copy does; ends frozen, with an equal mirror.
fn mirror(disk: &Arc<Disk>, choice: QueueChoice, stop: &AtomicBool) {
    let tracker = disk.start_tracker().unwrap();
    let mut client = Client::new(disk, choice.queue(4).unwrap()).unwrap();
    let mut mirror = vec![0; (REAL_SECTORS * 512) as usize];
    mirror.copy_from_slice(client.read(Extent::between(0, REAL_SECTORS * 512)).unwrap().as_slice());
    let mut harvest = |client: &mut Client| {
        let mut at = 0;
        while let Some(taken) = tracker.take(at, 256 << 10) {
            let extent = taken.extent();
            at = extent.end();
            let found = client.read(extent).unwrap();
            mirror[extent.start() as usize..extent.end() as usize].copy_from_slice(found.as_slice());
            taken.acknowledge();
        }
    };
    while !stop.load(Ordering::Relaxed) {
        harvest(&mut client);
    }
    for _ in 0..3 {
        let frozen = disk.freeze(Duration::from_secs(300)).unwrap();
        harvest(&mut client);
        assert!(tracker.is_clean(), "a mark came after the gate had drained");
        drop(frozen);
        harvest(&mut client);
    }
    let frozen = disk.freeze(Duration::from_secs(300)).unwrap();
    harvest(&mut client);
    let all = client.read(Extent::between(0, REAL_SECTORS * 512)).unwrap();
    assert!(all.as_slice() == mirror, "the mirror differs from the frozen disk");
    drop(frozen);
    disk.stop_tracker(&tracker);
}

fn real_files(choice: QueueChoice, caching: Caching) {
    let folder = referee::folder();
    let open = |name: &str, access| -> Arc<dyn Storage> {
        let options = match caching {
            Caching::Direct => OpenOptions::new(access).direct(),
            Caching::Cached => OpenOptions::new(access),
        };
        Arc::new(FileStorage::open(folder.path().join(name), &options).unwrap())
    };
    for name in ["base", "top"] {
        create(&FileStorage::create_exclusive(folder.path().join(name), caching).unwrap(), REAL_CLUSTERS);
    }
    let base: Arc<dyn Storage> = open("base", Access::ReadWrite);
    fill(&[base], false, &[(100 * CLUSTER, vec![0; 5 * CLUSTER as usize])]);
    let files = [open("base", Access::ReadOnly), open("top", Access::ReadWrite)];
    let options = DiskOptions { pending_clusters_max: 16, bounce_buffers: 2, ..DiskOptions::default() };
    let disk = Disk::open(open_chain(&files, false), options).unwrap();
    let stop = AtomicBool::new(false);
    let mut stamps: HashMap<u64, u64> = HashMap::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn({
                    let disk = &disk;
                    move || work(disk, choice, thread, 150)
                })
            })
            .collect();
        let mirroring = scope.spawn(|| mirror(&disk, choice, &stop));
        for _ in 0..20 {
            drop(disk.freeze(Duration::from_secs(300)));
            // Between two freezes the workers come on.
            std::thread::sleep(Duration::from_millis(2));
        }
        for worker in workers {
            // Stop the mirror also when a worker has panicked.
            let result = worker.join();
            stop.store(true, Ordering::Relaxed);
            stamps.extend(result.unwrap());
        }
        mirroring.join().unwrap();
    });
    disk.close().unwrap();
    drop((disk, files));
    let disk = serve(
        open_chain(&[open("base", Access::ReadOnly), open("top", Access::ReadWrite)], false),
        DiskOptions::default(),
    );
    let mut client = Client::new(&disk, choice.queue(8).unwrap()).unwrap();
    for sector in 0..REAL_SECTORS {
        let found = client.read(Extent::between(sector * 512, sector * 512 + 512)).unwrap();
        let expected = stamps.get(&sector).copied().unwrap_or(0);
        assert_eq!(stamp_of(found.as_slice(), sector), Some(expected), "sector {sector} after reopening");
    }
    drop(client);
    disk.close().unwrap();
}

#[test]
fn real_files_by_threads() {
    real_files(QueueChoice::Pool, Caching::Cached);
    real_files(QueueChoice::Pool, Caching::Direct);
}

#[test]
fn real_files_by_io_uring() {
    if !UringQueue::probe() {
        ploop_testing::skip(ploop_testing::Need::IoUring, "this kernel has no io_uring for us");
        return;
    }
    real_files(QueueChoice::Uring, Caching::Cached);
    real_files(QueueChoice::Uring, Caching::Direct);
}
