//! A disk from its files: found, locked, checked and put together as a [`Chain`].
//!
//! Images of a bundle are opened relative to its folder, following no link (threat rule M4). Each is locked before
//! anything is read that matters: the top for what the caller will do with it, those below against writers. The
//! locks live in the chain's storages, so they last exactly as long as the chain can touch the files.
//!
//! The format of a file is never guessed for writing (M5): a base is raw only if the descriptor or the caller says
//! so, whatever its first bytes are.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Chain, ChainOptions, DESCRIPTOR_NAME, Described, DiskDescriptor, Guid, Probe, RepairSummary, Source,
    probe,
};
use crate::io::file::{self, Caching, DirectoryFolder, FileStorage};
use crate::io::latch::Latched;
use crate::io::lock::{ImageLock, Ownership};
use crate::io::{Access, Alignment, Allocation, Folder, Storage, identity, sys};
use crate::ops::agreement::{self, Accepted, Disagreement};
use crate::ops::descriptor_lock::{DescriptorLock, lock_timeout};
use crate::units::Sectors;

mod bundle;
mod joined;
mod place;

pub use bundle::image_paths;
pub(super) use bundle::open_image;
pub(super) use bundle::{Bundle, ReadBundle, while_it_stands};
pub(super) use joined::ChainStorage;
pub use place::followed;
pub(super) use place::{Place, place};

/// How often a reader begins anew because the descriptor has been replaced.
const READ_TRIES: u32 = 20;

/// Which files make up the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// A descriptor, its folder, or a single image that needs no other.
    Path(PathBuf),
    /// Images, base first.
    Files(Vec<PathBuf>),
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The files.
    pub which: Which,
    /// Access to the top; what is below is only ever read.
    pub access: Access,
    /// The state to open; the current one if none. Only for a bundle, and only the current one for writing.
    pub snapshot: Option<Guid>,
    /// The base is raw, in clusters of this size. For files without descriptor; a descriptor says so itself.
    pub raw_cluster: Option<Sectors>,
    /// Take a top that was not closed as it is, without looking for damage.
    pub accept_in_use: bool,
    /// Contradictions between descriptor and images that do not keep the disk from being written.
    pub accepted: Accepted,
    /// Whether transfers pass the page cache where file system and geometry allow it.
    pub caching: Caching,
    /// Whether images may be block devices.
    pub block_device: bool,
    /// Take no lock on the images: for a look, after which nothing is done with what was seen. Only for reading.
    pub unlocked: bool,
    /// Folders that images outside of the bundle may be taken from, as a linked clone has them; for reading only.
    pub parents: Vec<PathBuf>,
    /// How long to wait for the descriptor's lock.
    pub lock_timeout: Duration,
}

impl OpenOptions {
    /// The current state of the disk at `path`, past the page cache.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        Self {
            which: Which::Path(path.into()),
            access,
            snapshot: None,
            raw_cluster: None,
            accept_in_use: false,
            accepted: Accepted::default(),
            caching: Caching::Direct,
            block_device: false,
            unlocked: false,
            parents: Vec::new(),
            lock_timeout: lock_timeout(),
        }
    }
}

/// What was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpenReport {
    /// The descriptor, if there is one.
    pub descriptor: Option<PathBuf>,
    /// The images, base first.
    pub images: Vec<PathBuf>,
    /// The state that was opened, if there is a descriptor.
    pub state: Option<String>,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Whether the top may be written.
    pub writable: bool,
    /// Whether transfers of each image pass the page cache, base first.
    pub direct: Vec<bool>,
    /// Whether the top was not closed by its last writer.
    pub was_in_use: bool,
    /// Who encrypted the disk, if the descriptor says that somebody did: its bytes are ciphertext.
    pub encryption: Option<String>,
    /// What is odd or was repaired, though it does not prevent opening.
    pub warnings: Vec<String>,
    /// Contradictions between descriptor and images that were not accepted: what is read is not the whole disk, or not the
    /// disk. A disk opened for writing has none.
    pub disagreements: Vec<Disagreement>,
}

/// An open disk, ready for [`Disk::open`](crate::device::Disk::open). The images stay locked as long as the chain
/// lives.
pub struct Opened {
    /// The deltas.
    pub chain: Arc<Chain>,
    /// What was found.
    pub report: OpenReport,
}

