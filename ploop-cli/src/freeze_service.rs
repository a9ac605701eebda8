//! Freezing and thawing a disk of this machine: which file systems, by which process, and what if that one is gone.
//!
//! A command that wants a disk frozen starts a [helper](pcopy::freeze::helper) and gives it away to the server that
//! serves the disk. What stands still is written down in the run-time folder of the disk before it does. If the helper
//! is lost, the server has another process, `ploop thaw ID`, thaw what is written down; a successor of the server looks
//! for it when it starts, and so can everybody at any time.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pcopy::freeze::helper::Rescue;
use pcopy::freeze::{
    FreezeRecord, Helper, HelperQuiesce, HelperTicket, NothingToQuiesce, Quiesce, QuiesceOptions,
    thaw_recorded,
};
use pcopy::transport::Cancel;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Entry, Failure, RUN_DIR_VARIABLE, State};
use ploop_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::output::Output;
use crate::quiesce;

/// How long a helper whose server is gone may take to thaw by itself.
const HELPER_THAWS_MAX: Duration = Duration::from_secs(5);
/// How long the process that thaws is waited for by a server; it goes on by itself.
const RESCUE_MAX: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(10);

/// Starts a helper, if there is anything to freeze or to run. Its commands find these variables, and `PLOOP_MOUNT`.
pub(crate) fn start(
    mut options: QuiesceOptions,
    served: Option<(&State, &Entry)>,
    variables: &[(&str, OsString)],
) -> Result<Option<Helper>> {
    let stops_something = !options.file_systems.is_empty()
        || options.freeze_command.is_some()
        || options.thaw_command.is_some();
    if !stops_something && options.watch.is_none() {
        return Ok(None);
    }
    if let Some((_, entry)) = served {
        let record = entry.frozen_file();
        // Of a freeze that is under way the server tells, and its record keeps others off.
        if let Some(frozen) = FreezeRecord::read(&record)?
            && !is_under_way(&frozen)
        {
            return Err(already_frozen(&frozen, entry));
        }
        options.record = Some(record).filter(|_| stops_something);
    }
    let mount = options.file_systems.first().map(|mounted| mounted.name.clone()).unwrap_or_default();
    let mut variables = variables.to_vec();
    variables.push(("PLOOP_MOUNT", mount.into()));
    Helper::start(options, &variables).map(Some)
}

/// Whether somebody is at it who will thaw.
fn is_under_way(frozen: &FreezeRecord) -> bool {
    frozen.helper.is_running() && frozen.failure.is_none()
}

fn already_frozen(frozen: &FreezeRecord, entry: &Entry) -> Error {
    let id = entry.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    if is_under_way(frozen) {
        return Error::new(ErrorKind::Busy, "the disk is just frozen for another copy or snapshot")
            .advise("wait for its end; `ploop list` shows since when");
    }
    let (stands, _) = frozen.what_stands();
    Error::new(
        ErrorKind::NotQuiet,
        format!("the disk still stands since an earlier copy or snapshot: {stands}"),
    )
    .advise(format!("free it with: ploop thaw {id}"))
}

/// Has this helper freeze and thaw; nothing is done without one.
pub(crate) fn quiesce(
    helper: Option<Helper>,
    cancel: Option<&Cancel>,
    rescue: Option<Rescue>,
) -> Box<dyn Quiesce> {
    match helper {
        None => Box::new(NothingToQuiesce),
        Some(helper) => Box::new(HelperQuiesce::new(helper, cancel.cloned(), rescue)),
    }
}

/// As [`quiesce`], in a server that was given the helper's connection.
pub(crate) fn attend(
    entry: &Entry,
    helper: Option<(HelperTicket, OwnedFd)>,
    cancel: Option<&Cancel>,
) -> Box<dyn Quiesce> {
    let helper =
        helper.map(|(ticket, socket)| Helper { connection: Connection::from_socket(socket), ticket });
    let entry = entry.clone();
    quiesce(helper, cancel, Some(Box::new(move || have_thawed(&entry))))
}

/// Thaws what is written down for a disk, from this process, which must not be its server. Whether anything was.
pub(crate) fn thaw(entry: &Entry, runs_command: bool) -> Result<bool> {
    thaw_recorded(&entry.frozen_file(), runs_command, || quiesce::file_systems_of(&entry.state()?))
}

