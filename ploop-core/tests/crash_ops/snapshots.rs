//! Snapshots of a closed disk: made, deleted, merged, switched to.

use ploop_core::error::{Error, ErrorKind};
use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::Folder;
use ploop_core::ops::merge::merge_in;
use ploop_core::ops::snapshot::snapshot_in;
use ploop_core::ops::snapshot_delete::delete_in;
use ploop_core::ops::snapshot_switch::switch_in;
use ploop_core::ops::{DeleteOptions, MergeOptions, Silent, SnapshotOptions, SwitchOptions};

use crate::bundle::{Shape, View, guid, unchanged_but};
use crate::harness::{Case, survives};

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
        let images = shape.bundle();
        let name = format!("snapshot {shape:?}");
        let made = move |folder: &dyn Folder| {
            let options = SnapshotOptions { snapshot: Some(guid(50)), temporary: false };
            match snapshot_in(folder, &options, &Silent) {
                Err(error) if error.kind() == ErrorKind::Parameter && has(folder, guid(50))? => Ok(()),
                other => other.map(drop),
            }
        };
        survives(&Case::new(name, images, made).ending(|view| {
            let same = view.sectors(guid(50))? == view.sectors(Guid::TOP)?;
            if same { Ok(()) } else { Err("the snapshot is not the current state".to_owned()) }
        }));
    }
}

#[test]
fn deleting_survives_every_crash() {
    for shape in
        [Shape::of(2), Shape::of(3).holed().not_closed(), Shape::of(3).version_1(), Shape::of(3).on_raw()]
    {
        for number in 0..shape.images() - 1 {
            let gone = shape.snapshot(number);
            let deleted = move |folder: &dyn Folder| {
                nothing_left(delete_in(folder, &DeleteOptions { snapshot: gone }, &Silent))
            };
            survives(
                &Case::new(format!("delete {number} of {shape:?}"), shape.bundle(), deleted)
                    .expecting(move |before, found| unchanged_but(before, found, &[gone])),
            );
        }
    }
    let shape = Shape::of(3).branched();
    let leaf = shape.branch();
    survives(
        &Case::new("delete a leaf", shape.bundle(), move |folder| {
            nothing_left(delete_in(folder, &DeleteOptions { snapshot: leaf }, &Silent))
        })
        .expecting(move |before, found| unchanged_but(before, found, &[leaf]))
        .ending(|view| count(view, 3)),
    );
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
                    // A raw disk that was merged into an image is none any more; what it holds is the same.
                    .expecting(move |before, found| unchanged_but(before, found, &[lower, middle]))
                    .ending(|view| count(view, 1)),
            );
        }
    }
}

#[test]
fn switching_survives_every_crash() {
    for keep in [false, true] {
        for shape in [Shape::of(2), Shape::of(3).on_raw(), Shape::of(3).not_closed()] {
            let to = shape.snapshot(0);
            let kept = keep.then(|| guid(50));
            let switched = move |folder: &dyn Folder| {
                if keep && has(folder, guid(50))? {
                    return Ok(());
                }
                switch_in(folder, &SwitchOptions { snapshot: to, keep: kept }, &Silent).map(drop)
            };
            survives(
                &Case::new(format!("switch, keeping {keep}, {shape:?}"), shape.bundle(), switched)
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
                    }),
            );
        }
    }
}
