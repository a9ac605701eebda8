//! Two commands at once on one closed disk: the second is told so (23) when it has waited long enough, changes nothing, and
//! works when the first has ended.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ploop_core::Extent;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::io::{Access, best_io_queue};
use ploop_core::ops::open::{OpenOptions, open};

use crate::patience::wait_until;
use crate::stage::Reaped;
use crate::support::{command, ploop};

const ONE: &str = "{11111111-1111-1111-1111-111111111111}";
const TWO: &str = "{22222222-2222-2222-2222-222222222222}";
const DISK_MIB: u64 = 64;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Every command that changes a closed disk; `DISK` stands for it, `NEW` for a place that is free.
const CHANGING: [&[&str]; 13] = [
    &["snapshot", "DISK"],
    &["snapshot-delete", "-u", ONE, "DISK"],
    &["snapshot-delete", "-u", TWO, "DISK"],
    &["snapshot-merge", "-u", TWO, "DISK"],
    &["snapshot-merge", "-A", "DISK"],
    &["snapshot-switch", "-u", TWO, "DISK"],
    &["clone", "-u", ONE, "DISK", "NEW"],
    &["check", "--repair", "DISK"],
    &["compact", "DISK"],
    &["convert", "-v", "1", "DISK"],
    &["convert", "-b", "256", "DISK"],
    &["grow", "-s", "96M", "DISK"],
    &["resize", "-s", "96M", "DISK"],
];

/// Those that can be held in the middle, with the disk at its end: they go as slow as they are told.
const SLOW: [&[&str]; 5] = [
    &["snapshot-delete", "-u", TWO, "--limit", "64K"],
    &["snapshot-merge", "-A", "--limit", "64K"],
    &["compact", "--limit", "64K"],
    &["convert", "-v", "1", "--limit", "64K"],
    &["convert", "-b", "256", "--limit", "64K"],
];

/// Writes to a closed disk.
fn change(folder: &Path, change: impl FnOnce(&mut Client)) {
    let opened = open(&OpenOptions::new(folder, Access::ReadWrite)).unwrap();
    let disk = Disk::open(opened.chain, DiskOptions::default()).unwrap();
    let mut client = Client::new(&disk, best_io_queue(8).unwrap()).unwrap();
    change(&mut client);
    drop(client);
    disk.close().unwrap();
}

/// A disk with two snapshots, data in each of its images, and free clusters inside the last one.
fn make(folder: &Path) {
    fs::create_dir(folder).unwrap();
    ploop(&["init", "-s", "64M", "-b", "128", "-t", "none", text(&folder.join("disk.hds"))]).succeeded();
    change(folder, |client| client.write(0, &vec![1; 8 << 20]).unwrap());
    ploop(&["snapshot", "-u", ONE, text(folder)]).succeeded();
    change(folder, |client| client.write(4 << 20, &vec![2; 8 << 20]).unwrap());
    ploop(&["snapshot", "-u", TWO, text(folder)]).succeeded();
    change(folder, |client| {
        client.write(16 << 20, &vec![3; 8 << 20]).unwrap();
        client.discard(Extent::new(16 << 20, 4 << 20).unwrap()).unwrap();
    });
}

/// What a guest sees.
fn content(folder: &Path) -> Vec<u8> {
    let opened = open(&OpenOptions::new(folder, Access::ReadOnly)).unwrap();
    let disk = Disk::open(opened.chain, DiskOptions { read_only: true, ..DiskOptions::default() }).unwrap();
    let mut client = Client::new(&disk, best_io_queue(8).unwrap()).unwrap();
    client.read(Extent::new(0, DISK_MIB << 20).unwrap()).unwrap().as_slice().to_vec()
}

/// Every file of a folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.strip_prefix(folder).unwrap().to_path_buf(), fs::read(&path).unwrap())).collect()
}

fn copy_of(folder: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (name, bytes) in files(folder) {
        fs::write(to.join(name), bytes).unwrap();
    }
}

/// The words of a command line for the disk in `folder`.
fn line<'a>(words: &[&'a str], folder: &'a Path, new: &'a Path) -> Vec<&'a str> {
    let word = |word: &&'a str| match *word {
        "DISK" => text(folder),
        "NEW" => text(new),
        word => word,
    };
    words.iter().map(word).collect()
}

