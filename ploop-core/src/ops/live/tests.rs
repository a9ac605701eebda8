//! Real files in a temporary folder, with a guest that writes meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::device::{Client, DiskOptions};
use crate::extent::Extent;
use crate::format::Guid;
use crate::io::file::Caching;
use crate::io::{Access, Folder, Storage, best_io_queue};
use crate::ops::{self, Progress, Silent};
use crate::units::Sectors;

mod merge_new;

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u64 = 64;

struct Ground {
    folder: tempfile::TempDir,
    disk: Arc<Disk>,
    bundle: RunningBundle,
}

fn open(path: &Path) -> Arc<Disk> {
    let options =
        ops::OpenOptions { caching: Caching::Cached, ..ops::OpenOptions::new(path, Access::ReadWrite) };
    Disk::open(ops::open(&options).unwrap().chain, DiskOptions::default()).unwrap()
}

impl Ground {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = ops::create::CreateOptions {
            cluster: Sectors(CLUSTER / 512),
            ..ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(CLUSTERS * CLUSTER / 512))
        };
        ops::create(&options).unwrap();
        let disk = open(folder.path());
        let bundle = RunningBundle::open(folder.path(), Caching::Cached).unwrap();
        Self { folder, disk, bundle }
    }

    fn client(&self) -> Client {
        Client::new(&self.disk, best_io_queue(16).unwrap()).unwrap()
    }

    fn snapshot(&self) -> SnapshotReport {
        let report = snapshot(&self.disk, &self.bundle, &mut NoWriters, &SnapshotOptions::default()).unwrap();
        assert_eq!(report.warnings, Vec::<String>::new());
        report
    }

    fn delete(&self, guid: Guid) -> DeleteReport {
        let report = delete(&self.disk, &self.bundle, &Silent, &DeleteOptions::new(guid)).unwrap();
        assert_eq!(report.warnings, Vec::<String>::new());
        report
    }

    /// What a snapshot holds, read by somebody else while the disk runs.
    fn read_snapshot(&self, guid: Guid) -> Vec<u8> {
        let options = ops::OpenOptions {
            snapshot: Some(guid),
            caching: Caching::Cached,
            ..ops::OpenOptions::new(self.folder.path(), Access::ReadOnly)
        };
        let chain = ops::open(&options).unwrap().chain;
        crate::format::testing::guest_content(&chain)
    }

    /// As [`read_snapshot`](Self::read_snapshot); of a snapshot that is as large as the disk was made.
    fn read_small(&self, guid: Guid) -> Vec<u8> {
        let content = self.read_snapshot(guid);
        assert_eq!(content.len() as u64, CLUSTERS * CLUSTER);
        content
    }

    fn files(&self) -> Vec<PathBuf> {
        let names = std::fs::read_dir(self.folder.path()).unwrap().map(|item| item.unwrap().path());
        names.filter(|path| path.to_string_lossy().contains("disk.hds")).collect()
    }

    /// Closes the disk and reads all of it as the next who opens it.
    fn close_and_read(self) -> Vec<u8> {
        self.disk.close().unwrap();
        drop(self.disk);
        let options = ops::OpenOptions {
            caching: Caching::Cached,
            ..ops::OpenOptions::new(self.folder.path(), Access::ReadOnly)
        };
        let opened = ops::open(&options).unwrap();
        assert!(!opened.report.was_in_use && opened.report.warnings.is_empty(), "{:?}", opened.report);
        crate::format::testing::guest_content(&opened.chain)
    }
}

fn whole() -> Extent {
    Extent::new(0, CLUSTERS * CLUSTER).unwrap()
}

