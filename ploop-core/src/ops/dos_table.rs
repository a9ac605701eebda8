//! The DOS partition table (MBR) of a disk: primary and logical partitions, read and given another end.
//!
//! Sectors of 512 bytes come from the caller, changed ones go back to it; nothing is written here. A table comes from
//! whoever made the disk: what lies outside of the disk, overlaps, or goes round in circles is refused, never followed.
//! A boot sector of FAT, NTFS or exFAT looks like a table without being one; a table that only protects a GPT is none.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The most logical partitions that are followed; the kernel stops earlier.
pub const LOGICAL_MAX: u32 = 128;
/// The type of the entry that protects a GPT.
const KIND_PROTECTIVE: u8 = 0xEE;
/// Where the four entries lie in their sector.
const ENTRIES: usize = 446;
/// Bytes of an entry.
const ENTRY: usize = 16;
/// Heads and sectors of the made-up geometry in which addresses of the old kind are written.
const HEADS: u64 = 255;
const TRACK_SECTORS: u64 = 63;

/// One sector.
pub type SectorBytes = [u8; SECTOR];
/// Sectors to be written, by their number.
pub type Changes = Vec<(u64, SectorBytes)>;

/// A partition that can hold something: primary or logical.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DosPartition {
    /// 1 to 4 for a primary, from 5 on for a logical one.
    pub number: u32,
    /// Its type.
    pub kind: u8,
    /// First sector.
    pub first: u64,
    /// Number of sectors, at least 1.
    pub sectors: u64,
    /// Where its entry is: sector and slot.
    entry: (u64, usize),
    /// Where the entry is that leads to the sector of this one's entry; none for a primary.
    link: Option<(u64, usize)>,
}

impl DosPartition {
    /// The first sector behind it.
    pub fn end(&self) -> u64 {
        self.first + self.sectors
    }

    /// Whether it lies in the extended partition.
    pub fn is_logical(&self) -> bool {
        self.link.is_some()
    }
}

/// A table that was read and found sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DosTable {
    /// The disk's signature, of which the partitions' UUIDs are made.
    pub signature: u32,
    /// By number; the extended partition is not among them.
    pub partitions: Vec<DosPartition>,
    /// The extended partition.
    container: Option<Entry>,
    container_slot: usize,
    /// The sectors of the table.
    sectors: BTreeMap<u64, SectorBytes>,
}

