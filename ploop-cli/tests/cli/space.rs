//! `compact`, `balloon`, `map` and the figures of `info` on closed disks.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ploop_core::Extent;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::io::{Access, best_io_queue};
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::ops::open::{OpenOptions, open};
use ploop_core::ops::progress::Silent;
use ploop_core::ops::snapshot::{SnapshotOptions, snapshot};
use ploop_core::units::Sectors;
use serde_json::Value;

use crate::support::ploop;

const MIB: u64 = 1 << 20;

/// A disk of 64 MiB with every second of the first 32 clusters discarded; some lie in odd places.
fn holed(folder: &Path) -> PathBuf {
    let path = create(&CreateOptions::new(folder, "root.hds", Sectors(64 * 2048))).expect("create").image;
    let opened = open(&OpenOptions::new(&path, Access::ReadWrite)).expect("open");
    let disk = Disk::open(opened.chain, DiskOptions::default()).expect("serve");
    let mut client = Client::new(&disk, best_io_queue(8).expect("a queue")).expect("a client");
    for cluster in [3_u8, 1, 0, 2].into_iter().chain(4..32) {
        client.write(u64::from(cluster) * MIB, &[cluster + 1; 4096]).expect("write");
    }
    client.flush().expect("flush");
    for cluster in (0..32).step_by(2) {
        client.discard(Extent::new(cluster * MIB, MIB).expect("an extent")).expect("discard");
    }
    drop(client);
    disk.close().expect("close");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in plain letters")
}

fn json(line: &[&str]) -> Value {
    serde_json::from_str(&ploop(line).succeeded()).expect("JSON")
}

fn content(path: &Path) -> Vec<u8> {
    let opened = open(&OpenOptions::new(path, Access::ReadOnly)).expect("open");
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = Disk::open(opened.chain, options).expect("serve");
    let mut client = Client::new(&disk, best_io_queue(8).expect("a queue")).expect("a client");
    client.read(Extent::new(0, 64 * MIB).expect("an extent")).expect("read").as_slice().to_vec()
}

#[test]
fn a_closed_disk_is_compacted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = holed(folder.path());
    let before = content(&path);
    let found = json(&["--json", "info", text(&path)]);
    assert_eq!((found["allocated_clusters"].as_u64(), found["free_clusters"].as_u64()), (Some(16), Some(16)));
    let partly = json(&["--json", "compact", "--to-free", "4M", text(&path)]);
    let length = |report: &Value, name: &str| report[name].as_u64().expect("a length");
    let freed = length(&partly, "file_bytes_before") - length(&partly, "file_bytes_after");
    assert!((4 * MIB..8 * MIB).contains(&freed), "{partly}");
    let ran = ploop(&["--json", "compact", text(folder.path())]);
    let events: Vec<String> =
        ran.events().iter().filter_map(|event| event["event"].as_str().map(str::to_owned)).collect();
    assert!(events.contains(&"phase_started".to_owned()) && events.contains(&"phase_ended".to_owned()));
    let report: Value = serde_json::from_str(&ran.succeeded()).expect("JSON");
    assert_eq!(length(&report, "file_bytes_after"), 17 * MIB);
    assert_eq!(report["complete"], true);
    assert_eq!(report["trimmed_bytes"], Value::Null);
    assert!(content(&path) == before);
    assert_eq!(json(&["--json", "info", text(&path)])["free_clusters"], 0);
    let said = ploop(&["compact", text(&path)]).succeeded();
    assert!(said.contains("moved:       0 clusters"), "{said}");
}

#[test]
fn what_the_balloon_cannot_do_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = holed(folder.path());
    let name = text(&path);
    ploop(&["balloon", "discard", name]).failed_with(40, &["--automount", "ploop compact"]);
    ploop(&["balloon", "discard", "--defrag", name]).failed_with(38, &["e4defrag"]);
    ploop(&["balloon", "change", "-s", "1G", name]).failed_with(38, &["ploop resize"]);
    for verb in ["clear", "complete", "check", "repair"] {
        ploop(&["balloon", verb, "-d", "/dev/loop0"]).failed_with(38, &["patched kernels", "advice"]);
    }
    // It is a file in the file system, which nobody sees in a closed disk.
    for line in [&["show", name][..], &["status", name], &["discard", "--stat", name]] {
        ploop(&[&["balloon"], line].concat()).failed_with(40, &["not mounted", "ploop mount"]);
    }
    ploop(&["balloon", "show", "/nowhere"]).failed_with(4, &["/nowhere"]);
    ploop(&["balloon", "show"]).failed_with(38, &["which disk"]);
    ploop(&["compact", "--limit", "0", name]).failed_with(38, &["rate"]);
    ploop(&["compact", "/dev/null/nowhere"]).failed_with(4, &["nowhere"]);
}

