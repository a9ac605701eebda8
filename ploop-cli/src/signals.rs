//! Signals that ask a command to end, caught while ending at once would leave something behind.
//!
//! Caught, not blocked: a mask would be inherited by the programs that are started, and a service that a freeze or thaw
//! command starts could not be stopped any more. A handler does not outlive `exec`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pcopy::transport::Cancel;
use ploop_core::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A signal so long after the first one is no double press.
const INSISTING: Duration = Duration::from_secs(5);

/// From now on SIGINT, SIGTERM and SIGHUP do not end this program; those that it starts get them as usual.
pub(crate) fn hold() -> Result<()> {
    catch().map(drop)
}

/// Whether one of them has come since they cancel.
pub(crate) fn has_come() -> bool {
    HAS_COME.load(Ordering::SeqCst)
}

static HAS_COME: AtomicBool = AtomicBool::new(false);

fn catch() -> Result<Signals> {
    let cannot = |cause: io::Error| Error::io(ErrorKind::System, "catch signals", cause);
    Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(cannot)
}

/// SIGINT, SIGTERM and SIGHUP cancel a long operation, which then ends where nothing is half done. SIGINT or SIGTERM
/// after five more seconds ends the command at once: a receiver or a terminal may hold it up.
pub(crate) fn cancel(cancel: &Cancel) -> Result<()> {
    let mut signals = catch()?;
    let cancel = cancel.clone();
    let wait = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            HAS_COME.store(true, Ordering::SeqCst);
            cancel.cancel();
            if first.get_or_insert_with(Instant::now).elapsed() >= INSISTING && signal != SIGHUP {
                // What it does is undone by others, as if it had been killed.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the signal thread", cause))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn programs_that_are_started_get_signals_as_usual() {
        hold().unwrap();
        let said = std::process::Command::new("grep")
            .args(["-E", "^Sig(Blk|Ign)", "/proc/self/status"])
            .output()
            .unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        for line in said.lines() {
            let (name, mask) = line.split_once(":\t").unwrap();
            let ours = [SIGHUP, SIGINT, SIGTERM].iter().fold(0, |mask, signal| mask | 1_u64 << (signal - 1));
            assert_eq!(u64::from_str_radix(mask, 16).unwrap() & ours, 0, "{name}");
        }
        assert_eq!(said.lines().count(), 2);
    }
}
