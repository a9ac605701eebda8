//! The chains of a split disk, joined to one: read-only bytes from 0 to the end of the disk, in which a chain of a single
//! raw base is opened. So everything that reads a disk reads this one.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::{Chain, ChainOptions, DESCRIPTOR_NAME, Source, SplitDescriptor};
use crate::io::file::DirectoryFolder;
use crate::io::lock::Ownership;
use crate::io::{Access, Allocation, Storage};
use crate::ops::transfer::{ChainContent, Content, Presence};

use super::{OpenOptions, OpenReport, Opened, open_state};

/// How far a run of data is followed in one answer.
const RUN_BYTES_MAX: u64 = 64 << 20;
/// In what steps.
const STEP_BYTES: u64 = 1 << 20;

/// The bytes of chains that follow each other, or of one alone. Nothing can be written to them.
pub(in crate::ops) struct ChainStorage {
    parts: Vec<Part>,
    len: u64,
}

struct Part {
    start: u64,
    len: u64,
    content: ChainContent,
    chain: Arc<Chain>,
}

impl ChainStorage {
    /// Chains in the order of the disk, each as long as its disk.
    pub(in crate::ops) fn new(chains: Vec<Arc<Chain>>) -> Self {
        let mut len: u64 = 0;
        let mut parts = Vec::new();
        for chain in chains {
            let start = len;
            let bytes = chain.geometry().disk_bytes();
            len = len.saturating_add(bytes);
            parts.push(Part { start, len: bytes, content: ChainContent::whole(Arc::clone(&chain)), chain });
        }
        Self { parts, len }
    }

    /// The part that holds the byte `offset`.
    fn part(&self, offset: u64) -> Option<&Part> {
        let after = self.parts.partition_point(|part| part.start <= offset);
        self.parts.get(after.checked_sub(1)?).filter(|part| offset - part.start < part.len)
    }

    fn storages(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        self.parts.iter().flat_map(|part| (0..part.chain.depth()).map(|delta| part.chain.storage(delta)))
    }
}

fn as_io(error: Error) -> io::Error {
    let kind = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .map_or(io::ErrorKind::Other, io::Error::kind);
    io::Error::new(kind, error)
}

fn read_only<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Storage for ChainStorage {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(part) = self.part(offset) else { return Ok(0) };
        let within = offset - part.start;
        let len = usize::try_from(part.len - within).unwrap_or(usize::MAX).min(buffer.len());
        part.content.read(within, &mut buffer[..len]).map_err(as_io)?;
        Ok(len)
    }

    fn write_at(&self, _offset: u64, _buffer: &[u8]) -> io::Result<usize> {
        read_only()
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn allocate(&self, _offset: u64, _len: u64, _how: Allocation) -> io::Result<()> {
        read_only()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let after = self.parts.partition_point(|part| part.start <= offset);
        for part in self.parts.iter().skip(after.saturating_sub(1)) {
            let from = offset.saturating_sub(part.start).min(part.len);
            let Some(found) = part.content.next_data(from, part.len).map_err(as_io)? else { continue };
            let limit = found.saturating_add(RUN_BYTES_MAX).min(part.len);
            let mut end = found;
            while end < limit {
                let next = end.saturating_add(STEP_BYTES).min(limit);
                if end > found && part.content.presence(Extent::between(end, next)) == Presence::Absent {
                    break;
                }
                end = next;
            }
            return Ok(Some((part.start + found, part.start + end)));
        }
        Ok(None)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.storages().try_fold(0u64, |sum, storage| Ok(sum.saturating_add(storage.allocated_bytes()?)))
    }

    fn claim(&self, ownership: Option<Ownership>) -> Result<()> {
        self.storages().try_for_each(|storage| storage.claim(ownership))
    }
}

/// Opens the state that `options` choose of the split disk in `folder`, which is at `path`.
pub(super) fn open(
    folder: &DirectoryFolder,
    split: &SplitDescriptor,
    path: &Path,
    options: &OpenOptions,
) -> Result<Opened> {
    let descriptor = path.join(DESCRIPTOR_NAME);
    let mut chains = Vec::new();
    let mut report: Option<OpenReport> = None;
    for part in split.parts() {
        let opened = open_state(folder, &part.descriptor, path, options)?;
        let (said, found) = (part.descriptor.disk_sectors(), opened.chain.geometry().disk_sectors());
        if said != found {
            return Err(Error::new(
                ErrorKind::Descriptor,
                format!(
                    "open disk: the storage that starts at sector {} has {} sectors, its image {}: what follows would be \
                     read from a wrong place",
                    part.start.0, said.0, found.0
                ),
            )
            .at_path(opened.chain.name(opened.chain.top()))
            .advise("restore the descriptor or that image from a backup; each image by itself can still be exported from a \
                     folder of its own"));
        }
        chains.push(opened.chain);
        match &mut report {
            None => report = Some(opened.report),
            Some(report) => {
                report.images.extend(opened.report.images);
                report.direct.extend(opened.report.direct);
                report.was_in_use |= opened.report.was_in_use;
                for warning in opened.report.warnings {
                    if !report.warnings.contains(&warning) {
                        report.warnings.push(warning);
                    }
                }
            }
        }
    }
    let storage = Arc::new(ChainStorage::new(chains));
    let source = Source { name: descriptor, storage, raw: true };
    let cluster = split.first().cluster_sectors();
    let chain_options =
        ChainOptions { access: Access::ReadOnly, raw_cluster: Some(cluster), accept_in_use: false };
    let chain = Chain::open(vec![source], &chain_options)?;
    let report = report.ok_or_else(|| Error::new(ErrorKind::Descriptor, "open disk: it has no storage"))?;
    let report = OpenReport {
        disk_bytes: chain.geometry().disk_bytes(),
        cluster_bytes: chain.geometry().cluster_bytes(),
        ..report
    };
    Ok(Opened { chain, report })
}
