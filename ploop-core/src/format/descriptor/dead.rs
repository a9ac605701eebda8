//! What hangs in the air in a descriptor: a snapshot without an image, an image without a snapshot. A snapshot deleted or
//! merged half by another tool leaves them.
//!
//! They are set aside on reading, so that they do not take the current state with them, and written back as they were
//! by operations that do not touch snapshots. Those that do refuse until they are [dropped](DiskDescriptor::drop_dead).

use std::collections::BTreeSet;

use crate::error::{Error, ErrorKind, Result};

use super::{DiskDescriptor, Guid, Image, Shot};

/// The entries that are set aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Dead {
    pub(super) shots: Vec<Shot>,
    pub(super) images: Vec<Image>,
}

impl Dead {
    /// Takes out what has no counterpart. What the top needs stays: without it there is no disk.
    pub(super) fn set_aside(images: &mut Vec<Image>, shots: &mut Vec<Shot>, top: Guid) -> Self {
        let imaged: BTreeSet<Guid> = images.iter().map(|image| image.guid).collect();
        let shot: BTreeSet<Guid> = shots.iter().map(|shot| shot.guid).collect();
        let dead_shots = shots.extract_if(.., |shot| shot.guid != top && !imaged.contains(&shot.guid));
        let dead_shots = dead_shots.collect();
        let dead_images = images.extract_if(.., |image| image.guid != top && !shot.contains(&image.guid));
        Self { shots: dead_shots, images: dead_images.collect() }
    }

    fn is_empty(&self) -> bool {
        self.shots.is_empty() && self.images.is_empty()
    }
}

impl DiskDescriptor {
    /// Whether `guid` names a snapshot without image, or an image without snapshot.
    pub fn is_dead(&self, guid: Guid) -> bool {
        self.dead_guids().any(|dead| dead == guid)
    }

    /// The GUIDs of those.
    pub fn dead_guids(&self) -> impl Iterator<Item = Guid> + '_ {
        let shots = self.dead.shots.iter().map(|shot| shot.guid);
        shots.chain(self.dead.images.iter().map(|image| image.guid))
    }

    /// The files of images without snapshot: left alone whatever else is tidied.
    pub fn dead_files(&self) -> impl Iterator<Item = &str> {
        self.dead.images.iter().map(|image| image.file.as_str())
    }

    /// What hangs in the air, in words, each with the way to be rid of it.
    pub fn dead_words(&self) -> Vec<String> {
        let drop = |guid: Guid| format!("`ploop snapshot-delete -u {guid}` drops it from the descriptor");
        let shots = self.dead.shots.iter().map(|shot| {
            format!("the snapshot {} has no image and cannot be read; {}", shot.guid, drop(shot.guid))
        });
        let images = self.dead.images.iter().map(|image| {
            format!(
                "the image {} ({:?}) belongs to no snapshot; {} and leaves the file",
                image.guid,
                image.file,
                drop(image.guid)
            )
        });
        shots.chain(images).collect()
    }

    /// Drops the entry `guid` that hangs in the air. Its file, if it has one, stays. Fails with
    /// [`ErrorKind::NoSnapshot`] if there is none of that name.
    pub fn drop_dead(&mut self, guid: Guid) -> Result<()> {
        if !self.is_dead(guid) {
            return Err(Error::new(
                ErrorKind::NoSnapshot,
                format!("there is no snapshot {guid} without an image"),
            ));
        }
        self.dead.shots.retain(|shot| shot.guid != guid);
        self.dead.images.retain(|image| image.guid != guid);
        Ok(())
    }

    /// Refuses a change of snapshots while anything hangs in the air: what stands on what is not known then.
    pub(super) fn check_alive(&self) -> Result<()> {
        if self.dead.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Descriptor,
            format!("change snapshots: first {}", self.dead_words().first().map_or("", String::as_str)),
        )
        .advise("drop what is dead, behind a copy of the descriptor, with `ploop snapshot-delete -u GUID`; then try again"))
    }

    /// Whether something that hangs in the air stands on `guid`.
    pub fn has_dead_child(&self, guid: Guid) -> bool {
        self.dead.shots.iter().any(|shot| shot.parent == guid)
    }
}
