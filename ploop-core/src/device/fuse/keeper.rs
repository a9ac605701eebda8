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
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use super::held::{Came, Holdings, Incoming};
use super::survivor::{Legacy, Survivor};
use super::sys;
use crate::device::control::Connection;
use crate::device::runtime::{Entry, Failure, ProcessMark};
use crate::error::{Error, ErrorKind, Result};

/// Servers that may die within [`DEATHS_WINDOW`] before the keeper gives up.
pub const DEATHS_MAX: usize = 5;
/// The time over which deaths are counted.
pub const DEATHS_WINDOW: Duration = Duration::from_secs(60);
/// Successors that may fail in a row, none of which came to serving.
pub const FAILURES_MAX: u32 = 3;
/// Pause before a successor that follows another death closely.
const PAUSE: Duration = Duration::from_millis(200);

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

/// Holds one exported file.
pub struct Keeper {
    fuse: OwnedFd,
    survivor: Survivor,
    entry: Entry,
    /// The files of the disk.
    holdings: Holdings,
    current: Current,
    deaths: VecDeque<Instant>,
    /// Successors in a row that did not come to serving.
    failures: u32,
    /// Servers that had come to serving when the last one died.
    servers: u64,
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

    fn holding(fuse: OwnedFd, survivor: Survivor, entry: Entry) -> Self {
        let (current, deaths) = (Current::default(), VecDeque::new());
        let holdings = Holdings::default();
        Self { fuse, survivor, entry, holdings, current, deaths, failures: 0, servers: 0 }
    }

