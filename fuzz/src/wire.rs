//! Hostile streams into the decoder of the copy.

use crate::mutate::damage;
use fastrand::Rng;
use pcopy::wire::{
    Delta, EndDelta, EndPass, FrameReader, Header, Hello, ImageKind, Kind, Seal, StreamRules, Transcript,
};
use std::io::Read;

/// Largest disk that a generated `Hello` announces.
const DISK_BYTES: u64 = 1 << 20;

/// Hands out numbered frames.
struct Stream {
    bytes: Vec<u8>,
    sequence: u64,
    transcript: Transcript,
    /// Of the present delta: its own transcript and the counts before it.
    delta: Transcript,
    before: (u64, u64, u64),
    data_bytes: u64,
    zero_bytes: u64,
}

impl Stream {
    fn push(&mut self, kind: Kind, (offset, extent): (u64, u64), payload: &[u8]) {
        let Some(header) = Header::new(kind, self.sequence, offset, extent, payload) else { return };
        if kind == Kind::Delta {
            self.delta = Transcript::default();
            self.before = (self.sequence, self.data_bytes, self.zero_bytes);
        }
        self.transcript.fold(&header);
        self.delta.fold(&header);
        self.bytes.extend_from_slice(&header.encode());
        self.bytes.extend_from_slice(payload);
        self.sequence += 1;
        match kind {
            Kind::Data => self.data_bytes += extent,
            Kind::Zero => self.zero_bytes += extent,
            _ => {}
        }
    }

    fn plain(&mut self, kind: Kind, payload: &[u8]) {
        self.push(kind, (0, 0), payload);
    }

    fn pass(&mut self, random: &mut Rng, end: EndPass) {
        let mut at = 0;
        while at < DISK_BYTES && random.u8(..4) != 0 {
            let len = 512 * random.u64(1..8);
            if random.bool() {
                let payload: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
                self.push(Kind::Data, (at, len), &payload);
            } else {
                self.push(Kind::Zero, (at, len), &[]);
            }
            at += len + 512 * random.u64(..64);
        }
        self.plain(Kind::EndPass, &end.encode());
    }

    fn end_delta(&mut self, index: u32) {
        let (frames, data_bytes, zero_bytes) = self.before;
        let end = EndDelta {
            transcript: self.delta.digest(),
            index,
            frames: self.sequence - frames,
            data_bytes: self.data_bytes - data_bytes,
            zero_bytes: self.zero_bytes - zero_bytes,
        };
        self.plain(Kind::EndDelta, &end.encode());
    }
}

/// The delta as it must not be, in one thing or another; now and then it may be so.
fn hostile_delta(random: &mut Rng, delta: Delta) -> Delta {
    match random.u8(..12) {
        0 => Delta { index: random.u32(..8), ..delta },
        1 => Delta { parent: random.bool().then(|| random.u32(..8)), ..delta },
        2 => Delta { guid: [random.u8(..4); 16], ..delta },
        3 => Delta { place: random.u32(..8), ..delta },
        4 => Delta { temporary: !delta.temporary, ..delta },
        5 => Delta { image: ImageKind::Raw, ..delta },
        6 => Delta { image: ImageKind::Preallocated, ..delta },
        7 => Delta { version: random.u8(..4), ..delta },
        8 => Delta { cluster_sectors: 1 << random.u32(..32), ..delta },
        9 => Delta { cluster_sectors: random.u32(..), ..delta },
        10 => Delta { disk_bytes: 512 * random.u64(..4096), ..delta },
        _ => Delta { disk_bytes: 1 << random.u32(9..51), ..delta },
    }
}

