//! The sending side: its phases as a list. Read it beside `receiver.rs`.
//!
//! ```text
//! hello · start tracking · first pass · live passes · synced passes · freeze · last passes · seal · verdict · thaw
//! · commit · done
//! ```
//!
//! Every failure leaves through one place, [`Sender::unwind`]: writers go on first, then what is on loan goes back,
//! tracking ends, and the peer is told. The source keeps running and stays its owner, whatever the outcome.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop_core::io::BufferPool;
use ploop_core::{Error, ErrorKind, Result};

use crate::converge::{self, ConvergenceOptions, Decision};
use crate::exchange::{Answers, Exchange, abort_payload, read_answers};
use crate::freeze::{Frozen, Quiesce};
use crate::freeze_limit::FreezeLimit;
use crate::loans::Loans;
use crate::pass::{self, Counts, Outlet, PassReader, Walk};
use crate::source::{Reader, Source};
use crate::stats::{
    Downtime, Event, Observer, PassKind, PassStats, SendReport, hexadecimal, milliseconds, rate,
};
use crate::transport::{Activity, Cancel, Link, Patience, Transport, keepalive_interval};
use crate::wire::{EndPass, Hello, Kind};

/// Passes after a sync of the file system, before the freeze.
const SYNCED_PASSES_MAX: u32 = 3;
/// Further rounds over what is written although writers stand still. (A sync by anybody on the host writes a block
/// of a frozen ext4, so the first ones are no error.)
const FROZEN_ROUNDS_MAX: u32 = 2;
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
    let mut sender = Sender::connect(source, quiesce, link, options, observer)?;
    match sender.phases() {
        Ok(()) => sender.done(),
        Err(error) => Err(sender.unwind(error)),
    }
}

struct Sender<'a> {
    source: &'a mut dyn Source,
    /// Until the freeze; then it is part of `frozen`.
    quiesce: Option<&'a mut dyn Quiesce>,
    frozen: Option<Frozen<'a>>,
    /// From the freeze to the verdict.
    freeze_limit: Option<FreezeLimit>,
    options: &'a SendOptions,
    observer: &'a dyn Observer,
    two_way: bool,
    exchange: Arc<Exchange>,
    outlet: Option<Outlet>,
    answers: Option<JoinHandle<Answers>>,
    stop: Cancel,
    reader: Option<Box<dyn Reader>>,
    pool: BufferPool,
    /// Passes ended.
    pass: u32,
    loans: Loans,
    history: Vec<PassStats>,
    total: Counts,
    downtime: Downtime,
    begun: Instant,
    freeze_begun: Option<Instant>,
    gate_closed: Option<Instant>,
    committed: bool,
}

impl<'a> Sender<'a> {
    fn connect(
        source: &'a mut dyn Source,
        quiesce: &'a mut dyn Quiesce,
        link: Link,
        options: &'a SendOptions,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let stop = Cancel::new()?;
        let mut cancels = vec![stop.clone()];
        cancels.extend(options.cancel.clone());
        let patience = Patience { stall: options.stall_timeout, cancels, activity: Activity::new() };
        let output = link
            .output
            .ok_or_else(|| Error::new(ErrorKind::Parameter, "a sender needs somewhere to send to"))?;
        let two_way = link.input.is_some();
        let exchange = Arc::new(Exchange::new(two_way));
        let answers = match link.input {
            None => None,
            Some(input) => {
                let (exchange, stop) = (Arc::clone(&exchange), stop.clone());
                let transport = Transport::reader(input, patience.clone())?;
                Some(pass::spawn("pcopy-answers", move || read_answers(transport, &exchange, &stop))?)
            }
        };
        let keepalive = keepalive_interval(options.stall_timeout);
        let outlet = Transport::writer(output, patience)
            .and_then(|transport| Outlet::start(transport, &exchange, &stop, keepalive));
        let outlet = match outlet {
            Ok(outlet) => outlet,
            Err(error) => {
                stop.cancel();
                if let Some(answers) = answers {
                    // It has nothing to report that matters more than this error.
                    let _ = answers.join();
                }
                return Err(error);
            }
        };
        Ok(Self {
            source,
            quiesce: Some(quiesce),
            frozen: None,
            freeze_limit: None,
            options,
            observer,
            two_way,
            exchange,
            outlet: Some(outlet),
            answers,
            stop,
            reader: None,
            pool: pass::buffer_pool(),
            pass: 0,
            loans: Loans::default(),
            history: Vec::new(),
            total: Counts::default(),
            downtime: Downtime::default(),
            begun: Instant::now(),
            freeze_begun: None,
            gate_closed: None,
            committed: false,
        })
    }