/// An image with the lock on it.
pub(super) struct LockedStorage {
    storage: FileStorage,
    path: PathBuf,
    /// Released with the storage.
    lock: Mutex<Option<ImageLock>>,
}

impl LockedStorage {
    /// An image at `path` with the lock on its open file.
    pub(super) fn new(storage: FileStorage, path: &Path, lock: ImageLock) -> Self {
        Self { storage, path: path.to_path_buf(), lock: Mutex::new(Some(lock)) }
    }

    /// An image at `path` without a lock, until one is [claimed](Storage::claim).
    pub(super) fn unlocked(storage: FileStorage, path: &Path) -> Self {
        Self { storage, path: path.to_path_buf(), lock: Mutex::new(None) }
    }
}

impl Storage for LockedStorage {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.storage.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> std::io::Result<usize> {
        self.storage.write_at(offset, buffer)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.storage.sync_data()
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.storage.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> std::io::Result<()> {
        self.storage.allocate(offset, len, how)
    }
    fn len(&self) -> std::io::Result<u64> {
        self.storage.len()
    }
    fn alignment(&self) -> Alignment {
        self.storage.alignment()
    }
    fn next_data(&self, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
        self.storage.next_data(offset)
    }
    fn next_written(&self, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
        self.storage.next_written(offset)
    }
    fn allocated_bytes(&self) -> std::io::Result<u64> {
        self.storage.allocated_bytes()
    }
    fn host_free_bytes(&self) -> std::io::Result<Option<u64>> {
        self.storage.host_free_bytes()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.storage.descriptor()
    }
    fn claim(&self, ownership: Option<Ownership>) -> Result<()> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        match (ownership, lock.as_mut()) {
            (None, _) => *lock = None,
            (Some(wanted), Some(held)) if held.ownership() == wanted => {}
            (Some(Ownership::Reader), Some(held)) => held.weaken()?,
            (Some(wanted), _) => {
                *lock = None;
                *lock = Some(ImageLock::take(&self.storage, &self.path, wanted)?);
            }
        }
        Ok(())
    }
}

/// A folder by its name without links.
pub(super) fn real_path(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|error| file::explain(error, ErrorKind::Open, "find the folder of the disk", path))
}

/// Opens a disk. Fails with [`ErrorKind::InUse`] if somebody else has it.
pub fn open(options: &OpenOptions) -> Result<Opened> {
    open_for_work(options).map(|(opened, _lock)| opened)
}

/// As [`open`]; the lock on the descriptor, which other commands wait for, is the caller's as long as it works.
pub(super) fn open_for_work(options: &OpenOptions) -> Result<(Opened, Option<DescriptorLock>)> {
    let refuse = |message: &str| Err(Error::new(ErrorKind::Parameter, format!("open disk: {message}")));
    let files = match &options.which {
        Which::Path(path) => match place(path)? {
            Place::Bundle(folder) => return open_bundle(&folder, options),
            Place::Image(image) => vec![image],
        },
        Which::Files(files) => files.clone(),
    };
    if options.snapshot.is_some() {
        return refuse("a snapshot is chosen, but only a disk with a descriptor has snapshots");
    }
    if files.is_empty() {
        return refuse("no image is named");
    }
    let mut opening = Opening::new(options);
    for (number, path) in files.iter().enumerate() {
        let access = access(options, number, files.len());
        let storage = FileStorage::open(path, &opening.file_options(access))?;
        opening.add(storage, path, access, number == 0 && options.raw_cluster.is_some())?;
    }
    let opened = opening.finish(options.raw_cluster)?;
    Ok((Opened { chain: opened.0, report: opened.1 }, None))
}

