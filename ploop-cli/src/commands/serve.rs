//! `ploop serve`: the server process of one disk, a child of its keeper.
//!
//! It opens the chain, serves it as the exported file, listens on the control socket, and closes the image when the
//! exported file is unmounted. Its exit code is 0 only after a clean close: anything else makes the keeper start a
//! successor, if one is allowed.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use ploop_core::device::control::{Connection, ControlServer, Handlers};
use ploop_core::device::fuse::held::{self, Handing};
use ploop_core::device::fuse::keeper::{self, Mode, Protection};
use ploop_core::device::fuse::server::{ServerOptions, Serving};
use ploop_core::device::fuse::survivor::{FileIdentity, Legacy, Survivor};
use ploop_core::device::fuse::sys::{self, FuseDevice};
use ploop_core::device::runtime::{Entry, Failure, HostPolicy, OpenRequest};
use ploop_core::device::{Disk, DiskOptions};
use ploop_core::format::{Chain, DESCRIPTOR_NAME};
use ploop_core::io::file::DirectoryFolder;
use ploop_core::ops::{self, CompactOptions};
use ploop_core::{Error, ErrorKind, Result};
use serde_json::Value;

use crate::commands::{compact, map, stat};
use crate::copy_service::{self, CopyService};
use crate::exit::Outcome;
use crate::freeze_service;
use crate::full_host::{self, WaitingStatus};
use crate::guarding::{self, Guarded};
use crate::job_service::{self, Cargo, Turns};
use crate::names::{self, Names};
use crate::open;
use crate::output::Output;
use crate::resize_service;
use crate::serving::Status;
use crate::snapshot_service::{self, SnapshotService};

/// How long a successor waits for the locks of the dead server, which end with its last transfer.
/// After that it ends, the keeper says so, and starts another one.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How long the last answers may take to go out.
const ANSWERS_MAX: Duration = Duration::from_secs(5);
/// How long copies and jobs may take to end when the disk is closed.
const JOBS_END_MAX: Duration = Duration::from_secs(60);
/// How often the end that was ordered by a signal is tried while the disk is in use.
const END_RETRY: Duration = Duration::from_secs(1);

/// Serve one disk (started by its keeper)
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What for: first, takeover or finish
    #[arg(long, value_name = "MODE", value_parser = |word: &str| Mode::from_word(word).ok_or("no such mode"))]
    mode: Mode,

    /// The inherited descriptor of /dev/fuse
    #[arg(long, value_name = "NUMBER")]
    fuse: RawFd,

    /// The inherited descriptor of the keeper's memory
    #[arg(long, value_name = "NUMBER")]
    memory: RawFd,

    /// The inherited connection to the keeper
    #[arg(long, value_name = "NUMBER")]
    keeper: RawFd,

    /// Threads, each with a queue
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    threads: usize,

    /// Go on where the kernel cannot protect a server against waiting for its own device
    #[arg(long)]
    allow_reclaim_stall: bool,

    /// The run-time folder of the disk
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    guarding::name_process(c"ploop-server");
    let entry = Entry::at(&arguments.folder)?;
    let result = serve(&entry, arguments, output);
    if let Err(error) = &result
        && arguments.mode == Mode::First
    {
        // Whoever mounts waits for this; without it the keeper could only tell that there was a failure.
        let _ = entry.update(|state| state.failure = Some(Failure::of(error)));
    }
    Ok(result?)
}

