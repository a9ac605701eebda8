//! A snapshot of a running disk: its top freezes, a new empty top takes the writes.
//!
//! | step | gate | a crash after it leaves |
//! |---|---|---|
//! | 1 descriptor announces the file of the new top | open | the old chain; a name of no use |
//! | 2 new top made, synced, marked as in use | open | the same and an empty file, removed by the next command |
//! | 3 file system synced, then frozen; everything flushed; next descriptor staged | open | the same |
//! | 4 writes in flight end; what no sync has covered is flushed | closed | the same |
//! | 5 descriptor put in place | closed | the old chain or the new one; the old top's in-use mark means nothing |
//! | 6 chain replaced, keeper told | closed | the same |
//! | 7 folder synced (commit); until then no flush is answered | open | the new chain |
//! | 8 file system thawed | open | the same |
//! | 9 old top: tail cut, in-use mark cleared, lock shared with readers | open | the same, closed |
//!
//! The new top is marked as in use in step 2 and not behind the commit, where it would cost the guest a sync: a crash
//! between the two leaves a file that is removed.
//!
//! Writes may go on before the folder is synced, for who is not told of a flush may lose them; where a power loss
//! brings the old chain back, it is as it was when the gate closed (S6). Should that sync fail, the new descriptor is
//! written anew; should that fail, too, the disk is poisoned: nobody may be told that what he wrote since is safe.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    Bundle, DRAIN_TIMEOUT, Stopped, Writers, at_descriptor, check_same, load, milliseconds, remove_obsolete,
    told,
};
use crate::device::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor_store::RenamedDescriptor;
use crate::format::{
    Chain, CreateOptions, DiskDescriptor, Geometry, Guid, Source, Transition, Version, create_image,
};
use crate::io::lock::Ownership;
use crate::io::{Access, ownership};
use crate::units::Sectors;

/// How to make a snapshot of a running disk.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// Its name; a new one if none.
    pub snapshot: Option<Guid>,
    /// It is to be deleted as soon as nobody uses it.
    pub temporary: bool,
    /// How long writes in flight may take to end.
    pub drain_timeout: Duration,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { snapshot: None, temporary: false, drain_timeout: DRAIN_TIMEOUT }
    }
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotReport {
    /// The snapshot.
    pub snapshot: Guid,
    /// The file of the new top.
    pub file: String,
    /// Images in the chain now.
    pub depth: usize,
    /// How long guest writes were held, in milliseconds.
    pub held_ms: f64,
    /// Of that, until those in flight had ended.
    pub drain_ms: f64,
    /// How long the file system was frozen, in milliseconds, its freezing included; 0 if none was.
    pub frozen_ms: f64,
    /// What went wrong without harm to the snapshot.
    pub warnings: Vec<String>,
    /// Why the writers could not be let go: the snapshot is made, and the disk stands.
    #[serde(skip)]
    pub not_thawed: Option<Error>,
}

/// Makes a snapshot of what the guest has written so far. On any error the guest goes on as before.
///
/// Fails with `Parameter` if the name is taken or the chain is full, with `Busy` when the disk is frozen by somebody or
/// its writes do not end, with `Allocate` or `Create` on a full host.
pub fn snapshot(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    writers: &mut dyn Writers,
    options: &SnapshotOptions,
) -> Result<SnapshotReport> {
    let folder = bundle.folder();
    let mut descriptor = load(disk, bundle)?;
    remove_obsolete(bundle, &mut descriptor)?;
    let guid = options.snapshot.unwrap_or_else(Guid::random);
    let file = descriptor.new_file_name();
    let old = disk.chain();
    let mut after = descriptor.clone();
    after.add_snapshot(guid, &file).map_err(at_descriptor(bundle))?;
    if options.temporary {
        after.mark(guid, Transition::Temporary).map_err(at_descriptor(bundle))?;
    }
    descriptor.announce(&file)?;
    descriptor.store(folder).map_err(at_descriptor(bundle))?;

    let made = make_top(bundle, &old, &file).and_then(|new| {
        disk.prepare_chain(&new)?;
        let held = hold(disk, bundle, writers, (&old, &new), &after, options)?;
        Ok((new, held))
    });
    let (new, held) = match made {
        Ok(made) => made,
        Err(error) => return Err(undo(bundle, &mut descriptor, error)),
    };
    if let Some(error) = held.in_doubt {
        return Err(match held.not_thawed {
            None => error,
            Some(standing) => Error::new(error.kind(), format!("{}; and {}", told(&error), told(&standing)))
                .advise(standing.advice().unwrap_or_default().to_owned())
                .caused_by(error),
        });
    }

    let mut warnings = Vec::new();
    // From here on nobody writes to the old top. A guest that reads does not mind its tail going.
    let finished = old.close().and_then(|()| old.storage(old.top()).claim(Some(Ownership::Reader)));
    if let Err(error) = finished {
        warnings.push(format!("the snapshot is made, but its image was not closed: {}", told(&error)));
    }
    new.cover();
    Ok(SnapshotReport {
        snapshot: guid,
        file,
        depth: new.depth(),
        held_ms: milliseconds(held.gate),
        drain_ms: milliseconds(held.drain),
        frozen_ms: milliseconds(held.frozen),
        warnings: warnings.into_iter().chain(held.warnings).collect(),
        not_thawed: held.not_thawed,
    })
}

