//! Snapshots of a closed disk: made, deleted, merged, switched to.

use ploop_core::error::{Error, ErrorKind};
use ploop_core::format::{Chain, ChainOptions, DiskDescriptor, Guid, Source};
use ploop_core::io::{Access, Folder};
use ploop_core::mutant::Mutant;
use ploop_core::ops::merge::files::{merge_into_base, merge_into_new_file};
use ploop_core::ops::merge::merge_in;
use ploop_core::ops::snapshot::snapshot_in;
use ploop_core::ops::snapshot_delete::delete_in;
use ploop_core::ops::snapshot_switch::switch_in;
use ploop_core::ops::{DeleteOptions, MergeOptions, Silent, SnapshotOptions, SwitchOptions};

use crate::bundle::{CLUSTER_SECTORS, Shape, View, guid, unchanged_but};
use crate::harness::{Case, hunt, survives};
use crate::reading::read_all;

fn has(folder: &dyn Folder, state: Guid) -> Result<bool, Error> {
    Ok(DiskDescriptor::load(folder, None)?.shot(state).is_some())
}

/// "Run it again" of a run that was complete finds nothing left to do.
fn nothing_left<T>(result: Result<T, Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
        other => other.map(drop),
    }
}

fn count(view: &View, expected: usize) -> Result<(), String> {
    match view.states.len() {
        found if found == expected => Ok(()),
        found => Err(format!("{found} states, not {expected}")),
    }
}

#[test]
fn making_one_survives_every_crash() {
    for shape in Shape::several() {
        survives(&making(shape));
    }
}

fn making(shape: Shape) -> Case {
    let made = move |folder: &dyn Folder| {
        let options = SnapshotOptions { snapshot: Some(guid(50)), temporary: false };
        match snapshot_in(folder, &options, &Silent) {
            Err(error) if error.kind() == ErrorKind::Parameter && has(folder, guid(50))? => Ok(()),
            other => other.map(drop),
        }
    };
    Case::new(format!("snapshot {shape:?}"), shape.bundle(), made).ending(|view| {
        let same = view.sectors(guid(50))? == view.sectors(Guid::TOP)?;
        if same { Ok(()) } else { Err("the snapshot is not the current state".to_owned()) }
    })
}

/// A state of a chain goes; the one that stands on it takes its file.
fn deleting(shape: Shape, number: usize) -> Case {
    let gone = shape.snapshot(number);
    let deleted = move |folder: &dyn Folder| {
        nothing_left(delete_in(folder, &DeleteOptions { snapshot: gone }, &Silent))
    };
    Case::new(format!("delete {number} of {shape:?}"), shape.bundle(), deleted)
        .living_on_lies()
        .expecting(move |before, found| unchanged_but(before, found, &[gone]))
}

fn deleting_a_leaf() -> Case {
    let shape = Shape::of(3).branched();
    let leaf = shape.branch();
    Case::new("delete a leaf", shape.bundle(), move |folder| {
        nothing_left(delete_in(folder, &DeleteOptions { snapshot: leaf }, &Silent))
    })
    .expecting(move |before, found| unchanged_but(before, found, &[leaf]))
    .ending(|view| count(view, 3))
}

#[test]
fn mutants_are_found() {
    let image = Shape::of(1);
    hunt(
        "snapshots",
        vec![
            (Mutant::NewImageUnsynced, making(image)),
            (Mutant::NewNameUnsynced, making(image)),
            (Mutant::NotAnnounced, making(image)),
            (Mutant::RenameUnsyncedFile, making(image)),
            (Mutant::RenameWithoutFolderSync, making(image)),
            (Mutant::MergeUnmarked, deleting(Shape::of(2), 0)),
            (Mutant::MergedTableEarly, deleting(Shape::of(2), 0)),
            (Mutant::CommitBeforeMerge, deleting(Shape::of(2), 0)),
            (Mutant::RemovedBeforeCommit, deleting(Shape::of(2), 0)),
            (Mutant::RemovedBeforeCommit, deleting_a_leaf()),
            (Mutant::RemovedBeforeCommit, switching(Shape::of(2), false)),
            (Mutant::NewImageUnsynced, switching(Shape::of(2), true)),
            (Mutant::NewNameUnsynced, switching(Shape::of(2), true)),
        ],
    );
}

#[test]
fn deleting_survives_every_crash() {
    for shape in
        [Shape::of(2), Shape::of(3).holed().not_closed(), Shape::of(3).version_1(), Shape::of(3).on_raw()]
    {
        for number in 0..shape.images() - 1 {
            survives(&deleting(shape, number));
        }
    }
    survives(&deleting_a_leaf());
}

#[test]
fn merging_survives_every_crash() {
    for new_file in [None, Some("new.hds")] {
        for shape in [Shape::of(3), Shape::of(3).with_odd_end(), Shape::of(3).on_raw().not_closed()] {
            let (lower, middle) = (shape.snapshot(0), shape.snapshot(1));
            let merged = move |folder: &dyn Folder| {
                let options = MergeOptions {
                    snapshot: Some(Guid::TOP),
                    other: Some(lower),
                    all: false,
                    new_file: new_file.map(str::to_owned),
                };
                nothing_left(merge_in(folder, &options, &Silent))
            };
            survives(
                &Case::new(format!("merge {shape:?} into {new_file:?}"), shape.bundle(), merged)
                    .living_on_lies()
                    // A raw disk that was merged into an image is none any more; what it holds is the same.
                    .expecting(move |before, found| unchanged_but(before, found, &[lower, middle]))
                    .ending(|view| count(view, 1)),
            );
        }
    }
}

