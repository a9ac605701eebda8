//! Descriptors of other programs: what they say beside ours, split disks, names that lead elsewhere, entries that hang in
//! the air.

use std::path::Path;

use super::*;

const BASE: &str = "{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}";
const SIDE: &str = "{22222222-2222-4222-8222-222222222222}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NIL: &str = "{00000000-0000-0000-0000-000000000000}";

fn image(guid: &str, file: &str) -> String {
    format!("<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>{file}</File></Image>")
}

fn shot(guid: &str, parent: &str) -> String {
    format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>")
}

fn storage(start: u64, end: u64, images: &str) -> String {
    format!("<Storage><Start>{start}</Start><End>{end}</End><Blocksize>64</Blocksize>{images}</Storage>")
}

fn document(parameters: &str, storages: &str, shots: &str) -> String {
    format!(
        "<?xml version='1.0' encoding='UTF-8'?><Parallels_disk_image Version=\"1.0\"><Disk_Parameters>\
         <Disk_size>1920</Disk_size>{parameters}</Disk_Parameters><StorageData>{storages}</StorageData>\
         <Snapshots>{shots}</Snapshots></Parallels_disk_image>"
    )
}

fn single(parameters: &str, file: &str) -> String {
    document(parameters, &storage(0, 1920, &image(TOP, file)), &shot(TOP, NIL))
}

fn parse(text: &str) -> Result<DiskDescriptor> {
    DiskDescriptor::parse(text.as_bytes())
}

fn described(text: &str) -> Result<Described> {
    Described::parse(text.as_bytes(), &Names::of_document(None))
}

/// As a reader in a folder that has these files.
fn in_folder(text: &str, files: &[&str], outside: bool) -> Result<DiskDescriptor> {
    let is_there = |name: &str| files.contains(&name);
    let names = Names { folder: Some(Path::new("/here")), is_there: &is_there, outside };
    Described::parse(text.as_bytes(), &names)?.whole()
}

#[test]
fn encryption_is_seen_and_kept() {
    let engine = "<Encryption><Engine>{a6d3ac3e-7d1c-4b2e-9f1e-2f4f9a1b0c11}</Engine><Data>AAEC</Data><Salt>x</Salt></Encryption>";
    let key = "<Encryption><KeyId>key 1</KeyId></Encryption>";
    for (text, expected) in [
        (engine, Some("a6d3ac3e")),
        (key, Some("key 1")),
        ("<Encryption><Engine>unknown words</Engine></Encryption>", Some("unknown words")),
        (&format!("<Encryption/>{key}"), Some("key 1")),
        (&format!("<Encryption><Engine>{NIL}</Engine><KeyId> </KeyId><Data>x</Data></Encryption>"), None),
        ("<Encryption><Engine></Engine></Encryption>", None),
        ("", None),
    ] {
        let descriptor = parse(&single(text, "a")).unwrap();
        let found = descriptor.encryption().map(|encryption| encryption.to_string());
        match expected {
            None => assert_eq!(found, None, "{text}"),
            Some(words) => {
                assert!(found.is_some_and(|found| found.contains(words) && found.contains("encrypted")))
            }
        }
        // Resized, it is written anew.
        let mut next = descriptor.clone();
        next.set_disk_sectors(Sectors(4096)).unwrap();
        let again = DiskDescriptor::parse(&next.to_bytes()).unwrap();
        assert_eq!(again.encryption(), descriptor.encryption());
        let printed = String::from_utf8(next.to_bytes()).unwrap();
        assert!(
            !text.contains("AAEC")
                || printed.contains("<Data>AAEC</Data>") && printed.contains("<Salt>x</Salt>")
        );
    }
}

#[test]
fn what_would_be_read_from_a_wrong_place_is_refused_by_its_name() {
    for (parameters, name) in [
        ("<Padding>1</Padding>", "<Padding>"),
        ("<Padding>x</Padding>", "<Padding>"),
        ("<LogicSectorSize>4096</LogicSectorSize>", "<LogicSectorSize>"),
        ("<LogicSectorSize>0</LogicSectorSize>", "<LogicSectorSize>"),
        ("<LogicSectorSize>512B</LogicSectorSize>", "<LogicSectorSize>"),
    ] {
        let error = parse(&single(parameters, "a")).unwrap_err();
        assert!(error.to_string().contains(name) && error.advice().is_some(), "{parameters}: {error}");
    }
    for sound in [
        "<Padding>0</Padding>",
        "<Padding/>",
        "<LogicSectorSize>512</LogicSectorSize>",
        "<LogicSectorSize>0x200</LogicSectorSize>",
        "<PhysicalSectorSize>4096</PhysicalSectorSize>",
    ] {
        assert!(parse(&single(sound, "a")).is_ok(), "{sound}");
    }
}

