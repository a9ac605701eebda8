//! Simulated hosts with a small chain on them, and how it is opened and read.

use std::sync::Arc;

use ploop_core::error::ErrorKind;
use ploop_core::format::{Chain, ChainOptions, CreateOptions, Geometry, Source, Version, create_image};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::{Access, Alignment, Folder};
use ploop_core::units::Sectors;

use crate::pattern::SECTOR;
pub(crate) use crate::reading::{
    check_length, check_table, describe, has_lost_metadata, is_input_error, read_all,
};

/// The smallest legal cluster: state spaces stay small.
pub(crate) const CLUSTER_SECTORS: u64 = 64;

/// What a world is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Setting {
    pub(crate) version: Version,
    pub(crate) parents: usize,
    pub(crate) clusters: u64,
    /// What files demand of transfers.
    pub(crate) alignment: u32,
}

impl Setting {
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(self.version, Sectors(CLUSTER_SECTORS), Sectors(CLUSTER_SECTORS * self.clusters))
            .unwrap()
    }

    pub(crate) fn sectors(&self) -> u64 {
        CLUSTER_SECTORS * self.clusters
    }

    pub(crate) fn align(&self, disk: &SimDisk) {
        disk.set_alignment(Alignment { offset: self.alignment, memory: self.alignment });
    }
}

/// The names of a chain's files, base first; their numbers are their places.
pub(crate) fn file_name(delta: usize) -> String {
    format!("delta{delta}.hds")
}

/// A host with as many empty images, the top last, all durable.
pub(crate) fn create(setting: &Setting, seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    for delta in 0..=setting.parents {
        let storage = disk.create(&file_name(delta)).unwrap();
        create_image(&storage, &CreateOptions { geometry: setting.geometry(), preallocated: false }).unwrap();
    }
    disk.folder().sync().unwrap();
    disk
}

/// Opens the first `depth` files of a host as a chain; the last is the top.
pub(crate) fn open(disk: &SimDisk, depth: usize, access: Access) -> Result<Arc<Chain>, String> {
    try_open(disk, depth, access).map_err(|error| describe(&error))
}

/// As [`open`], with the error itself.
pub(crate) fn try_open(
    disk: &SimDisk,
    depth: usize,
    access: Access,
) -> Result<Arc<Chain>, ploop_core::Error> {
    let source = |delta: usize| {
        let name = file_name(delta);
        let access = if delta + 1 == depth { access } else { Access::ReadOnly };
        let storage = disk
            .open(&name, access)
            .map_err(|error| ploop_core::Error::io(ErrorKind::Open, "open an image", error).at_path(&name))?;
        Ok(Source { name: name.into(), storage: Arc::new(storage), raw: false })
    };
    let sources = (0..depth).map(source).collect::<Result<Vec<_>, ploop_core::Error>>()?;
    let options = ChainOptions { access, raw_cluster: None, accept_in_use: false };
    Chain::open(sources, &options)
}

/// Bytes of a run of sectors.
pub(crate) fn sectors_len(count: u64) -> usize {
    count as usize * SECTOR
}
