//! What people and programs read: reports on stdout, diagnosis on stderr.
//!
//! A report is printed for people, or with `--json` as one JSON object on one line. A failure is one line
//! `ploop: PATH: message (where)`, its causes, and what to do about it; with `--json` one JSON line on stderr.

use std::error::Error as _;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use ploop_core::error::one_line;
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::exit::Failure;
use crate::signals;

/// The level from which warnings are told.
const WARNINGS_FROM: i32 = 0;
/// The level from which what is being done is told.
const NOTES_FROM: i32 = 4;
/// The level from which messages carry a time stamp.
const TIME_FROM: i32 = 4;
/// The level below which even errors are silent.
const ERRORS_FROM: i32 = -1;

/// A result that can be shown: to programs by `Serialize`, to people by [`write_human`](Self::write_human).
pub(crate) trait Report: Serialize {
    /// Writes the text for people, with line ends.
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()>;
}

/// How this run talks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    verbosity: i32,
}

/// A failure as JSON.
#[derive(Serialize)]
struct ErrorLine<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    kind: String,
    exit_code: u8,
    message: String,
    path: Option<String>,
    offset: Option<u64>,
    cluster: Option<u64>,
    causes: Vec<String>,
    advice: Option<&'a str>,
}

impl Output {
    /// Talks in JSON or text, as much as `verbosity` says.
    pub(crate) fn new(json: bool, verbosity: i32) -> Self {
        Self { json, verbosity }
    }

    /// Whether programs read this.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// The verbosity level; see the help of `-v`.
    pub(crate) fn verbosity(&self) -> i32 {
        self.verbosity
    }

    /// Prints a result on stdout.
    pub(crate) fn report(&self, report: &impl Report) -> Result<(), Failure> {
        let mut text = Vec::new();
        if self.json {
            serde_json::to_writer(&mut text, report).map_err(|error| {
                Error::new(ErrorKind::System, "print the result as JSON").caused_by(error)
            })?;
            text.push(b'\n');
        } else {
            report.write_human(&mut text).map_err(printing)?;
        }
        print(&text).map_err(printing)
    }

    /// Tells what is being done, at `-v` and above.
    pub(crate) fn note(&self, text: &str) {
        if self.verbosity >= NOTES_FROM && !self.json {
            complain(&format!("{}ploop: {text}\n", self.stamp()));
        }
    }

    /// Warns: the command goes on.
    pub(crate) fn warn(&self, text: &str) {
        if self.verbosity >= WARNINGS_FROM {
            if self.json {
                complain(&format!("{}\n", serde_json::json!({ "warning": text })));
            } else {
                complain(&format!("{}ploop: warning: {}\n", self.stamp(), tame(text)));
            }
        }
    }

    /// Tells a failure on stderr.
    pub(crate) fn error(&self, error: &Error) {
        if self.verbosity >= ERRORS_FROM {
            complain(&self.error_text(error));
        }
    }

    fn error_text(&self, error: &Error) -> String {
        if self.json {
            let context = error.context();
            let line = ErrorLine {
                error: ErrorFields {
                    kind: format!("{:?}", error.kind()),
                    exit_code: error.kind().exit_code(),
                    message: error.to_string(),
                    path: context.path.as_ref().map(|path| path.display().to_string()),
                    offset: context.offset,
                    cluster: context.cluster,
                    causes: causes(error),
                    advice: error.advice(),
                },
            };
            if let Ok(text) = serde_json::to_string(&line) {
                return text + "\n";
            }
        }
        let stamp = self.stamp();
        let mut text = format!("{stamp}ploop: {}\n", tame(&error.to_string()));
        for cause in causes(error) {
            text += &format!("{stamp}  cause: {}\n", tame(&cause));
        }
        if let Some(advice) = error.advice() {
            text += &format!("{stamp}  advice: {}\n", tame(advice));
        }
        text
    }

