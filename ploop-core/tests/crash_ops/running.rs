//! Long lives of running disks against a model: a guest writes, discards, flushes and reads, also between the pieces of a
//! merge; snapshots, also temporary ones, are made and deleted in all places of the tree, merges are cancelled and done
//! again, and the power goes in the middle of commands, or the server dies. While the disk is closed anything is done to it
//! that can be (`commands.rs`): switches make branches of which some are deleted while it runs. The model is one list of sectors for each snapshot, and for the current state all values that each sector may have
//! after a loss of power: the one last made durable and those written since.
//!
//! `PLOOP_RUNNING_LIVES` says how many lives (default 150), `SEED` picks one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid, Transition};
use ploop_core::io::Access;
use ploop_core::io::sim::{CrashLevel, CrashOptions, Random, SimDisk};
use ploop_core::ops::Progress;
use ploop_core::ops::live::{
    DeleteOptions, MergeNewOptions, NoWriters, SnapshotOptions, delete, merge_new, snapshot,
};

use crate::bundle::{CLUSTER_SECTORS, Shape, View, guid, open_state, unnamed};
use crate::commands::{Model, repair};
use crate::live::Simulated;
use crate::pattern::{SECTOR, fill, stamp, values};
use crate::reading::describe;
use ploop_testing::count;

struct Guest {
    client: Client,
    random: Random,
    now: Vec<u64>,
    /// What each sector may hold after a loss of power.
    possible: Vec<BTreeSet<u64>>,
    /// How many writes there were.
    number: u64,
}

fn told(error: Error) -> String {
    describe(&error)
}

impl Guest {
    fn open(host: &SimDisk, now: Vec<u64>, seed: u64, number: u64) -> Result<Self, String> {
        let folder = host.folder();
        let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
        let chain = open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).map_err(told)?;
        let options = DiskOptions { manual_flusher: true, ..DiskOptions::default() };
        let disk = Disk::open(chain, options).map_err(told)?;
        let queue = host.queue(8, seed).map_err(|error| error.to_string())?;
        let client = Client::new(&disk, Box::new(queue)).map_err(told)?;
        let possible = now.iter().map(|&value| BTreeSet::from([value])).collect();
        Ok(Self { client, random: Random::new(seed), now, possible, number })
    }

    fn disk(&self) -> Arc<Disk> {
        Arc::clone(self.client.disk())
    }

    /// One request. What was flushed inside a command is not taken for durable: the power may go before.
    fn step(&mut self, in_command: bool) -> Result<(), String> {
        let sectors = self.now.len() as u64;
        let first = self.random.below(sectors);
        let mut range = first..(first + 1 + self.random.below(90)).min(sectors);
        if self.random.chance(40) {
            let start = first / CLUSTER_SECTORS * CLUSTER_SECTORS;
            range = start..(start + CLUSTER_SECTORS).min(sectors);
        }
        let bytes = |sector: u64| sector * SECTOR as u64;
        let extent = Extent::new(bytes(range.start), bytes(range.end - range.start)).ok_or("an extent")?;
        let places = range.start as usize..range.end as usize;
        match self.random.index(10) {
            0..=2 => {
                if self.random.chance(50) {
                    self.client.discard(extent).map_err(told)?;
                } else {
                    self.client.write_zeroes(extent, self.random.chance(50)).map_err(told)?;
                }
                self.set(places, |_| 0);
            }
            3 => {
                self.client.disk().flush().map_err(told)?;
                if !in_command {
                    self.is_durable();
                }
            }
            4 | 5 => {
                let found = self.client.read(extent).map_err(told)?;
                let found = values(found.as_slice(), range.start)?;
                if found != self.now[places.clone()] {
                    let expected = &self.now[places.clone()];
                    return Err(format!("read {places:?}: {found:x?}, not {expected:x?}"));
                }
            }
            _ => {
                self.number += 1;
                let number = self.number;
                let mut data = vec![0; (range.end - range.start) as usize * SECTOR];
                fill(&mut data, range.start, |sector| stamp(number, sector));
                self.client.write(bytes(range.start), &data).map_err(told)?;
                self.set(places, |sector| stamp(number, sector));
            }
        }
        Ok(())
    }

    fn set(&mut self, places: std::ops::Range<usize>, value: impl Fn(u64) -> u64) {
        for place in places {
            let value = value(place as u64);
            self.now[place] = value;
            self.possible[place].insert(value);
        }
    }

    fn is_durable(&mut self) {
        for (possible, &now) in self.possible.iter_mut().zip(&self.now) {
            *possible = BTreeSet::from([now]);
        }
    }

    fn read_all(&mut self) -> Result<(), String> {
        let extent = Extent::new(0, self.now.len() as u64 * SECTOR as u64).ok_or("an extent")?;
        let found = self.client.read(extent).map_err(told)?;
        let found = values(found.as_slice(), 0)?;
        match (0..found.len()).find(|&at| found[at] != self.now[at]) {
            Some(at) => Err(format!("sector {at} reads {:#x}, not {:#x}", found[at], self.now[at])),
            None => Ok(()),
        }
    }
}

