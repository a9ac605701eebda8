//! Disks from real files: found, locked, refused.

use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;
use crate::format::{Mapping, Mode, Version};
use crate::ops::create::{CreateOptions, create};
use crate::units::GuestOffset;

const NAME: &str = "root.hds";

fn bundle(mode: Mode) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        cluster: Sectors(64),
        mode,
        ..CreateOptions::new(place.path(), NAME, Sectors(64 * 16))
    };
    create(&options).unwrap();
    place
}

fn options(path: &Path, access: Access) -> OpenOptions {
    OpenOptions { lock_timeout: Duration::ZERO, ..OpenOptions::new(path, access) }
}

fn kind(result: Result<Opened>) -> ErrorKind {
    match result {
        Ok(opened) => panic!("opened: {:?}", opened.report),
        Err(error) => error.kind(),
    }
}

#[test]
fn every_way_to_name_a_disk() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        let place = bundle(mode);
        for path in [place.path().to_path_buf(), place.path().join(DESCRIPTOR_NAME)] {
            let opened = open(&options(&path, Access::ReadWrite)).unwrap();
            assert_eq!(opened.report.disk_bytes, 16 * 32768);
            assert_eq!(opened.report.state, Some(Guid::TOP.to_string()));
            assert_eq!(opened.report.images, [place.path().join(NAME)]);
            assert!(opened.report.warnings.is_empty() && !opened.report.was_in_use);
            opened.chain.close().unwrap();
        }
        let image = place.path().join(NAME);
        let raw_cluster = (mode == Mode::Raw).then_some(Sectors(64));
        for which in [Which::Path(image.clone()), Which::Files(vec![image])] {
            let opened =
                open(&OpenOptions { which, raw_cluster, ..options(place.path(), Access::ReadWrite) })
                    .unwrap();
            assert_eq!(opened.report.descriptor, None);
            opened.chain.close().unwrap();
        }
    }
}

#[test]
fn one_writer_or_many_readers() {
    let place = bundle(Mode::Expanded);
    let writer = open(&options(place.path(), Access::ReadWrite)).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert_eq!(kind(open(&options(place.path(), access))), ErrorKind::InUse);
    }
    writer.chain.close().unwrap();
    drop(writer.chain);
    let first = open(&options(place.path(), Access::ReadOnly)).unwrap();
    let _second = open(&options(place.path(), Access::ReadOnly)).unwrap();
    assert!(!first.report.writable);
    assert_eq!(kind(open(&options(place.path(), Access::ReadWrite))), ErrorKind::InUse);
}

#[test]
fn a_command_at_work_keeps_writers_away() {
    let place = bundle(Mode::Expanded);
    let _lock = DescriptorLock::take(&place.path().join(DESCRIPTOR_NAME), Duration::ZERO).unwrap();
    assert_eq!(kind(open(&options(place.path(), Access::ReadWrite))), ErrorKind::DescriptorLocked);
    open(&options(place.path(), Access::ReadOnly)).unwrap();
}

#[test]
fn the_lock_lasts_as_long_as_the_chain() {
    let place = bundle(Mode::Expanded);
    let Opened { chain, .. } = open(&options(place.path(), Access::ReadWrite)).unwrap();
    let storage = Arc::clone(chain.storage(0));
    chain.close().unwrap();
    drop(chain);
    assert_eq!(kind(open(&options(place.path(), Access::ReadWrite))), ErrorKind::InUse);
    drop(storage);
    open(&options(place.path(), Access::ReadWrite)).unwrap();
}

#[test]
fn an_image_that_was_not_closed_is_told() {
    let place = bundle(Mode::Expanded);
    drop(open(&options(place.path(), Access::ReadWrite)).unwrap());
    let opened = open(&options(place.path(), Access::ReadWrite)).unwrap();
    assert!(opened.report.was_in_use && !opened.report.warnings.is_empty());
}

