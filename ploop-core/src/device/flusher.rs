//! Group commit: makes content, then the table durable, for all flushes that wait.
//!
//! A round, in the order of section 4.2 of the crash document; each step is at most one call to the file:
//!
//! 1. take all waiting tickets, then seal: the table sectors that name what was published or cleared before;
//! 2. F1: sync. Content, zeros and size of everything that was sealed are durable;
//! 3. F2: write the sealed sectors, one after the other;
//! 4. F3: sync. The entries are durable; answer the tickets. With nothing sealed, F1 alone is the round, and still
//!    tells the chain that the growth of the file is durable;
//! 5. punch the file clusters whose clearing is durable now, one run after the other, and give each back to the pool
//!    once its punch has completed. Tickets that came meanwhile go first.
//!
//! Why a ticket covers every write answered before it was taken: a write is answered after its content is in the
//! file and its entry is published; the ticket comes later, the seal later still, F1 and F3 follow.
//!
//! Why nobody reads or writes a cluster in its old role when it is punched: see [`allocating`](super::allocating).
//! Until a later round has synced the punch, the allocator does not take it for zero.
//!
//! A failed sync or table write poisons the disk (E1): the round and all tickets, now and later, fail; nothing is
//! tried again, nothing more is written.
//!
//! Why the log of pending entries fits the table at any moment (see [`pending`](super::pending)): a change of the table
//! and its record are one step, and so are the seal of the log and that of the table. `changing` is held for reading by
//! the first, for writing by the second.
//!
//! While a chain that has taken over is not *settled*, no round begins, so no flush is answered: the descriptor that names
//! the new top is not durable, and a power loss may bring the old chain back (S6). Plain writes go on meanwhile.
//!
//! Threads: one per disk, or none (`manual_flusher`): then each [`Flusher::step`] is called from outside. Both run the
//! same steps. Locks, in this order: `rounds` belongs to whoever steps and is held across its system calls; `changing`;
//! the locks of the format layer; `shared` is taken for moments, also inside `rounds`, with nothing taken inside it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::full_host::{FullHost, RETRY, is_full};
use super::pending::{PendingEntry, PendingLog, Seal};
use super::presence::Readers;
use super::ticket::{Poison, Ticket};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, CommitPlan};
use crate::io::{Allocation, StorageExt};
use crate::mutant::{Mutant, is_active};
use crate::units::FileCluster;

/// How long reads that began with a former chain may take to end, for who waits until what was freed is given back.
const FORMER_READS_MAX: Duration = Duration::from_secs(30);
/// How often they are looked at.
const FORMER_READS_RETRY: Duration = Duration::from_millis(1);
/// Longest range given back with one punch, in bytes.
const PUNCH_BYTES_MAX: u64 = 1 << 30;

/// When to write the table although nobody asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Entries that are not durable yet.
    pub(super) pending_max: usize,
    /// Age of the oldest of them.
    pub(super) age_max: Duration,
}

/// What somebody did to the image while no round could begin.
pub(super) struct Changed {
    /// The chain to serve from now on; `None` for the same.
    pub(super) chain: Option<Arc<Chain>>,
    /// Whether all of it was done.
    pub(super) result: Result<()>,
    /// What the file holds is not known after the failure.
    pub(super) poisoned: bool,
}

/// What the flusher has done so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) rounds: AtomicU64,
    pub(super) syncs: AtomicU64,
    pub(super) table_writes: AtomicU64,
    pub(super) tickets: AtomicU64,
    pub(super) punched_clusters: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The flusher of one disk.
pub(super) struct Flusher {
    limits: Limits,
    shared: Mutex<Shared>,
    work: Condvar,
    /// Set between a first change of the table and the seal that takes it.
    has_changes: AtomicBool,
    /// Set when a round is wanted although no ticket waits, until its seal.
    is_urgent: AtomicBool,
    /// Set when bytes of the top may have changed since the last round began: no sync has covered them yet.
    is_unsynced: AtomicBool,
    /// Set while no flush may be answered: a power loss may undo the last change of the chain.
    is_unsettled: AtomicBool,
    readers: Arc<Readers>,
    rounds: Mutex<Rounds>,
    /// Makes one step of a change and its record, and of the two seals.
    changing: RwLock<()>,
    log: Arc<dyn PendingLog>,
    full_host: Arc<FullHost>,
    /// Set while the table cannot be written for want of space.
    is_blocked: AtomicBool,
    poison: Poison,
    pub(super) counts: Counts,
}

