//! What a simulated file holds: 4 KiB pages shared between copies, nothing at all for pages of zeros.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes in a page.
const PAGE_BYTES: u64 = 4096;
const PAGE: usize = 4096;
/// Bytes that are hashed together: a change costs no more than the sectors it touches.
const SECTOR: usize = 512;
const SECTORS: usize = PAGE / SECTOR;

/// Fixed content and its hashes.
#[derive(Clone)]
struct Page {
    bytes: [u8; PAGE],
    /// Per sector; 0 for zeros.
    hashes: [u64; SECTORS],
}

impl Page {
    const ZERO: Self = Self { bytes: [0; PAGE], hashes: [0; SECTORS] };

    fn change(&mut self, start: usize, data: &[u8]) {
        let end = start + data.len();
        self.bytes[start..end].copy_from_slice(data);
        let sectors = start / SECTOR..end.div_ceil(SECTOR);
        let bytes = self.bytes.as_chunks::<SECTOR>().0;
        for (hash, bytes) in self.hashes[sectors.clone()].iter_mut().zip(&bytes[sectors]) {
            *hash = if crate::io::buffer::is_zero(bytes) { 0 } else { hash_bytes(bytes) | 1 };
        }
    }

    fn hash(&self) -> u64 {
        self.hashes.iter().fold(0, |hash, &sector| mix(hash, sector))
    }

    fn is_zero(&self) -> bool {
        self.hashes == [0; SECTORS]
    }
}

/// Bytes of a file. Cloning shares all pages; a write copies those it touches.
#[derive(Clone, Default)]
pub(super) struct Content {
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
    len: u64,
    /// Exclusive or of every page's hash mixed with its number, so that it is kept up to date page by page.
    hash: u64,
    /// Sectors that cannot be read until they are wholly written; few, if any.
    unreadable: Vec<u64>,
}

/// A fast hash for telling states apart; no defence against anybody.
pub(super) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut lanes = [0x9e37_79b9_7f4a_7c15_u64, 1, 2, 3];
    let (groups, _) = bytes.as_chunks::<32>();
    for group in groups {
        for (lane, word) in lanes.iter_mut().zip(group.as_chunks::<8>().0) {
            *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        }
    }
    let rest = &bytes[groups.len() * 32..];
    let mut hash = lanes.iter().fold(bytes.len() as u64, |hash, &lane| mix(hash, lane));
    for &byte in rest {
        hash = mix(hash, u64::from(byte));
    }
    hash
}

/// Folds `value` into `hash`.
pub(super) fn mix(hash: u64, value: u64) -> u64 {
    let mut mixed = hash.rotate_left(5) ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Cuts a byte range at page boundaries: page number, first byte in the page, bytes.
fn pages_of(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let page = at / PAGE_BYTES;
            let next = end.min((page + 1).saturating_mul(PAGE_BYTES));
            let piece = (page, small(at % PAGE_BYTES), small(next - at));
            at = next;
            piece
        })
    })
}

