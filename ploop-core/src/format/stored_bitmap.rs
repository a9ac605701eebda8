//! Dirty bitmaps as they are kept in an image between its uses: loaded, stored, invalidated.
//!
//! A bitmap may say too much, never too little (I9). It is valid only in an image that was closed, without a writer in
//! between that does not know it: opening for writing drops the extension with the same write that sets the in-use
//! mark ([`Header`]'s business), so no guest write comes before that. Whatever is doubtful when loading
//! ([`Loaded::AllDirty`]) counts as "everything is dirty".
//!
//! Storing writes into places that nothing names, while the image is marked as in use; the header that names the
//! extension is the last write. Cut anywhere, the image has the old bitmaps at first and then none, never wrong ones.

use std::collections::HashSet;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::io::{IoBuf, Storage, StorageExt};
use crate::units::{FileCluster, FileOffset, SECTOR_BYTES};

use super::alloc::{ClusterSet, trimmed_bytes};
use super::extension::{self, BitmapPiece, DIRTY_BITMAP_MAGIC, Feature, Found, StoredBitmap};
use super::geometry::Geometry;
use super::header::{Header, InUse, RawHeader};
use super::survey::{self, Survey};

/// Bits that are loaded into memory, in bytes; more counts as "everything is dirty". At 64 KiB for a bit, a disk of
/// 128 TiB.
pub const LOADED_BYTES_MAX: u64 = 256 << 20;
/// Most bitmaps that are stored in one image.
pub const BITMAPS_MAX: usize = 64;

/// The bits of one cluster's worth of bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Clear,
    Set,
    Bits(Vec<u8>),
}

/// A dirty bitmap in memory: which granules of the disk have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBits {
    id: [u8; 16],
    granularity_sectors: u32,
    disk_sectors: u64,
    /// Bytes of bits in a piece: a cluster.
    piece_bytes: usize,
    pieces: Vec<Piece>,
}

/// What was found of one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// It can be believed.
    Known(DirtyBits),
    /// It cannot; and why.
    AllDirty {
        /// Its name, if that much is known.
        id: Option<[u8; 16]>,
        /// What is wrong.
        why: String,
    },
}

