//! Who works on which guest cluster.
//!
//! A request takes a cluster's lock **before** it resolves the cluster's mapping and keeps it until its transfer has
//! completed:
//!
//! * **shared**: transfers in place, in the cluster's data in the top delta, any number at once;
//! * **exclusive**: one that changes the mapping (allocate, copy up, discard) or must read, patch and write back.
//!
//! Reads that find nothing, or data in a delta below the top, need no lock: lower deltas are never written (I7).
//!
//! Waiting is first come, first served, and by message: a release hands the lock over and tells the new owner
//! through its queue's inbox; no thread sleeps here. One way to wait has a twist: [`Want::Allocate`] asks for
//! exclusive ownership *because the cluster has no data yet*. Once an owner has allocated it, it hands the lock on as
//! shared ([`ClusterLocks::downgrade`]), and all who waited to allocate go in place together.
//!
//! No deadlock: who waits for a lock holds none (a run of several clusters only ever *tries* the further ones), and
//! an owner waits for nothing but transfers and bounce buffers, whose holders wait for transfers alone.
//!
//! This is what makes a freed cluster safe to punch (I4 b): a discard clears the entry while it owns the lock
//! exclusively, so every transfer that resolved the old mapping has completed before, and later ones resolve the new
//! mapping. When the flusher gets the file cluster back, after the clearing is durable, nobody can hold its old
//! address.
//!
//! Locking: clusters are spread over shards, each a mutex that is held for a few instructions; nothing is called
//! under it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inbox::{Inbox, Message};

/// Shards of the table; neighbouring clusters lie in different ones.
const SHARDS: u32 = 64;

/// How a lock is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// With others.
    Shared,
    /// Alone.
    Exclusive,
}

/// How a lock is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// With others.
    Shared,
    /// Alone.
    Exclusive,
    /// Alone, or shared if meanwhile somebody else has given the cluster its data.
    Allocate,
}

/// Who waits: told through `inbox` under `token`.
#[derive(Clone)]
pub(super) struct Waiter {
    pub(super) inbox: Arc<Inbox>,
    pub(super) token: u64,
}

/// A lock that changed hands; the receiver of the list tells the waiter.
pub(super) struct Grant {
    pub(super) waiter: Waiter,
    pub(super) cluster: u32,
    pub(super) mode: Mode,
}

impl Grant {
    fn message(&self) -> Message {
        Message::Granted { token: self.waiter.token, cluster: self.cluster, mode: self.mode }
    }
}

#[derive(Default)]
struct Lock {
    shared: u32,
    exclusive: bool,
    waiters: VecDeque<(Want, Waiter)>,
}

impl Lock {
    fn is_idle(&self) -> bool {
        self.shared == 0 && !self.exclusive && self.waiters.is_empty()
    }

    /// Takes the lock if it can be had at once without overtaking anybody.
    fn try_take(&mut self, want: Want) -> Option<Mode> {
        if self.exclusive || !self.waiters.is_empty() {
            return None;
        }
        match want {
            Want::Shared => {
                self.shared += 1;
                Some(Mode::Shared)
            }
            Want::Exclusive | Want::Allocate if self.shared == 0 => {
                self.exclusive = true;
                Some(Mode::Exclusive)
            }
            Want::Exclusive | Want::Allocate => None,
        }
    }

    /// Hands the lock to those at the head of the line. `allocated`: the cluster is known to have data.
    fn pass_on(&mut self, cluster: u32, allocated: bool, granted: &mut Vec<Grant>) {
        while let Some(&(want, _)) = self.waiters.front() {
            let mode = match want {
                Want::Shared if !self.exclusive => Mode::Shared,
                Want::Allocate if !self.exclusive && allocated => Mode::Shared,
                Want::Exclusive | Want::Allocate if !self.exclusive && self.shared == 0 => Mode::Exclusive,
                _ => return,
            };
            match mode {
                Mode::Shared => self.shared += 1,
                Mode::Exclusive => self.exclusive = true,
            }
            if let Some((_, waiter)) = self.waiters.pop_front() {
                granted.push(Grant { waiter, cluster, mode });
            }
        }
    }
}

/// Cluster numbers are small and dense: one multiplication spreads them well enough.
#[derive(Default)]
struct ClusterHasher(u64);

impl Hasher for ClusterHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
    fn write_u32(&mut self, cluster: u32) {
        self.0 = u64::from(cluster).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}

