//! The other implementation as a referee: what we write it reads and calls sound, what it writes (also killed) we read.
//!
//! * The same random commands through our engine on a real file and through `qemu-io`: equal content, sound images.
//! * `qemu-io` killed in the middle, with the table not written back: what it had flushed is there.
//! * Its known defects, each shown by the case that has it: they say where it is no referee. A version that does
//!   better is told, and does not fail the test; what *we* make of the same file is checked in any case. Number 8, that it
//!   refuses live migration of a guest with such a disk, needs two whole virtual machines: none of its disk tools has a
//!   command that begins one. It says nothing about files, and is not shown.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test stops at a surprise"
)]

mod foreign;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use foreign::{
    Handmade, SECTOR, content, has, open_chain, pattern, qemu_calls_it_sound, qemu_io, read_by_qemu, run,
    succeed,
};
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::extent::Extent;
use ploop_core::format::stored_bitmap::{self, DirtyBits, Loaded};
use ploop_core::format::{Version, examine, extension};
use ploop_core::io::file::{FileStorage, OpenOptions};
use ploop_core::io::sim::Random;
use ploop_core::io::{Access, best_io_queue};
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::units::Sectors;

/// What is done to a disk.
#[derive(Clone, Copy, Debug)]
enum Action {
    Write(u64, u64, u8),
    Zero(u64, u64),
    /// Of whole clusters: it does nothing with parts of them.
    Discard(u64, u64),
    Flush,
}

impl Action {
    fn any(random: &mut Random, disk_bytes: u64, cluster_bytes: u64) -> Self {
        let len = (1 + random.below(200)) * SECTOR;
        let at = random.below((disk_bytes - len) / SECTOR) * SECTOR;
        match random.below(10) {
            0..=4 => Self::Write(at, len, 1 + random.below(255) as u8),
            5 | 6 => Self::Zero(at, len),
            7 | 8 => {
                let clusters = disk_bytes / cluster_bytes;
                let first = random.below(clusters - 1);
                let count = 1 + random.below((clusters - first).min(4));
                Self::Discard(first * cluster_bytes, count.min(clusters - first) * cluster_bytes)
            }
            _ => Self::Flush,
        }
    }

    fn for_qemu(self) -> String {
        match self {
            Self::Write(at, len, byte) => format!("write -P {byte} {at} {len}"),
            Self::Zero(at, len) => format!("write -z {at} {len}"),
            Self::Discard(at, len) => format!("discard {at} {len}"),
            Self::Flush => "flush".to_owned(),
        }
    }

    fn apply(self, model: &mut [u8]) {
        let (at, len, byte) = match self {
            Self::Write(at, len, byte) => (at, len, byte),
            Self::Zero(at, len) | Self::Discard(at, len) => (at, len, 0),
            Self::Flush => return,
        };
        model[at as usize..(at + len) as usize].fill(byte);
    }

    fn run(self, client: &mut Client) {
        match self {
            Self::Write(at, len, byte) => client.write(at, &vec![byte; len as usize]),
            Self::Zero(at, len) => client.write_zeroes(Extent::between(at, at + len), at % 1024 == 0),
            Self::Discard(at, len) => client.discard(Extent::between(at, at + len)),
            Self::Flush => client.flush(),
        }
        .unwrap();
    }
}

/// Runs actions through our engine.
fn run_ours(image: &Path, actions: &[Action]) {
    let chain = open_chain(&[image], false, Access::ReadWrite).unwrap();
    let disk = Disk::open(chain, DiskOptions::default()).unwrap();
    let mut client = Client::new(&disk, best_io_queue(16).unwrap()).unwrap();
    actions.iter().for_each(|action| action.run(&mut client));
    client.flush().unwrap();
    drop(client);
    disk.close().unwrap();
}

fn run_theirs(image: &Path, actions: &[Action]) {
    let commands: Vec<_> = actions.iter().map(|action| action.for_qemu()).collect();
    let output = qemu_io(image, &commands);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..12,
    }
}

/// A new image of 4 MiB, by whoever is to make it.
fn new_image(folder: &Path, by_us: bool, version: Version, cluster_bytes: u64) -> std::path::PathBuf {
    let path = folder.join("image");
    if by_us {
        let options = CreateOptions {
            version,
            cluster: Sectors(cluster_bytes / SECTOR),
            ..CreateOptions::new(folder, "image", Sectors(8192))
        };
        create(&options).unwrap();
    } else {
        let option = format!("cluster_size={cluster_bytes}");
        let mut command = Command::new("qemu-img");
        succeed(command.args(["create", "-q", "-f", "parallels", "-o", &option]).arg(&path).arg("4M"));
    }
    path
}

