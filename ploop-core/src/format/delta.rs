//! One file of a chain: an image with header and table, or a raw base. Creating, recognising and opening it.
//!
//! Opening judges the table as a whole before anything is mapped through it:
//!
//! | finding | closed image | image that was not closed |
//! |---|---|---|
//! | entry past the end | refused | cleared: the flush that would have covered it never returned (B) |
//! | cluster cut by the end | read only: the rest is zeros; for writing refused | the file is extended |
//! | unused tail | stays until the image is closed | cut off (A) |
//! | entry into header or table, doubled, misaligned | refused (C) | refused (C) |
//!
//! Repairs are durable one by one, each can be cut and repeated, and the in-use mark stays set throughout. An image
//! opened for reading only is shown as it would be repaired, and not touched.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Storage, StorageExt};
use crate::mutant::{self, Mutant};
use crate::units::{FileCluster, FileOffset, GuestCluster, SECTOR_BYTES, Sectors};

use super::alloc::{ClusterAllocator, reserve, trimmed_bytes};
use super::bat::Bat;
use super::extension::{self, Found};
use super::geometry::{ENTRY_BYTES, Geometry};
use super::header::{HEADER_BYTES, Header, InUse, RawHeader};
use super::verify::{EXAMPLES_MAX, Finding, Verdict, verify};

/// The table of a preallocated image is written in pieces of this many bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// How to create an image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its sizes.
    pub geometry: Geometry,
    /// Whether every cluster gets its place, and its blocks on the host, at once.
    pub preallocated: bool,
}

/// Writes header and table into `storage`, which is empty, and syncs it. The blocks of the table are reserved, so that
/// a full host cannot keep a mapping from being written. Fails with `Create` if the file is not empty.
pub fn create_image(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let geometry = &options.geometry;
    let failed = |kind, operation: &'static str| move |source| Error::io(kind, operation, source);
    if geometry.is_raw() {
        return Err(Error::new(ErrorKind::Parameter, "create image: a raw disk has no header"));
    }
    if !storage.is_empty().map_err(failed(ErrorKind::Stat, "create image: read the file's length"))? {
        return Err(Error::new(ErrorKind::Create, "create image: the file is not empty")
            .advise("choose another name; nothing was changed"));
    }
    let data_start = geometry.data_start().0;
    let end = if options.preallocated {
        data_start + u64::from(geometry.entries()) * geometry.cluster_bytes()
    } else {
        // The other implementation takes an image shorter than a cluster for damaged.
        data_start.max(geometry.cluster_bytes())
    };
    reserve(storage, 0, end)
        .map_err(failed(ErrorKind::Allocate, "create image: reserve its blocks"))
        .map_err(|error| {
            error.advise("make room on the host file system, then remove the unfinished file")
        })?;
    let write = failed(ErrorKind::Write, "create image: write its table");
    // Whole clusters, zeros as well: to the original's check, blocks that are only reserved are a hole unless whole clusters
    // are. The rest of a long table stays reserved: it costs no time here and no memory when it is opened.
    let written_end = if options.preallocated { data_start } else { geometry.cluster_bytes().min(end) };
    let mut first = 0;
    while first < written_end {
        let end = (first + PIECE_BYTES).min(written_end);
        let mut piece = Vec::new();
        if first == 0 {
            piece.extend(Header::create(geometry)?.encode());
        }
        let entries_from = (first + piece.len() as u64 - HEADER_BYTES) / ENTRY_BYTES;
        let entries_to = ((end - HEADER_BYTES) / ENTRY_BYTES).min(u64::from(geometry.entries()));
        if options.preallocated && entries_from < entries_to {
            for index in (0u32..).skip(usize::try_from(entries_from).unwrap_or(usize::MAX)) {
                if u64::from(index) >= entries_to {
                    break;
                }
                let cluster = FileCluster(geometry.first_data_cluster().0.saturating_add(index));
                piece.extend(geometry.cluster_to_entry(cluster)?.to_le_bytes());
            }
        }
        piece.resize(usize::try_from(end - first).unwrap_or(usize::MAX), 0);
        storage.write_all_at(first, &piece).map_err(write)?;
        first = end;
    }
    if mutant::is_active(Mutant::NewImageUnsynced) {
        return Ok(());
    }
    storage.sync_data().map_err(failed(ErrorKind::Sync, "create image: sync"))
}

/// What a file is.
#[derive(Clone, Debug)]
pub enum Probe {
    /// An image with this header.
    Image(Header),
    /// Too short for a header, or with another signature.
    NotAnImage,
}

