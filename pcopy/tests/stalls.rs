//! Waits of the two ends, one test for each row of "Waits" in docs/pcopy-protocol.md: a line that stands still in one
//! direction, a peer that lives and does nothing, one that is slow. What moves is waited for, what does not is left, on both
//! sides, and no copy gets its name unless both sides know.
//!
//! `PLOOP_STALL_TRIALS` sets the number of random trials, `PLOOP_STALL_SEED` the first seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcopy::memory::{MemoryDestination, MemoryDisk, Outcome};
use pcopy::source::Reader;
use pcopy::target::FileTarget;
use pcopy::wire::{self, FrameReader, HelloAck, Kind, WINDOW_BYTES_MIN};
use pcopy::{Destination, Event, Link, NothingToQuiesce, ReceiveOptions, SendOptions, Silent, Target};
use ploop_core::io::IoBuf;
use ploop_core::{ErrorKind, Extent, Result};
use support::*;

const STALL: Duration = Duration::from_millis(400);
/// How much later than it should something may end on a machine that is busy with other tests.
const BUSY: Duration = Duration::from_secs(40);
/// How many times the time-out a call may take that cannot be counted.
const CALL_FACTOR: u32 = 10;
const LEN: usize = 1 << 20;

/// Carries bytes until the byte where it stops, and from then on nothing, not even that an end was closed.
fn carry_until(at: u64, input: OwnedFd, output: OwnedFd, over: Arc<AtomicBool>) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let (mut input, mut output) = (std::fs::File::from(input), std::fs::File::from(output));
        let (mut position, mut buffer) = (0, vec![0; 16 << 10]);
        while !over.load(Ordering::SeqCst) {
            let left = usize::try_from(at - position).unwrap_or(usize::MAX).min(buffer.len());
            if left == 0 {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&input), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(20u8)).unwrap() == 0 {
                continue;
            }
            match input.read(&mut buffer[..left]) {
                Ok(count @ 1..) if output.write_all(&buffer[..count]).is_ok() => position += count as u64,
                _ => break,
            }
        }
        position
    })
}

struct Ended {
    sent: Option<ErrorKind>,
    received: Option<ErrorKind>,
    send_took: Duration,
    receive_took: Duration,
    carried: [u64; 2],
    messages: String,
}

