//! BOTTOM layer: bytes to and from files. It knows no cluster and no table.
//!
//! Two seams, and nothing above them opens, writes, syncs, renames or unlinks a file by itself:
//!
//! * [`Storage`] is one open file, blocking and positional: headers, tables, tools.
//! * [`IoQueue`] carries guest data: operations own their buffer from submission until they are reaped, so memory
//!   that the kernel may still write is never freed or reused.
//! * [`Folder`] is one directory whose names are single components.
//!
//! Rules every implementation keeps (failure model R1-R7 of the crash document):
//!
//! 1. Only a completed [`Storage::sync_data`] orders writes. Bytes between an old and a new end read as zeros.
//! 2. Transfers may be short; [`StorageExt`] finishes them. `Interrupted` is retried, never reported.
//! 3. A failed sync is final for the file: [`Latched`](latch::Latched) refuses everything but reads afterwards.

pub mod buffer;
pub mod file;
pub mod identity;
pub mod latch;
pub mod lock;
pub mod map;
pub mod openers;
pub mod ownership;
pub mod pool;
#[cfg(any(test, feature = "testing"))]
pub mod sim;
pub mod stamp;
pub mod sys;
pub mod temporary;
pub mod uring;

#[cfg(test)]
mod queue_tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub use buffer::{BufferPool, IoBuf};
pub use pool::{QueueChoice, best_io_queue};

/// How to change the allocation of a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Allocation {
    /// Reserve blocks, extending the file when the range passes its end. New bytes read as zeros.
    Reserve,
    /// Make the range read as zeros and keep the file's length; blocks may stay reserved.
    Zero,
    /// Give the blocks back; the range reads as zeros and the file keeps its length.
    Punch,
}

/// What a file demands of offsets, lengths and memory in unbuffered transfers, in bytes; 1 when it demands nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Multiple for file offsets and lengths.
    pub offset: u32,
    /// Multiple for addresses in memory.
    pub memory: u32,
}

impl Alignment {
    /// No demand at all: buffered files and memory.
    pub const NONE: Self = Self { offset: 1, memory: 1 };
}

/// One open file: blocking, positional, safe to share between threads.
///
/// Reads past the end return 0 bytes. Offsets, lengths and buffers given to `read_at` and `write_at` must keep
/// [`alignment`](Self::alignment); [`StorageExt`] does that for callers that cannot.
pub trait Storage: Send + Sync {
    /// Reads up to `buffer.len()` bytes at byte `offset`; may be short.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes up to `buffer.len()` bytes at byte `offset`, extending the file if needed; may be short.
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize>;
    /// Makes everything written before the call, and the length that covers it, survive a power loss.
    fn sync_data(&self) -> io::Result<()>;
    /// Cuts or extends the file to `len` bytes; new bytes read as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Changes the allocation of `len` bytes at `offset`.
    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// What unbuffered transfers must keep.
    fn alignment(&self) -> Alignment {
        Alignment::NONE
    }
    /// The first run at or after `offset` that may hold data, as `(start, end)`; `None` when only holes follow.
    /// An implementation that cannot tell answers with everything up to the end.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = self.len()?;
        Ok((offset < end).then_some((offset, end)))
    }
    /// The first run at or after `offset` whose blocks are surely written, as `(start, end)`: neither holes nor blocks that are
    /// only reserved; `None` when none follows. Fails with [`io::ErrorKind::Unsupported`] where nobody can tell. A
    /// [`next_data`](Self::next_data) may also name what somebody has only read.
    fn next_written(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.next_data(offset)
    }
    /// Bytes the host has really given to this file, if it can tell.
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }
    /// Bytes that are free, for this file's owner, on the file system it lies on; `None` if that cannot be told.
    fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// The descriptor, for queues that hand operations to the kernel; `None` for storage that is no file.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Changes what the holder of the file's lock says it does with the file: weaker at once, nothing at all with
    /// `None`, and back again as when it was opened. Nothing to do for storage that is not locked.
    fn claim(&self, _ownership: Option<lock::Ownership>) -> crate::Result<()> {
        Ok(())
    }
    /// Whether the file is empty.
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        (**self).write_at(offset, buffer)
    }
    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        (**self).allocate(offset, len, how)
    }
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn alignment(&self) -> Alignment {
        (**self).alignment()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        (**self).next_data(offset)
    }
    fn next_written(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        (**self).next_written(offset)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        (**self).allocated_bytes()
    }
    fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        (**self).host_free_bytes()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (**self).descriptor()
    }
    fn claim(&self, ownership: Option<lock::Ownership>) -> crate::Result<()> {
        (**self).claim(ownership)
    }
}

