//! Snapshots of a served disk: made and deleted in the server, while the guest goes on.
//!
//! ```text
//! command                                  server                        helper
//! "snapshot", what, helper ───────────►  prepares the new top      ──►  sync, freeze
//!                                        puts it under the disk    ──►  thaw
//!               ◄──────────────────────  the answer: the report or an error
//! ```
//!
//! As in a copy, everything that may wait for the mounted file system is done by the [helper](crate::freeze_service) that
//! comes with the request. Without a mounted file system, or when it is not to be frozen, there is none. Deleting is a [job](crate::job_service): it shows its progress, keeps a rate limit, and is cancelled with its
//! command. Both exclude each other, other jobs, and a copy of all deltas; not one of the content: what the guest sees does
//! not change.
//!
//! The server opens no path that a request names: the folder is that of the descriptor it serves.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pcopy::freeze::{HelperTicket, Quiesce, StandstillLimits};
use pcopy::transport::Cancel;
use ploop_core::device::Disk;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Entry, State};
use ploop_core::format::{DESCRIPTOR_NAME, Guid};
use ploop_core::io::file::{Caching, DirectoryFolder};
use ploop_core::io::identity;
use ploop_core::ops::DescriptorLock;
use ploop_core::ops::descriptor_lock::lock_timeout;
use ploop_core::ops::live::{self, DeleteOptions, MergeNewOptions, RunningBundle, SnapshotOptions, Writers};
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::freeze_service;
use crate::full_host::SpaceWatch;
use crate::job_service::{self, Company, Turns};
use crate::open;
use crate::output::Output;
use crate::progress::Job;
use crate::quiesce::{Allowed, AsOf, Standing};

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
    /// Who freezes and thaws, whose connection comes along; [`Writing::GoOn`] when nothing is to be frozen. Nothing at
    /// all is what a command of another version says, which would freeze by itself.
    #[serde(default)]
    pub(crate) writing: Option<Writing>,
}

/// What becomes of the writers during a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Writing {
    /// They go on.
    GoOn,
    /// This helper stops them.
    StopBy(HelperTicket),
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

/// The longest that a file system may stand still for a snapshot, which takes moments.
const STANDSTILL_MAX_MS: u64 = 60_000;

/// The file system above, as the helper holds it.
struct HelpedWriters<'a>(&'a mut dyn Quiesce);

impl Writers for HelpedWriters<'_> {
    fn settle(&mut self) -> Result<()> {
        self.0.sync_file_system().map(drop)
    }

    fn stop(&mut self) -> Result<()> {
        self.0.set_limits(StandstillLimits { abandoned_ms: Some(STANDSTILL_MAX_MS), ..Default::default() });
        self.0.run_hook()?;
        self.0.freeze_file_system()
    }

    fn confirm(&mut self) -> Result<()> {
        self.0.confirm()
    }

    fn go_on(&mut self) -> Result<()> {
        self.0.thaw()
    }
}

/// The snapshots of one served disk.
pub(crate) struct SnapshotService {
    disk: Arc<Disk>,
    entry: Entry,
    /// The folder of the descriptor, if there is one.
    folder: Option<Arc<DirectoryFolder>>,
    turns: Arc<Turns>,
}

impl SnapshotService {
    /// Snapshots of `disk`, whose record is in `entry` and whose descriptor is in `folder`.
    pub(crate) fn new(
        disk: Arc<Disk>,
        entry: Entry,
        folder: Option<Arc<DirectoryFolder>>,
        turns: Arc<Turns>,
    ) -> Self {
        Self { disk, entry, folder, turns }
    }