/// Opens the very files behind descriptors that hold them, base first, each with a name for messages: what a server had open
/// that is succeeded. Names and descriptors on disk do not matter; `options.which` and `options.snapshot` are not looked at.
/// With a folder it is synced first: what was answered to a flush relies on the descriptor in it.
pub fn open_held(
    images: &[(PathBuf, BorrowedFd<'_>)],
    folder: Option<&DirectoryFolder>,
    options: &OpenOptions,
) -> Result<Opened> {
    if let Some(folder) = folder.filter(|_| options.access == Access::ReadWrite) {
        let failed =
            |cause| Error::io(ErrorKind::Sync, "open disk: sync its folder", cause).at_path(folder.path());
        folder.sync().map_err(failed)?;
    }
    let mut opening = Opening { is_held: true, ..Opening::new(options) };
    for (number, (path, descriptor)) in images.iter().enumerate() {
        let access = access(options, number, images.len());
        let storage = identity::reopen(*descriptor, access == Access::ReadWrite)
            .and_then(|file| FileStorage::from_file(file, path, &opening.file_options(access)))
            .map_err(|error| file::explain(error, ErrorKind::Open, "open", path))?;
        opening.add(storage, path, access, number == 0 && options.raw_cluster.is_some())?;
    }
    let (chain, report) = opening.finish(options.raw_cluster)?;
    Ok(Opened { chain, report })
}

fn access(options: &OpenOptions, number: usize, count: usize) -> Access {
    if number + 1 == count { options.access } else { Access::ReadOnly }
}

fn open_bundle(path: &Path, options: &OpenOptions) -> Result<(Opened, Option<DescriptorLock>)> {
    // Against a command that is changing the bundle. Readers do without: the descriptor is replaced atomically, and
    // they may not be allowed to write to the folder.
    if options.access == Access::ReadWrite && !options.parents.is_empty() {
        return Err(Error::new(
            ErrorKind::Parameter,
            "open disk: images outside of the bundle are for reading only",
        )
        .at_path(path)
        .advise("open it read-only, or make a disk of its own of it: ploop import --allow-parent DIR"));
    }
    let lock = match options.access {
        Access::ReadWrite => Some(DescriptorLock::take(&path.join(DESCRIPTOR_NAME), options.lock_timeout)?),
        Access::ReadOnly => None,
    };
    if lock.is_some() {
        let bundle = Bundle::open(path)?;
        bundle.settle(path)?;
        return Ok((open_state(&bundle.folder, &bundle.descriptor, path, options)?, lock));
    }
    let outside = !options.parents.is_empty();
    while_it_stands(path, outside, |bundle| open_described(bundle, path, options))
        .map(|opened| (opened, None))
}

/// Opens what a bundle at `path` describes, for reading.
pub(super) fn open_described(bundle: &ReadBundle, path: &Path, options: &OpenOptions) -> Result<Opened> {
    match &bundle.described {
        Described::Whole(descriptor) => open_state(&bundle.folder, descriptor, path, options),
        Described::Split(split) => joined::open(&bundle.folder, split, path, options),
    }
}

/// Opens a state of one chain in `folder`, which is at `path`.
fn open_state(
    folder: &DirectoryFolder,
    descriptor: &DiskDescriptor,
    path: &Path,
    options: &OpenOptions,
) -> Result<Opened> {
    let state = options.snapshot.unwrap_or(descriptor.top_guid());
    let images = descriptor.chain_for(state).map_err(|error| error.at_path(path.join(DESCRIPTOR_NAME)))?;
    check_readable(descriptor, state).map_err(|error| error.at_path(path))?;
    let has_children = descriptor.children(state).next().is_some() || descriptor.has_dead_child(state);
    if options.access == Access::ReadWrite && (state != descriptor.top_guid() || has_children) {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("open disk: the snapshot {state} cannot be opened for writing"),
        )
        .at_path(path)
        .advise("open it read-only, or switch to it first"));
    }
    let raw = descriptor.is_raw();
    let mut opening = Opening::new(options);
    for (number, image) in images.iter().enumerate() {
        let access = access(options, number, images.len());
        let (storage, file) =
            open_image(folder, path, image, &opening.file_options(access), &options.parents)?;
        opening.add(storage, &file, access, number == 0 && raw)?;
    }
    // Before anything is written into one of them.
    let found = opening.disagreements(descriptor, &images)?;
    let (chain, mut report) = opening.finish(raw.then(|| descriptor.cluster_sectors()))?;
    let is_short = found.iter().any(|found| matches!(found, Disagreement::Short { .. }));
    report.warnings.extend(found.iter().map(Disagreement::describe));
    report.disagreements = found.into_iter().filter(|found| !found.is_accepted(options.accepted)).collect();
    report.descriptor = Some(path.join(DESCRIPTOR_NAME));
    report.state = Some(state.to_string());
    report.encryption = descriptor.encryption().map(|encryption| encryption.to_string());
    report.warnings.extend(oddities(descriptor, path));
    let said = descriptor.disk_sectors();
    // A snapshot may be of another size: what its image says.
    if state == descriptor.top_guid() && said != chain.geometry().disk_sectors() && !is_short {
        report.warnings.push(format!(
            "the descriptor says the disk has {said}, its image says {}; the image counts: a resize was probably cut, \
             run it again",
            chain.geometry().disk_sectors()
        ));
    }
    let cluster = u64::from(chain.geometry().cluster_sectors());
    if descriptor.cluster_sectors().0 != cluster {
        report.warnings.push(format!(
            "the descriptor says clusters have {}, its image says {cluster}; the image counts",
            descriptor.cluster_sectors()
        ));
    }
    Ok(Opened { chain, report })
}

