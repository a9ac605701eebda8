//! Unit tests of checks on simulated and real files.

use super::*;
use crate::format::header::InUse;
use crate::format::testing::{content, image, set_entry, set_mark};
use crate::io::StorageExt;
use crate::io::sim::SimStorage;
use crate::ops::{CreateOptions, Silent, create};

fn checked(file: &SimStorage, options: &CheckOptions) -> CheckReport {
    check_image_in(&file.disk().folder(), "image", options, &Silent).unwrap()
}

fn as_typed() -> CheckOptions {
    CheckOptions { force: false, read_only: false, ..CheckOptions::look("image") }
}

#[test]
fn closed_images_are_skipped_unless_forced() {
    let file = image(20);
    set_entry(&file, 3, 0xFFFF_FFFF);
    let report = checked(&file, &as_typed());
    assert_eq!((report.outcome, report.exit_code), (Outcome::Skipped, 0));
    let report = checked(&file, &CheckOptions { force: true, ..as_typed() });
    assert_eq!((report.outcome, report.exit_code), (Outcome::Damaged, 11));
    assert_eq!(report.images[0].findings.total(Kind::EntryReserved), 1);
    assert!(report.failure().unwrap().advice().unwrap().contains("--repair"));
}

#[test]
fn an_image_that_was_not_closed_needs_the_word() {
    let file = image(20);
    set_mark(&file, InUse::Open);
    set_entry(&file, 3, 30);
    file.set_len(9 * 4096).unwrap();
    let before = content(&file);
    let report = checked(&file, &as_typed());
    assert_eq!(report.exit_code, 11, "there is an entry past the end");
    set_entry(&file, 3, 0);
    let report = checked(&file, &as_typed());
    assert_eq!((report.outcome, report.exit_code), (Outcome::Harmless, 37));
    let read_only = CheckOptions { read_only: true, drop_in_use: true, ..as_typed() };
    assert_eq!(checked(&file, &read_only).exit_code, 7);
    set_entry(&file, 3, 30);
    assert_eq!(content(&file), before, "nothing was changed so far");
    let report = checked(&file, &CheckOptions { drop_in_use: true, ..as_typed() });
    assert_eq!((report.outcome, report.exit_code), (Outcome::Repaired, 0), "{report:?}");
    let repair = report.images[0].repair.clone().unwrap();
    assert_eq!((repair.cleared_entries, repair.file_bytes), (1, 4096));
    assert_eq!(repair.undo_file.as_deref(), Some("image.undo"));
    assert_eq!(checked(&file, &CheckOptions::look("image")).outcome, Outcome::Sound);
}

#[test]
fn what_is_harmless_goes_without_a_word_and_without_an_undo_file() {
    let file = image(20);
    file.set_len(3 << 31).unwrap();
    let report = checked(&file, &CheckOptions { force: true, ..as_typed() });
    assert_eq!((report.outcome, report.exit_code), (Outcome::Repaired, 0));
    assert_eq!(report.images[0].findings.total(Kind::Tail), (3 << 31) / 4096 - 1);
    assert_eq!(file.len().unwrap(), 4096);
    assert!(!file.disk().folder().exists("image.undo").unwrap());
}

#[test]
fn an_image_with_damage_is_left_alone_as_a_whole() {
    let file = image(20);
    set_mark(&file, InUse::Open);
    set_entry(&file, 3, 0xFFFF_FFFF);
    file.set_len(9 * 4096).unwrap();
    let before = content(&file);
    let report = checked(&file, &CheckOptions { drop_in_use: true, ..as_typed() });
    assert_eq!((report.outcome, report.exit_code), (Outcome::Damaged, 11));
    assert_eq!(content(&file), before);
}

#[test]
fn millions_of_findings_are_counted_and_few_are_kept() {
    let file = image(100_000);
    let bytes = vec![0xFF; 4 * 100_000];
    file.write_all_at(64, &bytes).unwrap();
    let report = checked(&file, &CheckOptions::look("image"));
    let findings = &report.images[0].findings;
    assert_eq!(findings.total(Kind::EntryReserved), 100_000);
    // The flag "empty" is not true either.
    assert_eq!(findings.examples.len() as u64, EXAMPLES_MAX + 1);
    let report = checked(&file, &CheckOptions::repair("image"));
    assert_eq!(report.outcome, Outcome::Repaired);
    assert_eq!(report.images[0].repair.as_ref().unwrap().cleared_entries, 100_000);
}