#[test]
fn a_snapshot_keeps_what_was_and_the_disk_goes_on() {
    let ground = Ground::new();
    let mut client = ground.client();
    client.write(0, &vec![1; 3 * usize::try_from(CLUSTER).unwrap()]).unwrap();
    let first = ground.snapshot();
    let before = client.read(whole()).unwrap();
    client.write(CLUSTER + 4096, &[2; 4096]).unwrap();
    client.discard(Extent::new(2 * CLUSTER, CLUSTER).unwrap()).unwrap();
    assert!(ground.read_snapshot(first.snapshot) == before.as_slice());
    let second = ground.snapshot();
    client.write(0, &[3; 512]).unwrap();
    assert_eq!((first.depth, second.depth), (2, 3));
    assert!(ground.read_snapshot(first.snapshot) == before.as_slice(), "the first one does not change");
    let now = client.read(whole()).unwrap();
    assert_eq!(now.as_slice()[..512], [3; 512]);
    assert_eq!(now.as_slice()[512], 1);
    assert!(now.as_slice()[2 * 65536..3 * 65536].iter().all(|byte| *byte == 0));
    drop(client);
    assert!(ground.close_and_read() == now.as_slice());
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let ground = Ground::new();
    ground.client().write(0, &[1; 4096]).unwrap();
    let taken = ground.snapshot().snapshot;
    let options = SnapshotOptions { snapshot: Some(taken), ..SnapshotOptions::default() };
    let snapshot_again = || snapshot(&ground.disk, &ground.bundle, &mut NoWriters, &options);
    assert_eq!(snapshot_again().unwrap_err().kind(), ErrorKind::Parameter);
    // Somebody else holds the writers.
    let frozen = ground.disk.freeze(DRAIN_TIMEOUT).unwrap();
    let busy =
        snapshot(&ground.disk, &ground.bundle, &mut NoWriters, &SnapshotOptions::default()).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    drop(frozen);
    // Writers that do not stop are let go.
    struct Stubborn(u32);
    impl Writers for Stubborn {
        fn settle(&mut self) -> Result<()> {
            Ok(())
        }
        fn stop(&mut self) -> Result<()> {
            Err(Error::new(ErrorKind::NotQuiet, "no"))
        }
        fn go_on(&mut self) -> Result<()> {
            self.0 += 1;
            Ok(())
        }
    }
    let mut stubborn = Stubborn(0);
    let error =
        snapshot(&ground.disk, &ground.bundle, &mut stubborn, &SnapshotOptions::default()).unwrap_err();
    assert_eq!((error.kind(), stubborn.0), (ErrorKind::NotQuiet, 1));
    let missing = delete(&ground.disk, &ground.bundle, &Silent, &DeleteOptions::new(Guid::random()));
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NoSnapshot);
    let top = delete(&ground.disk, &ground.bundle, &Silent, &DeleteOptions::new(Guid::TOP));
    assert_eq!(top.unwrap_err().kind(), ErrorKind::Parameter);
    // The snapshot is open elsewhere: it must not change.
    let options = ops::OpenOptions {
        snapshot: Some(taken),
        caching: Caching::Cached,
        ..ops::OpenOptions::new(ground.folder.path(), Access::ReadOnly)
    };
    let reader = ops::open(&options).unwrap();
    let error = delete(&ground.disk, &ground.bundle, &Silent, &DeleteOptions::new(taken)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop(reader);
    assert_eq!(ground.files().len(), 2);
    ground.client().write(4096, &[2; 4096]).unwrap();
    ground.delete(taken);
    assert_eq!(ground.files().len(), 1);
    let content = ground.close_and_read();
    assert_eq!((content[0], content[4096]), (1, 2));
}

/// Stops the merge after so many clusters.
struct Cancelling(AtomicU64);

