//! What a change of the disk's size asks of an image: which clusters lie in the way of a longer table and where they
//! go, which entries lie past the end, what must read as zeros before the new header counts. Planning only: the caller
//! moves the bytes.
//!
//! Order of the caller, each line durable before the next (crash model, section 5):
//!
//! 1. for groups of [`ResizePlan::moves`]: copy, sync, [`Chain::enter_moves`], flush;
//! 2. [`Chain::clear_entries`] with [`ResizePlan::clears`], flush;
//! 3. zero [`ResizePlan::zeroes`], write the entries of [`ResizePlan::preallocations`], sync;
//! 4. [`Chain::commit_resize`]: the header, in one write. That is the moment of the new size.
//!
//! Only the top changes; deltas below keep their sizes ([`sizes`](super::sizes)). A top that becomes smaller on snapshots
//! loses its entries past the new end by the header alone, all at once: cleared before, with the old size still in force,
//! they would let the bytes of a snapshot be seen. Their slots are zeroed behind the header.
//!
//! Invariants of a plan: sources and destinations of moves are disjoint; no destination is named by an entry; every
//! destination lies at or past the new data start, and an entry can name it.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileCluster, FileOffset, GuestCluster, Sectors};

use super::alloc::ClusterSet;
use super::chain::Chain;
use super::delta::{Delta, Image};
use super::geometry::{ENTRY_BYTES, Geometry};
use super::header::HEADER_BYTES;
use super::sizes::scrub_slots;
use crate::mutant::{self, Mutant};

/// One cluster that changes its place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Whose content it is.
    pub guest: GuestCluster,
    /// Where it is.
    pub from: FileCluster,
    /// Where it goes: a place that no entry names.
    pub to: FileCluster,
}

/// Places for a run of clusters of a new range, in order, past the end of the file: zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preallocation {
    /// The first cluster of the run.
    pub guest: GuestCluster,
    /// Its place; the others follow.
    pub place: FileCluster,
    /// How many.
    pub count: u32,
}

/// What has to be done to give a disk another size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizePlan {
    /// The sizes afterwards.
    pub geometry: Geometry,
    /// Clusters in the way of the longer table, by place.
    pub moves: Vec<Move>,
    /// Clusters whose entries lie past the present or the new end.
    pub clears: Vec<GuestCluster>,
    /// Places that those leave, ascending.
    pub freed: Vec<FileCluster>,
    /// What must read as zeros before the header is written: begin and length in bytes.
    pub zeroes: Vec<(FileOffset, u64)>,
    /// Places for the new range, ascending: for all of it, if it gets them at once, or for what must hide lower deltas.
    pub preallocations: Vec<Preallocation>,
    /// How long the file must be, in bytes, for all destinations, the table and the preallocation.
    pub file_bytes: u64,
}

/// The lowest free clusters of a file, one after the other.
struct FreePlaces<'a> {
    used: &'a ClusterSet,
    next: u32,
}

impl FreePlaces<'_> {
    fn take(&mut self, geometry: &Geometry) -> Result<FileCluster> {
        let place = self
            .used
            .first_absent(self.next, geometry.file_clusters_max())
            .ok_or_else(|| Error::new(ErrorKind::Allocate, "resize: the table cannot point further"))?;
        self.next = place.saturating_add(1);
        geometry.cluster_to_entry(FileCluster(place))?;
        Ok(FileCluster(place))
    }
}

impl Chain {
    /// What has to be done to give the disk the size `disk` (see [`Geometry::rounded`]); `preallocate` gives every
    /// cluster of the new range its place at once. Changes nothing. Nothing of the chain is being written meanwhile.
    ///
    /// Fails with `Parameter` beyond a limit of the version.
    pub fn plan_resize(&self, disk: Sectors, preallocate: bool) -> Result<ResizePlan> {
        let top = self.top_delta();
        self.plan(top, disk, preallocate).map_err(|error| error.at_path(&top.name))
    }