/// Copies a small disk over a line each of whose directions stands still from a byte on.
fn over_line(seed: u64, stops: [u64; 2]) -> Ended {
    let source = MemoryDisk::new(content(seed, LEN));
    let writer = Writer::start(&source, LEN as u64, seed, Duration::from_millis(2));
    let mut quiesce = TestQuiesce::new(&source, Some(&writer));
    let mut destination = MemoryDestination::new();
    let socket = seed.is_multiple_of(2);
    let (near, far) = (ends(true, socket), ends(true, socket));
    let over = Arc::new(AtomicBool::new(false));
    let carriers = [
        carry_until(stops[0], near.receiver.input.unwrap(), far.sender.output.unwrap(), Arc::clone(&over)),
        carry_until(stops[1], far.sender.input.unwrap(), near.receiver.output.unwrap(), Arc::clone(&over)),
    ];
    let receive_options = ReceiveOptions { stall_timeout: STALL, ..Default::default() };
    let begun = Instant::now();
    let (sent, send_took, received, receive_took) = std::thread::scope(|scope| {
        let target = &mut destination;
        let receiving = scope.spawn(move || {
            let received = pcopy::receive(far.receiver, target, &receive_options, &Silent);
            (received, begun.elapsed())
        });
        let sent = pcopy::send(&mut source.clone(), &mut quiesce, near.sender, &send_options(STALL), &Silent);
        let send_took = begun.elapsed();
        let (received, receive_took) = receiving.join().unwrap();
        (sent, send_took, received, receive_took)
    });
    over.store(true, Ordering::SeqCst);
    let carried = carriers.map(|carrier| carrier.join().unwrap());
    let messages = format!(
        "seed {seed} stops {stops:?}: sender {:?}, receiver {:?}",
        sent.as_ref().err(),
        received.as_ref().err()
    );
    // Whatever happened: writers run, and the name is there only if the receiver says so.
    assert_eq!(quiesce.freezes, quiesce.thaws, "{messages}");
    assert!(writer.is_alive() && !source.is_tracked(), "{messages}");
    let arrived = destination.outcome() == Outcome::Committed;
    assert_ne!(destination.outcome(), Outcome::Incoming, "{messages}");
    assert_eq!(arrived, received.is_ok(), "{messages}");
    let (sent, received) = (sent.err().map(|error| error.kind()), received.err().map(|error| error.kind()));
    if arrived {
        assert!(matches!(sent, None | Some(ErrorKind::OutcomeUnknown)), "{messages}");
        assert!(destination.content() == quiesce.snapshot.take().unwrap(), "{messages}");
    } else {
        assert!(sent.is_some(), "{messages}");
    }
    Ended { sent, received, send_took, receive_took, carried, messages }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// In every state: the stop is anywhere in the stream or in the answers, often near their ends, where seal, verdict and
/// commit are.
#[test]
fn a_line_that_stands_still_in_one_direction_is_left_by_both_ends() {
    let trials = number("PLOOP_STALL_TRIALS", 64);
    let first = number("PLOOP_STALL_SEED", 1);
    let whole = over_line(first, [u64::MAX; 2]);
    assert_eq!((whole.sent, whole.received), (None, None), "{}", whole.messages);
    let next = AtomicU64::new(first);
    let tally = std::sync::Mutex::new(std::collections::BTreeMap::<String, u32>::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + trials {
                        return;
                    }
                    let mut random = Random(seed.wrapping_mul(0x9876_5432_1abc));
                    let direction = usize::try_from(seed % 2).unwrap();
                    let length = whole.carried[direction];
                    let at = match random.below(4) {
                        // The hello and its answer.
                        0 => random.below(200),
                        // The end game.
                        1 => length.saturating_sub(random.below(400)),
                        _ => random.below(length),
                    };
                    let mut stops = [u64::MAX; 2];
                    stops[direction] = at;
                    let ended = must_end(&format!("seed {seed}"), || over_line(seed, stops));
                    // A call that cannot be counted may be what was waited for; so may an end that could not be told.
                    let longest = STALL * CALL_FACTOR + BUSY;
                    for took in [ended.send_took, ended.receive_took] {
                        assert!(took < longest, "{took:?}: {}", ended.messages);
                    }
                    let kinds = [
                        ErrorKind::Read,
                        ErrorKind::Write,
                        ErrorKind::OutcomeUnknown,
                        // The writer may be too fast for a machine that is busy.
                        ErrorKind::NotQuiet,
                    ];
                    for kind in [ended.sent, ended.received].into_iter().flatten() {
                        assert!(kinds.contains(&kind), "{}", ended.messages);
                    }
                    let row = format!("{:?} / {:?}", ended.sent, ended.received);
                    *tally.lock().unwrap().entry(row).or_default() += 1;
                }
            });
        }
    });
    println!("{trials} trials from seed {first}: sender / receiver {:#?}", tally.lock().unwrap());
}

/// What a destination's disk does to each call.
#[derive(Clone, Default)]
struct Slow {
    sync: Duration,
    finish: Duration,
    read_back: Duration,
    commit: Duration,
    create: Duration,
}

struct SlowDestination(MemoryDestination, Slow);
struct SlowTarget(Box<dyn Target>, Slow);
struct SlowReader(Box<dyn Reader>, Duration);

