//! Making writers stand still, and letting them go again whatever happens.
//!
//! [`Quiesce`] is what a sender asks for; who runs the operator's command and who holds the mount point is the
//! caller's matter (in a server the command runs in the operator's process). [`Frozen`] thaws when dropped.
//! [`LocalQuiesce`] does all of it in this process, and keeps a [`Guardian`]: a small process that thaws when this
//! one dies. It holds one end of a pipe; when the pipe closes without the word that all is well, it ends a freeze
//! command that still runs, and undoes the freeze. A freeze command starts only once the guardian knows its process
//! group: there is no moment at which it could outlive this process unseen.
//!
//! The freeze and thaw commands are the one place where a shell reads something (H1): exactly what the local operator
//! typed, passed on as one word, nothing inserted, in a process group of its own, killed when it takes too long. Its standard output is our
//! standard error, as standard output may be the stream.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::source::Gate;
use crate::transport::Cancel;

/// Hidden subcommand under which both programs run [`guardian_main`].
pub const GUARDIAN_SUBCOMMAND: &str = "guardian";
/// What a guardian reads when there is nothing to undo.
const ALL_IS_WELL: u8 = b'd';
/// What a guardian reads when a freeze may have begun.
const FREEZING: u8 = b'f';
/// What a guardian reads, with its number after it, when the process group of a freeze command is about to run.
const GROUP: u8 = b'g';
/// What a guardian reads when that has ended, before its number can be another's.
const GROUP_ENDED: u8 = b'e';
/// Runs the operator's command, its `$0`, once told to. Told nothing, as its parent has died, it runs nothing.
const START: &str = "read -r go && exec sh -c \"$0\" </dev/null";
/// The longest command a guardian takes.
const COMMAND_BYTES_MAX: usize = 1 << 20;
/// How often a running command is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// How long a command may take to obey before it is killed.
const OBEY: Duration = Duration::from_millis(500);

/// Stops and releases the writers of one disk. Called from the copy's thread, in this order: `sync_file_system` any
/// number of times, then `run_hook`, `freeze_file_system`, and `thaw` in any case once `run_hook` was called.
pub trait Quiesce: Send {
    /// Writes what the mounted file system still holds in memory, so that the freeze finds little to write. Whether
    /// anything was mounted.
    fn sync_file_system(&mut self) -> Result<bool>;
    /// Runs the operator's freeze command, if there is one. [`ErrorKind::NotQuiet`] when it fails, is missing or
    /// hangs.
    fn run_hook(&mut self) -> Result<()>;
    /// Freezes the mounted file system, if there is one.
    fn freeze_file_system(&mut self) -> Result<()>;
    /// Undoes both, as far as they were done. Harmless a second time.
    fn thaw(&mut self) -> Result<()>;
}

/// For a disk that nobody writes to: a closed image.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToQuiesce;

impl Quiesce for NothingToQuiesce {
    fn sync_file_system(&mut self) -> Result<bool> {
        Ok(false)
    }
    fn run_hook(&mut self) -> Result<()> {
        Ok(())
    }
    fn freeze_file_system(&mut self) -> Result<()> {
        Ok(())
    }
    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Writers stand still as long as this lives.
pub(crate) struct Frozen<'a> {
    quiesce: Option<&'a mut dyn Quiesce>,
    gate: Option<Box<dyn Gate>>,
}

impl<'a> Frozen<'a> {
    /// From here on, whatever happens, `thaw` is called.
    pub(crate) fn begin(quiesce: &'a mut dyn Quiesce) -> Self {
        Self { quiesce: Some(quiesce), gate: None }
    }

    pub(crate) fn run_hook(&mut self) -> Result<()> {
        self.quiesce.as_mut().map_or(Ok(()), |quiesce| quiesce.run_hook())
    }

    pub(crate) fn freeze_file_system(&mut self) -> Result<()> {
        self.quiesce.as_mut().map_or(Ok(()), |quiesce| quiesce.freeze_file_system())
    }

    /// Keeps the gate closed until the thaw.
    pub(crate) fn hold(&mut self, gate: Box<dyn Gate>) {
        self.gate = Some(gate);
    }

