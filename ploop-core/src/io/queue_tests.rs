//! One suite for every queue: what `IoQueue` promises, tried on each implementation.

#![allow(clippy::cast_possible_truncation, clippy::large_stack_arrays, reason = "small numbers of tests")]

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::file::{Caching, FileStorage};
use super::pool::{PoolQueue, QueueChoice};
use super::sim::{Random, SimDisk};
use super::uring::UringQueue;
use super::{Allocation, FileSlot, IoBuf, IoDone, IoKind, IoOp, IoQueue, Reaped, Storage, StorageExt, Wait};

/// A queue with one attached file, and what keeps both alive.
struct Bench {
    name: &'static str,
    queue: Box<dyn IoQueue>,
    file: FileSlot,
    storage: Arc<dyn Storage>,
    _folder: Option<tempfile::TempDir>,
}

fn real(name: &'static str, mut queue: Box<dyn IoQueue>, caching: Caching) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> =
        Arc::new(FileStorage::create_exclusive(folder.path().join("file"), caching).unwrap());
    let file = queue.attach(Arc::clone(&storage)).unwrap();
    Bench { name, queue, file, storage, _folder: Some(folder) }
}

fn simulated(name: &'static str, disk: &SimDisk, mut queue: Box<dyn IoQueue>) -> Bench {
    let storage: Arc<dyn Storage> = Arc::new(disk.create("file").unwrap());
    let file = queue.attach(Arc::clone(&storage)).unwrap();
    Bench { name, queue, file, storage, _folder: None }
}

/// Every implementation, with room for `depth` operations.
fn benches(depth: u32) -> Vec<Bench> {
    let mut all = Vec::new();
    if UringQueue::probe() {
        for (name, caching) in [("uring", Caching::Cached), ("uring, direct", Caching::Direct)] {
            all.push(real(name, Box::new(UringQueue::new(depth).unwrap()), caching));
        }
        let disk = SimDisk::new(4);
        all.push(simulated("uring without descriptor", &disk, Box::new(UringQueue::new(depth).unwrap())));
    } else {
        ploop_testing::skip(ploop_testing::Need::IoUring, "io_uring is not available");
    }
    for (name, caching) in [("pool", Caching::Cached), ("pool, direct", Caching::Direct)] {
        all.push(real(name, Box::new(PoolQueue::new(depth).unwrap()), caching));
    }
    let disk = SimDisk::new(5);
    all.push(simulated("pool on the simulator", &disk, Box::new(PoolQueue::new(depth).unwrap())));
    for (name, ordered) in [("simulator", false), ("simulator, in order", true)] {
        let disk = SimDisk::new(6);
        let queue = disk.queue(depth as usize, 7).unwrap();
        let queue = if ordered { queue.in_order() } else { queue };
        all.push(simulated(name, &disk, Box::new(queue)));
    }
    all
}

fn drain(bench: &mut Bench, done: &mut Vec<IoDone>) {
    while bench.queue.in_flight() > 0 {
        bench.queue.reap(Wait::Yes, done).unwrap();
    }
}

fn filled(value: u8, len: usize) -> IoBuf {
    let mut buffer = IoBuf::try_zeroed(len).unwrap();
    buffer.as_mut_slice().fill(value);
    buffer
}

