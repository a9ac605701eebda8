//! Disks in other forms: convert, export, import, restore-descriptor, as scripts meet them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::{command, ploop, stage};

/// 5 MiB and a bit, with data here and there.
fn input() -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + 77];
    bytes[10_000..400_000].fill(1);
    bytes[3 << 20..(3 << 20) + 9].fill(2);
    let end = bytes.len();
    bytes[end - 1] = 3;
    bytes
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_disk_goes_through_every_form_and_comes_out_the_same() {
    let place = tempfile::tempdir().unwrap();
    let (raw, folder) = (place.path().join("input.raw"), place.path().join("disk"));
    fs::write(&raw, input()).unwrap();
    fs::create_dir(&folder).unwrap();
    let disk = text(&folder);
    let made = ploop(&["--json", "import", "-b", "128", &text(&raw), &disk]).succeeded();
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    assert_eq!(
        (made["input_bytes"].as_u64(), made["cluster_bytes"].as_u64()),
        (Some(5_242_957), Some(65_536))
    );
    for line in [
        &["-v", "1"][..],
        &["-b", "64"],
        &["-f", "preallocated"],
        &["-f", "raw"],
        &["-f", "expanded", "-b", "128"],
    ] {
        let ran = ploop(&[&["--json", "convert"][..], line, &[&*disk]].concat());
        assert!(ran.events().iter().any(|event| event["event"] == "phase_ended"), "{}", ran.stderr);
        let report: serde_json::Value = serde_json::from_str(&ran.succeeded()).unwrap();
        assert_eq!(report["images"].as_array().unwrap().len(), 1, "{line:?}");
        let exported = command(&["export", &disk, "-"]).output().unwrap();
        assert!(exported.status.success(), "{line:?}");
        assert!(exported.stdout.starts_with(&input()), "{line:?}");
        assert!(exported.stdout[input().len()..].iter().all(|&byte| byte == 0), "{line:?}");
    }
    // From a pipe, of a length nobody knows.
    fs::create_dir(place.path().join("other")).unwrap();
    let mut export = command(&["export", &disk, "-"]).stdout(Stdio::piped()).spawn().unwrap();
    let target = text(&place.path().join("other/root.hds"));
    let import = command(&["import", "-", &target]).stdin(export.stdout.take().unwrap()).output().unwrap();
    assert!(import.status.success() && export.wait().unwrap().success());
    let out = text(&place.path().join("out.raw"));
    ploop(&["export", &target, &out]).succeeded();
    assert!(fs::read(&out).unwrap().starts_with(&input()));
}

/// A disk that does not fill its clusters keeps its size, and the second copy of its partition table its place.
#[test]
fn a_size_is_kept_to_the_sector() {
    let place = tempfile::tempdir().unwrap();
    let raw = place.path().join("odd.raw");
    fs::write(&raw, [7; 512].repeat(20_003)).unwrap();
    let disk = place.path().join("disk");
    fs::create_dir(&disk).unwrap();
    ploop(&["import", &text(&raw), &text(&disk.join("root.hds"))]).succeeded();
    for cluster in ["32768", "64"] {
        ploop(&["convert", "-b", cluster, &text(&disk)]).succeeded();
        let out = place.path().join(cluster);
        ploop(&["export", &text(&disk), &text(&out)]).succeeded();
        assert!(fs::read(&out).unwrap() == fs::read(&raw).unwrap());
    }
    let rounded = place.path().join("rounded");
    fs::create_dir(&rounded).unwrap();
    ploop(&["import", "--round", &text(&raw), &text(&rounded.join("root.hds"))]).succeeded();
    assert!(ploop(&["info", "-s", &text(&rounded.join("root.hds"))]).succeeded().contains("size:\t\t20480"));
}

#[test]
fn exit_codes_of_what_cannot_be() {
    let place = tempfile::tempdir().unwrap();
    let disk = text(place.path());
    ploop(&["init", "-s", "8M", "-t", "none", &text(&place.path().join("root.hds"))]).succeeded();
    ploop(&["convert", "-b", "100", &disk]).failed_with(38, &["power of two"]);
    ploop(&["convert", "-v", "1", &text(&place.path().join("root.hds"))])
        .failed_with(38, &["DiskDescriptor.xml"]);
    ploop(&["convert", "-v", "1", "/nonexistent"]).failed_with(4, &["/nonexistent"]);
    ploop(&["import", "/nonexistent", &text(&place.path().join("x"))]).failed_with(4, &["/nonexistent"]);
    ploop(&["export", "-u", "{00000001-aaaa-bbbb-cccc-000000000009}", &disk, &text(&place.path().join("y"))])
        .failed_with(43, &["no snapshot"]);
    ploop(&["export", "--format", "qcow2", &disk, "-"]).failed_with(38, &["pipe"]);
    ploop(&["restore-descriptor", &disk, "root.hds"]).failed_with(1, &["there is one"]);
}

