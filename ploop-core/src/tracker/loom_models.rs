//! Every interleaving, and every order the memory model allows, of small cases. Run with `--cfg loom`.
//!
//! "Data" is an atomic without order of its own: reading it sees the last write only if the tracker makes it so.

use loom::sync::atomic::AtomicU64 as Data;
use loom::thread;

use super::*;

/// Blocks that one word of the bitmap covers.
const WORD: u64 = 64;

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(body);
}

/// A tracker of `blocks` blocks with a summary over every level of more than one word.
fn tracker(blocks: u64) -> Arc<Tracker> {
    Tracker::over(blocks * GRANULARITY_BYTES, DirtyBitmap::with_levels(blocks, 1)).unwrap()
}

fn block(number: u64) -> Extent {
    Extent::new(number * GRANULARITY_BYTES, GRANULARITY_BYTES).unwrap()
}

/// Takes everything there is now; the blocks taken, acknowledged.
fn harvest(tracker: &Arc<Tracker>, into: &mut Vec<u64>) {
    let mut from = 0;
    while let Some(taken) = tracker.take(from, u64::MAX) {
        from = taken.extent().end();
        into.extend((taken.extent().start()..from).step_by(4096).map(|byte| byte / GRANULARITY_BYTES));
        taken.acknowledge();
    }
}

#[test]
fn two_markers_and_a_harvester_on_two_words() {
    model(|| {
        let tracker = tracker(2 * WORD);
        let first = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || {
                tracker.mark(block(3));
                tracker.mark(block(WORD));
            }
        });
        let second = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || tracker.mark(Extent::between(block(WORD - 1).start(), block(WORD).end()))
        });
        let mut harvested = Vec::new();
        harvest(&tracker, &mut harvested);
        first.join().unwrap();
        second.join().unwrap();
        harvest(&tracker, &mut harvested);
        for wanted in [3, WORD - 1, WORD] {
            assert!(harvested.contains(&wanted), "block {wanted} was lost");
        }
        assert!(tracker.is_clean());
        assert_eq!(tracker.dirty_bytes(), 0);
    });
}

#[test]
fn marks_reach_through_three_levels() {
    model(|| {
        let far = WORD * WORD;
        let tracker = tracker(far + WORD);
        tracker.mark(block(far));
        let marker = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || tracker.mark(block(far + 1))
        });
        let mut harvested = Vec::new();
        harvest(&tracker, &mut harvested);
        marker.join().unwrap();
        harvest(&tracker, &mut harvested);
        assert!(harvested.contains(&far) && harvested.contains(&(far + 1)));
        assert!(tracker.is_clean());
    });
}

/// A finished mark is found by the next take, whatever else is going on.
#[test]
fn a_finished_mark_is_found_at_once() {
    model(|| {
        let tracker = tracker(2 * WORD);
        tracker.mark(block(1));
        let other = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || {
                if let Some(taken) = tracker.take(block(1).start(), 1) {
                    taken.acknowledge();
                }
            }
        });
        tracker.mark(block(2));
        let found = tracker.take(block(2).start(), 1).expect("the mark of block 2 is finished");
        assert_eq!(found.extent(), block(2));
        found.acknowledge();
        other.join().unwrap();
    });
}

/// T1 and T2: write, mark, answer against take, read. What arrives is the last value written. A neighbour that stays
/// dirty keeps the word from becoming zero, so that only the word itself orders mark and take.
fn copy_of_a_written_block(mark_after_the_write: bool) {
    model(move || {
        let tracker = tracker(2 * WORD);
        let disk = Arc::new(Data::new(0));
        tracker.mark(block(9));
        let writer = thread::spawn({
            let (tracker, disk) = (Arc::clone(&tracker), Arc::clone(&disk));
            move || {
                for value in [1, 2] {
                    if !mark_after_the_write {
                        tracker.mark(block(5));
                    }
                    disk.store(value, Ordering::Relaxed);
                    if mark_after_the_write {
                        tracker.mark(block(5));
                    }
                }
            }
        });
        let mut copy = 0;
        let mut copy_if_dirty = || {
            if let Some(taken) = tracker.take(0, GRANULARITY_BYTES)
                && taken.extent() == block(5)
            {
                copy = disk.load(Ordering::Relaxed);
                taken.acknowledge();
            }
        };
        copy_if_dirty();
        copy_if_dirty();
        // T4: the last harvest comes after the writers are drained.
        writer.join().unwrap();
        copy_if_dirty();
        assert_eq!(copy, 2, "the copy is old and nothing says so");
        let mut left = Vec::new();
        harvest(&tracker, &mut left);
        assert_eq!(left, [9]);
        assert!(tracker.is_clean());
    });
}

#[test]
fn the_copy_has_the_last_write() {
    copy_of_a_written_block(true);
}

#[test]
#[should_panic(expected = "the copy is old and nothing says so")]
fn marking_before_the_write_only_loses_it() {
    copy_of_a_written_block(false);
}

#[test]
fn a_loan_given_back_is_never_unseen() {
    model(|| {
        let tracker = tracker(2 * WORD);
        tracker.mark(block(7));
        let failing = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || drop(tracker.take(0, u64::MAX))
        });
        let marker = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || tracker.mark(block(WORD + 7))
        });
        assert!(!tracker.is_clean(), "block 7 is dirty or on loan all the time");
        failing.join().unwrap();
        marker.join().unwrap();
        let mut harvested = Vec::new();
        harvest(&tracker, &mut harvested);
        assert_eq!(harvested, [7, WORD + 7]);
        assert!(tracker.is_clean());
    });
}

#[test]
fn something_dirty_is_never_counted_as_nothing() {
    model(|| {
        let tracker = tracker(2 * WORD);
        tracker.mark(block(1));
        let marker = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || tracker.mark(block(2))
        });
        let harvester = thread::spawn({
            let tracker = Arc::clone(&tracker);
            move || tracker.take(block(2).start(), 1).map(Taken::acknowledge)
        });
        assert!(tracker.dirty_bytes() > 0, "block 1 is dirty all the time");
        marker.join().unwrap();
        harvester.join().unwrap();
    });
}

/// T6: a tracker started while a write is under way marks it, or the first pass reads it.
#[test]
fn a_tracker_added_during_a_write_misses_nothing() {
    model(|| {
        let trackers = Arc::new(Trackers::new(GRANULARITY_BYTES));
        let disk = Arc::new(Data::new(0));
        let writer = thread::spawn({
            let (trackers, disk) = (Arc::clone(&trackers), Arc::clone(&disk));
            move || {
                disk.store(1, Ordering::Relaxed);
                trackers.mark(block(0));
            }
        });
        let tracker = trackers.add().unwrap();
        let mut copy = disk.load(Ordering::Relaxed);
        writer.join().unwrap();
        if let Some(taken) = tracker.take(0, u64::MAX) {
            copy = disk.load(Ordering::Relaxed);
            taken.acknowledge();
        }
        assert_eq!(copy, 1);
    });
}
