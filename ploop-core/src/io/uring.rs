//! Transfers through io_uring.
//!
//! Every operation in flight owns its buffer in a slab entry whose index is the kernel's mark for it, so memory that
//! the kernel may still write is never freed: dropping the queue waits for all completions, and where even waiting
//! fails, the buffers are leaked rather than freed.
//!
//! Waking (an event counter) and the watched descriptor are one-shot polls in the same ring, armed again before
//! each wait; one system call thus submits, waits for everything at once and collects.
//!
//! The queue may move between threads at any time, also with operations in flight; it therefore asks the kernel for
//! cooperative completion but not for a single issuer. Not shared: one thread at a time drives it. What the ring
//! cannot do (storage without descriptor, latched storage, an allocation the file system refuses) is done blocking
//! through the storage itself.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use nix::sys::eventfd::EventFd;

use super::pool::{perform, unknown_file};
use super::{FileSlot, IoDone, IoKind, IoOp, IoQueue, Reaped, Storage, Wait, Waker, sys};

/// Operations of one ring at most; the kernel allows twice that.
const DEPTH_MAX: u32 = 16 << 10;
/// Ring entries for polls and cancellations beside the operations.
const SPARE_ENTRIES: u32 = 8;
/// The most bytes the kernel moves in one transfer; more is a short one.
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;

/// Marks of entries that are no operation: the highest bit, then what it is; a watch carries its generation below.
const MARK_WAKE: u64 = 1 << 63;
const MARK_CANCEL: u64 = 3 << 62;
const MARK_WATCH: u64 = 5 << 61;
const MARK_WATCH_MASK: u64 = 7 << 61;

/// An operation the kernel has, or will get with the next system call.
struct InFlight {
    operation: IoOp,
    storage: Arc<dyn Storage>,
}

/// [`IoQueue`] on io_uring.
pub struct UringQueue {
    ring: IoUring,
    files: Vec<Option<Arc<dyn Storage>>>,
    slab: Vec<Option<InFlight>>,
    free: Vec<usize>,
    in_ring: usize,
    /// Finished without the ring.
    aside: Vec<IoDone>,
    depth: usize,
    event: Arc<EventFd>,
    wake_armed: bool,
    watched: Option<RawFd>,
    watch_armed: bool,
    watch_generation: u64,
}

impl std::fmt::Debug for UringQueue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "UringQueue({} of {} in flight)", self.in_ring + self.aside.len(), self.depth)
    }
}

fn build(entries: u32) -> io::Result<IoUring> {
    // Newer kernels need not interrupt a running thread for each completion: they are seen at the next call.
    let modern = IoUring::builder().setup_coop_taskrun().setup_submit_all().build(entries);
    let ring = match modern {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(entries)?,
        other => other?,
    };
    let parameters = ring.params();
    if !(parameters.is_feature_ext_arg() && parameters.is_feature_nodrop()) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(ring)
}

fn try_ring() -> io::Result<()> {
    let mut ring = build(4)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
    ];
    if !needed.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // A filter may allow making a ring but not using it.
    // SAFETY: this entry refers to no memory.
    unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    Ok(())
}

impl UringQueue {
    /// Whether this kernel has, and allows this process, what the queue needs. Tried once.
    pub fn probe() -> bool {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        *ALLOWED.get_or_init(|| try_ring().is_ok())
    }

