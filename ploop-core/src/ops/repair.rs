//! A damaged image put right, by the rules of the crash model (section 3): no readable sector becomes unreadable, what
//! two clusters share is copied so that both keep it, and running it again finds nothing.
//!
//! ```text
//!   1 undo file    every byte that will change, and every copy to be made: complete, durable      only if bytes of the
//!   2 mark         in use, so that nobody takes the image for closed                               table change
//!   3 copies       into places that nobody names, whole; durable; noted in the undo file
//!   4 table        durable
//!   5 length       cut or extended to the last cluster in use, durable
//!   6 header       closed, with the extension if it is still true: the last write, durable
//! ```
//!
//! Cut between any two of these, the image reads as before: entries are at the old place, whose bytes nobody has
//! touched, or at the new one, which is complete. Running the repair again finishes what the undo file says, or begins
//! anew when the image has changed meanwhile. Copies go behind every cluster in use, never into free places inside
//! the file: those may hold the only trace of what was lost.

use md5::{Digest, Md5};
use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::RawHeader;
use crate::format::alloc::ClusterSet;
use crate::format::header::{FLAG_EMPTY, InUse};
use crate::format::survey::{entries_in, for_each_piece, padding_end};
use crate::io::buffer::is_zero;
use crate::io::{Folder, Storage, StorageExt, stamp};
use crate::mutant::{self, Mutant};
use crate::ops::Progress;
use crate::ops::check::image::{EntryFate, Examined, ExtensionFate, Plan, fate};
use crate::units::FileCluster;

use undo_file::{Record, SectorBytes, State, UndoFile, Writer};

pub(crate) mod undo_file;

const SECTOR: usize = 512;
/// Clusters are copied in pieces of this many bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// The undo file beside the image; none where nothing was changed that a reader could miss.
    pub undo_file: Option<String>,
    /// An earlier repair that was cut has been finished.
    pub resumed: bool,
    /// Clusters that were copied to a place of their own.
    pub copied_clusters: u64,
    /// Entries that were cleared.
    pub cleared_entries: u64,
    /// Length of the file before.
    pub file_bytes_before: u64,
    /// Length of the file after.
    pub file_bytes: u64,
}

/// What taking a repair back did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UndoReport {
    /// Sectors of header and table that have their old content.
    pub restored_sectors: u64,
    /// Length of the file, as before the repair.
    pub file_bytes: u64,
}

fn failed(kind: ErrorKind, operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| {
        Error::io(kind, operation, source)
            .advise("look at the host's storage, then run the same command again")
    }
}

fn sync(image: &dyn Storage, operation: &'static str) -> Result<()> {
    image.sync_data().map_err(failed(ErrorKind::Sync, operation))
}

/// Repairs the image `name` of `folder`, open for writing as `image`, as `examined` says. The caller holds the image's
/// lock, and has found that everything wrong may be repaired.
pub(crate) fn repair(
    folder: &dyn Folder,
    name: &str,
    image: &dyn Storage,
    examined: &Examined,
    progress: &dyn Progress,
) -> Result<RepairReport> {
    let Some(plan) = &examined.plan else {
        return Err(Error::new(ErrorKind::Corrupt, "repair: the header makes no sense"));
    };
    if let Some(why) = &plan.forbidden {
        return Err(Error::new(ErrorKind::Parameter, format!("repair: {why}"))
            .advise("repair it with the program that wrote that feature"));
    }
    let mut report = RepairReport {
        copied_clusters: plan.copies,
        cleared_entries: plan.clears,
        file_bytes_before: examined.file_bytes,
        ..RepairReport::default()
    };
    if plan.needs_undo(&examined.stored) {
        progress.begin("write the undo file", plan.header.geometry().table_bytes());
        let undo = write_undo(folder, name, image, examined, plan, progress)?;
        progress.end();
        report.undo_file = Some(undo.name.clone());
        report.file_bytes = undo.head.new_bytes;
        carry_out(image, &undo, progress)?;
        return Ok(report);
    }
    report.file_bytes = plan.end;
    let mut sector = first_sector(image)?;
    mark_open(image, &mut sector)?;
    set_len(image, plan.end)?;
    sector[..64].copy_from_slice(&plan.final_header().encode());
    write_first(image, &sector)?;
    Ok(report)
}

