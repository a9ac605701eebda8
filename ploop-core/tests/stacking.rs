//! What a snapshot costs a guest and what it must not disturb: copy-up counted transfer by transfer, and chains swapped
//! under requests in flight, stepped one by one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod served;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ploop_core::Extent;
use ploop_core::device::{Client, Completion, Destination, Disk, DiskOptions, Op, Queue};
use ploop_core::format::{Chain, Source, WriteTarget};
use ploop_core::io::{FileSlot, IoDone, IoKind, IoOp, IoQueue, Reaped, Storage, StorageExt, Wait, Waker};
use ploop_core::mutant::{self, Mutant};
use ploop_core::units::{FileCluster, GuestCluster};
use served::*;

const CLUSTERS: u64 = 32;

/// What went through a queue: (slot, is a write, bytes).
type Seen = Arc<Mutex<Vec<(u32, bool, usize)>>>;

/// A queue that writes down its transfers and insists that nobody uses a file it has let go of.
struct Watched {
    inner: StepQueue,
    attached: BTreeSet<u32>,
    seen: Seen,
    files: Arc<Mutex<usize>>,
}

impl Watched {
    fn new() -> Self {
        Self {
            inner: StepQueue::new(5, 64),
            attached: BTreeSet::new(),
            seen: Seen::default(),
            files: Arc::default(),
        }
    }
}

impl IoQueue for Watched {
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot> {
        let slot = self.inner.attach(storage)?;
        self.attached.insert(slot.0);
        *self.files.lock().unwrap() = self.attached.len();
        Ok(slot)
    }
    fn detach(&mut self, slot: FileSlot) {
        assert!(self.attached.remove(&slot.0), "let go twice");
        *self.files.lock().unwrap() = self.attached.len();
    }
    fn submit(&mut self, operation: IoOp) -> Result<(), IoOp> {
        assert!(self.attached.contains(&operation.file.0), "a file is used that was let go");
        let seen = match &operation.kind {
            IoKind::Read(buffer) => (operation.file.0, false, buffer.len()),
            IoKind::Write(buffer) => (operation.file.0, true, buffer.len()),
            IoKind::Allocate(..) => (operation.file.0, true, 0),
        };
        self.inner.submit(operation)?;
        self.seen.lock().unwrap().push(seen);
        Ok(())
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        self.inner.reap(wait, done)
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn waker(&self) -> Waker {
        self.inner.waker()
    }
    fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        self.inner.watch(descriptor)
    }
}

struct World {
    files: Vec<Arc<MemoryFile>>,
    disk: Arc<Disk>,
    unit: u32,
}

fn source(file: &Arc<MemoryFile>) -> Source {
    Source { name: "delta".into(), storage: Arc::clone(file) as Arc<dyn Storage>, raw: false }
}

impl World {
    fn new(unit: u32) -> Self {
        let file = MemoryFile::new(unit);
        create(&*file, CLUSTERS);
        let disk = serve(open_chain(&[Arc::clone(&file) as _], false), DiskOptions::default());
        Self { files: vec![file], disk, unit }
    }

    fn client(&self) -> Client {
        Client::new(&self.disk, Box::new(StepQueue::new(8, 64))).unwrap()
    }

    /// A queue, the switch that keeps its transfers from being performed, what it did, and how many files it holds.
    fn queue(&self) -> (Queue, Arc<AtomicBool>, Seen, Arc<Mutex<usize>>) {
        let io = Watched::new();
        let (hold, seen, files) = (io.inner.hold(), Arc::clone(&io.seen), Arc::clone(&io.files));
        (self.disk.queue(Box::new(io)).unwrap(), hold, seen, files)
    }

    fn swap(&self, chain: &Arc<Chain>) {
        let frozen = self.disk.freeze(Duration::ZERO).unwrap();
        frozen.replace_chain(|_| Ok(Arc::clone(chain))).unwrap();
    }

    fn snapshot(&mut self) {
        let file = MemoryFile::new(self.unit);
        create(&*file, CLUSTERS);
        let old = self.disk.chain();
        let new = old.stacked(source(&file)).unwrap();
        self.swap(&new);
        old.close().unwrap();
        new.cover();
        self.files.push(file);
    }

