//! The receiver's way in: one thread reads frames and asks the rules, one checks digests.
//!
//! A header is admitted (state, number, bounds, sums) before its payload is read; payloads are read into buffers of a
//! pool, so memory is bounded whatever the stream says. What comes out is in order, checked, and part of the
//! transcript. The first failure is the last thing that comes out.

use std::io::Read;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop_core::io::{BufferPool, IoBuf};
use ploop_core::{Error, ErrorKind, Result};

use crate::exchange::{frame_error, peer_error};
use crate::pass;
use crate::transport::{CALL_FACTOR, Cancel};
use crate::wire::{
    Abort, Delta, Digest, EndDelta, EndPass, FrameReader, Header, Hello, Kind, Seal, StreamRules, Transcript,
    WireError,
};
use crate::work::Work;

/// A sender that lives and sends nothing may have a freeze command that takes its time: it has at least this long.
const NOTHING_SENT_MIN: Duration = Duration::from_secs(3600);
/// Frames between two threads.
const QUEUE_FRAMES: usize = 32;

/// A frame that was admitted and fits its digest.
pub(crate) enum Arrived {
    Data(Header, IoBuf),
    Zero(Header),
    EndPass(EndPass),
    /// A delta begins.
    Delta(Delta),
    /// A frozen delta is whole: the sender's digest of it equals ours.
    EndDelta(EndDelta),
    /// The transcript of the sender equals ours: this one.
    Seal(Digest),
    Commit,
}

enum ReadFrame {
    Data(Header, IoBuf),
    Other(Header, Arrived),
    EndDelta(Header, EndDelta),
    Seal(Header, Seal),
}

/// The digests of what came: of the stream, and of its present delta from the frame that names it.
#[derive(Default)]
struct Transcripts {
    stream: Transcript,
    delta: Transcript,
}

impl Transcripts {
    fn fold(&mut self, header: &Header) {
        if header.kind == Kind::Delta {
            self.delta = Transcript::default();
        }
        self.stream.fold(header);
        self.delta.fold(header);
    }
}

/// Both threads, seen from the receiver.
pub(crate) struct Intake {
    arrived: Option<Receiver<Result<Arrived>>>,
    threads: Vec<JoinHandle<()>>,
    stop: Cancel,
}

/// Frames with the rules of a sender's stream.
pub(crate) struct Admission<R> {
    frames: FrameReader<R>,
    rules: StreamRules,
    work: Work,
    /// How long nothing may move while the sender lives.
    nothing_sent_max: Duration,
    /// What had moved when the sender last showed life, and since when no more has.
    moved: (u64, Instant),
}

const OPERATION: &str = "read the stream";

fn wrong(error: WireError) -> Error {
    frame_error(OPERATION, error.into())
}

impl<R: Read> Admission<R> {
    /// Frames from `input`; all but signs of life are steps of `work`. `stall`: how long the sender may be silent.
    pub(crate) fn new(input: R, work: Work, stall: Duration) -> Self {
        Self {
            frames: FrameReader::new(input),
            rules: StreamRules::new(),
            work,
            nothing_sent_max: stall.saturating_mul(CALL_FACTOR).max(NOTHING_SENT_MIN),
            moved: (0, Instant::now()),
        }
    }

    /// The sender lives. That does not go on for ever when nothing moves.
    fn alive(&mut self) -> Result<()> {
        let steps = self.work.steps();
        if steps != self.moved.0 || self.work.is_in_call(Duration::MAX) {
            self.moved = (steps, Instant::now());
            return Ok(());
        }
        if self.moved.1.elapsed() <= self.nothing_sent_max {
            return Ok(());
        }
        let seconds = self.nothing_sent_max.as_secs();
        Err(Error::new(ErrorKind::Read, format!("the sender is alive, and has sent nothing for {seconds} s"))
            .advise("see what it waits for; a longer time-out can be given (--stall-timeout)"))
    }

    /// The next header that may come now. `None` at the end of a stream that may end here.
    fn header(&mut self) -> Result<Header> {
        let at = self.frames.position();
        let header = self.frames.header().map_err(|error| frame_error(OPERATION, error))?;
        let header = header.ok_or_else(|| {
            Error::new(
                ErrorKind::Read,
                format!("{OPERATION}: it ends after {at} bytes, before its end was sealed"),
            )
            .advise("the sender failed or the connection broke: see its message, and start the copy again")
        })?;
        self.rules.admit(&header).map_err(|error| wrong(error).at_offset(at))?;
        if header.kind.is_numbered() {
            self.work.step();
        }
        Ok(header)
    }

