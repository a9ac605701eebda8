//! Merges of a running disk into a new file.

use super::*;
use crate::format::{DESCRIPTOR_NAME, DiskDescriptor};
use crate::ops::live::merge_new::{MergeNewOptions, MergeNewReport, merge_new};

fn merge(ground: &Ground, lower: Guid, upper: Guid) -> MergeNewReport {
    let options = MergeNewOptions::new(lower, upper, "new.disk.hds");
    let report = merge_new(&ground.disk, &ground.bundle, &Silent, &options).unwrap();
    assert_eq!(report.warnings, Vec::<String>::new());
    report
}

fn descriptor(ground: &Ground) -> DiskDescriptor {
    DiskDescriptor::load(ground.bundle.folder(), None).unwrap()
}

/// Four states on each other, each with clusters of its own and some that others hold; the snapshots, lowest first.
fn four(ground: &Ground) -> Vec<Guid> {
    let mut client = ground.client();
    let mut snapshots = Vec::new();
    for number in 0..4_u8 {
        let at = u64::from(number);
        client.write((3 * at) << 16, &vec![number + 1; 7 << 16]).unwrap();
        client.write((40 + at) << 16, &[number + 1; 4096]).unwrap();
        client.discard(Extent::new((20 + at) << 16, 1 << 16).unwrap()).unwrap();
        if number < 3 {
            snapshots.push(ground.snapshot().snapshot);
        }
    }
    snapshots
}

#[test]
fn any_range_becomes_one_new_file_and_nobody_sees_it() {
    for (lower, upper) in [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)] {
        let ground = Ground::new();
        let snapshots = four(&ground);
        let mut states = snapshots.clone();
        states.push(Guid::TOP);
        let mut client = ground.client();
        let before = client.read(whole()).unwrap();
        let content: Vec<Vec<u8>> = snapshots.iter().map(|&guid| ground.read_snapshot(guid)).collect();
        let report = merge(&ground, states[lower], states[upper]);
        let left = 4 - (upper - lower);
        assert_eq!((report.depth, &report.merged), (left, &states[lower..upper].to_vec()));
        assert_eq!(ground.files().len(), left, "{:?}", ground.files());
        let known = descriptor(&ground);
        assert_eq!(known.image(states[upper]).unwrap().file(), "new.disk.hds");
        assert!(!known.has_obsolete() && known.images().len() == left);
        assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
        for (number, (guid, content)) in snapshots.iter().zip(&content).enumerate() {
            if !(lower..upper).contains(&number) {
                assert!(&ground.read_snapshot(*guid) == content, "{number} of {lower}..{upper}");
            }
        }
        // And it is a disk like any other: written, discarded, snapshotted, merged.
        client.write(7 << 16, &[9; 4096]).unwrap();
        client.discard(Extent::new(9 << 16, 1 << 16).unwrap()).unwrap();
        let next = ground.snapshot().snapshot;
        client.write(0, &[8; 4096]).unwrap();
        ground.delete(next);
        let now = client.read(whole()).unwrap();
        assert_eq!((now.as_slice()[7 << 16], now.as_slice()[9 << 16], now.as_slice()[0]), (9, 0, 8));
        drop(client);
        assert!(ground.close_and_read() == now.as_slice());
    }
}

#[test]
fn a_guest_that_writes_meanwhile_loses_nothing() {
    let ground = Ground::new();
    let stop = AtomicBool::new(false);
    struct StopOnDrop<'a>(&'a AtomicBool);
    impl Drop for StopOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let model = std::thread::scope(|scope| {
        let writer = scope.spawn(|| guest(&ground, &stop, 5));
        let ending = StopOnDrop(&stop);
        let mut random = crate::io::sim::Random::new(11);
        for round in 0..30 {
            assert!(!writer.is_finished());
            let snapshots: Vec<(Guid, Vec<u8>)> = (0..1 + random.index(3))
                .map(|_| ground.snapshot().snapshot)
                .map(|guid| (guid, ground.read_snapshot(guid)))
                .collect();
            let mut states: Vec<Guid> = snapshots.iter().map(|(guid, _)| *guid).collect();
            states.push(Guid::TOP);
            let upper = 1 + random.index(states.len() - 1);
            let options = MergeNewOptions::new(states[0], states[upper], format!("round{round}.disk.hds"));
            merge_new(&ground.disk, &ground.bundle, &Silent, &options).unwrap();
            for (guid, content) in &snapshots[upper.min(snapshots.len())..] {
                assert!(&ground.read_snapshot(*guid) == content, "snapshot {guid} changed");
            }
            for (guid, _) in &snapshots[upper.min(snapshots.len())..] {
                ground.delete(*guid);
            }
        }
        drop(ending);
        writer.join().unwrap()
    });
    assert!(ground.close_and_read() == model);
}

