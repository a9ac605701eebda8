//! Twins: two disks on one machine whose file systems have the same UUID, as a disk and its copy have. Mounted together
//! they are mixed up by whatever knows file systems by UUID: by the kernel itself with btrfs, by boot loaders and mount
//! tables with all others.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ploop_core::device::mount_table;
use ploop_core::device::runtime::{Runtime, State};
use ploop_core::{Error, ErrorKind, Result};

use crate::output::Output;

/// What is known of the file system on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Its UUID; none of what has none.
    pub(crate) uuid: Option<String>,
    /// Its kind, as libblkid calls it.
    pub(crate) kind: Option<String>,
}

/// The file system on a device, as libblkid sees it; nothing where it sees none, or may not look.
fn identity_of(device: &Path) -> Result<Identity> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new("blkid")
        .args(["-p", "-u", "filesystem", "-o", "export", "-s", "UUID", "-s", "TYPE", "--"])
        .arg(device)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| {
            Error::io(ErrorKind::System, "run blkid", cause).advise("it is part of util-linux")
        })?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads lines `NAME=value`.
fn parse(text: &str) -> Identity {
    let value = |wanted: &str| {
        text.lines()
            .find_map(|line| line.split_once('=').filter(|(name, _)| *name == wanted))
            .map(|(_, value)| value)
    };
    Identity { uuid: value("UUID").map(str::to_ascii_lowercase), kind: value("TYPE").map(str::to_owned) }
}

/// A mounted file system that could be the twin of another, and where.
struct Candidate {
    device: PathBuf,
    point: PathBuf,
}

/// What is mounted here from block devices, each once, without those of the disk itself.
fn candidates(own: &State) -> Result<Vec<Candidate>> {
    // The same disk may be mounted several times, as its snapshots are.
    let is_same = |other: &State| {
        let top = |state: &State| state.images.last().map(|image| (image.device, image.inode));
        (own.open.descriptor.is_some() && other.open.descriptor == own.open.descriptor)
            || top(other) == top(own)
    };
    let states = Runtime::of_user()?.states()?;
    let same: Vec<_> =
        states.iter().filter(|other| is_same(other)).filter_map(|other| other.loop_device.clone()).collect();
    let mut found: Vec<Candidate> = Vec::new();
    for mount in mount_table::read(Path::new("/proc/self/mountinfo"))? {
        let is_device = mount.device.0 != 0 || mount.kind == "btrfs";
        if is_device
            && mount.source.is_absolute()
            && !same.contains(&mount.source)
            && !found.iter().any(|other| other.device == mount.source)
        {
            found.push(Candidate { device: mount.source, point: mount.point });
        }
    }
    Ok(found)
}

/// What is on `device`, of the served disk `own`, unless its twin is mounted here: [`ErrorKind::Mount`] then. To look at a
/// copy, read-only, is harmless where the kernel does not itself go by UUIDs: a warning.
pub(crate) fn check(own: &State, device: &Path, allow: bool, output: &Output) -> Result<Identity> {
    let identity = identity_of(device)?;
    let Some(uuid) = identity.uuid.clone().filter(|_| !allow) else { return Ok(identity) };
    let is_twin =
        |one: &Candidate| identity_of(&one.device).is_ok_and(|other| other.uuid.as_ref() == Some(&uuid));
    let Some(twin) = candidates(own)?.into_iter().find(is_twin) else { return Ok(identity) };
    let message = format!(
        "its file system has the UUID {uuid}, as the one at {} on {}: one of the disks is a copy of the other",
        twin.point.display(),
        twin.device.display()
    );
    let goes_by_uuid = matches!(identity.kind.as_deref(), Some("btrfs" | "xfs"));
    if own.open.read_only && !goes_by_uuid {
        output.warn(&format!("{}: {message}", device.display()));
        return Ok(identity);
    }
    Err(Error::new(ErrorKind::Mount, message).at_path(device).advise(
        "give one of them another UUID (without -m: tune2fs -U random DEVICE, xfs_admin -U generate DEVICE, btrfstune -u \
         DEVICE); or mount the twin all the same, with --allow-twin",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_blkid_is_read() {
        let found = parse("DEVNAME=/dev/loop1\nUUID=AB-cd\nTYPE=ext4\nnonsense\n");
        assert_eq!((found.uuid.as_deref(), found.kind.as_deref()), (Some("ab-cd"), Some("ext4")));
        assert_eq!(parse("DEVNAME=/dev/loop2\n"), Identity::default());
    }
}