/// Refuses to take the bytes of an encrypted disk for its content, which `what` would do.
pub fn refuse_ciphertext(report: &OpenReport, what: &str) -> Result<()> {
    let Some(encryption) = &report.encryption else { return Ok(()) };
    Err(ciphertext_refused(what, encryption).at_path(report.descriptor.clone().unwrap_or_default()))
}

/// That refusal.
pub fn ciphertext_refused(what: &str, encryption: &str) -> Error {
    let message = format!("{what}: the disk is {encryption}; what would come out is ciphertext");
    Error::new(ErrorKind::Parameter, message).advise(
        "decrypt it in the program it belongs to, or copy its content out of there; --ciphertext takes the bytes as they \
         are, which only the key in the descriptor can make readable: keep that",
    )
}

/// What is odd about a descriptor at `path` though the disk can be opened, in words.
pub fn oddities(descriptor: &DiskDescriptor, path: &Path) -> Vec<String> {
    let mut said = descriptor.notes().to_vec();
    said.extend(descriptor.dead_words());
    if let Some(encryption) = descriptor.encryption() {
        said.push(format!("the disk is {encryption}: what is read here is ciphertext"));
    }
    if let Some(machine) = suspended(descriptor, path) {
        said.push(format!(
            "a suspended machine ({machine}) goes on from this disk: its file systems are as in use, and what is written \
             to the disk now damages them when it is resumed"
        ));
    }
    said
}

/// What says that a machine was suspended while it used the disk in the folder `path`.
fn suspended(descriptor: &DiskDescriptor, path: &Path) -> Option<String> {
    if descriptor.is_suspended() {
        return Some("<SuspendState> in the descriptor".to_owned());
    }
    // Its memory lies in the folder of the machine, around the bundle.
    let real = std::fs::canonicalize(path).ok()?;
    let machine = real
        .parent()
        .filter(|parent| parent.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("pvm")))?;
    let names = std::fs::read_dir(machine)
        .ok()?
        .take(10_000)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut memory: Vec<String> =
        names.filter(|name| name.ends_with(".mem") || name.ends_with(".sav")).collect();
    memory.sort();
    memory.first().map(|name| format!("{name:?} in its folder"))
}

/// Refuses a state that a merge which was cut has left half changed. Those that stand on it are whole.
pub(super) fn check_readable(descriptor: &DiskDescriptor, state: Guid) -> Result<()> {
    match descriptor.shot(state).and_then(|shot| shot.transition()) {
        Some(transition) if !transition.is_readable() => Err(Error::new(
            ErrorKind::Busy,
            format!("open disk: the snapshot {state} is being merged and is no state of the disk any more"),
        )
        .advise("run the merge again to finish it; then use the state that stood on this snapshot")),
        _ => Ok(()),
    }
}

/// The files of a disk, locked for an operation that changes them.
pub(super) struct Locked {
    /// Folder and descriptor, if the disk has one.
    pub(super) bundle: Option<Bundle>,
    /// The path of that folder.
    pub(super) folder_path: PathBuf,
    /// The images of the current state, base first: the top for writing, the others for reading.
    pub(super) sources: Vec<Source>,
    /// Released with this.
    _lock: Option<DescriptorLock>,
}

/// Locks the current state of a disk for an operation that changes it, and opens its files. The options' access is that
/// to the top.
pub(super) fn lock(options: &OpenOptions) -> Result<Locked> {
    let files = match &options.which {
        Which::Path(path) => match place(path)? {
            Place::Bundle(folder) => return lock_bundle(folder, options),
            Place::Image(image) => vec![image],
        },
        Which::Files(files) => files.clone(),
    };
    let mut opening = Opening::new(options);
    for (number, path) in files.iter().enumerate() {
        let access = access(options, number, files.len());
        let storage = FileStorage::open(path, &opening.file_options(access))?;
        opening.add(storage, path, access, number == 0 && options.raw_cluster.is_some())?;
    }
    Ok(Locked { bundle: None, folder_path: PathBuf::new(), sources: opening.sources, _lock: None })
}

