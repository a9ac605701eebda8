//! Where served disks are tested: a folder, a run-time folder of its own, and everything undone at the end.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use crate::patience::{PATIENCE, becomes};
use crate::referee::{self, JudgedFolder};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Runtime, State};
use ploop_core::io::IoBuf;
use ploop_core::ops;
use ploop_core::units::Sectors;

/// The command under test.
const PLOOP: &str = env!("CARGO_BIN_EXE_ploop");

/// Why disks cannot be served here; `None` when they can.
fn obstacle() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root");
    }
    if File::open("/dev/fuse").is_err() || File::open("/dev/loop-control").is_err() {
        return Some("it needs /dev/fuse and loop devices");
    }
    None
}

/// Whether a successor can take over on this kernel (Linux 6.9).
pub(crate) fn can_take_over() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let mut numbers =
        release.split(|byte: char| !byte.is_ascii_digit()).map(|text| text.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 9)
}

/// A path as a word of a command line.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("tests name no other paths")
}

/// A test's own folder. Whatever is mounted and served in it ends with it.
pub(crate) struct Ground {
    folder: JudgedFolder,
}

impl Ground {
    /// A new one, or nothing with the reason printed.
    pub(crate) fn new() -> Option<Self> {
        if let Some(reason) = obstacle() {
            ploop_testing::skip(ploop_testing::Need::MountedDisks, reason);
            return None;
        }
        Some(Self { folder: referee::folder() })
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new folder in the folder.
    pub(crate) fn make_folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("make a folder");
        path
    }

    /// Makes a disk of `size_mib` with clusters of `cluster_kib` and gives its image.
    pub(crate) fn create(&self, name: &str, size_mib: u64, cluster_kib: u64) -> PathBuf {
        let folder = self.make_folder(name);
        let options = ops::create::CreateOptions {
            cluster: Sectors(cluster_kib * 2),
            ..ops::create::CreateOptions::new(folder, "disk.hds", Sectors(size_mib * 2048))
        };
        ops::create(&options).expect("create a disk").image
    }

    /// A command line.
    pub(crate) fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(PLOOP);
        command.args(line).env("PLOOP_RUN_DIR", self.path("run"));
        // Not every place where tests run has CAP_SYS_RESOURCE; tests are short of no memory.
        command.env("PLOOP_ALLOW_RECLAIM_STALL", "1");
        command
    }

    /// Runs a command line.
    pub(crate) fn run(&self, line: &[&str]) -> Output {
        self.command(line).output().expect("start ploop")
    }

    /// Runs a command line that must end with `code`; what it printed and complained.
    #[track_caller]
    pub(crate) fn ends_with(&self, code: i32, line: &[&str]) -> String {
        let output = self.run(line);
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line:?}: {text}\n{}", self.logs());
        text
    }

    /// Starts a command line that goes on while the test does something else.
    #[track_caller]
    pub(crate) fn start(&self, line: &[&str]) -> Running<'_> {
        let said = tempfile::tempfile_in(self.folder.path()).expect("a file for what it says");
        let into = |file: &File| Stdio::from(file.try_clone().expect("one more descriptor"));
        let mut command = self.command(line);
        let child = command.stdin(Stdio::null()).stdout(into(&said)).stderr(into(&said)).spawn();
        Running { ground: self, line: line.join(" "), child: child.expect("start ploop"), said }
    }

    /// Starts a command line and waits until the server of the only disk works at `job` for it.
    #[track_caller]
    pub(crate) fn start_job(&self, job: &str, line: &[&str]) -> Running<'_> {
        let mut running = self.start(line);
        running.wait_until(job, || self.status()["jobs"].as_array().unwrap().contains(&job.into()));
        running
    }

    /// Mounts and gives the device.
    #[track_caller]
    pub(crate) fn mount(&self, line: &[&str]) -> PathBuf {
        let text = self.ends_with(0, &[&["mount"], line].concat());
        PathBuf::from(text.lines().next().expect("the device is printed"))
    }

    pub(crate) fn runtime(&self) -> Runtime {
        Runtime::at(self.path("run")).expect("the run-time folder")
    }

    /// The record of the only disk served that is written to; others may be its snapshots.
    #[track_caller]
    pub(crate) fn state(&self) -> State {
        let states = self.runtime().states().expect("read the records");
        let mut writing = states.iter().filter(|state| !state.open.read_only || states.len() == 1);
        let (Some(state), None) = (writing.next(), writing.next()) else { panic!("not one: {states:?}") };
        state.clone()
    }

    /// The control socket of that disk.
    #[track_caller]
    pub(crate) fn socket(&self) -> PathBuf {
        self.runtime().entry(&self.state().id).socket()
    }

    /// What keepers and servers have said, for messages of failed tests.
    pub(crate) fn logs(&self) -> String {
        let Ok(states) = self.runtime().states() else { return String::new() };
        let log = |state: &State| {
            fs::read_to_string(self.runtime().entry(&state.id).log_file()).unwrap_or_default()
        };
        states.iter().map(log).collect()
    }

    /// Asks the server of the only disk how it is.
    #[track_caller]
    pub(crate) fn status(&self) -> serde_json::Value {
        status_at(&self.socket()).expect("a status")
    }

    /// Kills the server of the only disk and waits until a successor serves it.
    #[track_caller]
    pub(crate) fn kill_server_and_wait(&self) {
        let before = self.state();
        signal(before.server.expect("there is a server").id, Signal::SIGKILL);
        self.wait_for_successor(&before);
    }

    /// Waits until another server than that of `before` serves the only disk.
    #[track_caller]
    pub(crate) fn wait_for_successor(&self, before: &State) {
        self.wait_until("a successor serves", || {
            let state = self.state();
            assert_eq!(state.failure, None, "{}", self.logs());
            state.server != before.server && self.is_ready()
        });
    }

    /// Whether the only disk is served.
    pub(crate) fn is_ready(&self) -> bool {
        status_at(&self.socket()).is_ok_and(|status| status["ready"] == true)
    }

    /// Waits until it is so; a test that waits in vain shows what the servers said.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, is_so: impl FnMut() -> bool) {
        assert!(becomes(is_so), "waited in vain until {what}: {}", self.logs());
    }
}

