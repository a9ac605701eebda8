//! Merges in simulated folders: contents, refusals, faults, crashes, states of other implementations.

use super::*;
use crate::format::Mode;
use crate::io::StorageExt;
use crate::io::sim::{Call, CrashLevel, CrashOptions, Fault, SimDisk, SimFolder};
use crate::ops::image_files;
use crate::ops::progress::Silent;
use crate::ops::snapshot_switch::{SwitchOptions, switch_in};
use crate::ops::testing::{descriptor, files, guid, read, snapshot, states, three, write};

const MODES: [Mode; 3] = [Mode::Expanded, Mode::Preallocated, Mode::Raw];

fn options(snapshot: Option<u32>) -> MergeOptions {
    MergeOptions { snapshot: snapshot.map(guid), ..MergeOptions::default() }
}

fn merge_it(folder: &SimFolder, options: &MergeOptions) -> Result<MergeReport> {
    merge_in(folder, options, &Silent)
}

/// All ways to merge `three`, with what is left.
fn ways() -> Vec<(MergeOptions, usize)> {
    let all = MergeOptions { all: true, ..MergeOptions::default() };
    vec![
        (options(None), 2),
        (options(Some(2)), 2),
        (all.clone(), 1),
        (MergeOptions { other: Some(guid(1)), ..options(None) }, 1),
        (MergeOptions { other: Some(Guid::TOP), ..options(Some(2)) }, 2),
        (MergeOptions { new_file: Some("new".to_owned()), ..options(Some(2)) }, 2),
        (MergeOptions { new_file: Some("new".to_owned()), ..all }, 1),
    ]
}

#[test]
fn what_remains_reads_as_before() {
    for mode in MODES {
        for (options, left) in ways() {
            let disk = three(mode);
            let folder = disk.folder();
            let before = states(&folder);
            let report = merge_it(&folder, &options).unwrap();
            let after = states(&folder);
            assert_eq!(after.len(), left, "{options:?}");
            assert!(after.iter().all(|state| before.contains(state)), "{mode:?} {options:?}");
            assert_eq!(files(&folder).len(), left, "{options:?}: {:?}", files(&folder));
            assert!(files(&folder).contains(&report.file), "{report:?}");
            assert_eq!(report.merged.len() + left, 3);
            assert!(!descriptor(&folder).has_obsolete());
            // And it can be used.
            write(&folder, &[(14, 9)]);
            assert_eq!(read(&folder, Guid::TOP)[14], 9);
        }
    }
}

#[test]
fn zeros_over_nothing_take_no_space() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let report = merge_it(&folder, &MergeOptions { all: true, ..MergeOptions::default() }).unwrap();
    // 2, 4 and 5 of the top, 1, 3 and 10 of the middle, and the zeros over cluster 9; not those over nothing.
    assert_eq!(report.copied_bytes, 7 * 32768);
}

#[test]
fn wrong_wishes() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let before = states(&folder);
    for (options, kind) in [
        (options(Some(1)), ErrorKind::Parameter),
        (options(Some(77)), ErrorKind::NoSnapshot),
        (MergeOptions { other: Some(guid(77)), ..options(Some(2)) }, ErrorKind::NoSnapshot),
        (MergeOptions { all: true, ..options(Some(2)) }, ErrorKind::Parameter),
        (MergeOptions { new_file: Some("root.hds".to_owned()), ..options(None) }, ErrorKind::Parameter),
        (MergeOptions { new_file: Some("../new".to_owned()), ..options(None) }, ErrorKind::Parameter),
    ] {
        let error = merge_it(&folder, &options).unwrap_err();
        assert_eq!(error.kind(), kind, "{options:?}: {error}");
    }
    // Another state stands on 1.
    switch_in(&folder, &SwitchOptions { snapshot: guid(1), keep: Some(guid(3)) }, &Silent).unwrap();
    assert_eq!(merge_it(&folder, &options(Some(2))).unwrap_err().kind(), ErrorKind::Parameter);
    assert!(before.iter().all(|state| state.0 == Guid::TOP || states(&folder).contains(state)));
}

#[test]
fn a_disk_without_snapshots_has_nothing_to_merge() {
    let disk = crate::ops::testing::disk(Mode::Expanded);
    for all in [false, true] {
        let options = MergeOptions { all, ..MergeOptions::default() };
        assert_eq!(merge_it(&disk.folder(), &options).unwrap_err().kind(), ErrorKind::Parameter);
    }
}