#[derive(Default)]
struct Shared {
    tickets: Vec<Ticket>,
    /// Since when there have been changes, for the age limit.
    changed_since: Option<Instant>,
    stop: bool,
}

struct Rounds {
    chain: Arc<Chain>,
    stage: Stage,
    /// Where the log ended before the table was sealed.
    seal: Seal,
    group: Vec<Ticket>,
    /// Cleared durably, not yet punched.
    freed: VecDeque<FileCluster>,
    /// Before reads that began with an earlier chain have ended, nothing is punched or given back.
    epoch: u64,
    /// The try in which the host had no space for the next table write.
    blocked_in: Option<u64>,
}

enum Stage {
    Idle,
    /// F1.
    ContentSync(CommitPlan),
    /// F2, from this write on.
    TableWrite(CommitPlan, usize),
    /// F3.
    TableSync(CommitPlan),
}

impl Flusher {
    pub(super) fn new(
        chain: Arc<Chain>,
        limits: Limits,
        (log, readers, full_host): (Arc<dyn PendingLog>, Arc<Readers>, Arc<FullHost>),
    ) -> Self {
        let rounds = Rounds {
            chain,
            stage: Stage::Idle,
            seal: log.seal(),
            group: Vec::new(),
            freed: VecDeque::new(),
            epoch: 0,
            blocked_in: None,
        };
        Self {
            limits,
            shared: Mutex::default(),
            work: Condvar::new(),
            has_changes: AtomicBool::new(false),
            is_urgent: AtomicBool::new(false),
            // A predecessor may have written.
            is_unsynced: AtomicBool::new(true),
            is_unsettled: AtomicBool::new(false),
            readers,
            rounds: Mutex::new(rounds),
            changing: RwLock::new(()),
            log,
            full_host,
            is_blocked: AtomicBool::new(false),
            poison: Poison::default(),
            counts: Counts::default(),
        }
    }

    fn lock_shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether and why the disk takes no more changes.
    pub(super) fn poison(&self) -> &Poison {
        &self.poison
    }

    /// Bytes of the top may have changed; called after that and before the gate is left.
    pub(super) fn note_write(&self) {
        if !self.is_unsynced.load(Ordering::SeqCst) {
            self.is_unsynced.store(true, Ordering::SeqCst);
        }
    }

    /// Whether bytes of the top may have changed that no sync has covered.
    fn is_unsynced(&self) -> bool {
        !is_active(Mutant::InPlaceUnsynced) && self.is_unsynced.load(Ordering::SeqCst)
    }

    /// Looks again whether something can be done.
    pub(super) fn nudge(&self) {
        self.work.notify_one();
    }

    /// Queues a ticket for the next round.
    pub(super) fn submit(&self, ticket: Ticket) {
        self.lock_shared().tickets.push(ticket);
        self.work.notify_one();
    }

    /// Changes the table of `chain` for a request that is not answered yet. `change` says which entry it has changed, if
    /// any; it is in the log when this returns.
    pub(super) fn change<T>(&self, chain: &Chain, change: impl FnOnce() -> (Option<PendingEntry>, T)) -> T {
        let result = {
            let _changing = (!is_active(Mutant::LoggedApart))
                .then(|| self.changing.read().unwrap_or_else(PoisonError::into_inner));
            let (entry, result) = change();
            let Some(entry) = entry else { return result };
            self.log.entered(entry);
            result
        };
        self.note_change(chain.pending());
        result
    }

    /// Sees to it that the change is written some day.
    fn note_change(&self, pending: usize) {
        if pending > self.limits.pending_max {
            self.hurry();
        }
        if !self.has_changes.load(Ordering::Relaxed) && !self.has_changes.swap(true, Ordering::AcqRel) {
            self.lock_shared().changed_since = Some(Instant::now());
            self.work.notify_one();
        }
    }

