//! Which of the lower deltas holds a cluster: one look, however many deltas there are.
//!
//! [`Holders`] keeps, for each cluster of the disk, the *slot* of the highest frozen delta that holds it: one byte, in
//! pages of 4096 that exist only where some lower delta holds anything. Slots are names of deltas that stay valid while
//! chains come and go: a snapshot stacks a new top on the same deltas, a merge lets the merged child's slot mean its
//! parent. Thus one [`Holders`] is shared by the successive chains of a running disk, and none of it is copied while
//! guest writes are held. A [`Lookup`] is how one chain reads it: which delta each slot means there, and how many deltas
//! from the base on are in it. What is not in it yet, the few deltas below a top that is always looked at by itself, is
//! walked through.
//!
//! Invariants:
//! * only frozen deltas are in it, and a slot is never given twice: an entry is correct for every chain that knows its
//!   slot. A chain that does not, or whose delta turns out not to hold the cluster, walks; the answer is the same.
//! * entries only ever change to higher deltas, and a delta counts as covered once all of its clusters are entered.
//!
//! Memory: 1 byte for each cluster of the pages present, at most 1 byte per cluster of the disk (10 MiB for 10 TiB in
//! clusters of 1 MiB) and 16 bytes per 4096 clusters.
//!
//! Locking: none; entries are atomic bytes.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind, Result};
use crate::units::GuestCluster;

use super::delta::Delta;

/// Clusters in a page.
const PAGE_CLUSTERS: usize = 4096;
/// Nobody holds it.
const NOBODY: u8 = 0;
/// Of a slot: no delta of this chain.
const UNKNOWN: u8 = u8::MAX;

type Page = Box<[AtomicU8]>;

/// The highest frozen delta that holds each cluster, by slot.
pub(crate) struct Holders {
    pages: Box<[OnceLock<Page>]>,
    /// The next slot to be given; past 255 none is left.
    next_slot: AtomicUsize,
}

impl Holders {
    fn new(clusters: u32) -> Result<Self> {
        let count = (clusters as usize).div_ceil(PAGE_CLUSTERS);
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).map_err(|error| {
            Error::new(ErrorKind::Memory, "open disk: no memory for its chain").caused_by(error)
        })?;
        pages.resize_with(count, OnceLock::new);
        Ok(Self { pages: pages.into_boxed_slice(), next_slot: AtomicUsize::new(1) })
    }

    fn get(&self, cluster: GuestCluster) -> u8 {
        let place = cluster.0 as usize;
        match self.pages.get(place / PAGE_CLUSTERS).and_then(OnceLock::get) {
            Some(page) => page[place % PAGE_CLUSTERS].load(Ordering::Acquire),
            None => NOBODY,
        }
    }

    fn set(&self, cluster: GuestCluster, slot: u8) {
        let place = cluster.0 as usize;
        if let Some(page) = self.pages.get(place / PAGE_CLUSTERS) {
            let page = page.get_or_init(|| (0..PAGE_CLUSTERS).map(|_| AtomicU8::new(NOBODY)).collect());
            page[place % PAGE_CLUSTERS].store(slot, Ordering::Release);
        }
    }

    /// A slot nobody has had; `None` when all were given.
    fn take_slot(&self) -> Option<u8> {
        let slot = self.next_slot.fetch_add(1, Ordering::Relaxed);
        u8::try_from(slot).ok().filter(|slot| *slot != UNKNOWN)
    }

    /// Bytes that the pages take.
    #[cfg(test)]
    fn bytes_present(&self) -> usize {
        self.pages.iter().filter(|page| page.get().is_some()).count() * PAGE_CLUSTERS
    }
}

/// What of a chain the [`Holders`] know.
pub(crate) struct Lookup {
    holders: Arc<Holders>,
    /// Of each delta that is or may be covered, base first.
    slots: Vec<u8>,
    /// Which delta a slot means in this chain.
    index_of: Box<[u8; 256]>,
    /// So many deltas, from the base on, are in `holders`.
    covered: AtomicUsize,
}

