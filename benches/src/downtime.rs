//! The classic experiment: `od -x /dev/urandom > file` runs on the disk while it is copied. Ours, in both forms: one-way
//! from the freeze command's start to the last byte being handed to the pipe, and two-way from the freeze command's
//! start to "destination durable", the receiver's verdict. The peer: the second pass of a two-pass `rsync` of the same
//! tree under the same load, for which the writer would have to stand still.
//!
//! Also measured: what the last pass sends for each byte that was really written. The freeze command itself writes
//! scattered pieces of 4 KiB to the device, so that exactly they are what is dirty.

use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, fill_with_real_files, have, run};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const DATA_BYTES: u64 = 1 << 30;
/// Pieces written for the last pass, and their size in bytes: one in every so many bytes of the disk.
const PIECES: u64 = 2000;
const PIECE_BYTES: usize = 4096;
const STRIDE_BYTES: u64 = 1 << 20;

/// The writer; killed when dropped.
struct Load(Child);

impl Load {
    fn start(file: &Path) -> Result<Self, Failure> {
        let out = std::fs::File::create(file)?;
        Ok(Self(Command::new("od").args(["-x", "/dev/urandom"]).stdout(out).spawn()?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The summary event of the sender: the last JSON line that names a downtime.
fn summary(events: &str) -> Result<Value, Failure> {
    let mut lines = events.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.find(|event| event.to_string().contains("downtime")).ok_or_else(|| "no downtime event".into())
}

fn number(value: &Value, name: &str) -> Option<f64> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .find_map(|(key, value)| if key == name { value.as_f64() } else { number(value, name) }),
        _ => None,
    }
}

/// Milliseconds of a summary from the freeze command's start to the verdict of the receiver, or, one-way, to the end of
/// the stream: the thaw itself is not counted.
fn frozen_ms(summary: &Value) -> Result<f64, Failure> {
    let parts = ["hook_ms", "file_system_ms", "last_pass_ms", "seal_ms"];
    parts.iter().map(|name| number(summary, name).ok_or_else(|| format!("no {name}").into())).sum()
}

/// A copy whose receiver answers.
fn copy_two_way(work: &Work, source: &Path, target: &Path, freeze: &str) -> Result<Value, Failure> {
    let events = work.path("events.jsonl");
    let status = work
        .ploop()
        .args(["copy", "--json", "-F", freeze, "-s"])
        .arg(source)
        .arg("-d")
        .arg(target)
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&events)?)
        .status()?;
    let events = std::fs::read_to_string(&events)?;
    if status.success() { summary(&events) } else { Err(format!("copy: {status}: {events}").into()) }
}

/// Writes the scattered pieces; run as the freeze command.
pub fn scatter(device: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device)?;
    let mut buffer = ploop_core::io::IoBuf::try_zeroed(PIECE_BYTES)?;
    for number in 0..PIECES {
        buffer.as_mut_slice().fill(u8::try_from(number % 255)? + 1);
        // Anywhere in its stretch, but nowhere near another one.
        let within = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (STRIDE_BYTES / PIECE_BYTES as u64);
        file.write_all_at(buffer.as_slice(), number * STRIDE_BYTES + within * PIECE_BYTES as u64)?;
    }
    Ok(())
}

/// Bytes that the last pass sent for each byte that was dirty.
fn last_pass_ratio(work: &Work) -> Result<Value, Failure> {
    let disk = Mounted::bare(work, "scattered", "2500M")?;
    let target = work.folder("scattered.copy")?;
    let freeze = format!("'{}' scatter '{}'", std::env::current_exe()?.display(), disk.device);
    let summary = copy_two_way(work, Path::new(&disk.device), &target.join("root.hds"), &freeze)?;
    let downtime = summary.get("downtime").ok_or("no downtime")?;
    let sent = number(downtime, "bytes").ok_or("no bytes")?;
    #[allow(clippy::cast_precision_loss)]
    let dirtied = (PIECES * PIECE_BYTES as u64) as f64;
    Ok(json!({"written_bytes": dirtied, "sent_bytes": sent, "ratio": sent / dirtied}))
}

fn copy_once(work: &Work, disk: &Mounted<'_>, target: &Path) -> Result<Value, Failure> {
    let events = work.path("events.jsonl");
    let mut sender = work
        .ploop()
        .args(["copy", "-s"])
        .arg(&disk.mount_point)
        .args(["-F", "true", "--json"])
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&events)?)
        .spawn()?;
    let pipe = sender.stdout.take().ok_or("no pipe")?;
    let received = work.ploop().args(["copy", "-d"]).arg(target).stdin(pipe).status()?;
    let sent = sender.wait()?;
    if !(sent.success() && received.success()) {
        return Err(format!(
            "copy: sender {sent}, receiver {received}: {}",
            std::fs::read_to_string(&events)?
        )
        .into());
    }
    summary(&std::fs::read_to_string(&events)?)
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let work = Work::new()?;
    let disk = Mounted::create(&work, "source", "6G")?;
    fill_with_real_files(&disk.mount_point, DATA_BYTES)?;
    run(&mut Command::new("sync"))?;
    let (mut one_way_ms, mut two_way_ms, mut rsync_ms) = (Vec::new(), Vec::new(), Vec::new());
    let mut last = Value::Null;
    for round in 0..ROUNDS {
        let file = disk.mount_point.join("load");
        let load = Load::start(&file)?;
        std::thread::sleep(Duration::from_secs(1));
        let target = work.folder(&format!("target{round}"))?;
        one_way_ms.push(frozen_ms(&copy_once(&work, &disk, &target.join("root.hds"))?)?);
        drop(load);
        std::fs::remove_dir_all(target)?;

        let load = Load::start(&file)?;
        std::thread::sleep(Duration::from_secs(1));
        let target = work.folder(&format!("durable{round}"))?;
        last = copy_two_way(&work, &disk.mount_point, &target.join("root.hds"), "true")?;
        two_way_ms.push(frozen_ms(&last)?);
        drop(load);
        std::fs::remove_dir_all(target)?;

        if have("rsync") {
            let load = Load::start(&file)?;
            std::thread::sleep(Duration::from_secs(1));
            let target = work.folder(&format!("rsync{round}"))?;
            let rsync = || {
                run(Command::new("rsync")
                    .args(["-a", "--delete"])
                    .arg(format!("{}/", disk.mount_point.display()))
                    .arg(&target))
            };
            rsync()?;
            let started = Instant::now();
            drop(load);
            rsync()?;
            run(Command::new("sync").arg("-f").arg(&target))?;
            rsync_ms.push(started.elapsed().as_secs_f64() * 1e3);
            std::fs::remove_dir_all(target)?;
        }
        let _ = std::fs::remove_file(file);
    }
    reporter.figure(
        "downtime",
        json!({
            "rounds": ROUNDS, "one_way_ms": median(&one_way_ms), "two_way_durable_ms": median(&two_way_ms),
            "rsync_second_pass_ms": median(&rsync_ms), "ratio_one_way": median(&one_way_ms) / median(&rsync_ms),
            "ratio_two_way": median(&two_way_ms) / median(&rsync_ms),
            "last_pass": last_pass_ratio(&work)?, "last_copy": last,
        }),
    );
    Ok(())
}
