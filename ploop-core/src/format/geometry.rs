//! Sizes of one image, validated once: every product and every conversion between guest addresses, file addresses
//! and table entries goes through a [`Geometry`].
//!
//! Two kinds of limits: [`Geometry::new`] admits what we create (image format 1.5 and 1.6), `from_header` what may
//! be read: every legal odd image of other writers, with clusters of 63 sectors, data that starts right behind the
//! table and disks that end inside a cluster.
//!
//! Invariants: the cluster is not empty; `file_offset` of every [`FileCluster`] and the end of that cluster fit 64
//! bits; `data_start` is a multiple of 512 and not before the end of the table.

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::units::{FileCluster, FileOffset, GuestCluster, GuestOffset, SECTOR_BYTES, Sectors};

use super::header::HEADER_BYTES;

/// Bytes of one table entry.
pub const ENTRY_BYTES: u64 = 4;
/// The entry that no file may hold: kernels use it in memory as "not mapped".
pub const ENTRY_FORBIDDEN: u32 = u32::MAX;
/// Smallest cluster we create, in sectors (32 KiB).
pub const CLUSTER_SECTORS_MIN: u32 = 64;
/// Largest cluster we create or write to, in sectors (64 MiB).
pub const CLUSTER_SECTORS_MAX: u32 = 131_072;
/// The usual cluster, in sectors (1 MiB).
pub const CLUSTER_SECTORS_DEFAULT: u32 = 2048;
/// Largest cluster we read, in sectors: what the other implementation accepts.
pub const CLUSTER_SECTORS_READ_MAX: u32 = 4_186_127;
/// Most table entries we create: more cannot be opened by the other implementation.
pub const ENTRIES_MAX: u32 = 536_870_911;
/// Most table entries we read.
pub const ENTRIES_READ_MAX: u32 = 0xFFFF_FFFC;
/// Largest disk of a version 1 image, in sectors.
pub const V1_DISK_SECTORS_MAX: u64 = 0xFFFF_FFFF;

/// Which of the two formats: they differ in signature and in the unit of table entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// Entries count sectors; the file ends at 2 TiB.
    V1,
    /// Entries count clusters.
    V2,
}

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::V1 => "1",
            Self::V2 => "2",
        })
    }
}

/// The sizes of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    version: Version,
    cluster_sectors: u32,
    cluster_bytes: u64,
    /// What one unit of a table entry stands for, in bytes.
    entry_unit_bytes: u64,
    disk_sectors: u64,
    disk_bytes: u64,
    entries: u32,
    data_start: u64,
    /// No header and no table: guest bytes are file bytes.
    raw: bool,
}

/// Where a header says how many entries its table has, and how many sectors the disk.
const ENTRIES_OFFSET: u64 = 32;
const DISK_OFFSET: u64 = 36;

fn parameter(message: String) -> Error {
    Error::new(ErrorKind::Parameter, message)
}

/// Bytes of header and table of `entries` entries.
fn table_bytes(entries: u32) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(entries)
}

impl Geometry {
    /// The geometry of an image to be created: `cluster` is a power of two from 64 to 131072 sectors, `disk` a
    /// multiple of it (the caller has rounded). Fails with `Parameter` beyond a limit of the version.
    pub fn new(version: Version, cluster: Sectors, disk: Sectors) -> Result<Self> {
        if !disk.0.is_multiple_of(cluster.0.max(1)) {
            return Err(parameter(format!(
                "disk of {disk}: not a positive multiple of its clusters of {cluster}"
            )));
        }
        Self::exact(version, cluster, disk)
    }

    /// The same for a disk that may end inside its last cluster, which still takes a whole one in the file. The kernel
    /// driver of the original refuses such an image; QEMU and this program do not.
    pub fn exact(version: Version, cluster: Sectors, disk: Sectors) -> Result<Self> {
        let cluster_sectors = u32::try_from(cluster.0)
            .ok()
            .filter(|sectors| sectors.is_power_of_two())
            .filter(|sectors| (CLUSTER_SECTORS_MIN..=CLUSTER_SECTORS_MAX).contains(sectors))
            .ok_or_else(|| {
                parameter(format!("cluster of {cluster}: not a power of two from 64 to 131072 sectors"))
                    .advise("use 2048 sectors (1 MiB) unless there is a reason not to")
            })?;
        if disk.0 == 0 {
            return Err(parameter("a disk of 0 sectors is none".into()));
        }
        Self::build(version, cluster_sectors, disk)
    }

