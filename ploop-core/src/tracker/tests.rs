//! The tracker against simple models, and under real threads.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64 as Data};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = GRANULARITY_BYTES;

fn extent(start: u64, len: u64) -> Extent {
    Extent::new(start, len).unwrap()
}

#[test]
fn marks_are_taken_once() {
    let tracker = Tracker::new(100 * BLOCK).unwrap();
    assert!(tracker.is_clean());
    assert_eq!(tracker.dirty_bytes(), 0);
    tracker.mark(extent(BLOCK + 1, BLOCK));
    assert_eq!(tracker.dirty_bytes(), 2 * BLOCK);
    let taken = tracker.take(0, u64::MAX).unwrap();
    assert_eq!(taken.extent(), extent(BLOCK, 2 * BLOCK));
    assert_eq!(tracker.dirty_bytes(), 0);
    assert!(!tracker.is_clean(), "on loan");
    assert!(tracker.take(0, u64::MAX).is_none());
    taken.acknowledge();
    assert!(tracker.is_clean());
}

#[test]
fn a_dropped_loan_is_dirty_again() {
    let tracker = Tracker::new(100 * BLOCK).unwrap();
    tracker.mark(extent(5 * BLOCK, 10 * BLOCK));
    drop(tracker.take(0, 3 * BLOCK));
    assert_eq!(tracker.dirty_bytes(), 10 * BLOCK);
    let panicking = std::panic::catch_unwind({
        let tracker = Arc::clone(&tracker);
        move || {
            let _taken = tracker.take(0, u64::MAX).unwrap();
            panic!("harvester dies");
        }
    });
    assert!(panicking.is_err());
    assert_eq!(tracker.take(0, u64::MAX).unwrap().extent(), extent(5 * BLOCK, 10 * BLOCK));
}

#[test]
fn a_write_during_a_loan_survives_its_acknowledgement() {
    let tracker = Tracker::new(100 * BLOCK).unwrap();
    tracker.mark(extent(0, 4 * BLOCK));
    let taken = tracker.take(0, u64::MAX).unwrap();
    tracker.mark(extent(BLOCK, 1));
    taken.acknowledge();
    assert!(!tracker.is_clean());
    assert_eq!(tracker.take(0, u64::MAX).unwrap().extent(), extent(BLOCK, BLOCK));
}

#[test]
fn extents_are_cut_at_the_end_of_the_disk() {
    let disk = 10 * BLOCK + 512;
    let tracker = Tracker::new(disk).unwrap();
    tracker.mark(extent(disk, 1000));
    tracker.mark(extent(0, 0));
    tracker.mark(extent(u64::MAX, 0));
    assert!(tracker.is_clean());
    tracker.mark(Extent::between(disk - 1, u64::MAX));
    let taken = tracker.take(0, u64::MAX).unwrap();
    assert_eq!(taken.extent(), Extent::between(10 * BLOCK, disk));
    assert!(tracker.take(taken.extent().end(), u64::MAX).is_none());
    taken.acknowledge();
    tracker.mark_all();
    assert_eq!(tracker.dirty_bytes(), disk);
    assert_eq!(tracker.take(0, u64::MAX).unwrap().extent(), Extent::between(0, disk));
    assert!(tracker.take(disk, u64::MAX).is_none());
}

#[test]
fn a_run_does_not_begin_after_the_asked_byte_s_block() {
    let tracker = Tracker::new(100 * BLOCK).unwrap();
    tracker.mark(extent(3 * BLOCK, 2 * BLOCK));
    let taken = tracker.take(3 * BLOCK + 100, 100).unwrap();
    assert_eq!(taken.extent(), extent(3 * BLOCK, BLOCK));
    taken.acknowledge();
    assert_eq!(tracker.take(0, 2 * BLOCK - 1).unwrap().extent(), extent(4 * BLOCK, BLOCK));
}

#[test]
fn an_empty_disk_is_clean() {
    let tracker = Tracker::new(0).unwrap();
    tracker.mark_all();
    assert!(tracker.is_clean() && tracker.take(0, 1).is_none());
    assert_eq!(tracker.dirty_bytes(), 0);
}

#[test]
fn a_stopped_tracker_claims_nothing() {
    let tracker = Tracker::new(BLOCK).unwrap();
    tracker.stop();
    tracker.mark_all();
    assert!(!tracker.is_clean());
    assert!(tracker.take(0, 1).is_none());
    assert_eq!(tracker.dirty_bytes(), BLOCK);
}

#[test]
fn a_disk_too_large_to_track_is_an_error() {
    assert_eq!(Tracker::new(u64::MAX).unwrap_err().kind(), ErrorKind::Memory);
}

#[test]
fn every_active_tracker_sees_a_write() {
    let trackers = Trackers::new(10 * BLOCK);
    trackers.mark(extent(0, BLOCK));
    let first = trackers.add().unwrap();
    let second = trackers.add().unwrap();
    assert!(first.is_clean(), "what came before is not its business");
    trackers.mark(extent(BLOCK, BLOCK));
    trackers.remove(&first);
    trackers.mark(extent(2 * BLOCK, BLOCK));
    assert_eq!(trackers.len(), 1);
    assert!(first.is_stopped());
    assert_eq!(second.take(0, u64::MAX).unwrap().extent(), extent(BLOCK, 2 * BLOCK));
    trackers.remove(&first);
    trackers.remove(&second);
    assert!(trackers.is_empty());
}

