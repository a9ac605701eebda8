//! The sender's data path: reads, hashing and the pipe overlap.
//!
//! ```text
//!   phases' thread          hashing thread        writing thread
//!   walk → reads → zeros? ──► number, digest, ──► credit, batch ──► pipe
//!   (up to 16 in flight)      transcript
//! ```
//!
//! Queues between them are bounded and all payloads live in one [`BufferPool`], so memory is bounded whatever the
//! pipe does. Frames leave in the order of the walk, which ascends inside a pass. When a thread fails it records the
//! reason in the [`Exchange`] and ends; its queues close and the failure walks back to the phases.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop_core::io::buffer::is_zero;
use ploop_core::io::{BufferPool, IoBuf};
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::exchange::{Exchange, Grant};
use crate::source::{Loan, Reader, Source};
use crate::transport::{self, Cancel, Transport};
use crate::wire::{self, EndDelta, Header, Kind, Seal, Transcript};

/// The longest payload sent, and the size of every buffer.
pub(crate) const FRAME_BYTES: u64 = 512 << 10;
/// Buffers of a sender: 48 MiB.
const BUFFERS: usize = 96;
/// Reads under way at once.
const READS_MAX: usize = 16;
/// Zeros are looked for in runs of this size.
const ZERO_RUN_BYTES: usize = 64 << 10;
/// The most taken from the tracker in one loan.
const LOAN_BYTES: u64 = 16 << 20;
/// The most loans held for one `EndPass`: about 32 MiB of memory.
const LOANS_MAX: usize = 1 << 18;
/// Small frames are gathered to this size before they are written.
const BATCH_BYTES: usize = 128 << 10;
/// Payloads up to this size are copied into the batch.
const BATCHED_BYTES_MAX: usize = 16 << 10;
/// Frames between two threads.
const QUEUE_FRAMES: usize = 32;
/// How long the writing thread may take for an abort.
const ABORT_PATIENCE: Duration = Duration::from_secs(3);

/// What a pass has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) frames: u64,
    pub(crate) wire_bytes: u64,
}

impl Counts {
    fn add(&mut self, data_bytes: u64, zero_bytes: u64) {
        self.data_bytes += data_bytes;
        self.zero_bytes += zero_bytes;
        self.frames += 1;
        self.wire_bytes += wire::HEADER_BYTES as u64 + data_bytes;
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.data_bytes += other.data_bytes;
        self.zero_bytes += other.zero_bytes;
        self.frames += other.frames;
        self.wire_bytes += other.wire_bytes;
    }

    /// What came on top of `earlier`, an earlier state of the same figures.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            data_bytes: self.data_bytes - earlier.data_bytes,
            zero_bytes: self.zero_bytes - earlier.zero_bytes,
            frames: self.frames - earlier.frames,
            wire_bytes: self.wire_bytes - earlier.wire_bytes,
        }
    }
}

/// On its way to the pipe.
enum Outgoing {
    Data(Extent, IoBuf),
    Zero(Extent),
    Control(Kind, Vec<u8>),
    /// Everything of a frozen delta: the hashing thread knows its transcript.
    EndDelta(u32),
    /// Everything so far: the hashing thread knows the transcript.
    Seal(u64),
    Barrier(SyncSender<()>),
}

enum Payload {
    None,
    Small(Vec<u8>),
    Data(IoBuf),
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Small(bytes) => bytes,
            Self::Data(buffer) => buffer.as_slice(),
        }
    }
}

enum Hashed {
    Frame(Header, Payload),
    Barrier(SyncSender<()>),
}

/// The hashing and the writing thread, seen from the phases.
pub(crate) struct Outlet {
    queue: Option<SyncSender<Outgoing>>,
    threads: Vec<JoinHandle<()>>,
    exchange: Arc<Exchange>,
    stop: Cancel,
}

