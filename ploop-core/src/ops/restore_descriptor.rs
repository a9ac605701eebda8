//! A descriptor for a disk that has lost its own: one image, no snapshots.
//!
//! The image says its size and clusters itself; a raw file says only how long it is. Nothing but the descriptor is
//! written, and an existing one is never replaced: it may be the only thing that knows a chain of snapshots.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{CLUSTER_SECTORS_DEFAULT, CLUSTER_SECTORS_MIN, Geometry};
use crate::format::{DESCRIPTOR_NAME, DiskDescriptor, Probe, examine, probe};
use crate::io::file::{self, DirectoryFolder};
use crate::io::lock::{ImageLock, Ownership};
use crate::io::{Access, Folder};
use crate::units::{SECTOR_BYTES, Sectors};

use super::descriptor_lock::{DescriptorLock, lock_timeout};
use super::plan;

/// What to restore.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The folder of the disk.
    pub folder: PathBuf,
    /// The image, by its name or path in that folder.
    pub base: PathBuf,
    /// The image is raw.
    pub raw: bool,
    /// Size of a cluster of a raw disk; the largest from 1 MiB down to 32 KiB that divides it, if none. An image says it
    /// itself, and may be compared with this.
    pub cluster: Option<Sectors>,
    /// How long to wait for the descriptor's lock.
    pub lock_timeout: Duration,
}

impl RestoreOptions {
    /// For the image `base` of the disk in `folder`.
    pub fn new(folder: impl Into<PathBuf>, base: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            base: base.into(),
            raw: false,
            cluster: None,
            lock_timeout: lock_timeout(),
        }
    }
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// The new descriptor.
    pub descriptor: PathBuf,
    /// The image it names.
    pub image: String,
    /// `raw`, `expanded` or `preallocated`.
    pub mode: &'static str,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// What is odd about the image.
    pub warnings: Vec<String>,
}

fn refused(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Parameter, format!("restore descriptor: {message}"))
}

/// Writes the descriptor. Fails with [`ErrorKind::Create`] if there is one, with [`ErrorKind::InUse`] while the image is
/// open for writing.
pub fn restore_descriptor(options: &RestoreOptions) -> Result<RestoreReport> {
    let name = name_in(&options.folder, &options.base)?;
    let descriptor = options.folder.join(DESCRIPTOR_NAME);
    let folder = DirectoryFolder::open(&options.folder)?;
    let storage = folder.open_file(&name, &file::OpenOptions::new(Access::ReadOnly))?;
    let _image_lock = ImageLock::take(&storage, &options.folder.join(&name), Ownership::Reader)?;
    let _lock = DescriptorLock::take(&descriptor, options.lock_timeout)?;
    restore_descriptor_in(&folder, &name, options)
        .map(|report| RestoreReport { descriptor, ..report })
        .map_err(|error| error.at_path(options.folder.join(&name)))
}

/// The name of `base` in `folder`, given as such or with its path.
fn name_in(folder: &Path, base: &Path) -> Result<String> {
    let outside = || {
        refused("the image does not lie in the folder of the disk")
            .at_path(base)
            .advise("a descriptor names images in its own folder: move the image there")
    };
    let name = match base.strip_prefix(folder) {
        Ok(inside) => inside,
        Err(_) => base.strip_prefix(".").unwrap_or(base),
    };
    let name = name.to_str().ok_or_else(|| refused("the name of the image is no text").at_path(base))?;
    if name.is_empty() || name.contains('/') { Err(outside()) } else { Ok(name.to_owned()) }
}

