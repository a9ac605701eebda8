//! The frame grammar: bytes and a hash, nothing else.
//!
//! ```text
//! frame   = header (64 bytes) payload (header.length bytes)
//! header  = type u8 · flags u8 = 0 · reserved u16 = 0 · length u32 · sequence u64 · offset u64 · extent u64
//!           · digest [32] = BLAKE3(first 32 header bytes, payload)
//!
//! sender:    Hello Pass+ Seal [Commit]                          with Pass = Data* Zero* EndPass, offsets ascending
//!            Hello (Delta Pass EndDelta)* Delta Pass+ Seal [Commit]      a tree of deltas, frozen ones first
//! receiver:  HelloAck (Credit | PassDurable)* Verdict [Committed]        only when the Hello says two-way
//! either:    Keepalive and Abort, at any frame boundary
//! ```
//!
//! Everything is little-endian. Type 0 is invalid, so a hole in a file is no frame. Frames of one direction are
//! numbered from 0; `Keepalive` and `Abort` stand outside: their number is 0, they are not part of the transcript
//! and cost no credit. `offset` and `extent` are guest bytes, multiples of a sector, and 0 in frames that have no
//! place on the disk; `Data` says its length twice (`length` and `extent`), every other type has one fixed length, so
//! a damaged length is seen before the payload is waited for.
//!
//! The **transcript** is the BLAKE3 hash over the encoded headers (each with its digest, so each stands for its
//! payload) of all numbered frames of the sender before the `Seal`, in order. Both sides compute it; the `Seal`
//! carries the sender's, the `Verdict` the receiver's.
//!
//! Invariants kept here: no length is believed before it is compared with a constant; the rules of one direction
//! ([`StreamRules`], [`AnswerRules`]) admit a header before its payload is read or memory for it is taken; decoding
//! does not depend on how reads are split. The digest finds accidents and foreign streams; it authenticates nobody:
//! that is the transport's task.
//!
//! Version rule: the version is one number and a receiver takes exactly the versions it knows. Reserved bytes and
//! flags are 0 and checked, so that a later version can give them a meaning that this one refuses. A stream of the
//! content alone is of version 1, one of deltas of version 2: each receiver is sent the oldest that will do.

mod delta;
mod payload;
mod rules;

use std::fmt;
use std::io::{self, Read};

pub use delta::{DELTAS_LIMIT, DEPTH_LIMIT, Delta, EndDelta};
use payload::Fields;
pub use payload::{
    Abort, EndPass, Hello, HelloAck, ImageKind, Seal, decode_credit, decode_pass, decode_verdict, printable,
};
pub use rules::{AnswerRules, StreamRules, Told};

/// First bytes of the payload of a `Hello`.
pub const MAGIC: [u8; 8] = *b"ploopcpy";
/// The version of a stream of the content alone.
pub const FLAT_VERSION: u16 = 1;
/// The version of a stream of deltas, the latest that this code speaks.
pub const DELTAS_VERSION: u16 = 2;
/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a header that its digest covers.
pub const COVERED_BYTES: usize = 32;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;
/// The longest payload this code sends.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// The longest payload a `Hello` may announce.
pub const PAYLOAD_BYTES_LIMIT: u32 = 4 << 20;
/// The largest disk a `Hello` may announce.
pub const DISK_BYTES_LIMIT: u64 = 1 << 50;
/// The most passes in one stream.
pub const PASSES_LIMIT: u32 = 1 << 16;
/// The most frames in one stream.
pub const FRAMES_LIMIT: u64 = 1 << 40;
/// The most bytes of disk that the frames of one stream may cover, as a multiple of the disk's size, on top of
/// [`SMALL_STREAM_BYTES`].
pub const ROUNDS_LIMIT: u64 = 256;
/// What a stream may cover however small the disk is.
pub const SMALL_STREAM_BYTES: u64 = 1 << 36;
/// The most `Keepalive` frames between two numbered frames.
pub const KEEPALIVES_LIMIT: u32 = 1 << 20;
/// The longest text of an `Abort`.
pub const ABORT_TEXT_BYTES_MAX: usize = 1000;
/// The smallest window of credit: one frame of the longest payload always fits.
pub const WINDOW_BYTES_MIN: u64 = 2 * (PAYLOAD_BYTES_LIMIT as u64 + HEADER_BYTES as u64);
/// The largest window of credit.
pub const WINDOW_BYTES_LIMIT: u64 = 1 << 30;
/// Unit of offsets and lengths on the disk.
pub const SECTOR_BYTES: u64 = 512;

