//! Damaged images: what a check says of each kind of damage, and what a repair makes of it.
//!
//! A reader of its own, which shares no code with the library, says what was readable before; every byte of that must
//! be readable afterwards, at every crash on the way, and after repairs of repairs. What cannot be repaired must not be
//! touched. An undo file must bring back the very bytes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: it stops at the first surprise, and its numbers are small"
)]

use ploop_core::format::{Chain, Mapping, Source};
use ploop_core::io::sim::{CrashLevel, CrashOptions, Fault, Random, SimDisk, SimStorage};
use ploop_core::io::{Access, Folder, Storage, StorageExt};
use ploop_core::mutant::{Mutant, activate};
use ploop_core::ops::Silent;
use ploop_core::ops::check::{
    CheckOptions, CheckReport, Class, Findings, Kind, Outcome, check_image_in, undo_in,
};
use ploop_core::units::GuestOffset;
use proptest::prelude::*;
use std::sync::Arc;

const SECTOR: usize = 512;

/// How the images of a test are laid out.
#[derive(Clone, Copy, Debug)]
struct Shape {
    version: u8,
    cluster_sectors: u32,
    entries: u32,
    data_offset_sectors: u32,
    /// Clusters that are allocated, in guest order from 0, from the data offset on.
    allocated: u32,
}

impl Shape {
    fn v2() -> Self {
        Self { version: 2, cluster_sectors: 8, entries: 200, data_offset_sectors: 8, allocated: 5 }
    }

    fn v1() -> Self {
        Self { version: 1, ..Self::v2() }
    }

    /// Clusters of 7 sectors, data right behind the table.
    fn odd() -> Self {
        Self { version: 1, cluster_sectors: 7, entries: 20, data_offset_sectors: 1, allocated: 5 }
    }

    fn cluster(&self) -> usize {
        self.cluster_sectors as usize * SECTOR
    }

    /// The sound image.
    fn image(&self) -> Vec<u8> {
        let start = self.data_offset_sectors as usize * SECTOR;
        let mut bytes = vec![0; start + self.allocated as usize * self.cluster()];
        bytes[..16].copy_from_slice(if self.version == 1 {
            b"WithoutFreeSpace"
        } else {
            b"WithouFreSpacExt"
        });
        let disk = self.entries * self.cluster_sectors;
        for (at, value) in [
            (16, 2),
            (20, 16),
            (28, self.cluster_sectors),
            (32, self.entries),
            (36, disk),
            (48, self.data_offset_sectors),
        ] {
            put(&mut bytes, at, value);
        }
        for guest in 0..self.allocated {
            put(&mut bytes, 64 + 4 * guest as usize, self.entry(guest));
            let at = start + guest as usize * self.cluster();
            let len = self.cluster();
            for (index, sector) in bytes[at..at + len].chunks_mut(SECTOR).enumerate() {
                sector.fill(guest as u8 + 1);
                sector[0] = index as u8;
            }
        }
        bytes
    }

