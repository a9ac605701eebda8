//! Whatever form a disk gets, the guest and every snapshot see what they saw.

use super::*;
use crate::extent::Extent;
use crate::format::testing::{flush, guest_content};
use crate::format::{DESCRIPTOR_NAME, Mode, WriteTarget, probe};
use crate::io::StorageExt;
use crate::io::file::{Caching, FileStorage};
use crate::ops::create::{CreateOptions, create};
use crate::ops::open::{OpenOptions, open};
use crate::ops::progress::Silent;
use crate::units::{GuestCluster, GuestOffset};

/// Writes guest bytes as the device does.
fn write(chain: &Arc<Chain>, at: u64, bytes: &[u8]) {
    let cluster_bytes = chain.geometry().cluster_bytes();
    let range = Extent::between(at, at + bytes.len() as u64);
    for piece in range.pieces(cluster_bytes) {
        let (cluster, within) = chain.geometry().guest_cluster(GuestOffset(piece.start()));
        let part =
            &bytes[usize::try_from(piece.start() - at).unwrap()..][..usize::try_from(piece.len()).unwrap()];
        let storage = chain.storage(chain.top());
        match chain.prepare_write(cluster).unwrap() {
            WriteTarget::InPlace(offset) => storage.write_all_at(offset.0 + within, part).unwrap(),
            WriteTarget::Fresh(prepared) => {
                let mut whole = vec![0; usize::try_from(cluster_bytes).unwrap()];
                let start = u64::from(cluster.0) * cluster_bytes;
                let below = ChainContent::whole(Arc::clone(chain));
                transfer::Content::read(&below, start, &mut whole).unwrap();
                let within = usize::try_from(within).unwrap();
                whole[within..within + part.len()].copy_from_slice(part);
                storage.write_all_at(prepared.offset().0, &whole).unwrap();
                prepared.publish();
            }
        }
    }
}

fn close(chain: &Chain) {
    flush(chain);
    chain.close().unwrap();
}

fn state(folder: &Path, guid: Option<Guid>, access: Access) -> Arc<Chain> {
    open(&OpenOptions { snapshot: guid, ..OpenOptions::new(folder, access) }).unwrap().chain
}

fn contents(folder: &Path) -> Vec<(Guid, Vec<u8>)> {
    let descriptor = DiskDescriptor::load(&DirectoryFolder::open(folder).unwrap(), None).unwrap();
    let content = |guid| guest_content(&state(folder, Some(guid), Access::ReadOnly));
    descriptor.shots().iter().map(|shot| (shot.guid(), content(shot.guid()))).collect()
}

const SNAPSHOT: &str = "{00000001-aaaa-bbbb-cccc-000000000001}";

/// A disk of 4 MiB with data, zeros that were written, and holes; with a snapshot if asked.
fn disk(folder: &Path, mode: Mode, version: Version, cluster: u64, snapshot: bool) {
    let options = CreateOptions {
        mode,
        version,
        cluster: Sectors(cluster),
        ..CreateOptions::new(folder, "root.hds", Sectors(8192))
    };
    create(&options).unwrap();
    let chain = state(folder, None, Access::ReadWrite);
    write(&chain, 5000, &vec![1; 200_000]);
    write(&chain, 1 << 20, &vec![0; 300_000]);
    write(&chain, (4 << 20) - 700, &[2; 700]);
    write(&chain, 3 << 20, &[3; 512]);
    close(&chain);
    drop(chain);
    if !snapshot {
        return;
    }
    // As a snapshot leaves it: a second image, and a descriptor that knows both.
    let top = FileStorage::create_exclusive(folder.join("root.hds.1"), Caching::Cached).unwrap();
    let geometry = Geometry::new(version, Sectors(cluster), Sectors(8192)).unwrap();
    create_image(&top, &format::CreateOptions { geometry, preallocated: false }).unwrap();
    let text = std::fs::read_to_string(folder.join(DESCRIPTOR_NAME)).unwrap();
    let kind = if mode == Mode::Raw { "Plain" } else { "Compressed" };
    let image = format!(
        "</GUID><Type>{kind}</Type><File>root.hds.1</File></Image><Image><GUID>{SNAPSHOT}</GUID>\
         <Type>{kind}</Type><File>root.hds</File></Image></Storage>"
    );
    let (head, rest) = text.split_once("</GUID>").unwrap();
    let tail = rest.split_once("</Storage>").unwrap().1;
    let none = Guid::NONE.to_string();
    let tail = tail.replace(&format!("<ParentGUID>{none}"), &format!("<ParentGUID>{SNAPSHOT}"));
    let shot = format!("<Shot><GUID>{SNAPSHOT}</GUID><ParentGUID>{none}</ParentGUID></Shot></Snapshots>");
    let tail = tail.replace("</Snapshots>", &shot);
    std::fs::write(folder.join(DESCRIPTOR_NAME), format!("{head}{image}{tail}")).unwrap();
    let chain = state(folder, None, Access::ReadWrite);
    write(&chain, 100_000, &[4; 1000]);
    // Zeros over data: they must keep hiding it.
    write(&chain, 3 << 20, &[0; 512]);
    write(&chain, 2 << 20, &vec![5; 40_000]);
    close(&chain);
}

