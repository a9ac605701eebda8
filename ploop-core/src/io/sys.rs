//! The few raw system calls, each behind a safe function.
//!
//! What the `nix` crate wraps is used through it; the rest (statx alignment, freezing, descriptor flags of the
//! I/O flusher) is called here and nowhere else. Every function retries or reports; none panics.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{self, AtFlags, FallocateFlags, FcntlArg, OFlag, OpenHow, RenameFlags, ResolveFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, Whence};

use super::{Access, Alignment};

/// `PR_SET_IO_FLUSHER` of the kernel's prctl.h; the C library's header lacks it in places.
const PR_SET_IO_FLUSHER: c_int = 57;

mod ioctl {
    // The kernel ignores the argument of both freezing calls but declares them with a pointer to an int.
    nix::ioctl_readwrite!(freeze, b'X', 119, i32);
    nix::ioctl_readwrite!(thaw, b'X', 120, i32);
    // Declared in the kernel with `size_t`, filled with 64 bits.
    nix::ioctl_read!(block_device_bytes, 0x12, 114, u64);
    nix::ioctl_readwrite!(trim, b'X', 121, super::TrimRange);
    nix::ioctl_read!(btrfs_info, 0x94, 31, super::BtrfsInfo);
    // Declared in the kernel with the head alone, which the extents follow.
    pub(super) const FIEMAP: nix::libc::Ioctl =
        nix::request_code_readwrite!(b'f', 11, 32) as nix::libc::Ioctl;
}

/// The argument of the kernel's FITRIM, in bytes; the kernel sets `len` to what it has discarded.
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    len_min: u64,
}

/// Has the mounted file system that `folder` is on discard its free space between two bytes of its device, in runs of
/// at least `run_bytes_min`; how many bytes it discarded. `EOPNOTSUPP` where file system or device cannot.
pub fn trim_file_system(folder: BorrowedFd<'_>, start: u64, len: u64, run_bytes_min: u64) -> io::Result<u64> {
    let mut range = TrimRange { start, len, len_min: run_bytes_min };
    // SAFETY: the descriptor is open for the call, and the argument is the structure that FITRIM reads and writes.
    unsafe { ioctl::trim(folder.as_raw_fd(), &raw mut range) }?;
    Ok(range.len)
}

/// Repeats a call that a signal interrupted.
pub fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(value) => return Ok(value),
        }
    }
}

/// A byte offset or length as the kernel takes it; `InvalidInput` past 2^63 - 1.
pub fn kernel_offset(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Reads at byte `offset`; may be short.
pub fn read_at(file: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let offset = kernel_offset(offset)?;
    retry(|| nix::sys::uio::pread(file, buffer, offset))
}

/// Writes at byte `offset`; may be short.
pub fn write_at(file: BorrowedFd<'_>, offset: u64, buffer: &[u8]) -> io::Result<usize> {
    let offset = kernel_offset(offset)?;
    retry(|| nix::sys::uio::pwrite(file, buffer, offset))
}

/// `fdatasync`: content and the length that covers it. Not repeated after an interruption: whether the first call
/// has already reported a lost write cannot be told, so an interruption is a failure (R7).
pub fn sync_data(file: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::fdatasync(file).map_err(io::Error::from)
}

/// `fsync`, for folders.
pub fn sync_all(file: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::fsync(file).map_err(io::Error::from)
}

/// Writes everything the file system that holds `file` has cached.
pub fn sync_file_system(file: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::syncfs(file).map_err(io::Error::from)
}

/// Cuts or extends a file.
pub fn set_len(file: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let len = kernel_offset(len)?;
    retry(|| nix::unistd::ftruncate(file, len))
}

/// Reserves blocks and extends the file where needed.
pub fn reserve(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::empty(), offset, len)
}

