//! Signals that ask a command to end, held back while ending at once would leave something behind.

use nix::sys::signal::{SigSet, Signal};
use ploop_core::{Error, ErrorKind, Result};

/// Holds back SIGINT, SIGTERM and SIGHUP in this thread and those it starts from now on; programs that are started get
/// them as usual. Returns the set, for a thread that waits for them.
pub(crate) fn hold() -> Result<SigSet> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals
        .thread_block()
        .map_err(|errno| Error::io(ErrorKind::System, "hold back signals", errno.into()))?;
    Ok(signals)
}
