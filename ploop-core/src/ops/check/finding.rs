//! What can be found wrong with a disk: each kind with its class, its meaning in words, and what a repair does about it.
//!
//! A report stays small whatever the damage: of each kind the first ones are kept with their place, all are counted.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::format::survey;

/// Findings of one kind that are reported with their place; the rest is counted.
pub const EXAMPLES_MAX: u64 = 100;

/// How much a finding matters, and who may repair it (crash model, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Class {
    /// Harmless: repaired without asking wherever the image is opened for writing.
    A,
    /// Provable from one source: repaired when an image that was not closed is opened.
    B,
    /// Ambiguous, or data may be lost: repaired only when told to, behind an undo file.
    C,
}

impl Class {
    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::A => "harmless",
            Self::B => "provable",
            Self::C => "damage",
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The header makes no sense: the disk cannot be read.
    Unreadable,
    /// A conversion between the versions was cut.
    HalfConverted,
    /// The last writer did not close the image.
    NotClosed,
    /// A frozen image says that it is open for writing.
    StaleMark,
    /// The in-use mark has a value of no known meaning.
    UnknownMark,
    /// The data offset cannot be, or clusters lie before it.
    DataOffset,
    /// The disk is larger than its table.
    DiskBeyondTable,
    /// Clusters are larger than anybody writes.
    ClusterTooLarge,
    /// The high half of the size of a version 1 disk is not zero.
    SizeHighHalf,
    /// A flag is set that should not be.
    Flags,
    /// An entry has the reserved value.
    EntryReserved,
    /// An entry points into header or table.
    EntryIntoTable,
    /// An entry points before the data.
    EntryBeforeData,
    /// An entry does not point to the start of a cluster.
    EntryMisaligned,
    /// An entry points past the end of the file.
    EntryBeyondEnd,
    /// The end of the file cuts a cluster.
    EntryCut,
    /// Two entries name one cluster.
    EntryShared,
    /// An entry belongs to a cluster past the end of the disk.
    EntryPastDisk,
    /// Something stands behind the last entry of the table.
    Padding,
    /// The end of the file is used by nothing.
    Tail,
    /// The file is shorter than header, table and one cluster.
    TooShort,
    /// The header names an extension that must be ignored.
    StaleExtension,
    /// The extension is damaged: its dirty bitmaps count as "everything is dirty".
    BadExtension,
    /// A stored dirty bitmap is damaged, and counts as "everything is dirty".
    BadBitmap,
    /// An entry names the cluster of the extension, or of a stored bitmap.
    EntryIntoExtension,
    /// A file could not be opened or read.
    Missing,
    /// The length of a raw image is not a whole number of sectors.
    RawLength,
    /// The image of the current state ends before the disk of the descriptor.
    MissingEnd,
    /// The base is said to be raw, but begins with the header of an image that fits the disk.
    SaidRaw,
    /// Images of one chain do not fit each other.
    Mismatch,
    /// The descriptor and the image do not agree.
    DescriptorSize,
    /// The parents of a snapshot are missing or go in a circle.
    BrokenChain,
    /// A snapshot without image, or an image without snapshot, that the current state does not need.
    DeadEntry,
    /// A snapshot is on its way to be merged.
    Transition,
    /// An image in the folder that the descriptor does not name.
    Unreferenced,
    /// A file that an earlier command left behind.
    Leftover,
}

