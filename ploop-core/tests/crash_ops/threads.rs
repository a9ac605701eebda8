//! Lives of running disks whose guests write in threads of their own while snapshots, also temporary ones, are made and
//! deleted and the image is compacted; and what the death of the machine or the server leaves at any moment of that.
//!
//! Each writer owns every third slot of the disk and remembers what it issued, what was answered and what a flush covered.
//! So of each snapshot it is known that it shows every writer at one moment between the command's begin and its end, and
//! of a loss of power which values a sector may hold. Nothing depends on how the threads run.
//!
//! `PLOOP_THREADED_LIVES` says how many lives (default 40), `SEED` picks one; the threads of a life run as they like.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::Access;
use ploop_core::io::sim::{CrashLevel, CrashOptions, Random, SimDisk};
use ploop_core::ops::Silent;
use ploop_core::ops::compact::{CompactOptions, compact_with};
use ploop_core::ops::live::{DeleteOptions, NoWriters, SnapshotOptions, delete, snapshot};

use crate::bundle::{Shape, View, guid, open_state};
use crate::live::Simulated;
use crate::pattern::{SECTOR, fill, stamp, values};
use crate::reading::describe;
use ploop_testing::count;

const WRITERS: usize = 3;
/// Sectors of a slot: no divisor of a cluster, so that slots cross clusters.
const SLOT: usize = 6;

fn told(error: Error) -> String {
    describe(&error)
}

/// What a writer did, in order.
#[derive(Default)]
struct Log {
    /// Slot, and the number of the write; 0 for zeros.
    issued: Vec<(usize, u64)>,
    answered: usize,
    durable: usize,
}

impl Log {
    /// The value of a sector of `slot` behind the first `len` writes; none if they did not touch it.
    fn value(&self, len: usize, slot: usize, sector: usize) -> Option<u64> {
        let last = self.issued[..len].iter().rev().find(|(at, _)| *at == slot);
        last.map(|&(_, number)| value(number, sector))
    }
}

fn value(number: u64, sector: usize) -> u64 {
    if number == 0 { 0 } else { stamp(number, sector as u64) }
}

/// Until when each writer had come.
#[derive(Clone, Copy, Default)]
struct Mark {
    durable: usize,
    answered: usize,
    issued: usize,
}

struct Guests {
    logs: [Mutex<Log>; WRITERS],
    /// What the disk held before.
    start: Vec<u64>,
    stop: AtomicBool,
    violation: Mutex<Option<String>>,
}

impl Guests {
    fn slots(&self) -> usize {
        self.start.len() / SLOT
    }

    fn marks(&self) -> [Mark; WRITERS] {
        std::array::from_fn(|writer| {
            let log = self.logs[writer].lock().unwrap();
            Mark { durable: log.durable, answered: log.answered, issued: log.issued.len() }
        })
    }

    fn write(&self, writer: usize, disk: &Arc<Disk>, host: &SimDisk, seed: u64) -> Result<(), String> {
        let queue = host.queue(8, seed).map_err(|error| error.to_string())?;
        let mut client = Client::new(disk, Box::new(queue)).map_err(told)?;
        let mut random = Random::new(seed);
        let own = self.slots() / WRITERS;
        let mut number = 1000 + writer as u64;
        while !self.stop.load(Ordering::SeqCst) {
            let slot = random.index(own) * WRITERS + writer;
            let sectors = slot * SLOT..(slot + 1) * SLOT;
            let start = (sectors.start * SECTOR) as u64;
            let extent = Extent::new(start, (SLOT * SECTOR) as u64).ok_or("an extent")?;
            match random.index(20) {
                0 => {
                    let covered = self.logs[writer].lock().unwrap().answered;
                    disk.flush().map_err(told)?;
                    self.logs[writer].lock().unwrap().durable = covered;
                }
                1..=4 => {
                    let found = client.read(extent).map_err(told)?;
                    let found = values(found.as_slice(), sectors.start as u64)?;
                    let log = self.logs[writer].lock().unwrap();
                    for (sector, found) in sectors.zip(found) {
                        let expected = log.value(log.answered, slot, sector).unwrap_or(self.start[sector]);
                        if found != expected {
                            return Err(format!("sector {sector} reads {found:#x}, not {expected:#x}"));
                        }
                    }
                }
                kind => {
                    let zeros = kind < 7;
                    number += WRITERS as u64;
                    let this = if zeros { 0 } else { number };
                    self.logs[writer].lock().unwrap().issued.push((slot, this));
                    if zeros {
                        client.write_zeroes(extent, random.chance(50)).map_err(told)?;
                    } else {
                        let mut data = vec![0; SLOT * SECTOR];
                        fill(&mut data, sectors.start as u64, |sector| stamp(this, sector));
                        client.write(start, &data).map_err(told)?;
                    }
                    self.logs[writer].lock().unwrap().answered += 1;
                }
            }
        }
        Ok(())
    }

