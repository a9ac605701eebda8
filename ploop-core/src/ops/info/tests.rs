//! What is said about disks.

use super::*;
use crate::format::Mode;
use crate::io::StorageExt;
use crate::io::sim::SimDisk;
use crate::ops::create::{CreateOptions, create};
use crate::ops::open::{OpenOptions, open};

fn bundle(mode: Mode) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        cluster: Sectors(64),
        mode,
        ..CreateOptions::new(place.path(), "root.hds", Sectors(64 * 16))
    };
    create(&options).unwrap();
    place
}

fn look(path: &Path) -> InfoReport {
    info(&InfoOptions::new(path)).unwrap()
}

#[test]
fn new_disks() {
    for (mode, clusters) in [(Mode::Expanded, 0), (Mode::Preallocated, 16), (Mode::Raw, 16)] {
        let place = bundle(mode);
        let report = look(place.path());
        assert_eq!(report, look(&place.path().join(DESCRIPTOR_NAME)));
        assert_eq!((report.disk_bytes, report.cluster_bytes), (16 * 32768, 32768));
        assert_eq!((report.mode, report.snapshots), (mode.name(), 0));
        assert_eq!(report.version, (mode != Mode::Raw).then_some(2));
        assert_eq!(report.allocated_clusters, clusters, "{mode:?}");
        assert!(!report.in_use && !report.open_by_program && report.images[0].problem.is_none());
        assert_eq!(report.file_bytes, std::fs::metadata(place.path().join("root.hds")).unwrap().len());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["images"][0]["file"], "root.hds");
        if mode != Mode::Raw {
            let image = look(&place.path().join("root.hds"));
            assert_eq!((image.mode, image.disk_bytes), (mode.name(), 16 * 32768));
        }
    }
}

#[test]
fn a_disk_in_use_is_told_and_left_alone() {
    let place = bundle(Mode::Expanded);
    let opened = open(&OpenOptions::new(place.path(), Access::ReadWrite)).unwrap();
    let report = look(place.path());
    assert!(report.open_by_program && report.in_use);
    drop(opened);
    let report = look(place.path());
    assert!(!report.open_by_program && report.in_use, "not closed");
    let closed = open(&OpenOptions::new(place.path(), Access::ReadWrite)).unwrap();
    closed.chain.close().unwrap();
    drop(closed);
    assert!(!look(place.path()).in_use);
}

#[test]
fn one_bad_image_does_not_hide_the_rest() {
    let place = bundle(Mode::Expanded);
    std::fs::write(place.path().join("root.hds"), b"no image").unwrap();
    let report = look(place.path());
    assert!(report.images[0].problem.as_ref().unwrap().contains("root.hds"));
    assert_eq!(report.disk_bytes, 16 * 32768);
    std::fs::remove_file(place.path().join("root.hds")).unwrap();
    assert!(look(place.path()).images[0].problem.is_some());
    assert!(info(&InfoOptions::new("/nonexistent")).is_err());
}

#[test]
fn a_huge_table_of_nothing_costs_nothing() {
    let disk = SimDisk::new(1);
    let storage = disk.create("a").unwrap();
    let geometry = Geometry::new(crate::format::Version::V2, Sectors(64), Sectors(64 << 28)).unwrap();
    storage.set_len(geometry.data_start().0).unwrap();
    storage.write_all_at(64, &1u32.to_le_bytes()).unwrap();
    storage.write_all_at(64 + 4 * 200_000_000, &2u32.to_le_bytes()).unwrap();
    storage.write_all_at(64 + 4 * ((1 << 28) - 1), &2u32.to_le_bytes()).unwrap();
    assert_eq!(survey(&storage, &geometry, storage.len().unwrap(), 0).unwrap().allocated, 3);
    let reads = disk.calls(crate::io::sim::Call::Read);
    assert!(reads < 100, "{reads}");
}

#[test]
fn check_and_info_say_the_same_of_one_image() {
    use crate::ops::check::{CheckOptions, check};
    use crate::ops::{ConvertOptions, Silent, convert};
    let place = bundle(Mode::Preallocated);
    let image = place.path().join("root.hds");
    let swap = |first: usize, second: usize| {
        let mut bytes = std::fs::read(&image).unwrap();
        for at in 0..4 {
            bytes.swap(64 + 4 * first + at, 64 + 4 * second + at);
        }
        std::fs::write(&image, bytes).unwrap();
    };
    // In the order of the file, scattered, and with a hole in the table and a tail.
    for step in 0..4 {
        match step {
            1 => swap(2, 9),
            2 => {
                let mut bytes = std::fs::read(&image).unwrap();
                bytes[64 + 16..64 + 24].fill(0);
                bytes.resize(bytes.len() + 3 * 32768, 0);
                std::fs::write(&image, bytes).unwrap();
            }
            3 => drop(convert(
                &ConvertOptions { mode: Some(Mode::Expanded), ..ConvertOptions::new(place.path()) },
                &Silent,
            )),
            _ => {}
        }
        let said = look(place.path());
        let checked = check(&CheckOptions::look(place.path()), &Silent).unwrap();
        let (info, check) = (&said.images[0], &checked.images[0]);
        assert_eq!(
            (info.allocated_clusters, info.free_clusters, info.neighbours, info.breaks),
            (check.allocated_clusters, check.free_clusters, check.neighbours, check.fragments),
            "step {step}"
        );
        let expected = [(16, 0, 0), (16, 0, 4), (14, 5, 4)];
        if let Some(expected) = expected.get(step) {
            assert_eq!((info.allocated_clusters, info.free_clusters, info.breaks), *expected, "step {step}");
        }
    }
}
