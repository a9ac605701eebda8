//! Where a copy goes to: something new, which gets its final name only when all of it is proven.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statvfs::fstatvfs;
use ploop_core::device::{Client, Disk, DiskOptions, Op};
use ploop_core::format::{
    self, Chain, ChainOptions, DESCRIPTOR_NAME, DiskDescriptor, Geometry, InUse, Mapping, Mode, Probe,
    Version,
};
use ploop_core::io::file::{self, Caching, DirectoryFolder, FileStorage};
use ploop_core::io::lock::{ImageLock, Ownership};
use ploop_core::io::{Access, Folder, IoBuf, Storage, StorageExt, pool};
use ploop_core::ops::open::{OpenOptions, Which, open};
use ploop_core::units::{GuestOffset, Sectors};
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::source::{DiskReader, QUEUE_DEPTH, Reader};
use crate::stats::hexadecimal;
use crate::target_chain::ChainTarget;
use crate::target_placing::{self as placing, INCOMING};
use crate::wire::{Delta, Hello, ImageKind};
use ploop_core::io::temporary::stem;

/// A copy that is being made. It reads as zeros at first. Used by one thread, its readers by others.
///
/// Writes between two [`sync`](Self::sync)s do not overlap; the receiver finishes all before it lets later ones in.
pub trait Target: Send {
    /// Starts writing `buffer` at guest byte `offset`; `token` comes back when it has been written.
    fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()>;
    /// Makes `extent` read as zeros. May wait.
    fn zero(&mut self, extent: Extent) -> Result<()>;
    /// Waits until one of the writes under way has finished; `None` when none is under way.
    fn finish(&mut self) -> Result<Option<u64>>;
    /// Writes under way.
    fn in_flight(&self) -> usize;
    /// Makes everything written durable; no write is under way.
    fn sync(&mut self) -> Result<()>;
    /// A way to read back what was written, from where it is stored and not from memory.
    fn reader(&self) -> Result<Box<dyn Reader>>;
    /// Of a copy delta by delta: what is written from now on is the content of that delta, which reads as what it stands on
    /// until then.
    fn begin_delta(&mut self, _delta: &Delta) -> Result<()> {
        Err(takes_no_deltas())
    }
    /// The delta is whole and synced: closes it; it is only read from now on. Its readers are gone.
    fn end_delta(&mut self) -> Result<()> {
        Err(takes_no_deltas())
    }
    /// Closes the copy and puts it under its final name, durably. All readers are gone. A failure leaves nothing
    /// under the final name; [`ErrorKind::OutcomeUnknown`](ploop_core::ErrorKind::OutcomeUnknown) when even that is
    /// uncertain.
    fn commit(&mut self) -> Result<()>;
    /// Removes what there is of the copy. Harmless after `commit` or a second time.
    fn discard(&mut self) -> Result<()>;
}

fn takes_no_deltas() -> Error {
    Error::new(ErrorKind::Protocol, "a delta came to a copy of the content alone")
}

/// The file of the original's one-way stream: an image file as it is, written at file offsets.
pub trait FileTarget: Send {
    /// Writes at a byte offset of the file.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Makes what was written durable.
    fn sync(&mut self) -> Result<()>;
    /// Sees whether the file is a whole image, closed cleanly, and puts it under its final name, durably.
    fn commit(&mut self) -> Result<()>;
    /// Removes what there is of the file. Harmless after `commit` or a second time.
    fn discard(&mut self) -> Result<()>;
}

/// What makes a target once the stream has said what is coming. The name is the operator's, never the stream's.
pub trait Destination {
    /// A new copy of the announced disk.
    fn create(&mut self, hello: &Hello) -> Result<Box<dyn Target>>;
    /// A new file for the original's one-way stream.
    fn create_file(&mut self) -> Result<Box<dyn FileTarget>>;
}

