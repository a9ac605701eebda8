//! Where the bytes of a disk lie: extents in the order of the guest's disk, one after the other, without gaps.
//!
//! The fields are those of `qemu-img map --output=json`, so that scripts for it work: `depth` counts from the top (0)
//! downwards, `present` says whether any image holds the extent, `data` whether it has to be read, `zero` whether it
//! reads as zeros for sure. An extent that no image holds has the depth of the base.
//!
//! Nothing is collected: a disk of any size takes the memory of one extent and of the tables that opening it takes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, Guid, Mapping};
use crate::io::Access;
use crate::ops::open::{OpenOptions, open};
use crate::units::GuestOffset;

/// What to map.
#[derive(Clone, Debug, Default)]
pub struct MapOptions {
    /// A descriptor, its folder, or an image that needs no other.
    pub path: PathBuf,
    /// The state to map; the current one if none.
    pub snapshot: Option<Guid>,
}

/// What is known before the extents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapHead {
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Names of the files, by depth: the top first.
    pub files: Vec<String>,
    /// Length of the top's file in bytes.
    pub file_bytes: u64,
    /// First byte of the top's file that may hold data of the guest.
    pub data_start: u64,
}

/// A run of the guest's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapExtent {
    /// First byte on the guest's disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// How far below the top the file is that holds it; 0 is the top.
    pub depth: u32,
    /// Whether any file holds it.
    pub present: bool,
    /// Whether it reads as zeros for sure.
    pub zero: bool,
    /// Whether it has to be read.
    pub data: bool,
    /// Never here.
    pub compressed: bool,
    /// Where in the file it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
}

impl MapExtent {
    /// Makes this one longer if `next` goes on where it ends, in the same way.
    fn join(&mut self, next: &Self) -> bool {
        let goes_on = match (self.offset, next.offset) {
            (None, None) => true,
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            _ => false,
        };
        let is_same = (self.depth, self.present, self.zero, self.data)
            == (next.depth, next.present, next.zero, next.data);
        if goes_on && is_same && self.start.checked_add(self.length) == Some(next.start) {
            self.length += next.length;
            return true;
        }
        false
    }
}

/// Maps a disk that nobody writes to: `begin` hears what is known before, `visit` of each extent, with its file.
pub fn map(
    options: &MapOptions,
    begin: &mut dyn FnMut(&MapHead) -> Result<()>,
    visit: &mut dyn FnMut(MapExtent) -> Result<()>,
) -> Result<()> {
    let access =
        OpenOptions { snapshot: options.snapshot, ..OpenOptions::new(&options.path, Access::ReadOnly) };
    let opened = open(&access)?;
    let head = head(&opened.chain)?;
    begin(&head)?;
    extents(&opened.chain, &mut |extent| {
        let filename = extent.offset.and_then(|_| head.files.get(extent.depth as usize).cloned());
        visit(MapExtent { filename, ..extent })
    })
}

/// What is known of an open chain before its extents.
pub fn head(chain: &Chain) -> Result<MapHead> {
    let name = |path: &Path| path.display().to_string();
    let top = chain.top();
    let file_bytes = chain.storage(top).len().map_err(|cause| {
        Error::io(ErrorKind::Stat, "map: measure the image", cause).at_path(chain.name(top))
    })?;
    Ok(MapHead {
        disk_bytes: chain.geometry().disk_bytes(),
        cluster_bytes: chain.geometry().cluster_bytes(),
        files: (0..chain.depth()).rev().map(|delta| name(chain.name(delta))).collect(),
        file_bytes,
        data_start: chain.geometry().data_start().0,
    })
}

/// The extents of an open chain, without the names of files. A running disk may change meanwhile: each extent was true
/// when it was looked at.
pub fn extents(chain: &Chain, visit: &mut dyn FnMut(MapExtent) -> Result<()>) -> Result<()> {
    let end = chain.geometry().disk_bytes();
    let mut last: Option<MapExtent> = None;
    let mut at = 0;
    while at < end {
        let found = look(chain, at, end - at)?;
        // Every extent is at least a byte long.
        at = at.saturating_add(found.length.max(1));
        if last.as_mut().is_some_and(|last| last.join(&found)) {
            continue;
        }
        if let Some(done) = last.replace(found) {
            visit(done)?;
        }
    }
    last.map_or(Ok(()), visit)
}

