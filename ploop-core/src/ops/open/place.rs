//! What a path that was typed names: a bundle, or one image.
//!
//! Beside a descriptor and its folder that are the two other names a disk of Parallels Desktop goes by there: the empty
//! file `NAME.hdd` in its bundle, and the machine's folder `NAME.pvm` around a single bundle.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::DESCRIPTOR_NAME;
use crate::io::file;

/// Most entries of a machine's folder that are looked at.
const MACHINE_ENTRIES_MAX: usize = 10_000;
/// Most bundles that a message names.
const NAMED_MAX: usize = 8;

/// A disk named by a path: its bundle, or one image.
pub(in crate::ops) enum Place {
    /// The folder of a descriptor.
    Bundle(PathBuf),
    /// An image.
    Image(PathBuf),
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
}

fn parent_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).to_path_buf()
}

/// What `path` names: a folder, a `DiskDescriptor.xml` and what [`followed`] finds are bundles, everything else an image.
pub(in crate::ops) fn place(path: &Path) -> Result<Place> {
    let path = &followed(path)?;
    let metadata =
        std::fs::metadata(path).map_err(|error| file::explain(error, ErrorKind::Open, "open disk", path))?;
    if metadata.is_dir() {
        return Ok(Place::Bundle(path.clone()));
    }
    if path.file_name().is_some_and(|name| name == DESCRIPTOR_NAME) {
        return Ok(Place::Bundle(parent_of(path)));
    }
    Ok(Place::Image(path.clone()))
}

/// The bundle that is meant by the empty `NAME.hdd` in it, or by the folder `NAME.pvm` of the machine it belongs to;
/// any other path is given back as it is. Fails with [`ErrorKind::Parameter`] if a machine has several disks.
pub fn followed(path: &Path) -> Result<PathBuf> {
    // What cannot be looked at is told by whoever opens it.
    let Ok(metadata) = std::fs::metadata(path) else { return Ok(path.to_path_buf()) };
    if metadata.is_file() {
        let is_marker = has_extension(path, "hdd") && metadata.len() == 0;
        let folder = parent_of(path);
        return Ok(if is_marker && folder.join(DESCRIPTOR_NAME).is_file() {
            folder
        } else {
            path.to_path_buf()
        });
    }
    if !metadata.is_dir() || !has_extension(path, "pvm") || path.join(DESCRIPTOR_NAME).exists() {
        return Ok(path.to_path_buf());
    }
    let listed = std::fs::read_dir(path)
        .map_err(|error| file::explain(error, ErrorKind::Open, "look for the disk of a machine", path))?;
    let entries = listed.take(MACHINE_ENTRIES_MAX).filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let mut bundles: Vec<PathBuf> = entries.filter(|entry| entry.join(DESCRIPTOR_NAME).is_file()).collect();
    bundles.sort();
    match bundles.as_slice() {
        [] => Ok(path.to_path_buf()),
        [only] => Ok(only.clone()),
        several => {
            let names: Vec<String> = several
                .iter()
                .take(NAMED_MAX)
                .map(|bundle| format!("{:?}", bundle.file_name().unwrap_or_default()))
                .collect();
            Err(Error::new(
                ErrorKind::Parameter,
                format!("this machine has {} disks: {}", several.len(), names.join(", ")),
            )
            .at_path(path)
            .advise("give one of them"))
        }
    }
}
