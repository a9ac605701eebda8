//! The folder and the open files of a simulated host: what the engine calls.

use std::io;
use std::sync::{Arc, MutexGuard};

use super::content::hash_bytes;
use super::{BLOCK_BYTES, Call, Change, NameChange, Operation, SECTOR_BYTES, SimDisk, World};
use crate::extent::Extent;
use crate::io::file::component;
use crate::io::{Access, Alignment, Allocation, Folder, Storage};

/// An open file of a [`SimDisk`].
#[derive(Clone)]
pub struct SimStorage {
    pub(super) disk: SimDisk,
    pub(super) file: usize,
    pub(super) access: Access,
}

impl SimStorage {
    /// The file's number in order of creation, as [`Operation::file`] has it.
    pub fn number(&self) -> usize {
        self.file
    }

    /// The world it belongs to.
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }

    fn world_for_change(&self) -> io::Result<MutexGuard<'_, World>> {
        if self.access == Access::ReadOnly {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        Ok(self.disk.lock())
    }

    fn operation(&self, call: Call, offset: u64, len: u64) -> Operation {
        Operation { call, file: self.file, offset, len }
    }
}

impl Storage for SimStorage {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut world = self.disk.lock();
        world.enter(Call::Read)?;
        world.check_alignment(offset, buffer)?;
        let len = world.shorten(buffer.len());
        let live = &world.files[self.file].live;
        let readable = usize::try_from(live.readable(offset, len as u64)).unwrap_or(len);
        if readable == 0 && len > 0 && offset < live.len() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(live.read(offset, &mut buffer[..len.min(readable)]))
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        let mut world = self.world_for_change()?;
        let end = offset.checked_add(buffer.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if i64::try_from(end).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if let Err(hit) = world.check(Call::Write) {
            // A failed write leaves old, new or mixed bytes behind (R7).
            if hit.error.raw_os_error() == Some(libc::EIO) && world.random.chance(50) {
                let sectors = world.random.below(buffer.len() as u64 / SECTOR_BYTES + 1);
                let part = usize::try_from(sectors * SECTOR_BYTES).unwrap_or(0);
                if part > 0 && world.take_space(self.file, offset, part as u64).is_ok() {
                    world.log(self.file, Change::Write { offset, data: buffer[..part].into() });
                    world.note(self.operation(Call::Write, offset, part as u64), hash_bytes(&buffer[..part]));
                }
            }
            return Err(hit.error);
        }
        world.check_alignment(offset, buffer)?;
        if buffer.is_empty() {
            return Ok(0);
        }
        let len = world.shorten(buffer.len());
        if world.files[self.file].live.needs_unreadable(offset, len as u64) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        world.take_space(self.file, offset, len as u64)?;
        world.log(self.file, Change::Write { offset, data: buffer[..len].into() });
        world.note(self.operation(Call::Write, offset, len as u64), hash_bytes(&buffer[..len]));
        Ok(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.disk.lock();
        let checked = world.check(Call::Sync);
        let state = world.file(self.file);
        let result = match checked {
            Err(hit) => {
                if hit.drops_data {
                    state.log.retain(|entry| entry.in_flight.is_some());
                }
                Err(hit.error)
            }
            Ok(()) => {
                let log = std::mem::take(&mut state.log);
                for entry in log {
                    if entry.in_flight.is_some() {
                        state.log.push(entry);
                    } else {
                        entry.change.apply(&mut state.durable);
                    }
                }
                Ok(())
            }
        };
        let ok = u64::from(result.is_ok());
        world.note(self.operation(Call::Sync, 0, 0), ok);
        result
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut world = self.world_for_change()?;
        world.enter(Call::SetLen)?;
        if i64::try_from(len).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        world.log(self.file, Change::SetLen { len });
        world.file(self.file).allocated.remove(Extent::between(len.next_multiple_of(BLOCK_BYTES), u64::MAX));
        world.note(self.operation(Call::SetLen, len, 0), 0);
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64, how: Allocation) -> io::Result<()> {
        let mut world = self.world_for_change()?;
        let end = offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        world.enter(Call::Allocate)?;
        if len == 0 {
            return Ok(());
        }
        match how {
            Allocation::Reserve => {
                world.take_space(self.file, offset, len)?;
                if end > world.files[self.file].live.len() {
                    world.log(self.file, Change::Extend { len: end });
                }
            }
            Allocation::Zero => world.log(self.file, Change::Zero { offset, len }),
            Allocation::Punch => {
                world.log(self.file, Change::Zero { offset, len });
                world.give_space_back(self.file, offset, end);
            }
        }
        world.note(self.operation(Call::Allocate, offset, len), how as u64);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[self.file].live.len())
    }

    fn alignment(&self) -> Alignment {
        self.disk.lock().alignment
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        Ok(self.disk.lock().files[self.file].live.next_data(offset))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[self.file].allocated.bytes())
    }

    fn host_free_bytes(&self) -> io::Result<Option<u64>> {
        let inner = self.disk.lock();
        let taken: u64 = inner.files.iter().map(|file| file.allocated.bytes()).sum();
        Ok(inner.capacity_bytes.map(|capacity| capacity.saturating_sub(taken)))
    }
}

/// The one folder of a [`SimDisk`].
#[derive(Clone)]
pub struct SimFolder {
    pub(super) disk: SimDisk,
}

impl SimFolder {
    fn rename_names(&self, from: &str, to: &str, replace: bool) -> io::Result<()> {
        let mut world = self.disk.lock();
        world.enter(Call::Rename)?;
        let (from, to) = (component(from)?, component(to)?);
        let file = *world.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        if !replace && world.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        world.change_names(
            Call::Rename,
            NameChange::Rename { from: from.to_owned(), to: to.to_owned(), file },
        );
        Ok(())
    }
}

impl Folder for SimFolder {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.disk.open(name, access)?))
    }

    fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.disk.create(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.rename_names(from, to, true)
    }

    fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
        self.rename_names(from, to, false)
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        let mut world = self.disk.lock();
        world.enter(Call::Unlink)?;
        let name = component(name)?;
        if !world.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        world.change_names(Call::Unlink, NameChange::Unlink { name: name.to_owned() });
        Ok(())
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        Ok(self.disk.lock().names.contains_key(component(name)?))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.disk.lock().names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.disk.lock();
        world.enter(Call::FolderSync)?;
        world.durable_names = world.names.clone();
        world.name_log.clear();
        world.note(Operation { call: Call::FolderSync, file: 0, offset: 0, len: 0 }, 0);
        Ok(())
    }
}
