//! A host file system that is full: a running disk waits for space, says so, holds up nobody who needs none, and goes on by
//! itself.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::ground::{Direct, Ground, program, text};

const MIB: u64 = 1 << 20;
const MIB_LEN: usize = 1 << 20;

/// A small file system of its own, as the host of a disk.
struct Host(PathBuf);

impl Host {
    fn mount(at: PathBuf, line: &[&str]) -> Self {
        program("mount", &[line, &[text(&at)]].concat());
        Self(at)
    }

    /// In memory, of so many MiB.
    fn in_memory(ground: &Ground, size_mib: u64) -> Self {
        Self::mount(ground.make_folder("host"), &["-t", "tmpfs", "-o", &format!("size={size_mib}M"), "none"])
    }

    /// From an image of its own; `None`, with the reason, where that cannot be made or mounted.
    fn on_a_loop_device(ground: &Ground, size_mib: u64, make: &[&str], options: &str) -> Option<Self> {
        let (image, at) = (ground.path("host.img"), ground.make_folder("host"));
        File::create(&image).unwrap().set_len(size_mib * MIB).unwrap();
        let made = Command::new(make[0]).args(&make[1..]).arg(&image).output();
        if !made.is_ok_and(|made| made.status.success()) {
            ploop_testing::skip(ploop_testing::Need::Other, format!("{} makes no file system here", make[0]));
            return None;
        }
        let mounted = Command::new("mount").args(["-o", options]).args([&image, &at]).output().unwrap();
        if !mounted.status.success() {
            ploop_testing::skip(
                ploop_testing::Need::Other,
                format!("this kernel mounts none made by {} with {options}", make[0]),
            );
            return None;
        }
        Some(Self(at))
    }

    fn resize(&self, size_mib: u64) {
        program("mount", &["-o", &format!("remount,size={size_mib}M"), text(&self.0)]);
    }

    /// Fills it with a file until so much is left.
    fn fill(&self, left: u64) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        for piece in [MIB_LEN, 64 << 10, 4096] {
            while free(&self.0) >= left + piece as u64 && file.write_all(&vec![7; piece]).is_ok() {
                file.sync_all().ok();
            }
        }
        path
    }
}

/// Makes room on a host when it is dropped, also by a failed test: writers would wait for ever.
struct Room<'a>(&'a Host);

impl Drop for Room<'_> {
    fn drop(&mut self) {
        fs::remove_file(self.0.0.join("filler")).ok();
        Command::new("mount").args(["-o", "remount,size=700M"]).arg(&self.0.0).output().ok();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).output().ok();
    }
}

fn free(path: &Path) -> u64 {
    let space = nix::sys::statvfs::statvfs(path).unwrap();
    space.blocks_available() * space.fragment_size()
}

/// A new disk on the host.
fn disk_on(ground: &Ground, host: &Host, size_mib: u64) -> PathBuf {
    assert_eq!(host.0, ground.path("host"));
    ground.create("host", size_mib, 1024);
    host.0.clone()
}

fn listed(ground: &Ground) -> Value {
    let output = ground.run(&["--json", "list"]);
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    all["disks"][0].clone()
}

fn waits(ground: &Ground) -> bool {
    listed(ground)["health"] == "waiting"
}

/// Writes at most `count` clusters, one after the other, until one has waited for space; how many were answered.
fn write_until_full<'a>(
    ground: &Ground,
    device: &Direct,
    scope: &'a std::thread::Scope<'a, '_>,
    range: std::ops::Range<u64>,
    answered: &'a AtomicUsize,
) -> std::thread::ScopedJoinHandle<'a, ()> {
    let device = device.another();
    let writer = scope.spawn(move || {
        for cluster in range {
            device.write(cluster * MIB, MIB_LEN, 1).expect("a write that may wait");
            answered.fetch_add(1, Ordering::SeqCst);
        }
    });
    ground.wait_until("a write waits", || waits(ground));
    writer
}