impl DirtyBits {
    /// A bitmap without a set bit for a disk of this geometry. Fails with `Parameter` unless the granularity is a
    /// power of two below 2^23 sectors (others cannot read more).
    pub fn new(id: [u8; 16], granularity_sectors: u32, geometry: &Geometry) -> Result<Self> {
        if !granularity_sectors.is_power_of_two() || granularity_sectors >= 1 << 23 {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!(
                    "dirty bitmap: {granularity_sectors} sectors for a bit are not a power of two below 2^23"
                ),
            ));
        }
        let bytes = bits_bytes(geometry.disk_sectors().0, granularity_sectors);
        let pieces = usize::try_from(bytes.div_ceil(geometry.cluster_bytes()))
            .map_err(|_| Error::new(ErrorKind::Memory, "dirty bitmap: it has too many pieces"))?;
        Ok(Self {
            id,
            granularity_sectors,
            disk_sectors: geometry.disk_sectors().0,
            piece_bytes: usize::try_from(geometry.cluster_bytes()).unwrap_or(usize::MAX),
            pieces: vec![Piece::Clear; pieces],
        })
    }

    /// Its name, in textual order of a UUID.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Sectors that one bit stands for.
    pub fn granularity_sectors(&self) -> u32 {
        self.granularity_sectors
    }

    fn granule_bytes(&self) -> u64 {
        u64::from(self.granularity_sectors) * SECTOR_BYTES
    }

    /// Granules of the disk.
    fn granules(&self) -> u64 {
        self.disk_sectors.div_ceil(u64::from(self.granularity_sectors))
    }

    /// Notes that these bytes have changed; what lies past the disk is passed over.
    pub fn mark(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let first = extent.start() / self.granule_bytes();
        let end = extent.end().div_ceil(self.granule_bytes()).min(self.granules());
        let per_piece = self.piece_bytes as u64 * 8;
        for index in first / per_piece..end.div_ceil(per_piece) {
            let start = index * per_piece;
            let (from, to) = (first.max(start) - start, end.min(start + per_piece) - start);
            let whole = from == 0 && (to == per_piece || start + to == self.granules());
            let piece_bytes = self.piece_bytes;
            let Some(piece) = usize::try_from(index).ok().and_then(|index| self.pieces.get_mut(index)) else {
                return;
            };
            match piece {
                Piece::Set => {}
                piece if whole => *piece = Piece::Set,
                piece => {
                    if *piece == Piece::Clear {
                        *piece = Piece::Bits(vec![0; piece_bytes]);
                    }
                    if let Piece::Bits(bits) = piece {
                        for bit in from..to {
                            // Below the bytes of a piece.
                            bits[usize::try_from(bit / 8).unwrap_or(0)] |= 1 << (bit % 8);
                        }
                    }
                }
            }
        }
    }

    /// Whether the granule that holds a guest byte has changed.
    pub fn is_dirty(&self, at: u64) -> bool {
        let granule = at / self.granule_bytes();
        if granule >= self.granules() {
            return false;
        }
        let per_piece = self.piece_bytes as u64 * 8;
        match usize::try_from(granule / per_piece).ok().and_then(|index| self.pieces.get(index)) {
            None | Some(Piece::Clear) => false,
            Some(Piece::Set) => true,
            Some(Piece::Bits(bits)) => {
                let bit = granule % per_piece;
                bits.get(usize::try_from(bit / 8).unwrap_or(0)).is_some_and(|byte| byte >> (bit % 8) & 1 != 0)
            }
        }
    }

    /// The next run of changed bytes at or after `from`, cut at the end of the disk.
    pub fn next_dirty(&self, from: u64) -> Option<Extent> {
        if from / SECTOR_BYTES >= self.disk_sectors {
            return None;
        }
        let start = self.granule_where(from / self.granule_bytes(), true)?;
        let end = self.granule_where(start, false).unwrap_or(self.granules());
        let disk_bytes = self.disk_sectors.saturating_mul(SECTOR_BYTES);
        let bytes = |granule: u64| granule.saturating_mul(self.granule_bytes()).min(disk_bytes);
        Some(Extent::between(bytes(start).max(from), bytes(end)))
    }

    /// The first granule at or after `from` whose bit is `wanted`.
    fn granule_where(&self, from: u64, wanted: bool) -> Option<u64> {
        let per_piece = self.piece_bytes as u64 * 8;
        let mut at = from;
        while at < self.granules() {
            let index = usize::try_from(at / per_piece).ok()?;
            let piece_end = (at / per_piece + 1).saturating_mul(per_piece);
            match self.pieces.get(index)? {
                Piece::Clear if !wanted => return Some(at),
                Piece::Set if wanted => return Some(at),
                Piece::Clear | Piece::Set => at = piece_end,
                Piece::Bits(bits) => {
                    let byte = bits.get(usize::try_from(at % per_piece / 8).ok()?)?;
                    let skipped = if wanted { 0 } else { 0xFF };
                    if at.is_multiple_of(8) && *byte == skipped {
                        at += 8;
                    } else if (byte >> (at % 8) & 1 != 0) == wanted {
                        return Some(at);
                    } else {
                        at += 1;
                    }
                }
            }
        }
        None
    }

    /// The record of this bitmap, its pieces being where `places` says: one for each piece that has bits.
    fn record(&self, places: &mut impl Iterator<Item = FileOffset>) -> Feature {
        let mut data = self.disk_sectors.to_le_bytes().to_vec();
        data.extend(self.id);
        data.extend(self.granularity_sectors.to_le_bytes());
        data.extend(u32::try_from(self.pieces.len()).unwrap_or(u32::MAX).to_le_bytes());
        for piece in &self.pieces {
            let entry = match piece {
                Piece::Clear => 0,
                Piece::Set => 1,
                Piece::Bits(_) => places.next().map_or(1, |place| place.0 / SECTOR_BYTES),
            };
            data.extend(entry.to_le_bytes());
        }
        Feature { magic: DIRTY_BITMAP_MAGIC, flags: 0, data }
    }
}

