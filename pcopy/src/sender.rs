//! The sending side: its phases as a list. Read it beside `receiver.rs`.
//!
//! ```text
//! hello · (frozen deltas) · start tracking · first pass · live passes · synced passes · freeze · last passes · seal
//! · verdict · thaw · commit · done
//! ```
//!
//! Frozen deltas are sent only by [`send_chain`]; see `sender/chain.rs`.
//!
//! Every failure leaves through one place, [`Sender::unwind`]: writers go on first, then what is on loan goes back,
//! tracking ends, and the peer is told. The source keeps running and stays its owner, whatever the outcome.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop_core::io::BufferPool;
use ploop_core::{Error, ErrorKind, Result};

use crate::converge::{self, ConvergenceOptions};
use crate::course::Course;
use crate::exchange::{Answers, abort_payload, read_answers};
use crate::freeze::Quiesce;
use crate::loans::Loans;
use crate::pass::{self, Counts, Outlet, PassReader, Walk};
use crate::source::{Reader, Snapshots, Source};
use crate::standstill::{Attempt, Standstill, Sweeper};
use crate::stats::{Event, Observer, PassKind, SendReport, hexadecimal, milliseconds, rate};
use crate::transport::{Cancel, Link, Patience, Transport, keepalive_interval};
use crate::wire::{EndPass, Hello, Kind};

mod chain;

/// Passes after a sync of the file system, before the freeze.
const SYNCED_PASSES_MAX: u32 = 3;
/// The shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// The window of credit a sender asks for.
const WINDOW_BYTES: u64 = 32 << 20;

/// What the operator wants of a copy.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Names the copy: random.
    pub copy_id: [u8; 16],
    /// When to freeze.
    pub convergence: ConvergenceOptions,
    /// The receiver may be silent for this long.
    pub stall_timeout: Duration,
    /// How much longer than predicted the disk may stay frozen for the receiver's sake, until its verdict. Then it is
    /// thawed and the copy fails. A freeze within `convergence.freeze_ms_max` is never cut short by this.
    pub freeze_stall_timeout: Duration,
    /// Writes in flight may take this long to finish when the gate closes.
    pub gate_timeout: Duration,
    /// Writers that go on through the freeze are no failure: the gate holds them for the last pass, and the copy is as
    /// after a power loss at that moment.
    pub is_crash_consistent: bool,
    /// A freeze that turns out too long is tried again also when that runs the freeze command once more.
    pub retry_hooks: bool,
    /// Ends the copy from outside.
    pub cancel: Option<Cancel>,
}

impl Default for SendOptions {
    /// A new random name, 120 s for the receiver, 10 s of them while frozen, 30 s for the gate.
    fn default() -> Self {
        Self {
            copy_id: *uuid::Uuid::new_v4().as_bytes(),
            convergence: ConvergenceOptions::default(),
            stall_timeout: Duration::from_secs(120),
            freeze_stall_timeout: Duration::from_secs(10),
            gate_timeout: Duration::from_secs(30),
            is_crash_consistent: false,
            retry_hooks: false,
            cancel: None,
        }
    }
}

/// Copies `source` over `link`: two-way when the link has an input for answers, else one-way.
///
/// Two-way, success means that the receiver has said: verified, durable, under its final name. One-way, it means
/// that everything was sent; the receiver's exit code is the verdict. [`ErrorKind::OutcomeUnknown`] when a two-way link
/// broke between the wish to commit and the answer; after every other failure there is no copy.
///
/// The writers of the source go on in any case when this returns.
pub fn send(
    source: &mut dyn Source,
    quiesce: &mut dyn Quiesce,
    link: Link,
    options: &SendOptions,
    observer: &dyn Observer,
) -> Result<SendReport> {
    send_with(None, source, quiesce, link, options, observer)
}

/// As [`send`], with all the deltas of the disk: first those of `snapshots`, each once, then what `source`, the current
/// state, holds itself. The receiver keeps the snapshots.
pub fn send_chain(
    snapshots: &mut dyn Snapshots,
    source: &mut dyn Source,
    quiesce: &mut dyn Quiesce,
    link: Link,
    options: &SendOptions,
    observer: &dyn Observer,
) -> Result<SendReport> {
    send_with(Some(snapshots), source, quiesce, link, options, observer)
}

fn send_with<'a>(
    snapshots: Option<&'a mut dyn Snapshots>,
    source: &'a mut dyn Source,
    quiesce: &'a mut dyn Quiesce,
    link: Link,
    options: &'a SendOptions,
    observer: &'a dyn Observer,
) -> Result<SendReport> {
    let mut sender = Sender::connect(snapshots, source, link, options, observer)?;
    // Declared last, dropped first: after a panic, too, writers go on before all else.
    let mut standstill = Standstill::new(quiesce);
    match sender.phases(&mut standstill) {
        Ok(()) => sender.done(),
        Err(error) => Err(sender.unwind(standstill, error)),
    }
}

