//! Snapshots of a served disk: made and deleted in the server, while the guest goes on.
//!
//! ```text
//! command                                  server
//! "snapshot", what ───────────────────►  prepares the new top
//!               ◄──────────────────────  {"ask": "sync" | "hook" | "freeze" | "thaw"}
//!                                        puts it under the disk
//!               ◄──────────────────────  the answer: the report or an error
//! ```
//!
//! As in a copy, everything that may wait for the mounted file system is done by the command: its sync, its freeze, its
//! thaw; its guardian thaws when it dies. Without a mounted file system, or when it is not to be frozen, there is nothing
//! to ask. Deleting is a [job](crate::job_service): it shows its progress, keeps a rate limit, and is cancelled with its
//! command. Both exclude each other, other jobs, and a copy of all deltas; not one of the content: what the guest sees does
//! not change.
//!
//! The server opens no path that a request names: the folder is that of the descriptor it serves.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pcopy::freeze::{LocalQuiesce, Quiesce, QuiesceOptions};
use pcopy::transport::Cancel;
use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{self, Entry, ImageFile, State};
use ploop_core::format::Guid;
use ploop_core::io::file::Caching;
use ploop_core::ops::DescriptorLock;
use ploop_core::ops::descriptor_lock::lock_timeout;
use ploop_core::ops::live::{self, DeleteOptions, MergeNewOptions, RunningBundle, SnapshotOptions, Writers};
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::copy_service::{Ask, RemoteQuiesce};
use crate::full_host::SpaceWatch;
use crate::job_service::{self, Company, Turns};
use crate::open;
use crate::output::Output;
use crate::progress::Job;

/// The verb that makes a snapshot.
pub(crate) const SNAPSHOT: &str = "snapshot";
/// The verb that deletes one.
pub(crate) const DELETE: &str = "snapshot-delete";

/// The verb that merges states into a new file.
pub(crate) const MERGE: &str = "snapshot-merge";

/// What may run beside these: all of them change which deltas there are.
pub(crate) const COMPANY: Company = Company::BesideCopyOfContent;

/// What a snapshot is asked for with.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SnapshotRequest {
    /// Its name; a new one if none. As text: a GUID.
    #[serde(default)]
    pub(crate) snapshot: Option<String>,
    /// It is to be deleted as soon as nobody uses it.
    #[serde(default)]
    pub(crate) temporary: bool,
}

/// What deleting is asked for with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DeleteRequest {
    /// Which.
    pub(crate) snapshot: String,
}

/// What a merge into a new file is asked for with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MergeRequest {
    /// The lowest of the states that become one. As text: a GUID.
    pub(crate) lower: String,
    /// The highest, which stays.
    pub(crate) upper: String,
    /// Name of the new file in the folder of the disk.
    pub(crate) file: String,
}

/// The file system above, as the command at the other end of the connection sees it.
struct RemoteWriters<'a>(RemoteQuiesce<'a>);

impl Writers for RemoteWriters<'_> {
    fn settle(&mut self) -> Result<()> {
        self.0.sync_file_system().map(drop)
    }

    fn stop(&mut self) -> Result<()> {
        self.0.run_hook()?;
        self.0.freeze_file_system()
    }

    fn go_on(&mut self) -> Result<()> {
        self.0.thaw()
    }
}

/// The snapshots of one served disk.
pub(crate) struct SnapshotService {
    disk: Arc<Disk>,
    entry: Entry,
    turns: Arc<Turns>,
}

impl SnapshotService {
    /// Snapshots of `disk`, whose record is in `entry`.
    pub(crate) fn new(disk: Arc<Disk>, entry: Entry, turns: Arc<Turns>) -> Self {
        Self { disk, entry, turns }
    }

    /// Makes one.
    pub(crate) fn snapshot(&self, connection: &Connection, arguments: Value) -> Result<Value> {
        let request: SnapshotRequest = serde_json::from_value(arguments).map_err(|cause| {
            Error::io(ErrorKind::Parameter, "read the request of a snapshot", cause.into())
        })?;
        let snapshot = request.snapshot.as_deref().map(str::parse::<Guid>).transpose()?;
        // Not cancelled when the disk is closed: it is done in moments, and waited for.
        let _turn = self.turns.job((SNAPSHOT, COMPANY), &Cancel::new()?)?;
        let (_lock, bundle) = self.bundle()?;
        let mut writers = RemoteWriters(RemoteQuiesce { connection });
        let options =
            SnapshotOptions { snapshot, temporary: request.temporary, ..SnapshotOptions::default() };
        let report = live::snapshot(&self.disk, &bundle, &mut writers, &options)?;
        self.remember()?;
        serde_json::to_value(&report)
            .map_err(|cause| Error::io(ErrorKind::System, "write the report of a snapshot", cause.into()))
    }