impl Outlet {
    /// Starts both threads. `stop` is one of the transport's cancels.
    pub(crate) fn start(
        transport: Transport,
        exchange: &Arc<Exchange>,
        stop: &Cancel,
        keepalive: Duration,
    ) -> Result<Self> {
        let (queue, outgoing) = mpsc::sync_channel(QUEUE_FRAMES);
        let (hashed_queue, hashed) = mpsc::sync_channel(QUEUE_FRAMES);
        let mut outlet = Self {
            queue: Some(queue),
            threads: Vec::new(),
            exchange: Arc::clone(exchange),
            stop: stop.clone(),
        };
        let hash_exchange = Arc::clone(exchange);
        outlet.spawn("pcopy-hash", move || hash(&outgoing, &hashed_queue, &hash_exchange))?;
        let exchange = Arc::clone(exchange);
        outlet.spawn("pcopy-write", move || {
            let batch = Vec::with_capacity(BATCH_BYTES * 2);
            let mut writer = FrameWriter { transport, batch, keepalive, is_complete: false };
            if let Err(error) = writer.run(&hashed, &exchange) {
                exchange.fail(transport::explain(ErrorKind::Write, "write the stream", error));
            }
        })?;
        Ok(outlet)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        self.threads.push(spawn(name, body)?);
        Ok(())
    }

    fn push(&self, item: Outgoing) -> Result<()> {
        let queue = self.queue.as_ref();
        let sent = queue.is_some_and(|queue| queue.send(item).is_ok());
        if sent { Ok(()) } else { Err(self.exchange.failure()) }
    }

    /// Sends a frame without a place on the disk.
    pub(crate) fn control(&self, kind: Kind, payload: Vec<u8>) -> Result<()> {
        self.push(Outgoing::Control(kind, payload))
    }

    /// Sends the end of the frozen delta with that number.
    pub(crate) fn end_delta(&self, index: u32) -> Result<()> {
        self.push(Outgoing::EndDelta(index))
    }

    /// Sends the seal.
    pub(crate) fn seal(&self, disk_bytes: u64) -> Result<()> {
        self.push(Outgoing::Seal(disk_bytes))
    }

    /// Waits until everything so far has been written to the pipe.
    pub(crate) fn barrier(&self) -> Result<()> {
        let (reached, wait) = mpsc::sync_channel(1);
        self.push(Outgoing::Barrier(reached))?;
        wait.recv().map_err(|_| self.exchange.failure())
    }

    /// Writes out what was pushed and ends the threads.
    pub(crate) fn close(mut self) -> Result<()> {
        self.join();
        self.exchange.check()
    }

    /// Sends nothing more but an abort, and ends the threads soon.
    pub(crate) fn abort(mut self, payload: Vec<u8>) {
        self.exchange.give_up(payload);
        self.queue = None;
        let end = Instant::now() + ABORT_PATIENCE;
        while Instant::now() < end && !self.threads.iter().all(JoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stop.cancel();
        self.join();
    }

    fn join(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.exchange.fail(Error::new(ErrorKind::System, "a thread of the copy failed"));
            }
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.stop.cancel();
            self.join();
        }
    }
}

/// Starts a named thread.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| Error::io(ErrorKind::System, "start a thread of the copy", error))
}

/// The hashing thread: numbers the frames, computes their digests and the transcript.
fn hash(outgoing: &Receiver<Outgoing>, hashed: &SyncSender<Hashed>, exchange: &Exchange) {
    let mut transcript = Transcript::default();
    let mut sequence = 0;
    let mut counts = Counts::default();
    // Of the present delta, from the frame that names it.
    let (mut delta, mut delta_sequence, mut before) = (Transcript::default(), 0, Counts::default());
    while let Ok(item) = outgoing.recv() {
        let frame = match item {
            Outgoing::Data(extent, buffer) => {
                counts.add(extent.len(), 0);
                (Kind::Data, extent, Payload::Data(buffer))
            }
            Outgoing::Zero(extent) => {
                counts.add(0, extent.len());
                (Kind::Zero, extent, Payload::None)
            }
            Outgoing::Control(kind, payload) => {
                if kind == Kind::Delta {
                    (delta, delta_sequence, before) = (Transcript::default(), sequence, counts);
                }
                (kind, Extent::between(0, 0), Payload::Small(payload))
            }
            Outgoing::EndDelta(index) => {
                let sent = counts.since(before);
                let end = EndDelta {
                    transcript: delta.digest(),
                    index,
                    frames: sequence - delta_sequence,
                    data_bytes: sent.data_bytes,
                    zero_bytes: sent.zero_bytes,
                };
                (Kind::EndDelta, Extent::between(0, 0), Payload::Small(end.encode()))
            }
            Outgoing::Seal(disk_bytes) => {
                let seal = Seal {
                    transcript: transcript.digest(),
                    disk_bytes,
                    frames: sequence,
                    data_bytes: counts.data_bytes,
                    zero_bytes: counts.zero_bytes,
                };
                exchange.tell_sealed(seal.transcript);
                (Kind::Seal, Extent::between(0, 0), Payload::Small(seal.encode()))
            }
            Outgoing::Barrier(reached) => {
                if hashed.send(Hashed::Barrier(reached)).is_err() {
                    return;
                }
                continue;
            }
        };
        let (kind, extent, payload) = frame;
        let Some(header) = Header::new(kind, sequence, extent.start(), extent.len(), payload.bytes()) else {
            exchange.fail(Error::new(ErrorKind::System, "a frame grew past its limit"));
            return;
        };
        sequence += 1;
        transcript.fold(&header);
        delta.fold(&header);
        if hashed.send(Hashed::Frame(header, payload)).is_err() {
            return;
        }
    }
}

