//! Disks of other programs: bundles as Parallels Desktop leaves them, and broken descriptors of containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{ploop, stage};

const NIL: &str = "{00000000-0000-0000-0000-000000000000}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const BASE: &str = "{11111111-1111-4111-8111-111111111111}";
const SIDE: &str = "{22222222-2222-4222-8222-222222222222}";
/// Bytes of a cluster.
const CLUSTER: usize = 32768;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Clusters of a disk: 0 for a hole, else filled with a pattern of this number.
fn content(clusters: &[u8]) -> Vec<u8> {
    let byte = |tag: u8, at: usize| match (tag, at % 2) {
        (0, _) => 0,
        (tag, 0) => tag,
        _ => u8::try_from(at / 512).unwrap(),
    };
    let fill = |tag: &u8| (0..CLUSTER).map(|at| byte(*tag, at)).collect();
    clusters.iter().flat_map(|tag| -> Vec<u8> { fill(tag) }).collect()
}

/// An image file with this content.
fn image(folder: &Path, name: &str, clusters: &[u8]) {
    image_of(folder, name, &content(clusters));
}

fn image_of(folder: &Path, name: &str, bytes: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    let raw = work.path().join("raw");
    fs::write(&raw, bytes).unwrap();
    fs::create_dir(work.path().join("disk")).unwrap();
    let made = work.path().join("disk/made");
    ploop(&["import", "-b", "64", text(&raw), text(&made)]).succeeded();
    fs::create_dir_all(folder).unwrap();
    fs::copy(made, folder.join(name)).unwrap();
}

fn storage(start: usize, end: usize, images: &[(&str, &str)]) -> String {
    let images: String = images
        .iter()
        .map(|(guid, file)| {
            format!("<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>{file}</File></Image>")
        })
        .collect();
    format!(
        "<Storage><Start>{}</Start><End>{}</End><Blocksize>64</Blocksize>{images}</Storage>",
        start * 64,
        end * 64
    )
}

/// The bundle `folder` as the program leaves it, with the empty file that bears its name.
fn bundle(folder: &Path, clusters: usize, parameters: &str, storages: &str, shots: &[(&str, &str)]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(folder.file_name().unwrap()), b"").unwrap();
    let shots: String = shots
        .iter()
        .map(|(guid, parent)| format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"))
        .collect();
    let descriptor = format!(
        "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\"><Disk_Parameters><Disk_size>{}</Disk_size>\
         <LogicSectorSize>512</LogicSectorSize><Padding>0</Padding>{parameters}</Disk_Parameters><StorageData>{storages}\
         </StorageData><Snapshots>{shots}</Snapshots></Parallels_disk_image>\n",
        clusters * 64
    );
    fs::write(folder.join("DiskDescriptor.xml"), &descriptor).unwrap();
    fs::write(folder.join("DiskDescriptor.xml.Backup"), descriptor).unwrap();
}

fn single(folder: &Path, parameters: &str, file: &str) {
    image(folder, "disk.hds", &[1, 0, 2, 3]);
    bundle(folder, 4, parameters, &storage(0, 4, &[(TOP, file)]), &[(TOP, NIL)]);
}

/// Everything in a folder: names and bytes.
fn state(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(&path).unwrap_or_default()))
        .collect();
    found.sort();
    found
}

/// A split disk of two parts with a snapshot in each; the content of the current state and of the snapshot.
fn split(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    image(folder, "0.base", &[1, 2, 0]);
    image(folder, "0.top", &[0, 9, 0]);
    image(folder, "1.base", &[4, 0]);
    image(folder, "1.top", &[0, 8]);
    let part =
        |start, end, n| storage(start, end, &[(BASE, &format!("{n}.base")), (TOP, &format!("{n}.top"))]);
    bundle(folder, 5, "", &(part(0, 3, 0) + &part(3, 5, 1)), &[(BASE, NIL), (TOP, BASE)]);
    (content(&[1, 9, 0, 4, 8]), content(&[1, 2, 0, 4, 0]))
}

