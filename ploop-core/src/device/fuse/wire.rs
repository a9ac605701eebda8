//! The FUSE protocol as bytes: requests of the kernel decoded, replies encoded. No I/O, no state.
//!
//! Only what a file system of one regular file needs. Numbers are the kernel's (`linux/fuse.h`), in native byte
//! order. Every field is read through a bounds check: a short or inconsistent request is a [`WireError`], never a
//! panic. A request that is well framed and unknown is [`Operation::Unknown`]; the server answers it with ENOSYS.

/// Bytes of the header in front of every request.
pub const REQUEST_HEADER_BYTES: usize = 40;
/// Bytes in front of the payload of a WRITE: request header and write arguments.
pub const WRITE_HEADER_BYTES: usize = 80;
/// Bytes of the header in front of every reply.
pub const REPLY_HEADER_BYTES: usize = 16;
/// The largest read or write we agree to, in bytes.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Pages in one transfer of that size.
pub const TRANSFER_PAGES_MAX: u16 = 256;
/// The only inode: the root of the mount, which is the exported file itself.
pub const ROOT_NODE: u64 = 1;
/// Protocol major version.
pub const MAJOR: u32 = 7;
/// The newest protocol minor version whose layouts are used here.
pub const MINOR: u32 = 40;
/// The oldest kernel protocol that is served (`max_pages` came with 7.28).
pub const MINOR_MIN: u32 = 28;

/// INIT: the kernel may have several reads of one file outstanding.
pub const ASYNC_READ: u64 = 1 << 0;
/// INIT: writes larger than a page.
pub const BIG_WRITES: u64 = 1 << 5;
/// INIT: direct I/O is asynchronous. Without it a loop device's requests run one by one.
pub const ASYNC_DIO: u64 = 1 << 15;
/// INIT: `max_pages` of the answer counts.
pub const MAX_PAGES: u64 = 1 << 22;
/// INIT: flags above bit 31 count.
pub const INIT_EXTENDED: u64 = 1 << 30;
/// INIT: the kernel sends again what a dead server left unanswered, when asked.
pub const HAS_RESEND: u64 = 1 << 39;

/// Set in the unique number of a request that is sent again.
pub const RESENT: u64 = 1 << 63;

/// OPEN: reads and writes go to the server, not to the page cache.
const OPEN_DIRECT_IO: u32 = 1 << 0;
/// OPEN: direct writes of one file may run in parallel.
const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// SETATTR: the size is to change.
pub const ATTRIBUTE_SIZE: u32 = 1 << 3;
/// SETATTR: mode, owner or group are to change.
pub const ATTRIBUTE_OWNERSHIP: u32 = 0b111;

/// FALLOCATE: give blocks back, keeping the size; the range reads as zeros.
pub const ALLOCATE_PUNCH: u32 = 0x03;
/// FALLOCATE: make the range read as zeros, keeping the size.
pub const ALLOCATE_ZERO: u32 = 0x11;

/// LSEEK: to the next byte that may hold data.
pub const SEEK_DATA: u32 = 3;
/// LSEEK: to the next hole.
pub const SEEK_HOLE: u32 = 4;

/// Why a request could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// Not even the header fits the bytes read: there is nobody to answer.
    Broken,
    /// The arguments do not fit; answer EINVAL to this unique number.
    Arguments(u64),
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number to answer with, unchanged.
    pub unique: u64,
    /// The inode meant.
    pub node: u64,
    /// Operation code as sent.
    pub code: u32,
}

/// What the kernel offers at the start of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Protocol major version.
    pub major: u32,
    /// Protocol minor version.
    pub minor: u32,
    /// Everything it can do.
    pub flags: u64,
}

/// What was agreed for the life of a mount: a later server must keep to it without being asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Protocol minor version in use.
    pub minor: u32,
    /// Flags in force.
    pub flags: u64,
}

