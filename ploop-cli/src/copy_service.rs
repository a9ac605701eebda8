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
//! When the command dies or cancels, the [leash](crate::leash) is cut, the copy unwinds, and the gate opens; the command's
//! guardian thaws the file system.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pcopy::freeze::Quiesce;
use pcopy::source::DiskSource;
use pcopy::source_chain::BundleSnapshots;
use pcopy::stats::{Event, SendReport};
use pcopy::transport::{Cancel, Link};
use pcopy::{Observer, SendOptions, send, send_chain, send_original};
use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Entry, Failure, OpenRequest};
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::job_service::{Cargo, Turns};
use crate::{full_host, leash};

/// The verb of the control socket.
pub(crate) const VERB: &str = "copy";
/// The verb of a copy delta by delta: another one, so that a server that knows none refuses it rather than sends the
/// content alone.
pub(crate) const CHAIN_VERB: &str = "copy-chain";

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
    /// The stream is the original's.
    #[serde(default)]
    pub(crate) is_original: bool,
}

/// What is sent of an open disk.
pub(crate) enum Freight {
    /// What the guest sees.
    Content(DiskSource),
    /// Every delta: those of the snapshots, and that of the current state.
    Deltas(Box<BundleSnapshots>, DiskSource),
}

impl Freight {
    /// What of `disk` is sent: its deltas if it is known by which descriptor, else its content.
    pub(crate) fn of(disk: &Arc<Disk>, descriptor_of_all: Option<&Path>) -> Result<Self> {
        Ok(match descriptor_of_all {
            None => Self::Content(DiskSource::new(disk)?),
            Some(descriptor) => {
                let snapshots = Box::new(BundleSnapshots::open(descriptor, &disk.chain())?);
                Self::Deltas(snapshots, DiskSource::delta(disk)?)
            }
        })
    }
}

/// The descriptor of a disk, all of whose deltas are to be sent.
pub(crate) fn descriptor_of_all(request: &OpenRequest) -> Result<PathBuf> {
    request.descriptor.clone().ok_or_else(|| {
        Error::new(ErrorKind::Parameter, "only a disk with a descriptor has snapshots").advise(
            "give its DiskDescriptor.xml, or mount it by that; or copy the content alone, without --chain",
        )
    })
}

impl Wishes {
    /// Sends as it is wanted.
    pub(crate) fn send(
        &self,
        freight: &mut Freight,
        quiesce: &mut dyn Quiesce,
        link: Link,
        cancel: Cancel,
        observer: &dyn Observer,
    ) -> Result<SendReport> {
        let options = self.send_options(cancel);
        match freight {
            Freight::Content(source) if self.is_original => {
                send_original(source, quiesce, link, &options, observer)
            }
            Freight::Content(source) => send(source, quiesce, link, &options, observer),
            Freight::Deltas(snapshots, source) => {
                send_chain(&mut **snapshots, source, quiesce, link, &options, observer)
            }
        }
    }

    /// The options of the sender.
    fn send_options(&self, cancel: Cancel) -> SendOptions {
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
pub(crate) struct RemoteQuiesce<'a> {
    pub(crate) connection: &'a Connection,
}

impl RemoteQuiesce<'_> {
    fn ask(&self, ask: Ask) -> Result<bool> {
        self.connection.send(&ask, &[])?;
        let Some(message) = self.connection.receive(None)? else {
            return Err(Error::new(ErrorKind::Cancelled, "the command that asked for it is gone"));
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
    entry: Entry,
    turns: Arc<Turns>,
}

impl CopyService {
    /// Copies of `disk`, whose record is in `entry`; `turns` says what else may run.
    pub(crate) fn new(disk: Arc<Disk>, entry: Entry, turns: Arc<Turns>) -> Self {
        Self { disk, entry, turns }
    }

    /// Serves one request for a copy of that, to its end.
    pub(crate) fn serve(
        &self,
        cargo: Cargo,
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
        full_host::refuse_while_waiting(&self.disk)?;
        let cancel = Cancel::new()?;
        let _turn = self.turns.copy(cargo, &cancel)?;
        leash::watch(leash, cancel.clone())?;
        let observer = |event: &Event| {
            if connection.send(event, &[]).is_err() {
                cancel.cancel();
            }
        };
        let descriptor = match cargo {
            Cargo::Content => None,
            Cargo::Deltas if request.wishes.is_original => {
                return Err(Error::new(ErrorKind::Parameter, "the original's stream takes no snapshots"));
            }
            Cargo::Deltas => Some(descriptor_of_all(&self.entry.state()?.open)?),
        };
        let mut freight = Freight::of(&self.disk, descriptor.as_deref())?;
        let link = Link { input, output: Some(output) };
        let mut quiesce = RemoteQuiesce { connection };
        let report = request.wishes.send(&mut freight, &mut quiesce, link, cancel.clone(), &observer)?;
        to_value(&report)
    }
}

/// The figures as they go over the socket.
pub(crate) fn to_value(report: &SendReport) -> Result<Value> {
    serde_json::to_value(report)
        .map_err(|cause| Error::io(ErrorKind::System, "write the figures of the copy", cause.into()))
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
}
