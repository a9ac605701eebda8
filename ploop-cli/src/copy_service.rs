//! The copy of a served disk: it runs in the server, and the command that asked for it looks on.
//!
//! ```text
//! command                                        server
//! request, descriptors (stream, answers, leash) ──►  copies, in the thread of the control connection
//!                                               ◄──  events
//!                                               ◄──  {"ask": "sync" | "hook" | "freeze" | "thaw"}
//! done or failed                                ──►
//!                                               ◄──  the answer: figures or an error
//! ```
//!
//! Bits and data are never in two processes: the server owns the disk, reads it and writes the stream. Everything that
//! may wait for the mounted file system (its sync, its freeze) is done by the command, in the operator's environment:
//! a server that waited for a file system that waits for the server could not even be killed.
//!
//! The leash is a pipe that only the command holds the other end of. When the command dies or cancels, the leash
//! closes, the copy unwinds, and the gate opens; the command's guardian thaws the file system.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcopy::freeze::Quiesce;
use pcopy::source::DiskSource;
use pcopy::stats::{Event, SendReport};
use pcopy::transport::{Cancel, Link};
use pcopy::{SendOptions, send};
use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::Failure;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The verb of the control socket.
pub(crate) const VERB: &str = "copy";

/// What a copy is asked for with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CopyRequest {
    /// Whether the receiver's answers can be read from the second descriptor.
    pub(crate) two_way: bool,
    /// What the operator wants of it.
    pub(crate) wishes: Wishes,
}

/// What the operator wants of a copy; what is not said is decided by the copy.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Wishes {
    /// Never freeze for longer, by prediction.
    pub(crate) freeze_ms_max: Option<u64>,
    /// Passes before the freeze.
    pub(crate) passes_max: Option<u32>,
    /// How long the other end may be silent.
    pub(crate) stall_timeout_s: Option<u64>,
    /// How much longer than predicted the disk may stay frozen.
    #[serde(default)]
    pub(crate) freeze_stall_timeout_s: Option<u64>,
}

impl Wishes {
    /// The options of the sender.
    pub(crate) fn send_options(&self, cancel: Cancel) -> SendOptions {
        let mut options = SendOptions { cancel: Some(cancel), ..SendOptions::default() };
        options.convergence.freeze_ms_max = self.freeze_ms_max;
        if let Some(passes) = self.passes_max {
            options.convergence.passes_max = passes;
        }
        if let Some(seconds) = self.stall_timeout_s {
            options.stall_timeout = Duration::from_secs(seconds);
        }
        if let Some(seconds) = self.freeze_stall_timeout_s {
            options.freeze_stall_timeout = Duration::from_secs(seconds);
        }
        options
    }
}

/// What the server asks the command to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(crate) enum Ask {
    /// Sync the mounted file systems.
    Sync,
    /// Run the freeze command.
    Hook,
    /// Freeze the mounted file systems.
    Freeze,
    /// Undo both.
    Thaw,
}

/// How that went.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Done; of a sync: whether anything is mounted.
    Done(bool),
    /// Not done.
    Failed(Failure),
}

impl Ask {
    /// Does what is asked.
    pub(crate) fn obey(self, quiesce: &mut dyn Quiesce) -> Reply {
        let done = match self {
            Self::Sync => quiesce.sync_file_system(),
            Self::Hook => quiesce.run_hook().map(|()| true),
            Self::Freeze => quiesce.freeze_file_system().map(|()| true),
            Self::Thaw => quiesce.thaw().map(|()| true),
        };
        done.map_or_else(|error| Reply::Failed(Failure::of(&error)), Reply::Done)
    }
}

/// Writers are stopped by the command at the other end of the connection.
struct RemoteQuiesce<'a> {
    connection: &'a Connection,
}

impl RemoteQuiesce<'_> {
    fn ask(&self, ask: Ask) -> Result<bool> {
        self.connection.send(&ask, &[])?;
        let Some(message) = self.connection.receive(None)? else {
            return Err(Error::new(ErrorKind::Cancelled, "the command that asked for the copy is gone"));
        };
        match serde_json::from_value(message.body) {
            Ok(Reply::Done(done)) => Ok(done),
            Ok(Reply::Failed(failure)) => Err(failure.into_error()),
            Err(cause) => Err(Error::io(ErrorKind::Protocol, "read the command's reply", cause.into())),
        }
    }
}

impl Quiesce for RemoteQuiesce<'_> {
    fn sync_file_system(&mut self) -> Result<bool> {
        self.ask(Ask::Sync)
    }

    fn run_hook(&mut self) -> Result<()> {
        self.ask(Ask::Hook).map(drop)
    }

    fn freeze_file_system(&mut self) -> Result<()> {
        self.ask(Ask::Freeze).map(drop)
    }

    fn thaw(&mut self) -> Result<()> {
        match self.ask(Ask::Thaw) {
            // Its guardian thaws, and nobody is left to be told.
            Err(_) if self.connection.is_closed() => Ok(()),
            thawed => thawed.map(drop),
        }
    }
}