fn serve(entry: &Entry, arguments: &Arguments, output: &Output) -> Result<()> {
    let inherited = |number, what: &str| {
        sys::inherited(number)
            .map_err(|cause| Error::io(ErrorKind::Parameter, format!("take over {what}"), cause))
    };
    let fuse = inherited(arguments.fuse, "the FUSE device")?;
    let second =
        fuse.try_clone().map_err(|cause| Error::io(ErrorKind::System, "share the FUSE device", cause))?;
    let fuse = FuseDevice::new(fuse);
    let survivor = Arc::new(Survivor::open(inherited(arguments.memory, "the keeper's memory")?)?);
    // Before any thread is started.
    keeper::protect_process(&Protection {
        allow_reclaim_stall: arguments.allow_reclaim_stall,
        lock_memory: true,
    })?;
    sys::forbid_new_privileges()
        .map_err(|cause| Error::io(ErrorKind::System, "give up the way to new privileges", cause))?;
    let signals = keeper::block_end_signals()?;
    let options = ServerOptions {
        threads: arguments.threads,
        takeover: arguments.mode == Mode::Takeover,
        ..ServerOptions::default()
    };
    let keeper = Connection::inherited(inherited(arguments.keeper, "the connection to the keeper")?);
    let guarding = keeper.try_clone()?;
    let Ground { chain, request, folder } = match arguments.mode {
        Mode::First => begin(entry, keeper, &survivor, output)?,
        Mode::Takeover | Mode::Finish => succeed(entry, arguments.mode, keeper, &survivor, output)?,
    };
    let policy = match arguments.mode {
        // Nobody is left who could write: a keeper waits for the end, which must come.
        Mode::Finish => HostPolicy::default(),
        Mode::First | Mode::Takeover => entry.state()?.host_policy,
    };
    let disk = Disk::open(
        chain,
        DiskOptions {
            read_only: request.read_only,
            pending_log: Arc::clone(&survivor) as _,
            on_full: policy.on_full(),
            host_reserve_bytes: policy.reserve_bytes,
            ..DiskOptions::default()
        },
    )?;
    if arguments.mode == Mode::Finish {
        return disk.close();
    }
    let outcome = Arc::new(Ending::default());
    let turns = Arc::new(Turns::default());
    let ready = Arc::new(AtomicBool::new(false));
    let unguarded = Arc::new(AtomicBool::new(false));
    let health = Arc::new(Health {
        disk: Arc::clone(&disk),
        folder: folder.clone(),
        snapshot: request.snapshot.clone(),
        ready: Arc::clone(&ready),
        turns: Arc::clone(&turns),
        unguarded: Arc::clone(&unguarded),
    });
    let control = listen(entry, arguments.mode, output, || {
        handlers(entry, &health, folder.as_ref(), &outcome, &turns)
    })?;
    let serving = Serving::start(fuse, Arc::clone(&disk), Arc::clone(&survivor), &options)?;
    survivor.set_ready()?;
    let images = match disk.chain().storage(disk.chain().top()).descriptor() {
        Some(_) => open::files_of(&disk.chain())?,
        // Joined parts: the chain does not tell their files.
        None => open::files(&request)?.1,
    };
    let descriptor = open::descriptor_in(folder.as_deref());
    let name = request.descriptor.clone().or_else(|| images.last().map(|image| image.path.clone()));
    let remember = {
        let (entry, size_bytes) = (entry.clone(), disk.size_bytes());
        move || {
            entry.update(|state| {
                state.size_bytes = Some(size_bytes);
                state.images = images;
                state.descriptor = descriptor.or(state.descriptor.take());
                state.open.descriptor = request.descriptor;
            })
        }
    };
    match arguments.mode {
        Mode::First => drop(remember()?),
        // For commands and people: the disk is served whether it can be written or not, and at once.
        _ => drop(std::thread::Builder::new().name("record".into()).spawn(move || remember().map(drop))),
    }
    ready.store(true, Ordering::Release);
    Guarded {
        disk: Arc::clone(&disk),
        survivor: Arc::clone(&survivor),
        fuse: second,
        keeper: guarding,
        keeper_line: keeper_line(entry, arguments),
        name: name.unwrap_or_else(|| entry.path().to_path_buf()),
        unguarded,
        output: *output,
    }
    .start()?;
    full_host::tell_log(&disk, *output)?;
    start_signal_thread(signals, entry.clone(), Arc::clone(&health))?;
    // Behind the last request of the start: a thaw waits for an answer of this very server.
    freeze_service::thaw_left(entry)?;
    output.note("serving");
    // A failure leaves everything to a successor: nothing is closed here.
    serving.wait()?;
    survivor.set_stopped()?;
    // They have queues of their own, with which the image cannot be closed.
    turns.end(JOBS_END_MAX);
    let closed = disk.close();
    if closed.is_ok() {
        survivor.set_closed()?;
    }
    outcome.set(closed.clone());
    if let Some(control) = control {
        control.stop(ANSWERS_MAX);
    }
    closed
}

/// The command line of another keeper for this server.
fn keeper_line(entry: &Entry, arguments: &Arguments) -> Vec<OsString> {
    let mut line: Vec<OsString> =
        vec!["keeper".into(), "--threads".into(), arguments.threads.to_string().into()];
    if arguments.allow_reclaim_stall {
        line.push("--allow-reclaim-stall".into());
    }
    line.push(entry.path().into());
    line
}

