//! Every state that a crash at one instant may leave (failure model R1-R5).
//!
//! A state is the durable content plus a choice among the changes that no completed sync covers: which of them
//! persisted, which sectors of each, how long the files are, and which names exist. Small choices are gone through
//! completely, large ones are sampled: the extremes, every single change alone and missing, tables without data and
//! data without tables, then seeded chance.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;

use super::content::{Content, hash_bytes, mix};
use super::random::Random;
use super::{Change, Entry, NameEntry, Operation, SECTOR_BYTES, SimDisk, SimFile};
use crate::extent::{Extent, ExtentSet};

/// The most pieces a change is cut into.
const PIECES_MAX: u64 = 128;

/// How much a crash may garble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashLevel {
    /// C0: the changes up to some moment, and none after it.
    Prefix,
    /// C1: any subset of the changes, each whole, in order.
    Subset,
    /// C2: any subset of 512-byte sectors of any change, and any length between the old and the new one.
    Sectors,
    /// C3: as C2, and in some states the changes of a file apply in another order, and what a file was extended by,
    /// and nothing wrote, is garbage; in others one sector that was being written cannot be read any more (T2).
    Reordered,
}

impl CrashLevel {
    fn cuts_sectors(self) -> bool {
        matches!(self, Self::Sectors | Self::Reordered)
    }
}

/// Which crash states to list.
#[derive(Clone, Debug)]
pub struct CrashOptions {
    /// How much a crash may garble.
    pub level: CrashLevel,
    /// All choices are gone through when there are no more than this many.
    pub exhaustive_max: u64,
    /// Seeded choices for each of the densities 0.1, 0.5 and 0.9 when there are more.
    pub random_per_density: u32,
    /// The first bytes of every file, its header and table: sampled sector by sector.
    pub metadata_bytes: u64,
    /// Decides the seeded choices.
    pub seed: u64,
}

impl CrashOptions {
    /// The usual amount of states at `level`.
    pub fn new(level: CrashLevel) -> Self {
        Self { level, exhaustive_max: 4096, random_per_density: 8, metadata_bytes: 0, seed: 0 }
    }
}

/// A simulated world at one instant.
#[derive(Clone)]
pub struct Snapshot {
    pub(super) files: Vec<Arc<SimFile>>,
    pub(super) durable_names: BTreeMap<String, usize>,
    pub(super) name_log: Vec<NameEntry>,
    pub(super) after: Option<Operation>,
    pub(super) operations: usize,
}

/// What a change is about.
#[derive(Clone, Copy)]
enum Place {
    File(usize, usize),
    Name(usize),
}

/// A change that may persist or not.
#[derive(Clone, Copy)]
struct Item {
    place: Place,
    sequence: u64,
    pieces: u32,
    is_metadata: bool,
}

/// Which changes persisted.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Prefix(usize),
    Items(u64),
    Pieces(u64),
    OnlyItem(usize),
    AllButItem(usize),
    OnlyPiece(usize, u32),
    AllButPiece(usize, u32),
    AllMetadata,
    AllData,
    Random {
        seed: u64,
        percent: u64,
        by_piece: bool,
    },
    /// As `Random` by piece; in another order, over garbage.
    Reordered {
        seed: u64,
        percent: u64,
    },
    /// As `Random` by piece; then one of the sectors that were being written cannot be read, half of the time one of
    /// a header, a table or a name's file.
    Unreadable {
        seed: u64,
        percent: u64,
    },
}

/// How long the files are.
#[derive(Clone, Copy, Debug)]
enum Length {
    /// What the persisted changes make it.
    Natural,
    Old,
    New,
    Between(u64),
}

impl Snapshot {
    /// The latest operation before this instant.
    pub fn after(&self) -> Option<Operation> {
        self.after
    }

    /// Changes and syncs of the world so far.
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Changes that no completed sync covers.
    pub fn pending(&self) -> usize {
        self.name_log.len() + self.files.iter().map(|file| file.log.len()).sum::<usize>()
    }

    /// The states a crash here may leave, each once.
    pub fn crash_states(&self, options: &CrashOptions) -> CrashStates {
        let items = self.items(options.metadata_bytes);
        let choices = choices(&items, options);
        let resized = options.level.cuts_sectors()
            && self.files.iter().any(|file| !file.log.is_empty() && file.live.len() != file.durable.len());
        let mut plans = Vec::new();
        let exhaustive = (choices.len() as u64) * 4 <= options.exhaustive_max;
        for (number, choice) in choices.into_iter().enumerate() {
            plans.push((choice, Length::Natural));
            if !resized {
                continue;
            }
            let between = Length::Between(mix(options.seed, number as u64));
            if exhaustive || number < 2 {
                plans.extend([(choice, Length::Old), (choice, Length::New), (choice, between)]);
            } else if matches!(choice, Choice::Random { .. }) {
                plans.push((choice, [Length::Old, Length::New, between][number % 3]));
            }
        }
        CrashStates { snapshot: self.clone(), items, plans: plans.into_iter(), seen: HashSet::new() }
    }

