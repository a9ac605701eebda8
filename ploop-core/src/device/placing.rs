//! Decides for each piece of a request where it goes: the state machine between mapping and transfer.
//!
//! | op | found in the top | found below | found nowhere |
//! |---|---|---|---|
//! | read | in place, shared lock | there, no lock | zeros, at once |
//! | write | in place, shared lock; misaligned: read, patch, write, exclusive | fresh cluster with copy-up | fresh cluster |
//! | relocate | copied to another place, exclusive; the old one is freed | nothing to do | nothing to do |
//! | zero, discard | whole, nothing below, may unmap: clear the entry, exclusive; else zero in place | fresh cluster of zeros (the format has no zero mark; clearing would bring the old bytes back) | nothing to do |
//!
//! Two ways lead in. Without locks, `place_*` looks at the mapping to guess; runs in place that can be locked without
//! waiting are transferred at once, as large as they are contiguous in the file. Everything else becomes a part of one
//! cluster that asks for the lock the guess calls for. With the lock, [`Queue::place_locked`] looks again and decides;
//! a wrong guess costs another turn in line, nothing else.

use std::sync::atomic::Ordering;

use super::Op;
use super::allocating::{Mode, Want};
use super::assembling::{Assembly, Background};
use super::disk::count;
use super::pending::PendingEntry;
use super::queue::Queue;
use super::split::{hull, is_multiple};
use super::transferring::{Locked, Part, Work, guest_errno};
use crate::extent::Extent;
use crate::format::{Destination, Mapping, WriteTarget};
use crate::io::{Allocation, IoBuf};
use crate::mutant::{Mutant, is_active};
use crate::units::{GuestCluster, GuestOffset};

/// Largest single transfer in bytes.
const TRANSFER_BYTES_MAX: u64 = 16 << 20;
/// Largest empty range that a zeroing request skips in one look, in bytes.
const SKIPPED_BYTES_MAX: u64 = 1 << 30;
/// Largest run zeroed by one operation, in bytes.
const ZEROED_RUN_BYTES_MAX: u64 = 64 << 20;
/// Parts of one zeroing request in flight.
const ZEROING_PARTS_MAX: u32 = 32;
/// Clusters that a zeroing request handles before others get their turn; empty ones count a 32nd.
const ZEROING_CLUSTERS_PER_TURN: u64 = 512;

/// How far a zeroing request got in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Every byte has its part, or needs none.
    Placed,
    /// There is more to do.
    Unfinished,
    /// There is more to do once some part has ended.
    Stalled,
}

/// A run in place whose clusters are locked.
struct Run {
    len: u64,
    offset: u64,
    locked: Locked,
}

impl Queue {
    fn unit(&self) -> u64 {
        u64::from(self.alignment.offset.max(1))
    }

    fn top(&self) -> usize {
        self.chain.top()
    }

    /// Whether a cluster reads as zeros once the top does not hold it any more.
    fn may_clear(&self, cluster: GuestCluster) -> bool {
        !self.disk.keeps_entries() && !self.chain.held_below(cluster)
    }

    /// Reads `buffer.len()` bytes at guest byte `at`.
    pub(super) fn place_read(&mut self, number: usize, mut at: u64, mut buffer: IoBuf) {
        while !buffer.is_empty() {
            let left = buffer.len() as u64;
            match self.chain.map(GuestOffset(at), left.min(TRANSFER_BYTES_MAX)) {
                Mapping::Zero { len } => {
                    let mut piece = split_to(&mut buffer, len);
                    let start = at;
                    at += piece.len() as u64;
                    piece.as_mut_slice().fill(0);
                    self.add_piece(number, start, piece);
                }
                Mapping::Data { delta, offset, len } if delta != self.top() || self.disk.is_read_only() => {
                    let part = self.cut_part(number, &mut at, &mut buffer, len);
                    self.start_read(part, delta, offset.0);
                }
                Mapping::Data { delta, offset, len } => match self.lock_run(at, offset.0, len, 1) {
                    Some(run) => {
                        let part = self.cut_part(number, &mut at, &mut buffer, run.len);
                        self.own(part, run.locked);
                        self.start_read(part, delta, run.offset);
                    }
                    None => {
                        let len = self.disk.layout().bytes_left_in_cluster(at);
                        let part = self.cut_part(number, &mut at, &mut buffer, len);
                        self.ask_for_lock(part, Want::Shared);
                    }
                },
            }
        }
    }

