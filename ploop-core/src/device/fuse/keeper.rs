//! The keeper: a small process that holds what must outlive a server.
//!
//! It opens `/dev/fuse`, mounts the exported file, makes the [`Survivor`] memory, and runs servers: child processes
//! that inherit both descriptors. When a server dies, requests it had read wait in the kernel; a successor asks for
//! them again, enters what was pending into the table, and goes on. The device above sees a pause.
//!
//! There is no successor, and the device fails instead of giving wrong answers, when
//!
//! * a sync had failed (poisoned): what the guest believes durable may be lost, and only an error tells it;
//! * pending entries could not be kept, or belong to another file than the one that would be opened;
//! * the kernel cannot send requests again (before 6.9);
//! * servers die too often.
//!
//! In the last two cases acknowledged writes are saved before the device is given up: one more server, which serves
//! nobody, enters them and closes the image ([`Mode::Finish`]).
//!
//! A server that ends by order has closed the image cleanly (exit code 0); the keeper then removes the mount and the
//! run-time folder, and ends, too. The keeper reads no guest data and no image. It has one thread beside the one
//! that waits for the child: that one passes SIGTERM on.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use super::held::Holdings;
use super::life::{Collector, Ended, Log, Process};
use super::notes::Notes;
use super::survivor::{Legacy, Survivor};
use super::sys;
use crate::device::control::Connection;
use crate::device::runtime::{Entry, ProcessMark};
use crate::error::{Error, ErrorKind, Result};

/// Servers that may die within [`DEATHS_WINDOW`] before the keeper gives up.
pub const DEATHS_MAX: usize = 5;
/// The time over which deaths are counted.
pub const DEATHS_WINDOW: Duration = Duration::from_secs(60);
/// Successors that may fail in a row, none of which came to serving, and servers that may fail to save what is pending. One
/// that only found the image locked by somebody else is not counted: that ends by itself, and giving up would lose what is
/// pending.
pub const FAILURES_MAX: u32 = 3;
/// How long a process that cannot be started is tried again, and the pauses at first and at most.
const START_MAX: Duration = Duration::from_secs(60);
const START_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));
/// How long the last notes may take.
const NOTES_END_MAX: Duration = Duration::from_secs(2);

/// What a server is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The first server of a mount.
    First,
    /// An earlier one died: take over its requests and pending entries.
    Takeover,
    /// The mount is gone or given up: enter what is pending, close the image, end.
    Finish,
}

impl Mode {
    /// The word for it on a command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Takeover => "takeover",
            Self::Finish => "finish",
        }
    }

    /// The mode of that word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::First, Self::Takeover, Self::Finish].into_iter().find(|mode| mode.word() == word)
    }
}

/// How to start a server.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// What for.
    pub mode: Mode,
    /// The number under which it inherits `/dev/fuse`.
    pub fuse: RawFd,
    /// The number under which it inherits the survivor memory.
    pub memory: RawFd,
    /// The number under which it inherits its connection to the keeper.
    pub keeper: RawFd,
}

/// How processes in the write path of a mounted disk protect themselves, and it from them.
#[derive(Clone, Copy, Debug)]
pub struct Protection {
    /// Go on although the kernel refuses the I/O flusher state or locked memory. Under memory pressure the machine
    /// may then stall for ever.
    pub allow_reclaim_stall: bool,
    /// Keep all memory of this process resident.
    pub lock_memory: bool,
}

/// Prepares this process, and those it starts, for serving a mounted disk. Called before any thread is started.
pub fn protect_process(protection: &Protection) -> Result<()> {
    let refused = |operation: &str, cause: io::Error| {
        Error::io(ErrorKind::System, operation.to_owned(), cause).advise(
            "run as root, or give the capabilities CAP_SYS_RESOURCE and CAP_IPC_LOCK; --allow-reclaim-stall (or \
             PLOOP_ALLOW_RECLAIM_STALL=1) goes on without, at the risk that the machine stalls when memory is short",
        )
    };
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    sys::forbid_core_files().map_err(|cause| Error::io(ErrorKind::System, "forbid core files", cause))?;
    let mut steps = vec![("become an I/O flusher", sys::become_io_flusher())];
    if protection.lock_memory {
        steps.push(("lock memory", sys::lock_memory()));
    }
    for (operation, result) in steps {
        match result {
            Err(cause) if !protection.allow_reclaim_stall => return Err(refused(operation, cause)),
            _ => {}
        }
    }
    // A help, not a need: the last process to be killed when memory is out.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    Ok(())
}