/// Finishes a repair that was cut; `None` if there is none, or the image has changed since.
pub(crate) fn resume(
    folder: &dyn Folder,
    name: &str,
    image: &dyn Storage,
    progress: &dyn Progress,
) -> Result<Option<RepairReport>> {
    let Some(undo) = UndoFile::find_unfinished_repair(folder, name)? else { return Ok(None) };
    let old_table = undo.state()?.0 == State::Planned;
    if !is_as_left(image, &undo, old_table)? {
        return Ok(None);
    }
    let mut report = RepairReport {
        undo_file: Some(undo.name.clone()),
        resumed: true,
        file_bytes_before: undo.head.old_bytes,
        file_bytes: undo.head.new_bytes,
        ..RepairReport::default()
    };
    undo.for_each(&mut |record| {
        report.copied_clusters += u64::from(matches!(record, Record::Copy { .. }));
        Ok(())
    })?;
    carry_out(image, &undo, progress)?;
    Ok(Some(report))
}

/// The first sector of the file, zeros past its end.
fn first_sector(image: &dyn Storage) -> Result<SectorBytes> {
    let mut sector = [0; SECTOR];
    image.read_padded_at(0, &mut sector).map_err(failed(ErrorKind::Read, "repair: read the header"))?;
    Ok(sector)
}

fn header_of(sector: &SectorBytes) -> RawHeader {
    let mut bytes = [0; 64];
    bytes.copy_from_slice(&sector[..64]);
    RawHeader::decode(&bytes)
}

/// The sector as it is while the image is in use: marked, without an extension that could be believed.
fn in_use(mut sector: SectorBytes) -> SectorBytes {
    let mut header = header_of(&sector);
    header.in_use = InUse::Open.encode();
    header.extension_sectors = 0;
    // A repaired table must not be taken for a half converted one.
    header.flags &= FLAG_EMPTY;
    sector[..64].copy_from_slice(&header.encode());
    sector
}

fn write_first(image: &dyn Storage, sector: &SectorBytes) -> Result<()> {
    image.write_all_at(0, sector).map_err(failed(ErrorKind::Write, "repair: write the header"))?;
    sync(image, "repair: sync the header")
}

fn mark_open(image: &dyn Storage, sector: &mut SectorBytes) -> Result<()> {
    let marked = in_use(*sector);
    if marked != *sector {
        *sector = marked;
        write_first(image, sector)?;
    }
    Ok(())
}

fn set_len(image: &dyn Storage, len: u64) -> Result<()> {
    let now = image.len().map_err(failed(ErrorKind::Stat, "repair: read the file's length"))?;
    if now != len {
        image.set_len(len).map_err(failed(ErrorKind::Truncate, "repair: set the length of the file"))?;
    }
    sync(image, "repair: sync the length of the file")
}

/// The digest of those sectors of header and table that are not zero and not among `changed`.
struct Rest {
    digest: Md5,
}

impl Rest {
    fn new() -> Self {
        Self { digest: Md5::new() }
    }

    fn add(&mut self, offset: u64, sector: &[u8]) {
        if !is_zero(sector) {
            self.digest.update(offset.to_le_bytes());
            self.digest.update(sector);
        }
    }

    fn finish(self) -> [u8; 16] {
        self.digest.finalize().into()
    }
}

