//! Long lives of bundles against a model: all that can be done with a closed bundle (`commands.rs`), and the disk written
//! between, with a power loss in the middle of every other command and the same command again, sometimes with a repairing
//! check before. States are compared, cloned and imported on the way. The model is one list of sectors for each state.
//!
//! `PLOOP_HISTORIES` says how many lives (default 250), `SEED` picks one.

use ploop_core::error::Error;
use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, Guid, Mode, Version};
use ploop_core::io::sim::{CrashLevel, CrashOptions, Random, SimDisk, Snapshot};
use ploop_core::io::{Access, Folder, Storage, StorageExt};
use ploop_core::ops::clone::{CloneParts, clone_in};
use ploop_core::ops::diff::differences;
use ploop_core::ops::import::{ImportOptions, Input, import_in};
use ploop_core::ops::progress::Silent;
use ploop_core::units::Sectors;

use crate::bundle::{CLUSTER_SECTORS, Shape, View, flush, open_state, write};
use crate::commands::{Command, Form, Model, repair, same};
use crate::pattern::{SECTOR, fill, stamp};
use crate::reading::describe;
use ploop_testing::count;

fn told(error: Error) -> String {
    describe(&error)
}

/// A guest writes to the current state and closes it, or is killed after a flush.
fn write_some(disk: &SimDisk, model: &mut Model, random: &mut Random, operation: u64) -> Result<(), String> {
    let folder = disk.folder();
    let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
    let chain = open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).map_err(told)?;
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
        chain.close().map_err(told)?;
    }
    Ok(())
}

/// One of the states that a loss of power at one of these moments may leave, with a word about it.
fn lose_power(mut captured: Vec<Snapshot>, random: &mut Random) -> Option<(SimDisk, String)> {
    let at = captured.len().checked_sub(1)?;
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
    let word = format!("cut after {:?}: {state}", snapshot.after());
    Some((state.into_disk(random.next_u64()), word))
}

/// What differs between two states lies in the extents that are said to differ.
fn compare_states(disk: &SimDisk, model: &Model, random: &mut Random) -> Result<(), String> {
    let folder = disk.folder();
    let descriptor = DiskDescriptor::load(&folder, None).map_err(told)?;
    let states: Vec<Guid> = model.states.keys().copied().collect();
    let (from, to) = (states[random.index(states.len())], states[random.index(states.len())]);
    let open = |state| open_state(&folder, &descriptor, state, Access::ReadOnly).map_err(told);
    let extents = differences(&*open(from)?, &*open(to)?);
    let (old, new) = (&model.states[&from].0, &model.states[&to].0);
    for (sector, value) in new.iter().enumerate() {
        let at = (sector * SECTOR) as u64;
        let is_told = extents.iter().any(|extent| at >= extent.start && at - extent.start < extent.length);
        if old.get(sector) != Some(value) && !is_told {
            return Err(format!("sector {sector} differs between {from} and {to}, which is not said"));
        }
    }
    Ok(())
}

/// A simulated folder has no hard links; a synced copy of an image that nobody changes is as good, complete under its name
/// or not there.
fn copy_of(folder: &dyn Folder, storage: &dyn Storage, name: &str) -> Result<(), Error> {
    let copied = (|| {
        if folder.exists(name)? {
            return Ok(());
        }
        let mut bytes = vec![0; storage.len()? as usize];
        storage.read_exact_at(0, &mut bytes)?;
        let temporary = format!("{name}.link");
        if folder.exists(&temporary)? {
            folder.unlink(&temporary)?;
        }
        let file = folder.create_exclusive(&temporary)?;
        file.write_all_at(0, &bytes)?;
        file.sync_data()?;
        folder.rename_exclusive(&temporary, name)
    })();
    copied.map_err(|error| Error::io(ploop_core::ErrorKind::Create, "share", error))
}

