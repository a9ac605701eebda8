//! A disk of any input: sparse, of any length, also when nobody says how long it is.

use super::*;
use crate::format::testing::guest_content;
use crate::format::{Chain, probe};
use crate::ops::open::{OpenOptions, open};
use crate::ops::progress::Silent;

fn chain(folder: &Path) -> Arc<Chain> {
    open(&OpenOptions::new(folder, Access::ReadOnly)).unwrap().chain
}

fn options(folder: &Path, mode: Mode) -> ImportOptions {
    ImportOptions { cluster: Sectors(64), mode, ..ImportOptions::new(folder, "root.hds") }
}

const MODES: [Mode; 3] = [Mode::Expanded, Mode::Preallocated, Mode::Raw];

fn input(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        if at % 1_000_000 < 70_000 {
            *byte = u8::try_from(at / 1000 % 251).unwrap() + 1;
        }
    }
    bytes
}

fn check(folder: &Path, bytes: &[u8], disk_bytes: u64) {
    let content = guest_content(&chain(folder));
    assert_eq!(content.len() as u64, disk_bytes);
    assert!(content[..bytes.len()] == *bytes);
    assert!(content[bytes.len()..].iter().all(|&byte| byte == 0));
}

#[test]
fn files_and_streams_of_any_length() {
    for len in [1, 511, 512, 32_768, 32_769, 12_345_678] {
        let bytes = input(len);
        // To the sector, or rounded up to whole clusters where that is asked for.
        for (mode, round) in MODES.into_iter().flat_map(|mode| [(mode, false), (mode, true)]) {
            let disk_bytes = (len as u64).next_multiple_of(if round { 32_768 } else { 512 });
            let place = tempfile::tempdir().unwrap();
            let file = place.path().join("input");
            std::fs::write(&file, &bytes).unwrap();
            let options = ImportOptions { round, ..options(place.path(), mode) };
            let report = import(&options, &file, &Silent).unwrap();
            assert_eq!((report.input_bytes, report.disk_bytes), (len as u64, disk_bytes));
            check(place.path(), &bytes, disk_bytes);

            let place = tempfile::tempdir().unwrap();
            let mut options = ImportOptions { folder: place.path().to_path_buf(), ..options };
            if mode == Mode::Preallocated {
                options.disk = Some(Sectors::covering(len as u64));
            }
            let report = import_from(&options, Input::Stream(&mut &bytes[..]), &Silent).unwrap();
            assert_eq!((report.input_bytes, report.disk_bytes), (len as u64, disk_bytes), "{mode:?}");
            check(place.path(), &bytes, disk_bytes);
            assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3, "image, descriptor and its lock");
        }
    }
}

#[test]
fn the_header_is_that_of_a_new_disk_of_the_size() {
    let place = tempfile::tempdir().unwrap();
    import_from(&options(place.path(), Mode::Expanded), Input::Stream(&mut &input(1 << 20)[..]), &Silent)
        .unwrap();
    let file = FileStorage::open(place.path().join("root.hds"), &file::OpenOptions::new(Access::ReadOnly));
    let Ok(crate::format::Probe::Image(header)) = probe(&file.unwrap()) else { panic!("no image") };
    let geometry = Geometry::new(Version::V2, Sectors(64), Sectors(2048)).unwrap();
    assert_eq!(*header.geometry(), geometry);
    let new = crate::format::Header::create(&geometry).unwrap();
    assert_eq!((header.raw().heads, header.raw().cylinders), (new.raw().heads, new.raw().cylinders));
}

/// Bytes at the start and near the end of so many zeros.
struct Long {
    len: u64,
    at: u64,
}

impl Read for Long {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = usize::try_from(self.len - self.at).unwrap_or(usize::MAX).min(buffer.len());
        buffer[..count].fill(0);
        for (index, byte) in buffer[..count].iter_mut().enumerate() {
            let at = self.at + index as u64;
            if at < 5 || at + 5 >= self.len || at == ROOM || at + 1 == ROOM {
                *byte = 9;
            }
        }
        self.at += count as u64;
        Ok(count)
    }
}

/// What a table of one cluster of 32 KiB covers.
const ROOM: u64 = (32_768 - 64) / 4 * 32_768;

#[test]
fn a_stream_longer_than_its_first_table_gets_a_longer_one() {
    for len in [ROOM - 1, ROOM, ROOM + 1, ROOM + (3 << 20)] {
        let place = tempfile::tempdir().unwrap();
        let mut source = Long { len, at: 0 };
        let report =
            import_from(&options(place.path(), Mode::Expanded), Input::Stream(&mut source), &Silent).unwrap();
        assert_eq!(report.input_bytes, len);
        let chain = chain(place.path());
        let geometry = Geometry::exact(Version::V2, Sectors(64), Sectors::covering(len)).unwrap();
        assert_eq!(*chain.geometry(), geometry, "{len}");
        let content = guest_content(&chain);
        for (at, &byte) in content.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            let at = at as u64;
            assert!(byte == 9 && (at < 5 || at + 5 >= len || at == ROOM || at + 1 == ROOM), "{at}");
        }
        assert_eq!(content[usize::try_from(len - 1).unwrap()], 9);
        assert!(chain.allocated_clusters() <= 4);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3, "{len}");
    }
}

#[test]
fn sizes_are_kept_and_too_small_ones_refused() {
    for mode in MODES {
        let place = tempfile::tempdir().unwrap();
        let mut options = options(place.path(), mode);
        options.disk = Some(Sectors(256));
        for len in [131_073, 140_000] {
            let bytes = input(len);
            let error = import_from(&options, Input::Stream(&mut &bytes[..]), &Silent).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Parameter, "{error}");
            let file = place.path().join("input");
            std::fs::write(&file, &bytes).unwrap();
            assert_eq!(import(&options, &file, &Silent).unwrap_err().kind(), ErrorKind::Parameter);
            std::fs::remove_file(&file).unwrap();
            assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "the lock file alone");
        }
        let bytes = input(131_072);
        import_from(&options, Input::Stream(&mut &bytes[..]), &Silent).unwrap();
        check(place.path(), &bytes, 131_072);
        let error = import_from(&options, Input::Stream(&mut &bytes[..]), &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter, "it exists");
        check(place.path(), &bytes, 131_072);
    }
    let place = tempfile::tempdir().unwrap();
    let empty = import_from(&options(place.path(), Mode::Expanded), Input::Stream(&mut &[][..]), &Silent);
    assert!(empty.unwrap_err().to_string().contains("empty"));
    let unknown =
        import_from(&options(place.path(), Mode::Preallocated), Input::Stream(&mut &[1][..]), &Silent);
    assert!(unknown.unwrap_err().advice().unwrap().contains("-s"));
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
}

#[test]
fn an_input_that_fails_leaves_nothing() {
    struct Failing(usize);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::from_raw_os_error(libc::EIO));
            }
            let count = self.0.min(buffer.len());
            buffer[..count].fill(1);
            self.0 -= count;
            Ok(count)
        }
    }
    for mode in [Mode::Expanded, Mode::Raw] {
        let place = tempfile::tempdir().unwrap();
        let error = import_from(&options(place.path(), mode), Input::Stream(&mut Failing(20 << 20)), &Silent)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Read);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "the lock file alone");
    }
}
