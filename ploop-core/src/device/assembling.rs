//! Transfers through a bounce buffer, piece by piece: copy-up, zero filling, reading and patching, misaligned reads.
//!
//! An [`Assembly`] covers a range of one file in pieces no larger than a bounce buffer. For each piece of a write it
//! reads what belongs around the guest's bytes (from the deltas below, from the place itself, or nothing: zeros), lays
//! the guest's bytes over it and writes the piece; for each piece of a misaligned read it reads the piece and copies the
//! guest's share out. One piece and one transfer at a time: large clusters (up to 64 MiB) need one buffer, not 64.
//!
//! Positions in an assembly are relative to `base`, a place in the file where a unit of transfer begins.
//!
//! Buffers come from the queue's pool; an assembly takes one, keeps it to its end, and waits in line while there is
//! none. Whoever has one waits for nothing but transfers, so the line moves.

use super::disk::count;
use super::queue::Queue;
use super::split::{hull, is_multiple, uncovered};
use super::transferring::{Progress, Work, guest_errno, rejoin_two, transferred};
use crate::extent::Extent;
use crate::format::Mapping;
use crate::io::{FileSlot, IoBuf, IoDone, IoKind, StorageExt};
use crate::units::GuestOffset;

/// What lies around the guest's bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Background {
    /// Zeros.
    Zeros,
    /// What the deltas below hold. Relative positions count from guest byte `cluster_start`. With `skips_zeros` the
    /// place holds zeros already, and pieces of zeros are not written.
    Below { cluster_start: u64, skips_zeros: bool },
    /// What the place itself holds.
    Itself,
    /// What another place of the same file holds, from byte `offset` on. `skips_zeros` as above.
    Elsewhere { offset: u64, skips_zeros: bool },
}

#[derive(Clone, Copy, Debug)]
enum Job {
    Write(Background),
    Read,
}

/// The state of a transfer in pieces.
#[derive(Debug)]
pub(super) struct Assembly {
    job: Job,
    file: FileSlot,
    /// Where in the file relative position 0 is.
    base: u64,
    /// What is transferred; both ends at multiples of the unit.
    range: Extent,
    /// The guest's bytes.
    overlay: Extent,
    /// The piece being worked on, or the empty extent before the next.
    piece: Extent,
    /// What is still to be read of the piece.
    unread: Extent,
    is_writing: bool,
    /// The bounce buffer, unless a transfer has a part of it.
    bounce: Option<IoBuf>,
    /// What lies before and behind the transferred part of the bounce buffer.
    around: Option<(IoBuf, IoBuf)>,
    /// Length of the transfer in flight, and where in the piece it starts.
    window: (usize, usize),
}

impl Assembly {
    fn new(job: Job, file: FileSlot, base: u64, range: Extent, overlay: Extent) -> Self {
        let piece = Extent::between(range.start(), range.start());
        let (bounce, around) = (None, None);
        let (is_writing, window) = (false, (0, 0));
        Self { job, file, base, range, overlay, piece, unread: piece, is_writing, bounce, around, window }
    }

    /// Writes `range`: the part's data (or zeros, if it has none) at `overlay`, the background elsewhere.
    pub(super) fn write(
        file: FileSlot,
        base: u64,
        range: Extent,
        overlay: Extent,
        background: Background,
    ) -> Self {
        Self::new(Job::Write(background), file, base, range, overlay)
    }

    /// Reads `range` and gives the part its bytes at `overlay`.
    pub(super) fn read(file: FileSlot, base: u64, range: Extent, overlay: Extent) -> Self {
        Self::new(Job::Read, file, base, range, overlay)
    }

    /// The piece being worked on.
    pub(super) fn piece(&self) -> Extent {
        self.piece
    }

    /// Lays further bytes over the piece, at a relative extent inside it; `false`: it could not be done.
    pub(super) fn lay(&mut self, at: Extent, data: &[u8]) -> bool {
        match self.bytes(at) {
            Some(bytes) if bytes.len() == data.len() => {
                bytes.copy_from_slice(data);
                true
            }
            _ => false,
        }
    }