/// Blocks the signals that order an end, in this thread and those it starts; they are to be waited for.
pub fn block_end_signals() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().map_err(|errno| Error::io(ErrorKind::System, "block signals", errno.into()))?;
    Ok(signals)
}

/// The server that runs now, for the thread that passes signals on.
type Current = Arc<Mutex<Option<Pid>>>;

/// What a new keeper is given by the server that has started it, because the former one had died.
pub struct Orphan {
    /// `/dev/fuse`.
    pub fuse: OwnedFd,
    /// The survivor memory.
    pub memory: OwnedFd,
    /// The other end of the server's connection.
    pub connection: Connection,
    /// The server's process, and its number.
    pub process: (OwnedFd, u32),
}

/// Holds one exported file.
pub struct Keeper {
    fuse: OwnedFd,
    survivor: Survivor,
    entry: Entry,
    notes: Notes,
    /// The files of the disk.
    holdings: Holdings,
    current: Current,
    deaths: VecDeque<Instant>,
    /// Successors in a row that did not come to serving.
    failures: u32,
    /// Servers that had come to serving when the last one died.
    servers: u64,
    /// The server that is there already.
    orphan: Option<(Connection, Process, u32)>,
}

impl Keeper {
    /// Opens `/dev/fuse` and mounts the exported file of `entry`.
    pub fn new(entry: Entry) -> Result<Self> {
        let fuse = sys::open_fuse().map_err(|cause| {
            Error::io(ErrorKind::Device, "open the FUSE device", cause)
                .at_path("/dev/fuse")
                .advise("load the kernel module: modprobe fuse")
        })?;
        let survivor = Survivor::create()?;
        let state = entry.state()?;
        let source = format!("ploop-{}", state.id);
        sys::mount_file(&fuse, &source, &entry.disk_file(), state.open.read_only).map_err(|cause| {
            Error::io(ErrorKind::Mount, "mount the exported file", cause).at_path(entry.disk_file())
        })?;
        Ok(Self::holding(fuse, survivor, entry))
    }

    /// Takes the place of a keeper that has died.
    pub fn adopting(entry: Entry, orphan: Orphan) -> Result<Self> {
        let survivor = Survivor::open(orphan.memory)?;
        let mut keeper = Self::holding(orphan.fuse, survivor, entry);
        let (process, pid) = orphan.process;
        keeper.servers = keeper.survivor.legacy()?.servers;
        keeper.orphan = Some((orphan.connection, Process::Adopted(process), pid));
        Ok(keeper)
    }

    fn holding(fuse: OwnedFd, survivor: Survivor, entry: Entry) -> Self {
        let (current, deaths) = (Current::default(), VecDeque::new());
        let (notes, holdings) = (Notes::default(), Holdings::default());
        let (failures, servers, orphan) = (0, 0, None);
        Self { fuse, survivor, entry, notes, holdings, current, deaths, failures, servers, orphan }
    }