/// Looks whether a file is an image, by its header only. For messages and for reading: a guest can write a header
/// into a raw disk, so never decide by this how a disk is written (M5). Fails with `Corrupt` if it has our signature and
/// a header that makes no sense.
pub fn probe(storage: &dyn Storage) -> Result<Probe> {
    let (bytes, file_bytes) = read_header(storage)?;
    let raw = RawHeader::decode(&bytes);
    if file_bytes < HEADER_BYTES || raw.version().is_none() {
        return Ok(Probe::NotAnImage);
    }
    raw.validate(file_bytes).map(Probe::Image)
}

/// The first 64 bytes, zeros past the end, and the length of the file.
fn read_header(storage: &dyn Storage) -> Result<([u8; 64], u64)> {
    let file_bytes = storage
        .len()
        .map_err(|source| Error::io(ErrorKind::Stat, "read header: read the file's length", source))?;
    let mut bytes = [0; 64];
    storage
        .read_padded_at(0, &mut bytes)
        .map_err(|source| Error::io(ErrorKind::Read, "read header", source).at_offset(0))?;
    Ok((bytes, file_bytes))
}

/// Reads and judges the table of an image, changing and refusing nothing: for checks. Fails only if the image cannot
/// be read or its header makes no sense.
pub fn examine(storage: &dyn Storage) -> Result<(Header, Verdict)> {
    let (bytes, file_bytes) = read_header(storage)?;
    let header = RawHeader::decode(&bytes).validate(file_bytes)?;
    let bat = Bat::read(storage, header.clone())?;
    let verdict = verify(bat.table(), header.geometry(), file_bytes, usize::MAX)?;
    Ok((header, verdict))
}

/// What opening a chain found and repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairSummary {
    /// The top was not closed by its last writer.
    pub was_in_use: bool,
    /// The repairs were written; else they hold only for what is read through this chain.
    pub written: bool,
    /// Entries past the end of the file that were cleared.
    pub entries_cleared: u64,
    /// Bytes by which the file was extended to hold its last cluster whole.
    pub bytes_extended: u64,
    /// Bytes of unused tail that were cut off.
    pub tail_bytes_cut: u64,
    /// A format extension was dropped, with any dirty bitmap in it.
    pub extension_dropped: bool,
    /// An in-use mark of unknown meaning on the top, taken as "closed".
    pub foreign_mark: Option<u32>,
    /// Lower deltas with an in-use mark, which means nothing there.
    pub stale_marks: Vec<usize>,
    /// Entries left out in salvage mode.
    pub entries_salvaged_without: u64,
}

/// How a file of a chain is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Under another delta: read only.
    Lower,
    /// The top, read only.
    TopReadOnly,
    /// The top, for writing; `repair` if it was not closed.
    TopReadWrite { repair: bool },
}

/// Header, table and allocator of an image.
pub(crate) struct Image {
    pub(crate) bat: Bat,
    /// Of a writable top only.
    pub(crate) allocator: Option<ClusterAllocator>,
    /// Of a top that is to become writable.
    unfinished: Option<Unfinished>,
}

/// What the first half of opening for writing leaves to the second.
struct Unfinished {
    verdict: Verdict,
    file_bytes: u64,
    /// The image was not closed, and that is to be repaired.
    repaired: bool,
}

/// One open file.
pub(crate) struct Delta {
    pub(crate) name: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) geometry: Geometry,
    /// `None` for a raw base.
    pub(crate) image: Option<Image>,
    /// What lies in the file past this reads as zeros; no limit for a top that grows.
    readable_end: u64,
}