struct Sender<'a> {
    course: Course<'a>,
    /// The deltas below and beside the current state, if they are sent, too.
    snapshots: Option<&'a mut dyn Snapshots>,
    two_way: bool,
    outlet: Option<Outlet>,
    answers: Option<JoinHandle<Answers>>,
    reader: Option<Box<dyn Reader>>,
    pool: BufferPool,
    /// Passes ended.
    pass: u32,
    loans: Loans,
    committed: bool,
}

impl<'a> Sender<'a> {
    fn connect(
        snapshots: Option<&'a mut dyn Snapshots>,
        source: &'a mut dyn Source,
        link: Link,
        options: &'a SendOptions,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let output = link
            .output
            .ok_or_else(|| Error::new(ErrorKind::Parameter, "a sender needs somewhere to send to"))?;
        let two_way = link.input.is_some();
        let course = Course::new(source, options, observer, two_way)?;
        let patience = course.patience();
        let answers = match link.input {
            None => None,
            Some(input) => {
                let (exchange, stop) = (Arc::clone(&course.exchange), course.stop.clone());
                let transport = Transport::reader(input, patience.clone())?;
                Some(pass::spawn("pcopy-answers", move || read_answers(transport, &exchange, &stop))?)
            }
        };
        let keepalive = keepalive_interval(options.stall_timeout);
        // With answers their reader keeps the time: a full pipe to a receiver that is at work is no stall.
        let stall = if two_way { Duration::MAX } else { patience.stall };
        let outlet = Transport::writer(output, Patience { stall, ..patience })
            .and_then(|transport| Outlet::start(transport, &course.exchange, &course.stop, keepalive));
        let outlet = match outlet {
            Ok(outlet) => outlet,
            Err(error) => {
                course.stop.cancel();
                if let Some(answers) = answers {
                    // It has nothing to report that matters more than this error.
                    let _ = answers.join();
                }
                return Err(error);
            }
        };
        Ok(Self {
            course,
            snapshots,
            two_way,
            outlet: Some(outlet),
            answers,
            reader: None,
            pool: pass::buffer_pool(),
            pass: 0,
            loans: Loans::default(),
            committed: false,
        })
    }

    fn phases(&mut self, standstill: &mut Standstill<'_>) -> Result<()> {
        self.hello()?;
        self.frozen_deltas()?;
        self.start_tracking()?;
        self.first_pass()?;
        loop {
            self.live_passes()?;
            self.synced_passes(standstill)?;
            if standstill.freeze(&mut self.course)? == Attempt::Frozen {
                break;
            }
        }
        standstill.last_passes(self)?;
        self.check_snapshots()?;
        self.seal()?;
        self.verdict()?;
        // The source keeps its disk. A hand-over would stay frozen here until the commit is answered.
        standstill.thaw(&mut self.course)?;
        self.commit()
    }

    /// Says what is coming. Two-way: until the receiver has a place for it.
    fn hello(&mut self) -> Result<()> {
        let source = self.course.source.description();
        let hello = Hello {
            two_way: self.two_way,
            cluster_sectors: source.cluster_sectors,
            disk_bytes: self.course.source.size_bytes(),
            version: source.version,
            image: source.image,
            copy_id: self.course.options.copy_id,
            window_bytes: WINDOW_BYTES,
            payload_bytes_max: u32::try_from(pass::FRAME_BYTES).unwrap_or(crate::wire::PAYLOAD_BYTES_MAX),
            data_bytes: self.frozen_bytes().saturating_add(source.data_bytes),
            deltas: self.deltas(),
        };
        // What the receiver would refuse shall fail here, with the source's name.
        Hello::decode(&hello.encode()).map_err(|error| {
            Error::new(ErrorKind::Parameter, format!("this disk cannot be copied: {error}"))
                .at_path(&source.name)
        })?;
        self.control(Kind::Hello, hello.encode())?;
        if self.two_way && self.course.exchange.wait_window()?.protocol_version != hello.protocol_version() {
            return Err(Error::new(ErrorKind::Protocol, "the receiver answered another stream than this"));
        }
        self.course.tell_started(self.two_way);
        Ok(())
    }

    /// Before the first byte is read (T6).
    fn start_tracking(&mut self) -> Result<()> {
        self.course.source.start_tracking()?;
        self.reader = Some(self.course.source.reader()?);
        Ok(())
    }

    fn first_pass(&mut self) -> Result<()> {
        self.sweep(PassKind::First, true, false)
    }

