//! One open chain, its trackers, gate and flusher: the only thing a frontend holds.
//!
//! A [`Disk`] moves no data by itself: its [`Queue`]s do, each on a thread of its own. What they share lies here and
//! is either immutable, atomic, or guarded by its own small lock.
//!
//! Invariants: at most one freeze at a time; [`Disk::close`] succeeds at most once, after the last queue has gone,
//! and only if nothing ever poisoned the disk. A disk that is dropped without a close leaves the in-use mark set, as a
//! crash would: nothing is written by a destructor.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::allocating::ClusterLocks;
use super::flusher::{Flusher, Limits};
use super::full_host::{FullHost, OnFull, Waiting};
use super::gate::Gate;
use super::pending::{NoPendingLog, PendingLog};
use super::presence::Readers;
use super::queue::Queue;
use super::settling::Unsettled;
use super::split::Layout;
use super::ticket::{Outcome, Ticket};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Chain;
use crate::io::{Alignment, IoQueue};
use crate::tracker::{Tracker, Trackers};

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Refuse everything that changes data with `EROFS`; the chain may be open for reading only.
    pub read_only: bool,
    /// Start no flusher thread: [`Disk::step_flusher`] does its work, one system call at a time.
    pub manual_flusher: bool,
    /// Requests in flight per queue, held ones included; further ones are answered with `EAGAIN`.
    pub requests_max: usize,
    /// Buffers per queue for copy-up and misaligned transfers, each as large as a cluster, 64 KiB at least and 1 MiB at
    /// most. Requests wait while all are in use. At least 1.
    pub bounce_buffers: usize,
    /// Allocated or freed clusters that are not in the table on disk yet, from which on it is written unasked.
    pub pending_clusters_max: usize,
    /// Longest time that such a change stays only in memory. Not used with `manual_flusher`.
    pub pending_age_max: Duration,
    /// Where entries that are not durable yet are kept for a successor of this process.
    pub pending_log: Arc<dyn PendingLog>,
    /// What becomes of writes for which the host has no space. With `manual_flusher`, what waits is tried again by
    /// [`Disk::retry_waiting`] only, and no time-out is kept.
    pub on_full: OnFull,
    /// Bytes of the host's file system that the image leaves free when it grows; with less, its host is taken for full.
    pub host_reserve_bytes: u64,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            manual_flusher: false,
            requests_max: 1024,
            bounce_buffers: 16,
            pending_clusters_max: 1024,
            pending_age_max: Duration::from_secs(30),
            pending_log: Arc::new(NoPendingLog),
            on_full: OnFull::Error,
            host_reserve_bytes: 0,
        }
    }
}

/// What a disk has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Statistics {
    /// Read requests answered.
    pub reads: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Write requests answered.
    pub writes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Requests to write zeros or to discard answered.
    pub zeroes: u64,
    /// Bytes of the successful ones among them.
    pub zeroed_bytes: u64,
    /// Flushes and FUA writes that asked the flusher.
    pub flushes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Rounds of the flusher.
    pub flush_rounds: u64,
    /// Syncs of the image file.
    pub syncs: u64,
    /// Writes into the block allocation table on disk.
    pub table_writes: u64,
    /// Clusters that got a place in the top delta.
    pub allocated_clusters: u64,
    /// Clusters freed by a discard.
    pub freed_clusters: u64,
    /// Clusters moved to another place in the top's file.
    pub moved_clusters: u64,
    /// Bytes read from deltas below to complete fresh clusters.
    pub copied_up_bytes: u64,
    /// Times a request waited for another one's work on a cluster.
    pub cluster_waits: u64,
    /// Time that new writes were held by a freeze.
    pub held_ms: u64,
    /// Times a write found no space on the host and began to wait for some.
    pub space_waits: u64,
}

