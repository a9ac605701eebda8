//! Pieces arrive whole, in any order, and what differs afterwards is found.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::format::Version;
use crate::format::geometry::Geometry;
use crate::io::file::{Caching, FileStorage};
use crate::io::sim::SimDisk;
use crate::io::{Folder, StorageExt};
use crate::ops::convert::{fill_new, verify_new};
use crate::ops::progress::{Progress, Silent};
use crate::units::Sectors;

const SILENT: Pipeline<'static> = Pipeline { progress: &Silent };

#[test]
fn what_differs_after_writing_is_found() {
    for raw in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let source = FileStorage::create_exclusive(folder.path().join("source"), Caching::Cached).unwrap();
        let len = 3 << 20;
        source.set_len(len).unwrap();
        source.write_all_at(100_000, &vec![7; 300_000]).unwrap();
        source.write_all_at(len - 9, &[9; 9]).unwrap();
        let geometry = match raw {
            true => Geometry::raw(Sectors(64), len).unwrap(),
            false => Geometry::new(Version::V2, Sectors(64), Sectors(len / 512)).unwrap(),
        };
        let path = folder.path().join("target");
        let target: Arc<dyn Storage> =
            Arc::new(FileStorage::create_exclusive(&path, Caching::Cached).unwrap());
        let content = StorageContent::new(&source, len);
        let recorded = fill_new(&target, Path::new("target"), &geometry, false, |to, storage| {
            let threads = threads(storage, piece_bytes(to.unit_bytes()));
            assert!(threads > 1);
            copy(&content, to, len, threads, &SILENT)
        })
        .unwrap();
        let check = || verify_new(&target, Path::new("target"), &geometry, false, &recorded, &SILENT);
        check().unwrap();
        let file_bytes = target.len().unwrap();
        for at in [file_bytes - 1, if raw { 100_000 } else { geometry.data_start().0 + 5000 }] {
            let mut byte = [0];
            target.read_exact_at(at, &mut byte).unwrap();
            target.write_all_at(at, &[byte[0] ^ 1]).unwrap();
            assert_eq!(check().unwrap_err().kind(), ErrorKind::Corrupt, "raw {raw}, byte {at}");
            target.write_all_at(at, &byte).unwrap();
            check().unwrap();
        }
    }
}

/// Cancels after so many calls.
struct Cancelling(AtomicU64);

impl Progress for Cancelling {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}

    fn advance(&self, _bytes: u64) -> Result<()> {
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::Cancelled, "enough")),
        }
    }
}

#[test]
fn the_first_failure_ends_a_run_whoever_has_it() {
    let piece = |number: u64| Piece { extent: Extent::between(number * 8, number * 8 + 8), bytes: None };
    for threads in [1, 4] {
        let endless = |pipeline: &Pipeline<'_>, bad: u64| {
            let mut number = 0;
            let next = || {
                number += 1;
                Ok((number < 10_000).then(|| piece(number)))
            };
            let work = |piece: &Piece, _: &mut [u8]| match piece.extent.start() / 8 {
                at if at == bad => Err(Error::new(ErrorKind::Write, "bad")),
                _ => Ok([0; 32]),
            };
            pipeline.run(8, threads, next, work)
        };
        assert_eq!(endless(&SILENT, 77).unwrap_err().kind(), ErrorKind::Write, "{threads} threads");
        let cancelling = Cancelling(AtomicU64::new(50));
        let pipeline = Pipeline { progress: &cancelling };
        assert_eq!(endless(&pipeline, u64::MAX).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(endless(&SILENT, u64::MAX).unwrap().pieces().count(), 9_999);
        let failing = SILENT.run(8, threads, || Err(Error::new(ErrorKind::Read, "no")), |_, _| Ok([0; 32]));
        assert_eq!(failing.unwrap_err().kind(), ErrorKind::Read);
    }
}

#[test]
fn holes_of_a_file_are_not_read_and_read_as_zeros() {
    let disk = SimDisk::new(3);
    let storage = disk.folder().create_exclusive("source").unwrap();
    storage.set_len(1 << 20).unwrap();
    storage.write_all_at(300_000, &[5; 10]).unwrap();
    let content = StorageContent::new(&*storage, 1 << 20);
    let found = content.next_data(0, 1 << 20).unwrap().unwrap();
    assert!((299_008 - 4096..=300_000).contains(&found), "{found}");
    assert_eq!(content.next_data(400_000, 1 << 20).unwrap(), None);
    assert_eq!(content.next_data(0, 100).unwrap(), None);
    let mut buffer = vec![1; (1 << 20) + 4096];
    content.read(0, &mut buffer).unwrap();
    let ones = buffer.iter().filter(|&&byte| byte != 0).count();
    assert_eq!((ones, buffer[300_000], buffer[300_009]), (10, 5, 5));
}