fn asked(
    folder: &Path,
    mode: Option<Mode>,
    version: Option<Version>,
    cluster: Option<u64>,
) -> ConvertOptions {
    ConvertOptions { mode, version, cluster: cluster.map(Sectors), ..ConvertOptions::new(folder) }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_form_becomes_every_other() {
    let forms = [
        (Mode::Raw, Version::V2, 2048),
        (Mode::Expanded, Version::V2, 64),
        (Mode::Expanded, Version::V1, 256),
        (Mode::Preallocated, Version::V2, 128),
    ];
    for (from, version, cluster) in forms {
        for (mode, version_to, cluster_to) in [
            (Some(Mode::Raw), None, None),
            (Some(Mode::Expanded), None, Some(2048)),
            (Some(Mode::Preallocated), None, Some(64)),
            (None, Some(Version::V1), Some(512)),
            (None, Some(Version::V2), None),
            (None, None, Some(1024)),
        ] {
            if from == Mode::Raw && version_to.is_some() {
                continue;
            }
            let place = tempfile::tempdir().unwrap();
            let folder = place.path();
            disk(folder, from, version, cluster, false);
            let before = contents(folder);
            let options = asked(folder, mode, version_to, cluster_to);
            let report = convert(&options, &Silent).unwrap();
            let what = format!("{from:?} {version} {cluster} -> {options:?}");
            assert!(contents(folder) == before, "{what}");
            let chain = state(folder, None, Access::ReadOnly);
            let geometry = chain.geometry();
            assert_eq!(geometry.is_raw(), mode.unwrap_or(from) == Mode::Raw, "{what}");
            assert_eq!(report.mode, mode.unwrap_or(from).name());
            assert_eq!(report.cluster_bytes, cluster_to.unwrap_or(cluster) * 512);
            let descriptor = DiskDescriptor::load(&DirectoryFolder::open(folder).unwrap(), None).unwrap();
            assert_eq!(descriptor.cluster_sectors().0, cluster_to.unwrap_or(cluster), "{what}");
            assert_eq!(descriptor.mode(), mode.unwrap_or(from));
            if !geometry.is_raw() {
                assert_eq!(geometry.version(), version_to.unwrap_or(version), "{what}");
                assert_eq!(u64::from(geometry.cluster_sectors()), cluster_to.unwrap_or(cluster));
                let all = u64::from(geometry.entries());
                let allocated = chain.allocated_clusters();
                let preallocated = mode.unwrap_or(from) == Mode::Preallocated;
                assert_eq!(allocated == all, preallocated, "{what}: {allocated} of {all}");
            }
            drop(chain);
            // Nothing but the disk is left, and the same again is nothing to do.
            let file = descriptor.images()[0].file().to_owned();
            assert_eq!(names(folder), [DESCRIPTOR_NAME, "DiskDescriptor.xml.lck", &file], "{what}");
            assert!(convert(&options, &Silent).unwrap().images.is_empty(), "{what}");
            // It can be written.
            if mode.unwrap_or(from) != Mode::Raw {
                let chain = state(folder, None, Access::ReadWrite);
                write(&chain, 1_600_000, &[6; 100]);
                close(&chain);
            }
        }
    }
}

#[test]
fn snapshots_come_along_whole() {
    for (from, version, cluster) in [
        (Mode::Expanded, Version::V2, 64),
        (Mode::Raw, Version::V2, 128),
        (Mode::Expanded, Version::V1, 1024),
    ] {
        for (mode, version_to, cluster_to) in [
            (None, Some(Version::V1), None),
            (None, None, Some(2048)),
            (None, None, Some(64)),
            (Some(Mode::Expanded), None, Some(256)),
        ] {
            let place = tempfile::tempdir().unwrap();
            disk(place.path(), from, version, cluster, true);
            let before = contents(place.path());
            assert!(before.len() == 2 && before[0].1 != before[1].1);
            let options = asked(place.path(), mode, version_to, cluster_to);
            convert(&options, &Silent).unwrap();
            assert!(contents(place.path()) == before, "{from:?} {version} {cluster} -> {options:?}");
        }
    }
}

#[test]
fn zeros_take_no_space_unless_they_hide_something() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), Mode::Expanded, Version::V2, 64, true);
    convert(&asked(place.path(), None, Some(Version::V1), None), &Silent).unwrap();
    let chain = state(place.path(), None, Access::ReadOnly);
    let zeros_over_data = chain.held_at(1, GuestCluster((3 << 20) / 32768));
    assert!(zeros_over_data.is_some(), "the data below would show through");
    let zeros = (1 << 20) / 32768..(1 << 20) / 32768 + 10;
    assert!(zeros.into_iter().all(|cluster| chain.held_at(0, GuestCluster(cluster)).is_none()));
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let cases = [
        (Mode::Expanded, false, Some(Mode::Raw), Some(Version::V1), None, "at once"),
        (Mode::Raw, false, None, Some(Version::V1), None, "no version"),
        (Mode::Expanded, true, Some(Mode::Raw), None, None, "with snapshots"),
        (Mode::Expanded, true, Some(Mode::Preallocated), None, None, "with snapshots"),
        (Mode::Expanded, false, None, None, Some(100), "power of two"),
        (Mode::Expanded, false, None, None, Some(32), "power of two"),
        (Mode::Raw, false, None, None, Some(131_073), "power of two"),
    ];
    for (from, snapshot, mode, version, cluster, why) in cases {
        let place = tempfile::tempdir().unwrap();
        disk(place.path(), from, Version::V2, 64, snapshot);
        let before = (names(place.path()), contents(place.path()));
        let error = convert(&asked(place.path(), mode, version, cluster), &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter, "{why}: {error}");
        assert!(error.to_string().contains(why), "{error}");
        assert!((names(place.path()), contents(place.path())) == before);
    }
}

