//! Whether a disk is sound: every check of every image, of the chain, of the folder; and, if asked, the repair.
//!
//! Without `force` an image whose header says "closed" is skipped, as the original does. How much may be repaired
//! follows from the options: nothing when read-only, what is harmless otherwise, what is provable when the in-use mark
//! of an image that was not closed may be dropped, everything when told to repair. An image with a finding that may not
//! be repaired is not written at all. Images under others are only repaired when told to repair.
//!
//! Mounting repairs the top by the same rules, class A and B, in `format/delta.rs`: nobody needs to check first.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    DESCRIPTOR_NAME, Described, DiskDescriptor, Geometry, Guid, Image, InUse, Probe, Version, probe,
};
use crate::io::file::{self, DirectoryFolder};
use crate::io::lock::{ImageLock, Ownership, shared_by_clones};
use crate::io::{Access, Folder, Storage};
use crate::ops::Progress;
use crate::ops::agreement::Disagreement;
use crate::ops::descriptor_lock::{DescriptorLock, lock_timeout};
use crate::ops::image_files::is_shared;
use crate::ops::open::{Bundle, Place, ReadBundle, place};
use crate::ops::repair::undo_file::UndoFile;
use crate::ops::repair::{self, RepairReport, UndoReport};
use crate::ops::space::space_of;
use crate::units::Sectors;

pub use finding::{Class, Count, EXAMPLES_MAX, Example, Findings, Kind};
use image::{Examined, Standing};

mod bundle;
mod finding;
mod holes;
pub(crate) mod image;
mod raw;

/// What to check and what may be done about it.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// A descriptor, its folder, or an image.
    pub path: PathBuf,
    /// Only the image of this state of a bundle.
    pub snapshot: Option<Guid>,
    /// Also look at images that were closed.
    pub force: bool,
    /// Change nothing.
    pub read_only: bool,
    /// An image that was not closed may be repaired as mounting it would, and closed.
    pub drop_in_use: bool,
    /// Repair everything that can be, behind an undo file.
    pub repair: bool,
    /// Write zeros into the holes that the host file has inside clusters in use.
    pub fill_holes: bool,
    /// The image is raw, in clusters of this size. For images without descriptor.
    pub raw_cluster: Option<Sectors>,
    /// Size of the disk that a raw image should hold, where it is known. For images without descriptor.
    pub raw_disk: Option<Sectors>,
    /// How long to wait for the descriptor's lock.
    pub lock_timeout: Duration,
}

impl CheckOptions {
    /// Looks at everything and changes nothing.
    pub fn look(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            snapshot: None,
            force: true,
            read_only: true,
            drop_in_use: false,
            repair: false,
            fill_holes: false,
            raw_cluster: None,
            raw_disk: None,
            lock_timeout: lock_timeout(),
        }
    }

    /// Repairs everything that can be.
    pub fn repair(path: impl Into<PathBuf>) -> Self {
        Self { read_only: false, drop_in_use: true, repair: true, ..Self::look(path) }
    }
}

/// How it stands with an image or a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Marked as closed, and not looked at.
    Skipped,
    /// Nothing was found.
    Sound,
    /// Everything that was found is repaired.
    Repaired,
    /// Something harmless was found and is still there.
    Harmless,
    /// There is damage.
    Damaged,
}