#[test]
fn a_split_disk_is_read_as_one_and_never_written() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("split.hdd");
    let (now, before) = split(&disk);
    let was = state(&disk);
    let out = |name: &str| place.path().join(name);

    ploop(&["export", text(&disk), text(&out("now.raw"))]).succeeded();
    assert!(fs::read(out("now.raw")).unwrap() == now);
    ploop(&["export", "-u", BASE, text(&disk), text(&out("before.raw"))]).succeeded();
    assert!(fs::read(out("before.raw")).unwrap() == before);
    let info = ploop(&["--json", "info", text(&disk)]).succeeded();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["storages"], &info["disk_bytes"]), (&2.into(), &(now.len() as u64).into()));
    assert_eq!(info["images"].as_array().unwrap().len(), 4);
    let listed = ploop(&["--json", "snapshot-list", text(&disk)]).succeeded();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let text_of = listed.to_string();
    assert!(text_of.contains(BASE) && text_of.contains(&format!(":{}", now.len())), "{text_of}");
    let checked = ploop(&["check", "-f", text(&disk)]);
    assert!(checked.stdout.contains("split into 2"), "{}", checked.stdout);
    checked.succeeded();
    assert_eq!(state(&disk), was, "something was written by reading");

    // A disk of one image of it.
    let new = place.path().join("new/");
    ploop(&["import", "-b", "64", text(&disk), &format!("{}/", text(&new).trim_end_matches('/'))])
        .succeeded();
    ploop(&["check", "-f", text(&new)]).succeeded();
    ploop(&["export", text(&new), text(&out("new.raw"))]).succeeded();
    assert!(fs::read(out("new.raw")).unwrap() == now);
    ploop(&["import", "-u", BASE, "-b", "64", text(&disk), &format!("{}/", text(&out("old")))]).succeeded();
    ploop(&["export", text(&out("old")), text(&out("old.raw"))]).succeeded();
    assert!(fs::read(out("old.raw")).unwrap() == before);
    // A copy of the closed disk, as an image with its own header.
    ploop(&["copy", "-s", text(&disk), "-d", text(&out("copy.hds"))]).succeeded();
    ploop(&["export", text(&out("copy.hds")), text(&out("copy.raw"))]).succeeded();
    assert!(fs::read(out("copy.raw")).unwrap()[..now.len()] == now);

    for refused in [
        &["snapshot", text(&disk)][..],
        &["resize", "-s", "64K", text(&disk)],
        &["convert", "-f", "raw", text(&disk)],
        &["compact", text(&disk)],
        &["snapshot-merge", text(&disk)],
        &["check", "--repair", text(&disk)],
        &["mount", text(&disk)],
        &["snapshot-delete", "-u", BASE, text(&disk)],
    ] {
        ploop(refused).failed_with(39, &["split into 2", "ploop import"]);
    }
    ploop(&["export", text(&disk.join("0.top")), text(&out("part"))])
        .failed_with(38, &["one of several", "DiskDescriptor.xml"]);
    assert_eq!(
        state(&disk)
            .iter()
            .filter(|(path, _)| !path.ends_with("DiskDescriptor.xml.lck"))
            .cloned()
            .collect::<Vec<_>>(),
        was
    );
}

#[test]
fn a_split_disk_whose_parts_do_not_fit_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("split.hdd");
    image(&disk, "a", &[1, 2]);
    image(&disk, "b", &[3]);
    let out = place.path().join("out.raw");
    // The first image is one cluster shorter than its range.
    bundle(&disk, 4, "", &(storage(0, 3, &[(TOP, "a")]) + &storage(3, 4, &[(TOP, "b")])), &[(TOP, NIL)]);
    ploop(&["export", text(&disk), text(&out)]).failed_with(39, &["192 sectors", "128", "advice"]);
    let checked = ploop(&["check", "-f", text(&disk)]);
    assert_eq!(checked.code, 38, "{}{}", checked.stdout, checked.stderr);
    for (storages, why) in [
        (storage(0, 2, &[(TOP, "a")]) + &storage(3, 4, &[(TOP, "b")]), "a gap"),
        (storage(0, 3, &[(TOP, "a")]) + &storage(2, 4, &[(TOP, "b")]), "an overlap"),
        (storage(0, 2, &[(TOP, "a")]) + &storage(2, 3, &[(TOP, "b")]), "<Disk_size>"),
    ] {
        bundle(&disk, 4, "", &storages, &[(TOP, NIL)]);
        for command in
            [&["export", text(&disk), text(&out)][..], &["info", text(&disk)], &["check", text(&disk)]]
        {
            ploop(command).failed_with(39, &[why, "advice"]);
        }
    }
    assert!(!out.exists());
}

