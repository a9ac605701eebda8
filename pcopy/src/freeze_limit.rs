//! How long a receiver may keep the guest frozen.
//!
//! From the freeze to the verdict the sender waits for the other side: for room in the pipe, for "durable", for the
//! transcript. A [`FreezeLimit`] is a thread that ends such a wait: it leaves a failure in the [`Exchange`], which every
//! wait of the phases looks at, and, for a thread that waits in the pipe itself, raises `stop` a moment later. The one
//! way out of a failure then thaws first and tells the receiver after that.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop_core::{Error, ErrorKind, Result};

use crate::exchange::Exchange;
use crate::pass;
use crate::transport::Cancel;

/// How long the phases have to leave by themselves. With the pipe still usable, the receiver hears the reason.
const LEAVE: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the freeze was over before the time was.
    fn wait(&self, end: Instant) -> bool {
        let left = end.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(self.lock(), left, |is_over| !*is_over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Limits a freeze until it is dropped.
pub(crate) struct FreezeLimit {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl FreezeLimit {
    /// From now on, for `allowed`.
    pub(crate) fn start(allowed: Duration, exchange: &Arc<Exchange>, stop: &Cancel) -> Result<Self> {
        let state = Arc::new(State::default());
        let (watched, exchange, stop) = (Arc::clone(&state), Arc::clone(exchange), stop.clone());
        // A time-out beyond all clocks never comes.
        let end = Instant::now().checked_add(allowed);
        let watch = move || {
            let Some(end) = end else { return };
            if watched.wait(end) {
                return;
            }
            exchange.expire(too_slow(allowed));
            if !watched.wait(Instant::now() + LEAVE) {
                stop.cancel();
            }
        };
        Ok(Self { state, thread: Some(pass::spawn("pcopy-freeze", watch)?) })
    }
}

impl Drop for FreezeLimit {
    fn drop(&mut self) {
        *self.state.lock() = true;
        self.state.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to report but what it left in the exchange.
            let _ = thread.join();
        }
    }
}

fn too_slow(allowed: Duration) -> Error {
    Error::new(
        ErrorKind::NotQuiet,
        format!(
            "the last pass was not sent, or the receiver did not finish, within {:.1} s of the freeze, the time left for them",
            allowed.as_secs_f64()
        ),
    )
    .advise("the disk runs again; see whether the receiver hangs, and start the copy again (a longer freeze can be allowed)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_what_waits_and_only_when_the_time_is_over() {
        let exchange = Arc::new(Exchange::new(true, Duration::from_secs(1000)));
        let stop = Cancel::new().unwrap();
        // Dropping waits for the end of its thread: nothing comes later.
        drop(FreezeLimit::start(Duration::from_secs(1000), &exchange, &stop).unwrap());
        drop(FreezeLimit::start(Duration::MAX, &exchange, &stop).unwrap());
        exchange.check().unwrap();
        let begun = Instant::now();
        let limit = FreezeLimit::start(Duration::from_millis(50), &exchange, &stop).unwrap();
        assert_eq!(exchange.wait_verdict().unwrap_err().kind(), ErrorKind::NotQuiet);
        assert!(begun.elapsed() >= Duration::from_millis(50));
        // Frozen, nobody waits for the receiver's last words, who can still be told for a while.
        let is_cut = stop.is_cancelled();
        assert!(!is_cut || begun.elapsed() >= Duration::from_millis(50) + LEAVE, "{:?}", begun.elapsed());
        let is_cut_later = (0..30_000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            stop.is_cancelled()
        });
        assert!(is_cut_later);
        drop(limit);
    }
}