/// Makes the file of the new top, and the chain with it.
fn make_top(bundle: &dyn Bundle, old: &Chain, file: &str) -> Result<Arc<Chain>> {
    let path = bundle.path().join(file);
    let failed = |kind, operation: &'static str| {
        let path = path.clone();
        move |cause| Error::io(kind, operation, cause).at_path(path)
    };
    let geometry = match old.geometry() {
        raw if raw.is_raw() => {
            Geometry::new(Version::V2, Sectors(u64::from(raw.cluster_sectors())), raw.disk_sectors())
                .map_err(|error| {
                    error.advise("a raw disk can have snapshots when its size is whole clusters")
                })?
        }
        image => image.clone(),
    };
    {
        let storage = bundle
            .folder()
            .create_exclusive(file)
            .map_err(failed(ErrorKind::Create, "make the new top of the disk"))?;
        ownership::copy(&**old.storage(old.top()), &*storage)
            .map_err(failed(ErrorKind::System, "give the new top the owner of the old one"))?;
        create_image(&*storage, &CreateOptions { geometry, preallocated: false })
            .map_err(|error| error.at_path(&path))?;
    }
    bundle.folder().sync().map_err(failed(ErrorKind::Sync, "sync the folder of the disk"))?;
    let storage = bundle.open_image(file, Access::ReadWrite, false)?;
    old.stacked(Source { name: path, storage, raw: false })
}

struct Held {
    gate: Duration,
    drain: Duration,
    frozen: Duration,
    warnings: Vec<String>,
    /// Why the writers still stand.
    not_thawed: Option<Error>,
    /// The new chain is served, and nobody knows whether it is durable. The disk is poisoned.
    in_doubt: Option<Error>,
}

/// Steps 3 to 8.
fn hold(
    disk: &Arc<Disk>,
    bundle: &dyn Bundle,
    writers: &mut dyn Writers,
    (old, new): (&Arc<Chain>, &Arc<Chain>),
    after: &DiskDescriptor,
    options: &SnapshotOptions,
) -> Result<Held> {
    writers.settle()?;
    disk.flush()?;
    let staged = after.stage(bundle.folder()).map_err(at_descriptor(bundle))?;
    let begun = Instant::now();
    let mut stopped = Stopped::stop(writers)?;
    let mut renamed = None;
    let replaced = (|| {
        // What the freeze wrote, with the gate still open.
        disk.flush()?;
        let closed = Instant::now();
        let frozen = disk.freeze(options.drain_timeout)?;
        let drain = closed.elapsed();
        stopped.confirm()?;
        let unsettled = frozen.replace_chain_unsettled(|in_use| {
            check_same(in_use, old)?;
            renamed = Some(staged.rename().map_err(at_descriptor(bundle))?);
            Ok(Arc::clone(new))
        })?;
        drop(frozen);
        Ok((unsettled, drain, closed.elapsed()))
    })();
    let (unsettled, drain, gate) = match replaced {
        Ok(replaced) => replaced,
        Err(error) => return Err(stopped.release(error)),
    };
    let (mut warnings, mut in_doubt) = (Vec::new(), None);
    // Before the thaw, whose own flush waits for it.
    match settle(bundle, renamed, after) {
        Ok(warning) => {
            unsettled.settle(Ok(()));
            warnings.extend(warning);
        }
        Err(error) => {
            unsettled.settle(Err(error.clone()));
            in_doubt = Some(error);
        }
    }
    // A snapshot it is, whatever becomes of the thaw.
    let not_thawed = stopped.go_on().err();
    Ok(Held { gate, drain, frozen: begun.elapsed(), warnings, in_doubt, not_thawed })
}

/// Makes the descriptor durable that is in place; what went wrong on the way.
fn settle(
    bundle: &dyn Bundle,
    renamed: Option<RenamedDescriptor<'_>>,
    after: &DiskDescriptor,
) -> Result<Option<String>> {
    let Some(error) = renamed.and_then(|renamed| renamed.settle().err()) else { return Ok(None) };
    match after.store(bundle.folder()) {
        Ok(()) => Ok(Some(format!("the descriptor had to be written a second time: {}", told(&error)))),
        Err(again) => Err(at_descriptor(bundle)(error).advise(format!(
            "the disk goes on with the snapshot, but whether it has one after a power loss is not known ({again}), and nothing is \
             promised to be durable any more: unmount it, repair the host's file system, and mount it again"
        ))),
    }
}

/// Takes back what was prepared. The chain was not replaced, nor the descriptor.
fn undo(bundle: &dyn Bundle, descriptor: &mut DiskDescriptor, error: Error) -> Error {
    match remove_obsolete(bundle, descriptor) {
        Ok(()) => error,
        // The descriptor still says so: the next command removes it.
        Err(_) => error,
    }
}
