//! Copying what images hold into another one: the long part of a merge.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, Mapping, PreparedWrite, WriteTarget};
use crate::io::buffer::is_zero;
use crate::io::{IoBuf, StorageExt};
use crate::mutant::{self, Mutant};
use crate::units::{FileOffset, GuestCluster, GuestOffset};

/// Bytes of one transfer, unless a cluster is larger.
const TRANSFER_BYTES: u64 = 4 << 20;
/// The largest cluster that this program makes. For larger ones the buffer grows when one is met.
const CLUSTER_BYTES_USUAL_MAX: u64 = 64 << 20;
/// A group of copied clusters is made durable after this many bytes.
const GROUP_BYTES: u64 = 128 << 20;
/// Or after this many new mappings.
const GROUP_MAPPINGS: usize = 4096;

/// Who wins where both sides of a copy hold a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wins {
    /// The source, which stands on the target.
    Source,
    /// The target, which stands on the source.
    Target,
}

/// Copies what one chain of images holds into an image, cluster by cluster.
///
/// The target is a chain of one image open for writing; the source is one or several images standing on each other,
/// open for reading, that nobody writes. Neither contains the images under the lower of the two. The target is at
/// least as large as the source.
///
/// Guests may read source and target through other chains meanwhile, as long as the winner shadows the other there.
/// At any time the copy may be dropped and begun again from the start: it does the same once more.
pub struct MergeCopy {
    target: Arc<Chain>,
    source: Arc<Chain>,
    wins: Wins,
    /// Nothing lies under the lower one: what is not held reads as zeros.
    on_nothing: bool,
    at: u64,
    buffer: IoBuf,
    group_bytes: u64,
    copied_bytes: u64,
}

/// What one step of a copy did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyStep {
    /// Bytes that were gone through, of [`MergeCopy::total_bytes`].
    pub bytes: u64,
    /// Nothing is left but [`MergeCopy::finish`].
    pub is_last: bool,
}

