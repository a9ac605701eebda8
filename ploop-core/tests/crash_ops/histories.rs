//! Long lives of bundles against a model: snapshots made, deleted, merged, switched to, and the disk written between,
//! with a power loss in the middle of every other command and the same command again. The model is one list of sectors
//! for each state.
//!
//! `PLOOP_HISTORIES` says how many lives (default 250), `SEED` picks one.

use std::collections::BTreeMap;

use ploop_core::error::Error;
use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::sim::{CrashLevel, CrashOptions, Random, SimDisk};
use ploop_core::io::{Access, Folder};
use ploop_core::ops::merge::{MergeOptions, merge_in};
use ploop_core::ops::progress::Silent;
use ploop_core::ops::snapshot::{SnapshotOptions, snapshot_in};
use ploop_core::ops::snapshot_delete::{DeleteOptions, delete_in};
use ploop_core::ops::snapshot_switch::{SwitchOptions, switch_in};

use crate::bundle::{Shape, View, flush, guid, open_state, unnamed, write};
use crate::counting::count;
use crate::pattern::stamp;
use crate::reading::describe;

#[derive(Clone, Copy, Debug)]
enum Command {
    Snapshot(Guid),
    Delete(Guid),
    /// Into the one below; the name that remains is this one.
    Merge(Guid),
    Switch(Guid),
}

impl Command {
    fn run(self, folder: &dyn Folder) -> Result<(), Error> {
        match self {
            Self::Snapshot(snapshot) => {
                snapshot_in(folder, &SnapshotOptions { snapshot: Some(snapshot), temporary: false }, &Silent)
                    .map(drop)
            }
            Self::Delete(snapshot) => delete_in(folder, &DeleteOptions { snapshot }, &Silent).map(drop),
            Self::Merge(snapshot) => {
                let options = MergeOptions { snapshot: Some(snapshot), ..MergeOptions::default() };
                merge_in(folder, &options, &Silent).map(drop)
            }
            Self::Switch(snapshot) => {
                switch_in(folder, &SwitchOptions { snapshot, keep: None }, &Silent).map(drop)
            }
        }
    }
}

#[derive(Clone)]
struct Model {
    /// Content and parent of each state.
    states: BTreeMap<Guid, (Vec<u64>, Guid)>,
}

impl Model {
    fn of(view: &View) -> Self {
        let states = view.states.iter();
        Self { states: states.map(|(&guid, state)| (guid, (state.sectors.clone(), state.parent))).collect() }
    }

    fn children(&self, guid: Guid) -> Vec<Guid> {
        self.states.iter().filter(|(_, (_, parent))| *parent == guid).map(|(&child, _)| child).collect()
    }

    /// Takes a state out; what stood on it stands on what it stood on.
    fn remove(&mut self, guid: Guid) {
        let Some((_, parent)) = self.states.remove(&guid) else { return };
        for (_, below) in self.states.values_mut() {
            if *below == guid {
                *below = parent;
            }
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Snapshot(snapshot) => {
                let (sectors, parent) = self.states[&Guid::TOP].clone();
                self.states.insert(snapshot, (sectors.clone(), parent));
                self.states.insert(Guid::TOP, (sectors, snapshot));
            }
            Command::Delete(snapshot) => self.remove(snapshot),
            Command::Merge(snapshot) => {
                let parent = self.states[&snapshot].1;
                self.remove(parent);
            }
            Command::Switch(snapshot) => {
                let sectors = self.states[&snapshot].0.clone();
                self.states.insert(Guid::TOP, (sectors, snapshot));
            }
        }
    }

    /// The states that a command takes away: between its steps they may be anything, or gone.
    fn vanishing(&self, command: Command) -> Option<Guid> {
        match command {
            Command::Snapshot(_) => None,
            Command::Delete(snapshot) => Some(snapshot),
            Command::Merge(snapshot) => self.states.get(&snapshot).map(|(_, parent)| *parent),
            Command::Switch(_) => Some(Guid::TOP),
        }
    }

    fn choose(&self, random: &mut Random, next: &mut usize) -> Option<Command> {
        let snapshots: Vec<Guid> = self.states.keys().copied().filter(|&guid| guid != Guid::TOP).collect();
        let one = (!snapshots.is_empty()).then(|| snapshots[random.index(snapshots.len())]);
        match random.index(6) {
            0 | 1 if snapshots.len() < 6 => {
                *next += 1;
                Some(Command::Snapshot(guid(*next)))
            }
            // With several on it, it would only be marked.
            2 => one.filter(|&guid| self.children(guid).len() <= 1).map(Command::Delete),
            3 => {
                let all: Vec<Guid> = self.states.keys().copied().collect();
                let upper = all[random.index(all.len())];
                let parent = self.states[&upper].1;
                (parent != Guid::NONE && self.children(parent).len() == 1).then_some(Command::Merge(upper))
            }
            4 => one.map(Command::Switch),
            _ => None,
        }
    }