impl Delta {
    /// Opens a raw base, seen in clusters of `cluster`.
    pub(crate) fn open_raw(
        name: PathBuf,
        storage: Arc<dyn Storage>,
        cluster: Sectors,
        role: Role,
    ) -> Result<Self> {
        let len = storage.len().map_err(|source| {
            Error::io(ErrorKind::Stat, "open raw image: read its length", source).at_path(&name)
        })?;
        let geometry = Geometry::raw(cluster, len).map_err(|error| error.at_path(&name))?;
        let writable = matches!(role, Role::TopReadWrite { .. });
        if writable && !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("open raw image: its {len} bytes are not whole sectors"),
            )
            .at_path(&name)
            .advise("open it read only, or extend the file to a multiple of 512 bytes"));
        }
        let readable_end = if writable { u64::MAX } else { len };
        Ok(Self { name, storage, geometry, image: None, readable_end })
    }

    /// Opens an image; `salvage` reads around entries that would refuse it. Changes nothing in the file: a top that is
    /// to be written becomes so with [`make_writable`](Self::make_writable).
    pub(crate) fn open_image(
        name: PathBuf,
        storage: Arc<dyn Storage>,
        role: Role,
        salvage: bool,
        summary: &mut RepairSummary,
    ) -> Result<Self> {
        Self::open_image_unnamed(&storage, role, salvage, summary)
            .map(|(image, geometry, readable_end)| Self {
                name: name.clone(),
                storage,
                geometry,
                image: Some(image),
                readable_end,
            })
            .map_err(|error| error.at_path(&name))
    }

    fn open_image_unnamed(
        storage: &dyn Storage,
        role: Role,
        salvage: bool,
        summary: &mut RepairSummary,
    ) -> Result<(Image, Geometry, u64)> {
        let (bytes, file_bytes) = read_header(storage)?;
        let header = RawHeader::decode(&bytes).validate(file_bytes)?;
        if header.is_half_converted() {
            return Err(Error::new(ErrorKind::Busy, "open image: a conversion of its version was cut")
                .advise("finish the conversion with the tool that began it"));
        }
        let writable = matches!(role, Role::TopReadWrite { .. });
        if let Some(obstacle) = header.obstacle().filter(|_| writable) {
            return Err(Error::new(ErrorKind::Corrupt, format!("open image for writing: {obstacle}"))
                .advise("check and repair the image, or open it read only"));
        }
        let geometry = header.geometry().clone();
        let in_use = header.in_use();
        let bat = Bat::read(storage, header)?;
        if let Some(obstacle) = bat.write_obstacle().filter(|_| writable) {
            return Err(Error::new(ErrorKind::Parameter, format!("open image for writing: {obstacle}"))
                .advise("open it buffered, not direct"));
        }
        let ambiguous_max = if salvage { usize::MAX } else { EXAMPLES_MAX };
        let verdict = verify(bat.table(), &geometry, file_bytes, ambiguous_max)?;
        bat.set_allocated(verdict.allocated);
        if role != Role::Lower {
            summary.was_in_use = in_use == InUse::Open;
            summary.foreign_mark = match in_use {
                InUse::Other(value) => Some(value),
                _ => None,
            };
        }
        let repaired = in_use == InUse::Open
            && match role {
                Role::Lower => false,
                Role::TopReadOnly => true,
                Role::TopReadWrite { repair } => repair,
            };
        judge(&bat, &verdict, repaired, writable, salvage, summary)?;
        let readable_end = if writable { u64::MAX } else { file_bytes };
        let unfinished = writable.then_some(Unfinished { verdict, file_bytes, repaired });
        Ok((Image { bat, allocator: None, unfinished }, geometry, readable_end))
    }

    /// Second half of opening a top for writing, when the whole chain has been found sound: looks whether a feature
    /// forbids it, writes the repairs, and lets clusters be allocated.
    pub(crate) fn make_writable(&mut self, summary: &mut RepairSummary) -> Result<()> {
        let Some(image) = &mut self.image else { return Ok(()) };
        let Some(Unfinished { verdict, mut file_bytes, repaired }) = image.unfinished.take() else {
            return Ok(());
        };
        let failed = |error: Error| error.at_path(&self.name);
        let is_used = |cluster: FileCluster| verdict.used.contains(cluster.0);
        let found =
            extension::load(&self.storage, &image.bat.header(), file_bytes, &is_used).map_err(failed)?;
        let claimed =
            extension::claimed(&self.storage, &image.bat.header(), file_bytes, &is_used).map_err(failed)?;
        if let Some(&cluster) = claimed.first() {
            return Err(failed(
                Error::new(
                    ErrorKind::Corrupt,
                    "open image for writing: a guest's entry names the cluster of the format extension, or of a stored bitmap",
                )
                .at_offset(self.geometry.file_offset(cluster).0)
                .advise("check the image; `ploop check --repair` drops the extension or the bitmap, the guest keeps the bytes"),
            ));
        }
        summary.extension_dropped = found != Found::Absent;
        if let Found::Valid(extension) = found
            && let Some(feature) = extension.features.iter().find(|feature| feature.forbids_writing())
        {
            return Err(failed(
                Error::new(
                    ErrorKind::Parameter,
                    format!("open image for writing: its feature {:#x} is not known here", feature.magic),
                )
                .at_offset(extension.offset.0)
                .advise("open it read only, or with the program that wrote the feature"),
            ));
        }
        if repaired {
            file_bytes = repair(&self.storage, &image.bat, &verdict, file_bytes, summary).map_err(failed)?;
        }
        // A full host must not keep a mapping from being written (E3); holes in a table are rare and small.
        let area_bytes = image.bat.area_bytes_len();
        reserve(&self.storage, 0, area_bytes)
            .map_err(|source| Error::io(ErrorKind::Allocate, "reserve the blocks of the table", source))
            .map_err(|error| {
                failed(error.advise("make room on the host file system, or open the image read only"))
            })?;
        image.allocator = Some(ClusterAllocator::new(self.geometry.clone(), verdict.used, file_bytes));
        Ok(())
    }

    /// Where this file holds a cluster of its disk, as far as it is really there.
    pub(crate) fn find(&self, cluster: GuestCluster) -> Option<(FileOffset, u64)> {
        let start = u64::from(cluster.0) * self.geometry.cluster_bytes();
        if cluster.0 >= self.geometry.entries() || start >= self.geometry.disk_bytes() {
            return None;
        }
        let offset = match &self.image {
            None => FileOffset(start),
            Some(image) => match image.bat.table().entry(cluster) {
                0 => return None,
                raw => self.geometry.entry_offset(raw),
            },
        };
        let in_file = self.readable_end.saturating_sub(offset.0).min(self.geometry.cluster_bytes());
        Some((offset, in_file.min(self.geometry.disk_bytes() - start)))
    }
}

