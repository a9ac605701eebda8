//! Brings a merge of the running top so close to its guest that the rest fits into one short hold.
//!
//! A pass copies what has changed since it was copied; what changes meanwhile is the next pass's. Passes that leave no more
//! than half of what the one before left go on as they are, also when the rest would do for the hold: the shorter that is,
//! the better. Each that leaves more, and too much for the hold, raises the pressure:
//!
//! | pressure | the guest |
//! |---|---|
//! | 0 | is free, and gets half of the time |
//! | 1 | is free |
//! | 2, 3, … | its writes are held for [`hold_max`](super::DeleteOptions::hold_max) at a time, and let go in between for 40 ms, 20 ms, … down to 2 ms |
//! | beyond | the same with longer and longer holds |
//!
//! That ends, whatever the guest does: its share of the time falls by a factor with each step, while the merge, with its
//! syncs, goes on throughout. A rate limit is kept while the guest is free. From pressure 2 on it is not: sleeping would lengthen the
//! time that the guest is slowed down, and the merge would not end.
//!
//! Locking: passes run in the caller's thread (as [`Progress`] demands), the gate is closed and opened meanwhile by a
//! thread of its own, which has ended before anything else happens. It gives up a hold at once when the work ends, or when writes in
//! flight do not end within the time of a hold.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::DeleteOptions;
use super::copier::{Copier, Swept};
use crate::device::{Changes, Disk, Frozen};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::Progress;

/// For so long writes are let go between two holds, at first and at least.
const OPEN_MAX: Duration = Duration::from_millis(40);
const OPEN_MIN: Duration = Duration::from_millis(2);
/// The first pressure at which the guest is held.
const PRESSURE_HOLDING: u32 = 2;
/// As little is always copied in one hold, in bytes: less does not make it shorter.
const REST_BYTES_MIN: u64 = 64 << 10;

/// Fails if anything is left to be copied; the gate is closed.
pub(super) fn check_clean(changes: &Changes) -> Result<()> {
    if changes.is_clean() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::System, "merge: the disk was changed while its writes were held")
        .advise("run the same command again"))
}

/// How the guest is slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    open: Duration,
    hold: Duration,
}

/// `None`: not at all.
fn pace(pressure: u32, hold: Duration) -> Option<Pace> {
    let step = pressure.checked_sub(PRESSURE_HOLDING)?;
    let (mut pace, mut left) = (Pace { open: OPEN_MAX, hold: hold.max(Duration::from_millis(1)) }, step);
    while left > 0 && pace.open > OPEN_MIN {
        pace.open = (pace.open / 2).max(OPEN_MIN);
        left -= 1;
    }
    for _ in 0..left {
        pace.hold = pace.hold.saturating_add(pace.hold / 2);
    }
    Some(pace)
}

/// Says that the work has ended, also when it panics.
#[derive(Default)]
struct Ending {
    has_ended: Mutex<bool>,
    changed: Condvar,
}

