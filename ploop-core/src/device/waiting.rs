//! Writes that wait for space on the host, see [`full_host`](super::full_host).
//!
//! A part that finds no space gives back everything: its reservation, its lock, its bounce buffer; the guest's bytes are
//! copied out of the pooled buffer they came in, so that others find buffers. What is left is the request's extent and
//! these bytes. When it is tried again it is a new part, which asks for its lock and looks at the mapping anew: nothing
//! that was true before the wait is relied on. What had been written of it before is written once more; nobody has been
//! told of it, so whatever came meanwhile is concurrent to it.
//!
//! A request of which nothing but waiting parts is left stands *outside* the gate: the trackers are marked with all of it,
//! as some of it may have been written, and a freeze does not wait for it. It enters again before it is tried, and marks
//! again at its end. Thus a snapshot or a copy taken in the wait does not have the write, as if it had come later.
//!
//! Nothing waits here that others need: a discard of the same cluster finds no lock in its way.

use std::sync::atomic::Ordering;

use super::Op;
use super::allocating::Want;
use super::disk::count;
use super::full_host::is_full;
use super::gate::Entry;
use super::queue::Queue;
use crate::extent::Extent;
use crate::io::IoBuf;

/// Bytes of waiting writes that a disk copies out of pooled buffers; as much as a loop device can have in flight, and
/// half as much again. Past it, they keep their buffers.
pub(super) const COPIED_BYTES_MAX: u64 = 192 << 20;

/// A part of a request that waits for space; in one cluster.
pub(super) struct WaitingPart {
    request: usize,
    extent: Extent,
    data: Option<IoBuf>,
    /// Whether `data` is a copy of its own.
    is_copied: bool,
}

impl Queue {
    /// Ends a part that has failed, or keeps it aside when it was for want of space that it may wait for.
    pub(super) fn fail_part(&mut self, number: usize, errno: i32) {
        let request = self.parts.get(number).map(|part| part.request);
        let op = request.and_then(|request| self.requests.get(request)).map(|running| running.op);
        let may_wait = is_full(errno) && op.is_some_and(Op::changes_data) && self.disk.full_host.waits();
        if may_wait {
            self.set_aside(number, errno);
        } else {
            self.end_part(number, Err(errno));
        }
    }

    fn set_aside(&mut self, number: usize, errno: i32) {
        let Some(mut part) = self.remove_part(number) else { return };
        // In this order: a cluster is never both free and reserved.
        drop(part.prepared.take());
        self.release_all(part.locked.take());
        let (mut data, is_copied) = match part.data.take() {
            Some(data) if !part.is_copied => self.copied_out(data),
            data => (data, part.is_copied),
        };
        let mut rest = part.extent;
        let mut made = 0;
        while !rest.is_empty() {
            let layout = self.disk.layout();
            let (extent, behind) = rest.split(rest.start() + layout.bytes_left_in_cluster(rest.start()));
            let cluster = layout.cluster_of(extent.start()).0;
            if part.has_waited {
                self.disk.full_host.stay(errno);
            } else {
                self.disk.full_host.enter(cluster, errno);
                count(&self.disk.counters.space_waits, 1);
            }
            let piece =
                data.as_mut().map(|data| data.split_to(usize::try_from(extent.len()).unwrap_or(usize::MAX)));
            self.waiting.push_back(WaitingPart { request: part.request, extent, data: piece, is_copied });
            rest = behind;
            made += 1;
        }
        if let Some(running) = self.requests.get_mut(part.request) {
            running.waiting += made;
            running.parts = running.parts + made - 1;
            if is_copied {
                // Parts of the pooled buffer that were written: without them it goes back.
                running.drop_pieces();
            }
            if running.is_stalled {
                running.is_stalled = false;
                self.sliced.push_back(part.request);
            }
        }
        self.end_folded(part.folded, false);
        self.step_outside(part.request);
    }

