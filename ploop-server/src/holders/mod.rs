//! Who holds a block device: through which nodes, in which mount namespaces, mounted as what.
//!
//! A file system on a disk need not be mounted where this program looks, nor from the device it knows:
//!
//! | what | how it is found |
//! |---|---|
//! | partitions, device mapper, RAID, loop devices on top of it | [`nodes`]: sysfs, by device number |
//! | mounts in other mount namespaces, and below another root folder | one process of each, its table of mounts |
//! | btrfs, whose mounts show a device number of its own | mount source and `/sys/fs/btrfs/UUID/devices` |
//! | a file system unmounted lazily, raw use of a device | [`processes`]: open descriptors |
//! | swap | `/proc/swaps` |
//! | anything else that claims a device for itself | opening it exclusively fails |
//!
//! What was found is acted on through a descriptor that was verified to be that mount of that device
//! ([`Holders::open_file_system`]), never by a path alone: whatever lies on a mount point by now is somebody else's.

mod act;
mod copies;
mod mounts;
mod nodes;
mod processes;
mod swap;

use std::fmt;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ploop_core::device::mount_table::Mount;
use ploop_core::error::shown;
use ploop_core::{Error, ErrorKind, Result};

pub use act::{OpenedFileSystem, unmount_all};
pub use copies::unmount_copies;
pub use mounts::Namespace;
pub use nodes::{Node, NodeKind};

/// File systems that the kernel cannot freeze.
const NOT_FREEZABLE: &[&str] = &[
    "exfat", "fuse", "fuseblk", "hfs", "hfsplus", "hpfs", "iso9660", "minix", "msdos", "ntfs", "ntfs3",
    "squashfs", "erofs", "udf", "vfat", "cramfs", "romfs", "affs", "ufs", "sysv", "qnx4", "qnx6", "befs",
];

/// A mount of a file system of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// As the table of mounts has it.
    pub mount: Mount,
    /// The node that holds the file system.
    pub node: Node,
    /// Where it can be seen.
    pub namespace: Namespace,
}

impl Mounted {
    /// Whether the kernel can freeze it. A kind that is not known is tried.
    pub fn can_freeze(&self) -> bool {
        !NOT_FREEZABLE.contains(&self.mount.kind.as_str())
    }
}

impl fmt::Display for Mounted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} on {}", shown(&self.mount.point), self.node.path.display())?;
        if self.namespace.is_here { Ok(()) } else { write!(formatter, " (in {})", self.namespace) }
    }
}

/// Another use of the device than a mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OtherUse {
    /// The kernel swaps to it.
    Swap {
        /// The node.
        node: PathBuf,
    },
    /// A process has it open for writing, without claiming it.
    Raw {
        /// The node.
        node: PathBuf,
        /// Process id.
        process: u32,
        /// Name of its program.
        command: String,
    },
    /// Its file system is mounted nowhere any more, and a process still uses it.
    Lingering {
        /// The node.
        node: PathBuf,
        /// Process id.
        process: u32,
        /// Name of its program.
        command: String,
        /// The way to what it has open.
        way: PathBuf,
    },
    /// Something has claimed it for itself that was not found.
    Unknown {
        /// The node.
        node: PathBuf,
    },
}

impl fmt::Display for OtherUse {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Swap { node } => write!(formatter, "{} is used as swap space", node.display()),
            Self::Raw { node, process, command } => {
                write!(formatter, "process {process} ({command}) has {} open for writing", node.display())
            }
            Self::Lingering { node, process, command, .. } => write!(
                formatter,
                "process {process} ({command}) uses a file system on {} that is mounted nowhere any more",
                node.display()
            ),
            Self::Unknown { node } => {
                write!(formatter, "something that was not found holds {} for itself alone", node.display())
            }
        }
    }
}

/// All users of a block device at one moment.
#[derive(Clone, Debug, Default)]
pub struct Holders {
    /// The device itself, then whatever stands on it.
    pub nodes: Vec<Node>,
    /// Mounts of its file systems, those of our own namespace first, each in order of mounting.
    pub mounts: Vec<Mounted>,
    /// Swap, and what is claimed by something else. Processes only after [`look_at_processes`](Self::look_at_processes).
    pub others: Vec<OtherUse>,
    tables: Vec<mounts::Table>,
}

