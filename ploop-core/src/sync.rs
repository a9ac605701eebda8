//! Atomics and locks: those of the standard library, or of loom when built with `--cfg loom`.
//!
//! Code whose memory orders are checked exhaustively takes these from here, so that the models run the very code
//! that is shipped.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, RwLock, RwLockWriteGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, RwLock, RwLockWriteGuard};

/// `count` zero words, as address space: the kernel supplies a page when it is first written. `None` when there is
/// not even address space.
#[cfg(not(loom))]
pub(crate) fn zeroed_words(count: usize) -> Option<Box<[AtomicU64]>> {
    bytemuck::allocation::try_zeroed_slice_box(count).ok()
}

/// `count` zero words.
#[cfg(loom)]
pub(crate) fn zeroed_words(count: usize) -> Option<Box<[AtomicU64]>> {
    Some((0..count).map(|_| AtomicU64::new(0)).collect())
}
