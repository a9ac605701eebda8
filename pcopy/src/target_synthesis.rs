//! An image file that comes into being while its content is sent: clusters take their places in the order in which they
//! are first sent, and header and table, known only then, are written last.
//!
//! Until the header is there the file is no image: whatever cuts the stream leaves nothing that could be taken for a
//! copy.

use ploop_core::format::{Geometry, Header, Version};
use ploop_core::units::{FileCluster, Sectors};
use ploop_core::{Error, ErrorKind, Result};

/// The flag "nothing was ever written".
const FLAG_EMPTY: u32 = 1;
/// Bytes of the header, which shares its sector with the first entries.
const HEADER_BYTES: u64 = 64;
/// Bytes of an entry.
const ENTRY_BYTES: u64 = 4;

/// The table of an image to come.
#[derive(Debug)]
pub(crate) struct SynthesizedImage {
    geometry: Geometry,
    entries: Vec<u32>,
    next: FileCluster,
}

impl SynthesizedImage {
    /// An expanded image for a disk of `disk_bytes`, which is a multiple of a sector, with nothing in it.
    pub(crate) fn new(version: u8, cluster_sectors: u32, disk_bytes: u64) -> Result<Self> {
        let version = if version == 1 { Version::V1 } else { Version::V2 };
        let cluster = u64::from(cluster_sectors.max(1));
        let disk = Sectors::covering(disk_bytes).0.checked_next_multiple_of(cluster);
        let disk = disk.ok_or_else(|| Error::new(ErrorKind::Parameter, "the disk is too large"))?;
        let geometry = Geometry::new(version, Sectors(cluster), Sectors(disk))?;
        let count = usize::try_from(geometry.entries())
            .map_err(|_| Error::new(ErrorKind::Memory, "the table is too long for this machine"))?;
        let mut entries = Vec::new();
        entries.try_reserve_exact(count).map_err(|cause| {
            Error::new(ErrorKind::Memory, "no memory for the table of the copy").caused_by(cause)
        })?;
        entries.resize(count, 0);
        let next = geometry.first_data_cluster();
        Ok(Self { geometry, entries, next })
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.geometry.cluster_bytes()
    }

    /// The file offset of a guest cluster that has a place.
    pub(crate) fn find(&self, cluster: u64) -> Result<Option<u64>> {
        let raw = usize::try_from(cluster).ok().and_then(|cluster| self.entries.get(cluster)).copied();
        let place = self.geometry.entry_to_cluster(raw.unwrap_or(0))?;
        Ok(place.map(|place| self.geometry.file_offset(place).0))
    }

    /// Gives a guest cluster that has none the next place; its file offset.
    pub(crate) fn place(&mut self, cluster: u64) -> Result<u64> {
        let raw = self.geometry.cluster_to_entry(self.next)?;
        let entry = usize::try_from(cluster).ok().and_then(|cluster| self.entries.get_mut(cluster));
        let entry =
            entry.ok_or_else(|| Error::new(ErrorKind::System, "a cluster past the end of the disk"))?;
        *entry = raw;
        let offset = self.geometry.file_offset(self.next).0;
        let next = self.next.0.checked_add(1);
        self.next =
            FileCluster(next.ok_or_else(|| Error::new(ErrorKind::Parameter, "the image grows too large"))?);
        Ok(offset)
    }

    /// Where header and table end and data begin.
    pub(crate) fn head_bytes(&self) -> u64 {
        self.geometry.data_start().0
    }

    /// `len` bytes of header, table and what lies between them and the data, from file byte `start`; both are multiples
    /// of a sector.
    pub(crate) fn head(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        let mut raw = Header::create(&self.geometry)?.raw().clone();
        raw.flags &= !FLAG_EMPTY;
        let header = raw.encode();
        let mut bytes = Vec::new();
        for word in (start..start.saturating_add(len)).step_by(4) {
            match word.checked_sub(HEADER_BYTES) {
                None => {
                    let at = usize::try_from(word).unwrap_or(usize::MAX);
                    bytes.extend(header.iter().skip(at).take(4));
                }
                Some(word) => {
                    let entry = usize::try_from(word / ENTRY_BYTES).ok().and_then(|at| self.entries.get(at));
                    bytes.extend(entry.copied().unwrap_or(0).to_le_bytes());
                }
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_core::format::{Probe, probe};
    use ploop_core::io::sim::SimDisk;
    use ploop_core::io::{Storage, StorageExt};

    #[test]
    fn clusters_lie_in_the_order_they_came() {
        for (version, cluster_sectors) in [(2, 64), (1, 64), (2, 2048)] {
            let cluster = u64::from(cluster_sectors) * 512;
            let mut image = SynthesizedImage::new(version, cluster_sectors, 20 * cluster - 512).unwrap();
            assert_eq!(image.find(3).unwrap(), None);
            let first = image.place(7).unwrap();
            let second = image.place(3).unwrap();
            assert_eq!((first, second), (image.head_bytes(), image.head_bytes() + cluster));
            assert_eq!((image.find(7).unwrap(), image.find(3).unwrap()), (Some(first), Some(second)));
            assert!(image.place(20).is_err());

            let file = SimDisk::new(1).create("image").unwrap();
            file.set_len(second + cluster).unwrap();
            // In pieces as in one.
            for start in (0..image.head_bytes()).step_by(512) {
                file.write_all_at(start, &image.head(start, 512).unwrap()).unwrap();
            }
            let mut whole = vec![0; usize::try_from(image.head_bytes()).unwrap()];
            file.read_exact_at(0, &mut whole).unwrap();
            assert_eq!(whole, image.head(0, image.head_bytes()).unwrap());
            let Probe::Image(header) = probe(&file).unwrap() else { panic!("no image") };
            assert_eq!(header.geometry().disk_bytes(), 20 * cluster);
            assert_eq!((header.raw().flags, header.raw().in_use), (0, 0));
        }
    }

    #[test]
    fn disks_that_the_format_cannot_hold_are_refused() {
        assert!(SynthesizedImage::new(1, 2048, 4 << 40).is_err());
        assert!(SynthesizedImage::new(2, 0, 1 << 20).is_err());
        assert!(SynthesizedImage::new(2, 2048, u64::MAX).is_err());
    }
}