/// A BLAKE3 digest.
pub type Digest = [u8; DIGEST_BYTES];

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Opens the stream: what disk follows and how.
    Hello = 1,
    /// Bytes of the disk.
    Data = 2,
    /// A range of the disk that is zero.
    Zero = 3,
    /// Everything of one pass has been sent.
    EndPass = 4,
    /// Everything has been sent: the transcript so far.
    Seal = 5,
    /// Put the copy in place.
    Commit = 6,
    /// One side gives up, and says why.
    Abort = 7,
    /// The sender of this is alive.
    Keepalive = 8,
    /// A delta begins: what it is and what it stands on.
    Delta = 9,
    /// A frozen delta was sent whole: its digest.
    EndDelta = 10,
    /// Answer to `Hello`: the window of credit.
    HelloAck = 0x81,
    /// How many bytes of frames have been dealt with.
    Credit = 0x82,
    /// A pass is on disk, synced, and was read back.
    PassDurable = 0x83,
    /// Answer to `Seal`: the receiver's transcript.
    Verdict = 0x84,
    /// Answer to `Commit`: the copy is in place.
    Committed = 0x85,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::Data,
        Self::Zero,
        Self::EndPass,
        Self::Seal,
        Self::Commit,
        Self::Abort,
        Self::Keepalive,
        Self::Delta,
        Self::EndDelta,
        Self::HelloAck,
        Self::Credit,
        Self::PassDurable,
        Self::Verdict,
        Self::Committed,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Whether frames of this kind are numbered and part of the transcript; the others may come at any time.
    pub fn is_numbered(self) -> bool {
        !matches!(self, Self::Abort | Self::Keepalive)
    }

    /// The payload length of this kind; `None` for `Data`.
    pub fn fixed_length(self) -> Option<u32> {
        Some(match self {
            Self::Data => return None,
            Self::Zero | Self::Commit | Self::Keepalive | Self::Committed => 0,
            Self::Hello => small(Hello::BYTES),
            Self::EndPass => small(EndPass::BYTES),
            Self::Delta => small(Delta::BYTES),
            Self::EndDelta => small(EndDelta::BYTES),
            Self::Seal => small(Seal::BYTES),
            Self::Abort => small(Abort::BYTES),
            Self::HelloAck => small(HelloAck::BYTES),
            Self::Credit => 8,
            Self::PassDurable => 8,
            Self::Verdict => small(DIGEST_BYTES),
        })
    }
}

/// The length of a payload of one fixed size, as a header says it.
const fn small(bytes: usize) -> u32 {
    // Compared with a constant, so it fits: otherwise this does not compile.
    const { assert!(Abort::BYTES < 1 << 16 && Hello::BYTES < 1 << 16 && Seal::BYTES < 1 << 16) };
    #[expect(clippy::cast_possible_truncation, reason = "no fixed payload is longer than 64 KiB")]
    let length = bytes as u32;
    length
}

