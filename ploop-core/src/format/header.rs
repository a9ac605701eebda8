//! The 64 bytes at the start of an image: [`RawHeader`] is what the file says, [`Header`] what we believe of it.
//!
//! A raw header decodes from any bytes and encodes to the same bytes. Only [`RawHeader::validate`] makes a
//! [`Header`], whose [`Geometry`] may be computed with. A header that is wrong in a way that still lets the disk be
//! read carries an obstacle to writing (class C of the crash model) instead of failing.

use crate::error::{Error, ErrorKind, Result};
use crate::units::{SECTOR_BYTES, Sectors};

use super::geometry::{CLUSTER_SECTORS_MAX, Geometry, Version, cylinders_and_heads};

// signature         16 bytes, ASCII, tells the version
// kind               4, always 2
// heads              4, informative
// cylinders          4, informative
// cluster            4, sectors
// entries            4
// disk               8, sectors; version 1 counts only the low 4 bytes
// in use             4
// data offset        4, sectors
// flags              4
// extension offset   8, sectors
const SIGNATURE: usize = 0;
const KIND: usize = SIGNATURE + 16;
const HEADS: usize = KIND + 4;
const CYLINDERS: usize = HEADS + 4;
const CLUSTER: usize = CYLINDERS + 4;
const ENTRIES: usize = CLUSTER + 4;
const DISK: usize = ENTRIES + 4;
const IN_USE: usize = DISK + 8;
const DATA_OFFSET: usize = IN_USE + 4;
const FLAGS: usize = DATA_OFFSET + 4;
const EXTENSION: usize = FLAGS + 4;
const END: usize = EXTENSION + 8;

/// Bytes of the header; the table follows at once.
pub const HEADER_BYTES: u64 = 64;
/// Signature of version 1.
pub const SIGNATURE_V1: [u8; 16] = *b"WithoutFreeSpace";
/// Signature of version 2.
pub const SIGNATURE_V2: [u8; 16] = *b"WithouFreSpacExt";
/// The value of the kind field, in both versions.
pub const KIND_EXPECTED: u32 = 2;
/// In-use mark of an image that is open for writing, or was not closed.
pub const IN_USE_OPEN: u32 = 0x746F_6E59;
/// In-use mark of a closed image whose format extension is valid.
pub const IN_USE_CLOSED_WITH_EXTENSION: u32 = 0x312E_3276;
/// Flag: nothing was ever written. Readers must not rely on it.
pub const FLAG_EMPTY: u32 = 1;
/// Flag: a conversion between the versions is under way; with the in-use mark the table may be half converted.
pub const FLAG_CONVERTING: u32 = 2;

/// What the in-use field says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InUse {
    /// Closed; an extension, if any, must be ignored.
    Closed,
    /// Closed, and the extension is valid.
    ClosedWithExtension,
    /// Open for writing, or not closed after a crash.
    Open,
    /// A value no writer is known to use; taken as closed and told.
    Other(u32),
}

impl InUse {
    /// The meaning of a stored value.
    pub fn decode(value: u32) -> Self {
        match value {
            0 => Self::Closed,
            IN_USE_CLOSED_WITH_EXTENSION => Self::ClosedWithExtension,
            IN_USE_OPEN => Self::Open,
            other => Self::Other(other),
        }
    }

    /// The stored value.
    pub fn encode(self) -> u32 {
        match self {
            Self::Closed => 0,
            Self::ClosedWithExtension => IN_USE_CLOSED_WITH_EXTENSION,
            Self::Open => IN_USE_OPEN,
            Self::Other(value) => value,
        }
    }
}

/// The fields as the file has them; nothing is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawHeader {
    /// Sixteen characters.
    pub signature: [u8; 16],
    /// Should be 2.
    pub kind: u32,
    /// Heads of an invented drive.
    pub heads: u32,
    /// Cylinders of an invented drive.
    pub cylinders: u32,
    /// Cluster size in sectors.
    pub cluster_sectors: u32,
    /// Entries of the table.
    pub entries: u32,
    /// Disk size in sectors; in version 1 the high half is junk.
    pub disk_sectors: u64,
    /// In-use mark; see [`InUse`].
    pub in_use: u32,
    /// Start of the data in sectors.
    pub data_offset_sectors: u32,
    /// Flags.
    pub flags: u32,
    /// Place of the format extension in sectors; 0 for none.
    pub extension_sectors: u64,
}

fn u32_at(bytes: &[u8; 64], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; 64], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

