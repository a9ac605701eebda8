//! Bad input, each against every command: an error with the field, its value or its place, the exit code of the table, and
//! not one byte changed. Headers, tables, descriptors, chains, devices, media that take no writes, hosts that are full.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stage::Ran;
use crate::support::ploop;

const ONE: &str = "{11111111-1111-1111-1111-111111111111}";
const OTHER: &str = "{22222222-2222-2222-2222-222222222222}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A disk of 4 MiB in clusters of 32 KiB with data and one snapshot, in a folder of its own.
fn disk(folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let bytes: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 4096).to_le_bytes()[0] | 1).collect();
    let input = folder.with_extension("input");
    fs::write(&input, bytes).unwrap();
    let image = folder.join("disk.hds");
    ploop(&["import", "-b", "64", text(&input), text(&image)]).succeeded();
    fs::remove_file(&input).unwrap();
    ploop(&["snapshot", "-u", ONE, text(folder)]).succeeded();
    folder.to_path_buf()
}

/// The images of a disk: the base, and the current one.
fn images(folder: &Path) -> (PathBuf, PathBuf) {
    let names = fs::read_dir(folder).unwrap().map(|item| item.unwrap().path());
    let top = names.into_iter().find(|path| text(path).contains("disk.hds.{")).expect("a second image");
    (folder.join("disk.hds"), top)
}

fn set(image: &Path, at: usize, bytes: &[u8]) {
    let mut content = fs::read(image).unwrap();
    content[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(image, content).unwrap();
}

/// Every file of a folder with its bytes; what is no file by its kind.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|item| {
            let item = item.unwrap();
            let is_file = item.file_type().unwrap().is_file();
            let bytes = if is_file { fs::read(item.path()).unwrap() } else { b"no file".to_vec() };
            (item.file_name().into_string().unwrap(), bytes)
        })
        .collect()
}

/// Commands that read, and those that would write.
fn commands(disk: &str, other: &str) -> [Vec<Vec<String>>; 2] {
    let lines = |lines: &[&[&str]]| -> Vec<Vec<String>> {
        lines.iter().map(|line| line.iter().map(|&word| word.to_owned()).collect()).collect()
    };
    [
        lines(&[&["map", disk], &["export", disk, other], &["diff", "-u", ONE, disk], &["copy", "-s", disk]]),
        lines(&[
            &["compact", disk],
            &["resize", "-s", "8M", disk],
            &["grow", "-s", "8M", disk],
            &["convert", "-v", "1", disk],
            &["snapshot", disk],
            &["snapshot-delete", "-u", ONE, disk],
            &["snapshot-merge", disk],
            &["snapshot-merge", "-n", "new.hds", disk],
            &["snapshot-switch", "-u", ONE, disk],
        ]),
    ]
}