/// The cluster size when the source has none that an image can have.
const CLUSTER_SECTORS_DEFAULT: u32 = 2048;
/// The largest table that a stream may make us keep in memory: 64 TiB in clusters of 1 MiB.
pub(crate) const TABLE_BYTES_MAX: u64 = 256 << 20;

/// How the copy shall be stored; as the source where nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageOptions {
    /// Kind of image.
    pub image: Option<ImageKind>,
    /// Format version, 1 or 2.
    pub version: Option<u8>,
    /// Cluster size in sectors: a power of two from 64 to 131072.
    pub cluster_sectors: Option<u32>,
}

/// A new image file with its descriptor.
///
/// The copy grows in `NAME.incoming-<copy id>` beside its final name (mode 0600). When it is committed it is closed
/// cleanly and synced, renamed to a name that must still be free, and the folder is synced; last comes the
/// `DiskDescriptor.xml`. One that is there already is kept if it describes exactly this file and geometry.
///
/// The folder is looked at when the stream has begun, so that the sender of a two-way copy can be told what is wrong.
pub struct ImageDestination {
    path: PathBuf,
    name: String,
    options: ImageOptions,
}

/// A folder and a name in it.
pub(crate) struct Place {
    pub(crate) folder: DirectoryFolder,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl ImageDestination {
    /// A copy under the name `path`, which must be free when the copy begins and when it is put in place
    /// ([`ErrorKind::Create`]). Fails only when `path` cannot be the name of an image.
    pub fn new(path: &Path, options: ImageOptions) -> Result<Self> {
        let wrong =
            |what: &str| Error::new(ErrorKind::Parameter, format!("receive a copy: {what}")).at_path(path);
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| wrong("this is not the name of a file"))?;
        file::component(name).map_err(|error| wrong("this is not the name of a file").caused_by(error))?;
        if name == DESCRIPTOR_NAME {
            return Err(wrong("this name is the descriptor's").advise("name the image file"));
        }
        Ok(Self { path: path.to_path_buf(), name: name.to_owned(), options })
    }

    fn place(&self) -> Result<Place> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = DirectoryFolder::open(folder.unwrap_or(Path::new(".")))?;
        let place = Place { folder, name: self.name.clone(), path: self.path.clone() };
        placing::recover(&place.folder, &place.path, &place.name)?;
        place.must_be_free()?;
        Ok(place)
    }

    /// What the new image will be like.
    fn geometry(&self, hello: &Hello) -> Result<(Geometry, ImageKind)> {
        let image = self.options.image.unwrap_or(hello.image);
        let version = match self.options.version.unwrap_or(hello.version) {
            1 => Version::V1,
            2 => Version::V2,
            other => {
                let message = format!("format version {other}: there are 1 and 2");
                return Err(Error::new(ErrorKind::Parameter, message));
            }
        };
        let sizes = |version: Version, cluster_sectors: u32| {
            let cluster = Sectors(u64::from(cluster_sectors));
            let sectors = Sectors::covering(hello.disk_bytes);
            match image {
                ImageKind::Raw => Geometry::raw(cluster, hello.disk_bytes),
                // A disk may end inside its last cluster.
                _ => Geometry::exact(version, cluster, sectors),
            }
        };
        let wanted = self.options.cluster_sectors;
        let geometry = match sizes(version, wanted.unwrap_or(hello.cluster_sectors)) {
            // The source's geometry need not be one that is made today.
            Err(_) if wanted.is_none() => {
                sizes(version, CLUSTER_SECTORS_DEFAULT).or_else(|error| match self.options.version {
                    None => sizes(Version::V2, CLUSTER_SECTORS_DEFAULT),
                    Some(_) => Err(error),
                })
            }
            geometry => geometry,
        };
        let geometry = geometry.map_err(|error| error.at_path(&self.path))?;
        if geometry.table_bytes() > TABLE_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!(
                    "receive a copy: {} bytes in clusters of {} sectors need a table of more than {TABLE_BYTES_MAX} bytes",
                    geometry.disk_bytes(),
                    geometry.cluster_sectors()
                ),
            )
            .at_path(&self.path)
            .advise("choose larger clusters (-b)"));
        }
        Ok((geometry, image))
    }
}

