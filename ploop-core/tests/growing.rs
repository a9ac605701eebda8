//! Growing as others see it: files of the original, the verdict of `qemu-img`, and a running disk that grows under load.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: it stops at the first surprise, and its numbers are small"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ploop_core::Extent;
use ploop_core::device::{Client, Disk, DiskOptions, GrowOptions};
use ploop_core::error::ErrorKind;
use ploop_core::format::{
    Chain, CreateOptions, DiskDescriptor, Geometry, InUse, Mapping, Mode, Probe, Version, create_image,
    examine, probe,
};
use ploop_core::io::file::{Caching, DirectoryFolder, FileStorage, OpenOptions};
use ploop_core::io::sim::Random;
use ploop_core::io::{Access, QueueChoice, Storage, StorageExt, best_io_queue};
use ploop_core::ops::open::{self, OpenOptions as OpenDisk};
use ploop_core::ops::progress::Silent;
use ploop_core::ops::resize::{ResizeOptions, Shrink, resize};
use ploop_core::ops::{MergeOptions, SnapshotOptions, merge, snapshot};
use ploop_core::units::{GuestOffset, Sectors};

/// Whether a program is installed; says so if not.
fn has(tool: &str) -> bool {
    let found =
        Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
    }
    found
}

fn image_of(bundle: &Path) -> PathBuf {
    bundle.join("root.hds")
}

/// An empty bundle with clusters of `cluster` sectors.
fn bundle(folder: &Path, version: Version, cluster: u64, clusters: u64, mode: Mode) {
    let sizes = Geometry::new(version, Sectors(cluster), Sectors(cluster * clusters)).unwrap();
    let storage = FileStorage::create_exclusive(image_of(folder), Caching::Cached).unwrap();
    if mode == Mode::Raw {
        storage.set_len(sizes.disk_bytes()).unwrap();
    } else {
        create_image(
            &storage,
            &CreateOptions { geometry: sizes.clone(), preallocated: mode == Mode::Preallocated },
        )
        .unwrap();
    }
    DiskDescriptor::new_single("root.hds", mode, sizes.disk_sectors(), Sectors(cluster))
        .unwrap()
        .store(&DirectoryFolder::open(folder).unwrap())
        .unwrap();
}

fn chain(folder: &Path, access: Access) -> Arc<Chain> {
    open::open(&OpenDisk::new(folder, access)).unwrap().chain
}

fn read(chain: &Chain, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut done = 0u64;
    while done < len as u64 {
        let mapping = chain.map(GuestOffset(at + done), len as u64 - done);
        if let Mapping::Data { delta, offset, len } = mapping {
            let place = done as usize..(done + len) as usize;
            chain.storage(delta).read_exact_at(offset.0, &mut bytes[place]).unwrap();
        }
        done += mapping.len();
    }
    bytes
}

