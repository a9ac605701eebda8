//! Real files and folders.
//!
//! [`FileStorage`] reads and writes past the page cache where the file system can (`Caching::Direct`), else through
//! it. Which of the two it is, is found out by trying, once, when the file is opened.
//!
//! [`DirectoryFolder`] reaches its files only relative to its own descriptor and by names of one component, so that
//! neither a link nor a rename of the folder's parents leads out of it (threat rule M4).
//!
//! Neither holds a lock of its own: positional calls of the kernel are safe to share between threads. Who changes a
//! file's *length* from several threads orders that himself.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::{BUFFER_ALIGNMENT, IoBuf};
use super::identity::{self, FileIdentity};
use super::{Access, Alignment, Allocation, Folder, Storage, StorageExt, sys};
use crate::error::{Error, ErrorKind, Result};

/// The most bytes of zeros written in one go where the file system cannot zero a range.
const ZEROS_BYTES_MAX: u64 = 1 << 20;

/// The alignment assumed for unbuffered transfers when the kernel does not tell: a page satisfies every disk.
const ALIGNMENT_UNKNOWN: Alignment = Alignment { offset: 4096, memory: 4096 };

/// Whether transfers pass the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Caching {
    /// Through the page cache: small files, tools.
    #[default]
    Cached,
    /// Past it where the file system allows that, else through it.
    Direct,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// For reading or for writing as well.
    pub access: Access,
    /// Through the page cache or past it.
    pub caching: Caching,
    /// Whether a block device is acceptable; otherwise only a regular file is.
    pub block_device: bool,
}

impl OpenOptions {
    /// A regular file, through the page cache.
    pub fn new(access: Access) -> Self {
        Self { access, caching: Caching::Cached, block_device: false }
    }

    /// Past the page cache where possible.
    #[must_use]
    pub fn direct(mut self) -> Self {
        self.caching = Caching::Direct;
        self
    }

    /// A block device will do as well.
    #[must_use]
    pub fn or_block_device(mut self) -> Self {
        self.block_device = true;
        self
    }
}

/// What kind of failure an I/O error of opening, examining or locking a file is: the one place that decides it.
pub fn classify(error: &io::Error, otherwise: ErrorKind) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::AlreadyExists => ErrorKind::Create,
        io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy | io::ErrorKind::ExecutableFileBusy => {
            ErrorKind::InUse
        }
        io::ErrorKind::OutOfMemory => ErrorKind::Memory,
        _ => otherwise,
    }
}

/// Turns an I/O error into one that names the file, the operation and what to do.
pub fn explain(error: io::Error, otherwise: ErrorKind, operation: &str, path: &Path) -> Error {
    host_trouble(otherwise, operation, error).at_path(path)
}

/// Turns an I/O error into one that names the operation and what to do about the host: it says nothing about the bytes of an
/// image.
pub fn host_trouble(otherwise: ErrorKind, operation: &str, error: io::Error) -> Error {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => Some("check the spelling of the path"),
        io::ErrorKind::PermissionDenied => Some("check the owner and mode of the file and of its folders"),
        io::ErrorKind::AlreadyExists => Some("choose another name, or remove the file if it is not needed"),
        io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy => {
            Some("close whatever else uses it, then try again")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("free space on the host's file system")
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            Some("open it for reading, or remount its file system for writing")
        }
        _ => None,
    };
    let advice = match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => {
            Some("raise the limit of open files (`ulimit -n`), then try again")
        }
        Some(libc::ENAMETOOLONG) => Some("give the file a shorter name"),
        Some(libc::EIO) => {
            Some("the host's storage fails (see dmesg): copy what can still be read, then replace it")
        }
        Some(libc::ESTALE | libc::ENOTCONN | libc::ETIMEDOUT) => {
            Some("its network file system does not answer: mount it anew, then try again")
        }
        _ => advice,
    };
    let explained = Error::io(classify(&error, otherwise), operation, error);
    match advice {
        Some(advice) => explained.advise(advice),
        None => explained,
    }
}

