//! Image ownership: who may have an image open, kept by locks that end with the process.
//!
//! The in-use mark in a header says "was not closed"; it is no lock (I6). The lock is a set of open-file-description
//! locks on single bytes, in the scheme that QEMU uses for its images: *shared* locks on byte 100+n say "I do n", on
//! byte 200+n "nobody else may do n" (n: 0 read, 1 write, 3 resize). Whoever comes takes its own bytes first and then
//! looks for the opposite ones, so of two that come together at least one gives way. Thus QEMU and we never write
//! one image together, nor do two of ours. One byte more, [`OWNER_BYTE`], held exclusively by our writers and shared
//! by our readers, decides races between two of ours.
//!
//! A file with several names is an image that clones share: nobody gets it for writing. The file system counts the
//! names, so nothing can be forgotten, and the last clone that goes sets the image free.
//!
//! Invariant: an [`ImageLock`] holds all of its bytes or does not exist. The kernel releases the locks when the last
//! descriptor of the description is closed, also after a kill.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::sys::{self, LockMode};
use crate::error::{Error, ErrorKind, Result};

/// The byte that only ploop locks. Far from what others use, and past the bytes below.
pub const OWNER_BYTE: u64 = 300;
/// First of the bytes that say what the holder does.
const DOES_BYTE: u64 = 100;
/// First of the bytes that say what nobody else may do.
const FORBIDS_BYTE: u64 = 200;

const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// What the holder of a lock may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Read, together with other readers, while nobody writes.
    Reader,
    /// Write, alone. The file must be open for writing.
    Writer,
}

impl Ownership {
    fn does(self) -> &'static [u64] {
        match self {
            Self::Reader => &[READ],
            Self::Writer => &[READ, WRITE, RESIZE],
        }
    }

    fn forbids(self) -> &'static [u64] {
        &[WRITE, RESIZE]
    }
}

/// A held lock; dropping it releases the image.
#[derive(Debug)]
pub struct ImageLock {
    /// Shares the open file description, and with it the locks, with the file that was locked.
    descriptor: OwnedFd,
    path: PathBuf,
    ownership: Ownership,
}

impl ImageLock {
    /// Takes the image behind `file`, without waiting. `path` is for messages. [`ErrorKind::InUse`] when somebody
    /// else has it, [`ErrorKind::Lock`] when the file system cannot lock.
    ///
    /// One open file is locked at most once: a second lock on the same description would not conflict.
    pub fn take(file: impl AsFd, path: &Path, ownership: Ownership) -> Result<Self> {
        Self::take_file(file, path, ownership, true)
    }

    /// As [`take`](Self::take) for somebody who goes on with what he had locked before. Names that the file was given
    /// meanwhile do not matter: they were given to an image that is written to.
    pub fn take_again(file: impl AsFd, path: &Path, ownership: Ownership) -> Result<Self> {
        Self::take_file(file, path, ownership, false)
    }

    fn take_file(file: impl AsFd, path: &Path, ownership: Ownership, counts_names: bool) -> Result<Self> {
        let cannot = |error| Error::io(ErrorKind::Lock, "lock image", error).at_path(path);
        let lock =
            Self { descriptor: sys::duplicate(&file).map_err(cannot)?, path: path.to_path_buf(), ownership };
        // From here on dropping `lock` takes back whatever part of it was got.
        match lock.take_bytes() {
            // Whoever gives a file a second name holds it as a reader meanwhile, so this count is not too old.
            Ok(())
                if counts_names
                    && ownership == Ownership::Writer
                    && sys::link_count(&file).map_err(cannot)? > 1 =>
            {
                Err(shared_by_clones(path))
            }
            Ok(()) => Ok(lock),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(in_use(path, ownership)),
            Err(error) => {
                Err(cannot(error).advise("use a file system with working locks, or mount it with them"))
            }
        }
    }

