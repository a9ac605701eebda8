//! The receiver's command of a copy (`--to`): how it may ask, how it is ended, which exit code its end leads to, and what
//! is said of the copy.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::patience::{becomes, wait_until};
use crate::stage::Ran;
use crate::support::{PLOOP, ploop};

/// The last line of each failure here.
const NOTHING_THERE: &str = "the disk runs here; nothing stands over there under the final name";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A disk with some MiB of data, in its folder.
fn image(folder: &Path) -> std::path::PathBuf {
    let (raw, image) = (folder.join("data"), folder.join("from/disk.hds"));
    fs::create_dir(folder.join("from")).unwrap();
    fs::create_dir(folder.join("to")).unwrap();
    let data: Vec<u8> =
        (0..24_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
    fs::write(&raw, data).unwrap();
    ploop(&["import", text(&raw), text(&image)]).succeeded();
    image
}

fn to(image: &Path, command: &str, more: &[&str]) -> Ran {
    let mut line = vec!["copy", "-s", text(image), "--to", command];
    line.extend(more);
    ploop(&line)
}

/// The ids of processes with that word on their command line.
fn with_word(word: &str) -> Vec<u32> {
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    processes
        .filter(|process: &u32| {
            let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|part| part == word.as_bytes())
                && crate::patience::is_running(*process)
        })
        .collect()
}

#[track_caller]
fn ended_with(ran: &Ran, codes: &[i32], words: &[&str]) {
    assert!(codes.contains(&ran.code), "exit {}: {}", ran.code, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "\"{word}\" is missing: {}", ran.stderr);
    }
    assert_eq!(ran.stderr.lines().last().unwrap_or_default().trim(), NOTHING_THERE, "{}", ran.stderr);
}

#[test]
fn a_command_that_says_nothing_is_left_in_time_and_ended_with_its_group() {
    let folder = crate::referee::folder();
    let image = image(folder.path());
    // A number that is nobody else's.
    let word = format!("1000.{}", std::process::id());
    let none = to(&image, "sleep 1", &["--stall-timeout", "0"]);
    assert_eq!(none.code, 38, "{}", none.stderr);
    let begun = Instant::now();
    let ran = to(&image, &format!("sleep {word}"), &["--stall-timeout", "1"]);
    ended_with(&ran, &[6], &["no sign of life"]);
    // And one that has started others.
    let command = format!("sh -c 'sleep {word} & sleep {word}'");
    ended_with(&to(&image, &command, &["--stall-timeout", "1"]), &[6], &[]);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    wait_until("all of them have ended", || with_word(&word).is_empty());
}

