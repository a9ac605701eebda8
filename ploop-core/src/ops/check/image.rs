//! One image examined: its header, its table, its extension and its length, against each other; and what a repair of
//! it would come to.
//!
//! The stored header may be wrong in ways that a repair can put right (a data offset, junk in unused fields). The
//! table is judged by the header as it would be repaired, so that the findings are about what is really wrong.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::format::alloc::{ClusterSet, trimmed_bytes};
use crate::format::extension::{self, Extension, Feature, Found};
use crate::format::geometry::CLUSTER_SECTORS_MAX;
use crate::format::header::{FLAG_CONVERTING, FLAG_EMPTY, HEADER_BYTES};
use crate::format::survey::{self, FINDINGS, Finding, Survey, disk_clusters, first_owners, judge_entry};
use crate::format::{Geometry, Header, InUse, RawHeader, Version, WrongEntry};
use crate::io::{Storage, StorageExt};
use crate::units::{FileCluster, GuestCluster, SECTOR_BYTES};

use super::finding::{Class, EXAMPLES_MAX, Findings, Kind};

/// What an image is in its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The top, or an image alone: it may be written.
    Top,
    /// Under others: it is never written, and an in-use mark means nothing.
    Frozen,
}

/// An image that was looked at.
#[derive(Debug)]
pub(crate) struct Examined {
    /// The header as it is stored.
    pub(crate) stored: RawHeader,
    /// Length of the file.
    pub(crate) file_bytes: u64,
    /// What was found.
    pub(crate) findings: Findings,
    /// How it looks and would be repaired; none if the header makes no sense.
    pub(crate) plan: Option<Plan>,
}

/// What becomes of the format extension.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExtensionFate {
    /// There is none, or it is dropped.
    None,
    /// It stays where it is; with new records if some had to go.
    Keep { offset: u64, rewritten: Option<Vec<u8>> },
}

/// An image as it would be after a repair.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The header: final but for mark and extension, which are those of the file.
    pub(crate) header: Header,
    pub(crate) survey: Survey,
    pub(crate) extension: ExtensionFate,
    /// Clusters that extension and bitmaps take.
    pub(crate) extension_clusters: ClusterSet,
    /// The first cluster behind everything that is in use.
    pub(crate) fresh: u32,
    /// Length of the file if no cluster had to be copied.
    pub(crate) end: u64,
    /// Why the file must not be changed, if so.
    pub(crate) forbidden: Option<String>,
    /// Guest clusters that get a place of their own.
    pub(crate) copies: u64,
    /// Entries that are cleared.
    pub(crate) clears: u64,
    /// Clusters of extension and bitmaps that entries name.
    pub(crate) claims: u64,
}

impl Plan {
    /// Whether bytes of table or extension change, or fields of the header by which clusters are found.
    pub(crate) fn needs_undo(&self, stored: &RawHeader) -> bool {
        let planned = self.header.raw();
        self.copies + self.clears + self.claims + self.survey.padding > 0
            || planned.data_offset_sectors != stored.data_offset_sectors
            || planned.entries != stored.entries
            || matches!(self.extension, ExtensionFate::Keep { rewritten: Some(_), .. })
    }

    /// The header after the repair.
    pub(crate) fn final_header(&self) -> RawHeader {
        let mut raw = self.header.raw().clone();
        match self.extension {
            ExtensionFate::Keep { offset, .. } => {
                raw.in_use = InUse::ClosedWithExtension.encode();
                raw.extension_sectors = offset / SECTOR_BYTES;
            }
            ExtensionFate::None => {
                let says_valid = InUse::decode(raw.in_use) == InUse::ClosedWithExtension;
                // Without an extension this mark says no more than "closed".
                if !says_valid || raw.extension_sectors != 0 {
                    raw.in_use = InUse::Closed.encode();
                }
                raw.extension_sectors = 0;
            }
        }
        raw
    }
}

/// Looks at an image. Fails only if the file cannot be read, or its table would take memory out of all proportion.
pub(crate) fn examine(storage: &dyn Storage, standing: Standing) -> Result<Examined> {
    let (stored, file_bytes) = read_header(storage)?;
    let mut findings = Findings::default();
    let plan = match stored.validate(file_bytes) {
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            findings.add_for_people(Kind::Unreadable, Class::C, error.to_string());
            None
        }
        Err(error) => return Err(error),
        Ok(header) if header.is_half_converted() => {
            findings.add_for_people(
                Kind::HalfConverted,
                Class::C,
                "finish the conversion with the tool that began it",
            );
            None
        }
        Ok(header) => Some(plan(storage, &header, file_bytes, standing, &mut findings)?),
    };
    Ok(Examined { stored, file_bytes, findings, plan })
}

