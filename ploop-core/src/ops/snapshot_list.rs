//! The snapshots of a disk and how they hang together, from its descriptor; changing and locking nothing.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{DESCRIPTOR_NAME, Described, DiskDescriptor, Guid, Probe, Shot, probe};
use crate::io::file;
use crate::io::{Access, Storage};
use crate::ops::image_files::is_raw;
use crate::ops::open::{Place, ReadBundle, open_image, place, real_path};

/// One state of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotEntry {
    /// Its name.
    pub uuid: Guid,
    /// The state below it; all zeros for a base.
    pub parent_uuid: Guid,
    /// Whether it is the current one, which is no snapshot.
    pub current: bool,
    /// Its image; the first of a split disk, whose sizes are those of all parts together.
    pub fname: PathBuf,
    /// A state between two descriptors, in the descriptor's word.
    pub transition: Option<&'static str>,
    /// How many images its chain has, itself among them; none if the chain is broken.
    pub depth: Option<usize>,
    /// Size of the disk in this state, in bytes; none if its image cannot be read.
    pub disk_bytes: Option<u64>,
    /// Length of the image file in bytes; none if it cannot be opened.
    pub file_bytes: Option<u64>,
    /// What the file takes on the host, in bytes.
    pub host_bytes: Option<u64>,
    /// When the file was last written, in seconds since 1970: for a snapshot, about when it was taken.
    pub modified_unix_seconds: Option<u64>,
    /// How many names the file has: more than one if clones share it.
    pub names: Option<u64>,
}

/// The states of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotList {
    /// The descriptor.
    pub descriptor: PathBuf,
    /// In the order of the descriptor.
    pub states: Vec<SnapshotEntry>,
}

/// Lists the states of the disk at `path`, a descriptor or its folder.
pub fn snapshot_list(path: &Path) -> Result<SnapshotList> {
    let Place::Bundle(folder) = place(path)? else {
        return Err(
            Error::new(ErrorKind::Parameter, "only a disk with a descriptor has snapshots").at_path(path)
        );
    };
    let bundle = ReadBundle::open(&folder, false)?;
    let real = real_path(&folder)?;
    let mut states: Vec<SnapshotEntry> = Vec::new();
    match &bundle.described {
        Described::Whole(descriptor) => {
            for shot in descriptor.shots() {
                states.push(entry(&bundle, descriptor, shot, &real)?);
            }
        }
        Described::Split(split) => {
            for part in split.parts() {
                for shot in part.descriptor.shots() {
                    let of_part = entry(&bundle, &part.descriptor, shot, &real)?;
                    match states.iter_mut().find(|one| one.uuid == of_part.uuid) {
                        Some(state) => state.add(&of_part),
                        None => states.push(of_part),
                    }
                }
            }
        }
    }
    Ok(SnapshotList { descriptor: real.join(DESCRIPTOR_NAME), states })
}

/// A state by its image.
fn entry(
    bundle: &ReadBundle,
    descriptor: &DiskDescriptor,
    shot: &Shot,
    real: &Path,
) -> Result<SnapshotEntry> {
    let guid = shot.guid();
    let image = descriptor.image(guid).ok_or_else(|| {
        Error::new(ErrorKind::Descriptor, format!("the shot {guid} has no image")).at_path(real)
    })?;
    // A file that is missing is told by its absent sizes.
    let reading = file::OpenOptions::new(Access::ReadOnly);
    let storage = open_image(&bundle.folder, real, image, &reading, &[]).ok().map(|(storage, _)| storage);
    let metadata = storage.as_ref().and_then(|storage| storage.metadata().ok());
    Ok(SnapshotEntry {
        uuid: guid,
        parent_uuid: shot.parent(),
        current: guid == descriptor.top_guid(),
        fname: real.join(image.file()),
        transition: shot.transition().map(|transition| transition.name()),
        depth: descriptor.chain_for(guid).ok().map(|chain| chain.len()),
        disk_bytes: storage.as_ref().and_then(|storage| disk_bytes(storage, is_raw(descriptor, guid))),
        file_bytes: metadata.as_ref().map(|metadata| metadata.len()),
        host_bytes: storage.as_ref().and_then(|storage| storage.allocated_bytes().ok()),
        modified_unix_seconds: metadata
            .as_ref()
            .and_then(|metadata| metadata.modified().ok())
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .map(|since| since.as_secs()),
        names: metadata.as_ref().map(|metadata| metadata.nlink()),
    })
}

impl SnapshotEntry {
    /// Adds what another part of a split disk has of the same state.
    fn add(&mut self, part: &Self) {
        let sum = |one: Option<u64>, other: Option<u64>| {
            one.zip(other).map(|(one, other)| one.saturating_add(other))
        };
        self.disk_bytes = sum(self.disk_bytes, part.disk_bytes);
        self.file_bytes = sum(self.file_bytes, part.file_bytes);
        self.host_bytes = sum(self.host_bytes, part.host_bytes);
        self.modified_unix_seconds = self.modified_unix_seconds.max(part.modified_unix_seconds);
        self.names = self.names.max(part.names);
        self.depth = self.depth.zip(part.depth).map(|(one, other)| one.max(other));
    }
}

/// The size that an image gives its state.
fn disk_bytes(storage: &dyn Storage, raw: bool) -> Option<u64> {
    if raw {
        return storage.len().ok();
    }
    match probe(storage) {
        Ok(Probe::Image(header)) => Some(header.geometry().disk_bytes()),
        _ => None,
    }
}

impl SnapshotList {
    /// The state of that name.
    pub fn find(&self, guid: Guid) -> Result<&SnapshotEntry> {
        self.states.iter().find(|entry| entry.uuid == guid).ok_or_else(|| {
            Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {guid}"))
                .at_path(&self.descriptor)
        })
    }
}
