//! The memory that outlives a server: an anonymous file that keeper and server share.
//!
//! It holds what INIT agreed (a successor is not told again), the word "poisoned" after a failed sync, and the log of
//! pending entries (see [`PendingLog`]). Nothing here needs a clean end of the server: each change is one `pwrite` of
//! one word or one record, made before what depends on it.
//!
//! Layout: a page of 8-byte words, then records of 16 bytes. Positions in the log are offsets in the file and only
//! grow; the part that is no longer needed is punched out. Invariants: `start <= end of file`; a record counts only
//! when its check fits, so that one cut by death in mid-write (never acknowledged) is told from a whole one.
//!
//! Locking: one mutex around the end of the log. It is never held over anything but these writes.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::held::Handing;
use super::sys;
use super::wire::Agreement;
use crate::device::control::Connection;
use crate::device::pending::{PendingEntry, PendingLog, Seal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Chain;
use crate::io::Storage;
pub use crate::io::identity::FileIdentity;
use crate::units::{FileCluster, GuestCluster};

const MAGIC: u64 = 0x3130_5652_5553_4c50;
const LOG_START: u64 = 4096;
const RECORD_BYTES: usize = 16;
/// More pending entries than this are not believed: a disk flushes by itself long before.
const RECORDS_MAX: u64 = 1 << 24;
/// Give memory of the log back in pieces of this size.
const PUNCH_BYTES: u64 = 64 * 1024;

/// The words of the first page.
#[derive(Clone, Copy)]
enum Word {
    Magic = 0,
    Minor = 1,
    Flags = 2,
    Poisoned = 3,
    Incomplete = 4,
    LogStart = 5,
    TopDevice = 6,
    TopInode = 7,
    Servers = 8,
    Stopped = 9,
    Files = 10,
    Beats = 11,
    Closed = 12,
}

impl Word {
    fn offset(self) -> u64 {
        self as u64 * 8
    }
}

/// What a dead server has left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// What the kernel was told; `None` when it died before.
    pub agreement: Option<Agreement>,
    /// A sync failed: no successor may serve.
    pub poisoned: bool,
    /// Pending entries may be missing: no successor may serve.
    pub incomplete: bool,
    /// How many servers have come to serving.
    pub servers: u64,
    /// Which file `entries` belong to.
    pub top: Option<FileIdentity>,
    /// Which of the files that the keeper holds are in use: their number; 0 for none.
    pub files: u64,
    /// Pending entries, oldest first; a later one for the same cluster holds.
    pub entries: Vec<PendingEntry>,
}

/// The shared memory, as keeper and server see it.
#[derive(Debug)]
pub struct Survivor {
    file: File,
    log_end: Mutex<u64>,
    /// The way to the keeper, in a server.
    handing: OnceLock<Handing>,
}

impl Survivor {
    /// New, empty memory.
    pub fn create() -> Result<Self> {
        let build = || -> io::Result<Self> {
            let file = sys::create_memory_file("ploop-survivor")?;
            file.write_all_at(&vec![0; usize::try_from(LOG_START).map_err(io::Error::other)?], 0)?;
            let survivor = Self { file, log_end: Mutex::new(LOG_START), handing: OnceLock::new() };
            survivor.set(Word::LogStart, LOG_START)?;
            survivor.set(Word::Magic, MAGIC)?;
            Ok(survivor)
        };
        build().map_err(|cause| Error::io(ErrorKind::Memory, "make the memory shared with the keeper", cause))
    }

    /// The memory behind a descriptor that came from the keeper.
    pub fn open(descriptor: OwnedFd) -> Result<Self> {
        let file = File::from(descriptor);
        let adopt = || -> io::Result<Option<u64>> {
            let length = file.metadata()?.len();
            let mut magic = [0; 8];
            file.read_exact_at(&mut magic, Word::Magic.offset())?;
            Ok((u64::from_ne_bytes(magic) == MAGIC).then_some(length))
        };
        let length = adopt()
            .map_err(|cause| Error::io(ErrorKind::Memory, "read the memory shared with the keeper", cause))?
            .ok_or_else(|| {
                Error::new(ErrorKind::Parameter, "the descriptor passed is not the keeper's memory")
            })?;
        // A record cut by death is overwritten by none: the next begins behind it.
        let end = length.max(LOG_START).next_multiple_of(RECORD_BYTES as u64);
        Ok(Self { file, log_end: Mutex::new(end), handing: OnceLock::new() })
    }