impl Place {
    pub(crate) fn failed(&self, kind: ErrorKind, operation: &str, error: io::Error) -> Error {
        file::explain(error, kind, operation, &self.path)
    }

    fn must_be_free(&self) -> Result<()> {
        let exists = self.folder.exists(&self.name);
        if exists.map_err(|error| self.failed(ErrorKind::Stat, "look for the file", error))? {
            return Err(Error::new(ErrorKind::Create, "receive a copy: the file exists")
                .at_path(&self.path)
                .advise("choose another name, or remove the file if it is not needed"));
        }
        Ok(())
    }

    /// What failed or killed copies to this name have left. A copy that is still running holds its lock.
    fn remove_left_overs(&self) -> Result<()> {
        placing::remove_left_overs(&self.folder, &self.path, &self.name)
    }

    pub(crate) fn unlink(&self, name: &str) -> Result<()> {
        match self.folder.unlink(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = self.path.with_file_name(name);
                Err(file::explain(error, ErrorKind::Unlink, "remove the unfinished copy", &path)
                    .advise(format!("remove {} by hand", path.display())))
            }
            _ => Ok(()),
        }
    }

    /// As [`placing::put_in_place`], of the copy with that number.
    pub(crate) fn put_in_place(
        &self,
        files: &[(&str, &str)],
        descriptor: Option<&DiskDescriptor>,
        copy_id: &str,
    ) -> Result<()> {
        let plan = placing::plan_name(&self.name, copy_id);
        placing::put_in_place(&self.folder, &self.path, (files, descriptor), &plan)
    }

    /// The descriptor that the copy will need: none if one is there that describes it exactly.
    fn descriptor(&self, geometry: &Geometry, image: ImageKind) -> Result<Option<DiskDescriptor>> {
        let is_preallocated = image == ImageKind::Preallocated;
        let cluster = Sectors(u64::from(geometry.cluster_sectors()));
        let wanted = if image == ImageKind::Raw {
            DiskDescriptor::new_single(&self.name, Mode::Raw, geometry.disk_sectors(), cluster)
        } else {
            DiskDescriptor::for_image(&self.name, geometry, is_preallocated)
        };
        let wanted = wanted.map_err(|error| error.at_path(&self.path))?;
        let exists = self.folder.exists(DESCRIPTOR_NAME);
        if !exists.map_err(|error| self.failed(ErrorKind::Stat, "look for a descriptor", error))? {
            return Ok(Some(wanted));
        }
        let path = self.folder.path().join(DESCRIPTOR_NAME);
        let other = |found: String| {
            Error::new(ErrorKind::Create, format!("receive a copy: the folder has a descriptor, and {found}"))
                .at_path(&path)
                .advise("choose an empty folder: one folder holds one disk")
        };
        let found = DiskDescriptor::load(&self.folder, Some(self.folder.path()))
            .map_err(|error| other(format!("it cannot be read: {error}")))?;
        let same = found.disk_sectors() == wanted.disk_sectors()
            && found.cluster_sectors() == wanted.cluster_sectors()
            && found.is_raw() == wanted.is_raw()
            && !found.has_parent_volume()
            && matches!(found.images(), [image] if image.file() == self.name)
            && found.shots().len() == 1;
        if same { Ok(None) } else { Err(other("it describes another disk".into())) }
    }

    /// Refuses a copy that clearly does not fit. Where nothing is clear the copy begins, and fails when it must.
    fn check_space(&self, hello: &Hello, image: ImageKind) -> Result<()> {
        let needed = match image {
            ImageKind::Preallocated => hello.disk_bytes,
            // What is counted as data may turn out to be zeros.
            ImageKind::Expanded | ImageKind::Raw => hello.data_bytes - hello.data_bytes / 8,
        };
        let Ok(space) = fstatvfs(&self.folder) else { return Ok(()) };
        let available = space.blocks_available().saturating_mul(space.fragment_size());
        if needed <= available {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Allocate,
            format!("receive a copy: it needs about {needed} bytes and the host has {available}"),
        )
        .at_path(&self.path)
        .advise("free space on the host's file system, or receive onto another one"))
    }
}

