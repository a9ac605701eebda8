//! Who waits for a round of the flusher, what it is told, and what everybody is told after a failed one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::inbox::{Inbox, Message};
use crate::error::{Error, ErrorKind, Result};

/// Who waits for a round.
pub(super) enum Ticket {
    /// A queue's request.
    Queue { inbox: Arc<Inbox>, token: u64 },
    /// A thread that sleeps.
    Thread(Arc<Outcome>),
}

impl Ticket {
    pub(super) fn answer(self, result: &Result<()>) {
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

    pub(super) fn set(&self, error: &Error) {
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
