//! The content of a disk, or of one of its snapshots, as a raw file or as a stream.
//!
//! A file appears under its name when it is complete, durable and read back; until then there is only a temporary one
//! beside it. What is zero becomes a hole. A stream gets every byte in order and is never asked to seek.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::CLUSTER_SECTORS_DEFAULT;
use crate::format::{Chain, Geometry, Guid};
use crate::io::file::DirectoryFolder;
use crate::io::temporary::remove_left_over;
use crate::io::{Access, BufferPool, Folder, IoBuf, Storage};
use crate::units::Sectors;

use super::agreement::Disagreement;
use super::convert::{fill_new, verify_new};
use super::open::{OpenOptions, Opened, Which, open, refuse_ciphertext};
use super::placing::place_file;
use super::progress::Progress;
use super::transfer::{self, ChainContent, Content, PIECE_BYTES, Pipeline};

/// Pieces between the disk and the stream.
const PIECES_AHEAD: usize = 4;

/// What to export.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// A descriptor, its folder, or images, base first.
    pub which: Which,
    /// The snapshot; the current state if none.
    pub snapshot: Option<Guid>,
    /// The base is raw, in clusters of this size. Only for images without descriptor.
    pub raw_cluster: Option<Sectors>,
    /// What was written into a file is read back and compared.
    pub read_back: bool,
    /// Folders that images outside of the bundle may be taken from; see [`OpenOptions::parents`].
    pub parents: Vec<PathBuf>,
    /// The bytes of an encrypted disk are wanted as they are; else that is refused.
    pub ciphertext: bool,
}

impl ExportOptions {
    /// The current state of the disk at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            which: Which::Path(path.into()),
            snapshot: None,
            raw_cluster: None,
            read_back: true,
            parents: Vec::new(),
            ciphertext: false,
        }
    }
}

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// The file; none for a stream.
    pub file: Option<PathBuf>,
    /// Size of the disk in bytes: the length of the file or stream.
    pub disk_bytes: u64,
    /// What the file takes on the host in bytes; none for a stream.
    pub host_bytes: Option<u64>,
    /// What is odd about the disk.
    pub warnings: Vec<String>,
    /// Contradictions between descriptor and images: what was exported is not the whole disk, or not the disk.
    pub disagreements: Vec<Disagreement>,
}

fn open_chain(options: &ExportOptions) -> Result<Opened> {
    let opened = open(&OpenOptions {
        which: options.which.clone(),
        snapshot: options.snapshot,
        raw_cluster: options.raw_cluster,
        block_device: matches!(options.which, Which::Files(_)),
        parents: options.parents.clone(),
        ..OpenOptions::new("", Access::ReadOnly)
    })?;
    if !options.ciphertext {
        refuse_ciphertext(&opened.report, "export")?;
    }
    Ok(opened)
}

/// Writes the disk into the new raw file `target`. Fails with [`ErrorKind::Parameter`] if that exists, with
/// [`ErrorKind::InUse`] while the disk is mounted for writing. After any failure there is no file.
pub fn export(options: &ExportOptions, target: &Path, progress: &dyn Progress) -> Result<ExportReport> {
    let wrong =
        |message: &str| Error::new(ErrorKind::Parameter, format!("export: {message}")).at_path(target);
    let name =
        target.file_name().and_then(|name| name.to_str()).ok_or_else(|| wrong("this names no file"))?;
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let folder = DirectoryFolder::open(parent)?.direct();
    let taken = folder
        .exists(name)
        .map_err(|cause| Error::io(ErrorKind::Stat, "export: look for the file", cause).at_path(target))?;
    if taken {
        return Err(wrong("the file exists").advise(
            "choose another name; to write into a device: ploop export DISK - | dd of=DEVICE bs=1M conv=fsync",
        ));
    }
    let Opened { chain, report } = open_chain(options)?;
    remove_left_over(&folder, name).map_err(|cause| {
        Error::io(ErrorKind::Stat, "export: look for what an earlier one left", cause).at_path(target)
    })?;
    let host_bytes = export_in(&folder, name, &chain, options.read_back, progress)
        .map_err(|error| error.at_path(target))?;
    Ok(ExportReport {
        file: Some(target.to_path_buf()),
        disk_bytes: chain.geometry().disk_bytes(),
        host_bytes: Some(host_bytes),
        warnings: report.warnings,
        disagreements: report.disagreements,
    })
}

