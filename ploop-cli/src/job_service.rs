//! Long work on a served disk: it runs in the server, and the command that asked for it looks on.
//!
//! ```text
//! command                                        server
//! verb, {limit, arguments}, descriptor (leash) ──►  works, in the thread of the control connection
//!                                              ◄──  {"event": "phase_started" | "phase_progress" | "phase_ended", …}
//!                                              ◄──  the answer: the report, or an error
//! ```
//!
//! The work is one of the library's operations over the [`Disk`](ploop_core::device::Disk); it tells where it is
//! through [`ops::Progress`](ploop_core::ops::Progress), which here sends events and keeps the rate limit. A signal to
//! the command, its death, and a command that takes no events for ten seconds cancel the work: it ends at the next
//! place where nothing is half done.
//!
//! A server that dies ends the work, too; its successor does not go on with it. What was moved by then is moved.
//!
//! [`Turns`] decides what may run at the same time on one disk: one copy and one job, and of these two each only if
//! the job may run beside such a copy. Whoever does not fit is answered `Busy` (17) at once.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pcopy::transport::Cancel;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::Entry;
use ploop_core::{Error, ErrorKind, Result, ops};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::progress::{Job, Meter};
use crate::{copy_service, leash};

/// What a job is asked for with.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct JobRequest {
    /// How fast it may go through data, in bytes per second.
    #[serde(default)]
    limit_bytes_per_second: Option<u64>,
    /// What the verb needs to know.
    arguments: Value,
}

/// What may run beside a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    /// No copy: the job changes what a copy relies on (the size of the disk, its chain).
    Alone,
    /// A copy of the content: the guest sees the same bytes at every moment. Not one delta by delta: the job changes which
    /// deltas there are.
    BesideCopyOfContent,
    /// Any copy: the guest sees the same bytes at every moment, in the same deltas.
    BesideCopy,
}

/// What a copy takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cargo {
    /// What the guest sees.
    Content,
    /// Every delta of the disk.
    Deltas,
}

impl Company {
    /// Whether the job may run beside such a copy.
    fn bears(self, cargo: Cargo) -> bool {
        match self {
            Self::Alone => false,
            Self::BesideCopyOfContent => cargo == Cargo::Content,
            Self::BesideCopy => true,
        }
    }
}

#[derive(Debug, Default)]
struct Running {
    copy: Option<(Cargo, Cancel)>,
    job: Option<(&'static str, Company, Cancel)>,
    /// The disk is being closed.
    is_ended: bool,
}

/// Who works on a disk.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    running: Mutex<Running>,
    changed: Condvar,
}

/// A place among those who work on a disk; given back on drop.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Arc<Turns>,
    is_copy: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut running = self.turns.lock();
        if self.is_copy {
            running.copy = None;
        } else {
            running.job = None;
        }
        self.turns.changed.notify_all();
    }
}

fn busy(what: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("{what} of this disk is running"))
        .advise("wait for its end, or end it; this command has changed nothing")
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of a copy, which `cancel` ends.
    pub(crate) fn copy(self: &Arc<Self>, cargo: Cargo, cancel: &Cancel) -> Result<Turn> {
        let mut running = self.lock();
        running.check()?;
        match running.job {
            _ if running.copy.is_some() => return Err(busy("another copy")),
            Some((verb, company, _)) if !company.bears(cargo) => return Err(busy(&format!("a {verb}"))),
            _ => running.copy = Some((cargo, cancel.clone())),
        }
        Ok(Turn { turns: Arc::clone(self), is_copy: true })
    }

    /// The place of a job, which `cancel` ends.
    pub(crate) fn job(
        self: &Arc<Self>,
        (verb, company): (&'static str, Company),
        cancel: &Cancel,
    ) -> Result<Turn> {
        let mut running = self.lock();
        running.check()?;
        match running.job {
            Some((other, _, _)) => return Err(busy(&format!("a {other}"))),
            None if running.copy.as_ref().is_some_and(|(cargo, _)| !company.bears(*cargo)) => {
                return Err(busy("a copy"));
            }
            None => running.job = Some((verb, company, cancel.clone())),
        }
        Ok(Turn { turns: Arc::clone(self), is_copy: false })
    }

    /// The verbs of what works on the disk now: `copy`, and that of a job.
    pub(crate) fn names(&self) -> Vec<String> {
        let running = self.lock();
        let copy = running.copy.is_some().then_some(copy_service::VERB);
        let job = running.job.as_ref().map(|&(verb, _, _)| verb);
        copy.into_iter().chain(job).map(str::to_owned).collect()
    }

    /// The disk is to be closed: cancels what runs, lets nothing begin any more, and waits for the ends, `time_max` at
    /// most.
    pub(crate) fn end(&self, time_max: Duration) {
        let mut running = self.lock();
        running.is_ended = true;
        let cancels = [
            running.copy.as_ref().map(|(_, cancel)| cancel),
            running.job.as_ref().map(|(_, _, cancel)| cancel),
        ];
        cancels.into_iter().flatten().for_each(Cancel::cancel);
        let goes_on = |running: &mut Running| running.copy.is_some() || running.job.is_some();
        drop(self.changed.wait_timeout_while(running, time_max, goes_on));
    }
}

