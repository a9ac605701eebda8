//! Whatever stops, dies, hangs or is not read while a disk is frozen: it is thawed, and the exit code tells the truth.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pcopy::freeze::FreezeRecord;
use serde_json::Value;

use crate::ground::{Ground, Running, can_take_over, signal, text};
use crate::patience::becomes;

const PLOOP: &str = env!("CARGO_BIN_EXE_ploop");

/// A mounted disk with a file system, and what a copy of it needs.
struct Scene {
    ground: Ground,
    point: PathBuf,
}

impl Scene {
    fn new() -> Option<Self> {
        let ground = Ground::new()?;
        let folder = ground.make_folder("disk");
        let point = ground.make_folder("mnt");
        ground.make_folder("to");
        ground.ends_with(0, &["init", "-s", "64M", text(&folder.join("disk.hds"))]);
        ground.mount(&["-m", text(&point), text(&folder)]);
        fs::write(point.join("file"), "before").unwrap();
        Some(Self { ground, point })
    }

    fn record(&self) -> Option<FreezeRecord> {
        let state = self.ground.state();
        FreezeRecord::read(&self.ground.runtime().entry(&state.id).frozen_file()).ok().flatten()
    }

    /// Starts a copy whose receiver stops at the freeze, and waits until the disk is frozen for it.
    fn frozen_copy(&self, options: &[&str]) -> (Running<'_>, Stopped) {
        let (receiver, target) = (self.ground.path("receiver"), self.ground.path("to/copy.hds"));
        let to =
            format!("sh -c 'echo $$ > {}; exec {PLOOP} copy -d {}'", receiver.display(), target.display());
        let hook = format!("kill -STOP $(cat {})", receiver.display());
        let line = ["copy", "-s", text(&self.point), "--to", &to, "-F", &hook];
        let mut command = self.ground.start(&[&line[..], options].concat());
        command.wait_until("the freeze command has run", || {
            self.record().is_some_and(|record| record.hook_begun && record.hook.is_none())
        });
        command.wait_until("the disk is frozen", || is_frozen(&self.point));
        let receiver = fs::read_to_string(&receiver).unwrap().trim().parse().unwrap();
        (command, Stopped(receiver))
    }

    /// Waits until it can be written to, and nothing is written down as frozen.
    #[track_caller]
    fn expect_thawed(&self) {
        let begun = Instant::now();
        self.ground.wait_until("the disk is thawed", || !is_frozen(&self.point));
        self.ground.wait_until("nothing is written down as frozen", || self.record().is_none());
        println!("thawed after {:?}", begun.elapsed());
        fs::write(self.point.join("after"), "after").unwrap();
        assert!(!self.ground.ends_with(0, &["list"]).contains("frozen"));
    }
}

/// A stopped process, which goes on at the end of the test at the latest.
struct Stopped(u32);

impl Stopped {
    fn go_on(&self) {
        signal(self.0, Signal::SIGCONT);
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0).unwrap());
        // It may have ended.
        nix::sys::signal::kill(pid, Signal::SIGCONT).ok();
    }
}

/// Whether writes to a file system wait. Asked by a thread that writes: to freeze it once more would disturb.
fn is_frozen(point: &Path) -> bool {
    let file = point.join("probe");
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let written =
            File::create(file).and_then(|mut file| file.write_all(b"x").and_then(|()| file.sync_all()));
        done.send(written.is_ok()).ok();
    });
    is_done.recv_timeout(Duration::from_millis(700)).is_err()
}

#[test]
fn a_stopped_command_does_not_keep_the_disk_frozen() {
    let Some(scene) = Scene::new() else { return };
    let (command, receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "100"]);
    signal(command.id(), Signal::SIGSTOP);
    let listed = scene.ground.ends_with(0, &["list"]);
    assert!(listed.contains("frozen since 2"), "{listed}");
    receiver.go_on();
    scene.expect_thawed();
    signal(command.id(), Signal::SIGCONT);
    assert_eq!(command.wait().code(), Some(0), "the answer has waited for it");
    assert!(scene.ground.path("to/copy.hds").exists());
}

#[test]
fn a_stopped_helper_is_missed_and_another_process_thaws() {
    let Some(scene) = Scene::new() else { return };
    let (command, receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "100"]);
    signal(scene.record().unwrap().helper.id, Signal::SIGSTOP);
    receiver.go_on();
    scene.expect_thawed();
    assert_eq!(command.wait().code(), Some(0));
}