/// The writing thread.
struct FrameWriter {
    transport: Transport,
    batch: Vec<u8>,
    keepalive: Duration,
    /// The last frame of the stream was written.
    is_complete: bool,
}

impl FrameWriter {
    fn run(&mut self, hashed: &Receiver<Hashed>, exchange: &Exchange) -> std::io::Result<()> {
        'frames: loop {
            let next = match hashed.try_recv() {
                Ok(next) => next,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    self.flush()?;
                    // Who has all it needs may have left already: a sign of life would fail there.
                    let patience = if self.is_complete { Duration::MAX } else { self.keepalive };
                    match hashed.recv_timeout(patience) {
                        Ok(next) => next,
                        Err(RecvTimeoutError::Timeout) => {
                            self.unnumbered(Kind::Keepalive, &[])?;
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
            };
            match next {
                Hashed::Barrier(reached) => {
                    self.flush()?;
                    // Who waits for it may have given up.
                    let _ = reached.send(());
                }
                Hashed::Frame(header, payload) => {
                    loop {
                        let patience = if self.batch.is_empty() { self.keepalive } else { Duration::ZERO };
                        match exchange.reserve(header.kind, header.frame_bytes(), patience) {
                            Grant::Send => break,
                            Grant::GiveUp => break 'frames,
                            Grant::Wait if self.batch.is_empty() => self.unnumbered(Kind::Keepalive, &[])?,
                            Grant::Wait => self.flush()?,
                        }
                    }
                    self.frame(&header, payload.bytes())?;
                    self.is_complete = exchange.is_last(header.kind);
                }
            }
        }
        self.flush()?;
        match exchange.abort() {
            Some(abort) => self.unnumbered(Kind::Abort, &abort),
            None => Ok(()),
        }
    }

    fn frame(&mut self, header: &Header, payload: &[u8]) -> std::io::Result<()> {
        if payload.len() <= BATCHED_BYTES_MAX {
            self.batch.extend_from_slice(&header.encode());
            self.batch.extend_from_slice(payload);
            if self.batch.len() >= BATCH_BYTES { self.flush() } else { Ok(()) }
        } else {
            self.batch.extend_from_slice(&header.encode());
            self.transport.write_both(&self.batch, payload)?;
            self.batch.clear();
            Ok(())
        }
    }

    fn unnumbered(&mut self, kind: Kind, payload: &[u8]) -> std::io::Result<()> {
        let frame = wire::encode_frame(kind, 0, payload).unwrap_or_default();
        self.transport.write_both(&frame, &[])
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if !self.batch.is_empty() {
            self.transport.write_both(&self.batch, &[])?;
            self.batch.clear();
        }
        Ok(())
    }
}

/// What to look at next.
pub(crate) enum Step {
    Read(Extent),
    Zero(Extent),
}

/// The order in which a pass looks at the disk.
pub(crate) enum Walk {
    /// Everything that the source itself holds.
    First { cursor: u64 },
    /// What the tracker says has changed.
    Dirty { cursor: u64, steps: VecDeque<Step>, loans: Vec<Box<dyn Loan>> },
}

impl Walk {
    pub(crate) fn first() -> Self {
        Self::First { cursor: 0 }
    }

