//! Pure arithmetic of requests: cutting at clusters, widening to what a file can transfer.
//!
//! Nothing here knows a chain, a lock or a buffer. All results lie inside what was given.

use std::ops::RangeInclusive;

use crate::extent::Extent;
use crate::units::GuestCluster;

/// The part of a request that lies in one guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The cluster.
    pub cluster: GuestCluster,
    /// Guest bytes of the segment; not empty.
    pub extent: Extent,
    /// Whether it covers all guest bytes of the cluster (the last cluster of a disk may be cut short).
    pub whole: bool,
}

/// Sizes that decide where requests are cut.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    cluster_bytes: u64,
    disk_bytes: u64,
}

impl Layout {
    /// Sizes of a disk. `cluster_bytes` is at least 1, and the disk has no more than 2^32 clusters.
    pub fn new(cluster_bytes: u64, disk_bytes: u64) -> Self {
        Self { cluster_bytes: cluster_bytes.max(1), disk_bytes }
    }

    /// Bytes of a whole cluster.
    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// Bytes of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Whether the disk has every byte of `extent`.
    pub fn contains(&self, extent: Extent) -> bool {
        extent.end() <= self.disk_bytes
    }

    /// The cluster that holds guest byte `at`. Offsets past the disk end answer with the last number there is.
    pub fn cluster_of(&self, at: u64) -> GuestCluster {
        GuestCluster(u32::try_from(at / self.cluster_bytes).unwrap_or(u32::MAX))
    }

    /// First guest byte of `cluster`.
    pub fn cluster_start(&self, cluster: GuestCluster) -> u64 {
        u64::from(cluster.0).saturating_mul(self.cluster_bytes)
    }

    /// Guest bytes of `cluster`, cut at the disk end.
    pub fn cluster_extent(&self, cluster: GuestCluster) -> Extent {
        let start = self.cluster_start(cluster);
        Extent::between(start, start.saturating_add(self.cluster_bytes).min(self.disk_bytes))
    }

    /// Bytes from `at` to the end of its cluster, not cut at the disk end.
    pub fn bytes_left_in_cluster(&self, at: u64) -> u64 {
        self.cluster_bytes - at % self.cluster_bytes
    }

    /// The segment that starts at `at` and ends before `end`, which lies behind it.
    pub fn segment(&self, at: u64, end: u64) -> Segment {
        let cluster = self.cluster_of(at);
        let extent = Extent::between(at, end.min(at.saturating_add(self.bytes_left_in_cluster(at))));
        Segment { cluster, extent, whole: extent == self.cluster_extent(cluster) }
    }

    /// The extent cut at clusters, in order.
    pub fn segments(self, extent: Extent) -> impl Iterator<Item = Segment> {
        let mut at = extent.start();
        std::iter::from_fn(move || {
            (at < extent.end()).then(|| {
                let segment = self.segment(at, extent.end());
                at = segment.extent.end();
                segment
            })
        })
    }

    /// Numbers of the clusters that a non-empty extent touches.
    pub fn clusters(&self, extent: Extent) -> RangeInclusive<u32> {
        self.cluster_of(extent.start()).0..=self.cluster_of(extent.end().saturating_sub(1)).0
    }
}

/// The smallest range with both ends at multiples of `unit` (at least 1) around `range`.
pub fn hull(range: Extent, unit: u64) -> Extent {
    range.widen(unit, u64::MAX)
}

/// The one range that holds all bytes of `piece` outside `overlay`; `None` when the overlay covers the piece.
/// When bytes are left on both sides, the range spans the overlay: one transfer is better than two.
pub fn uncovered(piece: Extent, overlay: Extent) -> Option<Extent> {
    let inside = overlay.clip(&piece);
    if inside.is_empty() {
        return (!piece.is_empty()).then_some(piece);
    }
    let start = if inside.start() > piece.start() { piece.start() } else { inside.end() };
    let end = if inside.end() < piece.end() { piece.end() } else { inside.start() };
    (start < end).then(|| Extent::between(start, end))
}

/// Whether a transfer of `len` bytes at `offset` keeps to multiples of `unit` (at least 1).
pub fn is_multiple(offset: u64, len: u64, unit: u64) -> bool {
    offset.is_multiple_of(unit) && len.is_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_partition_the_extent(
            cluster in 1u64..5000, start in 0u64..100_000, len in 0u64..50_000, slack in 0u64..10_000,
        ) {
            let layout = Layout::new(cluster, start + len + slack);
            let extent = Extent::between(start, start + len);
            let mut at = start;
            for segment in layout.segments(extent) {
                prop_assert_eq!(segment.extent.start(), at);
                prop_assert!(!segment.extent.is_empty());
                let whole = layout.cluster_extent(segment.cluster);
                prop_assert_eq!(segment.extent.clip(&whole), segment.extent);
                prop_assert_eq!(segment.whole, segment.extent == whole);
                at = segment.extent.end();
            }
            prop_assert_eq!(at, start + len);
            if len > 0 {
                let touched: Vec<u32> = layout.segments(extent).map(|segment| segment.cluster.0).collect();
                prop_assert_eq!(touched, layout.clusters(extent).collect::<Vec<_>>());
            }
        }

        #[test]
        fn uncovered_holds_every_byte_outside_the_overlay(
            piece in (0u64..64, 0u64..64), overlay in (0u64..128, 0u64..64),
        ) {
            let piece = Extent::between(piece.0, piece.0 + piece.1);
            let overlay = Extent::between(overlay.0, overlay.0 + overlay.1);
            let found = uncovered(piece, overlay);
            for byte in piece.start()..piece.end() {
                let one = Extent::between(byte, byte + 1);
                if !overlay.intersects(&one) {
                    prop_assert!(found.is_some_and(|range| range.intersects(&one)), "byte {} is lost", byte);
                }
            }
            if let Some(range) = found {
                prop_assert!(!range.is_empty());
                prop_assert_eq!(range.clip(&piece), range);
                let first = Extent::between(range.start(), range.start() + 1);
                let last = Extent::between(range.end() - 1, range.end());
                prop_assert!(!overlay.intersects(&first) && !overlay.intersects(&last));
            }
        }

        #[test]
        fn hull_is_aligned_and_tight(start in 0u64..10_000, len in 1u64..10_000, shift in 0u32..13) {
            let unit = 1u64 << shift;
            let range = hull(Extent::between(start, start + len), unit);
            prop_assert!(is_multiple(range.start(), range.len(), unit));
            prop_assert!(range.start() <= start && start - range.start() < unit);
            prop_assert!(range.end() >= start + len && range.end() - start - len < unit);
        }
    }

    #[test]
    fn the_last_cluster_may_be_short() {
        let layout = Layout::new(100, 250);
        let last = layout.segment(200, 250);
        assert!(last.whole);
        assert_eq!(last.cluster, GuestCluster(2));
        assert!(!layout.contains(Extent::between(200, 251)));
    }
}
