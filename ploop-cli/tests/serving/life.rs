//! The ordinary life of a served disk.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::io::Access;
use ploop_core::{Extent, ops};

use crate::ground::{Direct, Ground, expect_stamped, program, signal, text};

const MIB: u64 = 1 << 20;

#[test]
fn a_file_system_lives_through_unmount_and_mount() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 256, 1024);
    let device = ground.mount(&[text(&image)]);
    assert_eq!(fs::read_to_string(sysfs(&device, "queue/write_cache")).unwrap().trim(), "write back");
    assert_eq!(fs::read_to_string(sysfs(&device, "queue/discard_granularity")).unwrap().trim(), "1048576");
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", "-d", text(&device)]);
    assert!(ground.runtime().states().unwrap().is_empty());

    let point = ground.make_folder("point");
    let device = ground.mount(&["-F", "-m", text(&point), text(&image)]);
    let tree = point.join("tree");
    fs::create_dir(&tree).unwrap();
    for number in 0..200_u32 {
        let content: Vec<u8> = number.to_le_bytes().repeat(1000 + number as usize * 40);
        fs::write(tree.join(format!("file-{number}")), content).unwrap();
    }
    program("sync", &["-f", text(&point)]);
    let listed = ground.ends_with(0, &["list"]);
    assert!(listed.contains(text(&device)) && listed.contains(text(&point)), "{listed}");
    ground.ends_with(0, &["umount", "-m", text(&point)]);

    // Everything is in the image, which is closed.
    ops::info(&ops::InfoOptions::new(&image)).unwrap();
    let device = ground.mount(&["-r", "-m", text(&point), text(&image)]);
    for number in 0..200_u32 {
        let content: Vec<u8> = number.to_le_bytes().repeat(1000 + number as usize * 40);
        assert!(fs::read(tree.join(format!("file-{number}"))).unwrap() == content, "file-{number}");
    }
    assert!(fs::write(tree.join("new"), "x").is_err(), "a read-only disk took a write");
    program("umount", &[text(&point)]);
    program("e2fsck", &["-f", "-n", text(&device)]);
    // Found by the place where it was mounted, although somebody has unmounted it by hand.
    ground.ends_with(0, &["umount", "-m", text(&point)]);
    ground.ends_with(40, &["umount", "-m", text(&point)]);
}

fn sysfs(device: &Path, attribute: &str) -> std::path::PathBuf {
    Path::new("/sys/block").join(device.file_name().unwrap()).join(attribute)
}

