//! A raw image: it has no header, so only its length can be wrong, and that only against what is known of its disk.
//!
//! A file that is no whole number of *clusters* is sound: the disk ends where it ends. One that is no whole number of
//! sectors cannot be written; a change of size that was cut leaves it. It becomes whole sectors when told to repair, never
//! by a mere look, and never when it is shorter than its disk: that would hide where it was cut.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Geometry, Probe, probe};
use crate::io::{Access, Folder, Storage};
use crate::ops::agreement::sizes_of;
use crate::ops::image_files::is_shared;
use crate::ops::repair::RepairReport;
use crate::units::{SECTOR_BYTES, Sectors};

use super::finding::{Class, Kind};
use super::{CheckOptions, ImageCheck, Outcome, open_locked, summary};

/// Checks a raw image in clusters of `cluster`.
pub(super) fn check_raw(
    folder: &dyn Folder,
    name: &str,
    path: &Path,
    cluster: Sectors,
    options: &CheckOptions,
) -> Result<ImageCheck> {
    let (storage, lock) = open_locked(folder, name, path, Access::ReadOnly)?;
    let mut result = look(&*storage, path, cluster)?;
    let file_bytes = result.file_bytes;
    let is_whole = options.raw_disk.is_none_or(|disk| Sectors::covering(file_bytes) >= disk);
    let told = options.repair && !options.read_only && !is_shared(&*storage);
    if result.findings.total(Kind::RawLength) == 0 || !told || !is_whole {
        return Ok(result);
    }
    drop((storage, lock));
    let (storage, _lock) = open_locked(folder, name, path, Access::ReadWrite)?;
    let again = look(&*storage, path, cluster)?;
    let whole = again.file_bytes.next_multiple_of(SECTOR_BYTES);
    storage
        .set_len(whole)
        .map_err(|source| Error::io(ErrorKind::Truncate, "repair: extend the image", source))?;
    storage.sync_data().map_err(|source| Error::io(ErrorKind::Sync, "repair: sync the image", source))?;
    result.outcome = Outcome::Repaired;
    result.repair = Some(RepairReport {
        file_bytes_before: again.file_bytes,
        file_bytes: whole,
        ..RepairReport::default()
    });
    Ok(result)
}

fn look(storage: &dyn Storage, path: &Path, cluster: Sectors) -> Result<ImageCheck> {
    let file_bytes = storage
        .len()
        .map_err(|source| Error::io(ErrorKind::Stat, "check: read the file's length", source))?;
    let geometry = Geometry::raw(cluster, file_bytes)?;
    let mut result = summary(path, file_bytes, Some(&geometry));
    result.allocated_clusters = result.entries;
    result.header_in_raw = match probe(storage) {
        Ok(Probe::Image(header)) => Some(sizes_of(&header)),
        Ok(Probe::NotAnImage) => None,
        Err(error) if error.kind() == ErrorKind::Corrupt => None,
        Err(error) => return Err(error),
    };
    if !file_bytes.is_multiple_of(SECTOR_BYTES) {
        let detail = format!("{file_bytes} bytes");
        result.findings.add(Kind::RawLength, Class::A, Some(file_bytes), detail);
        result.outcome = Outcome::Harmless;
    }
    Ok(result)
}
