//! Trouble on the line: cuts, flipped bits, lost and doubled bytes, silence, at every frame boundary and anywhere, in
//! both directions. After each: the right kinds of failure, nothing under the final name unless it is whole, writers
//! running, and the next attempt succeeds. Half of the trials copy disks in memory, half image files to image files.
//!
//! `PLOOP_CHAOS_TRIALS` sets the number of random trials, `PLOOP_CHAOS_SEED` the first seed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use pcopy::memory::{MemoryDestination, MemoryDisk, Outcome};
use pcopy::source::DiskSource;
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::wire::ImageKind;
use pcopy::{Destination, Link, Source};
use ploop_core::ErrorKind;
use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::io::Access;
use ploop_core::ops::create::{CreateOptions, create};
use ploop_core::units::Sectors;
use support::patience::PATIENCE;
use support::*;

/// What a side waits for a line that may have become silent. Short, and so sometimes mistaken on a busy machine: who expects one
/// kind of failure has [`PATIENCE`] instead.
const STALL: Duration = Duration::from_millis(400);
const LEN: usize = 1 << 20;

struct Trial {
    seed: u64,
    /// Image files at both ends, else memory.
    files: bool,
    two_way: bool,
    socket: bool,
    /// Trouble in the stream, and in the answers.
    stream: Trouble,
    answers: Trouble,
    /// How long silence is borne.
    stall: Duration,
}

struct Outcomes {
    sent: Option<ErrorKind>,
    received: Option<ErrorKind>,
    stream_bytes: u64,
    answer_bytes: u64,
}

fn run(trial: &Trial) -> Outcomes {
    let what = format!(
        "seed {} files {} two-way {} socket {} stream {:?} answers {:?}",
        trial.seed, trial.files, trial.two_way, trial.socket, trial.stream, trial.answers
    );
    must_end(&what, || run_unwatched(trial, &what))
}

/// A source and where copies of it go.
trait Place {
    type Disk: Writable;
    type Source: Source;
    type Target: Destination + Send;
    fn disk(&self) -> Self::Disk;
    fn source(&self) -> Self::Source;
    /// A new one, where nothing has arrived yet.
    fn target(&self) -> Self::Target;
    /// What the last target has under its final name. Nothing else may be left of it.
    fn arrived(&self, target: &Self::Target) -> Option<Vec<u8>>;
    /// That nothing is held or tracked any more.
    fn check_source(&self, messages: &str);
}

struct Memory(MemoryDisk);

impl Place for Memory {
    type Disk = MemoryDisk;
    type Source = MemoryDisk;
    type Target = MemoryDestination;

    fn disk(&self) -> MemoryDisk {
        self.0.clone()
    }
    fn source(&self) -> MemoryDisk {
        self.0.clone()
    }
    fn target(&self) -> MemoryDestination {
        MemoryDestination::new()
    }
    fn arrived(&self, target: &MemoryDestination) -> Option<Vec<u8>> {
        assert_ne!(target.outcome(), Outcome::Incoming);
        (target.outcome() == Outcome::Committed).then(|| target.content())
    }
    fn check_source(&self, messages: &str) {
        let (closed, opened) = self.0.gate_moves();
        assert_eq!(closed, opened, "{messages}");
        assert!(!self.0.is_tracked(), "{messages}");
    }
}

/// Images of different formats, with descriptors.
struct Files {
    folder: referee::JudgedFolder,
    served: Served,
    targets: Cell<u32>,
    seed: u64,
}

impl Files {
    fn new(seed: u64) -> Self {
        let folder = referee::folder();
        let from = folder.path().join("from");
        std::fs::create_dir(&from).unwrap();
        let mut options = CreateOptions::new(&from, "root.hds", Sectors(LEN as u64 / 512));
        options.cluster = Sectors([64, 128, 256][seed as usize % 3]);
        create(&options).unwrap();
        let served = Served::open(&from, None, Access::ReadWrite);
        for (index, chunk) in content(seed, LEN).chunks(64 << 10).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                served.write(index as u64 * (64 << 10), chunk);
            }
        }
        Self { folder, served, targets: Cell::new(0), seed }
    }

    fn target_folder(&self) -> PathBuf {
        self.folder.path().join(format!("to-{}", self.targets.get()))
    }
}

impl Place for Files {
    type Disk = Served;
    type Source = DiskSource;
    type Target = ImageDestination;

