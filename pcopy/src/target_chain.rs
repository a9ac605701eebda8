//! A copy with all its snapshots: a file for each delta, and a descriptor with the same tree of states.
//!
//! * Nothing of the stream reaches a name: the first delta gets the name the operator gave, every other that name and a
//!   new GUID behind it, as a snapshot would; while incoming, the copy's and the delta's number.
//! * Each delta is written through the chain it will be read through: on what it stands on, whole and closed.
//! * A delta that is whole stays locked as by a reader until the end, so that nobody takes it for a left-over.
//! * The descriptor is last. What a receiver that is killed just between has put in place is known by its plan
//!   ([`placing`](crate::target_placing)) and goes with the next attempt.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ploop_core::format::{DiskDescriptor, Geometry, Guid, Mode, TreeState, Version, image_name};
use ploop_core::io::file::Caching;
use ploop_core::io::lock::Ownership;
use ploop_core::io::{IoBuf, Storage};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::source::Reader;
use crate::stats::hexadecimal;
use crate::target::{OpenImage, Place, TABLE_BYTES_MAX, Target, closed};
use crate::target_placing::INCOMING;
use crate::wire::{Delta, Hello, ImageKind};
use ploop_core::io::temporary::stem;

/// The largest tables of one chain that a stream may make us keep in memory.
const TABLES_BYTES_MAX: u64 = 4 * TABLE_BYTES_MAX;

/// One delta that was begun.
struct Received {
    delta: Delta,
    /// Its names, while it is incoming and for good.
    incoming: String,
    name: String,
    table_bytes: u64,
    /// Of a whole one: holds its lock.
    _storage: Option<Arc<dyn Storage>>,
}

/// All deltas of a disk, the last of those that were begun being written.
pub(crate) struct ChainTarget {
    place: Place,
    copy_id: String,
    disk_bytes: u64,
    deltas: Vec<Received>,
    current: Option<OpenImage>,
    /// Complete once the current state has begun.
    descriptor: Option<DiskDescriptor>,
    expected: u32,
}

fn out_of_order() -> Error {
    Error::new(ErrorKind::Protocol, "a delta came that may not come now")
}

impl ChainTarget {
    /// Nothing yet, in a folder where everything is free.
    pub(crate) fn new(place: Place, hello: &Hello) -> Self {
        Self {
            place,
            copy_id: hexadecimal(&hello.copy_id),
            disk_bytes: hello.disk_bytes,
            deltas: Vec::new(),
            current: None,
            descriptor: None,
            expected: hello.deltas,
        }
    }

    fn path(&self, incoming: &str) -> PathBuf {
        self.place.path.with_file_name(incoming)
    }

    /// The chain that a delta stands on, base first.
    fn below(&self, delta: &Delta) -> Result<Vec<usize>> {
        let mut chain = Vec::new();
        let mut at = delta.parent;
        while let Some(index) = at.and_then(|index| usize::try_from(index).ok()) {
            // Each has a smaller number than what stands on it, so this ends.
            let received = self.deltas.get(index).ok_or_else(out_of_order)?;
            chain.push(index);
            at = received.delta.parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// Exactly that of the source: what stands on each other must fit.
    fn geometry(&self, delta: &Delta) -> Result<Geometry> {
        let cluster = Sectors(u64::from(delta.cluster_sectors));
        let geometry = match delta.image {
            ImageKind::Raw => Geometry::raw(cluster, delta.disk_bytes),
            _ => {
                let version = if delta.version == 1 { Version::V1 } else { Version::V2 };
                Geometry::new(version, cluster, Sectors::covering(delta.disk_bytes))
            }
        };
        let geometry = geometry.map_err(|error| {
            error
                .at_path(&self.place.path)
                .advise("the disk cannot be received as it is: send the content alone, without --chain")
        })?;
        // All tables of a chain are in memory at once.
        let mut tables_bytes = geometry.table_bytes();
        for index in self.below(delta)? {
            tables_bytes =
                tables_bytes.saturating_add(self.deltas.get(index).map_or(0, |one| one.table_bytes));
        }
        if geometry.disk_bytes() != delta.disk_bytes
            || geometry.table_bytes() > TABLE_BYTES_MAX
            || tables_bytes > TABLES_BYTES_MAX
        {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!(
                    "receive a copy: a delta of {} bytes in clusters of {} sectors, on others: their tables would take \
                     {tables_bytes} bytes of memory",
                    delta.disk_bytes, delta.cluster_sectors
                ),
            )
            .at_path(&self.place.path)
            .advise("the disk cannot be received as it is: send the content alone, without --chain"));
        }
        Ok(geometry)
    }

