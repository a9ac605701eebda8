//! A clone: a writable disk of its own that begins as a state of another one, at once and without copying.
//!
//! The clone's folder gets a **second name (a hard link) for each image** of that state, and a new, empty image on
//! top. So the descriptor of a clone names files of its own folder only, like every other (threat rule M4): there is
//! no path to follow out of it, the clone does not break when the folder of the base is moved or removed, and each
//! image lives until its last user goes.
//!
//! How an image knows that clones share it: by the number of its names, which the file system keeps. A file with
//! several names is never opened for writing by anything here (`io/lock.rs`), so it takes no write, no merge into it,
//! no resize, no conversion, until the clones are gone. The disk it came from stays usable by a snapshot: what is
//! written then goes into a new image.
//!
//! Order: the names, the new image, a sync of both folders; **commit**: the descriptor of the clone. Run again after
//! a crash, it takes the names that are there for its own and goes on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, DESCRIPTOR_NAME, DiskDescriptor, Guid, InUse, RawHeader};
use crate::io::buffer::is_zero;
use crate::io::file::{self, DirectoryFolder};
use crate::io::temporary::stem;
use crate::io::{Access, Folder, Storage, StorageExt, sys};
use crate::ops::agreement;
use crate::ops::image_files::{exists, open_chain, open_image, source};
use crate::ops::merge::OpenBundle;
use crate::ops::open::check_readable;
use crate::ops::snapshot::create_top;

/// Bytes of a header.
const HEADER_BYTES: usize = 64;
/// Bytes of a file looked at at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What to clone.
#[derive(Clone, Debug)]
pub struct CloneOptions {
    /// The descriptor of the base disk, or its folder.
    pub path: PathBuf,
    /// The folder of the clone: made if it does not exist; has no descriptor yet. On the file system of the base.
    pub new_folder: PathBuf,
    /// The state to begin as; the current one if none.
    pub snapshot: Option<Guid>,
    /// How long to wait for the base's lock.
    pub lock_timeout: Duration,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloneReport {
    /// The descriptor of the clone.
    pub descriptor: PathBuf,
    /// The state that it stands on, by its name in the clone.
    pub snapshot: Guid,
    /// The images that it shares, base first.
    pub shared: Vec<PathBuf>,
    /// Its own image.
    pub top: PathBuf,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
}

/// Clones a disk.
pub fn clone(options: &CloneOptions) -> Result<CloneReport> {
    let base = OpenBundle::open(&options.path, options.lock_timeout)?;
    let descriptor = DiskDescriptor::load(&base.folder, fs::canonicalize(&base.path).ok().as_deref())?;
    let made = make_folder(&options.new_folder)?;
    let folder = DirectoryFolder::open(&options.new_folder)?;
    let share = |storage: &dyn Storage, name: &str| share_file(&folder, storage, name);
    let plan = CloneParts { descriptor: &descriptor, state: options.snapshot, share: &share };
    let made_disk =
        clone_in(&base.folder, &folder, &plan).map_err(|error| error.at_path(&options.new_folder));
    let (new, shared, top, chain) = match made_disk {
        Ok(made_disk) => made_disk,
        Err(error) => {
            if made {
                // Only if nothing is in it; what is in it is needed to go on.
                drop(fs::remove_dir(&options.new_folder));
            }
            return Err(error);
        }
    };
    let parent = new.shot(new.top_guid()).map_or(Guid::NONE, |shot| shot.parent());
    Ok(CloneReport {
        descriptor: options.new_folder.join(DESCRIPTOR_NAME),
        snapshot: parent,
        shared: shared.iter().map(|name| options.new_folder.join(name)).collect(),
        top: options.new_folder.join(top),
        disk_bytes: chain.geometry().disk_bytes(),
    })
}

/// Makes the folder durably, if it is not there; says whether it did.
fn make_folder(path: &Path) -> Result<bool> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => {
            return Err(Error::io(ErrorKind::MakeFolder, "make the folder of the clone", error).at_path(path));
        }
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirectoryFolder::open(parent)?
        .sync()
        .map_err(|error| Error::io(ErrorKind::Sync, "sync the folder of the clone", error).at_path(parent))?;
    Ok(true)
}

/// Gives an open image a name in the clone's folder; one it has there already is taken.
fn share_file(folder: &DirectoryFolder, storage: &dyn Storage, name: &str) -> Result<()> {
    let path = folder.path().join(name);
    let failed = |error| Error::io(ErrorKind::Create, "share an image with the clone", error).at_path(&path);
    let open = storage.descriptor().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
    match sys::link_in(open, std::os::fd::AsFd::as_fd(folder), file::component(name).map_err(failed)?) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = folder.open_file(name, &file::OpenOptions::new(Access::ReadOnly))?;
            let identity = |fd| nix::sys::stat::fstat(fd).map(|found| (found.st_dev, found.st_ino)).map_err(io::Error::from);
            let there = there.descriptor().map(identity).transpose().map_err(failed)?;
            if there == Some(identity(open).map_err(failed)?) {
                return Ok(());
            }
            Err(failed(error).advise("choose an empty folder for the clone; nothing was changed"))
        }
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Err(failed(error).advise(
            "a clone shares the images of its base and lies on the same file system; for a disk elsewhere, copy it",
        )),
        Err(error) => Err(failed(error)),
    }
}

