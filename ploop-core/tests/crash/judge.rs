//! The oracle: every state that a crash may leave is opened, judged, repaired, used and crashed again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use ploop_core::device::{Disk, DiskOptions, Op, Request};
use ploop_core::extent::Extent;
use ploop_core::format::Chain;
use ploop_core::io::sim::{Call, CrashLevel, CrashOptions, CrashState, Random, SimDisk, Snapshot};
use ploop_core::io::{Access, IoBuf, Wait};
use ploop_core::mutant::{Mutant, activate};
use ploop_core::units::GuestCluster;

use crate::model::Model;
use crate::pattern::{SECTOR, fill, stamp};
use crate::world::{self, CLUSTER_SECTORS, Setting};

/// Number of the operations that the oracle does by itself.
const OWN_OPERATION: u64 = 1 << 40;

/// The states that were judged, by several judges at once: none is judged or counted twice.
#[derive(Default)]
pub(crate) struct Seen {
    shards: [Mutex<HashSet<u64>>; 16],
}

impl Seen {
    /// Whether it is new.
    fn insert(&self, hash: u64) -> bool {
        self.shards[(hash >> 60) as usize].lock().unwrap().insert(hash)
    }
}

/// Counts what was judged and remembers it.
pub(crate) struct Judge {
    pub(crate) mutant: Option<Mutant>,
    /// Distinct states judged: by content and by what was allowed.
    pub(crate) states: u64,
    pub(crate) recoveries: u64,
    pub(crate) second_crashes: u64,
    pub(crate) crash_points: u64,
    /// Distinct states in which a sector could not be read, and those of them that were rightly refused.
    pub(crate) unreadable: u64,
    pub(crate) refused: u64,
    states_max: u64,
    seen: Arc<Seen>,
    /// One state in this many is also repaired, used and closed.
    recover_one_in: u64,
    exhaustive_max: u64,
    random_per_density: u32,
    /// How much a crash may garble.
    pub(crate) level: CrashLevel,
}

impl Judge {
    /// Stops after `states_max` distinct states.
    pub(crate) fn new(states_max: u64) -> Self {
        Self {
            mutant: None,
            states: 0,
            recoveries: 0,
            second_crashes: 0,
            crash_points: 0,
            unreadable: 0,
            refused: 0,
            states_max,
            seen: Arc::default(),
            recover_one_in: 6,
            exhaustive_max: 64,
            random_per_density: 2,
            level: CrashLevel::Sectors,
        }
    }

    /// Looks deeper into each crash point.
    pub(crate) fn deep(mut self) -> Self {
        (self.exhaustive_max, self.random_per_density) = (512, 8);
        self
    }

    /// Leaves out what others who share `seen` have judged.
    pub(crate) fn sharing(mut self, seen: &Arc<Seen>) -> Self {
        self.seen = Arc::clone(seen);
        self
    }

    pub(crate) fn is_done(&self) -> bool {
        self.states >= self.states_max
    }

    /// Raises the limit by `states` from what has been judged so far.
    pub(crate) fn grant(&mut self, states: u64) {
        self.states_max = self.states + states;
    }

    /// Judges every state a crash at `snapshot` may leave. The violation, if there is one.
    pub(crate) fn check(
        &mut self,
        setting: &Setting,
        snapshot: &Snapshot,
        model: &Model,
    ) -> Result<(), String> {
        activate(None);
        let result = self.check_states(setting, snapshot, model);
        activate(self.mutant);
        result
    }