/// What a guest sees after a crash or fault, then after the same command once more, which ends well.
fn judge_again(disk: &SimDisk, options: &MergeOptions, before: &[(Guid, Vec<u8>)], left: usize, place: &str) {
    let folder = disk.folder();
    for state in states(&folder) {
        assert!(before.contains(&state), "{place}: {state:?}");
    }
    // Wholly done but for the answer: the command would mean the next one below.
    if descriptor(&folder).shots().len() > left || descriptor(&folder).has_obsolete() {
        let merged = merge_it(&folder, options);
        assert!(merged.is_ok(), "{place}: {merged:?}");
    }
    let after = states(&folder);
    assert_eq!(after.len(), left, "{place}");
    assert!(after.iter().all(|state| before.contains(state)), "{place}");
    assert_eq!(files(&folder).len(), left, "{place}: {:?}", files(&folder));
}

#[test]
fn every_crash_leaves_the_states_and_the_command_goes_on() {
    for (mode, (options, left)) in [Mode::Expanded, Mode::Raw]
        .into_iter()
        .flat_map(|mode| ways().into_iter().map(move |way| (mode, way)))
    {
        let disk = three(mode);
        let before = states(&disk.folder());
        disk.capture_every_operation(true);
        merge_it(&disk.folder(), &options).unwrap();
        let captured = disk.take_captured();
        assert!(captured.len() > 20);
        for (number, snapshot) in captured.into_iter().enumerate().step_by(3) {
            let sampled = CrashOptions::new(CrashLevel::Sectors);
            for (state, crashed) in snapshot.crash_states(&sampled).enumerate().step_by(11) {
                let place = format!("{mode:?} {options:?} operation {number} state {state}");
                judge_again(&crashed.into_disk(5), &options, &before, left, &place);
            }
        }
    }
}

#[test]
fn every_fault_is_told_and_the_command_goes_on() {
    for (options, left) in ways() {
        for calls in 0.. {
            let disk = three(Mode::Expanded);
            let before = states(&disk.folder());
            disk.inject(Fault::any(libc::EIO).after(calls));
            let merged = merge_it(&disk.folder(), &options);
            let happened = disk.faults_happened();
            disk.heal();
            let place = format!("{options:?} call {calls}: {merged:?}");
            if merged.is_ok() {
                assert!(!happened, "an error was dropped: {place}");
                break;
            }
            judge_again(&disk, &options, &before, left, &place);
        }
    }
}

/// Cancels at the first opportunity.
struct Impatient;

impl Progress for Impatient {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Cancelled, "enough"))
    }
}

#[test]
fn cancelled_merges_go_on_later() {
    for (options, left) in ways() {
        let disk = three(Mode::Expanded);
        let before = states(&disk.folder());
        let cancelled = merge_in(&disk.folder(), &options, &Impatient);
        assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
        judge_again(&disk, &options, &before, left, "cancelled");
    }
}

#[test]
fn a_merge_that_was_cut_is_finished_by_other_commands() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let top = read(&folder, Guid::TOP);
    merge_in(&folder, &options(Some(2)), &Impatient).unwrap_err();
    let cut = descriptor(&folder);
    assert_eq!(cut.shot(guid(1)).unwrap().transition(), Some(Transition::Merging));
    // Its state cannot be used, those above can.
    assert!(crate::ops::open::check_readable(&cut, guid(1)).is_err());
    assert_eq!(read(&folder, Guid::TOP), top);
    snapshot(&folder, 5);
    switch_in(&folder, &SwitchOptions { snapshot: guid(2), keep: None }, &Silent).unwrap();
    assert!(descriptor(&folder).shot(guid(1)).is_none());
    assert_eq!(read(&folder, guid(5)), top);
}

