//! Disk formats of other programs, read and written by `qemu-img`.
//!
//! It is called with an argument vector, with the format said and never guessed, and with absolute paths, so that no
//! name can be taken for one of its protocols. A file that stands on other files is refused: whoever wrote it chose
//! which files of this machine would be read.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueEnum;
use ploop_core::io::file::DirectoryFolder;
use ploop_core::io::{Folder, temporary};
use ploop_core::{Error, ErrorKind, Result};
use serde_json::Value;

mod options;

pub(crate) use options::Layout;

/// Name of the program.
const QEMU_IMG: &str = "qemu-img";

/// A format of a whole disk in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiskFormat {
    /// The bytes of the disk
    Raw,
    /// QEMU
    Qcow2,
    /// VMware
    Vmdk,
    /// VirtualBox
    Vdi,
    /// Hyper-V
    Vhdx,
    /// Virtual PC, Azure
    #[value(name = "vpc", alias = "vhd")]
    Vpc,
    /// QEMU, older
    Qed,
}

impl DiskFormat {
    /// The format that a file's name says it has, if it says so.
    pub(crate) fn of_name(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "raw" | "img" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "vmdk" => Some(Self::Vmdk),
            "vdi" => Some(Self::Vdi),
            "vhdx" => Some(Self::Vhdx),
            "vhd" | "vpc" => Some(Self::Vpc),
            "qed" => Some(Self::Qed),
            _ => None,
        }
    }
}

/// What the first bytes of a file look like; for a refusal, never to open it by.
pub(crate) fn signature_of(path: &Path) -> Option<&'static str> {
    use std::io::Read;
    const SIGNATURES: [(usize, &[u8], &str); 8] = [
        (0, b"QFI\xfb", "qcow2"),
        (0, b"QED\0", "qed"),
        (0, b"KDMV", "vmdk"),
        (0, b"# Disk DescriptorFile", "vmdk"),
        (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
        (0, b"vhdxfile", "vhdx"),
        (0, b"conectix", "vpc"),
        (0, b"Withou", "ploop"),
    ];
    let file =
        std::fs::File::open(path).ok().filter(|file| file.metadata().is_ok_and(|data| data.is_file()))?;
    let mut first = Vec::new();
    file.take(128).read_to_end(&mut first).ok()?;
    let has = |at: usize, signature: &[u8]| first.get(at..).is_some_and(|rest| rest.starts_with(signature));
    SIGNATURES.iter().find(|(at, signature, _)| has(*at, signature)).map(|(.., name)| *name)
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Qed => "qed",
        })
    }
}

/// Fails with `System` if the program is missing: before anything is made.
pub(crate) fn require() -> Result<()> {
    run(&["--version"].map(OsStr::new)).map(drop)
}

