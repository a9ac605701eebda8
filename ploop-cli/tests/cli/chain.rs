//! Disks that move with all their snapshots: closed ones, and one that is mounted and written to.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::stage::Ran;
use crate::support::{PLOOP, ploop, stage};
use crate::witness::Witness;

const ONE: &str = "{11111111-1111-1111-1111-111111111111}";
const TWO: &str = "{22222222-2222-2222-2222-222222222222}";
const THREE: &str = "{33333333-3333-3333-3333-333333333333}";

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// What is the same wherever a disk lies: each state, what it stands on, whether it is the current one and, of a frozen
/// one, when it was taken.
fn states(run: &dyn Fn(&[&str]) -> Ran, disk: &Path) -> Vec<(Value, Value, Value, Value)> {
    let list: Value =
        serde_json::from_str(&run(&["--json", "snapshot-list", text(disk)]).succeeded()).unwrap();
    let of = |state: &Value| {
        let time =
            if state["current"] == true { Value::Null } else { state["modified_unix_seconds"].clone() };
        (state["uuid"].clone(), state["parent_uuid"].clone(), state["current"].clone(), time)
    };
    list["states"].as_array().unwrap().iter().map(of).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lck"))
        .collect();
    names.sort();
    names
}

/// The bytes of a state, by a command of ours.
fn bytes_of(run: &dyn Fn(&[&str]) -> Ran, disk: &Path, state: &str, scratch: &Path) -> Vec<u8> {
    let _ = fs::remove_file(scratch);
    run(&["export", "-u", state, text(disk), text(scratch)]).succeeded();
    let bytes = fs::read(scratch).unwrap();
    fs::remove_file(scratch).unwrap();
    bytes
}

/// Fills the file system-less disk of a folder through its raw bytes: a snapshot each, and a branch.
fn closed_disk(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let image = folder.join("disk.hds");
    let raw = folder.with_extension("raw");
    let mut bytes = vec![0u8; 8 << 20];
    for (index, chunk) in bytes.chunks_mut(4096).enumerate().filter(|(index, _)| index % 3 == 0) {
        chunk.fill(u8::try_from(index % 250).unwrap() + 1);
    }
    fs::write(&raw, &bytes).unwrap();
    ploop(&["import", text(&raw), text(&image)]).succeeded();
    for name in [ONE, TWO] {
        ploop(&["snapshot", "-u", name, text(folder)]).succeeded();
    }
    ploop(&["snapshot-switch", "-D", "-u", ONE, text(folder)]).succeeded();
}

#[test]
fn a_closed_disk_keeps_its_snapshots_by_every_way_of_copying() {
    let root = crate::referee::folder();
    let from = root.path().join("from");
    closed_disk(&from);
    let expected = states(&|line| ploop(line), &from);
    assert_eq!(expected.len(), 4);
    let scratch = root.path().join("scratch");
    let content = bytes_of(&|line| ploop(line), &from, TWO, &scratch);
    for way in ["local", "two-way", "one-way"] {
        let to = root.path().join(way);
        fs::create_dir(&to).unwrap();
        let target = to.join("copy.hds");
        match way {
            "local" => {
                let line = ["copy", "-s", text(&from), "--chain", "-d", text(&target)];
                let told = ploop(&line).succeeded();
                assert!(told.contains("of 4 deltas"), "{told}");
            }
            "two-way" => {
                let receiver = format!("{PLOOP} copy -d {}", target.display());
                ploop(&["--json", "copy", "-s", text(&from), "--chain", "--to", &receiver]).succeeded();
            }
            _ => {
                let line = format!(
                    "{PLOOP} --json copy -s {} --chain | {PLOOP} --json copy -d {}",
                    from.display(),
                    target.display()
                );
                let ran = Command::new("sh").args(["-c", &line]).output().unwrap();
                let ran = Ran::from(ran);
                assert_eq!(ran.code, 0, "{}", ran.stderr);
                let told: Vec<u64> = ran
                    .events()
                    .iter()
                    .filter(|event| event["event"] == "delta_started")
                    .map(|event| event["delta"].as_u64().unwrap())
                    .collect();
                // Both sides tell of each.
                assert_eq!(told.len(), 8, "{told:?}");
            }
        }
        assert_eq!(states(&|line| ploop(line), &to), expected, "{way}");
        assert_eq!(files(&to).len(), 5, "{:?}", files(&to));
        assert!(bytes_of(&|line| ploop(line), &to, TWO, &scratch) == content, "{way}");
        ploop(&["check", text(&to)]).succeeded();
        // It is a disk like any other.
        ploop(&["snapshot-delete", "-u", TWO, text(&to)]).succeeded();
    }
}

