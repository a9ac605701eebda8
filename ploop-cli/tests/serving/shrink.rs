//! What a disk that becomes smaller would cut is known by name, and refused.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ground::{Direct, Ground, program, text};
use crate::partitions::{MIB, has, import, partitioned};

/// How something is put on a raw file; `None` where the program for it is missing.
type Maker = fn(&Path) -> Option<()>;

fn run(tool: &str, line: &[&str], raw: &Path) -> Option<()> {
    let found = Command::new(tool).args(line).arg(raw).output();
    let Ok(output) = found else {
        ploop_testing::skip(ploop_testing::Need::Program(tool), format!("{tool} is not installed"));
        return None;
    };
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

fn put(raw: &Path, pieces: &[(u64, &[u8])]) -> Option<()> {
    let file = fs::File::options().write(true).open(raw).unwrap();
    for (offset, bytes) in pieces {
        file.write_all_at(bytes, *offset).unwrap();
    }
    Some(())
}

fn swap(raw: &Path) -> Option<()> {
    run("mkswap", &[], raw)
}
fn fat(raw: &Path) -> Option<()> {
    run("mkfs.vfat", &[], raw)
}
fn btrfs(raw: &Path) -> Option<()> {
    run("mkfs.btrfs", &["-q"], raw)
}
fn xfs(raw: &Path) -> Option<()> {
    run("mkfs.xfs", &["-q", "-f"], raw)
}

/// The label of a physical volume, as LVM writes it into the second sector.
fn lvm(raw: &Path) -> Option<()> {
    let mut label = [0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(b"abcdefabcdabcdabcdabcdabcdabcdef");
    label[64..72].copy_from_slice(&(120 * MIB).to_le_bytes());
    let sum = label[20..].iter().fold(0xF597_A6CF_u32, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| sum >> 1 ^ (0xEDB8_8320 & (sum & 1).wrapping_neg()))
    });
    label[16..20].copy_from_slice(&sum.to_le_bytes());
    put(raw, &[(512, &label)])
}

fn luks(raw: &Path) -> Option<()> {
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"LUKS\xBA\xBE\x00\x01");
    header[168..204].copy_from_slice(b"11111111-2222-3333-4444-555555555555");
    put(raw, &[(0, &header)])
}

/// A member of a mirror whose description lies at the end.
fn raid(raw: &Path) -> Option<()> {
    let at = (fs::metadata(raw).unwrap().len() - 8192) / 4096 * 4096;
    let mut block = [0; 4096];
    block[..8].copy_from_slice(&[0xFC, 0x4E, 0x2B, 0xA9, 1, 0, 0, 0]);
    block[16..32].copy_from_slice(&[0x5A; 16]);
    block[144..152].copy_from_slice(&(at / 512).to_le_bytes());
    // Sum of its words, the sum's own left out.
    let sum: u64 =
        block[..256].chunks(4).map(|word| u64::from(u32::from_le_bytes(word.try_into().unwrap()))).sum();
    let sum = u32::try_from(sum & 0xFFFF_FFFF).unwrap().wrapping_add(u32::try_from(sum >> 32).unwrap());
    block[216..220].copy_from_slice(&sum.to_le_bytes());
    put(raw, &[(at, &block)])
}

/// A volume of Windows whose file table lies far from its beginning, as it does on every large one.
fn ntfs(raw: &Path) -> Option<()> {
    let mut boot = [0; 512];
    boot[..11].copy_from_slice(b"\xEB\x52\x90NTFS    ");
    boot[11..14].copy_from_slice(&[0, 2, 8]);
    boot[21] = 0xF8;
    let sectors = fs::metadata(raw).unwrap().len() / 512 - 1;
    boot[40..48].copy_from_slice(&sectors.to_le_bytes());
    // Its cluster: 16384 of 4 KiB are 64 MiB; the copy's: 2.
    boot[48..56].copy_from_slice(&16384_u64.to_le_bytes());
    boot[56] = 2;
    boot[64] = 0xF6;
    boot[68] = 1;
    boot[510..].copy_from_slice(&[0x55, 0xAA]);
    let record = |number: u8| {
        let mut record = [0; 1024];
        record[..4].copy_from_slice(b"FILE");
        record[4] = 0x30;
        record[6] = 3;
        record[20] = 56;
        record[28..30].copy_from_slice(&[0, 4]);
        record[44] = number;
        record[56..60].fill(0xFF);
        record
    };
    let records: Vec<u8> = (0..4).flat_map(record).collect();
    put(raw, &[(0, &boot), (64 * MIB, &records)])
}

const MAKERS: &[(&str, Maker)] = &[
    ("swap", swap),
    ("vfat", fat),
    ("btrfs", btrfs),
    ("LVM2_member", lvm),
    ("crypto_LUKS", luks),
    ("linux_raid_member", raid),
    ("ntfs", ntfs),
];

/// What libblkid itself says of a file.
fn kind(raw: &Path) -> String {
    let output = Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE"]).arg(raw).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn exported(ground: &Ground, disk: &Path) -> Vec<u8> {
    let raw: PathBuf = ground.path("exported.raw");
    fs::remove_file(&raw).ok();
    ground.ends_with(0, &["export", text(disk), text(&raw)]);
    fs::read(raw).unwrap()
}

