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

/// An image of 20 clusters with a stored bitmap; its extension's cluster and that of its bits.
fn with_bitmap() -> (SimStorage, u32, u32) {
    use crate::extent::Extent;
    use crate::format::stored_bitmap::{DirtyBits, store};
    use crate::format::testing::small;
    let file = image(20);
    let mut bits = DirtyBits::new([7; 16], 8, &small(20)).unwrap();
    bits.mark(Extent::between(8192, 12288));
    store(&file, &[bits]).unwrap();
    let mut header = [0; 64];
    file.read_exact_at(0, &mut header).unwrap();
    let extension = u32::try_from(crate::format::RawHeader::decode(&header).extension_sectors / 8).unwrap();
    let other = [1, 2].into_iter().find(|&cluster| cluster != extension).unwrap();
    (file, extension, other)
}

#[test]
fn an_entry_that_names_the_extension_or_a_bitmap_is_damage() {
    use crate::format::testing::open as open_chain;
    use crate::format::{Mapping, stored_bitmap};
    use crate::units::GuestOffset;
    for (of_extension, kept) in [(true, 0), (false, 0)] {
        let (file, extension, bits) = with_bitmap();
        assert_eq!(checked(&file, &CheckOptions::look("image")).outcome, Outcome::Sound);
        let place = if of_extension { extension } else { bits };
        set_entry(&file, 5, place);
        let before = content(&file);
        for options in
            [CheckOptions::look("image"), CheckOptions { force: true, drop_in_use: true, ..as_typed() }]
        {
            let report = checked(&file, &options);
            assert_eq!((report.outcome, report.exit_code), (Outcome::Damaged, 11), "{report:?}");
            let findings = &report.images[0].findings;
            assert_eq!(findings.total(Kind::EntryIntoExtension), 1);
            let example = findings.examples.iter().find(|one| one.kind == Kind::EntryIntoExtension).unwrap();
            assert_eq!(
                (example.guest_cluster, example.file_offset),
                (Some(5), Some(u64::from(place) * 4096))
            );
        }
        let error = open_chain(&[&file], Access::ReadWrite).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(content(&file) == before, "it was written");
        // For reading it is there, and after the repair the guest reads the same.
        let reads = |file: &SimStorage| {
            let chain = open_chain(&[file], Access::ReadOnly).unwrap();
            let Mapping::Data { offset, .. } = chain.map(GuestOffset(5 * 4096), 4096) else { panic!("lost") };
            let mut bytes = vec![0; 4096];
            file.read_exact_at(offset.0, &mut bytes).unwrap();
            bytes
        };
        let foreign = reads(&file);
        let report = checked(&file, &CheckOptions::repair("image"));
        assert_eq!((report.outcome, report.exit_code), (Outcome::Repaired, 0), "{report:?}");
        assert!(report.images[0].repair.as_ref().unwrap().undo_file.is_some());
        assert_eq!(reads(&file), foreign);
        assert_eq!(checked(&file, &CheckOptions::look("image")).outcome, Outcome::Sound);
        let valid = stored_bitmap::load(&file).unwrap();
        assert_eq!(valid.len(), kept, "a bitmap that a guest has written counts for nothing");
        open_chain(&[&file], Access::ReadWrite).unwrap().close().unwrap();
    }
}

#[test]
fn what_somebody_has_only_read_is_filled_as_well() {
    use crate::io::Allocation;
    use crate::io::file::{FileStorage, OpenOptions};
    let (folder, image) = bundle();
    {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
        let file = FileStorage::from_file(file, &image, &OpenOptions::new(Access::ReadWrite)).unwrap();
        // Of a new image the whole first cluster is written.
        match file.next_written(0) {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                println!(
                    "SKIP: the file system of {} does not tell what is written",
                    folder.path().display()
                );
                return;
            }
            found => assert_eq!(found.unwrap(), Some((0, 32768))),
        }
        file.set_len(4 * 32768).unwrap();
        file.allocate(32768, 3 * 32768, Allocation::Reserve).unwrap();
        set_entry(&file, 0, 1);
        set_entry(&file, 1, 3);
        // As `cat` does: now a cached page of what is only reserved is data for SEEK_DATA.
        content(&file);
        assert_eq!(file.next_data(32768).unwrap().map(|found| found.0), Some(32768));
        assert_eq!(file.next_written(32768).unwrap(), None);
        file.write_all_at(32768, &[5; 4096]).unwrap();
    }
    let before = std::fs::read(&image).unwrap();
    let options = CheckOptions { read_only: false, fill_holes: true, ..CheckOptions::look(folder.path()) };
    let report = check(&options, &Silent).unwrap();
    assert_eq!(report.images[0].filled_hole_bytes, 2 * 32768 - 4096, "{report:?}");
    assert_eq!(std::fs::read(&image).unwrap()[68..], before[68..]);
    let file = FileStorage::open(&image, &OpenOptions::new(Access::ReadOnly)).unwrap();
    assert_eq!(file.next_written(0).unwrap().map(|found| found.0), Some(0));
    for cluster in [1, 3] {
        let mut at = cluster * 32768;
        while at < (cluster + 1) * 32768 {
            let (start, end) = file.next_written(at).unwrap().unwrap();
            assert_eq!(start, at, "a hole in a cluster in use");
            at = end;
        }
    }
    assert_eq!(
        check(&options, &Silent).unwrap().images[0].filled_hole_bytes,
        0,
        "a second run finds nothing"
    );
}
