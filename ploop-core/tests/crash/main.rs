//! Every operation × every crash point × the states a crash may leave there (test programme, section 1).
//!
//! A disk of a few clusters is driven over the simulated host in one thread: requests, transfers and each step of the
//! flusher are single steps. After every operation on the host the states that a power loss may leave there are
//! listed, and each is opened and judged: sound table, sector-history rule, in-use mark; some are repaired, used,
//! closed, and crashed again meanwhile.
//!
//! All sequences of at most three steps, on chains without, with one and with two parents, in two patterns of data, are
//! gone through completely (level C2); random workloads with concurrent requests and faults take the rest of the
//! budget, a quarter of them at level C3.
//!
//! `PLOOP_CRASH_STATES` says how many distinct states are judged in all (default 2 600 000; from 5 million on random
//! workloads are looked into more deeply as well), `PLOOP_CRASH_SEED` where the seeds of random workloads begin (default 0).
//! The counts are printed, and without a budget of one's own they may not shrink. A failure prints the seed and the
//! steps that repeat it. `mutants_are_found` breaks one rule of the protocol after the other on purpose: the same suite
//! must notice each.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: it stops at the first surprise, and its numbers are small"
)]

mod drive;
mod judge;
mod model;
mod pattern;
mod reading;
mod world;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use ploop_core::format::{Destination, Version};
use ploop_core::io::Alignment;
use ploop_core::io::sim::{Call, CrashLevel, Fault, Random, SimDisk, Snapshot};
use ploop_core::mutant::{Mutant, activate};
use ploop_core::units::FileCluster;

use drive::{Run, Step};
use judge::{Judge, Seen};
use world::{CLUSTER_SECTORS, Setting};

/// Operations of a run are numbered from here, above those that prepared the image.
const FIRST_OPERATION: u64 = 1000;

const STATES_DEFAULT: u64 = 2_600_000;

/// Either half of the short sequences had so many at least.
const SEQUENCE_STATES_MIN: u64 = 500_000;

