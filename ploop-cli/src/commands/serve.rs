//! `ploop serve`: the server process of one disk, a child of its keeper.
//!
//! It opens the chain, serves it as the exported file, listens on the control socket, and closes the image when the
//! exported file is unmounted. Its exit code is 0 only after a clean close: anything else makes the keeper start a
//! successor, if one is allowed.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use ploop_core::device::control::{ControlServer, Handlers};
use ploop_core::device::fuse::keeper::{self, Mode, Protection};
use ploop_core::device::fuse::server::{ServerOptions, Serving};
use ploop_core::device::fuse::survivor::{FileIdentity, Legacy, Survivor};
use ploop_core::device::fuse::sys::{self, FuseDevice};
use ploop_core::device::runtime::{Entry, Failure, HostPolicy, ImageFile};
use ploop_core::device::{Disk, DiskOptions};
use ploop_core::format::Chain;
use ploop_core::ops::{self, CompactOptions};
use ploop_core::{Error, ErrorKind, Result};
use serde_json::Value;

use crate::commands::{compact, map, stat};
use crate::copy_service::{self, CopyService};
use crate::exit::Outcome;
use crate::full_host::{self, WaitingStatus};
use crate::job_service::{self, Cargo, Turns};
use crate::open::{self, Manner};
use crate::output::Output;
use crate::resize_service;
use crate::serving::Status;
use crate::snapshot_service::{self, SnapshotService};

/// How long a successor waits for the locks of the dead server, which end with its last transfer.
const LOCK_WAIT: Duration = Duration::from_secs(60);
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
    let entry = Entry::at(&arguments.folder)?;
    let result = serve(&entry, arguments, output);
    if let Err(error) = &result
        && arguments.mode == Mode::First
    {
        // Whoever mounts waits for this; without it the keeper could only tell that there was a failure.
        entry.update(|state| state.failure = Some(Failure::of(error)))?;
    }
    Ok(result?)
}

fn serve(entry: &Entry, arguments: &Arguments, output: &Output) -> Result<()> {
    let inherited = |number, what: &str| {
        sys::inherited(number)
            .map_err(|cause| Error::io(ErrorKind::Parameter, format!("take over {what}"), cause))
    };
    let fuse = FuseDevice::new(inherited(arguments.fuse, "the FUSE device")?);
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
    let chain = open_chain(entry, arguments, &survivor, output)?;
    let images = open::files_of(&chain)?;
    // A dead server may have put another file in its place and not come to say so.
    let descriptor = entry.state()?.open.descriptor.map(|path| ImageFile::at(&path)).transpose()?;
    let policy = match arguments.mode {
        // Nobody is left who could write: a keeper waits for the end, which must come.
        Mode::Finish => HostPolicy::default(),
        Mode::First | Mode::Takeover => entry.state()?.host_policy,
    };
    let disk = Disk::open(
        chain,
        DiskOptions {
            read_only: entry.state()?.open.read_only,
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
    let control = ControlServer::start(&entry.socket(), handlers(entry, &disk, &ready, &outcome, &turns))?;
    let serving = Serving::start(fuse, Arc::clone(&disk), Arc::clone(&survivor), &options)?;
    entry.update(|state| {
        state.size_bytes = Some(disk.size_bytes());
        state.images = images;
        state.descriptor = descriptor.or(state.descriptor.take());
    })?;
    survivor.set_ready()?;
    ready.store(true, Ordering::Release);
    full_host::tell_log(&disk, *output)?;
    start_signal_thread(signals, entry.clone(), Arc::clone(&disk))?;
    output.note("serving");
    // A failure leaves everything to a successor: nothing is closed here.
    serving.wait()?;
    survivor.set_stopped()?;
    // They have queues of their own, with which the image cannot be closed.
    turns.end(JOBS_END_MAX);
    let closed = disk.close();
    outcome.set(closed.clone());
    control.stop(ANSWERS_MAX);
    closed
}

/// Opens the chain; a successor enters what was pending.
fn open_chain(
    entry: &Entry,
    arguments: &Arguments,
    survivor: &Survivor,
    output: &Output,
) -> Result<Arc<Chain>> {
    let request = entry.state()?.open;
    let manner = match arguments.mode {
        Mode::First => Manner::default(),
        Mode::Takeover | Mode::Finish => Manner { lock_wait: LOCK_WAIT, is_successor: true },
    };
    let opened = open::open(&request, manner)?;
    opened.report.warnings.iter().for_each(|text| output.warn(text));
    let top = opened
        .chain
        .storage(opened.chain.top())
        .descriptor()
        .map(FileIdentity::of)
        .ok_or_else(|| Error::new(ErrorKind::Open, "the top of the disk is no file"))?
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine the image", cause))?;
    if arguments.mode != Mode::First {
        inherit(&opened.chain, top, &survivor.legacy()?)?;
    }
    survivor.set_top(top)?;
    Ok(opened.chain)
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
    disk: &Arc<Disk>,
    ready: &Arc<AtomicBool>,
    ending: &Arc<Ending>,
    turns: &Arc<Turns>,
) -> Handlers {
    let (stop_entry, stop_ending) = (entry.clone(), Arc::clone(ending));
    let (compact_disk, map_disk) = (Arc::clone(disk), Arc::clone(disk));
    let turns = Arc::clone(turns);
    let copies = Arc::new(CopyService::new(Arc::clone(disk), entry.clone(), Arc::clone(&turns)));
    let copies_of_deltas = Arc::clone(&copies);
    let snapshots = Arc::new(SnapshotService::new(Arc::clone(disk), entry.clone(), Arc::clone(&turns)));
    let (deletes, merges) = (Arc::clone(&snapshots), Arc::clone(&snapshots));
    let counted_disk = Arc::clone(disk);
    Handlers::new()
        .with("status", {
            let (disk, ready, turns) = (Arc::clone(disk), Arc::clone(ready), Arc::clone(&turns));
            move |_, _, _| status(&disk, ready.load(Ordering::Acquire), &turns)
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
        .with(snapshot_service::SNAPSHOT, move |connection, arguments, _| {
            snapshots.snapshot(connection, arguments)
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

fn status(disk: &Disk, ready: bool, turns: &Turns) -> Result<Value> {
    let status = Status {
        size_bytes: disk.size_bytes(),
        cluster_bytes: disk.cluster_bytes(),
        allocated_clusters: disk.chain().allocated_clusters(),
        read_only: disk.is_read_only(),
        poisoned: disk.is_poisoned(),
        poison: disk.check_poison().err().map(|error| Failure::of(&error).message),
        waiting: WaitingStatus::of(disk),
        pending_entries: disk.chain().pending() as u64,
        ready,
        jobs: turns.names(),
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
fn start_signal_thread(signals: SigSet, entry: Entry, disk: Arc<Disk>) -> Result<()> {
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if signal != Signal::SIGTERM {
                continue;
            }
            // A failure poisons the disk, which every later flush of the guest and the close report.
            let _ = disk.flush();
            while unmount_exported(&entry).is_err() {
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