#[test]
fn what_is_written_past_the_page_cache_is_in_the_image() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", "--threads", "2", text(&image)]);
    let direct = Direct::open(&device);
    // Large, small, across clusters, and at both ends of the disk; in parallel.
    let places: [(u64, usize); 6] = [
        (0, 512),
        (MIB, 3 << 20),
        (8 * MIB - 4096, 8192),
        (20 * MIB + 512, 1024),
        (33 * MIB, 65536),
        (64 * MIB - 512, 512),
    ];
    std::thread::scope(|scope| {
        for (offset, len) in places {
            let direct = &direct;
            scope.spawn(move || direct.write(offset, len, 7).unwrap());
        }
    });
    direct.sync().unwrap();
    for (offset, len) in places {
        direct.expect(offset, len, 7);
    }
    assert!(direct.read(50 * MIB, 65536).unwrap().iter().all(|&byte| byte == 0));
    drop(direct);

    // The exported file takes any offset and length.
    let file = fs::File::open(ground.runtime().entry(&ground.state().id).disk_file()).unwrap();
    let mut odd = [0; 1001];
    file.read_exact_at(&mut odd, MIB + 13).unwrap();
    let mut whole = vec![0; 2048];
    crate::ground::stamp(&mut whole, MIB, 7);
    assert_eq!(odd[..], whole[13..1014]);
    assert_eq!(file.read_at(&mut odd, 64 * MIB - 100).unwrap(), 100);
    assert_eq!(file.read_at(&mut odd, 64 * MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut odd, 1 << 50).unwrap(), 0);
    drop(file);
    ground.ends_with(0, &["umount", text(&image)]);

    let opened = ops::open(&ops::OpenOptions::new(&image, Access::ReadOnly)).unwrap();
    let disk = Disk::open(opened.chain, DiskOptions { read_only: true, ..DiskOptions::default() }).unwrap();
    let mut client = Client::new(&disk, ploop_core::io::best_io_queue(16).unwrap()).unwrap();
    for (offset, len) in places {
        let bytes = client.read(Extent::new(offset, len as u64).unwrap()).unwrap();
        expect_stamped(bytes.as_slice(), offset, 7);
    }
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 256, 1024);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for number in 0..64 {
        direct.write(number * MIB, 1 << 20, 1).unwrap();
    }
    direct.sync().unwrap();
    assert_eq!(ground.status()["allocated_clusters"], 64);
    let before = fs::metadata(&image).unwrap().blocks();
    program("blkdiscard", &["-o", "8388608", "-l", "33554432", text(&device)]);
    // A part of a cluster cannot be given back, but must read as zeros.
    program("blkdiscard", &["-z", "-o", "4096", "-l", "8192", text(&device)]);
    direct.sync().unwrap();
    assert_eq!(ground.status()["allocated_clusters"], 32);
    direct.expect(0, 4096, 1);
    assert!(direct.read(4096, 8192).unwrap().iter().all(|&byte| byte == 0));
    direct.expect(12288, 4096, 1);
    assert!(direct.read(8 * MIB, 32 << 20).unwrap().iter().all(|&byte| byte == 0));
    for number in (0..8).skip(1).chain(40..64) {
        direct.expect(number * MIB, 1 << 20, 1);
    }
    // Written again they hold the new, and nothing old.
    direct.write(9 * MIB + 4096, 4096, 2).unwrap();
    direct.expect(9 * MIB + 4096, 4096, 2);
    assert!(direct.read(9 * MIB, 4096).unwrap().iter().all(|&byte| byte == 0));
    assert!(direct.read(9 * MIB + 8192, 65536).unwrap().iter().all(|&byte| byte == 0));
    drop(direct);
    // Punching is the flusher's work after the flush.
    ground
        .wait_until("the image has shrunk", || fs::metadata(&image).unwrap().blocks() + (24 << 11) < before);
    // All of it at once: one request of many clusters.
    program("blkdiscard", &[text(&device)]);
    Direct::open(&device).sync().unwrap();
    assert_eq!(ground.status()["allocated_clusters"], 0);
}

#[test]
fn exit_codes_say_what_is_wrong() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 1024);
    let point = ground.make_folder("point");
    ground.ends_with(40, &["umount", text(&image)]);
    ground.ends_with(21, &["mount", "-m", text(&ground.path("nowhere")), text(&image)]);
    // There is no file system yet: nothing stays behind.
    ground.ends_with(21, &["mount", "-m", text(&point), text(&image)]);
    assert!(ground.runtime().states().unwrap().is_empty());
    let device = ground.mount(&[text(&image)]);
    let told = ground.ends_with(37, &["mount", text(&image)]);
    assert!(told.contains("ploop umount"), "{told}");
    ground.ends_with(37, &["mount", "-r", text(image.parent().unwrap())]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(image.parent().unwrap())]);

    ground.mount(&["-m", text(&point), text(&image)]);
    let busy = fs::File::create(point.join("open")).unwrap();
    let told = ground.ends_with(46, &["umount", text(&point)]);
    assert!(told.contains("in use"), "{told}");
    assert_eq!(ground.status()["poisoned"], false);
    drop(busy);
    ground.ends_with(0, &["umount", text(&point)]);
    // Somebody reads the exported file itself.
    let device = ground.mount(&[text(&image)]);
    let reader = fs::File::open(ground.runtime().entry(&ground.state().id).disk_file()).unwrap();
    ground.ends_with(46, &["umount", text(&device)]);
    drop(reader);
    ground.ends_with(0, &["umount", text(&image)]);
    // A file that is no image, and one that is raw.
    let raw = ground.path("raw.img");
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    ground.ends_with(11, &["mount", text(&raw)]);
    ground.mount(&["-f", "raw", text(&raw)]);
}