impl Progress for Cancelling {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) -> Result<()> {
        match self.0.fetch_sub(1, Ordering::SeqCst) {
            0 | 1 => Err(Error::new(ErrorKind::Cancelled, "stop")),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_cancelled_merge_can_be_done_again() {
    for frozen in [false, true] {
        let ground = Ground::new();
        let mut client = ground.client();
        client.write(10 << 16, &vec![1; 10 << 16]).unwrap();
        let guid = ground.snapshot().snapshot;
        client.write(5 << 16, &vec![2; 20 << 16]).unwrap();
        if frozen {
            ground.snapshot();
        }
        client.write(10 << 16, &vec![3; 65536]).unwrap();
        let before = client.read(whole()).unwrap();
        let options = DeleteOptions::new(guid);
        let cancelled =
            delete(&ground.disk, &ground.bundle, &Cancelling(AtomicU64::new(4)), &options).unwrap_err();
        assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
        assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
        // Discards mean the same as ever, also of what was merged.
        for cluster in [6, 24] {
            let place = cluster << 16..(cluster + 1) << 16;
            client.discard(Extent::new(place.start as u64, 1 << 16).unwrap()).unwrap();
            let before = client.read(whole()).unwrap();
            assert!(before.as_slice()[place].iter().all(|byte| *byte == 0));
        }
        let before = client.read(whole()).unwrap();
        ground.delete(guid);
        assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
        drop(client);
        assert!(ground.close_and_read() == before.as_slice());
    }
}

/// What has been merged when a merge is given up stays in the parent, where the chain in use does not see it.
#[test]
fn a_discard_after_a_cancelled_merge_is_not_undone_by_the_next_opening() {
    for again in [false, true] {
        let ground = Ground::new();
        let mut client = ground.client();
        let guid = ground.snapshot().snapshot;
        client.write(0, &vec![2; 8 << 16]).unwrap();
        let options = DeleteOptions::new(guid);
        // All of it is merged, and durable in the parent when that is closed.
        let cancelled =
            delete(&ground.disk, &ground.bundle, &Cancelling(AtomicU64::new(6)), &options).unwrap_err();
        assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
        client.discard(Extent::new(0, 4 << 16).unwrap()).unwrap();
        client.flush().unwrap();
        let before = client.read(whole()).unwrap();
        assert!(before.as_slice()[..4 << 16].iter().all(|byte| *byte == 0));
        if again {
            ground.delete(guid);
            assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
            client.discard(Extent::new(4 << 16, 1 << 16).unwrap()).unwrap();
            assert!(ground.disk.statistics().freed_clusters > 0, "discards free clusters again");
            client.write(4 << 16, &vec![2; 1 << 16]).unwrap();
        }
        drop(client);
        assert!(ground.close_and_read() == before.as_slice(), "again: {again}");
    }
}

/// A bundle whose folder cannot be synced from the call number `from` on, for `count` calls.
struct Unsyncable {
    inner: RunningBundle,
    folder: UnsyncableFolder,
}

struct UnsyncableFolder {
    inner: crate::io::file::DirectoryFolder,
    syncs: AtomicU64,
    failing: std::ops::Range<u64>,
}

impl Bundle for Unsyncable {
    fn folder(&self) -> &dyn Folder {
        &self.folder
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
    fn open_image(&self, file: &str, access: Access, raw: bool) -> Result<Arc<dyn Storage>> {
        self.inner.open_image(file, access, raw)
    }
    fn unused_images(&self) -> &dyn Folder {
        self.inner.unused_images()
    }
    fn remove_image(&self, file: &str) -> Result<()> {
        self.inner.remove_image(file)
    }
}

impl Folder for UnsyncableFolder {
    fn open(&self, name: &str, access: Access) -> std::io::Result<Arc<dyn Storage>> {
        self.inner.open(name, access)
    }
    fn create_exclusive(&self, name: &str) -> std::io::Result<Arc<dyn Storage>> {
        self.inner.create_exclusive(name)
    }
    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.inner.rename(from, to)
    }
    fn rename_exclusive(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.inner.rename_exclusive(from, to)
    }
    fn unlink(&self, name: &str) -> std::io::Result<()> {
        self.inner.unlink(name)
    }
    fn exists(&self, name: &str) -> std::io::Result<bool> {
        self.inner.exists(name)
    }
    fn list(&self) -> std::io::Result<Vec<String>> {
        self.inner.list()
    }
    fn sync(&self) -> std::io::Result<()> {
        if self.failing.contains(&self.syncs.fetch_add(1, Ordering::SeqCst)) {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.sync()
    }
}

/// The descriptor of the shorter chain may be there already, or come back, while the guest goes on in the longer one.
#[test]
fn a_merge_whose_commit_is_in_doubt_loses_no_later_write() {
    for lasting in [false, true] {
        let ground = Ground::new();
        let mut client = ground.client();
        client.write(0, &[1; 4096]).unwrap();
        let guid = ground.snapshot().snapshot;
        client.write(0, &[2; 4096]).unwrap();
        let folder = UnsyncableFolder {
            inner: crate::io::file::DirectoryFolder::open(ground.folder.path()).unwrap(),
            syncs: AtomicU64::new(0),
            // The first one is for the mark that the merge has begun.
            failing: if lasting { 1..u64::MAX } else { 1..2 },
        };
        let bundle =
            Unsyncable { inner: RunningBundle::open(ground.folder.path(), Caching::Cached).unwrap(), folder };
        let error = delete(&ground.disk, &bundle, &Silent, &DeleteOptions::new(guid)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutcomeUnknown);
        let written = client.write(0, &[3; 4096]);
        assert_eq!(written.is_err(), lasting, "refused if whoever opens the disk next might not see it");
        let now = client.read(whole()).unwrap();
        assert_eq!(now.as_slice()[0], if lasting { 2 } else { 3 });
        drop(client);
        assert!(ground.close_and_read() == now.as_slice());
    }
}

/// A guest that writes, discards and checks its own writes, until told to stop; returns what the disk must hold.
fn guest(ground: &Ground, stop: &AtomicBool, seed: u64) -> Vec<u8> {
    let mut client = ground.client();
    let mut random = crate::io::sim::Random::new(seed);
    let mut model = client.read(whole()).unwrap().as_slice().to_vec();
    let mut value = 0;
    while !stop.load(Ordering::SeqCst) {
        let cluster = random.index(usize::try_from(CLUSTERS).unwrap()) as u64;
        let (start, len) = match random.index(3) {
            0 => (cluster * CLUSTER, CLUSTER),
            _ => (cluster * CLUSTER + 4096 * random.index(16) as u64, 4096),
        };
        let place = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
        match random.index(8) {
            0 => {
                client.discard(Extent::new(start, len).unwrap()).unwrap();
                model[place].fill(0);
            }
            1 => client.flush().unwrap(),
            2..=4 => {
                let found = client.read(Extent::new(start, len).unwrap()).unwrap();
                assert!(found.as_slice() == &model[place], "read at {start}, seed {seed}");
            }
            _ => {
                value = value % 250 + 1;
                model[place.clone()].fill(value);
                client.write(start, &model[place]).unwrap();
            }
        }
    }
    model
}

#[test]
fn a_writing_guest_does_not_notice_snapshots_and_merges() {
    let ground = Ground::new();
    let stop = AtomicBool::new(false);
    let model = std::thread::scope(|scope| {
        let writer = scope.spawn(|| guest(&ground, &stop, 3));
        struct StopOnDrop<'a>(&'a AtomicBool);
        impl Drop for StopOnDrop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let ending = StopOnDrop(&stop);
        let mut random = crate::io::sim::Random::new(9);
        let mut snapshots: Vec<(Guid, Vec<u8>)> = Vec::new();
        for _ in 0..60 {
            assert!(!writer.is_finished());
            // Any moment will do.
            std::thread::sleep(Duration::from_millis(random.index(10) as u64));
            if snapshots.len() < 4 && (snapshots.is_empty() || random.index(3) > 0) {
                let guid = ground.snapshot().snapshot;
                snapshots.push((guid, ground.read_snapshot(guid)));
            } else {
                let (guid, _) = snapshots.remove(random.index(snapshots.len()));
                ground.delete(guid);
            }
            // What was merged into another one's file, or away from under it, is nobody's content.
            for (guid, content) in &snapshots {
                assert!(&ground.read_snapshot(*guid) == content, "snapshot {guid} changed");
            }
        }
        drop(ending);
        writer.join().unwrap()
    });
    let mut client = ground.client();
    assert!(client.read(whole()).unwrap().as_slice() == model);
    drop(client);
    assert!(ground.close_and_read() == model);
}

#[test]
fn trackers_see_every_write_across_a_change_of_the_chain() {
    let ground = Ground::new();
    let mut client = ground.client();
    client.write(0, &[1; 4096]).unwrap();
    let tracker = ground.disk.start_tracker().unwrap();
    let guid = ground.snapshot().snapshot;
    client.write(CLUSTER, &[2; 4096]).unwrap();
    ground.delete(guid);
    client.write(2 * CLUSTER, &[3; 4096]).unwrap();
    let mut seen = Vec::new();
    while let Some(taken) = tracker.take(0, u64::MAX) {
        seen.push((taken.extent().start(), taken.extent().len()));
        taken.acknowledge();
    }
    assert_eq!(seen, [(CLUSTER, 4096), (2 * CLUSTER, 4096)], "and merges are no writes of the guest");
    ground.disk.stop_tracker(&tracker);
}

/// A guest that does something at the first sign of progress, while the gate is open.
struct Meanwhile<'a>(std::sync::Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>);

impl<'a> Meanwhile<'a> {
    fn new(work: impl FnOnce() + Send + 'a) -> Self {
        Self(std::sync::Mutex::new(Some(Box::new(work))))
    }
}

impl Progress for Meanwhile<'_> {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) -> Result<()> {
        if let Some(work) = self.0.lock().unwrap().take() {
            work();
        }
        Ok(())
    }
}

