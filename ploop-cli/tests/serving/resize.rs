//! A disk gets another size: mounted under a writer, closed, cut in the middle.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::ground::{Direct, Ground, can_take_over, program, signal};
use crate::guests::{beside, rewrite_files};

const MIB: u64 = 1 << 20;

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("-V").output().is_ok();
    if !found {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
    }
    found
}

/// Whether a mounted ext4 may grow: the kernel asks for CAP_SYS_RESOURCE.
fn may_grow_ext4() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let may = u64::from_str_radix(effective.trim(), 16).expect("a number") & 1 << 24 != 0;
    if !may {
        ploop_testing::skip(
            ploop_testing::Need::Capability(24),
            "a mounted ext4 does not grow without CAP_SYS_RESOURCE",
        );
    }
    may
}

/// Makes a disk with a file system; its descriptor.
fn init(ground: &Ground, name: &str, size: &str, file_system: &str, more: &[&str]) -> String {
    let folder = ground.make_folder(name);
    let image = folder.join("root.hds");
    let line = [&["init", "-s", size, "-t", file_system], more, &[image.to_str().expect("a name")]].concat();
    ground.ends_with(0, &line);
    folder.join("DiskDescriptor.xml").to_str().expect("a name").to_owned()
}

/// Bytes of the mounted file system.
fn file_system_bytes(point: &Path) -> u64 {
    let all = nix::sys::statvfs::statvfs(point).expect("statvfs");
    all.blocks() * all.fragment_size()
}

fn size_of(ground: &Ground, descriptor: &str) -> u64 {
    let text = ground.ends_with(0, &["--json", "info", descriptor]);
    let value: serde_json::Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    value["disk_bytes"].as_u64().expect("a size")
}

fn write_files(point: &Path, count: u8, round: u8) {
    for number in 0..count {
        fs::write(point.join(format!("file{number}")), vec![round.wrapping_add(number); 300_000])
            .expect("write a file");
    }
}

fn expect_files(point: &Path, count: u8, round: u8) {
    for number in 0..count {
        let found = fs::read(point.join(format!("file{number}"))).expect("read a file");
        assert!(
            found.len() == 300_000 && found.iter().all(|&byte| byte == round.wrapping_add(number)),
            "file {number}"
        );
    }
}

fn check_with_qemu(descriptor: &str) {
    if has("qemu-img") {
        let image = Path::new(descriptor).with_file_name("root.hds");
        program("qemu-img", &["check", "-f", "parallels", image.to_str().expect("a name")]);
    }
}

#[test]
fn a_mounted_disk_grows_under_a_writer() {
    for (file_system, tool, size) in [("ext4", "resize2fs", "200M"), ("xfs", "xfs_growfs", "400M")] {
        let Some(ground) = Ground::new() else { return };
        if !has(tool) || (file_system == "ext4" && !may_grow_ext4()) {
            continue;
        }
        let descriptor = init(&ground, "disk", size, file_system, &["-b", "64"]);
        let point = ground.make_folder("mnt");
        let device = ground.mount(&["-m", point.to_str().expect("a name"), &descriptor]);
        write_files(&point, 30, 1);
        let before = file_system_bytes(&point);
        beside(
            1,
            |_, guest| rewrite_files(&point, guest),
            |guest| {
                for (target, bytes) in [("800M", 800 * MIB), ("2G", 2048 * MIB)] {
                    let text = ground.ends_with(0, &["--json", "resize", "-s", target, &descriptor]);
                    let value: serde_json::Value =
                        serde_json::from_str(text.lines().last().expect("a report")).expect("JSON");
                    assert_eq!(value["disk_bytes"], bytes, "{text}");
                    assert_eq!(value["file_system"], file_system, "{text}");
                    assert!(value["held_ms"].as_u64().is_some(), "{text}");
                    assert!(file_system_bytes(&point) > bytes * 3 / 4, "the file system has grown");
                    guest.goes_on(&ground, 4);
                }
            },
        );
        assert!(file_system_bytes(&point) > before * 4);
        // By the device, and nothing to do.
        ground.ends_with(0, &["resize", "-s", "2G", device.to_str().expect("a name")]);
        let text = ground.ends_with(38, &["resize", "-s", "1G", &descriptor]);
        assert!(text.contains("advice"), "{text}");
        ground.ends_with(37, &["resize", "-o", "-s", "3G", &descriptor]);
        expect_files(&point, 30, 1);
        // All of it can be used.
        let large = vec![0x5A; 64 << 20];
        for number in 0..14 {
            fs::write(point.join(format!("large{number}")), &large).expect("fill the new room");
        }
        ground.ends_with(0, &["umount", &descriptor]);
        assert_eq!(size_of(&ground, &descriptor), 2048 * MIB);
        check_with_qemu(&descriptor);
        let device = ground.mount(&[descriptor.as_str()]);
        let device = device.to_str().expect("a name");
        match file_system {
            "ext4" => program("e2fsck", &["-f", "-n", device]),
            _ => program("xfs_repair", &["-n", device]),
        };
        ground.ends_with(0, &["umount", &descriptor]);
        ground.mount(&["-r", "-m", point.to_str().expect("a name"), &descriptor]);
        expect_files(&point, 30, 1);
        assert!(fs::read(point.join("large13")).expect("read") == large);
        ground.ends_with(0, &["umount", &descriptor]);
    }
}

