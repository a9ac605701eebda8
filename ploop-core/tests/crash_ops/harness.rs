//! What is done with an operation: cut everywhere, judged, run again, cut again; and every call fails once.
//!
//! 1. **Uncut.** The operation runs on a fresh bundle. When it has said "done", no crash may take it back: every state
//!    that a crash then leaves is the final one.
//! 2. **Cut.** After each of its operations on the host, the states that a power loss may leave (level C2) are listed.
//!    In each: the bundle is sound and reads as the case expects; now and then the disk is opened for writing (which
//!    repairs), which must change nothing a guest reads; the operation is run again and must end in the final state;
//!    now and then that second run is cut as well (R9), and run a third time. In further states a sector that was being
//!    written cannot be read (C3): unless it belongs to a header or table that the bundle needs, nothing else may be
//!    wrong; else the operation must say so.
//! 3. **Failing.** Each call fails, number by number: EIO and ENOSPC, once and for ever, and syncs that forget what they
//!    should have made durable (R7); the host is full at every size. The operation must say so, without a panic, and what
//!    is left is judged as after a crash; with the host well again, the operation ends in the final state.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ploop_core::error::Error;
use ploop_core::format::{DiskDescriptor, Guid, Image, examine};
use ploop_core::io::sim::{Call, CrashLevel, CrashOptions, Fault, Random, SimDisk, Snapshot};
use ploop_core::io::{Access, Folder};
use ploop_core::mutant::{Mutant, activate};

use crate::bundle::{Bundle, CLUSTER_SECTORS, View, open_state, unchanged, unnamed};
use crate::reading::{check_length, describe, is_input_error, read_all};
use ploop_testing::count;

type Operation = Box<dyn Fn(&dyn Folder) -> Result<(), Error>>;
type Expectation = Box<dyn Fn(&View, &View) -> Result<(), String>>;
type Ending = Box<dyn Fn(&View) -> Result<(), String>>;

/// An operation on a bundle, and what it may do to it.
pub(crate) struct Case {
    name: String,
    start: Bundle,
    operation: Operation,
    expect: Expectation,
    ending: Ending,
    leaves: fn(&str) -> bool,
    ignores: Vec<Call>,
    mutant: Option<Mutant>,
    reopens: bool,
    writes_in_place: bool,
    lives_on_lies: bool,
}

impl Case {
    /// `operation` run on `start`. It is run many times, so it must do the same each time.
    pub(crate) fn new(
        name: impl Into<String>,
        start: Bundle,
        operation: impl Fn(&dyn Folder) -> Result<(), Error> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            start,
            operation: Box::new(operation),
            expect: Box::new(unchanged),
            ending: Box::new(|_| Ok(())),
            leaves: |name| name.contains(".tmp."),
            ignores: Vec::new(),
            mutant: None,
            reopens: true,
            writes_in_place: false,
            lives_on_lies: false,
        }
    }

    /// It also overwrites what a guest reads: no sector that it was writing is made unreadable.
    pub(crate) fn writing_in_place(mut self) -> Self {
        self.writes_in_place = true;
        self
    }

    /// How to judge what is found in between (second argument) against what was there before (first).
    pub(crate) fn expecting(mut self, expect: impl Fn(&View, &View) -> Result<(), String> + 'static) -> Self {
        self.expect = Box::new(expect);
        self
    }

    /// How to judge the end of the uncut run. Every run again must end the same.
    pub(crate) fn ending(mut self, ending: impl Fn(&View) -> Result<(), String> + 'static) -> Self {
        self.ending = Box::new(ending);
        self
    }

    /// Which names may be left in the folder though no descriptor names them.
    pub(crate) fn leaving(mut self, leaves: fn(&str) -> bool) -> Self {
        self.leaves = leaves;
        self
    }

    /// Failures of these calls need not be reported.
    pub(crate) fn ignoring(mut self, calls: &[Call]) -> Self {
        self.ignores = calls.to_vec();
        self
    }

    /// What a crash leaves is not opened for writing: the operation forbids it until it has been finished.
    pub(crate) fn without_reopening(mut self) -> Self {
        self.reopens = false;
        self
    }

    /// After a sync that failed and forgot what was written, the same host, whose page cache still shows it, runs the
    /// operation again; what that run calls done is durable.
    pub(crate) fn living_on_lies(mut self) -> Self {
        self.lives_on_lies = true;
        self
    }

    /// Breaks a rule on purpose.
    pub(crate) fn breaking(mut self, mutant: Mutant) -> Self {
        self.mutant = Some(mutant);
        self
    }

    fn run(&self, disk: &SimDisk) -> Result<Result<(), Error>, String> {
        activate(self.mutant);
        let result = catch_unwind(AssertUnwindSafe(|| (self.operation)(&disk.folder())));
        activate(None);
        result.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("the operation panicked: {}", text.unwrap_or_default())
        })
    }
}