#[test]
fn what_goes_with_it_is_said_before_anything_is_made() {
    let root = crate::referee::folder();
    let from = root.path().join("from");
    closed_disk(&from);
    let to = root.path().join("to");
    fs::create_dir(&to).unwrap();
    let target = to.join("copy.hds");
    let copy = |more: &[&str]| {
        let line = [&["copy", "-s", text(&from), "--chain", "-d", text(&target)], more].concat();
        ploop(&line)
    };
    copy(&["-f", "raw"]).failed_with(38, &["as they are", "advice"]);
    copy(&["-b", "128"]).failed_with(38, &["--chain"]);
    copy(&["-v", "2"]).failed_with(38, &["--chain"]);
    let original = ["copy", "-s", text(&from), "--chain", "--protocol", "1", "-o", "1"];
    ploop(&original).failed_with(38, &["no snapshots"]);
    ploop(&["copy", "--chain", "-d", text(&target)]).failed_with(38, &["--source"]);
    // The receiver has its own word.
    let receiver = format!("{PLOOP} copy -d {} -f raw", target.display());
    ploop(&["copy", "-s", text(&from), "--chain", "--to", &receiver])
        .failed_with(38, &["as they are at the source"]);
    let image = root.path().join("alone");
    fs::create_dir(&image).unwrap();
    ploop(&["init", "-s", "8M", "-t", "none", text(&image.join("disk.hds"))]).succeeded();
    fs::remove_file(image.join("DiskDescriptor.xml")).unwrap();
    let alone = image.join("disk.hds");
    ploop(&["copy", "-s", text(&alone), "--chain", "-d", text(&target)]).failed_with(38, &["descriptor"]);
    assert!(files(&to).is_empty(), "{:?}", files(&to));
    // One folder holds one disk.
    ploop(&["init", "-s", "8M", "-t", "none", text(&to.join("other.hds"))]).succeeded();
    copy(&[]).failed_with(1, &["empty folder"]);
    assert_eq!(files(&to), ["DiskDescriptor.xml", "other.hds"]);
}

