//! The partition table of a disk, GPT or DOS: which partitions there are, and which one is meant.

use std::path::Path;

use ploop_core::device::runtime::PartitionRange;
use ploop_core::ops::dos_table;
use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::disk_bytes::DiskBytes;
use crate::output::human_bytes;
use crate::repartition;
use crate::signature;

/// Sectors of a disk that is too small for a GPT.
const GPT_SECTORS_MIN: u64 = 2 * 34;

/// The kind of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scheme {
    /// GUID partition table.
    Gpt,
    /// DOS partition table, in the master boot record.
    Dos,
}

impl Scheme {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gpt => "gpt",
            Self::Dos => "dos",
        }
    }
}

/// A partition that can hold something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Partition {
    /// Its number in the table; from 5 on a logical one of a DOS table.
    pub(crate) number: u32,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Its type: a GUID, or two hexadecimal digits.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// Its label in the table.
    pub(crate) label: Option<String>,
    /// Its UUID in the table.
    pub(crate) uuid: Option<String>,
}

impl Partition {
    /// The first byte behind it.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Where it lies.
    pub(crate) fn range(&self) -> PartitionRange {
        PartitionRange { number: self.number, offset: self.offset, len: self.len }
    }
}

/// A table with at least one partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Table {
    /// Its kind.
    pub(crate) scheme: Scheme,
    /// By number.
    pub(crate) partitions: Vec<Partition>,
}

/// Reads the table of a disk; `None` where there is none, or none with a partition.
pub(crate) fn read(disk: &dyn DiskBytes) -> Result<Option<Table>> {
    let disk_sectors = disk.disk_bytes() / SECTOR_BYTES;
    if disk_sectors < GPT_SECTORS_MIN {
        return Ok(None);
    }
    let mut sector = |number: u64| {
        let mut bytes = [0; dos_table::SECTOR];
        disk.read_at(number * SECTOR_BYTES, &mut bytes).map(|()| bytes)
    };
    if let Some(table) = dos_table::read(disk_sectors, &mut sector)? {
        let partition = |found: &dos_table::DosPartition| Partition {
            number: found.number,
            offset: found.first * SECTOR_BYTES,
            len: found.sectors * SECTOR_BYTES,
            kind: format!("{:02x}", found.kind),
            label: None,
            uuid: (table.signature != 0).then(|| format!("{:08x}-{:02x}", table.signature, found.number)),
        };
        let partitions: Vec<Partition> = table.partitions.iter().map(partition).collect();
        return Ok((!partitions.is_empty()).then_some(Table { scheme: Scheme::Dos, partitions }));
    }
    let first = sector(0)?;
    let is_gpt = dos_table::protects_gpt(&first)
        || (sector(1)?.starts_with(b"EFI PART") && !dos_table::is_boot_sector(&first));
    if !is_gpt {
        return Ok(None);
    }
    read_gpt(disk)
}

fn read_gpt(disk: &dyn DiskBytes) -> Result<Option<Table>> {
    const ADVICE: &str = "attach the whole disk with `ploop mount -n` and repair the table: sgdisk -v DEVICE";
    let table = repartition::open_gpt(disk, disk.disk_bytes()).map_err(|error| {
        Error::new(ErrorKind::PartitionTable, format!("read the partition table: {error}")).advise(ADVICE)
    })?;
    let mut partitions = Vec::new();
    for (&number, found) in table.partitions().iter().filter(|(_, found)| found.is_used()) {
        let range = || {
            let offset = found.first_lba.checked_mul(SECTOR_BYTES)?;
            let sectors = found.last_lba.checked_sub(found.first_lba)?.checked_add(1)?;
            let len = sectors.checked_mul(SECTOR_BYTES)?;
            (offset > 0 && offset.checked_add(len)? <= disk.disk_bytes()).then_some((offset, len))
        };
        let Some((offset, len)) = range() else {
            return Err(Error::new(
                ErrorKind::PartitionTable,
                format!("partition {number} lies outside of the disk of {} bytes", disk.disk_bytes()),
            )
            .advise(ADVICE));
        };
        partitions.push(Partition {
            number,
            offset,
            len,
            kind: found.part_type_guid.guid.hyphenated().to_string(),
            label: Some(found.name.clone()).filter(|name| !name.is_empty()),
            uuid: Some(found.part_guid.hyphenated().to_string()),
        });
    }
    let mut by_place: Vec<&Partition> = partitions.iter().collect();
    by_place.sort_by_key(|partition| partition.offset);
    if let Some(pair) = by_place.windows(2).find(|pair| pair[1].offset < pair[0].end()) {
        let (one, other) = (pair[0].number, pair[1].number);
        return Err(Error::new(ErrorKind::PartitionTable, format!("partitions {one} and {other} overlap"))
            .advise(ADVICE));
    }
    Ok((!partitions.is_empty()).then_some(Table { scheme: Scheme::Gpt, partitions }))
}

impl Table {
    /// The partition that ends last.
    pub(crate) fn last(&self) -> Option<&Partition> {
        self.partitions.iter().max_by_key(|partition| partition.end())
    }

    /// The partition of that number.
    pub(crate) fn numbered(&self, number: u32) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number)
    }

    /// Which there are, in a line.
    pub(crate) fn summary(&self) -> String {
        let one = |partition: &Partition| {
            let label = partition.label.as_ref().map_or_else(String::new, |label| format!(" {label:?}"));
            format!("{}{label} ({})", partition.number, human_bytes(partition.len))
        };
        self.partitions.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// The partition that `wanted` means: a number, or a label or UUID of the table or of what is on the partition. The
    /// disk is shown by `file`, where the latter are looked up.
    pub(crate) fn choose(&self, wanted: &str, file: &Path) -> Result<&Partition> {
        let bare = wanted.trim_start_matches('{').trim_end_matches('}');
        let is_uuid =
            |uuid: &Option<String>| uuid.as_ref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(bare));
        let mut found: Vec<&Partition> = match wanted.parse::<u32>() {
            Ok(number) => self.numbered(number).into_iter().collect(),
            Err(_) => self
                .partitions
                .iter()
                .filter(|one| one.label.as_deref() == Some(wanted) || is_uuid(&one.uuid))
                .collect(),
        };
        if found.is_empty() {
            for partition in &self.partitions {
                let content = signature::probe(file, Some((partition.offset, partition.len)))?;
                if content.label.as_deref() == Some(wanted) || is_uuid(&content.uuid) {
                    found.push(partition);
                }
            }
        }
        let refused = |problem: &str| {
            Error::new(ErrorKind::Parameter, format!("partition {wanted:?}: {problem}"))
                .advise(format!("give the number of one of these: {}", self.summary()))
        };
        match found.as_slice() {
            [only] => Ok(only),
            [] => Err(refused("there is none of this number, label or UUID")),
            _ => Err(refused("several have this label or UUID")),
        }
    }
}

#[cfg(test)]
mod tests;