#[test]
fn a_suspended_machine_is_seen() {
    let with = |state: &str| {
        let parameters = format!("<Miscellaneous><SuspendState>{state}</SuspendState></Miscellaneous>");
        parse(&single(&parameters, "a")).unwrap().is_suspended()
    };
    assert!(with("1") && with("yes") && !with("0") && !with(""));
    assert!(!parse(&single("", "a")).unwrap().is_suspended());
}

#[test]
fn split_disks_are_their_parts_in_order() {
    let part = |start, end, file: &str| {
        storage(start, end, &(image(BASE, &format!("{file}.b")) + &image(TOP, file)))
    };
    let shots = shot(BASE, NIL) + &shot(TOP, BASE);
    let sound = document("", &(part(0, 640, "x") + &part(640, 1900, "y") + &part(1900, 1920, "z")), &shots);
    let Described::Split(split) = described(&sound).unwrap() else { panic!("not split") };
    let sizes: Vec<(u64, u64)> =
        split.parts().iter().map(|part| (part.start.0, part.descriptor.disk_sectors().0)).collect();
    assert_eq!((sizes, split.disk_sectors()), (vec![(0, 640), (640, 1260), (1900, 20)], Sectors(1920)));
    let chain: Vec<&str> =
        split.parts()[1].descriptor.chain_for(Guid::TOP).unwrap().iter().map(|one| one.file()).collect();
    assert_eq!(chain, ["y.b", "y"]);
    let error = parse(&sound).unwrap_err();
    assert!(
        error.to_string().contains("split into 3") && error.advice().unwrap().contains("ploop import"),
        "{error}"
    );

    for (storages, why) in [
        (part(0, 640, "x") + &part(641, 1920, "y"), "a gap"),
        (part(0, 640, "x") + &part(639, 1920, "y"), "an overlap"),
        (part(640, 1920, "y") + &part(0, 640, "x"), "a gap"),
        (part(0, 640, "x") + &part(640, 1919, "y"), "ends at sector 1919"),
        (part(0, 640, "x") + &part(640, 1921, "y"), "ends at sector 1921"),
        (part(0, 640, "x") + &part(640, 640, "y") + &part(640, 1920, "z"), "ends at sector 640"),
        (part(0, 640, "x") + &part(640, 2, "y"), "ends at sector 2"),
        (part(0, 640, "x") + &part(640, u64::MAX, "y"), "is no size"),
        (part(0, 640, "x") + &part(640, 1920, "x"), "belongs to two images"),
        (part(7, 1920, "x"), "a gap"),
    ] {
        let error = described(&document("", &storages, &shots)).unwrap_err();
        assert!(error.to_string().contains(why), "{error} does not say {why}");
    }
    let many: String = (0..5000).map(|number| part(number, number + 1, &number.to_string())).collect();
    assert!(described(&document("", &many, &shots)).is_err());
}

#[test]
fn a_moved_bundle_takes_the_file_that_lies_in_it() {
    for path in ["/Users/Shared/Win.pvm/disk.hdd/disk.hds", "C:\\vm\\disk.hdd\\disk.hds", "C:/vm/disk.hds"] {
        let found = in_folder(&single("", path), &["disk.hds"], false).unwrap();
        assert_eq!(found.images()[0].file(), "disk.hds", "{path}");
        assert!(found.notes()[0].contains("disk.hds"), "{:?}", found.notes());
        // Where no such file is: nothing outside is looked at.
        let error = in_folder(&single("", path), &["other.hds"], false).unwrap_err();
        assert!(
            error.to_string().contains("absolute") && error.advice().unwrap().contains("--allow-parent"),
            "{error}"
        );
        // Written back, it is the name.
        assert!(String::from_utf8(found.to_bytes()).unwrap().contains("<File>disk.hds</File>"));
    }
    // In its own folder, as old tools wrote it: nothing to say.
    let own = in_folder(&single("", "/here/disk.hds"), &["disk.hds"], false).unwrap();
    assert!(own.notes().is_empty() && own.images()[0].file() == "disk.hds");
    // What would be the descriptor itself, or no name.
    for path in ["/a/DiskDescriptor.xml", "/a/..", "/a/"] {
        assert!(in_folder(&single("", path), &["DiskDescriptor.xml", "..", ""], false).is_err(), "{path}");
    }
    // The file of a parent that has the same name as another image's is not that image.
    for (base, top) in [("/p/disk.hds", "disk.hds"), ("/p/disk.hds", "/c/disk.hds")] {
        let images = image(BASE, base) + &image(TOP, top);
        let text = document("", &storage(0, 1920, &images), &(shot(BASE, NIL) + &shot(TOP, BASE)));
        assert!(in_folder(&text, &["disk.hds"], false).unwrap_err().to_string().contains("absolute"));
    }
}