/// Makes a range read as zeros; the length stays.
pub fn zero_range(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Gives blocks back; the range reads as zeros and the length stays.
pub fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn fallocate(file: BorrowedFd<'_>, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (kernel_offset(offset)?, kernel_offset(len)?);
    retry(|| fcntl::fallocate(file, mode, offset, len))
}

/// The mode argument of `fallocate` for an allocation, for queues that pass it on themselves.
pub(super) fn fallocate_mode(how: super::Allocation) -> i32 {
    match how {
        super::Allocation::Reserve => 0,
        super::Allocation::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        super::Allocation::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

/// The first run of data at or after `offset`; `None` when only holes follow.
pub fn next_data(file: BorrowedFd<'_>, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match nix::unistd::lseek(file, kernel_offset(offset)?, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = match nix::unistd::lseek(file, start, Whence::SeekHole) {
        Ok(end) => end,
        // The file was cut between the two calls.
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let positive = |at: i64| u64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
    Ok(Some((positive(start)?, positive(end)?)))
}

/// Extents asked for at a time.
const EXTENTS: usize = 64;

/// Where a run of a file lies: `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// The argument of FS_IOC_FIEMAP: `struct fiemap`.
#[repr(C)]
struct FileMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FileExtent; EXTENTS],
}

/// Write what is in the cache before answering.
const FIEMAP_FLAG_SYNC: u32 = 0x1;
/// No extent follows this one.
const FIEMAP_EXTENT_LAST: u32 = 0x1;
/// Where it lies is not known, not yet decided, encoded, shared with a block of metadata, or only reserved: `UNKNOWN`,
/// `DELALLOC`, `ENCODED`, `NOT_ALIGNED`, `DATA_INLINE`, `DATA_TAIL`, `UNWRITTEN`.
const FIEMAP_EXTENT_DOUBTFUL: u32 = 0x2 | 0x4 | 0x8 | 0x100 | 0x200 | 0x400 | 0x800;

/// The first run of blocks at or after `offset`, and before `end`, that are surely written; `None` when none follows. An error
/// of the kind "not supported" where the file system does not tell.
pub fn next_written(file: BorrowedFd<'_>, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    let mut at = offset;
    while at < end {
        let mut map = FileMap {
            start: at,
            length: end - at,
            flags: FIEMAP_FLAG_SYNC,
            mapped_extents: 0,
            extent_count: u32::try_from(EXTENTS).unwrap_or(0),
            reserved: 0,
            extents: [FileExtent::default(); EXTENTS],
        };
        // SAFETY: the descriptor is open for the call; the argument is the structure the kernel reads, with room for as many
        // extents as it says, and outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), ioctl::FIEMAP, &raw mut map) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(Errno::ENOTTY | Errno::EBADR | Errno::EOPNOTSUPP) => return Err(Errno::EOPNOTSUPP.into()),
            Err(error) => return Err(error.into()),
        }
        let count = usize::try_from(map.mapped_extents).unwrap_or(EXTENTS).min(EXTENTS);
        for extent in &map.extents[..count] {
            let extent_end = extent.logical.saturating_add(extent.length);
            if extent.flags & FIEMAP_EXTENT_DOUBTFUL == 0 && extent_end > offset && extent.logical < end {
                return Ok(Some((extent.logical.max(offset), extent_end.min(end))));
            }
        }
        match map.extents[..count].last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 => {
                let next = last.logical.saturating_add(last.length);
                // A file system that makes no step would be asked for ever.
                at = if next > at { next } else { end };
            }
            _ => break,
        }
    }
    Ok(None)
}

/// File systems whose answers about holes have been untrue: those that know less than the machine that has the file (NFS, SMB,
/// AFS, 9P, FUSE), and ZFS, which called data just written a hole.
const UNTRUE_ABOUT_HOLES: [i64; 8] =
    [0x6969, 0x517B, 0xFE53_4D42, 0xFF53_4D42, 0x5346_414F, 0x0102_1997, 0x6573_5546, 0x2FC1_2FC1];

/// Whether the file system of `file` is believed when it says that something is a hole.
pub fn tells_holes(file: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|found| !is_untrue(found.filesystem_type().0))
}

/// By the number of a file system, which some machines have signed.
fn is_untrue(number: i64) -> bool {
    UNTRUE_ABOUT_HOLES.contains(&(number & 0xFFFF_FFFF))
}