/// Something that makes a new disk is cut, and done again; the new disk holds `expected`, and zeros behind it.
fn make_another(
    random: &mut Random,
    expected: &[u64],
    make: impl Fn(&dyn Folder) -> Result<(), Error>,
) -> Result<(), String> {
    let new = SimDisk::new(random.next_u64());
    new.capture_every_operation(true);
    make(&new.folder()).map_err(told)?;
    new.capture_every_operation(false);
    let mut hosts = vec![new.clone()];
    hosts.extend(lose_power(new.take_captured(), random).map(|(host, _)| host));
    for host in hosts {
        if !host.folder().exists(DESCRIPTOR_NAME).map_err(|error| error.to_string())? {
            make(&host.folder()).map_err(|error| format!("again: {}", told(error)))?;
        }
        let view = View::read(&host.folder())?;
        let found = view.sectors(Guid::TOP)?;
        if found.len() < expected.len() || found[expected.len()..].iter().any(|&value| value != 0) {
            return Err(format!("{} sectors were made of {}", found.len(), expected.len()));
        }
        same(&found[..expected.len()], expected)?;
    }
    Ok(())
}

/// A state that is closed is cloned: the clone holds it, and the base stays as it is.
fn clone_a_state(disk: &SimDisk, model: &Model, random: &mut Random) -> Result<(), String> {
    let base = disk.folder();
    let descriptor = DiskDescriptor::load(&base, None).map_err(told)?;
    let states: Vec<Guid> = model.states.keys().copied().collect();
    let state = states[random.index(states.len())];
    let before = disk.trace().len();
    let cloned = make_another(random, &model.states[&state].0, |folder| {
        let share = |storage: &dyn Storage, name: &str| copy_of(folder, storage, name);
        let parts = CloneParts { descriptor: &descriptor, state: Some(state), share: &share };
        clone_in(&base, folder, &parts).map(drop)
    });
    if disk.trace().len() != before {
        return Err("a clone changed its base".to_owned());
    }
    match cloned {
        // The last writer was killed, or a temporary state cannot be shared.
        Err(why) if state == Guid::TOP && why.contains("was not closed") => Ok(()),
        other => other.map_err(|why| format!("clone of {state}: {why}")),
    }
}