type Shard = HashMap<u32, Lock, BuildHasherDefault<ClusterHasher>>;

/// The cluster locks of one disk.
pub(super) struct ClusterLocks {
    shards: Box<[Mutex<Shard>]>,
}

impl ClusterLocks {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    fn shard(&self, cluster: u32) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[(cluster % SHARDS) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock if it is free and nobody waits; never waits itself.
    pub(super) fn try_acquire(&self, cluster: u32, want: Want) -> Option<Mode> {
        self.shard(cluster).entry(cluster).or_default().try_take(want)
    }

    /// Takes the lock, or puts `waiter` in line and returns `None`: a [`Message::Granted`] follows.
    pub(super) fn acquire(&self, cluster: u32, want: Want, waiter: impl FnOnce() -> Waiter) -> Option<Mode> {
        let mut shard = self.shard(cluster);
        let lock = shard.entry(cluster).or_default();
        let taken = lock.try_take(want);
        if taken.is_none() {
            lock.waiters.push_back((want, waiter()));
        }
        taken
    }

    /// Gives the lock back; new owners are appended to `granted`, for the caller to tell.
    pub(super) fn release(&self, cluster: u32, mode: Mode, granted: &mut Vec<Grant>) {
        let mut shard = self.shard(cluster);
        let Some(lock) = shard.get_mut(&cluster) else {
            debug_assert!(false, "cluster {cluster} was not locked");
            return;
        };
        match mode {
            Mode::Shared => lock.shared = lock.shared.saturating_sub(1),
            Mode::Exclusive => lock.exclusive = false,
        }
        lock.pass_on(cluster, false, granted);
        if lock.is_idle() {
            shard.remove(&cluster);
        }
    }

    /// From exclusive to shared, by an owner who knows that the cluster has data in the top delta now: those who
    /// waited to allocate it become owners with it.
    pub(super) fn downgrade(&self, cluster: u32, granted: &mut Vec<Grant>) {
        let mut shard = self.shard(cluster);
        let lock = shard.entry(cluster).or_default();
        lock.exclusive = false;
        lock.shared += 1;
        lock.pass_on(cluster, true, granted);
    }

    /// Takes a waiter out of the line; `false` when it is not (or no longer) in it.
    pub(super) fn cancel(
        &self,
        cluster: u32,
        inbox: &Arc<Inbox>,
        token: u64,
        granted: &mut Vec<Grant>,
    ) -> bool {
        let mut shard = self.shard(cluster);
        let Some(lock) = shard.get_mut(&cluster) else { return false };
        let before = lock.waiters.len();
        lock.waiters.retain(|(_, waiter)| waiter.token != token || !Arc::ptr_eq(&waiter.inbox, inbox));
        let found = lock.waiters.len() < before;
        lock.pass_on(cluster, false, granted);
        if lock.is_idle() {
            shard.remove(&cluster);
        }
        found
    }

    /// Tells new owners. Those whose queue has gone give their lock on to the next.
    pub(super) fn deliver(&self, granted: &mut Vec<Grant>) {
        while let Some(grant) = granted.pop() {
            if grant.waiter.inbox.put(grant.message()).is_err() {
                self.release(grant.cluster, grant.mode, granted);
            }
        }
    }

    /// Clusters that are locked or waited for.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let locks = self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner));
        locks.map(|shard| shard.values().filter(|lock| !lock.is_idle()).count()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Waker;

    fn inbox() -> Arc<Inbox> {
        Arc::new(Inbox::new(Waker::new(|| {})))
    }

    fn tokens(granted: &mut Vec<Grant>) -> Vec<(u64, Mode)> {
        granted.drain(..).map(|grant| (grant.waiter.token, grant.mode)).collect()
    }

    #[test]
    fn sharers_go_together_and_exclusive_waits_its_turn() {
        let locks = ClusterLocks::new();
        let inbox = inbox();
        let waiter = |token| Waiter { inbox: Arc::clone(&inbox), token };
        let mut granted = Vec::new();
        assert_eq!(locks.try_acquire(7, Want::Shared), Some(Mode::Shared));
        assert_eq!(locks.acquire(7, Want::Shared, || waiter(0)), Some(Mode::Shared));
        assert_eq!(locks.acquire(7, Want::Exclusive, || waiter(1)), None);
        assert_eq!(locks.acquire(7, Want::Shared, || waiter(2)), None, "must not overtake");
        assert_eq!(locks.try_acquire(7, Want::Shared), None);
        locks.release(7, Mode::Shared, &mut granted);
        assert!(granted.is_empty());
        locks.release(7, Mode::Shared, &mut granted);
        assert_eq!(tokens(&mut granted), [(1, Mode::Exclusive)]);
        locks.release(7, Mode::Exclusive, &mut granted);
        assert_eq!(tokens(&mut granted), [(2, Mode::Shared)]);
        locks.release(7, Mode::Shared, &mut granted);
        assert_eq!(locks.len(), 0);
    }

    #[test]
    fn allocation_lets_the_other_writers_in_together() {
        let locks = ClusterLocks::new();
        let inbox = inbox();
        let waiter = |token| Waiter { inbox: Arc::clone(&inbox), token };
        let mut granted = Vec::new();
        assert_eq!(locks.acquire(1, Want::Allocate, || waiter(0)), Some(Mode::Exclusive));
        for token in 1..4 {
            assert_eq!(locks.acquire(1, Want::Allocate, || waiter(token)), None);
        }
        assert_eq!(locks.acquire(1, Want::Exclusive, || waiter(4)), None);
        assert_eq!(locks.acquire(1, Want::Allocate, || waiter(5)), None);
        locks.downgrade(1, &mut granted);
        assert_eq!(tokens(&mut granted), [(1, Mode::Shared), (2, Mode::Shared), (3, Mode::Shared)]);
        for _ in 0..4 {
            locks.release(1, Mode::Shared, &mut granted);
        }
        assert_eq!(tokens(&mut granted), [(4, Mode::Exclusive)]);
        // A discard: the one behind it must allocate anew.
        locks.release(1, Mode::Exclusive, &mut granted);
        assert_eq!(tokens(&mut granted), [(5, Mode::Exclusive)]);
    }

    #[test]
    fn a_failed_allocation_passes_the_duty_on() {
        let locks = ClusterLocks::new();
        let inbox = inbox();
        let mut granted = Vec::new();
        let waiter = |token| Waiter { inbox: Arc::clone(&inbox), token };
        locks.acquire(1, Want::Allocate, || waiter(0));
        locks.acquire(1, Want::Allocate, || waiter(1));
        locks.acquire(1, Want::Allocate, || waiter(2));
        locks.release(1, Mode::Exclusive, &mut granted);
        assert_eq!(tokens(&mut granted), [(1, Mode::Exclusive)]);
    }

    #[test]
    fn a_grant_to_a_queue_that_has_gone_is_passed_on() {
        let locks = ClusterLocks::new();
        let (gone, alive) = (inbox(), inbox());
        let mut granted = Vec::new();
        assert_eq!(locks.try_acquire(3, Want::Exclusive), Some(Mode::Exclusive));
        locks.acquire(3, Want::Exclusive, || Waiter { inbox: Arc::clone(&gone), token: 0 });
        locks.acquire(3, Want::Exclusive, || Waiter { inbox: Arc::clone(&alive), token: 1 });
        gone.close();
        locks.release(3, Mode::Exclusive, &mut granted);
        locks.deliver(&mut granted);
        let mut messages = VecDeque::new();
        assert!(alive.take(&mut messages));
        assert_eq!(messages, [Message::Granted { token: 1, cluster: 3, mode: Mode::Exclusive }]);
    }

    #[test]
    fn a_cancelled_waiter_is_forgotten_and_lets_those_behind_it_in() {
        let locks = ClusterLocks::new();
        let inbox = inbox();
        let waiter = |token| Waiter { inbox: Arc::clone(&inbox), token };
        let mut granted = Vec::new();
        locks.try_acquire(3, Want::Shared);
        locks.acquire(3, Want::Exclusive, || waiter(0));
        locks.acquire(3, Want::Shared, || waiter(1));
        assert!(locks.cancel(3, &inbox, 0, &mut granted));
        assert!(!locks.cancel(3, &inbox, 0, &mut granted));
        assert_eq!(tokens(&mut granted), [(1, Mode::Shared)]);
        locks.release(3, Mode::Shared, &mut granted);
        locks.release(3, Mode::Shared, &mut granted);
        assert_eq!(locks.len(), 0);
    }
}
