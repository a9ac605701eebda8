//! What goes wrong: a clear message, the documented exit code, nothing lost, and trying again just works.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::patience::{is_running, wait_until};
use crate::stage::{Mounted, Ran, Reaped, Stage};
use crate::support::{PLOOP, command, ploop, stage};
use crate::witness::Witness;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Files in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// An image without a file system, which needs no root.
fn bare_image(folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let image = folder.join("disk.hds");
    ploop(&["init", "-s", "64M", "-t", "none", text(&image)]).succeeded();
    image
}

/// The stream of a closed image.
fn stream_of(image: &Path) -> Vec<u8> {
    let output = command(&["copy", "-s", text(image)]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Feeds `stream` to a receiver.
fn receive(stream: &[u8], target: &Path) -> Ran {
    use std::io::Write;
    let mut child = command(&["copy", "-d", text(target)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdin.take().unwrap();
    // A receiver that has seen enough closes the pipe.
    let _cut = pipe.write_all(stream);
    drop(pipe);
    Reaped(Some(child)).wait()
}

#[test]
fn missing_and_foreign_files() {
    let folder = crate::referee::folder();
    let missing = folder.path().join("missing.hds");
    ploop(&["info", text(&missing)]).failed_with(4, &["missing.hds"]);
    let foreign = folder.path().join("foreign.hds");
    fs::write(&foreign, vec![0x5a; 1 << 20]).unwrap();
    ploop(&["copy", "-s", text(&missing)]).failed_with(4, &["missing.hds"]);
    let (name, guid) = (text(&missing), "{5fbaabe3-6958-40ff-92a7-860e329aab42}");
    let other = folder.path().join("other");
    for line in [
        &["check", name][..],
        &["map", name],
        &["compact", name],
        &["balloon", "discard", name],
        &["resize", "-s", "1G", name],
        &["grow", "-s", "1G", name],
        &["convert", "-v", "1", name],
        &["export", name, text(&other)],
        &["clone", name, text(&other)],
        &["snapshot", name],
        &["tsnapshot", "-c", "backup", name],
        &["snapshot-list", name],
        &["snapshot-delete", "-u", guid, name],
        &["snapshot-merge", name],
        &["snapshot-switch", "-u", guid, name],
        &["diff", "-u", guid, name],
    ] {
        ploop(line).failed_with(4, &["missing.hds", "No such file", "advice"]);
        assert!(!other.exists(), "{line:?} made something");
    }
    let ran = ploop(&["copy", "-s", text(&foreign)]);
    assert!([11, 38, 39].contains(&ran.code), "{}: {}", ran.code, ran.stderr);
    assert!(ran.stderr.contains("foreign.hds") && ran.stdout.is_empty());
    let broken = folder.path().join("DiskDescriptor.xml");
    fs::write(&broken, "<Parallels_disk_image><Disk_Par").unwrap();
    ploop(&["info", text(&broken)]).failed_with(39, &["DiskDescriptor.xml"]);
}

#[test]
fn init_makes_all_or_nothing() {
    let folder = crate::referee::folder();
    let image = bare_image(folder.path());
    let before = fs::read(&image).unwrap();
    assert_eq!(names(folder.path()), ["DiskDescriptor.xml", "disk.hds"]);
    ploop(&["init", "-s", "64M", "-t", "none", text(&image)]).failed_with(38, &["the file exists"]);
    assert_eq!(fs::read(&image).unwrap(), before, "an existing image was changed");

    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    for options in [
        &["-s", "0", "-t", "none"][..],
        &["-s", "64M", "-t", "none", "-b", "100"],
        &["-s", "64M", "-t", "none", "-L", "label"],
        &["-s", "3T", "-t", "none", "-v", "1", "-b", "64"],
        &["-s", "1M", "-t", "ext4"],
        &["-s", "64M", "-t", "xfs", "-L", "a label that is too long"],
    ] {
        let mut line = vec!["init"];
        line.extend(options);
        let image = other.join("disk.hds");
        line.push(text(&image));
        let ran = ploop(&line);
        assert_eq!(ran.code, 38, "{options:?}: {}", ran.stderr);
        assert!(names(&other).is_empty(), "{options:?} left {:?}", names(&other));
    }
    ploop(&["init", "-s", "64M", "-t", "none", "/nonexistent/folder/disk.hds"])
        .failed_with(1, &["/nonexistent/folder"]);
}

#[test]
fn init_of_a_file_system_says_that_it_needs_root() {
    if !nix::unistd::geteuid().is_root() {
        ploop_testing::skip(ploop_testing::Need::Root, "becoming another user needs root");
        return;
    }
    let folder = crate::referee::folder();
    std::os::unix::fs::chown(folder.path(), Some(65534), Some(65534)).unwrap();
    // Where the other user can run it.
    let copy = folder.path().join("ploop");
    fs::copy(PLOOP, &copy).unwrap();
    let image = folder.path().join("disk.hds");
    let as_nobody = |file_system: &str| -> Ran {
        let mut command = std::process::Command::new(&copy);
        command
            .args(["init", "-s", "64M", "-t", file_system, text(&image)])
            .stdin(Stdio::null())
            .uid(65534)
            .gid(65534);
        command.output().unwrap().into()
    };
    let ran = as_nobody("ext4");
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("root") && ran.stderr.contains("-t none"), "{}", ran.stderr);
    assert_eq!(names(folder.path()), ["ploop"], "a failed init left files");
    as_nobody("none").succeeded();
}

#[test]
fn copies_of_a_closed_image_and_the_target_that_exists() {
    let folder = crate::referee::folder();
    let image = bare_image(&folder.path().join("source"));
    let target = folder.path().join("target/disk.hds");
    fs::create_dir(target.parent().unwrap()).unwrap();
    ploop(&["copy", "-s", text(&image), "-d", text(&target)]).succeeded();
    assert_eq!(names(target.parent().unwrap()), ["DiskDescriptor.xml", "disk.hds"]);
    ploop(&["info", text(&target)]).succeeded();
    ploop(&["copy", "-s", text(&image), "-d", text(&target)]).failed_with(1, &["disk.hds"]);
    let stream = stream_of(&image);
    receive(&stream, &target).failed_with(1, &["disk.hds"]);

    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let command = format!("{PLOOP} copy -d {}", other.join("disk.hds").display());
    ploop(&["copy", "-s", text(&image), "--to", &command]).succeeded();
    assert_eq!(names(&other), ["DiskDescriptor.xml", "disk.hds"]);
    let ran = ploop(&["copy", "-s", text(&image), "--to", &command]);
    ran.failed_with(1, &["disk.hds"]);
    ploop(&["copy", "-s", text(&image), "--to", "sh -c 'exit 3'"])
        .failed_with(12, &["exit 3", "exit status: 3"]);
    ploop(&["copy", "-s", text(&image), "--to", "/nonexistent/ssh HOST"])
        .failed_with(12, &["/nonexistent/ssh"]);
}

#[test]
fn damaged_streams_leave_no_file() {
    let folder = crate::referee::folder();
    let image = bare_image(&folder.path().join("source"));
    let stream = stream_of(&image);
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let target = other.join("disk.hds");

    let check = |damaged: &[u8], what: &str, codes: &[i32]| {
        let ran = receive(damaged, &target);
        assert!(codes.contains(&ran.code), "{what}: exit {}: {}", ran.code, ran.stderr);
        assert!(ran.stderr.starts_with("ploop: "), "{what}: {}", ran.stderr);
        assert!(names(&other).is_empty(), "{what} left {:?}", names(&other));
    };
    check(b"", "nothing", &[6]);
    check(
        b"what is this? it is not a disk, it is a long enough line of text to be a header of a frame",
        "text",
        &[13],
    );
    let step = (stream.len() / 40).max(1);
    for at in (0..stream.len()).step_by(step) {
        let mut flipped = stream.clone();
        flipped[at] ^= 0x10;
        check(&flipped, &format!("bit flipped at byte {at} of {}", stream.len()), &[6, 13]);
        check(&stream[..at], &format!("cut at byte {at}"), &[6, 13]);
    }
    receive(&stream, &target).succeeded();
}

#[test]
fn a_stream_does_not_go_to_a_terminal() {
    let folder = crate::referee::folder();
    let image = bare_image(folder.path());
    let terminal = nix::pty::openpty(None, None).unwrap();
    let slave = terminal.slave;
    let send = command(&["copy", "-s", text(&image)])
        .stdout(Stdio::from(slave.try_clone().unwrap()))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Reaped(Some(send)).wait().failed_with(38, &["terminal", "--to"]);
    let target = folder.path().join("new.hds");
    let receive = command(&["copy", "-d", text(&target)])
        .stdin(Stdio::from(slave))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Reaped(Some(receive)).wait().failed_with(38, &["terminal"]);
}

/// A mounted disk with a writer on it.
fn running(stage: &Stage) -> (Mounted, Witness) {
    let image = stage.init("source", &["-s", "128M"]);
    let source = stage.mount(&image, &[]);
    let witness = Witness::start(&source.point.join("witness"), 64, Duration::from_millis(1)).unwrap();
    fs::create_dir(stage.path("target")).unwrap();
    (source, witness)
}

#[track_caller]
fn alive(witness: &Witness) {
    assert!(witness.is_alive(), "the source stands still");
}

/// What a killed command has left running in the server may take a moment to end.
#[track_caller]
fn wait_until_idle(stage: &Stage) {
    wait_until("no copy runs any more", || {
        let listed: serde_json::Value =
            serde_json::from_str(&stage.ploop(&["--json", "list"]).succeeded()).unwrap();
        listed.pointer("/disks/0/jobs") == Some(&serde_json::json!([]))
    });
}

/// A copy of a running disk to a pipe that nobody reads any more once it is to freeze: frozen for good.
struct Stuck {
    send: Reaped,
    /// Where it says what it does.
    said: PathBuf,
    reading: std::thread::JoinHandle<std::process::ChildStdout>,
}

impl Stuck {
    /// Starts it and waits until the file system is frozen.
    fn start(stage: &Stage, source: &Mounted, options: &[&str]) -> Self {
        let (began, said) = (stage.path("began"), stage.path("said"));
        // The freeze command leaves more to send than a pipe holds.
        let fill = source.point.join("filled");
        let freeze = format!("touch {}; head -c 16M /dev/urandom > {}", began.display(), fill.display());
        let line = [&["copy", "--json", "-s", text(&source.point), "-F", &freeze], options].concat();
        let complaints = fs::File::create(&said).unwrap();
        let mut send = stage.command(&line).stdout(Stdio::piped()).stderr(complaints).spawn().unwrap();
        let mut pipe = send.stdout.take().unwrap();
        let reading = std::thread::spawn(move || {
            use std::io::Read;
            let mut piece = vec![0; 64 << 10];
            while !began.exists() && pipe.read(&mut piece).unwrap() > 0 {}
            pipe
        });
        let stuck = Self { send: Reaped(Some(send)), said, reading };
        wait_until("the file system is frozen", || stuck.said().contains("\"event\":\"frozen\""));
        stuck
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }
}

#[test]
fn a_mounted_disk_is_in_use() {
    let Some(stage) = stage() else { return };
    let image = stage.init("source", &["-s", "128M"]);
    let source = stage.mount(&image, &[]);
    stage.ploop(&["mount", text(&image)]).failed_with(37, &["ploop umount"]);
    stage.ploop(&["info", text(&image)]).succeeded();
    assert!(stage.ploop(&["list"]).succeeded().contains(text(&source.device)));
    stage.umount(&source);
    let again = stage.ploop(&["umount", text(&image)]);
    assert_eq!(again.code, 40, "{}", again.stderr);
}

#[test]
fn freeze_commands_that_fail_or_hang_thaw_and_leave_no_file() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    for (command, words) in
        [("exit 7", "exit"), ("/nonexistent/freezer", "127"), ("sleep 600", "longer than 1 s")]
    {
        let thawed = stage.path("thawed");
        let thaw = format!("touch {}", thawed.display());
        let line = [
            "copy",
            "-s",
            text(&source.point),
            "-F",
            command,
            "--thaw",
            &thaw,
            "--freeze-timeout",
            "1",
            "-d",
            text(&target),
        ];
        stage.ploop(&line).failed_with(14, &[words]);
        assert!(names(&stage.path("target")).is_empty(), "{command}: {:?}", names(&stage.path("target")));
        alive(&witness);
        assert!(thawed.exists(), "{command}: the thaw command did not run");
        fs::remove_file(thawed).unwrap();
    }
    stage.ploop(&["copy", "-s", text(&source.point), "-F", "true", "-d", text(&target)]).succeeded();
    alive(&witness);
}

#[test]
fn a_receiver_that_dies_leaves_the_source_running() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    let mut send = stage.command(&["copy", "-s", text(&source.point)]);
    let mut send = send.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(send.stdout.take());
    Reaped(Some(send)).wait().failed_with(7, &["Broken pipe"]);
    alive(&witness);
    let (sent, received) =
        stage.copy(&["copy", "-s", text(&source.point)], &["copy", "-d", text(&target)], |_| {});
    assert_eq!((sent.code, received.code), (0, 0), "{}{}", sent.stderr, received.stderr);
}

/// A receiver that takes no more and says nothing, while its pipe stays open: the guest must not wait for it.
#[test]
fn a_receiver_that_hangs_does_not_keep_the_disk_frozen() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let mut stuck = Stuck::start(&stage, &source, &["--freeze-stall-timeout", "2"]);
    alive(&witness);
    let code = std::mem::replace(&mut stuck.send, Reaped(None)).wait().code;
    let said = stuck.said();
    assert_eq!(code, 14, "{said}");
    for words in ["the receiver did not finish", "of the freeze", "advice"] {
        assert!(said.contains(words), "{said}");
    }
    drop(stuck.reading.join().unwrap());
}

