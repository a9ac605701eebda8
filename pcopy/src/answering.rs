//! The receiver's way back: frames leave whole and numbered, from whichever thread, and one thread says regularly how
//! things are.
//!
//! What it says is one of two things. `Keepalive`: this side lives, nothing moved. `Credit` with the number of the one
//! before it: work moved, though no frame is dealt with yet. A sender gives up on a receiver that lives without moving,
//! so nothing else may be said of a disk that hangs. Before the `HelloAck` and after the `Verdict` no `Credit` may come.

use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ploop_core::{Error, ErrorKind, Result};

use crate::pass;
use crate::transport::{self, CALL_FACTOR, Cancel, Transport, keepalive_interval};
use crate::wire::{self, HelloAck, Kind};
use crate::work::Work;

/// How long a receiver that gives up tries to say so.
const ABORT_PATIENCE: Duration = Duration::from_secs(2);

/// The way back to the sender.
pub(crate) struct Answers {
    shared: Arc<Mutex<Numbered>>,
    ticker: Option<(SyncSender<()>, JoinHandle<()>)>,
}

struct Numbered {
    transport: Transport,
    sequence: u64,
    /// The last credit, while any may be given.
    credit: Option<u64>,
    /// Why nothing more can be said.
    broken: Option<Error>,
}

impl Numbered {
    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let sequence = if kind.is_numbered() { self.sequence } else { 0 };
        let frame = wire::encode_frame(kind, sequence, payload)
            .ok_or_else(|| Error::new(ErrorKind::Protocol, "an answer grew past its limit"))?;
        if let Err(error) = self.transport.write_all(&frame) {
            // Part of a frame may be on its way: nothing may follow it.
            let error = transport::explain(ErrorKind::Write, "answer the sender", error);
            self.broken = Some(error.clone());
            return Err(error);
        }
        self.sequence += u64::from(kind.is_numbered());
        Ok(())
    }

    fn credit(&mut self, consumed: u64) -> Result<()> {
        self.credit = Some(consumed);
        self.send(Kind::Credit, &consumed.to_le_bytes())
    }
}

impl Answers {
    /// From now on says at every interval how `work` goes. A way back that stands still raises `stop`, as nobody may be
    /// left who would end the copy.
    pub(crate) fn start(transport: Transport, stall: Duration, work: Work, stop: Cancel) -> Result<Self> {
        let numbered = Numbered { transport, sequence: 0, credit: None, broken: None };
        let shared = Arc::new(Mutex::new(numbered));
        let (end, ended) = mpsc::sync_channel::<()>(1);
        let ticking = Arc::clone(&shared);
        let ticker = pass::spawn("pcopy-alive", move || {
            let mut told = 0;
            while ended.recv_timeout(keepalive_interval(stall)) == Err(RecvTimeoutError::Timeout) {
                let steps = work.steps();
                let moves = steps != told || work.is_in_call(stall.saturating_mul(CALL_FACTOR));
                told = steps;
                let mut answers = lock(&ticking);
                let said = match answers.credit {
                    Some(credit) if moves => answers.credit(credit),
                    _ => answers.send(Kind::Keepalive, &[]),
                };
                if said.is_err() {
                    // Of a sender that is gone the reading thread finds out more.
                    drop(answers);
                    if ended.recv_timeout(ABORT_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                        stop.cancel();
                    }
                    return;
                }
            }
        })?;
        Ok(Self { shared, ticker: Some((end, ticker)) })
    }

    /// Sends one answer.
    pub(crate) fn send(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        let mut answers = lock(&self.shared);
        if kind == Kind::Verdict {
            answers.credit = None;
        }
        answers.send(kind, payload)
    }

    /// The stream may come; so many bytes of it were dealt with. Their credit is given twice: a receiver that does so
    /// reports its work.
    pub(crate) fn welcome(&self, ack: &HelloAck, consumed: u64) -> Result<()> {
        let mut answers = lock(&self.shared);
        answers.send(Kind::HelloAck, &ack.encode())?;
        answers.credit(consumed)?;
        answers.credit(consumed)
    }

