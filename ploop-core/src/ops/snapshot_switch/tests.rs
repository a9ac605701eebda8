//! Switching in simulated folders.

use super::*;
use crate::format::Mode;
use crate::io::StorageExt;
use crate::io::sim::{CrashLevel, CrashOptions, Fault};
use crate::ops::progress::Silent;
use crate::ops::testing::{descriptor, files, guid, read, states, three, write};

fn options(keep: bool) -> SwitchOptions {
    SwitchOptions { snapshot: guid(1), keep: keep.then(|| guid(3)) }
}

#[test]
fn back_and_the_snapshot_stays() {
    for mode in [Mode::Expanded, Mode::Raw] {
        for keep in [false, true] {
            let disk = three(mode);
            let folder = disk.folder();
            let (one, top) = (read(&folder, guid(1)), read(&folder, Guid::TOP));
            let report = switch_in(&folder, &options(keep), &Silent).unwrap();
            assert_eq!(report.removed.is_some(), !keep);
            assert_eq!(read(&folder, Guid::TOP), one);
            write(&folder, &[(0, 9)]);
            assert_eq!(read(&folder, guid(1)), one);
            assert_eq!(files(&folder).len(), if keep { 4 } else { 3 });
            if keep {
                assert_eq!(read(&folder, guid(3)), top);
                switch_in(&folder, &SwitchOptions { snapshot: guid(3), keep: None }, &Silent).unwrap();
                assert_eq!(read(&folder, Guid::TOP), top);
            }
        }
    }
}

#[test]
fn wrong_wishes_change_nothing() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let before = states(&folder);
    for (snapshot, keep, kind) in [
        (Guid::TOP, None, ErrorKind::Parameter),
        (guid(77), None, ErrorKind::NoSnapshot),
        (guid(1), Some(guid(2)), ErrorKind::Parameter),
    ] {
        let error = switch_in(&folder, &SwitchOptions { snapshot, keep }, &Silent).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert_eq!(states(&folder), before);
}

#[test]
fn every_crash_and_fault_leaves_one_or_the_other() {
    for keep in [false, true] {
        let disk = three(Mode::Expanded);
        let folder = disk.folder();
        let before = states(&folder);
        let one = read(&folder, guid(1));
        disk.capture_every_operation(true);
        switch_in(&folder, &options(keep), &Silent).unwrap();
        let after = states(&folder);
        let check = |folder: &crate::io::sim::SimFolder| {
            let now = states(folder);
            assert!(now == before || now == after, "{now:?}");
            if now == before {
                switch_in(folder, &options(keep), &Silent).unwrap();
            } else {
                switch_in(folder, &SwitchOptions { snapshot: guid(1), keep: None }, &Silent).unwrap();
            }
            assert_eq!(read(folder, Guid::TOP), one);
            assert_eq!(files(folder).len(), if keep { 4 } else { 3 });
        };
        for snapshot in disk.take_captured() {
            for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
                check(&state.into_disk(3).folder());
            }
        }
        for calls in 0.. {
            let disk = three(Mode::Expanded);
            disk.inject(Fault::any(libc::EIO).after(calls));
            let switched = switch_in(&disk.folder(), &options(keep), &Silent);
            let happened = disk.faults_happened();
            disk.heal();
            if switched.is_ok() {
                assert!(!happened, "an error was dropped");
                break;
            }
            check(&disk.folder());
        }
    }
}

/// Going back is what one wants most when the current state is damaged.
#[test]
fn a_damaged_or_missing_current_state_can_be_left() {
    for missing in [false, true] {
        let disk = three(Mode::Expanded);
        let folder = disk.folder();
        let before = read(&folder, guid(2));
        let file = descriptor(&folder).image(Guid::TOP).unwrap().file().to_owned();
        if missing {
            folder.unlink(&file).unwrap();
        } else {
            let top = folder.open(&file, Access::ReadWrite).unwrap();
            top.write_all_at(0, &[0xA5; 512]).unwrap();
        }
        let keeping = SwitchOptions { snapshot: guid(2), keep: Some(guid(9)) };
        assert!(switch_in(&folder, &keeping, &Silent).is_err());
        switch_in(&folder, &SwitchOptions { snapshot: guid(2), keep: None }, &Silent).unwrap();
        assert_eq!(read(&folder, Guid::TOP), before);
        assert!(!folder.exists(&file).unwrap());
    }
}
