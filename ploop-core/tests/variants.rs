//! Every image that another writer may have left opens, and reads as it should: both versions, odd geometries, short
//! tails, holes, chains, what killed writers leave. The images are written here by hand, not by the library, and where
//! the other implementation reads them too, it is asked as well.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test stops at a surprise"
)]

mod foreign;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use foreign::{
    CLOSED_WITH_EXTENSION, Handmade, OPEN, SECTOR, content, has, open_chain, pattern, qemu_calls_it_sound,
    read, read_by_qemu, succeed,
};
use ploop_core::ErrorKind;
use ploop_core::io::Access;
use ploop_core::ops::Silent;
use ploop_core::ops::import::{ImportOptions, import};
use ploop_core::ops::open::{OpenOptions, open};
use ploop_core::units::Sectors;

/// An image, and whether the other implementation reads it as well.
fn closed() -> Vec<(Handmade, bool)> {
    let new = Handmade::new;
    let ends_inside = |handmade: Handmade, sectors| Handmade { disk_sectors: sectors, ..handmade };
    let v1_63 = new("v1, 63 sectors, data right behind the table", 1, 63, 63 * 20);
    let behind = v1_63.table_end_sectors();
    let v1_504 = new("v1, 504 sectors, data at an odd sector", 1, 504, 504 * 7);
    let fewer = new("more entries than the disk has clusters", 2, 64, 640);
    vec![
        (new("v2, empty", 2, 64, 640), true),
        (new("v2, entries backwards", 2, 64, 640).placed(&[(0, 3), (1, 2), (2, 1), (9, 0)]), true),
        (new("v1, entries backwards", 1, 64, 640).placed(&[(0, 3), (1, 2), (2, 1), (9, 0)]), true),
        (new("v1, the original's", 1, 2048, 2048 * 4).placed(&[(1, 0), (3, 1)]), true),
        (new("v2, 64 MiB", 2, 131_072, 131_072 * 2).placed(&[(1, 0)]), true),
        (v1_63.clone().data_at(0, behind).placed(&[(0, 0), (7, 2), (19, 1)]), true),
        (v1_63.clone().data_at(behind, behind).placed(&[(0, 0), (7, 2), (19, 1)]), true),
        (v1_63.data_at(63, 63).placed(&[(3, 0), (2, 1)]), true),
        (v1_504.clone().data_at(11, 11).placed(&[(6, 0), (0, 1)]), true),
        (ends_inside(v1_504.data_at(0, 1), 504 * 6 + 1).placed(&[(6, 0), (0, 1)]), true),
        (
            ends_inside(new("v2, the disk ends inside a cluster", 2, 128, 128 * 5), 128 * 4 + 3)
                .placed(&[(4, 0)]),
            true,
        ),
        (new("v2, 63 sectors", 2, 63, 63 * 9).placed(&[(8, 0), (1, 3)]), true),
        (new("v2, 3 MiB", 2, 6144, 6144 * 3).placed(&[(2, 0), (0, 1)]), true),
        (new("v2, one sector", 2, 1, 300).placed(&[(0, 0), (299, 4), (150, 2)]), true),
        (new("v2, data later than need be", 2, 64, 640).data_at(192, 192).placed(&[(5, 1), (6, 0)]), true),
        (Handmade { entries: 20, ..fewer }.placed(&[(9, 0)]), true),
        (
            Handmade { size_high_half: 0xDEAD_BEEF, ..new("v1, junk above the size", 1, 64, 640) }
                .placed(&[(2, 0)]),
            true,
        ),
        (
            Handmade { in_use: CLOSED_WITH_EXTENSION, ..new("v2.1, no extension", 2, 64, 640) }
                .placed(&[(2, 0)]),
            true,
        ),
        (Handmade { in_use: 5, ..new("an unknown mark", 2, 64, 640) }.placed(&[(2, 0)]), true),
        (
            Handmade { holes: vec![1, 3], ..new("holes inside named clusters", 2, 64, 640) }.placed(&[
                (1, 0),
                (2, 1),
                (3, 2),
            ]),
            true,
        ),
        (Handmade { tail_bytes: 128 << 20, ..new("a long tail", 2, 64, 640) }.placed(&[(1, 0)]), true),
        (
            Handmade { tail_bytes: -1000, ..new("the last cluster is cut", 2, 64, 640) }
                .placed(&[(1, 0), (2, 1)]),
            true,
        ),
        (
            Handmade { extension_sectors: 1 << 40, ..new("a stale place of an extension", 2, 64, 640) }
                .placed(&[(1, 0)]),
            // It refuses such an image for reading.
            false,
        ),
        (new("v2, a table of two clusters", 2, 64, 64 * 9000).placed(&[(8999, 0), (8160, 1), (0, 2)]), true),
        (new("v2, preallocated", 2, 64, 640).placed(&(0..10).map(|n| (n, n)).collect::<Vec<_>>()), true),
    ]
}

