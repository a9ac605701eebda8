//! The operator's freeze and thaw commands: the one place where a shell reads something (H1). It reads exactly what the
//! local operator typed, passed on as one word, nothing inserted.
//!
//! A command runs in a process group of its own and is ended with that group when it takes too long. It begins only when
//! its group has been recorded: there is no moment at which it could outlive whoever started it unseen. What it prints
//! goes to a file in memory of a bounded size, which never makes it wait, and not even a service that it leaves behind:
//! a command that waits for a terminal that nobody reads would keep the guest stopped.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use ploop_core::{Error, ErrorKind, Result};

/// How long a command may take when nothing else was said.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// Set to `freeze` or `thaw` for the command that runs.
pub const PHASE_VARIABLE: &str = "PLOOP_PHASE";
/// Runs the operator's command, its `$0`, once told to. Told nothing, as its parent has died, it runs nothing.
const START: &str = "read -r go && exec sh -c \"$0\" </dev/null";
/// How often a running command is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// How long a command may take to obey before it is killed.
const OBEY: Duration = Duration::from_millis(500);
/// What a command may print.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;
/// What of that is passed on: the last words matter.
const TAIL_BYTES_MAX: u64 = 16 << 10;

/// Which of the two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Stops the writers.
    Freeze,
    /// Undoes that.
    Thaw,
}

impl Phase {
    /// As the command finds it in [`PHASE_VARIABLE`].
    pub fn word(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
        }
    }
}

/// The operator's command and how long it may take.
#[derive(Clone, Debug)]
pub struct FreezeHook {
    /// Which it is.
    pub phase: Phase,
    /// As typed.
    pub command: String,
    /// It is ended after this.
    pub timeout: Duration,
}

/// Who looks after a running command.
pub trait Overseer {
    /// The command's process group, which is its process; the command begins when this returns.
    fn begins(&mut self, group: u32) -> Result<()>;
    /// Whether it is to be ended now.
    fn is_revoked(&mut self) -> bool;
    /// What it has printed.
    fn printed(&mut self, text: &[u8]);
}

/// Nobody stops it, and what it prints goes to standard error.
pub struct Unattended;

impl Overseer for Unattended {
    fn begins(&mut self, _group: u32) -> Result<()> {
        Ok(())
    }
    fn is_revoked(&mut self) -> bool {
        false
    }
    fn printed(&mut self, text: &[u8]) {
        // There is nowhere to tell that it cannot be told.
        let _ = io::stderr().write_all(text);
    }
}

impl FreezeHook {
    /// Runs the command to its end. [`ErrorKind::NotQuiet`] when it fails, cannot be run or takes too long,
    /// [`ErrorKind::Cancelled`] when it was revoked.
    pub fn run(&self, overseer: &mut dyn Overseer) -> Result<()> {
        self.run_prepared(overseer, |_| {})
    }

    /// As [`run`](Self::run), in the surroundings that `prepare` makes.
    pub(crate) fn run_prepared(
        &self,
        overseer: &mut dyn Overseer,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<()> {
        let what = format!("{} command \"{}\"", self.phase.word(), self.command);
        let failed = |found: String| {
            Error::new(ErrorKind::NotQuiet, format!("{what}: {found}")).advise(match self.phase {
                Phase::Freeze => "run the command by hand; it must stop whatever writes to the disk and end with 0",
                Phase::Thaw => "run the command by hand; it must let go on what the freeze command has stopped, and end with 0",
            })
        };
        let cannot_run = |error: io::Error| failed(format!("cannot be run: {error}"));
        let (output, second) =
            output_file().and_then(|file| Ok((file.try_clone()?, file))).map_err(cannot_run)?;
        let mut told = output.try_clone().map_err(cannot_run)?;
        let mut command = Command::new("sh");
        prepare(&mut command);
        let child = command
            .args(["-c", START])
            .arg(&self.command)
            .env(PHASE_VARIABLE, self.phase.word())
            .stdin(Stdio::piped())
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(second))
            .process_group(0)
            .spawn()
            .map_err(cannot_run)?;
        let mut running = Running(Some(child));
        running.start(overseer)?;
        let ended = running.wait(self.timeout, overseer).map_err(|error| failed(error.to_string()))?;
        drop(running);
        let tail = tail(&mut told).unwrap_or_default();
        if !tail.is_empty() {
            overseer.printed(&tail);
        }
        match ended {
            Ended::Status(status) if status.success() => Ok(()),
            Ended::Status(status) => Err(failed(format!("it failed ({status}){}", last_line(&tail)))),
            Ended::Late => {
                Err(failed(format!("it took longer than {} s and was ended", self.timeout.as_secs_f64())))
            }
            Ended::Revoked => Err(Error::new(ErrorKind::Cancelled, format!("{what}: it was ended"))),
        }
    }
}

