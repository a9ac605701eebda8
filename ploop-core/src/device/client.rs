//! A blocking client of a disk, for tools, tests and the copy.
//!
//! It drives one [`Queue`] in the caller's thread. Simple calls block until their own request has ended; with
//! [`Client::submit`] and [`Client::next_completion`] several are in flight. Large transfers are cut into pieces that are
//! in flight together.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Completion, Destination, Disk, Op, Queue, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::io::{IoBuf, IoQueue, Wait};
use crate::units::GuestCluster;

/// Bytes per request of a large write.
const PIECE_BYTES: usize = 1 << 20;
/// Requests of a large write in flight.
const PIECES_MAX: usize = 8;

/// A blocking client with one queue.
pub struct Client {
    queue: Queue,
    next_id: u64,
    completions: VecDeque<Completion>,
    batch: Vec<Completion>,
}

impl Client {
    /// A client of `disk` that moves data with `io`.
    pub fn new(disk: &Arc<Disk>, io: Box<dyn IoQueue>) -> Result<Self> {
        Ok(Self { queue: disk.queue(io)?, next_id: 0, completions: VecDeque::new(), batch: Vec::new() })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        self.queue.disk()
    }

    /// The queue, for what the client does not offer. Requests submitted to it directly would have ids that the client
    /// also uses: submit through the client.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Requests submitted whose completion was not fetched.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight() + self.completions.len()
    }

    /// Submits a request and returns its id; the completion comes from [`next_completion`](Self::next_completion).
    pub fn submit(&mut self, op: Op, extent: Extent, buffer: Option<IoBuf>) -> u64 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.queue.submit(Request { id, op, extent, buffer });
        id
    }

    /// The next request that has ended; waits for it. `None` when none is in flight.
    pub fn next_completion(&mut self) -> Result<Option<Completion>> {
        while self.completions.is_empty() {
            if self.queue.in_flight() == 0 {
                return Ok(None);
            }
            self.run(Wait::Yes)?;
        }
        Ok(self.completions.pop_front())
    }

    fn run(&mut self, wait: Wait) -> Result<()> {
        // Without a thread of its own the flusher is stepped by whoever waits.
        let wait = if self.disk().is_manual() && self.disk().step_flusher() { Wait::No } else { wait };
        let run = self.queue.run(wait, &mut self.batch);
        self.completions.extend(self.batch.drain(..));
        run.map(drop).map_err(|cause| Error::io(ErrorKind::System, "wait for requests of a disk", cause))
    }

    /// Waits for one request; completions of others are kept for [`next_completion`](Self::next_completion).
    pub fn wait_for(&mut self, id: u64) -> Result<Completion> {
        loop {
            if let Some(at) = self.completions.iter().position(|completion| completion.id == id)
                && let Some(completion) = self.completions.remove(at)
            {
                return Ok(completion);
            }
            if self.queue.in_flight() == 0 {
                return Err(Error::new(
                    ErrorKind::System,
                    format!("wait for request {id}: it is not in flight"),
                ));
            }
            self.run(Wait::Yes)?;
        }
    }

    fn finish(&mut self, id: u64, kind: ErrorKind, operation: &str, extent: Extent) -> Result<Option<IoBuf>> {
        let completion = self.wait_for(id)?;
        match completion.result {
            Ok(()) => Ok(completion.buffer),
            Err(errno) => {
                let cause = std::io::Error::from_raw_os_error(errno);
                Err(Error::io(kind, format!("{operation} {extent}"), cause)
                    .at_cluster(extent.start() / self.disk().cluster_bytes()))
            }
        }
    }

    /// Reads an extent.
    pub fn read(&mut self, extent: Extent) -> Result<IoBuf> {
        let buffer = usize::try_from(extent.len())
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))
            .and_then(IoBuf::try_zeroed)
            .map_err(|cause| Error::io(ErrorKind::Memory, format!("read {extent}: no memory"), cause))?;
        self.read_into(extent, buffer)
    }

    /// Reads an extent into a buffer of its length.
    pub fn read_into(&mut self, extent: Extent, buffer: IoBuf) -> Result<IoBuf> {
        let id = self.submit(Op::Read, extent, Some(buffer));
        let buffer = self.finish(id, ErrorKind::Read, "read", extent)?;
        buffer.ok_or_else(|| Error::new(ErrorKind::Read, format!("read {extent}: the buffer was lost")))
    }

    /// Writes `bytes` at guest byte `offset`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_pieces(offset, bytes, Op::Write { fua: false })
    }

    /// Writes `bytes` at guest byte `offset` and returns once they are durable.
    pub fn write_fua(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_pieces(offset, bytes, Op::Write { fua: true })
    }

    fn write_pieces(&mut self, offset: u64, bytes: &[u8], op: Op) -> Result<()> {
        let mut in_flight: VecDeque<(u64, Extent)> = VecDeque::new();
        let mut result = Ok(());
        let mut at = offset;
        for piece in bytes.chunks(PIECE_BYTES) {
            let extent = Extent::new(at, piece.len() as u64)
                .ok_or_else(|| Error::new(ErrorKind::Parameter, format!("write at {at}: past 64 bits")))?;
            at = extent.end();
            match IoBuf::try_copy_of(piece) {
                Ok(buffer) => in_flight.push_back((self.submit(op, extent, Some(buffer)), extent)),
                Err(cause) => {
                    result = Err(Error::io(ErrorKind::Memory, format!("write {extent}: no memory"), cause));
                }
            }
            if in_flight.len() >= PIECES_MAX
                && let Some((id, extent)) = in_flight.pop_front()
            {
                result = result.and(self.finish(id, ErrorKind::Write, "write", extent).map(drop));
            }
            if result.is_err() {
                break;
            }
        }
        for (id, extent) in in_flight {
            result = result.and(self.finish(id, ErrorKind::Write, "write", extent).map(drop));
        }
        result
    }

    /// Writes a buffer at guest byte `offset` as one request and gives it back.
    pub fn write_buffer(&mut self, offset: u64, buffer: IoBuf) -> Result<Option<IoBuf>> {
        let extent = Extent::new(offset, buffer.len() as u64)
            .ok_or_else(|| Error::new(ErrorKind::Parameter, format!("write at {offset}: past 64 bits")))?;
        let id = self.submit(Op::Write { fua: false }, extent, Some(buffer));
        self.finish(id, ErrorKind::Write, "write", extent)
    }

    /// Makes an extent read as zeros; host space is given back where that is possible and `may_unmap`.
    pub fn write_zeroes(&mut self, extent: Extent, may_unmap: bool) -> Result<()> {
        let id = self.submit(Op::WriteZeroes { fua: false, may_unmap }, extent, None);
        self.finish(id, ErrorKind::Write, "write zeros to", extent).map(drop)
    }

    /// Gives host space back; the extent reads as zeros.
    pub fn discard(&mut self, extent: Extent) -> Result<()> {
        let id = self.submit(Op::Discard, extent, None);
        self.finish(id, ErrorKind::Write, "discard", extent).map(drop)
    }

    /// Moves a cluster to another place in the top's file; whether it lies in such a place now. It does not when the top
    /// lacks it, or no such place is free.
    pub fn relocate(&mut self, cluster: GuestCluster, to: Destination) -> Result<bool> {
        let extent = self.disk().chain().geometry().cluster_extent(cluster);
        let id = self.submit(Op::Relocate(to), extent, None);
        self.finish(id, ErrorKind::Relocation, "move", extent)?;
        Ok(self.disk().chain().place_of(cluster).is_some_and(|place| to.contains(place)))
    }

    /// Makes everything durable that was answered before.
    pub fn flush(&mut self) -> Result<()> {
        let id = self.submit(Op::Flush, Extent::between(0, 0), None);
        self.finish(id, ErrorKind::Sync, "flush", Extent::between(0, 0)).map(drop)
    }
}