/// The kernel may refuse the last step; the disk is fine, and the same command finishes it when nobody has it mounted.
#[test]
fn a_refused_growth_of_the_file_system_is_finished_later() {
    let Some(ground) = Ground::new() else { return };
    if !has("resize2fs") {
        return;
    }
    let descriptor = init(&ground, "disk", "200M", "ext4", &["-b", "64"]);
    let point = ground.make_folder("mnt");
    let mounted = ["-m", point.to_str().expect("a name"), descriptor.as_str()];
    ground.mount(&mounted);
    beside(
        1,
        |_, guest| rewrite_files(&point, guest),
        |guest| {
            let output = ground.run(&["resize", "-s", "800M", &descriptor]);
            match output.status.code() {
                Some(0) => {}
                Some(26) => assert!(String::from_utf8_lossy(&output.stderr).contains("CAP_SYS_RESOURCE")),
                other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
            }
            guest.goes_on(&ground, 2);
        },
    );
    write_files(&point, 10, 1);
    ground.ends_with(0, &["umount", &descriptor]);
    ground.ends_with(0, &["resize", "-s", "800M", &descriptor]);
    ground.mount(&mounted);
    assert!(file_system_bytes(&point) > 700 * MIB);
    expect_files(&point, 10, 1);
    ground.ends_with(0, &["umount", &descriptor]);
}

#[test]
fn a_closed_disk_grows_and_shrinks_with_its_file_system() {
    for more in [&["-b", "64"][..], &["-b", "64", "-P"], &["-f", "raw"], &["-f", "preallocated"]] {
        let Some(ground) = Ground::new() else { return };
        if !has("resize2fs") {
            return;
        }
        let descriptor = init(&ground, "disk", "100M", "ext4", more);
        let point = ground.make_folder("mnt");
        let mounted = ["-m", point.to_str().expect("a name"), descriptor.as_str()];
        ground.mount(&mounted);
        write_files(&point, 30, 7);
        let first = file_system_bytes(&point);
        ground.ends_with(0, &["umount", &descriptor]);
        ground.ends_with(0, &["resize", "-o", "-s", "700M", &descriptor]);
        assert_eq!(size_of(&ground, &descriptor), 700 * MIB);
        ground.mount(&mounted);
        assert!(file_system_bytes(&point) > first * 5, "{more:?}");
        expect_files(&point, 30, 7);
        ground.ends_with(0, &["umount", &descriptor]);
        // Too small for what is there: nothing happens.
        let text = ground.ends_with(26, &["resize", "-s", "4M", &descriptor]);
        assert!(text.contains("resize2fs"), "{text}");
        assert_eq!(size_of(&ground, &descriptor), 700 * MIB);
        ground.ends_with(0, &["resize", "-s", "150M", &descriptor]);
        ground.ends_with(0, &["resize", "-s", "150M", &descriptor]);
        assert_eq!(size_of(&ground, &descriptor), 150 * MIB);
        let device = ground.mount(&[descriptor.as_str()]);
        program("e2fsck", &["-f", "-n", device.to_str().expect("a name")]);
        ground.ends_with(0, &["umount", &descriptor]);
        ground.mount(&mounted);
        expect_files(&point, 30, 7);
        ground.ends_with(0, &["umount", &descriptor]);
        if !more.contains(&"raw") {
            check_with_qemu(&descriptor);
        }
    }
}

