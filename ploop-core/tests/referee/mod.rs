//! A referee from outside: a temporary folder whose images QEMU's `parallels` driver judges when it goes.
//!
//! Every image that a test leaves behind, at any depth, must pass `qemu-img check -f parallels`, and QEMU must read from it
//! what we read, byte by byte. A delta of a chain is judged by itself: what it does not hold reads as zeros for both.
//! Nothing is judged while a test fails, nor where `qemu-img` is not installed.
//!
//! What is not put before the referee, and why:
//!
//! | image | why | case that shows it |
//! |---|---|---|
//! | marked in use | the check calls "not closed" a corruption, which it is until a server or `open` has repaired it | tests that kill servers |
//! | refused by us | tests damage images on purpose; QEMU aborts on some of them (entry past the end beside a sound one) | `errors.rs`, `golden.rs` |
//! | version 2, cluster no power of two | QEMU's rounding is wrong: a fresh image of 63-sector clusters fails its own check. Reading is right, and compared | 63 and 504 sectors |
//! | with an extension | its clusters at the end of the file count as leaks (3) | stored bitmaps |
//! | disk of more than 8 GiB | checked; the comparison would take too long | sparse disks of a TiB |
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking; not every test uses all of it"
)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ploop_core::format::{Chain, ChainOptions, InUse, Mapping, Probe, Source, Version, probe};
use ploop_core::io::file::{Caching, FileStorage, OpenOptions};
use ploop_core::io::{Access, Storage, StorageExt};
use ploop_core::units::GuestOffset;
use tempfile::TempDir;

/// Larger disks are not compared.
const COMPARED_BYTES_MAX: u64 = 8 << 30;

/// A folder that is judged and removed when it goes.
pub struct JudgedFolder(TempDir);

/// A new one.
pub fn folder() -> JudgedFolder {
    JudgedFolder(tempfile::tempdir().expect("make a temporary folder"))
}

impl JudgedFolder {
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl From<TempDir> for JudgedFolder {
    fn from(folder: TempDir) -> Self {
        Self(folder)
    }
}

impl Drop for JudgedFolder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            judge_all(self.0.path());
        }
    }
}

/// Judges every image below a folder; how many there were.
#[track_caller]
pub fn judge_all(folder: &Path) -> usize {
    if !Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success()) {
        ploop_testing::skip(
            ploop_testing::Need::Program("qemu-img"),
            "qemu-img is not installed: nobody else judges the images",
        );
        return 0;
    }
    let device = fs::metadata(folder).expect("examine the folder").dev();
    let mut files = Vec::new();
    collect(folder, device, &mut files).expect("list the folder");
    files.iter().filter(|path| judge(path)).count()
}

fn collect(folder: &Path, device: u64, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        // What is still mounted is none of ours.
        if meta.dev() != device {
            continue;
        }
        if meta.is_dir() {
            collect(&path, device, files)?;
        } else if meta.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// Judges a file; `false` when it is no image, or none that can be judged.
fn judge(path: &Path) -> bool {
    let options = OpenOptions { access: Access::ReadOnly, caching: Caching::Cached, block_device: false };
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, &options).expect("open a file"));
    let Ok(Probe::Image(header)) = probe(&*storage) else { return false };
    if header.in_use() == InUse::Open {
        return false;
    }
    let source = Source { name: path.to_owned(), storage, raw: false };
    let options = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
    let Ok(chain) = Chain::open(vec![source], &options) else { return false };
    let geometry = header.geometry();
    let is_misjudged = geometry.version() == Version::V2 && !geometry.cluster_bytes().is_power_of_two()
        || header.raw().extension_sectors != 0;
    if !is_misjudged {
        let output = Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(path).output();
        let output = output.expect("run qemu-img");
        assert!(
            output.status.success(),
            "qemu-img check of {}: {}{}",
            path.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    if geometry.disk_bytes() <= COMPARED_BYTES_MAX {
        compare(path, &chain);
    }
    true
}

/// Lets QEMU compare what it reads with what we read.
fn compare(path: &Path, chain: &Chain) {
    let raw = tempfile::NamedTempFile::new_in(path.parent().expect("a folder")).expect("make a raw file");
    let len = chain.geometry().disk_bytes();
    raw.as_file().set_len(len).expect("size a raw file");
    copy_out(chain, raw.as_file()).expect("read an image");
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-f", "parallels", "-F", "raw"]).arg(path).arg(raw.path());
    let output = command.output().expect("run qemu-img");
    assert!(
        output.status.success(),
        "QEMU reads other bytes from {}: {}{}",
        path.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn copy_out(chain: &Chain, raw: &File) -> io::Result<()> {
    let len = chain.geometry().disk_bytes();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        at += match chain.map(GuestOffset(at), len - at) {
            Mapping::Zero { len } => len,
            Mapping::Data { delta, offset, len } => {
                let piece = &mut buffer[..usize::try_from(len.min(1 << 20)).expect("a small number")];
                chain.storage(delta).read_padded_at(offset.0, piece)?;
                raw.write_all_at(piece, at)?;
                piece.len() as u64
            }
        };
    }
    Ok(())
}
