//! What a long operation shows on stderr: bars on a terminal, one JSON line per event with `--json`, nothing in a pipe.
//!
//! Events are JSON objects: those of a copy as `pcopy` defines them, those of any other operation as [`Meter`] makes
//! them. What happens in this process and what a server tells over its control socket look the same. An event or a
//! field that this version does not know is shown as JSON and otherwise passed over, so that commands and servers of
//! different versions work together.
//!
//! [`Meter`] is the [`ops::Progress`] of an operation, wherever it runs: it makes the events, keeps the rate limit and
//! tells the operation when to stop. [`Job`] is what a command has of it: the bars, and the signals that cancel.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pcopy::transport::Cancel;
use ploop_core::{Error, ErrorKind, Result, ops};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::copy_service::EVENTS_DROPPED;
use crate::output::{Output, complain, human_bytes};
use crate::signals;

/// Redraws per second: a bar is for eyes.
const REDRAWS_PER_SECOND: u8 = 8;
/// How often an operation tells how far it is.
const TELL_INTERVAL: Duration = Duration::from_millis(100);
/// The longest sleep of a rate limit before the operation is asked again whether it was cancelled.
const NAP_MAX: Duration = Duration::from_millis(50);

/// The events that bars show, with what they show of them.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Seen {
    DeltaStarted {
        delta: u32,
        deltas: u32,
    },
    PassStarted {
        pass: u32,
        #[serde(default)]
        kind: Option<String>,
        expected_bytes: u64,
    },
    Progress {
        done_bytes: u64,
        expected_bytes: u64,
        bytes_per_second: u64,
        dirty_bytes: u64,
        #[serde(default)]
        predicted_freeze_ms: Option<u64>,
    },
    PassEnded {
        data_bytes: u64,
        seconds: f64,
        dirty_bytes: u64,
    },
    Freezing,
    Warning {
        message: String,
    },
    Thawed {
        total_ms: f64,
    },
    PhaseStarted {
        phase: String,
        total_bytes: u64,
    },
    PhaseProgress {
        done_bytes: u64,
        total_bytes: u64,
        bytes_per_second: u64,
    },
    PhaseEnded {
        done_bytes: u64,
        seconds: f64,
    },
    #[serde(other)]
    Unknown,
}

/// Events that wait to be shown; more are dropped.
const QUEUE_EVENTS: usize = 256;
/// How long the last of them are waited for, when nobody reads them.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// The same when the command was told to end.
const SIGNALLED_DRAIN_MAX: Duration = Duration::from_millis(500);
/// How often it is looked whether they are shown.
const DRAIN_LOOK: Duration = Duration::from_millis(1);

/// Where events go. They are shown by a thread of their own: whoever does the work, or answers for it, never waits for a
/// terminal that is held or a pipe that nobody reads.
pub(crate) struct Progress {
    queue: Option<SyncSender<Value>>,
    /// Shows them.
    thread: Option<JoinHandle<()>>,
    dropped: AtomicU64,
    is_watched: bool,
    is_json: bool,
}

enum Mode {
    Silent,
    Json,
    Bars(Mutex<Bars>),
}

/// The bars of one copy: the present one is redrawn; what has ended stays above it as a line.
struct Bars {
    present: Option<ProgressBar>,
    /// What the present bar is about.
    name: String,
    /// Which frozen delta the next pass is about.
    delta: Option<String>,
}

impl Progress {
    /// As this run talks: see the module.
    pub(crate) fn new(output: &Output) -> Self {
        let mode = if output.is_json() {
            Mode::Json
        } else if io::stderr().is_terminal() && output.verbosity() >= 0 {
            Mode::Bars(Mutex::new(Bars { present: None, name: String::new(), delta: None }))
        } else {
            Mode::Silent
        };
        let (is_watched, is_json) = (matches!(mode, Mode::Bars(_)), matches!(mode, Mode::Json));
        let (queue, events) = sync_channel(QUEUE_EVENTS);
        let show = move || {
            while let Ok(event) = events.recv() {
                mode.show(&event);
            }
            mode.end();
        };
        // Without the thread nothing is shown, which is no reason not to work.
        let thread = if is_watched || is_json {
            std::thread::Builder::new().name("progress".into()).spawn(show).ok()
        } else {
            None
        };
        let queue = thread.is_some().then_some(queue);
        Self { queue, thread, dropped: AtomicU64::new(0), is_watched, is_json }
    }

    /// Whether a person watches.
    pub(crate) fn is_watched(&self) -> bool {
        self.is_watched
    }