impl Ending {
    fn end(&self) {
        *self.has_ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for `time`, or until the work has ended; whether it has.
    fn wait(&self, time: Duration) -> bool {
        let has_ended = self.has_ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(has_ended, time, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

struct EndOnDrop<'a>(&'a Ending);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Holds the writes of a disk again and again; the longest time that they were held.
fn hold_in_slices(disk: &Arc<Disk>, pace: Pace, ending: &Ending) -> Duration {
    let mut longest = Duration::ZERO;
    while !ending.wait(pace.open) {
        let closed = Instant::now();
        // If somebody else holds them, or they do not end soon: after the next pause.
        if let Ok(frozen) = disk.freeze(pace.hold) {
            ending.wait(pace.hold.saturating_sub(closed.elapsed()));
            drop(frozen);
        }
        longest = longest.max(closed.elapsed());
    }
    longest
}

/// The way of one merge to its last hold.
pub(super) struct CatchingUp<'a> {
    disk: &'a Arc<Disk>,
    changes: &'a Changes,
    progress: &'a dyn Progress,
    options: &'a DeleteOptions,
    pressure: u32,
    passes: u32,
    longest: Duration,
    closed: Instant,
    /// What the last pass that found something did.
    swept: Option<Swept>,
}

impl<'a> CatchingUp<'a> {
    /// After the first pass over everything, which counts.
    pub(super) fn new(
        disk: &'a Arc<Disk>,
        changes: &'a Changes,
        progress: &'a dyn Progress,
        options: &'a DeleteOptions,
    ) -> Self {
        Self {
            disk,
            changes,
            progress,
            options,
            pressure: 0,
            passes: 1,
            longest: Duration::ZERO,
            closed: Instant::now(),
            swept: None,
        }
    }

    /// Passes so far.
    pub(super) fn passes(&self) -> u32 {
        self.passes
    }

    /// The longest hold, with the last one, if it ends now.
    pub(super) fn held(&self) -> Duration {
        self.longest.max(self.closed.elapsed())
    }

    /// Makes passes until what is left fits into one hold, which has begun when this returns; everything that was copied is
    /// durable by then. `freeze` closes the gate.
    pub(super) fn run(
        &mut self,
        copier: &mut Copier<'_>,
        freeze: impl Fn() -> Result<Frozen>,
    ) -> Result<Frozen> {
        let mut before = copier.bytes;
        loop {
            let rest = self.changes.bytes();
            // Free writes of the guest cost it less than held ones: as long as passes help, they go on.
            let is_worth_a_pass =
                self.pressure < PRESSURE_HOLDING && rest > REST_BYTES_MIN && rest <= before / 2;
            if self.fits(rest) && !is_worth_a_pass {
                let (disk, changes) = (self.disk, self.changes);
                let is_free = self.pressure < PRESSURE_HOLDING;
                self.slowed(|| {
                    copier.flush()?;
                    disk.flush()?;
                    if is_free {
                        // What came during these syncs, so that those in the hold have little to do.
                        copier.sweep(changes)?;
                        copier.flush()?;
                        disk.flush()?;
                    }
                    Ok(())
                })?;
                copier.check_cancelled()?;
                let closed = Instant::now();
                let frozen = freeze().map_err(not_quiet)?;
                self.closed = closed;
                if self.fits(self.changes.bytes()) {
                    return Ok(frozen);
                }
                drop(frozen);
                self.longest = self.longest.max(closed.elapsed());
                // Much came while little was copied and synced.
                self.pressure = self.pressure.saturating_add(1);
            } else if rest > before / 2 {
                self.pressure = self.pressure.saturating_add(1);
            }
            before = rest;
            copier.pace.is_fair = self.pressure == 0;
            copier.is_limited = self.pressure < PRESSURE_HOLDING;
            self.progress.begin("merge what was written meanwhile", rest);
            let changes = self.changes;
            let swept = self.slowed(|| copier.sweep(changes))?;
            self.progress.end();
            self.passes = self.passes.saturating_add(1);
            if swept.bytes > 0 {
                self.swept = Some(swept);
            }
        }
    }

    /// Whether so many bytes can be copied in one hold, as fast as it went last.
    fn fits(&self, rest: u64) -> bool {
        // Longer holds come with more pressure, up to taking whatever is left.
        let hold = pace(self.pressure, self.options.hold_max).map_or(self.options.hold_max, |pace| pace.hold);
        let stretch = hold.as_secs_f64() / self.options.hold_max.as_secs_f64().max(1e-3);
        if rest <= REST_BYTES_MIN {
            return true;
        }
        let is_fast = self.swept.is_none_or(|swept| {
            let seconds = rest as f64 * swept.took.as_secs_f64() / (swept.bytes.max(1)) as f64;
            seconds <= hold.as_secs_f64()
        });
        is_fast && rest as f64 <= self.options.rest_bytes_max as f64 * stretch.max(1.0)
    }

    /// Does `work` while the guest is slowed down as the pressure demands.
    fn slowed<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(pace) = pace(self.pressure, self.options.hold_max) else { return work() };
        let (disk, ending) = (self.disk, Ending::default());
        let (result, longest) = std::thread::scope(|scope| {
            let holding = std::thread::Builder::new()
                .name("ploop-hold".into())
                .spawn_scoped(scope, || hold_in_slices(disk, pace, &ending))
                .map_err(|cause| Error::io(ErrorKind::System, "merge: start a thread", cause));
            let end = EndOnDrop(&ending);
            let result = holding.and_then(|holding| Ok((work()?, holding)));
            drop(end);
            match result {
                Ok((done, holding)) => (Ok(done), holding.join().unwrap_or_default()),
                Err(error) => (Err(error), Duration::ZERO),
            }
        });
        self.longest = self.longest.max(longest);
        result
    }
}

/// The gate could not be closed.
pub(super) fn not_quiet(error: Error) -> Error {
    if error.kind() != ErrorKind::Busy {
        return error;
    }
    Error::new(ErrorKind::NotQuiet, format!("merge: the writes of the disk cannot be held: {error}"))
        .advise("the host disk may be stuck, or another command holds them; run the same command again later")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_takes_time_from_the_guest_without_end() {
        let hold = Duration::from_millis(20);
        assert_eq!((pace(0, hold), pace(1, hold)), (None, None));
        let share = |pressure: u32| {
            let pace = pace(pressure, hold).unwrap();
            pace.open.as_secs_f64() / (pace.open + pace.hold).as_secs_f64()
        };
        assert_eq!(pace(2, hold), Some(Pace { open: OPEN_MAX, hold }));
        assert_eq!(pace(7, hold), Some(Pace { open: OPEN_MIN, hold }));
        assert!(pace(8, hold).unwrap().hold > hold);
        for pressure in 2..60 {
            assert!(share(pressure + 1) < share(pressure) * 0.9);
        }
        assert!(pace(u32::MAX / 1_000_000, Duration::ZERO).unwrap().hold > Duration::ZERO);
    }

    #[test]
    fn a_gate_that_cannot_be_closed_is_told_from_other_failures() {
        assert_eq!(not_quiet(Error::new(ErrorKind::Busy, "held")).kind(), ErrorKind::NotQuiet);
        assert_eq!(not_quiet(Error::new(ErrorKind::Sync, "failed")).kind(), ErrorKind::Sync);
    }
}
