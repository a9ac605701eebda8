//! Only an image's own bytes are damage: every error number at every call to the host, one at a time, under every kind of check
//! and under opening; none may end as "damaged" (11) or as a wrong descriptor (39).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::format::{Chain, Mode};
use crate::io::Allocation;
use crate::io::sim::SimDisk;
use crate::ops::Silent;
use crate::ops::snapshot::{SnapshotOptions, snapshot_in};
use crate::ops::testing::{disk, open_state, write};

/// What a host may answer that says nothing about the disk. `ENOENT`, `ENOTDIR`, `EISDIR` and `ELOOP` are not among them: they
/// say that there is no such image.
const NUMBERS: [i32; 14] = [
    libc::EIO,
    libc::EROFS,
    libc::EACCES,
    libc::EPERM,
    libc::ENAMETOOLONG,
    libc::EMFILE,
    libc::ENFILE,
    libc::ENOMEM,
    libc::ENOSPC,
    libc::ESTALE,
    libc::ETXTBSY,
    libc::EAGAIN,
    libc::EINVAL,
    libc::EOPNOTSUPP,
];

/// Counts calls and fails one of them.
struct Fault {
    calls: AtomicU64,
    fails: u64,
    number: i32,
}

impl Fault {
    fn call(&self) -> io::Result<()> {
        match self.calls.fetch_add(1, Ordering::SeqCst) {
            call if call == self.fails => Err(io::Error::from_raw_os_error(self.number)),
            _ => Ok(()),
        }
    }
}

struct FaultyFolder<F>(F, Arc<Fault>);
struct FaultyFile(Arc<dyn Storage>, Arc<Fault>);

impl<F: Folder> Folder for FaultyFolder<F> {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.1.call()?;
        Ok(Arc::new(FaultyFile(self.0.open(name, access)?, Arc::clone(&self.1))))
    }
    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.1.call()?;
        Ok(Arc::new(FaultyFile(self.0.create_exclusive(name)?, Arc::clone(&self.1))))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.1.call()?;
        self.0.rename(from, to)
    }
    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
        self.1.call()?;
        self.0.rename_exclusive(from, to)
    }
    fn unlink(&self, name: &str) -> io::Result<()> {
        self.1.call()?;
        self.0.unlink(name)
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        self.1.call()?;
        self.0.exists(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.1.call()?;
        self.0.list()
    }
    fn sync(&self) -> io::Result<()> {
        self.1.call()?;
        self.0.sync()
    }
}

impl Storage for FaultyFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.1.call()?;
        self.0.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        self.1.call()?;
        self.0.write_at(offset, buffer)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.1.call()?;
        self.0.sync_data()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.call()?;
        self.0.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        self.1.call()?;
        self.0.allocate(offset, len, how)
    }
    fn len(&self) -> io::Result<u64> {
        self.1.call()?;
        self.0.len()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.1.call()?;
        self.0.next_data(offset)
    }
}

/// A disk with a snapshot, of this kind; not closed if told.
fn prepared(mode: Mode, not_closed: bool) -> SimDisk {
    let disk = disk(mode);
    write(&disk.folder(), &[(0, 1), (3, 2)]);
    snapshot_in(&disk.folder(), &SnapshotOptions::default(), &Silent).unwrap();
    write(&disk.folder(), &[(3, 3), (5, 4)]);
    if not_closed {
        let top = crate::ops::testing::descriptor(&disk.folder()).top_guid();
        drop(open_state(&disk.folder(), top, Access::ReadWrite).unwrap());
    }
    disk
}

/// What a verb says under a fault: its exit code, and whether anything was called damaged.
type Verb = (&'static str, fn(&dyn Folder) -> (u8, bool), bool);

fn told(result: Result<CheckReport>) -> (u8, bool) {
    match result {
        Ok(report) => (report.exit_code, report.outcome == Outcome::Damaged),
        Err(error) => (error.kind().exit_code(), false),
    }
}

fn code<T>(result: Result<T>) -> (u8, bool) {
    (result.err().map_or(0, |error| error.kind().exit_code()), false)
}

fn opened(folder: &dyn Folder, access: Access) -> Result<Arc<Chain>> {
    let top = DiskDescriptor::load(folder, None)?.top_guid();
    open_state(folder, top, access)
}

/// Each with whether it changes the disk.
const VERBS: [Verb; 6] = [
    ("look", |folder| told(check_bundle_in(folder, &CheckOptions::look(""), &Silent)), false),
    ("open for reading", |folder| code(opened(folder, Access::ReadOnly)), false),
    (
        "check",
        |folder| {
            let options = CheckOptions { read_only: false, drop_in_use: true, ..CheckOptions::look("") };
            told(check_bundle_in(folder, &options, &Silent))
        },
        true,
    ),
    ("repair", |folder| told(check_bundle_in(folder, &CheckOptions::repair(""), &Silent)), true),
    ("open for writing", |folder| code(opened(folder, Access::ReadWrite)), true),
    ("snapshot", |folder| code(snapshot_in(folder, &SnapshotOptions::default(), &Silent)), true),
];

#[test]
fn no_error_of_the_host_is_damage_of_the_disk() {
    let mut tried = 0;
    for (mode, not_closed) in [(Mode::Expanded, false), (Mode::Expanded, true), (Mode::Raw, false)] {
        let kept = prepared(mode, not_closed);
        for (verb, run, changes) in VERBS {
            // What changes the disk is given a new one each time, which takes its time.
            let numbers = if changes { &NUMBERS[..2] } else { &NUMBERS[..] };
            for &number in numbers {
                for fails in 0.. {
                    let made = changes.then(|| prepared(mode, not_closed));
                    let folder = made.as_ref().unwrap_or(&kept).folder();
                    let fault = Arc::new(Fault { calls: AtomicU64::new(0), fails, number });
                    let (code, damaged) = run(&FaultyFolder(folder, Arc::clone(&fault)));
                    let cause = io::Error::from_raw_os_error(number);
                    assert!(
                        code != 11 && code != 39 && !damaged,
                        "{verb} of {mode:?}: {cause} at call {fails} ended with {code}"
                    );
                    if fault.calls.load(Ordering::SeqCst) <= fails {
                        assert!(fails > 3, "{verb}: hardly anything was called");
                        break;
                    }
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 1000, "only {tried} faults were tried");
}

#[test]
fn real_damage_is_still_damage_under_the_same_roof() {
    let disk = prepared(Mode::Expanded, false);
    let folder = disk.folder();
    let name = crate::ops::testing::descriptor(&folder).images()[0].file().to_owned();
    folder.open(&name, Access::ReadWrite).unwrap().write_at(64, &[0xFF; 4]).unwrap();
    let fault = Arc::new(Fault { calls: AtomicU64::new(0), fails: u64::MAX, number: 0 });
    let verdict = told(check_bundle_in(&FaultyFolder(folder, fault), &CheckOptions::look(""), &Silent));
    assert_eq!(verdict, (11, true));
}
