//! What a running copy shows on stderr: bars on a terminal, one JSON line per event with `--json`, nothing in a pipe.
//!
//! Events come as the JSON objects that `pcopy` defines: those of a copy in this process and those that a server
//! sends over its control socket look the same. An event or a field that this version does not know is shown as JSON
//! and otherwise passed over, so that commands and servers of different versions work together.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;

use crate::output::{Output, complain, human_bytes};

/// Redraws per second: a bar is for eyes.
const REDRAWS_PER_SECOND: u8 = 8;

/// The events that bars show, with what they show of them.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Seen {
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
    Thawed {
        total_ms: f64,
    },
    #[serde(other)]
    Unknown,
}

/// Where events go.
pub(crate) struct Progress {
    mode: Mode,
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
}

impl Progress {
    /// As this run talks: see the module.
    pub(crate) fn new(output: &Output) -> Self {
        let mode = if output.is_json() {
            Mode::Json
        } else if io::stderr().is_terminal() && output.verbosity() >= 0 {
            Mode::Bars(Mutex::new(Bars { present: None, name: String::new() }))
        } else {
            Mode::Silent
        };
        Self { mode }
    }

    /// Whether a person watches.
    pub(crate) fn is_watched(&self) -> bool {
        matches!(self.mode, Mode::Bars(_))
    }

    /// Tells programs the figures of a copy that has ended well.
    pub(crate) fn done(&self, figures: &Value) {
        if let (Mode::Json, Value::Object(figures)) = (&self.mode, figures) {
            let mut event = serde_json::Map::from_iter([("event".to_owned(), Value::from("done"))]);
            event.extend(figures.clone());
            complain(&format!("{}\n", Value::from(event)));
        }
    }

    /// Shows one event.
    pub(crate) fn event(&self, event: &Value) {
        match &self.mode {
            Mode::Silent => {}
            Mode::Json => complain(&format!("{event}\n")),
            Mode::Bars(bars) => {
                if let Ok(seen) = Seen::deserialize(event) {
                    bars.lock().unwrap_or_else(PoisonError::into_inner).show(seen);
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Mode::Bars(bars) = &self.mode
            && let Some(bar) = bars.lock().unwrap_or_else(PoisonError::into_inner).present.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Bars {
    fn show(&mut self, seen: Seen) {
        match seen {
            Seen::PassStarted { pass, kind, expected_bytes } => {
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
            Seen::Thawed { total_ms } => {
                self.name = "thawed".to_owned();
                self.end(&format!("writers stood still for {total_ms:.1} ms"));
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
    fn what_is_said_beside_a_bar() {
        assert_eq!(moving(3 << 20, 1 << 20, Some(12)), "3 MiB/s, dirty 1 MiB, freeze 12 ms");
        assert_eq!(moving(0, 0, None), "0 B/s, dirty 0 B");
        assert_eq!(ended(1 << 30, 1.25, 4096), "sent 1 GiB in 1.2s, dirty 4 KiB");
    }
}
