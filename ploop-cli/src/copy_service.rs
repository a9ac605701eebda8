//! The copy of a served disk: it runs in the server, and the command that asked for it looks on.
//!
//! ```text
//! command                                        server
//! request, descriptors (stream, answers,       ──►  copies, in the thread of the control connection
//! leash, helper)                               ◄──  events, as far as somebody reads them
//! done or failed                               ◄──  the answer: figures or an error
//! ```
//!
//! Bits and data are never in two processes: the server owns the disk, reads it and writes the stream. Everything that
//! may wait for the mounted file system (its sync, its freeze) is done by the [helper](crate::freeze_service) that the
//! command has started, in the operator's folder and environment, and whose connection it gives away with the request:
//! the command only looks on, and may be stopped.
//!
//! When the command dies or cancels, the [leash](crate::leash) is cut, the copy unwinds, the gate opens, and the helper
//! thaws the file system. When the helper dies, another process thaws.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pcopy::freeze::{HelperTicket, Quiesce};
use pcopy::source::DiskSource;
use pcopy::source_chain::BundleSnapshots;
use pcopy::stats::{Event, SendReport};
use pcopy::transport::{Cancel, Link};
use pcopy::{Observer, SendOptions, send, send_chain, send_original};
use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Entry, OpenRequest};
use ploop_core::io::file::DirectoryFolder;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::job_service::{Cargo, Turns};
use crate::{freeze_service, full_host, leash, open};

/// The verb of the control socket.
pub(crate) const VERB: &str = "copy";
/// The verb of a copy delta by delta: another one, so that a server that knows none refuses it rather than sends the
/// content alone.
pub(crate) const CHAIN_VERB: &str = "copy-chain";

/// Among the figures: events that nobody read in time.
pub(crate) const EVENTS_DROPPED: &str = "events_dropped";

/// What a copy is asked for with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CopyRequest {
    /// Whether the receiver's answers can be read from the second descriptor.
    pub(crate) two_way: bool,
    /// What the operator wants of it.
    pub(crate) wishes: Wishes,
    /// Who freezes and thaws: its connection is the last descriptor. `None`: nothing is to be frozen.
    #[serde(default)]
    pub(crate) helper: Option<HelperTicket>,
}

/// What the operator wants of a copy; what is not said is decided by the copy.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Wishes {
    /// Names the copy.
    #[serde(default)]
    pub(crate) copy_id: Option<[u8; 16]>,
    /// Never freeze for longer.
    pub(crate) freeze_ms_max: Option<u64>,
    /// From the start of the freeze command to the end of the thaw.
    #[serde(default)]
    pub(crate) outage_ms_max: Option<u64>,
    /// A freeze that turns out too long is tried again also when that runs the freeze command once more.
    #[serde(default)]
    pub(crate) retry_hooks: bool,
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
    /// Writers that nothing has stopped are held at the disk for the last pass.
    #[serde(default)]
    pub(crate) is_crash_consistent: bool,
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
        if let Some(id) = self.copy_id {
            options.copy_id = id;
        }
        options.convergence.freeze_ms_max = self.freeze_ms_max;
        options.is_crash_consistent = self.is_crash_consistent;
        options.convergence.outage_ms_max = self.outage_ms_max;
        options.retry_hooks = self.retry_hooks;
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

/// The copies of one served disk: one at a time.
pub(crate) struct CopyService {
    disk: Arc<Disk>,
    /// The folder of the descriptor, if there is one.
    entry: Entry,
    folder: Option<Arc<DirectoryFolder>>,
    turns: Arc<Turns>,
}

impl CopyService {
    /// Copies of `disk`, whose record is in `entry` and whose descriptor in `folder`; `turns` says what else may run.
    pub(crate) fn new(
        disk: Arc<Disk>,
        entry: Entry,
        folder: Option<Arc<DirectoryFolder>>,
        turns: Arc<Turns>,
    ) -> Self {
        Self { disk, entry, folder, turns }
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
        let (output, leash) = (output, descriptors.next());
        let helper = if request.helper.is_some() { descriptors.next() } else { None };
        let (Some(output), Some(leash), true, None) =
            (output, leash, helper.is_some() == request.helper.is_some(), descriptors.next())
        else {
            return Err(Error::new(ErrorKind::Parameter, "a copy came with other descriptors than it needs")
                .advise("the command and the server of the disk are of different versions: use that of the server, or mount again"));
        };
        full_host::refuse_while_waiting(&self.disk)?;
        let cancel = Cancel::new()?;
        // First, so that it is let go whatever fails.
        let mut quiesce = freeze_service::attend(&self.entry, request.helper.zip(helper), Some(&cancel));
        let _turn = self.turns.copy(cargo, &cancel)?;
        leash::watch(leash, cancel.clone())?;
        let dropped = AtomicU64::new(0);
        let observer = |event: &Event| {
            // Whoever looks on and does not read is not waited for: the disk may be frozen. What decides what may be said
            // of a failed copy is never dropped; these are few, and room is left for them.
            let decides =
                matches!(event, Event::Started { .. } | Event::Sealed { .. } | Event::Failed { .. });
            let sent = if decides {
                connection.send(event, &[]).map(|()| true)
            } else {
                connection.send_unless_full(event)
            };
            match sent {
                Ok(true) => {}
                Ok(false) => {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => cancel.cancel(),
            }
        };
        let descriptor = match cargo {
            Cargo::Content => None,
            Cargo::Deltas if request.wishes.is_original => {
                return Err(Error::new(ErrorKind::Parameter, "the original's stream takes no snapshots"));
            }
            Cargo::Deltas => {
                let descriptor = open::descriptor_in(self.folder.as_deref()).map(|file| file.path);
                Some(descriptor_of_all(&OpenRequest { descriptor, ..OpenRequest::default() })?)
            }
        };
        let mut freight = Freight::of(&self.disk, descriptor.as_deref())?;
        let link = Link { input, output: Some(output) };
        let report = request.wishes.send(&mut freight, &mut *quiesce, link, cancel.clone(), &observer)?;
        let mut figures = to_value(&report)?;
        let dropped = dropped.load(Ordering::Relaxed);
        if let (Value::Object(figures), 1..) = (&mut figures, dropped) {
            figures.insert(EVENTS_DROPPED.to_owned(), dropped.into());
        }
        Ok(figures)
    }
}

/// The figures as they go over the socket.
pub(crate) fn to_value(report: &SendReport) -> Result<Value> {
    serde_json::to_value(report)
        .map_err(|cause| Error::io(ErrorKind::System, "write the figures of the copy", cause.into()))
}