#[test]
fn a_sender_killed_while_frozen_thaws_and_leaves_no_file() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    for moment in ["hook", "stall"] {
        // Killed while its freeze command runs, or while the pipe is full and nobody reads.
        let hook = stage.path(&format!("{moment}-began"));
        let command = if moment == "hook" {
            format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", hook.display())
        } else {
            format!("touch {}", hook.display())
        };
        let mut send = stage.command(&["copy", "-s", text(&source.point), "-F", &command]);
        let mut send = send.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let pipe = send.stdout.take().unwrap();
        let receive = if moment == "hook" {
            let receive = stage
                .command(&["copy", "-d", text(&target)])
                .stdin(pipe)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            wait_until("the freeze command runs", || hook.exists());
            Some(Reaped(Some(receive)))
        } else {
            wait_until("the copy runs", || {
                stage.ploop(&["list", "-a"]).succeeded().contains("works at copy")
            });
            drop(pipe);
            None
        };
        send.kill().unwrap();
        send.wait().unwrap();
        if let Some(receive) = receive {
            // The freeze command does not outlive whoever was killed.
            let number = fs::read_to_string(&hook).unwrap().trim().parse().unwrap();
            wait_until("the freeze command has ended", || !is_running(number));
            // The server says that it was cancelled; who hears nothing sees a stream that ends.
            let ran = receive.wait();
            assert!([6, 13, 29].contains(&ran.code), "{}: {}", ran.code, ran.stderr);
        }
        alive(&witness);
        assert!(names(&stage.path("target")).is_empty(), "{:?}", names(&stage.path("target")));
        wait_until_idle(&stage);
    }
    stage.ploop(&["copy", "-s", text(&source.point), "-d", text(&target)]).succeeded();
    alive(&witness);
}