    /// Writes `buffer` at guest byte `at`.
    pub(super) fn place_write(&mut self, number: usize, mut at: u64, mut buffer: IoBuf) {
        while !buffer.is_empty() {
            let left = buffer.len() as u64;
            let want = match self.chain.map(GuestOffset(at), left.min(TRANSFER_BYTES_MAX)) {
                Mapping::Data { delta, offset, len } if delta == self.top() => {
                    if let Some(run) = self.lock_run(at, offset.0, len, self.unit()) {
                        let part = self.cut_part(number, &mut at, &mut buffer, run.len);
                        self.own(part, run.locked);
                        self.start_in_place(part, run.offset);
                        continue;
                    }
                    self.want_in_place(at, left, offset.0)
                }
                _ => Want::Allocate,
            };
            let len = self.disk.layout().bytes_left_in_cluster(at);
            let part = self.cut_part(number, &mut at, &mut buffer, len);
            self.ask_for_lock(part, want);
        }
    }

    /// Makes parts for the next clusters of a zeroing request.
    pub(super) fn place_zeroes(&mut self, number: usize) -> Turn {
        let mut budget = ZEROING_CLUSTERS_PER_TURN * 32;
        loop {
            let Some(running) = self.requests.get(number) else { return Turn::Placed };
            // What waits for space does not keep a discard from freeing some.
            let parts = running.parts - running.waiting;
            let (at, end) = (running.cursor, running.extent.end());
            let may_unmap = may_unmap(running.op);
            if at >= end {
                return Turn::Placed;
            }
            // One of the parts is the request itself, still being placed.
            if parts > ZEROING_PARTS_MAX {
                return Turn::Stalled;
            }
            if budget == 0 {
                return Turn::Unfinished;
            }
            let segment = self.disk.layout().segment(at, end);
            let (next, want) = match self.chain.map(GuestOffset(at), (end - at).min(SKIPPED_BYTES_MAX)) {
                Mapping::Zero { len } => {
                    budget = budget.saturating_sub(1 + len / self.disk.layout().cluster_bytes());
                    (at + len.max(1), None)
                }
                Mapping::Data { delta, offset, len } if delta == self.top() => {
                    budget = budget.saturating_sub(32);
                    let clears = segment.whole && may_unmap && self.may_clear(segment.cluster);
                    if !may_unmap
                        && let Some(run) =
                            self.lock_run(at, offset.0, len.min(ZEROED_RUN_BYTES_MAX), self.unit())
                    {
                        let part = self.add_part(number, Extent::between(at, at + run.len), None);
                        self.advance(number, at + run.len);
                        self.own(part, run.locked);
                        self.start_in_place(part, run.offset);
                        continue;
                    }
                    let want =
                        if clears { Want::Exclusive } else { self.want_in_place(at, end - at, offset.0) };
                    (segment.extent.end(), Some(want))
                }
                Mapping::Data { .. } => {
                    budget = budget.saturating_sub(32);
                    (segment.extent.end(), Some(Want::Allocate))
                }
            };
            self.advance(number, next.min(end));
            if let Some(want) = want {
                let part = self.add_part(number, segment.extent, None);
                self.ask_for_lock(part, want);
            }
        }
    }

    fn advance(&mut self, number: usize, to: u64) {
        if let Some(running) = self.requests.get_mut(number) {
            running.cursor = to;
        }
    }

    /// A part for the next `len` bytes of the buffer at most.
    fn cut_part(&mut self, number: usize, at: &mut u64, buffer: &mut IoBuf, len: u64) -> usize {
        let piece = split_to(buffer, len);
        let extent = Extent::between(*at, *at + piece.len() as u64);
        *at = extent.end();
        self.add_part(number, extent, Some(piece))
    }

    fn own(&mut self, part: usize, locked: Locked) {
        if let Some(part) = self.parts.get_mut(part) {
            part.locked = Some(locked);
        }
    }

    /// The lock that the first cluster's share of a transfer in place needs.
    fn want_in_place(&self, at: u64, len: u64, offset: u64) -> Want {
        let len = len.min(self.disk.layout().bytes_left_in_cluster(at));
        if is_multiple(offset, len, self.unit()) { Want::Shared } else { Want::Exclusive }
    }