fn states_max() -> u64 {
    std::env::var("PLOOP_CRASH_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(STATES_DEFAULT)
}

fn first_seed() -> u64 {
    std::env::var("PLOOP_CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn write(first: u64, count: u64) -> Step {
    Step::Write { first, count, fua: false }
}

/// How the image is prepared before the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Prepared {
    Empty,
    /// Clusters 0 and 1 are in the top, 0 in parts, closed cleanly.
    Used,
    /// The same, then cluster 0 discarded: there is a free place inside the file.
    Holed,
}

type Made = HashMap<(Setting, Prepared), (Snapshot, Vec<u64>)>;

/// A host with the prepared image, closed cleanly, and what the guest's sectors hold. Parents hold clusters 1 and 2,
/// the latter in parts. Made once and then copied.
fn prepared(setting: Setting, how: Prepared) -> (SimDisk, Vec<u64>) {
    static MADE: OnceLock<Mutex<Made>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap();
    let (snapshot, values) = made.entry((setting, how)).or_insert_with(|| {
        activate(None);
        let disk = world::create(&setting, 1);
        let mut judge = Judge::new(0);
        let mut values = vec![0; setting.sectors() as usize];
        for parent in 0..=setting.parents {
            let is_top = parent == setting.parents;
            let setting = Setting { parents: parent, ..setting };
            let mut run = Run::new(&mut judge, setting, disk.clone(), &values, 2).unwrap();
            run.number_from(100 * parent as u64);
            let steps = match (is_top, how) {
                (false, _) => {
                    vec![write(CLUSTER_SECTORS, CLUSTER_SECTORS), write(2 * CLUSTER_SECTORS + 8, 24)]
                }
                (true, Prepared::Empty) => vec![],
                (true, _) => vec![write(3, 9), write(CLUSTER_SECTORS + 30, 4)],
            };
            for step in steps {
                run.complete(step).unwrap();
            }
            if is_top && how == Prepared::Holed {
                run.complete(Step::Flush).unwrap();
                run.complete(Step::Discard { first: 0, count: CLUSTER_SECTORS }).unwrap();
            }
            values = run.close().unwrap().unwrap();
        }
        disk.set_alignment(Alignment::NONE);
        (disk.snapshot(), values)
    });
    let values = values.clone();
    let disk = snapshot.killed().into_disk(3);
    drop(made);
    (disk, values)
}

fn setting(parents: usize) -> Setting {
    Setting { version: Version::V2, parents, clusters: 4, alignment: 1 }
}

/// What the exhaustive part chooses from.
fn alphabet() -> Vec<Step> {
    let cluster = CLUSTER_SECTORS;
    vec![
        write(3 * cluster + 7, 9),
        write(2 * cluster + 16, 3),
        write(2 * cluster, cluster),
        write(3 * cluster - 4, 8),
        write(5, 2),
        Step::Discard { first: 0, count: cluster },
        Step::Discard { first: cluster, count: cluster },
        Step::Zero { first: 2 * cluster + 10, count: 20, unmap: false, fua: false },
        Step::Zero { first: 0, count: cluster, unmap: true, fua: false },
        Step::Write { first: 3 * cluster + 1, count: 2, fua: true },
        Step::Flush,
        Step::Reopen,
        Step::Kill,
        Step::Relocate { cluster: 2, to: Destination::Below(FileCluster(3)) },
        Step::Relocate { cluster: 0, to: Destination::From(FileCluster(4)) },
        Step::Cut,
    ]
}

/// Runs `steps` one after the other, then closes.
fn run_steps(
    judge: &mut Judge,
    setting: Setting,
    how: Prepared,
    half_zeros: bool,
    steps: &[Step],
    seed: u64,
) -> Result<(), String> {
    let (disk, values) = prepared(setting, how);
    activate(judge.mutant);
    let result = (|| {
        let mut run = Run::new(judge, setting, disk, &values, seed)?;
        run.number_from(FIRST_OPERATION);
        run.half_zeros = half_zeros;
        for &step in steps {
            run.complete(step)?;
        }
        run.read_everything()?;
        run.close().map(drop)
    })();
    activate(None);
    result.map_err(|violation| format!("{violation}\n  SEED={seed} {setting:?} {how:?} {steps:?}"))
}

const PREPARATIONS: [(usize, Prepared); 9] = [
    (1, Prepared::Used),
    (0, Prepared::Used),
    (1, Prepared::Holed),
    (0, Prepared::Empty),
    (2, Prepared::Used),
    (1, Prepared::Empty),
    (0, Prepared::Holed),
    (2, Prepared::Holed),
    (2, Prepared::Empty),
];

/// All sequences of at most `len_max` steps, the short ones first, the longest in seeded order. `part` of how many parts
/// of all sequences this is. How many were run.
fn exhaustive(judge: &mut Judge, len_max: usize, part: (usize, usize), seed: u64) -> Result<u64, String> {
    let alphabet = alphabet();
    let mut runs = 0;
    for len in 1..=len_max {
        let sequences = alphabet.len().pow(len as u32);
        let mut random = Random::new(seed);
        // A step that shares no factor with the number of sequences visits each once.
        let stride =
            (0..).map(|_| 1 + random.index(sequences)).find(|&step| are_coprime(step, sequences)).unwrap();
        for number in (part.0..sequences).step_by(part.1) {
            let mut code = number * stride % sequences;
            let mut steps = Vec::new();
            for _ in 0..len {
                steps.push(alphabet[code % alphabet.len()]);
                code /= alphabet.len();
            }
            for (parents, how) in PREPARATIONS {
                for half_zeros in [false, true] {
                    if judge.is_done() {
                        return Ok(runs);
                    }
                    run_steps(judge, setting(parents), how, half_zeros, &steps, seed)?;
                    runs += 1;
                }
            }
        }
    }
    Ok(runs)
}

fn are_coprime(mut a: usize, mut b: usize) -> bool {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}

/// What a random run does beside requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Faults {
    None,
    /// Nothing fails, but transfers are short and interrupted.
    Ragged,
    /// A sync fails once and forgets what was written.
    LostSync,
    /// A call fails.
    Error,
    /// The host has little room.
    Full,
    /// The same, and what finds none waits.
    FullWaits,
}

