//! The size of the file system on a device, changed by its own tools.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::Holders;

use crate::signature::Content;

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

    /// Which one `content` is; `None` for anything else, nothing included.
    pub(crate) fn of(content: &Content) -> Option<Self> {
        match content.kind.as_deref()? {
            "ext2" | "ext3" | "ext4" => Some(Self::Ext),
            "xfs" => Some(Self::Xfs),
            _ => None,
        }
    }

    /// The programs that change its size, and the package that has them.
    fn tools(self, is_mounted: bool) -> (&'static [&'static str], &'static str) {
        match (self, is_mounted) {
            (Self::Ext, true) => (&["resize2fs"], "e2fsprogs"),
            (Self::Ext, false) => (&["e2fsck", "resize2fs"], "e2fsprogs"),
            (Self::Xfs, _) => (&["xfs_growfs"], "xfsprogs"),
        }
    }
}

/// Whether this process has CAP_SYS_RESOURCE, by the bits that the kernel shows.
fn has_sys_resource() -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    // What cannot be read is left to the kernel to refuse.
    effective
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_none_or(|bits| bits & CAP_SYS_RESOURCE != 0)
}

/// Refuses, before anything is changed, what would fail later for want of a program or a capability.
pub(crate) fn require(inner: Inner, is_mounted: bool) -> Result<()> {
    let (tools, package) = inner.tools(is_mounted);
    let refused = |message: String, advice: String| {
        Err(Error::new(ErrorKind::ResizeFileSystem, message).advise(advice + "; nothing was changed"))
    };
    let paths = std::env::var_os("PATH").unwrap_or_default();
    for tool in tools {
        let is_there = std::env::split_paths(&paths)
            .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
            .any(|folder| folder.join(tool).is_file());
        if !is_there {
            return refused(
                format!("{tool} is not installed, which changes the size of {}", inner.name()),
                format!("install {package}, or change the image alone with `ploop grow`"),
            );
        }
    }
    if inner == Inner::Ext && is_mounted && !has_sys_resource() {
        return refused(
            "a mounted ext4 grows only for who has CAP_SYS_RESOURCE".to_owned(),
            "unmount the disk first, or run the command with that capability".to_owned(),
        );
    }
    Ok(())
}

/// A tool, found also where only the administrator's path leads; it speaks English.
fn tool(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(name);
    command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a tool and waits: its exit code and what it said.
fn run(name: &str, line: &[&OsStr], kind: ErrorKind) -> Result<(i32, String)> {
    let output = tool(name)
        .args(line)
        .output()
        .map_err(|cause| Error::io(kind, format!("run {name}"), cause).advise("is it installed?"))?;
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

/// The least that resize2fs would make of an ext file system, in bytes; `None` where it does not say.
fn least_bytes(device: &Path) -> Option<u64> {
    /// Where the superblock has the logarithm of the block size, less ten.
    const BLOCK_SIZE_AT: u64 = 1024 + 24;
    let output = tool("resize2fs").arg("-P").arg(device).output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let blocks: u64 = said.rsplit(':').next()?.trim().parse().ok()?;
    let mut shift = [0; 4];
    fs::File::open(device).ok()?.read_exact_at(&mut shift, BLOCK_SIZE_AT).ok()?;
    blocks.checked_mul(1024_u64.checked_shl(u32::from_le_bytes(shift))?)
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
            // The check writes, if only its date: what it would be for nothing is refused before.
            if let Some(least) = least_bytes(device).filter(|least| *least > bytes) {
                return Err(Error::new(
                    ErrorKind::ResizeFileSystem,
                    format!("resize2fs would refuse {bytes} bytes: what is on it needs {least}"),
                )
                .at_path(device)
                .advise("delete files, or make the disk less small; nothing was changed"));
            }
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