/// A device that was taken away by hand, or by an unmount that went half way, is somebody else's the next moment.
#[test]
fn a_device_that_shows_another_disk_by_now_is_left_alone() {
    let Some(ground) = Ground::new() else { return };
    let (one, other) = (ground.create("one", 64, 1024), ground.create("other", 64, 1024));
    let device = ground.mount(&[text(&other)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&other)]);
    let point = ground.make_folder("point");
    // Other tests take loop devices as well.
    let device = (0..50).find_map(|_| {
        let device = ground.mount(&["-n", text(&one)]);
        program("losetup", &["-d", text(&device)]);
        let taken = ground.run(&["mount", "-d", text(&device), "-m", text(&point), text(&other)]);
        if !taken.status.success() {
            ground.ends_with(0, &["umount", text(&one)]);
        }
        taken.status.success().then_some(device)
    });
    let device = device.expect("the device was free for once");
    let listed = ground.ends_with(0, &["list"]);
    let shown = one.with_file_name("DiskDescriptor.xml");
    assert!(listed.lines().any(|line| line.starts_with("- ") && line.contains(text(&shown))), "{listed}");
    fs::write(point.join("file"), "other").unwrap();
    ground.ends_with(0, &["umount", text(&one)]);
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "other", "still mounted");
    assert!(ground.ends_with(0, &["list"]).contains(text(&point)));
    ground.ends_with(0, &["umount", text(&device)]);
    assert!(ground.runtime().states().unwrap().is_empty());
}

#[test]
fn the_first_partition_is_shown_and_the_table_left_alone() {
    let Some(ground) = Ground::new() else { return };
    if Command::new("sgdisk").arg("--version").output().is_err() {
        ploop_testing::skip(ploop_testing::Need::Program("sgdisk"), "no sgdisk");
        return;
    }
    let raw = ground.path("raw.img");
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    program("sgdisk", &["-n", "1:4096:+40M", "-n", "2:0:0", text(&raw)]);
    let table = fs::read(&raw).unwrap();
    let device = ground.mount(&["-f", "raw", text(&raw)]);
    let size = fs::read_to_string(sysfs(&device, "size")).unwrap();
    assert_eq!(size.trim(), (40 * MIB / 512).to_string());
    Direct::open(&device).write(0, 4096, 3).unwrap();
    ground.ends_with(0, &["umount", text(&device)]);
    let after = fs::read(&raw).unwrap();
    assert!(after[..4096 * 512] == table[..4096 * 512]);
    expect_stamped(&after[4096 * 512..4096 * 512 + 4096], 0, 3);
    // The whole disk on demand.
    let device = ground.mount(&["-n", "-f", "raw", text(&raw)]);
    assert_eq!(fs::read_to_string(sysfs(&device, "size")).unwrap().trim(), (64 * MIB / 512).to_string());
}

#[test]
fn a_signal_to_end_waits_for_the_users() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 1024);
    let device = ground.mount(&[text(&image)]);
    let direct = Direct::open(&device);
    direct.write(0, 4096, 1).unwrap();
    signal(ground.state().keeper.unwrap().id, Signal::SIGTERM);
    // What was written is durable now, and the disk goes on.
    ground.wait_until("everything is durable", || ground.status()["pending_entries"] == 0);
    direct.write(4096, 4096, 2).unwrap();
    direct.expect(0, 4096, 1);
    drop(direct);
    program("losetup", &["-d", text(&device)]);
    ground.wait_until("the server has ended", || ground.runtime().states().unwrap().is_empty());
    let device = ground.mount(&[text(&image)]);
    Direct::open(&device).expect(4096, 4096, 2);
}
