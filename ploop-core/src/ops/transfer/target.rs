//! Where it goes: a new image or a new raw file.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::{Chain, Mapping, PreparedWrite, WriteTarget};
use crate::io::buffer::is_zero;
use crate::io::{Allocation, Storage, StorageExt};
use crate::units::{FileOffset, GuestCluster, GuestOffset};

use super::{Digest, Presence};

/// Runs of zeros of this many bytes, aligned to it, become holes of a raw file: the block of common file systems.
const HOLE_BYTES: usize = 4096;

/// Runs of at least this many bytes get their blocks before they are written: file systems let several writes go on at
/// once only where there are blocks.
const RESERVE_BYTES: usize = 1 << 20;

/// A file under construction, or a finished one that is read back. Used from several threads.
pub(in crate::ops) trait Target: Sync {
    /// The smallest range that is stored or not; a power of two or a cluster.
    fn unit_bytes(&self) -> u64;
    /// Stores a piece that begins at a multiple of the unit and is whole units long; `presence` says what the source
    /// has of a unit. With `digest`, returns that of what was stored.
    fn put(
        &self,
        at: u64,
        bytes: &[u8],
        presence: &dyn Fn(Extent) -> Presence,
        digest: bool,
    ) -> Result<Option<Digest>>;
    /// Makes durable what was put before.
    fn sync(&self) -> Result<()>;
    /// Reads a piece back, into `buffer`, and gives the digest that [`put`](Self::put) has given.
    fn digest(&self, piece: Extent, buffer: &mut [u8]) -> Result<Digest>;
}

/// Where the clusters of an image are: what its table says, as a digest. Nothing of a raw file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Layout(Option<Digest>);

impl Layout {
    /// Of a raw file.
    pub(in crate::ops) const RAW: Self = Self(None);

    /// Of the one image of a chain.
    pub(in crate::ops) fn of(chain: &Chain) -> Self {
        let (end, cluster_bytes) = (chain.geometry().disk_bytes(), chain.geometry().cluster_bytes());
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < end {
            let mapping = chain.map(GuestOffset(at), end - at);
            let run_end = at.saturating_add(mapping.len()).min(end);
            if let Mapping::Data { offset, .. } = mapping {
                let clusters = (at..run_end).step_by(usize::try_from(cluster_bytes).unwrap_or(usize::MAX));
                for cluster in clusters {
                    hasher.update(&cluster.to_le_bytes()).update(&(offset.0 + (cluster - at)).to_le_bytes());
                }
            }
            at = run_end;
        }
        Self(Some(*hasher.finalize().as_bytes()))
    }
}

/// A new image, alone in its chain: of a delta, what is below it does not matter here.
pub(in crate::ops) struct ImageTarget {
    chain: Arc<Chain>,
    /// Every cluster has its place from the start.
    preallocated: bool,
    /// So that the clusters of one piece lie one after the other.
    allocation: Mutex<()>,
}

impl ImageTarget {
    /// An image of one file; open for writing to be filled, for reading to be compared.
    pub(in crate::ops) fn new(chain: Arc<Chain>, preallocated: bool) -> Self {
        Self { chain, preallocated, allocation: Mutex::new(()) }
    }

    /// Reserves places for some clusters of the disk.
    fn reserve(&self, clusters: &[u32]) -> Result<Vec<Place>> {
        let _ordered = self.allocation.lock().unwrap_or_else(PoisonError::into_inner);
        clusters
            .iter()
            .map(|&cluster| {
                Ok(match self.chain.prepare_write(GuestCluster(cluster))? {
                    WriteTarget::InPlace(offset) => Place { offset, prepared: None },
                    WriteTarget::Fresh(prepared) => {
                        Place { offset: prepared.offset(), prepared: Some(prepared) }
                    }
                })
            })
            .collect()
    }
}

/// Where one cluster goes.
struct Place {
    offset: FileOffset,
    prepared: Option<PreparedWrite>,
}

fn cluster_number(at: u64, cluster_bytes: u64) -> Result<u32> {
    u32::try_from(at / cluster_bytes)
        .map_err(|_| Error::new(ErrorKind::Parameter, format!("guest byte {at} is on no disk")))
}

fn to_usize(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .map_err(|_| Error::new(ErrorKind::Memory, format!("hold {bytes} bytes at once: too many")))
}