    /// Merges delta 1 into the base and takes it out.
    fn merge(&mut self) {
        let chain = self.disk.chain();
        let parent = chain.parent_for_merge(0, source(&self.files[0])).unwrap();
        chain
            .for_each_held(1, |cluster, offset, len| {
                let mut bytes = vec![0; CLUSTER as usize];
                chain.storage(1).read_exact_at(offset.0, &mut bytes[..len as usize]).unwrap();
                match parent.prepare_write(cluster)? {
                    WriteTarget::InPlace(to) => parent.storage(0).write_all_at(to.0, &bytes).unwrap(),
                    WriteTarget::Fresh(prepared) => {
                        parent.storage(0).write_all_at(prepared.offset().0, &bytes).unwrap();
                        prepared.publish();
                    }
                }
                Ok(())
            })
            .unwrap();
        let plan = parent.seal();
        for (offset, bytes) in &plan.writes {
            parent.storage(0).write_all_at(offset.0, bytes).unwrap();
        }
        parent.committed(plan);
        let new = chain.without(1, &parent).unwrap();
        parent.close().unwrap();
        self.swap(&new);
        self.files.remove(1);
    }
}

fn extent(start: u64, len: u64) -> Extent {
    Extent::new(start, len).unwrap()
}

fn run(queue: &mut Queue, turns: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    for _ in 0..turns {
        queue.run(Wait::No, &mut completions).unwrap();
    }
    completions
}

#[test]
fn a_write_after_a_snapshot_copies_its_cluster_once() {
    let mut world = World::new(512);
    world.client().write(0, &vec![7; (8 * CLUSTER) as usize]).unwrap();
    world.snapshot();
    let mut client = world.client();
    // Growth that is durable, so that nothing but the copy-up is counted.
    client.write(20 * CLUSTER, &vec![1; CLUSTER as usize]).unwrap();
    client.flush().unwrap();
    let (mut queue, hold, seen, _) = world.queue();
    let syncs = world.disk.statistics().syncs;
    queue.submit(write_request(1, 3 * CLUSTER + 4096, &[9; 4096]));
    let ended = run(&mut queue, 200);
    assert!(ended.len() == 1 && ended[0].result.is_ok());
    let cluster = CLUSTER as usize;
    let transfers = |seen: &Seen| std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(
        transfers(&seen),
        [(0, false, cluster), (1, true, cluster)],
        "one read below, one write above"
    );
    assert_eq!(world.disk.statistics().syncs, syncs, "and no sync");
    // At the edge only the rest is read.
    queue.submit(write_request(2, 4 * CLUSTER, &[9; 4096]));
    assert_eq!(run(&mut queue, 200).len(), 1);
    assert_eq!(transfers(&seen), [(0, false, cluster - 4096), (1, true, cluster)]);
    // All of it: nothing is read.
    queue.submit(write_request(3, 5 * CLUSTER, &vec![9; cluster]));
    assert_eq!(run(&mut queue, 200).len(), 1);
    assert_eq!(transfers(&seen), [(1, true, cluster)]);
    // Neighbours in flight wait for the one copy-up and go out with it.
    hold.store(true, Ordering::SeqCst);
    for id in 0..6 {
        queue.submit(write_request(10 + id, 6 * CLUSTER + id * 4096, &[id as u8 + 1; 4096]));
    }
    run(&mut queue, 3);
    hold.store(false, Ordering::SeqCst);
    assert_eq!(run(&mut queue, 400).len(), 6);
    let all = transfers(&seen);
    assert_eq!(all.iter().filter(|(_, is_write, _)| !is_write).count(), 1, "{all:?}");
    assert_eq!(all.iter().filter(|(_, is_write, len)| *is_write && *len == cluster).count(), 1, "{all:?}");
    assert_eq!(all.len(), 2, "{all:?}");
    // Read back through another queue.
    let found = client.read(extent(6 * CLUSTER, CLUSTER)).unwrap();
    for id in 0..6 {
        assert!(found.as_slice()[id * 4096..(id + 1) * 4096].iter().all(|byte| *byte == id as u8 + 1));
    }
    assert!(found.as_slice()[6 * 4096..].iter().all(|byte| *byte == 7));
    assert_eq!(client.read(extent(3 * CLUSTER, 4096)).unwrap().as_slice(), [7; 4096]);
}

#[test]
fn neighbours_of_a_copy_up_that_fails_are_tried_by_themselves() {
    let mut world = World::new(512);
    world.client().write(0, &vec![7; (8 * CLUSTER) as usize]).unwrap();
    world.snapshot();
    let (mut queue, hold, seen, _) = world.queue();
    let submit = |queue: &mut Queue| {
        hold.store(true, Ordering::SeqCst);
        for id in 0..4 {
            queue.submit(write_request(id, 6 * CLUSTER + id * 4096, &[id as u8 + 1; 4096]));
        }
        run(queue, 3);
        hold.store(false, Ordering::SeqCst);
        run(queue, 400)
    };
    let faults = Faults { write: Some((0..u64::MAX, 5)), ..Faults::default() };
    world.files[1].set_faults(faults);
    let ended = submit(&mut queue);
    assert_eq!(ended.iter().filter(|one| one.result == Err(5)).count(), 4, "{ended:?}");
    let writes = seen.lock().unwrap().drain(..).filter(|(_, is_write, _)| *is_write).count();
    assert_eq!(writes, 4, "each is told of its own failure");
    let mut client = world.client();
    assert!(client.read(extent(6 * CLUSTER, CLUSTER)).unwrap().as_slice().iter().all(|byte| *byte == 7));
    world.files[1].set_faults(Faults::default());
    assert_eq!(submit(&mut queue).iter().filter(|one| one.result.is_ok()).count(), 4);
    let found = client.read(extent(6 * CLUSTER, CLUSTER)).unwrap();
    for id in 0..4 {
        assert!(found.as_slice()[id * 4096..(id + 1) * 4096].iter().all(|byte| *byte == id as u8 + 1));
    }
    assert!(found.as_slice()[4 * 4096..].iter().all(|byte| *byte == 7));
}