impl Running {
    fn check(&self) -> Result<()> {
        if self.is_ended {
            return Err(Error::new(ErrorKind::Busy, "the disk is being unmounted"));
        }
        Ok(())
    }
}

/// Serves one request for a job, to its end: reads its arguments, waits for no turn, lets `work` work, answers with its
/// report.
pub(crate) fn serve<A: DeserializeOwned, R: Serialize>(
    turns: &Arc<Turns>,
    (verb, company): (&'static str, Company),
    (connection, arguments, descriptors): (&Connection, Value, Vec<OwnedFd>),
    work: impl FnOnce(A, &dyn ops::Progress) -> Result<R>,
) -> Result<Value> {
    let unreadable = |cause: serde_json::Error| {
        Error::io(ErrorKind::Parameter, format!("read the request of a {verb}"), cause.into())
    };
    let request: JobRequest = serde_json::from_value(arguments).map_err(unreadable)?;
    let arguments = serde_json::from_value(request.arguments).map_err(unreadable)?;
    let mut descriptors = descriptors.into_iter();
    let (Some(leash), None) = (descriptors.next(), descriptors.next()) else {
        return Err(Error::new(ErrorKind::Parameter, "a job came with other descriptors than it needs"));
    };
    let cancel = Cancel::new()?;
    let _turn = turns.job((verb, company), &cancel)?;
    leash::watch(leash, cancel.clone())?;
    let tell = |event: &Value| connection.send(event, &[]).is_ok();
    let meter = Meter::new(tell, cancel, request.limit_bytes_per_second);
    let report = work(arguments, &meter)?;
    serde_json::to_value(&report)
        .map_err(|cause| Error::io(ErrorKind::System, format!("write the report of a {verb}"), cause.into()))
}

/// Lets the server of a disk do a job and shows what it tells; the report.
pub(crate) fn ask(entry: &Entry, verb: &str, arguments: &impl Serialize, job: &Job) -> Result<Value> {
    let connection = crate::serving::connect(entry)?;
    let leash = leash::hold(job.cancel())?;
    let arguments = serde_json::to_value(arguments)
        .map_err(|cause| Error::io(ErrorKind::System, "write a request", cause.into()))?;
    let request = JobRequest { limit_bytes_per_second: job.limit_bytes_per_second(), arguments };
    connection.request(verb, &request, &[leash.as_fd()])?;
    // The server has it now; kept here, the server would never see its end.
    drop(leash);
    connection.answer(verb, None, |event| job.progress().event(&event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Output;

    #[test]
    fn one_job_and_one_copy_at_a_time() {
        let turns = Arc::new(Turns::default());
        let cancel = Cancel::new().unwrap();
        let (one, other) = (("compact", Company::BesideCopy), ("resize", Company::Alone));
        let compact = turns.job(one, &cancel).unwrap();
        assert_eq!(turns.job(other, &cancel).unwrap_err().kind(), ErrorKind::Busy);
        let copy = turns.copy(Cargo::Content, &cancel).unwrap();
        assert_eq!(turns.names(), ["copy", "compact"]);
        assert!(turns.copy(Cargo::Content, &cancel).unwrap_err().to_string().contains("another copy"));
        drop(compact);
        assert!(turns.job(other, &cancel).unwrap_err().to_string().contains("a copy"));
        drop(copy);
        let resize = turns.job(other, &cancel).unwrap();
        assert!(turns.copy(Cargo::Content, &cancel).unwrap_err().to_string().contains("resize"));
        drop(resize);
        turns.copy(Cargo::Content, &cancel).unwrap();
        assert!(turns.names().is_empty());
        assert!(!cancel.is_cancelled());
    }

    #[test]
    fn a_copy_of_deltas_keeps_out_what_changes_them() {
        let turns = Arc::new(Turns::default());
        let cancel = Cancel::new().unwrap();
        let snapshot = ("snapshot", crate::snapshot_service::COMPANY);
        let copy = turns.copy(Cargo::Content, &cancel).unwrap();
        drop(turns.job(snapshot, &cancel).unwrap());
        drop(copy);
        let copy = turns.copy(Cargo::Deltas, &cancel).unwrap();
        let refused = turns.job(snapshot, &cancel).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("a copy"), "{refused}");
        drop(turns.job(("compact", Company::BesideCopy), &cancel).unwrap());
        drop(copy);
        let job = turns.job(snapshot, &cancel).unwrap();
        assert_eq!(turns.copy(Cargo::Deltas, &cancel).unwrap_err().kind(), ErrorKind::Busy);
        turns.copy(Cargo::Content, &cancel).unwrap();
        drop(job);
        turns.copy(Cargo::Deltas, &cancel).unwrap();
    }

    #[test]
    fn the_end_of_a_disk_ends_what_runs_on_it() {
        let turns = Arc::new(Turns::default());
        let cancel = Cancel::new().unwrap();
        let turn = turns.job(("compact", Company::BesideCopy), &cancel).unwrap();
        let job = std::thread::spawn({
            let cancel = cancel.clone();
            move || {
                cancel.wait();
                std::thread::sleep(Duration::from_millis(50));
                drop(turn);
            }
        });
        turns.end(Duration::from_secs(60));
        assert!(turns.lock().job.is_none(), "it was not waited for");
        assert_eq!(turns.copy(Cargo::Content, &cancel).unwrap_err().kind(), ErrorKind::Busy);
        job.join().unwrap();
    }

    /// A server of one request, and what the command got.
    fn run(cancelled_after: Option<u64>) -> Result<Value> {
        let folder = tempfile::tempdir().unwrap();
        let runtime = ploop_core::device::runtime::Runtime::at(folder.path()).unwrap();
        let entry = runtime.entry("one");
        std::fs::create_dir(entry.path()).unwrap();
        let turns = Arc::new(Turns::default());
        let seen = Arc::clone(&turns);
        let handlers =
            ploop_core::device::control::Handlers::new().with("work", move |connection, arguments, fds| {
                serve(
                    &turns,
                    ("work", Company::Alone),
                    (connection, arguments, fds),
                    |steps: u64, progress| {
                        progress.begin("steps", steps);
                        for _ in 0..steps {
                            std::thread::sleep(std::time::Duration::from_millis(1));
                            progress.advance(1)?;
                        }
                        progress.end();
                        Ok(steps)
                    },
                )
            });
        let server = ploop_core::device::control::ControlServer::start(&entry.socket(), handlers).unwrap();
        let job = Job::for_test(&Output::new(false, -2));
        if let Some(ms) = cancelled_after {
            let cancel = job.cancel().clone();
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(ms));
                cancel.cancel();
            });
        }
        let steps: u64 = if cancelled_after.is_some() { 600_000 } else { 20 };
        let answer = ask(&entry, "work", &steps, &job);
        assert!(seen.copy(Cargo::Content, &Cancel::new().unwrap()).is_ok(), "the turn was given back");
        drop(server);
        answer
    }

    #[test]
    fn a_job_reports_and_can_be_cancelled() {
        assert_eq!(run(None).unwrap(), Value::from(20));
        assert_eq!(run(Some(50)).unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
