//! The commands on snapshots as a whole: temporary ones for backups, commands that are killed, full hosts, two at once.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use nix::sys::signal::Signal;
use pcopy::freeze::{Helper, HelperQuiesce, Quiesce};
use ploop_core::device::control::{Connection, ControlServer, Handlers};
use ploop_core::{Error, ErrorKind};
use serde_json::json;

use crate::ground::{Direct, Ground, program, text};
use crate::patience::PATIENCE;

const ONE: &str = "{11111111-1111-1111-1111-111111111111}";
const OTHER: &str = "{99999999-9999-9999-9999-999999999999}";

/// A disk with an ext4 file system that is mounted, and where.
fn mounted(ground: &Ground) -> (PathBuf, PathBuf) {
    let image = ground.create("disk", 128, 64);
    let device = ground.mount(&[text(&image)]);
    program("mkfs.ext4", &["-q", text(&device)]);
    ground.ends_with(0, &["umount", text(&device)]);
    let point = ground.make_folder("point");
    ground.mount(&["-m", text(&point), text(&image)]);
    (image, point)
}

fn files(image: &Path) -> usize {
    let names = fs::read_dir(image.parent().unwrap()).unwrap().map(|item| item.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("disk.hds")).count()
}

#[test]
fn a_backup_reads_a_temporary_snapshot_of_a_running_and_of_a_closed_disk() {
    let Some(ground) = Ground::new() else { return };
    let (image, point) = mounted(&ground);
    let disk = image.parent().unwrap().to_path_buf();
    let kept = ground.make_folder("kept");
    for runs in [true, false] {
        if runs {
            fs::write(point.join("file"), "before").unwrap();
        } else {
            ground.ends_with(0, &["umount", "-m", text(&point)]);
        }
        let line = ["tsnapshot", "-u", ONE, "-c", "backup", "-m", text(&kept), "-o", "noload", text(&disk)];
        let device = ground.ends_with(0, &line).trim().to_owned();
        assert!(device.starts_with("/dev/loop"), "{device}");
        // Frozen in a consistent state: nothing to replay.
        program("e2fsck", &["-f", "-n", &device]);
        assert!(!program("dumpe2fs", &["-h", &device]).contains("needs_recovery"));
        ground.ends_with(37, &["tsnapshot", "-c", "backup", text(&disk)]);
        ground.ends_with(37, &["snapshot-delete", "-u", ONE, text(&disk)]);
        if runs {
            fs::write(point.join("file"), "behind").unwrap();
            File::open(&point).unwrap().sync_all().unwrap();
        }
        let expected = if runs { "before" } else { "behind" };
        assert_eq!(fs::read_to_string(kept.join("file")).unwrap(), expected);
        let list = ground.ends_with(0, &["snapshot-list", "-H", "-o", "uuid", text(&disk)]);
        assert!(list.contains(ONE), "{list}");
        ground.ends_with(0, &["umount", "-c", "backup", text(&disk)]);
        assert_eq!(files(&image), 1, "the snapshot has gone with its use");
        let list = ground.ends_with(0, &["snapshot-list", "-H", "-o", "uuid", text(&disk)]);
        assert_eq!(list.lines().count(), 1, "{list}");
        if runs {
            assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "behind");
        }
    }
    // Where it cannot be mounted, there is none.
    ground.ends_with(21, &["tsnapshot", "-c", "b", "-m", text(&kept), "-t", "xfs", text(&disk)]);
    assert_eq!(files(&image), 1);
    ground.ends_with(21, &["tsnapshot", "-c", "b", "-m", "/nowhere/at/all", text(&disk)]);
    for line in [
        &["snapshot-delete", "-u", OTHER][..],
        &["snapshot-merge", "-u", OTHER],
        &["mount", "-r", "-u", OTHER],
        &["snapshot-switch", "-u", OTHER],
    ] {
        ground.ends_with(43, &[line, &[text(&disk)]].concat());
    }
    // A running disk says the same.
    ground.mount(&["-m", text(&point), text(&image)]);
    for verb in ["snapshot-delete", "snapshot-merge"] {
        ground.ends_with(43, &[verb, "-u", OTHER, text(&disk)]);
    }
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "behind");
}

/// The real socket of a disk, back in its place at the end.
struct SocketAside(PathBuf, PathBuf);

impl Drop for SocketAside {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
        fs::rename(&self.1, &self.0).ok();
    }
}

