//! Loop devices over an exported file: attach, grow, detach.
//!
//! A loop device is always attached unbuffered (the kernel is asked, and the answer in sysfs is checked), without
//! automatic clearing, and only after the file was examined: on some kernels the size of a FUSE file is 0 before,
//! and so would be the device's.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::fuse::sys::{self, LoopSetup};
use crate::error::{Error, ErrorKind, Result};

const CONTROL: &str = "/dev/loop-control";
/// Another process may take the free device we were told of: try again this often.
const ATTEMPTS_MAX: u32 = 64;

/// Which part of the file a loop device is to show, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// First byte.
    pub offset: u64,
    /// Bytes; 0 for all that follows.
    pub len: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// Refuse writes.
    pub read_only: bool,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self { offset: 0, len: 0, block_bytes: 512, read_only: false }
    }
}

/// Puts a loop device over `file`: `wanted`, or a free one. The path of the device.
pub fn attach(file: &Path, wanted: Option<&Path>, options: &AttachOptions) -> Result<PathBuf> {
    let backing = fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .open(file)
        .map_err(|cause| Error::io(ErrorKind::Open, "open the exported file", cause).at_path(file))?;
    let size = backing
        .metadata()
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine the exported file", cause).at_path(file))?
        .len();
    if size <= options.offset {
        return Err(Error::new(
            ErrorKind::Device,
            format!("the exported file has {size} bytes, the part to show begins at {}", options.offset),
        )
        .at_path(file));
    }
    let setup = LoopSetup {
        offset: options.offset,
        size_limit: options.len,
        block_bytes: options.block_bytes,
        read_only: options.read_only,
    };
    let path = match wanted {
        Some(device) => {
            let node = open_device(device, options.read_only)?;
            configure(&node, device, &backing, &setup)?;
            device.to_path_buf()
        }
        None => attach_free(&backing, &setup)?,
    };
    if let Err(error) = check_direct(&path) {
        return match detach(&path) {
            Ok(()) => Err(error),
            Err(second) => Err(error.advise(format!("the device could not be detached either: {second}"))),
        };
    }
    Ok(path)
}

/// Keeps a quarter of the device's requests for reads, so that writes that are not answered for a long time do not take all of
/// them. Only a scheduler can do that. Whether it could be done.
pub fn keep_requests_for_reads(device: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let queue = Path::new("/sys/block").join(name).join("queue");
    // What the driver can take at a time: with a scheduler, `nr_requests` says what that can.
    let requests =
        fs::read_to_string(queue.join("nr_requests")).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let Some(requests) = requests.filter(|&requests| requests >= 4) else { return false };
    // The driver takes 128; a device that was used before may have a scheduler already, which says more.
    let requests = requests.min(128);
    fs::write(queue.join("scheduler"), "mq-deadline").is_ok()
        && fs::write(queue.join("iosched/async_depth"), (requests - requests / 4).to_string()).is_ok()
}

fn configure(node: &File, device: &Path, backing: &File, setup: &LoopSetup) -> Result<()> {
    sys::configure_loop(node, backing, setup).map_err(|cause| {
        let kind = if is_busy(&cause) { ErrorKind::InUse } else { ErrorKind::DeviceCommand };
        Error::io(kind, "attach the loop device", cause).at_path(device)
    })
}

fn attach_free(backing: &File, setup: &LoopSetup) -> Result<PathBuf> {
    let control = fs::OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|cause| {
        Error::io(ErrorKind::Device, "open the loop driver", cause)
            .at_path(CONTROL)
            .advise("load the kernel module: modprobe loop")
    })?;
    for _ in 0..ATTEMPTS_MAX {
        let number = sys::free_loop_number(&control).map_err(|cause| {
            Error::io(ErrorKind::Device, "find a free loop device", cause).at_path(CONTROL)
        })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let node = wait_for_node(&path, setup.read_only)?;
        match sys::configure_loop(&node, backing, setup) {
            Ok(()) => return Ok(path),
            Err(error) if is_busy(&error) => {}
            Err(cause) => {
                return Err(
                    Error::io(ErrorKind::DeviceCommand, "attach the loop device", cause).at_path(path)
                );
            }
        }
    }
    Err(Error::new(ErrorKind::Device, "every free loop device was taken by others first").at_path(CONTROL))
}

