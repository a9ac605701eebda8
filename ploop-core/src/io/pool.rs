//! Transfers on a few threads, for hosts where io_uring is refused and for storage that is no file.
//!
//! Submitted operations go through one list under a mutex to the threads, finished ones through another back; an
//! event counter wakes the owner, who polls it together with the watched descriptor. Locking: the two lists have one
//! mutex each, never held together, and none is held during a transfer.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::uring::UringQueue;
use super::{FileSlot, IoDone, IoKind, IoOp, IoQueue, Reaped, Storage, Wait, Waker, sys};

/// Threads of a pool at most: more do not make one disk faster.
const THREADS_MAX: u32 = 8;

/// What a thread has to do.
struct Work {
    storage: Arc<dyn Storage>,
    token: u64,
    offset: u64,
    kind: IoKind,
}

#[derive(Default)]
struct Submitted {
    work: VecDeque<Work>,
    closing: bool,
}

struct Shared {
    submitted: Mutex<Submitted>,
    work_arrived: Condvar,
    finished: Mutex<Vec<IoDone>>,
    /// Raised when something was finished or the queue was woken.
    event: EventFd,
    woken: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks; the lists are valid at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`IoQueue`] on blocking calls.
pub struct PoolQueue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    files: Vec<Option<Arc<dyn Storage>>>,
    depth: usize,
    in_flight: usize,
    watched: Option<RawFd>,
}

impl PoolQueue {
    /// A queue of at most `depth` operations, on as many threads but no more than eight.
    pub fn new(depth: u32) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            submitted: Mutex::default(),
            work_arrived: Condvar::new(),
            finished: Mutex::default(),
            event: sys::event_counter()?,
            woken: AtomicBool::new(false),
        });
        let mut queue = Self {
            shared,
            threads: Vec::new(),
            files: Vec::new(),
            depth: usize::try_from(depth.max(1)).unwrap_or(usize::MAX),
            in_flight: 0,
            watched: None,
        };
        for _ in 0..depth.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&queue.shared);
            // When this fails, dropping the queue ends the threads that were started.
            queue
                .threads
                .push(std::thread::Builder::new().name("ploop-io".to_owned()).spawn(move || work(&shared))?);
        }
        Ok(queue)
    }

    fn collect(&mut self, done: &mut Vec<IoDone>) -> usize {
        let mut finished = lock(&self.shared.finished);
        let count = finished.len();
        done.append(&mut finished);
        self.in_flight -= count.min(self.in_flight);
        count
    }
}

fn work(shared: &Shared) {
    loop {
        let mut submitted = lock(&shared.submitted);
        let work = loop {
            if let Some(work) = submitted.work.pop_front() {
                break work;
            }
            if submitted.closing {
                return;
            }
            submitted = shared.work_arrived.wait(submitted).unwrap_or_else(PoisonError::into_inner);
        };
        drop(submitted);
        let done = perform(&*work.storage, work.token, work.offset, work.kind);
        // Before it is told: who has reaped everything may rely on the queue's holding no file but its own.
        drop(work.storage);
        lock(&shared.finished).push(done);
        sys::raise(&shared.event);
    }
}

