//! One thread of a server: reads requests, submits them to its queue, answers them as they complete.
//!
//! Everything here belongs to that thread; what the threads of a server share is in [`Shared`].

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::server::{ServerOptions, Shared, UNBUFFERED_MAX};
use super::sys::FuseDevice;
use super::wire::{self, Agreement, Operation, WireError};
use crate::device::{Completion, Op, Queue, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::Mapping;
use crate::io::{BufferPool, IoBuf, Wait, Waker};
use crate::units::GuestOffset;

/// Requests up to this many bytes use small buffers.
const SMALL_BYTES: usize = 64 * 1024;
/// A large buffer: the biggest payload and the page that the kernel wants to be there for headers.
const LARGE_BYTES: usize = wire::TRANSFER_BYTES_MAX as usize + 4096;
/// Requests read in one go before the completions get their turn.
const BATCH: usize = 64;
/// A zeroing of gigabytes goes to the disk in steps of this many bytes, so that others get in between.
const ZERO_STEP_BYTES: u64 = 64 << 20;
/// Steps of a search for data or a hole, before the safe answer is given instead.
const SEEK_STEPS_MAX: u32 = 65_536;
/// Unaligned reads are widened to this many bytes.
const SECTOR_BYTES: u64 = crate::units::SECTOR_BYTES;

/// A request that the queue has.
#[derive(Debug)]
enum Active {
    Read { unique: u64, skip: usize, size: usize },
    Write { unique: u64, size: u32 },
    Sync { unique: u64 },
    Zero { unique: u64, rest: Extent, may_unmap: bool },
}

/// What became of one attempt to read a request.
enum Step {
    Handled,
    Nothing,
    OutOfBuffers,
    Unmounted,
}

pub(super) struct Worker {
    device: FuseDevice,
    shared: Arc<Shared>,
    queue: Queue,
    large: BufferPool,
    small: BufferPool,
    /// The large buffer the next request is read into.
    landing: Option<IoBuf>,
    /// A small buffer for the start of the next request: a small payload need not be copied then.
    small_landing: Option<IoBuf>,
    /// Whether the last write was a small one: the next is expected to be of its kind.
    expects_small: bool,
    /// A read that waits for a buffer; nothing is read from the descriptor meanwhile.
    parked: Option<(u64, Extent)>,
    /// Requests at the queue; the index is their id.
    active: Vec<Option<Active>>,
    free: Vec<usize>,
    /// Zeroings whose next step waits its turn.
    zeroing: VecDeque<(u64, Extent, bool)>,
    unbuffered: usize,
    /// All buffers are in use: only a completion brings one back, nothing is read before.
    starved: bool,
    watching: bool,
}

impl Worker {
    pub(super) fn new(device: FuseDevice, shared: Arc<Shared>, options: &ServerOptions) -> Result<Self> {
        let depth = u32::try_from(options.requests_max()).unwrap_or(u32::MAX);
        let io = crate::io::best_io_queue(depth)
            .map_err(|cause| Error::io(ErrorKind::System, "make a queue for transfers", cause))?;
        let queue = shared.disk.queue(io)?;
        let large = BufferPool::new(LARGE_BYTES, options.large_buffers.max(2));
        let small = BufferPool::new(SMALL_BYTES, options.small_buffers.max(1));
        for pool in [&large, &small] {
            preallocate(pool)
                .map_err(|cause| Error::io(ErrorKind::Memory, "allocate transfer buffers", cause))?;
        }
        Ok(Self {
            device,
            shared,
            queue,
            large,
            small,
            landing: None,
            small_landing: None,
            expects_small: true,
            parked: None,
            active: Vec::new(),
            free: Vec::new(),
            zeroing: VecDeque::new(),
            unbuffered: 0,
            starved: false,
            watching: false,
        })
    }

    /// Wakes the thread out of its wait.
    pub(super) fn waker(&self) -> Waker {
        self.queue.waker()
    }

    /// The thread: until the mount has gone or the server is stopped, with everything answered.
    pub(super) fn run(mut self) -> Result<()> {
        let result = self.serve();
        if result.is_err() {
            // The kernel waits for requests that this thread has: only a successor can answer them.
            self.shared.stop();
        }
        result
    }

    fn serve(&mut self) -> Result<()> {
        let mut completions = Vec::new();
        let mut readable = true;
        let mut unmounted = false;
        loop {
            let ending = unmounted || self.shared.stop.load(Ordering::SeqCst);
            // What waits for space is left unanswered: a successor is asked again, and of an end of the mount nobody waits.
            if ending && self.is_idle() {
                return Ok(());
            }
            self.watch(!ending && self.can_accept())?;
            let wait = if readable && self.watching { Wait::No } else { Wait::Yes };
            let reaped = self
                .queue
                .run(wait, &mut completions)
                .map_err(|cause| Error::io(ErrorKind::System, "run the disk's queue", cause))?;
            if self.queue.has_freed_buffers() {
                self.starved = false;
            }
            for completion in completions.drain(..) {
                self.complete(completion)?;
            }
            self.continue_waiting()?;
            readable |= reaped.watched_ready;
            if readable && !ending {
                (readable, unmounted) = self.accept_batch()?;
            }
        }
    }

    /// Requests at the queue.
    fn in_flight(&self) -> usize {
        self.active.len() - self.free.len()
    }

    fn is_idle(&self) -> bool {
        let waiting = self.queue.waiting_for_space();
        self.in_flight() == waiting && self.parked.is_none() && self.zeroing.is_empty()
    }

    fn can_accept(&self) -> bool {
        !self.starved && self.parked.is_none() && self.unbuffered < UNBUFFERED_MAX
    }

    fn watch(&mut self, on: bool) -> Result<()> {
        if on == self.watching {
            return Ok(());
        }
        self.queue
            .watch(on.then(|| self.device.number()))
            .map_err(|cause| Error::io(ErrorKind::System, "watch the FUSE descriptor", cause))?;
        self.watching = on;
        Ok(())
    }

    /// Reads requests while there are any; whether more may be there, and whether the mount has gone.
    fn accept_batch(&mut self) -> Result<(bool, bool)> {
        for _ in 0..BATCH {
            if !self.can_accept() {
                return Ok((true, false));
            }
            match self.accept()? {
                // With nothing else to do the disk gets its request first; the watch tells of more.
                Step::Handled if self.in_flight() <= 1 => return Ok((false, false)),
                Step::Handled => {}
                Step::Nothing => return Ok((false, false)),
                Step::OutOfBuffers => {
                    self.starved = true;
                    return Ok((true, false));
                }
                Step::Unmounted => return Ok((false, true)),
            }
        }
        Ok((true, false))
    }

    fn accept(&mut self) -> Result<Step> {
        let landing = match self.landing.take() {
            Some(buffer) => Some(buffer),
            None => self.buffer(&self.large)?,
        };
        let Some(mut landing) = landing else { return Ok(Step::OutOfBuffers) };
        if self.small_landing.is_none() && self.expects_small {
            self.small_landing = self.buffer(&self.small)?;
        }
        let mut small = if self.expects_small { self.small_landing.take() } else { None };
        let mut head = [0; wire::WRITE_HEADER_BYTES];
        let read = match &mut small {
            // What the small buffer cannot hold lands where it belongs in the large one.
            Some(small) => {
                let rest = &mut landing.as_mut_slice()[SMALL_BYTES..];
                self.device.read_request(&mut head, small.as_mut_slice(), rest)
            }
            None => self.device.read_request(&mut head, landing.as_mut_slice(), &mut []),
        };
        let total = match read {
            Ok(total) => total,
            Err(error) => {
                self.landing = Some(landing);
                self.small_landing = small.or(self.small_landing.take());
                return match (error.kind(), error.raw_os_error()) {
                    (io::ErrorKind::WouldBlock, _) => Ok(Step::Nothing),
                    (_, Some(libc::ENODEV)) => Ok(Step::Unmounted),
                    _ => Err(Error::io(ErrorKind::Device, "read a request", error).at_path("/dev/fuse")),
                };
            }
        };
        // The kernel never sends an empty request: a closed peer does.
        if total == 0 {
            return Ok(Step::Unmounted);
        }
        let landing = match small {
            Some(small) if total <= head.len() + SMALL_BYTES => {
                self.landing = Some(landing);
                small
            }
            Some(small) => {
                landing.as_mut_slice()[..SMALL_BYTES].copy_from_slice(small.as_slice());
                self.small_landing = Some(small);
                landing
            }
            None => landing,
        };
        match wire::decode(&head, landing.as_slice(), total) {
            Ok((header, Operation::Write { offset, size })) => {
                self.write(header.unique, offset, size, landing)?;
            }
            Ok((header, operation)) => {
                self.keep_landing(landing);
                self.handle(header, operation)?;
            }
            Err(WireError::Arguments(unique)) => {
                self.keep_landing(landing);
                self.fail(unique, libc::EINVAL)?;
            }
            Err(WireError::Broken) => {
                return Err(Error::new(
                    ErrorKind::Device,
                    format!("the kernel sent {total} bytes that are no FUSE request"),
                )
                .at_path("/dev/fuse"));
            }
        }
        Ok(Step::Handled)
    }

    /// Keeps a buffer that holds nothing any more for the next request.
    fn keep_landing(&mut self, buffer: IoBuf) {
        if buffer.len() == SMALL_BYTES {
            self.small_landing = Some(buffer);
        } else {
            self.landing = Some(buffer);
        }
    }

    fn buffer(&self, pool: &BufferPool) -> Result<Option<IoBuf>> {
        pool.try_take().map_err(|cause| Error::io(ErrorKind::Memory, "allocate a transfer buffer", cause))
    }

    /// A buffer of at least `len` bytes, the small kind first where it does.
    fn buffer_for(&mut self, len: usize) -> Result<Option<IoBuf>> {
        if len <= SMALL_BYTES {
            let small = self.buffer(&self.small)?.or_else(|| self.small_landing.take());
            if small.is_some() {
                return Ok(small);
            }
        }
        match self.buffer(&self.large)? {
            Some(buffer) => Ok(Some(buffer)),
            None => Ok(self.landing.take()),
        }
    }

    fn disk_extent(&self) -> Extent {
        Extent::between(0, self.shared.disk.size_bytes())
    }

    /// The part of a request that lies on the disk; `None` when its end does not fit 64 bits.
    fn on_disk(&self, offset: u64, len: u64) -> Option<Extent> {
        Extent::new(offset, len).map(|extent| extent.clip(&self.disk_extent()))
    }

    fn handle(&mut self, header: wire::Header, operation: Operation) -> Result<()> {
        let unique = header.unique;
        let of_the_file = header.node == wire::ROOT_NODE;
        match operation {
            Operation::Silent | Operation::Destroy => Ok(()),
            Operation::Init(offer) => self.init(unique, &offer),
            Operation::Statistics => self.statistics(unique),
            Operation::Unknown => self.fail(unique, libc::ENOSYS),
            _ if !of_the_file => self.fail(unique, libc::ENOENT),
            Operation::GetAttributes => self.attributes(unique),
            Operation::SetAttributes { valid, size } => {
                let resize = valid & wire::ATTRIBUTE_SIZE != 0 && size != self.shared.disk.size_bytes();
                if resize || valid & wire::ATTRIBUTE_OWNERSHIP != 0 {
                    self.fail(unique, libc::EPERM)
                } else {
                    self.attributes(unique)
                }
            }
            Operation::Open => self.answer(unique, &wire::open_reply()),
            Operation::Flush | Operation::Release => self.answer(unique, &[]),
            Operation::Read { offset, size } => self.read(unique, offset, size),
            Operation::Sync => {
                self.unbuffered += 1;
                self.submit(Active::Sync { unique }, Op::Flush, Extent::between(0, 0), None);
                Ok(())
            }
            Operation::Allocate { offset, length, mode } => self.allocate(unique, offset, length, mode),
            Operation::Seek { offset, whence } => match self.seek(offset, whence) {
                Ok(found) => self.answer(unique, &wire::seek_reply(found)),
                Err(errno) => self.fail(unique, errno),
            },
            // Its payload lies in the landing buffer, which the caller handles.
            Operation::Write { .. } => self.fail(unique, libc::EIO),
        }
    }

    fn init(&self, unique: u64, offer: &wire::Offer) -> Result<()> {
        let Some(agreement) = Agreement::with(offer) else {
            self.fail(unique, libc::EPROTO)?;
            return Err(Error::new(
                ErrorKind::Device,
                format!("the kernel speaks FUSE {}.{}, which is too old", offer.major, offer.minor),
            )
            .at_path("/dev/fuse"));
        };
        self.shared.survivor.set_agreement(&agreement)?;
        self.answer(unique, &wire::init_reply(&agreement))
    }

    fn attributes(&self, unique: u64) -> Result<()> {
        let disk = &self.shared.disk;
        let used = disk.chain().allocated_clusters().saturating_mul(disk.cluster_bytes());
        self.answer(
            unique,
            &wire::attributes_reply(&wire::Attributes {
                size: disk.size_bytes(),
                blocks: used / SECTOR_BYTES,
                permissions: self.shared.permissions,
                user: nix::unistd::geteuid().as_raw(),
                group: nix::unistd::getegid().as_raw(),
                block_bytes: 4096,
            }),
        )
    }

    fn statistics(&self, unique: u64) -> Result<()> {
        let disk = &self.shared.disk;
        // Discards of less than a cluster free nothing.
        let block = u32::try_from(disk.cluster_bytes()).unwrap_or(1 << 20).max(512);
        let blocks = disk.size_bytes().div_ceil(u64::from(block));
        let free = blocks.saturating_sub(disk.chain().allocated_clusters());
        self.answer(unique, &wire::statistics_reply(blocks, free, block))
    }

    fn read(&mut self, unique: u64, offset: u64, size: u32) -> Result<()> {
        let size = size.min(wire::TRANSFER_BYTES_MAX);
        match self.on_disk(offset, u64::from(size)) {
            Some(extent) if !extent.is_empty() => {
                if let Some(unready) = self.start_read(unique, extent)? {
                    self.parked = Some((unique, unready));
                }
                Ok(())
            }
            _ => self.answer(unique, &[]),
        }
    }

    /// Starts a read, widened to whole sectors; gives the extent back when there is no buffer.
    fn start_read(&mut self, unique: u64, extent: Extent) -> Result<Option<Extent>> {
        let whole = extent.widen(SECTOR_BYTES, self.shared.disk.size_bytes());
        let (Ok(len), Ok(skip), Ok(size)) = (
            usize::try_from(whole.len()),
            usize::try_from(extent.start() - whole.start()),
            usize::try_from(extent.len()),
        ) else {
            self.fail(unique, libc::EINVAL)?;
            return Ok(None);
        };
        let Some(mut buffer) = self.buffer_for(len)? else { return Ok(Some(extent)) };
        buffer.truncate(len);
        self.submit(Active::Read { unique, skip, size }, Op::Read, whole, Some(buffer));
        Ok(None)
    }

    /// Starts a write of what lies in `payload`, a whole landing buffer of either size.
    fn write(&mut self, unique: u64, offset: u64, size: u32, mut payload: IoBuf) -> Result<()> {
        if self.shared.disk.is_read_only() {
            self.keep_landing(payload);
            return self.fail(unique, libc::EROFS);
        }
        let extent = self.on_disk(offset, u64::from(size)).filter(|extent| !extent.is_empty());
        let fitting =
            extent.and_then(|extent| Some((extent, usize::try_from(extent.len()).ok()?, extent.len())));
        let Some((extent, len, written)) = fitting else {
            self.keep_landing(payload);
            return if size == 0 {
                self.answer(unique, &wire::write_reply(0))
            } else {
                self.fail(unique, libc::ENOSPC)
            };
        };
        self.expects_small = len <= SMALL_BYTES;
        let is_large = payload.len() > SMALL_BYTES;
        let small = if self.expects_small && is_large { self.buffer(&self.small)? } else { None };
        let buffer = match small {
            Some(mut copy) => {
                copy.truncate(len);
                copy.as_mut_slice().copy_from_slice(&payload.as_slice()[..len]);
                self.landing = Some(payload);
                copy
            }
            None => {
                payload.truncate(len);
                payload
            }
        };
        let size = u32::try_from(written).unwrap_or(size);
        self.submit(Active::Write { unique, size }, Op::Write { fua: false }, extent, Some(buffer));
        Ok(())
    }

    fn allocate(&mut self, unique: u64, offset: u64, length: u64, mode: u32) -> Result<()> {
        let may_unmap = match mode {
            // Whoever punches a file relies on zeros afterwards: this is more than a hint.
            wire::ALLOCATE_PUNCH => true,
            wire::ALLOCATE_ZERO => false,
            _ => return self.fail(unique, libc::EOPNOTSUPP),
        };
        if self.shared.disk.is_read_only() {
            return self.fail(unique, libc::EROFS);
        }
        match self.on_disk(offset, length) {
            None => self.fail(unique, libc::EFBIG),
            Some(extent) if extent.is_empty() => self.answer(unique, &[]),
            Some(extent) => {
                self.unbuffered += 1;
                self.zero_step(unique, extent, may_unmap);
                Ok(())
            }
        }
    }

    fn zero_step(&mut self, unique: u64, extent: Extent, may_unmap: bool) {
        // Steps end at multiples, so that whole clusters stay whole.
        let next = (extent.start() - extent.start() % ZERO_STEP_BYTES).saturating_add(ZERO_STEP_BYTES);
        let (step, rest) = extent.split(next);
        let op = Op::WriteZeroes { fua: false, may_unmap };
        self.submit(Active::Zero { unique, rest, may_unmap }, op, step, None);
    }

    /// The next data or hole at or after `offset`. After many steps the safe answers: data here, no hole.
    fn seek(&self, offset: u64, whence: u32) -> std::result::Result<u64, i32> {
        let size = self.shared.disk.size_bytes();
        if whence != wire::SEEK_DATA && whence != wire::SEEK_HOLE {
            return Err(libc::EINVAL);
        }
        let mut at = offset;
        for _ in 0..SEEK_STEPS_MAX {
            if at >= size {
                break;
            }
            let (is_data, len) = match self.shared.disk.chain().map(GuestOffset(at), size - at) {
                Mapping::Data { len, .. } => (true, len),
                Mapping::Zero { len } => (false, len),
            };
            if is_data == (whence == wire::SEEK_DATA) {
                return Ok(at);
            }
            at = at.saturating_add(len.max(1));
        }
        match whence {
            _ if offset >= size => Err(libc::ENXIO),
            wire::SEEK_HOLE => Ok(size),
            _ if at >= size => Err(libc::ENXIO),
            _ => Ok(at),
        }
    }

    fn submit(&mut self, active: Active, op: Op, extent: Extent, buffer: Option<IoBuf>) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.active.push(None);
            self.active.len() - 1
        });
        self.active[index] = Some(active);
        self.queue.submit(Request { id: index as u64, op, extent, buffer });
    }

    fn complete(&mut self, completion: Completion) -> Result<()> {
        let index = usize::try_from(completion.id).ok().filter(|&index| index < self.active.len());
        let Some((index, active)) = index.and_then(|index| Some((index, self.active[index].take()?))) else {
            return Err(Error::new(ErrorKind::System, "the disk's queue completed an unknown request"));
        };
        self.free.push(index);
        self.starved = false;
        let errno = completion.result.err();
        match active {
            Active::Read { unique, skip, size } => match (errno, &completion.buffer) {
                (None, Some(buffer)) => match buffer.as_slice().get(skip..skip + size) {
                    Some(bytes) => self.answer(unique, bytes),
                    None => self.fail(unique, libc::EIO),
                },
                (errno, _) => self.fail(unique, errno.unwrap_or(libc::EIO)),
            },
            Active::Write { unique, size } => match errno {
                None => self.answer(unique, &wire::write_reply(size)),
                Some(errno) => self.fail(unique, errno),
            },
            Active::Sync { unique } => {
                self.unbuffered -= 1;
                match errno {
                    None => self.answer(unique, &[]),
                    // The kernel takes this one for "there is nothing to sync, ever".
                    Some(libc::ENOSYS) => self.fail(unique, libc::EIO),
                    Some(errno) => self.fail(unique, errno),
                }
            }
            Active::Zero { unique, rest, may_unmap } => {
                if errno.is_none() && !rest.is_empty() {
                    self.zeroing.push_back((unique, rest, may_unmap));
                    return Ok(());
                }
                self.unbuffered -= 1;
                match errno {
                    None => self.answer(unique, &[]),
                    Some(errno) => self.fail(unique, errno),
                }
            }
        }
    }

    /// Starts what waited for a buffer or for its turn.
    fn continue_waiting(&mut self) -> Result<()> {
        for (unique, rest, may_unmap) in std::mem::take(&mut self.zeroing) {
            self.zero_step(unique, rest, may_unmap);
        }
        if let Some((unique, extent)) = self.parked.take() {
            self.parked = self.start_read(unique, extent)?.map(|unready| (unique, unready));
        }
        Ok(())
    }

    fn answer(&self, unique: u64, body: &[u8]) -> Result<()> {
        self.reply(unique, 0, body)
    }

    fn fail(&self, unique: u64, errno: i32) -> Result<()> {
        self.reply(unique, errno, &[])
    }

    fn reply(&self, unique: u64, errno: i32, body: &[u8]) -> Result<()> {
        let header = wire::reply_header(unique, errno, body.len())
            .ok_or_else(|| Error::new(ErrorKind::System, "a reply is too long"))?;
        match self.device.write_reply(&header, body) {
            Ok(()) => Ok(()),
            // The mount has gone, and with it whoever waited; reading will say so, too.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOTCONN)) => Ok(()),
            Err(error) => Err(Error::io(ErrorKind::Device, "answer a request", error).at_path("/dev/fuse")),
        }
    }
}

/// Makes the pool take all its memory now: later there may be none.
fn preallocate(pool: &BufferPool) -> io::Result<()> {
    let mut all = Vec::new();
    while let Some(mut buffer) = pool.try_take()? {
        for page in buffer.as_mut_slice().chunks_mut(4096) {
            page[0] = 0;
        }
        all.push(buffer);
    }
    Ok(())
}
