//! Files and streams hold what the guest sees, and are sparse where it sees zeros.

use super::*;
use crate::format::testing::guest_content;
use crate::ops::import::{ImportOptions, Input, import_from};
use crate::ops::progress::Silent;

fn disk(folder: &Path, bytes: &[u8]) {
    let options = ImportOptions { cluster: Sectors(64), ..ImportOptions::new(folder, "root.hds") };
    let mut input = bytes;
    import_from(&options, Input::Stream(&mut input), &Silent).unwrap();
}

fn bytes() -> Vec<u8> {
    let mut bytes = vec![0; 20 << 20];
    bytes[100_000..900_000].fill(1);
    bytes[9 << 20..(9 << 20) + 5].fill(2);
    let end = bytes.len();
    bytes[end - 1] = 3;
    bytes
}

#[test]
fn a_file_and_a_stream_hold_the_disk() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), &bytes());
    let target = place.path().join("disk.raw");
    let report = export(&ExportOptions::new(place.path()), &target, &Silent).unwrap();
    assert!(std::fs::read(&target).unwrap() == bytes());
    assert_eq!(report.disk_bytes, 20 << 20);
    assert!(report.host_bytes.unwrap() < 1 << 20, "{report:?}");
    let mut stream = Vec::new();
    export_to(&ExportOptions::new(place.path()), &mut stream, &Silent).unwrap();
    assert!(stream == bytes());
    let chain = open_chain(&ExportOptions::new(place.path())).unwrap().chain;
    assert!(guest_content(&chain) == bytes());
}

#[test]
fn a_file_that_exists_is_not_touched() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), &bytes());
    let target = place.path().join("disk.raw");
    std::fs::write(&target, "mine").unwrap();
    let error = export(&ExportOptions::new(place.path()), &target, &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Parameter);
    assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 4, "no temporary file");
}

/// Takes so many bytes, then fails.
struct Narrow(usize);

impl Write for Narrow {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0 == 0 {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        let taken = bytes.len().min(self.0).min(10_007);
        self.0 -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stream_that_breaks_is_told() {
    let place = tempfile::tempdir().unwrap();
    disk(place.path(), &bytes());
    for room in [0, 1, 12 << 20, (20 << 20) - 1] {
        let error = export_to(&ExportOptions::new(place.path()), &mut Narrow(room), &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Write, "{room}");
    }
    export_to(&ExportOptions::new(place.path()), &mut Narrow(20 << 20), &Silent).unwrap();
}
