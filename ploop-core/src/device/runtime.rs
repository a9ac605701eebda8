//! Who serves what: the run-time folders, one for each served disk.
//!
//! `/run/ploop/ID/` (or `$XDG_RUNTIME_DIR/ploop/ID/` for users, or `$PLOOP_RUN_DIR/ID/`), mode 0700, holds the FUSE
//! file `disk`, the socket `control.sock`, the log `log` and the record `state.json`. The record names image files by
//! device and inode number, so that a disk is found under every path it has; processes by id and start time, so that
//! a reused id is not taken for them.
//!
//! Every change of a record is: lock this entry, read, change, write a new file, rename. Readers need no lock. Appearance of
//! entries is guarded by a lock of the folder above. Both are waited for no longer than [`LOCK_MAX`]: a command that was
//! stopped while it held one holds up no other disk, and no takeover.
//! An entry whose processes are all gone is stale; only [`Runtime::sweep`] and the command that ends it remove it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::mount_table;
use crate::error::{Error, ErrorKind, Result};
use crate::format::agreement::Accepted;

/// Overrides where the run-time folders are; for tests and for several installations side by side.
pub const RUN_DIR_VARIABLE: &str = "PLOOP_RUN_DIR";
/// The name of the exported file in a run-time folder.
pub const DISK_NAME: &str = "disk";
/// The name of the control socket in a run-time folder.
pub const SOCKET_NAME: &str = "control.sock";
/// The name of the log of keeper and server in a run-time folder.
pub const LOG_NAME: &str = "log";
/// The name of the record of what is frozen in a run-time folder, while anything is.
pub const FROZEN_NAME: &str = "frozen.json";
const STATE_NAME: &str = "state.json";
const LOCK_NAME: &str = ".lock";
/// A record is not longer than this.
const STATE_BYTES_MAX: u64 = 1 << 20;
const VERSION: u32 = 1;
/// How long a lock of the run-time folder is waited for.
pub const LOCK_MAX: Duration = Duration::from_secs(10);
/// How often it is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// An image file of a served disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Where it was when it was opened.
    pub path: PathBuf,
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

impl ImageFile {
    /// The file at `path`, which is followed and made absolute.
    pub fn at(path: &Path) -> Result<Self> {
        let examine = || -> io::Result<Self> {
            let path = fs::canonicalize(path)?;
            let status = fs::metadata(&path)?;
            Ok(Self { path, device: status.dev(), inode: status.ino() })
        };
        examine().map_err(|cause| Error::io(ErrorKind::Open, "find the image", cause).at_path(path))
    }

    /// Whether both are the same file, whatever their paths.
    pub fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// A process that cannot be confused with a later one of the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessMark {
    /// Process id.
    pub id: u32,
    /// Start time in clock ticks since boot.
    pub started: u64,
}

impl ProcessMark {
    /// The mark of a running process; `None` when there is none of that id.
    pub fn of(id: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything.
        let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        // A zombie does nothing any more.
        (state != "Z" && state != "X").then_some(Self { id, started })
    }

    /// The mark of this process.
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether that very process still runs.
    pub fn is_running(&self) -> bool {
        Self::of(self.id).as_ref() == Some(self)
    }
}

/// How the disk is to be opened: all that a server, also a later one, needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRequest {
    /// The descriptor, absolute; else `images` counts.
    pub descriptor: Option<PathBuf>,
    /// The snapshot to open read-only instead of the current top.
    pub snapshot: Option<String>,
    /// Image files, base first, absolute.
    pub images: Vec<PathBuf>,
    /// The base is a raw image.
    pub raw_base: bool,
    /// Cluster size for a raw base, in sectors.
    pub cluster_sectors: Option<u64>,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Folders that images outside of the bundle may be taken from, absolute; read-only disks alone have any.
    #[serde(default)]
    pub parents: Vec<PathBuf>,
    /// Contradictions between descriptor and images that its user takes as they are.
    #[serde(default)]
    pub accepted: Accepted,
}

