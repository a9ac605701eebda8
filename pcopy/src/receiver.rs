//! The receiving side: its phases as a list. Read it beside `sender.rs`.
//!
//! ```text
//! hello · passes (write, zero; end of pass: finish, sync, read back) · seal · verdict · commit · done
//! ```
//!
//! Delta by delta: `Delta` opens the one that follows on top of what it stands on, `EndDelta` closes it for good; the
//! last is the current state and ends as any copy does.
//!
//! Every failure leaves through one place, [`Receiver::unwind`]: the sender is told first, as its writers may stand
//! still, then what there is of the copy is removed. Nothing gets the final name before the seal was compared and
//! everything is durable and was read back.
//!
//! Threads: `intake` reads and checks, this one applies and answers, `verify` reads back, and one tells the sender that we
//! live, and whether our work moves. Memory: one pool of buffers, bounded queues.

use std::io::{BufReader, Cursor, Read, Write};
use std::time::{Duration, Instant};

use ploop_core::io::BufferPool;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::answering::Answers;
use crate::exchange::abort_payload;
use crate::intake::{Admission, Arrived, Intake};
use crate::legacy;
use crate::stats::{Event, Observer, ReceiveReport, hexadecimal, rate};
use crate::target::{Destination, Target};
use crate::transport::{self, Cancel, Link, Patience, Transport};
use crate::verify::Verifier;
use crate::wire::{self, Delta, Digest, EndDelta, EndPass, Header, Hello, HelloAck, Kind};
use crate::work::Work;

/// Memory of the buffers for frames.
const BUFFERS_BYTES: u32 = 48 << 20;
/// Writes under way at once.
const WRITES_MAX: usize = 32;
/// The most a sender may have outstanding.
const WINDOW_BYTES_MAX: u64 = 32 << 20;
/// Credit is given in steps of this part of the window.
const CREDIT_STEPS: u64 = 8;
/// The shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// How long a receiver whose way back broke waits for the sender's reason.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// What is read from the stream at once, for small frames.
const READ_BYTES: usize = 64 << 10;

/// What the operator wants of a copy that arrives.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// The sender may be silent for this long.
    pub stall_timeout: Duration,
    /// Whether everything is read back from the new image before it is called durable.
    pub read_back: bool,
    /// Ends the copy from outside.
    pub cancel: Option<Cancel>,
    /// A sender of the original's stream reads from the link's output how each of its sync marks went. Without this it
    /// is told nothing.
    pub feedback: bool,
}

impl Default for ReceiveOptions {
    /// 120 s for the sender; reads back.
    fn default() -> Self {
        Self { stall_timeout: Duration::from_secs(120), read_back: true, cancel: None, feedback: false }
    }
}