/// A device that was just made: its node may come a moment later.
fn wait_for_node(path: &Path, read_only: bool) -> Result<File> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match open_device(path, read_only) {
            Err(error) if !path.exists() && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
                drop(error);
            }
            other => return other,
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

fn open_device(path: &Path, read_only: bool) -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(|cause| Error::io(ErrorKind::Device, "open the loop device", cause).at_path(path))
}

fn attribute(device: &Path, name: &str) -> Option<String> {
    let path = Path::new("/sys/block").join(device.file_name()?).join("loop").join(name);
    fs::read_to_string(path).ok().map(|text| text.trim_end_matches('\n').to_owned())
}

/// A buffered loop device keeps a second copy of everything and may wait for itself.
fn check_direct(device: &Path) -> Result<()> {
    match attribute(device, "dio").as_deref() {
        Some("1") => Ok(()),
        found => Err(Error::new(
            ErrorKind::DeviceCommand,
            format!("the loop device does not do direct I/O (sysfs says {found:?})"),
        )
        .at_path(device)),
    }
}

/// The file behind a loop device, as sysfs names it; `None` when nothing is attached.
pub fn backing_file(device: &Path) -> Option<PathBuf> {
    // The name of a file that was removed or detached from the tree has a mark behind it.
    attribute(device, "backing_file")
        .map(|name| PathBuf::from(name.strip_suffix(" (deleted)").unwrap_or(&name)))
}

/// Whether a loop device was detached while somebody had it open: it goes with its last close. Ours have no other
/// reason to clear themselves.
pub fn is_going(device: &Path) -> bool {
    attribute(device, "autoclear").as_deref() == Some("1")
}

/// Which file is behind the device: device and inode number, or nothing known when its file system is dead, as that of
/// a server that was given up. `None` when no file is.
fn attached(node: &File) -> Option<Option<(u64, u64)>> {
    match sys::loop_status(node) {
        Ok(status) => status.map(|status| Some((status.device, status.inode))),
        Err(_) => Some(None),
    }
}

/// Takes the file away from a loop device and waits until it is. [`ErrorKind::Busy`] when somebody still has the
/// device open after two seconds; it is then detached at their close. Nothing is done to a device that is free.
pub fn detach(device: &Path) -> Result<()> {
    let node = open_device(device, true)?;
    let Some(before) = attached(&node) else { return Ok(()) };
    match sys::clear_loop(&node) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
        Err(cause) => {
            return Err(Error::io(ErrorKind::DeviceCommand, "detach the loop device", cause).at_path(device));
        }
    }
    drop(node);
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let node = open_device(device, true)?;
        // Another file behind it means that it was free for a moment, and taken.
        let gone = attached(&node).is_none_or(|now| now != before);
        drop(node);
        if gone {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::new(ErrorKind::Busy, "somebody still has the loop device open")
                .at_path(device)
                .advise("it is detached when they close it; find them with: fuser -v DEVICE"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Lets the device show `len` bytes of its file after that has grown, its offset unchanged; 0 for all that follows.
pub fn set_len(device: &Path, file: &Path, len: u64) -> Result<()> {
    // Examined first: the kernel may still believe the old size.
    fs::metadata(file)
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine the exported file", cause).at_path(file))?;
    let failed = |cause| Error::io(ErrorKind::DeviceCommand, "grow the loop device", cause).at_path(device);
    let node = open_device(device, false)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match sys::set_loop_size_limit(&node, len) {
            Ok(()) => break,
            // Its cache is in use at the moment.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                return Err(failed(error).advise(
                    "this kernel does not let the part of a device grow that is mounted: unmount the file system, then \
                     run the command again",
                ));
            }
            Err(error) => return Err(failed(error)),
        }
    }
    // Older kernels remember the limit and do not look at it.
    sys::refresh_loop_size(&node).map_err(failed)
}

/// Lets the device follow the size of its file after that has grown.
pub fn refresh_size(device: &Path, file: &Path) -> Result<()> {
    // Examined first: the kernel may still believe the old size.
    fs::metadata(file)
        .map_err(|cause| Error::io(ErrorKind::Stat, "examine the exported file", cause).at_path(file))?;
    let node = open_device(device, true)?;
    sys::refresh_loop_size(&node)
        .map_err(|cause| Error::io(ErrorKind::DeviceCommand, "grow the loop device", cause).at_path(device))
}