    fn phases(&mut self) -> Result<()> {
        self.hello()?;
        self.start_tracking()?;
        self.first_pass()?;
        self.live_passes()?;
        self.synced_passes()?;
        self.freeze()?;
        self.last_passes()?;
        self.seal()?;
        self.verdict()?;
        // The source keeps its disk. A hand-over would stay frozen here until the commit is answered.
        self.thaw()?;
        self.commit()
    }

    /// Says what is coming. Two-way: until the receiver has a place for it.
    fn hello(&mut self) -> Result<()> {
        let source = self.source.description();
        let hello = Hello {
            two_way: self.two_way,
            cluster_sectors: source.cluster_sectors,
            disk_bytes: self.source.size_bytes(),
            version: source.version,
            image: source.image,
            copy_id: self.options.copy_id,
            window_bytes: WINDOW_BYTES,
            payload_bytes_max: u32::try_from(pass::FRAME_BYTES).unwrap_or(crate::wire::PAYLOAD_BYTES_MAX),
            data_bytes: source.data_bytes,
        };
        // What the receiver would refuse shall fail here, with the source's name.
        Hello::decode(&hello.encode()).map_err(|error| {
            Error::new(ErrorKind::Parameter, format!("this disk cannot be copied: {error}"))
                .at_path(&source.name)
        })?;
        self.control(Kind::Hello, hello.encode())?;
        if self.two_way {
            self.exchange.wait_window()?;
        }
        self.observer.event(&Event::Started {
            copy_id: hexadecimal(&self.options.copy_id),
            disk_bytes: hello.disk_bytes,
            two_way: self.two_way,
        });
        Ok(())
    }

    /// Before the first byte is read (T6).
    fn start_tracking(&mut self) -> Result<()> {
        self.source.start_tracking()?;
        self.reader = Some(self.source.reader()?);
        Ok(())
    }

    fn first_pass(&mut self) -> Result<()> {
        self.sweep(PassKind::First, true, false)
    }

    /// What changed meanwhile, again and again, until the policy says that a freeze is short, or hopeless.
    fn live_passes(&mut self) -> Result<()> {
        while self.decide()? == Decision::NextPass {
            self.sweep(PassKind::Live, true, false)?;
        }
        Ok(())
    }

    fn decide(&mut self) -> Result<Decision> {
        if let Some(last) = self.history.last_mut() {
            // Since the pass ended, time has gone by.
            last.dirty_bytes = self.source.dirty_bytes();
        }
        let decision = converge::decide(&self.history, &self.options.convergence);
        let predicted_freeze_ms = self.predicted_freeze_ms();
        self.observer.event(&Event::Decided { decision: decision.name(), predicted_freeze_ms });
        match decision {
            Decision::GiveUp(reason) => Err(self.too_long(predicted_freeze_ms, &reason.to_string())),
            _ => Ok(decision),
        }
    }

    fn too_long(&self, predicted_freeze_ms: u64, reason: &str) -> Error {
        let limit = self.options.convergence.freeze_ms_max.unwrap_or(u64::MAX);
        Error::new(
            ErrorKind::NotQuiet,
            format!("the freeze would last {predicted_freeze_ms} ms and may last {limit} ms: {reason}"),
        )
        .advise("allow a longer freeze, or copy when less is written")
    }

