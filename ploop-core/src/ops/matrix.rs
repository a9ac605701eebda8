//! Every operation, cut anywhere, and then every other: nothing is lost that neither of them was to remove, what is
//! left over is finished or refused with what to do, and a check tidies up.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{ErrorKind, Result};
use crate::format::{Guid, Mode, Version};
use crate::io::sim::{CrashLevel, CrashOptions, SimDisk, SimFolder};
use crate::io::{Access, Folder};
use crate::ops::check::{CheckOptions, Kind, Outcome, check_bundle_in};
use crate::ops::compact::{CompactOptions, compact_in};
use crate::ops::convert::{ConvertOptions, convert_in};
use crate::ops::merge::{MergeOptions, merge_in};
use crate::ops::progress::Silent;
use crate::ops::resize::{ResizeOptions, Shrink, resize_in};
use crate::ops::restore_descriptor::{RestoreOptions, restore_descriptor_in};
use crate::ops::snapshot::{SnapshotOptions, snapshot_in};
use crate::ops::snapshot_delete::{DeleteOptions, delete_in};
use crate::ops::snapshot_switch::{SwitchOptions, switch_in};
use crate::ops::testing::{CLUSTERS, descriptor, files, guid, open_state, states, three};
use crate::units::Sectors;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Snapshot,
    DeleteBase,
    DeleteMiddle,
    DeleteTop,
    Merge,
    MergeAll,
    MergeIntoNew,
    Switch,
    SwitchKeeping,
    ConvertClusters,
    ConvertVersion,
    Grow,
    Shrink,
    Compact,
    Repair,
    RestoreDescriptor,
}

use Operation::*;

const ALL: [Operation; 16] = [
    Snapshot,
    DeleteBase,
    DeleteMiddle,
    DeleteTop,
    Merge,
    MergeAll,
    MergeIntoNew,
    Switch,
    SwitchKeeping,
    ConvertClusters,
    ConvertVersion,
    Grow,
    Shrink,
    Compact,
    Repair,
    RestoreDescriptor,
];

/// Names of snapshots that are made.
const MADE: u32 = 50;
const KEPT: u32 = 51;

impl Operation {
    fn run(self, folder: &SimFolder) -> Result<()> {
        let delete = |snapshot| delete_in(folder, &DeleteOptions { snapshot }, &Silent).map(drop);
        let merge = |options: MergeOptions| merge_in(folder, &options, &Silent).map(drop);
        let switch = |keep| switch_in(folder, &SwitchOptions { snapshot: guid(1), keep }, &Silent).map(drop);
        let convert = |options: ConvertOptions| convert_in(folder, folder, &options, &Silent).map(drop);
        let resize = |clusters: u32| {
            let options = ResizeOptions {
                shrink: Shrink::Discard,
                ..ResizeOptions::new("", Sectors(64 * u64::from(clusters)))
            };
            resize_in(folder, &options, &Silent).map(drop)
        };
        match self {
            Snapshot => {
                let options = SnapshotOptions { snapshot: Some(guid(MADE)), temporary: false };
                snapshot_in(folder, &options, &Silent).map(drop)
            }
            DeleteBase => delete(guid(1)),
            DeleteMiddle => delete(guid(2)),
            DeleteTop => delete(Guid::TOP),
            Merge => merge(MergeOptions::default()),
            MergeAll => merge(MergeOptions { all: true, ..MergeOptions::default() }),
            MergeIntoNew => {
                merge(MergeOptions { new_file: Some("new.hds".to_owned()), ..MergeOptions::default() })
            }
            Switch => switch(None),
            SwitchKeeping => switch(Some(guid(KEPT))),
            ConvertClusters => {
                convert(ConvertOptions { cluster: Some(Sectors(128)), ..ConvertOptions::new("") })
            }
            ConvertVersion => {
                convert(ConvertOptions { version: Some(Version::V1), ..ConvertOptions::new("") })
            }
            Grow => resize(CLUSTERS + 4),
            Shrink => resize(CLUSTERS - 2),
            Compact => compact_in(folder, &CompactOptions::default(), &Silent).map(drop),
            Repair => {
                let report = check_bundle_in(folder, &CheckOptions::repair(""), &Silent)?;
                assert_eq!(report.exit_code, 0, "{report:?}");
                Ok(())
            }
            RestoreDescriptor => {
                restore_descriptor_in(folder, "root.hds", &RestoreOptions::new("", "root.hds")).map(drop)
            }
        }
    }

    /// The states that it removes.
    fn removes(self) -> &'static [u32] {
        match self {
            DeleteBase => &[1],
            DeleteMiddle | DeleteTop | Merge | MergeIntoNew => &[2],
            MergeAll => &[1, 2],
            _ => &[],
        }
    }

    /// Whether it is about whatever lies below the current state.
    fn is_for_the_next_below(self) -> bool {
        matches!(self, DeleteTop | Merge | MergeIntoNew)
    }

    /// Whether something else lies below the current state afterwards.
    fn changes_the_next_below(self) -> bool {
        matches!(self, Snapshot | DeleteMiddle | MergeAll | Switch | SwitchKeeping)
    }

    /// The states that it may put in place of the current one.
    fn tops(self) -> &'static [u32] {
        match self {
            DeleteTop => &[2],
            Switch | SwitchKeeping => &[1],
            _ => &[],
        }
    }
}

type States = BTreeMap<Guid, Vec<u8>>;

fn all_states(folder: &SimFolder) -> States {
    states(folder).into_iter().collect()
}

/// Whether a state is that of the beginning, but for what lies past the end of the smaller.
fn same(found: &[u8], before: &[u8]) -> bool {
    let end = found.len().min(before.len()).min(CLUSTERS as usize - 2);
    found[..end] == before[..end]
        && found.len() >= end
        && found.iter().skip(before.len()).all(|byte| *byte == 0)
}

