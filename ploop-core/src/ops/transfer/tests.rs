//! Pieces arrive whole, in any order, are read back when they are durable, and what differs is found.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::error::{Error, ErrorKind};
use crate::format::Version;
use crate::format::geometry::Geometry;
use crate::io::file::{Caching, FileStorage};
use crate::io::sim::SimDisk;
use crate::io::{Allocation, Folder, Storage, StorageExt};
use crate::ops::convert::{fill_new, verify_new};
use crate::ops::progress::{Progress, Silent};
use crate::units::Sectors;

const SILENT: Pipeline<'static> = Pipeline { progress: &Silent, read_back: true };

/// A file on a medium that changes one byte of what is written to it.
struct Lying {
    file: FileStorage,
    at: u64,
}

impl Storage for Lying {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(offset, buffer)?;
        if (offset..offset + written as u64).contains(&self.at) {
            let byte = buffer[usize::try_from(self.at - offset).unwrap()];
            self.file.write_at(self.at, &[byte ^ 1])?;
        }
        Ok(written)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        self.file.allocate(offset, len, how)
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }
}

#[test]
fn what_differs_after_writing_is_found() {
    for (raw, preallocated) in [(false, false), (false, true), (true, false)] {
        let folder = tempfile::tempdir().unwrap();
        let source = FileStorage::create_exclusive(folder.path().join("source"), Caching::Cached).unwrap();
        // More than one piece.
        let len = 20 << 20;
        source.set_len(len).unwrap();
        source.write_all_at(100_000, &vec![7; 9_000_000]).unwrap();
        source.write_all_at(len - 9, &[9; 9]).unwrap();
        let geometry = match raw {
            true => Geometry::raw(Sectors(64), len).unwrap(),
            false => Geometry::new(Version::V2, Sectors(64), Sectors(len / 512)).unwrap(),
        };
        let content = StorageContent::new(&source, len);
        let fill = |name: &str, at: u64, pipeline: &Pipeline<'_>| {
            let file = FileStorage::create_exclusive(folder.path().join(name), Caching::Cached).unwrap();
            let target: Arc<dyn Storage> = Arc::new(Lying { file, at });
            let filled = fill_new(&target, Path::new(name), &geometry, preallocated, |to, storage| {
                let threads = threads(storage, piece_bytes(to.unit_bytes()));
                assert!(threads > 1);
                copy(&content, to, len, threads, pipeline)
            });
            (target, filled)
        };
        let (target, filled) = fill("sound", u64::MAX, &SILENT);
        let layout = filled.unwrap().1;
        let check = |target: &Arc<dyn Storage>| verify_new(target, Path::new("sound"), &geometry, layout);
        check(&target).unwrap();
        let data_start = geometry.data_start().0;
        // The start, a later piece, the end.
        for at in [data_start + 200_000, data_start + 8_400_000, target.len().unwrap() - 1] {
            let error = fill(&format!("lying {at}"), at, &SILENT).1.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "raw {raw}, byte {at}");
            let unread = Pipeline { read_back: false, ..SILENT };
            fill(&format!("unread {at}"), at, &unread).1.unwrap();
        }
        if raw {
            target.set_len(len - 1).unwrap();
            assert_eq!(check(&target).unwrap_err().kind(), ErrorKind::Corrupt);
        } else {
            // Entries of two clusters change places: sound, but not what was compared.
            let (mut one, mut other) = ([0; 4], [0; 4]);
            target.read_exact_at(64 + 4 * 10, &mut one).unwrap();
            target.read_exact_at(64 + 4 * 11, &mut other).unwrap();
            target.write_all_at(64 + 4 * 10, &other).unwrap();
            target.write_all_at(64 + 4 * 11, &one).unwrap();
            assert_eq!(check(&target).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}

/// A target that stores nothing, and looks at the order of what is asked of it.
#[derive(Default)]
struct Ordered {
    /// For each piece: 1 when it was put, 2 when it was synced, 3 when it was read back.
    pieces: Mutex<std::collections::BTreeMap<u64, u8>>,
    syncs: AtomicU64,
}

impl Target for Ordered {
    fn unit_bytes(&self) -> u64 {
        1 << 20
    }
    fn put(&self, at: u64, _: &[u8], _: &dyn Fn(Extent) -> Presence, digest: bool) -> Result<Option<Digest>> {
        assert_eq!(self.pieces.lock().unwrap().insert(at, 1), None);
        Ok(digest.then_some([0; 32]))
    }
    fn sync(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        // What is put from here on is not covered.
        let put: Vec<_> =
            self.pieces.lock().unwrap().iter().filter(|(_, state)| **state == 1).map(|(at, _)| *at).collect();
        std::thread::yield_now();
        for at in put {
            self.pieces.lock().unwrap().insert(at, 2);
        }
        Ok(())
    }
    fn digest(&self, piece: Extent, _: &mut [u8]) -> Result<Digest> {
        assert_eq!(self.pieces.lock().unwrap().insert(piece.start(), 3), Some(2), "it is durable");
        Ok([0; 32])
    }
}

#[test]
fn every_piece_is_read_back_once_after_a_sync_that_covers_it() {
    for (threads, number) in [(1, 1), (1, 100), (4, 1), (4, 100), (8, 333)] {
        let target = Ordered::default();
        let mut at = 0;
        let next = || {
            let start = at * PIECE_BYTES;
            at += 1;
            let extent = Extent::between(start, start + PIECE_BYTES);
            Ok((at <= number).then_some(Piece { extent, bytes: None }))
        };
        let store = |piece: &Piece, bytes: &mut [u8]| {
            target.put(piece.extent.start(), bytes, &|_| Presence::Alone, true)
        };
        SILENT.fill(&target, (4096, threads), next, store).unwrap();
        let pieces = target.pieces.into_inner().unwrap();
        assert_eq!(pieces.len() as u64, number);
        assert!(pieces.values().all(|&state| state == 3), "{threads} threads");
        let syncs = target.syncs.into_inner();
        assert!((1..=number.div_ceil(16) + 1).contains(&syncs), "{syncs} for {number}");
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

/// A target of which one piece fails: when it is put, synced or read back.
struct Failing {
    bad: u64,
    sync_fails: bool,
    digest_fails: bool,
}

impl Target for Failing {
    fn unit_bytes(&self) -> u64 {
        8
    }
    fn put(&self, at: u64, _: &[u8], _: &dyn Fn(Extent) -> Presence, digest: bool) -> Result<Option<Digest>> {
        if at == self.bad { Err(Error::new(ErrorKind::Write, "bad")) } else { Ok(digest.then_some([0; 32])) }
    }
    fn sync(&self) -> Result<()> {
        if self.sync_fails { Err(Error::new(ErrorKind::Sync, "bad")) } else { Ok(()) }
    }
    fn digest(&self, piece: Extent, _: &mut [u8]) -> Result<Digest> {
        Ok([u8::from(self.digest_fails && piece.start() == 8); 32])
    }
}

#[test]
fn the_first_failure_ends_a_run_whoever_has_it() {
    let piece = |number: u64| Piece { extent: Extent::between(number * 8, number * 8 + 8), bytes: None };
    let sound = || Failing { bad: u64::MAX, sync_fails: false, digest_fails: false };
    for threads in [1, 4] {
        let run = |pipeline: &Pipeline<'_>, target: &Failing| {
            let mut number = 0;
            let next = || {
                number += 1;
                Ok((number < 10_000).then(|| piece(number)))
            };
            let store = |piece: &Piece, bytes: &mut [u8]| {
                target.put(piece.extent.start(), bytes, &|_| Presence::Alone, true)
            };
            pipeline.fill(target, (8, threads), next, store).map_err(|error| error.kind())
        };
        let failed = |target: Failing| run(&SILENT, &target).unwrap_err();
        assert_eq!(failed(Failing { bad: 77 * 8, ..sound() }), ErrorKind::Write, "{threads} threads");
        assert_eq!(failed(Failing { sync_fails: true, ..sound() }), ErrorKind::Sync);
        assert_eq!(failed(Failing { digest_fails: true, ..sound() }), ErrorKind::Corrupt);
        // Among those that are stored, and among those that are compared.
        for calls in [50, 15_000] {
            let cancelling = Cancelling(AtomicU64::new(calls));
            let pipeline = Pipeline { progress: &cancelling, read_back: true };
            assert_eq!(run(&pipeline, &sound()), Err(ErrorKind::Cancelled));
        }
        let counting = Cancelling(AtomicU64::new(9_999 + 9_999 + 1));
        run(&Pipeline { progress: &counting, read_back: true }, &sound()).unwrap();
        assert!(counting.0.into_inner() <= 1, "each piece is told twice");
        let next = || Err(Error::new(ErrorKind::Read, "no"));
        let failing = SILENT.fill(&sound(), (8, threads), next, |_: &Piece, _: &mut [u8]| Ok(None));
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
