//! Scattered writes of 4 KiB right after a snapshot of a full disk, when almost every one copies a cluster up: ours at
//! clusters of 64 KiB, 256 KiB and 1 MiB, and qcow2 overlays in `qemu-storage-daemon` at 64 KiB and 1 MiB.
//!
//! Always the same number of writes at the same places, and a flush at the end, which counts.

use crate::device::{Export, fill, fio_json};
use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, have, rounds, run};
use serde_json::json;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const SIZE: &str = "1G";
const WRITES: u32 = 4096;
const ROUNDS_MAX: usize = 3;
/// For one disk: no round is begun after it.
const MEASURING_MAX: Duration = Duration::from_secs(10);

/// Writes per second, the last flush included.
fn scatter(device: &str) -> Result<f64, Failure> {
    let report = fio_json(&[
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--end_fsync=1",
        &format!("--io_size={}k", WRITES * 4),
        &format!("--filename={device}"),
    ])?;
    let job = &report["jobs"][0];
    let total = job["write"]["total_ios"].as_f64().ok_or("fio reported no writes")?;
    // Of the whole job; that of the writes ends before the flush.
    let job_ms = job["job_runtime"].as_f64().ok_or("fio reported no time")?;
    Ok(total / job_ms.max(1.0) * 1e3)
}

/// Median of the rates, and of how many rounds.
fn ours(work: &Work, cluster_kib: u32) -> Result<(f64, usize), Failure> {
    let disk = Mounted::bare_in_clusters(work, &format!("scatter-{cluster_kib}"), SIZE, cluster_kib)?;
    fill(&disk.device)?;
    let mut rates = Vec::new();
    for _ in rounds(ROUNDS_MAX, MEASURING_MAX) {
        disk.snapshot()?;
        rates.push(scatter(&disk.device)?);
    }
    let folder = disk.folder().to_path_buf();
    drop(disk);
    std::fs::remove_dir_all(folder)?;
    Ok((median(&rates), rates.len()))
}

fn qcow2(work: &Work, cluster_kib: u32) -> Result<f64, Failure> {
    let image = |number: usize| -> PathBuf { work.path(&format!("scatter-{cluster_kib}-{number}.qcow2")) };
    let cluster = format!("cluster_size={cluster_kib}k");
    let create = ["create", "-q", "-f", "qcow2", "-o", &cluster];
    run(Command::new("qemu-img").args(create).arg(image(0)).arg(SIZE))?;
    fill(Export::new(work, &image(0), "qcow2")?.device())?;
    let mut rates = Vec::new();
    for round in rounds(ROUNDS_MAX, MEASURING_MAX) {
        run(Command::new("qemu-img")
            .args(create)
            .args(["-F", "qcow2", "-b"])
            .arg(image(round))
            .arg(image(round + 1)))?;
        rates.push(scatter(Export::new(work, &image(round + 1), "qcow2")?.device())?);
    }
    for number in 0..=rates.len() {
        std::fs::remove_file(image(number))?;
    }
    Ok(median(&rates))
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    if !have("fio") {
        eprintln!("SKIP: fio is not installed");
        return Ok(());
    }
    let work = Work::new()?;
    work.need_bytes(6 << 30)?;
    let has_peer = have("qemu-storage-daemon");
    for cluster_kib in [64, 256, 1024] {
        let (own, rounds_made) = ours(&work, cluster_kib)?;
        let peer = if has_peer && cluster_kib != 256 { Some(qcow2(&work, cluster_kib)?) } else { None };
        reporter.figure(
            "scattered_writes",
            json!({
                "cluster_kib": cluster_kib, "writes": WRITES, "rounds": rounds_made, "writes_per_second": own,
                "qcow2_writes_per_second": peer, "ratio": peer.map(|peer| own / peer),
            }),
        );
    }
    Ok(())
}
