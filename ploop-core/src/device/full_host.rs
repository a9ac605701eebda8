//! A host that is full: what a disk does with writes that need space it does not have.
//!
//! Under [`OnFull::Wait`] such a write is not answered: its queue keeps it aside (see [`waiting`](super::waiting)) and tries
//! it again whenever space may have come: here, because something of the image was freed, or on the host, which tells
//! nobody, so that a thread looks every [`RETRY`]. A table write that finds no room waits as well, and every flush that
//! needs it. What needs no space goes on: reads, writes in place, discards, flushes. Under [`OnFull::Error`], and once
//! waiting has been given up, the guest is told `ENOSPC` or `EDQUOT` at once, until something finds space again.
//!
//! A *round* is one try: within it, nobody asks the host again for a new cluster after it has refused one.
//!
//! Locking: one mutex, held for moments; innermost but for the inboxes that are poked without it. The fast path reads
//! one atomic.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::inbox::Inbox;

/// How often the host is asked again.
pub(super) const RETRY: Duration = Duration::from_millis(250);

/// What happens to a write that needs space when the host, or the quota, has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// It fails with `ENOSPC` or `EDQUOT`.
    Error,
    /// It waits until there is space, this long at most, and then fails like that. `None`: as long as it takes.
    Wait {
        /// How long nothing may find space before all that waits fails.
        timeout: Option<Duration>,
    },
}

/// The policy of a disk as it is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostPolicy {
    /// Whether writes that need space wait for it; else they fail.
    pub waits: bool,
    /// For how many seconds nothing may find space before all that waits fails; `None`: as long as it takes.
    #[serde(default)]
    pub timeout_s: Option<u64>,
    /// Bytes of the host's file system that the image leaves free when it grows.
    #[serde(default)]
    pub reserve_bytes: u64,
}

impl HostPolicy {
    /// For [`DiskOptions`](super::DiskOptions).
    pub fn on_full(&self) -> OnFull {
        if self.waits {
            OnFull::Wait { timeout: self.timeout_s.map(Duration::from_secs) }
        } else {
            OnFull::Error
        }
    }
}

/// What waits for space now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Writes that are not answered.
    pub writes: u64,
    /// Space they ask for in bytes, in whole clusters; the table is not counted.
    pub bytes_needed: u64,
    /// Whether the block allocation table cannot be written: flushes wait.
    pub table: bool,
    /// How long something has been waiting without a break.
    pub elapsed: Duration,
    /// `ENOSPC` or `EDQUOT`, as the host said last.
    pub errno: i32,
    /// Whether what waits is about to fail: the time is over, or somebody has given up.
    pub given_up: bool,
}

#[derive(Default)]
struct Inner {
    queues: Vec<Weak<Inbox>>,
    /// Parts that wait, by cluster.
    clusters: BTreeMap<u32, u64>,
    writes: u64,
    table: bool,
    since: Option<Instant>,
    /// When something last found space, or began to wait.
    progress: Option<Instant>,
    errno: i32,
    given_up: bool,
    /// Rises when something begins or ceases to wait.
    news: u64,
    stop: bool,
}

impl Inner {
    fn is_waiting(&self) -> bool {
        self.table || !self.clusters.is_empty()
    }
}

