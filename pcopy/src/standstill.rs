//! The time in which the guest stands still: the most dangerous part of a copy, the same for every sender.
//!
//! ```text
//! freeze command · file systems frozen · limit starts · rounds, the gate open · gate closed · last harvest
//! · (what the sender awaits) · limit ends · gate open · file systems thawed, thaw command
//! ```
//!
//! * The last harvest comes with the gate closed, which means that writes are held *and* those in flight have ended
//!   and are marked (T4). What it leaves dirty is a failure, never a copy.
//! * Whoever was frozen is thawed, once, whatever happens (C2): by [`thaw`](Standstill::thaw) when all went well, by
//!   [`release`](Standstill::release) after a failure of any step, on drop after a panic. The gate opens first, as a thaw
//!   may have to write. A sender that fails calls `release` before anything that may wait for its peer.
//! * A receiver that hangs does not keep the guest waiting (C4): from the freeze to the thaw a [`FreezeLimit`] runs, and
//!   its failure ends the waits of the sender.
//!
//! A [`Standstill`] is kept beside its sender, not in it, as it makes the sender sweep.

use std::time::{Duration, Instant};

use ploop_core::{Error, ErrorKind, Result};

use crate::course::Course;
use crate::freeze::{Frozen, Quiesce, StandstillLimits};
use crate::freeze_limit::FreezeLimit;
use crate::stats::{Event, milliseconds};

/// Further rounds over what is written although writers stand still. (A sync by anybody on the host writes a block
/// of a frozen ext4, so the first ones are no error.)
const FROZEN_ROUNDS_MAX: u32 = 2;
/// How much later than this process, which tells why, the helper thaws.
const ABANDONED_SLACK: Duration = Duration::from_secs(5);

/// A sender, as far as a standstill needs one.
pub(crate) trait Sweeper<'a> {
    fn course(&mut self) -> &mut Course<'a>;
    /// Sends what is dirty now, of the kind [`Frozen`](crate::stats::PassKind::Frozen). `last`: nothing will follow.
    fn sweep_frozen(&mut self, last: bool) -> Result<()>;
}

/// The writers of one disk, before they stand still, meanwhile, and after.
pub(crate) struct Standstill<'a> {
    /// Until the freeze; then it is part of `frozen`.
    quiesce: Option<&'a mut dyn Quiesce>,
    frozen: Option<Frozen<'a>>,
    limit: Option<FreezeLimit>,
    begun: Option<Instant>,
    gate_closed: Option<Instant>,
}

impl<'a> Standstill<'a> {
    /// Nobody stands still yet.
    pub(crate) fn new(quiesce: &'a mut dyn Quiesce) -> Self {
        Self { quiesce: Some(quiesce), frozen: None, limit: None, begun: None, gate_closed: None }
    }

    /// Lets the file system write what it still holds, before the freeze. Whether anything was mounted.
    pub(crate) fn sync_file_system(&mut self) -> Result<bool> {
        self.quiesce.as_mut().map_or(Ok(false), |quiesce| quiesce.sync_file_system())
    }

    /// The operator's command, then the file systems, then the limit. From its first step on, a thaw is due.
    pub(crate) fn freeze(&mut self, course: &mut Course<'_>) -> Result<()> {
        course.check()?;
        course.tell(&Event::Freezing);
        let begun = Instant::now();
        self.begun = Some(begun);
        let Some(quiesce) = self.quiesce.take() else { return Err(out_of_order()) };
        quiesce.set_limits(limits(course));
        let frozen = self.frozen.insert(Frozen::begin(quiesce));
        frozen.run_hook()?;
        course.downtime.hook_ms = milliseconds(begun.elapsed());
        let hooked = Instant::now();
        frozen.freeze_file_system()?;
        course.downtime.file_system_ms = milliseconds(hooked.elapsed());
        course.tell(&Event::Frozen {
            hook_ms: course.downtime.hook_ms,
            file_system_ms: course.downtime.file_system_ms,
        });
        let predicted = course.predicted_freeze_ms();
        match course.options.convergence.freeze_ms_max {
            Some(limit) if predicted > limit => {
                Err(course.too_long(predicted, "too much was written while it was frozen"))
            }
            _ => {
                let allowed = allowed(course, predicted);
                self.limit = Some(FreezeLimit::start(allowed, &course.exchange, &course.stop)?);
                Ok(())
            }
        }
    }

