//! What else happens to a disk while it is copied, what its states are like, and what a receiver that was killed has left:
//! the copy is refused or right.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pcopy::source::DiskSource;
use pcopy::source_chain::BundleSnapshots;
use pcopy::stats::PassKind;
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::{Event, NothingToQuiesce, Silent};
use ploop_core::ErrorKind;
use ploop_core::format::{DESCRIPTOR_NAME, Guid};
use ploop_core::io::Access;
use ploop_core::io::file::Caching;
use ploop_core::ops;
use ploop_core::ops::live::{self, NoWriters, RunningBundle};
use ploop_core::ops::snapshot_list;
use ploop_core::units::Sectors;
use support::*;

const STALL: Duration = Duration::from_secs(60);
const WAIT: Duration = Duration::from_secs(60);
const LEN: u64 = 4 << 20;

fn snapshot_closed(folder: &Path, guid: Guid) {
    let options = ops::SnapshotOptions { snapshot: Some(guid), temporary: false };
    ops::snapshot(folder, &options, WAIT, &ops::Silent).unwrap();
}

fn write_closed(folder: &Path, seed: u64, from: u64, end: u64) {
    let served = Served::open(folder, None, Access::ReadWrite);
    let mut random = Random(seed);
    for _ in 0..10 {
        let count = 512 * (1 + random.below(200));
        let at = from + 512 * random.below((end - from - count) / 512);
        served.write(at, &vec![random.below(250) as u8; count as usize]);
    }
    served.close();
}

/// A closed disk on three snapshots, one on the other, and their names.
fn disk_on_three(folder: &Path, seed: u64) -> [Guid; 3] {
    new_disk(folder, LEN, seed, |options| options.cluster = Sectors(128)).close();
    let guids = [1, 2, 3].map(|number| Guid::from_bytes([number; 16]));
    for (number, guid) in (1..).zip(guids) {
        snapshot_closed(folder, guid);
        write_closed(folder, seed ^ number << 20, 0, LEN);
    }
    guids
}

/// What is done to a running disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Deed {
    Snapshot,
    /// Deletes the snapshot with that number.
    Delete(usize),
    /// Merges the first two, or the last and the current state, into a new file.
    Merge(bool),
    Compact,
}

fn perform(deed: Deed, served: &Served, folder: &Path, guids: [Guid; 3]) {
    let bundle = RunningBundle::open(folder, Caching::Direct).unwrap();
    match deed {
        Deed::Snapshot => {
            live::snapshot(&served.disk, &bundle, &mut NoWriters, &live::SnapshotOptions::default()).unwrap();
        }
        Deed::Delete(number) => {
            let options = live::DeleteOptions::new(guids[number]);
            live::delete(&served.disk, &bundle, &ops::Silent, &options).unwrap();
        }
        Deed::Merge(current) => {
            let (lower, upper) = match current {
                true => (
                    guids[2],
                    snapshot_list(folder).unwrap().states.iter().find(|one| one.current).unwrap().uuid,
                ),
                false => (guids[0], guids[1]),
            };
            let options = live::MergeNewOptions::new(lower, upper, "merged.hds".to_owned());
            live::merge_new(&served.disk, &bundle, &ops::Silent, &options).unwrap();
        }
        Deed::Compact => {
            ops::compact_running(
                &served.disk,
                &ops::CompactOptions { path: folder.to_path_buf(), free_bytes: None },
                &ops::Silent,
            )
            .unwrap();
        }
    }
}

