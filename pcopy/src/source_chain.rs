//! All snapshots of a disk with a descriptor, as [`Snapshots`] to copy from.
//!
//! The tree is read once. From then on every frozen image is locked as by a reader, so that no command deletes it or
//! merges into it, here or in another process; the current state is its owner's to keep. A frozen state is opened only
//! while it is sent, through its own chain. What changed nevertheless (a tool that knows no locks) is found by
//! [`check`](Snapshots::check), which comes once more after the last byte of the disk was read.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use ploop_core::device::{Disk, DiskOptions};
use ploop_core::format::{Chain, DESCRIPTOR_NAME, DiskDescriptor, Guid, Image, Shot};
use ploop_core::io::file::{DirectoryFolder, FileStorage, OpenOptions as FileOptions};
use ploop_core::io::identity::FileIdentity;
use ploop_core::io::lock::{ImageLock, Ownership};
use ploop_core::io::{Access, Storage};
use ploop_core::ops::open::{OpenOptions, open};
use ploop_core::{Error, ErrorKind, Result};

use crate::source::{DeltaDescription, DiskSource, Snapshots, Source};

/// Runs of data that are counted in one image.
const RUNS_COUNTED_MAX: usize = 1 << 12;

/// The snapshots of one disk.
pub struct BundleSnapshots {
    folder: DirectoryFolder,
    path: PathBuf,
    /// As it was at first.
    descriptor: DiskDescriptor,
    deltas: Vec<DeltaDescription>,
    states: Vec<Guid>,
    /// Of every frozen image.
    _locks: Vec<(FileStorage, ImageLock)>,
}

impl BundleSnapshots {
    /// The snapshots of the disk with the descriptor `descriptor`, whose current state is open as `top`.
    ///
    /// Fails with [`ErrorKind::InUse`] when a frozen image is being written to, with [`ErrorKind::Busy`] when one is being
    /// merged or `top` is not the current state of the descriptor, with [`ErrorKind::Descriptor`] when the states are no
    /// tree on one base.
    pub fn open(descriptor: &Path, top: &Chain) -> Result<Self> {
        let path = descriptor.parent().filter(|folder| !folder.as_os_str().is_empty());
        let path = path.unwrap_or(Path::new(".")).to_path_buf();
        let folder = DirectoryFolder::open(&path)?;
        let at_descriptor = |error: Error| error.at_path(path.join(DESCRIPTOR_NAME));
        let descriptor = DiskDescriptor::load(&folder, Some(&path))?;
        let tree = descriptor.tree().map_err(at_descriptor)?;
        let (mut deltas, mut locks): (Vec<DeltaDescription>, Vec<_>) = (Vec::new(), Vec::new());
        let states: Vec<Guid> = tree.iter().map(|shot| shot.guid()).collect();
        for shot in &tree {
            let is_top = shot.guid() == descriptor.top_guid();
            let image = descriptor.image(shot.guid()).ok_or_else(|| changed(&path))?;
            let storage = open_image(&folder, image)?;
            let delta = describe(&descriptor, shot, &storage, &states)?;
            deltas.push(delta);
            if !is_top {
                let lock = ImageLock::take(&storage, &path.join(image.file()), Ownership::Reader)?;
                locks.push((storage, lock));
            }
        }
        check_chain(&folder, &descriptor, descriptor.top_guid(), top).map_err(at_descriptor)?;
        Ok(Self { folder, path, descriptor, deltas, states, _locks: locks })
    }

    /// The snapshots and the current state of the disk at `disk`, a descriptor or its folder, that nobody serves.
    pub fn open_closed(disk: &Path) -> Result<(Self, DiskSource)> {
        let opened = open(&OpenOptions::new(disk, Access::ReadOnly))?;
        let descriptor = opened.report.descriptor.ok_or_else(|| {
            Error::new(ErrorKind::Parameter, "only a disk with a descriptor has snapshots")
                .at_path(disk)
                .advise(format!("give its {DESCRIPTOR_NAME} or the folder that has it"))
        })?;
        let snapshots = Self::open(&descriptor, &opened.chain)?;
        let disk = Disk::open(opened.chain, DiskOptions { read_only: true, ..DiskOptions::default() })?;
        Ok((snapshots, DiskSource::delta(&disk)?))
    }
}

