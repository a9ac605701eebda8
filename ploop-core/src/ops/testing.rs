//! Small disks with snapshots in simulated folders, for the tests of operations.

use std::sync::Arc;

use crate::format::{Chain, DiskDescriptor, Guid, Mode, WriteTarget};
use crate::io::sim::{SimDisk, SimFolder};
use crate::io::{Access, Folder, StorageExt};
use crate::ops::create::{CreateOptions, create_in};
use crate::ops::image_files::{open_chain, open_image, source};
use crate::ops::merge::copy::commit;
use crate::ops::progress::Silent;
use crate::ops::snapshot::{SnapshotOptions, snapshot_in};
use crate::units::{GuestCluster, Sectors};

pub(crate) const CLUSTERS: u32 = 16;
pub(crate) const CLUSTER: usize = 64 * 512;

pub(crate) fn guid(number: u32) -> Guid {
    format!("{{00000000-0000-0000-0000-{number:012x}}}").parse().unwrap()
}

/// An empty disk.
pub(crate) fn disk(mode: Mode) -> SimDisk {
    let disk = SimDisk::new(1);
    let options = CreateOptions {
        cluster: Sectors(64),
        mode,
        ..CreateOptions::new("", "root.hds", Sectors(64 * u64::from(CLUSTERS)))
    };
    create_in(&disk.folder(), &options).unwrap();
    disk
}

pub(crate) fn descriptor(folder: &dyn Folder) -> DiskDescriptor {
    DiskDescriptor::load(folder, None).unwrap()
}

/// Opens a state as a guest would see it.
pub(crate) fn open_state(folder: &dyn Folder, state: Guid, access: Access) -> crate::Result<Arc<Chain>> {
    let descriptor = DiskDescriptor::load(folder, None)?;
    let images = descriptor.chain_for(state)?;
    let count = images.len();
    let mut sources = Vec::new();
    for (number, image) in images.into_iter().enumerate() {
        let access = if number + 1 == count { access } else { Access::ReadOnly };
        sources.push(source(&descriptor, image, open_image(folder, image.file(), access)?));
    }
    open_chain(&descriptor, sources, access)
}

/// Fills clusters of the current state with their byte, and closes it.
pub(crate) fn write(folder: &dyn Folder, clusters: &[(u32, u8)]) {
    let chain = open_state(folder, descriptor(folder).top_guid(), Access::ReadWrite).unwrap();
    for &(cluster, byte) in clusters {
        let storage = chain.storage(chain.top());
        match chain.prepare_write(GuestCluster(cluster)).unwrap() {
            WriteTarget::InPlace(place) => storage.write_all_at(place.0, &vec![byte; CLUSTER]).unwrap(),
            WriteTarget::Fresh(prepared) => {
                storage.write_all_at(prepared.offset().0, &vec![byte; CLUSTER]).unwrap();
                prepared.publish();
            }
        }
    }
    commit(&chain).unwrap();
    chain.close().unwrap();
}

/// The first byte of each cluster of a state, all of whose bytes are the same.
pub(crate) fn read(folder: &dyn Folder, state: Guid) -> Vec<u8> {
    let chain = open_state(folder, state, Access::ReadOnly).unwrap();
    let bytes = crate::format::testing::guest_content(&chain);
    bytes
        .chunks(CLUSTER)
        .map(|cluster| {
            assert!(cluster.iter().all(|byte| *byte == cluster[0]));
            cluster[0]
        })
        .collect()
}

pub(crate) fn snapshot(folder: &dyn Folder, number: u32) {
    let options = SnapshotOptions { snapshot: Some(guid(number)), temporary: false };
    snapshot_in(folder, &options, &Silent).unwrap();
}

/// Base 1, on it 2, on that the top; each holds clusters of its own and some that another holds.
pub(crate) fn three(mode: Mode) -> SimDisk {
    let disk = disk(mode);
    let folder = disk.folder();
    write(&folder, &[(0, 1), (1, 1), (2, 1), (9, 1)]);
    snapshot(&folder, 1);
    write(&folder, &[(1, 2), (3, 2), (4, 2), (10, 2)]);
    snapshot(&folder, 2);
    write(&folder, &[(2, 3), (4, 3), (5, 3), (9, 0), (11, 0)]);
    disk
}

/// Every state and its content.
pub(crate) fn states(folder: &dyn Folder) -> Vec<(Guid, Vec<u8>)> {
    let descriptor = descriptor(folder);
    let readable =
        descriptor.shots().iter().filter(|shot| shot.transition().is_none_or(|one| one.is_readable()));
    readable.map(|shot| (shot.guid(), read(folder, shot.guid()))).collect()
}

/// The files of a folder that are images.
pub(crate) fn files(folder: &SimFolder) -> Vec<String> {
    let mut names = folder.list().unwrap();
    names.retain(|name| !name.starts_with(crate::format::DESCRIPTOR_NAME));
    names.sort();
    names
}
