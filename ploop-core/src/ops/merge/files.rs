//! Merging image files given by name, without a descriptor: as the original's low-level command.
//!
//! | step | a crash after it leaves |
//! |---|---|
//! | 1 the base marked as in use, and made as large as the highest delta | the same content |
//! | 2 what the deltas hold copied into it, content before pointer | the same to whoever reads base and deltas; the base alone is neither old nor new |
//! | 3 the base synced, its mark cleared (commit) | the base alone holds all of it |
//!
//! The deltas are only read and never removed: they go on shadowing what changes below them, so the same command given
//! again goes on, and whoever gives it decides when they are no longer needed. Into a new file nothing changes but that
//! file, which has its name when it is complete and durable; a crash leaves at most one called `FILE.tmp.…`.
//!
//! Nothing in an image says what it stands on. Where a descriptor knows the files, it is asked: an image that it names is
//! never written from here (the snapshots that are made of it would change behind its back), and the order must be its order.
//! Otherwise the caller answers for it. What lies below the base is not known either, so zeros are kept, except over a raw base.
//!
//! Locking: each file for as long as the merge lasts, the base as its writer, the others as readers. Whoever serves one of
//! them keeps all of it from beginning.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{fitting, going_on, run_copy};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    self, Chain, ChainOptions, DESCRIPTOR_NAME, DiskDescriptor, Guid, Probe, Source, create_image, probe,
};
use crate::io::file::{self, DirectoryFolder, FileStorage};
use crate::io::temporary::remove_left_over;
use crate::io::{Access, Folder, ownership};
use crate::ops::image_files::{LockedFolder, is_shared, open_image};
use crate::ops::merge::Wins;
use crate::ops::placing::place_file;
use crate::ops::progress::Progress;
use crate::units::Sectors;

/// Which files to merge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeFilesOptions {
    /// The images that stand on each other, the highest first, the base last; at least two.
    pub images: Vec<PathBuf>,
    /// The base is the bytes of the disk, without a header.
    pub raw_base: bool,
    /// Merge all of them, the base too, into a new image of this name, and change none of them.
    pub new_file: Option<PathBuf>,
}

/// What was merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeFilesReport {
    /// The file that holds everything now.
    pub file: PathBuf,
    /// The files that are not needed for it any more, the highest first. They are still there.
    pub merged: Vec<PathBuf>,
    /// Bytes that were copied.
    pub copied_bytes: u64,
}

fn refused(path: &Path, message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Parameter, format!("merge: {message}")).at_path(path)
}

/// Merges image files.
///
/// Fails with `Parameter` for wrong wishes, images that do not fit each other and images that a descriptor knows better
/// about; with `InUse` when somebody has one of them open; with `Busy` for images that a cut merge has half changed.
pub fn merge_files(options: &MergeFilesOptions, progress: &dyn Progress) -> Result<MergeFilesReport> {
    let find = |path: &PathBuf| file::locate(path).map(|(folder, name)| folder.join(name));
    let images = options.images.iter().map(find).collect::<Result<Vec<_>>>()?;
    let Some((base, deltas)) = images.split_last().filter(|(_, deltas)| !deltas.is_empty()) else {
        return Err(Error::new(ErrorKind::Parameter, "merge: at least two files are merged")
            .advise("give the deltas, the highest first, and the base last"));
    };
    check_distinct(&images)?;
    check_descriptors(&images, options.new_file.is_none())?;
    let mut sources = Vec::new();
    for (number, path) in std::iter::once(base).chain(deltas.iter().rev()).enumerate() {
        let access = match number {
            0 if options.new_file.is_none() => Access::ReadWrite,
            _ => Access::ReadOnly,
        };
        let (folder, name) = folder_and_name(path)?;
        let folder = LockedFolder::open(&folder)?;
        let storage = open_image(&folder, &name, access)
            .map_err(|error| not_into_shared(&folder, &name, access, error).at_path(path))?;
        sources.push(Source { name: path.clone(), storage, raw: number == 0 && options.raw_base });
    }
    let Some(new_file) = &options.new_file else {
        let copied_bytes = merge_into_base(sources, progress)?;
        return Ok(MergeFilesReport { file: base.clone(), merged: deltas.to_vec(), copied_bytes });
    };
    let (folder, name) = folder_and_name(new_file)?;
    let folder = DirectoryFolder::open(&folder)?;
    remove_left_over(&folder, &name).map_err(|cause| {
        Error::io(ErrorKind::Stat, "merge: look for what an earlier one left", cause).at_path(new_file)
    })?;
    let copied_bytes =
        merge_into_new_file(sources, &folder, &name, progress).map_err(|error| error.at_path(new_file))?;
    Ok(MergeFilesReport { file: new_file.clone(), merged: images, copied_bytes })
}

