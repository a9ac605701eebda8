//! Served disks as the commands see them: start one, attach it, detach it, end it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ploop_core::device::control::Connection;
use ploop_core::device::fuse::sys;
use ploop_core::device::loop_device::{self, AttachOptions};
use ploop_core::device::runtime::{
    Entry, HostPolicy, ImageFile, OpenRequest, PartitionRange, Runtime, State,
};
use ploop_core::format::{InUse, Probe, probe};
use ploop_core::io::Access;
use ploop_core::io::file::{FileStorage, OpenOptions as FileOptions};
use ploop_core::ops::Space;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::unmount_copies;
use serde::{Deserialize, Serialize};

use crate::disk_bytes::ShownDisk;
use crate::full_host::WaitingStatus;
use crate::partition_table::{self, Partition};
use crate::{guarding, open};

/// Set to 1: as `--allow-reclaim-stall` on every command that serves a disk, also where it is not typed by hand.
const ALLOW_RECLAIM_STALL_VARIABLE: &str = "PLOOP_ALLOW_RECLAIM_STALL";
/// How often a state that changes by itself is looked at.
const POLL: Duration = Duration::from_millis(5);
/// How long a file system that is in use is tried again before it is called busy.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// How long the keeper may take to end after its server has.
const KEEPER_END_MAX: Duration = Duration::from_secs(30);
/// How long a server may take to say how it is.
const STATUS_MAX: Duration = Duration::from_secs(10);
/// The most of a log that is shown when a start fails.
const LOG_TAIL_BYTES: u64 = 4096;

/// How a disk is to be served.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServeOptions {
    /// Go on where the kernel cannot protect a server against waiting for its own device.
    pub(crate) allow_reclaim_stall: bool,
    /// Threads of the server; 1 when 0.
    pub(crate) threads: usize,
    /// The loop device to use; a free one when `None`.
    pub(crate) device: Option<PathBuf>,
    /// Show the whole disk even when it has a partition table.
    pub(crate) whole_disk: bool,
    /// The partition to show, by number, label or UUID; the first when `None`.
    pub(crate) partition: Option<String>,
    /// Who uses it, where several use the same images.
    pub(crate) component: Option<String>,
    /// The exported file alone, no loop device.
    pub(crate) without_device: bool,
    /// What becomes of writes for which the host has no space. By default they fail: the command that works on the disk
    /// then says so, instead of waiting unseen.
    pub(crate) host_policy: HostPolicy,
}

/// What a server says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Size of the disk in bytes.
    pub(crate) size_bytes: u64,
    /// Size of a cluster in bytes.
    pub(crate) cluster_bytes: u64,
    /// Clusters of the chain in use.
    pub(crate) allocated_clusters: u64,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Whether a sync has failed.
    pub(crate) poisoned: bool,
    /// How.
    #[serde(default)]
    pub(crate) poison: Option<String>,
    /// Writes that wait for space on the host.
    #[serde(default)]
    pub(crate) waiting: Option<WaitingStatus>,
    /// Entries not yet in the table on disk.
    pub(crate) pending_entries: u64,
    /// Whether requests are answered and the keeper knows it, so that a successor may follow.
    #[serde(default = "always")]
    pub(crate) ready: bool,
    /// Whether the keeper is gone and no new one is there yet.
    #[serde(default)]
    pub(crate) unguarded: bool,
    /// An image without a name, which is gone with the last use of the disk.
    #[serde(default)]
    pub(crate) nameless: Option<PathBuf>,
    /// What is odd about the names of its files.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    /// What works on the disk now, by the verbs of the commands.
    #[serde(default)]
    pub(crate) jobs: Vec<String>,
    /// The image that is written to.
    #[serde(default)]
    pub(crate) top_image: Option<PathBuf>,
    /// How it uses its file; what its table in memory says.
    #[serde(default)]
    pub(crate) space: Option<Space>,
}