    /// Of every writer, one moment between `from` and `to` is what `found` shows.
    fn is_one_moment(&self, found: &[u64], from: &[Mark], to: &[Mark]) -> Result<(), String> {
        for writer in 0..WRITERS {
            let log = self.logs[writer].lock().unwrap();
            let mut expected: Vec<u64> = self.start.clone();
            let mut differs: BTreeSet<usize> = BTreeSet::new();
            let enter = |(slot, number): (usize, u64), expected: &mut Vec<u64>| -> std::ops::Range<usize> {
                let sectors = slot * SLOT..(slot + 1) * SLOT;
                for sector in sectors.clone() {
                    expected[sector] = value(number, sector);
                }
                sectors
            };
            for &write in &log.issued[..from[writer].answered] {
                enter(write, &mut expected);
            }
            let is_own = |sector: usize| {
                sector / SLOT < self.slots() / WRITERS * WRITERS && sector / SLOT % WRITERS == writer
            };
            differs.extend(
                (0..found.len()).filter(|&sector| is_own(sector) && found[sector] != expected[sector]),
            );
            let mut is_there = differs.is_empty();
            for &write in &log.issued[from[writer].answered..to[writer].issued] {
                for sector in enter(write, &mut expected) {
                    if found[sector] == expected[sector] {
                        differs.remove(&sector);
                    } else {
                        differs.insert(sector);
                    }
                }
                is_there |= differs.is_empty();
            }
            if !is_there {
                return Err(format!("it shows no moment of writer {writer}: sectors {differs:?}"));
            }
        }
        Ok(())
    }

    /// After a loss of power: each sector holds what a flush covered or something written since.
    fn may_be_left(&self, found: &[u64], from: &[Mark], to: &[Mark]) -> Result<(), String> {
        for (sector, &found) in found.iter().enumerate().take(self.slots() / WRITERS * WRITERS * SLOT) {
            let slot = sector / SLOT;
            let writer = slot % WRITERS;
            let log = self.logs[writer].lock().unwrap();
            let durable = from[writer].durable;
            let old = log.value(durable, slot, sector).unwrap_or(self.start[sector]);
            let since = &log.issued[durable..to[writer].issued];
            let is_since = since.iter().any(|&(at, number)| at == slot && value(number, sector) == found);
            if found != old && !is_since {
                return Err(format!("sector {sector} holds {found:#x}, neither {old:#x} nor anything since"));
            }
        }
        Ok(())
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Life<'a> {
    host: &'a SimDisk,
    disk: &'a Arc<Disk>,
    guests: &'a Guests,
    random: Random,
    snapshots: BTreeMap<Guid, Vec<u64>>,
    temporary: BTreeSet<Guid>,
    history: Vec<String>,
    deaths: u64,
}

impl Life<'_> {
    /// What would be found if everything stopped now.
    fn die(&mut self, changing: Option<Guid>) -> Result<(), String> {
        self.deaths += 1;
        let from = self.guests.marks();
        let moment = self.host.snapshot();
        let to = self.guests.marks();
        let options = CrashOptions {
            exhaustive_max: 32,
            random_per_density: 2,
            metadata_bytes: 4096,
            seed: self.random.next_u64(),
            ..CrashOptions::new(CrashLevel::Sectors)
        };
        let skip = self.random.index(40);
        let states = [moment.killed()].into_iter().chain(moment.crash_states(&options).skip(skip).take(2));
        for state in states {
            let what = state.to_string();
            let judged = self.judge(&state.into_disk(1), &from, &to, changing);
            judged.map_err(|why| format!("{why}\n  {what}"))?;
        }
        Ok(())
    }

