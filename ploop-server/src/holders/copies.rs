//! Copies of a mount of our own in namespaces that were made after it: nobody asked for them, and they keep what is
//! mounted alive after it was unmounted here.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use ploop_core::device::mount_table::{self, Mount};
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};

use super::mounts::{Namespace, Table, tables};
use ploop_core::error::shown;

/// Unmounts what is mounted at exactly `point` in every other mount namespace that has a copy of it which would not go
/// with ours. Nothing is done here. [`ErrorKind::UnmountBusy`] where a copy is in use, with a process of its namespace.
pub fn unmount_copies(point: &Path) -> Result<()> {
    let tables = tables()?;
    let Some((own, others)) = tables.split_first() else { return Ok(()) };
    let Some(mount) = own.mounts.iter().rev().find(|mount| mount.point == point) else { return Ok(()) };
    for table in others {
        for copy in table.mounts.iter().filter(|copy| copy.device == mount.device && copy.id != mount.id) {
            if follows((copy, table), (mount, own)) {
                continue;
            }
            if let Err(cause) = unmount_in(&table.namespace, copy) {
                let process = table.namespace.process;
                let left =
                    mount_table::read(Path::new(&format!("/proc/{process}/mountinfo"))).unwrap_or_default();
                if left.iter().all(|other| other.id != copy.id) {
                    continue;
                }
                let message = format!("{} is mounted in {} as well", shown(point), table.namespace);
                return Err(Error::io(ErrorKind::UnmountBusy, message, cause)
                    .advise(format!("end process {process} and all others in its mount namespace")));
            }
        }
    }
    Ok(())
}

/// Whether a mount elsewhere goes by itself when `own` does, as both lie on mounts that tell each other.
pub(super) fn follows((elsewhere, there): (&Mount, &Table), (own, here): (&Mount, &Table)) -> bool {
    let groups = |mount: &Mount, table: &Table| {
        let parent = table.mounts.iter().find(|other| other.id == mount.parent);
        parent.map(|parent| parent.groups.clone()).unwrap_or_default()
    };
    let own_groups = groups(own, here);
    elsewhere.root == own.root && groups(elsewhere, there).iter().any(|group| own_groups.contains(group))
}

/// Unmounts in another namespace, from a thread of its own, which ends there.
fn unmount_in(namespace: &Namespace, mount: &Mount) -> io::Result<()> {
    let folder = Path::new("/proc").join(namespace.process.to_string());
    let (place, root) = (File::open(folder.join("ns/mnt"))?, File::open(folder.join("root"))?);
    let work = || -> io::Result<()> {
        // Other threads stay where they are.
        unshare(CloneFlags::CLONE_FS)?;
        setns(&place, CloneFlags::CLONE_NEWNS)?;
        nix::unistd::fchdir(&root)?;
        nix::unistd::chroot(".")?;
        if sys::path_status(&mount.point)?.mount.is_some_and(|found| found != mount.id) {
            return Err(Errno::EBUSY.into());
        }
        Ok(umount2(&mount.point, MntFlags::UMOUNT_NOFOLLOW)?)
    };
    std::thread::scope(|scope| {
        let ended = std::thread::Builder::new().name("namespace".into()).spawn_scoped(scope, work)?.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("the thread in the other namespace panicked")))
    })
}
