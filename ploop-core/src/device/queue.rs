//! One queue of requests, driven by one thread: map, submit, complete, finish short transfers.
//!
//! ```text
//!   Request ──gate──▶ Running ──placing──▶ Part, Part, …  ──▶ Completion
//!                                          (one transfer at a time each)
//! ```
//!
//! A request is cut into *parts* (`placing`): runs that lie contiguously in one file and can be
//! transferred in place, or single clusters that need more work (waiting for a lock, allocation, copy-up, reading and
//! patching: `assembling`). Parts of one request know nothing of each other. When the last has
//! ended, in this order: trackers are marked (T1, T3; also after a failure), the gate is left, a FUA request asks the
//! flusher, the completion is handed out.
//!
//! Threads: everything in a [`Queue`] belongs to the thread that drives it; other threads reach it only through its
//! inbox. A transfer in place costs no lock but the cluster's and no allocation in the steady state.
//!
//! Dropping a queue waits for its transfers, marks the trackers for every change that had begun, undoes reservations
//! and passes its locks on. Nobody is told about the requests that were in it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::allocating::{Grant, Want};
use super::disk::{Disk, QueueCount, count, strictest_alignment};
use super::gate::Entry;
use super::inbox::{Inbox, Message};
use super::placing::Turn;
use super::presence::Presence;
use super::slab::Slab;
use super::ticket::Ticket;
use super::transferring::{Locked, Part, Work, rejoin_two};
use super::waiting::WaitingPart;
use super::{Completion, Op, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::Chain;
use crate::io::{Alignment, BufferPool, FileSlot, IoBuf, IoDone, IoOp, IoQueue, Reaped, Wait, Waker};
use crate::mutant::{Mutant, is_active};

/// Largest bounce buffer in bytes.
const BOUNCE_BYTES_MAX: u64 = 1 << 20;
/// Smallest bounce buffer in bytes.
const BOUNCE_BYTES_MIN: u64 = 64 << 10;

/// A request being worked on.
pub(super) struct Running {
    id: u64,
    pub(super) op: Op,
    pub(super) extent: Extent,
    /// Parts of the buffer whose transfer has ended, with their guest offset, in any order.
    pieces: Vec<(u64, IoBuf)>,
    /// Parts in flight; one more while parts are still being made.
    pub(super) parts: u32,
    /// Parts that wait for space; counted in `parts` as well.
    pub(super) waiting: u32,
    /// Nothing but waiting parts is left: it has left the gate.
    pub(super) is_outside: bool,
    /// First error.
    errno: Option<i32>,
    /// For zeroing and discards: everything before this guest byte has its part.
    pub(super) cursor: u64,
    /// For zeroing and discards: the next turn comes when a part has ended.
    pub(super) is_stalled: bool,
}

impl Running {
    /// Lets go of what has been written of the guest's buffer.
    pub(super) fn drop_pieces(&mut self) {
        self.pieces.clear();
    }
}

/// One queue of a disk. See the module's documentation.
pub struct Queue {
    pub(super) io: Box<dyn IoQueue>,
    pub(super) chain: Arc<Chain>,
    chain_epoch: u64,
    /// A later chain is served, whose files could not be attached.
    is_outdated: bool,
    /// The chain's files in `io`, base first.
    pub(super) slots: Vec<FileSlot>,
    /// Files of former chains, which parts that began with them may still read.
    retired: Vec<FileSlot>,
    /// Parts that began with a former chain.
    old_parts: usize,
    /// Which chain the oldest part began with, for whoever frees places of a file.
    presence: Arc<Presence>,
    pub(super) alignment: Alignment,
    pub(super) requests: Slab<Running>,
    pub(super) parts: Slab<Part>,
    pub(super) bounce: BufferPool,
    /// Parts that wait for a bounce buffer, first come first served.
    pub(super) waiting_for_bounce: VecDeque<usize>,
    /// Zeroing requests that go on at the next run.
    pub(super) sliced: VecDeque<usize>,
    /// Parts that wait for space on the host, in order.
    pub(super) waiting: VecDeque<WaitingPart>,
    /// The round in which they were tried.
    pub(super) tried_in: u64,
    /// Requests that have left the gate.
    pub(super) outside: usize,
    pub(super) has_freed_buffers: bool,
    /// Writes that wait at the gate, in order.
    held: VecDeque<Request>,
    /// Operations that did not fit into `io`.
    pub(super) backlog: VecDeque<IoOp>,
    pub(super) granted: Vec<Grant>,
    messages: VecDeque<Message>,
    done: Vec<IoDone>,
    completions: Vec<Completion>,
    spare_pieces: Vec<Vec<(u64, IoBuf)>>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) disk: Arc<Disk>,
    // After everything that uses the disk: dropping it allows the disk to be closed.
    _count: QueueCount,
}