    /// The bytes of the piece at a relative extent inside it.
    fn bytes(&mut self, at: Extent) -> Option<&mut [u8]> {
        let start = usize::try_from(at.start().checked_sub(self.piece.start())?).ok()?;
        let len = usize::try_from(at.len()).ok()?;
        self.bounce.as_mut()?.as_mut_slice().get_mut(start..start.checked_add(len)?)
    }

    /// Cuts the part of the bounce buffer out that a transfer is to own.
    fn take_window(&mut self, start: usize, len: usize) -> Option<IoBuf> {
        let mut before = self.bounce.take()?;
        let mut window = before;
        before = window.split_to(start);
        let mut behind = window;
        window = behind.split_to(len);
        self.window = (start, len);
        self.around = Some((before, behind));
        Some(window)
    }

    /// Puts it back.
    fn return_window(&mut self, window: IoBuf) {
        if let Some((before, behind)) = self.around.take() {
            let front = rejoin_two(Some(before), window);
            self.bounce = front.and_then(|front| rejoin_two(Some(front), behind));
        }
    }

    /// Lays the guest's bytes over the piece, or copies them out of it.
    fn exchange(&mut self, data: Option<&mut IoBuf>) {
        let shared = self.overlay.clip(&self.piece);
        if shared.is_empty() {
            return;
        }
        let (is_read, skip) = (matches!(self.job, Job::Read), shared.start() - self.overlay.start());
        let Some(bytes) = self.bytes(shared) else { return };
        let Some(data) = data else { return bytes.fill(0) };
        let guest =
            usize::try_from(skip).ok().and_then(|skip| data.as_mut_slice().get_mut(skip..skip + bytes.len()));
        if let Some(guest) = guest {
            if is_read { guest.copy_from_slice(bytes) } else { bytes.copy_from_slice(guest) }
        }
    }
}

/// What an assembly needs next.
enum Step {
    /// A transfer of this part of the bounce buffer.
    Transfer { file: FileSlot, offset: u64, kind: IoKind },
    /// A bounce buffer.
    Wait,
    /// Nothing any more.
    End(Result<(), i32>),
}

impl Queue {
    /// Begins an assembly for a part.
    pub(super) fn start_assembly(&mut self, number: usize, assembly: Assembly) {
        if let Some(part) = self.parts.get_mut(number) {
            part.work = Work::Assembling(Box::new(assembly));
            self.continue_assembly(number);
        }
    }

    /// Lets those who wait for a bounce buffer go on; `false` when there is none, or nobody waits.
    pub(super) fn resume_bounced(&mut self) -> bool {
        let Some(&number) = self.waiting_for_bounce.front() else { return false };
        let bounce = match self.bounce.try_take() {
            Ok(None) => return false,
            Ok(Some(bounce)) => Some(bounce),
            Err(_) => None,
        };
        self.waiting_for_bounce.pop_front();
        let Some(part) = self.parts.get_mut(number) else { return true };
        if let (Work::Assembling(assembly), Some(bounce)) = (&mut part.work, bounce) {
            assembly.bounce = Some(bounce);
            self.continue_assembly(number);
        } else {
            self.end_part(number, Err(libc::EIO));
        }
        true
    }

    fn continue_assembly(&mut self, number: usize) {
        let Some(part) = self.parts.get_mut(number) else { return };
        let mut data = part.data.take();
        let Work::Assembling(assembly) = std::mem::replace(&mut part.work, Work::Waiting(0)) else { return };
        let mut assembly = assembly;
        let step = self.next_step(number, &mut assembly, &mut data);
        if let Step::End(_) = step {
            // The bounce buffer goes back before the part ends, for those who wait for it.
            assembly.bounce = None;
        }
        let Some(part) = self.parts.get_mut(number) else { return };
        part.data = data;
        part.work = Work::Assembling(assembly);
        match step {
            Step::Transfer { file, offset, kind } => self.submit_operation(number, file, offset, kind),
            Step::Wait => self.waiting_for_bounce.push_back(number),
            Step::End(result) => self.end_part(number, result),
        }
    }

