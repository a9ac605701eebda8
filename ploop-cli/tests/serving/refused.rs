//! A refused command has changed nothing: files, their content, the run-time folder, loop devices are compared before and
//! after, for a table of refusals.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::ground::{Ground, program, text};
use crate::partitions::{MIB, has, import, partitioned};

/// Everything that a refused command must leave as it was.
#[derive(Debug, PartialEq)]
struct World {
    /// Length and digest of each file.
    files: BTreeMap<PathBuf, (u64, String)>,
    /// What lies in the run-time folder.
    running: Vec<String>,
    /// Loop devices over files of this test.
    loops: Vec<String>,
    /// Mounts in the test's folder.
    mounts: Vec<String>,
}

fn walk(folder: &Path, files: &mut BTreeMap<PathBuf, (u64, String)>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            files.insert(path.clone(), (0, "folder".to_owned()));
            walk(&path, files);
        } else if path.extension().is_none_or(|extension| extension != "lck") {
            // The lock file beside a descriptor may come and stays.
            let bytes = fs::read(&path).unwrap();
            files.insert(path, (bytes.len() as u64, blake3::hash(&bytes).to_string()));
        }
    }
}

impl World {
    fn of(ground: &Ground) -> Self {
        let mut files = BTreeMap::new();
        walk(&ground.path("disks"), &mut files);
        // The lock of the run-time folder may come and stays.
        let names =
            |entries: fs::ReadDir| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let running = fs::read_dir(ground.path("run"))
            .map(|entries| names(entries).filter(|name| name != ".lock").collect())
            .unwrap_or_default();
        let here = text(&ground.path("")).to_owned();
        let backing = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("loop/backing_file")).ok();
        let mut loops: Vec<String> = fs::read_dir("/sys/block")
            .unwrap()
            .filter_map(|entry| backing(entry.unwrap()))
            .filter(|file| file.starts_with(&here))
            .collect();
        loops.sort();
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|line| line.contains(&here))
            .map(str::to_owned)
            .collect();
        Self { files, running, loops, mounts }
    }
}

/// A partition that lies over another.
fn damage_table(raw: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(raw).unwrap();
    file.write_all_at(&3000_u32.to_le_bytes(), 446 + 16 + 8).unwrap();
}