#[test]
fn signals_end_a_copy_and_leave_everything_as_it_was() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    let (began, thawed) = (stage.path("began"), stage.path("thawed"));
    let freeze = format!("touch {}; sleep 600", began.display());
    let thaw = format!("touch {}", thawed.display());
    let line = ["copy", "-s", text(&source.device), "-F", &freeze, "--thaw", &thaw, "-d", text(&target)];
    let send = stage.command(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = nix::unistd::Pid::from_raw(i32::try_from(send.id()).unwrap());
    let send = Reaped(Some(send));
    wait_until("the freeze command runs", || began.exists());
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    send.wait().failed_with(29, &["cancelled"]);
    assert!(thawed.exists(), "the thaw command was not run");
    assert!(names(&stage.path("target")).is_empty());
    alive(&witness);
}

#[test]
fn a_freeze_that_would_be_too_long_and_a_pipe_that_stalls_give_up() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    let line = ["copy", "-s", text(&source.point), "--max-freeze", "0", "--passes", "3", "-d", text(&target)];
    stage.ploop(&line).failed_with(14, &["0 ms", "advice:"]);
    alive(&witness);
    // Nobody reads the pipe, and nobody closes it. More than fits into a pipe:
    fs::write(source.point.join("data"), vec![0x5a; 8 << 20]).unwrap();
    let line = ["copy", "-s", text(&source.point), "--stall-timeout", "1"];
    let mut send = stage.command(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pipe = send.stdout.take();
    let begun = Instant::now();
    let ran = Reaped(Some(send)).wait();
    assert!([6, 7].contains(&ran.code), "{}: {}", ran.code, ran.stderr);
    assert!(begun.elapsed() < Duration::from_secs(100), "that was the usual time-out, of 120 s");
    drop(pipe);
    alive(&witness);
    assert!(names(&stage.path("target")).is_empty());
}

