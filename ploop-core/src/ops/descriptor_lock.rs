//! One command at a time on one descriptor.
//!
//! The lock is the original's: an exclusive `flock` on `DiskDescriptor.xml.lck`, a file beside the descriptor that is
//! made when missing and never removed, held for the whole operation. It excludes our commands and the original's of
//! the 1.x line. Those of the 9.x line lock bytes 200..204 of the base image instead and look there for anybody
//! else's locks; they meet the [`ImageLock`](crate::io::lock::ImageLock) that every operation of ours holds on the
//! images it works on, and that lock in turn sees theirs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, ErrorKind, Result};

/// How long the original waits.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
/// Whole seconds to wait instead.
const LOCK_SECONDS_VARIABLE: &str = "PLOOP_LOCK_SECONDS_MAX";
/// How often a taken lock is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// How long commands wait: as long as the original, 60 seconds, or what the environment says in whole seconds with
/// `PLOOP_LOCK_SECONDS_MAX` (what is no number there says nothing).
pub fn lock_timeout() -> Duration {
    let said = std::env::var(LOCK_SECONDS_VARIABLE).ok().and_then(|text| text.parse().ok());
    said.map_or(LOCK_TIMEOUT, |seconds: u32| Duration::from_secs(seconds.into()))
}

/// The held lock; dropping it, or the end of the process, releases it.
#[derive(Debug)]
pub struct DescriptorLock {
    /// None on a medium that takes no writes and has no lock file: there no command changes anything.
    _file: Option<Flock<File>>,
}

impl DescriptorLock {
    /// Locks the descriptor `descriptor` (the path of the XML file), waiting up to `timeout`.
    /// [`ErrorKind::DescriptorLocked`] if it stays locked, [`ErrorKind::Lock`] if it cannot be locked at all.
    pub fn take(descriptor: &Path, timeout: Duration) -> Result<Self> {
        let path = lock_path(descriptor);
        let open = |writes: bool| {
            OpenOptions::new()
                .read(true)
                .write(writes)
                .create(writes)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
        };
        let opened = match open(true) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => match open(false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { _file: None }),
                other => other,
            },
            other => other,
        };
        let mut file = opened.map_err(|error| {
            Error::io(ErrorKind::Lock, "open the descriptor's lock file", error).at_path(&path)
        })?;
        let deadline = Instant::now() + timeout;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Self { _file: Some(file) }),
                Err((back, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => file = back,
                Err((_, error)) => {
                    return Err(Error::io(ErrorKind::Lock, "lock descriptor", error.into()).at_path(&path));
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::new(
                    ErrorKind::DescriptorLocked,
                    format!("lock descriptor: another command has held it for {} s", timeout.as_secs()),
                )
                .at_path(&path)
                .advise("wait for that command to end; `lslocks` shows which it is"));
            }
            std::thread::sleep(RETRY_INTERVAL.min(deadline - now));
        }
    }
}

/// The lock file of a descriptor.
fn lock_path(descriptor: &Path) -> PathBuf {
    let mut name = descriptor.as_os_str().to_owned();
    name.push(".lck");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let descriptor = folder.path().join("DiskDescriptor.xml");
        let held = DescriptorLock::take(&descriptor, Duration::ZERO).unwrap();
        let error = DescriptorLock::take(&descriptor, Duration::from_millis(150)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DescriptorLocked);
        assert_eq!(error.kind().exit_code(), 23);
        let waiting = std::thread::spawn({
            let descriptor = descriptor.clone();
            move || DescriptorLock::take(&descriptor, Duration::from_secs(300)).map(drop)
        });
        // Most often it waits by then; it gets the lock in any case.
        std::thread::sleep(Duration::from_millis(50));
        drop(held);
        waiting.join().unwrap().unwrap();
        assert!(folder.path().join("DiskDescriptor.xml.lck").exists(), "the lock file stays");
    }

    #[test]
    fn a_link_in_place_of_the_lock_file_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let descriptor = folder.path().join("DiskDescriptor.xml");
        std::os::unix::fs::symlink("/dev/null", folder.path().join("DiskDescriptor.xml.lck")).unwrap();
        assert_eq!(DescriptorLock::take(&descriptor, Duration::ZERO).unwrap_err().kind(), ErrorKind::Lock);
    }
}