impl ImageDestination {
    /// A copy delta by delta: as the source is, in a folder without another disk.
    fn create_chain(&self, hello: &Hello) -> Result<Box<dyn Target>> {
        if self.options != ImageOptions::default() {
            return Err(Error::new(
                ErrorKind::Parameter,
                "receive a copy: all snapshots of a disk are received as they are at the source",
            )
            .at_path(&self.path)
            .advise("leave out format, cluster size and version, or send without --chain"));
        }
        let place = self.place()?;
        let exists = place.folder.exists(DESCRIPTOR_NAME);
        if exists.map_err(|error| place.failed(ErrorKind::Stat, "look for a descriptor", error))? {
            return Err(Error::new(
                ErrorKind::Create,
                "receive a copy: the folder has a descriptor; all snapshots need an empty folder",
            )
            .at_path(place.folder.path().join(DESCRIPTOR_NAME))
            .advise("choose an empty folder: one folder holds one disk"));
        }
        place.check_space(hello, ImageKind::Expanded)?;
        place.remove_left_overs()?;
        Ok(Box::new(ChainTarget::new(place, hello)))
    }
}

impl Destination for ImageDestination {
    fn create(&mut self, hello: &Hello) -> Result<Box<dyn Target>> {
        if hello.deltas > 0 {
            return self.create_chain(hello);
        }
        let (geometry, image) = self.geometry(hello)?;
        let place = self.place()?;
        let descriptor = place.descriptor(&geometry, image)?;
        place.check_space(hello, image)?;
        place.remove_left_overs()?;
        let copy_id = hexadecimal(&hello.copy_id);
        let incoming = format!("{}{INCOMING}{copy_id}", stem(&place.name));
        let storage = place.folder.create_file(&incoming, Caching::Direct)?;
        // From here on it is ours to remove.
        let mut image_disk = OpenImage::new(place.path.with_file_name(&incoming), image);
        let opened = image_disk.open(&storage, &geometry, image, (&[], false));
        let mut target = ImageTarget { place, copy_id, incoming, descriptor, image: image_disk };
        match opened {
            Ok(()) => Ok(Box::new(target)),
            Err(error) => {
                // The first failure says what is wrong; a file that stays is removed by the next attempt.
                let _ = target.discard();
                Err(error)
            }
        }
    }

    fn create_file(&mut self) -> Result<Box<dyn FileTarget>> {
        let place = self.place()?;
        place.remove_left_overs()?;
        let incoming = format!("{}{INCOMING}{}", stem(&place.name), uuid::Uuid::new_v4().simple());
        let storage = place.folder.create_file(&incoming, Caching::Cached)?;
        let lock = ImageLock::take(&storage, &place.path, Ownership::Writer)?;
        Ok(Box::new(ImageFile { place, incoming, storage: Some((Arc::new(storage), lock)) }))
    }
}

/// An image that is being written, on the same layers that will serve it.
pub(crate) struct OpenImage {
    path: PathBuf,
    /// Every cluster keeps its place, also when it is zeroed.
    is_preallocated: bool,
    disk: Option<Arc<Disk>>,
    client: Option<Client>,
    waiting: HashMap<u64, (u64, Extent)>,
}

impl OpenImage {
    /// Nothing yet: the file is at `path`.
    pub(crate) fn new(path: PathBuf, image: ImageKind) -> Self {
        let is_preallocated = image == ImageKind::Preallocated;
        Self { path, is_preallocated, disk: None, client: None, waiting: HashMap::new() }
    }