    /// Opens the gate first: a thaw may have to write.
    pub(crate) fn thaw(&mut self) -> Result<()> {
        self.gate = None;
        match self.quiesce.take() {
            None => Ok(()),
            Some(quiesce) => quiesce.thaw().or_else(|_| quiesce.thaw()),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Only after a panic is anything left to do here; nobody could be told of a failure.
        let _ = self.thaw();
    }
}

/// The operator's command and how long it may take.
#[derive(Clone, Debug)]
pub struct FreezeHook {
    /// As typed.
    pub command: String,
    /// It is killed after this.
    pub timeout: Duration,
}

impl FreezeHook {
    /// Runs the command to its end. [`ErrorKind::NotQuiet`] when it fails, cannot be run or takes too long.
    pub fn run(&self, what: &str, cancel: Option<&Cancel>) -> Result<()> {
        self.run_guarded(what, cancel, None)
    }

    /// As [`run`](Self::run); the guardian ends the command if this process dies before it does.
    fn run_guarded(
        &self,
        what: &str,
        cancel: Option<&Cancel>,
        guardian: Option<&mut Guardian>,
    ) -> Result<()> {
        let failed = |found: String| {
            Error::new(ErrorKind::NotQuiet, format!("{what} \"{}\": {found}", self.command))
                .advise("run the command by hand; it must stop whatever writes to the disk and end with 0")
        };
        let stderr = sys::duplicate(io::stderr()).map_err(|error| failed(error.to_string()))?;
        let child = Command::new("sh")
            .args(["-c", START])
            .arg(&self.command)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(stderr))
            .process_group(0)
            .spawn()
            .map_err(|error| failed(format!("cannot be run: {error}")))?;
        let mut running = Running { child: Some(child), guardian };
        running.start()?;
        match running.wait(self.timeout, cancel).map_err(|error| failed(error.to_string()))? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(failed(format!("it failed ({status})"))),
            None => {
                drop(running);
                cancel.map_or(Ok(()), Cancel::check)?;
                Err(failed(format!("it took longer than {} s and was killed", self.timeout.as_secs_f64())))
            }
        }
    }
}

/// A command with its process group; killed on drop unless it ended.
struct Running<'a> {
    child: Option<Child>,
    /// Whoever ends it when this process dies.
    guardian: Option<&'a mut Guardian>,
}

impl Running<'_> {
    /// Lets the command begin.
    fn start(&mut self) -> Result<()> {
        let Some(child) = &mut self.child else { return Ok(()) };
        if let Some(guardian) = &mut self.guardian {
            guardian.tell_group(child.id())?;
        }
        if let Some(mut input) = child.stdin.take() {
            // A shell that is gone already tells why by its status.
            let _ = input.write_all(b"\n");
        }
        Ok(())
    }

    /// The status of the command that has ended. Its number is its own until here.
    fn reap(&mut self) -> io::Result<Option<ExitStatus>> {
        if let Some(guardian) = &mut self.guardian {
            // One that cannot be told is dead, and ends nobody.
            let _ = guardian.tell(GROUP_ENDED);
        }
        self.child.take().map(|mut child| child.wait()).transpose()
    }

    /// The status; `None` when it is still running after `timeout` or the copy was cancelled.
    fn wait(&mut self, timeout: Duration, cancel: Option<&Cancel>) -> io::Result<Option<ExitStatus>> {
        let begun = Instant::now();
        loop {
            let Some(child) = self.child.as_ref() else { return Ok(None) };
            if has_ended(child)? {
                return self.reap();
            }
            if begun.elapsed() >= timeout || cancel.is_some_and(Cancel::is_cancelled) {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
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

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Some(group) =
            self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok()).map(Pid::from_raw)
        else {
            return;
        };
        // Failures mean that it has ended meanwhile.
        let _ = killpg(group, Signal::SIGTERM);
        let ended = self.wait(OBEY, None).is_ok_and(|status| status.is_some());
        let _ = killpg(group, Signal::SIGKILL);
        if !ended {
            let _ = self.reap();
        }
    }
}

/// A mounted file system that was found and verified to be one of the disk.
#[derive(Debug)]
pub struct MountedFileSystem {
    /// For people: mount point and device, and the namespace if it is another.
    pub name: String,
    /// Something open on that very file system. Whatever lies on its mount point by now, this is what is frozen.
    pub folder: OwnedFd,
}

