//! A read-only memory map of the front of a closed image, for tools that look at large tables.
//!
//! Never of a live image: a map of a file that somebody shortens ends the process with a signal. Therefore a map is
//! only had together with the image's lock, and the map keeps the lock.
//!
//! And [`Words`]: memory of whole pages, mapped by itself, that a table is read into and then lives in.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::sync::atomic::AtomicU32;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};

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

/// Words that several threads read and change, in page-aligned memory; in huge pages where the host gives them, so that
/// a long table is not taken page by page.
#[derive(Debug)]
pub struct Words {
    map: MmapMut,
}

impl Words {
    /// Zeros of `len_bytes` bytes, at least 4 and a multiple of 4.
    pub fn try_zeroed(len_bytes: usize) -> io::Result<Self> {
        if len_bytes == 0 || !len_bytes.is_multiple_of(size_of::<AtomicU32>()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let map = MmapMut::map_anon(len_bytes)?;
        // A host without huge pages refuses, and that is no loss.
        let _refused = map.advise(Advice::HugePage).is_err();
        Ok(Self { map })
    }

    /// The words as bytes, to be read into.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

impl Deref for Words {
    type Target = [AtomicU32];

    fn deref(&self) -> &[AtomicU32] {
        let len = self.map.len() / size_of::<AtomicU32>();
        // SAFETY: the map is anonymous, private, writable and page-aligned, and covers `len` words, of which every pattern
        // of bits is valid. It lives as long as `self`. Bytes are only changed through `as_mut_bytes`, which excludes this.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU32>(), len) }
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

    #[test]
    fn words_are_the_bytes_they_were_read_from() {
        use std::sync::atomic::Ordering;
        let mut words = Words::try_zeroed(2 << 20).unwrap();
        assert!(words.len() == 1 << 19 && words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        words.as_mut_bytes()[4..8].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(words[1].swap(9, Ordering::AcqRel), 7);
        assert_eq!(words.as_mut_bytes()[..8], [[0; 4], 9u32.to_ne_bytes()].concat());
        assert!(words.as_mut_bytes().as_ptr().addr().is_multiple_of(crate::io::buffer::BUFFER_ALIGNMENT));
        assert!(Words::try_zeroed(0).is_err() && Words::try_zeroed(6).is_err());
    }
}
