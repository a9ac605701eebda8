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
//! Threads: one per disk, or none (`manual_flusher`): then each [`Flusher::step`] is called from outside. Both run the
//! same steps. Locks: `rounds` belongs to whoever steps and is held across its system calls; `shared` is taken for
//! moments, also inside `rounds`, never the other way round.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::inbox::{Inbox, Message};
use super::pending::{PendingEntry, PendingLog, Seal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, CommitPlan};
use crate::io::{Allocation, StorageExt};
use crate::mutant::{Mutant, is_active};
use crate::units::FileCluster;

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

/// Who waits for a round.
pub(super) enum Ticket {
    /// A queue's request.
    Queue { inbox: Arc<Inbox>, token: u64 },
    /// A thread that sleeps.
    Thread(Arc<Outcome>),
}

impl Ticket {
    fn answer(self, result: &Result<()>) {
        match self {
            Self::Queue { inbox, token } => {
                let result = result.as_ref().copied().map_err(Error::guest_errno);
                // A queue that has gone has nobody left to tell.
                let _ = inbox.put(Message::Durable { token, result });
            }
            Self::Thread(outcome) => outcome.set(result.clone()),
        }
    }
}

/// The result of a round for a thread that sleeps.
#[derive(Default)]
pub(super) struct Outcome {
    result: Mutex<Option<Result<()>>>,
    done: Condvar,
}

impl Outcome {
    fn lock(&self) -> MutexGuard<'_, Option<Result<()>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, result: Result<()>) {
        *self.lock() = Some(result);
        self.done.notify_all();
    }

    /// The result, if it is there.
    pub(super) fn get(&self) -> Option<Result<()>> {
        self.lock().clone()
    }

    /// Sleeps until the result is there.
    pub(super) fn wait(&self) -> Result<()> {
        let mut result = self.lock();
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            result = self.done.wait(result).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What a disk is told after a failed sync or table write, for good.
#[derive(Default)]
pub(super) struct Poison {
    is_set: AtomicBool,
    cause: Mutex<Option<Error>>,
}

impl Poison {
    /// Whether it happened.
    pub(super) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    fn set(&self, error: &Error) {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        self.is_set.store(true, Ordering::Release);
    }

    /// `Ok`, or why not.
    pub(super) fn check(&self) -> Result<()> {
        if !self.is_set() {
            return Ok(());
        }
        let cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(cause.unwrap_or_else(|| Error::new(ErrorKind::Sync, "the disk is poisoned by a failed sync")))
    }
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
    rounds: Mutex<Rounds>,
    log: Arc<dyn PendingLog>,
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
    pub(super) fn new(chain: Arc<Chain>, limits: Limits, log: Arc<dyn PendingLog>) -> Self {
        let rounds =
            Rounds { chain, stage: Stage::Idle, seal: log.seal(), group: Vec::new(), freed: VecDeque::new() };
        Self {
            limits,
            shared: Mutex::default(),
            work: Condvar::new(),
            has_changes: AtomicBool::new(false),
            is_urgent: AtomicBool::new(false),
            rounds: Mutex::new(rounds),
            log,
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

    /// Queues a ticket for the next round.
    pub(super) fn submit(&self, ticket: Ticket) {
        self.lock_shared().tickets.push(ticket);
        self.work.notify_one();
    }

    /// The table has changed, by a request that is not answered yet; `pending` entries are not durable now.
    pub(super) fn note_change(&self, entry: PendingEntry, pending: usize) {
        self.log.entered(entry);
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

    /// Serves another chain from the next round on. The caller has flushed and holds all writes; fails with `Busy` in the
    /// middle of a round. What was freed in the old top stays a leak until its next clean open.
    pub(super) fn replace_chain(&self, chain: Arc<Chain>) -> Result<()> {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(rounds.stage, Stage::Idle) || rounds.chain.pending() > 0 {
            return Err(Error::new(
                ErrorKind::Busy,
                "replace the chain of a disk: changes are not durable yet",
            ));
        }
        rounds.freed.clear();
        self.log.top_replaced();
        rounds.chain = chain;
        Ok(())
    }

    /// One step: at most one call to the file. `false` when there was nothing to do.
    pub(super) fn step(&self) -> bool {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if self.poison.is_set() {
            return self.refuse(&mut rounds);
        }
        match std::mem::replace(&mut rounds.stage, Stage::Idle) {
            Stage::Idle => return self.begin(&mut rounds) || self.punch(&mut rounds),
            Stage::ContentSync(plan) => self.content_sync(&mut rounds, plan),
            Stage::TableWrite(plan, next) => self.table_write(&mut rounds, plan, next),
            Stage::TableSync(plan) => match self.sync(&rounds) {
                Ok(()) => self.finish(&mut rounds, plan),
                Err(error) => self.fail(&mut rounds, plan, &error),
            },
        }
        true
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

    /// Takes the tickets and seals, if anybody waits or a limit is reached.
    fn begin(&self, rounds: &mut Rounds) -> bool {
        {
            let mut shared = self.lock_shared();
            let is_old = shared.changed_since.is_some_and(|since| since.elapsed() >= self.limits.age_max);
            if shared.tickets.is_empty() && !is_old && !self.is_urgent.load(Ordering::Acquire) {
                return false;
            }
            rounds.group.append(&mut shared.tickets);
            // Before the seal: a change that comes after it raises the flags anew.
            shared.changed_since = None;
            self.has_changes.store(false, Ordering::Release);
            self.is_urgent.store(false, Ordering::Release);
        }
        // Before the table: whatever is in the log up to here is in the plan.
        rounds.seal = self.log.seal();
        let plan = rounds.chain.seal();
        count(&self.counts.rounds, 1);
        let has_table = !plan.is_empty();
        rounds.stage = if is_active(Mutant::TableBeforeContentSync) && has_table {
            Stage::TableWrite(plan, 0)
        } else if is_active(Mutant::NoContentSync) || (is_active(Mutant::SingleSync) && has_table) {
            if has_table { Stage::TableWrite(plan, 0) } else { Stage::TableSync(plan) }
        } else {
            Stage::ContentSync(plan)
        };
        true
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
            let error = Error::io(ErrorKind::Write, "write block allocation table", cause)
                .at_path(rounds.chain.name(top))
                .at_offset(offset.0)
                .advise(ADVICE);
            return self.fail(rounds, plan, &error);
        }
        count(&self.counts.table_writes, 1);
        rounds.stage = if next + 1 < plan.writes.len() {
            Stage::TableWrite(plan, next + 1)
        } else if is_active(Mutant::TableBeforeContentSync) {
            Stage::ContentSync(plan)
        } else {
            Stage::TableSync(plan)
        };
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
        self.refuse(rounds);
    }

    /// Punches one run of freed clusters and gives them back to the pool.
    fn punch(&self, rounds: &mut Rounds) -> bool {
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
        }
        true
    }
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
