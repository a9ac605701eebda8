//! A disk is created whole or not at all.

use super::*;
use crate::format::{Probe, probe};
use crate::io::Access;
use crate::io::sim::{CrashLevel, CrashOptions, Fault, SimDisk};

const NAME: &str = "root.hds";

fn options(mode: Mode) -> CreateOptions {
    let disk = Sectors(64 * 10 - 5);
    CreateOptions {
        cluster: Sectors(64),
        mode,
        reserve_raw: true,
        ..CreateOptions::new("/bundle", NAME, disk)
    }
}

const MODES: [Mode; 3] = [Mode::Expanded, Mode::Preallocated, Mode::Raw];

/// Whether the folder holds the whole disk; anything between that and nothing is an error.
fn is_complete(folder: &dyn Folder, mode: Mode) -> std::result::Result<bool, String> {
    let names = folder.list().map_err(|error| error.to_string())?;
    if !names.iter().any(|name| name == DESCRIPTOR_NAME) {
        return Ok(false);
    }
    let descriptor = DiskDescriptor::load(folder, None).map_err(|error| error.to_string())?;
    if descriptor.mode() != mode || descriptor.images()[0].file() != NAME {
        return Err(format!("wrong descriptor: {descriptor:?}"));
    }
    let storage = folder.open(NAME, Access::ReadOnly).map_err(|error| format!("open image: {error}"))?;
    if mode == Mode::Raw {
        return match storage.len() {
            Ok(len) if len == 640 * 512 => Ok(true),
            other => Err(format!("raw image: {other:?}")),
        };
    }
    match probe(&*storage) {
        Ok(Probe::Image(header)) if header.geometry().disk_sectors() == Sectors(640) => Ok(true),
        other => Err(format!("image: {other:?}")),
    }
}

#[test]
fn creates_every_mode_and_version() {
    for mode in MODES {
        for version in [Version::V1, Version::V2] {
            let place = tempfile::tempdir().unwrap();
            let options = CreateOptions { folder: place.path().to_path_buf(), version, ..options(mode) };
            let report = create(&options).unwrap();
            let folder = DirectoryFolder::open(place.path()).unwrap();
            assert_eq!(is_complete(&folder, mode), Ok(true));
            let mut names = folder.list().unwrap();
            names.sort();
            assert_eq!(names, [DESCRIPTOR_NAME, NAME]);
            assert_eq!(report.disk_bytes, 640 * 512);
            assert_eq!(report.mode, mode.name());
            let number = if version == Version::V1 { 1 } else { 2 };
            assert_eq!(report.version, (mode != Mode::Raw).then_some(number));
            assert_eq!(report.file_bytes, std::fs::metadata(&report.image).unwrap().len());
            let json = serde_json::to_value(&report).unwrap();
            assert_eq!(json["cluster_bytes"], 32768);
        }
    }
}

#[test]
fn a_raw_disk_is_reserved_or_one_hole() {
    use std::os::unix::fs::MetadataExt;
    for reserve_raw in [true, false] {
        let place = tempfile::tempdir().unwrap();
        let options = CreateOptions { folder: place.path().to_path_buf(), reserve_raw, ..options(Mode::Raw) };
        let report = create(&options).unwrap();
        let taken = std::fs::metadata(&report.image).unwrap().blocks() * 512;
        assert_eq!(taken >= report.disk_bytes, reserve_raw, "{taken} bytes");
    }
}

#[test]
fn what_exists_is_not_touched() {
    for name in [NAME, DESCRIPTOR_NAME] {
        let disk = SimDisk::new(1);
        disk.create(name).unwrap();
        let error = create_in(&disk.folder(), &options(Mode::Expanded)).unwrap_err();
        assert_eq!(error.kind().exit_code(), 38);
        assert!(error.to_string().contains(name) && error.advice().is_some());
        assert_eq!(disk.folder().list().unwrap(), [name]);
    }
}