/// Listens on the control socket. A successor serves also where the run-time folder takes no socket: it tries again
/// meanwhile, and cannot be asked anything until then.
fn listen(
    entry: &Entry,
    mode: Mode,
    output: &Output,
    verbs: impl Fn() -> Handlers,
) -> Result<Option<ControlServer>> {
    let error = match ControlServer::start(&entry.socket(), verbs()) {
        Err(error) if mode != Mode::First => error,
        other => return other.map(Some),
    };
    output.error(&error);
    let (socket, mut verbs) = (entry.socket(), Some(verbs()));
    let try_again = move || {
        // It listens until the process ends.
        let mut control = None;
        while control.is_none() && socket.parent().is_some_and(Path::exists) {
            std::thread::sleep(END_RETRY);
            if let Some(now) = verbs.take() {
                match ControlServer::start_or_return(&socket, now) {
                    Ok(started) => control = Some(started),
                    Err(back) => verbs = Some(back),
                }
            }
        }
        std::mem::forget(control);
    };
    let _ = std::thread::Builder::new().name("listen".into()).spawn(try_again);
    Ok(None)
}

/// What tells how the disk is doing.
struct Health {
    disk: Arc<Disk>,
    folder: Option<Arc<DirectoryFolder>>,
    snapshot: Option<String>,
    ready: Arc<AtomicBool>,
    turns: Arc<Turns>,
    unguarded: Arc<AtomicBool>,
}

impl Health {
    fn names(&self) -> Names {
        names::examine(&self.disk.chain(), self.folder.as_deref(), self.snapshot.as_deref())
    }
}

/// What is served.
struct Ground {
    chain: Arc<Chain>,
    request: OpenRequest,
    /// The folder of the descriptor, if there is one.
    folder: Option<Arc<DirectoryFolder>>,
}

/// Opens a disk by its names, for the first time and the last.
fn begin(entry: &Entry, keeper: Connection, survivor: &Survivor, output: &Output) -> Result<Ground> {
    let request = entry.state()?.open;
    let folder = match &request.descriptor {
        Some(descriptor) => {
            Some(Arc::new(DirectoryFolder::open(descriptor.parent().unwrap_or(Path::new("/")))?))
        }
        None => None,
    };
    let opened = open::open(&request)?;
    opened.report.warnings.iter().for_each(|text| output.warn(text));
    if request.read_only && opened.chain.storage(opened.chain.top()).descriptor().is_none() {
        // Parts of a split disk, joined: nothing is ever written. Its files are not held, but compared (`succeed_joined`).
        return Ok(Ground { chain: opened.chain, request, folder });
    }
    if let Some(folder) = &folder
        && let Ok(named) = held::named_in(folder, request.snapshot.as_deref())
        && named != open::identities_of(&opened.chain)?
    {
        return Err(Error::new(ErrorKind::Busy, "open disk: its files were exchanged while it was opened")
            .at_path(folder.path())
            .advise("run the same command again"));
    }
    survivor.set_top(top_of(&opened.chain)?)?;
    let handing = Handing::new(keeper, request.clone(), folder.as_deref(), 0)?;
    survivor.hand_files(handing, &opened.chain)?;
    Ok(Ground { chain: opened.chain, request, folder })
}

/// Goes on with the very files that a dead server had open, and enters what was pending.
fn succeed(
    entry: &Entry,
    mode: Mode,
    keeper: Connection,
    survivor: &Survivor,
    output: &Output,
) -> Result<Ground> {
    let legacy = survivor.legacy()?;
    let held = held::receive_all(&keeper)?;
    if held.is_empty() && legacy.entries.is_empty() {
        return succeed_joined(entry, output);
    }
    let chosen = held::choose(held, legacy.files, !legacy.entries.is_empty())?;
    if let Some(warning) = &chosen.warning {
        output.warn(warning);
    }
    let folder = chosen.files.open_folder()?.map(Arc::new);
    let opened = open::open_held(&chosen.files, folder.as_deref(), LOCK_WAIT)?;
    opened.report.warnings.iter().for_each(|text| output.warn(text));
    let top = top_of(&opened.chain)?;
    if chosen.files.top()? != top {
        return Err(Error::new(
            ErrorKind::Open,
            "succeed a dead server: another file was opened than is held",
        ));
    }
    // A server that dies leaves the mark. Without it somebody else has had the image, and closed it.
    let needs_mark = mode == Mode::Takeover || !legacy.entries.is_empty();
    let is_image = opened.chain.header(opened.chain.top()).is_some();
    if needs_mark && is_image && opened.report.writable && !opened.report.was_in_use {
        let error = Error::new(
            ErrorKind::Device,
            "succeed a dead server: another program has opened the image and closed it since",
        )
        .at_path(opened.chain.name(opened.chain.top()))
        .advise("unmount what is left with ploop umount, then check the image and its file system");
        // The mark is there again by now: the next one would not notice.
        survivor.refuse_successors()?;
        let _untold = entry.update(|state| {
            state.failure.get_or_insert_with(|| Failure::of(&error));
        });
        return Err(error);
    }
    inherit(&opened.chain, top, &legacy)?;
    survivor.set_top(top)?;
    let mut request = chosen.files.terms.open.clone();
    if let (Some(descriptor), Some(folder)) = (&mut request.descriptor, &folder) {
        *descriptor = folder.path().join(DESCRIPTOR_NAME);
    }
    let handing = Handing::new(keeper, request.clone(), folder.as_deref(), chosen.number_max)?;
    survivor.hand_files(handing, &opened.chain)?;
    Ok(Ground { chain: opened.chain, request, folder })
}

