//! The original's stream as we send it: an image file of equal content for whoever receives it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pcopy::source::{DiskSource, Gate, Loan, Reader, SourceDescription};
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::wire::ImageKind;
use pcopy::{Link, NothingToQuiesce, Quiesce, ReceiveOptions, SendReport, Silent, Source, send_original};
use ploop_core::format::{Mode, Version};
use ploop_core::io::IoBuf;
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::units::Sectors;
use ploop_core::{ErrorKind, Extent, Result};
use support::patience::PATIENCE;
use support::*;

/// Not a whole number of clusters for the larger ones, as a raw disk may be.
const LEN: u64 = (9 << 20) + (32 << 10);

fn original_disk(folder: &Path, mode: Mode, version: Version, cluster: u64) -> Served {
    new_disk(folder, LEN, cluster, |options| {
        (options.cluster, options.mode, options.version) = (Sectors(cluster), mode, version);
    })
}

/// Sends into a receiver of ours; with a way back for what it says of the sync mark.
fn copy_original(
    source: &mut dyn Source,
    quiesce: &mut dyn Quiesce,
    target: &Path,
    feedback: bool,
) -> (Result<SendReport>, Result<pcopy::ReceiveReport>) {
    let ends = ends(feedback, false);
    let options = ReceiveOptions { stall_timeout: PATIENCE, feedback, ..Default::default() };
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let mut destination = ImageDestination::new(target, ImageOptions::default()).unwrap();
            pcopy::receive(ends.receiver, &mut destination, &options, &Silent)
        });
        let sent = send_original(source, quiesce, ends.sender, &send_options(PATIENCE), &Silent);
        (sent, receiving.join().unwrap())
    })
}

#[test]
fn a_disk_in_use_arrives_as_an_image_that_others_can_read() {
    for (mode, version, cluster, feedback) in [
        (Mode::Expanded, Version::V2, 64, true),
        (Mode::Expanded, Version::V2, 2048, false),
        (Mode::Expanded, Version::V1, 128, true),
        (Mode::Preallocated, Version::V2, 256, false),
        (Mode::Raw, Version::V2, 64, true),
    ] {
        let root = referee::folder();
        let served = original_disk(&root.path().join("from"), mode, version, cluster);
        let len = served.disk.size_bytes();
        let writer = Writer::start(&served, len, cluster, Duration::from_micros(500));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let mut source = DiskSource::new(&served.disk).unwrap();
        let target = root.path().join("copy.hds");
        let (sent, received) = copy_original(&mut source, &mut quiesce, &target, feedback);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert!(received.legacy && !sent.committed);
        assert_eq!((quiesce.freezes, quiesce.thaws), (1, 1));
        assert!(writer.is_alive());
        assert!(
            content_of(&target, None) == quiesce.snapshot.take().unwrap(),
            "{mode:?} {version:?} {cluster}"
        );
        // Zeros have no place: at most what was written, rounded up to clusters.
        let file_bytes = std::fs::metadata(&target).unwrap().len();
        assert!(file_bytes <= len + 4 * cluster * 512, "{file_bytes} bytes");
        drop((source, quiesce, writer));
        served.close();
        // The referee checks both images and reads the copy as it goes.
        assert!(referee::judge_all(root.path()) >= 1);
    }
}

#[test]
fn an_empty_disk_is_an_image_without_data() {
    let root = referee::folder();
    let from = root.path().join("from");
    std::fs::create_dir(&from).unwrap();
    create(&CreateOptions::new(&from, "root.hds", Sectors(20480))).unwrap();
    let mut source = DiskSource::open_closed(&from, None).unwrap();
    let target = root.path().join("copy.hds");
    let (sent, received) = copy_original(&mut source, &mut NothingToQuiesce, &target, false);
    assert_eq!(sent.unwrap().data_bytes, 0);
    received.unwrap();
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 1 << 20);
}

