//! Whole copies over pipes and sockets, one-way and two-way, with a writer at work: the copy equals the disk at the
//! moment of the freeze.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use pcopy::converge::ConvergenceOptions;
use pcopy::memory::{Fault, MemoryDestination, MemoryDisk, Outcome};
use pcopy::stats::PassKind;
use pcopy::{Cancel, Event, NothingToQuiesce};
use ploop_core::{ErrorKind, Result};
use support::patience::PATIENCE;
use support::*;

const LEN: usize = 8 << 20;

#[test]
fn a_quiet_disk_arrives_whole() {
    for (two_way, socket) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut disk = MemoryDisk::new(content(1, LEN));
        let mut destination = MemoryDestination::new();
        let mut quiesce = NothingToQuiesce;
        let both =
            copy(&mut disk, &mut quiesce, &mut destination, ends(two_way, socket), &send_options(PATIENCE));
        let (sent, received) = (both.sent.unwrap(), both.received.unwrap());
        assert_eq!(sent.committed, two_way);
        assert_eq!(destination.outcome(), Outcome::Committed);
        assert!(destination.content() == disk.content());
        assert_eq!(received.verified_bytes, received.data_bytes + received.zero_bytes);
        assert_eq!(sent.data_bytes, received.data_bytes);
        assert!(!disk.is_tracked());
        let (closed, opened) = disk.gate_moves();
        assert_eq!((closed, opened), (1, 1));
    }
}

#[test]
fn a_disk_that_is_written_to_arrives_as_it_was_at_the_freeze() {
    for (two_way, seed) in [(false, 1), (true, 2), (false, 3), (true, 4)] {
        let mut disk = MemoryDisk::new(content(seed, LEN));
        let writer = Writer::start(&disk, LEN as u64, seed, Duration::from_micros(300));
        let mut quiesce = TestQuiesce::new(&disk, Some(&writer));
        let mut destination = MemoryDestination::new();
        let both =
            copy(&mut disk, &mut quiesce, &mut destination, ends(two_way, false), &send_options(PATIENCE));
        let sent = both.sent.unwrap();
        both.received.unwrap();
        assert!(destination.content() == quiesce.snapshot.take().unwrap(), "seed {seed}");
        assert_eq!((quiesce.freezes, quiesce.thaws), (1, 1));
        assert!(writer.is_alive());
        assert!(sent.passes.len() > 2 && sent.downtime.total_ms > 0.0);
    }
}

#[test]
fn scattered_small_writes_cost_little_more_than_themselves() {
    let mut disk = MemoryDisk::new(content(5, LEN));
    // In the freeze, where it counts: written by the hook, so that exactly these are the last pass.
    struct Scatter(MemoryDisk, u64);
    impl pcopy::Quiesce for Scatter {
        fn sync_file_system(&mut self) -> ploop_core::Result<bool> {
            Ok(false)
        }
        fn run_hook(&mut self) -> ploop_core::Result<()> {
            for block in (0..LEN as u64 / 4096).step_by(7) {
                self.0.write(block * 4096, &[0xa5; 4096]);
                self.1 += 4096;
            }
            Ok(())
        }
        fn freeze_file_system(&mut self) -> ploop_core::Result<()> {
            Ok(())
        }
        fn thaw(&mut self) -> ploop_core::Result<()> {
            Ok(())
        }
    }
    let mut quiesce = Scatter(disk.clone(), 0);
    let mut destination = MemoryDestination::new();
    let both = copy(&mut disk, &mut quiesce, &mut destination, ends(true, false), &send_options(PATIENCE));
    let downtime = both.sent.unwrap().downtime;
    both.received.unwrap();
    assert!(destination.content() == disk.content());
    assert!(downtime.bytes * 10 <= quiesce.1 * 11, "{} bytes for {}", downtime.bytes, quiesce.1);
}

#[test]
fn zeros_written_over_sent_data_arrive_as_zeros() {
    let mut disk = MemoryDisk::new(vec![7; LEN]);
    struct Wipe(MemoryDisk);
    impl pcopy::Quiesce for Wipe {
        fn sync_file_system(&mut self) -> ploop_core::Result<bool> {
            Ok(false)
        }
        fn run_hook(&mut self) -> ploop_core::Result<()> {
            self.0.write(1 << 20, &vec![0; 3 << 20]);
            self.0.write(5 << 20, &[0; 512]);
            Ok(())
        }
        fn freeze_file_system(&mut self) -> ploop_core::Result<()> {
            Ok(())
        }
        fn thaw(&mut self) -> ploop_core::Result<()> {
            Ok(())
        }
    }
    let mut quiesce = Wipe(disk.clone());
    let mut destination = MemoryDestination::new();
    let both = copy(&mut disk, &mut quiesce, &mut destination, ends(true, true), &send_options(PATIENCE));
    let report = both.sent.unwrap();
    let received = both.received.unwrap();
    assert!(destination.content() == disk.content());
    assert_eq!(received.zero_bytes, 3 << 20);
    assert!(report.downtime.bytes < 64 << 10);
}

