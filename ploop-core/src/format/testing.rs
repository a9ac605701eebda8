//! Small simulated files for the unit tests of this layer.

use std::sync::Arc;

use super::chain::{Chain, ChainOptions, Source};
use super::delta::{CreateOptions, create_image};
use super::geometry::{Geometry, Version};
use super::header::InUse;
use crate::error::Result;
use crate::io::sim::{SimDisk, SimStorage};
use crate::io::{Access, Folder, Storage, StorageExt};
use crate::units::{GuestOffset, Sectors};

use super::Mapping;

/// A simulated host with one durable file of these bytes.
pub(crate) fn file_of(bytes: &[u8]) -> SimStorage {
    let file = SimDisk::new(0).create("image").unwrap();
    file.write_all_at(0, bytes).unwrap();
    file.sync_data().unwrap();
    file.disk().folder().sync().unwrap();
    file
}

/// A simulated host with one durable, empty file of this length.
pub(crate) fn file_with_len(len: u64) -> SimStorage {
    let file = file_of(&[]);
    file.set_len(len).unwrap();
    file.sync_data().unwrap();
    file
}

/// What a file holds now.
pub(crate) fn content(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(0, &mut bytes).unwrap();
    bytes
}

/// Sizes of an image with clusters of 4 KiB.
pub(crate) fn small(clusters: u64) -> Geometry {
    Geometry::for_testing(Version::V2, Sectors(8), Sectors(8 * clusters)).unwrap()
}

/// An image with clusters of 4 KiB.
pub(crate) fn image(clusters: u64) -> SimStorage {
    let file = file_of(&[]);
    create_image(&file, &CreateOptions { geometry: small(clusters), preallocated: false }).unwrap();
    file
}

/// Opens files as a chain, base first.
pub(crate) fn open(files: &[&SimStorage], access: Access) -> Result<Arc<Chain>> {
    let source =
        |file: &&SimStorage| Source { name: "image".into(), storage: Arc::new((*file).clone()), raw: false };
    let options = ChainOptions { access, raw_cluster: None, accept_in_use: false };
    Chain::open(files.iter().map(source).collect(), &options)
}

/// Sets a table entry of an image in its file.
pub(crate) fn set_entry(file: &dyn Storage, cluster: u64, raw: u32) {
    file.write_all_at(64 + 4 * cluster, &raw.to_le_bytes()).unwrap();
    file.sync_data().unwrap();
}

/// Sets the in-use mark of an image in its file.
pub(crate) fn set_mark(file: &dyn Storage, mark: InUse) {
    file.write_all_at(44, &mark.encode().to_le_bytes()).unwrap();
    file.sync_data().unwrap();
}

/// All a guest sees through a chain.
pub(crate) fn guest_content(chain: &Chain) -> Vec<u8> {
    try_guest_content(chain).unwrap()
}

/// All a guest sees through a chain, if it can be read.
pub(crate) fn try_guest_content(chain: &Chain) -> std::io::Result<Vec<u8>> {
    let disk_bytes = chain.geometry().disk_bytes();
    let mut bytes = vec![0; usize::try_from(disk_bytes).unwrap()];
    let mut at = 0;
    while at < disk_bytes {
        let mapping = chain.map(GuestOffset(at), disk_bytes - at);
        if let Mapping::Data { delta, offset, len } = mapping {
            let place = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
            chain.storage(delta).read_exact_at(offset.0, &mut bytes[place])?;
        }
        assert!(!mapping.is_empty());
        at += mapping.len();
    }
    Ok(bytes)
}

/// One group of flushes, as the device does it; returns the clusters that left quarantine.
pub(crate) fn flush(chain: &Chain) -> Vec<crate::units::FileCluster> {
    let storage = chain.storage(chain.top());
    let plan = chain.seal();
    storage.sync_data().unwrap();
    if !plan.is_empty() {
        for (offset, bytes) in &plan.writes {
            storage.write_all_at(offset.0, bytes).unwrap();
        }
        storage.sync_data().unwrap();
    }
    chain.committed(plan)
}