/// What the lookup knows about a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// This delta holds it and none above it that is covered does.
    By(usize),
    /// No covered image does; a raw base holds everything, though.
    Nowhere,
    /// It cannot be told.
    Unknown,
}

impl Lookup {
    fn with(holders: Arc<Holders>, slots: Vec<u8>, covered: usize) -> Self {
        let mut index_of = Box::new([UNKNOWN; 256]);
        for (index, &slot) in slots.iter().enumerate() {
            index_of[usize::from(slot)] = u8::try_from(index).unwrap_or(UNKNOWN);
        }
        Self { holders, slots, index_of, covered: AtomicUsize::new(covered) }
    }

    /// For a chain whose lower deltas are `lower`, base first, all of them covered when this returns. Each of their tables
    /// is gone through once.
    pub(crate) fn build(lower: &[Arc<Delta>], clusters: u32) -> Result<Self> {
        let holders = Arc::new(Holders::new(clusters)?);
        let slots: Option<Vec<u8>> = lower.iter().map(|_| holders.take_slot()).collect();
        let slots =
            slots.ok_or_else(|| Error::new(ErrorKind::Parameter, "open disk: its chain is too long"))?;
        let lookup = Self::with(holders, slots, 0);
        lookup.cover(lower);
        Ok(lookup)
    }

    /// The same knowledge for a chain with one delta more below its top, which is `delta` number `index` there and not
    /// covered yet. `None` when the slots are used up: build anew.
    pub(crate) fn stacked(&self, index: usize) -> Option<Self> {
        if self.slots.len() != index {
            return None;
        }
        let mut slots = self.slots.clone();
        slots.push(self.holders.take_slot()?);
        let mut stacked = Self::with(Arc::clone(&self.holders), slots, self.covered());
        // Slots of merged children go on meaning what they meant.
        for (new, old) in stacked.index_of.iter_mut().zip(self.index_of.iter()) {
            if *new == UNKNOWN {
                *new = *old;
            }
        }
        Some(stacked)
    }

    /// The same knowledge for a chain without delta `child`, all of whose clusters the delta below it has taken over.
    /// `child` is covered, and no base.
    pub(crate) fn without(&self, child: usize) -> Self {
        let mut slots = self.slots.clone();
        slots.remove(child);
        let mut index_of = self.index_of.clone();
        for index in index_of.iter_mut().filter(|index| **index != UNKNOWN && usize::from(**index) >= child) {
            *index -= 1;
        }
        let covered = AtomicUsize::new(self.covered().saturating_sub(1));
        Self { holders: Arc::clone(&self.holders), slots, index_of, covered }
    }

    /// The same knowledge for a chain in which a covered delta's file was opened anew.
    pub(crate) fn again(&self) -> Self {
        Self {
            holders: Arc::clone(&self.holders),
            slots: self.slots.clone(),
            index_of: self.index_of.clone(),
            covered: AtomicUsize::new(self.covered()),
        }
    }

    /// Deltas from the base on that need not be walked through.
    pub(crate) fn covered(&self) -> usize {
        self.covered.load(Ordering::Acquire)
    }

    /// Enters the frozen deltas of `lower` that are not covered yet. One caller at a time; readers go on.
    pub(crate) fn cover(&self, lower: &[Arc<Delta>]) {
        let uncovered = lower.iter().zip(&self.slots).enumerate().skip(self.covered());
        for (index, (delta, &slot)) in uncovered {
            if let Some(image) = &delta.image {
                image.bat.table().for_each_entry(delta.geometry.entries(), |cluster, _| {
                    self.holders.set(cluster, slot);
                });
            }
            self.covered.store(index + 1, Ordering::Release);
        }
    }