/// The slots of a chain's files, base first: those in `known` (another chain and its slots) keep theirs.
fn attach_all(
    io: &mut dyn IoQueue,
    chain: &Chain,
    known: Option<(&Chain, &[FileSlot])>,
) -> Result<Vec<FileSlot>> {
    let slot_of = |delta: usize| {
        let (old, slots) = known?;
        let is_same = |index: &usize| Arc::ptr_eq(old.storage(*index), chain.storage(delta));
        // Mostly nothing but the top is new, or everything above one place has moved down by one.
        [delta, delta + 1]
            .into_iter()
            .filter(|index| *index < old.depth())
            .find(is_same)
            .map(|index| slots[index])
    };
    let mut slots = Vec::new();
    let mut attached = Vec::new();
    for delta in 0..chain.depth() {
        let slot = match slot_of(delta) {
            Some(slot) => slot,
            None => match io.attach(Arc::clone(chain.storage(delta))) {
                Ok(slot) => {
                    attached.push(slot);
                    slot
                }
                Err(cause) => {
                    attached.into_iter().for_each(|slot| io.detach(slot));
                    return Err(Error::io(ErrorKind::System, "attach image to an input/output queue", cause)
                        .at_path(chain.name(delta)));
                }
            },
        };
        slots.push(slot);
    }
    Ok(slots)
}

impl Queue {
    pub(super) fn new(queue_count: QueueCount, mut io: Box<dyn IoQueue>) -> Result<Self> {
        let disk = Arc::clone(&queue_count.0);
        let chain_epoch = disk.chain_epoch();
        let chain = disk.chain();
        let slots = attach_all(io.as_mut(), &chain, None)?;
        let inbox = Arc::new(Inbox::new(io.waker()));
        disk.gate.add_queue(&inbox);
        disk.full_host.add_queue(&inbox);
        let alignment = strictest_alignment(&chain);
        let unit = u64::from(alignment.offset.max(1));
        let bounce_bytes =
            chain.geometry().cluster_bytes().clamp(BOUNCE_BYTES_MIN, BOUNCE_BYTES_MAX).next_multiple_of(unit);
        let bounce_bytes = usize::try_from(bounce_bytes)
            .map_err(|_| Error::new(ErrorKind::Memory, "bounce buffers do not fit into memory"))?;
        Ok(Self {
            io,
            chain,
            chain_epoch,
            is_outdated: false,
            slots,
            retired: Vec::new(),
            old_parts: 0,
            presence: disk.readers.add(),
            alignment,
            requests: Slab::new(),
            parts: Slab::new(),
            bounce: BufferPool::new(bounce_bytes, disk.options.bounce_buffers.max(1)),
            waiting_for_bounce: VecDeque::new(),
            sliced: VecDeque::new(),
            waiting: VecDeque::new(),
            tried_in: 0,
            outside: 0,
            has_freed_buffers: false,
            held: VecDeque::new(),
            backlog: VecDeque::new(),
            granted: Vec::new(),
            messages: VecDeque::new(),
            done: Vec::new(),
            completions: Vec::new(),
            spare_pieces: Vec::new(),
            inbox,
            disk,
            _count: queue_count,
        })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Takes a request. Its transfers start at the next [`run`](Self::run), its completion comes from one.
    pub fn submit(&mut self, request: Request) {
        // First, then the look at which chain is current.
        self.presence.enter(self.chain_epoch);
        self.refresh_chain();
        if let Some(errno) = self.refusal(&request) {
            let Request { id, op, extent, buffer } = request;
            self.complete(id, op, extent, Err(errno), buffer);
            return self.leave_if_idle();
        }
        if !request.op.changes_image() {
            self.begin(request);
        } else if !self.held.is_empty() {
            self.held.push_back(request);
        } else if let Some(request) = self.pass_gate(request) {
            self.held.push_back(request);
        }
        self.settle();
        self.leave_if_idle();
    }

    /// Without parts nothing of this queue has an address in any file.
    fn leave_if_idle(&self) {
        if self.parts.len() == 0 {
            self.presence.leave();
        }
    }

    /// Requests taken and not yet handed out as completions.
    pub fn in_flight(&self) -> usize {
        self.requests.len() + self.held.len() + self.completions.len()
    }

    /// A handle that makes [`run`](Self::run) return, for any thread.
    pub fn waker(&self) -> Waker {
        self.io.waker()
    }

    /// Also return from [`run`](Self::run) while this descriptor is readable; see [`IoQueue::watch`].
    pub fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        self.io.watch(descriptor)
    }

