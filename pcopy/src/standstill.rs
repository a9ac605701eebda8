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
/// How often a freeze that is too long is tried.
const ATTEMPTS_MAX: u32 = 3;
/// How long freezing a file system is thought to take as long as it was not seen, in milliseconds.
const FILE_SYSTEM_MS_ASSUMED: u64 = 20;
/// A freeze predicted longer than this, in milliseconds, for which no limit was given, is warned of.
const UNLIMITED_MS: u64 = 1000;
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
    /// When the freeze command had ended.
    hooked: Option<Instant>,
    gate_closed: Option<Instant>,
    has_hook: bool,
    attempts: u32,
}

/// How a freeze went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// Writers stand still.
    Frozen,
    /// It was, or would have been, too long; writers go on.
    TooLong,
}

impl<'a> Standstill<'a> {
    /// Nobody stands still yet.
    pub(crate) fn new(quiesce: &'a mut dyn Quiesce) -> Self {
        Self {
            quiesce: Some(quiesce),
            frozen: None,
            limit: None,
            begun: None,
            hooked: None,
            gate_closed: None,
            has_hook: false,
            attempts: 0,
        }
    }

    /// Lets the file system write what it still holds, before the freeze. Whether anything was mounted.
    pub(crate) fn sync_file_system(&mut self, course: &mut Course<'_>) -> Result<bool> {
        let Some(quiesce) = self.quiesce.as_mut() else { return Ok(false) };
        let mounted = quiesce.sync_file_system()?;
        if mounted {
            course.convergence.file_system_ms = course.convergence.file_system_ms.max(FILE_SYSTEM_MS_ASSUMED);
        }
        Ok(mounted)
    }

    /// The operator's command, then the file systems, then the limit. From its first step on, a thaw is due. A freeze that
    /// is, or would be, longer than allowed is undone, and tried again a few times; not if that ran the freeze command
    /// again, unless it is wanted.
    pub(crate) fn freeze(&mut self, course: &mut Course<'_>) -> Result<Attempt> {
        course.check()?;
        self.attempts += 1;
        let predicted = course.predicted_freeze_ms();
        let late = if predicted > course.convergence.limit_ms() {
            // Found before anybody stands still.
            Some(course.too_long(predicted, &left_to_send(course)))
        } else {
            if course.convergence.limit_ms() == u64::MAX && predicted > UNLIMITED_MS && self.attempts == 1 {
                course.warn(format!(
                    "no limit was given (--max-freeze), and the disk will stand still for about {predicted} ms"
                ));
            }
            self.freeze_now(course)?
        };
        let Some(late) = late else { return Ok(Attempt::Frozen) };
        let ran_hook = self.frozen.is_some() && self.has_hook;
        self.let_go()?;
        if self.attempts >= ATTEMPTS_MAX || (ran_hook && !course.options.retry_hooks) {
            return Err(late);
        }
        course.warn(format!("the freeze is tried again: {late}"));
        Ok(Attempt::TooLong)
    }

    /// Why it is to be undone, if it is.
    fn freeze_now(&mut self, course: &mut Course<'_>) -> Result<Option<Error>> {
        course.tell(&Event::Freezing);
        let begun = Instant::now();
        self.begun = Some(begun);
        let Some(quiesce) = self.quiesce.take() else { return Err(out_of_order()) };
        self.has_hook = quiesce.has_hook();
        quiesce.set_limits(limits(course));
        let frozen = self.frozen.insert(Frozen::begin(quiesce));
        frozen.run_hook()?;
        course.downtime.hook_ms = milliseconds(begun.elapsed());
        let hooked = Instant::now();
        self.hooked = Some(hooked);
        let froze = frozen.freeze_file_system();
        let file_system = hooked.elapsed();
        course.downtime.file_system_ms = milliseconds(file_system);
        let took_ms = whole_ms(file_system);
        let left_ms = time_left_ms(course, begun, hooked);
        match froze {
            // A freeze cannot be cut short from outside: whoever froze has thawed at its return. It was an unusual one
            // until it is seen again.
            Err(error) if left_ms == Some(0) => return Ok(Some(error)),
            froze => froze?,
        }
        course.tell(&Event::Frozen {
            hook_ms: course.downtime.hook_ms,
            file_system_ms: course.downtime.file_system_ms,
        });
        let rest = course.predicted_rest_ms();
        if let Some(left) = left_ms.filter(|&left| left == 0 || rest > left) {
            let message = format!(
                "the freeze would last longer than allowed: the freeze command took {:.0} ms, freezing the file system {took_ms} ms, and \
                 sending the {} bytes that are left would take {rest} ms, where {left} ms are left",
                course.downtime.hook_ms,
                course.source.dirty_data_bytes(),
            );
            return Ok(Some(Error::new(ErrorKind::NotQuiet, message).advise(
                "the disk runs again; allow a longer freeze (--max-freeze, --max-outage), or copy when less is written",
            )));
        }
        course.convergence.file_system_ms = took_ms.max(1);
        let allowed = left_ms.map_or_else(|| allowed(course, rest), Duration::from_millis);
        self.limit = Some(FreezeLimit::start(allowed, &course.exchange, &course.stop)?);
        Ok(None)
    }

