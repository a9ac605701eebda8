//! The block allocation table in memory, and the header that shares its first sector.
//!
//! [`Table`] holds the words of the file from byte 0 to the end of the table. Entries are atomic and read without a
//! lock. Pages of zeros take no memory: a table costs what the file really holds of it (M2 of the crash model).
//! [`Bat`] is the one owner of header, table and the knowledge which of their sectors the file does not have yet.
//!
//! Invariants:
//! * an entry changes, and its sector becomes dirty, in one step under the lock: what a seal copies is exactly what
//!   was published or cleared before it;
//! * whoever writes the first sector, be it for an entry or for the in-use mark, takes header and entries 0..111
//!   from here, as they are now (R2).
//!
//! Locking: one mutex for the header and the dirty sectors; it is never held while another lock is taken.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoBuf, Storage, StorageExt, buffer::is_zero, map::Words};
use crate::mutant::{self, Mutant};
use crate::units::{FileCluster, FileOffset, GuestCluster, SECTOR_BYTES};

use super::alloc::{SyncMark, trimmed_bytes};
use super::commit::CommitPlan;
use super::geometry::{ENTRY_BYTES, Geometry};
use super::header::{HEADER_BYTES, Header};

/// Words in a page of the table (16 KiB).
const PAGE_WORDS: usize = 4096;
const PAGE_BYTES: usize = PAGE_WORDS * 4;
/// The table is read in pieces of at most this size: a huge page.
const READ_BYTES: usize = 2 << 20;
/// And written in pieces of at most this.
const PIECE_BYTES: usize = 1 << 20;
/// Words before the first entry: the header.
const HEADER_WORDS: u64 = HEADER_BYTES / ENTRY_BYTES;
/// The header as a length in memory.
const HEADER_LEN: usize = 64;

/// [`PAGE_WORDS`] words of the table.
enum Page {
    /// Alone among zeros.
    Own(Box<[AtomicU32]>),
    /// One of those that were read at once, from this word on.
    Part(Arc<Words>, usize),
}

impl Page {
    fn words(&self) -> &[AtomicU32] {
        match self {
            Self::Own(words) => words,
            Self::Part(words, first) => &words[*first..*first + PAGE_WORDS],
        }
    }
}

/// What a piece of the table is read into.
enum Piece {
    /// May become [pages](Page::Part) as it is.
    Whole(Words),
    /// Of a table too short for a map of its own.
    Short(IoBuf),
}

impl Piece {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Whole(words) => words.as_mut_bytes(),
            Self::Short(buffer) => buffer.as_mut_slice(),
        }
    }
}

/// The words of the file from byte 0 to the end of the table and of the padding that is written with it. The header's
/// own words are zero here.
pub(crate) struct Table {
    pages: Box<[OnceLock<Page>]>,
}

fn page_of(words: impl Iterator<Item = u32>) -> Page {
    let mut page: Vec<AtomicU32> = words.take(PAGE_WORDS).map(AtomicU32::new).collect();
    page.resize_with(PAGE_WORDS, || AtomicU32::new(0));
    Page::Own(page.into_boxed_slice())
}

