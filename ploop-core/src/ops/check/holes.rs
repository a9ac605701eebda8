//! Zeros over the holes that the host file has inside clusters in use: old kernels served such files past their file
//! system. The content stays what it is.
//!
//! What is no hole must surely be written. `SEEK_DATA` does not say that: it calls a page that somebody has read data,
//! although the file system has nothing there but a reservation. [`Storage::next_written`] asks the file system. What it
//! does not surely call written is read: what is zero there is written, what is not zero has been.

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::io::buffer::is_zero;
use crate::io::{Storage, StorageExt};
use crate::ops::Progress;
use crate::units::FileCluster;

use super::image::Plan;

/// Read and written in pieces of this many bytes.
const PIECE_BYTES: u64 = 1 << 20;
/// A file system writes and reserves in units of at least this many bytes.
const BLOCK_BYTES: usize = 4096;

/// Fills the holes in header, table and clusters in use; says how many bytes were written.
pub(super) fn fill(storage: &dyn Storage, plan: &Plan, progress: &dyn Progress) -> Result<u64> {
    let geometry = plan.header.geometry();
    let mut filled = 0;
    progress.begin("fill holes", 0);
    let mut ranges = vec![(0, geometry.data_start().0.max(geometry.cluster_bytes()))];
    let last = plan.survey.used.highest().map_or(0, |last| last.saturating_add(1));
    for cluster in
        (geometry.first_data_cluster().0..last).filter(|&cluster| plan.survey.used.contains(cluster))
    {
        let start = geometry.file_offset(FileCluster(cluster)).0;
        let end = start + geometry.cluster_bytes();
        match ranges.last_mut() {
            Some(range) if range.1 >= start => range.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    for (start, end) in ranges {
        filled += fill_range(storage, start, end, progress)?;
    }
    storage.sync_data().map_err(failed(ErrorKind::Sync))?;
    progress.end();
    Ok(filled)
}

fn failed(kind: ErrorKind) -> impl Fn(io::Error) -> Error {
    move |source| Error::io(kind, "fill the holes of the image", source)
}

fn fill_range(storage: &dyn Storage, start: u64, end: u64, progress: &dyn Progress) -> Result<u64> {
    let mut filled = 0;
    let mut at = start;
    while at < end {
        let written = match storage.next_written(at) {
            Ok(written) => written,
            // Nothing is surely written.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => None,
            Err(error) => return Err(failed(ErrorKind::Read)(error)),
        };
        let doubtful_end = written.map_or(end, |(written_start, _)| written_start.clamp(at, end));
        while at < doubtful_end {
            let len = PIECE_BYTES.min(doubtful_end - at);
            filled += fill_piece(storage, at, len)?;
            at += len;
            progress.advance(len)?;
        }
        at = written.map_or(end, |(_, written_end)| written_end.max(at));
    }
    Ok(filled)
}

/// Writes zeros over what reads as zeros.
fn fill_piece(storage: &dyn Storage, at: u64, len: u64) -> Result<u64> {
    let mut piece = vec![0; usize::try_from(len).unwrap_or(0)];
    storage.read_padded_at(at, &mut piece).map_err(failed(ErrorKind::Read))?;
    let mut filled = 0;
    let mut from = 0;
    while from < piece.len() {
        let blocks = piece[from..].chunks(BLOCK_BYTES);
        let zeros: usize = blocks.take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
        if zeros == 0 {
            from += BLOCK_BYTES;
            continue;
        }
        storage
            .write_all_at(at + from as u64, &piece[from..from + zeros])
            .map_err(failed(ErrorKind::Write))?;
        filled += zeros as u64;
        from += zeros;
    }
    Ok(filled)
}