    /// Only those of them, seeded, in which a sector that was being written cannot be read (part of C3).
    pub fn unreadable_states(&self, options: &CrashOptions) -> CrashStates {
        let options = CrashOptions { level: CrashLevel::Reordered, ..options.clone() };
        let items = self.items(options.metadata_bytes);
        let plans: Vec<_> = reordered(&options)
            .filter(|choice| matches!(choice, Choice::Unreadable { .. }))
            .map(|choice| (choice, Length::Natural))
            .collect();
        CrashStates { snapshot: self.clone(), items, plans: plans.into_iter(), seen: HashSet::new() }
    }

    /// What a killed process leaves: everything it had written, since the host goes on.
    pub fn killed(&self) -> CrashState {
        let items = self.items(0);
        self.state(&items, Choice::Prefix(items.len()), Length::Natural)
    }

    fn items(&self, metadata_bytes: u64) -> Vec<Item> {
        let mut items: Vec<Item> = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            for (at, Entry { change, sequence, .. }) in file.log.iter().enumerate() {
                let is_metadata = matches!(change, Change::Write { offset, .. } if *offset < metadata_bytes);
                let place = Place::File(number, at);
                items.push(Item { place, sequence: *sequence, pieces: count_pieces(change), is_metadata });
            }
        }
        for (at, entry) in self.name_log.iter().enumerate() {
            let place = Place::Name(at);
            items.push(Item { place, sequence: entry.sequence, pieces: 1, is_metadata: true });
        }
        items.sort_by_key(|item| item.sequence);
        items
    }

    fn state(&self, items: &[Item], choice: Choice, length: Length) -> CrashState {
        let mut contents: Vec<Content> = self.files.iter().map(|file| file.durable.clone()).collect();
        let mut names = self.durable_names.clone();
        let mut chooser = Chooser::new(choice);
        let mut changes: Vec<(usize, &Change, Selected)> = Vec::new();
        for (number, item) in items.iter().enumerate() {
            let selected = chooser.select(number, item);
            match item.place {
                Place::Name(at) if selected.any() => self.name_log[at].change.apply(&mut names),
                Place::Name(_) => {}
                Place::File(file, at) => changes.push((file, &self.files[file].log[at].change, selected)),
            }
        }
        if let Choice::Reordered { seed, .. } = choice {
            let mut random = Random::new(seed ^ 1);
            for at in (1..changes.len()).rev() {
                changes.swap(at, random.index(at + 1));
            }
            for (file, content) in self.files.iter().zip(&mut contents) {
                garble(content, file.live.len(), &mut random);
            }
        }
        for (file, change, selected) in &changes {
            apply_selected(change, selected, &mut contents[*file]);
        }
        for (file, content) in self.files.iter().zip(&mut contents) {
            if !file.log.is_empty() && file.live.len() != file.durable.len() {
                let (old, new) = (file.durable.len(), file.live.len());
                match length {
                    Length::Natural => {}
                    Length::Old => content.set_len(old),
                    Length::New => content.set_len(new),
                    Length::Between(seed) => {
                        let sectors = old.abs_diff(new) / SECTOR_BYTES;
                        let part = Random::new(seed).below(sectors + 1) * SECTOR_BYTES;
                        content.set_len(old.min(new) + part);
                    }
                }
            }
        }
        if matches!(choice, Choice::Reordered { .. }) {
            contents.iter_mut().for_each(Content::forget_past_end);
        }
        if let Choice::Unreadable { seed, .. } = choice {
            self.lose_a_sector(items, &mut contents, &mut Random::new(seed ^ 2));
        }
        let hash = names.iter().fold(0, |hash, (name, &file)| {
            mix(mix(hash, hash_bytes(name.as_bytes())), contents[file].hash())
        });
        CrashState { contents, names, hash, choice, length }
    }

    /// One of the sectors that were being written, be it that they had reached the disk or not, cannot be read.
    fn lose_a_sector(&self, items: &[Item], contents: &mut [Content], random: &mut Random) {
        let only_metadata = random.chance(50);
        let mut written = Vec::new();
        for item in items {
            if let Place::File(file, at) = item.place
                && let Change::Write { offset, data } = &self.files[file].log[at].change
                && (item.is_metadata || !only_metadata)
            {
                written.push((file, *offset, data.len() as u64));
            }
        }
        if written.is_empty() {
            return;
        }
        let (file, offset, len) = written[random.index(written.len())];
        let first = offset / SECTOR_BYTES;
        let count = (offset + len).div_ceil(SECTOR_BYTES) - first;
        contents[file].lose_sector(first + random.below(count));
    }
}