    pub(crate) fn dirty(cursor: u64) -> Self {
        Self::Dirty { cursor, steps: VecDeque::new(), loans: Vec::new() }
    }

    /// Guest bytes before this have been looked at.
    pub(crate) fn cursor(&self) -> u64 {
        match self {
            Self::First { cursor } | Self::Dirty { cursor, .. } => *cursor,
        }
    }

    /// The loans of a dirty walk.
    pub(crate) fn into_loans(self) -> Vec<Box<dyn Loan>> {
        match self {
            Self::First { .. } => Vec::new(),
            Self::Dirty { loans, .. } => loans,
        }
    }

    /// Whether it stopped because it holds as many loans as it may.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Dirty { loans, .. } if loans.len() >= LOANS_MAX)
    }

    fn next(&mut self, source: &mut dyn Source, reader: &mut dyn Reader) -> Result<Option<Step>> {
        let is_full = self.is_full();
        match self {
            Self::First { cursor } => {
                let Some(data) = reader.next_own(*cursor)? else {
                    *cursor = source.size_bytes();
                    return Ok(None);
                };
                let data = data.clip(&Extent::between(*cursor, source.size_bytes()));
                let piece = data.pieces(FRAME_BYTES).next();
                *cursor = piece.map_or(*cursor, |piece| piece.end());
                Ok(piece.map(Step::Read))
            }
            Self::Dirty { cursor, steps, loans } => loop {
                if let Some(step) = steps.pop_front() {
                    return Ok(Some(step));
                }
                if is_full {
                    return Ok(None);
                }
                // The bits are taken first; only then is the map asked and are the bytes read (T2).
                let Some(loan) = source.take_dirty(*cursor, LOAN_BYTES) else { return Ok(None) };
                let extent = loan.extent();
                loans.push(loan);
                *cursor = extent.end();
                split_dirty(extent, reader, steps)?;
            },
        }
    }
}

/// What holds data is read in pieces; the rest is zero by the map.
fn split_dirty(extent: Extent, reader: &mut dyn Reader, steps: &mut VecDeque<Step>) -> Result<()> {
    let mut at = extent.start();
    while at < extent.end() {
        let rest = Extent::between(at, extent.end());
        let data =
            reader.next_data(at)?.map_or(Extent::between(rest.end(), rest.end()), |data| data.clip(&rest));
        let data = if data.is_empty() { Extent::between(rest.end(), rest.end()) } else { data };
        if at < data.start() {
            steps.push_back(Step::Zero(Extent::between(at, data.start())));
        }
        steps.extend(data.pieces(FRAME_BYTES).map(Step::Read));
        at = data.end();
    }
    Ok(())
}

/// A read on its way, or what came of it, in the order of the walk.
enum Slot {
    Waiting(Extent),
    Full(Extent, IoBuf),
    Zero(Extent),
}

/// Reads what a walk says and hands it to the outlet.
pub(crate) struct PassReader<'a> {
    pub(crate) source: &'a mut dyn Source,
    pub(crate) reader: &'a mut dyn Reader,
    pub(crate) outlet: &'a Outlet,
    pub(crate) pool: &'a BufferPool,
    /// Zeros need not be sent: the receiver has never been sent these places (T5).
    pub(crate) skip_zeros: bool,
    pub(crate) counts: Counts,
    pending_zero: Option<Extent>,
    slots: VecDeque<Slot>,
    /// Token of the first slot.
    first_token: u64,
}

/// The buffers of a sender.
pub(crate) fn buffer_pool() -> BufferPool {
    BufferPool::new(usize::try_from(FRAME_BYTES).unwrap_or(usize::MAX), BUFFERS)
}

impl<'a> PassReader<'a> {
    pub(crate) fn new(
        source: &'a mut dyn Source,
        reader: &'a mut dyn Reader,
        outlet: &'a Outlet,
        pool: &'a BufferPool,
        skip_zeros: bool,
    ) -> Self {
        Self {
            source,
            reader,
            outlet,
            pool,
            skip_zeros,
            counts: Counts::default(),
            pending_zero: None,
            slots: VecDeque::new(),
            first_token: 0,
        }
    }