/// What was found in one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageCheck {
    /// Its file, as the descriptor or the caller names it.
    pub file: PathBuf,
    /// Its GUID, if a descriptor names it.
    pub guid: Option<String>,
    /// How it stands with it.
    pub outcome: Outcome,
    /// Whether it was not closed, and is still marked so.
    pub not_closed: bool,
    /// Version of the format, 1 or 2; none for a raw image or a header that makes no sense.
    pub version: Option<u8>,
    /// Size of its disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Length of the file in bytes, as it was found.
    pub file_bytes: u64,
    /// Entries of its table.
    pub entries: u64,
    /// Entries that are not 0. Not counted in a skipped image.
    pub allocated_clusters: u64,
    /// Clusters inside the file that nothing uses. No defect: they are used again.
    pub free_clusters: u64,
    /// Pairs of clusters that follow each other on the guest's disk and lie in this image.
    pub neighbours: u64,
    /// Those among them that do not follow each other in the file.
    pub fragments: u64,
    /// What was found.
    pub findings: Findings,
    /// What was repaired, if anything.
    pub repair: Option<RepairReport>,
    /// Bytes of holes that were filled with zeros.
    pub filled_hole_bytes: u64,
    /// Of a raw image: what the header of an image at its start says, in sectors: disk and cluster.
    #[serde(skip)]
    pub(crate) header_in_raw: Option<(Sectors, Sectors)>,
}

/// What was found in a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// The descriptor, if there is one.
    pub descriptor: Option<PathBuf>,
    /// How it stands with all of it.
    pub outcome: Outcome,
    /// What was found about descriptor, chain and folder.
    pub findings: Findings,
    /// Its images.
    pub images: Vec<ImageCheck>,
    /// What is odd about the descriptor, though it is no fault of the disk: encryption, a suspended machine, where images were
    /// found.
    pub notes: Vec<String>,
    /// Left-over files that were removed.
    pub files_removed: Vec<String>,
    /// What the images contradict the descriptor in: it keeps the disk from being written.
    pub disagreements: Vec<Disagreement>,
    /// The exit code that says so: 0, 7, 11, 37, 38 or 39.
    pub exit_code: u8,
}

impl CheckReport {
    /// The failure that this result amounts to for a command, if it does.
    pub fn failure(&self) -> Option<Error> {
        let kind = ErrorKind::from_exit_code(self.exit_code)?;
        let is_damaged = self.images.iter().any(|image| image.outcome == Outcome::Damaged);
        if let Some(found) = self.disagreements.iter().find(|found| found.failure().kind() == kind)
            && !is_damaged
        {
            let message = match found {
                Disagreement::Short { .. } => "check: a part of the disk is missing",
                Disagreement::ImageSaidRaw { .. } => "check: the descriptor says that an image is raw",
            };
            return Some(Error::new(kind, message).advise(found.advice()));
        }
        let (message, advice) = match kind {
            ErrorKind::InUse => (
                "check: the image was not closed",
                "mount it, or give -d, to repair what a crash leaves and to close it",
            ),
            ErrorKind::Write => ("check: a repair is needed, but must not be made", "leave -r out"),
            ErrorKind::Parameter => {
                ("check: the images do not fit each other", "restore the chain from a backup")
            }
            ErrorKind::Descriptor => {
                ("check: the descriptor does not fit the images", "restore what is missing from a backup")
            }
            _ => (
                "check: the image is damaged",
                "make a copy of it if you can, then `ploop check --repair`; it writes an undo file first",
            ),
        };
        Some(Error::new(kind, message).advise(advice))
    }
}

/// How much may be repaired.
fn level(options: &CheckOptions, was_open: bool, standing: Standing) -> Option<Class> {
    match (options.read_only, options.repair, standing, was_open) {
        (true, ..) => None,
        (false, true, ..) => Some(Class::C),
        (false, false, Standing::Frozen, _) => None,
        (false, false, Standing::Top, true) => options.drop_in_use.then_some(Class::B),
        (false, false, Standing::Top, false) => Some(Class::A),
    }
}