/// The choices among `items`; the first two are "nothing" and "everything".
fn choices(items: &[Item], options: &CrashOptions) -> Vec<Choice> {
    let count = items.len();
    let mut choices = vec![Choice::Prefix(0), Choice::Prefix(count)];
    if count == 0 {
        return vec![Choice::Prefix(0)];
    }
    choices.extend((1..count).map(Choice::Prefix));
    if options.level == CrashLevel::Prefix {
        return choices;
    }
    let fits = |bits: u64| bits < 32 && 1u64 << bits <= options.exhaustive_max;
    let pieces: u64 = items.iter().map(|item| u64::from(item.pieces)).sum();
    if options.level.cuts_sectors() && fits(pieces) {
        choices.extend((0..1u64 << pieces).map(Choice::Pieces));
        choices.extend(reordered(options));
        return choices;
    }
    if fits(count as u64) {
        choices.extend((0..1u64 << count).map(Choice::Items));
    } else {
        choices.extend((0..count).flat_map(|at| [Choice::OnlyItem(at), Choice::AllButItem(at)]));
    }
    choices.extend([Choice::AllMetadata, Choice::AllData]);
    let mut random = Random::new(options.seed);
    let mut sample = |by_piece: bool, choices: &mut Vec<Choice>| {
        for percent in [10, 50, 90] {
            for _ in 0..options.random_per_density {
                choices.push(Choice::Random { seed: random.next_u64(), percent, by_piece });
            }
        }
    };
    if !fits(count as u64) {
        sample(false, &mut choices);
    }
    if options.level.cuts_sectors() {
        for (at, item) in items.iter().enumerate().filter(|(_, item)| item.is_metadata && item.pieces > 1) {
            for piece in 0..item.pieces {
                choices.extend([Choice::OnlyPiece(at, piece), Choice::AllButPiece(at, piece)]);
            }
        }
        sample(true, &mut choices);
    }
    choices.extend(reordered(options));
    choices
}

/// Seeded choices of level C3.
fn reordered(options: &CrashOptions) -> impl Iterator<Item = Choice> {
    let per_density =
        if options.level == CrashLevel::Reordered { options.random_per_density.max(1) } else { 0 };
    let mut random = Random::new(options.seed ^ 0xc3);
    [50, 90, 100].into_iter().flat_map(move |percent| {
        let seeds: Vec<u64> = (0..per_density).map(|_| random.next_u64()).collect();
        let both = move |seed| [Choice::Reordered { seed, percent }, Choice::Unreadable { seed, percent }];
        seeds.into_iter().flat_map(both)
    })
}

/// Which pieces of one change persisted.
enum Selected {
    None,
    All,
    Some(Vec<bool>),
}

impl Selected {
    fn whole(yes: bool) -> Self {
        if yes { Self::All } else { Self::None }
    }

    fn any(&self) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Some(pieces) => pieces.contains(&true),
        }
    }
}

/// Turns a choice into selections, item by item in order.
struct Chooser {
    choice: Choice,
    random: Random,
    piece: u32,
}

impl Chooser {
    fn new(choice: Choice) -> Self {
        let seed = match choice {
            Choice::Random { seed, .. }
            | Choice::Reordered { seed, .. }
            | Choice::Unreadable { seed, .. } => seed,
            _ => 0,
        };
        Self { choice, random: Random::new(seed), piece: 0 }
    }

    fn select(&mut self, number: usize, item: &Item) -> Selected {
        let pieces = item.pieces;
        match self.choice {
            Choice::Prefix(end) => Selected::whole(number < end),
            Choice::Items(bits) => Selected::whole(bits >> number & 1 == 1),
            Choice::Pieces(bits) => {
                let first = self.piece;
                self.piece += pieces;
                Selected::Some((first..first + pieces).map(|piece| bits >> piece & 1 == 1).collect())
            }
            Choice::OnlyItem(only) => Selected::whole(number == only),
            Choice::AllButItem(missing) => Selected::whole(number != missing),
            Choice::OnlyPiece(only, piece) if number == only => {
                Selected::Some((0..pieces).map(|at| at == piece).collect())
            }
            Choice::OnlyPiece(..) => Selected::None,
            Choice::AllButPiece(partial, piece) if number == partial => {
                Selected::Some((0..pieces).map(|at| at != piece).collect())
            }
            Choice::AllButPiece(..) => Selected::All,
            Choice::AllMetadata => Selected::whole(item.is_metadata),
            Choice::AllData => Selected::whole(!item.is_metadata),
            Choice::Random { percent, by_piece: false, .. } => Selected::whole(self.random.chance(percent)),
            Choice::Random { percent, by_piece: true, .. }
            | Choice::Reordered { percent, .. }
            | Choice::Unreadable { percent, .. } => {
                Selected::Some((0..pieces).map(|_| self.random.chance(percent)).collect())
            }
        }
    }
}