#[test]
fn a_parent_outside_is_kept_only_for_who_asked_for_it() {
    let images = image(BASE, "../parent.hdd/parent.hds") + &image(TOP, "clone.hds");
    let text = document("", &storage(0, 1920, &images), &(shot(BASE, NIL) + &shot(TOP, BASE)));
    let error = in_folder(&text, &["clone.hds", "parent.hds"], false).unwrap_err();
    assert!(
        error.to_string().contains("leads out") && error.advice().unwrap().contains("--allow-parent"),
        "{error}"
    );
    let read = in_folder(&text, &["clone.hds"], true).unwrap();
    let outside: Vec<bool> = read.images().iter().map(Image::is_outside).collect();
    assert_eq!(outside, [true, false]);
    for wrong in ["../a&#10;b".to_owned(), format!("../{}", "x".repeat(5000))] {
        assert!(in_folder(&single("", &wrong), &[], true).is_err());
    }
}

#[test]
fn names_are_found_in_the_form_that_the_folder_has() {
    let (composed, apart) = ("caf\u{e9}.hds", "cafe\u{301}.hds");
    for (said, there) in [(composed, apart), (apart, composed)] {
        let found = in_folder(&single("", said), &[there], false).unwrap();
        assert_eq!((found.images()[0].file(), found.notes().len()), (there, 1));
        let exact = in_folder(&single("", said), &[said, there], false).unwrap();
        assert_eq!((exact.images()[0].file(), exact.notes().len()), (said, 0));
        assert_eq!(in_folder(&single("", said), &[], false).unwrap().images()[0].file(), said);
    }
    let spaced = single("", "\n   disk.hds\n ");
    assert_eq!(in_folder(&spaced, &["disk.hds"], false).unwrap().images()[0].file(), "disk.hds");
    assert_eq!(in_folder(&single("", " a "), &[" a "], false).unwrap().images()[0].file(), " a ");
    assert_eq!(in_folder(&single("", " a "), &["a"], false).unwrap().images()[0].file(), "a");
}

#[test]
fn what_hangs_in_the_air_does_not_take_the_disk_with_it() {
    let images = image(BASE, "b") + &image(TOP, "t");
    let alive = shot(BASE, NIL) + &shot(TOP, BASE);
    let lost = document("", &storage(0, 1920, &images), &(shot(SIDE, BASE) + &alive));
    let mut descriptor = parse(&lost).unwrap();
    let side: Guid = SIDE.parse().unwrap();
    assert_eq!(descriptor.chain_for(Guid::TOP).unwrap().len(), 2);
    assert!(
        descriptor.is_dead(side)
            && descriptor.shot(side).is_none()
            && descriptor.has_dead_child(BASE.parse().unwrap())
    );
    assert!(
        descriptor.dead_words()[0].contains(SIDE) && descriptor.dead_words()[0].contains("snapshot-delete")
    );
    assert_eq!(descriptor.chain_for(side).unwrap_err().kind(), ErrorKind::NoSnapshot);
    // Nothing else loses it, and what depends on who stands on what is refused.
    let again = DiskDescriptor::parse(&descriptor.to_bytes()).unwrap();
    assert_eq!(again, descriptor);
    let error = descriptor.add_snapshot(Guid::random(), "new").unwrap_err();
    assert!(error.to_string().contains(SIDE) && error.advice().is_some(), "{error}");
    assert!(descriptor.clone_of(Guid::TOP, Guid::random(), &["x".into(), "y".into()], "z").is_err());
    assert_eq!(descriptor.drop_dead(Guid::TOP).unwrap_err().kind(), ErrorKind::NoSnapshot);
    descriptor.drop_dead(side).unwrap();
    assert_eq!(descriptor, parse(&document("", &storage(0, 1920, &images), &alive)).unwrap());
    descriptor.add_snapshot(Guid::random(), "new").unwrap();

    let orphan = document("", &storage(0, 1920, &(images.clone() + &image(SIDE, "s"))), &alive);
    let descriptor = parse(&orphan).unwrap();
    assert_eq!(descriptor.dead_files().collect::<Vec<_>>(), ["s"]);
    assert_eq!(DiskDescriptor::parse(&descriptor.to_bytes()).unwrap(), descriptor);

    // What the current state needs is no trifle.
    let needed = document("", &storage(0, 1920, &image(TOP, "t")), &alive);
    let error = parse(&needed).unwrap().chain_for(Guid::TOP).unwrap_err();
    assert!(error.to_string().contains(BASE), "{error}");
    let topless = document("", &storage(0, 1920, &image(BASE, "b")), &alive);
    assert!(parse(&topless).unwrap_err().to_string().contains("current state"));
    // The original's repair makes a disk of the top alone only where there is nothing else.
    let both = document("", &storage(0, 1920, &images), &shot(BASE, NIL));
    assert!(parse(&both).is_err());
    let alone = parse(&document("", &storage(0, 1920, &image(TOP, "t")), "")).unwrap();
    assert_eq!(alone.chain_for(Guid::TOP).unwrap().len(), 1);
}
