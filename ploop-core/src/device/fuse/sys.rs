//! System calls of the FUSE file, the loop device and the processes around them. No policy.
//!
//! One of the few files with `unsafe` code; each use says why it is sound.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags};

use super::wire;

/// Opens the FUSE device, close-on-exec and non-blocking.
pub fn open_fuse() -> io::Result<OwnedFd> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/fuse")
        .map(OwnedFd::from)
}

/// Mounts a one-file file system over the empty regular file `target`, served through `fuse`. `source` is shown in
/// the table of mounts and must hold neither comma nor space.
pub fn mount_file(fuse: &OwnedFd, source: &str, target: &Path, read_only: bool) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode=100600,user_id={},group_id={},max_read={}",
        fuse.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid(),
        wire::TRANSFER_BYTES_MAX,
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    Ok(nix::mount::mount(Some(source), target, Some("fuse.ploop"), flags, Some(options.as_str()))?)
}

/// Takes the mount at `target` away; `lazily` also while somebody still has the file open.
pub fn unmount(target: &Path, lazily: bool) -> io::Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if lazily {
        flags |= MntFlags::MNT_DETACH;
    }
    Ok(nix::mount::umount2(target, flags)?)
}

/// The FUSE device as this process reads and writes it.
#[derive(Debug)]
pub struct FuseDevice(File);

impl FuseDevice {
    /// Wraps an open FUSE device.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// A second handle of the same open device (not a clone in the sense of FUSE).
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// The number of the descriptor, to be watched.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Reads one request: its first bytes into `head`, what follows into `body`, and what that cannot hold into `rest`;
    /// bytes read. `WouldBlock` when there is none, error number ENODEV after the mount has gone.
    pub fn read_request(&self, head: &mut [u8], body: &mut [u8], rest: &mut [u8]) -> io::Result<usize> {
        let mut parts = [head, body, rest].map(IoSliceMut::new);
        loop {
            let result = (&self.0).read_vectored(&mut parts);
            match result {
                // ENOENT: the request was interrupted between being queued and being read.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT)) => {}
                other => return other,
            }
        }
    }

