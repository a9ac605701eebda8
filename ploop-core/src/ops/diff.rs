//! Where two states of a disk differ, from the tables alone: no guest data is read.
//!
//! Two states that take a cluster from the same place of the same file have the same bytes there, for an image that
//! others stand on is never written (I7). Everything else counts as different, also where the bytes happen to agree.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::Result;
use crate::format::{Chain, Guid, Mapping};
use crate::io::Access;
use crate::io::file::Caching;
use crate::ops::open::{OpenOptions, open};
use crate::units::GuestOffset;

/// What to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffOptions {
    /// The descriptor of the disk, or its folder.
    pub path: PathBuf,
    /// The earlier state.
    pub from: Guid,
    /// The later state; the current one if none.
    pub to: Option<Guid>,
}

/// A run of guest bytes that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DiffExtent {
    /// First guest byte.
    pub start: u64,
    /// How many.
    pub length: u64,
    /// Whether an image of the later state holds them; else they read as zeros there.
    pub present: bool,
    /// The opposite, as other programs name it.
    pub zero: bool,
    /// Whether they lie past the end of the earlier state.
    pub beyond_from: bool,
}

/// Where two states differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiffReport {
    /// The earlier state.
    pub from: Guid,
    /// The later state; none for the current one.
    pub to: Option<Guid>,
    /// Size of the earlier state in bytes.
    pub from_bytes: u64,
    /// Size of the later state in bytes.
    pub to_bytes: u64,
    /// Bytes in all extents.
    pub changed_bytes: u64,
    /// Ascending, within the size of the later state.
    pub extents: Vec<DiffExtent>,
}

/// Compares two states of a disk. A snapshot can be compared while the disk is used; the current state only when
/// nobody writes it.
pub fn diff(options: &DiffOptions) -> Result<DiffReport> {
    let state = |path: &Path, snapshot| {
        let options =
            OpenOptions { snapshot, caching: Caching::Cached, ..OpenOptions::new(path, Access::ReadOnly) };
        open(&options).map(|opened| opened.chain)
    };
    let from = state(&options.path, Some(options.from))?;
    let to = state(&options.path, options.to)?;
    let extents = differences(&from, &to);
    Ok(DiffReport {
        from: options.from,
        to: options.to,
        from_bytes: from.geometry().disk_bytes(),
        to_bytes: to.geometry().disk_bytes(),
        changed_bytes: extents.iter().map(|extent| extent.length).fold(0, u64::saturating_add),
        extents,
    })
}

/// The extents of `to` that it does not take from the same place as `from`; the chains belong to one disk.
pub fn differences(from: &Chain, to: &Chain) -> Vec<DiffExtent> {
    let disk = to.geometry().disk_bytes();
    let from_bytes = from.geometry().disk_bytes();
    let mut extents: Vec<DiffExtent> = Vec::new();
    let mut at = 0;
    while at < disk {
        let beyond_from = at >= from_bytes;
        let limit = if beyond_from { disk } else { disk.min(from_bytes) } - at;
        let new = to.map(GuestOffset(at), limit);
        let old = from.map(GuestOffset(at), new.len());
        let len = new.len().min(old.len()).min(limit).max(1);
        let same = !beyond_from
            && match (old, new) {
                (Mapping::Zero { .. }, Mapping::Zero { .. }) => true,
                (
                    Mapping::Data { delta: a, offset: a_offset, .. },
                    Mapping::Data { delta: b, offset: b_offset, .. },
                ) => a_offset == b_offset && from.name(a) == to.name(b),
                _ => false,
            };
        if !same {
            let present = matches!(new, Mapping::Data { .. });
            match extents.last_mut() {
                Some(last)
                    if last.start + last.length == at
                        && (last.present, last.beyond_from) == (present, beyond_from) =>
                {
                    last.length += len;
                }
                _ => {
                    extents.push(DiffExtent { start: at, length: len, present, zero: !present, beyond_from })
                }
            }
        }
        at += len;
    }
    extents
}

#[cfg(test)]
mod tests;