/// Some sectors past the end that become visible if the file gets longer: what the host had there before.
fn garble(content: &mut Content, len: u64, random: &mut Random) {
    const SECTORS_MAX: usize = 8;
    let old = content.len();
    let first = old.next_multiple_of(SECTOR_BYTES);
    let sectors = len.saturating_sub(first) / SECTOR_BYTES;
    for _ in 0..SECTORS_MAX.min(usize::try_from(sectors).unwrap_or(SECTORS_MAX)) {
        let at = first + random.below(sectors) * SECTOR_BYTES;
        content.write(at, &[0xa5; 512]);
    }
    content.hide_past(old);
}

/// The byte range of a change that can persist in parts.
fn range_of(change: &Change) -> Option<(u64, u64)> {
    match change {
        Change::Write { offset, data } => Some((*offset, data.len() as u64)),
        Change::Zero { offset, len } => Some((*offset, *len)),
        Change::SetLen { .. } | Change::Extend { .. } => None,
    }
}

/// Where a change is cut: the bytes of one piece, counted from a sector boundary at or before its start.
fn piece_bytes(len: u64) -> u64 {
    len.div_ceil(PIECES_MAX).next_multiple_of(SECTOR_BYTES).max(SECTOR_BYTES)
}

fn count_pieces(change: &Change) -> u32 {
    let Some((offset, len)) = range_of(change) else { return 1 };
    let skip = offset % SECTOR_BYTES;
    u32::try_from((skip + len).div_ceil(piece_bytes(len))).unwrap_or(1).max(1)
}

fn apply_selected(change: &Change, selected: &Selected, content: &mut Content) {
    let pieces = match selected {
        Selected::None => return,
        Selected::All => return change.apply(content),
        Selected::Some(pieces) => pieces,
    };
    let Some((offset, len)) = range_of(change) else {
        if selected.any() {
            change.apply(content);
        }
        return;
    };
    let (base, step, end) = (offset - offset % SECTOR_BYTES, piece_bytes(len), offset + len);
    let mut at = 0;
    while at < pieces.len() {
        if !pieces[at] {
            at += 1;
            continue;
        }
        let run = pieces[at..].iter().take_while(|&&selected| selected).count();
        let start = (base + at as u64 * step).max(offset);
        let stop = (base + (at + run) as u64 * step).min(end);
        match change {
            Change::Write { data, .. } => {
                let index = |position: u64| usize::try_from(position - offset).unwrap_or(usize::MAX);
                content.write(start, &data[index(start)..index(stop)]);
            }
            _ => content.zero(start, stop.saturating_sub(start)),
        }
        at += run;
    }
}

/// The states of one instant; see [`Snapshot::crash_states`].
pub struct CrashStates {
    snapshot: Snapshot,
    items: Vec<Item>,
    plans: std::vec::IntoIter<(Choice, Length)>,
    seen: HashSet<u64>,
}

impl Iterator for CrashStates {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        loop {
            let (choice, length) = self.plans.next()?;
            let state = self.snapshot.state(&self.items, choice, length);
            if self.seen.insert(state.hash) {
                return Some(state);
            }
        }
    }
}

/// What one crash left.
pub struct CrashState {
    contents: Vec<Content>,
    names: BTreeMap<String, usize>,
    hash: u64,
    choice: Choice,
    length: Length,
}

impl CrashState {
    /// Equal for equal names and contents.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Whether a sector of it cannot be read.
    pub fn has_unreadable(&self) -> bool {
        self.contents.iter().any(|content| !content.unreadable().is_empty())
    }

    /// A new world that begins with this state, all of it durable.
    pub fn into_disk(self, seed: u64) -> SimDisk {
        let file = |content: Content| {
            let mut allocated = ExtentSet::new();
            let mut at = 0;
            while let Some((start, end)) = content.next_data(at) {
                allocated.insert(Extent::between(start, end).widen(super::BLOCK_BYTES, u64::MAX));
                at = end;
            }
            Arc::new(SimFile { live: content.clone(), durable: content, log: Vec::new(), allocated })
        };
        SimDisk::with(seed, self.contents.into_iter().map(file).collect(), self.names)
    }
}

impl fmt::Display for CrashState {
    /// The choice that made it, for repeating.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "persisted {:?}, length {:?}, state {:016x}", self.choice, self.length, self.hash)
    }
}