    /// Runs the walk to its end. `tick` is called after each piece with the counts and what is dirty now. After a
    /// failure the reads under way are still the reader's: it must not be used again.
    pub(crate) fn run(
        &mut self,
        walk: &mut Walk,
        mut tick: impl FnMut(&Counts, u64, &dyn Source) -> Result<()>,
    ) -> Result<()> {
        loop {
            while self.slots.len() < READS_MAX {
                match walk.next(self.source, self.reader)? {
                    None => break,
                    Some(Step::Zero(extent)) => self.slots.push_back(Slot::Zero(extent)),
                    Some(Step::Read(extent)) => self.submit(extent)?,
                }
            }
            while matches!(self.slots.front(), Some(Slot::Waiting(_))) {
                self.take_finished()?;
            }
            let (done, slot) = match self.slots.pop_front() {
                None => break,
                Some(slot @ (Slot::Full(extent, _) | Slot::Zero(extent) | Slot::Waiting(extent))) => {
                    (extent.end(), slot)
                }
            };
            self.first_token += 1;
            match slot {
                Slot::Full(extent, buffer) => self.send(extent, buffer)?,
                Slot::Zero(extent) => self.send_zero(extent)?,
                Slot::Waiting(_) => {}
            }
            tick(&self.counts, done, self.source)?;
        }
        self.flush_zero()
    }

    fn submit(&mut self, extent: Extent) -> Result<()> {
        let mut buffer =
            self.pool.take().map_err(|error| Error::io(ErrorKind::Memory, "take a buffer", error))?;
        buffer.truncate(usize::try_from(extent.len()).unwrap_or(usize::MAX));
        let token = self.first_token + self.slots.len() as u64;
        self.slots.push_back(Slot::Waiting(extent));
        self.reader.submit(token, extent.start(), buffer)
    }

    fn take_finished(&mut self) -> Result<()> {
        let lost = || Error::new(ErrorKind::Read, "a read of the source was lost");
        let (token, buffer) = self.reader.finish()?.ok_or_else(lost)?;
        let index = token.checked_sub(self.first_token).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.slots.get_mut(index)) {
            Some(slot @ Slot::Waiting(_)) => {
                if let Slot::Waiting(extent) = *slot {
                    *slot = Slot::Full(extent, buffer);
                }
                Ok(())
            }
            _ => Err(lost()),
        }
    }

    /// Sends what was read, its long runs of zeros as such.
    fn send(&mut self, extent: Extent, mut buffer: IoBuf) -> Result<()> {
        let mut at = extent.start();
        while !buffer.is_empty() {
            let mut runs =
                buffer.as_slice().chunks(ZERO_RUN_BYTES).map(|chunk| (chunk.len(), is_zero(chunk)));
            let (mut len, zero) = runs.next().unwrap_or((0, false));
            len += runs.take_while(|run| run.1 == zero).map(|run| run.0).sum::<usize>();
            let part = Extent::between(at, at + len as u64);
            let front = buffer.split_to(len);
            at = part.end();
            if zero {
                self.send_zero(part)?;
            } else {
                self.flush_zero()?;
                self.counts.add(part.len(), 0);
                self.outlet.push(Outgoing::Data(part, front))?;
            }
        }
        Ok(())
    }

    /// Remembers a zero range, joined with the one before it if they touch.
    fn send_zero(&mut self, extent: Extent) -> Result<()> {
        if self.skip_zeros {
            return Ok(());
        }
        match &mut self.pending_zero {
            Some(pending) if pending.end() == extent.start() => {
                *pending = Extent::between(pending.start(), extent.end());
            }
            _ => {
                self.flush_zero()?;
                self.pending_zero = Some(extent);
            }
        }
        Ok(())
    }

    fn flush_zero(&mut self) -> Result<()> {
        if let Some(extent) = self.pending_zero.take() {
            self.counts.add(0, extent.len());
            self.outlet.push(Outgoing::Zero(extent))?;
        }
        Ok(())
    }
}