    /// The descriptor, to be passed on.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn set(&self, word: Word, value: u64) -> io::Result<()> {
        self.file.write_all_at(&value.to_ne_bytes(), word.offset())
    }

    fn get(&self, word: Word) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, word.offset())?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn note(&self, word: Word, value: u64) -> Result<()> {
        self.set(word, value)
            .map_err(|cause| Error::io(ErrorKind::Memory, "write the memory shared with the keeper", cause))
    }

    /// Remembers what INIT agreed; called before the kernel is answered.
    pub fn set_agreement(&self, agreement: &Agreement) -> Result<()> {
        self.note(Word::Minor, u64::from(agreement.minor))?;
        self.note(Word::Flags, agreement.flags)
    }

    /// Remembers which file the log is about; called before the first entry.
    pub fn set_top(&self, top: FileIdentity) -> Result<()> {
        self.note(Word::TopDevice, top.device)?;
        self.note(Word::TopInode, top.inode)
    }

    /// Hands the files of chains to the keeper from now on, and those of `chain` at once: they are the ones in use.
    pub fn hand_files(&self, handing: Handing, chain: &Chain) -> Result<()> {
        let handing = self.handing.get_or_init(|| handing);
        handing.hand(chain)?;
        self.note(Word::Files, handing.number())
    }

    /// Remembers that the files of this number, which the keeper holds, are in use.
    pub fn set_files(&self, number: u64) -> Result<()> {
        self.note(Word::Files, number)
    }

    /// The number of the files in use.
    pub fn files(&self) -> Result<u64> {
        self.legacy_word(Word::Files)
    }

    /// Remembers that nobody may succeed a dead server any more.
    pub fn refuse_successors(&self) -> Result<()> {
        self.note(Word::Incomplete, 1)
    }

    /// Tells the keeper that the server runs, some times a second.
    pub fn beat(&self) -> Result<()> {
        let before = self.legacy_word(Word::Beats)?;
        self.note(Word::Beats, before.wrapping_add(1))
    }

    /// How often the servers have beaten.
    pub fn beats(&self) -> Result<u64> {
        self.legacy_word(Word::Beats)
    }

    /// Remembers that the image is closed with everything in it: the server is about to end.
    pub fn set_closed(&self) -> Result<()> {
        self.note(Word::Closed, 1)
    }

    /// Whether the image was closed.
    pub fn is_closed(&self) -> Result<bool> {
        self.legacy_word(Word::Closed).map(|word| word != 0)
    }

    /// The same connection's files to another keeper: all that are in use, as a new set.
    pub fn hand_files_anew(&self, keeper: Connection, chain: &Chain) -> Result<()> {
        let Some(handing) = self.handing.get() else { return Ok(()) };
        handing.change_keeper(keeper, chain)?;
        self.note(Word::Files, handing.number())
    }

    /// Remembers that one more server has come to serving.
    pub fn set_ready(&self) -> Result<()> {
        let before = self.legacy_word(Word::Servers)?;
        self.note(Word::Servers, before.saturating_add(1))
    }

    /// Remembers that the server is on its way out by order: nobody is to succeed it.
    pub fn set_stopped(&self) -> Result<()> {
        self.note(Word::Stopped, 1)
    }

    /// Whether the server was on its way out by order.
    pub fn is_stopped(&self) -> Result<bool> {
        self.legacy_word(Word::Stopped).map(|word| word != 0)
    }

    fn legacy_word(&self, word: Word) -> Result<u64> {
        self.get(word)
            .map_err(|cause| Error::io(ErrorKind::Memory, "read the memory shared with the keeper", cause))
    }

    /// What the server before this moment has left.
    pub fn legacy(&self) -> Result<Legacy> {
        let read = || -> io::Result<Legacy> {
            let minor = u32::try_from(self.get(Word::Minor)?).map_err(io::Error::other)?;
            let agreement = (minor != 0).then_some(Agreement { minor, flags: self.get(Word::Flags)? });
            let top = FileIdentity { device: self.get(Word::TopDevice)?, inode: self.get(Word::TopInode)? };
            let (entries, whole) = self.entries()?;
            Ok(Legacy {
                agreement,
                poisoned: self.get(Word::Poisoned)? != 0,
                incomplete: self.get(Word::Incomplete)? != 0 || !whole,
                servers: self.get(Word::Servers)?,
                top: (top.inode != 0).then_some(top),
                files: self.get(Word::Files)?,
                entries,
            })
        };
        read().map_err(|cause| Error::io(ErrorKind::Memory, "read the memory shared with the keeper", cause))
    }

    /// All records of the log, and whether the log can be believed to be whole.
    fn entries(&self) -> io::Result<(Vec<PendingEntry>, bool)> {
        let start = self.get(Word::LogStart)?;
        let end = self.file.metadata()?.len();
        if start < LOG_START || !start.is_multiple_of(RECORD_BYTES as u64) {
            return Ok((Vec::new(), false));
        }
        let records = end.saturating_sub(start) / RECORD_BYTES as u64;
        if records > RECORDS_MAX {
            return Ok((Vec::new(), false));
        }
        let mut entries = Vec::new();
        let mut piece = vec![0; RECORD_BYTES * 1024];
        let mut at = start;
        while at + RECORD_BYTES as u64 <= end {
            let wanted = usize::try_from((end - at).min(piece.len() as u64)).map_err(io::Error::other)?;
            let whole = wanted - wanted % RECORD_BYTES;
            self.file.read_exact_at(&mut piece[..whole], at)?;
            for record in piece[..whole].as_chunks::<RECORD_BYTES>().0 {
                // A record that does not fit was cut by the death of its writer, before its request was acknowledged.
                entries.extend(decode(record, at));
                at += RECORD_BYTES as u64;
            }
        }
        Ok((entries, true))
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        // The number is valid at every step.
        self.log_end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the fact that something could not be kept. The word lies in memory that exists: if even this fails the
    /// file is unusable, and a successor finds that out when it reads it.
    fn mark_incomplete(&self) {
        let _ = self.set(Word::Incomplete, 1);
    }
}

