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