#[test]
fn command_and_helper_killed_together_leave_nothing_frozen() {
    let Some(scene) = Scene::new() else { return };
    let mark = scene.ground.path("thawed");
    let thaw = format!("echo x >> {}", mark.display());
    let (command, _receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "100", "--thaw", &thaw]);
    signal(scene.record().unwrap().helper.id, Signal::SIGKILL);
    assert_eq!(command.end_by(Signal::SIGKILL).code(), None);
    scene.expect_thawed();
    assert_eq!(fs::read_to_string(mark).unwrap(), "x\n");
}

#[test]
fn a_cancelled_copy_thaws_at_once() {
    let Some(scene) = Scene::new() else { return };
    for by in [Signal::SIGINT, Signal::SIGTERM] {
        let (command, _receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "100"]);
        signal(command.id(), by);
        scene.expect_thawed();
        assert_ne!(command.wait().code(), Some(0));
    }
}

#[test]
fn a_receiver_that_is_stopped_does_not_keep_the_disk_frozen() {
    let Some(scene) = Scene::new() else { return };
    let (command, receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "1"]);
    scene.expect_thawed();
    // It is not waited for before the thaw; for the end of the command it is let go.
    receiver.go_on();
    assert_eq!(command.wait().code(), Some(14));
}

#[test]
fn a_server_that_dies_frozen_leaves_nothing_frozen() {
    let Some(scene) = Scene::new() else { return };
    if !can_take_over() {
        ploop_testing::skip(ploop_testing::Need::Kernel(6, 9), "no successor can take over on this kernel");
        return;
    }
    // The helper thaws; killed as well, or stopped, the successor has it thawed.
    for helper in [None, Some(Signal::SIGKILL), Some(Signal::SIGSTOP)] {
        let (command, _receiver) = scene.frozen_copy(&["--freeze-stall-timeout", "100"]);
        let before = scene.ground.state();
        if let Some(by) = helper {
            signal(scene.record().unwrap().helper.id, by);
        }
        signal(before.server.unwrap().id, Signal::SIGKILL);
        scene.ground.wait_for_successor(&before);
        scene.expect_thawed();
        assert_ne!(command.wait().code(), Some(0));
    }
}

#[test]
fn a_full_stderr_pipe_and_a_terminal_that_is_held_do_not_keep_the_disk_frozen() {
    let Some(scene) = Scene::new() else { return };
    for (name, is_terminal) in [("pipe", false), ("terminal", true)] {
        let target = scene.ground.path(&format!("to-{name}/copy.hds"));
        scene.ground.make_folder(&format!("to-{name}"));
        let mut line = vec!["--json", "copy", "-s", text(&scene.point), "-d", text(&target)];
        // What the commands print is not waited for, either.
        line.extend(["-F", "head -c 200000 /dev/zero", "--thaw", "head -c 200000 /dev/zero"]);
        if is_terminal {
            line.remove(0);
        }
        let mut command = scene.ground.command(&line);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut held: Vec<Box<dyn std::any::Any>> = Vec::new();
        if is_terminal {
            let pty = nix::pty::openpty(None, None).unwrap();
            // Ctrl-S.
            nix::sys::termios::tcflow(&pty.slave, nix::sys::termios::FlowArg::TCOOFF).unwrap();
            command.stderr(Stdio::from(pty.slave.try_clone().unwrap()));
            held.push(Box::new((pty.master, pty.slave)));
        } else {
            let (reader, mut writer) = std::io::pipe().unwrap();
            nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
            writer.write_all(&[b'x'; 4096]).unwrap();
            command.stderr(Stdio::from(writer));
            held.push(Box::new(reader));
        }
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        let ended = becomes(|| child.try_wait().unwrap().is_some());
        let code = child.try_wait().unwrap().and_then(|status| status.code());
        child.kill().ok();
        assert!(ended && code == Some(0), "{name}: {code:?} after {:?}", begun.elapsed());
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        if !is_terminal {
            let report: Value = serde_json::from_str(&said).unwrap();
            let frozen_ms = report["downtime"]["total_ms"].as_f64().unwrap();
            assert!(frozen_ms < 5000.0, "{name}: frozen for {frozen_ms} ms");
        }
        scene.expect_thawed();
        drop(held);
    }
}