/// Size of a block device in bytes.
pub fn block_device_bytes(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the call writes one u64 to the pointer it is given, which outlives it.
    unsafe { ioctl::block_device_bytes(device.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// What unbuffered transfers of `file` must keep, if the kernel says so (Linux 6.1): `Some(None)` when the file cannot
/// be read unbuffered at all, `None` when the kernel does not tell.
pub fn direct_alignment(file: BorrowedFd<'_>) -> io::Result<Option<Option<Alignment>>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a terminated empty string, the buffer has the size of the structure the kernel fills.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    match Errno::result(result) {
        Ok(_) => {}
        Err(Errno::ENOSYS | Errno::EINVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // SAFETY: all bits zero are a valid `statx`, and the kernel only wrote integers over them.
    let answer = unsafe { answer.assume_init() };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    if answer.stx_dio_offset_align == 0 || answer.stx_dio_mem_align == 0 {
        return Ok(Some(None));
    }
    Ok(Some(Some(Alignment { offset: answer.stx_dio_offset_align, memory: answer.stx_dio_mem_align })))
}

/// Switches unbuffered transfers of an open file on or off; also ends "do not wait", which only opening needed.
pub fn set_direct(file: BorrowedFd<'_>, direct: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(retry(|| fcntl::fcntl(file, FcntlArg::F_GETFL))?);
    flags.set(OFlag::O_DIRECT, direct);
    flags.remove(OFlag::O_NONBLOCK);
    retry(|| fcntl::fcntl(file, FcntlArg::F_SETFL(flags)))?;
    Ok(())
}

/// Opens a folder by its path.
pub fn open_folder(path: &std::path::Path) -> io::Result<OwnedFd> {
    retry(|| fcntl::open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()))
}

/// Opens `name` in `folder`, following no link of any kind out of it. `create` demands that it does not exist and
/// makes it with mode 0600. A pipe or device does not make this wait.
pub fn open_in(folder: BorrowedFd<'_>, name: &str, access: Access, create: bool) -> io::Result<File> {
    let mut flags = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    flags |= match access {
        Access::ReadOnly => OFlag::O_RDONLY,
        Access::ReadWrite => OFlag::O_RDWR,
    };
    let mut mode = Mode::empty();
    if create {
        flags |= OFlag::O_CREAT | OFlag::O_EXCL;
        mode = Mode::S_IRUSR | Mode::S_IWUSR;
    }
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
    let opened = match fcntl::openat2(folder, name, how) {
        // Kernels before 5.6, and filters that do not know the call.
        Err(Errno::ENOSYS | Errno::EPERM) => retry(|| fcntl::openat(folder, name, flags, mode))?,
        Err(Errno::EINTR | Errno::EAGAIN) => retry(|| fcntl::openat2(folder, name, how))?,
        other => other?,
    };
    Ok(File::from(opened))
}

/// Renames inside one folder; `replace` says whether an existing target is replaced or an error.
pub fn rename_in(folder: BorrowedFd<'_>, from: &str, to: &str, replace: bool) -> io::Result<()> {
    if replace {
        return retry(|| fcntl::renameat(folder, from, folder, to));
    }
    match fcntl::renameat2(folder, from, folder, to, RenameFlags::RENAME_NOREPLACE) {
        // The file system or kernel does not know the flag: a link fails on an existing name just as well.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            retry(|| nix::unistd::linkat(folder, from, folder, to, AtFlags::empty()))?;
            unlink_in(folder, from)
        }
        other => other.map_err(io::Error::from),
    }
}

/// Removes a name that is not a folder.
pub fn unlink_in(folder: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    retry(|| nix::unistd::unlinkat(folder, name, UnlinkatFlags::NoRemoveDir))
}

/// How many names an open file has.
pub fn link_count(file: impl AsFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(file.as_fd())?.st_nlink)
}

/// Gives an open file one more name, in `folder`, on the same file system. The name must be free.
pub fn link_in(file: BorrowedFd<'_>, folder: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // By its descriptor: what was opened and locked is what gets the name, whatever its old name means by now.
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    retry(|| nix::unistd::linkat(fcntl::AT_FDCWD, open.as_str(), folder, name, AtFlags::AT_SYMLINK_FOLLOW))
}

/// Whether `name` exists in `folder`, as whatever it may be.
pub fn exists_in(folder: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    match nix::sys::stat::fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// All names in `folder` that are text.
pub fn list(folder: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    // A description of its own: listing moves the position.
    let own = retry(|| {
        fcntl::openat(folder, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
    })?;
    let mut entries = nix::dir::Dir::from_fd(own)?;
    let mut names = Vec::new();
    for entry in entries.iter() {
        if let Ok(name) = entry?.file_name().to_str()
            && !matches!(name, "." | "..")
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// How a byte-range lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Together with other shared holders.
    Shared,
    /// Alone.
    Exclusive,
    /// Not any more.
    Unlocked,
}

fn byte_lock(mode: LockMode, start: u64, len: u64) -> io::Result<libc::flock> {
    // SAFETY: `flock` is made of integers; all bits zero are valid, and the open-file-description calls demand that
    // `l_pid` is zero.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    let kind: c_int = match mode {
        LockMode::Shared => libc::F_RDLCK,
        LockMode::Exclusive => libc::F_WRLCK,
        LockMode::Unlocked => libc::F_UNLCK,
    };
    lock.l_type = i16::try_from(kind).map_err(|_| io::ErrorKind::InvalidInput)?;
    lock.l_whence = i16::try_from(libc::SEEK_SET).map_err(|_| io::ErrorKind::InvalidInput)?;
    lock.l_start = kernel_offset(start)?;
    lock.l_len = kernel_offset(len)?;
    Ok(lock)
}

/// Takes, changes or releases the lock of this open file description on `len` bytes at `start`, without waiting.
/// `WouldBlock` when another description holds it.
pub fn lock_bytes(file: BorrowedFd<'_>, mode: LockMode, start: u64, len: u64) -> io::Result<()> {
    let lock = byte_lock(mode, start, len)?;
    match retry(|| fcntl::fcntl(file, FcntlArg::F_OFD_SETLK(&lock))) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => Err(error),
    }
}

/// Whether another open file description holds any lock on `len` bytes at `start`.
pub fn is_locked_by_other(file: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<bool> {
    let mut lock = byte_lock(LockMode::Exclusive, start, len)?;
    retry(|| fcntl::fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)))?;
    Ok(c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// A counter that wakes whoever polls it; reads do not wait.
pub fn event_counter() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}

/// Makes an event counter readable.
pub fn raise(event: &EventFd) {
    // It can only be refused when the counter is full, and then it is readable already.
    let _full = event.write(1);
}

/// Resets an event counter; whether it had been raised.
pub fn lower(event: &EventFd) -> bool {
    event.read().is_ok()
}

/// Whether `descriptor` is readable, at its end, or in error right now.
pub fn is_readable(descriptor: BorrowedFd<'_>) -> io::Result<bool> {
    wait_readable(&[descriptor], Some(Duration::ZERO)).map(|ready| ready[0])
}

/// Waits until one of `descriptors` is readable, at its end or in error, at most `timeout`; says which ones are.
pub fn wait_readable(descriptors: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut polled: Vec<PollFd<'_>> =
        descriptors.iter().map(|&descriptor| PollFd::new(descriptor, PollFlags::POLLIN)).collect();
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                // Rounded up: a wait that ends early by a part of a millisecond would become a busy loop.
                let left = deadline.saturating_duration_since(Instant::now());
                let left_ms = left.as_micros().div_ceil(1000).min(3_600_000);
                PollTimeout::try_from(i32::try_from(left_ms).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX)
            }
        };
        match nix::poll::poll(&mut polled, timeout) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() < deadline) => {}
            Ok(_) => return Ok(polled.iter().map(|one| one.any().unwrap_or(true)).collect()),
        }
    }
}

