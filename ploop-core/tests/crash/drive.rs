//! Drives a disk over a simulated host, one small step at a time, and has every crash point judged.

use std::collections::HashMap;
use std::sync::Arc;

use ploop_core::device::{Completion, Destination, Disk, DiskOptions, OnFull, Op, Queue, Request};
use ploop_core::extent::Extent;
use ploop_core::io::sim::{CrashLevel, CrashOptions, Random, SimDisk};
use ploop_core::io::{Access, IoBuf, IoQueue, Wait};
use ploop_core::tracker::Tracker;
use ploop_core::units::GuestCluster;

use crate::judge::Judge;
use crate::model::Model;
use crate::pattern::{SECTOR, fill, stamp, values};
use crate::world::{self, CLUSTER_SECTORS, Setting, sectors_len};

/// What a guest, or its operator, does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Write {
        first: u64,
        count: u64,
        fua: bool,
    },
    Zero {
        first: u64,
        count: u64,
        unmap: bool,
        fua: bool,
    },
    Discard {
        first: u64,
        count: u64,
    },
    Flush,
    /// The image's own business: a cluster moves, to below or to past a place in the file.
    Relocate {
        cluster: u64,
        to: Destination,
    },
    /// The free end of the file is cut off.
    Cut,
    Read {
        first: u64,
        count: u64,
    },
    /// Everything finishes, the image is closed and opened again.
    Reopen,
    /// The process dies: what it wrote stays, what it had in memory is gone.
    Kill,
    /// The host loses power, and the disk is opened again.
    Crash,
    /// Everything in flight finishes, the flusher included.
    Settle,
}

impl Step {
    fn extent(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Write { first, count, .. } | Self::Zero { first, count, .. } => Some((first, count)),
            Self::Discard { first, count } | Self::Read { first, count } => Some((first, count)),
            _ => None,
        }
    }
}

struct Outstanding {
    step: Step,
    operation: u64,
    submitted: u64,
}

/// A disk being used.
pub(crate) struct Run<'a> {
    pub(crate) judge: &'a mut Judge,
    pub(crate) setting: Setting,
    pub(crate) disk: SimDisk,
    pub(crate) model: Model,
    random: Random,
    served: Option<(Arc<Disk>, Vec<Queue>)>,
    /// Queues that share the disk.
    queues: u32,
    outstanding: HashMap<u64, Outstanding>,
    operations: u64,
    steps: Vec<Step>,
    /// Whether transfers are told out of order.
    pub(crate) reorders: bool,
    /// Faults are injected: requests may fail.
    pub(crate) may_fail: bool,
    /// Crash points are judged; else only what a running disk answers.
    pub(crate) judges: bool,
    /// Every other sector that is written is zeros.
    pub(crate) half_zeros: bool,
    /// Bytes the host has, in disks opened from here on whose writes wait for space: when nothing else goes on, somebody
    /// frees a little.
    pub(crate) capacity: Option<u64>,
    /// How often that happened.
    pub(crate) times_freed: u64,
}

/// What is freed at a time on a host that is full.
const FREED_BYTES: u64 = 8192;
/// Steps without an answer after which that happens.
const PATIENCE_STEPS: u32 = 60;

impl<'a> Run<'a> {
    /// Opens the chain of `setting` on a host that durably holds `values`. Crash points from here on.
    pub(crate) fn new(
        judge: &'a mut Judge,
        setting: Setting,
        disk: SimDisk,
        values: &[u64],
        seed: u64,
    ) -> Result<Self, String> {
        setting.align(&disk);
        let mut run = Self {
            judge,
            setting,
            disk,
            model: Model::new(values),
            random: Random::new(seed),
            served: None,
            queues: if seed % 4 == 3 { 2 } else { 1 },
            outstanding: HashMap::new(),
            operations: 0,
            steps: Vec::new(),
            reorders: seed % 2 == 1,
            may_fail: false,
            judges: true,
            half_zeros: false,
            capacity: None,
            times_freed: 0,
        };
        run.open()?;
        Ok(run)
    }

    /// Sets the first number of operations, so that their values differ from those written before.
    pub(crate) fn number_from(&mut self, operation: u64) {
        self.operations = operation;
    }