#[test]
fn a_thaw_command_that_fails_is_tried_again_and_then_told_loudly() {
    let Some(scene) = Scene::new() else { return };
    let tries = scene.ground.path("tries");
    let thaw = |succeeds_at: u32| {
        fs::remove_file(&tries).ok();
        format!("printf x >> {0}; [ $(wc -c < {0}) -ge {succeeds_at} ]", tries.display())
    };
    let copy = |target: &str, thaw: &str, code: i32| {
        scene.ground.make_folder(target);
        let target = scene.ground.path(target).join("copy.hds");
        let line = ["copy", "-s", text(&scene.point), "-d", text(&target), "-F", "true", "--thaw", thaw];
        scene.ground.ends_with(code, &[&line[..], &["--freeze-timeout", "1"]].concat())
    };
    copy("once", &thaw(2), 0);
    assert_eq!(fs::read_to_string(&tries).unwrap(), "xx");
    let told = copy("always", &thaw(99), 14);
    assert!(told.contains("still stands") && told.contains("printf x"), "{told}");
    assert_eq!(fs::read_to_string(&tries).unwrap(), "xxx");
    assert!(!is_frozen(&scene.point), "the file system itself goes on");
    let listed = scene.ground.ends_with(0, &["list"]);
    assert!(listed.contains("frozen since") && listed.contains("ploop thaw"), "{listed}");
    // Nobody freezes over it.
    let told = copy("again", "true", 14);
    assert!(told.contains("still stands"), "{told}");
    scene.ground.ends_with(14, &["snapshot", text(&scene.point)]);
    scene.ground.ends_with(14, &["thaw", text(&scene.point)]);
    fs::write(&tries, "x".repeat(98)).unwrap();
    scene.ground.ends_with(0, &["thaw", text(&scene.point)]);
    scene.expect_thawed();
    let told = copy("hanging", "sleep 1000", 14);
    assert!(told.contains("still stands"), "{told}");
    let state = scene.ground.state();
    let list: Value = serde_json::from_str(&scene.ground.ends_with(0, &["--json", "list"])).unwrap();
    let disk = &list["disks"][0];
    assert!(disk["frozen_since_ms"].is_u64() && disk["thaw_failure"].is_string(), "{list}");
    let record = fs::read_to_string(scene.ground.runtime().entry(&state.id).frozen_file()).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["file_systems"], serde_json::json!([]), "nothing is called frozen that is not");
    // Whoever has let it go by hand says so.
    assert!(told.contains("ploop thaw --freed"), "{told}");
    scene.ground.ends_with(0, &["thaw", "--freed", text(&scene.point)]);
    scene.expect_thawed();
    // A command that never succeeds keeps no disk mounted.
    copy("never", "false", 14);
    let told = scene.ground.ends_with(0, &["umount", text(&scene.point)]);
    assert!(told.contains("unmounted all the same"), "{told}");
}

#[test]
fn commands_run_where_they_were_typed_and_know_what_for() {
    use std::os::unix::fs::PermissionsExt;
    let Some(scene) = Scene::new() else { return };
    let here = scene.ground.make_folder("here");
    let script = here.join("x");
    let say = "#!/bin/sh\necho $PLOOP_PHASE $PLOOP_DISK $PLOOP_MOUNT $PLOOP_COPY $PLOOP_PEER $MINE >> said\n";
    fs::write(&script, say).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let target = scene.ground.path("to/copy.hds");
    let line =
        ["--json", "copy", "-s", text(&scene.point), "-d", text(&target), "-F", "./x", "--thaw", "./x"];
    let output = scene.ground.command(&line).current_dir(&here).env("MINE", "mine").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rest = format!(
        "{} {} {} {} mine",
        scene.ground.path("disk/DiskDescriptor.xml").canonicalize().unwrap().display(),
        scene.point.canonicalize().unwrap().display(),
        report["copy_id"].as_str().unwrap(),
        target.display(),
    );
    let said = fs::read_to_string(here.join("said")).unwrap();
    assert_eq!(said, format!("freeze {rest}\nthaw {rest}\n"));
}

#[test]
fn thaw_ends_a_freeze_that_is_under_way_and_that_copy_is_none() {
    let Some(scene) = Scene::new() else { return };
    // While the freeze command runs nothing is confirmed yet.
    let started = scene.ground.path("started");
    let hook = format!("touch {}; sleep 1000", started.display());
    let target = scene.ground.path("to/copy.hds");
    let mut command =
        scene.ground.start(&["copy", "-s", text(&scene.point), "-d", text(&target), "-F", &hook]);
    command.wait_until("the freeze command runs", || started.exists());
    // Unmounting would leave it frozen.
    scene.ground.ends_with(17, &["umount", text(&scene.point)]);
    scene.ground.ends_with(0, &["thaw", text(&scene.point)]);
    assert_eq!(command.wait().code(), Some(14));
    scene.expect_thawed();
    assert!(!target.exists());
    let said = scene.ground.ends_with(0, &["thaw", text(&scene.point)]);
    assert!(said.contains("nothing"), "{said}");
    scene.ground.ends_with(40, &["thaw", text(&scene.ground.path("to"))]);
}

