//! What a check costs: sound images whose table has 16 Mi entries, and a full disk of 20 GiB beside `qemu-img check`.
//!
//! The images are sparse: a check reads tables, not data. Times are of the whole command, with a warm page cache.

use crate::report::{Reporter, median};
use crate::work::{Failure, Measured, Work, cpu_seconds_of_children, have, run};
use crate::{sparse, work};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Runs of each, of which the middle one counts.
const ROUNDS: usize = 9;
/// Entries of the large tables.
const ENTRIES: u64 = 16 << 20;

fn ours(work: &Work, path: &Path) -> Command {
    let mut command = work.ploop();
    command.args(["check", "-f", "-r", "-s"]).arg(path);
    command
}

fn theirs(path: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-q", "-f", "parallels"]).arg(path);
    command
}

/// Milliseconds of one run: on the clock, and of processor time.
fn once(mut command: Command) -> Result<(f64, f64), Failure> {
    let (begun, cpu) = (Instant::now(), cpu_seconds_of_children()?);
    run(&mut command)?;
    Ok((begun.elapsed().as_secs_f64() * 1e3, (cpu_seconds_of_children()? - cpu) * 1e3))
}

fn measure(
    reporter: &Reporter,
    work: &Work,
    path: &Path,
    disk: &str,
    (entries, has_peer): (u64, bool),
) -> Result<(), Failure> {
    // Also warms the cache.
    let peak_mib = Measured::start(ours(work, path).stdout(std::process::Stdio::null()))?.finish()?.peak_mib;
    let (mut own, mut own_cpu, mut peer, mut peer_cpu) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let (ms, cpu_ms) = once(ours(work, path))?;
        own.push(ms);
        own_cpu.push(cpu_ms);
        if has_peer {
            let (ms, cpu_ms) = once(theirs(path))?;
            peer.push(ms);
            peer_cpu.push(cpu_ms);
        }
    }
    let mut figures = json!({
        "disk": disk, "entries": entries, "rounds": ROUNDS,
        "check_ms": median(&own), "cpu_ms": median(&own_cpu), "peak_memory_mib": peak_mib,
    });
    let others = match has_peer {
        true => json!({
            "qemu_img_check_ms": median(&peer), "qemu_img_cpu_ms": median(&peer_cpu),
            "ratio": median(&peer) / median(&own), "wanted_ratio_min": 1.0,
        }),
        false => json!({ "wanted_ms_max": 1000, "wanted_mib_max": 192 }),
    };
    if let (Some(figures), serde_json::Value::Object(others)) = (figures.as_object_mut(), others) {
        figures.extend(others);
    }
    reporter.figure("check", figures);
    Ok(())
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let work = Work::new()?;
    // Files of ext4 end at 16 TiB: half the size on the disk, the whole in memory.
    let half = work.path("half.hds");
    sparse::image(&half, ENTRIES, 1024, true)?;
    measure(reporter, &work, &half, "8 TiB, clusters of 512 KiB", (ENTRIES, false))?;
    std::fs::remove_file(&half)?;
    match sparse::folder_for_long_files(&work::base_folder())? {
        Some(folder) => {
            let path = folder.path().join("whole.hds");
            sparse::image(&path, ENTRIES, 2048, true)?;
            measure(reporter, &work, &path, "16 TiB, clusters of 1 MiB", (ENTRIES, false))?;
        }
        None => eprintln!("SKIP: no folder takes a file of 16 TiB"),
    }
    let small = work.path("small.hds");
    sparse::image(&small, 20 << 10, 2048, true)?;
    measure(reporter, &work, &small, "20 GiB, clusters of 1 MiB", (20 << 10, have("qemu-img")))
}