/// The state of one disk's host.
pub(super) struct FullHost {
    policy: OnFull,
    /// Rises whenever space may have come.
    round: AtomicU64,
    /// The round in which the host has refused a new cluster.
    refused_in: AtomicU64,
    /// Whether anything waits or waiting was given up: the rest of the state is worth a look.
    is_concerned: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl FullHost {
    pub(super) fn new(policy: OnFull) -> Self {
        Self {
            policy,
            round: AtomicU64::new(1),
            refused_in: AtomicU64::new(0),
            is_concerned: AtomicBool::new(false),
            inner: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a queue known: it is poked when space may have come.
    pub(super) fn add_queue(&self, inbox: &Arc<Inbox>) {
        let mut inner = self.lock();
        inner.queues.retain(|queue| queue.strong_count() > 0);
        inner.queues.push(Arc::downgrade(inbox));
    }

    /// Whether what finds no space is to wait now.
    pub(super) fn waits(&self) -> bool {
        matches!(self.policy, OnFull::Wait { .. })
            && (!self.is_concerned.load(Ordering::Acquire) || !self.lock().given_up)
    }

    /// Whether anything can ever wait.
    pub(super) fn may_wait(&self) -> bool {
        matches!(self.policy, OnFull::Wait { .. })
    }

    /// The number of the current try.
    pub(super) fn round(&self) -> u64 {
        self.round.load(Ordering::Acquire)
    }

    /// Whether the host has refused a new cluster in this round and what needs one waits.
    pub(super) fn is_refusing(&self) -> bool {
        self.refused_in.load(Ordering::Acquire) == self.round() && self.waits()
    }

    /// The host has refused a new cluster.
    pub(super) fn refused(&self) {
        self.refused_in.store(self.round(), Ordering::Release);
    }

    /// The host has given space.
    pub(super) fn found(&self) {
        if self.is_concerned.load(Ordering::Acquire) {
            let mut inner = self.lock();
            inner.given_up = false;
            inner.progress = Some(Instant::now());
            self.is_concerned.store(inner.is_waiting(), Ordering::Release);
        }
    }

    /// A write of `cluster` waits from now on.
    pub(super) fn enter(&self, cluster: u32, errno: i32) {
        let mut inner = self.lock();
        *inner.clusters.entry(cluster).or_default() += 1;
        inner.writes += 1;
        self.begun(inner, errno);
    }

    /// It was tried, and waits on.
    pub(super) fn stay(&self, errno: i32) {
        self.lock().errno = errno;
    }

    /// It does not any more: it has ended.
    pub(super) fn leave(&self, cluster: u32) {
        let mut inner = self.lock();
        if let Some(count) = inner.clusters.get_mut(&cluster) {
            *count -= 1;
            if *count == 0 {
                inner.clusters.remove(&cluster);
            }
            inner.writes = inner.writes.saturating_sub(1);
        }
        self.settle(inner);
    }

    /// What the host said last.
    pub(super) fn errno(&self) -> i32 {
        match self.lock().errno {
            0 => libc::ENOSPC,
            errno => errno,
        }
    }

    /// The table waits for space, or not any more.
    pub(super) fn set_table(&self, errno: Option<i32>) {
        let mut inner = self.lock();
        inner.table = errno.is_some();
        match errno {
            Some(errno) => self.begun(inner, errno),
            None => self.settle(inner),
        }
    }

    fn begun(&self, mut inner: MutexGuard<'_, Inner>, errno: i32) {
        inner.errno = errno;
        self.is_concerned.store(true, Ordering::Release);
        if inner.since.is_none() {
            inner.since = Some(Instant::now());
            inner.progress = inner.since;
            inner.news += 1;
            drop(inner);
            self.changed.notify_all();
        }
    }

    fn settle(&self, mut inner: MutexGuard<'_, Inner>) {
        if inner.is_waiting() || inner.since.is_none() {
            return;
        }
        inner.since = None;
        inner.news += 1;
        self.is_concerned.store(inner.given_up, Ordering::Release);
        drop(inner);
        self.changed.notify_all();
    }

    /// Space may have come: everything that waits is tried again.
    pub(super) fn try_again(&self) {
        if !self.is_concerned.load(Ordering::Acquire) {
            return;
        }
        self.round.fetch_add(1, Ordering::AcqRel);
        let queues: Vec<Arc<Inbox>> = self.lock().queues.iter().filter_map(Weak::upgrade).collect();
        queues.iter().for_each(|queue| queue.poke());
    }

    /// What waits fails, and so does what finds no space from now on, until something finds some.
    pub(super) fn give_up(&self) {
        {
            let mut inner = self.lock();
            if !self.may_wait() || !inner.is_waiting() {
                return;
            }
            inner.given_up = true;
            inner.news += 1;
        }
        self.changed.notify_all();
        self.try_again();
    }

    /// What waits now; `None` when nothing does.
    pub(super) fn waiting(&self, cluster_bytes: u64) -> Option<Waiting> {
        if !self.is_concerned.load(Ordering::Acquire) {
            return None;
        }
        let inner = self.lock();
        Some(Waiting {
            writes: inner.writes,
            bytes_needed: (inner.clusters.len() as u64).saturating_mul(cluster_bytes),
            table: inner.table,
            elapsed: inner.since?.elapsed(),
            errno: inner.errno,
            given_up: inner.given_up,
        })
    }

    /// Sleeps until something has begun or ceased to wait since `seen`, or for `patience`; the number to ask with next.
    pub(super) fn wait_for_news(&self, seen: u64, patience: Duration) -> u64 {
        let inner = self.lock();
        let result =
            self.changed.wait_timeout_while(inner, patience, |inner| inner.news == seen && !inner.stop);
        result.unwrap_or_else(PoisonError::into_inner).0.news
    }

    /// The thread: while something waits, tries it again and again. `nudge` wakes whoever may write the table.
    pub(super) fn run(&self, nudge: impl Fn()) {
        loop {
            let inner = self.lock();
            let inner = self
                .changed
                .wait_while(inner, |inner| inner.since.is_none() && !inner.stop)
                .unwrap_or_else(PoisonError::into_inner);
            if inner.stop {
                return;
            }
            let (inner, _) = self
                .changed
                .wait_timeout_while(inner, RETRY, |inner| !inner.stop && !inner.given_up)
                .unwrap_or_else(PoisonError::into_inner);
            let is_over = match (self.policy, inner.progress) {
                (OnFull::Wait { timeout: Some(timeout) }, Some(since)) => since.elapsed() >= timeout,
                _ => false,
            };
            let (stop, given_up) = (inner.stop, inner.given_up);
            drop(inner);
            if stop {
                return;
            }
            if is_over && !given_up {
                self.give_up();
            } else {
                self.try_again();
            }
            nudge();
            if given_up {
                // What waits is answered by its own thread.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }
}

/// Whether an error number says that there is no space.
pub(super) fn is_full(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: OnFull = OnFull::Wait { timeout: None };

    #[test]
    fn what_waits_is_counted_by_clusters_and_since_the_first() {
        let host = FullHost::new(POLICY);
        assert_eq!(host.waiting(4096), None);
        host.enter(3, libc::ENOSPC);
        host.enter(3, libc::ENOSPC);
        host.enter(9, libc::EDQUOT);
        let waiting = host.waiting(4096).unwrap();
        assert_eq!((waiting.writes, waiting.bytes_needed, waiting.errno), (3, 8192, libc::EDQUOT));
        host.leave(3);
        host.leave(3);
        assert!(host.waiting(4096).is_some());
        host.leave(9);
        assert_eq!(host.waiting(4096), None);
        assert_eq!(host.wait_for_news(0, Duration::ZERO), 2);
    }

    #[test]
    fn a_refusal_holds_for_one_round() {
        let host = FullHost::new(POLICY);
        host.refused();
        assert!(host.is_refusing());
        host.enter(0, libc::ENOSPC);
        host.try_again();
        assert!(!host.is_refusing());
    }

    #[test]
    fn given_up_lasts_until_space_is_found() {
        let host = FullHost::new(POLICY);
        host.give_up();
        assert!(host.waits(), "nothing waited");
        host.enter(0, libc::ENOSPC);
        host.give_up();
        assert!(!host.waits() && host.waiting(1).unwrap().given_up);
        host.leave(0);
        assert!(!host.waits(), "the next one fails at once");
        host.found();
        assert!(host.waits());
        assert!(!FullHost::new(OnFull::Error).waits());
    }
}
