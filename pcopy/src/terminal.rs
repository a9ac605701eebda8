//! The terminal, lent to a program that may ask something: as a shell does it.
//!
//! Only the group of processes in the foreground may read the terminal or turn its echo off; any other is stopped by the
//! kernel when it tries. A [`Terminal`] makes another group the one in the foreground, if this program's was, until it is
//! taken back. Meanwhile Ctrl-C reaches that group alone, and Ctrl-Z stops it; then this program hands the terminal back
//! and stops, too, so that the shell sees a stopped job, and both go on together.

use std::fs::{File, OpenOptions};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::pass;

/// How long a stop of this program may take to reach all its threads.
const UNTIL_STOPPED: Duration = Duration::from_millis(50);

/// The controlling terminal of this process, which another group may be using.
#[derive(Debug)]
pub(crate) struct Terminal {
    lent: Arc<Mutex<Lent>>,
}

struct Lent {
    device: File,
    /// How the terminal was set before.
    settings: Option<Termios>,
    group: Pid,
    /// It has the terminal now, or gets it when we come to the foreground.
    is_lent: bool,
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Lent").field("group", &self.group).field("is_lent", &self.is_lent).finish()
    }
}

impl Lent {
    /// Whether this program is the one in the foreground.
    fn is_ours(&self) -> bool {
        tcgetpgrp(&self.device) == Ok(getpgrp())
    }

    fn hand_over(&self) {
        if self.is_ours() {
            // Refused when the group has ended: then nobody needs it.
            let _ = tcsetpgrp(&self.device, self.group);
        }
        // It may have been stopped at its first look.
        let _ = killpg(self.group, Signal::SIGCONT);
    }

    fn fetch(&self) {
        if tcgetpgrp(&self.device) != Ok(self.group) {
            return;
        }
        // Who is not in the foreground is stopped for this, unless it blocks the signal.
        let mut stopping = SigSet::empty();
        stopping.add(Signal::SIGTTOU);
        let before = stopping.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
        let _ = tcsetpgrp(&self.device, getpgrp());
        if let Some(settings) = &self.settings {
            // What was ended at a prompt may have left the echo off.
            let _ = tcsetattr(&self.device, SetArg::TCSADRAIN, settings);
        }
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
    }
}

fn lock(lent: &Mutex<Lent>) -> MutexGuard<'_, Lent> {
    lent.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Terminal {
    /// Lends the terminal to the group, which a child of ours leads. `None` when there is no terminal: what wants to ask
    /// something then fails, which says more than an endless wait.
    pub(crate) fn give_to(group: Pid) -> Option<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
        let settings = tcgetattr(&device).ok();
        let lent = Arc::new(Mutex::new(Lent { device, settings, group, is_lent: true }));
        let watched = Arc::clone(&lent);
        pass::spawn("peer-stops", move || follow(group, &watched)).ok()?;
        lock(&lent).hand_over();
        Some(Self { lent })
    }

    /// It is ours again. Whether it was lent until now.
    pub(crate) fn take_back(&self) -> bool {
        let mut lent = lock(&self.lent);
        lent.fetch();
        std::mem::replace(&mut lent.is_lent, false)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.take_back();
    }
}

/// Stops when the leader of the group is stopped at the terminal, until it ends. It can be waited for afterwards.
fn follow(leader: Pid, lent: &Mutex<Lent>) {
    loop {
        let how = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(leader), how) {
            Ok(WaitStatus::Stopped(_, signal)) => {
                // The same stop is not to be seen again.
                let _ = waitid(Id::Pid(leader), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG);
                let terminal = lock(lent);
                if !terminal.is_lent {
                    return;
                }
                let at_terminal = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];
                if !at_terminal.contains(&signal) {
                    continue;
                }
                terminal.fetch();
                // The whole job: it goes on behind this line.
                let _ = kill(Pid::from_raw(0), signal);
                // Another thread may take the signal a moment later than this line.
                std::thread::sleep(UNTIL_STOPPED);
                terminal.hand_over();
            }
            Err(Errno::EINTR) => {}
            _ => return,
        }
    }
}