/// A regular file or block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    alignment: Alignment,
    is_direct: bool,
    is_block_device: bool,
    /// Whether its file system is believed when it says that something is a hole.
    tells_holes: bool,
    /// What the file system has refused once is not asked for again.
    punch_refused: AtomicBool,
    zero_refused: AtomicBool,
}

impl FileStorage {
    /// Opens the existing file `path`.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let opened = fs::OpenOptions::new()
            .read(true)
            .write(options.access == Access::ReadWrite)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .and_then(|file| Self::from_file(file, path, options));
        opened.map_err(|error| explain(error, ErrorKind::Open, "open", path))
    }

    /// Creates the file `path`, which must not exist, with mode 0600.
    pub fn create_exclusive(path: impl AsRef<Path>, caching: Caching) -> Result<Self> {
        let path = path.as_ref();
        let options = OpenOptions { access: Access::ReadWrite, caching, block_device: false };
        let created = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| Self::from_file(file, path, &options));
        created.map_err(|error| explain(error, ErrorKind::Create, "create", path))
    }

    /// Takes over an open file; `path` is only for messages.
    pub fn from_file(file: File, path: impl AsRef<Path>, options: &OpenOptions) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let is_block_device = kind.is_block_device();
        if !(kind.is_file() || is_block_device && options.block_device) {
            let found = if is_block_device { "a block device, not a file" } else { "not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, found));
        }
        let alignment = match options.caching {
            Caching::Direct => probe_direct(&file)?,
            Caching::Cached => None,
        };
        sys::set_direct(file.as_fd(), alignment.is_some())?;
        let tells_holes = sys::tells_holes(file.as_fd());
        Ok(Self {
            tells_holes,
            file,
            path: path.as_ref().to_path_buf(),
            alignment: alignment.unwrap_or(Alignment::NONE),
            is_direct: alignment.is_some(),
            is_block_device,
            punch_refused: AtomicBool::new(false),
            zero_refused: AtomicBool::new(false),
        })
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers pass the page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Device and inode number: two storages with equal identity are the same file.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Owner, mode, times and size as the file system has them.
    pub fn metadata(&self) -> io::Result<fs::Metadata> {
        self.file.metadata()
    }

    /// Zeros by whatever the file system can do; the file keeps its length.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.zero_refused.load(Ordering::Relaxed) {
            match sys::zero_range(self.file.as_fd(), offset, len) {
                Err(error) if is_refusal(&error) => self.zero_refused.store(true, Ordering::Relaxed),
                other => return other,
            }
        }
        self.write_zeros(offset, len)
    }

    /// The same open file, and with it the locks on it, with other options.
    pub fn again(&self, options: &OpenOptions) -> io::Result<Self> {
        Self::from_file(File::from(sys::duplicate(self)?), &self.path, options)
    }

    /// Writes zeros up to the end of the file at most. Through the page cache: the ends may be unaligned.
    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?.min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        let unit = u64::from(self.alignment.offset);
        let buffered = if offset.is_multiple_of(unit) && end.is_multiple_of(unit) {
            None
        } else {
            // The same file without unbuffered transfers; errors of the page cache are told to every descriptor.
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
            let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
            let options =
                OpenOptions { access: Access::ReadWrite, caching: Caching::Cached, block_device: true };
            Some(Self::from_file(file, &self.path, &options)?)
        };
        let writer = buffered.as_ref().unwrap_or(self);
        let zeros = IoBuf::try_zeroed(usize::try_from(ZEROS_BYTES_MAX.min(end - offset)).unwrap_or(1 << 20))?;
        let mut at = offset;
        while at < end {
            let piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeros.len());
            writer.write_all_at(at, &zeros.as_slice()[..piece])?;
            at += piece as u64;
        }
        if let Some(buffered) = buffered {
            buffered.sync_data()?;
        }
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if self.is_block_device {
            return if end <= self.len()? { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        }
        match sys::reserve(self.file.as_fd(), offset, len) {
            // Without preallocation the file grows sparse: what is missing later is an error of the write.
            Err(error) if is_refusal(&error) && self.len()? < end => self.set_len(end),
            Err(error) if is_refusal(&error) => Ok(()),
            other => other,
        }
    }
}

