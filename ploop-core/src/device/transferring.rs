//! Parts of requests and their transfers.
//!
//! A [`Part`] moves through at most three states: it waits for the lock of its cluster, it transfers (straight from or
//! to the guest's buffer, by having the file zero a range, or through a bounce buffer), it ends. At the end a fresh
//! cluster is published first, then locks are passed on, then the request hears of it. A part that fails drops its
//! reservation before its lock, so that nobody finds the cluster both free and reserved.
//!
//! Invariant: a part has at most one operation in the queue below, under its own number as the token.

use std::io;
use std::sync::Arc;

use super::Op;
use super::allocating::{Mode, Waiter, Want};
use super::assembling::Assembly;
use super::disk::count;
use super::pending::PendingEntry;
use super::queue::Queue;
use crate::extent::Extent;
use crate::format::PreparedWrite;
use crate::io::{Allocation, FileSlot, IoBuf, IoDone, IoKind, IoOp};

/// A part of a request.
pub(super) struct Part {
    pub(super) request: usize,
    /// Its guest bytes.
    pub(super) extent: Extent,
    /// The guest's buffer, unless a transfer owns it; `None` in zeroing.
    pub(super) data: Option<IoBuf>,
    /// Clusters whose lock it holds.
    pub(super) locked: Option<Locked>,
    /// A fresh cluster being filled.
    pub(super) prepared: Option<PreparedWrite>,
    /// Parts that end with it; see [`folding`](super::folding).
    pub(super) folded: Vec<usize>,
    /// The chain it began with.
    pub(super) chain_epoch: u64,
    /// It has waited for space, and counts as waiting until it ends.
    pub(super) has_waited: bool,
    /// Its bytes have memory of their own; see [`waiting`](super::waiting).
    pub(super) is_copied: bool,
    pub(super) work: Work,
}

/// A run of locked clusters.
#[derive(Clone, Copy)]
pub(super) struct Locked {
    pub(super) first: u32,
    pub(super) last: u32,
    pub(super) mode: Mode,
}

/// What a part is doing.
pub(super) enum Work {
    /// Nothing yet, or in line for the lock of this cluster.
    Waiting(u32),
    /// Moving the guest's buffer from or to this place.
    Direct {
        file: FileSlot,
        offset: u64,
        /// What short transfers have done so far.
        front: Option<IoBuf>,
        /// Length of the transfer in flight.
        len: usize,
    },
    /// Having the file zero a range.
    Zeroing { file: FileSlot, offset: u64, len: u64 },
    /// Its bytes go out with those of another part, which ends it.
    Folded,
    /// Going through a bounce buffer.
    Assembling(Box<Assembly>),
}

impl Queue {
    /// A new part of a request, not started yet.
    pub(super) fn add_part(&mut self, number: usize, extent: Extent, data: Option<IoBuf>) -> usize {
        if let Some(running) = self.requests.get_mut(number) {
            running.parts += 1;
        }
        let cluster = self.disk.layout().cluster_of(extent.start()).0;
        let work = Work::Waiting(cluster);
        let chain_epoch = self.current_epoch();
        self.parts.insert(Part {
            request: number,
            extent,
            data,
            locked: None,
            prepared: None,
            folded: Vec::new(),
            chain_epoch,
            has_waited: false,
            is_copied: false,
            work,
        })
    }

    /// Asks for the lock of a part's only cluster; goes on at once if it is free.
    pub(super) fn ask_for_lock(&mut self, part: usize, want: Want) {
        let Some(asking) = self.parts.get_mut(part) else { return };
        let cluster = self.disk.layout().cluster_of(asking.extent.start()).0;
        asking.work = Work::Waiting(cluster);
        let inbox = &self.inbox;
        let waiter = || Waiter { inbox: Arc::clone(inbox), token: part as u64 };
        match self.disk.locks.acquire(cluster, want, waiter) {
            Some(mode) => self.granted(part as u64, cluster, mode),
            None => count(&self.disk.counters.cluster_waits, 1),
        }
    }

