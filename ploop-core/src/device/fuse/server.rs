//! A file system of one file: answers the kernel's requests from a [`Disk`].
//!
//! Each thread drives one [`Queue`] that also watches the FUSE descriptor: requests are read until there are no more,
//! handed to the queue, and answered as they complete. No request changes threads. Several threads may share the
//! descriptor; the kernel gives each request to one of them.
//!
//! Memory is bounded per thread: [`ServerOptions::large_buffers`] of 1 MiB and [`ServerOptions::small_buffers`] of
//! 64 KiB. Large payloads stay in the page-aligned buffer they were read into; small ones are copied out of it, so
//! that 4 KiB in flight do not hold 1 MiB. While no buffer is free the descriptor is not read. Writes that wait for space
//! on the host hold no buffer, so that reads get theirs.
//!
//! Every request gets one answer, with the number it came with, also a request that the kernel sends again after an
//! earlier server died (executing a write twice changes nothing). A sync is never answered with "not implemented":
//! the kernel would report success for ever after.
//!
//! The end: the file system is unmounted (ENODEV), or [`Serving::stop`] was called. What is in flight then is
//! finished and answered first.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use super::survivor::Survivor;
use super::sys::FuseDevice;
use super::worker::Worker;
use crate::device::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Waker;

/// Requests without a buffer that one thread takes on beside those with one.
pub(super) const UNBUFFERED_MAX: usize = 64;

/// How a disk is served.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Threads, each with its own queue; 1 to 16.
    pub threads: usize,
    /// Buffers of 1 MiB per thread, at least 2.
    pub large_buffers: usize,
    /// Buffers of 64 KiB per thread, at least 1.
    pub small_buffers: usize,
    /// An earlier server of this mount is gone: ask for what it left unanswered.
    pub takeover: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { threads: 1, large_buffers: 16, small_buffers: 128, takeover: false }
    }
}

impl ServerOptions {
    /// Requests that one thread may have in flight: the queue of a disk must allow as many.
    pub fn requests_max(&self) -> usize {
        self.large_buffers + self.small_buffers + UNBUFFERED_MAX
    }
}

/// What a server's threads share.
pub(super) struct Shared {
    pub(super) disk: Arc<Disk>,
    pub(super) survivor: Arc<Survivor>,
    pub(super) stop: AtomicBool,
    /// Wake the threads, once all exist.
    wakers: OnceLock<Vec<Waker>>,
    pub(super) permissions: u32,
}

impl Shared {
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wakers.get().into_iter().flatten().for_each(Waker::wake);
    }
}

/// A disk being served by threads of this process.
pub struct Serving {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Serving {
    /// Starts serving `disk` through `device`. What must outlive this process goes to `survivor`.
    pub fn start(
        device: FuseDevice,
        disk: Arc<Disk>,
        survivor: Arc<Survivor>,
        options: &ServerOptions,
    ) -> Result<Self> {
        let failed = |operation: &str, cause: io::Error| {
            Error::io(ErrorKind::Device, operation.to_owned(), cause).at_path("/dev/fuse")
        };
        let permissions = if disk.is_read_only() { 0o400 } else { 0o600 };
        let shared = Arc::new(Shared {
            disk,
            survivor,
            stop: AtomicBool::new(false),
            wakers: OnceLock::new(),
            permissions,
        });
        let mut workers = Vec::new();
        for _ in 0..options.threads.clamp(1, 16) {
            let device = device.try_clone().map_err(|cause| failed("share the descriptor", cause))?;
            workers.push(Worker::new(device, Arc::clone(&shared), options)?);
        }
        if options.takeover {
            device.request_resend().map_err(|cause| failed("ask for unanswered requests", cause))?;
        }
        // Set once, here.
        let _ = shared.wakers.set(workers.iter().map(|worker| worker.waker()).collect());
        let mut serving = Self { shared, threads: Vec::new() };
        for worker in workers {
            let thread = std::thread::Builder::new()
                .name("fuse".into())
                .spawn(move || worker.run())
                .map_err(|cause| Error::io(ErrorKind::System, "start a server thread", cause));
            match thread {
                Ok(thread) => serving.threads.push(thread),
                Err(error) => {
                    serving.stop();
                    let _ = serving.wait();
                    return Err(error);
                }
            }
        }
        Ok(serving)
    }

    /// Makes the threads finish what is in flight and end, without waiting for the file system to be unmounted.
    /// Requests that come later stay unanswered.
    pub fn stop(&self) {
        self.stopper().stop();
    }

    /// Something that stops the server from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper { shared: Arc::clone(&self.shared) }
    }

    /// Waits until all threads have ended; the first failure of one.
    pub fn wait(self) -> Result<()> {
        let mut outcome = Ok(());
        for thread in self.threads {
            let result = thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::System, "a server thread panicked")));
            outcome = outcome.and(result);
        }
        outcome
    }
}

/// Stops a server from another thread.
#[derive(Clone)]
pub struct Stopper {
    shared: Arc<Shared>,
}

impl Stopper {
    /// As [`Serving::stop`].
    pub fn stop(&self) {
        self.shared.stop();
    }
}

#[cfg(test)]
mod tests;