/// Whether the file system does not know the operation, as opposed to having failed at it.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

/// The alignment with which this file can really be read past the page cache; `None` when it cannot.
fn probe_direct(file: &File) -> io::Result<Option<Alignment>> {
    let candidates = match sys::direct_alignment(file.as_fd())? {
        Some(None) => return Ok(None),
        Some(Some(told)) => vec![told],
        None if file.metadata()?.len() == 0 => vec![ALIGNMENT_UNKNOWN],
        None => vec![Alignment { offset: 512, memory: 512 }, ALIGNMENT_UNKNOWN],
    };
    if sys::set_direct(file.as_fd(), true).is_err() {
        return Ok(None);
    }
    for alignment in candidates {
        let (Ok(offset), Ok(memory)) = (usize::try_from(alignment.offset), usize::try_from(alignment.memory))
        else {
            continue;
        };
        // Buffers are aligned to a page, and a table sector is rewritten in units of at most one page.
        if offset > BUFFER_ALIGNMENT || memory > BUFFER_ALIGNMENT || !offset.is_power_of_two() {
            continue;
        }
        let mut trial = IoBuf::try_zeroed(offset)?;
        match sys::read_at(file.as_fd(), 0, trial.as_mut_slice()) {
            Ok(_) => return Ok(Some(alignment)),
            Err(error) if is_refusal(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

impl Storage for FileStorage {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        sys::read_at(self.file.as_fd(), offset, buffer)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        sys::write_at(self.file.as_fd(), offset, buffer)
    }

    fn sync_data(&self) -> io::Result<()> {
        sys::sync_data(self.file.as_fd())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        sys::set_len(self.file.as_fd(), len)
    }

    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match how {
            Allocation::Reserve => self.reserve(offset, len),
            Allocation::Zero => self.zero(offset, len),
            Allocation::Punch => {
                if !self.punch_refused.load(Ordering::Relaxed) {
                    match sys::punch_hole(self.file.as_fd(), offset, len) {
                        Err(error) if is_refusal(&error) => self.punch_refused.store(true, Ordering::Relaxed),
                        other => return other,
                    }
                }
                self.zero(offset, len)
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        if self.is_block_device {
            return sys::block_device_bytes(self.file.as_fd());
        }
        Ok(self.file.metadata()?.len())
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = self.len()?;
        if offset >= end {
            return Ok(None);
        }
        if !self.tells_holes {
            return Ok(Some((offset, end)));
        }
        match sys::next_data(self.file.as_fd(), offset) {
            Err(error) if is_refusal(&error) => Ok(Some((offset, end))),
            other => other,
        }
    }

    fn next_written(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = self.len()?;
        if offset >= end {
            return Ok(None);
        }
        if self.is_block_device {
            return Ok(Some((offset, end)));
        }
        match sys::next_written(self.file.as_fd(), offset, end) {
            Err(error) if is_refusal(&error) => Err(io::ErrorKind::Unsupported.into()),
            other => other,
        }
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        if self.is_block_device {
            return self.len();
        }
        // The unit of this field is 512 bytes whatever the file system's block is.
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        if self.is_block_device {
            return Ok(None);
        }
        let space = nix::sys::statvfs::fstatvfs(&self.file)?;
        // Blocks that are kept for the superuser do not count.
        Ok(Some(space.blocks_available().saturating_mul(space.fragment_size())))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A folder of the host, held open by its descriptor.
#[derive(Debug)]
pub struct DirectoryFolder {
    descriptor: OwnedFd,
    path: PathBuf,
    /// How [`Folder`] opens and creates files.
    caching: Caching,
}

impl DirectoryFolder {
    /// Opens the folder `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let descriptor =
            sys::open_folder(path).map_err(|error| explain(error, ErrorKind::Open, "open folder", path))?;
        Ok(Self { descriptor, path: path.to_path_buf(), caching: Caching::Cached })
    }

    /// The very folder behind a descriptor, wherever it is by now; `path` is for messages.
    pub fn held(descriptor: BorrowedFd<'_>, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let descriptor = sys::open_folder(&identity::path_of(descriptor))
            .map_err(|error| explain(error, ErrorKind::Open, "open folder", &path))?;
        Ok(Self { descriptor, path, caching: Caching::Cached })
    }

    /// Which file has the name `file` (`NAME` or `FOLDER/NAME`) in this folder now, following no link.
    pub fn identity_of(&self, file: &str) -> Result<FileIdentity> {
        if let Some((folder, name)) = file.split_once('/') {
            return self.open_folder(folder)?.identity_of(name);
        }
        let examine = || -> io::Result<FileIdentity> {
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            let status = nix::sys::stat::fstatat(self.as_fd(), component(file)?, flags)?;
            Ok(FileIdentity { device: status.st_dev, inode: status.st_ino })
        };
        examine().map_err(|error| explain(error, ErrorKind::Open, "find", &self.path.join(file)))
    }

    /// The same folder; through [`Folder`] its files are then opened and created past the page cache where that is
    /// possible. For images alone: a small file may become longer by what fills its last block.
    #[must_use]
    pub fn direct(mut self) -> Self {
        self.caching = Caching::Direct;
        self
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the folder `name` in this folder, following no link.
    pub fn open_folder(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        let opened = component(name)
            .and_then(|name| sys::open_in(self.as_fd(), name, Access::ReadOnly, false))
            .and_then(|file| {
                if file.metadata()?.is_dir() { Ok(file) } else { Err(io::ErrorKind::NotADirectory.into()) }
            });
        match opened {
            Ok(file) => Ok(Self { descriptor: file.into(), path, caching: self.caching }),
            Err(error) => Err(explain(error, ErrorKind::Open, "open folder", &path)),
        }
    }

    /// Opens the existing file `name` in this folder, following no link.
    pub fn open_file(&self, name: &str, options: &OpenOptions) -> Result<FileStorage> {
        let path = self.path.join(name);
        self.open_unexplained(name, options).map_err(|error| explain(error, ErrorKind::Open, "open", &path))
    }

    /// Creates the file `name`, which must not exist, with mode 0600.
    pub fn create_file(&self, name: &str, caching: Caching) -> Result<FileStorage> {
        let path = self.path.join(name);
        self.create_unexplained(name, caching)
            .map_err(|error| explain(error, ErrorKind::Create, "create", &path))
    }

    fn open_unexplained(&self, name: &str, options: &OpenOptions) -> io::Result<FileStorage> {
        let file = sys::open_in(self.as_fd(), component(name)?, options.access, false)?;
        FileStorage::from_file(file, self.path.join(name), options)
    }

    fn create_unexplained(&self, name: &str, caching: Caching) -> io::Result<FileStorage> {
        let file = sys::open_in(self.as_fd(), component(name)?, Access::ReadWrite, true)?;
        let options = OpenOptions { access: Access::ReadWrite, caching, block_device: false };
        FileStorage::from_file(file, self.path.join(name), &options)
    }
}

impl AsFd for DirectoryFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The real folder of an existing file and its name there, every link on the way followed.
pub fn locate(path: &Path) -> Result<(PathBuf, String)> {
    let real = fs::canonicalize(path).map_err(|error| explain(error, ErrorKind::Open, "open", path))?;
    match (real.parent(), real.file_name().and_then(std::ffi::OsStr::to_str)) {
        (Some(folder), Some(name)) => Ok((folder.to_path_buf(), name.to_owned())),
        _ => Err(Error::new(ErrorKind::Open, "open: the name of the file is not text").at_path(path)),
    }
}

/// `name` if it is one component of a path: not empty, not too long, no separator, no NUL, not `.` or `..`.
pub fn component(name: &str) -> io::Result<&str> {
    let bad = name.is_empty() || name.len() > 255 || name.contains(['/', '\0']) || matches!(name, "." | "..");
    if bad {
        let message = format!("{name:?} is not the name of a file in a folder");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(name)
}

impl Folder for DirectoryFolder {
    fn real_path(&self) -> Option<PathBuf> {
        // Of the folder itself, not of what its name leads to by now.
        identity::current_path(self.as_fd()).or_else(|| std::fs::canonicalize(&self.path).ok())
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        let options = OpenOptions { caching: self.caching, ..OpenOptions::new(access) };
        Ok(Arc::new(self.open_unexplained(name, &options)?))
    }

    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.create_unexplained(name, self.caching)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        sys::rename_in(self.as_fd(), component(from)?, component(to)?, true)
    }

    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
        sys::rename_in(self.as_fd(), component(from)?, component(to)?, false)
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        sys::unlink_in(self.as_fd(), component(name)?)
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        sys::exists_in(self.as_fd(), component(name)?)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        sys::list(self.as_fd())
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        FOLDER_SYNC
            .with(|fault| fault.get().map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))))?;
        sys::sync_all(self.as_fd())
    }

    fn open_folder(&self, name: &str) -> io::Result<Box<dyn Folder>> {
        let file = sys::open_in(self.as_fd(), component(name)?, Access::ReadOnly, false)?;
        if !file.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Box::new(Self { descriptor: file.into(), path: self.path.join(name), caching: self.caching }))
    }
}

#[cfg(test)]
thread_local! {
    /// With what the syncs of folders fail in this thread.
    pub(crate) static FOLDER_SYNC: std::cell::Cell<Option<i32>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::large_stack_arrays, reason = "small numbers of tests")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn storages(folder: &Path) -> Vec<FileStorage> {
        [Caching::Cached, Caching::Direct]
            .into_iter()
            .enumerate()
            .map(|(number, caching)| {
                FileStorage::create_exclusive(folder.join(format!("f{number}")), caching).unwrap()
            })
            .collect()
    }

    #[test]
    fn direct_falls_back_and_both_hold_bytes_at_any_offset() {
        let folder = tempfile::tempdir().unwrap();
        for storage in storages(folder.path()) {
            storage.write_all_at(1000, b"hello").unwrap();
            storage.sync_data().unwrap();
            let mut read = [0xff; 9];
            storage.read_padded_at(998, &mut read).unwrap();
            assert_eq!(&read[..7], b"\0\0hello", "direct: {}", storage.is_direct());
            assert!(storage.len().unwrap() >= 1005);
        }
        // A file system without unbuffered transfers still opens.
        let odd = OpenOptions::new(Access::ReadOnly).direct();
        let process = FileStorage::open("/proc/self/status", &odd).unwrap();
        assert!(!process.is_direct());
    }

    #[test]
    fn punched_and_zeroed_ranges_read_as_zeros_and_keep_the_length() {
        let folder = tempfile::tempdir().unwrap();
        for storage in storages(folder.path()) {
            let data = IoBuf::try_copy_of(&[7; 256 << 10]).unwrap();
            for how in [Allocation::Punch, Allocation::Zero] {
                storage.write_all_at(0, data.as_slice()).unwrap();
                storage.allocate(64 << 10, 128 << 10, how).unwrap();
                // Past the end nothing changes.
                storage.allocate(512 << 10, 64 << 10, how).unwrap();
                assert_eq!(storage.len().unwrap(), 256 << 10);
                let mut read = IoBuf::try_zeroed(256 << 10).unwrap();
                storage.read_exact_at(0, read.as_mut_slice()).unwrap();
                for (at, &byte) in read.as_slice().iter().enumerate() {
                    let hole = (64 << 10..192 << 10).contains(&at);
                    assert_eq!(byte, if hole { 0 } else { 7 }, "{how:?} byte {at}");
                }
            }
            storage.allocate(0, 1 << 20, Allocation::Reserve).unwrap();
            assert_eq!(storage.len().unwrap(), 1 << 20);
        }
    }

    #[test]
    fn zeros_are_written_where_the_file_system_refuses() {
        let folder = tempfile::tempdir().unwrap();
        for storage in storages(folder.path()) {
            storage.punch_refused.store(true, Ordering::Relaxed);
            storage.zero_refused.store(true, Ordering::Relaxed);
            storage.set_len(10_000).unwrap();
            let data = IoBuf::try_copy_of(&[7; 8192]).unwrap();
            storage.write_all_at(0, data.as_slice()).unwrap();
            storage.set_len(8000).unwrap();
            storage.allocate(100, 100_000, Allocation::Punch).unwrap();
            assert_eq!(storage.len().unwrap(), 8000);
            let mut read = vec![1; 8000];
            storage.read_exact_at(0, &mut read).unwrap();
            assert!(read[..100].iter().all(|&byte| byte == 7) && read[100..].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn holes_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        for storage in storages(folder.path()) {
            storage.set_len(4 << 20).unwrap();
            assert_eq!(storage.next_data(0).unwrap(), None);
            let data = IoBuf::try_copy_of(&[7; 65536]).unwrap();
            storage.write_all_at(1 << 20, data.as_slice()).unwrap();
            storage.sync_data().unwrap();
            assert_eq!(storage.next_data(0).unwrap(), Some((1 << 20, (1 << 20) + 65536)));
            assert_eq!(storage.next_data(2 << 20).unwrap(), None);
            assert_eq!(storage.next_data(8 << 20).unwrap(), None);
            assert!(storage.allocated_bytes().unwrap() < 1 << 20);
        }
    }

    #[test]
    fn only_regular_files_open() {
        let error = FileStorage::open("/dev/null", &OpenOptions::new(Access::ReadOnly).or_block_device())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Open);
        let missing = FileStorage::open("/nonexistent/x", &OpenOptions::new(Access::ReadOnly)).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/x") && missing.advice().is_some());
        let folder = tempfile::tempdir().unwrap();
        assert!(FileStorage::open(folder.path(), &OpenOptions::new(Access::ReadOnly)).is_err());
    }

    #[test]
    fn folder_takes_single_names_only() {
        let place = tempfile::tempdir().unwrap();
        let folder = DirectoryFolder::open(place.path()).unwrap();
        for name in ["", ".", "..", "a/b", "/etc/passwd", "a\0b", &"x".repeat(256)] {
            assert_eq!(
                folder.create_exclusive(name).err().unwrap().kind(),
                io::ErrorKind::InvalidInput,
                "{name:?}"
            );
            assert!(folder.open(name, Access::ReadOnly).is_err() && folder.unlink(name).is_err());
        }
        folder.create_exclusive("a").unwrap().write_all_at(0, b"1").unwrap();
        let mode = fs::metadata(place.path().join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(folder.create_exclusive("a").err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        folder.rename("a", "b").unwrap();
        folder.sync().unwrap();
        assert!(folder.exists("b").unwrap() && !folder.exists("a").unwrap());
        std::os::unix::fs::symlink("b", place.path().join("link")).unwrap();
        assert!(folder.open("link", Access::ReadOnly).is_err());
        nix::unistd::mkfifo(&place.path().join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(
            folder.open("pipe", Access::ReadOnly).is_err(),
            "a pipe is refused without waiting for its writer"
        );
        folder.unlink("b").unwrap();
        assert_eq!(folder.open("b", Access::ReadOnly).err().unwrap().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn block_devices_have_a_size() {
        let Ok(device) = std::fs::read_to_string("/proc/self/mountinfo").map(|mounts| {
            mounts
                .lines()
                .find_map(|line| line.split(' ').find(|word| word.starts_with("/dev/")).map(str::to_owned))
        }) else {
            return;
        };
        let options = OpenOptions::new(Access::ReadOnly).direct().or_block_device();
        match device.and_then(|path| FileStorage::open(path, &options).ok()) {
            Some(storage) => assert!(storage.len().unwrap() > 0),
            None => ploop_testing::skip(ploop_testing::Need::Other, "no block device may be opened"),
        }
    }
}
