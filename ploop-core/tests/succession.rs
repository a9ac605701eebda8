//! What a server leaves behind for its successor, at every moment it can die: the image file and the log of pending
//! entries together must always give the disk that the guest has been told of.
//!
//! One thread writes a cluster and discards it, another one flushes. Both stop inside every call to the log as well as
//! between their steps, and every order of their moves is tried; after each move the server is taken for dead. Then
//! a third client writes, to get whatever place was given back, and the server is taken for dead again. Where
//! a thread waits for a lock of the other, there is no such order, and the branch ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod served;

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ploop_core::device::pending::{PendingEntry, PendingLog, Seal};
use ploop_core::device::{Disk, DiskOptions, Op, Request};
use ploop_core::format::{Chain, ChainOptions, Mapping, Source};
use ploop_core::io::{Access, Alignment, Allocation, Storage, Wait};
use ploop_core::mutant::{self, Mutant};
use ploop_core::units::GuestOffset;
use served::*;

const CLUSTERS: u64 = 16;
/// Written before all else, so that the flusher has something to do.
const FIRST: u64 = 0;
/// Written and discarded by one thread.
const CHANGED: u64 = 1;
/// Written last, to get the place of the discarded one.
const LATER: std::ops::Range<u64> = 2..6;

/// Who takes longer than this waits for a lock.
const BLOCKED: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    Parked,
    Running,
    Ended,
}

struct Moves {
    status: [Status; 3],
    /// Nobody parks any more.
    is_over: bool,
}

/// Lets one thread move at a time.
struct Stage {
    moves: Mutex<Moves>,
    changed: Condvar,
}

thread_local! {
    static ROLE: RefCell<Option<(Arc<Stage>, usize)>> = const { RefCell::new(None) };
}

/// Stops a thread that plays a role until it is its turn.
fn park() {
    let role = ROLE.with_borrow(Clone::clone);
    if let Some((stage, role)) = role {
        let mut moves = stage.moves.lock().unwrap();
        if !moves.is_over {
            moves.status[role] = Status::Parked;
            stage.changed.notify_all();
            drop(
                stage
                    .changed
                    .wait_while(moves, |moves| moves.status[role] == Status::Parked && !moves.is_over),
            );
        }
    }
}

/// A file at which the flusher stops before each call.
struct StoppingFile(Arc<MemoryFile>);

fn park_flusher() {
    if ROLE.with_borrow(|role| role.as_ref().is_some_and(|role| role.1 == FLUSHER)) {
        park();
    }
}

impl Storage for StoppingFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        park_flusher();
        self.0.write_at(offset, buffer)
    }

    fn sync_data(&self) -> io::Result<()> {
        park_flusher();
        self.0.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        park_flusher();
        self.0.allocate(offset, len, how)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn alignment(&self) -> Alignment {
        self.0.alignment()
    }
}

impl Stage {
    fn new() -> Arc<Self> {
        let moves = Moves { status: [Status::Running; 3], is_over: false };
        Arc::new(Self { moves: Mutex::new(moves), changed: Condvar::new() })
    }

    fn play(
        self: &Arc<Self>,
        role: usize,
        mutant: Option<Mutant>,
        script: impl FnOnce() + Send + 'static,
    ) -> std::thread::JoinHandle<()> {
        let stage = Arc::clone(self);
        std::thread::spawn(move || {
            mutant::activate(mutant);
            ROLE.set(Some((Arc::clone(&stage), role)));
            park();
            script();
            stage.moves.lock().unwrap().status[role] = Status::Ended;
            stage.changed.notify_all();
        })
    }

    /// Lets a role go on until it parks or ends; `false` when it does neither.
    fn go(&self, role: usize) -> bool {
        let mut moves = self.moves.lock().unwrap();
        assert_eq!(moves.status[role], Status::Parked);
        moves.status[role] = Status::Running;
        self.changed.notify_all();
        let (moves, _) = self
            .changed
            .wait_timeout_while(moves, BLOCKED, |moves| moves.status[role] == Status::Running)
            .unwrap();
        moves.status[role] != Status::Running
    }

    fn has_ended(&self, role: usize) -> bool {
        self.moves.lock().unwrap().status[role] == Status::Ended
    }

    fn end(&self) {
        let mut moves = self.moves.lock().unwrap();
        moves.is_over = true;
        self.changed.notify_all();
    }
}

