//! Whether the descriptor and the images of a disk say the same about what would be lost otherwise: how long the disk
//! is, and whether its base is raw.
//!
//! A disk that becomes larger grows in its image first, one that becomes smaller shrinks in its descriptor first (crash
//! model, section 5). So no crash of ours leaves an image that ends *before* the disk of its descriptor: it is a copy
//! that was cut, or a file of another time. And a file that is said to be raw is never taken for an image because of
//! its first bytes, for a guest can write those (M5); but when they are a header that fits the disk, one of the two is
//! wrong, and a guest's first write would destroy the header. Both are for people to decide: such a disk is not
//! written, unless its user says that he [accepts](Accepted) it.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::io::Storage;
use crate::units::{SECTOR_BYTES, Sectors};

use super::delta::{Probe, probe};
use super::descriptor::{DiskDescriptor, Image};
use super::guid::Guid;
use super::header::Header;

/// What the user has looked at and takes as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// An image that ends before the disk of its descriptor.
    pub short: bool,
    /// A raw base that begins with the header of an image.
    pub raw: bool,
}

impl Accepted {
    /// Both: of a disk that was served already, whose guest may have written anything since.
    pub const ALL: Self = Self { short: true, raw: true };
}

/// A contradiction between the descriptor and an image that costs data when it is overlooked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Disagreement {
    /// The image of the current state ends before the disk.
    Short {
        /// The image, as the descriptor names it.
        file: String,
        /// Size of the disk in bytes, as the descriptor says.
        said_bytes: u64,
        /// How much of it the image holds, in bytes: sectors from the start, the last one maybe in part.
        held_bytes: u64,
        /// Whether it is a raw file; else its header says so.
        is_raw: bool,
    },
    /// The base is said to be raw and begins with the header of an image that fits the disk.
    ImageSaidRaw {
        /// The file, as the descriptor names it.
        file: String,
        /// Size of the disk in bytes, as that header says.
        header_disk_bytes: u64,
    },
}

impl Disagreement {
    /// Whether the user takes it as it is.
    pub fn is_accepted(&self, accepted: Accepted) -> bool {
        match self {
            Self::Short { .. } => accepted.short,
            Self::ImageSaidRaw { .. } => accepted.raw,
        }
    }

    /// What is wrong, in one sentence.
    pub fn describe(&self) -> String {
        match self {
            Self::Short { file, said_bytes, held_bytes, is_raw } => {
                let missing = said_bytes.saturating_sub(*held_bytes);
                let what = if *is_raw { "the raw image" } else { "the disk of the image" };
                format!(
                    "{missing} bytes are missing: the descriptor says that the disk has {said_bytes} bytes, {what} {file:?} \
                     has {held_bytes}; the guest's bytes {held_bytes} to {} are not there",
                    said_bytes.saturating_sub(1)
                )
            }
            Self::ImageSaidRaw { file, header_disk_bytes } => format!(
                "the descriptor says that {file:?} is raw, but it begins with the header of an image of a disk of \
                 {header_disk_bytes} bytes, which fits: as a raw disk the guest sees header and table, and its first \
                 write destroys them"
            ),
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> String {
        match self {
            Self::Short { said_bytes, held_bytes, .. } => format!(
                "restore the image from a backup, or copy it once more. Where there is none, look at what is there \
                 (`ploop export` or `ploop mount -r` read it); then `ploop resize --force-short -s {}` makes the disk \
                 as short as its image, -s {} makes its lost end zeros; `ploop mount --force-short` serves what is there",
                held_bytes / SECTOR_BYTES,
                said_bytes / SECTOR_BYTES
            ),
            Self::ImageSaidRaw { .. } => {
                "if it is an image, put the right descriptor back, or make one: `ploop restore-descriptor`; if it is a raw \
                 disk on which somebody has written such a header, say so: `ploop mount --force-raw`"
                    .to_owned()
            }
        }
    }

    /// The failure of a command that meets it: `Corrupt` for a disk that is not all there, `Descriptor` for one that is
    /// named wrongly.
    pub fn failure(&self) -> Error {
        let kind = match self {
            Self::Short { .. } => ErrorKind::Corrupt,
            Self::ImageSaidRaw { .. } => ErrorKind::Descriptor,
        };
        Error::new(kind, self.describe()).advise(self.advice())
    }
}

/// Whether `header`, found at the start of a raw file of `file_bytes`, fits the disk. A raw file that has just the
/// length of the disk may hold an image of another size: a disk on which somebody keeps one.
pub(crate) fn header_fits(
    descriptor: &DiskDescriptor,
    image: Guid,
    (header_disk, header_cluster): (Sectors, Sectors),
    file_bytes: u64,
) -> bool {
    if header_disk == descriptor.disk_sectors() {
        return true;
    }
    if image == descriptor.top_guid() {
        return descriptor.disk_sectors().checked_bytes() != Some(file_bytes);
    }
    // A base may be of another size than the disk that stands on it.
    header_cluster == descriptor.cluster_sectors()
}

/// Size of disk and cluster that a header says.
pub(crate) fn sizes_of(header: &Header) -> (Sectors, Sectors) {
    let geometry = header.geometry();
    (geometry.disk_sectors(), Sectors(u64::from(geometry.cluster_sectors())))
}

/// The contradiction about the length of the current state, whose image holds `held`.
pub(crate) fn shortfall(
    descriptor: &DiskDescriptor,
    image: &Image,
    held: Sectors,
    is_raw: bool,
) -> Option<Disagreement> {
    let said = descriptor.disk_sectors();
    (image.guid() == descriptor.top_guid() && held < said).then(|| Disagreement::Short {
        file: image.file().to_owned(),
        said_bytes: said.checked_bytes().unwrap_or(u64::MAX),
        held_bytes: held.checked_bytes().unwrap_or(u64::MAX),
        is_raw,
    })
}

/// Whether the descriptor says that an image is raw: the base of a raw disk.
pub(crate) fn says_raw(descriptor: &DiskDescriptor, guid: Guid) -> bool {
    descriptor.is_raw() && descriptor.shot(guid).is_some_and(|shot| shot.parent() == Guid::NONE)
}

/// Looks at one image. A header that makes no sense is for those who open it.
pub(crate) fn look(
    descriptor: &DiskDescriptor,
    image: &Image,
    storage: &dyn Storage,
) -> Result<Vec<Disagreement>> {
    let header = match probe(storage) {
        Ok(Probe::Image(header)) => Some(header),
        Ok(Probe::NotAnImage) => None,
        Err(error) if error.kind() == ErrorKind::Corrupt => None,
        Err(error) => return Err(error),
    };
    if !says_raw(descriptor, image.guid()) {
        let held = header.map(|header| sizes_of(&header).0);
        return Ok(held.and_then(|held| shortfall(descriptor, image, held, false)).into_iter().collect());
    }
    let file_bytes =
        storage.len().map_err(|cause| Error::io(ErrorKind::Stat, "measure the raw image", cause))?;
    let mut found = Vec::new();
    if let Some((disk, cluster)) = header.as_ref().map(sizes_of)
        && header_fits(descriptor, image.guid(), (disk, cluster), file_bytes)
    {
        found.push(Disagreement::ImageSaidRaw {
            file: image.file().to_owned(),
            header_disk_bytes: disk.checked_bytes().unwrap_or(u64::MAX),
        });
    }
    found.extend(shortfall(descriptor, image, Sectors::covering(file_bytes), true));
    Ok(found)
}