/// Why bytes are not a legal frame, or a frame not legal now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The first byte names no kind of frame.
    UnknownKind(u8),
    /// Bytes that must be zero are not.
    Reserved,
    /// A length that this kind cannot have.
    Length {
        /// The kind that was said.
        kind: Kind,
        /// The payload length that was said.
        length: u32,
    },
    /// A place on the disk that is no multiple of a sector, overflows, or is given where none belongs.
    Place(Kind),
    /// Header and payload do not fit their digest.
    Digest(Kind),
    /// A frame is missing, doubled or out of order.
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// This kind may not come now.
    State {
        /// What came.
        kind: Kind,
        /// What had come before.
        state: &'static str,
    },
    /// The range passes the announced end of the disk.
    PastEnd {
        /// Where the range ends.
        end: u64,
        /// The announced size of the disk in bytes.
        disk_bytes: u64,
    },
    /// The range lies before the end of an earlier one of the same pass.
    NotAscending {
        /// Where the range starts.
        offset: u64,
    },
    /// More of something than a whole stream may have.
    TooMany(&'static str),
    /// The stream does not begin as ours do.
    Magic,
    /// A version this code does not know.
    Version(u16),
    /// A field of a payload has a value it cannot have.
    Field(&'static str),
}

impl fmt::Display for WireError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKind(byte) => write!(formatter, "no frame begins with byte {byte:#04x}"),
            Self::Reserved => formatter.write_str("reserved bytes of a frame header are not zero"),
            Self::Length { kind, length } => write!(formatter, "a {kind:?} frame cannot have {length} bytes"),
            Self::Place(kind) => write!(formatter, "a {kind:?} frame has an impossible place on the disk"),
            Self::Digest(kind) => write!(formatter, "a {kind:?} frame does not fit its digest"),
            Self::Sequence { expected, found } => {
                write!(formatter, "frame {expected} was due and frame {found} came")
            }
            Self::State { kind, state } => write!(formatter, "a {kind:?} frame may not come {state}"),
            Self::PastEnd { end, disk_bytes } => {
                write!(formatter, "a frame ends at byte {end}, past the disk's {disk_bytes} bytes")
            }
            Self::NotAscending { offset } => {
                write!(formatter, "a frame at byte {offset} goes back inside its pass")
            }
            Self::TooMany(what) => write!(formatter, "more {what} than a copy can have"),
            Self::Magic => formatter.write_str("this is no stream of ploop copy"),
            Self::Version(version) => {
                write!(
                    formatter,
                    "protocol version {version}; this program speaks {FLAT_VERSION} to {DELTAS_VERSION}"
                )
            }
            Self::Field(name) => write!(formatter, "field \"{name}\" has an impossible value"),
        }
    }
}

impl std::error::Error for WireError {}

/// A frame without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bytes of payload.
    pub length: u32,
    /// Number of the frame in its direction; 0 in frames that are not numbered.
    pub sequence: u64,
    /// First guest byte, for `Data` and `Zero`.
    pub offset: u64,
    /// Guest bytes, for `Data` and `Zero`.
    pub extent: u64,
    /// BLAKE3 over the fields above, as encoded, and the payload.
    pub digest: Digest,
}

impl Header {
    /// The header of a frame of `kind` at the guest bytes `offset`..`offset + extent` with that payload. `None` when
    /// the payload is longer than any frame's.
    pub fn new(kind: Kind, sequence: u64, offset: u64, extent: u64, payload: &[u8]) -> Option<Self> {
        let length = u32::try_from(payload.len()).ok().filter(|length| *length <= PAYLOAD_BYTES_LIMIT)?;
        let mut header = Self { kind, length, sequence, offset, extent, digest: [0; DIGEST_BYTES] };
        header.digest = header.digest_of(payload);
        Some(header)
    }

    /// The header of a frame that has no place on the disk.
    pub fn plain(kind: Kind, sequence: u64, payload: &[u8]) -> Option<Self> {
        Self::new(kind, sequence, 0, 0, payload)
    }

    /// Bytes of the whole frame.
    pub fn frame_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.length)
    }

    /// The digest that this header has with `payload`.
    pub fn digest_of(&self, payload: &[u8]) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode()[..COVERED_BYTES]);
        hasher.update(payload);
        *hasher.finalize().as_bytes()
    }

    /// Whether the digest fits the payload.
    pub fn check(&self, payload: &[u8]) -> Result<(), WireError> {
        if self.digest_of(payload) == self.digest { Ok(()) } else { Err(WireError::Digest(self.kind)) }
    }

    /// The header as it travels.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.extent.to_le_bytes());
        bytes[COVERED_BYTES..].copy_from_slice(&self.digest);
        bytes
    }

    /// The header in those bytes, if every field is possible by itself.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let kind = Kind::from_byte(bytes[0]).ok_or(WireError::UnknownKind(bytes[0]))?;
        if bytes[1..4] != [0; 3] {
            return Err(WireError::Reserved);
        }
        let mut fields = Fields(&bytes[4..]);
        let header = Self {
            kind,
            length: fields.u32(),
            sequence: fields.u64(),
            offset: fields.u64(),
            extent: fields.u64(),
            digest: fields.array(),
        };
        header.check_shape()?;
        Ok(header)
    }

    fn check_shape(&self) -> Result<(), WireError> {
        let wrong_length = Err(WireError::Length { kind: self.kind, length: self.length });
        match self.kind.fixed_length() {
            Some(fixed) if fixed != self.length => return wrong_length,
            None if self.length == 0
                || self.length > PAYLOAD_BYTES_LIMIT
                || u64::from(self.length) != self.extent =>
            {
                return wrong_length;
            }
            _ => {}
        }
        let placed = matches!(self.kind, Kind::Data | Kind::Zero);
        let possible = if placed {
            self.extent > 0
                && self.extent.is_multiple_of(SECTOR_BYTES)
                && self.offset.is_multiple_of(SECTOR_BYTES)
                && self.offset.checked_add(self.extent).is_some()
        } else {
            self.extent == 0 && self.offset == 0
        };
        if !possible {
            return Err(WireError::Place(self.kind));
        }
        if !self.kind.is_numbered() && self.sequence != 0 {
            return Err(WireError::Sequence { expected: 0, found: self.sequence });
        }
        Ok(())
    }
}

