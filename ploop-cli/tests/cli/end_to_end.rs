//! A mounted disk moves to another place while it is being written to.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::stage::same_bytes;
use crate::support::stage;
use crate::witness::{Witness, compare, copy_tree, manifest};

/// Runs a checker of a file system on a device that is not mounted; `true` when it finds nothing.
fn is_clean(program: &str, options: &[&str], device: &Path) -> bool {
    let output = Command::new(program).args(options).arg(device).output().expect("run the checker");
    if !output.status.success() {
        eprintln!("{program}: {}", String::from_utf8_lossy(&output.stdout));
    }
    output.status.success()
}

/// Fills a mounted disk with a real tree of about `bytes_max`.
fn fill(point: &Path, bytes_max: u64) {
    let (bytes, things) =
        copy_tree(Path::new("/usr/lib"), &point.join("tree"), bytes_max).expect("copy a tree");
    assert!(bytes > 1 << 20 && things > 10, "/usr/lib holds too little: {bytes} bytes");
    // Durable, so that the copy's first pass reads it from the disk.
    assert!(Command::new("sync").arg("-f").arg(point).status().expect("run sync").success());
}

#[test]
fn a_running_disk_moves_through_a_pipe() {
    let Some(stage) = stage() else { return };
    let image = stage.init("source", &["-s", "512M", "-n"]);
    let source = stage.mount(&image, &[]);
    fill(&source.point, 64 << 20);
    let tree = manifest(&source.point, &[Path::new("witness"), Path::new("lost+found")]).unwrap();
    let witness = Witness::start(&source.point.join("witness"), 512, Duration::ZERO).unwrap();

    fs::create_dir(stage.path("target")).unwrap();
    let target = stage.path("target").join("disk.hds");
    let hook = stage.hook("hook");
    let (at_hook, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (sent, received) = std::thread::scope(|scope| {
        scope.spawn(|| hook.answer(&stop, || at_hook.store(witness.synced(), Ordering::SeqCst)));
        let sender = ["copy", "--json", "-s", source.point.to_str().unwrap(), "-F", &hook.command()];
        let ran = stage.copy(&sender, &["copy", "-d", target.to_str().unwrap()], |_| {});
        stop.store(true, Ordering::SeqCst);
        ran
    });
    let issued = witness.issued();
    assert_eq!((sent.code, received.code), (0, 0), "sender: {}\nreceiver: {}", sent.stderr, received.stderr);
    assert!(
        received.stdout.is_empty() && received.stderr.is_empty(),
        "{}{}",
        received.stdout,
        received.stderr
    );
    let events = sent.events();
    let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    for name in ["started", "pass_started", "pass_ended", "freezing", "frozen", "sealed", "thawed", "done"] {
        assert!(names.contains(&name), "no event {name} in {names:?}");
    }
    let downtime = &events.last().unwrap()["downtime"];
    let (hook, whole) = (downtime["hook_ms"].as_f64().unwrap(), downtime["total_ms"].as_f64().unwrap());
    assert!(hook > 0.0 && hook < whole, "{downtime}");
    assert_ne!(at_hook.load(Ordering::SeqCst), 0, "the freeze command did not run");
    assert!(witness.is_alive(), "the source is not alive");
    let longest = witness.stall_longest();
    println!("the longest write took {longest:?}");
    assert!(longest < Duration::from_secs(100), "{longest:?}");
    assert!(witness.history().verify(&source.point.join("witness"), 0, 0).is_err());
    let history = witness.stop().unwrap();

    stage.ploop(&["info", target.to_str().unwrap()]).succeeded();
    let copy = stage.mount(&target, &["-r"]);
    assert_eq!(
        manifest(&copy.point, &[Path::new("witness"), Path::new("lost+found")])
            .map(|copied| compare(&tree, &copied))
            .unwrap(),
        Ok(())
    );
    let reached = history.verify(&copy.point.join("witness"), at_hook.load(Ordering::SeqCst), issued);
    reached.unwrap_or_else(|wrong| panic!("{wrong}"));
    // Clean means frozen well: no journal to replay.
    assert!(Command::new("umount").arg(&copy.point).status().unwrap().success());
    assert!(is_clean("e2fsck", &["-f", "-n"], &copy.device), "the copy is not clean");
    history.verify(&source.point.join("witness"), issued, u64::MAX).unwrap();
    stage.umount(&source);
}

#[test]
fn source_and_copy_are_equal_byte_for_byte_at_the_freeze() {
    let Some(stage) = stage() else { return };
    let image = stage.init("source", &["-s", "256M", "-n"]);
    let source = stage.mount(&image, &[]);
    fill(&source.point, 24 << 20);
    let witness = Witness::start(&source.point.join("witness"), 256, Duration::ZERO).unwrap();
    fs::create_dir(stage.path("target")).unwrap();
    let target = stage.path("target").join("disk.hds");
    // The operator freezes the file system himself: it stays frozen after the copy, and the disks can be compared.
    let freeze = format!("fsfreeze -f '{}'", source.point.display());
    let sender = ["copy", "-s", source.point.to_str().unwrap(), "-F", &freeze];
    let (sent, received) = stage.copy(&sender, &["copy", "-d", target.to_str().unwrap()], |_| {});
    let compared = (sent.code == 0 && received.code == 0).then(|| {
        let copy = stage.mount(&target, &["-r", "-o", "norecovery"]);
        same_bytes(&source.device, &copy.device)
    });
    assert!(Command::new("fsfreeze").arg("-u").arg(&source.point).status().unwrap().success());
    assert_eq!((sent.code, received.code), (0, 0), "sender: {}\nreceiver: {}", sent.stderr, received.stderr);
    let bytes = compared.unwrap().unwrap_or_else(|difference| panic!("{difference}"));
    assert!(bytes > 250 << 20, "only {bytes} bytes were compared");
    assert!(witness.is_alive(), "the source is not alive");
}

/// Whether a disk with xfs can be made and mounted here; says so where it cannot.
fn has_xfs() -> bool {
    for (tool, option) in [("mkfs.xfs", "-V"), ("xfs_repair", "-V")] {
        if !Command::new(tool).arg(option).output().is_ok_and(|output| output.status.success()) {
            ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
            return false;
        }
    }
    let kernel = || fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !kernel().contains("xfs") {
        // It may be a module that nobody has asked for yet.
        Command::new("modprobe").arg("xfs").status().ok();
    }
    let has_it = kernel().contains("xfs");
    if !has_it {
        ploop_testing::skip(ploop_testing::Need::FileSystem("xfs"), "the kernel has no xfs");
    }
    has_it
}

#[test]
fn a_running_disk_with_xfs_moves_and_is_sound() {
    let Some(stage) = stage() else { return };
    if !has_xfs() {
        return;
    }
    let image = stage.init("source", &["-s", "640M", "-t", "xfs", "-n"]);
    let source = stage.mount(&image, &[]);
    fill(&source.point, 24 << 20);
    let tree = manifest(&source.point, &[Path::new("witness")]).unwrap();
    let witness = Witness::start(&source.point.join("witness"), 128, Duration::ZERO).unwrap();
    fs::create_dir(stage.path("target")).unwrap();
    let target = stage.path("target").join("disk.hds");
    let line = ["copy", "-s", source.point.to_str().unwrap(), "-d", target.to_str().unwrap()];
    stage.ploop(&line).succeeded();
    assert!(witness.is_alive(), "the source is not alive");
    witness.stop().unwrap();
    // Both have one name in the file system: they are not mounted at the same time.
    stage.umount(&source);

    // Mounted once, so that the log is replayed; then nothing is left to find.
    let copy = stage.mount(&target, &[]);
    assert_eq!(
        manifest(&copy.point, &[Path::new("witness")]).map(|copied| compare(&tree, &copied)).unwrap(),
        Ok(())
    );
    assert!(Command::new("umount").arg(&copy.point).status().unwrap().success());
    assert!(is_clean("xfs_repair", &["-n"], &copy.device), "the copy is not sound");
    stage.umount(&copy);
    // And so is the source.
    let source = stage.mount(&image, &[]);
    assert!(Command::new("umount").arg(&source.point).status().unwrap().success());
    assert!(is_clean("xfs_repair", &["-n"], &source.device), "the source is not sound");
    stage.umount(&source);
}