/// A number below or at a page's size.
fn small(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(PAGE)
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Tells contents of different bytes, length or unreadable sectors apart.
    pub(super) fn hash(&self) -> u64 {
        self.unreadable.iter().fold(mix(self.hash, self.len), |hash, sector| mix(hash, *sector))
    }

    /// Sectors that cannot be read.
    pub(super) fn unreadable(&self) -> &[u64] {
        &self.unreadable
    }

    /// From now on the sector cannot be read. What it held is gone.
    pub(super) fn lose_sector(&mut self, sector: u64) {
        let at = sector * SECTOR as u64;
        let len = self.len.saturating_sub(at).min(SECTOR as u64);
        if len == 0 {
            return;
        }
        // Not zeros: the host has given it a place.
        self.write(at, &[0xee; SECTOR][..small(len)]);
        if !self.unreadable.contains(&sector) {
            self.unreadable.push(sector);
        }
    }

    /// How many bytes of a range can be read before the first that cannot.
    pub(super) fn readable(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        let lost = self.unreadable.iter().map(|sector| sector * SECTOR as u64);
        let first = lost.filter(|&at| at < end && at + SECTOR as u64 > offset).min();
        first.map_or(len, |at| at.saturating_sub(offset))
    }

    /// Whether a write would keep a part of a sector that cannot be read: the host cannot do that.
    pub(super) fn needs_unreadable(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.unreadable.iter().map(|sector| sector * SECTOR as u64).any(|at| {
            let is_touched = at < end && at + SECTOR as u64 > offset;
            is_touched && !(offset <= at && (at + SECTOR as u64 <= end || self.len <= end))
        })
    }

    /// What was wholly written, or emptied, can be read again.
    fn heal(&mut self, offset: u64, end: u64) {
        if !self.unreadable.is_empty() {
            let len = self.len;
            self.unreadable.retain(|sector| {
                let at = sector * SECTOR as u64;
                at < offset || (at + SECTOR as u64).min(len.max(at + 1)) > end
            });
        }
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let len = self.len.saturating_sub(offset).min(buffer.len() as u64);
        let mut done = 0;
        for (page, start, piece) in pages_of(offset, len) {
            let target = &mut buffer[done..done + piece];
            match self.pages.get(&page) {
                Some(page) => target.copy_from_slice(&page.bytes[start..start + piece]),
                None => target.fill(0),
            }
            done += piece;
        }
        done
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        for (page, start, piece) in pages_of(offset, data.len() as u64) {
            self.change(page, start, &data[done..done + piece]);
            done += piece;
        }
        self.len = self.len.max(offset.saturating_add(data.len() as u64));
        self.heal(offset, offset.saturating_add(data.len() as u64));
    }

    fn change(&mut self, number: u64, start: usize, data: &[u8]) {
        let mut page = match self.pages.get(&number) {
            Some(page) if data.len() < PAGE => Page::clone(page),
            _ => Page::ZERO,
        };
        page.change(start, data);
        let new = (!page.is_zero()).then(|| Arc::new(page));
        self.put(number, new);
    }

    fn put(&mut self, number: u64, new: Option<Arc<Page>>) {
        if new.is_none() && !self.pages.contains_key(&number) {
            return;
        }
        let pages = Arc::make_mut(&mut self.pages);
        if let Some(new) = &new {
            self.hash ^= mix(number, new.hash());
        }
        let old = match new {
            Some(new) => pages.insert(number, new),
            None => pages.remove(&number),
        };
        if let Some(old) = old {
            self.hash ^= mix(number, old.hash());
        }
    }

    /// Zeros inside the present length.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset >= end {
            return;
        }
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES))
            .map(|(&number, _)| number)
            .collect();
        for number in touched {
            let start = offset.max(number * PAGE_BYTES) - number * PAGE_BYTES;
            let stop = end.min((number + 1) * PAGE_BYTES) - number * PAGE_BYTES;
            if stop - start == PAGE_BYTES {
                self.put(number, None);
            } else {
                self.change(number, small(start), &[0; PAGE][..small(stop - start)]);
            }
        }
        self.heal(offset, end);
    }

    /// Shortens the file without forgetting what lies behind its end: that shows when it grows again, until
    /// [`forget_past_end`](Self::forget_past_end).
    pub(super) fn hide_past(&mut self, len: u64) {
        self.len = len;
    }

    /// Ends what [`hide_past`](Self::hide_past) began: from now on new bytes are zeros.
    pub(super) fn forget_past_end(&mut self) {
        let len = self.len;
        self.len = u64::MAX;
        self.set_len(len);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
            self.unreadable.retain(|sector| sector * (SECTOR as u64) < len);
        }
        self.len = len;
    }

    /// First page-wise run that is not all zero, at or after `offset`.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE_BYTES..).map(|(&number, _)| number);
        let first = pages.next()?;
        let last = pages.zip(first + 1..).take_while(|(found, expected)| found == expected).last();
        let end = last.map_or(first, |(number, _)| number) + 1;
        let range = ((first * PAGE_BYTES).max(offset), (end * PAGE_BYTES).min(self.len));
        (range.0 < range.1).then_some(range)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::large_stack_arrays, reason = "small numbers of tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn content_equals_a_vector(steps in prop::collection::vec((0u8..4, 0u64..20_000, 0u64..9_000, 0u8..3), 1..30)) {
            let mut content = Content::default();
            let mut model: Vec<u8> = Vec::new();
            for (kind, offset, len, value) in steps {
                let (start, end) = (offset as usize, (offset + len) as usize);
                match kind {
                    0 | 1 => {
                        content.write(offset, &vec![value; len as usize]);
                        if len > 0 && model.len() < end { model.resize(end, 0); }
                        model.resize(model.len().max(if len == 0 { start } else { end }), 0);
                        model[start..end].fill(value);
                    }
                    2 => {
                        content.zero(offset, len);
                        let limit = model.len();
                        model[start.min(limit)..end.min(limit)].fill(0);
                    }
                    _ => { content.set_len(offset); model.resize(start, 0); }
                }
                let mut read = vec![9; model.len() + 10];
                prop_assert_eq!(content.read(0, &mut read), model.len());
                prop_assert_eq!(&read[..model.len()], &model[..]);
                // The running hash equals that of the same bytes written at once.
                let mut fresh = Content::default();
                fresh.write(0, &model);
                prop_assert_eq!(content.hash(), fresh.hash());
            }
        }
    }

    #[test]
    fn runs_of_data_are_found() {
        let mut content = Content::default();
        content.set_len(1 << 40);
        assert_eq!(content.next_data(0), None);
        content.write(8192, &[1; 8192]);
        content.write(1 << 30, &[1]);
        assert_eq!(content.next_data(0), Some((8192, 16384)));
        assert_eq!(content.next_data(9000), Some((9000, 16384)));
        assert_eq!(content.next_data(16384), Some((1 << 30, (1 << 30) + 4096)));
    }
}
