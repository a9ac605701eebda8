//! Tests of the simulator itself.

#![allow(clippy::cast_possible_truncation, clippy::large_stack_arrays, reason = "small numbers of tests")]

use super::*;
use crate::io::{Allocation, FileSlot, Folder, IoBuf, IoKind, IoOp, IoQueue, Storage, StorageExt, Wait};
use std::collections::HashSet;

fn contents(state: CrashState, name: &str) -> Option<Vec<u8>> {
    let disk = state.into_disk(0);
    let storage = disk.open(name, Access::ReadOnly).ok()?;
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(0, &mut bytes).unwrap();
    Some(bytes)
}

/// Every content of the file "f" that a crash may leave now.
fn outcomes(disk: &SimDisk, level: CrashLevel) -> HashSet<Option<Vec<u8>>> {
    disk.snapshot().crash_states(&CrashOptions::new(level)).map(|state| contents(state, "f")).collect()
}

fn durable_file(disk: &SimDisk) -> SimStorage {
    let storage = disk.create("f").unwrap();
    disk.folder().sync().unwrap();
    storage
}

#[test]
fn only_what_was_synced_is_certain() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, b"A").unwrap();
    storage.sync_data().unwrap();
    storage.write_all_at(0, b"B").unwrap();
    storage.write_all_at(1, b"C").unwrap();
    let expected =
        |list: &[&str]| list.iter().map(|text| Some(text.as_bytes().to_vec())).collect::<HashSet<_>>();
    assert_eq!(outcomes(&disk, CrashLevel::Prefix), expected(&["A", "B", "BC"]));
    assert_eq!(outcomes(&disk, CrashLevel::Subset), expected(&["A", "B", "AC", "BC"]));
    storage.sync_data().unwrap();
    assert_eq!(outcomes(&disk, CrashLevel::Sectors), expected(&["BC"]));
}

#[test]
fn a_write_tears_at_sectors_and_nowhere_else() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, &[1; 1024]).unwrap();
    storage.sync_data().unwrap();
    storage.write_all_at(256, &[2; 512]).unwrap();
    let mut expected = HashSet::new();
    for (first, second) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
        let mut bytes = vec![1; 1024];
        bytes[256..512].fill(first);
        bytes[512..768].fill(second);
        expected.insert(Some(bytes));
    }
    assert_eq!(outcomes(&disk, CrashLevel::Sectors), expected);
}

#[test]
fn lengths_come_out_old_new_and_between() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, &[1; 512]).unwrap();
    storage.sync_data().unwrap();
    storage.allocate(512, 1 << 20, Allocation::Reserve).unwrap();
    storage.write_all_at(512, &[2; 512]).unwrap();
    let lengths: HashSet<usize> =
        outcomes(&disk, CrashLevel::Sectors).into_iter().map(|bytes| bytes.unwrap().len()).collect();
    assert!(lengths.contains(&512) && lengths.contains(&1024) && lengths.contains(&((1 << 20) + 512)));
    assert!(lengths.iter().any(|&len| len > 1024 && len <= 1 << 20), "{lengths:?}");
}

#[test]
fn names_are_durable_with_the_folder_and_contents_with_the_file() {
    let disk = SimDisk::new(1);
    let storage = disk.create("new").unwrap();
    storage.write_all_at(0, b"N").unwrap();
    disk.folder().rename("new", "f").unwrap();
    let all = outcomes(&disk, CrashLevel::Subset);
    assert!(
        all.contains(&None) && all.contains(&Some(vec![])) && all.contains(&Some(b"N".to_vec())),
        "{all:?}"
    );
    disk.folder().sync().unwrap();
    let all = outcomes(&disk, CrashLevel::Subset);
    assert!(!all.contains(&None) && all.contains(&Some(vec![])), "a renamed unsynced file may be empty");
    storage.sync_data().unwrap();
    assert_eq!(outcomes(&disk, CrashLevel::Sectors), HashSet::from([Some(b"N".to_vec())]));
}

#[test]
fn a_sync_does_not_cover_what_is_in_flight() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let storage = durable_file(&disk);
        let mut queue = disk.queue(8, seed).unwrap();
        let slot = queue.attach(Arc::new(storage.clone())).unwrap();
        let kind = IoKind::Write(IoBuf::try_copy_of(&[7; 512]).unwrap());
        queue.submit(IoOp { token: 1, file: slot, offset: 0, kind }).unwrap();
        queue.run_one();
        storage.sync_data().unwrap();
        assert_eq!(outcomes(&disk, CrashLevel::Subset).len(), 2, "written, but not told: may be lost");
        let mut done = Vec::new();
        queue.reap(Wait::Yes, &mut done).unwrap();
        assert_eq!(done.len(), 1);
        storage.sync_data().unwrap();
        assert_eq!(outcomes(&disk, CrashLevel::Subset), HashSet::from([Some(vec![7; 512])]));
    }
}