#[test]
fn a_server_killed_while_it_copies_is_succeeded_and_leaves_no_file() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let target = stage.path("target/disk.hds");
    let server = || -> i32 {
        let listed: serde_json::Value =
            serde_json::from_str(&stage.ploop(&["--json", "list"]).succeeded()).unwrap();
        let number = listed.pointer("/disks/0/server").and_then(serde_json::Value::as_i64);
        i32::try_from(number.unwrap_or_else(|| panic!("no server in {listed}"))).unwrap()
    };
    let before = server();
    let began = stage.path("began");
    let freeze = format!("touch {}; sleep 600", began.display());
    let line = ["copy", "-s", text(&source.point), "-F", &freeze, "-d", text(&target)];
    let send = stage.command(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let send = Reaped(Some(send));
    wait_until("the freeze command runs", || began.exists());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), nix::sys::signal::Signal::SIGKILL).unwrap();
    let ran = send.wait();
    assert_ne!(ran.code, 0, "{}", ran.stderr);
    assert!(names(&stage.path("target")).is_empty(), "{:?}", names(&stage.path("target")));
    alive(&witness);
    wait_until("a successor is known", || server() != before);
    stage.ploop(&["copy", "-s", text(&source.point), "-d", text(&target)]).succeeded();
}

#[test]
fn copies_keep_the_bytes_in_every_format() {
    let folder = crate::referee::folder();
    let place = |name: &str| -> PathBuf {
        fs::create_dir(folder.path().join(name)).unwrap();
        folder.path().join(name).join("disk.hds")
    };
    let first = place("first");
    ploop(&["init", "-s", "48M", "-t", "none", "-f", "raw", text(&first)]).succeeded();
    // Data at both ends, a pattern in every fourth MiB, zeros that were written, holes.
    let mut bytes = vec![0; 48 << 20];
    for (index, byte) in
        bytes.iter_mut().enumerate().filter(|(index, _)| (index >> 20) & 3 == 0 || *index > 47 << 20)
    {
        *byte = u8::try_from(((index * 7) ^ (index >> 9)) & 0xff).unwrap();
    }
    fs::write(&first, &bytes).unwrap();
    let mut from = first;
    for (name, options) in [
        ("v1-small", &["-f", "expanded", "-v", "1", "-b", "64"][..]),
        ("v2-same", &["-v", "2"]),
        ("v2-full", &["-f", "preallocated", "-b", "2048"]),
        ("raw", &["-f", "raw"]),
    ] {
        let to = place(name);
        let mut line = vec!["copy", "-s", text(&from), "-d", text(&to)];
        line.extend(options);
        ploop(&line).succeeded();
        from = to;
    }
    assert!(fs::read(&from).unwrap() == bytes, "the bytes changed on the way");
}