/// Refuses what must be refused and takes out of the table in memory what may not be followed.
fn judge(
    bat: &Bat,
    verdict: &Verdict,
    repaired: bool,
    writable: bool,
    salvage: bool,
    summary: &mut RepairSummary,
) -> Result<()> {
    for wrong in &verdict.ambiguous {
        match wrong.finding {
            _ if !salvage => return Err(wrong.refusal()),
            // The bytes are there, whoever they belong to.
            Finding::Shared | Finding::Misaligned => {}
            _ => {
                bat.drop_entry(wrong.cluster, false);
                summary.entries_salvaged_without += 1;
            }
        }
    }
    for wrong in &verdict.at_end {
        match wrong.finding {
            Finding::CutByEnd if repaired || !writable => {}
            Finding::BeyondEnd if repaired => {
                bat.drop_entry(wrong.cluster, writable);
                summary.entries_cleared += 1;
            }
            Finding::BeyondEnd if salvage => {
                bat.drop_entry(wrong.cluster, false);
                summary.entries_salvaged_without += 1;
            }
            _ => return Err(wrong.refusal()),
        }
    }
    Ok(())
}

/// Writes what [`judge`] decided, each step durable before the next; the in-use mark stays set. Returns the
/// length of the file.
fn repair(
    storage: &dyn Storage,
    bat: &Bat,
    verdict: &Verdict,
    file_bytes: u64,
    summary: &mut RepairSummary,
) -> Result<u64> {
    let geometry = bat.header().geometry().clone();
    let resize = |len: u64, operation: &'static str| {
        storage
            .set_len(len)
            .map_err(|source| Error::io(ErrorKind::Truncate, operation, source).at_offset(len))?;
        storage.sync_data().map_err(|source| Error::io(ErrorKind::Sync, operation, source))
    };
    summary.written = true;
    let end = trimmed_bytes(&geometry, verdict.highest());
    if file_bytes < end {
        resize(end, "extend the image to hold its last cluster")?;
        summary.bytes_extended = end - file_bytes;
    }
    // Not only what was cleared just now: its last writer may have seen a sync fail.
    bat.rewrite(storage)?;
    if file_bytes > end {
        resize(end, "cut the unused tail off the image")?;
        summary.tail_bytes_cut = file_bytes - end;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Context;
    use crate::format::Chain;
    use crate::format::geometry::Version;
    use crate::format::header::IN_USE_CLOSED_WITH_EXTENSION;
    use crate::format::testing::{
        content, file_of, file_with_len, guest_content, image, open, set_entry, set_mark,
    };
    use crate::format::{ChainOptions, Source};
    use crate::io::Access;
    use crate::io::sim::{Call, SimStorage};

    const CLUSTER: u64 = 4096;

    /// Twenty clusters, of which 0, 1 and 2 lie at 3, 1 and 2, each filled with its guest number plus 1.
    fn sound() -> SimStorage {
        let file = image(20);
        for (guest, place) in [(0, 3), (1, 1), (2, 2)] {
            file.write_all_at(place * CLUSTER, &[u8::try_from(guest + 1).unwrap(); 4096]).unwrap();
            set_entry(&file, guest, u32::try_from(place).unwrap());
        }
        file
    }

    fn header_of(file: &dyn Storage) -> Header {
        match probe(file).unwrap() {
            Probe::Image(header) => header,
            Probe::NotAnImage => panic!("no image"),
        }
    }

    fn refusal(file: &SimStorage, access: Access) -> (ErrorKind, Option<u64>) {
        let before = content(file);
        let error = open(&[file], access).unwrap_err();
        assert_eq!(content(file), before, "a refused image is not touched");
        let Context { path, cluster, .. } = error.context().clone();
        assert!(path.is_some(), "{error}");
        (error.kind(), cluster)
    }

    #[test]
    fn created_images_are_what_the_header_says() {
        for version in [Version::V1, Version::V2] {
            let geometry = Geometry::new(version, Sectors(64), Sectors(64 * 20_000)).unwrap();
            let file = file_of(&[]);
            create_image(&file, &CreateOptions { geometry: geometry.clone(), preallocated: false }).unwrap();
            assert_eq!(file.len().unwrap(), geometry.data_start().0);
            assert_eq!(header_of(&file).geometry(), &geometry);
            assert!(file.allocated_bytes().unwrap() >= geometry.table_bytes(), "the table has its blocks");
            let (_, verdict) = examine(&file).unwrap();
            assert_eq!((verdict.allocated, verdict.ambiguous_count), (0, 0));
            let error = create_image(&file, &CreateOptions { geometry, preallocated: false }).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Create);
        }
    }

    #[test]
    fn preallocated_images_name_every_cluster_in_order() {
        for (version, alignment) in [(Version::V1, 1), (Version::V2, 4096)] {
            // More than one piece of table.
            let geometry = Geometry::for_testing(version, Sectors(8), Sectors(8 * 300_000)).unwrap();
            let file = file_of(&[]);
            file.disk().set_alignment(crate::io::Alignment { offset: alignment, memory: 1 });
            create_image(&file, &CreateOptions { geometry: geometry.clone(), preallocated: true }).unwrap();
            let end = geometry.data_start().0 + 300_000 * CLUSTER;
            assert_eq!(file.len().unwrap(), end);
            let (_, verdict) = examine(&file).unwrap();
            assert_eq!((verdict.allocated, verdict.ambiguous_count, verdict.at_end.len()), (300_000, 0, 0));
            let chain = open(&[&file], Access::ReadOnly).unwrap();
            for cluster in [0, 1, 262_127, 262_128, 299_999] {
                let place = FileOffset(geometry.data_start().0 + u64::from(cluster) * CLUSTER);
                assert_eq!(chain.held_at(0, GuestCluster(cluster)), Some(place));
            }
        }
    }

    #[test]
    fn tiny_images_are_not_shorter_than_a_cluster() {
        let geometry = Geometry::for_testing(Version::V1, Sectors(8), Sectors(8)).unwrap();
        let file = file_of(&[]);
        create_image(&file, &CreateOptions { geometry, preallocated: false }).unwrap();
        assert_eq!(file.len().unwrap(), CLUSTER);
    }

    #[test]
    fn other_files_are_not_images() {
        assert!(matches!(probe(&file_of(b"")).unwrap(), Probe::NotAnImage));
        assert!(matches!(probe(&file_of(&[0; 4096])).unwrap(), Probe::NotAnImage));
        assert!(matches!(probe(&file_of(b"WithouFreSpacExt")).unwrap(), Probe::NotAnImage));
        let mut bytes = [0; 64];
        bytes[..16].copy_from_slice(b"WithouFreSpacExt");
        assert_eq!(probe(&file_of(&bytes)).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(open(&[&file_of(&[])], Access::ReadOnly).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn sound_images_open_and_reading_changes_nothing() {
        let file = sound();
        let before = content(&file);
        let chain = open(&[&file], Access::ReadOnly).unwrap();
        assert_eq!(chain.allocated_clusters(), 3);
        assert_eq!(chain.repairs(), &RepairSummary::default());
        let seen = guest_content(&chain);
        assert_eq!((seen[0], seen[4096], seen[3 * 4096 - 1], seen[3 * 4096]), (1, 2, 3, 0));
        chain.close().unwrap();
        assert_eq!(content(&file), before);
    }

    #[test]
    fn ambiguous_entries_are_refused() {
        for (raw, in_use) in [(0xFFFF_FFFF, InUse::Closed), (2, InUse::Closed), (2, InUse::Open)] {
            let file = sound();
            set_entry(&file, 9, raw);
            set_mark(&file, in_use);
            for access in [Access::ReadOnly, Access::ReadWrite] {
                assert_eq!(refusal(&file, access), (ErrorKind::Corrupt, Some(9)), "{raw:#x} {in_use:?}");
            }
        }
        // An entry into the table.
        let geometry = Geometry::for_testing(Version::V2, Sectors(1), Sectors(500)).unwrap();
        let file = file_of(&[]);
        create_image(&file, &CreateOptions { geometry: geometry.clone(), preallocated: true }).unwrap();
        assert_eq!(geometry.first_data_cluster().0, 5);
        set_entry(&file, 400, 4);
        assert_eq!(refusal(&file, Access::ReadOnly), (ErrorKind::Corrupt, Some(400)));
    }

    #[test]
    fn entries_past_the_end_of_a_closed_image_are_refused() {
        let file = sound();
        set_entry(&file, 9, 4);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            assert_eq!(refusal(&file, access), (ErrorKind::Corrupt, Some(9)));
        }
    }

    #[test]
    fn an_image_that_was_not_closed_is_repaired() {
        let file = sound();
        set_entry(&file, 9, 30);
        set_entry(&file, 10, 31);
        set_mark(&file, InUse::Open);
        file.set_len(9 * CLUSTER + 100).unwrap();
        file.sync_data().unwrap();
        let before = content(&file);
        let seen = {
            let chain = open(&[&file], Access::ReadOnly).unwrap();
            assert!(chain.repairs().was_in_use && !chain.repairs().written);
            assert_eq!(chain.repairs().entries_cleared, 2);
            guest_content(&chain)
        };
        assert_eq!(content(&file), before, "reading repairs nothing");
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        let expected = RepairSummary {
            was_in_use: true,
            written: true,
            entries_cleared: 2,
            tail_bytes_cut: 5 * CLUSTER + 100,
            ..RepairSummary::default()
        };
        assert_eq!(chain.repairs(), &expected);
        assert_eq!(guest_content(&chain), seen);
        assert_eq!(chain.allocated_clusters(), 3);
        chain.close().unwrap();
        assert_eq!(
            content(&file),
            content(&{
                let file = sound();
                open(&[&file], Access::ReadWrite).unwrap().close().unwrap();
                file
            })
        );
    }

    #[test]
    fn a_mark_that_is_accepted_is_not_repaired() {
        let file = sound();
        set_mark(&file, InUse::Open);
        file.set_len(9 * CLUSTER).unwrap();
        let source =
            |file: &SimStorage| Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
        let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: true };
        let chain = Chain::open(vec![source(&file)], &options).unwrap();
        assert!(chain.repairs().was_in_use && !chain.repairs().written);
        assert_eq!(file.len().unwrap(), 9 * CLUSTER);
        drop(chain);
        set_entry(&file, 9, 30);
        assert!(Chain::open(vec![source(&file)], &options).is_err());
    }

    #[test]
    fn a_cluster_cut_by_the_end_reads_as_zeros_where_it_is_cut() {
        let file = sound();
        file.set_len(3 * CLUSTER + 1000).unwrap();
        file.sync_data().unwrap();
        let chain = open(&[&file], Access::ReadOnly).unwrap();
        let seen = guest_content(&chain);
        assert_eq!((seen[999], seen[1000], seen[4095], seen[4096]), (1, 0, 0, 2));
        assert_eq!(refusal(&file, Access::ReadWrite), (ErrorKind::Corrupt, Some(0)));
        set_mark(&file, InUse::Open);
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        assert_eq!(chain.repairs().bytes_extended, 3096);
        assert_eq!(guest_content(&chain), seen);
        assert_eq!(file.len().unwrap(), 4 * CLUSTER);
    }

    #[test]
    fn a_frozen_delta_is_never_shown_repaired() {
        let (base, top) = (sound(), image(20));
        set_mark(&base, InUse::Open);
        let chain = open(&[&base, &top], Access::ReadWrite).unwrap();
        assert_eq!(chain.repairs().stale_marks, [0]);
        assert!(!chain.repairs().was_in_use);
        set_entry(&base, 9, 30);
        assert!(open(&[&base, &top], Access::ReadOnly).is_err());
    }

    #[test]
    fn a_chain_that_is_refused_leaves_its_top_alone() {
        let (base, top) = (sound(), image(20));
        set_entry(&base, 9, 2);
        set_mark(&top, InUse::Open);
        set_entry(&top, 3, 30);
        let before = content(&top);
        assert!(open(&[&base, &top], Access::ReadWrite).is_err());
        assert_eq!(content(&top), before);
    }

    #[test]
    fn half_converted_images_are_refused() {
        let file = sound();
        set_mark(&file, InUse::Open);
        file.write_all_at(52, &2u32.to_le_bytes()).unwrap();
        assert_eq!(refusal(&file, Access::ReadOnly).0, ErrorKind::Busy);
    }

    #[test]
    fn a_wrong_data_offset_forbids_writing_only() {
        let file = sound();
        file.write_all_at(48, &0u32.to_le_bytes()).unwrap();
        assert_eq!(guest_content(&open(&[&file], Access::ReadOnly).unwrap())[0], 1);
        assert_eq!(refusal(&file, Access::ReadWrite).0, ErrorKind::Corrupt);
    }

    #[test]
    fn salvage_reads_around_what_is_wrong() {
        let file = sound();
        for (cluster, raw) in [(9, 0xFFFF_FFFF), (10, 400), (11, 2)] {
            set_entry(&file, cluster, raw);
        }
        let before = content(&file);
        let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
        let chain = Chain::open_salvaging(vec![source], None).unwrap();
        assert_eq!(chain.repairs().entries_salvaged_without, 2);
        let seen = guest_content(&chain);
        assert_eq!([0, 1, 2, 9, 10, 11].map(|cluster| seen[cluster * 4096]), [1, 2, 3, 0, 0, 3]);
        assert!(!chain.is_writable());
        assert_eq!(content(&file), before);
    }

    #[test]
    fn an_extension_is_dropped_before_the_first_write_unless_it_forbids_writing() {
        for (flags, writable) in
            [(0, true), (extension::FLAG_TRANSIT, true), (extension::FLAG_NECESSARY, false)]
        {
            let file = sound();
            let feature = extension::Feature { magic: 77, flags, data: vec![1, 2, 3] };
            file.write_all_at(4 * CLUSTER, &extension::build(&[feature], 4096).unwrap()).unwrap();
            file.write_all_at(56, &(4 * CLUSTER / 512).to_le_bytes()).unwrap();
            file.write_all_at(44, &IN_USE_CLOSED_WITH_EXTENSION.to_le_bytes()).unwrap();
            let reading = open(&[&file], Access::ReadOnly).unwrap();
            assert!(matches!(reading.extension(0).unwrap(), Found::Valid(_)));
            if !writable {
                assert_eq!(refusal(&file, Access::ReadWrite).0, ErrorKind::Parameter);
                continue;
            }
            let chain = open(&[&file], Access::ReadWrite).unwrap();
            assert!(chain.repairs().extension_dropped);
            assert_eq!(header_of(&file).extension(), None);
            assert_eq!(chain.extension(0).unwrap(), Found::Absent);
            chain.close().unwrap();
            assert_eq!(file.len().unwrap(), 4 * CLUSTER, "its cluster was a tail");
        }
    }

    #[test]
    fn unknown_marks_are_told_and_taken_as_closed() {
        let file = sound();
        set_mark(&file, InUse::Other(5));
        let chain = open(&[&file], Access::ReadWrite).unwrap();
        assert_eq!(chain.repairs().foreign_mark, Some(5));
        assert!(!chain.repairs().was_in_use);
    }

    #[test]
    fn a_failed_repair_can_be_tried_again_by_opening_anew() {
        let reference = {
            let file = unclean();
            open(&[&file], Access::ReadWrite).unwrap();
            content(&file)
        };
        for failing in 0.. {
            let file = unclean();
            file.disk().inject(crate::io::sim::Fault::any(libc::EIO).after(failing));
            let result = open(&[&file], Access::ReadWrite);
            let happened = file.disk().faults_happened();
            file.disk().heal();
            assert_eq!(result.is_err(), happened, "call {failing}");
            if result.is_err() {
                assert_eq!(header_of(&file).in_use(), InUse::Open);
                open(&[&file], Access::ReadWrite).unwrap();
            }
            assert_eq!(content(&file), reference, "call {failing}");
            if !happened {
                assert!(failing >= 8, "the repair makes that many calls");
                break;
            }
        }
    }

    fn unclean() -> SimStorage {
        let file = sound();
        set_entry(&file, 9, 30);
        set_mark(&file, InUse::Open);
        file.set_len(9 * CLUSTER).unwrap();
        file.sync_data().unwrap();
        file
    }

    #[test]
    fn the_mark_is_durable_before_anything_else() {
        let file = sound();
        file.disk().capture_every_operation(true);
        open(&[&file], Access::ReadWrite).unwrap();
        let calls: Vec<_> =
            file.disk().take_captured().iter().filter_map(|s| s.after()).map(|o| o.call).collect();
        assert_eq!(
            calls,
            [Call::Allocate, Call::Write, Call::Sync],
            "the reservation changes no byte and no length"
        );
    }

    #[test]
    fn raw_disks() {
        let file = file_with_len(10_000);
        let source =
            |file: &SimStorage| Source { name: "raw".into(), storage: Arc::new(file.clone()), raw: true };
        let options = |access| ChainOptions { access, raw_cluster: Some(Sectors(8)), accept_in_use: false };
        let chain = Chain::open(vec![source(&file)], &options(Access::ReadOnly)).unwrap();
        assert_eq!(chain.geometry().disk_bytes(), 10_240);
        let error = Chain::open(vec![source(&file)], &options(Access::ReadWrite)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter);
        file.set_len(10_240).unwrap();
        let chain = Chain::open(vec![source(&file)], &options(Access::ReadWrite)).unwrap();
        let target = chain.prepare_write(GuestCluster(2)).unwrap();
        assert!(matches!(target, crate::format::WriteTarget::InPlace(FileOffset(8192))));
        assert!(!chain.clear(GuestCluster(1)).unwrap());
        assert!(chain.seal().is_empty());
        chain.close().unwrap();
        assert!(chain.prepare_write(GuestCluster(3)).is_err());
    }

    /// Flips bytes of header and table. Whatever opens for writing must take writes to every cluster without
    /// touching header, table or another cluster.
    #[test]
    fn damaged_images_are_refused_or_used_safely() {
        let mut random = crate::io::sim::Random::new(7);
        let (mut opened, mut refused) = (0, 0);
        for _ in 0..1500 {
            let mut bytes = content(&sound());
            for _ in 0..=random.below(3) {
                let at = [16 + random.index(48), 64 + random.index(80)][random.index(2)];
                bytes[at] = [0, 1, 2, 3, 4, 8, 0x7F, 0x80, 0xFF][random.index(9)];
            }
            let file = file_of(&bytes);
            if let Ok(chain) = open(&[&file], Access::ReadOnly)
                && chain.geometry().disk_bytes() <= 1 << 20
            {
                guest_content(&chain);
            }
            let before = content(&file);
            let Ok(chain) = open(&[&file], Access::ReadWrite) else {
                refused += 1;
                let after = content(&file);
                assert!(
                    before == after || before[44..48] == crate::format::header::IN_USE_OPEN.to_le_bytes()
                );
                continue;
            };
            opened += 1;
            if chain.geometry().disk_bytes() > 1 << 20 || chain.geometry().cluster_bytes() > 1 << 20 {
                continue;
            }
            let clusters =
                u32::try_from(chain.geometry().disk_bytes() / chain.geometry().cluster_bytes()).unwrap();
            let cluster_bytes = usize::try_from(chain.geometry().cluster_bytes()).unwrap();
            for cluster in 0..clusters {
                let byte = u8::try_from(cluster % 255).unwrap() + 1;
                let offset = match chain.prepare_write(GuestCluster(cluster)).unwrap() {
                    crate::format::WriteTarget::InPlace(offset) => offset,
                    crate::format::WriteTarget::Fresh(prepared) => {
                        let offset = prepared.offset();
                        prepared.publish();
                        offset
                    }
                };
                assert!(offset.0 >= chain.geometry().data_start().0);
                file.write_all_at(offset.0, &vec![byte; cluster_bytes]).unwrap();
            }
            let seen = guest_content(&chain);
            for (cluster, bytes) in seen.chunks_exact(cluster_bytes).enumerate() {
                assert!(bytes.iter().all(|&byte| usize::from(byte) == cluster % 255 + 1));
            }
            crate::format::testing::flush(&chain);
            chain.close().unwrap();
            let (header, verdict) = examine(&file).unwrap();
            assert_eq!(
                (verdict.ambiguous_count, verdict.at_end.len(), header.in_use()),
                (0, 0, InUse::Closed)
            );
        }
        assert!(opened > 200 && refused > 200, "{opened} opened, {refused} refused");
    }
}
