//! Payloads of the frames: fixed layouts, every field within its limits.

use super::{
    ABORT_TEXT_BYTES_MAX, DELTAS_LIMIT, DELTAS_VERSION, DIGEST_BYTES, DISK_BYTES_LIMIT, Digest, FLAT_VERSION,
    MAGIC, PAYLOAD_BYTES_LIMIT, SECTOR_BYTES, WINDOW_BYTES_LIMIT, WINDOW_BYTES_MIN, WireError,
};

/// Fields in a fixed number of bytes, whose length was checked.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = N.min(self.0.len());
        array[..taken].copy_from_slice(&self.0[..taken]);
        self.0 = &self.0[taken..];
        array
    }
    pub(super) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }
    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

pub(super) fn expect_length(payload: &[u8], bytes: usize, name: &'static str) -> Result<(), WireError> {
    if payload.len() == bytes { Ok(()) } else { Err(WireError::Field(name)) }
}

/// How the copy shall be stored, as far as the sender has a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A ploop image that grows.
    Expanded,
    /// A plain file.
    Raw,
    /// A ploop image with all its clusters in place.
    Preallocated,
}

/// The byte that stands for a kind of image.
pub(super) fn image_byte(image: ImageKind) -> u8 {
    match image {
        ImageKind::Expanded => 0,
        ImageKind::Raw => 1,
        ImageKind::Preallocated => 2,
    }
}

/// The kind of image that a byte stands for.
pub(super) fn image_kind(byte: u8) -> Result<ImageKind, WireError> {
    match byte {
        0 => Ok(ImageKind::Expanded),
        1 => Ok(ImageKind::Raw),
        2 => Ok(ImageKind::Preallocated),
        _ => Err(WireError::Field("image kind")),
    }
}

/// Payload of `Hello`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whether answers are expected, and a `Commit` will come.
    pub two_way: bool,
    /// Cluster size of the source in sectors; a wish.
    pub cluster_sectors: u32,
    /// Size of the disk in bytes, a multiple of a sector.
    pub disk_bytes: u64,
    /// Format version of the source, 1 or 2; a wish.
    pub version: u8,
    /// Kind of image of the source; a wish.
    pub image: ImageKind,
    /// Names this copy: random, the same in the name of the incoming file.
    pub copy_id: [u8; 16],
    /// The most bytes of frames the sender would keep outstanding.
    pub window_bytes: u64,
    /// Longest payload in this stream.
    pub payload_bytes_max: u32,
    /// Bytes of disk that hold data, as far as the sender knows; 0 when it does not.
    pub data_bytes: u64,
    /// Deltas that follow, the current state's among them; 0 in a stream of the content alone.
    pub deltas: u32,
}

impl Hello {
    /// Encoded length.
    pub const BYTES: usize = 80;
    const TWO_WAY: u16 = 1;

    /// The version of the stream: a receiver that knows nothing of deltas refuses them at once.
    pub fn protocol_version(&self) -> u16 {
        if self.deltas > 0 { DELTAS_VERSION } else { FLAT_VERSION }
    }

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.protocol_version().to_le_bytes());
        bytes.extend((if self.two_way { Self::TWO_WAY } else { 0 }).to_le_bytes());
        bytes.extend(self.cluster_sectors.to_le_bytes());
        bytes.extend(self.disk_bytes.to_le_bytes());
        bytes.extend([self.version, image_byte(self.image), 0, 0]);
        bytes.extend(self.payload_bytes_max.to_le_bytes());
        bytes.extend(self.copy_id);
        bytes.extend(self.window_bytes.to_le_bytes());
        bytes.extend(self.data_bytes.to_le_bytes());
        bytes.extend(self.deltas.to_le_bytes());
        bytes.resize(Self::BYTES, 0);
        bytes
    }

    /// The payload in those bytes, every field within its limits.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "hello")?;
        let mut fields = Fields(payload);
        if fields.array::<8>() != MAGIC {
            return Err(WireError::Magic);
        }
        let protocol = fields.u16();
        if !(FLAT_VERSION..=DELTAS_VERSION).contains(&protocol) {
            return Err(WireError::Version(protocol));
        }
        let flags = fields.u16();
        let cluster_sectors = fields.u32();
        let disk_bytes = fields.u64();
        let version = fields.u8();
        let image = image_kind(fields.u8())?;
        let reserved = fields.u16();
        let payload_bytes_max = fields.u32();
        let copy_id = fields.array();
        let window_bytes = fields.u64();
        let data_bytes = fields.u64();
        let deltas = fields.u32();
        let rest: [u8; 12] = fields.array();
        let says_deltas = protocol == DELTAS_VERSION;
        if flags & !Self::TWO_WAY != 0 || reserved != 0 || rest != [0; 12] || !says_deltas && deltas != 0 {
            return Err(WireError::Reserved);
        }
        if says_deltas && !(1..=DELTAS_LIMIT).contains(&deltas) {
            return Err(WireError::Field("number of deltas"));
        }
        if disk_bytes == 0 || disk_bytes > DISK_BYTES_LIMIT || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(WireError::Field("disk size"));
        }
        if !(1..=2).contains(&version) {
            return Err(WireError::Field("format version"));
        }
        if !(4096..=PAYLOAD_BYTES_LIMIT).contains(&payload_bytes_max) {
            return Err(WireError::Field("longest payload"));
        }
        Ok(Self {
            two_way: flags & Self::TWO_WAY != 0,
            cluster_sectors,
            disk_bytes,
            version,
            image,
            copy_id,
            window_bytes,
            payload_bytes_max,
            data_bytes,
            deltas,
        })
    }
}