    /// Goes on until a transfer is needed.
    fn next_step(&mut self, number: usize, assembly: &mut Assembly, data: &mut Option<IoBuf>) -> Step {
        loop {
            if assembly.bounce.is_none() {
                // First come, first served: nobody overtakes those who wait.
                if !self.waiting_for_bounce.is_empty() {
                    return Step::Wait;
                }
                match self.bounce.try_take() {
                    Ok(Some(bounce)) => assembly.bounce = Some(bounce),
                    Ok(None) => return Step::Wait,
                    Err(error) => return Step::End(Err(guest_errno(&error))),
                }
            }
            if assembly.piece.is_empty() && !self.begin_piece(assembly) {
                return Step::End(Ok(()));
            }
            match self.read_more(assembly) {
                Ok(Some(step)) => return step,
                Ok(None) => {}
                Err(errno) => return Step::End(Err(errno)),
            }
            assembly.exchange(data.as_mut());
            if let Job::Write(background) = assembly.job {
                self.fold_in(number, assembly);
                let piece = assembly.piece;
                let is_needless =
                    matches!(
                        background,
                        Background::Below { skips_zeros: true, .. }
                            | Background::Elsewhere { skips_zeros: true, .. }
                    ) && assembly.bytes(piece).is_some_and(|bytes| crate::io::buffer::is_zero(bytes));
                if !is_needless {
                    return self.write_piece(assembly);
                }
            }
            end_piece(assembly);
        }
    }

    /// Chooses the next piece and what must be read for it; `false` after the last.
    fn begin_piece(&mut self, assembly: &mut Assembly) -> bool {
        let start = assembly.piece.end();
        if start >= assembly.range.end() {
            return false;
        }
        let piece = Extent::between(start, start + self.bounce.buffer_bytes() as u64).clip(&assembly.range);
        assembly.piece = piece;
        let nothing = Extent::between(start, start);
        let unit = u64::from(self.alignment.offset.max(1));
        assembly.unread = match assembly.job {
            Job::Read => piece,
            Job::Write(Background::Zeros) => {
                let covered = assembly.overlay.clip(&piece) == piece;
                if !covered && let Some(bytes) = assembly.bytes(piece) {
                    bytes.fill(0);
                }
                nothing
            }
            Job::Write(Background::Below { .. } | Background::Itself | Background::Elsewhere { .. }) => {
                uncovered(piece, assembly.overlay).map_or(nothing, |range| hull(range, unit).clip(&piece))
            }
        };
        true
    }

    /// The next read of the piece, if one is left.
    fn read_more(&mut self, assembly: &mut Assembly) -> Result<Option<Step>, i32> {
        while !assembly.unread.is_empty() {
            let unread = assembly.unread;
            let (file, offset, len) = match assembly.job {
                Job::Write(Background::Below { cluster_start, .. }) => {
                    let at = cluster_start + unread.start();
                    let on_disk = self.disk.size_bytes().saturating_sub(at).min(unread.len());
                    let mapping = match on_disk {
                        0 => Mapping::Zero { len: unread.len() },
                        len => self.chain.map_below(GuestOffset(at), len),
                    };
                    match mapping {
                        Mapping::Zero { len } => {
                            let (zeros, rest) = unread.split(unread.start() + len.max(1));
                            if let Some(bytes) = assembly.bytes(zeros) {
                                bytes.fill(0);
                            }
                            assembly.unread = rest;
                            continue;
                        }
                        Mapping::Data { delta, offset, len } => {
                            let len = len.clamp(1, on_disk);
                            count(&self.disk.counters.copied_up_bytes, len);
                            if !is_multiple(offset.0, len, u64::from(self.alignment.offset.max(1))) {
                                // Odd old images, or the end of a raw base: rare enough to be read in place.
                                let (part, rest) = unread.split(unread.start() + len);
                                let bytes = assembly.bytes(part).ok_or(libc::EIO)?;
                                let storage = self.chain.storage(delta);
                                storage
                                    .read_exact_at(offset.0, bytes)
                                    .map_err(|error| guest_errno(&error))?;
                                assembly.unread = rest;
                                continue;
                            }
                            (self.slots[delta], offset.0, len)
                        }
                    }
                }
                Job::Write(Background::Elsewhere { offset, .. }) => {
                    (assembly.file, offset + unread.start(), unread.len())
                }
                _ => (assembly.file, assembly.base + unread.start(), unread.len()),
            };
            let start = usize::try_from(unread.start() - assembly.piece.start()).map_err(|_| libc::EIO)?;
            let len = usize::try_from(len).map_err(|_| libc::EIO)?;
            let window = assembly.take_window(start, len).ok_or(libc::EIO)?;
            return Ok(Some(Step::Transfer { file, offset, kind: IoKind::Read(window) }));
        }
        Ok(None)
    }