/// The partition that the loop device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionRange {
    /// Its number in the table.
    pub number: u32,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// An error on its way to another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The exit code of its kind.
    pub exit_code: u8,
    /// The error and its causes in one line.
    pub message: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Failure {
    /// What can be told of `error` in a record or a message of bounded size.
    pub fn of(error: &Error) -> Self {
        const MESSAGE_BYTES_MAX: usize = 8192;
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            message = format!("{message}: {inner}");
            cause = inner.source();
        }
        let end = (0..=MESSAGE_BYTES_MAX).rev().find(|&at| message.is_char_boundary(at.min(message.len())));
        message.truncate(end.unwrap_or(0));
        Self { exit_code: error.kind().exit_code(), message, advice: error.advice().map(str::to_owned) }
    }

    /// The error, as far as it was told.
    pub fn into_error(self) -> Error {
        let kind = ErrorKind::from_exit_code(self.exit_code).unwrap_or(ErrorKind::System);
        let error = Error::new(kind, self.message);
        match self.advice {
            Some(advice) => error.advise(advice),
            None => error,
        }
    }
}

/// The record of one served disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of the record.
    pub version: u32,
    /// The name of the run-time folder.
    pub id: String,
    /// How the disk is opened.
    pub open: OpenRequest,
    /// The descriptor as a file, if there is one.
    pub descriptor: Option<ImageFile>,
    /// The folder of the descriptor.
    #[serde(default)]
    pub folder: Option<ImageFile>,
    /// All deltas, base first.
    pub images: Vec<ImageFile>,
    /// Size of the disk in bytes, once it is open.
    pub size_bytes: Option<u64>,
    /// The loop device, once it is attached and as long as it is.
    pub loop_device: Option<PathBuf>,
    /// The partition it shows; `None` for the whole disk.
    pub partition: Option<PartitionRange>,
    /// Where its file system was asked to be mounted; the table of mounts knows where it is.
    pub mount_points: Vec<PathBuf>,
    /// The process that holds what must outlive a server.
    pub keeper: Option<ProcessMark>,
    /// The process that serves the disk.
    pub server: Option<ProcessMark>,
    /// How many servers died and were succeeded.
    pub takeovers: u32,
    /// Why nobody serves the disk any more, when that was not wanted.
    pub failure: Option<Failure>,
    /// Who uses the disk, where several use the same images: a name for `umount`.
    #[serde(default)]
    pub component: Option<String>,
    /// What the keeper knows and the server cannot tell: that it does not run, or why no successor serves yet.
    #[serde(default)]
    pub trouble: Option<String>,
    /// What becomes of writes for which the host has no space.
    #[serde(default)]
    pub host_policy: HostPolicy,
}

pub use super::full_host::HostPolicy;

impl State {
    /// A record of a disk that is about to be served.
    pub fn new(id: String, open: OpenRequest, descriptor: Option<ImageFile>, images: Vec<ImageFile>) -> Self {
        Self {
            version: VERSION,
            id,
            open,
            folder: descriptor.as_ref().and_then(|file| ImageFile::at(file.path.parent()?).ok()),
            descriptor,
            images,
            size_bytes: None,
            loop_device: None,
            partition: None,
            mount_points: Vec::new(),
            keeper: None,
            server: None,
            takeovers: 0,
            failure: None,
            component: None,
            trouble: None,
            host_policy: HostPolicy::default(),
        }
    }

    /// Whether any process of it still runs.
    pub fn is_running(&self) -> bool {
        [&self.keeper, &self.server].into_iter().flatten().any(ProcessMark::is_running)
    }

    /// Whether it writes to `file`: of its deltas, only the top is written.
    fn writes(&self, file: &ImageFile) -> bool {
        !self.open.read_only && self.images.last().is_some_and(|top| top.is_same_file(file))
    }