    fn check_states(&mut self, setting: &Setting, snapshot: &Snapshot, model: &Model) -> Result<(), String> {
        if let Some(operation) = snapshot.after()
            && operation.file != setting.parents
            && matches!(operation.call, Call::Write | Call::SetLen | Call::Allocate)
        {
            return Err(format!("a delta that has a child was changed (I7): {operation:?}"));
        }
        self.crash_points += 1;
        let allowed = model.hash();
        let options = CrashOptions {
            exhaustive_max: self.exhaustive_max,
            random_per_density: self.random_per_density,
            metadata_bytes: setting.geometry().data_start().0,
            seed: allowed,
            ..CrashOptions::new(self.level)
        };
        for state in snapshot.crash_states(&options) {
            let hash = state.hash() ^ allowed.rotate_left(32);
            if self.is_done() {
                break;
            }
            if !self.seen.insert(hash) {
                continue;
            }
            self.states += 1;
            let what = format!("crash after {:?}: {state}", snapshot.after());
            let number = self.states;
            self.check_state(setting, state, model, number)
                .map_err(|violation| format!("{violation}\n  {what}"))?;
        }
        Ok(())
    }

    fn check_state(
        &mut self,
        setting: &Setting,
        state: CrashState,
        model: &Model,
        number: u64,
    ) -> Result<(), String> {
        let is_unreadable = state.has_unreadable();
        let disk = state.into_disk(number);
        let depth = setting.parents + 1;
        if is_unreadable {
            if u64::from(setting.alignment) > SECTOR as u64 {
                // Such a host loses a whole unit of its own, with what was written beside; here it is one sector.
                return Ok(());
            }
            self.unreadable += 1;
            if is_rightly_refused(&disk, setting)? {
                self.refused += 1;
                return Ok(());
            }
        }
        let found = judge_world(&disk, depth, |values, closed| model.check(values, closed))?;
        if number.is_multiple_of(self.recover_one_in) {
            self.recoveries += 1;
            let with_crashes = number.is_multiple_of(self.recover_one_in * 8);
            self.recover(setting, &disk, &found, with_crashes)
                .map_err(|violation| format!("in recovery: {violation}"))?;
        }
        Ok(())
    }

    /// Opens for writing (which repairs), compares, writes one sector to a cluster that the top holds and one to a cluster
    /// that it does not, flushes, closes, compares again. With crashes after every operation of all that (R9).
    fn recover(
        &mut self,
        setting: &Setting,
        disk: &SimDisk,
        found: &[u64],
        with_crashes: bool,
    ) -> Result<(), String> {
        let depth = setting.parents + 1;
        setting.align(disk);
        disk.capture_every_operation(with_crashes);
        let chain = world::open(disk, depth, Access::ReadWrite)?;
        if world::read_all(&chain)? != found {
            return Err("repair has changed what the guest reads".to_owned());
        }
        let mut expected = found.to_vec();
        let clusters = choose(&chain);
        let options = DiskOptions { manual_flusher: true, ..DiskOptions::default() };
        let served = Disk::open(chain, options).map_err(|error| world::describe(&error))?;
        let io = disk.queue(8, 1).map_err(|error| error.to_string())?;
        let mut queue = served.queue(Box::new(io)).map_err(|error| world::describe(&error))?;
        for (number, cluster) in (0..).zip(clusters) {
            let operation = OWN_OPERATION + number;
            let sector = u64::from(cluster.0) * CLUSTER_SECTORS + 5;
            expected[sector as usize] = stamp(operation, sector);
            let mut buffer = IoBuf::try_zeroed(SECTOR).map_err(|error| error.to_string())?;
            fill(buffer.as_mut_slice(), sector, |sector| stamp(operation, sector));
            let extent = Extent::between(sector * SECTOR as u64, (sector + 1) * SECTOR as u64);
            queue.submit(Request { id: number, op: Op::Write { fua: false }, extent, buffer: Some(buffer) });
            let mut answers = Vec::new();
            for _ in 0..1000 {
                if !answers.is_empty() {
                    break;
                }
                queue.run(Wait::No, &mut answers).map_err(|error| error.to_string())?;
            }
            match answers.pop().map(|answer| answer.result) {
                Some(Ok(())) => {}
                other => return Err(format!("a write after the crash ended with {other:?}")),
            }
        }
        drop(queue);
        served.close().map_err(|error| format!("close: {}", world::describe(&error)))?;
        drop(served);
        let exactly =
            |values: &[u64], closed: bool| match values.iter().zip(&expected).position(|(a, b)| a != b) {
                _ if !closed => Err("the header does not say \"closed\" after a clean close".to_owned()),
                Some(sector) => Err(format!("sector {sector} changed by a clean close")),
                None => Ok(()),
            };
        judge_world(disk, depth, exactly)?;
        disk.capture_every_operation(false);
        let options = CrashOptions {
            exhaustive_max: 16,
            random_per_density: 1,
            ..CrashOptions::new(CrashLevel::Subset)
        };
        let mut random = Random::new(self.states);
        for snapshot in disk.take_captured() {
            for state in snapshot.crash_states(&options) {
                // A sample: this happens once per judged state that recovers.
                if !random.chance(40) {
                    continue;
                }
                self.second_crashes += 1;
                let what = format!("second crash after {:?}: {state}", snapshot.after());
                let either = |values: &[u64], _: bool| {
                    let wrong = |at: &usize| values[*at] != found[*at] && values[*at] != expected[*at];
                    match (0..values.len()).find(wrong) {
                        Some(sector) => {
                            Err(format!("sector {sector} holds neither the old nor the new value"))
                        }
                        None => Ok(()),
                    }
                };
                let again = state.into_disk(1);
                let values = judge_world(&again, depth, either)
                    .map_err(|violation| format!("{violation}\n  {what}"))?;
                let chain = world::open(&again, depth, Access::ReadWrite)?;
                if world::read_all(&chain)? != values {
                    return Err(format!("the second repair has changed what the guest reads\n  {what}"));
                }
                chain
                    .close()
                    .map_err(|error| format!("close after the second repair: {}", world::describe(&error)))?;
                judge_world(&again, depth, either).map_err(|violation| format!("{violation}\n  {what}"))?;
            }
        }
        Ok(())
    }
}

