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

const FIO: [&str; 5] =
    ["--name=bench", "--ioengine=io_uring", "--direct=1", "--randrepeat=1", "--output-format=json"];

/// The report of one job.
pub(crate) fn fio_json(arguments: &[&str]) -> Result<Value, Failure> {
    Ok(serde_json::from_str(&run(Command::new("fio").args(FIO).args(arguments))?)?)
}

/// A job that goes on until it is told to end; killed when dropped.
pub(crate) struct Load(Option<Child>);

impl Load {
    /// Starts it, and waits until it writes.
    pub(crate) fn start(device: &str, arguments: &[&str]) -> Result<Self, Failure> {
        let mut command = Command::new("fio");
        command.args(FIO).args(["--time_based", "--runtime=3600"]).args(arguments);
        command.arg(format!("--filename={device}"));
        let load = Self(Some(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?));
        std::thread::sleep(std::time::Duration::from_secs(1));
        Ok(load)
    }

    /// Ends it; its report.
    pub(crate) fn end(mut self) -> Result<Value, Failure> {
        let child = self.0.take().ok_or("a load that has ended")?;
        // fio then finishes what it has begun and reports.
        nix::sys::signal::kill(id(&child), nix::sys::signal::Signal::SIGINT)?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // It says in words that it was told to end.
        let json = text.find('{').zip(text.rfind('}')).and_then(|(from, to)| text.get(from..=to));
        Ok(serde_json::from_str(json.ok_or("fio reported nothing")?)?)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn id(child: &Child) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
}

fn fio(device: &str, rw: &str, block: &str, depth: u32) -> Result<f64, Failure> {
    fio_for(device, rw, block, depth, SECONDS)
}

/// Bytes per second of one job that runs for some seconds.
pub(crate) fn fio_for(device: &str, rw: &str, block: &str, depth: u32, seconds: u32) -> Result<f64, Failure> {
    let report = fio_json(&[
        "--time_based",
        &format!("--filename={device}"),
        &format!("--rw={rw}"),
        &format!("--bs={block}"),
        &format!("--iodepth={depth}"),
        &format!("--runtime={seconds}"),
    ])?;
    let side = if rw.ends_with("read") { "read" } else { "write" };
    report["jobs"][0][side]["bw_bytes"].as_f64().ok_or_else(|| "fio reported no rate".into())
}

/// Writes a whole device once, so that every cluster is allocated.
pub(crate) fn fill(device: &str) -> Result<(), Failure> {
    run(Command::new("fio").args([
        "--name=fill",
        "--ioengine=io_uring",
        "--direct=1",
        "--rw=write",
        "--bs=1m",
        "--iodepth=8",
        &format!("--filename={device}"),
    ]))
    .map(drop)
}

/// All jobs on one device that was filled once. Rates in MiB/s.
fn measure(device: &str) -> Result<Value, Failure> {
    fill(device)?;
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
            // For the images below it as well.
            .arg(format!("driver={format},node-name=disk,file=file,cache.direct=on"))
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
        let _ = nix::sys::signal::kill(id(&self.0), nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// An image that `qemu-storage-daemon` serves, under a loop device as ours is.
pub(crate) struct Export {
    // Goes before its daemon.
    device: Loop,
    _daemon: Daemon,
}

impl Export {
    pub(crate) fn new(work: &Work, image: &Path, format: &str) -> Result<Self, Failure> {
        let name = image.file_name().ok_or("an image without a name")?.to_string_lossy().into_owned();
        let file = work.path(&format!("{name}.export"));
        let daemon = Daemon::export(image, format, &file)?;
        Ok(Self { device: Loop::attach(&file)?, _daemon: daemon })
    }

    pub(crate) fn device(&self) -> &str {
        &self.device.0
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
        let image = work.path(&format!("{format}.img"));
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(SIZE))?;
        let export = Export::new(&work, &image, format)?;
        let who = format!("qemu-storage-daemon {format}");
        reporter.figure("device", json!({ "who": who, "mib_per_second": measure(export.device())? }));
    }
    Ok(())
}