#[test]
fn a_disk_in_use_is_refused() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), Mode::Expanded, Version::V2, 64, true);
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let chain = state(place.path(), None, access);
        let error = convert(&asked(place.path(), None, Some(Version::V1), None), &Silent).unwrap_err();
        assert_eq!(error.kind().exit_code(), 37, "{error}");
        chain.close().unwrap();
    }
    // One that died is no obstacle.
    drop(state(place.path(), None, Access::ReadWrite));
    let before = contents(place.path());
    convert(&asked(place.path(), None, Some(Version::V1), None), &Silent).unwrap();
    assert!(contents(place.path()) == before);
}

#[test]
fn an_odd_end_is_kept_and_told() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    std::fs::write(folder.join("root.raw"), vec![7; 100_001]).unwrap();
    let descriptor = DiskDescriptor::new_single("root.raw", Mode::Raw, Sectors(196), Sectors(64)).unwrap();
    descriptor.store_new(&DirectoryFolder::open(folder).unwrap()).unwrap();
    let report = convert(&asked(folder, Some(Mode::Expanded), None, None), &Silent).unwrap();
    assert_eq!((report.disk_bytes, report.warnings.len()), (196 * 512, 1));
    let content = guest_content(&state(folder, None, Access::ReadOnly));
    assert!(content[..100_001].iter().all(|&byte| byte == 7));
    assert!(content[100_001..].iter().all(|&byte| byte == 0) && content.len() == 196 * 512);
}

