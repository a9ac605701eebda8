//! Orders of events that must not matter, stepped one by one: write against harvest, read, freeze, discard and flush;
//! and what must happen, and must not, when calls fail. Where a rule has a mutant, the same scenario is run with the
//! rule broken, to see that the test would notice.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::large_stack_arrays,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod patience;
mod served;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use patience::PATIENCE;
use ploop_core::device::{Client, Completion, Destination, Disk, DiskOptions, Op, Queue};
use ploop_core::format::{Chain, ChainOptions, CreateOptions, Geometry, Source, Version, create_image};
use ploop_core::io::{Access, Allocation, IoBuf, Storage, Wait};
use ploop_core::mutant::{self, Mutant};
use ploop_core::units::{FileCluster, GuestCluster, Sectors};
use ploop_core::{ErrorKind, Extent};
use served::*;

const CLUSTERS: u64 = 16;

/// Breaks a rule on this thread until dropped.
struct Broken;

impl Broken {
    fn rule(mutant: Option<Mutant>) -> Self {
        mutant::activate(mutant);
        Self
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        mutant::activate(None);
    }
}

struct Served {
    files: Vec<Arc<MemoryFile>>,
    disk: Arc<Disk>,
}

fn storages(files: &[Arc<MemoryFile>]) -> Vec<Arc<dyn Storage>> {
    files.iter().map(|file| Arc::clone(file) as Arc<dyn Storage>).collect()
}

/// A disk of so many deltas; the lower ones hold 0xB0 + number in every cluster.
fn served(unit: u32, depth: usize) -> Served {
    served_clusters(unit, depth, CLUSTERS)
}

fn served_clusters(unit: u32, depth: usize, clusters: u64) -> Served {
    let mut files = Vec::new();
    for delta in 0..depth {
        files.push(MemoryFile::new(unit));
        create(&*files[delta], clusters);
        if delta + 1 < depth {
            let content = vec![0xB0 + delta as u8; (clusters * CLUSTER) as usize];
            fill(&storages(&files), false, &[(0, content)]);
        }
    }
    let disk = serve(open_chain(&storages(&files), false), DiskOptions::default());
    Served { files, disk }
}

impl Served {
    fn top(&self) -> &Arc<MemoryFile> {
        self.files.last().unwrap()
    }

    fn queue(&self) -> (Queue, Arc<AtomicBool>) {
        let io = StepQueue::new(7, 64);
        let hold = io.hold();
        (self.disk.queue(Box::new(io)).unwrap(), hold)
    }

    fn client(&self) -> Client {
        Client::new(&self.disk, Box::new(StepQueue::new(8, 64))).unwrap()
    }

    /// Some clusters in place and durable, and nothing left for the flusher to do.
    fn settle(&self) {
        let mut client = self.client();
        client.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
        client.flush().unwrap();
        while self.disk.step_flusher() {}
    }

    fn reopen(self) -> Served {
        let Served { files, disk } = self;
        drop(disk);
        let disk = serve(open_chain(&storages(&files), false), DiskOptions::default());
        Served { files, disk }
    }
}

/// Runs a queue a while, without waiting; what has ended.
fn run(queue: &mut Queue, turns: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    for _ in 0..turns {
        queue.run(Wait::No, &mut completions).unwrap();
    }
    completions
}

fn extent(start: u64, len: u64) -> Extent {
    Extent::new(start, len).unwrap()
}

/// Whether a write that is harvested while in flight is still reported afterwards (T1, T2).
fn harvest_sees_racing_write(mutant: Option<Mutant>, op: Op) -> bool {
    let served = served(1, 1);
    served.client().write(0, &[1; 4096]).unwrap();
    let tracker = served.disk.start_tracker().unwrap();
    let _broken = Broken::rule(mutant);
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    let buffer = matches!(op, Op::Write { .. }).then(|| IoBuf::try_copy_of(&[2; 4096]).unwrap());
    queue.submit(request(1, op, 0, 4096, buffer));
    assert!(run(&mut queue, 10).is_empty());
    // The harvest comes while the write is in flight, and reads the old bytes.
    while let Some(taken) = tracker.take(0, u64::MAX) {
        taken.acknowledge();
    }
    hold.store(false, Ordering::SeqCst);
    assert!(run(&mut queue, 100).iter().all(|completion| completion.result.is_ok()));
    assert_eq!(queue.in_flight(), 0);
    tracker.take(0, u64::MAX).is_some_and(|taken| taken.extent() == extent(0, 4096))
}

#[test]
fn a_write_that_races_with_the_harvest_is_marked_again() {
    let zeroes = Op::WriteZeroes { fua: false, may_unmap: false };
    for op in [Op::Write { fua: false }, zeroes, Op::Discard] {
        assert!(harvest_sees_racing_write(None, op), "{op:?}");
        assert!(!harvest_sees_racing_write(Some(Mutant::MarkBeforeWrite), op), "{op:?}: the mutant lives");
    }
}

#[test]
fn the_mark_is_there_when_the_answer_is() {
    let served = served(1, 1);
    let tracker = served.disk.start_tracker().unwrap();
    let (mut queue, _) = served.queue();
    for (id, cluster) in (0..8).enumerate() {
        queue.submit(write_request(id as u64, cluster * CLUSTER, &[1; 512]));
    }
    let mut answered = 0;
    while answered < 8 {
        for completion in run(&mut queue, 1) {
            assert_eq!(completion.result, Ok(()));
            answered += 1;
            let taken = tracker.take(completion.id * CLUSTER, 512).unwrap();
            assert_eq!(taken.extent().start(), completion.id * CLUSTER);
            taken.acknowledge();
        }
    }
}

