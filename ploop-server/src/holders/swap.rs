//! Swap space: which devices the kernel swaps to.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use ploop_core::device::mount_table::{device_number, unescape};

/// Their device numbers.
pub(super) fn devices() -> Vec<(u64, u64)> {
    // A kernel without swap has no such list.
    let text = std::fs::read("/proc/swaps").unwrap_or_default();
    let names = text.split(|&byte| byte == b'\n').skip(1);
    let first = |line: &[u8]| line.split(|byte| byte.is_ascii_whitespace()).next().map(unescape);
    names
        .filter_map(first)
        .filter(|name| !name.is_empty())
        .filter_map(|name| device_number(&PathBuf::from(OsString::from_vec(name))).ok())
        .filter(|&number| number != (0, 0))
        .collect()
}