#[test]
fn the_same_commands_lead_to_the_same_disk() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for seed in seeds() {
        let mut random = Random::new(seed);
        let cluster_bytes = [32 << 10, 64 << 10, 256 << 10][(seed % 3) as usize];
        let version = if seed % 4 == 3 { Version::V1 } else { Version::V2 };
        let mut model = vec![0; 4 << 20];
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let ours = new_image(folders[0].path(), true, version, cluster_bytes);
        let theirs = new_image(folders[1].path(), false, version, cluster_bytes);
        // In turns, so that each goes on where the other stopped.
        for turn in 0..4 {
            let actions: Vec<_> = (0..30).map(|_| Action::any(&mut random, 4 << 20, cluster_bytes)).collect();
            actions.iter().for_each(|action| action.apply(&mut model));
            if turn % 2 == 0 {
                run_ours(&ours, &actions);
                run_theirs(&theirs, &actions);
            } else {
                run_theirs(&ours, &actions);
                run_ours(&theirs, &actions);
            }
            for (image, ours_wrote_last) in [(&ours, turn % 2 == 0), (&theirs, turn % 2 == 1)] {
                let chain = open_chain(&[image], false, Access::ReadOnly).unwrap();
                assert!(content(&chain) == model, "SEED={seed} turn {turn}: {}", image.display());
                drop(chain);
                if ours_wrote_last {
                    qemu_calls_it_sound(image, &model);
                } else {
                    // It leaves a freed cluster at the end of the file, which it then calls leaked (exit 3).
                    let status =
                        run(Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(image)).status;
                    assert!(matches!(status.code(), Some(0 | 3)), "SEED={seed} turn {turn}: {status}");
                    assert!(read_by_qemu(image) == model, "SEED={seed} turn {turn}");
                }
            }
        }
    }
}

#[test]
fn what_a_killed_writer_had_flushed_is_there() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for seed in seeds() {
        let mut random = Random::new(1000 + seed);
        let cluster_bytes = [32 << 10, 64 << 10, 1 << 20][(seed % 3) as usize];
        let folder = tempfile::tempdir().unwrap();
        let image = new_image(folder.path(), false, Version::V2, cluster_bytes);
        let mut model = vec![0; 4 << 20];
        let before: Vec<_> =
            (0..random.below(20)).map(|_| Action::any(&mut random, 4 << 20, cluster_bytes)).collect();
        before.iter().for_each(|action| action.apply(&mut model));
        let after: Vec<_> = (0..random.below(8))
            .map(|_| Action::Write(random.below(4000) * SECTOR, (1 + random.below(300)) * SECTOR, 255))
            .collect();
        let lines = before.iter().chain(&[Action::Flush]).chain(&after).map(|action| action.for_qemu());
        let commands: Vec<_> = lines.chain(["sigraise 9".to_owned()]).collect();
        assert!(!qemu_io(&image, &commands).status.success());
        let check = |seen: &[u8]| {
            for (at, (&seen, &flushed)) in seen.iter().zip(&model).enumerate() {
                let rewritten = after.iter().any(|action| {
                    matches!(*action, Action::Write(start, len, _) if (start..start + len).contains(&(at as u64)))
                });
                assert!(
                    seen == flushed || rewritten && seen == 255,
                    "SEED={seed}: byte {at} is {seen}, was flushed as {flushed}"
                );
            }
        };
        let reading = open_chain(&[&image], false, Access::ReadOnly).unwrap();
        let seen = content(&reading);
        check(&seen);
        drop(reading);
        let writing = open_chain(&[&image], false, Access::ReadWrite).unwrap();
        assert!(content(&writing) == seen, "SEED={seed}: the repair changed what is read");
        writing.close().unwrap();
        drop(writing);
        qemu_calls_it_sound(&image, &seen);
    }
}

/// Says that a defect is not there any more.
fn improved(number: &str, what: &str) {
    println!("NOTE: qemu-interop 7.{number} is not shown by this version: {what}");
}

fn exit_code(command: &mut Command) -> Option<i32> {
    run(command).status.code()
}

fn check(image: &Path) -> Option<i32> {
    exit_code(Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(image))
}

