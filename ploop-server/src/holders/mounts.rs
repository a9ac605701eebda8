//! Mounts of a device in every namespace that a process is in.
//!
//! One process stands for all that are in the same namespace with the same root folder; we stand for ours.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use ploop_core::Result;
use ploop_core::device::mount_table::{self, Mount, device_number};
use ploop_core::io::sys;

use super::nodes::btrfs_members;
use super::{Mounted, Node};

/// A mount namespace, seen from the root folder of one process in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Whether it is our own, and our root folder.
    pub is_here: bool,
    /// A process that is in it.
    pub process: u32,
    /// Name of its program.
    pub command: String,
}

impl fmt::Display for Namespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the mount namespace of process {}, {}", self.process, self.command)
    }
}

/// The table of mounts of one namespace.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) namespace: Namespace,
    pub(super) mounts: Vec<Mount>,
}

impl Namespace {
    /// The way to a path of it from here.
    pub(super) fn way_to(&self, path: &Path) -> PathBuf {
        if self.is_here {
            return path.to_path_buf();
        }
        let inside = path.strip_prefix("/").unwrap_or(path);
        Path::new("/proc").join(self.process.to_string()).join("root").join(inside)
    }
}

/// Name of a process's program, on one line.
pub(super) fn command_of(process: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    name.trim_end_matches('\n').escape_default().to_string()
}

/// The ids of all processes that can be seen, in order.
pub(super) fn processes() -> Vec<u32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut found: Vec<u32> = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    found.sort_unstable();
    found
}

/// What tells namespaces with their roots apart.
fn place_of(process: &str) -> Option<impl PartialEq + use<>> {
    let folder = Path::new("/proc").join(process);
    let namespace = sys::path_status(&folder.join("ns/mnt")).ok()?;
    let root = sys::path_status(&folder.join("root")).ok()?;
    Some((namespace.device, namespace.inode, root.device, root.inode, root.mount))
}

/// The tables of all namespaces, our own first.
pub(super) fn tables() -> Result<Vec<Table>> {
    let own = std::process::id();
    let here = Namespace { is_here: true, process: own, command: command_of(own) };
    let mut places = vec![place_of("self")];
    let mut tables =
        vec![Table { namespace: here, mounts: mount_table::read(Path::new("/proc/self/mountinfo"))? }];
    for process in processes() {
        let place = place_of(&process.to_string());
        // Gone, or not ours to look at.
        if place.is_none() || places.contains(&place) {
            continue;
        }
        let table = Path::new("/proc").join(process.to_string()).join("mountinfo");
        let Ok(mounts) = mount_table::read(&table) else { continue };
        if mounts.is_empty() {
            // It is just ending: another process may stand for the namespace.
            continue;
        }
        places.push(place);
        let namespace = Namespace { is_here: false, process, command: command_of(process) };
        tables.push(Table { namespace, mounts });
    }
    Ok(tables)
}

/// The mounts of file systems on any of `nodes`, each once.
pub(super) fn of(nodes: &[Node], tables: &[Table]) -> Vec<Mounted> {
    let members = btrfs_members(nodes);
    let mut found: Vec<Mounted> = Vec::new();
    for table in tables {
        for mount in &table.mounts {
            // The same namespace may be seen from several roots.
            if found.iter().any(|other| other.mount.id == mount.id) {
                continue;
            }
            if let Some(node) = node_of(mount, &table.namespace, nodes, &members) {
                let namespace = table.namespace.clone();
                found.push(Mounted { mount: mount.clone(), node: node.clone(), namespace });
            }
        }
    }
    found
}

fn node_of<'a>(
    mount: &Mount,
    namespace: &Namespace,
    nodes: &'a [Node],
    btrfs: &[(u64, u64)],
) -> Option<&'a Node> {
    if mount.device.0 != 0 {
        return nodes.iter().find(|node| node.number == mount.device);
    }
    if mount.kind != "btrfs" || btrfs.is_empty() {
        return None;
    }
    // Named as it was when it was mounted, in the namespace where it was.
    let number = [mount.source.clone(), namespace.way_to(&mount.source)]
        .iter()
        .find_map(|path| device_number(path).ok().filter(|&number| number != (0, 0)))?;
    let is_it = |node: &&Node| node.number == number;
    // Of a file system on several devices another one may be named.
    let by_member = || nodes.iter().find(|node| btrfs.contains(&node.number));
    nodes.iter().find(is_it).or_else(|| btrfs.contains(&number).then(by_member).flatten())
}