    /// Runs servers until one ends by order, or none can follow. `prepare` says how to start one; `log` takes what is
    /// worth telling. When this returns the mount is dead; after success it is gone, and the run-time
    /// folder, too.
    pub fn run(mut self, prepare: impl Fn(&Launch) -> Command, log: Log<'_>) -> Result<()> {
        let signals = block_end_signals()?;
        let current = Arc::clone(&self.current);
        // With the signals blocked, as every thread of this process.
        self.notes.write_to(self.entry.clone());
        self.notes.keeper(ProcessMark::own());
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || pass_signals(&signals, &current))
            .map_err(|cause| Error::io(ErrorKind::System, "start the signal thread", cause))?;
        let outcome = self.run_servers(&prepare, log);
        if let Err(error) = &outcome {
            log(&format!("giving up: {error}"));
            // Whoever waits for this disk finds the reason here.
            self.notes.failure(error);
            if let Err(second) = self.notes.end(NOTES_END_MAX) {
                log(&format!("the reason cannot be recorded: {second}"));
            }
        }
        // With the last descriptor the kernel fails what still waits. After a failure the dead mount stays where it is: the
        // loop device above is recognised by its path.
        drop(self.fuse);
        if outcome.is_ok() {
            self.entry.remove()?;
        }
        outcome
    }

    fn run_servers(&mut self, prepare: &impl Fn(&Launch) -> Command, log: Log<'_>) -> Result<()> {
        let mut mode = Mode::First;
        loop {
            let ended = match self.orphan.take() {
                Some(orphan) => self.watch(orphan, log)?,
                None => self.run_one(mode, prepare, log)?,
            };
            if ended.is_clean() {
                return Ok(());
            }
            log(&format!("the server ended without closing the image: {}", ended.told));
            let legacy = self.survivor.legacy()?;
            let stopped = self.survivor.is_stopped()?;
            match self.next_mode(mode, stopped, &legacy, &ended) {
                Ok(next) => mode = next,
                Err(error) => {
                    let is_whole = legacy.servers > 0 && !legacy.poisoned && !legacy.incomplete;
                    if is_whole && mode != Mode::Finish {
                        log(&format!("{error}; saving {} pending entries", legacy.entries.len()));
                        return Err(self.finish(error, prepare, log));
                    }
                    return Err(error);
                }
            }
            if mode == Mode::Takeover {
                log(&format!("a successor takes over with {} pending entries", legacy.entries.len()));
                self.notes.takeover();
            }
        }
    }

    /// Enters what is pending into the image and closes it, for a device that is given up because of `error`: that error,
    /// which says whether it was done.
    fn finish(&mut self, error: Error, prepare: &impl Fn(&Launch) -> Command, log: Log<'_>) -> Error {
        let mut failures = 0;
        while failures < FAILURES_MAX {
            let outcome = self.run_one(Mode::Finish, prepare, log);
            match &outcome {
                Ok(ended) => log(&format!("saving pending entries ended: {}", ended.told)),
                Err(failed) => log(&format!("saving pending entries: {failed}")),
            }
            match outcome {
                Ok(ended) if ended.is_clean() => {
                    return error.advise(
                        "every acknowledged write is in the image, and the image is closed: unmount what is \
                         left with ploop umount, then mount again",
                    );
                }
                // Each waits for the lock for a while.
                Ok(ended) if ended.is_because_of(ErrorKind::InUse) => {
                    self.notes.trouble(Some("another program holds the image".into()));
                }
                Ok(_) | Err(_) => failures += 1,
            }
        }
        error.advise(
            "what was written last could not be saved; the log in the run-time folder says why: unmount what is left \
             with ploop umount, then check the image and its file system",
        )
    }

    /// What follows the death of a server in `mode`.
    fn next_mode(&mut self, mode: Mode, stopped: bool, legacy: &Legacy, ended: &Ended) -> Result<Mode> {
        let check = "unmount what is left with ploop umount and check the image and its file system";
        let dead =
            |why: &str| Error::new(ErrorKind::Device, format!("the server died ({}), {why}", ended.told));
        if legacy.poisoned {
            return Err(dead("after a sync had failed: what was written since the last flush may be lost")
                .advise(check)
                .with_kind(ErrorKind::Sync));
        }
        if legacy.servers == 0 {
            return Err(dead("before it served anything"));
        }
        if legacy.incomplete {
            return Err(dead("and what it had not written to the table is not all known").advise(check));
        }
        if mode == Mode::Finish {
            self.failures += 1;
            if self.failures < FAILURES_MAX || ended.is_because_of(ErrorKind::InUse) {
                return Ok(Mode::Finish);
            }
            return Err(dead("while it saved the last writes").advise(check));
        }
        if stopped {
            self.failures = 0;
            return Ok(Mode::Finish);
        }
        if !legacy.agreement.is_some_and(|agreement| agreement.can_resend()) {
            return Err(dead("and this kernel cannot repeat requests to a successor (needs Linux 6.9)"));
        }
        if mode == Mode::Takeover && legacy.servers == self.servers && ended.is_because_of(ErrorKind::InUse) {
            self.notes.trouble(Some("no successor serves yet: another program holds the image".into()));
            return Ok(Mode::Takeover);
        }
        self.failures = if legacy.servers > self.servers { 0 } else { self.failures + 1 };
        self.servers = legacy.servers;
        if self.failures >= FAILURES_MAX {
            return Err(dead("and no successor comes to serving: the log in its run-time folder says why"));
        }
        let now = Instant::now();
        self.deaths.push_back(now);
        self.deaths.retain(|&death| now.duration_since(death) < DEATHS_WINDOW);
        if self.deaths.len() > DEATHS_MAX {
            return Err(dead("as too many did before it in the last minute"));
        }
        Ok(Mode::Takeover)
    }

    /// Starts a server and waits for its end.
    fn run_one(&mut self, mode: Mode, prepare: &impl Fn(&Launch) -> Command, log: Log<'_>) -> Result<Ended> {
        let (own, servers) = Connection::pair()?;
        let child = self.start(mode, prepare, &servers, log)?;
        drop(servers);
        let id = child.id();
        if mode != Mode::First {
            // One that has died meanwhile takes nothing; how it ended is told below.
            let _ = self.holdings.send(&own);
        }
        self.watch((own, Process::Child(child), id), log)
    }

    /// Waits for the end of a server, and takes what it hands over meanwhile.
    fn watch(&self, (own, mut process, id): (Connection, Process, u32), log: Log<'_>) -> Result<Ended> {
        let pid = i32::try_from(id).ok().map(Pid::from_raw);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = pid;
        self.notes.server(ProcessMark::of(id));
        let collector = Collector { from: &own, holdings: &self.holdings, survivor: &self.survivor };
        let (ended, problem) = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("files".into())
                .spawn_scoped(scope, || collector.run(&self.notes, log));
            let forget = || *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let ended = process.wait(pid, &self.survivor, forget);
            // What it had sent is still received.
            own.end_receiving();
            let collected = match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| {
                    Err(Error::new(ErrorKind::System, "the thread that takes files over panicked"))
                }),
                Err(_) => collector.run(&self.notes, log),
            };
            (ended, collected.err())
        });
        if let Some(problem) = problem {
            log(&format!("files of the server were not taken over: {problem}"));
        }
        ended.map_err(|cause| Error::io(ErrorKind::System, "wait for the server", cause))
    }

    /// Starts a server. What fails once (memory, processes, open files of the whole machine) may not the next time.
    fn start(
        &self,
        mode: Mode,
        prepare: &impl Fn(&Launch) -> Command,
        connection: &Connection,
        log: Log<'_>,
    ) -> Result<Child> {
        let deadline = Instant::now() + START_MAX;
        let mut pause = START_PAUSES.0;
        loop {
            let error = match self.spawn(mode, prepare, connection) {
                Ok(child) => return Ok(child),
                // Who mounts waits, and can try again himself.
                Err(error) if mode == Mode::First || Instant::now() >= deadline => return Err(error),
                Err(error) => error,
            };
            log(&format!("{error}; trying again"));
            self.notes.trouble(Some(format!("no successor serves yet: {error}")));
            std::thread::sleep(pause);
            pause = (pause * 2).min(START_PAUSES.1);
        }
    }

    fn spawn(
        &self,
        mode: Mode,
        prepare: &impl Fn(&Launch) -> Command,
        connection: &Connection,
    ) -> Result<Child> {
        let failed =
            |operation: &str, cause: io::Error| Error::io(ErrorKind::System, operation.to_owned(), cause);
        let passed = [self.fuse.as_fd(), self.survivor.file().as_fd(), connection.descriptor()];
        let [fuse, memory, keeper] = passed.map(|descriptor| descriptor.as_raw_fd());
        let launch = Launch { mode, fuse, memory, keeper };
        let inheritable = |on| passed.iter().try_for_each(|&descriptor| sys::set_inheritable(descriptor, on));
        inheritable(true).map_err(|cause| failed("pass descriptors to a server", cause))?;
        let started = prepare(&launch).spawn();
        inheritable(false).map_err(|cause| failed("keep descriptors", cause))?;
        started.map_err(|cause| failed("start a server", cause))
    }
}