/// Its snapshot keeps its size, can be mounted and gone back to, and is merged while the disk runs.
#[test]
fn a_disk_with_a_snapshot_shrinks_and_grows_again() {
    const SNAPSHOT: &str = "{11111111-1111-1111-1111-111111111111}";
    for more in [&["-b", "64"][..], &["-b", "64", "-f", "raw"]] {
        let Some(ground) = Ground::new() else { return };
        if !has("resize2fs") {
            return;
        }
        let descriptor = init(&ground, "disk", "400M", "ext4", more);
        let point = ground.make_folder("mnt");
        let mounted = ["-m", point.to_str().expect("a name"), descriptor.as_str()];
        let shown = ground.make_folder("shown");
        let shown_at = shown.to_str().expect("a name");
        ground.mount(&mounted);
        write_files(&point, 40, 1);
        let full = file_system_bytes(&point);
        ground.ends_with(0, &["snapshot", "-u", SNAPSHOT, &descriptor]);
        write_files(&point, 40, 2);
        ground.ends_with(0, &["umount", &descriptor]);
        ground.ends_with(0, &["resize", "-s", "100M", &descriptor]);
        assert_eq!(size_of(&ground, &descriptor), 100 * MIB);
        let sizes = ground.ends_with(0, &["snapshot-list", "-H", "-o", "size", &descriptor]);
        let sizes: Vec<&str> = sizes.lines().map(str::trim).collect();
        assert_eq!(sizes, [(400 * MIB).to_string(), (100 * MIB).to_string()]);
        ground.ends_with(0, &["check", &descriptor]);
        ground.ends_with(0, &["diff", "-u", SNAPSHOT, &descriptor]);
        let text = ground.ends_with(0, &["mount", "-r", "-u", SNAPSHOT, "-m", shown_at, &descriptor]);
        assert!(!text.contains("resize"), "no warning: {text}");
        expect_files(&shown, 40, 1);
        assert_eq!(file_system_bytes(&shown), full);
        ground.mount(&mounted);
        expect_files(&point, 40, 2);
        assert!(file_system_bytes(&point) < 100 * MIB);
        ground.ends_with(0, &["umount", shown_at]);
        ground.ends_with(0, &["umount", point.to_str().expect("a name")]);
        ground.ends_with(0, &["resize", "-s", "700M", &descriptor]);
        let device = ground.mount(&[descriptor.as_str()]);
        program("e2fsck", &["-f", "-n", device.to_str().expect("a name")]);
        ground.ends_with(0, &["umount", &descriptor]);
        ground.mount(&mounted);
        ground.ends_with(0, &["snapshot-delete", "-u", SNAPSHOT, &descriptor]);
        expect_files(&point, 40, 2);
        assert!(file_system_bytes(&point) > full);
        ground.ends_with(0, &["umount", &descriptor]);
        ground.ends_with(0, &["check", &descriptor]);
        let device = ground.mount(&[descriptor.as_str()]);
        program("e2fsck", &["-f", "-n", device.to_str().expect("a name")]);
        ground.ends_with(0, &["umount", &descriptor]);
        if !more.contains(&"raw") {
            check_with_qemu(&descriptor);
        }
    }
}