/// Bytes of the bits of a disk, in whole words, as others count them.
fn bits_bytes(disk_sectors: u64, granularity_sectors: u32) -> u64 {
    disk_sectors.div_ceil(u64::from(granularity_sectors)).div_ceil(8).next_multiple_of(8)
}

/// What is known of an image before bitmaps are touched.
struct Looked {
    header: Header,
    file_bytes: u64,
    survey: Survey,
}

fn look(storage: &dyn Storage) -> Result<Looked> {
    let failed = |kind| move |source| Error::io(kind, "read the image of a dirty bitmap", source);
    let file_bytes = storage.len().map_err(failed(ErrorKind::Stat))?;
    let mut bytes = [0; 64];
    storage.read_padded_at(0, &mut bytes).map_err(failed(ErrorKind::Read))?;
    let header = RawHeader::decode(&bytes).validate(file_bytes)?;
    let survey = survey::survey(storage, header.geometry(), file_bytes, 0)?;
    Ok(Looked { header, file_bytes, survey })
}

/// The bitmaps of a closed image. Fails only if the image cannot be read; what is wrong with bitmaps is among the
/// answers. An image that was not closed, or was closed by a writer that knows no extension, has none.
pub fn load(storage: &dyn Storage) -> Result<Vec<Loaded>> {
    let Looked { header, file_bytes, survey } = look(storage)?;
    let found = extension::load(storage, &header, file_bytes, &|cluster| survey.is_taken(cluster))?;
    let extension = match found {
        Found::Absent => return Ok(Vec::new()),
        Found::Invalid(why) => return Ok(vec![Loaded::AllDirty { id: None, why }]),
        Found::Valid(extension) => extension,
    };
    let geometry = header.geometry();
    let own = cluster_at(geometry, extension.offset);
    let mut taken: HashSet<u32> = own.into_iter().collect();
    let mut loaded = Vec::new();
    let mut bytes_left = LOADED_BYTES_MAX;
    for feature in extension.features.iter().filter(|feature| feature.magic == DIRTY_BITMAP_MAGIC) {
        let is_used = |cluster: FileCluster| survey.is_taken(cluster) || taken.contains(&cluster.0);
        let id = feature.data.get(8..24).and_then(|bytes| bytes.try_into().ok());
        match extension::parse_bitmap(feature, geometry, file_bytes, &is_used) {
            Err(why) => loaded.push(Loaded::AllDirty { id, why }),
            Ok(stored) => {
                taken.extend(stored.pieces.iter().filter_map(|piece| match piece {
                    BitmapPiece::At(offset) => cluster_at(geometry, *offset),
                    _ => None,
                }));
                loaded.push(read(storage, geometry, &stored, &mut bytes_left)?);
            }
        }
    }
    Ok(loaded)
}

/// A stored bitmap, as far as its record tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its name, in textual order of a UUID, if that much is there.
    pub(crate) id: Option<[u8; 16]>,
    /// Sectors that one bit stands for; 0 if that is not known.
    pub(crate) granularity_sectors: u32,
    /// Why it counts as "everything is dirty", if it does.
    pub(crate) invalid: Option<String>,
}

