//! Temporary files that are being written, told from those that a killed program left.
//!
//! Whoever writes a file `NAME.tmp.…` holds a lock on one byte of it, far behind any content and apart from those that say who
//! owns an image; the kernel takes it back when the program ends, however it ends. So a later program that makes `NAME` may
//! remove those that nobody holds. The lock goes with the open file: keep that until the file has its name.

use std::borrow::Cow;
use std::io;
use std::os::fd::BorrowedFd;

use super::sys::{self, LockMode};
use super::{Access, Folder};

/// The byte that is locked.
const BUILDER_BYTE: u64 = (1 << 62) + 1;

/// Longest name of a file in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Most bytes that any of our programs appends to the name of a file for one of its own: `.incoming-`, the number of a copy,
/// that of a delta and `-plan`.
const SUFFIX_BYTES_MAX: usize = 64;
/// Digits of the hash that stands for the end of a name.
const HASH_DIGITS: usize = 16;

/// What names of our own files for `file` begin with: its name, if there is room behind it for what we append; else its
/// start and a hash of all of it, always the same for the same name.
pub fn stem(file: &str) -> Cow<'_, str> {
    let room = NAME_BYTES_MAX - SUFFIX_BYTES_MAX;
    if file.len() <= room {
        return Cow::Borrowed(file);
    }
    let mut end = room - HASH_DIGITS - 1;
    while !file.is_char_boundary(end) {
        end -= 1;
    }
    let hash = blake3::hash(file.as_bytes()).to_hex();
    Cow::Owned(format!("{}~{}", &file[..end], &hash[..HASH_DIGITS]))
}

/// A temporary name of `file` that nobody else chooses.
pub fn new_name(file: &str, random: &str) -> String {
    format!("{}.tmp.{}", stem(file), random.trim_matches(['{', '}']))
}

/// Says that `file` is being written. `false` when somebody else says so.
pub fn hold(file: BorrowedFd<'_>) -> io::Result<bool> {
    match sys::lock_bytes(file, LockMode::Exclusive, BUILDER_BYTE, 1) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether `name` is one of the temporary names of `file`: its [`stem`], `.tmp.` and a GUID, with or without hyphens.
pub fn is_name_of(name: &str, file: &str) -> bool {
    let Some(random) = name.strip_prefix(&*stem(file)).and_then(|rest| rest.strip_prefix(".tmp.")) else {
        return false;
    };
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    match random.len() {
        32 => random.bytes().all(is_digit),
        36 => random.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => is_digit(byte),
        }),
        _ => false,
    }
}

/// Removes what killed programs left of `file` in `folder`: temporary files of it that nobody holds. What cannot be looked at,
/// locked or removed stays: it is in nobody's way. Returns how many are gone.
pub fn remove_left_over(folder: &dyn Folder, file: &str) -> io::Result<usize> {
    let mut removed = 0;
    for name in folder.list()?.into_iter().filter(|name| is_name_of(name, file)) {
        let Ok(storage) = folder.open(&name, Access::ReadWrite) else { continue };
        let is_free = storage.descriptor().is_some_and(|opened| hold(opened).unwrap_or(false));
        // Held by us from here on: its maker, if it is just being made, sees that it is gone and makes another.
        if is_free && folder.unlink(&name).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::file::DirectoryFolder;

    const PLAIN: &str = "disk.tmp.0123456789abcdef0123456789abcdef";
    const HYPHENS: &str = "disk.tmp.01234567-89ab-cdef-0123-456789abcdef";

    #[test]
    fn names() {
        assert!(is_name_of(PLAIN, "disk") && is_name_of(HYPHENS, "disk"));
        for other in [
            "disk.tmp.",
            "disk.tmp.0123",
            "disk.tmp.0123456789ABCDEF0123456789abcdef",
            "disk.tmp.0123456789abcdef0123456789abcdeg",
            "disk.tmp.01234567-89ab-cdef-0123456789abcdef0",
            "other.tmp.0123456789abcdef0123456789abcdef",
            "disk0123456789abcdef0123456789abcdef",
        ] {
            assert!(!is_name_of(other, "disk"), "{other}");
        }
        assert!(!is_name_of(PLAIN, "dis"));
    }

    #[test]
    fn names_that_leave_no_room_are_shortened_and_stay_apart() {
        assert_eq!(stem("disk"), "disk");
        for unit in ["N", "\u{e9}", "\u{1f4be}"] {
            let long = unit.repeat(255 / unit.len());
            let name = new_name(&long, &PLAIN["disk.tmp.".len()..]);
            assert!(
                stem(&long).len() + SUFFIX_BYTES_MAX <= NAME_BYTES_MAX && is_name_of(&name, &long),
                "{name}"
            );
            let mut other = long.clone();
            other.pop();
            assert!(stem(&other) != stem(&long) && !is_name_of(&name, &other));
        }
        for room in [190, 191, 192, 255] {
            let name = "n".repeat(room);
            assert!(stem(&name).len() <= 191 && (stem(&name) == name) == (room <= 191));
        }
    }

    #[test]
    fn what_nobody_holds_goes() {
        let place = tempfile::tempdir().unwrap();
        let folder = DirectoryFolder::open(place.path()).unwrap();
        for name in [PLAIN, HYPHENS, "disk", "disk.tmp.mine"] {
            folder.create_exclusive(name).unwrap();
        }
        let held = folder.open(PLAIN, Access::ReadWrite).unwrap();
        assert!(hold(held.descriptor().unwrap()).unwrap());
        let other = folder.open(PLAIN, Access::ReadWrite).unwrap();
        assert!(!hold(other.descriptor().unwrap()).unwrap());
        drop(other);
        assert_eq!(remove_left_over(&folder, "disk").unwrap(), 1);
        assert!(folder.exists(PLAIN).unwrap() && !folder.exists(HYPHENS).unwrap());
        drop(held);
        assert_eq!(remove_left_over(&folder, "disk").unwrap(), 1);
        let mut left = folder.list().unwrap();
        left.sort();
        assert_eq!(left, ["disk", "disk.tmp.mine"]);
    }
}
