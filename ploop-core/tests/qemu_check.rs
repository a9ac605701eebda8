//! Our verdict on damaged images beside that of `qemu-img check`, and our stored bitmaps as QEMU reads them. Skipped
//! where the tools are missing.
//!
//! Where the two differ, the case says so. QEMU is a referee, not an authority: an abort of its checker (no exit code)
//! counts as "not sound".

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: it stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

mod patience;

use ploop_core::Extent;
use ploop_core::format::stored_bitmap::{self, DirtyBits, Loaded};
use ploop_core::format::{CreateOptions, Geometry, Guid, Version, create_image};
use ploop_core::io::file::{Caching, FileStorage, OpenOptions};
use ploop_core::io::{Access, Storage, StorageExt};
use ploop_core::ops::Silent;
use ploop_core::ops::check::{CheckOptions, Class, Kind, Outcome, check};
use ploop_core::units::Sectors;

/// 64 KiB.
const CLUSTER: u64 = 65_536;

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
    }
    found
}

/// An image of 40 clusters, of which the first three lie at 1, 2 and 3, closed.
fn image(folder: &Path, name: &str) -> (PathBuf, FileStorage) {
    let path = folder.join(name);
    let file = FileStorage::create_exclusive(&path, Caching::Cached).unwrap();
    let geometry = Geometry::new(Version::V2, Sectors(128), Sectors(128 * 40)).unwrap();
    create_image(&file, &CreateOptions { geometry, preallocated: false }).unwrap();
    for guest in 0..3u32 {
        file.write_all_at(u64::from(guest + 1) * CLUSTER, &vec![u8::try_from(guest).unwrap() + 1; 65_536])
            .unwrap();
        entry(&file, guest, guest + 1);
    }
    field(&file, 52, 0);
    (path, file)
}

fn field(file: &FileStorage, at: u64, value: u32) {
    file.write_all_at(at, &value.to_le_bytes()).unwrap();
}

fn entry(file: &FileStorage, guest: u32, raw: u32) {
    field(file, 64 + 4 * u64::from(guest), raw);
}

/// The exit code of `qemu-img check`; `None` if it aborted.
fn qemu(path: &Path) -> Option<i32> {
    let output = Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(path).output().unwrap();
    output.status.code()
}

fn ours(options: &CheckOptions) -> ploop_core::ops::check::CheckReport {
    check(options, &Silent).unwrap()
}

/// One difference or agreement: what is done to a sound image, what QEMU says, what we say.
struct Case {
    name: &'static str,
    damage: fn(&FileStorage),
    qemu: &'static [Option<i32>],
    ours: Option<(Kind, Class)>,
}

/// What `-` means in the comments: QEMU says nothing, we do.
fn cases() -> Vec<Case> {
    vec![
        Case { name: "sound", damage: |_| {}, qemu: &[Some(0)], ours: None },
        Case {
            name: "leak",
            damage: |file| file.set_len(9 * CLUSTER).unwrap(),
            qemu: &[Some(3)],
            ours: Some((Kind::Tail, Class::A)),
        },
        Case {
            name: "leak of one byte",
            damage: |file| file.set_len(4 * CLUSTER + 1).unwrap(),
            qemu: &[Some(3)],
            ours: Some((Kind::Tail, Class::A)),
        },
        Case {
            name: "duplicate",
            damage: |file| entry(file, 7, 2),
            // 1 ("busy") if the last entry looked at is the duplicate.
            qemu: &[Some(1), Some(2)],
            ours: Some((Kind::EntryShared, Class::C)),
        },
        Case {
            name: "data offset before the end of the table",
            damage: |file| field(file, 48, 0),
            qemu: &[Some(2)],
            ours: Some((Kind::DataOffset, Class::C)),
        },
        Case {
            name: "data offset past the end",
            damage: |file| field(file, 48, 128 * 1000),
            qemu: &[Some(2)],
            ours: Some((Kind::DataOffset, Class::C)),
        },
        Case {
            name: "not closed",
            damage: |file| field(file, 44, 0x746F_6E59),
            qemu: &[Some(2)],
            // QEMU calls it a corruption; it says nothing about the table.
            ours: Some((Kind::NotClosed, Class::A)),
        },
        Case {
            name: "entry past the end",
            damage: |file| entry(file, 7, 900),
            // It aborts when another entry is sound.
            qemu: &[Some(2), None],
            ours: Some((Kind::EntryBeyondEnd, Class::C)),
        },
        Case {
            name: "cluster cut by the end",
            damage: |file| file.set_len(4 * CLUSTER - 4096).unwrap(),
            // Its repair clears the entry; ours keeps what is there.
            qemu: &[Some(2), None],
            ours: Some((Kind::EntryCut, Class::C)),
        },
        Case {
            name: "entry past the end of the disk",
            damage: |file| field(file, 36, 128 * 2),
            // QEMU does not compare disk and table.
            qemu: &[Some(0)],
            ours: Some((Kind::EntryPastDisk, Class::C)),
        },
        Case {
            name: "disk larger than its table",
            damage: |file| field(file, 36, 128 * 41),
            qemu: &[Some(0)],
            ours: Some((Kind::DiskBeyondTable, Class::C)),
        },
        Case {
            name: "junk behind the table",
            damage: |file| entry(file, 50, 1),
            qemu: &[Some(0)],
            ours: Some((Kind::Padding, Class::A)),
        },
        Case {
            name: "unknown mark",
            damage: |file| field(file, 44, 77),
            qemu: &[Some(0)],
            ours: Some((Kind::UnknownMark, Class::A)),
        },
        Case {
            name: "free cluster inside",
            damage: |file| entry(file, 1, 0),
            qemu: &[Some(0)],
            // Neither minds: it is used again.
            ours: None,
        },
    ]
}