/// Checks a disk. What is wrong with it is in the report; an error is something that kept it from being looked at:
/// [`ErrorKind::InUse`] if a program has it open.
pub fn check(options: &CheckOptions, progress: &dyn Progress) -> Result<CheckReport> {
    match place(&options.path)? {
        Place::Bundle(path) => {
            let descriptor = path.join(DESCRIPTOR_NAME);
            let reading = ReadBundle::open(&path, false)?;
            if let Described::Split(split) = &reading.described {
                let report = bundle::check_split(&reading.folder, split, &path, options, progress)?;
                return Ok(CheckReport { descriptor: Some(descriptor), ..report });
            }
            drop(reading);
            let _lock = lock(&descriptor, options)?;
            let bundle = Bundle::open(&path)?;
            let mut report = bundle::check_bundle(&bundle, &path, options, progress)?;
            report.descriptor = Some(descriptor);
            Ok(report)
        }
        Place::Image(_) if options.snapshot.is_some() => Err(Error::new(
            ErrorKind::Parameter,
            "check: a snapshot is chosen, but only a disk with a descriptor has snapshots",
        )
        .at_path(&options.path)),
        Place::Image(path) => {
            let (folder, name, _lock) = folder_of(&path, options)?;
            let standing = standing_of(&folder, &name);
            refuse_other_file(&folder, &name, &options.path, options)?;
            let image = check_in(&folder, &name, &options.path, standing, options, progress)?;
            Ok(conclude(Findings::default(), vec![image], Vec::new(), options))
        }
    }
}

fn lock(descriptor: &Path, options: &CheckOptions) -> Result<Option<DescriptorLock>> {
    match options.read_only {
        true => Ok(None),
        false => DescriptorLock::take(descriptor, options.lock_timeout).map(Some),
    }
}

/// The folder of an image and its name in it; with the lock of the descriptor beside it, if there is one.
fn folder_of(
    path: &Path,
    options: &CheckOptions,
) -> Result<(DirectoryFolder, String, Option<DescriptorLock>)> {
    let (parent, name) = file::locate(path)?;
    let folder = DirectoryFolder::open(&parent)?;
    let descriptor = parent.join(DESCRIPTOR_NAME);
    let has_descriptor = folder
        .exists(DESCRIPTOR_NAME)
        .map_err(|error| file::explain(error, ErrorKind::Stat, "look for a descriptor", &descriptor))?;
    let lock = if has_descriptor { lock(&descriptor, options)? } else { None };
    Ok((folder, name, lock))
}

/// What an image is in its chain, by the descriptor beside it. Beside one that cannot be read, it may be anything: it
/// is written only when told to repair.
fn standing_of(folder: &DirectoryFolder, name: &str) -> Standing {
    match DiskDescriptor::load(folder, Some(folder.path())) {
        Ok(descriptor) => {
            let image = descriptor.images().iter().find(|image| image.file() == name);
            match image {
                Some(image) if descriptor.children(image.guid()).next().is_some() => Standing::Frozen,
                _ => Standing::Top,
            }
        }
        Err(_) if matches!(folder.exists(DESCRIPTOR_NAME), Ok(false)) => Standing::Top,
        Err(_) => Standing::Frozen,
    }
}

/// Refuses a file that has nothing of an image and that no descriptor beside it calls one: there is nothing to check, and
/// nothing to repair. An image that has lost its header is in its descriptor.
fn refuse_other_file(
    folder: &DirectoryFolder,
    name: &str,
    path: &Path,
    options: &CheckOptions,
) -> Result<()> {
    let described = folder.exists(DESCRIPTOR_NAME).unwrap_or(true);
    if described || options.raw_cluster.is_some() {
        return Ok(());
    }
    let storage = Folder::open(folder, name, Access::ReadOnly)
        .map_err(|error| file::explain(error, ErrorKind::Open, "open", path))?;
    match probe(&storage) {
        Ok(Probe::NotAnImage) => Err(Error::new(ErrorKind::Parameter, "check: this is not a disk image")
            .at_path(path)
            .advise(
                "nothing was changed; -R checks the file as a raw disk, `ploop import --format FORMAT` reads those of other \
                 programs",
            )),
        _ => Ok(()),
    }
}

/// Takes a repair back: `undo_path` is the undo file it left, `image_path` the image it repaired.
pub fn undo(undo_path: &Path, image_path: &Path) -> Result<UndoReport> {
    let options = CheckOptions { read_only: false, ..CheckOptions::look(image_path) };
    let (folder, name, _lock) = folder_of(image_path, &options)?;
    let (parent, undo_name) = file::locate(undo_path)?;
    undo_in(&folder, &name, &DirectoryFolder::open(parent)?, &undo_name)
}

