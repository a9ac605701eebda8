//! The descriptor is wholly old or wholly new: at every crash, after every fault.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::format::Mode;
use crate::io::file::DirectoryFolder;
use crate::io::sim::{Call, CrashLevel, CrashOptions, Fault, SimDisk};
use crate::units::Sectors;

fn old() -> DiskDescriptor {
    DiskDescriptor::new_single("old.hds", Mode::Expanded, Sectors(4096), Sectors(2048)).unwrap()
}

/// Longer than a sector, so that it can tear.
fn new() -> DiskDescriptor {
    DiskDescriptor::new_single(&"n".repeat(200), Mode::Expanded, Sectors(8192), Sectors(2048)).unwrap()
}

fn disk_with_old() -> SimDisk {
    let disk = SimDisk::new(1);
    old().store(&disk.folder()).unwrap();
    disk
}

fn leftovers(folder: &dyn Folder) -> Vec<String> {
    folder.list().unwrap().into_iter().filter(|name| name != DESCRIPTOR_NAME).collect()
}

#[test]
fn stored_and_loaded() {
    let place = tempfile::tempdir().unwrap();
    let folder = DirectoryFolder::open(place.path()).unwrap();
    let missing = DiskDescriptor::load(&folder, Some(place.path())).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Descriptor);
    assert!(missing.to_string().contains("DiskDescriptor.xml"), "{missing}");
    old().store_new(&folder).unwrap();
    assert_eq!(old().store_new(&folder).unwrap_err().kind(), ErrorKind::Create);
    assert_eq!(DiskDescriptor::load(&folder, None).unwrap(), old());
    new().store(&folder).unwrap();
    assert_eq!(DiskDescriptor::load(&folder, None).unwrap(), new());
    assert!(leftovers(&folder).is_empty());
}

#[test]
fn mode_of_the_old_file_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let folder = DirectoryFolder::open(place.path()).unwrap();
    old().store(&folder).unwrap();
    let path = place.path().join(DESCRIPTOR_NAME);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let is_root = nix::unistd::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(&path, Some(12345), Some(54321)).unwrap();
    }
    new().store(&folder).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o640);
    if is_root {
        assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321));
    }
}

#[test]
fn a_link_in_place_of_the_descriptor_is_not_followed() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("other"), old().to_bytes()).unwrap();
    std::os::unix::fs::symlink("other", place.path().join(DESCRIPTOR_NAME)).unwrap();
    let folder = DirectoryFolder::open(place.path()).unwrap();
    assert!(DiskDescriptor::load(&folder, None).is_err());
}

#[test]
fn too_long_a_file_is_not_read() {
    let disk = SimDisk::new(1);
    disk.create(DESCRIPTOR_NAME).unwrap().set_len(1 << 40).unwrap();
    let error = DiskDescriptor::load(&disk.folder(), None).unwrap_err();
    assert!(error.to_string().contains("too many"), "{error}");
}

#[test]
fn a_random_top_is_converted_when_it_is_written() {
    let text = String::from_utf8(old().to_bytes()).unwrap();
    let random = text.replace("5fbaabe3-6958-40ff-92a7-860e329aab41", "11111111-2222-3333-4444-555555555555");
    let descriptor = DiskDescriptor::parse(random.as_bytes()).unwrap();
    let disk = SimDisk::new(1);
    descriptor.store(&disk.folder()).unwrap();
    assert_eq!(DiskDescriptor::load(&disk.folder(), None).unwrap(), old());
}

/// How many crash states break I10, over every instant of a replacement.
fn broken_states(mutant: Option<Mutant>) -> usize {
    let disk = disk_with_old();
    disk.capture_every_operation(true);
    mutant::activate(mutant);
    let stored = new().store(&disk.folder());
    mutant::activate(None);
    stored.unwrap();
    let mut broken = 0;
    let mut during = disk.take_captured();
    let after = disk.snapshot();
    during.push(after.clone());
    for snapshot in &during {
        for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
            let folder = state.into_disk(2).folder();
            broken += usize::from(
                !DiskDescriptor::load(&folder, None).is_ok_and(|found| found == old() || found == new()),
            );
        }
    }
    // Told to be done, it is done.
    for state in after.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
        let folder = state.into_disk(2).folder();
        broken += usize::from(!DiskDescriptor::load(&folder, None).is_ok_and(|found| found == new()));
    }
    broken
}

#[test]
fn every_crash_leaves_the_old_or_the_new_one() {
    assert_eq!(broken_states(None), 0);
}

#[test]
fn mutants_are_found() {
    assert!(broken_states(Some(Mutant::RenameUnsyncedFile)) > 0, "M8");
    assert!(broken_states(Some(Mutant::RenameWithoutFolderSync)) > 0, "M9");
}

#[test]
fn every_fault_leaves_the_old_or_the_new_one() {
    let mut failed = 0;
    for for_ever in [false, true] {
        for calls in 0.. {
            let disk = disk_with_old();
            let fault = Fault::any(libc::EIO).after(calls);
            disk.inject(if for_ever { fault.for_ever() } else { fault });
            let stored = new().store(&disk.folder());
            let happened = !for_ever && disk.faults_happened();
            disk.heal();
            let found = DiskDescriptor::load(&disk.folder(), None).unwrap();
            match stored {
                Ok(()) => {
                    assert!(!happened, "the error of call {calls} was dropped");
                    assert_eq!(found, new(), "after {calls} calls");
                    break;
                }
                Err(error) => {
                    failed += 1;
                    let unknown = error.kind() == ErrorKind::OutcomeUnknown;
                    assert!(unknown || found == old(), "{error} after {calls} calls");
                    let left = leftovers(&disk.folder());
                    assert!(for_ever || left.is_empty(), "{left:?} after {calls} calls");
                    assert!(
                        left.is_empty() || error.advice().is_some_and(|advice| advice.contains(&left[0]))
                    );
                }
            }
        }
    }
    assert!(failed >= 10, "only {failed} calls could fail");
}

#[test]
fn a_full_host_leaves_the_old_one() {
    let disk = disk_with_old();
    disk.inject(Fault::once(Call::Sync, libc::ENOSPC));
    let error = new().store(&disk.folder()).unwrap_err();
    assert!(error.is_out_of_space());
    assert_eq!(DiskDescriptor::load(&disk.folder(), None).unwrap(), old());
}
