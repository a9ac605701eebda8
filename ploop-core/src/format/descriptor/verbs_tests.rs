//! Changes of the tree of snapshots.

use super::*;
use proptest::prelude::*;

fn guid(number: u32) -> Guid {
    format!("{{00000000-0000-0000-0000-{number:012x}}}").parse().unwrap()
}

fn single() -> DiskDescriptor {
    DiskDescriptor::new_single("root.hds", Mode::Expanded, Sectors(8192), Sectors(2048)).unwrap()
}

/// Base 1, on it 2, on that 3, on that the top; files f0, f1 ...
fn line() -> DiskDescriptor {
    let mut disk = single();
    for number in 1..=3 {
        disk.add_snapshot(guid(number), &format!("f{number}")).unwrap();
    }
    disk
}

fn files(disk: &DiskDescriptor, state: Guid) -> Vec<String> {
    disk.chain_for(state).unwrap().iter().map(|image| image.file().to_owned()).collect()
}

fn obsolete(disk: &DiskDescriptor) -> Vec<&str> {
    disk.obsolete().collect()
}

/// What is written reads back as the same value.
fn survives(disk: &DiskDescriptor) {
    assert_eq!(&DiskDescriptor::parse(&disk.to_bytes()).unwrap(), disk);
}

fn kind(result: Result<()>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn snapshots_rename_the_top() {
    let disk = line();
    assert_eq!(disk.top_guid(), Guid::TOP);
    assert_eq!(files(&disk, Guid::TOP), ["root.hds", "f1", "f2", "f3"]);
    assert_eq!(files(&disk, guid(2)), ["root.hds", "f1"]);
    assert_eq!(disk.base_guid().unwrap(), guid(1));
    survives(&disk);
    let mut again = disk.clone();
    for taken in [guid(1), Guid::TOP, Guid::NONE] {
        assert_eq!(kind(again.add_snapshot(taken, "new")), ErrorKind::Parameter);
    }
    assert_eq!(kind(again.add_snapshot(guid(9), "f1")), ErrorKind::Parameter);
    assert!(again.add_snapshot(guid(9), "../x").is_err());
    assert_eq!(again, disk, "a verb that fails changes nothing");
}

#[test]
fn old_descriptors_get_the_constant_top() {
    let text = String::from_utf8(line().to_bytes()).unwrap();
    let old = text.replace(&Guid::TOP.to_string(), "{11111111-2222-3333-4444-555555555555}");
    let mut old = DiskDescriptor::parse(old.as_bytes()).unwrap();
    old.add_snapshot(guid(4), "f4").unwrap();
    assert_eq!(old.top_guid(), Guid::TOP);
    assert_eq!(files(&old, Guid::TOP), ["root.hds", "f1", "f2", "f3", "f4"]);
}

#[test]
fn names_of_new_files() {
    let disk = single();
    let name = disk.new_file_name();
    assert!(name.starts_with("root.hds.{") && name.len() == "root.hds".len() + 39, "{name}");
    assert_ne!(name, disk.new_file_name());
    let mut other = single();
    other.set_file(Guid::TOP, &name).unwrap();
    let next = other.new_file_name();
    assert!(next.starts_with("root.hds.{") && next.len() == name.len(), "{next}");
    other.set_file(Guid::TOP, &format!("sub/{}", "ü".repeat(127))).unwrap();
    assert!(other.new_file_name().len() <= 255 && !other.new_file_name().contains('/'));
}

#[test]
fn raw_disks_stay_raw_until_merged_into_a_new_image() {
    let mut disk = DiskDescriptor::new_single("a", Mode::Raw, Sectors(8192), Sectors(2048)).unwrap();
    disk.add_snapshot(guid(1), "b").unwrap();
    assert!(disk.is_raw() && disk.images().iter().all(|image| image.kind() == ImageKind::Plain));
    let mut merged = disk.clone();
    merged.finish_merge(guid(1), Guid::TOP, MergeInto::Lower).unwrap();
    assert!(merged.is_raw());
    disk.finish_merge(guid(1), Guid::TOP, MergeInto::New("c")).unwrap();
    assert_eq!((disk.mode(), files(&disk, Guid::TOP)), (Mode::Expanded, vec!["c".to_owned()]));
    assert_eq!(obsolete(&disk), ["b", "a"]);
}

#[test]
fn leaves_are_removed_and_others_are_not() {
    let mut disk = line();
    assert_eq!(kind(disk.remove(guid(2))), ErrorKind::Parameter);
    assert_eq!(kind(disk.remove(guid(77))), ErrorKind::NoSnapshot);
    assert_eq!(kind(single().remove(Guid::TOP)), ErrorKind::Parameter);
    disk.remove(Guid::TOP).unwrap();
    assert_eq!(files(&disk, Guid::TOP), ["root.hds", "f1", "f2"]);
    assert_eq!((obsolete(&disk), disk.shot(guid(3))), (vec!["f3"], None));
    survives(&disk);
    disk.forget_obsolete();
    assert!(!disk.has_obsolete());
    // The one below is marked, or carries others.
    let mut marked = line();
    marked.mark(guid(3), Transition::Temporary).unwrap();
    assert_eq!(kind(marked.remove(Guid::TOP)), ErrorKind::Parameter);
    let mut forked = line();
    forked.switch(guid(1), "g", Some(guid(8))).unwrap();
    assert_eq!(kind(forked.remove(Guid::TOP)), ErrorKind::Parameter);
    forked.remove(guid(8)).unwrap();
    assert_eq!(obsolete(&forked), ["f3"]);
}

#[test]
fn switching() {
    let mut disk = line();
    assert_eq!(kind(disk.switch(Guid::TOP, "g", None)), ErrorKind::Parameter);
    assert_eq!(kind(disk.switch(guid(9), "g", None)), ErrorKind::NoSnapshot);
    assert_eq!(kind(disk.switch(guid(1), "g", Some(guid(2)))), ErrorKind::Parameter);
    let mut kept = disk.clone();
    disk.switch(guid(1), "g", None).unwrap();
    assert_eq!(files(&disk, Guid::TOP), ["root.hds", "g"]);
    assert_eq!((obsolete(&disk), disk.children(guid(1)).count()), (vec!["f3"], 2));
    kept.switch(guid(1), "g", Some(guid(8))).unwrap();
    assert_eq!(files(&kept, guid(8)), ["root.hds", "f1", "f2", "f3"]);
    assert!(!kept.has_obsolete());
    kept.mark(guid(2), Transition::Temporary).unwrap();
    assert_eq!(kind(kept.switch(guid(2), "h", None)), ErrorKind::Parameter);
}

#[test]
fn merging_leaves_the_upper_state_in_the_chosen_file() {
    for (into, expected, gone) in [
        (MergeInto::Lower, ["root.hds", "f1", "f3"], ["f2"].as_slice()),
        (MergeInto::Upper, ["root.hds", "f2", "f3"], &["f1"]),
        (MergeInto::New("n"), ["root.hds", "n", "f3"], &["f2", "f1"]),
    ] {
        let mut disk = line();
        disk.begin_merge(guid(2), guid(3)).unwrap();
        assert_eq!(disk.shot(guid(2)).unwrap().transition(), Some(Transition::Merging));
        let text = String::from_utf8(disk.to_bytes()).unwrap();
        assert!(text.contains("<Temporary/>") && text.contains("<Merging/>"), "{text}");
        survives(&disk);
        disk.finish_merge(guid(2), guid(3), into).unwrap();
        assert_eq!(files(&disk, Guid::TOP), expected);
        assert_eq!((obsolete(&disk), disk.shot(guid(2))), (gone.to_vec(), None));
        assert_eq!(disk.shot(guid(3)).unwrap().transition(), None);
        survives(&disk);
    }
    let mut all = line();
    all.begin_merge(guid(1), Guid::TOP).unwrap();
    assert_eq!(all.shots().iter().filter(|shot| shot.transition().is_some()).count(), 3);
    all.finish_merge(guid(1), Guid::TOP, MergeInto::Lower).unwrap();
    assert_eq!((files(&all, Guid::TOP), all.shots().len()), (vec!["root.hds".to_owned()], 1));
    assert!(all.new_file_name().starts_with("root.hds.{"));
}

#[test]
fn merging_never_takes_others_with_it() {
    let mut disk = line();
    disk.switch(guid(2), "g", Some(guid(8))).unwrap();
    for (lower, upper) in [(guid(2), guid(3)), (guid(1), guid(3)), (guid(2), Guid::TOP)] {
        assert_eq!(kind(disk.begin_merge(lower, upper)), ErrorKind::Parameter);
        assert_eq!(kind(disk.finish_merge(lower, upper, MergeInto::Lower)), ErrorKind::Parameter);
    }
    for (lower, upper) in [(guid(3), guid(2)), (guid(3), Guid::TOP), (guid(3), guid(3))] {
        assert_eq!(kind(disk.begin_merge(lower, upper)), ErrorKind::Parameter);
    }
    disk.begin_merge(guid(3), guid(8)).unwrap();
    disk.begin_merge(guid(1), guid(2)).unwrap();
}

#[test]
fn the_top_is_never_marked() {
    for transition in Transition::ALL {
        assert_eq!(kind(line().mark(Guid::TOP, transition)), ErrorKind::Parameter);
        let mut disk = line();
        disk.mark(guid(1), transition).unwrap();
        survives(&disk);
        disk.unmark(guid(1)).unwrap();
        assert_eq!(disk, line());
    }
}

#[test]
fn obsolete_names_never_hit_an_image_or_leave_the_folder() {
    let mut disk = line();
    disk.remove(Guid::TOP).unwrap();
    let text = String::from_utf8(disk.to_bytes()).unwrap();
    assert!(text.contains("<Obsolete>\n    <File>f3</File>"), "{text}");
    for name in ["f1", "../x", "/etc/passwd", "DiskDescriptor.xml"] {
        let changed = text.replace("<File>f3</File>", &format!("<File>{name}</File>"));
        assert_eq!(obsolete(&DiskDescriptor::parse(changed.as_bytes()).unwrap()), [""; 0], "{name}");
    }
}

#[test]
fn files_are_announced_before_they_are_made() {
    let mut disk = line();
    disk.announce("new").unwrap();
    assert_eq!(obsolete(&disk), ["new"]);
    survives(&disk);
    assert!(disk.announce("f1").is_err() && disk.announce("../x").is_err());
    let mut merged = disk.clone();
    disk.add_snapshot(guid(4), "new").unwrap();
    assert!(!disk.has_obsolete());
    merged.finish_merge(guid(1), guid(2), MergeInto::New("new")).unwrap();
    assert_eq!(obsolete(&merged), ["f1", "root.hds"]);
    assert_eq!(merged.gone(), [guid(1), guid(2)]);
}

#[test]
fn what_a_cut_merge_needs_cannot_go() {
    let mut disk = line();
    disk.begin_merge(guid(3), Guid::TOP).unwrap();
    assert_eq!(kind(disk.remove(Guid::TOP)), ErrorKind::Parameter);
    assert_eq!(kind(disk.switch(guid(1), "g", None)), ErrorKind::Parameter);
    disk.switch(guid(1), "g", Some(guid(8))).unwrap();
    assert_eq!(kind(disk.remove(guid(8))), ErrorKind::Parameter);
    disk.finish_merge(guid(3), guid(8), MergeInto::Lower).unwrap();
}

#[test]
fn chains_have_a_limit() {
    let mut disk = single();
    for number in 1..128 {
        disk.add_snapshot(guid(number), &format!("f{number}")).unwrap();
    }
    assert_eq!(disk.chain_for(Guid::TOP).unwrap().len(), 128);
    let error = disk.add_snapshot(guid(128), "f128").unwrap_err();
    assert!(error.kind() == ErrorKind::Parameter && error.advice().is_some(), "{error}");
    disk.switch(guid(5), "g", Some(guid(500))).unwrap();
    assert_eq!(kind(disk.switch(guid(500), "h", None)), ErrorKind::Parameter);
}

#[test]
fn unknown_elements_stay() {
    let text = String::from_utf8(line().to_bytes()).unwrap();
    let text = text.replacen("<Shot>", "<Shot><Label>first</Label>", 1).replacen(
        "<Image>",
        "<Image><Note>n</Note>",
        1,
    );
    let mut disk = DiskDescriptor::parse(text.as_bytes()).unwrap();
    disk.add_snapshot(guid(4), "f4").unwrap();
    disk.finish_merge(guid(3), guid(4), MergeInto::Lower).unwrap();
    disk.switch(guid(2), "g", None).unwrap();
    let text = String::from_utf8(disk.to_bytes()).unwrap();
    assert!(text.contains("<Label>first</Label>") && text.contains("<Note>n</Note>"));
}

#[test]
fn a_clone_has_the_images_of_one_state() {
    let mut disk = line();
    disk.switch(guid(2), "g", Some(guid(8))).unwrap();
    let names = ["a".to_owned(), "b".to_owned()];
    let clone = disk.clone_of(guid(2), guid(2), &names, "t").unwrap();
    assert_eq!(
        (files(&clone, Guid::TOP), clone.shots().len()),
        (["a", "b", "t"].map(str::to_owned).to_vec(), 3)
    );
    let names = ["a", "b", "c"].map(str::to_owned);
    let clone = disk.clone_of(Guid::TOP, guid(50), &names, "t").unwrap();
    assert_eq!(files(&clone, guid(50)), names);
    survives(&clone);
    assert!(disk.clone_of(Guid::TOP, guid(1), &names, "t").is_err(), "the GUID is taken");
}

/// One random verb.
fn step() -> impl Strategy<Value = (u8, u32, u32)> {
    (0..6u8, 0..8u32, 0..8u32)
}

proptest! {
    /// Whatever is done in whatever order, the value stays sound, and what is written reads back as the same.
    #[test]
    fn every_sequence_of_verbs_keeps_a_sound_tree(steps in prop::collection::vec(step(), 1..40)) {
        let mut disk = line();
        let pick = |number: u32| if number == 0 { Guid::TOP } else { guid(number) };
        for (number, (verb, one, two)) in steps.into_iter().enumerate() {
            let file = format!("n{number}");
            let before = disk.clone();
            let done = match verb {
                0 => disk.add_snapshot(pick(one), &file),
                1 => disk.remove(pick(one)),
                2 => disk.switch(pick(one), &file, (two > 3).then(|| guid(two))),
                3 => disk.begin_merge(pick(one), pick(two)),
                4 => disk.finish_merge(pick(one), pick(two), MergeInto::Lower),
                _ => disk.unmark(pick(one)),
            };
            if done.is_err() {
                prop_assert_eq!(&disk, &before);
            }
            disk.chain_for(Guid::TOP).unwrap();
            prop_assert_eq!(&DiskDescriptor::parse(&disk.to_bytes()).unwrap(), &disk);
            // No file is both needed and to be removed, and none is lost.
            let named: std::collections::BTreeSet<&str> = disk.images().iter().map(Image::file).collect();
            prop_assert!(disk.obsolete().all(|file| !named.contains(file)));
            for image in before.images() {
                prop_assert!(named.contains(image.file()) || disk.obsolete().any(|file| file == image.file()));
            }
        }
    }
}