    fn write_piece(&mut self, assembly: &mut Assembly) -> Step {
        assembly.is_writing = true;
        let offset = assembly.base + assembly.piece.start();
        let window = usize::try_from(assembly.piece.len()).ok().and_then(|len| assembly.take_window(0, len));
        match window {
            Some(window) => Step::Transfer { file: assembly.file, offset, kind: IoKind::Write(window) },
            None => Step::End(Err(libc::EIO)),
        }
    }

    /// A transfer of an assembly has ended.
    pub(super) fn assembly_done(&mut self, number: usize, done: IoDone) {
        let unit = self.alignment.offset.max(1) as usize;
        let Some(part) = self.parts.get_mut(number) else { return };
        let Work::Assembling(assembly) = &mut part.work else { return };
        let Some(buffer) = done.buffer else { return self.end_part(number, Err(libc::EIO)) };
        assembly.return_window(buffer);
        let (start, len) = assembly.window;
        let is_write = assembly.is_writing;
        match transferred(&done.result, len, unit, !is_write) {
            Progress::Failed(errno) => {
                assembly.bounce = None;
                return if is_write {
                    self.fail_part(number, errno)
                } else {
                    self.end_part(number, Err(errno))
                };
            }
            Progress::Whole if is_write => end_piece(&mut *assembly),
            Progress::Whole => {
                assembly.unread = assembly.unread.split(assembly.unread.start() + len as u64).1
            }
            Progress::Part(count) if is_write => {
                let offset = assembly.base + assembly.piece.start() + (start + count) as u64;
                let file = assembly.file;
                match assembly.take_window(start + count, len - count) {
                    Some(window) => self.submit_operation(number, file, offset, IoKind::Write(window)),
                    None => self.end_part(number, Err(libc::EIO)),
                }
                return;
            }
            Progress::Part(count) => {
                assembly.unread = assembly.unread.split(assembly.unread.start() + count as u64).1;
            }
            Progress::EndOfFile(count) => {
                let (_, missing) = assembly.unread.split(assembly.unread.start() + count as u64);
                let missing = Extent::between(missing.start(), missing.start() + (len - count) as u64);
                // Past the end of the file is fine only past what was asked for: mappings lie inside their file.
                let is_loss = match assembly.job {
                    Job::Read => assembly.overlay.intersects(&missing),
                    Job::Write(Background::Itself) => false,
                    Job::Write(_) => true,
                };
                if is_loss {
                    assembly.bounce = None;
                    return self.end_part(number, Err(libc::EIO));
                }
                if let Some(bytes) = assembly.bytes(missing) {
                    bytes.fill(0);
                }
                assembly.unread = assembly.unread.split(missing.end()).1;
            }
        }
        self.continue_assembly(number);
    }
}

/// Makes room for the next piece.
fn end_piece(assembly: &mut Assembly) {
    assembly.is_writing = false;
    let end = assembly.piece.end();
    assembly.piece = Extent::between(end, end);
    assembly.unread = assembly.piece;
}