    /// A queue of at most `depth` operations (1 to 16384; others are brought into that range).
    pub fn new(depth: u32) -> io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let entries = usize::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Self {
            ring: build((depth + SPARE_ENTRIES).next_power_of_two())?,
            files: Vec::new(),
            slab: (0..entries).map(|_| None).collect(),
            free: (0..entries).rev().collect(),
            in_ring: 0,
            aside: Vec::new(),
            depth: entries,
            event: Arc::new(sys::event_counter()?),
            wake_armed: false,
            watched: None,
            watch_armed: false,
            watch_generation: 0,
        })
    }

    /// Puts an entry into the submission ring, making room first if it is full.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: memory an entry refers to is owned by the slab until its completion is collected; entries of
            // polls and cancellations refer to none.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn arm_polls(&mut self) -> io::Result<()> {
        let readable = u32::from(libc::POLLIN.unsigned_abs());
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(Fd(self.event.as_raw_fd()), readable);
            self.push(&poll.build().user_data(MARK_WAKE))?;
            self.wake_armed = true;
        }
        if let Some(descriptor) = self.watched.filter(|_| !self.watch_armed) {
            let poll = opcode::PollAdd::new(Fd(descriptor), readable);
            self.push(&poll.build().user_data(MARK_WATCH | self.watch_generation))?;
            self.watch_armed = true;
        }
        Ok(())
    }

    /// Takes all completions out of the ring.
    fn collect(&mut self, done: &mut Vec<IoDone>, reaped: &mut Reaped) {
        reaped.finished += self.aside.len();
        done.append(&mut self.aside);
        // Entry by entry: handling one may need the whole queue.
        while let Some(completion) = { self.ring.completion().next() } {
            let (mark, result) = (completion.user_data(), completion.result());
            if mark == MARK_WAKE {
                self.wake_armed = false;
                // A negative result is a poll whose thread has ended: it is only armed again.
                reaped.woken |= sys::lower(&self.event);
            } else if mark & MARK_WATCH_MASK == MARK_WATCH {
                if mark == MARK_WATCH | self.watch_generation {
                    self.watch_armed = false;
                    reaped.watched_ready |= result >= 0;
                }
            } else if mark != MARK_CANCEL
                && let Some(flight) = self.take(mark)
            {
                done.push(finish(flight, result));
                reaped.finished += 1;
            }
        }
    }

    fn take(&mut self, mark: u64) -> Option<InFlight> {
        let index = usize::try_from(mark).ok()?;
        let flight = self.slab.get_mut(index)?.take()?;
        self.free.push(index);
        self.in_ring -= 1;
        Some(flight)
    }

    /// One system call: submits, and waits for one completion at most until `deadline`. `false` when it is past.
    fn enter(&mut self, waits: bool, deadline: Option<Instant>) -> io::Result<bool> {
        let result = match deadline {
            _ if !waits => self.ring.submit(),
            None => self.ring.submit_and_wait(1),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let time = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        match result {
            Ok(_) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME) => Ok(false),
                // Completions have to be collected first.
                Some(libc::EINTR | libc::EBUSY) => Ok(true),
                Some(libc::EAGAIN) if self.in_ring > 0 => Ok(true),
                _ => Err(error),
            },
        }
    }
}

/// The answer for a completed operation. What was interrupted or refused is done blocking: the storage knows how to
/// replace what the file system lacks.
fn finish(flight: InFlight, result: i32) -> IoDone {
    let InFlight { operation: IoOp { token, offset, kind, .. }, storage } = flight;
    let allocates = matches!(kind, IoKind::Allocate(..));
    match (-result, usize::try_from(result)) {
        (_, Ok(moved)) => {
            let (moved, buffer) = match kind {
                IoKind::Read(buffer) | IoKind::Write(buffer) => (moved.min(buffer.len()), Some(buffer)),
                IoKind::Allocate(..) => (0, None),
            };
            IoDone { token, result: Ok(moved), buffer }
        }
        (libc::EINTR | libc::EAGAIN | libc::ECANCELED, _) => perform(&*storage, token, offset, kind),
        (libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL, _) if allocates => {
            perform(&*storage, token, offset, kind)
        }
        (errno, _) => {
            let mut done = unknown_file(token, kind);
            done.result = Err(io::Error::from_raw_os_error(errno));
            done
        }
    }
}

