//! The two ends of a copy's pipe: bytes with a time-out, in both directions.
//!
//! A [`Link`] is what a sender or receiver is given: a descriptor to read, a descriptor to write, or one of them.
//! [`Transport`] makes one of these never wait without end: transfers do not block, waiting happens in `poll`, and
//! ends when no byte has moved in *this* direction for the time-out, or the copy is cancelled. A sender that gets
//! answers has a better judge, who sees whether the copy moves: `exchange.rs`.
//!
//! Pipes are opened once more through `/proc/self/fd`, so that "do not block" is a property of our own open file and
//! not of one shared with a shell; sockets are told so per call. Pipes are enlarged to 1 MiB where that is allowed.
//! A terminal is refused: the stream is no text.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};

/// Size asked for each pipe, in bytes: the most an ordinary user may have by default.
const PIPE_BYTES: i32 = 1 << 20;

/// What a side of a copy talks through.
#[derive(Debug)]
pub struct Link {
    /// Where frames come from: the stream for a receiver, the answers for a sender.
    pub input: Option<OwnedFd>,
    /// Where frames go to: the stream for a sender, the answers for a receiver.
    pub output: Option<OwnedFd>,
}

impl Link {
    /// Standard input and output of this process, duplicated.
    pub fn standard() -> Result<Self> {
        Ok(Self { input: Self::standard_input()?.input, output: Self::standard_output()?.output })
    }

    /// Standard input of this process alone, duplicated.
    pub fn standard_input() -> Result<Self> {
        let input = sys::duplicate(io::stdin())
            .map_err(|error| Error::io(ErrorKind::Read, "open standard input", error))?;
        Ok(Self { input: Some(input), output: None })
    }

    /// Standard output of this process alone, duplicated.
    pub fn standard_output() -> Result<Self> {
        let output = sys::duplicate(io::stdout())
            .map_err(|error| Error::io(ErrorKind::Write, "open standard output", error))?;
        Ok(Self { input: None, output: Some(output) })
    }
}

/// Ends a copy from outside: whatever waits, returns with [`ErrorKind::Cancelled`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cancel {
    state: Arc<CancelState>,
}

#[derive(Debug)]
struct CancelState {
    raised: AtomicBool,
    event: EventFd,
}

impl Cancel {
    /// Not cancelled yet. Fails when the process is out of descriptors.
    pub fn new() -> Result<Self> {
        let event = sys::event_counter()
            .map_err(|error| Error::io(ErrorKind::System, "prepare cancelling of a copy", error))?;
        Ok(Self { state: Arc::new(CancelState { raised: AtomicBool::new(false), event }) })
    }

    /// Cancels, for good.
    pub fn cancel(&self) {
        self.state.raised.store(true, Ordering::Release);
        sys::raise(&self.state.event);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.state.raised.load(Ordering::Acquire)
    }

    /// Waits until it is cancelled.
    pub fn wait(&self) {
        while !self.is_cancelled() {
            let mut descriptors = [PollFd::new(self.state.event.as_fd(), PollFlags::POLLIN)];
            // An interrupted or failed wait is tried again: the flag decides.
            let _ = poll(&mut descriptors, PollTimeout::NONE);
        }
    }

    /// An error when it was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the copy was cancelled")
}

/// How long one direction waits, and what may end waiting.
#[derive(Clone, Debug)]
pub struct Patience {
    /// No byte may move in this direction for this long; what moves in the other one counts for nothing.
    /// [`Duration::MAX`]: somebody else watches, and cancels.
    pub stall: Duration,
    /// Any of these ends waiting at once.
    pub cancels: Vec<Cancel>,
}

/// How often a side shows that it is alive while it has nothing to say: several times within the shortest time-out that
/// can be given, as the peer's is not known.
pub(crate) fn keepalive_interval(stall_timeout: Duration) -> Duration {
    (stall_timeout / 4).clamp(Duration::from_millis(10), Duration::from_millis(250))
}

/// How long a single call of a peer that cannot be counted (a sync, making a file, putting it in place) may take, as a
/// multiple of the time-out for what moves.
pub(crate) const CALL_FACTOR: u32 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// A pipe of our own open file, in non-blocking mode.
    Pipe,
    /// A pipe that could not be reopened: the mode of a shared open file was changed, and goes back on drop.
    SharedPipe(OFlag),
    Socket,
    /// Never makes us wait without end: a regular file, `/dev/null`.
    File,
}

