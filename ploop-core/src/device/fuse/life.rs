//! One server as its keeper sees it: how it ended, and what it hands over and tells while it runs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::Pid;

use super::held::{Came, Holdings, Incoming};
use super::notes::Notes;
use super::survivor::Survivor;
use crate::device::control::Connection;
use crate::error::{ErrorKind, Result};

/// How often the server's life is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A server that gives no sign of life for this long is said to hang.
pub const SILENCE_MAX: Duration = Duration::from_secs(4);

/// Takes what is worth telling, from any thread.
pub type Log<'a> = &'a (dyn Fn(&str) + Sync);

/// How a server has ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) told: String,
    /// Its exit code, if it had one.
    code: Option<u8>,
}

impl Ended {
    /// With a clean close of the image.
    pub(super) fn is_clean(&self) -> bool {
        self.code == Some(0)
    }

    /// With the exit code of that kind of error.
    pub(super) fn is_because_of(&self, kind: ErrorKind) -> bool {
        self.code == Some(kind.exit_code())
    }
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        Self { told: status.to_string(), code }
    }
}

/// The process of a server.
pub(super) enum Process {
    /// A child.
    Child(Child),
    /// A server whose keeper had died, and that has started this one: what its end can be waited for with.
    Adopted(OwnedFd),
}

impl Process {
    /// Waits for the end; `forget` is called before its number may become another's.
    pub(super) fn wait(
        &mut self,
        pid: Option<Pid>,
        survivor: &Survivor,
        forget: impl FnOnce(),
    ) -> io::Result<Ended> {
        match self {
            Self::Child(child) => {
                if let Some(pid) = pid {
                    use nix::sys::wait::{Id, WaitPidFlag, waitid};
                    // Not reaped yet: the number stays its own until nobody sends signals to it any more.
                    while let Err(Errno::EINTR) =
                        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
                    {
                    }
                }
                forget();
                child.wait().map(Ended::from)
            }
            Self::Adopted(process) => {
                let mut descriptors = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
                while let Err(Errno::EINTR) = nix::poll::poll(&mut descriptors, PollTimeout::NONE) {}
                forget();
                // Not a child: how it ended it has said itself.
                let is_closed = survivor.is_closed().unwrap_or(false);
                Ok(Ended { told: "it was another keeper's child".into(), code: is_closed.then_some(0) })
            }
        }
    }
}

/// Takes over what a server hands to its keeper.
pub(super) struct Collector<'a> {
    pub(super) from: &'a Connection,
    pub(super) holdings: &'a Holdings,
    pub(super) survivor: &'a Survivor,
}

impl Collector<'_> {
    /// Until the server ends. Meanwhile it says when the server gives no sign of life.
    pub(super) fn run(&self, notes: &Notes, log: Log<'_>) -> Result<()> {
        let mut incoming = Incoming::default();
        let mut beats = self.survivor.beats()?;
        let (mut since, mut has_beaten, mut is_silent) = (Instant::now(), false, false);
        loop {
            match incoming.receive(self.from, Some(LOOK)) {
                Ok(Came::Files(files)) => self.holdings.add(files, self.survivor.files()?),
                Ok(Came::Done) => self.holdings.forget_before(self.survivor.files()?),
                Ok(Came::Nothing) => {}
                Ok(Came::End) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Busy => {}
                Err(error) => return Err(error),
            }
            let now = self.survivor.beats()?;
            if now != beats {
                (beats, since, has_beaten) = (now, Instant::now(), true);
                if is_silent {
                    log("the server runs again");
                }
                is_silent = false;
                notes.trouble(None);
            } else if has_beaten && since.elapsed() >= SILENCE_MAX && !is_silent {
                is_silent = true;
                let what = "the server hangs: it was stopped, or waits for something on the host";
                log(what);
                notes.trouble(Some(what.into()));
            }
        }
    }
}
