//! A place to run the command on real disks: a work folder, a run-time folder of its own, and everything that was
//! mounted or started undone when it goes, also after a failure.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::patience::becomes;
use crate::referee::JudgedFolder;

/// One run of `ploop` that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The exit code; -1 when a signal ended it.
    pub(crate) code: i32,
    /// What it printed.
    pub(crate) stdout: String,
    /// What it complained.
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Checks the exit code and that stderr holds `words`.
    #[track_caller]
    pub(crate) fn failed_with(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in: {}", self.stderr);
        }
    }

    /// Checks success and gives stdout.
    #[track_caller]
    pub(crate) fn succeeded(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// The JSON lines of stderr.
    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        self.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// A mounted disk.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    /// The block device that holds the file system.
    pub(crate) device: PathBuf,
    /// Where it is mounted.
    pub(crate) point: PathBuf,
}

/// What happened while a freeze command ran; see [`Stage::answer_hook`].
pub(crate) struct Hook {
    folder: PathBuf,
}

impl Hook {
    /// The freeze command: says that it began and waits for the answer.
    pub(crate) fn command(&self) -> String {
        let folder = self.folder.display();
        format!("touch '{folder}/began'; until [ -e '{folder}/go' ]; do sleep 0.002; done")
    }

    /// Waits until the command has begun, calls `act`, and lets it end; `stop` ends the wait.
    pub(crate) fn answer(&self, stop: &AtomicBool, act: impl FnOnce()) {
        let has_begun = || self.folder.join("began").exists();
        if becomes(|| has_begun() || stop.load(Ordering::SeqCst)) && has_begun() {
            act();
            fs::write(self.folder.join("go"), "").expect("answer the freeze command");
        }
    }
}

/// The place.
pub(crate) struct Stage {
    ploop: PathBuf,
    points: Mutex<Vec<PathBuf>>,
    /// Judged and removed last, when nothing in it is mounted any more.
    folder: JudgedFolder,
}

impl Stage {
    /// Why disks cannot be mounted here, if so.
    pub(crate) fn obstacle() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("mounting needs root".to_owned());
        }
        for (path, what) in [("/dev/fuse", "FUSE"), ("/dev/loop-control", "loop devices")] {
            match fs::metadata(path) {
                Ok(meta) if meta.file_type().is_char_device() => {}
                _ => return Some(format!("no {path}: the kernel offers no {what}")),
            }
        }
        None
    }

    /// A place in `folder` for the command `ploop`.
    pub(crate) fn new(ploop: &Path, folder: JudgedFolder) -> io::Result<Self> {
        fs::create_dir_all(folder.path().join("run"))?;
        Ok(Self { ploop: ploop.to_owned(), points: Mutex::default(), folder })
    }

    /// A path in the work folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command line, without input.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(&self.ploop);
        command.args(arguments).stdin(Stdio::null());
        command.env("PLOOP_RUN_DIR", self.folder.path().join("run")).env_remove("COLUMNS");
        if !may_protect_servers() {
            command.env("PLOOP_ALLOW_RECLAIM_STALL", "1");
        }
        command
    }

    /// Runs a command line and waits.
    pub(crate) fn ploop<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Ran {
        self.command(arguments).output().expect("start ploop").into()
    }

    /// Makes a disk in its own folder and gives its image.
    #[track_caller]
    pub(crate) fn init(&self, name: &str, options: &[&str]) -> PathBuf {
        let image = self.path(name).join("disk.hds");
        fs::create_dir_all(self.path(name)).expect("make the folder of a disk");
        let mut line = vec!["init"];
        line.extend(options);
        let path = image.to_string_lossy().into_owned();
        line.push(&path);
        self.ploop(&line).succeeded();
        image
    }

    /// Mounts a disk; it is unmounted when the stage goes.
    #[track_caller]
    pub(crate) fn mount(&self, disk: &Path, options: &[&str]) -> Mounted {
        let number = self.points.lock().expect("no panic with the list").len();
        let point = self.path(&format!("mount-{number}"));
        fs::create_dir_all(&point).expect("make a mount point");
        let (disk, text) = (disk.to_string_lossy(), point.to_string_lossy());
        let mut line = vec!["mount", "-m", &text];
        line.extend(options);
        line.push(&disk);
        self.points.lock().expect("no panic with the list").push(point.clone());
        let printed = self.ploop(&line).succeeded();
        let device = printed.split_whitespace().find(|word| word.starts_with("/dev/"));
        let device = device.unwrap_or_else(|| panic!("no device in {printed:?}"));
        Mounted { device: device.into(), point }
    }

    /// Unmounts a mount point.
    #[track_caller]
    pub(crate) fn umount(&self, mounted: &Mounted) {
        self.ploop(&["umount", "-m", &mounted.point.to_string_lossy()]).succeeded();
        self.points.lock().expect("no panic with the list").retain(|point| *point != mounted.point);
    }

    /// A freeze command of one copy.
    pub(crate) fn hook(&self, name: &str) -> Hook {
        let folder = self.path(name);
        fs::create_dir_all(&folder).expect("make the folder of a freeze command");
        Hook { folder }
    }

    /// Runs a sender and a receiver with a pipe between them, `look` at each line of the sender's stderr.
    pub(crate) fn copy(&self, sender: &[&str], receiver: &[&str], mut look: impl FnMut(&str)) -> (Ran, Ran) {
        let mut send =
            self.command(sender).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start ploop");
        let pipe = send.stdout.take().expect("a pipe");
        let receive =
            self.command(receiver).stdin(pipe).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let receive = Reaped(Some(receive.expect("start ploop")));
        let mut stderr = String::new();
        for line in BufReader::new(send.stderr.take().expect("a pipe")).lines() {
            let line = line.expect("read the sender's stderr");
            look(&line);
            stderr += &line;
            stderr.push('\n');
        }
        let code = send.wait().expect("wait for the sender").code().unwrap_or(-1);
        (Ran { code, stdout: String::new(), stderr }, receive.wait())
    }
}