/// How a disk that this process (or one on this machine) serves is made quiet.
#[derive(Debug, Default)]
pub struct QuiesceOptions {
    /// Its mounted file systems, each once; each is frozen, in this order, and thawed in the other.
    pub file_systems: Vec<MountedFileSystem>,
    /// The operator's freeze command.
    pub freeze_command: Option<String>,
    /// The operator's command that undoes it.
    pub thaw_command: Option<String>,
    /// How long either may take.
    pub hook_timeout: Option<Duration>,
    /// Whether to keep a guardian. The running program must then know [`GUARDIAN_SUBCOMMAND`].
    pub guardian: bool,
}

/// How long a command may take when nothing else was said.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(60);

/// Freezes and thaws from this process.
pub struct LocalQuiesce {
    options: QuiesceOptions,
    cancel: Option<Cancel>,
    guardian: Option<Guardian>,
    /// The hook was started: its thaw command is due.
    hook_begun: bool,
    /// Which of the mounts are frozen by us, in this order.
    frozen: Vec<usize>,
}

impl LocalQuiesce {
    /// Starts the guardian.
    pub fn new(options: QuiesceOptions, cancel: Option<Cancel>) -> Result<Self> {
        let mut local = Self { options, cancel, guardian: None, hook_begun: false, frozen: Vec::new() };
        // A thaw command comes with a freeze command.
        let needs_guardian = !local.options.file_systems.is_empty()
            || local.options.freeze_command.is_some()
            || local.options.thaw_command.is_some();
        if local.options.guardian && needs_guardian {
            local.guardian = Some(Guardian::start(&local.options)?);
        }
        Ok(local)
    }

    fn hook(&self, command: &str) -> FreezeHook {
        FreezeHook { command: command.into(), timeout: self.options.hook_timeout.unwrap_or(HOOK_TIMEOUT) }
    }
}

impl Quiesce for LocalQuiesce {
    fn sync_file_system(&mut self) -> Result<bool> {
        for one in &self.options.file_systems {
            sys::sync_file_system(one.folder.as_fd())
                .map_err(|error| Error::io(ErrorKind::Sync, "sync file system", error).at_path(&one.name))?;
        }
        Ok(!self.options.file_systems.is_empty())
    }

    fn run_hook(&mut self) -> Result<()> {
        if let Some(guardian) = &mut self.guardian {
            guardian.tell(FREEZING)?;
        }
        let Some(command) = self.options.freeze_command.clone() else { return Ok(()) };
        self.hook_begun = true;
        self.hook(&command).run_guarded("freeze command", self.cancel.as_ref(), self.guardian.as_mut())
    }

    fn freeze_file_system(&mut self) -> Result<()> {
        // Again, for a caller that has no hook to run.
        if let Some(guardian) = &mut self.guardian {
            guardian.tell(FREEZING)?;
        }
        for (index, MountedFileSystem { name, folder }) in self.options.file_systems.iter().enumerate() {
            match sys::freeze_file_system(folder.as_fd()) {
                Ok(()) => self.frozen.push(index),
                // The freeze command has done it: thawing is the thaw command's.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && self.hook_begun => {}
                Err(error) => {
                    let message = format!("freeze file system: {error}");
                    return Err(Error::io(ErrorKind::NotQuiet, message, error).at_path(name).advise(
                        "only root can freeze, and only once: see who has frozen it (fsfreeze -u thaws it)",
                    ));
                }
            }
        }
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        let mut result = Ok(());
        while let Some(MountedFileSystem { name, folder }) =
            self.frozen.last().and_then(|last| self.options.file_systems.get(*last))
        {
            if let Err(error) = sys::thaw_file_system(folder.as_fd())
                // Somebody else has thawed it: what was wanted.
                && error.kind() != io::ErrorKind::InvalidInput
            {
                let error = Error::io(ErrorKind::System, "thaw file system", error).at_path(name);
                result = Err(error.advise("thaw it by hand: fsfreeze -u MOUNTPOINT"));
                break;
            }
            self.frozen.pop();
        }
        if std::mem::take(&mut self.hook_begun)
            && let Some(command) = self.options.thaw_command.clone()
        {
            // Not to be cut short: nothing else would undo the freeze command.
            result = result.and(self.hook(&command).run("thaw command", None));
        }
        if result.is_ok()
            && let Some(guardian) = &mut self.guardian
        {
            // A guardian that cannot be told thaws once more, which is harmless.
            let _ = guardian.tell(ALL_IS_WELL);
        }
        result
    }
}