#[test]
fn a_lost_sync_is_never_made_good() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, b"A").unwrap();
    disk.inject(Fault::once(Call::Sync, libc::EIO).dropping_data());
    assert!(storage.sync_data().is_err());
    storage.sync_data().unwrap();
    assert_eq!(outcomes(&disk, CrashLevel::Subset), HashSet::from([Some(vec![])]));
    let mut read = [0];
    storage.read_exact_at(0, &mut read).unwrap();
    assert_eq!(&read, b"A", "the page cache still shows it");
}

#[test]
fn faults_hit_the_call_they_are_for() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    disk.inject(Fault::once(Call::Write, libc::ENOSPC).after(1));
    storage.write_at(0, b"x").unwrap();
    assert_eq!(storage.write_at(0, b"x").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert!(disk.faults_happened());
    storage.write_at(0, b"x").unwrap();
    disk.inject(Fault::any(libc::EIO).for_ever());
    assert!(storage.sync_data().is_err() && storage.set_len(0).is_err() && disk.folder().sync().is_err());
    disk.heal();
    storage.sync_data().unwrap();
    assert_eq!(disk.calls(Call::Sync), 2);
}

#[test]
fn a_full_host_refuses_and_punching_makes_room() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    disk.set_capacity(Some(16 << 10));
    storage.allocate(0, 16 << 10, Allocation::Reserve).unwrap();
    storage.write_all_at(0, &[1; 16 << 10]).unwrap();
    assert_eq!(storage.write_at(16 << 10, b"x").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    storage.allocate(0, 4 << 10, Allocation::Punch).unwrap();
    storage.write_all_at(16 << 10, b"x").unwrap();
    assert_eq!(storage.allocated_bytes().unwrap(), 16 << 10);
}

#[test]
fn short_and_interrupted_transfers_are_finished_by_whole_ones() {
    let disk = SimDisk::new(3);
    let storage = durable_file(&disk);
    disk.set_short_transfers(true);
    disk.set_interruptions(true);
    let data: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    let mut read = vec![0; data.len()];
    for start in [77, 200_000, 400_000] {
        storage.write_all_at(start, &data).unwrap();
        storage.read_exact_at(start, &mut read).unwrap();
        assert!(read == data);
    }
    assert!(disk.calls(Call::Write) > 3 && disk.calls(Call::Read) > 3, "no transfer was short");
}

#[test]
fn unaligned_transfers_fail_where_the_file_demands_it() {
    let disk = SimDisk::new(3);
    let storage = durable_file(&disk);
    disk.set_alignment(Alignment { offset: 512, memory: 512 });
    assert_eq!(storage.write_at(0, b"x").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    storage.write_all_at(700, b"abc").unwrap();
    let mut read = [0; 3];
    storage.read_padded_at(700, &mut read).unwrap();
    assert_eq!(&read, b"abc");
}

/// A random workload through files, folder and queue; its log hash.
fn workload(seed: u64) -> u64 {
    let disk = SimDisk::new(seed);
    let mut random = Random::new(seed);
    let storage: Arc<dyn Storage> = Arc::new(disk.create("f").unwrap());
    let mut queue = disk.queue(4, seed).unwrap();
    assert_eq!(queue.attach(Arc::clone(&storage)).unwrap(), FileSlot(0));
    let mut done = Vec::new();
    disk.set_short_transfers(true);
    for token in 0..200 {
        let offset = random.below(64) * 512;
        match random.below(6) {
            0 => storage.sync_data().unwrap(),
            1 => storage.allocate(offset, 4096, Allocation::Punch).unwrap(),
            2 => disk.folder().sync().unwrap(),
            _ => {
                let kind = IoKind::Write(IoBuf::try_copy_of(&[token as u8; 1024]).unwrap());
                drop(queue.submit(IoOp { token, file: FileSlot(0), offset, kind }));
            }
        }
        queue.reap(Wait::No, &mut done).unwrap();
    }
    disk.log_hash()
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let hashes: HashSet<u64> = (0..20).map(workload).collect();
    assert_eq!(hashes.len(), 20);
    for seed in 0..20 {
        assert!(hashes.contains(&workload(seed)));
    }
}

#[test]
fn samples_of_large_choices_hold_the_telling_ones() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, &[0; 64 << 10]).unwrap();
    storage.sync_data().unwrap();
    for at in 0..40u8 {
        storage.write_all_at(u64::from(at) * 1024, &[at + 1; 1024]).unwrap();
    }
    let options = CrashOptions { metadata_bytes: 1024, ..CrashOptions::new(CrashLevel::Sectors) };
    let all: Vec<Vec<u8>> =
        disk.snapshot().crash_states(&options).map(|state| contents(state, "f").unwrap()).collect();
    assert_eq!(all.len(), all.iter().collect::<HashSet<_>>().len(), "no state twice");
    let present = |bytes: &[u8]| (0..80).filter(|&sector| bytes[sector * 512] != 0).collect::<Vec<usize>>();
    let patterns: HashSet<Vec<usize>> = all.iter().map(|bytes| present(bytes)).collect();
    assert!(patterns.contains(&vec![]) && patterns.contains(&(0..80).collect::<Vec<_>>()));
    assert!(patterns.contains(&vec![0]), "a table sector alone");
    assert!(patterns.contains(&(2..80).collect::<Vec<_>>()), "all data without the table");
    for write in 0..40 {
        assert!(patterns.contains(&vec![2 * write, 2 * write + 1]), "write {write} alone");
        let missing = (0..80).filter(|sector| sector / 2 != write).collect::<Vec<_>>();
        assert!(patterns.contains(&missing), "write {write} missing");
    }
}

