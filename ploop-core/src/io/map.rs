//! A read-only memory map of the front of a closed image, for tools that look at large tables.
//!
//! Never of a live image: a map of a file that somebody shortens ends the process with a signal. Therefore a map is
//! only had together with the image's lock, and the map keeps the lock.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;

use memmap2::{Mmap, MmapOptions};

use super::lock::ImageLock;

/// The first bytes of a locked image, as memory.
#[derive(Debug)]
pub struct TableMap {
    map: Mmap,
    lock: ImageLock,
}

impl TableMap {
    /// Maps the first `len` bytes; `UnexpectedEof` when the file is shorter. Keeps `lock` until dropped.
    pub fn new(lock: ImageLock, len: u64) -> io::Result<Self> {
        let file = std::fs::File::from(lock.descriptor().try_clone_to_owned()?);
        if file.metadata()?.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the map is read only, lies inside the file, and the lock keeps every program that respects locks
        // (ours, QEMU) from writing to or shortening the file while the map lives.
        let map = unsafe { MmapOptions::new().len(len).map(&file) }?;
        Ok(Self { map, lock })
    }

    /// Ends the map and gives the lock back.
    pub fn into_lock(self) -> ImageLock {
        self.lock
    }
}

impl Deref for TableMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Access;
    use crate::io::file::{FileStorage, OpenOptions};
    use crate::io::lock::Ownership;

    #[test]
    fn maps_what_is_there_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [5; 5000]).unwrap();
        let file = FileStorage::open(&path, &OpenOptions::new(Access::ReadOnly)).unwrap();
        let lock = ImageLock::take(&file, &path, Ownership::Reader).unwrap();
        let map = TableMap::new(lock, 5000).unwrap();
        assert!(map.len() == 5000 && map.iter().all(|&byte| byte == 5));
        let lock = map.into_lock();
        assert_eq!(TableMap::new(lock, 5001).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
