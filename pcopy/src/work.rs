//! Whether this side's work moves: what a receiver may truthfully report to a sender that waits for it.
//!
//! Whoever does something countable (bytes read from the stream, a write finished, a block read back) takes a step. A
//! call that cannot be counted, such as a sync, is announced; while it runs it counts as moving, but not for ever. A sign
//! of life takes no step: a receiver whose disk hangs lives, and nothing moves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shared by the threads of one receiver. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    steps: AtomicU64,
    /// When the present call began.
    call: Mutex<Option<Instant>>,
}

impl Work {
    /// Something moved.
    pub(crate) fn step(&self) {
        self.shared.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Steps so far.
    pub(crate) fn steps(&self) -> u64 {
        self.shared.steps.load(Ordering::Relaxed)
    }

    /// Runs a call that may take long and cannot be counted.
    pub(crate) fn call<T>(&self, call: impl FnOnce() -> T) -> T {
        let _ended = self.begin_call();
        call()
    }

    fn begin_call(&self) -> CallEnd<'_> {
        *self.shared.call.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        CallEnd(self)
    }

    /// Whether such a call runs, and has for no longer than that.
    pub(crate) fn is_in_call(&self, for_at_most: Duration) -> bool {
        let call = self.shared.call.lock().unwrap_or_else(PoisonError::into_inner);
        call.is_some_and(|begun| begun.elapsed() <= for_at_most)
    }
}

struct CallEnd<'a>(&'a Work);

impl Drop for CallEnd<'_> {
    fn drop(&mut self) {
        *self.0.shared.call.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.0.step();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_moves_for_a_while_and_its_end_is_a_step() {
        let work = Work::default();
        assert!(!work.is_in_call(Duration::MAX));
        work.call(|| {
            assert!(work.is_in_call(Duration::from_secs(1000)));
            std::thread::sleep(Duration::from_millis(2));
            assert!(!work.is_in_call(Duration::ZERO));
            assert_eq!(work.steps(), 0);
        });
        assert!(!work.is_in_call(Duration::MAX));
        assert_eq!(work.steps(), 1);
    }
}
