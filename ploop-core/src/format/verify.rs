//! What is wrong with a table: each entry against the geometry, the length of the file and the other entries.
//!
//! Nothing is repaired here and nothing fails: the findings are for whoever opens or checks an image to judge.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileCluster, GuestCluster};

use super::alloc::ClusterSet;
use super::bat::Table;
use super::geometry::{ENTRY_FORBIDDEN, Geometry, Version};

/// Ambiguous findings that are kept with their cluster by whoever needs only a few; the rest is counted.
pub(crate) const EXAMPLES_MAX: usize = 1024;
/// Clusters that the set of used ones may span beyond what the table accounts for: 64 MiB of memory.
const SPAN_ALLOWANCE: u64 = 1 << 29;

/// What is wrong with one table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The reserved value.
    Reserved,
    /// It points into header or table.
    IntoMetadata,
    /// It points behind the table, and before the place where data begin. Only checks tell it from
    /// [`IntoMetadata`](Self::IntoMetadata).
    BeforeData,
    /// It points between the starts of clusters.
    Misaligned,
    /// Its cluster begins at or past the end of the file.
    BeyondEnd,
    /// Its cluster is cut by the end of the file.
    CutByEnd,
    /// Another entry names the same cluster.
    Shared,
    /// It is the entry of a cluster past the end of the disk. Only checks care.
    PastDisk,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Reserved => "has the reserved value 0xffffffff",
            Self::IntoMetadata => "points into header or table",
            Self::BeforeData => "points before the place where data begin",
            Self::Misaligned => "does not point to the start of a cluster",
            Self::BeyondEnd => "points past the end of the file",
            Self::CutByEnd => "points to a cluster that the end of the file cuts",
            Self::Shared => "points to a cluster that another entry names too",
            Self::PastDisk => "is that of a cluster past the end of the disk",
        })
    }
}

/// One wrong entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongEntry {
    /// Whose entry it is.
    pub cluster: GuestCluster,
    /// Its value.
    pub raw: u32,
    /// What is wrong with it.
    pub finding: Finding,
}

impl WrongEntry {
    /// As an error that refuses the image.
    pub(crate) fn refusal(&self) -> Error {
        Error::new(ErrorKind::Corrupt, format!("read table: entry {:#x} {}", self.raw, self.finding))
            .at_cluster(u64::from(self.cluster.0))
            .advise(
                "check the image, repair it, or open it read only in salvage mode to save what is readable",
            )
    }
}

/// The verdict on a table.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Wrong entries that point past the end or are cut by it, all of them.
    pub at_end: Vec<WrongEntry>,
    /// Other wrong entries, the first ones.
    pub ambiguous: Vec<WrongEntry>,
    /// All other wrong entries.
    pub ambiguous_count: u64,
    /// Entries that are not 0.
    pub allocated: u64,
    /// Clusters named by sound entries, and by those that the end cuts.
    pub(crate) used: ClusterSet,
    ambiguous_max: usize,
}

/// Judges every entry of `table` in a file of `file_bytes`. Fails only when the table names clusters so far apart
/// that to remember them would take memory out of all proportion.
/// At most `ambiguous_max` ambiguous findings are kept.
pub(crate) fn verify(
    table: &Table,
    geometry: &Geometry,
    file_bytes: u64,
    ambiguous_max: usize,
) -> Result<Verdict> {
    let mut judging = Judging::new(geometry, file_bytes, SPAN_ALLOWANCE + 32 * table.words_present());
    judging.verdict.ambiguous_max = ambiguous_max;
    table.for_each_page(geometry.entries(), |first, words| judging.entries(first, words));
    judging.end()
}

/// What [`verify`] remembers from entry to entry.
struct Judging<'a> {
    geometry: &'a Geometry,
    file_bytes: u64,
    /// Clusters of the file from here on are not remembered.
    span_max: u64,
    first: u32,
    whole_clusters: u32,
    /// By how much the entries of neighbours in the file differ.
    stride: u32,
    verdict: Verdict,
    too_far: Option<WrongEntry>,
}