/// The other implementation merges a top into the base by clearing in the base what the top holds, exchanging the
/// files, and copying up. What it leaves when cut is finished.
#[test]
fn upward_merges_of_the_other_implementation_are_finished() {
    for swapped in [false, true] {
        let disk = crate::ops::testing::disk(Mode::Expanded);
        let folder = disk.folder();
        write(&folder, &[(0, 1), (1, 1), (2, 1)]);
        snapshot(&folder, 1);
        write(&folder, &[(1, 2), (5, 2)]);
        let top = read(&folder, Guid::TOP);
        let cut = descriptor(&folder);
        let (base_file, top_file) = ("root.hds".to_owned(), cut.image(Guid::TOP).unwrap().file().to_owned());
        // Cluster 1 is cleared in the base.
        let base = folder.open(&base_file, Access::ReadWrite).unwrap();
        base.write_all_at(64 + 4, &[0; 4]).unwrap();
        base.sync_data().unwrap();
        drop(base);
        let mut text = String::from_utf8(cut.to_bytes()).unwrap();
        let mark = if swapped { "TemporaryZeroSwap" } else { "TemporaryZero" };
        let parent = format!("<ParentGUID>{}</ParentGUID>", Guid::NONE);
        text = text.replace(&parent, &format!("{parent}<{mark}/>"));
        if swapped {
            text = text
                .replace(&format!("<File>{top_file}<"), "<File>@<")
                .replace("<File>root.hds<", &format!("<File>{top_file}<"))
                .replace("<File>@<", "<File>root.hds<");
        }
        DiskDescriptor::parse(text.as_bytes()).unwrap().store(&folder).unwrap();
        assert_eq!(read(&folder, Guid::TOP), top, "{mark}: readable as it is");
        let mut changed = descriptor(&folder);
        let reports = complete_in(&folder, &mut changed, Asked::Merge, &Silent).unwrap();
        assert_eq!(reports.len(), 1);
        assert_eq!((read(&folder, Guid::TOP), files(&folder)), (top, vec![base_file]), "{mark}");
        assert_eq!(changed.shots().len(), 1);
    }
}

/// A smaller image above, and on it a larger one that does not hide what lies below: as no program of ours leaves it.
#[test]
fn what_a_later_state_shows_is_not_cut_off() {
    let disk = three(Mode::Expanded);
    let folder = disk.folder();
    let file = descriptor(&folder).image(guid(2)).unwrap().file().to_owned();
    let above = folder.open(&file, Access::ReadWrite).unwrap();
    // Cluster 9 of the base is hidden by the top, cluster 2 is not.
    for (clusters, is_shown) in [(2u64, true), (5, false)] {
        above.write_all_at(36, &(64 * clusters).to_le_bytes()).unwrap();
        above.write_all_at(32, &u32::try_from(clusters).unwrap().to_le_bytes()).unwrap();
        above.sync_data().unwrap();
        if is_shown {
            write(&folder, &[]);
            let before = states(&folder);
            // The top holds cluster 2 itself: take that away.
            let top =
                folder.open(descriptor(&folder).image(Guid::TOP).unwrap().file(), Access::ReadWrite).unwrap();
            let mut entry = [0; 4];
            top.read_exact_at(64 + 8, &mut entry).unwrap();
            top.write_all_at(64 + 8, &[0; 4]).unwrap();
            top.sync_data().unwrap();
            assert_eq!(read(&folder, Guid::TOP)[2], 1, "it shows the base");
            for new_file in [None, Some("new".to_owned())] {
                let error = merge_it(&folder, &MergeOptions { new_file, ..options(Some(2)) }).unwrap_err();
                assert!(error.kind() == ErrorKind::Parameter && error.advice().is_some(), "{error}");
            }
            assert!(descriptor(&folder).shots().iter().all(|shot| shot.transition().is_none()));
            top.write_all_at(64 + 8, &entry).unwrap();
            top.sync_data().unwrap();
            assert_eq!(states(&folder), before);
            continue;
        }
        let before = states(&folder);
        merge_it(&folder, &options(Some(2))).unwrap();
        let after = states(&folder);
        assert!(after.len() == 2 && after.iter().all(|state| before.contains(state)), "{after:?}");
    }
}

/// A disk whose current state is larger than its snapshots: the last cluster is new.
fn grown(mode: Mode) -> SimDisk {
    let disk = three(mode);
    let folder = disk.folder();
    let cut = descriptor(&folder);
    let small = 64 * 15u64;
    for number in [guid(1), guid(2)] {
        let image = folder.open(cut.image(number).unwrap().file(), Access::ReadWrite).unwrap();
        if image_files::is_raw(&cut, number) {
            image.set_len(small * 512).unwrap();
        } else {
            image.write_all_at(36, &small.to_le_bytes()).unwrap();
            image.write_all_at(32, &15u32.to_le_bytes()).unwrap();
        }
        image.sync_data().unwrap();
    }
    write(&folder, &[(15, 8)]);
    disk
}