#[test]
fn holes_are_filled_when_told() {
    let file = image(20);
    file.set_len(4 * 4096).unwrap();
    set_entry(&file, 0, 3);
    let before = content(&file);
    let report = checked(&file, &CheckOptions { force: true, fill_holes: true, ..as_typed() });
    assert!(report.images[0].filled_hole_bytes >= 4096, "{report:?}");
    assert_eq!(content(&file)[4096..], before[4096..]);
    assert_eq!(report.exit_code, 0);
}

fn bundle() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        cluster: Sectors(64),
        ..CreateOptions::new(folder.path(), "disk.hds", Sectors(64 * 20))
    };
    create(&options).unwrap();
    let image = folder.path().join("disk.hds");
    (folder, image)
}

#[test]
fn a_bundle_with_left_overs_strangers_and_missing_images() {
    let (folder, image) = bundle();
    let path = folder.path();
    assert_eq!(check(&CheckOptions::look(path), &Silent).unwrap().outcome, Outcome::Sound);
    let random = Guid::random().to_string();
    let leftover = format!("disk.hds.tmp.{}", random.trim_matches(['{', '}']));
    std::fs::write(path.join(&leftover), "x").unwrap();
    std::fs::copy(&image, path.join(format!("disk.hds.{random}"))).unwrap();
    std::fs::copy(&image, path.join("copy-of-mine")).unwrap();
    std::fs::write(path.join("notes.txt"), "x").unwrap();
    let report = check(&CheckOptions::look(path), &Silent).unwrap();
    assert_eq!(report.findings.total(Kind::Leftover), 2, "{report:?}");
    assert_eq!((report.findings.total(Kind::Unreferenced), report.exit_code), (1, 0));
    let report = check(&CheckOptions { read_only: false, ..CheckOptions::look(path) }, &Silent).unwrap();
    assert_eq!(report.files_removed.len(), 2);
    assert!(path.join("copy-of-mine").exists() && path.join("notes.txt").exists());
    std::fs::remove_file(&image).unwrap();
    let report = check(&CheckOptions::look(path), &Silent).unwrap();
    assert_eq!((report.findings.total(Kind::Missing), report.exit_code), (1, 39));
}

#[test]
fn a_descriptor_and_an_image_that_do_not_agree() {
    let (folder, _image) = bundle();
    let path = folder.path().join(DESCRIPTOR_NAME);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("1280", "1344")).unwrap();
    let report = check(&CheckOptions::look(folder.path()), &Silent).unwrap();
    assert_eq!((report.findings.total(Kind::MissingEnd), report.exit_code), (1, 11), "{report:?}");
    std::fs::write(&path, text.replace("1280", "1216")).unwrap();
    let report = check(&CheckOptions::look(folder.path()), &Silent).unwrap();
    assert_eq!((report.findings.total(Kind::DescriptorSize), report.exit_code), (1, 0), "{report:?}");
    std::fs::write(
        &path,
        text.replace("00000000-0000-0000-0000-000000000000", "10000000-0000-0000-0000-000000000001"),
    )
    .unwrap();
    let report = check(&CheckOptions::look(folder.path()), &Silent).unwrap();
    assert_eq!((report.findings.total(Kind::BrokenChain), report.exit_code), (1, 39));
}

#[test]
fn a_disk_in_use_is_refused() {
    let (folder, image) = bundle();
    let opened = crate::ops::open(&crate::ops::OpenOptions::new(folder.path(), Access::ReadWrite)).unwrap();
    for path in [folder.path(), &image] {
        let error = check(&CheckOptions::look(path), &Silent).unwrap_err();
        assert_eq!(error.kind().exit_code(), 37);
    }
    drop(opened);
    let report = check(
        &CheckOptions { drop_in_use: true, force: false, read_only: false, ..CheckOptions::look(&image) },
        &Silent,
    );
    assert_eq!(report.unwrap().outcome, Outcome::Repaired, "the chain was dropped without a close");
}

#[test]
fn a_raw_image_is_whole_sectors_and_becomes_longer_only_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw");
    let length = || std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![1; 5000]).unwrap();
    let look = CheckOptions { raw_cluster: Some(Sectors(8)), ..CheckOptions::look(&path) };
    for read_only in [true, false] {
        let report = check(&CheckOptions { read_only, ..look.clone() }, &Silent).unwrap();
        assert_eq!((report.outcome, length()), (Outcome::Harmless, 5000));
    }
    let told = CheckOptions { repair: true, read_only: false, ..look.clone() };
    // Shorter than its disk: it was cut, and padding would hide where.
    let short = CheckOptions { raw_disk: Some(Sectors(11)), ..told.clone() };
    assert_eq!((check(&short, &Silent).unwrap().outcome, length()), (Outcome::Harmless, 5000));
    assert_eq!((check(&told, &Silent).unwrap().outcome, length()), (Outcome::Repaired, 5120));
    // The disk ends inside a cluster: that is how it is.
    assert_eq!((check(&told, &Silent).unwrap().outcome, length()), (Outcome::Sound, 5120));
}