/// The running digest over all numbered frames of a sender.
#[derive(Clone, Debug, Default)]
pub struct Transcript(blake3::Hasher);

impl Transcript {
    /// Adds a frame; its header carries the digest of its payload.
    pub fn fold(&mut self, header: &Header) {
        if header.kind.is_numbered() {
            self.0.update(&header.encode());
        }
    }

    /// The digest so far.
    pub fn digest(&self) -> Digest {
        *self.0.finalize().as_bytes()
    }
}

/// Why no frame could be read.
#[derive(Debug)]
pub enum FrameError {
    /// The bytes are not what they must be.
    Wire(WireError),
    /// The stream ended inside a frame.
    Cut,
    /// The transport failed.
    Io(io::Error),
}

impl From<WireError> for FrameError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// Frames out of a stream of bytes, however its reads are split.
#[derive(Debug)]
pub struct FrameReader<R> {
    input: R,
    position: u64,
}

impl<R: Read> FrameReader<R> {
    /// Reads frames from `input`.
    pub fn new(input: R) -> Self {
        Self { input, position: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next header; `None` when the stream ends before one. Its payload must be read next.
    pub fn header(&mut self) -> Result<Option<Header>, FrameError> {
        let mut bytes = [0; HEADER_BYTES];
        match self.fill(&mut bytes, || {})? {
            0 => Ok(None),
            HEADER_BYTES => Ok(Some(Header::decode(&bytes)?)),
            // What was cut may have been no frame from the start.
            _ => match Kind::from_byte(bytes[0]) {
                None => Err(WireError::UnknownKind(bytes[0]).into()),
                Some(_) => Err(FrameError::Cut),
            },
        }
    }

    /// Fills `payload` with the payload that belongs to the last header; the digest is the caller's to check.
    pub fn payload(&mut self, payload: &mut [u8]) -> Result<(), FrameError> {
        self.payload_watched(payload, || {})
    }

    /// As [`payload`](Self::payload); `moved` is called whenever some of it has come.
    pub fn payload_watched(&mut self, payload: &mut [u8], moved: impl FnMut()) -> Result<(), FrameError> {
        if self.fill(payload, moved)? == payload.len() { Ok(()) } else { Err(FrameError::Cut) }
    }

    /// The payload of a frame that is no `Data`, with its digest checked: at most [`Abort::BYTES`].
    pub fn small_payload(&mut self, header: &Header) -> Result<Vec<u8>, FrameError> {
        let length = usize::try_from(header.length).ok().filter(|length| *length <= Abort::BYTES);
        let length = length.ok_or(WireError::Length { kind: header.kind, length: header.length })?;
        let mut payload = vec![0; length];
        self.payload(&mut payload)?;
        header.check(&payload)?;
        Ok(payload)
    }

    fn fill(&mut self, buffer: &mut [u8], mut moved: impl FnMut()) -> Result<usize, FrameError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => {
                    filled += count;
                    self.position += count as u64;
                    moved();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FrameError::Io(error)),
            }
        }
        Ok(filled)
    }
}

