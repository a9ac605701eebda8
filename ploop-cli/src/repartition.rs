//! The partition table of a disk that has another size: GPT's second copy at the new end, the last partition up to it.
//!
//! The new table is computed in memory over the old one. Of a GPT, what lies at the end of the disk is written and synced
//! first, then what lies at its start: at every moment one of the two copies is whole. Of a DOS table, the extended
//! partition grows before and shrinks after what is in it. Each state describes a partition whose file system fits it (a
//! file system grows after its partition, and shrinks before it). Boot code, other entries and their names stay.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use ploop_core::device::runtime::PartitionRange;
use ploop_core::ops::dos_table;
use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Result};

use crate::disk_bytes::{DiskBytes, ShownDisk};
use crate::partition::{ALIGNMENT_BYTES_MIN, TAIL_SECTORS};
use crate::partition_table::{self, Scheme, Table};

/// Bytes in a sector, as a length in memory.
const SECTOR: usize = 512;
/// The most entries of a GPT: eight times as many as is usual.
const ENTRIES_MAX: u32 = 1024;
/// Bytes of an entry, and where in it the last sector stands.
const ENTRY_BYTES: usize = 128;
const LAST_AT: usize = 40;
/// The least length of a GPT's header.
const HEADER_BYTES: usize = 92;
/// The checksum of a GPT.
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
/// The most sectors that a DOS table can name.
const DOS_SECTORS_MAX: u64 = u32::MAX as u64;

/// A disk of which only a copy of what is written changes.
pub(crate) struct Overlay<'a> {
    disk: &'a dyn DiskBytes,
    len: u64,
    position: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

impl std::fmt::Debug for Overlay<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Overlay").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Overlay<'_> {
    fn sector(&self, number: u64) -> io::Result<[u8; SECTOR]> {
        if let Some(sector) = self.sectors.get(&number) {
            return Ok(*sector);
        }
        let mut bytes = [0; SECTOR];
        // A disk that is about to grow has zeros there.
        if number < self.disk.disk_bytes() / SECTOR_BYTES {
            self.disk.read_at(number * SECTOR_BYTES, &mut bytes).map_err(io::Error::other)?;
        }
        Ok(bytes)
    }

    /// The part of the current sector that a transfer of `len` bytes at the current position touches.
    fn span(&self, len: usize) -> (u64, std::ops::Range<usize>) {
        let start = usize::try_from(self.position % SECTOR_BYTES).unwrap_or(0);
        let room = usize::try_from(self.len.saturating_sub(self.position)).unwrap_or(usize::MAX);
        (self.position / SECTOR_BYTES, start..start + len.min(SECTOR - start).min(room))
    }
}

impl Read for Overlay<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (number, span) = self.span(buffer.len());
        let count = span.len();
        if count > 0 {
            buffer[..count].copy_from_slice(&self.sector(number)?[span]);
        }
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for Overlay<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let (number, span) = self.span(buffer.len());
        let count = span.len();
        if count > 0 {
            let mut sector = self.sector(number)?;
            sector[span].copy_from_slice(&buffer[..count]);
            self.sectors.insert(number, sector);
        }
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Overlay<'_> {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let position = match target {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(delta) => self.len.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

