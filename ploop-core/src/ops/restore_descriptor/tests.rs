//! The restored descriptor is the one that was lost.

use super::*;
use crate::format::{Mode, Version};
use crate::ops::create::{CreateOptions, create};
use std::fs;

#[test]
fn a_lost_descriptor_comes_back() {
    for (mode, version, cluster) in [
        (Mode::Expanded, Version::V2, 2048),
        (Mode::Expanded, Version::V1, 64),
        (Mode::Preallocated, Version::V2, 128),
        (Mode::Raw, Version::V2, 2048),
    ] {
        let place = tempfile::tempdir().unwrap();
        let options = CreateOptions {
            mode,
            version,
            cluster: Sectors(cluster),
            ..CreateOptions::new(place.path(), "root.hds", Sectors(8192))
        };
        create(&options).unwrap();
        let descriptor = place.path().join(DESCRIPTOR_NAME);
        let lost = fs::read(&descriptor).unwrap();
        let restoring = RestoreOptions {
            raw: mode == Mode::Raw,
            ..RestoreOptions::new(place.path(), place.path().join("root.hds"))
        };
        assert_eq!(restore_descriptor(&restoring).unwrap_err().kind(), ErrorKind::Create);
        assert_eq!(fs::read(&descriptor).unwrap(), lost);
        fs::remove_file(&descriptor).unwrap();
        let report = restore_descriptor(&restoring).unwrap();
        assert_eq!(fs::read(&descriptor).unwrap(), lost, "{mode:?}");
        assert_eq!((report.mode, report.cluster_bytes), (mode.name(), cluster * 512));
        assert!(report.warnings.is_empty());
    }
}

#[test]
fn a_raw_disk_gets_the_largest_cluster_that_divides_it() {
    for (len, cluster) in [
        (3u64 << 20, Some(2048)),
        ((3 << 20) + (512 << 10), Some(1024)),
        ((3 << 20) + (96 << 10), Some(64)),
        ((3 << 20) + 512, None),
        (0, None),
    ] {
        assert_eq!(raw_geometry(len, None).ok().map(|geometry| geometry.cluster_sectors()), cluster, "{len}");
    }
    assert!(raw_geometry(3 << 20, Some(Sectors(64))).is_ok());
    for wrong in [0, 63, 65, 4096, 1 << 18] {
        let error = raw_geometry(3 << 20, Some(Sectors(wrong))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter, "{wrong}");
    }
}

#[test]
fn what_it_cannot_be_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("raw"), vec![7; 1 << 20]).unwrap();
    let restoring = |base: &str| RestoreOptions::new(place.path(), base);
    assert_eq!(restore_descriptor(&restoring("raw")).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(restore_descriptor(&restoring("absent")).unwrap_err().kind(), ErrorKind::Open);
    assert_eq!(restore_descriptor(&restoring("/etc/passwd")).unwrap_err().kind(), ErrorKind::Parameter);
    assert_eq!(restore_descriptor(&restoring("a/b")).unwrap_err().kind(), ErrorKind::Parameter);
    assert!(!place.path().join(DESCRIPTOR_NAME).exists());
}

#[test]
fn a_file_that_an_import_left_unfinished_is_refused() {
    let place = tempfile::tempdir().unwrap();
    create(&CreateOptions::new(place.path(), "root.hds", Sectors(8192))).unwrap();
    fs::remove_file(place.path().join(DESCRIPTOR_NAME)).unwrap();
    let plan = place.path().join("DiskDescriptor.xml.plan");
    fs::write(&plan, r#"{"new":["root.hds","root.hds.whole"],"old":[]}"#).unwrap();
    let restoring = RestoreOptions::new(place.path(), place.path().join("root.hds"));
    let error = restore_descriptor(&restoring).unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.advice().unwrap().contains("plan"), "{error}");
    let error = create(&CreateOptions::new(place.path(), "root.hds", Sectors(8192))).unwrap_err();
    assert!(error.kind() == ErrorKind::Parameter && error.advice().unwrap().contains("import"), "{error}");
    fs::remove_file(&plan).unwrap();
    restore_descriptor(&restoring).unwrap();
}
