//! Served disks as the commands see them: start one, attach it, detach it, end it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ploop_core::device::control::Connection;
use ploop_core::device::loop_device::{self, AttachOptions};
use ploop_core::device::runtime::{self, Entry, OpenRequest, PartitionRange, Runtime, State};
use ploop_core::ops::Space;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::{open, repartition};

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
    /// Who uses it, where several use the same images.
    pub(crate) component: Option<String>,
    /// The exported file alone, no loop device.
    pub(crate) without_device: bool,
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
    /// Entries not yet in the table on disk.
    pub(crate) pending_entries: u64,
    /// Whether requests are answered and the keeper knows it, so that a successor may follow.
    #[serde(default = "always")]
    pub(crate) ready: bool,
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
    let state =
        State { component: options.component.clone(), ..State::new(id.clone(), request, descriptor, images) };
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
    let partition = if options.whole_disk { None } else { first_partition(&file)? };
    let attach = AttachOptions {
        offset: partition.map_or(0, |partition| partition.offset),
        len: partition.map_or(0, |partition| partition.len),
        read_only,
        ..AttachOptions::default()
    };
    let device = loop_device::attach(&file, options.device.as_deref(), &attach)?;
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
    let mut command = Command::new("/proc/self/exe");
    command.arg("keeper");
    let allowed = std::env::var_os(ALLOW_RECLAIM_STALL_VARIABLE).is_some_and(|value| value == "1");
    if options.allow_reclaim_stall || allowed {
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

/// The first partition of the disk behind `file`, if it has a partition table; the kernel need not know it.
pub(crate) fn first_partition(file: &Path) -> Result<Option<PartitionRange>> {
    const SECTOR: u64 = ploop_core::units::SECTOR_BYTES;
    let failed = |operation: &str, cause: io::Error| {
        Error::io(ErrorKind::PartitionTable, operation.to_owned(), cause).at_path(file)
    };
    let mut disk = File::open(file).map_err(|cause| failed("open the disk", cause))?;
    let size = disk.metadata().map_err(|cause| failed("examine the disk", cause))?.len();
    let mut head = [0; 1024];
    if size < 2 * SECTOR * 34 {
        return Ok(None);
    }
    disk.read_exact(&mut head).map_err(|cause| failed("read the partition table", cause))?;
    if !head[512..].starts_with(b"EFI PART") {
        return Ok(None);
    }
    let table = repartition::open_table(&disk, size).map_err(|error| {
        Error::new(ErrorKind::PartitionTable, format!("read the partition table: {error}"))
            .at_path(file)
            .advise("attach the whole disk with -n and repair the table")
    })?;
    let Some((&number, partition)) = table.partitions().iter().find(|(_, partition)| partition.is_used())
    else {
        return Ok(None);
    };
    let range = || {
        let offset = partition.first_lba.checked_mul(SECTOR)?;
        let sectors = partition.last_lba.checked_sub(partition.first_lba)?.checked_add(1)?;
        let len = sectors.checked_mul(SECTOR)?;
        (offset > 0 && offset.checked_add(len)? <= size).then_some(PartitionRange { number, offset, len })
    };
    match range() {
        Some(range) => Ok(Some(range)),
        None => Err(Error::new(
            ErrorKind::PartitionTable,
            format!("partition {number} lies outside of the disk of {size} bytes"),
        )
        .at_path(file)
        .advise("attach the whole disk with -n and repair the table")),
    }
}

/// Unmounts every file system on `device`, last mounted first.
pub(crate) fn unmount_all(device: &Path) -> Result<()> {
    let deadline = Instant::now() + BUSY_MAX;
    loop {
        let Some(point) = runtime::mount_points_of(device)?.pop() else { return Ok(()) };
        match nix::mount::umount2(&point, nix::mount::MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EBUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(nix::errno::Errno::EBUSY) => {
                return Err(Error::new(ErrorKind::UnmountBusy, "unmount the file system: it is in use")
                    .at_path(&point)
                    .advise(format!(
                        "end what uses it; find it with: fuser -vm {}",
                        ploop_core::error::shown(&point)
                    )));
            }
            // Somebody else was faster.
            Err(nix::errno::Errno::EINVAL) if !runtime::mount_points_of(device)?.contains(&point) => {}
            Err(errno) => {
                return Err(
                    Error::io(ErrorKind::Unmount, "unmount the file system", errno.into()).at_path(point)
                );
            }
        }
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
    let stopped = if state.failure.is_none() && state.server.is_some_and(|server| server.is_running()) {
        stop_server(entry)
    } else {
        Ok(())
    };
    if let Err(error) = &stopped
        && matches!(error.kind(), ErrorKind::UnmountBusy | ErrorKind::Parameter)
    {
        return stopped;
    }
    wait_for_keeper(entry, &state)?;
    let failure = match entry.state() {
        Ok(state) => state.failure,
        Err(_) => None,
    };
    entry.remove()?;
    stopped?;
    match failure {
        Some(failure) => Err(failure.into_error()),
        None => Ok(()),
    }
}

fn stop_server(entry: &Entry) -> Result<()> {
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