/// Plans the repair entry by entry and writes it down; the image is only read.
fn write_undo(
    folder: &dyn Folder,
    name: &str,
    image: &dyn Storage,
    examined: &Examined,
    plan: &Plan,
    progress: &dyn Progress,
) -> Result<UndoFile> {
    let geometry = plan.header.geometry();
    let mut writer = Writer::create(folder, name)?;
    let planned = (|| {
        let mut rest = Rest::new();
        let mut seen = ClusterSet::default();
        let mut fresh = plan.fresh;
        let table_bytes = geometry.table_bytes();
        for_each_piece(image, padding_end(geometry), &mut |at, old| {
            let mut new = old.to_vec();
            for (place, cluster, raw) in entries_in(at, old, geometry.entries()) {
                let entry = match fate(geometry, examined.file_bytes, cluster, raw, &mut seen) {
                    EntryFate::Keep => continue,
                    EntryFate::Clear => 0,
                    EntryFate::Copy(from) => {
                        let place = FileCluster(fresh);
                        fresh = fresh.checked_add(1).ok_or_else(no_place)?;
                        let entry = geometry.cluster_to_entry(place)?;
                        writer.push(&Record::Copy { from, to: geometry.file_offset(place).0 })?;
                        entry
                    }
                };
                new[place..place + 4].copy_from_slice(&entry.to_le_bytes());
            }
            let behind = usize::try_from(table_bytes.saturating_sub(at)).unwrap_or(usize::MAX);
            if let Some(padding) = new.get_mut(behind..) {
                padding.fill(0);
            }
            if at == 0 {
                new[..64].copy_from_slice(&plan.final_header().encode());
            }
            for (index, (old, new)) in old.as_chunks().0.iter().zip(new.as_chunks().0).enumerate() {
                let offset = at + (index * SECTOR) as u64;
                // The first sector carries the header, which always changes.
                if old != new || offset == 0 {
                    writer.push(&Record::Sector { offset, old: Box::new(*old), new: Box::new(*new) })?;
                } else {
                    rest.add(offset, old);
                }
            }
            progress.advance(old.len() as u64)
        })?;
        let new_bytes = match fresh.checked_sub(1) {
            Some(last) if fresh > plan.fresh => geometry.file_end(FileCluster(last)).0.max(plan.end),
            _ => plan.end,
        };
        push_extension(image, plan, &mut writer)?;
        push_tail(
            image,
            plan.end.min(geometry.file_offset(FileCluster(plan.fresh)).0),
            examined,
            &mut writer,
        )?;
        let lengths = (examined.file_bytes, new_bytes);
        Ok(undo_file::head(lengths, geometry.cluster_bytes(), padding_end(geometry), rest.finish()))
    })();
    match planned {
        Ok(head) => writer.finish(name, head),
        Err(error) => Err(writer.withdraw(error)),
    }
}

fn no_place() -> Error {
    Error::new(ErrorKind::Allocate, "repair: the table cannot point to more clusters")
        .advise("nothing was changed; copy the disk to a new image in salvage mode")
}

/// The extension cluster, if its records change.
fn push_extension(image: &dyn Storage, plan: &Plan, writer: &mut Writer<'_>) -> Result<()> {
    let ExtensionFate::Keep { offset, rewritten: Some(bytes) } = &plan.extension else { return Ok(()) };
    let mut old = [0; SECTOR];
    for (at, new) in (*offset..).step_by(SECTOR).zip(bytes.as_chunks::<SECTOR>().0) {
        image
            .read_padded_at(at, &mut old)
            .map_err(failed(ErrorKind::Read, "repair: read the format extension"))?;
        if old != *new {
            writer.push(&Record::Sector { offset: at, old: Box::new(old), new: Box::new(*new) })?;
        }
    }
    Ok(())
}

/// What is behind the last cluster in use and not zero: it is cut off or overwritten.
fn push_tail(image: &dyn Storage, from: u64, examined: &Examined, writer: &mut Writer<'_>) -> Result<()> {
    let reading = failed(ErrorKind::Read, "repair: read the tail of the file");
    let mut at = from;
    let mut piece = vec![0; usize::try_from(PIECE_BYTES).unwrap_or(SECTOR)];
    while at < examined.file_bytes {
        let Some((start, end)) = image.next_data(at).map_err(&reading)? else { break };
        at = at.max(start);
        let len = usize::try_from(end.min(examined.file_bytes).saturating_sub(at))
            .unwrap_or(piece.len())
            .min(piece.len());
        if len == 0 {
            break;
        }
        image.read_exact_at(at, &mut piece[..len]).map_err(&reading)?;
        if !is_zero(&piece[..len]) {
            writer.push(&Record::Tail { offset: at, bytes: piece[..len].to_vec() })?;
        }
        at += len as u64;
    }
    Ok(())
}

