//! `convert`, `import` and `restore-descriptor`: wholly the old disk or wholly the new one, and nothing left over.

use std::sync::Arc;

use ploop_core::error::ErrorKind;
use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, Guid, Mode, Version};
use ploop_core::io::sim::{Call, SimDisk};
use ploop_core::io::{Folder, Storage, StorageExt};
use ploop_core::mutant::Mutant;
use ploop_core::ops::Silent;
use ploop_core::ops::convert::{ConvertOptions, convert_in};
use ploop_core::ops::import::{ImportOptions, Input, import_in};
use ploop_core::ops::restore_descriptor::{RestoreOptions, restore_descriptor_in};
use ploop_core::units::Sectors;

use crate::bundle::{Bundle, CLUSTER_SECTORS, Shape, View};
use crate::harness::{Case, hunt, survives};
use crate::pattern::{SECTOR, fill, stamp};

fn converting(shape: Shape, options: &ConvertOptions) -> Case {
    let options = options.clone();
    let name = format!("convert {shape:?} {:?} {:?} {:?}", options.mode, options.version, options.cluster);
    let raw = options.mode.map(|mode| mode == Mode::Raw);
    let convert = move |folder: &dyn Folder| convert_in(folder, folder, &options, &Silent).map(drop);
    Case::new(name, shape.bundle(), convert).ending(move |view| match raw {
        Some(raw) if view.raw != raw => Err("it is of the old form".to_owned()),
        _ => Ok(()),
    })
}

fn asked(mode: Option<Mode>, version: Option<Version>, cluster: Option<u64>) -> ConvertOptions {
    ConvertOptions { mode, version, cluster: cluster.map(Sectors), ..ConvertOptions::new("") }
}

#[test]
fn converting_survives_every_crash() {
    survives(&converting(Shape::of(1), &asked(Some(Mode::Raw), None, None)));
    survives(&converting(Shape::of(1).holed().not_closed(), &asked(Some(Mode::Preallocated), None, None)));
    survives(&converting(Shape::of(2).on_raw(), &asked(Some(Mode::Expanded), None, None)));
    survives(&converting(Shape::of(3).branched(), &asked(None, Some(Version::V1), None)));
    survives(&converting(
        Shape::of(2).version_1().not_closed(),
        &asked(None, None, Some(2 * CLUSTER_SECTORS)),
    ));
}

#[test]
fn mutants_of_converting_are_found() {
    let broken = [Mutant::RenameUnsyncedFile, Mutant::RenameWithoutFolderSync, Mutant::ConvertUnplanned];
    let case = || converting(Shape::of(1), &asked(Some(Mode::Raw), None, None));
    hunt("converting", broken.into_iter().map(|mutant| (mutant, case())).collect());
}

const SECTORS: u64 = 5 * CLUSTER_SECTORS;

/// A raw file with data, a hole and zeros.
fn input() -> (Arc<dyn Storage>, u64) {
    let file = SimDisk::new(77).create("input").unwrap();
    let len = SECTORS * SECTOR as u64;
    file.set_len(len).unwrap();
    for first in [3, 2 * CLUSTER_SECTORS + 5] {
        let mut bytes = vec![0; 40 * SECTOR];
        fill(&mut bytes, first, |sector| stamp(1, sector));
        file.write_all_at(first * SECTOR as u64, &bytes).unwrap();
    }
    (Arc::new(file), len)
}

fn is_imported(view: &View) -> Result<(), String> {
    let sectors = view.sectors(Guid::TOP)?;
    let expected = |sector: u64| {
        let data = (3..43).contains(&sector)
            || (2 * CLUSTER_SECTORS + 5..2 * CLUSTER_SECTORS + 45).contains(&sector);
        if data { stamp(1, sector) } else { 0 }
    };
    match (0..SECTORS).find(|&sector| sectors.get(sector as usize) != Some(&expected(sector))) {
        None if sectors.len() as u64 == SECTORS => Ok(()),
        wrong => Err(format!("sector {wrong:?} of {} is not that of the input", sectors.len())),
    }
}

fn importing(mode: Mode, stream: bool) -> Case {
    let import = move |folder: &dyn Folder| {
        let options = ImportOptions {
            cluster: Sectors(CLUSTER_SECTORS),
            mode,
            ..ImportOptions::new("/bundle", "root.hds")
        };
        let (storage, len) = input();
        let mut bytes = vec![0; len as usize];
        storage.read_exact_at(0, &mut bytes).unwrap();
        let mut reader = &bytes[..];
        let input = if stream { Input::Stream(&mut reader) } else { Input::Storage(storage, len) };
        match import_in(folder, folder, &options, input, &Silent) {
            // The disk of a run that was complete is not touched.
            Err(error)
                if error.kind() == ErrorKind::Parameter && DiskDescriptor::load(folder, None).is_ok() =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    };
    // The file of a stream grows in large steps; one that is refused is tried again as a small one.
    let ignored: &[Call] = if stream { &[Call::Allocate] } else { &[] };
    Case::new(format!("import {mode:?}, stream {stream}"), Bundle::none(), import)
        .ignoring(ignored)
        .expecting(|_, found| if found.exists { is_imported(found) } else { Ok(()) })
        .ending(is_imported)
}

#[test]
fn importing_survives_every_crash() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        survives(&importing(mode, false));
    }
    survives(&importing(Mode::Expanded, true));
}

#[test]
fn restoring_a_descriptor_survives_every_crash() {
    let disk = Shape::of(1).bundle().disk(4);
    disk.folder().unlink(DESCRIPTOR_NAME).unwrap();
    let file = Shape::of(1).file(0);
    let leaves: fn(&str) -> bool = |name| name.contains(".tmp.") || name == "delta0.hds";
    let restore =
        move |folder: &dyn Folder| match restore_descriptor_in(folder, &file, &RestoreOptions::new("", "")) {
            Err(error) if error.kind() == ErrorKind::Create && DiskDescriptor::load(folder, None).is_ok() => {
                Ok(())
            }
            other => other.map(drop),
        };
    let expected = View::read(&Shape::of(1).bundle().disk(5).folder()).unwrap();
    let ending = expected.clone();
    survives(
        &Case::new("restore the descriptor", Bundle::from_disk(&disk), restore)
            .leaving(leaves)
            .expecting(move |_, found| match found.exists {
                true if *found != expected => Err("another disk than the one that was there".to_owned()),
                _ => Ok(()),
            })
            .ending(move |found| {
                if *found == ending {
                    Ok(())
                } else {
                    Err("another disk than the one that was there".to_owned())
                }
            }),
    );
}
