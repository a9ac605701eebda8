//! How a served disk is: one word with its cause, since when, and what to do about it.
//!
//! Every command that shows or meets a disk takes it from here, so that all of them say the same. A new condition is a
//! new [`Word`] with its exit code, and a line in [`Condition::of_status`] or [`Condition::of`].

use std::time::{Duration, SystemTime};

use ploop_core::device::loop_device;
use ploop_core::device::runtime::{Entry, State};
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::full_host;
use crate::serving::{self, Status};

/// The condition in one word, from good to bad: of several disks, the last counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Word {
    /// Served, and all is well.
    Running,
    /// Served, but without a block device: an umount was cut, or a program uses the exported file.
    Deviceless,
    /// About to be served, or a server is just succeeding another.
    Starting,
    /// Served, and nobody would succeed the server: its keeper is dead.
    Unguarded,
    /// An umount was refused half way: the device goes when its last user closes it.
    Detaching,
    /// Writes wait for space on the host; all else goes on.
    Waiting,
    /// The server gives no sign of life.
    Hanging,
    /// A sync has failed: writes fail, reads go on.
    Poisoned,
    /// Nobody serves it any more.
    Failed,
}

impl Word {
    /// As it is shown.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Deviceless => "deviceless",
            Self::Starting => "starting",
            Self::Unguarded => "unguarded",
            Self::Detaching => "detaching",
            Self::Waiting => "waiting",
            Self::Hanging => "hanging",
            Self::Poisoned => "poisoned",
            Self::Failed => "failed",
        }
    }

    /// What kind of failure it is to meet a disk like this; `None` when it is none.
    pub(crate) fn failure(self) -> Option<ErrorKind> {
        match self {
            Self::Running | Self::Deviceless => None,
            Self::Starting => Some(ErrorKind::Busy),
            Self::Unguarded => Some(ErrorKind::System),
            Self::Detaching => Some(ErrorKind::UnmountBusy),
            Self::Waiting => Some(ErrorKind::Allocate),
            Self::Poisoned => Some(ErrorKind::Sync),
            Self::Hanging | Self::Failed => Some(ErrorKind::Device),
        }
    }
}

/// How a disk is.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Condition {
    /// In one word.
    pub(crate) word: Word,
    /// Why, if it is not simply running.
    pub(crate) cause: Option<String>,
    /// Since when, in seconds since 1970, where that is known.
    pub(crate) since_unix_s: Option<u64>,
    /// What to do about it.
    pub(crate) advice: Option<String>,
}

impl Condition {
    fn plain(word: Word) -> Self {
        Self { word, cause: None, since_unix_s: None, advice: None }
    }

    /// How a disk is by its record and, where a server answers, by what that says of itself.
    pub(crate) fn of(entry: &Entry, state: &State) -> (Self, Option<Status>) {
        if state.failure.is_some() || (!state.is_running() && state.keeper.is_some()) {
            let failure = state.failure.as_ref();
            let cause = failure.map_or("its keeper and its server are gone", |failure| &failure.message);
            let advice = failure.and_then(|failure| failure.advice.clone());
            let advice = advice
                .or_else(|| Some("`ploop umount` clears what is left, then check the image".to_owned()));
            return (Self { cause: Some(cause.to_owned()), advice, ..Self::plain(Word::Failed) }, None);
        }
        // A server that hangs is not asked.
        if let Err(error) = serving::check_alive(state) {
            let cause = state.trouble.clone().or_else(|| Some(error.to_string()));
            let advice = error.advice().map(str::to_owned);
            return (Self { cause, advice, ..Self::plain(Word::Hanging) }, None);
        }
        match serving::status_of(entry) {
            Ok(status) => {
                let mut condition = Self::of_status(&status);
                if condition.word == Word::Running && serving::is_unguarded(state, &status) {
                    condition =
                        Self { cause: Some(serving::UNGUARDED.to_owned()), ..Self::plain(Word::Unguarded) };
                } else if condition.word == Word::Running {
                    condition = Self::of_device(state);
                }
                (condition, Some(status))
            }
            Err(error) => {
                let cause = Some(format!("its server does not answer: {error}"));
                let advice = Some("wait; if it stays so, its log in the run-time folder says why".to_owned());
                (Self { cause, advice, ..Self::plain(Word::Starting) }, None)
            }
        }
    }