impl Kind {
    /// What it means, for people.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Unreadable => "the header makes no sense: the disk cannot be read",
            Self::HalfConverted => {
                "a conversion between format versions was cut: the table may be half converted"
            }
            Self::NotClosed => "the last writer did not close the image: a program or machine died",
            Self::StaleMark => "a frozen image says it is open for writing, which means nothing there",
            Self::UnknownMark => "the in-use mark has an unknown value, taken as closed",
            Self::DataOffset => "the header says that data begin where they cannot",
            Self::DiskBeyondTable => "the disk is larger than its table: its end cannot be written",
            Self::ClusterTooLarge => "clusters are larger than anybody writes: the image can only be read",
            Self::SizeHighHalf => "the unused half of the disk size holds junk",
            Self::Flags => "a flag of the header is not true",
            Self::EntryReserved => "an entry has the reserved value: its cluster is lost",
            Self::EntryIntoTable => "an entry points into header or table: no guest's bytes are there",
            Self::EntryBeforeData => "an entry points before the place where data begin",
            Self::EntryMisaligned => "an entry points between the starts of clusters, and may overlap others",
            Self::EntryBeyondEnd => {
                "an entry points past the end of the file: its cluster is lost or was never written"
            }
            Self::EntryCut => "the end of the file cuts a cluster: the rest reads as zeros",
            Self::EntryShared => "two guest clusters are in one place: writing one changes the other",
            Self::EntryPastDisk => "an entry belongs to a cluster past the end of the disk",
            Self::Padding => "there is something behind the last entry of the table, where zeros belong",
            Self::Tail => "the end of the file is used by nothing",
            Self::TooShort => "the file ends before the place where data begin",
            Self::StaleExtension => "the header names a format extension that its last writer did not know",
            Self::BadExtension => {
                "the format extension is damaged: its dirty bitmaps are lost, the next backup is full"
            }
            Self::BadBitmap => "a dirty bitmap is damaged: the next backup with it is full",
            Self::EntryIntoExtension => {
                "an entry names the cluster of the format extension or of a stored bitmap: the guest reads foreign bytes"
            }
            Self::Missing => "an image cannot be opened or read",
            Self::RawLength => {
                "the length of a raw image is not a whole number of sectors: it cannot be written"
            }
            Self::MissingEnd => {
                "the image ends before the disk of its descriptor: a part of the disk is missing"
            }
            Self::SaidRaw => {
                "the descriptor says that an image is raw: its first write would destroy the image"
            }
            Self::Mismatch => "images of one chain do not fit each other",
            Self::DescriptorSize => "descriptor and image do not agree",
            Self::BrokenChain => "the parents of a snapshot are missing or go in a circle",
            Self::DeadEntry => {
                "a snapshot has no image, or an image no snapshot; the others are whole without it"
            }
            Self::Transition => "a snapshot is on its way to be merged away",
            Self::Unreferenced => "an image in the folder belongs to no snapshot",
            Self::Leftover => "an earlier command left a file behind",
        }
    }

    /// What a repair does about it; none if it is left to people.
    pub fn remedy(self) -> Option<&'static str> {
        Some(match self {
            Self::NotClosed | Self::StaleMark | Self::UnknownMark => "clear the mark, after everything else",
            Self::DataOffset => "write the place where data do begin",
            Self::DiskBeyondTable => "lengthen the table into the free room behind it",
            Self::SizeHighHalf | Self::Padding => "write zeros",
            Self::Flags => "clear the flag",
            Self::EntryReserved | Self::EntryIntoTable | Self::EntryBeyondEnd => {
                "clear the entry: the cluster reads as its parent's, or as zeros"
            }
            Self::EntryBeforeData | Self::EntryMisaligned => "copy what is readable to a cluster of its own",
            Self::EntryCut => "extend the file: the missing part is zeros",
            Self::EntryShared => "copy: both keep the bytes, in places of their own",
            Self::EntryPastDisk => "clear the entry",
            Self::Tail => "cut the file",
            Self::TooShort | Self::RawLength => "extend the file",
            Self::StaleExtension | Self::BadExtension => "drop the extension",
            Self::EntryIntoExtension => {
                "drop the extension or the bitmap; the guest keeps what it reads there: restore it from a backup"
            }
            Self::BadBitmap => "drop this bitmap, keep the others",
            Self::Leftover => "remove the file",
            Self::Unreadable
            | Self::HalfConverted
            | Self::ClusterTooLarge
            | Self::Missing
            | Self::MissingEnd
            | Self::SaidRaw
            | Self::Mismatch
            | Self::DescriptorSize
            | Self::BrokenChain
            | Self::DeadEntry
            | Self::Transition
            | Self::Unreferenced => return None,
        })
    }
}

impl From<survey::Finding> for Kind {
    fn from(finding: survey::Finding) -> Self {
        match finding {
            survey::Finding::Reserved => Self::EntryReserved,
            survey::Finding::IntoMetadata => Self::EntryIntoTable,
            survey::Finding::BeforeData => Self::EntryBeforeData,
            survey::Finding::Misaligned => Self::EntryMisaligned,
            survey::Finding::BeyondEnd => Self::EntryBeyondEnd,
            survey::Finding::CutByEnd => Self::EntryCut,
            survey::Finding::Shared => Self::EntryShared,
            survey::Finding::PastDisk => Self::EntryPastDisk,
        }
    }
}

