//! What the threads of a sender tell each other: credit, answers, the first failure.
//!
//! One mutex and one condition variable; nothing else is locked or waited for inside. The phases wait here for
//! answers, the writing thread for credit. A failure wakes both.
//!
//! The thread that reads answers keeps the time for all of them, the writing thread in its pipe included. It fails the
//! copy when nothing at all is heard for the time-out, and when the receiver is heard but the copy does not move
//! although the receiver owes something ([`Exchange::check_moves`]). What this side writes proves nothing, and a sign of
//! life proves no more than life: only answers about the stream itself count as moving.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop_core::{Error, ErrorKind, Result};

use crate::transport::{self, CALL_FACTOR, Cancel, Transport};
use crate::wire::{
    self, Abort, AnswerRules, Digest, FrameError, FrameReader, HelloAck, Kind, Told, WireError,
};

/// How long a sender whose pipe broke waits for the receiver's reason.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Shared by the threads of one sender.
pub(crate) struct Exchange {
    state: Mutex<State>,
    changed: Condvar,
    /// How long a receiver may be silent, or owe something without moving.
    stall: Duration,
}

#[derive(Default)]
struct State {
    /// Whether a receiver answers.
    two_way: bool,
    told: Told,
    /// Bytes that may be outstanding, and the version of the stream that was answered; `None` before the receiver said so.
    window: Option<HelloAck>,
    credited_bytes: u64,
    /// The receiver has given the same credit twice: it reports its work, so that its silence about it means something.
    reports_work: bool,
    /// When the copy last moved, or the receiver last began to owe something.
    moved: Option<Instant>,
    durable_pass: u32,
    /// The last pass whose `PassDurable` is due.
    durable_due: u32,
    verdict: Option<Digest>,
    committed: bool,
    /// Our own transcript, once sealed.
    transcript: Option<Digest>,
    /// What the receiver said when it gave up.
    peer_abort: Option<Error>,
    failure: Option<Error>,
    /// The disk has been frozen for too long: nobody waits for the receiver's reason.
    expired: bool,
    answers_ended: bool,
    /// Set by the phases: send nothing more but this.
    abort: Option<Vec<u8>>,
}

impl State {
    /// What the receiver has to do now, if anything.
    fn owed(&self) -> Option<&'static str> {
        match (self.window, self.verdict) {
            _ if self.committed => None,
            (None, _) => Some("to answer"),
            (_, Some(_)) => self.told.committed.then_some("to put the copy in place"),
            _ if self.told.sealed => Some("to compare"),
            _ if self.told.bytes > self.credited_bytes => Some("to take in what was sent"),
            _ => (self.durable_pass < self.durable_due).then_some("to make a pass durable"),
        }
    }

    /// How long it may take without a sign that it moves. What cannot be seen from here may take longer: the receiver
    /// makes its file, puts it in place, or is one that does not report its work.
    fn owed_for_at_most(&self, stall: Duration) -> Duration {
        let is_seen = self.reports_work && self.verdict.is_none();
        if is_seen { stall } else { stall.saturating_mul(CALL_FACTOR) }
    }

    /// Called before something is asked of the receiver: its time begins when it owes nothing yet.
    fn begin_owing(&mut self) {
        if self.owed().is_none() {
            self.moved = Some(Instant::now());
        }
    }
}

/// What the writing thread may do.
pub(crate) enum Grant {
    Send,
    /// Nothing came within the time asked for.
    Wait,
    GiveUp,
}