/// What it means that a disk has no keeper.
pub(crate) const UNGUARDED: &str =
    "the keeper of the disk is dead: everything is written out at once until its server has another one";

/// Whether a disk that is served has no keeper: nobody would succeed its server.
pub(crate) fn is_unguarded(state: &State, status: &Status) -> bool {
    status.unguarded || state.keeper.is_some_and(|keeper| !keeper.is_running())
}

/// Fails when the keeper of a disk says that its server does not run, though it is not dead.
pub(crate) fn check_alive(state: &State) -> Result<()> {
    let has_keeper = state.keeper.is_some_and(|keeper| keeper.is_running());
    let Some(trouble) = state.trouble.as_ref().filter(|_| has_keeper && state.failure.is_none()) else {
        return Ok(());
    };
    let server = state.server.map_or_else(String::new, |server| server.id.to_string());
    Err(Error::new(ErrorKind::UnmountBusy, format!("the disk is not being served: {trouble}"))
        .at_path(state.images.last().map(|image| image.path.clone()).unwrap_or_default())
        .advise(format!(
            "a stopped server goes on with `kill -CONT {server}`; one that does not can be killed (`kill -9 {server}`), and a \
             successor takes over without loss"
        )))
}

/// What a server that does not say so means.
fn always() -> bool {
    true
}

/// A disk that is served.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) entry: Entry,
    pub(crate) state: State,
}

/// Starts serving a disk and attaches a loop device. Whatever fails is undone.
pub(crate) fn start(request: OpenRequest, options: &ServeOptions) -> Result<Served> {
    let runtime = Runtime::of_user()?;
    runtime.sweep()?;
    let (descriptor, images) = open::files(&request)?;
    let id = new_id();
    let state = State {
        component: options.component.clone(),
        host_policy: options.host_policy,
        ..State::new(id.clone(), request, descriptor, images)
    };
    let entry = runtime.create(&id, &state)?;
    let result = start_in(&entry, options);
    match result {
        Ok(state) => Ok(Served { entry, state }),
        Err(error) => match end(&Served { state: entry.state()?, entry }) {
            // The first failure is what matters; that of its keeper is the same one again.
            Ok(()) | Err(_) => Err(error),
        },
    }
}

fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string().chars().take(12).collect()
}

fn start_in(entry: &Entry, options: &ServeOptions) -> Result<State> {
    let mut keeper = start_keeper(entry, options)?;
    wait_until_ready(entry, &mut keeper)?;
    if options.without_device {
        return entry.state();
    }
    let file = entry.disk_file();
    let read_only = entry.state()?.open.read_only;
    let partition =
        if options.whole_disk { None } else { choose_partition(&file, options.partition.as_deref())? };
    let attach = AttachOptions {
        offset: partition.map_or(0, |partition| partition.offset),
        len: partition.map_or(0, |partition| partition.len),
        read_only,
        ..AttachOptions::default()
    };
    let device = loop_device::attach(&file, options.device.as_deref(), &attach)?;
    if options.host_policy.waits && !read_only {
        // A convenience: without it, very many waiting writes keep reads waiting.
        loop_device::keep_requests_for_reads(&device);
    }
    entry
        .update(|state| {
            state.loop_device = Some(device.clone());
            state.partition = partition;
        })
        .inspect_err(|_| {
            // Without a record nobody would find it again.
            let _ = loop_device::detach(&device);
        })
}

