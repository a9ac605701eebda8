//! A receiver that hangs while the disk is frozen: it is thawed within the limit, whatever the receiver does not do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pcopy::memory::{MemoryDestination, MemoryDisk, Outcome};
use pcopy::source::Reader;
use pcopy::target::FileTarget;
use pcopy::wire::Hello;
use pcopy::{Destination, Link, Quiesce, ReceiveOptions, SendOptions, Silent, Target, send, send_original};
use ploop_core::io::IoBuf;
use ploop_core::{ErrorKind, Extent, Result};
use support::patience::PATIENCE;
use support::*;

/// What other time-outs there are must not matter.
const STALL: Duration = Duration::from_secs(1000);
const LIMIT: Duration = Duration::from_secs(1);
const LEN: usize = 16 << 20;

/// Set when the disk is frozen, and when the test is over.
#[derive(Clone, Default)]
struct Moment {
    frozen: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

impl Moment {
    fn hangs(&self) -> bool {
        self.frozen.load(Ordering::SeqCst) && !self.over.load(Ordering::SeqCst)
    }

    fn wait(&self) {
        while self.hangs() {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Carries bytes, and nothing any more from the freeze on; both ends stay open until the test is over.
fn carry_until_frozen(input: OwnedFd, output: OwnedFd, moment: Moment) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut input, mut output) = (std::fs::File::from(input), std::fs::File::from(output));
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = input.read(&mut buffer) {
            moment.wait();
            if output.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
}

/// Freezes like `TestQuiesce`; its freeze command changes the whole disk, and it knows how long the freeze lasted.
struct Timed {
    inner: TestQuiesce<MemoryDisk>,
    moment: Moment,
    frozen: Option<Instant>,
    lasted: Option<Duration>,
}

impl Quiesce for Timed {
    fn sync_file_system(&mut self) -> Result<bool> {
        self.inner.sync_file_system()
    }
    fn run_hook(&mut self) -> Result<()> {
        self.inner.disk.write(0, &vec![0x5a; LEN]);
        self.inner.run_hook()
    }
    fn freeze_file_system(&mut self) -> Result<()> {
        self.inner.freeze_file_system()?;
        self.frozen = Some(Instant::now());
        self.moment.frozen.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn thaw(&mut self) -> Result<()> {
        self.lasted = self.lasted.or(self.frozen.map(|frozen| frozen.elapsed()));
        self.inner.thaw()
    }
}

/// A destination whose disk hangs from the freeze on: it takes all bytes and says that it is alive, no more.
struct Hanging(MemoryDestination, Moment);
struct HangingTarget(Box<dyn Target>, Moment);

impl Destination for Hanging {
    fn create(&mut self, hello: &Hello) -> Result<Box<dyn Target>> {
        Ok(Box::new(HangingTarget(self.0.create(hello)?, self.1.clone())))
    }
    fn create_file(&mut self) -> Result<Box<dyn FileTarget>> {
        self.0.create_file()
    }
}

impl Target for HangingTarget {
    fn write(&mut self, token: u64, offset: u64, buffer: IoBuf) -> Result<()> {
        self.0.write(token, offset, buffer)
    }
    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.0.zero(extent)
    }
    fn finish(&mut self) -> Result<Option<u64>> {
        self.0.finish()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn sync(&mut self) -> Result<()> {
        self.1.wait();
        self.0.sync()
    }
    fn reader(&self) -> Result<Box<dyn Reader>> {
        self.0.reader()
    }
    fn commit(&mut self) -> Result<()> {
        self.0.commit()
    }
    fn discard(&mut self) -> Result<()> {
        self.0.discard()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hangs {
    Never,
    Reading,
    Answering,
    Syncing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    OneWay,
    TwoWay,
    Original,
}

fn run(stream: Stream, socket: bool, hangs: Hangs) {
    let what = format!("{stream:?}, socket {socket}, hangs {hangs:?}");
    let two_way = stream == Stream::TwoWay;
    must_end(&what, || {
        let mut disk = MemoryDisk::new(content(5, LEN));
        let writer = Writer::start(&disk, LEN as u64, 5, Duration::from_micros(500));
        let moment = Moment::default();
        let mut quiesce = Timed {
            inner: TestQuiesce::new(&disk, Some(&writer)),
            moment: moment.clone(),
            frozen: None,
            lasted: None,
        };
        let unless = |whose| if hangs == whose { moment.clone() } else { Moment::default() };
        let (near, far) = (ends(two_way, socket), ends(two_way, socket));
        let mut carriers = vec![carry_until_frozen(
            near.receiver.input.unwrap(),
            far.sender.output.unwrap(),
            unless(Hangs::Reading),
        )];
        if let (Some(input), Some(output)) = (far.sender.input, near.receiver.output) {
            carriers.push(carry_until_frozen(input, output, unless(Hangs::Answering)));
        }
        let receiver = Link { input: far.receiver.input, output: far.receiver.output };
        let destination = MemoryDestination::new();
        let mut hanging = Hanging(destination, unless(Hangs::Syncing));
        // Who is not to be ended by it has more of it than a busy machine takes.
        let limit = if hangs == Hangs::Never { PATIENCE } else { LIMIT };
        let options = SendOptions { freeze_stall_timeout: limit, ..send_options(STALL) };
        let receive_options = ReceiveOptions { stall_timeout: STALL, ..Default::default() };
        let (sent, received) = std::thread::scope(|scope| {
            let hanging = &mut hanging;
            let receiving = scope.spawn(move || pcopy::receive(receiver, hanging, &receive_options, &Silent));
            let send = if stream == Stream::Original { send_original } else { send };
            let sent = send(&mut disk, &mut quiesce, near.sender, &options, &Silent);
            assert!(writer.is_alive(), "{what}");
            moment.over.store(true, Ordering::SeqCst);
            (sent, receiving.join().unwrap())
        });
        carriers.into_iter().for_each(|carrier| carrier.join().unwrap());
        let messages = format!("{what}: sender {sent:?}, receiver {received:?}");
        assert_eq!((quiesce.inner.freezes, quiesce.inner.thaws), (1, 1), "{messages}");
        let (closed, opened) = disk.gate_moves();
        assert_eq!(closed, opened, "{messages}");
        assert!(!disk.is_tracked(), "{messages}");
        let lasted = quiesce.lasted.unwrap();
        if hangs == Hangs::Never {
            sent.expect(&messages);
            received.expect(&messages);
            assert_eq!(hanging.0.outcome(), Outcome::Committed, "{messages}");
            return;
        }
        let error = sent.expect_err(&messages);
        assert_eq!(error.kind(), ErrorKind::NotQuiet, "{messages}");
        assert!(error.to_string().contains("of the freeze"), "{messages}");
        // Which of the time-outs it was, the message has said.
        assert!(lasted >= LIMIT, "{lasted:?}: {messages}");
        assert!(received.is_err(), "{messages}");
        assert_eq!(hanging.0.outcome(), Outcome::Nothing, "{messages}");
    });
}

#[test]
fn a_receiver_that_stops_reading_does_not_keep_the_disk_frozen() {
    for (stream, socket) in [(Stream::OneWay, false), (Stream::TwoWay, false), (Stream::TwoWay, true)] {
        run(stream, socket, Hangs::Reading);
    }
}

#[test]
fn neither_does_one_of_the_originals_stream() {
    for socket in [false, true] {
        run(Stream::Original, socket, Hangs::Reading);
    }
}

#[test]
fn a_receiver_that_stops_answering_does_not_keep_the_disk_frozen() {
    for socket in [false, true] {
        run(Stream::TwoWay, socket, Hangs::Answering);
    }
}

#[test]
fn a_receiver_whose_disk_hangs_does_not_keep_the_disk_frozen_by_being_alive() {
    run(Stream::TwoWay, false, Hangs::Syncing);
}

#[test]
fn one_that_does_not_hang_is_not_disturbed() {
    for stream in [Stream::OneWay, Stream::TwoWay, Stream::Original] {
        run(stream, false, Hangs::Never);
    }
}