impl MergeCopy {
    /// A copy from the beginning. `on_nothing`: no image lies under the lower of the two.
    pub fn new(target: Arc<Chain>, source: Arc<Chain>, wins: Wins, on_nothing: bool) -> Result<Self> {
        let (to, from) = (target.geometry(), source.geometry());
        if target.depth() != 1 || !target.is_writable() {
            return Err(Error::new(ErrorKind::Parameter, "merge: the target is not one writable image"));
        }
        if to.cluster_sectors() != from.cluster_sectors() || to.disk_bytes() < from.disk_bytes() {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!(
                    "merge: {} bytes in clusters of {} do not fit into {} bytes in clusters of {}",
                    from.disk_bytes(),
                    from.cluster_bytes(),
                    to.disk_bytes(),
                    to.cluster_bytes()
                ),
            ));
        }
        let len = TRANSFER_BYTES.max(from.cluster_bytes()).min(CLUSTER_BYTES_USUAL_MAX);
        let buffer = IoBuf::try_zeroed(usize::try_from(len).unwrap_or(usize::MAX))
            .map_err(|error| Error::io(ErrorKind::Memory, "merge: take a buffer", error))?;
        Ok(Self { target, source, wins, on_nothing, at: 0, buffer, group_bytes: 0, copied_bytes: 0 })
    }

    /// Bytes that the source holds: what the steps go through in all.
    pub fn total_bytes(&self) -> u64 {
        let disk = self.source.geometry().disk_bytes();
        let (mut at, mut total) = (0, 0);
        while at < disk {
            let mapping = self.source.map(GuestOffset(at), disk - at);
            if let Mapping::Data { len, .. } = mapping {
                total += len;
            }
            at = at.saturating_add(mapping.len());
        }
        total
    }

    /// Bytes written into the target so far.
    pub fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    /// Guest bytes below this have been gone through.
    pub fn position(&self) -> GuestOffset {
        GuestOffset(self.at)
    }

    /// Copies the next run, of a few MiB at most, and makes a group durable when enough has come together. After an
    /// error the target takes nothing more; begin again with it opened anew.
    pub fn step(&mut self) -> Result<CopyStep> {
        let cluster_bytes = self.source.geometry().cluster_bytes();
        let disk = self.source.geometry().disk_bytes();
        let mut bytes = 0;
        if self.at < disk {
            let limit = (self.buffer.len() as u64 / cluster_bytes).max(1) * cluster_bytes;
            match self.source.map(GuestOffset(self.at), (disk - self.at).min(limit)) {
                Mapping::Zero { .. } => {
                    // Not limited: nothing is looked at but tables.
                    let run = self.source.map(GuestOffset(self.at), disk - self.at).len();
                    self.at = self.at.saturating_add(run).min(disk);
                }
                Mapping::Data { delta, offset, len } => {
                    self.copy_run(delta, offset, len)?;
                    bytes = len;
                    let end = self.at.saturating_add(len);
                    // The rest of a cluster that its file cuts short is zeros, and has been written.
                    self.at = end.checked_next_multiple_of(cluster_bytes).unwrap_or(disk).min(disk);
                }
            }
        }
        if self.group_bytes >= GROUP_BYTES || self.target.pending() >= GROUP_MAPPINGS {
            self.commit()?;
        }
        Ok(CopyStep { bytes, is_last: self.at >= disk })
    }

    /// Makes all that was copied durable.
    pub fn finish(&mut self) -> Result<()> {
        self.commit()
    }

    /// Copies `len` bytes at `self.at`, which begin a cluster, from one place of one file of the source.
    fn copy_run(&mut self, delta: usize, offset: FileOffset, len: u64) -> Result<()> {
        let cluster_bytes = self.source.geometry().cluster_bytes();
        let (first, _) = self.source.geometry().guest_cluster(GuestOffset(self.at));
        let count = len.div_ceil(cluster_bytes);
        let held = |cluster: GuestCluster| self.target.held_at(0, cluster).is_some();
        let clusters: Vec<GuestCluster> =
            (first.0..).take(usize::try_from(count).unwrap_or(usize::MAX)).map(GuestCluster).collect();
        if self.wins == Wins::Target && clusters.iter().all(|&cluster| held(cluster)) {
            return Ok(());
        }
        let span = count.saturating_mul(cluster_bytes);
        let (Ok(used), Ok(span)) = (usize::try_from(len), usize::try_from(span)) else {
            return Err(Error::new(ErrorKind::Memory, "merge: a cluster is larger than memory"));
        };
        if span > self.buffer.len() {
            // A single cluster larger than the buffer: of an image of another writer.
            self.buffer = IoBuf::try_zeroed(span)
                .map_err(|error| Error::io(ErrorKind::Memory, "merge: take a buffer", error))?;
        }
        let bytes = &mut self.buffer.as_mut_slice()[..span];
        let name = self.source.name(delta);
        let failed =
            |error| Error::io(ErrorKind::Read, "merge: read", error).at_path(name).at_offset(offset.0);
        self.source.storage(delta).read_exact_at(offset.0, &mut bytes[..used]).map_err(failed)?;
        bytes[used..].fill(0);
        let mut run = WriteRun::default();
        let cluster_len = usize::try_from(cluster_bytes).unwrap_or(usize::MAX);
        for (number, &cluster) in clusters.iter().enumerate() {
            let content = number * cluster_len;
            let held = self.target.held_at(0, cluster).is_some();
            if self.wins == Wins::Target && held {
                continue;
            }
            let slice = &self.buffer.as_slice()[content..content + cluster_len];
            if self.on_nothing && !held && is_zero(slice) {
                continue;
            }
            let (place, prepared) = match self.target.prepare_write(cluster)? {
                WriteTarget::InPlace(place) => (place, None),
                WriteTarget::Fresh(prepared) => (prepared.offset(), Some(prepared)),
            };
            // A raw file ends with the disk, which may be inside a cluster.
            let room = match self.target.geometry().is_raw() {
                true => self.target.geometry().disk_bytes() - u64::from(cluster.0) * cluster_bytes,
                false => cluster_bytes,
            };
            let take = usize::try_from(room.min(cluster_bytes)).unwrap_or(cluster_len);
            if !run.continues(place, content) {
                run.write(&self.target, self.buffer.as_slice())?;
                run = WriteRun { place, content, ..WriteRun::default() };
            }
            run.len += take;
            run.prepared.extend(prepared);
            self.group_bytes += take as u64;
            self.copied_bytes += take as u64;
        }
        run.write(&self.target, self.buffer.as_slice())
    }

    /// One group of flushes: content, then pointers (crash model, 4.2).
    fn commit(&mut self) -> Result<()> {
        commit(&self.target)?;
        self.group_bytes = 0;
        Ok(())
    }
}

/// Clusters that lie next to each other in the buffer and in the target's file, to be written at once.
#[derive(Default)]
struct WriteRun {
    place: FileOffset,
    /// Where they begin in the buffer.
    content: usize,
    len: usize,
    prepared: Vec<PreparedWrite>,
}

impl WriteRun {
    fn continues(&self, place: FileOffset, content: usize) -> bool {
        self.len > 0 && self.place.0 + self.len as u64 == place.0 && self.content + self.len == content
    }

    /// Writes them, and only then lets the table point to them.
    fn write(self, target: &Chain, buffer: &[u8]) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        target
            .storage(0)
            .write_all_at(self.place.0, &buffer[self.content..self.content + self.len])
            .map_err(|error| {
                Error::io(ErrorKind::Write, "merge: write", error)
                    .at_path(target.name(0))
                    .at_offset(self.place.0)
            })?;
        self.prepared.into_iter().for_each(PreparedWrite::publish);
        Ok(())
    }
}

/// Makes what was written into the top of a chain durable, content before pointers. Nobody else writes it.
pub(crate) fn commit(chain: &Chain) -> Result<()> {
    let storage = chain.storage(chain.top());
    let plan = chain.seal();
    let written = (|| {
        if !mutant::is_active(Mutant::MergedTableEarly) {
            storage.sync_data()?;
        }
        if plan.is_empty() {
            return Ok(());
        }
        for (offset, bytes) in &plan.writes {
            storage.write_all_at(offset.0, bytes)?;
        }
        storage.sync_data()
    })();
    match written {
        Ok(()) => {
            let _nothing_was_cleared = chain.committed(plan);
            Ok(())
        }
        Err(error) => {
            chain.failed(plan);
            Err(Error::io(ErrorKind::Sync, "make the copied clusters durable", error)
                .at_path(chain.name(chain.top()))
                .advise("look at the host's storage, then run the same command again: it goes on from here"))
        }
    }
}