    /// The rest, with the gate still open, as long as it keeps coming; then the gate, and the last harvest (T4).
    pub(crate) fn last_passes<'s>(&mut self, sender: &mut impl Sweeper<'s>) -> Result<()> {
        let begun = Instant::now();
        let sent = sender.course().total.wire_bytes;
        let mut rounds = 0;
        while sender.course().source.dirty_bytes() > 0 {
            if rounds > FROZEN_ROUNDS_MAX && sender.course().options.is_crash_consistent {
                // Nobody was to be stopped but by the gate.
                break;
            }
            if rounds > FROZEN_ROUNDS_MAX {
                return Err(Error::new(
                    ErrorKind::NotQuiet,
                    format!("the disk is still written to after the freeze ({rounds} rounds)"),
                )
                .at_path(sender.course().source.description().name)
                .advise("give a freeze command (-F) that stops what writes, or mount the disk so that its file system can be frozen"));
            }
            rounds += 1;
            sender.sweep_frozen(false)?;
        }
        let course = sender.course();
        let gate = course.source.close_gate(course.options.gate_timeout)?;
        self.gate_closed = Some(Instant::now());
        let frozen = self.frozen.as_mut().ok_or_else(out_of_order)?;
        frozen.hold(gate);
        // From here on a thaw changes nothing of what is sent.
        frozen.confirm()?;
        sender.sweep_frozen(true)?;
        let course = sender.course();
        course.downtime.last_pass_ms = milliseconds(begun.elapsed());
        course.downtime.bytes = course.total.wire_bytes - sent;
        if course.source.dirty_bytes() > 0 {
            return Err(Error::new(ErrorKind::NotQuiet, "the disk was written to with its gate closed"));
        }
        Ok(())
    }

    /// Writers go on.
    pub(crate) fn thaw(&mut self, course: &mut Course<'_>) -> Result<()> {
        self.limit = None;
        let thawed = self.frozen.as_mut().map_or(Ok(()), Frozen::thaw);
        if let Some(closed) = self.gate_closed {
            course.downtime.gate_ms = milliseconds(closed.elapsed());
        }
        thawed?;
        self.frozen = None;
        if let Some(begun) = self.begun {
            course.downtime.total_ms = milliseconds(begun.elapsed());
        }
        course.tell(&Event::Thawed(course.downtime));
        Ok(())
    }

    /// The way out of a failure, wherever it happened: writers go on. What is to be reported then, which is worse than
    /// `error` when they could not be thawed.
    #[cfg(test)]
    pub(crate) fn release(self, error: Error) -> Error {
        match self.release_known(error) {
            Ok(error) | Err(error) => error,
        }
    }

    /// The way out of a failure, wherever it happened: writers go on. What is to be reported then: `Ok` when they do,
    /// `Err`, which is worse than `error`, when they could not be thawed.
    pub(crate) fn release_known(mut self, error: Error) -> std::result::Result<Error, Error> {
        let thawed = self.frozen.take().map_or(Ok(()), |mut frozen| frozen.thaw());
        match thawed {
            Ok(()) => Ok(error),
            // The guest stands still.
            Err(frozen) => {
                Err(Error::new(frozen.kind(), format!("the copy failed ({error}) and then: {frozen}"))
                    .advise(frozen.advice().unwrap_or("thaw the file system by hand: fsfreeze -u").to_owned())
                    .caused_by(frozen))
            }
        }
    }
}

/// How long the frozen disk may wait for the receiver: what was foreseen, and a time for what was not.
fn allowed(course: &Course<'_>, predicted_freeze_ms: u64) -> Duration {
    let foreseen = Duration::from_millis(predicted_freeze_ms);
    let accepted = Duration::from_millis(course.options.convergence.freeze_ms_max.unwrap_or(0));
    foreseen.saturating_add(course.options.freeze_stall_timeout).max(accepted)
}

/// How long whoever freezes lets the disk stand still at most, also when this process is stopped or gone.
fn limits(course: &Course<'_>) -> StandstillLimits {
    let allowed = allowed(course, course.predicted_freeze_ms()).saturating_add(ABANDONED_SLACK);
    StandstillLimits {
        freeze_ms_max: course.options.convergence.freeze_ms_max,
        outage_ms_max: course.options.convergence.outage_ms_max,
        abandoned_ms: Some(u64::try_from(allowed.as_millis()).unwrap_or(u64::MAX)),
    }
}