impl<'a> Judging<'a> {
    fn new(geometry: &'a Geometry, file_bytes: u64, span_max: u64) -> Self {
        let stride = match geometry.version() {
            Version::V1 => geometry.cluster_sectors(),
            Version::V2 => 1,
        };
        Self {
            geometry,
            file_bytes,
            span_max,
            first: geometry.first_data_cluster().0,
            whole_clusters: geometry.clusters_in(file_bytes),
            stride,
            verdict: Verdict::default(),
            too_far: None,
        }
    }

    /// Judges the entries of the clusters from `first` on. Neighbours that are neighbours in the file are judged at
    /// once: if the first and the last of them are sound, so are all between.
    fn entries(&mut self, first: u32, words: &[AtomicU32]) {
        let mut at = 0;
        while let Some((word, after)) = words.get(at..).and_then(<[_]>::split_first) {
            let raw = word.load(Ordering::Relaxed);
            if raw == 0 {
                at += 1;
                continue;
            }
            let next = at + 1 + steps(raw, self.stride, after);
            if next == at + 1 || !self.run(raw, next - at - 1) {
                self.one_by_one(first, at, words.get(at..next).unwrap_or_default());
            }
            at = next;
        }
    }

    /// Judges entries each by itself: those of the clusters from `skip` behind `first` on.
    fn one_by_one(&mut self, first: u32, skip: usize, words: &[AtomicU32]) {
        for (index, word) in (skip..).zip(words) {
            let raw = word.load(Ordering::Relaxed);
            // Below the number of entries, which is a u32.
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            if raw != 0 {
                self.entry(GuestCluster(first.saturating_add(index)), raw);
            }
        }
    }

    /// Enters an entry and `more` neighbours behind it, if nothing is wrong with any; else nothing.
    fn run(&mut self, raw: u32, more: usize) -> bool {
        let Ok(more) = u32::try_from(more) else { return false };
        let last = more.checked_mul(self.stride).and_then(|steps| raw.checked_add(steps));
        let Some((Ok(from), Ok(to))) = last.map(|last| (self.judge(raw), self.judge(last))) else {
            return false;
        };
        let is_sound = from.checked_add(more) == Some(to) && u64::from(to) < self.span_max;
        let is_entered = is_sound && self.verdict.used.insert_run(from, more + 1);
        if is_entered {
            self.verdict.allocated += u64::from(more) + 1;
        }
        is_entered
    }

    fn judge(&self, raw: u32) -> std::result::Result<u32, (Finding, Option<u32>)> {
        match self.geometry.version() {
            // The common case, without a division.
            Version::V2 if raw >= self.first && raw < self.whole_clusters => Ok(raw),
            _ => judge(self.geometry, raw, self.file_bytes),
        }
    }

    /// Judges one entry that is not 0.
    fn entry(&mut self, cluster: GuestCluster, raw: u32) {
        self.verdict.allocated += 1;
        let wrong = |finding| WrongEntry { cluster, raw, finding };
        let place = match self.judge(raw) {
            Ok(place) => place,
            Err((finding, place)) => {
                match finding {
                    Finding::BeyondEnd | Finding::CutByEnd => self.verdict.at_end.push(wrong(finding)),
                    _ => self.verdict.add_ambiguous(wrong(finding)),
                }
                let Some(place) = place else { return };
                place
            }
        };
        if u64::from(place) >= self.span_max {
            self.too_far.get_or_insert(wrong(Finding::BeyondEnd));
        } else if !self.verdict.used.insert(place) {
            self.verdict.add_ambiguous(wrong(Finding::Shared));
        }
    }

    fn end(self) -> Result<Verdict> {
        match self.too_far {
            None => Ok(self.verdict),
            Some(wrong) => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "read table: entry {:#x} points far beyond what this table can account for",
                    wrong.raw
                ),
            )
            .at_cluster(u64::from(wrong.cluster.0))),
        }
    }
}

