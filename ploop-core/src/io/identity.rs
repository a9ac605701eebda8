//! Which file it is, whatever its names are.
//!
//! Device and inode number name a file as long as somebody has it open: the number is given to no other before. So an
//! identity is compared with that of an open descriptor only. `O_PATH` is enough: such a descriptor carries neither a lock nor
//! I/O, and keeps the file, also one without a name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A file, among those that somebody has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

impl FileIdentity {
    /// The identity of the file behind a descriptor.
    pub fn of(descriptor: impl AsFd) -> io::Result<Self> {
        let status = nix::sys::stat::fstat(descriptor)?;
        Ok(Self { device: status.st_dev, inode: status.st_ino })
    }
}

/// The path that leads to an open file of this process, and to no other, whatever its names are.
pub fn path_of(descriptor: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// A second descriptor of the same file that only holds it (`O_PATH`).
pub fn hold(descriptor: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let held = open_path(&path_of(descriptor))?;
    if FileIdentity::of(&held)? != FileIdentity::of(descriptor)? {
        return Err(io::Error::other("the descriptor leads to another file: is /proc mounted?"));
    }
    Ok(held)
}

fn open_path(path: &Path) -> io::Result<OwnedFd> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).map(OwnedFd::from)
}

/// Opens the very file behind a descriptor anew: an open file of its own, which shares no locks with it.
pub fn reopen(descriptor: BorrowedFd<'_>, writes: bool) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(writes)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path_of(descriptor))?;
    if FileIdentity::of(&file)? != FileIdentity::of(descriptor)? {
        return Err(io::Error::other("another file was opened: is /proc mounted?"));
    }
    Ok(file)
}

/// How many names the file has. One without any is gone with its last user.
pub fn names(descriptor: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(descriptor)?.st_nlink)
}

/// A path of an open file as of now; `None` when it has none, or none that leads there.
pub fn current_path(descriptor: BorrowedFd<'_>) -> Option<PathBuf> {
    let path = std::fs::read_link(path_of(descriptor)).ok()?;
    let there = open_path(&path).ok().and_then(|file| FileIdentity::of(file).ok())?;
    (Some(there) == FileIdentity::of(descriptor).ok()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_held_file_is_the_same_one_under_every_name_and_without() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("one"), folder.path().join("two"));
        std::fs::write(&path, "mine").unwrap();
        let held = hold(File::open(&path).unwrap().as_fd()).unwrap();
        assert_eq!(current_path(held.as_fd()), Some(path.clone()));
        std::fs::rename(&path, &other).unwrap();
        std::fs::write(&path, "another").unwrap();
        assert_eq!(current_path(held.as_fd()), Some(other.clone()));
        std::fs::rename(&path, &other).unwrap();
        assert_eq!((names(held.as_fd()).unwrap(), current_path(held.as_fd())), (0, None));
        let again = reopen(held.as_fd(), true).unwrap();
        again.write_all_at(b"MINE", 0).unwrap();
        let mut found = [0; 4];
        reopen(held.as_fd(), false).unwrap().read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"MINE");
        assert_eq!(std::fs::read(&other).unwrap(), b"another");
    }

    #[test]
    fn holding_is_no_io_and_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("one"), "x").unwrap();
        let file = File::open(folder.path().join("one")).unwrap();
        let held = File::from(hold(file.as_fd()).unwrap());
        assert!(held.read_at(&mut [0; 1], 0).is_err());
        assert!(held.try_lock().is_err_and(|error| !matches!(error, std::fs::TryLockError::WouldBlock)));
    }
}
