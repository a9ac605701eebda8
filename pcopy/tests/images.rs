//! Copies of real image files into real image files: equality as disks, formats and cluster sizes, what is left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::path::Path;
use std::time::Duration;

use pcopy::memory::MemoryDisk;
use pcopy::source::DiskSource;
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::wire::ImageKind;
use pcopy::{NothingToQuiesce, Source};
use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, InUse, Mode, Probe, Version, probe};
use ploop_core::io::Access;
use ploop_core::io::file::{DirectoryFolder, FileStorage, OpenOptions as FileOptions};
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::units::Sectors;
use ploop_core::{ErrorKind, Extent};
use support::patience::PATIENCE;
use support::*;

const LEN: u64 = 24 << 20;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_disk_in_use_becomes_an_equal_image_with_a_descriptor() {
    for (two_way, mode, cluster, seed) in [
        (true, Mode::Expanded, 2048, 1),
        (false, Mode::Expanded, 64, 2),
        (true, Mode::Raw, 2048, 3),
        (false, Mode::Preallocated, 128, 4),
    ] {
        let root = referee::folder();
        let served = new_disk(&root.path().join("from"), LEN, seed, |options| {
            (options.cluster, options.mode) = (Sectors(cluster), mode);
        });
        let to = root.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let mut source = DiskSource::new(&served.disk).unwrap();
        let writer = Writer::start(&served, LEN, seed, Duration::from_micros(700));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        let both =
            copy(&mut source, &mut quiesce, &mut destination, ends(two_way, false), &send_options(PATIENCE));
        let received = both.received.unwrap();
        both.sent.unwrap();
        assert!(writer.is_alive());
        assert_eq!((quiesce.freezes, quiesce.thaws), (1, 1));
        assert_eq!(received.verified_bytes, received.data_bytes + received.zero_bytes);
        assert_eq!(names(&to), [DESCRIPTOR_NAME, "copy.hds"]);
        assert!(content_of(&to, None) == quiesce.snapshot.take().unwrap(), "{mode:?} {cluster}");
        if mode != Mode::Raw {
            let storage =
                FileStorage::open(to.join("copy.hds"), &FileOptions::new(Access::ReadOnly)).unwrap();
            let Probe::Image(header) = probe(&storage).unwrap() else { panic!("no image") };
            assert_eq!(header.in_use(), InUse::Closed);
            assert_eq!(u64::from(header.geometry().cluster_sectors()), cluster);
        }
        let mode_bits = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(to.join("copy.hds")).unwrap().permissions(),
        );
        assert_eq!(mode_bits & 0o777, 0o600);
        drop((writer, quiesce, source));
        served.close();
    }
}

#[test]
fn format_version_and_cluster_can_be_chosen() {
    let disk = MemoryDisk::new(content(5, 8 << 20));
    for (image, version, cluster) in [
        (ImageKind::Expanded, 1, 256),
        (ImageKind::Raw, 2, 2048),
        (ImageKind::Preallocated, 2, 64),
        (ImageKind::Expanded, 2, 4096),
    ] {
        let folder = referee::folder();
        let options =
            ImageOptions { image: Some(image), version: Some(version), cluster_sectors: Some(cluster) };
        let mut destination = ImageDestination::new(&folder.path().join("a.hdd"), options).unwrap();
        let mut source = disk.clone();
        let both = copy(
            &mut source,
            &mut NothingToQuiesce,
            &mut destination,
            ends(true, true),
            &send_options(PATIENCE),
        );
        both.received.unwrap();
        both.sent.unwrap();
        let descriptor = DiskDescriptor::load(&DirectoryFolder::open(folder.path()).unwrap(), None).unwrap();
        assert_eq!(descriptor.is_raw(), image == ImageKind::Raw);
        assert_eq!(descriptor.cluster_sectors(), Sectors(u64::from(cluster)));
        assert!(content_of(folder.path(), None) == disk.content(), "{image:?}");
        if image == ImageKind::Raw {
            assert!(std::fs::read(folder.path().join("a.hdd")).unwrap() == disk.content());
        } else {
            let path = folder.path().join("a.hdd");
            let storage = FileStorage::open(path, &FileOptions::new(Access::ReadOnly)).unwrap();
            let Probe::Image(header) = probe(&storage).unwrap() else { panic!("no image") };
            let expected = if version == 1 { Version::V1 } else { Version::V2 };
            assert_eq!(header.geometry().version(), expected);
        }
    }
}

#[test]
fn a_sparse_disk_arrives_sparse() {
    use std::os::unix::fs::MetadataExt;
    let root = referee::folder();
    let from = root.path().join("from");
    std::fs::create_dir(&from).unwrap();
    create(&CreateOptions::new(&from, "root.hds", Sectors((1 << 40) / 512))).unwrap();
    let served = Served::open(&from, None, Access::ReadWrite);
    served.write(5 << 30, &[1; 4096]);
    served.write((1 << 40) - 4096, &[2; 4096]);
    let mut source = DiskSource::new(&served.disk).unwrap();
    let path = root.path().join("copy.hds");
    let mut destination = ImageDestination::new(&path, ImageOptions::default()).unwrap();
    let both = copy(
        &mut source,
        &mut NothingToQuiesce,
        &mut destination,
        ends(true, false),
        &send_options(PATIENCE),
    );
    both.received.unwrap();
    assert!(both.sent.unwrap().data_bytes < 4 << 20);
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 16 << 20);
    drop(source);
    served.close();
}