    fn payload(&mut self, header: &Header) -> Result<Vec<u8>> {
        self.frames.small_payload(header).map_err(|error| frame_error(OPERATION, error))
    }

    /// The first frame.
    pub(crate) fn hello(&mut self) -> Result<(Header, Hello)> {
        let header = self.header()?;
        let payload = self.payload(&header)?;
        if header.kind == Kind::Abort {
            return Err(peer_error("sender", &Abort::decode(&payload).map_err(wrong)?));
        }
        let hello = Hello::decode(&payload).map_err(wrong)?;
        self.rules.hello(&hello);
        Ok((header, hello))
    }

    fn next(&mut self, pool: &BufferPool) -> Result<ReadFrame> {
        loop {
            let header = self.header()?;
            if header.kind == Kind::Data {
                let mut buffer =
                    pool.take().map_err(|error| Error::io(ErrorKind::Memory, "take a buffer", error))?;
                buffer.truncate(usize::try_from(header.length).unwrap_or(0));
                let payload = buffer.as_mut_slice();
                // However slow the line is: what arrives of a long frame moves, too.
                let work = &self.work;
                let read = self.frames.payload_watched(payload, || work.step());
                read.map_err(|error| frame_error(OPERATION, error))?;
                return Ok(ReadFrame::Data(header, buffer));
            }
            let payload = self.payload(&header)?;
            return Ok(match header.kind {
                Kind::Keepalive => {
                    self.alive()?;
                    continue;
                }
                Kind::Abort => {
                    return Err(peer_error("sender", &Abort::decode(&payload).map_err(wrong)?));
                }
                Kind::Zero => ReadFrame::Other(header, Arrived::Zero(header)),
                Kind::EndPass => {
                    let end = EndPass::decode(&payload).map_err(wrong)?;
                    self.rules.end_pass(&end).map_err(wrong)?;
                    ReadFrame::Other(header, Arrived::EndPass(end))
                }
                Kind::Delta => {
                    let delta = Delta::decode(&payload).map_err(wrong)?;
                    self.rules.delta(&delta).map_err(wrong)?;
                    ReadFrame::Other(header, Arrived::Delta(delta))
                }
                Kind::EndDelta => {
                    let end = EndDelta::decode(&payload).map_err(wrong)?;
                    self.rules.end_delta(&end).map_err(wrong)?;
                    ReadFrame::EndDelta(header, end)
                }
                Kind::Seal => {
                    let seal = Seal::decode(&payload).map_err(wrong)?;
                    self.rules.check_seal(&seal).map_err(wrong)?;
                    ReadFrame::Seal(header, seal)
                }
                Kind::Commit => ReadFrame::Other(header, Arrived::Commit),
                kind => return Err(wrong(WireError::State { kind, state: "from a sender" })),
            });
        }
    }
}

impl Intake {
    /// Starts both threads after the `Hello`. `stop` is one of the cancels of the transport behind `admission`.
    pub(crate) fn start<R: Read + Send + 'static>(
        mut admission: Admission<R>,
        hello: (&Header, &Hello),
        pool: BufferPool,
        stop: Cancel,
    ) -> Result<Self> {
        let (read_queue, read) = mpsc::sync_channel(QUEUE_FRAMES);
        let (arrived_queue, arrived) = mpsc::sync_channel(QUEUE_FRAMES);
        let two_way = hello.1.two_way;
        let mut transcripts = Transcripts::default();
        transcripts.fold(hello.0);
        let mut intake = Self { arrived: Some(arrived), threads: Vec::new(), stop };
        intake.threads.push(pass::spawn("pcopy-read", move || {
            read_frames(&mut admission, two_way, &pool, &read_queue);
        })?);
        intake.threads.push(pass::spawn("pcopy-digest", move || {
            check_frames(&read, &mut transcripts, &arrived_queue);
        })?);
        Ok(intake)
    }

    /// The next frame, waiting for it.
    pub(crate) fn next(&self) -> Result<Arrived> {
        let next = self.arrived.as_ref().and_then(|arrived| arrived.recv().ok());
        next.unwrap_or_else(|| Err(Error::new(ErrorKind::System, "a thread of the copy ended")))
    }

    /// The next frame if it is there already.
    pub(crate) fn try_next(&self) -> Option<Result<Arrived>> {
        self.arrived.as_ref().and_then(|arrived| arrived.try_recv().ok())
    }

    /// Why the stream ended, if it ends soon: frames up to there are dropped.
    pub(crate) fn last_words(&self, patience: Duration) -> Option<Error> {
        let end = Instant::now() + patience;
        let arrived = self.arrived.as_ref()?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if let Err(error) = arrived.recv_timeout(left).ok()? {
                return Some(error);
            }
        }
    }

    /// Ends both threads.
    pub(crate) fn end(&mut self) {
        self.arrived = None;
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // A thread that failed has left its error in the queue, or nobody wants it any more.
            let _ = thread.join();
        }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.end();
    }
}

