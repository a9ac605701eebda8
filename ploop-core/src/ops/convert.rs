//! A disk in another form: raw, expanded or preallocated, version 1 or 2, other clusters; offline, with its snapshots.
//!
//! New files are built beside the old, made durable and read back; the descriptor that names them is the one moment of
//! change (C of the crash model); then the old files go. What the guest sees, and what each snapshot holds, is the
//! same before and after, at every instant.
//!
//! A [plan](super::plan) names the new files and the old while it runs: a conversion that was cut is tidied up by the
//! same command.
//!
//! Every file of the disk is locked as by a writer while it is converted: a mounted disk is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{Geometry, Version};
use crate::format::{
    self, Chain, ChainOptions, DESCRIPTOR_NAME, DiskDescriptor, Guid, Mode, Source, create_image, image_name,
};
use crate::io::file::{self, DirectoryFolder};
use crate::io::lock::{ImageLock, Ownership};
use crate::io::{Access, Folder, Storage, ownership};
use crate::units::Sectors;

use super::agreement;
use super::create::version_number;
use super::descriptor_lock::{DescriptorLock, lock_timeout};
use super::image_files::remove_obsolete;
use super::open::{Bundle, Place, place};
use super::plan::{self, Plan};
use super::progress::Progress;
use super::transfer::{self, ChainContent, ImageTarget, Layout, Pipeline, RawTarget, Target, finish_image};
use crate::mutant::{self, Mutant};

/// What the disk shall be; what is not said stays as it is.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The `DiskDescriptor.xml` or its folder.
    pub disk: PathBuf,
    /// How it lies in its image. Raw and preallocated are for disks without snapshots.
    pub mode: Option<Mode>,
    /// Version of the image format; not together with `mode`, as ever.
    pub version: Option<Version>,
    /// Size of a cluster: a power of two from 64 to 131072 sectors.
    pub cluster: Option<Sectors>,
    /// What was written is read back and compared before the old files go.
    pub read_back: bool,
    /// How long to wait for the descriptor's lock.
    pub lock_timeout: Duration,
}

impl ConvertOptions {
    /// Nothing to be changed yet.
    pub fn new(disk: impl Into<PathBuf>) -> Self {
        Self {
            disk: disk.into(),
            mode: None,
            version: None,
            cluster: None,
            read_back: true,
            lock_timeout: lock_timeout(),
        }
    }
}

/// One converted file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConvertedImage {
    /// Its snapshot.
    pub guid: String,
    /// The old file, which is gone.
    pub from: String,
    /// The new one.
    pub file: String,
    /// Length of the new file in bytes.
    pub file_bytes: u64,
    /// What it takes on the host in bytes.
    pub host_bytes: u64,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// The converted files; none if the disk was what it shall be.
    pub images: Vec<ConvertedImage>,
    /// `raw`, `expanded` or `preallocated`.
    pub mode: &'static str,
    /// Version of the image format; none for a raw disk without snapshots.
    pub version: Option<u8>,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Files of a conversion that was cut, now removed.
    pub tidied: Vec<String>,
    /// What is odd.
    pub warnings: Vec<String>,
}

/// Converts a disk. Fails with [`ErrorKind::InUse`] while it is mounted, with [`ErrorKind::Parameter`] for what
/// cannot be; the disk is then as it was. After [`ErrorKind::Cancelled`] and after a crash it is wholly the old or
/// wholly the new one, and the same command goes on.
pub fn convert(options: &ConvertOptions, progress: &dyn Progress) -> Result<ConvertReport> {
    let folder = match place(&options.disk)? {
        Place::Bundle(folder) => folder,
        Place::Image(image) => {
            return Err(Error::new(ErrorKind::Parameter, "convert: this is no descriptor")
                .at_path(image)
                .advise(format!(
                    "give the {DESCRIPTOR_NAME} of the disk; for a file without one: restore-descriptor"
                )));
        }
    };
    let _lock = DescriptorLock::take(&folder.join(DESCRIPTOR_NAME), options.lock_timeout)?;
    let bundle = Bundle::open(&folder)?;
    for image in bundle.descriptor.images() {
        // Its limits are told before any file is missed.
        bundle
            .descriptor
            .chain_for(image.guid())
            .map_err(|error| error.at_path(folder.join(DESCRIPTOR_NAME)))?;
    }
    let mut locks = Vec::new();
    for image in bundle.descriptor.images() {
        let path = folder.join(image.file());
        let storage = bundle.open_image(image, &file::OpenOptions::new(Access::ReadWrite))?;
        locks.push(ImageLock::take(&storage, &path, Ownership::Writer)?);
        // The lock keeps the open file.
        drop(storage);
    }
    let images = DirectoryFolder::open(&folder)?.direct();
    convert_in(&bundle.folder, &images, options, progress).map_err(|error| error.at_path(&folder))
}