fn run(line: &[String]) -> Ran {
    ploop(&line.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A failure that people can do something with: no panic, no signal, one of the codes, and one of the words.
#[track_caller]
fn is_told(ran: &Ran, codes: &[i32], words: &[&str], what: &str) {
    assert!(codes.contains(&ran.code), "{what}: exit {}: {}{}", ran.code, ran.stdout, ran.stderr);
    assert!(
        ran.stderr.starts_with("ploop: ") && words.iter().any(|word| ran.stderr.contains(word)),
        "{what}: none of {words:?} is in: {}",
        ran.stderr
    );
}

/// No command takes the disk, and none changes it.
#[track_caller]
fn refused_by_all(folder: &Path, codes: &[i32], words: &[&str], what: &str) {
    refused_by(folder, codes, words, what, |_| true);
}

/// As [`refused_by_all`], of some commands alone.
#[track_caller]
fn refused_by(folder: &Path, codes: &[i32], words: &[&str], what: &str, which: impl Fn(&str) -> bool) {
    let before = content(folder);
    let other = folder.with_extension("other");
    let lines = commands(text(folder), text(&other)).concat();
    for line in lines.into_iter().filter(|line| which(&line[0])) {
        let ran = run(&line);
        is_told(&ran, codes, words, &format!("{what}: {line:?}"));
        assert!(content(folder) == before, "{what}: {line:?} changed {:?}", content(folder).keys());
        assert!(!other.exists(), "{what}: {line:?} made something");
    }
    // Those that look at anything; what a check finds is said in its own tests. It passes closed images by.
    let checked = ploop(&["check", text(folder)]);
    assert!(![101, -1].contains(&checked.code), "{what}: check: {}{}", checked.code, checked.stdout);
    assert!(content(folder) == before, "{what}: check changed something");
    assert!([0, 4, 11, 37, 38, 39].contains(&ploop(&["info", text(folder)]).code), "{what}: info");
}

#[test]
fn headers_and_tables_that_make_no_sense() {
    let place = crate::referee::folder();
    let entry = |number: usize| 64 + 4 * number;
    let all = u32::MAX.to_le_bytes();
    // Where, what, and what the error has to say.
    let cases: &[(&str, usize, &[u8], &[&str])] = &[
        ("kind", 16, &7_u32.to_le_bytes(), &["7"]),
        ("cluster size 0", 28, &[0; 4], &["0 sectors", "cluster"]),
        ("another cluster size", 28, &100_u32.to_le_bytes(), &["guest cluster"]),
        ("cluster size huge", 28, &all, &["4294967295"]),
        ("entries times cluster overflow", 28, &0x8000_0000_u32.to_le_bytes(), &["2147483648"]),
        ("table larger than the file", 32, &all, &["4294967295", "table"]),
        ("no entries", 32, &[0; 4], &["table of 0 entries"]),
        ("disk size 0", 36, &[0; 8], &["disk of 0 sectors"]),
        ("disk size beyond the table", 36, &u64::MAX.to_le_bytes(), &["18446744073709551615", "disk"]),
        ("entry into the header", entry(3), &[0xff; 4], &["entry", "guest cluster 3"]),
        ("entry past the end", entry(5), &0x00ff_0000_u32.to_le_bytes(), &["entry", "guest cluster 5"]),
    ];
    for (number, (what, at, bytes, words)) in cases.iter().enumerate() {
        let folder = disk(&place.path().join(format!("case{number}")));
        let (base, _) = images(&folder);
        set(&base, *at, bytes);
        refused_by_all(&folder, &[11, 38], words, what);
    }
    // Two entries of one cluster.
    let folder = disk(&place.path().join("doubled"));
    let (base, _) = images(&folder);
    let bytes = fs::read(&base).unwrap();
    set(&base, entry(1), &bytes[entry(0)..entry(0) + 4]);
    refused_by_all(&folder, &[11], &["guest cluster"], "two entries of one cluster");
    // No image, and one cut inside its header.
    for len in [0, 40] {
        let folder = disk(&place.path().join(format!("cut{len}")));
        let (base, _) = images(&folder);
        fs::OpenOptions::new().write(true).open(&base).unwrap().set_len(len).unwrap();
        refused_by_all(
            &folder,
            &[11, 38],
            &["signature", "header", "image", "bytes"],
            "a file cut in its header",
        );
    }
}

/// The descriptor of a disk with one of its texts replaced.
fn with_descriptor(place: &Path, name: &str, change: impl Fn(&str) -> String) -> PathBuf {
    let folder = disk(&place.join(name));
    let path = folder.join("DiskDescriptor.xml");
    let changed = change(&fs::read_to_string(&path).unwrap());
    fs::write(&path, changed).unwrap();
    folder
}

#[test]
fn descriptors_that_lead_elsewhere_or_nowhere() {
    let place = crate::referee::folder();
    let place = place.path();
    let outside = place.join("outside.hds");
    fs::write(&outside, [7; 4096]).unwrap();
    let file = |name: &'static str| {
        let outside = text(&outside).to_owned();
        move |xml: &str| {
            xml.replace(
                "<File>disk.hds</File>",
                &format!("<File>{}</File>", name.replace("OUTSIDE", &outside)),
            )
        }
    };
    let cases: Vec<(&str, PathBuf, &[i32], &[&str])> = vec![
        ("an absolute path", with_descriptor(place, "absolute", file("OUTSIDE")), &[39], &["outside.hds"]),
        ("a path upwards", with_descriptor(place, "up", file("../outside.hds")), &[39], &["../outside.hds"]),
        (
            "a path upwards inside",
            with_descriptor(place, "in", file("x/../../outside.hds")),
            &[39],
            &["outside.hds"],
        ),
        ("no name", with_descriptor(place, "empty", file("")), &[39], &["File", "name", "\"\""]),
        (
            "a missing parent",
            {
                let folder = disk(&place.join("missing"));
                fs::remove_file(folder.join("disk.hds")).unwrap();
                folder
            },
            &[4],
            &["disk.hds"],
        ),
        (
            "a symbolic link",
            {
                let folder = disk(&place.join("link"));
                fs::rename(folder.join("disk.hds"), place.join("linked.hds")).unwrap();
                symlink(place.join("linked.hds"), folder.join("disk.hds")).unwrap();
                folder
            },
            &[4],
            &["disk.hds"],
        ),
        (
            "a folder",
            {
                let folder = disk(&place.join("folder"));
                fs::remove_file(folder.join("disk.hds")).unwrap();
                fs::create_dir(folder.join("disk.hds")).unwrap();
                folder
            },
            &[4],
            &["disk.hds"],
        ),
        (
            "a pipe",
            {
                let folder = disk(&place.join("pipe"));
                fs::remove_file(folder.join("disk.hds")).unwrap();
                nix::unistd::mkfifo(&folder.join("disk.hds"), nix::sys::stat::Mode::S_IRWXU).unwrap();
                folder
            },
            &[4],
            &["disk.hds"],
        ),
        (
            "a chain in a circle",
            with_descriptor(place, "circle", |xml| {
                let none = "<ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>";
                assert!(xml.contains(none), "{xml}");
                xml.replace(none, &format!("<ParentGUID>{TOP}</ParentGUID>"))
            }),
            &[39],
            &["circle", TOP],
        ),
        (
            "a dangling parent",
            with_descriptor(place, "dangling", |xml| {
                let none = "<ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>";
                xml.replace(none, &format!("<ParentGUID>{OTHER}</ParentGUID>"))
            }),
            &[39],
            &[OTHER],
        ),
        (
            "a bomb",
            with_descriptor(place, "bomb", |xml| {
                let entities: String = (1..12)
                    .map(|level| format!("<!ENTITY e{level} \"{}\">", format!("&e{};", level - 1).repeat(10)))
                    .collect();
                let bomb = format!("<!DOCTYPE d [<!ENTITY e0 \"boom\">{entities}]>");
                let at = xml.find("<Parallels_disk_image").unwrap();
                format!("{}{bomb}{}", &xml[..at], xml[at..].replace("disk.hds", "&e11;"))
            }),
            &[39],
            &["DOCTYPE", "DTD", "declaration", "entit"],
        ),
        (
            "a deep document",
            with_descriptor(place, "deep", |xml| {
                let deep = format!("{}{}", "<a>".repeat(100_000), "</a>".repeat(100_000));
                xml.replace("</Parallels_disk_image>", &format!("{deep}</Parallels_disk_image>"))
            }),
            &[39],
            &["deep", "levels", "depth", "nested"],
        ),
        (
            "a long document",
            with_descriptor(place, "long", |xml| xml.to_owned() + &" ".repeat(2 << 20)),
            &[39],
            &["bytes"],
        ),
        (
            "a cut document",
            with_descriptor(place, "cut", |xml| xml[..xml.len() / 2].to_owned()),
            &[39],
            &["XML"],
        ),
        (
            "no number",
            with_descriptor(place, "number", |xml| xml.replace("<Disk_size>8192", "<Disk_size>-1")),
            &[39],
            &["Disk_size", "-1"],
        ),
        (
            "a number that overflows",
            with_descriptor(place, "large", |xml| {
                xml.replace("<Disk_size>8192", "<Disk_size>99999999999999999999")
            }),
            &[39],
            &["Disk_size", "99999999999999999999"],
        ),
    ];
    for (what, folder, codes, words) in &cases {
        refused_by_all(folder, codes, words, what);
    }
    assert_eq!(fs::read(&outside).unwrap(), [7; 4096]);
    // A parent of another disk. Switching to it does not need what stands on it now.
    let folder = disk(&place.join("foreign"));
    let other = place.join("strange");
    fs::create_dir(&other).unwrap();
    let image = other.join("disk.hds");
    ploop(&["init", "-s", "16M", "-b", "128", "-t", "none", text(&image)]).succeeded();
    fs::copy(&image, folder.join("disk.hds")).unwrap();
    let words = ["clusters of 128 sectors", "the lower of 16777216"];
    refused_by(&folder, &[38], &words, "a parent of another disk", |command| command != "snapshot-switch");
    // More images than a chain may have: each stands on the one before it.
    let folder = with_descriptor(place, "tower", |xml| {
        let guid = |number: usize| format!("{{00000000-0000-4000-8000-{number:012x}}}");
        let none = "{00000000-0000-0000-0000-000000000000}";
        let mut images = String::new();
        let mut shots = String::new();
        for number in 1..=200 {
            let below = if number == 1 { none.to_owned() } else { guid(number - 1) };
            images += &format!(
                "<Image><GUID>{}</GUID><Type>Compressed</Type><File>x{number}.hds</File></Image>",
                guid(number)
            );
            shots += &format!("<Shot><GUID>{}</GUID><ParentGUID>{below}</ParentGUID></Shot>", guid(number));
        }
        xml.replace(
            &format!("<ParentGUID>{none}</ParentGUID>"),
            &format!("<ParentGUID>{}</ParentGUID>", guid(200)),
        )
        .replace("</Storage>", &format!("{images}</Storage>"))
        .replace("</Snapshots>", &format!("{shots}</Snapshots>"))
    });
    refused_by_all(&folder, &[39, 4], &["more than 128 images", "x1.hds"], "a chain that is too deep");
}

#[test]
fn devices_and_other_files_where_a_disk_is_expected() {
    let place = crate::referee::folder();
    let before = fs::symlink_metadata("/dev/null").unwrap().file_type();
    for name in ["/dev/null", "/dev/zero", "/dev/tty", "/proc/self/mem"] {
        let other = place.path().join("other");
        let [reading, writing] = commands(name, text(&other));
        for line in reading
            .into_iter()
            .chain(writing)
            .chain([vec!["check".to_owned(), name.to_owned()], vec!["info".to_owned(), name.to_owned()]])
        {
            let ran = run(&line);
            assert!(![0, 101, -1].contains(&ran.code), "{line:?}: {}{}", ran.code, ran.stdout);
            assert!(
                ran.stderr.starts_with("ploop: ") && ran.stderr.contains(name.rsplit('/').next().unwrap()),
                "{line:?}: {}",
                ran.stderr
            );
            assert!(!other.exists(), "{line:?}");
        }
    }
    assert!(before.is_char_device());
    if !is_root() {
        ploop_testing::skip(ploop_testing::Need::Root, "a block device needs root");
        return;
    }
    // A loop device in the place of an image: only where somebody says so.
    let folder = disk(&place.path().join("disk"));
    let (base, _) = images(&folder);
    let backing = place.path().join("backing");
    fs::rename(&base, &backing).unwrap();
    let found = Command::new("losetup").args(["-f", "--show", text(&backing)]).output();
    let Some(found) = found.ok().filter(|found| found.status.success()) else {
        ploop_testing::skip(ploop_testing::Need::Other, "no loop device");
        return;
    };
    let device = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            Command::new("losetup").args(["-d", &self.0]).status().ok();
        }
    }
    let _detach = Detach(device.clone());
    let number = fs::metadata(&device).map(|found| std::os::unix::fs::MetadataExt::rdev(&found)).unwrap();
    let made =
        nix::sys::stat::mknod(&base, nix::sys::stat::SFlag::S_IFBLK, nix::sys::stat::Mode::S_IRWXU, number);
    if made.is_err() {
        ploop_testing::skip(ploop_testing::Need::Other, "no device can be made here");
        return;
    }
    // A device may be looked at; it is never written as an image of a descriptor.
    let looks = ["map", "export", "diff", "copy", "resize"];
    refused_by(&folder, &[4], &["disk.hds"], "a block device as an image", |command| {
        !looks.contains(&command)
    });
    fs::remove_file(&base).unwrap();
}

