//! A disk that is split: several storages, each a chain of its own for a range of the disk.
//!
//! It is read as a whole ([`ops::open`](crate::ops::open) joins the chains) and never written: to use it, it is
//! imported.

use crate::error::{Error, ErrorKind, Result};
use crate::units::Sectors;

use super::{DiskDescriptor, wrong};

/// Most parts of a disk: those of 2 GiB of a disk of 8 TiB.
pub(super) const PARTS_MAX: usize = 4096;

/// A range of a split disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its first sector.
    pub start: Sectors,
    /// Its images and the snapshots of all, as a disk of the length of this range.
    pub descriptor: DiskDescriptor,
}

/// The descriptor of a split disk: its parts, which follow each other from 0 to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitDescriptor {
    parts: Vec<Part>,
    disk: Sectors,
}

/// What a descriptor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Described {
    /// A disk in one chain of images.
    Whole(Box<DiskDescriptor>),
    /// A disk in several.
    Split(SplitDescriptor),
}

impl SplitDescriptor {
    /// The parts, `(start, end, descriptor)` in the order of the document, as one disk of `disk` sectors. Refuses gaps,
    /// overlaps, another order, and parts that do not make up the disk.
    pub(super) fn new(parts: Vec<(u64, u64, DiskDescriptor)>, disk: u64) -> Result<Self> {
        if parts.len() > PARTS_MAX {
            return Err(wrong(format!("more than {PARTS_MAX} elements <Storage>")));
        }
        let mut at = 0;
        let mut joined = Vec::new();
        for (start, end, descriptor) in parts {
            if start != at {
                let what = if start > at { "a gap" } else { "an overlap, or another order," };
                return Err(wrong(format!(
                    "a <Storage> starts at sector {start} where {at} must follow: {what} in the disk"
                ))
                .advise(
                    "restore the descriptor: there is often a copy, DiskDescriptor.xml.Backup, beside it",
                ));
            }
            if end <= start {
                return Err(wrong(format!("a <Storage> ends at sector {end}, before it starts ({start})")));
            }
            at = end;
            joined.push(Part { start: Sectors(start), descriptor });
        }
        if at != disk {
            return Err(wrong(format!(
                "the last <Storage> ends at sector {at}, the disk at {disk} (<Disk_size>)"
            ))
            .advise("restore the descriptor: there is often a copy, DiskDescriptor.xml.Backup, beside it"));
        }
        Ok(Self { parts: joined, disk: Sectors(disk) })
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Size of the disk.
    pub fn disk_sectors(&self) -> Sectors {
        self.disk
    }

    /// The descriptor of the first part: whose snapshots, encryption and cluster size are those of all.
    pub fn first(&self) -> &DiskDescriptor {
        // `new` has refused a disk without parts: its end would not be that of the disk.
        &self.parts[0].descriptor
    }
}

impl Described {
    /// A disk that can be changed. Fails with [`ErrorKind::Descriptor`] for one that is split.
    pub fn whole(self) -> Result<DiskDescriptor> {
        match self {
            Self::Whole(descriptor) => Ok(*descriptor),
            Self::Split(split) => Err(refused(split.parts.len())),
        }
    }

    /// What all parts say alike: snapshots, encryption, cluster size. Its size is that of the first part.
    pub fn first(&self) -> &DiskDescriptor {
        match self {
            Self::Whole(descriptor) => descriptor,
            Self::Split(split) => split.first(),
        }
    }
}

/// The refusal to do anything but read a split disk.
pub(crate) fn refused(parts: usize) -> Error {
    Error::new(
        ErrorKind::Descriptor,
        format!("the disk is split into {parts} storages: it can be read, not changed"),
    )
    .advise("make a disk of one image of it: ploop import NAME.hdd NEWFOLDER/; info, check, export, copy and mount -r read it")
}