fn word(bytes: &[u8; SECTOR], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads the GPT of a disk as if it had `len` bytes. Where the first copy is half written, the second counts: the library
/// alone would refuse a first header whose entries are not its own.
pub(crate) fn open_gpt(disk: &dyn DiskBytes, len: u64) -> Result<gpt::GptDisk<Overlay<'_>>> {
    let overlay = |sectors| Overlay { disk, len, position: 0, sectors };
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::PartitionTable, error.to_string())
            .advise("attach the whole disk with `ploop mount -n` and repair the table: sgdisk -v DEVICE")
    };
    // The library sizes its memory by these fields, and panics at an entry of another size.
    let look = overlay(BTreeMap::new());
    let first = look.sector(1).map_err(|error| failed(&error))?;
    let second = u64::from(word(&first, 32)) | u64::from(word(&first, 36)) << 32;
    let last = (len / SECTOR_BYTES).saturating_sub(1);
    for number in [1, last, second.min(last)] {
        let header = look.sector(number).map_err(|error| failed(&error))?;
        let (entries, entry_bytes) = (word(&header, 80), word(&header, 84));
        if header.starts_with(b"EFI PART") && (entry_bytes != 128 || entries > ENTRIES_MAX) {
            return Err(failed(&format_args!("{entries} entries of {entry_bytes} bytes are not supported")));
        }
    }
    let open = |sectors| {
        gpt::GptConfig::new()
            .writable(false)
            .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
            .open_from_device(overlay(sectors))
    };
    match open(BTreeMap::new()) {
        Ok(table) => Ok(table),
        Err(error) => open(BTreeMap::from([(1, [0; SECTOR])])).map_err(|_| failed(&error)),
    }
}

/// The first byte behind what a partition may have on a disk of `disk_bytes`: the last multiple of the alignment, before
/// the second copy of a GPT.
pub(crate) fn partition_end(scheme: Scheme, disk_bytes: u64) -> u64 {
    let room = match scheme {
        Scheme::Gpt => disk_bytes.saturating_sub(TAIL_SECTORS * SECTOR_BYTES),
        Scheme::Dos => disk_bytes.min(DOS_SECTORS_MAX * SECTOR_BYTES),
    };
    room / ALIGNMENT_BYTES_MIN * ALIGNMENT_BYTES_MIN
}

/// The sectors to be written, in steps that must be durable one after the other, for a disk of `disk_bytes` whose partition
/// `target`, if any, ends at another byte. Nothing is written; fails with `PartitionTable` where it cannot be done.
pub(crate) fn plan(
    disk: &dyn DiskBytes,
    table: &Table,
    disk_bytes: u64,
    target: Option<(u32, u64)>,
) -> Result<Vec<dos_table::Changes>> {
    match (table.scheme, target) {
        (Scheme::Dos, None) => Ok(Vec::new()),
        (Scheme::Dos, Some((number, end))) => {
            let mut sector = |number: u64| {
                let mut bytes = [0; SECTOR];
                disk.read_at(number * SECTOR_BYTES, &mut bytes).map(|()| bytes)
            };
            match dos_table::read(disk.disk_bytes() / SECTOR_BYTES, &mut sector)? {
                Some(table) => table.with_end(number, end / SECTOR_BYTES),
                None => Err(Error::new(ErrorKind::PartitionTable, "the partition table has gone")),
            }
        }
        (Scheme::Gpt, _) => {
            let sectors = plan_gpt(disk, disk_bytes, target)?;
            let middle = disk_bytes / SECTOR_BYTES / 2;
            let (low, high) = sectors.into_iter().partition(|(number, _)| *number < middle);
            Ok(vec![high, low])
        }
    }
}

/// Fits the table of the disk behind `path` to `disk_bytes`, its partition `target`, if any, with another end. Where that
/// lies then. Nothing is written to a table that fits already.
pub(crate) fn fit(
    path: &Path,
    disk_bytes: u64,
    target: Option<(u32, u64)>,
) -> Result<Option<PartitionRange>> {
    let disk = ShownDisk::open(path, true)?;
    if disk_bytes > disk.disk_bytes() {
        return Err(Error::new(
            ErrorKind::PartitionTable,
            format!("fit the partition table to {disk_bytes} bytes: the disk has {}", disk.disk_bytes()),
        )
        .at_path(path));
    }
    let Some(table) = partition_table::read(&disk)? else { return Ok(None) };
    for step in plan(&disk, &table, disk_bytes, target).map_err(|error| error.at_path(path))? {
        let mut pieces: Vec<(u64, &[u8])> = Vec::new();
        for (number, bytes) in &step {
            let mut old = [0; SECTOR];
            disk.read_at(number * SECTOR_BYTES, &mut old)?;
            if old != *bytes {
                pieces.push((number * SECTOR_BYTES, bytes));
            }
        }
        if !pieces.is_empty() {
            disk.write_durably(&pieces)?;
        }
    }
    Ok(target.and_then(|(number, end)| {
        let offset = table.numbered(number)?.offset;
        Some(PartitionRange { number, offset, len: end - offset })
    }))
}