#[test]
fn a_split_disk_is_mounted_read_only() {
    let Some(stage) = stage() else { return };
    let (disk, raw) = (stage.path("split.hdd"), stage.path("fs.raw"));
    fs::write(&raw, vec![0; 256 * CLUSTER]).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-L", "joined"]).arg(&raw).status();
    if !made.is_ok_and(|status| status.success()) {
        ploop_testing::skip(ploop_testing::Need::Other, "no mkfs.ext4");
        return;
    }
    let bytes = fs::read(&raw).unwrap();
    let (first, second) = bytes.split_at(100 * CLUSTER);
    image_of(&disk, "a", first);
    image_of(&disk, "b", second);
    let storages = storage(0, 100, &[(TOP, "a")]) + &storage(100, 256, &[(TOP, "b")]);
    bundle(&disk, 256, "", &storages, &[(TOP, NIL)]);
    let was = state(&disk);
    let mounted = stage.mount(&disk, &["-r"]);
    assert!(mounted.point.join("lost+found").is_dir());
    assert!(fs::write(mounted.point.join("x"), b"x").is_err());
    let listed = stage.ploop(&["list"]).succeeded();
    assert!(listed.contains("split.hdd/DiskDescriptor.xml"), "{listed}");
    stage.umount(&mounted);
    // A mounted file system changes the kernel's view of the device even read-only.
    let printed = stage.ploop(&["mount", "-r", text(&disk)]).succeeded();
    let device = printed.split_whitespace().last().unwrap();
    // A successor opens the same parts.
    let listed = stage.ploop(&["--json", "list"]).succeeded();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let server = listed["disks"][0]["server"].to_string();
    assert!(Command::new("kill").args(["-9", &server]).status().unwrap().success());
    let seen = fs::read(device).unwrap();
    stage.ploop(&["umount", "-d", device]).succeeded();
    assert!(seen == bytes, "the device does not show the disk");
    assert!(state(&disk) == was);
}

#[test]
fn encryption_is_said_and_its_bytes_are_no_content() {
    for parameters in [
        "<Encryption><Engine>{a6d3ac3e-7d1c-4b2e-9f1e-2f4f9a1b0c11}</Engine><Data>AAEC</Data></Encryption>",
        "<Encryption><KeyId>secret-1</KeyId></Encryption>",
    ] {
        let place = tempfile::tempdir().unwrap();
        let disk = place.path().join("disk.hdd");
        single(&disk, parameters, "disk.hds");
        let (path, out) = (text(&disk), place.path().join("o.raw"));
        assert!(ploop(&["info", path]).succeeded().contains("encrypted"));
        assert!(ploop(&["check", "-r", "-f", path]).succeeded().contains("encrypted"));
        let new = format!("{}/", text(&place.path().join("new")));
        let mount_point = text(place.path());
        for refused in [
            &["export", path, text(&out)][..],
            &["export", path, "-"],
            &["import", path, &new],
            &["resize", "-s", "1M", path],
            &["mount", "-m", mount_point, path],
            &["mount", "-F", path],
        ] {
            ploop(refused).failed_with(38, &["encrypted", "advice"]);
        }
        assert!(!out.exists());
        ploop(&["export", "--ciphertext", path, text(&out)]).succeeded();
        assert!(fs::read(&out).unwrap() == content(&[1, 0, 2, 3]));
        let copied = ploop(&["copy", "-s", path, "-d", text(&place.path().join("copy.hds"))]);
        assert!(copied.stderr.contains("keep the descriptor"), "{}", copied.stderr);
        // Kept when the descriptor is written anew.
        ploop(&["snapshot", path]).succeeded();
        let descriptor = fs::read_to_string(disk.join("DiskDescriptor.xml")).unwrap();
        assert!(
            descriptor.contains("a6d3ac3e") && descriptor.contains("AAEC") || descriptor.contains("secret-1")
        );
    }
}