    /// How much of a run at `offset` can be transferred in units: all, or up to the cluster whose end part cannot.
    fn aligned_len(&self, at: u64, offset: u64, len: u64, unit: u64) -> u64 {
        if !offset.is_multiple_of(unit) {
            return 0;
        }
        if len.is_multiple_of(unit) {
            return len;
        }
        let last_cluster = self.disk.layout().cluster_start(self.disk.layout().cluster_of(at + len));
        last_cluster.saturating_sub(at)
    }

    /// Locks, shared, as many clusters of the run at `at` as can be had without waiting, and resolves them under the
    /// lock. `None` when that gives nothing that is in the top and transferable in units.
    fn lock_run(&mut self, at: u64, offset: u64, len: u64, unit: u64) -> Option<Run> {
        let layout = self.disk.layout();
        let len = self.aligned_len(at, offset, len, unit);
        let first = layout.cluster_of(at).0;
        let mut reached = at;
        while reached < at + len
            && self.disk.locks.try_acquire(layout.cluster_of(reached).0, Want::Shared).is_some()
        {
            reached = (reached + layout.bytes_left_in_cluster(reached)).min(at + len);
        }
        if reached == at {
            return None;
        }
        let last = layout.cluster_of(reached - 1).0;
        let found = match self.chain.map(GuestOffset(at), reached - at) {
            Mapping::Data { delta, offset, len } if delta == self.top() => {
                Some((offset.0, self.aligned_len(at, offset.0, len.min(reached - at), unit)))
            }
            _ => None,
        };
        let (offset, len) = found.unwrap_or((0, 0));
        let kept = if len == 0 { None } else { Some(layout.cluster_of(at + len - 1).0) };
        for cluster in kept.map_or(first, |kept| kept + 1)..=last {
            self.disk.locks.release(cluster, Mode::Shared, &mut self.granted);
        }
        kept.map(|last| Run { len, offset, locked: Locked { first, last, mode: Mode::Shared } })
    }

    /// A part owns its cluster: decides what to do with it.
    pub(super) fn place_locked(&mut self, number: usize) {
        let Some(&Part { request, extent, locked: Some(locked), .. }) = self.parts.get(number) else {
            return;
        };
        let Some(op) = self.requests.get(request).map(|running| running.op) else { return };
        if let Op::Relocate(to) = op {
            return self.move_cluster(number, GuestCluster(locked.first), to);
        }
        let mapping = self.chain.map(GuestOffset(extent.start()), extent.len());
        match mapping {
            Mapping::Data { delta, offset, len } if delta == self.top() && len >= extent.len() => {
                if op == Op::Read {
                    self.start_read(number, delta, offset.0);
                } else {
                    self.change_in_place(number, extent, locked, op, offset.0);
                }
            }
            _ if op == Op::Read => self.read_elsewhere(number),
            Mapping::Zero { len } if len >= extent.len() && !matches!(op, Op::Write { .. }) => {
                self.end_part(number, Ok(()));
            }
            _ if locked.mode == Mode::Exclusive => self.fill_fresh(number, extent, locked, op),
            _ => {
                self.unlock(number);
                self.ask_for_lock(number, Want::Allocate);
            }
        }
    }

    /// What a read waited for is no longer in the top.
    fn read_elsewhere(&mut self, number: usize) {
        self.unlock(number);
        let Some(part) = self.remove_part(number) else { return };
        if let Some(buffer) = part.data {
            self.place_read(part.request, part.extent.start(), buffer);
        }
        self.end_of_part(part.request, Ok(()));
    }

    /// Writes or zeroes one cluster's share where it lies, or frees the cluster.
    fn change_in_place(&mut self, number: usize, extent: Extent, locked: Locked, op: Op, offset: u64) {
        let cluster = GuestCluster(locked.first);
        let is_whole = extent == self.disk.layout().cluster_extent(cluster);
        let clears = may_unmap(op) && is_whole && self.may_clear(cluster);
        let is_aligned = is_multiple(offset, extent.len(), self.unit());
        let needs_exclusive = clears || !is_aligned;
        match (needs_exclusive, locked.mode) {
            (true, Mode::Shared) => {
                self.unlock(number);
                self.ask_for_lock(number, Want::Exclusive);
            }
            (true, Mode::Exclusive) if clears && self.clear(number, cluster) => {}
            (_, Mode::Exclusive) if !is_aligned => {
                let within = extent.start() - self.disk.layout().cluster_start(cluster);
                let overlay = Extent::between(within, within + extent.len());
                let range = hull(overlay, self.unit());
                let file = self.slots[self.top()];
                self.start_assembly(
                    number,
                    Assembly::write(file, offset - within, range, overlay, Background::Itself),
                );
            }
            (_, mode) => {
                if mode == Mode::Exclusive {
                    self.disk.locks.downgrade(cluster.0, &mut self.granted);
                    self.own(number, Locked { mode: Mode::Shared, ..locked });
                }
                self.start_in_place(number, offset);
            }
        }
    }