/// As [`convert`], in an open folder whose disk nobody uses. `folder` is for the descriptor and names, `images` is the
/// same folder with its files opened for large transfers. `options.disk` is not looked at.
pub fn convert_in(
    folder: &dyn Folder,
    images: &dyn Folder,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    if options.mode.is_some() && options.version.is_some() {
        return Err(refused("the mode and the version cannot be changed at once")
            .advise("convert twice: first -f, then -v"));
    }
    let mut descriptor = DiskDescriptor::load(folder, None)?;
    agreement::require(folder, &descriptor)?;
    let tidied = plan::recover(folder, Some(&descriptor))?;
    // What a snapshot command left when it was cut: later it would be taken for the last thing done to the disk.
    remove_obsolete(folder, &mut descriptor)?;
    let work = Work::new(folder, images, options, descriptor)?;
    let converted = if work.jobs.is_empty() {
        work.store_if_changed()?;
        Vec::new()
    } else {
        work.run(&Pipeline { progress, read_back: options.read_back })?
    };
    Ok(ConvertReport {
        images: converted,
        mode: work.wanted.mode.name(),
        version: work.version_shown,
        cluster_bytes: work.wanted.cluster.0.saturating_mul(crate::units::SECTOR_BYTES),
        disk_bytes: work.new.disk_sectors().checked_bytes().unwrap_or(u64::MAX),
        tidied,
        warnings: work.warnings,
    })
}

fn refused(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Parameter, format!("convert: {message}"))
}

/// The form a disk has or shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    mode: Mode,
    version: Version,
    cluster: Sectors,
}

/// One file to be converted.
struct Job {
    guid: Guid,
    from: String,
    file: String,
    chain: Arc<Chain>,
    geometry: Geometry,
    preallocated: bool,
}

/// A conversion.
struct Work<'a> {
    folder: &'a dyn Folder,
    files: &'a dyn Folder,
    old: DiskDescriptor,
    new: DiskDescriptor,
    wanted: Form,
    version_shown: Option<u8>,
    jobs: Vec<Job>,
    warnings: Vec<String>,
}