/// What was judged.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Distinct states after a crash.
    pub(crate) states: u64,
    pub(crate) crash_points: u64,
    /// Runs again from such a state.
    pub(crate) runs_again: u64,
    /// States after a crash of a run again.
    pub(crate) second_crashes: u64,
    /// Calls that failed.
    pub(crate) faults: u64,
    /// States in which a sector could not be read.
    pub(crate) unreadable: u64,
}

fn states_max() -> u64 {
    std::env::var("PLOOP_CRASH_OPS_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(1500)
}

/// Does all of it, prints the counts, panics at a violation.
pub(crate) fn survives(case: &Case) -> Tally {
    match explore(case) {
        Ok(tally) => {
            println!(
                "{}: {} distinct states at {} crash points, {} runs again, {} second crashes, {} faults, {} with an \
                 unreadable sector",
                case.name,
                tally.states,
                tally.crash_points,
                tally.runs_again,
                tally.second_crashes,
                tally.faults,
                tally.unreadable
            );
            tally
        }
        Err(violation) => panic!("{}: {violation}", case.name),
    }
}

/// Breaks a rule in each case: all of them have to be found. Says how.
pub(crate) fn hunt(name: &str, cases: Vec<(Mutant, Case)>) {
    let all = cases.len();
    let mut survivors = Vec::new();
    for (mutant, case) in cases {
        match explore(&case.breaking(mutant)) {
            Ok(_) => survivors.push(mutant),
            Err(violation) => {
                ploop_testing::found(mutant);
                println!("{mutant:?}: {violation}\n");
            }
        }
    }
    count(&format!("mutants of {name}"), &format!("{} of {all} found", all - survivors.len()));
    assert!(survivors.is_empty(), "not found: {survivors:?}");
}

/// Does all of it; the first violation.
pub(crate) fn explore(case: &Case) -> Result<Tally, String> {
    let mut exploration = Exploration::begin(case)?;
    exploration.cut_everywhere()?;
    exploration.fail_everywhere()?;
    Ok(exploration.tally)
}

/// What a conversion leaves of itself when it is cut.
const PLAN_NAME: &str = "DiskDescriptor.xml.plan";

struct Exploration<'a> {
    case: &'a Case,
    before: View,
    /// What an uncut run leads to.
    end: View,
    captured: Vec<Snapshot>,
    /// How often each kind of call is made.
    calls: Vec<(Call, u64)>,
    tally: Tally,
    seen: HashSet<u64>,
    random: Random,
}

impl<'a> Exploration<'a> {
    fn begin(case: &'a Case) -> Result<Self, String> {
        let before =
            View::read(&case.start.disk(1).folder()).map_err(|why| format!("at the start: {why}"))?;
        let disk = case.start.disk(2);
        disk.capture_every_operation(true);
        let calls_before = Call::ALL.map(|call| disk.calls(call));
        case.run(&disk)?.map_err(|error| format!("the uncut run failed: {}", describe(&error)))?;
        disk.capture_every_operation(false);
        let calls =
            Call::ALL.into_iter().zip(calls_before).map(|(call, before)| (call, disk.calls(call) - before));
        let calls: Vec<_> = calls.collect();
        let captured = disk.take_captured();
        let end = View::read(&disk.folder()).map_err(|why| format!("after the uncut run: {why}"))?;
        (case.ending)(&end).map_err(|why| format!("after the uncut run: {why}"))?;
        if let Some(state) = end.states.values().find(|state| state.transition.is_some()) {
            return Err(format!("after the uncut run a state is {:?}", state.transition));
        }
        check_folder(case, &disk)?;
        // "Done" is a promise: nothing that a crash now leaves is anything else.
        for state in disk.snapshot().crash_states(&options(16, 2, 0)) {
            let what = state.to_string();
            let found = View::read(&state.into_disk(3).folder()).map_err(|why| format!("{why}\n  {what}"))?;
            if found != end {
                return Err(format!(
                    "done was said, but a crash takes it back: {}\n  {what}",
                    difference(&end, &found)
                ));
            }
        }
        Ok(Self {
            case,
            before,
            end,
            captured,
            calls,
            tally: Tally::default(),
            seen: HashSet::new(),
            random: Random::new(7),
        })
    }

