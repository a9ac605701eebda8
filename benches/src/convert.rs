//! A disk of 4 GiB, half full: raw to expanded and back, `ploop convert` (with and without reading back what it wrote)
//! against `qemu-img convert` with a sync; time and host blocks.
//!
//! Both are treated alike: each begins with an empty page cache, reads and writes past it, and ends when the new file is
//! durable and the old one is removed and its blocks are free, which takes some tenths of a second where the file system
//! discards them. `ploop convert` removes it by itself; for `qemu-img`, which does not, the bench does, and that counts.

use crate::report::{Reporter, median};
use crate::work::{Failure, Work, drop_caches, have, rounds, run};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const ROUNDS_MAX: usize = 3;
/// No round is begun after it.
const MEASURING_MAX: Duration = Duration::from_secs(45);
const DISK_BYTES: u64 = 4 << 30;
/// Every other run of this length holds data.
const RUN_BYTES: u64 = 16 << 20;

/// A raw file whose every other run is data that does not compress.
fn fill(path: &Path) -> Result<(), Failure> {
    let file = File::create(path)?;
    file.set_len(DISK_BYTES)?;
    let mut state = 1u64;
    let mut bytes = vec![0u8; usize::try_from(RUN_BYTES)?];
    for at in (0..DISK_BYTES).step_by(usize::try_from(2 * RUN_BYTES)?) {
        for word in bytes.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *word = (state | 1).to_le_bytes();
        }
        file.write_all_at(&bytes, at)?;
    }
    Ok(file.sync_all()?)
}

/// The one image of a disk.
fn image(folder: &Path) -> Result<PathBuf, Failure> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("root")) {
            return Ok(path);
        }
    }
    Err("the disk has no image".into())
}

fn host_bytes(path: &Path) -> Result<u64, Failure> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

fn timed(action: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
    drop_caches();
    let started = Instant::now();
    action()?;
    Ok(started.elapsed().as_secs_f64())
}

fn ours(work: &Work, folder: &Path, format: &str, read_back: bool) -> Result<f64, Failure> {
    let flags: &[&str] = if read_back { &[] } else { &["--no-verify"] };
    timed(|| run(work.ploop().args(["convert", "-f", format]).args(flags).arg(folder)).map(drop))
}

/// As ours leaves it: the new file durable, the old one gone.
fn theirs(from: (&str, &Path), to: (&str, &Path)) -> Result<f64, Failure> {
    timed(|| {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-t", "none", "-T", "none", "-f", from.0, "-O", to.0]);
        run(command.arg(from.1).arg(to.1))?;
        run(Command::new("sync").arg(to.1))?;
        Ok(std::fs::remove_file(from.1)?)
    })
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let work = Work::new()?;
    let folder = work.folder("disk")?;
    let (theirs_image, theirs_raw) = (work.path("theirs.hds"), work.path("theirs.raw"));
    fill(&theirs_raw)?;
    run(work.ploop().args(["import", "-f", "raw"]).arg(&theirs_raw).arg(folder.join("root.hds")))?;
    let (mut to_image, mut to_raw) = ([vec![], vec![]], [vec![], vec![]]);
    let (mut qemu_to_image, mut qemu_to_raw) = (vec![], vec![]);
    let (mut image_host, mut raw_host, mut qemu_image_host, mut qemu_raw_host) = (0, 0, 0, 0);
    for round in rounds(ROUNDS_MAX, MEASURING_MAX) {
        let _ = writeln!(std::io::stderr(), "  round {}", round + 1);
        for (index, read_back) in [true, false].into_iter().enumerate() {
            to_image[index].push(ours(&work, &folder, "expanded", read_back)?);
            image_host = host_bytes(&image(&folder)?)?;
            to_raw[index].push(ours(&work, &folder, "raw", read_back)?);
            raw_host = host_bytes(&image(&folder)?)?;
        }
        if have("qemu-img") {
            qemu_to_image.push(theirs(("raw", &theirs_raw), ("parallels", &theirs_image))?);
            qemu_image_host = host_bytes(&theirs_image)?;
            qemu_to_raw.push(theirs(("parallels", &theirs_image), ("raw", &theirs_raw))?);
            qemu_raw_host = host_bytes(&theirs_raw)?;
        }
    }
    let rounds_made = to_image[0].len();
    for (index, read_back) in [true, false].into_iter().enumerate() {
        let (to_image, to_raw) = (median(&to_image[index]), median(&to_raw[index]));
        reporter.figure(
            "convert",
            json!({
                "disk_bytes": DISK_BYTES, "data_bytes": DISK_BYTES / 2, "rounds": rounds_made,
                "ploop_reads_back_and_compares": read_back, "qemu_reads_back_and_compares": false,
                "raw_to_expanded_seconds": to_image, "qemu_raw_to_expanded_seconds": median(&qemu_to_image),
                "expanded_to_raw_seconds": to_raw, "qemu_expanded_to_raw_seconds": median(&qemu_to_raw),
                "speed_to_expanded": median(&qemu_to_image) / to_image,
                "speed_to_raw": median(&qemu_to_raw) / to_raw,
                "expanded_host_bytes": image_host, "qemu_expanded_host_bytes": qemu_image_host,
                "raw_host_bytes": raw_host, "qemu_raw_host_bytes": qemu_raw_host,
            }),
        );
    }
    Ok(())
}
