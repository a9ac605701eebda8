//! The format extension: one cluster of feature records with a checksum, outside the table.
//!
//! It is never trusted because the header names it: a writer that knows no extension leaves stale pointers behind.
//! [`load`] believes it only if the image was closed by a writer that says so, its place is a free cluster of the file,
//! its checksum fits, and every record keeps its bounds. Anything else drops the extension, never the disk.

use std::collections::HashSet;

use md5::{Digest, Md5};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoBuf, Storage, StorageExt};
use crate::units::{FileCluster, FileOffset, SECTOR_BYTES, Sectors};

use super::geometry::{CLUSTER_SECTORS_MAX, Geometry};
use super::header::{Header, InUse};

// extension cluster:  magic 8, MD5 of the rest 16, then records
// record:             magic 8, flags 8, data bytes 4, zero 4, data, padding to 8
// dirty bitmap data:  disk sectors 8, id 16, granularity in sectors 4, map length 4, map of 8-byte entries
const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
const CHECKSUM_AT: usize = 8;
const RECORDS_AT: usize = 24;
const RECORD_HEADER: usize = 24;
const BITMAP_HEADER: usize = 32;
/// More records than this are taken for nonsense.
const RECORDS_MAX: usize = 1024;

/// Magic of a dirty bitmap record.
pub const DIRTY_BITMAP_MAGIC: u64 = 0x2038_5FAE_252C_B34A;
/// Record flag: whoever does not know the record must not change the file.
pub const FLAG_NECESSARY: u64 = 1;
/// Record flag: whoever does not know the record must keep it.
pub const FLAG_TRANSIT: u64 = 2;

/// One feature record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Which feature.
    pub magic: u64,
    /// [`FLAG_NECESSARY`], [`FLAG_TRANSIT`].
    pub flags: u64,
    /// Its data.
    pub data: Vec<u8>,
}

impl Feature {
    /// Whether we may change an image that carries this record.
    pub fn forbids_writing(&self) -> bool {
        self.magic != DIRTY_BITMAP_MAGIC && self.flags & FLAG_NECESSARY != 0
    }
}

/// Where a piece of a stored bitmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapPiece {
    /// Every bit is clear.
    AllClear,
    /// Every bit is set.
    AllSet,
    /// In the cluster that begins here.
    At(FileOffset),
}

/// The description of a stored dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name, in textual order of a UUID.
    pub id: [u8; 16],
    /// Sectors that one bit stands for; a power of two.
    pub granularity_sectors: u32,
    /// One piece per cluster of bits; empty when every bit is clear.
    pub pieces: Vec<BitmapPiece>,
}

/// A believed extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Where its cluster begins.
    pub offset: FileOffset,
    /// Its records, in order.
    pub features: Vec<Feature>,
}

/// What there is behind the header's extension offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The header names none.
    Absent,
    /// The header names one that must not be believed, and why.
    Invalid(String),
    /// A sound one.
    Valid(Extension),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|field| field.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Looks at the extension of an image of `file_bytes` bytes. `is_used` says whether a table entry names a cluster.
/// Fails only when the file cannot be read.
pub fn load(
    storage: &dyn Storage,
    header: &Header,
    file_bytes: u64,
    is_used: &dyn Fn(FileCluster) -> bool,
) -> Result<Found> {
    let Some(place) = header.extension() else { return Ok(Found::Absent) };
    let invalid = |why: &str| Ok(Found::Invalid(why.into()));
    if header.in_use() != InUse::ClosedWithExtension {
        return invalid("the last writer did not say that it is valid");
    }
    let geometry = header.geometry();
    if geometry.cluster_sectors() > CLUSTER_SECTORS_MAX {
        return invalid("its cluster is too large");
    }
    let offset = match place.checked_bytes() {
        Some(bytes) if is_free_cluster(geometry, bytes, file_bytes, is_used) => bytes,
        _ => return invalid("its place is not a free cluster of the file"),
    };
    let failed = |source| Error::io(ErrorKind::Read, "read format extension", source).at_offset(offset);
    let len = usize::try_from(geometry.cluster_bytes()).unwrap_or(usize::MAX);
    let mut cluster = IoBuf::try_zeroed(len).map_err(failed)?;
    storage.read_exact_at(offset, cluster.as_mut_slice()).map_err(failed)?;
    Ok(match parse(cluster.as_slice()) {
        Ok(features) => Found::Valid(Extension { offset: FileOffset(offset), features }),
        Err(why) => Found::Invalid(why),
    })
}