#[test]
fn what_changes_during_a_merge_is_copied_in_small_units() {
    let ground = Ground::new();
    let mut client = ground.client();
    // Held by the parent: 0 to 7. By the top, too: 0 and 1; by the top alone: 8 and 9.
    client.write(0, &vec![1; 8 << 16]).unwrap();
    let guid = ground.snapshot().snapshot;
    client.write(0, &vec![2; 2 << 16]).unwrap();
    client.write(8 << 16, &vec![2; 2 << 16]).unwrap();
    let first = 4 * CLUSTER;
    let mut expected = client.read(whole()).unwrap().as_slice().to_vec();
    let changed = |client: &mut Client, expected: &mut [u8]| {
        let place =
            |start: u64, len: u64| usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
        // One block, and two with a gap that is moved along; of a cluster copied already or still to come.
        client.write(4096, &[3; 4096]).unwrap();
        expected[place(4096, 4096)].fill(3);
        client.write(CLUSTER + 512, &[4; 512]).unwrap();
        expected[place(CLUSTER + 512, 512)].fill(4);
        client.write(CLUSTER + 3 * 4096, &[4; 4096]).unwrap();
        expected[place(CLUSTER + 3 * 4096, 4096)].fill(4);
        // One that the parent alone held, in part and as a whole; and zeros in both.
        client.write(2 * CLUSTER + 8192, &[5; 4096]).unwrap();
        expected[place(2 * CLUSTER + 8192, 4096)].fill(5);
        client.discard(Extent::new(3 * CLUSTER, CLUSTER).unwrap()).unwrap();
        expected[place(3 * CLUSTER, CLUSTER)].fill(0);
        client.write_zeroes(Extent::new(4 * CLUSTER + 4096, 8192).unwrap(), true).unwrap();
        expected[place(4 * CLUSTER + 4096, 8192)].fill(0);
        // One that the top alone holds is discarded: its entry stays until the merge has ended.
        client.discard(Extent::new(9 * CLUSTER, CLUSTER).unwrap()).unwrap();
        expected[place(9 * CLUSTER, CLUSTER)].fill(0);
        // One that nobody held: the parent gets it whole.
        client.write(20 * CLUSTER + 4096, &[6; 4096]).unwrap();
        expected[place(20 * CLUSTER + 4096, 4096)].fill(6);
    };
    let report = {
        let meanwhile = Meanwhile::new(|| changed(&mut client, &mut expected));
        delete(&ground.disk, &ground.bundle, &meanwhile, &DeleteOptions::new(guid)).unwrap()
    };
    assert!(client.read(whole()).unwrap().as_slice() == expected);
    let small = 4096 + (4096 + 4096) + 4096 + 8192;
    assert_eq!(report.merged_bytes, first + small + 3 * CLUSTER, "{report:?}");
    assert_eq!(ground.files().len(), 1);
    drop(client);
    assert!(ground.close_and_read() == expected);
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_does_not_keep_a_merge_from_ending() {
    const BLOCK: u64 = 4096;
    const WRITERS: u64 = 2;
    let ground = Ground::new();
    ground.client().write(0, &vec![1; usize::try_from(CLUSTERS * CLUSTER).unwrap()]).unwrap();
    // Held by the parent in part only: some clusters are written whole, some in place.
    ground.client().discard(Extent::new(0, CLUSTERS * CLUSTER / 2).unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let model = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (ground, stop, written) = (&ground, &stop, &written);
                scope.spawn(move || {
                    let mut client = ground.client();
                    let mut random = crate::io::sim::Random::new(writer + 1);
                    let mut last = std::collections::BTreeMap::new();
                    let mut longest = Duration::ZERO;
                    for value in 2_u8.. {
                        if stop.load(Ordering::SeqCst) || value == u8::MAX {
                            break;
                        }
                        for _ in 0..4000 {
                            let block =
                                random.index(usize::try_from(CLUSTERS * CLUSTER / BLOCK / WRITERS).unwrap());
                            let block = block as u64 * WRITERS + writer;
                            let begun = std::time::Instant::now();
                            client.write(block * BLOCK, &[value; 4096]).unwrap();
                            longest = longest.max(begun.elapsed());
                            last.insert(block, value);
                            written.fetch_add(BLOCK, Ordering::Relaxed);
                            if stop.load(Ordering::SeqCst) {
                                break;
                            }
                        }
                    }
                    (last, longest)
                })
            })
            .collect();
        let (mut pressed, mut rounds) = (0, 0);
        // Where the writers come to nothing beside a merge, another one may be slower.
        while rounds < 6 || (pressed == 0 && rounds < 60) {
            rounds += 1;
            let guid = ground.snapshot().snapshot;
            let least = written.load(Ordering::Relaxed) + 100 * BLOCK;
            while written.load(Ordering::Relaxed) < least
                && !writers.iter().any(|writer| writer.is_finished())
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            // So small that it does not end by luck.
            let options = DeleteOptions {
                rest_bytes_max: 64 << 10,
                hold_max: Duration::from_millis(5),
                ..DeleteOptions::new(guid)
            };
            let (before, begun) = (written.load(Ordering::Relaxed), std::time::Instant::now());
            let report = delete(&ground.disk, &ground.bundle, &Silent, &options).unwrap();
            println!(
                "{} passes, {} bytes in {:?}, {} written meanwhile, held for {} ms",
                report.passes,
                report.merged_bytes,
                begun.elapsed(),
                written.load(Ordering::Relaxed) - before,
                report.held_ms
            );
            // On a busy host with slow syncs.
            assert!(report.held_ms < 60_000.0, "{report:?}");
            pressed += u32::from(report.passes > 1);
        }
        assert!(pressed > 0, "the writers were too slow to matter");
        stop.store(true, Ordering::SeqCst);
        let done: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        println!("longest writes: {:?}", done.iter().map(|(_, longest)| longest).collect::<Vec<_>>());
        done.into_iter().flat_map(|(last, _)| last).collect::<std::collections::BTreeMap<_, _>>()
    });
    assert_eq!(ground.files().len(), 1);
    let found = ground.close_and_read();
    for (block, value) in model {
        let place = usize::try_from(block * BLOCK).unwrap();
        assert!(found[place..place + 4096].iter().all(|byte| *byte == value), "block {block}");
    }
}

