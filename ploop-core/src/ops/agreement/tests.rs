//! Disks that are half there or named wrongly: never written, read only with a word about it; and what only looks like it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;
use crate::error::{ErrorKind, Result};
use crate::format::{DESCRIPTOR_NAME, Mode};
use crate::ops::check::{CheckOptions, Kind, Outcome, check};
use crate::ops::{self, ConvertOptions, CreateOptions, OpenOptions, Silent, create};
use crate::units::{SECTOR_BYTES, Sectors};

const CLUSTER: u64 = 64;
const DISK: u64 = 64 * 16 + 8;

fn bundle(mode: Mode) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        cluster: Sectors(CLUSTER),
        mode,
        ..CreateOptions::new(place.path(), "root.hds", Sectors(DISK))
    };
    create(&options).unwrap();
    let image = place.path().join("root.hds");
    (place, image)
}

/// What the descriptor says the disk has, in sectors.
fn said(place: &Path) -> u64 {
    ops::open::Bundle::open(place).unwrap().descriptor.disk_sectors().0
}

fn say(place: &Path, from: &str, to: &str) {
    let path = place.join(DESCRIPTOR_NAME);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

fn contents(place: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found: Vec<_> = std::fs::read_dir(place)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|end| end != "lck"))
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    found.sort();
    found
}

fn writing(place: &Path) -> OpenOptions {
    OpenOptions { lock_timeout: Duration::ZERO, ..OpenOptions::new(place, Access::ReadWrite) }
}

/// Every verb that would change the disk.
fn changes(place: &Path) -> Vec<(&'static str, Result<()>)> {
    let now = Duration::ZERO;
    let larger = ops::ResizeOptions { lock_timeout: now, ..ops::ResizeOptions::new(place, Sectors(1 << 20)) };
    let convert = ConvertOptions { cluster: Some(Sectors(128)), ..ConvertOptions::new(place) };
    let compact = ops::CompactOptions { path: place.to_path_buf(), ..Default::default() };
    vec![
        ("open", ops::open(&writing(place)).map(drop)),
        ("snapshot", ops::snapshot(place, &ops::SnapshotOptions::default(), now, &Silent).map(drop)),
        ("resize", ops::resize(&larger, &Silent).map(drop)),
        ("convert", ops::convert(&convert, &Silent).map(drop)),
        ("compact", ops::compact(&compact, &Silent).map(drop)),
    ]
}

fn close(opened: ops::Opened) {
    opened.chain.close().unwrap();
}

fn is_refused(place: &Path, kind: ErrorKind, what: Kind) {
    let before = contents(place);
    for (verb, result) in changes(place) {
        let error = result.expect_err(verb);
        assert_eq!(error.kind(), kind, "{verb}: {error}");
        assert!(error.advice().is_some_and(|advice| advice.contains("--force-")), "{verb}");
    }
    for options in [CheckOptions::look(place), CheckOptions::repair(place)] {
        assert!(contents(place) == before, "a refused command, or a look, changed something");
        let report = check(&options, &Silent).unwrap();
        assert_eq!((report.outcome, report.exit_code), (Outcome::Damaged, kind.exit_code()), "{report:?}");
        assert_eq!(report.findings.total(what), 1, "{report:?}");
        assert!(report.failure().unwrap().advice().is_some());
    }
    let opened = ops::open(&OpenOptions::new(place, Access::ReadOnly)).unwrap();
    assert_eq!(opened.report.disagreements.len(), 1);
    assert!(!opened.report.warnings.is_empty());
    assert_eq!(of_disk(place, None).unwrap(), opened.report.disagreements);
}

#[test]
fn a_raw_disk_that_was_cut_is_not_written() {
    for kept in [512, 16 * 32768, 16 * 32768 + 5, 5000] {
        let (place, image) = bundle(Mode::Raw);
        let length = std::fs::metadata(&image).unwrap().len();
        assert_eq!(length, said(place.path()) * SECTOR_BYTES);
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(kept).unwrap();
        is_refused(place.path(), ErrorKind::Corrupt, Kind::MissingEnd);
        assert_eq!(std::fs::metadata(&image).unwrap().len(), kept, "it was padded");
        let Disagreement::Short { held_bytes, said_bytes, is_raw, .. } =
            of_disk(place.path(), None).unwrap().remove(0)
        else {
            panic!("something else was found")
        };
        assert_eq!((held_bytes, said_bytes, is_raw), (kept.next_multiple_of(512), length, true));
        // After a look: as long as what is there.
        let short = Accepted { short: true, raw: false };
        let options = ops::ResizeOptions {
            accepted: short,
            ..ops::ResizeOptions::new(place.path(), Sectors(kept / 512))
        };
        if kept % 512 == 0 {
            ops::resize(&options, &Silent).unwrap();
            assert_eq!(said(place.path()), kept.div_ceil(32768) * CLUSTER);
            ops::open(&writing(place.path())).unwrap().chain.close().unwrap();
        }
    }
}

#[test]
fn an_image_of_a_smaller_disk_than_its_descriptor_is_not_written() {
    for mode in [Mode::Expanded, Mode::Preallocated] {
        let (place, _image) = bundle(mode);
        let sectors = said(place.path());
        say(place.path(), &sectors.to_string(), &(sectors + CLUSTER).to_string());
        is_refused(place.path(), ErrorKind::Corrupt, Kind::MissingEnd);
        let accepted = Accepted { short: true, raw: false };
        let opened = ops::open(&OpenOptions { accepted, ..writing(place.path()) }).unwrap();
        assert!(opened.report.disagreements.is_empty() && opened.report.warnings.len() == 1);
        close(opened);
        // Made true in either way.
        for wanted in [sectors, sectors + CLUSTER] {
            say(place.path(), &said(place.path()).to_string(), &(sectors + CLUSTER).to_string());
            let options =
                ops::ResizeOptions { accepted, ..ops::ResizeOptions::new(place.path(), Sectors(wanted)) };
            assert_eq!(ops::resize(&options, &Silent).unwrap().disk_bytes, wanted * SECTOR_BYTES);
            ops::open(&writing(place.path())).unwrap().chain.close().unwrap();
        }
    }
}

