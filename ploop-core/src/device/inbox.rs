//! What other threads have to tell a queue: a lock was granted, a flush is durable, the gate has opened.
//!
//! Invariants: a message put before [`Inbox::close`] is taken by its queue or returned by `close`; afterwards
//! [`Inbox::put`] gives it back to the sender, so that a grant is never lost with its queue. The queue's thread looks
//! at one atomic flag first and takes the mutex only when there is something. The mutex is innermost: nothing is
//! called under it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::allocating::Mode;
use crate::io::Waker;

/// News for a queue. Tokens are the queue's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The waiter `token` owns the lock on `cluster` from now on, in this mode.
    Granted { token: u64, cluster: u32, mode: Mode },
    /// The flush `token` waited for has ended; the error number, if it failed.
    Durable { token: u64, result: Result<(), i32> },
}

/// A queue's letter box.
pub(super) struct Inbox {
    /// Set when there may be something to look at; the only thing read in the common case.
    news: AtomicBool,
    inner: Mutex<Inner>,
    waker: Waker,
}

#[derive(Default)]
struct Inner {
    messages: VecDeque<Message>,
    closed: bool,
}

impl Inbox {
    pub(super) fn new(waker: Waker) -> Self {
        Self { news: AtomicBool::new(false), inner: Mutex::default(), waker }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers a message and wakes the queue; gives it back when the queue is gone.
    pub(super) fn put(&self, message: Message) -> Result<(), Message> {
        {
            let mut inner = self.lock();
            if inner.closed {
                return Err(message);
            }
            inner.messages.push_back(message);
        }
        self.poke();
        Ok(())
    }

    /// Makes the queue look around without a message.
    pub(super) fn poke(&self) {
        if !self.news.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Moves all messages to `into`; returns whether anybody put or poked since the last call.
    pub(super) fn take(&self, into: &mut VecDeque<Message>) -> bool {
        if !self.news.load(Ordering::Relaxed) || !self.news.swap(false, Ordering::AcqRel) {
            return false;
        }
        into.append(&mut self.lock().messages);
        true
    }

    /// Refuses messages from now on and returns those not yet taken.
    pub(super) fn close(&self) -> VecDeque<Message> {
        let mut inner = self.lock();
        inner.closed = true;
        std::mem::take(&mut inner.messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn one_wake_for_many_messages_and_none_lost() {
        let wakes = Arc::new(AtomicUsize::new(0));
        let inbox = Inbox::new(Waker::new({
            let wakes = Arc::clone(&wakes);
            move || {
                wakes.fetch_add(1, Ordering::Relaxed);
            }
        }));
        let mut taken = VecDeque::new();
        assert!(!inbox.take(&mut taken));
        for token in 0..3 {
            inbox.put(Message::Durable { token, result: Ok(()) }).unwrap();
        }
        assert_eq!(wakes.load(Ordering::Relaxed), 1);
        assert!(inbox.take(&mut taken));
        assert_eq!(taken.len(), 3);
        inbox.put(Message::Durable { token: 9, result: Err(5) }).unwrap();
        assert_eq!(wakes.load(Ordering::Relaxed), 2);
        assert_eq!(inbox.close().len(), 1);
        let late = Message::Durable { token: 10, result: Ok(()) };
        assert_eq!(inbox.put(late), Err(late));
    }
}
