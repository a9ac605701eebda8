//! The classic experiment: `od -x /dev/urandom > file` runs on the disk while it is copied. Ours: the time from the
//! freeze command's start to "destination durable". The peer: the second pass of a two-pass `rsync` of the same tree
//! under the same load, for which the writer would have to stand still. Also: how many bytes the last pass sends.

use crate::report::{Reporter, median};
use crate::work::{Failure, Mounted, Work, fill_with_real_files, have, run};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const DATA_BYTES: u64 = 1 << 30;

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
    let (mut freeze_ms, mut rsync_ms, mut last) = (Vec::new(), Vec::new(), Value::Null);
    for round in 0..ROUNDS {
        let file = disk.mount_point.join("load");
        let load = Load::start(&file)?;
        std::thread::sleep(Duration::from_secs(1));
        let target = work.folder(&format!("target{round}"))?;
        last = copy_once(&work, &disk, &target.join("root.hds"))?;
        freeze_ms.push(number(&last, "total_ms").or_else(|| number(&last, "downtime_ms")).ok_or("no total")?);
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
            "rounds": ROUNDS, "ploop_ms": median(&freeze_ms), "rsync_second_pass_ms": median(&rsync_ms),
            "ratio": median(&freeze_ms) / median(&rsync_ms), "last_copy": last,
        }),
    );
    Ok(())
}
