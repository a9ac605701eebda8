//! Simulated hosts with a small chain on them, and how it is opened and read.

use std::sync::Arc;

use ploop_core::format::{
    Chain, ChainOptions, CreateOptions, Geometry, InUse, Mapping, Source, Version, create_image, examine,
};
use ploop_core::io::sim::{SimDisk, SimStorage};
use ploop_core::io::{Access, Alignment, Folder, Storage, StorageExt};
use ploop_core::units::{GuestCluster, GuestOffset, Sectors};

use crate::model::{SECTOR, values};

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
    let source = |delta: usize| {
        let name = file_name(delta);
        let access = if delta + 1 == depth { access } else { Access::ReadOnly };
        let storage = disk.open(&name, access).map_err(|error| format!("open {name}: {error}"))?;
        Ok(Source { name: name.into(), storage: Arc::new(storage), raw: false })
    };
    let sources = (0..depth).map(source).collect::<Result<Vec<_>, String>>()?;
    let options = ChainOptions { access, raw_cluster: None, accept_in_use: false };
    Chain::open(sources, &options).map_err(|error| describe(&error))
}

/// An error with its causes.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// The value of every sector, as the table in memory has it.
pub(crate) fn read_all(chain: &Chain) -> Result<Vec<u64>, String> {
    let end = chain.geometry().disk_bytes();
    let mut bytes = vec![0; end as usize];
    let mut at = 0;
    while at < end {
        at += match chain.map(GuestOffset(at), end - at) {
            Mapping::Zero { len } => len,
            Mapping::Data { delta, offset, len } => {
                let target = &mut bytes[at as usize..(at + len) as usize];
                chain
                    .storage(delta)
                    .read_exact_at(offset.0, target)
                    .map_err(|error| format!("read guest byte {at} at {offset} of delta {delta}: {error}"))?;
                len
            }
        };
    }
    values(&bytes, 0)
}

/// Sound table, as the invariants I1 and I2 demand of every durable state; whether the header says "closed".
pub(crate) fn check_table(storage: &SimStorage) -> Result<bool, String> {
    let (header, verdict) = examine(storage).map_err(|error| format!("examine: {}", describe(&error)))?;
    if let Some(wrong) = verdict.ambiguous.iter().chain(&verdict.at_end).next() {
        return Err(format!("table: entry {:#x} of {} {}", wrong.raw, wrong.cluster, wrong.finding));
    }
    match header.in_use() {
        InUse::Open => Ok(false),
        InUse::Closed | InUse::ClosedWithExtension => Ok(true),
        InUse::Other(value) => Err(format!("the in-use mark is {value:#x}")),
    }
}

/// A closed image ends with its last used cluster.
pub(crate) fn check_length(chain: &Chain) -> Result<(), String> {
    let (geometry, top) = (chain.geometry(), chain.top());
    let used = (0..geometry.entries()).filter_map(|cluster| chain.held_at(top, GuestCluster(cluster)));
    let data_end = used.map(|offset| offset.0 + geometry.cluster_bytes()).max().unwrap_or(0);
    let expected = data_end.max(geometry.data_start().0).max(geometry.cluster_bytes());
    let found = chain.storage(top).len().map_err(|error| error.to_string())?;
    if found == expected {
        return Ok(());
    }
    Err(format!("a closed image is {found} bytes long, its last cluster ends at {expected}"))
}

/// Bytes of a run of sectors.
pub(crate) fn sectors_len(count: u64) -> usize {
    count as usize * SECTOR
}
