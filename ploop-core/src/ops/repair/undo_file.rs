//! The undo file of a repair: what will be overwritten, and by what, complete and durable before the first change.
//!
//! It serves two ends. A repair that was cut is finished from it, step for step, whatever the image looks like by
//! then; and `check --undo` brings the image back to what it was.
//!
//! ```text
//!   sector 0   magic, sizes, digests         written once; the file gets its name when all of it is durable
//!   sector 1   how far the repair has come   rewritten in place, one sector
//!   byte 1024  records: copies of clusters, sectors old and new, bytes cut off the end
//! ```
//!
//! All numbers are little-endian. MD5 is against accidents, not against forgers: who can write here can write the
//! image, too.

use std::io;
use std::sync::Arc;

use md5::{Digest, Md5};

use crate::error::{Error, ErrorKind, Result};
use crate::io::stamp::Stamp;
use crate::io::temporary::stem;
use crate::io::{Access, Folder, Storage, StorageExt};
use crate::units::SECTOR_BYTES;

/// What names of undo files end with, perhaps with a number behind.
pub(crate) const SUFFIX: &str = ".undo";
/// What the name of an undo file that is not complete ends with.
pub(crate) const UNFINISHED: &str = ".undo.unfinished";
/// More undo files of one image than this are not looked for.
const NUMBERS_MAX: u32 = 1000;

const MAGIC: [u8; 16] = *b"ploop undo v1\0\0\0";
const BODY_AT: u64 = 1024;
const STATE_AT: u64 = 512;
/// Records are written in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 20;
/// No record is longer.
const RECORD_BYTES_MAX: u32 = 1 << 21;

/// One sector.
pub(crate) type SectorBytes = [u8; 512];

/// How far a repair has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The undo file is complete; the image may carry the in-use mark, and copies in free places.
    Planned,
    /// The copies are durable: from here on, entries point to them.
    Copied,
    /// The repair is complete.
    Done,
    /// It is being taken back.
    Undoing,
    /// It was taken back.
    Undone,
}

impl State {
    const ALL: [Self; 5] = [Self::Planned, Self::Copied, Self::Done, Self::Undoing, Self::Undone];
}

/// What an undo file says of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Length of the file before and after.
    pub(crate) old_bytes: u64,
    pub(crate) new_bytes: u64,
    /// Bytes of a cluster.
    pub(crate) cluster_bytes: u64,
    /// Header and table end here; a multiple of a sector.
    pub(crate) area_end: u64,
    /// Digest of those sectors of header and table that are not in the records.
    pub(crate) rest: [u8; 16],
    /// Sectors in the records.
    pub(crate) sectors: u64,
    /// Bytes of all records, and their digest.
    body_bytes: u64,
    body: [u8; 16],
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// The cluster at the first offset is copied to the second.
    Copy { from: u64, to: u64 },
    /// A sector of header, table or extension.
    Sector { offset: u64, old: Box<SectorBytes>, new: Box<SectorBytes> },
    /// Bytes that are cut off or overwritten behind the last cluster in use.
    Tail { offset: u64, bytes: Vec<u8> },
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|field| field.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn md5_of(bytes: &[u8]) -> [u8; 16] {
    Md5::digest(bytes).into()
}

impl Head {
    fn encode(&self) -> SectorBytes {
        let mut bytes = [0; 512];
        put(&mut bytes, 0, &MAGIC);
        let numbers = [
            self.old_bytes,
            self.new_bytes,
            self.cluster_bytes,
            self.area_end,
            self.sectors,
            self.body_bytes,
        ];
        for (index, number) in numbers.into_iter().enumerate() {
            put(&mut bytes, 16 + 8 * index, &number.to_le_bytes());
        }
        put(&mut bytes, 64, &self.rest);
        put(&mut bytes, 80, &self.body);
        let digest = md5_of(&bytes[..96]);
        put(&mut bytes, 96, &digest);
        bytes
    }

    fn decode(bytes: &SectorBytes) -> Option<Self> {
        if bytes[..16] != MAGIC || bytes[96..112] != md5_of(&bytes[..96]) {
            return None;
        }
        let digest = |at: usize| bytes.get(at..at + 16).and_then(|field| field.try_into().ok());
        Some(Self {
            old_bytes: u64_at(bytes, 16),
            new_bytes: u64_at(bytes, 24),
            cluster_bytes: u64_at(bytes, 32),
            area_end: u64_at(bytes, 40),
            sectors: u64_at(bytes, 48),
            body_bytes: u64_at(bytes, 56),
            rest: digest(64)?,
            body: digest(80)?,
        })
    }
}