#[test]
fn xfs_does_not_become_smaller_and_grows_closed() {
    let Some(ground) = Ground::new() else { return };
    if !has("xfs_growfs") {
        return;
    }
    let descriptor = init(&ground, "disk", "400M", "xfs", &[]);
    let text = ground.ends_with(26, &["resize", "-s", "350M", &descriptor]);
    assert!(text.contains("xfs") && text.contains("nothing was changed"), "{text}");
    assert_eq!(size_of(&ground, &descriptor), 400 * MIB);
    ground.ends_with(0, &["resize", "-s", "900M", &descriptor]);
    let point = ground.make_folder("mnt");
    ground.mount(&["-m", point.to_str().expect("a name"), &descriptor]);
    assert!(file_system_bytes(&point) > 800 * MIB);
    ground.ends_with(0, &["umount", &descriptor]);
    let left: Vec<_> = fs::read_dir(ground.path("run"))
        .expect("the run-time folder")
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter(|name| name.contains("grow"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_disk_without_file_system_is_made_smaller_only_when_told() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let name = image.to_str().expect("a name");
    let device = ground.mount(&[name]);
    let direct = Direct::open(&device);
    direct.write(60 * MIB, 65536, 1).expect("write");
    direct.write(MIB, 65536, 2).expect("write");
    drop(direct);
    ground.ends_with(0, &["umount", name]);
    let text = ground.ends_with(38, &["resize", "-s", "32M", name]);
    assert!(text.contains("--force"), "{text}");
    ground.ends_with(0, &["resize", "-s", "61M", name]);
    ground.ends_with(0, &["resize", "--force", "-s", "32M", name]);
    let device = ground.mount(&[name]);
    Direct::open(&device).expect(MIB, 65536, 2);
    // The image alone, and the device that shows it whole.
    ground.ends_with(0, &["grow", "-s", "900M", "-d", device.to_str().expect("a name")]);
    let direct = Direct::open(&device);
    direct.write(899 * MIB, 65536, 3).expect("write to the new end");
    direct.expect(899 * MIB, 65536, 3);
    direct.expect(MIB, 65536, 2);
    assert!(
        direct.read(60 * MIB, 65536).expect("read").iter().all(|&byte| byte == 0),
        "what was cut off is gone"
    );
    drop(direct);
    ground.ends_with(38, &["grow", "-s", "100M", name]);
    ground.ends_with(0, &["umount", name]);
    ground.ends_with(0, &["grow", "-s", "2G", name]);
    ground.ends_with(38, &["grow", "-s", "100M", name]);
    for refused in
        [&["resize", "-b", "-s", "1G"][..], &["resize", "-p", "1", "-s", "1G"], &["resize", "-s", "0"]]
    {
        let text = ground.ends_with(38, &[refused, &[name]].concat());
        assert!(text.contains("advice"), "{text}");
    }
}

#[test]
fn a_raw_file_grows() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = folder.path().join("disk.raw");
    fs::write(&path, vec![7; 3 << 20]).expect("write");
    let output = Command::new(env!("CARGO_BIN_EXE_ploop"))
        .args(["grow", "-f", "raw", "-s", "10M"])
        .arg(&path)
        .env("PLOOP_RUN_DIR", folder.path().join("run"))
        .output()
        .expect("start ploop");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = fs::read(&path).expect("read");
    assert_eq!(found.len() as u64, 10 * MIB);
    assert!(found[..3 << 20].iter().all(|&byte| byte == 7) && found[3 << 20..].iter().all(|&byte| byte == 0));
}

/// Whenever the server dies, the guest loses nothing, and the same command ends what was begun.
#[test]
fn a_server_killed_while_it_grows_is_succeeded_and_the_command_finishes() {
    if !can_take_over() {
        ploop_testing::skip(ploop_testing::Need::Kernel(6, 9), "no successor on this kernel");
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let (file_system, tool) = if may_grow_ext4() { ("ext4", "resize2fs") } else { ("xfs", "xfs_growfs") };
    if !has(tool) {
        return;
    }
    let descriptor = init(&ground, "disk", "400M", file_system, &["-b", "64"]);
    let point = ground.make_folder("mnt");
    ground.mount(&["-m", point.to_str().expect("a name"), &descriptor]);
    write_files(&point, 20, 3);
    beside(
        1,
        |_, guest| rewrite_files(&point, guest),
        |guest| {
            // A server that dies five times is given up.
            for (step, wait_ms) in [5u64, 25, 60].into_iter().enumerate() {
                let target = format!("{}M", 800 * (step + 1));
                let before = ground.state();
                let growing = ground.start(&["resize", "-s", &target, &descriptor]);
                // Any moment will do.
                std::thread::sleep(Duration::from_millis(wait_ms));
                signal(before.server.expect("a server").id, Signal::SIGKILL);
                growing.wait();
                ground.wait_for_successor(&before);
                ground.wait_until("the command finishes", || {
                    ground.run(&["resize", "-s", &target, &descriptor]).status.success()
                });
                guest.goes_on(&ground, 2);
            }
        },
    );
    expect_files(&point, 20, 3);
    assert!(file_system_bytes(&point) > 2000 * MIB);
    ground.ends_with(0, &["umount", &descriptor]);
    assert_eq!(size_of(&ground, &descriptor), 2400 * MIB);
    check_with_qemu(&descriptor);
    let device = ground.mount(&[descriptor.as_str()]);
    let device = device.to_str().expect("a name");
    match file_system {
        "ext4" => program("e2fsck", &["-f", "-n", device]),
        _ => program("xfs_repair", &["-n", device]),
    };
    ground.ends_with(0, &["umount", &descriptor]);
}
