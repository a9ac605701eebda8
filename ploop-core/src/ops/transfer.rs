//! Moving the whole content of a disk into a new file: what convert, export and import share.
//!
//! A [`Content`] is read in pieces of some megabytes, several at a time; a [`Target`] takes them in any order. Each
//! piece leaves a digest of what was stored; after a sync that covers it, it is read back and compared, while others are
//! still stored. The finished file is opened anew, and its table must say what it said when the content was compared:
//! the [`Layout`]. What is zero is not stored unless it hides something below it.
//!
//! The file is under construction: nothing names it before it is complete, durable and verified. So the order of
//! writes inside it does not matter, only the sync at the end.
//!
//! Locking: pieces are independent; a target orders its allocations by one small mutex.

mod content;
mod pieces;
mod target;

pub(super) use content::{ChainContent, Content, StorageContent};
pub(super) use pieces::{Piece, Pipeline, buffer as pieces_buffer, differs};
pub(super) use target::{ImageTarget, Layout, RawTarget, Target, finish_image};

use crate::error::Result;
use crate::extent::Extent;
use crate::io::Storage;

/// Bytes that are read and written at once, unless a cluster is larger.
pub(super) const PIECE_BYTES: u64 = 8 << 20;
/// Transfers under way at once. They wait for the disk nearly all the time, so this is the depth of its queue and has
/// nothing to do with the number of processors: on a disk that others use, too, four got two thirds of what eight did.
const THREADS: usize = 8;
/// As [`THREADS`] for clusters so large that a buffer for each would take much memory.
const THREADS_FOR_LARGE_PIECES: usize = 2;

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
    if piece_bytes > 4 * PIECE_BYTES { THREADS_FOR_LARGE_PIECES } else { THREADS }
}

/// Copies what `content` has below byte `end` into `target`, and compares it there.
pub(super) fn copy(
    content: &dyn Content,
    target: &dyn Target,
    end: u64,
    threads: usize,
    pipeline: &Pipeline<'_>,
) -> Result<()> {
    let piece = piece_bytes_for(target.unit_bytes(), end);
    let mut at = 0;
    let next = || {
        let Some(found) = content.next_data(at, end)? else { return Ok(None) };
        let start = found - found % piece;
        at = start.saturating_add(piece);
        Ok(Some(Piece { extent: Extent::between(start, at.min(end)), bytes: None }))
    };
    let store = |piece: &Piece, buffer: &mut [u8]| {
        let len = usize::try_from(piece.extent.len()).unwrap_or(usize::MAX).min(buffer.len());
        content.read(piece.extent.start(), &mut buffer[..len])?;
        buffer[len..].fill(0);
        target.put(piece.extent.start(), buffer, &|unit| content.presence(unit), pipeline.read_back)
    };
    pipeline.fill(target, (piece, threads), next, store)
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

#[cfg(test)]
mod tests;