#[test]
fn a_moved_bundle_and_a_linked_clone() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("o.raw");
    let moved = place.path().join("moved.hdd");
    single(&moved, "", "/Users/Shared/Win.pvm/disk.hdd/disk.hds");
    let exported = ploop(&["export", text(&moved), text(&out)]);
    assert!(exported.stderr.contains("Users") && exported.stderr.contains("warning"), "{}", exported.stderr);
    exported.succeeded();
    assert!(fs::read(&out).unwrap() == content(&[1, 0, 2, 3]));
    fs::remove_file(&out).unwrap();

    let (parent, clone) = (place.path().join("vm/parent.hdd"), place.path().join("vm/clone.hdd"));
    image(&parent, "disk.hds", &[1, 2, 0]);
    image(&clone, "top.hds", &[0, 9, 0]);
    for named in
        ["../parent.hdd/disk.hds", "/elsewhere/parent.hdd/disk.hds", &format!("{}/disk.hds", text(&parent))]
    {
        bundle(
            &clone,
            3,
            "",
            &storage(0, 3, &[(BASE, named), (TOP, "top.hds")]),
            &[(BASE, NIL), (TOP, BASE)],
        );
        for command in [
            &["export", text(&clone), text(&out)][..],
            &["info", text(&clone)],
            &["mount", "-r", text(&clone)],
        ] {
            ploop(command).failed_with(39, &["--allow-parent"]);
        }
        let wrong = place.path();
        ploop(&["export", "--allow-parent", text(&clone), text(&clone), text(&out)])
            .failed_with(4, &["--allow-parent"]);
        ploop(&["export", "--allow-parent", text(&parent), text(&clone), text(&out)]).succeeded();
        assert!(fs::read(&out).unwrap() == content(&[1, 9, 0]), "{named}");
        fs::remove_file(&out).unwrap();
        assert!(
            ploop(&["info", "--allow-parent", text(&parent), text(&clone)]).succeeded().contains("disk.hds")
        );
        ploop(&["mount", "--allow-parent", text(&parent), text(&clone)]).failed_with(38, &["--allow-parent"]);
        let new = format!("{}/new{}", text(wrong), named.len());
        ploop(&["import", "-b", "64", "--allow-parent", text(&parent), text(&clone), &format!("{new}/")])
            .succeeded();
        ploop(&["export", &new, text(&out)]).succeeded();
        assert!(fs::read(&out).unwrap() == content(&[1, 9, 0]));
        fs::remove_file(&out).unwrap();
    }
    // A link in the allowed folder leads nowhere.
    fs::rename(parent.join("disk.hds"), place.path().join("secret")).unwrap();
    symlink(place.path().join("secret"), parent.join("disk.hds")).unwrap();
    assert_ne!(ploop(&["export", "--allow-parent", text(&parent), text(&clone), text(&out)]).code, 0);
    assert!(!out.exists());
}

#[test]
fn a_suspended_machine_is_told() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.hdd");
    single(&disk, "<Miscellaneous><SuspendState>1</SuspendState></Miscellaneous>", "disk.hds");
    assert!(ploop(&["info", text(&disk)]).stderr.contains("suspended"));
    let machine = place.path().join("win.pvm");
    single(&machine.join("disk.hdd"), "", "disk.hds");
    assert!(!ploop(&["info", text(&machine)]).stderr.contains("suspended"));
    fs::write(machine.join("{0}.mem"), b"").unwrap();
    let exported = ploop(&["export", text(&machine), text(&place.path().join("o.raw"))]);
    assert!(exported.stderr.contains("suspended"), "{}", exported.stderr);
    exported.succeeded();
}

