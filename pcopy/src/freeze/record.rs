//! What is frozen, written down before it is: so that whoever comes after a dead helper knows what to undo, and how.
//!
//! The record lies in a folder that is in memory and never on the disk in question. It holds the operator's thaw command
//! with the folder and the environment in which that is to run, so it is readable by its owner alone.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstat;
use nix::unistd::Pid;
use ploop_core::device::runtime::ProcessMark;
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::hook::{FreezeHook, Phase, Unattended, end_group};
use super::{MountedFileSystem, THAW_PAUSE, THAW_TRIES};

/// The name of the record in a run-time folder.
pub const RECORD_NAME: &str = ploop_core::device::runtime::FROZEN_NAME;
/// A record is not longer than this: an environment is at most about so large.
const RECORD_BYTES_MAX: u64 = 8 << 20;
const VERSION: u32 = 1;
/// How long a helper that was killed may take to end: it may be in the middle of a freeze, which ends when the file
/// system is written out.
const HELPER_END_MAX: Duration = Duration::from_secs(60);
/// How long another process that thaws is waited for.
const LOCK_MAX: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// A file system that is frozen, or about to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenFileSystem {
    /// Its mount point, for people.
    pub name: String,
    /// The number of its device, as `stat` tells it.
    pub device: u64,
}

/// What stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeRecord {
    version: u32,
    /// Since when, in milliseconds since 1970: the start of the freeze command, or of the freeze.
    pub since_ms: u64,
    /// The process that holds it.
    pub helper: ProcessMark,
    /// The freeze command that runs, by its process, which leads its group.
    pub hook: Option<ProcessMark>,
    /// The freeze command was started: its thaw command is due.
    pub hook_begun: bool,
    /// What is frozen or about to be.
    pub file_systems: Vec<FrozenFileSystem>,
    /// The operator's command that undoes the freeze command.
    pub thaw_command: Option<String>,
    /// How long that may take, in milliseconds.
    pub hook_timeout_ms: u64,
    /// Where it runs.
    folder: Vec<u8>,
    /// In which environment.
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Why it could not be thawed, if that was tried.
    #[serde(default)]
    pub failure: Option<String>,
}

impl FreezeRecord {
    /// Of this process, whose folder and environment are those of the commands.
    pub(super) fn new(
        file_systems: &[MountedFileSystem],
        thaw_command: Option<&str>,
        hook_timeout: Duration,
    ) -> Result<Self> {
        let own = ProcessMark::own().ok_or_else(|| {
            Error::new(ErrorKind::System, "find out when this process started: is /proc mounted?")
        })?;
        let folder = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let device = |file_system: &MountedFileSystem| -> Result<FrozenFileSystem> {
            let status = fstat(&file_system.folder).map_err(|errno| {
                Error::io(ErrorKind::Stat, "examine the file system", errno.into()).at_path(&file_system.name)
            })?;
            Ok(FrozenFileSystem { name: file_system.name.clone(), device: status.st_dev })
        };
        Ok(Self {
            version: VERSION,
            since_ms: now_ms(),
            helper: own,
            hook: None,
            hook_begun: false,
            file_systems: file_systems.iter().map(device).collect::<Result<_>>()?,
            thaw_command: thaw_command.map(str::to_owned),
            hook_timeout_ms: u64::try_from(hook_timeout.as_millis()).unwrap_or(u64::MAX),
            folder: folder.into_os_string().into_vec(),
            environment: std::env::vars_os()
                .map(|(name, value)| (name.into_vec(), value.into_vec()))
                .collect(),
            failure: None,
        })
    }

