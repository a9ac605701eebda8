//! What every sender knows of its copy, whatever it sends: the disk, what the operator wants, the figures so far, and the
//! questions they answer. How the bytes reach the other side is the sender's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ploop_core::{Error, ErrorKind, Result};

use crate::converge::{self, ConvergenceOptions, Decision};
use crate::exchange::Exchange;
use crate::pass::Counts;
use crate::sender::SendOptions;
use crate::source::Source;
use crate::stats::{Downtime, Event, Observer, PassKind, PassStats, SendReport, hexadecimal};
use crate::transport::{Cancel, Patience};

/// A copy on its way.
pub(crate) struct Course<'a> {
    pub(crate) source: &'a mut dyn Source,
    pub(crate) options: &'a SendOptions,
    pub(crate) observer: &'a dyn Observer,
    /// Where threads leave why the copy cannot go on. Of a one-way stream these are its writer and the freeze limit.
    pub(crate) exchange: Arc<Exchange>,
    /// Raised, it ends every wait in a pipe.
    pub(crate) stop: Cancel,
    /// Passes that have ended, those over frozen deltas first.
    pub(crate) history: Vec<PassStats>,
    /// All that was sent.
    pub(crate) total: Counts,
    pub(crate) downtime: Downtime,
    /// As wanted, with what was learnt of this disk.
    pub(crate) convergence: ConvergenceOptions,
    warnings: Vec<String>,
    begun: Instant,
}

impl<'a> Course<'a> {
    /// Begins now. `two_way`: a receiver answers in frames.
    pub(crate) fn new(
        source: &'a mut dyn Source,
        options: &'a SendOptions,
        observer: &'a dyn Observer,
        two_way: bool,
    ) -> Result<Self> {
        Ok(Self {
            source,
            options,
            observer,
            exchange: Arc::new(Exchange::new(two_way, options.stall_timeout)),
            stop: Cancel::new()?,
            history: Vec::new(),
            total: Counts::default(),
            downtime: Downtime::default(),
            convergence: options.convergence,
            warnings: Vec::new(),
            begun: Instant::now(),
        })
    }

    /// How long its pipes wait, and what ends that.
    pub(crate) fn patience(&self) -> Patience {
        let mut cancels = vec![self.stop.clone()];
        cancels.extend(self.options.cancel.clone());
        Patience { stall: self.options.stall_timeout, cancels }
    }

    /// An error when the operator or a thread has ended the copy.
    pub(crate) fn check(&self) -> Result<()> {
        self.options.cancel.as_ref().map_or(Ok(()), Cancel::check)?;
        self.exchange.check()
    }

    pub(crate) fn tell(&self, event: &Event) {
        self.observer.event(event);
    }

    pub(crate) fn tell_started(&self, two_way: bool) {
        self.tell(&Event::Started {
            copy_id: hexadecimal(&self.options.copy_id),
            disk_bytes: self.source.size_bytes(),
            two_way,
        });
    }

    pub(crate) fn tell_sealed(&self) {
        self.tell(&Event::Sealed { data_bytes: self.total.data_bytes, frames: self.total.frames });
    }

    /// A pass begins: how much it will look at, as far as is known.
    pub(crate) fn begin_pass(&self, pass: u32, kind: PassKind) -> u64 {
        let expected_bytes = match kind {
            PassKind::First => match self.source.description().data_bytes {
                0 => self.source.size_bytes(),
                known => known,
            },
            _ => self.source.dirty_bytes(),
        };
        self.tell(&Event::PassStarted { pass, kind: Some(kind), expected_bytes });
        expected_bytes
    }

    /// A pass that began at `begun` has ended, having waited for `settle` at its end.
    pub(crate) fn end_pass(
        &mut self,
        pass: u32,
        kind: PassKind,
        sent: Counts,
        begun: Instant,
        settle: Duration,
    ) {
        let stats = PassStats {
            pass,
            kind,
            data_bytes: sent.data_bytes,
            zero_bytes: sent.zero_bytes,
            wire_bytes: sent.wire_bytes,
            frames: sent.frames,
            seconds: begun.elapsed().as_secs_f64(),
            settle_seconds: settle.as_secs_f64(),
            dirty_bytes: self.source.dirty_data_bytes(),
        };
        self.tell(&Event::PassEnded(stats));
        self.history.push(stats);
    }

    pub(crate) fn predicted_freeze_ms(&self) -> u64 {
        self.predicted_rest_ms().saturating_add(self.convergence.file_system_ms)
    }

    /// Of this, what follows when the file system is frozen.
    pub(crate) fn predicted_rest_ms(&self) -> u64 {
        converge::predict_freeze_ms(&self.history, self.source.dirty_data_bytes())
    }

    /// Something that the operator should know, now and in the report.
    pub(crate) fn warn(&mut self, message: String) {
        self.tell(&Event::Warning { message: message.clone() });
        self.warnings.push(message);
    }

    /// Whether another pass helps. [`ErrorKind::NotQuiet`] when none does and a freeze would be too long.
    pub(crate) fn next_pass_helps(&mut self) -> Result<bool> {
        if let Some(last) = self.history.last_mut() {
            // Since the pass ended, time has gone by.
            last.dirty_bytes = self.source.dirty_data_bytes();
        }
        let decision = converge::decide(&self.history, &self.convergence);
        let predicted_freeze_ms = self.predicted_freeze_ms();
        self.tell(&Event::Decided { decision: decision.name(), predicted_freeze_ms });
        match decision {
            Decision::NextPass => Ok(true),
            Decision::Freeze => Ok(false),
            Decision::GiveUp(reason) => Err(self.too_long(predicted_freeze_ms, &reason.to_string())),
        }
    }

    /// The freeze would be longer than the operator allows.
    pub(crate) fn too_long(&self, predicted_freeze_ms: u64, reason: &str) -> Error {
        let limit = self.convergence.limit_ms();
        Error::new(
            ErrorKind::NotQuiet,
            format!("the freeze would last {predicted_freeze_ms} ms and may last {limit} ms: {reason}"),
        )
        .advise("allow a longer freeze, or copy when less is written")
    }

    /// All that was ever written is sent: nothing changed, nothing on loan.
    pub(crate) fn check_clean(&self) -> Result<()> {
        if self.source.is_clean() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotQuiet, "something of the disk was left unsent"))
    }

    /// The figures of a copy that has succeeded, of so many deltas.
    pub(crate) fn report(self, committed: bool, transcript: String, deltas: u32) -> SendReport {
        SendReport {
            copy_id: hexadecimal(&self.options.copy_id),
            disk_bytes: self.source.size_bytes(),
            committed,
            wire_bytes: self.total.wire_bytes,
            data_bytes: self.total.data_bytes,
            transcript,
            passes: self.history,
            deltas,
            downtime: self.downtime,
            warnings: self.warnings,
            seconds: self.begun.elapsed().as_secs_f64(),
        }
    }
}