/// Counters behind [`Statistics`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) zeroes: AtomicU64,
    pub(super) zeroed_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) allocated_clusters: AtomicU64,
    pub(super) freed_clusters: AtomicU64,
    pub(super) moved_clusters: AtomicU64,
    pub(super) copied_up_bytes: AtomicU64,
    pub(super) cluster_waits: AtomicU64,
    pub(super) space_waits: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// A served disk.
pub struct Disk {
    pub(super) options: DiskOptions,
    cluster_bytes: u64,
    /// Grows behind a closed gate.
    disk_bytes: AtomicU64,
    pub(super) trackers: Trackers,
    pub(super) gate: Gate,
    pub(super) locks: ClusterLocks,
    pub(super) flusher: Arc<Flusher>,
    /// Which chains requests under way began with.
    pub(super) readers: Arc<Readers>,
    pub(super) counters: Counters,
    pub(super) full_host: Arc<FullHost>,
    /// Bytes of writes that wait for space and have memory of their own.
    pub(super) copied_bytes: AtomicU64,
    /// Set once the file has refused to punch or zero a range: zeros are written from then on.
    pub(super) cannot_zero: AtomicBool,
    /// While the top is being merged into the delta below it no entry of it is cleared: what was merged would be seen.
    /// Nor is one moved.
    pub(super) keeps_entries: AtomicBool,
    chain: RwLock<Arc<Chain>>,
    /// Rises with each replaced chain, so that queues need not lock to see that theirs is current.
    chain_epoch: AtomicU64,
    queues: AtomicUsize,
    is_closed: AtomicBool,
    /// The flusher, and who tries again what waits for space.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Disk {
    /// Serves `chain`, which is open for writing unless `options.read_only`. Starts the flusher's thread.
    ///
    /// Fails with `Parameter` when the top delta's clusters do not lie at multiples of what its file demands of
    /// unbuffered transfers: two clusters would share a block.
    pub fn open(chain: Arc<Chain>, options: DiskOptions) -> Result<Arc<Disk>> {
        let layout = check_layout(&chain, options.read_only)?;
        let pending_age_max = if options.manual_flusher { Duration::MAX } else { options.pending_age_max };
        let limits = Limits { pending_max: options.pending_clusters_max, age_max: pending_age_max };
        let readers = Arc::new(Readers::default());
        let log = Arc::clone(&options.pending_log);
        let full_host = Arc::new(FullHost::new(options.on_full));
        let of_flusher = (log, Arc::clone(&readers), Arc::clone(&full_host));
        let flusher = Arc::new(Flusher::new(Arc::clone(&chain), limits, of_flusher));
        chain.keep_host_free(options.host_reserve_bytes);
        let threads = if options.manual_flusher || options.read_only {
            Vec::new()
        } else {
            start_threads(&flusher, &full_host)?
        };
        Ok(Arc::new(Self {
            cluster_bytes: layout.cluster_bytes(),
            disk_bytes: AtomicU64::new(layout.disk_bytes()),
            trackers: Trackers::new(layout.disk_bytes()),
            gate: Gate::new(),
            locks: ClusterLocks::new(),
            flusher,
            readers,
            counters: Counters::default(),
            full_host,
            copied_bytes: AtomicU64::new(0),
            cannot_zero: AtomicBool::new(false),
            keeps_entries: AtomicBool::new(false),
            chain: RwLock::new(chain),
            chain_epoch: AtomicU64::new(0),
            queues: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            threads: Mutex::new(threads),
            options,
        }))
    }