#[test]
fn reads_in_flight_outlive_the_chain_they_began_with() {
    let mut world = World::new(512);
    let mut client = world.client();
    client.write(0, &vec![1; (2 * CLUSTER) as usize]).unwrap();
    world.snapshot();
    client.write(0, &vec![2; CLUSTER as usize]).unwrap();
    world.snapshot();
    client.write(5 * CLUSTER, &vec![5; 512]).unwrap();
    let (mut queue, hold, _, files) = world.queue();
    hold.store(true, Ordering::SeqCst);
    // Straight, and through a bounce buffer, of each delta.
    let reads =
        [(1, 0, 4096), (2, 100, 5000), (3, CLUSTER, 4096), (4, CLUSTER + 7, 900), (5, 5 * CLUSTER + 1, 300)];
    for (id, start, len) in reads {
        queue.submit(read_request(id, start, len));
    }
    run(&mut queue, 3);
    assert_eq!(*files.lock().unwrap(), 3);
    world.merge();
    world.snapshot();
    // Overwritten before the reads are performed: they may see neither less nor anything else than what was there.
    queue.submit(write_request(9, 3 * CLUSTER, &[9; 512]));
    run(&mut queue, 3);
    assert_eq!(*files.lock().unwrap(), 3 + 1, "the merged file is kept for the reads that need it");
    hold.store(false, Ordering::SeqCst);
    let mut ended = run(&mut queue, 400);
    ended.sort_by_key(|completion| completion.id);
    assert_eq!(ended.len(), 6);
    for (completion, byte) in ended.iter().zip([2, 2, 1, 1, 5]) {
        assert_eq!(completion.result, Ok(()));
        let buffer = completion.buffer.as_ref().unwrap();
        assert!(buffer.as_slice().iter().all(|found| *found == byte), "request {}", completion.id);
    }
    run(&mut queue, 3);
    assert_eq!(*files.lock().unwrap(), 3, "and let go of afterwards");
    assert_eq!(world.disk.chain().depth(), 3);
}

#[test]
fn a_copy_up_and_a_discard_in_flight_end_before_the_swap() {
    let mut world = World::new(512);
    world.client().write(0, &vec![1; (4 * CLUSTER) as usize]).unwrap();
    world.snapshot();
    let (mut queue, hold, _, _) = world.queue();
    hold.store(true, Ordering::SeqCst);
    queue.submit(write_request(1, 4096, &[2; 4096]));
    queue.submit(request(2, Op::Discard, 2 * CLUSTER, CLUSTER, None));
    run(&mut queue, 3);
    let mut freezing = world.disk.begin_freeze().unwrap();
    // Held: it belongs to the next top.
    queue.submit(write_request(3, 4096, &[3; 512]));
    for _ in 0..20 {
        freezing = match freezing.finish() {
            Ok(_) => panic!("drained with a copy-up in flight"),
            Err(freezing) => freezing,
        };
        assert!(run(&mut queue, 1).is_empty());
    }
    hold.store(false, Ordering::SeqCst);
    assert_eq!(run(&mut queue, 300).len(), 2);
    let Ok(frozen) = freezing.finish() else { panic!("not drained") };
    let file = MemoryFile::new(512);
    create(&*file, CLUSTERS);
    let old = world.disk.chain();
    let new = old.stacked(source(&file)).unwrap();
    frozen.replace_chain(|_| Ok(Arc::clone(&new))).unwrap();
    let kept = world.files[1].bytes();
    drop(frozen);
    let ended = run(&mut queue, 300);
    assert!(ended.len() == 1 && ended[0].id == 3 && ended[0].result.is_ok());
    assert!(world.files[1].bytes() == kept, "the frozen top was written (I7)");
    let mut client = world.client();
    assert_eq!(client.read(extent(4096, 1024)).unwrap().as_slice(), [[3; 512], [2; 512]].concat());
    assert_eq!(client.read(extent(0, 512)).unwrap().as_slice(), [1; 512]);
    let discarded = client.read(extent(2 * CLUSTER, CLUSTER)).unwrap();
    assert!(discarded.as_slice().iter().all(|byte| *byte == 0));
    world.files.push(file);
}

