//! Hostile streams into the decoder of the copy.

use crate::mutate::damage;
use fastrand::Rng;
use pcopy::wire::{EndPass, FrameReader, Header, Hello, ImageKind, Kind, Seal, StreamRules, Transcript};
use std::io::Read;

/// Largest disk that a generated `Hello` announces.
const DISK_BYTES: u64 = 1 << 20;

/// A valid stream with up to a few passes, then damaged.
pub fn stream(random: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut sequence, mut data_bytes, mut zero_bytes) = (0, 0, 0);
    let mut transcript = Transcript::default();
    let mut push = |header: Option<Header>, payload: &[u8], transcript: &mut Transcript| {
        if let Some(header) = header {
            transcript.fold(&header);
            bytes.extend_from_slice(&header.encode());
            bytes.extend_from_slice(payload);
            sequence += 1;
        }
        sequence
    };
    let hello = Hello {
        two_way: random.bool(),
        cluster_sectors: 64,
        disk_bytes: DISK_BYTES,
        version: 2,
        image: ImageKind::Expanded,
        copy_id: [7; 16],
        window_bytes: 1 << 25,
        payload_bytes_max: 1 << 20,
        data_bytes: 0,
    }
    .encode();
    let mut number = push(Header::plain(Kind::Hello, 0, &hello), &hello, &mut transcript);
    let passes = random.u32(1..4);
    for pass in 0..passes {
        let mut at = 0;
        while at < DISK_BYTES && random.u8(..4) != 0 {
            let len = 512 * random.u64(1..8);
            if random.bool() {
                let len = usize::try_from(len).unwrap_or(0);
                let payload: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
                let header = Header::new(Kind::Data, number, at, len as u64, &payload);
                number = push(header, &payload, &mut transcript);
                data_bytes += len as u64;
            } else {
                number = push(Header::new(Kind::Zero, number, at, len, &[]), &[], &mut transcript);
                zero_bytes += len;
            }
            at += len + 512 * random.u64(..64);
        }
        let end = EndPass { pass: pass + 1, durable: random.bool(), last: pass + 1 == passes }.encode();
        number = push(Header::plain(Kind::EndPass, number, &end), &end, &mut transcript);
    }
    let seal = Seal {
        disk_bytes: DISK_BYTES,
        frames: number,
        data_bytes,
        zero_bytes,
        transcript: transcript.digest(),
    }
    .encode();
    push(Header::plain(Kind::Seal, number, &seal), &seal, &mut transcript);
    if random.u8(..8) != 0 {
        damage(random, &mut bytes);
    }
    bytes
}

/// What a decoder concluded: frames admitted, and whether a right seal ended the stream.
#[derive(Debug, PartialEq)]
struct Conclusion {
    frames: u64,
    covered_bytes: u64,
    sealed: bool,
}

fn conclude(input: impl Read) -> Conclusion {
    let mut conclusion = Conclusion { frames: 0, covered_bytes: 0, sealed: false };
    let (mut frames, mut rules, mut transcript) =
        (FrameReader::new(input), StreamRules::new(), Transcript::default());
    while let Ok(Some(header)) = frames.header() {
        if rules.admit(&header).is_err() {
            break;
        }
        // Admitted: the length is within what the stream itself may announce.
        let limit = if header.kind == Kind::Data { pcopy::wire::PAYLOAD_BYTES_LIMIT } else { 4096 };
        assert!(header.length <= limit, "{:?} of {} bytes was admitted", header.kind, header.length);
        let mut payload = vec![0; header.length as usize];
        if frames.payload(&mut payload).is_err() || header.check(&payload).is_err() {
            break;
        }
        let taken = match header.kind {
            Kind::Hello => match Hello::decode(&payload) {
                Ok(hello) => {
                    rules.hello(&hello);
                    true
                }
                Err(_) => false,
            },
            Kind::EndPass => EndPass::decode(&payload).is_ok_and(|end| rules.end_pass(&end).is_ok()),
            Kind::Seal => Seal::decode(&payload).is_ok_and(|seal| {
                conclusion.sealed = rules.check_seal(&seal).is_ok() && seal.transcript == transcript.digest();
                conclusion.sealed
            }),
            _ => true,
        };
        if !taken {
            break;
        }
        if header.kind.is_numbered() {
            transcript.fold(&header);
        }
        conclusion.frames += 1;
        conclusion.covered_bytes = conclusion.covered_bytes.saturating_add(header.extent);
    }
    conclusion
}

/// Gives out one to seven bytes at a time.
struct Ragged<'a>(&'a [u8]);

impl Read for Ragged<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = (self.0.len() % 7 + 1).min(self.0.len()).min(buffer.len());
        buffer[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        Ok(len)
    }
}

/// The same conclusion however the reads are split, and none of it past the limits.
pub fn decode(input: &[u8]) {
    let whole = conclude(input);
    assert_eq!(whole, conclude(Ragged(input)), "the split of the reads decides");
}