#[test]
fn a_gate_that_somebody_else_keeps_closed_ends_a_merge_and_nothing_else() {
    let ground = Ground::new();
    let mut client = ground.client();
    client.write(0, &[1; 4096]).unwrap();
    let guid = ground.snapshot().snapshot;
    client.write(0, &[2; 4096]).unwrap();
    let frozen = ground.disk.freeze(DRAIN_TIMEOUT).unwrap();
    let options = DeleteOptions { drain_timeout: Duration::from_millis(50), ..DeleteOptions::new(guid) };
    let error = delete(&ground.disk, &ground.bundle, &Silent, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotQuiet);
    drop(frozen);
    client.write(4096, &[3; 4096]).unwrap();
    ground.delete(guid);
    drop(client);
    let content = ground.close_and_read();
    assert_eq!((content[0], content[4096]), (2, 3));
}

#[test]
fn a_change_of_the_chain_is_no_failure_of_what_is_just_submitted() {
    let ground = Ground::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guests: Vec<_> = (0..2)
            .map(|number| {
                let (ground, stop) = (&ground, &stop);
                scope.spawn(move || {
                    let mut client = ground.client();
                    while !stop.load(Ordering::SeqCst) {
                        client.write(number * CLUSTER, &[7; 4096]).unwrap();
                        client.read(Extent::new(number * CLUSTER, 4096).unwrap()).unwrap();
                        client.flush().unwrap();
                    }
                })
            })
            .collect();
        for _ in 0..3000 {
            if guests.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                break;
            }
            let frozen = ground.disk.freeze(DRAIN_TIMEOUT).unwrap();
            frozen.replace_chain(|old| Ok(Arc::clone(old))).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    ground.disk.close().unwrap();
}