    fn disk(&self) -> Served {
        self.served.clone()
    }
    fn source(&self) -> DiskSource {
        DiskSource::new(&self.served.disk).unwrap()
    }
    fn target(&self) -> ImageDestination {
        self.targets.update(|number| number + 1);
        let folder = self.target_folder();
        std::fs::create_dir(&folder).unwrap();
        let image = [None, Some(ImageKind::Expanded), Some(ImageKind::Raw)][self.seed as usize / 3 % 3];
        let options = ImageOptions { image, ..ImageOptions::default() };
        ImageDestination::new(&folder.join("copy.hds"), options).unwrap()
    }
    fn arrived(&self, _target: &ImageDestination) -> Option<Vec<u8>> {
        let folder = self.target_folder();
        let mut names: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        if names.is_empty() {
            return None;
        }
        assert_eq!(names, [DESCRIPTOR_NAME, "copy.hds"], "half a copy");
        let copy = Served::open(&folder, None, Access::ReadOnly);
        let content = copy.content();
        copy.close();
        Some(content)
    }
    fn check_source(&self, messages: &str) {
        let frozen = self.served.disk.freeze(PATIENCE);
        assert!(frozen.is_ok(), "{messages}: the gate is still closed");
    }
}

fn run_unwatched(trial: &Trial, what: &str) -> Outcomes {
    if trial.files {
        let files = Files::new(trial.seed);
        let outcomes = run_at(&files, trial, what);
        let Files { folder, served, .. } = files;
        served.close();
        drop(folder);
        outcomes
    } else {
        run_at(&Memory(MemoryDisk::new(content(trial.seed, LEN))), trial, what)
    }
}

fn run_at<P: Place>(place: &P, trial: &Trial, what: &str) -> Outcomes {
    let mut random = Random(trial.seed);
    let disk = place.disk();
    let mut source = place.source();
    let writer = Writer::start(&disk, LEN as u64, trial.seed, Duration::from_micros(500));
    let mut quiesce = TestQuiesce::new(&disk, Some(&writer));
    let mut destination = place.target();
    let near = ends(trial.two_way, trial.socket);
    let far = ends(trial.two_way, trial.socket);
    // near: sender to proxy; far: proxy to receiver.
    let stream = carry(
        near.receiver.input.unwrap(),
        far.sender.output.unwrap(),
        trial.stream,
        Random(random.next()),
        STALL * 4,
    );
    let answers = trial.two_way.then(|| {
        let (input, output) = (far.sender.input.unwrap(), near.receiver.output.unwrap());
        carry(input, output, trial.answers, Random(random.next()), STALL * 4)
    });
    let ends = Ends {
        sender: near.sender,
        receiver: Link { input: far.receiver.input, output: far.receiver.output },
    };
    let both = copy(&mut source, &mut quiesce, &mut destination, ends, &send_options(trial.stall));
    let (sent, received) = (both.sent.as_ref().err(), both.received.as_ref().err());
    let messages = format!("{what}: sender {sent:?}, receiver {received:?}");
    let (sent, received) = (sent.map(|error| error.kind()), received.map(|error| error.kind()));

    // Whatever happened: writers run, nothing is tracked, nothing half-done has the final name.
    assert_eq!(quiesce.freezes, quiesce.thaws, "{messages}");
    place.check_source(&messages);
    assert!(writer.is_alive(), "{messages}");
    let arrived = place.arrived(&destination);
    assert_eq!(arrived.is_some(), received.is_none(), "{messages}");
    if let Some(arrived) = arrived {
        assert!(arrived == quiesce.snapshot.take().unwrap(), "{messages}");
        // Two-way, a sender that failed knows of no copy, unless it says that it does not know.
        let fits = !trial.two_way || matches!(sent, None | Some(ErrorKind::OutcomeUnknown));
        assert!(fits, "{messages}");
    } else if trial.two_way {
        assert!(sent.is_some(), "{messages}");
    }
    let kinds = [
        ErrorKind::Read,
        ErrorKind::Write,
        ErrorKind::Protocol,
        ErrorKind::OutcomeUnknown,
        // A writer may be fast enough for the shortened copy never to become quiet.
        ErrorKind::NotQuiet,
    ];
    for kind in [sent, received].into_iter().flatten() {
        assert!(kinds.contains(&kind), "{messages}");
    }

    // Trying again just works.
    let mut again = TestQuiesce::new(&disk, Some(&writer));
    let mut fresh = place.target();
    let both = copy(
        &mut source,
        &mut again,
        &mut fresh,
        support::ends(trial.two_way, trial.socket),
        &send_options(PATIENCE),
    );
    both.sent.unwrap();
    both.received.unwrap();
    assert!(place.arrived(&fresh) == again.snapshot.take(), "{messages}: retry");
    drop(writer);
    Outcomes {
        sent,
        received,
        stream_bytes: stream.join().unwrap(),
        answer_bytes: answers.map_or(0, |answers| answers.join().unwrap()),
    }
}

