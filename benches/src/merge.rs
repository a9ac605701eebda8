//! A snapshot with a delta of 1 GiB on it is deleted while the disk runs. First with a quiet guest, beside a plain copy
//! of the same file with a sync; then under random writes of 4 KiB at a fixed rate, whose 99th percentile is compared
//! with that of the same load alone. A merge lasts for some hundreds of these writes only: several are taken together, each
//! with the load alone just before it.

use crate::device::{Load, fill};
use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, drop_caches, have, rounds, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const SIZE: &str = "1G";
const ROUNDS_MAX: usize = 3;
/// The guest: writes per second, and how long they are measured alone, each time.
const GUEST: [&str; 6] = [
    "--rw=randwrite",
    "--bs=4k",
    "--iodepth=1",
    "--rate_iops=100",
    "--rate_process=poisson",
    // With the number of writes for each time they took.
    "--output-format=json+",
];
const ALONE: Duration = Duration::from_secs(5);
const ROUNDS_UNDER_LOAD_MAX: usize = 5;
/// No round is begun after it, of either kind.
const MEASURING_MAX: Duration = Duration::from_secs(30);

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

/// How often a write took how long, in nanoseconds.
#[derive(Default)]
struct Times(BTreeMap<u64, u64>);

impl Times {
    fn add(&mut self, report: &Value) -> Result<(), Failure> {
        let bins = report["jobs"][0]["write"]["clat_ns"]["bins"].as_object();
        for (time, count) in bins.ok_or("fio reported no times")? {
            *self.0.entry(time.parse()?).or_default() += count.as_u64().unwrap_or(0);
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// What so many of a hundred do not exceed, in milliseconds; NaN of nothing.
    fn percentile_ms(&self, percent: u64) -> f64 {
        let mut left = (self.count() * percent).div_ceil(100);
        for (time, count) in &self.0 {
            if *count >= left {
                return Duration::from_nanos(*time).as_secs_f64() * 1e3;
            }
            left -= count;
        }
        f64::NAN
    }
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
    for _ in rounds(ROUNDS_MAX, MEASURING_MAX) {
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
            "merged_bytes": bytes, "rounds": merges.len(), "merge_seconds": median(&merges),
            "copy_and_sync_seconds": median(&copies), "ratio": median(&copies) / median(&merges),
            "wanted_ratio_min": 0.5,
        }),
    );

    let (mut alone, mut during, mut seconds, mut held_ms) =
        (Times::default(), Times::default(), Vec::new(), Vec::new());
    let mut last = Value::Null;
    for _ in rounds(ROUNDS_UNDER_LOAD_MAX, MEASURING_MAX) {
        let snapshot = prepare(&disk)?;
        // On a disk whose every cluster is in the top, as it is during the merge.
        let load = Load::start(&disk.device, &GUEST)?;
        std::thread::sleep(ALONE);
        alone.add(&load.end()?)?;
        let load = Load::start(&disk.device, &GUEST)?;
        let merged = delete(&work, &disk, &snapshot);
        during.add(&load.end()?)?;
        let (took, report) = merged?;
        seconds.push(took);
        held_ms.push(report["held_ms"].as_f64().unwrap_or(f64::NAN));
        last = report;
    }
    let (alone_ms, during_ms) = (alone.percentile_ms(99), during.percentile_ms(99));
    reporter.figure(
        "merge_under_load",
        json!({
            "rounds": seconds.len(), "writes": during.count(), "writes_alone": alone.count(),
            "merge_seconds": median(&seconds), "merged_bytes": last["merged_bytes"], "passes": last["passes"],
            "held_ms": median(&held_ms), "held_max_ms": held_ms.iter().copied().fold(0.0, f64::max),
            "guest_write_median_ms": during.percentile_ms(50), "guest_write_median_alone_ms": alone.percentile_ms(50),
            "guest_write_p99_ms": during_ms, "guest_write_p99_alone_ms": alone_ms,
            "p99_ratio": during_ms / alone_ms, "wanted_p99_ratio_max": 3.0,
        }),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Times;
    use serde_json::json;

    #[test]
    fn times_of_several_loads_are_taken_together() {
        let report = |bins| json!({ "jobs": [{ "write": { "clat_ns": { "bins": bins } } }] });
        let mut times = Times::default();
        assert!(times.percentile_ms(99).is_nan());
        times.add(&report(json!({ "1000000": 98 }))).unwrap();
        times.add(&report(json!({ "1000000": 1, "9000000": 1 }))).unwrap();
        assert_eq!((times.count(), times.percentile_ms(50)), (100, 1.0));
        assert_eq!((times.percentile_ms(99), times.percentile_ms(100)), (1.0, 9.0));
        assert!(times.add(&json!({})).is_err());
    }
}