    /// Of several that use `file`, the one that it names: whose top it is, then one that is written to.
    fn meant<'a>(states: &'a [Self], file: &ImageFile) -> Option<&'a Self> {
        let rank = |state: &&Self| {
            let is_top = state.images.last().is_some_and(|top| top.is_same_file(file));
            (is_top, !state.open.read_only)
        };
        states.iter().filter(|state| state.uses(file)).max_by_key(rank)
    }

    /// Whether `file` is one of its deltas or its descriptor.
    pub fn uses(&self, file: &ImageFile) -> bool {
        // Each change of the snapshots puts another file in the descriptor's place: its name in its folder is what stays,
        // wherever that folder is by now, and not in another one that has the path.
        let is_descriptor = |own: &ImageFile| {
            let in_folder = || match (&self.folder, file.path.parent()) {
                (Some(folder), Some(parent)) => {
                    file.path.file_name() == own.path.file_name()
                        && ImageFile::at(parent).is_ok_and(|parent| parent.is_same_file(folder))
                }
                _ => own.path == file.path,
            };
            own.is_same_file(file) || in_folder()
        };
        self.images.iter().any(|own| own.is_same_file(file))
            || self.descriptor.as_ref().is_some_and(is_descriptor)
    }
}

/// The folder above all run-time folders.
#[derive(Clone, Debug)]
pub struct Runtime {
    root: PathBuf,
}