/// Receives a copy from `link` into what `destination` makes: this protocol, one-way or two-way as the stream says,
/// or the original's one-way stream.
///
/// Success means that the copy is complete, proven, durable and under its final name. After a failure there is nothing
/// under the final name ([`ErrorKind::OutcomeUnknown`]: not even that is certain).
pub fn receive(
    link: Link,
    destination: &mut dyn Destination,
    options: &ReceiveOptions,
    observer: &dyn Observer,
) -> Result<ReceiveReport> {
    let begun = Instant::now();
    let stop = Cancel::new()?;
    let mut cancels = vec![stop.clone()];
    cancels.extend(options.cancel.clone());
    let patience = Patience { stall: options.stall_timeout, cancels };
    let input = link
        .input
        .ok_or_else(|| Error::new(ErrorKind::Parameter, "a receiver needs something to receive from"))?;
    let mut input = BufReader::with_capacity(READ_BYTES, Transport::reader(input, patience.clone())?);
    let first = first_bytes(&mut input)?;
    if first == legacy::MARKER {
        let mut feedback = match link.output.filter(|_| options.feedback) {
            Some(output) => Some(Transport::writer(output, patience)?),
            None => None,
        };
        let feedback = feedback.as_mut().map(|feedback| feedback as &mut dyn Write);
        return legacy::receive(&mut input, feedback, destination, observer, begun).map_err(told_as_full);
    }
    let work = Work::default();
    let mut admission = Admission::new(Cursor::new(first).chain(input), work.clone(), options.stall_timeout);
    let (header, hello) = admission.hello().map_err(|error| explain_first(error, first))?;
    let answers = match (hello.two_way, link.output) {
        (false, _) => None,
        (true, Some(output)) => {
            let transport = Transport::writer(output, patience)?;
            Some(Answers::start(transport, options.stall_timeout, work.clone(), stop.clone())?)
        }
        (true, None) => {
            return Err(Error::new(
                ErrorKind::Protocol,
                "the sender waits for answers and there is no way back",
            )
            .advise("let the sender start this receiver with --to, or send one-way"));
        }
    };
    let mut receiver = Receiver {
        hello,
        options,
        observer,
        answers,
        target: None,
        intake: None,
        verifier: None,
        verified_before: 0,
        waiting: Vec::new(),
        credited: 0,
        consumed: header.frame_bytes(),
        window_bytes: 0,
        progress: Progress::new(),
        report: ReceiveReport {
            copy_id: String::new(),
            disk_bytes: 0,
            passes: 0,
            deltas: 0,
            data_bytes: 0,
            zero_bytes: 0,
            verified_bytes: 0,
            seconds: 0.0,
            sender_told: true,
            legacy: false,
        },
        work,
        stop,
    };
    match receiver.phases(admission, &header, destination) {
        Ok(()) => Ok(receiver.done(begun)),
        Err(error) => Err(receiver.unwind(error)),
    }
}

fn first_bytes(input: &mut impl Read) -> Result<[u8; 4]> {
    let mut first = [0; 4];
    let mut filled = 0;
    while filled < first.len() {
        let count = input
            .read(&mut first[filled..])
            .map_err(|error| transport::explain(ErrorKind::Read, "read the stream", error))?;
        if count == 0 {
            let found = if filled == 0 { "it is empty" } else { "it ends within its first bytes" };
            return Err(Error::new(ErrorKind::Read, format!("read the stream: {found}"))
                .advise("the sender did not start: see its message"));
        }
        filled += count;
    }
    Ok(first)
}

fn explain_first(error: Error, first: [u8; 4]) -> Error {
    if error.kind() != ErrorKind::Protocol || first[0] == Kind::Hello as u8 {
        return error;
    }
    Error::new(
        ErrorKind::Protocol,
        format!("this is no stream of ploop copy: it begins with \"{}\"", wire::printable(&first)),
    )
    .caused_by(error)
    .advise("see whether something prints into the pipe, such as a message at login")
}

struct Receiver<'a> {
    hello: Hello,
    options: &'a ReceiveOptions,
    observer: &'a dyn Observer,
    /// Two-way only.
    answers: Option<Answers>,
    target: Option<Box<dyn Target>>,
    intake: Option<Intake>,
    verifier: Option<Verifier>,
    /// Bytes that verifiers of earlier deltas have read back.
    verified_before: u64,
    /// Writes under way by token: the index.
    waiting: Vec<Option<Header>>,
    /// Bytes of frames dealt with, and how many of them the sender knows of.
    consumed: u64,
    credited: u64,
    window_bytes: u64,
    progress: Progress,
    report: ReceiveReport,
    /// What the sender is told of while it waits.
    work: Work,
    stop: Cancel,
}

/// What the events of a running pass say.
struct Progress {
    pass: u32,
    /// Bytes it will deal with, as far as the sender said.
    expected_bytes: u64,
    pass_begun: Instant,
    data_bytes: u64,
    done_bytes: u64,
    next_event: Instant,
}

impl Progress {
    fn new() -> Self {
        let now = Instant::now();
        Self { pass: 1, expected_bytes: 0, pass_begun: now, data_bytes: 0, done_bytes: 0, next_event: now }
    }
}

