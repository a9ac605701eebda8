//! Options that scripts written for the original command use.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::referee;
use crate::support::{PLOOP, ploop, stage};

/// Runs a line of shell, `$PLOOP` being the command; exit code and stderr.
fn shell(folder: &Path, line: &str) -> (i32, String) {
    let output = Command::new("sh")
        .args(["-c", line])
        .env("PLOOP", PLOOP)
        .current_dir(folder)
        .output()
        .expect("run a shell");
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A closed disk of 8 MiB in `folder`, with something on it.
fn closed_disk(folder: &Path) {
    fs::create_dir(folder.join("from")).unwrap();
    let raw = folder.join("from/disk.hds");
    ploop(&["init", "-s", "8M", "-t", "none", "-f", "raw", &raw.to_string_lossy()]).succeeded();
    let mut bytes = vec![0; 8 << 20];
    bytes[1 << 20..][..5000].fill(0x5A);
    fs::write(&raw, bytes).unwrap();
}

#[test]
fn a_copy_goes_through_descriptors_given_by_number() {
    let folder = referee::folder();
    closed_disk(folder.path());
    let line = "set -e; mkdir one two; mkfifo back
        $PLOOP copy -s from/disk.hds -o 5 5>&1 >/dev/null | $PLOOP copy -d one/disk.hds -i 6 6<&0 </dev/null
        cmp from/disk.hds one/disk.hds
        $PLOOP --json copy -s from/disk.hds -o 5 -f 6 5>&1 6<back >/dev/null |
            $PLOOP copy -d two/disk.hds -i 6 -f 7 6<&0 7>back </dev/null
        cmp from/disk.hds two/disk.hds";
    let (code, stderr) = shell(folder.path(), line);
    assert_eq!(code, 0, "{stderr}");
    // The second one was answered.
    assert!(stderr.contains("\"committed\":true"), "{stderr}");
}

#[test]
fn the_stream_of_the_original_is_sent_where_it_is_asked_for() {
    let folder = referee::folder();
    closed_disk(folder.path());
    let line = "set -e; mkdir one two; mkfifo back
        $PLOOP copy -s from/disk.hds --protocol 1 | $PLOOP copy -d one/disk.hds
        $PLOOP copy -s from/disk.hds --protocol 1 -o 5 -f 6 5>&1 6<back >/dev/null |
            $PLOOP copy -d two/disk.hds -f 7 7>back
        cmp one/disk.hds two/disk.hds
        $PLOOP copy -s one/disk.hds -d back.raw -f raw
        cmp from/disk.hds back.raw";
    let (code, stderr) = shell(folder.path(), line);
    assert_eq!(code, 0, "{stderr}");
    let refused = shell(folder.path(), "$PLOOP copy -s from/disk.hds --protocol 1 -d three.hds");
    assert_eq!(refused.0, 38, "{}", refused.1);
}

#[test]
fn a_mounted_disk_is_sent_to_a_receiver_of_the_original() {
    let Some(stage) = stage() else { return };
    let image = stage.init("disk", &["-s", "64M"]);
    let source = stage.mount(&image, &[]);
    let content = vec![7; 3 << 20];
    fs::write(source.point.join("file"), &content).unwrap();
    let target = stage.path("copy.hds");
    let sender = ["copy", "-s", source.point.to_str().unwrap(), "--protocol", "1", "-F", "true"];
    let (sent, received) = stage.copy(&sender, &["copy", "-d", target.to_str().unwrap()], |_| {});
    assert_eq!((sent.code, received.code), (0, 0), "sender: {}\nreceiver: {}", sent.stderr, received.stderr);
    // Thawed: it can be written to.
    fs::write(source.point.join("more"), &content).unwrap();
    let copy = stage.mount(&target, &["-r"]);
    assert!(fs::read(copy.point.join("file")).unwrap() == content);
    assert!(!copy.point.join("more").exists());
}

#[test]
fn descriptors_that_are_not_open_or_not_meant_are_refused() {
    let folder = referee::folder();
    closed_disk(folder.path());
    for line in [
        "$PLOOP copy -s from/disk.hds -o 97",
        "$PLOOP copy -s from/disk.hds -f 97 >/dev/null",
        "$PLOOP copy -d to.hds -i 97",
        "$PLOOP copy -s from/disk.hds -d to.hds -f 5 5>&1",
        "$PLOOP copy -s from/disk.hds -d to.hds -o 5 5>&1",
        "$PLOOP copy -s from/disk.hds -f raw >/dev/null",
    ] {
        let (code, stderr) = shell(folder.path(), line);
        assert_eq!(code, 38, "{line}: {stderr}");
        assert!(!folder.path().join("to.hds").exists(), "{line}");
    }
}

#[test]
fn a_raw_disk_takes_its_space_unless_it_is_made_sparse() {
    let folder = referee::folder();
    for (name, options, takes) in [("whole", &[][..], true), ("sparse", &["-S"][..], false)] {
        fs::create_dir(folder.path().join(name)).unwrap();
        let path = folder.path().join(name).join("disk.hds");
        let line = [&["init", "-s", "4M", "-t", "none", "-f", "raw"], options, &[&*path.to_string_lossy()]];
        ploop(&line.concat()).succeeded();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.blocks() * 512 >= 4 << 20), (4 << 20, takes), "{name}");
    }
    let path = folder.path().join("disk.hds");
    ploop(&["init", "-s", "4M", "-t", "none", "-S", &path.to_string_lossy()]).failed_with(38, &["raw"]);
}

