//! The control socket of a server: one JSON message per packet, descriptors beside it.
//!
//! The socket is a Unix `SOCK_SEQPACKET`, mode 0600, in a folder of mode 0700; who connects must be the server's user
//! or root. A request is `{"version": 1, "verb": "...", "arguments": ...}`, at most 64 KiB, with at most
//! [`DESCRIPTORS_MAX`] descriptors; the answer is `{"ok": ...}` or `{"error": {...}}`. A request names no paths to be
//! opened. One connection may carry several requests, one after the other.
//!
//! Each connection has its thread, and there are at most [`CONNECTIONS_MAX`] of them. A handler is given the
//! [`Connection`], too: a long operation sends events over it and asks whether the peer is still there; the peer's end
//! is the order to stop. The last packet is always the answer.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fuse::sys;
use super::runtime::Failure;
use crate::error::{Error, ErrorKind, Result};

/// Version of the requests and answers.
pub const VERSION: u32 = 1;
/// The largest message in either direction, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Descriptors beside one message.
pub const DESCRIPTORS_MAX: usize = 8;
/// Connections served at the same time.
pub const CONNECTIONS_MAX: usize = 16;
/// A connection on which nothing is asked for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// A peer that does not take an answer for this long is given up.
const SEND_MAX: Duration = Duration::from_secs(10);
/// Of what the kernel holds for a peer that does not read, the part that messages may take that can be missed. (It holds
/// some 200 KiB in all.)
const EVENTS_UNSENT_MAX: usize = 64 * 1024;

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Message {
    /// What was said.
    pub body: Value,
    /// Descriptors, close-on-exec, in the order sent.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of a control connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

fn failed(operation: &str, cause: impl Into<io::Error>) -> Error {
    Error::io(ErrorKind::System, operation, cause.into())
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// Connects to the server whose socket is at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let connect = || -> nix::Result<OwnedFd> {
            let socket = new_socket()?;
            socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        };
        connect().map(|socket| Self { socket }).map_err(|errno| {
            Error::io(ErrorKind::Device, "connect to the server of the disk", errno.into()).at_path(path)
        })
    }

    /// Two connected ends, for tests and for handlers called without a socket.
    pub fn pair() -> Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map(|(one, other)| (Self { socket: one }, Self { socket: other }))
            .map_err(|errno| failed("make a connection", errno))
    }

    /// This end, which was made elsewhere: a `SOCK_SEQPACKET`.
    pub fn from_socket(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// This end as a descriptor, to be handed to another process.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Whether [`receive`](Self::receive) would return at once: there is a message, or nobody is there any more.
    pub fn has_message(&self) -> bool {
        self.wait_for(PollFlags::POLLIN, Some(Duration::ZERO)).is_ok_and(|events| !events.is_empty())
    }

    /// Sends a message that may be missed; false when it was dropped since the peer has not read what was sent before.
    /// Never waits, and leaves room for the answer.
    pub fn send_unless_full(&self, body: &impl Serialize) -> Result<bool> {
        let unsent = crate::io::sys::unsent_bytes(self.socket.as_fd())
            .map_err(|cause| failed("look at the control connection", cause))?;
        if unsent >= EVENTS_UNSENT_MAX {
            return if self.is_closed() {
                Err(failed("send a control message", io::ErrorKind::BrokenPipe))
            } else {
                Ok(false)
            };
        }
        self.send(body, &[]).map(|()| true)
    }

    fn wait_for(&self, what: PollFlags, time_max: Option<Duration>) -> Result<PollFlags> {
        let deadline = time_max.map(|time| Instant::now() + time);
        loop {
            let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
            };
            let mut descriptors = [PollFd::new(self.socket.as_fd(), what)];
            match nix::poll::poll(&mut descriptors, timeout) {
                Ok(_) => return Ok(descriptors[0].revents().unwrap_or(PollFlags::empty())),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(failed("wait for the control connection", errno)),
            }
        }
    }

    /// Sends one message with descriptors beside it.
    pub fn send(&self, body: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = serde_json::to_vec(body).map_err(|cause| failed("write a control message", cause))?;
        if bytes.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(Error::new(ErrorKind::Parameter, "a control message is too large"));
        }
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [socket::ControlMessage::ScmRights(&numbers)];
        let beside = if numbers.is_empty() { &[][..] } else { &rights[..] };
        let deadline = Instant::now() + SEND_MAX;
        loop {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let parts = [IoSlice::new(&bytes)];
            match socket::sendmsg::<()>(self.socket.as_raw_fd(), &parts, beside, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Error::new(ErrorKind::System, "the peer takes no control messages"));
                    }
                    self.wait_for(PollFlags::POLLOUT, Some(left))?;
                }
                Err(errno) => return Err(failed("send a control message", errno)),
            }
        }
    }

    /// The next message; `None` when the peer has closed its end. [`ErrorKind::Busy`] when none comes in `time_max`.
    pub fn receive(&self, time_max: Option<Duration>) -> Result<Option<Message>> {
        if self.wait_for(PollFlags::POLLIN, time_max)?.is_empty() {
            return Err(Error::new(ErrorKind::Busy, "no control message came in time"));
        }
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS_MAX]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = loop {
            let received =
                socket::recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags);
            match received {
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(failed("receive a control message", errno)),
                Ok(received) => break received,
            }
        };
        // Everything that came is owned before anything can fail: no descriptor leaks.
        let mut descriptors = Vec::new();
        let beside = received.cmsgs().map_err(|errno| failed("receive descriptors", errno))?;
        for message in beside {
            if let socket::ControlMessageOwned::ScmRights(numbers) = message {
                descriptors.extend(numbers.into_iter().map(sys::own_received));
            }
        }
        let (length, flags) = (received.bytes, received.flags);
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(Error::new(ErrorKind::Parameter, "a control message is too large"));
        }
        if length == 0 {
            return Ok(None);
        }
        let body = serde_json::from_slice(&bytes[..length])
            .map_err(|cause| Error::io(ErrorKind::Parameter, "read a control message", cause.into()))?;
        Ok(Some(Message { body, descriptors }))
    }

    /// Whether the peer has closed its end. A message that waits to be received counts as life.
    pub fn is_closed(&self) -> bool {
        self.wait_for(PollFlags::empty(), Some(Duration::ZERO))
            .is_ok_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    /// Waits until the peer closes its end; false when `time_max` has passed first.
    pub fn wait_closed(&self, time_max: Duration) -> bool {
        self.wait_for(PollFlags::empty(), Some(time_max))
            .is_ok_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    /// Takes no more from the peer: what it has sent before is received, then the end.
    pub fn end_receiving(&self) {
        // Fails when the peer is gone, which is the end, too.
        let _ = socket::shutdown(self.socket.as_raw_fd(), socket::Shutdown::Read);
    }

    /// The end behind a descriptor that came from the parent process.
    pub fn inherited(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The descriptor, to be passed on.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// A second handle of this end.
    pub fn try_clone(&self) -> Result<Self> {
        self.socket
            .try_clone()
            .map(|socket| Self { socket })
            .map_err(|cause| failed("share a control connection", cause))
    }

    /// The process and the user at the other end, as they were when they connected.
    pub fn peer(&self) -> Result<(i32, u32)> {
        socket::getsockopt(&self.socket, socket::sockopt::PeerCredentials)
            .map(|peer| (peer.pid(), peer.uid()))
            .map_err(|errno| failed("ask who is at the other end", errno))
    }

    /// Asks for `verb` and waits for its answer; what comes before the answer goes to `event`. Without `time_max` it
    /// waits as long as it takes.
    pub fn ask(
        &self,
        verb: &str,
        arguments: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        time_max: Option<Duration>,
        event: impl FnMut(Value),
    ) -> Result<Value> {
        self.request(verb, arguments, descriptors)?;
        self.answer(verb, time_max, event)
    }

    /// The first half of [`ask`](Self::ask), for a caller that must give up its own descriptors before it waits.
    pub fn request(
        &self,
        verb: &str,
        arguments: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let arguments = serde_json::to_value(arguments).map_err(|cause| failed("write a request", cause))?;
        self.send(&Request { version: VERSION, verb: verb.to_owned(), arguments }, descriptors)
    }

    /// The second half of [`ask`](Self::ask).
    pub fn answer(
        &self,
        verb: &str,
        time_max: Option<Duration>,
        mut event: impl FnMut(Value),
    ) -> Result<Value> {
        loop {
            let Some(message) = self.receive(time_max)? else {
                return Err(Error::new(ErrorKind::Device, format!("the server ended during \"{verb}\"")));
            };
            match serde_json::from_value(message.body.clone()) {
                Ok(Answer::Ok(value)) => return Ok(value),
                Ok(Answer::Error(failure)) => return Err(failure.into_error()),
                Err(_) => event(message.body),
            }
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    verb: String,
    #[serde(default)]
    arguments: Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Answer {
    Ok(Value),
    Error(Failure),
}

/// Serves one verb: the connection, the arguments, and the descriptors that came along.
pub type Handler = Box<dyn Fn(&Connection, Value, Vec<OwnedFd>) -> Result<Value> + Send + Sync>;

/// The verbs of a server.
#[derive(Default)]
pub struct Handlers(HashMap<&'static str, Handler>);

impl Handlers {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds, or replaces, what serves `verb`.
    #[must_use]
    pub fn with(
        mut self,
        verb: &'static str,
        handler: impl Fn(&Connection, Value, Vec<OwnedFd>) -> Result<Value> + Send + Sync + 'static,
    ) -> Self {
        self.0.insert(verb, Box::new(handler));
        self
    }
}

/// A control socket that is listened on. Dropping it ends that; handlers that run are not waited for, but their
/// connections are shut, which is their order to stop.
pub struct ControlServer {
    path: PathBuf,
    listener: Arc<OwnedFd>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    connections: Arc<Mutex<Vec<Weak<Connection>>>>,
    running: Arc<AtomicUsize>,
}

fn new_socket() -> nix::Result<OwnedFd> {
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

impl ControlServer {
    /// Listens at `path`, in a folder that only this user can enter. A socket left there by a dead server is replaced.
    pub fn start(path: &Path, handlers: Handlers) -> Result<Self> {
        Self::listen(path).and_then(|listener| Self::accept(path, listener, handlers))
    }

    /// As [`start`](Self::start); where the folder takes no socket the handlers come back, to be tried again.
    pub fn start_or_return(path: &Path, handlers: Handlers) -> std::result::Result<Self, Handlers> {
        match Self::listen(path) {
            Ok(listener) => Self::accept(path, listener, handlers).map_err(|_| Handlers::new()),
            Err(_) => Err(handlers),
        }
    }

    fn listen(path: &Path) -> Result<OwnedFd> {
        let listen = || -> io::Result<OwnedFd> {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = new_socket()?;
            socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            socket::listen(&socket, Backlog::new(16)?)?;
            Ok(socket)
        };
        listen().map_err(|cause| {
            Error::io(ErrorKind::System, "listen on the control socket", cause).at_path(path)
        })
    }

    fn accept(path: &Path, listener: OwnedFd, handlers: Handlers) -> Result<Self> {
        let listener = Arc::new(listener);
        let ended = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let running = Arc::new(AtomicUsize::new(0));
        let acceptor = Acceptor {
            listener: Arc::clone(&listener),
            handlers: Arc::new(handlers),
            ended: Arc::clone(&ended),
            connections: Arc::clone(&connections),
            running: Arc::clone(&running),
        };
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || acceptor.run())
            .map_err(|cause| failed("start the control thread", cause))?;
        Ok(Self { path: path.to_path_buf(), listener, ended, thread: Some(thread), connections, running })
    }

    /// Stops listening, shuts all connections but lets their handlers send their answer, and waits at most
    /// `time_max` for them.
    pub fn stop(mut self, time_max: Duration) {
        self.end_listening();
        let deadline = Instant::now() + time_max;
        while self.running.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end_listening(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.ended.store(true, Ordering::SeqCst);
        // Makes the accept of the other thread return.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        let _ = thread.join();
        let _ = std::fs::remove_file(&self.path);
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for connection in connections.iter().filter_map(Weak::upgrade) {
            // Only this direction: answers still go out.
            let _ = socket::shutdown(connection.socket.as_raw_fd(), socket::Shutdown::Read);
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.end_listening();
    }
}

struct Acceptor {
    listener: Arc<OwnedFd>,
    handlers: Arc<Handlers>,
    ended: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<Weak<Connection>>>>,
    running: Arc<AtomicUsize>,
}

impl Acceptor {
    fn run(self) {
        while !self.ended.load(Ordering::SeqCst) {
            match socket::accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(number) => self.admit(Connection { socket: sys::own_received(number) }),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::ECONNABORTED) => {}
                // Out of descriptors or memory: others may give some back.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Starts a thread for a peer that may be here. One that cannot be served is told so if that does not block.
    fn admit(&self, connection: Connection) {
        let own = nix::unistd::geteuid().as_raw();
        if !connection.peer().is_ok_and(|(_, user)| user == own || user == 0) {
            return;
        }
        if self.running.load(Ordering::SeqCst) >= CONNECTIONS_MAX {
            let error = Error::new(ErrorKind::Busy, "too many control connections are open");
            let _ = connection.send(&Answer::Error(Failure::of(&error)), &[]);
            return;
        }
        let connection = Arc::new(connection);
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain(|known| known.strong_count() > 0);
        connections.push(Arc::downgrade(&connection));
        drop(connections);
        let handlers = Arc::clone(&self.handlers);
        let running = Running::enter(&self.running);
        // A thread that cannot be started drops the connection, which the peer sees.
        let _ = std::thread::Builder::new().name("control-peer".into()).spawn(move || {
            let _running = running;
            serve(&connection, &handlers);
        });
    }
}

/// Counts a connection as long as it lives, also through a panic of its handler.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn enter(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers requests until the peer goes, says nothing for long, or breaks the rules.
fn serve(connection: &Connection, handlers: &Handlers) {
    loop {
        let message = match connection.receive(Some(IDLE_MAX)) {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(error) => {
                let _ = connection.send(&Answer::Error(Failure::of(&error)), &[]);
                return;
            }
        };
        let answer = match dispatch(connection, handlers, message) {
            Ok(value) => Answer::Ok(value),
            Err(error) => Answer::Error(Failure::of(&error)),
        };
        if connection.send(&answer, &[]).is_err() {
            return;
        }
    }
}

fn dispatch(connection: &Connection, handlers: &Handlers, message: Message) -> Result<Value> {
    let request: Request = serde_json::from_value(message.body)
        .map_err(|cause| Error::io(ErrorKind::Parameter, "read the request", cause.into()))?;
    if request.version != VERSION {
        let text = format!("the request has version {}, this server knows {VERSION}", request.version);
        return Err(Error::new(ErrorKind::Parameter, text).advise(
            "the server was started by another version of this program: use that one, or mount again",
        ));
    }
    match handlers.0.get(request.verb.as_str()) {
        Some(handler) => handler(connection, request.arguments, message.descriptors),
        None => Err(Error::new(ErrorKind::Parameter, "the server does not know this request")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn server(handlers: Handlers) -> (tempfile::TempDir, PathBuf, ControlServer) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let server = ControlServer::start(&path, handlers).unwrap();
        (folder, path, server)
    }

    const SOON: Option<Duration> = Some(Duration::from_secs(300));

    #[test]
    fn questions_are_answered_and_errors_keep_their_kind() {
        let handlers = Handlers::new()
            .with("double", |_, arguments, _| Ok(Value::from(arguments.as_u64().unwrap() * 2)))
            .with("fail", |_, _, _| Err(Error::new(ErrorKind::UnmountBusy, "in use").advise("wait")));
        let (_folder, path, _server) = server(handlers);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let connection = Connection::open(&path).unwrap();
        assert_eq!(connection.ask("double", &21, &[], SOON, |_| {}).unwrap(), Value::from(42));
        let error = connection.ask("fail", &(), &[], SOON, |_| {}).unwrap_err();
        assert_eq!((error.kind(), error.advice()), (ErrorKind::UnmountBusy, Some("wait")));
        let error = connection.ask("unheard of", &(), &[], SOON, |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter);
    }

    #[test]
    fn descriptors_travel_and_events_come_before_the_answer() {
        let handlers = Handlers::new().with("read", |connection, _, descriptors| {
            connection.send(&"working", &[])?;
            let mut text = String::new();
            let mut file = std::fs::File::from(descriptors.into_iter().next().unwrap());
            file.read_to_string(&mut text).unwrap();
            Ok(Value::from(text))
        });
        let (_folder, path, _server) = server(handlers);
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"through the pipe").unwrap();
        drop(writer);
        let mut events = Vec::new();
        let connection = Connection::open(&path).unwrap();
        let answer =
            connection.ask("read", &(), &[reader.as_fd()], SOON, |event| events.push(event)).unwrap();
        assert_eq!(answer, Value::from("through the pipe"));
        assert_eq!(events, [Value::from("working")]);
    }

    #[test]
    fn a_handler_learns_that_its_client_has_gone() {
        let (seen, saw) = std::sync::mpsc::channel();
        let handlers = Handlers::new().with("wait", move |connection, _, _| {
            assert!(!connection.is_closed());
            seen.send(()).unwrap();
            assert!(connection.wait_closed(Duration::from_secs(300)));
            seen.send(()).unwrap();
            Ok(Value::Null)
        });
        let (_folder, path, _server) = server(handlers);
        let connection = Connection::open(&path).unwrap();
        connection
            .send(&Request { version: VERSION, verb: "wait".into(), arguments: Value::Null }, &[])
            .unwrap();
        saw.recv_timeout(Duration::from_secs(300)).unwrap();
        drop(connection);
        saw.recv_timeout(Duration::from_secs(300)).unwrap();
    }

    #[test]
    fn nonsense_and_other_versions_are_refused() {
        let (_folder, path, _server) = server(Handlers::new());
        for body in [Value::from(7), serde_json::json!({"version": 2, "verb": "x"})] {
            let connection = Connection::open(&path).unwrap();
            connection.send(&body, &[]).unwrap();
            let answer = connection.receive(SOON).unwrap().unwrap().body;
            assert!(answer.get("error").is_some(), "{answer}");
        }
        let connection = Connection::open(&path).unwrap();
        assert!(connection.send(&"x".repeat(MESSAGE_BYTES_MAX), &[]).is_err());
    }

    #[test]
    fn connections_are_bounded_and_stopping_ends_them() {
        let (_folder, path, server) = server(Handlers::new().with("hello", |_, _, _| Ok(Value::Null)));
        let all: Vec<_> = (0..CONNECTIONS_MAX).map(|_| Connection::open(&path).unwrap()).collect();
        all.iter().for_each(|connection| {
            connection.ask("hello", &(), &[], SOON, |_| {}).unwrap();
        });
        let surplus = Connection::open(&path).unwrap();
        let told = surplus.receive(SOON).unwrap().unwrap().body;
        assert!(told.get("error").is_some());
        server.stop(Duration::from_secs(300));
        assert!(!path.exists());
        assert!(all.iter().all(|connection| connection.receive(SOON).unwrap().is_none()));
    }
}