/// Goes on with a split disk, of which no file is held: nothing was ever written, so it is enough that its names still lead
/// to the files that the record of the disk has. Anything else has no successor (K1).
fn succeed_joined(entry: &Entry, output: &Output) -> Result<Ground> {
    let state = entry.state()?;
    let request = state.open;
    let is_same = || -> Result<bool> {
        let found = open::files(&request)?.1;
        Ok(found.len() == state.images.len()
            && found.iter().zip(&state.images).all(|(found, served)| found.is_same_file(served)))
    };
    let opened = if request.read_only && is_same()? { Some(open::open(&request)?) } else { None };
    match opened {
        Some(opened) if opened.chain.storage(opened.chain.top()).descriptor().is_none() && is_same()? => {
            opened.report.warnings.iter().for_each(|text| output.warn(text));
            Ok(Ground { chain: opened.chain, request, folder: None })
        }
        _ => Err(Error::new(
            ErrorKind::Device,
            "succeed a dead server: the keeper does not hold the files it had open",
        )
        .advise("unmount what is left with ploop umount, then mount the disk again")),
    }
}

fn top_of(chain: &Chain) -> Result<FileIdentity> {
    let file = chain.storage(chain.top()).descriptor();
    file.map(FileIdentity::of)
        .ok_or_else(|| Error::new(ErrorKind::Open, "the top of the disk is no file"))?
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine the image", cause))
}

/// Enters what a dead server had acknowledged and not yet written to the table.
fn inherit(chain: &Chain, top: FileIdentity, legacy: &Legacy) -> Result<()> {
    if legacy.poisoned || legacy.incomplete {
        return Err(Error::new(ErrorKind::Sync, "succeed a dead server: what it left is not whole")
            .advise("unmount, then check the image and its file system"));
    }
    if legacy.entries.is_empty() {
        return Ok(());
    }
    if legacy.top != Some(top) {
        return Err(Error::new(
            ErrorKind::InUse,
            "succeed a dead server: what it had pending belongs to another file than the top of the disk",
        )
        .advise("unmount, then check the image and its file system"));
    }
    chain.adopt(legacy.entries.iter().map(|entry| (entry.cluster, entry.file)))
}

/// The outcome of closing the image, for those who asked for it over the control socket.
#[derive(Default)]
struct Ending {
    outcome: Mutex<Option<Result<()>>>,
    known: Condvar,
}

impl Ending {
    fn set(&self, outcome: Result<()>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.known.notify_all();
    }

