//! The original's one-way stream ("family A"): an image file as packets at file offsets.
//!
//! ```text
//! packet = marker u32 = 0x4cc0ac3d · size u32 · position u64 · data (size bytes)      size 0 ends, size 4 is a sync mark
//! ```
//!
//! The format has no checksum, number, length or version; what can be checked is. Sizes and positions are bounded, data
//! is written as it is read, in small pieces, and the finished file must be a whole image, closed cleanly, before it
//! gets its name.

use std::io::{Read, Write};
use std::time::Instant;

use ploop_core::{Error, ErrorKind, Result};

use crate::stats::{Event, Observer, ReceiveReport};
use crate::target::{Destination, FileTarget};
use crate::transport;

/// The first four bytes of every packet.
pub const MARKER: [u8; 4] = 0x4cc0_ac3d_u32.to_le_bytes();
/// The longest packet: the largest legal cluster.
pub const PACKET_BYTES_MAX: u32 = 64 << 20;
/// The largest file.
pub const FILE_BYTES_MAX: u64 = 1 << 50;
/// The size that marks a sync instead of data.
pub(crate) const SYNC_MARK_BYTES: u32 = 4;
/// Data is read and written in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

/// What the sender is told after a sync mark, where it listens.
pub(crate) const SYNCED: &[u8; 8] = b"SUCCESS\n";
const NOT_SYNCED: &[u8; 8] = b"FAILURE\n";

/// Receives the stream behind its first marker, which has been read. `feedback` is told how each sync went.
pub(crate) fn receive(
    input: &mut impl Read,
    feedback: Option<&mut dyn Write>,
    destination: &mut dyn Destination,
    observer: &dyn Observer,
    begun: Instant,
) -> Result<ReceiveReport> {
    let mut file = destination.create_file()?;
    let received = packets(input, feedback, &mut *file, observer).and_then(|totals| {
        file.sync()?;
        file.commit()?;
        Ok(totals)
    });
    match received {
        Ok(totals) => {
            observer.event(&Event::Committed);
            Ok(ReceiveReport {
                copy_id: String::new(),
                disk_bytes: totals.file_bytes,
                passes: 1,
                deltas: 0,
                data_bytes: totals.data_bytes,
                zero_bytes: 0,
                verified_bytes: 0,
                seconds: begun.elapsed().as_secs_f64(),
                sender_told: true,
                legacy: true,
            })
        }
        Err(error) => match file.discard() {
            Ok(()) => Err(error),
            Err(left) => {
                let advice = format!("{}; then {left}", error.advice().unwrap_or("start the copy again"));
                Err(error.advise(advice))
            }
        },
    }
}

#[derive(Default)]
struct Totals {
    data_bytes: u64,
    file_bytes: u64,
}

fn packets(
    input: &mut impl Read,
    mut feedback: Option<&mut dyn Write>,
    file: &mut dyn FileTarget,
    observer: &dyn Observer,
) -> Result<Totals> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut totals = Totals::default();
    let mut position = 4;
    let mut marker = MARKER;
    observer.event(&Event::PassStarted { pass: 1, kind: None, expected_bytes: 0 });
    loop {
        let begin = position - 4;
        let damaged = |found: &str| {
            Error::new(ErrorKind::Protocol, format!("the stream is damaged at byte {begin}: {found}"))
                .advise("start the copy again; something else may have written into the pipe")
        };
        if marker != MARKER {
            return Err(damaged("no packet begins here"));
        }
        let mut fields = [0; 12];
        fill(input, &mut fields, &mut position)?;
        let [a, b, c, d, offset @ ..] = fields;
        let (size, offset) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(offset));
        if size == 0 {
            return Ok(totals);
        }
        let end = offset.checked_add(u64::from(size)).filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or_else(|| damaged("a packet lies past the end of any file"))?;
        if size > PACKET_BYTES_MAX {
            return Err(damaged("a packet is longer than any cluster"));
        }
        if size == SYNC_MARK_BYTES {
            fill(input, &mut [0; 4], &mut position)?;
            let synced = file.sync();
            if let Some(feedback) = &mut feedback {
                let told = feedback.write_all(if synced.is_ok() { SYNCED } else { NOT_SYNCED });
                // What went wrong with the file matters more.
                if synced.is_ok() {
                    told.map_err(|error| {
                        transport::explain(ErrorKind::Write, "tell the sender of the sync", error)
                    })?;
                }
            }
            synced?;
        } else {
            let mut at = offset;
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
                fill(input, &mut piece[..len], &mut position)?;
                file.write_at(at, &piece[..len])?;
                at += len as u64;
            }
            totals.data_bytes += u64::from(size);
            totals.file_bytes = totals.file_bytes.max(end);
        }
        fill(input, &mut marker, &mut position)?;
    }
}