impl<'a> Work<'a> {
    /// Looks at every file and says what is to be done; changes nothing.
    fn new(
        folder: &'a dyn Folder,
        files: &'a dyn Folder,
        options: &ConvertOptions,
        old: DiskDescriptor,
    ) -> Result<Self> {
        if let Some(shot) = old.shots().iter().find(|shot| shot.transition().is_some()) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("convert: the snapshot {} is temporary or half merged", shot.guid()),
            )
            .advise("delete it, or finish its merge, first"));
        }
        if let Some(image) = old.images().iter().find(|image| image.place().0.is_some()) {
            return Err(refused(format!("the image {:?} lies in another folder", image.file()))
                .advise("merge the snapshots, or move the image beside the descriptor"));
        }
        let mut chains = Vec::new();
        for image in old.images() {
            chains.push((image, open_state(files, &old, image.guid())?));
        }
        let top = chains
            .iter()
            .find(|(image, _)| image.guid() == old.top_guid())
            .map(|(_, chain)| Arc::clone(chain))
            .ok_or_else(|| refused("the descriptor has no current state"))?;
        let present = Form {
            mode: old.mode(),
            version: top.geometry().version(),
            cluster: Sectors(u64::from(top.geometry().cluster_sectors())),
        };
        let wanted = Form {
            mode: options.mode.unwrap_or(present.mode),
            version: options.version.unwrap_or(present.version),
            cluster: options.cluster.unwrap_or(present.cluster),
        };
        check_wanted(&old, &top, present, wanted, options)?;
        let mut warnings = Vec::new();
        let mut jobs = Vec::new();
        let mut new = old.clone();
        new.set_layout(wanted.mode, wanted.cluster).map_err(|error| error.with_kind(ErrorKind::Parameter))?;
        for (image, chain) in &chains {
            let is_base = chain.depth() == 1;
            let raw = is_base && wanted.mode == Mode::Raw;
            let own = chain.geometry();
            let changed = own.is_raw() != raw
                || !raw && (present.version, present.cluster) != (wanted.version, wanted.cluster)
                || is_base && present.mode != wanted.mode;
            if !changed {
                continue;
            }
            let geometry = new_geometry(chain, wanted, raw, &mut warnings)?;
            if image.guid() == old.top_guid() {
                new.set_disk_sectors(geometry.disk_sectors())?;
            }
            let file = image_name(image.file());
            new.set_file(image.guid(), &file)?;
            jobs.push(Job {
                guid: image.guid(),
                from: image.file().to_owned(),
                file,
                chain: Arc::clone(chain),
                geometry,
                preallocated: is_base && wanted.mode == Mode::Preallocated,
            });
        }
        let only_raw = top.depth() == 1 && wanted.mode == Mode::Raw;
        let version_shown = (!only_raw).then_some(match wanted.version {
            Version::V1 => 1,
            Version::V2 => 2,
        });
        Ok(Self { folder, files, old, new, wanted, version_shown, jobs, warnings })
    }

    /// A raw disk without images has its clusters in the descriptor alone.
    fn store_if_changed(&self) -> Result<()> {
        if self.new == self.old { Ok(()) } else { self.new.store(self.folder) }
    }

    fn run(&self, pipeline: &Pipeline<'_>) -> Result<Vec<ConvertedImage>> {
        let plan = Plan {
            new: self.jobs.iter().map(|job| job.file.clone()).collect(),
            old: self.jobs.iter().map(|job| job.from.clone()).collect(),
        };
        if !mutant::is_active(Mutant::ConvertUnplanned) {
            plan.store(self.folder)?;
        }
        let built = self.build(pipeline).and_then(|built| {
            self.folder
                .sync()
                .map_err(|cause| Error::io(ErrorKind::Sync, "convert: sync the folder", cause))?;
            self.new.store(self.folder)?;
            Ok(built)
        });
        let built = match built {
            Ok(built) => built,
            // Which of the two descriptors will be there is not known: neither set of files may go.
            Err(error) if error.kind() == ErrorKind::OutcomeUnknown => return Err(error),
            Err(error) => return Err(plan::withdraw(self.folder, Some(&self.old), error)),
        };
        plan::recover(self.folder, Some(&self.new))
            .map_err(|error| error.advise("the disk is converted; the same command removes what is left"))?;
        Ok(built)
    }

    /// Builds and verifies every new file.
    fn build(&self, pipeline: &Pipeline<'_>) -> Result<Vec<ConvertedImage>> {
        let mut total = 0u64;
        for job in &self.jobs {
            let end = job.chain.geometry().disk_bytes();
            let unit = job.geometry.cluster_bytes();
            total = total.saturating_add(transfer::data_bytes(&job.content(), unit, end)?);
        }
        pipeline.progress.begin("convert", pipeline.total_bytes(total));
        let mut built = Vec::new();
        for job in &self.jobs {
            built.push(job.build(self.files, pipeline).map_err(|error| error.at_path(&job.file))?);
        }
        pipeline.progress.end();
        Ok(built)
    }
}

/// Opens a state for reading.
fn open_state(files: &dyn Folder, descriptor: &DiskDescriptor, guid: Guid) -> Result<Arc<Chain>> {
    let raw = descriptor.is_raw();
    let mut sources = Vec::new();
    for (index, image) in descriptor.chain_for(guid)?.into_iter().enumerate() {
        let storage = files
            .open(image.file(), Access::ReadOnly)
            .map_err(|cause| file::explain(cause, ErrorKind::Open, "open", Path::new(image.file())))?;
        sources.push(Source { name: PathBuf::from(image.file()), storage, raw: raw && index == 0 });
    }
    Chain::open(sources, &reading(raw.then(|| descriptor.cluster_sectors())))
}

fn reading(raw_cluster: Option<Sectors>) -> ChainOptions {
    ChainOptions { access: Access::ReadOnly, raw_cluster, accept_in_use: false }
}

fn check_wanted(
    descriptor: &DiskDescriptor,
    top: &Chain,
    present: Form,
    wanted: Form,
    options: &ConvertOptions,
) -> Result<()> {
    let snapshots = descriptor.images().len() > 1;
    if snapshots && wanted.mode != present.mode && wanted.mode != Mode::Expanded {
        return Err(refused(format!("a disk with snapshots cannot become {}", wanted.mode.name()))
            .advise("delete or merge its snapshots first"));
    }
    if options.version.is_some() && top.depth() == 1 && present.mode == Mode::Raw {
        return Err(refused("a raw disk has no version").advise("convert it with -f expanded first"));
    }
    // All limits of the cluster and the version at once, before anything is written.
    Geometry::new(wanted.version, wanted.cluster, wanted.cluster).map(drop)
}

