//! `init`: a disk is there whole or not at all, and the same command again makes it.

use ploop_core::error::ErrorKind;
use ploop_core::format::{DiskDescriptor, Guid, Mode, Version};
use ploop_core::io::Folder;
use ploop_core::mutant::Mutant;
use ploop_core::ops::create::{CreateOptions, create_in};
use ploop_core::units::Sectors;

use crate::bundle::{Bundle, CLUSTER_SECTORS, View};
use crate::harness::{Case, hunt, survives};

const SECTORS: u64 = 10 * CLUSTER_SECTORS;

fn case(mode: Mode, version: Version) -> Case {
    let create = move |folder: &dyn Folder| {
        let options = CreateOptions {
            cluster: Sectors(CLUSTER_SECTORS),
            version,
            mode,
            ..CreateOptions::new("/bundle", "root.hds", Sectors(SECTORS))
        };
        match create_in(folder, &options) {
            // It refuses to touch a disk that exists; here that is the one of the run before.
            Err(error) if error.kind() == ErrorKind::Parameter && is_there(folder) => Ok(()),
            other => other.map(drop),
        }
    };
    Case::new(format!("create {mode:?} {version:?}"), Bundle::none(), create)
        .expecting(|_, found| if found.exists { is_new(found) } else { Ok(()) })
        .ending(is_new)
}

fn is_there(folder: &dyn Folder) -> bool {
    DiskDescriptor::load(folder, None).is_ok()
}

fn is_new(view: &View) -> Result<(), String> {
    let sectors = view.sectors(Guid::TOP)?;
    if sectors.len() as u64 == SECTORS
        && view.disk_sectors == SECTORS
        && sectors.iter().all(|&value| value == 0)
    {
        return Ok(());
    }
    Err("the new disk is not one of zeros".to_owned())
}

#[test]
fn creating_survives_every_crash() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        survives(&case(mode, Version::V2));
    }
    survives(&case(Mode::Expanded, Version::V1));
}

#[test]
fn mutants_are_found() {
    let broken = [Mutant::RenameUnsyncedFile, Mutant::RenameWithoutFolderSync];
    let case = || case(Mode::Raw, Version::V2);
    hunt("creating", broken.into_iter().map(|mutant| (mutant, case())).collect());
}