/// A guest that is at work while something is merged, and perhaps a user who loses patience.
struct Meanwhile<'a> {
    guest: Mutex<&'a mut Guest>,
    cancel_after: Option<u64>,
    state: Mutex<(u64, Result<(), String>)>,
}

impl Progress for Meanwhile<'_> {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}

    fn advance(&self, _bytes: u64) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        let mut guest = self.guest.lock().unwrap();
        for _ in 0..guest.random.below(3) {
            if state.1.is_ok() {
                state.1 = guest.step(true);
            }
        }
        match self.cancel_after {
            Some(limit) if state.0 > limit => Err(Error::new(ErrorKind::Cancelled, "no more patience")),
            _ => Ok(()),
        }
    }
}

/// What a command did.
#[derive(Clone, Copy)]
enum Done {
    Made(Guid),
    Removed(Guid),
    /// Marked, cancelled or not possible just now.
    Nothing,
}

struct Life {
    random: Random,
    /// Content of each snapshot.
    snapshots: BTreeMap<Guid, Vec<u64>>,
    /// A merge that was begun: what it was cannot be read any more.
    merging: Option<Guid>,
    /// Those that go as soon as they can.
    temporary: BTreeSet<Guid>,
    history: Vec<String>,
    losses: u64,
    commands: u64,
}

impl Life {
    /// What is there, judged: `Ok` of the current state's content.
    fn judge(&self, host: &SimDisk, guest: &[BTreeSet<u64>], changing: Option<Guid>) -> Result<View, String> {
        let view = View::read(&host.folder())?;
        for (guid, sectors) in &self.snapshots {
            let Some(found) = view.states.get(guid) else {
                if changing == Some(*guid) || self.temporary.contains(guid) {
                    continue;
                }
                return Err(format!("the snapshot {guid} is gone"));
            };
            let is_temporary = self.temporary.contains(guid);
            let may_be_merging = changing == Some(*guid) || self.merging == Some(*guid) || is_temporary;
            if found.transition.is_some_and(|transition| !transition.is_readable()) && may_be_merging {
                continue;
            }
            let may_be_marked = is_temporary || changing == Some(*guid);
            if found.transition.is_some() && !may_be_marked || found.sectors != *sectors {
                return Err(format!("the snapshot {guid} changed ({:?})", found.transition));
            }
        }
        let inside = |sectors: &[u64]| -> Result<(), String> {
            match sectors.iter().zip(guest).position(|(value, possible)| !possible.contains(value)) {
                None if sectors.len() == guest.len() => Ok(()),
                None => Err(format!("{} sectors instead of {}", sectors.len(), guest.len())),
                Some(at) => Err(format!(
                    "sector {at} holds {:#x}, which it never held since it was durable: {:x?}",
                    sectors[at], guest[at]
                )),
            }
        };
        inside(view.sectors(Guid::TOP)?).map_err(|why| format!("the current state: {why}"))?;
        for (guid, state) in &view.states {
            if *guid == Guid::TOP || self.snapshots.contains_key(guid) {
                continue;
            }
            if changing != Some(*guid) {
                return Err(format!("there is a snapshot {guid}"));
            }
            inside(&state.sectors).map_err(|why| format!("the new snapshot: {why}"))?;
            if state.sectors != view.sectors(Guid::TOP)? {
                return Err("the new snapshot is not what the disk is".to_owned());
            }
        }
        Ok(view)
    }

