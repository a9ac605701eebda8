//! A table gone through piece by piece, for checks and repairs: what each entry names, whether the file has it, and
//! which places of the file are taken.
//!
//! Unlike opening, nothing is refused and the table is not kept: the memory is one bit per cluster of the file, which a
//! bound in proportion to the table keeps in check, and a few examples of each finding. Holes of the host file are
//! not read.

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoBuf, Storage, StorageExt};
use crate::units::{FileCluster, FileOffset, GuestCluster, SECTOR_BYTES};

use super::alloc::ClusterSet;
use super::geometry::{ENTRY_BYTES, ENTRY_FORBIDDEN, Geometry, Version};
use super::header::HEADER_BYTES;
use super::verify::WrongEntry;

pub(crate) use super::verify::Finding;

/// The table is read in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 20;
/// Clusters that the set of taken ones may span beyond what the table accounts for: 64 MiB of memory.
const SPAN_ALLOWANCE: u64 = 1 << 29;

/// All that can be wrong with an entry, in the order of reports.
pub(crate) const FINDINGS: [Finding; 8] = [
    Finding::Reserved,
    Finding::IntoMetadata,
    Finding::BeforeData,
    Finding::Misaligned,
    Finding::BeyondEnd,
    Finding::CutByEnd,
    Finding::Shared,
    Finding::PastDisk,
];

/// Where the bytes of an entry's cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a cluster of its own step; whole, or cut by the end of the file.
    Slot(FileCluster),
    /// Between the starts of clusters, or before the data: readable from here as far as the file goes.
    Stray(FileOffset),
    /// Nowhere that anybody could read.
    Nowhere,
}

/// Judges one entry that is not 0, by itself.
pub(crate) fn judge_entry(geometry: &Geometry, raw: u32, file_bytes: u64) -> (Place, Option<Finding>) {
    if raw == ENTRY_FORBIDDEN {
        return (Place::Nowhere, Some(Finding::Reserved));
    }
    let offset = geometry.entry_offset(raw);
    let data_start = geometry.data_start().0;
    if offset.0 < geometry.table_bytes().next_multiple_of(SECTOR_BYTES) {
        return (Place::Nowhere, Some(Finding::IntoMetadata));
    }
    if offset.0 >= file_bytes {
        return (Place::Nowhere, Some(Finding::BeyondEnd));
    }
    if offset.0 < data_start {
        return (Place::Stray(offset), Some(Finding::BeforeData));
    }
    if !(offset.0 - data_start).is_multiple_of(geometry.cluster_bytes()) {
        return (Place::Stray(offset), Some(Finding::Misaligned));
    }
    match geometry.entry_to_cluster(raw) {
        Ok(Some(cluster)) => {
            let is_cut = file_bytes - offset.0 < geometry.cluster_bytes();
            (Place::Slot(cluster), is_cut.then_some(Finding::CutByEnd))
        }
        _ => (Place::Nowhere, Some(Finding::BeyondEnd)),
    }
}

/// Clusters of the disk, which may be fewer than the table has entries.
pub(crate) fn disk_clusters(geometry: &Geometry) -> u64 {
    geometry.disk_bytes().div_ceil(geometry.cluster_bytes())
}

/// Calls `visit` with the start and the bytes of every piece of the file below `end` (a multiple of a sector) that may
/// hold anything but zeros, in order. Pieces are whole sectors; past the end of the file there are zeros.
pub(crate) fn for_each_piece(
    storage: &dyn Storage,
    end: u64,
    visit: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let failed =
        |at: u64| move |source: io::Error| Error::io(ErrorKind::Read, "read table", source).at_offset(at);
    let mut buffer = IoBuf::try_zeroed(PIECE_BYTES)
        .map_err(|source| Error::io(ErrorKind::Memory, "read table", source))?;
    let mut at = 0;
    while at < end {
        let Some((data_start, data_end)) = storage.next_data(at).map_err(failed(at))? else { break };
        at = at.max(data_start - data_start % SECTOR_BYTES);
        let stop = data_end.div_ceil(SECTOR_BYTES).saturating_mul(SECTOR_BYTES).min(end);
        while at < stop {
            let len = usize::try_from(stop - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = &mut buffer.as_mut_slice()[..len];
            storage.read_padded_at(at, piece).map_err(failed(at))?;
            visit(at, piece)?;
            at += len as u64;
        }
    }
    Ok(())
}

/// The entries in a piece of the file that begins at byte `at`: place in the piece, guest cluster and value, without
/// those that are 0.
pub(crate) fn entries_in(
    at: u64,
    piece: &[u8],
    entries: u32,
) -> impl Iterator<Item = (usize, GuestCluster, u32)> + '_ {
    let skip = usize::try_from(HEADER_BYTES.saturating_sub(at) / ENTRY_BYTES).unwrap_or(usize::MAX);
    let first = (at / ENTRY_BYTES).saturating_sub(HEADER_BYTES / ENTRY_BYTES);
    let words = piece.as_chunks::<4>().0.iter().enumerate().skip(skip);
    words.filter(|(_, word)| **word != [0; 4]).filter_map(move |(index, word)| {
        let cluster =
            u32::try_from(first + (index - skip) as u64).ok().filter(|&cluster| cluster < entries)?;
        Some((index * 4, GuestCluster(cluster), u32::from_le_bytes(*word)))
    })
}