    /// Makes an image of the empty file `storage` and opens it, on the closed images `below`, base first.
    pub(crate) fn open(
        &mut self,
        storage: &FileStorage,
        geometry: &Geometry,
        image: ImageKind,
        (below, raw_base): (&[PathBuf], bool),
    ) -> Result<()> {
        if image == ImageKind::Raw {
            storage
                .set_len(geometry.disk_bytes())
                .map_err(|error| file::explain(error, ErrorKind::Truncate, "extend the copy", &self.path))?;
        } else {
            let options = format::CreateOptions {
                geometry: geometry.clone(),
                preallocated: image == ImageKind::Preallocated,
            };
            format::create_image(storage, &options).map_err(|error| error.at_path(&self.path))?;
        }
        let is_raw = image == ImageKind::Raw || raw_base;
        let raw_cluster = is_raw.then_some(Sectors(u64::from(geometry.cluster_sectors())));
        let files = below.iter().chain([&self.path]).cloned().collect();
        let options = OpenOptions {
            which: Which::Files(files),
            raw_cluster,
            ..OpenOptions::new(&self.path, Access::ReadWrite)
        };
        let disk = Disk::open(open(&options)?.chain, DiskOptions::default())?;
        let queue = pool::best_io_queue(QUEUE_DEPTH)
            .map_err(|error| Error::io(ErrorKind::System, "make a queue to write with", error))?;
        self.client = Some(Client::new(&disk, queue)?);
        self.disk = Some(disk);
        Ok(())
    }

    fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().ok_or_else(closed)
    }

    /// As [`Target::write`].
    pub(crate) fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()> {
        let extent = Extent::between(offset, offset.saturating_add(buffer.len() as u64));
        let id = self.client()?.submit(Op::Write { fua: false }, extent, Some(buffer));
        self.waiting.insert(id, (token, extent));
        Ok(())
    }

    /// As [`Target::zero`].
    pub(crate) fn zero(&mut self, extent: Extent) -> Result<()> {
        let chain = self.disk.as_ref().ok_or_else(closed)?.chain();
        let mut at = extent.start();
        while at < extent.end() {
            // Where there is nothing, zeros are read already.
            let mapping = chain.map(GuestOffset(at), extent.end() - at);
            let run = Extent::between(at, at + mapping.len().max(1));
            if matches!(mapping, Mapping::Data { .. }) {
                let may_unmap = !self.is_preallocated;
                self.client()?.write_zeroes(run, may_unmap)?;
            }
            at = run.end();
        }
        Ok(())
    }

    /// As [`Target::finish`].
    pub(crate) fn finish(&mut self) -> Result<Option<u64>> {
        let Some(done) = self.client()?.next_completion()? else { return Ok(None) };
        let lost = || Error::new(ErrorKind::Write, "a write was lost");
        let (token, extent) = self.waiting.remove(&done.id).ok_or_else(lost)?;
        match done.result {
            Ok(()) => Ok(Some(token)),
            Err(errno) => {
                let cause = io::Error::from_raw_os_error(errno);
                Err(file::explain(cause, ErrorKind::Write, &format!("write {extent}"), &self.path))
            }
        }
    }

    /// As [`Target::in_flight`].
    pub(crate) fn in_flight(&self) -> usize {
        self.client.as_ref().map_or(0, Client::in_flight)
    }

    /// As [`Target::sync`].
    pub(crate) fn sync(&mut self) -> Result<()> {
        let path = self.path.clone();
        self.client()?.flush().map_err(|error| error.at_path(path))
    }

    /// As [`Target::reader`].
    pub(crate) fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(DiskReader::new(self.disk.as_ref().ok_or_else(closed)?)?))
    }

    /// Closes it cleanly and syncs it. Its lock goes with the file that is given back.
    pub(crate) fn close(&mut self) -> Result<Arc<dyn Storage>> {
        self.client = None;
        let disk = self.disk.take().ok_or_else(closed)?;
        disk.close().map_err(|error| error.at_path(&self.path))?;
        let chain = disk.chain();
        Ok(Arc::clone(chain.storage(chain.top())))
    }

    /// Lets go of the file, whatever state it is in.
    pub(crate) fn abandon(&mut self) {
        self.client = None;
        self.disk = None;
    }
}

pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Write, "the copy is closed")
}

/// A copy of the content alone.
struct ImageTarget {
    place: Place,
    copy_id: String,
    incoming: String,
    descriptor: Option<DiskDescriptor>,
    image: OpenImage,
}

impl Target for ImageTarget {
    fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()> {
        self.image.write(token, offset, buffer)
    }

    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.image.zero(extent)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        self.image.finish()
    }

    fn in_flight(&self) -> usize {
        self.image.in_flight()
    }

    fn sync(&mut self) -> Result<()> {
        self.image.sync()
    }

    fn reader(&self) -> Result<Box<dyn Reader>> {
        self.image.reader()
    }

    fn commit(&mut self) -> Result<()> {
        // Closed cleanly and synced before anybody can find it; its lock goes with the disk.
        drop(self.image.close()?);
        let files = [(self.incoming.as_str(), self.place.name.as_str())];
        self.place.put_in_place(&files, self.descriptor.as_ref(), &self.copy_id)
    }

    fn discard(&mut self) -> Result<()> {
        self.image.abandon();
        self.place.unlink(&self.incoming)
    }
}

/// The file of the original's stream.
struct ImageFile {
    place: Place,
    incoming: String,
    storage: Option<(Arc<FileStorage>, ImageLock)>,
}

impl ImageFile {
    fn path(&self) -> PathBuf {
        self.place.path.with_file_name(&self.incoming)
    }

    fn storage(&self) -> Result<&Arc<FileStorage>> {
        self.storage.as_ref().map(|(storage, _)| storage).ok_or_else(closed)
    }

    /// Whether it is a whole image that was closed cleanly, as far as header and table tell.
    fn validate(&self, storage: &Arc<FileStorage>) -> Result<()> {
        let wrong = |found: &str| {
            Error::new(ErrorKind::Corrupt, format!("what was received is no usable image: {found}"))
                .at_path(&self.place.path)
                .advise("see whether the sender ended without an error, and start the copy again")
        };
        match format::probe(storage)? {
            Probe::NotAnImage => return Err(wrong("it has no header")),
            Probe::Image(header) if header.in_use() == InUse::Open => {
                return Err(wrong("it is marked as in use"));
            }
            Probe::Image(_) => {}
        }
        let source = format::Source {
            name: self.place.path.clone(),
            storage: Arc::clone(storage) as Arc<dyn Storage>,
            raw: false,
        };
        let options = ChainOptions { access: Access::ReadOnly, raw_cluster: None, accept_in_use: false };
        Chain::open(vec![source], &options).map(drop)
    }
}

impl FileTarget for ImageFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage()?
            .write_all_at(offset, bytes)
            .map_err(|error| file::explain(error, ErrorKind::Write, "write", &self.path()).at_offset(offset))
    }

    fn sync(&mut self) -> Result<()> {
        self.storage()?
            .sync_data()
            .map_err(|error| file::explain(error, ErrorKind::Sync, "sync", &self.path()))
    }

    fn commit(&mut self) -> Result<()> {
        self.validate(self.storage()?)?;
        // The original's stream says nothing of a descriptor: the image may be the top of a chain whose descriptor
        // travels by itself.
        let files = [(self.incoming.as_str(), self.place.name.as_str())];
        self.place.put_in_place(&files, None, "")?;
        self.storage = None;
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.storage = None;
        self.place.unlink(&self.incoming)
    }
}
