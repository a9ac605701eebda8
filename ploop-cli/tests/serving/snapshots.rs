//! Snapshots of a served disk that is written to.

#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use ploop_core::device::control::Connection;
use ploop_core::format::DiskDescriptor;
use ploop_core::io::file::DirectoryFolder;
use ploop_core::io::sim::Random;
use serde_json::{Value, json};

use crate::ground::{Direct, Ground, can_take_over, program, signal, text};
use crate::guests::{Blocks, Guest, beside};
use crate::patience::PATIENCE;

/// A snapshot: of the file system at `point` by the command, which has it frozen; else asked of the server, as it runs.
fn snapshot(ground: &Ground, point: Option<&Path>) -> ploop_core::Result<Value> {
    if let Some(point) = point {
        return Ok(serde_json::from_str(&ground.ends_with(0, &["--json", "snapshot", text(point)])).unwrap());
    }
    let connection = Connection::open(&ground.socket())?;
    connection.ask("snapshot", &json!({"writing": "go_on"}), &[], Some(PATIENCE), |_| {})
}

fn delete(ground: &Ground, guid: &str) -> ploop_core::Result<Value> {
    let connection = Connection::open(&ground.socket())?;
    let (leash, _held) = nix::unistd::pipe().unwrap();
    let request = json!({"arguments": {"snapshot": guid}});
    connection.ask("snapshot-delete", &request, &[leash.as_fd()], Some(PATIENCE), |_| {})
}

fn name(report: &Value) -> String {
    report["snapshot"].as_str().unwrap().to_owned()
}

/// The snapshots of the bundle that holds `image`, and its files.
fn bundle(image: &Path) -> (Vec<String>, usize) {
    let folder = image.parent().unwrap();
    let descriptor = DiskDescriptor::load(&DirectoryFolder::open(folder).unwrap(), None).unwrap();
    let states =
        descriptor.shots().iter().map(|shot| shot.guid()).filter(|guid| *guid != descriptor.top_guid());
    let names = fs::read_dir(folder).unwrap().map(|item| item.unwrap().file_name());
    let files = names.filter(|name| name.to_string_lossy().starts_with("disk.hds")).count();
    (states.map(|guid| guid.to_string()).collect(), files)
}

/// Servers killed in one mount.
const KILLS_PER_MOUNT: u64 = 4;

#[test]
fn a_mounted_file_system_is_kept_as_it_was_and_goes_on() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 256, 1024);
    let device = ground.mount(&[text(&image)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let (point, kept) = (ground.make_folder("point"), ground.make_folder("kept"));
    ground.mount(&["-m", text(&point), text(&image)]);
    let written = AtomicU64::new(0);
    let write = |_, guest: &Guest| {
        // Each file says which it is, and the next is begun when it is whole.
        for number in 0_u64.. {
            if guest.is_over() {
                return;
            }
            let content = number.to_le_bytes().repeat(512 + (number as usize % 7) * 3000);
            let path = point.join(format!("file-{}", number % 400));
            fs::write(&path, &content).unwrap();
            assert!(fs::read(&path).unwrap() == content);
            written.store(number, Ordering::SeqCst);
            guest.step();
        }
    };
    beside(1, write, |guest| {
        for round in 0..3 {
            guest.goes_on(&ground, 20);
            let before = written.load(Ordering::SeqCst);
            let report = snapshot(&ground, Some(&point)).unwrap();
            println!("held for {} ms, frozen for {} ms", report["held_ms"], report["frozen_ms"]);
            assert_eq!(report["warnings"], json!([]), "round {round}");
            let guid = name(&report);
            // Read by somebody else while the disk goes on; clean without a replay of the journal.
            let other = ground.mount(&[
                "-r",
                "-u",
                &guid,
                "-m",
                text(&kept),
                "-o",
                "ro,noload",
                text(image.parent().unwrap()),
            ]);
            program("e2fsck", &["-f", "-n", text(&other)]);
            let features = program("dumpe2fs", &["-h", text(&other)]);
            assert!(!features.contains("needs_recovery"), "{features}");
            let last = kept.join(format!("file-{}", before % 400));
            assert!(!fs::read(last).unwrap().is_empty());
            assert_eq!(delete(&ground, &guid).unwrap_err().kind(), ploop_core::ErrorKind::InUse);
            ground.ends_with(0, &["umount", text(&other)]);
            if round != 1 {
                let report = delete(&ground, &guid).unwrap();
                println!("merged {} bytes, held for {} ms", report["merged_bytes"], report["held_ms"]);
            }
        }
    });
    let (left, files) = bundle(&image);
    assert_eq!((left.len(), files), (1, 2));
    delete(&ground, &left[0]).unwrap();
    assert_eq!(bundle(&image), (Vec::new(), 1));
    ground.ends_with(0, &["umount", "-m", text(&point)]);
    let device = ground.mount(&["-r", text(&image)]);
    program("e2fsck", &["-f", "-n", text(&device)]);
}

/// Writers that check what they wrote, while `disturb` works; then everything is checked on a new mount.
fn under_writers(ground: &Ground, image: &Path, disturb: impl FnOnce(&Guest)) {
    let blocks = Blocks::new(3, 300);
    blocks.written_beside(&ground.state().loop_device.unwrap(), disturb);
    ground.ends_with(0, &["umount", text(image)]);
    blocks.expect(&ground.mount(&["-n", "-r", text(image)]));
    ground.ends_with(0, &["umount", text(image)]);
}

#[test]
fn many_snapshots_and_merges_under_load_change_nothing() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    ground.mount(&["-n", "--threads", "2", text(&image)]);
    under_writers(&ground, &image, |_| {
        let mut kept: Vec<String> = Vec::new();
        for round in 0..24 {
            if kept.len() < 5 && round % 3 != 2 {
                kept.push(name(&snapshot(&ground, None).unwrap()));
            } else {
                let guid = kept.remove(round % kept.len());
                delete(&ground, &guid).unwrap();
            }
        }
        for guid in kept {
            delete(&ground, &guid).unwrap();
        }
    });
    assert_eq!(bundle(&image), (Vec::new(), 1));
}

