//! What an idle pass over a large disk costs: nothing dirty, 16 TiB, one thread.

use crate::report::{Reporter, median};
use crate::work::Failure;
use ploop_core::tracker::Tracker;
use serde_json::json;
use std::time::Instant;

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let disk_bytes = 16u64 << 40;
    let tracker = Tracker::new(disk_bytes)?;
    let mut pass_ms = Vec::new();
    for _ in 0..21 {
        let started = Instant::now();
        if tracker.take(0, u64::MAX).is_some() {
            return Err("an untouched tracker lent something".into());
        }
        pass_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    reporter.figure("idle_pass", json!({ "disk_bytes": disk_bytes, "pass_ms": median(&pass_ms) }));
    Ok(())
}