    /// Makes one.
    pub(crate) fn snapshot(&self, arguments: Value, descriptors: Vec<OwnedFd>) -> Result<Value> {
        let request: SnapshotRequest = serde_json::from_value(arguments).map_err(|cause| {
            Error::io(ErrorKind::Parameter, "read the request of a snapshot", cause.into())
        })?;
        let snapshot = request.snapshot.as_deref().map(str::parse::<Guid>).transpose()?;
        let helper = match (request.writing, descriptors.into_iter().next()) {
            (Some(Writing::GoOn), None) => None,
            (Some(Writing::StopBy(ticket)), Some(helper)) => Some((ticket, helper)),
            _ => {
                return Err(Error::new(
                    ErrorKind::Parameter,
                    "the command is of another version than the server of the disk",
                )
                .advise("use the version that the disk was mounted with, or mount it again"));
            }
        };
        // Not cancelled when the disk is closed: it is done in moments, and waited for.
        let _turn = self.turns.job((SNAPSHOT, COMPANY), &Cancel::new()?)?;
        let (_lock, bundle) = self.bundle()?;
        let mut quiesce = freeze_service::attend(&self.entry, helper, None);
        let mut writers = HelpedWriters(&mut *quiesce);
        let options =
            SnapshotOptions { snapshot, temporary: request.temporary, ..SnapshotOptions::default() };
        let report = live::snapshot(&self.disk, &bundle, &mut writers, &options)?;
        self.remember();
        if let Some(standing) = report.not_thawed {
            let message = format!("the snapshot {} is made, but the disk still stands", report.snapshot);
            let advice = standing.advice().unwrap_or("thaw it: ploop thaw DISK").to_owned();
            return Err(Error::new(ErrorKind::NotQuiet, message).advise(advice).caused_by(standing));
        }
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
                self.remember();
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
                self.remember();
                Ok(report)
            },
        )
    }

    /// The files of the disk, for this command alone.
    fn bundle(&self) -> Result<(DescriptorLock, RunningBundle)> {
        let Some(folder) = &self.folder else {
            return Err(Error::new(
                ErrorKind::Parameter,
                "the disk was mounted from image files, which have no snapshots",
            )
            .advise("mount it by its DiskDescriptor.xml"));
        };
        // The folder itself, wherever it is by now: its path may lead to another one.
        let descriptor = identity::path_of(folder.as_fd()).join(DESCRIPTOR_NAME);
        let lock = DescriptorLock::take(&descriptor, lock_timeout())
            .map_err(|error| error.at_path(folder.path().join(DESCRIPTOR_NAME)))?;
        Ok((lock, RunningBundle::of(folder, Caching::Direct)?))
    }

    /// Tells those who look for a disk by its images or its descriptor, which is another file now. The change is made:
    /// where it cannot be told, that is no failure of it.
    fn remember(&self) {
        let Ok(images) = open::files_of(&self.disk.chain()) else { return };
        let descriptor = open::descriptor_in(self.folder.as_deref());
        let update = |state: &mut State| {
            state.images = images;
            state.descriptor = descriptor.or(state.descriptor.take());
        };
        let _untold = self.entry.update(update);
    }
}

/// Lets the server of a disk make a snapshot; the report.
///
/// The report says as of what the snapshot is.
pub(crate) fn ask_snapshot(
    state: &State,
    entry: &Entry,
    mut request: SnapshotRequest,
    allowed: Allowed,
    output: &Output,
) -> Result<Value> {
    let path = state.descriptor.as_ref().map_or_else(|| entry.path(), |file| &file.path);
    let _watch = (!allowed.no_freeze)
        .then(|| SpaceWatch::begin(entry, path, "the snapshot", false, *output))
        .transpose()?;
    let (options, claim) = Standing::find(Some(state), allowed)?.split();
    let helper = freeze_service::start(options, Some((state, entry)), &[])?;
    request.writing =
        Some(helper.as_ref().map_or(Writing::GoOn, |helper| Writing::StopBy(helper.ticket.clone())));
    let connection = crate::serving::connect(entry)?;
    let descriptors: Vec<_> = helper.iter().map(|helper| helper.connection.as_fd()).collect();
    connection.request(SNAPSHOT, &request, &descriptors)?;
    // The server has it now; kept here, the helper would not see the server's end.
    drop(descriptors);
    drop(helper);
    let mut report = connection
        .answer(SNAPSHOT, None, |message| freeze_service::refuse_old_server(&connection, &message))?;
    claim.tell(&mut report);
    if claim.as_of == AsOf::CrashConsistent {
        output.warn(&format!(
            "the snapshot is crash-consistent, as after a power loss: {}",
            claim.details.join("; ")
        ));
    }
    Ok(report)
}

/// Lets the server of a disk delete a snapshot, and shows how far it is; the report.
pub(crate) fn ask_delete(entry: &Entry, snapshot: &str, job: &Job) -> Result<Value> {
    job_service::ask(entry, DELETE, &DeleteRequest { snapshot: snapshot.to_owned() }, job)
}

/// Lets the server of a disk merge states into a new file, and shows how far it is; the report.
pub(crate) fn ask_merge(entry: &Entry, request: &MergeRequest, job: &Job) -> Result<Value> {
    job_service::ask(entry, MERGE, request, job)
}