/// One direction of a link.
#[derive(Debug)]
pub struct Transport {
    descriptor: OwnedFd,
    class: Class,
    patience: Patience,
}

impl Transport {
    /// The end to read from.
    pub fn reader(descriptor: OwnedFd, patience: Patience) -> Result<Self> {
        Self::new(descriptor, patience, false).map_err(|error| explain_opening(ErrorKind::Read, error))
    }

    /// The end to write to.
    pub fn writer(descriptor: OwnedFd, patience: Patience) -> Result<Self> {
        Self::new(descriptor, patience, true).map_err(|error| explain_opening(ErrorKind::Write, error))
    }

    fn new(descriptor: OwnedFd, patience: Patience, for_writing: bool) -> io::Result<Self> {
        if io::IsTerminal::is_terminal(&descriptor) {
            return Err(io::Error::other("it is a terminal"));
        }
        let file = File::from(descriptor);
        let kind = file.metadata()?.file_type();
        let (descriptor, class) = if kind.is_fifo() {
            reopen_pipe(file, for_writing)?
        } else if kind.is_socket() {
            (OwnedFd::from(file), Class::Socket)
        } else if kind.is_dir() || kind.is_block_device() {
            return Err(io::Error::other("it is no pipe, socket or file"));
        } else {
            (OwnedFd::from(file), Class::File)
        };
        if matches!(class, Class::Pipe | Class::SharedPipe(_)) {
            // A smaller pipe than wished for is only slower.
            let _ = fcntl(&descriptor, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        }
        Ok(Self { descriptor, class, patience })
    }

    /// From now on no byte may move for at most this long, if that is shorter than before.
    pub fn limit(&mut self, stall: Duration) {
        self.patience.stall = self.patience.stall.min(stall);
    }

    /// Writes all of both slices, in as few calls as possible.
    pub fn write_both(&mut self, first: &[u8], second: &[u8]) -> io::Result<()> {
        let mut written = 0;
        while written < first.len() {
            written += self.write_slices(&[IoSlice::new(&first[written..]), IoSlice::new(second)])?;
        }
        written -= first.len();
        self.write_all(&second[written..])
    }

    fn write_slices(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            let result = match self.class {
                Class::Socket => sendmsg::<()>(
                    self.descriptor.as_raw_fd(),
                    slices,
                    &[],
                    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                    None,
                ),
                _ => nix::sys::uio::writev(&self.descriptor, slices),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => return Ok(count),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the descriptor is ready, a cancel is raised or nothing has moved for too long.
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        // Waiting begins now: bytes have moved until here, or this side was busy with something else.
        let begun = Instant::now();
        loop {
            if self.patience.cancels.iter().any(Cancel::is_cancelled) {
                return Err(io::Error::other(CancelledMark));
            }
            let Some(left) = self.patience.stall.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())
            else {
                return Err(io::ErrorKind::TimedOut.into());
            };
            let mut descriptors = vec![PollFd::new(self.descriptor.as_fd(), events)];
            let events = self.patience.cancels.iter().map(|cancel| cancel.state.event.as_fd());
            descriptors.extend(events.map(|event| PollFd::new(event, PollFlags::POLLIN)));
            let timeout =
                PollTimeout::try_from(left.max(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
            match poll(&mut descriptors, timeout) {
                Ok(_) if descriptors[0].any() == Some(true) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        if let Class::SharedPipe(flags) = self.class {
            // Nothing can be done about a failure; the other users of the pipe would see "try again".
            let _ = fcntl(&self.descriptor, FcntlArg::F_SETFL(flags));
        }
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self.class {
                Class::Socket => recv(self.descriptor.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT),
                _ => nix::unistd::read(&self.descriptor, buffer),
            };
            match result {
                Ok(count) => return Ok(count),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN)?,
                Err(Errno::EINTR) => {}
                // A peer that was killed with bytes unread resets a socket: the stream has ended.
                Err(Errno::ECONNRESET) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Transport {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        self.write_slices(&[IoSlice::new(buffer)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn reopen_pipe(file: File, for_writing: bool) -> io::Result<(OwnedFd, Class)> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = std::fs::OpenOptions::new();
    options.read(!for_writing).write(for_writing).custom_flags(OFlag::O_NONBLOCK.bits());
    match options.open(path) {
        Ok(own) => Ok((own.into(), Class::Pipe)),
        // Nobody reads: what writing would say.
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        Err(_) => {
            let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
            fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            Ok((file.into(), Class::SharedPipe(flags)))
        }
    }
}

fn explain_opening(kind: ErrorKind, error: io::Error) -> Error {
    let stream = if kind == ErrorKind::Read { "read the copy's stream" } else { "write the copy's stream" };
    let refused = error.to_string();
    Error::io(kind, format!("{stream}: {refused}"), error)
        .advise("connect both sides with a pipe, for example: ploop copy -s … | ssh HOST ploop copy -d FILE")
}

/// Marks the I/O error of a cancelled transfer.
#[derive(Debug)]
struct CancelledMark;

impl std::fmt::Display for CancelledMark {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("cancelled")
    }
}

impl std::error::Error for CancelledMark {}

/// Turns a failed transfer of a stream into an error that says what it means.
pub fn explain(kind: ErrorKind, operation: &str, error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<CancelledMark>()) {
        return cancelled();
    }
    let advice = match error.kind() {
        io::ErrorKind::TimedOut => {
            let seen = match kind {
                ErrorKind::Write => "the other side takes nothing any more",
                _ => "the other side shows no sign of life",
            };
            return Error::new(kind, format!("{operation}: {seen}"))
                .caused_by(error)
                .advise("see whether it hangs, and start the copy again (a longer time-out can be given)");
        }
        io::ErrorKind::BrokenPipe => "the other side is gone: see its message, and start the copy again",
        _ => "start the copy again",
    };
    Error::io(kind, operation, error).advise(advice)
}

/// Borrowing helper for callers that poll a link themselves.
impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn patience(stall_ms: u64, cancels: Vec<Cancel>) -> Patience {
        Patience { stall: Duration::from_millis(stall_ms), cancels }
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        nix::unistd::pipe().unwrap()
    }

    #[test]
    fn carries_bytes_over_pipes_and_sockets() {
        let (read, write) = pipe();
        let (left, right) = UnixStream::pair().unwrap();
        for (read, write) in [(read, write), (left.into(), right.into())] {
            let mut reader = Transport::reader(read, patience(5000, Vec::new())).unwrap();
            let mut writer = Transport::writer(write, patience(5000, Vec::new())).unwrap();
            let sent: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
            let copy = sent.clone();
            let writing = std::thread::spawn(move || writer.write_both(&copy[..64], &copy[64..]).unwrap());
            let mut received = Vec::new();
            reader.read_to_end(&mut received).unwrap();
            writing.join().unwrap();
            assert!(received == sent);
        }
    }

    #[test]
    fn a_silent_peer_is_left() {
        let (read, write) = pipe();
        let mut reader = Transport::reader(read, patience(30, Vec::new())).unwrap();
        assert_eq!(reader.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut writer = Transport::writer(write, patience(30, Vec::new())).unwrap();
        let error = writer.write_all(&vec![0; 4 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn cancelling_ends_waiting() {
        let (read, _write) = pipe();
        let cancel = Cancel::new().unwrap();
        let mut reader = Transport::reader(read, patience(60_000, vec![cancel.clone()])).unwrap();
        let waiting = std::thread::spawn(move || reader.read(&mut [0; 8]).unwrap_err());
        // Most often it waits by then; before that it must come to the same.
        std::thread::sleep(Duration::from_millis(20));
        cancel.cancel();
        let error = explain(ErrorKind::Read, "x", waiting.join().unwrap());
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_broken_pipe_is_an_error_and_no_signal() {
        let (read, write) = pipe();
        let mut writer = Transport::writer(write, patience(1000, Vec::new())).unwrap();
        drop(read);
        assert_eq!(writer.write(&[1]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_mode_of_the_given_pipe_stays() {
        let (read, _write) = pipe();
        let shared = read.try_clone().unwrap();
        let _reader = Transport::reader(read, patience(1000, Vec::new())).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&shared, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
    }
}
