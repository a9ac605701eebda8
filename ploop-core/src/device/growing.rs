//! Giving an image another size: moves the clusters that lie in the way, empties the room of the longer table, writes
//! the header. The planning is [`format::relocate`](crate::format::relocate)'s; the order of the steps is in its module.
//!
//! The same code works on a closed image and on a disk whose writes are held ([`Disk::grow`](super::Disk::grow)); the
//! second kind must keep readers away from a cluster while it moves, which is what [`Watch::lock`] is for.
//!
//! Cut anywhere before the header: every cluster is at its old or at its new place, the image has its old size. A cut
//! run is repeated from the start; what was moved is not in the way any more.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::alloc::reserve;
use crate::format::{Chain, Move, ResizePlan};
use crate::io::{Allocation, IoBuf, Storage, StorageExt};
use crate::mutant::{self, Mutant};
use crate::units::FileOffset;

/// Bytes copied, zeroed or filled with entries at once.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes moved between two syncs, about.
const GROUP_BYTES: u64 = 64 << 20;
/// Clusters moved between two syncs, at most.
const GROUP_CLUSTERS: usize = 1024;
/// The first bytes of a range that is zeroed are written, up to a multiple of this: the table's last sector is shared.
const HEAD_UNIT: u64 = 64 << 10;

/// Looks on while an image gets another size.
pub trait Watch {
    /// These clusters are about to be moved: nobody may use their old places until [`unlock`](Self::unlock).
    fn lock(&mut self, _moves: &[Move]) -> Result<()> {
        Ok(())
    }

    /// The table in memory names the new places, or the group has failed.
    fn unlock(&mut self, _moves: &[Move]) {}

    /// So many bytes are moved. An error ends the work in a valid state: the old size.
    fn advance(&mut self, bytes: u64) -> Result<()>;
}

/// How far a change of size got that failed.
#[derive(Debug)]
pub struct Cut {
    /// Why.
    pub error: Error,
    /// Clusters were moved: the chain's knowledge of free places is outdated.
    pub moved: bool,
    /// What the file holds is not known: a sync or a write of table or header failed.
    pub poisoned: bool,
}

fn failed(kind: ErrorKind, operation: &'static str, chain: &Chain) -> impl Fn(std::io::Error) -> Error {
    let name = chain.name(chain.top()).to_path_buf();
    move |cause| Error::io(kind, operation, cause).at_path(&name)
}

/// Does what `plan` says; the chain with the new size. Nothing else writes to the image meanwhile, and every change of
/// its table is durable.
pub fn apply(
    chain: &Chain,
    plan: &ResizePlan,
    watch: &mut dyn Watch,
) -> std::result::Result<Arc<Chain>, Cut> {
    let harmless = |error: Error, moved: bool| Cut { error, moved, poisoned: false };
    let fatal = |error: Error| Cut { error, moved: true, poisoned: true };
    let storage = chain.storage(chain.top());
    if chain.header(chain.top()).is_some() {
        make_room(chain, storage, plan).map_err(|error| harmless(error, false))?;
        move_all(chain, plan, watch)?;
        let moved = !plan.moves.is_empty();
        chain.clear_entries(&plan.clears).map_err(|error| harmless(error, moved))?;
        flush(chain).map_err(fatal)?;
        empty_the_table(chain, storage, plan).map_err(|error| harmless(error, moved))?;
        if !mutant::is_active(Mutant::HeaderBeforeTableSync) {
            storage
                .sync_data()
                .map_err(failed(ErrorKind::Sync, "sync the longer table", chain))
                .map_err(fatal)?;
        }
    }
    chain.commit_resize(plan).map_err(fatal)
}