#[test]
fn temporary_snapshots_go_on_the_way_and_other_branches_are_merged_beside_the_running_one() {
    let ground = Ground::new();
    let mut client = ground.client();
    let make = |temporary| {
        let options = SnapshotOptions { temporary, ..SnapshotOptions::default() };
        snapshot(&ground.disk, &ground.bundle, &mut NoWriters, &options).unwrap().snapshot
    };
    client.write(0, &[1; 4096]).unwrap();
    let temporary = make(true);
    client.write(CLUSTER, &[2; 4096]).unwrap();
    let (first, second) = (make(false), make(false));
    client.write(2 * CLUSTER, &[3; 4096]).unwrap();
    let options = ops::OpenOptions {
        snapshot: Some(temporary),
        caching: Caching::Cached,
        ..ops::OpenOptions::new(ground.folder.path(), Access::ReadOnly)
    };
    let reader = ops::open(&options).unwrap();
    let report = ground.delete(first);
    assert_eq!((report.temporary.as_slice(), report.depth), (&[][..], 3), "somebody uses it");
    drop(reader);
    let report = ground.delete(second);
    assert_eq!((report.temporary.as_slice(), report.depth), (&[temporary][..], 1));
    let now = client.read(whole()).unwrap();
    drop(client);
    let place = usize::try_from(CLUSTER).unwrap();
    assert_eq!([now.as_slice()[0], now.as_slice()[place], now.as_slice()[2 * place]], [1, 2, 3]);

    // A branch of two snapshots beside the running one.
    let (low, high, kept) = (Guid::random(), Guid::random(), Guid::random());
    let wait = std::time::Duration::ZERO;
    let Ground { folder, disk, bundle } = ground;
    disk.close().unwrap();
    drop(disk);
    for name in [low, high] {
        let options = ops::SnapshotOptions { snapshot: Some(name), temporary: false };
        ops::snapshot(folder.path(), &options, wait, &Silent).unwrap();
    }
    let options = ops::SnapshotOptions { snapshot: Some(kept), temporary: false };
    ops::snapshot(folder.path(), &options, wait, &Silent).unwrap();
    let options = ops::SwitchOptions { snapshot: low, keep: Some(Guid::random()) };
    ops::switch(folder.path(), &options, wait, &Silent).unwrap();
    let ground = Ground { disk: open(folder.path()), folder, bundle };
    ground.client().write(3 * CLUSTER, &[4; 4096]).unwrap();
    let before = ground.read_snapshot(kept);
    let files = ground.files().len();
    let report = ground.delete(high);
    assert_eq!((report.depth, ground.files().len()), (2, files - 1));
    assert!(ground.read_snapshot(kept) == before);
    assert_eq!(ground.close_and_read()[3 * place], 4);
}