    /// Size of the guest's disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Acquire)
    }

    /// Size of a cluster in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// The sizes that decide where requests are cut, as they are now.
    pub(super) fn layout(&self) -> Layout {
        Layout::new(self.cluster_bytes, self.size_bytes())
    }

    /// Logical block size for the guest, in bytes: what the format addresses. Smaller requests work as well.
    pub fn block_bytes(&self) -> u32 {
        512
    }

    /// Whether requests that change data are refused.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// The chain being served; a snapshot of a running disk replaces it.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.chain.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves `chain` from now on, which may be larger. The gate is closed and the flusher has the chain already.
    pub(super) fn install(&self, chain: Arc<Chain>) {
        let disk_bytes = chain.geometry().disk_bytes();
        chain.keep_host_free(self.options.host_reserve_bytes);
        *self.chain.write().unwrap_or_else(PoisonError::into_inner) = chain;
        self.chain_epoch.fetch_add(1, Ordering::SeqCst);
        // Last: whoever sees the new size finds the chain that has it.
        self.disk_bytes.store(disk_bytes, Ordering::Release);
    }

    /// Whether no read is under way any more that began before the chain was replaced the last time: nobody is at a file that
    /// is no part of it now.
    pub fn former_reads_ended(&self) -> bool {
        self.readers.are_past(self.chain_epoch())
    }

    pub(super) fn chain_epoch(&self) -> u64 {
        self.chain_epoch.load(Ordering::SeqCst)
    }

    /// Prepares for [`Frozen::replace_chain`] with this chain: fails if that would refuse it, and hands its files to whoever
    /// keeps them for a successor. Called before anything on disk says that it is the disk's.
    pub fn prepare_chain(&self, chain: &Chain) -> Result<()> {
        let layout = check_layout(chain, self.options.read_only)?;
        if (layout.cluster_bytes(), layout.disk_bytes()) != (self.cluster_bytes(), self.size_bytes()) {
            return Err(Error::new(ErrorKind::Parameter, "replace the chain of a disk: its sizes differ")
                .at_path(chain.name(chain.top())));
        }
        self.options.pending_log.chain_prepared(chain)
    }

    /// From now on discards free no clusters of the top: they write zeros where something is stored; and clusters are not
    /// moved: [`Op::Relocate`](super::Op) fails with `EBUSY`. Ends with [`EntriesKept::end`] only. What is under way may
    /// still free one: freeze the disk once before relying on it.
    pub fn keep_entries(self: &Arc<Self>) -> EntriesKept {
        self.keeps_entries.store(true, Ordering::SeqCst);
        EntriesKept(Arc::clone(self))
    }

    /// Whether entries are [kept](Self::keep_entries).
    pub fn keeps_entries(&self) -> bool {
        self.keeps_entries.load(Ordering::SeqCst)
    }

    /// Begins to track writes. Data read after this returns, together with what the tracker reports, is complete (T6).
    pub fn start_tracker(&self) -> Result<Arc<Tracker>> {
        self.trackers.add()
    }

    /// Ends that.
    pub fn stop_tracker(&self, tracker: &Arc<Tracker>) {
        self.trackers.remove(tracker);
    }

    /// Makes durable what was answered so far. Blocks; with `manual_flusher` it does the steps itself.
    pub fn flush(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        let outcome = Arc::new(Outcome::default());
        self.flusher.submit(Ticket::Thread(Arc::clone(&outcome)));
        if !self.is_manual() {
            return outcome.wait();
        }
        loop {
            let stepped = self.flusher.step();
            if let Some(result) = outcome.get() {
                return result;
            }
            if !stepped {
                return Err(Error::new(
                    ErrorKind::System,
                    "flush: the flusher has no work for a waiting ticket",
                ));
            }
        }
    }

    /// Cuts free clusters off the end of the top's file, once what was freed before has been given back; by how many
    /// bytes. A busy guest may keep places at the end in use: then it is less, or nothing.
    ///
    /// Call [`flush`](Self::flush) before, so that old places of moved clusters leave quarantine.
    pub fn cut_tail(&self) -> Result<u64> {
        if self.options.read_only { Ok(0) } else { self.flusher.cut_tail() }
    }

    /// Waits until every place freed before the last flush has been punched and may be used again. Afterwards nothing
    /// of ours will touch those places: a grown table may be written over them.
    pub fn settle_freed(&self) -> Result<()> {
        if self.options.read_only { Ok(()) } else { self.flusher.settle_freed() }
    }

    /// One step of the flusher, at most one system call; `false` when there is nothing to do. For a disk with
    /// `manual_flusher`.
    pub fn step_flusher(&self) -> bool {
        self.flusher.step()
    }

    /// Whether no thread flushes: the steps are the caller's.
    pub fn is_manual(&self) -> bool {
        self.options.manual_flusher
    }

    /// Whether a failed sync or table write has ended all writing.
    pub fn is_poisoned(&self) -> bool {
        self.flusher.poison().is_set()
    }

    /// Holds new writes and waits until those in flight have finished, `timeout` at most. A FUA write counts until its
    /// bytes are in the file; its flush may still be under way.
    ///
    /// The queues must be driven by other threads meanwhile. Fails with `Busy` when somebody else freezes, has frozen or
    /// has handed over the disk, or when the writes did not finish in time; the gate is open again then.
    pub fn freeze(self: &Arc<Self>, timeout: Duration) -> Result<Frozen> {
        let freezing = self.begin_freeze()?;
        if !self.gate.wait_drained(timeout) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("freeze the disk: writes still in flight after {} ms", timeout.as_millis()),
            )
            .advise("the host disk may be stuck or very slow; try again or allow more time"));
        }
        Ok(freezing.into_frozen())
    }

    /// Closes the gate without waiting, for callers that drive the queues themselves.
    pub fn begin_freeze(self: &Arc<Self>) -> Result<Freezing> {
        if !self.gate.close() {
            return Err(Error::new(ErrorKind::Busy, "freeze the disk: it is frozen or was handed over"));
        }
        Ok(Freezing { disk: Some(Arc::clone(self)) })
    }

    /// Another queue for this disk, to be driven by one thread; it uses `io` for its transfers.
    pub fn queue(self: &Arc<Self>, io: Box<dyn IoQueue>) -> Result<Queue> {
        if self.is_closed.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Device, "add a queue: the disk is closed"));
        }
        self.queues.fetch_add(1, Ordering::SeqCst);
        // The count goes down when the queue, or the half-built one, is dropped.
        Queue::new(QueueCount(Arc::clone(self)), io)
    }

    /// Makes everything durable and closes the image cleanly. All queues must be gone, else it fails with `Busy`. After
    /// any failure the in-use mark stays set.
    pub fn close(&self) -> Result<()> {
        let queues = self.queues.load(Ordering::SeqCst);
        if queues > 0 {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("close the disk: {queues} queues are still in use"),
            ));
        }
        if self.is_closed.swap(true, Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Device, "close the disk: it is closed already"));
        }
        let flushed = self.flush();
        self.stop_threads()?;
        flushed?;
        if self.options.read_only {
            return Ok(());
        }
        // Punches that are left; no ticket can come any more.
        while self.flusher.step() {}
        self.flusher.poison().check()?;
        self.chain().close()
    }

    fn stop_threads(&self) -> Result<()> {
        self.flusher.stop();
        self.full_host.stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let mut result = Ok(());
        for thread in threads {
            if thread.join().is_err() {
                result = Err(Error::new(ErrorKind::System, "a thread of the disk has panicked"));
            }
        }
        result
    }

    /// What waits for space on the host now; `None` when nothing does.
    pub fn waiting(&self) -> Option<Waiting> {
        self.full_host.waiting(self.cluster_bytes)
    }

    /// What the host's file system is to keep free, in bytes.
    pub fn host_reserve_bytes(&self) -> u64 {
        self.options.host_reserve_bytes
    }

    /// Whether it was closed, or is about to be.
    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Why the disk takes no more changes; `Ok` when it does.
    pub fn check_poison(&self) -> Result<()> {
        self.flusher.poison().check()
    }

    /// Sleeps until writes begin or cease to wait for space, or for `patience`. `seen` is what the last call returned, 0
    /// at first.
    pub fn wait_for_news_of_space(&self, seen: u64, patience: Duration) -> u64 {
        self.full_host.wait_for_news(seen, patience)
    }

    /// Ends waiting for space: what waits now is tried once more and then fails, with `ENOSPC` or `EDQUOT`, and so does
    /// what finds no space later, until something finds some. Does nothing when nothing waits.
    pub fn give_up_waiting(&self) {
        self.full_host.give_up();
        self.flusher.nudge();
    }

    /// Tries what waits for space again, as the disk's own thread does all the time.
    pub fn retry_waiting(&self) {
        self.full_host.try_again();
        self.flusher.nudge();
    }

    /// What the disk has done so far.
    pub fn statistics(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (own, flusher) = (&self.counters, &self.flusher.counts);
        Statistics {
            reads: get(&own.reads),
            read_bytes: get(&own.read_bytes),
            writes: get(&own.writes),
            written_bytes: get(&own.written_bytes),
            zeroes: get(&own.zeroes),
            zeroed_bytes: get(&own.zeroed_bytes),
            flushes: get(&own.flushes),
            errors: get(&own.errors),
            flush_rounds: get(&flusher.rounds),
            syncs: get(&flusher.syncs),
            table_writes: get(&flusher.table_writes),
            allocated_clusters: get(&own.allocated_clusters),
            freed_clusters: get(&own.freed_clusters),
            moved_clusters: get(&own.moved_clusters),
            copied_up_bytes: get(&own.copied_up_bytes),
            cluster_waits: get(&own.cluster_waits),
            held_ms: u64::try_from(self.gate.held().as_millis()).unwrap_or(u64::MAX),
            space_waits: get(&own.space_waits),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A panic of the thread has been printed by the runtime, and there is nobody to tell.
        let _ = self.stop_threads();
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Disk")
            .field("size_bytes", &self.size_bytes())
            .field("cluster_bytes", &self.cluster_bytes())
            .field("poisoned", &self.is_poisoned())
            .finish_non_exhaustive()
    }
}

