//! How a copy to a receiver that this command has started ends: which exit code, whose words, and what is known of the
//! copy. One place for all forms, as each failure has to say it.
//!
//! The code is the receiver's if it failed for a reason of its own, else 6 or 7: it is gone, silent, or nothing moves. A
//! command that ended before it answered anything was no receiver yet: 12.

use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pcopy::is_told_by_receiver;
use pcopy::peer::{Peer, PeerEnd};
use ploop_core::{Error, ErrorKind, Result};
use serde_json::Value;

/// What a failed copy ends with, when that is known.
pub(crate) const NOTHING_THERE: &str = "the disk runs here; nothing stands over there under the final name";
/// The same, when the disk could not be thawed or its server is gone.
const NOTHING_THERE_ONLY: &str = "nothing stands over there under the final name";
/// What it ends with when the copy may be complete.
const MAY_BE_THERE: &str =
    "whether the copy stands over there is not known here: it is complete if the file has its final name";

/// The receiver's command of one copy, and what the events of the copy have told so far.
pub(crate) struct Ends {
    peer: Option<Peer>,
    /// As typed; none for a local copy.
    command: Option<String>,
    seen: Mutex<Seen>,
    /// Advice is for people: the line that says what is known stands by itself.
    for_people: bool,
}

#[derive(Clone, Copy, Default)]
struct Seen {
    /// The sender began; two-way, the receiver had answered.
    started: bool,
    /// The end game began: from here on only the sender knows what it has sent.
    sealed: bool,
    /// What the sender said of its failure: the writers go on; the copy may be in place.
    failed: Option<(bool, bool)>,
}

impl Ends {
    /// `peer`: what was started, if anything was.
    pub(crate) fn new(peer: Option<Peer>, command: Option<String>, for_people: bool) -> Self {
        Self { peer, command, seen: Mutex::new(Seen::default()), for_people }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an event of the copy.
    pub(crate) fn see(&self, event: &Value) {
        match event["event"].as_str() {
            Some("started") => {
                if let Some(peer) = &self.peer {
                    peer.answered();
                }
                self.seen().started = true;
            }
            Some("sealed") => self.seen().sealed = true,
            Some("failed") => {
                let is = |field: &str, unknown| event[field].as_bool().unwrap_or(unknown);
                self.seen().failed = Some((is("runs", false), is("may_be_in_place", true)));
            }
            _ => {}
        }
    }

    /// Waits for the receiver's command, or ends it after a failure, and says what became of the copy.
    pub(crate) fn finish(self, sent: Result<Value>) -> Result<Value> {
        let seen = *self.seen();
        let error = match (sent, self.peer) {
            // It has said that the copy is in place; nothing that follows can make that undone.
            (Ok(figures), Some(peer)) => {
                let _ = peer.finish();
                return Ok(figures);
            }
            (Ok(figures), None) => return Ok(figures),
            (Err(error), Some(peer)) => {
                let command = self.command.as_deref().unwrap_or("ploop copy -d");
                match peer.give_up() {
                    Ok(end) => explain(error, command, &end, seen.started),
                    Err(_) => error,
                }
            }
            (Err(error), None) => error,
        };
        Err(known(error, seen, if self.for_people { "\n  " } else { "; " }))
    }
}

/// The failure with what the end of the receiver's command says of it.
fn explain(error: Error, command: &str, end: &PeerEnd, answered: bool) -> Error {
    let silent = matches!(error.kind(), ErrorKind::Read | ErrorKind::Write) && !is_told_by_receiver(&error);
    let words = if end.last_words.is_empty() { String::new() } else { format!(": {}", end.last_words) };
    if end.is_interrupted {
        return Error::new(ErrorKind::Cancelled, "the receiver's command was interrupted at the terminal")
            .caused_by(error);
    }
    if !silent {
        return error;
    }
    let failed = |kind: ErrorKind, status: ExitStatus| {
        Error::new(kind, format!("the receiver's command \"{command}\" failed ({status}){words}"))
    };
    let advice = error.advice().unwrap_or("start the copy again").to_owned();
    match end.status {
        Some(status) if !status.success() && !answered => {
            failed(ErrorKind::System, status).advise(advice_before_answer(command)).caused_by(error)
        }
        // Its own reason, if it has one: what the connection ends with (ssh: 255) is none.
        Some(status) if !status.success() => {
            let own = status.code().and_then(|code| u8::try_from(code).ok());
            let own = own.and_then(ErrorKind::from_exit_code).unwrap_or(error.kind());
            if own == error.kind() && words.is_empty() && status.code().is_some() {
                return error;
            }
            failed(own, status).advise(advice).caused_by(error)
        }
        _ if !words.is_empty() => {
            Error::new(error.kind(), format!("{error}; the receiver's command said last{words}"))
                .advise(advice)
        }
        _ => error,
    }
}

fn advice_before_answer(command: &str) -> &'static str {
    let program = command.split_whitespace().next().unwrap_or_default();
    if program == "ssh" || program.ends_with("/ssh") {
        "run it by hand; where there is no terminal ssh must not need to ask (a known host, a key): \
         ssh -o BatchMode=yes shows what it would ask"
    } else {
        "see its message, and run it by hand"
    }
}