#[test]
fn what_is_in_the_way_is_refused_before_anything_is_written() {
    let folder = referee::folder();
    let path = folder.path().join("a.hdd");
    let receive = |path: &Path| {
        let mut source = MemoryDisk::new(content(6, 1 << 20));
        let mut destination =
            ImageDestination::new(path, ImageOptions::default()).map_err(|error| error.kind())?;
        let both = copy(
            &mut source,
            &mut NothingToQuiesce,
            &mut destination,
            ends(true, false),
            &send_options(PATIENCE),
        );
        let kinds =
            (both.sent.err().map(|error| error.kind()), both.received.err().map(|error| error.kind()));
        assert_eq!(kinds.0, kinds.1);
        kinds.0.map_or(Ok(()), Err)
    };
    std::fs::write(&path, b"precious").unwrap();
    assert_eq!(receive(&path), Err(ErrorKind::Create));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();

    std::fs::write(folder.path().join(DESCRIPTOR_NAME), b"<no descriptor").unwrap();
    assert_eq!(receive(&path), Err(ErrorKind::Create));
    std::fs::remove_file(folder.path().join(DESCRIPTOR_NAME)).unwrap();

    let other = DiskDescriptor::new_single("other.hds", Mode::Expanded, Sectors(2048), Sectors(64)).unwrap();
    other.store_new(&DirectoryFolder::open(folder.path()).unwrap()).unwrap();
    assert_eq!(receive(&path), Err(ErrorKind::Create));
    std::fs::remove_file(folder.path().join(DESCRIPTOR_NAME)).unwrap();

    // One that describes exactly what will be there stays as it is.
    let same = DiskDescriptor::new_single("a.hdd", Mode::Expanded, Sectors(2048), Sectors(64)).unwrap();
    same.store_new(&DirectoryFolder::open(folder.path()).unwrap()).unwrap();
    let before = std::fs::read(folder.path().join(DESCRIPTOR_NAME)).unwrap();
    assert_eq!(receive(&path), Ok(()));
    assert_eq!(std::fs::read(folder.path().join(DESCRIPTOR_NAME)).unwrap(), before);

    assert_eq!(receive(&folder.path().join("missing/a.hdd")), Err(ErrorKind::Open));
    assert_eq!(receive(&folder.path().join(DESCRIPTOR_NAME)), Err(ErrorKind::Parameter));
}

#[test]
fn a_failed_copy_leaves_nothing_and_left_overs_of_a_killed_one_are_removed() {
    let folder = referee::folder();
    let path = folder.path().join("a.hdd");
    let left_over = folder.path().join(format!("a.hdd.incoming-{}", "0a".repeat(16)));
    let foreign = folder.path().join("a.hdd.incoming-notes");
    std::fs::write(&left_over, vec![1; 5000]).unwrap();
    std::fs::write(&foreign, b"mine").unwrap();
    for attempt in 0..2 {
        let mut source = MemoryDisk::new(content(7, 4 << 20));
        let mut quiesce = TestQuiesce::new(&source, None);
        quiesce.fail_hook = attempt == 0;
        let mut destination = ImageDestination::new(&path, ImageOptions::default()).unwrap();
        let both =
            copy(&mut source, &mut quiesce, &mut destination, ends(true, false), &send_options(PATIENCE));
        assert_eq!(both.sent.is_ok(), attempt == 1);
        assert_eq!(both.received.is_ok(), attempt == 1);
        let expected: &[&str] = match attempt {
            0 => &["a.hdd.incoming-notes"],
            _ => &[DESCRIPTOR_NAME, "a.hdd", "a.hdd.incoming-notes"],
        };
        assert_eq!(names(folder.path()), expected);
    }
}