    /// A copy of a guest's bytes in memory of its own, within the limit.
    fn copied_out(&mut self, data: IoBuf) -> (Option<IoBuf>, bool) {
        let len = data.len() as u64;
        let copied = &self.disk.copied_bytes;
        if copied.fetch_add(len, Ordering::AcqRel) + len <= COPIED_BYTES_MAX
            && let Ok(copy) = IoBuf::try_copy_of(data.as_slice())
        {
            self.has_freed_buffers = true;
            return (Some(copy), true);
        }
        copied.fetch_sub(len, Ordering::AcqRel);
        (Some(data), false)
    }

    /// A part that had waited has ended.
    pub(super) fn end_wait(&self, extent: Extent, is_copied: bool, is_done: bool) {
        if is_copied {
            self.disk.copied_bytes.fetch_sub(extent.len(), Ordering::AcqRel);
        }
        if is_done {
            self.disk.full_host.found();
        }
        self.disk.full_host.leave(self.disk.layout().cluster_of(extent.start()).0);
    }

    /// Whether writes that wait have given buffers back since this was last asked.
    pub fn has_freed_buffers(&mut self) -> bool {
        std::mem::take(&mut self.has_freed_buffers)
    }

    /// Requests of which nothing is under way: they wait for space.
    pub fn waiting_for_space(&self) -> usize {
        self.outside
    }

    /// Leaves the gate with a request of which nothing is under way.
    pub(super) fn step_outside(&mut self, number: usize) {
        let Some(running) = self.requests.get_mut(number) else { return };
        if running.parts == 0 || running.parts > running.waiting || running.is_outside {
            return;
        }
        running.is_outside = true;
        self.outside += 1;
        let extent = running.extent;
        self.disk.trackers.mark(extent);
        self.disk.flusher.note_write();
        self.disk.gate.leave();
    }

    /// Tries what waits again if space may have come.
    pub(super) fn retry_waiting(&mut self) {
        let round = self.disk.full_host.round();
        if self.waiting.is_empty() || self.tried_in == round {
            return;
        }
        self.tried_in = round;
        for _ in 0..self.waiting.len() {
            let Some(waits) = self.waiting.pop_front() else { break };
            let is_outside = self.requests.get(waits.request).is_some_and(|running| running.is_outside);
            let entry = if is_outside { self.disk.gate.enter() } else { Entry::Entered };
            let errno = match entry {
                Entry::Held => {
                    // The gate pokes when it opens; then it is tried in the same round.
                    self.waiting.push_front(waits);
                    self.tried_in = 0;
                    return;
                }
                Entry::Refused => Some(libc::EIO),
                Entry::Entered => {
                    if is_outside && let Some(running) = self.requests.get_mut(waits.request) {
                        running.is_outside = false;
                        self.outside -= 1;
                    }
                    // The chain is replaced behind a closed gate only.
                    self.refresh_chain();
                    let is_current = self.current_epoch() == self.disk.chain_epoch();
                    (self.disk.is_poisoned() || !is_current).then_some(libc::EIO)
                }
            };
            self.resume(waits, errno);
        }
    }

    /// Makes a part of it again, or fails it with `errno`.
    fn resume(&mut self, waits: WaitingPart, errno: Option<i32>) {
        let WaitingPart { request, extent, data, is_copied } = waits;
        if let Some(running) = self.requests.get_mut(request) {
            running.waiting -= 1;
        }
        if let Some(errno) = errno {
            self.end_wait(extent, is_copied, false);
            return self.end_of_part(request, Err(errno));
        }
        let part = self.add_part(request, extent, data);
        if let Some(running) = self.requests.get_mut(request) {
            // It was counted all the time.
            running.parts -= 1;
        }
        if let Some(part) = self.parts.get_mut(part) {
            part.has_waited = true;
            part.is_copied = is_copied;
        }
        self.ask_for_lock(part, Want::Allocate);
    }

    /// Forgets what waits, without an answer: a successor is asked again.
    pub(super) fn drop_waiting(&mut self) {
        for waits in std::mem::take(&mut self.waiting) {
            self.end_wait(waits.extent, waits.is_copied, false);
        }
    }
}