fn start_threads(flusher: &Arc<Flusher>, full_host: &Arc<FullHost>) -> Result<Vec<JoinHandle<()>>> {
    let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(run)
            .map_err(|cause| Error::io(ErrorKind::System, "start a thread of the disk", cause))
    };
    let flushing = Arc::clone(flusher);
    let mut threads = vec![start("ploop-flusher", Box::new(move || flushing.run()))?];
    if full_host.may_wait() {
        let (full_host, flusher) = (Arc::clone(full_host), Arc::clone(flusher));
        threads.push(start("ploop-space", Box::new(move || full_host.run(|| flusher.nudge())))?);
    }
    Ok(threads)
}

/// The sizes of a chain, if they can be served.
pub(super) fn check_layout(chain: &Chain, read_only: bool) -> Result<Layout> {
    let geometry = chain.geometry();
    let unit = u64::from(chain.storage(chain.top()).alignment().offset.max(1));
    let fits = geometry.cluster_bytes().is_multiple_of(unit) && geometry.phase_bytes().is_multiple_of(unit);
    if !read_only && !fits {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("serve the image: its clusters do not lie at multiples of the host disk's {unit} bytes"),
        )
        .at_path(chain.name(chain.top()))
        .advise("open it with buffered instead of direct input and output"));
    }
    Ok(Layout::new(geometry.cluster_bytes(), geometry.disk_bytes()))
}