    /// A command on the running disk; first the snapshot that it concerns.
    fn command(
        &mut self,
        host: &SimDisk,
        guest: &mut Guest,
        next: &mut usize,
    ) -> Result<(Guid, Done), String> {
        self.commands += 1;
        let folder = host.folder();
        let bundle = Simulated(&folder);
        let disk = guest.disk();
        let all: Vec<Guid> = self.snapshots.keys().copied().collect();
        let makes = self.merging.is_none() || self.random.chance(30);
        if all.is_empty() || (all.len() < 6 && makes && self.random.chance(50)) {
            *next += 1;
            let name = guid(*next);
            let temporary = self.random.chance(25);
            self.history.push(format!("snapshot {name}, temporary {temporary}"));
            if temporary {
                self.temporary.insert(name);
            }
            let options = SnapshotOptions { snapshot: Some(name), temporary, ..SnapshotOptions::default() };
            let report = snapshot(&disk, &bundle, &mut NoWriters, &options).map_err(told)?;
            if !report.warnings.is_empty() {
                return Err(format!("{:?}", report.warnings));
            }
            return Ok((name, Done::Made(name)));
        }
        let named = self.merging.unwrap_or_else(|| all[self.random.index(all.len())]);
        let cancel_after = self.random.chance(30).then(|| self.random.below(6));
        let rest_bytes_max = [32 << 10, 4 << 20][self.random.index(2)];
        let meanwhile = Meanwhile { guest: Mutex::new(guest), cancel_after, state: Mutex::new((0, Ok(()))) };
        // Into a new file what stands on it takes it in; a merge that was given up is no mark.
        let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
        let mut children = descriptor.children(named).map(|shot| shot.guid());
        let child = children.next().filter(|_| children.next().is_none() && self.merging.is_none());
        if let Some(child) = child.filter(|_| self.random.chance(35)) {
            *next += 1;
            let file = format!("merged{next}.hds");
            self.history
                .push(format!("merge {named} to {child} into {file}, cancelled after {cancel_after:?}"));
            let options = MergeNewOptions { rest_bytes_max, ..MergeNewOptions::new(named, child, file) };
            let done = merge_new(&disk, &bundle, &meanwhile, &options);
            meanwhile.state.into_inner().unwrap().1?;
            let done = match done {
                Ok(report) if report.warnings.is_empty() => Done::Removed(named),
                Ok(report) => return Err(format!("{:?}", report.warnings)),
                Err(error) if matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::NotQuiet) => {
                    Done::Nothing
                }
                // The disk was made smaller since: only a closed one is asked.
                Err(error)
                    if error.kind() == ErrorKind::Parameter && error.to_string().contains("is a disk of") =>
                {
                    Done::Nothing
                }
                Err(error) => return Err(told(error)),
            };
            return Ok((named, done));
        }
        self.history.push(format!("delete {named}, cancelled after {cancel_after:?}"));
        let options = DeleteOptions { rest_bytes_max, ..DeleteOptions::new(named) };
        let done = delete(&disk, &bundle, &meanwhile, &options);
        meanwhile.state.into_inner().unwrap().1?;
        let done = match done {
            // The user's patience ended with one that went beside.
            Ok(report) if report.warnings.iter().any(|warning| !warning.contains("no more patience")) => {
                return Err(format!("{:?}", report.warnings));
            }
            Ok(report) if report.marked => {
                self.temporary.insert(named);
                Done::Nothing
            }
            Ok(_) => Done::Removed(named),
            Err(error) if matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::NotQuiet) => Done::Nothing,
            // The disk has grown since: only a closed one is merged with a smaller snapshot.
            Err(error)
                if error.kind() == ErrorKind::Parameter && error.to_string().contains("is a disk of") =>
            {
                Done::Nothing
            }
            Err(error) => return Err(told(error)),
        };
        Ok((named, done))
    }

    /// What the descriptor says of merges that were begun and of temporary states that have gone.
    fn look(&mut self, host: &SimDisk) -> Result<(), String> {
        let descriptor = DiskDescriptor::load(&host.folder(), None).map_err(told)?;
        let is_there = |guid: &Guid| descriptor.shot(*guid).is_some();
        let gone: Vec<Guid> = self.temporary.iter().copied().filter(|guid| !is_there(guid)).collect();
        for guid in gone {
            self.temporary.remove(&guid);
            self.snapshots.remove(&guid);
        }
        let is_merging = |transition: Transition| !transition.is_readable();
        let cut = descriptor.shots().iter().find(|shot| shot.transition().is_some_and(is_merging));
        self.merging = cut.map(|shot| shot.guid());
        Ok(())
    }

    /// What is done to the closed disk before it runs again.
    fn between(&mut self, host: &SimDisk, next: &mut usize) -> Result<(), String> {
        if self.merging.is_some() {
            return Ok(());
        }
        self.history.push("a repairing check".to_owned());
        repair(&host.folder()).map_err(told)?;
        let view = View::read(&host.folder())?;
        self.adopt(&view);
        let descriptor = DiskDescriptor::load(&host.folder(), None).map_err(told)?;
        let mut model = Model::of(&view).with_cluster(descriptor.cluster_sectors().0);
        model.temporary.clone_from(&self.temporary);
        let mut random = Random::new(self.random.next_u64());
        for _ in 0..3 {
            let Some(command) = model.choose(&mut random, next) else { continue };
            self.history.push(format!("closed: {command:?}"));
            model.apply(command);
            command.run(&host.folder()).map_err(told)?;
            model = model.reached(host)?;
        }
        self.snapshots.clear();
        self.adopt(&View::read(&host.folder())?);
        Ok(())
    }

    /// The disk runs until it is closed or the power goes.
    fn run(&mut self, host: SimDisk, guest: &mut Guest, next: &mut usize) -> Result<SimDisk, String> {
        for _ in 0..3 + self.random.below(8) {
            for _ in 0..self.random.below(8) {
                guest.step(false)?;
            }
            let loses_power = self.random.chance(25);
            let was_merging = self.merging;
            host.capture_every_operation(loses_power);
            let before = guest.possible.clone();
            let commanded = self.command(&host, guest, next);
            host.capture_every_operation(false);
            let (named, done) = commanded?;
            let mut captured = host.take_captured();
            let at = if captured.is_empty() { 0 } else { self.random.index(captured.len()) };
            if loses_power && at < captured.len() {
                self.losses += 1;
                let changing = Some(named).or(was_merging);
                let options = CrashOptions {
                    exhaustive_max: 32,
                    random_per_density: 2,
                    metadata_bytes: 4096,
                    seed: self.random.next_u64(),
                    ..CrashOptions::new(CrashLevel::Sectors)
                };
                let snapshot = captured.swap_remove(at);
                let skip = self.random.index(12);
                let dies = self.random.chance(30).then(|| snapshot.killed());
                let state = dies.or_else(|| snapshot.crash_states(&options).nth(skip));
                let state = state.unwrap_or_else(|| snapshot.killed());
                self.history.push(format!("power lost after {:?}: {state}", snapshot.after()));
                let host = state.into_disk(self.random.next_u64());
                let mut possible = before;
                for (all, more) in possible.iter_mut().zip(&guest.possible) {
                    all.extend(more);
                }
                let view = self.judge(&host, &possible, changing)?;
                self.adopt(&view);
                guest.now = view.sectors(Guid::TOP)?.to_vec();
                return Ok(host);
            }
            match done {
                Done::Made(named) => {
                    // Whatever was written is durable below it.
                    guest.is_durable();
                    self.snapshots.insert(named, guest.now.clone());
                }
                Done::Removed(named) => {
                    self.snapshots.remove(&named);
                    self.temporary.remove(&named);
                }
                Done::Nothing => {}
            }
            self.look(&host)?;
            guest.read_all()?;
        }
        guest.disk().flush().map_err(told)?;
        guest.is_durable();
        if self.random.chance(50) {
            self.history.push("killed".to_owned());
            let host = host.snapshot().killed().into_disk(self.random.next_u64());
            self.judge(&host, &guest.possible, None)?;
            return Ok(host);
        }
        self.history.push("closed".to_owned());
        Ok(host)
    }

    /// What a loss of power has made of the snapshots.
    fn adopt(&mut self, view: &View) {
        self.merging = None;
        self.temporary.clear();
        let known = std::mem::take(&mut self.snapshots);
        for (guid, state) in view.states.iter().filter(|(guid, _)| **guid != Guid::TOP) {
            match state.transition {
                Some(transition) if transition.is_readable() => drop(self.temporary.insert(*guid)),
                Some(_) => self.merging = Some(*guid),
                None => {}
            }
            self.snapshots.insert(*guid, known.get(guid).unwrap_or(&state.sectors).clone());
        }
    }
}