#[test]
fn a_refused_command_has_changed_nothing() {
    let Some(ground) = Ground::new() else { return };
    if !has("sfdisk") || !has("mkswap") || !has("mkfs.ext4") || !has("mkfs.xfs") {
        return;
    }
    ground.make_folder("disks/empty");
    let point = ground.make_folder("disks/mnt");
    let raw = ground.path("swap.raw");
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    program("mkswap", &[text(&raw)]);
    let swap = import(&ground, &raw, "disks/swap");
    ground.ends_with(0, &["snapshot", "-u", "11111111-1111-1111-1111-111111111111", text(&swap)]);
    // The first opening for writing takes the mark of an image that was never written away.
    let device = ground.mount(&[text(&swap)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let two = "label: dos\nstart=2048, size=20480, type=83\nstart=22528, type=83\n";
    let two = import(&ground, &partitioned(&ground, "two.raw", 64, two), "disks/two");
    let three = "label: gpt\nstart=2048, size=20480\nstart=22528, size=20480\nstart=43008, size=2048\n";
    let three = import(&ground, &partitioned(&ground, "three.raw", 64, three), "disks/three");
    let bad = partitioned(&ground, "bad.raw", 64, "label: dos\n2048 20480 83\n22528 20480 83\n");
    damage_table(&bad);
    let bad = import(&ground, &bad, "disks/bad");
    let ext = ground.path("ext.raw");
    fs::File::create(&ext).unwrap().set_len(64 * MIB).unwrap();
    program("mkfs.ext4", &["-q", text(&ext)]);
    let mounted = import(&ground, &ext, "disks/ext");
    let (swap, two, three, bad, mounted) =
        (text(&swap), text(&two), text(&three), text(&bad), text(&mounted));
    let (point, empty) = (text(&point), ground.path("disks/empty"));
    let (missing, new) = (ground.path("disks/missing"), empty.join("new.hds"));
    let (missing, new, image) = (text(&missing), text(&new), format!("{two}/root.hds"));
    let garbage = ground.path("disks/garbage");
    fs::write(&garbage, vec![0x5A; 100_000]).unwrap();
    let other = "22222222-2222-2222-2222-222222222222";
    let table: &[(i32, &[&str])] = &[
        (26, &["resize", "-s", "32M", swap]),
        (33, &["resize", "-s", "96M", "--partition", "1", two]),
        (38, &["resize", "-s", "96M", "--partition", "7", two]),
        (33, &["resize", "-s", "8M", two]),
        (33, &["resize", "--force", "-s", "8M", two]),
        (33, &["resize", "-s", "96M", bad]),
        (33, &["resize", "-s", "32M", bad]),
        (38, &["resize", "-s", "96M", "--partition", "1", swap]),
        (38, &["resize", "-s", "0", two]),
        (38, &["resize", "-s", "100000T", two]),
        (38, &["resize", "-b", "-s", "96M", two]),
        (26, &["resize", "-s", "1M", mounted]),
        (33, &["resize", "-s", "16M", three]),
        (38, &["grow", "-s", "32M", two]),
        (38, &["grow", "-s", "100000T", two]),
        (21, &["mount", "-m", missing, two]),
        (21, &["mount", "-m", &image, two]),
        (21, &["mount", "-m", point, swap]),
        (21, &["mount", "-o", "nonsense=1", "-m", point, mounted]),
        (38, &["mount", "--partition", "9", two]),
        (38, &["mount", "--partition", "1", swap]),
        (33, &["mount", bad]),
        (21, &["tsnapshot", "-c", "backup", "-m", missing, two]),
        (24, &["init", "-s", "8M", "-t", "xfs", new]),
        (38, &["init", "-s", "64M", "-b", "100", new]),
        (38, &["init", "-s", "64M", "-t", "none", &image]),
        (38, &["import", text(&raw), &image]),
        (38, &["import", "-b", "100", text(&raw), new]),
        (38, &["export", two, &image]),
        (43, &["export", "-u", other, two, new]),
        (43, &["clone", "-u", other, two, missing]),
        (38, &["convert", "-b", "100", two]),
        (43, &["snapshot-delete", "-u", other, swap]),
        (43, &["snapshot-switch", "-u", other, swap]),
        (43, &["snapshot-merge", "-u", other, swap]),
        (38, &["snapshot", "-u", "11111111-1111-1111-1111-111111111111", swap]),
    ];
    let before = World::of(&ground);
    let mut wrong = String::new();
    for (code, line) in table {
        let output = ground.run(line);
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() != Some(*code) {
            wrong += &format!("{line:?}: {:?} instead of {code}: {said}\n", output.status.code());
        }
        let after = World::of(&ground);
        if after != before {
            let other = |one: &World, two: &World| {
                one.files
                    .iter()
                    .filter(|file| two.files.get(file.0) != Some(file.1))
                    .map(|file| file.0.clone())
                    .collect::<Vec<_>>()
            };
            wrong += &format!(
                "{line:?} has changed {:?}, new {:?}, {:?} {:?} {:?}\n",
                other(&before, &after),
                other(&after, &before),
                after.running,
                after.loops,
                after.mounts
            );
            break;
        }
    }
    // What a receiver is fed.
    let mut child = ground.command(&["copy", "-d", new]);
    let garbage = fs::File::open(&garbage).unwrap();
    let output = child.stdin(garbage).stderr(Stdio::piped()).output().unwrap();
    assert!(!output.status.success());
    assert!(wrong.is_empty(), "\n{wrong}");
    assert_eq!(World::of(&ground), before, "copy -d: {}", String::from_utf8_lossy(&output.stderr));
}

/// The temporary snapshot of a mount that fails goes again; the state of the disk is what it was.
#[test]
fn a_temporary_snapshot_that_cannot_be_mounted_goes() {
    let Some(ground) = Ground::new() else { return };
    if !has("mkswap") {
        return;
    }
    let raw = ground.path("swap.raw");
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    program("mkswap", &[text(&raw)]);
    let swap = import(&ground, &raw, "swap");
    let point = ground.make_folder("mnt");
    let names = || {
        let names = fs::read_dir(&swap).unwrap().map(|entry| entry.unwrap().file_name());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    ground.ends_with(0, &["snapshot-list", text(&swap)]);
    let before = names();
    ground.ends_with(21, &["tsnapshot", "-c", "backup", "-m", text(&point), text(&swap)]);
    assert_eq!(names(), before);
    assert_eq!(ground.ends_with(0, &["snapshot-list", "-H", text(&swap)]).lines().count(), 1);
    assert!(ground.runtime().states().unwrap().is_empty());
    let out = ground.path("out.raw");
    ground.ends_with(0, &["export", text(&swap), text(&out)]);
    assert!(fs::read(out).unwrap() == fs::read(raw).unwrap());
}
