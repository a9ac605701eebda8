//! How long a snapshot of a disk that is written to holds its guest, and how long the command takes: disks of 10 GiB and
//! of 10 TiB, a hundred snapshots each (fewer on a busy host), under random writes of 4 KiB.
//!
//! The writes stay in a small part of the disk, so that a hundred deltas take some GiB; the hold depends on what is in
//! flight, not on where it goes.

use crate::device::Load;
use crate::report::{Reporter, median, percentile};
use crate::work::{Failure, Mounted, Work, have, rounds};
use serde_json::json;
use std::time::{Duration, Instant};

const SNAPSHOTS_MAX: usize = 100;
/// No snapshot of a disk is made after it.
const MEASURING_MAX: Duration = Duration::from_secs(35);
/// Between two snapshots the load writes.
const PAUSE: Duration = Duration::from_millis(50);

struct Figures {
    held_ms: Vec<f64>,
    drain_ms: Vec<f64>,
    command_ms: Vec<f64>,
    writes_per_second: f64,
}

fn measure(work: &Work, name: &str, size: &str) -> Result<Figures, Failure> {
    let disk = Mounted::bare(work, name, size)?;
    let load = Load::start(&disk.device, &["--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=32m"])?;
    let (mut held_ms, mut drain_ms, mut command_ms) = (Vec::new(), Vec::new(), Vec::new());
    for _ in rounds(SNAPSHOTS_MAX, MEASURING_MAX) {
        std::thread::sleep(PAUSE);
        let begun = Instant::now();
        let made = disk.snapshot()?;
        command_ms.push(begun.elapsed().as_secs_f64() * 1e3);
        held_ms.push(made["held_ms"].as_f64().ok_or("a snapshot that does not tell how long it held")?);
        drain_ms.push(made["drain_ms"].as_f64().ok_or("a snapshot that does not tell how long it waited")?);
    }
    let report = load.end()?;
    let writes_per_second = report["jobs"][0]["write"]["iops"].as_f64().unwrap_or(f64::NAN);
    let folder = disk.folder().to_path_buf();
    drop(disk);
    std::fs::remove_dir_all(folder)?;
    Ok(Figures { held_ms, drain_ms, command_ms, writes_per_second })
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    if !have("fio") {
        eprintln!("SKIP: fio is not installed");
        return Ok(());
    }
    let work = Work::new()?;
    work.need_bytes(6 << 30)?;
    let mut medians = Vec::new();
    for (name, size) in [("small", "10G"), ("large", "10T")] {
        let found = measure(&work, name, size)?;
        reporter.figure(
            "snapshot_hold",
            json!({
                "disk": size, "snapshots": found.held_ms.len(), "writes_per_second": found.writes_per_second,
                "held_median_ms": median(&found.held_ms), "held_p99_ms": percentile(&found.held_ms, 99),
                "wanted_held_p99_ms_max": 10, "drain_p99_ms": percentile(&found.drain_ms, 99),
                "command_median_ms": median(&found.command_ms), "command_p99_ms": percentile(&found.command_ms, 99),
                "wanted_command_ms_max": 100,
            }),
        );
        medians.push((median(&found.held_ms), median(&found.command_ms)));
    }
    if let [small, large] = medians[..] {
        reporter.figure(
            "snapshot_hold_large_to_small",
            json!({ "held_ratio": large.0 / small.0, "command_ratio": large.1 / small.1 }),
        );
    }
    Ok(())
}