/// A copy of the content, while the deltas under it change between two passes and while one is read, and the guest writes.
#[test]
fn a_copy_of_the_content_is_right_whatever_happens_to_the_deltas() {
    let deeds = [
        Deed::Snapshot,
        Deed::Delete(0),
        Deed::Delete(1),
        Deed::Delete(2),
        Deed::Merge(false),
        Deed::Merge(true),
        Deed::Compact,
    ];
    for (number, deed) in deeds.into_iter().enumerate() {
        for before_first in [true, false] {
            let what = format!("{deed:?}, before the first pass {before_first}");
            let root = referee::folder();
            let from = root.path().join("from");
            let guids = disk_on_three(&from, 30 + number as u64);
            let served = Served::open(&from, None, Access::ReadWrite);
            // Something to compact.
            let half = ploop_core::Extent::between(0, LEN / 4);
            served.client.lock().unwrap().discard(half).unwrap();
            let to = root.path().join("to");
            std::fs::create_dir(&to).unwrap();
            let mut source = DiskSource::new(&served.disk).unwrap();
            let mut destination =
                ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
            let writer = Writer::start(&served, LEN, number as u64, Duration::from_micros(500));
            let mut quiesce = TestQuiesce::new(&served, Some(&writer));
            let running = served.clone();
            let observer = |event: &Event| {
                let due = match event {
                    Event::PassStarted { pass: 1, .. } => before_first,
                    Event::PassEnded(pass) => pass.kind == PassKind::First && !before_first,
                    _ => false,
                };
                if due {
                    perform(deed, &running, &from, guids);
                    for at in (0..LEN).step_by(96 << 10) {
                        running.write(at, &[0x5a; 1024]);
                    }
                }
            };
            let both = copy_observed(
                &mut source,
                &mut quiesce,
                &mut destination,
                ends(before_first, false),
                &send_options(STALL),
                &observer,
            );
            both.sent.unwrap_or_else(|error| panic!("{what}: {error}"));
            both.received.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(writer.is_alive(), "{what}");
            drop((writer, source));
            assert!(content_of(&to, None) == quiesce.snapshot.take().unwrap(), "{what}");
            drop((quiesce, running));
            served.close();
        }
    }
}

/// A copy of all deltas, while one of them is merged by somebody who does not ask: it ends with 17, the disk goes on.
#[test]
fn a_copy_of_the_deltas_notices_that_they_changed() {
    for (number, deed) in [Deed::Snapshot, Deed::Merge(false), Deed::Merge(true)].into_iter().enumerate() {
        let root = referee::folder();
        let from = root.path().join("from");
        let guids = disk_on_three(&from, 50 + number as u64);
        let served = Served::open(&from, None, Access::ReadWrite);
        let to = root.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let mut snapshots = BundleSnapshots::open(&from.join(DESCRIPTOR_NAME), &served.disk.chain()).unwrap();
        let mut source = DiskSource::delta(&served.disk).unwrap();
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        let writer = Writer::start(&served, LEN, number as u64, Duration::from_micros(500));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let running = served.clone();
        let done = std::sync::Mutex::new(None);
        let observer = |event: &Event| {
            if matches!(event, Event::PassEnded(pass) if pass.kind == PassKind::First) {
                let bundle = RunningBundle::open(&from, Caching::Direct).unwrap();
                *done.lock().unwrap() = Some(match deed {
                    Deed::Snapshot => {
                        let options = live::SnapshotOptions::default();
                        live::snapshot(&running.disk, &bundle, &mut NoWriters, &options).map(drop)
                    }
                    _ => {
                        let states = snapshot_list(&from).unwrap().states;
                        let top = states.iter().find(|one| one.current).unwrap().uuid;
                        let (lower, upper) =
                            if deed == Deed::Merge(true) { (guids[2], top) } else { (guids[0], guids[1]) };
                        let options = live::MergeNewOptions::new(lower, upper, "merged.hds".to_owned());
                        live::merge_new(&running.disk, &bundle, &ops::Silent, &options).map(drop)
                    }
                });
            }
        };
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut quiesce,
            &mut destination,
            ends(true, false),
            &send_options(STALL),
            &observer,
        );
        let done = done.into_inner().unwrap().unwrap();
        // Either of the two is refused.
        match done {
            Ok(()) => {
                assert_eq!(both.sent.unwrap_err().kind(), ErrorKind::Busy, "{deed:?}");
                assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
            }
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Busy | ErrorKind::InUse), "{deed:?}: {error}");
                both.sent.unwrap();
            }
        }
        assert!(writer.is_alive(), "{deed:?}");
        assert_eq!(quiesce.freezes, quiesce.thaws);
        drop((writer, source, snapshots, quiesce, running));
        served.close();
    }
}

fn copy_closed(from: &Path, to: &Path, chain: bool) -> Option<ErrorKind> {
    let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
    let (quiesce, options) = (&mut NothingToQuiesce, send_options(STALL));
    let both = if chain {
        let (mut snapshots, mut source) = BundleSnapshots::open_closed(from).unwrap();
        let pair: (&mut dyn pcopy::Snapshots, _) = (&mut snapshots, &mut source);
        copy_chain(pair, quiesce, &mut destination, ends(true, false), &options, &Silent)
    } else {
        let mut source = DiskSource::open_closed(from, None).unwrap();
        copy(&mut source, quiesce, &mut destination, ends(true, false), &options)
    };
    let (sent, received) = (both.sent.err(), both.received.err());
    assert_eq!(sent.map(|error| error.kind()), received.as_ref().map(|error| error.kind()));
    received.map(|error| error.kind())
}