    fn plan(&self, top: &Delta, disk: Sectors, preallocate: bool) -> Result<ResizePlan> {
        let old = &top.geometry;
        let geometry = old.resized(disk)?;
        let shrinks = geometry.disk_bytes() < old.disk_bytes();
        let Some(image) = &top.image else {
            let file_bytes = geometry.disk_bytes();
            return Ok(ResizePlan::empty(geometry, file_bytes));
        };
        let file_len = top
            .storage
            .len()
            .map_err(|source| Error::io(ErrorKind::Stat, "resize: read the file's length", source))?;
        // Slots past the end of either size hold nothing that a guest sees.
        let kept = old.disk_bytes().min(geometry.disk_bytes()).div_ceil(old.cluster_bytes());
        let first = geometry.first_data_cluster().0;
        let (mut used, mut in_the_way) = (ClusterSet::default(), Vec::new());
        let mut plan = ResizePlan::empty(geometry, 0);
        let mut wrong = None;
        image.bat.table().for_each_entry(old.entries(), |guest, raw| {
            match old.entry_to_cluster(raw) {
                Ok(Some(place)) if u64::from(guest.0) >= kept => {
                    if !shrinks || self.top() == 0 {
                        plan.clears.push(guest);
                    }
                    plan.freed.push(place);
                    // Not a destination either: it is free only when its clearing is durable.
                    used.insert(place.0);
                }
                Ok(Some(place)) => {
                    used.insert(place.0);
                    if place.0 < first {
                        in_the_way.push((place, guest));
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    wrong.get_or_insert(error.at_cluster(u64::from(guest.0)));
                }
            }
        });
        if let Some(error) = wrong {
            return Err(error);
        }
        in_the_way.sort_unstable();
        plan.freed.sort_unstable();
        let mut free = FreePlaces { used: &used, next: first };
        for (from, guest) in in_the_way {
            let to = free.take(&plan.geometry)?;
            plan.moves.push(Move { guest, from, to });
        }
        let geometry = &plan.geometry;
        let mut end = geometry.data_start().0.max(geometry.cluster_bytes());
        if let Some(last) = plan.moves.last() {
            end = end.max(geometry.file_end(last.to).0);
        }
        let past_file = file_len.saturating_sub(geometry.phase_bytes()).div_ceil(geometry.cluster_bytes());
        let mut place = u32::try_from(past_file).unwrap_or(u32::MAX).max(free.next);
        let mut runs: Vec<(u32, u32)> = Vec::new();
        if preallocate && geometry.entries() > old.entries() {
            runs.push((old.entries(), geometry.entries() - old.entries()));
        } else if geometry.disk_bytes() > old.disk_bytes() && !mutant::is_active(Mutant::GrownUnhidden) {
            for guest in self.hidden_by_growth(old, geometry)? {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == guest => *count += 1,
                    _ => runs.push((guest, 1)),
                }
            }
        }
        for (guest, count) in runs {
            let last = place.saturating_add(count - 1);
            geometry.cluster_to_entry(FileCluster(last))?;
            end = end.max(geometry.file_end(FileCluster(last)).0);
            let (guest, from) = (GuestCluster(guest), FileCluster(place));
            plan.preallocations.push(Preallocation { guest, place: from, count });
            place = last.saturating_add(1);
        }
        plan.file_bytes = end.max(file_len);
        if !shrinks {
            plan.zeroes = zeroes(old, geometry, image, &plan.moves);
        }
        Ok(plan)
    }

    /// Enters new places whose content is complete and synced; the next flush makes them durable.
    pub fn enter_moves(&self, moves: &[Move]) -> Result<()> {
        let image = self.open_image("enter moved clusters")?;
        for one in moves {
            let entry = self.geometry().cluster_to_entry(one.to)?;
            let now = self.geometry().entry_to_cluster(image.bat.table().entry(one.guest))?;
            if now != Some(one.from) {
                return Err(Error::new(
                    ErrorKind::Relocation,
                    "enter moved clusters: one is no longer where it was",
                )
                .at_path(&self.top_delta().name)
                .at_cluster(u64::from(one.guest.0)));
            }
            image.bat.publish(one.guest, entry);
        }
        Ok(())
    }