/// A descriptor number that a caller promised to keep open, as a borrowed descriptor.
///
/// Only for `IoQueue::watch`, whose contract is that promise; a wrong number is an error of the poll call, never
/// more, as nothing but polling is done with it.
pub(super) fn promised_open<'a>(descriptor: std::os::fd::RawFd) -> Option<BorrowedFd<'a>> {
    // SAFETY: the number is not -1; the watcher keeps it open while it is watched (contract of `IoQueue::watch`).
    (descriptor >= 0).then(|| unsafe { BorrowedFd::borrow_raw(descriptor) })
}

/// Stops all changes of the file system that holds `folder` until [`thaw_file_system`], and makes what is on it
/// durable. Needs the right to administer the system. `ResourceBusy` when it is frozen already.
pub fn freeze_file_system(folder: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the call takes no argument; the pointer is valid all the same.
    retry(|| unsafe { ioctl::freeze(folder.as_raw_fd(), &raw mut unused) }).map(drop)
}

/// Lets changes of a frozen file system go on. `InvalidInput` when it is not frozen.
pub fn thaw_file_system(folder: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: as for freezing.
    retry(|| unsafe { ioctl::thaw(folder.as_raw_fd(), &raw mut unused) }).map(drop)
}

/// What the kernel says of an open file or a path without asking the server of a network file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Major and minor number of its file system's device.
    pub device: (u64, u64),
    /// Major and minor number of the device that it is a node of; 0, 0 for other files.
    pub node: (u64, u64),
    /// Inode number.
    pub inode: u64,
    /// Type and permissions.
    pub mode: u32,
    /// The mount it was reached through, as the table of mounts numbers it (Linux 5.8); `None` from older kernels.
    pub mount: Option<u64>,
}

