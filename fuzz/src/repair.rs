//! Hostile images under check and repair, and hostile dirty bitmaps.

use crate::mutate::{edge, put};
use fastrand::Rng;
use ploop_core::ErrorKind;
use ploop_core::format::extension::{DIRTY_BITMAP_MAGIC, Feature, build};
use ploop_core::format::stored_bitmap::{self, Loaded};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::{Access, Storage, StorageExt};
use ploop_core::ops::Silent;
use ploop_core::ops::check::{CheckOptions, CheckReport, Outcome, check_image_in, undo_in};

/// Bytes of a table that are compared before and after; longer ones are checked all the same.
const ENTRIES_COMPARED: u64 = 4096;

fn field(bytes: &[u8], at: u64, len: usize) -> u64 {
    let mut value = [0; 8];
    let found = usize::try_from(at).ok().and_then(|at| bytes.get(at..at + len));
    value[..found.map_or(0, <[u8]>::len)].copy_from_slice(found.unwrap_or(&[]));
    u64::from_le_bytes(value)
}

/// Where each guest cluster's bytes are, by a reader that shares no code with the library: start and end in the file.
fn places(bytes: &[u8]) -> Vec<Option<(u64, u64)>> {
    let first = bytes.starts_with(b"WithoutFreeSpace");
    let cluster = field(bytes, 28, 4) * 512;
    let entries = field(bytes, 32, 4);
    let table_end = (64 + 4 * entries).next_multiple_of(512);
    let disk = if first { field(bytes, 36, 4) } else { field(bytes, 36, 8) };
    let clusters = u128::from(disk) * 512 / u128::from(cluster.max(1)) + 1;
    let len = bytes.len() as u64;
    (0..entries.min(ENTRIES_COMPARED))
        .map(|guest| {
            let raw = field(bytes, 64 + 4 * guest, 4);
            let at = raw.checked_mul(if first { 512 } else { cluster })?;
            let is_there = raw != 0
                && raw != 0xFFFF_FFFF
                && at >= table_end
                && at < len
                && u128::from(guest) + 1 < clusters;
            is_there.then(|| (at, len.min(at + cluster)))
        })
        .collect()
}

fn content(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().ok().and_then(|len| usize::try_from(len).ok()).unwrap_or(0)];
    let read = storage.read_available_at(0, &mut bytes).unwrap_or(0);
    bytes.truncate(read);
    bytes
}

fn host(input: &[u8]) -> Option<SimDisk> {
    let disk = SimDisk::new(1);
    disk.create("image").ok()?.write_all_at(0, input).ok()?;
    Some(disk)
}

fn run(disk: &SimDisk, options: &CheckOptions) -> ploop_core::Result<CheckReport> {
    check_image_in(&disk.folder(), "image", options, &Silent)
}

