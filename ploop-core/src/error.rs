//! What went wrong, where, and what to do about it.
//!
//! One [`Error`] for the whole project: a [`ErrorKind`] that callers match on and that fixes the exit code of the
//! original command, a [`Context`] that names path, offset or cluster and operation, and the cause in `source()`.
//! An error is cheap to clone, so that one failed sync can be told to every flush that waited for it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The result of almost every function here.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was. The number beside each is the original command's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file cannot be created, or is there already (1).
    Create,
    /// A device cannot be opened or allocated (2).
    Device,
    /// A device refused a command (3).
    DeviceCommand,
    /// A file cannot be opened (4).
    Open,
    /// Not enough memory (5).
    Memory,
    /// A read failed, or the input ended early (6).
    Read,
    /// A write failed (7).
    Write,
    /// The image is corrupt (11).
    Corrupt,
    /// Another system call or an external command failed (12).
    System,
    /// The peer of a copy sent what it must not (13).
    Protocol,
    /// The copy cannot finish: the frozen file system still changes, or the freeze command failed (14).
    NotQuiet,
    /// A file cannot be examined (15).
    Stat,
    /// A sync failed: what was written may be lost (16).
    Sync,
    /// Another operation is in progress (17).
    Busy,
    /// A lock cannot be taken for a reason other than its being held (18).
    Lock,
    /// A file cannot be truncated or extended (19).
    Truncate,
    /// Space cannot be allocated (20).
    Allocate,
    /// A file system cannot be mounted (21).
    Mount,
    /// A file system cannot be unmounted (22).
    Unmount,
    /// The descriptor is locked by another command (23).
    DescriptorLocked,
    /// A file system cannot be made (24).
    MakeFileSystem,
    /// A file system cannot be resized (26).
    ResizeFileSystem,
    /// A folder cannot be made (27).
    MakeFolder,
    /// A file cannot be renamed (28).
    Rename,
    /// The operation was cancelled (29).
    Cancelled,
    /// A cluster cannot be moved to another place (30).
    Relocation,
    /// The partition table cannot be read or written (33).
    PartitionTable,
    /// A file cannot be removed (35).
    Unlink,
    /// The image or device is in use (37).
    InUse,
    /// A parameter is wrong (38).
    Parameter,
    /// The descriptor is missing or wrong (39).
    Descriptor,
    /// The device is not mounted (40).
    NotMounted,
    /// The file system check failed (41).
    FileSystemCheck,
    /// There is no such snapshot (43).
    NoSnapshot,
    /// The file system is busy and stays mounted (46).
    UnmountBusy,
    /// A hand-over was cut at a moment when neither side can tell its outcome (75).
    OutcomeUnknown,
}

impl ErrorKind {
    /// The exit code of the original command for this kind (command-line document, "Exit codes").
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Create => 1,
            Self::Device => 2,
            Self::DeviceCommand => 3,
            Self::Open => 4,
            Self::Memory => 5,
            Self::Read => 6,
            Self::Write => 7,
            Self::Corrupt => 11,
            Self::System => 12,
            Self::Protocol => 13,
            Self::NotQuiet => 14,
            Self::Stat => 15,
            Self::Sync => 16,
            Self::Busy => 17,
            Self::Lock => 18,
            Self::Truncate => 19,
            Self::Allocate => 20,
            Self::Mount => 21,
            Self::Unmount => 22,
            Self::DescriptorLocked => 23,
            Self::MakeFileSystem => 24,
            Self::ResizeFileSystem => 26,
            Self::MakeFolder => 27,
            Self::Rename => 28,
            Self::Cancelled => 29,
            Self::Relocation => 30,
            Self::PartitionTable => 33,
            Self::Unlink => 35,
            Self::InUse => 37,
            Self::Parameter => 38,
            Self::Descriptor => 39,
            Self::NotMounted => 40,
            Self::FileSystemCheck => 41,
            Self::NoSnapshot => 43,
            Self::UnmountBusy => 46,
            Self::OutcomeUnknown => 75,
        }
    }
}