/// The sizes of a new file.
fn new_geometry(chain: &Chain, wanted: Form, raw: bool, warnings: &mut Vec<String>) -> Result<Geometry> {
    let own = chain.geometry();
    if raw {
        return Geometry::raw(wanted.cluster, own.disk_bytes());
    }
    // To the sector, whatever the clusters: partition tables and file systems know their end.
    let disk = own.disk_sectors();
    if !disk.0.is_multiple_of(wanted.cluster.0.max(1)) {
        warnings.push(format!(
            "the disk of {} sectors ends inside a cluster; the kernel driver of the original opens none of these: \
             `ploop resize -s {}` rounds it up",
            disk.0, disk.0
        ));
    }
    Geometry::exact(wanted.version, wanted.cluster, disk)
}

impl Job {
    fn content(&self) -> ChainContent {
        ChainContent::of_top(Arc::clone(&self.chain))
    }

    fn threads(&self, storage: &dyn Storage) -> usize {
        transfer::threads(storage, transfer::piece_bytes(self.geometry.cluster_bytes()))
    }

    fn build(&self, files: &dyn Folder, pipeline: &Pipeline<'_>) -> Result<ConvertedImage> {
        let failed = |kind, operation: &'static str| move |cause| Error::io(kind, operation, cause);
        let storage = files
            .create_exclusive(&self.file)
            .map_err(failed(ErrorKind::Create, "convert: create the new file"))?;
        ownership::copy(&**self.chain.storage(self.chain.top()), &*storage).map_err(|cause| {
            Error::io(ErrorKind::System, "convert: keep owner and mode of the old file", cause)
                .advise("run this as the owner of the disk, or as root")
        })?;
        let name = Path::new(&self.file);
        let ((), layout) = fill_new(&storage, name, &self.geometry, self.preallocated, |target, storage| {
            let end = self.chain.geometry().disk_bytes();
            transfer::copy(&self.content(), target, end, self.threads(storage), pipeline)
        })?;
        drop(storage);
        let storage = files
            .open(&self.file, Access::ReadOnly)
            .map_err(failed(ErrorKind::Open, "convert: open the new file"))?;
        verify_new(&storage, name, &self.geometry, layout)?;
        let measure = ErrorKind::Stat;
        Ok(ConvertedImage {
            guid: self.guid.to_string(),
            from: self.from.clone(),
            file: self.file.clone(),
            file_bytes: storage.len().map_err(failed(measure, "convert: measure the new file"))?,
            host_bytes: storage
                .allocated_bytes()
                .map_err(failed(measure, "convert: measure the new file"))?,
        })
    }
}

/// Makes a raw file or an image in `storage`, which is empty, lets `fill` store content in it, and makes it durable.
pub(super) fn fill_new<T>(
    storage: &Arc<dyn Storage>,
    name: &Path,
    geometry: &Geometry,
    preallocated: bool,
    fill: impl FnOnce(&dyn Target, &dyn Storage) -> Result<T>,
) -> Result<(T, Layout)> {
    if geometry.is_raw() {
        storage
            .set_len(geometry.disk_bytes())
            .map_err(|cause| Error::io(ErrorKind::Truncate, "give the raw file its length", cause))?;
        let target = RawTarget::new(Arc::clone(storage), geometry.disk_bytes());
        let filled = fill(&target, storage)?;
        target.finish()?;
        return Ok((filled, Layout::RAW));
    }
    create_image(&**storage, &format::CreateOptions { geometry: geometry.clone(), preallocated })?;
    let source = Source { name: name.to_path_buf(), storage: Arc::clone(storage), raw: false };
    let writing = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false };
    let chain = Chain::open(vec![source], &writing)?;
    let filled = fill(&ImageTarget::new(Arc::clone(&chain), preallocated), storage)?;
    finish_image(&chain)?;
    Ok((filled, Layout::of(&chain)))
}

/// Looks at a finished file, opened anew: its content was compared when it was stored, now its length, or header and
/// table, must be what they were then.
pub(super) fn verify_new(
    storage: &Arc<dyn Storage>,
    name: &Path,
    geometry: &Geometry,
    layout: Layout,
) -> Result<()> {
    if geometry.is_raw() {
        let len =
            storage.len().map_err(|cause| Error::io(ErrorKind::Stat, "measure the new raw file", cause))?;
        return if len == geometry.disk_bytes() && layout == Layout::RAW {
            Ok(())
        } else {
            Err(transfer::differs("the length of the file"))
        };
    }
    let source = Source { name: name.to_path_buf(), storage: Arc::clone(storage), raw: false };
    let chain = Chain::open(vec![source], &reading(None))?;
    if chain.geometry() != geometry || version_number(chain.geometry()) != version_number(geometry) {
        return Err(transfer::differs("the header"));
    }
    if Layout::of(&chain) != layout {
        return Err(transfer::differs("the table"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