#[test]
fn defect_1_its_check_dies_of_an_entry_past_the_end() {
    if !has("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let handmade = Handmade::new("an entry past the end", 2, 64, 640).placed(&[(1, 0), (2, 1)]);
    handmade.write(&image);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&handmade.entry(700).to_le_bytes(), 64 + 4 * 7).unwrap();
    match check(&image) {
        // A signal: it aborted.
        None | Some(134) => {}
        Some(code) => improved("1", &format!("check says {code}")),
    }
    let error = open_chain(&[&image], false, Access::ReadOnly).unwrap_err();
    assert!(error.to_string().contains("past the end"), "{error}");
}

#[test]
fn defect_2_its_own_image_with_clusters_that_are_no_power_of_two() {
    if !has("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "parallels", "-o", "cluster_size=32256"]);
    succeed(create.arg(&image).arg("100M"));
    if check(&image) == Some(0) {
        improved("2", "its new image of 63 sectors passes its check");
    }
    // Such images are read; reading is right on both sides.
    let handmade = Handmade::new("v2, 63 sectors", 2, 63, 63 * 9).placed(&[(8, 0), (1, 3)]);
    handmade.write(&image);
    assert!(read_by_qemu(&image) == handmade.expected());
    let chain = open_chain(&[&image], false, Access::ReadOnly).unwrap();
    assert!(content(&chain) == handmade.expected());
}

#[test]
fn defect_3_data_at_an_unaligned_place_are_overwritten() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    // Large enough, but no multiple of the cluster; the clusters lie at multiples.
    let handmade = Handmade::new("unaligned data offset", 2, 128, 1280).data_at(130, 128);
    let handmade = handmade.placed(&[(0, 1), (1, 2)]);
    handmade.write(&image);
    let refused = open_chain(&[&image], false, Access::ReadWrite);
    assert!(refused.is_err(), "we must not allocate in it");
    drop(refused);
    let before = handmade.expected();
    let passes = check(&image) == Some(0);
    qemu_io(&image, &["write -P 7 256k 64k".to_owned(), "write -P 8 320k 64k".to_owned()]);
    let after = read_by_qemu(&image);
    if !passes || after[..128 << 10] == before[..128 << 10] {
        improved("3", "other clusters are as they were");
    }
}

/// An image of ours with a stored dirty bitmap, closed, which QEMU reads.
fn with_a_bitmap(folder: &Path) -> std::path::PathBuf {
    let image = new_image(folder, true, Version::V2, 65_536);
    run_ours(&image, &[Action::Write(0, 2 * 65_536, 7)]);
    let file = FileStorage::open(&image, &OpenOptions::new(Access::ReadWrite)).unwrap();
    let (header, _) = examine(&file).unwrap();
    let mut bits = DirtyBits::new([7; 16], 8, header.geometry()).unwrap();
    bits.mark(Extent::new(0, 4096).unwrap());
    stored_bitmap::store(&file, &[bits]).unwrap();
    drop(file);
    assert_eq!(reads(&image), Some(0), "QEMU refuses our image with a bitmap");
    image
}

/// How a read-only open by QEMU ends; `None` if it aborted.
fn reads(image: &Path) -> Option<i32> {
    exit_code(Command::new("qemu-io").args(["-r", "-f", "parallels", "-c", "read 0 64k"]).arg(image))
        .filter(|&code| code != 134)
}

#[test]
fn defect_4_an_extension_is_cut_off_but_still_named() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for by_check in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let image = with_a_bitmap(folder.path());
        let (before, length) = (fs::read(&image).unwrap(), fs::metadata(&image).unwrap().len());
        if by_check {
            run(Command::new("qemu-img").args(["check", "-r", "leaks", "-f", "parallels"]).arg(&image));
        } else {
            qemu_io(&image, &["write -P 9 0 512".to_owned()]);
        }
        let after = fs::read(&image).unwrap();
        let is_named = after[56..64] != [0; 8];
        let is_cut =
            (after.len() as u64) < length || after[after.len() - 65_536..] != before[before.len() - 65_536..];
        if !(is_named && is_cut && reads(&image) != Some(0)) {
            improved(
                "4",
                &format!("by check: {by_check}; named: {is_named}, cut: {is_cut}, read: {:?}", reads(&image)),
            );
        }
        // The disk is not lost with it: read, and the bitmap not believed.
        let mut expected = content(&open_chain(&[&image], false, Access::ReadOnly).unwrap());
        assert!(expected[512..2 * 65_536].iter().all(|&byte| byte == 7), "by check: {by_check}");
        assert_eq!(expected[0], if by_check { 7 } else { 9 });
        if is_cut {
            let file = FileStorage::open(&image, &OpenOptions::new(Access::ReadOnly)).unwrap();
            let known = |loaded: &Loaded| matches!(loaded, Loaded::Known(_));
            assert!(!stored_bitmap::load(&file).is_ok_and(|loaded| loaded.iter().any(known)));
        }
        // Opening it for writing mends it for QEMU, too.
        run_ours(&image, &[Action::Write(512, 512, 5)]);
        expected[512..1024].fill(5);
        qemu_calls_it_sound(&image, &expected);
    }
}