#[test]
fn discards_free_nothing_while_the_top_is_merged() {
    let mut world = World::new(512);
    world.snapshot();
    let mut client = world.client();
    client.write(0, &vec![4; (2 * CLUSTER) as usize]).unwrap();
    let kept = world.disk.keep_entries();
    client.discard(extent(0, CLUSTER)).unwrap();
    assert_eq!(world.disk.statistics().freed_clusters, 0);
    assert!(client.read(extent(0, CLUSTER)).unwrap().as_slice().iter().all(|byte| *byte == 0));
    assert_eq!(world.disk.chain().allocated_clusters(), 2);
    let moved = client.relocate(GuestCluster(1), Destination::From(FileCluster(9)));
    assert!(moved.is_err(), "who merges is not told of moves");
    kept.end();
    client.discard(extent(CLUSTER, CLUSTER)).unwrap();
    assert_eq!(world.disk.chain().allocated_clusters(), 1);
}

/// Whether what was written in place in the old top is synced when another one has taken over. Later flushes sync that one
/// only (G1).
fn old_top_is_synced(mutant: Option<Mutant>, fua: bool) -> bool {
    let world = World::new(512);
    let mut client = world.client();
    client.write(0, &vec![1; CLUSTER as usize]).unwrap();
    client.flush().unwrap();
    while world.disk.step_flusher() {}
    let buffer = ploop_core::io::IoBuf::try_copy_of(&[2; 512]).unwrap();
    client.queue().submit(request(1, Op::Write { fua }, 0, 512, Some(buffer)));
    let ended = run(client.queue(), 50);
    assert_eq!(ended.len(), usize::from(!fua), "a FUA write waits for the flusher, and has left the gate");
    world.files[0].take_log();
    let file = MemoryFile::new(512);
    create(&*file, CLUSTERS);
    let new = world.disk.chain().stacked(source(&file)).unwrap();
    mutant::activate(mutant);
    world.swap(&new);
    mutant::activate(None);
    let is_synced = world.files[0].take_log().iter().any(|call| matches!(call, Call::Sync));
    while world.disk.step_flusher() {}
    assert_eq!(run(client.queue(), 50).len(), usize::from(fua));
    is_synced
}

#[test]
fn what_was_written_in_place_is_durable_before_another_top_takes_over() {
    for fua in [false, true] {
        assert!(old_top_is_synced(None, fua));
        assert!(!old_top_is_synced(Some(Mutant::InPlaceUnsynced), fua), "and would be noticed");
        ploop_testing::found(Mutant::InPlaceUnsynced);
    }
}

/// What a read of cluster 0 returns that began when its delta lay below the top, and was still under way when that delta
/// was the top again and its place had been freed.
fn former_read(mutant: Option<Mutant>) -> u8 {
    let mut world = World::new(512);
    let mut client = world.client();
    client.write(0, &vec![1; (2 * CLUSTER) as usize]).unwrap();
    world.snapshot();
    let (mut queue, hold, ..) = world.queue();
    hold.store(true, Ordering::SeqCst);
    queue.submit(read_request(1, 0, 4096));
    run(&mut queue, 3);
    // Nothing was written to the top: merged it is.
    let chain = world.disk.chain();
    let parent = chain.parent_for_merge(0, source(&world.files[0])).unwrap();
    let promoted = chain.promoted(&parent).unwrap();
    mutant::activate(mutant);
    world.swap(&promoted);
    mutant::activate(None);
    client.discard(extent(0, CLUSTER)).unwrap();
    client.flush().unwrap();
    while world.disk.step_flusher() {}
    client.write(5 * CLUSTER, &vec![9; CLUSTER as usize]).unwrap();
    hold.store(false, Ordering::SeqCst);
    let ended = run(&mut queue, 100);
    let found = ended[0].buffer.as_ref().unwrap().as_slice()[0];
    // Now nothing is in the way any more.
    while world.disk.step_flusher() {}
    if mutant.is_none() {
        client.write(6 * CLUSTER, &vec![9; CLUSTER as usize]).unwrap();
        assert_eq!(world.disk.chain().place_of(GuestCluster(6)), Some(FileCluster(1)), "the freed place");
    }
    world.disk.settle_freed().unwrap();
    found
}

#[test]
fn a_freed_place_is_kept_while_a_read_of_a_former_chain_is_at_it() {
    assert_eq!(former_read(None), 1);
    assert_eq!(former_read(Some(Mutant::FormerReadsForgotten)), 9, "and would be noticed");
    ploop_testing::found(Mutant::FormerReadsForgotten);
}