/// How many of `words`, from the first on, go up by `stride` each, beginning above `raw`.
fn steps(raw: u32, stride: u32, words: &[AtomicU32]) -> usize {
    /// Compared at once, without a branch for each.
    const AT_ONCE: usize = 16;
    let mut expected = raw.wrapping_add(stride);
    let mut found = 0;
    for chunk in words.as_chunks::<AT_ONCE>().0 {
        let mut next = expected;
        let mut differences = 0;
        for word in chunk {
            differences |= word.load(Ordering::Relaxed) ^ next;
            next = next.wrapping_add(stride);
        }
        if differences != 0 {
            break;
        }
        expected = next;
        found += AT_ONCE;
    }
    for word in words.get(found..).unwrap_or_default() {
        if word.load(Ordering::Relaxed) != expected {
            break;
        }
        expected = expected.wrapping_add(stride);
        found += 1;
    }
    found
}

impl Verdict {
    /// The highest cluster of the file that a sound entry names.
    pub fn highest(&self) -> Option<FileCluster> {
        self.used.highest().map(FileCluster)
    }

    fn add_ambiguous(&mut self, wrong: WrongEntry) {
        self.ambiguous_count += 1;
        if self.ambiguous.len() < self.ambiguous_max {
            self.ambiguous.push(wrong);
        }
    }
}

