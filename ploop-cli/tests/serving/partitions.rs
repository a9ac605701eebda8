//! Disks with a DOS or GPT partition table, as other programs make them: the partition that is meant is mounted and
//! grows; sfdisk and e2fsck judge.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::ground::{Ground, program, text};

pub(crate) const MIB: u64 = 1 << 20;

/// Whether a program is there; says so when not.
pub(crate) fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
    }
    found
}

/// A raw file of `size_mib` with the table that this script of sfdisk makes.
pub(crate) fn partitioned(ground: &Ground, name: &str, size_mib: u64, script: &str) -> PathBuf {
    let raw = ground.path(name);
    fs::File::create(&raw).unwrap().set_len(size_mib * MIB).unwrap();
    let mut child = Command::new("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .arg(&raw)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    raw
}

/// Imports a raw file; the folder of the disk.
pub(crate) fn import(ground: &Ground, raw: &Path, name: &str) -> PathBuf {
    let folder = ground.make_folder(name);
    ground.ends_with(0, &["import", "-b", "128", text(raw), text(&folder.join("root.hds"))]);
    folder
}

/// The partitions as sfdisk sees them on the exported disk: number, first sector, sectors. The table must be sound.
fn judged(ground: &Ground, disk: &Path) -> Vec<(u64, u64, u64)> {
    let raw = ground.path("judged.raw");
    fs::remove_file(&raw).ok();
    ground.ends_with(0, &["export", text(disk), text(&raw)]);
    program("sfdisk", &["--verify", text(&raw)]);
    let table: serde_json::Value =
        serde_json::from_str(&program("sfdisk", &["--json", text(&raw)])).expect("JSON");
    let number = |one: &serde_json::Value| {
        one["node"]
            .as_str()
            .unwrap()
            .strip_prefix(text(&raw))
            .unwrap()
            .trim_start_matches('p')
            .parse()
            .unwrap()
    };
    table["partitiontable"]["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (number(one), one["start"].as_u64().unwrap(), one["size"].as_u64().unwrap()))
        .collect()
}

/// Makes ext4 on a partition and a file in it.
fn fill(ground: &Ground, disk: &Path, partition: &str, label: &str) {
    let device = ground.mount(&["--partition", partition, text(disk)]);
    program("mkfs.ext4", &["-q", "-L", label, text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("mnt");
    ground.mount(&["--partition", partition, "-m", text(&point), text(disk)]);
    fs::write(point.join("file"), label.repeat(50_000)).unwrap();
    ground.ends_with(0, &["umount", text(&point)]);
}

/// The file is there and the file system is sound and at least so long.
#[track_caller]
fn expect(ground: &Ground, disk: &Path, partition: &str, label: &str, least: u64) {
    let device = ground.mount(&["-r", "--partition", partition, text(disk)]);
    program("e2fsck", &["-f", "-n", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("mnt");
    ground.mount(&["-r", "--partition", partition, "-m", text(&point), text(disk)]);
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), label.repeat(50_000));
    let all = nix::sys::statvfs::statvfs(&point).unwrap();
    assert!(all.blocks() * all.fragment_size() >= least);
    ground.ends_with(0, &["umount", text(&point)]);
}

/// In each of the places where the last partition may be, it grows and shrinks with its file system.
#[test]
fn the_last_partition_grows_and_shrinks_with_its_file_system() {
    let Some(ground) = Ground::new() else { return };
    if !has("sfdisk") || !has("mkfs.ext4") || !has("resize2fs") {
        return;
    }
    for (name, script, last) in [
        ("one", "label: dos\nstart=2048, type=83, bootable\n", 1),
        ("old", "label: dos\nstart=63, type=83\n", 1),
        ("three", "label: dos\n2048 20480 c\n22528 20480 82\n43008 + 83\n", 3),
        (
            "logical",
            "label: dos\nstart=2048, size=20480, type=83\nstart=22528, type=5\nstart=24576, size=40960, type=82\n\
             start=69632, type=83\n",
            6,
        ),
        (
            "first-logical",
            "label: dos\nstart=2048, size=20480, type=83\nstart=22528, type=f\nstart=24576, type=83\n",
            5,
        ),
        ("gpt", "label: gpt\nsize=20480, name=boot\nname=root\n", 2),
    ] {
        let disk = import(&ground, &partitioned(&ground, &format!("{name}.raw"), 100, script), name);
        let number = last.to_string();
        fill(&ground, &disk, &number, name);
        let before = judged(&ground, &disk);
        let one = |table: &[(u64, u64, u64)]| *table.iter().find(|one| one.0 == last).unwrap();
        for (target, size) in [("150M", 150), ("80M", 80), ("80M", 80)] {
            let said = ground.ends_with(0, &["resize", "-s", target, text(&disk)]);
            assert!(said.contains("file system: ext4") && said.contains("partition:"), "{name}: {said}");
            let now = judged(&ground, &disk);
            let (_, start, sectors) = one(&now);
            assert_eq!(start, one(&before).1, "{name}");
            // Up to the end, but for the second copy of a GPT.
            let room = size * 2048 - (start + sectors);
            assert!(
                room <= if name == "gpt" { 40 } else { 8 },
                "{name} at {target}: {room} sectors are left over"
            );
            for (number, start, sectors) in &before {
                let is_around = *start <= one(&before).1 && start + sectors > one(&before).1;
                let stays = now.contains(&(*number, *start, *sectors));
                assert!(is_around || stays, "{name}: partition {number} has changed: {now:?}");
            }
            expect(&ground, &disk, &number, name, (sectors * 512) * 4 / 5);
        }
    }
}

#[test]
fn the_partition_that_is_meant_is_shown_or_all_are_named() {
    let Some(ground) = Ground::new() else { return };
    if !has("sfdisk") || !has("mkfs.ext4") {
        return;
    }
    let script = "label: dos\nlabel-id: 0xcafef00d\n2048 40960 83\n43008 + 83\n";
    let disk = import(&ground, &partitioned(&ground, "two.raw", 64, script), "two");
    fill(&ground, &disk, "1", "boot");
    fill(&ground, &disk, "2", "root");
    let point = ground.make_folder("mnt");
    for (chosen, label) in [("2", "root"), ("root", "root"), ("CAFEF00D-02", "root"), ("boot", "boot")] {
        let said = ground.ends_with(0, &["mount", "--partition", chosen, "-m", text(&point), text(&disk)]);
        assert!(!said.contains("warning"), "{said}");
        assert!(fs::read_to_string(point.join("file")).unwrap().starts_with(label), "{chosen}");
        ground.ends_with(0, &["umount", text(&point)]);
    }
    // The first one, as always, and which others there are.
    let said = ground.ends_with(0, &["mount", "-m", text(&point), text(&disk)]);
    assert!(fs::read_to_string(point.join("file")).unwrap().starts_with("boot"));
    assert!(said.contains("1 (20 MiB), 2 (43 MiB)"), "{said}");
    ground.ends_with(0, &["umount", text(&point)]);
    let said = ground.ends_with(38, &["mount", "--partition", "data", text(&disk)]);
    assert!(said.contains("1 (20 MiB), 2 (43 MiB)"), "{said}");
    assert!(ground.runtime().states().unwrap().is_empty(), "nothing is left");
    let said = ground.ends_with(0, &["info", text(&disk)]);
    assert!(said.contains("dos 2, 43 MiB") && said.contains("type 83"), "{said}");
    let said = ground.ends_with(0, &["--json", "info", text(&disk)]);
    let value: serde_json::Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!(value["partition_table"]["scheme"], "dos");
    assert_eq!(value["partition_table"]["partitions"][1]["offset"], 43008 * 512);
    // The same of a running disk.
    let device = ground.mount(&["-n", text(&disk)]);
    assert!(ground.ends_with(0, &["info", text(&disk)]).contains("dos 2,"));
    // The whole of it is its user's: the table is left alone.
    let before = fs::read(&device).unwrap();
    let said = ground.ends_with(0, &["resize", "-s", "80M", text(&device)]);
    assert!(said.contains("left alone:  a partition table (dos)"), "{said}");
    assert!(fs::read(&device).unwrap().starts_with(&before));
    ground.ends_with(0, &["umount", text(&device)]);
}

/// A mounted partition of a DOS table; xfs, which asks for no capability.
#[test]
fn a_mounted_dos_partition_grows() {
    let Some(ground) = Ground::new() else { return };
    if !has("sfdisk") || !has("xfs_growfs") {
        return;
    }
    let script = "label: dos\nstart=2048, size=20480, type=83\nstart=22528, type=5\nstart=24576, type=83\n";
    let disk = import(&ground, &partitioned(&ground, "xfs.raw", 400, script), "xfs");
    let device = ground.mount(&["--partition", "5", text(&disk)]);
    program("mkfs.xfs", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("mnt");
    ground.mount(&["--partition", "5", "-m", text(&point), text(&disk)]);
    fs::write(point.join("file"), vec![7; 1 << 20]).unwrap();
    ground.ends_with(0, &["resize", "-s", "900M", text(&point)]);
    let all = nix::sys::statvfs::statvfs(&point).unwrap();
    assert!(all.blocks() * all.fragment_size() > 800 * MIB);
    fs::write(point.join("large"), vec![9; 600 << 20]).unwrap();
    ground.ends_with(0, &["umount", text(&point)]);
    let table = judged(&ground, &disk);
    assert!(table.contains(&(5, 24576, 900 * 2048 - 24576)), "{table:?}");
    let device = ground.mount(&["-r", "--partition", "5", text(&disk)]);
    program("xfs_repair", &["-n", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    // The first partition cannot grow, and nothing does.
    let device = ground.mount(&["--partition", "1", text(&disk)]);
    let said = ground.ends_with(33, &["resize", "-s", "1G", text(&device)]);
    assert!(said.contains("not the last one") && said.contains("nothing was changed"), "{said}");
    ground.ends_with(0, &["umount", text(&device)]);
    assert_eq!(judged(&ground, &disk), table);
}
