//! How a command ends what a server does for it: a pipe whose one end only the command holds.
//!
//! The command sends the other end along with its request. When the command is told to stop it lets its end go, and
//! when it dies the kernel does: either way the server sees the hang-up, cancels, unwinds, and still answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcopy::transport::Cancel;
use ploop_core::{Error, ErrorKind, Result};

/// The end for the server. The other one stays in this process until `cancel` is raised or the process ends.
pub(crate) fn hold(cancel: &Cancel) -> Result<OwnedFd> {
    let (leash, own_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
        .map_err(|errno| Error::io(ErrorKind::System, "make a pipe", errno.into()))?;
    let cancel = cancel.clone();
    let hold = move || {
        cancel.wait();
        drop(own_end);
    };
    std::thread::Builder::new()
        .name("leash".into())
        .spawn(hold)
        .map(|_| leash)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that holds the leash", cause))
}

/// Cancels when the other end of the leash is closed. The thread ends with the command, at the latest.
pub(crate) fn watch(leash: OwnedFd, cancel: Cancel) -> Result<()> {
    let watch = move || {
        wait_for_hangup(leash.as_fd());
        cancel.cancel();
    };
    std::thread::Builder::new()
        .name("leash".into())
        .spawn(watch)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that watches the command", cause))
}

fn wait_for_hangup(pipe: BorrowedFd<'_>) {
    loop {
        let mut descriptors = [PollFd::new(pipe, PollFlags::empty())];
        match poll(&mut descriptors, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR)
                if descriptors[0].revents().unwrap_or(PollFlags::empty()).is_empty() => {}
            // Hung up, or unusable: either way there is no leash any more.
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn becomes_cancelled(cancel: &Cancel) -> bool {
        (0..30_000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            cancel.is_cancelled()
        })
    }

    #[test]
    fn a_cut_leash_cancels() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let cancel = Cancel::new().unwrap();
        watch(read, cancel.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!cancel.is_cancelled());
        drop(write);
        assert!(becomes_cancelled(&cancel));
    }

    #[test]
    fn cancelling_cuts_the_leash() {
        let (command, server) = (Cancel::new().unwrap(), Cancel::new().unwrap());
        watch(hold(&command).unwrap(), server.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!server.is_cancelled());
        command.cancel();
        assert!(becomes_cancelled(&server));
    }
}
