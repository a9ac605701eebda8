//! Acting on what was found, and on nothing else: descriptors that are verified, and unmounting what lies on top.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use ploop_core::device::mount_table::{self, Mount};
use ploop_core::error::shown;
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};

use super::copies::follows;
use super::mounts::Table;
use super::nodes::is_btrfs_member;
use super::{Holders, Mounted, OtherUse};

/// How long a file system that is in use is tried again before it is called busy.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// How often.
const BUSY_LOOK: Duration = Duration::from_millis(50);

/// A mounted file system of the device, reached and verified.
#[derive(Debug)]
pub struct OpenedFileSystem {
    /// For people: mount point and device, and the namespace if it is another.
    pub name: String,
    /// A way to it from here, for commands: its mount point, through a process of its namespace if that is another.
    pub way: PathBuf,
    /// Major and minor number by which the table of mounts knows it.
    pub device: (u64, u64),
    /// Where it is mounted, from the root of the namespace it was found in; nothing if it is nowhere.
    pub point: PathBuf,
    /// Something open on it.
    pub folder: OwnedFd,
}

impl Holders {
    /// Opens a file system that is mounted nowhere any more, by what a process has open of it.
    pub fn open_lingering(&self, other: &OtherUse) -> Result<OpenedFileSystem> {
        let failed = |cause: &str| unreachable(&other.to_string(), io::Error::other(cause.to_owned()));
        let OtherUse::Lingering { node, way, .. } = other else { return Err(failed("it is no file system")) };
        let node =
            self.nodes.iter().find(|one| one.path == *node).ok_or_else(|| failed("its device is unknown"))?;
        let file = reopen(way).map_err(|cause| unreachable(&other.to_string(), cause))?;
        if !sys::file_status(file.as_fd()).is_ok_and(|status| status.device == node.number) {
            return Err(failed("another file system was found there"));
        }
        Ok(OpenedFileSystem {
            name: other.to_string(),
            way: way.clone(),
            device: node.number,
            point: PathBuf::new(),
            folder: file,
        })
    }

    /// Opens one file system through any of its mounts; covered everywhere, through one more mount of its own. What is
    /// opened is verified to be on the device: neither what covers its mount point nor a mount that took its place
    /// meanwhile is taken for it.
    pub fn open_file_system(&self, file_system: &Mounted) -> Result<OpenedFileSystem> {
        let device = file_system.mount.device;
        let mut failure = None;
        let opened = |mounted: &Mounted, folder| OpenedFileSystem {
            name: mounted.to_string(),
            way: mounted.namespace.way_to(&mounted.mount.point),
            device,
            point: mounted.mount.point.clone(),
            folder,
        };
        for mounted in self.mounts.iter().filter(|other| other.mount.device == device) {
            match open_mount(mounted) {
                Ok(folder) => return Ok(opened(mounted, folder)),
                Err(cause) => failure = failure.or(Some(cause)),
            }
        }
        let mount = &file_system.mount;
        let hidden = sys::another_mount(&mount.kind, &file_system.node.path, mount.read_only);
        match hidden.and_then(|folder| verify(folder, file_system, None)) {
            Ok(folder) => Ok(opened(file_system, folder)),
            Err(cause) => {
                let name = format!("{file_system}, on which lies {}", self.what_covers(file_system));
                let failure = failure.map_or_else(|| cause.to_string(), |first| format!("{first}; {cause}"));
                Err(unreachable(&name, io::Error::other(failure)))
            }
        }
    }
}

fn unreachable(name: &str, cause: io::Error) -> Error {
    Error::io(ErrorKind::NotQuiet, format!("reach the file system {name}"), cause)
        .advise("take away what lies on it, or unmount it; as it is, it cannot be frozen")
}

/// Opens a folder or file by its way through /proc or a mount point, without waiting.
fn reopen(way: &Path) -> io::Result<OwnedFd> {
    let mode = sys::path_status(way)?.mode & libc::S_IFMT;
    // Anything else would be opened as what it is: a device, a pipe.
    if mode != libc::S_IFDIR && mode != libc::S_IFREG {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(way)?.into())
}

/// The root of that very mount.
fn open_mount(mounted: &Mounted) -> io::Result<OwnedFd> {
    let way = mounted.namespace.way_to(&mounted.mount.point);
    // Looked at before it is opened.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let place = File::options().read(true).custom_flags(flags).open(way)?;
    let place = verify(place.into(), mounted, Some(mounted.mount.id))?;
    verify(
        reopen(Path::new(&format!("/proc/self/fd/{}", place.as_raw_fd())))?,
        mounted,
        Some(mounted.mount.id),
    )
}

