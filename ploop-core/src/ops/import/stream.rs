//! An image from a stream, whose length nobody knows before its end.
//!
//! Files that only this needs are unlinked while they are open, or removed after an error.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::geometry::{ENTRY_BYTES, Geometry, V1_DISK_SECTORS_MAX, Version, cylinders_and_heads};
use crate::format::header::HEADER_BYTES;
use crate::format::{Chain, ChainOptions, Mode, RawHeader, Source};
use crate::io::{Access, BufferPool, Folder, Storage, StorageExt};
use crate::ops::convert::{fill_new, verify_new};
use crate::ops::placing::remove;
use crate::ops::transfer::{
    self, ChainContent, Content, Layout, Piece, Pipeline, Presence, RawTarget, StorageContent, Target,
};
use crate::units::Sectors;

use super::{ImportOptions, Made, extent_of, geometry, read_full, refused};

/// Builds the image of a stream in `storage`, which is empty.
pub(super) fn build(
    images: &dyn Folder,
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    source: &mut dyn Read,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let mut source = Stream { source, read_bytes: 0, ended: false };
    if options.disk.is_some() {
        return of_known_size(options, storage, &mut source, pipeline);
    }
    match options.mode {
        Mode::Raw => raw(options, storage, &mut source, pipeline),
        Mode::Preallocated => {
            Err(refused("how much to preallocate is not known").advise("give the size of the disk with -s"))
        }
        Mode::Expanded => expanded(images, options, storage, &mut source, pipeline),
    }
}

/// The input, and how far it was read.
struct Stream<'a> {
    source: &'a mut dyn Read,
    read_bytes: u64,
    ended: bool,
}

impl Stream<'_> {
    /// Stores what comes, up to guest byte `end`, in a target whose byte 0 is guest byte `base`.
    fn store(
        &mut self,
        target: &dyn Target,
        storage: &dyn Storage,
        base: u64,
        end: u64,
        pipeline: &Pipeline<'_>,
    ) -> Result<()> {
        let piece = transfer::piece_bytes_for(target.unit_bytes(), end.saturating_sub(base));
        let threads = transfer::threads(storage, piece);
        let pool = BufferPool::new(usize::try_from(piece).unwrap_or(usize::MAX), threads + 1);
        let next = || {
            while !self.ended && self.read_bytes < end {
                let mut bytes = pool
                    .take()
                    .map_err(|cause| Error::io(ErrorKind::Memory, "take memory for a piece", cause))?;
                let at = self.read_bytes;
                let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(bytes.len());
                let len = read_full(self.source, &mut bytes.as_mut_slice()[..wanted])?;
                self.ended = len < wanted;
                self.read_bytes = extent_of(at, len)?.end();
                bytes.as_mut_slice()[len..].fill(0);
                if !bytes.is_zero() {
                    return Ok(Some(Piece { extent: extent_of(at - base, len)?, bytes: Some(bytes) }));
                }
            }
            Ok(None)
        };
        let store = |piece: &Piece, bytes: &mut [u8]| {
            target.put(piece.extent.start(), bytes, &|_| Presence::Alone, pipeline.read_back)
        };
        pipeline.fill(target, (piece, threads), next, store)
    }

    /// Whether nothing more comes; asks for one byte and keeps it for nobody: it is an error then.
    fn require_end(&mut self) -> Result<()> {
        if !self.ended && read_full(self.source, &mut [0])? > 0 {
            return Err(refused(format!("the input is longer than the disk of {} bytes", self.read_bytes))
                .advise("give a larger size, or none"));
        }
        Ok(())
    }
}

fn of_known_size(
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    source: &mut Stream<'_>,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let geometry = geometry(options, 0)?;
    let asked = options.disk.and_then(Sectors::checked_bytes).unwrap_or(0);
    let preallocated = options.mode == Mode::Preallocated;
    pipeline.progress.begin("import", pipeline.total_bytes(asked));
    let ((), layout) =
        fill_new(storage, Path::new(&options.file), &geometry, preallocated, |target, storage| {
            source.store(target, storage, 0, asked, pipeline)?;
            source.require_end()
        })?;
    pipeline.progress.end();
    finish(options, storage, geometry, source.read_bytes, layout)
}

fn raw(
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    source: &mut Stream<'_>,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    pipeline.progress.begin("import", 0);
    let unlimited = RawTarget::new(Arc::clone(storage), i64::MAX.unsigned_abs());
    source.store(&unlimited, &**storage, 0, i64::MAX.unsigned_abs(), pipeline)?;
    let geometry = geometry(options, source.read_bytes)?;
    unlimited.finish_at(geometry.disk_bytes())?;
    pipeline.progress.end();
    finish(options, storage, geometry, source.read_bytes, Layout::RAW)
}

/// The largest disk whose table, with the header, fits one cluster.
fn capacity(options: &ImportOptions) -> Result<Geometry> {
    let cluster_bytes = options.cluster.checked_bytes().unwrap_or(0);
    let entries = cluster_bytes.saturating_sub(HEADER_BYTES) / ENTRY_BYTES;
    let mut clusters = entries.max(1);
    if options.version == Version::V1 {
        // The last clusters must lie where a table of version 1 can point.
        clusters = clusters.min((V1_DISK_SECTORS_MAX / options.cluster.0).saturating_sub(2)).max(1);
    }
    Geometry::new(options.version, options.cluster, Sectors(clusters.saturating_mul(options.cluster.0)))
}

