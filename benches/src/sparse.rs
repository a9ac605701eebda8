//! Images of many TiB that take almost nothing on the host: all entries are there, the clusters they name are holes.

use crate::work::Failure;
use ploop_core::format::{CreateOptions, Geometry, Version, create_image};
use ploop_core::io::file::{Caching, FileStorage};
use ploop_core::io::{Storage, StorageExt};
use ploop_core::units::{FileCluster, Sectors};
use std::path::{Path, PathBuf};

/// Longer than a file of ext4 can be.
const LONG_FILE_BYTES: u64 = 17 << 40;
/// A tmpfs, on every Linux.
const MEMORY_FOLDER: &str = "/dev/shm";

/// Makes an image; with `full` every cluster has a place.
pub fn image(path: &Path, clusters: u64, cluster_sectors: u64, full: bool) -> Result<(), Failure> {
    let geometry = Geometry::new(Version::V2, Sectors(cluster_sectors), Sectors(cluster_sectors * clusters))?;
    let file = FileStorage::create_exclusive(path, Caching::Cached)?;
    create_image(&file, &CreateOptions { geometry: geometry.clone(), preallocated: false })?;
    if full {
        let first = geometry.first_data_cluster().0;
        let end = first + geometry.entries();
        let mut table = Vec::new();
        for cluster in first..end {
            table.extend(geometry.cluster_to_entry(FileCluster(cluster))?.to_le_bytes());
        }
        file.write_all_at(64, &table)?;
        file.set_len(geometry.file_offset(FileCluster(end)).0)?;
    }
    file.sync_data()?;
    Ok(())
}

/// A new folder that takes files of more than 16 TiB: below `wanted`, else in memory.
pub fn folder_for_long_files(wanted: &Path) -> Result<Option<tempfile::TempDir>, Failure> {
    for base in [wanted.to_path_buf(), PathBuf::from(MEMORY_FOLDER)] {
        let Ok(folder) = tempfile::Builder::new().prefix("ploop-bench-").tempdir_in(base) else { continue };
        let probe = std::fs::File::create(folder.path().join("probe"))?;
        if probe.set_len(LONG_FILE_BYTES).is_ok() {
            std::fs::remove_file(folder.path().join("probe"))?;
            return Ok(Some(folder));
        }
    }
    Ok(None)
}