fn check(position: u64, cluster: u32, value: u64) -> u32 {
    let mixed = (position ^ u64::from(cluster).rotate_left(40) ^ value.rotate_left(13))
        .wrapping_add(MAGIC)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bytes = (mixed ^ mixed >> 32).to_le_bytes();
    bytes.first_chunk::<4>().map_or(0, |low| u32::from_le_bytes(*low))
}

/// A record: guest cluster, check, then file cluster plus one (0 for a cleared entry).
fn encode(entry: PendingEntry, position: u64) -> [u8; RECORD_BYTES] {
    let value = entry.file.map_or(0, |cluster| u64::from(cluster.0) + 1);
    let mut record = [0; RECORD_BYTES];
    record[..4].copy_from_slice(&entry.cluster.0.to_ne_bytes());
    record[4..8].copy_from_slice(&check(position, entry.cluster.0, value).to_ne_bytes());
    record[8..].copy_from_slice(&value.to_ne_bytes());
    record
}

fn decode(record: &[u8; RECORD_BYTES], position: u64) -> Option<PendingEntry> {
    let cluster = u32::from_ne_bytes(*record.first_chunk::<4>()?);
    let stored = u32::from_ne_bytes(*record[4..].first_chunk::<4>()?);
    let value = u64::from_ne_bytes(*record.last_chunk::<8>()?);
    if stored != check(position, cluster, value) {
        return None;
    }
    let file = match value.checked_sub(1) {
        None => None,
        Some(number) => Some(FileCluster(u32::try_from(number).ok()?)),
    };
    Some(PendingEntry { cluster: GuestCluster(cluster), file })
}

impl PendingLog for Survivor {
    fn entered(&self, entry: PendingEntry) {
        let mut end = self.lock();
        if self.file.write_all_at(&encode(entry, *end), *end).is_err() {
            self.mark_incomplete();
        }
        *end += RECORD_BYTES as u64;
    }

    fn seal(&self) -> Seal {
        Seal(*self.lock())
    }

    fn committed(&self, seal: Seal) {
        // Under the lock, so that the start never passes a later one.
        let _end = self.lock();
        let Ok(start) = self.get(Word::LogStart) else { return self.mark_incomplete() };
        if seal.0 <= start {
            return;
        }
        if self.set(Word::LogStart, seal.0).is_err() {
            return self.mark_incomplete();
        }
        let from = (start - start % PUNCH_BYTES).max(LOG_START);
        let to = seal.0 - seal.0 % PUNCH_BYTES;
        if let Ok(length) = i64::try_from(to.saturating_sub(from))
            && let Ok(offset) = i64::try_from(from)
            && length > 0
        {
            use nix::fcntl::FallocateFlags;
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // Memory that is not given back now is given back next time.
            let _ = nix::fcntl::fallocate(&self.file, how, offset, length);
        }
    }

    fn poisoned(&self) {
        if self.set(Word::Poisoned, 1).is_err() {
            self.mark_incomplete();
        }
    }

    fn top_replaced(&self, top: &dyn Storage) {
        let end = self.seal();
        self.committed(end);
        // Without a name for the new top no successor could tell whose entries these are: none may serve. No entry is in
        // the log before this is through, so a death in between misleads nobody.
        let named =
            top.descriptor().and_then(|file| FileIdentity::of(file).ok()).map(|top| self.set_top(top));
        if !matches!(named, Some(Ok(()))) {
            self.mark_incomplete();
        }
    }

    fn chain_prepared(&self, chain: &Chain) -> Result<()> {
        self.handing.get().map_or(Ok(()), |handing| handing.hand(chain))
    }