fn random_step(random: &mut Random, setting: &Setting, allowed: &[bool; 12]) -> Option<Step> {
    let cluster = CLUSTER_SECTORS;
    let first_cluster = random.below(setting.clusters);
    let kind = random.index(allowed.len());
    if !allowed[kind] {
        return None;
    }
    let anywhere = |random: &mut Random, max: u64| {
        let first = random.below(setting.sectors());
        (first, 1 + random.below(max.min(setting.sectors() - first)))
    };
    let whole = (first_cluster * cluster, cluster);
    Some(match kind {
        0..=2 => {
            let (first, count) = anywhere(random, [3, 20, 90][kind]);
            Step::Write { first, count, fua: random.chance(10) }
        }
        3 => Step::Write { first: whole.0, count: whole.1, fua: false },
        4 => Step::Discard { first: whole.0, count: whole.1 },
        5 => {
            let (first, count) = anywhere(random, 150);
            Step::Discard { first, count }
        }
        6 => {
            let (first, count) = if random.chance(50) { whole } else { anywhere(random, 100) };
            Step::Zero { first, count, unmap: random.chance(50), fua: random.chance(10) }
        }
        7 => Step::Flush,
        8 => {
            let (first, count) = anywhere(random, 100);
            Step::Read { first, count }
        }
        9 => {
            let place = FileCluster(1 + random.below(2 * setting.clusters) as u32);
            let to = if random.chance(70) { Destination::Below(place) } else { Destination::From(place) };
            Step::Relocate { cluster: first_cluster, to }
        }
        10 => Step::Cut,
        _ => [Step::Reopen, Step::Kill, Step::Crash, Step::Settle][random.index(4)],
    })
}

/// A seeded workload with concurrent requests, some of them with faults. A hash over all its operations.
fn random_run(judge: &mut Judge, seed: u64) -> Result<u64, String> {
    let mut random = Random::new(seed);
    let setting = Setting {
        version: if random.chance(50) { Version::V2 } else { Version::V1 },
        parents: random.index(3),
        clusters: 3 + random.below(4),
        alignment: [1, 1, 512, 4096][random.index(4)],
    };
    let how = [Prepared::Empty, Prepared::Used, Prepared::Holed][random.index(3)];
    // Each seed leaves out a third of the kinds, but not flushes.
    let mut allowed = [true; 12];
    for _ in 0..3 {
        allowed[random.index(12)] = false;
    }
    allowed[7] = true;
    let faults = [Faults::None, Faults::None, Faults::Ragged, Faults::LostSync, Faults::Error, Faults::Full]
        [random.index(6)];
    let faults = if faults == Faults::None && seed.is_multiple_of(3) { Faults::FullWaits } else { faults };
    let (disk, values) = prepared(setting, how);
    activate(judge.mutant);
    judge.level = if seed.is_multiple_of(4) { CrashLevel::Reordered } else { CrashLevel::Sectors };
    let mut steps = Vec::new();
    let result = (|| {
        let mut run = Run::new(judge, setting, disk, &values, seed)?;
        run.number_from(FIRST_OPERATION);
        inject(&run.disk, faults, &mut random);
        if faults == Faults::FullWaits {
            run.fill_host((3 + random.below(8)) * CLUSTER_SECTORS * 512)?;
        }
        run.half_zeros = random.chance(30);
        run.may_fail = matches!(faults, Faults::LostSync | Faults::Error | Faults::Full);
        let burst = 1 + random.below(4);
        let outcome = (0..10 + random.below(30)).try_for_each(|_| {
            let Some(step) = random_step(&mut random, &setting, &allowed) else { return Ok(()) };
            // A disk whose open failed has nothing left to tell.
            run.begin(step)?;
            if random.below(burst) == 0 { run.drain() } else { Ok(()) }
        });
        let outcome = outcome.and_then(|()| {
            run.drain()?;
            run.disk.heal();
            if faults == Faults::Full {
                // A full host harms nothing (E3): with room again, everything works and the image closes cleanly.
                run.may_fail = false;
                run.complete(write(0, 1))?;
                run.complete(Step::Flush)?;
            }
            run.read_everything()?;
            run.close()?;
            Ok(run.disk.log_hash())
        });
        steps = run.steps().to_vec();
        outcome
    })();
    activate(None);
    result.map_err(|violation| format!("{violation}\n  SEED={seed} {setting:?} {how:?} {faults:?} {steps:?}"))
}