#[test]
fn a_sender_killed_while_the_file_system_is_frozen_thaws_it() {
    let Some(stage) = stage() else { return };
    let (source, witness) = running(&stage);
    let stuck = Stuck::start(&stage, &source, &["--freeze-stall-timeout", "1000"]);
    // Killed.
    drop(stuck.send);
    alive(&witness);
    drop(stuck.reading.join().unwrap());
    wait_until_idle(&stage);
    let target = stage.path("target/disk.hds");
    stage.ploop(&["copy", "-s", text(&source.point), "-F", "true", "-d", text(&target)]).succeeded();
    alive(&witness);
}

#[test]
fn an_interrupted_init_leaves_nothing_or_a_whole_disk() {
    let Some(stage) = stage() else { return };
    for wait_ms in [40, 80, 120, 200] {
        let folder = stage.path(&format!("after-{wait_ms}"));
        fs::create_dir(&folder).unwrap();
        let image = folder.join("disk.hds");
        let mut init = stage.command(&["init", "-s", "2G", "-n", text(&image)]);
        let init = init.process_group(0).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let group = nix::unistd::Pid::from_raw(i32::try_from(init.id()).unwrap());
        let init = Reaped(Some(init));
        // Any moment will do, also one behind its end: the outcome says which it was.
        std::thread::sleep(Duration::from_millis(wait_ms));
        // As the terminal does: the whole group. It may have ended before.
        nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGINT).ok();
        let ran = init.wait();
        if ran.code == 0 {
            assert!(names(&folder).contains(&"DiskDescriptor.xml".to_owned()));
            stage.ploop(&["info", text(&image)]).succeeded();
        } else {
            assert!(names(&folder).is_empty(), "{}: {:?} {}", ran.code, names(&folder), ran.stderr);
        }
    }
    assert!(stage.ploop(&["list"]).succeeded().is_empty());
}