fn changed(path: &Path) -> Error {
    Error::new(ErrorKind::Busy, "copy all snapshots: they changed meanwhile")
        .at_path(path.join(DESCRIPTOR_NAME))
        .advise("start the copy again when no other command works on the snapshots of this disk")
}

fn open_image(folder: &DirectoryFolder, image: &Image) -> Result<FileStorage> {
    let options = FileOptions::new(Access::ReadOnly);
    match image.place() {
        (None, name) => folder.open_file(name, &options),
        (Some(below), name) => folder.open_folder(below)?.open_file(name, &options),
    }
}

fn describe(
    descriptor: &DiskDescriptor,
    shot: &Shot,
    storage: &FileStorage,
    states: &[Guid],
) -> Result<DeltaDescription> {
    let index = |guid: Guid| {
        states.iter().position(|state| *state == guid).and_then(|index| u32::try_from(index).ok())
    };
    let place = descriptor.shots().iter().position(|one| one.guid() == shot.guid());
    let modified = storage.metadata().ok().and_then(|metadata| metadata.modified().ok());
    let data_bytes = data_bytes(storage)
        .map_err(|error| Error::io(ErrorKind::Stat, "examine an image", error).at_path(storage.path()))?;
    Ok(DeltaDescription {
        guid: shot.guid().bytes(),
        name: shot.guid().to_string(),
        parent: index(shot.parent()),
        place: place.and_then(|place| u32::try_from(place).ok()).unwrap_or(u32::MAX),
        temporary: shot.transition().is_some(),
        data_bytes,
        modified_seconds: modified
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_secs()),
    })
}

/// Bytes that the file holds, about: what was only reserved for it is no data.
fn data_bytes(storage: &FileStorage) -> std::io::Result<u64> {
    let (mut at, mut held) = (0, 0_u64);
    for _ in 0..RUNS_COUNTED_MAX {
        let Some((start, end)) = storage.next_data(at)? else { return Ok(held) };
        held = held.saturating_add(end.saturating_sub(start));
        at = end.max(at.saturating_add(1));
    }
    storage.allocated_bytes()
}

/// Fails unless the chain is that of this state.
fn check_chain(
    folder: &DirectoryFolder,
    descriptor: &DiskDescriptor,
    state: Guid,
    chain: &Chain,
) -> Result<()> {
    let images = descriptor.chain_for(state)?;
    // The very files: a name may belong to another one by now.
    let is_open = |index: usize, image: &Image| {
        let open = chain.storage(index).descriptor().and_then(|open| FileIdentity::of(open).ok());
        folder.identity_of(image.file()).is_ok_and(|named| open == Some(named))
    };
    let is_same = images.len() == chain.depth()
        && images.iter().enumerate().all(|(index, image)| is_open(index, image));
    if is_same {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, format!("copy all snapshots: what is open is not the state {state}"))
        .advise("copy the disk itself; of a mounted snapshot copy the content alone, without --chain"))
}

impl Snapshots for BundleSnapshots {
    fn deltas(&self) -> &[DeltaDescription] {
        &self.deltas
    }

    fn source(&mut self, index: usize) -> Result<Box<dyn Source>> {
        let state = *self.states.get(index).ok_or_else(|| changed(&self.path))?;
        let options = OpenOptions { snapshot: Some(state), ..OpenOptions::new(&self.path, Access::ReadOnly) };
        let opened = open(&options)?;
        check_chain(&self.folder, &self.descriptor, state, &opened.chain).map_err(|_| changed(&self.path))?;
        let disk = Disk::open(opened.chain, DiskOptions { read_only: true, ..DiskOptions::default() })?;
        Ok(Box::new(DiskSource::delta(&disk)?))
    }

    fn check(&self) -> Result<()> {
        let now = DiskDescriptor::load(&self.folder, Some(&self.path))?;
        let is_same = now.top_guid() == self.descriptor.top_guid()
            && now.shots() == self.descriptor.shots()
            && now.images() == self.descriptor.images();
        if is_same { Ok(()) } else { Err(changed(&self.path)) }
    }
}