fn live_once(seed: u64, totals: &mut (u64, u64)) -> Result<(), String> {
    let mut random = Random::new(seed);
    let shapes: Vec<Shape> = vec![
        Shape::of(1),
        Shape::of(1).holed().not_closed(),
        Shape::of(2),
        Shape::of(3).holed(),
        Shape::of(2).on_raw(),
    ];
    let shape = shapes[random.index(shapes.len())];
    let mut host = shape.bundle().disk(seed);
    let view = View::read(&host.folder())?;
    let mut life = Life {
        snapshots: BTreeMap::new(),
        merging: None,
        temporary: BTreeSet::new(),
        history: vec![format!("{shape:?}")],
        losses: 0,
        commands: 0,
        random,
    };
    life.adopt(&view);
    let mut now = view.sectors(Guid::TOP)?.to_vec();
    let (mut next, mut number) = (100, 1000);
    let mut result = Ok(());
    for number_of_run in 0..3 {
        let seed = life.random.next_u64();
        if number_of_run > 0 && life.random.chance(60) {
            if let Err(why) = life.between(&host, &mut next) {
                result = Err(format!("{why}\n  SEED={seed}\n  {}", life.history.join("\n  ")));
                break;
            }
            now = View::read(&host.folder())?.sectors(Guid::TOP)?.to_vec();
        }
        let run = Guest::open(&host, now.clone(), seed, number).and_then(|mut guest| {
            let ended = life.run(host.clone(), &mut guest, &mut next)?;
            number = guest.number;
            now.clone_from(&guest.now);
            let is_closed = life.history.last().is_some_and(|last| last == "closed");
            let disk = guest.disk();
            let possible = guest.possible.clone();
            drop(guest);
            if is_closed {
                disk.close().map_err(told)?;
                life.judge(&ended, &possible, None)?;
                let left: Vec<String> = unnamed(&ended.folder())?;
                let is_ours = |name: &&String| !name.contains(".tmp.") && !name.contains(".undo");
                let left: Vec<&String> = left.iter().filter(is_ours).collect();
                if !left.is_empty() {
                    return Err(format!("left over: {left:?}"));
                }
            }
            Ok(ended)
        });
        match run {
            Ok(ended) => host = ended,
            Err(why) => {
                result = Err(format!("{why}\n  SEED={seed}\n  {}", life.history.join("\n  ")));
                break;
            }
        }
    }
    totals.0 += life.commands;
    totals.1 += life.losses;
    result
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn lives_of_running_disks_equal_the_model() {
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PLOOP_RUNNING_LIVES").unwrap_or(150),
    };
    let lives = seeds.end - seeds.start;
    let mut totals = (0, 0);
    for seed in seeds {
        if let Err(violation) = live_once(seed, &mut totals) {
            panic!("life {seed}: {violation}");
        }
    }
    count(
        "lives of running disks",
        &format!("{lives} lives, {} commands, {} power losses", totals.0, totals.1),
    );
}