/// Holds the lock of the folder above until dropped.
#[derive(Debug)]
pub struct RuntimeLock(#[allow(dead_code, reason = "held, not used")] Flock<File>);

impl Runtime {
    /// The folder of this user, from the environment; made when missing.
    pub fn of_user() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = if let Some(path) = variable(RUN_DIR_VARIABLE) {
            path
        } else if nix::unistd::geteuid().is_root() {
            PathBuf::from("/run/ploop")
        } else if let Some(path) = variable("XDG_RUNTIME_DIR") {
            path.join("ploop")
        } else {
            return Err(Error::new(
                ErrorKind::Parameter,
                "find the run-time folder: XDG_RUNTIME_DIR is not set",
            )
            .advise(format!("set {RUN_DIR_VARIABLE}")));
        };
        Self::at(root)
    }

    /// The folder at `root`; made when missing, mode 0700. It must belong to this user and to nobody else.
    pub fn at(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        let make = || -> io::Result<PathBuf> {
            match fs::DirBuilder::new().mode(0o700).recursive(true).create(&root) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            fs::canonicalize(&root)
        };
        let root = make().map_err(|cause| {
            Error::io(ErrorKind::MakeFolder, "make the run-time folder", cause).at_path(&root)
        })?;
        let status = fs::metadata(&root).map_err(|cause| {
            Error::io(ErrorKind::Stat, "examine the run-time folder", cause).at_path(&root)
        })?;
        if status.uid() != nix::unistd::geteuid().as_raw() || status.mode() & 0o022 != 0 {
            return Err(Error::new(ErrorKind::Parameter, "the run-time folder is not this user's alone")
                .at_path(&root)
                .advise(format!("give it to this user with mode 0700, or set {RUN_DIR_VARIABLE}")));
        }
        Ok(Self { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits for the lock that guards the appearance of entries, up to [`LOCK_MAX`].
    pub fn lock(&self) -> Result<RuntimeLock> {
        take_lock(&self.root.join(LOCK_NAME), LOCK_MAX)
    }

    /// The entry of that id, whether it exists or not.
    pub fn entry(&self, id: &str) -> Entry {
        Entry { path: self.root.join(id) }
    }

    /// All records, those of dead servers included. A folder without a readable record is passed over: its maker may
    /// be just about to write it.
    pub fn states(&self) -> Result<Vec<State>> {
        let failed =
            |cause| Error::io(ErrorKind::Open, "list the run-time folder", cause).at_path(&self.root);
        let mut states = Vec::new();
        for item in fs::read_dir(&self.root).map_err(failed)? {
            let name = item.map_err(failed)?.file_name();
            if let Some(id) = name.to_str().filter(|id| is_id(id))
                && let Ok(state) = self.entry(id).state()
            {
                states.push(state);
            }
        }
        states.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(states)
    }

    /// Makes a new entry, unless one is there that writes to any of its images or whose images it would write to: then
    /// the error is [`ErrorKind::InUse`]. What neither writes may be shared: the frozen images below a running disk.
    pub fn create(&self, id: &str, state: &State) -> Result<Entry> {
        let _lock = self.lock()?;
        if !is_id(id) {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("\"{id}\" is no name of a run-time folder"),
            ));
        }
        for other in self.states()? {
            let shares = state.images.iter().any(|image| other.uses(image));
            if shares && state.component.is_some() && other.component == state.component {
                let component = state.component.as_deref().unwrap_or_default();
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!("the image is mounted already as {component}"),
                )
                .at_path(state.images.last().map(|image| image.path.clone()).unwrap_or_default())
                .advise("choose another name for -c, or unmount that one"));
            }
            let conflicts = state.images.iter().any(|image| other.writes(image))
                || other.images.iter().any(|image| state.writes(image));
            if conflicts {
                let name = state.images.last().map(|image| image.path.clone()).unwrap_or_default();
                let place = other.loop_device.as_ref().map_or_else(
                    || self.entry(&other.id).disk_file().display().to_string(),
                    |device| device.display().to_string(),
                );
                let advice = if other.is_running() {
                    format!("it is served as {place}; end that with: ploop umount {}", name.display())
                } else {
                    format!("its server died; clear what it left with: ploop umount {}", name.display())
                };
                return Err(Error::new(ErrorKind::InUse, "the image is mounted already")
                    .at_path(name)
                    .advise(advice));
            }
        }
        let entry = self.entry(id);
        let make = || -> io::Result<()> {
            fs::DirBuilder::new().mode(0o700).create(&entry.path)?;
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(entry.disk_file())?;
            Ok(())
        };
        make().map_err(|cause| {
            Error::io(ErrorKind::MakeFolder, "make the run-time folder", cause).at_path(&entry.path)
        })?;
        match entry.write(state) {
            Ok(()) => Ok(entry),
            Err(error) => {
                let _ = entry.remove_files();
                Err(error)
            }
        }
    }

    /// The served disk that `name` means: a loop device or its mount point, an image file, or a descriptor (or the
    /// folder it lies in).
    pub fn find(&self, name: &Path) -> Result<Option<State>> {
        self.find_among(self.states()?, name)
    }

    /// As [`find`](Self::find), among the disks that were mounted as this component.
    pub fn find_component(&self, name: &Path, component: &str) -> Result<Option<State>> {
        let mut states = self.states()?;
        states.retain(|state| state.component.as_deref() == Some(component));
        self.find_among(states, name)
    }

    #[allow(clippy::unused_self, reason = "names mean something within one run-time folder")]
    fn find_among(&self, states: Vec<State>, name: &Path) -> Result<Option<State>> {
        let by_path =
            |state: &&State| state.loop_device.as_deref() == Some(name) || Path::new(&state.id) == name;
        if let Some(found) = states.iter().find(by_path) {
            return Ok(Some(found.clone()));
        }
        let Ok(path) = fs::canonicalize(name) else {
            // An image that was renamed or a path that is gone: the paths at the time of opening are what is left.
            let by_old_path =
                |state: &&State| state.images.iter().chain(&state.descriptor).any(|image| image.path == name);
            return Ok(states.iter().find(by_old_path).cloned());
        };
        if let Some(found) = states.iter().find(|state| state.loop_device.as_deref() == Some(&path)) {
            return Ok(Some(found.clone()));
        }
        if path.is_dir() {
            for state in &states {
                if let Some(device) = &state.loop_device
                    && is_mounted_from(&path, device)?
                {
                    return Ok(Some(state.clone()));
                }
            }
            if let Some(found) = states.iter().find(|state| state.mount_points.contains(&path)) {
                return Ok(Some(found.clone()));
            }
            let descriptor = path.join("DiskDescriptor.xml");
            return match ImageFile::at(&descriptor) {
                Ok(file) => Ok(State::meant(&states, &file).cloned()),
                Err(_) => Ok(None),
            };
        }
        let file = ImageFile::at(&path)?;
        Ok(State::meant(&states, &file).cloned())
    }

    /// Removes entries whose processes are gone and that nothing in the kernel depends on any more; what was removed.
    /// An entry with a loop device that is still attached stays: whoever mounted it must be told.
    ///
    /// Somebody else who works on the folder now sweeps another time.
    pub fn sweep(&self) -> Result<Vec<State>> {
        let Ok(_lock) = take_lock(&self.root.join(LOCK_NAME), Duration::ZERO) else { return Ok(Vec::new()) };
        let mut removed = Vec::new();
        for state in self.states()? {
            let attached = state.loop_device.as_deref().is_some_and(|device| {
                super::loop_device::backing_file(device).is_some_and(|file| file.starts_with(&self.root))
            });
            // An entry without any process is one that is just being made.
            let was_started = state.keeper.is_some() || state.server.is_some();
            if state.is_running() || attached || !was_started {
                continue;
            }
            self.entry(&state.id).remove_files()?;
            removed.push(state);
        }
        Ok(removed)
    }
}