    /// A part owns its cluster now.
    pub(super) fn granted(&mut self, token: u64, cluster: u32, mode: Mode) {
        let part = usize::try_from(token).unwrap_or(usize::MAX);
        let Some(owner) = self.parts.get_mut(part) else {
            self.disk.locks.release(cluster, mode, &mut self.granted);
            return;
        };
        owner.locked = Some(Locked { first: cluster, last: cluster, mode });
        self.place_locked(part);
    }

    /// Gives the part's locks back.
    pub(super) fn unlock(&mut self, part: usize) {
        let locked = self.parts.get_mut(part).and_then(|part| part.locked.take());
        self.release_all(locked);
    }

    pub(super) fn release_all(&mut self, locked: Option<Locked>) {
        if let Some(Locked { first, last, mode }) = locked {
            for cluster in first..=last {
                self.disk.locks.release(cluster, mode, &mut self.granted);
            }
        }
    }

    /// Ends a part: publishes a fresh cluster or drops its reservation, passes locks on, returns the buffer.
    pub(super) fn end_part(&mut self, number: usize, result: std::result::Result<(), i32>) {
        let Some(mut part) = self.remove_part(number) else { return };
        if part.has_waited {
            self.end_wait(part.extent, part.is_copied, result.is_ok());
        }
        let mut is_allocated = false;
        if let Some(prepared) = part.prepared.take()
            && result.is_ok()
        {
            let entry = PendingEntry { cluster: prepared.cluster(), file: Some(prepared.place()) };
            let counters = &self.disk.counters;
            let counter =
                if prepared.is_move() { &counters.moved_clusters } else { &counters.allocated_clusters };
            self.disk.flusher.change(&self.chain, || (Some(entry), prepared.publish()));
            count(counter, 1);
            is_allocated = true;
        }
        if let Some(Locked { first, last, mut mode }) = part.locked.take() {
            if is_allocated && mode == Mode::Exclusive {
                self.disk.locks.downgrade(first, &mut self.granted);
                mode = Mode::Shared;
            }
            for cluster in first..=last {
                self.disk.locks.release(cluster, mode, &mut self.granted);
            }
        }
        if let Some(data) = part.data.take() {
            self.add_piece(part.request, part.extent.start(), data);
        }
        self.end_of_part(part.request, result);
        self.end_folded(part.folded, result.is_ok());
    }

    /// Hands an operation to the queue below, or keeps it until there is room.
    pub(super) fn submit_operation(&mut self, part: usize, file: FileSlot, offset: u64, kind: IoKind) {
        let operation = IoOp { token: part as u64, file, offset, kind };
        if !self.backlog.is_empty() {
            self.backlog.push_back(operation);
        } else if let Err(operation) = self.io.submit(operation) {
            self.backlog.push_back(operation);
        }
    }

    pub(super) fn submit_backlog(&mut self) {
        while let Some(operation) = self.backlog.pop_front() {
            if let Err(operation) = self.io.submit(operation) {
                self.backlog.push_front(operation);
                return;
            }
        }
    }

    /// Whether a buffer lies in memory as transfers demand.
    pub(super) fn is_aligned_in_memory(&self, buffer: &IoBuf) -> bool {
        (buffer.as_slice().as_ptr().addr() as u64).is_multiple_of(u64::from(self.alignment.memory.max(1)))
    }

    /// Moves the part's buffer from or to `offset` without a detour.
    pub(super) fn start_direct(&mut self, number: usize, file: FileSlot, offset: u64) {
        let Some(part) = self.parts.get_mut(number) else { return };
        let Some(buffer) = part.data.take() else { return self.end_part(number, Err(libc::EIO)) };
        part.work = Work::Direct { file, offset, front: None, len: buffer.len() };
        let is_read = self.requests.get(part.request).is_some_and(|running| running.op == Op::Read);
        let kind = if is_read { IoKind::Read(buffer) } else { IoKind::Write(buffer) };
        self.submit_operation(number, file, offset, kind);
    }