    fn predicted_freeze_ms(&self) -> u64 {
        converge::predict_freeze_ms(&self.history, self.source.dirty_bytes())
    }

    /// Lets the file system write what it still holds, the gate open, so that the freeze finds little.
    fn synced_passes(&mut self) -> Result<()> {
        for _ in 0..SYNCED_PASSES_MAX {
            let mounted = self.quiesce.as_mut().map_or(Ok(false), |quiesce| quiesce.sync_file_system())?;
            if self.source.dirty_bytes() > 0 {
                self.sweep(PassKind::Synced, true, false)?;
            }
            if !mounted || self.predicted_freeze_ms() <= self.options.convergence.freeze_ms_wanted {
                break;
            }
        }
        Ok(())
    }

    /// The operator's command, then the file systems. From its first step on, `thaw` is due.
    fn freeze(&mut self) -> Result<()> {
        self.check()?;
        self.observer.event(&Event::Freezing);
        let begun = Instant::now();
        self.freeze_begun = Some(begun);
        let Some(quiesce) = self.quiesce.take() else { return Ok(()) };
        let frozen = self.frozen.insert(Frozen::begin(quiesce));
        frozen.run_hook()?;
        self.downtime.hook_ms = milliseconds(begun.elapsed());
        let hooked = Instant::now();
        frozen.freeze_file_system()?;
        self.downtime.file_system_ms = milliseconds(hooked.elapsed());
        self.observer.event(&Event::Frozen {
            hook_ms: self.downtime.hook_ms,
            file_system_ms: self.downtime.file_system_ms,
        });
        let predicted = self.predicted_freeze_ms();
        match self.options.convergence.freeze_ms_max {
            Some(limit) if predicted > limit => {
                Err(self.too_long(predicted, "too much was written while it was frozen"))
            }
            _ => {
                let allowed = self.freeze_allowed(predicted);
                self.freeze_limit = Some(FreezeLimit::start(allowed, &self.exchange, &self.stop)?);
                Ok(())
            }
        }
    }

    /// How long the frozen disk may wait for the receiver: what was foreseen, and a time for what was not.
    fn freeze_allowed(&self, predicted_freeze_ms: u64) -> Duration {
        let foreseen = Duration::from_millis(predicted_freeze_ms);
        let accepted = Duration::from_millis(self.options.convergence.freeze_ms_max.unwrap_or(0));
        foreseen.saturating_add(self.options.freeze_stall_timeout).max(accepted)
    }

    /// The rest, with the gate still open, as long as it keeps coming; then the gate, and the last harvest (T4).
    fn last_passes(&mut self) -> Result<()> {
        let begun = Instant::now();
        let sent = self.total.wire_bytes;
        for round in 0.. {
            if self.source.dirty_bytes() == 0 {
                break;
            }
            if round > FROZEN_ROUNDS_MAX {
                return Err(Error::new(
                    ErrorKind::NotQuiet,
                    format!("the disk is still written to after the freeze ({round} rounds)"),
                )
                .at_path(self.source.description().name)
                .advise("give a freeze command (-F) that stops what writes, or mount the disk so that its file system can be frozen"));
            }
            self.sweep(PassKind::Frozen, false, false)?;
        }
        let gate = self.source.close_gate(self.options.gate_timeout)?;
        self.gate_closed = Some(Instant::now());
        if let Some(frozen) = &mut self.frozen {
            frozen.hold(gate);
        }
        self.sweep(PassKind::Frozen, false, true)?;
        self.downtime.last_pass_ms = milliseconds(begun.elapsed());
        self.downtime.bytes = self.total.wire_bytes - sent;
        if self.source.dirty_bytes() > 0 {
            return Err(Error::new(ErrorKind::NotQuiet, "the disk was written to with its gate closed"));
        }
        Ok(())
    }