/// As [`restore_descriptor`], in an open folder for the image `name`. Of `options` only `raw` and `cluster` count.
pub fn restore_descriptor_in(
    folder: &dyn Folder,
    name: &str,
    options: &RestoreOptions,
) -> Result<RestoreReport> {
    let exists = folder
        .exists(DESCRIPTOR_NAME)
        .map_err(|cause| Error::io(ErrorKind::Stat, "restore descriptor: look for one", cause))?;
    if exists {
        return Err(Error::new(ErrorKind::Create, "restore descriptor: there is one")
            .at_path(DESCRIPTOR_NAME)
            .advise("it may know snapshots: move it away only if you are sure that it is wrong"));
    }
    if plan::is_unfinished(folder, name)? {
        return Err(Error::new(
            ErrorKind::Busy,
            "restore descriptor: an import or a conversion into this file was cut",
        )
        .advise(format!(
            "run that command again; or, if you are sure that the file is complete, remove {} first",
            plan::PLAN_NAME
        )));
    }
    let storage = folder
        .open(name, Access::ReadOnly)
        .map_err(|cause| file::explain(cause, ErrorKind::Open, "open", Path::new(name)))?;
    let mut warnings = Vec::new();
    let (geometry, preallocated) = if options.raw {
        // Its first bytes decide nothing (M5): a guest may have written them.
        if matches!(probe(&*storage), Ok(Probe::Image(_))) {
            warnings
                .push("the raw disk begins like an image: if it is one, restore without -f raw".to_owned());
        }
        let len = storage
            .len()
            .map_err(|cause| Error::io(ErrorKind::Stat, "restore descriptor: measure the image", cause))?;
        (raw_geometry(len, options.cluster)?, false)
    } else {
        if matches!(probe(&*storage)?, Probe::NotAnImage) {
            return Err(Error::new(ErrorKind::Corrupt, "restore descriptor: this is no ploop image")
                .advise("if it is a raw disk, say so with -f raw"));
        }
        let (header, verdict) = examine(&*storage)?;
        let geometry = header.geometry().clone();
        let own = Sectors(u64::from(geometry.cluster_sectors()));
        if let Some(asked) = options.cluster.filter(|asked| *asked != own) {
            return Err(refused(format!("the image has clusters of {} sectors, not of {}", own.0, asked.0))
                .advise("leave -b away: an image says it itself"));
        }
        if verdict.ambiguous_count > 0 || !verdict.at_end.is_empty() || header.obstacle().is_some() {
            warnings.push("the image is damaged: check it before it is used".to_owned());
        }
        (geometry.clone(), verdict.allocated == u64::from(geometry.entries()))
    };
    let descriptor = DiskDescriptor::for_image(name, &geometry, preallocated)?;
    descriptor.store_new(folder)?;
    Ok(RestoreReport {
        descriptor: PathBuf::from(DESCRIPTOR_NAME),
        image: name.to_owned(),
        mode: descriptor.mode().name(),
        disk_bytes: geometry.disk_bytes(),
        cluster_bytes: geometry.cluster_bytes(),
        warnings,
    })
}

fn raw_geometry(len: u64, asked: Option<Sectors>) -> Result<Geometry> {
    let divides = |cluster: u64| len > 0 && len.is_multiple_of(cluster * SECTOR_BYTES);
    let wrong = |cluster: &str| {
        refused(format!("the raw disk of {len} bytes is no multiple of {cluster}"))
            .advise("extend the file with zeros to a multiple of 32 KiB: truncate -s %32K FILE")
    };
    let cluster = match asked {
        Some(cluster) => {
            let valid = cluster.0.is_power_of_two() && cluster.0 >= u64::from(CLUSTER_SECTORS_MIN);
            if !valid || cluster.0 > u64::from(crate::format::geometry::CLUSTER_SECTORS_MAX) {
                return Err(refused(format!("clusters of {} sectors", cluster.0))
                    .advise("use a power of two from 64 to 131072 sectors"));
            }
            if !divides(cluster.0) {
                return Err(wrong(&format!("clusters of {} sectors", cluster.0)));
            }
            cluster.0
        }
        None => (0..=5)
            .map(|halved| u64::from(CLUSTER_SECTORS_DEFAULT) >> halved)
            .find(|&cluster| divides(cluster))
            .ok_or_else(|| wrong("32 KiB"))?,
    };
    Geometry::raw(Sectors(cluster), len)
}

#[cfg(test)]
mod tests;
