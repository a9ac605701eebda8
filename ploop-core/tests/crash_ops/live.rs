//! Snapshots of a running disk, made and deleted: the disk is opened, served, changed and closed on the simulated host.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::{Access, Folder, QueueChoice, Storage};
use ploop_core::ops::live::{Bundle, DeleteOptions, NoWriters, SnapshotOptions, delete, snapshot};
use ploop_core::ops::{Progress, Silent};

use crate::bundle::{CLUSTER_SECTORS, Shape, guid, open_state, unchanged_but};
use crate::harness::{Case, survives};

pub(crate) struct Simulated<'a>(pub(crate) &'a dyn Folder);

impl Bundle for Simulated<'_> {
    fn folder(&self) -> &dyn Folder {
        self.0
    }
    fn path(&self) -> &Path {
        Path::new("")
    }
    fn open_image(&self, file: &str, access: Access, _raw: bool) -> Result<Arc<dyn Storage>, Error> {
        self.0.open(file, access).map_err(|error| Error::io(ErrorKind::Open, "open an image", error))
    }
    fn unused_images(&self) -> &dyn Folder {
        self.0
    }
    fn remove_image(&self, file: &str) -> Result<(), Error> {
        match self.0.unlink(file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(ErrorKind::Unlink, "remove an image", error))
            }
            _ => Ok(()),
        }
    }
}

fn descriptor(folder: &dyn Folder) -> Result<DiskDescriptor, Error> {
    DiskDescriptor::load(folder, None)
}

/// Serves the current state of a bundle, as `mount` does, while `work` goes on.
fn serving<T>(
    folder: &dyn Folder,
    work: impl FnOnce(&Arc<Disk>, &dyn Bundle) -> Result<T, Error>,
) -> Result<(), Error> {
    let chain = open_state(folder, &descriptor(folder)?, Guid::TOP, Access::ReadWrite)?;
    let disk = Disk::open(chain, DiskOptions { manual_flusher: true, ..DiskOptions::default() })?;
    work(&disk, &Simulated(folder))?;
    disk.close()
}

#[test]
fn a_snapshot_of_a_running_disk_survives_every_crash() {
    for shape in [
        Shape::of(1),
        Shape::of(1).holed().not_closed(),
        Shape::of(2).version_1(),
        Shape::of(1).on_raw(),
        Shape::of(3),
    ] {
        survives(&Case::new(format!("snapshot {shape:?}"), shape.bundle(), |folder| {
            if descriptor(folder)?.shot(guid(50)).is_some() {
                return serving(folder, |_, _| Ok(()));
            }
            serving(folder, |disk, bundle| {
                let options = SnapshotOptions { snapshot: Some(guid(50)), ..SnapshotOptions::default() };
                let report = snapshot(disk, bundle, &mut NoWriters, &options)?;
                match report.warnings.first() {
                    None => Ok(()),
                    Some(warning) => Err(Error::new(ErrorKind::Sync, warning.clone())
                        .caused_by(std::io::Error::from_raw_os_error(libc_of(warning)))),
                }
            })
        }));
    }
}

/// The harness wants to hear of a full host by its number.
fn libc_of(warning: &str) -> i32 {
    if warning.contains("No space") { 28 } else { 5 }
}

