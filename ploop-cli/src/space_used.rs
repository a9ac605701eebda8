//! How full the file system on a disk is: asked of the kernel while it is mounted, and remembered beside the images when
//! it is unmounted.
//!
//! The record is the original's: a file `.statfs` in the folder of the base image with five 64-bit words in the
//! machine's order, as they were when the file system was last unmounted: block size in bytes, blocks, free blocks,
//! inodes, free inodes. It is a convenience: it may be missing or old, nothing depends on it, and a failure to write it
//! fails no umount. Whoever mounts the disk for writing takes it away.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::State;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::{Holders, OpenedFileSystem};
use serde::Serialize;

/// Name of the record.
const NAME: &str = ".statfs";
/// Its length in bytes.
const RECORD_BYTES: usize = 40;

/// How full a file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SpaceUsed {
    /// Bytes of a block.
    pub(crate) block_bytes: u64,
    /// All blocks.
    pub(crate) blocks: u64,
    /// Free ones.
    pub(crate) blocks_free: u64,
    /// All inodes.
    pub(crate) inodes: u64,
    /// Free ones.
    pub(crate) inodes_free: u64,
}

impl SpaceUsed {
    /// Asks the kernel about a mounted file system.
    pub(crate) fn of_mounted(file_system: &OpenedFileSystem) -> Result<Self> {
        let status = nix::sys::statvfs::fstatvfs(&file_system.folder).map_err(|errno| {
            Error::io(ErrorKind::Stat, "ask how full the file system is", errno.into())
                .at_path(&file_system.name)
        })?;
        Ok(Self {
            block_bytes: status.fragment_size(),
            blocks: status.blocks(),
            blocks_free: status.blocks_free(),
            inodes: status.files(),
            inodes_free: status.files_free(),
        })
    }

    /// What was remembered of the disk whose base image lies in `folder`; `None` when nothing was.
    pub(crate) fn remembered(folder: &Path) -> Option<Self> {
        let mut record = Vec::new();
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(folder.join(NAME)).ok()?;
        file.take(RECORD_BYTES as u64 + 1).read_to_end(&mut record).ok()?;
        Self::decode(&record)
    }

    /// Remembers it in `folder`.
    pub(crate) fn remember(&self, folder: &Path) -> io::Result<()> {
        let temporary = folder.join(format!("{NAME}.new"));
        let flags = nix::libc::O_NOFOLLOW;
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
        options.open(&temporary)?.write_all(&self.encode())?;
        fs::rename(temporary, folder.join(NAME))
    }

    /// Forgets what was remembered in `folder`.
    pub(crate) fn forget(folder: &Path) {
        // What stays is old, which a reader must expect of it anyway.
        let _ = fs::remove_file(folder.join(NAME));
    }

    /// The size of the file system and what is used of it, in units of 1024 bytes.
    pub(crate) fn kib(&self) -> (u64, u64) {
        let kib = |blocks: u64| {
            let bytes = u128::from(blocks) * u128::from(self.block_bytes);
            u64::try_from(bytes / 1024).unwrap_or(u64::MAX)
        };
        (kib(self.blocks), kib(self.blocks.saturating_sub(self.blocks_free)))
    }

    /// Its inodes and how many are used.
    pub(crate) fn inodes(&self) -> (u64, u64) {
        (self.inodes, self.inodes.saturating_sub(self.inodes_free))
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let words = [self.block_bytes, self.blocks, self.blocks_free, self.inodes, self.inodes_free];
        let mut record = [0; RECORD_BYTES];
        for (place, word) in record.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
        }
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        let words = record.as_chunks::<8>().0;
        match (record.len(), words) {
            (RECORD_BYTES, [size, blocks, blocks_free, inodes, inodes_free]) => Some(Self {
                block_bytes: u64::from_ne_bytes(*size),
                blocks: u64::from_ne_bytes(*blocks),
                blocks_free: u64::from_ne_bytes(*blocks_free),
                inodes: u64::from_ne_bytes(*inodes),
                inodes_free: u64::from_ne_bytes(*inodes_free),
            }),
            _ => None,
        }
    }
}

/// The folder whose record is about the served disk: none of a disk that shows an old state, may not be changed, or is
/// one of several users of its images.
pub(crate) fn record_folder(state: &State) -> Option<PathBuf> {
    if state.open.read_only || state.open.snapshot.is_some() || state.component.is_some() {
        return None;
    }
    state.images.first()?.path.parent().map(Path::to_path_buf)
}

/// How full the file system of a served disk is, if it is mounted somewhere.
pub(crate) fn of_served(state: &State) -> Option<SpaceUsed> {
    SpaceUsed::of_mounted(&open_of(state).ok()??).ok()
}

/// The first file system of a served disk, wherever it is mounted.
pub(crate) fn open_of(state: &State) -> Result<Option<OpenedFileSystem>> {
    let Some(device) = &state.loop_device else { return Ok(None) };
    let holders = Holders::of(device)?;
    holders.file_systems().first().map(|file_system| holders.open_file_system(file_system)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: SpaceUsed =
        SpaceUsed { block_bytes: 4096, blocks: 1000, blocks_free: 400, inodes: 64, inodes_free: 53 };

    #[test]
    fn what_is_remembered_is_found_and_what_is_forgotten_is_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(SpaceUsed::remembered(folder.path()), None);
        SOME.remember(folder.path()).unwrap();
        assert_eq!(SpaceUsed::remembered(folder.path()), Some(SOME));
        let bytes = fs::read(folder.path().join(NAME)).unwrap();
        assert_eq!((bytes.len(), &bytes[..8]), (40, &4096_u64.to_ne_bytes()[..]));
        SpaceUsed::forget(folder.path());
        assert_eq!(SpaceUsed::remembered(folder.path()), None);
    }

    #[test]
    fn anything_else_is_no_record() {
        let folder = tempfile::tempdir().unwrap();
        for len in [0, 39, 41, 4096] {
            fs::write(folder.path().join(NAME), vec![1; len]).unwrap();
            assert_eq!(SpaceUsed::remembered(folder.path()), None, "{len} bytes");
        }
        fs::remove_file(folder.path().join(NAME)).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", folder.path().join(NAME)).unwrap();
        assert_eq!(SpaceUsed::remembered(folder.path()), None, "a link");
    }

    #[test]
    fn sizes_are_counted_in_units_of_1024_bytes_and_do_not_overflow() {
        assert_eq!((SOME.kib(), SOME.inodes()), ((4000, 2400), (64, 11)));
        let large = SpaceUsed { block_bytes: u64::MAX, blocks: u64::MAX, ..SOME };
        assert_eq!(large.kib().0, u64::MAX);
    }
}
