//! What becomes of writes for which the host has no space: the policy as it is typed, remembered and shown.
//!
//! The policy of a running disk stands in its record, so that a successor of its server keeps it. What was typed when a
//! disk with a descriptor was mounted for writing is remembered in a file [`NAME`] beside the base image, as JSON, for
//! later mounts that say nothing. It is not an element of the descriptor: the original ignores what it does not know there
//! and drops it when it writes. Nothing depends on the file: it may be missing, and a copy of the disk does not have it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use ploop_core::device::runtime::{Entry, HostPolicy, Runtime, State};
use ploop_core::device::{Disk, Waiting};
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::args;
use crate::condition::{Condition, seconds_ago, utc};
use crate::output::{Output, human_bytes};
use crate::serving;

/// Name of the file beside the base image.
const NAME: &str = ".ploop-on-full.json";
/// The most of it that is read.
const RECORD_BYTES_MAX: u64 = 4096;
/// The verb that ends waiting.
pub(crate) const GIVE_UP: &str = "give-up-waiting";
/// How often the server's log looks whether it has been told to end.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How long an umount looks whether writes go on waiting.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// How often it looks.
const WATCH: Duration = Duration::from_millis(250);
/// How long a server may take to take up the word that waiting is over.
const GIVE_UP_MAX: Duration = Duration::from_secs(10);

/// What to do when the host is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnFull {
    /// Writes that need space wait for it; all else goes on
    Wait,
    /// Writes that need space fail
    Error,
}

/// The policy as typed.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// What happens to writes for which the host, or the quota, has no space [default: wait, or as last time]
    #[arg(long, value_name = "HOW")]
    on_full: Option<OnFull>,

    /// How long they wait, in seconds, before they fail; 0 for as long as it takes [default: 0, or as last time]
    #[arg(long, value_name = "SECONDS")]
    on_full_timeout: Option<u64>,

    /// Space that the disk's growth leaves free on the host's file system: with less, the host is taken for full. Sectors, or
    /// with K, M, G, T [default: 0, or as last time]
    #[arg(long, value_name = "SIZE", value_parser = args::sectors)]
    reserve: Option<u64>,
}

impl Options {
    fn is_empty(&self) -> bool {
        self.on_full.is_none() && self.on_full_timeout.is_none() && self.reserve.is_none()
    }

    /// The policy for a mount of what lies in `folder`, and remembers what was typed there. Without a folder nothing is
    /// remembered.
    pub(crate) fn policy(&self, folder: Option<&Path>, output: &Output) -> HostPolicy {
        let mut policy = folder
            .and_then(|folder| match remembered(folder) {
                Ok(policy) => policy,
                Err(cause) => {
                    output.warn(&format!("{}: not read: {cause}", folder.join(NAME).display()));
                    None
                }
            })
            .unwrap_or(HostPolicy { waits: true, ..HostPolicy::default() });
        if let Some(on_full) = self.on_full {
            policy.waits = on_full == OnFull::Wait;
        }
        if let Some(seconds) = self.on_full_timeout {
            policy.timeout_s = (seconds > 0).then_some(seconds);
        }
        if let Some(sectors) = self.reserve {
            policy.reserve_bytes = sectors.saturating_mul(ploop_core::units::SECTOR_BYTES);
        }
        if let Some(folder) = folder.filter(|_| !self.is_empty())
            && let Err(cause) = remember(folder, &policy)
        {
            output
                .warn(&format!("{}: not remembered for later mounts: {cause}", folder.join(NAME).display()));
        }
        policy
    }
}

fn remembered(folder: &Path) -> io::Result<Option<HostPolicy>> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(folder.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut text = Vec::new();
    file.take(RECORD_BYTES_MAX).read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

fn remember(folder: &Path, policy: &HostPolicy) -> io::Result<()> {
    let temporary = folder.join(format!("{NAME}.new"));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    let mut file = options.open(&temporary)?;
    file.write_all(&serde_json::to_vec(policy)?)?;
    file.sync_all()?;
    fs::rename(temporary, folder.join(NAME))
}

/// What waits, as a server tells it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WaitingStatus {
    /// Writes that are not answered.
    pub(crate) writes: u64,
    /// Space they ask for in bytes, in whole clusters.
    pub(crate) bytes_needed: u64,
    /// Whether the table of the image cannot be written either: flushes wait.
    pub(crate) table: bool,
    /// For how many milliseconds something has been waiting.
    pub(crate) elapsed_ms: u64,
    /// Whether it is the quota rather than the file system.
    pub(crate) quota: bool,
    /// What is free on the host's file system, in bytes, where that is known.
    pub(crate) free_bytes: Option<u64>,
    /// What is to stay free there.
    pub(crate) reserve_bytes: u64,
    /// Where space is missing.
    pub(crate) folder: PathBuf,
}

impl WaitingStatus {
    /// What waits on a disk now.
    pub(crate) fn of(disk: &Disk) -> Option<Self> {
        let Waiting { writes, bytes_needed, table, elapsed, errno, .. } = disk.waiting()?;
        let chain = disk.chain();
        let image = chain.name(chain.top());
        Some(Self {
            writes,
            bytes_needed,
            table,
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            quota: errno == nix::libc::EDQUOT,
            free_bytes: free_bytes(disk),
            reserve_bytes: disk.host_reserve_bytes(),
            folder: image.parent().unwrap_or(image).to_path_buf(),
        })
    }
}