#[test]
fn closed_images_read_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let qemu = has("qemu-img");
    for (number, (handmade, in_qemu)) in closed().into_iter().enumerate() {
        let path = folder.path().join(format!("image{number}"));
        handmade.write(&path);
        let expected = handmade.expected();
        let chain = open_chain(&[&path], false, Access::ReadOnly)
            .unwrap_or_else(|error| panic!("{}: {error}", handmade.name));
        assert!(content(&chain) == expected, "{}", handmade.name);
        // As the commands open it, past the page cache where that is possible.
        let opened = open(&OpenOptions::new(&path, Access::ReadOnly)).unwrap();
        assert!(content(&opened.chain) == expected, "{} as the commands open it", handmade.name);
        if qemu && in_qemu {
            assert!(read_by_qemu(&path) == expected, "{}: the other implementation differs", handmade.name);
        }
        fs::remove_file(path).unwrap();
    }
}

/// What each kind of writer leaves when it is killed; every one opens for writing, and is sound after a clean close.
#[test]
fn images_of_killed_writers_are_read_and_repaired() {
    let open_image = |name| Handmade { in_use: OPEN, ..Handmade::new(name, 2, 64, 640) };
    let cases = [
        open_image("nothing was allocated yet"),
        open_image("closed but for the mark").placed(&[(1, 0), (2, 1)]),
        // QEMU: 128 MiB of zeros ahead, and allocations that were never flushed.
        Handmade { tail_bytes: 128 << 20, ..open_image("a table that lags behind") }.placed(&[(1, 0)]),
        // The device mapper: the file grows in steps of 128 MiB by its length alone.
        Handmade { tail_bytes: (128 << 20) - 32768, ..open_image("a file that grew ahead") }
            .placed(&[(5, 0), (1, 2)]),
        // The old kernel: the last cluster was being appended.
        Handmade { tail_bytes: 5000, ..open_image("a torn tail") }.placed(&[(0, 0), (9, 1)]),
        Handmade { in_use: OPEN, ..Handmade::new("version 1", 1, 64, 640) }.placed(&[(3, 1)]),
    ];
    let folder = tempfile::tempdir().unwrap();
    for handmade in cases {
        let path = folder.path().join("image");
        handmade.write(&path);
        let expected = handmade.expected();
        let reading = open_chain(&[&path], false, Access::ReadOnly).unwrap();
        assert!(content(&reading) == expected && reading.repairs().was_in_use, "{}", handmade.name);
        drop(reading);
        let writing = open_chain(&[&path], false, Access::ReadWrite).unwrap();
        assert!(content(&writing) == expected, "{}", handmade.name);
        writing.close().unwrap();
        drop(writing);
        let again = open_chain(&[&path], false, Access::ReadOnly).unwrap();
        assert!(content(&again) == expected && !again.repairs().was_in_use, "{}", handmade.name);
        if has("qemu-img") {
            qemu_calls_it_sound(&path, &expected);
        }
    }
    // An entry past the end: the flush that would have covered it never returned.
    let handmade = open_image("an entry past the end").placed(&[(1, 0)]);
    let path = folder.path().join("image");
    handmade.write(&path);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&handmade.entry(7).to_le_bytes(), 64 + 4 * 6).unwrap();
    let writing = open_chain(&[&path], false, Access::ReadWrite).unwrap();
    assert!(content(&writing) == handmade.expected() && writing.repairs().entries_cleared == 1);
    writing.close().unwrap();
}