/// SIGTERM means: stop as soon as nobody uses the disk. The server decides. The keeper itself ends after it.
fn pass_signals(signals: &SigSet, current: &Current) {
    while let Ok(signal) = signals.wait() {
        if signal == Signal::SIGTERM
            && let Some(pid) = *current.lock().unwrap_or_else(PoisonError::into_inner)
        {
            // A server that has just ended needs no signal.
            let _ = nix::sys::signal::kill(pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::fuse::wire::{Agreement, HAS_RESEND};
    use crate::device::runtime::{OpenRequest, Runtime, State};
    use std::os::unix::process::ExitStatusExt;

    fn keeper(folder: &std::path::Path) -> Keeper {
        let runtime = Runtime::at(folder.join("run")).unwrap();
        let state = State::new("one".into(), OpenRequest::default(), None, Vec::new());
        let entry = runtime.create("one", &state).unwrap();
        let fuse = sys::create_memory_file("no fuse").unwrap().into();
        let survivor = Survivor::create().unwrap();
        Keeper::holding(fuse, survivor, entry)
    }

    fn ended(status: i32) -> Ended {
        Ended::from(std::process::ExitStatus::from_raw(status))
    }

    fn legacy() -> Legacy {
        Legacy {
            agreement: Some(Agreement { minor: 40, flags: HAS_RESEND }),
            poisoned: false,
            incomplete: false,
            servers: 1,
            top: None,
            files: 1,
            entries: Vec::new(),
        }
    }

    #[test]
    fn who_may_succeed_a_dead_server() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let killed = ended(9);
        let mut next = |mode, stopped, legacy: Legacy| keeper.next_mode(mode, stopped, &legacy, &killed);
        assert_eq!(next(Mode::First, false, legacy()).unwrap(), Mode::Takeover);
        assert_eq!(next(Mode::First, true, legacy()).unwrap(), Mode::Finish);
        let poisoned = next(Mode::First, false, Legacy { poisoned: true, ..legacy() });
        assert_eq!(poisoned.unwrap_err().kind(), ErrorKind::Sync);
        assert!(next(Mode::First, true, Legacy { poisoned: true, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { incomplete: true, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { servers: 0, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { agreement: None, ..legacy() }).is_err());
        // What fails once while it saves may not the next time.
        for _ in 1..FAILURES_MAX {
            assert_eq!(next(Mode::Finish, true, legacy()).unwrap(), Mode::Finish);
        }
        assert!(next(Mode::Finish, true, legacy()).is_err());
    }

    #[test]
    fn an_image_that_somebody_else_has_locked_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let (killed, in_use) = (ended(9), ended(i32::from(ErrorKind::InUse.exit_code()) << 8));
        assert_eq!(keeper.next_mode(Mode::First, false, &legacy(), &killed).unwrap(), Mode::Takeover);
        for _ in 0..100 {
            assert_eq!(keeper.next_mode(Mode::Takeover, false, &legacy(), &in_use).unwrap(), Mode::Takeover);
        }
    }

    #[test]
    fn a_process_that_cannot_be_started_once_is_started_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = keeper(folder.path());
        let (_own, servers) = Connection::pair().unwrap();
        let tries = std::cell::Cell::new(0);
        let prepare = |_: &Launch| {
            tries.set(tries.get() + 1);
            Command::new(if tries.get() < 4 { "/nonexistent/program" } else { "true" })
        };
        assert!(
            keeper.start(Mode::First, &prepare, &servers, &|_| {}).is_err(),
            "who mounts is told at once"
        );
        let mut child = keeper.start(Mode::Takeover, &prepare, &servers, &|_| {}).unwrap();
        assert!(child.wait().unwrap().success() && tries.get() == 4);
    }

    #[test]
    fn deaths_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let killed = ended(9);
        let died = |servers| Legacy { servers, ..legacy() };
        for servers in 1..=DEATHS_MAX as u64 {
            assert!(keeper.next_mode(Mode::Takeover, false, &died(servers), &killed).is_ok());
        }
        assert!(keeper.next_mode(Mode::Takeover, false, &died(99), &killed).is_err());
    }

    #[test]
    fn successors_that_never_serve_are_not_tried_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let failed = ended(i32::from(ErrorKind::Open.exit_code()) << 8);
        for _ in 0..FAILURES_MAX {
            assert!(keeper.next_mode(Mode::Takeover, false, &legacy(), &failed).is_ok());
        }
        assert!(keeper.next_mode(Mode::Takeover, false, &legacy(), &failed).is_err());
    }
}