/// Does what the undo file says. Everything here may be done again.
fn carry_out(image: &dyn Storage, undo: &UndoFile, progress: &dyn Progress) -> Result<()> {
    let head = &undo.head;
    let (state, _) = undo.state()?;
    let mut sector = first_sector(image)?;
    mark_open(image, &mut sector)?;
    let early = mutant::is_active(Mutant::RepairNotRepeatable);
    if state == State::Planned && !early {
        copy_all(image, undo, progress)?;
        sync(image, "repair: sync the copies")?;
        undo.set_state(State::Copied, None)?;
    }
    let writing = failed(ErrorKind::Write, "repair: write the table");
    let mut last = None;
    undo.for_each(&mut |record| {
        if let Record::Sector { offset, new, .. } = record {
            let bytes = if offset == 0 { in_use(*last.insert(*new)) } else { *new };
            image.write_all_at(offset, &bytes).map_err(&writing)?;
        }
        Ok(())
    })?;
    if early {
        undo.set_state(State::Copied, None)?;
        copy_all(image, undo, progress)?;
    }
    sync(image, "repair: sync the table")?;
    set_len(image, head.new_bytes)?;
    if let Some(last) = last {
        write_first(image, &last)?;
    }
    let changed = stamp::last_change(image).map_err(failed(ErrorKind::Stat, "repair: examine the image"))?;
    undo.set_state(State::Done, changed)
}

fn copy_all(image: &dyn Storage, undo: &UndoFile, progress: &dyn Progress) -> Result<()> {
    progress.begin("copy clusters", 0);
    undo.for_each(&mut |record| match record {
        Record::Copy { from, to } => {
            copy_cluster(image, from, to, &undo.head)?;
            progress.advance(undo.head.cluster_bytes)
        }
        _ => Ok(()),
    })?;
    progress.end();
    Ok(())
}

/// Writes the whole cluster at `to`: what there was of the one at `from` when the repair was planned, zeros for the
/// rest.
fn copy_cluster(image: &dyn Storage, from: u64, to: u64, head: &undo_file::Head) -> Result<()> {
    let reading = failed(ErrorKind::Read, "repair: read a cluster");
    let mut done = 0;
    while done < head.cluster_bytes {
        let len = PIECE_BYTES.min(head.cluster_bytes - done);
        let piece = read_old(image, from + done, len, head.old_bytes).map_err(&reading)?;
        // Past the old end there are zeros already.
        if !is_zero(&piece) || to + done < head.old_bytes {
            image
                .write_all_at(to + done, &piece)
                .map_err(failed(ErrorKind::Write, "repair: copy a cluster"))?;
        }
        done += len;
    }
    Ok(())
}

/// `len` bytes at `offset`, with zeros for what lies past `end`.
fn read_old(image: &dyn Storage, offset: u64, len: u64, end: u64) -> std::io::Result<Vec<u8>> {
    let mut piece = vec![0; usize::try_from(len).unwrap_or(0)];
    let there = usize::try_from(end.saturating_sub(offset).min(len)).unwrap_or(0);
    image.read_padded_at(offset, &mut piece[..there])?;
    Ok(piece)
}

/// The header's fields that change while an image is repaired do not count in comparisons.
fn without_mark(mut sector: SectorBytes) -> SectorBytes {
    sector[44..48].fill(0);
    sector[52..64].fill(0);
    sector
}

/// Whether the image is what the repair left, cut anywhere: sectors it changes are old or new (only old while no entry
/// may point to a copy), all others of header and table are the same, and the file has not grown.
fn is_as_left(image: &dyn Storage, undo: &UndoFile, only_old: bool) -> Result<bool> {
    let reading = failed(ErrorKind::Read, "compare the image with the undo file");
    let len = image.len().map_err(&reading)?;
    if len > undo.head.new_bytes.max(undo.head.old_bytes) {
        return Ok(false);
    }
    let mut changed = Vec::new();
    let mut fits = true;
    undo.for_each(&mut |record| {
        let Record::Sector { offset, mut old, mut new } = record else { return Ok(()) };
        if !fits {
            return Ok(());
        }
        let mut now = [0; SECTOR];
        image.read_padded_at(offset, &mut now).map_err(&reading)?;
        if offset == 0 {
            (now, *old, *new) = (without_mark(now), without_mark(*old), without_mark(*new));
        }
        fits = now == *old || (now == *new && !only_old);
        changed.push(offset);
        Ok(())
    })?;
    if !fits {
        return Ok(false);
    }
    let mut rest = Rest::new();
    for_each_piece(image, undo.head.area_end, &mut |at, piece| {
        for (index, sector) in piece.as_chunks::<SECTOR>().0.iter().enumerate() {
            let offset = at + (index * SECTOR) as u64;
            if changed.binary_search(&offset).is_err() {
                rest.add(offset, sector);
            }
        }
        Ok(())
    })?;
    Ok(rest.finish() == undo.head.rest)
}

