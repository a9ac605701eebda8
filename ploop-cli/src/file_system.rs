//! Making the file system of a new disk: the command line of `mkfs`, and running it.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use ploop_core::{Error, ErrorKind, Result};

use crate::commands::init::FileSystem;

/// How a file system is made.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Which one; never [`FileSystem::None`].
    pub(crate) file_system: FileSystem,
    /// Its block size in bytes, or its own default of 4096.
    pub(crate) block_bytes: Option<u64>,
    /// Whether the kernel may finish the work when it is first mounted.
    pub(crate) lazy: bool,
    /// Its label.
    pub(crate) label: Option<String>,
}

/// One inode per this many bytes in ext3 and ext4, as the original makes them.
const INODE_RATIO_BYTES: u32 = 16384;

impl FileSystem {
    /// The program that makes it, and the package that holds the program.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            Self::Ext3 => ("mkfs.ext3", "e2fsprogs"),
            Self::Xfs => ("mkfs.xfs", "xfsprogs"),
            Self::None => ("true", "coreutils"),
        }
    }

    /// Longest label in bytes.
    fn label_bytes_max(self) -> usize {
        match self {
            Self::Xfs => 12,
            _ => 16,
        }
    }

    /// The name the kernel knows it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Ext3 => "ext3",
            Self::Xfs => "xfs",
            Self::None => "none",
        }
    }
}

/// Checks the options before any file is made.
pub(crate) fn validate(options: &Options) -> Result<()> {
    if options.file_system == FileSystem::None {
        if options.label.is_some() || options.block_bytes.is_some() {
            return Err(Error::new(
                ErrorKind::Parameter,
                "a label (-L) and a block size (-B) need a file system",
            )
            .advise("give -t ext4, ext3 or xfs"));
        }
        return Ok(());
    }
    if let Some(label) = &options.label
        && (label.len() > options.file_system.label_bytes_max() || label.starts_with('-'))
    {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("the label {label:?} is too long or starts with -"),
        )
        .advise(format!("{} bytes is the most", options.file_system.label_bytes_max())));
    }
    if let Some(bytes) = options.block_bytes
        && !(bytes.is_power_of_two() && (1024..=65536).contains(&bytes))
    {
        return Err(Error::new(ErrorKind::Parameter, format!("a file system block of {bytes} bytes"))
            .advise("a power of two from 1024; 4096 is what every machine can mount"));
    }
    Ok(())
}

/// Whether the program is here; said before any file is made.
pub(crate) fn require(file_system: FileSystem) -> Result<()> {
    let (program, package) = file_system.program();
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths)
        .chain(["/sbin", "/usr/sbin"].iter().map(std::path::PathBuf::from))
        .any(|folder| folder.join(program).is_file());
    if found {
        return Ok(());
    }
    Err(Error::new(ErrorKind::MakeFileSystem, format!("{program} is not installed"))
        .advise(format!("install {package}, or make the disk without a file system (-t none)")))
}

/// The command line that makes the file system on `device`.
fn command_line(options: &Options, device: &Path) -> (&'static str, Vec<OsString>) {
    let (program, _) = options.file_system.program();
    let mut arguments: Vec<OsString> = Vec::new();
    match options.file_system {
        FileSystem::Xfs => {
            // A new disk holds nothing to discard.
            arguments.extend(["-q", "-f", "-K"].map(OsString::from));
            if let Some(bytes) = options.block_bytes {
                arguments.extend(["-b".into(), format!("size={bytes}").into()]);
            }
        }
        _ => {
            let lazy = u8::from(options.lazy);
            let extended = format!("nodiscard,lazy_itable_init={lazy},lazy_journal_init={lazy}");
            let block_bytes = options.block_bytes.unwrap_or(4096).to_string();
            let ratio = INODE_RATIO_BYTES.to_string();
            arguments.extend(
                ["-q", "-F", "-b", &block_bytes, "-i", &ratio, "-e", "remount-ro"].map(OsString::from),
            );
            arguments.extend(["-E".into(), extended.into()]);
        }
    }
    if let Some(label) = &options.label {
        arguments.extend(["-L".into(), label.into()]);
    }
    arguments.push(device.into());
    (program, arguments)
}

/// Makes the file system on a block device and waits.
pub(crate) fn make(options: &Options, device: &Path) -> Result<()> {
    let (program, arguments) = command_line(options, device);
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let result = Command::new(program).args(&arguments).env("PATH", path).stdin(Stdio::null()).output();
    let output = result.map_err(|error| {
        Error::io(ErrorKind::MakeFileSystem, format!("run {program}"), error).at_path(device)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().replace('\n', "; ");
    Err(Error::new(ErrorKind::MakeFileSystem, format!("{program} failed ({}): {said}", output.status))
        .at_path(device))
}

/// The name that the original gives to the file that takes space away from the guest.
const BALLOON_NAME: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";

/// Makes the empty balloon file in the root of the new file system, as the original does; `point` is the name of a
/// folder to be made for the time of the mount.
pub(crate) fn add_balloon(file_system: FileSystem, device: &Path, point: &Path) -> Result<()> {
    let failed = |operation: &str, cause: io::Error| {
        Error::io(ErrorKind::Mount, format!("make the balloon file: {operation}"), cause).at_path(device)
    };
    fs::create_dir(point).map_err(|cause| failed("make a folder", cause))?;
    let made = mount(
        Some(device),
        point,
        Some(file_system.name()),
        MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
        None::<&str>,
    )
    .map_err(|errno| failed("mount the file system", errno.into()))
    .and_then(|()| {
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(point.join(BALLOON_NAME))
            .and_then(|file| file.sync_all())
            .map_err(|cause| failed("create the file", cause));
        let unmounted = umount2(point, MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| failed("unmount the file system", errno.into()));
        made.and(unmounted)
    });
    let removed = fs::remove_dir(point).map_err(|cause| failed("remove the folder", cause));
    made.and(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(file_system: FileSystem) -> Options {
        Options { file_system, block_bytes: None, lazy: true, label: None }
    }

    fn line(options: &Options) -> String {
        let (program, arguments) = command_line(options, Path::new("/dev/loop7"));
        arguments.iter().fold(program.to_owned(), |line, word| line + " " + &word.to_string_lossy())
    }

    #[test]
    fn command_lines() {
        assert_eq!(
            line(&options(FileSystem::Ext4)),
            "mkfs.ext4 -q -F -b 4096 -i 16384 -e remount-ro -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 /dev/loop7"
        );
        let xfs = Options { block_bytes: Some(1024), label: Some("root".into()), ..options(FileSystem::Xfs) };
        assert_eq!(line(&xfs), "mkfs.xfs -q -f -K -b size=1024 -L root /dev/loop7");
    }

    #[test]
    fn wrong_options_are_refused_before_anything_is_made() {
        let long = Options { label: Some("thirteen chars".into()), ..options(FileSystem::Xfs) };
        let odd = Options { block_bytes: Some(3000), ..options(FileSystem::Ext4) };
        let none = Options { label: Some("x".into()), ..options(FileSystem::None) };
        for wrong in [long, odd, none] {
            let error = validate(&wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Parameter);
            assert!(error.advice().is_some());
        }
        validate(&options(FileSystem::Ext4)).unwrap();
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = make(&options(FileSystem::Ext4), Path::new("/nonexistent/device")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MakeFileSystem);
        assert!(error.to_string().contains("/nonexistent/device"), "{error}");
    }
}
