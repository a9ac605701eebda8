//! Snapshots in simulated folders.

use super::*;
use crate::format::Mode;
use crate::io::StorageExt;
use crate::io::sim::{CrashLevel, CrashOptions, Fault};
use crate::ops::progress::Silent;
use crate::ops::testing::{disk, files, guid, read, snapshot as take, states, three, write};

fn options() -> SnapshotOptions {
    SnapshotOptions { snapshot: Some(guid(9)), temporary: false }
}

#[test]
fn a_snapshot_keeps_what_was_there() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        let disk = disk(mode);
        let folder = disk.folder();
        write(&folder, &[(0, 1), (1, 1)]);
        let before = read(&folder, Guid::TOP);
        let report = snapshot_in(&folder, &options(), &Silent).unwrap();
        assert_eq!((report.file.as_str(), report.deleted.len()), ("root.hds", 0));
        assert!(report.top_file.starts_with("root.hds.{"));
        assert_eq!(read(&folder, Guid::TOP), before);
        write(&folder, &[(1, 7)]);
        assert_eq!(read(&folder, guid(9)), before);
        assert_eq!(read(&folder, Guid::TOP)[..2], [1, 7]);
        let again = snapshot_in(&folder, &options(), &Silent).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Parameter, "the GUID is taken");
        assert_eq!(files(&folder).len(), 2);
    }
}

#[test]
fn a_top_that_was_not_closed_is_repaired_first() {
    let disk = disk(Mode::Expanded);
    let folder = disk.folder();
    write(&folder, &[(0, 1)]);
    let image = folder.open("root.hds", Access::ReadWrite).unwrap();
    image.write_all_at(44, &0x746F_6E59u32.to_le_bytes()).unwrap();
    image.sync_data().unwrap();
    snapshot_in(&folder, &options(), &Silent).unwrap();
    let mut mark = [1; 4];
    image.read_exact_at(44, &mut mark).unwrap();
    assert_eq!(mark, [0; 4]);
}

#[test]
fn temporary_ones_go_with_the_next() {
    let disk = disk(Mode::Expanded);
    let folder = disk.folder();
    write(&folder, &[(0, 1)]);
    take(&folder, 1);
    write(&folder, &[(1, 2)]);
    let temporary = SnapshotOptions { snapshot: Some(guid(2)), temporary: true };
    snapshot_in(&folder, &temporary, &Silent).unwrap();
    write(&folder, &[(2, 3)]);
    let report = snapshot_in(&folder, &options(), &Silent).unwrap();
    assert_eq!(report.deleted, [guid(2)]);
    assert_eq!(read(&folder, Guid::TOP)[..3], [1, 2, 3]);
    assert_eq!(files(&folder).len(), 3);
}

#[test]
fn every_crash_leaves_the_old_or_the_new_chain() {
    for mode in [Mode::Expanded, Mode::Raw] {
        let disk = three(mode);
        let before = states(&disk.folder());
        disk.capture_every_operation(true);
        snapshot_in(&disk.folder(), &options(), &Silent).unwrap();
        let (mut old, mut new) = (0, 0);
        for snapshot in disk.take_captured() {
            for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
                let crashed = state.into_disk(3);
                let folder = crashed.folder();
                let after = states(&folder);
                assert!(before.iter().all(|state| after.contains(state)));
                if after.len() == 4 {
                    new += 1;
                    continue;
                }
                old += 1;
                snapshot_in(&folder, &options(), &Silent).unwrap();
                assert_eq!(files(&folder).len(), 4, "nothing is left over");
            }
        }
        assert!(old > 10 && new > 0, "{old} {new}");
    }
}

#[test]
fn every_fault_leaves_the_old_chain_or_the_new_one() {
    for calls in 0.. {
        let disk = three(Mode::Expanded);
        let folder = disk.folder();
        let before = states(&folder);
        disk.inject(Fault::any(libc::ENOSPC).after(calls));
        let taken = snapshot_in(&folder, &options(), &Silent);
        let happened = disk.faults_happened();
        disk.heal();
        let after = states(&folder);
        assert!(before.iter().all(|state| after.contains(state)), "call {calls}: {taken:?}");
        if taken.is_ok() {
            assert!(!happened, "an error was dropped");
            break;
        }
        if after.len() == 3 {
            snapshot_in(&folder, &options(), &Silent).unwrap();
            assert_eq!(files(&folder).len(), 4, "call {calls}");
        }
    }
}

/// With real files: locks, owners, two commands at once, and what the original wrote.
#[test]
fn real_files_are_locked() {
    use crate::ops::{create, open};
    let place = tempfile::tempdir().unwrap();
    let new = create::CreateOptions::new(place.path(), "root.hds", crate::units::Sectors(2048 * 4));
    create::create(&new).unwrap();
    let now = Duration::ZERO;
    let open_it = |access| {
        open::open(&open::OpenOptions { lock_timeout: now, ..open::OpenOptions::new(place.path(), access) })
    };
    let opened = open_it(Access::ReadWrite).unwrap();
    let error = snapshot(place.path(), &options(), now, &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    opened.chain.close().unwrap();
    drop(opened);
    let lock = crate::ops::DescriptorLock::take(&place.path().join("DiskDescriptor.xml"), now).unwrap();
    let error = snapshot(place.path(), &options(), now, &Silent).unwrap_err();
    assert_eq!((error.kind(), error.kind().exit_code()), (ErrorKind::DescriptorLocked, 23));
    drop(lock);
    snapshot(place.path(), &options(), now, &Silent).unwrap();
    // The snapshot is readable while the disk is written, and cannot go meanwhile.
    let writer = open_it(Access::ReadWrite).unwrap();
    let of_snapshot = open::OpenOptions {
        snapshot: Some(guid(9)),
        ..open::OpenOptions::new(place.path(), Access::ReadOnly)
    };
    let reader = open::open(&of_snapshot).unwrap();
    writer.chain.close().unwrap();
    drop(writer);
    let delete = crate::ops::DeleteOptions { snapshot: guid(9) };
    let error = crate::ops::delete(place.path(), &delete, now, &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    drop(reader);
    crate::ops::delete(place.path(), &delete, now, &Silent).unwrap();
    assert_eq!(open_it(Access::ReadWrite).unwrap().chain.depth(), 1);
    let list = crate::ops::snapshot_list(place.path()).unwrap();
    assert!(list.states.len() == 1 && list.states[0].current && list.states[0].file_bytes.is_some());
}

/// As the first writers of descriptors did.
#[test]
fn absolute_names_of_files_in_the_folder_are_understood() {
    let place = tempfile::tempdir().unwrap();
    let options = crate::ops::CreateOptions::new(place.path(), "root.hds", crate::units::Sectors(8192));
    crate::ops::create(&options).unwrap();
    let path = place.path().join(crate::format::DESCRIPTOR_NAME);
    let absolute = std::fs::canonicalize(place.path()).unwrap().join("root.hds");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("<File>root.hds<", &format!("<File>{}<", absolute.display()));
    assert!(text.contains(&*absolute.to_string_lossy()));
    std::fs::write(&path, text).unwrap();
    snapshot(place.path(), &SnapshotOptions::default(), Duration::ZERO, &Silent).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains("<File>root.hds<"));
}