#[test]
fn what_cannot_become_smaller_is_named_and_refused() {
    let Some(ground) = Ground::new() else { return };
    if !has("blkid") {
        return;
    }
    for (name, make) in MAKERS {
        let raw = ground.path("x.raw");
        fs::File::create(&raw).unwrap().set_len(128 * MIB).unwrap();
        if make(&raw).is_none() {
            continue;
        }
        if kind(&raw) != *name {
            ploop_testing::skip(
                ploop_testing::Need::Other,
                format!("this libblkid does not know the test's {name}: {:?}", kind(&raw)),
            );
            continue;
        }
        let disk = import(&ground, &raw, name);
        let before = exported(&ground, &disk);
        assert!(before.starts_with(&fs::read(&raw).unwrap()));
        let said = ground.ends_with(26, &["resize", "-s", "96M", text(&disk)]);
        assert!(said.contains(name) && said.contains("nothing was changed"), "{said}");
        assert!(exported(&ground, &disk) == before, "{name}");
        // What is found from the end would be lost from sight on a longer disk as well.
        if *name == "linux_raid_member" {
            ground.ends_with(26, &["resize", "-s", "256M", text(&disk)]);
            assert!(exported(&ground, &disk) == before);
        } else {
            let said = ground.ends_with(0, &["resize", "-s", "160M", text(&disk)]);
            assert!(said.contains("left alone") && said.contains(name), "{said}");
            ground.ends_with(26, &["resize", "-s", "128M", text(&disk)]);
        }
        // Whoever says so loses it.
        ground.ends_with(0, &["resize", "--force", "-s", "64M", text(&disk)]);
        assert_eq!(exported(&ground, &disk).len() as u64, 64 * MIB);
        assert!(ground.runtime().states().unwrap().is_empty());
    }
}

/// The same in the partition that would be cut, in one that would be lost, and beside the partitions.
#[test]
fn what_a_partition_holds_is_known_too() {
    let Some(ground) = Ground::new() else { return };
    if !has("blkid") || !has("sfdisk") {
        return;
    }
    for scheme in ["dos", "gpt"] {
        let script = format!("label: {scheme}\nstart=2048, size=20480\nstart=22528, size=180224\n");
        let raw = partitioned(&ground, "p.raw", 128, &script);
        let part = ground.path("part.raw");
        fs::File::create(&part).unwrap().set_len(88 * MIB).unwrap();
        swap(&part).unwrap();
        put(&raw, &[(11 * MIB, &fs::read(&part).unwrap())]).unwrap();
        let disk = import(&ground, &raw, &format!("swap-{scheme}"));
        let before = exported(&ground, &disk);
        let said = ground.ends_with(26, &["resize", "-s", "64M", text(&disk)]);
        assert!(said.contains("partition 2 holds swap"), "{said}");
        for more in [&[][..], &["--force"]] {
            let line = [&["resize", "-s", "8M"], more, &[text(&disk)]].concat();
            let said = ground.ends_with(33, &line);
            assert!(said.contains("partition 2 begins past the new end") && said.contains("swap"), "{said}");
        }
        assert!(exported(&ground, &disk) == before);
        // The room behind the last partition can go.
        ground.ends_with(0, &["resize", "-s", "112M", text(&disk)]);
        let after = exported(&ground, &disk);
        assert_eq!(after[1 << 20..99 << 20], before[1 << 20..99 << 20]);
        let cut = ground.path("cut.raw");
        fs::write(&cut, &after).unwrap();
        program("sfdisk", &["--verify", text(&cut)]);
        // Not if there is something.
        put(&cut, &[(110 * MIB, b"something")]).unwrap();
        let disk = import(&ground, &cut, &format!("behind-{scheme}"));
        let said = ground.ends_with(38, &["resize", "-s", "108M", text(&disk)]);
        assert!(said.contains("holds data past its new end"), "{said}");
        // An empty partition is cut, one with data is not.
        for (data, code) in [(None, 0), (Some(90), 38)] {
            let raw = partitioned(&ground, "e.raw", 128, &script);
            if let Some(at) = data {
                put(&raw, &[(at * MIB, b"data")]).unwrap();
            }
            let disk = import(&ground, &raw, &format!("empty-{scheme}-{code}"));
            ground.ends_with(code, &["resize", "-s", "64M", text(&disk)]);
        }
    }
}

/// Written zeros are nothing, a single other byte is something.
#[test]
fn zeros_may_be_cut() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let name = text(&image);
    let device = ground.mount(&[name]);
    fs::File::options().write(true).open(&device).unwrap().write_all_at(&vec![0; 1 << 20], 60 * MIB).unwrap();
    Direct::open(&device).write(MIB, 4096, 1).unwrap();
    ground.ends_with(0, &["umount", name]);
    ground.ends_with(0, &["resize", "-s", "62M", name]);
    ground.ends_with(0, &["resize", "-s", "32M", name]);
    // xfs has its own word.
    if !has("mkfs.xfs") {
        return;
    }
    let raw = ground.path("xfs.raw");
    fs::File::create(&raw).unwrap().set_len(400 * MIB).unwrap();
    xfs(&raw).unwrap();
    let disk = import(&ground, &raw, "xfs");
    for more in [&[][..], &["--force"]] {
        let said = ground.ends_with(26, &[&["resize", "-s", "350M"], more, &[text(&disk)]].concat());
        assert!(said.contains("xfs, which cannot be made smaller"), "{said}");
    }
}
