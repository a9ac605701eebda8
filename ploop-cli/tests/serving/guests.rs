//! Guests that write, and check what they have written, while a test disturbs their disk.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::ground::{Direct, Ground};

/// Writers beside a test.
#[derive(Default)]
pub(crate) struct Guest {
    is_over: AtomicBool,
    has_failed: AtomicBool,
    steps: AtomicU64,
}

impl Guest {
    /// Whether the writers are to end.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// One more step of a writer is done.
    pub(crate) fn step(&self) {
        self.steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until the writers have done so many steps more.
    #[track_caller]
    pub(crate) fn goes_on(&self, ground: &Ground, steps: u64) {
        let least = self.steps.load(Ordering::SeqCst) + steps;
        ground.wait_until("the writers go on", || {
            assert!(!self.has_failed.load(Ordering::SeqCst), "a writer has failed");
            self.steps.load(Ordering::SeqCst) >= least
        });
    }
}

/// Ends the writers also when the test fails, or their threads would be waited for in vain; notes when one fails.
struct Ending<'a>(&'a Guest);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::SeqCst);
        self.0.has_failed.fetch_or(std::thread::panicking(), Ordering::SeqCst);
    }
}

/// Runs `test` while `writers` threads `write` until they are told that it is over. The failure of one is that of the test.
pub(crate) fn beside(writers: u64, write: impl Fn(u64, &Guest) + Sync, test: impl FnOnce(&Guest)) {
    let guest = Guest::default();
    std::thread::scope(|scope| {
        let _ending = Ending(&guest);
        for writer in 0..writers {
            let (guest, write) = (&guest, &write);
            scope.spawn(move || {
                let _ending = Ending(guest);
                write(writer, guest);
            });
        }
        test(&guest);
    });
}

/// Blocks of a device, each of which one writer owns.
pub(crate) struct Blocks {
    /// Of each writer, the rounds it has ended.
    rounds: Vec<AtomicU64>,
    /// Of each writer.
    count: u64,
}

impl Blocks {
    const BYTES: usize = 16 << 10;

    /// For `writers` of `count` blocks each.
    pub(crate) fn new(writers: u64, count: u64) -> Self {
        Self { rounds: (0..writers).map(|_| AtomicU64::new(0)).collect(), count }
    }

    fn writers(&self) -> u64 {
        self.rounds.len() as u64
    }

    fn place(&self, writer: u64, number: u64) -> u64 {
        ((number * 7 % self.count) * self.writers() + writer) * Self::BYTES as u64
    }

    /// Writes the blocks of one writer round by round, checking in each what the one before has left.
    fn write(&self, direct: &Direct, writer: u64, guest: &Guest) {
        for round in 1.. {
            for number in 0..self.count {
                if round > 1 {
                    direct.expect(self.place(writer, number), Self::BYTES, round - 1);
                }
                direct.write(self.place(writer, number), Self::BYTES, round).unwrap();
                if number % 50 == 0 && writer.is_multiple_of(2) {
                    direct.sync().unwrap();
                }
                guest.step();
            }
            self.rounds[usize::try_from(writer).unwrap()].store(round, Ordering::SeqCst);
            if guest.is_over() {
                return;
            }
        }
    }

    /// Has all of them written on a device while `test` disturbs it.
    pub(crate) fn written_beside(&self, device: &Path, test: impl FnOnce(&Guest)) {
        let direct = Direct::open(device);
        beside(self.writers(), |writer, guest| self.write(&direct, writer, guest), test);
    }

    /// Checks that a device holds what was written last.
    #[track_caller]
    pub(crate) fn expect(&self, device: &Path) {
        let reader = Direct::open_to_read(device);
        for (writer, round) in (0..).zip(&self.rounds) {
            for number in 0..self.count {
                reader.expect(self.place(writer, number), Self::BYTES, round.load(Ordering::SeqCst));
            }
        }
    }
}

/// Rewrites its files in a mounted file system again and again, and reads them back.
pub(crate) fn rewrite_files(point: &Path, guest: &Guest) {
    let paths = [0u8, 1, 2, 3].map(|number| (number, point.join(format!("busy{number}"))));
    let mut round = 0u8;
    while !guest.is_over() {
        for (number, path) in &paths {
            fs::write(path, vec![round ^ number; 500_000]).expect("write beside the test");
            let file = File::open(path).expect("open");
            if round.is_multiple_of(8) {
                file.sync_all().expect("sync beside the test");
            }
        }
        for (number, path) in &paths {
            let found = fs::read(path).expect("read beside the test");
            assert!(found.iter().all(|&byte| byte == round ^ number), "a read sees every write");
        }
        round = round.wrapping_add(1);
        guest.step();
    }
}