fn inject(disk: &SimDisk, faults: Faults, random: &mut Random) {
    match faults {
        Faults::None | Faults::FullWaits => {}
        Faults::Ragged => {
            disk.set_short_transfers(true);
            disk.set_interruptions(true);
        }
        Faults::LostSync => {
            disk.inject(Fault::once(Call::Sync, libc::EIO).after(random.below(8)).dropping_data());
        }
        Faults::Error => {
            let call = [Call::Write, Call::Read, Call::Sync, Call::SetLen, Call::Allocate][random.index(5)];
            let errno = if random.chance(50) { libc::EIO } else { libc::ENOSPC };
            let fault = Fault::once(call, errno).after(random.below(20));
            disk.inject(if random.chance(30) { fault.for_ever() } else { fault });
        }
        Faults::Full => disk.set_capacity(Some((3 + random.below(8)) * CLUSTER_SECTORS * 512)),
    }
}

/// Fixed workloads with a fault at every single call of a kind, one after the other.
fn every_call(judge: &mut Judge, calls: &[Call]) -> Result<(), String> {
    let cluster = CLUSTER_SECTORS;
    let steps = [
        write(3 * cluster + 7, 9),
        Step::Flush,
        write(2 * cluster + 16, 3),
        Step::Discard { first: 0, count: cluster },
        Step::Flush,
        Step::Settle,
        write(3 * cluster - 4, 8),
        Step::Flush,
        write(0, 2),
        Step::Flush,
    ];
    for &call in calls {
        for (errno, for_ever, drops) in [
            (libc::EIO, false, true),
            (libc::EIO, false, false),
            (libc::ENOSPC, false, false),
            (libc::EIO, true, false),
            (libc::ENOSPC, true, false),
        ] {
            for number in 0.. {
                if judge.is_done() {
                    return Ok(());
                }
                let (disk, values) = prepared(setting(1), Prepared::Used);
                let mut fault = Fault::once(call, errno).after(number);
                fault = if for_ever { fault.for_ever() } else { fault };
                fault = if drops { fault.dropping_data() } else { fault };
                activate(judge.mutant);
                let before = disk.calls(call);
                let mut calls_made = 0;
                let result = (|| {
                    let mut run = Run::new(judge, setting(1), disk, &values, 4)?;
                    run.number_from(FIRST_OPERATION);
                    calls_made = run.disk.calls(call) - before;
                    run.disk.inject(fault);
                    run.may_fail = true;
                    for step in steps {
                        run.complete(step)?;
                    }
                    run.close()?;
                    calls_made = run.disk.calls(call) - before - calls_made;
                    run.disk.heal();
                    // The image is whole, whatever happened.
                    run.begin(Step::Kill)?;
                    run.may_fail = false;
                    run.complete(write(cluster, 3))?;
                    run.read_everything()?;
                    run.close().map(drop)
                })();
                activate(None);
                result.map_err(|violation| {
                    format!("{violation}\n  {call:?} number {number} fails with {errno}, for ever: {for_ever}, drops: {drops}")
                })?;
                if number >= calls_made {
                    break;
                }
            }
        }
    }
    Ok(())
}