/// A cluster that the top holds and one that it does not, as far as there are such.
fn choose(chain: &Arc<Chain>) -> Vec<GuestCluster> {
    let all = || (0..chain.geometry().entries()).map(GuestCluster);
    let held = |cluster: &GuestCluster| chain.held_at(chain.top(), *cluster).is_some();
    all().find(held).into_iter().chain(all().rev().find(|cluster| !held(cluster))).collect()
}

/// A sector of the header or of the table cannot be read: nobody may guess what it held. Opening the disk, for reading
/// or for writing, must say so and leave everything as it is. False if the image opens, and is to be judged as any.
fn is_rightly_refused(disk: &SimDisk, setting: &Setting) -> Result<bool, String> {
    let depth = setting.parents + 1;
    if !world::has_lost_metadata(disk, setting.geometry().data_start().0) {
        return Ok(false);
    }
    let mut refused = Vec::new();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let before = disk.trace().len();
        match world::try_open(disk, depth, access) {
            // Room of the table that no entry lies in, or that is written anew.
            Ok(chain) => {
                drop(chain);
                refused.push(false);
            }
            Err(error) if !world::is_input_error(&error) => {
                return Err(format!("a lost sector of the table: {}", world::describe(&error)));
            }
            Err(error) if !error.to_string().contains("delta") => {
                return Err(format!("the error names no file: {}", world::describe(&error)));
            }
            Err(_) if disk.trace().len() != before => {
                return Err("an image that was refused was changed".to_owned());
            }
            Err(_) => refused.push(true),
        }
    }
    if refused[0] != refused[1] {
        return Err("a lost sector of the table is seen by readers or by writers alone".to_owned());
    }
    Ok(refused[0])
}

/// Opens a world for reading: the table must be sound and `check` agree with the values, which are returned.
fn judge_world(
    disk: &SimDisk,
    depth: usize,
    check: impl Fn(&[u64], bool) -> Result<(), String>,
) -> Result<Vec<u64>, String> {
    let top = disk.open(&world::file_name(depth - 1), Access::ReadOnly).map_err(|error| error.to_string())?;
    let closed = world::check_table(&top)?;
    let chain = world::open(disk, depth, Access::ReadOnly)?;
    let found = world::read_all(&chain)?;
    check(&found, closed)?;
    if closed {
        world::check_length(&chain)?;
    }
    Ok(found)
}