#[test]
fn bytes_arrive_where_they_were_sent() {
    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 64;
    for mut bench in benches(16) {
        let mut random = Random::new(9);
        // Blocks with an operation in flight take no second one: those two would not be ordered.
        let mut busy: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut model = [0u8; BLOCKS as usize];
        let mut reads: HashMap<u64, Vec<u8>> = HashMap::new();
        bench.storage.set_len(BLOCKS * BLOCK).unwrap();
        let mut done = Vec::new();
        for token in 0..600 {
            let start = random.below(BLOCKS);
            let count = 1 + random.below(4.min(BLOCKS - start));
            if busy.values().any(|&(from, to)| from < start + count && start < to) {
                bench.queue.reap(Wait::Yes, &mut done).unwrap();
            } else {
                let (blocks, len) = (start as usize..(start + count) as usize, (count * BLOCK) as usize);
                let value = (token % 255 + 1) as u8;
                let kind = match random.below(5) {
                    0 | 1 => {
                        reads.insert(token, model[blocks].to_vec());
                        IoKind::Read(filled(0xee, len))
                    }
                    2 => {
                        model[blocks].fill(0);
                        let how = if token % 2 == 0 { Allocation::Punch } else { Allocation::Zero };
                        IoKind::Allocate(len as u64, how)
                    }
                    _ => {
                        model[blocks].fill(value);
                        IoKind::Write(filled(value, len))
                    }
                };
                busy.insert(token, (start, start + count));
                let operation = IoOp { token, file: bench.file, offset: start * BLOCK, kind };
                if let Err(operation) = bench.queue.submit(operation) {
                    assert_eq!(
                        bench.queue.in_flight(),
                        16,
                        "{}: given back although there is room",
                        bench.name
                    );
                    drain(&mut bench, &mut done);
                    bench.queue.submit(operation).unwrap();
                }
            }
            for IoDone { token, result, buffer } in done.drain(..) {
                let (from, to) = busy.remove(&token).unwrap();
                let moved = result.unwrap_or_else(|error| panic!("{}: {error}", bench.name));
                let Some(buffer) = buffer else {
                    assert_eq!(moved, 0, "{}: an allocation moves nothing", bench.name);
                    continue;
                };
                assert_eq!(moved as u64, (to - from) * BLOCK, "{}", bench.name);
                if let Some(expected) = reads.remove(&token) {
                    for (block, value) in buffer.as_slice().chunks(BLOCK as usize).zip(expected) {
                        assert!(block.iter().all(|&byte| byte == value), "{}: wrong bytes", bench.name);
                    }
                }
            }
        }
        drain(&mut bench, &mut done);
        let mut all = IoBuf::try_zeroed((BLOCKS * BLOCK) as usize).unwrap();
        bench.storage.read_exact_at(0, all.as_mut_slice()).unwrap();
        for (block, value) in all.as_slice().chunks(BLOCK as usize).zip(model) {
            assert!(block.iter().all(|&byte| byte == value), "{}: wrong bytes at the end", bench.name);
        }
    }
}

#[test]
fn reads_at_the_end_are_short() {
    for mut bench in benches(4) {
        bench.storage.set_len(4096 + 100).unwrap();
        let mut done = Vec::new();
        for (token, offset) in [(0, 4096u64), (1, 1 << 20)] {
            let kind = IoKind::Read(filled(1, 8192));
            bench.queue.submit(IoOp { token, file: bench.file, offset, kind }).unwrap();
        }
        drain(&mut bench, &mut done);
        done.sort_by_key(|done| done.token);
        let moved: Vec<usize> = done.iter().map(|done| *done.result.as_ref().unwrap()).collect();
        assert_eq!(moved, [100, 0], "{}", bench.name);
    }
}

#[test]
fn an_unknown_file_is_an_error_of_the_operation() {
    for mut bench in benches(4) {
        let mut done = Vec::new();
        let kind = IoKind::Write(filled(1, 4096));
        bench.queue.submit(IoOp { token: 5, file: FileSlot(77), offset: 0, kind }).unwrap();
        drain(&mut bench, &mut done);
        assert!(done.len() == 1 && done[0].token == 5 && done[0].result.is_err(), "{}", bench.name);
    }
}

#[test]
fn another_thread_wakes_the_waiting_one() {
    for mut bench in benches(4) {
        let waker = bench.queue.waker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            waker.wake();
        });
        let reaped = bench.queue.reap(Wait::Yes, &mut Vec::new()).unwrap();
        assert_eq!(reaped, Reaped { finished: 0, woken: true, watched_ready: false }, "{}", bench.name);
        thread.join().unwrap();
        // Told once; and a wake-up before the wait is not lost.
        assert!(!bench.queue.reap(Wait::No, &mut Vec::new()).unwrap().woken, "{}", bench.name);
        bench.queue.waker().wake();
        assert!(bench.queue.reap(Wait::Yes, &mut Vec::new()).unwrap().woken, "{}", bench.name);
    }
}