/// A child that is killed when it is forgotten.
pub(crate) struct Reaped(pub(crate) Option<Child>);

impl Reaped {
    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Ran {
        self.0.take().expect("waited for once").wait_with_output().expect("wait for ploop").into()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended by itself.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let points =
            std::mem::take(&mut *self.points.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for point in points.iter().rev() {
            // A test that failed may have left it frozen.
            Command::new("fsfreeze").arg("-u").arg(point).stderr(Stdio::null()).status().ok();
            let ran = self.ploop(&["umount", "-m", &point.to_string_lossy()]);
            if ran.code != 0 {
                eprintln!("clean up {}: {}", point.display(), ran.stderr);
                Command::new("umount").arg("-l").arg(point).stderr(Stdio::null()).status().ok();
            }
        }
    }
}

/// Whether this process has the capabilities by which a server is kept from waiting for its own device: in some
/// containers not even root has them.
fn may_protect_servers() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    let held = u64::from_str_radix(line.trim(), 16).unwrap_or(0);
    [CAP_IPC_LOCK, CAP_SYS_RESOURCE].iter().all(|capability| held & (1 << capability) != 0)
}

/// Whether two devices or files hold the same bytes; the first difference otherwise.
pub(crate) fn same_bytes(left: &Path, right: &Path) -> Result<u64, String> {
    let open = |path: &Path| {
        let is_block = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
        let flags = if is_block { nix::libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    let (mut left, mut right) = (open(left)?, open(right)?);
    let mut buffers = [
        ploop_core::io::IoBuf::try_zeroed(1 << 20).expect("memory"),
        ploop_core::io::IoBuf::try_zeroed(1 << 20).expect("memory"),
    ];
    let mut offset = 0;
    loop {
        let [first, second] = &mut buffers;
        let count = fill(&mut left, first.as_mut_slice())?;
        let other = fill(&mut right, second.as_mut_slice())?;
        if count != other {
            return Err(format!("one ends at byte {}, the other at {}", offset + count, offset + other));
        }
        if let Some(at) = (0..count).find(|at| first.as_slice()[*at] != second.as_slice()[*at]) {
            return Err(format!("they differ at byte {}", offset + at));
        }
        offset += count;
        if count < first.as_slice().len() {
            return Ok(offset as u64);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> Result<usize, String> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read(&mut buffer[done..]).map_err(|error| error.to_string())? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}