/// Says how to merge all the same what clones share.
fn not_into_shared(folder: &dyn Folder, name: &str, access: Access, error: Error) -> Error {
    if error.kind() != ErrorKind::InUse || access == Access::ReadOnly {
        return error;
    }
    match open_image(folder, name, Access::ReadOnly) {
        Ok(storage) if is_shared(&*storage) => {
            error.advise("the base has several names, and it is never changed: merge into a new file (-n)")
        }
        _ => error,
    }
}

/// The folder that a file lies in, and its name there.
fn folder_and_name(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| refused(path, "this names no file"))?;
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok((folder.to_path_buf(), name.to_owned()))
}

/// One file under two names would be merged into itself.
fn check_distinct(images: &[PathBuf]) -> Result<()> {
    let mut seen = BTreeMap::new();
    for path in images {
        let identity = FileStorage::open(path, &file::OpenOptions::new(Access::ReadOnly))?
            .identity()
            .map_err(|cause| file::explain(cause, ErrorKind::Stat, "examine the image", path))?;
        if let Some(other) = seen.insert(identity, path) {
            return Err(refused(path, format!("this is the same file as {}", other.display()))
                .advise("give each file once, the highest first and the base last"));
        }
    }
    Ok(())
}

/// Asks the descriptors beside the files. `images` are absolute, the highest first.
fn check_descriptors(images: &[PathBuf], writes_base: bool) -> Result<()> {
    let mut known: BTreeMap<PathBuf, Result<Option<DiskDescriptor>>> = BTreeMap::new();
    let mut guids: Vec<Option<(PathBuf, Guid)>> = Vec::new();
    for (number, path) in images.iter().enumerate() {
        let is_written = writes_base && number + 1 == images.len();
        let (folder, name) = folder_and_name(path)?;
        // Images may lie in a folder of the disk's folder.
        let places = [
            Some((folder.clone(), name.clone())),
            folder
                .parent()
                .zip(folder.file_name().and_then(|inner| inner.to_str()))
                .map(|(outer, inner)| (outer.to_path_buf(), format!("{inner}/{name}"))),
        ];
        let mut found = None;
        for (folder, file) in places.into_iter().flatten() {
            let descriptor = match known.entry(folder.clone()).or_insert_with(|| load(&folder)) {
                Ok(Some(descriptor)) => descriptor,
                Ok(None) => continue,
                Err(error) if is_written => return Err(error.clone()),
                // Nothing is written beside it.
                Err(_) => continue,
            };
            let Some(image) = descriptor.images().iter().find(|image| image.file() == file) else { continue };
            if is_written {
                return Err(refused(path, format!("{} says it is an image of its disk", at(&folder).display()))
                    .advise(
                        "`ploop snapshot-merge` merges it and keeps the descriptor true; or merge into a new file (-n)",
                    ));
            }
            let transition = descriptor.shot(image.guid()).and_then(|shot| shot.transition());
            if transition.is_some_and(|transition| !transition.is_readable()) {
                return Err(Error::new(ErrorKind::Busy, "merge: a merge into this image was cut")
                    .at_path(path)
                    .advise(
                        "finish that one first: any command that changes the snapshots of the disk does",
                    ));
            }
            found = Some((folder, image.guid()));
        }
        guids.push(found);
    }
    for (pair, paths) in guids.windows(2).zip(images.windows(2)) {
        if let [Some((upper_folder, upper)), Some((lower_folder, lower))] = pair
            && upper_folder == lower_folder
            && let Some(Ok(Some(descriptor))) = known.get(upper_folder)
            && descriptor.shot(*upper).map(|shot| shot.parent()) != Some(*lower)
        {
            return Err(refused(
                &paths[0],
                format!(
                    "{} says that it does not stand on {}",
                    at(upper_folder).display(),
                    paths[1].display()
                ),
            )
            .advise("give the files as they stand on each other, the highest first and the base last"));
        }
    }
    Ok(())
}

fn at(folder: &Path) -> PathBuf {
    folder.join(DESCRIPTOR_NAME)
}

