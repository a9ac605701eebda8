//! A bitmap with summaries: set from many threads without a lock, searched without reading what is empty.
//!
//! Level 0 has one bit per tracked block. A bit of level `n + 1` stands for one 64-bit word of level `n`. The last
//! level is short enough to be read through in microseconds. All words exist from the start as address space and
//! cost memory only once touched, so setting a bit never allocates and cannot fail.
//!
//! Invariant: when no call is running, a word that is not zero has its summary bit set. The reverse need not hold:
//! a summary bit may be left over a word that is zero; the search passes it by.
//!
//! Memory orders. Every change is one atomic read-modify-write with acquire and release:
//!
//! * [`set`](DirtyBitmap::set) goes *up*: the words of level 0 first, then their summaries, unconditionally (a
//!   summary seen set may be about to be cleared, so looking first would not do).
//! * [`clear`](DirtyBitmap::clear) clears the word, and if that left it zero, clears the summary bit and then
//!   **looks at the word again**; if it is no longer zero, the summary bit is set back.
//!
//! No bit is lost: the two changes of one summary bit have an order. If the setter's comes first, the clearer's
//! change acquires it, so the setter's word is visible to the second look, which sets the bit back. If the clearer's
//! comes first, the setter's stays. The same holds between any two levels. Calls of `clear` exclude each other (the
//! tracker's lock sees to that), so nobody else empties the word between clearing and the second look.

use crate::sync::{AtomicU64, Ordering, zeroed_words};

/// Bits in a word.
const WORD_BITS: u64 = 64;

/// A level of at most this many words needs no summary: 128 KiB are read in a few microseconds.
const UNSUMMARISED_WORDS_MAX: usize = 16 * 1024;

/// One bit per block, with summaries (module documentation).
pub(crate) struct DirtyBitmap {
    bits: u64,
    levels: Vec<Box<[AtomicU64]>>,
}

/// The bits of word `word` that lie in `first..=last` (bit numbers of the level).
fn mask(word: u64, first: u64, last: u64) -> u64 {
    let low = if word == first / WORD_BITS { !0 << (first % WORD_BITS) } else { !0 };
    let high = if word == last / WORD_BITS { !0 >> (WORD_BITS - 1 - last % WORD_BITS) } else { !0 };
    low & high
}

/// A word number as an index. Words exist in memory, so it always fits; a number that does not is past the end.
fn index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(usize::MAX)
}

impl DirtyBitmap {
    /// `bits` clear bits; `None` when there is no address space for them.
    pub(crate) fn new(bits: u64) -> Option<Self> {
        Self::with_levels(bits, UNSUMMARISED_WORDS_MAX)
    }

    /// As [`new`](Self::new), with a summary over every level of more than `unsummarised_words_max` (at least 1).
    pub(crate) fn with_levels(bits: u64, unsummarised_words_max: usize) -> Option<Self> {
        let mut levels = Vec::new();
        let mut words = usize::try_from(bits.div_ceil(WORD_BITS)).ok()?;
        loop {
            levels.push(zeroed_words(words)?);
            if words <= unsummarised_words_max.max(1) {
                return Some(Self { bits, levels });
            }
            words = words.div_ceil(64);
        }
    }

    /// Number of bits.
    pub(crate) fn bits(&self) -> u64 {
        self.bits
    }

    /// Sets `first..=last`, which must lie inside; says how many of them were clear.
    pub(crate) fn set(&self, first: u64, last: u64) -> u64 {
        let mut newly_set = 0;
        let (mut first, mut last) = (first, last);
        for (level, words) in self.levels.iter().enumerate() {
            for word in first / WORD_BITS..=last / WORD_BITS {
                let Some(cell) = words.get(index(word)) else { break };
                let wanted = mask(word, first, last);
                let before = cell.fetch_or(wanted, Ordering::AcqRel);
                if level == 0 {
                    newly_set += u64::from((wanted & !before).count_ones());
                }
            }
            (first, last) = (first / WORD_BITS, last / WORD_BITS);
        }
        newly_set
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: u64) -> Option<u64> {
        let (mut level, mut position) = (0, from);
        loop {
            let word = position / WORD_BITS;
            let cell = self.levels.get(level)?.get(index(word))?;
            let found = cell.load(Ordering::Acquire) & (!0 << (position % WORD_BITS));
            if found == 0 {
                if level + 1 < self.levels.len() {
                    // The next word of this level is the next bit of the summary.
                    level += 1;
                    position = word + 1;
                } else {
                    position = (word + 1) * WORD_BITS;
                }
                continue;
            }
            let bit = word * WORD_BITS + u64::from(found.trailing_zeros());
            if level == 0 {
                return Some(bit);
            }
            level -= 1;
            position = bit * WORD_BITS;
        }
    }

    /// How many bits from `first` to `last` are set.
    pub(crate) fn count(&self, first: u64, last: u64) -> u64 {
        let last = last.min(self.bits.saturating_sub(1));
        if first > last {
            return 0;
        }
        let words = self.levels.first().map_or(&[][..], |level| level);
        let inside = words.get(index(first / WORD_BITS)..=index(last / WORD_BITS)).unwrap_or_default();
        let count = |(number, cell): (usize, &AtomicU64)| {
            let mut word = cell.load(Ordering::Acquire);
            if number == 0 {
                word &= !0 << (first % WORD_BITS);
            }
            if number + 1 == inside.len() {
                word &= !0 >> (WORD_BITS - 1 - last % WORD_BITS);
            }
            u64::from(word.count_ones())
        };
        inside.iter().enumerate().map(count).sum()
    }

