//! The server's side of having a keeper: signs of life for it, and what is done when it dies.
//!
//! Without a keeper no successor would follow a dead server, and what it had acknowledged and not yet written to the table
//! would be lost (K5). So a server that finds its keeper gone writes everything out at once, starts another keeper, to which
//! it hands the FUSE descriptor, the survivor memory and the files, and until that one is there it writes out whatever
//! becomes pending.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::fuse::survivor::Survivor;
use ploop_core::device::fuse::sys;
use ploop_core::{Error, ErrorKind, Result};

use crate::output::Output;

/// How often the keeper is told that the server runs.
const BEAT: Duration = Duration::from_millis(500);
/// How often a server without a keeper looks for what became pending.
const FLUSH: Duration = Duration::from_millis(20);
/// Pause before another keeper is tried after one that could not be started or has died soon.
const KEEPER_RETRY: Duration = Duration::from_secs(2);

/// What a server hands to a new keeper.
pub(crate) struct Guarded {
    pub(crate) disk: Arc<Disk>,
    pub(crate) survivor: Arc<Survivor>,
    pub(crate) fuse: OwnedFd,
    /// The connection to the keeper.
    pub(crate) keeper: Connection,
    /// The command line of a keeper behind the program's name.
    pub(crate) keeper_line: Vec<std::ffi::OsString>,
    /// What is served, for the name of the process.
    pub(crate) name: std::path::PathBuf,
    /// Whether there is no keeper.
    pub(crate) unguarded: Arc<AtomicBool>,
    pub(crate) output: Output,
}

/// The name under which a process of ours is listed.
pub(crate) fn process_name(kind: &str, disk: &Path) -> String {
    format!("ploop-{kind}: {}", disk.display())
}

/// What `ps` and `top` call this process where they show no arguments: at most 15 bytes. Without it goes as well.
pub(crate) fn name_process(name: &std::ffi::CStr) {
    let _ = nix::sys::prctl::set_name(name);
}

impl Guarded {
    /// Does all that in a thread of its own, as long as the process lives.
    pub(crate) fn start(mut self) -> Result<()> {
        std::thread::Builder::new()
            .name("guarding".into())
            .spawn(move || self.run())
            .map(drop)
            .map_err(|cause| Error::io(ErrorKind::System, "start the guarding thread", cause))
    }

    fn run(&mut self) {
        let mut started: Option<(Child, Instant)> = None;
        loop {
            // A keeper that cannot be told has the memory no more than this server.
            let _ = self.survivor.beat();
            if !self.keeper.wait_closed(BEAT) {
                continue;
            }
            self.unguarded.store(true, Ordering::SeqCst);
            self.output.warn("the keeper is gone: everything is written out, and another one is started");
            self.flush();
            if let Some((mut keeper, since)) = started.take() {
                // Reaped; a keeper that dies as soon as it runs is not started in a circle.
                let _ = keeper.kill();
                let _ = keeper.wait();
                self.flush_until(since + KEEPER_RETRY);
            }
            started = Some(loop {
                match self.start_keeper() {
                    Ok(keeper) => break (keeper, Instant::now()),
                    Err(error) => {
                        self.output.error(&error);
                        self.flush_until(Instant::now() + KEEPER_RETRY);
                    }
                }
            });
            self.unguarded.store(false, Ordering::SeqCst);
        }
    }

    /// A failure poisons the disk, which every later flush of the guest reports.
    fn flush(&self) {
        if !self.disk.is_read_only() && !self.disk.is_poisoned() {
            let _ = self.disk.flush();
        }
    }

    fn flush_until(&self, end: Instant) {
        while Instant::now() < end {
            if self.disk.chain().pending() > 0 {
                self.flush();
            }
            let _ = self.survivor.beat();
            std::thread::sleep(FLUSH);
        }
    }

    fn start_keeper(&mut self) -> Result<Child> {
        let failed = |operation: &str, cause: std::io::Error| {
            Error::io(ErrorKind::System, operation.to_owned(), cause)
        };
        let (own, theirs) = Connection::pair()?;
        let process = sys::own_process().map_err(|cause| failed("name this process to a keeper", cause))?;
        let passed = [self.fuse.as_fd(), self.survivor.file().as_fd(), theirs.descriptor(), process.as_fd()];
        let numbers: Vec<String> = passed.iter().map(|passed| passed.as_raw_fd().to_string()).collect();
        let mut command = Command::new("/proc/self/exe");
        std::os::unix::process::CommandExt::arg0(&mut command, process_name("keeper", &self.name));
        command.args(&self.keeper_line).arg("--adopt").arg(numbers.join(",")).stdin(Stdio::null());
        let set = |on: bool| -> std::io::Result<()> {
            passed.iter().try_for_each(|passed: &BorrowedFd<'_>| sys::set_inheritable(passed, on))
        };
        set(true).map_err(|cause| failed("pass descriptors to a keeper", cause))?;
        let child = command.spawn();
        set(false).map_err(|cause| failed("keep descriptors", cause))?;
        let child = child.map_err(|cause| failed("start a keeper", cause))?;
        self.survivor.hand_files_anew(own.try_clone()?, &self.disk.chain())?;
        self.keeper = own;
        Ok(child)
    }
}