    /// Sends a whole reply, or a notification. A reply to a request that was interrupted meanwhile is dropped.
    pub fn write_reply(&self, header: &[u8], body: &[u8]) -> io::Result<()> {
        loop {
            match (&self.0).write_vectored(&[IoSlice::new(header), IoSlice::new(body)]) {
                Ok(written) if written == header.len() + body.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for everything that was read and never answered, after a server died.
    pub fn request_resend(&self) -> io::Result<()> {
        self.write_reply(&wire::resend_notification(), &[])
    }
}

/// The memory that outlives a server: an anonymous file, close-on-exec.
pub fn create_memory_file(name: &str) -> io::Result<File> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    Ok(File::from(nix::sys::memfd::memfd_create(name, flags)?))
}

/// Lets a descriptor pass to programs started from here on, or not.
pub fn set_inheritable(descriptor: impl AsFd, inheritable: bool) -> io::Result<()> {
    let flags = if inheritable { nix::fcntl::FdFlag::empty() } else { nix::fcntl::FdFlag::FD_CLOEXEC };
    nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_SETFD(flags))?;
    Ok(())
}

/// Marks every descriptor but the standard ones as close-on-exec: what a caller's script has open (a lock, a pipe) is
/// nothing that programs started from here may keep. It closes nothing.
pub fn pass_on_nothing() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
    // SAFETY: the call takes numbers only, and with this flag closes nothing.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_CLOEXEC) } == 0 {
        return Ok(());
    }
    // Before Linux 5.11: one by one.
    for item in std::fs::read_dir("/proc/self/fd")? {
        let Some(number) = item?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        if number > 2 {
            // SAFETY: F_SETFD takes no pointer; on a number that is not open any more it fails.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// A descriptor of this process that others can wait for its end with.
pub fn own_process() -> io::Result<OwnedFd> {
    let flags: libc::c_uint = 0;
    // SAFETY: the call takes numbers only.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), flags) };
    match RawFd::try_from(number) {
        // SAFETY: the kernel has just made this number for us.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes over a descriptor that the parent process left open under this number and makes it close-on-exec.
/// Numbers 0 to 2 and numbers that are not open, or are marked close-on-exec already, are refused.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_GETFD takes no pointer; on a number that is not open it fails.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // Everything this program opens is close-on-exec: such a number has an owner here already.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    // SAFETY: the number is open, came over exec (no close-on-exec mark) and so has no owner in this program; the
    // mark set next keeps a second call from making a second owner.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    set_inheritable(&descriptor, false)?;
    Ok(descriptor)
}

/// Owns a descriptor that a system call of this very moment has made: `accept` and `recvmsg` answer with numbers.
pub(in crate::device) fn own_received(number: RawFd) -> OwnedFd {
    // SAFETY: the callers (see above) pass numbers the kernel has just made for them, each once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Tells the kernel that this thread, and all it starts, is in the way of dirty pages on their way to disk: it must
/// never be made to wait for such pages itself. Needs CAP_SYS_RESOURCE.
pub fn become_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: this option takes numbers only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, unused, unused, unused) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Keeps all memory of this process, also what it asks for later, from being paged out.
pub fn lock_memory() -> io::Result<()> {
    // Later allocations must not fail at the limit once privileges are gone; without the right to raise it the call
    // below decides.
    let _ = set_limit(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY);
    // SAFETY: takes no pointer and changes no content of memory.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// No core file of this process: it would hold guest data.
pub fn forbid_core_files() -> io::Result<()> {
    set_limit(libc::RLIMIT_CORE, 0)
}

fn set_limit(resource: libc::__rlimit_resource_t, value: libc::rlim_t) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the pointer is to a live structure, which the call only reads.
    let result = unsafe { libc::setrlimit(resource, &raw const limit) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// No program started from here may gain rights by its file's mode or capabilities.
pub fn forbid_new_privileges() -> io::Result<()> {
    Ok(nix::sys::prctl::set_no_new_privs()?)
}

/// The kernel's `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    backing_device: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encryption: u32,
    key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    encryption_name: [u8; 64],
    encryption_key: [u8; 32],
    initial: [u64; 2],
}

/// The kernel's `struct loop_config`.
#[repr(C)]
struct LoopConfiguration {
    descriptor: u32,
    block_bytes: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4C04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_READ_ONLY: u32 = 1;
const LOOP_DIRECT_IO: u32 = 16;

impl LoopInfo {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        backing_device: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encryption: 0,
        key_size: 0,
        flags: 0,
        file_name: [0; 64],
        encryption_name: [0; 64],
        encryption_key: [0; 32],
        initial: [0; 2],
    };
}

/// What a loop device is to show.
#[derive(Clone, Copy, Debug)]
pub struct LoopSetup {
    /// First byte of the backing file.
    pub offset: u64,
    /// Bytes of it; 0 for all that follows the offset.
    pub size_limit: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What a loop device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopStatus {
    /// Device number of the file system that holds the backing file.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// First byte of the backing file.
    pub offset: u64,
    /// Bytes of it; 0 for all that follows.
    pub size_limit: u64,
    /// Whether it reads and writes the backing file unbuffered.
    pub direct: bool,
}

/// The number of a loop device that is free now. Another process may take it before us.
pub fn free_loop_number(control: &File) -> io::Result<u32> {
    // SAFETY: this command takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Puts a loop device over `backing`, unbuffered, not cleared by itself. EBUSY when it is in use.
pub fn configure_loop(device: &File, backing: &File, setup: &LoopSetup) -> io::Result<()> {
    let mut flags = LOOP_DIRECT_IO;
    if setup.read_only {
        flags |= LOOP_READ_ONLY;
    }
    let configuration = LoopConfiguration {
        descriptor: u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
        block_bytes: setup.block_bytes,
        info: LoopInfo { offset: setup.offset, size_limit: setup.size_limit, flags, ..LoopInfo::EMPTY },
        reserved: [0; 8],
    };
    // SAFETY: the argument is a live structure of the layout the command reads.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const configuration) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the loop device shows; `None` when it shows nothing.
pub fn loop_status(device: &File) -> io::Result<Option<LoopStatus>> {
    let mut info = LoopInfo::EMPTY;
    // SAFETY: the argument is a live, exclusive structure of the layout the command fills.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    if result == 0 {
        return Ok(Some(LoopStatus {
            device: info.device,
            inode: info.inode,
            offset: info.offset,
            size_limit: info.size_limit,
            direct: info.flags & LOOP_DIRECT_IO != 0,
        }));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

/// Lets a loop device show another number of bytes of its backing file; 0 for all that follows its offset. EAGAIN when the
/// kernel cannot empty the device's cache at the moment.
pub fn set_loop_size_limit(device: &File, size_limit: u64) -> io::Result<()> {
    let mut info = LoopInfo::EMPTY;
    // SAFETY: the argument is a live, exclusive structure of the layout the command fills.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    info.size_limit = size_limit;
    // SAFETY: the argument is a live structure of the layout the command reads.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the backing file away from a loop device. While others have the device open this happens at their close.
pub fn clear_loop(device: &File) -> io::Result<()> {
    // SAFETY: this command takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a loop device look at the size of its backing file again.
pub fn refresh_loop_size(device: &File) -> io::Result<()> {
    // SAFETY: this command takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn loop_structures_have_the_kernels_size() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfiguration>(), 304);
    }

    #[test]
    fn only_descriptors_left_by_the_parent_are_taken_over() {
        assert!(inherited(0).is_err());
        assert!(inherited(987_654).is_err());
        let file = create_memory_file("test").unwrap();
        assert!(inherited(file.as_raw_fd()).is_err(), "it has an owner");
        set_inheritable(&file, true).unwrap();
        let number = file.into_raw_fd();
        let taken = inherited(number).unwrap();
        assert!(inherited(taken.as_raw_fd()).is_err(), "taken twice");
    }
}