    /// So many bytes of frames have been dealt with.
    pub(crate) fn credit(&self, consumed: u64) -> Result<()> {
        lock(&self.shared).credit(consumed)
    }

    /// Says why there will be no copy, if that can be said soon.
    pub(crate) fn abort(&self, payload: &[u8]) {
        let mut answers = lock(&self.shared);
        answers.transport.limit(ABORT_PATIENCE);
        // The sender may be gone already.
        let _ = answers.send(Kind::Abort, payload);
    }

    /// Why nothing more can be said, if that is so.
    pub(crate) fn broken(&self) -> Option<Error> {
        lock(&self.shared).broken.clone()
    }
}

fn lock(numbered: &Mutex<Numbered>) -> MutexGuard<'_, Numbered> {
    numbered.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Answers {
    fn drop(&mut self) {
        if let Some((end, ticker)) = self.ticker.take() {
            drop(end);
            // It had nothing to report.
            let _ = ticker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Patience;
    use crate::wire::{FrameReader, Header};
    use std::os::fd::OwnedFd;

    fn answers(output: OwnedFd, stall: Duration, work: &Work, stop: &Cancel) -> Answers {
        let patience = Patience { stall, cancels: vec![stop.clone()] };
        Answers::start(Transport::writer(output, patience).unwrap(), stall, work.clone(), stop.clone())
            .unwrap()
    }

    #[test]
    fn work_is_reported_as_credit_and_nothing_else_is() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (work, stop) = (Work::default(), Cancel::new().unwrap());
        let answers = answers(write, Duration::from_millis(40), &work, &stop);
        let mut frames = FrameReader::new(std::fs::File::from(read));
        let mut next = || {
            let header: Header = frames.header().unwrap().unwrap();
            (header.kind, frames.small_payload(&header).unwrap())
        };
        assert_eq!(next().0, Kind::Keepalive);
        answers.welcome(&HelloAck { window_bytes: 1 << 25, protocol_version: 1 }, 144).unwrap();
        while next().0 == Kind::Keepalive {}
        let credit = (Kind::Credit, 144_u64.to_le_bytes().to_vec());
        assert_eq!((next(), next()), (credit.clone(), credit.clone()));
        // It lives, and nothing moves.
        assert_eq!((next().0, next().0), (Kind::Keepalive, Kind::Keepalive));
        work.step();
        assert!((0..1000).any(|_| next() == credit));
        assert!((0..1000).any(|_| next().0 == Kind::Keepalive), "one step is one report");
        // After the verdict no credit may come.
        answers.send(Kind::Verdict, &[0; 32]).unwrap();
        while next().0 != Kind::Verdict {}
        work.step();
        assert!((0..5).all(|_| next().0 == Kind::Keepalive));
    }

    #[test]
    fn a_way_back_that_stands_still_ends_the_copy() {
        let (_read, write) = nix::unistd::pipe().unwrap();
        let full = Transport::writer(
            write.try_clone().unwrap(),
            Patience { stall: Duration::from_millis(20), cancels: Vec::new() },
        );
        assert!(full.unwrap().write_all(&vec![0; 8 << 20]).is_err());
        let stop = Cancel::new().unwrap();
        let answers = answers(write, Duration::from_millis(40), &Work::default(), &stop);
        assert!((0..30_000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            stop.is_cancelled()
        }));
        assert_eq!(answers.broken().unwrap().kind(), ErrorKind::Write);
        // Nothing waits a second time, and nothing follows half a frame.
        let begun = std::time::Instant::now();
        answers.abort(&[0; 8]);
        assert!(answers.send(Kind::Keepalive, &[]).is_err());
        assert!(begun.elapsed() < ABORT_PATIENCE);
    }
}