    /// Starts what was submitted, waits as told for something to happen, goes on with what can go on, and appends the
    /// requests that have ended to `completions`; `finished` in the result is their number. It may return without any:
    /// call it again.
    pub fn run(&mut self, wait: Wait, completions: &mut Vec<Completion>) -> io::Result<Reaped> {
        self.refresh_chain();
        self.look_around();
        self.submit_backlog();
        let has_work = !self.completions.is_empty() || !self.sliced.is_empty();
        let wait = if has_work { Wait::No } else { wait };
        let mut done = std::mem::take(&mut self.done);
        let reaped = self.io.reap(wait, &mut done);
        for operation in done.drain(..) {
            self.finished_transfer(operation);
        }
        self.done = done;
        let reaped = match reaped {
            Ok(reaped) => reaped,
            Err(error) => {
                self.leave_if_idle();
                return Err(error);
            }
        };
        self.look_around();
        self.submit_backlog();
        self.leave_if_idle();
        let finished = self.completions.len();
        completions.append(&mut self.completions);
        Ok(Reaped { finished, ..reaped })
    }

    /// Follows the disk to a new chain. Only reads can be under way then (the gate is closed); they stay valid.
    pub(super) fn refresh_chain(&mut self) {
        let epoch = self.disk.chain_epoch();
        if epoch == self.chain_epoch {
            return;
        }
        self.is_outdated = true;
        let chain = self.disk.chain();
        // On failure the old chain stays and is tried again; it must not serve anything meanwhile: see `refusal`.
        let known = Some((&*self.chain, &*self.slots));
        let attached = attach_all(self.io.as_mut(), &chain, known);
        if let Ok(slots) = attached {
            self.retired.extend(self.slots.iter().filter(|slot| !slots.contains(slot)));
            self.slots = slots;
            self.alignment = strictest_alignment(&chain);
            self.chain = chain;
            self.chain_epoch = epoch;
            self.is_outdated = false;
            self.old_parts = self.parts.len();
            self.let_go();
        }
    }

    /// Lets go of the files of former chains once nothing that began with them is left.
    fn let_go(&mut self) {
        if self.old_parts == 0 {
            self.retired.drain(..).for_each(|slot| self.io.detach(slot));
            self.presence.advance(self.chain_epoch);
            self.disk.flusher.nudge();
        }
    }

    /// Takes a part out.
    pub(super) fn remove_part(&mut self, number: usize) -> Option<Part> {
        let part = self.parts.remove(number)?;
        if part.chain_epoch != self.chain_epoch {
            self.old_parts = self.old_parts.saturating_sub(1);
            self.let_go();
        }
        Some(part)
    }