/// An entry as it stands in its sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    flag: u8,
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Entry {
    fn read(sector: &SectorBytes, slot: usize) -> Self {
        let at = ENTRIES + slot * ENTRY;
        let word = |from: usize| {
            u64::from(u32::from_le_bytes([
                sector[from],
                sector[from + 1],
                sector[from + 2],
                sector[from + 3],
            ]))
        };
        Self { flag: sector[at], kind: sector[at + 4], start: word(at + 8), sectors: word(at + 12) }
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn is_container(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }

    fn end(&self) -> u64 {
        self.start + self.sectors
    }
}

fn damaged(problem: String) -> Error {
    Error::new(ErrorKind::PartitionTable, format!("DOS partition table: {problem}"))
        .advise("attach the whole disk with `ploop mount -n` and repair the table: sfdisk --verify DEVICE")
}

fn is_signed(sector: &SectorBytes) -> bool {
    sector[510..] == [0x55, 0xAA]
}

/// Whether a sector that may end as a table does is the boot sector of FAT, NTFS or exFAT.
pub fn is_boot_sector(sector: &SectorBytes) -> bool {
    if &sector[3..11] == b"NTFS    " || &sector[3..11] == b"EXFAT   " {
        return true;
    }
    let jumps = (sector[0] == 0xEB && sector[2] == 0x90) || sector[0] == 0xE9;
    let sector_bytes = u16::from_le_bytes([sector[11], sector[12]]);
    let reserved = u16::from_le_bytes([sector[14], sector[15]]);
    jumps
        && (512..=4096).contains(&sector_bytes)
        && sector_bytes.is_power_of_two()
        && sector[13].is_power_of_two()
        && reserved != 0
        && (1..=2).contains(&sector[16])
        && (sector[21] == 0xF0 || sector[21] >= 0xF8)
}

/// Whether the first sector protects a GPT (it may name other partitions as well).
pub fn protects_gpt(first: &SectorBytes) -> bool {
    is_signed(first) && (0..4).any(|slot| Entry::read(first, slot).kind == KIND_PROTECTIVE)
}

/// Reads the table of a disk of `disk_sectors`; `None` where there is none, or none that names a partition. Fails with
/// [`ErrorKind::PartitionTable`] for one that cannot be.
pub fn read(
    disk_sectors: u64,
    sector: &mut dyn FnMut(u64) -> Result<SectorBytes>,
) -> Result<Option<DosTable>> {
    if disk_sectors < 2 {
        return Ok(None);
    }
    let first = sector(0)?;
    if !is_signed(&first) || is_boot_sector(&first) || protects_gpt(&first) {
        return Ok(None);
    }
    let entries: [Entry; 4] = std::array::from_fn(|slot| Entry::read(&first, slot));
    // Code or text of something else has other bytes there.
    if entries.iter().any(|entry| entry.flag & 0x7F != 0) || !entries.iter().any(Entry::is_used) {
        return Ok(None);
    }
    let mut table = DosTable {
        signature: u32::from_le_bytes([first[440], first[441], first[442], first[443]]),
        partitions: Vec::new(),
        container: None,
        container_slot: 0,
        sectors: BTreeMap::from([(0, first)]),
    };
    let mut taken: Vec<(u64, u64, String)> = Vec::new();
    for (slot, entry) in entries.iter().enumerate().filter(|(_, entry)| entry.is_used()) {
        let number = u32::try_from(slot + 1).unwrap_or(u32::MAX);
        if entry.start == 0 || entry.end() > disk_sectors {
            return Err(damaged(format!(
                "partition {number}, sectors {} to {}, lies outside of the disk of {disk_sectors} sectors",
                entry.start,
                entry.end()
            )));
        }
        taken.push((entry.start, entry.end(), format!("partition {number}")));
        if entry.is_container() {
            if table.container.is_some() {
                return Err(damaged("there are two extended partitions".to_owned()));
            }
            (table.container, table.container_slot) = (Some(*entry), slot);
        } else {
            table.partitions.push(DosPartition {
                number,
                kind: entry.kind,
                first: entry.start,
                sectors: entry.sectors,
                entry: (0, slot),
                link: None,
            });
        }
    }
    refuse_overlaps(&mut taken)?;
    if let Some(container) = table.container {
        table.read_logical(container, sector)?;
    }
    Ok(Some(table))
}

fn refuse_overlaps(taken: &mut [(u64, u64, String)]) -> Result<()> {
    taken.sort();
    match taken.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(damaged(format!("{} and {} overlap", pair[0].2, pair[1].2))),
        None => Ok(()),
    }
}

impl DosTable {
    /// Follows the chain of the logical partitions.
    fn read_logical(
        &mut self,
        container: Entry,
        sector: &mut dyn FnMut(u64) -> Result<SectorBytes>,
    ) -> Result<()> {
        let mut taken: Vec<(u64, u64, String)> = Vec::new();
        let (mut at, mut link) = (container.start, (0, self.container_slot));
        let mut number = 5;
        for _ in 0..=LOGICAL_MAX {
            let bytes = sector(at)?;
            if !is_signed(&bytes) {
                // An extended partition that was never used has no table.
                if at == container.start {
                    return Ok(());
                }
                return Err(damaged(format!("there is no table at sector {at}, where another leads")));
            }
            self.sectors.insert(at, bytes);
            taken.push((at, at + 1, format!("the table at sector {at}")));
            let mut next = None;
            for slot in 0..4 {
                let entry = Entry::read(&bytes, slot);
                if !entry.is_used() {
                    continue;
                }
                if entry.is_container() {
                    next = next.or(Some((container.start + entry.start, slot)));
                    continue;
                }
                let (first, end) = (at + entry.start, at + entry.end());
                if entry.start == 0 || end > container.end() {
                    return Err(damaged(format!(
                        "logical partition {number}, sectors {first} to {end}, leaves the extended one"
                    )));
                }
                taken.push((first, end, format!("partition {number}")));
                self.partitions.push(DosPartition {
                    number,
                    kind: entry.kind,
                    first,
                    sectors: entry.sectors,
                    entry: (at, slot),
                    link: Some(link),
                });
                number += 1;
            }
            let Some((target, slot)) = next else { return refuse_overlaps(&mut taken) };
            if target >= container.end() || self.sectors.contains_key(&target) {
                return Err(damaged(format!(
                    "the table at sector {at} leads to sector {target}, outside of the extended partition or in a circle"
                )));
            }
            (at, link) = (target, (at, slot));
        }
        Err(damaged(format!("there are more than {LOGICAL_MAX} logical partitions")))
    }