#[test]
fn options_of_other_formats_that_name_files_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let disk = text(place.path());
    ploop(&["init", "-s", "8M", "-t", "none", &text(&place.path().join("root.hds"))]).succeeded();
    let target = text(&place.path().join("disk.other"));
    for (format, options, said) in [
        ("qcow2", &["-o", "backing_file=/etc/passwd"][..], "cluster_size"),
        ("qcow2", &["-o", "cluster_size=64K,data_file=x"], "data_file"),
        ("qcow2", &["-o", "cluster_size=64K,,data_file=x"], "no option"),
        ("qcow2", &["-o", "compat=7"], "0.10, 1.1"),
        ("vmdk", &["-o", "subformat=twoGbMaxExtentFlat"], "streamOptimized"),
        ("vdi", &["-c"], "not compressed"),
        ("raw", &["-o", "preallocation=full"], "leave -o out"),
        ("raw", &["--compress"], "not compressed"),
    ] {
        let line = [&["export", "--format", format], options, &[&disk, &target]].concat();
        ploop(&line).failed_with(38, &[said, "advice"]);
    }
    assert!(!Path::new(&target).exists());
}

#[test]
fn options_reach_qemu_img_and_what_was_left_over_goes() {
    let Some(stage) = stage() else { return };
    if Command::new("qemu-img").arg("--version").output().is_err() {
        ploop_testing::skip(ploop_testing::Need::Program("qemu-img"), "qemu-img is not installed");
        return;
    }
    let source = text(&stage.path("input"));
    fs::write(&source, vec![0x5A; 4 << 20]).unwrap();
    let disk = stage.path("disk");
    fs::create_dir(&disk).unwrap();
    stage.ploop(&["import", &source, &text(&disk)]).succeeded();
    let info = |target: &Path| -> Value {
        let told = Command::new("qemu-img").args(["info", "--output=json"]).arg(target).output().unwrap();
        serde_json::from_slice(&told.stdout).unwrap()
    };
    let target = stage.path("disk.qcow2");
    let left = stage.path("disk.qcow2.tmp.0123456789abcdef0123456789abcdef");
    fs::write(&left, "half").unwrap();
    let line = [
        "export",
        "--format",
        "qcow2",
        "-c",
        "-o",
        "cluster_size=128K,compat=v2",
        &text(&disk),
        &text(&target),
    ];
    stage.ploop(&line).succeeded();
    assert!(!left.exists(), "a left-over of the same file goes");
    let told = info(&target);
    assert_eq!((&told["cluster-size"], &told["format"]), (&Value::from(131_072), &Value::from("qcow2")));
    assert_eq!(told["format-specific"]["data"]["compat"], "0.10");
    assert!(fs::metadata(&target).unwrap().len() < 1 << 20, "it is compressed");
    let target = stage.path("disk.vmdk");
    let line =
        ["export", "--format", "vmdk", "-c", "-o", "subformat=streamOptimized", &text(&disk), &text(&target)];
    stage.ploop(&line).succeeded();
    assert_eq!(info(&target)["format-specific"]["data"]["create-type"], "streamOptimized");
    // What does not fit is told by qemu-img, and there is no file.
    let target = stage.path("wrong.qcow2");
    let line = ["export", "--format", "qcow2", "-o", "refcount_bits=3", &text(&disk), &text(&target)];
    stage.ploop(&line).failed_with(12, &["qemu-img failed"]);
    assert!(!target.exists());
    // The same for raw files; what somebody is writing stays.
    let target = stage.path("disk.raw");
    let left = stage.path("disk.raw.tmp.01234567-89ab-cdef-0123-456789abcdef");
    fs::write(&left, "half").unwrap();
    stage.ploop(&["export", &text(&disk), &text(&target)]).succeeded();
    assert!(!left.exists() && fs::read(&target).unwrap() == fs::read(&source).unwrap());
}

/// Without `qemu-img` the other formats say what is missing, and nothing is made.
#[test]
fn a_missing_program_is_named() {
    let place = tempfile::tempdir().unwrap();
    ploop(&["init", "-s", "8M", "-t", "none", &text(&place.path().join("root.hds"))]).succeeded();
    let target = place.path().join("disk.qcow2");
    let ran = command(&["export", "--format", "qcow2", &text(place.path()), &text(&target)])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(12));
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(said.contains("qemu-img") && said.contains("raw files"), "{said}");
    assert!(!target.exists());
}

#[test]
fn files_that_stand_on_others_are_not_imported() {
    let Some(stage) = stage() else { return };
    let (base, top) = (text(&stage.path("base.qcow2")), text(&stage.path("top.qcow2")));
    let create =
        |line: &[&str]| Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).args(line).status();
    if !create(&[&base, "8M"]).is_ok_and(|status| status.success()) {
        ploop_testing::skip(ploop_testing::Need::Program("qemu-img"), "qemu-img is not installed");
        return;
    }
    assert!(create(&["-b", &base, "-F", "qcow2", &top]).unwrap().success());
    let target = stage.path("disk");
    fs::create_dir(&target).unwrap();
    stage.ploop(&["import", "--format", "qcow2", &top, &text(&target)]).failed_with(38, &["in others"]);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    stage.ploop(&["import", "--format", "qcow2", &base, &text(&target)]).succeeded();
    // While it is mounted it is not converted, nor exported.
    let device = stage.ploop(&["mount", &text(&target)]).succeeded();
    stage.ploop(&["convert", "-v", "1", &text(&target)]).failed_with(37, &["open"]);
    stage.ploop(&["export", &text(&target), &text(&stage.path("out"))]).failed_with(37, &["open"]);
    stage.ploop(&["umount", "-d", device.trim()]).succeeded();
    stage.ploop(&["convert", "-v", "1", &text(&target)]).succeeded();
}