/// What one look through a table found.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Entries that are not 0.
    pub(crate) allocated: u64,
    /// Clusters that some entry of the disk names by their start.
    pub(crate) used: ClusterSet,
    /// Clusters that stray ones reach into: not free, and not to be written before those have moved.
    pub(crate) skewed: ClusterSet,
    /// How often each of [`FINDINGS`] was met.
    pub(crate) counts: [u64; FINDINGS.len()],
    /// The first of each.
    pub(crate) examples: Vec<WrongEntry>,
    /// Words behind the last entry that are not 0, and where the first one stands.
    pub(crate) padding: u64,
    pub(crate) padding_at: Option<FileOffset>,
    /// Neighbours of the disk, and which are none in the file.
    pub(crate) neighbours: Neighbours,
    /// For version 1: the distance from a cluster step that most entries behind the table have.
    pub(crate) phase_bytes: Option<u64>,
    /// The lowest entry behind the table, in bytes.
    pub(crate) lowest: Option<FileOffset>,
}

/// How scattered an image is: counted over its entries, in the order of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Neighbours {
    /// Pairs of clusters that follow each other on the disk.
    pub(crate) pairs: u64,
    /// Those among them that do not follow each other in the file.
    pub(crate) breaks: u64,
    last: Option<(GuestCluster, FileCluster)>,
}

impl Neighbours {
    /// The next cluster of the disk, and its place.
    pub(crate) fn add(&mut self, cluster: GuestCluster, place: FileCluster) {
        if let Some((before, place_before)) = self.last
            && before.0.checked_add(1) == Some(cluster.0)
        {
            self.pairs += 1;
            self.breaks += u64::from(place_before.0.checked_add(1) != Some(place.0));
        }
        self.last = Some((cluster, place));
    }
}

impl Survey {
    /// How often `finding` was met.
    pub(crate) fn count(&self, finding: Finding) -> u64 {
        FINDINGS.iter().position(|&known| known == finding).map_or(0, |index| self.counts[index])
    }

    /// Whether some entry, sound or not, reaches into a cluster of the file.
    pub(crate) fn is_taken(&self, cluster: FileCluster) -> bool {
        self.used.contains(cluster.0) || self.skewed.contains(cluster.0)
    }

    /// The highest cluster of the file that an entry reaches into.
    pub(crate) fn highest(&self) -> Option<FileCluster> {
        self.used.highest().max(self.skewed.highest()).map(FileCluster)
    }
}

/// Where what is written with the table ends: version 2 owns the rest of its last cluster, in version 1 data may begin
/// with the next sector.
pub(crate) fn padding_end(geometry: &Geometry) -> u64 {
    match geometry.version() {
        Version::V1 => geometry.table_bytes().next_multiple_of(SECTOR_BYTES),
        Version::V2 => {
            geometry.table_bytes().div_ceil(geometry.cluster_bytes()).saturating_mul(geometry.cluster_bytes())
        }
    }
}