impl Drop for LocalQuiesce {
    fn drop(&mut self) {
        if !self.frozen.is_empty() || self.hook_begun {
            // Nobody could be told of a failure but the guardian, which then tries as well.
            let _ = self.thaw();
        }
    }
}

/// A process that thaws when this one is gone.
#[derive(Debug)]
pub struct Guardian {
    pipe: Option<File>,
    child: Child,
}

impl Guardian {
    /// Starts this very program again as a guardian.
    pub fn start(options: &QuiesceOptions) -> Result<Self> {
        let program = std::env::current_exe().map_err(cannot_start)?;
        Self::start_program(&program, options)
    }

    /// Starts `program`, which must know [`GUARDIAN_SUBCOMMAND`].
    pub fn start_program(program: &Path, options: &QuiesceOptions) -> Result<Self> {
        let mut child = Command::new(program)
            .arg(GUARDIAN_SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(cannot_start)?;
        let pipe = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let ready = child.stdout.take();
        let mut guardian = Self { pipe, child };
        let timeout = options.hook_timeout.unwrap_or(HOOK_TIMEOUT);
        let mut parts =
            vec![timeout.as_millis().to_string(), options.thaw_command.clone().unwrap_or_default()];
        // By our descriptors, which are verified; a path may mean another file system by now.
        let open =
            |one: &MountedFileSystem| format!("/proc/{}/fd/{}", std::process::id(), one.folder.as_raw_fd());
        parts.extend(options.file_systems.iter().map(open));
        let order = serde_json::to_vec(&parts)
            .map_err(|error| Error::new(ErrorKind::System, "tell the guardian its task").caused_by(error))?;
        let len = u32::try_from(order.len()).unwrap_or(u32::MAX);
        guardian.write(&len.to_le_bytes())?;
        guardian.write(&order)?;
        // It answers when it holds the mount points open: from then on it can thaw without opening anything.
        let mut answer = [0];
        match ready.map(|mut ready| ready.read_exact(&mut answer)) {
            Some(Ok(())) => Ok(guardian),
            _ => Err(Error::new(ErrorKind::System, "start the guardian: it did not get ready")
                .advise("see its message above")),
        }
    }

    fn tell(&mut self, word: u8) -> Result<()> {
        self.write(&[word])
    }

    /// Both at once: a pipe takes so few bytes whole or not at all.
    fn tell_group(&mut self, group: u32) -> Result<()> {
        let mut words = vec![GROUP];
        words.extend(group.to_le_bytes());
        self.write(&words)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.pipe.as_mut().map_or(Ok(()), |pipe| pipe.write_all(bytes));
        written.map_err(|error| Error::io(ErrorKind::System, "talk to the guardian", error))
    }
}

fn cannot_start(error: io::Error) -> Error {
    Error::io(ErrorKind::System, "start the guardian that thaws when this program dies", error)
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // It sees the pipe close, thaws if the last word was not "all is well", and ends.
        self.pipe = None;
        let _ = self.child.wait();
    }
}

/// What the hidden subcommand does: waits for the pipe on standard input to close, and thaws if the last word on it
/// was that a freeze may have begun. Returns the exit code.
pub fn guardian_main() -> u8 {
    // The terminal's signals and a polite end are not for it: it goes when its pipe does. Caught, not blocked: what the
    // thaw command starts would inherit a mask, and could not be stopped any more.
    let guarded = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT]).and_then(|_caught| guard());
    match guarded {
        Ok(()) => 0,
        Err(error) => {
            // The program that could report it is gone; this is the last place that can.
            let _ = writeln!(io::stderr(), "guardian: {error}");
            ErrorKind::System.exit_code()
        }
    }
}