impl Receiver<'_> {
    fn phases<R: Read + Send + 'static>(
        &mut self,
        admission: Admission<R>,
        header: &Header,
        destination: &mut dyn Destination,
    ) -> Result<()> {
        self.hello(admission, header, destination)?;
        self.passes()?;
        let transcript = self.seal()?;
        self.verdict(&transcript)?;
        self.commit()
    }

    /// Makes a place for what is coming, then lets it come.
    fn hello<R: Read + Send + 'static>(
        &mut self,
        admission: Admission<R>,
        header: &Header,
        destination: &mut dyn Destination,
    ) -> Result<()> {
        self.report.copy_id = hexadecimal(&self.hello.copy_id);
        self.report.disk_bytes = self.hello.disk_bytes;
        self.target = Some(self.work.call(|| destination.create(&self.hello))?);
        let is_chain = self.hello.deltas > 0;
        if !is_chain {
            self.start_verifier()?;
        }
        let payload_bytes = self.hello.payload_bytes_max.next_multiple_of(4096);
        let payload_bytes_max = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
        // A slot per write under way; half of the buffers stay for the threads that read.
        let buffers = (BUFFERS_BYTES / payload_bytes).clamp(4, 256);
        let buffers = usize::try_from(buffers).unwrap_or(4);
        self.waiting = vec![None; WRITES_MAX.min(buffers / 2)];
        let pool = BufferPool::new(payload_bytes_max, buffers);
        self.intake = Some(Intake::start(admission, (header, &self.hello), pool, self.stop.clone())?);
        self.window_bytes = self.hello.window_bytes.clamp(wire::WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        let protocol_version = self.hello.protocol_version();
        let window_bytes = self.window_bytes;
        self.credited = self.consumed;
        self.tell(|answers| answers.welcome(&HelloAck { window_bytes, protocol_version }, self.consumed))?;
        self.observer.event(&Event::Started {
            copy_id: self.report.copy_id.clone(),
            disk_bytes: self.hello.disk_bytes,
            two_way: self.hello.two_way,
        });
        if !is_chain {
            self.start_pass(self.hello.data_bytes);
        }
        Ok(())
    }

    /// Reads back what is written to the target from now on.
    fn start_verifier(&mut self) -> Result<()> {
        if self.options.read_back {
            let payload_bytes = self.hello.payload_bytes_max.next_multiple_of(4096);
            let reader = self.target()?.reader()?;
            self.verifier = Some(Verifier::start(
                reader,
                usize::try_from(payload_bytes).unwrap_or(usize::MAX),
                &self.work,
            )?);
        }
        Ok(())
    }

    fn end_verifier(&mut self) {
        if let Some(mut verifier) = self.verifier.take() {
            verifier.end();
            self.verified_before = self.report.verified_bytes;
        }
    }

    /// What follows is the content of that delta.
    fn begin_delta(&mut self, delta: &Delta) -> Result<()> {
        self.consumed += wire::HEADER_BYTES as u64 + Delta::BYTES as u64;
        self.at_target(|target| target.begin_delta(delta))?;
        self.start_verifier()?;
        self.report.deltas = delta.index.saturating_add(1);
        self.observer.event(&Event::DeltaStarted {
            delta: self.report.deltas,
            deltas: self.hello.deltas,
            guid: hexadecimal(&delta.guid),
        });
        self.start_pass(delta.data_bytes);
        Ok(())
    }

    /// A frozen delta is whole, synced and read back: nothing is written to it any more.
    fn end_delta(&mut self, end: &EndDelta) -> Result<()> {
        self.consumed += wire::HEADER_BYTES as u64 + EndDelta::BYTES as u64;
        self.end_verifier();
        self.at_target(|target| target.end_delta())?;
        self.observer
            .event(&Event::DeltaEnded { delta: end.index.saturating_add(1), data_bytes: end.data_bytes });
        self.credit(false)
    }

    /// Applies frames until the last pass has ended.
    fn passes(&mut self) -> Result<()> {
        loop {
            match self.next()? {
                Arrived::Data(header, buffer) => {
                    let slot = self.free_slot()?;
                    self.waiting[slot] = Some(header);
                    self.target()?.write(slot as u64, header.offset, buffer)?;
                    self.report.data_bytes += header.extent;
                    self.progress.data_bytes += header.extent;
                    self.tick(header.extent);
                }
                Arrived::Zero(header) => {
                    let extent = Extent::between(header.offset, header.offset.saturating_add(header.extent));
                    self.target()?.zero(extent)?;
                    self.report.zero_bytes += header.extent;
                    self.applied(header)?;
                    self.tick(header.extent);
                }
                Arrived::EndPass(end) => {
                    self.end_pass(end)?;
                    if end.last {
                        return Ok(());
                    }
                }
                Arrived::Delta(delta) => self.begin_delta(&delta)?,
                Arrived::EndDelta(end) => self.end_delta(&end)?,
                // The rules let neither come before the last pass has ended.
                Arrived::Seal(_) | Arrived::Commit => return Err(unexpected()),
            }
        }
    }

    /// Everything of the pass is written before any of the next is; durable passes are also synced and read back.
    fn end_pass(&mut self, end: EndPass) -> Result<()> {
        while self.target()?.in_flight() > 0 {
            self.finish_write()?;
        }
        if end.durable {
            self.at_target(|target| target.sync())?;
        }
        if let Some(verifier) = &self.verifier {
            self.report.verified_bytes = self.verified_before + verifier.barrier()?;
        }
        self.consumed += wire::HEADER_BYTES as u64 + EndPass::BYTES as u64;
        self.credit(true)?;
        if end.durable {
            let pass = u64::from(end.pass);
            self.answer(Kind::PassDurable, &pass.to_le_bytes())?;
        }
        self.report.passes = end.pass;
        // A frozen delta has one pass; what follows it begins with the frame of the next one.
        if !end.last && self.report.deltas == self.hello.deltas {
            self.start_pass(0);
        }
        Ok(())
    }

    /// The sender's transcript equals ours: the intake has compared them.
    fn seal(&mut self) -> Result<Digest> {
        match self.next()? {
            Arrived::Seal(transcript) => {
                self.observer.event(&Event::Sealed { data_bytes: self.report.data_bytes, frames: 0 });
                Ok(transcript)
            }
            _ => Err(unexpected()),
        }
    }

    /// Two-way: says so, and waits for the wish to commit.
    fn verdict(&mut self, transcript: &Digest) -> Result<()> {
        self.observer.event(&Event::Verified);
        if !self.hello.two_way {
            return Ok(());
        }
        self.answer(Kind::Verdict, transcript)?;
        match self.next()? {
            Arrived::Commit => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Puts the copy in place, and says so.
    fn commit(&mut self) -> Result<()> {
        self.end_verifier();
        self.at_target(|target| target.commit())?;
        self.observer.event(&Event::Committed);
        // The copy is there. That the sender may not hear of it changes nothing: it will say that it does not know.
        self.report.sender_told = self.answer(Kind::Committed, &[]).is_ok();
        Ok(())
    }

    fn done(mut self, begun: Instant) -> ReceiveReport {
        if let Some(intake) = &mut self.intake {
            intake.end();
        }
        self.report.seconds = begun.elapsed().as_secs_f64();
        self.report.clone()
    }

    /// The one way out of a failure.
    fn unwind(mut self, error: Error) -> Error {
        let mut error = told_as_full(error);
        if let Some(answers) = self.answers.take() {
            let is_cancelled = self.options.cancel.as_ref().is_some_and(Cancel::is_cancelled);
            if error.kind() == ErrorKind::Cancelled && !is_cancelled {
                // Not the operator: the way back stood still.
                error = answers.broken().unwrap_or(error);
            }
            answers.abort(&abort_payload(&error));
        }
        if let Some(intake) = &mut self.intake {
            intake.end();
        }
        self.verifier = None;
        match self.target.take().map_or(Ok(()), |mut target| target.discard()) {
            Ok(()) => error,
            Err(left) => {
                let advice = format!("{}; then {left}", error.advice().unwrap_or("start the copy again"));
                error.advise(advice)
            }
        }
    }

    fn next(&mut self) -> Result<Arrived> {
        loop {
            let intake = self.intake.as_ref().ok_or_else(unexpected)?;
            if let Some(next) = intake.try_next() {
                return next;
            }
            if self.target()?.in_flight() == 0 {
                // Nothing to do but wait: what the sender does not know of yet may be what it waits for.
                self.credit(true)?;
                return self.intake.as_ref().ok_or_else(unexpected)?.next();
            }
            self.finish_write()?;
        }
    }

    fn target(&mut self) -> Result<&mut Box<dyn Target>> {
        self.target.as_mut().ok_or_else(unexpected)
    }

    /// A call that may take long, and whose progress nobody can see.
    fn at_target<T>(&mut self, call: impl FnOnce(&mut dyn Target) -> Result<T>) -> Result<T> {
        let target = self.target.as_mut().ok_or_else(unexpected)?;
        self.work.call(|| call(&mut **target))
    }

    fn free_slot(&mut self) -> Result<usize> {
        loop {
            if let Some(slot) = self.waiting.iter().position(Option::is_none) {
                return Ok(slot);
            }
            self.finish_write()?;
        }
    }

    fn finish_write(&mut self) -> Result<()> {
        let token = self.target()?.finish()?;
        self.work.step();
        let slot = token.and_then(|token| usize::try_from(token).ok());
        let header = slot.and_then(|slot| self.waiting.get_mut(slot)).and_then(Option::take);
        let header = header.ok_or_else(|| Error::new(ErrorKind::Write, "a write of the copy was lost"))?;
        self.applied(header)
    }

    /// That frame's range holds what it shall.
    fn applied(&mut self, header: Header) -> Result<()> {
        self.consumed += header.frame_bytes();
        if let Some(verifier) = &self.verifier {
            verifier.written(header)?;
        }
        self.credit(false)
    }

    /// Tells the sender how much has been dealt with, in steps, or now.
    fn credit(&mut self, now: bool) -> Result<()> {
        let news = self.consumed - self.credited;
        if self.answers.is_some() && (news >= self.window_bytes / CREDIT_STEPS || now && news > 0) {
            self.credited = self.consumed;
            self.tell(|answers| answers.credit(self.consumed))?;
        }
        Ok(())
    }

    /// A sender that does not listen any more may have said why: that says more than a broken pipe.
    fn answer(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        self.tell(|answers| answers.send(kind, payload))
    }

    fn tell(&self, say: impl FnOnce(&Answers) -> Result<()>) -> Result<()> {
        self.answers.as_ref().map_or(Ok(()), say).map_err(|error| {
            let words = self.intake.as_ref().and_then(|intake| intake.last_words(LAST_WORDS));
            words.unwrap_or(error)
        })
    }

    fn start_pass(&mut self, expected_bytes: u64) {
        self.progress = Progress { pass: self.report.passes + 1, expected_bytes, ..Progress::new() };
        self.observer.event(&Event::PassStarted { pass: self.progress.pass, kind: None, expected_bytes });
    }

    fn tick(&mut self, bytes: u64) {
        self.progress.done_bytes += bytes;
        let now = Instant::now();
        if now < self.progress.next_event {
            return;
        }
        self.progress.next_event = now + PROGRESS_INTERVAL;
        self.observer.event(&Event::Progress {
            pass: self.progress.pass,
            done_bytes: self.progress.done_bytes,
            expected_bytes: self.progress.expected_bytes,
            data_bytes: self.progress.data_bytes,
            bytes_per_second: rate(self.progress.data_bytes, self.progress.pass_begun.elapsed()),
            dirty_bytes: 0,
            predicted_freeze_ms: None,
        });
    }
}

/// A write that failed for want of space is a want of space: that is what its exit code shall say on both sides.
fn told_as_full(error: Error) -> Error {
    if error.is_out_of_space() { error.with_kind(ErrorKind::Allocate) } else { error }
}

fn unexpected() -> Error {
    Error::new(ErrorKind::Protocol, "a frame came that may not come now")
}