/// The strictest demand of all files of a chain.
pub(super) fn strictest_alignment(chain: &Chain) -> Alignment {
    (0..chain.depth()).map(|delta| chain.storage(delta).alignment()).fold(Alignment::NONE, |all, one| {
        Alignment { offset: all.offset.max(one.offset), memory: all.memory.max(one.memory) }
    })
}

/// Counts a queue of the disk until it is dropped.
pub(super) struct QueueCount(pub(super) Arc<Disk>);

impl Drop for QueueCount {
    fn drop(&mut self) {
        self.0.queues.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Discards free no clusters; see [`Disk::keep_entries`]. Dropping this changes nothing: what has been merged by then lies
/// in the delta below, of which the chain in use does not know; were an entry above it cleared, it would come to light
/// when the disk is opened again.
#[must_use]
pub struct EntriesKept(Arc<Disk>);

impl EntriesKept {
    /// Discards free clusters again. Only once the chain in use knows all that was merged.
    pub fn end(self) {
        self.0.keeps_entries.store(false, Ordering::SeqCst);
    }
}

/// A gate that has closed while writes are still in flight. Dropping it opens the gate.
#[must_use]
pub struct Freezing {
    disk: Option<Arc<Disk>>,
}

impl Freezing {
    /// Whether no write is in flight any more.
    pub fn is_drained(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.gate.is_drained())
    }

    /// The frozen disk, once drained; before, itself again.
    pub fn finish(self) -> std::result::Result<Frozen, Self> {
        if self.is_drained() { Ok(self.into_frozen()) } else { Err(self) }
    }

    fn into_frozen(mut self) -> Frozen {
        Frozen { disk: self.disk.take() }
    }
}

impl Drop for Freezing {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.gate.open();
        }
    }
}