impl Destination for SlowDestination {
    fn create(&mut self, hello: &wire::Hello) -> Result<Box<dyn Target>> {
        std::thread::sleep(self.1.create);
        Ok(Box::new(SlowTarget(self.0.create(hello)?, self.1.clone())))
    }
    fn create_file(&mut self) -> Result<Box<dyn FileTarget>> {
        self.0.create_file()
    }
}

impl Target for SlowTarget {
    fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()> {
        self.0.write(token, offset, buffer)
    }
    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.0.zero(extent)
    }
    fn finish(&mut self) -> Result<Option<u64>> {
        std::thread::sleep(self.1.finish);
        self.0.finish()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn sync(&mut self) -> Result<()> {
        std::thread::sleep(self.1.sync);
        self.0.sync()
    }
    fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(SlowReader(self.0.reader()?, self.1.read_back)))
    }
    fn begin_delta(&mut self, delta: &wire::Delta) -> Result<()> {
        self.0.begin_delta(delta)
    }
    fn end_delta(&mut self) -> Result<()> {
        self.0.end_delta()
    }
    fn commit(&mut self) -> Result<()> {
        std::thread::sleep(self.1.commit);
        self.0.commit()
    }
    fn discard(&mut self) -> Result<()> {
        self.0.discard()
    }
}

impl Reader for SlowReader {
    fn next_data(&mut self, from: u64) -> Result<Option<Extent>> {
        self.0.next_data(from)
    }
    fn next_own(&mut self, from: u64) -> Result<Option<Extent>> {
        self.0.next_own(from)
    }
    fn submit(&mut self, token: u64, at: u64, buffer: IoBuf) -> Result<()> {
        self.0.submit(token, at, buffer)
    }
    fn finish(&mut self) -> Result<Option<(u64, IoBuf)>> {
        std::thread::sleep(self.1);
        self.0.finish()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

/// Copies to a slow destination: how the sender ended, after how long, and what there is.
fn to_slow(slow: Slow, stall: Duration) -> (Option<ErrorKind>, Duration, Outcome) {
    let disk = MemoryDisk::new(content(5, LEN));
    let mut destination = SlowDestination(MemoryDestination::new(), slow);
    let ends = ends(true, false);
    let options = SendOptions { freeze_stall_timeout: Duration::from_secs(1000), ..send_options(stall) };
    let begun = Instant::now();
    let (sent, took) = std::thread::scope(|scope| {
        let (receiver, target) = (ends.receiver, &mut destination);
        let receive_options = ReceiveOptions { stall_timeout: stall, ..Default::default() };
        scope.spawn(move || pcopy::receive(receiver, target, &receive_options, &Silent));
        let mut quiesce = NothingToQuiesce;
        let sent = pcopy::send(&mut disk.clone(), &mut quiesce, ends.sender, &options, &Silent);
        (sent, begun.elapsed())
    });
    (sent.err().map(|error| error.kind()), took, destination.0.outcome())
}

#[test]
fn a_receiver_that_is_slow_but_works_is_waited_for() {
    // Each far longer than the time-out; a machine that is busy must not make the time-out itself too short.
    let stall = Duration::from_millis(1500);
    let long = stall * 2;
    for slow in [
        Slow { sync: long, ..Slow::default() },
        Slow { commit: long, ..Slow::default() },
        Slow { create: long, ..Slow::default() },
        Slow { read_back: Duration::from_millis(300), ..Slow::default() },
        Slow { finish: Duration::from_millis(300), ..Slow::default() },
    ] {
        let (sent, took, outcome) = to_slow(slow, stall);
        assert_eq!((sent, outcome), (None, Outcome::Committed));
        assert!(took > stall, "{took:?}");
    }
}

#[test]
fn a_receiver_that_lives_and_whose_disk_hangs_is_left() {
    let hang = STALL * CALL_FACTOR * 4;
    // A write takes no longer than the time-out, a call that cannot be counted a multiple of it.
    let writes = to_slow(Slow { finish: STALL * 20, ..Slow::default() }, STALL);
    assert_eq!((writes.0, writes.2), (Some(ErrorKind::Write), Outcome::Nothing));
    for slow in [Slow { sync: hang, ..Slow::default() }, Slow { create: hang, ..Slow::default() }] {
        let (sent, took, outcome) = to_slow(slow, STALL);
        assert_eq!((sent, outcome), (Some(ErrorKind::Write), Outcome::Nothing));
        assert!(took >= STALL * CALL_FACTOR && took < hang, "{took:?}");
    }
}

/// A receiver of our own making that opens its window, and from then on says what it is told to.
fn puppet(link: Link, says: impl Fn(&mut dyn FnMut(Kind, &[u8])) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut frames = FrameReader::new(std::fs::File::from(link.input.unwrap()));
        let mut output = std::fs::File::from(link.output.unwrap());
        let header = frames.header().unwrap().unwrap();
        frames.small_payload(&header).unwrap();
        let mut sequence = 0;
        let mut is_open = true;
        let mut say = |kind: Kind, payload: &[u8]| {
            let number = if kind.is_numbered() { sequence } else { 0 };
            sequence += u64::from(kind.is_numbered());
            let frame = wire::encode_frame(kind, number, payload).unwrap();
            is_open = is_open && output.write_all(&frame).is_ok();
            if !is_open {
                std::panic::resume_unwind(Box::new("the sender has left"));
            }
        };
        let ack = HelloAck { window_bytes: WINDOW_BYTES_MIN, protocol_version: 1 };
        say(Kind::HelloAck, &ack.encode());
        says(&mut say);
    })
}