/// A log in memory whose callers stop where the order could matter.
#[derive(Debug, Default)]
struct Log {
    kept: Mutex<(u64, Vec<PendingEntry>)>,
}

impl Log {
    fn entries(&self) -> Vec<PendingEntry> {
        let kept = self.kept.lock().unwrap();
        kept.1[kept.0 as usize..].to_vec()
    }
}

impl PendingLog for Log {
    fn entered(&self, entry: PendingEntry) {
        park();
        self.kept.lock().unwrap().1.push(entry);
    }

    fn seal(&self) -> Seal {
        let end = Seal(self.kept.lock().unwrap().1.len() as u64);
        park();
        end
    }

    fn committed(&self, seal: Seal) {
        park();
        let mut kept = self.kept.lock().unwrap();
        kept.0 = kept.0.max(seal.0);
        drop(kept);
        park();
    }

    fn poisoned(&self) {
        panic!("nothing fails here");
    }

    fn top_replaced(&self, _top: &dyn Storage) {}
}

/// What the guest knows of the cluster that is changed.
#[derive(Clone, Copy, Default, Debug)]
struct Told {
    write_began: bool,
    written: bool,
    discard_began: bool,
    discarded: bool,
}

struct World {
    file: Arc<MemoryFile>,
    log: Arc<Log>,
    disk: Arc<Disk>,
    told: Arc<Mutex<Told>>,
    later: Arc<Mutex<Vec<u64>>>,
}

fn open(bytes: &[u8]) -> Arc<Chain> {
    let source = Source { name: PathBuf::from("top"), storage: MemoryFile::with_bytes(1, bytes), raw: false };
    let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: true };
    Chain::open(vec![source], &options).unwrap()
}

/// Serves one request on a queue of its own, without a step of the flusher.
fn serve_one(disk: &Arc<Disk>, request: Request) {
    let mut queue = disk.queue(Box::new(StepQueue::new(3, 16))).unwrap();
    queue.submit(request);
    let mut ended = Vec::new();
    while ended.is_empty() {
        queue.run(Wait::Yes, &mut ended).unwrap();
    }
    assert_eq!(ended[0].result, Ok(()));
}

fn pattern(cluster: u64) -> u8 {
    0xA0 + cluster as u8
}

fn write(disk: &Arc<Disk>, cluster: u64) {
    serve_one(disk, write_request(1, cluster * CLUSTER, &vec![pattern(cluster); CLUSTER as usize]));
}

/// What a guest finds in a cluster: its one byte, 0 for zeros.
fn content(chain: &Chain, cluster: u64) -> Result<u8, String> {
    match chain.map(GuestOffset(cluster * CLUSTER), CLUSTER) {
        Mapping::Zero { .. } => Ok(0),
        Mapping::Data { offset, len, .. } => {
            assert_eq!(len, CLUSTER);
            let mut bytes = vec![0; CLUSTER as usize];
            chain.storage(0).read_at(offset.0, &mut bytes).unwrap();
            if bytes.iter().all(|byte| *byte == bytes[0]) { Ok(bytes[0]) } else { Err("mixed".into()) }
        }
    }
}

impl World {
    fn new() -> Self {
        let file = MemoryFile::new(1);
        create(&*file, CLUSTERS);
        let log = Arc::new(Log::default());
        let options =
            DiskOptions { pending_log: Arc::clone(&log) as Arc<dyn PendingLog>, ..DiskOptions::default() };
        let storages: [Arc<dyn Storage>; 1] = [Arc::new(StoppingFile(Arc::clone(&file)))];
        let disk = serve(open_chain(&storages, false), options);
        write(&disk, FIRST);
        Self { file, log, disk, told: Arc::default(), later: Arc::default() }
    }

    /// The server dies now: does its successor serve what the guest was told?
    fn judge(&self) -> Result<(), String> {
        let chain = open(&self.file.bytes());
        let entries = self.log.entries();
        let told = *self.told.lock().unwrap();
        let context = || format!("told {told:?}, log {entries:?}");
        chain
            .adopt(entries.iter().map(|entry| (entry.cluster, entry.file)))
            .map_err(|error| format!("{error}; {}", context()))?;
        let expect = |cluster: u64, allowed: &[u8]| {
            let found = content(&chain, cluster);
            match found {
                Ok(byte) if allowed.contains(&byte) => Ok(()),
                _ => Err(format!("cluster {cluster} holds {found:x?}, not {allowed:x?}; {}", context())),
            }
        };
        expect(FIRST, &[pattern(FIRST)])?;
        let mut allowed = Vec::new();
        if !told.discarded && told.write_began {
            allowed.push(pattern(CHANGED));
        }
        if !told.written || told.discard_began {
            allowed.push(0);
        }
        expect(CHANGED, &allowed)?;
        self.later.lock().unwrap().iter().try_for_each(|&cluster| expect(cluster, &[pattern(cluster)]))
    }
}