impl IoQueue for UringQueue {
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
        if self.in_flight() >= self.depth {
            return Err(operation);
        }
        let storage = usize::try_from(operation.file.0).ok().and_then(|slot| self.files.get(slot));
        let Some(storage) = storage.cloned().flatten() else {
            self.aside.push(unknown_file(operation.token, operation.kind));
            return Ok(());
        };
        // Asked for each operation: a latched storage has no descriptor any more.
        let (Some(descriptor), Some(index)) =
            (storage.descriptor().map(|fd| fd.as_raw_fd()), self.free.pop())
        else {
            let IoOp { token, offset, kind, .. } = operation;
            self.aside.push(perform(&*storage, token, offset, kind));
            return Ok(());
        };
        let flight = self.slab[index].insert(InFlight { operation, storage });
        let (target, offset) = (Fd(descriptor), flight.operation.offset);
        let entry = match &mut flight.operation.kind {
            IoKind::Read(buffer) => {
                let slice = buffer.as_mut_slice();
                opcode::Read::new(target, slice.as_mut_ptr(), transfer_len(slice.len()))
                    .offset(offset)
                    .build()
            }
            IoKind::Write(buffer) => {
                let slice = buffer.as_slice();
                opcode::Write::new(target, slice.as_ptr(), transfer_len(slice.len())).offset(offset).build()
            }
            IoKind::Allocate(len, how) => {
                opcode::Fallocate::new(target, *len).offset(offset).mode(sys::fallocate_mode(*how)).build()
            }
        };
        self.in_ring += 1;
        if self.push(&entry.user_data(index as u64)).is_err() {
            // The kernel never saw it: it is done without the ring.
            if let Some(InFlight { operation: IoOp { token, offset, kind, .. }, storage }) =
                self.take(index as u64)
            {
                self.aside.push(perform(&*storage, token, offset, kind));
            }
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        let mut reaped = Reaped::default();
        let deadline = match wait {
            Wait::For(time) => Instant::now().checked_add(time),
            Wait::No | Wait::Yes => None,
        };
        self.collect(done, &mut reaped);
        if reaped != Reaped::default() && self.ring.submission().is_empty() {
            // Nothing to submit and something to tell: no system call is needed.
            return Ok(reaped);
        }
        loop {
            self.arm_polls()?;
            let waits = reaped == Reaped::default() && wait != Wait::No;
            let in_time = self.enter(waits, deadline)?;
            self.collect(done, &mut reaped);
            if reaped != Reaped::default() || !waits || !in_time {
                return Ok(reaped);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(reaped);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_ring + self.aside.len()
    }

    fn waker(&self) -> Waker {
        let event = Arc::clone(&self.event);
        Waker::new(move || sys::raise(&event))
    }

    fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        if self.watch_armed {
            let cancel = opcode::AsyncCancel::new(MARK_WATCH | self.watch_generation).build();
            self.push(&cancel.user_data(MARK_CANCEL))?;
            // At once: the caller may close the descriptor next.
            self.enter(false, None)?;
        }
        self.watch_generation = (self.watch_generation + 1) % (1 << 32);
        self.watch_armed = false;
        self.watched = descriptor;
        Ok(())
    }
}

fn transfer_len(bytes: usize) -> u32 {
    u32::try_from(bytes.min(TRANSFER_BYTES_MAX)).unwrap_or(u32::MAX)
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let mut failures = 0;
        while self.in_ring > 0 {
            match self.enter(true, None) {
                Ok(_) => self.collect(&mut done, &mut Reaped::default()),
                Err(_) if failures < 100 => {
                    failures += 1;
                    self.collect(&mut done, &mut Reaped::default());
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(_) => {
                    // The kernel may still write to these buffers: they stay, for ever.
                    std::mem::forget(std::mem::take(&mut self.slab));
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::large_stack_arrays, reason = "small numbers of tests")]
mod tests {
    use super::*;
    use crate::io::IoBuf;
    use crate::io::file::{Caching, FileStorage};
    use crate::io::latch::Latched;

    fn queue() -> Option<UringQueue> {
        if !UringQueue::probe() {
            ploop_testing::skip(ploop_testing::Need::IoUring, "io_uring is not available");
            return None;
        }
        Some(UringQueue::new(8).unwrap())
    }

    fn write(token: u64, file: FileSlot) -> IoOp {
        IoOp { token, file, offset: 0, kind: IoKind::Write(IoBuf::try_copy_of(&[3; 4096]).unwrap()) }
    }

    #[test]
    fn a_latched_file_is_not_written_past_its_latch() {
        let Some(mut queue) = queue() else { return };
        let folder = tempfile::tempdir().unwrap();
        let file = FileStorage::create_exclusive(folder.path().join("f"), Caching::Cached).unwrap();
        let latched = Arc::new(Latched::new(file));
        let slot = queue.attach(latched.clone()).unwrap();
        let mut done = Vec::new();
        queue.submit(write(1, slot)).unwrap();
        queue.reap(Wait::Yes, &mut done).unwrap();
        assert_eq!(*done[0].result.as_ref().unwrap(), 4096);
        latched.latch();
        queue.submit(write(2, slot)).unwrap();
        queue.reap(Wait::Yes, &mut done).unwrap();
        assert!(done[1].result.is_err() && done[1].buffer.is_some());
    }

    #[test]
    fn the_queue_outlives_the_thread_that_used_it_first() {
        let Some(mut queue) = queue() else { return };
        let folder = tempfile::tempdir().unwrap();
        let file = Arc::new(FileStorage::create_exclusive(folder.path().join("f"), Caching::Direct).unwrap());
        let slot = queue.attach(file).unwrap();
        let mut done = Vec::new();
        for round in 0..4 {
            let thread = std::thread::spawn(move || {
                // Submitted here, polls armed here; reaped by the next thread.
                let mut early = Vec::new();
                queue.submit(write(round, slot)).unwrap();
                queue.reap(Wait::No, &mut early).unwrap();
                (queue, early)
            });
            let early;
            (queue, early) = thread.join().unwrap();
            done.extend(early);
            while done.len() <= round as usize {
                queue.reap(Wait::Yes, &mut done).unwrap();
            }
            let waker = queue.waker();
            waker.wake();
            let mut reaped = Reaped::default();
            while !reaped.woken {
                reaped = queue.reap(Wait::For(Duration::from_secs(300)), &mut done).unwrap();
                assert_ne!(reaped, Reaped::default(), "the wake-up was lost");
            }
        }
        assert!(done.iter().all(|done| *done.result.as_ref().unwrap() == 4096));
    }
}