    /// The descriptor of everything that was begun.
    fn describe(&self) -> Result<DiskDescriptor> {
        let guid = |index: Option<u32>| {
            let delta =
                index.and_then(|index| usize::try_from(index).ok()).and_then(|at| self.deltas.get(at));
            delta.map_or(Guid::NONE, |delta| Guid::from_bytes(delta.delta.guid))
        };
        let mut states: Vec<(u32, TreeState)> = Vec::new();
        for received in &self.deltas {
            let delta = &received.delta;
            let state = TreeState {
                guid: Guid::from_bytes(delta.guid),
                parent: guid(delta.parent),
                file: received.name.clone(),
                temporary: delta.temporary,
            };
            states.push((delta.place, state));
        }
        states.sort_by_key(|(place, _)| *place);
        let states: Vec<TreeState> = states.into_iter().map(|(_, state)| state).collect();
        let (Some(base), Some(top)) = (self.deltas.first(), self.deltas.last()) else {
            return Err(out_of_order());
        };
        let mode = if base.delta.image == ImageKind::Raw { Mode::Raw } else { Mode::Expanded };
        let cluster = Sectors(u64::from(top.delta.cluster_sectors));
        let disk = Sectors::covering(self.disk_bytes);
        DiskDescriptor::of_tree(mode, disk, cluster, Guid::from_bytes(top.delta.guid), &states)
            .map_err(|error| error.with_kind(ErrorKind::Protocol).at_path(&self.place.path))
    }

    fn image(&mut self) -> Result<&mut OpenImage> {
        self.current.as_mut().ok_or_else(closed)
    }

    /// Keeps a whole delta from those who write, and gives it the time its source had.
    fn keep(&self, storage: &Arc<dyn Storage>, received: &Received) -> Result<()> {
        storage.claim(Some(Ownership::Reader))?;
        let modified = UNIX_EPOCH.checked_add(Duration::from_secs(received.delta.modified_seconds));
        let Some(modified) = modified.filter(|time| *time != UNIX_EPOCH) else { return Ok(()) };
        // A clock that runs ahead at the source: what was written to later than the plan counts as being used.
        let modified = modified.min(SystemTime::now());
        let set = storage.descriptor().map(|file| {
            let file = File::from(file.try_clone_to_owned()?);
            file.set_modified(modified)
        });
        set.unwrap_or(Ok(())).map_err(|error| {
            let path = self.path(&received.incoming);
            Error::io(ErrorKind::System, "give the delta the time it has at the source", error).at_path(path)
        })
    }

    /// Closes the delta that is being written.
    fn finish_delta(&mut self) -> Result<()> {
        let storage = self.current.take().ok_or_else(closed)?.close()?;
        let received = self.deltas.last().ok_or_else(out_of_order)?;
        self.keep(&storage, received)?;
        if let Some(received) = self.deltas.last_mut() {
            received._storage = Some(storage);
        }
        Ok(())
    }
}

impl Target for ChainTarget {
    fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()> {
        self.image()?.write(token, offset, buffer)
    }

    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.image()?.zero(extent)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        self.image()?.finish()
    }

    fn in_flight(&self) -> usize {
        self.current.as_ref().map_or(0, OpenImage::in_flight)
    }

    fn sync(&mut self) -> Result<()> {
        self.image()?.sync()
    }

    fn reader(&self) -> Result<Box<dyn Reader>> {
        self.current.as_ref().ok_or_else(closed)?.reader()
    }

    fn begin_delta(&mut self, delta: &Delta) -> Result<()> {
        if self.current.is_some() || u32::try_from(self.deltas.len()) != Ok(delta.index) {
            return Err(out_of_order());
        }
        let geometry = self.geometry(delta)?;
        let table_bytes = geometry.table_bytes();
        let chain = self.below(delta)?;
        let below: Vec<PathBuf> = chain
            .iter()
            .filter_map(|index| self.deltas.get(*index))
            .map(|one| self.path(&one.incoming))
            .collect();
        let raw_base = self.deltas.first().is_some_and(|base| base.delta.image == ImageKind::Raw);
        let name = if delta.index == 0 { self.place.name.clone() } else { image_name(&self.place.name) };
        let incoming = format!("{}{INCOMING}{}-{}", stem(&self.place.name), self.copy_id, delta.index);
        let storage = self.place.folder.create_file(&incoming, Caching::Direct)?;
        // From here on it is ours to remove.
        let mut image = OpenImage::new(self.path(&incoming), delta.image);
        self.deltas.push(Received { delta: delta.clone(), incoming, name, table_bytes, _storage: None });
        if u32::try_from(self.deltas.len()) == Ok(self.expected) {
            self.descriptor = Some(self.describe()?);
        }
        image.open(&storage, &geometry, delta.image, (&below, raw_base))?;
        self.current = Some(image);
        Ok(())
    }

    fn end_delta(&mut self) -> Result<()> {
        self.finish_delta()
    }

    fn commit(&mut self) -> Result<()> {
        let descriptor = self.descriptor.take().ok_or_else(out_of_order)?;
        // Closed cleanly and synced before anybody can find it.
        self.finish_delta()?;
        // The base has the operator's name, so it comes last: without it the same command begins anew.
        let files: Vec<(&str, &str)> =
            self.deltas.iter().rev().map(|one| (one.incoming.as_str(), one.name.as_str())).collect();
        self.place.put_in_place(&files, Some(&descriptor), &self.copy_id)
    }

    fn discard(&mut self) -> Result<()> {
        if let Some(mut image) = self.current.take() {
            image.abandon();
        }
        let mut removed = Ok(());
        for received in &self.deltas {
            removed = removed.and(self.place.unlink(&received.incoming));
        }
        removed
    }
}