    /// Clears entries that no guest sees, in memory; the next flush makes that durable.
    pub fn clear_entries(&self, clusters: &[GuestCluster]) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        let image = self.open_image("clear entries past the end")?;
        for &cluster in clusters {
            image.bat.clear(cluster).map_err(|error| error.at_path(&self.top_delta().name))?;
        }
        Ok(())
    }

    /// Writes the new sizes into the header and syncs, or sets the length of a raw disk; then opens the files anew. The
    /// image has the new size when this succeeds, and this chain writes nothing any more.
    pub fn commit_resize(&self, plan: &ResizePlan) -> Result<Arc<Self>> {
        let top = self.top_delta();
        match &top.image {
            Some(image) => {
                image.bat.replace_header(&top.storage, |header| header.resized(&plan.geometry)).and_then(
                    |()| match self.top() > 0 && plan.geometry.disk_bytes() < top.geometry.disk_bytes() {
                        true => scrub_slots(&*top.storage, &plan.geometry),
                        false => Ok(()),
                    },
                )
            }
            None => top
                .storage
                .set_len(plan.geometry.disk_bytes())
                .map_err(|source| Error::io(ErrorKind::Truncate, "resize the raw disk", source))
                .and_then(|()| {
                    top.storage
                        .sync_data()
                        .map_err(|source| Error::io(ErrorKind::Sync, "resize the raw disk", source))
                }),
        }
        .map_err(|error| error.at_path(&top.name))?;
        self.reopened(FileCluster(0))
    }

    fn open_image(&self, operation: &str) -> Result<&Image> {
        let top = self.top_delta();
        let image = top.image.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Parameter, format!("{operation}: a raw disk has no table"))
                .at_path(&top.name)
        })?;
        image.bat.check_open(operation).map_err(|error| error.at_path(&top.name))?;
        Ok(image)
    }
}

/// What of the file becomes visible, or table, with the longer disk: the rest of a cluster that the present end cuts, and
/// everything from the end of the present table to the new data start.
fn zeroes(old: &Geometry, new: &Geometry, image: &Image, moves: &[Move]) -> Vec<(FileOffset, u64)> {
    let mut zeroes = Vec::new();
    let within = old.disk_bytes() % old.cluster_bytes();
    if within > 0 {
        let guest = GuestCluster(u32::try_from(old.disk_bytes() / old.cluster_bytes()).unwrap_or(u32::MAX));
        let moved = moves.iter().find(|one| one.guest == guest).map(|one| one.to);
        let place = moved.or_else(|| old.entry_to_cluster(image.bat.table().entry(guest)).ok().flatten());
        if let Some(place) = place {
            zeroes.push((FileOffset(old.file_offset(place).0 + within), old.cluster_bytes() - within));
        }
    }
    if new.entries() > old.entries() {
        let start = old.table_bytes();
        zeroes.push((FileOffset(start), new.data_start().0 - start));
    }
    zeroes
}

impl ResizePlan {
    fn empty(geometry: Geometry, file_bytes: u64) -> Self {
        Self {
            geometry,
            moves: Vec::new(),
            clears: Vec::new(),
            freed: Vec::new(),
            zeroes: Vec::new(),
            preallocations: Vec::new(),
            file_bytes,
        }
    }

    /// Bytes that have to be moved.
    pub fn moved_bytes(&self) -> u64 {
        self.moves.len() as u64 * self.geometry.cluster_bytes()
    }
}

impl Preallocation {
    /// The table entries of clusters `from..to` of the run, counted from its first, and where they lie in the file.
    pub fn entries(&self, geometry: &Geometry, from: u32, to: u32) -> Result<(FileOffset, Vec<u8>)> {
        let offset = HEADER_BYTES + ENTRY_BYTES * (u64::from(self.guest.0) + u64::from(from));
        let mut bytes = Vec::new();
        for index in from..to.min(self.count) {
            let place = FileCluster(self.place.0.saturating_add(index));
            bytes.extend(geometry.cluster_to_entry(place)?.to_le_bytes());
        }
        Ok((FileOffset(offset), bytes))
    }
}
