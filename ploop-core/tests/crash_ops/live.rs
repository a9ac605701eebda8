//! Snapshots of a running disk, made and deleted: the disk is opened, served, changed and closed on the simulated host.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid, Transition};
use ploop_core::io::{Access, Folder, QueueChoice, Storage};
use ploop_core::ops::live::{
    Bundle, DeleteOptions, MergeNewOptions, MergeNewReport, NoWriters, SnapshotOptions, delete, merge_new,
    snapshot,
};
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
pub(crate) fn serving<T>(
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

/// A warning as the harness wants to hear of it.
pub(crate) fn warned(warnings: Vec<String>) -> Result<(), Error> {
    match warnings.first() {
        None => Ok(()),
        Some(warning) => Err(Error::new(ErrorKind::Sync, warning.clone())
            .caused_by(std::io::Error::from_raw_os_error(libc_of(warning)))),
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
            .living_on_lies()
            .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

/// A snapshot that other states stand on is marked, and goes with the deletion of another: cut there, the same command
/// finds itself done.
#[test]
fn a_deletion_cut_in_what_goes_with_it_is_its_own_repetition() {
    for shape in [Shape::of(3), Shape::of(4).version_1()] {
        // The one below the top goes; the temporary one below it goes with it.
        let (waiting, gone) = (shape.snapshot(shape.images() - 3), shape.snapshot(shape.images() - 2));
        let disk = shape.bundle().disk(3);
        let mut marked = descriptor(&disk.folder()).unwrap();
        marked.mark(waiting, Transition::Temporary).unwrap();
        marked.store(&disk.folder()).unwrap();
        disk.capture_every_operation(true);
        let run = |folder: &dyn Folder| {
            serving(folder, |disk, bundle| delete(disk, bundle, &Silent, &DeleteOptions::new(gone)))
        };
        run(&disk.folder()).unwrap();
        disk.capture_every_operation(false);
        let mut cuts = 0;
        for captured in disk.take_captured() {
            let host = captured.killed().into_disk(4);
            let found = descriptor(&host.folder()).unwrap();
            let is_merging =
                |guid| found.shot(guid).and_then(|shot| shot.transition()) == Some(Transition::Merging);
            if found.shot(gone).is_some() || !(is_merging(waiting) || found.has_obsolete()) {
                continue;
            }
            cuts += 1;
            run(&host.folder()).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
            let ended = descriptor(&host.folder()).unwrap();
            assert!(ended.shot(waiting).is_none() && !ended.has_obsolete(), "{shape:?}: {ended:?}");
        }
        assert!(cuts > 2, "{shape:?}: {cuts} cuts");
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
            .writing_in_place()
            .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

/// A run of a merge into a new file, as the harness wants to hear of it.
fn merged(done: Result<MergeNewReport, Error>) -> Result<(), Error> {
    match done {
        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
        Ok(report) if report.warnings.is_empty() => Ok(()),
        Ok(report) => Err(Error::new(ErrorKind::Sync, report.warnings[0].clone())
            .caused_by(std::io::Error::from_raw_os_error(libc_of(&report.warnings[0])))),
        Err(error) => Err(error),
    }
}

#[test]
fn a_merge_into_a_new_file_of_a_running_disk_survives_every_crash() {
    for (shape, lower, upper) in [
        // Up to the running top.
        (Shape::of(2), 0, 1),
        (Shape::of(3).version_1().not_closed(), 0, 2),
        (Shape::of(2).on_raw(), 0, 1),
        (Shape::of(3).holed(), 1, 2),
        // Up to a frozen state.
        (Shape::of(3).holed(), 0, 1),
        (Shape::of(3).on_raw().not_closed(), 0, 1),
        (Shape::of(4), 0, 2),
    ] {
        let state =
            move |number| if number + 1 == shape.images() { Guid::TOP } else { shape.snapshot(number) };
        let gone: Vec<Guid> = (lower..upper).map(state).collect();
        survives(
            &Case::new(format!("merge {lower} to {upper} of {shape:?}"), shape.bundle(), move |folder| {
                let options = MergeNewOptions::new(state(lower), state(upper), "new.hds");
                serving(folder, |disk, bundle| merged(merge_new(disk, bundle, &Silent, &options)))
            })
            .expecting(move |before, found| {
                match found.states.values().find(|found| found.transition.is_some()) {
                    Some(marked) => Err(format!("a state is marked: {:?}", marked.transition)),
                    None => unchanged_but(before, found, &gone),
                }
            }),
        );
    }
}

#[test]
fn a_merge_into_a_new_file_that_follows_a_writing_guest_survives_every_crash() {
    for shape in [Shape::of(2), Shape::of(2).on_raw()] {
        let gone = shape.snapshot(0);
        survives(
            &Case::new(format!("merge below a guest of {shape:?}"), shape.bundle(), move |folder| {
                serving(folder, |disk, bundle| {
                    let guest = Rewriting::new(disk)?;
                    let options = MergeNewOptions {
                        rest_bytes_max: 0,
                        ..MergeNewOptions::new(gone, Guid::TOP, "new.hds")
                    };
                    let done = merge_new(disk, bundle, &guest, &options);
                    if let Ok(report) = &done {
                        // 0: the run that was cut had committed.
                        assert!(report.passes != 1, "the guest was followed: {report:?}");
                    }
                    merged(done)
                })
            })
            .writing_in_place()
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