#[test]
fn a_file_system_on_a_full_host_waits_and_goes_on() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 40);
    let disk = disk_on(&ground, &host, 128);
    let device = ground.mount(&[text(&disk)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("point");
    let device = ground.mount(&["-m", text(&point), text(&disk)]);
    assert_eq!(ground.ends_with(0, &["list", "--check"]).lines().count(), 1);
    fs::write(point.join("early"), vec![5; 1 << 20]).unwrap();
    program("sync", &["-f", text(&point)]);

    let content: Vec<u8> = (0..60 * MIB).map(|at| (at / 977 % 251) as u8).collect();
    std::thread::scope(|scope| {
        let _room = Room(&host);
        let writer = scope.spawn(|| {
            let mut file = File::create(point.join("large")).unwrap();
            file.write_all(&content).unwrap();
            file.sync_all().unwrap();
        });
        ground.wait_until("the disk waits", || waits(&ground));
        // It is said everywhere, with cause, since when, how much, and what to do.
        let line = listed(&ground);
        let condition = &line["condition"];
        let cause = condition["cause"].as_str().unwrap();
        assert!(cause.contains("of space: the file system of") && cause.contains(text(&host.0)), "{line}");
        assert!(condition["since_unix_s"].as_u64().unwrap() > 1_700_000_000, "{line}");
        assert!(condition["advice"].as_str().unwrap().contains("make room"), "{line}");
        assert!(
            ground.ends_with(20, &["list", "--check"]).contains("[waiting keeper"),
            "the code of no space"
        );
        assert!(ground.ends_with(0, &["info", text(&point)]).contains("served:      waiting: "));
        let status = ground.status();
        assert!(status["waiting"]["bytes_needed"].as_u64().unwrap() >= MIB, "{status}");
        assert!(ground.logs().contains("of space: the file system of"), "{}", ground.logs());
        // Reads go on, past the page cache.
        let direct = Direct::open_to_read(&device);
        for _ in 0..20 {
            direct.read(0, 1 << 20).unwrap();
        }
        // What would freeze it does not hang, but says why.
        for line in
            [&["snapshot", text(&disk)][..], &["copy", "-s", text(&disk), "-d", text(&ground.path("copy"))]]
        {
            assert!(ground.ends_with(20, line).contains("waiting since"), "{line:?}");
        }
        assert!(ground.ends_with(46, &["umount", text(&point)]).contains("--give-up-waiting"));
        assert!(!writer.is_finished());
        // A server that dies is succeeded, and the successor waits as well.
        if crate::ground::can_take_over() {
            ground.kill_server_and_wait();
            ground.wait_until("the successor waits", || waits(&ground));
            direct.read(0, 1 << 20).unwrap();
        }
        host.resize(100);
        writer.join().unwrap();
    });
    assert_eq!(listed(&ground)["health"], "running");
    ground.ends_with(0, &["list", "--check"]);
    assert!(ground.logs().contains("nothing waits for space any more"), "{}", ground.logs());
    ground.ends_with(0, &["umount", text(&point)]);
    let device = ground.mount(&[text(&disk)]);
    program("e2fsck", &["-fn", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    ground.mount(&["-m", text(&point), text(&disk)]);
    assert!(fs::read(point.join("large")).unwrap() == content, "what was written in the wait");
    assert!(fs::read(point.join("early")).unwrap().iter().all(|&byte| byte == 5));
    ground.ends_with(0, &["umount", text(&point)]);
    ground.ends_with(0, &["check", text(&disk)]);
}

/// Of the loop device's 128 requests some are kept for reads. With fewer waiting writes than that, other writes go on, too.
#[test]
fn more_waiting_writers_than_the_loop_device_has_requests_do_not_stop_readers() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 12);
    let disk = disk_on(&ground, &host, 512);
    let path = ground.mount(&[text(&disk)]);
    let device = Direct::open(&path);
    device.write(0, MIB_LEN, 1).unwrap();
    device.sync().unwrap();
    host.fill(0);
    std::thread::scope(|scope| {
        // Whatever fails in here, they must end.
        let room = Room(&host);
        let write_all = |numbers: std::ops::Range<u64>| -> Vec<_> {
            let one = |number: u64| {
                let device = device.another();
                scope.spawn(move || device.write((1 + 2 * number) * MIB, 128 << 10, number).unwrap())
            };
            numbers.map(one).collect()
        };
        let waiting = || ground.status()["waiting"]["writes"].as_u64().unwrap_or(0);
        let mut writers = write_all(0..60);
        ground.wait_until("many writes wait", || waiting() > 40);
        for round in 2..40 {
            device.expect(0, 4096, round - 1);
            device.write(0, 4096, round).unwrap();
            device.sync().unwrap();
        }
        writers.extend(write_all(60..200));
        ground.wait_until("most requests of the device wait", || waiting() > 80);
        std::thread::sleep(std::time::Duration::from_millis(500));
        let reader = device.another();
        let reads = scope.spawn(move || {
            for _ in 0..40 {
                reader.expect(0, 4096, 39);
                assert!(reader.read(500 * MIB, 4096).unwrap().iter().all(|&byte| byte == 0));
            }
        });
        ground.wait_until("reads go on", || reads.is_finished());
        reads.join().unwrap();
        assert!(writers.iter().filter(|writer| !writer.is_finished()).count() > 100);
        drop(room);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    for number in 0..200u64 {
        device.expect((1 + 2 * number) * MIB, 128 << 10, number);
    }
    drop(device);
    ground.ends_with(0, &["umount", text(&path)]);
    ground.ends_with(0, &["check", text(&disk)]);
}

#[test]
fn a_discard_makes_room_for_who_waits() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 24);
    let disk = disk_on(&ground, &host, 128);
    let path = ground.mount(&[text(&disk)]);
    let device = Direct::open(&path);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let _room = Room(&host);
        let writer = write_until_full(&ground, &device, scope, 0..26, &answered);
        let done = answered.load(Ordering::SeqCst) as u64;
        assert!((10..26).contains(&done), "{done}");
        // What the writes that are still to come need, and no more.
        let freed = format!("{}", (26 - done + 1) * MIB);
        program("blkdiscard", &["-o", "0", "-l", &freed, text(&path)]);
        // A punch is durable before its place is used again.
        device.sync().unwrap();
        writer.join().unwrap();
    });
    device.expect(25 * MIB, MIB_LEN, 1);
    assert!(device.read(0, MIB_LEN).unwrap().iter().all(|&byte| byte == 0));
    drop(device);
    ground.ends_with(0, &["umount", text(&path)]);
    ground.ends_with(0, &["check", text(&disk)]);
}

