//! Snapshots by the command line: a disk that is closed, then one that is mounted.

use std::fs;

use serde_json::Value;

use crate::support::{ploop, stage};

const ONE: &str = "{11111111-1111-1111-1111-111111111111}";
const TWO: &str = "{22222222-2222-2222-2222-222222222222}";

fn states(disk: &str) -> Vec<String> {
    let list = ploop(&["snapshot-list", "-H", "-o", "uuid", disk]).succeeded();
    list.lines().map(str::to_owned).collect()
}

#[test]
fn the_verbs_on_a_closed_disk() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().to_str().unwrap();
    ploop(&["init", "-s", "16M", "-t", "none", folder.path().join("disk.hds").to_str().unwrap()]).succeeded();
    for name in [ONE, TWO] {
        assert_eq!(ploop(&["snapshot", "-u", name, disk]).succeeded(), format!("{name}\n"));
    }
    ploop(&["snapshot", "-u", ONE, disk]).failed_with(38, &["there is a snapshot"]);
    ploop(&["snapshot", "-d", "/dev/loop0", disk]).failed_with(38, &["advice"]);
    for line in
        [&["snapshot-delete"][..], &["snapshot-switch"], &["snapshot-merge"], &["snapshot-list"], &["diff"]]
    {
        let unknown = "{99999999-9999-9999-9999-999999999999}";
        ploop(&[line, &["-u", unknown, disk]].concat()).failed_with(43, &["no snapshot"]);
    }
    let json: Value = serde_json::from_str(&ploop(&["--json", "snapshot-list", disk]).succeeded()).unwrap();
    let current: Vec<bool> =
        json["states"].as_array().unwrap().iter().map(|state| state["current"].as_bool().unwrap()).collect();
    assert_eq!(current, [false, false, true]);
    let kept = ploop(&["snapshot-switch", "-D", "-u", ONE, disk]).succeeded();
    assert!(states(disk).contains(&kept.trim().to_owned()));
    // Two states stand on ONE now.
    ploop(&["snapshot-merge", disk]).failed_with(38, &["2 states stand on"]);
    let marked = ploop(&["snapshot-delete", "-u", ONE, disk]).succeeded();
    assert!(marked.contains("marked"), "{marked}");
    ploop(&["snapshot-delete", "-u", kept.trim(), disk]).succeeded();
    let report: Value =
        serde_json::from_str(&ploop(&["--json", "snapshot-delete", "-u", TWO, disk]).succeeded()).unwrap();
    assert_eq!(report["snapshot"], TWO);
    assert_eq!(states(disk).len(), 1, "the marked one went as well");
    ploop(&["delete", "-d", "/dev/loop0", "-l", "1"]).failed_with(38, &["snapshot-delete"]);
    ploop(&["rm", "-d", "/dev/loop0", "-l", "1"]).failed_with(38, &["snapshot-delete"]);
}

#[test]
fn what_controls_a_kernel_driver_is_refused_with_what_to_use() {
    for (line, instead) in [
        (&["start", "-d", "/dev/ploop0"][..], "ploop mount"),
        (&["stop", "-d", "/dev/ploop0"], "ploop umount"),
        (&["clear", "-d", "/dev/ploop0"], "ploop umount"),
        (&["tg-init", "/dev/ploop0", "x"], "ploop copy"),
        (&["tg-deinit", "/dev/ploop0"], "ploop copy"),
        (&["tg-status", "/dev/ploop0"], "ploop copy"),
        (&["degrade", "-d", "/dev/ploop0"], "ploop umount"),
        (&["shuffle", "x"], "ploop compact"),
        (&["encrypt", "-k", "key", "x"], "LUKS"),
        (&["stat", "-c", "-d", "/dev/ploop0"], "without them"),
        (&["check", "-D", "x"], "ploop compact"),
        (&["snapshot-merge", "-n", "a/b", "/nowhere"], "advice"),
    ] {
        let ran = ploop(line);
        assert_ne!(ran.code, 0, "{line:?}");
        assert!(ran.stderr.contains(instead), "{line:?}: {}", ran.stderr);
    }
    ploop(&["start"]).failed_with(38, &["kernel driver"]);
    ploop(&["merge", "one"]).failed_with(38, &["--help"]);
    ploop(&["merge", "-d", "/dev/loop0", "one", "two"]).failed_with(38, &["--help"]);
    ploop(&["merge", "-l", "0", "one", "two"]).failed_with(38, &["--device"]);
    ploop(&["merge", "-d", "/dev/loop0", "-l", "2..1"]).failed_with(38, &["not below"]);
    ploop(&["merge", "-d", "/dev/null"]).failed_with(40, &["no mounted disk"]);
    ploop(&["merge", "/nowhere/one", "/nowhere/two"]).failed_with(4, &["/nowhere/one"]);
    ploop(&["stat", "-d", "/dev/null"]).failed_with(40, &["no mounted disk"]);
}