#[test]
fn a_larger_image_above_is_merged() {
    for mode in [Mode::Expanded, Mode::Raw] {
        for (options, left) in [(options(None), 2), (MergeOptions { all: true, ..options(None) }, 1)] {
            let disk = grown(mode);
            let top = read(&disk.folder(), Guid::TOP);
            let before = states(&disk.folder());
            assert_eq!((top.len(), top[15]), (16, 8));
            disk.capture_every_operation(true);
            merge_it(&disk.folder(), &options).unwrap();
            assert_eq!((read(&disk.folder(), Guid::TOP), files(&disk.folder()).len()), (top, left));
            assert_eq!(descriptor(&disk.folder()).is_raw(), mode == Mode::Raw);
            for (number, snapshot) in disk.take_captured().into_iter().enumerate() {
                for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)).step_by(11) {
                    judge_again(&state.into_disk(5), &options, &before, left, &format!("{mode:?} {number}"));
                }
            }
        }
    }
}

/// A chain that the original wrote becomes what the original made of it, and QEMU reads it the same.
#[test]
fn a_chain_of_the_original_merges_to_the_same() {
    use crate::ops::open;
    use std::path::Path;
    use std::process::Command;

    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let place = tempfile::tempdir().unwrap();
    for name in ["chain-v2", "merged-v2"] {
        let archive = golden.join(format!("{name}.tar.zst"));
        if !archive.exists() {
            ploop_testing::skip(ploop_testing::Need::Other, "no files of the original");
            return;
        }
        let unpacked =
            Command::new("tar").args(["--zstd", "-xf"]).arg(&archive).arg("-C").arg(place.path()).status();
        assert!(unpacked.unwrap().success());
    }
    let content = |name: &str| {
        let options = open::OpenOptions::new(place.path().join(name), Access::ReadOnly);
        crate::format::testing::guest_content(&open::open(&options).unwrap().chain)
    };
    let expected = content("merged-v2");
    let path = place.path().join("chain-v2");
    let one_by_one = MergeOptions {
        snapshot: "{00000002-aaaa-bbbb-cccc-000000000002}".parse().ok(),
        ..MergeOptions::default()
    };
    let report = merge(&path, &one_by_one, Duration::ZERO, &Silent).unwrap();
    assert_eq!(report.file, "root.hds");
    assert!(content("chain-v2") == expected);
    let report =
        merge(&path, &MergeOptions { all: true, ..MergeOptions::default() }, Duration::ZERO, &Silent)
            .unwrap();
    assert_eq!(report.merged.len(), 2);
    assert!(content("chain-v2") == expected);
    let text = |name: &str| std::fs::read_to_string(place.path().join(name).join(DESCRIPTOR_NAME)).unwrap();
    assert_eq!(text("chain-v2"), text("merged-v2"));
    let image = |name: &str| place.path().join(name).join("root.hds");
    let Ok(checked) =
        Command::new("qemu-img").args(["check", "-q", "-f", "parallels"]).arg(image("chain-v2")).status()
    else {
        ploop_testing::skip(ploop_testing::Need::Program("qemu-img"), "qemu-img is not installed");
        return;
    };
    assert!(checked.success());
    let same = Command::new("qemu-img")
        .args(["compare", "-q", "-f", "parallels", "-F", "parallels"])
        .args([image("chain-v2"), image("merged-v2")])
        .status()
        .unwrap();
    assert!(same.success());
}

/// A switch that was cut is no merge: the next merge does what it says.
#[test]
fn a_merge_after_a_cut_switch_merges() {
    for cut in [None, Some(guid(1))] {
        let disk = three(Mode::Expanded);
        let folder = disk.folder();
        disk.inject(Fault::once(Call::Unlink, libc::EIO));
        let snapshot = cut.unwrap_or(guid(2));
        let switched = switch_in(&folder, &SwitchOptions { snapshot, keep: None }, &Silent);
        disk.heal();
        assert!(switched.is_err() && descriptor(&folder).has_obsolete());
        let before = descriptor(&folder).shots().len();
        let merged = merge_it(&folder, &options(None));
        if cut.is_some() {
            // Another state stands on 1.
            assert_eq!(merged.unwrap_err().kind(), ErrorKind::Parameter);
            continue;
        }
        assert_eq!(merged.unwrap().merged, [guid(2)]);
        assert_eq!(descriptor(&folder).shots().len(), before - 1);
    }
}