    /// Writes it in place of what is there. The folder is in memory and gone after a reboot: no sync.
    pub fn write(&self, path: &Path) -> Result<()> {
        let temporary = path.with_extension("json.new");
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(self)?;
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            fs::rename(&temporary, path)
        };
        write().map_err(|cause| {
            Error::io(ErrorKind::Write, "write down what is frozen", cause)
                .at_path(path)
                .advise("nothing was frozen for it; make room in the run-time folder")
        })
    }

    /// Writes the first of a freeze, unless somebody else's is there: then [`ErrorKind::Busy`].
    pub(super) fn create(&self, path: &Path) -> Result<()> {
        let own = path.with_extension(format!("json.{}", std::process::id()));
        self.write(&own)?;
        let linked = fs::hard_link(&own, path);
        // What is left of it goes with the folder.
        let _ = fs::remove_file(&own);
        linked.map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => {
                Error::new(ErrorKind::Busy, "the disk is frozen already, for another copy or snapshot")
                    .advise("wait for its end, or free the disk with: ploop thaw DISK")
            }
            _ => Error::io(ErrorKind::Write, "write down what is frozen", cause).at_path(path),
        })
    }

    /// What is written there; `None` when nothing is.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let failed =
            |cause: io::Error| Error::io(ErrorKind::Open, "read what is frozen", cause).at_path(path);
        let mut text = Vec::new();
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => {
                opened.and_then(|file| file.take(RECORD_BYTES_MAX).read_to_end(&mut text)).map_err(failed)?
            }
        };
        let record: Self = serde_json::from_slice(&text).map_err(|cause| failed(cause.into()))?;
        if record.version != VERSION {
            return Err(failed(io::Error::other(format!(
                "it has version {}, this program knows {VERSION}",
                record.version
            ))));
        }
        Ok(Some(record))
    }

    /// Removes it: nothing is frozen any more.
    pub fn remove(path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(ErrorKind::Unlink, "remove the record of what was frozen", error).at_path(path))
            }
            _ => Ok(()),
        }
    }

    /// What stands still and what frees it, one clause for each.
    pub fn what_stands(&self) -> (String, String) {
        let mut stands: Vec<String> =
            self.file_systems.iter().map(|frozen| format!("{} is frozen", frozen.name)).collect();
        let mut frees: Vec<String> =
            self.file_systems.iter().map(|frozen| format!("fsfreeze -u {}", frozen.name)).collect();
        if self.hook_begun {
            stands.push("what the freeze command has stopped stands".to_owned());
            frees.extend(self.thaw_command.clone());
        }
        (stands.join("; "), frees.join(" && "))
    }
}

/// Now, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Thaws what a record at `path` tells, whoever wrote it: its helper, if it still lives, is ended first, and the freeze
/// command with it. `mounted` opens the file systems of the disk as they are mounted now. Without `runs_command` the thaw
/// command is not run: what the freeze command stopped was let go by hand. Whether anything was frozen.
///
/// Not to be called by a process that serves the disk: a thaw may wait for it.
pub fn thaw_recorded(
    path: &Path,
    runs_command: bool,
    mounted: impl Fn() -> Result<Vec<MountedFileSystem>>,
) -> Result<bool> {
    if FreezeRecord::read(path)?.is_none() {
        return Ok(false);
    }
    let _alone = lock(path)?;
    let Some(mut record) = FreezeRecord::read(path)? else { return Ok(false) };
    end_helper(&record)?;
    // It may have thawed, or gone on to freeze, before it ended.
    record = match FreezeRecord::read(path)? {
        Some(record) => record,
        None => return Ok(true),
    };
    if let Some(hook) = record.hook.filter(ProcessMark::is_running)
        && let Ok(group) = i32::try_from(hook.id)
        && group > 1
    {
        // First: what it froze later on would stay frozen.
        end_group(Pid::from_raw(group), || !hook.is_running());
    }
    let mut thawed = thaw_file_systems(&record, mounted);
    if thawed.is_ok() {
        // Whatever the command does, these are free.
        record.file_systems.clear();
        if runs_command {
            thawed = run_thaw_command(&record);
        }
    }
    match thawed {
        Ok(()) => FreezeRecord::remove(path).map(|()| true),
        Err(error) => {
            record.failure = Some(error.to_string());
            // The error itself tells more.
            let _ = record.write(path);
            Err(error)
        }
    }
}