/// The images of a shape, base first, the base open for `access`.
fn sources(folder: &dyn Folder, shape: Shape, access: Access) -> Result<Vec<Source>, Error> {
    let source = |number: usize| {
        let file = shape.file(number);
        let access = if number == 0 { access } else { Access::ReadOnly };
        let storage =
            folder.open(&file, access).map_err(|cause| Error::io(ErrorKind::Open, "open an image", cause))?;
        Ok(Source { name: file.into(), storage, raw: number == 0 && shape.is_raw() })
    };
    (0..shape.images()).map(source).collect()
}

/// By file names: the descriptor is not asked, and stays as it is.
#[test]
fn merging_files_into_their_base_survives_every_crash() {
    for shape in [
        Shape::of(2),
        Shape::of(3).holed(),
        Shape::of(3).version_1().not_closed(),
        Shape::of(2).with_odd_end(),
        Shape::of(3).on_raw(),
    ] {
        let merged = move |folder: &dyn Folder| {
            merge_into_base(sources(folder, shape, Access::ReadWrite)?, &Silent).map(drop)
        };
        survives(
            &Case::new(format!("merge the files of {shape:?}"), shape.bundle(), merged)
                // Base and deltas together read as before at every moment; the lower ones by themselves do not.
                .expecting(move |before, found| {
                    if found.sectors(Guid::TOP)? == before.sectors(Guid::TOP)? {
                        Ok(())
                    } else {
                        Err("what stands on the base changed".to_owned())
                    }
                })
                .ending(move |view| {
                    if view.sectors(shape.snapshot(0))? == view.sectors(Guid::TOP)? {
                        Ok(())
                    } else {
                        Err("the base does not hold all of it".to_owned())
                    }
                }),
        );
    }
}

#[test]
fn merging_files_into_a_new_one_survives_every_crash() {
    for shape in [Shape::of(3).holed().not_closed(), Shape::of(2).on_raw()] {
        let merged = move |folder: &dyn Folder| {
            match merge_into_new_file(sources(folder, shape, Access::ReadOnly)?, folder, "new.hds", &Silent) {
                // A run that was complete: it is whole.
                Err(error) if error.kind() == ErrorKind::Parameter => {}
                other => return other.map(drop),
            }
            let storage = folder
                .open("new.hds", Access::ReadOnly)
                .map_err(|cause| Error::io(ErrorKind::Open, "open the new file", cause))?;
            let options = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
            let new = Chain::open(vec![Source { name: "new.hds".into(), storage, raw: false }], &options)?;
            let raw_cluster = Some(ploop_core::units::Sectors(CLUSTER_SECTORS));
            let options = ChainOptions { raw_cluster, ..options };
            let old = Chain::open(sources(folder, shape, Access::ReadOnly)?, &options)?;
            match (read_all(&new), read_all(&old)) {
                (Ok(new), Ok(old)) if new == old => Ok(()),
                other => {
                    Err(Error::new(ErrorKind::Corrupt, format!("the new file is another disk: {other:?}")))
                }
            }
        };
        survives(
            &Case::new(format!("merge the files of {shape:?} into a new one"), shape.bundle(), merged)
                .leaving(|name| name.contains(".tmp.") || name == "new.hds"),
        );
    }
}

#[test]
fn switching_survives_every_crash() {
    for keep in [false, true] {
        for shape in [Shape::of(2), Shape::of(3).on_raw(), Shape::of(3).not_closed()] {
            survives(&switching(shape, keep));
        }
    }
}

/// To the base.
fn switching(shape: Shape, keep: bool) -> Case {
    let to = shape.snapshot(0);
    let kept = keep.then(|| guid(50));
    let switched = move |folder: &dyn Folder| {
        if keep && has(folder, guid(50))? {
            return Ok(());
        }
        switch_in(folder, &SwitchOptions { snapshot: to, keep: kept }, &Silent).map(drop)
    };
    Case::new(format!("switch, keeping {keep}, {shape:?}"), shape.bundle(), switched)
        // The current state is the one before or the snapshot's.
        .expecting(move |before, found| {
            let top = found.sectors(Guid::TOP)?;
            if top != before.sectors(Guid::TOP)? && top != before.sectors(to)? {
                return Err("the current state is neither".to_owned());
            }
            if keep
                && found.states.contains_key(&guid(50))
                && found.sectors(guid(50))? != before.sectors(Guid::TOP)?
            {
                return Err("what was kept is not what was there".to_owned());
            }
            let mut others = found.clone();
            others.states.insert(Guid::TOP, before.states[&Guid::TOP].clone());
            others.states.remove(&guid(50));
            unchanged_but(before, &others, &[])
        })
        .ending(move |view| {
            let same = view.sectors(Guid::TOP)? == view.sectors(to)?;
            if same { Ok(()) } else { Err("the current state is not the snapshot".to_owned()) }
        })
}
