use super::*;

/// A disk in memory.
struct Memory {
    sectors: BTreeMap<u64, SectorBytes>,
    len: u64,
}

impl Memory {
    fn new(len: u64) -> Self {
        Self { sectors: BTreeMap::new(), len }
    }

    fn put(&mut self, at: u64, slot: usize, kind: u8, start: u32, sectors: u32) {
        let bytes = self.sectors.entry(at).or_insert([0; SECTOR]);
        bytes[510..].copy_from_slice(&[0x55, 0xAA]);
        let entry = ENTRIES + slot * ENTRY;
        bytes[entry + 4] = kind;
        bytes[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
        bytes[entry + 12..entry + 16].copy_from_slice(&sectors.to_le_bytes());
    }

    fn read(&self) -> Result<Option<DosTable>> {
        super::read(self.len, &mut |at| {
            assert!(at < self.len, "read past the end");
            Ok(self.sectors.get(&at).copied().unwrap_or([0; SECTOR]))
        })
    }

    fn table(&self) -> DosTable {
        self.read().unwrap().unwrap()
    }

    fn apply(&mut self, steps: &[Changes]) {
        for (at, bytes) in steps.iter().flatten() {
            self.sectors.insert(*at, *bytes);
            // Sound after each sector.
            self.table();
        }
    }

    /// One primary, an extended one with two logical ones.
    fn with_logical() -> Self {
        let mut disk = Self::new(1 << 20);
        disk.put(0, 0, 0x83, 2048, 4096);
        disk.put(0, 1, 0x05, 8192, 40000);
        disk.put(8192, 0, 0x83, 2048, 4096);
        disk.put(8192, 1, 0x05, 10000, 12048);
        disk.put(18192, 0, 0x82, 2048, 10000);
        disk
    }
}

#[test]
fn primary_and_logical_partitions_are_found() {
    let table = Memory::with_logical().table();
    let found: Vec<(u32, u64, u64)> =
        table.partitions.iter().map(|one| (one.number, one.first, one.end())).collect();
    assert_eq!(found, [(1, 2048, 6144), (5, 10240, 14336), (6, 20240, 30240)]);
    assert_eq!(table.last().unwrap().number, 6);
    assert!(table.last().unwrap().is_logical());
}

#[test]
fn the_last_logical_partition_takes_the_extended_one_along() {
    let mut disk = Memory::with_logical();
    let steps = disk.table().with_end(6, 1 << 20).unwrap();
    // From the outside to the inside: what is inside never leaves.
    assert_eq!(steps.iter().map(|step| step[0].0).collect::<Vec<_>>(), [0, 8192, 18192]);
    disk.apply(&steps);
    let table = disk.table();
    assert_eq!(table.last().unwrap().end(), 1 << 20);
    assert_eq!(table.container.unwrap().end(), 1 << 20);
    let link = Entry::read(&disk.sectors[&8192], 1);
    assert_eq!(8192 + link.end(), 1 << 20);
    // And back.
    let steps = table.with_end(6, 25000).unwrap();
    assert_eq!(steps.iter().map(|step| step[0].0).collect::<Vec<_>>(), [18192, 8192, 0]);
    disk.apply(&steps);
    assert_eq!(disk.table().container.unwrap().end(), 25000);
    assert!(disk.table().with_end(6, 25000).unwrap().is_empty(), "nothing to do");
    // Another than the last leaves the extended one alone.
    let steps = disk.table().with_end(5, 12000).unwrap();
    disk.apply(&steps);
    assert_eq!(disk.table().partitions.iter().map(|one| one.end()).collect::<Vec<_>>(), [6144, 12000, 25000]);
}

#[test]
fn what_lies_behind_is_not_run_over() {
    let table = Memory::with_logical().table();
    assert!(table.with_end(1, 8193).unwrap_err().to_string().contains("extended"));
    assert!(table.with_end(5, 18193).unwrap_err().to_string().contains("18192"));
    assert!(table.with_end(5, 18192).is_ok());
    assert!(table.with_end(6, 20240).is_err(), "nothing would be left of it");
    assert!(table.with_end(6, 1 << 33).is_err());
    assert!(table.with_end(4, 30000).is_err());
}

#[test]
fn what_is_no_table_is_none() {
    assert!(Memory::new(4096).read().unwrap().is_none());
    assert!(Memory::new(1).read().unwrap().is_none());
    // A GPT's protection, also beside other entries.
    let mut disk = Memory::new(4096);
    disk.put(0, 0, 0xEE, 1, 4095);
    assert!(disk.read().unwrap().is_none());
    disk.put(0, 1, 0x83, 100, 100);
    assert!(disk.read().unwrap().is_none());
    // Boot sectors of file systems, whose code may look like entries.
    let mut fat = Memory::new(4096);
    fat.put(0, 0, 0x83, 100, 100);
    let head = fat.sectors.get_mut(&0).unwrap();
    head[..3].copy_from_slice(&[0xEB, 0x58, 0x90]);
    head[11..17].copy_from_slice(&[0, 2, 8, 32, 0, 2]);
    head[21] = 0xF8;
    assert!(fat.read().unwrap().is_none());
    // The loader of a bootable disk begins with the same jump and is a table.
    fat.sectors.get_mut(&0).unwrap()[11..22].fill(0);
    assert!(fat.read().unwrap().is_some());
    fat.sectors.get_mut(&0).unwrap()[3..11].copy_from_slice(b"NTFS    ");
    assert!(fat.read().unwrap().is_none());
    // Flags that no table has.
    let mut text = Memory::new(4096);
    text.put(0, 0, 0x83, 100, 100);
    text.sectors.get_mut(&0).unwrap()[ENTRIES + ENTRY] = 0x41;
    assert!(text.read().unwrap().is_none());
}

#[test]
fn absurd_tables_are_refused() {
    let refused = |change: &dyn Fn(&mut Memory), word: &str| {
        let mut disk = Memory::with_logical();
        change(&mut disk);
        let error = disk.read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PartitionTable);
        assert!(error.to_string().contains(word) && error.advice().is_some(), "{error}");
    };
    refused(&|disk| disk.put(0, 2, 0x83, 6000, 1000), "overlap");
    refused(&|disk| disk.put(0, 2, 0x83, 1 << 20, 1), "outside");
    refused(&|disk| disk.put(0, 2, 0x83, u32::MAX, u32::MAX), "outside");
    refused(&|disk| disk.put(0, 2, 0x83, 0, 10), "outside");
    refused(&|disk| disk.put(0, 2, 0x0F, 60000, 10), "two extended");
    refused(&|disk| disk.put(8192, 0, 0x83, 2048, 90000), "leaves");
    refused(&|disk| disk.put(8192, 0, 0x83, 2048, 18000), "overlap");
    refused(&|disk| disk.put(8192, 1, 0x05, 0, 100), "circle");
    refused(&|disk| disk.put(18192, 1, 0x05, 0, 100), "circle");
    refused(&|disk| disk.put(18192, 1, 0x05, 10000, 100), "circle");
    refused(&|disk| disk.put(18192, 1, 0x05, 39999, 100), "no table");
    refused(&|disk| disk.put(18192, 1, 0x05, 50000, 100), "outside");
}

#[test]
fn an_endless_chain_is_left() {
    let mut disk = Memory::new(1 << 20);
    disk.put(0, 0, 0x05, 100, 1 << 19);
    for number in 0..2000u32 {
        disk.put(u64::from(100 + number * 10), 1, 0x05, (number + 1) * 10, 10);
    }
    assert!(disk.read().unwrap_err().to_string().contains("more than"));
    // An extended partition that nobody has used.
    let mut disk = Memory::new(1 << 20);
    disk.put(0, 0, 0x05, 100, 1000);
    assert!(disk.table().partitions.is_empty());
}

#[test]
fn addresses_of_the_old_kind() {
    assert_eq!(address(0), [0, 1, 0]);
    assert_eq!(address(63), [1, 1, 0]);
    assert_eq!(address(255 * 63 * 300), [0, 0x41, 44]);
    assert_eq!(address(u64::MAX / 2), [254, 0xFF, 0xFF]);
}