/// Shares an open image under a name in the clone's folder.
type Share<'a> = &'a dyn Fn(&dyn Storage, &str) -> Result<()>;

/// What [`clone_in`] works on.
pub struct CloneParts<'a> {
    /// Of the base.
    pub descriptor: &'a DiskDescriptor,
    /// The state to begin as; the current one if none.
    pub state: Option<Guid>,
    /// How an image gets a name in the clone's folder.
    pub share: Share<'a>,
}

/// As [`clone`], between open folders: the descriptor of the clone, the names it shares, that of its own image, and
/// the open state of the base.
pub fn clone_in(
    base: &dyn Folder,
    folder: &dyn Folder,
    parts: &CloneParts<'_>,
) -> Result<(DiskDescriptor, Vec<String>, String, Arc<Chain>)> {
    let descriptor = parts.descriptor;
    let state = parts.state.unwrap_or(descriptor.top_guid());
    check_readable(descriptor, state)?;
    if let Some(found) = agreement::of_state(base, descriptor, state)?.first() {
        return Err(found.failure());
    }
    // Shared, the image that such a merge writes into could not be finished, neither here nor there.
    for image in descriptor.chain_for(state)? {
        let transition = descriptor.shot(image.guid()).and_then(|shot| shot.transition());
        if transition.is_some_and(|transition| !transition.is_readable()) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("clone disk: a merge of {}, which {state} stands on, was cut", image.guid()),
            )
            .advise("run that merge again to finish it, then clone"));
        }
    }
    if exists(folder, DESCRIPTOR_NAME)? {
        return Err(Error::new(ErrorKind::Create, "clone disk: there is a disk in that folder")
            .at_path(DESCRIPTOR_NAME)
            .advise("choose another folder; nothing was changed"));
    }
    // Opened and locked first: nobody writes one of them before it has two names.
    let mut sources = Vec::new();
    let mut names: Vec<String> = Vec::new();
    let mut taken = BTreeSet::new();
    for image in descriptor.chain_for(state)? {
        sources.push(source(descriptor, image, open_image(base, image.file(), Access::ReadOnly)?));
        let name = image.place().1.to_owned();
        let name = if taken.contains(&name) { format!("{}.image", image.guid()) } else { name };
        taken.insert(name.clone());
        names.push(name);
    }
    let storages: Vec<Arc<dyn Storage>> = sources.iter().map(|source| Arc::clone(&source.storage)).collect();
    let chain = open_chain(descriptor, sources, Access::ReadOnly)?;
    let top = chain.top();
    // A snapshot of a running disk whose server died then has the mark still: it means nothing there.
    let is_written = state == descriptor.top_guid();
    if is_written && chain.header(top).is_some_and(|header| header.in_use() == InUse::Open) {
        return Err(Error::new(ErrorKind::Busy, "clone disk: it was not closed by its last writer")
            .at_path(chain.name(top))
            .advise("mount and unmount it once, or check and repair it; then clone it"));
    }
    let frozen = if state == descriptor.top_guid() { Guid::random() } else { state };
    // Always the same name for the same state: what a clone that was cut has left is found again.
    let own = format!("{}.{state}", stem(names.first().map_or("image", String::as_str)));
    let new = descriptor.clone_of(state, frozen, &names, &own)?;
    remove_left_over(folder, &own)?;
    for (storage, name) in storages.iter().zip(&names) {
        (parts.share)(&**storage, name)?;
    }
    let below =
        storages.last().map(Arc::clone).ok_or_else(|| Error::new(ErrorKind::Descriptor, "no image"))?;
    create_top(folder, &own, chain.geometry(), &*below)?;
    new.store_new(folder)?;
    Ok((new, names, own, chain))
}

/// Removes the empty image of a clone that was cut. Anything else of that name is refused.
fn remove_left_over(folder: &dyn Folder, name: &str) -> Result<()> {
    if !exists(folder, name)? {
        return Ok(());
    }
    let taken = || {
        Error::new(ErrorKind::Create, "clone disk: the file exists")
            .at_path(name)
            .advise("choose an empty folder for the clone; nothing was changed")
    };
    let storage = open_image(folder, name, Access::ReadOnly)?;
    let failed = |error| Error::io(ErrorKind::Read, "clone disk: look at the file", error).at_path(name);
    if !holds_nothing(&*storage).map_err(failed)? {
        return Err(taken());
    }
    folder.unlink(name).map_err(|error| {
        Error::io(ErrorKind::Unlink, "clone disk: remove an unfinished image", error).at_path(name)
    })
}

/// Whether a file is what a cut creation of an image leaves: a header or nothing, and zeros behind it.
pub(crate) fn holds_nothing(storage: &dyn Storage) -> io::Result<bool> {
    let mut header = [0; HEADER_BYTES];
    storage.read_padded_at(0, &mut header)?;
    if !is_zero(&header) && RawHeader::decode(&header).version().is_none() {
        return Ok(false);
    }
    let len = storage.len()?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = HEADER_BYTES as u64;
    while let Some((start, end)) = storage.next_data(at)?.filter(|data| data.0 < len) {
        at = at.max(start);
        let take = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        if take == 0 {
            break;
        }
        storage.read_padded_at(at, &mut piece[..take])?;
        if !is_zero(&piece[..take]) {
            return Ok(false);
        }
        at += take as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