/// The clusters of a believed extension and of its stored bitmaps that `is_used` names as well: a guest's entry leads there. What
/// the guest reads in them was written as an extension or as a bitmap, or the other way round; its next write destroys that.
pub(crate) fn claimed(
    storage: &dyn Storage,
    header: &Header,
    file_bytes: u64,
    is_used: &dyn Fn(FileCluster) -> bool,
) -> Result<Vec<FileCluster>> {
    let geometry = header.geometry();
    let mut claimed = Vec::new();
    if header.in_use() != InUse::ClosedWithExtension {
        return Ok(claimed);
    }
    let mut look = |offset: u64| {
        if let Ok(cluster) = u32::try_from(offset / geometry.cluster_bytes())
            && offset >= geometry.data_start().0
            && is_used(FileCluster(cluster))
            && !claimed.contains(&FileCluster(cluster))
        {
            claimed.push(FileCluster(cluster));
        }
    };
    if let Some(offset) = header.extension().and_then(Sectors::checked_bytes) {
        look(offset);
    }
    // Where they are, whoever else is there.
    if let Found::Valid(extension) = load(storage, header, file_bytes, &|_| false)? {
        for feature in &extension.features {
            let Ok(bitmap) = parse_bitmap(feature, geometry, file_bytes, &|_| false) else { continue };
            for piece in &bitmap.pieces {
                if let BitmapPiece::At(offset) = piece {
                    look(offset.0);
                }
            }
        }
    }
    Ok(claimed)
}

fn is_free_cluster(
    geometry: &Geometry,
    offset: u64,
    file_bytes: u64,
    is_used: &dyn Fn(FileCluster) -> bool,
) -> bool {
    let data_start = geometry.data_start().0;
    offset >= data_start
        && (offset - data_start).is_multiple_of(geometry.cluster_bytes())
        && offset.checked_add(geometry.cluster_bytes()).is_some_and(|end| end <= file_bytes)
        && u32::try_from(offset / geometry.cluster_bytes())
            .is_ok_and(|cluster| !is_used(FileCluster(cluster)))
}