/// The status of an open file. Does not wait for a server that is gone.
pub fn file_status(file: BorrowedFd<'_>) -> io::Result<FileStatus> {
    status_with(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
}

/// The status of what `path` leads to.
pub fn path_status(path: &std::path::Path) -> io::Result<FileStatus> {
    let path = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))?;
    status_with(libc::AT_FDCWD, &path, 0)
}

fn status_with(folder: c_int, path: &std::ffi::CStr, flags: c_int) -> io::Result<FileStatus> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let wanted = libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_INO | libc::STATX_MNT_ID;
    let flags = flags | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path is terminated, the buffer has the size of the structure the kernel fills.
    let result = unsafe { libc::statx(folder, path.as_ptr(), flags, wanted, answer.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: all bits zero are a valid `statx`, and the kernel only wrote integers over them.
    let answer = unsafe { answer.assume_init() };
    Ok(FileStatus {
        device: (answer.stx_dev_major.into(), answer.stx_dev_minor.into()),
        node: (answer.stx_rdev_major.into(), answer.stx_rdev_minor.into()),
        inode: answer.stx_ino,
        mode: answer.stx_mode.into(),
        mount: (answer.stx_mask & libc::STATX_MNT_ID != 0).then_some(answer.stx_mnt_id),
    })
}

/// The root of one more mount of a file system that is mounted already, in no namespace: nobody sees it, and it goes
/// with its last descriptor. `kind` and `source` as the table of mounts has them; `read_only` must be as the mounted
/// file system is. Needs the right to administer the system, and Linux 5.2.
pub fn another_mount(kind: &str, source: &std::path::Path, read_only: bool) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const CLOSED_ON_EXEC: libc::c_uint = 1;
    let kind = std::ffi::CString::new(kind)?;
    let source = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(source.as_os_str()))?;
    let owned = |number: libc::c_long| -> io::Result<OwnedFd> {
        let number = c_int::try_from(Errno::result(number)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // SAFETY: the name is terminated and outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOSED_ON_EXEC) })?;
    let none = std::ptr::null::<libc::c_char>();
    let set = |what: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| -> io::Result<()> {
        // SAFETY: key and value are null or terminated, as the command wants them, and outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), what, key, value, 0 as c_int) };
        Ok(Errno::result(result).map(drop)?)
    };
    set(FSCONFIG_SET_STRING, c"source".as_ptr(), source.as_ptr())?;
    if read_only {
        set(FSCONFIG_SET_FLAG, c"ro".as_ptr(), none)?;
    }
    set(FSCONFIG_CMD_CREATE, none, none)?;
    // SAFETY: the call takes a descriptor and two numbers.
    let mount = owned(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOSED_ON_EXEC, 0 as libc::c_uint)
    })?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    retry(|| fcntl::openat(&mount, ".", flags, Mode::empty()))
}

/// The first part of the answer of btrfs about itself; the rest is not looked at.
#[repr(C)]
struct BtrfsInfo {
    device_id_max: u64,
    devices: u64,
    id: [u8; 16],
    rest: [u8; 992],
}

/// The UUID of the btrfs file system that `folder` is on; `ENOTTY` on any other.
pub fn btrfs_id(folder: BorrowedFd<'_>) -> io::Result<[u8; 16]> {
    let mut info = BtrfsInfo { device_id_max: 0, devices: 0, id: [0; 16], rest: [0; 992] };
    // SAFETY: the argument is a live, exclusive structure of the 1024 bytes that the command fills.
    unsafe { ioctl::btrfs_info(folder.as_raw_fd(), &raw mut info) }?;
    Ok(info.id)
}