#[test]
fn files_that_are_no_disk_are_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let refused = |handmade: &Handmade, len: Option<u64>, word: &str| {
        handmade.write(&path);
        if let Some(len) = len {
            File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        }
        let error = open_chain(&[&path], false, Access::ReadOnly).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    };
    let sound = Handmade::new("sound", 2, 64, 64 * 9000).placed(&[(0, 0)]);
    refused(&sound, Some(1000), "does not fit");
    refused(&sound, Some(40), "does not fit");
    refused(&Handmade { data_offset_sectors: 128, ..sound.clone() }.placed(&[(0, 0), (1, 0)]), None, "");
    fs::write(&path, b"no image at all").unwrap();
    assert_eq!(open_chain(&[&path], false, Access::ReadOnly).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn chains_whose_lower_files_are_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let [base, middle, top] = ["base", "middle", "top"].map(|name| folder.path().join(name));
    let cluster = 64 * SECTOR as usize;
    for version in [1, 2] {
        Handmade::new("base", version, 64, 64 * 3).placed(&[(0, 0), (2, 1)]).write(&base);
        Handmade::new("middle", version, 64, 64 * 5).placed(&[(2, 1), (4, 0)]).write(&middle);
        let holes = Handmade { holes: vec![0], ..Handmade::new("top", version, 64, 64 * 8) };
        // A hole in the top hides the base.
        holes.placed(&[(0, 0), (7, 1)]).write(&top);
        let chain = open_chain(&[&base, &middle, &top], false, Access::ReadOnly).unwrap();
        let mut expected = vec![0; 8 * cluster];
        for guest in [2, 4, 7] {
            expected[guest * cluster..(guest + 1) * cluster]
                .copy_from_slice(&pattern(guest as u64, cluster as u64));
        }
        assert!(content(&chain) == expected, "version {version}");
        // A raw base that ends inside a sector.
        fs::write(&base, vec![9; 2 * cluster + 100]).unwrap();
        let chain = open_chain(&[&base, &middle, &top], true, Access::ReadOnly).unwrap();
        expected[cluster..2 * cluster].fill(9);
        assert!(content(&chain) == expected, "version {version}, raw base");
    }
    fs::write(&base, vec![9; 100_001]).unwrap();
    let alone = open_chain(&[&base], true, Access::ReadOnly).unwrap();
    let mut expected = vec![9; 100_001];
    expected.resize(100_352, 0);
    assert!(content(&alone) == expected);
}

/// Images over 2 TiB, and files over 2 TiB: where 32 bits of sectors end.
#[test]
fn disks_and_files_over_two_tebibytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let clusters = 3 << 20;
    // The place of the last one lies past 2 TiB of the file, too.
    let far = 2_200_000;
    let handmade = Handmade::new("3 TiB", 2, 2048, 2048 * clusters).placed(&[
        (clusters - 1, far),
        (1, 0),
        (2_097_152, 1),
    ]);
    handmade.write(&path);
    if File::open(&path).unwrap().metadata().unwrap().len() < 2 << 40 {
        ploop_testing::skip(ploop_testing::Need::Other, "the file system has no files of 2 TiB");
        return;
    }
    let chain = open_chain(&[&path], false, Access::ReadOnly).unwrap();
    for guest in [1, 2_097_152, clusters - 1] {
        assert!(read(&chain, guest << 20, 1 << 20) == pattern(guest, 1 << 20), "cluster {guest}");
    }
    assert!(read(&chain, 5 << 20, 1 << 20).iter().all(|&byte| byte == 0));
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 64 << 20);
    if has("qemu-io") {
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", "parallels", "-c"]);
        command.arg(format!("read -v {} 512", (clusters - 1) << 20)).arg(&path);
        let text = String::from_utf8(succeed(&mut command).stdout).unwrap();
        let first = pattern(clusters - 1, 16).iter().map(|byte| format!("{byte:02x} ")).collect::<String>();
        assert!(text.contains(first.trim()), "{text}");
    }
    // The largest of version 1 that still fits its table.
    let clusters = 2_097_151 - 8;
    let handmade = Handmade::new("2 TiB", 1, 2048, 2048 * clusters).placed(&[(clusters - 1, clusters - 1)]);
    handmade.write(&path);
    let chain = open_chain(&[&path], false, Access::ReadOnly).unwrap();
    assert!(read(&chain, (clusters - 1) << 20, 1 << 20) == pattern(clusters - 1, 1 << 20));
}

/// Every cluster that may be written: what is written is sound for the other implementation, and read by it.
#[test]
fn every_cluster_size_is_written() {
    let mut input = vec![0; 3 << 20];
    input[70_000..900_000].fill(5);
    let end = input.len();
    input[end - 1] = 6;
    for shift in 6..=17 {
        for version in [ploop_core::format::Version::V1, ploop_core::format::Version::V2] {
            let place = tempfile::tempdir().unwrap();
            let file = place.path().join("input");
            fs::write(&file, &input).unwrap();
            let options = ImportOptions {
                cluster: Sectors(1 << shift),
                version,
                ..ImportOptions::new(place.path(), "root.hds")
            };
            let report = import(&options, &file, &Silent).unwrap();
            let mut expected = input.clone();
            expected.resize(report.disk_bytes as usize, 0);
            let chain = open(&OpenOptions::new(place.path(), Access::ReadOnly)).unwrap().chain;
            assert!(content(&chain) == expected, "{} sectors, version {version}", 1 << shift);
            drop(chain);
            if has("qemu-img") {
                qemu_calls_it_sound(Path::new(&report.image), &expected);
            }
        }
    }
}