#[test]
fn a_cancelled_one_has_changed_nothing() {
    for upper in [1, 3] {
        let ground = Ground::new();
        let mut states = four(&ground);
        states.push(Guid::TOP);
        let mut client = ground.client();
        let known = descriptor(&ground);
        let before = client.read(whole()).unwrap();
        let options = MergeNewOptions::new(states[0], states[upper], "new.disk.hds");
        let cancelled = merge_new(&ground.disk, &ground.bundle, &Cancelling(AtomicU64::new(4)), &options);
        assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
        assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
        assert_eq!(ground.files().len(), 4, "{:?}", ground.files());
        let now = descriptor(&ground);
        assert!(now.images() == known.images() && now.shots() == known.shots() && !now.has_obsolete());
        // Discards free clusters as before: nothing below the top has changed.
        client.write(60 << 16, &vec![1; 1 << 16]).unwrap();
        let freed = ground.disk.statistics().freed_clusters;
        client.discard(Extent::new(60 << 16, 1 << 16).unwrap()).unwrap();
        assert!(ground.disk.statistics().freed_clusters > freed);
        merge(&ground, states[0], states[upper]);
        let now = client.read(whole()).unwrap();
        drop(client);
        assert!(ground.close_and_read() == now.as_slice());
    }
}

#[test]
fn what_cannot_be_merged_into_a_new_file() {
    let ground = Ground::new();
    let snapshots = four(&ground);
    let files = ground.files();
    let refuse = |lower: Guid, upper: Guid, file: &str| {
        let options = MergeNewOptions::new(lower, upper, file);
        let error = merge_new(&ground.disk, &ground.bundle, &Silent, &options).unwrap_err();
        assert_eq!(ground.files(), files, "{error:?}");
        error.kind()
    };
    let unknown: Guid = "{00000000-0000-0000-0000-000000000077}".parse().unwrap();
    let (lower, top) = (snapshots[0], Guid::TOP);
    assert_eq!(refuse(lower, top, "../new"), ErrorKind::Parameter);
    assert_eq!(refuse(lower, top, "disk.hds"), ErrorKind::Parameter);
    assert_eq!(refuse(lower, top, DESCRIPTOR_NAME), ErrorKind::Parameter);
    assert_eq!(refuse(unknown, top, "new.disk.hds"), ErrorKind::NoSnapshot);
    assert_eq!(refuse(top, lower, "new.disk.hds"), ErrorKind::Parameter);
    assert_eq!(refuse(top, top, "new.disk.hds"), ErrorKind::Parameter);
    // A merge into the parent that was given up: entries of the top are kept for it.
    let options = DeleteOptions::new(snapshots[2]);
    delete(&ground.disk, &ground.bundle, &Cancelling(AtomicU64::new(3)), &options).unwrap_err();
    assert_eq!(refuse(lower, top, "new.disk.hds"), ErrorKind::Busy);
    ground.delete(snapshots[2]);
    merge(&ground, lower, top);
}

/// The descriptor with the new file may be there already, or come back, while the guest goes on in the old top.
#[test]
fn a_commit_in_doubt_loses_no_later_write() {
    for lasting in [false, true] {
        let ground = Ground::new();
        let mut client = ground.client();
        client.write(0, &[1; 4096]).unwrap();
        let guid = ground.snapshot().snapshot;
        client.write(0, &[2; 4096]).unwrap();
        let folder = UnsyncableFolder {
            inner: crate::io::file::DirectoryFolder::open(ground.folder.path()).unwrap(),
            syncs: AtomicU64::new(0),
            // Before it: the announcement, and the new file.
            failing: if lasting { 2..u64::MAX } else { 2..3 },
        };
        let bundle =
            Unsyncable { inner: RunningBundle::open(ground.folder.path(), Caching::Cached).unwrap(), folder };
        let options = MergeNewOptions::new(guid, Guid::TOP, "new.disk.hds");
        let error = merge_new(&ground.disk, &bundle, &Silent, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutcomeUnknown);
        let written = client.write(0, &[3; 4096]);
        assert_eq!(written.is_err(), lasting, "refused if whoever opens the disk next might not see it");
        let now = client.read(whole()).unwrap();
        assert_eq!(now.as_slice()[0], if lasting { 2 } else { 3 });
        drop(client);
        assert!(ground.close_and_read() == now.as_slice());
    }
}