/// Takes an extension cluster apart. The error says what is wrong.
pub fn parse(cluster: &[u8]) -> std::result::Result<Vec<Feature>, String> {
    if cluster.len() < RECORDS_AT || u64_at(cluster, 0) != MAGIC {
        return Err("it has no signature".into());
    }
    if Md5::digest(&cluster[RECORDS_AT..])[..] != cluster[CHECKSUM_AT..RECORDS_AT] {
        return Err("its checksum is wrong".into());
    }
    let mut features = Vec::new();
    let mut at = RECORDS_AT;
    loop {
        let Some(record) = cluster.get(at..).filter(|rest| rest.len() >= RECORD_HEADER) else {
            // A cluster that is full to the last record has no room for an end mark.
            return Ok(features);
        };
        let (magic, flags, len) = (u64_at(record, 0), u64_at(record, 8), u32_at(record, 16));
        if magic == 0 {
            return Ok(features);
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let data = len
            .checked_add(RECORD_HEADER)
            .and_then(|end| record.get(RECORD_HEADER..end))
            .ok_or_else(|| format!("record {magic:#x} is longer than the cluster"))?;
        if features.len() == RECORDS_MAX {
            return Err(format!("it has more than {RECORDS_MAX} records"));
        }
        features.push(Feature { magic, flags, data: data.to_vec() });
        at = (at + RECORD_HEADER + len).next_multiple_of(8);
    }
}

/// Puts an extension cluster together; `None` when the records do not fit.
pub fn build(features: &[Feature], cluster_bytes: usize) -> Option<Vec<u8>> {
    let mut cluster = vec![0; RECORDS_AT];
    cluster[..8].copy_from_slice(&MAGIC.to_le_bytes());
    for feature in features {
        cluster.extend(feature.magic.to_le_bytes());
        cluster.extend(feature.flags.to_le_bytes());
        cluster.extend(u32::try_from(feature.data.len()).ok()?.to_le_bytes());
        cluster.extend([0; 4]);
        cluster.extend(&feature.data);
        cluster.resize(cluster.len().next_multiple_of(8), 0);
    }
    if cluster.len() > cluster_bytes {
        return None;
    }
    cluster.resize(cluster_bytes, 0);
    let checksum = Md5::digest(&cluster[RECORDS_AT..]);
    cluster[CHECKSUM_AT..RECORDS_AT].copy_from_slice(&checksum);
    Some(cluster)
}

/// Takes a dirty bitmap record apart: sizes against the disk, pieces inside the file and no two in one place. The
/// error says what is wrong; such a bitmap counts as "everything is dirty".
pub fn parse_bitmap(
    feature: &Feature,
    geometry: &Geometry,
    file_bytes: u64,
    is_used: &dyn Fn(FileCluster) -> bool,
) -> std::result::Result<StoredBitmap, String> {
    let data = &feature.data;
    if feature.magic != DIRTY_BITMAP_MAGIC || data.len() < BITMAP_HEADER {
        return Err("it is not a bitmap record".into());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&data[8..24]);
    let (disk_sectors, granularity_sectors) = (u64_at(data, 0), u32_at(data, 24));
    let pieces = usize::try_from(u32_at(data, 28)).unwrap_or(usize::MAX);
    if disk_sectors != geometry.disk_sectors().0 {
        return Err(format!("it is for a disk of {disk_sectors} sectors"));
    }
    if !granularity_sectors.is_power_of_two() {
        return Err(format!("a granularity of {granularity_sectors} sectors is not a power of two"));
    }
    let bitmap_bytes = disk_sectors.div_ceil(u64::from(granularity_sectors)).div_ceil(8).next_multiple_of(8);
    let pieces_expected = bitmap_bytes.div_ceil(geometry.cluster_bytes());
    // One writer stores an empty map for a bitmap without a set bit.
    if pieces != 0 && pieces as u64 != pieces_expected {
        return Err(format!("its map has {pieces} entries where {pieces_expected} are needed"));
    }
    if data.len() - BITMAP_HEADER < pieces.saturating_mul(8) {
        return Err("its map is longer than its record".into());
    }
    let mut places = HashSet::new();
    let map = data[BITMAP_HEADER..].as_chunks::<8>().0.iter().take(pieces);
    let pieces = map
        .map(|entry| match u64::from_le_bytes(*entry) {
            0 => Ok(BitmapPiece::AllClear),
            1 => Ok(BitmapPiece::AllSet),
            sectors => match sectors.checked_mul(SECTOR_BYTES) {
                Some(offset)
                    if is_free_cluster(geometry, offset, file_bytes, is_used) && places.insert(offset) =>
                {
                    Ok(BitmapPiece::At(FileOffset(offset)))
                }
                _ => Err(format!("it points to sector {sectors}, which is not a free cluster of the file")),
            },
        })
        .collect::<std::result::Result<Vec<_>, String>>()?;
    Ok(StoredBitmap { id, granularity_sectors, pieces })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::geometry::Version;
    use crate::format::header::{IN_USE_CLOSED_WITH_EXTENSION, RawHeader};
    use crate::format::testing::file_of;
    use crate::io::sim::SimStorage;
    use crate::units::Sectors;
    use proptest::prelude::*;

    fn feature(magic: u64, flags: u64, data: &[u8]) -> Feature {
        Feature { magic, flags, data: data.to_vec() }
    }

    #[test]
    fn built_extensions_parse() {
        let features = [feature(5, FLAG_NECESSARY, b"abc"), feature(DIRTY_BITMAP_MAGIC, 0, &[0; 40])];
        let cluster = build(&features, 4096).unwrap();
        assert_eq!(parse(&cluster).unwrap(), features);
        assert!(features[0].forbids_writing() && !features[1].forbids_writing());
        assert!(build(&[feature(1, 0, &[0; 4096])], 4096).is_none());
        let full = build(&[feature(1, 0, &vec![0; 4096 - 48])], 4096).unwrap();
        assert_eq!(parse(&full).unwrap().len(), 1);
    }

    #[test]
    fn every_flipped_byte_is_seen() {
        let cluster = build(&[feature(5, 0, b"abcdefgh")], 512).unwrap();
        for at in 0..cluster.len() {
            let mut broken = cluster.clone();
            broken[at] ^= 0x10;
            assert!(parse(&broken).is_err(), "byte {at}");
        }
    }

    #[test]
    fn records_keep_their_bounds() {
        let mut cluster = build(&[feature(5, 0, b"abc")], 512).unwrap();
        cluster[RECORDS_AT + 16..RECORDS_AT + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        let checksum = Md5::digest(&cluster[RECORDS_AT..]);
        cluster[CHECKSUM_AT..RECORDS_AT].copy_from_slice(&checksum);
        assert!(parse(&cluster).unwrap_err().contains("longer"));
        let many = vec![feature(5, 0, b""); RECORDS_MAX + 1];
        assert!(parse(&build(&many, 1 << 16).unwrap()).unwrap_err().contains("more than"));
    }

    fn image(in_use: u32, at_sector: u64) -> (SimStorage, Header) {
        let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(80)).unwrap();
        let mut raw: RawHeader = Header::create(&geometry).unwrap().raw().clone();
        raw.in_use = in_use;
        raw.extension_sectors = at_sector;
        let header = raw.validate(4 * 4096).unwrap();
        let mut bytes = vec![0; 4 * 4096];
        let extension = build(&[feature(5, 0, b"abc")], 4096).unwrap();
        bytes[2 * 4096..3 * 4096].copy_from_slice(&extension);
        (file_of(&bytes), header)
    }

    #[test]
    fn believed_only_where_it_may_be() {
        let find = |in_use, at, used: u32| {
            let (file, header) = image(in_use, at);
            load(&file, &header, 4 * 4096, &|cluster| cluster.0 == used).unwrap()
        };
        assert!(matches!(find(IN_USE_CLOSED_WITH_EXTENSION, 16, 1), Found::Valid(_)));
        assert_eq!(find(IN_USE_CLOSED_WITH_EXTENSION, 0, 1), Found::Absent);
        for (in_use, at, used) in [
            (0, 16, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, 16, 2),
            (IN_USE_CLOSED_WITH_EXTENSION, 17, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, 1, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, 24, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, 32, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, u64::MAX, 1),
            (IN_USE_CLOSED_WITH_EXTENSION, (1 << 55) + 16, 1),
        ] {
            assert!(matches!(find(in_use, at, used), Found::Invalid(_)), "{in_use:x} {at} {used}");
        }
    }

    fn bitmap(disk: u64, granularity: u32, map: &[u64]) -> Feature {
        let mut data = disk.to_le_bytes().to_vec();
        data.extend([7; 16]);
        data.extend(granularity.to_le_bytes());
        data.extend(u32::try_from(map.len()).unwrap().to_le_bytes());
        data.extend(map.iter().flat_map(|entry| entry.to_le_bytes()));
        feature(DIRTY_BITMAP_MAGIC, 0, &data)
    }

    #[test]
    fn bitmap_records_are_checked() {
        // 8192 bytes of bits in clusters of 4096 bytes.
        let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(65_536)).unwrap();
        let start = geometry.data_start().0 / 512;
        let parse = |feature: &Feature| parse_bitmap(feature, &geometry, 1 << 20, &|cluster| cluster.0 == 20);
        let sound = parse(&bitmap(65_536, 1, &[start, 1])).unwrap();
        assert_eq!(sound.pieces, [BitmapPiece::At(geometry.data_start()), BitmapPiece::AllSet]);
        assert_eq!(parse(&bitmap(65_536, 1, &[])).unwrap().pieces, []);
        for wrong in [
            bitmap(65_535, 1, &[0, 0]),
            bitmap(65_536, 0, &[0, 0]),
            bitmap(65_536, 3, &[0, 0]),
            bitmap(65_536, 1, &[0]),
            bitmap(65_536, 1, &[start, start]),
            bitmap(65_536, 1, &[start + 1, 0]),
            bitmap(65_536, 1, &[20 * 8, 0]),
            bitmap(65_536, 1, &[2, 0]),
            bitmap(65_536, 1, &[u64::MAX, 0]),
            feature(DIRTY_BITMAP_MAGIC, 0, &bitmap(65_536, 1, &[0, 0]).data[..40]),
            feature(DIRTY_BITMAP_MAGIC, 0, b""),
        ] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn any_records_survive(
            records in prop::collection::vec((1u64.., any::<u64>(), prop::collection::vec(any::<u8>(), 0..60)), 0..8),
        ) {
            let features: Vec<_> = records.iter().map(|(magic, flags, data)| feature(*magic, *flags, data)).collect();
            prop_assert_eq!(parse(&build(&features, 4096).unwrap()).unwrap(), features);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if bytes.len() >= RECORDS_AT {
                bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
                let checksum = Md5::digest(&bytes[RECORDS_AT..]);
                bytes[CHECKSUM_AT..RECORDS_AT].copy_from_slice(&checksum);
            }
            let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(80)).unwrap();
            for feature in parse(&bytes).unwrap_or_default() {
                let bitmap = Feature { magic: DIRTY_BITMAP_MAGIC, ..feature };
                let _ = parse_bitmap(&bitmap, &geometry, 1 << 20, &|_| false);
            }
        }
    }
}