    /// Frees a cluster that nothing below holds: it reads as zeros from now on. `false`, with nothing done, when the top
    /// is raw and has no entries to clear.
    fn clear(&mut self, number: usize, cluster: GuestCluster) -> bool {
        let cleared = self.disk.flusher.change(&self.chain, || {
            let cleared = self.chain.clear(cluster);
            let entry = matches!(cleared, Ok(true)).then_some(PendingEntry { cluster, file: None });
            (entry, cleared)
        });
        match cleared {
            Ok(false) => return false,
            Ok(true) => {
                count(&self.disk.counters.freed_clusters, 1);
                self.end_part(number, Ok(()));
            }
            Err(error) => self.end_part(number, Err(error.guest_errno())),
        }
        true
    }

    /// Reads a part from a place that is known to hold it.
    fn start_read(&mut self, number: usize, delta: usize, offset: u64) {
        let Some(part) = self.parts.get(number) else { return };
        let len = part.extent.len();
        let file = self.slots[delta];
        let is_direct = is_multiple(offset, len, self.unit())
            && part.data.as_ref().is_some_and(|buffer| self.is_aligned_in_memory(buffer));
        if is_direct {
            self.start_direct(number, file, offset);
        } else {
            let within = offset % self.unit();
            let wanted = Extent::between(within, within + len);
            self.start_assembly(
                number,
                Assembly::read(file, offset - within, hull(wanted, self.unit()), wanted),
            );
        }
    }

    /// Writes or zeroes an aligned part where it lies.
    fn start_in_place(&mut self, number: usize, offset: u64) {
        let Some(part) = self.parts.get(number) else { return };
        let file = self.slots[self.top()];
        let everything = Extent::between(0, part.extent.len());
        let op = self.requests.get(part.request).map(|running| running.op);
        match &part.data {
            Some(buffer) if self.is_aligned_in_memory(buffer) => self.start_direct(number, file, offset),
            None if !self.disk.cannot_zero.load(Ordering::Relaxed) => {
                let how = if op.is_some_and(may_unmap) { Allocation::Punch } else { Allocation::Zero };
                self.start_zeroing(number, file, offset, everything.len(), how);
            }
            _ => {
                let assembly = Assembly::write(file, offset, everything, everything, Background::Zeros);
                self.start_assembly(number, assembly);
            }
        }
    }

    /// Gives a cluster a place in the top and fills it completely (I3). The part owns the cluster exclusively.
    fn fill_fresh(&mut self, number: usize, extent: Extent, locked: Locked, op: Op) {
        let layout = self.disk.layout();
        let cluster = layout.cluster_of(extent.start());
        if self.disk.full_host.is_refusing() {
            return self.fail_part(number, self.disk.full_host.errno());
        }
        let prepared = match self.chain.prepare_write(cluster) {
            Ok(WriteTarget::Fresh(prepared)) => {
                self.disk.full_host.found();
                prepared
            }
            // A raw top has a place for everything, also past the end of its file.
            Ok(WriteTarget::InPlace(base)) => {
                let within = extent.start() - layout.cluster_start(cluster);
                return self.change_in_place(number, extent, locked, op, base.0 + within);
            }
            Err(error) => {
                if error.is_out_of_space() {
                    self.disk.full_host.refused();
                }
                return self.fail_part(number, error.guest_errno());
            }
        };
        let (file, base, is_zero) = (self.slots[self.top()], prepared.offset().0, prepared.known_zero());
        let Some(part) = self.parts.get_mut(number) else { return };
        if is_active(Mutant::PublishBeforeComplete) {
            let entry = PendingEntry { cluster, file: Some(prepared.place()) };
            self.disk.flusher.change(&self.chain, || (Some(entry), prepared.publish()));
        } else {
            part.prepared = Some(prepared);
        }
        let is_below = self.chain.held_below(cluster);
        let is_whole = extent == layout.cluster_extent(cluster);
        let within = extent.start() - layout.cluster_start(cluster);
        let overlay = Extent::between(within, within + extent.len());
        let all = Extent::between(0, layout.cluster_bytes());
        // Only a cluster known to be zero may be left partly unwritten, and only where zeros belong.
        let fills = is_below || !is_zero;
        let is_direct = part.data.is_some()
            && (!fills || overlay == all)
            && is_multiple(base + within, extent.len(), u64::from(self.alignment.offset.max(1)));
        let is_direct = is_direct
            && self
                .parts
                .get(number)
                .and_then(|part| part.data.as_ref())
                .is_some_and(|data| self.is_aligned_in_memory(data));
        let has_data = matches!(op, Op::Write { .. });
        if is_direct {
            self.start_direct(number, file, base + within);
        } else if !has_data && is_whole && is_zero {
            self.end_part(number, Ok(()));
        } else if !has_data && is_whole && !self.disk.cannot_zero.load(Ordering::Relaxed) {
            let how = if may_unmap(op) { Allocation::Punch } else { Allocation::Zero };
            self.start_zeroing(number, file, base, all.len(), how);
        } else {
            if !is_below && !is_zero && self.chain.has_unsynced_growth() {
                // The whole cluster is written only because the growth of the file is not durable yet.
                self.disk.flusher.hurry();
            }
            let range = if fills { all } else { hull(overlay, self.unit()) };
            let background = if is_below && !is_whole {
                Background::Below { cluster_start: layout.cluster_start(cluster), skips_zeros: is_zero }
            } else {
                Background::Zeros
            };
            self.start_assembly(number, Assembly::write(file, base, range, overlay, background));
        }
    }