    /// Deletes one.
    pub(crate) fn delete(
        &self,
        connection: &Connection,
        arguments: Value,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Value> {
        job_service::serve(
            &self.turns,
            (DELETE, COMPANY),
            (connection, arguments, descriptors),
            |request: DeleteRequest, progress| {
                let options = DeleteOptions::new(request.snapshot.parse()?);
                let (_lock, bundle) = self.bundle()?;
                let report = live::delete(&self.disk, &bundle, progress, &options)?;
                self.remember()?;
                Ok(report)
            },
        )
    }

    /// Merges some into a new file.
    pub(crate) fn merge(
        &self,
        connection: &Connection,
        arguments: Value,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Value> {
        job_service::serve(
            &self.turns,
            (MERGE, COMPANY),
            (connection, arguments, descriptors),
            |request: MergeRequest, progress| {
                let (lower, upper) = (request.lower.parse()?, request.upper.parse()?);
                let (_lock, bundle) = self.bundle()?;
                let options = MergeNewOptions::new(lower, upper, request.file);
                let report = live::merge_new(&self.disk, &bundle, progress, &options)?;
                self.remember()?;
                Ok(report)
            },
        )
    }

    /// The files of the disk, for this command alone.
    fn bundle(&self) -> Result<(DescriptorLock, RunningBundle)> {
        let Some(descriptor) = self.entry.state()?.open.descriptor else {
            return Err(Error::new(
                ErrorKind::Parameter,
                "the disk was mounted from image files, which have no snapshots",
            )
            .advise("mount it by its DiskDescriptor.xml"));
        };
        let folder = descriptor.parent().unwrap_or(Path::new("/"));
        let lock = DescriptorLock::take(&descriptor, lock_timeout())?;
        Ok((lock, RunningBundle::open(folder, Caching::Direct)?))
    }

    /// Tells those who look for a disk by its images or its descriptor, which is another file now.
    fn remember(&self) -> Result<()> {
        let images = open::files_of(&self.disk.chain())?;
        let descriptor = self.entry.state()?.open.descriptor.map(|path| ImageFile::at(&path)).transpose()?;
        let update = |state: &mut State| {
            state.images = images;
            state.descriptor = descriptor.or(state.descriptor.take());
        };
        self.entry.update(update).map(drop)
    }
}

/// Lets the server of a disk make a snapshot, and does with the mounted file system what it asks; the report.
///
/// With `freezes`, a file system that is mounted from the disk is frozen for the moment of the snapshot.
pub(crate) fn ask_snapshot(
    state: &State,
    entry: &Entry,
    request: &SnapshotRequest,
    freezes: bool,
    output: &Output,
) -> Result<Value> {
    let path = state.descriptor.as_ref().map_or_else(|| entry.path(), |file| &file.path);
    let _watch =
        freezes.then(|| SpaceWatch::begin(entry, path, "the snapshot", false, *output)).transpose()?;
    // All mount points of one device show one file system, which can be frozen only once.
    let mount_point: Option<PathBuf> = match state.loop_device.as_deref().filter(|_| freezes) {
        Some(device) => runtime::mount_points_of(device)?.into_iter().next(),
        None => None,
    };
    let options = QuiesceOptions {
        mount_points: mount_point.into_iter().collect(),
        guardian: true,
        ..QuiesceOptions::default()
    };
    let mut quiesce = LocalQuiesce::new(options, None)?;
    let connection = crate::serving::connect(entry)?;
    connection.request(SNAPSHOT, request, &[])?;
    connection.answer(SNAPSHOT, None, |message| {
        if let Ok(ask) = serde_json::from_value::<Ask>(message) {
            // A server that does not take the reply is gone, which the wait for its answer finds out.
            let _ = connection.send(&ask.obey(&mut quiesce), &[]);
        }
    })
}

/// Lets the server of a disk delete a snapshot, and shows how far it is; the report.
pub(crate) fn ask_delete(entry: &Entry, snapshot: &str, job: &Job) -> Result<Value> {
    job_service::ask(entry, DELETE, &DeleteRequest { snapshot: snapshot.to_owned() }, job)
}

/// Lets the server of a disk merge states into a new file, and shows how far it is; the report.
pub(crate) fn ask_merge(entry: &Entry, request: &MergeRequest, job: &Job) -> Result<Value> {
    job_service::ask(entry, MERGE, request, job)
}