    fn stamp(&self) -> String {
        if self.verbosity < TIME_FROM {
            return String::new();
        }
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let day_seconds = since.as_secs() % 86_400;
        let (hours, minutes, seconds) = (day_seconds / 3600, day_seconds / 60 % 60, day_seconds % 60);
        format!("{hours:02}:{minutes:02}:{seconds:02}.{:03} UTC ", since.subsec_millis())
    }
}

/// A text that may quote others: its lines without what moves a cursor.
fn tame(text: &str) -> String {
    text.split('\n').map(one_line).collect::<Vec<_>>().join("\n")
}

/// The causes of an error from near to far. A cause that repeats the one before is left out.
fn causes(error: &Error) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if texts.last() != Some(&text) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts
}

/// A failed print: a closed pipe ends the command quietly.
fn printing(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Failure::OutputClosed;
    }
    Failure::Error(Error::io(ErrorKind::Write, "print on stdout", error))
}

fn print(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Prints text on stdout.
pub(crate) fn print_text(text: &str) -> io::Result<()> {
    print(text.as_bytes())
}

/// Prints bytes on stdout as a command's whole result.
pub(crate) fn print_bytes(text: &[u8]) -> Result<(), Failure> {
    print(text).map_err(printing)
}

/// So many bytes a pipe takes at once when it takes any (`PIPE_BUF`).
const PIECE_BYTES: usize = 4096;
/// How often stderr that takes nothing is looked at.
const STDERR_LOOK: Duration = Duration::from_millis(100);
/// How long a command that was told to end waits for somebody to read its last words.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// Prints text on stderr. There is nowhere to tell a failure of that, so it is dropped. Once the command was told to end,
/// a terminal that is held or a pipe that nobody reads is not waited for.
pub(crate) fn complain(text: &str) {
    let mut held = Duration::ZERO;
    for piece in text.as_bytes().chunks(PIECE_BYTES) {
        while !takes_bytes() {
            if signals::has_come() {
                held += STDERR_LOOK;
                if held >= LAST_WORDS_MAX {
                    return;
                }
            }
        }
        let _nowhere_to_tell = io::stderr().write_all(piece);
    }
}

/// Whether stderr takes a piece without a wait; looks for a while.
fn takes_bytes() -> bool {
    let stderr = io::stderr();
    let mut descriptors = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let look = PollTimeout::try_from(STDERR_LOOK).unwrap_or(PollTimeout::ZERO);
    // What cannot be asked is written to as ever.
    !matches!(nix::poll::poll(&mut descriptors, look), Ok(0) | Err(nix::errno::Errno::EINTR))
}

/// Bytes for people: a number below 10 with one decimal, a binary unit.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut unit_bytes: u64 = 1024;
    while unit + 1 < UNITS.len() && bytes / unit_bytes >= 1024 {
        unit += 1;
        unit_bytes <<= 10;
    }
    let tenths = u128::from(bytes) * 10 / u128::from(unit_bytes);
    if tenths < 100 && !tenths.is_multiple_of(10) {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    } else {
        format!("{} {}", tenths / 10, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Error {
        Error::io(ErrorKind::Open, "open the image", io::Error::from_raw_os_error(libc::ENOENT))
            .at_path("/a/disk.hds")
            .at_offset(64)
            .advise("give an existing file")
    }

    #[test]
    fn a_failure_is_a_line_its_causes_and_advice() {
        let text = Output::new(false, 3).error_text(&failed());
        assert_eq!(
            text,
            "ploop: /a/disk.hds: open the image (file byte 64)\n  cause: No such file or directory (os error 2)\n  \
             advice: give an existing file\n"
        );
    }

    #[test]
    fn a_failure_in_json_is_one_line_with_its_code() {
        let text = Output::new(true, 3).error_text(&failed());
        assert_eq!(text.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["error"]["exit_code"], 4);
        assert_eq!(value["error"]["offset"], 64);
        assert_eq!(value["error"]["advice"], "give an existing file");
        assert_eq!(value["error"]["causes"][0], "No such file or directory (os error 2)");
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1024), "1 KiB");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(20 << 20), "20 MiB");
        assert_eq!(human_bytes(u64::MAX), "15 EiB");
    }
}