fn run(arguments: &[&OsStr]) -> Result<Vec<u8>> {
    let output = Command::new(QEMU_IMG).args(arguments).stdin(Stdio::null()).output().map_err(|cause| {
        let missing = cause.kind() == io::ErrorKind::NotFound;
        let error = Error::io(ErrorKind::System, format!("run {QEMU_IMG}"), cause);
        if missing {
            error.advise("install it (Debian: qemu-utils), or use raw files, which need no other program")
        } else {
            error
        }
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // What it quotes may come out of a file: no control characters reach the terminal.
    let said: String =
        said.trim().chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    Err(Error::new(ErrorKind::System, format!("{QEMU_IMG} failed ({}): {said}", output.status)))
}

/// A file to be read.
#[derive(Debug)]
pub(crate) struct Inspected {
    /// Its absolute path.
    pub(crate) path: PathBuf,
    /// Size of the disk in it.
    pub(crate) disk_bytes: u64,
}

/// Looks at a file before it is read.
pub(crate) fn inspect(path: &Path, format: DiskFormat) -> Result<Inspected> {
    let path = fs::canonicalize(path)
        .map_err(|cause| Error::io(ErrorKind::Open, "find the input", cause).at_path(path))?;
    let format = format.to_string();
    let told =
        run(&["info".as_ref(), "--output=json".as_ref(), "-f".as_ref(), format.as_ref(), path.as_os_str()])
            .map_err(|error| error.at_path(&path))?;
    let told: Value = serde_json::from_slice(&told)
        .map_err(|cause| Error::io(ErrorKind::System, format!("read what {QEMU_IMG} says"), cause.into()))?;
    if stands_on_others(&told, &path) {
        return Err(Error::new(
            ErrorKind::Parameter,
            "import: the content of this file lies in part in others",
        )
        .at_path(&path)
        .advise("if you trust whoever made it, put it into one file with qemu-img convert first"));
    }
    let disk_bytes = told["virtual-size"]
        .as_u64()
        .ok_or_else(|| Error::new(ErrorKind::System, format!("{QEMU_IMG} tells no size")).at_path(&path))?;
    Ok(Inspected { path, disk_bytes })
}

/// Whether reading the file would read others as well.
fn stands_on_others(told: &Value, path: &Path) -> bool {
    let data = &told["format-specific"]["data"];
    let other = |name: &Value| name.as_str().is_some_and(|name| Path::new(name) != path);
    let extents = data["extents"].as_array().into_iter().flatten();
    !told["backing-filename"].is_null()
        || !told["full-backing-filename"].is_null()
        || !data["data-file"].is_null()
        || extents.into_iter().any(|extent| other(&extent["filename"]))
}

/// Writes the raw disk `from` into the new file `to`.
pub(crate) fn convert_to(from: &Path, format: DiskFormat, layout: &Layout, to: &Path) -> Result<()> {
    let format = format.to_string();
    let layout = layout.arguments();
    let mut line: Vec<&OsStr> =
        ["convert", "-f", "raw", "-O", &format, "-t", "writeback"].map(OsStr::new).to_vec();
    line.extend(layout.iter().map(OsStr::new));
    line.extend(["--".as_ref(), from.as_os_str(), to.as_os_str()]);
    run(&line).map(drop)
}

/// Writes the file `from` into the served disk `to`, which is all zeros.
pub(crate) fn convert_from(from: &Path, format: DiskFormat, to: &Path) -> Result<()> {
    let format = format.to_string();
    let line: [&OsStr; 12] = [
        "convert".as_ref(),
        "-n".as_ref(),
        "--target-is-zero".as_ref(),
        "-f".as_ref(),
        format.as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        "-t".as_ref(),
        "writeback".as_ref(),
        "--".as_ref(),
        from.as_os_str(),
        to.as_os_str(),
    ];
    run(&line).map(drop)
}

/// A file that has its final name only when it is complete; removed when it is dropped before.
pub(crate) struct Unfinished {
    path: PathBuf,
    folder: PathBuf,
    /// Says, as long as it is open, that the file is no left-over.
    held: File,
    finished: bool,
}

impl Unfinished {
    /// An empty file beside `target`, to be written over. What killed programs left of `target` is removed.
    pub(crate) fn beside(target: &Path) -> Result<Self> {
        let folder = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let folder = fs::canonicalize(folder)
            .map_err(|cause| Error::io(ErrorKind::Open, "find the folder", cause).at_path(folder))?;
        let name = target
            .file_name()
            .and_then(OsStr::to_str)
            .ok_or_else(|| Error::new(ErrorKind::Parameter, "export: this names no file").at_path(target))?;
        temporary::remove_left_over(&DirectoryFolder::open(&folder)?, name).map_err(|cause| {
            Error::io(ErrorKind::Stat, "export: look for what an earlier one left", cause).at_path(&folder)
        })?;
        loop {
            let path = folder.join(temporary::new_name(name, &uuid::Uuid::new_v4().simple().to_string()));
            let held =
                File::options().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(
                    |cause| Error::io(ErrorKind::Create, "make the new file", cause).at_path(&path),
                )?;
            // Where there are no locks nobody removes it either.
            let is_ours = temporary::hold(held.as_fd()).unwrap_or(true);
            // Between the two steps somebody may have taken it for a left-over.
            if is_ours && path.symlink_metadata().is_ok() {
                return Ok(Self { path, folder, held, finished: false });
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it durable under the name `target`, which must be free; says what it takes on the host, in bytes.
    pub(crate) fn finish(mut self, target: &Path) -> Result<u64> {
        let failed = |kind, what: &str| {
            let what = format!("export: {what}");
            move |cause| Error::io(kind, what, cause)
        };
        self.held.sync_all().map_err(failed(ErrorKind::Sync, "sync the new file"))?;
        let host_bytes = self
            .held
            .metadata()
            .map_err(failed(ErrorKind::Stat, "measure the new file"))?
            .blocks()
            .saturating_mul(512);
        let folder = DirectoryFolder::open(&self.folder)?;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        folder
            .rename_exclusive(&name(&self.path), &name(target))
            .map_err(failed(ErrorKind::Rename, "give the file its name"))
            .map_err(|error| error.at_path(target))?;
        self.finished = true;
        folder.sync().map_err(failed(ErrorKind::Sync, "sync the folder"))?;
        Ok(host_bytes)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // It may never have been made; whatever failed before has been told.
            let _may_be_absent = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_that_stand_on_others_are_seen() {
        let path = Path::new("/a/disk.vmdk");
        assert!(!stands_on_others(&json!({"virtual-size": 1}), path));
        assert!(stands_on_others(&json!({"backing-filename": "/etc/shadow"}), path));
        assert!(stands_on_others(&json!({"format-specific": {"data": {"data-file": "x"}}}), path));
        let extents = |name: &str| json!({"format-specific": {"data": {"extents": [{"filename": name}]}}});
        assert!(!stands_on_others(&extents("/a/disk.vmdk"), path));
        assert!(stands_on_others(&extents("/etc/shadow"), path));
    }

    #[test]
    fn what_was_not_finished_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("disk.qcow2");
        let unfinished = Unfinished::beside(&target).unwrap();
        fs::write(unfinished.path(), "half").unwrap();
        drop(unfinished);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let finished = Unfinished::beside(&target).unwrap();
        fs::write(finished.path(), "whole").unwrap();
        finished.finish(&target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        let second = Unfinished::beside(&target).unwrap();
        fs::write(second.path(), "other").unwrap();
        second.finish(&target).unwrap_err();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_one_left_is_removed_and_what_is_being_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("disk.qcow2");
        let left = folder.path().join("disk.qcow2.tmp.0123456789abcdef0123456789abcdef");
        fs::write(&left, "half").unwrap();
        let first = Unfinished::beside(&target).unwrap();
        assert!(!left.exists());
        let second = Unfinished::beside(&target).unwrap();
        assert!(first.path().exists() && second.path().exists());
    }
}