    fn judge(
        &self,
        host: &SimDisk,
        from: &[Mark],
        to: &[Mark],
        changing: Option<Guid>,
    ) -> Result<(), String> {
        let view = View::read(&host.folder())?;
        for (guid, sectors) in &self.snapshots {
            let may_go = changing == Some(*guid) || self.temporary.contains(guid);
            match view.states.get(guid) {
                None if may_go => {}
                None => return Err(format!("the snapshot {guid} is gone")),
                Some(state) if may_go && state.transition.is_some_and(|mark| !mark.is_readable()) => {}
                Some(state) if state.sectors == *sectors => {}
                Some(_) => return Err(format!("the snapshot {guid} changed")),
            }
        }
        self.guests.may_be_left(view.sectors(Guid::TOP)?, from, to)
    }

    fn command(&mut self, number: usize) -> Result<(), String> {
        let folder = self.host.folder();
        let bundle = Simulated(&folder);
        let all: Vec<Guid> = self.snapshots.keys().copied().collect();
        match self.random.index(10) {
            0..=4 if all.len() < 6 => {
                let (name, temporary) = (guid(number), self.random.chance(25));
                self.history.push(format!("snapshot {name}, temporary {temporary}"));
                let options =
                    SnapshotOptions { snapshot: Some(name), temporary, ..SnapshotOptions::default() };
                let from = self.guests.marks();
                snapshot(self.disk, &bundle, &mut NoWriters, &options).map_err(told)?;
                let to = self.guests.marks();
                let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
                let chain = open_state(&folder, &descriptor, name, Access::ReadOnly).map_err(told)?;
                let found = crate::reading::read_all(&chain)?;
                self.guests
                    .is_one_moment(&found, &from, &to)
                    .map_err(|why| format!("the snapshot {name}: {why}"))?;
                self.snapshots.insert(name, found);
                if temporary {
                    self.temporary.insert(name);
                }
            }
            5 => {
                self.history.push("compact".to_owned());
                let queue = self.host.queue(8, 5).map_err(|error| error.to_string())?;
                let mut client = Client::new(self.disk, Box::new(queue)).map_err(told)?;
                match compact_with(&mut client, &CompactOptions::default(), &Silent) {
                    // A merge of the top that was not quiet enough keeps every entry.
                    Err(error) if error.kind() != ErrorKind::Busy => return Err(told(error)),
                    _ => {}
                }
            }
            _ if !all.is_empty() => {
                let named = all[self.random.index(all.len())];
                self.history.push(format!("delete {named}"));
                let dying = self.random.chance(50);
                let options = DeleteOptions {
                    rest_bytes_max: [32 << 10, 4 << 20][self.random.index(2)],
                    ..DeleteOptions::new(named)
                };
                if dying {
                    // The state of the world while it is at work.
                    let done = std::thread::scope(|scope| {
                        let work = scope.spawn(|| {
                            let folder = self.host.folder();
                            delete(self.disk, &Simulated(&folder), &Silent, &options)
                        });
                        let mut died = Ok(());
                        let mut random = Random::new(number as u64);
                        while !work.is_finished() && died.is_ok() {
                            let mut watcher = Life {
                                host: self.host,
                                disk: self.disk,
                                guests: self.guests,
                                random: Random::new(random.next_u64()),
                                snapshots: self.snapshots.clone(),
                                temporary: self.temporary.clone(),
                                history: Vec::new(),
                                deaths: 0,
                            };
                            died = watcher.die(Some(named));
                            self.deaths += watcher.deaths;
                        }
                        let done = work.join().unwrap();
                        died.map(|()| done)
                    })?;
                    self.deleted(named, done)?;
                } else {
                    let done = delete(self.disk, &bundle, &Silent, &options);
                    self.deleted(named, done)?;
                }
            }
            _ => {}
        }
        let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
        let gone: Vec<Guid> = self.temporary.iter().copied().collect();
        for guid in gone.into_iter().filter(|&guid| descriptor.shot(guid).is_none()) {
            self.temporary.remove(&guid);
            self.snapshots.remove(&guid);
        }
        Ok(())
    }