/// The bitmaps of an image whose table was looked at, without their bits, and the clusters that they and the extension take.
pub(crate) fn list(
    storage: &dyn Storage,
    header: &Header,
    file_bytes: u64,
    survey: &Survey,
) -> Result<(Vec<Listed>, ClusterSet)> {
    let mut taken = ClusterSet::default();
    let found = extension::load(storage, header, file_bytes, &|cluster| survey.is_taken(cluster))?;
    let extension = match found {
        Found::Absent => return Ok((Vec::new(), taken)),
        Found::Invalid(why) => {
            let none = Listed { id: None, granularity_sectors: 0, invalid: Some(why) };
            return Ok((vec![none], taken));
        }
        Found::Valid(extension) => extension,
    };
    let geometry = header.geometry();
    taken.insert(cluster_at(geometry, extension.offset).unwrap_or(0));
    let mut listed = Vec::new();
    for feature in extension.features.iter().filter(|feature| feature.magic == DIRTY_BITMAP_MAGIC) {
        let is_used = |cluster: FileCluster| survey.is_taken(cluster) || taken.contains(cluster.0);
        let id = feature.data.get(8..24).and_then(|bytes| bytes.try_into().ok());
        let granularity = feature.data.get(24..28).and_then(|bytes| bytes.try_into().ok());
        let invalid = match extension::parse_bitmap(feature, geometry, file_bytes, &is_used) {
            Ok(stored) => {
                for piece in &stored.pieces {
                    if let BitmapPiece::At(offset) = piece {
                        taken.insert(cluster_at(geometry, *offset).unwrap_or(0));
                    }
                }
                None
            }
            Err(why) => Some(why),
        };
        listed.push(Listed { id, granularity_sectors: granularity.map_or(0, u32::from_le_bytes), invalid });
    }
    Ok((listed, taken))
}

fn cluster_at(geometry: &Geometry, offset: FileOffset) -> Option<u32> {
    u32::try_from(offset.0 / geometry.cluster_bytes()).ok()
}

fn read(
    storage: &dyn Storage,
    geometry: &Geometry,
    stored: &StoredBitmap,
    bytes_left: &mut u64,
) -> Result<Loaded> {
    let all_dirty = |why: String| Ok(Loaded::AllDirty { id: Some(stored.id), why });
    let mut bits = match DirtyBits::new(stored.id, stored.granularity_sectors, geometry) {
        Ok(bits) => bits,
        Err(error) => return all_dirty(error.to_string()),
    };
    for (piece, place) in bits.pieces.iter_mut().zip(&stored.pieces) {
        *piece = match place {
            BitmapPiece::AllClear => Piece::Clear,
            BitmapPiece::AllSet => Piece::Set,
            BitmapPiece::At(offset) => {
                let Some(left) = bytes_left.checked_sub(geometry.cluster_bytes()) else {
                    return all_dirty(format!("its bits take more than {LOADED_BYTES_MAX} bytes"));
                };
                *bytes_left = left;
                let mut cluster = vec![0; bits.piece_bytes];
                storage.read_exact_at(offset.0, &mut cluster).map_err(|source| {
                    Error::io(ErrorKind::Read, "read a dirty bitmap", source).at_offset(offset.0)
                })?;
                Piece::Bits(cluster)
            }
        };
    }
    Ok(Loaded::Known(bits))
}

fn write_header(storage: &dyn Storage, change: impl FnOnce(&mut RawHeader)) -> Result<()> {
    let failed = |kind| move |source| Error::io(kind, "write the header of a dirty bitmap's image", source);
    let mut sector = [0; 512];
    storage.read_padded_at(0, &mut sector).map_err(failed(ErrorKind::Read))?;
    let mut bytes = [0; 64];
    bytes.copy_from_slice(&sector[..64]);
    let mut header = RawHeader::decode(&bytes);
    change(&mut header);
    sector[..64].copy_from_slice(&header.encode());
    storage.write_all_at(0, &sector).map_err(failed(ErrorKind::Write))?;
    storage.sync_data().map_err(failed(ErrorKind::Sync))
}

/// Declares the bitmaps of a closed image invalid, durably: whoever writes to it without marking them calls this
/// first. Opening for writing does it by itself.
pub fn invalidate(storage: &dyn Storage) -> Result<()> {
    let Looked { header, .. } = look(storage)?;
    if header.extension().is_none() || header.in_use() == InUse::Open {
        return Ok(());
    }
    write_header(storage, |raw| {
        raw.extension_sectors = 0;
        raw.in_use = InUse::Closed.encode();
    })
}