fn to_puppet(
    stall: Duration,
    says: impl Fn(&mut dyn FnMut(Kind, &[u8])) + Send + 'static,
) -> (ErrorKind, Duration) {
    let disk = MemoryDisk::new(content(5, LEN));
    let ends = ends(true, true);
    let puppet = puppet(ends.receiver, says);
    let begun = Instant::now();
    let sent =
        pcopy::send(&mut disk.clone(), &mut NothingToQuiesce, ends.sender, &send_options(stall), &Silent);
    let took = begun.elapsed();
    let _left = puppet.join();
    (sent.unwrap_err().kind(), took)
}

const HELLO_BYTES: u64 = (wire::HEADER_BYTES + wire::Hello::BYTES) as u64;

#[test]
fn signs_of_life_are_not_progress() {
    // A thread of this test may be late, and must not be taken for a silent receiver.
    const STALL: Duration = Duration::from_secs(2);
    const REPORTS: u32 = 120;
    const PAUSE: Duration = Duration::from_millis(50);
    let alive = |say: &mut dyn FnMut(Kind, &[u8])| {
        loop {
            say(Kind::Keepalive, &[]);
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    // It reports its work, so its silence about it means something.
    let (kind, took) = to_puppet(STALL, move |say| {
        say(Kind::Credit, &HELLO_BYTES.to_le_bytes());
        say(Kind::Credit, &HELLO_BYTES.to_le_bytes());
        alive(say);
    });
    assert_eq!(kind, ErrorKind::Write);
    assert!(took >= STALL && took < BUSY, "{took:?}");
    // An older receiver says no more than that it lives while it syncs: it has longer, and not for ever.
    let (kind, took) = to_puppet(STALL, move |say| {
        say(Kind::Credit, &HELLO_BYTES.to_le_bytes());
        alive(say);
    });
    assert_eq!(kind, ErrorKind::Write);
    assert!(took >= STALL * CALL_FACTOR && took < STALL * CALL_FACTOR + BUSY, "{took:?}");
    // One that reports work all the time is believed as long as the operator likes, here until it falls silent.
    let (kind, took) = to_puppet(STALL, |say| {
        for _ in 0..REPORTS {
            say(Kind::Credit, &HELLO_BYTES.to_le_bytes());
            std::thread::sleep(PAUSE);
        }
        std::thread::sleep(STALL * 2);
    });
    assert_eq!(kind, ErrorKind::Read);
    // One pause less than reports lies before the last of them.
    assert!(took >= PAUSE * (REPORTS - 1) + STALL, "{took:?}");
}

/// Both ends are open, and nobody is there: what `--to 'sleep 1000'` is.
#[test]
fn a_peer_that_never_says_anything_is_left_by_either_side() {
    let disk = MemoryDisk::new(content(5, LEN));
    let one = ends(true, false);
    let begun = Instant::now();
    let sent =
        pcopy::send(&mut disk.clone(), &mut NothingToQuiesce, one.sender, &send_options(STALL), &Silent);
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Read);
    let took = begun.elapsed();
    assert!(took >= STALL && took < STALL + BUSY, "{took:?}");
    drop(one.receiver);

    let other = ends(true, false);
    let options = ReceiveOptions { stall_timeout: STALL, ..Default::default() };
    let mut destination = MemoryDestination::new();
    let received = pcopy::receive(other.receiver, &mut destination, &options, &Silent);
    assert_eq!(received.unwrap_err().kind(), ErrorKind::Read);
    assert_eq!(destination.outcome(), Outcome::Nothing);
}

/// Slower than one frame in the time-out, and moving all the time.
#[test]
fn a_slow_line_is_no_stall() {
    let disk = MemoryDisk::new(vec![7; 512 << 10]);
    let mut destination = MemoryDestination::new();
    let (near, far) = (ends(true, false), ends(true, false));
    let (input, output) = (near.receiver.input.unwrap(), far.sender.output.unwrap());
    let slow = std::thread::spawn(move || {
        let (mut input, mut output) = (std::fs::File::from(input), std::fs::File::from(output));
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = input.read(&mut buffer) {
            std::thread::sleep(Duration::from_millis(100));
            if output.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
    let both = copy(
        &mut disk.clone(),
        &mut NothingToQuiesce,
        &mut destination,
        Ends {
            sender: Link { input: near.sender.input, output: near.sender.output },
            receiver: Link { input: far.receiver.input, output: near.receiver.output },
        },
        &SendOptions {
            freeze_stall_timeout: Duration::from_secs(1000),
            ..send_options(Duration::from_millis(1500))
        },
    );
    both.sent.unwrap();
    both.received.unwrap();
    assert_eq!(destination.outcome(), Outcome::Committed);
    slow.join().unwrap();
}

/// A failure says whether the source runs and whether there may be a copy.
#[test]
fn a_failure_says_what_is_known_of_the_copy() {
    for (stop, may_be_in_place) in [([2000, u64::MAX], false), ([u64::MAX, 100], false)] {
        let said = std::sync::Mutex::new(None);
        let disk = MemoryDisk::new(content(5, LEN));
        let mut destination = MemoryDestination::new();
        let (near, far) = (ends(true, false), ends(true, false));
        let over = Arc::new(AtomicBool::new(false));
        let stream =
            carry_until(stop[0], near.receiver.input.unwrap(), far.sender.output.unwrap(), Arc::clone(&over));
        let answers =
            carry_until(stop[1], far.sender.input.unwrap(), near.receiver.output.unwrap(), Arc::clone(&over));
        let both = copy_observed(
            &mut disk.clone(),
            &mut NothingToQuiesce,
            &mut destination,
            Ends { sender: near.sender, receiver: far.receiver },
            &send_options(STALL),
            &|event: &Event| {
                if let Event::Failed { runs, may_be_in_place } = event {
                    *said.lock().unwrap() = Some((*runs, *may_be_in_place));
                }
            },
        );
        over.store(true, Ordering::SeqCst);
        assert!(both.sent.is_err() && both.received.is_err());
        assert_eq!(*said.lock().unwrap(), Some((true, may_be_in_place)));
        stream.join().unwrap();
        answers.join().unwrap();
    }
}
