//! How much of the host's disk a merge takes beside its guest.
//!
//! A request of the guest waits for what the host's disk is doing when it comes: a transfer of a mebibyte takes many disks
//! a millisecond, which is longer than a small write itself. So while the guest is at work, transfers are short, few are under
//! way at once, and after each the merge sleeps as long as that took. A guest at rest gets none of this, and the merge all
//! of the disk; so does a merge that the guest outruns.
//!
//! A guest is at work for [`MEMORY`] after its last request was seen.

use std::time::{Duration, Instant};

use crate::device::{Disk, Statistics};

/// Largest transfer in bytes.
pub(super) const PIECE_BYTES_MAX: u64 = 1 << 20;
/// The same beside a guest at work.
const PIECE_BYTES_BESIDE: u64 = 256 << 10;
/// Transfers under way at once.
pub(super) const THREADS_MAX: usize = 8;
/// The same beside a guest at work.
const THREADS_BESIDE: usize = 2;
/// The longest pause for the guest after one piece.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// For so long a guest counts as being at work. Some of them write every now and then only.
const MEMORY: Duration = Duration::from_secs(1);

fn requests(statistics: &Statistics) -> u64 {
    statistics.reads + statistics.writes + statistics.zeroes
}

/// Watches a guest.
pub(super) struct Pace<'a> {
    disk: &'a Disk,
    /// Requests answered so far.
    answered: u64,
    /// When some were answered last.
    at_work: Option<Instant>,
    /// Whether the guest gets its share; not while it is held.
    pub(super) is_fair: bool,
}

impl<'a> Pace<'a> {
    pub(super) fn new(disk: &'a Disk) -> Self {
        Self { disk, answered: requests(&disk.statistics()), at_work: None, is_fair: true }
    }

    /// Whether something was answered since this was asked last.
    fn look(&mut self) -> bool {
        let now = requests(&self.disk.statistics());
        let any = std::mem::replace(&mut self.answered, now) != now;
        if any {
            self.at_work = Some(Instant::now());
        }
        any
    }

    /// Whether the guest is at work and is to be spared.
    pub(super) fn spares(&mut self) -> bool {
        self.look();
        self.is_sparing()
    }

    fn is_sparing(&self) -> bool {
        self.is_fair && self.at_work.is_some_and(|at| at.elapsed() < MEMORY)
    }

    /// Bytes of one transfer.
    pub(super) fn piece_bytes(&self) -> u64 {
        if self.is_sparing() { PIECE_BYTES_BESIDE } else { PIECE_BYTES_MAX }
    }

    /// Transfers under way at once.
    pub(super) fn threads(&self) -> usize {
        if self.is_sparing() { THREADS_BESIDE } else { THREADS_MAX }
    }

    /// After a transfer that took so long: sleeps if the guest was at work meanwhile.
    pub(super) fn pause(&mut self, took: Duration) {
        if self.look() && self.is_fair {
            std::thread::sleep(took.min(PAUSE_MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Client, DiskOptions};
    use crate::io::{Access, best_io_queue};
    use crate::ops;
    use crate::units::Sectors;

    #[test]
    fn a_guest_at_work_is_spared_unless_it_is_held() {
        let folder = tempfile::tempdir().unwrap();
        ops::create(&ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(1 << 15))).unwrap();
        let chain = ops::open(&ops::OpenOptions::new(folder.path(), Access::ReadWrite)).unwrap().chain;
        let disk = Disk::open(chain, DiskOptions::default()).unwrap();
        let mut pace = Pace::new(&disk);
        assert!(!pace.spares());
        assert_eq!((pace.piece_bytes(), pace.threads()), (PIECE_BYTES_MAX, THREADS_MAX));
        let mut client = Client::new(&disk, best_io_queue(4).unwrap()).unwrap();
        // More than once, should this thread not run for a second in between.
        let is_spared = (0..100).any(|_| {
            client.write(0, &[1; 4096]).unwrap();
            pace.spares() && pace.piece_bytes() == PIECE_BYTES_BESIDE && pace.threads() == THREADS_BESIDE
        });
        assert!(is_spared);
        pace.is_fair = false;
        client.write(0, &[1; 4096]).unwrap();
        assert!(!pace.spares());
        assert_eq!((pace.piece_bytes(), pace.threads()), (PIECE_BYTES_MAX, THREADS_MAX));
    }
}
