//! `grow` and `resize`: at every moment the old content, in the old or the new size; the same command finishes it.

use ploop_core::format::Guid;
use ploop_core::io::Folder;
use ploop_core::mutant::Mutant;
use ploop_core::ops::progress::Silent;
use ploop_core::ops::resize::{ResizeOptions, Shrink, resize_in};
use ploop_core::units::Sectors;

use crate::bundle::{CLUSTER_SECTORS, Shape, View};
use crate::harness::{Case, hunt, survives};

fn to(folder: &dyn Folder, sectors: u64, shrink: Shrink) -> Result<(), ploop_core::Error> {
    let options = ResizeOptions { shrink, ..ResizeOptions::new("/bundle", Sectors(sectors)) };
    resize_in(folder, &options, &Silent).map(drop)
}

/// The current state may have either size, snapshots have theirs; the common part is the same, what is new is zeros. The
/// length of a raw file may be anything between.
fn judged(shape: Shape, before: &View, found: &View, sectors: u64) -> Result<(), String> {
    for (guid, old) in &before.states {
        let new = found.sectors(*guid)?;
        let old = old.sectors.as_slice();
        let is_raw_top = shape.is_raw() && shape.images() == 1;
        let fits = new.len() == old.len()
            || (*guid == Guid::TOP && new.len() as u64 == sectors)
            || (is_raw_top
                && (old.len().min(sectors as usize)..=old.len().max(sectors as usize)).contains(&new.len()));
        if !fits {
            return Err(format!("the state {guid} had {} sectors, has {}", old.len(), new.len()));
        }
        // What lies past the end of a smaller disk is gone once the descriptor says so, piece by piece.
        let kept = if *guid == Guid::TOP { sectors as usize } else { old.len() };
        let common = old.len().min(new.len()).min(kept);
        let new = if kept < old.len() { &new[..common] } else { new };
        if old[..common] != new[..common] || new[common..].iter().any(|&value| value != 0) {
            return Err(format!("the state {guid} holds something else"));
        }
    }
    if ![before.disk_sectors, sectors].contains(&found.disk_sectors) {
        return Err(format!("the descriptor says {} sectors", found.disk_sectors));
    }
    // A descriptor never says more than the image holds; what a smaller disk loses goes after its descriptor says so.
    let (old, new) = (before.sectors(Guid::TOP)?, found.sectors(Guid::TOP)?);
    if (new.len() as u64) < found.disk_sectors {
        return Err(format!("the descriptor says {} sectors, the image {}", found.disk_sectors, new.len()));
    }
    if found.disk_sectors == before.disk_sectors && new[..old.len()] != *old {
        return Err("the disk has its old size and not its old content".to_owned());
    }
    Ok(())
}

fn case(shape: Shape, sectors: u64, shrink: Shrink) -> Case {
    Case::new(format!("{shape:?} to {sectors} sectors"), shape.bundle(), move |folder| {
        to(folder, sectors, shrink)
    })
    .expecting(move |before, found| judged(shape, before, found, sectors))
    .ending(move |view| {
        if view.disk_sectors == sectors && view.sectors(Guid::TOP)?.len() as u64 == sectors {
            return Ok(());
        }
        Err("it does not have the size that was asked for".to_owned())
    })
}

#[test]
fn growing_survives_every_crash() {
    let more = [Shape::of(1).on_raw()];
    for shape in Shape::several().into_iter().chain(more) {
        survives(&case(shape, 40 * CLUSTER_SECTORS, Shrink::Refuse));
    }
}

#[test]
fn shrinking_survives_every_crash() {
    for shape in
        [Shape::of(1), Shape::of(1).version_1().holed(), Shape::of(1).on_raw(), Shape::of(1).not_closed()]
    {
        survives(&case(shape, 2 * CLUSTER_SECTORS, Shrink::Discard));
    }
}

#[test]
fn mutants_are_found() {
    // A table of two clusters, so that something lies in its way.
    let sectors = 8200 * CLUSTER_SECTORS;
    let larger = || case(Shape::of(1), sectors, Shrink::Refuse);
    let smaller = || case(Shape::of(1), 2 * CLUSTER_SECTORS, Shrink::Discard);
    hunt(
        "resizing",
        vec![
            (Mutant::MoveNotSynced, larger()),
            (Mutant::LargerBeforeImage, larger()),
            (Mutant::SmallerBeforeDescriptor, smaller()),
            (Mutant::RenameWithoutFolderSync, smaller()),
        ],
    );
}
