//! The bytes of a closed disk as its guest would see them, for a look at what is on it.

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, Mapping};
use crate::io::StorageExt;
use crate::units::GuestOffset;

/// Bytes that are read at once when zeros are looked for.
const STEP_BYTES: u64 = 1 << 20;

/// A chain, to read from.
#[derive(Clone, Copy, Debug)]
pub struct GuestBytes<'a> {
    chain: &'a Chain,
}

impl<'a> GuestBytes<'a> {
    /// Reads through `chain`.
    pub fn of(chain: &'a Chain) -> Self {
        Self { chain }
    }

    /// Bytes of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.chain.geometry().disk_bytes()
    }

    /// Fills `buffer` from byte `offset`. Fails with `Read`, also past the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let wanted = buffer.len() as u64;
        if offset.checked_add(wanted).is_none_or(|end| end > self.disk_bytes()) {
            return Err(Error::new(ErrorKind::Read, "read past the end of the disk").at_offset(offset));
        }
        let mut at = 0;
        while at < buffer.len() {
            let rest = &mut buffer[at..];
            let mapping = self.chain.map(GuestOffset(offset + at as u64), rest.len() as u64);
            let len = usize::try_from(mapping.len()).unwrap_or(usize::MAX).min(rest.len());
            match mapping {
                Mapping::Zero { .. } => rest[..len].fill(0),
                Mapping::Data { delta, offset, .. } => {
                    self.chain.storage(delta).read_padded_at(offset.0, &mut rest[..len]).map_err(
                        |cause| {
                            Error::io(ErrorKind::Read, "look at what is on the disk", cause)
                                .at_path(self.chain.name(delta))
                                .at_offset(offset.0)
                        },
                    )?;
                }
            }
            at += len;
        }
        Ok(())
    }

    /// The first byte in `start..end` that is not zero, to within the piece that was read; `None` if all are. What has
    /// no place in a file is not read.
    pub fn first_data(&self, start: u64, end: u64) -> Result<Option<u64>> {
        let end = end.min(self.disk_bytes());
        let mut at = start;
        let mut buffer = Vec::new();
        while at < end {
            let mapping = self.chain.map(GuestOffset(at), end - at);
            let mut next = at + mapping.len().min(end - at);
            if let Mapping::Data { delta, offset, .. } = mapping {
                // A raw file says where its holes are; what it calls data is looked at.
                if self.chain.delta_geometry(delta).is_raw() {
                    let found = self.chain.storage(delta).next_data(offset.0).map_err(|cause| {
                        Error::io(ErrorKind::Read, "look for data", cause).at_path(self.chain.name(delta))
                    })?;
                    let skip = found.map_or(u64::MAX, |(data, _)| data.saturating_sub(offset.0));
                    if skip > 0 {
                        at = next.min(at.saturating_add(skip));
                        continue;
                    }
                }
                next = next.min(at + STEP_BYTES);
                buffer.resize(usize::try_from(next - at).unwrap_or(0), 0);
                self.read_at(at, &mut buffer)?;
                if let Some(index) = buffer.iter().position(|&byte| byte != 0) {
                    return Ok(Some(at + index as u64));
                }
            }
            at = next;
        }
        Ok(None)
    }
}