    /// Tells programs the figures of a copy that has ended well.
    pub(crate) fn done(&self, figures: &Value) {
        if let (true, Value::Object(figures)) = (self.is_json, figures) {
            let mut event = serde_json::Map::from_iter([("event".to_owned(), Value::from("done"))]);
            event.extend(figures.clone());
            // By the server, and here.
            let by_server = figures.get(EVENTS_DROPPED).and_then(Value::as_u64).unwrap_or(0);
            let dropped = self.dropped.load(Ordering::Relaxed) + by_server;
            if dropped > 0 {
                event.insert(EVENTS_DROPPED.to_owned(), dropped.into());
            }
            self.last_event(&Value::from(event));
        }
    }

    /// Shows one event, unless those before it are not read.
    pub(crate) fn event(&self, event: &Value) {
        if let Some(queue) = &self.queue
            && queue.try_send(event.clone()).is_err()
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Shows one for which there is time: the work is done.
    fn last_event(&self, event: &Value) {
        let Some(queue) = &self.queue else { return };
        let begun = Instant::now();
        while queue.try_send(event.clone()).is_err() && begun.elapsed() < DRAIN_MAX && !signals::has_come() {
            std::thread::sleep(NAP_MAX);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.queue = None;
        let Some(thread) = self.thread.take() else { return };
        let begun = Instant::now();
        let is_over = || begun.elapsed() >= if signals::has_come() { SIGNALLED_DRAIN_MAX } else { DRAIN_MAX };
        while !thread.is_finished() && !is_over() {
            std::thread::sleep(DRAIN_LOOK);
        }
    }
}

impl Mode {
    fn show(&self, event: &Value) {
        match self {
            Self::Silent => {}
            Self::Json => complain(&format!("{event}\n")),
            Self::Bars(bars) => {
                if let Ok(seen) = Seen::deserialize(event) {
                    bars.lock().unwrap_or_else(PoisonError::into_inner).show(seen);
                }
            }
        }
    }

    fn end(&self) {
        if let Self::Bars(bars) = self
            && let Some(bar) = bars.lock().unwrap_or_else(PoisonError::into_inner).present.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Bars {
    fn show(&mut self, seen: Seen) {
        match seen {
            Seen::DeltaStarted { delta, deltas } => {
                self.delta = (delta < deltas).then(|| format!("delta {delta} of {deltas}"));
            }
            Seen::PassStarted { pass, kind, expected_bytes } => {
                if let Some(name) = self.delta.take() {
                    self.begin(name, expected_bytes);
                    return;
                }
                let kind = kind.map_or_else(String::new, |kind| format!(" {kind}"));
                self.begin(format!("pass {pass}{kind}"), expected_bytes);
            }
            Seen::Progress {
                done_bytes,
                expected_bytes,
                bytes_per_second,
                dirty_bytes,
                predicted_freeze_ms,
            } => {
                if let Some(bar) = &self.present {
                    bar.set_length(expected_bytes.max(done_bytes));
                    bar.set_position(done_bytes);
                    bar.set_message(moving(bytes_per_second, dirty_bytes, predicted_freeze_ms));
                }
            }
            Seen::PassEnded { data_bytes, seconds, dirty_bytes } => {
                let text = ended(data_bytes, seconds, dirty_bytes);
                self.end(&text);
            }
            Seen::Freezing => {
                self.begin("freezing".to_owned(), 1);
            }
            Seen::Warning { message } => complain(&format!("ploop: warning: {message}\n")),
            Seen::Thawed { total_ms } => {
                self.name = "thawed".to_owned();
                self.end(&format!("writers stood still for {total_ms:.1} ms"));
            }
            Seen::PhaseStarted { phase, total_bytes } => self.begin(phase, total_bytes),
            Seen::PhaseProgress { done_bytes, total_bytes, bytes_per_second } => {
                if let Some(bar) = &self.present {
                    bar.set_length(total_bytes.max(done_bytes));
                    bar.set_position(done_bytes);
                    let speed = human_bytes(bytes_per_second);
                    bar.set_message(format!("{}, {speed}/s", human_bytes(done_bytes)));
                }
            }
            Seen::PhaseEnded { done_bytes, seconds } => {
                let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
                self.end(&format!("{} in {took:.1?}", human_bytes(done_bytes)));
            }
            Seen::Unknown => {}
        }
    }

    /// Replaces the bar by a line that stays.
    fn end(&mut self, text: &str) {
        if let Some(bar) = self.present.take() {
            bar.finish_and_clear();
        }
        complain(&format!("{:14} {text}\n", self.name));
    }

    /// Shows a new bar in place of the one before.
    fn begin(&mut self, name: String, length: u64) {
        if let Some(bar) = self.present.take() {
            bar.finish_and_clear();
        }
        let target = ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(Some(length), target);
        if let Ok(style) = ProgressStyle::with_template("{prefix:14} [{bar:12}] {percent:>3}% {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name.clone());
        self.name = name;
        self.present = Some(bar);
    }
}

/// A long operation of this command, here or in a server.
pub(crate) struct Job {
    progress: Progress,
    cancel: Cancel,
    limit_bytes_per_second: Option<u64>,
}

impl Job {
    /// Begins to watch: SIGINT, SIGTERM and SIGHUP cancel from now on. Called before any thread is started.
    pub(crate) fn begin(output: &Output, limit_bytes_per_second: Option<u64>) -> Result<Self> {
        let cancel = Cancel::new()?;
        signals::cancel(&cancel)?;
        Ok(Self { progress: Progress::new(output), cancel, limit_bytes_per_second })
    }

    /// Without signals: they belong to the whole process.
    #[cfg(test)]
    pub(crate) fn for_test(output: &Output) -> Self {
        Self { progress: Progress::new(output), cancel: Cancel::new().unwrap(), limit_bytes_per_second: None }
    }

    /// For an operation in this process.
    pub(crate) fn meter(&self) -> Meter<'_> {
        let tell = |event: &Value| {
            self.progress.event(event);
            true
        };
        Meter::new(tell, self.cancel.clone(), self.limit_bytes_per_second)
    }

    /// Where its events go.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What ends it.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// How fast it may go through data.
    pub(crate) fn limit_bytes_per_second(&self) -> Option<u64> {
        self.limit_bytes_per_second
    }
}

/// The progress of one operation, as events; see the module.
pub(crate) struct Meter<'a> {
    /// Passes an event on; false when nobody is there any more.
    tell: Box<dyn Fn(&Value) -> bool + Send + Sync + 'a>,
    cancel: Cancel,
    limit_bytes_per_second: Option<u64>,
    phase: Mutex<Phase>,
}

/// The phase that runs.
struct Phase {
    name: String,
    total_bytes: u64,
    done_bytes: u64,
    since: Instant,
    told: Instant,
}

impl Phase {
    fn new(name: String, total_bytes: u64) -> Self {
        let now = Instant::now();
        Self { name, total_bytes, done_bytes: 0, since: now, told: now }
    }

    fn bytes_per_second(&self) -> u64 {
        let ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        u64::try_from(u128::from(self.done_bytes) * 1000 / u128::from(ms)).unwrap_or(u64::MAX)
    }
}

impl<'a> Meter<'a> {
    /// Tells events to `tell`, which answers whether anybody is still there; stops the operation when `cancel` is
    /// raised; goes no faster than the limit.
    pub(crate) fn new(
        tell: impl Fn(&Value) -> bool + Send + Sync + 'a,
        cancel: Cancel,
        limit_bytes_per_second: Option<u64>,
    ) -> Self {
        let phase = Mutex::new(Phase::new(String::new(), 0));
        Self { tell: Box::new(tell), cancel, limit_bytes_per_second, phase }
    }

    fn tell(&self, event: &Value) {
        if !(self.tell)(event) {
            self.cancel.cancel();
        }
    }

    fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "the operation was cancelled")
                .advise("nothing is left half done: the same command goes on, or begins again"));
        }
        Ok(())
    }

    /// When the bytes done so far are within the limit.
    fn due(&self, phase: &Phase) -> Option<Instant> {
        let limit = self.limit_bytes_per_second.filter(|&limit| limit > 0)?;
        let ms = u128::from(phase.done_bytes) * 1000 / u128::from(limit);
        phase.since.checked_add(Duration::from_millis(u64::try_from(ms).ok()?))
    }
}