    /// Which chain new parts begin with.
    pub(super) fn current_epoch(&self) -> u64 {
        self.chain_epoch
    }

    /// Why a request cannot be taken at all.
    fn refusal(&mut self, request: &Request) -> Option<i32> {
        let extent = request.extent;
        if request.op != Op::Flush {
            let buffer_len = request.buffer.as_ref().map(|buffer| buffer.len() as u64);
            let wanted_len = matches!(request.op, Op::Read | Op::Write { .. }).then(|| extent.len());
            if buffer_len != wanted_len || !self.disk.layout().contains(extent) {
                return Some(libc::EINVAL);
            }
            let cluster = self.disk.layout().cluster_of(extent.start());
            if matches!(request.op, Op::Relocate(_)) && extent != self.disk.layout().cluster_extent(cluster) {
                return Some(libc::EINVAL);
            }
        }
        if self.in_flight() - self.outside >= self.disk.options.requests_max {
            return Some(libc::EAGAIN);
        }
        // Behind the look at the size: whoever sees a new one finds the chain that has it. A chain that comes from here on
        // is none of a read's business, which began before, and a write looks again behind the gate.
        self.refresh_chain();
        if self.is_outdated {
            return Some(libc::EIO);
        }
        if request.op.changes_image() && self.disk.is_read_only() {
            return Some(libc::EROFS);
        }
        (request.op != Op::Read && self.disk.is_poisoned()).then_some(libc::EIO)
    }

    /// Begins a write if the gate lets it in; else gives it back to be held. A refused one is answered.
    fn pass_gate(&mut self, request: Request) -> Option<Request> {
        match self.disk.gate.enter() {
            Entry::Entered => {
                // The chain is replaced behind a closed gate only: what is current in here stays so.
                self.refresh_chain();
                if self.chain_epoch == self.disk.chain_epoch() {
                    self.begin(request);
                } else {
                    self.disk.gate.leave();
                    self.fail(request);
                }
            }
            Entry::Held => return Some(request),
            Entry::Refused => self.fail(request),
        }
        None
    }

    /// Answers a request that was not begun.
    fn fail(&mut self, request: Request) {
        let Request { id, op, extent, buffer } = request;
        self.complete(id, op, extent, Err(libc::EIO), buffer);
    }

    /// Looks at everything that may have changed outside: inbox, gate; and lets slices and waiters go on.
    fn look_around(&mut self) {
        self.inbox.take(&mut self.messages);
        while !self.held.is_empty() && !self.disk.gate.is_shut() {
            let Some(request) = self.held.pop_front() else { break };
            if self.disk.is_poisoned() {
                self.fail(request);
            } else if let Some(request) = self.pass_gate(request) {
                self.held.push_front(request);
                break;
            }
        }
        self.retry_waiting();
        for _ in 0..self.sliced.len() {
            if let Some(number) = self.sliced.pop_front() {
                self.continue_zeroing(number);
            }
        }
        self.settle();
    }

    /// Handles messages, own ones included, until none is left.
    pub(super) fn settle(&mut self) {
        loop {
            self.deliver();
            if let Some(message) = self.messages.pop_front() {
                match message {
                    Message::Granted { token, cluster, mode } => self.granted(token, cluster, mode),
                    Message::Durable { token, result } => self.durable(token, result),
                }
            } else if !self.resume_bounced() {
                return;
            }
        }
    }

    /// Tells those to whom locks were passed on; own ones without a detour.
    fn deliver(&mut self) {
        if self.granted.is_empty() {
            return;
        }
        self.granted.retain(|grant| {
            let own = Arc::ptr_eq(&grant.waiter.inbox, &self.inbox);
            if own {
                self.messages.push_back(Message::Granted {
                    token: grant.waiter.token,
                    cluster: grant.cluster,
                    mode: grant.mode,
                });
            }
            !own
        });
        self.disk.locks.deliver(&mut self.granted);
    }

