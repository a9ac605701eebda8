//! Hostile images and descriptors.

use crate::mutate::{damage, edge, put};
use fastrand::Rng;
use ploop_core::format::{Chain, ChainOptions, Geometry, Mapping, RawHeader, Source, Version, probe};
use ploop_core::format::{Described, DiskDescriptor};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::{Access, Storage, StorageExt};
use ploop_core::units::{GuestOffset, Sectors};
use std::path::PathBuf;
use std::sync::Arc;

/// An image of a few small clusters, some of them mapped, then damaged in header and table.
pub fn image(random: &mut Rng) -> Vec<u8> {
    let (cluster_sectors, entries) = (64u32, random.u32(1..40));
    let cluster_bytes = cluster_sectors as usize * 512;
    let mut image = vec![0; cluster_bytes * random.usize(1..6)];
    let first = random.bool();
    put(&mut image, 0, if first { b"WithoutFreeSpace" } else { b"WithouFreSpacExt" });
    let fields =
        [2, 16, 4, cluster_sectors, entries, entries * cluster_sectors, 0, 0, cluster_sectors, 0, 0, 0];
    for (index, field) in fields.iter().enumerate() {
        put(&mut image, 16 + index * 4, &field.to_le_bytes());
    }
    for slot in 1..(image.len() / cluster_bytes) {
        let guest = random.usize(..entries as usize);
        let unit = if first { cluster_sectors as usize } else { 1 };
        put(&mut image, 64 + guest * 4, &u32::try_from(slot * unit).unwrap_or(0).to_le_bytes());
    }
    for _ in 0..random.usize(..4) {
        let at = 4 * random.usize(..60);
        put(&mut image, at, &edge(random).to_le_bytes()[..4]);
    }
    if random.u8(..4) == 0 {
        damage(random, &mut image);
    }
    image
}

/// Opening either fails with an error or gives a table without cross-links whose mappings lie inside the file.
pub fn open(input: &[u8]) {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let world = SimDisk::new(1);
        let Ok(file) = world.create("image") else { return };
        let storage: Arc<dyn Storage> = Arc::new(file);
        if storage.write_all_at(0, input).is_err() {
            return;
        }
        // Neither of the two may panic; what they answer is judged below.
        let _ = probe(&*storage);
        let source = Source { name: PathBuf::from("image"), storage: Arc::clone(&storage), raw: false };
        let options = ChainOptions { access, raw_cluster: None, accept_in_use: true };
        let Ok(chain) = Chain::open(vec![source], &options) else { continue };
        let disk_bytes = chain.geometry().disk_bytes();
        let file_bytes = storage.len().unwrap_or(0);
        let mut at = 0;
        let mut steps = 0;
        while at < disk_bytes && steps < 4096 {
            let len = match chain.map(GuestOffset(at), disk_bytes - at) {
                Mapping::Data { offset, len, .. } => {
                    let inside = offset.0 >= chain.geometry().table_bytes();
                    assert!(inside, "guest byte {at} maps into the table at {offset}");
                    if access == Access::ReadWrite {
                        assert!(offset.0 < file_bytes, "guest byte {at} maps past the end at {offset}");
                    }
                    len
                }
                Mapping::Zero { len } => len,
            };
            assert!(len > 0 && len <= disk_bytes - at, "a mapping of {len} bytes at {at} of {disk_bytes}");
            at += len;
            steps += 1;
        }
    }
}

/// 64 bytes of header fields and 12 more: an entry and a guest offset.
pub fn header_and_entry(random: &mut Rng) -> Vec<u8> {
    let mut bytes = image(random);
    bytes.truncate(64);
    bytes.resize(64, 0);
    bytes.extend_from_slice(&edge(random).to_le_bytes()[..4]);
    bytes.extend_from_slice(&edge(random).to_le_bytes());
    bytes
}

/// The arithmetic of addresses equals the same in 128 bits.
pub fn bat_arith(input: &[u8]) {
    let (Some(header), Some(entry), Some(guest)) =
        (input.first_chunk::<64>(), input.get(64..68), input.get(68..76))
    else {
        return;
    };
    let entry = u32::from_le_bytes(entry.try_into().unwrap_or_default());
    let guest = u64::from_le_bytes(guest.try_into().unwrap_or_default());
    // A file as long as the table may ever be, so that the arithmetic is reached and not only the comparison with it.
    let Ok(header) = RawHeader::decode(header).validate(1 << 50) else { return };
    let geometry: &Geometry = header.geometry();
    let cluster_bytes = u128::from(geometry.cluster_bytes());
    assert_eq!(cluster_bytes, u128::from(geometry.cluster_sectors()) * 512);
    // A disk larger than its table can still be read; an obstacle keeps it from being written.
    let covered = u128::from(geometry.entries()) * cluster_bytes;
    assert!(u128::from(geometry.disk_bytes()) <= covered || header.obstacle().is_some());
    // Past 2^32 clusters, where no table reaches, the number of a cluster saturates.
    if guest < geometry.disk_bytes() && u128::from(guest) < covered {
        let (cluster, within) = geometry.guest_cluster(GuestOffset(guest));
        assert_eq!(u128::from(cluster.0) * cluster_bytes + u128::from(within), u128::from(guest));
        let extent = geometry.cluster_extent(cluster);
        assert!(extent.start() <= guest && guest < extent.end());
    }
    if let Ok(Some(cluster)) = geometry.entry_to_cluster(entry) {
        let unit = if geometry.version() == Version::V1 { 512 } else { cluster_bytes };
        let wanted = u128::from(entry) * unit;
        assert_eq!(u128::from(geometry.file_offset(cluster).0), wanted, "entry {entry}");
        assert_eq!(geometry.cluster_to_entry(cluster).ok(), Some(entry));
    }
    // Creating knows the same limits.
    let _ = Geometry::new(
        geometry.version(),
        Sectors(u64::from(geometry.cluster_sectors())),
        geometry.disk_sectors(),
    );
}