impl Record {
    fn encode(&self, out: &mut Vec<u8>) {
        let (tag, len) = match self {
            Self::Copy { .. } => (1u32, 16),
            Self::Sector { .. } => (2, 8 + 1024),
            Self::Tail { bytes, .. } => (3, 8 + bytes.len()),
        };
        out.extend(tag.to_le_bytes());
        out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        match self {
            Self::Copy { from, to } => {
                out.extend(from.to_le_bytes());
                out.extend(to.to_le_bytes());
            }
            Self::Sector { offset, old, new } => {
                out.extend(offset.to_le_bytes());
                out.extend(&old[..]);
                out.extend(&new[..]);
            }
            Self::Tail { offset, bytes } => {
                out.extend(offset.to_le_bytes());
                out.extend(bytes);
            }
        }
    }

    fn decode(tag: u32, data: &[u8]) -> Option<Self> {
        let sector = |at: usize| {
            data.get(at..at + 512).and_then(|bytes| SectorBytes::try_from(bytes).ok()).map(Box::new)
        };
        match (tag, data.len()) {
            (1, 16) => Some(Self::Copy { from: u64_at(data, 0), to: u64_at(data, 8) }),
            (2, 1032) => Some(Self::Sector { offset: u64_at(data, 0), old: sector(8)?, new: sector(520)? }),
            (3, 8..) => Some(Self::Tail { offset: u64_at(data, 0), bytes: data[8..].to_vec() }),
            _ => None,
        }
    }
}

/// An undo file being written, under a name that nobody takes for a complete one.
pub(crate) struct Writer<'a> {
    folder: &'a dyn Folder,
    unfinished: String,
    storage: Arc<dyn Storage>,
    buffer: Vec<u8>,
    written: u64,
    digest: Md5,
    sectors: u64,
}

impl<'a> Writer<'a> {
    /// Begins the undo file of `image`; what an earlier try left unfinished goes.
    pub(crate) fn create(folder: &'a dyn Folder, image: &str) -> Result<Self> {
        let unfinished = format!("{}{UNFINISHED}", stem(image));
        let failed = |source| Error::io(ErrorKind::Create, "repair: create the undo file", source);
        if folder.exists(&unfinished).map_err(failed)? {
            folder.unlink(&unfinished).map_err(failed)?;
        }
        let storage = folder.create_exclusive(&unfinished).map_err(failed)?;
        Ok(Self {
            folder,
            unfinished,
            storage,
            buffer: Vec::new(),
            written: 0,
            digest: Md5::new(),
            sectors: 0,
        })
    }