/// What holds for the bytes from `at` on, `len_max` at most.
fn look(chain: &Chain, at: u64, len_max: u64) -> Result<MapExtent> {
    let top = chain.top();
    let depth_of = |delta: usize| u32::try_from(top.saturating_sub(delta)).unwrap_or(u32::MAX);
    let extent = MapExtent {
        start: at,
        length: len_max,
        depth: depth_of(0),
        present: false,
        zero: true,
        data: false,
        compressed: false,
        offset: None,
        filename: None,
    };
    let (delta, offset, len) = match chain.map(GuestOffset(at), len_max) {
        Mapping::Zero { len } => return Ok(MapExtent { length: len.min(len_max), ..extent }),
        Mapping::Data { delta, offset, len } => (delta, offset.0, len.min(len_max)),
    };
    let held = MapExtent {
        length: len,
        depth: depth_of(delta),
        present: true,
        zero: false,
        data: true,
        offset: Some(offset),
        ..extent
    };
    if !chain.delta_geometry(delta).is_raw() {
        return Ok(held);
    }
    // A raw file says itself where its holes are.
    let data = chain.storage(delta).next_data(offset).map_err(|cause| {
        Error::io(ErrorKind::Read, "map: look for holes", cause).at_path(chain.name(delta)).at_offset(offset)
    })?;
    let hole = |length: u64| MapExtent { length, zero: true, data: false, ..held.clone() };
    Ok(match data {
        Some((start, stop)) if start <= offset => {
            MapExtent { length: len.min(stop.saturating_sub(offset)).max(1), ..held }
        }
        Some((start, _)) => hole(len.min(start - offset)),
        None => hole(len),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Client, Disk, DiskOptions};
    use crate::io::best_io_queue;
    use crate::ops::create::{CreateOptions, create};
    use crate::units::Sectors;

    const MIB: u64 = 1 << 20;

    fn collect(path: &Path) -> (MapHead, Vec<MapExtent>) {
        let (mut head, mut all) = (MapHead::default(), Vec::new());
        map(
            &MapOptions { path: path.to_path_buf(), snapshot: None },
            &mut |found| {
                head = found.clone();
                Ok(())
            },
            &mut |extent| {
                all.push(extent);
                Ok(())
            },
        )
        .unwrap();
        (head, all)
    }

    #[test]
    fn extents_follow_each_other_and_name_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = create(&CreateOptions::new(folder.path(), "root.hds", Sectors(16 * 2048))).unwrap().image;
        let opened = open(&OpenOptions::new(&path, Access::ReadWrite)).unwrap();
        let disk = Disk::open(opened.chain, DiskOptions::default()).unwrap();
        let mut client = Client::new(&disk, best_io_queue(8).unwrap()).unwrap();
        for cluster in [1, 2, 5, 4] {
            client.write(cluster * MIB, &[1; 512]).unwrap();
        }
        let mut running = Vec::new();
        extents(&disk.chain(), &mut |extent| {
            running.push(extent);
            Ok(())
        })
        .unwrap();
        drop(client);
        disk.close().unwrap();
        drop(disk);
        let (head, all) = collect(&path);
        assert_eq!((head.disk_bytes, head.data_start, head.file_bytes), (16 * MIB, MIB, 5 * MIB));
        let seen: Vec<_> = all.iter().map(|one| (one.start / MIB, one.length / MIB, one.offset)).collect();
        let expected = [
            (0, 1, None),
            (1, 2, Some(MIB)),
            (3, 1, None),
            (4, 1, Some(4 * MIB)),
            (5, 1, Some(3 * MIB)),
            (6, 10, None),
        ];
        assert_eq!(seen, expected);
        assert!(all.iter().all(|one| one.present == one.filename.is_some() && one.data != one.zero));
        let unnamed: Vec<_> = all.into_iter().map(|one| MapExtent { filename: None, ..one }).collect();
        assert_eq!(running, unnamed);
    }

    #[test]
    fn a_huge_empty_disk_is_one_extent() {
        let folder = tempfile::tempdir().unwrap();
        let path = create(&CreateOptions::new(folder.path(), "root.hds", Sectors(16 << 31))).unwrap().image;
        let (_, all) = collect(&path);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].length, all[0].present), (16 << 40, false));
    }
}