    /// The transcript of all that was sent. One-way: until the pipe has taken it.
    fn seal(&mut self) -> Result<()> {
        let disk_bytes = self.source.size_bytes();
        let sealing = Instant::now();
        let outlet = self.outlet()?;
        outlet.seal(disk_bytes)?;
        if !self.two_way {
            outlet.barrier()?;
        }
        self.downtime.seal_ms = milliseconds(sealing.elapsed());
        self.observer.event(&Event::Sealed { data_bytes: self.total.data_bytes, frames: self.total.frames });
        Ok(())
    }

    /// Two-way: everything is durable and read back on the other side, and both transcripts are equal.
    fn verdict(&mut self) -> Result<()> {
        let waiting = Instant::now();
        if self.two_way {
            self.exchange.wait_durable(self.pass)?;
            let theirs = self.exchange.wait_verdict()?;
            if theirs != self.exchange.wait_transcript()? {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the receiver's transcript differs from what was sent",
                )
                .advise("the connection changes data: use another, and start the copy again"));
            }
            self.loans.acknowledge(self.pass);
            self.observer.event(&Event::Verified);
        } else {
            self.loans.acknowledge(u32::MAX);
        }
        self.downtime.seal_ms += milliseconds(waiting.elapsed());
        if !self.source.is_clean() {
            return Err(Error::new(ErrorKind::NotQuiet, "something of the disk was left unsent"));
        }
        Ok(())
    }

    /// Writers go on.
    fn thaw(&mut self) -> Result<()> {
        self.freeze_limit = None;
        let thawed = self.frozen.as_mut().map_or(Ok(()), |frozen| {
            let thawed = frozen.thaw();
            if let Some(closed) = self.gate_closed {
                self.downtime.gate_ms = milliseconds(closed.elapsed());
            }
            thawed
        });
        thawed?;
        self.frozen = None;
        if let Some(begun) = self.freeze_begun {
            self.downtime.total_ms = milliseconds(begun.elapsed());
        }
        self.observer.event(&Event::Thawed(self.downtime));
        Ok(())
    }

    /// Two-way: the copy gets its name.
    fn commit(&mut self) -> Result<()> {
        if !self.two_way {
            return Ok(());
        }
        self.check()?;
        self.exchange.tell_commit();
        // The point of no return: once this frame may have left, only the receiver knows whether there is a copy, and
        // a failure to hear from it is no failure of the copy. A hand-over would put its token into this frame, with
        // the source's record durably released before, and nothing after this line might let the source go on.
        let answered = self.control(Kind::Commit, Vec::new()).and_then(|()| self.exchange.wait_committed());
        match answered {
            Ok(()) => {
                self.committed = true;
                self.observer.event(&Event::Committed);
                Ok(())
            }
            // The receiver itself has said that there is no copy.
            Err(error) if self.exchange.peer_has_aborted() => Err(error),
            Err(error) => Err(Error::new(
                ErrorKind::OutcomeUnknown,
                "the receiver did not say whether it put the copy in place",
            )
            .caused_by(error)
            .advise("look on the receiving side: the copy is complete if the file stands under its final name; else copy again")),
        }
    }

    fn done(mut self) -> Result<SendReport> {
        self.source.stop_tracking();
        if let Some(outlet) = self.outlet.take() {
            let closed = outlet.close();
            // Once the receiver has committed, nothing that follows can make that undone.
            if !self.committed {
                closed?;
            }
        }
        self.join_answers();
        Ok(SendReport {
            copy_id: hexadecimal(&self.options.copy_id),
            disk_bytes: self.source.size_bytes(),
            committed: self.committed,
            wire_bytes: self.total.wire_bytes,
            data_bytes: self.total.data_bytes,
            transcript: hexadecimal(&self.exchange.wait_transcript()?),
            passes: std::mem::take(&mut self.history),
            downtime: self.downtime,
            seconds: self.begun.elapsed().as_secs_f64(),
        })
    }

    /// The one way out of a failure. Nothing here waits for the peer before the writers go on.
    fn unwind(mut self, error: Error) -> Error {
        let thawed = self.frozen.take().map_or(Ok(()), |mut frozen| frozen.thaw());
        self.freeze_limit = None;
        self.loans.give_back();
        self.source.stop_tracking();
        if let Some(outlet) = self.outlet.take() {
            outlet.abort(abort_payload(&error));
        }
        self.stop.cancel();
        self.join_answers();
        match thawed {
            Ok(()) => error,
            // Worse than the failed copy: the guest stands still.
            Err(frozen) => Error::new(frozen.kind(), format!("the copy failed ({error}) and then: {frozen}"))
                .advise(frozen.advice().unwrap_or("thaw the file system by hand: fsfreeze -u").to_owned())
                .caused_by(frozen),
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
        let expected_bytes = match kind {
            PassKind::First => match self.source.description().data_bytes {
                0 => self.source.size_bytes(),
                known => known,
            },
            _ => self.source.dirty_bytes(),
        };
        self.observer.event(&Event::PassStarted { pass: self.pass + 1, kind: Some(kind), expected_bytes });
        loop {
            let (counts, walk) = self.part(kind, cursor, sweep, begun, expected_bytes)?;
            sweep.merge(counts);
            self.total.merge(counts);
            cursor = walk.cursor();
            let is_whole = !walk.is_full();
            let durable = settle || last || !is_whole;
            let end = EndPass { pass: self.pass + 1, durable, last: last && is_whole };
            self.pass = end.pass;
            self.exchange.tell_pass(end.pass);
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
                self.exchange.wait_durable(self.pass)?;
                self.loans.acknowledge(self.exchange.durable_pass());
            } else {
                self.outlet()?.barrier()?;
                // Nobody will answer, and a failure ends the tracker: there is nobody to give them back to.
                self.loans.acknowledge(u32::MAX);
            }
        }
        let stats = PassStats {
            pass: self.pass,
            kind,
            data_bytes: sweep.data_bytes,
            zero_bytes: sweep.zero_bytes,
            wire_bytes: sweep.wire_bytes,
            frames: sweep.frames,
            seconds: begun.elapsed().as_secs_f64(),
            settle_seconds: sent.elapsed().as_secs_f64(),
            dirty_bytes: self.source.dirty_bytes(),
        };
        self.observer.event(&Event::PassEnded(stats));
        self.history.push(stats);
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
        self.check()?;
        let mut walk = if kind == PassKind::First { Walk::first() } else { Walk::dirty(cursor) };
        let (Some(outlet), Some(reader)) = (&self.outlet, &mut self.reader) else {
            return Err(self.exchange.failure());
        };
        let (observer, cancel, history) = (self.observer, &self.options.cancel, &self.history);
        let pass = self.pass + 1;
        let mut next_event = Instant::now() + PROGRESS_INTERVAL;
        let mut reading =
            PassReader::new(&mut *self.source, &mut **reader, outlet, &self.pool, kind == PassKind::First);
        reading.run(&mut walk, |counts, _done, source| {
            cancel.as_ref().map_or(Ok(()), Cancel::check)?;
            if Instant::now() >= next_event {
                next_event = Instant::now() + PROGRESS_INTERVAL;
                let dirty_bytes = source.dirty_bytes();
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
                        .then(|| converge::predict_freeze_ms(history, dirty_bytes)),
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
                self.exchange.wait_durable(pass)?;
            }
            self.loans.acknowledge(self.exchange.durable_pass());
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

    fn check(&self) -> Result<()> {
        self.options.cancel.as_ref().map_or(Ok(()), Cancel::check)?;
        self.exchange.check()
    }
}
