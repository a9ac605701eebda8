//! The file system on a device, and its size: found out by its superblock, changed by its own tools.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::Holders;

/// A file system whose size can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inner {
    /// ext2, ext3 or ext4.
    Ext,
    /// Grows only, and only while it is mounted.
    Xfs,
}

impl Inner {
    /// The name people know it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// What lies on `device`; `None` for anything else, nothing included.
    pub(crate) fn find(device: &Path) -> Result<Option<Self>> {
        let failed = |cause: io::Error| {
            Error::io(ErrorKind::ResizeFileSystem, "look for a file system", cause).at_path(device)
        };
        let file = File::open(device).map_err(failed)?;
        let mut head = [0; 2048];
        match file.read_exact_at(&mut head, 0) {
            Ok(()) => {}
            // Too small for any.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        Ok(if head.starts_with(b"XFSB") {
            Some(Self::Xfs)
        } else if head[1080..1082] == [0x53, 0xEF] {
            Some(Self::Ext)
        } else {
            None
        })
    }
}

/// Runs a tool and waits: its exit code and what it said.
fn run(tool: &str, line: &[&OsStr], kind: ErrorKind) -> Result<(i32, String)> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(tool)
        .args(line)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| Error::io(kind, format!("run {tool}"), cause).advise("is it installed?"))?;
    let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
    if text.trim().is_empty() {
        text = String::from_utf8_lossy(&output.stdout).into_owned();
    }
    // Ended by a signal: no success.
    Ok((output.status.code().unwrap_or(255), text.trim().replace('\n', "; ")))
}

fn must_succeed(tool: &str, line: &[&OsStr]) -> Result<()> {
    match run(tool, line, ErrorKind::ResizeFileSystem)? {
        (0, _) => Ok(()),
        (code, said) => {
            let error = Error::new(ErrorKind::ResizeFileSystem, format!("{tool} failed ({code}): {said}"));
            Err(if said.contains("Permission denied") {
                error.advise(
                    "a mounted ext4 grows only for who has CAP_SYS_RESOURCE; or unmount the disk; then give the same \
                     command again: it goes on with the file system",
                )
            } else {
                error
            })
        }
    }
}

/// Checks an ext file system that is not mounted, as resize2fs demands.
fn check_ext(device: &Path) -> Result<()> {
    let (code, said) =
        run("e2fsck", &["-f".as_ref(), "-p".as_ref(), device.as_os_str()], ErrorKind::FileSystemCheck)?;
    // 1: errors were found and corrected.
    if code & !1 == 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::FileSystemCheck, format!("e2fsck failed ({code}): {said}"))
        .at_path(device)
        .advise("mount the disk without -m and repair its file system by hand, then resize again"))
}

/// Lets the file system fill the device. A mounted one grows where it is; `point` is the name of a folder to be made if
/// it has to be mounted for that.
pub(crate) fn grow(inner: Inner, device: &Path, point: &Path) -> Result<()> {
    // The tools look for the mount point themselves and act on what lies there.
    let holders = Holders::of(device)?;
    let mounted = holders.usable_mount("grow the file system")?.map(|mounted| mounted.mount.point.clone());
    match (inner, mounted) {
        (Inner::Ext, Some(_)) => must_succeed("resize2fs", &[device.as_os_str()]),
        (Inner::Ext, None) => {
            check_ext(device)?;
            must_succeed("resize2fs", &[device.as_os_str()])
        }
        (Inner::Xfs, Some(mounted)) => must_succeed("xfs_growfs", &["-d".as_ref(), mounted.as_os_str()]),
        (Inner::Xfs, None) => {
            let mounted = Mounted::at(device, inner, point)?;
            let grown = must_succeed("xfs_growfs", &["-d".as_ref(), mounted.point.as_os_str()]);
            mounted.end(grown)
        }
    }
    .map_err(|error| error.at_path(device))
}

/// Makes the file system `bytes` long: it is not mounted and is the file system of that name.
pub(crate) fn shrink(inner: Inner, device: &Path, bytes: u64) -> Result<()> {
    match inner {
        Inner::Xfs => Err(Error::new(ErrorKind::ResizeFileSystem, "xfs cannot be made smaller")
            .at_path(device)
            .advise("make a smaller disk and copy the files there; nothing was changed")),
        Inner::Ext => {
            check_ext(device)?;
            // In units of 1024 bytes, whatever the block size of the file system.
            let size = OsString::from(format!("{}K", bytes / 1024));
            must_succeed("resize2fs", &[device.as_os_str(), &size]).map_err(|error| error.at_path(device))
        }
    }
}

/// A file system mounted for a moment, in a folder of its own.
struct Mounted {
    point: PathBuf,
}

impl Mounted {
    fn at(device: &Path, inner: Inner, point: &Path) -> Result<Self> {
        let failed = |operation: &str, cause: io::Error| {
            Error::io(ErrorKind::Mount, format!("mount for growing: {operation}"), cause).at_path(device)
        };
        match fs::create_dir(point) {
            // Left by a command that was killed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(|cause| failed("make a folder", cause))?,
        }
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        match mount(Some(device), point, Some(inner.name()), flags, None::<&str>) {
            Ok(()) => Ok(Self { point: point.to_path_buf() }),
            Err(errno) => {
                // The folder is empty; that it stays harms nobody.
                let _ = fs::remove_dir(point);
                Err(failed("mount", errno.into()))
            }
        }
    }

    fn end(self, result: Result<()>) -> Result<()> {
        let unmounted = umount2(&self.point, MntFlags::UMOUNT_NOFOLLOW)
            .map_err(io::Error::from)
            .and_then(|()| fs::remove_dir(&self.point));
        result?;
        unmounted.map_err(|cause| {
            Error::io(ErrorKind::Unmount, "unmount after growing", cause).at_path(&self.point)
        })
    }
}