    /// How a disk that answers and takes writes is by its device.
    fn of_device(state: &State) -> Self {
        let (word, cause, advice) = match &state.loop_device {
            None => (
                Word::Deviceless,
                "it is served without a block device",
                "umount ends it; an export or import at work does by itself",
            ),
            Some(device) if loop_device::is_going(device) => (
                Word::Detaching,
                "an umount found its device in use: it goes when its last user closes it",
                "end what has the device open, then umount again",
            ),
            Some(_) => return Self::plain(Word::Running),
        };
        Self { cause: Some(cause.to_owned()), advice: Some(advice.to_owned()), ..Self::plain(word) }
    }

    /// How a disk is by what its server says of itself.
    pub(crate) fn of_status(status: &Status) -> Self {
        if status.poisoned {
            return Self {
                cause: status.poison.clone().or_else(|| Some("a sync of its image has failed".to_owned())),
                advice: Some(
                    "unmount, see the kernel's messages about the host disk, then check image and file system".to_owned(),
                ),
                ..Self::plain(Word::Poisoned)
            };
        }
        if let Some(waiting) = &status.waiting {
            return Self {
                word: Word::Waiting,
                cause: Some(full_host::cause(waiting)),
                since_unix_s: Some(seconds_ago(waiting.elapsed_ms / 1000)),
                advice: Some(full_host::advice(waiting)),
            };
        }
        Self::plain(if status.ready { Word::Running } else { Word::Starting })
    }

    /// In one line: cause, since when, advice; empty when there is nothing to say.
    pub(crate) fn explanation(&self) -> String {
        let mut parts: Vec<String> = self.cause.iter().cloned().collect();
        parts.extend(self.since_unix_s.map(|since| format!("since {}", utc(since))));
        parts.extend(self.advice.iter().cloned());
        parts.join("; ")
    }

    /// The error that it is to meet a disk like this.
    pub(crate) fn error(&self, disk: &std::path::Path) -> Option<Error> {
        let cause = self.cause.as_deref().unwrap_or("it is not ready");
        let since = self.since_unix_s.map(|since| format!(" since {}", utc(since))).unwrap_or_default();
        let error =
            Error::new(self.word.failure()?, format!("the disk is {}{since}: {cause}", self.word.text()))
                .at_path(disk);
        Some(match &self.advice {
            Some(advice) => error.advise(advice.clone()),
            None => error,
        })
    }
}

/// The moment so many seconds ago, in seconds since 1970.
pub(crate) fn seconds_ago(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    now.as_secs().saturating_sub(seconds)
}

/// A moment as `YYYY-MM-DD HH:MM:SS UTC`.
pub(crate) fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    // Years begin in March here, so that the odd day is the last of one; 146097 days are 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) =
        (year + era * 400 + u64::from(month >= 10), if month < 10 { month + 3 } else { month - 9 });
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_people_read_them() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(951_868_800), "2000-03-01 00:00:00 UTC");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }

    #[test]
    fn every_condition_but_running_is_a_failure_to_meet() {
        for word in [
            Word::Starting,
            Word::Unguarded,
            Word::Detaching,
            Word::Waiting,
            Word::Hanging,
            Word::Poisoned,
            Word::Failed,
        ] {
            assert!(word.failure().is_some(), "{}", word.text());
            assert!(word > Word::Running);
        }
        for well in [Word::Running, Word::Deviceless] {
            assert_eq!(well.failure(), None);
        }
    }
}