    fn take_bytes(&self) -> io::Result<()> {
        let file = self.descriptor.as_fd();
        let mode = match self.ownership {
            Ownership::Reader => LockMode::Shared,
            Ownership::Writer => LockMode::Exclusive,
        };
        sys::lock_bytes(file, mode, OWNER_BYTE, 1)?;
        for &action in self.ownership.does() {
            sys::lock_bytes(file, LockMode::Shared, DOES_BYTE + action, 1)?;
        }
        for &action in self.ownership.forbids() {
            sys::lock_bytes(file, LockMode::Shared, FORBIDS_BYTE + action, 1)?;
        }
        let opposed = self.ownership.does().iter().map(|action| FORBIDS_BYTE + action);
        for byte in opposed.chain(self.ownership.forbids().iter().map(|action| DOES_BYTE + action)) {
            if sys::is_locked_by_other(file, byte, 1)? {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    /// From writer to reader: others may read from now on, nobody may write. At no moment is the image without an owner.
    pub fn weaken(&mut self) -> Result<()> {
        let file = self.descriptor.as_fd();
        let weaken = || -> io::Result<()> {
            sys::lock_bytes(file, LockMode::Shared, OWNER_BYTE, 1)?;
            for action in [WRITE, RESIZE] {
                sys::lock_bytes(file, LockMode::Unlocked, DOES_BYTE + action, 1)?;
            }
            Ok(())
        };
        weaken().map_err(|error| Error::io(ErrorKind::Lock, "share image", error).at_path(&self.path))?;
        self.ownership = Ownership::Reader;
        Ok(())
    }

    /// What the holder may do.
    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// The image, as named when it was locked.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn in_use(path: &Path, ownership: Ownership) -> Error {
    let message = match ownership {
        Ownership::Reader => "lock image for reading: another program has it open for writing",
        Ownership::Writer => "lock image for writing: another program has it open",
    };
    Error::new(ErrorKind::InUse, message).at_path(path).advise(
        "unmount the disk or stop the virtual machine that uses it, then try again; `lslocks` lists the holder",
    )
}

/// The refusal to write to an image that clones share.
pub(crate) fn shared_by_clones(path: &Path) -> Error {
    Error::new(ErrorKind::InUse, "lock image for writing: the file has more than one name, clones share it")
        .at_path(path)
        .advise(
            "an image that clones share is never changed: make a snapshot, and use the disk on top of it; or delete the \
             clones (`find FOLDER -samefile IMAGE` lists them), or copy the image",
        )
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // The description may live on in the storage that was locked, so closing this descriptor is not enough. A
        // refusal leaves the locks until that one is closed too, which errs on the safe side.
        let file = self.descriptor.as_fd();
        for byte in [DOES_BYTE, FORBIDS_BYTE] {
            drop(sys::lock_bytes(file, LockMode::Unlocked, byte, 4));
        }
        drop(sys::lock_bytes(file, LockMode::Unlocked, OWNER_BYTE, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Access;
    use crate::io::file::{FileStorage, OpenOptions};
    use std::process::Command;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, []).unwrap();
        (folder, path)
    }

    fn take(path: &Path, ownership: Ownership) -> Result<ImageLock> {
        let access = if ownership == Ownership::Writer { Access::ReadWrite } else { Access::ReadOnly };
        let file = FileStorage::open(path, &OpenOptions::new(access)).unwrap();
        ImageLock::take(&file, path, ownership)
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_folder, path) = image();
        let writer = take(&path, Ownership::Writer).unwrap();
        for other in [Ownership::Writer, Ownership::Reader] {
            let error = take(&path, other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse);
            assert!(error.to_string().contains("image") && error.advice().is_some());
        }
        drop(writer);
        let _first = take(&path, Ownership::Reader).unwrap();
        let second = take(&path, Ownership::Reader).unwrap();
        assert!(take(&path, Ownership::Writer).is_err());
        drop(second);
        assert!(take(&path, Ownership::Writer).is_err(), "the first reader still holds it");
    }

    #[test]
    fn a_file_with_two_names_is_for_readers() {
        let (folder, path) = image();
        let other = folder.path().join("clone");
        std::fs::hard_link(&path, &other).unwrap();
        let error = take(&path, Ownership::Writer).unwrap_err();
        assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("clones"), "{error}");
        drop((take(&path, Ownership::Reader).unwrap(), take(&other, Ownership::Reader).unwrap()));
        std::fs::remove_file(&other).unwrap();
        take(&path, Ownership::Writer).unwrap();
    }

    #[test]
    fn dropping_releases_although_the_file_stays_open() {
        let (_folder, path) = image();
        let file = FileStorage::open(&path, &OpenOptions::new(Access::ReadWrite)).unwrap();
        drop(ImageLock::take(&file, &path, Ownership::Writer).unwrap());
        let _other = take(&path, Ownership::Writer).unwrap();
        drop(file);
    }

    #[test]
    fn a_writer_that_became_a_reader_shares_and_still_keeps_writers_out() {
        let (_folder, path) = image();
        let mut lock = take(&path, Ownership::Writer).unwrap();
        lock.weaken().unwrap();
        let reader = take(&path, Ownership::Reader).unwrap();
        assert!(take(&path, Ownership::Writer).is_err());
        drop(lock);
        drop(reader);
        let _writer = take(&path, Ownership::Writer).unwrap();
    }

    #[test]
    fn refused_lock_leaves_nothing_behind() {
        let (_folder, path) = image();
        let reader = take(&path, Ownership::Reader).unwrap();
        let file = FileStorage::open(&path, &OpenOptions::new(Access::ReadWrite)).unwrap();
        assert!(ImageLock::take(&file, &path, Ownership::Writer).is_err());
        drop(reader);
        let probe = FileStorage::open(&path, &OpenOptions::new(Access::ReadOnly)).unwrap();
        assert!(!sys::is_locked_by_other(probe.as_fd(), 0, 1000).unwrap());
        drop(file);
    }

    /// What QEMU does, done by hand: shared locks on its bytes, then a look at ours.
    #[test]
    fn a_qemu_writer_and_we_exclude_each_other() {
        let (_folder, path) = image();
        let qemu = FileStorage::open(&path, &OpenOptions::new(Access::ReadWrite)).unwrap();
        for byte in [100, 101, 103, 201, 203] {
            sys::lock_bytes(qemu.as_fd(), LockMode::Shared, byte, 1).unwrap();
        }
        assert_eq!(take(&path, Ownership::Writer).unwrap_err().kind(), ErrorKind::InUse);
        assert_eq!(take(&path, Ownership::Reader).unwrap_err().kind(), ErrorKind::InUse);
        drop(qemu);
        let _ours = take(&path, Ownership::Writer).unwrap();
        let qemu = FileStorage::open(&path, &OpenOptions::new(Access::ReadOnly)).unwrap();
        // A QEMU reader wants n = 0 and forbids n = 1 and 3.
        assert!(sys::is_locked_by_other(qemu.as_fd(), 101, 1).unwrap());
        // A QEMU writer wants n = 1.
        assert!(sys::is_locked_by_other(qemu.as_fd(), 201, 1).unwrap());
    }

    #[test]
    fn the_real_qemu_agrees() {
        let (_folder, path) = image();
        let Ok(created) =
            Command::new("qemu-img").args(["create", "-q", "-f", "raw"]).arg(&path).arg("1M").status()
        else {
            println!("SKIP: qemu-img is not installed");
            return;
        };
        assert!(created.success());
        let write = |path: &Path| {
            let written =
                Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(path).output().unwrap();
            written.status.success()
        };
        assert!(write(&path));
        let lock = take(&path, Ownership::Writer).unwrap();
        assert!(!write(&path), "qemu-io wrote to an image that we own");
        drop(lock);
        assert!(write(&path));
        let hold = || {
            let mut command = Command::new("qemu-io");
            command.args(["-f", "raw", "-c", "write 0 512", "-c", "sleep 1000000"]).arg(&path);
            command.stdout(std::process::Stdio::null()).spawn().unwrap()
        };
        let mut holder = hold();
        let refused = (0..10_000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // It came just when we had a look: it is refused then, and tries again.
            if holder.try_wait().unwrap().is_some() {
                holder = hold();
            }
            take(&path, Ownership::Writer).is_err()
        });
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(refused, "we opened an image that qemu-io writes");
    }
}