    fn chain_replaced(&self, chain: &Chain) {
        let Some(handing) = self.handing.get() else { return };
        // Most often it was prepared, and this does nothing. Without these files no successor may serve.
        let done = handing.hand(chain).and_then(|()| self.note(Word::Files, handing.number()));
        if done.is_err() {
            return self.mark_incomplete();
        }
        // The keeper lets go of the former ones, whose space is given back then.
        handing.replaced();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(cluster: u32, file: Option<u32>) -> PendingEntry {
        PendingEntry { cluster: GuestCluster(cluster), file: file.map(FileCluster) }
    }

    /// What a successor sees.
    fn reopened(survivor: &Survivor) -> Survivor {
        Survivor::open(survivor.file.try_clone().unwrap().into()).unwrap()
    }

    #[test]
    fn a_successor_reads_what_was_entered_since_the_last_commit() {
        let survivor = Survivor::create().unwrap();
        survivor.entered(entry(1, Some(10)));
        let seal = survivor.seal();
        survivor.entered(entry(2, Some(u32::MAX)));
        survivor.entered(entry(2, None));
        survivor.committed(seal);
        let legacy = reopened(&survivor).legacy().unwrap();
        assert_eq!(legacy.entries, [entry(2, Some(u32::MAX)), entry(2, None)]);
        assert!(!legacy.poisoned && !legacy.incomplete && legacy.agreement.is_none());
        survivor.committed(survivor.seal());
        assert_eq!(reopened(&survivor).legacy().unwrap().entries, []);
    }

    #[test]
    fn an_older_commit_does_not_bring_entries_back() {
        let survivor = Survivor::create().unwrap();
        let old = survivor.seal();
        survivor.entered(entry(1, Some(1)));
        survivor.committed(survivor.seal());
        survivor.committed(old);
        assert_eq!(survivor.legacy().unwrap().entries, []);
    }

    #[test]
    fn a_record_cut_by_death_is_ignored_and_the_log_goes_on() {
        let survivor = Survivor::create().unwrap();
        survivor.entered(entry(1, Some(1)));
        let end = *survivor.lock();
        survivor.file.write_all_at(&encode(entry(9, Some(9)), end)[..7], end).unwrap();
        let successor = reopened(&survivor);
        assert_eq!(successor.legacy().unwrap().entries, [entry(1, Some(1))]);
        successor.entered(entry(2, Some(2)));
        assert_eq!(successor.legacy().unwrap().entries, [entry(1, Some(1)), entry(2, Some(2))]);
    }

    #[test]
    fn memory_of_a_long_log_is_given_back() {
        let survivor = Survivor::create().unwrap();
        for round in 0..64 {
            for cluster in 0..1024 {
                survivor.entered(entry(cluster, Some(round)));
            }
            survivor.committed(survivor.seal());
        }
        let blocks = std::os::unix::fs::MetadataExt::blocks(&survivor.file.metadata().unwrap());
        assert!(blocks * 512 <= 4 * PUNCH_BYTES, "{blocks} blocks");
        survivor.entered(entry(3, None));
        assert_eq!(survivor.legacy().unwrap().entries, [entry(3, None)]);
    }

    #[test]
    fn poison_and_agreement_survive() {
        let survivor = Survivor::create().unwrap();
        let agreement = Agreement { minor: 40, flags: super::super::wire::HAS_RESEND };
        survivor.set_agreement(&agreement).unwrap();
        survivor.set_top(FileIdentity { device: 1, inode: 2 }).unwrap();
        survivor.poisoned();
        let legacy = reopened(&survivor).legacy().unwrap();
        assert_eq!(legacy.agreement, Some(agreement));
        assert_eq!(legacy.top, Some(FileIdentity { device: 1, inode: 2 }));
        assert!(legacy.poisoned);
    }

    #[test]
    fn a_new_top_is_known_by_its_file_and_has_nothing_pending() {
        use crate::io::file::{Caching, FileStorage};
        let survivor = Survivor::create().unwrap();
        survivor.set_top(FileIdentity { device: 1, inode: 2 }).unwrap();
        survivor.entered(entry(1, Some(1)));
        let folder = tempfile::tempdir().unwrap();
        let top = FileStorage::create_exclusive(folder.path().join("top"), Caching::Cached).unwrap();
        survivor.top_replaced(&top);
        survivor.entered(entry(2, Some(2)));
        let legacy = reopened(&survivor).legacy().unwrap();
        assert_eq!(legacy.top, Some(FileIdentity::of(top.descriptor().unwrap()).unwrap()));
        assert_eq!(legacy.entries, [entry(2, Some(2))]);
        assert!(!legacy.incomplete);
        // A file that has no identity has no successor.
        survivor.top_replaced(&crate::io::sim::SimDisk::new(1).create("top").unwrap());
        assert!(reopened(&survivor).legacy().unwrap().incomplete);
    }

    #[test]
    fn any_other_file_is_refused() {
        let file = sys::create_memory_file("other").unwrap();
        file.set_len(8192).unwrap();
        assert!(Survivor::open(file.into()).is_err());
    }
}