#[test]
fn merges_by_level_by_file_and_into_new_files() {
    let Some(stage) = stage() else { return };
    let image = stage.init("disk", &["-s", "128M", "-n"]);
    let folder = image.parent().unwrap().to_path_buf();
    let disk = folder.to_str().unwrap().to_owned();
    let mounted = stage.mount(&image, &[]);
    let (device, point) = (mounted.device.to_str().unwrap().to_owned(), mounted.point.clone());
    let run = |arguments: &[&str]| stage.ploop(arguments);
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&run(&[&["--json"], arguments].concat()).succeeded()).unwrap()
    };
    fs::write(point.join("first"), vec![1; 3 << 20]).unwrap();
    run(&["snapshot", "-u", ONE, &disk]).succeeded();
    fs::write(point.join("second"), vec![2; 3 << 20]).unwrap();
    run(&["snapshot", "-u", TWO, &disk]).succeeded();
    fs::write(point.join("third"), vec![3; 3 << 20]).unwrap();
    // The running top and the snapshot below it, in a file of their own.
    let merged = run(&["snapshot-merge", "-n", "new.hds", &disk]).succeeded();
    assert!(merged.contains("merged 1 snapshot into new.hds"), "{merged}");
    let list = || run(&["snapshot-list", "-H", "-o", "uuid,fname", &disk]).succeeded();
    assert!(list().contains("new.hds") && !list().contains(TWO), "{}", list());
    run(&["snapshot-merge", "-n", "new.hds", &disk]).failed_with(38, &["new.hds"]);
    run(&["merge", "-d", &device, "-n", "a/b"]).failed_with(38, &["name alone"]);
    run(&["merge", "-d", &device, "-l", "0..9"]).failed_with(38, &["1 is the highest"]);
    run(&["merge", &folder.join("new.hds").to_string_lossy(), &image.to_string_lossy()])
        .failed_with(38, &["snapshot-merge"]);
    // By level: 0 is the base.
    run(&["snapshot", "-u", TWO, &disk]).succeeded();
    fs::write(point.join("fourth"), vec![4; 1 << 20]).unwrap();
    let report = json(&["merge", "-d", &device, "-l", "0..1"]);
    assert_eq!((&report["state"], &report["merged"][0]), (&Value::from(TWO), &Value::from(ONE)));
    // What the server and the file system tell meanwhile.
    let counted = json(&["stat", "-d", &device]);
    assert!(counted["written_bytes"].as_u64().unwrap() > 0, "{counted}");
    assert!(run(&["stat", &disk]).succeeded().contains("flushes"));
    assert_eq!(run(&["balloon", "show", "-d", &device]).succeeded(), "Current balloon size: 0\n");
    fs::write(point.join(".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8"), vec![0; 1 << 20]).unwrap();
    let held = run(&["balloon", "status", "-m", point.to_str().unwrap()]).succeeded();
    assert!(held.ends_with("Current balloon size: 1048576\n") && held.starts_with("No balloon"), "{held}");
    let stat = json(&["balloon", "discard", "--stat", &disk]);
    assert_eq!(
        (&stat["balloon_bytes"], &stat["disk_bytes"]),
        (&Value::from(1 << 20), &Value::from(128 << 20))
    );
    assert!(stat["image_bytes"].as_u64().unwrap() >= 5 << 20, "{stat}");
    run(&["umount", &disk]).succeeded();
    // By file: the descriptor knows better, until it is gone.
    let files: Vec<String> =
        list().lines().map(|line| line.split_whitespace().last().unwrap().to_owned()).collect();
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let top = files
        .iter()
        .find(|file| list().lines().any(|line| line.contains("5fbaabe3") && line.ends_with(*file)));
    let top = path(top.unwrap());
    let lower = path(files.iter().find(|file| path(file) != top).unwrap());
    run(&["merge", &top, &lower]).failed_with(38, &["snapshot-merge"]);
    run(&["merge", "-n", &path("x"), &lower, &top]).failed_with(38, &["does not stand on"]);
    assert!(run(&["merge", "-n", &path("whole"), &top, &lower]).succeeded().contains("merged 2 images into"));
    run(&["export", &disk, &path("before.raw")]).succeeded();
    let kept = stage.path("kept");
    fs::rename(folder.join("DiskDescriptor.xml"), &kept).unwrap();
    let report = json(&["merge", &top, &lower]);
    assert_eq!(
        (&report["file"], &report["merged"][0]),
        (&Value::from(lower.as_str()), &Value::from(top.as_str()))
    );
    for (name, image) in [("one.raw", path("whole")), ("two.raw", lower.clone())] {
        run(&["export", &image, &path(name)]).succeeded();
        assert!(
            fs::read(folder.join(name)).unwrap() == fs::read(folder.join("before.raw")).unwrap(),
            "{name}"
        );
    }
    assert!(fs::exists(&top).unwrap(), "deltas stay");
}