/// The bytes of a state are imported as another disk.
fn import_a_state(model: &Model, random: &mut Random) -> Result<(), String> {
    let states: Vec<Guid> = model.states.keys().copied().collect();
    let sectors = &model.states[&states[random.index(states.len())]].0;
    let mut bytes = vec![0; sectors.len() * SECTOR];
    fill(&mut bytes, 0, |sector| sectors[sector as usize]);
    let mode = [Mode::Expanded, Mode::Preallocated, Mode::Raw][random.index(3)];
    let options = ImportOptions { cluster: Sectors(64), mode, ..ImportOptions::new("/bundle", "root.hds") };
    make_another(random, sectors, |folder| {
        let file = SimDisk::new(1).create("input").unwrap();
        file.write_all_at(0, &bytes).unwrap();
        let input = Input::Storage(std::sync::Arc::new(file), bytes.len() as u64);
        import_in(folder, folder, &options, input, &Silent).map(drop)
    })
    .map_err(|why| format!("import {mode:?}: {why}"))
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
    // A cut command that has done all that is seen, and may have to be finished: the same again would only do that.
    let mut cut_at_end = None;
    let mut history = vec![format!("{shape:?}")];
    let mut step = |random: &mut Random, number: u64, history: &mut Vec<String>| -> Result<(), String> {
        if random.chance(20) {
            match random.index(3) {
                0 => compare_states(&disk, &model, random)?,
                1 => clone_a_state(&disk, &model, random)?,
                _ => import_a_state(&model, random)?,
            }
        }
        let chosen = model.choose(random, &mut next);
        let Some(command) = chosen.filter(|command| !cut_at_end.is_some_and(|cut| command.repeats(cut)))
        else {
            history.push("write".to_owned());
            write_some(&disk, &mut model, random, 100 + number)?;
            model = model.reached(&disk)?;
            return Ok(());
        };
        counts.commands += 1;
        history.push(format!("{command:?}"));
        let mut after = model.clone();
        after.apply(command);
        if random.chance(50) {
            // Cut somewhere, perhaps several times, then the same again.
            let mut host = disk.snapshot().killed().into_disk(number);
            let mut cuts = 0;
            while cuts < 3 {
                host.capture_every_operation(true);
                let result = command.run(&host.folder());
                host.capture_every_operation(false);
                result.map_err(|error| format!("after {cuts} cuts: {}", told(error)))?;
                let captured = host.take_captured();
                cuts += 1;
                counts.cuts += 1;
                let Some((cut, word)) = lose_power(captured, random) else { break };
                history.push(word);
                host = cut;
                model.check_cut(&host, command, &after)?;
                let is_there = host.folder().exists(DESCRIPTOR_NAME).map_err(|error| error.to_string())?;
                if is_there && random.chance(25) {
                    history.push("a repairing check".to_owned());
                    repair(&host.folder()).map_err(|error| format!("check after a cut: {}", told(error)))?;
                    model.check_cut(&host, command, &after)?;
                }
                if after.reached(&host).is_ok() {
                    break;
                }
            }
            disk = host;
        }
        let is_there = after.reached(&disk).is_ok();
        cut_at_end = command.leaves(cut_at_end, is_there);
        if !is_there {
            command.run(&disk.folder()).map_err(told)?;
        }
        model = after.reached(&disk)?;
        Ok(())
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

/// A deletion cut at any place of its end, then something that only keeps the disk, then a merge into what remains.
#[test]
fn what_follows_a_cut_deletion_is_not_taken_for_it() {
    let mut cuts = 0;
    for shape in [Shape::of(3), Shape::of(3).on_raw(), Shape::of(4)] {
        let disk = shape.bundle().disk(7);
        let start = Model::of(&View::read(&disk.folder()).unwrap());
        let deletion = Command::Delete(shape.snapshot(shape.images() - 2));
        let mut after = start;
        after.apply(deletion);
        disk.capture_every_operation(true);
        deletion.run(&disk.folder()).unwrap();
        disk.capture_every_operation(false);
        for captured in disk.take_captured() {
            let host = captured.killed().into_disk(8);
            // Done, but for its memory of that.
            if after.reached(&host).is_err() || !descriptor_of(&host).has_obsolete() {
                continue;
            }
            for between in [
                None,
                Some(Command::Repair),
                Some(Command::Compact),
                Some(Command::Grow(40 * CLUSTER_SECTORS)),
            ] {
                cuts += 1;
                let host = host.snapshot().killed().into_disk(9);
                let mut expected = after.clone();
                for command in between.into_iter().chain([Command::Merge(Guid::TOP)]) {
                    command.run(&host.folder()).unwrap();
                    expected.apply(command);
                }
                expected.reached(&host).unwrap_or_else(|why| panic!("{shape:?}, {between:?}: {why}"));
            }
        }
    }
    assert!(cuts >= 12, "{cuts} cuts between the removal of the file and the end");
}

/// A merge cut when it had done all that can be seen, then a change of the disk, then the same merge: another one is meant.
#[test]
fn a_change_of_the_disk_ends_what_was_cut_before() {
    for between in
        [Command::Compact, Command::Grow(40 * CLUSTER_SECTORS), Command::Convert(Form::Version(Version::V1))]
    {
        let shape = Shape::of(4);
        let disk = shape.bundle().disk(7);
        let mut after = Model::of(&View::read(&disk.folder()).unwrap());
        after.apply(Command::Merge(Guid::TOP));
        disk.capture_every_operation(true);
        Command::Merge(Guid::TOP).run(&disk.folder()).unwrap();
        disk.capture_every_operation(false);
        let hosts = disk.take_captured().into_iter().map(|captured| captured.killed().into_disk(8));
        let cut = |host: &SimDisk| after.reached(host).is_ok() && descriptor_of(host).has_obsolete();
        let host = hosts.into_iter().find(cut).expect("a moment between the removal of the file and the end");
        let mut expected = after.clone();
        for command in [between, Command::Merge(Guid::TOP)] {
            command.run(&host.folder()).unwrap();
            expected.apply(command);
        }
        expected.reached(&host).unwrap_or_else(|why| panic!("{between:?}: {why}"));
    }
}

fn descriptor_of(host: &SimDisk) -> DiskDescriptor {
    DiskDescriptor::load(&host.folder(), None).unwrap()
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
