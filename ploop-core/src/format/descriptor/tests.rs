//! Reading, checking and printing of descriptors; chains.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;

use super::*;

const BASE: &str = "{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

fn image(guid: &str, file: &str) -> String {
    format!("<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>{file}</File></Image>")
}

fn shot(guid: &str, parent: &str) -> String {
    format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>")
}

fn document(images: &str, top: &str, shots: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><Virtuozzo_disk_image><Disk_Parameters><Disk_size>0x2000</Disk_size></Disk_Parameters>\
         <StorageData><Storage><Start>0</Start><End>8192</End><Blocksize>2048</Blocksize>{images}</Storage>\
         </StorageData><Snapshots>{top}{shots}</Snapshots></Virtuozzo_disk_image>"
    )
}

fn two_images() -> String {
    document(
        &(image(BASE, "disk.hds") + &image(TOP, "disk.hds.{7b7f2a44-1a90-4f0b-8a55-90a3d6f3b001}")),
        &format!("<TopGUID>{TOP}</TopGUID>"),
        &(shot(BASE, NONE) + &shot(TOP, BASE)),
    )
}

fn parse(text: &str) -> Result<DiskDescriptor> {
    DiskDescriptor::parse(text.as_bytes())
}

fn refusal(text: &str) -> String {
    let error = parse(text).expect_err(text);
    assert_eq!(error.kind(), ErrorKind::Descriptor, "{error}");
    error.to_string()
}

#[test]
fn a_new_descriptor_looks_like_the_original_s() {
    let descriptor =
        DiskDescriptor::new_single("root.hds", Mode::Expanded, Sectors(40960), Sectors(2048)).unwrap();
    let expected = "<?xml version=\"1.0\"?>
<Parallels_disk_image>
  <Disk_Parameters>
    <Disk_size>40960</Disk_size>
    <Cylinders>80</Cylinders>
    <Heads>16</Heads>
    <Sectors>32</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>40960</End>
      <Blocksize>2048</Blocksize>
      <Image>
        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
        <Type>Compressed</Type>
        <File>root.hds</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
    </Shot>
  </Snapshots>
</Parallels_disk_image>
";
    assert_eq!(String::from_utf8(descriptor.to_bytes()).unwrap(), expected);
    assert_eq!(parse(expected).unwrap(), descriptor);
}

#[test]
fn modes() {
    let make = |mode| DiskDescriptor::new_single("a", mode, Sectors(2048), Sectors(2048)).unwrap();
    for mode in [Mode::Raw, Mode::Expanded, Mode::Preallocated] {
        let text = String::from_utf8(make(mode).to_bytes()).unwrap();
        assert_eq!(parse(&text).unwrap().mode(), mode);
        assert_eq!(text.contains("<Preallocated>1</Preallocated>"), mode == Mode::Preallocated);
        assert_eq!(text.contains("<Type>Plain</Type>"), mode == Mode::Raw);
    }
    let both = String::from_utf8(make(Mode::Preallocated).to_bytes()).unwrap().replace("Compressed", "Plain");
    assert!(refusal(&both).contains("both"));
}

#[test]
fn both_root_names_and_all_number_bases_are_read() {
    let descriptor = parse(&two_images()).unwrap();
    assert_eq!(descriptor.disk_sectors(), Sectors(8192));
    let printed = String::from_utf8(descriptor.to_bytes()).unwrap();
    assert!(printed.contains("<Virtuozzo_disk_image>") && printed.contains("<Disk_size>8192</Disk_size>"));
    assert!(parse(&two_images().replace("0x2000", "020000")).is_ok_and(|one| one.disk_sectors().0 == 8192));
    for wrong in ["", "-1", "+1", "1x", "0x", "99999999999999999999", "0", "36028797018963968"] {
        assert!(parse(&two_images().replace("0x2000", wrong)).is_err(), "{wrong:?}");
    }
}

