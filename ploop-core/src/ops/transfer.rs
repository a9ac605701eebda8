//! Moving the whole content of a disk into a new file: what convert, export and import share.
//!
//! A [`Content`] is read in pieces of some megabytes, several at a time; a [`Target`] takes them in any order. Each
//! piece leaves a digest of what was stored, and [`verify`] reads the finished file back and compares. What is zero is
//! not stored unless it hides something below it.
//!
//! The file is under construction: nothing names it before it is complete, durable and verified. So the order of
//! writes inside it does not matter, only the sync at the end.
//!
//! Locking: pieces are independent; a target orders its allocations by one small mutex.

mod content;
mod pieces;
mod target;

pub(super) use content::{ChainContent, Content, StorageContent};
pub(super) use pieces::{Piece, Pipeline, Recorded, buffer as pieces_buffer};
pub(super) use target::{ImageTarget, RawTarget, Target, finish_image};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::io::Storage;

/// Bytes that are read and written at once, unless a cluster is larger.
pub(super) const PIECE_BYTES: u64 = 8 << 20;
/// Threads at most.
const THREADS_MAX: usize = 8;

/// What a source holds of a unit of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing: not even zeros are stored.
    Absent,
    /// Bytes with nothing below them: zeros need not be stored.
    Alone,
    /// Bytes that hide others below them: zeros must be stored.
    Over,
}

/// BLAKE3 over what was stored of one piece.
pub(super) type Digest = [u8; 32];

/// Bytes of a piece for units of `unit_bytes`: a multiple of it.
pub(super) fn piece_bytes(unit_bytes: u64) -> u64 {
    let unit = unit_bytes.max(1);
    (PIECE_BYTES / unit).max(1).saturating_mul(unit)
}

/// As [`piece_bytes`] for a disk of `end` bytes: a small one needs no large buffers.
pub(super) fn piece_bytes_for(unit_bytes: u64, end: u64) -> u64 {
    let unit = unit_bytes.max(1);
    piece_bytes(unit).min(end.div_ceil(unit).max(1).saturating_mul(unit))
}

/// How many pieces are under way at once. Storage that is no file (a simulated one) is used from one thread, so that
/// its order of operations repeats.
pub(super) fn threads(storage: &dyn Storage, piece_bytes: u64) -> usize {
    if storage.descriptor().is_none() {
        return 1;
    }
    let processors = std::thread::available_parallelism().map_or(2, usize::from);
    let wanted = processors.saturating_mul(2).clamp(2, THREADS_MAX);
    // Memory is a buffer for each: large clusters take fewer.
    if piece_bytes > 4 * PIECE_BYTES { 2 } else { wanted }
}

/// Copies what `content` has below byte `end` into `target`, and returns what there is to compare.
pub(super) fn copy(
    content: &dyn Content,
    target: &dyn Target,
    end: u64,
    threads: usize,
    pipeline: &Pipeline<'_>,
) -> Result<Recorded> {
    let piece = piece_bytes_for(target.unit_bytes(), end);
    let mut at = 0;
    let next = || {
        let Some(found) = content.next_data(at, end)? else { return Ok(None) };
        let start = found - found % piece;
        at = start.saturating_add(piece);
        Ok(Some(Piece { extent: Extent::between(start, at.min(end)), bytes: None }))
    };
    let work = |piece: &Piece, buffer: &mut [u8]| {
        let len = usize::try_from(piece.extent.len()).unwrap_or(usize::MAX).min(buffer.len());
        content.read(piece.extent.start(), &mut buffer[..len])?;
        buffer[len..].fill(0);
        target.put(piece.extent.start(), buffer, &|unit| content.presence(unit))
    };
    pipeline.run(piece, threads, next, work)
}

/// Bytes that [`copy`] will go through, at least.
pub(super) fn data_bytes(content: &dyn Content, unit_bytes: u64, end: u64) -> Result<u64> {
    let piece = piece_bytes_for(unit_bytes, end);
    let (mut at, mut bytes) = (0, 0);
    while let Some(found) = content.next_data(at, end)? {
        let start = found - found % piece;
        at = start.saturating_add(piece);
        bytes += at.min(end) - start;
    }
    Ok(bytes)
}

/// Reads back what was stored and compares. `target` is the finished file, opened anew.
pub(super) fn verify(
    target: &dyn Target,
    recorded: &Recorded,
    threads: usize,
    pipeline: &Pipeline<'_>,
) -> Result<()> {
    let longest = recorded.pieces().map(|(extent, _)| extent.len()).max().unwrap_or(1);
    let piece = piece_bytes_for(target.unit_bytes(), longest);
    let mut expected = recorded.pieces();
    let next = || Ok(expected.next().map(|(extent, _)| Piece { extent, bytes: None }));
    let work = |piece: &Piece, buffer: &mut [u8]| target.digest(piece.extent, buffer);
    let found = pipeline.run(piece, threads, next, work)?;
    for ((extent, expected), (_, found)) in recorded.pieces().zip(found.pieces()) {
        if expected != found {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("compare what was written with what is read back: {extent} differs"),
            )
            .advise(
                "nothing was replaced; look at the health of the host's disk and memory before trying again",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