/// As [`undo`], in open folders.
pub fn undo_in(
    folder: &dyn Folder,
    name: &str,
    undo_folder: &dyn Folder,
    undo_name: &str,
) -> Result<UndoReport> {
    let (image, _lock) = open_locked(folder, name, Path::new(name), Access::ReadWrite)?;
    let storage = undo_folder
        .open(undo_name, Access::ReadWrite)
        .map_err(|error| file::explain(error, ErrorKind::Open, "open the undo file", Path::new(undo_name)))?;
    let file = UndoFile::open(storage, undo_name)?;
    repair::undo(&image, &file).map_err(|error| error.at_path(name))
}

/// Opens an image and takes its lock, where storage has locks.
fn open_locked(
    folder: &dyn Folder,
    name: &str,
    path: &Path,
    access: Access,
) -> Result<(Arc<dyn Storage>, Option<ImageLock>)> {
    let storage = folder.open(name, access).map_err(|error| match (access, error.kind()) {
        (Access::ReadWrite, std::io::ErrorKind::ReadOnlyFilesystem) => {
            Error::io(ErrorKind::Write, "check: a repair must write, and the file system is read-only", error)
                .at_path(path)
                .advise(
                    "give -r to look only; to repair, remount the file system for writing or repair a copy",
                )
        }
        _ => file::explain(error, ErrorKind::Open, "open", path),
    })?;
    let ownership = match access {
        Access::ReadOnly => Ownership::Reader,
        Access::ReadWrite => Ownership::Writer,
    };
    let lock = match storage.descriptor() {
        Some(descriptor) => Some(ImageLock::take(descriptor, path, ownership)?),
        None => None,
    };
    Ok((storage, lock))
}