    fn begin(&mut self, request: Request) {
        let Request { id, op, extent, buffer } = request;
        if is_active(Mutant::MarkBeforeWrite) && op.changes_data() {
            self.disk.trackers.mark(extent);
        }
        let pieces = self.spare_pieces.pop().unwrap_or_default();
        let cursor = extent.start();
        let running = Running {
            id,
            op,
            extent,
            pieces,
            parts: 1,
            waiting: 0,
            is_outside: false,
            errno: None,
            cursor,
            is_stalled: false,
        };
        let number = self.requests.insert(running);
        match (op, buffer) {
            (_, Some(buffer)) if extent.is_empty() => {
                self.add_piece(number, cursor, buffer);
                self.end_of_part(number, Ok(()));
            }
            (Op::Read, Some(buffer)) => {
                self.place_read(number, extent.start(), buffer);
                self.end_of_part(number, Ok(()));
            }
            (Op::Write { .. }, Some(buffer)) => {
                self.place_write(number, extent.start(), buffer);
                self.end_of_part(number, Ok(()));
            }
            (Op::Flush, _) => self.data_is_done(number),
            (Op::Relocate(_), _) => {
                let part = self.add_part(number, extent, None);
                self.ask_for_lock(part, Want::Exclusive);
                self.end_of_part(number, Ok(()));
            }
            _ => self.continue_zeroing(number),
        }
    }

    /// Makes the next parts of a zeroing request; the rest of a long one waits for the next run or for its parts.
    fn continue_zeroing(&mut self, number: usize) {
        match self.place_zeroes(number) {
            Turn::Placed => self.end_of_part(number, Ok(())),
            Turn::Unfinished => self.sliced.push_back(number),
            Turn::Stalled => {
                if let Some(running) = self.requests.get_mut(number) {
                    running.is_stalled = true;
                }
            }
        }
    }

    /// Part of a request that needed no transfer or whose transfer has ended.
    pub(super) fn add_piece(&mut self, number: usize, at: u64, buffer: IoBuf) {
        if let Some(running) = self.requests.get_mut(number) {
            running.pieces.push((at, buffer));
        }
    }

    /// One of the request's parts has ended; with the last one, so has its data operation.
    pub(super) fn end_of_part(&mut self, number: usize, result: std::result::Result<(), i32>) {
        let Some(running) = self.requests.get_mut(number) else { return };
        if let Err(errno) = result {
            running.errno.get_or_insert(errno);
        }
        running.parts -= 1;
        if running.parts == 0 {
            self.data_is_done(number);
        } else if running.is_stalled {
            running.is_stalled = false;
            self.sliced.push_back(number);
        } else {
            self.step_outside(number);
        }
    }

    /// All transfers have ended: marks, gate, then durability where it was asked for.
    fn data_is_done(&mut self, number: usize) {
        let Some(running) = self.requests.get(number) else { return };
        let (op, extent, errno) = (running.op, running.extent, running.errno);
        let is_outside = running.is_outside;
        if op.changes_data() && !is_active(Mutant::MarkBeforeWrite) {
            self.disk.trackers.mark(extent);
        }
        if op.changes_image() {
            self.disk.flusher.note_write();
            if is_outside {
                self.outside -= 1;
            } else {
                self.disk.gate.leave();
            }
        }
        let needs_flush = !self.disk.is_read_only() && (op == Op::Flush || (op.is_fua() && errno.is_none()));
        if needs_flush {
            count(&self.disk.counters.flushes, 1);
            self.disk.flusher.submit(Ticket::Queue { inbox: Arc::clone(&self.inbox), token: number as u64 });
        } else {
            self.answer(number, errno.map_or(Ok(()), Err));
        }
    }

    fn durable(&mut self, token: u64, result: std::result::Result<(), i32>) {
        if let Ok(number) = usize::try_from(token) {
            self.answer(number, result);
        }
    }