    /// Clears the run of set bits that begins at `first`, up to `count_max` of them, and says how many it cleared;
    /// what they stood for must be read only afterwards. Calls exclude each other.
    pub(crate) fn clear(&self, first: u64, count_max: u64) -> u64 {
        let end = first.saturating_add(count_max).min(self.bits);
        let mut at = first;
        while at < end {
            let word = at / WORD_BITS;
            let Some(cell) = self.levels.first().and_then(|words| words.get(index(word))) else { break };
            let shift = at % WORD_BITS;
            let here_max = (end - at).min(WORD_BITS - shift);
            let run = u64::from((cell.load(Ordering::Relaxed) >> shift).trailing_ones()).min(here_max);
            if run == 0 {
                break;
            }
            // Nobody else clears, so all of these are still set.
            let wanted = mask(word, at, at + run - 1);
            if cell.fetch_and(!wanted, Ordering::AcqRel) & !wanted == 0 {
                self.clear_summary(0, word);
            }
            at += run;
            if run < here_max {
                break;
            }
        }
        at - first
    }

    /// Clears the summary of word `word` of `level`, which was found zero, unless it has filled again.
    fn clear_summary(&self, level: usize, word: u64) {
        let Some(summary) = self.levels.get(level + 1) else { return };
        let bit = 1 << (word % WORD_BITS);
        let Some(cell) = summary.get(index(word / WORD_BITS)) else { return };
        let left = cell.fetch_and(!bit, Ordering::AcqRel) & !bit;
        let refilled = self
            .levels
            .get(level)
            .and_then(|words| words.get(index(word)))
            .is_some_and(|cell| cell.load(Ordering::Acquire) != 0);
        if refilled {
            self.set_summaries(level + 1, word);
        } else if left == 0 {
            self.clear_summary(level + 1, word / WORD_BITS);
        }
    }

    /// Sets bit `bit` of `level` and the summaries above it.
    fn set_summaries(&self, level: usize, bit: u64) {
        let mut bit = bit;
        for words in self.levels.iter().skip(level) {
            if let Some(cell) = words.get(index(bit / WORD_BITS)) {
                cell.fetch_or(1 << (bit % WORD_BITS), Ordering::AcqRel);
            }
            bit /= WORD_BITS;
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The invariant of the module documentation.
    fn summaries_cover(bitmap: &DirtyBitmap) -> bool {
        bitmap.levels.windows(2).all(|pair| {
            pair[0].iter().enumerate().all(|(word, cell)| {
                let summary = pair[1][word / 64].load(Ordering::Relaxed);
                cell.load(Ordering::Relaxed) == 0 || summary & (1 << (word % 64)) != 0
            })
        })
    }

    #[test]
    fn levels_of_a_large_disk() {
        // 16 TiB at 4 KiB: 512 MiB of address space, of which a search of the idle disk reads 128 KiB.
        let bitmap = DirtyBitmap::new(1 << 32).unwrap();
        let words: Vec<_> = bitmap.levels.iter().map(|level| level.len()).collect();
        assert_eq!(words, [1 << 26, 1 << 20, 1 << 14]);
        assert_eq!(bitmap.next_set(0), None);
        bitmap.set((1 << 32) - 1, (1 << 32) - 1);
        assert_eq!(bitmap.next_set(0), Some((1 << 32) - 1));
        assert_eq!(bitmap.clear((1 << 32) - 1, 7), 1);
        assert_eq!(bitmap.next_set(0), None);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(DirtyBitmap::new(u64::MAX).is_none());
    }

    #[test]
    fn a_left_over_summary_bit_is_passed_by() {
        let bitmap = DirtyBitmap::with_levels(64 * 64 * 3, 1).unwrap();
        bitmap.set_summaries(1, 2);
        bitmap.set(64 * 64 * 2 + 5, 64 * 64 * 2 + 5);
        assert_eq!(bitmap.next_set(0), Some(64 * 64 * 2 + 5));
        assert_eq!(bitmap.next_set(64 * 64 * 2 + 6), None);
    }

    proptest! {
        #[test]
        fn equals_a_set(
            bits in 1u64..20_000,
            steps in prop::collection::vec((any::<bool>(), 0u64..20_000, 1u64..400), 1..60),
        ) {
            let bitmap = DirtyBitmap::with_levels(bits, 1).unwrap();
            let mut model = BTreeSet::new();
            for (set, at, count) in steps {
                let at = at % bits;
                if set {
                    let last = (at + count - 1).min(bits - 1);
                    let newly_set = (at..=last).filter(|&bit| model.insert(bit)).count() as u64;
                    prop_assert_eq!(bitmap.set(at, last), newly_set);
                } else {
                    let found = bitmap.next_set(at);
                    prop_assert_eq!(found, model.range(at..).next().copied());
                    if let Some(first) = found {
                        let run = (first..bits).take_while(|bit| model.contains(bit)).count() as u64;
                        prop_assert_eq!(bitmap.clear(first, count), run.min(count));
                        for bit in first..first + run.min(count) {
                            model.remove(&bit);
                        }
                    }
                }
                prop_assert!(summaries_cover(&bitmap));
            }
        }
    }
}