    /// Which of the covered deltas holds a cluster.
    pub(crate) fn holder(&self, cluster: GuestCluster) -> Held {
        match self.holders.get(cluster) {
            NOBODY => Held::Nowhere,
            slot => match self.index_of[usize::from(slot)] {
                UNKNOWN => Held::Unknown,
                index => Held::By(usize::from(index)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Chain;
    use crate::format::testing::{file_with_len, image, open, set_entry};
    use crate::format::{ChainOptions, Source};
    use crate::io::sim::{Random, SimStorage};
    use crate::io::{Access, StorageExt};

    const CLUSTERS: u64 = 300;

    /// An image with some clusters, of different length than its neighbours.
    fn some_delta(random: &mut Random, clusters: u64) -> SimStorage {
        let file = image(clusters);
        let mut place = 1;
        let every = 1 + random.index(40);
        for cluster in 0..clusters {
            if random.index(every) == 0 {
                file.write_all_at(u64::from(place) * 4096, &[u8::try_from(place % 250).unwrap(); 4096])
                    .unwrap();
                set_entry(&file, cluster, place);
                place += 1;
            }
        }
        file
    }

    fn assert_same(chain: &Chain, seed: u64) {
        for cluster in 0..u32::try_from(CLUSTERS).unwrap() + 5 {
            let cluster = GuestCluster(cluster);
            for count in [chain.depth(), chain.top()] {
                assert_eq!(
                    chain.find(count, cluster),
                    chain.walk(count, cluster),
                    "seed {seed}, {cluster} of {count}"
                );
            }
        }
    }

    #[test]
    fn it_finds_what_walking_finds() {
        for seed in 0..30 {
            let mut random = Random::new(seed);
            let depth = 1 + random.index(12);
            let files: Vec<SimStorage> = (0..depth)
                .map(|number| {
                    let clusters =
                        if number + 1 == depth { CLUSTERS } else { CLUSTERS - random.index(50) as u64 };
                    some_delta(&mut random, clusters)
                })
                .collect();
            let chain = open(&files.iter().collect::<Vec<_>>(), Access::ReadOnly).unwrap();
            assert_same(&chain, seed);
        }
    }

    #[test]
    fn a_raw_base_holds_what_no_image_holds() {
        let base = file_with_len(100 * 4096 + 512);
        let mut random = Random::new(1);
        let (middle, top) = (some_delta(&mut random, CLUSTERS), some_delta(&mut random, CLUSTERS));
        let source =
            |file: &SimStorage, raw| Source { name: "image".into(), storage: Arc::new(file.clone()), raw };
        let sources = vec![source(&base, true), source(&middle, false), source(&top, false)];
        let options = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
        let chain = Chain::open(sources, &options).unwrap();
        assert_same(&chain, 1);
        assert!(chain.held_below(GuestCluster(100)) && chain.held_below(GuestCluster(0)));
    }

    #[test]
    fn memory_is_what_is_held() {
        let holders = Holders::new(10 << 20).unwrap();
        assert_eq!(holders.bytes_present(), 0);
        holders.set(GuestCluster(5), 1);
        holders.set(GuestCluster(9 << 20), 2);
        assert_eq!((holders.get(GuestCluster(5)), holders.get(GuestCluster(6))), (1, NOBODY));
        assert_eq!(holders.bytes_present(), 2 * PAGE_CLUSTERS);
        assert_eq!(holders.get(GuestCluster(u32::MAX)), NOBODY);
    }

    #[test]
    fn a_hundred_deltas_are_read_once_each() {
        let mut random = Random::new(7);
        let files: Vec<SimStorage> = (0..100).map(|_| some_delta(&mut random, CLUSTERS)).collect();
        let before: Vec<u64> =
            files.iter().map(|file| file.disk().calls(crate::io::sim::Call::Read)).collect();
        let chain = open(&files.iter().collect::<Vec<_>>(), Access::ReadOnly).unwrap();
        for (file, before) in files.iter().zip(before) {
            let reads = file.disk().calls(crate::io::sim::Call::Read) - before;
            assert!(reads <= 3, "{reads} reads of one file");
        }
        assert_same(&chain, 7);
    }
}