#[test]
fn links_are_not_followed_and_files_not_used_twice() {
    let place = bundle(Mode::Expanded);
    let image = place.path().join(NAME);
    std::fs::rename(&image, place.path().join("elsewhere")).unwrap();
    symlink("elsewhere", &image).unwrap();
    assert_eq!(kind(open(&options(place.path(), Access::ReadOnly))), ErrorKind::Open);
    std::fs::remove_file(&image).unwrap();
    assert_eq!(kind(open(&options(place.path(), Access::ReadOnly))), ErrorKind::Open);
    // In a folder of the bundle, but not through a link to one.
    std::fs::create_dir(place.path().join("real")).unwrap();
    std::fs::rename(place.path().join("elsewhere"), place.path().join("real/root.hds")).unwrap();
    let descriptor = place.path().join(DESCRIPTOR_NAME);
    let text = std::fs::read_to_string(&descriptor).unwrap();
    std::fs::write(&descriptor, text.replace(">root.hds<", ">real/root.hds<")).unwrap();
    open(&options(place.path(), Access::ReadOnly)).unwrap();
    symlink("real", place.path().join("link")).unwrap();
    std::fs::write(&descriptor, text.replace(">root.hds<", ">link/root.hds<")).unwrap();
    assert_eq!(kind(open(&options(place.path(), Access::ReadOnly))), ErrorKind::Open);
    // The same file under two names.
    let image = place.path().join("real/root.hds");
    std::fs::hard_link(&image, place.path().join("again")).unwrap();
    let twice = Which::Files(vec![image, place.path().join("again")]);
    let error = open(&OpenOptions { which: twice, ..options(place.path(), Access::ReadOnly) });
    assert_eq!(kind(error), ErrorKind::Descriptor);
}

#[test]
fn a_raw_disk_is_raw_only_if_somebody_says_so() {
    let place = bundle(Mode::Raw);
    let image = place.path().join(NAME);
    assert_eq!(kind(open(&options(&image, Access::ReadOnly))), ErrorKind::Corrupt);
    // A guest writes an image header into its raw disk: nothing changes.
    let other = bundle(Mode::Expanded);
    let header = std::fs::read(other.path().join(NAME)).unwrap();
    let mut content = std::fs::read(&image).unwrap();
    content[..64].copy_from_slice(&header[..64]);
    std::fs::write(&image, content).unwrap();
    let opened = open(&options(place.path(), Access::ReadOnly)).unwrap();
    assert!(opened.chain.geometry().is_raw());
    assert!(matches!(opened.chain.map(GuestOffset(0), 4096), Mapping::Data { delta: 0, .. }));
    // And a raw file in place of an image is not opened as one.
    std::fs::write(other.path().join(NAME), vec![0; 1 << 20]).unwrap();
    assert_eq!(kind(open(&options(other.path(), Access::ReadWrite))), ErrorKind::Corrupt);
}

#[test]
fn a_wrong_descriptor_is_told() {
    let place = bundle(Mode::Expanded);
    let descriptor = place.path().join(DESCRIPTOR_NAME);
    let text = std::fs::read_to_string(&descriptor).unwrap();
    std::fs::write(&descriptor, text.replace(">1024<", ">512<")).unwrap();
    let opened = open(&options(place.path(), Access::ReadOnly)).unwrap();
    assert!(opened.report.warnings[0].contains("512"), "{:?}", opened.report.warnings);
    std::fs::write(&descriptor, "<a/>").unwrap();
    let Err(error) = open(&options(place.path(), Access::ReadOnly)) else { panic!() };
    assert!(error.kind() == ErrorKind::Descriptor && error.to_string().contains(DESCRIPTOR_NAME));
    std::fs::remove_file(&descriptor).unwrap();
    assert_eq!(kind(open(&options(place.path(), Access::ReadOnly))), ErrorKind::Descriptor);
    assert_eq!(kind(open(&options(&descriptor, Access::ReadOnly))), ErrorKind::Open);
}