    /// Copies a cluster to another place in the file and publishes that. The part owns the cluster exclusively: nobody
    /// writes to the old place meanwhile, and when it is freed nobody is at it (I4 b).
    fn move_cluster(&mut self, number: usize, cluster: GuestCluster, to: Destination) {
        if self.disk.keeps_entries() {
            // Who merges the top reads its places without a lock, and is not told of moves.
            return self.end_part(number, Err(libc::EBUSY));
        }
        let (prepared, from) = match self.chain.prepare_move(cluster, to) {
            Ok(Some(found)) => found,
            Ok(None) => return self.end_part(number, Ok(())),
            Err(error) => return self.end_part(number, Err(error.guest_errno())),
        };
        let (file, base, skips_zeros) = (self.slots[self.top()], prepared.offset().0, prepared.known_zero());
        let Some(part) = self.parts.get_mut(number) else { return };
        if is_active(Mutant::PublishBeforeComplete) {
            let entry = PendingEntry { cluster, file: Some(prepared.place()) };
            self.disk.flusher.change(&self.chain, || (Some(entry), prepared.publish()));
        } else {
            part.prepared = Some(prepared);
        }
        // Also what lies in the file past the end of the disk: the place is to be whole.
        let all = Extent::between(0, self.disk.layout().cluster_bytes());
        let nothing = Extent::between(0, 0);
        let background = Background::Elsewhere { offset: from.0, skips_zeros };
        self.start_assembly(number, Assembly::write(file, base, all, nothing, background));
    }

    /// The file has zeroed a range, or cannot: then zeros are written.
    pub(super) fn zeroing_done(&mut self, number: usize, result: std::io::Result<usize>) {
        let Some(part) = self.parts.get(number) else { return };
        let Work::Zeroing { file, offset, len } = part.work else { return };
        match result {
            Ok(_) => self.end_part(number, Ok(())),
            Err(error) => {
                let is_refusal = matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::EPERM)
                );
                if is_refusal || error.kind() == std::io::ErrorKind::Unsupported {
                    self.disk.cannot_zero.store(true, Ordering::Relaxed);
                } else if guest_errno(&error) != libc::EIO {
                    // Writing zeros needs no less.
                    return self.fail_part(number, guest_errno(&error));
                }
                let all = Extent::between(0, len);
                self.start_assembly(number, Assembly::write(file, offset, all, all, Background::Zeros));
            }
        }
    }
}

/// The first `len` bytes of the buffer, at least one, at most all.
fn split_to(buffer: &mut IoBuf, len: u64) -> IoBuf {
    buffer.split_to(usize::try_from(len.max(1)).unwrap_or(usize::MAX))
}

/// Whether host space may be given back.
fn may_unmap(op: Op) -> bool {
    matches!(op, Op::Discard | Op::WriteZeroes { may_unmap: true, .. })
}