impl Target for ImageTarget {
    fn unit_bytes(&self) -> u64 {
        self.chain.geometry().cluster_bytes()
    }

    fn put(
        &self,
        at: u64,
        bytes: &[u8],
        presence: &dyn Fn(Extent) -> Presence,
        digest: bool,
    ) -> Result<Option<Digest>> {
        let cluster_bytes = self.unit_bytes();
        let (unit, first) = (to_usize(cluster_bytes)?, cluster_number(at, cluster_bytes)?);
        let mut hasher = digest.then(blake3::Hasher::new);
        let mut stored = Vec::new();
        for (index, cluster) in (first..).zip(bytes.chunks_exact(unit)) {
            let start = u64::from(index) * cluster_bytes;
            let kept = match presence(Extent::between(start, start + cluster_bytes)) {
                Presence::Absent => false,
                Presence::Alone => !is_zero(cluster),
                Presence::Over => true,
            };
            if kept {
                if let Some(hasher) = &mut hasher {
                    hasher.update(&index.to_le_bytes()).update(cluster);
                }
                stored.push(index);
            }
        }
        let mut places = self.reserve(&stored)?;
        let storage = self.chain.storage(self.chain.top());
        let mut from = 0;
        while from < places.len() {
            // One write for clusters that follow each other on the disk and in the file.
            let mut to = from + 1;
            while to < places.len()
                && stored[to] == stored[to - 1] + 1
                && places[to].offset.0 == places[to - 1].offset.0 + cluster_bytes
            {
                to += 1;
            }
            let start = to_usize(u64::from(stored[from] - first))? * unit;
            let run = &bytes[start..start + (to - from) * unit];
            let offset = places[from].offset.0;
            storage.write_all_at(offset, run).map_err(|cause| {
                Error::io(ErrorKind::Write, "write guest data", cause)
                    .at_path(self.chain.name(self.chain.top()))
                    .at_offset(offset)
            })?;
            for place in &mut places[from..to] {
                if let Some(prepared) = place.prepared.take() {
                    prepared.publish();
                }
            }
            from = to;
        }
        Ok(hasher.map(|hasher| *hasher.finalize().as_bytes()))
    }

    fn sync(&self) -> Result<()> {
        let top = self.chain.top();
        self.chain.storage(top).sync_data().map_err(|cause| {
            Error::io(ErrorKind::Sync, "sync the new image", cause).at_path(self.chain.name(top))
        })
    }