#[test]
fn who_has_nothing_to_repair_writes_nothing_and_asks_for_no_right_to() {
    let (folder, image) = bundle();
    let held = crate::ops::open(&crate::ops::OpenOptions::new(folder.path(), Access::ReadOnly)).unwrap();
    let report = check(&CheckOptions { read_only: false, ..CheckOptions::look(folder.path()) }, &Silent);
    assert_eq!(report.unwrap().outcome, Outcome::Sound, "another reader is in nobody's way");
    std::fs::OpenOptions::new().append(true).open(&image).unwrap().set_len(1 << 20).unwrap();
    let error = check(&CheckOptions { read_only: false, ..CheckOptions::look(folder.path()) }, &Silent);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InUse, "who cuts the tail is");
    drop(held);
}

#[test]
fn a_file_that_is_not_there_is_missing_and_everything_else_is_not() {
    let (folder, image) = bundle();
    let path = folder.path();
    let look = || check(&CheckOptions::look(path), &Silent);
    let elsewhere = path.join("elsewhere");
    std::fs::rename(&image, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &image).unwrap();
    assert_eq!(look().unwrap().exit_code, 39, "links are not followed");
    std::fs::remove_file(&image).unwrap();
    std::fs::create_dir(&image).unwrap();
    assert_eq!(look().unwrap().exit_code, 39, "a folder is no image");
    std::fs::remove_dir(&image).unwrap();
    assert_eq!(look().unwrap().findings.total(Kind::Missing), 1);
}

#[test]
fn undoing_refuses_an_image_that_was_written_since() {
    let (_folder, image) = bundle();
    let bytes = {
        use std::io::{Seek, Write};
        let mut file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
        file.seek(std::io::SeekFrom::Start(64)).unwrap();
        file.write_all(&[0xFF; 8]).unwrap();
        drop(file);
        std::fs::read(&image).unwrap()
    };
    let report = check(&CheckOptions::repair(&image), &Silent).unwrap();
    let undo_file = image.with_file_name(report.images[0].repair.clone().unwrap().undo_file.unwrap());
    undo(&undo_file, &image).unwrap();
    assert_eq!(std::fs::read(&image).unwrap(), bytes);
    let report = check(&CheckOptions::repair(&image), &Silent).unwrap();
    let undo_file = image.with_file_name(report.images[0].repair.clone().unwrap().undo_file.unwrap());
    assert!(undo_file.to_string_lossy().ends_with(".undo.2"), "the first one is kept");
    let repaired = std::fs::read(&image).unwrap();
    std::fs::write(&image, &repaired).unwrap();
    let error = undo(&undo_file, &image).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Parameter);
    assert_eq!(std::fs::read(&image).unwrap(), repaired);
}

#[test]
fn a_child_that_lost_its_table_but_holds_data_stays() {
    let (folder, image) = bundle();
    let path = folder.path();
    let child = path.join(format!("disk.hds.{}", Guid::random()));
    let mut bytes = std::fs::read(&image).unwrap();
    bytes.resize(bytes.len() + 32768, 7);
    std::fs::write(&child, &bytes).unwrap();
    let report = check(&CheckOptions::repair(path), &Silent).unwrap();
    assert!(child.exists() && report.files_removed.is_empty(), "{report:?}");
    assert_eq!(report.findings.total(Kind::Unreferenced), 1);
}

#[test]
fn files_of_a_cut_conversion_go_with_its_plan() {
    let (folder, image) = bundle();
    let path = folder.path();
    let plan = path.join("DiskDescriptor.xml.plan");
    std::fs::copy(&image, path.join("unfinished")).unwrap();
    std::fs::write(&plan, r#"{"new":["unfinished"],"old":["disk.hds"]}"#).unwrap();
    let report = check(&CheckOptions::look(path), &Silent).unwrap();
    assert_eq!(report.findings.total(Kind::Leftover), 2, "{report:?}");
    assert!(plan.exists() && path.join("unfinished").exists());
    let report = check(&CheckOptions::repair(path), &Silent).unwrap();
    assert_eq!(report.files_removed.len(), 2, "{report:?}");
    assert!(!plan.exists() && !path.join("unfinished").exists() && image.exists());
    // One that fits neither state of the descriptor decides nothing.
    std::fs::copy(&image, path.join("mine")).unwrap();
    std::fs::write(&plan, r#"{"new":["mine"],"old":["other"]}"#).unwrap();
    check(&CheckOptions::repair(path), &Silent).unwrap();
    assert!(path.join("mine").exists());
}