#[test]
fn an_umount_in_the_wait_ends_when_the_user_gives_up() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 40);
    let disk = disk_on(&ground, &host, 128);
    let device = ground.mount(&[text(&disk)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("point");
    let device = ground.mount(&["-m", text(&point), text(&disk)]);
    fs::write(point.join("early"), vec![5; 1 << 20]).unwrap();
    program("sync", &["-f", text(&point)]);
    // Into the page cache only: nobody has been promised that it is on the disk.
    fs::write(point.join("late"), vec![6; 60 << 20]).unwrap();
    let umount = ground.start(&["umount", text(&point)]);
    ground.wait_until("the umount says what it waits for", || umount.said().contains("wait"));
    let status = ground.ends_with(0, &["umount", "--give-up-waiting", text(&device)]);
    assert!(!status.contains("error"), "{status}");
    drop(umount);
    assert!(ground.runtime().states().unwrap().is_empty());
    ground.ends_with(0, &["check", text(&disk)]);
    host.resize(100);
    let device = ground.mount(&[text(&disk)]);
    program("e2fsck", &["-fy", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    ground.mount(&["-m", text(&point), text(&disk)]);
    assert!(fs::read(point.join("early")).unwrap().iter().all(|&byte| byte == 5));
    ground.ends_with(0, &["umount", text(&point)]);
}

#[test]
fn the_policy_is_remembered_and_writes_fail_where_that_is_wanted() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 24);
    let disk = disk_on(&ground, &host, 128);
    let policy = |line: &[&str]| {
        let device = ground.mount(&[line, &[text(&disk)]].concat());
        (ground.state().host_policy, device)
    };
    let (plain, device) = policy(&[]);
    assert_eq!(json!(plain), json!({ "waits": true, "timeout_s": null, "reserve_bytes": 0 }));
    ground.ends_with(0, &["umount", text(&device)]);
    let (_, device) = policy(&["--on-full", "error", "--reserve", "4M"]);
    let write = |device: &Direct| {
        (0..40u64).find_map(|cluster| device.write(cluster * MIB, 4096, 1).err()).expect("the host is full")
    };
    let direct = Direct::open(&device);
    assert_eq!(write(&direct).raw_os_error(), Some(nix::libc::ENOSPC));
    assert_eq!(listed(&ground)["health"], "running");
    assert!(free(&host.0) >= 4 * MIB, "the reserve is left: {}", free(&host.0));
    drop(direct);
    ground.ends_with(0, &["umount", text(&device)]);
    let (later, device) = policy(&[]);
    assert_eq!(json!(later), json!({ "waits": false, "timeout_s": null, "reserve_bytes": 4 * MIB }));
    ground.ends_with(0, &["umount", text(&device)]);

    // They wait for a second, and then fail; the reserve is named as the reason.
    let (_, device) = policy(&["--on-full", "wait", "--on-full-timeout", "2"]);
    let direct = Direct::open(&device);
    std::thread::scope(|scope| {
        let failed = scope.spawn(|| direct.write(100 * MIB, 4096, 1).err());
        ground.wait_until("it waits", || waits(&ground));
        let cause = listed(&ground)["condition"]["cause"].as_str().unwrap().to_owned();
        assert!(cause.contains("of which 4 MiB are to stay"), "{cause}");
        fs::write(host.0.join("other"), vec![1; 1 << 20]).expect("others find space");
        assert_eq!(failed.join().unwrap().and_then(|error| error.raw_os_error()), Some(nix::libc::ENOSPC));
    });
    assert_eq!(listed(&ground)["health"], "running");
    let begun = std::time::Instant::now();
    assert!(direct.write(101 * MIB, 4096, 1).is_err(), "later ones fail at once");
    assert!(begun.elapsed().as_millis() < 1500);
    drop(direct);
    ground.ends_with(0, &["umount", text(&device)]);
    assert!(ground.ends_with(0, &["info", text(&disk)]).contains("disk could still ask for "));
}

/// Holes in a raw disk need space although they are written in place.
#[test]
fn a_hole_of_a_raw_disk_waits() {
    let Some(ground) = Ground::new() else { return };
    let host = Host::in_memory(&ground, 16);
    let image = host.0.join("raw.img");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let path = ground.mount(&["-f", "raw", "-n", text(&image)]);
    let device = Direct::open(&path);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let _room = Room(&host);
        let writer = write_until_full(&ground, &device, scope, 0..40, &answered);
        device.expect(MIB, 4096, 1);
        device.write(2 * MIB, 4096, 1).unwrap();
        device.sync().unwrap();
        host.resize(70);
        writer.join().unwrap();
    });
    (0..40).for_each(|cluster| device.expect(cluster * MIB, MIB_LEN, 1));
    drop(device);
    ground.ends_with(0, &["umount", text(&path)]);
    assert_eq!(fs::metadata(&image).unwrap().len(), 64 * MIB);
}