#[test]
fn an_image_that_is_larger_is_what_a_cut_growth_leaves() {
    for mode in [Mode::Expanded, Mode::Raw] {
        let (place, _image) = bundle(mode);
        let sectors = said(place.path());
        say(place.path(), &sectors.to_string(), &(sectors - CLUSTER).to_string());
        let report = check(&CheckOptions::look(place.path()), &Silent).unwrap();
        assert_eq!((report.outcome, report.exit_code), (Outcome::Harmless, 0), "{report:?}");
        let opened = ops::open(&writing(place.path())).unwrap();
        assert_eq!(opened.report.disk_bytes, sectors * SECTOR_BYTES);
        close(opened);
        let again = ops::ResizeOptions::new(place.path(), Sectors(sectors));
        ops::resize(&again, &Silent).unwrap();
        assert_eq!(said(place.path()), sectors);
    }
}

#[test]
fn an_image_that_is_said_to_be_raw_is_not_written() {
    // An expanded image is shorter than its disk, a preallocated one longer.
    for mode in [Mode::Expanded, Mode::Preallocated] {
        let (place, image) = bundle(mode);
        say(place.path(), "<Type>Compressed</Type>", "<Type>Plain</Type>");
        let path = place.path().join(DESCRIPTOR_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("<Preallocated>1</Preallocated>", "")).unwrap();
        if mode == Mode::Expanded {
            // As long as the disk: a raw disk into which a guest has written a header looks the same.
            let length = said(place.path()) * SECTOR_BYTES;
            std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(length).unwrap();
        }
        is_refused(place.path(), ErrorKind::Descriptor, Kind::SaidRaw);
        // Its user says that it is one.
        let accepted = Accepted { short: false, raw: true };
        let opened = ops::open(&OpenOptions { accepted, ..writing(place.path()) }).unwrap();
        assert!(opened.chain.geometry().is_raw());
        close(opened);
    }
}

#[test]
fn a_raw_disk_that_holds_an_image_of_another_size_is_a_raw_disk() {
    let (place, image) = bundle(Mode::Raw);
    let (_other, inner) = bundle(Mode::Expanded);
    let (small, small_image) = {
        let place = tempfile::tempdir().unwrap();
        let options = CreateOptions {
            cluster: Sectors(CLUSTER),
            ..CreateOptions::new(place.path(), "small.hds", Sectors(CLUSTER * 3))
        };
        create(&options).unwrap();
        let image = place.path().join("small.hds");
        (place, image)
    };
    let put = |from: &Path| {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all_at(&std::fs::read(from).unwrap(), 0).unwrap();
    };
    put(&small_image);
    assert_eq!(check(&CheckOptions::look(place.path()), &Silent).unwrap().outcome, Outcome::Sound);
    ops::open(&writing(place.path())).unwrap().chain.close().unwrap();
    // Of the very size: nobody can tell, so nobody guesses.
    put(&inner);
    is_refused(place.path(), ErrorKind::Descriptor, Kind::SaidRaw);
    drop(small);
}

#[test]
fn below_snapshots_only_the_base_can_be_said_to_be_raw_and_sizes_may_differ() {
    let (place, image) = bundle(Mode::Raw);
    ops::snapshot(place.path(), &ops::SnapshotOptions::default(), Duration::ZERO, &Silent).unwrap();
    let larger = ops::ResizeOptions::new(place.path(), Sectors(said(place.path()) + 5 * CLUSTER));
    ops::resize(&larger, &Silent).unwrap();
    assert!(of_disk(place.path(), None).unwrap().is_empty(), "the base keeps its size");
    ops::open(&writing(place.path())).unwrap().chain.close().unwrap();
    let (_other, expanded) = bundle(Mode::Expanded);
    std::fs::copy(expanded, &image).unwrap();
    let found = of_disk(place.path(), None).unwrap();
    assert!(matches!(found.as_slice(), [Disagreement::ImageSaidRaw { .. }]), "{found:?}");
    assert_eq!(ops::open(&writing(place.path())).err().unwrap().kind(), ErrorKind::Descriptor);
}

#[test]
fn a_short_current_state_may_be_given_up_for_a_snapshot() {
    let (place, _image) = bundle(Mode::Expanded);
    let now = Duration::ZERO;
    let snapshot = ops::snapshot(place.path(), &ops::SnapshotOptions::default(), now, &Silent).unwrap();
    let sectors = said(place.path());
    say(place.path(), &sectors.to_string(), &(sectors + CLUSTER).to_string());
    let keep = ops::SwitchOptions { snapshot: snapshot.snapshot, keep: Some(Guid::random()) };
    assert_eq!(ops::switch(place.path(), &keep, now, &Silent).unwrap_err().kind(), ErrorKind::Corrupt);
    let leave = ops::SwitchOptions { snapshot: snapshot.snapshot, keep: None };
    ops::switch(place.path(), &leave, now, &Silent).unwrap();
    assert_eq!(said(place.path()), sectors);
    ops::open(&writing(place.path())).unwrap().chain.close().unwrap();
}