/// Looks through the table of a file of `file_bytes` bytes, keeping at most `examples_max` examples of each finding.
///
/// Fails when the file cannot be read, and when entries name clusters so far apart that remembering them would take
/// memory out of all proportion.
pub(crate) fn survey(
    storage: &dyn Storage,
    geometry: &Geometry,
    file_bytes: u64,
    examples_max: u64,
) -> Result<Survey> {
    let mut found = Survey::default();
    let mut looking = Looking {
        geometry,
        file_bytes,
        examples_max,
        entries: geometry.entries(),
        disk_clusters: disk_clusters(geometry),
        first: geometry.first_data_cluster().0,
        whole: geometry.clusters_in(file_bytes),
        quick: geometry.version() == Version::V2,
        phase_votes: 0,
    };
    for_each_piece(storage, padding_end(geometry), &mut |at, piece| {
        for (_, cluster, raw) in entries_in(at, piece, geometry.entries()) {
            looking.entry(&mut found, cluster, raw)?;
        }
        looking.padding(&mut found, at, piece);
        Ok(())
    })?;
    Ok(found)
}

/// What [`survey`] remembers from entry to entry.
struct Looking<'a> {
    geometry: &'a Geometry,
    file_bytes: u64,
    examples_max: u64,
    entries: u32,
    disk_clusters: u64,
    first: u32,
    whole: u32,
    /// Entries are cluster numbers: the common case needs no division.
    quick: bool,
    phase_votes: u64,
}

impl Looking<'_> {
    fn entry(&mut self, found: &mut Survey, cluster: GuestCluster, raw: u32) -> Result<()> {
        found.allocated += 1;
        if u64::from(cluster.0) >= self.disk_clusters {
            self.note(found, cluster, raw, Finding::PastDisk);
            return Ok(());
        }
        let (place, finding) = if self.quick && raw >= self.first && raw < self.whole {
            (Place::Slot(FileCluster(raw)), None)
        } else {
            judge_entry(self.geometry, raw, self.file_bytes)
        };
        if !self.quick || finding.is_some() {
            self.vote(found, raw);
        }
        if let Some(finding) = finding {
            self.note(found, cluster, raw, finding);
        }
        match place {
            Place::Nowhere => {}
            Place::Slot(slot) => {
                found.neighbours.add(cluster, slot);
                self.within_span(found, cluster, slot)?;
                if !found.used.insert(slot.0) {
                    self.note(found, cluster, raw, Finding::Shared);
                }
            }
            Place::Stray(offset) => {
                for slot in slots_of(self.geometry, offset) {
                    self.within_span(found, cluster, slot)?;
                    found.skewed.insert(slot.0);
                }
            }
        }
        Ok(())
    }

    fn within_span(&self, found: &Survey, cluster: GuestCluster, slot: FileCluster) -> Result<()> {
        if u64::from(slot.0) < SPAN_ALLOWANCE + 32 * found.allocated {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Corrupt,
            format!("read table: it names {slot}, far beyond what {} entries can account for", self.entries),
        )
        .at_cluster(u64::from(cluster.0))
        .advise("the file is sparse nonsense, or its table is; restore it from a backup"))
    }

    fn note(&self, found: &mut Survey, cluster: GuestCluster, raw: u32, finding: Finding) {
        let Some(index) = FINDINGS.iter().position(|&known| known == finding) else { return };
        found.counts[index] += 1;
        if found.counts[index] <= self.examples_max {
            found.examples.push(WrongEntry { cluster, raw, finding });
        }
    }

    /// Finds the majority of phases, if there is one, by pairing off those that differ.
    fn vote(&mut self, found: &mut Survey, raw: u32) {
        let offset = self.geometry.entry_offset(raw);
        let table_end = self.geometry.table_bytes().next_multiple_of(SECTOR_BYTES);
        if raw == ENTRY_FORBIDDEN || offset.0 < table_end || offset.0 >= self.file_bytes {
            return;
        }
        found.lowest = Some(found.lowest.map_or(offset, |lowest| lowest.min(offset)));
        let phase = offset.0 % self.geometry.cluster_bytes();
        match self.phase_votes {
            0 => (found.phase_bytes, self.phase_votes) = (Some(phase), 1),
            _ if found.phase_bytes == Some(phase) => self.phase_votes += 1,
            _ => self.phase_votes -= 1,
        }
    }

    fn padding(&self, found: &mut Survey, at: u64, piece: &[u8]) {
        let from = usize::try_from(self.geometry.table_bytes().saturating_sub(at)).unwrap_or(usize::MAX);
        let Some(rest) = piece.get(from..) else { return };
        for (index, _) in rest.as_chunks::<4>().0.iter().enumerate().filter(|(_, word)| **word != [0; 4]) {
            found.padding += 1;
            found.padding_at.get_or_insert(FileOffset(at + (from + 4 * index) as u64));
        }
    }
}