    /// What changed meanwhile, again and again, until the policy says that a freeze is short, or hopeless.
    fn live_passes(&mut self) -> Result<()> {
        while self.course.next_pass_helps()? {
            self.sweep(PassKind::Live, true, false)?;
        }
        Ok(())
    }

    /// Lets the file system write what it still holds, the gate open, so that the freeze finds little.
    fn synced_passes(&mut self, standstill: &mut Standstill<'_>) -> Result<()> {
        let wanted = self.course.convergence.freeze_ms_wanted;
        let is_hopeless = self.course.predicted_freeze_ms() > wanted;
        for _ in 0..SYNCED_PASSES_MAX {
            let before = self.course.source.dirty_data_bytes();
            let mounted = standstill.sync_file_system(&mut self.course)?;
            let synced = self.course.source.dirty_data_bytes();
            // Where passes do not help, only what the sync itself has brought is worth one.
            if is_hopeless && synced <= before.saturating_add(before / 2) {
                break;
            }
            if self.course.source.dirty_bytes() > 0 {
                self.sweep(PassKind::Synced, true, false)?;
            }
            let is_short = self.course.predicted_freeze_ms() <= wanted;
            if !mounted || is_short || is_hopeless || self.course.source.dirty_data_bytes() >= synced {
                break;
            }
        }
        Ok(())
    }

    /// The transcript of all that was sent. One-way: until the pipe has taken it.
    fn seal(&mut self) -> Result<()> {
        let disk_bytes = self.course.source.size_bytes();
        let sealing = Instant::now();
        let outlet = self.outlet()?;
        outlet.seal(disk_bytes)?;
        if !self.two_way {
            outlet.barrier()?;
        }
        self.course.downtime.seal_ms = milliseconds(sealing.elapsed());
        self.course.tell_sealed();
        Ok(())
    }