    /// The entry of the cluster in the `slot`th place behind the data offset.
    fn entry(&self, slot: u32) -> u32 {
        let sector = self.data_offset_sectors + slot * self.cluster_sectors;
        if self.version == 1 { sector } else { sector / self.cluster_sectors }
    }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u64 {
    u64::from(bytes.get(at..at + 4).map_or(0, |field| u32::from_le_bytes(field.try_into().unwrap())))
}

/// What can be read of a disk, cluster by cluster, by a reader of its own: `None` where the table gives no bytes at all.
fn readable(bytes: &[u8], clusters_max: usize) -> Vec<Option<Vec<u8>>> {
    let version = if bytes.starts_with(b"WithoutFreeSpace") { 1 } else { 2 };
    let cluster = (get(bytes, 28) as usize) * SECTOR;
    let entries = get(bytes, 32) as usize;
    let table_end = (64 + 4 * entries).next_multiple_of(SECTOR);
    let disk = if version == 1 { get(bytes, 36) } else { get(bytes, 36) | get(bytes, 40) << 32 };
    let clusters = (u128::from(disk) * 512).div_ceil(cluster.max(1) as u128);
    let one = |guest: usize| {
        let raw = get(bytes, 64 + 4 * guest);
        let at = usize::try_from(u128::from(raw) * if version == 1 { 512 } else { cluster as u128 }).ok()?;
        if raw == 0 || raw == 0xFFFF_FFFF || at < table_end || at >= bytes.len() || guest as u128 >= clusters
        {
            return None;
        }
        let mut content = bytes[at..bytes.len().min(at + cluster)].to_vec();
        content.resize(cluster, 0);
        Some(content)
    };
    (0..entries.min(clusters_max)).map(one).collect()
}

fn host(bytes: &[u8]) -> (SimDisk, SimStorage) {
    let disk = SimDisk::new(1);
    let file = disk.create("image").unwrap();
    file.write_all_at(0, bytes).unwrap();
    file.sync_data().unwrap();
    disk.folder().sync().unwrap();
    (disk, file)
}

fn bytes_of(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(0, &mut bytes).unwrap();
    bytes
}

fn run(disk: &SimDisk, options: &CheckOptions) -> ploop_core::Result<CheckReport> {
    check_image_in(&disk.folder(), "image", options, &Silent)
}

fn look(disk: &SimDisk) -> CheckReport {
    run(disk, &CheckOptions::look("image")).unwrap()
}

fn repair(disk: &SimDisk) -> CheckReport {
    run(disk, &CheckOptions::repair("image")).unwrap()
}

fn findings(report: &CheckReport) -> &Findings {
    &report.images[0].findings
}

/// Everything readable before is readable now, as it was.
#[track_caller]
fn assert_kept(before: &[u8], after: &[u8], context: &str) {
    let old = readable(before, 4096);
    let new = readable(after, 4096);
    for (guest, old) in old.iter().enumerate() {
        if let Some(old) = old {
            let new = new.get(guest).cloned().flatten();
            assert!(new.as_ref() == Some(old), "guest cluster {guest} has changed: {context}");
        }
    }
}

/// The whole disk, as the library reads it.
fn content(file: &SimStorage) -> Vec<u8> {
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    let chain = Chain::open_salvaging(vec![source], None).unwrap();
    let end = chain.geometry().disk_bytes().min(1 << 22);
    let mut bytes = vec![0; end as usize];
    let mut at = 0;
    while at < end {
        let mapping = chain.map(GuestOffset(at), end - at);
        if let Mapping::Data { offset, len, .. } = mapping {
            file.read_padded_at(offset.0, &mut bytes[at as usize..(at + len) as usize]).unwrap();
        }
        at += mapping.len();
    }
    bytes
}

/// Checks, repairs, checks again, takes back: everything that must hold of any image whatever.
#[track_caller]
fn go_through(bytes: &[u8], context: &str) -> Option<CheckReport> {
    let (disk, file) = host(bytes);
    let Ok(first) = run(&disk, &CheckOptions::look("image")) else {
        // Refused as nonsense; then a repair must refuse it, too.
        assert!(run(&disk, &CheckOptions::repair("image")).is_err(), "{context}");
        assert!(bytes_of(&file) == bytes, "a refused image was touched: {context}");
        return None;
    };
    assert!(bytes_of(&file) == bytes, "looking changed the image: {context}");
    let report = match run(&disk, &CheckOptions::repair("image")) {
        Ok(report) => report,
        Err(error) => {
            assert!(bytes_of(&file) == bytes, "a failed repair changed the image ({error}): {context}");
            return Some(first);
        }
    };
    let after = bytes_of(&file);
    if report.outcome == Outcome::Damaged {
        assert!(after == bytes, "an image that is still damaged was touched: {context}");
        return Some(first);
    }
    assert_kept(bytes, &after, context);
    let again = look(&disk);
    assert!(again.outcome <= Outcome::Sound, "{context}: {report:#?} then {again:#?}");
    let twice = repair(&disk);
    assert!(twice.images[0].repair.is_none() && bytes_of(&file) == after, "not idempotent: {context}");
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    let options = ploop_core::format::ChainOptions {
        access: Access::ReadWrite,
        raw_cluster: None,
        accept_in_use: false,
    };
    let seen = content(&file);
    if let Some(undo_file) = &report.images[0].repair.as_ref().and_then(|repair| repair.undo_file.clone()) {
        let folder = disk.folder();
        undo_in(&folder, "image", &folder, undo_file).unwrap();
        assert!(bytes_of(&file) == bytes, "undoing did not bring the bytes back: {context}");
        repair(&disk);
        assert!(bytes_of(&file) == after, "the repair differs the second time: {context}");
    }
    let chain = Chain::open(vec![source], &options).unwrap_or_else(|error| panic!("{error}: {context}"));
    drop(chain);
    assert!(content(&file) == seen, "opening changed what is read: {context}");
    Some(first)
}

/// Damages a sound image, expects `kind` with `class`, and goes through everything.
#[track_caller]
fn expect(shape: Shape, kind: Kind, class: Class, damage: impl Fn(&mut Vec<u8>)) -> CheckReport {
    let mut bytes = shape.image();
    damage(&mut bytes);
    let report = go_through(&bytes, &format!("{kind:?} in {shape:?}")).unwrap();
    let row = findings(&report).counts.iter().find(|row| row.kind == kind);
    let row = row.unwrap_or_else(|| panic!("{kind:?} was not found: {report:#?}"));
    assert_eq!(row.class, class, "{kind:?}");
    report
}

#[test]
fn sound_images_are_sound() {
    for shape in [Shape::v1(), Shape::v2(), Shape::odd()] {
        let report = go_through(&shape.image(), "sound").unwrap();
        assert_eq!(report.outcome, Outcome::Sound, "{report:#?}");
        assert_eq!(report.images[0].allocated_clusters, 5);
    }
}

#[test]
fn each_kind_of_damage_in_the_table() {
    for shape in [Shape::v1(), Shape::v2(), Shape::odd()] {
        let entry = |slot| shape.entry(slot);
        expect(shape, Kind::EntryReserved, Class::C, |bytes| put(bytes, 64 + 40, u32::MAX));
        expect(shape, Kind::EntryShared, Class::C, |bytes| put(bytes, 64 + 40, entry(2)));
        expect(shape, Kind::EntryBeyondEnd, Class::C, |bytes| put(bytes, 64 + 40, entry(7)));
        expect(shape, Kind::EntryCut, Class::C, |bytes| bytes.truncate(bytes.len() - 700));
        expect(shape, Kind::Tail, Class::A, |bytes| bytes.extend([9; 5000]));
        let open = |bytes: &mut Vec<u8>| put(bytes, 44, 0x746F_6E59);
        expect(shape, Kind::NotClosed, Class::A, open);
        expect(shape, Kind::EntryBeyondEnd, Class::B, |bytes| {
            open(bytes);
            put(bytes, 64 + 40, entry(7));
        });
        expect(shape, Kind::EntryCut, Class::B, |bytes| {
            open(bytes);
            bytes.truncate(bytes.len() - 700);
        });
        expect(shape, Kind::EntryPastDisk, Class::C, |bytes| {
            let sectors = 3 * shape.cluster_sectors;
            put(bytes, 36, sectors);
        });
    }
    for shape in [Shape::v1(), Shape::odd()] {
        expect(shape, Kind::EntryMisaligned, Class::C, |bytes| put(bytes, 64 + 40, shape.entry(1) + 3));
        // Cut by the end as well: what is there stays.
        expect(shape, Kind::EntryMisaligned, Class::C, |bytes| put(bytes, 64 + 40, shape.entry(4) + 3));
    }
    expect(Shape::v2(), Kind::Padding, Class::A, |bytes| put(bytes, 64 + 4 * 200 + 8, 7));
    expect(Shape::v1(), Kind::EntryIntoTable, Class::C, |bytes| put(bytes, 64 + 40, 1));
}

#[test]
fn each_kind_of_damage_in_the_header() {
    let shape = Shape::v2();
    expect(shape, Kind::UnknownMark, Class::A, |bytes| put(bytes, 44, 5));
    expect(shape, Kind::Flags, Class::A, |bytes| put(bytes, 52, 1));
    expect(shape, Kind::Flags, Class::A, |bytes| put(bytes, 52, 0xFF00));
    expect(shape, Kind::SizeHighHalf, Class::A, |bytes| {
        bytes[..16].copy_from_slice(b"WithoutFreeSpace");
        for guest in 0..5 {
            put(bytes, 64 + 4 * guest, Shape::v1().entry(guest as u32));
        }
        put(bytes, 40, 0xDEAD);
    });
    expect(shape, Kind::StaleExtension, Class::A, |bytes| put(bytes, 56, 77));
    expect(shape, Kind::BadExtension, Class::A, |bytes| {
        put(bytes, 44, 0x312E_3276);
        put(bytes, 56, 77);
    });
    // A table that is too short takes the room behind it.
    let report = expect(shape, Kind::DiskBeyondTable, Class::C, |bytes| put(bytes, 32, 100));
    assert!(findings(&report).is_repairable());
    let conversion = |mark: u32| {
        let mut bytes = shape.image();
        put(&mut bytes, 52, 2);
        put(&mut bytes, 44, mark);
        go_through(&bytes, "conversion").unwrap()
    };
    assert_eq!(findings(&conversion(0x746F_6E59)).total(Kind::HalfConverted), 1);
    assert_eq!(findings(&conversion(0)).total(Kind::Flags), 1);
}

/// The data offset: everything below it that the table names is a guest's data.
#[test]
fn peer_data_offset_0xffffffff() {
    for shape in [Shape::v1(), Shape::v2(), Shape::odd()] {
        for offset in [u32::MAX, u32::MAX - 7, 0x7FFF_FFF8, 24, 9, 2] {
            let mut bytes = shape.image();
            put(&mut bytes, 48, offset);
            let report = go_through(&bytes, &format!("data offset {offset} {shape:?}")).unwrap();
            assert!(findings(&report).is_damaged(), "{offset} {shape:?}: {report:#?}");
            let (disk, file) = host(&bytes);
            assert_eq!(repair(&disk).outcome, Outcome::Repaired, "{offset} {shape:?}");
            let after = bytes_of(&file);
            assert_eq!(get(&after, 48), u64::from(shape.data_offset_sectors), "{offset} {shape:?}");
            assert_eq!(after, shape.image(), "only the offset was wrong");
        }
    }
}

#[test]
fn peer_doubled_entry_in_the_last_slot() {
    let shape = Shape::v2();
    let report = expect(shape, Kind::EntryShared, Class::C, |bytes| put(bytes, 64 + 4 * 199, shape.entry(0)));
    let example = &findings(&report).examples[0];
    assert_eq!((example.guest_cluster, example.file_offset), (Some(199), Some(4096)));
    assert!(example.detail.contains("guest cluster 0"), "{example:?}");
    let (disk, file) = host(&{
        let mut bytes = shape.image();
        put(&mut bytes, 64 + 4 * 199, shape.entry(0));
        bytes
    });
    let done = repair(&disk).images[0].repair.clone().unwrap();
    assert_eq!((done.copied_clusters, done.cleared_entries), (1, 0));
    let after = readable(&bytes_of(&file), 200);
    assert!(after[0].is_some() && after[0] == after[199]);
}

#[test]
fn peer_last_cluster_cut_in_half() {
    let shape = Shape::v2();
    let mut bytes = shape.image();
    bytes.truncate(bytes.len() - 2048);
    let (disk, file) = host(&bytes);
    assert_eq!(repair(&disk).outcome, Outcome::Repaired);
    assert_eq!(file.len().unwrap(), shape.image().len() as u64);
    assert_kept(&bytes, &bytes_of(&file), "cut in half");
}

#[test]
fn peer_more_than_2_gib_of_leak() {
    let (disk, file) = host(&Shape::v2().image());
    file.set_len(5 << 30).unwrap();
    let report = repair(&disk);
    assert_eq!(findings(&report).total(Kind::Tail), (5 << 30) / 4096 - 6);
    assert_eq!(bytes_of(&file), Shape::v2().image());
}

#[test]
fn peer_table_larger_than_2_gib_in_a_sparse_file() {
    let disk = SimDisk::new(1);
    let file = disk.create("image").unwrap();
    let mut header = Shape::v2().image();
    header.truncate(64);
    put(&mut header, 32, 600_000_000);
    put(&mut header, 36, 600_000_000);
    put(&mut header, 48, 8 * 600_000);
    file.write_all_at(0, &header).unwrap();
    file.set_len(1 << 41).unwrap();
    let started = std::time::Instant::now();
    let report = run(&disk, &CheckOptions::look("image")).unwrap();
    println!("checked in {:?}", started.elapsed());
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    assert_eq!(report.images[0].allocated_clusters, 0);
}

#[test]
fn peer_zero_sectors_per_track_and_other_impossible_headers() {
    for (at, value) in [
        (0, 0x41),
        (16, 0),
        (16, 3),
        (28, 0),
        (28, 4_186_128),
        (32, u32::MAX),
        (32, 1 << 20),
        (32, 0),
        (36, 0),
    ] {
        let mut bytes = Shape::v2().image();
        put(&mut bytes, at, value);
        let report = go_through(&bytes, &format!("{value} at {at}")).unwrap();
        assert_eq!(findings(&report).total(Kind::Unreadable), 1, "{value} at {at}");
        assert_eq!(report.exit_code, 11);
    }
}

#[test]
fn peer_virtual_size_beyond_the_table() {
    let mut bytes = Shape::v2().image();
    put(&mut bytes, 36, 5000 * 8);
    let report = go_through(&bytes, "size beyond table").unwrap();
    assert_eq!(findings(&report).total(Kind::DiskBeyondTable), 1);
    assert!(findings(&report).has_unrepairable_damage(), "there is no room for so many entries");
}

#[test]
fn peer_entry_into_the_table_and_before_the_data() {
    // A table of three clusters.
    let shape = Shape { entries: 3000, data_offset_sectors: 24, ..Shape::v2() };
    for raw in [1, 2] {
        let report = expect(shape, Kind::EntryIntoTable, Class::C, |bytes| put(bytes, 64 + 40, raw));
        assert_eq!(report.exit_code, 11);
    }
    // In version 1 a place between table and data is a guest's, whose bytes are copied.
    let shape = Shape { version: 1, data_offset_sectors: 40, ..shape };
    let mut bytes = shape.image();
    put(&mut bytes, 64 + 40, 29);
    bytes[29 * 512..30 * 512].fill(0x77);
    go_through(&bytes, "before the data");
    let (disk, file) = host(&bytes);
    repair(&disk);
    assert_eq!(readable(&bytes_of(&file), 100)[10].as_ref().unwrap()[..512], [0x77; 512]);
}

#[test]
fn peer_first_64_kib_overwritten_by_guest_data() {
    let mut bytes = Shape { cluster_sectors: 256, data_offset_sectors: 256, ..Shape::v2() }.image();
    bytes[..65536].fill(0x5A);
    let report = go_through(&bytes, "overwritten").unwrap();
    assert_eq!(findings(&report).total(Kind::Unreadable), 1);
}

#[test]
fn peer_image_restored_truncated_or_with_an_unaligned_tail() {
    let sound = Shape::v2().image();
    for len in (64..sound.len()).step_by(611) {
        go_through(&sound[..len], &format!("cut at {len}"));
    }
    for more in [1, 511, 512, 4095, 4096, 9999] {
        let mut bytes = sound.clone();
        bytes.extend(vec![1; more]);
        let report = go_through(&bytes, &format!("{more} more")).unwrap();
        assert_eq!(findings(&report).total(Kind::Tail), (more as u64).div_ceil(4096));
    }
}

#[test]
fn every_header_field_at_its_boundaries() {
    let edges = [
        0,
        1,
        2,
        3,
        7,
        8,
        9,
        63,
        64,
        199,
        200,
        201,
        255,
        256,
        511,
        512,
        2047,
        2048,
        131_072,
        131_073,
        4_186_127,
        4_186_128,
        0x1FFF_FFFF,
        0x2000_0000,
        0x7FFF_FFFF,
        0x8000_0000,
        0xFFFF_FFFC,
        0xFFFF_FFFE,
        0xFFFF_FFFF,
        0x746F_6E59,
        0x312E_3276,
    ];
    for shape in [Shape::v1(), Shape::v2(), Shape::odd()] {
        for at in (16..64).step_by(4) {
            for value in edges {
                let mut bytes = shape.image();
                put(&mut bytes, at, value);
                go_through(&bytes, &format!("{value:#x} at byte {at} of {shape:?}"));
            }
        }
    }
}

/// One deliberate damage.
#[derive(Clone, Debug)]
enum Damage {
    Entry(u32, u32),
    Field(usize, u32),
    Cut(usize),
    Tail(usize, u8),
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let entry = prop_oneof![0u32..60, Just(u32::MAX), any::<u32>()];
    let one = prop_oneof![
        6 => (0u32..24, entry).prop_map(|(guest, raw)| Damage::Entry(guest, raw)),
        1 => (4usize..16, prop_oneof![0u32..40, any::<u32>()]).prop_map(|(word, value)| Damage::Field(word * 4, value)),
        1 => (0usize..9000).prop_map(Damage::Cut),
        1 => (1usize..9000, any::<u8>()).prop_map(|(len, byte)| Damage::Tail(len, byte)),
    ];
    proptest::collection::vec(one, 1..8)
}

fn damaged(shape: Shape, damages: &[Damage]) -> Vec<u8> {
    let mut bytes = shape.image();
    for damage in damages {
        match *damage {
            Damage::Entry(guest, raw) if 68 + 4 * guest as usize <= bytes.len() => {
                put(&mut bytes, 64 + 4 * guest as usize, raw);
            }
            Damage::Field(at, value) if at + 4 <= bytes.len() => put(&mut bytes, at, value),
            Damage::Cut(len) => bytes.truncate(bytes.len().saturating_sub(len).max(64)),
            Damage::Tail(len, byte) => bytes.extend(vec![byte; len]),
            Damage::Entry(..) | Damage::Field(..) => {}
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_was_readable_stays_readable(which in 0usize..3, damages in damages()) {
        let shape = [Shape::v1(), Shape::v2(), Shape::odd()][which];
        go_through(&damaged(shape, &damages), &format!("{shape:?} {damages:?}"));
    }
}

/// An image with one of each kind of damage that a repair writes for.
fn many_wounds(shape: Shape) -> Vec<u8> {
    let mut bytes = shape.image();
    put(&mut bytes, 64 + 40, shape.entry(2));
    put(&mut bytes, 64 + 44, shape.entry(2));
    put(&mut bytes, 64 + 48, u32::MAX);
    put(&mut bytes, 64 + 52, shape.entry(40));
    if shape.version == 1 {
        put(&mut bytes, 64 + 56, shape.entry(1) + 2);
    }
    // Entries in another sector than the header's.
    put(&mut bytes, 64 + 4 * 150, shape.entry(3));
    bytes.extend([0xEE; 6000]);
    bytes
}

/// Cuts a repair after every operation, in every way a power loss may leave things, and repairs again. The number of
/// states that were judged, or the first violation.
fn cut_everywhere(shape: Shape, level: CrashLevel) -> Result<u64, String> {
    let bytes = many_wounds(shape);
    let before = readable(&bytes, 4096);
    let (disk, _file) = host(&bytes);
    disk.capture_every_operation(true);
    repair(&disk);
    let snapshots = disk.take_captured();
    let mut judged = 0;
    let judge = |disk: &SimDisk, when: &str| -> Result<(), String> {
        let file = disk.open("image", Access::ReadOnly).map_err(|error| error.to_string())?;
        let now = readable(&bytes_of(&file), 4096);
        for (guest, old) in before.iter().enumerate().filter(|(_, old)| old.is_some()) {
            if now.get(guest) != Some(old) {
                return Err(format!("guest cluster {guest} has changed {when}"));
            }
        }
        Ok(())
    };
    let options = CrashOptions { random_per_density: 2, exhaustive_max: 64, ..CrashOptions::new(level) };
    for (number, snapshot) in snapshots.iter().enumerate() {
        for state in snapshot.crash_states(&options) {
            judged += 1;
            let when = format!("after operation {number}, state {state}");
            let disk = state.into_disk(7);
            judge(&disk, &when)?;
            disk.capture_every_operation(judged % 97 == 0);
            let report =
                run(&disk, &CheckOptions::repair("image")).map_err(|error| format!("{error} {when}"))?;
            judge(&disk, &format!("{when}, repaired"))?;
            if report.outcome == Outcome::Damaged || look(&disk).outcome != Outcome::Sound {
                return Err(format!("not repaired {when}: {report:?}"));
            }
            for (second, snapshot) in disk.take_captured().iter().enumerate() {
                let disk = snapshot.killed().into_disk(8);
                judge(&disk, &format!("{when}, cut again after {second}"))?;
                repair(&disk);
                judge(&disk, &format!("{when}, cut again after {second}, repaired"))?;
            }
        }
    }
    Ok(judged)
}

#[test]
fn a_repair_survives_being_cut_anywhere() {
    for shape in [Shape::v1(), Shape::v2()] {
        let mut judged = 0;
        for level in [CrashLevel::Prefix, CrashLevel::Subset, CrashLevel::Sectors] {
            judged += cut_everywhere(shape, level).unwrap();
        }
        assert!(judged > 200, "only {judged} states");
    }
}

#[test]
fn a_repair_that_does_not_survive_being_cut_is_noticed() {
    activate(Some(Mutant::RepairNotRepeatable));
    let found = cut_everywhere(Shape::v2(), CrashLevel::Sectors);
    activate(None);
    assert!(found.is_err(), "mutant M14 lives");
    ploop_testing::found(Mutant::RepairNotRepeatable);
}

#[test]
fn an_undo_survives_being_cut_anywhere() {
    let bytes = many_wounds(Shape::v1());
    let (disk, _file) = host(&bytes);
    repair(&disk);
    disk.capture_every_operation(true);
    let folder = disk.folder();
    undo_in(&folder, "image", &folder, "image.undo").unwrap();
    for (number, snapshot) in disk.take_captured().iter().enumerate() {
        for state in snapshot
            .crash_states(&CrashOptions { exhaustive_max: 64, ..CrashOptions::new(CrashLevel::Sectors) })
        {
            let disk = state.into_disk(9);
            let folder = disk.folder();
            undo_in(&folder, "image", &folder, "image.undo")
                .unwrap_or_else(|error| panic!("{number}: {error}"));
            let file = disk.open("image", Access::ReadOnly).unwrap();
            assert!(bytes_of(&file) == bytes, "after operation {number}");
        }
    }
}

#[test]
fn a_failing_call_leaves_what_was_readable() {
    let bytes = many_wounds(Shape::v2());
    for failing in 0.. {
        let (disk, file) = host(&bytes);
        disk.inject(Fault::any(libc::EIO).after(failing));
        let result = run(&disk, &CheckOptions::repair("image"));
        let happened = disk.faults_happened();
        disk.heal();
        assert!(result.is_err() || !happened, "call {failing}: an error was dropped");
        assert_kept(&bytes, &bytes_of(&file), &format!("call {failing}"));
        if !happened {
            assert!(failing > 10);
            break;
        }
        let report = repair(&disk);
        assert!(report.outcome <= Outcome::Repaired, "call {failing}: {report:?}");
        assert_kept(&bytes, &bytes_of(&file), &format!("call {failing}, repaired"));
    }
}

#[test]
fn undoing_refuses_another_image_and_one_that_was_changed() {
    let bytes = many_wounds(Shape::v2());
    let (disk, file) = host(&bytes);
    repair(&disk);
    let folder = disk.folder();
    let repaired = bytes_of(&file);
    let undo = || undo_in(&folder, "image", &folder, "image.undo");
    let mut random = Random::new(3);
    // An entry that was added, a copy that was written to, an image that grew.
    let copy = readable(&repaired, 200);
    assert_eq!(copy[10], copy[11]);
    let place = get(&repaired, 64 + 40) * 4096 + random.below(8) * 512;
    for (at, what) in [(64 + 4 * 20, "entry"), (place, "copy"), (repaired.len() as u64 + 4096, "growth")] {
        file.write_all_at(at, &[6, 0, 0, 0]).unwrap();
        assert!(undo().is_err(), "{what}");
        file.write_all_at(0, &repaired).unwrap();
        file.set_len(repaired.len() as u64).unwrap();
    }
    undo().unwrap();
    assert_eq!(bytes_of(&file), bytes);
}

/// Libraries of numbers are only as good as the eyes that read them: the report names place, meaning and remedy.
#[test]
fn reports_are_complete() {
    let (disk, _file) = host(&many_wounds(Shape::v1()));
    let report = look(&disk);
    let json = serde_json::to_value(&report).unwrap();
    for row in json["images"][0]["findings"]["counts"].as_array().unwrap() {
        for field in ["kind", "class", "count", "meaning", "remedy"] {
            assert!(!row[field].is_null(), "{field}: {row}");
        }
    }
    assert!(json["images"][0]["findings"]["examples"].as_array().unwrap().len() >= 6);
}