/// A valid stream, flat or of a few deltas, with up to a few passes, then damaged.
pub fn stream(random: &mut Rng) -> Vec<u8> {
    let mut stream = Stream {
        bytes: Vec::new(),
        sequence: 0,
        transcript: Transcript::default(),
        delta: Transcript::default(),
        before: (0, 0, 0),
        data_bytes: 0,
        zero_bytes: 0,
    };
    let deltas = if random.bool() { random.u32(1..6) } else { 0 };
    // Frames that are whole, from a sender that lies.
    let hostile = random.u8(..4) == 0;
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
        deltas,
    };
    stream.plain(Kind::Hello, &hello.encode());
    let mut ended = 0;
    for index in 0..deltas {
        let delta = Delta {
            index,
            parent: index.checked_sub(1).map(|last| random.u32(0..=last)),
            guid: [u8::try_from(index + 1).unwrap_or(1); 16],
            place: deltas - 1 - index,
            temporary: index + 1 < deltas && random.bool(),
            image: if index == 0 && random.bool() { ImageKind::Raw } else { ImageKind::Expanded },
            version: 2,
            cluster_sectors: 64,
            disk_bytes: DISK_BYTES,
            data_bytes: random.u64(..),
            modified_seconds: 0,
        };
        let delta = if hostile && random.u8(..3) == 0 { hostile_delta(random, delta) } else { delta };
        stream.plain(Kind::Delta, &delta.encode());
        if hostile && random.u8(..16) == 0 {
            // Data before the delta, or after the end of one, or two ends.
            stream.push(Kind::Zero, (0, 512), &[]);
        }
        if index + 1 < deltas {
            ended += 1;
            stream.pass(random, EndPass { pass: ended, durable: true, last: false });
            if hostile && random.u8(..8) == 0 {
                stream.data_bytes += 512;
            }
            stream.end_delta(index);
        }
    }
    let passes = random.u32(1..4);
    for pass in 0..passes {
        ended += 1;
        let durable = random.bool() || pass + 1 == passes;
        stream.pass(random, EndPass { pass: ended, durable, last: pass + 1 == passes });
    }
    let seal = Seal {
        disk_bytes: DISK_BYTES,
        frames: stream.sequence,
        data_bytes: stream.data_bytes,
        zero_bytes: stream.zero_bytes,
        transcript: stream.transcript.digest(),
    };
    stream.plain(Kind::Seal, &seal.encode());
    let mut bytes = stream.bytes;
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
    let mut delta_transcript = Transcript::default();
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
            Kind::Delta => {
                delta_transcript = Transcript::default();
                Delta::decode(&payload).is_ok_and(|delta| rules.delta(&delta).is_ok())
            }
            Kind::EndDelta => EndDelta::decode(&payload).is_ok_and(|end| {
                rules.end_delta(&end).is_ok() && end.transcript == delta_transcript.digest()
            }),
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
            delta_transcript.fold(&header);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Hostile streams into a real folder: there is a whole copy, or there is nothing.
    #[test]
    fn a_receiver_of_hostile_deltas_leaves_a_whole_disk_or_nothing() {
        use pcopy::target::{ImageDestination, ImageOptions};
        use std::io::Write;
        let (mut whole, mut refused) = (0, 0);
        for seed in 0..300 {
            let bytes = stream(&mut Rng::with_seed(seed));
            let root = tempfile::tempdir().unwrap();
            std::fs::write(root.path().join("copy.hds.theirs"), "theirs").unwrap();
            let mut destination =
                ImageDestination::new(&root.path().join("copy.hds"), ImageOptions::default()).unwrap();
            let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
            let answers = near.try_clone().unwrap();
            let drain = std::thread::spawn(move || std::io::copy(&mut &answers, &mut std::io::sink()));
            let writing = std::thread::spawn(move || {
                // The receiver may give up before the end.
                let _ = (&near).write_all(&bytes);
                let _ = near.shutdown(std::net::Shutdown::Write);
            });
            let link = pcopy::Link { input: Some(far.try_clone().unwrap().into()), output: Some(far.into()) };
            let options = pcopy::ReceiveOptions::default();
            let received = pcopy::receive(link, &mut destination, &options, &pcopy::Silent);
            writing.join().unwrap();
            drop(drain.join().unwrap());
            let names = std::fs::read_dir(root.path()).unwrap().count() - 1;
            assert_eq!(std::fs::read(root.path().join("copy.hds.theirs")).unwrap(), b"theirs");
            if received.is_ok() {
                whole += 1;
                assert!(names >= 2, "seed {seed}");
                let list = ploop_core::ops::snapshot_list(root.path()).unwrap();
                assert_eq!(list.states.len() + 1, names, "seed {seed}");
            } else {
                refused += 1;
                assert_eq!(names, 0, "seed {seed}: {received:?}");
            }
        }
        assert!(whole > 5 && refused > 100, "{whole} {refused}");
    }

    #[test]
    fn streams_that_are_not_damaged_are_taken_flat_and_of_deltas() {
        let (mut flat, mut of_deltas) = (0, 0);
        for seed in 0..400 {
            let bytes = stream(&mut Rng::with_seed(seed));
            if conclude(&bytes[..]).sealed {
                let is_flat = bytes[72] == 1;
                if is_flat {
                    flat += 1
                } else {
                    of_deltas += 1
                };
            }
        }
        assert!(flat > 10 && of_deltas > 10, "{flat} flat ones, {of_deltas} of deltas");
    }
}