/// Checks the image `name` of an open folder; `path` is for messages and the report.
pub(crate) fn check_in(
    folder: &dyn Folder,
    name: &str,
    path: &Path,
    standing: Standing,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<ImageCheck> {
    check_unnamed(folder, name, path, standing, options, progress).map_err(|error| error.at_path(path))
}

/// Checks and repairs one image that stands alone, by its name in an open folder.
pub fn check_image_in(
    folder: &dyn Folder,
    name: &str,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let image = check_in(folder, name, Path::new(name), Standing::Top, options, progress)?;
    Ok(conclude(Findings::default(), vec![image], Vec::new(), options))
}

/// Checks a whole bundle in an open folder, which holds the descriptor and all of its images. The caller holds the
/// descriptor's lock.
pub fn check_bundle_in(
    folder: &dyn Folder,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let descriptor = DiskDescriptor::load(folder, None)?;
    let elsewhere = |image: &Image, _: Standing, _: &CheckOptions| match image.place() {
        (None, _) => Ok(None),
        (Some(_), _) => {
            Err(Error::new(ErrorKind::Open, "check: the image is in another folder").at_path(image.file()))
        }
    };
    bundle::check_bundle_in(folder, &descriptor, Path::new(""), &elsewhere, options, progress)
}

fn check_unnamed(
    folder: &dyn Folder,
    name: &str,
    path: &Path,
    standing: Standing,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<ImageCheck> {
    if let Some(cluster) = options.raw_cluster {
        return raw::check_raw(folder, name, path, cluster, options);
    }
    let (was_open, shared) = {
        let (storage, _lock) = open_locked(folder, name, path, Access::ReadOnly)?;
        let (stored, file_bytes) = image::read_header(&storage)?;
        let was_open = InUse::decode(stored.in_use) == InUse::Open;
        if !was_open
            && !options.force
            && !options.repair
            && let Ok(header) = stored.validate(file_bytes)
        {
            let mut skipped = summary(path, file_bytes, Some(header.geometry()));
            skipped.outcome = Outcome::Skipped;
            return Ok(skipped);
        }
        (was_open, is_shared(&*storage))
    };
    // What clones share is only looked at, as long as nothing is wrong with it.
    let level = if shared { None } else { level(options, was_open, standing) };
    // As a reader first: who finds nothing to repair needs no right to write, on no medium. A repair that was told, and may
    // have been cut, begins with what it left.
    let mut access = if level == Some(Class::C) { Access::ReadWrite } else { Access::ReadOnly };
    let (mut storage, mut lock) = open_locked(folder, name, path, access)?;
    let resumed = match level {
        Some(Class::C) => repair::resume(folder, name, &storage, progress)?,
        _ => None,
    };
    let mut examined = examine(&storage, standing, progress)?;
    let repairs = |examined: &Examined| {
        // Told to repair, what forbids it is an error; else it is left as it is.
        let is_allowed =
            examined.plan.as_ref().is_some_and(|plan| plan.forbidden.is_none() || options.repair);
        let findings = &examined.findings;
        level >= findings.worst()
            && is_allowed
            && findings.is_repairable()
            && !findings.has_unrepairable_damage()
    };
    let fills = |outcome: Outcome| fills_holes(options) && !shared && outcome <= Outcome::Repaired;
    if access == Access::ReadOnly && (repairs(&examined) || fills(Outcome::Repaired)) {
        // What is harmless, and was not asked for, may stay on a medium that takes no writes.
        let may_stay = examined.findings.worst() <= Some(Class::A)
            && examined.findings.total(Kind::NotClosed) == 0
            && !fills_holes(options);
        drop((storage, lock));
        match open_locked(folder, name, path, Access::ReadWrite) {
            Ok(opened) => {
                (storage, lock) = opened;
                access = Access::ReadWrite;
            }
            Err(error) if may_stay && is_read_only(&error) => {
                (storage, lock) = open_locked(folder, name, path, Access::ReadOnly)?;
            }
            Err(error) => return Err(error),
        }
        examined = examine(&storage, standing, progress)?;
    }
    if shared && options.repair && !options.read_only && examined.findings.worst() > Some(Class::A) {
        return Err(shared_by_clones(path));
    }
    let mut result = result_of(path, &examined);
    result.repair = resumed;
    if access == Access::ReadWrite && repairs(&examined) {
        let report = repair::repair(folder, name, &storage, &examined, progress)?;
        let after = examine(&storage, standing, progress)?;
        if after.findings.is_repairable() {
            // Not expected; to say "repaired" would be a lie.
            result.findings = after.findings.clone();
        } else {
            result.outcome = if after.findings.is_empty() { Outcome::Repaired } else { Outcome::Harmless };
        }
        result.not_closed = false;
        result.repair = Some(RepairReport { resumed: result.repair.is_some(), ..report });
        set_figures(&mut result, &after);
        examined = after;
    } else if result.repair.is_some() && examined.findings.is_empty() {
        result.outcome = Outcome::Repaired;
    }
    if fills(result.outcome)
        && let Some(plan) = &examined.plan
    {
        result.filled_hole_bytes = holes::fill(&storage, plan, progress)?;
    }
    drop((storage, lock));
    Ok(result)
}

/// Whether an error says that the file's medium takes no writes.
fn is_read_only(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|cause| cause.kind() == std::io::ErrorKind::ReadOnlyFilesystem)
}

fn fills_holes(options: &CheckOptions) -> bool {
    options.fill_holes && !options.read_only
}

fn examine(storage: &dyn Storage, standing: Standing, progress: &dyn Progress) -> Result<Examined> {
    progress.begin("check the table", 0);
    let examined = image::examine(storage, standing)?;
    progress.end();
    Ok(examined)
}

/// What is known of an image by its sizes.
fn summary(path: &Path, file_bytes: u64, geometry: Option<&Geometry>) -> ImageCheck {
    ImageCheck {
        file: path.to_path_buf(),
        guid: None,
        outcome: Outcome::Sound,
        not_closed: false,
        version: geometry.filter(|geometry| !geometry.is_raw()).map(|geometry| match geometry.version() {
            Version::V1 => 1,
            Version::V2 => 2,
        }),
        disk_bytes: geometry.map_or(0, Geometry::disk_bytes),
        cluster_bytes: geometry.map_or(0, Geometry::cluster_bytes),
        file_bytes,
        entries: geometry.map_or(0, |geometry| u64::from(geometry.entries())),
        allocated_clusters: 0,
        free_clusters: 0,
        neighbours: 0,
        fragments: 0,
        findings: Findings::default(),
        repair: None,
        filled_hole_bytes: 0,
        header_in_raw: None,
    }
}

fn result_of(path: &Path, examined: &Examined) -> ImageCheck {
    let findings = examined.findings.clone();
    let outcome = match findings.worst() {
        None => Outcome::Sound,
        Some(Class::A) => Outcome::Harmless,
        Some(Class::B | Class::C) => Outcome::Damaged,
    };
    let geometry = examined.plan.as_ref().map(|plan| plan.header.geometry());
    let mut result = summary(path, examined.file_bytes, geometry);
    set_figures(&mut result, examined);
    result.not_closed = findings.total(Kind::NotClosed) > 0;
    ImageCheck { outcome, findings, ..result }
}

/// The figures that `info` has, too.
fn set_figures(result: &mut ImageCheck, examined: &Examined) {
    let Some(plan) = &examined.plan else { return };
    let lengths = (examined.file_bytes, 0);
    let extension = plan.extension_clusters.count();
    let space = space_of(&plan.survey, extension, plan.header.geometry(), lengths);
    result.allocated_clusters = space.allocated_clusters;
    result.free_clusters = space.free_clusters;
    (result.neighbours, result.fragments) = (space.neighbours, space.breaks);
}

/// Puts the parts of a report together.
fn conclude(
    findings: Findings,
    images: Vec<ImageCheck>,
    files_removed: Vec<String>,
    options: &CheckOptions,
) -> CheckReport {
    let own = match findings.worst() {
        None => Outcome::Sound,
        Some(Class::A)
            if findings.counts.iter().all(|row| row.kind == Kind::Leftover) && !files_removed.is_empty() =>
        {
            Outcome::Repaired
        }
        Some(Class::A) => Outcome::Harmless,
        Some(Class::B | Class::C) => Outcome::Damaged,
    };
    let worst = images.iter().map(|image| image.outcome).max();
    let outcome = match (own, worst) {
        // A chain without a finding whose images were all skipped has not been looked at.
        (Outcome::Sound, Some(worst)) => worst,
        (own, worst) => worst.map_or(own, |worst| own.max(worst)),
    };
    let damaged_images = images.iter().any(|image| image.outcome == Outcome::Damaged);
    let not_closed = images.iter().any(|image| image.not_closed);
    let has = |kind: Kind| findings.counts.iter().any(|row| row.kind == kind && row.class > Class::A);
    // Of what is no raw image, the length of a raw image says nothing.
    let failure = if damaged_images || has(Kind::MissingEnd) && !has(Kind::SaidRaw) {
        Some(ErrorKind::Corrupt)
    } else if has(Kind::Missing) || has(Kind::BrokenChain) || has(Kind::SaidRaw) {
        Some(ErrorKind::Descriptor)
    } else if has(Kind::Mismatch) {
        Some(ErrorKind::Parameter)
    } else if not_closed && options.read_only && options.drop_in_use {
        Some(ErrorKind::Write)
    } else if not_closed {
        Some(ErrorKind::InUse)
    } else {
        None
    };
    CheckReport {
        descriptor: None,
        outcome,
        findings,
        images,
        notes: Vec::new(),
        files_removed,
        disagreements: Vec::new(),
        exit_code: failure.map_or(0, ErrorKind::exit_code),
    }
}

#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;