/// The failure with the line that says what is known of disk and copy.
fn known(error: Error, seen: Seen, separator: &str) -> Error {
    let (line, error) = match seen.failed {
        // Before the sender began, there is nothing to be said of a copy, unless its server is gone.
        None if !seen.started => return error,
        // The server died: what it had told by then decides.
        None if seen.sealed => (
            MAY_BE_THERE,
            Error::new(ErrorKind::OutcomeUnknown, "the server ended while the copy was being put in place")
                .caused_by(error),
        ),
        None => (NOTHING_THERE_ONLY, error),
        Some((_, true)) => (MAY_BE_THERE, error),
        Some((true, false)) => (NOTHING_THERE, error),
        Some((false, false)) => (NOTHING_THERE_ONLY, error),
    };
    let advice = error.advice().unwrap_or("see to what the message names, and start the copy again");
    let advice = format!("{advice}{separator}{line}");
    error.advise(advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::process::ExitStatusExt;

    fn end(status: Option<i32>, words: &str) -> PeerEnd {
        PeerEnd {
            status: status.map(ExitStatus::from_raw),
            last_words: words.to_owned(),
            is_interrupted: false,
        }
    }

    #[test]
    fn the_code_is_the_receivers_or_that_of_a_broken_line() {
        let code = |kind, status, answered| {
            explain(Error::new(kind, "x"), "ssh h ploop", &end(status, "w"), answered).kind()
        };
        let exit = |code: i32| Some(code << 8);
        assert_eq!(code(ErrorKind::Write, exit(20), true), ErrorKind::Allocate);
        assert_eq!(code(ErrorKind::Read, exit(13), true), ErrorKind::Protocol);
        // The connection of ssh broke; the receiver was killed; it went on living.
        assert_eq!(code(ErrorKind::Read, exit(255), true), ErrorKind::Read);
        assert_eq!(code(ErrorKind::Write, Some(9), true), ErrorKind::Write);
        assert_eq!(code(ErrorKind::Read, None, true), ErrorKind::Read);
        // Nobody over there ever was a receiver.
        assert_eq!(code(ErrorKind::Read, exit(255), false), ErrorKind::System);
        // What the receiver said, and what happened here, stays.
        for kind in [ErrorKind::Allocate, ErrorKind::NotQuiet, ErrorKind::OutcomeUnknown] {
            assert_eq!(code(kind, exit(6), true), kind);
        }
        let killed = explain(Error::new(ErrorKind::Read, "x"), "c", &end(Some(9), "the words"), true);
        assert!(
            killed.to_string().contains("the words") && killed.to_string().contains("signal"),
            "{killed}"
        );
    }

    #[test]
    fn the_last_line_is_what_is_known() {
        let last = |events: &[Value]| {
            let ends = Ends::new(None, None, true);
            events.iter().for_each(|event| ends.see(event));
            let error = ends.finish(Err(Error::new(ErrorKind::Read, "x").advise("a"))).unwrap_err();
            (error.kind(), error.advice().unwrap().lines().last().unwrap().trim().to_owned())
        };
        let failed = |runs: bool, may: bool| json!({"event": "failed", "runs": runs, "may_be_in_place": may});
        let started = json!({"event": "started", "two_way": true});
        assert_eq!(last(&[failed(true, false)]), (ErrorKind::Read, NOTHING_THERE.to_owned()));
        assert_eq!(last(&[failed(false, false)]).1, NOTHING_THERE_ONLY);
        assert_eq!(last(&[started.clone(), failed(true, true)]).1, MAY_BE_THERE);
        // The server is gone.
        assert_eq!(last(std::slice::from_ref(&started)).1, NOTHING_THERE_ONLY);
        let sealed = [started, json!({"event": "sealed"})];
        assert_eq!(last(&sealed), (ErrorKind::OutcomeUnknown, MAY_BE_THERE.to_owned()));
        assert_eq!(last(&[]).1, "a");
    }
}
