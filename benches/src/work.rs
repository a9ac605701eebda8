//! What every bench needs: a work folder, child processes with their times and memory, disks that clean up.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where work folders are made: `PLOOP_BENCH_DIR`, or /var/tmp, which is on a disk.
pub fn base_folder() -> PathBuf {
    std::env::var_os("PLOOP_BENCH_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

fn cpu_of(who: UsageWho) -> Result<f64, Failure> {
    let usage = getrusage(who)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    #[allow(clippy::cast_precision_loss)]
    Ok(microseconds as f64 / 1e6)
}

/// Processor time of this process.
pub fn cpu_seconds() -> Result<f64, Failure> {
    cpu_of(UsageWho::RUSAGE_SELF)
}

/// Processor time of all children that have ended.
pub fn cpu_seconds_of_children() -> Result<f64, Failure> {
    cpu_of(UsageWho::RUSAGE_CHILDREN)
}

/// A failed step of a bench, in words.
pub type Failure = Box<dyn std::error::Error>;

/// Where a bench works and which `ploop` it measures.
pub struct Work {
    folder: tempfile::TempDir,
    ploop: PathBuf,
}

impl Work {
    /// A new folder below the [`base_folder`], with its own run-time folder.
    pub fn new() -> Result<Self, Failure> {
        let base = base_folder();
        let own = std::env::current_exe()?;
        let ploop = own.with_file_name("ploop");
        if !ploop.exists() {
            return Err(format!("{}: build the workspace first (make bench does)", ploop.display()).into());
        }
        let folder = tempfile::Builder::new().prefix("ploop-bench-").tempdir_in(base)?;
        Ok(Self { folder, ploop })
    }

    /// A path in the work folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new sub-folder.
    pub fn folder(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Refuses to start what this folder has no room for.
    pub fn need_bytes(&self, bytes: u64) -> Result<(), Failure> {
        let found = nix::sys::statvfs::statvfs(self.folder.path())?;
        let free = found.blocks_available() * found.fragment_size();
        if free >= bytes + bytes / 8 {
            return Ok(());
        }
        let folder = self.folder.path().display();
        Err(format!("{folder}: {} MiB are free, this takes {} MiB", free >> 20, bytes >> 20).into())
    }

    /// The measured `ploop`, ready for arguments.
    pub fn ploop(&self) -> Command {
        let mut command = Command::new(&self.ploop);
        command.env("PLOOP_RUN_DIR", self.path("run"));
        // No bench runs short of memory, so a machine that withholds the protection against it can still be measured.
        command.env("PLOOP_ALLOW_RECLAIM_STALL", "1");
        command
    }
}

/// Runs a command to its end; its output is shown only if it fails.
pub fn run(command: &mut Command) -> Result<String, Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?}: {}: {errors}", output.status).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a program can be started.
pub fn have(program: &str) -> bool {
    Command::new("which").arg(program).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// What a finished child used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Seconds from its start to its end.
    pub wall_seconds: f64,
    /// Its largest resident memory, in MiB.
    pub peak_mib: f64,
}

/// A child whose use of memory is asked when it is reaped.
pub struct Measured {
    child: Child,
    started: Instant,
}

impl Measured {
    /// Starts the command.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let started = Instant::now();
        Ok(Self { child: command.spawn()?, started })
    }

    /// The child's standard output, once.
    pub fn take_output(&mut self) -> Option<OwnedFd> {
        self.child.stdout.take().map(OwnedFd::from)
    }

    /// Waits for a good end. The peak is read from the process's own file just before it is reaped by polling it,
    /// so it is of this child alone.
    pub fn finish(mut self) -> Result<Usage, Failure> {
        let status_file = format!("/proc/{}/status", self.child.id());
        let mut peak_kib = 0u64;
        let status = loop {
            if let Ok(text) = std::fs::read_to_string(&status_file) {
                let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
                let value = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
                peak_kib = peak_kib.max(value.unwrap_or(0));
            }
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let wall_seconds = self.started.elapsed().as_secs_f64();
        if !status.success() {
            return Err(format!("a measured child failed: {status}").into());
        }
        #[allow(clippy::cast_precision_loss)]
        Ok(Usage { wall_seconds, peak_mib: peak_kib as f64 / 1024.0 })
    }
}

/// The numbers of at most so many rounds; none but the first is begun after `time`, so that a bench ends on a busy host, too.
pub fn rounds(rounds_max: usize, time: Duration) -> impl Iterator<Item = usize> {
    let begun = Instant::now();
    (0..rounds_max).take_while(move |round| *round == 0 || begun.elapsed() < time)
}

/// Empties the page cache, so that every contestant reads from the disk.
pub fn drop_caches() {
    // Without root the caches stay warm, for all contestants alike.
    let _ = Command::new("sync").status();
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
}

/// A mounted ploop disk; unmounted when dropped.
pub struct Mounted<'a> {
    work: &'a Work,
    /// DiskDescriptor.xml.
    pub descriptor: PathBuf,
    /// Where its file system is.
    pub mount_point: PathBuf,
    /// Its block device.
    pub device: String,
}

impl<'a> Mounted<'a> {
    /// Makes an ext4 disk of that size and mounts it.
    pub fn create(work: &'a Work, name: &str, size: &str) -> Result<Self, Failure> {
        let folder = work.folder(name)?;
        run(work.ploop().args(["init", "-s", size, "-t", "ext4"]).arg(folder.join("root.hds")))?;
        let (descriptor, mount_point) =
            (folder.join("DiskDescriptor.xml"), work.folder(&format!("{name}.mnt"))?);
        let device = run(work.ploop().args(["mount", "-m"]).arg(&mount_point).arg(&descriptor))?;
        Ok(Self { work, descriptor, mount_point, device })
    }

    /// The device of a disk without a file system, in clusters of 1 MiB.
    pub fn bare(work: &'a Work, name: &str, size: &str) -> Result<Self, Failure> {
        Self::bare_in_clusters(work, name, size, 1024)
    }

    /// The device of a disk without a file system.
    pub fn bare_in_clusters(
        work: &'a Work,
        name: &str,
        size: &str,
        cluster_kib: u32,
    ) -> Result<Self, Failure> {
        let folder = work.folder(name)?;
        let sectors = (cluster_kib * 2).to_string();
        run(work
            .ploop()
            .args(["init", "-s", size, "-t", "none", "-b", &sectors])
            .arg(folder.join("root.hds")))?;
        let descriptor = folder.join("DiskDescriptor.xml");
        let device = run(work.ploop().arg("mount").arg(&descriptor))?;
        Ok(Self { work, descriptor, mount_point: PathBuf::new(), device })
    }
}

impl Mounted<'_> {
    /// Makes a snapshot; the report of the command.
    pub fn snapshot(&self) -> Result<serde_json::Value, Failure> {
        let text = run(self.work.ploop().args(["--json", "snapshot"]).arg(&self.descriptor))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The images of the disk.
    pub fn folder(&self) -> &Path {
        self.descriptor.parent().unwrap_or(Path::new("/"))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Err(failure) = run(self.work.ploop().arg("umount").arg(&self.descriptor)) {
            eprintln!("unmounting after a bench: {failure}");
        }
    }
}

/// Fills a folder with real files up to about that many bytes: the machine's own /usr, libraries first.
pub fn fill_with_real_files(target: &Path, bytes_max: u64) -> Result<u64, Failure> {
    let mut copied = 0;
    for source in ["/usr/lib", "/usr/share", "/usr/bin", "/usr/include"] {
        copied +=
            copy_tree(Path::new(source), &target.join(source.trim_start_matches('/')), bytes_max - copied)?;
        if copied + (1 << 20) >= bytes_max {
            break;
        }
    }
    Ok(copied)
}

fn copy_tree(source: &Path, target: &Path, bytes_max: u64) -> Result<u64, Failure> {
    std::fs::create_dir_all(target)?;
    let mut copied = 0;
    for entry in std::fs::read_dir(source)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        if kind.is_dir() {
            copied += copy_tree(&from, &to, bytes_max.saturating_sub(copied))?;
        } else if kind.is_file() && copied + entry.metadata()?.len() <= bytes_max {
            copied += std::fs::copy(&from, &to)?;
        }
        if copied >= bytes_max {
            break;
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::rounds;
    use std::time::Duration;

    #[test]
    fn there_is_a_first_round_however_late() {
        assert_eq!(rounds(3, Duration::ZERO).collect::<Vec<_>>(), [0]);
        assert_eq!(rounds(3, Duration::MAX).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(rounds(0, Duration::MAX).count(), 0);
    }
}
