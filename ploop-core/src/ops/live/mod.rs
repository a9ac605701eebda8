//! Snapshots of a running disk: made, and deleted, while the guest goes on.
//!
//! Both verbs prepare everything with the gate of the [`Disk`] open, and put another [`Chain`] under it in one short
//! hold: no table is read or copied in there, so the hold does not depend on the size of the disk.
//!
//! The descriptor says at every moment which chain the disk is; a server that dies is succeeded by one that opens what
//! the descriptor says. What a cut command leaves (a file that no image is, a merge that was begun) is said in the
//! descriptor, too; the next command, and the next mount, finish it.
//!
//! Locking: the caller holds the descriptor's lock ([`DescriptorLock`](super::DescriptorLock)) and lets one of these
//! verbs run at a time on one disk. The gate is closed last and opened by dropping, whatever happens.

mod bundle;
mod catching_up;
mod copier;
mod delete;
mod fitting;
mod merge_new;
mod pace;
mod snapshot;
mod space;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use bundle::{Bundle, RunningBundle};
pub use delete::{DeleteOptions, DeleteReport, delete};
pub use merge_new::{MergeNewOptions, MergeNewReport, merge_new};
pub use snapshot::{SnapshotOptions, SnapshotReport, snapshot};

use crate::device::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, DESCRIPTOR_NAME, DiskDescriptor};
use crate::io::Storage;
use crate::io::identity::FileIdentity;

/// How long writes in flight may take to end before a change of the chain is given up.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Whoever writes to the disk from above: a mounted file system.
pub trait Writers {
    /// Writes out what is held in memory up there; writing goes on.
    fn settle(&mut self) -> Result<()>;
    /// Makes it consistent and stops new writes.
    fn stop(&mut self) -> Result<()>;
    /// Whether they have stood still since [`stop`](Self::stop). Asked with the gate closed: from then on it does not
    /// matter.
    fn confirm(&mut self) -> Result<()> {
        Ok(())
    }
    /// Undoes [`stop`](Self::stop). Harmless if that was not done.
    fn go_on(&mut self) -> Result<()>;
}

/// Nobody who could be asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWriters;

impl Writers for NoWriters {
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
    fn stop(&mut self) -> Result<()> {
        Ok(())
    }
    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Writers that are stopped until this is dropped.
struct Stopped<'a>(Option<&'a mut dyn Writers>);

impl<'a> Stopped<'a> {
    fn stop(writers: &'a mut dyn Writers) -> Result<Self> {
        // From here on they are let go whatever happens.
        let mut stopped = Self(Some(writers));
        match stopped.0.as_mut().map_or(Ok(()), |writers| writers.stop()) {
            Ok(()) => Ok(stopped),
            Err(error) => Err(stopped.release(error)),
        }
    }

    fn confirm(&mut self) -> Result<()> {
        self.0.as_mut().map_or(Ok(()), |writers| writers.confirm())
    }

    /// Lets them go after a failure. What is to be told then, which is worse when they still stand.
    fn release(self, error: Error) -> Error {
        match self.go_on() {
            Ok(()) => error,
            Err(standing) => {
                let advice =
                    standing.advice().unwrap_or("thaw the file system by hand: fsfreeze -u").to_owned();
                Error::new(standing.kind(), format!("{} and then: {}", told(&error), told(&standing)))
                    .advise(advice)
                    .caused_by(error)
            }
        }
    }

    fn go_on(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |writers| writers.go_on())
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if let Some(writers) = self.0.take() {
            // Only after a panic: nobody could be told.
            let _ = writers.go_on();
        }
    }
}

fn at_descriptor(bundle: &dyn Bundle) -> impl Fn(Error) -> Error + '_ {
    move |error| error.at_path(bundle.path().join(DESCRIPTOR_NAME))
}

/// Reads the descriptor and makes sure that the disk runs what it says.
fn load(disk: &Disk, bundle: &dyn Bundle) -> Result<DiskDescriptor> {
    if disk.is_read_only() {
        return Err(Error::new(
            ErrorKind::Parameter,
            "change the snapshots of a running disk: it is read only",
        )
        .advise("unmount it first"));
    }
    if disk.is_poisoned() {
        return Err(Error::new(
            ErrorKind::Sync,
            "change the snapshots of a running disk: a sync of it has failed",
        )
        .advise("unmount it, and check the image"));
    }
    let descriptor =
        DiskDescriptor::load(bundle.folder(), Some(bundle.path())).map_err(at_descriptor(bundle))?;
    check_chain(&disk.chain(), bundle, &descriptor).map_err(at_descriptor(bundle))?;
    Ok(descriptor)
}

/// Whether the descriptor names the files that are open, not only others of the same names.
fn check_chain(chain: &Chain, bundle: &dyn Bundle, descriptor: &DiskDescriptor) -> Result<()> {
    let images = descriptor.chain_for(descriptor.top_guid())?;
    let is_same = |delta: usize, file: &str| {
        let is_open = match bundle.identity_of(file)? {
            None => chain.name(delta).ends_with(file),
            Some(named) => is_file(&**chain.storage(delta), named)?,
        };
        Ok::<_, Error>(is_open)
    };
    let mut all_same = images.len() == chain.depth();
    for (delta, image) in images.iter().enumerate() {
        all_same = all_same && is_same(delta, image.file())?;
    }
    if all_same {
        return Ok(());
    }
    // Not damage: the disk is whole, and so may be the other one.
    Err(Error::new(ErrorKind::Busy, "the disk runs other images than its descriptor says")
        .advise("unmount the disk and mount it again before changing its snapshots"))
}

/// Whether `storage` is that file.
fn is_file(storage: &dyn Storage, file: FileIdentity) -> Result<bool> {
    let Some(descriptor) = storage.descriptor() else { return Ok(false) };
    let open = FileIdentity::of(descriptor)
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine an image of the disk", cause))?;
    Ok(open == file)
}

/// Fails if `opened`, by its name, is not the file that the chain in use has open.
fn check_same_file(in_use: &dyn Storage, opened: &dyn Storage) -> Result<()> {
    let file = match opened.descriptor() {
        None => return Ok(()),
        Some(descriptor) => FileIdentity::of(descriptor)
            .map_err(|cause| Error::io(ErrorKind::Stat, "examine an image of the disk", cause))?,
    };
    if is_file(in_use, file)? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, "the name of an image of the disk belongs to another file now")
        .advise("put the image back under its name, or unmount the disk, then run the same command again"))
}

/// Fails if the chain in use is not the one that the next one was made of: its places may be others by now.
fn check_same(in_use: &Arc<Chain>, expected: &Arc<Chain>) -> Result<()> {
    if Arc::ptr_eq(in_use, expected) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, "the images of the disk were changed by somebody else meanwhile")
        .advise("run the same command again"))
}

/// Removes files that the descriptor says nobody needs. What cannot be removed stays in it.
fn remove_obsolete(bundle: &dyn Bundle, descriptor: &mut DiskDescriptor) -> Result<()> {
    if !descriptor.has_obsolete() {
        return Ok(());
    }
    let folder = bundle.folder();
    let files: Vec<String> = descriptor.obsolete().map(str::to_owned).collect();
    for file in &files {
        bundle.remove_image(file)?;
    }
    folder.sync().map_err(|cause| {
        Error::io(ErrorKind::Sync, "sync the folder of the disk", cause).at_path(bundle.path())
    })?;
    descriptor.forget_obsolete();
    descriptor.store(folder).map_err(at_descriptor(bundle))
}

/// An error in words, with its causes.
fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(one) = cause {
        text += &format!(": {one}");
        cause = one.source();
    }
    text
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
