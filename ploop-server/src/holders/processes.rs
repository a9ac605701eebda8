//! What processes have open: devices for writing, and file systems that are mounted nowhere any more.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ploop_core::io::sys;

use super::mounts::{command_of, processes};
use super::nodes::entries;
use super::{Mounted, Node, OtherUse};

/// Uses of `nodes` by processes other than this one, at most one of each kind by each process and node.
pub(super) fn uses(nodes: &[Node], mounts: &[Mounted]) -> Vec<OtherUse> {
    let mut found = Vec::new();
    let is_mounted =
        |number| mounts.iter().any(|mounted| mounted.mount.device == number || mounted.node.number == number);
    let find = |number| nodes.iter().find(|node| node.number == number && !is_mounted(number));
    for process in processes().into_iter().filter(|&process| process != std::process::id()) {
        let folder = Path::new("/proc").join(process.to_string());
        let ways = [folder.join("cwd"), folder.join("root")].into_iter().chain(entries(&folder.join("fd")));
        for way in ways {
            if let Some(one) = use_of(&way, process, &find)
                && !found.iter().any(|other| is_same(other, &one))
            {
                found.push(one);
            }
        }
    }
    found
}

/// What is open there, if it is a node or on one.
fn use_of<'a>(way: &Path, process: u32, find: &impl Fn((u64, u64)) -> Option<&'a Node>) -> Option<OtherUse> {
    let status = sys::path_status(way).ok()?;
    let command = || command_of(process);
    match status.mode & libc::S_IFMT {
        libc::S_IFBLK => {
            let node = find(status.node)?;
            // The link's permissions tell how it was opened.
            let writes = fs::symlink_metadata(way).ok()?.permissions().mode() & 0o200 != 0;
            writes.then(|| OtherUse::Raw { node: node.path.clone(), process, command: command() })
        }
        libc::S_IFREG | libc::S_IFDIR => {
            let node = find(status.device)?;
            Some(OtherUse::Lingering {
                node: node.path.clone(),
                process,
                command: command(),
                way: PathBuf::from(way),
            })
        }
        _ => None,
    }
}

fn is_same(one: &OtherUse, other: &OtherUse) -> bool {
    match (one, other) {
        (
            OtherUse::Raw { node, process, .. },
            OtherUse::Raw { node: other_node, process: other_process, .. },
        )
        | (
            OtherUse::Lingering { node, process, .. },
            OtherUse::Lingering { node: other_node, process: other_process, .. },
        ) => node == other_node && process == other_process,
        _ => false,
    }
}