/// Before the disk is unmounted: thaws what is left of a copy or a snapshot; one that is under way is not disturbed. A thaw
/// command that fails keeps no disk mounted, once its file systems are free.
pub(crate) fn thaw_abandoned(entry: &Entry, output: &Output) -> Result<()> {
    match FreezeRecord::read(&entry.frozen_file())? {
        None => Ok(()),
        Some(frozen) if frozen.helper.is_running() && frozen.failure.is_none() => {
            Err(already_frozen(&frozen, entry))
        }
        Some(_) => match thaw(entry, true) {
            Err(error)
                if FreezeRecord::read(&entry.frozen_file())?
                    .is_some_and(|record| record.file_systems.is_empty()) =>
            {
                output.warn(&format!("{error}; the disk is unmounted all the same"));
                Ok(())
            }
            thawed => thawed.map(drop),
        },
    }
}

/// Has another process thaw what is written down for a disk: this one serves it.
fn have_thawed(entry: &Entry) -> Result<()> {
    let failed = |cause| Error::io(ErrorKind::System, "start the process that thaws", cause);
    let (root, id) = match (entry.path().parent(), entry.path().file_name()) {
        (Some(root), Some(id)) => (root, id),
        _ => return Err(Error::new(ErrorKind::Parameter, "this is no run-time folder").at_path(entry.path())),
    };
    let mut child = Command::new("/proc/self/exe")
        .arg("thaw")
        .arg(id)
        .env(RUN_DIR_VARIABLE, root)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let begun = Instant::now();
    let ended = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if begun.elapsed() >= RESCUE_MAX => break None,
            None => std::thread::sleep(LOOK),
        }
    };
    if ended.is_some_and(|status| status.success()) {
        return Ok(());
    }
    let record = FreezeRecord::read(&entry.frozen_file()).ok().flatten();
    let (stands, frees) = record.as_ref().map(FreezeRecord::what_stands).unwrap_or_default();
    let cause = record.and_then(|record| record.failure).unwrap_or_else(|| match ended {
        Some(status) => format!("the process that thaws failed ({status})"),
        None => "the process that thaws does not end".to_owned(),
    });
    Err(Error::new(ErrorKind::NotQuiet, format!("the disk still stands ({stands}): {cause}"))
        .advise(format!("free it with: ploop thaw {}; or by hand: {frees}", id.to_string_lossy())))
}

/// In a server that has just started: what a dead server and a dead helper have left is thawed, without waiting for it.
pub(crate) fn thaw_left(entry: &Entry) -> Result<()> {
    if FreezeRecord::read(&entry.frozen_file()).ok().flatten().is_none() {
        return Ok(());
    }
    let entry = entry.clone();
    let thaw = move || {
        // The helper of the dead server thaws by itself, unless it is stopped.
        let begun = Instant::now();
        let record = |entry: &Entry| FreezeRecord::read(&entry.frozen_file()).ok().flatten();
        while begun.elapsed() < HELPER_THAWS_MAX
            && record(&entry).is_some_and(|record| record.helper.is_running())
        {
            std::thread::sleep(LOOK);
        }
        if record(&entry).is_none() {
            return;
        }
        match have_thawed(&entry) {
            Ok(()) => eprintln!("ploop: what an earlier copy or snapshot had frozen was thawed"),
            Err(error) => eprintln!("ploop: {error}: {}", error.advice().unwrap_or_default()),
        }
    };
    std::thread::Builder::new()
        .name("thaw".into())
        .spawn(thaw)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that has what is left thawed", cause))
}

/// Answers a server of an older version, which asks the command itself to freeze, that it does not.
pub(crate) fn refuse_old_server(connection: &Connection, message: &Value) {
    if message.get("ask").is_none() {
        return;
    }
    let refused =
        Error::new(ErrorKind::Parameter, "the server of the disk is of an older version than this command")
            .advise("use the version that the disk was mounted with, or mount it again");
    // A server that does not take the reply is gone, which the wait for its answer finds out.
    let _ = connection.send(&json!({"failed": Failure::of(&refused)}), &[]);
}
