//! The moment in which the new chain of a snapshot takes writes already, and its descriptor is not durable yet (S6).

use std::io;
use std::sync::{Arc, Mutex};

use ploop_core::device::{Client, Disk, DiskOptions, Op};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid, Mapping};
use ploop_core::io::sim::{CrashLevel, CrashOptions, SimDisk};
use ploop_core::io::{Access, Folder, QueueChoice, Storage, StorageExt, Wait};
use ploop_core::mutant::{Mutant, activate};
use ploop_core::ops::live::{NoWriters, SnapshotOptions, SnapshotReport, snapshot};
use ploop_core::units::GuestOffset;

use crate::bundle::{Shape, open_state};
use crate::live::Simulated;

/// What the guest writes at that moment.
const VALUE: u8 = 0xA5;

/// A folder where something is done before each sync, which fails if that does.
struct Meddling<'a> {
    inner: &'a dyn Folder,
    before_sync: Mutex<Box<dyn FnMut() -> io::Result<()> + Send + 'a>>,
}

impl Folder for Meddling<'_> {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.inner.open(name, access)
    }
    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.inner.create_exclusive(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename_exclusive(from, to)
    }
    fn unlink(&self, name: &str) -> io::Result<()> {
        self.inner.unlink(name)
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        self.inner.exists(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }
    fn sync(&self) -> io::Result<()> {
        (self.before_sync.lock().unwrap())()?;
        self.inner.sync()
    }
}

fn serve(folder: &dyn Folder) -> Result<Arc<Disk>, Error> {
    let chain = open_state(folder, &DiskDescriptor::load(folder, None)?, Guid::TOP, Access::ReadWrite)?;
    Disk::open(chain, DiskOptions { manual_flusher: true, ..DiskOptions::default() })
}

fn client(disk: &Arc<Disk>) -> Client {
    Client::new(disk, QueueChoice::Pool.queue(4).unwrap()).unwrap()
}

/// What the next one who opens the disk finds in its first sector.
fn first_byte(folder: &dyn Folder) -> u8 {
    let descriptor = DiskDescriptor::load(folder, None).unwrap();
    let chain = open_state(folder, &descriptor, Guid::TOP, Access::ReadOnly).unwrap();
    let mut sector = [0; 512];
    if let Mapping::Data { delta, offset, .. } = chain.map(GuestOffset(0), 512) {
        chain.storage(delta).read_exact_at(offset.0, &mut sector).unwrap();
    }
    assert!(sector.iter().all(|byte| *byte == sector[0]) || sector[0] != VALUE, "half a sector");
    sector[0]
}

/// In how many states that a power loss may leave now the write is not there; all of them can be opened.
fn lost(host: &SimDisk) -> usize {
    let states = host.snapshot().crash_states(&CrashOptions::new(CrashLevel::Sectors));
    states.map(|state| first_byte(&state.into_disk(2).folder())).filter(|byte| *byte != VALUE).count()
}

fn snapshot_in(disk: &Arc<Disk>, folder: &dyn Folder) -> Result<SnapshotReport, Error> {
    snapshot(disk, &Simulated(folder), &mut NoWriters, &SnapshotOptions::default())
}

/// Runs what can be run now; whether that request was answered.
fn is_answered(client: &mut Client, id: u64) -> bool {
    let disk = Arc::clone(client.disk());
    let mut ended = Vec::new();
    // More turns than a round of the flusher has steps.
    for _ in 0..100 {
        while disk.step_flusher() {}
        client.queue().run(Wait::No, &mut ended).unwrap();
    }
    ended.iter().any(|one| one.id == id && one.result.is_ok())
}