/// The stream of a closed disk, and what was sent in answer to its sync mark.
fn stream_of(disk: &Path, answer: Option<&'static [u8]>) -> (Result<SendReport>, Vec<u8>) {
    let mut source = DiskSource::open_closed(disk, None).unwrap();
    let ends = ends(answer.is_some(), true);
    let Link { input, output } = ends.receiver;
    let collect = std::thread::spawn(move || {
        let mut stream = Vec::new();
        if let (Some(answer), Some(output)) = (answer, output) {
            // Before it is asked for: it waits in the pipe.
            std::fs::File::from(output).write_all(answer).unwrap();
        }
        std::fs::File::from(input.unwrap()).read_to_end(&mut stream).unwrap();
        stream
    });
    let sent =
        send_original(&mut source, &mut NothingToQuiesce, ends.sender, &send_options(PATIENCE), &Silent);
    (sent, collect.join().unwrap())
}

#[test]
fn the_stream_is_what_the_original_understands() {
    let root = referee::folder();
    let from = root.path().join("from");
    original_disk(&from, Mode::Expanded, Version::V2, 64).close();
    let (sent, stream) = stream_of(&from, None);
    sent.unwrap();
    // A receiver as the original has it: packets of a marker, a size up to a cluster and a place, then the data.
    let mut file = Vec::new();
    let (mut rest, mut marks, mut places) = (&stream[..], 0, Vec::new());
    loop {
        assert_eq!(rest[..4], 0x4cc0_ac3d_u32.to_le_bytes());
        let size = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        let place = u64::from_le_bytes(rest[8..16].try_into().unwrap()) as usize;
        if size == 0 {
            assert_eq!(rest.len(), 16, "something follows the end");
            break;
        }
        assert!(size <= 64 * 512 && (size == 4 || size.is_multiple_of(512)), "a packet of {size} bytes");
        marks += u32::from(size == 4);
        if file.len() < place + size {
            file.resize(place + size, 0);
        }
        file[place..place + size].copy_from_slice(&rest[16..16 + size]);
        places.push(place);
        rest = &rest[16 + size..];
    }
    assert_eq!(marks, 1);
    assert_eq!(places.last(), Some(&0), "the header is not last");
    let target = root.path().join("copy.hds");
    std::fs::write(&target, file).unwrap();
    assert!(content_of(&target, None) == content_of(&from, None));
}

#[test]
fn the_answer_to_the_sync_mark_decides() {
    let root = referee::folder();
    let from = root.path().join("from");
    original_disk(&from, Mode::Expanded, Version::V2, 64).close();
    stream_of(&from, Some(b"SUCCESS\n")).0.unwrap();
    for (answer, kind) in [
        (&b"FAILURE\n"[..], ErrorKind::Sync),
        (b"whatever", ErrorKind::Protocol),
        (b"SUCC", ErrorKind::Protocol),
        (b"", ErrorKind::Protocol),
    ] {
        let (sent, stream) = stream_of(&from, Some(answer));
        assert_eq!(sent.unwrap_err().kind(), kind, "{answer:?}");
        // Neither header nor end has been sent.
        assert!(!stream.ends_with(&[0; 12]));
    }
}

#[test]
fn a_receiver_that_goes_away_leaves_the_source_running() {
    for bytes in [0, 100_000, 1_000_000] {
        let root = referee::folder();
        let served = original_disk(&root.path().join("from"), Mode::Expanded, Version::V2, 64);
        let writer = Writer::start(&served, LEN, 5, Duration::from_micros(500));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let mut source = DiskSource::new(&served.disk).unwrap();
        let ends = ends(false, false);
        let reading = std::thread::spawn(move || {
            let mut input = std::fs::File::from(ends.receiver.input.unwrap());
            input.read_exact(&mut vec![0; bytes]).unwrap();
        });
        let sent = send_original(&mut source, &mut quiesce, ends.sender, &send_options(PATIENCE), &Silent);
        reading.join().unwrap();
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::Write);
        assert_eq!(quiesce.freezes, quiesce.thaws);
        assert!(writer.is_alive());
        assert!(served.disk.freeze(PATIENCE).is_ok());
        drop((source, quiesce, writer));
        served.close();
    }
}