    /// Adds a record.
    pub(crate) fn push(&mut self, record: &Record) -> Result<()> {
        self.sectors += u64::from(matches!(record, Record::Sector { .. }));
        record.encode(&mut self.buffer);
        if self.buffer.len() >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.digest.update(&self.buffer);
        self.storage.write_all_at(BODY_AT + self.written, &self.buffer).map_err(|source| {
            Error::io(ErrorKind::Write, "repair: write the undo file; the image is as it was", source)
        })?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Completes the file, makes it durable and gives it its name.
    pub(crate) fn finish(mut self, image: &str, sizes: Head) -> Result<UndoFile> {
        self.flush()?;
        let head = Head {
            sectors: self.sectors,
            body_bytes: self.written,
            body: self.digest.finalize().into(),
            ..sizes
        };
        let mut start = head.encode().to_vec();
        start.extend(encode_state(State::Planned, None));
        let failed = |kind| move |source| Error::io(kind, "repair: complete the undo file", source);
        self.storage.write_all_at(0, &start).map_err(failed(ErrorKind::Write))?;
        self.storage.sync_data().map_err(failed(ErrorKind::Sync))?;
        let name = names(image)
            .find_map(|name| match self.folder.rename_exclusive(&self.unfinished, &name) {
                Ok(()) => Some(Ok(name)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                Err(error) => Some(Err(failed(ErrorKind::Rename)(error))),
            })
            .unwrap_or_else(|| {
                Err(Error::new(ErrorKind::Create, "repair: there are too many undo files")
                    .advise("remove those that are no longer needed"))
            })?;
        self.folder.sync().map_err(failed(ErrorKind::Sync))?;
        Ok(UndoFile { name, head, storage: self.storage })
    }

    /// Takes the unfinished file away after an error.
    pub(crate) fn withdraw(self, error: Error) -> Error {
        match self.folder.unlink(&self.unfinished) {
            Ok(()) => error,
            Err(cleaning) => {
                error.advise(format!("remove {}, which could not be removed: {cleaning}", self.unfinished))
            }
        }
    }
}

/// The sizes of an image, for [`Writer::finish`].
pub(crate) fn head(lengths: (u64, u64), cluster_bytes: u64, area_end: u64, rest: [u8; 16]) -> Head {
    let (old_bytes, new_bytes) = lengths;
    Head { old_bytes, new_bytes, cluster_bytes, area_end, rest, sectors: 0, body_bytes: 0, body: [0; 16] }
}

/// The names an undo file of `image` may have, in the order in which they are taken.
pub(crate) fn names(image: &str) -> impl Iterator<Item = String> + use<'_> {
    let image = stem(image);
    (1..=NUMBERS_MAX).map(move |number| match number {
        1 => format!("{image}{SUFFIX}"),
        number => format!("{image}{SUFFIX}.{number}"),
    })
}

fn encode_state(state: State, stamp: Option<Stamp>) -> SectorBytes {
    let mut bytes = [0; 512];
    put(&mut bytes, 0, &MAGIC);
    let number = State::ALL.iter().position(|&known| known == state).unwrap_or(0);
    put(&mut bytes, 16, &(number as u64).to_le_bytes());
    if let Some((seconds, nanoseconds)) = stamp {
        put(&mut bytes, 24, &1u64.to_le_bytes());
        put(&mut bytes, 32, &seconds.to_le_bytes());
        put(&mut bytes, 40, &nanoseconds.to_le_bytes());
    }
    bytes
}

/// A complete undo file.
pub(crate) struct UndoFile {
    /// Its name in its folder.
    pub(crate) name: String,
    pub(crate) head: Head,
    storage: Arc<dyn Storage>,
}

fn damaged(name: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "read undo file: it is not one, or it is damaged").at_path(name)
}

fn reading(source: io::Error) -> Error {
    Error::io(ErrorKind::Read, "read undo file", source)
}

impl UndoFile {
    /// Opens one; every byte of it is checked.
    pub(crate) fn open(storage: Arc<dyn Storage>, name: &str) -> Result<Self> {
        let mut bytes = [0; 512];
        storage.read_padded_at(0, &mut bytes).map_err(reading)?;
        let head = Head::decode(&bytes).ok_or_else(|| damaged(name))?;
        let len = storage.len().map_err(reading)?;
        if head.body_bytes.checked_add(BODY_AT).is_none_or(|end| end > len)
            || head.cluster_bytes == 0
            || !head.area_end.is_multiple_of(SECTOR_BYTES)
        {
            return Err(damaged(name));
        }
        let file = Self { name: name.to_owned(), head, storage };
        let mut digest = Md5::new();
        file.for_each_piece(&mut |piece| {
            digest.update(piece);
            Ok(())
        })?;
        if <[u8; 16]>::from(digest.finalize()) != file.head.body {
            return Err(damaged(name));
        }
        file.state()?;
        Ok(file)
    }