#[test]
fn a_copy_that_cannot_fit_is_refused_at_once() {
    struct Huge(MemoryDisk);
    impl Source for Huge {
        fn size_bytes(&self) -> u64 {
            1 << 44
        }
        fn description(&self) -> pcopy::source::SourceDescription {
            pcopy::source::SourceDescription {
                data_bytes: 1 << 44,
                cluster_sectors: 2048,
                ..self.0.description()
            }
        }
        fn start_tracking(&mut self) -> ploop_core::Result<()> {
            panic!("the receiver should have refused")
        }
        fn stop_tracking(&mut self) {}
        fn take_dirty(&mut self, _: u64, _: u64) -> Option<Box<dyn pcopy::source::Loan>> {
            None
        }
        fn dirty_bytes(&self) -> u64 {
            0
        }
        fn is_clean(&self) -> bool {
            true
        }
        fn reader(&self) -> ploop_core::Result<Box<dyn pcopy::source::Reader>> {
            self.0.reader()
        }
        fn close_gate(&mut self, timeout: Duration) -> ploop_core::Result<Box<dyn pcopy::source::Gate>> {
            self.0.close_gate(timeout)
        }
    }
    let folder = referee::folder();
    let mut source = Huge(MemoryDisk::new(vec![0; 512]));
    let mut destination = ImageDestination::new(&folder.path().join("a"), ImageOptions::default()).unwrap();
    let both = copy(
        &mut source,
        &mut NothingToQuiesce,
        &mut destination,
        ends(true, false),
        &send_options(PATIENCE),
    );
    assert_eq!(both.sent.unwrap_err().kind(), ErrorKind::Allocate);
    assert_eq!(both.received.unwrap_err().kind(), ErrorKind::Allocate);
    assert!(names(folder.path()).is_empty());
}

/// The original's stream, as its own receiver accepts it.
#[test]
fn the_originals_stream_becomes_the_image_it_was_made_from() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let stream = shared.join("family-a-v2-32k.stream.zst");
    if !stream.exists() {
        ploop_testing::skip(ploop_testing::Need::Other, format!("{} is not here", stream.display()));
        return;
    }
    let unpack = |arguments: &[&str]| {
        let output = std::process::Command::new(arguments[0]).args(&arguments[1..]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let stream = unpack(&["zstd", "-dcq", stream.to_str().unwrap()]);
    let root = referee::folder();
    let archive = shared.join("v2-32k.tar.zst");
    let tar = unpack(&["zstd", "-dcq", archive.to_str().unwrap()]);
    std::fs::write(root.path().join("a.tar"), tar).unwrap();
    let tar = root.path().join("a.tar");
    unpack(&["tar", "-xf", tar.to_str().unwrap(), "-C", root.path().to_str().unwrap()]);
    let original = std::fs::read(root.path().join("v2-32k/root.hds")).unwrap();

    let receive = |bytes: &[u8], name: &str| {
        let path = root.path().join(name);
        let (write, read) = pair(true);
        let bytes = bytes.to_vec();
        let writing = std::thread::spawn(move || {
            use std::io::Write;
            // The receiver may leave in the middle.
            let _ = std::fs::File::from(write).write_all(&bytes);
        });
        let mut destination = ImageDestination::new(&path, ImageOptions::default()).unwrap();
        let link = pcopy::Link { input: Some(read), output: None };
        let result = pcopy::receive(link, &mut destination, &Default::default(), &pcopy::Silent);
        writing.join().unwrap();
        (result, path)
    };
    let (report, path) = receive(&stream, "whole.hds");
    assert!(report.unwrap().legacy);
    assert!(std::fs::read(path).unwrap() == original);

    let mut random = Random(9);
    let mut cuts: Vec<usize> =
        (0..30).map(|_| 4 + usize::try_from(random.below(stream.len() as u64 - 4)).unwrap()).collect();
    cuts.extend([4, 15, 16, 17, stream.len() - 17, stream.len() - 16, stream.len() - 1]);
    for cut in cuts {
        let (report, path) = receive(&stream[..cut], "cut.hds");
        assert_eq!(report.unwrap_err().kind(), ErrorKind::Read, "cut at {cut}");
        assert!(!path.exists());
    }
    // Whole packets, but no whole image: the header comes last.
    let mut short = stream[..16 + 32768].to_vec();
    let mut end = [0; 16];
    end[..4].copy_from_slice(&stream[..4]);
    short.extend(end);
    let (report, path) = receive(&short, "short.hds");
    assert_eq!(report.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(!path.exists());
    let left: Vec<_> = names(root.path()).into_iter().filter(|name| name.contains("incoming")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// An fstrim during a copy: what it discards is no data to send, so no time of a freeze is predicted for it.
#[test]
fn what_is_discarded_meanwhile_is_not_data_to_send() {
    let root = referee::folder();
    let folder = root.path().join("disk");
    let served = new_disk(&folder, LEN, 5, |_| {});
    let mut source = DiskSource::new(&served.disk).unwrap();
    source.start_tracking().unwrap();
    assert_eq!((source.dirty_bytes(), source.dirty_data_bytes()), (0, 0));
    // All but the last clusters, one of which is written again.
    let kept = LEN - (4 << 20);
    served.client.lock().unwrap().discard(Extent::between(0, kept)).unwrap();
    let dirty = source.dirty_bytes();
    assert!(dirty >= kept, "{dirty}");
    assert_eq!(source.dirty_data_bytes(), 0);
    served.write(kept + 8192, &[1; 4096]);
    served.write(4096, &[1; 8192]);
    assert_eq!(source.dirty_bytes(), dirty + 4096);
    // The cluster that has a place again counts as far as it is dirty: whole, as all of it was discarded.
    let data = source.dirty_data_bytes();
    assert!((3 * 4096..=(2 << 20)).contains(&data), "{data}");
    source.stop_tracking();
    drop(source);
    served.close();
}