fn read_frames<R: Read>(
    admission: &mut Admission<R>,
    two_way: bool,
    pool: &BufferPool,
    queue: &SyncSender<Result<ReadFrame>>,
) {
    loop {
        let next = admission.next(pool);
        let is_end = match &next {
            Err(_) | Ok(ReadFrame::Other(_, Arrived::Commit)) => true,
            Ok(ReadFrame::Seal(..)) => !two_way,
            Ok(_) => false,
        };
        if queue.send(next).is_err() || is_end {
            return;
        }
    }
}

fn check_frames(
    read: &Receiver<Result<ReadFrame>>,
    transcripts: &mut Transcripts,
    queue: &SyncSender<Result<Arrived>>,
) {
    while let Ok(next) = read.recv() {
        let checked = next.and_then(|frame| check(frame, transcripts));
        let is_end = checked.is_err();
        if queue.send(checked).is_err() || is_end {
            return;
        }
    }
}

fn check(frame: ReadFrame, transcripts: &mut Transcripts) -> Result<Arrived> {
    match frame {
        ReadFrame::Data(header, buffer) => {
            header.check(buffer.as_slice()).map_err(|error| {
                wrong(error).advise("the connection changes data: use another, and start the copy again")
            })?;
            transcripts.fold(&header);
            Ok(Arrived::Data(header, buffer))
        }
        ReadFrame::Other(header, arrived) => {
            transcripts.fold(&header);
            Ok(arrived)
        }
        ReadFrame::EndDelta(header, end) => {
            let ours = transcripts.delta.digest();
            transcripts.fold(&header);
            if ours == end.transcript {
                Ok(Arrived::EndDelta(end))
            } else {
                Err(wrong(WireError::Field("transcript of a delta")))
            }
        }
        ReadFrame::Seal(header, seal) => {
            let ours = transcripts.stream.digest();
            transcripts.fold(&header);
            if ours == seal.transcript {
                Ok(Arrived::Seal(ours))
            } else {
                Err(wrong(WireError::Field("transcript")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ImageKind, encode_frame};

    #[test]
    fn a_sender_that_lives_and_sends_nothing_is_left_in_the_end() {
        let hello = Hello {
            two_way: true,
            cluster_sectors: 2048,
            disk_bytes: 1 << 20,
            version: 2,
            image: ImageKind::Expanded,
            copy_id: [1; 16],
            window_bytes: 1 << 25,
            payload_bytes_max: 4096,
            data_bytes: 0,
            deltas: 0,
        };
        let mut stream = encode_frame(Kind::Hello, 0, &hello.encode()).unwrap();
        for _ in 0..3 {
            stream.extend(encode_frame(Kind::Keepalive, 0, &[]).unwrap());
        }
        let pool = BufferPool::new(4096, 1);
        let next = |nothing_sent_max, work: &Work| {
            let mut admission = Admission::new(&stream[..], work.clone(), Duration::from_secs(1));
            assert_eq!(admission.nothing_sent_max, NOTHING_SENT_MIN);
            admission.nothing_sent_max = nothing_sent_max;
            admission.hello().unwrap();
            admission.next(&pool).map(drop).unwrap_err().to_string()
        };
        assert!(next(Duration::ZERO, &Work::default()).contains("has sent nothing"));
        // The end of this stream, not of the patience: time is left, or it is this side that is at work.
        assert!(next(NOTHING_SENT_MIN, &Work::default()).contains("it ends after"));
        let work = Work::default();
        assert!(work.call(|| next(Duration::ZERO, &work)).contains("it ends after"));
    }
}