fn thaw_file_systems(
    record: &FreezeRecord,
    mounted: impl Fn() -> Result<Vec<MountedFileSystem>>,
) -> Result<()> {
    if record.file_systems.is_empty() {
        return Ok(());
    }
    // Without its file systems nothing of the disk is known to be mounted; a mount point is tried by its name then.
    let mut open = mounted().unwrap_or_default();
    for frozen in &record.file_systems {
        open.extend(MountedFileSystem::open(Path::new(&frozen.name)));
    }
    for frozen in record.file_systems.iter().rev() {
        let is_it = |file_system: &&MountedFileSystem| {
            fstat(&file_system.folder).is_ok_and(|status| status.st_dev == frozen.device)
        };
        let Some(file_system) = open.iter().find(is_it) else {
            return Err(Error::new(
                ErrorKind::NotQuiet,
                "thaw file system: it is not mounted there any more",
            )
            .at_path(&frozen.name)
            .advise("mount the disk's device again somewhere, then: fsfreeze -u MOUNTPOINT"));
        };
        thaw_one(file_system)?;
    }
    Ok(())
}

/// Thaws one file system, several times if need be. One that is not frozen is as wanted.
pub(super) fn thaw_one(file_system: &MountedFileSystem) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        match sys::thaw_file_system(file_system.folder.as_fd()) {
            Ok(()) => return Ok(()),
            // Somebody else has thawed it.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(()),
            Err(_) if tries < THAW_TRIES => std::thread::sleep(THAW_PAUSE),
            Err(error) => {
                let name = &file_system.name;
                return Err(Error::io(ErrorKind::NotQuiet, "thaw file system: it is still frozen", error)
                    .at_path(name)
                    .advise(format!("thaw it by hand: fsfreeze -u {name}")));
            }
        }
    }
}

/// Runs a thaw command until it succeeds, a few times. `run` runs it once.
pub(super) fn thaw_command(command: &str, mut run: impl FnMut() -> Result<()>) -> Result<()> {
    let mut tries = 1;
    loop {
        match run() {
            Ok(()) => return Ok(()),
            Err(_) if tries < THAW_TRIES => {
                tries += 1;
                std::thread::sleep(THAW_PAUSE);
            }
            Err(error) => {
                let message = format!(
                    "what the freeze command has stopped still stands (tried {tries} times): {error}"
                );
                return Err(Error::new(ErrorKind::NotQuiet, message)
                    .advise(format!(
                        "free it by hand: {command}, and say so: ploop thaw --freed DISK; or try again: ploop thaw DISK"
                    )));
            }
        }
    }
}

/// Runs the thaw command where and as it was typed, if it is due.
fn run_thaw_command(record: &FreezeRecord) -> Result<()> {
    let Some(command) = record.thaw_command.as_deref().filter(|_| record.hook_begun) else { return Ok(()) };
    let hook = FreezeHook {
        phase: Phase::Thaw,
        command: command.to_owned(),
        timeout: Duration::from_millis(record.hook_timeout_ms),
    };
    let folder = OsString::from_vec(record.folder.clone());
    let environment: BTreeMap<&OsStr, &OsStr> = record
        .environment
        .iter()
        .map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value)))
        .collect();
    thaw_command(command, || {
        hook.run_prepared(&mut Unattended, |prepared: &mut Command| {
            prepared.current_dir(&folder).env_clear().envs(&environment);
        })
    })
}

/// Ends a helper that does not do its duty, and waits for its end.
fn end_helper(record: &FreezeRecord) -> Result<()> {
    let helper = record.helper;
    let own = std::process::id();
    let begun = Instant::now();
    while helper.id != own && helper.is_running() {
        if let Ok(id) = i32::try_from(helper.id) {
            // It may have ended since it was looked at.
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
        }
        if begun.elapsed() >= HELPER_END_MAX {
            let (stands, _) = record.what_stands();
            let message = format!("the process that froze ({}) cannot be ended: {stands}", helper.id);
            return Err(Error::new(ErrorKind::NotQuiet, message)
                .advise("see what it waits for: cat /proc/PID/stack; then run ploop thaw DISK again"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Waits until no other process thaws by the record at `path`.
fn lock(path: &Path) -> Result<Flock<File>> {
    let failed = |cause: io::Error| Error::io(ErrorKind::Lock, "lock what is frozen", cause).at_path(path);
    let begun = Instant::now();
    loop {
        let lock = path.with_extension("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock)
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) if begun.elapsed() < LOCK_MAX => {
                std::thread::sleep(LOOK)
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(
                    Error::new(ErrorKind::Busy, "another command is just thawing the disk").at_path(path)
                );
            }
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}