impl RawHeader {
    /// Takes the fields apart.
    pub fn decode(bytes: &[u8; 64]) -> Self {
        let mut signature = [0; 16];
        signature.copy_from_slice(&bytes[SIGNATURE..KIND]);
        Self {
            signature,
            kind: u32_at(bytes, KIND),
            heads: u32_at(bytes, HEADS),
            cylinders: u32_at(bytes, CYLINDERS),
            cluster_sectors: u32_at(bytes, CLUSTER),
            entries: u32_at(bytes, ENTRIES),
            disk_sectors: u64_at(bytes, DISK),
            in_use: u32_at(bytes, IN_USE),
            data_offset_sectors: u32_at(bytes, DATA_OFFSET),
            flags: u32_at(bytes, FLAGS),
            extension_sectors: u64_at(bytes, EXTENSION),
        }
    }

    /// Puts the fields together: the exact opposite of [`decode`](Self::decode).
    pub fn encode(&self) -> [u8; 64] {
        let mut bytes = [0; END];
        bytes[SIGNATURE..KIND].copy_from_slice(&self.signature);
        for (at, value) in [
            (KIND, self.kind),
            (HEADS, self.heads),
            (CYLINDERS, self.cylinders),
            (CLUSTER, self.cluster_sectors),
            (ENTRIES, self.entries),
            (IN_USE, self.in_use),
            (DATA_OFFSET, self.data_offset_sectors),
            (FLAGS, self.flags),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [(DISK, self.disk_sectors), (EXTENSION, self.extension_sectors)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Whether the signature is one of ours; says nothing about the rest.
    pub fn version(&self) -> Option<Version> {
        match self.signature {
            SIGNATURE_V1 => Some(Version::V1),
            SIGNATURE_V2 => Some(Version::V2),
            _ => None,
        }
    }

    /// Checks everything that can be checked without the table, against a file of `file_bytes` bytes. Fails with
    /// `Corrupt` if the disk cannot be read at all.
    pub fn validate(&self, file_bytes: u64) -> Result<Header> {
        let corrupt = |message: String| Error::new(ErrorKind::Corrupt, message).at_offset(0);
        let version = self.version().ok_or_else(|| {
            corrupt("read header: the signature is not that of an image".into())
                .advise("is this the right file? a raw disk has no header")
        })?;
        if self.kind != KIND_EXPECTED {
            return Err(corrupt(format!("read header: kind {} where 2 is expected", self.kind)));
        }
        let disk_sectors = match version {
            Version::V1 => self.disk_sectors & 0xFFFF_FFFF,
            Version::V2 => self.disk_sectors,
        };
        let table_bytes = HEADER_BYTES + 4 * u64::from(self.entries);
        if table_bytes > file_bytes {
            return Err(corrupt(format!(
                "read header: a table of {} entries does not fit a file of {file_bytes} bytes",
                self.entries
            ))
            .advise("the file was cut; restore it from a backup"));
        }
        let cluster_bytes = u64::from(self.cluster_sectors.max(1)) * SECTOR_BYTES;
        let (data_start, offset_obstacle) = self.data_start(version, table_bytes, cluster_bytes, file_bytes);
        let geometry =
            Geometry::from_header(version, self.cluster_sectors, disk_sectors, self.entries, data_start)
                .map_err(|error| error.at_offset(0))?;
        let obstacle = offset_obstacle.or_else(|| {
            if geometry.bytes_beyond_table() > 0 {
                Some(format!("the disk is {} bytes larger than its table", geometry.bytes_beyond_table()))
            } else if self.cluster_sectors > CLUSTER_SECTORS_MAX {
                Some(format!("clusters of {} sectors are too large to be written", self.cluster_sectors))
            } else {
                None
            }
        });
        Ok(Header { raw: self.clone(), geometry, obstacle })
    }

    /// Where data begin, and what is wrong with that. A wrong offset is replaced by the smallest right one: the
    /// table says where each cluster is, the offset only where none can be.
    fn data_start(
        &self,
        version: Version,
        table_bytes: u64,
        cluster_bytes: u64,
        file_bytes: u64,
    ) -> (u64, Option<String>) {
        let stored = u64::from(self.data_offset_sectors) * SECTOR_BYTES;
        let table_end = table_bytes.next_multiple_of(SECTOR_BYTES);
        let file_end = file_bytes.saturating_add(SECTOR_BYTES - 1);
        let (least, fits) = match version {
            Version::V1 if stored == 0 => return (table_end, None),
            Version::V1 => (table_end, stored >= table_end),
            Version::V2 => {
                let least = table_bytes.div_ceil(cluster_bytes) * cluster_bytes;
                (least, stored >= least && stored.is_multiple_of(cluster_bytes))
            }
        };
        if fits && stored <= file_end {
            return (stored, None);
        }
        (least, Some(format!("the header says that data begin at byte {stored}, which cannot be")))
    }
}

/// A header whose numbers fit each other and the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    raw: RawHeader,
    geometry: Geometry,
    obstacle: Option<String>,
}

impl Header {
    /// The header of a new image: closed, empty, no extension.
    pub fn create(geometry: &Geometry) -> Result<Self> {
        let (cylinders, heads) = cylinders_and_heads(geometry.disk_sectors().0);
        let data_offset_sectors = u32::try_from(geometry.data_start().0 / SECTOR_BYTES).map_err(|_| {
            Error::new(ErrorKind::Parameter, "create image: the table is too long")
                .advise("use larger clusters")
        })?;
        let raw = RawHeader {
            signature: match geometry.version() {
                Version::V1 => SIGNATURE_V1,
                Version::V2 => SIGNATURE_V2,
            },
            kind: KIND_EXPECTED,
            heads,
            cylinders,
            cluster_sectors: geometry.cluster_sectors(),
            entries: geometry.entries(),
            disk_sectors: geometry.disk_sectors().0,
            in_use: InUse::Closed.encode(),
            data_offset_sectors,
            flags: FLAG_EMPTY,
            extension_sectors: 0,
        };
        Ok(Self { raw, geometry: geometry.clone(), obstacle: None })
    }

    /// This header with the sizes of `geometry`, which [`Geometry::resized`] has made of its own; all else stays.
    pub(crate) fn resized(&self, geometry: &Geometry) -> Result<Self> {
        let created = Self::create(geometry)?;
        let raw = RawHeader {
            heads: created.raw.heads,
            cylinders: created.raw.cylinders,
            entries: created.raw.entries,
            disk_sectors: created.raw.disk_sectors,
            data_offset_sectors: created.raw.data_offset_sectors,
            ..self.raw.clone()
        };
        Ok(Self { raw, geometry: geometry.clone(), obstacle: None })
    }

    /// The 64 bytes.
    pub fn encode(&self) -> [u8; 64] {
        self.raw.encode()
    }

    /// The fields as they are stored.
    pub fn raw(&self) -> &RawHeader {
        &self.raw
    }

    /// The sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The in-use mark.
    pub fn in_use(&self) -> InUse {
        InUse::decode(self.raw.in_use)
    }

    /// Whether a version conversion was cut: the table may be half in one unit, half in the other.
    pub fn is_half_converted(&self) -> bool {
        self.in_use() == InUse::Open && self.raw.flags & FLAG_CONVERTING != 0
    }

    /// Where the format extension lies, if the header names one.
    pub fn extension(&self) -> Option<Sectors> {
        (self.raw.extension_sectors != 0).then_some(Sectors(self.raw.extension_sectors))
    }

    /// Why this image may be read but not written, if so.
    pub fn obstacle(&self) -> Option<&str> {
        self.obstacle.as_deref()
    }

    /// Becomes the header of an image in use: mark set, extension dropped, "empty" taken back.
    pub(crate) fn set_open(&mut self) {
        self.raw.in_use = InUse::Open.encode();
        self.raw.extension_sectors = 0;
        self.raw.flags &= !FLAG_EMPTY;
    }

    /// Becomes the header of a closed image without extension.
    pub(crate) fn set_closed(&mut self) {
        self.raw.in_use = InUse::Closed.encode();
        self.raw.extension_sectors = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_tile_the_header() {
        let fields =
            [(SIGNATURE, 16), (KIND, 4), (HEADS, 4), (CYLINDERS, 4), (CLUSTER, 4), (ENTRIES, 4), (DISK, 8)]
                .into_iter()
                .chain([(IN_USE, 4), (DATA_OFFSET, 4), (FLAGS, 4), (EXTENSION, 8)]);
        let end = fields.fold(0, |end, (at, len)| {
            assert_eq!(at, end);
            at + len
        });
        assert_eq!((end, END as u64), (64, HEADER_BYTES));
        // The places the specification gives.
        assert_eq!([KIND, CLUSTER, ENTRIES, DISK, IN_USE], [16, 28, 32, 36, 44]);
        assert_eq!([DATA_OFFSET, FLAGS, EXTENSION], [48, 52, 56]);
    }

    fn sound(version: Version) -> RawHeader {
        let geometry = Geometry::new(version, Sectors(64), Sectors(640)).unwrap();
        Header::create(&geometry).unwrap().raw().clone()
    }

    #[test]
    fn created_headers_validate() {
        for version in [Version::V1, Version::V2] {
            let header = sound(version).validate(1 << 20).unwrap();
            assert_eq!(header.geometry(), &Geometry::new(version, Sectors(64), Sectors(640)).unwrap());
            assert_eq!((header.in_use(), header.extension(), header.obstacle()), (InUse::Closed, None, None));
            assert_eq!(RawHeader::decode(&header.encode()), sound(version));
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let broken: [fn(&mut RawHeader); 8] = [
            |header| header.signature[3] ^= 1,
            |header| header.kind = 1,
            |header| header.cluster_sectors = 0,
            |header| header.cluster_sectors = CLUSTER_SECTORS_MAX * 32,
            |header| header.entries = u32::MAX,
            |header| header.entries = 300_000,
            |header| header.disk_sectors = u64::MAX,
            |header| header.disk_sectors = 1 << 55,
        ];
        for (index, change) in broken.into_iter().enumerate() {
            let mut raw = sound(Version::V2);
            change(&mut raw);
            assert_eq!(raw.validate(1 << 20).unwrap_err().kind(), ErrorKind::Corrupt, "case {index}");
        }
        assert!(sound(Version::V2).validate(103).is_err(), "the table is cut");
        assert!(sound(Version::V2).validate(u64::MAX).is_ok());
    }

    #[test]
    fn what_can_be_read_but_not_written_says_so() {
        let broken: [fn(&mut RawHeader); 6] = [
            |header| header.data_offset_sectors = 0,
            |header| header.data_offset_sectors = 63,
            |header| header.data_offset_sectors = 96,
            |header| header.data_offset_sectors = u32::MAX,
            |header| header.disk_sectors = 641,
            |header| header.data_offset_sectors = 64 * 1000,
        ];
        for (index, change) in broken.into_iter().enumerate() {
            let mut raw = sound(Version::V2);
            change(&mut raw);
            let header = raw.validate(1 << 20).unwrap();
            assert!(header.obstacle().is_some(), "case {index}");
            assert_eq!(header.geometry().data_start().0, 32_768);
        }
        let mut larger = sound(Version::V2);
        larger.data_offset_sectors = 128;
        assert_eq!(larger.validate(1 << 20).unwrap().obstacle(), None);
    }

    #[test]
    fn old_images_of_version_1() {
        let mut raw = sound(Version::V1);
        raw.cluster_sectors = 63;
        raw.disk_sectors = 630 | 0xDEAD_BEEF << 32;
        raw.data_offset_sectors = 0;
        let header = raw.validate(1 << 20).unwrap();
        assert_eq!(header.geometry().disk_sectors(), Sectors(630));
        assert_eq!((header.geometry().data_start().0, header.obstacle()), (512, None));
        assert_eq!(header.encode(), raw.encode(), "junk is kept");
        raw.data_offset_sectors = 1;
        assert_eq!(raw.validate(1 << 20).unwrap().obstacle(), None);
        raw.data_offset_sectors = 5;
        assert_eq!(raw.validate(1 << 20).unwrap().geometry().data_start().0, 2560);
    }

    #[test]
    fn marks_keep_their_values() {
        for value in [0, IN_USE_OPEN, IN_USE_CLOSED_WITH_EXTENSION, 1, u32::MAX] {
            assert_eq!(InUse::decode(value).encode(), value);
        }
        let mut header = sound(Version::V2).validate(1 << 20).unwrap();
        header.set_open();
        assert_eq!((header.in_use(), header.raw().flags), (InUse::Open, 0));
        assert!(!header.is_half_converted());
    }

    proptest! {
        #[test]
        fn any_bytes_survive(bytes in prop::array::uniform32(any::<u16>())) {
            let mut header = [0; 64];
            for (two, value) in header.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *two = value.to_le_bytes();
            }
            prop_assert_eq!(RawHeader::decode(&header).encode(), header);
        }

        #[test]
        fn no_header_makes_it_panic(
            v1 in any::<bool>(), cluster in any::<u32>(), entries in any::<u32>(), disk in any::<u64>(),
            data in any::<u32>(), len in any::<u64>(), shift in 0u32..32,
        ) {
            let raw = RawHeader {
                signature: if v1 { SIGNATURE_V1 } else { SIGNATURE_V2 },
                cluster_sectors: cluster >> shift,
                entries: entries >> (data % 32),
                disk_sectors: disk >> (entries % 64),
                data_offset_sectors: data >> shift,
                ..sound(Version::V2)
            };
            if let Ok(header) = raw.validate(len) {
                let geometry = header.geometry();
                prop_assert!(geometry.table_bytes() <= len && geometry.data_start().0 >= geometry.table_bytes());
                prop_assert!(header.obstacle().is_some() || geometry.bytes_beyond_table() == 0);
            }
        }
    }
}