/// A repair ends, a second one finds nothing, what was readable stays so, and it can be taken back.
pub fn check_repair(input: &[u8]) {
    // A repair may extend the file to whole clusters: what is too large to compare is not compared.
    let Some(disk) = host(input) else { return };
    let Ok(storage) = disk.open("image", Access::ReadOnly) else { return };
    let before = content(&storage);
    let looked = run(&disk, &CheckOptions::look("image"));
    assert!(content(&storage) == before, "looking has changed the image");
    if field(input, 28, 4) > 1 << 15 || field(input, 32, 4) > 1 << 24 {
        return;
    }
    let report = match run(&disk, &CheckOptions::repair("image")) {
        Ok(report) => report,
        Err(error) => {
            let expected = [ErrorKind::Corrupt, ErrorKind::Parameter, ErrorKind::Allocate];
            assert!(expected.contains(&error.kind()), "{error}");
            assert!(content(&storage) == before, "a refused repair has changed the image: {error}");
            return;
        }
    };
    assert!(looked.is_ok(), "repaired what cannot be looked at");
    let after = content(&storage);
    if report.outcome == Outcome::Damaged {
        assert!(after == before, "an image that is still damaged was changed");
        return;
    }
    for (guest, (old, new)) in places(&before).into_iter().zip(places(&after)).enumerate() {
        let Some((start, end)) = old else { continue };
        let old =
            usize::try_from(start).ok().zip(usize::try_from(end).ok()).and_then(|(s, e)| before.get(s..e));
        let new =
            new.and_then(|(start, end)| after.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
        assert!(old.is_some() && new.is_some(), "guest cluster {guest} is lost");
        let (Some(old), Some(new)) = (old, new) else { continue };
        assert!(
            new.starts_with(old) && new[old.len()..].iter().all(|&byte| byte == 0),
            "guest cluster {guest}"
        );
    }
    let again = run(&disk, &CheckOptions::look("image"));
    assert!(again.is_ok_and(|again| again.outcome == Outcome::Sound), "the second check finds something");
    let Some(undo_file) = report.images.first().and_then(|image| image.repair.clone()?.undo_file) else {
        return;
    };
    let folder = disk.folder();
    assert!(undo_in(&folder, "image", &folder, &undo_file).is_ok(), "it cannot be taken back");
    assert!(content(&storage) == before, "taking it back gives another image");
}

const CLUSTER: usize = 4096;

/// A sound image with an extension of hostile bitmap records.
pub fn bitmaps(random: &mut Rng) -> Vec<u8> {
    let mut image = vec![0; CLUSTER * random.usize(3..9)];
    let clusters = image.len() / CLUSTER;
    put(&mut image, 0, b"WithouFreSpacExt");
    let disk_sectors = random.choice([8u32 * 40, 8 * 500, 8 * 41 - 3]).unwrap_or(320);
    let place = random.usize(1..clusters);
    let fields = [
        2u32,
        16,
        4,
        8,
        disk_sectors.div_ceil(8),
        disk_sectors,
        0,
        0x312E_3276,
        8,
        0,
        u32::try_from(place * 8).unwrap_or(0),
        0,
    ];
    for (index, field) in fields.iter().enumerate() {
        put(&mut image, 16 + index * 4, &field.to_le_bytes());
    }
    put(&mut image, 64, &u32::try_from(random.usize(..clusters)).unwrap_or(0).to_le_bytes());
    let features: Vec<Feature> =
        (0..random.usize(..4)).map(|_| record(random, disk_sectors, clusters)).collect();
    for byte in &mut image[CLUSTER..] {
        *byte = random.u8(..);
    }
    if let Some(mut cluster) = build(&features, CLUSTER) {
        if random.u8(..8) == 0 {
            cluster[random.usize(..CLUSTER)] ^= 1 << random.u8(..8);
        }
        put(&mut image, place * CLUSTER, &cluster);
    }
    image
}

fn record(random: &mut Rng, disk_sectors: u32, clusters: usize) -> Feature {
    let granularity = if random.bool() {
        1u32 << random.u8(..24)
    } else {
        u32::try_from(edge(random) & 0xFFFF_FFFF).unwrap_or(0)
    };
    let bytes =
        u64::from(disk_sectors).div_ceil(u64::from(granularity.max(1))).div_ceil(8).next_multiple_of(8);
    let count = if random.u8(..6) == 0 { random.u64(..5) } else { bytes.div_ceil(CLUSTER as u64) };
    let mut data = u64::from(disk_sectors).to_le_bytes().to_vec();
    if random.u8(..8) == 0 {
        data = edge(random).to_le_bytes().to_vec();
    }
    data.extend([random.u8(..); 16]);
    data.extend(granularity.to_le_bytes());
    data.extend(u32::try_from(count).unwrap_or(0).to_le_bytes());
    for _ in 0..count.min(64) {
        let entry = match random.u8(..6) {
            0 => 0,
            1 => 1,
            2 => edge(random),
            _ => random.u64(..clusters as u64 + 1) * 8,
        };
        data.extend(entry.to_le_bytes());
    }
    let magic = if random.u8(..8) == 0 { edge(random) | 1 } else { DIRTY_BITMAP_MAGIC };
    Feature { magic, flags: if random.u8(..8) == 0 { edge(random) } else { 0 }, data }
}

/// Loading is bounded; what is believed can be asked anything, is stored again and read as the same; a check keeps it.
pub fn dirty_bitmap(input: &[u8]) {
    let Some(disk) = host(input) else { return };
    let Ok(storage) = disk.open("image", Access::ReadWrite) else { return };
    let Ok(loaded) = stored_bitmap::load(&storage) else { return };
    let mut known = Vec::new();
    for one in loaded {
        let Loaded::Known(bits) = one else { continue };
        let mut at = 0;
        let mut runs = 0;
        while let Some(run) = bits.next_dirty(at).filter(|_| runs < 1000) {
            assert!(!run.is_empty() && run.start() >= at && bits.is_dirty(run.start()), "{run}");
            assert!(
                run.start() == 0 || run.start() == at || !bits.is_dirty(run.start() - 1),
                "{run} begins late"
            );
            at = run.end();
            runs += 1;
        }
        if !known.iter().any(|other: &stored_bitmap::DirtyBits| other.id() == bits.id()) {
            known.push(bits);
        }
    }
    if run(&disk, &CheckOptions::repair("image")).is_ok_and(|report| report.outcome < Outcome::Damaged)
        && stored_bitmap::store(&storage, &known).is_ok()
    {
        let again = stored_bitmap::load(&storage).unwrap_or_default();
        let expected: Vec<_> = known.into_iter().map(Loaded::Known).collect();
        assert!(again == expected, "stored bitmaps read differently");
    }
}