fn contents(folder: &Path) -> Vec<(Guid, bool, Vec<u8>)> {
    let states = snapshot_list(folder).unwrap().states;
    states.into_iter().map(|one| (one.uuid, one.current, content_of_state(folder, one.uuid))).collect()
}

fn has_qemu_img() -> bool {
    Command::new("qemu-img").arg("--version").output().is_ok()
}

/// Snapshots that are smaller and larger than the current state: each has its own size at the other end, too.
#[test]
fn every_state_keeps_its_own_size() {
    if !has_qemu_img() {
        ploop_testing::skip(
            ploop_testing::Need::Program("qemu-img"),
            "without qemu-img the images are judged by our own check alone",
        );
    }
    for (seed, sizes) in [(1, [6, 10, 10]), (2, [10, 6, 3]), (3, [6, 3, 12]), (4, [3, 12, 6])] {
        let root = referee::folder();
        let from = root.path().join("from");
        new_disk(&from, LEN, seed, |options| options.cluster = Sectors(128)).close();
        for (number, mib) in (1_u8..).zip(sizes) {
            let len = mib << 20;
            snapshot_closed(&from, Guid::from_bytes([number; 16]));
            let shrink = ops::Shrink::Discard;
            let options = ops::ResizeOptions { shrink, ..ops::ResizeOptions::new(&from, Sectors(len / 512)) };
            ops::resize(&options, &ops::Silent).unwrap();
            write_closed(&from, seed + u64::from(number), len / 2, len);
        }
        let expected = contents(&from);
        let lengths: Vec<u64> = expected.iter().map(|one| one.2.len() as u64 >> 20).collect();
        for mib in sizes {
            assert!(lengths.contains(&mib), "{lengths:?}");
        }
        for running in [false, true] {
            let to = root.path().join(format!("to-{running}"));
            std::fs::create_dir(&to).unwrap();
            if running {
                let served = Served::open(&from, None, Access::ReadWrite);
                let chain = served.disk.chain();
                let mut snapshots = BundleSnapshots::open(&from.join(DESCRIPTOR_NAME), &chain).unwrap();
                drop(chain);
                let mut source = DiskSource::delta(&served.disk).unwrap();
                let mut quiesce = TestQuiesce::new(&served, None);
                let mut destination =
                    ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
                let writer = served.clone();
                let (end, at_end) = (served.disk.size_bytes(), [7; 512]);
                let observer = |event: &Event| {
                    if matches!(event, Event::PassEnded(pass) if pass.kind == PassKind::First) {
                        writer.write(end - 512, &at_end);
                    }
                };
                let both = copy_chain(
                    (&mut snapshots, &mut source),
                    &mut quiesce,
                    &mut destination,
                    ends(true, false),
                    &send_options(STALL),
                    &observer,
                );
                both.sent.unwrap();
                both.received.unwrap();
                drop((source, snapshots, quiesce, writer));
                served.close();
                let now = contents(&from);
                assert!(contents(&to) == now, "sizes {sizes:?}, running");
            } else {
                assert_eq!(copy_closed(&from, &to, true), None);
                assert!(contents(&to) == expected, "sizes {sizes:?}");
            }
            if has_qemu_img() {
                for image in images(&to) {
                    let check =
                        Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(&image).output();
                    let check = check.unwrap();
                    assert!(check.status.success(), "{}: {check:?}", image.display());
                }
            }
            for (guid, _, content) in contents(&to) {
                let file = root.path().join("exported");
                let options = ops::ExportOptions { snapshot: Some(guid), ..ops::ExportOptions::new(&to) };
                ops::export(&options, &file, &ops::Silent).unwrap();
                assert!(std::fs::read(&file).unwrap() == content, "sizes {sizes:?}: export of {guid}");
                std::fs::remove_file(&file).unwrap();
            }
        }
        let flat = root.path().join("flat");
        std::fs::create_dir(&flat).unwrap();
        assert_eq!(copy_closed(&from, &flat, false), None);
        let current = contents(&from).into_iter().find(|one| one.1).unwrap();
        assert!(content_of(&flat, None) == current.2);
    }
}

fn images(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("copy.hds")).collect()
}