/// The descriptor in a folder, if there is one.
fn load(folder: &Path) -> Result<Option<DiskDescriptor>> {
    let opened = DirectoryFolder::open(folder)?;
    let exists = opened
        .exists(DESCRIPTOR_NAME)
        .map_err(|cause| Error::io(ErrorKind::Stat, "merge: look for a descriptor", cause).at_path(folder))?;
    if !exists {
        return Ok(None);
    }
    DiskDescriptor::load(&opened, None).map(Some).map_err(|error| {
        error.at_path(at(folder)).advise(
            "whether the base belongs to this disk is not known, so it is not written: merge into a new file (-n), or \
             move the descriptor away",
        )
    })
}

/// In clusters of this size a raw base is seen: those of the image above it.
fn raw_cluster(sources: &[Source]) -> Result<Option<Sectors>> {
    let Some([base, above]) = sources.get(..2) else { return Ok(None) };
    if !base.raw {
        return Ok(None);
    }
    match probe(&*above.storage).map_err(|error| error.at_path(&above.name))? {
        Probe::Image(header) => Ok(Some(Sectors(u64::from(header.geometry().cluster_sectors())))),
        Probe::NotAnImage => {
            Err(refused(&above.name, "this is no image")
                .advise("only the base may be raw, and it is given last"))
        }
    }
}

fn open(sources: Vec<Source>, access: Access, raw_cluster: Option<Sectors>) -> Result<Arc<Chain>> {
    Chain::open(sources, &ChainOptions { access, raw_cluster, accept_in_use: false })
}

/// Merges open files, base first, into the base, which is open for writing. Returns the bytes that were copied.
pub fn merge_into_base(mut sources: Vec<Source>, progress: &dyn Progress) -> Result<u64> {
    let raw_cluster = raw_cluster(&sources)?;
    // Whether they fit each other is found out before anything is changed.
    let again = sources.iter().map(super::again).collect();
    drop(open(again, Access::ReadOnly, raw_cluster)?);
    let deltas = sources.split_off(1.min(sources.len()));
    let Some(base) = sources.pop().filter(|_| !deltas.is_empty()) else {
        return Err(Error::new(ErrorKind::Parameter, "merge: at least two files are merged"));
    };
    let on_nothing = base.raw;
    let before = open(vec![super::again(&base)], Access::ReadOnly, raw_cluster)?;
    let source = open(deltas, Access::ReadOnly, None)?;
    let (to, from) = (before.geometry().disk_bytes(), source.geometry().disk_bytes());
    if to > from {
        return Err(refused(&base.name, format!("the base is a disk of {to} bytes, the highest image of {from}")).advise(
            "what the base holds past that end would be lost: make the highest image as large (ploop grow), or merge into a \
             new file (-n)",
        ));
    }
    drop(before);
    let name = base.name.clone();
    if base.raw {
        fitting::fit_raw(&*base.storage, from).map_err(|error| going_on(error, &name))?;
    }
    let target = open(vec![base], Access::ReadWrite, raw_cluster)?;
    // Before anything is copied: the deltas show the same above it, whatever its size is.
    let disk = source.geometry().disk_sectors();
    let target = fitting::fit(target, disk, progress).map_err(|error| going_on(error, &name))?;
    run_copy(&target, &source, Wins::Source, on_nothing, progress).map_err(|error| going_on(error, &name))
}

/// Merges open files, base first, into the new image `file`, which must not exist. Returns the bytes that were copied.
pub fn merge_into_new_file(
    sources: Vec<Source>,
    folder: &dyn Folder,
    file: &str,
    progress: &dyn Progress,
) -> Result<u64> {
    super::check_free(folder, file)?;
    let raw_cluster = raw_cluster(&sources)?;
    let on_nothing = sources.first().is_some_and(|base| base.raw);
    let base = sources.first().map(|base| Arc::clone(&base.storage));
    let source = open(sources, Access::ReadOnly, raw_cluster)?;
    let geometry = source.geometry().for_child()?;
    place_file(folder, file, |storage| {
        if let Some(base) = &base {
            ownership::copy(&**base, &**storage).map_err(|cause| {
                Error::io(ErrorKind::System, "merge: keep owner and mode of the base", cause)
            })?;
        }
        create_image(&**storage, &format::CreateOptions { geometry, preallocated: false })?;
        let target = Source { name: file.into(), storage: Arc::clone(storage), raw: false };
        let target = open(vec![target], Access::ReadWrite, None)?;
        run_copy(&target, &source, Wins::Source, on_nothing, progress)
    })
}

#[cfg(test)]
mod tests;
