//! After a failed sync, only errors.
//!
//! When a sync fails, the kernel forgets which pages were lost: the next sync succeeds although the data is gone
//! (R7). [`Latched`] therefore makes the first failed sync final (E1): every later write, sync, change of length or
//! allocation fails with EIO, while reads go on. The way back is to close, open anew and check.
//!
//! The latch is one atomic flag, set before the failing call returns. A write that another thread began before may
//! still succeed; no *sync* succeeds any more, so nobody is told that it is durable.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Alignment, Allocation, Storage};
use crate::mutant::{Mutant, is_active};

/// A storage that refuses everything but reads after its first failed sync.
#[derive(Debug)]
pub struct Latched<S> {
    inner: S,
    is_latched: AtomicBool,
    writes_latch: bool,
}

impl<S: Storage> Latched<S> {
    /// Latches at the first failed sync.
    pub fn new(inner: S) -> Self {
        Self { inner, is_latched: AtomicBool::new(false), writes_latch: false }
    }

    /// Latches at the first failed sync, write, change of length or allocation: for storage of metadata alone.
    pub fn including_writes(inner: S) -> Self {
        Self { inner, is_latched: AtomicBool::new(false), writes_latch: true }
    }

    /// Whether it has latched.
    pub fn is_latched(&self) -> bool {
        self.is_latched.load(Ordering::Acquire)
    }

    /// Latches by hand: a write of a header or table failed.
    pub fn latch(&self) {
        self.is_latched.store(true, Ordering::Release);
    }

    /// What is behind the latch.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn change<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_latched() && !is_active(Mutant::SyncRetried) {
            return Err(latched_error());
        }
        let result = call();
        if self.writes_latch && matches!(&result, Err(error) if error.kind() != io::ErrorKind::Interrupted) {
            self.latch();
        }
        result
    }
}

/// What a latched storage answers: EIO for the guest, a sentence for people.
fn latched_error() -> io::Error {
    io::Error::other(
        "an earlier sync failed: what was written since may be lost; close the image and check it",
    )
}

impl<S: Storage> Storage for Latched<S> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        self.change(|| self.inner.write_at(offset, buffer))
    }

    fn sync_data(&self) -> io::Result<()> {
        let result = self.change(|| self.inner.sync_data());
        match result {
            Ok(()) => Ok(()),
            Err(_) if is_active(Mutant::SyncErrorIgnored) => Ok(()),
            Err(error) => {
                self.latch();
                Err(error)
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|| self.inner.set_len(len))
    }

    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        self.change(|| self.inner.allocate(offset, len, how))
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn alignment(&self) -> Alignment {
        self.inner.alignment()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.inner.next_data(offset)
    }

    fn next_written(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.inner.next_written(offset)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        self.inner.host_free_bytes()
    }

    /// `None` once latched: a queue asks again for every change and then takes the way through the calls above.
    fn claim(&self, ownership: Option<super::lock::Ownership>) -> crate::Result<()> {
        self.inner.claim(ownership)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        if self.is_latched() { None } else { self.inner.descriptor() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::StorageExt;
    use crate::io::sim::{Call, Fault, SimDisk};

    #[test]
    fn the_first_failed_sync_is_final_and_reads_go_on() {
        let disk = SimDisk::new(1);
        let latched = Latched::new(disk.create("image").unwrap());
        latched.write_all_at(0, b"abc").unwrap();
        disk.inject(Fault::once(Call::Sync, libc::EIO).dropping_data());
        assert_eq!(latched.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(latched.is_latched());
        for failed in [
            latched.write_at(0, b"x").map(drop),
            latched.sync_data(),
            latched.set_len(0),
            latched.allocate(0, 1, Allocation::Reserve),
        ] {
            assert!(failed.unwrap_err().to_string().contains("an earlier sync failed"));
        }
        let mut read = [0; 3];
        latched.read_exact_at(0, &mut read).unwrap();
        assert_eq!(&read, b"abc");
    }

    #[test]
    fn failed_writes_latch_only_when_asked() {
        let disk = SimDisk::new(1);
        let lenient = Latched::new(disk.create("a").unwrap());
        disk.inject(Fault::once(Call::Write, libc::EIO));
        assert!(lenient.write_at(0, b"x").is_err() && !lenient.is_latched());
        let strict = Latched::including_writes(disk.create("b").unwrap());
        disk.inject(Fault::once(Call::Write, libc::EIO));
        assert!(strict.write_at(0, b"x").is_err() && strict.is_latched());
    }
}