/// A file in memory that takes so much and no more.
fn output_file() -> io::Result<File> {
    let file = File::from(memfd_create("hook-output", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(OUTPUT_BYTES_MAX)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

/// The last of what was printed: the command writes through the same file position.
fn tail(file: &mut File) -> io::Result<Vec<u8>> {
    let end = file.stream_position()?;
    let begin = end.saturating_sub(TAIL_BYTES_MAX);
    // Of another descriptor, so that whoever still prints is not moved.
    let mut own = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))?;
    own.seek(SeekFrom::Start(begin))?;
    let mut bytes = Vec::new();
    own.take(end - begin).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last line, for a message.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let line: String = line.chars().filter(|sign| !sign.is_control()).take(200).collect();
    if line.is_empty() { line } else { format!(": {line}") }
}

enum Ended {
    Status(ExitStatus),
    Late,
    Revoked,
}

/// A command with its process group; ended on drop unless it has ended.
struct Running(Option<Child>);

impl Running {
    /// Lets the command begin.
    fn start(&mut self, overseer: &mut dyn Overseer) -> Result<()> {
        let Some(child) = &mut self.0 else { return Ok(()) };
        overseer.begins(child.id())?;
        if let Some(mut input) = child.stdin.take() {
            // A shell that is gone already tells why by its status.
            let _ = input.write_all(b"\n");
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration, overseer: &mut dyn Overseer) -> io::Result<Ended> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.status()? {
                return Ok(Ended::Status(status));
            }
            if begun.elapsed() >= timeout {
                return Ok(Ended::Late);
            }
            if overseer.is_revoked() {
                return Ok(Ended::Revoked);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The status of the command if it has ended. Its number is its own until here.
    fn status(&mut self) -> io::Result<Option<ExitStatus>> {
        match &self.0 {
            Some(child) if has_ended(child)? => self.0.take().map(|mut child| child.wait()).transpose(),
            _ => Ok(None),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        if let Ok(id) = i32::try_from(child.id()) {
            // It keeps its number until it is waited for.
            end_group(Pid::from_raw(id), || has_ended(&child).unwrap_or(true));
        }
        let _ = child.wait();
    }
}

/// Whether a child has ended; it keeps its number until it is waited for.
fn has_ended(child: &Child) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let how = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    match waitid(Id::Pid(Pid::from_raw(pid)), how) {
        Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Ends a process group, politely at first, unless its leader has ended by itself. Failures mean that it has ended.
pub(crate) fn end_group(group: Pid, mut has_ended: impl FnMut() -> bool) {
    let _ = killpg(group, Signal::SIGTERM);
    // One that is stopped hears nothing else.
    let _ = killpg(group, Signal::SIGCONT);
    let begun = Instant::now();
    while !has_ended() && begun.elapsed() < OBEY {
        std::thread::sleep(LOOK);
    }
    let _ = killpg(group, Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, timeout_ms: u64) -> Result<()> {
        let timeout = Duration::from_millis(timeout_ms);
        FreezeHook { phase: Phase::Freeze, command: command.into(), timeout }.run(&mut Unattended)
    }

    /// Ends the command as soon as it runs, and keeps what it printed.
    #[derive(Default)]
    struct Impatient {
        revokes: bool,
        printed: Vec<u8>,
    }

    impl Overseer for Impatient {
        fn begins(&mut self, _group: u32) -> Result<()> {
            Ok(())
        }
        fn is_revoked(&mut self) -> bool {
            self.revokes
        }
        fn printed(&mut self, text: &[u8]) {
            self.printed.extend(text);
        }
    }

    #[test]
    fn a_hook_succeeds_or_is_not_quiet() {
        hook("true && exit 0", 10_000).unwrap();
        for wrong in ["exit 3", "/nonexistent/command"] {
            assert_eq!(hook(wrong, 10_000).unwrap_err().kind(), ErrorKind::NotQuiet, "{wrong}");
        }
        let error = hook("echo why; echo 'it cannot' >&2; exit 3", 10_000).unwrap_err();
        assert!(error.to_string().ends_with(": it cannot"), "{error}");
    }

    #[test]
    fn a_hanging_hook_is_ended_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let command = format!("sleep 1000 & echo $! > {}; wait", file.display());
        // A busy machine may take longer to start it than the first of these.
        for timeout_ms in [100, 1000, 10_000, 100_000] {
            let error = hook(&command, timeout_ms).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotQuiet);
            assert!(error.to_string().contains("was ended"), "{error}");
            let child = std::fs::read_to_string(&file).unwrap_or_default();
            if let Ok(child) = child.trim().parse() {
                // Its death is on the way; who reaps it is not ours to know.
                let gone = || match std::fs::read_to_string(format!("/proc/{}/stat", Pid::from_raw(child))) {
                    Ok(status) => status.rsplit(')').next().is_some_and(|rest| rest.trim().starts_with('Z')),
                    Err(_) => true,
                };
                let is_gone = (0..10_000).any(|_| {
                    std::thread::sleep(LOOK);
                    gone()
                });
                assert!(is_gone, "its child lives on");
                return;
            }
        }
        panic!("it was never started");
    }

    #[test]
    fn revoking_ends_a_hook() {
        let hook =
            FreezeHook { phase: Phase::Freeze, command: "sleep 10".into(), timeout: Duration::from_secs(10) };
        let mut overseer = Impatient { revokes: true, ..Impatient::default() };
        assert_eq!(hook.run(&mut overseer).unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn what_a_hook_prints_never_makes_it_wait_and_its_last_words_are_kept() {
        let command = "head -c 3000000 /dev/zero; echo this far 2>/dev/null; exit 0";
        let hook = |command: &str| FreezeHook {
            phase: Phase::Thaw,
            command: command.into(),
            timeout: Duration::from_secs(100),
        };
        hook(command).run(&mut Impatient::default()).unwrap();
        let mut overseer = Impatient::default();
        hook("echo $PLOOP_PHASE; echo two >&2").run(&mut overseer).unwrap();
        assert_eq!(overseer.printed, b"thaw\ntwo\n");
    }

    #[test]
    fn a_command_whose_parent_died_before_it_was_recorded_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ran");
        let mut command = Command::new("sh");
        command.args(["-c", START]).arg(format!("touch {}", file.display())).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdin.take());
        assert!(!child.wait().unwrap().success());
        assert!(!file.exists());
    }

    #[test]
    fn a_command_comes_to_its_shell_as_it_was_typed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("said");
        let command = format!("a='x  y'; printf '%s|%s|' \"$a\" \"$#\" > {0}; cat >> {0}", file.display());
        hook(&command, 10_000).unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "x  y|0|", "and nothing on its standard input");
    }
}