/// A guest writes and flushes between the moment when a new chain is served and the sync that makes it durable. Whether the
/// flush was answered then, what a power loss could have taken then, and what once it was answered.
fn flush_beside_a_snapshot(mutant: Option<Mutant>) -> (bool, usize, usize) {
    let host = Shape::of(1).bundle().disk(1);
    let folder = host.folder();
    let disk = serve(&folder).unwrap();
    let mut client = client(&disk);
    let (mut flush, mut is_early, mut lost_early) = (None, false, 0);
    {
        let meddling = Meddling {
            inner: &folder,
            before_sync: Mutex::new(Box::new(|| {
                if disk.chain().depth() == 2 && flush.is_none() {
                    client.write(0, &[VALUE; 512]).unwrap();
                    let id = client.submit(Op::Flush, Extent::between(0, 0), None);
                    is_early = is_answered(&mut client, id);
                    lost_early = lost(&host);
                    flush = Some(id);
                }
                Ok(())
            })),
        };
        activate(mutant);
        let made = snapshot_in(&disk, &meddling);
        activate(None);
        assert_eq!(made.unwrap().warnings, Vec::<String>::new());
    }
    let id = flush.expect("the gate was opened before the folder was synced");
    assert!(is_early || is_answered(&mut client, id));
    (is_early, lost_early, lost(&host))
}

#[test]
fn no_flush_is_answered_before_the_new_chain_is_durable() {
    let (is_early, lost_early, lost_late) = flush_beside_a_snapshot(None);
    assert!(!is_early);
    assert!(lost_early > 0, "nothing is promised by then, and nothing was waited for");
    assert_eq!(lost_late, 0);
    let (is_early, lost_early, _) = flush_beside_a_snapshot(Some(Mutant::FlushBeforeSettled));
    assert!(is_early && lost_early > 0, "and would be noticed");
    ploop_testing::found(Mutant::FlushBeforeSettled);
}

/// Who serves the disk next, after the server was killed at that moment, syncs the folder before it answers any flush.
#[test]
fn a_successor_settles_what_it_finds() {
    for is_settled in [false, true] {
        let host = Shape::of(1).bundle().disk(1);
        let folder = host.folder();
        {
            let disk = serve(&folder).unwrap();
            let meddling = Meddling {
                inner: &folder,
                before_sync: Mutex::new(Box::new(|| match disk.chain().depth() {
                    1 => Ok(()),
                    _ => Err(io::Error::from_raw_os_error(5)),
                })),
            };
            let in_doubt = snapshot_in(&disk, &meddling).unwrap_err();
            assert_eq!(in_doubt.kind(), ErrorKind::OutcomeUnknown);
            // It dies here; nothing is closed.
        }
        let disk = serve(&folder).unwrap();
        assert_eq!(disk.chain().depth(), 2);
        if is_settled {
            folder.sync().unwrap();
        }
        let mut client = client(&disk);
        client.write(0, &[VALUE; 512]).unwrap();
        client.flush().unwrap();
        assert_eq!(lost(&host) == 0, is_settled);
    }
}

#[test]
fn a_folder_that_cannot_be_synced_ends_all_promises_and_once_is_no_time() {
    for lasting in [false, true] {
        let host = Shape::of(1).bundle().disk(1);
        let folder = host.folder();
        let disk = serve(&folder).unwrap();
        let mut guest = client(&disk);
        let mut has_failed = false;
        let made = {
            let meddling = Meddling {
                inner: &folder,
                before_sync: Mutex::new(Box::new(|| {
                    if disk.chain().depth() == 1 || (has_failed && !lasting) {
                        return Ok(());
                    }
                    has_failed = true;
                    Err(io::Error::from_raw_os_error(5))
                })),
            };
            snapshot_in(&disk, &meddling)
        };
        match made {
            Ok(report) => {
                assert!(!lasting && report.warnings.len() == 1, "{report:?}");
                guest.write(0, &[VALUE; 512]).unwrap();
                guest.flush().unwrap();
                assert_eq!(lost(&host), 0);
            }
            Err(error) => {
                assert!(lasting && error.kind() == ErrorKind::OutcomeUnknown, "{error}");
                assert!(disk.is_poisoned());
                assert!(guest.flush().is_err() && guest.write(0, &[VALUE; 512]).is_err());
                assert!(guest.read(Extent::between(0, 512)).is_ok());
                assert!(snapshot_in(&disk, &folder).is_err());
            }
        }
    }
}