#[test]
fn a_freeze_command_that_fails_sends_no_header() {
    let root = referee::folder();
    let served = original_disk(&root.path().join("from"), Mode::Expanded, Version::V2, 64);
    let mut quiesce = TestQuiesce::new(&served, None);
    quiesce.fail_hook = true;
    let mut source = DiskSource::new(&served.disk).unwrap();
    let target = root.path().join("copy.hds");
    let (sent, received) = copy_original(&mut source, &mut quiesce, &target, false);
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::NotQuiet);
    assert_eq!(received.unwrap_err().kind(), ErrorKind::Read);
    assert!(!target.exists() && !quiesce.hook_begun);
    drop((source, quiesce));
    served.close();
}

/// A disk whose reads see what is there when they are submitted and finish in reverse order; while the second changed run
/// is taken, the guest writes once more. Nothing has a place yet.
struct Backwards {
    bytes: Arc<Mutex<Vec<u8>>>,
    taken: u32,
}

const BACKWARDS_CLUSTER: usize = 64 * 512;

struct BackwardsReader {
    bytes: Arc<Mutex<Vec<u8>>>,
    waiting: Vec<(u64, IoBuf)>,
}

struct NoLoan(Extent);

impl Loan for NoLoan {
    fn extent(&self) -> Extent {
        self.0
    }
    fn acknowledge(self: Box<Self>) {}
}

struct NoGate;

impl Gate for NoGate {}

impl Reader for BackwardsReader {
    fn next_data(&mut self, _from: u64) -> Result<Option<Extent>> {
        Ok(None)
    }
    fn submit(&mut self, token: u64, at: u64, mut buffer: IoBuf) -> Result<()> {
        let len = buffer.len();
        buffer.as_mut_slice().copy_from_slice(&self.bytes.lock().unwrap()[at as usize..][..len]);
        self.waiting.push((token, buffer));
        Ok(())
    }
    fn finish(&mut self) -> Result<Option<(u64, IoBuf)>> {
        Ok(self.waiting.pop())
    }
    fn in_flight(&self) -> usize {
        self.waiting.len()
    }
}

impl Source for Backwards {
    fn size_bytes(&self) -> u64 {
        4 * BACKWARDS_CLUSTER as u64
    }
    fn description(&self) -> SourceDescription {
        SourceDescription {
            name: "backwards".into(),
            version: 2,
            cluster_sectors: 64,
            image: ImageKind::Expanded,
            data_bytes: 0,
            has_parent: false,
        }
    }
    fn start_tracking(&mut self) -> Result<()> {
        Ok(())
    }
    fn stop_tracking(&mut self) {}
    fn take_dirty(&mut self, from: u64, _len_max: u64) -> Option<Box<dyn Loan>> {
        self.taken += 1;
        let at = match self.taken {
            1 => 0,
            2 => {
                // After the first read, before this run is taken: it is this loan that answers for it.
                self.bytes.lock().unwrap()[8192..12288].fill(9);
                8192
            }
            _ => return None,
        };
        assert!(at >= from);
        Some(Box::new(NoLoan(Extent::between(at, at + 4096))))
    }
    fn dirty_bytes(&self) -> u64 {
        2_u32.saturating_sub(self.taken).into()
    }
    fn is_clean(&self) -> bool {
        self.taken >= 2
    }
    fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(BackwardsReader { bytes: Arc::clone(&self.bytes), waiting: Vec::new() }))
    }
    fn close_gate(&mut self, _timeout: Duration) -> Result<Box<dyn Gate>> {
        Ok(Box::new(NoGate))
    }
}

#[test]
fn what_is_sent_later_is_never_older() {
    let root = referee::folder();
    let bytes = Arc::new(Mutex::new(vec![0; 4 * BACKWARDS_CLUSTER]));
    bytes.lock().unwrap()[..16384].fill(1);
    let mut source = Backwards { bytes: Arc::clone(&bytes), taken: 0 };
    let target = root.path().join("copy.hds");
    let (sent, received) = copy_original(&mut source, &mut NothingToQuiesce, &target, false);
    sent.unwrap();
    received.unwrap();
    assert!(content_of(&target, None) == *bytes.lock().unwrap());
}