/// The clusters of the file, from the first data cluster on, that a cluster's worth of bytes at `offset` reaches into.
pub(crate) fn slots_of(geometry: &Geometry, offset: FileOffset) -> impl Iterator<Item = FileCluster> + use<> {
    let (cluster_bytes, phase) = (geometry.cluster_bytes(), geometry.phase_bytes());
    let first = u64::from(geometry.first_data_cluster().0);
    let number = move |byte: u64| byte.saturating_sub(phase) / cluster_bytes;
    let (from, to) = (number(offset.0), number(offset.0.saturating_add(cluster_bytes - 1)));
    (from.max(first)..=to).filter_map(|slot| u32::try_from(slot).ok().map(FileCluster))
}

/// For each example of a cluster named twice, who names it first.
pub(crate) fn first_owners(
    storage: &dyn Storage,
    geometry: &Geometry,
    shared: &[WrongEntry],
) -> Result<std::collections::HashMap<u32, GuestCluster>> {
    let wanted: std::collections::HashSet<u32> = shared.iter().map(|wrong| wrong.raw).collect();
    let mut owners = std::collections::HashMap::new();
    if wanted.is_empty() {
        return Ok(owners);
    }
    let table_end = geometry.table_bytes().next_multiple_of(SECTOR_BYTES);
    for_each_piece(storage, table_end, &mut |at, piece| {
        for (_, cluster, raw) in entries_in(at, piece, geometry.entries()) {
            if wanted.contains(&raw) {
                owners.entry(raw).or_insert(cluster);
            }
        }
        Ok(())
    })?;
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{file_with_len, image, set_entry, small};
    use crate::units::Sectors;

    #[test]
    fn each_finding_is_counted_and_the_taken_places_are_known() {
        let file = image(20);
        file.set_len(6 * 4096 + 100).unwrap();
        let entries = [(0, 2), (1, 2), (2, u32::MAX), (3, 40), (4, 6), (5, 3), (6, 4), (7, 4)];
        for (cluster, raw) in entries {
            set_entry(&file, cluster, raw);
        }
        set_entry(&file, 30, 9);
        let found = survey(&file, &small(20), 6 * 4096 + 100, 1).unwrap();
        let counts = FINDINGS.map(|finding| (finding, found.count(finding)));
        for (finding, count) in counts {
            let expected = match finding {
                Finding::Shared => 2,
                Finding::Reserved | Finding::BeyondEnd | Finding::CutByEnd => 1,
                _ => 0,
            };
            assert_eq!(count, expected, "{finding:?}");
        }
        assert_eq!((found.allocated, found.padding), (8, 1));
        assert_eq!(found.padding_at, Some(FileOffset(64 + 4 * 30)));
        assert_eq!(found.examples.len(), 4, "one of each");
        assert_eq!((found.highest(), found.used.count()), (Some(FileCluster(6)), 4));
        let shared: Vec<_> =
            found.examples.iter().filter(|wrong| wrong.finding == Finding::Shared).copied().collect();
        assert_eq!(first_owners(&file, &small(20), &shared).unwrap()[&2], GuestCluster(0));
    }

    #[test]
    fn entries_of_version_1_may_stray() {
        let geometry = Geometry::for_testing(Version::V1, Sectors(8), Sectors(160)).unwrap();
        let file = file_with_len(10 * 4096);
        for (cluster, raw) in [(0, 8), (1, 20), (2, 36), (3, 2), (4, 0)] {
            set_entry(&file, cluster, raw);
        }
        let found = survey(&file, &geometry, 10 * 4096, 10).unwrap();
        assert_eq!((found.count(Finding::Misaligned), found.count(Finding::BeforeData)), (2, 1));
        assert_eq!(found.phase_bytes, Some(2048));
        assert_eq!(found.lowest, Some(FileOffset(1024)));
        assert!([2, 3, 4, 5].into_iter().all(|slot| found.is_taken(FileCluster(slot))));
        assert!(!found.is_taken(FileCluster(6)));
    }

    #[test]
    fn sparse_nonsense_is_refused() {
        let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(160)).unwrap();
        let file = file_with_len(1 << 62);
        set_entry(&file, 3, 0xFFFF_FFF0);
        assert!(survey(&file, &geometry, 1 << 62, 10).is_err());
    }
}