/// A toy store: a record, then a pointer that says how many records count. Crashes after every operation; returns
/// whether some state has a pointer to a record that is not there.
fn toy_store_breaks(with_sync_between: bool) -> bool {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    disk.capture_every_operation(true);
    storage.write_all_at(0, &[0; 512]).unwrap();
    for record in 1..=3u8 {
        storage.write_all_at(u64::from(record) * 512, &[record; 512]).unwrap();
        if with_sync_between {
            storage.sync_data().unwrap();
        }
        storage.write_all_at(0, &[record]).unwrap();
        storage.sync_data().unwrap();
    }
    let captured = disk.take_captured();
    assert_eq!(captured.len(), disk.trace().len() - 2, "creation and folder sync came before");
    captured.iter().flat_map(|snapshot| snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors))).any(
        |state| {
            let bytes = contents(state, "f").unwrap();
            let count = bytes.first().copied().unwrap_or(0);
            (1..=count).any(|record| bytes.get(usize::from(record) * 512) != Some(&record))
        },
    )
}

#[test]
fn a_missing_sync_is_found() {
    assert!(!toy_store_breaks(true));
    assert!(toy_store_breaks(false));
}

#[test]
fn a_sector_that_cannot_be_read_hinders_only_its_own_readers_until_it_is_written() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, &[1; 2048]).unwrap();
    storage.sync_data().unwrap();
    disk.lose_sector("f", 2).unwrap();
    assert_eq!(disk.unreadable_sectors(), [("f".to_owned(), 2)]);
    let mut bytes = [0; 2048];
    // As far as it goes, then not at all.
    assert_eq!(storage.read_at(0, &mut bytes).unwrap(), 1024);
    assert_eq!(storage.read_at(1100, &mut bytes).unwrap_err().raw_os_error(), Some(libc::EIO));
    storage.read_exact_at(1536, &mut bytes[..512]).unwrap();
    assert_eq!(storage.write_at(1200, &[2; 8]).unwrap_err().raw_os_error(), Some(libc::EIO), "a part of it");
    storage.write_all_at(1000, &[3; 536]).unwrap();
    storage.read_exact_at(0, &mut bytes).unwrap();
    assert_eq!((bytes[999], bytes[1000], bytes[1535], bytes[1536]), (1, 3, 3, 1));
    // Not durable yet: a crash brings it back.
    let lost = disk
        .snapshot()
        .crash_states(&CrashOptions::new(CrashLevel::Prefix))
        .map(|state| state.has_unreadable());
    assert_eq!(lost.collect::<Vec<_>>(), [true, false]);
    storage.sync_data().unwrap();
    disk.lose_sector("f", 3).unwrap();
    storage.set_len(1536).unwrap();
    assert!(disk.unreadable_sectors().is_empty());
}

#[test]
fn only_a_sector_that_was_being_written_becomes_unreadable() {
    let disk = SimDisk::new(1);
    let storage = durable_file(&disk);
    storage.write_all_at(0, &[1; 4096]).unwrap();
    storage.sync_data().unwrap();
    storage.write_all_at(512, &[2; 1024]).unwrap();
    let mut lost = HashSet::new();
    for seed in 0..20 {
        let options = CrashOptions { seed, ..CrashOptions::new(CrashLevel::Reordered) };
        for state in disk.snapshot().crash_states(&options).filter(CrashState::has_unreadable) {
            lost.extend(state.into_disk(0).unreadable_sectors());
        }
    }
    assert_eq!(lost, HashSet::from([("f".to_owned(), 1), ("f".to_owned(), 2)]));
    let harmless = disk.snapshot().crash_states(&CrashOptions::new(CrashLevel::Sectors));
    assert_eq!(harmless.filter(CrashState::has_unreadable).count(), 0);
}