/// Takes an exclusive lock on the file at `path`, which is made when missing.
fn take_lock(path: &Path, time_max: Duration) -> Result<RuntimeLock> {
    let open = || -> io::Result<File> {
        fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    };
    let mut file =
        open().map_err(|cause| Error::io(ErrorKind::Lock, "open the lock file", cause).at_path(path))?;
    let deadline = Instant::now() + time_max;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(RuntimeLock(lock)),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(Error::io(ErrorKind::Lock, "lock", errno.into()).at_path(path)),
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::Lock,
                format!("lock: another command has held it for {} s", time_max.as_secs()),
            )
            .at_path(path)
            .advise(
                "one that was stopped in the middle goes on with `kill -CONT`; `lslocks` shows which it is",
            ));
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// Names that a run-time folder may have: nothing that leads elsewhere.
fn is_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// One run-time folder.
#[derive(Clone, Debug)]
pub struct Entry {
    path: PathBuf,
}

impl Entry {
    /// The entry whose folder is `path`.
    pub fn at(path: &Path) -> Result<Self> {
        match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
            (Some(root), Some(id)) if is_id(id) => Ok(Runtime::at(root)?.entry(id)),
            _ => Err(Error::new(ErrorKind::Parameter, "this is no run-time folder").at_path(path)),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The exported file.
    pub fn disk_file(&self) -> PathBuf {
        self.path.join(DISK_NAME)
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET_NAME)
    }

    /// What keeper and server have to say.
    pub fn log_file(&self) -> PathBuf {
        self.path.join(LOG_NAME)
    }

    /// The record of what is frozen; there is one while anything is.
    pub fn frozen_file(&self) -> PathBuf {
        self.path.join(FROZEN_NAME)
    }

