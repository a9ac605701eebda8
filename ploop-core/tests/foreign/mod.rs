//! Images written by hand, byte for byte, without the library; and the other implementation as a referee.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: they fail by panicking, their numbers are small, and each test uses some of them"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use ploop_core::format::{Chain, ChainOptions, Mapping, Source};
use ploop_core::io::file::{Caching, FileStorage, OpenOptions};
use ploop_core::io::{Access, StorageExt};
use ploop_core::units::{GuestOffset, Sectors};

pub(crate) const SECTOR: u64 = 512;
pub(crate) const CLOSED: u32 = 0;
pub(crate) const CLOSED_WITH_EXTENSION: u32 = 0x312E_3276;
pub(crate) const OPEN: u32 = 0x746F_6E59;

/// An image as somebody else may have written it.
#[derive(Clone, Debug)]
pub(crate) struct Handmade {
    pub(crate) name: &'static str,
    pub(crate) version: u8,
    pub(crate) cluster_sectors: u64,
    pub(crate) disk_sectors: u64,
    pub(crate) entries: u64,
    /// As the header says it, in sectors.
    pub(crate) data_offset_sectors: u64,
    /// Where clusters really begin, in sectors.
    pub(crate) data_sectors: u64,
    pub(crate) in_use: u32,
    pub(crate) size_high_half: u32,
    pub(crate) extension_sectors: u64,
    /// Guest cluster, and the number of its place behind the start of the data.
    pub(crate) places: Vec<(u64, u64)>,
    /// Guest clusters that are named and were never written: holes of the file.
    pub(crate) holes: Vec<u64>,
    /// Bytes by which the file is longer, or shorter, than its last cluster asks for.
    pub(crate) tail_bytes: i64,
}

impl Handmade {
    /// A closed image whose data begin where the original puts them.
    pub(crate) fn new(name: &'static str, version: u8, cluster_sectors: u64, disk_sectors: u64) -> Self {
        let entries = disk_sectors.div_ceil(cluster_sectors);
        let data = (64 + 4 * entries).div_ceil(cluster_sectors * SECTOR) * cluster_sectors;
        Self {
            name,
            version,
            cluster_sectors,
            disk_sectors,
            entries,
            data_offset_sectors: data,
            data_sectors: data,
            in_use: CLOSED,
            size_high_half: 0,
            extension_sectors: 0,
            places: Vec::new(),
            holes: Vec::new(),
            tail_bytes: 0,
        }
    }

    /// Data that begin at this sector, whatever the header says.
    pub(crate) fn data_at(self, header: u64, real: u64) -> Self {
        Self { data_offset_sectors: header, data_sectors: real, ..self }
    }

    pub(crate) fn placed(self, places: &[(u64, u64)]) -> Self {
        Self { places: places.to_vec(), ..self }
    }

    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.cluster_sectors * SECTOR
    }

    pub(crate) fn table_end_sectors(&self) -> u64 {
        (64 + 4 * self.entries).div_ceil(SECTOR)
    }

    fn place_offset(&self, place: u64) -> u64 {
        (self.data_sectors + place * self.cluster_sectors) * SECTOR
    }

    /// The entry that names a place.
    pub(crate) fn entry(&self, place: u64) -> u32 {
        let offset = self.place_offset(place);
        let unit = if self.version == 1 { SECTOR } else { self.cluster_bytes() };
        assert!(offset.is_multiple_of(unit), "{}: a table cannot name this place", self.name);
        u32::try_from(offset / unit).unwrap()
    }

    /// Writes the file.
    pub(crate) fn write(&self, path: &Path) {
        let file = File::create(path).unwrap();
        let mut header = Vec::new();
        header.extend(if self.version == 1 { b"WithoutFreeSpace" } else { b"WithouFreSpacExt" });
        for field in [2u32, 16, 100, self.cluster_sectors as u32, self.entries as u32] {
            header.extend(field.to_le_bytes());
        }
        let size = self.disk_sectors | u64::from(self.size_high_half) << 32;
        header.extend(size.to_le_bytes());
        for field in [self.in_use, self.data_offset_sectors as u32, 0] {
            header.extend(field.to_le_bytes());
        }
        header.extend(self.extension_sectors.to_le_bytes());
        assert_eq!(header.len(), 64);
        file.write_all_at(&header, 0).unwrap();
        let mut end = self.data_sectors * SECTOR;
        for &(guest, place) in &self.places {
            file.write_all_at(&self.entry(place).to_le_bytes(), 64 + 4 * guest).unwrap();
            if !self.holes.contains(&guest) {
                file.write_all_at(&pattern(guest, self.cluster_bytes()), self.place_offset(place)).unwrap();
            }
            end = end.max(self.place_offset(place + 1));
        }
        file.set_len(end.checked_add_signed(self.tail_bytes).unwrap()).unwrap();
    }

    /// What the guest sees.
    pub(crate) fn expected(&self) -> Vec<u8> {
        let mut disk = vec![0; (self.disk_sectors * SECTOR) as usize];
        let file_end = self.places.iter().map(|&(_, place)| self.place_offset(place + 1)).max();
        let file_end = file_end.unwrap_or(0).checked_add_signed(self.tail_bytes).unwrap();
        for &(guest, place) in self.places.iter().filter(|(guest, _)| !self.holes.contains(guest)) {
            let start = guest * self.cluster_bytes();
            let there = file_end.saturating_sub(self.place_offset(place)).min(self.cluster_bytes());
            let end = (start + there).min(disk.len() as u64);
            if start < end {
                let bytes = &pattern(guest, self.cluster_bytes())[..(end - start) as usize];
                disk[start as usize..end as usize].copy_from_slice(bytes);
            }
        }
        disk
    }
}