/// Gives `file` back if it is on the file system, and in the mount of that number.
fn verify(file: OwnedFd, mounted: &Mounted, mount: Option<u64>) -> io::Result<OwnedFd> {
    let status = sys::file_status(file.as_fd())?;
    let wrong = |what: &str| Err(io::Error::other(what.to_owned()));
    if let (Some(wanted), Some(found)) = (mount, status.mount)
        && wanted != found
    {
        return wrong("another mount lies there");
    }
    // btrfs shows a number of its own for each subvolume.
    let is_it = match mounted.mount.device.0 {
        // An O_PATH descriptor answers no command; the one behind it is asked again.
        0 => match sys::btrfs_id(file.as_fd()) {
            Ok(id) => is_btrfs_member(id, &mounted.node),
            Err(error) => mount.is_some() && error.raw_os_error() == Some(libc::EBADF),
        },
        _ => status.device == mounted.mount.device,
    };
    if is_it { Ok(file) } else { wrong("another file system lies there") }
}

/// Whether the mount point leads to that very mount.
pub(super) fn is_topmost(mounted: &Mounted) -> bool {
    let status = sys::path_status(&mounted.namespace.way_to(&mounted.mount.point));
    status.is_ok_and(|status| match status.mount {
        Some(found) => found == mounted.mount.id,
        // Before Linux 5.8: the file system is what can be compared.
        None => status.device == mounted.mount.device,
    })
}

/// The mount that lies on top of the mount point, or hides the way to it.
pub(super) fn covering<'a>(mounted: &Mounted, table: &'a Table) -> Option<&'a Mount> {
    let point = &mounted.mount.point;
    let top = point.ancestors().find_map(|way| {
        sys::path_status(&table.namespace.way_to(way)).ok()?.mount.filter(|&found| found != mounted.mount.id)
    });
    table.mounts.iter().find(|mount| Some(mount.id) == top)
}

fn busy(message: String, advice: String) -> Error {
    Error::new(ErrorKind::UnmountBusy, message).advise(advice)
}

impl Holders {
    fn own_table(&self) -> Option<&Table> {
        self.tables.iter().find(|table| table.namespace.is_here)
    }

    fn is_ours(&self, mount: &Mount) -> bool {
        self.mounts.iter().any(|mounted| mounted.mount.id == mount.id)
    }

    /// As [`follows`].
    fn follows(&self, elsewhere: &Mounted, own: &Mounted) -> bool {
        let table = |mounted: &Mounted| self.tables.iter().find(|table| table.namespace == mounted.namespace);
        match (table(elsewhere), table(own)) {
            (Some(there), Some(here)) => follows((&elsewhere.mount, there), (&own.mount, here)),
            _ => false,
        }
    }

    /// An overlay that is built on one of our mounts, which its unmounting would not end.
    fn overlay_on(&self, own: &Mounted) -> Option<(&Mount, &Table)> {
        let is_on_it = |table: &Table, layer: &PathBuf| {
            let status = sys::path_status(&table.namespace.way_to(layer));
            status.is_ok_and(|status| status.device == own.mount.device)
        };
        let mut all =
            self.tables.iter().flat_map(|table| table.mounts.iter().map(move |mount| (mount, table)));
        all.find(|(mount, table)| mount.layers.iter().any(|layer| is_on_it(table, layer)))
    }