/// A disk with a raw base.
fn raw_ground() -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let options = ops::create::CreateOptions {
        cluster: Sectors(CLUSTER / 512),
        mode: crate::format::Mode::Raw,
        ..ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(CLUSTERS * CLUSTER / 512))
    };
    ops::create(&options).unwrap();
    let disk = open(folder.path());
    let bundle = RunningBundle::open(folder.path(), Caching::Cached).unwrap();
    Ground { folder, disk, bundle }
}

/// What only the raw base held is held by the new image: read, and hidden when it is discarded above.
#[test]
fn a_raw_base_and_a_frozen_state_become_an_image_that_the_chain_knows() {
    let ground = raw_ground();
    let mut client = ground.client();
    client.write(5 << 16, &vec![1; 3 << 16]).unwrap();
    let lower = ground.snapshot().snapshot;
    client.write(10 << 16, &[2; 4096]).unwrap();
    let upper = ground.snapshot().snapshot;
    client.write(6 << 16, &vec![3; 1 << 16]).unwrap();
    let before = client.read(whole()).unwrap();
    merge(&ground, lower, upper);
    assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
    client.discard(Extent::new(6 << 16, 1 << 16).unwrap()).unwrap();
    client.write(7 << 16, &[4; 512]).unwrap();
    let now = client.read(whole()).unwrap();
    assert_eq!(
        (now.as_slice()[5 << 16], now.as_slice()[6 << 16], now.as_slice()[(7 << 16) + 512]),
        (1, 0, 1)
    );
    drop(client);
    assert!(ground.close_and_read() == now.as_slice());
}

#[test]
fn a_raw_base_becomes_an_image_and_another_branch_is_merged_beside_the_running_disk() {
    let ground = raw_ground();
    let mut client = ground.client();
    client.write(5 << 16, &[1; 4096]).unwrap();
    let guid = ground.snapshot().snapshot;
    client.write(7 << 16, &[2; 4096]).unwrap();
    let before = client.read(whole()).unwrap();
    let report = merge(&ground, guid, Guid::TOP);
    assert!(report.merged_bytes <= 4 * CLUSTER, "holes of the raw base are not copied: {report:?}");
    assert!(!descriptor(&ground).is_raw());
    assert!(client.read(whole()).unwrap().as_slice() == before.as_slice());
    // Two branches: the one that runs, and one of two states beside it.
    let fork = ground.snapshot().snapshot;
    client.write(8 << 16, &[3; 4096]).unwrap();
    let beside = ground.snapshot().snapshot;
    client.write(9 << 16, &[4; 4096]).unwrap();
    drop(client);
    ground.disk.close().unwrap();
    let Ground { folder, disk, bundle } = ground;
    drop(disk);
    let kept: Guid = "{00000000-0000-0000-0000-000000000055}".parse().unwrap();
    let switch = ops::SwitchOptions { snapshot: fork, keep: Some(kept) };
    ops::switch(folder.path(), &switch, Duration::from_secs(5), &Silent).unwrap();
    let disk = open(folder.path());
    let ground = Ground { folder, disk, bundle };
    let content = ground.read_snapshot(kept);
    let options = MergeNewOptions::new(beside, kept, "other.disk.hds");
    let report = merge_new(&ground.disk, &ground.bundle, &Silent, &options).unwrap();
    assert_eq!(report.merged, [beside]);
    assert_eq!(descriptor(&ground).image(kept).unwrap().file(), "other.disk.hds");
    assert!(ground.read_snapshot(kept) == content);
    assert_eq!(ground.close_and_read()[8 << 16], 0);
}

#[test]
fn who_reads_a_state_keeps_it_though_its_file_has_no_name_any_more() {
    for upper in [1, 3] {
        let ground = Ground::new();
        let mut states = four(&ground);
        states.push(Guid::TOP);
        let options = ops::OpenOptions {
            snapshot: Some(states[1]),
            caching: Caching::Cached,
            ..ops::OpenOptions::new(ground.folder.path(), Access::ReadOnly)
        };
        let reader = ops::open(&options).unwrap().chain;
        let content = crate::format::testing::guest_content(&reader);
        merge(&ground, states[0], states[upper]);
        assert!(crate::format::testing::guest_content(&reader) == content, "merged up to {upper}");
    }
}