/// Whole transfers of any alignment, for headers, tables and tools.
pub trait StorageExt: Storage {
    /// Fills `buffer` from byte `offset`; an end of file inside the range is `UnexpectedEof`.
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.read_available_at(offset, buffer)? < buffer.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Fills `buffer` from byte `offset`; what lies past the end of the file reads as zeros.
    fn read_padded_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = self.read_available_at(offset, buffer)?;
        buffer[read..].fill(0);
        Ok(())
    }

    /// Reads what there is of `buffer.len()` bytes at `offset`; short only at the end of the file.
    fn read_available_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let alignment = self.alignment();
        if is_aligned(alignment, offset, buffer) {
            return read_loop(self, offset, buffer);
        }
        let unit = u64::from(alignment.offset);
        let start = offset - offset % unit;
        let skip = to_usize(offset - start)?;
        let span = (skip + buffer.len()).next_multiple_of(to_usize(unit)?);
        let mut bounce = IoBuf::try_zeroed(span)?;
        let read = read_loop(self, start, bounce.as_mut_slice())?;
        let available = read.saturating_sub(skip).min(buffer.len());
        buffer[..available].copy_from_slice(&bounce.as_slice()[skip..skip + available]);
        Ok(available)
    }

    /// Writes all of `buffer` at byte `offset`. An unaligned range is read, patched and written whole: the caller
    /// must own the surrounding aligned blocks, and the file may become longer by less than one block.
    fn write_all_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        let alignment = self.alignment();
        if is_aligned(alignment, offset, buffer) {
            return write_loop(self, offset, buffer);
        }
        let unit = u64::from(alignment.offset);
        let start = offset - offset % unit;
        let skip = to_usize(offset - start)?;
        let span = (skip + buffer.len()).next_multiple_of(to_usize(unit)?);
        let mut bounce = IoBuf::try_zeroed(span)?;
        if !offset.is_multiple_of(unit) || !buffer.len().is_multiple_of(to_usize(unit)?) {
            let read = read_loop(self, start, bounce.as_mut_slice())?;
            bounce.as_mut_slice()[read..].fill(0);
        }
        bounce.as_mut_slice()[skip..skip + buffer.len()].copy_from_slice(buffer);
        write_loop(self, start, bounce.as_slice())
    }
}

impl<S: Storage + ?Sized> StorageExt for S {}