    /// Two-way: everything is durable and read back on the other side, and both transcripts are equal.
    fn verdict(&mut self) -> Result<()> {
        let waiting = Instant::now();
        if self.two_way {
            self.course.exchange.wait_durable(self.pass)?;
            let theirs = self.course.exchange.wait_verdict()?;
            if theirs != self.course.exchange.wait_transcript()? {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the receiver's transcript differs from what was sent",
                )
                .advise("the connection changes data: use another, and start the copy again"));
            }
            self.loans.acknowledge(self.pass);
            self.course.tell(&Event::Verified);
        } else {
            self.loans.acknowledge(u32::MAX);
        }
        self.course.downtime.seal_ms += milliseconds(waiting.elapsed());
        self.course.check_clean()
    }

    /// Two-way: the copy gets its name.
    fn commit(&mut self) -> Result<()> {
        if !self.two_way {
            return Ok(());
        }
        self.course.check()?;
        self.course.exchange.tell_commit();
        // The point of no return: once this frame may have left, only the receiver knows whether there is a copy, and
        // a failure to hear from it is no failure of the copy. A hand-over would put its token into this frame, with
        // the source's record durably released before, and nothing after this line might let the source go on.
        let answered =
            self.control(Kind::Commit, Vec::new()).and_then(|()| self.course.exchange.wait_committed());
        match answered {
            Ok(()) => {
                self.committed = true;
                self.course.tell(&Event::Committed);
                Ok(())
            }
            // The receiver itself has said that there is no copy.
            Err(error) if self.course.exchange.peer_has_aborted() => Err(error),
            Err(error) => Err(Error::new(
                ErrorKind::OutcomeUnknown,
                "the receiver did not say whether it put the copy in place",
            )
            .caused_by(error)
            .advise("look on the receiving side: the copy is complete if the file stands under its final name; else copy again")),
        }
    }

    fn done(mut self) -> Result<SendReport> {
        self.course.source.stop_tracking();
        if let Some(outlet) = self.outlet.take() {
            let closed = outlet.close();
            // Once the receiver has committed, nothing that follows can make that undone.
            if !self.committed {
                closed?;
            }
        }
        self.join_answers();
        let transcript = hexadecimal(&self.course.exchange.wait_transcript()?);
        let deltas = self.deltas();
        Ok(self.course.report(self.committed, transcript, deltas))
    }

    /// The one way out of a failure. Nothing here waits for the peer before the writers go on.
    fn unwind(mut self, standstill: Standstill<'_>, error: Error) -> Error {
        let abort = abort_payload(&error);
        let released = standstill.release_known(error);
        self.loans.give_back();
        self.course.source.stop_tracking();
        if let Some(outlet) = self.outlet.take() {
            outlet.abort(abort);
        }
        self.course.stop.cancel();
        self.join_answers();
        let may_be_in_place = self.course.exchange.may_be_in_place();
        self.course.tell(&Event::Failed { runs: released.is_ok(), may_be_in_place });
        match released {
            Ok(error) | Err(error) => error,
        }
    }

    fn join_answers(&mut self) {
        if let Some(answers) = self.answers.take() {
            // What it had to say it has left in the exchange.
            let _ = answers.join();
        }
    }

    /// One look over the disk, in as many passes of the protocol as its loans need. `settle`: durable passes, and
    /// wait for that; else the receiver only keeps the order. `last`: nothing but the seal follows.
    fn sweep(&mut self, kind: PassKind, settle: bool, last: bool) -> Result<()> {
        let begun = Instant::now();
        let mut sweep = Counts::default();
        let mut cursor = 0;
        let expected_bytes = self.course.begin_pass(self.pass + 1, kind);
        loop {
            let (counts, walk) = self.part(kind, cursor, sweep, begun, expected_bytes)?;
            sweep.merge(counts);
            self.course.total.merge(counts);
            cursor = walk.cursor();
            let is_whole = !walk.is_full();
            let durable = settle || last || !is_whole;
            let end = EndPass { pass: self.pass + 1, durable, last: last && is_whole };
            self.pass = end.pass;
            self.course.exchange.tell_pass(end.pass, end.durable);
            self.loans.push(end.pass, walk.into_loans());
            self.control(Kind::EndPass, end.encode())?;
            if is_whole {
                break;
            }
            self.bound_loans()?;
        }
        let sent = Instant::now();
        if settle {
            if self.two_way {
                self.course.exchange.wait_durable(self.pass)?;
                self.loans.acknowledge(self.course.exchange.durable_pass());
            } else {
                self.outlet()?.barrier()?;
                // Nobody will answer, and a failure ends the tracker: there is nobody to give them back to.
                self.loans.acknowledge(u32::MAX);
            }
        }
        self.course.end_pass(self.pass, kind, sweep, begun, sent.elapsed());
        Ok(())
    }

    fn part(
        &mut self,
        kind: PassKind,
        cursor: u64,
        before: Counts,
        begun: Instant,
        expected_bytes: u64,
    ) -> Result<(Counts, Walk)> {
        self.course.check()?;
        let has_parent = self.course.source.description().has_parent;
        let mut walk = if kind == PassKind::First { Walk::first() } else { Walk::dirty(cursor) };
        let (Some(outlet), Some(reader)) = (&self.outlet, &mut self.reader) else {
            return Err(self.course.exchange.failure());
        };
        let (observer, cancel, history) =
            (self.course.observer, &self.course.options.cancel, &self.course.history);
        let file_system_ms = self.course.convergence.file_system_ms;
        let pass = self.pass + 1;
        let mut next_event = Instant::now() + PROGRESS_INTERVAL;
        let mut reading = PassReader::new(
            &mut *self.course.source,
            &mut **reader,
            outlet,
            &self.pool,
            // What stands on another delta says of its zeros that they are none of that delta's.
            kind == PassKind::First && !has_parent,
        );
        reading.run(&mut walk, |counts, _done, source| {
            cancel.as_ref().map_or(Ok(()), Cancel::check)?;
            if Instant::now() >= next_event {
                next_event = Instant::now() + PROGRESS_INTERVAL;
                let dirty_bytes = source.dirty_data_bytes();
                let mut all = before;
                all.merge(*counts);
                observer.event(&Event::Progress {
                    pass,
                    done_bytes: all.data_bytes + all.zero_bytes,
                    expected_bytes,
                    data_bytes: all.data_bytes,
                    bytes_per_second: rate(all.data_bytes, begun.elapsed()),
                    dirty_bytes,
                    predicted_freeze_ms: (!history.is_empty())
                        .then(|| converge::predict_freeze_ms(history, dirty_bytes) + file_system_ms),
                });
            }
            Ok(())
        })?;
        Ok((reading.counts, walk))
    }

    /// Keeps the loans of two passes at most: their memory is bounded.
    fn bound_loans(&mut self) -> Result<()> {
        if self.two_way {
            if let Some(pass) = self.loans.last_but_one() {
                self.course.exchange.wait_durable(pass)?;
            }
            self.loans.acknowledge(self.course.exchange.durable_pass());
        } else {
            self.loans.acknowledge(u32::MAX);
        }
        Ok(())
    }

    fn outlet(&self) -> Result<&Outlet> {
        self.outlet.as_ref().ok_or_else(|| Error::new(ErrorKind::System, "the stream is closed"))
    }

    fn control(&self, kind: Kind, payload: Vec<u8>) -> Result<()> {
        self.outlet()?.control(kind, payload)
    }
}

impl<'a> Sweeper<'a> for Sender<'a> {
    fn course(&mut self) -> &mut Course<'a> {
        &mut self.course
    }

    fn sweep_frozen(&mut self, last: bool) -> Result<()> {
        self.sweep(PassKind::Frozen, false, last)
    }
}