    /// The undo file of a repair of `image` that was cut, if there is one.
    pub(crate) fn find_unfinished_repair(folder: &dyn Folder, image: &str) -> Result<Option<Self>> {
        for name in names(image) {
            let looking = |source| Error::io(ErrorKind::Open, "look for an undo file", source).at_path(&name);
            if !folder.exists(&name).map_err(looking)? {
                return Ok(None);
            }
            let storage = folder.open(&name, Access::ReadWrite).map_err(looking)?;
            // A file that only has such a name is not ours to judge.
            if let Ok(file) = Self::open(storage, &name)
                && matches!(file.state()?.0, State::Planned | State::Copied)
            {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    fn for_each_piece(&self, visit: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; PIECE_BYTES];
        let mut at = 0;
        while at < self.head.body_bytes {
            let len = usize::try_from(self.head.body_bytes - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            self.storage.read_exact_at(BODY_AT + at, &mut buffer[..len]).map_err(reading)?;
            visit(&buffer[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    /// Calls `visit` for each record, in order.
    pub(crate) fn for_each(&self, visit: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
        let mut rest: Vec<u8> = Vec::new();
        self.for_each_piece(&mut |piece| {
            rest.extend(piece);
            let mut at = 0;
            while let Some(header) = rest.get(at..at + 8) {
                let tag = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
                let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
                if len > RECORD_BYTES_MAX {
                    return Err(damaged(&self.name));
                }
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let Some(data) = rest.get(at + 8..at + 8 + len) else { break };
                visit(Record::decode(tag, data).ok_or_else(|| damaged(&self.name))?)?;
                at += 8 + len;
            }
            rest.drain(..at);
            Ok(())
        })?;
        if rest.is_empty() { Ok(()) } else { Err(damaged(&self.name)) }
    }

    /// How far the repair has come, and when the image was last changed then.
    pub(crate) fn state(&self) -> Result<(State, Option<Stamp>)> {
        let mut bytes = [0; 512];
        self.storage.read_exact_at(STATE_AT, &mut bytes).map_err(reading)?;
        let number = usize::try_from(u64_at(&bytes, 16)).unwrap_or(usize::MAX);
        let state = State::ALL.get(number).copied().filter(|_| bytes[..16] == MAGIC);
        let signed = |at: usize| i64::from_le_bytes(u64_at(&bytes, at).to_le_bytes());
        let stamp = (u64_at(&bytes, 24) == 1).then(|| (signed(32), signed(40)));
        state.map(|state| (state, stamp)).ok_or_else(|| damaged(&self.name))
    }

    /// Notes, durably, how far it has come.
    pub(crate) fn set_state(&self, state: State, stamp: Option<Stamp>) -> Result<()> {
        let failed = |kind| move |source| Error::io(kind, "write the undo file", source);
        self.storage.write_all_at(STATE_AT, &encode_state(state, stamp)).map_err(failed(ErrorKind::Write))?;
        self.storage.sync_data().map_err(failed(ErrorKind::Sync))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::SimDisk;

    fn written() -> (SimDisk, UndoFile, Vec<Record>) {
        let world = SimDisk::new(1);
        let folder = world.folder();
        let mut writer = Writer::create(&folder, "image").unwrap();
        let records = vec![
            Record::Copy { from: 1, to: 2 },
            Record::Sector { offset: 512, old: Box::new([1; 512]), new: Box::new([2; 512]) },
            Record::Tail { offset: 9, bytes: vec![7; 100] },
        ];
        for record in &records {
            writer.push(record).unwrap();
        }
        let file = writer.finish("image", head((5, 6), 4096, 1024, [3; 16])).unwrap();
        (world, file, records)
    }

    #[test]
    fn what_is_written_is_read() {
        let (world, file, records) = written();
        assert_eq!(file.name, "image.undo");
        file.set_state(State::Copied, Some((-1, 5))).unwrap();
        let file = UndoFile::find_unfinished_repair(&world.folder(), "image").unwrap().unwrap();
        assert_eq!(file.state().unwrap(), (State::Copied, Some((-1, 5))));
        assert_eq!((file.head.old_bytes, file.head.new_bytes, file.head.sectors), (5, 6, 1));
        let mut read = Vec::new();
        file.for_each(&mut |record| {
            read.push(record);
            Ok(())
        })
        .unwrap();
        assert_eq!(read, records);
        file.set_state(State::Done, None).unwrap();
        assert!(UndoFile::find_unfinished_repair(&world.folder(), "image").unwrap().is_none());
    }

    #[test]
    fn every_flipped_byte_is_seen() {
        let (world, file, _) = written();
        let storage = world.open("image.undo", Access::ReadWrite).unwrap();
        let len = storage.len().unwrap();
        for at in (0..112).chain(BODY_AT..len) {
            let mut byte = [0];
            storage.read_exact_at(at, &mut byte).unwrap();
            storage.write_all_at(at, &[byte[0] ^ 0x40]).unwrap();
            assert!(UndoFile::open(Arc::new(storage.clone()), "x").is_err(), "byte {at}");
            storage.write_all_at(at, &byte).unwrap();
        }
        storage.set_len(len - 1).unwrap();
        assert!(UndoFile::open(Arc::new(storage), "x").is_err());
        drop(file);
    }
}