    /// The record.
    pub fn state(&self) -> Result<State> {
        let path = self.path.join(STATE_NAME);
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            File::open(&path)?.take(STATE_BYTES_MAX).read_to_end(&mut text)?;
            Ok(text)
        };
        let text =
            read().map_err(|cause| Error::io(ErrorKind::Open, "read the record", cause).at_path(&path))?;
        let mut state: State = serde_json::from_slice(&text)
            .map_err(|cause| Error::io(ErrorKind::System, "read the record", cause.into()).at_path(&path))?;
        if state.version != VERSION {
            let message = format!("the record has version {}, this program knows {VERSION}", state.version);
            return Err(Error::new(ErrorKind::System, message).at_path(&path));
        }
        // Once detached, it may show another disk, whose file system is none of ours.
        let is_ours = |device: &PathBuf| {
            super::loop_device::backing_file(device).is_some_and(|file| file == self.disk_file())
        };
        state.loop_device = state.loop_device.filter(is_ours);
        Ok(state)
    }

    /// Changes the record; what it is then.
    pub fn update(&self, change: impl FnOnce(&mut State)) -> Result<State> {
        let _lock = take_lock(&self.path.join(LOCK_NAME), LOCK_MAX)?;
        let mut state = self.state()?;
        change(&mut state);
        self.write(&state)?;
        Ok(state)
    }

    fn write(&self, state: &State) -> Result<()> {
        let path = self.path.join(STATE_NAME);
        let temporary = self.path.join(".state.json.new");
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(state)?;
            text.push(b'\n');
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&text)?;
            // The folder is in memory and gone after a reboot: no sync.
            fs::rename(&temporary, &path)
        };
        write().map_err(|cause| Error::io(ErrorKind::Write, "write the record", cause).at_path(&path))
    }

    /// Removes the folder; a FUSE file that is still mounted there is unmounted first, in use or not. Nothing is done
    /// to a folder that is gone.
    pub fn remove(&self) -> Result<()> {
        // Without the lock of the folder above: who makes an entry meanwhile sees this one, or does not.
        self.remove_files()
    }

    fn remove_files(&self) -> Result<()> {
        let remove = || -> io::Result<()> {
            // Fails when nothing is mounted there, which is what is wanted.
            while super::fuse::sys::unmount(&self.disk_file(), true).is_ok() {}
            let frozen = [FROZEN_NAME, "frozen.json.new", "frozen.lock"];
            let others = [SOCKET_NAME, LOG_NAME, DISK_NAME, ".state.json.new", STATE_NAME, LOCK_NAME];
            for name in frozen.into_iter().chain(others) {
                match fs::remove_file(self.path.join(name)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        };
        remove().map_err(|cause| {
            Error::io(ErrorKind::Unlink, "remove the run-time folder", cause).at_path(&self.path)
        })
    }
}

/// Whether the file system mounted at exactly `point`, the topmost when there are several, is on that device or one of
/// its partitions.
fn is_mounted_from(point: &Path, device: &Path) -> Result<bool> {
    let Ok(device) = mount_table::device_number(device) else { return Ok(false) };
    let top = crate::io::sys::path_status(point).ok().and_then(|status| status.mount);
    let mut mounts = mount_table::read(Path::new("/proc/self/mountinfo"))?;
    mounts.retain(|mount| mount.point == point);
    let found = mounts.iter().find(|mount| Some(mount.id) == top).or(mounts.last());
    Ok(found.is_some_and(|mount| mount.is_from(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(folder: &Path, id: &str, read_only: bool) -> State {
        let image = folder.join("root.hds");
        fs::write(&image, "x").unwrap();
        let open = OpenRequest { read_only, images: vec![image.clone()], ..OpenRequest::default() };
        State::new(id.into(), open, None, vec![ImageFile::at(&image).unwrap()])
    }

    #[test]
    fn one_image_is_served_once() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(folder.path().join("run")).unwrap();
        let entry = runtime.create("one", &state(folder.path(), "one", false)).unwrap();
        let error = runtime.create("two", &state(folder.path(), "two", true)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.advice().unwrap().contains("ploop umount"));
        entry.remove().unwrap();
        runtime.create("two", &state(folder.path(), "two", true)).unwrap();
        runtime.create("three", &state(folder.path(), "three", true)).unwrap();
    }

    #[test]
    fn a_disk_is_found_by_another_name_of_its_image() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(folder.path().join("run")).unwrap();
        runtime.create("one", &state(folder.path(), "one", false)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("root.hds", &link).unwrap();
        assert_eq!(runtime.find(&link).unwrap().unwrap().id, "one");
        assert_eq!(runtime.find(Path::new("/dev/null")).unwrap(), None);
    }

    #[test]
    fn records_change_and_entries_of_the_dead_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(folder.path().join("run")).unwrap();
        let entry = runtime.create("one", &state(folder.path(), "one", false)).unwrap();
        assert!(runtime.sweep().unwrap().is_empty(), "it is just being made");
        entry.update(|state| state.keeper = ProcessMark::own()).unwrap();
        assert!(entry.state().unwrap().is_running());
        assert!(runtime.sweep().unwrap().is_empty(), "it lives");
        // The same process id at another time is another process.
        entry
            .update(|state| {
                state.keeper = ProcessMark::own().map(|own| ProcessMark { started: own.started + 1, ..own });
            })
            .unwrap();
        assert_eq!(runtime.sweep().unwrap().len(), 1);
        assert!(!entry.path().exists());
    }

    #[test]
    fn a_folder_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(Runtime::at(folder.path()).unwrap_err().kind(), ErrorKind::Parameter);
    }
}
