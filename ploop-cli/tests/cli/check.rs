//! `ploop check`: options and exit codes as the original's, what people read, repairs and their undoing.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::support::ploop;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A disk of 64 MiB in a folder, without a file system.
fn disk() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.hds");
    ploop(&["init", "-s", "64M", "-t", "none", text(&image)]).succeeded();
    (folder, image)
}

fn patch(image: &Path, at: u64, bytes: &[u8]) {
    let mut file = fs::OpenOptions::new().write(true).open(image).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Guest clusters 0 and 1 in one place, an entry past the end.
fn damage(image: &Path) {
    fs::OpenOptions::new().write(true).open(image).unwrap().set_len(2 << 20).unwrap();
    patch(image, 1 << 20, &[7; 4096]);
    patch(image, 64, &[1, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0]);
    patch(image, 52, &[0]);
}

#[test]
fn a_sound_disk() {
    let (folder, image) = disk();
    let said = ploop(&["check", text(&image)]).succeeded();
    assert!(said.contains("skipped") && said.contains("-f"), "{said}");
    let said = ploop(&["check", "-f", "-r", text(folder.path())]).succeeded();
    assert!(said.contains("disk.hds: sound") && said.contains("0 of 64 clusters"), "{said}");
    let said = ploop(&["--json", "check", "-f", text(folder.path())]).succeeded();
    let value: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((value["outcome"].as_str(), value["exit_code"].as_u64()), (Some("sound"), Some(0)));
    assert_eq!(ploop(&["check", "-fs", text(&image)]).succeeded(), "");
    let ran = ploop(&["fsck", "-f", text(&image)]);
    assert!(ran.stderr.contains("old name") && ran.code == 0);
}

#[test]
fn damage_is_told_repaired_and_the_repair_taken_back() {
    let (folder, image) = disk();
    damage(&image);
    let before = fs::read(&image).unwrap();
    for options in [&["-f"][..], &["-f", "-r"], &["-f", "-c", "-d"]] {
        let mut line = vec!["check"];
        line.extend(options);
        line.push(text(&image));
        let ran = ploop(&line);
        ran.failed_with(11, &["damaged", "--repair"]);
        assert!(ran.stdout.contains("guest cluster 1"), "{}", ran.stdout);
        assert!(ran.stdout.contains("repair: copy"), "{}", ran.stdout);
        assert_eq!(fs::read(&image).unwrap(), before, "{options:?} changed the image");
    }
    let said = ploop(&["check", "--repair", text(folder.path())]).succeeded();
    assert!(said.contains("1 entries cleared, 1 clusters copied") && said.contains("--undo"), "{said}");
    let said = ploop(&["check", "-f", text(folder.path())]).succeeded();
    assert!(said.contains("sound"), "{said}");
    let repaired = fs::read(&image).unwrap();
    assert_eq!(repaired[1 << 20..2 << 20], repaired[2 << 20..3 << 20]);
    let undo = folder.path().join("disk.hds.undo");
    ploop(&["check", "--undo", text(&undo), text(&image)]).succeeded();
    assert_eq!(fs::read(&image).unwrap(), before);
    ploop(&["check", "-F", text(&image)]).succeeded();
    let undo = folder.path().join("disk.hds.undo.2");
    patch(&image, 1 << 20, &[8; 512]);
    ploop(&["check", "--undo", text(&undo), text(&image)])
        .failed_with(38, &["written since", "nothing was changed"]);
}

#[test]
fn an_image_that_was_not_closed() {
    let (folder, image) = disk();
    patch(&image, 44, &0x746F_6E59u32.to_le_bytes());
    ploop(&["check", text(&image)]).failed_with(37, &["not closed", "-d"]);
    ploop(&["check", "-r", text(&image)]).failed_with(37, &["not closed"]);
    ploop(&["check", "-r", "-d", text(&image)]).failed_with(7, &["-r"]);
    ploop(&["check", "-d", text(&image)]).succeeded();
    ploop(&["check", "-r", text(&image)]).succeeded();
    patch(&image, 44, &0x746F_6E59u32.to_le_bytes());
    let said = ploop(&["check", text(folder.path())]).succeeded();
    assert!(said.contains("repaired"), "a descriptor repairs what a crash leaves: {said}");
}

#[test]
fn snapshots_raw_images_and_what_is_refused() {
    let (folder, image) = disk();
    ploop(&["check", "-u", "base", text(folder.path())]).succeeded();
    ploop(&["check", "-u", "{10000000-0000-0000-0000-000000000001}", text(folder.path())])
        .failed_with(43, &[]);
    ploop(&["check", "-D", text(&image)]).failed_with(38, &["ploop compact"]);
    ploop(&["check", "-b", "1M", text(&image)]).failed_with(38, &["--raw"]);
    ploop(&["check", "-r", "--repair", text(&image)]).failed_with(38, &["--repair"]);
    let raw = folder.path().join("raw.img");
    fs::write(&raw, vec![1; 5000]).unwrap();
    ploop(&["check", "-R", "-b", "8", "-r", text(&raw)]).succeeded();
    assert_eq!(fs::metadata(&raw).unwrap().len(), 5000);
    ploop(&["check", "-R", "-b", "8", text(&raw)]).succeeded();
    assert_eq!(fs::metadata(&raw).unwrap().len(), 5000, "a check changes the length of no raw disk");
    ploop(&["check", "-R", "-b", "8", "--repair", text(&raw)]).succeeded();
    assert_eq!(fs::metadata(&raw).unwrap().len(), 5120);
    let ran = ploop(&["check", "-f", text(&raw)]);
    ran.failed_with(11, &[]);
    assert!(ran.stdout.contains("cannot be read"), "{}", ran.stdout);
}