#[test]
fn wrong_parameters_create_nothing() {
    let disk = SimDisk::new(1);
    let sound = options(Mode::Expanded);
    for (wrong, why) in [
        (CreateOptions { disk: Sectors(0), ..sound.clone() }, "size 0"),
        (CreateOptions { disk: Sectors(u64::MAX), ..sound.clone() }, "size beyond 64 bits"),
        (CreateOptions { cluster: Sectors(0), ..sound.clone() }, "cluster 0"),
        (CreateOptions { cluster: Sectors(65), ..sound.clone() }, "odd cluster"),
        (
            CreateOptions { cluster: Sectors(65), mode: Mode::Raw, ..sound.clone() },
            "odd cluster of a raw disk",
        ),
        (
            CreateOptions { disk: Sectors(1 << 33), version: Version::V1, ..sound.clone() },
            "too large for version 1",
        ),
        (CreateOptions { file: "../x".to_owned(), ..sound.clone() }, "name outside"),
        (CreateOptions { file: "a/x".to_owned(), ..sound.clone() }, "name in a folder"),
        (CreateOptions { file: String::new(), ..sound.clone() }, "no name"),
        (CreateOptions { file: DESCRIPTOR_NAME.to_owned(), ..sound }, "the descriptor's name"),
    ] {
        let error = create_in(&disk.folder(), &wrong).expect_err(why);
        assert_eq!(error.kind(), ErrorKind::Parameter, "{why}: {error}");
    }
    assert!(disk.folder().list().unwrap().is_empty());
    let missing = create(&CreateOptions::new("/nonexistent", "x", Sectors(2048))).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent"));
}

#[test]
fn every_fault_leaves_all_or_nothing() {
    for mode in MODES {
        let mut failed = 0;
        for for_ever in [false, true] {
            for calls in 0.. {
                let disk = SimDisk::new(1);
                let fault = Fault::any(libc::EIO).after(calls);
                disk.inject(if for_ever { fault.for_ever() } else { fault });
                let created = create_in(&disk.folder(), &options(mode));
                let happened = !for_ever && disk.faults_happened();
                disk.heal();
                let names = disk.folder().list().unwrap();
                let place =
                    format!("{mode:?}, for ever {for_ever}, after {calls} calls: {created:?}, {names:?}");
                let complete =
                    is_complete(&disk.folder(), mode).unwrap_or_else(|why| panic!("{place}: {why}"));
                match &created {
                    Ok(_) => {
                        assert!(!happened, "an error was dropped: {place}");
                        assert!(complete, "{place}");
                        break;
                    }
                    Err(error) => {
                        failed += 1;
                        // Left-overs only when removing them failed too, and then they are named.
                        assert!(for_ever || names.is_empty(), "{place}");
                        assert!(!complete || error.kind() == ErrorKind::OutcomeUnknown, "{place}");
                        assert!(
                            names.is_empty()
                                || names.iter().any(|name| error.advice().unwrap().contains(name)),
                            "{place}"
                        );
                    }
                }
            }
        }
        assert!(failed >= 14, "{mode:?}: only {failed} calls could fail");
    }
}

/// Crash states in which the folder holds half a disk, or less than was promised.
fn broken_states(mode: Mode, mutant: Option<Mutant>) -> usize {
    let disk = SimDisk::new(1);
    disk.capture_every_operation(true);
    mutant::activate(mutant);
    let created = create_in(&disk.folder(), &options(mode));
    mutant::activate(None);
    created.unwrap();
    let after = disk.snapshot();
    let options = CrashOptions::new(CrashLevel::Sectors);
    let during = disk.take_captured().into_iter().flat_map(|snapshot| {
        snapshot
            .crash_states(&options)
            .map(|state| is_complete(&state.into_disk(2).folder(), mode).is_err())
            .collect::<Vec<_>>()
    });
    let broken = during.filter(|&broken| broken).count();
    let promised =
        after.crash_states(&options).map(|state| is_complete(&state.into_disk(2).folder(), mode) != Ok(true));
    broken + promised.filter(|&broken| broken).count()
}

#[test]
fn every_crash_leaves_all_or_nothing() {
    for mode in MODES {
        assert_eq!(broken_states(mode, None), 0, "{mode:?}");
    }
}

#[test]
fn mutants_are_found() {
    assert!(broken_states(Mode::Raw, Some(Mutant::RenameUnsyncedFile)) > 0, "M8");
    assert!(broken_states(Mode::Expanded, Some(Mutant::RenameWithoutFolderSync)) > 0, "M9");
}
