//! The receiver's read-back: what was written is read again, from where it is stored, and must fit the digest it came
//! with.
//!
//! One thread trails the writes of the running pass. What it has to remember is the header of each frame, in a bounded
//! queue. A pass ends only when all of it has been read back ([`Verifier::barrier`]), so nothing is ever compared with
//! the digest of an older or newer content of the same place: inside a pass no place is written twice.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ploop_core::io::BufferPool;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::pass;
use crate::source::Reader;
use crate::wire::{Header, Kind};
use crate::work::Work;

/// Frames that may wait to be read back.
const QUEUE_FRAMES: usize = 4096;
/// Reads under way at once.
const READS_MAX: usize = 8;

enum Task {
    Frame(Header),
    Barrier(SyncSender<u64>),
}

/// The thread that reads back.
pub(crate) struct Verifier {
    queue: Option<SyncSender<Task>>,
    thread: Option<JoinHandle<()>>,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Verifier {
    /// Starts the thread; no frame has more than `payload_bytes_max` bytes. What is read back is a step of `work`.
    pub(crate) fn start(reader: Box<dyn Reader>, payload_bytes_max: usize, work: &Work) -> Result<Self> {
        let (queue, tasks) = mpsc::sync_channel(QUEUE_FRAMES);
        let failure = Arc::new(Mutex::new(None));
        let (shared, work) = (Arc::clone(&failure), work.clone());
        let thread = pass::spawn("pcopy-verify", move || {
            let pool = BufferPool::new(payload_bytes_max, READS_MAX);
            let mut reading =
                ReadBack { reader, pool, waiting: HashMap::new(), next_token: 0, verified_bytes: 0, work };
            if let Err(error) = reading.run(&tasks) {
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        })?;
        Ok(Self { queue: Some(queue), thread: Some(thread), failure })
    }

    fn push(&self, task: Task) -> Result<()> {
        let sent = self.queue.as_ref().is_some_and(|queue| queue.send(task).is_ok());
        if sent { Ok(()) } else { Err(self.failure()) }
    }

    fn failure(&self) -> Error {
        // The thread closes its queue a moment before it leaves its reason.
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failure.unwrap_or_else(|| Error::new(ErrorKind::System, "a thread of the copy ended"))
    }

    /// That frame has been applied: its range holds what its digest says.
    pub(crate) fn written(&self, header: Header) -> Result<()> {
        self.push(Task::Frame(header))
    }

    /// Waits until everything so far has been read back; returns how many bytes that were since the start.
    pub(crate) fn barrier(&self) -> Result<u64> {
        let (reached, wait) = mpsc::sync_channel(1);
        self.push(Task::Barrier(reached))?;
        wait.recv().map_err(|_| self.failure())
    }

    /// Ends the thread; what is not read back yet stays so.
    pub(crate) fn end(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // Its reason, if it failed, was taken or does not matter any more.
            let _ = thread.join();
        }
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.end();
    }
}

/// One read under way, or several for the parts of a zero range.
struct ReadBack {
    reader: Box<dyn Reader>,
    pool: BufferPool,
    waiting: HashMap<u64, (Header, Extent)>,
    next_token: u64,
    verified_bytes: u64,
    work: Work,
}

impl ReadBack {
    fn run(&mut self, tasks: &Receiver<Task>) -> Result<()> {
        loop {
            let next = match tasks.try_recv() {
                Ok(next) => next,
                Err(TryRecvError::Disconnected) => return self.finish_all(),
                Err(TryRecvError::Empty) if self.reader.in_flight() > 0 => {
                    self.finish_one()?;
                    continue;
                }
                Err(TryRecvError::Empty) => match tasks.recv() {
                    Ok(next) => next,
                    Err(_) => return Ok(()),
                },
            };
            match next {
                Task::Frame(header) => self.frame(&header)?,
                Task::Barrier(reached) => {
                    self.finish_all()?;
                    // Who asked may have given up.
                    let _ = reached.send(self.verified_bytes);
                }
            }
        }
    }

    fn frame(&mut self, header: &Header) -> Result<()> {
        let range = Extent::between(header.offset, header.offset.saturating_add(header.extent));
        if header.kind == Kind::Data {
            return self.submit(header, range);
        }
        // What the map of the copy says is zero needs no reading.
        let mut at = range.start();
        while let Some(data) =
            self.reader.next_data(at)?.map(|data| data.clip(&range)).filter(|data| !data.is_empty())
        {
            for piece in data.pieces(self.pool.buffer_bytes() as u64) {
                self.submit(header, piece)?;
            }
            at = data.end();
        }
        self.verified_bytes += range.len();
        Ok(())
    }

    fn submit(&mut self, header: &Header, extent: Extent) -> Result<()> {
        while self.reader.in_flight() >= READS_MAX {
            self.finish_one()?;
        }
        let buffer =
            self.pool.try_take().map_err(|error| Error::io(ErrorKind::Memory, "take a buffer", error))?;
        let mut buffer =
            buffer.ok_or_else(|| Error::new(ErrorKind::Memory, "no buffer to read back with"))?;
        buffer.truncate(usize::try_from(extent.len()).unwrap_or(usize::MAX));
        let token = self.next_token;
        self.next_token += 1;
        self.waiting.insert(token, (*header, extent));
        self.reader.submit(token, extent.start(), buffer)
    }

    fn finish_all(&mut self) -> Result<()> {
        while self.reader.in_flight() > 0 {
            self.finish_one()?;
        }
        Ok(())
    }

    fn finish_one(&mut self) -> Result<()> {
        let lost = || Error::new(ErrorKind::Read, "a read of the copy was lost");
        let (token, buffer) = self.reader.finish()?.ok_or_else(lost)?;
        self.work.step();
        let (header, extent) = self.waiting.remove(&token).ok_or_else(lost)?;
        let is_equal = match header.kind {
            Kind::Data => header.check(buffer.as_slice()).is_ok(),
            _ => buffer.is_zero(),
        };
        if !is_equal {
            return Err(Error::new(
                ErrorKind::Write,
                format!("read back the copy: {extent} differs from what was written"),
            )
            .advise("the storage of the copy is not to be trusted: check its disk, cables and memory"));
        }
        if header.kind == Kind::Data {
            self.verified_bytes += extent.len();
        }
        Ok(())
    }
}