/// From the seal to the punch that has been done.
const MOVES_OF_A_ROUND: usize = 9 + 2;
const FLUSHER: usize = 0;
const CHANGER: usize = 1;
const THIRD: usize = 2;

/// Plays the moves, then lets the server die, and a while later again. `None` when there is no such order.
fn play(schedule: &[usize], mutant: Option<Mutant>) -> Option<Result<(), String>> {
    let world = World::new();
    let stage = Stage::new();
    let mut threads = Vec::new();
    let disk = Arc::clone(&world.disk);
    threads.push(stage.play(FLUSHER, mutant, move || {
        for _ in 0..2 {
            disk.flush().unwrap();
            park();
            // Punches.
            while disk.step_flusher() {
                park();
            }
        }
    }));
    let (disk, told) = (Arc::clone(&world.disk), Arc::clone(&world.told));
    threads.push(stage.play(CHANGER, mutant, move || {
        told.lock().unwrap().write_began = true;
        write(&disk, CHANGED);
        told.lock().unwrap().written = true;
        park();
        told.lock().unwrap().discard_began = true;
        serve_one(&disk, request(2, Op::Discard, CHANGED * CLUSTER, CLUSTER, None));
        told.lock().unwrap().discarded = true;
    }));
    let (disk, later) = (Arc::clone(&world.disk), Arc::clone(&world.later));
    threads.push(stage.play(THIRD, mutant, move || {
        // Not to be stopped: the changer is the one whose order is tried.
        ROLE.set(None);
        for cluster in LATER {
            write(&disk, cluster);
            later.lock().unwrap().push(cluster);
        }
    }));
    // All are at their first stop.
    for role in [FLUSHER, CHANGER, THIRD] {
        let moves = stage.moves.lock().unwrap();
        drop(stage.changed.wait_while(moves, |moves| moves.status[role] == Status::Running).unwrap());
    }
    let verdict = (|| {
        for &role in schedule {
            if stage.has_ended(role) || !stage.go(role) {
                return None;
            }
        }
        let first = world.judge();
        if first.is_err() {
            return Some(first);
        }
        // A third client that must wait shows nothing; what it was told until then is judged with the others.
        Some(if stage.go(THIRD) { world.judge() } else { Ok(()) })
    })();
    stage.end();
    for thread in threads {
        thread.join().unwrap();
    }
    verdict
}

/// Every order of at most so many moves of each; the number of moments judged.
fn explore(
    schedule: &mut Vec<usize>,
    left: [usize; 2],
    mutant: Option<Mutant>,
    judged: &mut usize,
) -> Result<(), String> {
    for role in [FLUSHER, CHANGER] {
        if left[role] == 0 {
            continue;
        }
        schedule.push(role);
        if let Some(verdict) = play(schedule, mutant) {
            *judged += 1;
            verdict.map_err(|error| format!("moves {schedule:?}: {error}"))?;
            let mut left = left;
            left[role] -= 1;
            explore(schedule, left, mutant, judged)?;
        }
        schedule.pop();
    }
    Ok(())
}

#[test]
fn a_successor_serves_what_the_guest_was_told_at_every_death() {
    let mut judged = 0;
    explore(&mut Vec::new(), [MOVES_OF_A_ROUND, 4], None, &mut judged).unwrap();
    println!("{judged} moments judged");
    assert!(judged > 300, "only {judged} moments were judged");
}

#[test]
fn records_apart_from_their_changes_are_noticed() {
    // Sealed log; placed, recorded, cleared; sealed table, and the whole round with its punch.
    let schedule = [&[FLUSHER, CHANGER, CHANGER, CHANGER][..], &[FLUSHER; MOVES_OF_A_ROUND]].concat();
    let verdict = play(&schedule[..schedule.len() - 2], Some(Mutant::LoggedApart));
    assert!(matches!(verdict, Some(Err(_))), "the mutant lives: {verdict:?}");
    ploop_testing::found(Mutant::LoggedApart);
}
