//! Real processes, killed at any byte of the stream: the survivor fails or has finished, nothing half-done has the final
//! name, the source is untouched, and the next attempt over the left-overs succeeds. And the process that freezes and thaws.
//!
//! `PLOOP_KILL_TRIALS` sets the number of trials of each kind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pcopy::freeze::{FreezeRecord, StandstillLimits, thaw_recorded};
use pcopy::{Helper, HelperQuiesce, LocalQuiesce, MountedFileSystem, Quiesce, QuiesceOptions};
use ploop_core::Extent;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::io::{Access, pool, sys};
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::ops::open::{OpenOptions, open};
use ploop_core::units::Sectors;
use support::patience::{is_running, wait_until};
use support::*;

const PCOPY: &str = env!("CARGO_BIN_EXE_pcopy");
const LEN: u64 = 16 << 20;

fn trials() -> u64 {
    std::env::var("PLOOP_KILL_TRIALS").ok().and_then(|value| value.parse().ok()).unwrap_or(12)
}

/// A child that does not outlive its test.
struct Process(Child);

impl Process {
    fn start(arguments: &[&str], input: Stdio, output: Stdio) -> Self {
        let child = Command::new(PCOPY)
            .args(arguments)
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn code(&mut self) -> Option<i32> {
        let mut ended = None;
        wait_until("the process ends", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn disk_content(path: &Path) -> Vec<u8> {
    let opened = open(&OpenOptions::new(path, Access::ReadOnly)).unwrap();
    let disk = Disk::open(opened.chain, DiskOptions { read_only: true, ..Default::default() }).unwrap();
    let mut client = Client::new(&disk, pool::best_io_queue(16).unwrap()).unwrap();
    client.read(Extent::between(0, disk.size_bytes())).unwrap().as_slice().to_vec()
}

fn source(root: &Path) -> PathBuf {
    let folder = root.join("from");
    std::fs::create_dir(&folder).unwrap();
    create(&CreateOptions::new(&folder, "root.hds", Sectors(LEN / 512))).unwrap();
    let opened = open(&OpenOptions::new(&folder, Access::ReadWrite)).unwrap();
    let disk = Disk::open(opened.chain, DiskOptions::default()).unwrap();
    let mut client = Client::new(&disk, pool::best_io_queue(16).unwrap()).unwrap();
    client.write(0, &content(3, usize::try_from(LEN).unwrap())).unwrap();
    drop(client);
    disk.close().unwrap();
    folder
}

fn one_way(from: &Path, to: &Path) -> (Process, Process) {
    let mut sender = Process::start(&["send", from.to_str().unwrap()], Stdio::null(), Stdio::piped());
    let stream = sender.0.stdout.take().unwrap();
    let receiver = Process::start(
        &["receive", to.to_str().unwrap()],
        Stdio::from(std::os::fd::OwnedFd::from(stream)),
        Stdio::null(),
    );
    (sender, receiver)
}

fn two_way(from: &Path, to: &Path) -> Process {
    let command = format!("'{PCOPY}' receive '{}'", to.display());
    Process::start(&["send", "--to", &command, from.to_str().unwrap()], Stdio::null(), Stdio::null())
}

#[test]
fn processes_copy_an_image() {
    let root = referee::folder();
    let from = source(root.path());
    let expected = disk_content(&from);
    for name in ["one", "two"] {
        let folder = root.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let to = folder.join("copy.hds");
        if name == "one" {
            let (mut sender, mut receiver) = one_way(&from, &to);
            assert_eq!((sender.code(), receiver.code()), (Some(0), Some(0)));
        } else {
            assert_eq!(two_way(&from, &to).code(), Some(0));
        }
        assert!(disk_content(&folder) == expected);
        // The name is taken now.
        let (_sender, mut receiver) = one_way(&from, &to);
        assert_eq!(receiver.code(), Some(1));
        assert_eq!(two_way(&from, &to).code(), Some(1));
    }
}

#[test]
fn wrong_use_has_a_code_and_a_message() {
    let root = referee::folder();
    let missing = root.path().join("missing");
    let code = |arguments: &[&str], code: i32, word: &str| {
        let mut process = Process::start(arguments, Stdio::null(), Stdio::null());
        assert_eq!(process.code(), Some(code), "{arguments:?}");
        let mut text = String::new();
        process.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(text.contains(word), "{text}");
    };
    let missing = missing.to_str().unwrap();
    code(&["send"], 38, "Usage");
    code(&["send", missing], 4, missing);
    code(&["send", "--to", "a | b", root.path().to_str().unwrap()], 39, "descriptor");
    code(&["receive", missing], 6, "empty");
}

#[test]
fn a_killed_side_leaves_nothing_behind() {
    let root = referee::folder();
    let from = source(root.path());
    let image = std::fs::read(from.join("root.hds")).unwrap();
    let expected = disk_content(&from);
    let mut random = Random(11);
    for trial in 0..trials() {
        let folder = root.path().join(format!("to-{trial}"));
        std::fs::create_dir(&folder).unwrap();
        let to = folder.join("copy.hds");
        let victim_is_sender = trial % 2 == 0;
        let mut sender = Process::start(&["send", from.to_str().unwrap()], Stdio::null(), Stdio::piped());
        let mut receiver = Process::start(&["receive", to.to_str().unwrap()], Stdio::piped(), Stdio::null());
        // The test is the pipe: it kills at a byte.
        let mut stream = sender.0.stdout.take().unwrap();
        let mut sink = receiver.0.stdin.take().unwrap();
        let at = random.below(LEN / 3);
        let mut carried = 0;
        let mut buffer = vec![0; 20_000];
        let mut killed = false;
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sink.write_all(&buffer[..count]).is_err() {
                break;
            }
            carried += count as u64;
            if carried >= at && !std::mem::replace(&mut killed, true) {
                if victim_is_sender {
                    sender.kill()
                } else {
                    receiver.kill()
                };
            }
        }
        drop((stream, sink));
        let codes = (sender.code(), receiver.code());
        assert!(killed, "the stream was shorter than thought");
        if victim_is_sender {
            assert_eq!(codes, (None, Some(6)), "killed at {at}");
        } else {
            assert_eq!(codes.1, None);
            // What was in the pipe may have been the rest.
            assert!(matches!(codes.0, Some(7 | 0)), "{codes:?}");
        }
        assert!(!to.exists());
        let (mut sender, mut receiver) = one_way(&from, &to);
        assert_eq!((sender.code(), receiver.code()), (Some(0), Some(0)), "retry");
        assert!(disk_content(&folder) == expected);
        let names = std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(names, 2, "image and descriptor, no left-overs");
    }
    assert!(std::fs::read(from.join("root.hds")).unwrap() == image, "the source is untouched");
}

/// As above with all snapshots, killed at any byte from the first delta to the last.
#[test]
fn a_killed_side_of_a_copy_of_deltas_leaves_nothing_behind() {
    let root = referee::folder();
    let from = root.path().join("from");
    let guids = disk_with_snapshots(&from, LEN, 21, |options| options.cluster = Sectors(128));
    let expected: Vec<Vec<u8>> = guids.iter().map(|guid| content_of_state(&from, *guid)).collect();
    let current = disk_content(&from);
    let images = files_of(&from);
    let mut random = Random(13);
    for trial in 0..trials() {
        let folder = root.path().join(format!("to-{trial}"));
        std::fs::create_dir(&folder).unwrap();
        let to = folder.join("copy.hds");
        let victim_is_sender = trial % 2 == 0;
        let send = ["send", "--chain", from.to_str().unwrap()];
        let mut sender = Process::start(&send, Stdio::null(), Stdio::piped());
        let mut receiver = Process::start(&["receive", to.to_str().unwrap()], Stdio::piped(), Stdio::null());
        let mut stream = sender.0.stdout.take().unwrap();
        let mut sink = receiver.0.stdin.take().unwrap();
        let at = random.below(LEN / 4);
        let (mut carried, mut killed) = (0, false);
        let mut buffer = vec![0; 20_000];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sink.write_all(&buffer[..count]).is_err() {
                break;
            }
            carried += count as u64;
            if carried >= at && !std::mem::replace(&mut killed, true) {
                if victim_is_sender {
                    sender.kill()
                } else {
                    receiver.kill()
                };
            }
        }
        drop((stream, sink));
        let codes = (sender.code(), receiver.code());
        assert!(killed, "the stream was shorter than thought: {carried} bytes");
        if victim_is_sender {
            assert_eq!(codes, (None, Some(6)), "killed at {at}");
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "left-overs");
        } else {
            assert_eq!(codes.1, None);
            assert!(matches!(codes.0, Some(7 | 0)), "{codes:?}");
        }
        let is_named = |name: &str| !name.starts_with("copy.hds.incoming-");
        assert!(
            !names_in(&folder).iter().any(|name| is_named(name)),
            "a final name: {:?}",
            names_in(&folder)
        );
        let mut sender = Process::start(&send, Stdio::null(), Stdio::piped());
        let stream = Stdio::from(std::os::fd::OwnedFd::from(sender.0.stdout.take().unwrap()));
        let mut receiver = Process::start(&["receive", to.to_str().unwrap()], stream, Stdio::null());
        assert_eq!((sender.code(), receiver.code()), (Some(0), Some(0)), "retry");
        for (guid, expected) in guids.iter().zip(&expected) {
            assert!(content_of_state(&folder, *guid) == *expected, "{guid}");
        }
        assert!(disk_content(&folder) == current);
        assert_eq!(names_in(&folder).len(), 6, "five images and the descriptor, no left-overs");
        // The judge would look at each of them.
        std::fs::remove_dir_all(&folder).unwrap();
    }
    assert!(files_of(&from) == images, "the source is untouched");
}

fn names_in(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The bytes of every file in a folder.
fn files_of(folder: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    names_in(folder)
        .into_iter()
        .map(|name| (name.clone(), std::fs::read(folder.join(name)).unwrap()))
        .collect()
}

#[test]
fn a_killed_side_of_a_two_way_copy_is_noticed() {
    let root = referee::folder();
    let from = source(root.path());
    let expected = disk_content(&from);
    let mut random = Random(12);
    for trial in 0..trials() {
        let folder = root.path().join(format!("to-{trial}"));
        std::fs::create_dir(&folder).unwrap();
        let to = folder.join("copy.hds");
        let mut sender = two_way(&from, &to);
        // Any moment will do, also one before the beginning or behind the end.
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        let children = format!("/proc/{0}/task/{0}/children", sender.0.id());
        let receiver: Option<u32> = std::fs::read_to_string(children)
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok());
        if trial % 2 == 0 {
            sender.kill();
        } else if let Some(receiver) = receiver {
            // It may have ended meanwhile.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(receiver).unwrap()),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        let code = sender.code();
        // The other one ends as well.
        wait_until("the receiver has ended", || !receiver.is_some_and(is_running));
        if to.exists() {
            assert!(disk_content(&folder) == expected);
            assert!(matches!(code, None | Some(0 | 75)), "{code:?}");
        } else {
            assert!(!matches!(code, Some(0)), "{code:?}");
            assert_eq!(two_way(&from, &to).code(), Some(0), "retry");
            assert!(disk_content(&folder) == expected);
        }
    }
}

/// Starts a helper as a copy does.
fn helper(options: QuiesceOptions) -> Helper {
    Helper::start_program(Path::new(PCOPY), options, &[]).unwrap()
}

/// Waits until the process of a helper is gone.
fn wait_for_end(helper: u32) {
    wait_until("the helper has ended", || !is_running(helper));
}

#[test]
fn a_helper_runs_the_thaw_command_only_when_nobody_else_did() {
    let folder = referee::folder();
    let (mark, record) = (folder.path().join("thawed"), folder.path().join("frozen.json"));
    for (runs_hook, is_thawed, expected) in [(false, false, 0), (true, false, 1), (true, true, 1)] {
        let _ = std::fs::remove_file(&mark);
        let helper = helper(QuiesceOptions {
            freeze_command: Some("true".into()),
            thaw_command: Some(format!("echo >> {}", mark.display())),
            record: Some(record.clone()),
            ..Default::default()
        });
        let process = helper.ticket.process.id;
        // Politeness does not move it.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(process).unwrap());
        for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGHUP] {
            nix::sys::signal::kill(pid, signal).unwrap();
        }
        let mut quiesce = HelperQuiesce::new(helper, None, None);
        if runs_hook {
            quiesce.run_hook().unwrap();
            quiesce.freeze_file_system().unwrap();
            quiesce.confirm().unwrap();
            assert!(FreezeRecord::read(&record).unwrap().unwrap().hook_begun);
        }
        assert!(!mark.exists());
        if is_thawed {
            quiesce.thaw().unwrap();
        }
        quiesce.abandon();
        wait_for_end(process);
        let lines = std::fs::read_to_string(&mark).unwrap_or_default().len();
        assert_eq!((lines, record.exists()), (expected, false), "{runs_hook} {is_thawed}");
    }
}

#[test]
fn a_helper_ends_the_freeze_command_of_a_dead_copy_with_its_children() {
    for obeys in [true, false] {
        let folder = referee::folder();
        let (mark, child) = (folder.path().join("thawed"), folder.path().join("child"));
        // With a child of its own, which would live on if only the shell was killed.
        let trap = if obeys { "" } else { "trap '' TERM;" };
        let command = format!("{trap} sleep 600 & echo $! > {}; wait; sleep 600", child.display());
        let helper = helper(QuiesceOptions {
            freeze_command: Some(command),
            thaw_command: Some(format!("touch {}", mark.display())),
            ..Default::default()
        });
        let process = helper.ticket.process.id;
        let cancel = pcopy::Cancel::new().unwrap();
        let mut quiesce = HelperQuiesce::new(helper, Some(cancel.clone()), None);
        let running = std::thread::spawn(move || {
            let ran = quiesce.run_hook();
            quiesce.abandon();
            ran
        });
        let number = || std::fs::read_to_string(&child).ok()?.trim().parse::<u32>().ok();
        wait_until("the freeze command runs", || number().is_some());
        cancel.cancel();
        assert_eq!(running.join().unwrap().unwrap_err().kind(), ploop_core::ErrorKind::Cancelled);
        wait_for_end(process);
        assert!(mark.exists());
        wait_until("no child of the freeze command runs any more", || !number().is_some_and(is_running));
    }
}

#[test]
fn a_helper_whose_time_is_over_thaws_and_says_so() {
    let folder = referee::folder();
    let mark = folder.path().join("thawed");
    let helper = helper(QuiesceOptions {
        freeze_command: Some("true".into()),
        thaw_command: Some(format!("touch {}", mark.display())),
        ..Default::default()
    });
    let mut quiesce = HelperQuiesce::new(helper, None, None);
    quiesce.set_limits(StandstillLimits { abandoned_ms: Some(200), ..Default::default() });
    quiesce.run_hook().unwrap();
    quiesce.freeze_file_system().unwrap();
    // Whoever holds the connection does nothing any more, as if it was stopped.
    wait_until("the thaw command has run", || mark.exists());
    let error = quiesce.confirm().unwrap_err();
    assert_eq!(error.kind(), ploop_core::ErrorKind::NotQuiet);
    quiesce.thaw().unwrap();
}

#[test]
fn what_a_killed_helper_has_left_is_thawed_by_its_record() {
    let folder = referee::folder();
    let (mark, record) = (folder.path().join("thawed"), folder.path().join("frozen.json"));
    for by in [nix::sys::signal::Signal::SIGKILL, nix::sys::signal::Signal::SIGSTOP] {
        let _ = std::fs::remove_file(&mark);
        let helper = helper(QuiesceOptions {
            freeze_command: Some("true".into()),
            thaw_command: Some(format!("touch {}", mark.display())),
            record: Some(record.clone()),
            ..Default::default()
        });
        let process = helper.ticket.process;
        let path = record.clone();
        let rescue = Box::new(move || thaw_recorded(&path, true, || Ok(Vec::new())).map(drop));
        let mut quiesce = HelperQuiesce::new(helper, None, Some(rescue));
        quiesce.run_hook().unwrap();
        quiesce.freeze_file_system().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(process.id).unwrap());
        nix::sys::signal::kill(pid, by).unwrap();
        assert_eq!(quiesce.confirm().unwrap_err().kind(), ploop_core::ErrorKind::NotQuiet);
        quiesce.thaw().unwrap();
        assert!(mark.exists() && !record.exists());
        assert!(!process.is_running());
    }
}

