//! Owner and mode of a file that replaces another.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sys::stat::{FileStat, Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, fchown};

use super::Storage;

/// Gives `new` the owner, group and mode of `old`; nothing to do for storage that is no file.
pub fn copy(old: &dyn Storage, new: &dyn Storage) -> io::Result<()> {
    let (Some(old), Some(new)) = (old.descriptor(), new.descriptor()) else { return Ok(()) };
    let (from, to) = (status(old)?, status(new)?);
    if (from.st_uid, from.st_gid) != (to.st_uid, to.st_gid) {
        fchown(new, Some(Uid::from_raw(from.st_uid)), Some(Gid::from_raw(from.st_gid)))?;
    }
    // After the owner: a change of owner takes bits away.
    fchmod(new, Mode::from_bits_truncate(from.st_mode & 0o7777))?;
    Ok(())
}

fn status(file: BorrowedFd<'_>) -> io::Result<FileStat> {
    Ok(fstat(file)?)
}
