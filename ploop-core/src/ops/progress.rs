//! How a long operation tells where it is, and how it is slowed down or cancelled.
//!
//! The library calls [`Progress`] at points where stopping leaves nothing half done; the command, or the server on
//! behalf of a command, implements it with bars, JSON events, a rate limit, or not at all ([`Silent`]).

use crate::error::Result;

/// Watches one long operation. Methods are called from the thread that runs it.
pub trait Progress: Send + Sync {
    /// A phase begins: a short name for people ("check entries", "move clusters") and the bytes it will go through,
    /// 0 if unknown. Phases follow each other and do not nest.
    fn begin(&self, phase: &str, total_bytes: u64);

    /// This many more bytes of the phase are done. May sleep, to keep a rate limit.
    ///
    /// Fails with `Cancelled` when the operation shall stop here; the caller unwinds to a state that is valid and from
    /// which the same command goes on.
    fn advance(&self, bytes: u64) -> Result<()>;

    /// The phase has ended well.
    fn end(&self) {}
}

/// Shows nothing, limits nothing, never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}

    fn advance(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }
}