#[test]
fn the_exit_code_is_the_receivers_or_that_of_a_broken_line() {
    let folder = crate::referee::folder();
    let image = image(folder.path());
    let target = folder.path().join("to/disk.hds");
    let receiver = format!("{PLOOP} copy -d {}", target.display());
    let left = || fs::read_dir(folder.path().join("to")).unwrap().count();
    // The line is cut, as an ssh whose connection breaks ends.
    let ran = to(&image, &format!("sh -c 'stdbuf -o0 head -c 3000000 | {receiver}; exit 255'"), &[]);
    ended_with(&ran, &[6, 7], &[]);
    // The receiver is killed in the middle: a file may not grow any more.
    let ran = to(&image, &format!("sh -c 'ulimit -f 4096; exec {receiver}'"), &[]);
    ended_with(&ran, &[6, 7], &[]);
    // It ends with a reason of its own and cannot say it.
    let silenced = format!("sh -c '{receiver} 2>/dev/null | stdbuf -o0 head -c 400; exit 20'");
    ended_with(&to(&image, &silenced, &[]), &[20], &["exit status: 20"]);
    // What an incoming file of a killed one leaves goes with the next attempt.
    to(&image, &receiver, &[]).succeeded();
    assert_eq!(left(), 2);
    // No receiver at all: what it said is shown, and not what it could do to a terminal.
    let ran = to(&image, r#"sh -c 'printf "no \033[2Jroute\n" >&2; exit 255'"#, &[]);
    assert_eq!(ran.code, 12, "{}", ran.stderr);
    assert!(ran.stderr.contains("255): no ?[2Jroute"), "{}", ran.stderr);
}

#[test]
fn a_full_destination_is_the_receivers_code() {
    let folder = crate::referee::folder();
    let image = image(folder.path());
    let small = folder.path().join("to");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=6m", "tmpfs", text(&small)]).output();
    if !mounted.is_ok_and(|mounted| mounted.status.success()) {
        ploop_testing::skip(ploop_testing::Need::Root, "a small file system needs root");
        return;
    }
    let receiver = format!("{PLOOP} copy -d {}", small.join("disk.hds").display());
    let at_once = to(&image, &receiver, &[]);
    let enlarged = Command::new("mount").args(["-o", "remount,size=30m", text(&small)]).status().unwrap();
    assert!(enlarged.success());
    // Room for all of it at first, and then somebody else takes that.
    let fill = small.join("fill");
    let begin = format!("(stdbuf -o0 head -c 3000000; fallocate -l 15M {}; cat)", fill.display());
    let in_the_middle = to(&image, &format!("sh -c '{begin} | {receiver}'"), &[]);
    let left: Vec<_> = fs::read_dir(&small).unwrap().map(|entry| entry.unwrap().path()).collect();
    let unmounted = Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
    for ran in [at_once, in_the_middle] {
        ended_with(&ran, &[20], &["the receiver gave up"]);
    }
    assert_eq!(left, [fill]);
}

/// Runs a command under a terminal of its own, in whose foreground it is; types `answer` when it has read `prompt`.
fn at_terminal(line: &str, prompt: &str, answer: &[u8]) -> Option<(i32, String)> {
    let script = Command::new("script")
        .args(["-q", "-e", "-c", line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut script) = script else {
        ploop_testing::skip(ploop_testing::Need::Program("script"), "script is not installed");
        return None;
    };
    let (mut keys, mut screen) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
    let shown = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&shown);
    let reading = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = screen.read(&mut buffer) {
            seen.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
    });
    let text = || String::from_utf8_lossy(&shown.lock().unwrap()).into_owned();
    assert!(becomes(|| text().contains(prompt)), "no prompt appeared: {}", text());
    keys.write_all(answer).unwrap();
    keys.flush().unwrap();
    assert!(becomes(|| script.try_wait().unwrap().is_some()), "it does not end: {}", text());
    drop(keys);
    reading.join().unwrap();
    Some((script.wait().unwrap().code().unwrap_or(-1), text()))
}

/// As ssh does at a host that it does not know.
#[test]
fn the_command_can_ask_at_the_terminal() {
    let folder = crate::referee::folder();
    let image = image(folder.path());
    let target = folder.path().join("to/disk.hds");
    let asking = folder.path().join("asking.sh");
    let script = format!(
        "stty -echo </dev/tty\nprintf 'known %s ' host? >/dev/tty\nread -r answer </dev/tty\nstty echo </dev/tty\n\
         [ \"$answer\" = yes ] || exit 9\nexec {PLOOP} copy -d {}\n",
        target.display()
    );
    fs::write(&asking, script).unwrap();
    let line = format!(
        "{PLOOP} copy -s {} --to 'sh {}'; echo code $?; stty -a | grep -ow -e '-*echo'; echo after",
        image.display(),
        asking.display()
    );
    let Some((_, screen)) = at_terminal(&line, "known host?", b"yes\n") else { return };
    assert!(screen.contains("code 0") && screen.contains("copied, verified and durable"), "{screen}");
    assert!(target.exists());
    // Interrupted at the prompt: the terminal is as before, and nothing stands there.
    fs::remove_dir_all(target.parent().unwrap()).unwrap();
    fs::create_dir(target.parent().unwrap()).unwrap();
    let Some((_, screen)) = at_terminal(&line, "known host?", b"\x03") else { return };
    assert!(screen.contains("code 29") && screen.contains(NOTHING_THERE), "{screen}");
    let after = screen.rsplit("code 29").next().unwrap();
    assert!(after.contains("echo") && !after.contains("-echo"), "{screen}");
    assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 0);
}

/// Without a terminal whatever asks must fail, not stop.
#[test]
fn without_a_terminal_nobody_is_asked() {
    let folder = crate::referee::folder();
    let image = image(folder.path());
    let mut line = Command::new("setsid");
    line.args(["-w", PLOOP, "copy", "-s", text(&image), "--to"]);
    line.arg("sh -c 'read -r answer </dev/tty && exit 0; echo cannot ask >&2; exit 255'");
    let ran: Ran = line.stdin(Stdio::null()).output().unwrap().into();
    assert_eq!(ran.code, 12, "{}", ran.stderr);
    assert!(ran.stderr.contains("cannot ask"), "{}", ran.stderr);
}