/// Carries an operation out on a storage, blocking.
pub(super) fn perform(storage: &dyn Storage, token: u64, offset: u64, kind: IoKind) -> IoDone {
    let repeat = |call: &mut dyn FnMut() -> io::Result<usize>| {
        loop {
            match call() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    };
    match kind {
        IoKind::Read(mut buffer) => {
            let result = repeat(&mut || storage.read_at(offset, buffer.as_mut_slice()));
            IoDone { token, result, buffer: Some(buffer) }
        }
        IoKind::Write(buffer) => {
            let result = repeat(&mut || storage.write_at(offset, buffer.as_slice()));
            IoDone { token, result, buffer: Some(buffer) }
        }
        IoKind::Allocate(len, how) => {
            let result = repeat(&mut || storage.allocate(offset, len, how).map(|()| 0));
            IoDone { token, result, buffer: None }
        }
    }
}

impl IoQueue for PoolQueue {
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot> {
        let place = self.files.iter().position(Option::is_none).unwrap_or(self.files.len());
        let slot = u32::try_from(place).map_err(|_| io::ErrorKind::InvalidInput)?;
        match self.files.get_mut(place) {
            Some(free) => *free = Some(storage),
            None => self.files.push(Some(storage)),
        }
        Ok(FileSlot(slot))
    }

    fn detach(&mut self, slot: FileSlot) {
        if let Some(file) = usize::try_from(slot.0).ok().and_then(|slot| self.files.get_mut(slot)) {
            *file = None;
        }
    }

    fn submit(&mut self, operation: IoOp) -> std::result::Result<(), IoOp> {
        if self.in_flight >= self.depth {
            return Err(operation);
        }
        let IoOp { token, file, offset, kind } = operation;
        self.in_flight += 1;
        match usize::try_from(file.0).ok().and_then(|slot| self.files.get(slot)?.as_ref()) {
            Some(storage) => {
                let storage = Arc::clone(storage);
                lock(&self.shared.submitted).work.push_back(Work { storage, token, offset, kind });
                self.shared.work_arrived.notify_one();
            }
            None => {
                lock(&self.shared.finished).push(unknown_file(token, kind));
                sys::raise(&self.shared.event);
            }
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        let mut finished = self.collect(done);
        let patience = match wait {
            _ if finished > 0 => Some(Duration::ZERO),
            Wait::No => Some(Duration::ZERO),
            Wait::Yes => None,
            Wait::For(time) => Some(time),
        };
        let deadline = patience.and_then(|patience| std::time::Instant::now().checked_add(patience));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(std::time::Instant::now()));
            let mut descriptors = vec![self.shared.event.as_fd()];
            descriptors.extend(self.watched.and_then(sys::promised_open));
            let ready = sys::wait_readable(&descriptors, left)?;
            drop(descriptors);
            // First lowered, then collected: what is finished in between raises it again.
            if ready[0] {
                sys::lower(&self.shared.event);
            }
            finished += self.collect(done);
            let woken = self.shared.woken.swap(false, Ordering::AcqRel);
            let watched_ready = ready.get(1).copied().unwrap_or(false);
            let late = deadline.is_some_and(|deadline| std::time::Instant::now() >= deadline);
            // The counter may have been raised for what an earlier call collected: then go on waiting.
            if finished > 0 || woken || watched_ready || late {
                return Ok(Reaped { finished, woken, watched_ready });
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn waker(&self) -> Waker {
        let shared = Arc::clone(&self.shared);
        Waker::new(move || {
            shared.woken.store(true, Ordering::Release);
            sys::raise(&shared.event);
        })
    }

    fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        self.watched = descriptor;
        Ok(())
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        lock(&self.shared.submitted).closing = true;
        self.shared.work_arrived.notify_all();
        for thread in self.threads.drain(..) {
            // A thread only ends by a panic of a storage; there is nobody left to tell.
            drop(thread.join());
        }
    }
}

/// The answer to an operation on a file that was never attached.
pub(super) fn unknown_file(token: u64, kind: IoKind) -> IoDone {
    let buffer = match kind {
        IoKind::Read(buffer) | IoKind::Write(buffer) => Some(buffer),
        IoKind::Allocate(..) => None,
    };
    IoDone { token, result: Err(io::ErrorKind::InvalidInput.into()), buffer }
}

/// Which kind of queue to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum QueueChoice {
    /// io_uring where the kernel has and allows it, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Threads.
    Pool,
}

impl QueueChoice {
    /// A queue of at most `depth` operations.
    pub fn queue(self, depth: u32) -> io::Result<Box<dyn IoQueue>> {
        match self {
            Self::Uring => Ok(Box::new(UringQueue::new(depth)?)),
            Self::Pool => Ok(Box::new(PoolQueue::new(depth)?)),
            Self::Auto if UringQueue::probe() => match UringQueue::new(depth) {
                Ok(queue) => Ok(Box::new(queue)),
                // Locked memory or descriptors may run out where a probe still succeeded.
                Err(_) => Ok(Box::new(PoolQueue::new(depth)?)),
            },
            Self::Auto => Ok(Box::new(PoolQueue::new(depth)?)),
        }
    }
}

/// The fastest queue this host allows, of at most `depth` operations.
pub fn best_io_queue(depth: u32) -> io::Result<Box<dyn IoQueue>> {
    QueueChoice::Auto.queue(depth)
}