/// Starts the keeper as a process of its own session; its words go to the log in the run-time folder.
fn start_keeper(entry: &Entry, options: &ServeOptions) -> Result<Child> {
    let failed = |operation: &str, cause| Error::io(ErrorKind::System, operation.to_owned(), cause);
    let log = open_log(entry).map_err(|cause| failed("open the log", cause).at_path(entry.log_file()))?;
    let second = log.try_clone().map_err(|cause| failed("open the log", cause))?;
    // A lock or a pipe of the script that mounts is not to be held until the unmount.
    sys::pass_on_nothing()
        .map_err(|cause| failed("keep descriptors of the caller from the keeper", cause))?;
    let name = entry.state()?.descriptor.map_or_else(|| entry.path().to_path_buf(), |file| file.path);
    let mut command = Command::new("/proc/self/exe");
    command.arg0(guarding::process_name("keeper", &name)).arg("keeper");
    let allowed = std::env::var_os(ALLOW_RECLAIM_STALL_VARIABLE).is_some_and(|value| value == "1");
    // No page is dirtied through a disk that is only looked at, so none waits for it.
    let only_looks = options.without_device && entry.state()?.open.read_only;
    if options.allow_reclaim_stall || allowed || only_looks {
        command.arg("--allow-reclaim-stall");
    }
    if options.threads > 0 {
        command.arg("--threads").arg(options.threads.to_string());
    }
    command.arg(entry.path()).current_dir("/").stdin(Stdio::null()).stdout(log).stderr(second);
    command.spawn().map_err(|cause| failed("start the keeper", cause))
}

fn open_log(entry: &Entry) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(entry.log_file())
}