fn lock_bundle(path: PathBuf, options: &OpenOptions) -> Result<Locked> {
    let lock = DescriptorLock::take(&path.join(DESCRIPTOR_NAME), options.lock_timeout)?;
    let bundle = Bundle::open(&path)?;
    if options.access == Access::ReadWrite {
        bundle.settle(&path)?;
    }
    let images = bundle
        .descriptor
        .chain_for(bundle.descriptor.top_guid())
        .map_err(|error| error.at_path(path.join(DESCRIPTOR_NAME)))?;
    let mut opening = Opening::new(options);
    for (number, image) in images.iter().enumerate() {
        let access = access(options, number, images.len());
        let storage = bundle.open_image(image, &opening.file_options(access))?;
        let raw = number == 0 && bundle.descriptor.is_raw();
        opening.add(storage, &path.join(image.file()), access, raw)?;
    }
    opening.disagreements(&bundle.descriptor, &images)?;
    let sources = opening.sources;
    Ok(Locked { bundle: Some(bundle), folder_path: path, sources, _lock: Some(lock) })
}

/// Files on their way to becoming a chain.
struct Opening<'a> {
    options: &'a OpenOptions,
    sources: Vec<Source>,
    seen: BTreeSet<(u64, u64)>,
    direct: Vec<bool>,
    /// Somebody had these very files open before.
    is_held: bool,
}

impl<'a> Opening<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        Self { options, sources: Vec::new(), seen: BTreeSet::new(), direct: Vec::new(), is_held: false }
    }

    /// Through the page cache at first: what may be asked of the file is known only once its header is read.
    fn file_options(&self, access: Access) -> file::OpenOptions {
        let options = file::OpenOptions::new(access);
        if self.options.block_device { options.or_block_device() } else { options }
    }

    fn add(&mut self, storage: FileStorage, path: &Path, access: Access, raw: bool) -> Result<()> {
        let explain = |error| file::explain(error, ErrorKind::Open, "open", path);
        if !self.seen.insert(storage.identity().map_err(explain)?) {
            return Err(Error::new(
                ErrorKind::Descriptor,
                "open disk: the same file occurs twice in the chain",
            )
            .at_path(path));
        }
        let ownership = match access {
            Access::ReadWrite => Ownership::Writer,
            Access::ReadOnly => Ownership::Reader,
        };
        let lock = match (self.options.unlocked, access) {
            (true, Access::ReadOnly) => None,
            _ if self.is_held => Some(ImageLock::take_again(&storage, path, ownership)?),
            _ => Some(ImageLock::take(&storage, path, ownership)?),
        };
        let storage = match self.options.caching {
            Caching::Cached => storage,
            Caching::Direct => self.past_the_cache(storage, path, access, raw)?,
        };
        self.direct.push(storage.is_direct());
        let storage = match lock {
            Some(lock) => LockedStorage::new(storage, path, lock),
            None => LockedStorage::unlocked(storage, path),
        };
        let storage = Latched::new(storage);
        self.sources.push(Source { name: path.to_path_buf(), storage: Arc::new(storage), raw });
        Ok(())
    }

    /// What contradicts the descriptor in the files that were added, `images`. For writing it is refused unless it is
    /// accepted.
    fn disagreements(
        &self,
        descriptor: &DiskDescriptor,
        images: &[&crate::format::Image],
    ) -> Result<Vec<Disagreement>> {
        let mut found = Vec::new();
        for (image, source) in images.iter().zip(&self.sources) {
            if source.raw || image.guid() == descriptor.top_guid() {
                let looked = agreement::look(descriptor, image, &source.storage);
                found.extend(looked.map_err(|error| error.at_path(&source.name))?);
            }
        }
        let refused = found.iter().find(|found| !found.is_accepted(self.options.accepted));
        match refused {
            Some(found) if self.options.access == Access::ReadWrite => Err(found.failure()),
            _ => Ok(found),
        }
    }

    /// The same file past the page cache, if every cluster of it then keeps the alignment; else as it was.
    fn past_the_cache(
        &self,
        storage: FileStorage,
        path: &Path,
        access: Access,
        raw: bool,
    ) -> Result<FileStorage> {
        let explain = |error| file::explain(error, ErrorKind::Open, "open", path);
        let probed = if raw { None } else { Some(probe(&storage).map_err(|error| error.at_path(path))?) };
        let places = match &probed {
            Some(Probe::Image(header)) => {
                let geometry = header.geometry();
                [geometry.cluster_bytes(), geometry.phase_bytes()]
            }
            Some(Probe::NotAnImage) => {
                return Err(Error::new(ErrorKind::Corrupt, "open disk: this is not a ploop image")
                    .at_path(path)
                    .advise("if it is a raw disk, say so: its descriptor, or an option, must name it raw"));
            }
            None => [storage.len().map_err(explain)?, 0],
        };
        // The duplicate shares the open file and with it the lock, which a second opening would not.
        let again = |options: &file::OpenOptions| {
            let file = File::from(sys::duplicate(&storage)?);
            FileStorage::from_file(file, path, options)
        };
        let options = self.file_options(access);
        let direct = again(&options.direct()).map_err(explain)?;
        let unit = u64::from(direct.alignment().offset);
        if direct.is_direct() && places.iter().all(|place| place.is_multiple_of(unit)) {
            return Ok(direct);
        }
        drop(direct);
        again(&options).map_err(explain)
    }

    fn finish(self, raw_cluster: Option<Sectors>) -> Result<(Arc<Chain>, OpenReport)> {
        let images = self.sources.iter().map(|source| source.name.clone()).collect();
        let chain_options = ChainOptions {
            access: self.options.access,
            raw_cluster,
            accept_in_use: self.options.accept_in_use,
        };
        let chain = Chain::open(self.sources, &chain_options)?;
        let report = OpenReport {
            descriptor: None,
            images,
            state: None,
            disk_bytes: chain.geometry().disk_bytes(),
            cluster_bytes: chain.geometry().cluster_bytes(),
            writable: self.options.access == Access::ReadWrite,
            direct: self.direct,
            was_in_use: chain.repairs().was_in_use,
            encryption: None,
            warnings: repairs(chain.repairs()),
            disagreements: Vec::new(),
        };
        Ok((chain, report))
    }
}