    /// The geometry of an empty image to stand on an image of this one: version, cluster and disk are the same.
    pub fn for_child(&self) -> Result<Self> {
        Self::build(self.version, self.cluster_sectors, Sectors(self.disk_sectors))
    }

    /// A geometry with clusters of any size from 1 sector, for tests that want small state spaces.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_testing(version: Version, cluster: Sectors, disk: Sectors) -> Result<Self> {
        let cluster_sectors = u32::try_from(cluster.0)
            .ok()
            .filter(|sectors| (1..=CLUSTER_SECTORS_MAX).contains(sectors))
            .ok_or_else(|| parameter(format!("cluster of {cluster}")))?;
        Self::build(version, cluster_sectors, disk)
    }

    fn build(version: Version, cluster_sectors: u32, disk: Sectors) -> Result<Self> {
        let cluster_bytes = u64::from(cluster_sectors) * SECTOR_BYTES;
        let disk_bytes = disk
            .checked_bytes()
            .ok_or_else(|| parameter(format!("disk of {disk}: more than 64 bits of bytes")))?;
        if version == Version::V1 && disk.0 > V1_DISK_SECTORS_MAX {
            return Err(parameter(format!(
                "disk of {disk}: version 1 ends at {V1_DISK_SECTORS_MAX} sectors"
            ))
            .advise("use version 2"));
        }
        let entries = u32::try_from(disk.0.div_ceil(u64::from(cluster_sectors)))
            .ok()
            .filter(|&entries| entries <= ENTRIES_MAX)
            .ok_or_else(|| {
                parameter(format!(
                    "disk of {disk}: more than {ENTRIES_MAX} clusters of {cluster_sectors} sectors"
                ))
                .advise("use larger clusters")
            })?;
        let data_start = table_bytes(entries).div_ceil(cluster_bytes) * cluster_bytes;
        let geometry = Self {
            version,
            cluster_sectors,
            cluster_bytes,
            entry_unit_bytes: entry_unit_bytes(version, cluster_bytes),
            disk_sectors: disk.0,
            disk_bytes,
            entries,
            data_start,
            raw: false,
        };
        // Every cluster of the disk must find a place that an entry can name.
        let clusters_in_file = u64::from(geometry.first_data_cluster().0) + u64::from(entries);
        if clusters_in_file > u64::from(geometry.file_clusters_max()) {
            return Err(parameter(format!(
                "disk of {disk}: its last clusters would lie where a version {version} table cannot point"
            ))
            .advise("use version 2 or a smaller disk"));
        }
        Ok(geometry)
    }

    /// The geometry of this image with a disk of `disk`, which is a multiple of the cluster unless the disk ends at a
    /// limit of the version. Clusters keep their place: the data start moves by whole clusters, up as far as the longer
    /// table asks for, and down only if it was as low as it can be. Fails with `Parameter` beyond a limit.
    pub fn resized(&self, disk: Sectors) -> Result<Self> {
        let cluster = Sectors(u64::from(self.cluster_sectors));
        if disk.0 == 0 {
            return Err(parameter("a disk of 0 sectors is none".into()));
        }
        if self.raw {
            // The limits of an image hold for a raw disk as well: it may get snapshots.
            Self::build(Version::V2, self.cluster_sectors, disk)?;
            let bytes = disk
                .checked_bytes()
                .ok_or_else(|| parameter(format!("disk of {disk}: more than 64 bits of bytes")))?;
            return Self::raw(cluster, bytes);
        }
        let mut resized = Self::build(self.version, self.cluster_sectors, disk)?;
        let least = |entries: u32| {
            let table_end = table_bytes(entries).next_multiple_of(SECTOR_BYTES);
            let phase = self.phase_bytes();
            table_end.saturating_sub(phase).div_ceil(self.cluster_bytes) * self.cluster_bytes + phase
        };
        let (least_before, least_after) = (least(self.entries), least(resized.entries));
        resized.data_start =
            if self.data_start == least_before { least_after } else { self.data_start.max(least_after) };
        if u32::try_from(resized.data_start / SECTOR_BYTES).is_err() {
            return Err(parameter(format!("disk of {disk}: its table is too long for the header"))
                .advise("use larger clusters"));
        }
        let clusters_in_file = u64::from(resized.first_data_cluster().0) + u64::from(resized.entries);
        if clusters_in_file > u64::from(resized.file_clusters_max()) {
            return Err(parameter(format!(
                "disk of {disk}: its last clusters would lie where a version {} table cannot point",
                self.version
            ))
            .advise("use version 2 or a smaller disk"));
        }
        Ok(resized)
    }

    /// The size a disk gets that is asked to have `disk`: rounded up to whole clusters, or down where rounding up would
    /// pass the limit of version 1.
    pub fn rounded(&self, disk: Sectors) -> Sectors {
        let cluster = u64::from(self.cluster_sectors);
        match disk.0.checked_next_multiple_of(cluster) {
            Some(up) if self.raw || self.version == Version::V2 || up <= V1_DISK_SECTORS_MAX => Sectors(up),
            _ if disk.0 <= V1_DISK_SECTORS_MAX => Sectors(disk.0 - disk.0 % cluster),
            _ => disk,
        }
    }

    /// What the numbers of a header mean, for reading. `data_start` is where data may begin, in bytes; the header
    /// module has found it to be sane.
    pub(crate) fn from_header(
        version: Version,
        cluster_sectors: u32,
        disk_sectors: u64,
        entries: u32,
        data_start: u64,
    ) -> Result<Self> {
        let corrupt = |message: String| Error::new(ErrorKind::Corrupt, message);
        if !(1..=CLUSTER_SECTORS_READ_MAX).contains(&cluster_sectors) {
            return Err(corrupt(format!(
                "read header: cluster of {cluster_sectors} sectors is not in 1..={CLUSTER_SECTORS_READ_MAX}"
            )));
        }
        if entries > ENTRIES_READ_MAX {
            return Err(corrupt(format!(
                "read header: table of {entries} entries, more than {ENTRIES_READ_MAX}"
            )));
        }
        for (value, what, offset) in [
            (u64::from(entries), "table of 0 entries", ENTRIES_OFFSET),
            (disk_sectors, "disk of 0 sectors", DISK_OFFSET),
        ] {
            if value == 0 {
                return Err(corrupt(format!("read header: {what}, where at least 1 is expected"))
                    .at_offset(offset)
                    .advise("an image of nothing holds nothing; if this one held something, restore its header from a backup"));
            }
        }
        let cluster_bytes = u64::from(cluster_sectors) * SECTOR_BYTES;
        let disk_bytes = disk_sectors
            .checked_mul(SECTOR_BYTES)
            .filter(|&bytes| bytes <= i64::MAX.unsigned_abs())
            .ok_or_else(|| {
                corrupt(format!("read header: disk of {disk_sectors} sectors does not fit 63 bits"))
            })?;
        if data_start < table_bytes(entries) || !data_start.is_multiple_of(SECTOR_BYTES) {
            return Err(corrupt(format!("read header: data at byte {data_start} lies inside the table")));
        }
        // A cluster number and its end stay below 2^32 * 2^31 + 2^42.
        Ok(Self {
            version,
            cluster_sectors,
            cluster_bytes,
            entry_unit_bytes: entry_unit_bytes(version, cluster_bytes),
            disk_sectors,
            disk_bytes,
            entries,
            data_start,
            raw: false,
        })
    }

    /// A raw base of `len_bytes` bytes seen in clusters of `cluster`: file byte is guest byte. A partial last
    /// sector counts as a whole one.
    pub fn raw(cluster: Sectors, len_bytes: u64) -> Result<Self> {
        let cluster_sectors = u32::try_from(cluster.0)
            .ok()
            .filter(|sectors| (1..=CLUSTER_SECTORS_READ_MAX).contains(sectors))
            .ok_or_else(|| parameter(format!("raw image in clusters of {cluster}")))?;
        let cluster_bytes = u64::from(cluster_sectors) * SECTOR_BYTES;
        let disk = Sectors::covering(len_bytes);
        let disk_bytes = disk
            .checked_bytes()
            .filter(|&bytes| bytes <= i64::MAX.unsigned_abs())
            .ok_or_else(|| parameter(format!("raw image of {len_bytes} bytes does not fit 63 bits")))?;
        let entries = u32::try_from(len_bytes.div_ceil(cluster_bytes))
            .ok()
            .filter(|&entries| entries <= ENTRIES_READ_MAX)
            .ok_or_else(|| {
                parameter(format!("raw image of {len_bytes} bytes: too many clusters of {cluster}"))
                    .advise("use larger clusters")
            })?;
        Ok(Self {
            version: Version::V2,
            cluster_sectors,
            cluster_bytes,
            entry_unit_bytes: cluster_bytes,
            disk_sectors: disk.0,
            disk_bytes,
            entries,
            data_start: 0,
            raw: true,
        })
    }

    /// Format version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether this is a raw base, without header and table.
    pub fn is_raw(&self) -> bool {
        self.raw
    }

    /// Sectors in a cluster; at least 1.
    pub fn cluster_sectors(&self) -> u32 {
        self.cluster_sectors
    }

    /// Bytes in a cluster; at least 512.
    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// Size of the disk.
    pub fn disk_sectors(&self) -> Sectors {
        Sectors(self.disk_sectors)
    }

    /// Size of the disk in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Table entries. One per cluster of the disk in a sound image; some writers keep more, a damaged image has
    /// fewer.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Header and table in bytes, not rounded; 0 for a raw base.
    pub fn table_bytes(&self) -> u64 {
        if self.raw { 0 } else { table_bytes(self.entries) }
    }

    /// First byte of the file where data clusters may be.
    pub fn data_start(&self) -> FileOffset {
        FileOffset(self.data_start)
    }

    /// The lowest cluster of the file that may hold data.
    pub fn first_data_cluster(&self) -> FileCluster {
        // Below 2^34 / 512: a table has at most 2^32 entries of 4 bytes, `data_start` at most 2^32 sectors.
        FileCluster(u32::try_from(self.data_start / self.cluster_bytes).unwrap_or(u32::MAX))
    }

    /// File cluster `n` is at `n * cluster_bytes + phase_bytes`. Zero but for odd version 1 images.
    pub fn phase_bytes(&self) -> u64 {
        self.data_start % self.cluster_bytes
    }

    /// Where a cluster begins in the file.
    pub fn file_offset(&self, cluster: FileCluster) -> FileOffset {
        FileOffset(u64::from(cluster.0) * self.cluster_bytes + self.phase_bytes())
    }

    /// The byte after a cluster in the file.
    pub fn file_end(&self, cluster: FileCluster) -> FileOffset {
        FileOffset(self.file_offset(cluster).0 + self.cluster_bytes)
    }

    /// Whole clusters, counted from cluster 0, in a file of `len` bytes. More than entries can name are not counted.
    pub fn clusters_in(&self, len: u64) -> u32 {
        let clusters = len.saturating_sub(self.phase_bytes()) / self.cluster_bytes;
        u32::try_from(clusters).unwrap_or(u32::MAX).min(self.file_clusters_max())
    }

    /// One more than the highest cluster an entry can name.
    pub fn file_clusters_max(&self) -> u32 {
        let last_entry = u64::from(ENTRY_FORBIDDEN - 1);
        let last = match self.version {
            Version::V1 => {
                (last_entry * SECTOR_BYTES).saturating_sub(self.phase_bytes()) / self.cluster_bytes
            }
            Version::V2 => last_entry,
        };
        u32::try_from(last + 1).unwrap_or(u32::MAX)
    }

    /// The guest cluster that holds `offset`, and how many bytes into it. The offset lies inside the disk; past it
    /// the highest cluster number stands for "none".
    pub fn guest_cluster(&self, offset: GuestOffset) -> (GuestCluster, u64) {
        let index = u32::try_from(offset.0 / self.cluster_bytes).unwrap_or(u32::MAX);
        (GuestCluster(index), offset.0 % self.cluster_bytes)
    }

    /// The guest bytes of a cluster, cut at the end of the disk.
    pub fn cluster_extent(&self, cluster: GuestCluster) -> Extent {
        let start = u64::from(cluster.0) * self.cluster_bytes;
        Extent::between(start.min(self.disk_bytes), (start + self.cluster_bytes).min(self.disk_bytes))
    }

    /// The cluster that a table entry names; `None` for 0. Fails with `Corrupt` for an entry that names no cluster
    /// or one before the data; whether the file reaches that far is for the caller to see.
    pub fn entry_to_cluster(&self, raw: u32) -> Result<Option<FileCluster>> {
        if raw == 0 {
            return Ok(None);
        }
        let corrupt =
            |what: &str| Err(Error::new(ErrorKind::Corrupt, format!("table entry {raw:#x} {what}")));
        if raw == ENTRY_FORBIDDEN {
            return corrupt("is reserved and may not be in a file");
        }
        let offset = self.entry_offset(raw).0;
        if offset < self.data_start {
            return corrupt("points into header or table");
        }
        if !(offset - self.data_start).is_multiple_of(self.cluster_bytes) {
            return corrupt("does not point to the start of a cluster");
        }
        match u32::try_from(offset / self.cluster_bytes) {
            Ok(cluster) => Ok(Some(FileCluster(cluster))),
            Err(_) => corrupt("points past the last cluster number"),
        }
    }

    /// The file byte a table entry stands for, whatever it is.
    pub(crate) fn entry_offset(&self, raw: u32) -> FileOffset {
        FileOffset(u64::from(raw) * self.entry_unit_bytes)
    }

    /// The table entry that names `cluster`. Fails with `Allocate` where the version cannot point so far.
    pub fn cluster_to_entry(&self, cluster: FileCluster) -> Result<u32> {
        let units = self.file_offset(cluster).0 / self.entry_unit_bytes;
        u32::try_from(units).ok().filter(|&entry| entry != ENTRY_FORBIDDEN && entry != 0).ok_or_else(|| {
            Error::new(
                ErrorKind::Allocate,
                format!("a version {} table cannot point to {cluster}", self.version),
            )
            .advise("compact the image, or convert it to version 2")
        })
    }

    /// Bytes of the disk that the table has no entry for; not 0 only in a damaged image.
    pub fn bytes_beyond_table(&self) -> u64 {
        self.disk_bytes.saturating_sub(u64::from(self.entries) * self.cluster_bytes)
    }
}