#[test]
fn a_watched_descriptor_ends_the_wait_as_long_as_it_is_readable() {
    for mut bench in benches(4) {
        let (reader, mut writer) = std::io::pipe().unwrap();
        bench.queue.watch(Some(reader.as_raw_fd())).unwrap();
        let quiet = bench.queue.reap(Wait::For(Duration::from_millis(20)), &mut Vec::new()).unwrap();
        assert_eq!(quiet, Reaped::default(), "{}", bench.name);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            std::io::Write::write_all(&mut writer, b"x").unwrap();
            writer
        });
        for _ in 0..3 {
            let reaped = bench.queue.reap(Wait::Yes, &mut Vec::new()).unwrap();
            assert!(reaped.watched_ready, "{}: readable until it is read", bench.name);
        }
        std::io::Read::read_exact(&mut { &reader }, &mut [0]).unwrap();
        let writer = thread.join().unwrap();
        bench.queue.watch(None).unwrap();
        drop(reader);
        drop(writer);
        let quiet = bench.queue.reap(Wait::For(Duration::from_millis(20)), &mut Vec::new()).unwrap();
        assert_eq!(quiet, Reaped::default(), "{}: not watched any more", bench.name);
        // Another one in its place; its end counts as readable.
        let (reader, writer) = std::io::pipe().unwrap();
        bench.queue.watch(Some(reader.as_raw_fd())).unwrap();
        drop(writer);
        assert!(bench.queue.reap(Wait::Yes, &mut Vec::new()).unwrap().watched_ready, "{}", bench.name);
    }
}

#[test]
fn a_wait_ends_with_its_time() {
    for mut bench in benches(4) {
        let before = Instant::now();
        let reaped = bench.queue.reap(Wait::For(Duration::from_millis(40)), &mut Vec::new()).unwrap();
        assert_eq!(reaped, Reaped::default(), "{}", bench.name);
        assert!(before.elapsed() >= Duration::from_millis(40), "{}: too early", bench.name);
        assert_eq!(bench.queue.reap(Wait::No, &mut Vec::new()).unwrap(), Reaped::default(), "{}", bench.name);
    }
}

#[test]
fn a_full_queue_gives_the_operation_back() {
    for mut bench in benches(2) {
        let write =
            |token, file| IoOp { token, file, offset: token * 4096, kind: IoKind::Write(filled(7, 4096)) };
        for token in 0..2 {
            bench.queue.submit(write(token, bench.file)).unwrap();
        }
        let refused = bench.queue.submit(write(2, bench.file)).unwrap_err();
        assert!(refused.token == 2 && matches!(&refused.kind, IoKind::Write(buffer) if buffer.len() == 4096));
        let mut done = Vec::new();
        while done.is_empty() {
            bench.queue.reap(Wait::Yes, &mut done).unwrap();
        }
        bench.queue.submit(refused).unwrap();
        drain(&mut bench, &mut done);
        assert_eq!(done.len(), 3, "{}", bench.name);
    }
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    for Bench { name, mut queue, file, storage, _folder } in benches(8) {
        let keeper = Arc::downgrade(&storage);
        for token in 0..8 {
            let kind = IoKind::Write(filled(7, 1 << 20));
            queue.submit(IoOp { token, file, offset: token << 20, kind }).unwrap();
        }
        queue.watch(None).unwrap();
        drop(queue);
        let mut read = IoBuf::try_zeroed(8 << 20).unwrap();
        storage.read_exact_at(0, read.as_mut_slice()).unwrap();
        assert!(read.as_slice().iter().all(|&byte| byte == 7), "{name}: a write did not happen");
        drop(storage);
        assert_eq!(keeper.strong_count(), 0, "{name}: the file is still held");
    }
}

#[test]
fn errors_bring_the_buffer_back() {
    for mut bench in benches(4) {
        let mut done = Vec::new();
        let kind = IoKind::Write(filled(1, 4096));
        bench.queue.submit(IoOp { token: 0, file: bench.file, offset: 1 << 63, kind }).unwrap();
        drain(&mut bench, &mut done);
        assert!(done[0].result.is_err() && done[0].buffer.is_some(), "{}", bench.name);
    }
}

#[test]
fn a_choice_makes_the_queue_it_names() {
    let mut done = Vec::new();
    for choice in [QueueChoice::Auto, QueueChoice::Uring, QueueChoice::Pool] {
        if choice == QueueChoice::Uring && !UringQueue::probe() {
            assert!(choice.queue(4).is_err());
            continue;
        }
        let mut queue = choice.queue(4).unwrap();
        assert_eq!(queue.reap(Wait::No, &mut done).unwrap(), Reaped::default());
    }
    super::best_io_queue(4).unwrap();
}
