//! What is wrong with a table: each entry against the geometry, the length of the file and the other entries.
//!
//! Nothing is repaired here and nothing fails: the findings are for whoever opens or checks an image to judge.

use std::fmt;

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
    let mut verdict = Verdict { ambiguous_max, ..Verdict::default() };
    let span_max = SPAN_ALLOWANCE + 32 * table.words_present();
    let first = geometry.first_data_cluster().0;
    let whole_clusters = geometry.clusters_in(file_bytes);
    let mut too_far = None;
    table.for_each_entry(geometry.entries(), |cluster, raw| {
        verdict.allocated += 1;
        let found = match geometry.version() {
            // The common case, without a division.
            Version::V2 if raw >= first && raw < whole_clusters => Ok(raw),
            _ => judge(geometry, raw, file_bytes),
        };
        let wrong = |finding| WrongEntry { cluster, raw, finding };
        let place = match found {
            Ok(place) => place,
            Err((finding, place)) => {
                match finding {
                    Finding::BeyondEnd | Finding::CutByEnd => verdict.at_end.push(wrong(finding)),
                    _ => verdict.add_ambiguous(wrong(finding)),
                }
                let Some(place) = place else { return };
                place
            }
        };
        if u64::from(place) >= span_max {
            too_far.get_or_insert(wrong(Finding::BeyondEnd));
        } else if !verdict.used.insert(place) {
            verdict.add_ambiguous(wrong(Finding::Shared));
        }
    });
    match too_far {
        None => Ok(verdict),
        Some(wrong) => Err(Error::new(
            ErrorKind::Corrupt,
            format!("read table: entry {:#x} points far beyond what this table can account for", wrong.raw),
        )
        .at_cluster(u64::from(wrong.cluster.0))),
    }
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