fn entry_unit_bytes(version: Version, cluster_bytes: u64) -> u64 {
    match version {
        Version::V1 => SECTOR_BYTES,
        Version::V2 => cluster_bytes,
    }
}

/// Cylinders and heads as the original computes them for a disk of `sectors` (image format 1.5). Informative only.
pub(crate) fn cylinders_and_heads(sectors: u64) -> (u32, u32) {
    // Only the low 32 bits have ever been stored.
    let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
    if sectors > 1_032_192 && sectors < 16_777_216 {
        return (low(sectors / 1008), 16);
    }
    let tracks = [63u64, 32, 16, 8].into_iter().find(|&tracks| sectors.is_multiple_of(tracks));
    let by_tracks = tracks.map(|tracks| sectors / tracks);
    let heads =
        by_tracks.and_then(|rest| [16u32, 8, 4, 2].into_iter().find(|&h| rest.is_multiple_of(u64::from(h))));
    match (by_tracks, heads) {
        (Some(rest), Some(heads)) => (low(rest / u64::from(heads)), heads),
        _ => (low(sectors), 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(version: Version, cluster: u64, disk: u64) -> Result<Geometry> {
        Geometry::new(version, Sectors(cluster), Sectors(disk))
    }

    #[test]
    fn creates_only_within_the_limits() {
        let usual = of(Version::V2, 2048, 2048 * 10).unwrap();
        assert_eq!((usual.entries(), usual.data_start()), (10, FileOffset(1 << 20)));
        assert_eq!((usual.first_data_cluster(), usual.phase_bytes()), (FileCluster(1), 0));
        for (cluster, disk) in [
            (0, 2048),
            (32, 2048),
            (63, 63),
            (96, 960),
            (262_144, 262_144),
            (1 << 40, 1 << 40),
            (2048, 0),
            (2048, 2047),
            (64, (u64::from(ENTRIES_MAX) + 1) * 64),
            (64, u64::MAX - 63),
        ] {
            assert_eq!(
                of(Version::V2, cluster, disk).unwrap_err().kind(),
                ErrorKind::Parameter,
                "{cluster} {disk}"
            );
        }
        assert!(of(Version::V2, 64, u64::from(ENTRIES_MAX) * 64).is_ok());
        assert!(of(Version::V2, 131_072, 131_072).is_ok());
    }

    #[test]
    fn version_1_ends_where_its_entries_do() {
        // 2^32 sectors in clusters of 2048: header clusters and all data below sector 2^32.
        let clusters = (1u64 << 32) / 2048;
        let header = (64 + 4 * clusters).div_ceil(1 << 20);
        assert!(of(Version::V1, 2048, (clusters - header) * 2048).is_ok());
        assert!(of(Version::V1, 2048, (clusters - header + 1) * 2048).is_err());
        assert!(of(Version::V1, 2048, clusters * 2048).is_err());
        assert!(of(Version::V2, 2048, clusters * 2048).is_ok());
    }

    #[test]
    fn table_sizes_of_the_specification() {
        // The examples of other writers: 64 KiB clusters, 16368 entries fill one cluster.
        assert_eq!(of(Version::V2, 128, 16_368 * 128).unwrap().data_start(), FileOffset(65_536));
        assert_eq!(of(Version::V2, 128, 16_369 * 128).unwrap().data_start(), FileOffset(131_072));
        assert_eq!(of(Version::V2, 2048, 2_097_152 * 2048).unwrap().data_start(), FileOffset(9_437_184));
    }

    #[test]
    fn odd_version_1_images() {
        // Clusters of 63 sectors, data right behind the table.
        let geometry = Geometry::from_header(Version::V1, 63, 630, 10, 512).unwrap();
        assert_eq!((geometry.phase_bytes(), geometry.first_data_cluster()), (512, FileCluster(0)));
        assert_eq!(geometry.entry_to_cluster(1).unwrap(), Some(FileCluster(0)));
        assert_eq!(geometry.entry_to_cluster(64).unwrap(), Some(FileCluster(1)));
        assert_eq!(geometry.file_offset(FileCluster(1)), FileOffset(64 * 512));
        assert!(geometry.entry_to_cluster(63).is_err());
        assert_eq!(geometry.cluster_to_entry(FileCluster(2)).unwrap(), 127);
    }

    #[test]
    fn entries_into_metadata_are_refused() {
        let geometry = of(Version::V2, 64, 64 * 20_000).unwrap();
        assert_eq!(geometry.first_data_cluster(), FileCluster(3));
        assert_eq!(geometry.entry_to_cluster(0).unwrap(), None);
        for raw in [1, 2, ENTRY_FORBIDDEN] {
            assert_eq!(geometry.entry_to_cluster(raw).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert_eq!(geometry.entry_to_cluster(3).unwrap(), Some(FileCluster(3)));
    }

    #[test]
    fn the_last_cluster_is_cut_at_the_end_of_the_disk() {
        let geometry = Geometry::from_header(Version::V2, 64, 100, 2, 32_768).unwrap();
        assert_eq!(geometry.cluster_extent(GuestCluster(1)), Extent::between(32_768, 51_200));
        assert!(geometry.cluster_extent(GuestCluster(2)).is_empty());
        assert_eq!(geometry.bytes_beyond_table(), 0);
        assert_eq!(
            Geometry::from_header(Version::V2, 64, 200, 2, 32_768).unwrap().bytes_beyond_table(),
            36_864
        );
    }

    #[test]
    fn raw_bases_have_no_table() {
        let geometry = Geometry::raw(Sectors(64), 40_000).unwrap();
        assert_eq!((geometry.entries(), geometry.table_bytes(), geometry.disk_bytes()), (2, 0, 40_448));
        assert!(Geometry::raw(Sectors(0), 1).is_err());
        assert!(Geometry::raw(Sectors(1), u64::MAX).is_err());
    }

    #[test]
    fn cylinders_and_heads_as_the_original() {
        // Values of images the original wrote.
        assert_eq!(cylinders_and_heads(40_960), (80, 16));
        assert_eq!(cylinders_and_heads(32_768), (64, 16));
        assert_eq!(cylinders_and_heads(2_097_152), (2080, 16));
        assert_eq!(cylinders_and_heads(7), (7, 1));
        assert_eq!(cylinders_and_heads(63), (63, 1));
    }

    fn any_geometry() -> impl Strategy<Value = Geometry> {
        let version = prop_oneof![Just(Version::V1), Just(Version::V2)];
        (version, 1..=CLUSTER_SECTORS_READ_MAX, any::<u64>(), 0..=ENTRIES_READ_MAX, 0u64..1 << 32)
            .prop_filter_map("no geometry", |(version, cluster, disk, entries, data)| {
                let entries = entries >> (data % 32);
                let data = match version {
                    Version::V1 => data.max(Sectors::covering(table_bytes(entries)).0),
                    Version::V2 => {
                        let least = table_bytes(entries).div_ceil(u64::from(cluster) * 512);
                        (data / u64::from(cluster)).max(least) * u64::from(cluster)
                    }
                };
                Geometry::from_header(version, cluster, disk >> (disk % 50), entries, data * 512).ok()
            })
    }

    proptest! {
        #[test]
        fn entries_and_clusters_agree_with_wide_arithmetic(
            geometry in any_geometry(),
            raw in any::<u32>(),
            cluster in any::<u32>(),
        ) {
            let cluster_bytes = u128::from(geometry.cluster_sectors()) * 512;
            let unit = if geometry.version() == Version::V1 { 512 } else { cluster_bytes };
            let data_start = u128::from(geometry.data_start().0);
            let place = u128::from(raw) * unit;
            let expected = (raw != u32::MAX && place >= data_start && (place - data_start).is_multiple_of(cluster_bytes))
                .then_some(place);
            match geometry.entry_to_cluster(raw) {
                Ok(None) => prop_assert_eq!(raw, 0),
                Ok(Some(found)) => {
                    prop_assert_eq!(Some(u128::from(geometry.file_offset(found).0)), expected);
                    prop_assert_eq!(geometry.cluster_to_entry(found).unwrap(), raw);
                    prop_assert!(found >= geometry.first_data_cluster());
                    prop_assert!(found.0 < geometry.file_clusters_max());
                }
                Err(_) => prop_assert!(raw != 0 && expected.is_none()),
            }
            let offset = u128::from(cluster) * cluster_bytes + data_start % cluster_bytes;
            prop_assert_eq!(u128::from(geometry.file_offset(FileCluster(cluster)).0), offset);
            let entry = offset / unit;
            let can_be_named = entry != 0 && entry < u128::from(u32::MAX);
            prop_assert_eq!(geometry.cluster_to_entry(FileCluster(cluster)).is_ok(), can_be_named);
        }

        #[test]
        fn guest_clusters_agree_with_wide_arithmetic(geometry in any_geometry(), at in any::<u64>()) {
            let cluster_bytes = u128::from(geometry.cluster_sectors()) * 512;
            let at = at % geometry.disk_bytes().max(1);
            let (cluster, within) = geometry.guest_cluster(GuestOffset(at));
            if u128::from(at) / cluster_bytes <= u128::from(u32::MAX) {
                prop_assert_eq!(u128::from(cluster.0) * cluster_bytes + u128::from(within), u128::from(at));
                let extent = geometry.cluster_extent(cluster);
                prop_assert_eq!(u128::from(extent.start()), u128::from(cluster.0) * cluster_bytes);
                let end = (u128::from(extent.start()) + cluster_bytes).min(u128::from(geometry.disk_bytes()));
                prop_assert_eq!(u128::from(extent.end()), end.max(u128::from(extent.start())));
            }
        }

        #[test]
        fn clusters_in_a_file_agree_with_wide_arithmetic(geometry in any_geometry(), len in any::<u64>()) {
            let count = geometry.clusters_in(len);
            prop_assert!(count == 0 || u128::from(geometry.file_end(FileCluster(count - 1)).0) <= u128::from(len));
            let next = u128::from(geometry.file_offset(FileCluster(count)).0) + u128::from(geometry.cluster_bytes());
            prop_assert!(next > u128::from(len) || count == geometry.file_clusters_max());
        }

        #[test]
        fn created_disks_have_a_place_for_every_cluster(
            v1 in any::<bool>(), log in 6u32..18, clusters in 1u64..1 << 33,
        ) {
            let version = if v1 { Version::V1 } else { Version::V2 };
            let clusters = clusters >> (clusters % 33);
            if let Ok(geometry) = of(version, 1 << log, clusters << log) {
                let last = geometry.first_data_cluster().0 + geometry.entries() - 1;
                prop_assert!(geometry.cluster_to_entry(FileCluster(last)).is_ok());
                prop_assert!(geometry.data_start().0 >= geometry.table_bytes());
            }
        }
    }
}