/// A disk whose writes are held: none is in flight, all are in the files and in the trackers. Reads and flushes go on.
/// Dropping it opens the gate, and held writes go on.
#[must_use]
pub struct Frozen {
    disk: Option<Arc<Disk>>,
}

impl Frozen {
    /// The disk now belongs to somebody else: held and later writes fail with `EIO`, for good.
    pub fn hand_over(mut self) {
        if let Some(disk) = self.disk.take() {
            disk.gate.hand_over();
        }
    }

    /// Serves another chain from now on: the old one with a new top, which holds nothing yet, or otherwise the same
    /// content. `open` makes it. It is called when everything written is durable in the old chain, which is passed, so
    /// tables that it reads from the files are complete; a chain opened earlier may lack entries. Afterwards the
    /// [pending log](super::pending::PendingLog) learns which file is the top. None of that is left to the caller.
    ///
    /// Rounds of the flusher wait for `open`: it must not wait for a flush. Fails, with the old chain still served, when
    /// a sync fails (which poisons the disk), when `open` fails, or with `Parameter` when sizes differ. The old chain is
    /// the caller's to close; reads that began before may still use its files, nothing writes to them.
    pub fn replace_chain(&self, open: impl FnOnce(&Arc<Chain>) -> Result<Arc<Chain>>) -> Result<()> {
        self.replace(true, open)
    }

    /// The same, where a power loss may still undo what makes `open`'s chain the disk's: until the answer is
    /// [settled](Unsettled::settle), no flush is answered. The gate may be opened before that.
    pub fn replace_chain_unsettled(
        &self,
        open: impl FnOnce(&Arc<Chain>) -> Result<Arc<Chain>>,
    ) -> Result<Unsettled> {
        self.replace(false, open)?;
        Ok(Unsettled::new(self.disk.as_ref()))
    }

    fn replace(&self, is_settled: bool, open: impl FnOnce(&Arc<Chain>) -> Result<Arc<Chain>>) -> Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let epoch = disk.chain_epoch() + 1;
        let chain = disk.flusher.replace_chain(epoch, is_settled, |old| {
            let chain = open(old)?;
            let layout = check_layout(&chain, disk.options.read_only)?;
            if (layout.cluster_bytes(), layout.disk_bytes()) != (disk.cluster_bytes(), disk.size_bytes()) {
                return Err(Error::new(
                    ErrorKind::Parameter,
                    "replace the chain of a disk: its sizes differ",
                )
                .at_path(chain.name(chain.top())));
            }
            Ok(chain)
        })?;
        chain.keep_host_free(disk.options.host_reserve_bytes);
        *disk.chain.write().unwrap_or_else(PoisonError::into_inner) = chain;
        disk.chain_epoch.store(epoch, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.gate.open();
        }
    }
}