#[test]
fn a_mounted_disk_and_its_snapshots() {
    let Some(stage) = stage() else { return };
    let image = stage.init("disk", &["-s", "128M", "-n"]);
    let disk = image.parent().unwrap().to_str().unwrap().to_owned();
    let mounted = stage.mount(&image, &[]);
    let file = mounted.point.join("file");
    fs::write(&file, "one").unwrap();
    let run = |arguments: &[&str]| stage.ploop(arguments);
    assert_eq!(run(&["snapshot", "-u", ONE, &disk]).succeeded(), format!("{ONE}\n"));
    fs::write(&file, "two").unwrap();
    // By the device, too.
    run(&["snapshot", "-u", TWO, mounted.device.to_str().unwrap()]).succeeded();
    fs::write(&file, "three").unwrap();
    // What was kept, beside the disk that runs.
    let point = stage.path("frozen");
    fs::create_dir(&point).unwrap();
    for (name, text) in [(ONE, "one"), (TWO, "two")] {
        let options = ["mount", "-u", name, "-m", point.to_str().unwrap(), &disk];
        run(&options).succeeded();
        let found = fs::read_to_string(point.join("file"));
        let busy = (name == ONE).then(|| run(&["snapshot-delete", "-u", name, &disk]));
        run(&["umount", "-m", point.to_str().unwrap()]).succeeded();
        assert_eq!(found.unwrap(), text);
        if let Some(busy) = busy {
            busy.failed_with(37, &[]);
        }
    }
    run(&["snapshot-switch", "-u", ONE, &disk]).failed_with(37, &["mounted as"]);
    run(&["diff", "-u", ONE, "-u", TWO, &disk]).succeeded();
    run(&["snapshot-delete", "-u", ONE, &disk]).succeeded();
    let merged = run(&["snapshot-merge", &disk]).succeeded();
    assert!(merged.contains("merged 1 snapshot into"), "{merged}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "three");
    run(&["umount", &disk]).succeeded();
    let list = run(&["snapshot-list", "-H", "-o", "uuid,fname", &disk]).succeeded();
    assert_eq!(list.lines().count(), 1, "{list}");
    let again = stage.mount(&image, &[]);
    assert_eq!(fs::read_to_string(again.point.join("file")).unwrap(), "three");
}