    fn open(&mut self) -> Result<(), String> {
        self.disk.capture_every_operation(self.judges && !self.judge.is_done());
        let chain = world::open(&self.disk, self.setting.parents + 1, Access::ReadWrite);
        self.judge_captured()?;
        let chain = match chain {
            Err(_) if self.may_fail => return Ok(()),
            other => other?,
        };
        let on_full = if self.capacity.is_some() { OnFull::Wait { timeout: None } } else { OnFull::Error };
        let options = DiskOptions { manual_flusher: true, on_full, ..DiskOptions::default() };
        let served = Disk::open(chain, options).map_err(|error| world::describe(&error))?;
        let mut queues = Vec::new();
        for _ in 0..self.queues {
            let queue = self.disk.queue(8, self.random.next_u64()).map_err(|error| error.to_string())?;
            let io: Box<dyn IoQueue> =
                if self.reorders { Box::new(queue) } else { Box::new(queue.in_order()) };
            queues.push(served.queue(io).map_err(|error| world::describe(&error))?);
        }
        self.served = Some((served, queues));
        if self.capacity.is_some() {
            self.disk.set_capacity(self.capacity);
        }
        Ok(())
    }

    /// Opens the disk if the last attempt failed.
    pub(crate) fn reopen_if_closed(&mut self) -> Result<(), String> {
        if self.served.is_none() { self.open() } else { Ok(()) }
    }