#[test]
fn unaligned_geometry_goes_through_the_cache() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("odd");
    // Version 1 with data behind the table at sector 3, as other writers make it.
    let options_v1 = CreateOptions {
        version: Version::V1,
        cluster: Sectors(64),
        ..CreateOptions::new(place.path(), "even", Sectors(64 * 4))
    };
    create(&options_v1).unwrap();
    let mut image = std::fs::read(place.path().join("even")).unwrap();
    image[48..52].copy_from_slice(&3u32.to_le_bytes());
    std::fs::write(&path, image).unwrap();
    let trial = FileStorage::open(&path, &file::OpenOptions::new(Access::ReadOnly).direct()).unwrap();
    let opened = open(&options(&path, Access::ReadOnly)).unwrap();
    let fits = 1536 % trial.alignment().offset == 0;
    assert_eq!(opened.report.direct, [trial.is_direct() && fits]);
    let even = open(&options(&place.path().join("even"), Access::ReadOnly)).unwrap();
    assert_eq!(even.report.direct, [trial.is_direct()]);
    // A raw disk that ends inside a sector.
    std::fs::write(place.path().join("raw"), vec![1; 1000]).unwrap();
    let raw = options(&place.path().join("raw"), Access::ReadOnly);
    let opened = open(&OpenOptions { raw_cluster: Some(Sectors(64)), ..raw }).unwrap();
    assert_eq!(opened.report.direct, [false]);
    let cached =
        OpenOptions { caching: Caching::Cached, ..options(&place.path().join("even"), Access::ReadOnly) };
    assert_eq!(open(&cached).unwrap().report.direct, [false]);
}

/// Snapshots of a bundle that the original wrote.
#[test]
fn a_chain_of_the_original() {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden/chain-v2.tar.zst");
    if !archive.exists() {
        ploop_testing::skip(ploop_testing::Need::Other, "no files of the original");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let unpacked = Command::new("tar")
        .arg("--zstd")
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(place.path())
        .status()
        .unwrap();
    assert!(unpacked.success());
    let path = place.path().join("chain-v2");
    let opened = open(&options(&path, Access::ReadWrite)).unwrap();
    assert_eq!(opened.chain.depth(), 4);
    opened.chain.close().unwrap();
    drop(opened);
    let first: Guid = "{00000001-aaaa-bbbb-cccc-000000000001}".parse().unwrap();
    let snapshot = OpenOptions { snapshot: Some(first), ..options(&path, Access::ReadOnly) };
    let one = open(&snapshot).unwrap();
    assert_eq!(one.chain.depth(), 1);
    open(&options(&path, Access::ReadWrite))
        .expect("a reader of the base does not keep a writer of the top away");
    drop(one);
    let writing = OpenOptions { access: Access::ReadWrite, ..snapshot.clone() };
    assert_eq!(kind(open(&writing)), ErrorKind::Parameter);
    let unknown = OpenOptions { snapshot: Some(Guid::random()), ..snapshot };
    assert_eq!(kind(open(&unknown)), ErrorKind::NoSnapshot);
}

#[test]
fn who_may_answer_flushes_has_made_the_descriptor_durable() {
    // Its last writer may have been killed in front of that.
    let place = bundle(Mode::Expanded);
    let failing = |access| {
        file::FOLDER_SYNC.set(Some(libc::EIO));
        let opened = open(&options(place.path(), access));
        let locked = lock(&options(place.path(), access)).map(|_| ());
        file::FOLDER_SYNC.set(None);
        (opened, locked)
    };
    let (opened, locked) = failing(Access::ReadWrite);
    assert_eq!(kind(opened), ErrorKind::Sync);
    assert_eq!(locked.unwrap_err().kind(), ErrorKind::Sync);
    // Nobody is told anything by a reader.
    let (opened, locked) = failing(Access::ReadOnly);
    opened.unwrap();
    locked.unwrap();
    open(&options(place.path(), Access::ReadWrite)).unwrap();
}