/// Does the first moves of `plan`, of about `bytes_max` bytes in all. The chain must be opened anew afterwards.
pub(crate) fn move_some(
    chain: &Chain,
    plan: &ResizePlan,
    bytes_max: u64,
    watch: &mut dyn Watch,
) -> std::result::Result<(), Cut> {
    let count = usize::try_from(bytes_max / plan.geometry.cluster_bytes()).unwrap_or(usize::MAX).max(1);
    let mut first = plan.clone();
    first.moves.truncate(count);
    let storage = chain.storage(chain.top());
    make_room(chain, storage, plan).map_err(|error| Cut { error, moved: false, poisoned: false })?;
    move_all(chain, &first, watch)
}

fn move_all(chain: &Chain, plan: &ResizePlan, watch: &mut dyn Watch) -> std::result::Result<(), Cut> {
    let storage = chain.storage(chain.top());
    let mut moved = false;
    for group in groups(plan) {
        watch.lock(group).map_err(|error| Cut { error, moved, poisoned: false })?;
        let result = move_group(chain, storage, plan, group, &mut moved);
        watch.unlock(group);
        result?;
        let bytes = group.len() as u64 * plan.geometry.cluster_bytes();
        watch.advance(bytes).map_err(|error| Cut { error, moved, poisoned: false })?;
    }
    Ok(())
}

/// The moves in groups: one pair of syncs for each.
fn groups(plan: &ResizePlan) -> impl Iterator<Item = &[Move]> {
    let clusters = usize::try_from(GROUP_BYTES / plan.geometry.cluster_bytes()).unwrap_or(GROUP_CLUSTERS);
    plan.moves.chunks(clusters.clamp(1, GROUP_CLUSTERS))
}

/// Takes all blocks that will be needed: a full host shows here, where nothing has changed.
fn make_room(chain: &Chain, storage: &dyn Storage, plan: &ResizePlan) -> Result<()> {
    let no_room = |cause| {
        failed(ErrorKind::Allocate, "reserve blocks for the longer table", chain)(cause)
            .advise("make room on the host file system; what the disk holds is not affected")
    };
    let len = storage.len().map_err(failed(ErrorKind::Stat, "read the image's length", chain))?;
    if len < plan.file_bytes {
        reserve(storage, len, plan.file_bytes - len).map_err(no_room)?;
    }
    for one in &plan.moves {
        // A free place inside the file may be a hole.
        let place = plan.geometry.file_offset(one.to).0;
        reserve(storage, place, plan.geometry.cluster_bytes()).map_err(no_room)?;
    }
    Ok(())
}

fn move_group(
    chain: &Chain,
    storage: &dyn Storage,
    plan: &ResizePlan,
    group: &[Move],
    moved: &mut bool,
) -> std::result::Result<(), Cut> {
    let before = *moved;
    let harmless = |error: Error| Cut { error, moved: before, poisoned: false };
    let fatal = |error: Error| Cut { error, moved: true, poisoned: true };
    let mut piece = IoBuf::try_zeroed(
        PIECE_BYTES.min(usize::try_from(plan.geometry.cluster_bytes()).unwrap_or(PIECE_BYTES)),
    )
    .map_err(|cause| harmless(Error::io(ErrorKind::Memory, "move clusters: take a buffer", cause)))?;
    for one in group {
        copy(chain, storage, plan, one, piece.as_mut_slice())
            .map_err(|error| harmless(error.at_cluster(u64::from(one.guest.0))))?;
    }
    if !mutant::is_active(Mutant::MoveNotSynced) {
        storage.sync_data().map_err(failed(ErrorKind::Sync, "sync moved clusters", chain)).map_err(fatal)?;
    }
    chain.enter_moves(group).map_err(harmless)?;
    *moved = true;
    flush(chain).map_err(fatal)
}