/// Bytes that were written to a socket and that its peer has not read, with what the kernel needs to hold them.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut unsent: libc::c_int = 0;
    // SAFETY: the call writes one integer, which the pointer is valid for.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) })?;
    Ok(usize::try_from(unsent).unwrap_or(0))
}

/// Tells the kernel that this process serves a device: its memory allocations must not wait for that very device.
/// Inherited by threads and children started later. Needs the right to exceed resource limits.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: this option takes four integers and no pointer.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// A second descriptor of the same open file description, closed on exec.
pub fn duplicate(file: impl AsFd) -> io::Result<OwnedFd> {
    file.as_fd().try_clone_to_owned()
}

/// A second descriptor of one that this process was started with, by its number.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call only looks the number up; one that is not open is refused with `EBADF`.
    let copy = Errno::result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn waiting_ends_after_the_time() {
        let event = event_counter().unwrap();
        let before = Instant::now();
        assert_eq!(wait_readable(&[event.as_fd()], Some(Duration::from_millis(30))).unwrap(), [false]);
        assert!(before.elapsed() >= Duration::from_millis(30));
        raise(&event);
        raise(&event);
        assert_eq!(wait_readable(&[event.as_fd()], None).unwrap(), [true]);
        assert!(lower(&event) && !lower(&event));
    }

    #[test]
    fn folder_calls_do_not_follow_links() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), b"x").unwrap();
        std::os::unix::fs::symlink("secret", folder.path().join("link")).unwrap();
        let open = open_folder(folder.path()).unwrap();
        assert!(open_in(open.as_fd(), "link", Access::ReadOnly, false).is_err());
        assert!(open_in(open.as_fd(), "../etc", Access::ReadOnly, false).is_err());
        assert!(open_in(open.as_fd(), "secret", Access::ReadOnly, false).is_ok());
        assert!(exists_in(open.as_fd(), "link").unwrap());
    }

    #[test]
    fn exclusive_rename_keeps_the_target() {
        let folder = tempfile::tempdir().unwrap();
        let open = open_folder(folder.path()).unwrap();
        for name in ["a", "b"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let error = rename_in(open.as_fd(), "a", "b", false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        rename_in(open.as_fd(), "a", "c", false).unwrap();
        rename_in(open.as_fd(), "c", "b", true).unwrap();
        assert_eq!(std::fs::read(folder.path().join("b")).unwrap(), b"a");
        assert_eq!(list(open.as_fd()).unwrap(), ["b"]);
    }

    #[test]
    fn byte_locks_belong_to_descriptions() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(folder.path().join("file")).unwrap()
        };
        let (one, other) = (open(), open());
        lock_bytes(one.as_fd(), LockMode::Shared, 100, 1).unwrap();
        assert!(is_locked_by_other(other.as_fd(), 100, 1).unwrap());
        assert!(!is_locked_by_other(one.as_fd(), 100, 1).unwrap());
        lock_bytes(other.as_fd(), LockMode::Shared, 100, 1).unwrap();
        let refused = lock_bytes(other.as_fd(), LockMode::Exclusive, 100, 1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(one);
        lock_bytes(other.as_fd(), LockMode::Exclusive, 100, 1).unwrap();
    }

    #[test]
    fn freezing_what_cannot_freeze_is_an_error() {
        let folder = open_folder(std::path::Path::new("/proc")).unwrap();
        assert!(freeze_file_system(folder.as_fd()).is_err());
        assert!(thaw_file_system(folder.as_fd()).is_err());
    }

    #[test]
    fn which_file_systems_are_believed() {
        let place = tempfile::tempdir().unwrap();
        let file = File::create(place.path().join("a")).unwrap();
        let proc = File::open("/proc/self/status").unwrap();
        // Neither is on the list; a file system that is says so by its number.
        assert!(tells_holes(file.as_fd()) && tells_holes(proc.as_fd()));
        assert!(UNTRUE_ABOUT_HOLES.contains(&nix::libc::NFS_SUPER_MAGIC) && is_untrue(0x6573_5546));
        assert!(is_untrue(0x2FC1_2FC1) && is_untrue(0xFF53_4D42) && !is_untrue(0xEF53));
        // As a negative number, where the field of the kernel is a signed one of 32 bits.
        assert!(is_untrue(i64::from(0xFF53_4D42_u32 as i32)));
    }
}