#[test]
fn a_mounted_disk_moves_with_its_snapshots_and_a_branch() {
    let Some(stage) = stage() else { return };
    let image = stage.init("source", &["-s", "256M", "-n"]);
    let disk = image.parent().unwrap().to_owned();
    let run = |line: &[&str]| stage.ploop(line);
    let source = stage.mount(&image, &[]);
    let write = |name: &str, content: &str| {
        fs::write(source.point.join(name), content).unwrap();
        // Something that is deleted again above, and large enough to be clusters of its own.
        fs::write(source.point.join(format!("bulk-{content}")), content.repeat(1 << 19)).unwrap();
    };
    write("file", "one");
    run(&["snapshot", "-u", ONE, text(&disk)]).succeeded();
    write("file", "two");
    fs::remove_file(source.point.join("bulk-one")).unwrap();
    run(&["snapshot", "-u", TWO, text(&disk)]).succeeded();
    write("file", "three");
    stage.umount(&source);
    // A branch: the state after TWO is kept, the disk goes on from ONE.
    let kept = run(&["snapshot-switch", "-D", "-u", ONE, text(&disk)]).succeeded().trim().to_owned();
    let source = stage.mount(&disk, &[]);
    assert_eq!(fs::read_to_string(source.point.join("file")).unwrap(), "one");
    fs::write(source.point.join("file"), "four").unwrap();
    let expected = states(&run, &disk);
    assert_eq!(expected.len(), 4);

    let to = stage.path("target");
    fs::create_dir(&to).unwrap();
    let target = to.join("copy.hds");
    let witness = Witness::start(&source.point.join("witness"), 512, Duration::ZERO).unwrap();
    let hook = stage.hook("hook");
    let (at_hook, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let refusals = std::sync::Mutex::new(Vec::new());
    let copied = std::thread::scope(|scope| {
        scope.spawn(|| {
            hook.answer(&stop, || {
                // What would change the deltas has to wait.
                let device = text(&source.device);
                for line in
                    [&["snapshot", "-u", THREE, device][..], &["snapshot-delete", "-u", TWO, text(&disk)]]
                {
                    refusals.lock().unwrap().push(stage.ploop(line));
                }
                at_hook.store(witness.synced(), Ordering::SeqCst);
            })
        });
        let receiver = format!("{PLOOP} copy -d {}", target.display());
        let line = [
            "copy",
            "--json",
            "-s",
            text(&source.point),
            "--chain",
            "-F",
            &hook.command(),
            "--to",
            &receiver,
        ];
        let ran = stage.ploop(&line);
        stop.store(true, Ordering::SeqCst);
        ran
    });
    let issued = witness.issued();
    assert_eq!(copied.code, 0, "{}", copied.stderr);
    let refusals = refusals.into_inner().unwrap();
    assert_eq!(refusals.len(), 2, "the freeze command did not run");
    for refused in &refusals {
        refused.failed_with(17, &["a copy of this disk is running"]);
    }
    assert!(witness.is_alive(), "the source is not alive");
    let history = witness.stop().unwrap();
    let events = copied.events();
    let deltas: Vec<u64> = events.iter().filter_map(|event| event["deltas"].as_u64()).collect();
    assert!(deltas.iter().all(|deltas| *deltas == 4) && deltas.len() >= 5, "{deltas:?}");
    // It runs on, and what was held off works now.
    run(&["snapshot", "-u", THREE, text(&disk)]).succeeded();

    assert_eq!(states(&run, &to), expected);
    assert_eq!(files(&to).len(), 5, "{:?}", files(&to));
    let scratch = stage.path("scratch");
    for state in [ONE, TWO, &kept] {
        assert!(
            bytes_of(&run, &disk, state, &scratch) == bytes_of(&run, &to, state, &scratch),
            "the state {state} differs"
        );
    }
    let point = stage.path("frozen");
    fs::create_dir(&point).unwrap();
    for (state, content) in [(ONE, "one"), (TWO, "two"), (&kept, "three")] {
        run(&["mount", "-u", state, "-m", text(&point), text(&to)]).succeeded();
        let found = fs::read_to_string(point.join("file"));
        let bulk = fs::read_to_string(point.join(format!("bulk-{content}"))).map(|bulk| bulk.len());
        run(&["umount", "-m", text(&point)]).succeeded();
        assert_eq!(found.unwrap(), content);
        assert_eq!(bulk.unwrap(), content.len() << 19);
    }
    same_images(&image, &target);
    let copy = stage.mount(&to.join("DiskDescriptor.xml"), &["--allow-twin"]);
    assert_eq!(fs::read_to_string(copy.point.join("file")).unwrap(), "four");
    let reached = history.verify(&copy.point.join("witness"), at_hook.load(Ordering::SeqCst), issued);
    reached.unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(Command::new("umount").arg(&copy.point).status().unwrap().success());
    let fsck = Command::new("e2fsck").args(["-f", "-n"]).arg(&copy.device).output().unwrap();
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
    stage.umount(&source);
}

/// The base images say the same to QEMU.
fn same_images(one: &Path, other: &Path) {
    let compare = ["compare", "-f", "parallels", "-F", "parallels"];
    match Command::new("qemu-img").args(compare).args([one, other]).output() {
        Ok(ran) => assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout)),
        Err(_) => ploop_testing::skip(
            ploop_testing::Need::Program("qemu-img"),
            "no qemu-img to compare the base images",
        ),
    }
}