/// A copy that follows the tracker while the guest writes must end equal (T1, T2).
fn tracker_run(judge: &mut Judge, seed: u64) -> Result<(), String> {
    let mut random = Random::new(seed);
    let setting = setting(random.index(2));
    let (disk, values) = prepared(setting, Prepared::Used);
    activate(judge.mutant);
    let result = (|| {
        let mut run = Run::new(judge, setting, disk, &values, seed | 1)?;
        run.number_from(FIRST_OPERATION);
        run.judges = false;
        run.disk.capture_every_operation(false);
        let tracker = run.start_tracker()?;
        let mut copy = run.read_values()?;
        // No reads, nothing that ends the disk.
        let allowed = [true, true, true, true, true, true, true, true, false, true, true, false];
        let harvest = |run: &Run<'_>, copy: &mut Vec<u64>| -> Result<(), String> {
            let mut at = 0;
            while let Some(taken) = tracker.take(at, 1 << 20) {
                let extent = taken.extent();
                let now = run.read_values()?;
                let sectors = (extent.start() / 512) as usize..extent.end().div_ceil(512) as usize;
                copy[sectors.clone()].copy_from_slice(&now[sectors]);
                at = extent.end();
                taken.acknowledge();
            }
            Ok(())
        };
        for _ in 0..60 {
            if let Some(step) = random_step(&mut random, &setting, &allowed) {
                run.begin(step)?;
            }
            if random.chance(50) {
                run.advance_if_busy()?;
            }
            if random.chance(50) {
                harvest(&run, &mut copy)?;
            }
        }
        run.drain()?;
        harvest(&run, &mut copy)?;
        let now = run.read_values()?;
        match (0..now.len()).find(|&sector| now[sector] != copy[sector]) {
            Some(sector) => Err(format!("the tracker missed a change of sector {sector}")),
            None => Ok(()),
        }
    })();
    activate(None);
    result.map_err(|violation| format!("{violation}\n  SEED={seed} {setting:?}"))
}

fn report(name: &str, judge: &Judge, result: Result<(), String>) {
    ploop_testing::count(
        name,
        &format!(
            "{} distinct states at {} crash points, {} recoveries, {} second crashes, {} with an unreadable sector, {} \
             of them refused",
            judge.states,
            judge.crash_points,
            judge.recoveries,
            judge.second_crashes,
            judge.unreadable,
            judge.refused
        ),
    );
    if let Err(violation) = result {
        panic!("{name}: {violation}");
    }
}

/// How many sequences of at most three steps there are, on all preparations.
fn sequences_max() -> u64 {
    let steps = alphabet().len() as u64;
    (steps + steps.pow(2) + steps.pow(3)) * PREPARATIONS.len() as u64 * 2
}

/// All judges of workloads that hold to the protocol.
fn seen() -> &'static Arc<Seen> {
    static SEEN: OnceLock<Arc<Seen>> = OnceLock::new();
    SEEN.get_or_init(Arc::default)
}

/// What each half of the short sequences may take; complete ones need less.
fn sequence_states_max() -> u64 {
    if states_max() >= STATES_DEFAULT { 1_150_000 } else { states_max() * 3 / 8 }
}

/// Half of all short sequences, so that two can run side by side.
fn short_sequences(part: usize) {
    let mut judge = Judge::new(sequence_states_max()).deep().sharing(seen());
    let mut runs = 0;
    let result = exhaustive(&mut judge, 3, (part, 2), 1).map(|count| runs = count);
    report(&format!("short sequences {part}, {runs} of {}", sequences_max() / 2), &judge, result);
    if states_max() >= STATES_DEFAULT {
        assert!(runs >= sequences_max() / 2 - 100, "not all sequences");
        assert!(judge.states >= SEQUENCE_STATES_MIN, "fewer states than there used to be");
    }
}

#[test]
fn short_sequences_survive_every_crash() {
    short_sequences(0);
}

#[test]
fn the_other_short_sequences_survive_every_crash() {
    short_sequences(1);
}

/// Half of all seeds.
fn random_workloads(part: u64) {
    let share = states_max().saturating_sub(2 * sequence_states_max()) / 2;
    let mut judge = Judge::new(share).sharing(seen());
    if states_max() >= 5_000_000 {
        judge = judge.deep();
    }
    let mut outcome = Ok(());
    let mut seed = first_seed() + part;
    while outcome.is_ok() && !judge.is_done() {
        seed += 2;
        outcome = random_run(&mut judge, seed).map(drop);
    }
    report(&format!("random workloads {part}, {} seeds", seed / 2), &judge, outcome);
    assert!(judge.states >= share, "fewer states than were asked for: {} of {share}", judge.states);
}

#[test]
fn random_workloads_survive_every_crash() {
    random_workloads(0);
}