/// Brings an image back to what it was before the repair that wrote `undo`. Refuses ([`ErrorKind::Parameter`]) if
/// anything else has written to the image since. Cut anywhere, it can be run again.
pub(crate) fn undo(image: &dyn Storage, undo: &UndoFile) -> Result<UndoReport> {
    let (state, stamp_then) = undo.state()?;
    let refuse = |why: &str| {
        Err(Error::new(ErrorKind::Parameter, format!("undo the repair: {why}"))
            .advise("nothing was changed; this undo file is of no use for this image any more"))
    };
    let reading = failed(ErrorKind::Read, "compare the image with the undo file");
    let changed = stamp::last_change(image).map_err(&reading)?;
    if state == State::Done && stamp_then.is_some() && changed.is_some() && stamp_then != changed {
        return refuse("the image has been written since");
    }
    if !is_as_left(image, undo, false)? {
        return refuse("this is not the image as the repair left it");
    }
    if matches!(state, State::Copied | State::Done) && !copies_are_untouched(image, undo)? {
        return refuse("a copied cluster has been written since");
    }
    undo.set_state(State::Undoing, None)?;
    let mut sector = first_sector(image)?;
    mark_open(image, &mut sector)?;
    let writing = failed(ErrorKind::Write, "undo the repair: write what was there before");
    let (mut last, mut restored_sectors) = (None, 0);
    undo.for_each(&mut |record| {
        if let Record::Sector { offset, old, .. } = record {
            let bytes = if offset == 0 { in_use(*last.insert(*old)) } else { *old };
            image.write_all_at(offset, &bytes).map_err(&writing)?;
            restored_sectors += 1;
        }
        Ok(())
    })?;
    sync(image, "undo the repair: sync the table")?;
    // Copies are no longer named: what was in their place comes back.
    let end = undo.head.old_bytes;
    set_len(image, end)?;
    clear_copies(image, undo)?;
    undo.for_each(&mut |record| match record {
        Record::Tail { offset, bytes } => image.write_all_at(offset, &bytes).map_err(&writing),
        _ => Ok(()),
    })?;
    sync(image, "undo the repair: sync what was cut off")?;
    if let Some(last) = last {
        write_first(image, &last)?;
        // A file cut inside its first sector.
        set_len(image, end)?;
    }
    undo.set_state(State::Undone, None)?;
    Ok(UndoReport { restored_sectors, file_bytes: end })
}

/// Whether each copy still holds what was copied, so that nobody has written to either.
fn copies_are_untouched(image: &dyn Storage, undo: &UndoFile) -> Result<bool> {
    let reading = failed(ErrorKind::Read, "compare the image with the undo file");
    let mut same = true;
    undo.for_each(&mut |record| {
        let Record::Copy { from, to } = record else { return Ok(()) };
        let mut done = 0;
        while same && done < undo.head.cluster_bytes {
            let len = PIECE_BYTES.min(undo.head.cluster_bytes - done);
            let old = read_old(image, from + done, len, undo.head.old_bytes).map_err(&reading)?;
            same = old == read_old(image, to + done, len, u64::MAX).map_err(&reading)?;
            done += len;
        }
        Ok(())
    })?;
    Ok(same)
}

/// Zeros where copies went inside the old file; what was not zero there is among the records.
fn clear_copies(image: &dyn Storage, undo: &UndoFile) -> Result<()> {
    undo.for_each(&mut |record| {
        let Record::Copy { to, .. } = record else { return Ok(()) };
        let mut at = to;
        let end = to.saturating_add(undo.head.cluster_bytes).min(undo.head.old_bytes);
        while at < end {
            let len = PIECE_BYTES.min(end - at);
            image
                .write_all_at(at, &vec![0; usize::try_from(len).unwrap_or(0)])
                .map_err(failed(ErrorKind::Write, "undo the repair: write what was there before"))?;
            at += len;
        }
        Ok(())
    })
}
