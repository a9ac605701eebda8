//! The kernel's tables of mounts: one for each mount namespace, as seen from the root folder of one process.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// One line of `/proc/PID/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number, alone among all mounts of the machine as long as it lives.
    pub id: u64,
    /// The number of the mount that it lies on.
    pub parent: u64,
    /// Major and minor number of the file system: those of its device, or 0 and a number that is no device's (btrfs).
    pub device: (u64, u64),
    /// The folder of the file system that is shown, from the root of the file system.
    pub root: PathBuf,
    /// Where, from the root of the process whose table it is.
    pub point: PathBuf,
    /// The peer groups that it or its copies belong to: it gets what is mounted and unmounted there.
    pub groups: Vec<u64>,
    /// Kind of file system.
    pub kind: String,
    /// What it was mounted from, as the file system says: mostly the path of a device.
    pub source: PathBuf,
    /// The folders that an overlay is built on, as they were given: from the root of whoever mounted it.
    pub layers: Vec<PathBuf>,
    /// Whether the file system, not only this mount of it, refuses writes.
    pub read_only: bool,
}

impl Mount {
    /// Whether it is a file system of that device or of one of its partitions, as far as the table itself tells.
    pub fn is_from(&self, device: (u64, u64)) -> bool {
        let is_it = |number| number == device || disk_of_partition(number) == Some(device);
        match self.device.0 {
            0 => self.kind == "btrfs" && device_number(&self.source).is_ok_and(is_it),
            _ => is_it(self.device),
        }
    }
}

/// The mounts of the table at `path`, in order of mounting. A line that cannot be read is passed over.
pub fn read(path: &Path) -> Result<Vec<Mount>> {
    let text = fs::read(path)
        .map_err(|cause| Error::io(ErrorKind::Open, "read the table of mounts", cause).at_path(path))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut next = || fields.next();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let (id, parent) = (number(next()?)?, number(next()?)?);
    let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let (root, point) = (path(next()?), path(next()?));
    let _options_of_this_mount = next()?;
    let mut groups = Vec::new();
    for field in fields.by_ref().take_while(|field| *field != b"-") {
        let field = std::str::from_utf8(field).ok()?;
        // "propagate_from" is the nearest group seen from here of a master that is not.
        if let Some((_, group)) = field.split_once(':') {
            groups.push(group.parse().ok()?);
        }
    }
    let (kind, source) = (fields.next()?, path(fields.next()?));
    let options = fields.next().unwrap_or_default();
    let layers = if kind == b"overlay" { layers(options) } else { Vec::new() };
    Some(Mount {
        layers,
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root,
        point,
        groups,
        kind: String::from_utf8_lossy(kind).into_owned(),
        source,
        read_only: options.split(|&byte| byte == b',').any(|option| option == b"ro"),
    })
}

/// The folders named in the options of an overlay. One with a comma or a colon in its name is not understood.
fn layers(options: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for option in options.split(|&byte| byte == b',') {
        let names = [&b"lowerdir="[..], b"lowerdir+=", b"datadir+=", b"upperdir="];
        let value = names.iter().find_map(|name| option.strip_prefix(*name));
        let folders = value.into_iter().flat_map(|value| value.split(|&byte| byte == b':'));
        found.extend(folders.map(path).filter(|folder| folder.is_absolute()));
    }
    found
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's `\040` for a space and the like; also for other lists of the kernel.
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().filter(|_| byte == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        plain.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    plain
}

/// Major and minor number of a device node; 0, 0 for what is none.
pub fn device_number(path: &Path) -> io::Result<(u64, u64)> {
    crate::io::sys::path_status(path).map(|status| status.node)
}

/// The whole disk that a partition is part of.
fn disk_of_partition(number: (u64, u64)) -> Option<(u64, u64)> {
    let folder = fs::canonicalize(format!("/sys/dev/block/{}:{}", number.0, number.1)).ok()?;
    if !folder.join("partition").exists() {
        return None;
    }
    parse_number(&fs::read_to_string(folder.parent()?.join("dev")).ok()?)
}

/// A device number as the kernel writes it in sysfs.
pub fn parse_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_odd_names() {
        let line =
            br"36 35 7:3 /in/side /mnt/a\040b\134\012 rw,noatime shared:1 master:7 - ext4 /dev/loop3 ro,x=rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, (7, 3)));
        assert_eq!(mount.point, Path::new("/mnt/a b\\\n"));
        assert_eq!(
            (mount.root.as_path(), mount.source.as_path()),
            (Path::new("/in/side"), Path::new("/dev/loop3"))
        );
        assert_eq!((mount.kind.as_str(), mount.read_only, mount.groups), ("ext4", true, vec![1, 7]));
        // "unbindable" has no number; a source may be nothing.
        let mount = parse(b"1 1 0:5 / / rw unbindable - tmpfs  rw").unwrap();
        assert_eq!((mount.source.as_path(), mount.read_only), (Path::new(""), false));
        let line = b"9 1 0:5 / /m rw - overlay none rw,lowerdir=/a\\040b:/c:d,upperdir=/up,workdir=/w";
        assert_eq!(parse(line).unwrap().layers, ["/a b", "/c", "/up"].map(PathBuf::from));
        for wrong in [&b"nonsense"[..], b"", b"1 2 3:4 / /x rw", b"1 2 3 / /x rw - a b c"] {
            assert_eq!(parse(wrong), None);
        }
    }

    #[test]
    fn our_own_table_has_a_root() {
        let mounts = read(Path::new("/proc/self/mountinfo")).unwrap();
        assert!(mounts.iter().any(|mount| mount.point == Path::new("/")), "{mounts:?}");
    }
}