/// What `ran` may have made of `before`.
fn judge(before: &States, found: &States, ran: &[Operation], shrunk: bool) {
    let mut removed: BTreeSet<Guid> =
        ran.iter().flat_map(|one| one.removes()).map(|&number| guid(number)).collect();
    // What removes the state under the current one meets another when that one has gone.
    let go_down =
        ran.iter().filter(|one| one.is_for_the_next_below() || one.changes_the_next_below()).count();
    if go_down > 1 && ran.iter().any(|one| one.is_for_the_next_below()) {
        removed.extend([guid(1), guid(2), guid(MADE), guid(KEPT)]);
    }
    let mut tops = vec![&before[&Guid::TOP]];
    tops.extend(ran.iter().flat_map(|one| one.tops()).filter_map(|&number| before.get(&guid(number))));
    // Two removals of the current state that both were to be done.
    if ran.iter().filter(|one| **one == DeleteTop).count() > 1 {
        tops.push(&before[&guid(1)]);
    }
    let is_same = |found: &[u8], one: &[u8]| same(found, one) && (shrunk || found.len() >= one.len());
    for (state, content) in found {
        let mut whole = match before.get(state) {
            Some(one) if *state != Guid::TOP => is_same(content, one),
            _ => tops.iter().any(|top| is_same(content, top)),
        };
        // A state that a merge has removed may be the one that another name now has.
        whole |= *state == Guid::TOP
            && ran.contains(&DeleteTop)
            && before.values().any(|one| is_same(content, one));
        assert!(whole, "{state} is changed: {content:?}");
    }
    for state in before.keys().filter(|state| !removed.contains(state)) {
        let by_top = ran.contains(&DeleteTop);
        assert!(found.contains_key(state) || by_top, "{state} is gone");
    }
}

/// What of the folder is no image of the disk.
fn strangers(folder: &SimFolder) -> Vec<String> {
    let descriptor = descriptor(folder);
    let mut names = folder.list().unwrap();
    names.retain(|name| {
        name != crate::format::DESCRIPTOR_NAME
            && !name.contains(".undo")
            && !descriptor.images().iter().any(|image| image.file() == name)
    });
    names
}

fn cut_states(mode: Mode, first: Operation, step: usize) -> Vec<SimDisk> {
    let disk = three(mode);
    disk.capture_every_operation(true);
    let outcome = first.run(&disk.folder());
    let captured = disk.take_captured();
    if let Err(error) = outcome {
        assert!(error.advice().is_some(), "{first:?}: {error}");
    }
    let mut cut = Vec::new();
    let sampled = CrashOptions::new(CrashLevel::Sectors);
    for (number, snapshot) in captured.iter().enumerate().step_by(step) {
        cut.push(snapshot.killed().into_disk(5));
        if let Some(state) = snapshot.crash_states(&sampled).nth(number % 7) {
            cut.push(state.into_disk(5));
        }
    }
    cut
}

fn try_all(mode: Mode, step: usize) {
    let before = all_states(&three(mode).folder());
    let mut failures = Vec::new();
    for first in ALL {
        let cuts = cut_states(mode, first, step);
        for (number, cut) in cuts.iter().enumerate() {
            for second in ALL {
                let disk = cut.snapshot().killed().into_disk(7);
                let folder = disk.folder();
                let place = format!("{mode:?}: {first:?} cut at {number} of {}, then {second:?}", cuts.len());
                let told = std::panic::catch_unwind(|| go_on(&disk, &folder, &before, first, second));
                if told.is_err() {
                    failures.push(place);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}: {:#?}", failures.len(), &failures[..failures.len().min(40)]);
}

fn go_on(disk: &SimDisk, folder: &SimFolder, before: &States, first: Operation, second: Operation) {
    let is_left_over = descriptor(folder).has_obsolete();
    let ended = second.run(folder);
    if let Err(error) = &ended {
        assert!(!matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Open), "{error}");
        assert!(error.advice().is_some(), "no advice: {error}");
    }
    let shrunk = [first, second].contains(&Shrink);
    judge(before, &all_states(folder), &[first, second], shrunk);
    if first == second && first == DeleteTop && is_left_over {
        assert!(all_states(folder).contains_key(&guid(1)), "one more was removed");
    }
    // The first command again, and then a check.
    if let Err(error) = first.run(folder) {
        assert!(!matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Open), "{error}");
        assert!(error.advice().is_some(), "no advice: {error}");
    }
    judge(before, &all_states(folder), &[first, second, first], shrunk);
    open_state(folder, descriptor(folder).top_guid(), Access::ReadWrite).unwrap().close().unwrap();
    let report = check_bundle_in(folder, &CheckOptions::repair(""), &Silent).unwrap();
    assert!(report.outcome < Outcome::Damaged && report.exit_code == 0, "{report:?}");
    // A conversion that was cut behind its commit, and whose new files have all been merged away: people are told.
    let told = report.findings.total(Kind::Unreferenced);
    assert!(strangers(folder).len() as u64 == told, "left: {:?}, {:?}", strangers(folder), files(folder));
    let converts = [ConvertClusters, ConvertVersion];
    assert!(told == 0 || converts.contains(&first) || converts.contains(&second), "{report:?}");
    judge(before, &all_states(folder), &[first, second, first], shrunk);
    let _alive = disk;
}

#[test]
fn every_left_over_meets_every_operation() {
    try_all(Mode::Expanded, 7);
}

#[test]
fn every_left_over_meets_every_operation_on_a_raw_base() {
    try_all(Mode::Raw, 11);
}