/// The header as it is stored, and the length of the file.
pub(crate) fn read_header(storage: &dyn Storage) -> Result<(RawHeader, u64)> {
    let file_bytes = storage
        .len()
        .map_err(|source| Error::io(ErrorKind::Stat, "check: read the file's length", source))?;
    let mut bytes = [0; 64];
    storage
        .read_padded_at(0, &mut bytes)
        .map_err(|source| Error::io(ErrorKind::Read, "check: read the header", source).at_offset(0))?;
    Ok((RawHeader::decode(&bytes), file_bytes))
}

fn plan(
    storage: &dyn Storage,
    header: &Header,
    file_bytes: u64,
    standing: Standing,
    findings: &mut Findings,
) -> Result<Plan> {
    let stored = header.raw();
    let mut raw = stored.clone();
    if header.geometry().version() == Version::V1 {
        raw.disk_sectors &= u64::from(u32::MAX);
    }
    raw.flags &= FLAG_EMPTY;
    // A file that ends before its data begin is too short; that says nothing against the offset.
    let validate = |raw: &RawHeader| {
        let cluster_bytes = u64::from(raw.cluster_sectors.max(1)) * SECTOR_BYTES;
        let least = (HEADER_BYTES + 4 * u64::from(raw.entries)).div_ceil(cluster_bytes) * cluster_bytes;
        raw.validate(file_bytes.max(least))
    };
    let look = |raw: &RawHeader| -> Result<(Header, Survey)> {
        let planned = validate(raw)?;
        let survey = survey::survey(storage, planned.geometry(), file_bytes, EXAMPLES_MAX)?;
        Ok((planned, survey))
    };
    let strays = |survey: &Survey| survey.count(Finding::BeforeData) + survey.count(Finding::Misaligned);
    let mut longer = raw.clone();
    lengthen_table(header, &mut longer);
    let (mut planned, mut survey) = look(&longer)?;
    if longer != raw && survey.count(Finding::IntoMetadata) + survey.count(Finding::BeforeData) > 0 {
        // Something is in that room.
        longer = raw.clone();
        (planned, survey) = look(&longer)?;
    }
    raw = longer;
    let is_wrong = planned.obstacle().is_some() && planned.geometry().bytes_beyond_table() == 0;
    if (is_wrong || strays(&survey) > 0)
        && let Some(sectors) = better_data_offset(&planned, &survey, file_bytes)
    {
        let better = RawHeader { data_offset_sectors: sectors, ..raw.clone() };
        let (header, found) = look(&better)?;
        if is_wrong || strays(&found) < strays(&survey) {
            (raw, planned, survey) = (better, header, found);
        }
    }
    if survey.allocated > 0 {
        raw.flags = 0;
        planned = validate(&raw)?;
    }
    let was_open = header.in_use() == InUse::Open && standing == Standing::Top;
    report_header(header, &planned, standing, findings);
    report_entries(storage, &planned, &survey, file_bytes, was_open, findings)?;
    let nowhere = [Finding::Reserved, Finding::IntoMetadata, Finding::BeyondEnd, Finding::PastDisk];
    let strays = [Finding::BeforeData, Finding::Misaligned, Finding::Shared];
    let clears = nowhere.map(|finding| survey.count(finding)).into_iter().sum();
    let copies = strays.map(|finding| survey.count(finding)).into_iter().sum();
    let mut plan = Plan {
        header: planned,
        survey,
        extension: ExtensionFate::None,
        extension_clusters: ClusterSet::default(),
        fresh: 0,
        end: 0,
        forbidden: None,
        copies,
        clears,
        claims: 0,
    };
    let keeps_tail = plan_extension(storage, header, file_bytes, &mut plan, findings)?;
    plan_length(file_bytes, keeps_tail, &mut plan, findings);
    Ok(plan)
}

/// Takes free room behind a table that is too short for the disk.
fn lengthen_table(header: &Header, raw: &mut RawHeader) {
    let geometry = header.geometry();
    if geometry.bytes_beyond_table() == 0 {
        return;
    }
    if let Ok(entries) = u32::try_from(disk_clusters(geometry))
        && HEADER_BYTES + 4 * u64::from(entries) <= u64::from(raw.data_offset_sectors) * SECTOR_BYTES
    {
        raw.entries = entries;
    }
}