fn expanded(
    images: &dyn Folder,
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    source: &mut Stream<'_>,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let room = capacity(options)?;
    let name = Path::new(&options.file);
    pipeline.progress.begin("import", 0);
    let ((), layout) = fill_new(storage, name, &room, false, |target, storage| {
        source.store(target, storage, 0, room.disk_bytes(), pipeline)
    })?;
    let mut byte = [0];
    let more = if source.ended { 0 } else { read_full(source.source, &mut byte)? };
    if more > 0 {
        return longer(images, options, storage, &room, byte, source, pipeline);
    }
    pipeline.progress.end();
    let geometry = geometry(options, source.read_bytes)?;
    set_size(&**storage, &room, &geometry)?;
    finish(options, storage, geometry, source.read_bytes, layout)
}

fn finish(
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    geometry: Geometry,
    input_bytes: u64,
    layout: Layout,
) -> Result<Made> {
    verify_new(storage, Path::new(&options.file), &geometry, layout)?;
    Made::new(storage, geometry, input_bytes)
}

/// Gives the closed image in `storage` the size of `geometry`, which is smaller and has its data at the same place. No
/// entry past its end is in use.
fn set_size(storage: &dyn Storage, room: &Geometry, geometry: &Geometry) -> Result<()> {
    if room.data_start() != geometry.data_start() {
        return Err(Error::new(ErrorKind::System, "import: the table has another length than expected"));
    }
    let mut bytes = [0; 64];
    storage
        .read_exact_at(0, &mut bytes)
        .map_err(|cause| Error::io(ErrorKind::Read, "import: read the header", cause))?;
    let (cylinders, heads) = cylinders_and_heads(geometry.disk_sectors().0);
    let header = RawHeader {
        entries: geometry.entries(),
        disk_sectors: geometry.disk_sectors().0,
        cylinders,
        heads,
        ..RawHeader::decode(&bytes)
    };
    storage
        .write_all_at(0, &header.encode())
        .map_err(|cause| Error::io(ErrorKind::Write, "import: write the header", cause))?;
    storage.sync_data().map_err(|cause| Error::io(ErrorKind::Sync, "import: sync the image", cause))
}

/// A stream that is longer than a table of one cluster covers: what is in `storage` so far, and what comes, are put
/// together in an image of the right size, which takes the place of the first.
fn longer(
    images: &dyn Folder,
    options: &ImportOptions,
    storage: &Arc<dyn Storage>,
    room: &Geometry,
    first: [u8; 1],
    source: &mut Stream<'_>,
    pipeline: &Pipeline<'_>,
) -> Result<Made> {
    let name = Path::new(&options.file);
    let mut chained = first.chain(&mut *source.source);
    let mut rest = Stream { source: &mut chained, read_bytes: source.read_bytes, ended: false };
    let base = room.disk_bytes();
    let created = |cause| Error::io(ErrorKind::Create, "import: create a file for what is longer", cause);
    let spare = format!("{}.whole", options.file);
    let tail = images.create_exclusive(&spare).map_err(created)?;
    // It lives as long as it is open.
    images.unlink(&spare).map_err(created).map_err(|error| remove(images, &spare, error))?;
    let unlimited = RawTarget::new(Arc::clone(&tail), i64::MAX.unsigned_abs());
    // Compared as part of the whole.
    let unread = Pipeline { progress: pipeline.progress, read_back: false };
    rest.store(&unlimited, &*tail, base, i64::MAX.unsigned_abs(), &unread)?;
    let read_bytes = rest.read_bytes;
    let geometry = geometry(options, read_bytes)?;
    unlimited.finish_at(read_bytes - base)?;
    let opened = Source { name: name.to_path_buf(), storage: Arc::clone(storage), raw: false };
    let reading = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
    let chain = Chain::open(vec![opened], &reading)?;
    let both =
        Both { head: ChainContent::whole(chain), tail: StorageContent::new(&*tail, read_bytes - base), base };
    let whole_name = format!("{}.whole", options.file);
    let whole = images.create_exclusive(&whole_name).map_err(created)?;
    let made = fill_new(&whole, name, &geometry, false, |target, storage| {
        let threads = transfer::threads(storage, transfer::piece_bytes(target.unit_bytes()));
        transfer::copy(&both, target, read_bytes, threads, pipeline)
    })
    .and_then(|((), layout)| {
        pipeline.progress.end();
        finish(options, &whole, geometry, read_bytes, layout)
    })
    .and_then(|made| {
        images.rename(&whole_name, &options.file).map_err(|cause| {
            Error::io(ErrorKind::Rename, "import: put the longer image in place of the first", cause)
        })?;
        Ok(made)
    });
    made.map_err(|error| remove(images, &whole_name, error))
}

/// Two contents, one behind the other.
struct Both<'a> {
    head: ChainContent,
    tail: StorageContent<'a>,
    base: u64,
}

impl Content for Both<'_> {
    fn next_data(&self, from: u64, end: u64) -> Result<Option<u64>> {
        if from < self.base
            && let Some(found) = self.head.next_data(from, end.min(self.base))?
        {
            return Ok(Some(found));
        }
        let Some(end) = end.checked_sub(self.base) else { return Ok(None) };
        let found = self.tail.next_data(from.saturating_sub(self.base), end)?;
        Ok(found.map(|found| found + self.base))
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        let in_head = usize::try_from(self.base.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
        let (head, tail) = buffer.split_at_mut(in_head);
        if !head.is_empty() {
            self.head.read(at, head)?;
        }
        if tail.is_empty() { Ok(()) } else { self.tail.read((at + in_head as u64) - self.base, tail) }
    }

    fn presence(&self, _unit: Extent) -> Presence {
        Presence::Alone
    }
}