/// The sectors of the GPT that fits `disk_bytes`. Made of the bytes that are there: the library would number the partitions
/// anew, and systems start by their numbers.
fn plan_gpt(
    disk: &dyn DiskBytes,
    disk_bytes: u64,
    target: Option<(u32, u64)>,
) -> Result<BTreeMap<u64, [u8; SECTOR]>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::PartitionTable, format!("fit the partition table: {error}"))
            .advise("attach the whole disk with `ploop mount -n` and repair the table")
    };
    let table = open_gpt(disk, disk_bytes).map_err(|error| failed(&error))?;
    let look = Overlay { disk, len: disk_bytes, position: 0, sectors: BTreeMap::new() };
    let read = |number: u64| look.sector(number).map_err(|error| failed(&error));
    let old = table.header();
    let header = read(old.current_lba)?;
    let header_bytes = usize::try_from(word(&header, 12)).unwrap_or(usize::MAX);
    if !(HEADER_BYTES..=SECTOR).contains(&header_bytes) {
        return Err(failed(&format_args!("a header of {header_bytes} bytes is not supported")));
    }
    let entries_bytes = u64::from(old.num_parts) * u64::from(old.part_size);
    let entries_sectors = entries_bytes.div_ceil(SECTOR_BYTES);
    let mut entries = Vec::new();
    for number in 0..entries_sectors {
        entries.extend_from_slice(&read(old.part_start.saturating_add(number))?);
    }
    // Where both copies lie now.
    let disk_sectors = disk_bytes / SECTOR_BYTES;
    let first_start = if old.current_lba == 1 { old.part_start } else { 2 };
    let second_start = disk_sectors.saturating_sub(1 + entries_sectors);
    let last_usable = second_start.saturating_sub(1);
    for (&number, one) in table.partitions().iter().filter(|(_, one)| one.is_used()) {
        let mut last = one.last_lba;
        if let Some((_, end)) = target.filter(|target| target.0 == number) {
            last = (end / SECTOR_BYTES).saturating_sub(1);
            let at = (number as usize - 1) * ENTRY_BYTES + LAST_AT;
            entries[at..at + 8].copy_from_slice(&last.to_le_bytes());
        }
        if last < one.first_lba
            || last > last_usable
            || one.first_lba < first_start.saturating_add(entries_sectors)
        {
            return Err(failed(&format_args!(
                "partition {number}, sectors {} to {last}, leaves no room for the table",
                one.first_lba
            )));
        }
        let is_in_the_way = |(other, place): (&u32, &gpt::partition::Partition)| {
            *other != number && place.is_used() && place.first_lba > one.first_lba && place.first_lba <= last
        };
        if table.partitions().iter().any(is_in_the_way) {
            return Err(failed(&format_args!("another lies behind partition {number}: it cannot grow")));
        }
    }
    if target.is_some_and(|(number, _)| !table.partitions().contains_key(&number)) {
        return Err(failed(&"there is no such partition"));
    }
    let used = usize::try_from(entries_bytes).unwrap_or(usize::MAX).min(entries.len());
    let entries_sum = CRC.checksum(&entries[..used]);
    let mut sectors = BTreeMap::new();
    if let Some(first) = protection(&read(0)?, disk_bytes) {
        sectors.insert(0, first);
    }
    for (here, there, start) in [(1, disk_sectors - 1, first_start), (disk_sectors - 1, 1, second_start)] {
        let mut copy = header;
        for (at, value) in [(24, here), (32, there), (48, last_usable), (72, start)] {
            copy[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        copy[88..92].copy_from_slice(&entries_sum.to_le_bytes());
        copy[16..20].fill(0);
        let sum = CRC.checksum(&copy[..header_bytes]);
        copy[16..20].copy_from_slice(&sum.to_le_bytes());
        sectors.insert(here, copy);
        for (number, bytes) in (start..).zip(entries.as_chunks::<SECTOR>().0) {
            sectors.insert(number, *bytes);
        }
    }
    Ok(sectors)
}

/// The first sector with an entry that protects the whole of a disk of `disk_bytes`; `None` where it shall stay: one that
/// names other partitions as well is its maker's. The boot code stays.
fn protection(first: &[u8; SECTOR], disk_bytes: u64) -> Option<[u8; SECTOR]> {
    const KIND: usize = 446 + 4;
    let mut sector = *first;
    let is_ours = sector[510..] == [0x55, 0xAA]
        && sector[KIND] == 0xEE
        && sector[446 + 16..510].iter().all(|&byte| byte == 0);
    if !is_ours {
        if sector.iter().any(|&byte| byte != 0) {
            return None;
        }
        sector[446..KIND + 8].copy_from_slice(&[0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xAA]);
    }
    let protected = u32::try_from((disk_bytes / SECTOR_BYTES).saturating_sub(1)).unwrap_or(u32::MAX);
    sector[KIND + 8..KIND + 12].copy_from_slice(&protected.to_le_bytes());
    Some(sector)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::partition;

    const MIB: u64 = 1 << 20;

    fn check(path: &Path, disk_bytes: u64, range: PartitionRange) {
        let disk = ShownDisk::open(path, false).unwrap();
        let device = Overlay { disk: &disk, len: disk_bytes, position: 0, sectors: BTreeMap::new() };
        let table = gpt::GptConfig::new().only_valid_headers(true).open_from_device(device).unwrap();
        let found: Vec<_> = table.partitions().values().filter(|one| one.is_used()).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].first_lba * 512, range.offset);
        assert_eq!((found[0].last_lba + 1) * 512, range.offset + range.len);
        assert_eq!(table.primary_header().unwrap().backup_lba, disk_bytes / 512 - 1);
        assert_eq!(table.backup_header().unwrap().current_lba, disk_bytes / 512 - 1);
        assert!(found[0].last_lba <= table.primary_header().unwrap().last_usable);
    }

    #[test]
    fn the_table_follows_the_size_up_and_down() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        let first = partition::layout(64 * MIB, MIB).unwrap();
        for (offset, bytes) in &first.pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        let guid = |file: &File| {
            let mut bytes = [0; 16];
            file.read_exact_at(&mut bytes, 1024 + 16).unwrap();
            bytes
        };
        let before = guid(&file);
        for (len, disk) in [(64, 64), (200, 200), (200, 200), (1 << 22, 1 << 22), (1 << 22, 70)] {
            file.set_len(len * MIB).unwrap();
            let end = partition_end(Scheme::Gpt, disk * MIB);
            let range = fit(&path, disk * MIB, Some((1, end))).unwrap().unwrap();
            assert_eq!(range.offset, MIB);
            assert_eq!(range.offset + range.len, end);
            check(&path, disk * MIB, range);
            assert_eq!(guid(&file), before, "the partition keeps its name");
        }
        assert!(fit(&path, (1 << 22) * MIB + 512, None).is_err(), "larger than the disk");
    }

    #[test]
    fn a_cut_between_the_two_copies_leaves_one_that_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        for (offset, bytes) in &partition::layout(64 * MIB, MIB).unwrap().pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file.set_len(128 * MIB).unwrap();
        let target = Some((1, partition_end(Scheme::Gpt, 128 * MIB)));
        let sectors = plan_gpt(&ShownDisk::open(&path, false).unwrap(), 128 * MIB, target).unwrap();
        // The second copy, and half of the first.
        for (number, bytes) in sectors.range(1000..).chain(sectors.range(..2)) {
            file.write_all_at(bytes, number * 512).unwrap();
        }
        let range = fit(&path, 128 * MIB, target).unwrap().unwrap();
        check(&path, 128 * MIB, range);
    }

    #[test]
    fn other_disks_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        assert_eq!(fit(&path, 1 << 20, None).unwrap(), None);
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
    }

    /// What others have put beside the partition stays: boot code, further partitions, their names, types and flags.
    #[test]
    fn boot_code_and_other_partitions_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        let disk = ShownDisk::open(&path, true).unwrap();
        let device = Overlay { disk: &disk, len: 64 * MIB, position: 0, sectors: BTreeMap::new() };
        let mut table = gpt::GptConfig::new().writable(true).create_from_device(device, None).unwrap();
        let kinds = [gpt::partition_types::EFI, gpt::partition_types::LINUX_FS];
        table.add_partition_at("boot part", 1, 2048, 4096, kinds[0].clone(), 5).unwrap();
        table.add_partition_at("the rest", 2, 8192, 4096, kinds[1].clone(), 0).unwrap();
        for (number, bytes) in &table.write().unwrap().sectors {
            file.write_all_at(bytes, number * 512).unwrap();
        }
        // The library numbers from 1 on; others leave gaps.
        let mut entries = vec![0; 32 * 512];
        file.read_exact_at(&mut entries, 1024).unwrap();
        entries.copy_within(..256, 13 * 128);
        entries[..256].fill(0);
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 512).unwrap();
        header[88..92].copy_from_slice(&CRC.checksum(&entries).to_le_bytes());
        header[16..20].fill(0);
        let sum = CRC.checksum(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&header, 512).unwrap();
        file.write_all_at(&entries, 1024).unwrap();
        let mut first = [7; 512];
        first[446..].fill(0);
        first[450] = 0xEE;
        first[454] = 1;
        first[510..].copy_from_slice(&[0x55, 0xAA]);
        file.write_all_at(&first, 0).unwrap();
        file.set_len(128 * MIB).unwrap();
        let disk = ShownDisk::open(&path, true).unwrap();
        let before = partition_table::read(&disk).unwrap().unwrap();
        assert_eq!(before.last().unwrap().number, 15);
        let end = partition_end(Scheme::Gpt, 128 * MIB);
        fit(&path, 128 * MIB, Some((15, end))).unwrap();
        let after = partition_table::read(&disk).unwrap().unwrap();
        assert_eq!(after.numbered(14), before.numbered(14));
        assert_eq!(after.partitions.len(), 2);
        assert_eq!(after.last().unwrap().end(), end);
        let mut now = [0; 512];
        file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now[..446], first[..446], "the boot code stays");
        assert_eq!(now[458..462], (128 * 2048 - 1u32).to_le_bytes());
        assert!(fit(&path, 128 * MIB, Some((14, end))).is_err(), "another lies behind it");
    }

    /// The library alone would panic, or take gigabytes.
    #[test]
    fn odd_tables_are_refused_before_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        for (offset, bytes) in &partition::layout(64 * MIB, MIB).unwrap().pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        for (at, value) in [(84, 256u32), (84, 0), (80, u32::MAX)] {
            let mut header = [0; 512];
            file.read_exact_at(&mut header, 512).unwrap();
            let sound = header;
            header[at..at + 4].copy_from_slice(&value.to_le_bytes());
            header[16..20].fill(0);
            let sum = CRC.checksum(&header[..92]);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            file.write_all_at(&header, 512).unwrap();
            let error = partition_table::read(&ShownDisk::open(&path, false).unwrap()).unwrap_err();
            assert!(error.to_string().contains("not supported"), "{error}");
            file.write_all_at(&sound, 512).unwrap();
        }
    }
}