fn to_usize(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn is_aligned(alignment: Alignment, offset: u64, buffer: &[u8]) -> bool {
    let unit = u64::from(alignment.offset);
    offset.is_multiple_of(unit)
        && (buffer.len() as u64).is_multiple_of(unit)
        && (buffer.as_ptr().addr() as u64).is_multiple_of(u64::from(alignment.memory))
}

fn read_loop<S: Storage + ?Sized>(storage: &S, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let unit = u64::from(storage.alignment().offset);
    let mut done = 0;
    while done < buffer.len() {
        match storage.read_at(offset + done as u64, &mut buffer[done..]) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                // A transfer that ends off the unit has met the end of the file: it cannot be continued unbuffered.
                if !(count as u64).is_multiple_of(unit) {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn write_loop<S: Storage + ?Sized>(storage: &S, offset: u64, buffer: &[u8]) -> io::Result<()> {
    let unit = to_usize(u64::from(storage.alignment().offset))?;
    let mut done = 0;
    while done < buffer.len() {
        match storage.write_at(offset + done as u64, &buffer[done..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            // Bytes past the last whole unit are written again, from an aligned place.
            Ok(count) if done + count < buffer.len() && !count.is_multiple_of(unit) => {
                let whole = count - count % unit;
                if whole == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                done += whole;
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Which of a queue's files an operation is for: the number [`IoQueue::attach`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileSlot(pub u32);

/// What an operation does with its range.
#[derive(Debug)]
pub enum IoKind {
    /// Fill the buffer from the file.
    Read(IoBuf),
    /// Write the buffer to the file.
    Write(IoBuf),
    /// Change the allocation of this many bytes.
    Allocate(u64, Allocation),
}

/// One operation on its way to a queue. It owns its buffer until it is reaped.
#[derive(Debug)]
pub struct IoOp {
    /// The submitter's own mark, returned with the result.
    pub token: u64,
    /// Which file.
    pub file: FileSlot,
    /// Byte offset in the file.
    pub offset: u64,
    /// What to do, with the buffer it is done to.
    pub kind: IoKind,
}

/// A finished operation: its result and the buffer it owned.
#[derive(Debug)]
pub struct IoDone {
    /// The mark it was submitted with.
    pub token: u64,
    /// Bytes moved (may be short; 0 for allocations) or the error.
    pub result: io::Result<usize>,
    /// The buffer, for reads and writes.
    pub buffer: Option<IoBuf>,
}

/// How long [`IoQueue::reap`] may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: collect what has finished.
    No,
    /// Until something finishes, the queue is woken or its watched descriptor is readable.
    Yes,
    /// The same, this long at most.
    For(Duration),
}

/// Why [`IoQueue::reap`] came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Operations appended to the list of finished ones.
    pub finished: usize,
    /// The queue's [`Waker`] was used since the last call.
    pub woken: bool,
    /// The watched descriptor is readable.
    pub watched_ready: bool,
}

/// Wakes the thread that waits in [`IoQueue::reap`]; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    /// A waker that calls `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Makes the next, or the current, [`IoQueue::reap`] return.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Waker")
    }
}

/// Asynchronous transfers, driven by one thread: submit, then reap.
///
/// Operations in flight finish in any order and are not ordered among each other; who needs order reaps the first
/// before submitting the second. Dropping a queue waits for what is in flight.
pub trait IoQueue: Send {
    /// Makes a file known to the queue. The queue keeps it open.
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot>;
    /// Lets go of a file; operations in flight on it go on. The slot may be given to another file from now on.
    fn detach(&mut self, _slot: FileSlot) {}
    /// Hands over an operation; gives it back when the queue is full (reap, then try again).
    fn submit(&mut self, operation: IoOp) -> std::result::Result<(), IoOp>;
    /// Starts what was submitted, waits as told, and appends what has finished to `done`.
    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped>;
    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;
    /// A handle that wakes [`reap`](Self::reap) from another thread.
    fn waker(&self) -> Waker;
    /// Also return from [`reap`](Self::reap) while `descriptor` is readable; `None` ends that. The caller keeps the
    /// descriptor open as long as it is watched.
    fn watch(&mut self, descriptor: Option<std::os::fd::RawFd>) -> io::Result<()>;
}

/// One directory; names are single components, never paths.
///
/// A created or renamed name is durable only after [`sync`](Self::sync) (R5).
pub trait Folder: Send + Sync {
    /// Opens an existing file, never following a symbolic link out of the folder.
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>>;
    /// Creates a file that must not exist, mode 0600.
    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>>;
    /// Renames `from` over `to`, atomically.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Renames `from` to `to`, which must not exist.
    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name.
    fn unlink(&self, name: &str) -> io::Result<()>;
    /// Whether the name exists.
    fn exists(&self, name: &str) -> io::Result<bool>;
    /// All names, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations, renames and removals survive a power loss.
    fn sync(&self) -> io::Result<()>;
    /// Its path without links, where it has one.
    fn real_path(&self) -> Option<std::path::PathBuf> {
        None
    }
    /// Opens a folder in this one, following no link. Not every implementation has folders in it.
    fn open_folder(&self, name: &str) -> io::Result<Box<dyn Folder>> {
        let _unused = name;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading only.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}
