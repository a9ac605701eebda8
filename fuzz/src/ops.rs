//! An image, sound or damaged, and a guest that uses it.

use crate::format::image;
use fastrand::Rng;
use ploop_core::Extent;
use ploop_core::device::{Client, Disk, DiskOptions};
use ploop_core::format::{Chain, ChainOptions, Source, examine};
use ploop_core::io::sim::SimDisk;
use ploop_core::io::{Access, Storage, StorageExt};
use ploop_core::mutant::{Mutant, activate};
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of one guest operation in the input.
const STEP_BYTES: usize = 4;
/// Steps in an input.
const STEPS: usize = 12;
/// The guest uses no more of the disk than this.
const DISK_BYTES_MAX: u64 = 40 * 64 * 512;

/// Guest operations, then an image.
pub fn input(random: &mut Rng) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..STEPS * STEP_BYTES).map(|_| random.u8(..)).collect();
    bytes.extend(image(random));
    bytes
}

/// If the image opens for writing, it behaves as a disk: what was written is read, before and after a clean close; the
/// closed image is sound, and nothing was written into its header but by the protocol.
pub fn run(input: &[u8]) {
    let Some((steps, image)) = input.split_at_checked(STEPS * STEP_BYTES) else { return };
    let world = SimDisk::new(1);
    let Ok(file) = world.create("image") else { return };
    let storage: Arc<dyn Storage> = Arc::new(file);
    if storage.write_all_at(0, image).is_err() {
        return;
    }
    let open = |access| {
        let source = Source { name: PathBuf::from("image"), storage: Arc::clone(&storage), raw: false };
        Chain::open(vec![source], &ChainOptions { access, raw_cluster: None, accept_in_use: false })
    };
    let Ok(chain) = open(Access::ReadWrite) else { return };
    let disk_bytes = chain.geometry().disk_bytes().min(DISK_BYTES_MAX);
    if disk_bytes == 0 {
        return;
    }
    let all = Extent::between(0, disk_bytes);
    let Ok(disk) = Disk::open(Arc::clone(&chain), DiskOptions::default()) else { return };
    let model = {
        let Ok(queue) = world.queue(4, 1) else { return };
        let Ok(mut client) = Client::new(&disk, Box::new(queue.in_order())) else { return };
        let Ok(first) = client.read(all) else { return };
        let mut model = first.as_slice().to_vec();
        for (number, step) in (1u8..).zip(steps.as_chunks::<STEP_BYTES>().0) {
            let start = u64::from(u16::from_le_bytes([step[0], step[1]])) * 512 % disk_bytes;
            let end = (start + u64::from(step[2] % 130 + 1) * 512).min(disk_bytes);
            let extent = Extent::between(start, end);
            let range = usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0);
            let (result, value) = match step[3] % 6 {
                0..=2 => (client.write(start, &vec![number; range.len()]), Some(number)),
                3 => (client.discard(extent), Some(0)),
                4 => (client.write_zeroes(extent, step[3] >= 128), Some(0)),
                _ => (client.flush(), None),
            };
            // The host refuses nothing here, but a table may be unable to point further.
            if result.is_err() {
                return;
            }
            if let Some(value) = value {
                model[range].fill(value);
            }
        }
        let found = client.read(all);
        assert!(
            found.is_ok_and(|found| found.as_slice() == model),
            "the disk does not read what was written"
        );
        model
    };
    let closed = disk.close();
    drop(disk);
    drop(chain);
    assert!(closed.is_ok(), "a clean close failed: {closed:?}");
    let examined = examine(&*storage);
    assert!(
        examined.as_ref().is_ok_and(|(_, verdict)| verdict.at_end.is_empty() && verdict.ambiguous_count == 0),
        "the closed image is not sound: {examined:?}"
    );
    let again = open(Access::ReadOnly);
    assert!(again.is_ok(), "the closed image does not open: {:?}", again.err());
    let Ok(chain) = again else { return };
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let Ok(disk) = Disk::open(chain, options) else { return };
    let Ok(queue) = world.queue(4, 1) else { return };
    let Ok(mut client) = Client::new(&disk, Box::new(queue.in_order())) else { return };
    let found = client.read(all);
    assert!(
        found.is_ok_and(|found| found.as_slice() == model),
        "the closed image does not hold what was written"
    );
}

/// As [`run`], with a bug planted: header and first entries are written from a stale copy. The alarm must ring.
pub fn run_with_planted_bug(input: &[u8]) {
    activate(Some(Mutant::StaleHeaderSector));
    run(input);
    activate(None);
}
