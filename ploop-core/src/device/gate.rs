//! Freeze and thaw: holds new writes back and waits for those in flight.
//!
//! Only requests that change data pass the gate; reads and flushes do not. A write is counted from [`Gate::enter`]
//! to [`Gate::leave`], which comes after its tracker marks: once a closed gate has drained, every change that was
//! ever answered is in the files and in the trackers (T4).
//!
//! Held requests wait in their queue, in order; opening the gate pokes every queue. After a hand-over the gate never
//! opens again: what was held and what comes later is refused.
//!
//! Locking: entering costs one atomic addition and one load. Who enters counts itself first and looks second; who
//! closes sets the state first and counts second (both sequentially consistent), so one of the two sees the other.
//! The mutex guards the list of queues and the sleep of the one who freezes.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::inbox::Inbox;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const HANDED_OVER: u8 = 2;

/// What a write is told at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Go on, and leave when done.
    Entered,
    /// Wait until the gate opens.
    Held,
    /// The disk belongs to somebody else now.
    Refused,
}

/// The gate of one disk.
pub(super) struct Gate {
    state: AtomicU8,
    /// Writes between `enter` and `leave`, and those just looking.
    inside: AtomicUsize,
    inner: Mutex<Inner>,
    drained: Condvar,
}

#[derive(Default)]
struct Inner {
    queues: Vec<Weak<Inbox>>,
    closed_since: Option<Instant>,
    held: Duration,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            state: AtomicU8::new(OPEN),
            inside: AtomicUsize::new(0),
            inner: Mutex::default(),
            drained: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a queue known: it is poked when the gate opens.
    pub(super) fn add_queue(&self, inbox: &Arc<Inbox>) {
        let mut inner = self.lock();
        inner.queues.retain(|queue| queue.strong_count() > 0);
        inner.queues.push(Arc::downgrade(inbox));
    }

    /// A write wants to start.
    pub(super) fn enter(&self) -> Entry {
        self.inside.fetch_add(1, Ordering::SeqCst);
        match self.state.load(Ordering::SeqCst) {
            OPEN => Entry::Entered,
            state => {
                self.leave();
                if state == HANDED_OVER { Entry::Refused } else { Entry::Held }
            }
        }
    }

    /// A write that had entered is finished, marks included.
    pub(super) fn leave(&self) {
        let before = self.inside.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "left without having entered");
        if before == 1 && self.state.load(Ordering::SeqCst) != OPEN {
            // Under the lock, so that a sleeper has either seen the count or is really asleep.
            drop(self.lock());
            self.drained.notify_all();
        }
    }

    /// Closes the gate; `false` when it was not open.
    pub(super) fn close(&self) -> bool {
        let closed = self.state.compare_exchange(OPEN, CLOSED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if closed {
            self.lock().closed_since = Some(Instant::now());
        }
        closed
    }

    /// Whether no write is inside. Once true behind a closed gate, no write is inside until it opens.
    pub(super) fn is_drained(&self) -> bool {
        self.inside.load(Ordering::SeqCst) == 0
    }

    /// Whether held requests may try again, be it to be refused.
    pub(super) fn is_shut(&self) -> bool {
        self.state.load(Ordering::SeqCst) == CLOSED
    }

    /// Waits until no write is inside, `timeout` at most; whether that came about.
    pub(super) fn wait_drained(&self, timeout: Duration) -> bool {
        let inner = self.lock();
        let waited = self.drained.wait_timeout_while(inner, timeout, |_| !self.is_drained());
        // A write that only looks in is counted for a moment: what was seen at the end of the wait counts.
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Opens a closed gate and pokes all queues.
    pub(super) fn open(&self) {
        self.leave_closed(OPEN);
    }

    /// Turns a closed gate into one that refuses for good.
    pub(super) fn hand_over(&self) {
        self.leave_closed(HANDED_OVER);
    }

    fn leave_closed(&self, state: u8) {
        let queues: Vec<Arc<Inbox>> = {
            let mut inner = self.lock();
            if self.state.compare_exchange(CLOSED, state, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                return;
            }
            if let Some(since) = inner.closed_since.take() {
                inner.held += since.elapsed();
            }
            inner.queues.iter().filter_map(Weak::upgrade).collect()
        };
        for queue in queues {
            queue.poke();
        }
    }

    /// How long the gate has been closed, all in all.
    pub(super) fn held(&self) -> Duration {
        let inner = self.lock();
        inner.held + inner.closed_since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Waker;

    #[test]
    fn closed_gate_holds_new_writes_and_drains_old_ones() {
        let gate = Gate::new();
        assert_eq!(gate.enter(), Entry::Entered);
        assert!(gate.close());
        assert!(!gate.close(), "only one may freeze");
        assert_eq!(gate.enter(), Entry::Held);
        assert!(!gate.is_drained());
        assert!(!gate.wait_drained(Duration::from_millis(1)));
        gate.leave();
        assert!(gate.wait_drained(Duration::ZERO));
        gate.open();
        assert_eq!(gate.enter(), Entry::Entered);
        gate.leave();
    }

    #[test]
    fn hand_over_is_final() {
        let gate = Gate::new();
        assert!(gate.close());
        gate.hand_over();
        gate.open();
        assert_eq!(gate.enter(), Entry::Refused);
        assert!(!gate.close());
    }

    #[test]
    fn opening_pokes_the_queues() {
        let gate = Gate::new();
        let inbox = Arc::new(Inbox::new(Waker::new(|| {})));
        gate.add_queue(&inbox);
        gate.close();
        gate.open();
        assert!(inbox.take(&mut std::collections::VecDeque::new()));
    }

    #[test]
    fn no_write_is_inside_a_drained_gate() {
        let gate = Gate::new();
        let inside = AtomicUsize::new(0);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        if gate.enter() == Entry::Entered {
                            inside.fetch_add(1, Ordering::SeqCst);
                            std::hint::spin_loop();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            gate.leave();
                        }
                    }
                });
            }
            for _ in 0..500 {
                assert!(gate.close());
                assert!(gate.wait_drained(Duration::from_secs(300)));
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                gate.open();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(gate.held() > Duration::ZERO);
    }
}
