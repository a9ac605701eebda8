//! Deleting snapshots in simulated folders.

use super::*;
use crate::format::Mode;
use crate::io::sim::{Call, CrashLevel, CrashOptions, Fault, SimFolder};
use crate::ops::progress::Silent;
use crate::ops::resize::{ResizeOptions, resize_in};
use crate::ops::snapshot_switch::{SwitchOptions, switch_in};
use crate::ops::testing::{descriptor, files, guid, states, three};

fn delete_it(folder: &SimFolder, snapshot: Guid) -> Result<DeleteReport> {
    delete_in(folder, &DeleteOptions { snapshot }, &Silent)
}

/// On 1: 2 with 3, and the top.
fn forked(mode: Mode) -> crate::io::sim::SimDisk {
    let disk = three(mode);
    switch_in(&disk.folder(), &SwitchOptions { snapshot: guid(1), keep: Some(guid(3)) }, &Silent).unwrap();
    disk
}

#[test]
fn all_other_states_stay() {
    for mode in [Mode::Expanded, Mode::Raw] {
        for gone in [guid(2), guid(3), Guid::TOP] {
            let disk = forked(mode);
            let folder = disk.folder();
            let mut before = states(&folder);
            let deleted = delete_it(&folder, gone);
            if gone == Guid::TOP {
                assert_eq!(
                    deleted.unwrap_err().kind(),
                    ErrorKind::Parameter,
                    "others stand on what is below"
                );
                continue;
            }
            assert_eq!(deleted.unwrap().merged.is_some(), gone == guid(2));
            before.retain(|state| state.0 != gone);
            assert_eq!(states(&folder), before);
            assert_eq!(files(&folder).len(), 3);
            assert_eq!(delete_it(&folder, gone).unwrap_err().kind(), ErrorKind::NoSnapshot);
        }
    }
}

#[test]
fn one_that_several_stand_on_goes_when_one_is_left() {
    let disk = forked(Mode::Expanded);
    let folder = disk.folder();
    let before = states(&folder);
    assert!(delete_it(&folder, guid(1)).unwrap().marked);
    assert!(delete_it(&folder, guid(1)).unwrap().marked, "once more changes nothing");
    assert_eq!(states(&folder), before);
    delete_it(&folder, guid(3)).unwrap();
    delete_it(&folder, guid(2)).unwrap();
    assert!(descriptor(&folder).shot(guid(1)).is_none());
    assert_eq!(states(&folder).len(), 1);
    assert_eq!(files(&folder), ["root.hds"]);
}

#[test]
fn deleting_the_current_state_goes_back() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let two = states(&folder).into_iter().find(|state| state.0 == guid(2)).unwrap().1;
    delete_it(&folder, Guid::TOP).unwrap();
    let after = states(&folder);
    assert_eq!(after.len(), 2);
    assert!(after.contains(&(Guid::TOP, two)));
    delete_it(&folder, Guid::TOP).unwrap();
    assert_eq!(delete_it(&folder, Guid::TOP).unwrap_err().kind(), ErrorKind::Parameter, "the base stays");
}

#[test]
fn a_leaf_without_its_file_can_be_forgotten() {
    let disk = forked(Mode::Expanded);
    let folder = disk.folder();
    let file = descriptor(&folder).image(guid(3)).unwrap().file().to_owned();
    folder.unlink(&file).unwrap();
    delete_it(&folder, guid(3)).unwrap();
    assert_eq!(states(&folder).len(), 3);
}

#[test]
fn every_crash_and_fault_leaves_the_others_and_can_be_repeated() {
    for gone in [guid(2), guid(3)] {
        let disk = forked(Mode::Expanded);
        let mut expected = states(&disk.folder());
        let before = expected.clone();
        expected.retain(|state| state.0 != gone);
        disk.capture_every_operation(true);
        delete_it(&disk.folder(), gone).unwrap();
        for snapshot in disk.take_captured() {
            for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)).step_by(2) {
                let crashed = state.into_disk(3);
                let folder = crashed.folder();
                assert!(states(&folder).iter().all(|state| before.contains(state)));
                // Gone for good, with nothing left over; a second time there is none.
                match delete_it(&folder, gone) {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NoSnapshot, "{error}"),
                }
                assert_eq!(states(&folder), expected);
                assert_eq!(files(&folder).len(), 3);
            }
        }
        for calls in 0.. {
            let disk = forked(Mode::Expanded);
            let folder = disk.folder();
            disk.inject(Fault::any(libc::EIO).after(calls));
            let deleted = delete_it(&folder, gone);
            let happened = disk.faults_happened();
            disk.heal();
            assert!(states(&folder).iter().all(|state| before.contains(state)));
            if deleted.is_ok() {
                assert!(!happened, "an error was dropped");
                break;
            }
            match delete_it(&folder, gone) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::NoSnapshot, "{error}"),
            }
            assert_eq!((states(&folder), files(&folder).len()), (expected.clone(), 3));
        }
    }
}

/// The file is still to be removed: the command given again must not take the next state for the one that is gone.
#[test]
fn a_cut_removal_of_the_current_state_given_again_removes_no_other() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let before = states(&folder);
    disk.inject(Fault::once(Call::Unlink, libc::EIO));
    delete_it(&folder, Guid::TOP).unwrap_err();
    disk.heal();
    assert!(descriptor(&folder).has_obsolete() && descriptor(&folder).shots().len() == 2);
    delete_it(&folder, Guid::TOP).unwrap();
    let after = states(&folder);
    let content = |all: &[(Guid, Vec<u8>)], state| all.iter().find(|one| one.0 == state).unwrap().1.clone();
    assert_eq!(content(&after, Guid::TOP), content(&before, guid(2)));
    assert_eq!((after.len(), files(&folder).len()), (2, 2));
    // Now it means the next one.
    delete_it(&folder, Guid::TOP).unwrap();
    assert_eq!(content(&states(&folder), Guid::TOP), content(&before, guid(1)));
}

#[test]
fn a_smaller_state_that_becomes_the_current_one_is_told_in_the_descriptor() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let old = descriptor(&folder).disk_sectors();
    let larger = ResizeOptions::new("", Sectors(old.0 * 2));
    resize_in(&folder, &larger, &Silent).unwrap();
    assert_eq!(descriptor(&folder).disk_sectors().0, old.0 * 2);
    delete_it(&folder, Guid::TOP).unwrap();
    assert_eq!(descriptor(&folder).disk_sectors(), old);
}