impl Agreement {
    /// What we answer to `offer`; `None` when the kernel is too old to be served.
    pub fn with(offer: &Offer) -> Option<Self> {
        const WANTED: u64 = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXTENDED | HAS_RESEND;
        if offer.major != MAJOR || offer.minor < MINOR_MIN || offer.flags & MAX_PAGES == 0 {
            return None;
        }
        let mut flags = offer.flags & WANTED;
        if flags & INIT_EXTENDED == 0 {
            flags &= u64::from(u32::MAX);
        }
        Some(Self { minor: offer.minor.min(MINOR), flags })
    }

    /// Whether requests that a dead server left unanswered can be had again.
    pub fn can_resend(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }
}

/// A decoded request. Offsets and lengths are bytes of the file and not yet checked against its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The first request of a mount.
    Init(Offer),
    /// Attributes are asked for.
    GetAttributes,
    /// Attributes are to change: a mask of which, and the size if that is among them.
    SetAttributes {
        /// Which attributes.
        valid: u32,
        /// The size wanted.
        size: u64,
    },
    /// The file is opened.
    Open,
    /// Bytes are asked for.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes wanted.
        size: u32,
    },
    /// Bytes are sent; they begin right behind the first 80 bytes of the request.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes sent.
        size: u32,
    },
    /// Everything acknowledged must become durable.
    Sync,
    /// A descriptor was closed.
    Flush,
    /// The last descriptor of an open was closed.
    Release,
    /// Statistics of the file system.
    Statistics,
    /// Allocation of a range changes.
    Allocate {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// `fallocate` mode.
        mode: u32,
    },
    /// The next data or hole.
    Seek {
        /// Where to start.
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`.
        whence: u32,
    },
    /// Something that gets no reply: FORGET, BATCH_FORGET, INTERRUPT.
    Silent,
    /// The mount is gone.
    Destroy,
    /// Not served here.
    Unknown,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|field| u32::from_ne_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk::<8>().map(|field| u64::from_ne_bytes(*field))
}

/// Decodes a request of `total` bytes whose first 80 are in `head` and the others at the start of `rest`.
pub fn decode(
    head: &[u8; WRITE_HEADER_BYTES],
    rest: &[u8],
    total: usize,
) -> Result<(Header, Operation), WireError> {
    let framed = || {
        let length = u32_at(head, 0)?;
        let header = Header { code: u32_at(head, 4)?, unique: u64_at(head, 8)?, node: u64_at(head, 16)? };
        let fits = total >= REQUEST_HEADER_BYTES
            && total <= head.len() + rest.len()
            && usize::try_from(length) == Ok(total);
        fits.then_some(header)
    };
    let header = framed().ok_or(WireError::Broken)?;
    // Arguments of all operations but WRITE are short: put them in one piece.
    let mut gathered = [0; 256];
    let in_head = total.min(head.len());
    gathered[..in_head].copy_from_slice(&head[..in_head]);
    let in_rest = (total - in_head).min(gathered.len() - head.len());
    gathered[head.len()..head.len() + in_rest].copy_from_slice(&rest[..in_rest]);
    let arguments = &gathered[REQUEST_HEADER_BYTES..(in_head + in_rest).max(REQUEST_HEADER_BYTES)];
    decode_operation(header.code, arguments, total)
        .map(|operation| (header, operation))
        .ok_or(WireError::Arguments(header.unique))
}

fn decode_operation(code: u32, arguments: &[u8], total: usize) -> Option<Operation> {
    Some(match code {
        26 => {
            let low = u32_at(arguments, 12)?;
            // The high half exists only when the kernel says so; older ones send 16 bytes.
            let high = if u64::from(low) & INIT_EXTENDED != 0 { u32_at(arguments, 16)? } else { 0 };
            Operation::Init(Offer {
                major: u32_at(arguments, 0)?,
                minor: u32_at(arguments, 4)?,
                flags: u64::from(low) | u64::from(high) << 32,
            })
        }
        3 => Operation::GetAttributes,
        4 => Operation::SetAttributes { valid: u32_at(arguments, 0)?, size: u64_at(arguments, 16)? },
        14 => Operation::Open,
        15 => Operation::Read { offset: u64_at(arguments, 8)?, size: u32_at(arguments, 16)? },
        16 => {
            let size = u32_at(arguments, 16)?;
            if usize::try_from(size).ok()?.checked_add(WRITE_HEADER_BYTES)? != total {
                return None;
            }
            Operation::Write { offset: u64_at(arguments, 8)?, size }
        }
        17 => Operation::Statistics,
        18 => Operation::Release,
        20 => Operation::Sync,
        25 => Operation::Flush,
        43 => Operation::Allocate {
            offset: u64_at(arguments, 8)?,
            length: u64_at(arguments, 16)?,
            mode: u32_at(arguments, 24)?,
        },
        46 => Operation::Seek { offset: u64_at(arguments, 8)?, whence: u32_at(arguments, 16)? },
        2 | 36 | 42 => Operation::Silent,
        38 => Operation::Destroy,
        _ => Operation::Unknown,
    })
}

/// The header of a reply with `body` bytes behind it; `errno` is 0 or a positive error number.
/// `None` when the reply is too long for the protocol.
pub fn reply_header(unique: u64, errno: i32, body: usize) -> Option<[u8; REPLY_HEADER_BYTES]> {
    let length = u32::try_from(body.checked_add(REPLY_HEADER_BYTES)?).ok()?;
    let mut bytes = [0; REPLY_HEADER_BYTES];
    put(&mut bytes, 0, &length.to_ne_bytes());
    put(&mut bytes, 4, &errno.saturating_neg().to_ne_bytes());
    put(&mut bytes, 8, &unique.to_ne_bytes());
    Some(bytes)
}

/// The notification that makes the kernel send again everything that was read and not answered.
pub fn resend_notification() -> [u8; REPLY_HEADER_BYTES] {
    const NOTIFY_RESEND: i32 = 7;
    let mut bytes = [0; REPLY_HEADER_BYTES];
    put(&mut bytes, 0, &16u32.to_ne_bytes());
    put(&mut bytes, 4, &NOTIFY_RESEND.to_ne_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The answer to INIT.
pub fn init_reply(agreement: &Agreement) -> [u8; 64] {
    const BACKGROUND_MAX: u16 = 256;
    const CONGESTION: u16 = 192;
    let mut body = [0; 64];
    let [low, high] = halves(agreement.flags);
    put(&mut body, 0, &MAJOR.to_ne_bytes());
    put(&mut body, 4, &agreement.minor.to_ne_bytes());
    // max_readahead at 8 stays 0: the page cache is above the loop device.
    put(&mut body, 12, &low.to_ne_bytes());
    put(&mut body, 16, &BACKGROUND_MAX.to_ne_bytes());
    put(&mut body, 18, &CONGESTION.to_ne_bytes());
    put(&mut body, 20, &TRANSFER_BYTES_MAX.to_ne_bytes());
    put(&mut body, 24, &1u32.to_ne_bytes());
    put(&mut body, 28, &TRANSFER_PAGES_MAX.to_ne_bytes());
    put(&mut body, 32, &high.to_ne_bytes());
    body
}

/// The low and the high half of 64 flags.
fn halves(flags: u64) -> [u32; 2] {
    let bytes = flags.to_le_bytes();
    [0, 4].map(|at| u32_at(&bytes, at).map_or(0, u32::from_le))
}

/// Attributes of the exported file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Size in bytes.
    pub size: u64,
    /// 512-byte blocks in use.
    pub blocks: u64,
    /// Permissions, without the file type.
    pub permissions: u32,
    /// Owner.
    pub user: u32,
    /// Group.
    pub group: u32,
    /// Preferred transfer size in bytes.
    pub block_bytes: u32,
}

/// The answer to GETATTR and SETATTR. It is valid for no time at all, so that a grown disk is seen at once.
pub fn attributes_reply(attributes: &Attributes) -> [u8; 104] {
    const REGULAR_FILE: u32 = 0o100_000;
    let mut body = [0; 104];
    put(&mut body, 16, &ROOT_NODE.to_ne_bytes());
    put(&mut body, 24, &attributes.size.to_ne_bytes());
    put(&mut body, 32, &attributes.blocks.to_ne_bytes());
    put(&mut body, 76, &(REGULAR_FILE | attributes.permissions).to_ne_bytes());
    put(&mut body, 80, &1u32.to_ne_bytes());
    put(&mut body, 84, &attributes.user.to_ne_bytes());
    put(&mut body, 88, &attributes.group.to_ne_bytes());
    put(&mut body, 96, &attributes.block_bytes.to_ne_bytes());
    body
}

/// The answer to OPEN: no page cache of its own, parallel writes.
pub fn open_reply() -> [u8; 16] {
    let mut body = [0; 16];
    put(&mut body, 8, &(OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES).to_ne_bytes());
    body
}

/// The answer to WRITE: bytes written.
pub fn write_reply(size: u32) -> [u8; 8] {
    let mut body = [0; 8];
    put(&mut body, 0, &size.to_ne_bytes());
    body
}

/// The answer to LSEEK: the offset found.
pub fn seek_reply(offset: u64) -> [u8; 8] {
    offset.to_ne_bytes()
}

/// The answer to STATFS: `blocks` blocks of `block_bytes`, `free` of them not in use. The block size becomes the
/// loop device's discard granularity.
pub fn statistics_reply(blocks: u64, free: u64, block_bytes: u32) -> [u8; 80] {
    const NAME_BYTES_MAX: u32 = 255;
    let mut body = [0; 80];
    put(&mut body, 0, &blocks.to_ne_bytes());
    put(&mut body, 8, &free.to_ne_bytes());
    put(&mut body, 16, &free.to_ne_bytes());
    put(&mut body, 24, &1u64.to_ne_bytes());
    put(&mut body, 40, &block_bytes.to_ne_bytes());
    put(&mut body, 44, &NAME_BYTES_MAX.to_ne_bytes());
    put(&mut body, 48, &block_bytes.to_ne_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A request as the kernel would send it, cut into head and rest.
    fn request(code: u32, arguments: &[u8]) -> ([u8; WRITE_HEADER_BYTES], Vec<u8>, usize) {
        let total = REQUEST_HEADER_BYTES + arguments.len();
        let mut bytes = vec![0; total];
        put(&mut bytes, 0, &u32::try_from(total).unwrap().to_ne_bytes());
        put(&mut bytes, 4, &code.to_ne_bytes());
        put(&mut bytes, 8, &(RESENT | 9).to_ne_bytes());
        put(&mut bytes, 16, &ROOT_NODE.to_ne_bytes());
        put(&mut bytes, REQUEST_HEADER_BYTES, arguments);
        let mut head = [0; WRITE_HEADER_BYTES];
        let in_head = total.min(WRITE_HEADER_BYTES);
        head[..in_head].copy_from_slice(&bytes[..in_head]);
        (head, bytes[in_head..].to_vec(), total)
    }

    fn decoded(code: u32, arguments: &[u8]) -> Result<Operation, WireError> {
        let (head, rest, total) = request(code, arguments);
        decode(&head, &rest, total).map(|(header, operation)| {
            assert_eq!(header, Header { unique: RESENT | 9, node: ROOT_NODE, code });
            operation
        })
    }

    #[test]
    fn write_arguments_and_payload_length_agree() {
        let mut arguments = vec![0; 40 + 512];
        put(&mut arguments, 8, &4096u64.to_ne_bytes());
        put(&mut arguments, 16, &512u32.to_ne_bytes());
        assert_eq!(decoded(16, &arguments), Ok(Operation::Write { offset: 4096, size: 512 }));
        put(&mut arguments, 16, &513u32.to_ne_bytes());
        assert_eq!(decoded(16, &arguments), Err(WireError::Arguments(RESENT | 9)));
        put(&mut arguments, 16, &u32::MAX.to_ne_bytes());
        assert_eq!(decoded(16, &arguments), Err(WireError::Arguments(RESENT | 9)));
    }

    #[test]
    fn arguments_past_the_first_eighty_bytes_are_found() {
        let mut arguments = [0; 64];
        put(&mut arguments, 0, &MAJOR.to_ne_bytes());
        put(&mut arguments, 4, &45u32.to_ne_bytes());
        put(&mut arguments, 12, &u32::MAX.to_ne_bytes());
        put(&mut arguments, 16, &u32::MAX.to_ne_bytes());
        let Ok(Operation::Init(offer)) = decoded(26, &arguments) else { panic!("INIT was not decoded") };
        assert_eq!(offer, Offer { major: 7, minor: 45, flags: u64::MAX });
        let agreement = Agreement::with(&offer).unwrap();
        assert!(agreement.can_resend() && agreement.flags & ASYNC_DIO != 0 && agreement.minor == MINOR);
        assert_eq!(agreement.flags & (1 << 16), 0, "the writeback cache is never agreed");
        assert_eq!(u32_at(&init_reply(&agreement), 32), Some(1 << 7), "HAS_RESEND is bit 39");
    }

    #[test]
    fn old_kernels_are_refused_and_high_flags_need_the_extension() {
        let offer = Offer { major: 7, minor: 37, flags: HAS_RESEND | MAX_PAGES | ASYNC_DIO };
        assert!(!Agreement::with(&offer).unwrap().can_resend());
        assert_eq!(Agreement::with(&Offer { minor: 27, ..offer }), None);
        assert_eq!(Agreement::with(&Offer { major: 8, ..offer }), None);
    }

    #[test]
    fn framing_errors_are_told_apart_from_bad_arguments() {
        let (head, rest, total) = request(15, &[0; 40]);
        assert!(decode(&head, &rest, total).is_ok());
        assert_eq!(decode(&head, &rest, total - 1), Err(WireError::Broken));
        assert_eq!(decode(&head, &rest, 39), Err(WireError::Broken));
        assert_eq!(decoded(15, &[0; 8]), Err(WireError::Arguments(RESENT | 9)));
        assert_eq!(decoded(4711, &[]), Ok(Operation::Unknown));
    }

    #[test]
    fn reply_carries_the_negated_error_and_the_same_number() {
        let reply = reply_header(RESENT | 3, libc::EIO, 0).unwrap();
        assert_eq!(u32_at(&reply, 0), Some(16));
        assert_eq!(u32_at(&reply, 4).map(u32::cast_signed), Some(-libc::EIO));
        assert_eq!(u64_at(&reply, 8), Some(RESENT | 3));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(
            head in prop::collection::vec(any::<u8>(), WRITE_HEADER_BYTES),
            rest in prop::collection::vec(any::<u8>(), 0..300),
            code in 0u32..60,
            consistent in any::<bool>(),
        ) {
            let mut head: [u8; WRITE_HEADER_BYTES] = head.try_into().unwrap();
            let total = head.len() + rest.len();
            if consistent {
                put(&mut head, 0, &u32::try_from(total).unwrap().to_ne_bytes());
                put(&mut head, 4, &code.to_ne_bytes());
            }
            for total in [0, 39, 40, 79, 80, total, total + 1] {
                if let Ok((_, Operation::Write { size, .. })) = decode(&head, &rest, total) {
                    prop_assert!(size as usize <= rest.len());
                }
            }
        }
    }
}