impl Exchange {
    /// `stall`: how long a receiver that answers may be silent, or owe something without moving.
    pub(crate) fn new(two_way: bool, stall: Duration) -> Self {
        let state = State { two_way, moved: Some(Instant::now()), ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new(), stall }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody panics while holding it, and the state is valid at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Records why a thread ended; the first reason stays.
    pub(crate) fn fail(&self, error: Error) {
        self.change(|state| _ = state.failure.get_or_insert(error));
    }

    /// As [`fail`](Self::fail), when the disk has been frozen for too long: nobody then waits for anything.
    pub(crate) fn expire(&self, error: Error) {
        self.change(|state| {
            state.expired = true;
            state.failure.get_or_insert(error);
        });
    }

    /// Why the copy cannot go on. Waits shortly for the receiver's own reason, which says more than a broken pipe.
    pub(crate) fn failure(&self) -> Error {
        let end = Instant::now() + LAST_WORDS;
        let mut state = self.lock();
        loop {
            if let Some(error) = &state.peer_abort {
                return error.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            let is_last_word = !state.two_way || state.answers_ended || state.expired || left.is_zero();
            match &state.failure {
                Some(error) if is_last_word => return error.clone(),
                // A thread closes its queue a moment before it leaves its reason.
                None if left.is_zero() => return Error::new(ErrorKind::System, "a thread of the copy ended"),
                _ => {}
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// An error when something has failed already.
    pub(crate) fn check(&self) -> Result<()> {
        let failed = {
            let state = self.lock();
            state.failure.is_some() || state.peer_abort.is_some()
        };
        if failed { Err(self.failure()) } else { Ok(()) }
    }

    /// Whether the receiver itself said that it gave up.
    pub(crate) fn peer_has_aborted(&self) -> bool {
        self.lock().peer_abort.is_some()
    }

    fn wait_for<T>(&self, mut pick: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let mut state = self.lock();
        loop {
            if let Some(picked) = pick(&state) {
                return Ok(picked);
            }
            if state.failure.is_some() || state.peer_abort.is_some() {
                drop(state);
                return Err(self.failure());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn wait_window(&self) -> Result<HelloAck> {
        self.wait_for(|state| state.window)
    }

    pub(crate) fn wait_durable(&self, pass: u32) -> Result<()> {
        self.wait_for(|state| (state.durable_pass >= pass).then_some(()))
    }

    pub(crate) fn wait_verdict(&self) -> Result<Digest> {
        self.wait_for(|state| state.verdict)
    }

    pub(crate) fn wait_committed(&self) -> Result<()> {
        self.wait_for(|state| state.committed.then_some(()))
    }

    pub(crate) fn wait_transcript(&self) -> Result<Digest> {
        self.wait_for(|state| state.transcript)
    }

    pub(crate) fn durable_pass(&self) -> u32 {
        self.lock().durable_pass
    }

    /// Says beforehand that a pass ends, so that its answer is legal; of a durable one that answer is due.
    pub(crate) fn tell_pass(&self, pass: u32, durable: bool) {
        self.change(|state| {
            state.begin_owing();
            state.told.passes = pass;
            if durable {
                state.durable_due = pass;
            }
        });
    }

    pub(crate) fn tell_sealed(&self, transcript: Digest) {
        self.change(|state| {
            state.begin_owing();
            state.told.sealed = true;
            state.transcript = Some(transcript);
        });
    }

    pub(crate) fn tell_commit(&self) {
        self.change(|state| {
            state.begin_owing();
            state.told.committed = true;
        });
    }

    /// Whether nothing follows a frame of that kind.
    pub(crate) fn is_last(&self, kind: Kind) -> bool {
        kind == Kind::Commit || kind == Kind::Seal && !self.lock().two_way
    }

    /// Whether the copy may be in place on the other side, or come there yet: what lets it (the wish to commit, or, where
    /// nobody answers, the seal) may have left, and the receiver has not said that it gave up.
    pub(crate) fn may_be_in_place(&self) -> bool {
        let state = self.lock();
        let is_let = if state.two_way { state.told.committed } else { state.told.sealed };
        let has_given_up = |error: &Error| error.kind() != ErrorKind::OutcomeUnknown;
        is_let && !state.peer_abort.as_ref().is_some_and(has_given_up)
    }

    /// An error when the receiver lives but the copy has not moved for too long although it is the receiver's turn.
    fn check_moves(&self) -> Result<()> {
        let state = self.lock();
        let (Some(owed), Some(moved)) = (state.owed(), state.moved) else { return Ok(()) };
        let allowed = state.owed_for_at_most(self.stall);
        if moved.elapsed() <= allowed {
            return Ok(());
        }
        let seconds = allowed.as_secs_f64();
        Err(Error::new(
            ErrorKind::Write,
            format!("the receiver is alive and had {owed}, but nothing has moved for {seconds} s"),
        )
        .advise("see whether the link stands still in one direction, or the receiver's disk hangs; then start the copy again (a longer time-out can be given)"))
    }

    /// Stops the writing thread at the next frame; this abort is its last one.
    pub(crate) fn give_up(&self, abort: Vec<u8>) {
        self.change(|state| _ = state.abort.get_or_insert(abort));
    }

    pub(crate) fn abort(&self) -> Option<Vec<u8>> {
        self.lock().abort.clone()
    }

    /// Asks for leave to send a numbered frame of that many bytes; counts it when granted.
    pub(crate) fn reserve(&self, kind: Kind, bytes: u64, patience: Duration) -> Grant {
        let mut state = self.lock();
        let mut waited = false;
        loop {
            if state.abort.is_some() || state.failure.is_some() || state.peer_abort.is_some() {
                return Grant::GiveUp;
            }
            let outstanding = state.told.bytes.saturating_add(bytes).saturating_sub(state.credited_bytes);
            // The `Hello` opens the window, so it needs none.
            let free = !state.two_way
                || kind == Kind::Hello
                || state.window.is_some_and(|window| outstanding <= window.window_bytes);
            if free {
                if state.two_way {
                    state.begin_owing();
                }
                state.told.bytes = state.told.bytes.saturating_add(bytes);
                return Grant::Send;
            }
            if waited {
                return Grant::Wait;
            }
            let result = self.changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
            state = result.0;
            waited = result.1.timed_out();
        }
    }
}

/// Reads answers until the last one; the thread's main function. A failure or an abort of the receiver raises
/// `stop`, so that nobody goes on writing to it. The way back stays open until the thread is joined: closing it would
/// reach the receiver before our reason does.
pub(crate) fn read_answers(transport: Transport, exchange: &Exchange, stop: &Cancel) -> Answers {
    let mut answers = Answers { frames: FrameReader::new(transport), rules: AnswerRules::new() };
    let ended = answers.run(exchange);
    exchange.change(|state| {
        state.answers_ended = true;
        match ended {
            Ok(None) => {}
            Ok(Some(abort)) => state.peer_abort = Some(abort),
            Err(error) => _ = state.failure.get_or_insert(error),
        }
    });
    if exchange.check().is_err() {
        stop.cancel();
    }
    answers
}

/// The way back, and what may come on it.
pub(crate) struct Answers {
    frames: FrameReader<Transport>,
    rules: AnswerRules,
}

impl Answers {
    /// Reads up to `Committed` (`None`) or `Abort`.
    fn run(&mut self, exchange: &Exchange) -> Result<Option<Error>> {
        loop {
            let header = self.frames.header().map_err(explain)?.ok_or_else(|| {
                Error::new(ErrorKind::Read, "the receiver ended without a reason")
                    .advise("see its message, and start the copy again")
            })?;
            let told = exchange.lock().told;
            self.rules.admit(&header, &told).map_err(|error| explain(error.into()))?;
            let payload = self.frames.small_payload(&header).map_err(explain)?;
            if header.kind != Kind::Keepalive {
                exchange.lock().moved = Some(Instant::now());
            }
            match header.kind {
                Kind::Abort => {
                    let abort = Abort::decode(&payload).map_err(|error| explain(error.into()))?;
                    return Ok(Some(peer_error("receiver", &abort)));
                }
                Kind::Committed => {
                    exchange.change(|state| state.committed = true);
                    return Ok(None);
                }
                _ => self.take_in(header.kind, &payload, exchange).map_err(|error| explain(error.into()))?,
            }
            exchange.check_moves()?;
        }
    }

    fn take_in(
        &mut self,
        kind: Kind,
        payload: &[u8],
        exchange: &Exchange,
    ) -> std::result::Result<(), WireError> {
        exchange.change(|state| {
            match kind {
                Kind::HelloAck => state.window = Some(HelloAck::decode(payload)?),
                Kind::Credit => {
                    let credited = wire::decode_credit(payload)?;
                    self.rules.credit(credited, &state.told)?;
                    state.reports_work |= state.credited_bytes == credited;
                    state.credited_bytes = credited;
                }
                Kind::PassDurable => {
                    let pass = wire::decode_pass(payload)?;
                    self.rules.durable(pass, &state.told)?;
                    state.durable_pass = pass;
                }
                Kind::Verdict => state.verdict = Some(wire::decode_verdict(payload)?),
                _ => {}
            }
            Ok(())
        })
    }
}

fn explain(error: FrameError) -> Error {
    frame_error("read the receiver's answers", error)
}

/// Turns what went wrong with a frame into an error that says what it means.
pub(crate) fn frame_error(operation: &str, error: FrameError) -> Error {
    match error {
        FrameError::Wire(error) => Error::new(ErrorKind::Protocol, format!("{operation}: {error}"))
            .caused_by(error)
            .advise("see whether both sides run a fitting version and nothing else writes into the pipe; then start again"),
        FrameError::Cut => Error::new(ErrorKind::Read, format!("{operation}: it ends inside a frame"))
            .advise("the other side or the connection is gone: see its message, and start the copy again"),
        FrameError::Io(error) => transport::explain(ErrorKind::Read, operation, error),
    }
}

/// How the message begins, behind "the receiver" or "the sender", when it was the peer that gave up.
pub(crate) const GAVE_UP: &str = " gave up: ";

/// Whether it is the receiver that has given up and said why.
pub fn is_told_by_receiver(error: &Error) -> bool {
    error.to_string().starts_with(&format!("the receiver{GAVE_UP}"))
}

/// What a peer said when it gave up, as an error of the same kind as there.
pub(crate) fn peer_error(peer: &str, abort: &Abort) -> Error {
    let kind = ErrorKind::from_exit_code(abort.code);
    Error::new(kind.unwrap_or(ErrorKind::Protocol), format!("the {peer}{GAVE_UP}{}", abort.text))
}

/// The payload of an abort that tells the peer of `error` and of what caused it.
pub(crate) fn abort_payload(error: &Error) -> Vec<u8> {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(deeper) = cause {
        text.push_str(": ");
        text.push_str(&deeper.to_string());
        cause = deeper.source();
    }
    Abort { code: error.kind().exit_code(), text }.encode()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_millis(100);

    /// Whether the receiver has been left when so much time has passed since it was last asked or moved.
    fn is_left(exchange: &Exchange, passed: Duration) -> bool {
        let mut state = exchange.lock();
        state.moved = Instant::now().checked_sub(passed);
        assert!(state.moved.is_some());
        drop(state);
        exchange.check_moves().is_err()
    }

    #[test]
    fn only_who_owes_something_is_left_and_only_when_nothing_moves() {
        let exchange = Exchange::new(true, STALL);
        let (little, much) = (STALL * 5, STALL * 50);
        // It has not answered yet: it may be making its file.
        assert!(!is_left(&exchange, little) && is_left(&exchange, much));
        exchange.lock().window = Some(HelloAck { window_bytes: 1 << 25, protocol_version: 1 });
        // Idle: the sender has its own reasons to send nothing.
        assert!(!is_left(&exchange, much));
        assert!(matches!(exchange.reserve(Kind::Data, 100, STALL), Grant::Send));
        assert!(exchange.check_moves().is_ok(), "its time begins when it is asked");
        assert!(!is_left(&exchange, little) && is_left(&exchange, much));
        // It reports its work.
        exchange.lock().reports_work = true;
        assert!(is_left(&exchange, little));
        exchange.lock().credited_bytes = 100;
        assert!(!is_left(&exchange, much));
        exchange.tell_pass(1, true);
        assert!(is_left(&exchange, little));
        exchange.lock().durable_pass = 1;
        assert!(!is_left(&exchange, much));
        exchange.tell_sealed([0; 32]);
        assert!(is_left(&exchange, little));
        // Between the verdict and the wish to commit nobody waits for it.
        exchange.lock().verdict = Some([0; 32]);
        assert!(!is_left(&exchange, much));
        assert!(!exchange.may_be_in_place());
        exchange.tell_commit();
        assert!(exchange.may_be_in_place());
        assert!(!is_left(&exchange, little) && is_left(&exchange, much));
        exchange.lock().peer_abort = Some(Error::new(ErrorKind::Rename, "x"));
        assert!(!exchange.may_be_in_place(), "it has said so itself");
        exchange.lock().peer_abort = Some(Error::new(ErrorKind::OutcomeUnknown, "x"));
        assert!(exchange.may_be_in_place(), "it does not know either");
        exchange.lock().committed = true;
        assert!(!is_left(&exchange, much));
    }
}
