//! A snapshot with a delta of 1 GiB on it is deleted while the disk runs. First with a quiet guest, beside a plain copy
//! of the same file with a sync; then under random writes of 4 KiB at a fixed rate, whose 99th percentile is compared
//! with that of the same load alone.

use crate::device::{Load, fill};
use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, drop_caches, have, run};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const SIZE: &str = "1G";
const ROUNDS: usize = 3;
/// The guest: writes per second, and how long they are measured alone.
const GUEST: [&str; 5] =
    ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--rate_iops=100", "--rate_process=poisson"];
const ALONE: Duration = Duration::from_secs(8);

/// The file of the current state: the newest image.
fn top(disk: &Mounted<'_>) -> Result<PathBuf, Failure> {
    let images = std::fs::read_dir(disk.folder())?.filter_map(Result::ok).map(|entry| entry.path());
    let images =
        images.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("root")));
    let newest = images.max_by_key(|path| std::fs::metadata(path).and_then(|data| data.modified()).ok());
    newest.ok_or_else(|| "the disk has no image".into())
}

/// A snapshot, and 1 GiB written since; the name of the snapshot.
fn prepare(disk: &Mounted<'_>) -> Result<String, Failure> {
    let made = disk.snapshot()?;
    fill(&disk.device)?;
    drop_caches();
    Ok(made["snapshot"].as_str().ok_or("a snapshot without a name")?.to_owned())
}

/// Deletes it: seconds, and the report.
fn delete(work: &Work, disk: &Mounted<'_>, snapshot: &str) -> Result<(f64, Value), Failure> {
    let begun = Instant::now();
    let text = run(work.ploop().args(["--json", "snapshot-delete", "-u", snapshot]).arg(&disk.descriptor))?;
    Ok((begun.elapsed().as_secs_f64(), serde_json::from_str(&text)?))
}

/// The 99th percentile of the completion times, in milliseconds.
fn p99_ms(report: &Value) -> Result<f64, Failure> {
    let write = &report["jobs"][0]["write"];
    let nanoseconds = write["clat_ns"]["percentile"]["99.000000"].as_f64();
    Ok(nanoseconds.ok_or("fio reported no percentiles")? / 1e6)
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    if !have("fio") {
        eprintln!("SKIP: fio is not installed");
        return Ok(());
    }
    let work = Work::new()?;
    work.need_bytes(5 << 30)?;
    let disk = Mounted::bare(&work, "merge", SIZE)?;
    fill(&disk.device)?;
    let (mut merges, mut copies, mut bytes) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..ROUNDS {
        let snapshot = prepare(&disk)?;
        let copy = work.path("copy");
        let begun = Instant::now();
        run(Command::new("cp").args(["--sparse=never", "--reflink=never"]).arg(top(&disk)?).arg(&copy))?;
        run(Command::new("sync").arg(&copy))?;
        copies.push(begun.elapsed().as_secs_f64());
        std::fs::remove_file(copy)?;
        drop_caches();
        let (seconds, report) = delete(&work, &disk, &snapshot)?;
        merges.push(seconds);
        bytes = report["merged_bytes"].as_f64().unwrap_or(0.0);
    }
    reporter.figure(
        "merge",
        json!({
            "merged_bytes": bytes, "rounds": ROUNDS, "merge_seconds": median(&merges),
            "copy_and_sync_seconds": median(&copies), "ratio": median(&copies) / median(&merges),
            "wanted_ratio_min": 0.5,
        }),
    );

    let snapshot = prepare(&disk)?;
    // On a disk whose every cluster is in the top, as it is during the merge.
    let load = Load::start(&disk.device, &GUEST)?;
    std::thread::sleep(ALONE);
    let alone = load.end()?;
    let load = Load::start(&disk.device, &GUEST)?;
    let merged = delete(&work, &disk, &snapshot);
    let during = load.end()?;
    let (seconds, report) = merged?;
    let (alone_ms, during_ms) = (p99_ms(&alone)?, p99_ms(&during)?);
    reporter.figure(
        "merge_under_load",
        json!({
            "writes_per_second": during["jobs"][0]["write"]["iops"], "merge_seconds": seconds,
            "merged_bytes": report["merged_bytes"], "passes": report["passes"], "held_ms": report["held_ms"],
            "guest_write_p99_ms": during_ms, "guest_write_p99_alone_ms": alone_ms,
            "p99_ratio": during_ms / alone_ms, "wanted_p99_ratio_max": 3.0,
        }),
    );
    Ok(())
}
