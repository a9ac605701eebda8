//! What is copied: the content of a chain, of one delta of it, or of a plain file.

use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::{Chain, Mapping};
use crate::io::{Storage, StorageExt};
use crate::units::{FileOffset, GuestOffset};

use super::Presence;

/// Guest bytes to be copied. Used from several threads.
pub(in crate::ops) trait Content: Sync {
    /// The first byte at or after `from` and below `end` from which on there may be something to copy.
    fn next_data(&self, from: u64, end: u64) -> Result<Option<u64>>;
    /// Fills `buffer` with the bytes at `at`.
    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<()>;
    /// What there is of a range.
    fn presence(&self, unit: Extent) -> Presence;
}

fn to_usize(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .map_err(|_| Error::new(ErrorKind::Memory, format!("read {bytes} bytes at once: too many")))
}

/// The content of a chain.
pub(in crate::ops) struct ChainContent {
    chain: Arc<Chain>,
    /// Only what the top delta holds.
    top_only: bool,
}

impl ChainContent {
    /// All that the guest sees.
    pub(in crate::ops) fn whole(chain: Arc<Chain>) -> Self {
        Self { chain, top_only: false }
    }

    /// What the top delta holds, completed from those below where a unit is held in part.
    pub(in crate::ops) fn of_top(chain: Arc<Chain>) -> Self {
        let top_only = chain.depth() > 1;
        Self { chain, top_only }
    }

    fn is_raw(&self, delta: usize) -> bool {
        self.chain.header(delta).is_none()
    }

    fn failed(&self, delta: usize, offset: u64, operation: &str, cause: io::Error) -> Error {
        Error::io(ErrorKind::Read, operation, cause).at_path(self.chain.name(delta)).at_offset(offset)
    }

    /// Clips a run of a raw file to what it really holds: `(start, len)`, both from the start of the run.
    fn data_in(&self, delta: usize, offset: FileOffset, len: u64) -> Result<Option<(u64, u64)>> {
        let end = offset.0.saturating_add(len);
        let found = self
            .chain
            .storage(delta)
            .next_data(offset.0)
            .map_err(|cause| self.failed(delta, offset.0, "look for data in a raw file", cause))?;
        Ok(found.filter(|&(start, _)| start < end).map(|(start, data_end)| {
            let start = start.max(offset.0);
            (start - offset.0, data_end.min(end).saturating_sub(start))
        }))
    }
}

impl Content for ChainContent {
    fn next_data(&self, from: u64, end: u64) -> Result<Option<u64>> {
        let mut at = from;
        while at < end {
            let mapping = self.chain.map(GuestOffset(at), end - at);
            if let Mapping::Data { delta, offset, len } = mapping
                && (!self.top_only || delta == self.chain.top())
            {
                if !self.is_raw(delta) {
                    return Ok(Some(at));
                }
                if let Some((skipped, _)) = self.data_in(delta, offset, len)? {
                    return Ok(Some(at + skipped));
                }
            }
            at = at.saturating_add(mapping.len());
        }
        Ok(None)
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        let end = at.saturating_add(buffer.len() as u64);
        let mut runs = Vec::new();
        let mut next = at;
        while next < end {
            let mapping = self.chain.map(GuestOffset(next), end - next);
            let len = mapping.len().min(end - next);
            let place = to_usize(next - at)?;
            match mapping {
                Mapping::Zero { .. } => buffer[place..place + to_usize(len)?].fill(0),
                Mapping::Data { delta, offset, .. } if self.is_raw(delta) => {
                    let mut done = 0;
                    while done < len {
                        let found = self.data_in(delta, FileOffset(offset.0 + done), len - done)?;
                        let (skipped, there) = found.unwrap_or((len - done, 0));
                        let hole = place + to_usize(done)?;
                        buffer[hole..hole + to_usize(skipped)?].fill(0);
                        done += skipped;
                        if there > 0 {
                            runs.push((delta, offset.0 + done, place + to_usize(done)?, to_usize(there)?));
                        }
                        done += there;
                    }
                }
                Mapping::Data { delta, offset, .. } => runs.push((delta, offset.0, place, to_usize(len)?)),
            }
            next = next.saturating_add(len);
        }
        // In the order of the files: what is scattered in the guest need not be on the host's disk.
        runs.sort_unstable();
        for (delta, offset, place, len) in runs {
            self.chain
                .storage(delta)
                .read_exact_at(offset, &mut buffer[place..place + len])
                .map_err(|cause| self.failed(delta, offset, "read guest data", cause))?;
        }
        Ok(())
    }

    fn presence(&self, unit: Extent) -> Presence {
        let mut at = unit.start();
        let (mut held, mut below) = (false, false);
        while at < unit.end() {
            let mapping = self.chain.map(GuestOffset(at), unit.end() - at);
            if let Mapping::Data { delta, .. } = mapping {
                held |= !self.top_only || delta == self.chain.top();
            }
            if self.top_only {
                let below_it = self.chain.map_below(GuestOffset(at), mapping.len());
                below |= matches!(below_it, Mapping::Data { .. }) || below_it.len() < mapping.len();
            }
            at = at.saturating_add(mapping.len());
        }
        match (held, below) {
            (false, _) => Presence::Absent,
            (true, false) => Presence::Alone,
            (true, true) => Presence::Over,
        }
    }
}

/// The bytes of a file as they are; holes are not read.
pub(in crate::ops) struct StorageContent<'a> {
    storage: &'a dyn Storage,
    len: u64,
}

impl<'a> StorageContent<'a> {
    /// The first `len` bytes; what the file lacks of them is zeros.
    pub(in crate::ops) fn new(storage: &'a dyn Storage, len: u64) -> Self {
        Self { storage, len }
    }
}

impl Content for StorageContent<'_> {
    fn next_data(&self, from: u64, end: u64) -> Result<Option<u64>> {
        let found = self.storage.next_data(from).map_err(|cause| {
            Error::io(ErrorKind::Read, "look for data in the input", cause).at_offset(from)
        })?;
        Ok(found.map(|(start, _)| start.max(from)).filter(|&start| start < end.min(self.len)))
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        let failed =
            |offset| move |cause| Error::io(ErrorKind::Read, "read the input", cause).at_offset(offset);
        let end = at.saturating_add(buffer.len() as u64);
        let mut next = at;
        while next < end {
            let found = self.storage.next_data(next).map_err(failed(next))?;
            let (start, data_end) = found.unwrap_or((end, end));
            let (start, data_end) = (start.clamp(next, end), data_end.clamp(next, end).max(start.min(end)));
            let (from, to) = (to_usize(next - at)?, to_usize(start - at)?);
            buffer[from..to].fill(0);
            let (from, to) = (to, to_usize(data_end - at)?);
            self.storage.read_padded_at(start, &mut buffer[from..to]).map_err(failed(start))?;
            next = data_end.max(next + 1);
        }
        Ok(())
    }

    fn presence(&self, _unit: Extent) -> Presence {
        Presence::Alone
    }
}