#[test]
fn what_is_unknown_is_kept() {
    let text = two_images()
        .replace(
            "</Disk_Parameters>",
            "<Encryption><KeyId>key &amp; 1</KeyId></Encryption></Disk_Parameters>",
        )
        .replace("<Storage>", "<Storage colour=\"blue\">")
        .replace("</Image>", "<Note>n</Note></Image>")
        .replace("</Shot>", "<Label lang=\"de\">x</Label></Shot>")
        .replace("</Snapshots>", "<Policy/></Snapshots><Extra><Deep>1</Deep></Extra>");
    let descriptor = parse(&text).unwrap();
    let printed = String::from_utf8(descriptor.to_bytes()).unwrap();
    for kept in [
        "<KeyId>key &amp; 1</KeyId>",
        "<Storage colour=\"blue\">",
        "<Note>n</Note>",
        "<Label lang=\"de\">x</Label>",
        "<Policy/>",
        "<Deep>1</Deep>",
    ] {
        assert!(printed.contains(kept), "{kept} in {printed}");
    }
    assert_eq!(parse(&printed).unwrap(), descriptor);
}

#[test]
fn transitional_states_are_kept_and_cannot_be_the_top() {
    for state in Transition::ALL {
        let marked = format!("<ParentGUID>{NONE}</ParentGUID><{}/>", state.name());
        let text = two_images().replace(&format!("<ParentGUID>{NONE}</ParentGUID>"), &marked);
        let descriptor = parse(&text).unwrap();
        assert_eq!(descriptor.shot(BASE.parse().unwrap()).unwrap().transition(), Some(state));
        assert_eq!(parse(std::str::from_utf8(&descriptor.to_bytes()).unwrap()).unwrap(), descriptor);
        let top = two_images().replace(
            &format!("<ParentGUID>{BASE}</ParentGUID>"),
            &format!("<ParentGUID>{BASE}</ParentGUID><{}/>", state.name()),
        );
        assert!(refusal(&top).contains(state.name()));
    }
    let two = two_images().replace("</ParentGUID>", "</ParentGUID><Temporary/><TemporaryZero/>");
    assert!(refusal(&two).contains("two transitional states"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let top = format!("<TopGUID>{TOP}</TopGUID>");
    let single = |image: &str| document(image, &top, &shot(TOP, NONE));
    let sound = single(&image(TOP, "a"));
    assert!(parse(&sound).is_ok());
    for (text, why) in [
        (document("", &top, ""), "no <Image>"),
        (document(&(image(TOP, "a") + &image(TOP, "b")), &top, &shot(TOP, NONE)), "two elements <Image>"),
        (
            document(
                &(image(TOP, "a") + &image(&TOP.to_uppercase(), "b")),
                &top,
                &(shot(TOP, NONE) + &shot(BASE, NONE)),
            ),
            "two elements <Image>",
        ),
        (document(&image(TOP, "a"), &top, &(shot(TOP, NONE) + &shot(TOP, BASE))), "two elements <Shot>"),
        (document(&(image(TOP, "a") + &image(BASE, "b")), &top, &shot(BASE, NONE)), "has no <Shot>"),
        (document(&image(BASE, "a"), &top, &(shot(TOP, NONE) + &shot(BASE, NONE))), "has no <Image>"),
        (document(&image(BASE, "a"), &top, &shot(BASE, NONE)), "is no <Shot>"),
        (document(&image(BASE, "a"), "", &shot(BASE, NONE)), "no <TopGUID>"),
        (document(&image(NONE, "a"), &top, &shot(NONE, NONE)), "which means none"),
        (
            document(&(image(TOP, "a") + &image(BASE, "a")), &top, &(shot(TOP, BASE) + &shot(BASE, NONE))),
            "two images",
        ),
        (sound.replace("Compressed", "Qcow"), "unknown type"),
        (sound.replace(TOP, "{5fbaabe3}"), "is not of the form"),
        (sound.replace("<Blocksize>2048", "<Blocksize>0"), "Blocksize"),
        (sound.replace("<Blocksize>2048", "<Blocksize>4294967296"), "Blocksize"),
        (sound.replace("<Start>0", "<Start>1"), "a gap"),
        (sound.replace("<Storage>", "<Storage/><Storage>"), "<Storage> has no <Blocksize>"),
        (sound.replace("<Disk_size>", "<Disk_size>1</Disk_size><Disk_size>"), "2 elements <Disk_size>"),
        (sound.replace("<Image>", "<Preallocated>2</Preallocated><Image>"), "neither 0 nor 1"),
        (sound.replace("Snapshots", "Shots"), "no <Snapshots>"),
        (format!("<!DOCTYPE a>{}", sound.replace("<?xml version=\"1.0\"?>", "")), "document type"),
    ] {
        let refused = refusal(&text);
        assert!(refused.contains(why), "{refused:?} does not say {why:?}");
    }
    let many: String = (0..1025u32)
        .map(|number| {
            image(&format!("{{00000000-0000-0000-0000-{:012x}}}", number + 1), &format!("f{number}"))
        })
        .collect();
    assert!(refusal(&document(&many, &top, "")).contains("1024"));
}

#[test]
fn file_names_stay_inside_the_bundle() {
    let with =
        |name: &str| document(&image(TOP, name), &format!("<TopGUID>{TOP}</TopGUID>"), &shot(TOP, NONE));
    let absolute = parse(&with("/vz/private/1/root.hdd/root.hds")).unwrap_err();
    assert!(absolute.to_string().contains("absolute") && absolute.advice().unwrap().contains("<File>"));
    for name in [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../b",
        "a/..",
        "a/b/c",
        "a//b",
        "a/",
        "/",
        ".",
        "./",
        "./../x",
        "a/.",
        "a\u{1}".trim_end(),
        "&#10;",
        "a&#9;b",
        "DiskDescriptor.xml",
        "DiskDescriptor.xml.lck",
        "./DiskDescriptor.xml",
    ] {
        assert!(parse(&with(name)).is_err(), "{name:?}");
    }
    assert!(parse(&with(&"x".repeat(256))).is_err());
    for (name, place) in [
        ("root.hds", (None, "root.hds")),
        ("./root.hds", (None, "root.hds")),
        ("snapshots/root.hds", (Some("snapshots"), "root.hds")),
        ("a b..c", (None, "a b..c")),
        ("käse", (None, "käse")),
    ] {
        assert_eq!(parse(&with(name)).unwrap().images()[0].place(), place);
    }
    let old = with("/vz/private/1/root.hdd/root.hds");
    let folder = Path::new("/vz/private/1/root.hdd");
    let read = DiskDescriptor::parse_in(old.as_bytes(), Some(folder)).unwrap();
    assert_eq!(read.images()[0].file(), "root.hds");
    for other in ["/vz/private/1/root.hdd/../x", "/vz/private/1/root.hddx/a"] {
        assert!(DiskDescriptor::parse_in(with(other).as_bytes(), Some(folder)).is_err());
    }
    assert!(DiskDescriptor::new_single("../x", Mode::Expanded, Sectors(8), Sectors(8)).is_err());
}

#[test]
fn the_top_of_old_descriptors() {
    // No TopGUID, but a shot of that name.
    let text = two_images().replace(&format!("<TopGUID>{TOP}</TopGUID>"), "");
    assert_eq!(parse(&text).unwrap().top_guid(), Guid::TOP);
    // One shot missing.
    let text = document(&image(TOP, "a"), &format!("<TopGUID>{TOP}</TopGUID>"), "");
    let repaired = parse(&text).unwrap();
    assert_eq!(repaired.chain_for(Guid::TOP).unwrap().len(), 1);
    // A random top is converted, wherever it occurs.
    let random = "{11111111-2222-3333-4444-555555555555}";
    let mut old = parse(&two_images().replace(TOP, random)).unwrap();
    assert_eq!(old.top_guid(), random.parse().unwrap());
    old.convert_top().unwrap();
    assert_eq!(old, parse(&two_images()).unwrap());
    // But not onto a name that another image has.
    let mut taken = parse(&two_images().replace(TOP, random).replace(BASE, TOP)).unwrap();
    assert_eq!(taken.convert_top().unwrap_err().kind(), ErrorKind::Descriptor);
}

fn chain(parents: &[(u32, u32)]) -> DiskDescriptor {
    let guid = |number: u32| match number {
        0 => NONE.to_owned(),
        1 => TOP.to_owned(),
        other => format!("{{00000000-0000-0000-0000-{other:012x}}}"),
    };
    let images: String = parents.iter().map(|&(own, _)| image(&guid(own), &format!("f{own}"))).collect();
    let shots: String = parents.iter().map(|&(own, parent)| shot(&guid(own), &guid(parent))).collect();
    parse(&document(&images, &format!("<TopGUID>{TOP}</TopGUID>"), &shots)).unwrap()
}

#[test]
fn chains_are_listed_base_first() {
    let tree = chain(&[(1, 3), (2, 0), (3, 2), (4, 2)]);
    let files = |guid| tree.chain_for(guid).unwrap().iter().map(|one| one.file()).collect::<Vec<_>>();
    assert_eq!(files(Guid::TOP), ["f2", "f3", "f1"]);
    assert_eq!(files("{00000000-0000-0000-0000-000000000004}".parse().unwrap()), ["f2", "f4"]);
    let two = "{00000000-0000-0000-0000-000000000002}".parse().unwrap();
    assert_eq!(tree.children(two).count(), 2);
    for unknown in [Guid::NONE, Guid::random()] {
        assert_eq!(tree.chain_for(unknown).unwrap_err().kind(), ErrorKind::NoSnapshot);
    }
}

#[test]
fn broken_chains_are_found_and_spare_the_others() {
    let circle = chain(&[(1, 2), (2, 3), (3, 2), (4, 0)]);
    assert!(circle.chain_for(Guid::TOP).unwrap_err().to_string().contains("circle"));
    assert!(circle.chain_for("{00000000-0000-0000-0000-000000000004}".parse().unwrap()).is_ok());
    assert!(chain(&[(1, 1)]).chain_for(Guid::TOP).is_err());
    let dangling = chain(&[(1, 9)]);
    let error = dangling.chain_for(Guid::TOP).unwrap_err();
    assert!(error.kind() == ErrorKind::Descriptor && error.to_string().contains("does not exist"));
    let line = |depth: u32| -> Vec<(u32, u32)> {
        (1..=depth).map(|own| (own, if own == depth { 0 } else { own + 1 })).collect()
    };
    assert_eq!(chain(&line(128)).chain_for(Guid::TOP).unwrap().len(), 128);
    assert!(chain(&line(129)).chain_for(Guid::TOP).unwrap_err().to_string().contains("128"));
}

#[test]
fn volumes_on_other_volumes_are_kept_but_not_opened() {
    let text = two_images()
        .replace("<Storage>", "<Volume><Parent>../p.hdd</Parent></Volume><Storage>")
        .replace(TOP, "{11111111-2222-3333-4444-555555555555}");
    let mut volume = parse(&text).unwrap();
    assert!(volume.has_parent_volume());
    assert!(volume.chain_for(volume.top_guid()).unwrap_err().advice().is_some());
    volume.convert_top().unwrap();
    assert_ne!(volume.top_guid(), Guid::TOP);
    let printed = String::from_utf8(volume.to_bytes()).unwrap();
    assert!(printed.contains("<Volume>\n      <Parent>../p.hdd</Parent>\n    </Volume>\n    <Storage>"));
    let plain = two_images().replace("<Storage>", "<Volume><ReadOnly/></Volume><Storage>");
    assert!(parse(&plain).unwrap().chain_for(Guid::TOP).is_ok());
}

/// Every descriptor that the original wrote is read, and written back byte for byte.
#[test]
fn descriptors_of_the_original() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let Ok(entries) = std::fs::read_dir(&golden) else {
        ploop_testing::skip(ploop_testing::Need::Other, "no files of the original");
        return;
    };
    let mut seen = 0;
    for archive in entries.map(|entry| entry.unwrap().path()) {
        let name = archive.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(bundle) = name.strip_suffix(".tar.zst") else { continue };
        let output = Command::new("tar")
            .args(["--zstd", "-xOf"])
            .arg(&archive)
            .arg(format!("{bundle}/DiskDescriptor.xml"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}");
        let descriptor = DiskDescriptor::parse(&output.stdout).unwrap();
        assert_eq!(String::from_utf8(descriptor.to_bytes()), String::from_utf8(output.stdout), "{name}");
        let depth = descriptor.chain_for(Guid::TOP).unwrap().len();
        assert_eq!(depth, if bundle == "chain-v2" { 4 } else { 1 });
        assert_eq!(descriptor.is_raw(), bundle == "raw");
        assert_eq!(descriptor.mode() == Mode::Preallocated, bundle == "v2-prealloc");
        seen += 1;
    }
    assert!(seen >= 7, "only {seen} bundles");
}

fn descriptor() -> impl Strategy<Value = DiskDescriptor> {
    let rest = || {
        ("[a-zA-Z &<>\"'é\n\r\t]{0,8}", prop::collection::vec(("x[a-z]{1,4}", "[ -~]{0,6}"), 0..2)).prop_map(
            |(value, children)| Rest {
                attributes: if value.is_empty() { Vec::new() } else { vec![("note".to_owned(), value)] },
                children: children.into_iter().map(|(name, text)| Node::with_text(&name, text)).collect(),
            },
        )
    };
    let entry = (any::<u128>(), "[a-z][ -.0-~]{0,10}[a-z&<é]", 0..4usize, any::<u16>(), rest(), rest());
    (
        prop::collection::vec(entry, 1..6),
        (1u64..1 << 50, prop::option::of(1u64..1 << 40), 1u32..1 << 20, any::<(u32, u16)>()),
        (
            any::<bool>(),
            any::<bool>(),
            prop::sample::select(vec!["Parallels_disk_image", "Virtuozzo_disk_image"]),
        ),
        (rest(), rest(), rest(), rest(), rest()),
    )
        .prop_map(
            |(
                entries,
                (disk_sectors, delta_sectors_max, cluster_sectors, chs),
                (raw, preallocated, root),
                rests,
            )| {
                let guid = |seed: u128, number: usize| -> Guid {
                    if number == 0 {
                        return Guid::TOP;
                    }
                    format!("{{{:08x}-0000-4000-8000-{:012x}}}", number, seed & 0xffff_ffff_ffff)
                        .parse()
                        .unwrap()
                };
                let guids: Vec<Guid> =
                    entries.iter().enumerate().map(|(number, entry)| guid(entry.0, number)).collect();
                let mut images = Vec::new();
                let mut shots = Vec::new();
                for (number, (_, file, state, parent, image_rest, shot_rest)) in
                    entries.into_iter().enumerate()
                {
                    let kind = if raw && number == 0 { ImageKind::Plain } else { ImageKind::Image };
                    let file = format!("{number}{file}");
                    images.push(Image { guid: guids[number], kind, file, outside: false, rest: image_rest });
                    let parent = usize::from(parent) % (guids.len() + 1);
                    shots.push(Shot {
                        guid: guids[number],
                        parent: guids.get(parent).copied().unwrap_or(Guid::NONE),
                        transition: if number == 0 { None } else { Transition::ALL.get(state).copied() },
                        rest: shot_rest,
                    });
                }
                DiskDescriptor {
                    root: root.to_owned(),
                    disk_sectors,
                    delta_sectors_max,
                    cylinders: u64::from(chs.0),
                    heads: u64::from(chs.1),
                    cluster_sectors,
                    preallocated: preallocated && !raw,
                    images,
                    shots,
                    top: Guid::TOP,
                    volume: None,
                    obsolete: if preallocated { vec!["gone.hds".to_owned()] } else { Vec::new() },
                    gone: Vec::new(),
                    dead: Dead::default(),
                    notes: Vec::new(),
                    rest: RestOf {
                        root: rests.0,
                        parameters: rests.1,
                        data: rests.2,
                        storage: rests.3,
                        snapshots: rests.4,
                    },
                }
            },
        )
}

proptest! {
    #[test]
    fn reading_what_was_printed_gives_the_same(descriptor in descriptor()) {
        let bytes = descriptor.to_bytes();
        prop_assert_eq!(DiskDescriptor::parse(&bytes).unwrap(), descriptor.clone());
        // Chains never panic, never repeat an image, and end at a base.
        for shot in descriptor.shots() {
            if let Ok(chain) = descriptor.chain_for(shot.guid()) {
                let distinct: BTreeSet<_> = chain.iter().map(|image| image.guid()).collect();
                prop_assert_eq!(distinct.len(), chain.len());
                prop_assert_eq!(descriptor.shot(chain[0].guid()).unwrap().parent(), Guid::NONE);
            }
        }
    }

    #[test]
    fn damage_gives_an_error_or_a_valid_value(descriptor in descriptor(), cuts in prop::collection::vec((any::<u16>(), any::<u8>()), 1..4)) {
        let mut bytes = descriptor.to_bytes();
        for (at, value) in cuts {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        if let Ok(read) = DiskDescriptor::parse(&bytes) {
            prop_assert_eq!(DiskDescriptor::parse(&read.to_bytes()).unwrap(), read);
        }
    }
}