#[test]
fn a_map_is_that_of_qemu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = holed(folder.path());
    let map = json(&["--json", "map", text(&path)]);
    let extents = map.as_array().expect("a list");
    let length: u64 = extents.iter().filter_map(|extent| extent["length"].as_u64()).sum();
    assert_eq!(length, 64 * MIB);
    let table = ploop(&["map", text(&path)]).succeeded();
    assert_eq!(table.lines().count(), extents.len() + 1);
    let picture = ploop(&["map", "--picture", text(&path)]).succeeded();
    assert!(picture.contains(&format!("  {}{}\n", ".#".repeat(16), ".".repeat(32))), "{picture}");
    ploop(&["--json", "map", "--picture", text(&path)]).failed_with(38, &["picture"]);
    let line = ["map", "-f", "parallels", "--output=json", text(&path)];
    match Command::new("qemu-img").args(line).stdin(Stdio::null()).output() {
        Err(error) => {
            ploop_testing::skip(ploop_testing::Need::Program("qemu-img"), format!("qemu-img: {error}"))
        }
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let theirs: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            let plain = |extent: &Value| {
                let mut extent = extent.clone();
                extent.as_object_mut().expect("an object").remove("filename");
                extent
            };
            let ours: Vec<Value> = extents.iter().map(plain).collect();
            let theirs: Vec<Value> = theirs.as_array().expect("a list").iter().map(plain).collect();
            assert_eq!(ours, theirs);
        }
    }
}

#[test]
fn a_chain_is_mapped_with_depths_and_its_top_compacted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = holed(folder.path());
    let before = json(&["--json", "map", text(&path)]);
    let made = snapshot(folder.path(), &SnapshotOptions::default(), Duration::from_secs(60), &Silent)
        .expect("snapshot");
    let (top, disk) = (folder.path().join(&made.top_file), text(folder.path()));
    let opened = open(&OpenOptions::new(folder.path(), Access::ReadWrite)).expect("open");
    let served = Disk::open(opened.chain, DiskOptions::default()).expect("serve");
    let mut client = Client::new(&served, best_io_queue(8).expect("a queue")).expect("a client");
    client.write(MIB, &[9; 4096]).expect("write");
    drop(client);
    served.close().expect("close");
    drop(served);
    let map = json(&["--json", "map", disk]);
    let at = |start: u64| {
        let extents = map.as_array().expect("a list");
        let holds = |extent: &&Value| {
            let (first, length) = (extent["start"].as_u64(), extent["length"].as_u64());
            first.zip(length).is_some_and(|(first, length)| (first..first + length).contains(&start))
        };
        extents.iter().find(holds).expect("an extent").clone()
    };
    let name = |extent: &Value| extent["filename"].as_str().map(str::to_owned);
    assert_eq!((&at(MIB)["depth"], name(&at(MIB))), (&Value::from(0), Some(top.display().to_string())));
    assert_eq!(
        (&at(3 * MIB)["depth"], name(&at(3 * MIB))),
        (&Value::from(1), Some(path.display().to_string()))
    );
    assert_eq!((&at(0)["present"], &at(0)["depth"]), (&Value::Bool(false), &Value::from(1)));
    assert_eq!(json(&["--json", "map", "-u", &made.snapshot.to_string(), disk]), before);
    ploop(&["map", "-u", "{00000000-0000-4000-8000-000000000001}", disk]).failed_with(43, &[]);
    // Only the top is touched.
    let base = std::fs::read(&path).expect("read");
    let report = json(&["--json", "compact", disk]);
    assert_eq!(report["image"].as_str(), Some(text(&top)));
    assert!(std::fs::read(&path).expect("read") == base);
}