/// The bound is far above what it takes, and far below what reading the whole bitmap would.
#[test]
fn a_search_of_an_idle_16_tib_disk_is_short() {
    let tracker = Tracker::new(16 << 40).unwrap();
    let best = (0..20)
        .map(|_| {
            let begin = Instant::now();
            assert!(tracker.take(0, u64::MAX).is_none());
            begin.elapsed()
        })
        .min();
    assert!(best.unwrap() < Duration::from_millis(5), "{best:?}");
    tracker.mark(extent((16 << 40) - 1, 1));
    assert_eq!(tracker.take(0, u64::MAX).unwrap().extent(), extent((16 << 40) - BLOCK, BLOCK));
}

/// Writers write and mark, a harvester takes and copies, half of its loans fail; in the end the copy is equal.
#[test]
fn copy_under_load() {
    const BLOCKS: u64 = 700;
    let tracker = Tracker::new(BLOCKS * BLOCK).unwrap();
    let disk: Arc<Vec<Data>> = Arc::new((0..BLOCKS).map(|_| Data::new(0)).collect());
    let finished = Arc::new(AtomicBool::new(false));
    let mut copy = vec![0; usize::try_from(BLOCKS).unwrap()];
    let mut harvest = |tracker: &Arc<Tracker>, failing: bool| {
        let (mut from, mut loans) = (0, 0u32);
        while let Some(taken) = tracker.take(from, 5 * BLOCK) {
            from = taken.extent().end();
            for block in taken.extent().start() / BLOCK..from / BLOCK {
                let block = usize::try_from(block).unwrap();
                copy[block] = disk[block].load(Ordering::Relaxed);
            }
            loans += 1;
            if !failing || loans % 2 == 0 {
                taken.acknowledge();
            }
        }
    };
    let writers: Vec<_> = (0..3u64)
        .map(|writer| {
            let (tracker, disk) = (Arc::clone(&tracker), Arc::clone(&disk));
            std::thread::spawn(move || {
                let mut state = writer + 1;
                for value in 1..30_000u64 {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let block = (state >> 33) % BLOCKS;
                    disk[usize::try_from(block).unwrap()].store(value * 4 + writer, Ordering::Relaxed);
                    tracker.mark(extent(block * BLOCK, 1));
                }
            })
        })
        .collect();
    let watcher = std::thread::spawn({
        let finished = Arc::clone(&finished);
        move || {
            for writer in writers {
                writer.join().unwrap();
            }
            finished.store(true, Ordering::Release);
        }
    });
    while !finished.load(Ordering::Acquire) {
        harvest(&tracker, true);
    }
    watcher.join().unwrap();
    harvest(&tracker, false);
    assert!(tracker.is_clean());
    assert_eq!(tracker.dirty_bytes(), 0);
    let disk: Vec<u64> = disk.iter().map(|block| block.load(Ordering::Relaxed)).collect();
    assert_eq!(copy, disk);
}

#[derive(Clone, Debug)]
enum Step {
    Mark { start: u64, len: u64 },
    Take { from: u64, len_max: u64 },
    Acknowledge(usize),
    GiveBack(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u64..1 << 20, 0u64..1 << 17).prop_map(|(start, len)| Step::Mark { start, len }),
        3 => (0u64..1 << 20, 0u64..1 << 18).prop_map(|(from, len_max)| Step::Take { from, len_max }),
        1 => any::<usize>().prop_map(Step::Acknowledge),
        1 => any::<usize>().prop_map(Step::GiveBack),
    ]
}

proptest! {
    #[test]
    fn equals_two_sets(disk in 1u64..1 << 20, steps in prop::collection::vec(step(), 0..80)) {
        let tracker = Tracker::new(disk).unwrap();
        let mut dirty = BTreeSet::new();
        let mut loans: Vec<(Taken, BTreeSet<u64>)> = Vec::new();
        for step in steps {
            match step {
                Step::Mark { start, len } => {
                    tracker.mark(extent(start, len));
                    let end = (start + len).min(disk);
                    if start < end {
                        dirty.extend(start / BLOCK..end.div_ceil(BLOCK));
                    }
                }
                Step::Take { from, len_max } => {
                    let taken = tracker.take(from, len_max);
                    let first = (from < disk).then(|| dirty.range(from / BLOCK..).next().copied()).flatten();
                    let count = first.map_or(0, |first| {
                        let max = (len_max / BLOCK).max(1);
                        (first..).take_while(|block| dirty.contains(block)).count().min(usize::try_from(max).unwrap())
                    });
                    prop_assert_eq!(
                        taken.as_ref().map(Taken::extent),
                        first.map(|first| {
                            Extent::between(first * BLOCK, ((first + count as u64) * BLOCK).min(disk))
                        })
                    );
                    if let (Some(taken), Some(first)) = (taken, first) {
                        let blocks: BTreeSet<u64> = (first..first + count as u64).collect();
                        dirty = &dirty - &blocks;
                        loans.push((taken, blocks));
                    }
                }
                Step::Acknowledge(which) if !loans.is_empty() => {
                    let (taken, _) = loans.swap_remove(which % loans.len());
                    taken.acknowledge();
                }
                Step::GiveBack(which) if !loans.is_empty() => {
                    let (taken, blocks) = loans.swap_remove(which % loans.len());
                    drop(taken);
                    dirty.extend(blocks);
                }
                Step::Acknowledge(_) | Step::GiveBack(_) => {}
            }
            prop_assert_eq!(tracker.dirty_bytes(), (dirty.len() as u64 * BLOCK).min(disk));
            prop_assert_eq!(tracker.is_clean(), dirty.is_empty() && loans.is_empty());
        }
    }
}