const DESCRIPTOR: &str = r#"<?xml version="1.0"?>
<Parallels_disk_image>
  <Disk_Parameters><Disk_size>40960</Disk_size><Cylinders>81</Cylinders><Heads>16</Heads><Sectors>32</Sectors>
    <Padding>0</Padding><Mystery a="1">kept</Mystery></Disk_Parameters>
  <StorageData><Storage><Start>0</Start><End>40960</End><Blocksize>2048</Blocksize>
    <Image><GUID>{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}</GUID><Type>Compressed</Type><File>root.hds</File></Image>
    <Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>Compressed</Type><File>root.hds.1</File></Image>
  </Storage></StorageData>
  <Snapshots><TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot><GUID>{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>
    <Shot><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><ParentGUID>{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}</ParentGUID></Shot>
  </Snapshots>
</Parallels_disk_image>
"#;

/// Words that break readers of XML and of paths.
const WORDS: &[&str] = &[
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "",
    "\0",
    "<!DOCTYPE a [<!ENTITY b \"c\">]>",
    "&b;",
    "<Image>",
    "</Image>",
    "18446744073709551615",
    "-1",
    "0x800",
    "{00000000-0000-0000-0000-000000000000}",
    "<!--",
    "<![CDATA[",
    "\u{FEFF}",
    "640",
    "40960",
    "C:\\vm\\root.hds",
    "/vm/root.hds",
    "cafe\u{301}.hds",
    "\n root.hds ",
];

/// Elements of other programs, each put somewhere in front of a closing one.
const ELEMENTS: &[&str] = &[
    "<Encryption><Engine>{a6d3ac3e-7d1c-4b2e-9f1e-2f4f9a1b0c11}</Engine><Data>AA</Data></Encryption>",
    "<LogicSectorSize>4096</LogicSectorSize>",
    "<Miscellaneous><SuspendState>1</SuspendState></Miscellaneous>",
    "<Storage><Start>640</Start><End>40960</End><Blocksize>64</Blocksize><Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>Plain</Type><File>second.hds</File></Image></Storage>",
    "<Shot><GUID>{22222222-2222-4222-8222-222222222222}</GUID><ParentGUID>{0d3c1c1e-31a4-4c56-9d51-2b0f6a1c7e10}</ParentGUID></Shot>",
    "<Image><GUID>{22222222-2222-4222-8222-222222222222}</GUID><Type>Compressed</Type><File>../parent.hdd/root.hds</File></Image>",
];

/// A descriptor with words replaced and bytes damaged.
pub fn xml(random: &mut Rng) -> Vec<u8> {
    let mut text = DESCRIPTOR.to_owned();
    for _ in 0..random.usize(..4) {
        let places: Vec<usize> = text.match_indices('>').map(|(at, _)| at + 1).collect();
        let at = random.choice(&places).copied().unwrap_or(0);
        let end = text[at..].find('<').map_or(at, |len| at + len);
        text.replace_range(at..end, random.choice(WORDS).copied().unwrap_or(""));
    }
    for _ in 0..random.usize(..3) {
        let places: Vec<usize> = text.match_indices("</").map(|(at, _)| at).collect();
        let at = random.choice(&places).copied().unwrap_or(0);
        text.insert_str(at, random.choice(ELEMENTS).copied().unwrap_or(""));
    }
    let mut bytes = text.into_bytes();
    if random.bool() {
        damage(random, &mut bytes);
    }
    bytes
}

/// A reader who knows some files, and perhaps a folder of a parent: parts follow each other up to the end of the disk, and
/// what lies outside is known as such.
fn described(input: &[u8]) {
    let is_there = |name: &str| name.len().is_multiple_of(2);
    for outside in [false, true] {
        let Ok(found) = Described::parse_beside(input, &is_there, outside) else { continue };
        let descriptors: Vec<&DiskDescriptor> = match &found {
            Described::Whole(descriptor) => vec![&**descriptor],
            Described::Split(split) => {
                let mut at = 0;
                for part in split.parts() {
                    assert_eq!(part.start.0, at, "parts do not follow each other");
                    at += part.descriptor.disk_sectors().0;
                }
                assert_eq!(at, split.disk_sectors().0, "the parts are not the disk");
                split.parts().iter().map(|part| &part.descriptor).collect()
            }
        };
        for image in descriptors.iter().flat_map(|descriptor| descriptor.images()) {
            let file = image.file();
            let leads_out = file.starts_with('/') || file.split('/').any(|part| part == "..");
            assert!(!leads_out || image.is_outside() && outside, "{file:?} leaves the folder");
        }
        let _ = (descriptors[0].encryption(), descriptors[0].is_suspended(), descriptors[0].dead_words());
    }
}

/// What is read is written and read again as the same, and every file name stays inside the folder.
pub fn descriptor(input: &[u8]) {
    described(input);
    let Ok(first) = DiskDescriptor::parse(input) else { return };
    let printed = first.to_bytes();
    let second = DiskDescriptor::parse(&printed);
    assert!(second.is_ok(), "what was written cannot be read: {:?}", second.err());
    assert_eq!(second.ok().map(|second| second.to_bytes()), Some(printed), "printing is not stable");
    for image in first.images() {
        let file = image.file();
        assert!(
            !file.starts_with('/') && !file.split('/').any(|part| part == ".."),
            "{file:?} leaves the folder"
        );
    }
}
