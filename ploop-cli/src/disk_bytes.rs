//! The bytes of a disk, closed or served, for a look at its partition table.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ploop_core::ops::GuestBytes;
use ploop_core::{Error, ErrorKind, Result};

/// Something that has the bytes of a disk.
pub(crate) trait DiskBytes {
    /// How many.
    fn disk_bytes(&self) -> u64;

    /// Fills `buffer` from byte `offset`; all of it lies on the disk.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

impl DiskBytes for GuestBytes<'_> {
    fn disk_bytes(&self) -> u64 {
        GuestBytes::disk_bytes(self)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        GuestBytes::read_at(self, offset, buffer)
    }
}

/// A file or a device that shows a disk.
#[derive(Debug)]
pub(crate) struct ShownDisk {
    path: PathBuf,
    file: File,
    len: u64,
}

impl ShownDisk {
    /// Opens it; for writing as well if `writable`.
    pub(crate) fn open(path: &Path, writable: bool) -> Result<Self> {
        let failed = |operation: &str, cause| {
            Error::io(ErrorKind::PartitionTable, operation.to_owned(), cause).at_path(path)
        };
        let file = File::options()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(|cause| failed("open the disk", cause))?;
        let len = file.metadata().map_err(|cause| failed("examine the disk", cause))?.len();
        Ok(Self { path: path.to_path_buf(), file, len })
    }

    /// Writes and waits until it is durable.
    pub(crate) fn write_durably(&self, pieces: &[(u64, &[u8])]) -> Result<()> {
        let failed = |operation: &str, cause| {
            Error::io(ErrorKind::PartitionTable, operation.to_owned(), cause).at_path(&self.path)
        };
        for (offset, bytes) in pieces {
            self.file
                .write_all_at(bytes, *offset)
                .map_err(|cause| failed("write the partition table", cause))?;
        }
        self.file.sync_all().map_err(|cause| failed("sync the partition table", cause))
    }
}

impl DiskBytes for ShownDisk {
    fn disk_bytes(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|cause| {
            Error::io(ErrorKind::PartitionTable, "read the partition table", cause)
                .at_path(&self.path)
                .at_offset(offset)
        })
    }
}