/// One finding with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Example {
    /// What.
    pub kind: Kind,
    /// How much it matters here.
    pub class: Class,
    /// The byte of the file that is wrong, or that the wrong entry points to.
    pub file_offset: Option<u64>,
    /// The guest cluster that is concerned.
    pub guest_cluster: Option<u64>,
    /// What was found there, in words.
    pub detail: String,
}

/// All findings of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// What.
    pub kind: Kind,
    /// How much it matters here.
    pub class: Class,
    /// How often.
    pub count: u64,
    /// What it means.
    pub meaning: &'static str,
    /// What a repair does about it; none if it is left to people.
    pub remedy: Option<&'static str>,
}

/// What a check found, bounded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// One row for each kind that was found, the worst first.
    pub counts: Vec<Count>,
    /// The first [`EXAMPLES_MAX`] of each kind, with their places.
    pub examples: Vec<Example>,
}

impl Findings {
    /// Counts `count` findings of one kind, most of which have no example.
    pub(crate) fn count(&mut self, kind: Kind, class: Class, count: u64, remedy: Option<&'static str>) {
        if count == 0 {
            return;
        }
        match self.counts.iter_mut().find(|row| row.kind == kind && row.class == class) {
            Some(row) => row.count += count,
            None => self.counts.push(Count { kind, class, count, meaning: kind.meaning(), remedy }),
        }
        self.counts.sort_by_key(|row| (std::cmp::Reverse(row.class), row.kind));
    }

    /// Keeps an example of a finding that is counted elsewhere.
    pub(crate) fn example(
        &mut self,
        kind: Kind,
        class: Class,
        places: (Option<u64>, Option<u64>),
        detail: String,
    ) {
        let (file_offset, guest_cluster) = places;
        self.examples.push(Example { kind, class, file_offset, guest_cluster, detail });
    }

    /// One finding that happens once.
    pub(crate) fn add(
        &mut self,
        kind: Kind,
        class: Class,
        file_offset: Option<u64>,
        detail: impl Into<String>,
    ) {
        self.count(kind, class, 1, kind.remedy());
        self.example(kind, class, (file_offset, None), detail.into());
    }

    /// One finding that no repair of ours changes.
    pub(crate) fn add_for_people(&mut self, kind: Kind, class: Class, detail: impl Into<String>) {
        self.count(kind, class, 1, None);
        self.example(kind, class, (None, None), detail.into());
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The worst class that was found.
    pub fn worst(&self) -> Option<Class> {
        self.counts.iter().map(|row| row.class).max()
    }

    /// Whether there is damage (class B or C).
    pub fn is_damaged(&self) -> bool {
        self.worst() > Some(Class::A)
    }

    /// Whether there is damage that no repair changes.
    pub fn has_unrepairable_damage(&self) -> bool {
        self.counts.iter().any(|row| row.class > Class::A && row.remedy.is_none())
    }

    /// Whether a repair would change something.
    pub fn is_repairable(&self) -> bool {
        self.counts.iter().any(|row| row.remedy.is_some())
    }

    /// How often a kind was found.
    pub fn total(&self, kind: Kind) -> u64 {
        self.counts.iter().filter(|row| row.kind == kind).map(|row| row.count).sum()
    }

    /// Findings by class: A, B, C.
    pub fn totals(&self) -> BTreeMap<Class, u64> {
        let mut totals = BTreeMap::new();
        for row in &self.counts {
            *totals.entry(row.class).or_insert(0) += row.count;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first_and_counts_add_up() {
        let mut findings = Findings::default();
        assert!(findings.is_empty() && !findings.is_damaged());
        findings.add(Kind::Tail, Class::A, Some(5), "a tail");
        findings.count(Kind::EntryShared, Class::C, 7, Kind::EntryShared.remedy());
        findings.count(Kind::EntryShared, Class::C, 2, Kind::EntryShared.remedy());
        assert_eq!(findings.counts[0].kind, Kind::EntryShared);
        assert_eq!((findings.total(Kind::EntryShared), findings.worst()), (9, Some(Class::C)));
        assert!(findings.is_damaged() && !findings.has_unrepairable_damage());
        findings.add_for_people(Kind::BrokenChain, Class::C, "x");
        assert!(findings.has_unrepairable_damage());
        assert_eq!(findings.totals()[&Class::C], 10);
    }
}