fn copy(chain: &Chain, storage: &dyn Storage, plan: &ResizePlan, one: &Move, piece: &mut [u8]) -> Result<()> {
    let geometry = &plan.geometry;
    let (from, to) = (geometry.file_offset(one.from).0, geometry.file_offset(one.to).0);
    let mut done = 0;
    while done < geometry.cluster_bytes() {
        let left = usize::try_from(geometry.cluster_bytes() - done).unwrap_or(usize::MAX);
        let len = left.min(piece.len());
        let piece = &mut piece[..len];
        storage
            .read_exact_at(from + done, piece)
            .map_err(failed(ErrorKind::Relocation, "move a cluster: read it", chain))
            .map_err(|error| error.at_offset(from + done))?;
        storage
            .write_all_at(to + done, piece)
            .map_err(failed(ErrorKind::Relocation, "move a cluster: write it to its new place", chain))
            .map_err(|error| error.at_offset(to + done))?;
        done += len as u64;
    }
    Ok(())
}

/// One group of flushes: what was entered or cleared becomes durable. Its content is synced already.
fn flush(chain: &Chain) -> Result<()> {
    let storage = chain.storage(chain.top());
    let sealed = chain.seal();
    let written = sealed.writes.iter().try_for_each(|(offset, bytes)| {
        storage
            .write_all_at(offset.0, bytes)
            .map_err(failed(ErrorKind::Write, "write block allocation table", chain))
            .map_err(|error| error.at_offset(offset.0))
    });
    let result = match written {
        Ok(()) if sealed.is_empty() => Ok(()),
        Ok(()) => storage.sync_data().map_err(failed(ErrorKind::Sync, "sync block allocation table", chain)),
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => {
            // The old places are free only in a chain that is opened anew.
            drop(chain.committed(sealed));
            Ok(())
        }
        Err(error) => {
            chain.failed(sealed);
            Err(error.advise("close the image, look at the host's storage, then run the command again"))
        }
    }
}

/// Zeroes the room of the longer table and enters what was allocated in advance; not synced.
fn empty_the_table(chain: &Chain, storage: &dyn Storage, plan: &ResizePlan) -> Result<()> {
    for &(offset, len) in &plan.zeroes {
        zero(storage, offset, len)
            .map_err(failed(ErrorKind::Write, "zero the room of the longer table", chain))
            .map_err(|error| error.at_offset(offset.0))?;
    }
    let step = u32::try_from(PIECE_BYTES / 4).unwrap_or(u32::MAX);
    for preallocation in &plan.preallocations {
        let mut from = 0;
        while from < preallocation.count {
            let to = from.saturating_add(step).min(preallocation.count);
            let (offset, bytes) = preallocation.entries(&plan.geometry, from, to)?;
            storage
                .write_all_at(offset.0, &bytes)
                .map_err(failed(ErrorKind::Write, "write the longer table", chain))
                .map_err(|error| error.at_offset(offset.0))?;
            from = to;
        }
    }
    Ok(())
}

/// So much of a longer table is written, not only reserved: that of 2 TiB in clusters of 1 MiB.
const WRITTEN_BYTES_MAX: u64 = 8 << 20;

/// Makes a range read as zeros, with blocks of its own.
fn zero(storage: &dyn Storage, offset: FileOffset, len: u64) -> std::io::Result<()> {
    let end = offset.0 + len;
    let head_end = offset.0.next_multiple_of(HEAD_UNIT).min(end);
    write_zeros(storage, offset.0, head_end)?;
    if head_end == end {
        return Ok(());
    }
    // Blocks that are only reserved are a hole to the original's check. What takes long is not worth holding writes for.
    if end - head_end <= WRITTEN_BYTES_MAX {
        return write_zeros(storage, head_end, end);
    }
    match storage.allocate(head_end, end - head_end, Allocation::Zero) {
        Ok(()) => Ok(()),
        // Whatever the reason: writing will tell if it is a serious one.
        Err(_) => write_zeros(storage, head_end, end),
    }
}

fn write_zeros(storage: &dyn Storage, start: u64, end: u64) -> std::io::Result<()> {
    let zeros = IoBuf::try_zeroed(PIECE_BYTES.min(usize::try_from(end - start).unwrap_or(PIECE_BYTES)))?;
    let mut at = start;
    while at < end {
        let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeros.len());
        storage.write_all_at(at, &zeros.as_slice()[..len])?;
        at += len as u64;
    }
    Ok(())
}