/// A small file system on a loop device, unmounted on drop.
struct Mounted(PathBuf);

impl Mounted {
    fn new(root: &Path) -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("only root can mount and freeze".into());
        }
        let (image, point) = (root.join("fs.img"), root.join("mnt"));
        std::fs::create_dir(&point).map_err(|error| error.to_string())?;
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(64 << 20))
            .map_err(|error| error.to_string())?;
        let (image, mount) = (image.to_str().unwrap(), point.to_str().unwrap());
        for command in [vec!["mkfs.ext4", "-q", image], vec!["mount", "-o", "loop", image, mount]] {
            let output = Command::new(command[0]).args(&command[1..]).output();
            let output = output.map_err(|error| format!("{}: {error}", command[0]))?;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
        }
        Ok(Self(point))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Ok(folder) = sys::open_folder(&self.0) {
            let _ = sys::thaw_file_system(std::os::fd::AsFd::as_fd(&folder));
        }
        let unmounted = Command::new("umount").arg(&self.0).status().is_ok_and(|status| status.success());
        if !unmounted {
            // Somebody still looks at it: it goes when they do.
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

#[test]
fn a_frozen_file_system_is_thawed_by_the_helper_and_by_the_copy() {
    use std::os::fd::AsFd;
    let root = referee::folder();
    let mounted = match Mounted::new(root.path()) {
        Ok(mounted) => mounted,
        Err(reason) => {
            ploop_testing::skip(ploop_testing::Need::Other, reason);
            return;
        }
    };
    let is_frozen = || {
        let folder = sys::open_folder(&mounted.0).unwrap();
        match sys::freeze_file_system(folder.as_fd()) {
            Ok(()) => {
                sys::thaw_file_system(folder.as_fd()).unwrap();
                false
            }
            Err(_) => true,
        }
    };
    let options = || QuiesceOptions {
        file_systems: vec![MountedFileSystem::open(&mounted.0).unwrap()],
        ..Default::default()
    };
    // The copy dies: nobody but the helper is left.
    let dying = helper(options());
    let process = dying.ticket.process.id;
    let mut quiesce = HelperQuiesce::new(dying, None, None);
    quiesce.freeze_file_system().unwrap();
    assert!(is_frozen());
    quiesce.abandon();
    wait_for_end(process);
    assert!(!is_frozen());

    // A freeze that was too long is undone at its return.
    let mut quiesce = HelperQuiesce::new(helper(options()), None, None);
    quiesce.set_limits(StandstillLimits { freeze_ms_max: Some(0), ..Default::default() });
    assert_eq!(quiesce.freeze_file_system().unwrap_err().kind(), ploop_core::ErrorKind::NotQuiet);
    assert!(!is_frozen());

    // The copy lives: it freezes, and dropping it is enough to thaw.
    let mut quiesce = LocalQuiesce::new(options());
    assert!(quiesce.sync_file_system().unwrap());
    quiesce.run_hook().unwrap();
    quiesce.freeze_file_system().unwrap();
    assert!(is_frozen());
    quiesce.thaw().unwrap();
    assert!(!is_frozen());
    quiesce.freeze_file_system().unwrap();
    // Twice is refused, and the first one stays ours to undo.
    let mut second = LocalQuiesce::new(options());
    assert_eq!(second.freeze_file_system().unwrap_err().kind(), ploop_core::ErrorKind::NotQuiet);
    drop(second);
    assert!(is_frozen());
    drop(quiesce);
    assert!(!is_frozen());
}

#[test]
fn a_device_that_is_mounted_is_not_sent_as_a_closed_disk() {
    let root = referee::folder();
    let mounted = match Mounted::new(root.path()) {
        Ok(mounted) => mounted,
        Err(reason) => {
            ploop_testing::skip(ploop_testing::Need::Other, reason);
            return;
        }
    };
    let table = ploop_core::device::mount_table::read(Path::new("/proc/self/mountinfo")).unwrap();
    let device = &table.iter().find(|mount| mount.point == mounted.0).unwrap().source;
    let send = Command::new(PCOPY).args(["send", "--raw"]).arg(device).output().unwrap();
    let said = String::from_utf8_lossy(&send.stderr);
    assert_eq!(send.status.code(), Some(37), "{said}");
    assert!(said.contains("in use") && send.stdout.is_empty(), "{said}");
}
