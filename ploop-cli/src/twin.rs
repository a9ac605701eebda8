//! Twins: two disks on one machine whose file systems have the same UUID, as a disk and its copy have. Mounted together
//! they are mixed up by whatever knows file systems by UUID: by the kernel itself with btrfs, by boot loaders and mount
//! tables with all others.

use std::path::{Path, PathBuf};

use ploop_core::device::mount_table;
use ploop_core::device::runtime::{Runtime, State};
use ploop_core::{Error, ErrorKind, Result};

use crate::output::Output;
use crate::signature::{self, Content};

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
pub(crate) fn check(own: &State, device: &Path, allow: bool, output: &Output) -> Result<Content> {
    let content = match signature::probe(device, None) {
        Ok(content) => content,
        // A host without these tools may mount all the same.
        Err(error) => {
            output.warn(&format!("whether a twin of the disk is mounted here is not known: {error}"));
            return Ok(Content::default());
        }
    };
    let Some(uuid) = content.uuid.clone().filter(|_| !allow) else { return Ok(content) };
    let is_twin = |one: &Candidate| {
        signature::probe(&one.device, None)
            .is_ok_and(|other| other.uuid.is_some_and(|other| other.eq_ignore_ascii_case(&uuid)))
    };
    let Some(twin) = candidates(own)?.into_iter().find(is_twin) else { return Ok(content) };
    let message = format!(
        "its file system has the UUID {uuid}, as the one at {} on {}: one of the disks is a copy of the other",
        twin.point.display(),
        twin.device.display()
    );
    let goes_by_uuid = matches!(content.kind.as_deref(), Some("btrfs" | "xfs"));
    if own.open.read_only && !goes_by_uuid {
        output.warn(&format!("{}: {message}", device.display()));
        return Ok(content);
    }
    Err(Error::new(ErrorKind::Mount, message).at_path(device).advise(
        "give one of them another UUID (without -m: tune2fs -U random DEVICE, xfs_admin -U generate DEVICE, btrfstune -u \
         DEVICE); or mount the twin all the same, with --allow-twin",
    ))
}