#[test]
fn writers_that_go_on_after_the_freeze_end_the_copy() {
    // A hook that stops nobody: something is written after every look at the frozen disk.
    for (writes, quiet) in [(1, true), (2, true), (9, false)] {
        let mut disk = MemoryDisk::new(content(6, LEN));
        let mut quiesce = TestQuiesce::new(&disk, None);
        let mut destination = MemoryDestination::new();
        let (link, writer, left) = (ends(true, false), disk.clone(), AtomicU32::new(writes));
        let write = |event: &Event| {
            let after_a_look = match event {
                Event::Frozen { .. } => true,
                Event::PassEnded(stats) => stats.kind == PassKind::Frozen,
                _ => false,
            };
            if after_a_look && left.load(Ordering::SeqCst) > 0 {
                left.fetch_sub(1, Ordering::SeqCst);
                writer.write(4096, &[left.load(Ordering::SeqCst) as u8; 512]);
            }
        };
        let both = must_end("writers that go on", || {
            copy_observed(&mut disk, &mut quiesce, &mut destination, link, &send_options(PATIENCE), &write)
        });
        let (sent, received) = (both.sent, both.received);
        assert_eq!((quiesce.freezes, quiesce.thaws), (1, 1));
        assert!(!disk.is_tracked());
        if quiet {
            // A stray write or two is sent as well.
            sent.unwrap();
            received.unwrap();
            assert!(destination.content() == disk.content());
        } else {
            assert_eq!(sent.unwrap_err().kind(), ErrorKind::NotQuiet);
            // The receiver was told why.
            assert_eq!(received.unwrap_err().kind(), ErrorKind::NotQuiet);
            assert_eq!(destination.outcome(), Outcome::Nothing);
        }
    }
}

#[test]
fn a_freeze_too_long_never_begins() {
    let mut disk = MemoryDisk::new(content(7, LEN));
    let mut quiesce = TestQuiesce::new(&disk, None);
    let mut destination = MemoryDestination::new();
    let mut options = send_options(PATIENCE);
    options.convergence = ConvergenceOptions { freeze_ms_max: Some(0), passes_max: 4, ..Default::default() };
    // After every pass there is something new.
    let writer = disk.clone();
    let write = |event: &Event| {
        if let Event::PassEnded(_) = event {
            writer.write(8192, &[1; 4096]);
        }
    };
    let ends = ends(true, false);
    let both = copy_observed(&mut disk, &mut quiesce, &mut destination, ends, &options, &write);
    let error = both.sent.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotQuiet);
    assert!(error.to_string().contains("may last 0 ms"), "{error}");
    assert_eq!((quiesce.freezes, quiesce.thaws), (0, 0));
    assert!(both.received.is_err());
    assert_eq!(destination.outcome(), Outcome::Nothing);
}

/// A writer that the link cannot follow: once it is decided to freeze all the same, passes after a sync are only a longer
/// wait. One that the sync has brought something for is worth one.
#[test]
fn where_passes_do_not_help_none_follow_the_decision() {
    for (brought_by_sync, expected) in [(0, 0), (4, 1)] {
        let mut disk = MemoryDisk::new(content(7, LEN));
        let writer = disk.clone();
        /// Its sync writes so many mebibytes.
        struct Bringing(TestQuiesce<MemoryDisk>, MemoryDisk, usize);
        impl pcopy::Quiesce for Bringing {
            fn sync_file_system(&mut self) -> Result<bool> {
                self.1.write(4 << 20, &vec![7; std::mem::take(&mut self.2) << 20]);
                self.0.sync_file_system().map(|_| true)
            }
            fn run_hook(&mut self) -> Result<()> {
                self.0.run_hook()
            }
            fn freeze_file_system(&mut self) -> Result<()> {
                self.0.freeze_file_system()
            }
            fn thaw(&mut self) -> Result<()> {
                self.0.thaw()
            }
        }
        let mut quiesce = Bringing(TestQuiesce::new(&disk, None), disk.clone(), brought_by_sync);
        let mut destination = MemoryDestination::new();
        let mut options = send_options(PATIENCE);
        options.convergence =
            ConvergenceOptions { freeze_ms_wanted: 0, stalled_max: 2, ..Default::default() };
        // After every pass of a live disk there is as much again.
        let write = |event: &Event| {
            if let Event::PassEnded(stats) = event
                && stats.kind != PassKind::Frozen
            {
                writer.write(0, &vec![1; 2 << 20]);
            }
        };
        let ends = ends(true, false);
        let both = copy_observed(&mut disk, &mut quiesce, &mut destination, ends, &options, &write);
        let passes = both.sent.unwrap().passes;
        let synced = passes.iter().filter(|pass| pass.kind == PassKind::Synced).count();
        assert_eq!(synced, expected, "{passes:?}");
        both.received.unwrap();
    }
}