/// What is free on the file system of a disk's top image.
pub(crate) fn free_bytes(disk: &Disk) -> Option<u64> {
    let chain = disk.chain();
    chain.storage(chain.top()).host_free_bytes().ok().flatten()
}

/// Why it waits, in words.
pub(crate) fn cause(waiting: &WaitingStatus) -> String {
    let what = match (waiting.writes, waiting.table) {
        (0, _) => "flushes wait for space for the image's table".to_owned(),
        (writes, table) => {
            let flushes = if table { " and flushes" } else { "" };
            let (plural, verb) = if writes == 1 && !table { ("", "waits") } else { ("s", "wait") };
            format!(
                "{writes} write{plural}{flushes} {verb} for {} of space",
                human_bytes(waiting.bytes_needed)
            )
        }
    };
    let folder = waiting.folder.display();
    let free = waiting.free_bytes.map(|free| format!(" ({} free)", human_bytes(free))).unwrap_or_default();
    let asks_reserve = waiting.reserve_bytes > 0
        && waiting.free_bytes.is_some_and(|free| free >= waiting.bytes_needed.min(1 << 20));
    if waiting.quota {
        format!("{what}: the quota of {folder} is used up")
    } else if asks_reserve {
        format!("{what}: {folder} has{free}, of which {} are to stay", human_bytes(waiting.reserve_bytes))
            .replace(" (", " ")
            .replace(" free),", " free,")
    } else {
        format!("{what}: the file system of {folder} is full{free}")
    }
}

/// What to do about it.
pub(crate) fn advice(waiting: &WaitingStatus) -> String {
    let what = if waiting.quota { "raise the quota or make room within it" } else { "make room there" };
    format!("{what}, and all goes on by itself; or `ploop umount --give-up-waiting`: what waits fails then")
}

/// Tells the log when writes begin and cease to wait. Runs until the disk is gone.
pub(crate) fn tell_log(disk: &Arc<Disk>, output: Output) -> Result<()> {
    let disk = Arc::downgrade(disk);
    let tell = move || {
        let (mut seen, mut since) = (0, None);
        while let Some(disk) = disk.upgrade() {
            match (WaitingStatus::of(&disk), since) {
                (Some(waiting), None) => {
                    since = Some(Instant::now());
                    let now = utc(seconds_ago(0));
                    output.warn(&format!("{now}: {}; {}", cause(&waiting), advice(&waiting)));
                }
                (None, Some(begun)) => {
                    let begun: Instant = begun;
                    since = None;
                    let now = utc(seconds_ago(0));
                    let seconds = begun.elapsed().as_secs();
                    output.warn(&format!("{now}: nothing waits for space any more, after {seconds} s"));
                }
                _ => {}
            }
            let next = disk.wait_for_news_of_space(seen, PATIENCE);
            if next == seen && disk.is_closed() {
                return;
            }
            seen = next;
        }
    };
    std::thread::Builder::new()
        .name("space-log".into())
        .spawn(tell)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that logs waits", cause))
}