/// Opens one image of a bundle in `folder` (which is at `path`), locked, past the page cache where that is wanted and its
/// geometry allows it.
pub(super) fn open_locked(
    folder: &DirectoryFolder,
    path: &Path,
    file: &str,
    (access, raw, caching): (Access, bool, Caching),
) -> Result<Arc<dyn Storage>> {
    let options = OpenOptions { caching, ..OpenOptions::new(path, access) };
    let mut opening = Opening::new(&options);
    let storage = match file.split_once('/') {
        Some((inner, name)) => folder.open_folder(inner)?.open_file(name, &opening.file_options(access))?,
        None => folder.open_file(file, &opening.file_options(access))?,
    };
    opening.add(storage, &path.join(file), access, raw)?;
    opening
        .sources
        .pop()
        .map(|source| source.storage)
        .ok_or_else(|| Error::new(ErrorKind::Open, "open image: it was not opened"))
}

/// What opening found and repaired, in words.
fn repairs(found: &RepairSummary) -> Vec<String> {
    let done = if found.written { "" } else { " (only as seen from here; nothing was written)" };
    let mut said = Vec::new();
    let mut say = |applies: bool, what: String| {
        if applies {
            said.push(what);
        }
    };
    say(found.was_in_use, "the image was not closed by its last writer".to_owned());
    say(
        found.entries_cleared > 0,
        format!("{} entries past the end of the file were cleared{done}", found.entries_cleared),
    );
    say(
        found.bytes_extended > 0,
        format!("the file was extended by {} bytes to hold its last cluster{done}", found.bytes_extended),
    );
    say(
        found.tail_bytes_cut > 0,
        format!("{} bytes of unused tail were cut off{done}", found.tail_bytes_cut),
    );
    say(
        found.extension_dropped,
        format!("the format extension and any dirty bitmap in it were dropped{done}"),
    );
    if let Some(mark) = found.foreign_mark {
        say(true, format!("the in-use mark {mark:#010x} is unknown and was taken as closed"));
    }
    for delta in &found.stale_marks {
        say(true, format!("image {delta} below the top has an in-use mark, which means nothing there"));
    }
    say(
        found.entries_salvaged_without > 0,
        format!("{} damaged entries read as not allocated", found.entries_salvaged_without),
    );
    said
}

#[cfg(test)]
mod tests;