#[test]
fn a_command_killed_in_the_freeze_leaves_nothing_frozen() {
    let Some(ground) = Ground::new() else { return };
    let (image, point) = mounted(&ground);
    // A server that asks for the freeze and then says nothing any more.
    let socket = ground.socket();
    let aside = SocketAside(socket.clone(), socket.with_extension("aside"));
    fs::rename(&aside.0, &aside.1).unwrap();
    let (frozen, is_frozen) = mpsc::channel();
    let server = ControlServer::start(
        &socket,
        Handlers::new().with("snapshot", move |connection, arguments, descriptors| {
            let ticket = serde_json::from_value(arguments["writing"]["stop_by"].clone()).unwrap();
            let socket = descriptors.into_iter().next().unwrap();
            let helper = Helper { connection: Connection::from_socket(socket), ticket };
            let mut quiesce = HelperQuiesce::new(helper, None, None);
            quiesce.run_hook()?;
            quiesce.freeze_file_system()?;
            frozen.send(()).ok();
            connection.wait_closed(PATIENCE);
            // As a server that dies: the helper's connection is closed, and nobody asks it to thaw.
            quiesce.abandon();
            Err(Error::new(ErrorKind::Cancelled, "the test is over"))
        }),
    )
    .unwrap();
    let command = ground.start(&["snapshot", text(image.parent().unwrap())]);
    let begun = is_frozen.recv_timeout(PATIENCE);
    let again = Command::new("fsfreeze").args(["-f", text(&point)]).stderr(Stdio::null()).status().unwrap();
    command.end_by(Signal::SIGKILL);
    begun.unwrap();
    assert!(!again.success(), "it was not frozen");
    // A file system that is frozen keeps this waiting: on its own, so that the test goes on.
    let (done, is_done) = mpsc::channel();
    let file = point.join("file");
    std::thread::spawn(move || {
        let written = File::create(file).and_then(|mut file| {
            file.write_all(b"thawed")?;
            file.sync_all()
        });
        done.send(written).ok();
    });
    let written = is_done.recv_timeout(PATIENCE);
    if written.is_err() {
        Command::new("fsfreeze").args(["-u", text(&point)]).status().unwrap();
    }
    written.unwrap().unwrap();
    server.stop(PATIENCE);
    drop(aside);
    ground.ends_with(0, &["snapshot", "-u", ONE, text(&point)]);
    ground.ends_with(0, &["snapshot-delete", "-u", ONE, text(&point)]);
}

/// A small host file system of its own; what is served from it ends before it.
struct SmallHost<'a> {
    ground: &'a Ground,
    point: PathBuf,
    disk: PathBuf,
}

impl Drop for SmallHost<'_> {
    fn drop(&mut self) {
        self.ground.run(&["umount", text(&self.disk)]);
        Command::new("umount").arg("-l").arg(&self.point).status().ok();
    }
}

#[test]
fn a_full_host_refuses_a_snapshot_and_the_guest_goes_on() {
    let Some(ground) = Ground::new() else { return };
    let host = ground.path("host.img");
    File::create(&host).unwrap().set_len(96 << 20).unwrap();
    program("mkfs.ext4", &["-q", "-m", "0", text(&host)]);
    let point = ground.make_folder("host");
    program("mount", &["-o", "loop", text(&host), text(&point)]);
    let small = SmallHost { ground: &ground, disk: point.join("disk/disk.hds"), point: point.clone() };
    let image = ground.create("host/disk", 256, 1024);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for at in 0..8 {
        direct.write(at << 20, 1 << 20, 1).unwrap();
    }
    direct.sync().unwrap();
    // To the last block.
    let mut filler = File::create(point.join("filler")).unwrap();
    for piece in [1 << 20, 4096, 512, 1] {
        let bytes = vec![7; piece];
        while filler.write_all(&bytes).and_then(|()| filler.sync_data()).is_ok() {}
    }
    let folder = image.parent().unwrap();
    let refused = ground.run(&["snapshot", "--crash-consistent", "-u", ONE, text(folder)]);
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{complaint}");
    assert!(!refused.status.success() && complaint.contains("No space left"), "{complaint}");
    for at in 0..8 {
        direct.expect(at << 20, 1 << 20, 1);
        direct.write(at << 20, 1 << 20, 2).unwrap();
    }
    direct.sync().unwrap();
    assert_eq!(ground.status()["poisoned"], json!(false));
    assert_eq!(files(&image), 1, "nothing is left of it");
    drop(filler);
    fs::remove_file(point.join("filler")).unwrap();
    ground.ends_with(0, &["snapshot", "--crash-consistent", "-u", ONE, text(folder)]);
    direct.write(0, 1 << 20, 3).unwrap();
    drop(direct);
    let frozen = ground.mount(&["-n", "-r", "-u", ONE, "-c", "look", text(folder)]);
    let reader = Direct::open_to_read(&frozen);
    (0..8).for_each(|at| reader.expect(at << 20, 1 << 20, 2));
    drop(reader);
    ground.ends_with(0, &["umount", "-c", "look", text(folder)]);
    ground.ends_with(0, &["umount", text(folder)]);
    drop(small);
}

#[test]
fn the_second_of_two_commands_is_refused_and_changes_nothing() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let folder = image.parent().unwrap();
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    ground.ends_with(0, &["snapshot", "--crash-consistent", "-u", ONE, text(folder)]);
    direct.write(0, 8 << 20, 1).unwrap();
    // So slow that it is met at work.
    let mut first = ground.start(&["snapshot-delete", "-u", ONE, "--limit", "64K", text(folder)]);
    let descriptor = folder.join("DiskDescriptor.xml");
    first.wait_until("the merge has begun", || {
        fs::read_to_string(&descriptor).is_ok_and(|text| text.contains("Temporary"))
    });
    for line in [
        &["snapshot", "--crash-consistent"][..],
        &["snapshot-delete", "-u", ONE],
        &["tsnapshot", "--crash-consistent", "-c", "backup"],
    ] {
        ground.ends_with(17, &[line, &[text(folder)]].concat());
    }
    // The merge is cancelled; what the guest does then is what it finds.
    assert_eq!(first.end_by(Signal::SIGINT).code(), Some(29));
    direct.expect(0, 8 << 20, 1);
    direct.write(0, 1 << 20, 2).unwrap();
    ground.ends_with(0, &["snapshot-delete", "-u", ONE, text(folder)]);
    direct.expect(0, 1 << 20, 2);
    direct.expect(1 << 20, 7 << 20, 1);
    drop(direct);
    ground.ends_with(0, &["umount", text(folder)]);
    assert_eq!(files(&image), 1);
}