#[test]
fn a_failing_hook_is_undone() {
    let mut disk = MemoryDisk::new(content(8, LEN));
    let mut quiesce = TestQuiesce::new(&disk, None);
    quiesce.fail_hook = true;
    let mut destination = MemoryDestination::new();
    let both = copy(&mut disk, &mut quiesce, &mut destination, ends(false, false), &send_options(PATIENCE));
    assert_eq!(both.sent.unwrap_err().kind(), ErrorKind::NotQuiet);
    assert!(both.received.is_err());
    assert!(!quiesce.hook_begun, "thaw was called");
    assert_eq!(destination.outcome(), Outcome::Nothing);
}

#[test]
fn what_goes_wrong_at_the_receiver_reaches_the_sender() {
    for (fault, kind) in [
        (Fault::Write(3), ErrorKind::Write),
        (Fault::WrongWrite(2), ErrorKind::Write),
        (Fault::Sync(1), ErrorKind::Sync),
        (Fault::Sync(2), ErrorKind::Sync),
        (Fault::Commit, ErrorKind::Rename),
    ] {
        for two_way in [true, false] {
            let mut disk = MemoryDisk::new(content(9, LEN));
            let mut quiesce = TestQuiesce::new(&disk, None);
            let mut destination = MemoryDestination::with_fault(fault);
            let both = copy(
                &mut disk,
                &mut quiesce,
                &mut destination,
                ends(two_way, false),
                &send_options(PATIENCE),
            );
            assert_eq!(both.received.unwrap_err().kind(), kind, "{fault:?}");
            if two_way {
                assert_eq!(both.sent.unwrap_err().kind(), kind, "{fault:?}");
            }
            assert_eq!(destination.outcome(), Outcome::Nothing);
            assert_eq!(quiesce.freezes, quiesce.thaws);
        }
    }
}

#[test]
fn an_existing_destination_is_refused_on_both_sides() {
    let mut destination = MemoryDestination::new();
    for expected in [None, Some(ErrorKind::Create)] {
        let mut disk = MemoryDisk::new(content(10, LEN));
        let both = copy(
            &mut disk,
            &mut NothingToQuiesce,
            &mut destination,
            ends(true, false),
            &send_options(PATIENCE),
        );
        assert_eq!(both.sent.err().map(|error| error.kind()), expected);
        assert_eq!(both.received.err().map(|error| error.kind()), expected);
    }
}

#[test]
fn cancelling_unwinds() {
    let mut disk = MemoryDisk::new(content(11, LEN));
    let writer = Writer::start(&disk, LEN as u64, 11, Duration::from_micros(50));
    let mut quiesce = TestQuiesce::new(&disk, Some(&writer));
    let cancel = Cancel::new().unwrap();
    let mut options = send_options(PATIENCE);
    options.cancel = Some(cancel.clone());
    // It would go on for ever.
    options.convergence = ConvergenceOptions {
        freeze_ms_max: Some(0),
        outage_ms_max: None,
        file_system_ms: 0,
        passes_max: u32::MAX,
        stalled_max: u32::MAX,
        freeze_ms_wanted: 0,
    };
    let mut destination = MemoryDestination::new();
    let (passed, passes) = mpsc::channel();
    let cancelling = std::thread::spawn(move || {
        // In the middle of it.
        passes.iter().take(5).for_each(drop);
        cancel.cancel();
    });
    // After every pass there is something new, also when the writer sleeps.
    let again = disk.clone();
    let write = |event: &Event| {
        if let Event::PassEnded(_) = event {
            again.write(8192, &[1; 4096]);
            passed.send(()).ok();
        }
    };
    let ends = ends(true, false);
    let both = copy_observed(&mut disk, &mut quiesce, &mut destination, ends, &options, &write);
    cancelling.join().unwrap();
    assert_eq!(both.sent.unwrap_err().kind(), ErrorKind::Cancelled);
    // It hears why, unless the pipe was full just then.
    assert!(matches!(both.received.unwrap_err().kind(), ErrorKind::Cancelled | ErrorKind::Read));
    assert_eq!(destination.outcome(), Outcome::Nothing);
    assert!(writer.is_alive());
}

#[test]
fn garbage_and_silence_are_told_apart() {
    use std::io::Write;
    for (bytes, kind) in [
        (&b""[..], ErrorKind::Read),
        (b"ab", ErrorKind::Read),
        (b"Welcome to this machine! You have mail.\n", ErrorKind::Protocol),
        (&[0; 4096], ErrorKind::Protocol),
        (&[0xff; 4096], ErrorKind::Protocol),
    ] {
        let (write, read) = pair(false);
        let mut destination = MemoryDestination::new();
        std::fs::File::from(write).write_all(bytes).unwrap();
        let link = pcopy::Link { input: Some(read), output: None };
        let error = pcopy::receive(link, &mut destination, &Default::default(), &pcopy::Silent).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(destination.outcome(), Outcome::Nothing);
    }
}