fn fill(input: &mut impl Read, buffer: &mut [u8], position: &mut u64) -> Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let count = input
            .read(&mut buffer[filled..])
            .map_err(|error| transport::explain(ErrorKind::Read, "read the stream", error))?;
        if count == 0 {
            let message = format!("read the stream: it ends after {position} bytes, before its end packet");
            return Err(Error::new(ErrorKind::Read, message).advise(
                "the sender failed or the connection broke: see its message, and start the copy again",
            ));
        }
        filled += count;
        *position += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemoryDestination, Outcome};
    use crate::stats::Silent;

    fn packet(size: u32, offset: u64, data: &[u8]) -> Vec<u8> {
        [&MARKER[..], &size.to_le_bytes(), &offset.to_le_bytes(), data].concat()
    }

    fn receive_stream(stream: &[u8]) -> (Result<ReceiveReport>, MemoryDestination) {
        let mut destination = MemoryDestination::new();
        let report = receive(&mut &stream[4..], None, &mut destination, &Silent, Instant::now());
        (report, destination)
    }

    fn whole() -> Vec<u8> {
        [packet(8, 8, &[1; 8]), packet(4, 0, b"abcd"), packet(8, 0, &[2; 8]), packet(0, 0, &[])].concat()
    }

    #[test]
    fn packets_land_at_their_offsets_and_the_sync_mark_does_not() {
        let (report, destination) = receive_stream(&whole());
        assert_eq!(report.unwrap().disk_bytes, 16);
        assert_eq!(destination.outcome(), Outcome::Committed);
        assert_eq!(destination.content(), [[2; 8], [1; 8]].concat());
    }

    #[test]
    fn a_sender_that_listens_is_told_of_each_sync() {
        let stream = whole();
        let (mut told, mut destination) = (Vec::new(), MemoryDestination::new());
        receive(&mut &stream[4..], Some(&mut told), &mut destination, &Silent, Instant::now()).unwrap();
        assert_eq!(told, SYNCED);
        // It has gone: the copy cannot be completed any more.
        let mut full: &mut [u8] = &mut [0; 4];
        let mut destination = MemoryDestination::new();
        let failed = receive(&mut &stream[4..], Some(&mut full), &mut destination, &Silent, Instant::now());
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Write);
        assert_eq!(destination.outcome(), Outcome::Nothing);
    }

    #[test]
    fn every_cut_is_an_early_end_and_leaves_nothing() {
        let whole = whole();
        for cut in 4..whole.len() {
            let (report, destination) = receive_stream(&whole[..cut]);
            assert_eq!(report.unwrap_err().kind(), ErrorKind::Read, "cut at {cut}");
            assert_eq!(destination.outcome(), Outcome::Nothing);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_before_memory_is_taken() {
        let mut garbage = packet(8, 0, &[1; 8]);
        garbage.extend([7; 64]);
        for stream in [
            garbage,
            packet(u32::MAX, 0, &[]),
            packet(PACKET_BYTES_MAX + 1, 0, &[]),
            packet(8, u64::MAX - 4, &[]),
            packet(8, FILE_BYTES_MAX, &[]),
        ] {
            let (report, destination) = receive_stream(&stream);
            assert_eq!(report.unwrap_err().kind(), ErrorKind::Protocol);
            assert_eq!(destination.outcome(), Outcome::Nothing);
        }
    }
}
