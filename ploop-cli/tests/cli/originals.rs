//! Files of the original ploop, served and received by the command. They lie in a folder beside the project; where it
//! is absent the tests are skipped.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::stage::{Reaped, Stage};
use crate::support::stage;

/// Bundle, bytes of its disk, their SHA-256.
const BUNDLES: [(&str, u64, &str); 6] = [
    ("v1-1m", 20 << 20, "27ddfef377ecc9aa21db6b70f36535d3a7edc9fdc2691d6afb718487881549a3"),
    ("v2-32k", 8 << 20, "09c16530de0af86a0459a056f08bc1c665a6ef405bec2cff3a6eb95c47ad0d05"),
    ("v2-prealloc", 8 << 20, "8727c427324a7a6a1a4fbfe7654ad7fa78ff353beb66d509efe03672e7b21a51"),
    ("raw", 16 << 20, "497ddfe9525d81324d9ca2d28f523be0c0ee741630d548af1ad0aa824862d954"),
    ("chain-v2", 20 << 20, "be7a4ccf5b88fade3dd4a14e99c9a61731a4cd1f5eae30c27b5c1d49183c5c93"),
    ("merged-v2", 20 << 20, "be7a4ccf5b88fade3dd4a14e99c9a61731a4cd1f5eae30c27b5c1d49183c5c93"),
];

/// A file of the original, or `None` with a word about it where there is none.
fn original(name: &str) -> Option<PathBuf> {
    // Beside the project; a checkout of a branch lies one folder deeper.
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().skip(2).take(2);
    let found = above.map(|folder| folder.join("shared/golden").join(name)).find(|path| path.exists());
    if found.is_none() {
        ploop_testing::skip(ploop_testing::Need::Other, format!("{name} of the original is not here"));
    }
    found
}

/// Unpacks a bundle and gives its folder.
fn unpack(stage: &Stage, name: &str) -> Option<PathBuf> {
    let archive = original(&format!("{name}.tar.zst"))?;
    let mut tar = Command::new("tar");
    match tar.arg("--zstd").arg("-xf").arg(&archive).arg("-C").arg(stage.path("")).status() {
        Ok(status) if status.success() => Some(stage.path(name)),
        other => {
            ploop_testing::skip(
                ploop_testing::Need::Program("zstd"),
                format!("tar with zstd is needed to unpack {name}: {other:?}"),
            );
            None
        }
    }
}

/// SHA-256 of everything that a file or device holds, and its length.
fn sha256(path: &Path) -> (String, u64) {
    let mut file = fs::File::open(path).expect("open what is to be summed up");
    let mut sum = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run sha256sum of coreutils");
    let mut input = sum.stdin.take().expect("a pipe");
    let bytes = std::io::copy(&mut file, &mut input).expect("read what is to be summed up");
    drop(input);
    let output = sum.wait_with_output().expect("wait for sha256sum");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("sha256sum prints text");
    (text.split_whitespace().next().expect("a sum").to_owned(), bytes)
}

#[test]
fn disks_of_the_original_are_served_as_they_are() {
    let Some(stage) = stage() else { return };
    for (name, bytes, expected) in BUNDLES {
        let Some(folder) = unpack(&stage, name) else { continue };
        let before = files(&folder);
        let descriptor = folder.join("DiskDescriptor.xml");
        // Without a mount point: what is on it is no file system.
        let printed = stage.ploop(&["mount", "-r", &descriptor.to_string_lossy()]).succeeded();
        let device = printed.split_whitespace().find(|word| word.starts_with("/dev/"));
        let device = device.unwrap_or_else(|| panic!("no device in {printed:?}"));
        let sum = sha256(Path::new(device));
        stage.ploop(&["umount", "-d", device]).succeeded();
        assert_eq!(sum, (expected.to_owned(), bytes), "{name}");
        assert!(files(&folder) == before, "{name}: it was changed by being read");
    }
    assert!(stage.ploop(&["list"]).succeeded().is_empty());
}

/// Names and contents of the files in a folder.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).expect("list a folder");
    let paths = entries.map(|entry| entry.expect("list a folder").path());
    let mut files: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).expect("read a file"))).collect();
    files.sort();
    files
}

#[test]
fn a_stream_of_the_original_is_received() {
    let Some(stage) = stage() else { return };
    let Some(packed) = original("family-a-v2-32k.stream.zst") else { return };
    let unpacked = Command::new("zstd").args(["-d", "-c"]).arg(&packed).stderr(Stdio::null()).output();
    let stream = match unpacked {
        Ok(output) if output.status.success() => output.stdout,
        other => {
            ploop_testing::skip(
                ploop_testing::Need::Program("zstd"),
                format!("zstd is needed to unpack the stream: {:?}", other.map(|output| output.status)),
            );
            return;
        }
    };
    let receive = |bytes: &[u8], target: &Path| {
        fs::create_dir(target.parent().expect("a folder")).expect("make the folder of a copy");
        let file = stage.path("stream");
        fs::write(&file, bytes).expect("write the stream");
        let mut pipe = Command::new("cat").arg(&file).stdout(Stdio::piped()).spawn().expect("run cat");
        let receive = stage
            .command(&["copy", "-d", &target.to_string_lossy()])
            .stdin(pipe.stdout.take().expect("a pipe"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let ran = Reaped(Some(receive.expect("start ploop"))).wait();
        // It may have met a closed pipe.
        pipe.wait().expect("wait for cat");
        ran
    };
    let target = stage.path("whole/disk.hds");
    receive(&stream, &target).succeeded();
    if let Some(folder) = unpack(&stage, "v2-32k") {
        let mut theirs = Vec::new();
        fs::File::open(folder.join("root.hds")).and_then(|mut file| file.read_to_end(&mut theirs)).unwrap();
        assert!(fs::read(&target).unwrap() == theirs, "it differs from the image that was sent");
    }
    let printed = stage.ploop(&["mount", "-r", &target.to_string_lossy()]).succeeded();
    let device = printed.split_whitespace().find(|word| word.starts_with("/dev/")).unwrap();
    let sum = sha256(Path::new(device));
    stage.ploop(&["umount", "-d", device]).succeeded();
    assert_eq!(sum.0, BUNDLES[1].2);
    // Cut, it is refused as the original refuses it, and leaves nothing.
    for (number, len) in [0, 8, stream.len() / 2, stream.len() - 1].into_iter().enumerate() {
        let target = stage.path(&format!("cut-{number}/disk.hds"));
        let ran = receive(&stream[..len], &target);
        assert_eq!(ran.code, 6, "cut at {len}: {}", ran.stderr);
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 0, "cut at {len}");
    }
}
