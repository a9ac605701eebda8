//! Disks of which a part is missing, or that are named wrongly: no command writes them, those that read say so and fail.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{ploop, stage};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A disk of 8 MiB in a folder, of this format.
fn disk(format: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.hds");
    ploop(&["init", "-s", "8M", "-f", format, "-t", "none", text(&image)]).succeeded();
    (folder, image)
}

/// Half of a raw disk, as a copy that was cut leaves it.
fn half() -> (tempfile::TempDir, PathBuf) {
    let (folder, image) = disk("raw");
    let bytes: Vec<u8> = (0..4u64 << 20).map(|at| (at / 512 % 251) as u8 + 1).collect();
    fs::write(&image, bytes).unwrap();
    (folder, image)
}

/// An image that its descriptor calls raw.
fn said_raw() -> (tempfile::TempDir, PathBuf) {
    let (folder, image) = disk("expanded");
    let path = folder.path().join("DiskDescriptor.xml");
    let xml = fs::read_to_string(&path).unwrap();
    fs::write(path, xml.replace("<Type>Compressed</Type>", "<Type>Plain</Type>")).unwrap();
    // As long as the disk: a raw disk on which a guest has written a header looks the same.
    fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(8 << 20).unwrap();
    (folder, image)
}

#[test]
fn a_part_that_is_missing_is_told_in_bytes_and_places() {
    let (folder, image) = half();
    let ran = ploop(&["check", "-r", "-f", text(folder.path())]);
    ran.failed_with(11, &["missing", "--force-short", "backup"]);
    for word in ["4194304 bytes are missing", "4194304 to 8388607", "DAMAGED"] {
        assert!(ran.stdout.contains(word), "{word}: {}", ran.stdout);
    }
    let ran = ploop(&["--json", "check", text(folder.path())]);
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &report["disagreements"][0]["what"]), (11, &"short".into()));
    assert_eq!(report["disagreements"][0]["held_bytes"], 4 << 20);
    assert!(ploop(&["info", text(folder.path())]).stdout.contains("4194304 bytes are missing"));
    assert_eq!(fs::metadata(image).unwrap().len(), 4 << 20);
}

#[test]
fn no_command_writes_it_and_those_that_read_it_fail_in_the_end() {
    let places = tempfile::tempdir().unwrap();
    for (number, (made, code)) in [(half(), 11), (said_raw(), 39)].into_iter().enumerate() {
        let (folder, image) = made;
        let (disk, before) = (text(folder.path()), fs::read(&image).unwrap());
        let out = places.path().join(format!("{number}.raw"));
        for line in [
            &["snapshot", disk][..],
            &["convert", "-b", "128", disk],
            &["resize", "-s", "16M", disk],
            &["grow", "-s", "16M", disk],
            &["compact", disk],
            &["copy", "-s", disk],
            &["clone", disk, text(&places.path().join("clone"))],
        ] {
            let ran = ploop(line);
            ran.failed_with(code, &["--force-"]);
            assert_eq!(ran.stdout, "", "{line:?} wrote something");
        }
        let ran = ploop(&["export", disk, text(&out)]);
        ran.failed_with(code, &["exported, but", "warning"]);
        assert_eq!(fs::read(&out).unwrap(), before, "what is there is saved");
        let ran = ploop(&["export", disk, "-"]);
        ran.failed_with(code, &["exported, but"]);
        assert_eq!(fs::read(&image).unwrap(), before);
    }
}

#[test]
fn after_a_look_it_becomes_a_disk_again() {
    let (folder, image) = half();
    let content = fs::read(&image).unwrap();
    ploop(&["resize", "--force-short", "-s", "4M", text(folder.path())]).succeeded();
    ploop(&["check", "-f", text(folder.path())]).succeeded();
    assert_eq!(fs::read(&image).unwrap(), content);
    let (folder, image) = half();
    ploop(&["resize", "--force-short", "-s", "8M", text(folder.path())]).succeeded();
    ploop(&["snapshot", text(folder.path())]).succeeded();
    let grown = fs::read(&image).unwrap();
    assert_eq!((grown.len(), &grown[..4 << 20]), (8 << 20, content.as_slice()));
    assert!(grown[4 << 20..].iter().all(|&byte| byte == 0));
}

#[test]
fn it_is_mounted_for_writing_only_when_its_user_says_so() {
    let Some(stage) = stage() else { return };
    for (made, code, word) in [(half(), 11, "--force-short"), (said_raw(), 39, "--force-raw")] {
        let (folder, image) = made;
        let (disk, before) = (text(folder.path()), fs::read(&image).unwrap());
        stage.ploop(&["mount", "-n", disk]).failed_with(code, &[word]);
        assert!(stage.ploop(&["list"]).stdout.is_empty(), "nothing is left served");
        // For reading it is there, and no script takes it for whole.
        let ran = stage.ploop(&["mount", "-n", "-r", disk]);
        ran.failed_with(code, &["mounted for reading", word]);
        assert!(ran.stdout.starts_with("/dev/loop"), "{}", ran.stdout);
        stage.ploop(&["umount", disk]).succeeded();
        assert!(fs::read(&image).unwrap() == before, "it was written");
        let device = stage.ploop(&["mount", "-n", word, disk]).succeeded();
        fs::write(device.trim(), [7; 512]).unwrap();
        stage.ploop(&["umount", disk]).succeeded();
        assert!(fs::read(&image).unwrap()[..512] == [7; 512]);
    }
}

#[test]
fn long_names_are_no_damage_and_leave_room_for_ours() {
    for length in [192, 216, 250, 255] {
        let (folder, image) = disk("expanded");
        let long = folder.path().join("N".repeat(length));
        fs::rename(&image, &long).unwrap();
        let path = folder.path().join("DiskDescriptor.xml");
        let xml = fs::read_to_string(&path).unwrap();
        fs::write(&path, xml.replace("disk.hds", &"N".repeat(length))).unwrap();
        // An entry into the table: what its repair changes goes into an undo file.
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().write(true).open(&long).unwrap();
        file.write_all_at(&u32::MAX.to_le_bytes(), 64).unwrap();
        let disk = text(folder.path());
        let said = ploop(&["check", "--repair", disk]).succeeded();
        assert!(said.contains("--undo"), "{said}");
        ploop(&["snapshot", disk]).succeeded();
        ploop(&["snapshot-merge", disk]).succeeded();
        ploop(&["convert", "-b", "128", disk]).succeeded();
        let out = folder.path().join("O".repeat(length));
        ploop(&["export", disk, text(&out)]).succeeded();
        let copy = tempfile::tempdir().unwrap();
        ploop(&["copy", "-s", disk, "-d", text(&copy.path().join("C".repeat(length)))]).succeeded();
        ploop(&["check", "-f", disk]).succeeded();
    }
}