    fn deleted(
        &mut self,
        named: Guid,
        done: Result<ploop_core::ops::live::DeleteReport, Error>,
    ) -> Result<(), String> {
        match done {
            Ok(report) if report.marked => drop(self.temporary.insert(named)),
            Ok(_) => {
                self.snapshots.remove(&named);
                self.temporary.remove(&named);
            }
            // Half merged: it can only be deleted.
            Err(error) if error.kind() == ErrorKind::NotQuiet => drop(self.temporary.insert(named)),
            Err(error) => return Err(told(error)),
        }
        Ok(())
    }
}

fn live_once(seed: u64, totals: &mut (u64, u64)) -> Result<(), String> {
    let mut random = Random::new(seed);
    let shapes = [
        Shape::of(1),
        Shape::of(1).holed().not_closed(),
        Shape::of(2).version_1(),
        Shape::of(3).holed(),
        Shape::of(3).branched(),
        Shape::of(2).on_raw(),
    ];
    let shape = shapes[random.index(shapes.len())];
    let host = shape.bundle().disk(seed);
    let folder = host.folder();
    let view = View::read(&folder)?;
    let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
    let chain = open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).map_err(told)?;
    let disk = Disk::open(chain, DiskOptions::default()).map_err(told)?;
    let guests = Guests {
        logs: Default::default(),
        start: view.sectors(Guid::TOP)?.to_vec(),
        stop: AtomicBool::new(false),
        violation: Mutex::new(None),
    };
    let states = view.states.iter().filter(|(guid, _)| **guid != Guid::TOP);
    let mut life = Life {
        host: &host,
        disk: &disk,
        guests: &guests,
        random,
        snapshots: states.map(|(&guid, state)| (guid, state.sectors.clone())).collect(),
        temporary: BTreeSet::new(),
        history: vec![format!("{shape:?}")],
        deaths: 0,
    };
    let ended = std::thread::scope(|scope| {
        let _ending = StopOnDrop(&guests.stop);
        for writer in 0..WRITERS {
            let (guests, disk, host) = (&guests, &disk, &host);
            scope.spawn(move || {
                if let Err(why) = guests.write(writer, disk, host, seed * 10 + writer as u64) {
                    guests.violation.lock().unwrap().get_or_insert(format!("writer {writer}: {why}"));
                }
            });
        }
        (0..8).try_for_each(|number| {
            totals.0 += 1;
            life.command(200 + number)?;
            life.die(None)
        })
    });
    totals.1 += life.deaths;
    let history = life.history.join("\n  ");
    let finished = ended.and_then(|()| {
        if let Some(why) = guests.violation.lock().unwrap().take() {
            return Err(why);
        }
        let marks = guests.marks();
        disk.close().map_err(told)?;
        let view = View::read(&folder)?;
        guests.is_one_moment(view.sectors(Guid::TOP)?, &marks, &marks)?;
        life.judge(&host, &marks, &marks, None)
    });
    finished.map_err(|why| format!("{why}\n  SEED={seed}\n  {history}"))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn writers_in_threads_keep_what_they_were_promised() {
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PLOOP_THREADED_LIVES").unwrap_or(40),
    };
    let lives = seeds.end - seeds.start;
    let mut totals = (0, 0);
    for seed in seeds {
        if let Err(violation) = live_once(seed, &mut totals) {
            panic!("life {seed}: {violation}");
        }
    }
    count(
        "lives with writers in threads",
        &format!("{lives} lives, {} commands, {} deaths", totals.0, totals.1),
    );
}