/// Unmounts at the end.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

fn mount(line: &[&str]) -> bool {
    Command::new("mount").args(line).output().is_ok_and(|done| done.status.success())
}

#[test]
fn media_that_take_no_writes() {
    if !is_root() {
        ploop_testing::skip(ploop_testing::Need::Root, "a read-only mount needs root");
        return;
    }
    let place = crate::referee::folder();
    let folder = disk(&place.path().join("disk"));
    let before = content(&folder);
    let point = place.path().join("point");
    fs::create_dir(&point).unwrap();
    if !mount(&["--bind", text(&folder), text(&point)]) {
        ploop_testing::skip(ploop_testing::Need::Other, "no bind mounts here");
        return;
    }
    let _mounted = Mount(point.clone());
    if !mount(&["-o", "remount,bind,ro", text(&point)]) {
        ploop_testing::skip(ploop_testing::Need::Other, "no read-only bind mounts here");
        return;
    }
    let other = place.path().join("other");
    let [reading, writing] = commands(text(&point), text(&other));
    for line in writing {
        let ran = run(&line);
        if line[0] == "resize" {
            // It looks for a file system first, and there is none.
            assert!(![0, 101, -1].contains(&ran.code), "{line:?}: {}{}", ran.code, ran.stdout);
            continue;
        }
        assert!(![0, 101, -1].contains(&ran.code), "{line:?}: {}{}", ran.code, ran.stdout);
        assert!(ran.stderr.contains("Read-only file system"), "{line:?}: {}", ran.stderr);
        assert!(content(&folder) == before, "{line:?} changed something");
    }
    for line in reading.iter().filter(|line| line[0] != "copy") {
        run(line).succeeded();
    }
    ploop(&["check", text(&point)]).succeeded();
    ploop(&["info", text(&point)]).succeeded();
    ploop(&["snapshot-list", text(&point)]).succeeded();
    let ran = ploop(&["check", "--repair", "-F", text(&point)]);
    assert!(![101, -1].contains(&ran.code), "{}{}", ran.code, ran.stderr);
    assert!(content(&folder) == before, "a check changed something");
    assert_eq!(fs::read(&other).unwrap().len(), 4 << 20);
}