    /// Runs servers until one ends by order, or none can follow. `prepare` says how to start one; `log` takes what is
    /// worth telling. When this returns the mount is dead; after success it is gone, and the run-time
    /// folder, too.
    pub fn run(mut self, prepare: impl Fn(&Launch) -> Command, log: &dyn Fn(&str)) -> Result<()> {
        let signals = block_end_signals()?;
        let current = Arc::clone(&self.current);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || pass_signals(&signals, &current))
            .map_err(|cause| Error::io(ErrorKind::System, "start the signal thread", cause))?;
        let outcome = self.run_servers(&prepare, log);
        if let Err(error) = &outcome {
            log(&format!("giving up: {error}"));
            // Whoever waits for this disk finds the reason here.
            let noted = self.entry.update(|state| {
                state.failure.get_or_insert_with(|| Failure::of(error));
            });
            if let Err(second) = noted {
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

    fn run_servers(&mut self, prepare: &impl Fn(&Launch) -> Command, log: &dyn Fn(&str)) -> Result<()> {
        let mut mode = Mode::First;
        loop {
            let status = self.run_one(mode, prepare, log)?;
            if status.success() {
                return Ok(());
            }
            log(&format!("the server ended without closing the image: {status}"));
            let legacy = self.survivor.legacy()?;
            let stopped = self.survivor.is_stopped()?;
            match self.next_mode(mode, stopped, &legacy, status) {
                Ok(next) => mode = next,
                Err(error) => {
                    let has_more = legacy.servers > 0 && !legacy.poisoned && !legacy.incomplete;
                    if has_more && mode != Mode::Finish {
                        log(&format!("{error}; saving {} pending entries", legacy.entries.len()));
                        let status = self.run_one(Mode::Finish, prepare, log)?;
                        log(&format!("saving pending entries ended: {status}"));
                        return Err(if status.success() {
                            error.advise(
                                "every acknowledged write is in the image, and the image is closed: unmount what is \
                                 left with ploop umount, then mount again",
                            )
                        } else {
                            error
                        });
                    }
                    return Err(error);
                }
            }
            if mode == Mode::Takeover {
                log(&format!("a successor takes over with {} pending entries", legacy.entries.len()));
                if self.deaths.len() > 1 {
                    std::thread::sleep(PAUSE);
                }
                self.entry.update(|state| state.takeovers = state.takeovers.saturating_add(1))?;
            }
        }
    }

    /// What follows the death of a server in `mode`.
    fn next_mode(&mut self, mode: Mode, stopped: bool, legacy: &Legacy, status: ExitStatus) -> Result<Mode> {
        let check = "unmount what is left with ploop umount and check the image and its file system";
        let dead = |why: &str| Error::new(ErrorKind::Device, format!("the server died ({status}), {why}"));
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
            return Err(dead("while it saved the last writes").advise(check));
        }
        if stopped {
            return Ok(Mode::Finish);
        }
        if !legacy.agreement.is_some_and(|agreement| agreement.can_resend()) {
            return Err(dead("and this kernel cannot repeat requests to a successor (needs Linux 6.9)"));
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
    fn run_one(
        &mut self,
        mode: Mode,
        prepare: &impl Fn(&Launch) -> Command,
        log: &dyn Fn(&str),
    ) -> Result<ExitStatus> {
        let (own, servers) = Connection::pair()?;
        let mut child = self.spawn(mode, prepare, &servers)?;
        drop(servers);
        let id = child.id();
        let pid = i32::try_from(id).ok().map(Pid::from_raw);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = pid;
        if mode != Mode::First {
            // One that has died meanwhile takes nothing; how it ended is told below.
            let _ = self.holdings.send(&own);
        }
        let noted = self.entry.update(|state| state.server = ProcessMark::of(id));
        let (holdings, survivor) = (&self.holdings, &self.survivor);
        let (status, problem) = std::thread::scope(|scope| {
            let collector = std::thread::Builder::new()
                .name("files".into())
                .spawn_scoped(scope, || collect(&own, holdings, survivor));
            let status = self.wait_for(&mut child, pid);
            // What it had sent is still received.
            own.end_receiving();
            let collected = match collector {
                Ok(thread) => thread.join().unwrap_or_else(|_| {
                    Err(Error::new(ErrorKind::System, "the thread that takes files over panicked"))
                }),
                Err(_) => collect(&own, holdings, survivor),
            };
            (status, collected.err())
        });
        if let Some(problem) = problem {
            log(&format!("files of the server were not taken over: {problem}"));
        }
        noted?;
        status.map_err(|cause| Error::io(ErrorKind::System, "wait for the server", cause))
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

    fn wait_for(&self, child: &mut Child, pid: Option<Pid>) -> io::Result<ExitStatus> {
        if let Some(pid) = pid {
            use nix::sys::wait::{Id, WaitPidFlag, waitid};
            // Not reaped yet: the number stays its own until nobody sends signals to it any more.
            while let Err(nix::errno::Errno::EINTR) =
                waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            {}
        }
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
        child.wait()
    }
}

/// Takes the files over that a server hands to its keeper, until it ends.
fn collect(from: &Connection, holdings: &Holdings, survivor: &Survivor) -> Result<()> {
    let mut incoming = Incoming::default();
    loop {
        match incoming.receive(from, None)? {
            Came::Files(files) => holdings.add(files, survivor.files()?),
            Came::Done => holdings.forget_before(survivor.files()?),
            Came::Nothing => {}
            Came::End => return Ok(()),
        }
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
        let killed = ExitStatus::from_raw(9);
        let mut next = |mode, stopped, legacy: Legacy| keeper.next_mode(mode, stopped, &legacy, killed);
        assert_eq!(next(Mode::First, false, legacy()).unwrap(), Mode::Takeover);
        assert_eq!(next(Mode::First, true, legacy()).unwrap(), Mode::Finish);
        let poisoned = next(Mode::First, false, Legacy { poisoned: true, ..legacy() });
        assert_eq!(poisoned.unwrap_err().kind(), ErrorKind::Sync);
        assert!(next(Mode::First, true, Legacy { poisoned: true, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { incomplete: true, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { servers: 0, ..legacy() }).is_err());
        assert!(next(Mode::First, false, Legacy { agreement: None, ..legacy() }).is_err());
        assert!(next(Mode::Finish, false, legacy()).is_err());
    }

    #[test]
    fn deaths_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let killed = ExitStatus::from_raw(9);
        let died = |servers| Legacy { servers, ..legacy() };
        for servers in 1..=DEATHS_MAX as u64 {
            assert!(keeper.next_mode(Mode::Takeover, false, &died(servers), killed).is_ok());
        }
        assert!(keeper.next_mode(Mode::Takeover, false, &died(99), killed).is_err());
    }

    #[test]
    fn successors_that_never_serve_are_not_tried_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(folder.path());
        let failed = ExitStatus::from_raw(37 << 8);
        for _ in 0..FAILURES_MAX {
            assert!(keeper.next_mode(Mode::Takeover, false, &legacy(), failed).is_ok());
        }
        assert!(keeper.next_mode(Mode::Takeover, false, &legacy(), failed).is_err());
    }
}