impl ops::Progress for Meter<'_> {
    fn begin(&self, phase: &str, total_bytes: u64) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) =
            Phase::new(phase.to_owned(), total_bytes);
        self.tell(&json!({"event": "phase_started", "phase": phase, "total_bytes": total_bytes}));
    }

    fn advance(&self, bytes: u64) -> Result<()> {
        self.check()?;
        let (event, due) = {
            let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
            phase.done_bytes = phase.done_bytes.saturating_add(bytes);
            let event = (phase.told.elapsed() >= TELL_INTERVAL).then(|| {
                phase.told = Instant::now();
                json!({"event": "phase_progress", "phase": phase.name, "done_bytes": phase.done_bytes,
                    "total_bytes": phase.total_bytes, "bytes_per_second": phase.bytes_per_second()})
            });
            (event, self.due(&phase))
        };
        if let Some(event) = event {
            self.tell(&event);
        }
        while let Some(due) = due
            && let left = due.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            self.check()?;
            std::thread::sleep(left.min(NAP_MAX));
        }
        self.check()
    }

    fn end(&self) {
        let event = {
            let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
            json!({"event": "phase_ended", "phase": phase.name, "done_bytes": phase.done_bytes,
                "total_bytes": phase.total_bytes, "seconds": phase.since.elapsed().as_secs_f64()})
        };
        self.tell(&event);
    }
}