    fn digest(&self, piece: Extent, buffer: &mut [u8]) -> Result<Digest> {
        let cluster_bytes = self.unit_bytes();
        let top = self.chain.top();
        let first = cluster_number(piece.start(), cluster_bytes)?;
        let clusters = to_usize(piece.len().div_ceil(cluster_bytes))?;
        let unit = to_usize(cluster_bytes)?;
        let places: Vec<_> =
            (first..).take(clusters).map(|index| self.chain.held_at(top, GuestCluster(index))).collect();
        let read = |offset: FileOffset, buffer: &mut [u8]| {
            self.chain.storage(top).read_padded_at(offset.0, buffer).map_err(|cause| {
                Error::io(ErrorKind::Read, "read back what was written", cause)
                    .at_path(self.chain.name(top))
                    .at_offset(offset.0)
            })
        };
        let mut from = 0;
        while from < clusters {
            let Some(offset) = places[from] else {
                from += 1;
                continue;
            };
            let mut to = from + 1;
            while to < clusters
                && places[to].is_some_and(|next| next.0 == offset.0 + (to - from) as u64 * cluster_bytes)
            {
                to += 1;
            }
            read(offset, &mut buffer[from * unit..to * unit])?;
            from = to;
        }
        let mut hasher = blake3::Hasher::new();
        for ((index, place), cluster) in (first..).zip(&places).zip(buffer.chunks_exact(unit)) {
            // In a preallocated image a cluster may have a place without ever having been stored.
            let kept = place.is_some() && !(self.preallocated && is_zero(cluster));
            if kept {
                hasher.update(&index.to_le_bytes()).update(cluster);
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

/// Makes a filled image durable and closes it: data, sync, table, sync, in-use mark.
pub(in crate::ops) fn finish_image(chain: &Chain) -> Result<()> {
    let storage = chain.storage(chain.top());
    let sync = || {
        storage
            .sync_data()
            .map_err(|cause| Error::io(ErrorKind::Sync, "sync the new image", cause))
            .map_err(|error| error.at_path(chain.name(chain.top())))
    };
    let plan = chain.seal();
    let written = sync().and_then(|()| {
        for (offset, bytes) in &plan.writes {
            storage.write_all_at(offset.0, bytes).map_err(|cause| {
                Error::io(ErrorKind::Write, "write the table of the new image", cause)
                    .at_path(chain.name(chain.top()))
                    .at_offset(offset.0)
            })?;
        }
        sync()
    });
    match written {
        Ok(()) => {
            // Nothing was ever cleared, so nothing leaves quarantine.
            chain.committed(plan);
            chain.close()
        }
        Err(error) => {
            chain.failed(plan);
            Err(error)
        }
    }
}

/// The digest of bytes without the zeros at their end: a piece may reach past what there is.
fn digest_of(bytes: &[u8]) -> Digest {
    let zeros: usize = bytes.rchunks(HOLE_BYTES).take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
    let bytes = &bytes[..bytes.len() - zeros];
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    *blake3::hash(&bytes[..end]).as_bytes()
}

/// A new raw file, sparse where there are zeros.
pub(in crate::ops) struct RawTarget {
    storage: Arc<dyn Storage>,
    len: u64,
}

impl RawTarget {
    /// A file of `len` bytes, which it has already.
    pub(in crate::ops) fn new(storage: Arc<dyn Storage>, len: u64) -> Self {
        Self { storage, len }
    }

    /// Gives the file its exact length and makes it durable.
    pub(in crate::ops) fn finish(&self) -> Result<()> {
        self.finish_at(self.len)
    }

    /// As [`finish`](Self::finish) with a length that is known only now.
    pub(in crate::ops) fn finish_at(&self, len: u64) -> Result<()> {
        self.storage
            .set_len(len)
            .map_err(|cause| Error::io(ErrorKind::Truncate, "give the raw file its length", cause))?;
        self.sync()
    }
}

impl Target for RawTarget {
    fn unit_bytes(&self) -> u64 {
        HOLE_BYTES as u64
    }

    fn put(
        &self,
        at: u64,
        bytes: &[u8],
        _presence: &dyn Fn(Extent) -> Presence,
        digest: bool,
    ) -> Result<Option<Digest>> {
        let len = to_usize(self.len.saturating_sub(at).min(bytes.len() as u64))?;
        let bytes = &bytes[..len];
        let mut from = 0;
        while from < len {
            let blocks = |at: usize| bytes[at..].chunks(HOLE_BYTES);
            from += blocks(from).take_while(|block| is_zero(block)).map(<[u8]>::len).sum::<usize>();
            let run: usize = blocks(from).take_while(|block| !is_zero(block)).map(<[u8]>::len).sum();
            if run > 0 {
                let offset = at + from as u64;
                if run >= RESERVE_BYTES {
                    self.storage.allocate(offset, run as u64, Allocation::Reserve).map_err(|cause| {
                        Error::io(ErrorKind::Allocate, "reserve blocks of the raw file", cause)
                            .at_offset(offset)
                            .advise("make room on the host file system")
                    })?;
                }
                self.storage.write_all_at(offset, &bytes[from..from + run]).map_err(|cause| {
                    Error::io(ErrorKind::Write, "write the raw file", cause).at_offset(offset)
                })?;
            }
            from += run;
        }
        Ok(digest.then(|| digest_of(bytes)))
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync_data().map_err(|cause| Error::io(ErrorKind::Sync, "sync the raw file", cause))
    }

    fn digest(&self, piece: Extent, buffer: &mut [u8]) -> Result<Digest> {
        let len = to_usize(piece.end().min(self.len).saturating_sub(piece.start()))?.min(buffer.len());
        let buffer = &mut buffer[..len];
        // Zeros at the end were not written: the file gets its length last.
        self.storage.read_padded_at(piece.start(), buffer).map_err(|cause| {
            Error::io(ErrorKind::Read, "read back what was written", cause).at_offset(piece.start())
        })?;
        Ok(digest_of(buffer))
    }
}
