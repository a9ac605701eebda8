//! Reads images and chains as a judge does: without changing anything.

use ploop_core::format::{Chain, InUse, Mapping, examine};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::{Storage, StorageExt};
use ploop_core::units::{GuestCluster, GuestOffset};

use crate::pattern::{SECTOR, UNREADABLE, values};

/// An error with its causes.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Whether somebody could not read a sector.
pub(crate) fn is_input_error(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let number = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        if number == Some(libc::EIO) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Whether one of the sectors that cannot be read lies in the first `metadata_bytes` of a file, or in one that has
/// nothing but metadata.
pub(crate) fn has_lost_metadata(disk: &SimDisk, metadata_bytes: u64) -> bool {
    let is_metadata = |(name, sector): &(String, u64)| {
        name.starts_with("DiskDescriptor") || sector * (SECTOR as u64) < metadata_bytes
    };
    disk.unreadable_sectors().iter().any(is_metadata)
}

/// The value of every sector, as the table in memory has it; [`UNREADABLE`] for those that cannot be read.
pub(crate) fn read_all(chain: &Chain) -> Result<Vec<u64>, String> {
    let end = chain.geometry().disk_bytes();
    let mut bytes = vec![0; end as usize];
    let mut lost = Vec::new();
    let mut at = 0;
    while at < end {
        at += match chain.map(GuestOffset(at), end - at) {
            Mapping::Zero { len } => len,
            Mapping::Data { delta, offset, len } => {
                let target = &mut bytes[at as usize..(at + len) as usize];
                let storage = chain.storage(delta);
                let failed = |error| format!("read guest byte {at} at {offset} of delta {delta}: {error}");
                match storage.read_exact_at(offset.0, target) {
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                        for (number, bytes) in target.chunks_mut(SECTOR).enumerate() {
                            let place = offset.0 + (number * SECTOR) as u64;
                            match storage.read_exact_at(place, bytes) {
                                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                                    bytes.fill(0);
                                    lost.push(at as usize / SECTOR + number);
                                }
                                other => other.map_err(failed)?,
                            }
                        }
                    }
                    other => other.map_err(failed)?,
                }
                len
            }
        };
    }
    let mut values = values(&bytes, 0)?;
    for sector in lost {
        values[sector] = UNREADABLE;
    }
    Ok(values)
}

/// Sound table, as the invariants I1 and I2 demand of every durable state; whether the header says "closed".
pub(crate) fn check_table(storage: &dyn Storage) -> Result<bool, String> {
    let (header, verdict) = examine(storage).map_err(|error| format!("examine: {}", describe(&error)))?;
    if let Some(wrong) = verdict.ambiguous.iter().chain(&verdict.at_end).next() {
        return Err(format!("table: entry {:#x} of {} {}", wrong.raw, wrong.cluster, wrong.finding));
    }
    match header.in_use() {
        InUse::Open => Ok(false),
        InUse::Closed | InUse::ClosedWithExtension => Ok(true),
        InUse::Other(value) => Err(format!("the in-use mark is {value:#x}")),
    }
}

/// A closed image ends with its last used cluster.
pub(crate) fn check_length(chain: &Chain) -> Result<(), String> {
    let (geometry, top) = (chain.geometry(), chain.top());
    let used = (0..geometry.entries()).filter_map(|cluster| chain.held_at(top, GuestCluster(cluster)));
    let data_end = used.map(|offset| offset.0 + geometry.cluster_bytes()).max().unwrap_or(0);
    let expected = data_end.max(geometry.data_start().0).max(geometry.cluster_bytes());
    let found = chain.storage(top).len().map_err(|error| error.to_string())?;
    if found == expected {
        return Ok(());
    }
    Err(format!("a closed image is {found} bytes long, its last cluster ends at {expected}"))
}
