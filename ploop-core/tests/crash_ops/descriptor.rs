//! Replacing the descriptor: wholly the old one or wholly the new one (I10).

use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::Folder;
use ploop_core::mutant::Mutant;
use ploop_core::units::Sectors;

use crate::bundle::{Shape, resized};
use crate::harness::{Case, hunt, survives};

/// Another size in the descriptor alone: all that the replacement can be recognised by.
fn case() -> Case {
    let sectors = Shape::of(2).sectors() + 512;
    let replace = move |folder: &dyn Folder| {
        let mut descriptor = DiskDescriptor::load(folder, None)?;
        descriptor.set_disk_sectors(Sectors(sectors))?;
        descriptor.store(folder)
    };
    Case::new("replace the descriptor", Shape::of(2).bundle(), replace)
        .expecting(move |before, found| resized(before, found, sectors))
        .ending(move |found| {
            found.sectors(Guid::TOP)?;
            if found.disk_sectors == sectors { Ok(()) } else { Err("the size is the old one".to_owned()) }
        })
}

#[test]
fn replacing_the_descriptor_survives_every_crash() {
    survives(&case());
}

#[test]
fn mutants_are_found() {
    let broken = [Mutant::RenameUnsyncedFile, Mutant::RenameWithoutFolderSync];
    hunt("descriptors", broken.into_iter().map(|mutant| (mutant, case())).collect());
}
