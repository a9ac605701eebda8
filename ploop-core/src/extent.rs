//! Half-open ranges of guest bytes: the unit of tracking and copying.
//!
//! Invariant: `start <= end`, always. An extent cannot be built otherwise.

use std::fmt;

/// The guest bytes `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    start: u64,
    end: u64,
}

impl Extent {
    /// The extent that starts at byte `start` and holds `len` bytes; `None` when its end does not fit 64 bits.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len).map(|end| Self { start, end })
    }

    /// The bytes `start..end`; empty at `start` when `end` lies before it.
    pub fn between(start: u64, end: u64) -> Self {
        Self { start, end: end.max(start) }
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes in the extent.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether both share at least one byte.
    pub fn intersects(&self, other: &Self) -> bool {
        self.start.max(other.start) < self.end.min(other.end)
    }

    /// The part of this extent inside `bounds`; empty when there is none.
    pub fn clip(&self, bounds: &Self) -> Self {
        Self::between(self.start.max(bounds.start), self.end.min(bounds.end))
    }

    /// Cuts at absolute byte `at` (brought into the extent first): what lies before, and the rest.
    pub fn split(&self, at: u64) -> (Self, Self) {
        let at = at.clamp(self.start, self.end);
        (Self { start: self.start, end: at }, Self { start: at, end: self.end })
    }

    /// The smallest extent with both ends at multiples of `granularity` that covers this one, cut at `limit`.
    /// `granularity` is at least 1.
    pub fn widen(&self, granularity: u64, limit: u64) -> Self {
        let granularity = granularity.max(1);
        let start = self.start - self.start % granularity;
        let end = self.end.div_ceil(granularity).saturating_mul(granularity).min(limit);
        Self::between(start, end)
    }

    /// The extent in pieces that do not cross a multiple of `piece_bytes` (at least 1), in order.
    pub fn pieces(&self, piece_bytes: u64) -> impl Iterator<Item = Extent> + use<> {
        let piece_bytes = piece_bytes.max(1);
        let (mut at, end) = (self.start, self.end);
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let next = (at - at % piece_bytes).saturating_add(piece_bytes).min(end);
                let piece = Extent { start: at, end: next };
                at = next;
                piece
            })
        })
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "guest bytes {}..{}", self.start, self.end)
    }
}

/// An ordered set of bytes kept as disjoint, non-adjacent extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    ranges: std::collections::BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds every byte of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let (mut start, mut end) = (extent.start, extent.end);
        let touching: Vec<u64> = self
            .ranges
            .range(..=end)
            .rev()
            .take_while(|&(_, &range_end)| range_end >= start)
            .map(|(&range_start, _)| range_start)
            .collect();
        for range_start in touching {
            if let Some(range_end) = self.ranges.remove(&range_start) {
                start = start.min(range_start);
                end = end.max(range_end);
            }
        }
        self.ranges.insert(start, end);
    }

    /// Takes every byte of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        let touching: Vec<Extent> = self.overlapping(extent).collect();
        for range in touching {
            self.ranges.remove(&range.start);
            if range.start < extent.start {
                self.ranges.insert(range.start, extent.start);
            }
            if range.end > extent.end {
                self.ranges.insert(extent.end, range.end);
            }
        }
    }

    /// The set's extents that share a byte with `extent`, highest first.
    fn overlapping(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.ranges
            .range(..extent.end)
            .rev()
            .take_while(move |&(_, &end)| end > extent.start)
            .map(|(&start, &end)| Extent { start, end })
            .filter(move |range| range.intersects(&extent))
    }

    /// Whether any byte of `extent` is in the set.
    pub fn intersects(&self, extent: Extent) -> bool {
        self.overlapping(extent).next().is_some()
    }

    /// Whether every byte of `extent` is in the set.
    pub fn contains(&self, extent: Extent) -> bool {
        extent.is_empty()
            || self.ranges.range(..=extent.start).next_back().is_some_and(|(_, &end)| end >= extent.end)
    }

    /// The extents, in ascending order, disjoint and not adjacent.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.ranges.iter().map(|(&start, &end)| Extent { start, end })
    }

    /// Bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|extent| extent.len()).sum()
    }

    /// Whether the set holds no byte.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overflowing_extent_is_refused() {
        assert_eq!(Extent::new(u64::MAX, 1), None);
        assert!(Extent::new(u64::MAX, 0).is_some_and(|extent| extent.is_empty()));
    }

    #[test]
    fn pieces_stop_at_boundaries() {
        let pieces: Vec<_> =
            Extent::between(5, 21).pieces(8).map(|piece| (piece.start(), piece.end())).collect();
        assert_eq!(pieces, [(5, 8), (8, 16), (16, 21)]);
    }

    #[test]
    fn widen_stops_at_the_limit() {
        assert_eq!(Extent::between(5, 13).widen(8, 14), Extent::between(0, 14));
    }

    proptest! {
        #[test]
        fn set_equals_a_bitmap(steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..32), 0..40)) {
            let mut set = ExtentSet::new();
            let mut model = [false; 128];
            for (add, start, len) in steps {
                let extent = Extent::between(start, start + len);
                if add { set.insert(extent) } else { set.remove(extent) }
                for (_, byte) in (0u64..).zip(&mut model).filter(|(at, _)| (start..start + len).contains(at)) {
                    *byte = add;
                }
            }
            for (byte, &expected) in model.iter().enumerate() {
                let one = Extent::between(byte as u64, byte as u64 + 1);
                prop_assert_eq!(set.intersects(one), expected);
                prop_assert_eq!(set.contains(one), expected);
            }
            let all: Vec<_> = set.iter().collect();
            prop_assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        }
    }
}
