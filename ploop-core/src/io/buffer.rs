//! Owned, page-aligned memory for transfers.
//!
//! An [`IoBuf`] owns a range of an aligned allocation. It can be split into disjoint parts and joined again, as a
//! request is cut at cluster boundaries; the parts share the allocation, which lives until the last of them is
//! gone. Invariant: the ranges of all live `IoBuf`s of one allocation are disjoint, so `&mut` access is exclusive.
//!
//! A [`BufferPool`] bounds the memory of a data path: it hands out whole buffers of one size and takes the
//! allocation back when the last part is dropped.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Alignment of every buffer in memory, in bytes: a page, enough for any unbuffered transfer.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// Aligned memory, freed on drop. Its bytes are reached only through the disjoint ranges of `IoBuf`s.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Memory` is plain bytes without affinity to a thread; access goes through `IoBuf`, whose ranges are disjoint.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared `Memory` by itself gives no access to its bytes.
unsafe impl Sync for Memory {}

impl Memory {
    fn try_zeroed(len: usize) -> io::Result<Self> {
        let size = len.max(1).checked_next_multiple_of(BUFFER_ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
        let layout =
            Layout::from_size_align(size, BUFFER_ALIGNMENT).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the layout's size is at least one page, not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this layout and is freed once, here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// The allocation behind a buffer and the pool it returns to.
struct Block {
    memory: ManuallyDrop<Memory>,
    pool: Option<Arc<PoolState>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `drop` runs once and the field is not touched afterwards.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        if let Some(pool) = self.pool.take() {
            pool.give_back(memory);
        }
    }
}

/// Exclusively owned bytes of an aligned allocation.
pub struct IoBuf {
    block: Arc<Block>,
    start: usize,
    len: usize,
}

impl IoBuf {
    /// A page-aligned buffer of `len` zero bytes; `OutOfMemory` when the allocator refuses.
    pub fn try_zeroed(len: usize) -> io::Result<Self> {
        let memory = ManuallyDrop::new(Memory::try_zeroed(len)?);
        Ok(Self { block: Arc::new(Block { memory, pool: None }), start: 0, len })
    }

    /// A page-aligned copy of `bytes`.
    pub fn try_copy_of(bytes: &[u8]) -> io::Result<Self> {
        let mut buffer = Self::try_zeroed(bytes.len())?;
        buffer.as_mut_slice().copy_from_slice(bytes);
        Ok(buffer)
    }

    /// Bytes in this buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the range lies inside the allocation, was zeroed at birth, and no other `IoBuf` covers it.
        unsafe { std::slice::from_raw_parts(self.block.memory.start.as_ptr().add(self.start), self.len) }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`; `&mut self` makes the access exclusive since ranges are disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.block.memory.start.as_ptr().add(self.start), self.len) }
    }

    /// Cuts off and returns the first `at` bytes; this buffer keeps the rest. `at` past the end takes everything.
    #[must_use]
    pub fn split_to(&mut self, at: usize) -> Self {
        let at = at.min(self.len);
        let front = Self { block: Arc::clone(&self.block), start: self.start, len: at };
        self.start += at;
        self.len -= at;
        front
    }

    /// Puts back what was split off: `next` must begin where this ends in the same allocation, else it is returned.
    pub fn join(&mut self, next: Self) -> std::result::Result<(), Self> {
        if Arc::ptr_eq(&self.block, &next.block) && self.start + self.len == next.start {
            self.len += next.len;
            Ok(())
        } else {
            Err(next)
        }
    }

    /// Drops all bytes past the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        is_zero(self.as_slice())
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "IoBuf({} bytes)", self.len)
    }
}

/// Whether every byte is zero; in wide steps, as it runs over everything that is copied.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, &byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

/// A bounded number of equal buffers.
#[derive(Clone)]
pub struct BufferPool {
    state: Arc<PoolState>,
}

struct PoolState {
    buffer_bytes: usize,
    buffers_max: usize,
    inner: Mutex<PoolInner>,
    returned: Condvar,
}

struct PoolInner {
    free: Vec<Memory>,
    /// Allocations that exist, free or handed out.
    existing: usize,
    /// Threads in [`BufferPool::take`]: without any, a return costs no system call.
    waiting: usize,
}

impl PoolState {
    fn lock(&self) -> MutexGuard<'_, PoolInner> {
        // No code panics while it holds this lock, and the list is valid at every step.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, memory: Memory) {
        let mut inner = self.lock();
        inner.free.push(memory);
        let is_awaited = inner.waiting > 0;
        drop(inner);
        if is_awaited {
            self.returned.notify_one();
        }
    }
}

impl BufferPool {
    /// A pool of at most `buffers_max` buffers of `buffer_bytes` each; memory is taken as it is first needed and
    /// then kept.
    pub fn new(buffer_bytes: usize, buffers_max: usize) -> Self {
        let inner = Mutex::new(PoolInner { free: Vec::new(), existing: 0, waiting: 0 });
        Self { state: Arc::new(PoolState { buffer_bytes, buffers_max, inner, returned: Condvar::new() }) }
    }

    /// Size of each buffer in bytes.
    pub fn buffer_bytes(&self) -> usize {
        self.state.buffer_bytes
    }

    fn wrap(&self, memory: Memory) -> IoBuf {
        let block = Block { memory: ManuallyDrop::new(memory), pool: Some(Arc::clone(&self.state)) };
        IoBuf { block: Arc::new(block), start: 0, len: self.state.buffer_bytes }
    }

    /// A buffer, or `None` while all are in use. Its content is whatever its last user left.
    pub fn try_take(&self) -> io::Result<Option<IoBuf>> {
        let mut inner = self.state.lock();
        if let Some(memory) = inner.free.pop() {
            return Ok(Some(self.wrap(memory)));
        }
        if inner.existing == self.state.buffers_max {
            return Ok(None);
        }
        let memory = Memory::try_zeroed(self.state.buffer_bytes)?;
        inner.existing += 1;
        Ok(Some(self.wrap(memory)))
    }

    /// A buffer; waits until one is free. Its content is whatever its last user left.
    pub fn take(&self) -> io::Result<IoBuf> {
        loop {
            if let Some(buffer) = self.try_take()? {
                return Ok(buffer);
            }
            let mut inner = self.state.lock();
            if inner.free.is_empty() && inner.existing == self.state.buffers_max {
                inner.waiting += 1;
                inner = self.state.returned.wait(inner).unwrap_or_else(PoisonError::into_inner);
                inner.waiting -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_and_join_cover_the_same_bytes() {
        let mut buffer = IoBuf::try_copy_of(&[1, 2, 3, 4, 5]).unwrap();
        let mut front = buffer.split_to(2);
        assert_eq!((front.as_slice(), buffer.as_slice()), (&[1, 2][..], &[3, 4, 5][..]));
        front.as_mut_slice()[0] = 9;
        front.join(buffer).unwrap();
        assert_eq!(front.as_slice(), [9, 2, 3, 4, 5]);
    }

    #[test]
    fn strangers_do_not_join() {
        let mut one = IoBuf::try_zeroed(8).unwrap();
        let other = IoBuf::try_zeroed(8).unwrap();
        assert_eq!(one.join(other).unwrap_err().len(), 8);
    }

    #[test]
    fn buffers_are_page_aligned() {
        for len in [0, 1, 4096, 4097, 1 << 20] {
            let buffer = IoBuf::try_zeroed(len).unwrap();
            assert_eq!(buffer.as_slice().as_ptr().addr() % BUFFER_ALIGNMENT, 0);
            assert!(buffer.is_zero());
        }
    }

    #[test]
    fn pool_is_bounded_and_gets_memory_back_with_the_last_part() {
        let pool = BufferPool::new(64, 2);
        let mut first = pool.take().unwrap();
        let _second = pool.take().unwrap();
        assert!(pool.try_take().unwrap().is_none());
        let part = first.split_to(10);
        drop(first);
        assert!(pool.try_take().unwrap().is_none(), "a part still lives");
        drop(part);
        assert_eq!(pool.try_take().unwrap().unwrap().len(), 64);
    }

    #[test]
    fn taking_waits_for_a_return() {
        let pool = BufferPool::new(64, 1);
        let held = pool.take().unwrap();
        let waiting = std::thread::spawn({
            let pool = pool.clone();
            move || pool.take().unwrap().len()
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        drop(held);
        assert_eq!(waiting.join().unwrap(), 64);
    }

    #[test]
    fn zero_test_sees_every_byte() {
        let mut bytes = vec![0u8; 200];
        assert!(is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