/// As [`export`], of an open chain into an open folder; `read_back` as in the options. Returns what the file takes on
/// the host, in bytes.
pub fn export_in(
    folder: &dyn Folder,
    name: &str,
    chain: &Arc<Chain>,
    read_back: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let end = chain.geometry().disk_bytes();
    let cluster = Sectors(u64::from(CLUSTER_SECTORS_DEFAULT));
    let geometry = Geometry::raw(cluster, end)?;
    let content = ChainContent::whole(Arc::clone(chain));
    let pipeline = Pipeline { progress, read_back };
    place_file(folder, name, |storage| {
        let path = Path::new(name);
        let ((), layout) = fill_new(storage, path, &geometry, false, |target, storage| {
            let unit = target.unit_bytes();
            progress.begin("export", pipeline.total_bytes(transfer::data_bytes(&content, unit, end)?));
            let threads = transfer::threads(storage, transfer::piece_bytes(unit));
            transfer::copy(&content, target, end, threads, &pipeline)
        })?;
        progress.end();
        verify_new(storage, path, &geometry, layout)?;
        storage
            .allocated_bytes()
            .map_err(|cause| Error::io(ErrorKind::Stat, "export: measure the file", cause))
    })
}

/// Writes every byte of the disk to `stream`, in order. What arrived is for the reader of the stream to check.
pub fn export_to(
    options: &ExportOptions,
    stream: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let Opened { chain, report } = open_chain(options)?;
    let disk_bytes = chain.geometry().disk_bytes();
    let content = ChainContent::whole(chain);
    progress.begin("export", disk_bytes);
    stream_out(&content, disk_bytes, stream, progress)?;
    progress.end();
    Ok(ExportReport {
        file: None,
        disk_bytes,
        host_bytes: None,
        warnings: report.warnings,
        disagreements: report.disagreements,
    })
}

/// A part of the stream.
enum Part {
    Data(IoBuf, usize),
    Zeros(u64),
}

fn stream_out(
    content: &dyn Content,
    end: u64,
    stream: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<()> {
    let piece = usize::try_from(PIECE_BYTES).unwrap_or(1 << 20);
    let pool = BufferPool::new(piece, PIECES_AHEAD);
    let zeros = transfer::pieces_buffer(PIECE_BYTES)?;
    let failure = Mutex::new(None);
    let (sender, receiver) = mpsc::sync_channel(PIECES_AHEAD);
    let written = std::thread::scope(|scope| {
        let (pool, failure) = (&pool, &failure);
        let reader = move || {
            if let Err(error) = read_parts(content, end, pool, &sender) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        };
        std::thread::Builder::new()
            .name("ploop-export".into())
            .spawn_scoped(scope, reader)
            .map_err(|cause| Error::io(ErrorKind::System, "start a thread", cause))?;
        let mut put = |bytes: &[u8]| {
            stream
                .write_all(bytes)
                .map_err(|cause| Error::io(ErrorKind::Write, "export: write to the stream", cause))?;
            progress.advance(bytes.len() as u64)
        };
        // A failure here drops the receiver, and with it the reader ends.
        for part in receiver {
            match part {
                Part::Data(buffer, len) => put(&buffer.as_slice()[..len])?,
                Part::Zeros(mut left) => {
                    while left > 0 {
                        let len = usize::try_from(left).unwrap_or(usize::MAX).min(zeros.len());
                        put(&zeros.as_slice()[..len])?;
                        left -= len as u64;
                    }
                }
            }
        }
        stream.flush().map_err(|cause| Error::io(ErrorKind::Write, "export: write to the stream", cause))
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => written,
    }
}

fn read_parts(
    content: &dyn Content,
    end: u64,
    pool: &BufferPool,
    sender: &mpsc::SyncSender<Part>,
) -> Result<()> {
    let mut at = 0;
    while at < end {
        let data = content.next_data(at, end)?.unwrap_or(end);
        // From a multiple of a page, so that reads past the page cache keep their alignment.
        let data = (data - data % 4096).max(at);
        let part = if data > at {
            let len = data - at;
            at = data;
            Part::Zeros(len)
        } else {
            let mut buffer = pool
                .take()
                .map_err(|cause| Error::io(ErrorKind::Memory, "take memory for a piece", cause))?;
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            content.read(at, &mut buffer.as_mut_slice()[..len])?;
            at += len as u64;
            Part::Data(buffer, len)
        };
        if sender.send(part).is_err() {
            // The writer has failed, and says why.
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