    /// Why not all of the device can be unmounted, found out before anything is.
    fn check_unmount(&self) -> Result<()> {
        if let Some(node) = self.stacked().next() {
            let below = node.below.and_then(|below| self.nodes.get(below)).unwrap_or(node);
            let (name, below) = (node.path.display(), below.path.display());
            return Err(busy(
                format!("{name} stands on {below}"),
                format!(
                    "end that first: losetup -d, vgchange -an, dmsetup remove or mdadm --stop, whichever made {name}"
                ),
            ));
        }
        if let Some(OtherUse::Swap { node }) =
            self.others.iter().find(|one| matches!(one, OtherUse::Swap { .. }))
        {
            let node = node.display();
            return Err(busy(
                format!("{node} is used as swap space"),
                format!("end that first: swapoff {node}"),
            ));
        }
        let here = || self.mounts.iter().filter(|mounted| mounted.namespace.is_here);
        for own in here() {
            let point = shown(&own.mount.point);
            let lying = self.own_table().into_iter().flat_map(|table| &table.mounts);
            let mut lying = lying.filter(|mount| mount.parent == own.mount.id && !self.is_ours(mount));
            if let Some(other) = lying.next() {
                let (kind, at) = (&other.kind, shown(&other.point));
                return Err(busy(
                    format!("{own}: {kind} ({}) is mounted on it, at {at}", shown(&other.source)),
                    format!("unmount that first: umount {at}; nothing was changed"),
                ));
            }
            if let Some((overlay, table)) = self.overlay_on(own) {
                let at = shown(&overlay.point);
                let place =
                    if table.namespace.is_here { String::new() } else { format!(", in {}", table.namespace) };
                return Err(busy(
                    format!("{own}: it is in use: the overlay at {at} is built on it{place}"),
                    format!("unmount that first: umount {at}; nothing was changed"),
                ));
            }
            let top = sys::path_status(&own.mount.point).ok().and_then(|status| status.mount);
            let is_stack_of_ours = here().any(|mounted| Some(mounted.mount.id) == top);
            if !is_topmost(own) && !is_stack_of_ours {
                return Err(busy(
                    format!("{own}: the way to it is hidden by {}", self.what_covers(own)),
                    format!("unmount what hides {point} first; nothing was changed"),
                ));
            }
        }
        for elsewhere in self.mounts.iter().filter(|mounted| !mounted.namespace.is_here) {
            if !here().any(|own| self.follows(elsewhere, own)) {
                return Err(is_elsewhere(elsewhere));
            }
        }
        Ok(())
    }
}

fn is_elsewhere(mounted: &Mounted) -> Error {
    let (process, command) = (mounted.namespace.process, &mounted.namespace.command);
    busy(
        format!("the file system is mounted elsewhere: {mounted}"),
        format!(
            "end process {process} ({command}) and all others in its mount namespace, or unmount it there: nsenter -t \
             {process} -m umount {}",
            shown(&mounted.mount.point)
        ),
    )
}

/// Unmounts every file system of `device` and its partitions in our own namespace, last mounted first. When something of
/// somebody else's lies on one, or it is mounted elsewhere, nothing is unmounted: [`ErrorKind::UnmountBusy`] says what and
/// where.
pub fn unmount_all(device: &Path) -> Result<()> {
    let deadline = Instant::now() + BUSY_MAX;
    loop {
        let holders = Holders::of(device)?;
        holders.check_unmount()?;
        let has_something_on_it = |mounted: &Mounted| {
            holders
                .own_table()
                .is_some_and(|table| table.mounts.iter().any(|one| one.parent == mounted.mount.id))
        };
        let mut here = holders.mounts.iter().rev().filter(|mounted| mounted.namespace.is_here);
        let Some(next) = here.find(|mounted| is_topmost(mounted) && !has_something_on_it(mounted)) else {
            return match holders.mounts.first() {
                None => Ok(()),
                Some(mounted) if !mounted.namespace.is_here => Err(is_elsewhere(mounted)),
                Some(mounted) => Err(busy(
                    format!("{mounted}: something was mounted over it just now"),
                    "see what with findmnt, then try again".to_owned(),
                )),
            };
        };
        let point = &next.mount.point;
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {
                // Between the look and the call somebody may have put something there.
                let left = mount_table::read(Path::new("/proc/self/mountinfo"))?;
                if left.iter().any(|mount| mount.id == next.mount.id) {
                    let message =
                        "something was mounted over the file system just now, and was unmounted in its place";
                    return Err(Error::new(ErrorKind::UnmountBusy, message)
                        .at_path(point)
                        .advise("mount it again, then see who mounts there"));
                }
            }
            Err(Errno::EBUSY) if Instant::now() < deadline => std::thread::sleep(BUSY_LOOK),
            Err(Errno::EBUSY) => {
                let advice = format!("end what uses it; find it with: fuser -vm {}", shown(point));
                return Err(busy("unmount the file system: it is in use".to_owned(), advice).at_path(point));
            }
            // Somebody else was faster, which the next look shows.
            Err(Errno::EINVAL | Errno::ENOENT) if Instant::now() < deadline => std::thread::sleep(BUSY_LOOK),
            Err(errno) => {
                return Err(
                    Error::io(ErrorKind::Unmount, "unmount the file system", errno.into()).at_path(point)
                );
            }
        }
    }
}