/// What the server behind a socket says of itself.
fn status_at(socket: &Path) -> ploop_core::Result<serde_json::Value> {
    Connection::open(socket)?.ask("status", &(), &[], Some(PATIENCE), |_| {})
}

/// A command that goes on while the test does something else. It does not outlive the test.
pub(crate) struct Running<'a> {
    ground: &'a Ground,
    line: String,
    child: Child,
    said: File,
}

impl Running<'_> {
    /// Waits for something that happens while the command runs: its end ends the test.
    #[track_caller]
    pub(crate) fn wait_until(&mut self, what: &str, mut is_so: impl FnMut() -> bool) {
        let ground = self.ground;
        ground.wait_until(what, || {
            // Looked at first: what the command has done before its end counts.
            let ended = self.child.try_wait().expect("look at the command");
            let so = is_so();
            assert!(so || ended.is_none(), "`{}` ended before {what}: {}", self.line, self.said());
            so
        });
    }

    /// Sends it a signal and waits for its end.
    #[track_caller]
    pub(crate) fn end_by(self, by: Signal) -> ExitStatus {
        signal(self.child.id(), by);
        self.wait()
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(mut self) -> ExitStatus {
        let mut ended = None;
        self.ground.wait_until(&format!("`{}` ends", self.line), || {
            ended = self.child.try_wait().expect("look at the command");
            ended.is_some()
        });
        let ended = ended.expect("it has ended");
        println!("`{}`: {ended}: {}", self.line, self.said());
        ended
    }

    /// What it has printed and complained.
    pub(crate) fn said(&self) -> String {
        let mut said =
            vec![0; usize::try_from(self.said.metadata().expect("a length").len()).expect("short")];
        self.said.read_exact_at(&mut said, 0).expect("read what was said");
        String::from_utf8_lossy(&said).into_owned()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // One that has ended is left alone.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Sends a signal to a process the test knows.
pub(crate) fn signal(process: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process).expect("a process id")), signal).expect("send a signal");
}

impl Drop for Ground {
    fn drop(&mut self) {
        let states = self.runtime().states().unwrap_or_default();
        for state in &states {
            if self.run(&["umount", &state.id]).status.success() {
                continue;
            }
            eprintln!("clean up {}: {}", state.id, self.logs());
            if let Some(device) = &state.loop_device {
                Command::new("umount").arg("-l").arg(device).output().ok();
                Command::new("losetup").arg("-d").arg(device).output().ok();
            }
            for process in [state.keeper, state.server].into_iter().flatten() {
                if process.is_running() {
                    signal(process.id, Signal::SIGKILL);
                }
            }
            self.runtime().entry(&state.id).remove().ok();
        }
    }
}

/// Runs a program that must succeed and gives what it printed.
#[track_caller]
pub(crate) fn program(name: &str, line: &[&str]) -> String {
    let output = Command::new(name).args(line).output().unwrap_or_else(|error| panic!("{name}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name} {line:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A block device opened past the page cache.
pub(crate) struct Direct(File);

impl Direct {
    pub(crate) fn open(device: &Path) -> Self {
        let file =
            fs::OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(device);
        Self(file.unwrap_or_else(|error| panic!("{}: {error}", device.display())))
    }

    /// For a device that refuses writes.
    pub(crate) fn open_to_read(device: &Path) -> Self {
        let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device);
        Self(file.unwrap_or_else(|error| panic!("{}: {error}", device.display())))
    }

    /// The same for another thread.
    pub(crate) fn another(&self) -> Self {
        Self(self.0.try_clone().expect("one more descriptor"))
    }

    /// Writes `len` bytes that say where they are and in which `round` they were written.
    pub(crate) fn write(&self, offset: u64, len: usize, round: u64) -> std::io::Result<()> {
        let mut buffer = IoBuf::try_zeroed(len)?;
        stamp(buffer.as_mut_slice(), offset, round);
        self.0.write_all_at(buffer.as_slice(), offset)
    }

    /// Reads `len` bytes.
    pub(crate) fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut buffer = IoBuf::try_zeroed(len)?;
        self.0.read_exact_at(buffer.as_mut_slice(), offset)?;
        Ok(buffer.as_slice().to_vec())
    }

    /// Checks that [`write`](Self::write) of `round` is what is there.
    #[track_caller]
    pub(crate) fn expect(&self, offset: u64, len: usize, round: u64) {
        let found = self.read(offset, len).expect("read");
        expect_stamped(&found, offset, round);
    }

    pub(crate) fn sync(&self) -> std::io::Result<()> {
        self.0.sync_all()
    }
}

/// Fills bytes with what tells place and round.
pub(crate) fn stamp(bytes: &mut [u8], offset: u64, round: u64) {
    for (index, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (offset + index as u64 * 8).rotate_left(20).wrapping_add(round << 1 | 1).to_le_bytes();
    }
}

/// Checks bytes that were filled with [`stamp`].
#[track_caller]
pub(crate) fn expect_stamped(found: &[u8], offset: u64, round: u64) {
    let mut expected = vec![0; found.len()];
    stamp(&mut expected, offset, round);
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        let zero = found.iter().all(|&byte| byte == 0);
        panic!("byte {} is not that of round {round} (all zero: {zero})", offset + at as u64);
    }
}