    fn wait(&self) -> Result<()> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = outcome.as_ref() {
                return outcome.clone();
            }
            outcome = self.known.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What can be asked of a server.
fn handlers(
    entry: &Entry,
    health: &Arc<Health>,
    folder: Option<&Arc<DirectoryFolder>>,
    ending: &Arc<Ending>,
    turns: &Arc<Turns>,
) -> Handlers {
    let disk = &health.disk;
    let (stop_entry, stop_ending) = (entry.clone(), Arc::clone(ending));
    let (compact_disk, map_disk) = (Arc::clone(disk), Arc::clone(disk));
    let turns = Arc::clone(turns);
    let copies =
        Arc::new(CopyService::new(Arc::clone(disk), entry.clone(), folder.cloned(), Arc::clone(&turns)));
    let copies_of_deltas = Arc::clone(&copies);
    let snapshots =
        Arc::new(SnapshotService::new(Arc::clone(disk), entry.clone(), folder.cloned(), Arc::clone(&turns)));
    let (deletes, merges) = (Arc::clone(&snapshots), Arc::clone(&snapshots));
    let counted_disk = Arc::clone(disk);
    Handlers::new()
        .with("status", {
            let health = Arc::clone(health);
            move |_, _, _| status(&health)
        })
        .with(resize_service::VERB, {
            let (entry, disk, turns) = (entry.clone(), Arc::clone(disk), Arc::clone(&turns));
            move |connection, arguments, descriptors| {
                resize_service::serve(&turns, &entry, &disk, (connection, arguments, descriptors))
            }
        })
        .with(full_host::GIVE_UP, {
            let disk = Arc::clone(disk);
            move |_, _, _| {
                disk.give_up_waiting();
                Ok(Value::Null)
            }
        })
        .with("stop", move |_, _, _| {
            unmount_exported(&stop_entry)?;
            stop_ending.wait().map(|()| Value::Null)
        })
        .with(map::VERB, move |connection, _, _| map::serve(&map_disk.chain(), connection))
        .with(compact::VERB.0, move |connection, arguments, descriptors| {
            job_service::serve(
                &turns,
                compact::VERB,
                (connection, arguments, descriptors),
                |options: CompactOptions, progress| ops::compact_running(&compact_disk, &options, progress),
            )
        })
        .with(snapshot_service::SNAPSHOT, move |_, arguments, descriptors| {
            snapshots.snapshot(arguments, descriptors)
        })
        .with(snapshot_service::DELETE, move |connection, arguments, descriptors| {
            deletes.delete(connection, arguments, descriptors)
        })
        .with(snapshot_service::MERGE, move |connection, arguments, descriptors| {
            merges.merge(connection, arguments, descriptors)
        })
        .with(stat::VERB, move |_, _, _| stat::count(&counted_disk))
        .with(copy_service::VERB, move |connection, arguments, descriptors| {
            copies.serve(Cargo::Content, connection, arguments, descriptors)
        })
        .with(copy_service::CHAIN_VERB, move |connection, arguments, descriptors| {
            copies_of_deltas.serve(Cargo::Deltas, connection, arguments, descriptors)
        })
}

fn status(health: &Health) -> Result<Value> {
    let disk = &health.disk;
    let jobs = health.turns.names();
    // A job may be just changing which files there are.
    let names = if jobs.is_empty() { health.names() } else { Names::default() };
    let status = Status {
        size_bytes: disk.size_bytes(),
        cluster_bytes: disk.cluster_bytes(),
        allocated_clusters: disk.chain().allocated_clusters(),
        read_only: disk.is_read_only(),
        poisoned: disk.is_poisoned(),
        poison: disk.check_poison().err().map(|error| Failure::of(&error).message),
        waiting: WaitingStatus::of(disk),
        pending_entries: disk.chain().pending() as u64,
        ready: health.ready.load(Ordering::Acquire),
        jobs,
        unguarded: health.unguarded.load(Ordering::SeqCst),
        nameless: names.nameless,
        warnings: names.warnings,
        top_image: Some(disk.chain().name(disk.chain().top()).to_path_buf()),
        space: Some(ops::space_of_top(&disk.chain())?),
    };
    serde_json::to_value(status)
        .map_err(|cause| Error::io(ErrorKind::System, "write the status", cause.into()))
}

/// Unmounts the exported file, which ends the server. The kernel knows whether anybody uses it.
fn unmount_exported(entry: &Entry) -> Result<()> {
    match sys::unmount(&entry.disk_file(), false) {
        Ok(()) => Ok(()),
        // Unmounted before: the end is on its way.
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(()),
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
            Err(Error::new(ErrorKind::UnmountBusy, "stop the server: the disk is in use")
                .at_path(entry.disk_file())
                .advise("detach its loop device, and close whatever has the file open"))
        }
        Err(error) => {
            Err(Error::io(ErrorKind::Unmount, "unmount the exported file", error).at_path(entry.disk_file()))
        }
    }
}

/// SIGTERM: everything durable now, and the end as soon as nobody uses the disk any more. A machine that goes down
/// sends it to everybody, while file systems are still mounted.
fn start_signal_thread(signals: SigSet, entry: Entry, health: Arc<Health>) -> Result<()> {
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if signal != Signal::SIGTERM {
                continue;
            }
            // A failure poisons the disk, which every later flush of the guest and the close report.
            let _ = health.disk.flush();
            // An image without a name would be gone with everything in it: that end is ordered by `ploop umount` alone.
            while !health.disk.is_read_only() && health.names().nameless.is_some()
                || unmount_exported(&entry).is_err()
            {
                std::thread::sleep(END_RETRY);
            }
            return;
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the signal thread", cause))
}