    fn answer(&mut self, number: usize, result: std::result::Result<(), i32>) {
        let Some(mut running) = self.requests.remove(number) else { return };
        let mut pieces = std::mem::take(&mut running.pieces);
        let buffer = rejoin(&mut pieces);
        if self.spare_pieces.len() < 64 {
            self.spare_pieces.push(pieces);
        }
        self.complete(running.id, running.op, running.extent, result, buffer);
    }

    fn complete(
        &mut self,
        id: u64,
        op: Op,
        extent: Extent,
        result: std::result::Result<(), i32>,
        buffer: Option<IoBuf>,
    ) {
        let counters = &self.disk.counters;
        let (requests, bytes) = match op {
            Op::Read => (Some(&counters.reads), Some(&counters.read_bytes)),
            Op::Write { .. } => (Some(&counters.writes), Some(&counters.written_bytes)),
            Op::WriteZeroes { .. } | Op::Discard => (Some(&counters.zeroes), Some(&counters.zeroed_bytes)),
            Op::Flush | Op::Relocate(_) => (None, None),
        };
        if let Some(requests) = requests {
            count(requests, 1);
        }
        match (result, bytes) {
            (Ok(()), Some(bytes)) => count(bytes, extent.len()),
            (Err(_), _) => count(&counters.errors, 1),
            _ => {}
        }
        self.completions.push(Completion { id, result, buffer });
    }
}

/// Puts the parts of a request's buffer together again.
fn rejoin(pieces: &mut Vec<(u64, IoBuf)>) -> Option<IoBuf> {
    pieces.sort_unstable_by_key(|&(at, _)| at);
    pieces.drain(..).fold(None, |all, (_, piece)| rejoin_two(all, piece))
}

impl Queue {
    /// The queue below is broken and its transfers may go on: no cluster they may touch is used again, no lock passed
    /// on, no write counted as finished.
    fn abandon(&mut self) {
        self.drop_waiting();
        for running in self.requests.drain() {
            self.disk.trackers.mark(running.extent);
        }
        for mut part in self.parts.drain() {
            std::mem::forget(part.prepared.take());
        }
        // Nor is any place given back that they may read from.
        std::mem::forget(Arc::clone(&self.presence));
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The kernel may still write into buffers and files: wait, whatever the results.
        while self.io.in_flight() > 0 {
            if self.io.reap(Wait::Yes, &mut self.done).is_err() {
                return self.abandon();
            }
            self.done.clear();
        }
        self.messages.extend(self.inbox.close());
        while let Some(message) = self.messages.pop_front() {
            if let Message::Granted { token, cluster, mode } = message
                && let Some(part) = usize::try_from(token).ok().and_then(|part| self.parts.get_mut(part))
            {
                part.locked = Some(Locked { first: cluster, last: cluster, mode });
            }
        }
        let parts: Vec<usize> = self.parts.numbers().collect();
        for number in parts {
            let waits = self.parts.get(number).and_then(|part| match part.work {
                Work::Waiting(cluster) if part.locked.is_none() => Some(cluster),
                _ => None,
            });
            if let Some(cluster) = waits {
                self.disk.locks.cancel(cluster, &self.inbox, number as u64, &mut self.granted);
            }
            self.unlock(number);
            // With it goes the reservation of a cluster that was not published.
            if let Some(part) = self.parts.remove(number)
                && part.has_waited
            {
                self.end_wait(part.extent, part.is_copied, false);
            }
        }
        self.drop_waiting();
        for running in self.requests.drain() {
            // A request without parts left waits for the flusher; it has left the gate.
            if running.op.changes_data() && running.parts > 0 {
                self.disk.trackers.mark(running.extent);
            }
            if running.op.changes_image() && running.parts > 0 {
                self.disk.flusher.note_write();
                if !running.is_outside {
                    self.disk.gate.leave();
                }
            }
        }
        self.disk.locks.deliver(&mut self.granted);
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Queue").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