/// What was read from a file, as numbers.
fn in_host_order(words: Words) -> Words {
    if cfg!(target_endian = "big") {
        for word in words.iter() {
            word.store(u32::from_le(word.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
    }
    words
}

/// Page and place in it of a word. A page that no machine could hold is a number that no table has.
fn split(word: u64) -> (usize, usize) {
    let word = usize::try_from(word).unwrap_or(usize::MAX);
    (word / PAGE_WORDS, word % PAGE_WORDS)
}

impl Table {
    /// An empty table whose pages cover `bytes` bytes of file.
    fn empty(bytes: u64) -> Result<Self> {
        let count = usize::try_from(bytes.div_ceil(PAGE_BYTES as u64))
            .map_err(|_| Error::new(ErrorKind::Memory, "read table: it is too long for this machine"))?;
        let mut pages = Vec::new();
        pages
            .try_reserve_exact(count)
            .map_err(|error| Error::new(ErrorKind::Memory, "read table: no memory").caused_by(error))?;
        pages.resize_with(count, OnceLock::new);
        Ok(Self { pages: pages.into_boxed_slice() })
    }

    /// Reads the first `bytes` bytes of the file, skipping what the host knows to be a hole.
    fn read(storage: &dyn Storage, bytes: u64) -> Result<Self> {
        let failed = |offset: u64| {
            move |source: io::Error| Error::io(ErrorKind::Read, "read table", source).at_offset(offset)
        };
        let table = Self::empty(bytes)?;
        let no_memory = |source| Error::io(ErrorKind::Memory, "read table", source);
        let piece_bytes = READ_BYTES
            .min(usize::try_from(bytes).unwrap_or(READ_BYTES).next_multiple_of(PAGE_BYTES))
            .max(PAGE_BYTES);
        // A short table is not worth a map of its own.
        let mut piece = match piece_bytes == READ_BYTES {
            true => Piece::Whole(Words::try_zeroed(piece_bytes).map_err(no_memory)?),
            false => Piece::Short(IoBuf::try_zeroed(piece_bytes).map_err(no_memory)?),
        };
        let mut at = 0;
        while at < bytes {
            let Some((data_start, data_end)) = storage.next_data(at).map_err(failed(at))? else { break };
            // Whole pages, so that no page is made of two reads.
            at = at.max(data_start - data_start % PAGE_BYTES as u64);
            let end = data_end.div_ceil(PAGE_BYTES as u64).saturating_mul(PAGE_BYTES as u64).min(bytes);
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(piece_bytes).min(piece_bytes);
                let read = piece.bytes();
                storage.read_padded_at(at, &mut read[..len]).map_err(failed(at))?;
                let read = &mut read[..len.next_multiple_of(PAGE_BYTES).min(piece_bytes)];
                read[len..].fill(0);
                if at == 0 {
                    read[..len.min(HEADER_LEN)].fill(0);
                }
                let (first_page, _) = split(at / ENTRY_BYTES);
                let slots = table.pages.get(first_page..).unwrap_or_default();
                let is_full = read.len() == READ_BYTES && read.chunks(PAGE_BYTES).all(|page| !is_zero(page));
                // Each page is read once: it cannot be set already.
                match &mut piece {
                    Piece::Whole(words) if is_full => {
                        let next = Words::try_zeroed(piece_bytes).map_err(no_memory)?;
                        let words = Arc::new(in_host_order(std::mem::replace(words, next)));
                        for (slot, first) in slots.iter().zip((0..words.len()).step_by(PAGE_WORDS)) {
                            let _ = slot.set(Page::Part(Arc::clone(&words), first));
                        }
                    }
                    piece => {
                        let len = len.next_multiple_of(PAGE_BYTES).min(piece_bytes);
                        for (slot, bytes) in slots.iter().zip(piece.bytes()[..len].chunks(PAGE_BYTES)) {
                            if !is_zero(bytes) {
                                let words =
                                    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
                                let _ = slot.set(page_of(words));
                            }
                        }
                    }
                }
                at += len as u64;
            }
        }
        Ok(table)
    }

    /// An entry; 0 past the end of the table.
    pub(crate) fn entry(&self, cluster: GuestCluster) -> u32 {
        let (page, place) = split(HEADER_WORDS + u64::from(cluster.0));
        match self.pages.get(page).and_then(OnceLock::get) {
            Some(page) => page.words()[place].load(Ordering::Acquire),
            None => 0,
        }
    }

    /// Changes an entry and returns what it was.
    fn replace(&self, cluster: GuestCluster, raw: u32) -> u32 {
        let (page, place) = split(HEADER_WORDS + u64::from(cluster.0));
        match self.pages.get(page) {
            Some(slot) => {
                slot.get_or_init(|| page_of(std::iter::empty())).words()[place].swap(raw, Ordering::AcqRel)
            }
            None => 0,
        }
    }

    /// Calls `visit` for each of the first `entries` entries that is not 0, in order.
    pub(crate) fn for_each_entry(&self, entries: u32, mut visit: impl FnMut(GuestCluster, u32)) {
        let end_word = HEADER_WORDS + u64::from(entries);
        for (index, page) in self.pages.iter().enumerate() {
            let Some(page) = page.get() else { continue };
            let first_word = (index * PAGE_WORDS) as u64;
            for (word, value) in (first_word..end_word).zip(page.words()) {
                let raw = value.load(Ordering::Acquire);
                if raw != 0
                    && let Some(Ok(cluster)) = word.checked_sub(HEADER_WORDS).map(u32::try_from)
                {
                    visit(GuestCluster(cluster), raw);
                }
            }
        }
    }

    /// Calls `visit` with the entries of each page that takes memory, in order, and the cluster of the first of them.
    pub(crate) fn for_each_page(&self, entries: u32, mut visit: impl FnMut(u32, &[AtomicU32])) {
        let end_word = HEADER_WORDS + u64::from(entries);
        for (index, page) in self.pages.iter().enumerate() {
            let Some(page) = page.get() else { continue };
            let first_word = (index * PAGE_WORDS) as u64;
            let skip = usize::try_from(HEADER_WORDS.saturating_sub(first_word)).unwrap_or(PAGE_WORDS);
            let end =
                usize::try_from(end_word.saturating_sub(first_word)).unwrap_or(PAGE_WORDS).min(PAGE_WORDS);
            let first = u32::try_from((first_word + skip as u64).saturating_sub(HEADER_WORDS));
            if let (Ok(first), Some(words)) = (first, page.words().get(skip..end)) {
                visit(first, words);
            }
        }
    }

    /// Words that take memory.
    pub(crate) fn words_present(&self) -> u64 {
        self.pages.iter().filter(|page| page.get().is_some()).count() as u64 * PAGE_WORDS as u64
    }

    /// The file bytes `start..end`, multiples of 4, without those of the header.
    fn bytes(&self, start: u64, end: u64) -> Vec<u8> {
        (start / ENTRY_BYTES..end / ENTRY_BYTES)
            .flat_map(|word| {
                let (page, place) = split(word);
                let value = self.pages.get(page).and_then(OnceLock::get).map(|page| &page.words()[place]);
                value.map_or(0, |value| value.load(Ordering::Acquire)).to_le_bytes()
            })
            .collect()
    }
}

/// What may be done to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing yet: the in-use mark is not set by us.
    Unmarked,
    /// Everything.
    Open,
    /// Nothing any more: closed.
    Closed,
    /// Nothing any more: a write or sync has failed, what the file holds is not known.
    Poisoned,
}

struct Inner {
    header: Header,
    state: State,
    /// Sectors of the table that the file does not have as they are here.
    dirty: BTreeSet<u32>,
    /// Changes since the last seal.
    changes: usize,
    /// Clusters whose entries were cleared since the last seal.
    cleared: Vec<FileCluster>,
    epoch: u64,
    /// Plans that have not come back.
    plans: usize,
    /// Of a mutant: the first sector as it was read.
    stale: Option<Vec<u8>>,
}

/// Header and table of one image.
pub(crate) struct Bat {
    geometry: Geometry,
    table: Table,
    /// Writes begin and end at multiples of this, at least a sector.
    write_unit: u64,
    /// The end of what is written with the table: a multiple of the unit, or where data begin.
    area_end: u64,
    inner: Mutex<Inner>,
    /// Changes that are not durable.
    pending: AtomicUsize,
    /// Entries that are not 0.
    allocated: AtomicU64,
    /// The state is `Open`: a copy to be read without the lock.
    open: AtomicBool,
}

/// The sector of the file that holds an entry.
fn sector_of(cluster: GuestCluster) -> u32 {
    let byte = HEADER_BYTES + ENTRY_BYTES * u64::from(cluster.0);
    // At most 2^34 / 512.
    u32::try_from(byte / SECTOR_BYTES).unwrap_or(u32::MAX)
}

impl Bat {
    /// Reads the table that `header` describes. The header has been checked against the length of the file.
    pub(crate) fn read(storage: &dyn Storage, header: Header) -> Result<Self> {
        let geometry = header.geometry().clone();
        let write_unit = u64::from(storage.alignment().offset).max(SECTOR_BYTES);
        let area_end = geometry.table_bytes().next_multiple_of(write_unit).min(geometry.data_start().0);
        let table = Table::read(storage, area_end)?;
        let inner = Inner {
            header,
            state: State::Unmarked,
            dirty: BTreeSet::new(),
            changes: 0,
            cleared: Vec::new(),
            epoch: 0,
            plans: 0,
            stale: None,
        };
        let bat = Self {
            geometry,
            table,
            write_unit,
            area_end,
            inner: Mutex::new(inner),
            pending: AtomicUsize::new(0),
            allocated: AtomicU64::new(0),
            open: AtomicBool::new(false),
        };
        if mutant::is_active(Mutant::StaleHeaderSector) {
            let mut inner = bat.lock();
            inner.stale = Some(bat.area_bytes(&inner.header, 0, bat.write_unit.min(bat.area_end)));
        }
        Ok(bat)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds this lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the table cannot be written on this storage: the last unit of the table holds data, too.
    pub(crate) fn write_obstacle(&self) -> Option<String> {
        (!self.area_end.is_multiple_of(self.write_unit)).then(|| {
            format!(
                "data begin at byte {}, inside the last {} bytes of the table",
                self.area_end, self.write_unit
            )
        })
    }

    /// How much of the file belongs to header and table, as they are written.
    pub(crate) fn area_bytes_len(&self) -> u64 {
        self.area_end
    }

    /// The highest cluster that an entry names now.
    pub(crate) fn highest(&self) -> Option<FileCluster> {
        let mut highest = 0;
        self.table.for_each_page(self.geometry.entries(), |_, words| {
            highest = words.iter().fold(highest, |highest, word| highest.max(word.load(Ordering::Acquire)));
        });
        self.geometry.entry_to_cluster(highest).ok().flatten()
    }

    /// The entries.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// A copy of the header as it is now.
    pub(crate) fn header(&self) -> Header {
        self.lock().header.clone()
    }

    /// Entries that are not 0.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Told once, by whoever counted them.
    pub(crate) fn set_allocated(&self, count: u64) {
        self.allocated.store(count, Ordering::Relaxed);
    }

    /// Changes that are not durable yet.
    pub(crate) fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    /// Enters a mapping. The cluster's content is complete: it has been written, not yet synced. The place that the
    /// entry named before goes into quarantine.
    pub(crate) fn publish(&self, cluster: GuestCluster, raw: u32) {
        let mut inner = self.lock();
        let before = self.table.replace(cluster, raw);
        if before == 0 {
            self.allocated.fetch_add(1, Ordering::Relaxed);
        } else if before != raw
            && !mutant::is_active(Mutant::ReuseBeforeClearDurable)
            && let Ok(Some(place)) = self.geometry.entry_to_cluster(before)
        {
            inner.cleared.push(place);
        }
        self.changed(&mut inner, cluster);
    }

    fn changed(&self, inner: &mut Inner, cluster: GuestCluster) {
        inner.dirty.insert(sector_of(cluster));
        inner.changes += 1;
        self.pending.fetch_add(1, Ordering::AcqRel);
    }

    /// Clears a mapping and puts its cluster into quarantine; `None` if there was none.
    pub(crate) fn clear(&self, cluster: GuestCluster) -> Result<Option<FileCluster>> {
        let mut inner = self.lock();
        if inner.state != State::Open {
            return Err(not_open(inner.state, "discard a cluster"));
        }
        let Some(place) = self.geometry.entry_to_cluster(self.table.entry(cluster))? else { return Ok(None) };
        self.table.replace(cluster, 0);
        self.allocated.fetch_sub(1, Ordering::Relaxed);
        if !mutant::is_active(Mutant::ReuseBeforeClearDurable) {
            inner.cleared.push(place);
        }
        self.changed(&mut inner, cluster);
        Ok(Some(place))
    }

    /// Takes an entry out in memory, when an image is opened; with `dirty`, to be written by
    /// [`rewrite`](Self::rewrite).
    pub(crate) fn drop_entry(&self, cluster: GuestCluster, dirty: bool) {
        let mut inner = self.lock();
        if self.table.replace(cluster, 0) != 0 {
            self.allocated.fetch_sub(1, Ordering::Relaxed);
        }
        if dirty {
            inner.dirty.insert(sector_of(cluster));
        }
    }

    /// Copies the dirty sectors as they are now.
    pub(crate) fn seal(&self, sync_mark: SyncMark) -> CommitPlan {
        let mut inner = self.lock();
        inner.epoch += 1;
        inner.plans += 1;
        let dirty = std::mem::take(&mut inner.dirty);
        CommitPlan {
            writes: self.copy(&inner.header, &dirty),
            epoch: inner.epoch,
            sectors: dirty.into_iter().collect(),
            changes: std::mem::take(&mut inner.changes),
            cleared: std::mem::take(&mut inner.cleared),
            sync_mark,
        }
    }

    /// A plan is durable: its clusters may leave quarantine.
    pub(crate) fn committed(&self, plan: CommitPlan) -> Vec<FileCluster> {
        let mut inner = self.lock();
        inner.plans = inner.plans.saturating_sub(1);
        self.pending.fetch_sub(plan.changes, Ordering::AcqRel);
        plan.cleared
    }

    /// A plan failed: nobody knows what the file holds. Its sectors are dirty again and the image is poisoned.
    pub(crate) fn failed(&self, plan: CommitPlan) {
        let mut inner = self.lock();
        inner.plans = inner.plans.saturating_sub(1);
        inner.dirty.extend(plan.sectors);
        inner.changes += plan.changes;
        inner.cleared.extend(plan.cleared);
        self.enter(&mut inner, State::Poisoned);
    }

    /// The runs of whole units that cover `sectors`.
    fn copy(&self, header: &Header, sectors: &BTreeSet<u32>) -> Vec<(FileOffset, Vec<u8>)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &sector in sectors {
            let byte = u64::from(sector) * SECTOR_BYTES;
            let start = byte - byte % self.write_unit;
            let end = (start + self.write_unit).min(self.area_end);
            match runs.last_mut() {
                Some((run_start, run_end)) if *run_end >= start && end - *run_start <= PIECE_BYTES as u64 => {
                    *run_end = end.max(*run_end);
                }
                Some((_, run_end)) if *run_end >= end => {}
                _ => runs.push((start, end)),
            }
        }
        runs.into_iter()
            .map(|(start, end)| (FileOffset(start), self.area_bytes(header, start, end)))
            .collect()
    }

    /// The bytes of header and table from `start` to `end`, as the file should have them.
    fn area_bytes(&self, header: &Header, start: u64, end: u64) -> Vec<u8> {
        let mut bytes = self.table.bytes(start, end);
        if start == 0 {
            let header = header.encode();
            let len = header.len().min(bytes.len());
            bytes[..len].copy_from_slice(&header[..len]);
        }
        bytes
    }

    /// Writes all of the table that the file does not have as a hole, as it is here, and syncs: for an image that was not
    /// closed, before it is in use. After a failed sync the page cache may show entries, and cleared ones, that the
    /// disk does not have, and no later sync would write them.
    pub(crate) fn rewrite(&self, storage: &dyn Storage) -> Result<()> {
        let operation = "write the table anew";
        let mut inner = self.lock();
        let mut at = 0;
        while at < self.area_end {
            let found = storage
                .next_data(at)
                .map_err(|source| Error::io(ErrorKind::Read, operation, source).at_offset(at))?;
            let Some((data_start, data_end)) = found else { break };
            at = at.max(data_start - data_start % self.write_unit);
            let end = data_end.checked_next_multiple_of(self.write_unit).unwrap_or(u64::MAX);
            let end = end.min(self.area_end).min(at.saturating_add(PIECE_BYTES as u64));
            if at >= end {
                break;
            }
            storage
                .write_all_at(at, &self.area_bytes(&inner.header, at, end))
                .map_err(|source| self.poison(&mut inner, ErrorKind::Write, operation, source))?;
            at = end;
        }
        storage.sync_data().map_err(|source| self.poison(&mut inner, ErrorKind::Sync, operation, source))?;
        inner.dirty.clear();
        Ok(())
    }

    /// Writes the first unit: the current header with the current entries behind it.
    fn write_first_unit(&self, storage: &dyn Storage, inner: &mut Inner, operation: &str) -> Result<()> {
        let mut bytes = self.area_bytes(&inner.header, 0, self.write_unit.min(self.area_end));
        if let Some(stale) = &inner.stale {
            bytes[HEADER_LEN..].copy_from_slice(&stale[HEADER_LEN..]);
        }
        storage
            .write_all_at(0, &bytes)
            .map_err(|source| self.poison(inner, ErrorKind::Write, operation, source))
    }

    /// Sets the in-use mark and drops the extension, durably. Does nothing if that was done.
    pub(crate) fn mark_open(&self, storage: &dyn Storage) -> Result<()> {
        let mut inner = self.lock();
        match inner.state {
            State::Open => return Ok(()),
            State::Unmarked => {}
            state => return Err(not_open(state, "set the in-use mark")),
        }
        inner.header.set_open();
        self.write_first_unit(storage, &mut inner, "set the in-use mark")?;
        storage
            .sync_data()
            .map_err(|source| self.poison(&mut inner, ErrorKind::Sync, "sync the in-use mark", source))?;
        self.enter(&mut inner, State::Open);
        Ok(())
    }

    /// Cuts what the table does not use off the end of the file, syncs, clears the in-use mark and syncs again. Everything
    /// sealed must have been committed and nothing be pending: then the table here is the one of the file.
    pub(crate) fn close(&self, storage: &dyn Storage) -> Result<()> {
        let mut inner = self.lock();
        match inner.state {
            State::Closed => return Ok(()),
            State::Open => {}
            state => return Err(not_open(state, "close the image")),
        }
        if !inner.dirty.is_empty() || inner.plans > 0 || self.pending() > 0 {
            return Err(Error::new(ErrorKind::Busy, "close the image: its table is not flushed"));
        }
        let len = trimmed_bytes(&self.geometry, self.highest());
        let early = mutant::is_active(Mutant::ClosedBeforeLastSync);
        if early {
            inner.header.set_closed();
            self.write_first_unit(storage, &mut inner, "clear the in-use mark")?;
        }
        let file_bytes = storage.len().map_err(|source| {
            self.poison(&mut inner, ErrorKind::Stat, "close the image: read its length", source)
        })?;
        if file_bytes != len {
            storage.set_len(len).map_err(|source| {
                self.poison(&mut inner, ErrorKind::Truncate, "cut the tail of the image", source)
            })?;
        }
        storage.sync_data().map_err(|source| {
            self.poison(&mut inner, ErrorKind::Sync, "sync the image before closing it", source)
        })?;
        if !early {
            inner.header.set_closed();
            self.write_first_unit(storage, &mut inner, "clear the in-use mark")?;
            storage.sync_data().map_err(|source| {
                self.poison(&mut inner, ErrorKind::Sync, "sync the cleared in-use mark", source)
            })?;
        }
        self.enter(&mut inner, State::Closed);
        Ok(())
    }

    /// Gives the image the header `make` makes of the present one, durably, in one write of the first unit; the entries
    /// behind it stay as they are in the file, which has them all. Nothing is written through this table afterwards: it
    /// is that of the old sizes. A failure poisons the image.
    pub(crate) fn replace_header(
        &self,
        storage: &dyn Storage,
        make: impl FnOnce(&Header) -> Result<Header>,
    ) -> Result<()> {
        let operation = "write the header of the new size";
        let mut inner = self.lock();
        if inner.state != State::Open {
            return Err(not_open(inner.state, operation));
        }
        if !inner.dirty.is_empty() || inner.plans > 0 || self.pending() > 0 {
            return Err(Error::new(ErrorKind::Busy, format!("{operation}: the table is not flushed")));
        }
        let header = make(&inner.header)?.encode();
        let len = usize::try_from(self.write_unit).unwrap_or(HEADER_LEN).max(HEADER_LEN);
        let mut unit = vec![0; len];
        let read = storage
            .read_available_at(0, &mut unit)
            .map_err(|source| Error::io(ErrorKind::Read, operation, source).at_offset(0))?;
        unit.truncate(read.max(HEADER_LEN));
        unit[..HEADER_LEN].copy_from_slice(&header);
        storage
            .write_all_at(0, &unit)
            .map_err(|source| self.poison(&mut inner, ErrorKind::Write, operation, source))?;
        storage.sync_data().map_err(|source| self.poison(&mut inner, ErrorKind::Sync, operation, source))?;
        self.enter(&mut inner, State::Closed);
        Ok(())
    }

    /// Fails unless the image may be written. Takes no lock while it may.
    pub(crate) fn check_open(&self, operation: &str) -> Result<()> {
        if self.open.load(Ordering::Acquire) { Ok(()) } else { Err(not_open(self.lock().state, operation)) }
    }

    fn enter(&self, inner: &mut Inner, state: State) {
        inner.state = state;
        self.open.store(state == State::Open, Ordering::Release);
    }

    /// A write to the table or header has failed: nothing more is written to this image (E1).
    fn poison(&self, inner: &mut Inner, kind: ErrorKind, operation: &str, source: io::Error) -> Error {
        self.enter(inner, State::Poisoned);
        Error::io(kind, operation, source)
            .advise("close the image, look at the host's storage, then open it again")
    }
}

fn not_open(state: State, operation: &str) -> Error {
    match state {
        State::Poisoned => Error::new(
            ErrorKind::Write,
            format!("{operation}: an earlier write or sync of this image has failed"),
        )
        .advise("close the image, look at the host's storage, then open it again"),
        State::Closed => Error::new(ErrorKind::Write, format!("{operation}: the image is closed")),
        State::Unmarked | State::Open => {
            Error::new(ErrorKind::Write, format!("{operation}: the image is open for reading only"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::geometry::Version;
    use crate::format::header::{InUse, RawHeader};
    use crate::format::testing::{content, file_of, file_with_len, image, small};
    use crate::io::sim::{Call, SimStorage};
    use crate::io::{Alignment, Allocation};
    use crate::units::Sectors;
    use std::sync::atomic::AtomicU64;

    fn header_of(file: &dyn Storage) -> Header {
        let mut bytes = [0; 64];
        file.read_exact_at(0, &mut bytes).unwrap();
        RawHeader::decode(&bytes).validate(file.len().unwrap()).unwrap()
    }

    fn open(file: &SimStorage) -> Bat {
        let bat = Bat::read(file, header_of(file)).unwrap();
        bat.mark_open(file).unwrap();
        bat
    }

    fn publish(bat: &Bat, cluster: u32, raw: u32) {
        bat.publish(GuestCluster(cluster), raw);
    }

    #[test]
    fn a_seal_holds_what_came_before_it_and_nothing_later() {
        let file = image(1000);
        let bat = open(&file);
        publish(&bat, 0, 2);
        publish(&bat, 1, 3);
        publish(&bat, 999, 4);
        let plan = bat.seal(SyncMark::default());
        publish(&bat, 2, 5);
        publish(&bat, 500, 6);
        let places: Vec<_> = plan.writes.iter().map(|(offset, bytes)| (offset.0, bytes.len())).collect();
        assert_eq!(places, [(0, 512), ((64 + 4 * 999) / 512 * 512, 512)]);
        let first = &plan.writes[0].1;
        assert_eq!(RawHeader::decode(first.first_chunk().unwrap()).in_use, InUse::Open.encode());
        assert_eq!(first[64..76], [2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bat.pending(), plan.epoch), (5, 1));
        assert!(bat.committed(plan).is_empty());
        assert_eq!(bat.pending(), 2);
        let next = bat.seal(SyncMark::default());
        assert_eq!((next.writes.len(), next.epoch), (2, 2));
        assert_eq!(next.writes[0].1[64..80], [2, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn neighbouring_sectors_become_one_write() {
        let file = image(1000);
        let bat = open(&file);
        for cluster in [0, 200, 300] {
            publish(&bat, cluster, 2 + cluster);
        }
        let plan = bat.seal(SyncMark::default());
        assert_eq!(plan.writes.len(), 1);
        assert_eq!(plan.writes[0].1.len(), 3 * 512);
    }

    #[test]
    fn a_failed_plan_is_dirty_again_and_ends_all_writing() {
        let file = image(1000);
        let bat = open(&file);
        publish(&bat, 7, 2);
        let plan = bat.seal(SyncMark::default());
        let writes = plan.writes.clone();
        bat.failed(plan);
        assert_eq!(bat.seal(SyncMark::default()).writes, writes);
        assert!(bat.check_open("write").is_err());
        assert!(bat.clear(GuestCluster(7)).is_err());
        assert!(bat.close(&file).is_err());
    }

    #[test]
    fn closing_keeps_what_shares_the_sector_with_the_mark() {
        let file = image(1000);
        let bat = open(&file);
        assert_eq!(header_of(&file).in_use(), InUse::Open);
        assert_eq!(header_of(&file).raw().flags, 0, "not empty any more");
        publish(&bat, 5, 2);
        assert_eq!(bat.close(&file).unwrap_err().kind(), ErrorKind::Busy);
        let plan = bat.seal(SyncMark::default());
        assert_eq!(bat.close(&file).unwrap_err().kind(), ErrorKind::Busy, "a plan is out");
        for (offset, bytes) in &plan.writes {
            file.write_all_at(offset.0, bytes).unwrap();
        }
        bat.committed(plan);
        bat.close(&file).unwrap();
        bat.close(&file).unwrap();
        assert_eq!(header_of(&file).in_use(), InUse::Closed);
        assert_eq!(content(&file)[64 + 20], 2);
        assert_eq!(file.len().unwrap(), 3 * 4096);
        assert!(bat.mark_open(&file).is_err() && bat.clear(GuestCluster(5)).is_err());
    }

    #[test]
    fn a_failed_sync_leaves_the_mark() {
        let file = image(1000);
        let bat = open(&file);
        file.disk().inject(crate::io::sim::Fault::once(Call::Sync, libc::EIO));
        assert_eq!(bat.close(&file).unwrap_err().kind(), ErrorKind::Sync);
        assert!(bat.close(&file).is_err(), "it is not tried again");
        assert_eq!(header_of(&file).in_use(), InUse::Open);
    }

    #[test]
    fn writes_keep_the_alignment_and_the_padding() {
        let file = image(1000);
        // Junk behind the table must stay as it is.
        file.write_all_at(64 + 4000 + 4, &[9; 8]).unwrap();
        file.disk().set_alignment(Alignment { offset: 4096, memory: 4096 });
        let bat = open(&file);
        publish(&bat, 300, 3);
        let plan = bat.seal(SyncMark::default());
        let places: Vec<_> = plan.writes.iter().map(|(offset, bytes)| (offset.0, bytes.len())).collect();
        assert_eq!(places, [(0, 4096)]);
        publish(&bat, 999, 4);
        let reads = file.disk().calls(Call::Read);
        for (offset, bytes) in bat.seal(SyncMark::default()).writes {
            file.write_all_at(offset.0, &bytes).unwrap();
        }
        assert_eq!(file.disk().calls(Call::Read), reads, "nothing is patched from what the file holds");
        let after = content(&file);
        assert_eq!((after[64 + 1200], after[64 + 3996]), (3, 4));
        assert_eq!(after[64 + 4004..64 + 4012], [9; 8]);
        assert_eq!(bat.write_obstacle(), None);
    }

    #[test]
    fn data_behind_an_unaligned_table_is_not_written_over() {
        let geometry = Geometry::from_header(Version::V1, 63, 630, 10, 512).unwrap();
        let mut raw = Header::create(&small(10)).unwrap().raw().clone();
        raw.signature = crate::format::header::SIGNATURE_V1;
        (raw.cluster_sectors, raw.disk_sectors, raw.data_offset_sectors) = (63, 630, 1);
        let file = file_with_len(512 + 63 * 512);
        file.write_all_at(0, &raw.encode()).unwrap();
        assert_eq!(header_of(&file).geometry(), &geometry);
        assert_eq!(Bat::read(&file, header_of(&file)).unwrap().write_obstacle(), None);
        file.disk().set_alignment(Alignment { offset: 4096, memory: 1 });
        assert!(Bat::read(&file, header_of(&file)).unwrap().write_obstacle().is_some());
    }

    /// A sparse file that counts what is read of it.
    struct Sparse {
        len: u64,
        data: Vec<(u64, Vec<u8>)>,
        knows_holes: bool,
        bytes_read: AtomicU64,
    }

    impl Storage for Sparse {
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(usize::try_from(self.len.saturating_sub(offset)).unwrap());
            buffer[..count].fill(0);
            for (start, bytes) in &self.data {
                for (at, byte) in (*start..).zip(bytes) {
                    if at >= offset && at - offset < count as u64 {
                        buffer[usize::try_from(at - offset).unwrap()] = *byte;
                    }
                }
            }
            self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
            Ok(count)
        }
        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }
        fn set_len(&self, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn allocate(&self, _: u64, _: u64, _: Allocation) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn len(&self) -> io::Result<u64> {
            Ok(self.len)
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
            if !self.knows_holes {
                return Ok((offset < self.len).then_some((offset, self.len)));
            }
            let blocks = self.data.iter().map(|(start, bytes)| {
                (start / 4096 * 4096, (start + bytes.len() as u64).next_multiple_of(4096))
            });
            Ok(blocks.filter(|(_, end)| *end > offset).map(|(start, end)| (start.max(offset), end)).min())
        }
    }

    fn sparse(clusters: u64, knows_holes: bool) -> Sparse {
        let geometry = Geometry::new(Version::V2, Sectors(2048), Sectors(2048 * clusters)).unwrap();
        let first = geometry.first_data_cluster().0;
        let entry = |raw: u32| (first + raw).to_le_bytes().to_vec();
        let last = 64 + 4 * (clusters - 1);
        Sparse {
            len: geometry.data_start().0 + (100 << 20),
            data: vec![
                (0, Header::create(&geometry).unwrap().encode().to_vec()),
                (64 + 4 * (clusters / 2), entry(1)),
                (last, entry(2)),
            ],
            knows_holes,
            bytes_read: AtomicU64::new(0),
        }
    }

    #[test]
    fn a_sparse_table_of_16_tib_costs_what_it_holds() {
        for knows_holes in [true, false] {
            let clusters = 1 << 24;
            let file = sparse(clusters, knows_holes);
            let bat = Bat::read(&file, header_of(&file)).unwrap();
            let last = u32::try_from(clusters - 1).unwrap();
            let first = bat.geometry.first_data_cluster().0;
            assert_eq!(bat.table().entry(GuestCluster(last / 2 + 1)), first + 1);
            assert_eq!(bat.table().entry(GuestCluster(last)), first + 2);
            assert_eq!(bat.table().entry(GuestCluster(u32::MAX)), 0);
            // Header page, one in the middle, one at the end.
            assert_eq!(bat.table().words_present(), 2 * PAGE_WORDS as u64);
            let mut found = Vec::new();
            bat.table().for_each_entry(bat.geometry.entries(), |cluster, _| found.push(cluster.0));
            assert_eq!(found, [last / 2 + 1, last]);
            let read = file.bytes_read.load(Ordering::Relaxed);
            let table_bytes = 64 + 4 * clusters;
            assert!(read <= if knows_holes { 1 << 16 } else { table_bytes + 4096 }, "read {read} bytes");
        }
    }

    #[test]
    fn full_and_holed_tables_are_what_the_file_says() {
        // Longer than two pieces, the last of them not whole.
        let entries = 1_100_000u32;
        let geometry = Geometry::new(Version::V2, Sectors(64), Sectors(64 * u64::from(entries))).unwrap();
        let value = |index: u32| if (600_000..610_000).contains(&index) { 0 } else { index + 100 };
        let mut bytes = Header::create(&geometry).unwrap().encode().to_vec();
        bytes.extend((0..entries).flat_map(|index| value(index).to_le_bytes()));
        let file = file_of(&bytes);
        file.set_len(geometry.data_start().0 + 32_768).unwrap();
        let bat = Bat::read(&file, header_of(&file)).unwrap();
        for index in (0..entries).step_by(997).chain([524_271, 524_272, 1_048_559, 1_048_560, entries - 1]) {
            assert_eq!(bat.table().entry(GuestCluster(index)), value(index), "{index}");
        }
        assert_eq!(bat.table().entry(GuestCluster(entries)), 0);
        let mut next = 0;
        bat.table().for_each_page(entries, |first, words| {
            for (index, word) in (first..).zip(words) {
                assert_eq!(word.load(Ordering::Relaxed), value(index));
            }
            assert!(first >= next && words.len() <= PAGE_WORDS);
            next = first + u32::try_from(words.len()).unwrap();
        });
        assert_eq!(next, entries);
        assert_eq!(bat.table.bytes(64, 64 + 4 * u64::from(entries))[..], bytes[64..]);
        bat.mark_open(&file).unwrap();
        publish(&bat, 600_005, 77);
        publish(&bat, 0, 78);
        let found = (bat.table().entry(GuestCluster(600_005)), bat.table().entry(GuestCluster(0)));
        assert_eq!(found, (77, 78));
    }

    #[test]
    fn a_table_longer_than_its_file_is_refused_before_memory_is_taken() {
        let mut file = sparse(1 << 24, true);
        file.len = 1 << 20;
        let mut bytes = [0; 64];
        file.read_exact_at(0, &mut bytes).unwrap();
        let error = RawHeader::decode(&bytes).validate(file.len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn reading_leaves_the_header_out_of_the_entries() {
        let file = file_of(&content(&image(1000)));
        let bat = Bat::read(&file, header_of(&file)).unwrap();
        assert_eq!(bat.table().words_present(), 0, "nothing but a header");
    }
}