#[test]
fn verdicts_beside_those_of_qemu() {
    if !has("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for case in cases() {
        let (path, file) = image(folder.path(), case.name);
        (case.damage)(&file);
        drop(file);
        let said = qemu(&path);
        assert!(case.qemu.contains(&said), "{}: qemu-img check says {said:?}", case.name);
        let report = ours(&CheckOptions::look(&path));
        let findings = &report.images[0].findings;
        match case.ours {
            None => assert_eq!(report.outcome, Outcome::Sound, "{}: {findings:?}", case.name),
            Some((kind, class)) => {
                let row = findings.counts.iter().find(|row| row.kind == kind);
                assert_eq!(row.map(|row| row.class), Some(class), "{}: {findings:?}", case.name);
            }
        }
        let report = ours(&CheckOptions::repair(&path));
        assert!(report.outcome <= Outcome::Repaired, "{}: {report:?}", case.name);
        assert_eq!(qemu(&path), Some(0), "{}: our repair does not content qemu-img", case.name);
    }
}

/// What QEMU repairs, we find sound.
#[test]
fn images_repaired_by_qemu() {
    if !has("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for case in cases().into_iter().filter(|case| ["leak", "duplicate", "not closed"].contains(&case.name)) {
        let (path, file) = image(folder.path(), case.name);
        (case.damage)(&file);
        drop(file);
        Command::new("qemu-img")
            .args(["check", "-q", "-r", "all", "-f", "parallels"])
            .arg(&path)
            .output()
            .unwrap();
        let report = ours(&CheckOptions::look(&path));
        assert_eq!(report.outcome, Outcome::Sound, "{}: {report:?}", case.name);
    }
}

/// A server that ends with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn stored_bitmaps_are_what_qemu_reads() {
    if !has("qemu-img") || !has("qemu-nbd") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, file) = image(folder.path(), "bitmap");
    let geometry = Geometry::new(Version::V2, Sectors(128), Sectors(128 * 40)).unwrap();
    let id = [0x0d, 0x3c, 0x1c, 0x1e, 0x31, 0xa4, 0x4c, 0x56, 0x9d, 0x51, 0x2b, 0x0f, 0x6a, 0x1c, 0x7e, 0x10];
    let name = "0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10";
    assert!(format!("{{{name}}}").parse::<Guid>().is_ok());
    let mut bits = DirtyBits::new(id, 8, &geometry).unwrap();
    for extent in [(0, 4096), (10_000, 90_000), (2_000_000, 2_000_001), (40 * CLUSTER - 1, 40 * CLUSTER)] {
        bits.mark(Extent::between(extent.0, extent.1));
    }
    let mut full = DirtyBits::new([9; 16], 128, &geometry).unwrap();
    full.mark(Extent::between(0, u64::MAX));
    stored_bitmap::store(&file, &[full.clone(), bits.clone()]).unwrap();
    // A check keeps them, also when it has something to repair.
    file.set_len(50 * CLUSTER).unwrap();
    entry(&file, 8, 2);
    drop(file);
    assert_eq!(ours(&CheckOptions::repair(&path)).outcome, Outcome::Repaired);
    let file = FileStorage::open(&path, &OpenOptions::new(Access::ReadOnly)).unwrap();
    assert_eq!(stored_bitmap::load(&file).unwrap(), [Loaded::Known(full), Loaded::Known(bits.clone())]);
    let socket = folder.path().join("nbd.sock");
    let server = Command::new("qemu-nbd")
        .args(["--read-only", "-t", "-f", "parallels", &format!("--bitmap={name}"), "-k"])
        .arg(&socket)
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Served(server);
    patience::wait_until("qemu-nbd answers", || {
        assert!(server.0.try_wait().unwrap().is_none(), "qemu-nbd refuses our image");
        socket.exists()
    });
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let output =
        Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &options]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut seen = Vec::new();
    for run in map.as_array().unwrap() {
        if run["data"] == false {
            let (start, len) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
            seen.push((start, start + len));
        }
    }
    let mut expected = Vec::new();
    let mut at = 0;
    while let Some(run) = bits.next_dirty(at) {
        expected.push((run.start(), run.end()));
        at = run.end();
    }
    assert_eq!(seen, expected, "dirty runs as QEMU sees them");
}