    /// Writers go on, and may be stopped again.
    fn let_go(&mut self) -> Result<()> {
        if let Some(mut frozen) = self.frozen.take() {
            let thawed = frozen.thaw_for_another();
            self.quiesce = frozen.into_quiesce();
            thawed?;
        }
        Ok(())
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
        let frozen_for = self.hooked.map(|hooked| hooked.elapsed());
        let thawed = self.frozen.as_mut().map_or(Ok(()), Frozen::thaw);
        if let Some(closed) = self.gate_closed {
            course.downtime.gate_ms = milliseconds(closed.elapsed());
        }
        thawed?;
        self.frozen = None;
        // The thaw of the file system is a part of it that takes no time; that command's is not.
        course.downtime.freeze_ms = frozen_for.map_or(0.0, milliseconds);
        if let Some(begun) = self.begun {
            course.downtime.total_ms = milliseconds(begun.elapsed());
        }
        tell_overruns(course);
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

/// How long the frozen disk may wait for the receiver when there is no limit: what was foreseen, and a time for what was
/// not.
fn allowed(course: &Course<'_>, predicted_freeze_ms: u64) -> Duration {
    Duration::from_millis(predicted_freeze_ms).saturating_add(course.options.freeze_stall_timeout)
}

fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What of the limits is left, in milliseconds; `None` without any.
fn time_left_ms(course: &Course<'_>, begun: Instant, hooked: Instant) -> Option<u64> {
    let left =
        |limit: Option<u64>, since: Instant| limit.map(|ms| ms.saturating_sub(whole_ms(since.elapsed())));
    let limits = &course.convergence;
    let (freeze, outage) = (left(limits.freeze_ms_max, hooked), left(limits.outage_ms_max, begun));
    freeze.into_iter().chain(outage).min()
}

/// How much is left to send, in words.
fn left_to_send(course: &Course<'_>) -> String {
    format!("{} bytes are left to send", course.source.dirty_data_bytes())
}

/// Tells of limits that were not kept all the same: the copy was proven equal before that was known.
fn tell_overruns(course: &mut Course<'_>) {
    let (limits, downtime) = (course.convergence, course.downtime);
    let over = |limit: Option<u64>, took: f64| {
        limit.filter(|&limit| took > Duration::from_millis(limit).as_secs_f64() * 1e3)
    };
    if let Some(limit) = over(limits.freeze_ms_max, downtime.freeze_ms) {
        course.warn(format!(
            "the freeze lasted {:.0} ms, longer than allowed ({limit} ms)",
            downtime.freeze_ms
        ));
    }
    if let Some(limit) = over(limits.outage_ms_max, downtime.total_ms) {
        course.warn(format!(
            "the disk stood still for {:.0} ms, longer than allowed ({limit} ms)",
            downtime.total_ms
        ));
    }
}

/// How long whoever freezes lets the disk stand still at most, also when this process is stopped or gone.
fn limits(course: &Course<'_>) -> StandstillLimits {
    let allowed = allowed(course, course.predicted_freeze_ms()).saturating_add(ABANDONED_SLACK);
    StandstillLimits {
        freeze_ms_max: course.convergence.freeze_ms_max,
        outage_ms_max: course.convergence.outage_ms_max,
        abandoned_ms: Some(whole_ms(allowed)),
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
            .and_then(|_| standstill.last_passes(&mut sender))
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
    fn a_freeze_that_would_be_too_long_stops_nobody_and_runs_no_command() {
        let mut options = SendOptions::default();
        options.convergence.freeze_ms_max = Some(0);
        let disk = MemoryDisk::new(vec![0; 4 << 15]);
        let mut source = disk.clone();
        crate::source::Source::start_tracking(&mut source).unwrap();
        disk.write(CLUSTER, &[1; 512]);
        let steps = Log::default();
        let mut quiesce = Logged { log: Arc::clone(&steps), disk: disk.clone(), fails: "" };
        let mut course = Course::new(&mut source, &options, &Silent, false).unwrap();
        let mut standstill = Standstill::new(&mut quiesce);
        for _ in 1..ATTEMPTS_MAX {
            assert_eq!(standstill.freeze(&mut course).unwrap(), Attempt::TooLong);
        }
        let error = standstill.freeze(&mut course).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotQuiet);
        assert!(error.to_string().contains("bytes are left to send"), "{error}");
        drop(standstill);
        assert!(steps.lock().unwrap().is_empty(), "{steps:?}");
    }

    /// Its freezes take so long, one after the other; has a freeze command.
    struct Slow {
        log: Log,
        freezes: Vec<Duration>,
    }

    impl Quiesce for Slow {
        fn sync_file_system(&mut self) -> Result<bool> {
            Ok(true)
        }
        fn has_hook(&self) -> bool {
            true
        }
        fn run_hook(&mut self) -> Result<()> {
            self.log.lock().unwrap().push("hook".into());
            Ok(())
        }
        fn freeze_file_system(&mut self) -> Result<()> {
            std::thread::sleep(self.freezes.pop().unwrap_or_default());
            self.log.lock().unwrap().push("freeze".into());
            Ok(())
        }
        fn thaw(&mut self) -> Result<()> {
            self.log.lock().unwrap().push("thaw".into());
            Ok(())
        }
    }

    #[test]
    fn a_freeze_that_was_too_long_is_undone_and_its_command_runs_again_only_if_wanted() {
        for retry_hooks in [false, true] {
            let mut options = SendOptions { retry_hooks, ..Default::default() };
            options.convergence.freeze_ms_max = Some(1000);
            let disk = MemoryDisk::new(vec![0; 4 << 15]);
            let mut source = disk.clone();
            crate::source::Source::start_tracking(&mut source).unwrap();
            disk.write(CLUSTER, &[1; 512]);
            let steps = Log::default();
            let freezes = vec![Duration::ZERO, Duration::from_millis(1100)];
            let mut quiesce = Slow { log: Arc::clone(&steps), freezes };
            let mut course = Course::new(&mut source, &options, &Silent, false).unwrap();
            let mut standstill = Standstill::new(&mut quiesce);
            let first = standstill.freeze(&mut course);
            assert_eq!(*steps.lock().unwrap(), ["hook", "freeze", "thaw"]);
            if !retry_hooks {
                let error = first.unwrap_err().to_string();
                // What was seen, and no writes that nobody made.
                assert!(error.contains("freezing the file system 11"), "{error}");
                assert!(!error.contains("written"), "{error}");
                continue;
            }
            assert_eq!(first.unwrap(), Attempt::TooLong);
            assert_eq!(standstill.freeze(&mut course).unwrap(), Attempt::Frozen);
            standstill.thaw(&mut course).unwrap();
            assert_eq!(*steps.lock().unwrap(), ["hook", "freeze", "thaw", "hook", "freeze", "thaw"]);
            assert!(course.downtime.freeze_ms < 1000.0);
            let report = course.report(true, String::new(), 0);
            assert_eq!(report.warnings.len(), 1, "{:?}", report.warnings);
        }
    }

    #[test]
    fn a_long_freeze_without_a_limit_is_warned_of() {
        for (file_system_ms, expected) in [(500, 0), (2000, 1)] {
            let options = SendOptions::default();
            let disk = MemoryDisk::new(vec![0; 4 << 15]);
            let mut source = disk.clone();
            let steps = Log::default();
            let mut quiesce = Logged { log: Arc::clone(&steps), disk: disk.clone(), fails: "" };
            let mut course = Course::new(&mut source, &options, &Silent, false).unwrap();
            course.convergence.file_system_ms = file_system_ms;
            let mut standstill = Standstill::new(&mut quiesce);
            assert_eq!(standstill.freeze(&mut course).unwrap(), Attempt::Frozen);
            standstill.thaw(&mut course).unwrap();
            let warnings = course.report(true, String::new(), 0).warnings;
            assert_eq!(warnings.len(), expected, "{warnings:?}");
        }
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