/// The copies of one served disk: one at a time.
pub(crate) struct CopyService {
    disk: Arc<Disk>,
    is_running: AtomicBool,
}

/// The place of the one copy; given back on drop.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl CopyService {
    /// Copies of `disk`.
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self { disk, is_running: AtomicBool::new(false) }
    }

    /// Serves one request, to its end.
    pub(crate) fn serve(
        &self,
        connection: &Connection,
        arguments: Value,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Value> {
        let request: CopyRequest = serde_json::from_value(arguments)
            .map_err(|cause| Error::io(ErrorKind::Parameter, "read the request of a copy", cause.into()))?;
        let mut descriptors = descriptors.into_iter();
        let output = descriptors.next();
        let input = if request.two_way { descriptors.next() } else { None };
        let (Some(output), Some(leash), None) = (output, descriptors.next(), descriptors.next()) else {
            return Err(Error::new(ErrorKind::Parameter, "a copy came with other descriptors than it needs"));
        };
        if self.is_running.swap(true, Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "another copy of this disk is running")
                .advise("wait for its end, or end it; this one has changed nothing"));
        }
        let _turn = Turn(&self.is_running);
        let cancel = Cancel::new()?;
        watch(leash, cancel.clone())?;
        let observer = |event: &Event| {
            if connection.send(event, &[]).is_err() {
                cancel.cancel();
            }
        };
        let mut source = DiskSource::new(&self.disk)?;
        let link = Link { input, output: Some(output) };
        let options = request.wishes.send_options(cancel.clone());
        let report = send(&mut source, &mut RemoteQuiesce { connection }, link, &options, &observer)?;
        to_value(&report)
    }
}

/// The figures as they go over the socket.
pub(crate) fn to_value(report: &SendReport) -> Result<Value> {
    serde_json::to_value(report)
        .map_err(|cause| Error::io(ErrorKind::System, "write the figures of the copy", cause.into()))
}

/// Cancels the copy when the other end of the leash is closed. The thread ends with the command, at the latest.
fn watch(leash: OwnedFd, cancel: Cancel) -> Result<()> {
    let watch = move || {
        wait_for_hangup(leash.as_fd());
        cancel.cancel();
    };
    std::thread::Builder::new()
        .name("copy-leash".into())
        .spawn(watch)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that watches the command", cause))
}

fn wait_for_hangup(pipe: BorrowedFd<'_>) {
    loop {
        let mut descriptors = [PollFd::new(pipe, PollFlags::empty())];
        match poll(&mut descriptors, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR)
                if descriptors[0].revents().unwrap_or(PollFlags::empty()).is_empty() => {}
            // Hung up, or unusable: either way there is no leash any more.
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<Ask>);

    impl Quiesce for Recorder {
        fn sync_file_system(&mut self) -> Result<bool> {
            self.0.push(Ask::Sync);
            Ok(false)
        }
        fn run_hook(&mut self) -> Result<()> {
            self.0.push(Ask::Hook);
            Ok(())
        }
        fn freeze_file_system(&mut self) -> Result<()> {
            self.0.push(Ask::Freeze);
            Err(Error::new(ErrorKind::NotQuiet, "no").advise("try"))
        }
        fn thaw(&mut self) -> Result<()> {
            self.0.push(Ask::Thaw);
            Ok(())
        }
    }

    #[test]
    fn the_command_does_what_the_server_asks() {
        let (server, command) = Connection::pair().unwrap();
        let asked = std::thread::spawn(move || {
            let mut recorder = Recorder::default();
            while let Some(message) = command.receive(None).unwrap() {
                let ask: Ask = serde_json::from_value(message.body).unwrap();
                command.send(&ask.obey(&mut recorder), &[]).unwrap();
                if ask == Ask::Thaw {
                    break;
                }
            }
            recorder.0
        });
        let mut remote = RemoteQuiesce { connection: &server };
        assert!(!remote.sync_file_system().unwrap());
        remote.run_hook().unwrap();
        let refused = remote.freeze_file_system().unwrap_err();
        assert_eq!((refused.kind(), refused.advice()), (ErrorKind::NotQuiet, Some("try")));
        remote.thaw().unwrap();
        assert_eq!(asked.join().unwrap(), [Ask::Sync, Ask::Hook, Ask::Freeze, Ask::Thaw]);
        // The command is gone: nothing hangs, and a thaw is its guardian's matter.
        assert!(remote.run_hook().is_err());
        remote.thaw().unwrap();
    }

    #[test]
    fn a_cut_leash_cancels() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let cancel = Cancel::new().unwrap();
        watch(read, cancel.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!cancel.is_cancelled());
        drop(write);
        for _ in 0..500 {
            if cancel.is_cancelled() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the copy was not cancelled");
    }
}