#[test]
fn other_names_of_a_disk_are_followed() {
    let place = tempfile::tempdir().unwrap();
    let machine = place.path().join("win.pvm");
    let disk = machine.join("disk.hdd");
    single(&disk, "", "disk.hds");
    let out = place.path().join("o.raw");
    for name in [machine.clone(), disk.join("disk.hdd"), disk.clone()] {
        ploop(&["export", text(&name), text(&out)]).succeeded();
        assert!(fs::read(&out).unwrap() == content(&[1, 0, 2, 3]));
        fs::remove_file(&out).unwrap();
        ploop(&["info", text(&name)]).succeeded();
        ploop(&["check", "-r", "-f", text(&name)]).succeeded();
        ploop(&["snapshot-list", text(&name)]).succeeded();
    }
    single(&machine.join("second.hdd"), "", "disk.hds");
    ploop(&["info", text(&machine)]).failed_with(38, &["2 disks", "second.hdd", "advice"]);
    // The other Unicode form of a name.
    let cafe = place.path().join("cafe.hdd");
    single(&cafe, "", "caf\u{e9}.hds");
    fs::rename(cafe.join("disk.hds"), cafe.join("cafe\u{301}.hds")).unwrap();
    ploop(&["export", text(&cafe), text(&out)]).succeeded();
    // A newline in a path stays out of what people read.
    let odd = place.path().join("a\nb\u{1b}[2J");
    single(&odd, "", "disk.hds");
    let shown = ploop(&["info", text(&odd)]).succeeded();
    assert!(shown.contains("a\\nb\\u{1b}[2J") && !shown.contains('\u{1b}'), "{shown}");
}

#[test]
fn files_by_hand_are_held_against_the_descriptor_beside_them() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.hdd");
    image(&disk, "base", &[1, 2, 0]);
    image(&disk, "middle", &[0, 3, 0]);
    image(&disk, "top", &[0, 0, 4]);
    let images = storage(0, 3, &[(BASE, "base"), (SIDE, "middle"), (TOP, "top")]);
    bundle(&disk, 3, "", &images, &[(BASE, NIL), (SIDE, BASE), (TOP, SIDE)]);
    let out = place.path().join("o.raw");
    let export = |files: &[&str]| {
        let files: Vec<PathBuf> = files.iter().map(|file| disk.join(file)).collect();
        let mut line = vec!["export"];
        line.extend(files.iter().map(|file| text(file)));
        line.push(text(&out));
        ploop(&line)
    };
    for wrong in
        [&["top", "middle", "base"][..], &["base", "top", "middle"], &["base", "top"], &["middle", "top"]]
    {
        export(wrong).failed_with(38, &["base first: base"]);
        assert!(!out.exists());
    }
    for (right, expected) in [(&["base", "middle", "top"][..], [1, 3, 4]), (&["base", "middle"], [1, 3, 0])] {
        export(right).succeeded();
        assert!(fs::read(&out).unwrap() == content(&expected));
        fs::remove_file(&out).unwrap();
    }
    // A descriptor that makes no sense says nothing: by hand is the way out.
    fs::write(disk.join("DiskDescriptor.xml"), b"<broken").unwrap();
    export(&["base", "middle", "top"]).succeeded();
}

#[test]
fn a_dead_snapshot_is_told_and_dropped_behind_a_copy() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.hdd");
    image(&disk, "base", &[1, 2, 0]);
    image(&disk, "top", &[0, 9, 0]);
    let shots = [(BASE, NIL), (SIDE, BASE), (TOP, BASE)];
    bundle(&disk, 3, "", &storage(0, 3, &[(BASE, "base"), (TOP, "top")]), &shots);
    let was = fs::read(disk.join("DiskDescriptor.xml")).unwrap();
    let (path, out) = (text(&disk), place.path().join("o.raw"));
    let exported = ploop(&["export", path, text(&out)]);
    assert!(
        exported.stderr.contains(SIDE) && exported.stderr.contains("snapshot-delete"),
        "{}",
        exported.stderr
    );
    exported.succeeded();
    assert!(fs::read(&out).unwrap() == content(&[1, 9, 0]));
    assert!(ploop(&["check", "-r", "-f", path]).succeeded().contains(SIDE));
    ploop(&["export", "-u", SIDE, path, text(&place.path().join("x"))]).failed_with(43, &[SIDE]);
    ploop(&["snapshot", path]).failed_with(39, &[SIDE, "snapshot-delete", "advice"]);
    ploop(&["snapshot-merge", path]).failed_with(39, &[SIDE]);
    assert_eq!(
        fs::read(disk.join("DiskDescriptor.xml")).unwrap(),
        was,
        "a refused command has changed nothing"
    );

    let told = ploop(&["snapshot-delete", "-u", SIDE, path]).succeeded();
    let copy = told.split_whitespace().find(|word| word.starts_with("DiskDescriptor.xml.saved.")).unwrap();
    assert_eq!(fs::read(disk.join(copy)).unwrap(), was);
    ploop(&["snapshot-delete", "-u", SIDE, path]).failed_with(43, &[]);
    ploop(&["snapshot", path]).succeeded();
    let checked = ploop(&["check", "-f", path]).succeeded();
    assert!(!checked.contains(SIDE) && disk.join(copy).exists(), "{checked}");
}