impl Holders {
    /// Who holds `device` now. Nobody, if it is no block device (any more).
    pub fn of(device: &Path) -> Result<Self> {
        let nodes = nodes::of(device);
        if nodes.is_empty() {
            return Ok(Self::default());
        }
        let tables = mounts::tables()?;
        let mounts = mounts::of(&nodes, &tables);
        let mut holders = Self { nodes, mounts, others: Vec::new(), tables };
        let swaps = swap::devices();
        // Those on top first: a claim of a partition is one of its disk as well.
        let mut claimed = vec![false; holders.nodes.len()];
        for (index, node) in holders.nodes.iter().enumerate().rev() {
            let is_mounted = holders.mounts.iter().any(|mounted| mounted.node.number == node.number);
            let is_swap = swaps.contains(&node.number);
            if is_swap {
                holders.others.push(OtherUse::Swap { node: node.path.clone() });
            }
            let mut is_claimed = is_mounted || is_swap;
            for (above, upper) in
                holders.nodes.iter().enumerate().filter(|(_, upper)| upper.below == Some(index))
            {
                is_claimed |= match upper.kind {
                    NodeKind::Partition => claimed[above],
                    NodeKind::Stacked => true,
                    NodeKind::Device | NodeKind::Loop => false,
                };
            }
            if !is_claimed && is_held_exclusively(&node.path) {
                holders.others.push(OtherUse::Unknown { node: node.path.clone() });
                is_claimed = true;
            }
            claimed[index] = is_claimed;
        }
        Ok(holders)
    }

    /// Adds what processes have open: raw writers, and users of file systems that are mounted nowhere. Reads every
    /// process's list of descriptors.
    pub fn look_at_processes(&mut self) {
        let found = processes::uses(&self.nodes, &self.mounts);
        // What was a riddle is solved by one that was found.
        self.others.retain(|other| {
            let OtherUse::Unknown { node } = other else { return true };
            !found.iter().any(|one| matches!(one, OtherUse::Lingering { node: other, .. } if other == node))
        });
        self.others.extend(found);
    }

    /// Whether nobody was found.
    pub fn is_unused(&self) -> bool {
        self.mounts.is_empty() && self.others.is_empty()
    }

    /// One mount of each file system.
    pub fn file_systems(&self) -> Vec<&Mounted> {
        let mut found: Vec<&Mounted> = Vec::new();
        for mounted in &self.mounts {
            if !found.iter().any(|other| other.mount.device == mounted.mount.device) {
                found.push(mounted);
            }
        }
        found
    }

    /// Devices of others that stand on it, partitions not counted.
    pub fn stacked(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| matches!(node.kind, NodeKind::Stacked | NodeKind::Loop))
    }

    /// The first mount of the device that can be used by its path here; `None` when no file system of it is mounted.
    /// [`ErrorKind::InUse`] when it is, but elsewhere or hidden: `purpose` says for what it is needed.
    pub fn usable_mount(&self, purpose: &str) -> Result<Option<&Mounted>> {
        if let Some(found) =
            self.mounts.iter().find(|mounted| mounted.namespace.is_here && act::is_topmost(mounted))
        {
            return Ok(Some(found));
        }
        let Some(first) = self.mounts.first() else { return Ok(None) };
        let advice = match &first.namespace {
            namespace if namespace.is_here => {
                format!("take away what lies on it: {}", self.what_covers(first))
            }
            namespace => format!("run the command there: nsenter -t {} -m ploop ...", namespace.process),
        };
        Err(Error::new(ErrorKind::InUse, format!("{purpose}: {first} cannot be reached from here"))
            .advise(advice))
    }

    /// What lies over a mount, for people.
    fn what_covers(&self, mounted: &Mounted) -> String {
        let Some(table) = self.tables.iter().find(|table| table.namespace == mounted.namespace) else {
            return "something".to_owned();
        };
        let found = act::covering(mounted, table);
        found.map_or_else(
            || format!("something over {}", shown(&mounted.mount.point)),
            |mount| format!("{} from {} at {}", mount.kind, shown(&mount.source), shown(&mount.point)),
        )
    }
}

/// Whether somebody has claimed the device for himself.
fn is_held_exclusively(node: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