    /// Lets the file zero the part's range.
    pub(super) fn start_zeroing(
        &mut self,
        number: usize,
        file: FileSlot,
        offset: u64,
        len: u64,
        how: Allocation,
    ) {
        let Some(part) = self.parts.get_mut(number) else { return };
        part.work = Work::Zeroing { file, offset, len };
        self.submit_operation(number, file, offset, IoKind::Allocate(len, how));
    }

    pub(super) fn finished_transfer(&mut self, done: IoDone) {
        let number = usize::try_from(done.token).unwrap_or(usize::MAX);
        let Some(part) = self.parts.get(number) else { return };
        match part.work {
            Work::Direct { .. } => self.direct_done(number, done),
            Work::Zeroing { .. } => self.zeroing_done(number, done.result),
            Work::Assembling(_) => self.assembly_done(number, done),
            Work::Waiting(_) | Work::Folded => debug_assert!(false, "a transfer of a part that waits"),
        }
    }

    fn direct_done(&mut self, number: usize, done: IoDone) {
        let unit = self.alignment.offset.max(1) as usize;
        let Some(part) = self.parts.get_mut(number) else { return };
        let is_read = self.requests.get(part.request).is_some_and(|running| running.op == Op::Read);
        let Work::Direct { file, offset, front, len } = &mut part.work else { return };
        let Some(mut buffer) = done.buffer else { return self.end_part(number, Err(libc::EIO)) };
        let progress = transferred(&done.result, *len, unit, is_read);
        match progress {
            Progress::Part(count) => {
                let finished = buffer.split_to(count);
                *front = rejoin_two(front.take(), finished);
                *offset += count as u64;
                *len = buffer.len();
                let (file, offset) = (*file, *offset);
                let kind = if is_read { IoKind::Read(buffer) } else { IoKind::Write(buffer) };
                self.submit_operation(number, file, offset, kind);
            }
            Progress::Whole | Progress::Failed(_) | Progress::EndOfFile(_) => {
                part.data = rejoin_two(front.take(), buffer);
                let result = match progress {
                    Progress::Failed(errno) => return self.fail_part(number, errno),
                    // Mappings lie inside their file: it was cut while it was served.
                    Progress::EndOfFile(_) => Err(libc::EIO),
                    _ => Ok(()),
                };
                self.end_part(number, result);
            }
        }
    }
}

/// The error number a guest is told for a failed transfer.
pub(super) fn guest_errno(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(number @ (libc::ENOSPC | libc::EDQUOT)) => number,
        _ => libc::EIO,
    }
}

/// How far a transfer got.
pub(super) enum Progress {
    /// All of it.
    Whole,
    /// This many bytes; the rest is to be tried again.
    Part(usize),
    /// A read met the end of the file after this many bytes.
    EndOfFile(usize),
    /// Not at all.
    Failed(i32),
}

/// Judges the result of a transfer of `len` bytes in units of `unit` bytes.
pub(super) fn transferred(result: &io::Result<usize>, len: usize, unit: usize, is_read: bool) -> Progress {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Progress::Part(0),
        Err(error) => Progress::Failed(guest_errno(error)),
        Ok(count) if *count >= len => Progress::Whole,
        Ok(count) if is_read && (*count == 0 || !count.is_multiple_of(unit)) => Progress::EndOfFile(*count),
        // What was written past the last whole unit is written again.
        Ok(count) => match count - count % unit {
            0 => Progress::Failed(libc::EIO),
            whole => Progress::Part(whole),
        },
    }
}

/// Puts two neighbouring parts of a buffer together. They come from the same buffer, else the second is returned.
pub(super) fn rejoin_two(first: Option<IoBuf>, second: IoBuf) -> Option<IoBuf> {
    let Some(mut first) = first else { return Some(second) };
    match first.join(second) {
        Ok(()) => Some(first),
        Err(_) => None,
    }
}
