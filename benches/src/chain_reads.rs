//! Random reads of 4 KiB from a full disk at chain depth 1, 10 and 100: what a long chain costs. Beside it qcow2 in
//! `qemu-storage-daemon` behind the same kind of loop device, with the same clusters and as much in every delta; both
//! read past the page cache, what lies below included.
//!
//! All depths of both are measured in turn, again and again, so that a slow moment of the host hits them all; as often as
//! the time allows that the bench takes at most.

use crate::device::{Export, fill, fio_for};
use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, have, run};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

const DEPTHS: [u32; 3] = [1, 10, 100];
const SIZE: &str = "256M";
const CLUSTER_KIB: u32 = 64;
/// Clusters of the disk.
const CLUSTERS: u64 = (256 << 20) / (64 << 10);
/// Clusters that each delta holds.
const DELTA_CLUSTERS: u64 = 32;
const ROUNDS_MAX: usize = 7;
const SECONDS: u32 = 1;
/// No chain is begun, and no round, after so long. What is under way then ends within seconds.
const BUILDING_MAX: Duration = Duration::from_secs(55);
const MEASURING_MAX: Duration = Duration::from_secs(75);

/// Scattered clusters for the delta of that number, in bytes from the start of the disk.
fn places(delta: u32) -> impl Iterator<Item = u64> {
    let number = move |index| u64::from(delta) * DELTA_CLUSTERS + index;
    // Odd, so no place comes twice before all have come.
    (0..DELTA_CLUSTERS).map(move |index| number(index) * 7919 % CLUSTERS * (u64::from(CLUSTER_KIB) << 10))
}

/// Fails when the host is too slow for the bench.
fn check_time(begun: Instant, delta: u32) -> Result<(), Failure> {
    if begun.elapsed() < BUILDING_MAX {
        return Ok(());
    }
    Err(format!("the host is too busy: after {BUILDING_MAX:?} a chain has {delta} deltas").into())
}

fn ours(work: &Work, begun: Instant) -> Result<Vec<Mounted<'_>>, Failure> {
    let mut disks = Vec::new();
    for depth in DEPTHS {
        let disk = Mounted::bare_in_clusters(work, &format!("reads-{depth}"), SIZE, CLUSTER_KIB)?;
        fill(&disk.device)?;
        let bytes = vec![0xA5; usize::try_from(CLUSTER_KIB)? << 10];
        for delta in 1..depth {
            check_time(begun, delta)?;
            disk.snapshot()?;
            let device = File::options().write(true).open(&disk.device)?;
            for place in places(delta) {
                device.write_all_at(&bytes, place)?;
            }
            device.sync_data()?;
        }
        disks.push(disk);
    }
    Ok(disks)
}

fn qcow2(work: &Work, begun: Instant) -> Result<Vec<Export>, Failure> {
    let mut exports = Vec::new();
    for depth in DEPTHS {
        let image = |number: u32| work.path(&format!("reads-{depth}-{number}.qcow2"));
        let cluster = format!("cluster_size={CLUSTER_KIB}k");
        let create = ["create", "-q", "-f", "qcow2", "-o", &cluster];
        run(Command::new("qemu-img").args(create).arg(image(1)).arg(SIZE))?;
        fill(Export::new(work, &image(1), "qcow2")?.device())?;
        for delta in 1..depth {
            check_time(begun, delta)?;
            // Without a look at the images below: whole clusters are written.
            run(Command::new("qemu-img")
                .args(create)
                .args(["-u", "-F", "qcow2", "-b"])
                .arg(image(delta))
                .arg(image(delta + 1))
                .arg(SIZE))?;
            let mut write = Command::new("qemu-io");
            for place in places(delta) {
                write.arg("-c").arg(format!("write -q {place} {CLUSTER_KIB}k"));
            }
            let alone = format!("driver=qcow2,backing=,file.filename={}", image(delta + 1).display());
            run(write.arg("--image-opts").arg(alone))?;
        }
        exports.push(Export::new(work, &image(depth), "qcow2")?);
    }
    Ok(exports)
}

/// Rates in MiB/s, as medians, in the order of the devices; and of how many rounds.
fn rates(devices: &[&str], begun: Instant) -> Result<(Vec<f64>, usize), Failure> {
    let mut rates = vec![Vec::new(); devices.len()];
    let mut rounds = 0;
    while rounds < ROUNDS_MAX && (rounds == 0 || begun.elapsed() < MEASURING_MAX) {
        for (rates, device) in rates.iter_mut().zip(devices) {
            rates.push(fio_for(device, "randread", "4k", 32, SECONDS)? / f64::from(1 << 20));
        }
        rounds += 1;
    }
    Ok((rates.iter().map(|rates| median(rates)).collect(), rounds))
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    if !have("fio") {
        eprintln!("SKIP: fio is not installed");
        return Ok(());
    }
    let work = Work::new()?;
    work.need_bytes(4 << 30)?;
    let begun = Instant::now();
    let disks = ours(&work, begun)?;
    let exports = match have("qemu-storage-daemon").then(|| qcow2(&work, begun)) {
        None => Vec::new(),
        Some(Ok(exports)) => exports,
        Some(Err(failure)) => {
            eprintln!("without qcow2: {failure}");
            Vec::new()
        }
    };
    let mut devices: Vec<_> = disks.iter().map(|disk| disk.device.as_str()).collect();
    devices.extend(exports.iter().map(Export::device));
    let (rates, rounds) = rates(&devices, begun)?;
    let (own, peer) = rates.split_at(disks.len());
    let last = DEPTHS.len() - 1;
    reporter.figure(
        "chain_reads",
        json!({
            "who": "ploop", "depths": DEPTHS, "cluster_kib": CLUSTER_KIB, "rounds": rounds, "mib_per_second": own,
            "depth_100_to_1": own[last] / own[0], "wanted_min": 0.9,
        }),
    );
    if !peer.is_empty() {
        reporter.figure(
            "chain_reads",
            json!({
                "who": "qcow2", "depths": DEPTHS, "cluster_kib": CLUSTER_KIB, "rounds": rounds, "mib_per_second": peer,
                "depth_100_to_1": peer[last] / peer[0], "ratio_at_100": own[last] / peer[last],
            }),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{DELTA_CLUSTERS, DEPTHS, places};
    use std::collections::BTreeSet;

    #[test]
    fn deltas_hold_different_clusters_of_the_disk() {
        let all: BTreeSet<u64> = (1..DEPTHS[2]).flat_map(places).collect();
        assert_eq!(all.len() as u64, u64::from(DEPTHS[2] - 1) * DELTA_CLUSTERS);
        assert!(all.iter().all(|place| place % (64 << 10) == 0 && *place < 256 << 20));
    }
}