impl ErrorKind {
    /// The kind whose [`exit_code`](Self::exit_code) this is.
    pub fn from_exit_code(code: u8) -> Option<Self> {
        const ALL: [ErrorKind; 36] = [
            ErrorKind::Create,
            ErrorKind::Device,
            ErrorKind::DeviceCommand,
            ErrorKind::Open,
            ErrorKind::Memory,
            ErrorKind::Read,
            ErrorKind::Write,
            ErrorKind::Corrupt,
            ErrorKind::System,
            ErrorKind::Protocol,
            ErrorKind::NotQuiet,
            ErrorKind::Stat,
            ErrorKind::Sync,
            ErrorKind::Busy,
            ErrorKind::Lock,
            ErrorKind::Truncate,
            ErrorKind::Allocate,
            ErrorKind::Mount,
            ErrorKind::Unmount,
            ErrorKind::DescriptorLocked,
            ErrorKind::MakeFileSystem,
            ErrorKind::ResizeFileSystem,
            ErrorKind::MakeFolder,
            ErrorKind::Rename,
            ErrorKind::Cancelled,
            ErrorKind::Relocation,
            ErrorKind::PartitionTable,
            ErrorKind::Unlink,
            ErrorKind::InUse,
            ErrorKind::Parameter,
            ErrorKind::Descriptor,
            ErrorKind::NotMounted,
            ErrorKind::FileSystemCheck,
            ErrorKind::NoSnapshot,
            ErrorKind::UnmountBusy,
            ErrorKind::OutcomeUnknown,
        ];
        ALL.into_iter().find(|kind| kind.exit_code() == code)
    }
}

/// Where it went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The file, folder or device.
    pub path: Option<PathBuf>,
    /// Byte offset in that file.
    pub offset: Option<u64>,
    /// Guest cluster.
    pub cluster: Option<u64>,
}

/// A failure, with everything a person needs to act on it.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    context: Context,
    advice: Option<String>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `message` says the operation and what was found ("read header: file ends at byte 12").
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Context::default(), advice: None, source: None }
    }

    /// A failed system call: `operation` says what was tried.
    pub fn io(kind: ErrorKind, operation: impl Into<String>, source: io::Error) -> Self {
        Self::new(kind, operation).caused_by(source)
    }

    /// Names the file it happened in. A path set earlier (nearer to the failure) stays.
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.context.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the byte offset in the file. An offset set earlier stays.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.context.offset.get_or_insert(offset);
        self
    }

    /// Names the guest cluster. A cluster set earlier stays.
    #[must_use]
    pub fn at_cluster(mut self, cluster: u64) -> Self {
        self.context.cluster.get_or_insert(cluster);
        self
    }

    /// Says what the reader can do about it.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The same failure seen as another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What kind of failure it was.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where it went wrong.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// What to do about it, if anything is known.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    /// The error number for a guest's request that failed with this: "no space" stays what it is, all else is EIO.
    pub fn guest_errno(&self) -> i32 {
        let cause = self.source.as_ref().and_then(|source| source.downcast_ref::<io::Error>());
        match cause.and_then(io::Error::raw_os_error) {
            Some(number @ (libc::ENOSPC | libc::EDQUOT)) => number,
            _ => libc::EIO,
        }
    }

    /// Whether the cause is a full disk or quota.
    pub fn is_out_of_space(&self) -> bool {
        matches!(self.guest_errno(), libc::ENOSPC | libc::EDQUOT)
    }
}

/// A path for people: on one line whatever its bytes are, with control characters as `\\n`, `\\u{1b}`.
pub fn shown(path: &Path) -> String {
    one_line(&path.to_string_lossy())
}

/// A text for people with its control characters as `\\n`, `\\u{1b}`.
pub fn one_line(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}

impl fmt::Display for Error {
    /// One line without the cause: `PATH: MESSAGE (file byte N, guest cluster M)`; causes follow through `source()`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.context.path {
            write!(formatter, "{}: ", shown(path))?;
        }
        formatter.write_str(&self.message)?;
        match (self.context.offset, self.context.cluster) {
            (Some(offset), Some(cluster)) => {
                write!(formatter, " (file byte {offset}, guest cluster {cluster})")
            }
            (Some(offset), None) => write!(formatter, " (file byte {offset})"),
            (None, Some(cluster)) => write!(formatter, " (guest cluster {cluster})"),
            (None, None) => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_where() {
        let error = Error::new(ErrorKind::Corrupt, "read header: wrong signature")
            .at_path("/a/root.hds")
            .at_offset(0);
        assert_eq!(error.to_string(), "/a/root.hds: read header: wrong signature (file byte 0)");
        assert_eq!(error.kind().exit_code(), 11);
    }

    #[test]
    fn a_path_is_one_line_and_moves_no_cursor() {
        let error = Error::new(ErrorKind::Open, "open").at_path("/a\nb/\u{1b}[2J\tü");
        assert_eq!(error.to_string(), "/a\\nb/\\u{1b}[2J\\tü: open");
    }

    #[test]
    fn nearest_context_wins() {
        let error =
            Error::new(ErrorKind::Read, "x").at_path("near").at_path("far").at_cluster(1).at_cluster(2);
        assert_eq!(error.to_string(), "near: x (guest cluster 1)");
    }

    #[test]
    fn full_disk_reaches_the_guest() {
        let full = Error::io(ErrorKind::Allocate, "grow", io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(full.is_out_of_space());
        assert_eq!(Error::new(ErrorKind::Write, "x").guest_errno(), libc::EIO);
    }
}