/// Where data do begin, going by the table: behind it, in the step that most entries keep.
fn better_data_offset(header: &Header, survey: &Survey, file_bytes: u64) -> Option<u32> {
    let geometry = header.geometry();
    let cluster_bytes = geometry.cluster_bytes();
    let table_end = geometry.table_bytes().next_multiple_of(SECTOR_BYTES);
    let whole = geometry.table_bytes().div_ceil(cluster_bytes) * cluster_bytes;
    let start = match (geometry.version(), survey.phase_bytes) {
        (Version::V2, _) => whole,
        // Nothing is there to go by: as the original does where the file has room for it.
        (Version::V1, None) if whole <= file_bytes => whole,
        (Version::V1, None) => table_end,
        (Version::V1, Some(phase)) => {
            let step = table_end - table_end % cluster_bytes + phase;
            if step < table_end { step + cluster_bytes } else { step }
        }
    };
    u32::try_from(start / SECTOR_BYTES).ok().filter(|&sectors| sectors != header.raw().data_offset_sectors)
}

fn report_header(stored: &Header, planned: &Header, standing: Standing, findings: &mut Findings) {
    let (old, new) = (stored.raw(), planned.raw());
    match (stored.in_use(), standing) {
        (InUse::Open, Standing::Top) => {
            findings.add(Kind::NotClosed, Class::A, Some(44), "the in-use mark is set");
        }
        (InUse::Open, Standing::Frozen) => {
            findings.add(Kind::StaleMark, Class::A, Some(44), "the in-use mark is set on a frozen image");
        }
        (InUse::Other(value), _) => {
            findings.add(Kind::UnknownMark, Class::A, Some(44), format!("the in-use mark is {value:#010x}"));
        }
        (InUse::Closed | InUse::ClosedWithExtension, _) => {}
    }
    if old.disk_sectors != new.disk_sectors {
        let detail = format!("the size field is {:#x}", old.disk_sectors);
        findings.add(Kind::SizeHighHalf, Class::A, Some(40), detail);
    }
    if old.flags != new.flags {
        let what = match old.flags {
            FLAG_EMPTY => "\"empty\" is set, but there are clusters".to_owned(),
            FLAG_CONVERTING => "\"conversion under way\" is set on a closed image".to_owned(),
            flags => format!("the flags are {flags:#x}"),
        };
        findings.add(Kind::Flags, Class::A, Some(52), what);
    }
    if old.data_offset_sectors != new.data_offset_sectors || planned_elsewhere(stored, planned) {
        let detail = format!(
            "it says sector {}, data begin at sector {}",
            old.data_offset_sectors, new.data_offset_sectors
        );
        findings.add(Kind::DataOffset, Class::C, Some(48), detail);
    }
    if stored.geometry().bytes_beyond_table() > 0 {
        let detail = format!("{} bytes of the disk have no entry", stored.geometry().bytes_beyond_table());
        if old.entries != new.entries {
            findings.add(Kind::DiskBeyondTable, Class::C, Some(32), detail);
        } else {
            findings.add_for_people(Kind::DiskBeyondTable, Class::C, detail);
        }
    }
    if old.cluster_sectors > CLUSTER_SECTORS_MAX {
        let detail = format!("they have {} sectors", old.cluster_sectors);
        findings.add_for_people(Kind::ClusterTooLarge, Class::C, detail);
    }
}

/// Whether the stored header was read with another data start than the one it names, and the repair keeps its words:
/// then only the length of the file was wrong.
fn planned_elsewhere(stored: &Header, planned: &Header) -> bool {
    stored.raw().data_offset_sectors == planned.raw().data_offset_sectors
        && stored.geometry().data_start() != planned.geometry().data_start()
        && stored.raw().entries == planned.raw().entries
}

fn class_of(finding: Finding, was_open: bool) -> Class {
    match finding {
        Finding::BeyondEnd | Finding::CutByEnd if was_open => Class::B,
        _ => Class::C,
    }
}