/// Watches over what syncs a mounted file system: an umount, a freeze. It would wait in the kernel for writes that wait for
/// space, and could not be ended there.
pub(crate) struct SpaceWatch {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SpaceWatch {
    /// Refuses when writes wait and go on doing so, unless the user `gives_up`: then they fail. Until it is dropped, it tells
    /// if some begin to wait, or lets them fail as well. `what` is watched, in words.
    pub(crate) fn begin(
        entry: &Entry,
        disk: &Path,
        what: &'static str,
        gives_up: bool,
        output: Output,
    ) -> Result<Self> {
        let deadline = Instant::now() + BUSY_MAX;
        while let Some(error) = waits(entry, disk) {
            if gives_up {
                give_up(entry)?;
            } else if Instant::now() >= deadline {
                return Err(error);
            }
            std::thread::sleep(WATCH);
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let (ended, entry, disk) = (Arc::clone(&is_over), entry.clone(), disk.to_path_buf());
        let watch = move || {
            let mut is_told = false;
            while !ended.load(Ordering::Acquire) {
                std::thread::park_timeout(WATCH);
                let Some(error) = waits(&entry, &disk).filter(|_| !ended.load(Ordering::Acquire)) else {
                    continue;
                };
                if gives_up {
                    // A server that has gone has nothing that waits.
                    let _ = give_up(&entry);
                } else if !is_told {
                    is_told = true;
                    let advice = error.advice().unwrap_or_default().to_owned();
                    output.warn(&format!("{what} waits: {error}; {advice}"));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("space-watch".into())
            .spawn(watch)
            .map_err(|cause| Error::io(ErrorKind::System, "start a thread", cause))?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for SpaceWatch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It prints and asks only.
            let _ = thread.join();
        }
    }
}

/// Refuses what is about to freeze a disk's file system while writes wait for space: the freeze would wait for them.
pub(crate) fn refuse_while_waiting(disk: &Disk) -> Result<()> {
    let Some(waiting) = WaitingStatus::of(disk) else { return Ok(()) };
    Err(Error::new(ErrorKind::Allocate, format!("the disk cannot be frozen: {}", cause(&waiting)))
        .advise(advice(&waiting)))
}

/// The error that writes of a disk wait for space; `None` when none do, or nobody serves it.
fn waits(entry: &Entry, disk: &Path) -> Option<Error> {
    let status = serving::status_of(entry).ok()?;
    status.waiting.as_ref()?;
    Condition::of_status(&status).error(disk)
}

/// Lets what waits fail.
fn give_up(entry: &Entry) -> Result<()> {
    serving::connect(entry)?.ask(GIVE_UP, &(), &[], Some(GIVE_UP_MAX), |_| {}).map(drop)
}

/// What all running disks of one host file system could still ask for.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Promised {
    /// Disks that are served from there and written to; the one asked about counts also when it is not.
    pub(crate) disks: u64,
    /// Their sizes less what they hold, in bytes.
    pub(crate) bytes: u64,
    /// What is free there, in bytes.
    pub(crate) free_bytes: u64,
}

impl Promised {
    /// Of the file system that `image` lies on. `own` is what the disk of `image` could still ask for, should it not be
    /// served: its device and inode number tell.
    pub(crate) fn on_the_host_of(image: &Path, own: Option<u64>, runtime: Option<&Runtime>) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(image).ok()?;
        let space = nix::sys::statvfs::statvfs(image).ok()?;
        let mut promised = Self {
            disks: 0,
            bytes: 0,
            free_bytes: space.blocks_available().saturating_mul(space.fragment_size()),
        };
        let mut is_served = false;
        for state in runtime.map(Runtime::states).and_then(Result::ok).unwrap_or_default() {
            let Some(bytes) = could_ask_for(&state, runtime) else { continue };
            let Some(top) = state.images.last().and_then(|top| fs::metadata(&top.path).ok()) else {
                continue;
            };
            if top.dev() == metadata.dev() {
                promised.disks += 1;
                promised.bytes = promised.bytes.saturating_add(bytes);
                is_served |= top.ino() == metadata.ino();
            }
        }
        if !is_served && let Some(own) = own {
            promised.disks += 1;
            promised.bytes = promised.bytes.saturating_add(own);
        }
        Some(promised)
    }
}

fn could_ask_for(state: &State, runtime: Option<&Runtime>) -> Option<u64> {
    if state.open.read_only {
        return None;
    }
    let status = serving::status_of(&runtime?.entry(&state.id)).ok()?;
    Some(status.size_bytes.saturating_sub(status.allocated_clusters.saturating_mul(status.cluster_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting() -> WaitingStatus {
        WaitingStatus {
            writes: 3,
            bytes_needed: 3 << 20,
            table: false,
            elapsed_ms: 5,
            quota: false,
            free_bytes: Some(4096),
            reserve_bytes: 0,
            folder: "/disks/web".into(),
        }
    }

    #[test]
    fn the_cause_says_what_waits_for_how_much_and_where() {
        let full = cause(&waiting());
        assert_eq!(
            full,
            "3 writes wait for 3 MiB of space: the file system of /disks/web is full (4 KiB free)"
        );
        let one = WaitingStatus { writes: 1, bytes_needed: 1 << 20, quota: true, ..waiting() };
        assert_eq!(cause(&one), "1 write waits for 1 MiB of space: the quota of /disks/web is used up");
        let reserve = WaitingStatus { free_bytes: Some(90 << 20), reserve_bytes: 100 << 20, ..waiting() };
        assert_eq!(
            cause(&reserve),
            "3 writes wait for 3 MiB of space: /disks/web has 90 MiB free, of which 100 MiB are to stay"
        );
        let table = WaitingStatus { writes: 0, table: true, ..waiting() };
        assert!(cause(&table).starts_with("flushes wait for space for the image's table: "));
    }

    #[test]
    fn what_was_typed_is_remembered_and_what_was_not_is_taken_from_there() {
        let folder = tempfile::tempdir().unwrap();
        let output = Output::new(false, 3);
        let at = Some(folder.path());
        let default = HostPolicy { waits: true, timeout_s: None, reserve_bytes: 0 };
        assert_eq!(Options::default().policy(at, &output), default);
        assert!(!folder.path().join(NAME).exists(), "nothing was typed");
        let typed = Options { on_full: Some(OnFull::Error), reserve: Some(2048), ..Options::default() };
        let policy = HostPolicy { waits: false, timeout_s: None, reserve_bytes: 1 << 20 };
        assert_eq!(typed.policy(at, &output), policy);
        assert_eq!(Options::default().policy(at, &output), policy);
        let later = Options { on_full_timeout: Some(9), ..Options::default() };
        assert_eq!(later.policy(at, &output), HostPolicy { timeout_s: Some(9), ..policy });
        assert_eq!(Options::default().policy(None, &output), default);
        fs::write(folder.path().join(NAME), "no JSON").unwrap();
        assert_eq!(Options::default().policy(at, &output), default);
    }
}