fn trial(seed: u64, two_way: bool) -> Trial {
    // Even seeds are those with sockets.
    let files = seed % 4 >= 2;
    Trial {
        seed,
        files,
        two_way,
        socket: seed.is_multiple_of(2),
        stream: Trouble::None,
        answers: Trouble::None,
        stall: PATIENCE,
    }
}

#[test]
fn without_trouble_ragged_pieces_do_no_harm() {
    for seed in 0..4 {
        let outcomes = run(&trial(seed, seed < 2));
        assert_eq!((outcomes.sent, outcomes.received), (None, None), "seed {seed}");
    }
}

#[test]
fn a_flipped_bit_is_a_protocol_error_and_a_cut_an_early_end() {
    let mut random = Random(77);
    for seed in 0..12 {
        let two_way = seed % 2 == 0;
        // The first pass alone is longer than this.
        let at = random.below(300 << 10);
        let flip = Trouble::Flip(at, u8::try_from(random.below(8)).unwrap());
        let outcomes = run(&Trial { stream: flip, ..trial(seed, two_way) });
        assert_eq!(outcomes.received, Some(ErrorKind::Protocol), "{flip:?}");
        if two_way {
            assert_eq!(outcomes.sent, Some(ErrorKind::Protocol), "{flip:?}");
        }
        let outcomes = run(&Trial { stream: Trouble::Cut(at), ..trial(seed, two_way) });
        assert_eq!(outcomes.received, Some(ErrorKind::Read), "cut at {at}");
    }
}

#[test]
fn a_silent_line_is_left_after_the_time_out() {
    for (two_way, stream, answers) in [
        (true, Trouble::Stall(200_000), Trouble::None),
        (true, Trouble::None, Trouble::Stall(100)),
        (false, Trouble::Stall(200_000), Trouble::None),
    ] {
        let outcomes = run(&Trial { stream, answers, stall: STALL, ..trial(3, two_way) });
        assert!(outcomes.received.is_some());
        assert_eq!(two_way, outcomes.sent.is_some() && two_way);
    }
}

/// The last bytes decide: cut and flip at every byte of the tail of both directions, where seal, verdict, commit and
/// its answer are.
#[test]
fn every_boundary_of_the_end_game() {
    let plain = run(&trial(8, true));
    let mut unknown = 0;
    // Offsets counted from the end; a frame is 64 bytes and its payload.
    let frames = [64, 64 + 64, 64 + 64 + 64 + 8];
    for tail in frames.into_iter().flat_map(|frame| [frame - 1, frame, frame + 1, frame + 31]) {
        // The length of a stream depends on the writer: the position is only about there.
        let stream = Trouble::Cut(plain.stream_bytes.saturating_sub(tail));
        run(&Trial { stream, ..trial(8, true) });
    }
    for tail in (0..240).step_by(9) {
        let at = plain.answer_bytes.saturating_sub(tail);
        for answers in [Trouble::Cut(at), Trouble::Flip(at, 3)] {
            let outcomes = run(&Trial { answers, ..trial(8, true) });
            if outcomes.sent == Some(ErrorKind::OutcomeUnknown) {
                assert_eq!(outcomes.received, None);
                unknown += 1;
            }
        }
    }
    println!("outcome unknown to the sender in {unknown} trials");
}

#[test]
fn chaos() {
    let number = |name: &str, default| {
        std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok()).unwrap_or(default)
    };
    let trials = number("PLOOP_CHAOS_TRIALS", 200);
    let first = number("PLOOP_CHAOS_SEED", 1);
    let mut tally = std::collections::BTreeMap::<String, u32>::new();
    for seed in first..first + trials {
        let mut random = Random(seed.wrapping_mul(0x1234_5678_9abc));
        let two_way = random.below(3) > 0;
        let plain = |random: &mut Random, limit: u64| match random.below(10) {
            0..3 => Trouble::Cut(random.below(limit)),
            3..7 => Trouble::Flip(random.below(limit), u8::try_from(random.below(8)).unwrap()),
            7 => Trouble::Drop(random.below(limit), 1 + random.below(200)),
            8 => Trouble::Double(random.below(limit), 1 + random.below(200)),
            _ => Trouble::Stall(random.below(limit)),
        };
        let in_answers = two_way && random.below(3) == 0;
        let trial = Trial {
            seed,
            files: seed % 2 == 0,
            two_way,
            socket: random.below(2) == 0,
            stream: if in_answers { Trouble::None } else { plain(&mut random, LEN as u64 * 4 / 5) },
            answers: if in_answers { plain(&mut random, 1200) } else { Trouble::None },
            stall: STALL,
        };
        let outcomes = run(&trial);
        *tally.entry(format!("{:?} / {:?}", outcomes.sent, outcomes.received)).or_default() += 1;
    }
    println!("{trials} trials from seed {first}: sender / receiver {tally:#?}");
}
