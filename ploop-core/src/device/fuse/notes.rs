//! What a keeper writes into the record of its disk: for commands and people, never for the take-over itself (K4).
//!
//! A thread does it, as soon as it can: while the run-time folder is full or read-only, or somebody holds its lock, it tries
//! again, and everything else goes on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device::runtime::{Entry, Failure, ProcessMark, State};
use crate::error::{Error, ErrorKind, Result};

/// How often a record that cannot be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What is to be in the record.
#[derive(Clone, Debug, Default)]
struct Facts {
    keeper: Option<ProcessMark>,
    server: Option<ProcessMark>,
    takeovers: u32,
    failure: Option<Failure>,
    trouble: Option<String>,
}

impl Facts {
    fn apply(&self, state: &mut State) {
        state.keeper = self.keeper.or(state.keeper);
        state.server = self.server.or(state.server);
        state.takeovers = state.takeovers.max(self.takeovers);
        if state.failure.is_none() {
            state.failure.clone_from(&self.failure);
        }
        state.trouble.clone_from(&self.trouble);
    }
}

#[derive(Debug, Default)]
struct Desk {
    facts: Facts,
    /// Counts changes; what is written is the number at its beginning.
    changes: u64,
    written: u64,
    ended: bool,
}

/// Where a keeper notes what is to be written.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<(Mutex<Desk>, Condvar)>);

impl Notes {
    /// Writes them into the record of `entry` from now on, in a thread. Without a thread nothing is written, and nothing
    /// fails.
    pub fn write_to(&self, entry: Entry) {
        // Where the count of an earlier keeper goes on.
        self.lock().facts.takeovers += entry.state().map_or(0, |state| state.takeovers);
        let desk = self.clone();
        let _no_notes =
            std::thread::Builder::new().name("notes".into()).spawn(move || desk.write_all(&entry));
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut Facts)) {
        let mut desk = self.lock();
        change(&mut desk.facts);
        desk.changes += 1;
        drop(desk);
        self.0.1.notify_all();
    }

    /// This process is the keeper.
    pub fn keeper(&self, process: Option<ProcessMark>) {
        self.note(|facts| facts.keeper = process);
    }

    /// A server was started.
    pub fn server(&self, process: Option<ProcessMark>) {
        self.note(|facts| facts.server = process);
    }

    /// A server succeeds another.
    pub fn takeover(&self) {
        self.note(|facts| facts.takeovers = facts.takeovers.saturating_add(1));
    }

    /// Nobody serves the disk any more, and why.
    pub fn failure(&self, error: &Error) {
        self.note(|facts| {
            facts.failure.get_or_insert_with(|| Failure::of(error));
        });
    }

    /// What is wrong at the moment; `None` when nothing is.
    pub fn trouble(&self, trouble: Option<String>) {
        if self.lock().facts.trouble != trouble {
            self.note(|facts| facts.trouble = trouble);
        }
    }

    /// Ends the notes; waits until all are written, at most `time_max`.
    pub fn end(&self, time_max: Duration) -> Result<()> {
        let deadline = Instant::now() + time_max;
        let mut desk = self.lock();
        desk.ended = true;
        self.0.1.notify_all();
        while desk.written < desk.changes {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Write, "write the record: the run-time folder takes none"));
            }
            desk =
                self.0.1.wait_timeout(desk, left).map_or_else(|error| error.into_inner().0, |woken| woken.0);
        }
        Ok(())
    }

    fn write_all(&self, entry: &Entry) {
        let mut desk = self.lock();
        loop {
            if desk.written == desk.changes {
                if desk.ended {
                    return;
                }
                desk = self.0.1.wait(desk).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (facts, number) = (desk.facts.clone(), desk.changes);
            drop(desk);
            let done = entry.update(|state| facts.apply(state));
            desk = self.lock();
            match done {
                Ok(_) => {
                    desk.written = number;
                    self.0.1.notify_all();
                }
                Err(_) if !entry.path().exists() => return,
                Err(_) => {
                    desk = self
                        .0
                        .1
                        .wait_timeout(desk, RETRY)
                        .map_or_else(|error| error.into_inner().0, |woken| woken.0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::runtime::{LOCK_MAX, OpenRequest, Runtime};

    #[test]
    fn what_cannot_be_written_now_is_written_later_and_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(folder.path().join("run")).unwrap();
        let state = State::new("one".into(), OpenRequest::default(), None, Vec::new());
        let entry = runtime.create("one", &state).unwrap();
        let notes = Notes::default();
        notes.write_to(entry.clone());
        // In the way of the file that is written first.
        let obstacle = entry.path().join(".state.json.new");
        std::fs::create_dir(&obstacle).unwrap();
        let begun = Instant::now();
        notes.takeover();
        notes.trouble(Some("one".into()));
        notes.failure(&Error::new(ErrorKind::Device, "gone"));
        assert!(begun.elapsed() < LOCK_MAX);
        assert!(notes.end(Duration::from_millis(10)).is_err());
        assert_eq!(entry.state().unwrap().takeovers, 0);
        std::fs::remove_dir(&obstacle).unwrap();
        notes.end(Duration::from_secs(300)).unwrap();
        let state = entry.state().unwrap();
        assert_eq!((state.takeovers, state.trouble.as_deref()), (1, Some("one")));
        assert!(state.failure.unwrap().message.contains("gone"));
    }
}