/// Writes through a served disk, and closes it.
fn fill(folder: &Path, writes: &[(u64, u8, usize)]) {
    let disk = Disk::open(chain(folder, Access::ReadWrite), DiskOptions::default()).unwrap();
    let mut client = Client::new(&disk, best_io_queue(16).unwrap()).unwrap();
    for &(at, byte, len) in writes {
        client.write(at, &vec![byte; len]).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    disk.close().unwrap();
}

fn grow(folder: &Path, sectors: u64) -> ploop_core::ops::ResizeReport {
    resize(&ResizeOptions::new(folder, Sectors(sectors)), &Silent).unwrap()
}

fn assert_sound(image: &Path) {
    let storage = FileStorage::open(image, &OpenOptions::new(Access::ReadOnly)).unwrap();
    let (header, verdict) = examine(&storage).unwrap();
    assert_eq!((verdict.ambiguous_count, verdict.at_end.len(), header.in_use()), (0, 0, InUse::Closed));
    assert_eq!(header.obstacle(), None);
}

fn qemu_finds_it_sound(image: &Path) {
    let output = Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(image).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn qemu_finds_equal(image: &Path, raw: &Path) {
    let status = Command::new("qemu-img")
        .args(["compare", "-q", "-f", "parallels", "-F", "raw"])
        .args([image, raw])
        .status()
        .unwrap();
    assert!(status.success(), "qemu-img compare says they differ");
}

#[test]
fn the_other_implementation_finds_grown_and_shrunk_images_sound_and_equal() {
    if !has("qemu-img") {
        return;
    }
    for (version, cluster, mode) in [
        (Version::V2, 64, Mode::Expanded),
        (Version::V1, 64, Mode::Expanded),
        (Version::V2, 2048, Mode::Expanded),
        (Version::V2, 64, Mode::Preallocated),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        bundle(folder, version, cluster, 256, mode);
        let bytes = cluster * 512;
        let writes: Vec<_> =
            (0..40u64).map(|number| (number * 6 * bytes + number * 700, number as u8 + 1, 40_000)).collect();
        fill(folder, &writes);
        let image = image_of(folder);
        let raw = folder.join("expected.raw");
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", "parallels", "-O", "raw"])
            .args([&image, &raw])
            .status()
            .unwrap();
        assert!(converted.success());
        let clusters = if mode == Mode::Preallocated { 9000 } else { 40_000 };
        let report = grow(folder, clusters * cluster);
        assert_eq!(report.moved_clusters > 0, cluster == 64, "{version:?} {mode:?}");
        qemu_finds_it_sound(&image);
        // What is new reads as zeros: a larger raw file has them.
        std::fs::OpenOptions::new().write(true).open(&raw).unwrap().set_len(clusters * bytes).unwrap();
        qemu_finds_equal(&image, &raw);
        fill(folder, &[((clusters - 1) * bytes, 9, 3000), (300 * bytes, 8, 3000)]);
        qemu_finds_it_sound(&image);
        let options =
            ResizeOptions { shrink: Shrink::Discard, ..ResizeOptions::new(folder, Sectors(256 * cluster)) };
        resize(&options, &Silent).unwrap();
        std::fs::OpenOptions::new().write(true).open(&raw).unwrap().set_len(256 * bytes).unwrap();
        qemu_finds_it_sound(&image);
        qemu_finds_equal(&image, &raw);
        assert_sound(&image);
    }
}

/// Shrunk above a snapshot, grown again past clusters in the way, merged: each image alone is sound, the base is equal.
#[test]
fn the_other_implementation_finds_chains_of_different_sizes_sound_and_merged_ones_equal() {
    if !has("qemu-img") {
        return;
    }
    for (version, steps) in [
        (Version::V2, [10, 40_000]),
        (Version::V1, [20, 30]),
        (Version::V2, [9000, 15]),
        (Version::V2, [20, 20]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        bundle(folder, version, 64, 60, Mode::Expanded);
        let bytes = 64 * 512;
        fill(folder, &(0..60).step_by(3).map(|at| (at * bytes, at as u8 + 1, 32_768)).collect::<Vec<_>>());
        let (lock, mut model) =
            (Duration::from_secs(10), read(&chain(folder, Access::ReadOnly), 0, 60 * 32_768));
        for (round, clusters) in (0u64..).zip(steps) {
            snapshot(folder, &SnapshotOptions::default(), lock, &Silent).unwrap();
            let options = ResizeOptions {
                shrink: Shrink::Discard,
                ..ResizeOptions::new(folder, Sectors(64 * clusters))
            };
            resize(&options, &Silent).unwrap();
            model.resize((clusters * bytes) as usize, 0);
            let at = (clusters - 2 - round) * bytes + 4096;
            fill(folder, &[(at, 200, 5000)]);
            model[at as usize..at as usize + 5000].fill(200);
            assert!(read(&chain(folder, Access::ReadOnly), 0, model.len()) == model);
        }
        let images = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let images: Vec<PathBuf> =
            images.filter(|path| path.to_string_lossy().contains("root.hds")).collect();
        assert_eq!(images.len(), 3);
        images.iter().for_each(|image| qemu_finds_it_sound(image));
        merge(folder, &MergeOptions { all: true, ..MergeOptions::default() }, lock, &Silent).unwrap();
        assert!(read(&chain(folder, Access::ReadOnly), 0, model.len()) == model);
        let raw = folder.join("expected.raw");
        std::fs::write(&raw, &model).unwrap();
        assert_sound(&image_of(folder));
        qemu_finds_it_sound(&image_of(folder));
        qemu_finds_equal(&image_of(folder), &raw);
    }
}

/// A sparse file on a real host: 200 GiB with clusters in the way becomes 3 TiB, where entries far behind the first
/// cluster of the table have to be rewritten; then 15 TiB.
#[test]
fn tables_of_many_clusters_are_rewritten_at_the_right_entry() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    bundle(folder, Version::V2, 2048, 200 << 10, Mode::Expanded);
    const GIB: u64 = 1 << 30;
    let places: Vec<u64> = [199, 0, 57, 150, 100].map(|number| number * GIB + 4096 * number).to_vec();
    let writes: Vec<_> = places.iter().zip(1..).map(|(&at, byte)| (at, byte, 5000)).collect();
    fill(folder, &writes);
    for (sectors, moved) in [(3 << 31, 5), (15 << 31, 7)] {
        let report = grow(folder, sectors);
        assert_eq!((report.moved_clusters, report.disk_bytes), (moved, sectors * 512));
        let chain = chain(folder, Access::ReadOnly);
        for &(at, byte, len) in &writes {
            assert_eq!(read(&chain, at, len), vec![byte; len]);
            assert_eq!(read(&chain, at + 5000, 100), [0; 100]);
        }
        drop(chain);
        assert_sound(&image_of(folder));
        if has("qemu-img") {
            qemu_finds_it_sound(&image_of(folder));
        }
        // Entries past the first 256 GiB lie in the second cluster of the table.
        fill(folder, &[(sectors * 512 - 4096, 77, 4096), (600 * GIB, 66, 100)]);
    }
    let chain = chain(folder, Access::ReadOnly);
    for (at, byte) in [((3u64 << 40) - 4096, 77), ((15u64 << 40) - 4096, 77), (600 * GIB, 66)] {
        assert_eq!(read(&chain, at, 100), [byte; 100]);
    }
}

/// The original grew this image and left the descriptor behind; growing it again finishes that, and moves on.
#[test]
fn an_image_that_the_original_grew_grows_on() {
    // Beside the project; a checkout of a branch lies one folder deeper.
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().skip(2).take(2);
    let mut archives = above.map(|folder| folder.join("shared/golden/grown-v2-32k.tar.zst"));
    let Some(archive) = archives.find(|archive| archive.exists()) else {
        ploop_testing::skip(ploop_testing::Need::Other, "the files of the original are not here");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let unpacked =
        Command::new("tar").arg("--zstd").arg("-xf").arg(&archive).arg("-C").arg(folder.path()).status();
    if !unpacked.is_ok_and(|status| status.success()) {
        ploop_testing::skip(ploop_testing::Need::Program("zstd"), "tar cannot unpack zstd archives");
        return;
    }
    let descriptor = std::fs::read_dir(folder.path()).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        path.join("DiskDescriptor.xml").exists().then_some(path)
    });
    let bundle = descriptor.unwrap_or_else(|| folder.path().to_path_buf());
    let before = read(&chain(&bundle, Access::ReadOnly), 0, 8 << 20);
    let sha = |bytes: &[u8]| {
        use sha2::Digest;
        sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    assert_eq!(sha(&before), "09c16530de0af86a0459a056f08bc1c665a6ef405bec2cff3a6eb95c47ad0d05");
    // Where the original stopped: only the descriptor is missing.
    let report = grow(&bundle, 300 << 11);
    assert_eq!((report.moved_clusters, report.disk_bytes), (0, 300 << 20));
    let said = DiskDescriptor::load(&DirectoryFolder::open(&bundle).unwrap(), None).unwrap().disk_sectors();
    assert_eq!(said, Sectors(300 << 11));
    let report = grow(&bundle, 2 << 21);
    assert!(report.moved_clusters > 0);
    assert!(read(&chain(&bundle, Access::ReadOnly), 0, 8 << 20) == before);
}

const WRITERS: u64 = 3;
const UNIT: u64 = 4096;

/// Each writer owns every third unit of 4 KiB, and knows what it wrote there last.
struct Writer {
    number: u64,
    random: Random,
    known: std::collections::HashMap<u64, u8>,
}

impl Writer {
    fn work(&mut self, client: &mut Client, units: u64) {
        let unit = self.random.below(units / WRITERS) * WRITERS + self.number;
        let at = unit * UNIT;
        match self.random.below(10) {
            0 => {
                client.write_zeroes(Extent::new(at, UNIT).unwrap(), true).unwrap();
                self.known.insert(unit, 0);
            }
            1 => client.flush().unwrap(),
            2..=4 => {
                let found = client.read(Extent::new(at, UNIT).unwrap()).unwrap();
                let expected = self.known.get(&unit).copied().unwrap_or(0);
                assert!(
                    found.as_slice().iter().all(|&byte| byte == expected),
                    "unit {unit}: {} where {expected} was written",
                    found.as_slice()[0]
                );
            }
            _ => {
                let byte = self.random.below(255) as u8 + 1;
                client.write(at, &[byte; UNIT as usize]).unwrap();
                self.known.insert(unit, byte);
            }
        }
    }
}

/// A hole map, a mapping, a place: whatever a reader or a writer looked up before a growth must not be used after it.
#[test]
fn a_disk_grows_again_and_again_while_it_is_written_and_read() {
    for (mode, choice) in [
        (Mode::Expanded, QueueChoice::Auto),
        (Mode::Preallocated, QueueChoice::Auto),
        (Mode::Raw, QueueChoice::Auto),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let start = 200u64;
        bundle(folder, Version::V2, 64, start, mode);
        let opened =
            open::open(&OpenDisk { caching: Caching::Cached, ..OpenDisk::new(folder, Access::ReadWrite) });
        let disk = Disk::open(opened.unwrap().chain, DiskOptions::default()).unwrap();
        let stop = AtomicBool::new(false);
        let clusters = AtomicU64::new(start);
        let rounds = AtomicU64::new(0);
        let mut growths = 0;
        let known = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|number| {
                    let (disk, stop, clusters, rounds) = (&disk, &stop, &clusters, &rounds);
                    scope.spawn(move || {
                        let mut client = Client::new(disk, choice.queue(16).unwrap()).unwrap();
                        let mut writer =
                            Writer { number, random: Random::new(number + 40), known: Default::default() };
                        while !stop.load(Ordering::Relaxed) {
                            // Old places are used most, new ones as well.
                            let all = clusters.load(Ordering::Acquire);
                            let end = if writer.random.chance(70) { start } else { all.min(2000) };
                            writer.work(&mut client, end * 32768 / UNIT);
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                        client.flush().unwrap();
                        writer.known
                    })
                })
                .collect();
            let let_them_write = || {
                let least = rounds.load(Ordering::Relaxed) + 200;
                // Nobody waits for one that has failed.
                while rounds.load(Ordering::Relaxed) < least
                    && !writers.iter().any(|writer| writer.is_finished())
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            for to in [201u64, 900, 8177, 8300, 30_000, 70_000, 100_000] {
                if mode == Mode::Preallocated && to > 30_000 {
                    break;
                }
                let_them_write();
                // In small parts, so that it takes several freezes.
                let options = GrowOptions {
                    freeze_bytes: 2 * 32768,
                    preallocate: mode == Mode::Preallocated,
                    ..GrowOptions::new(Sectors(to * 64))
                };
                let grown = disk.grow(&options).unwrap();
                assert_eq!(grown.disk_bytes, to * 32768);
                assert!(grown.freezes as u64 >= grown.moved_clusters / 2, "{grown:?}");
                growths += u64::from(grown.moved_clusters > 0);
                assert_eq!(disk.size_bytes(), to * 32768);
                clusters.store(to, Ordering::Release);
                let again = disk.grow(&options).unwrap();
                assert_eq!((again.freezes, again.moved_clusters), (0, 0));
                assert_eq!(
                    disk.grow(&GrowOptions::new(Sectors(64))).unwrap_err().kind(),
                    ErrorKind::Parameter
                );
            }
            let_them_write();
            stop.store(true, Ordering::Relaxed);
            writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(growths >= 3 || mode != Mode::Expanded, "clusters lay in the way: {growths}");
        disk.close().unwrap();
        let bytes = disk.size_bytes();
        drop(disk);
        // The descriptor is the caller's; the image counts.
        let chain = chain(folder, Access::ReadOnly);
        assert_eq!(chain.geometry().disk_bytes(), bytes);
        for (unit, byte) in known {
            assert!(
                read(&chain, unit * UNIT, UNIT as usize).iter().all(|&found| found == byte),
                "{mode:?} unit {unit}"
            );
        }
        drop(chain);
        if mode != Mode::Raw {
            assert_sound(&image_of(folder));
            if has("qemu-img") {
                qemu_finds_it_sound(&image_of(folder));
            }
        }
        println!("{mode:?}: {growths} growths with moves");
    }
}

#[test]
fn a_disk_whose_writes_are_tracked_does_not_grow() {
    let folder = tempfile::tempdir().unwrap();
    bundle(folder.path(), Version::V2, 64, 100, Mode::Expanded);
    let disk = Disk::open(chain(folder.path(), Access::ReadWrite), DiskOptions::default()).unwrap();
    let tracker = disk.start_tracker().unwrap();
    let options = GrowOptions::new(Sectors(64 * 200));
    assert_eq!(disk.grow(&options).unwrap_err().kind(), ErrorKind::Busy);
    disk.stop_tracker(&tracker);
    disk.grow(&options).unwrap();
    let tracker = disk.start_tracker().unwrap();
    assert_eq!(tracker.disk().len(), 200 * 32768, "a later one covers the new range");
    let mut client = Client::new(&disk, best_io_queue(4).unwrap()).unwrap();
    client.write(199 * 32768, &[1; 512]).unwrap();
    assert!(!tracker.is_clean());
    disk.stop_tracker(&tracker);
    drop(client);
    let frozen = disk.freeze(Duration::from_secs(300)).unwrap();
    assert_eq!(disk.grow(&GrowOptions::new(Sectors(64 * 300))).unwrap_err().kind(), ErrorKind::Busy);
    drop(frozen);
    disk.close().unwrap();
}

#[test]
fn a_dead_server_in_the_middle_leaves_an_image_that_opens_in_the_old_or_the_new_size() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    bundle(folder, Version::V2, 64, 100, Mode::Expanded);
    fill(folder, &[(0, 1, 1 << 20), (2 << 20, 2, 1 << 20)]);
    let disk = Disk::open(chain(folder, Access::ReadWrite), DiskOptions::default()).unwrap();
    disk.grow(&GrowOptions::new(Sectors(64 * 50_000))).unwrap();
    // No close: as a kill leaves it.
    drop(disk);
    let storage = FileStorage::open(image_of(folder), &OpenOptions::new(Access::ReadOnly)).unwrap();
    let Probe::Image(header) = probe(&storage).unwrap() else { panic!("no image") };
    assert_eq!((header.in_use(), header.geometry().entries()), (InUse::Open, 50_000));
    drop(storage);
    let report = grow(folder, 64 * 50_000);
    assert_eq!(report.moved_clusters, 0);
    let chain = chain(folder, Access::ReadOnly);
    assert_eq!(read(&chain, 0, 1 << 20), vec![1; 1 << 20]);
    assert_eq!(read(&chain, 2 << 20, 1 << 20), vec![2; 1 << 20]);
    drop(chain);
    assert_sound(&image_of(folder));
}