/// The disk stays as large as it is, to the sector, through clusters that it does not fill, and back.
#[test]
fn the_size_survives_clusters_that_it_does_not_fill() {
    for from in [Mode::Expanded, Mode::Preallocated] {
        let place = tempfile::tempdir().unwrap();
        disk(place.path(), from, Version::V2, 64, false);
        let before = contents(place.path());
        for (version, cluster) in [(None, 131_072), (Some(Version::V1), 2048), (Some(Version::V2), 64)] {
            convert(&asked(place.path(), None, version, Some(cluster)), &Silent).unwrap();
            assert!(contents(place.path()) == before, "{version:?} {cluster}");
        }
    }
}

#[test]
fn odd_clusters_become_usual_ones() {
    let place = tempfile::tempdir().unwrap();
    let geometry = Geometry::for_testing(Version::V1, Sectors(63), Sectors(63 * 20)).unwrap();
    let image = FileStorage::create_exclusive(place.path().join("root.hds"), Caching::Cached).unwrap();
    create_image(&image, &format::CreateOptions { geometry, preallocated: false }).unwrap();
    let folder = DirectoryFolder::open(place.path()).unwrap();
    let descriptor =
        DiskDescriptor::new_single("root.hds", Mode::Expanded, Sectors(63 * 20), Sectors(63)).unwrap();
    descriptor.store_new(&folder).unwrap();
    let chain =
        open(&OpenOptions { caching: Caching::Cached, ..OpenOptions::new(place.path(), Access::ReadWrite) })
            .unwrap()
            .chain;
    write(&chain, 40_000, &[8; 9000]);
    close(&chain);
    drop(chain);
    let expected = contents(place.path()).remove(0).1;
    let report = convert(&asked(place.path(), None, Some(Version::V2), Some(64)), &Silent).unwrap();
    assert_eq!(report.warnings.len(), 1);
    assert!(contents(place.path())[0].1 == expected);
}

#[test]
fn a_plan_of_somebody_else_removes_no_disk() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), Mode::Expanded, Version::V2, 64, false);
    std::fs::write(place.path().join("bystander"), "x").unwrap();
    let plan = r#"{"new": ["root.hds", "DiskDescriptor.xml", "../x", "/etc/passwd"], "old": ["root.hds"]}"#;
    std::fs::write(place.path().join("DiskDescriptor.xml.plan"), plan).unwrap();
    let before = contents(place.path());
    convert(&asked(place.path(), None, Some(Version::V1), None), &Silent).unwrap();
    assert!(contents(place.path()) == before);
    assert!(place.path().join("bystander").exists());
    // Rubbish was never a plan.
    std::fs::write(place.path().join("DiskDescriptor.xml.plan"), "{\"new\": [\"by").unwrap();
    convert(&asked(place.path(), None, Some(Version::V2), None), &Silent).unwrap();
    assert!(contents(place.path()) == before);
    assert!(!place.path().join("DiskDescriptor.xml.plan").exists());
}

#[test]
fn owner_and_mode_stay_and_names_do_not_grow() {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), Mode::Expanded, Version::V2, 64, false);
    let mode = std::fs::Permissions::from_mode(0o640);
    std::fs::set_permissions(place.path().join("root.hds"), mode.clone()).unwrap();
    let first = convert(&asked(place.path(), None, Some(Version::V1), None), &Silent).unwrap();
    let second = convert(&asked(place.path(), None, Some(Version::V2), None), &Silent).unwrap();
    assert_eq!(second.images[0].from, first.images[0].file);
    assert_eq!(second.images[0].file.len(), "root.hds.".len() + 38);
    let path = place.path().join(&second.images[0].file);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    let storage = FileStorage::open(&path, &file::OpenOptions::new(Access::ReadOnly)).unwrap();
    assert!(matches!(probe(&storage), Ok(format::Probe::Image(_))));
}