/// Stores bitmaps in a closed, sound image, in place of those it has; an empty list removes them. The caller owns the
/// image, and nothing was written to it since the bitmaps were complete.
///
/// Fails with `InUse` if the image was not closed, `Corrupt` if its table is damaged, `Parameter` if the bitmaps do not
/// belong to it or do not fit.
pub fn store(storage: &dyn Storage, bitmaps: &[DirtyBits]) -> Result<()> {
    let Looked { header, file_bytes, survey } = look(storage)?;
    let geometry = header.geometry();
    if header.in_use() == InUse::Open {
        return Err(Error::new(ErrorKind::InUse, "store dirty bitmaps: the image was not closed"));
    }
    if survey.counts.iter().any(|&count| count > 0) || header.obstacle().is_some() {
        return Err(Error::new(ErrorKind::Corrupt, "store dirty bitmaps: the image is damaged")
            .advise("check and repair it first"));
    }
    let parameter =
        |message: &str| Error::new(ErrorKind::Parameter, format!("store dirty bitmaps: {message}"));
    let ids: HashSet<_> = bitmaps.iter().map(DirtyBits::id).collect();
    if ids.len() != bitmaps.len() || bitmaps.len() > BITMAPS_MAX {
        return Err(parameter("names occur twice, or there are too many"));
    }
    if bitmaps.iter().any(|bits| {
        bits.disk_sectors != geometry.disk_sectors().0 || bits.piece_bytes as u64 != geometry.cluster_bytes()
    }) {
        return Err(parameter("one is for a disk of another size"));
    }
    let mut used: ClusterSet = survey.used.clone();
    let mut next = geometry.first_data_cluster().0;
    let mut take = || -> Result<FileOffset> {
        // Free places inside the file first: others take what lies behind the last cluster for a leak.
        let place = used
            .first_absent(next, geometry.file_clusters_max())
            .ok_or_else(|| parameter("there is no place left in the file"))?;
        used.insert(place);
        next = place + 1;
        Ok(geometry.file_offset(FileCluster(place)))
    };
    let mut writes: Vec<(FileOffset, &[u8])> = Vec::new();
    for piece in bitmaps.iter().flat_map(|bits| &bits.pieces) {
        if let Piece::Bits(bits) = piece {
            writes.push((take()?, bits));
        }
    }
    let mut places = writes.iter().map(|(offset, _)| *offset);
    let records: Vec<Feature> = bitmaps.iter().map(|bits| bits.record(&mut places)).collect();
    let cluster_len = usize::try_from(geometry.cluster_bytes()).unwrap_or(usize::MAX);
    let built = if records.is_empty() {
        None
    } else {
        let cluster = extension::build(&records, cluster_len);
        Some(cluster.ok_or_else(|| parameter("their maps do not fit one cluster"))?)
    };
    let extension = match &built {
        Some(cluster) => Some((take()?, cluster)),
        None => None,
    };
    // From here on the old bitmaps are gone.
    write_header(storage, |raw| {
        raw.in_use = InUse::Open.encode();
        raw.extension_sectors = 0;
    })?;
    let failed = |kind| move |source| Error::io(kind, "store a dirty bitmap", source);
    for (offset, bytes) in
        writes.into_iter().chain(extension.iter().map(|(offset, cluster)| (*offset, cluster.as_slice())))
    {
        let mut buffer = IoBuf::try_zeroed(cluster_len).map_err(failed(ErrorKind::Memory))?;
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        storage.write_all_at(offset.0, buffer.as_slice()).map_err(failed(ErrorKind::Write))?;
    }
    let end = trimmed_bytes(geometry, used.highest().map(FileCluster));
    if end != file_bytes {
        storage.set_len(end).map_err(failed(ErrorKind::Truncate))?;
    }
    storage.sync_data().map_err(failed(ErrorKind::Sync))?;
    write_header(storage, |raw| {
        let mark = if extension.is_some() { InUse::ClosedWithExtension } else { InUse::Closed };
        raw.in_use = mark.encode();
        raw.extension_sectors = extension.as_ref().map_or(0, |(offset, _)| offset.0 / SECTOR_BYTES);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{content, image, open, set_entry, set_mark, small};
    use crate::io::Access;
    use crate::io::sim::{CrashLevel, CrashOptions, Fault, SimStorage};
    use proptest::prelude::*;

    fn disk() -> SimStorage {
        let file = image(2000);
        file.set_len(6 * 4096).unwrap();
        set_entry(&file, 0, 5);
        set_entry(&file, 1, 3);
        file
    }

    fn some(id: u8, granularity: u32) -> DirtyBits {
        let mut bits = DirtyBits::new([id; 16], granularity, &small(2000)).unwrap();
        bits.mark(Extent::between(5000, 9000));
        bits.mark(Extent::between(1_000_000, 3_000_000));
        bits
    }

    #[test]
    fn what_is_stored_is_loaded_and_goes_into_free_places_first() {
        let file = disk();
        let bitmaps = [some(1, 8), some(2, 128)];
        store(&file, &bitmaps).unwrap();
        assert_eq!(load(&file).unwrap(), bitmaps.clone().map(Loaded::Known));
        assert_eq!(file.len().unwrap(), 7 * 4096, "places 2 and 4 were free, and one more was needed");
        store(&file, &bitmaps).unwrap();
        assert_eq!(load(&file).unwrap().len(), 2);
        store(&file, &[]).unwrap();
        assert_eq!(load(&file).unwrap(), []);
        assert_eq!(file.len().unwrap(), 6 * 4096);
    }

    #[test]
    fn opening_for_writing_forgets_them_before_anything_else() {
        let file = disk();
        store(&file, &[some(1, 8)]).unwrap();
        assert_eq!(load(&file).unwrap().len(), 1);
        drop(open(&[&file], Access::ReadOnly).unwrap());
        assert_eq!(load(&file).unwrap().len(), 1, "reading changes nothing");
        file.disk().capture_every_operation(true);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        assert!(chain.repairs().extension_dropped);
        assert_eq!(load(&file).unwrap(), []);
        chain.close().unwrap();
        assert_eq!(load(&file).unwrap(), []);
        // In every state of the medium: marked as in use, or not touched.
        for snapshot in file.disk().take_captured() {
            for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
                let storage = state.into_disk(1).open("image", Access::ReadWrite).unwrap();
                let known = load(&storage).unwrap().iter().any(|one| matches!(one, Loaded::Known(_)));
                assert!(
                    !known
                        || content(&storage)[4096..]
                            == content(&{
                                let file = disk();
                                store(&file, &[some(1, 8)]).unwrap();
                                file
                            })[4096..]
                );
            }
        }
    }

    #[test]
    fn a_crash_while_storing_leaves_old_none_or_new() {
        let file = disk();
        store(&file, &[some(1, 8)]).unwrap();
        let (old, new) = (some(1, 8), some(9, 8));
        file.disk().capture_every_operation(true);
        store(&file, std::slice::from_ref(&new)).unwrap();
        let mut seen = [0; 3];
        for snapshot in file.disk().take_captured() {
            for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
                let disk = state.into_disk(1);
                let storage = disk.open("image", Access::ReadWrite).unwrap();
                match load(&storage).unwrap().as_slice() {
                    [] | [Loaded::AllDirty { .. }] => seen[0] += 1,
                    [Loaded::Known(bits)] if *bits == old => seen[1] += 1,
                    [Loaded::Known(bits)] if *bits == new => seen[2] += 1,
                    other => panic!("{other:?}"),
                }
                open(&[&storage], Access::ReadWrite).unwrap();
            }
        }
        assert!(seen[0] > 0 && seen[2] > 0, "{seen:?}");
    }

    #[test]
    fn a_failing_call_leaves_no_wrong_bitmap() {
        for failing in 0.. {
            let file = disk();
            file.disk().inject(Fault::any(libc::EIO).after(failing));
            let result = store(&file, &[some(1, 8)]);
            let happened = file.disk().faults_happened();
            file.disk().heal();
            assert_eq!(result.is_err(), happened, "call {failing}");
            for loaded in load(&file).unwrap() {
                assert_eq!(loaded, Loaded::Known(some(1, 8)), "call {failing}");
            }
            open(&[&file], Access::ReadWrite).unwrap().close().unwrap();
            if !happened {
                break;
            }
        }
    }

    #[test]
    fn invalidated_bitmaps_are_gone() {
        let file = disk();
        store(&file, &[some(1, 8)]).unwrap();
        invalidate(&file).unwrap();
        assert_eq!(load(&file).unwrap(), []);
    }

    /// Bug of others: a pointer of the bitmap's map led into a guest's cluster.
    #[test]
    fn peer_dirty_bitmap_pointers_into_data_clusters() {
        let file = disk();
        store(&file, &[some(1, 8)]).unwrap();
        let place = {
            let header = look(&file).unwrap().header;
            header.extension().unwrap().0 * 512 / 4096
        };
        set_entry(&file, 7, u32::try_from(place).unwrap());
        assert!(matches!(load(&file).unwrap()[..], [Loaded::AllDirty { .. }]));
        set_entry(&file, 7, 2);
        assert!(matches!(load(&file).unwrap()[..], [Loaded::AllDirty { .. }]), "its bits are a guest's now");
    }

    #[test]
    fn only_closed_and_sound_images_take_bitmaps() {
        let file = disk();
        set_mark(&file, InUse::Open);
        assert_eq!(store(&file, &[some(1, 8)]).unwrap_err().kind(), ErrorKind::InUse);
        set_mark(&file, InUse::Closed);
        set_entry(&file, 9, 5);
        let before = content(&file);
        assert_eq!(store(&file, &[some(1, 8)]).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(content(&file), before);
        set_entry(&file, 9, 0);
        assert!(store(&file, &[some(1, 8), some(1, 8)]).is_err());
        let other = DirtyBits::new([1; 16], 8, &small(2001)).unwrap();
        assert!(store(&file, &[other]).is_err());
        assert!(DirtyBits::new([1; 16], 3, &small(10)).is_err());
        assert!(DirtyBits::new([1; 16], 1 << 23, &small(10)).is_err());
    }

    proptest! {
        #[test]
        fn bits_equal_a_plain_list(
            granularity in 0u32..4,
            marks in proptest::collection::vec((0u64..400_000, 0u64..90_000), 0..12),
        ) {
            // 1000 sectors in clusters of one sector: four pieces at one sector for a bit.
            let geometry = Geometry::for_testing(crate::format::Version::V2, crate::units::Sectors(1), crate::units::Sectors(9000)).unwrap();
            let mut bits = DirtyBits::new([1; 16], 1 << granularity, &geometry).unwrap();
            let granule = 512u64 << granularity;
            let count = usize::try_from((9000u64 * 512).div_ceil(granule)).unwrap();
            let mut plain = vec![false; count];
            for (start, len) in marks {
                let (start, len) = (start * 11, len);
                bits.mark(Extent::between(start, start + len));
                for (index, bit) in plain.iter_mut().enumerate() {
                    let at = index as u64 * granule;
                    *bit |= len > 0 && at < start + len && start < at + granule;
                }
            }
            for (index, &bit) in plain.iter().enumerate() {
                prop_assert_eq!(bits.is_dirty(index as u64 * granule), bit, "granule {}", index);
            }
            let mut at = 0;
            let mut seen = vec![false; count];
            while let Some(run) = bits.next_dirty(at) {
                prop_assert!(!run.is_empty());
                for index in run.start() / granule..run.end().div_ceil(granule) {
                    seen[usize::try_from(index).unwrap()] = true;
                }
                at = run.end();
            }
            prop_assert_eq!(seen, plain);
        }
    }
}
