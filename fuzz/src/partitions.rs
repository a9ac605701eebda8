//! Hostile DOS partition tables: what is read lies on the disk and overlaps nothing, and a changed table is still one.

use fastrand::Rng;
use ploop_core::ops::dos_table::{self, DosTable, SECTOR};
use ploop_core::{Error, ErrorKind};

use crate::mutate::{damage, put};

/// Sectors of the disk; the input holds the first ones.
const DISK_SECTORS: u64 = 300;

fn entry(disk: &mut [u8], (at, slot): (usize, usize), kind: u8, start: u32, sectors: u32) {
    let place = at * SECTOR + 446 + slot * 16;
    put(disk, place + 4, &[kind]);
    put(disk, place + 8, &start.to_le_bytes());
    put(disk, place + 12, &sectors.to_le_bytes());
    put(disk, at * SECTOR + 510, &[0x55, 0xAA]);
}

/// A disk with a primary and up to a dozen logical partitions, damaged.
pub fn disk(random: &mut Rng) -> Vec<u8> {
    let mut disk = vec![0; SECTOR * 200];
    entry(&mut disk, (0, 0), 0x83, 2, 8);
    let base = 20_u32;
    entry(&mut disk, (0, random.usize(1..4)), *random.choice(&[5, 0x0F, 0x85]).unwrap_or(&5), base, 270);
    let count = random.u32(..12);
    for number in 0..count {
        let at = usize::try_from(base + number * 15).unwrap_or(0);
        entry(&mut disk, (at, 0), random.u8(1..), random.u32(1..4), random.u32(1..12));
        if number + 1 < count {
            entry(&mut disk, (at, 1), 5, (number + 1) * 15, 15);
        }
    }
    // Where it hurts: the tables.
    for _ in 0..random.usize(..4) {
        let at = if random.bool() { 0 } else { 20 + random.usize(..12) * 15 };
        let place = at * SECTOR + 446 + random.usize(..4) * 16 + random.usize(..16);
        put(&mut disk, place, &[if random.bool() { random.u8(..) } else { random.u8(..32) }]);
    }
    if random.u8(..4) == 0 {
        damage(random, &mut disk);
    }
    disk
}

fn read(disk: &[u8]) -> ploop_core::Result<Option<DosTable>> {
    dos_table::read(DISK_SECTORS, &mut |number| {
        assert!(number < DISK_SECTORS, "read past the end");
        let mut sector = [0; SECTOR];
        let at = usize::try_from(number).map_err(|_| Error::new(ErrorKind::Read, "far"))? * SECTOR;
        let there = disk.get(at..).unwrap_or_default();
        let len = there.len().min(SECTOR);
        sector[..len].copy_from_slice(&there[..len]);
        Ok(sector)
    })
}

fn must_be_sound(table: &DosTable) {
    let mut places: Vec<(u64, u64)> =
        table.partitions.iter().map(|partition| (partition.first, partition.end())).collect();
    places.sort_unstable();
    assert!(places.iter().all(|place| place.0 > 0 && place.0 < place.1 && place.1 <= DISK_SECTORS));
    assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "overlap: {places:?}");
}

/// Reads a table and gives each partition several ends.
pub fn run(input: &[u8]) {
    let Ok(Some(table)) = read(input) else { return };
    must_be_sound(&table);
    for partition in &table.partitions {
        let ends = [
            partition.first + 1,
            partition.end() - 1,
            partition.end() + 1,
            partition.end() + 6,
            DISK_SECTORS,
        ];
        for end in ends {
            let Ok(steps) = table.with_end(partition.number, end) else { continue };
            let mut disk = input.to_vec();
            disk.resize(SECTOR * 300, 0);
            for step in steps {
                for (number, bytes) in step {
                    put(&mut disk, usize::try_from(number).unwrap_or(0) * SECTOR, &bytes);
                }
                // Sound after each step, with the same partitions.
                let after = read(&disk).ok().flatten();
                assert!(after.is_some(), "the table has gone");
                let Some(after) = after else { return };
                must_be_sound(&after);
                let others = |table: &DosTable| {
                    table
                        .partitions
                        .iter()
                        .filter(|other| other.number != partition.number)
                        .cloned()
                        .collect::<Vec<_>>()
                };
                assert_eq!(others(&after), others(&table));
            }
            let after = read(&disk).ok().flatten();
            let found =
                after.iter().flat_map(|table| &table.partitions).find(|one| one.number == partition.number);
            assert_eq!(found.map(|one| one.end()), Some(end));
        }
    }
}
