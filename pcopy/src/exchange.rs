//! What the threads of a sender tell each other: credit, answers, the first failure.
//!
//! One mutex and one condition variable; nothing else is locked or waited for inside. The phases wait here for
//! answers, the writing thread for credit. A failure wakes both. Time-outs are not kept here: the thread that reads
//! answers notices a silent receiver and records it as a failure.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop_core::{Error, ErrorKind, Result};

use crate::transport::{self, Cancel, Transport};
use crate::wire::{
    self, Abort, AnswerRules, Digest, FrameError, FrameReader, HelloAck, Kind, Told, WireError,
};

/// How long a sender whose pipe broke waits for the receiver's reason.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Shared by the threads of one sender.
#[derive(Default)]
pub(crate) struct Exchange {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Whether a receiver answers.
    two_way: bool,
    told: Told,
    /// Bytes that may be outstanding, and the version of the stream that was answered; `None` before the receiver said so.
    window: Option<HelloAck>,
    credited_bytes: u64,
    durable_pass: u32,
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

/// What the writing thread may do.
pub(crate) enum Grant {
    Send,
    /// Nothing came within the time asked for.
    Wait,
    GiveUp,
}

impl Exchange {
    pub(crate) fn new(two_way: bool) -> Self {
        let exchange = Self::default();
        exchange.lock().two_way = two_way;
        exchange
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

    /// Says beforehand that a pass ends, so that its answer is legal.
    pub(crate) fn tell_pass(&self, pass: u32) {
        self.lock().told.passes = pass;
    }

    pub(crate) fn tell_sealed(&self, transcript: Digest) {
        self.change(|state| {
            state.told.sealed = true;
            state.transcript = Some(transcript);
        });
    }

    pub(crate) fn tell_commit(&self) {
        self.lock().told.committed = true;
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

/// What a peer said when it gave up, as an error of the same kind as there.
pub(crate) fn peer_error(peer: &str, abort: &Abort) -> Error {
    let kind = ErrorKind::from_exit_code(abort.code);
    Error::new(kind.unwrap_or(ErrorKind::Protocol), format!("the {peer} gave up: {}", abort.text))
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
