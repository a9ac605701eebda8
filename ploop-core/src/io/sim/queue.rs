//! A queue over simulated files: operations run late, out of order, and are told later still; all by seed.

use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::random::Random;
use super::{SimDisk, run_as_ticket};
use crate::io::pool::perform;
use crate::io::{FileSlot, IoDone, IoOp, IoQueue, Reaped, Storage, Wait, Waker, sys};

/// An operation that has run but has not been told.
struct Run {
    ticket: u64,
    done: IoDone,
}

/// [`IoQueue`] of the simulator.
///
/// An operation changes the world at a seeded moment between its submission and its being reaped. Until it is reaped
/// it is *in flight*: no sync covers it, also one that was called after the operation had run.
pub struct SimQueue {
    disk: SimDisk,
    files: Vec<Arc<dyn Storage>>,
    waiting: Vec<IoOp>,
    run: Vec<Run>,
    depth: usize,
    random: Random,
    reorders: bool,
    event: Arc<EventFd>,
    watched: Option<RawFd>,
}

impl SimQueue {
    /// A queue of at most `depth` operations for files of `disk`; `seed` decides order and delay.
    pub fn new(disk: &SimDisk, depth: usize, seed: u64) -> io::Result<Self> {
        Ok(Self {
            disk: disk.clone(),
            files: Vec::new(),
            waiting: Vec::new(),
            run: Vec::new(),
            depth: depth.max(1),
            random: Random::new(seed),
            reorders: true,
            event: Arc::new(sys::event_counter()?),
            watched: None,
        })
    }

    /// Every operation runs and is told in the order of submission, one per call of `reap`.
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.reorders = false;
        self
    }

    pub(super) fn run_one(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let at = if self.reorders { self.random.index(self.waiting.len()) } else { 0 };
        let operation = self.waiting.remove(at);
        let ticket = self.disk.new_ticket();
        let IoOp { token, file, offset, kind } = operation;
        let storage = usize::try_from(file.0).ok().and_then(|slot| self.files.get(slot)).cloned();
        let done = run_as_ticket(ticket, || match storage {
            Some(storage) => perform(&*storage, token, offset, kind),
            None => IoDone { token, result: Err(io::ErrorKind::InvalidInput.into()), buffer: None },
        });
        self.run.push(Run { ticket, done });
    }

    fn tell_one(&mut self, done: &mut Vec<IoDone>) {
        if self.run.is_empty() {
            return;
        }
        let at = if self.reorders { self.random.index(self.run.len()) } else { 0 };
        let run = self.run.remove(at);
        self.disk.complete(run.ticket);
        done.push(run.done);
    }
}

impl IoQueue for SimQueue {
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot> {
        let slot = u32::try_from(self.files.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.files.push(storage);
        Ok(FileSlot(slot))
    }

    fn submit(&mut self, operation: IoOp) -> std::result::Result<(), IoOp> {
        if self.in_flight() >= self.depth {
            return Err(operation);
        }
        self.waiting.push(operation);
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        let before = done.len();
        if self.reorders {
            for _ in 0..self.random.index(self.waiting.len() + 1) {
                self.run_one();
            }
            for _ in 0..self.random.index(self.run.len() + 1) {
                self.tell_one(done);
            }
        }
        if done.len() == before && wait != Wait::No {
            if self.run.is_empty() {
                self.run_one();
            }
            self.tell_one(done);
        } else if !self.reorders {
            self.run_one();
            self.tell_one(done);
        }
        let patience = match wait {
            _ if done.len() > before => Some(Duration::ZERO),
            Wait::No => Some(Duration::ZERO),
            Wait::Yes => None,
            Wait::For(time) => Some(time),
        };
        let mut descriptors = vec![self.event.as_fd()];
        descriptors.extend(self.watched.and_then(sys::promised_open));
        let ready = sys::wait_readable(&descriptors, patience)?;
        Ok(Reaped {
            finished: done.len() - before,
            woken: ready[0] && sys::lower(&self.event),
            watched_ready: ready.get(1).copied().unwrap_or(false),
        })
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.run.len()
    }

    fn waker(&self) -> Waker {
        let event = Arc::clone(&self.event);
        Waker::new(move || sys::raise(&event))
    }

    fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        self.watched = descriptor;
        Ok(())
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        while !self.waiting.is_empty() {
            self.run_one();
        }
        for run in &self.run {
            self.disk.complete(run.ticket);
        }
    }
}