    /// Something waits for a sync that nobody asked for: freshly grown space is not known to be zero before.
    pub(super) fn hurry(&self) {
        if !self.is_urgent.swap(true, Ordering::AcqRel) {
            drop(self.lock_shared());
            self.work.notify_one();
        }
    }

    /// The thread: steps until told to stop, sleeps when there is nothing to do.
    pub(super) fn run(&self) {
        loop {
            while self.step() {}
            let shared = self.lock_shared();
            if shared.stop {
                return;
            }
            self.sleep(shared);
        }
    }

    fn sleep(&self, shared: MutexGuard<'_, Shared>) {
        if self.is_unsettled() {
            // Whoever settles it says so.
            return drop(self.work.wait(shared));
        }
        if self.is_blocked.load(Ordering::SeqCst) {
            return drop(self.work.wait_timeout(shared, RETRY));
        }
        if !shared.tickets.is_empty() || self.is_urgent.load(Ordering::Acquire) {
            return;
        }
        match shared.changed_since {
            None => drop(self.work.wait(shared)),
            Some(since) => {
                let left = self.limits.age_max.saturating_sub(since.elapsed());
                if !left.is_zero() {
                    drop(self.work.wait_timeout(shared, left));
                }
            }
        }
    }

    /// Ends [`run`](Self::run) after the tickets that wait.
    pub(super) fn stop(&self) {
        self.lock_shared().stop = true;
        self.work.notify_all();
    }