#[test]
fn a_helper_keeps_no_pipe_of_the_command_open() {
    let Some(scene) = Scene::new() else { return };
    // The reader ends when the stream does, though a thaw command lives on.
    let target = scene.ground.path("to/copy.hds");
    let run = format!(
        "{PLOOP} copy -s {} -F true --thaw 'sleep 300 & true' | {PLOOP} copy -d {}",
        scene.point.display(),
        target.display()
    );
    let mut child = Command::new("sh")
        .args(["-c", &run])
        .envs([("PLOOP_RUN_DIR", text(&scene.ground.path("run"))), ("PLOOP_ALLOW_RECLAIM_STALL", "1")])
        .spawn()
        .unwrap();
    let ended = becomes(|| child.try_wait().unwrap().is_some());
    assert!(ended && child.wait().unwrap().success());
    assert!(target.exists());
}

#[test]
fn limits_of_a_freeze_are_kept_and_a_failure_tells_what_was_seen() {
    let Some(scene) = Scene::new() else { return };
    let ran = scene.ground.path("ran");
    let hook = format!("echo x >> {}", ran.display());
    let copy = |target: &str, options: &[&str], code: i32| {
        scene.ground.make_folder(target);
        let target = scene.ground.path(target).join("copy.hds");
        let line = ["--json", "copy", "-s", text(&scene.point), "-d", text(&target)];
        scene.ground.ends_with(code, &[&line[..], options].concat())
    };
    // Nothing is written: no freeze can be as short as that, and the command need not run to find out.
    let told = copy("short", &["--max-freeze", "1", "-F", &hook], 14);
    assert!(!ran.exists() && !told.contains("written to") && !told.contains("was written"), "{told}");
    // What the command takes is no part of a freeze, but of the outage.
    let told = copy("freeze", &["--max-freeze", "5000", "-F", "sleep 1"], 0);
    let report: Value = told
        .lines()
        .find_map(|line| {
            serde_json::from_str(line).ok().filter(|value: &Value| value["downtime"].is_object())
        })
        .unwrap();
    let ms = |name: &str| report["downtime"][name].as_f64().unwrap();
    assert!(ms("freeze_ms") < 5000.0 && ms("hook_ms") >= 1000.0 && ms("total_ms") >= ms("hook_ms"), "{told}");
    let child = scene.ground.path("child");
    let hook = format!("sleep 1000 & echo $! > {}; wait", child.display());
    let begun = Instant::now();
    let told = copy("outage", &["--max-outage", "3000", "-F", &hook, "--thaw", "true"], 14);
    assert!(told.contains("outage may last 3000 ms"), "{told}");
    println!("given up after {:?}", begun.elapsed());
    let child: u32 = fs::read_to_string(&child).unwrap().trim().parse().unwrap();
    scene
        .ground
        .wait_until("the freeze command is ended with its group", || !crate::patience::is_running(child));
    scene.expect_thawed();
}

#[test]
fn a_command_that_is_told_to_end_does_not_wait_for_a_reader_of_its_last_words() {
    let Some(scene) = Scene::new() else { return };
    let started = scene.ground.path("started");
    let hook = format!("touch {}; sleep 1000", started.display());
    let target = scene.ground.path("to/copy.hds");
    let line =
        ["--json", "copy", "-s", text(&scene.point), "-d", text(&target), "-F", &hook, "--thaw", "true"];
    let (reader, mut writer) = std::io::pipe().unwrap();
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    writer.write_all(&[b'x'; 4096]).unwrap();
    let mut command = scene.ground.command(&line);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(writer)).spawn().unwrap();
    scene.ground.wait_until("the freeze command runs", || started.exists());
    signal(child.id(), Signal::SIGTERM);
    let begun = Instant::now();
    let ended = becomes(|| child.try_wait().unwrap().is_some());
    let code = child.try_wait().unwrap().and_then(|status| status.code());
    child.kill().ok();
    assert!(ended && code != Some(0), "{code:?} after {:?}", begun.elapsed());
    scene.expect_thawed();
    drop(reader);
}
