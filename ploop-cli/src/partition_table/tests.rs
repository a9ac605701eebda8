use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::*;
use crate::disk_bytes::ShownDisk;
use crate::partition;

const MIB: u64 = 1 << 20;

fn disk(folder: &Path) -> (PathBuf, File) {
    let path = folder.join("disk");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(64 * MIB).unwrap();
    (path, file)
}

fn table(path: &Path) -> Option<Table> {
    read(&ShownDisk::open(path, false).unwrap()).unwrap()
}

/// A DOS table with partitions of these types, starts and lengths.
fn put_dos(file: &File, entries: &[(u8, u32, u32)]) {
    let mut first = [0; 512];
    first[440..444].copy_from_slice(&0xCAFE_F00D_u32.to_le_bytes());
    for (slot, (kind, start, sectors)) in entries.iter().enumerate() {
        let at = 446 + slot * 16;
        first[at + 4] = *kind;
        first[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        first[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    }
    first[510..].copy_from_slice(&[0x55, 0xAA]);
    file.write_all_at(&first, 0).unwrap();
}

#[test]
fn both_kinds_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let (path, file) = disk(folder.path());
    assert_eq!(table(&path), None);
    put_dos(&file, &[(0x83, 2048, 4096)]);
    let dos = table(&path).unwrap();
    assert_eq!(dos.scheme, Scheme::Dos);
    assert_eq!(dos.partitions[0].uuid.as_deref(), Some("cafef00d-01"));
    for (offset, bytes) in &partition::layout(64 * MIB, MIB).unwrap().pieces {
        file.write_all_at(bytes, *offset).unwrap();
    }
    let gpt = table(&path).unwrap();
    assert_eq!((gpt.scheme, gpt.partitions.len()), (Scheme::Gpt, 1));
    assert_eq!(gpt.partitions[0].label.as_deref(), Some("primary"));
    // Beside other entries, as for two systems on one disk.
    let mut first = [0; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    first[446 + 16 + 4] = 0x83;
    first[446 + 16 + 9] = 8;
    first[446 + 16 + 13] = 8;
    file.write_all_at(&first, 0).unwrap();
    assert_eq!(table(&path).unwrap().scheme, Scheme::Gpt);
    // What is left of a GPT under a DOS table counts for nothing.
    put_dos(&file, &[(0x83, 2048, 4096)]);
    assert_eq!(table(&path).unwrap().scheme, Scheme::Dos);
    // A protection without what it protects is damage.
    put_dos(&file, &[(0xEE, 1, 4096)]);
    file.write_all_at(&[0; 512], 512).unwrap();
    file.write_all_at(&[0; 512], 64 * MIB - 512).unwrap();
    let error = read(&ShownDisk::open(&path, false).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PartitionTable);
}

#[test]
fn the_one_that_is_meant_is_found_or_all_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, file) = disk(folder.path());
    put_dos(&file, &[(0x83, 2048, 4096), (0x82, 8192, 4096)]);
    let table = table(&path).unwrap();
    assert_eq!(table.choose("2", &path).unwrap().offset, 8192 * 512);
    assert_eq!(table.choose("CAFEF00D-01", &path).unwrap().number, 1);
    for wrong in ["3", "swap", ""] {
        let error = table.choose(wrong, &path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter);
        assert!(error.advice().unwrap().contains("1 (2 MiB), 2 (2 MiB)"), "{error}");
    }
}
