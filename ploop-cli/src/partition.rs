//! The partition table of a new disk: GPT with one partition that fills the disk, aligned to the cluster.
//!
//! The table is computed in memory and returned as the few pieces that must be written, so that it needs no device
//! and cannot be half right: [`Layout::pieces`] holds the protective MBR, both headers and both entry arrays.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};

use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Extent, Result};

/// The least alignment of the partition, in bytes: no file system block straddles two of them.
pub(crate) const ALIGNMENT_BYTES_MIN: u64 = 4096;
/// Sectors at the end of a disk that the second copy of the table takes: 32 for the entries, one for the header.
pub(crate) const TAIL_SECTORS: u64 = 33;
/// Sectors at the start of a disk that the table takes: MBR, header and 32 of entries.
const HEAD_SECTORS: u64 = 34;
/// Bytes in a sector, as a length in memory.
const SECTOR: usize = 512;
/// The name of the partition.
const NAME: &str = "primary";

const _: () = assert!(SECTOR as u64 == SECTOR_BYTES);

/// A partition table, ready to be written.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Where the partition lies, in guest bytes.
    pub(crate) partition: Extent,
    /// What to write where: guest byte offset and whole sectors, in ascending order.
    pub(crate) pieces: Vec<(u64, Vec<u8>)>,
}

/// Computes the table of a disk of `disk_bytes` whose clusters hold `cluster_bytes`.
///
/// The partition starts at the first multiple of the cluster behind the table (1 MiB for the usual cluster) and ends
/// at the last multiple of the alignment before the table's second copy.
pub(crate) fn layout(disk_bytes: u64, cluster_bytes: u64) -> Result<Layout> {
    let alignment = cluster_bytes.max(ALIGNMENT_BYTES_MIN);
    let start = (HEAD_SECTORS * SECTOR_BYTES).next_multiple_of(alignment);
    let end =
        disk_bytes.saturating_sub(TAIL_SECTORS * SECTOR_BYTES) / ALIGNMENT_BYTES_MIN * ALIGNMENT_BYTES_MIN;
    if end <= start || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("a disk of {disk_bytes} bytes has no room for a partition with clusters of {cluster_bytes} bytes"),
        )
        .advise("make the disk larger, the clusters smaller (-b), or the disk without a partition (-P)"));
    }
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::PartitionTable, format!("compute the partition table: {error}"))
    };

    let mut device = SparseDevice::new(disk_bytes);
    let disk_sectors = disk_bytes / SECTOR_BYTES;
    let protected = u32::try_from(disk_sectors - 1).unwrap_or(u32::MAX);
    gpt::mbr::ProtectiveMBR::with_lb_size(protected)
        .overwrite_lba0(&mut device)
        .map_err(|error| failed(&error))?;
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
        .create_from_device(device, None)
        .map_err(|error| failed(&error))?;
    let partition = Extent::between(start, end);
    table
        .add_partition_at(
            NAME,
            1,
            start / SECTOR_BYTES,
            partition.len() / SECTOR_BYTES,
            gpt::partition_types::LINUX_FS,
            0,
        )
        .map_err(|error| failed(&error))?;
    let device = table.write().map_err(|error| failed(&error))?;
    Ok(Layout { partition, pieces: device.into_pieces() })
}

/// A disk of zeros in memory that keeps the sectors written to it.
#[derive(Debug)]
struct SparseDevice {
    len: u64,
    position: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

impl SparseDevice {
    fn new(len: u64) -> Self {
        Self { len, position: 0, sectors: BTreeMap::new() }
    }

    /// The part of the current sector that a transfer of `len` bytes at the current position touches.
    fn span(&self, len: usize) -> (u64, std::ops::Range<usize>) {
        let sector = self.position / SECTOR_BYTES;
        let start = usize::try_from(self.position % SECTOR_BYTES).unwrap_or(0);
        let room = usize::try_from(self.len.saturating_sub(self.position)).unwrap_or(usize::MAX);
        (sector, start..start + len.min(SECTOR - start).min(room))
    }

    /// The written sectors, neighbours joined.
    fn into_pieces(self) -> Vec<(u64, Vec<u8>)> {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (sector, bytes) in self.sectors {
            let offset = sector * SECTOR_BYTES;
            match pieces.last_mut() {
                Some((start, piece)) if *start + piece.len() as u64 == offset => {
                    piece.extend_from_slice(&bytes)
                }
                _ => pieces.push((offset, bytes.to_vec())),
            }
        }
        pieces
    }
}

impl Read for SparseDevice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (sector, span) = self.span(buffer.len());
        let count = span.len();
        match self.sectors.get(&sector) {
            Some(bytes) => buffer[..count].copy_from_slice(&bytes[span]),
            None => buffer[..count].fill(0),
        }
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for SparseDevice {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let (sector, span) = self.span(buffer.len());
        let count = span.len();
        if count > 0 {
            self.sectors.entry(sector).or_insert([0; SECTOR])[span].copy_from_slice(&buffer[..count]);
        }
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for SparseDevice {
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn device_of(layout: &Layout, disk_bytes: u64) -> SparseDevice {
        let mut device = SparseDevice::new(disk_bytes);
        for (offset, bytes) in &layout.pieces {
            device.seek(SeekFrom::Start(*offset)).unwrap();
            device.write_all(bytes).unwrap();
        }
        device
    }

    #[test]
    fn one_partition_aligned_to_the_cluster() {
        for (disk_bytes, cluster_bytes, start) in [
            (64 * MIB, MIB, MIB),
            (64 * MIB, 32 << 10, 32 << 10),
            (1 << 44, MIB, MIB),
            (256 * MIB, 64 * MIB, 64 * MIB),
        ] {
            let layout = layout(disk_bytes, cluster_bytes).unwrap();
            assert_eq!(layout.partition.start(), start);
            assert!(layout.partition.end() + TAIL_SECTORS * SECTOR_BYTES <= disk_bytes);
            let table = gpt::GptConfig::new()
                .only_valid_headers(true)
                .open_from_device(device_of(&layout, disk_bytes))
                .unwrap();
            let partitions: Vec<_> = table.partitions().values().filter(|found| found.is_used()).collect();
            assert_eq!(partitions.len(), 1);
            assert_eq!(partitions[0].first_lba * SECTOR_BYTES, layout.partition.start());
            assert_eq!((partitions[0].last_lba + 1) * SECTOR_BYTES, layout.partition.end());
            assert_eq!(partitions[0].name, NAME);
        }
    }

    #[test]
    fn little_is_written_and_nothing_of_the_partition() {
        let layout = layout(1 << 40, MIB).unwrap();
        assert_eq!(layout.pieces.len(), 2);
        for (offset, bytes) in &layout.pieces {
            let piece = Extent::new(*offset, bytes.len() as u64).unwrap();
            assert!(piece.end() <= layout.partition.start() || piece.start() >= layout.partition.end());
        }
    }

    #[test]
    fn a_tiny_disk_is_refused_with_advice() {
        let error = layout(MIB, MIB).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter);
        assert!(error.advice().is_some());
    }
}