#[test]
fn names_decide_what_is_written_and_read() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.hdd");
    single(&disk, "", "disk.hds");
    let file = |name: &str| place.path().join(name);
    let raw = ploop(&["export", "--format", "raw", text(&disk), text(&file("o.qcow2"))]);
    assert!(raw.stderr.contains("its name says qcow2"), "{}", raw.stderr);
    raw.succeeded();
    // What it is called or begins with is not taken for the bytes of a disk.
    let new = |number: u32| format!("{}/", text(&file(&format!("new{number}"))));
    ploop(&["import", text(&file("o.qcow2")), &new(1)]).failed_with(38, &["qcow2", "--format"]);
    fs::write(file("unnamed"), [b"QFI\xfb".as_slice(), &[0; 4096]].concat()).unwrap();
    ploop(&["import", text(&file("unnamed")), &new(2)]).failed_with(38, &["qcow2", "--format raw"]);
    ploop(&["import", text(&disk.join("disk.hds")), &new(3)])
        .failed_with(38, &["ploop", "DiskDescriptor.xml"]);
    ploop(&["import", "--format", "raw", text(&file("unnamed")), &new(4)]).succeeded();
    for refused in 1..=3 {
        assert!(!Path::new(&new(refused)).exists(), "a refused import has made a folder");
    }
    let copied = ploop(&["copy", "-s", text(&disk), "-d", text(&file("copy.vmdk"))]);
    assert!(copied.stderr.contains("its name says vmdk"), "{}", copied.stderr);
    copied.succeeded();
    fs::remove_file(disk.join("DiskDescriptor.xml")).unwrap();
    ploop(&["info", text(&disk)]).failed_with(39, &["DiskDescriptor.xml.Backup"]);
    fs::copy(disk.join("DiskDescriptor.xml.Backup"), disk.join("DiskDescriptor.xml")).unwrap();
    for command in [
        &["copy", "-s", text(&disk), "-d", "/dev/no-such-device"][..],
        &["copy", "-d", "/dev/no-such-device"],
        &["export", text(&disk), "/dev/no-such-device"],
        &["import", text(&file("o.qcow2")), "--format", "raw", "/dev/no-such-device"],
    ] {
        ploop(command).failed_with(2, &["/dev/no-such-device", "advice"]);
        assert!(!Path::new("/dev/no-such-device").exists());
    }
    let other = ploop(&["check", "/etc/passwd"]);
    other.failed_with(38, &["not a disk image"]);
    assert!(!other.stderr.contains("--repair") && !other.stdout.contains("DAMAGED"));
}

#[test]
fn usage_errors_and_skipped_images_in_json() {
    for line in [&["--json", "frobnicate"][..], &["export", "--json"], &["--json", "resize", "-s", "x", "y"]]
    {
        let ran = ploop(line);
        assert_eq!((ran.code, ran.stderr.lines().count()), (38, 1), "{}", ran.stderr);
        let told: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(told["error"]["exit_code"], 38, "{told}");
    }
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.hdd");
    single(&disk, "", "disk.hds");
    let report =
        |line: &[&str]| -> serde_json::Value { serde_json::from_str(&ploop(line).succeeded()).unwrap() };
    let skipped = &report(&["--json", "check", "-r", text(&disk)])["images"][0];
    assert_eq!(skipped["outcome"], "skipped");
    assert!(skipped.get("allocated_clusters").is_none() && skipped.get("fragments").is_none(), "{skipped}");
    assert_eq!(report(&["--json", "check", "-r", "-f", text(&disk)])["images"][0]["allocated_clusters"], 3);
}