    /// The partition that ends last.
    pub fn last(&self) -> Option<&DosPartition> {
        self.partitions.iter().max_by_key(|partition| partition.end())
    }

    /// The sectors to be written, in steps that must be durable one after the other, so that partition `number` ends at
    /// sector `end`. The extended partition goes with a logical one. After each step the table is sound. Fails with
    /// [`ErrorKind::PartitionTable`] where something is in the way.
    pub fn with_end(&self, number: u32, end: u64) -> Result<Vec<Changes>> {
        let refused = |problem: String| Error::new(ErrorKind::PartitionTable, problem);
        let partition = self
            .partitions
            .iter()
            .find(|partition| partition.number == number)
            .ok_or_else(|| refused(format!("there is no partition {number}")))?;
        let sectors = end
            .checked_sub(partition.first)
            .filter(|&sectors| sectors > 0 && u32::try_from(sectors).is_ok())
            .ok_or_else(|| {
                refused(format!(
                    "partition {number} begins at sector {} and cannot end at sector {end}",
                    partition.first
                ))
            })?;
        let mut behind: Vec<(u64, String)> = self
            .partitions
            .iter()
            .filter(|other| other.number != number)
            .map(|other| (other.first, format!("partition {}", other.number)))
            .collect();
        if let Some(container) = self.container.filter(|_| !partition.is_logical()) {
            behind.push((container.start, "the extended partition".to_owned()));
        }
        // The tables between logical partitions.
        behind.extend(self.sectors.keys().map(|&at| (at, format!("the table at sector {at}"))));
        if let Some((_, what)) = behind.iter().find(|(first, _)| *first > partition.first && *first < end) {
            return Err(refused(format!("{what} lies behind partition {number}: it cannot grow"))
                .advise("only the last partition of a disk grows"));
        }
        if end == partition.end() {
            return Ok(Vec::new());
        }
        let grows = end > partition.end();
        let mut steps = Vec::new();
        if let (Some((link_sector, link_slot)), Some(container)) = (partition.link, self.container) {
            // The extended one ends with its last partition, unless another is that.
            let is_last =
                behind.iter().all(|(first, _)| *first < partition.first || *first >= container.end());
            let container_end = match (grows, is_last) {
                (true, _) => container.end().max(end),
                (false, true) => end,
                (false, false) => container.end(),
            };
            let container_sectors = container_end - container.start;
            if u32::try_from(container_sectors).is_err() {
                return Err(refused("the extended partition would be too long".to_owned()));
            }
            if container_end != container.end() {
                steps.push(vec![self.changed(0, self.container_slot, container_end, container_sectors)?]);
            }
            if link_sector != 0 {
                // What leads to a table says how long table and partition are.
                let covered = end - partition.entry.0;
                steps.push(vec![self.changed(link_sector, link_slot, end, covered)?]);
            }
        }
        steps.push(vec![self.changed(partition.entry.0, partition.entry.1, end, sectors)?]);
        if !grows {
            steps.reverse();
        }
        Ok(steps)
    }

    /// A sector of the table with another length in one of its entries.
    fn changed(&self, at: u64, slot: usize, end: u64, sectors: u64) -> Result<(u64, SectorBytes)> {
        let too_long =
            |_| Error::new(ErrorKind::PartitionTable, format!("a length of {sectors} sectors is too long"));
        let mut bytes = self.sectors.get(&at).copied().unwrap_or([0; SECTOR]);
        let entry = ENTRIES + slot * ENTRY;
        bytes[entry + 5..entry + 8].copy_from_slice(&address(end - 1));
        bytes[entry + 12..entry + 16]
            .copy_from_slice(&u32::try_from(sectors).map_err(too_long)?.to_le_bytes());
        Ok((at, bytes))
    }
}

/// A sector's address of the old kind: head, sector and cylinder; the largest where it has none.
fn address(sector: u64) -> [u8; 3] {
    let cylinder = sector / (HEADS * TRACK_SECTORS);
    let byte = |value: u64| u8::try_from(value & 0xFF).unwrap_or(0);
    if cylinder > 1023 {
        return [254, 0xFF, 0xFF];
    }
    let (head, track_sector) = (sector / TRACK_SECTORS % HEADS, sector % TRACK_SECTORS + 1);
    [byte(head), byte(track_sector | (cylinder >> 2 & 0xC0)), byte(cylinder)]
}

#[cfg(test)]
mod tests;
