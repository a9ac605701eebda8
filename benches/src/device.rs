//! fio on the bare device: ours (FUSE file + loop), the kernel's own loop device on a raw file, and the FUSE export
//! of `qemu-storage-daemon` (raw, qcow2, parallels) under a loop device with direct I/O. Same host disk, same run.

use crate::report::Reporter;
use crate::work::{Failure, Mounted, Work, have, run};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const SIZE: &str = "2G";
const SECONDS: u32 = 5;

/// (name, fio's rw, block size, depth)
const JOBS: &[(&str, &str, &str, u32)] = &[
    ("random_write_4k_depth_1", "randwrite", "4k", 1),
    ("random_write_4k_depth_32", "randwrite", "4k", 32),
    ("random_read_4k_depth_1", "randread", "4k", 1),
    ("random_read_4k_depth_32", "randread", "4k", 32),
    ("sequential_write_1m_depth_8", "write", "1m", 8),
    ("sequential_read_1m_depth_8", "read", "1m", 8),
];

fn fio(device: &str, rw: &str, block: &str, depth: u32) -> Result<f64, Failure> {
    let text = run(Command::new("fio").args([
        "--name=bench",
        "--ioengine=io_uring",
        "--direct=1",
        "--time_based",
        "--output-format=json",
        "--randrepeat=1",
        &format!("--filename={device}"),
        &format!("--rw={rw}"),
        &format!("--bs={block}"),
        &format!("--iodepth={depth}"),
        &format!("--runtime={SECONDS}"),
    ]))?;
    let report: Value = serde_json::from_str(&text)?;
    let side = if rw.ends_with("read") { "read" } else { "write" };
    report["jobs"][0][side]["bw_bytes"].as_f64().ok_or_else(|| "fio reported no rate".into())
}

/// All jobs on one device that was filled once, so that every cluster is allocated. Rates in MiB/s.
fn measure(device: &str) -> Result<Value, Failure> {
    run(Command::new("fio").args([
        "--name=fill",
        "--ioengine=io_uring",
        "--direct=1",
        "--rw=write",
        "--bs=1m",
        "--iodepth=8",
        &format!("--filename={device}"),
    ]))?;
    let mut rates = serde_json::Map::new();
    for (name, rw, block, depth) in JOBS {
        rates.insert((*name).to_owned(), json!(fio(device, rw, block, *depth)? / f64::from(1 << 20)));
    }
    Ok(Value::Object(rates))
}

/// A loop device with direct I/O on a file; detached when dropped.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Result<Self, Failure> {
        Ok(Self(run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file))?))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(failure) = run(Command::new("losetup").args(["--detach", &self.0])) {
            eprintln!("detaching after a bench: {failure}");
        }
    }
}

/// A running `qemu-storage-daemon`; told to end when dropped, which also ends its FUSE mount.
struct Daemon(Child);

impl Daemon {
    fn export(image: &Path, format: &str, file: &Path) -> Result<Self, Failure> {
        std::fs::write(file, "")?;
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={},cache.direct=on,aio=native",
                image.display()
            ))
            .arg("--blockdev")
            .arg(format!("driver={format},node-name=disk,file=file"))
            .arg("--export")
            .arg(format!("type=fuse,id=export,node-name=disk,mountpoint={},writable=on", file.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let daemon = Self(child);
        for _ in 0..500 {
            if std::fs::metadata(file)?.len() > 0 {
                return Ok(daemon);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Err("qemu-storage-daemon exported nothing within five seconds".into())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(0));
        let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    if !have("fio") {
        eprintln!("SKIP: device: fio is not installed");
        return Ok(());
    }
    let work = Work::new()?;
    {
        let raw = work.path("raw.img");
        std::fs::File::create(&raw)?.set_len(2 << 30)?;
        let device = Loop::attach(&raw)?;
        reporter.figure(
            "device",
            json!({ "who": "kernel loop on a raw file", "mib_per_second": measure(&device.0)? }),
        );
    }
    {
        let disk = Mounted::bare(&work, "ours", SIZE)?;
        reporter.figure("device", json!({ "who": "ploop", "mib_per_second": measure(&disk.device)? }));
    }
    if !have("qemu-storage-daemon") {
        eprintln!("SKIP: qemu-storage-daemon is not installed");
        return Ok(());
    }
    for format in ["raw", "qcow2", "parallels"] {
        let (image, file) = (work.path(&format!("{format}.img")), work.path(&format!("{format}.export")));
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(SIZE))?;
        let _daemon = Daemon::export(&image, format, &file)?;
        let device = Loop::attach(&file)?;
        let who = format!("qemu-storage-daemon {format}");
        reporter.figure("device", json!({ "who": who, "mib_per_second": measure(&device.0)? }));
    }
    Ok(())
}