fn report_entries(
    storage: &dyn Storage,
    header: &Header,
    survey: &Survey,
    file_bytes: u64,
    was_open: bool,
    findings: &mut Findings,
) -> Result<()> {
    for (index, finding) in FINDINGS.into_iter().enumerate() {
        let kind = Kind::from(finding);
        findings.count(kind, class_of(finding, was_open), survey.counts[index], kind.remedy());
    }
    let geometry = header.geometry();
    let shared: Vec<_> =
        survey.examples.iter().filter(|wrong| wrong.finding == Finding::Shared).copied().collect();
    let owners: HashMap<u32, GuestCluster> = first_owners(storage, geometry, &shared)?;
    for wrong in &survey.examples {
        let offset = geometry.entry_offset(wrong.raw).0;
        let detail = match (wrong.finding, owners.get(&wrong.raw)) {
            (Finding::Shared, Some(owner)) => {
                format!("entry {:#x} is also that of {owner}", wrong.raw)
            }
            (Finding::BeyondEnd, _) => {
                format!("entry {:#x} points to byte {offset} of a file of {file_bytes}", wrong.raw)
            }
            (Finding::CutByEnd, _) => {
                let there = file_bytes.saturating_sub(offset);
                format!("{there} of {} bytes are there", geometry.cluster_bytes())
            }
            _ => format!("entry {:#x} {}", wrong.raw, wrong.finding),
        };
        let places = (Some(offset), Some(u64::from(wrong.cluster.0)));
        findings.example(Kind::from(wrong.finding), class_of(wrong.finding, was_open), places, detail);
    }
    if survey.padding > 0 {
        findings.count(Kind::Padding, Class::A, survey.padding, Kind::Padding.remedy());
        let at = survey.padding_at.map(|offset| offset.0);
        let detail = format!("{} words are not 0", survey.padding);
        findings.example(Kind::Padding, Class::A, (at, None), detail);
    }
    Ok(())
}

/// Decides about the extension; whether the tail of the file must stay because of it.
fn plan_extension(
    storage: &dyn Storage,
    header: &Header,
    file_bytes: u64,
    plan: &mut Plan,
    findings: &mut Findings,
) -> Result<bool> {
    let Some(place) = header.extension() else { return Ok(false) };
    let at = Some(56);
    if header.in_use() != InUse::ClosedWithExtension {
        // An image that was not closed has none that counts; its mark says so already.
        let detail = format!("sector {}, though the mark does not say that it is valid", place.0);
        findings.add(Kind::StaleExtension, Class::A, at, detail);
        return Ok(false);
    }
    report_claims(storage, file_bytes, plan, findings)?;
    let survey = &plan.survey;
    let found = extension::load(storage, &plan.header, file_bytes, &|cluster| survey.is_taken(cluster))?;
    let extension = match found {
        Found::Absent => return Ok(false),
        Found::Invalid(why) => {
            findings.add(Kind::BadExtension, Class::A, at, why);
            return Ok(false);
        }
        Found::Valid(extension) => extension,
    };
    if let Some(feature) = extension.features.iter().find(|feature| feature.forbids_writing()) {
        plan.forbidden = Some(format!(
            "its feature {:#x} is not known here and says that nobody may change the file who does not know it",
            feature.magic
        ));
    }
    let has_unknown = extension.features.iter().any(|feature| feature.magic != extension::DIRTY_BITMAP_MAGIC);
    let kept = keep_features(&extension, file_bytes, plan, findings);
    if plan.clears > 0 && !has_unknown {
        // What a cleared entry showed has changed, and no bitmap knows.
        plan.extension_clusters = ClusterSet::default();
        return Ok(false);
    }
    let rewritten = if kept.len() == extension.features.len() {
        None
    } else {
        let len = usize::try_from(plan.header.geometry().cluster_bytes()).unwrap_or(usize::MAX);
        extension::build(&kept, len)
    };
    plan.extension = ExtensionFate::Keep { offset: extension.offset.0, rewritten };
    Ok(has_unknown)
}

/// Entries that name a cluster of the extension or of its bitmaps.
fn report_claims(
    storage: &dyn Storage,
    file_bytes: u64,
    plan: &mut Plan,
    findings: &mut Findings,
) -> Result<()> {
    let geometry = plan.header.geometry();
    let survey = &plan.survey;
    let claimed = extension::claimed(storage, &plan.header, file_bytes, &|cluster| survey.is_taken(cluster))?;
    let mut wrong = Vec::new();
    for &cluster in claimed.iter().take(usize::try_from(EXAMPLES_MAX).unwrap_or(0)) {
        let raw = geometry.cluster_to_entry(cluster)?;
        wrong.push(WrongEntry { cluster: GuestCluster(0), raw, finding: Finding::Shared });
    }
    let owners = first_owners(storage, geometry, &wrong)?;
    let kind = Kind::EntryIntoExtension;
    findings.count(kind, Class::C, claimed.len() as u64, kind.remedy());
    for entry in &wrong {
        let places = (
            Some(geometry.entry_offset(entry.raw).0),
            owners.get(&entry.raw).map(|owner| u64::from(owner.0)),
        );
        findings.example(kind, Class::C, places, format!("entry {:#x} names it", entry.raw));
    }
    plan.claims = claimed.len() as u64;
    Ok(())
}