/// The first clusters of a disk that was closed, and a sector far behind them.
fn read_again(path: &Path, at: u64) -> (Vec<u8>, Vec<u8>) {
    let disk = open(path);
    let mut client = Client::new(&disk, best_io_queue(16).unwrap()).unwrap();
    let read = (
        client.read(whole()).unwrap().as_slice().to_vec(),
        client.read(Extent::new(at, 512).unwrap()).unwrap().as_slice().to_vec(),
    );
    drop(client);
    disk.close().unwrap();
    read
}

/// The table of the parent grows over clusters that the guest reads.
#[test]
fn a_parent_grows_under_a_guest() {
    let ground = Ground::new();
    let stop = AtomicBool::new(false);
    // Clusters past the first one of the table.
    let clusters = 20_000;
    let last = (clusters - 1) * CLUSTER;
    let model = std::thread::scope(|scope| {
        let writer = scope.spawn(|| guest(&ground, &stop, 5));
        struct StopOnDrop<'a>(&'a AtomicBool);
        impl Drop for StopOnDrop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let ending = StopOnDrop(&stop);
        let mut client = ground.client();
        // Something lies in the way of each table that has to grow.
        let written = || {
            let deadline = std::time::Instant::now() + Duration::from_secs(120);
            while ground.disk.chain().allocated_clusters() == 0 {
                assert!(std::time::Instant::now() < deadline && !writer.is_finished());
                std::thread::yield_now();
            }
        };
        written();
        let first = ground.snapshot().snapshot;
        written();
        let second = ground.snapshot().snapshot;
        let grown = crate::device::GrowOptions::new(Sectors(clusters * CLUSTER / 512));
        ground.disk.grow(&grown).unwrap();
        client.write(last, &[7; 512]).unwrap();
        let third = ground.snapshot().snapshot;
        client.write(last, &[8; 512]).unwrap();
        let content = ground.read_small(first);
        // A frozen child that is larger, then the running top, then a child of the same size.
        for guid in [second, third, first] {
            ground.delete(guid);
            if guid != first {
                assert!(ground.read_small(first) == content, "another snapshot changed");
            }
            assert_eq!(client.read(Extent::new(last, 512).unwrap()).unwrap().as_slice(), [8; 512]);
            assert!(!writer.is_finished());
        }
        drop(ending);
        drop(client);
        writer.join().unwrap()
    });
    assert_eq!(ground.files().len(), 1);
    let Ground { folder, disk, .. } = ground;
    disk.close().unwrap();
    drop(disk);
    let descriptor = folder.path().join(DESCRIPTOR_NAME);
    ops::resize::record_size(&descriptor, Sectors(clusters * CLUSTER / 512)).unwrap();
    assert!(read_again(folder.path(), last) == (model, vec![8; 512]));
}

