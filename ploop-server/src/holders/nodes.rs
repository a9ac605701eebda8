//! A block device and every other one that stands on it, from sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use ploop_core::device::mount_table::{device_number, parse_number};
use ploop_core::io::sys;

/// Chains of devices are not longer, and a circle ends.
const NODES_MAX: usize = 1024;

/// How a node stands on the one below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// It is the device that was asked for.
    Device,
    /// A partition of it that the kernel knows.
    Partition,
    /// A device that has claimed it: device mapper, RAID, a cache.
    Stacked,
    /// A loop device whose file it is.
    Loop,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name in `/dev`.
    pub path: PathBuf,
    /// Its name in sysfs.
    pub name: String,
    /// Major and minor number.
    pub number: (u64, u64),
    /// How it stands on `below`.
    pub kind: NodeKind,
    /// The place of the one below it in the list.
    pub below: Option<usize>,
}

/// `device` and all that stands on it, each after what is below it. Empty when it is no block device.
pub(super) fn of(device: &Path) -> Vec<Node> {
    of_in(device, Path::new("/sys"))
}

fn of_in(device: &Path, sysfs: &Path) -> Vec<Node> {
    let Ok(number) = device_number(device) else { return Vec::new() };
    let is_block_device =
        sys::path_status(device).is_ok_and(|status| status.mode & libc::S_IFMT == libc::S_IFBLK);
    let folder = fs::canonicalize(sysfs.join(format!("dev/block/{}:{}", number.0, number.1)));
    let (true, Ok(folder)) = (is_block_device, folder) else { return Vec::new() };
    let first = Node {
        path: device.to_path_buf(),
        name: name_of(&folder),
        number,
        kind: NodeKind::Device,
        below: None,
    };
    let mut nodes = vec![first];
    let mut folders = vec![folder];
    let loops = loops(sysfs);
    let mut at = 0;
    while at < nodes.len() && nodes.len() < NODES_MAX {
        let mut found: Vec<(NodeKind, PathBuf)> = Vec::new();
        for entry in entries(&folders[at]) {
            if entry.join("partition").exists() {
                found.push((NodeKind::Partition, entry));
            }
        }
        for entry in entries(&folders[at].join("holders")) {
            if let Ok(folder) = fs::canonicalize(entry) {
                found.push((NodeKind::Stacked, folder));
            }
        }
        for (folder, file) in &loops {
            let is_it =
                *file == nodes[at].path || device_number(file).is_ok_and(|number| number == nodes[at].number);
            if is_it {
                found.push((NodeKind::Loop, folder.clone()));
            }
        }
        for (kind, folder) in found {
            let Some(number) =
                fs::read_to_string(folder.join("dev")).ok().and_then(|text| parse_number(&text))
            else {
                continue;
            };
            if nodes.iter().any(|node| node.number == number) {
                continue;
            }
            let name = name_of(&folder);
            let path = Path::new("/dev").join(name.replace('!', "/"));
            nodes.push(Node { path, name, number, kind, below: Some(at) });
            folders.push(folder);
        }
        at += 1;
    }
    nodes
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The entries of a folder; none when it cannot be read.
pub(super) fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// All loop devices: their folders in sysfs and the names of their files.
fn loops(sysfs: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for entry in entries(&sysfs.join("block")) {
        if let Ok(file) = fs::read_to_string(entry.join("loop/backing_file"))
            && let Ok(folder) = fs::canonicalize(&entry)
        {
            found.push((folder, PathBuf::from(file.trim_end_matches('\n'))));
        }
    }
    found
}

/// Devices of all mounted btrfs file systems that one of `nodes` belongs to.
pub(super) fn btrfs_members(nodes: &[Node]) -> Vec<(u64, u64)> {
    let mut members = Vec::new();
    for folder in entries(Path::new("/sys/fs/btrfs")) {
        let devices = entries(&folder.join("devices"));
        let is_ours = devices.iter().any(|device| nodes.iter().any(|node| node.name == name_of(device)));
        if is_ours {
            let number = |device: &PathBuf| parse_number(&fs::read_to_string(device.join("dev")).ok()?);
            members.extend(devices.iter().filter_map(number));
        }
    }
    members
}

/// Whether the btrfs file system of that UUID has a device of that name.
pub(super) fn is_btrfs_member(id: [u8; 16], node: &Node) -> bool {
    let id = uuid::Uuid::from_bytes(id);
    Path::new("/sys/fs/btrfs").join(id.to_string()).join("devices").join(&node.name).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_no_block_device_has_no_nodes() {
        for path in ["/dev/null", "/proc", "/nonexistent"] {
            assert_eq!(of(Path::new(path)), []);
        }
    }

    /// A made-up sysfs over a real node: partitions and holders are found at any depth, and a circle ends.
    #[test]
    fn partitions_and_stacked_devices_are_found_at_any_depth() {
        let Some(device) = entries(Path::new("/dev")).into_iter().find(|path| {
            sys::path_status(path).is_ok_and(|status| status.mode & libc::S_IFMT == libc::S_IFBLK)
        }) else {
            ploop_testing::skip(ploop_testing::Need::Other, "there is no block device here");
            return;
        };
        let (major, minor) = device_number(&device).unwrap();
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path();
        let disk = sysfs.join("devices/virtual/block/loop9");
        let make = |folder: &Path, number: &str| {
            fs::create_dir_all(folder.join("holders")).unwrap();
            fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
        };
        make(&disk, &format!("{major}:{minor}"));
        let part = disk.join("loop9p1");
        make(&part, "259:7");
        fs::write(part.join("partition"), "1\n").unwrap();
        let mapped = sysfs.join("devices/virtual/block/dm-3");
        make(&mapped, "253:3");
        symlink(&mapped, part.join("holders/dm-3")).unwrap();
        symlink(&disk, mapped.join("holders/loop9")).unwrap();
        fs::create_dir_all(sysfs.join("dev/block")).unwrap();
        symlink(&disk, sysfs.join(format!("dev/block/{major}:{minor}"))).unwrap();
        // A loop device on top of the partition.
        let upper = sysfs.join("devices/virtual/block/loop11");
        make(&upper, "7:11");
        fs::create_dir_all(upper.join("loop")).unwrap();
        fs::write(upper.join("loop/backing_file"), "/dev/loop9p1\n").unwrap();
        fs::create_dir_all(sysfs.join("block")).unwrap();
        symlink(&upper, sysfs.join("block/loop11")).unwrap();
        let found = of_in(&device, sysfs);
        let seen: Vec<_> =
            found.iter().map(|node| (node.name.as_str(), node.number, node.kind, node.below)).collect();
        assert_eq!(
            seen,
            [
                ("loop9", (major, minor), NodeKind::Device, None),
                ("loop9p1", (259, 7), NodeKind::Partition, Some(0)),
                ("dm-3", (253, 3), NodeKind::Stacked, Some(1)),
                ("loop11", (7, 11), NodeKind::Loop, Some(1)),
            ]
        );
    }
}