/// The records that stay, and the clusters they take.
fn keep_features(
    extension: &Extension,
    file_bytes: u64,
    plan: &mut Plan,
    findings: &mut Findings,
) -> Vec<Feature> {
    let geometry = plan.header.geometry().clone();
    let cluster_at = |offset: u64| u32::try_from(offset / geometry.cluster_bytes()).ok();
    let mut taken = ClusterSet::default();
    taken.insert(cluster_at(extension.offset.0).unwrap_or(0));
    let mut kept = Vec::new();
    for feature in &extension.features {
        if feature.magic != extension::DIRTY_BITMAP_MAGIC {
            if feature.flags & (extension::FLAG_NECESSARY | extension::FLAG_TRANSIT) != 0 {
                kept.push(feature.clone());
            }
            continue;
        }
        let survey = &plan.survey;
        let is_used = |cluster: FileCluster| survey.is_taken(cluster) || taken.contains(cluster.0);
        match extension::parse_bitmap(feature, &geometry, file_bytes, &is_used) {
            Ok(bitmap) => {
                for piece in &bitmap.pieces {
                    if let extension::BitmapPiece::At(offset) = piece {
                        taken.insert(cluster_at(offset.0).unwrap_or(0));
                    }
                }
                kept.push(feature.clone());
            }
            Err(why) => findings.add(Kind::BadBitmap, Class::A, Some(extension.offset.0), why),
        }
    }
    plan.extension_clusters = taken;
    kept
}

/// Decides about the end of the file.
fn plan_length(file_bytes: u64, keeps_tail: bool, plan: &mut Plan, findings: &mut Findings) {
    let geometry = plan.header.geometry();
    let highest = plan.survey.highest().max(plan.extension_clusters.highest().map(FileCluster));
    let end = trimmed_bytes(geometry, highest);
    plan.fresh = highest.map_or(geometry.first_data_cluster().0, |cluster| cluster.0.saturating_add(1));
    plan.end = end;
    if keeps_tail {
        plan.fresh = plan.fresh.max(geometry.clusters_in(file_bytes).saturating_add(1));
        plan.end = end.max(file_bytes);
        return;
    }
    if file_bytes > end {
        let clusters = (file_bytes - end).div_ceil(geometry.cluster_bytes());
        findings.count(Kind::Tail, Class::A, clusters, Kind::Tail.remedy());
        let detail = format!("{} bytes, {clusters} clusters", file_bytes - end);
        findings.example(Kind::Tail, Class::A, (Some(end), None), detail);
    } else if file_bytes < end && plan.survey.count(Finding::CutByEnd) == 0 && plan.survey.skewed.count() == 0
    {
        let detail = format!("{file_bytes} bytes where {end} belong");
        findings.add(Kind::TooShort, Class::A, Some(file_bytes), detail);
    }
}

/// Whether this entry stays as it is, given those before it; else what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryFate {
    /// It stays.
    Keep,
    /// It becomes 0.
    Clear,
    /// Its bytes, from here on, go to a cluster of their own.
    Copy(u64),
}

/// What becomes of the entry of `cluster`; `seen` holds the clusters that entries before it have.
pub(crate) fn fate(
    geometry: &Geometry,
    file_bytes: u64,
    cluster: GuestCluster,
    raw: u32,
    seen: &mut ClusterSet,
) -> EntryFate {
    if u64::from(cluster.0) >= disk_clusters(geometry) {
        return EntryFate::Clear;
    }
    match judge_entry(geometry, raw, file_bytes).0 {
        survey::Place::Nowhere => EntryFate::Clear,
        survey::Place::Stray(offset) => EntryFate::Copy(offset.0),
        survey::Place::Slot(slot) if seen.insert(slot.0) => EntryFate::Keep,
        survey::Place::Slot(slot) => EntryFate::Copy(geometry.file_offset(slot).0),
    }
}