    fn cut_everywhere(&mut self) -> Result<(), String> {
        let points = self.captured.len() as u64;
        let budget = states_max();
        for (number, snapshot) in std::mem::take(&mut self.captured).into_iter().enumerate() {
            self.tally.crash_points += 1;
            // What earlier points did not use is for the later ones.
            let number = number as u64;
            let allowance = budget * (number + 1) / points + 40;
            for state in snapshot.crash_states(&options(256, 4, number)) {
                if self.tally.states >= allowance {
                    break;
                }
                if !self.seen.insert(state.hash()) {
                    continue;
                }
                self.tally.states += 1;
                let what = format!("crash after {:?}: {state}", snapshot.after());
                let disk = state.into_disk(number);
                self.judge(&disk).map_err(|why| format!("{why}\n  {what}"))?;
            }
            for state in snapshot.unreadable_states(&options(1, 1, number)) {
                // What is overwritten in place may become unreadable, with no harm but its own.
                if self.case.writes_in_place {
                    break;
                }
                if !state.has_unreadable() || !self.seen.insert(state.hash()) {
                    continue;
                }
                self.tally.unreadable += 1;
                let what = format!("crash after {:?}: {state}", snapshot.after());
                let disk = state.into_disk(number);
                self.judge_unreadable(&disk).map_err(|why| {
                    format!("with the unreadable sectors {:?}: {why}\n  {what}", disk.unreadable_sectors())
                })?;
            }
        }
        Ok(())
    }

    /// A sector cannot be read that was being written. Only the header and the table of an image that the descriptor names
    /// may be missed, and then everybody says so: nobody can know what they held.
    fn judge_unreadable(&mut self, disk: &SimDisk) -> Result<(), String> {
        let lost = disk.unreadable_sectors();
        if lost.iter().any(|(name, _)| name == PLAN_NAME) {
            self.judge_view(disk)?;
            // What it said may be needed, for it may have been durable: people are told, and decide.
            match self.case.run(disk)? {
                Ok(()) => return self.check_end(disk),
                Err(error) if is_input_error(&error) && error.advice().is_some() => {}
                Err(error) => return Err(format!("a lost plan: {}", describe(&error))),
            }
            disk.folder().unlink(PLAN_NAME).map_err(|error| error.to_string())?;
            return self.run_again(disk, false);
        }
        let Ok(descriptor) = DiskDescriptor::load(&disk.folder(), None) else {
            return self.judge(disk);
        };
        let is_raw_base = |image: &Image| {
            descriptor.is_raw()
                && descriptor.shot(image.guid()).is_some_and(|shot| shot.parent() == Guid::NONE)
        };
        let missed = descriptor.images().iter().any(|image| {
            !is_raw_base(image)
                && lost.iter().any(|(name, sector)| name == image.file() && *sector < CLUSTER_SECTORS)
        });
        if !missed || View::read(&disk.folder()).is_ok() {
            return self.judge(disk);
        }
        match self.case.run(disk)? {
            // It had no need of what cannot be read, or has written it anew.
            Ok(()) => {}
            Err(error) if !is_input_error(&error) => {
                return Err(format!("a lost sector of a table: {}", describe(&error)));
            }
            Err(error) if !error.to_string().contains(".hds") => {
                return Err(format!("the error names no file: {}", describe(&error)));
            }
            Err(_) => {}
        }
        DiskDescriptor::load(&disk.folder(), None).map(drop).map_err(|error| describe(&error))
    }

    /// The state of a host after a crash.
    fn judge(&mut self, disk: &SimDisk) -> Result<(), String> {
        let found = self.judge_view(disk)?;
        let number = self.tally.states;
        // All of it where there are few states.
        if number > 30 && !number.is_multiple_of(3) {
            return Ok(());
        }
        let again = copy(disk);
        if self.case.reopens && number.is_multiple_of(2) {
            reopen(&again, &found).map_err(|why| format!("opened for writing: {why}"))?;
        }
        self.run_again(&again, number <= 8 || number.is_multiple_of(24))
    }

    fn judge_view(&self, disk: &SimDisk) -> Result<View, String> {
        let found = View::read(&disk.folder())?;
        (self.case.expect)(&self.before, &found)?;
        Ok(found)
    }

