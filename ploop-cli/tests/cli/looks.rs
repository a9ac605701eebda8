//! Commands that only look change nothing: not a byte, not a length, not a time, on any kind of disk, sound or not; and need
//! no right to change anything.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::ploop;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn patch(image: &Path, at: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(image).unwrap().write_all_at(bytes, at).unwrap();
}

fn init(place: &Path, name: &str, line: &[&str]) -> PathBuf {
    let folder = place.join(name);
    fs::create_dir(&folder).unwrap();
    let image = folder.join("disk.hds");
    let mut words = vec!["init", "-s", "8M", "-t", "none"];
    words.extend(line);
    words.push(text(&image));
    ploop(&words).succeeded();
    image
}

/// A disk of each kind, in a folder of its own.
fn corpus(place: &Path) -> Vec<PathBuf> {
    const NOT_CLOSED: [u8; 4] = 0x746F_6E59u32.to_le_bytes();
    init(place, "version-1", &["-v", "1"]);
    init(place, "version-2", &["-v", "2"]);
    init(place, "preallocated", &["-f", "preallocated"]);
    init(place, "raw", &["-f", "raw"]);
    let odd = init(place, "raw-inside-a-cluster", &["-f", "raw"]);
    let sectors = (8u64 << 20) / 512;
    fs::OpenOptions::new().write(true).open(&odd).unwrap().set_len((sectors - 3) * 512).unwrap();
    let descriptor = odd.with_file_name("DiskDescriptor.xml");
    let xml = fs::read_to_string(&descriptor).unwrap();
    fs::write(&descriptor, xml.replace(&sectors.to_string(), &(sectors - 3).to_string())).unwrap();
    let cut = init(place, "raw-cut", &["-f", "raw"]);
    fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(1000).unwrap();
    let chain = init(place, "chain", &[]);
    ploop(&["snapshot", text(chain.parent().unwrap())]).succeeded();
    patch(&init(place, "damaged", &[]), 64, &[0xFF; 8]);
    let tail = init(place, "tail-and-mark", &[]);
    fs::OpenOptions::new().write(true).open(&tail).unwrap().set_len(5 << 20).unwrap();
    patch(&init(place, "not-closed", &[]), 44, &NOT_CLOSED);
    let extension = init(place, "extension", &[]);
    fs::OpenOptions::new().write(true).open(&extension).unwrap().set_len(2 << 20).unwrap();
    patch(&extension, 44, &0x312E_3276u32.to_le_bytes());
    patch(&extension, 56, &2048u64.to_le_bytes());
    patch(&init(place, "no-header", &[]), 0, &[0; 64]);
    let mut found: Vec<_> = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// Bytes, length, and the times of content and of everything else.
type State = BTreeMap<PathBuf, (Vec<u8>, u64, [i64; 4])>;

fn state(folder: &Path) -> State {
    let mut found = State::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // The original's lock of the descriptor: a file that is made when missing and never removed.
        if path.extension().is_some_and(|end| end == "lck") {
            continue;
        }
        let about = fs::metadata(&path).unwrap();
        let times = [about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()];
        found.insert(path.clone(), (fs::read(&path).unwrap(), about.len(), times));
    }
    found
}

/// The lines of every command that only looks, for the disk in `folder`.
fn lines(folder: &Path) -> Vec<Vec<String>> {
    let disk = text(folder).to_owned();
    let image = text(&folder.join("disk.hds")).to_owned();
    let mut lines: Vec<Vec<String>> = [
        vec!["check", "-r"],
        vec!["check", "-r", "-f"],
        vec!["check", "-r", "-d", "-c"],
        vec!["info"],
        vec!["info", "-s"],
        vec!["map"],
        vec!["snapshot-list"],
    ]
    .iter()
    .flat_map(|line| [disk.clone(), image.clone()].map(|of| (line, of)))
    .map(|(line, of)| line.iter().map(|word| (*word).to_owned()).chain([of]).collect())
    .collect();
    lines.push(vec!["export".to_owned(), disk, "-".to_owned()]);
    lines.push(vec!["check".to_owned(), "-R".to_owned(), "-b".to_owned(), "2048".to_owned(), image]);
    lines
}