    fn check(&self, disk: &SimDisk) -> Result<(), String> {
        let view = View::read(&disk.folder())?;
        let expected: Vec<_> = self.states.keys().collect();
        let found: Vec<_> = view.states.keys().collect();
        if expected != found {
            return Err(format!("states {found:?} instead of {expected:?}"));
        }
        for (guid, (sectors, parent)) in &self.states {
            let state = &view.states[guid];
            if state.parent != *parent || state.transition.is_some() {
                return Err(format!("{guid} stands on {} ({:?})", state.parent, state.transition));
            }
            same(&state.sectors, sectors).map_err(|why| format!("state {guid}: {why}"))?;
        }
        let left: Vec<_> =
            unnamed(&disk.folder())?.into_iter().filter(|name| !name.contains(".tmp.")).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("left over: {left:?}")) }
    }

    /// In the middle of a command: every state that stays reads as ever; the current one as before or after.
    fn check_cut(&self, disk: &SimDisk, command: Command, after: &Self) -> Result<(), String> {
        let view = View::read(&disk.folder())?;
        let vanishing = self.vanishing(command);
        for (guid, (sectors, _)) in &self.states {
            let Some(found) = view.states.get(guid) else {
                if vanishing == Some(*guid) && *guid != Guid::TOP {
                    continue;
                }
                return Err(format!("the state {guid} is gone"));
            };
            let becomes = after.states.get(guid).map(|(sectors, _)| sectors);
            if becomes.is_some_and(|sectors| same(&found.sectors, sectors).is_ok()) {
                continue;
            }
            if vanishing == Some(*guid) && found.transition.is_some() {
                continue;
            }
            same(&found.sectors, sectors).map_err(|why| format!("state {guid}: {why}"))?;
        }
        Ok(())
    }
}

fn same(found: &[u64], expected: &[u64]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} sectors instead of {}", found.len(), expected.len()));
    }
    match (0..found.len()).find(|&sector| found[sector] != expected[sector]) {
        Some(sector) => {
            Err(format!("sector {sector} holds {:#x}, not {:#x}", found[sector], expected[sector]))
        }
        None => Ok(()),
    }
}

/// A guest writes to the current state and closes it, or is killed after a flush.
fn write_some(disk: &SimDisk, model: &mut Model, random: &mut Random, operation: u64) -> Result<(), String> {
    let folder = disk.folder();
    let descriptor = DiskDescriptor::load(&folder, None).map_err(|error| describe(&error))?;
    let chain =
        open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).map_err(|error| describe(&error))?;
    let Some((sectors, _)) = model.states.get_mut(&Guid::TOP) else {
        return Err("no current state".to_owned());
    };
    for part in 0..1 + random.below(3) {
        let first = random.below(sectors.len() as u64);
        let count = 1 + random.below(90.min(sectors.len() as u64 - first));
        write(&chain, operation * 8 + part, first, count);
        for sector in first..first + count {
            sectors[sector as usize] = stamp(operation * 8 + part, sector);
        }
    }
    flush(&chain);
    if random.chance(70) {
        chain.close().map_err(|error| describe(&error))?;
    }
    Ok(())
}

#[derive(Default)]
struct Counts {
    commands: u64,
    cuts: u64,
}

fn life(seed: u64, counts: &mut Counts) -> Result<(), String> {
    let mut random = Random::new(seed);
    let shapes = Shape::several();
    let shape = shapes[random.index(shapes.len())];
    let mut disk = shape.bundle().disk(seed);
    let mut model = Model::of(&View::read(&disk.folder())?);
    let mut next = 100;
    // A cut command has done all that is seen, and may have to be finished: a merge would be taken for its repetition.
    let mut cut_at_end = false;
    let mut history = vec![format!("{shape:?}")];
    let mut step = |random: &mut Random, number: u64, history: &mut Vec<String>| -> Result<(), String> {
        let chosen = model.choose(random, &mut next);
        let Some(command) = chosen.filter(|command| !(cut_at_end && matches!(command, Command::Merge(_))))
        else {
            history.push("write".to_owned());
            write_some(&disk, &mut model, random, 100 + number)?;
            return model.check(&disk);
        };
        counts.commands += 1;
        history.push(format!("{command:?}"));
        let mut after = model.clone();
        after.apply(command);
        if random.chance(50) {
            // Cut somewhere, perhaps several times, then the same again.
            let start = disk.snapshot().killed().into_disk(number);
            let mut cuts = 0;
            let mut host = start;
            while cuts < 3 {
                host.capture_every_operation(true);
                let result = command.run(&host.folder());
                host.capture_every_operation(false);
                result.map_err(|error| format!("after {cuts} cuts: {}", describe(&error)))?;
                let mut captured = host.take_captured();
                cuts += 1;
                counts.cuts += 1;
                let Some(at) = captured.len().checked_sub(1) else { break };
                let snapshot = captured.swap_remove(random.index(at + 1));
                let options = CrashOptions {
                    exhaustive_max: 32,
                    random_per_density: 2,
                    metadata_bytes: 4096,
                    seed: random.next_u64(),
                    ..CrashOptions::new(CrashLevel::Sectors)
                };
                let skip = random.index(12);
                let state = snapshot.crash_states(&options).nth(skip).unwrap_or_else(|| snapshot.killed());
                history.push(format!("cut after {:?}: {state}", snapshot.after()));
                host = state.into_disk(number);
                model.check_cut(&host, command, &after)?;
                if after.check(&host).is_ok() {
                    break;
                }
            }
            disk = host;
        }
        cut_at_end = after.check(&disk).is_ok();
        if !cut_at_end {
            command.run(&disk.folder()).map_err(|error| describe(&error))?;
        }
        model = after;
        model.check(&disk)
    };
    let steps = 6 + random.below(10);
    for number in 0..steps {
        step(&mut random, number, &mut history)
            .map_err(|why| format!("{why}\n  SEED={seed}\n  {}", history.join("\n  ")))?;
    }
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn lives_of_bundles_equal_the_model() {
    let mut counts = Counts::default();
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PLOOP_HISTORIES").unwrap_or(250),
    };
    let lives = seeds.end - seeds.start;
    for seed in seeds {
        if let Err(violation) = life(seed, &mut counts) {
            panic!("{violation}");
        }
    }
    count(
        "lives of bundles",
        &format!("{lives} lives, {} commands, {} power losses", counts.commands, counts.cuts),
    );
}
