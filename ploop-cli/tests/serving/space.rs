//! Space that goes back to the host while a disk is in use.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::ground::{Direct, Ground, program, text};

const MIB: u64 = 1 << 20;

/// What the image takes on the host, in MiB.
fn host_mib(image: &Path) -> u64 {
    fs::metadata(image).unwrap().blocks() * 512 / MIB
}

fn length_mib(image: &Path) -> u64 {
    fs::metadata(image).unwrap().len() / MIB
}

fn report(ground: &Ground, line: &[&str]) -> Value {
    let output = ground.run(&[&["--json"], line].concat());
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_a_file_system_frees_is_free_at_once_and_used_again() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 512, 1024);
    let device = ground.mount(&[text(&image)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("point");
    ground.mount(&["-m", text(&point), text(&image)]);
    let fill = |name: &str, byte: u8| {
        fs::write(point.join(name), vec![byte; 100 << 20]).unwrap();
        program("sync", &["-f", text(&point)]);
    };
    let before = host_mib(&image);
    fill("first", 1);
    let full = (host_mib(&image), length_mib(&image));
    assert!(full.0 >= before + 95, "{before} {full:?}");
    fs::remove_file(point.join("first")).unwrap();
    program("sync", &["-f", text(&point)]);
    program("fstrim", &[text(&point)]);
    program("sync", &["-f", text(&point)]);
    ground.wait_until("the space is back", || host_mib(&image) < before + 20);
    // New data go into what was freed: the file grows by what is reserved ahead at most.
    fill("second", 2);
    assert!(length_mib(&image) <= full.1 + 70, "{full:?}, then {}", length_mib(&image));
    let info = report(&ground, &["info", text(&point)]);
    assert_eq!(info["allocated_clusters"], ground.status()["allocated_clusters"], "{info}");
    assert!(info["host_bytes"].as_u64().unwrap() >= 95 * MIB, "{info}");
    assert!(fs::read(point.join("second")).unwrap().iter().all(|&byte| byte == 2));
    ground.ends_with(0, &["umount", "-m", text(&point)]);

    // The original's words, on a disk that is not mounted.
    let device = ground.mount(&["-m", text(&point), text(&image)]);
    fs::remove_file(point.join("second")).unwrap();
    ground.ends_with(0, &["umount", text(&device)]);
    let descriptor = image.with_file_name("DiskDescriptor.xml");
    let done =
        report(&ground, &["balloon", "discard", "--automount", "--min-block", "64K", text(&descriptor)]);
    assert!(done["trimmed_bytes"].as_u64().unwrap() >= 95 * MIB, "{done}");
    assert!(length_mib(&image) < 60 && host_mib(&image) < 60, "{done}");
    assert!(ground.runtime().states().unwrap().is_empty(), "nothing stays mounted");
    let device = ground.mount(&[text(&image)]);
    program("e2fsck", &["-f", "-n", text(&device)]);
}

#[test]
fn a_running_disk_is_compacted() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 256, 1024);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for number in 0..64 {
        direct.write(number * MIB, 1 << 20, 1).unwrap();
    }
    direct.sync().unwrap();
    program("blkdiscard", &["-o", "0", "-l", "33554432", text(&device)]);
    direct.sync().unwrap();
    let map_before = report(&ground, &["map", text(&device)]);

    // One job at a time, and one that is told to stop stops.
    let slow = ground.start_job("compact", &["compact", "--limit", "64K", text(&device)]);
    let listed = report(&ground, &["list"]);
    assert_eq!(listed["disks"][0]["jobs"], json!(["compact"]), "{listed}");
    ground.ends_with(17, &["compact", "--to-free", "1", text(&device)]);
    direct.write(40 * MIB, 1 << 20, 2).unwrap();
    assert_eq!(slow.end_by(Signal::SIGINT).code(), Some(29));
    assert_eq!(ground.status()["jobs"], json!([]));

    let done = report(&ground, &["compact", text(&device)]);
    assert_eq!((&done["complete"], &done["running"]), (&Value::Bool(true), &Value::Bool(true)), "{done}");
    assert_eq!(done["file_bytes_after"].as_u64(), Some(33 * MIB), "{done}");
    assert_eq!(length_mib(&image), 33);
    assert!(host_mib(&image) <= 33, "{}", host_mib(&image));
    let check = || {
        for number in 32..64 {
            direct.expect(number * MIB, 1 << 20, if number == 40 { 2 } else { 1 });
        }
    };
    check();
    // The places have changed, nothing else; the moves survive the server.
    let map_after = report(&ground, &["map", text(&device)]);
    let covered = |map: &Value| -> Vec<u64> {
        let extents = map.as_array().unwrap();
        extents
            .iter()
            .filter(|extent| extent["data"] == true)
            .flat_map(|extent| {
                let start = extent["start"].as_u64().unwrap();
                (start..start + extent["length"].as_u64().unwrap()).step_by(1 << 20)
            })
            .collect()
    };
    assert_eq!(covered(&map_before), covered(&map_after));
    if crate::ground::can_take_over() {
        ground.kill_server_and_wait();
        check();
    }
    drop(direct);
    ground.ends_with(0, &["umount", text(&device)]);
    assert_eq!(report(&ground, &["map", text(&image)]), map_after);
}

#[test]
fn a_command_that_dies_ends_its_job() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 128, 1024);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for number in 0..40 {
        direct.write(number * MIB, 1 << 20, 1).unwrap();
    }
    direct.sync().unwrap();
    program("blkdiscard", &["-o", "0", "-l", "20971520", text(&device)]);
    direct.sync().unwrap();
    let slow = ground.start_job("compact", &["compact", "--limit", "64K", text(&device)]);
    assert_eq!(slow.end_by(Signal::SIGKILL).signal(), Some(9));
    ground.wait_until("the next one is let in", || {
        ground.run(&["compact", "--to-free", "1", text(&device)]).status.code() == Some(0)
    });
    for number in 20..40 {
        direct.expect(number * MIB, 1 << 20, 1);
    }
}

#[test]
fn unmounting_ends_a_job_and_closes_the_image() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 128, 1024);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for number in 0..40 {
        direct.write(number * MIB, 1 << 20, 1).unwrap();
    }
    direct.sync().unwrap();
    program("blkdiscard", &["-o", "0", "-l", "20971520", text(&device)]);
    direct.sync().unwrap();
    drop(direct);
    let slow = ground.start_job("compact", &["compact", "--limit", "64K", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    assert_eq!(slow.wait().code(), Some(29));
    let info = report(&ground, &["info", text(&image)]);
    assert_eq!((&info["in_use"], &info["allocated_clusters"]), (&Value::Bool(false), &Value::from(20)));
}