/// A whole frame in one piece, for small ones; `None` when the payload is too long for a frame.
pub fn encode_frame(kind: Kind, sequence: u64, payload: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Header::plain(kind, sequence, payload)?.encode().to_vec();
    bytes.extend_from_slice(payload);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            two_way: true,
            cluster_sectors: 2048,
            disk_bytes: 1 << 30,
            version: 2,
            image: ImageKind::Expanded,
            copy_id: *b"0123456789abcdef",
            window_bytes: 1 << 25,
            payload_bytes_max: 1 << 19,
            data_bytes: 12345,
            deltas: 0,
        }
    }

    fn delta(index: u32) -> Delta {
        super::delta::tests::delta(index, 2)
    }

    /// The rules of a stream of two deltas, after the `Hello`.
    fn of_deltas() -> StreamRules {
        let hello = Hello { deltas: 2, ..hello() };
        let mut rules = StreamRules::new();
        rules.admit(&Header::plain(Kind::Hello, 0, &hello.encode()).unwrap()).unwrap();
        rules.hello(&hello);
        rules
    }

    fn plain(kind: Kind, sequence: u64) -> Header {
        Header::plain(kind, sequence, &vec![0; kind.fixed_length().unwrap() as usize]).unwrap()
    }

    fn in_pass() -> StreamRules {
        let mut rules = StreamRules::new();
        let payload = hello().encode();
        rules.admit(&Header::plain(Kind::Hello, 0, &payload).unwrap()).unwrap();
        rules.hello(&hello());
        rules
    }

    fn data(sequence: u64, offset: u64, len: usize) -> Header {
        Header::new(Kind::Data, sequence, offset, len as u64, &vec![7; len]).unwrap()
    }

    #[test]
    fn payloads_survive() {
        assert_eq!(Hello::decode(&hello().encode()).unwrap(), hello());
        let end = EndPass { pass: 9, durable: true, last: true };
        assert_eq!(EndPass::decode(&end.encode()).unwrap(), end);
        let seal = Seal { transcript: [3; 32], disk_bytes: 1, frames: 2, data_bytes: 3, zero_bytes: 4 };
        assert_eq!(Seal::decode(&seal.encode()).unwrap(), seal);
        let ack = HelloAck { window_bytes: 1 << 25, protocol_version: 2 };
        assert_eq!(HelloAck::decode(&ack.encode()).unwrap(), ack);
        let abort = Abort { code: 14, text: "no".into() };
        assert_eq!(Abort::decode(&abort.encode()).unwrap(), abort);
        for kind in Kind::ALL {
            let expected = match kind {
                Kind::Hello => hello().encode().len(),
                Kind::EndPass => end.encode().len(),
                Kind::Seal => seal.encode().len(),
                Kind::Abort => abort.encode().len(),
                Kind::HelloAck => ack.encode().len(),
                _ => continue,
            };
            assert_eq!(kind.fixed_length().map(|length| length as usize), Some(expected), "{kind:?}");
        }
    }

    #[test]
    fn hostile_text_is_defused_and_bounded() {
        let abort = Abort { code: 1, text: format!("\u{1b}[2Jcafé{}", "ü".repeat(2000)) };
        let back = Abort::decode(&abort.encode()).unwrap();
        assert!(back.text.starts_with("?[2Jcafé"));
        assert!(back.text.len() <= ABORT_TEXT_BYTES_MAX);
    }

    #[test]
    fn hello_limits() {
        for change in [
            |hello: &mut Hello| hello.disk_bytes = 0,
            |hello: &mut Hello| hello.disk_bytes = 513,
            |hello: &mut Hello| hello.disk_bytes = DISK_BYTES_LIMIT + 512,
            |hello: &mut Hello| hello.payload_bytes_max = PAYLOAD_BYTES_LIMIT + 1,
            |hello: &mut Hello| hello.payload_bytes_max = 0,
            |hello: &mut Hello| hello.version = 3,
        ] {
            let mut changed = hello();
            change(&mut changed);
            assert!(matches!(Hello::decode(&changed.encode()), Err(WireError::Field(_))), "{changed:?}");
        }
        let mut other_version = hello().encode();
        other_version[8] = 3;
        assert_eq!(Hello::decode(&other_version), Err(WireError::Version(3)));
        let deltas = Hello { deltas: 7, ..hello() };
        assert_eq!(Hello::decode(&deltas.encode()).unwrap(), deltas);
        let many = Hello { deltas: DELTAS_LIMIT + 1, ..hello() };
        assert!(matches!(Hello::decode(&many.encode()), Err(WireError::Field(_))));
        // As a receiver of version 1 alone sees it: the version, before anything that it does not know.
        let mut old = deltas.encode();
        old[8] = 1;
        assert_eq!(Hello::decode(&old), Err(WireError::Reserved));
        let mut none = hello().encode();
        none[8] = 2;
        assert!(matches!(Hello::decode(&none), Err(WireError::Field(_))));
    }

    #[test]
    fn frozen_deltas_have_one_pass_each_and_the_last_has_any_number() {
        let mut rules = of_deltas();
        assert!(rules.clone().admit(&data(1, 0, 512)).is_err(), "no delta was named");
        assert!(rules.clone().admit(&plain(Kind::EndPass, 1)).is_err());
        let smaller = Delta { disk_bytes: 1 << 20, ..delta(0) };
        rules.admit(&plain(Kind::Delta, 1)).unwrap();
        rules.delta(&smaller).unwrap();
        assert!(rules.clone().admit(&plain(Kind::Delta, 2)).is_err());
        assert!(
            matches!(rules.clone().admit(&data(2, 1 << 20, 512)), Err(WireError::PastEnd { .. })),
            "the bounds are those of the delta"
        );
        rules.admit(&data(2, 4096, 512)).unwrap();
        rules.admit(&plain(Kind::EndPass, 3)).unwrap();
        let end = EndPass { pass: 1, durable: true, last: false };
        assert!(rules.clone().end_pass(&EndPass { last: true, ..end }).is_err(), "more deltas must follow");
        rules.end_pass(&end).unwrap();
        for kind in Kind::ALL.into_iter().filter(|kind| kind.is_numbered() && *kind != Kind::EndDelta) {
            let header = if kind == Kind::Data { data(4, 8192, 512) } else { plain_or_zero(kind, 4) };
            assert!(rules.clone().admit(&header).is_err(), "{kind:?} after the pass of a frozen delta");
        }
        rules.admit(&plain(Kind::EndDelta, 4)).unwrap();
        let end = EndDelta { transcript: [0; 32], index: 0, frames: 3, data_bytes: 512, zero_bytes: 0 };
        assert!(rules.clone().end_delta(&EndDelta { data_bytes: 513, ..end }).is_err());
        rules.end_delta(&end).unwrap();
        assert!(rules.clone().admit(&plain(Kind::Seal, 5)).is_err(), "the current state is missing");
        rules.admit(&plain(Kind::Delta, 5)).unwrap();
        assert!(rules.clone().delta(&Delta { disk_bytes: 1 << 20, ..delta(1) }).is_err());
        rules.delta(&delta(1)).unwrap();
        for (pass, sequence) in [(2, 6), (3, 8)] {
            rules.admit(&data(sequence, 1 << 20, 512)).unwrap();
            rules.admit(&plain(Kind::EndPass, sequence + 1)).unwrap();
            rules.end_pass(&EndPass { pass, durable: true, last: pass == 3 }).unwrap();
        }
        rules.admit(&plain(Kind::Seal, 10)).unwrap();
        let seal =
            Seal { transcript: [0; 32], disk_bytes: 1 << 30, frames: 10, data_bytes: 3 * 512, zero_bytes: 0 };
        rules.check_seal(&seal).unwrap();
        assert!(
            in_pass().admit(&plain(Kind::Delta, 1)).is_err(),
            "a stream of the content alone has no deltas"
        );
        assert!(in_pass().admit(&plain(Kind::EndDelta, 1)).is_err());
    }

    fn plain_or_zero(kind: Kind, sequence: u64) -> Header {
        match kind {
            Kind::Zero => Header::new(kind, sequence, 8192, 512, &[]).unwrap(),
            _ => plain(kind, sequence),
        }
    }

    #[test]
    fn states_admit_only_what_belongs() {
        for kind in Kind::ALL {
            let length = kind.fixed_length().unwrap_or(512) as usize;
            let placed = matches!(kind, Kind::Data | Kind::Zero);
            let header = |sequence| {
                let extent = if placed { 512 } else { 0 };
                let sequence = if kind.is_numbered() { sequence } else { 0 };
                Header::new(kind, sequence, 0, extent, &vec![0; length]).unwrap()
            };
            assert_eq!(
                StreamRules::new().admit(&header(0)).is_ok(),
                matches!(kind, Kind::Hello | Kind::Abort)
            );
            let expected =
                matches!(kind, Kind::Data | Kind::Zero | Kind::EndPass | Kind::Abort | Kind::Keepalive);
            assert_eq!(in_pass().admit(&header(1)).is_ok(), expected, "{kind:?} in a pass");
            let mut last = in_pass();
            last.admit(&Header::plain(Kind::EndPass, 1, &[0; 8]).unwrap()).unwrap();
            last.end_pass(&EndPass { pass: 1, durable: true, last: true }).unwrap();
            let expected = matches!(kind, Kind::Seal | Kind::Abort | Kind::Keepalive);
            assert_eq!(last.clone().admit(&header(2)).is_ok(), expected, "{kind:?} after the last pass");
            last.admit(&Header::plain(Kind::Seal, 2, &[0; 64]).unwrap()).unwrap();
            let expected = matches!(kind, Kind::Commit | Kind::Abort | Kind::Keepalive);
            assert_eq!(last.admit(&header(3)).is_ok(), expected, "{kind:?} after the seal");
        }
    }

    #[test]
    fn ranges_ascend_and_stay_on_the_disk() {
        let mut rules = in_pass();
        rules.admit(&data(1, 4096, 4096)).unwrap();
        assert_eq!(
            rules.clone().admit(&data(3, 8192, 512)),
            Err(WireError::Sequence { expected: 2, found: 3 })
        );
        assert_eq!(rules.clone().admit(&data(2, 4096, 512)), Err(WireError::NotAscending { offset: 4096 }));
        let past = Header::new(Kind::Zero, 2, 8192, 1 << 30, &[]).unwrap();
        assert!(matches!(rules.clone().admit(&past), Err(WireError::PastEnd { .. })));
        let long = data(2, 8192, (1 << 19) + 512);
        assert!(matches!(rules.admit(&long), Err(WireError::Length { .. })));
    }

    #[test]
    fn a_stream_is_bounded_in_bytes() {
        let mut rules = in_pass();
        let mut sequence = 1;
        let refused = loop {
            let zero = Header::new(Kind::Zero, sequence, 0, 1 << 30, &[]).unwrap();
            if let Err(error) = rules.admit(&zero) {
                break error;
            }
            rules.admit(&Header::plain(Kind::EndPass, sequence + 1, &[0; 8]).unwrap()).unwrap();
            sequence += 2;
        };
        assert_eq!(refused, WireError::TooMany("bytes"));
    }

    #[test]
    fn answers_only_when_due() {
        let told = Told { passes: 1, bytes: 1000, sealed: false, committed: false };
        let header = |kind: Kind, sequence| {
            Header::plain(kind, sequence, &vec![0; kind.fixed_length().unwrap() as usize]).unwrap()
        };
        let mut rules = AnswerRules::new();
        assert!(rules.clone().admit(&header(Kind::Credit, 0), &told).is_err());
        rules.admit(&header(Kind::HelloAck, 0), &told).unwrap();
        assert!(rules.clone().admit(&header(Kind::HelloAck, 1), &told).is_err());
        assert!(rules.clone().admit(&header(Kind::Verdict, 1), &told).is_err());
        assert!(rules.credit(1001, &told).is_err());
        rules.credit(500, &told).unwrap();
        assert!(rules.credit(499, &told).is_err());
        assert!(rules.durable(2, &told).is_err());
        rules.durable(1, &told).unwrap();
        assert!(rules.durable(1, &told).is_err());
        let told = Told { sealed: true, ..told };
        rules.admit(&header(Kind::Verdict, 1), &told).unwrap();
        assert!(rules.clone().admit(&header(Kind::Committed, 2), &told).is_err(), "nobody asked for it");
        rules.admit(&header(Kind::Committed, 2), &Told { committed: true, ..told }).unwrap();
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_seen_before_the_payload_is_awaited() {
        let header = data(1, 4096, 4096);
        let payload = vec![7; 4096];
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(changed) = Header::decode(&bytes) else { continue };
            assert_eq!(changed.length, header.length, "bit {bit}");
            assert!(changed.check(&payload).is_err(), "bit {bit}");
        }
    }

    /// A reader that gives bytes in pieces of chosen sizes.
    struct Ragged<'a>(&'a [u8], Vec<usize>, usize);
    impl Read for Ragged<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let piece = self.1.get(self.2 % self.1.len()).copied().unwrap_or(1).max(1);
            self.2 += 1;
            let count = piece.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn decode_all(bytes: &[u8], pieces: Vec<usize>) -> Result<Vec<(Header, Vec<u8>)>, String> {
        let mut reader = FrameReader::new(Ragged(bytes, pieces, 0));
        let mut rules = StreamRules::new();
        let mut frames = Vec::new();
        while let Some(header) = reader.header().map_err(|error| format!("{error:?}"))? {
            rules.admit(&header).map_err(|error| format!("{error:?}"))?;
            // What may be allocated is bounded by a limit, whatever the bytes say.
            assert!(header.length <= PAYLOAD_BYTES_LIMIT);
            let mut payload = vec![0; header.length as usize];
            reader.payload(&mut payload).map_err(|error| format!("{error:?}"))?;
            header.check(&payload).map_err(|error| format!("{error:?}"))?;
            if header.kind == Kind::Hello {
                rules.hello(&Hello::decode(&payload).map_err(|error| format!("{error:?}"))?);
            }
            frames.push((header, payload));
        }
        Ok(frames)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn frames_survive_any_split(
            lengths in prop::collection::vec((1usize..20, any::<u8>()), 0..8),
            pieces in prop::collection::vec(1usize..5000, 1..10),
        ) {
            let mut stream = encode_frame(Kind::Hello, 0, &hello().encode()).unwrap();
            let mut offset = 0;
            let mut expected = Vec::new();
            for (index, (sectors, fill)) in lengths.iter().enumerate() {
                let payload = vec![*fill; sectors * 512];
                let header =
                    Header::new(Kind::Data, index as u64 + 1, offset, payload.len() as u64, &payload).unwrap();
                offset += payload.len() as u64;
                stream.extend(header.encode());
                stream.extend(&payload);
                expected.push((header, payload));
            }
            let frames = decode_all(&stream, pieces).unwrap();
            prop_assert_eq!(&frames[1..], &expected[..]);
        }

        #[test]
        fn a_cut_or_changed_stream_is_never_taken(
            at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>(),
        ) {
            let mut stream = encode_frame(Kind::Hello, 0, &hello().encode()).unwrap();
            let payload = vec![9; 2048];
            let header = Header::new(Kind::Data, 1, 512, 2048, &payload).unwrap();
            stream.extend(header.encode());
            stream.extend(&payload);
            let whole = decode_all(&stream, vec![100]).unwrap().len();
            let at = at.index(stream.len());
            if cut {
                stream.truncate(at);
                prop_assert!(decode_all(&stream, vec![100]).map_or(true, |frames| frames.len() < whole));
            } else {
                stream[at] ^= 1 << bit;
                prop_assert!(decode_all(&stream, vec![100]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..4096),
            pieces in prop::collection::vec(1usize..500, 1..4),
        ) {
            let _ = decode_all(&bytes, pieces);
            let _ = Hello::decode(&bytes);
            let _ = EndPass::decode(&bytes);
            let _ = Seal::decode(&bytes);
            let _ = Abort::decode(&bytes);
            let _ = HelloAck::decode(&bytes);
            let _ = Delta::decode(&bytes);
            let _ = EndDelta::decode(&bytes);
        }

        #[test]
        fn arbitrary_headers_do_no_harm(kind in 0usize..15, mut bytes in prop::array::uniform32(any::<u8>())) {
            bytes[0] = Kind::ALL[kind] as u8;
            bytes[1..4].fill(0);
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            if let Ok(header) = Header::decode(&whole) {
                prop_assert_eq!(header.encode(), whole);
                let _ = in_pass().admit(&header);
                let _ = AnswerRules::new().admit(&header, &Told::default());
            }
        }
    }
}