/// That each of them is refused while somebody else works on the disk, and that nothing has changed then.
fn all_are_refused(folder: &Path, by: &str) {
    let before = files(folder);
    let new = folder.with_extension("new");
    // All at once: each waits for as long as it is told.
    let waiting = CHANGING.map(|words| {
        let mut command = command(&line(words, folder, &new));
        command.env("PLOOP_LOCK_SECONDS_MAX", "2");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        (words, Reaped(Some(child)))
    });
    for (words, child) in waiting {
        let ran = child.wait();
        assert_eq!(ran.code, 23, "{words:?} beside {by}: {}", ran.stderr);
        assert!(ran.stderr.contains("another command") && ran.stderr.contains("advice"), "{}", ran.stderr);
    }
    assert!(files(folder) == before, "somebody changed the disk beside {by}");
    assert!(!new.exists(), "somebody made something beside {by}");
}

/// That each of them works on a disk that nobody else works on.
fn all_work(folder: &Path, after: &str) {
    let expected = content(folder);
    for (number, words) in CHANGING.iter().enumerate() {
        let own = folder.with_extension(format!("{number}"));
        let new = folder.with_extension(format!("{number}.new"));
        copy_of(folder, &own);
        let ran = ploop(&line(words, &own, &new));
        assert_eq!(ran.code, 0, "{words:?} after {after}: {}", ran.stderr);
        if words[0] != "snapshot-switch" {
            assert!(content(&own) == expected, "{words:?} after {after} changed what the guest sees");
        }
        for path in [own, new] {
            fs::remove_dir_all(path).ok();
        }
    }
}

/// Whoever holds the lock, for an instant command as for a long one, one of ours or the original's.
#[test]
fn every_command_waits_for_the_descriptor_and_is_refused() {
    let folder = crate::referee::folder();
    let disk = folder.path().join("disk");
    make(&disk);
    let lock = fs::File::open(disk.join("DiskDescriptor.xml.lck")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    all_are_refused(&disk, "the holder of the lock");
    drop(lock);
    all_work(&disk, "the holder of the lock");
}

#[test]
fn a_command_in_the_middle_of_its_work_keeps_every_other_one_out() {
    let folder = crate::referee::folder();
    std::thread::scope(|scope| {
        for (number, words) in SLOW.into_iter().enumerate() {
            let disk = folder.path().join(format!("disk-{number}"));
            scope.spawn(move || {
                let by = words.join(" ");
                make(&disk);
                let expected = content(&disk);
                // Beside the disk: nothing but its own files is in there.
                let said = disk.with_extension("said");
                let mut first = command(&[&["--json"], words, &[text(&disk)]].concat());
                first.stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
                let mut first = Reaped(Some(first.spawn().unwrap()));
                let id = first.0.as_ref().unwrap().id();
                let pid = Pid::from_raw(i32::try_from(id).unwrap());
                wait_until(&format!("{by} works"), || {
                    let child = first.0.as_mut().unwrap();
                    let said = fs::read_to_string(&said).unwrap();
                    assert!(child.try_wait().unwrap().is_none(), "{by} has ended: {said}");
                    said.contains("\"phase_started\"")
                });
                // It holds still, and holds what it has.
                kill(pid, Signal::SIGSTOP).unwrap();
                wait_until("it stands still", || {
                    fs::read_to_string(format!("/proc/{id}/stat")).unwrap().contains(") T ")
                });
                all_are_refused(&disk, &by);
                kill(pid, Signal::SIGCONT).unwrap();
                kill(pid, Signal::SIGINT).unwrap();
                let ended = first.wait();
                assert_eq!(ended.code, 29, "{by}: {}", fs::read_to_string(&said).unwrap());
                assert!(content(&disk) == expected, "{by} changed what the guest sees");
                // What it had begun is gone, or ended by the same command.
                if words[0].starts_with("snapshot-") {
                    let again = words.iter().filter(|word| !["--limit", "64K"].contains(word)).copied();
                    ploop(&again.chain([text(&disk)]).collect::<Vec<_>>()).succeeded();
                } else {
                    all_work(&disk, &by);
                }
            });
        }
    });
}