    /// Waits until nothing that was freed waits for its punch any more, with the rounds held at rest; does the steps
    /// itself where the thread is not faster. Fails with `Busy` when reads that began with a former chain do not end.
    fn at_rest<T>(&self, mut then: impl FnMut(&Rounds) -> Result<T>) -> Result<T> {
        let mut waiting_since: Option<Instant> = None;
        loop {
            {
                let rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
                self.poison.check()?;
                check_space(&rounds)?;
                if matches!(rounds.stage, Stage::Idle) && rounds.freed.is_empty() {
                    return then(&rounds);
                }
            }
            if !self.step() {
                if waiting_since.get_or_insert_with(Instant::now).elapsed() > FORMER_READS_MAX {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        "give freed clusters back: reads that began long ago have not ended",
                    )
                    .advise("the host disk may be stuck or very slow; try again"));
                }
                std::thread::sleep(FORMER_READS_RETRY);
            }
        }
    }

    /// Waits until nothing is under way that began with another chain than the one in use. Fails with `Busy` if that does
    /// not end.
    pub(super) fn former_reads_end(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let epoch = self.rounds.lock().unwrap_or_else(PoisonError::into_inner).epoch;
            if self.readers.are_past(epoch) {
                return Ok(());
            }
            if begun.elapsed() > FORMER_READS_MAX {
                return Err(Error::new(ErrorKind::Busy, "reads that began long ago have not ended")
                    .advise("the host disk may be stuck or very slow; try again"));
            }
            std::thread::sleep(FORMER_READS_RETRY);
        }
    }

    /// Waits until everything freed so far, durably, has been punched and given back.
    pub(super) fn settle_freed(&self) -> Result<()> {
        self.at_rest(|_| Ok(()))
    }

    /// Cuts the tail of the top between two rounds: a sync under way would count what is cut as durable.
    pub(super) fn cut_tail(&self) -> Result<u64> {
        self.at_rest(|rounds| rounds.chain.cut_tail())
    }

    /// Serves another chain, the one of `epoch`, from now on. The caller holds all writes. What is pending is made durable,
    /// and so is every byte of the old top that was written in place: later flushes sync the new top only. Then `open` makes
    /// the new chain of the old one, or of its files: nothing of the old top is in memory only, nor in the log when that
    /// is told of the new one. What was freed in the old top and is not punched yet stays a leak until its next clean
    /// close.
    ///
    /// Fails, with the old chain still served, when the disk is or gets poisoned, or when `open` fails.
    ///
    /// Without `is_settled` no round begins before [`settle`](Self::settle).
    pub(super) fn replace_chain(
        &self,
        epoch: u64,
        is_settled: bool,
        open: impl FnOnce(&Arc<Chain>) -> Result<Arc<Chain>>,
    ) -> Result<Arc<Chain>> {
        // Held throughout: no round for anybody else begins in between.
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_unsettled() {
            return Err(Error::new(
                ErrorKind::Busy,
                "replace the chain of a disk: the last change is not durable",
            ));
        }
        loop {
            self.poison.check()?;
            match rounds.stage {
                Stage::Idle if rounds.chain.pending() == 0 && !self.is_unsynced() => break,
                Stage::Idle => self.begin(&mut rounds),
                _ => self.proceed(&mut rounds),
            }
            check_space(&rounds)?;
        }
        let chain = open(&rounds.chain)?;
        // Nobody steps: the rounds are held.
        self.is_unsettled.store(!is_settled, Ordering::SeqCst);
        rounds.freed.clear();
        rounds.epoch = if is_active(Mutant::FormerReadsForgotten) { 0 } else { epoch };
        self.log.top_replaced(&**chain.storage(chain.top()));
        self.log.chain_replaced(&chain);
        rounds.chain = Arc::clone(&chain);
        Ok(chain)
    }

    fn is_unsettled(&self) -> bool {
        !is_active(Mutant::FlushBeforeSettled) && self.is_unsettled.load(Ordering::SeqCst)
    }

    /// The chain that has taken over is durably the disk's, or that is not known: then the disk is poisoned, for nobody may
    /// be told that what he wrote since is there for good.
    pub(super) fn settle(&self, result: &Result<()>) {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = result {
            self.log.poisoned();
            self.poison.set(error);
            self.refuse(&mut rounds);
        }
        drop(rounds);
        {
            let _shared = self.lock_shared();
            self.is_unsettled.store(false, Ordering::SeqCst);
        }
        self.work.notify_all();
    }

    /// Lets `change` rewrite header and table of the top, with nothing pending and no punch outstanding, while no round can
    /// begin. It answers with the chain to serve from then on, if that is another one. The caller holds all writes and has
    /// flushed; fails with `Busy` in the middle of a round. Also that chain, when the change failed on the way.
    pub(super) fn exclusively(
        &self,
        change: impl FnOnce(&Arc<Chain>) -> Changed,
    ) -> (Result<()>, Option<Arc<Chain>>) {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = self.poison.check() {
            return (Err(error), None);
        }
        if !matches!(rounds.stage, Stage::Idle) || rounds.chain.pending() > 0 || self.is_unsettled() {
            let error =
                Error::new(ErrorKind::Busy, "change the image of a disk: changes are not durable yet");
            return (Err(error), None);
        }
        // A punch that came late would hit the new owner of its place, and so would a read.
        while self.punch(&mut rounds) {}
        if !self.readers.are_past(rounds.epoch) {
            let error = Error::new(
                ErrorKind::Busy,
                "change the image of a disk: reads that began long ago have not ended",
            )
            .advise("the host disk may be stuck or very slow; try again");
            return (Err(error), None);
        }
        // What the log still has is in the table on disk, and may be untrue soon.
        let end = self.log.seal();
        self.log.committed(end);
        let Changed { chain, result, poisoned } = change(&rounds.chain);
        if let (true, Err(error)) = (poisoned, &result) {
            self.log.poisoned();
            self.poison.set(error);
            self.refuse(&mut rounds);
        }
        if let Some(chain) = &chain {
            rounds.chain = Arc::clone(chain);
        }
        (result, chain)
    }

    /// One step: at most one call to the file. `false` when there was nothing to do.
    pub(super) fn step(&self) -> bool {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if self.poison.is_set() {
            return self.refuse(&mut rounds);
        }
        match rounds.stage {
            Stage::Idle if self.is_unsettled() => return false,
            Stage::Idle if self.is_due() => self.begin(&mut rounds),
            Stage::Idle => return self.punch(&mut rounds),
            _ if rounds.blocked_in == Some(self.full_host.round()) => return false,
            _ => self.proceed(&mut rounds),
        }
        true
    }

    /// The next step of a round that has begun.
    fn proceed(&self, rounds: &mut Rounds) {
        match std::mem::replace(&mut rounds.stage, Stage::Idle) {
            Stage::Idle => {}
            Stage::ContentSync(plan) => self.content_sync(rounds, plan),
            Stage::TableWrite(plan, next) => self.table_write(rounds, plan, next),
            Stage::TableSync(plan) => match self.sync(rounds) {
                Ok(()) => self.finish(rounds, plan),
                Err(error) => self.fail(rounds, plan, &error),
            },
        }
    }

    /// Answers everybody with what poisoned the disk.
    fn refuse(&self, rounds: &mut Rounds) -> bool {
        let mut tickets = std::mem::take(&mut rounds.group);
        tickets.append(&mut self.lock_shared().tickets);
        self.is_urgent.store(false, Ordering::Release);
        self.lock_shared().changed_since = None;
        rounds.freed.clear();
        let result = self.poison.check();
        let any = !tickets.is_empty();
        tickets.into_iter().for_each(|ticket| ticket.answer(&result));
        any
    }

    /// Whether anybody waits or a limit is reached.
    fn is_due(&self) -> bool {
        let shared = self.lock_shared();
        let is_old = shared.changed_since.is_some_and(|since| since.elapsed() >= self.limits.age_max);
        !shared.tickets.is_empty() || is_old || self.is_urgent.load(Ordering::Acquire)
    }

    /// Takes the tickets and seals.
    fn begin(&self, rounds: &mut Rounds) {
        {
            let mut shared = self.lock_shared();
            rounds.group.append(&mut shared.tickets);
            // Before the seal: a change that comes after it raises the flags anew.
            shared.changed_since = None;
            self.has_changes.store(false, Ordering::Release);
            self.is_urgent.store(false, Ordering::Release);
        }
        // Before the sync: what is written from here on may be missed by it.
        self.is_unsynced.store(false, Ordering::SeqCst);
        let plan = {
            let _changing = (!is_active(Mutant::LoggedApart))
                .then(|| self.changing.write().unwrap_or_else(PoisonError::into_inner));
            rounds.seal = self.log.seal();
            rounds.chain.seal()
        };
        count(&self.counts.rounds, 1);
        let has_table = !plan.is_empty();
        rounds.stage = if is_active(Mutant::TableBeforeContentSync) && has_table {
            Stage::TableWrite(plan, 0)
        } else if is_active(Mutant::NoContentSync) || (is_active(Mutant::SingleSync) && has_table) {
            if has_table { Stage::TableWrite(plan, 0) } else { Stage::TableSync(plan) }
        } else {
            Stage::ContentSync(plan)
        };
    }

    /// F1.
    fn content_sync(&self, rounds: &mut Rounds, plan: CommitPlan) {
        match self.sync(rounds) {
            Err(error) => self.fail(rounds, plan, &error),
            Ok(()) if plan.is_empty() => self.finish(rounds, plan),
            Ok(()) if is_active(Mutant::TableBeforeContentSync) => rounds.stage = Stage::TableSync(plan),
            Ok(()) => rounds.stage = Stage::TableWrite(plan, 0),
        }
    }

    /// F2, one write of it.
    fn table_write(&self, rounds: &mut Rounds, plan: CommitPlan, next: usize) {
        let top = rounds.chain.top();
        if let Some((offset, bytes)) = plan.writes.get(next)
            && let Err(cause) = rounds.chain.storage(top).write_all_at(offset.0, bytes)
        {
            if let Some(errno) = cause.raw_os_error().filter(|&errno| is_full(errno))
                && self.full_host.waits()
            {
                // Sectors of it may have been written; the same bytes are written once more.
                rounds.stage = Stage::TableWrite(plan, next);
                return self.block(rounds, Some(errno));
            }
            let error = Error::io(ErrorKind::Write, "write block allocation table", cause)
                .at_path(rounds.chain.name(top))
                .at_offset(offset.0)
                .advise(ADVICE);
            return self.fail(rounds, plan, &error);
        }
        self.block(rounds, None);
        count(&self.counts.table_writes, 1);
        rounds.stage = if next + 1 < plan.writes.len() {
            Stage::TableWrite(plan, next + 1)
        } else if is_active(Mutant::TableBeforeContentSync) {
            Stage::ContentSync(plan)
        } else {
            Stage::TableSync(plan)
        };
    }

    /// The table waits for space, or not any more.
    fn block(&self, rounds: &mut Rounds, errno: Option<i32>) {
        if errno.is_none() && rounds.blocked_in.is_none() {
            return;
        }
        rounds.blocked_in = errno.map(|_| self.full_host.round());
        self.is_blocked.store(errno.is_some(), Ordering::SeqCst);
        if errno.is_none() {
            self.full_host.found();
        }
        self.full_host.set_table(errno);
    }

    fn sync(&self, rounds: &Rounds) -> Result<()> {
        count(&self.counts.syncs, 1);
        let top = rounds.chain.top();
        let storage = rounds.chain.storage(top);
        let mut result = storage.sync_data();
        if result.is_err() && is_active(Mutant::SyncRetried) {
            result = storage.sync_data();
        }
        if is_active(Mutant::SyncErrorIgnored) {
            result = Ok(());
        }
        result.map_err(|cause| {
            Error::io(ErrorKind::Sync, "sync image", cause).at_path(rounds.chain.name(top)).advise(ADVICE)
        })
    }

    /// Everything sealed is durable.
    fn finish(&self, rounds: &mut Rounds, plan: CommitPlan) {
        // Before a freed cluster can be handed out again, or a successor would give it back to its old owner.
        self.log.committed(rounds.seal);
        let mut freed = rounds.chain.committed(plan);
        freed.sort_unstable();
        if is_active(Mutant::PunchAfterReuse) {
            freed.iter().for_each(|&cluster| rounds.chain.release(cluster, true));
        }
        rounds.freed.extend(freed);
        count(&self.counts.tickets, rounds.group.len() as u64);
        rounds.group.drain(..).for_each(|ticket| ticket.answer(&Ok(())));
    }

    /// E1.
    fn fail(&self, rounds: &mut Rounds, plan: CommitPlan, error: &Error) {
        // First of all: from here on no successor may believe what it finds.
        self.log.poisoned();
        self.poison.set(error);
        rounds.chain.failed(plan);
        self.block(rounds, None);
        self.refuse(rounds);
    }

    /// Punches one run of freed clusters and gives them back to the pool.
    fn punch(&self, rounds: &mut Rounds) -> bool {
        if rounds.freed.is_empty() || !self.readers.are_past(rounds.epoch) {
            return false;
        }
        let Some(first) = rounds.freed.pop_front() else { return false };
        let geometry = rounds.chain.geometry();
        let cluster_bytes = geometry.cluster_bytes();
        let (offset, mut len, mut last) = (geometry.file_offset(first), cluster_bytes, first);
        while let Some(&next) = rounds.freed.front()
            && Some(next.0) == last.0.checked_add(1)
            && len.saturating_add(cluster_bytes) <= PUNCH_BYTES_MAX
        {
            rounds.freed.pop_front();
            len += cluster_bytes;
            last = next;
        }
        let storage = rounds.chain.storage(rounds.chain.top());
        // Not every file system can; then the cluster is written whole when it is used again.
        let punched = storage.allocate(offset.0, len, Allocation::Punch).is_ok();
        if punched {
            count(&self.counts.punched_clusters, len / cluster_bytes);
        }
        if !is_active(Mutant::PunchAfterReuse) {
            (first.0..=last.0).for_each(|cluster| rounds.chain.release(FileCluster(cluster), punched));
            self.full_host.try_again();
        }
        true
    }
}

/// Whoever must not wait for space is told that somebody does.
fn check_space(rounds: &Rounds) -> Result<()> {
    if rounds.blocked_in.is_none() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Allocate, "write block allocation table: the host has no space for it")
        .at_path(rounds.chain.name(rounds.chain.top()))
        .advise("make room on the host file system; what was written waits until then"))
}

const ADVICE: &str = "what was written since the last flush may be lost: unmount, see the kernel's messages about the host \
                      disk, then check the image";

impl Drop for Flusher {
    fn drop(&mut self) {
        let gone = Err(Error::new(ErrorKind::Cancelled, "flush: the disk was dropped"));
        let shared = self.shared.get_mut().unwrap_or_else(PoisonError::into_inner);
        let rounds = self.rounds.get_mut().unwrap_or_else(PoisonError::into_inner);
        shared.tickets.drain(..).chain(rounds.group.drain(..)).for_each(|ticket| ticket.answer(&gone));
    }
}
