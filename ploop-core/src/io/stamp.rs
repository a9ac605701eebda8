//! When a file was last changed, as far as the host tells.

use std::io;

use nix::sys::stat::fstat;

use super::Storage;

/// The moment of a file's last change: seconds and nanoseconds.
pub type Stamp = (i64, i64);

/// When the content of `storage` was last changed; `None` for storage that is no file. Good for telling that something
/// changed, never for deciding what is newer: clocks jump (R13).
pub fn last_change(storage: &dyn Storage) -> io::Result<Option<Stamp>> {
    let Some(file) = storage.descriptor() else { return Ok(None) };
    let status = fstat(file)?;
    Ok(Some((status.st_mtime, status.st_mtime_nsec)))
}