/// A receiver that was killed when images had their names and the descriptor had not: the same command again just works.
#[test]
fn a_receiver_killed_while_it_puts_the_copy_in_place_is_no_obstacle() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_on_three(&from, 70);
    let id = "0123456789abcdef0123456789abcdef";
    for (number, chain) in [(0, false), (1, true)] {
        for undone in 0..=4 * number {
            let to = root.path().join(format!("to-{number}-{undone}"));
            std::fs::create_dir(&to).unwrap();
            assert_eq!(copy_closed(&from, &to, chain), None);
            let expected = contents(&to);
            // As it was just before the last of the renames that were not made.
            let plan = to.join(format!("copy.hds.incoming-{id}-plan"));
            std::fs::rename(to.join(DESCRIPTOR_NAME), &plan).unwrap();
            for (index, image) in
                images(&to).into_iter().filter(|image| *image != plan).take(undone).enumerate()
            {
                std::fs::rename(image, to.join(format!("copy.hds.incoming-{id}-{index}"))).unwrap();
            }
            assert_eq!(copy_closed(&from, &to, chain), None, "chain {chain}, {undone} names missing");
            let files = if chain { 5 } else { 2 };
            assert_eq!(std::fs::read_dir(&to).unwrap().count(), files, "left-overs");
            if chain {
                assert!(contents(&to) == expected);
            } else {
                assert!(contents(&to)[0].2 == expected[0].2);
            }
            // And now the name is taken.
            assert_eq!(copy_closed(&from, &to, chain), Some(ErrorKind::Create));
        }
    }
}

/// A closed disk whose deltas are copied cannot be opened for writing; once the copy has ended it can.
#[test]
fn a_closed_disk_is_not_written_to_while_its_deltas_are_copied() {
    let root = referee::folder();
    let from = root.path().join("from");
    let guids = disk_on_three(&from, 80);
    let both = BundleSnapshots::open_closed(&from).unwrap();
    let write = ops::OpenOptions::new(&from, Access::ReadWrite);
    assert_eq!(ops::open(&write).err().unwrap().kind(), ErrorKind::InUse);
    let merge = ops::DeleteOptions { snapshot: guids[1] };
    let refused = ops::delete(&from, &merge, Duration::from_millis(100), &ops::Silent).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse);
    // Others may read.
    drop(ops::open(&ops::OpenOptions::new(&from, Access::ReadOnly)).unwrap());
    drop(both);
    write_closed(&from, 1, 0, LEN);
}

/// A small file system, unmounted when the test ends.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, bytes: u64) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let option = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "none"]).arg(&at).output();
        mounted.is_ok_and(|done| done.status.success()).then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The host of the receiver is full in the middle of the chain: both sides say so, nothing is left, and the writers go on.
#[test]
fn a_destination_without_space_ends_the_copy_of_deltas_cleanly() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_on_three(&from, 90);
    let served = Served::open(&from, None, Access::ReadWrite);
    let (mut refused, mut whole) = (0, 0);
    for kib in [700, 1500, 2500, 3500, 5000, 40_000] {
        let Some(small) = Small::mount(root.path().join(format!("small-{kib}")), kib << 10) else {
            ploop_testing::skip(ploop_testing::Need::Other, "no file system of a given size can be mounted");
            break;
        };
        let chain = served.disk.chain();
        let mut snapshots = BundleSnapshots::open(&from.join(DESCRIPTOR_NAME), &chain).unwrap();
        drop(chain);
        let mut source = DiskSource::delta(&served.disk).unwrap();
        let writer = Writer::start(&served, LEN, kib, Duration::from_micros(500));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let to = small.0.join("copy.hds");
        let mut destination = ImageDestination::new(&to, ImageOptions::default()).unwrap();
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut quiesce,
            &mut destination,
            ends(true, false),
            &send_options(STALL),
            &Silent,
        );
        assert!(writer.is_alive());
        assert_eq!(quiesce.freezes, quiesce.thaws);
        match (both.sent, both.received) {
            (Ok(_), Ok(_)) => whole += 1,
            (Err(sent), Err(received)) => {
                refused += 1;
                assert_eq!(sent.kind(), received.kind(), "{sent}; {received}");
                assert!(matches!(received.kind(), ErrorKind::Allocate | ErrorKind::Write), "{received}");
                assert_eq!(std::fs::read_dir(&small.0).unwrap().count(), 0, "{kib} KiB");
            }
            (sent, received) => panic!("{sent:?} {received:?}"),
        }
        drop((writer, source, snapshots, quiesce));
    }
    assert!(refused == 0 && whole == 0 || refused > 2 && whole > 0, "{refused} {whole}");
    served.close();
}