/// What is said beside a moving bar.
fn moving(bytes_per_second: u64, dirty_bytes: u64, predicted_freeze_ms: Option<u64>) -> String {
    let freeze = predicted_freeze_ms.map_or_else(String::new, |ms| format!(", freeze {ms} ms"));
    format!("{}/s, dirty {}{freeze}", human_bytes(bytes_per_second), human_bytes(dirty_bytes))
}

/// What is said beside the bar of a finished pass.
fn ended(data_bytes: u64, seconds: f64, dirty_bytes: u64) -> String {
    let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    format!("sent {} in {took:.1?}, dirty {}", human_bytes(data_bytes), human_bytes(dirty_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_are_understood() {
        let line = json!({"event": "progress", "pass": 1, "done_bytes": 1, "expected_bytes": 2, "data_bytes": 1,
            "bytes_per_second": 1 << 20, "dirty_bytes": 2048, "predicted_freeze_ms": 7});
        assert!(matches!(
            Seen::deserialize(&line).unwrap(),
            Seen::Progress { predicted_freeze_ms: Some(7), .. }
        ));
        let line = json!({"event": "of a later version", "x": [1]});
        assert!(matches!(Seen::deserialize(&line).unwrap(), Seen::Unknown));
        let stats = pcopy::stats::PassStats {
            pass: 1,
            kind: pcopy::stats::PassKind::First,
            data_bytes: 5,
            zero_bytes: 0,
            wire_bytes: 6,
            frames: 1,
            seconds: 1.0,
            settle_seconds: 0.0,
            dirty_bytes: 0,
        };
        let line = serde_json::to_value(pcopy::Event::PassEnded(stats)).unwrap();
        assert!(matches!(Seen::deserialize(&line).unwrap(), Seen::PassEnded { data_bytes: 5, .. }));
        let line = serde_json::to_value(pcopy::Event::Thawed(pcopy::stats::Downtime::default())).unwrap();
        assert!(matches!(Seen::deserialize(&line).unwrap(), Seen::Thawed { .. }));
    }

    #[test]
    fn a_meter_tells_limits_and_cancels() {
        use ops::Progress;
        let events = Mutex::new(Vec::new());
        let tell = |event: &Value| {
            assert!(!matches!(Seen::deserialize(event).unwrap(), Seen::Unknown), "{event}");
            events.lock().unwrap().push(event["event"].as_str().unwrap().to_owned());
            true
        };
        let cancel = Cancel::new().unwrap();
        let meter = Meter::new(tell, cancel.clone(), Some(1 << 20));
        meter.begin("move", 1 << 20);
        let start = Instant::now();
        for _ in 0..8 {
            meter.advance(32 << 10).unwrap();
        }
        assert!(start.elapsed() >= Duration::from_millis(240), "{:?}", start.elapsed());
        meter.end();
        let told = events.lock().unwrap().clone();
        assert_eq!((told[0].as_str(), told.last().unwrap().as_str()), ("phase_started", "phase_ended"));
        assert!(told.contains(&"phase_progress".to_owned()), "{told:?}");
        cancel.cancel();
        assert_eq!(meter.advance(1 << 30).unwrap_err().kind(), ErrorKind::Cancelled);
        // Nobody listens: the operation stops by itself.
        let meter = Meter::new(|_| false, Cancel::new().unwrap(), None);
        meter.begin("move", 1);
        assert!(meter.advance(1).is_err());
    }

    #[test]
    fn what_is_said_beside_a_bar() {
        assert_eq!(moving(3 << 20, 1 << 20, Some(12)), "3 MiB/s, dirty 1 MiB, freeze 12 ms");
        assert_eq!(moving(0, 0, None), "0 B/s, dirty 0 B");
        assert_eq!(ended(1 << 30, 1.25, 4096), "sent 1 GiB in 1.2s, dirty 4 KiB");
    }
}