fn out_of_order() -> Error {
    Error::new(ErrorKind::System, "a freeze comes once, and before the last passes")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::memory::MemoryDisk;
    use crate::sender::SendOptions;
    use crate::stats::Silent;

    const CLUSTER: u64 = 32 << 10;

    type Log = Arc<Mutex<Vec<String>>>;

    fn log(log: &Log, disk: &MemoryDisk, what: &str) {
        let (closed, opened) = disk.gate_moves();
        let gate = if closed > opened { " behind the gate" } else { "" };
        log.lock().unwrap().push(format!("{what}{gate}"));
    }

    /// Logs what it is asked for, and fails at one of these.
    struct Logged {
        log: Log,
        disk: MemoryDisk,
        fails: &'static str,
    }

    impl Logged {
        fn step(&self, what: &'static str) -> Result<()> {
            log(&self.log, &self.disk, what);
            if what == self.fails { Err(Error::new(ErrorKind::NotQuiet, what)) } else { Ok(()) }
        }
    }

    impl Quiesce for Logged {
        fn sync_file_system(&mut self) -> Result<bool> {
            Ok(true)
        }
        fn run_hook(&mut self) -> Result<()> {
            self.step("hook")
        }
        fn freeze_file_system(&mut self) -> Result<()> {
            self.step("freeze")
        }
        fn thaw(&mut self) -> Result<()> {
            self.step("thaw")
        }
    }

    /// Sweeps without sending; meanwhile the disk is written to again, so often.
    struct Sweeps<'a> {
        course: Course<'a>,
        log: Log,
        disk: MemoryDisk,
        writes: u32,
        fails_last: bool,
    }

    impl<'a> Sweeper<'a> for Sweeps<'a> {
        fn course(&mut self) -> &mut Course<'a> {
            &mut self.course
        }
        fn sweep_frozen(&mut self, last: bool) -> Result<()> {
            log(&self.log, &self.disk, if last { "last sweep" } else { "sweep" });
            while let Some(loan) = self.course.source.take_dirty(0, CLUSTER) {
                loan.acknowledge();
            }
            if self.writes > 0 {
                self.writes -= 1;
                self.disk.write(0, &[1; 512]);
            }
            if last && self.fails_last { Err(Error::new(ErrorKind::Write, "the pipe")) } else { Ok(()) }
        }
    }

    /// A standstill of a disk with something dirty: how it ended and in which steps.
    fn run(writes: u32, fails: &'static str, fails_last: bool) -> (Result<()>, Vec<String>) {
        run_with(SendOptions::default(), writes, fails, fails_last)
    }

    fn run_with(
        options: SendOptions,
        writes: u32,
        fails: &'static str,
        fails_last: bool,
    ) -> (Result<()>, Vec<String>) {
        use crate::source::Source;
        let disk = MemoryDisk::new(vec![0; 4 << 15]);
        let mut source = disk.clone();
        source.start_tracking().unwrap();
        disk.write(CLUSTER, &[1; 512]);
        let steps = Log::default();
        let mut quiesce = Logged { log: Arc::clone(&steps), disk: disk.clone(), fails };
        let course = Course::new(&mut source, &options, &Silent, false).unwrap();
        let mut sender = Sweeps { course, log: Arc::clone(&steps), disk: disk.clone(), writes, fails_last };
        let mut standstill = Standstill::new(&mut quiesce);
        let ended = standstill
            .freeze(&mut sender.course)
            .and_then(|()| standstill.last_passes(&mut sender))
            .and_then(|()| standstill.thaw(&mut sender.course));
        let ended = ended.map_err(|error| standstill.release(error));
        let (closed, opened) = disk.gate_moves();
        assert_eq!(closed, opened, "the gate is left closed");
        let steps = steps.lock().unwrap().clone();
        (ended, steps)
    }

    #[test]
    fn the_last_harvest_is_behind_the_gate_which_opens_before_the_thaw() {
        let (ended, steps) = run(1, "", false);
        ended.unwrap();
        assert_eq!(steps, ["hook", "freeze", "sweep", "sweep", "last sweep behind the gate", "thaw"]);
    }

    #[test]
    fn every_failure_thaws_once_with_the_gate_open() {
        let (ended, steps) = run(0, "hook", false);
        assert_eq!(
            (ended.unwrap_err().kind(), steps),
            (ErrorKind::NotQuiet, vec!["hook".into(), "thaw".into()])
        );
        let (ended, steps) = run(0, "freeze", false);
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::NotQuiet);
        assert_eq!(steps, ["hook", "freeze", "thaw"]);
        let (ended, steps) = run(0, "", true);
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Write);
        assert_eq!(steps, ["hook", "freeze", "sweep", "last sweep behind the gate", "thaw"]);
    }

    #[test]
    fn a_freeze_that_would_be_too_long_ends_before_anything_is_sent() {
        let mut options = SendOptions::default();
        options.convergence.freeze_ms_max = Some(0);
        let (ended, steps) = run_with(options, 0, "", false);
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::NotQuiet);
        assert_eq!(steps, ["hook", "freeze", "thaw"]);
    }

    #[test]
    fn a_disk_that_does_not_become_quiet_is_thawed() {
        let (ended, steps) = run(9, "", false);
        assert!(ended.unwrap_err().to_string().contains("(3 rounds)"));
        assert_eq!(steps, ["hook", "freeze", "sweep", "sweep", "sweep", "thaw"]);
    }

    #[test]
    fn a_crash_consistent_copy_has_its_last_harvest_behind_the_gate_however_much_is_written() {
        let options = SendOptions { is_crash_consistent: true, ..SendOptions::default() };
        let (ended, steps) = run_with(options, 3, "", false);
        ended.unwrap();
        assert_eq!(
            steps,
            ["hook", "freeze", "sweep", "sweep", "sweep", "last sweep behind the gate", "thaw"]
        );
    }

    #[test]
    fn a_thaw_that_fails_is_tried_twice_and_reported_with_what_came_before() {
        let (ended, steps) = run(0, "thaw", true);
        let error = ended.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotQuiet);
        assert!(error.to_string().contains("the pipe") && error.advice().is_some(), "{error}");
        assert_eq!(steps[steps.len() - 2..], ["thaw", "thaw"]);
    }
}