#[test]
fn servers_that_die_in_snapshots_and_merges_lose_nothing() {
    if !can_take_over() {
        ploop_testing::skip(
            ploop_testing::Need::Kernel(6, 9),
            "this kernel cannot repeat requests to a successor",
        );
        return;
    }
    let Some(ground) = Ground::new() else { return };
    let number = |name: &str, usual: u64| std::env::var(name).map_or(usual, |text| text.parse().unwrap());
    let (seed, kills) = (number("SEED", 1), number("PLOOP_KILLS", 20));
    println!("SEED={seed}, {kills} kills");
    let image = ground.create("disk", 64, 64);
    // A keeper gives up after a handful of deaths in one minute.
    for mount in 0..kills.div_ceil(KILLS_PER_MOUNT) {
        ground.mount(&["-n", text(&image)]);
        kill_servers(&ground, &image, seed.wrapping_mul(1000) + mount);
        assert_eq!(bundle(&image), (Vec::new(), 1));
    }
}

/// Kills servers at random moments of snapshots and merges under load, then ends what was cut, and the mount.
fn kill_servers(ground: &Ground, image: &Path, seed: u64) {
    under_writers(ground, image, |guest| {
        let mut random = Random::new(seed);
        for _ in 0..KILLS_PER_MOUNT {
            guest.goes_on(ground, 50);
            let before = ground.state();
            let victim = before.server.unwrap().id;
            let delay = random.below(60_000);
            let deletes = random.chance(50);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // Any moment will do.
                    std::thread::sleep(Duration::from_micros(delay));
                    signal(victim, Signal::SIGKILL);
                });
                // Until the server dies. What comes of it is not known.
                let (kept, _) = bundle(image);
                match kept.first().filter(|_| deletes || kept.len() > 4) {
                    Some(guid) => drop(delete(ground, guid)),
                    None => drop(snapshot(ground, None)),
                }
            });
            ground.wait_for_successor(&before);
        }
        // The same commands again end what was cut.
        for guid in bundle(image).0 {
            delete(ground, &guid).unwrap();
        }
        let last = name(&snapshot(ground, None).unwrap());
        delete(ground, &last).unwrap();
    });
}

#[test]
fn a_full_host_and_other_jobs_are_told_and_the_disk_goes_on() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    direct.write(0, 65536, 1).unwrap();
    // A descriptor that somebody else works on: nothing is changed.
    let connection = Connection::open(&ground.socket()).unwrap();
    let wrong = connection.ask(
        "snapshot",
        &json!({"snapshot": "no guid", "writing": "go_on"}),
        &[],
        Some(PATIENCE),
        |_| {},
    );
    assert!(wrong.is_err());
    let taken = name(&snapshot(&ground, None).unwrap());
    let again = connection.ask(
        "snapshot",
        &json!({"snapshot": taken, "writing": "go_on"}),
        &[],
        Some(PATIENCE),
        |_| {},
    );
    assert_eq!(again.unwrap_err().kind(), ploop_core::ErrorKind::Parameter);
    direct.write(65536, 65536, 2).unwrap();
    direct.expect(0, 65536, 1);
    direct.expect(65536, 65536, 2);
    drop(direct);
    // The descriptor is another file than the one it was mounted by.
    ground.ends_with(0, &["umount", text(image.parent().unwrap())]);
    // A disk from image files has no snapshots.
    assert_eq!(bundle(&image).1, 2);
}