/// A user's quota on XFS; the image is the user's.
#[test]
fn a_quota_that_is_used_up_is_waited_for_as_well() {
    let Some(ground) = Ground::new() else { return };
    let Some(host) = Host::on_a_loop_device(&ground, 400, &["mkfs.xfs", "-q"], "uquota") else { return };
    let disk = disk_on(&ground, &host, 256);
    let image =
        fs::read_dir(&disk).unwrap().flatten().find(|entry| entry.file_name() == "disk.hds").unwrap().path();
    std::os::unix::fs::chown(&image, Some(4711), None).unwrap();
    let limit = |mib: u64| {
        program("xfs_quota", &["-x", "-c", &format!("limit bhard={mib}m 4711"), text(&host.0)]);
    };
    limit(20);
    let path = ground.mount(&[text(&disk)]);
    let device = Direct::open(&path);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let _room = Room(&host);
        let writer = write_until_full(&ground, &device, scope, 0..40, &answered);
        let cause = listed(&ground)["condition"]["cause"].as_str().unwrap().to_owned();
        assert!(cause.contains("the quota of"), "{cause}");
        assert!(free(&host.0) > 100 * MIB);
        limit(200);
        writer.join().unwrap();
    });
    (0..40).for_each(|cluster| device.expect(cluster * MIB, MIB_LEN, 1));
    drop(device);
    ground.ends_with(0, &["umount", text(&path)]);
    ground.ends_with(0, &["check", text(&disk)]);
}

/// Where everything is copied on write, also what is written in place needs space; and so does the table.
#[test]
fn overwriting_a_file_that_shares_its_blocks_waits() {
    let Some(ground) = Ground::new() else { return };
    let make = ["mkfs.xfs", "-q", "-m", "reflink=1"];
    let Some(host) = Host::on_a_loop_device(&ground, 400, &make, "defaults") else { return };
    let disk = disk_on(&ground, &host, 128);
    let path = ground.mount(&[text(&disk)]);
    let device = Direct::open(&path);
    (0..100).for_each(|cluster| device.write(cluster * MIB, MIB_LEN, 0).unwrap());
    device.sync().unwrap();
    // Somebody keeps a second file of the same blocks, as a backup does.
    let shared = host.0.join("shared");
    program("cp", &["--reflink=always", text(&disk.join("disk.hds")), text(&shared)]);
    host.fill(2 * MIB);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let _room = Room(&host);
        let writer = write_until_full(&ground, &device, scope, 0..100, &answered);
        device.expect(99 * MIB, MIB_LEN, 0);
        assert!(answered.load(Ordering::SeqCst) < 100);
        fs::remove_file(host.0.join("filler")).unwrap();
        writer.join().unwrap();
    });
    (0..100).for_each(|cluster| device.expect(cluster * MIB, MIB_LEN, 1));
    device.sync().unwrap();
    assert_eq!(ground.status()["poisoned"], false);
    drop(device);
    ground.ends_with(0, &["umount", text(&path)]);
    ground.ends_with(0, &["check", text(&disk)]);
}