    /// The steps so far, for messages.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    fn judge_captured(&mut self) -> Result<(), String> {
        for snapshot in self.disk.take_captured() {
            if !self.judge.is_done() {
                self.judge.check(&self.setting, &snapshot, &self.model)?;
            }
        }
        Ok(())
    }

    /// Begins a step; requests are only submitted. Requests that overlap one in flight wait for it.
    pub(crate) fn begin(&mut self, step: Step) -> Result<(), String> {
        self.steps.push(step);
        match step {
            Step::Reopen => return self.reopen(),
            Step::Kill => return self.die(true),
            Step::Crash => return self.die(false),
            Step::Settle => return self.settle(),
            Step::Cut => return self.cut(),
            _ => {}
        }
        let overlaps = |one: &Outstanding| match (one.step.extent(), step.extent()) {
            (Some((a, a_len)), Some((b, b_len))) => a < b + b_len && b < a + a_len,
            _ => false,
        };
        while self.outstanding.values().any(overlaps) {
            self.advance()?;
        }
        let Some((_, queues)) = &mut self.served else { return Ok(()) };
        self.operations += 1;
        let operation = self.operations;
        let half_zeros = self.half_zeros;
        let value = |sector| if half_zeros && sector % 2 == 0 { 0 } else { stamp(operation, sector) };
        let (first, count) = step.extent().unwrap_or((0, 0));
        let buffer = |fills: bool| -> Result<Option<IoBuf>, String> {
            let mut buffer = IoBuf::try_zeroed(sectors_len(count)).map_err(|error| error.to_string())?;
            if fills {
                fill(buffer.as_mut_slice(), first, value);
            }
            Ok(Some(buffer))
        };
        let (op, buffer) = match step {
            Step::Write { fua, .. } => {
                self.model.begin_write(operation, first, count, value);
                (Op::Write { fua }, buffer(true)?)
            }
            Step::Zero { unmap, fua, .. } => {
                self.model.begin_write(operation, first, count, |_| 0);
                (Op::WriteZeroes { fua, may_unmap: unmap }, None)
            }
            Step::Discard { .. } => {
                self.model.begin_write(operation, first, count, |_| 0);
                (Op::Discard, None)
            }
            Step::Read { .. } => (Op::Read, buffer(false)?),
            Step::Relocate { to, .. } => (Op::Relocate(to), None),
            _ => (Op::Flush, None),
        };
        let extent = Extent::between(first * SECTOR as u64, (first + count) * SECTOR as u64);
        let extent = match step {
            Step::Relocate { cluster, .. } => {
                self.setting.geometry().cluster_extent(GuestCluster(cluster as u32))
            }
            _ => extent,
        };
        let at = self.random.index(queues.len());
        queues[at].submit(Request { id: operation, op, extent, buffer });
        let submitted = self.model.tick();
        self.outstanding.insert(operation, Outstanding { step, operation, submitted });
        self.judge_captured()
    }

    /// A step and everything it waits for.
    pub(crate) fn complete(&mut self, step: Step) -> Result<(), String> {
        self.begin(step)?;
        self.drain()
    }

    /// Goes on until every request has been answered.
    pub(crate) fn drain(&mut self) -> Result<(), String> {
        while !self.outstanding.is_empty() {
            self.advance()?;
        }
        Ok(())
    }

    /// Between two rounds of the flusher; a disk that takes no writes any more refuses.
    fn cut(&mut self) -> Result<(), String> {
        let Some((disk, _)) = &self.served else { return Ok(()) };
        let cut = disk.cut_tail();
        self.judge_captured()?;
        match cut {
            Err(_) if self.may_fail => Ok(()),
            other => other.map(drop).map_err(|error| world::describe(&error)),
        }
    }

    fn settle(&mut self) -> Result<(), String> {
        self.drain()?;
        while self.served.as_ref().is_some_and(|(disk, _)| disk.step_flusher()) {
            self.judge_captured()?;
        }
        self.judge_captured()
    }

    /// Goes on by a step if there is anything to wait for.
    pub(crate) fn advance_if_busy(&mut self) -> Result<(), String> {
        if self.outstanding.is_empty() { Ok(()) } else { self.advance() }
    }

    /// Small steps of the queue and of the flusher, by seed, until something is answered.
    pub(crate) fn advance(&mut self) -> Result<(), String> {
        let mut answers = Vec::new();
        for step in 1..20_000 {
            let Some((disk, queues)) = &mut self.served else {
                self.outstanding.clear();
                return Ok(());
            };
            if step % PATIENCE_STEPS == 0
                && let Some(capacity) = &mut self.capacity
                && disk.waiting().is_some()
            {
                *capacity += FREED_BYTES;
                self.disk.set_capacity(Some(*capacity));
                self.times_freed += 1;
                disk.retry_waiting();
            }
            if self.random.chance(60) {
                let at = self.random.index(queues.len());
                queues[at].run(Wait::No, &mut answers).map_err(|error| error.to_string())?;
            } else {
                disk.step_flusher();
            }
            // Taken before the answers count: nobody had been told.
            self.judge_captured()?;
            if !answers.is_empty() {
                break;
            }
        }
        if answers.is_empty() {
            return Err("requests are never answered".to_owned());
        }
        let mut promised = false;
        for answer in answers {
            promised |= self.answered(answer)?;
        }
        if promised && self.judges && !self.judge.is_done() {
            self.judge.check(&self.setting, &self.disk.snapshot(), &self.model)?;
        }
        Ok(())
    }

    /// Handles an answer; whether it promised durability.
    fn answered(&mut self, answer: Completion) -> Result<bool, String> {
        let Some(Outstanding { step, operation, submitted }) = self.outstanding.remove(&answer.id) else {
            return Err(format!("an answer to request {}, which is not outstanding", answer.id));
        };
        if let Err(errno) = answer.result {
            // Who moves clusters is not kept waiting.
            let is_refused_move =
                matches!(step, Step::Relocate { .. }) && self.capacity.is_some() && errno == libc::ENOSPC;
            if self.may_fail || is_refused_move {
                return Ok(false);
            }
            return Err(format!("{step:?} failed with {}", std::io::Error::from_raw_os_error(errno)));
        }
        match step {
            Step::Flush => self.model.answer_flush(submitted),
            Step::Read { first, .. } => {
                let buffer = answer.buffer.ok_or("a read without its buffer")?;
                for (sector, value) in (first..).zip(values(buffer.as_slice(), first)?) {
                    if !self.model.is_current(sector, value) {
                        return Err(format!(
                            "a read of sector {sector} returned something else than was written"
                        ));
                    }
                }
            }
            Step::Write { first, count, fua, .. } | Step::Zero { first, count, fua, .. } => {
                self.model.answer_write(operation, first, count, fua);
                return Ok(fua);
            }
            Step::Discard { first, count } => self.model.answer_write(operation, first, count, false),
            _ => {}
        }
        Ok(step == Step::Flush)
    }

    /// Closes the image; the values it then holds.
    pub(crate) fn close(&mut self) -> Result<Option<Vec<u64>>, String> {
        self.drain()?;
        let Some((disk, queues)) = self.served.take() else { return Ok(None) };
        drop(queues);
        self.model.begin_close();
        let closed = disk.close();
        drop(disk);
        self.judge_captured()?;
        match closed {
            Err(_) if self.may_fail => return Ok(None),
            other => other.map_err(|error| format!("close: {}", world::describe(&error)))?,
        }
        // Read on a copy, where no fault waits.
        let copy = self.disk.snapshot().killed().into_disk(1);
        let chain = world::open(&copy, self.setting.parents + 1, Access::ReadOnly)?;
        let values = world::read_all(&chain)?;
        for (sector, &value) in (0..).zip(&values) {
            if !self.model.is_current(sector, value) {
                return Err(format!(
                    "after a clean close sector {sector} holds something else than was written"
                ));
            }
        }
        world::check_length(&chain)?;
        // A clean close is durable (I6): only one state is left to judge.
        let pending = self.disk.snapshot().pending();
        if pending > 0 {
            return Err(format!("after a clean close {pending} changes are not durable"));
        }
        self.model = Model::new(&values);
        if self.judges && !self.judge.is_done() {
            self.judge.check(&self.setting, &self.disk.snapshot(), &self.model)?;
        }
        Ok(Some(values))
    }

    fn reopen(&mut self) -> Result<(), String> {
        if self.close()?.is_some() { self.open() } else { self.die(true) }
    }

    /// The engine is gone without a word; the disk goes on with what is left.
    fn die(&mut self, only_the_process: bool) -> Result<(), String> {
        let snapshot = self.disk.snapshot();
        let options = CrashOptions { seed: self.random.next_u64(), ..CrashOptions::new(CrashLevel::Sectors) };
        let mut states = snapshot.crash_states(&options);
        let state = if only_the_process {
            snapshot.killed()
        } else {
            let skip = self.random.index(40);
            states.nth(skip).unwrap_or_else(|| snapshot.killed())
        };
        self.served = None;
        self.outstanding.clear();
        self.disk = state.into_disk(self.random.next_u64());
        self.setting.align(&self.disk);
        // It becomes what the guest has from here on.
        let chain = world::open(&self.disk, self.setting.parents + 1, Access::ReadOnly)?;
        let values = world::read_all(&chain)?;
        self.model
            .check(&values, false)
            .map_err(|violation| format!("after the host came back: {violation}"))?;
        self.model = Model::new(&values);
        self.open()
    }

    /// The host has this much room from now on, and what needs more waits.
    pub(crate) fn fill_host(&mut self, capacity: u64) -> Result<(), String> {
        self.capacity = Some(capacity);
        // The policy is that of the next disk.
        self.reopen()?;
        self.disk.set_capacity(Some(capacity));
        Ok(())
    }

    /// Small steps until something waits for space; whether it came to that.
    pub(crate) fn wait_until_full(&mut self) -> Result<bool, String> {
        for _ in 0..PATIENCE_STEPS - 1 {
            let Some((disk, queues)) = &mut self.served else { return Ok(false) };
            if disk.waiting().is_some_and(|waiting| waiting.writes > 0) {
                return Ok(true);
            }
            let mut answers = Vec::new();
            for queue in queues {
                queue.run(Wait::No, &mut answers).map_err(|error| error.to_string())?;
            }
            self.judge_captured()?;
            for answer in answers {
                self.answered(answer)?;
            }
        }
        Ok(false)
    }

    /// Whether a freeze drains although writes wait for space.
    pub(crate) fn freezes(&mut self) -> Result<bool, String> {
        let Some((disk, queues)) = &mut self.served else { return Ok(false) };
        let mut freezing = disk.begin_freeze().map_err(|error| world::describe(&error))?;
        let mut answers = Vec::new();
        let mut frozen = None;
        for _ in 0..200 {
            for queue in &mut *queues {
                queue.run(Wait::No, &mut answers).map_err(|error| error.to_string())?;
            }
            match freezing.finish() {
                Ok(done) => {
                    frozen = Some(done);
                    break;
                }
                Err(not_yet) => freezing = not_yet,
            }
        }
        let is_frozen = frozen.is_some();
        drop(frozen);
        self.judge_captured()?;
        for answer in answers {
            self.answered(answer)?;
        }
        Ok(is_frozen)
    }

    /// Whether every sector can be read and holds what was last written.
    pub(crate) fn read_everything(&mut self) -> Result<(), String> {
        self.drain()?;
        for cluster in 0..self.setting.clusters {
            self.complete(Step::Read { first: cluster * CLUSTER_SECTORS, count: CLUSTER_SECTORS })?;
        }
        Ok(())
    }

    /// A tracker over all writes from now on.
    pub(crate) fn start_tracker(&mut self) -> Result<Arc<Tracker>, String> {
        let (disk, _) = self.served.as_ref().ok_or("the disk is not open")?;
        disk.start_tracker().map_err(|error| world::describe(&error))
    }

    /// The value of every sector as a copy would read it now.
    pub(crate) fn read_values(&self) -> Result<Vec<u64>, String> {
        let (disk, _) = self.served.as_ref().ok_or("the disk is not open")?;
        world::read_all(&disk.chain())
    }
}