#[test]
fn a_disk_is_mounted_read_only_by_several_components() {
    let Some(stage) = stage() else { return };
    let image = stage.init("disk", &["-s", "64M"]);
    let path = image.to_string_lossy().into_owned();
    let mount = |component: &str| stage.ploop(&["mount", "-r", "-c", component, &path]);
    let first = mount("backup").succeeded();
    let second = mount("audit").succeeded();
    assert_ne!(first, second);
    mount("audit").failed_with(37, &["audit"]);
    let listed = stage.ploop(&["list"]).succeeded();
    assert!(listed.contains(" backup") && listed.contains(" audit"), "{listed}");
    stage.ploop(&["umount", "-c", "nobody", &path]).failed_with(40, &["nobody"]);
    stage.ploop(&["umount", "-c", "audit", &path]).succeeded();
    let listed = stage.ploop(&["list"]).succeeded();
    assert!(listed.contains(first.trim()) && !listed.contains(second.trim()), "{listed}");
    stage.ploop(&["umount", "-c", "backup", &path]).succeeded();
    stage.ploop(&["mount", "-c", "a b", &path]).failed_with(38, &["63"]);
}

/// The line of the table that begins with `word`: size and use.
fn resource(text: &str, word: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.starts_with(word))?;
    let mut numbers = line.split_whitespace().skip(1).map(|number| number.parse().unwrap());
    Some((numbers.next()?, numbers.next()?))
}

#[test]
fn info_tells_how_full_the_file_system_is_also_when_it_is_not_mounted() {
    let Some(stage) = stage() else { return };
    let image = stage.init("disk", &["-s", "64M"]);
    let folder = image.parent().unwrap();
    let info = |which: &[&str]| stage.ploop(&[&["info"], which].concat()).succeeded();
    let descriptor = folder.join("DiskDescriptor.xml").to_string_lossy().into_owned();
    assert_eq!(resource(&info(&[&descriptor]), "1k-blocks"), None, "it was never mounted");
    let mounted = stage.mount(&image, &[]);
    fs::write(mounted.point.join("file"), vec![1; 1 << 20]).unwrap();
    assert!(Command::new("sync").arg("-f").arg(&mounted.point).status().unwrap().success());
    let text = info(&["-d", &mounted.device.to_string_lossy()]);
    let (size, used) = resource(&text, "1k-blocks").unwrap();
    assert!(size > 32 << 10 && size < 64 << 10 && used >= 1 << 10 && used < size, "{text}");
    let (inodes, inodes_used) = resource(&text, "inodes").unwrap();
    assert!(inodes_used > 11 && inodes_used < inodes, "{text}");
    stage.umount(&mounted);
    assert_eq!(fs::metadata(folder.join(".statfs")).unwrap().len(), 40);
    let text = info(&[&descriptor]);
    assert_eq!(resource(&text, "1k-blocks"), Some((size, used)));
    assert_eq!(resource(&text, "inodes"), Some((inodes, inodes_used)));
    // What is mounted for writing changes.
    let mounted = stage.mount(&image, &[]);
    assert!(!folder.join(".statfs").exists());
    stage.umount(&mounted);
    stage.ploop(&["info", "-d", "/dev/null"]).failed_with(40, &[]);
}