#[test]
fn defect_6_a_granularity_that_is_no_power_of_two_kills_it() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    // The last one overflows 32 bits when it is turned into bytes.
    for granularity in [0_u32, 12, 1 << 23] {
        let folder = tempfile::tempdir().unwrap();
        let image = with_a_bitmap(folder.path());
        let expected = content(&open_chain(&[&image], false, Access::ReadOnly).unwrap());
        let bytes = fs::read(&image).unwrap();
        let at = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) * SECTOR;
        let cluster = &bytes[at as usize..at as usize + 65_536];
        let mut features = extension::parse(cluster).unwrap();
        features[0].data[24..28].copy_from_slice(&granularity.to_le_bytes());
        // Its number of map entries fits what QEMU counts only by chance; it dies of the granularity before.
        let rebuilt = extension::build(&features, 65_536).unwrap();
        File::options().write(true).open(&image).unwrap().write_all_at(&rebuilt, at).unwrap();
        match reads(&image) {
            None => {}
            Some(code) => {
                improved("6", &format!("granularity {granularity}: a read-only open ends with {code}"))
            }
        }
        // We lose a bitmap, not a disk.
        assert!(content(&open_chain(&[&image], false, Access::ReadOnly).unwrap()) == expected);
        let file = FileStorage::open(&image, &OpenOptions::new(Access::ReadOnly)).unwrap();
        if granularity != 1 << 23 {
            let known = |loaded: &Loaded| matches!(loaded, Loaded::Known(_));
            assert!(
                !stored_bitmap::load(&file).is_ok_and(|loaded| loaded.iter().any(known)),
                "{granularity}"
            );
        }
    }
}

#[test]
fn defect_5_copied_up_data_go_to_the_wrong_place() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    Handmade::new("base", 2, 128, 1280).placed(&[(0, 0), (1, 1), (2, 2)]).write(&base);
    // Place 0 is free, and not at the end of the file.
    Handmade::new("top", 2, 128, 1280).placed(&[(5, 1)]).write(&top);
    let (b, t) = (base.display(), top.display());
    let spec = format!(
        "driver=parallels,file.driver=file,file.filename={t},backing.driver=parallels,\
         backing.file.driver=file,backing.file.filename={b}"
    );
    let mut command = Command::new("qemu-io");
    command.args(["--image-opts", "-c", "write -P 7 65536 512", &spec]);
    if exit_code(&mut command) != Some(0) {
        improved("5", "it refuses to write through a backing image given by hand");
        return;
    }
    let seen = content(&open_chain(&[&base, &top], false, Access::ReadOnly).unwrap());
    let mut right = pattern(1, 65536);
    right[..512].fill(7);
    if seen[65536..131_072] == right {
        improved("5", "the rest of the cluster was copied up rightly");
    }
}

#[test]
fn defect_7_writing_past_the_table_kills_it() {
    if !has("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let handmade = Handmade { entries: 10, ..Handmade::new("a disk larger than its table", 2, 64, 64 * 20) };
    handmade.write(&image);
    let status = qemu_io(&image, &["write -P 1 600k 4k".to_owned()]).status;
    if status.code().is_some_and(|code| code != 134) {
        improved("7", &format!("qemu-io ends with {status}"));
    }
    // It is read, zeros past the table, and never written.
    handmade.write(&image);
    assert!(content(&open_chain(&[&image], false, Access::ReadOnly).unwrap()) == handmade.expected());
    assert!(open_chain(&[&image], false, Access::ReadWrite).is_err());
    assert!(fs::metadata(&image).unwrap().len() > 0);
}