/// Waits until the server serves, as long as there is a keeper.
fn wait_until_ready(entry: &Entry, keeper: &mut Child) -> Result<()> {
    loop {
        let ended =
            keeper.try_wait().map_err(|cause| Error::io(ErrorKind::System, "wait for the keeper", cause))?;
        if let Some(failure) = entry.state()?.failure {
            return Err(failure.into_error());
        }
        if let Some(status) = ended {
            let tail = log_tail(entry).unwrap_or_default();
            return Err(Error::new(
                ErrorKind::Device,
                format!("the keeper ended ({status}): {}", tail.trim()),
            ));
        }
        if entry.socket().exists() && status_of(entry).is_ok_and(|status| status.ready) {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}

fn log_tail(entry: &Entry) -> io::Result<String> {
    let mut file = File::open(entry.log_file())?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

/// Connects to the server of a disk for a command. One that does not listen though its keeper runs is on its way: the
/// mount waits for something, or a server succeeds another.
pub(crate) fn connect(entry: &Entry) -> Result<Connection> {
    Connection::open(&entry.socket()).map_err(|error| {
        let is_on_its_way = entry
            .state()
            .is_ok_and(|state| state.failure.is_none() && (state.is_running() || state.keeper.is_none()));
        if error.kind() != ErrorKind::Device || !is_on_its_way {
            return error;
        }
        Error::new(ErrorKind::Busy, "the disk is just being mounted, or its server is just being replaced")
            .at_path(entry.path())
            .advise(
                "wait until `ploop list` shows it running, then run the same command again; if it stays as it is, \
                 `ploop umount` ends the attempt",
            )
    })
}

/// Asks the server how it is.
pub(crate) fn status_of(entry: &Entry) -> Result<Status> {
    let answer = Connection::open(&entry.socket())?.ask("status", &(), &[], Some(STATUS_MAX), |_| {})?;
    serde_json::from_value(answer)
        .map_err(|cause| Error::io(ErrorKind::System, "read the server's status", cause.into()))
}

/// The partition of the disk behind `file` that is to be shown: the one that `wanted` means, or the first; `None` for a disk
/// without a table. The kernel need not know the table.
fn choose_partition(file: &Path, wanted: Option<&str>) -> Result<Option<PartitionRange>> {
    let table = partition_table::read(&ShownDisk::open(file, false)?).map_err(|error| error.at_path(file))?;
    match (table, wanted) {
        (Some(table), Some(wanted)) => table.choose(wanted, file).map(|one| Some(one.range())),
        (Some(table), None) => Ok(table.partitions.first().map(Partition::range)),
        (None, Some(wanted)) => Err(Error::new(
            ErrorKind::Parameter,
            format!("partition {wanted:?}: the disk has no partition table"),
        )
        .advise("leave out --partition")),
        (None, None) => Ok(None),
    }
}

/// Detaches the loop device, closes the image, ends server and keeper, and removes the run-time folder. What an
/// earlier death of the server has left is cleared, and then told as an error.
pub(crate) fn end(served: &Served) -> Result<()> {
    let entry = &served.entry;
    if let Some(device) = &served.state.loop_device {
        // The device may be somebody else's by now.
        let ours = loop_device::backing_file(device).is_some_and(|file| file == entry.disk_file());
        if ours {
            loop_device::detach(device).map_err(|error| match error.kind() {
                ErrorKind::Busy => error.with_kind(ErrorKind::UnmountBusy),
                _ => error,
            })?;
        }
    }
    let state = match entry.state() {
        Ok(state) => state,
        Err(_) if !entry.path().exists() => return Ok(()),
        Err(error) => return Err(error),
    };
    // Whoever is in the record: it may be older than the server.
    let stopped = if state.failure.is_none() && state.is_running() {
        stop_server(entry).map(|()| true)
    } else {
        Ok(false)
    };
    if let Err(error) = &stopped
        && matches!(error.kind(), ErrorKind::UnmountBusy | ErrorKind::Parameter)
    {
        return stopped.map(drop);
    }
    wait_for_keeper(entry, &state)?;
    let last = entry.state().ok();
    let is_closed = is_closed(last.as_ref().unwrap_or(&state));
    // The keeper removes the folder after a clean end, and only then.
    let is_gone = !entry.path().exists();
    entry.remove()?;
    let was_asked = stopped?;
    match last.and_then(|state| state.failure) {
        Some(failure) => Err(failure.into_error()),
        None if was_asked || is_gone || state.open.read_only || is_closed => Ok(()),
        None => Err(Error::new(
            ErrorKind::Device,
            "the server of the disk and its keeper had died: what was written last is not in the image",
        )
        .at_path(state.images.last().map(|image| image.path.clone()).unwrap_or_default())
        .advise("what was left is cleared; check the image and its file system before they are used again")),
    }
}

/// Whether the top of a disk that nobody serves says that it was closed, and is the file that was served.
fn is_closed(state: &State) -> bool {
    let Some(top) = state.images.last() else { return false };
    let is_it = ImageFile::at(&top.path).is_ok_and(|now| now.is_same_file(top));
    let options = FileOptions::new(Access::ReadOnly);
    let Ok(file) = FileStorage::open(&top.path, &options) else { return false };
    is_it && matches!(probe(&file), Ok(Probe::Image(header)) if header.in_use() == InUse::Closed)
}

fn stop_server(entry: &Entry) -> Result<()> {
    // A namespace made meanwhile has the exported file as well, and the server waits for its last mount to go.
    unmount_copies(&entry.disk_file())?;
    let deadline = Instant::now() + BUSY_MAX;
    loop {
        let answer = Connection::open(&entry.socket())
            .and_then(|connection| connection.ask("stop", &(), &[], None, |_| {}));
        match answer {
            Ok(_) => return Ok(()),
            // Somebody looks at the exported file, or a server is just succeeding another.
            Err(error)
                if matches!(error.kind(), ErrorKind::UnmountBusy | ErrorKind::Device)
                    && Instant::now() < deadline
                    && entry.state().is_ok_and(|state| state.failure.is_none()) =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            // The server was gone before it could be asked.
            Err(_) if !entry.path().exists() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn wait_for_keeper(entry: &Entry, state: &State) -> Result<()> {
    let deadline = Instant::now() + KEEPER_END_MAX;
    while entry.path().exists()
        && [&state.keeper, &state.server].into_iter().flatten().any(|process| process.is_running())
    {
        if Instant::now() >= deadline {
            return Err(Error::new(ErrorKind::Busy, "the keeper of the disk does not end")
                .at_path(entry.path())
                .advise("its log there says why"));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