/// The parent of a frozen child that is smaller is cut; what the top hides stays hidden, and does not come back.
#[test]
fn a_parent_is_cut_while_the_disk_runs() {
    let mut ground = Ground::new();
    ground.client().write(0, &vec![1; usize::try_from(CLUSTERS * CLUSTER).unwrap()]).unwrap();
    let first = ground.snapshot().snapshot;
    ground.disk.close().unwrap();
    let path = ground.folder.path().to_path_buf();
    let smaller = ops::resize::ResizeOptions {
        shrink: ops::resize::Shrink::Discard,
        ..ops::resize::ResizeOptions::new(&path, Sectors(20 * CLUSTER / 512))
    };
    // The last one that has the files open.
    ground.disk = {
        let elsewhere = Ground::new();
        let Ground { disk, .. } = elsewhere;
        disk
    };
    ops::resize::resize(&smaller, &Silent).unwrap();
    ground.disk = open(&path);
    let second = ground.snapshot().snapshot;
    ground.disk.grow(&crate::device::GrowOptions::new(Sectors(CLUSTERS * CLUSTER / 512))).unwrap();
    ops::resize::record_size(&path.join(DESCRIPTOR_NAME), Sectors(CLUSTERS * CLUSTER / 512)).unwrap();
    let mut client = ground.client();
    let expect = |client: &mut Client, written: Option<u64>| {
        let found = client.read(whole()).unwrap();
        for (cluster, bytes) in (0..).zip(found.as_slice().chunks(usize::try_from(CLUSTER).unwrap())) {
            let byte = if Some(cluster) == written { 3 } else { u8::from(cluster < 20) };
            assert!(bytes.iter().all(|&one| one == byte), "cluster {cluster}");
        }
    };
    expect(&mut client, None);
    assert_eq!(ground.read_snapshot(second).len() as u64, 20 * CLUSTER);
    assert_eq!(ground.read_snapshot(first).len() as u64, CLUSTERS * CLUSTER);
    client.discard(Extent::new(30 * CLUSTER, 10 * CLUSTER).unwrap()).unwrap();
    expect(&mut client, None);
    ground.delete(first);
    expect(&mut client, None);
    client.discard(Extent::new(25 * CLUSTER, 10 * CLUSTER).unwrap()).unwrap();
    client.write(40 * CLUSTER, &vec![3; usize::try_from(CLUSTER).unwrap()]).unwrap();
    expect(&mut client, Some(40));
    assert_eq!(ground.read_snapshot(second), vec![1; usize::try_from(20 * CLUSTER).unwrap()]);
    ground.delete(second);
    expect(&mut client, Some(40));
    drop(client);
    let left = ground.close_and_read();
    assert!(left[40 * 65536] == 3 && left[41 * 65536..].iter().all(|&byte| byte == 0));
}

/// Somebody keeps the gate closed: the merge has not happened, says so, and happens when it is asked for again.
#[test]
fn a_closed_gate_fails_a_merge_before_it_counts() {
    let ground = Ground::new();
    ground.client().write(0, &[1; 4096]).unwrap();
    let first = ground.snapshot().snapshot;
    ground.client().write(CLUSTER, &[2; 4096]).unwrap();
    let second = ground.snapshot().snapshot;
    let frozen = ground.disk.freeze(DRAIN_TIMEOUT).unwrap();
    let options = DeleteOptions { drain_timeout: Duration::from_millis(1), ..DeleteOptions::new(first) };
    let error = delete(&ground.disk, &ground.bundle, &Silent, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotQuiet, "{error}");
    assert_eq!((ground.disk.chain().depth(), ground.files().len()), (3, 3));
    drop(frozen);
    ground.delete(first);
    assert_eq!((ground.disk.chain().depth(), ground.files().len()), (2, 2));
    ground.delete(second);
    let left = ground.close_and_read();
    assert_eq!((left[0], left[65536], left[2 * 65536]), (1, 2, 0));
}

#[test]
fn a_reader_whom_a_merge_overtakes_gets_no_other_state() {
    let ground = Ground::new();
    let mut client = ground.client();
    let mut snapshots = Vec::new();
    for value in 1..4_u8 {
        client.write(0, &[value; 4096]).unwrap();
        if value < 3 {
            snapshots.push(ground.snapshot().snapshot);
        }
    }
    let path = ground.folder.path();
    let open = |snapshot, merged: Guid| {
        let options = ops::OpenOptions {
            snapshot: Some(snapshot),
            caching: Caching::Cached,
            ..ops::OpenOptions::new(path, Access::ReadOnly)
        };
        let mut is_merged = false;
        ops::open::while_it_stands(path, false, |bundle| {
            if !std::mem::replace(&mut is_merged, true) {
                ground.delete(merged);
            }
            ops::open::open_described(bundle, path, &options)
        })
    };
    // Its file is there, and holds the other one.
    let gone = open(snapshots[0], snapshots[0]).map(|_| ()).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NoSnapshot, "{gone}");
    // This one has moved into the file of the other.
    let third = ground.snapshot().snapshot;
    let content = ground.read_snapshot(third);
    let opened = open(third, snapshots[1]).unwrap();
    assert!(crate::format::testing::guest_content(&opened.chain) == content);
}