    /// The same command, on what a crash or a failure left.
    fn run_again(&mut self, disk: &SimDisk, with_crashes: bool) -> Result<(), String> {
        self.tally.runs_again += 1;
        disk.capture_every_operation(with_crashes);
        self.case.run(disk)?.map_err(|error| format!("run again it failed: {}", describe(&error)))?;
        disk.capture_every_operation(false);
        self.check_end(disk).map_err(|why| format!("after the run again: {why}"))?;
        for snapshot in disk.take_captured() {
            for state in snapshot.crash_states(&options(8, 1, 0)) {
                if !self.random.chance(25) {
                    continue;
                }
                self.tally.second_crashes += 1;
                let what = format!("second crash after {:?}: {state}", snapshot.after());
                let disk = state.into_disk(5);
                self.judge_view(&disk).map_err(|why| format!("{why}\n  {what}"))?;
                let third = self.case.run(&disk)?;
                third
                    .map_err(|error| format!("the third run failed: {}\n  {what}", describe(&error)))
                    .and_then(|()| {
                        self.check_end(&disk).map_err(|why| format!("after the third run: {why}\n  {what}"))
                    })?;
            }
        }
        Ok(())
    }

    /// The host holds, durably, what an uncut run leads to.
    fn check_end(&self, disk: &SimDisk) -> Result<(), String> {
        let found = View::read(&disk.folder())?;
        if found != self.end {
            return Err(difference(&self.end, &found));
        }
        check_folder(self.case, disk)
    }

    fn fail_everywhere(&mut self) -> Result<(), String> {
        for (call, count) in self.calls.clone() {
            // A long operation repeats itself; its calls are sampled.
            let step = (count / 60).max(1) as usize;
            for number in (0..count).step_by(step) {
                for (errno, for_ever) in
                    [(libc::EIO, false), (libc::ENOSPC, false), (libc::EIO, true), (libc::ENOSPC, true)]
                {
                    let fault = Fault::once(call, errno).after(number);
                    let fault = if for_ever { fault.for_ever() } else { fault };
                    let what = format!("{call:?} number {number} fails with {errno}, for ever: {for_ever}");
                    self.fail(call, fault, for_ever, true).map_err(|why| format!("{why}\n  {what}"))?;
                }
                if call == Call::Sync {
                    let fault = Fault::once(call, libc::EIO).after(number).dropping_data();
                    let what = format!("sync number {number} fails and forgets what was written");
                    self.fail(call, fault, false, self.case.lives_on_lies)
                        .map_err(|why| format!("{why}\n  {what}"))?;
                }
            }
        }
        self.fill_the_host()?;
        for seed in 0..6 {
            let disk = self.case.start.disk(seed);
            disk.set_short_transfers(true);
            disk.set_interruptions(true);
            let result = self.case.run(&disk)?;
            disk.heal();
            result.map_err(|error| format!("short transfers, seed {seed}: {}", describe(&error)))?;
            self.check_end(&disk).map_err(|why| format!("short transfers, seed {seed}: {why}"))?;
        }
        Ok(())
    }

    /// One run with a fault; `lives_on`: the same host can go on with what it has in memory.
    fn fail(&mut self, call: Call, fault: Fault, for_ever: bool, lives_on: bool) -> Result<(), String> {
        self.tally.faults += 1;
        let disk = self.case.start.disk(9);
        disk.inject(fault);
        let result = self.case.run(&disk)?;
        let happened = for_ever || disk.faults_happened();
        disk.heal();
        match result {
            Ok(()) if happened && !self.case.ignores.contains(&call) => {
                return Err("the failure was not reported".to_owned());
            }
            Ok(()) => return self.check_end(&disk),
            Err(_) => {}
        }
        self.judge_view(&disk).map_err(|why| format!("after the failure: {why}"))?;
        let mut crashed = None;
        for state in disk.snapshot().crash_states(&options(4, 1, 0)) {
            let what = state.to_string();
            let after = state.into_disk(11);
            self.judge_view(&after).map_err(|why| format!("after failure and crash: {why}\n  {what}"))?;
            if crashed.is_none() || self.random.chance(20) {
                crashed = Some(after);
            }
        }
        if let Some(disk) = crashed {
            self.run_again(&disk, false).map_err(|why| format!("after failure and crash: {why}"))?;
        }
        if lives_on {
            self.run_again(&disk, false).map_err(|why| format!("after the failure: {why}"))?;
            let states = disk.snapshot().crash_states(&options(4, 1, 0));
            for state in states.into_iter().filter(|_| self.case.lives_on_lies) {
                let what = state.to_string();
                self.check_end(&state.into_disk(19)).map_err(|why| {
                    format!("after the failure, done was said, but a crash takes it back: {why}\n  {what}")
                })?;
            }
        }
        Ok(())
    }