fn run(line: &[String]) -> i32 {
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    ploop(&words).code
}

/// What a check may say of each disk: 0 where nothing is wrong that matters.
fn is_sound(folder: &Path) -> bool {
    let name = folder.file_name().unwrap().to_str().unwrap();
    !["damaged", "raw-cut", "no-header", "not-closed"].contains(&name)
}

#[test]
fn commands_that_look_change_nothing() {
    let place = tempfile::tempdir().unwrap();
    for folder in corpus(place.path()) {
        let before = state(&folder);
        for line in lines(&folder) {
            let code = run(&line);
            assert!(code != 101 && code >= 0, "{line:?} ended with {code}");
            assert!(state(&folder) == before, "{line:?} changed {}", folder.display());
        }
        let code = run(&["check".into(), "-r".into(), "-f".into(), text(&folder).into()]);
        assert_eq!(code == 0, is_sound(&folder), "{}: {code}", folder.display());
    }
}

/// What is repaired without `--repair` is what the page of the command says, and nothing of a disk that is sound.
#[test]
fn a_check_of_a_sound_disk_changes_nothing_whatever_it_might_repair() {
    let place = tempfile::tempdir().unwrap();
    for folder in corpus(place.path()) {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        // Damage is left as it is; an unused tail, a mark, an extension that is none and the flag of
        // a new preallocated image are what -f repairs.
        if ["tail-and-mark", "not-closed", "extension", "preallocated"].contains(&name.as_str()) {
            continue;
        }
        for options in [&[][..], &["-f"], &["-f", "-d", "-c"]] {
            let before = state(&folder);
            let line: Vec<String> = ["check"]
                .iter()
                .chain(options)
                .map(|word| (*word).to_owned())
                .chain([text(&folder).into()])
                .collect();
            run(&line);
            assert!(state(&folder) == before, "{line:?}");
        }
    }
}

/// Unmounts when it goes.
struct ReadOnly(PathBuf);

impl Drop for ReadOnly {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(&self.0).status());
    }
}

#[test]
fn a_medium_that_takes_no_writes_is_no_damage() {
    let place = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(place.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        ploop_testing::skip(ploop_testing::Need::Root, "mounting a tmpfs needs root");
        return;
    }
    let medium = ReadOnly(place.path().to_path_buf());
    let folders = corpus(place.path());
    let status = Command::new("mount").args(["-o", "remount,ro"]).arg(place.path()).status().unwrap();
    assert!(status.success());
    for folder in folders {
        let before = state(&folder);
        for line in lines(&folder) {
            assert!(run(&line) != 101, "{line:?}");
        }
        for options in [&[][..], &["-f"], &["-r", "-f"], &["--repair"]] {
            let line: Vec<String> = ["check"]
                .iter()
                .chain(options)
                .map(|word| (*word).to_owned())
                .chain([text(&folder).into()])
                .collect();
            let words: Vec<&str> = line.iter().map(String::as_str).collect();
            let ran = ploop(&words);
            let name = folder.file_name().unwrap().to_str().unwrap();
            if ["damaged", "raw-cut", "no-header"].contains(&name) {
                assert!([0, 7, 11].contains(&ran.code), "{line:?}: {}", ran.stderr);
            } else {
                let may_fail = options == ["--repair"] || name == "not-closed";
                assert!(
                    ran.code == 0 || may_fail && [7, 37].contains(&ran.code),
                    "{line:?}: {} {}",
                    ran.code,
                    ran.stderr
                );
                if ran.code == 7 && !options.contains(&"-r") {
                    assert!(ran.stderr.contains("read-only") && ran.stderr.contains("-r"), "{}", ran.stderr);
                }
                assert!(!ran.stdout.contains("DAMAGED"), "{line:?}: {}", ran.stdout);
            }
        }
        assert!(state(&folder) == before);
    }
    drop(medium);
}