#[test]
fn hosts_that_are_full() {
    if !is_root() {
        ploop_testing::skip(ploop_testing::Need::Root, "a small host needs root");
        return;
    }
    let place = crate::referee::folder();
    let point = place.path().join("host");
    fs::create_dir(&point).unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=16m", "ploop-test", text(&point)]) {
        ploop_testing::skip(ploop_testing::Need::Other, "no tmpfs can be mounted here");
        return;
    }
    let _mounted = Mount(point.clone());
    let made = disk(&place.path().join("disk"));
    // Something to merge: the image above holds other clusters than the one below.
    let fill = |folder: &Path| {
        let filler = folder.parent().unwrap().join("filler");
        let mut file = fs::File::create(filler).unwrap();
        for piece in [1 << 20, 4096, 1] {
            while file.write_all(&vec![7; piece]).is_ok() {}
        }
    };
    let states = |folder: &Path| -> Vec<Vec<u8>> {
        [ONE, TOP]
            .into_iter()
            .filter_map(|state| {
                let file = place.path().join("state");
                fs::remove_file(&file).ok();
                let line = ["export", "-u", state, text(folder), text(&file)];
                let line: Vec<&str> =
                    if state == TOP { vec!["export", text(folder), text(&file)] } else { line.to_vec() };
                (ploop(&line).code == 0).then(|| fs::read(&file).unwrap())
            })
            .collect()
    };
    let expected = states(&made);
    assert!(!expected.is_empty());
    let lines = [
        vec!["resize", "-s", "2G", "DISK"],
        vec!["convert", "-v", "1", "DISK"],
        vec!["convert", "-b", "128", "DISK"],
        vec!["snapshot", "DISK"],
        vec!["snapshot-switch", "-u", ONE, "DISK"],
        vec!["snapshot-merge", "-n", "new.hds", "DISK"],
        vec!["snapshot-merge", "DISK"],
        vec!["snapshot-delete", "-u", ONE, "DISK"],
        vec!["compact", "DISK"],
        vec!["export", "DISK", "OTHER"],
        vec!["clone", "-u", ONE, "DISK", "OTHER"],
        vec!["init", "-s", "64M", "-f", "preallocated", "-t", "none", "OTHER"],
        vec!["check", "--repair", "-F", "DISK"],
    ];
    let (folder, other) = (point.join("disk"), point.join("other"));
    let mut failed = Vec::new();
    for line in lines {
        fs::create_dir(&folder).unwrap();
        for item in fs::read_dir(&made).unwrap() {
            let item = item.unwrap();
            fs::copy(item.path(), folder.join(item.file_name())).unwrap();
        }
        fill(&folder);
        let words: Vec<&str> = line
            .iter()
            .map(|&word| match word {
                "DISK" => text(&folder),
                "OTHER" => text(&other),
                word => word,
            })
            .collect();
        let ran = ploop(&words);
        if ran.code != 0 {
            is_told(&ran, &[1, 7, 16, 18, 19, 20, 27], &["No space left", "no space"], &format!("{line:?}"));
            failed.push(line[0]);
        }
        assert!(
            states(&folder).starts_with(&expected[expected.len() - 1..]) || states(&folder) == expected,
            "{line:?} changed a state"
        );
        // With room again the same command does it.
        fs::remove_file(point.join("filler")).unwrap();
        if ran.code != 0 && !line.contains(&"2G") {
            if line[0] == "init" {
                assert!(!other.exists(), "{line:?} left something");
            } else {
                ploop(&words).succeeded();
            }
        }
        fs::remove_dir_all(&folder).unwrap();
        if other.is_dir() {
            fs::remove_dir_all(&other).unwrap();
        }
        fs::remove_file(&other).ok();
    }
    for needed in ["convert", "snapshot", "snapshot-switch", "export", "clone", "init"] {
        assert!(failed.contains(&needed), "{needed} did not notice that the host is full: {failed:?}");
    }
}