    /// The host has room for so many bytes more, from none to enough.
    fn fill_the_host(&mut self) -> Result<(), String> {
        let used = |disk: &SimDisk| -> u64 {
            let folder = disk.folder();
            let names = folder.list().unwrap_or_default();
            let file = |name: &String| folder.open(name, Access::ReadOnly).ok()?.allocated_bytes().ok();
            names.iter().filter_map(file).sum()
        };
        let start = used(&self.case.start.disk(1));
        for room in 0..400_u64 {
            self.tally.faults += 1;
            let disk = self.case.start.disk(13);
            disk.set_capacity(Some(start + room * 8192));
            let result = self.case.run(&disk)?;
            disk.heal();
            let what = format!("a host with {room} times 8 KiB of room");
            match result {
                Ok(()) => return self.check_end(&disk).map_err(|why| format!("{what}: {why}")),
                Err(error) if !is_full(&error) => {
                    return Err(format!("{what}: another error than \"full\": {}", describe(&error)));
                }
                Err(_) => {}
            }
            self.judge_view(&disk).map_err(|why| format!("{what}: {why}"))?;
            self.run_again(&disk, false).map_err(|why| format!("{what}: {why}"))?;
        }
        Ok(())
    }
}

fn options(exhaustive_max: u64, random_per_density: u32, seed: u64) -> CrashOptions {
    CrashOptions {
        exhaustive_max,
        random_per_density,
        metadata_bytes: 4096,
        seed,
        ..CrashOptions::new(CrashLevel::Sectors)
    }
}

/// Whether the error says that the host is full, itself or by a cause it tells of.
fn is_full(error: &Error) -> bool {
    error.is_out_of_space()
        || describe(error).contains(&std::io::Error::from_raw_os_error(libc::ENOSPC).to_string())
}

/// The same content on another host.
fn copy(disk: &SimDisk) -> SimDisk {
    disk.snapshot().killed().into_disk(17)
}

/// Nothing is left over in the folder but what may be.
fn check_folder(case: &Case, disk: &SimDisk) -> Result<(), String> {
    let mut left = unnamed(&disk.folder())?;
    left.retain(|name| !(case.leaves)(name));
    if left.is_empty() { Ok(()) } else { Err(format!("left over: {}", left.join(", "))) }
}

/// Opens the current state for writing, which repairs, and closes it: nothing a guest reads may change, and the top is
/// clean afterwards.
fn reopen(disk: &SimDisk, found: &View) -> Result<(), String> {
    if !found.exists {
        return Ok(());
    }
    let folder = disk.folder();
    let descriptor = DiskDescriptor::load(&folder, None).map_err(|error| describe(&error))?;
    let top = descriptor.top_guid();
    let chain = open_state(&folder, &descriptor, top, Access::ReadWrite).map_err(|error| describe(&error))?;
    if read_all(&chain)? != found.sectors(top)? {
        return Err("the repair changed what the guest reads".to_owned());
    }
    chain.close().map_err(|error| format!("close: {}", describe(&error)))?;
    let view = View::read(&folder)?;
    if view != *found {
        return Err(difference(found, &view));
    }
    let is_raw_top =
        descriptor.is_raw() && descriptor.shot(top).is_some_and(|shot| shot.parent() == Guid::NONE);
    if is_raw_top {
        return Ok(());
    }
    let file = descriptor.image(top).map(|image| image.file().to_owned()).unwrap_or_default();
    let storage = disk.open(&file, Access::ReadOnly).map_err(|error| error.to_string())?;
    let (_, verdict) = examine(&storage).map_err(|error| describe(&error))?;
    if verdict.at_end.len() as u64 + verdict.ambiguous_count > 0 {
        return Err(format!("findings after a clean close: {verdict:?}"));
    }
    let chain = open_state(&folder, &descriptor, top, Access::ReadOnly).map_err(|error| describe(&error))?;
    check_length(&chain)
}

/// In what two views differ, in words.
fn difference(expected: &View, found: &View) -> String {
    if let Err(why) = unchanged(expected, found) {
        return format!("not the same: {why}");
    }
    let names = |view: &View| view.states.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    if names(expected) != names(found) {
        return format!("states {} instead of {}", names(found), names(expected));
    }
    for (guid, state) in &expected.states {
        let other = &found.states[guid];
        if (state.parent, state.transition) != (other.parent, other.transition) {
            return format!(
                "state {guid} stands on {} ({:?}) instead of {} ({:?})",
                other.parent, other.transition, state.parent, state.transition
            );
        }
    }
    "not the same: the kind of the base".to_owned()
}