#[test]
fn a_failed_write_is_marked_and_hurts_nobody_else() {
    let served = served(1, 2);
    let mut client = served.client();
    client.write(0, &[1; 512]).unwrap();
    let tracker = served.disk.start_tracker().unwrap();
    // E2: every write past what is there fails.
    let end = served.top().bytes().len() as u64;
    served.top().set_faults(Faults { write: Some((2 * CLUSTER..end * 2, libc::EIO)), ..Faults::default() });
    let error = client.write(3 * CLUSTER + 512, &[2; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Write);
    assert!(tracker.dirty_bytes() > 0);
    assert_eq!(client.read(extent(3 * CLUSTER, 1024)).unwrap().as_slice(), [0xB0; 1024], "not published");
    served.top().set_faults(Faults::default());
    client.write(3 * CLUSTER + 512, &[3; 512]).unwrap();
    client.flush().unwrap();
    let found = client.read(extent(3 * CLUSTER, 1536)).unwrap();
    assert_eq!([&[0xB0; 512][..], &[3; 512], &[0xB0; 512]].concat(), found.as_slice());
    assert!(!served.disk.is_poisoned());
    drop(client);
    served.disk.close().unwrap();
}

#[test]
fn a_cluster_of_a_failed_write_is_not_taken_for_zero_again() {
    let served = served(1, 1);
    let mut client = served.client();
    // Growth that is durable: fresh clusters are known to be zero.
    client.write(0, &[1; 512]).unwrap();
    client.flush().unwrap();
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    queue.submit(write_request(1, CLUSTER, &[7; 8192]));
    run(&mut queue, 3);
    // The write is short, and its rest fails: the cluster holds sevens that nobody may ever see.
    let place = served.top().bytes().len() as u64;
    served.top().set_faults(Faults { transfer_max: Some(4096), ..Faults::default() });
    hold.store(false, Ordering::SeqCst);
    let before = served.top().bytes();
    let mut completions = Vec::new();
    for _ in 0..1000 {
        queue.run(Wait::No, &mut completions).unwrap();
        if served.top().bytes() != before {
            break;
        }
    }
    served.top().set_faults(Faults { write: Some((0..place * 4, libc::EIO)), ..Faults::default() });
    completions.extend(run(&mut queue, 100));
    assert_eq!(completions[0].result, Err(libc::EIO));
    served.top().set_faults(Faults::default());
    client.write(5 * CLUSTER + 16384, &[2; 512]).unwrap();
    let found = client.read(extent(5 * CLUSTER, CLUSTER)).unwrap();
    assert!(!found.as_slice().contains(&7), "stale bytes of a failed write are seen");
}

#[test]
fn a_full_host_fails_new_clusters_only() {
    let served = served(1, 1);
    let mut client = served.client();
    client.write(0, &[1; 512]).unwrap();
    client.flush().unwrap();
    let len = served.top().bytes().len() as u64;
    served.top().set_faults(Faults { len_max: Some(len), ..Faults::default() });
    let mut failed = 0;
    for cluster in 1..CLUSTERS {
        if let Err(error) = client.write(cluster * CLUSTER, &[2; 512]) {
            assert!(error.is_out_of_space(), "{error}");
            failed += 1;
        }
    }
    assert!(failed > 0);
    client.write(512, &[3; 512]).unwrap();
    assert_eq!(client.read(extent(512, 512)).unwrap().as_slice(), [3; 512]);
    assert!(!served.disk.is_poisoned());
    drop(client);
    served.disk.close().unwrap();
    served.top().set_faults(Faults::default());
    let served = served.reopen();
    assert_eq!(served.client().read(extent(512, 512)).unwrap().as_slice(), [3; 512]);
}

/// A flush whose n-th sync fails, once; then a second flush. The results.
fn flushes_with_failing_sync(mutant: Option<Mutant>, sync: u64) -> (bool, bool) {
    let served = served(1, 1);
    let mut client = served.client();
    client.write(0, &[1; 512]).unwrap();
    served.top().set_faults(Faults { sync_from: Some(sync), sync_once: true, ..Faults::default() });
    let broken = Broken::rule(mutant);
    let results = (client.flush().is_ok(), client.flush().is_ok());
    drop(broken);
    if mutant.is_none() {
        // E1: nothing that changes anything works any more, reads do.
        assert!(served.disk.is_poisoned());
        assert!(client.write(0, &[2; 512]).is_err());
        assert!(client.write_zeroes(extent(0, 512), true).is_err());
        assert!(client.discard(extent(0, CLUSTER)).is_err());
        assert_eq!(client.read(extent(0, 512)).unwrap().as_slice(), [1; 512]);
        served.top().take_log();
        drop(client);
        assert!(served.disk.close().is_err());
        assert_eq!(served.top().take_log(), [], "nothing is written to a poisoned image");
    }
    results
}

#[test]
fn a_failed_sync_poisons_the_disk() {
    for sync in [1, 2] {
        assert_eq!(flushes_with_failing_sync(None, sync), (false, false));
        assert_eq!(flushes_with_failing_sync(Some(Mutant::SyncErrorIgnored), sync), (true, true));
        assert_eq!(flushes_with_failing_sync(Some(Mutant::SyncRetried), sync), (true, true));
    }
}

#[test]
fn a_failed_table_write_poisons_the_disk() {
    let served = served(1, 1);
    let mut client = served.client();
    client.write(0, &[1; 512]).unwrap();
    served.top().set_faults(Faults { write: Some((0..512, libc::EIO)), ..Faults::default() });
    assert!(client.flush().is_err());
    assert!(served.disk.is_poisoned());
    assert_eq!(served.disk.flush().unwrap_err().kind(), ErrorKind::Write);
}

/// The calls of one flush after a write to a fresh cluster, as letters: Content, Sync, Table.
fn calls_of_a_flush(mutant: Option<Mutant>) -> String {
    let served = served_clusters(1, 1, 4096);
    served.settle();
    served.top().take_log();
    let mut client = served.client();
    let broken = Broken::rule(mutant);
    client.write(5 * CLUSTER, &[1; 512]).unwrap();
    client.flush().unwrap();
    drop(broken);
    let letters = served.top().take_log().into_iter().filter_map(|call| match call {
        Call::Write(offset, len) if offset < CLUSTER && len == 512 => Some('T'),
        Call::Write(..) => Some('C'),
        Call::Sync => Some('S'),
        _ => None,
    });
    letters.collect()
}

#[test]
fn content_is_synced_before_the_table_is_written() {
    assert_eq!(calls_of_a_flush(None), "CSTS");
    assert_eq!(calls_of_a_flush(Some(Mutant::TableBeforeContentSync)), "CTSS");
    assert_eq!(calls_of_a_flush(Some(Mutant::NoContentSync)), "CTS");
    assert_eq!(calls_of_a_flush(Some(Mutant::SingleSync)), "CTS");
}

#[test]
fn a_flush_with_nothing_new_in_the_table_is_one_sync_and_many_share_it() {
    let served = served(1, 1);
    let mut client = served.client();
    client.write(0, &[1; 512]).unwrap();
    client.flush().unwrap();
    client.write(0, &[2; 512]).unwrap();
    served.top().take_log();
    for _ in 0..10 {
        client.submit(Op::Flush, extent(0, 0), None);
    }
    for _ in 0..10 {
        assert_eq!(client.next_completion().unwrap().unwrap().result, Ok(()));
    }
    assert_eq!(served.top().take_log(), [Call::Sync]);
}

#[test]
fn a_flush_covers_what_was_answered_before_it_and_a_later_one_the_rest() {
    let served = served(1, 1);
    let (mut queue, _) = served.queue();
    let mut others = Vec::new();
    queue.submit(write_request(1, 0, &[1; CLUSTER as usize]));
    run_until(&mut queue, 1, &mut others);
    queue.submit(request(2, Op::Flush, 0, 0, None));
    // Sealed, and synced; then another cluster is published.
    assert!(served.disk.step_flusher() && served.disk.step_flusher());
    queue.submit(write_request(3, CLUSTER, &[1; CLUSTER as usize]));
    while queue.in_flight() > 1 {
        others.extend(run(&mut queue, 1));
    }
    assert_eq!(served.disk.chain().pending(), 2);
    run_until(&mut queue, 2, &mut others);
    assert_eq!(served.disk.chain().pending(), 1, "what came after the seal waits for the next round");
}

#[test]
fn a_fua_write_is_durable_when_answered() {
    let served = served(1, 1);
    served.top().take_log();
    served.client().write_fua(0, &[1; CLUSTER as usize]).unwrap();
    let log = served.top().take_log();
    assert_eq!(log.iter().filter(|&call| *call == Call::Sync).count(), 2, "{log:?}");
    assert_eq!(served.disk.chain().pending(), 0);
}

/// What a crash leaves of the rest of a cluster when a flush came in the middle of its copy-up.
fn crash_during_copy_up(mutant: Option<Mutant>) -> Vec<u8> {
    let served = served(1, 2);
    let broken = Broken::rule(mutant);
    let (mut writer, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    writer.submit(write_request(1, 0, &[1; 512]));
    run(&mut writer, 5);
    served.client().flush().unwrap();
    drop(broken);
    let left: Vec<_> = served.files.iter().map(|file| MemoryFile::with_bytes(1, &file.bytes())).collect();
    let disk = serve(open_chain(&storages(&left), false), DiskOptions::default());
    let mut client = Client::new(&disk, Box::new(StepQueue::new(8, 64))).unwrap();
    client.read(extent(4096, 512)).unwrap().as_slice().to_vec()
}

#[test]
fn a_cluster_is_not_in_the_table_before_its_copy_up_is_complete() {
    assert_eq!(crash_during_copy_up(None), [0xB0; 512]);
    assert_ne!(crash_during_copy_up(Some(Mutant::PublishBeforeComplete)), [0xB0; 512], "the mutant lives");
}

#[test]
fn reads_do_not_wait_for_a_copy_up() {
    let served = served(1, 2);
    let (mut writer, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    writer.submit(write_request(1, 0, &[1; 512]));
    run(&mut writer, 5);
    assert_eq!(served.client().read(extent(0, 1024)).unwrap().as_slice(), [0xB0; 1024]);
}

/// Discards, flushes, and writes into the freed place before the flusher has punched it.
fn write_into_a_freed_place(mutant: Option<Mutant>) -> Vec<u8> {
    let served = served(1, 1);
    let mut client = served.client();
    for cluster in 0..CLUSTERS {
        client.write(cluster * CLUSTER, &[1; CLUSTER as usize]).unwrap();
    }
    client.flush().unwrap();
    let _broken = Broken::rule(mutant);
    client.discard(extent(0, CLUSTER)).unwrap();
    let (mut queue, _) = served.queue();
    queue.submit(request(1, Op::Flush, 0, 0, None));
    let mut answered = Vec::new();
    while answered.is_empty() {
        assert!(served.disk.step_flusher());
        answered = run(&mut queue, 1);
    }
    queue.submit(write_request(2, 0, &[9; CLUSTER as usize]));
    while queue.in_flight() > 0 {
        run(&mut queue, 1);
    }
    while served.disk.step_flusher() {}
    client.read(extent(0, CLUSTER)).unwrap().as_slice().to_vec()
}

#[test]
fn a_freed_place_is_punched_before_it_is_used_again() {
    assert_eq!(write_into_a_freed_place(None), [9; CLUSTER as usize]);
    assert_ne!(
        write_into_a_freed_place(Some(Mutant::PunchAfterReuse)),
        [9; CLUSTER as usize],
        "the mutant lives"
    );
}

#[test]
fn a_discard_waits_for_reads_in_flight_and_reads_wait_for_it() {
    let served = served(1, 1);
    let mut client = served.client();
    client.write(0, &[1; CLUSTER as usize]).unwrap();
    let (mut reader, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    reader.submit(read_request(1, 0, 512));
    run(&mut reader, 3);
    let (mut discarder, _) = served.queue();
    discarder.submit(request(2, Op::Discard, 0, CLUSTER, None));
    assert!(run(&mut discarder, 20).is_empty(), "the old mapping is in use");
    let late = read_request(3, 0, 512);
    discarder.submit(late);
    assert!(run(&mut discarder, 20).is_empty(), "who comes later does not overtake");
    hold.store(false, Ordering::SeqCst);
    let read = run(&mut reader, 50);
    assert_eq!(read[0].buffer.as_ref().unwrap().as_slice(), [1; 512]);
    let rest = run(&mut discarder, 50);
    let late = rest.iter().find(|completion| completion.id == 3).unwrap();
    assert_eq!(late.buffer.as_ref().unwrap().as_slice(), [0; 512]);
    assert_eq!(served.disk.chain().allocated_clusters(), 0);
}

#[test]
fn a_queue_dropped_in_the_middle_leaves_nothing_locked_reserved_or_unmarked() {
    let served = served(1, 2);
    let tracker = served.disk.start_tracker().unwrap();
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    for id in 0..8 {
        queue.submit(write_request(id, (id % 4) * CLUSTER + id * 512, &[5; 512]));
    }
    queue.submit(request(9, Op::Discard, 0, CLUSTERS * CLUSTER, None));
    run(&mut queue, 5);
    let mut client = served.client();
    // One that waits for the queue that goes away.
    let waiting =
        client.submit(Op::Write { fua: false }, extent(0, 512), Some(IoBuf::try_copy_of(&[6; 512]).unwrap()));
    hold.store(false, Ordering::SeqCst);
    drop(queue);
    assert_eq!(client.wait_for(waiting).unwrap().result, Ok(()));
    assert!(tracker.dirty_bytes() >= CLUSTERS * CLUSTER);
    drop(served.disk.freeze(PATIENCE).unwrap());
    client.flush().unwrap();
    drop(client);
    served.disk.close().unwrap();
}

#[test]
fn a_freeze_holds_new_writes_drains_old_ones_and_lets_reads_pass() {
    let served = served(1, 1);
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    queue.submit(write_request(1, 0, &[1; 512]));
    run(&mut queue, 3);
    let freezing = served.disk.begin_freeze().unwrap();
    assert_eq!(served.disk.begin_freeze().err().unwrap().kind(), ErrorKind::Busy);
    let freezing = freezing.finish().err().expect("a write is in flight");
    queue.submit(write_request(2, 512, &[2; 512]));
    queue.submit(write_request(3, 512, &[3; 512]));
    hold.store(false, Ordering::SeqCst);
    let ended: Vec<u64> = run(&mut queue, 50).iter().map(|completion| completion.id).collect();
    assert_eq!(ended, [1]);
    let frozen = freezing.finish().ok().expect("drained");
    queue.submit(read_request(4, 0, 1024));
    queue.submit(request(5, Op::Flush, 0, 0, None));
    while served.disk.step_flusher() {}
    let ended = run(&mut queue, 50);
    assert_eq!(ended.len(), 2, "reads and flushes pass a closed gate");
    let read = ended.iter().find(|completion| completion.id == 4).unwrap();
    assert_eq!(read.buffer.as_ref().unwrap().as_slice(), [[1; 512], [0; 512]].concat());
    drop(frozen);
    assert_eq!(run(&mut queue, 50).len(), 2);
    // Too long a wait fails and opens the gate.
    hold.store(true, Ordering::SeqCst);
    queue.submit(write_request(6, 0, &[6; 512]));
    run(&mut queue, 1);
    assert_eq!(served.disk.freeze(Duration::from_millis(5)).err().unwrap().kind(), ErrorKind::Busy);
    hold.store(false, Ordering::SeqCst);
    queue.submit(write_request(7, 0, &[7; 512]));
    assert_eq!(run(&mut queue, 50).len(), 2);
}

#[test]
fn after_a_hand_over_held_and_later_writes_fail() {
    let served = served(1, 1);
    let (mut queue, _) = served.queue();
    let frozen = served.disk.freeze(Duration::ZERO).unwrap();
    queue.submit(write_request(1, 0, &[1; 512]));
    assert!(run(&mut queue, 10).is_empty());
    frozen.hand_over();
    queue.submit(write_request(2, 0, &[1; 512]));
    queue.submit(read_request(3, 0, 512));
    let ended = run(&mut queue, 10);
    for completion in ended {
        let expected = if completion.id == 3 { Ok(()) } else { Err(libc::EIO) };
        assert_eq!(completion.result, expected, "request {}", completion.id);
    }
    assert_eq!(queue.in_flight(), 0);
    assert!(served.disk.begin_freeze().is_err());
}

#[test]
fn small_writes_to_one_fresh_cluster_go_out_with_it() {
    let served = served(1, 2);
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    for id in 0..16 {
        queue.submit(write_request(id, id * 512, &[id as u8; 512]));
    }
    run(&mut queue, 3);
    served.top().take_log();
    hold.store(false, Ordering::SeqCst);
    assert_eq!(run(&mut queue, 300).len(), 16);
    let log = served.top().take_log();
    assert_eq!(log.len(), 1, "one whole cluster with all of them: {log:?}");
    assert_eq!(log[0], Call::Write(log_offset(&log[0]), CLUSTER));
    let found = served.client().read(extent(0, CLUSTER)).unwrap();
    for sector in 0..CLUSTER_SECTORS {
        let expected = if sector < 16 { sector as u8 } else { 0xB0 };
        let at = sector as usize * 512;
        assert_eq!(found.as_slice()[at..at + 512], [expected; 512], "sector {sector}");
    }
}

fn log_offset(call: &Call) -> u64 {
    match call {
        Call::Write(offset, _) | Call::Allocate(offset, ..) => *offset,
        _ => 0,
    }
}

#[test]
fn neighbouring_clusters_are_one_transfer() {
    let served = served(4096, 1);
    let mut client = served.client();
    client.write(0, &vec![1; (CLUSTERS * CLUSTER) as usize]).unwrap();
    client.flush().unwrap();
    served.top().take_log();
    let buffer = IoBuf::try_copy_of(&vec![2; (8 * CLUSTER) as usize]).unwrap();
    client.write_buffer(CLUSTER, buffer).unwrap();
    let log = served.top().take_log();
    let contiguous = log.iter().map(|call| if let Call::Write(_, len) = call { *len } else { 0 });
    assert!(contiguous.clone().max().unwrap() > CLUSTER, "{log:?}");
    assert_eq!(contiguous.sum::<u64>(), 8 * CLUSTER);
    assert!(log.len() <= 4, "{log:?}");
}

#[test]
fn a_partial_write_to_known_zeros_writes_no_more_than_it_must() {
    let served = served_clusters(4096, 1, 4096);
    served.settle();
    let mut client = served.client();
    served.top().take_log();
    client.write(3 * CLUSTER + 8192, &[2; 4096]).unwrap();
    client.write(4 * CLUSTER + 512, &[3; 512]).unwrap();
    let writes: Vec<Call> =
        served.top().take_log().into_iter().filter(|call| matches!(call, Call::Write(..))).collect();
    assert!(writes.iter().all(|call| matches!(call, Call::Write(_, 4096))), "{writes:?}");
    assert_eq!(writes.len(), 2);
    let mut expected = vec![0; CLUSTER as usize];
    expected[512..1024].fill(3);
    assert_eq!(client.read(extent(4 * CLUSTER, CLUSTER)).unwrap().as_slice(), expected);
}

#[test]
fn a_discard_over_a_parent_reads_as_zeros_and_keeps_the_entry() {
    let served = served(1, 2);
    let mut client = served.client();
    client.discard(extent(0, 2 * CLUSTER)).unwrap();
    client.write_zeroes(extent(3 * CLUSTER + 512, 512), true).unwrap();
    client.flush().unwrap();
    drop(client);
    served.disk.close().unwrap();
    let served = served.reopen();
    let mut client = served.client();
    assert!(client.read(extent(0, 2 * CLUSTER)).unwrap().is_zero());
    assert_eq!(client.read(extent(2 * CLUSTER, 512)).unwrap().as_slice(), [0xB0; 512]);
    let found = client.read(extent(3 * CLUSTER, 1536)).unwrap();
    assert_eq!(found.as_slice(), [[0xB0; 512], [0; 512], [0xB0; 512]].concat());
    assert_eq!(served.disk.chain().allocated_clusters(), 3);
}

#[test]
fn where_the_host_cannot_punch_zeros_are_written() {
    let served = served(4096, 1);
    let mut client = served.client();
    client.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
    served.top().set_faults(Faults { no_allocate: true, ..Faults::default() });
    client.write_zeroes(extent(0, CLUSTER), false).unwrap();
    client.write_zeroes(extent(CLUSTER + 8192, 4096), true).unwrap();
    let found = client.read(extent(0, 2 * CLUSTER)).unwrap();
    let mut expected = vec![1; 2 * CLUSTER as usize];
    expected[..CLUSTER as usize].fill(0);
    expected[CLUSTER as usize + 8192..CLUSTER as usize + 12288].fill(0);
    assert_eq!(found.as_slice(), expected);
    // Freed without a punch: whoever gets the place next must not see what it held.
    client.discard(extent(CLUSTER, CLUSTER)).unwrap();
    client.flush().unwrap();
    while served.disk.step_flusher() {}
    client.write(5 * CLUSTER + 4096, &[3; 512]).unwrap();
    let found = client.read(extent(5 * CLUSTER, CLUSTER)).unwrap();
    assert!(!found.as_slice().contains(&1));
}

#[test]
fn large_clusters_are_copied_up_in_pieces() {
    const SECTORS: u64 = 8192;
    const BYTES: usize = 2 * SECTORS as usize * 512;
    let mut random = Random::new(5);
    let content: Vec<u8> = (0..BYTES).map(|_| random.next() as u8).collect();
    for unit in [1, 512, 4096] {
        let geometry = || Geometry::new(Version::V2, Sectors(SECTORS), Sectors(2 * SECTORS)).unwrap();
        let base = MemoryFile::with_bytes(unit, &content[..BYTES - 700 * 512]);
        let top = MemoryFile::new(unit);
        create_image(&*top, &CreateOptions { geometry: geometry(), preallocated: false }).unwrap();
        let source = |storage: &Arc<MemoryFile>, raw| Source {
            name: "delta".into(),
            storage: Arc::clone(storage) as Arc<dyn Storage>,
            raw,
        };
        let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false };
        let chain = Chain::open(vec![source(&base, true), source(&top, false)], &options).unwrap();
        let disk = serve(chain, DiskOptions { bounce_buffers: 1, ..DiskOptions::default() });
        let mut client = Client::new(&disk, Box::new(StepQueue::new(9, 64))).unwrap();
        let mut expected = content.clone();
        expected[BYTES - 700 * 512..].fill(0);
        top.set_faults(Faults { transfer_max: Some(300 << 10), ..Faults::default() });
        // Both clusters at once, with one buffer; across the borders of pieces, at odd bytes.
        let places = [((1 << 20) - 300, 5000), ((4 << 20) + (2 << 20) + 1, (1 << 20) + 77), (17, 1)];
        let mut ids = Vec::new();
        for (at, len) in places {
            let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            expected[at..at + len].copy_from_slice(&bytes);
            let buffer = IoBuf::try_copy_of(&bytes).unwrap();
            ids.push(client.submit(Op::Write { fua: false }, extent(at as u64, len as u64), Some(buffer)));
        }
        for id in ids {
            assert_eq!(client.wait_for(id).unwrap().result, Ok(()));
        }
        let zeroed = (3 << 20) + 100..(3 << 20) + 2_000_000;
        client.write_zeroes(extent(zeroed.start as u64, zeroed.len() as u64), true).unwrap();
        expected[zeroed].fill(0);
        let found = client.read(extent(0, BYTES as u64)).unwrap();
        assert!(found.as_slice() == expected, "unit {unit}");
        let odd = client.read(extent(12345, 3_000_001)).unwrap();
        assert!(odd.as_slice() == &expected[12345..12345 + 3_000_001], "unit {unit}: a read at odd bytes");
        drop(client);
        disk.close().unwrap();
    }
}

#[test]
fn a_long_discard_lets_others_go_first() {
    const MANY: u64 = 4096;
    let file = MemoryFile::new(1);
    create(&*file, MANY);
    let disk = serve(open_chain(&storages(&[Arc::clone(&file)]), false), DiskOptions::default());
    let mut client = Client::new(&disk, Box::new(StepQueue::new(3, 64))).unwrap();
    for cluster in 0..MANY {
        client.write(cluster * CLUSTER, &[1; 512]).unwrap();
    }
    client.flush().unwrap();
    let mut queue = disk.queue(Box::new(StepQueue::new(4, 64))).unwrap();
    queue.submit(request(1, Op::Discard, 0, MANY * CLUSTER, None));
    queue.submit(read_request(2, (MANY - 1) * CLUSTER, 512));
    let mut ended = Vec::new();
    while ended.len() < 2 {
        ended.extend(run(&mut queue, 1).into_iter().map(|completion| completion.id));
    }
    assert_eq!(ended, [2, 1], "the read had to wait for the whole discard");
    client.flush().unwrap();
    while disk.step_flusher() {}
    assert_eq!(disk.chain().allocated_clusters(), 0);
    let punches =
        file.take_log().into_iter().filter(|call| matches!(call, Call::Allocate(_, _, Allocation::Punch)));
    assert!(punches.count() < 64, "neighbouring clusters are punched together");
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let served = served(1, 1);
    let (mut queue, _) = served.queue();
    queue.submit(read_request(1, CLUSTERS * CLUSTER - 512, 1024));
    queue.submit(request(2, Op::Read, 0, 512, None));
    queue.submit(request(3, Op::Discard, 0, 512, Some(IoBuf::try_zeroed(512).unwrap())));
    let far = request(4, Op::WriteZeroes { fua: false, may_unmap: true }, u64::MAX - 512, 512, None);
    queue.submit(far);
    let ended = run(&mut queue, 3);
    assert_eq!(ended.len(), 4);
    assert!(ended.iter().all(|completion| completion.result == Err(libc::EINVAL)));
    assert_eq!(ended[0].buffer.as_ref().unwrap().len(), 1024, "the buffer comes back");
    // Nothing to do is done.
    queue.submit(write_request(5, 0, &[]));
    queue.submit(request(6, Op::Discard, 0, 0, None));
    assert!(run(&mut queue, 3).iter().all(|completion| completion.result == Ok(())));
    assert_eq!(served.disk.close().unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn more_requests_than_agreed_are_turned_away() {
    let file = MemoryFile::new(1);
    create(&*file, CLUSTERS);
    let options = DiskOptions { requests_max: 4, ..DiskOptions::default() };
    let disk = serve(open_chain(&storages(&[file]), false), options);
    let mut queue = disk.queue(Box::new(StepQueue::new(1, 1))).unwrap();
    for id in 0..6 {
        queue.submit(write_request(id, id * CLUSTER, &[1; 512]));
    }
    let ended = run(&mut queue, 100);
    let refused = ended.iter().filter(|completion| completion.result == Err(libc::EAGAIN)).count();
    assert_eq!((ended.len(), refused), (6, 2));
}

#[test]
fn a_frozen_disk_can_be_given_a_new_top() {
    new_top(false);
    new_top(true);
}

#[test]
fn a_sync_that_fails_keeps_the_old_top() {
    let served = served(1, 1);
    served.client().write(0, &[1; CLUSTER as usize]).unwrap();
    let child = MemoryFile::new(1);
    create(&*child, CLUSTERS);
    served.top().set_faults(Faults { sync_from: Some(2), ..Faults::default() });
    let frozen = served.disk.freeze(Duration::ZERO).unwrap();
    let replaced = frozen.replace_chain(|_| panic!("opened although the old top is not durable"));
    assert_eq!(replaced.unwrap_err().kind(), ErrorKind::Sync);
    assert!(served.disk.is_poisoned());
    assert_eq!(served.disk.chain().depth(), 1);
}

/// A pending write, a read under way and a held write, while the top is replaced.
fn new_top(is_mid_round: bool) {
    let served = served(1, 1);
    let (mut queue, hold) = served.queue();
    let mut client = served.client();
    client.write(0, &[1; CLUSTER as usize]).unwrap();
    hold.store(true, Ordering::SeqCst);
    queue.submit(read_request(1, 0, 512));
    run(&mut queue, 3);
    let frozen = served.disk.freeze(Duration::ZERO).unwrap();
    queue.submit(write_request(2, 0, &[2; 512]));
    if is_mid_round {
        // A round of somebody's flush, of which only the first sync is through.
        client.queue().submit(request(3, Op::Flush, 0, 0, None));
        run(client.queue(), 3);
        assert!(served.disk.step_flusher() && served.disk.step_flusher());
    }
    served.top().take_log();
    let child = MemoryFile::new(1);
    create(&*child, CLUSTERS);
    let both = storages(&[Arc::clone(served.top()), Arc::clone(&child)]);
    // Opened no sooner than the old top's table is in its file.
    frozen.replace_chain(|_| Ok(open_chain(&both, false))).unwrap();
    // The entry that was pending is durable in the old top.
    assert!(matches!(served.top().take_log()[..], [.., Call::Write(0, _), Call::Sync]));
    assert_eq!(served.disk.chain().pending(), 0);
    let base = served.top().bytes();
    drop(frozen);
    hold.store(false, Ordering::SeqCst);
    let ended = run(&mut queue, 100);
    assert_eq!(ended.len(), 2);
    assert!(ended.iter().all(|completion| completion.result == Ok(())));
    let found = client.read(extent(0, 1024)).unwrap();
    assert_eq!(found.as_slice(), [[2; 512], [1; 512]].concat());
    assert_eq!(served.top().bytes(), base, "the old top is not written any more");
    client.flush().unwrap();
    assert!(child.bytes().len() as u64 > CLUSTER);
    drop((client, queue));
    served.disk.close().unwrap();
}

/// Eight clusters of their own number, durable; the first two discarded, so that there are free places at the start.
fn holed(unit: u32, depth: usize) -> Served {
    let served = served(unit, depth);
    let mut client = served.client();
    for cluster in 0..8 {
        client.write(cluster * CLUSTER, &[cluster as u8 + 1; CLUSTER as usize]).unwrap();
    }
    client.flush().unwrap();
    if depth == 1 {
        client.discard(extent(0, 2 * CLUSTER)).unwrap();
        client.flush().unwrap();
    }
    drop(client);
    while served.disk.step_flusher() {}
    served
}

fn place(served: &Served, cluster: u32) -> u32 {
    served.disk.chain().place_of(GuestCluster(cluster)).unwrap().0
}

fn move_request(id: u64, cluster: u64, to: Destination) -> ploop_core::device::Request {
    request(id, Op::Relocate(to), cluster * CLUSTER, CLUSTER, None)
}

const LOW: Destination = Destination::Below(FileCluster(3));

#[test]
fn a_move_waits_for_reads_in_flight_and_reads_wait_for_it() {
    for unit in [1, 512, 4096] {
        let served = holed(unit, 1);
        let before = place(&served, 7);
        let (mut reader, hold) = served.queue();
        hold.store(true, Ordering::SeqCst);
        reader.submit(read_request(1, 7 * CLUSTER, CLUSTER));
        run(&mut reader, 3);
        let (mut mover, _) = served.queue();
        mover.submit(move_request(2, 7, LOW));
        assert!(run(&mut mover, 20).is_empty(), "the old place is in use");
        mover.submit(read_request(3, 7 * CLUSTER, 4096));
        mover.submit(write_request(4, 7 * CLUSTER, &[9; 4096]));
        assert!(run(&mut mover, 20).is_empty(), "who comes later does not overtake");
        hold.store(false, Ordering::SeqCst);
        assert_eq!(run(&mut reader, 50)[0].buffer.as_ref().unwrap().as_slice(), [8; CLUSTER as usize]);
        let ended = run(&mut mover, 200);
        assert!(ended.iter().all(|completion| completion.result.is_ok()) && ended.len() == 3);
        assert_ne!(place(&served, 7), before);
        let mut expected = vec![8; CLUSTER as usize];
        expected[..4096].fill(9);
        let mut client = served.client();
        assert_eq!(client.read(extent(7 * CLUSTER, CLUSTER)).unwrap().as_slice(), expected);
        assert_eq!(served.disk.statistics().moved_clusters, 1);
        // It is durable with the next flush, and its old place is used again only after that.
        client.write(9 * CLUSTER, &[1; 512]).unwrap();
        client.write(10 * CLUSTER, &[1; 512]).unwrap();
        assert!(![place(&served, 9), place(&served, 10)].contains(&before));
        client.flush().unwrap();
        served.disk.settle_freed().unwrap();
        client.write(11 * CLUSTER, &[1; 512]).unwrap();
        assert_eq!(place(&served, 11), before);
        assert_eq!(client.read(extent(7 * CLUSTER, CLUSTER)).unwrap().as_slice(), expected);
    }
}

#[test]
fn moves_writes_discards_and_flushes_of_one_cluster_take_turns() {
    for order in 0..24_u64 {
        let served = holed(1, 1);
        let (mut queue, hold) = served.queue();
        hold.store(true, Ordering::SeqCst);
        let mut left: Vec<u64> = (0..4).collect();
        let mut code = order;
        let mut expected = vec![8; CLUSTER as usize];
        for count in (1..=4).rev() {
            let kind = left.remove((code % count) as usize);
            code /= count;
            match kind {
                0 => queue.submit(move_request(kind, 7, LOW)),
                1 => queue.submit(move_request(kind, 7, Destination::From(FileCluster(12)))),
                2 => {
                    queue.submit(write_request(kind, 7 * CLUSTER + 100, &[5; 1000]));
                    expected[100..1100].fill(5);
                }
                _ => {
                    queue.submit(request(kind, Op::Discard, 7 * CLUSTER, CLUSTER, None));
                    expected.fill(0);
                }
            }
        }
        queue.submit(request(9, Op::Flush, 0, 0, None));
        let mut ended = run(&mut queue, 5).len();
        hold.store(false, Ordering::SeqCst);
        while ended < 5 {
            served.disk.step_flusher();
            for completion in run(&mut queue, 1) {
                assert_eq!(completion.result, Ok(()), "order {order}, request {}", completion.id);
                ended += 1;
            }
        }
        drop(queue);
        served.disk.settle_freed().unwrap();
        let mut client = served.client();
        assert!(client.read(extent(7 * CLUSTER, CLUSTER)).unwrap().as_slice() == expected, "order {order}");
        client.flush().unwrap();
        drop(client);
        served.disk.close().unwrap();
        let served = served.reopen();
        let found = served.client().read(extent(7 * CLUSTER, CLUSTER)).unwrap();
        assert!(found.as_slice() == expected, "order {order}, opened again");
    }
}

#[test]
fn a_move_is_no_change_for_the_tracker_and_one_for_a_freeze() {
    let served = holed(1, 1);
    let tracker = served.disk.start_tracker().unwrap();
    let (mut queue, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    queue.submit(move_request(1, 7, LOW));
    run(&mut queue, 3);
    let freezing = served.disk.begin_freeze().unwrap();
    let freezing = freezing.finish().err().expect("a move is in flight");
    queue.submit(move_request(2, 6, LOW));
    hold.store(false, Ordering::SeqCst);
    assert_eq!(run(&mut queue, 50).len(), 1, "the second one is held");
    let frozen = freezing.finish().ok().expect("drained");
    drop(frozen);
    assert_eq!(run(&mut queue, 50).len(), 1);
    assert!(tracker.take(0, u64::MAX).is_none(), "the guest's bytes are the same");
}

#[test]
fn moves_that_cannot_be_are_told_or_do_nothing() {
    let served = holed(1, 1);
    let (mut queue, _) = served.queue();
    queue.submit(request(1, Op::Relocate(LOW), 512, CLUSTER, None));
    queue.submit(request(2, Op::Relocate(LOW), 0, 2 * CLUSTER, None));
    assert!(run(&mut queue, 5).iter().all(|completion| completion.result == Err(libc::EINVAL)));
    let mut client = served.client();
    assert!(!client.relocate(GuestCluster(0), LOW).unwrap(), "it has no place");
    assert!(client.relocate(GuestCluster(2), Destination::Below(FileCluster(50))).unwrap(), "it lies there");
    assert_eq!(served.disk.statistics().moved_clusters, 0);
    assert!(!client.relocate(GuestCluster(2), Destination::Below(FileCluster(1))).unwrap(), "no such place");
    let len = served.top().bytes().len() as u64;
    served.top().set_faults(Faults { len_max: Some(len), ..Faults::default() });
    let far = Destination::From(FileCluster(len.div_ceil(CLUSTER) as u32));
    let error = client.relocate(GuestCluster(2), far).unwrap_err();
    assert!(error.is_out_of_space() && error.kind() == ErrorKind::Relocation, "{error}");
    served.top().set_faults(Faults { write: Some((0..2 * len, libc::EIO)), ..Faults::default() });
    assert!(client.relocate(GuestCluster(7), LOW).is_err());
    served.top().set_faults(Faults::default());
    assert_eq!(client.read(extent(7 * CLUSTER, 512)).unwrap().as_slice(), [8; 512]);
    assert!(!served.disk.is_poisoned());
    drop((client, queue));
    served.disk.close().unwrap();
}

/// What a crash leaves of a cluster when a flush came in the middle of its move.
fn crash_during_a_move(mutant: Option<Mutant>) -> Vec<u8> {
    let served = holed(1, 2);
    let broken = Broken::rule(mutant);
    let (mut mover, hold) = served.queue();
    hold.store(true, Ordering::SeqCst);
    mover.submit(move_request(1, 7, Destination::From(FileCluster(12))));
    run(&mut mover, 5);
    served.client().flush().unwrap();
    drop(broken);
    let left: Vec<_> = served.files.iter().map(|file| MemoryFile::with_bytes(1, &file.bytes())).collect();
    let disk = serve(open_chain(&storages(&left), false), DiskOptions::default());
    let mut client = Client::new(&disk, Box::new(StepQueue::new(8, 64))).unwrap();
    client.read(extent(7 * CLUSTER, 512)).unwrap().as_slice().to_vec()
}

#[test]
fn a_moved_cluster_is_not_in_the_table_before_its_copy_is_complete() {
    assert_eq!(crash_during_a_move(None), [8; 512]);
    assert_ne!(crash_during_a_move(Some(Mutant::PublishBeforeComplete)), [8; 512], "the mutant lives");
}

/// What a crash leaves of a moved cluster whose old place was written to by another before the flush.
fn old_place_reused(mutant: Option<Mutant>) -> Vec<u8> {
    let served = holed(1, 1);
    let _broken = Broken::rule(mutant);
    let mut client = served.client();
    assert!(client.relocate(GuestCluster(2), LOW).unwrap());
    for cluster in 8..CLUSTERS {
        client.write(cluster * CLUSTER, &[0xEE; CLUSTER as usize]).unwrap();
    }
    let left = MemoryFile::with_bytes(1, &served.top().bytes());
    let disk = serve(open_chain(&storages(&[left]), false), DiskOptions::default());
    let mut client = Client::new(&disk, Box::new(StepQueue::new(8, 64))).unwrap();
    client.read(extent(2 * CLUSTER, 512)).unwrap().as_slice().to_vec()
}

#[test]
fn the_old_place_of_a_moved_cluster_is_kept_until_the_move_is_durable() {
    assert_eq!(old_place_reused(None), [3; 512]);
    assert_ne!(old_place_reused(Some(Mutant::ReuseBeforeClearDurable)), [3; 512], "the mutant lives");
}

#[test]
fn the_tail_is_cut_when_nothing_durable_points_there() {
    let served = holed(4096, 1);
    let mut client = served.client();
    let len = |served: &Served| served.top().bytes().len() as u64 / CLUSTER;
    let high = place(&served, 7);
    for cluster in [7, 6] {
        assert!(client.relocate(GuestCluster(cluster), LOW).unwrap());
    }
    served.disk.cut_tail().unwrap();
    assert!(len(&served) > u64::from(high), "the file's table still names the last place");
    client.flush().unwrap();
    assert!(served.disk.cut_tail().unwrap() > 0);
    assert_eq!(len(&served), u64::from(high) - 1);
    // It grows again, and what it grows by reads as zeros.
    for cluster in 8..CLUSTERS {
        client.write(cluster * CLUSTER + 8192, &[cluster as u8; 512]).unwrap();
    }
    client.flush().unwrap();
    for cluster in 8..CLUSTERS {
        let found = client.read(extent(cluster * CLUSTER, CLUSTER)).unwrap();
        assert!(found.as_slice()[..8192].iter().all(|&byte| byte == 0), "cluster {cluster}");
        assert_eq!(found.as_slice()[8192..8704], [cluster as u8; 512]);
    }
    for cluster in 2..8 {
        let found = client.read(extent(cluster * CLUSTER, CLUSTER)).unwrap();
        assert_eq!(found.as_slice(), [cluster as u8 + 1; CLUSTER as usize]);
    }
    drop(client);
    served.disk.close().unwrap();
}
