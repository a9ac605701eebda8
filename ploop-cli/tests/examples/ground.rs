//! Where the examples of a document run, and how everything they mounted goes away again.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// The built command.
const PLOOP: &str = env!("CARGO_BIN_EXE_ploop");
/// The longest a command of an example may take.
const COMMAND_MAX: Duration = Duration::from_secs(120);

/// What a command did.
pub(crate) struct Ran {
    /// Exit code; -1 when a signal ended it, also for taking too long.
    pub(crate) code: i32,
    /// Both of its outputs.
    pub(crate) text: String,
}

/// An empty folder for examples and a run-time folder of their own.
pub(crate) struct Ground {
    folder: PathBuf,
    run: PathBuf,
    printed: PathBuf,
    cleared: bool,
    /// Removed last.
    _keep: tempfile::TempDir,
}

impl Ground {
    pub(crate) fn new() -> Self {
        let keep = tempfile::tempdir().expect("make a temporary folder");
        let root = fs::canonicalize(keep.path()).expect("the real path of the folder");
        let (folder, run) = (root.join("here"), root.join("run"));
        for path in [&folder, &run] {
            fs::create_dir(path).expect("make a folder");
        }
        Self { folder, run, printed: root.join("printed"), cleared: false, _keep: keep }
    }

    /// Where the examples run.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn command(&self, program: &str) -> Command {
        let tools = Path::new(PLOOP).parent().expect("the folder of the built command");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .env("PATH", format!("{}:{path}", tools.display()))
            .env("PLOOP_RUN_DIR", &self.run)
            .env("LC_ALL", "C")
            .env_remove("COLUMNS")
            .stdin(Stdio::null());
        if !may_protect_servers() {
            command.env("PLOOP_ALLOW_RECLAIM_STALL", "1");
        }
        command
    }

    /// Runs a command line and waits for it.
    pub(crate) fn run(&self, line: &str) -> Ran {
        // A file, for a pipe would be kept open by servers that the command leaves running.
        let printed = File::create(&self.printed).expect("make the file for what is printed");
        let second = printed.try_clone().expect("a second descriptor");
        let mut command = self.command("sh");
        command.args(["-c", line]).stdout(printed).stderr(second).process_group(0);
        let mut child = command.spawn().expect("start sh");
        let group = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        let deadline = Instant::now() + COMMAND_MAX;
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait for sh") {
                break status;
            }
            if Instant::now() >= deadline {
                killpg(group, Signal::SIGKILL).ok();
                break child.wait().expect("wait for sh");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text =
            String::from_utf8_lossy(&fs::read(&self.printed).expect("read what was printed")).into_owned();
        Ran { code: status.code().unwrap_or(-1), text }
    }

    /// Unmounts what the examples left; says what that was.
    pub(crate) fn clear(mut self) -> Vec<String> {
        self.cleared = true;
        self.undo()
    }

    fn undo(&self) -> Vec<String> {
        let mut left = Vec::new();
        let root = self.folder.parent().expect("the folder lies in another");
        for point in mount_points_below(&self.folder) {
            Command::new("fsfreeze").arg("-u").arg(&point).stderr(Stdio::null()).status().ok();
            Command::new("umount").arg(&point).stderr(Stdio::null()).status().ok();
            left.push(point.display().to_string());
        }
        let listed = self.command(PLOOP).args(["--json", "list"]).output();
        let listed = listed.map(|output| output.stdout).unwrap_or_default();
        let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap_or_default();
        for disk in listed["disks"].as_array().into_iter().flatten() {
            left.push(format!("{} ({})", disk["disk"], disk["device"]));
            if let Some(device) = disk["device"].as_str() {
                self.command(PLOOP).args(["umount", "-d", device]).stdout(Stdio::null()).status().ok();
            }
        }
        // Only what would not go by itself is still here.
        for device in loop_devices_below(root) {
            Command::new("losetup").arg("-d").arg(&device).stderr(Stdio::null()).status().ok();
            left.push(device);
        }
        for disk in listed["disks"].as_array().into_iter().flatten() {
            for process in ["keeper", "server"] {
                let id = disk[process].as_i64().and_then(|id| i32::try_from(id).ok()).filter(|id| *id > 1);
                if let Some(id) = id.filter(|id| is_ours(*id, &self.run)) {
                    kill(Pid::from_raw(id), Signal::SIGKILL).ok();
                }
            }
        }
        for point in mount_points_below(root) {
            Command::new("umount").arg("-l").arg(&point).stderr(Stdio::null()).status().ok();
        }
        left
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if !self.cleared {
            self.undo();
        }
    }
}

/// Whether a process serves a disk of this run-time folder: its number may be another's by now.
fn is_ours(id: i32, run: &Path) -> bool {
    let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(&*run.to_string_lossy())
}

/// Mount points below a folder, the last mounted first.
fn mount_points_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
    points.reverse();
    points
}

/// Loop devices whose file lies below a folder.
fn loop_devices_below(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            Path::new(file.trim()).starts_with(folder)
        })
        .map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy()))
        .collect()
}

/// Whether this process has the capabilities by which a server is kept from waiting for its own device.
fn may_protect_servers() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    let held = u64::from_str_radix(line.trim(), 16).unwrap_or(0);
    [CAP_IPC_LOCK, CAP_SYS_RESOURCE].iter().all(|capability| held & (1 << capability) != 0)
}

#[test]
fn what_is_left_is_found_and_cleared() {
    let ground = Ground::new();
    let ran = ground.run("echo a; echo b >&2; pwd; exit 3");
    assert_eq!((ran.code, &*ran.text), (3, &*format!("a\nb\n{}\n", ground.folder().display())));
    assert!(ground.run("ploop --version").text.starts_with("ploop "));
    assert!(ground.clear().is_empty());
}
