//! Copy of 2 GiB of real data through a local pipe, both ends on one disk: `ploop copy` against `cat` of the same
//! image file with a final sync, `nbdcopy` between two `qemu-nbd` on the same format, and `qemu-img convert`.

use crate::report::{Reporter, median};
use crate::work::{Failure, Measured, Mounted, Usage, Work, drop_caches, fill_with_real_files, have, run};
use serde_json::json;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const ROUNDS: usize = 3;
const DATA_BYTES: u64 = 2 << 30;

fn ploop_copy(work: &Work, source: &Path, target: &Path) -> Result<(f64, Usage, Usage), Failure> {
    let started = Instant::now();
    let mut sender = Measured::start(work.ploop().args(["copy", "-s"]).arg(source).stdout(Stdio::piped()))?;
    let pipe = sender.take_output().ok_or("no pipe")?;
    let receiver = Measured::start(work.ploop().args(["copy", "-d"]).arg(target).stdin(pipe))?;
    // Both are polled for their memory; the receiver ends last.
    let received = std::thread::spawn(move || receiver.finish().map_err(|failure| failure.to_string()));
    let sent = sender.finish()?;
    let received = received.join().map_err(|_| "the thread of the receiver died")??;
    Ok((started.elapsed().as_secs_f64(), sent, received))
}

fn cat_with_sync(source: &Path, target: &Path) -> Result<f64, Failure> {
    let started = Instant::now();
    let mut reader = Command::new("cat").arg(source).stdout(Stdio::piped()).spawn()?;
    let pipe = reader.stdout.take().ok_or("no pipe")?;
    let file = std::fs::File::create(target)?;
    let status = Command::new("cat").stdin(pipe).stdout(file.try_clone()?).status()?;
    file.sync_all()?;
    if !status.success() || !reader.wait()?.success() {
        return Err("cat failed".into());
    }
    Ok(started.elapsed().as_secs_f64())
}

/// `cache`: how both `qemu-nbd` open their files; `None` leaves it at their default.
fn nbdcopy(work: &Work, source: &Path, target: &Path, cache: Option<&str>) -> Result<f64, Failure> {
    let info = run(Command::new("qemu-img").args(["info", "--output=json", "-f", "parallels"]).arg(source))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let size = info["virtual-size"].as_u64().ok_or("qemu-img info tells no size")?;
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "parallels"])
        .arg(target)
        .arg(size.to_string()))?;
    let (from, to) = (work.path("from.sock"), work.path("to.sock"));
    let serve = |image: &Path, socket: &Path, read_only: bool| {
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "parallels", "-k"]).arg(socket);
        if let Some(cache) = cache {
            command.arg(format!("--cache={cache}"));
        }
        if read_only {
            command.arg("-r");
        }
        command.arg(image).spawn()
    };
    let started = Instant::now();
    let mut servers = [serve(source, &from, true)?, serve(target, &to, false)?];
    while !(from.exists() && to.exists()) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let uri = |socket: &Path| format!("nbd+unix:///?socket={}", socket.display());
    let outcome = run(Command::new("nbdcopy").args(["--flush", &uri(&from), &uri(&to)]));
    for server in &mut servers {
        server.wait()?;
    }
    outcome?;
    Ok(started.elapsed().as_secs_f64())
}

fn convert(source: &Path, target: &Path) -> Result<f64, Failure> {
    let started = Instant::now();
    run(Command::new("qemu-img")
        .args(["convert", "-t", "none", "-T", "none", "-f", "parallels", "-O", "parallels"])
        .arg(source)
        .arg(target))?;
    run(Command::new("sync").arg(target))?;
    Ok(started.elapsed().as_secs_f64())
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let work = Work::new()?;
    let data_bytes = {
        let disk = Mounted::create(&work, "source", "4G")?;
        fill_with_real_files(&disk.mount_point, DATA_BYTES)?
    };
    let (source, target) = (work.path("source/root.hds"), work.folder("target")?.join("root.hds"));
    let (mut ours, mut cat, mut qemu) = (Vec::new(), Vec::new(), Vec::new());
    let (mut nbd, mut nbd_direct) = (Vec::new(), Vec::new());
    let mut peaks_mib = (0f64, 0f64);
    let clear = || {
        let _ = std::fs::remove_dir_all(work.path("target"));
        let _ = work.folder("target");
        drop_caches();
    };
    for _ in 0..ROUNDS {
        clear();
        let (seconds, sender, receiver) = ploop_copy(&work, &source, &target)?;
        ours.push(seconds);
        peaks_mib = (peaks_mib.0.max(sender.peak_mib), peaks_mib.1.max(receiver.peak_mib));
        clear();
        cat.push(cat_with_sync(&source, &target)?);
        if have("nbdcopy") && have("qemu-nbd") {
            clear();
            nbd.push(nbdcopy(&work, &source, &target, None)?);
            clear();
            nbd_direct.push(nbdcopy(&work, &source, &target, Some("none"))?);
            clear();
            qemu.push(convert(&source, &target)?);
        }
    }
    reporter.figure(
        "copy",
        json!({
            "data_bytes": data_bytes, "file_bytes": std::fs::metadata(&source)?.len(), "rounds": ROUNDS,
            "ploop_seconds": median(&ours), "cat_seconds": median(&cat),
            "nbdcopy_seconds": median(&nbd), "nbdcopy_direct_seconds": median(&nbd_direct), "qemu_img_convert_seconds": median(&qemu),
            "speed_to_cat": median(&cat) / median(&ours), "speed_to_nbdcopy": median(&nbd) / median(&ours),
            "speed_to_nbdcopy_direct": median(&nbd_direct) / median(&ours),
            "sender_peak_mib": peaks_mib.0, "receiver_peak_mib": peaks_mib.1,
        }),
    );
    Ok(())
}