/// Payload of `EndPass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndPass {
    /// Number of the pass that ends, from 1.
    pub pass: u32,
    /// Sync, read back, and answer `PassDurable` before anything that follows is applied. Without it the receiver
    /// only finishes its writes, so that the next pass may write the same places.
    pub durable: bool,
    /// The disk is frozen and nothing but the `Seal` follows.
    pub last: bool,
}

impl EndPass {
    /// Encoded length.
    pub const BYTES: usize = 8;

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u32::from(self.durable) | u32::from(self.last) << 1;
        [self.pass.to_le_bytes(), flags.to_le_bytes()].concat()
    }

    /// The payload in those bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "end of pass")?;
        let mut fields = Fields(payload);
        let (pass, flags) = (fields.u32(), fields.u32());
        if flags > 3 || flags == 2 {
            return Err(WireError::Field("pass flags"));
        }
        Ok(Self { pass, durable: flags & 1 != 0, last: flags & 2 != 0 })
    }
}

/// Payload of `Seal`: everything about the stream that both sides can count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Digest over all frames before this one.
    pub transcript: Digest,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Numbered frames before this one.
    pub frames: u64,
    /// Bytes in `Data` frames.
    pub data_bytes: u64,
    /// Bytes covered by `Zero` frames.
    pub zero_bytes: u64,
}

impl Seal {
    /// Encoded length.
    pub const BYTES: usize = 64;

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.transcript.to_vec();
        for number in [self.disk_bytes, self.frames, self.data_bytes, self.zero_bytes] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// The payload in those bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "seal")?;
        let mut fields = Fields(payload);
        Ok(Self {
            transcript: fields.array(),
            disk_bytes: fields.u64(),
            frames: fields.u64(),
            data_bytes: fields.u64(),
            zero_bytes: fields.u64(),
        })
    }
}

/// Payload of `Abort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Exit code of the side that gives up.
    pub code: u8,
    /// Why, in words. From a peer: hostile text, already free of control characters and bounded.
    pub text: String,
}

impl Abort {
    /// Encoded length.
    pub const BYTES: usize = 8 + ABORT_TEXT_BYTES_MAX;

    /// The payload as it travels; text past the limit is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut end = self.text.len().min(ABORT_TEXT_BYTES_MAX);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = vec![self.code, 0, 0, 0];
        bytes.extend(u32::try_from(end).unwrap_or(0).to_le_bytes());
        bytes.extend(&self.text.as_bytes()[..end]);
        bytes.resize(Self::BYTES, 0);
        bytes
    }

    /// The payload in those bytes; what is not printable becomes `?`.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "abort")?;
        let mut fields = Fields(payload);
        let code = fields.u8();
        if fields.array::<3>() != [0; 3] {
            return Err(WireError::Reserved);
        }
        let length = usize::try_from(fields.u32()).ok().filter(|length| *length <= ABORT_TEXT_BYTES_MAX);
        let length = length.ok_or(WireError::Field("abort text"))?;
        Ok(Self { code, text: printable(&payload[8..8 + length]) })
    }
}

/// Bytes from outside as text that is safe on a terminal: control characters and what is no UTF-8 become `?`.
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|letter| if letter.is_control() || letter == char::REPLACEMENT_CHARACTER { '?' } else { letter })
        .collect()
}

/// Payload of `HelloAck`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloAck {
    /// The most bytes of numbered frames that may be sent and not yet credited.
    pub window_bytes: u64,
    /// The version of the stream that is answered.
    pub protocol_version: u16,
}

impl HelloAck {
    /// Encoded length.
    pub const BYTES: usize = 16;

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.window_bytes.to_le_bytes().to_vec();
        bytes.extend(u64::from(self.protocol_version).to_le_bytes());
        bytes
    }

    /// The payload in those bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "hello answer")?;
        let mut fields = Fields(payload);
        let (window_bytes, version) = (fields.u64(), fields.u64());
        let protocol_version = u16::try_from(version).unwrap_or(u16::MAX);
        if !(FLAT_VERSION..=DELTAS_VERSION).contains(&protocol_version) {
            return Err(WireError::Version(protocol_version));
        }
        if !(WINDOW_BYTES_MIN..=WINDOW_BYTES_LIMIT).contains(&window_bytes) {
            return Err(WireError::Field("window"));
        }
        Ok(Self { window_bytes, protocol_version })
    }
}

/// Payload of `Credit`: bytes of numbered frames dealt with since the start.
pub fn decode_credit(payload: &[u8]) -> Result<u64, WireError> {
    expect_length(payload, 8, "credit")?;
    Ok(Fields(payload).u64())
}

/// Payload of `PassDurable`: the number of the pass.
pub fn decode_pass(payload: &[u8]) -> Result<u32, WireError> {
    expect_length(payload, 8, "durable pass")?;
    u32::try_from(Fields(payload).u64()).map_err(|_| WireError::Field("durable pass"))
}

/// Payload of `Verdict`: the receiver's transcript.
pub fn decode_verdict(payload: &[u8]) -> Result<Digest, WireError> {
    expect_length(payload, DIGEST_BYTES, "verdict")?;
    Ok(Fields(payload).array())
}