/// The bytes of a guest cluster: each says where it belongs.
pub(crate) fn pattern(guest: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (guest * 31 + at / SECTOR * 7 + at % 5) as u8 | 1).collect()
}

/// Opens image files as a chain, base first.
pub(crate) fn open_chain(paths: &[&Path], raw_base: bool, access: Access) -> ploop_core::Result<Arc<Chain>> {
    let source = |(number, path): (usize, &&Path)| {
        let access = if number + 1 == paths.len() { access } else { Access::ReadOnly };
        let options = OpenOptions { access, caching: Caching::Cached, block_device: false };
        let storage = Arc::new(FileStorage::open(path, &options)?);
        Ok(Source { name: path.to_path_buf(), storage, raw: raw_base && number == 0 })
    };
    let sources = paths.iter().enumerate().map(source).collect::<ploop_core::Result<_>>()?;
    let raw_cluster = (raw_base && paths.len() == 1).then_some(Sectors(64));
    Chain::open(sources, &ChainOptions { access, raw_cluster, accept_in_use: false })
}

/// Part of what the guest sees.
pub(crate) fn read(chain: &Chain, start: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    let mut at = 0;
    while at < len {
        let mapping = chain.map(GuestOffset(start + at), len - at);
        if let Mapping::Data { delta, offset, len } = mapping {
            let place = at as usize..(at + len) as usize;
            chain.storage(delta).read_exact_at(offset.0, &mut bytes[place]).unwrap();
        }
        at += mapping.len();
    }
    bytes
}

/// All that the guest sees.
pub(crate) fn content(chain: &Chain) -> Vec<u8> {
    read(chain, 0, chain.geometry().disk_bytes())
}

/// Whether a tool is there; says so where it is not.
pub(crate) fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
        return false;
    }
    true
}

/// Runs a command and gives what came of it.
pub(crate) fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs a command that has to succeed.
#[track_caller]
pub(crate) fn succeed(command: &mut Command) -> Output {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// `qemu-io` on an image, write-back cache, with these commands.
pub(crate) fn qemu_io(image: &Path, commands: &[String]) -> Output {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "parallels", "-t", "writeback"]);
    for line in commands {
        command.arg("-c").arg(line);
    }
    run(command.arg(image))
}

/// What `qemu-img` reads of an image.
pub(crate) fn read_by_qemu(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("qemu-raw");
    succeed(Command::new("qemu-img").args(["convert", "-f", "parallels", "-O", "raw"]).arg(image).arg(&raw));
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

/// `qemu-img check` finds nothing, not even a leak, and it reads `expected`.
#[track_caller]
pub(crate) fn qemu_calls_it_sound(image: &Path, expected: &[u8]) {
    succeed(Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(image));
    assert!(read_by_qemu(image) == expected, "{}: qemu-img reads something else", image.display());
}