/// The file cluster of an entry, or what is wrong with it, with the cluster it takes nevertheless.
fn judge(geometry: &Geometry, raw: u32, file_bytes: u64) -> std::result::Result<u32, (Finding, Option<u32>)> {
    if raw == ENTRY_FORBIDDEN {
        return Err((Finding::Reserved, None));
    }
    let offset = geometry.entry_offset(raw).0;
    let data_start = geometry.data_start().0;
    if offset < data_start {
        return Err((Finding::IntoMetadata, None));
    }
    if !(offset - data_start).is_multiple_of(geometry.cluster_bytes()) {
        return Err((Finding::Misaligned, None));
    }
    let Ok(Some(FileCluster(place))) = geometry.entry_to_cluster(raw) else {
        return Err((Finding::BeyondEnd, None));
    };
    if offset >= file_bytes {
        Err((Finding::BeyondEnd, None))
    } else if file_bytes - offset < geometry.cluster_bytes() {
        Err((Finding::CutByEnd, Some(place)))
    } else {
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Header;
    use crate::format::bat::Bat;
    use crate::format::testing::file_with_len;
    use crate::io::{Storage, StorageExt};
    use crate::units::Sectors;
    use proptest::prelude::*;

    fn words(raw: &[u32]) -> Vec<AtomicU32> {
        raw.iter().copied().map(AtomicU32::new).collect()
    }

    /// All that a verdict says, and where the span was exceeded first.
    fn said(judging: Judging<'_>) -> impl PartialEq + std::fmt::Debug {
        let places: Vec<_> = (0..5000).filter(|&place| judging.verdict.used.contains(place)).collect();
        let Verdict { at_end, ambiguous, ambiguous_count, allocated, used, .. } = judging.verdict;
        (at_end, ambiguous, ambiguous_count, allocated, places, used.count(), used.highest(), judging.too_far)
    }

    /// Runs of neighbours, with gaps, and with what damage looks like.
    fn table(stride: u32) -> impl Strategy<Value = Vec<u32>> {
        let near = (1..1200u32).prop_map(move |place| place * stride);
        let run = (near.clone(), 1..80u32).prop_map(move |(from, len)| {
            (0..len).map(|index| from.saturating_add(index * stride)).collect::<Vec<_>>()
        });
        let gap = (1..40usize).prop_map(|len| vec![0; len]);
        let single = near.prop_map(|raw| vec![raw]);
        let wrong = prop_oneof![
            Just(vec![u32::MAX]),
            Just(vec![u32::MAX - 1, u32::MAX, 0, 1]),
            Just(vec![u32::MAX.wrapping_sub(stride).wrapping_add(1), 1, 1]),
            (0..u32::MAX).prop_map(|raw| vec![raw]),
            (1..200u32).prop_map(|raw| vec![raw]),
        ];
        prop::collection::vec(prop_oneof![4 => run, 2 => gap, 2 => single, 1 => wrong], 1..40)
            .prop_map(|parts| parts.concat())
    }

    fn agree(geometry: &Geometry, raw: &[u32], file_bytes: u64, span_max: u64) {
        let words = words(raw);
        let mut quick = Judging::new(geometry, file_bytes, span_max);
        quick.verdict.ambiguous_max = 30;
        // Pages end anywhere.
        let (front, back) = words.split_at(words.len() / 3);
        quick.entries(0, front);
        quick.entries(u32::try_from(front.len()).unwrap(), back);
        let mut plain = Judging::new(geometry, file_bytes, span_max);
        plain.verdict.ambiguous_max = 30;
        plain.one_by_one(0, 0, &words);
        assert_eq!(said(quick), said(plain));
    }

    proptest! {
        #[test]
        fn runs_are_judged_as_their_entries_are(
            raw in table(1), clusters in 1..1500u64, rest in 0..4096u64, span in prop_oneof![Just(2000u64), 1..1500u64],
        ) {
            let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(8 * 4000)).unwrap();
            agree(&geometry, &raw, clusters * 4096 + rest, span);
        }

        #[test]
        fn also_where_entries_are_sectors(
            raw in table(63), clusters in 1..1500u64, rest in 0..32256u64, offset in 0..63u32,
        ) {
            let geometry = Geometry::from_header(Version::V1, 63, 63 * 4000, 4000, 512 * 63).unwrap();
            // Now and then between the starts of clusters, all of them.
            let raw: Vec<_> = raw.into_iter().map(|raw| raw.saturating_add(offset / 60 * u32::from(raw != 0))).collect();
            agree(&geometry, &raw, clusters * 32256 + rest, 2000);
        }
    }

    #[test]
    fn pages_of_a_table_are_gone_through_whole() {
        // Entries 4080, 4081: the end of one page, the start of the next.
        let geometry = Geometry::for_testing(Version::V2, Sectors(8), Sectors(8 * 10_000)).unwrap();
        let first = geometry.first_data_cluster().0;
        let file = file_with_len(geometry.file_offset(FileCluster(first + 10_000)).0);
        file.write_all_at(0, &Header::create(&geometry).unwrap().encode()).unwrap();
        let entries: Vec<_> = (first..first + 10_000).flat_map(u32::to_le_bytes).collect();
        file.write_all_at(64, &entries).unwrap();
        // Past the last entry: not part of the table.
        file.write_all_at(64 + 40_000, &[1; 4]).unwrap();
        let bat = Bat::read(&file, Header::create(&geometry).unwrap()).unwrap();
        let len = file.len().unwrap();
        let verdict = verify(bat.table(), &geometry, len, 100).unwrap();
        assert_eq!((verdict.allocated, verdict.used.count()), (10_000, 10_000));
        assert_eq!((verdict.ambiguous_count, verdict.at_end.len()), (0, 0));
        file.write_all_at(64 + 4 * 4080, &(first + 1).to_le_bytes()).unwrap();
        file.write_all_at(64 + 4 * 4081, &u32::MAX.to_le_bytes()).unwrap();
        let bat = Bat::read(&file, Header::create(&geometry).unwrap()).unwrap();
        let verdict = verify(bat.table(), &geometry, len - 4096, 100).unwrap();
        let found: Vec<_> = verdict.ambiguous.iter().map(|wrong| (wrong.cluster.0, wrong.finding)).collect();
        assert_eq!(found, [(4080, Finding::Shared), (4081, Finding::Reserved)]);
        let at_end: Vec<_> = verdict.at_end.iter().map(|wrong| (wrong.cluster.0, wrong.finding)).collect();
        assert_eq!(at_end, [(9999, Finding::BeyondEnd)]);
    }
}
