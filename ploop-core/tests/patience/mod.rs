//! Waiting for what happens by itself, in another process or thread.
//!
//! A test never sleeps and then believes that something must have begun: it names what it waits for and looks. A wait
//! that ends early costs nothing, so the limit is for hangs alone: far above what a slow machine under load takes.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::panic,
    reason = "a test fails by panicking; not every test uses all of it"
)]

use std::time::{Duration, Instant};

/// What takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(3);

/// Whether it becomes so, given that patience.
pub fn becomes(mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

/// Waits until it is so; a test that waits in vain has failed.
#[track_caller]
pub fn wait_until(what: &str, is_so: impl FnMut() -> bool) {
    assert!(becomes(is_so), "waited in vain until {what}");
}

/// Whether a process runs: a dead one that nobody has waited for does not.
pub fn is_running(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = status.rsplit(')').next().and_then(|rest| rest.trim().chars().next());
    state.is_some_and(|state| state != 'Z')
}
