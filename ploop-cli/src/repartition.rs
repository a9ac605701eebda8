//! The partition table of a disk that has another size: the second copy at the new end, the partition up to it.
//!
//! The new table is computed in memory over the old one. What lies at the end of the disk is written and synced first,
//! then what lies at its start: at every moment one of the two copies is whole, and each describes a partition whose
//! file system fits it (a file system grows after its partition, and shrinks before it).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop_core::device::runtime::PartitionRange;
use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Result};

use crate::partition::{ALIGNMENT_BYTES_MIN, TAIL_SECTORS};

/// Bytes in a sector, as a length in memory.
const SECTOR: usize = 512;

/// A disk of which only a copy of what is written changes.
#[derive(Debug)]
pub(crate) struct Overlay<'a> {
    file: &'a File,
    len: u64,
    position: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

impl Overlay<'_> {
    fn sector(&self, number: u64) -> io::Result<[u8; SECTOR]> {
        if let Some(sector) = self.sectors.get(&number) {
            return Ok(*sector);
        }
        let mut bytes = [0; SECTOR];
        self.file.read_exact_at(&mut bytes, number * SECTOR_BYTES)?;
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

/// Reads the table of a disk of `len` bytes. Where the first copy is half written, the second counts: the library alone
/// would refuse a first header whose entries are not its own.
pub(crate) fn open_table(
    file: &File,
    len: u64,
) -> std::result::Result<gpt::GptDisk<Overlay<'_>>, gpt::GptError> {
    let open = |sectors| {
        gpt::GptConfig::new()
            .writable(false)
            .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
            .open_from_device(Overlay { file, len, position: 0, sectors })
    };
    let first = match open(BTreeMap::new()) {
        Ok(table) => return Ok(table),
        Err(error) => error,
    };
    open(BTreeMap::from([(1, [0; SECTOR])])).map_err(|_| first)
}

/// The end of the partition on a disk of `disk_bytes`: the last multiple of the alignment before the second copy.
pub(crate) fn partition_end(disk_bytes: u64) -> u64 {
    disk_bytes.saturating_sub(TAIL_SECTORS * SECTOR_BYTES) / ALIGNMENT_BYTES_MIN * ALIGNMENT_BYTES_MIN
}

/// Fits the table of the disk behind `path` to `disk_bytes`: the only partition ends where it ends on a new disk of that
/// size. Where it lies then; `None` for a disk without a table. Nothing is written to a table that fits already.
pub(crate) fn fit(path: &Path, disk_bytes: u64) -> Result<Option<PartitionRange>> {
    let failed = |operation: &'static str, cause: io::Error| {
        Error::io(ErrorKind::PartitionTable, operation, cause).at_path(path)
    };
    let file =
        File::options().read(true).write(true).open(path).map_err(|cause| failed("open the disk", cause))?;
    let len = file.metadata().map_err(|cause| failed("examine the disk", cause))?.len();
    let mut head = [0; 2 * SECTOR];
    if len < head.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut head, 0).map_err(|cause| failed("read the partition table", cause))?;
    if !head[SECTOR..].starts_with(b"EFI PART") {
        return Ok(None);
    }
    if disk_bytes > len {
        return Err(Error::new(
            ErrorKind::PartitionTable,
            format!("fit the partition table to {disk_bytes} bytes: the disk has {len}"),
        )
        .at_path(path));
    }
    let (range, sectors) = compute(&file, disk_bytes).map_err(|error| error.at_path(path))?;
    let middle = disk_bytes / SECTOR_BYTES / 2;
    for part in [sectors.range(middle..), sectors.range(..middle)] {
        let mut wrote = false;
        for (number, bytes) in part {
            let mut old = [0; SECTOR];
            let offset = number * SECTOR_BYTES;
            file.read_exact_at(&mut old, offset)
                .map_err(|cause| failed("read the partition table", cause))?;
            if old != *bytes {
                file.write_all_at(bytes, offset)
                    .map_err(|cause| failed("write the partition table", cause))?;
                wrote = true;
            }
        }
        if wrote {
            file.sync_all().map_err(|cause| failed("sync the partition table", cause))?;
        }
    }
    Ok(Some(range))
}

/// The partition and the sectors of the table that fits `disk_bytes`.
fn compute(file: &File, disk_bytes: u64) -> Result<(PartitionRange, BTreeMap<u64, [u8; SECTOR]>)> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::PartitionTable, format!("fit the partition table: {error}"))
            .advise("attach the whole disk with `ploop mount -n` and repair the table")
    };
    let mut device = Overlay { file, len: disk_bytes, position: 0, sectors: BTreeMap::new() };
    let protected = u32::try_from(disk_bytes / SECTOR_BYTES - 1).unwrap_or(u32::MAX);
    gpt::mbr::ProtectiveMBR::with_lb_size(protected)
        .overwrite_lba0(&mut device)
        .map_err(|error| failed(&error))?;
    let mut table = open_table(file, disk_bytes).map_err(|error| failed(&error))?;
    let mut partitions = table.take_partitions();
    let mut used = partitions.iter_mut().filter(|(_, partition)| partition.is_used());
    let (Some((&number, partition)), None) = (used.next(), used.next()) else {
        return Err(Error::new(
            ErrorKind::PartitionTable,
            "fit the partition table: the disk has not exactly one partition",
        )
        .advise("change the image alone with `ploop grow`, then the table by hand"));
    };
    let offset = partition.first_lba.saturating_mul(SECTOR_BYTES);
    let end = partition_end(disk_bytes);
    if end <= offset {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("a disk of {disk_bytes} bytes has no room for its partition"),
        ));
    }
    partition.last_lba = end / SECTOR_BYTES - 1;
    let guid = *table.guid();
    // A header made anew: one that is changed keeps its end where that is higher.
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
        .create_from_device(device, Some(guid))
        .map_err(|error| failed(&error))?;
    table.update_partitions(partitions).map_err(|error| failed(&error))?;
    let device = table.write().map_err(|error| failed(&error))?;
    Ok((PartitionRange { number, offset, len: end - offset }, device.sectors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition;

    const MIB: u64 = 1 << 20;

    fn check(file: &File, disk_bytes: u64, range: PartitionRange) {
        let device = Overlay { file, len: disk_bytes, position: 0, sectors: BTreeMap::new() };
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
            let range = fit(&path, disk * MIB).unwrap().unwrap();
            assert_eq!(range.offset, MIB);
            assert_eq!(range.offset + range.len, partition_end(disk * MIB));
            check(&file, disk * MIB, range);
            assert_eq!(guid(&file), before, "the partition keeps its name");
        }
        assert!(fit(&path, (1 << 22) * MIB + 512).is_err(), "larger than the disk");
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
        let (_, sectors) = compute(&file, 128 * MIB).unwrap();
        // The second copy, and half of the first.
        for (number, bytes) in sectors.range(1000..).chain(sectors.range(..2)) {
            file.write_all_at(bytes, number * 512).unwrap();
        }
        let range = fit(&path, 128 * MIB).unwrap().unwrap();
        check(&file, 128 * MIB, range);
    }

    #[test]
    fn other_disks_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        assert_eq!(fit(&path, 1 << 20).unwrap(), None);
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
    }
}