#[test]
fn deleting_a_snapshot_of_a_running_disk_survives_every_crash() {
    for (shape, number) in [
        // The child is the running top.
        (Shape::of(2), 0),
        (Shape::of(2).version_1().not_closed(), 0),
        (Shape::of(2).on_raw(), 0),
        (Shape::of(3).holed(), 1),
        // The child is frozen.
        (Shape::of(3).holed(), 0),
        (Shape::of(3).on_raw().not_closed(), 0),
        (Shape::of(4).version_1(), 1),
    ] {
        let gone = shape.snapshot(number);
        survives(
            &Case::new(format!("delete {number} of {shape:?}"), shape.bundle(), move |folder| {
                serving(folder, |disk, bundle| {
                    match delete(disk, bundle, &Silent, &DeleteOptions::new(gone)) {
                        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                        Ok(report) if report.warnings.is_empty() => Ok(()),
                        Ok(report) => Err(Error::new(ErrorKind::Sync, report.warnings[0].clone())
                            .caused_by(std::io::Error::from_raw_os_error(libc_of(&report.warnings[0])))),
                        Err(error) => Err(error),
                    }
                })
            })
            .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

/// A guest that writes during a merge what is there already, so that nobody sees a difference at any moment: clusters
/// that the top lacks are copied up, and what has changed follows into the parent, in part or whole.
struct Rewriting {
    guest: Mutex<(Client, u64)>,
}

impl Rewriting {
    fn new(disk: &Arc<Disk>) -> Result<Self, Error> {
        let queue = QueueChoice::Pool
            .queue(1)
            .map_err(|cause| Error::io(ErrorKind::System, "make a queue", cause))?;
        Ok(Self { guest: Mutex::new((Client::new(disk, queue)?, 0)) })
    }
}

impl Progress for Rewriting {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}

    fn advance(&self, _bytes: u64) -> Result<(), Error> {
        const CLUSTER: u64 = CLUSTER_SECTORS * 512;
        let (client, calls) = &mut *self.guest.lock().unwrap();
        *calls += 1;
        // First more than is left to the last hold, which needs a pass of its own; then a little more.
        let places: &[(u64, u64, u64)] = match *calls {
            1 => &[(0, 4096, 24576), (2, 0, 24576), (4, 8192, 24576), (5, 4096, 4096)],
            2..=5 => &[(1, 4096, 4096), (5, 0, 4096)],
            _ => &[],
        };
        for &(cluster, at, len) in places {
            let place = Extent::new(cluster * CLUSTER + at, len).unwrap();
            let bytes = client.read(place)?;
            client.write(place.start(), bytes.as_slice())?;
        }
        Ok(())
    }
}

#[test]
fn a_merge_that_follows_a_writing_guest_survives_every_crash() {
    for shape in [Shape::of(2), Shape::of(2).on_raw()] {
        let gone = shape.snapshot(shape.images() - 2);
        survives(
            &Case::new(format!("delete below a guest of {shape:?}"), shape.bundle(), move |folder| {
                serving(folder, |disk, bundle| {
                    let guest = Rewriting::new(disk)?;
                    let options = DeleteOptions { rest_bytes_max: 0, ..DeleteOptions::new(gone) };
                    match delete(disk, bundle, &guest, &options) {
                        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                        Ok(report) if report.warnings.is_empty() => {
                            // 0: the run that was cut had committed.
                            assert!(report.passes != 1, "the guest was followed: {report:?}");
                            Ok(())
                        }
                        Ok(report) => Err(Error::new(ErrorKind::Sync, report.warnings[0].clone())
                            .caused_by(std::io::Error::from_raw_os_error(libc_of(&report.warnings[0])))),
                        Err(error) => Err(error),
                    }
                })
            })
            .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

#[test]
fn deleting_a_leaf_beside_the_running_disk_survives_every_crash() {
    let shape = Shape::of(3).branched();
    let gone = shape.branch();
    survives(
        &Case::new("delete a leaf", shape.bundle(), move |folder| {
            serving(folder, |disk, bundle| match delete(disk, bundle, &Silent, &DeleteOptions::new(gone)) {
                Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                // Told as a warning: the leaf is deleted, but whether there are temporary snapshots is not known.
                Ok(report) if !report.warnings.is_empty() => {
                    Err(Error::new(ErrorKind::Sync, report.warnings[0].clone())
                        .caused_by(std::io::Error::from_raw_os_error(libc_of(&report.warnings[0]))))
                }
                other => other.map(drop),
            })
        })
        .expecting(move |before, found| unchanged_but(before, found, &[gone])),
    );
}