fn guard() -> io::Result<()> {
    let mut input = File::from(sys::duplicate(io::stdin())?);
    let mut len = [0; 4];
    input.read_exact(&mut len)?;
    let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
    if len > COMMAND_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the task is too long"));
    }
    let mut order = vec![0; len];
    input.read_exact(&mut order)?;
    let parts: Vec<String> = serde_json::from_slice(&order).map_err(io::Error::other)?;
    let [timeout, command, paths @ ..] = parts.as_slice() else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the task is not complete"));
    };
    let timeout = Duration::from_millis(timeout.parse().unwrap_or(60_000));
    let mut mounts = Vec::new();
    for path in paths {
        let name = std::fs::read_link(path).unwrap_or_else(|_| path.into());
        mounts.push((name, File::open(path)?));
    }
    io::stdout().write_all(b"r")?;
    io::stdout().flush()?;
    let (mut word, mut last, mut group) = ([0], ALL_IS_WELL, None);
    loop {
        match input.read(&mut word) {
            Ok(0) => break,
            Ok(_) => match word[0] {
                GROUP => {
                    let mut number = [0; 4];
                    input.read_exact(&mut number)?;
                    group = i32::try_from(u32::from_le_bytes(number)).ok();
                }
                GROUP_ENDED => group = None,
                other => last = other,
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if let Some(group) = group.filter(|&group| group > 1) {
        // First: what it froze later on would stay frozen.
        end_group(Pid::from_raw(group));
        _ = writeln!(io::stderr(), "guardian: the freeze command was ended, as the copy died");
    }
    if last == ALL_IS_WELL {
        return Ok(());
    }
    let mut result = Ok(());
    for (name, folder) in mounts.iter().rev() {
        match sys::thaw_file_system(folder.as_fd()) {
            Ok(()) => {
                _ = writeln!(io::stderr(), "guardian: {} was thawed, as the copy died", name.display());
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => result = Err(error),
        }
    }
    if !command.is_empty() {
        let hook = FreezeHook { command: command.clone(), timeout };
        result = result.and(hook.run("thaw command", None).map_err(io::Error::other));
    }
    result
}

/// Ends a process group, politely at first. Failures mean that it has ended meanwhile.
fn end_group(group: Pid) {
    let _ = killpg(group, Signal::SIGTERM);
    let begun = Instant::now();
    while killpg(group, None).is_ok() && begun.elapsed() < OBEY {
        std::thread::sleep(LOOK);
    }
    let _ = killpg(group, Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, timeout_ms: u64) -> Result<()> {
        FreezeHook { command: command.into(), timeout: Duration::from_millis(timeout_ms) }.run("hook", None)
    }

    #[test]
    fn a_hook_succeeds_or_is_not_quiet() {
        hook("true && exit 0", 10_000).unwrap();
        for wrong in ["exit 3", "/nonexistent/command"] {
            assert_eq!(hook(wrong, 10_000).unwrap_err().kind(), ErrorKind::NotQuiet, "{wrong}");
        }
    }

    #[test]
    fn a_hanging_hook_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let command = format!("sleep 1000 & echo $! > {}; wait", file.display());
        // A busy machine may take longer to start it than the first of these.
        for timeout_ms in [100, 1000, 10_000, 100_000] {
            let error = hook(&command, timeout_ms).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotQuiet);
            assert!(error.to_string().contains("killed"), "{error}");
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
    fn cancelling_ends_a_hook() {
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let hook = FreezeHook { command: "sleep 10".into(), timeout: Duration::from_secs(10) };
        assert_eq!(hook.run("hook", Some(&cancel)).unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_command_whose_parent_died_before_the_guardian_knew_of_it_runs_nothing() {
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

    #[test]
    fn the_thaw_command_runs_also_after_a_failed_hook() {
        let folder = tempfile::tempdir().unwrap();
        let thawed = folder.path().join("thawed");
        let options = QuiesceOptions {
            freeze_command: Some("exit 1".into()),
            thaw_command: Some(format!("echo x >> {}", thawed.display())),
            ..Default::default()
        };
        let mut quiesce = LocalQuiesce::new(options, None).unwrap();
        {
            let mut frozen = Frozen::begin(&mut quiesce);
            assert!(frozen.run_hook().is_err());
        }
        drop(quiesce);
        assert_eq!(std::fs::read_to_string(thawed).unwrap(), "x\n", "once");
    }
}