#[test]
fn other_random_workloads_survive_every_crash() {
    random_workloads(1);
}

/// Runs of half of the seeds without looking at crash states: what a running disk answers, and what it holds after it
/// was closed, killed or cut, equals the model.
fn runs_equal_the_model(part: u64) {
    let mut judge = Judge::new(0);
    let runs = model_runs() / 2;
    let result = (0..runs)
        .try_for_each(|run| random_run(&mut judge, 1_000_000 + first_seed() + 2 * run + part).map(drop));
    report(
        &format!("model {part}, {runs} random runs with reopening, kills, power losses and faults"),
        &judge,
        result,
    );
}

fn model_runs() -> u64 {
    std::env::var("PLOOP_MODEL_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(40_000)
}

#[test]
fn random_runs_equal_the_model() {
    runs_equal_the_model(0);
}

#[test]
fn other_random_runs_equal_the_model() {
    runs_equal_the_model(1);
}

/// A host with room for so much and no more: requests fail, nothing is harmed, and with room again all goes on (E3, R6).
#[test]
fn a_full_host_of_any_size_harms_nothing() {
    let cluster = CLUSTER_SECTORS;
    let steps = [
        write(3 * cluster + 7, 9),
        Step::Flush,
        Step::Discard { first: 0, count: cluster },
        write(2 * cluster + 16, 3),
        Step::Flush,
        Step::Settle,
        write(3 * cluster - 4, 8),
        Step::Zero { first: 0, count: cluster, unmap: false, fua: true },
        write(cluster, cluster),
        Step::Flush,
    ];
    let mut judge = Judge::new(states_max() / 8).sharing(seen());
    let mut sizes = 0;
    let result = (0..3).try_for_each(|parents| {
        (0..56_u64).try_for_each(|size| {
            sizes += 1;
            let (disk, values) = prepared(setting(parents), Prepared::Used);
            let mut run = Run::new(&mut judge, setting(parents), disk, &values, size)?;
            run.number_from(FIRST_OPERATION);
            run.disk.set_capacity(Some((parents as u64 + 1) * 2 * cluster * 512 + size * 8192));
            run.may_fail = true;
            for step in steps {
                run.complete(step)?;
            }
            run.begin(if size % 2 == 0 { Step::Kill } else { Step::Settle })?;
            run.disk.heal();
            run.may_fail = false;
            run.reopen_if_closed()?;
            for step in steps {
                run.complete(step)?;
            }
            run.read_everything()?;
            run.close().map(drop)
        })
    });
    report(&format!("full hosts of {sizes} sizes"), &judge, result);
}

/// A host with room for so much and no more, whose disk waits: nothing fails, reads, discards, flushes and freezes go on,
/// a kill in the wait loses nothing that was promised, and with space all goes on by itself.
#[test]
fn on_a_full_host_of_any_size_writes_wait() {
    let cluster = CLUSTER_SECTORS;
    let steps = [
        write(3 * cluster + 7, 9),
        Step::Flush,
        Step::Discard { first: 0, count: cluster },
        write(2 * cluster + 16, 3),
        Step::Read { first: 0, count: 2 * cluster },
        Step::Flush,
        write(3 * cluster - 4, 8),
        Step::Zero { first: 0, count: cluster, unmap: false, fua: true },
        write(cluster, cluster),
        Step::Flush,
    ];
    let mut judge = Judge::new(states_max() / 8).sharing(seen());
    let (mut times_freed, mut waits) = (0, 0);
    let result = [Prepared::Empty, Prepared::Used, Prepared::Holed].into_iter().try_for_each(|how| {
        (0..3).try_for_each(|parents| {
            (0..28_u64).try_for_each(|size| {
                let (disk, values) = prepared(setting(parents), how);
                let mut run = Run::new(&mut judge, setting(parents), disk, &values, size)?;
                run.number_from(FIRST_OPERATION);
                run.fill_host((parents as u64 + 1) * cluster * 512 + size * 16384)?;
                // Nothing answers these yet; what is read and flushed meanwhile is.
                run.begin(write(3 * cluster + 7, 9))?;
                run.begin(write(4 * cluster - 3, 3))?;
                if run.wait_until_full()? {
                    waits += 1;
                    run.begin(Step::Read { first: 0, count: cluster })?;
                    run.begin(Step::Flush)?;
                    if !run.freezes()? {
                        return Err("a freeze waits for writes that wait for space".to_owned());
                    }
                }
                if size % 3 == 0 {
                    run.begin(Step::Kill)?;
                }
                for step in steps {
                    if size % 2 == 0 { run.complete(step)? } else { run.begin(step)? }
                }
                run.drain()?;
                times_freed += run.times_freed;
                run.disk.heal();
                run.read_everything()?;
                run.close().map(drop)
            })
        })
    });
    report(&format!("{waits} full hosts, on which space was freed {times_freed} times"), &judge, result);
    assert!(waits > 20 && times_freed > 100, "the host was full {waits} and freed {times_freed} times");
}

#[test]
fn the_same_seed_makes_the_same_calls() {
    let run = |seed| random_run(&mut Judge::new(0), seed).unwrap();
    for seed in 1..60 {
        assert_eq!(run(seed), run(seed), "SEED={seed}");
    }
}

#[test]
fn a_fault_at_any_call_loses_nothing_that_was_promised() {
    let mut judge = Judge::new(states_max() / 8).sharing(seen());
    let calls = [Call::Sync, Call::Write, Call::Read, Call::SetLen, Call::Allocate];
    let result = every_call(&mut judge, &calls);
    report("a fault at every call", &judge, result);
}

#[test]
fn a_copy_that_follows_the_tracker_ends_equal() {
    let mut judge = Judge::new(0);
    let result = (0..300).try_for_each(|seed| tracker_run(&mut judge, seed));
    report("tracker", &judge, result);
}

/// The states after which a mutant must have been found.
const MUTANT_STATES_MAX: u64 = 240_000;

fn hunt(mutant: Mutant) -> Result<(), String> {
    let mut judge = Judge::new(0);
    judge.mutant = Some(mutant);
    if mutant == Mutant::MarkBeforeWrite {
        return (0..300).try_for_each(|seed| tracker_run(&mut judge, seed));
    }
    if matches!(mutant, Mutant::SyncErrorIgnored | Mutant::SyncRetried) {
        judge.grant(MUTANT_STATES_MAX);
        every_call(&mut judge, &[Call::Sync])?;
    }
    judge.grant(MUTANT_STATES_MAX / 2);
    exhaustive(&mut judge, 2, (0, 1), 1)?;
    judge.grant(MUTANT_STATES_MAX / 2);
    for seed in 0.. {
        if judge.is_done() {
            break;
        }
        random_run(&mut judge, seed)?;
    }
    Ok(())
}

/// Those of the disk itself. Elsewhere: renames (M8, M9) in `crash_ops` and the unit tests of the descriptor, repair
/// (M14) in `damage.rs`, the succession of chains in `succession.rs`.
const MUTANTS: [Mutant; 13] = [
    Mutant::TableBeforeContentSync,
    Mutant::NoContentSync,
    Mutant::SingleSync,
    Mutant::PublishBeforeComplete,
    Mutant::ReuseBeforeClearDurable,
    Mutant::PunchAfterReuse,
    Mutant::ClosedBeforeLastSync,
    Mutant::StaleHeaderSector,
    Mutant::SyncErrorIgnored,
    Mutant::SyncRetried,
    Mutant::ExtensionNotSynced,
    Mutant::CopyUpMisplaced,
    Mutant::MarkBeforeWrite,
];

#[test]
fn mutants_are_found() {
    let mut survivors = Vec::new();
    for mutant in MUTANTS {
        match hunt(mutant) {
            Ok(()) => survivors.push(mutant),
            Err(violation) => {
                ploop_testing::found(mutant);
                println!("{mutant:?}: {violation}\n");
            }
        }
    }
    let found = MUTANTS.len() - survivors.len();
    ploop_testing::count("mutants of the disk", &format!("{found} of {} found", MUTANTS.len()));
    assert!(survivors.is_empty(), "not found: {survivors:?}");
}
