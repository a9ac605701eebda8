//! The process that freezes and thaws, and those who ask it to.
//!
//! ```text
//! command                         helper                              server
//! set up, file systems ────────►  opens nothing any more
//! its end of the connection ─────────────────────────────────────►
//!                                 syncs, runs the commands,     ◄──  sync, hook, freeze, confirm, thaw
//!                                 freezes, thaws                ──►  done, or why not
//! ```
//!
//! The helper is started by the command, so that the operator's commands run in the folder and the environment where
//! they were typed; then the server holds the only other end. The command is not needed any more: it may be stopped, its
//! terminal held, its pipes full. The helper has a session of its own, waits for nothing but this connection, and touches
//! no file on what it freezes. It thaws when it is told to, when nobody is left who could tell it, and when the time is
//! over that it was given. One that is stopped or killed is missed by the server, which has another process thaw what is
//! written down. The server itself never waits in a freeze or a thaw: it could not be replaced while it does.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Failure, ProcessMark};
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::hook::{HOOK_TIMEOUT, Overseer};
use super::{LocalQuiesce, MountedFileSystem, Quiesce, QuiesceOptions, StandstillLimits, THAW_TRIES};
use crate::transport::Cancel;

/// Hidden subcommand under which both programs run [`helper_main`].
pub const HELPER_SUBCOMMAND: &str = "freeze-helper";
/// How long a helper may take to get ready.
const READY_MAX: Duration = Duration::from_secs(30);
/// How often a helper that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// A helper that is stopped for this long is not waited for any more.
const STOPPED_MAX: Duration = Duration::from_secs(1);
/// How much longer than its parts a thaw may take.
const THAW_SLACK: Duration = Duration::from_secs(20);
/// Pieces of output that wait for somebody to read them; more are dropped.
const OUTPUT_QUEUE: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
struct SetUp {
    names: Vec<String>,
    freeze_command: Option<String>,
    thaw_command: Option<String>,
    hook_timeout_ms: u64,
    record: Option<PathBuf>,
    watch: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ask {
    Sync,
    Hook(StandstillLimits),
    Freeze(StandstillLimits),
    Confirm,
    Thaw,
}

#[derive(Debug, Serialize, Deserialize)]
struct Question {
    number: u64,
    ask: Ask,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    number: u64,
    /// Done; of a sync: whether anything is mounted.
    done: Option<bool>,
    failure: Option<Failure>,
}

/// What the other end must know of a helper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HelperTicket {
    /// The process.
    pub process: ProcessMark,
    /// How long each of the commands may take, in milliseconds.
    pub hook_timeout_ms: u64,
    /// Whether there is a freeze command.
    pub has_hook: bool,
    /// What it would freeze, for people.
    pub names: Vec<String>,
}

/// A helper that is ready, and the only end of its connection.
#[derive(Debug)]
pub struct Helper {
    /// The only other end: when it is closed, the helper undoes what is to be undone, and ends.
    pub connection: Connection,
    /// What the other end must know.
    pub ticket: HelperTicket,
}

fn cannot_start(error: io::Error) -> Error {
    Error::io(ErrorKind::System, "start the process that freezes and thaws", error)
}

impl Helper {
    /// Starts this very program again as a helper; its commands find these variables.
    pub fn start(options: QuiesceOptions, variables: &[(&str, OsString)]) -> Result<Self> {
        Self::start_program(Path::new("/proc/self/exe"), options, variables)
    }

    /// Starts `program`, which must know [`HELPER_SUBCOMMAND`].
    pub fn start_program(
        program: &Path,
        options: QuiesceOptions,
        variables: &[(&str, OsString)],
    ) -> Result<Self> {
        let (connection, other) = Connection::pair()?;
        Command::new(program)
            .arg(HELPER_SUBCOMMAND)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(other.into_socket()))
            // Standard output may be the stream, whose end would not be seen.
            .stdout(Stdio::null())
            .spawn()
            .map_err(cannot_start)?;
        let hook_timeout = options.hook_timeout.unwrap_or(HOOK_TIMEOUT);
        let hook_timeout_ms = u64::try_from(hook_timeout.as_millis()).unwrap_or(u64::MAX);
        let names: Vec<_> = options.file_systems.iter().map(|mounted| mounted.name.clone()).collect();
        let has_hook = options.freeze_command.is_some();
        let set_up = SetUp {
            names: names.clone(),
            freeze_command: options.freeze_command,
            thaw_command: options.thaw_command,
            hook_timeout_ms,
            record: options.record,
            watch: options.watch,
        };
        let folders: Vec<_> = options.file_systems.iter().map(|mounted| mounted.folder.as_fd()).collect();
        connection.send(&set_up, &folders)?;
        let ready = connection.receive(Some(READY_MAX))?.map(|message| message.body);
        match ready.map(serde_json::from_value::<ProcessMark>) {
            Some(Ok(process)) => {
                Ok(Self { connection, ticket: HelperTicket { process, hook_timeout_ms, has_hook, names } })
            }
            _ => Err(Error::new(
                ErrorKind::System,
                "start the process that freezes and thaws: it did not get ready",
            )
            .advise("see its message above")),
        }
    }
}

/// How another process is made to thaw what a lost helper has left; it returns when that has ended.
pub type Rescue = Box<dyn Fn() -> Result<()> + Send>;

/// Has a helper freeze and thaw.
pub struct HelperQuiesce {
    connection: Connection,
    ticket: HelperTicket,
    cancel: Option<Cancel>,
    rescue: Option<Rescue>,
    limits: StandstillLimits,
    number: u64,
    /// Something is to be undone.
    is_due: bool,
    is_lost: bool,
    /// What was tried for long, in vain.
    failure: Option<Error>,
}

impl HelperQuiesce {
    /// `cancel` ends every wait but that for the thaw; `rescue` thaws when the helper does not.
    pub fn new(helper: Helper, cancel: Option<Cancel>, rescue: Option<Rescue>) -> Self {
        Self {
            connection: helper.connection,
            ticket: helper.ticket,
            cancel,
            rescue,
            limits: StandstillLimits::default(),
            number: 0,
            is_due: false,
            is_lost: false,
            failure: None,
        }
    }

    /// Lets the helper go without a word, which then undoes what is to be undone.
    pub fn abandon(mut self) {
        self.is_due = false;
    }

    fn hook_timeout(&self) -> Duration {
        Duration::from_millis(self.ticket.hook_timeout_ms)
    }

    /// Asks, and waits for the answer as long as the helper can still give one.
    fn ask(&mut self, ask: Ask, time_max: Option<Duration>) -> Result<bool> {
        if self.is_lost {
            return Err(self.lost("is gone"));
        }
        self.number += 1;
        let number = self.number;
        if self.connection.send(&Question { number, ask }, &[]).is_err() {
            return Err(self.lost("is gone"));
        }
        let begun = Instant::now();
        let mut stopped: Option<Instant> = None;
        loop {
            match self.connection.receive(Some(LOOK)) {
                Ok(Some(message)) => match serde_json::from_value::<Answer>(message.body) {
                    // Of a question that was not waited for to the end.
                    Ok(answer) if answer.number != number => continue,
                    Ok(Answer { failure: Some(failure), .. }) => return Err(failure.into_error()),
                    Ok(answer) => return Ok(answer.done.unwrap_or(false)),
                    Err(_) => return Err(self.lost("says what nobody understands")),
                },
                Err(error) if error.kind() == ErrorKind::Busy => {}
                Ok(None) | Err(_) => return Err(self.lost("has died")),
            }
            if ask != Ask::Thaw
                && let Some(cancel) = &self.cancel
            {
                cancel.check()?;
            }
            match is_stopped(self.ticket.process.id) {
                true if stopped.get_or_insert_with(Instant::now).elapsed() >= STOPPED_MAX => {
                    return Err(self.lost("is stopped"));
                }
                true => {}
                false => stopped = None,
            }
            if time_max.is_some_and(|time_max| begun.elapsed() >= time_max) {
                return Err(self.lost("does not answer"));
            }
        }
    }

    /// The helper is not to be relied on any more: it shall not freeze what others thaw.
    fn lost(&mut self, how: &str) -> Error {
        self.is_lost = true;
        if self.ticket.process.is_running()
            && let Ok(id) = i32::try_from(self.ticket.process.id)
        {
            // It may have ended just now.
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
        }
        Error::new(ErrorKind::NotQuiet, format!("the process that freezes and thaws {how}"))
            .advise("start the copy again")
    }
}

/// Whether a process is stopped by a signal or a tracer.
fn is_stopped(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = status.rsplit(')').next().and_then(|fields| fields.trim_start().chars().next());
    matches!(state, Some('T' | 't'))
}

impl Quiesce for HelperQuiesce {
    fn sync_file_system(&mut self) -> Result<bool> {
        self.ask(Ask::Sync, None)
    }

    fn set_limits(&mut self, limits: StandstillLimits) {
        self.limits = limits;
    }

    fn has_hook(&self) -> bool {
        self.ticket.has_hook
    }

    fn run_hook(&mut self) -> Result<()> {
        self.is_due = true;
        self.ask(Ask::Hook(self.limits), Some(self.hook_timeout() + THAW_SLACK)).map(drop)
    }

    fn freeze_file_system(&mut self) -> Result<()> {
        self.is_due = true;
        self.ask(Ask::Freeze(self.limits), None).map(drop)
    }

    fn confirm(&mut self) -> Result<()> {
        self.ask(Ask::Confirm, Some(THAW_SLACK)).map(drop)
    }

    fn thaw(&mut self) -> Result<()> {
        if !self.is_due {
            return Ok(());
        }
        // What is given up is not tried again for whoever asks twice: a command that hangs would hang so often.
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.thaw_once().inspect_err(|error| self.failure = Some(error.clone()))?;
        self.is_due = false;
        Ok(())
    }
}

impl HelperQuiesce {
    fn thaw_once(&mut self) -> Result<()> {
        if !self.is_lost {
            let time_max = self.hook_timeout().saturating_mul(THAW_TRIES).saturating_add(THAW_SLACK);
            let thawed = self.ask(Ask::Thaw, Some(time_max));
            if !self.is_lost {
                return thawed.map(drop);
            }
        }
        match &self.rescue {
            Some(rescue) => rescue(),
            None => {
                let frees: Vec<_> =
                    self.ticket.names.iter().map(|name| format!("fsfreeze -u {name}")).collect();
                Err(Error::new(
                    ErrorKind::NotQuiet,
                    "the process that freezes and thaws is gone: what it has stopped may still stand",
                )
                .advise(format!("run the thaw command by hand; {}", frees.join(" && "))))
            }
        }
    }
}

impl Drop for HelperQuiesce {
    fn drop(&mut self) {
        if self.is_due {
            // Nobody could be told; the helper, or whoever reads the record, tries again.
            let _ = self.thaw();
        }
    }
}

/// Looks whether what [`QuiesceOptions::watch`] says still holds, right before writers are stopped.
pub type Lookout = fn(&str) -> Result<()>;

/// What the hidden subcommand does: freezes and thaws as it is told on standard input. Returns the exit code.
pub fn helper_main(lookout: Lookout) -> u8 {
    close_inherited();
    // A session of its own: no terminal stops it. It fails only for one that has one already.
    let _ = nix::unistd::setsid();
    // A polite end is not for it: it goes when its connection does. Caught, not blocked: what its commands start would
    // inherit a mask, and could not be stopped any more.
    match Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])
        .map_err(cannot_start)
        .and_then(|_caught| help(lookout))
    {
        Ok(()) => 0,
        Err(error) => {
            say(&error);
            error.kind().exit_code()
        }
    }
}

/// Lets go of what the command was started with: a pipe held here would never show its end to its reader.
fn close_inherited() {
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|&number| number > 2) {
        // That of the folder just read is closed already.
        let _ = nix::unistd::close(number);
    }
}

fn say(error: &Error) {
    // This is the last place that can tell it.
    let _ = writeln!(io::stderr(), "ploop: {error}");
    if let Some(advice) = error.advice() {
        let _ = writeln!(io::stderr(), "  advice: {advice}");
    }
}

/// Prints in a thread of its own: whoever reads standard error may have stopped.
struct Printer(SyncSender<Vec<u8>>);

impl Printer {
    fn start() -> Result<Self> {
        let (sender, pieces) = sync_channel::<Vec<u8>>(OUTPUT_QUEUE);
        std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                while let Ok(piece) = pieces.recv() {
                    // There is nowhere to tell that it cannot be told.
                    let _ = io::stderr().write_all(&piece);
                }
            })
            .map_err(cannot_start)?;
        Ok(Self(sender))
    }
}

/// Ends a freeze command when the other end has gone, or asks for something else.
struct Listening {
    connection: Connection,
    printer: Printer,
}

impl Overseer for Listening {
    fn begins(&mut self, _group: u32) -> Result<()> {
        Ok(())
    }
    fn is_revoked(&mut self) -> bool {
        self.connection.has_message()
    }
    fn printed(&mut self, text: &[u8]) {
        // Dropped rather than waited for.
        let _ = self.printer.0.try_send(text.to_vec());
    }
}

fn help(lookout: Lookout) -> Result<()> {
    let connection = Connection::from_socket(sys::inherited(0).map_err(cannot_start)?);
    let refused =
        |found: &str| Error::new(ErrorKind::Parameter, format!("set up the freeze helper: {found}"));
    let message = connection.receive(Some(READY_MAX))?.ok_or_else(|| refused("nobody is there"))?;
    let set_up: SetUp = serde_json::from_value(message.body).map_err(|cause| {
        refused("its task is not understood").caused_by(Error::new(ErrorKind::System, cause.to_string()))
    })?;
    if set_up.names.len() != message.descriptors.len() {
        return Err(refused("the file systems are not all there"));
    }
    let file_systems = set_up
        .names
        .into_iter()
        .zip(message.descriptors)
        .map(|(name, folder)| MountedFileSystem { name, folder })
        .collect();
    let options = QuiesceOptions {
        file_systems,
        freeze_command: set_up.freeze_command,
        thaw_command: set_up.thaw_command,
        hook_timeout: Some(Duration::from_millis(set_up.hook_timeout_ms)),
        record: set_up.record,
        watch: None,
    };
    let overseer = Listening { connection: connection.try_clone()?, printer: Printer::start()? };
    let mut quiesce = LocalQuiesce::overseen(options, Box::new(overseer));
    let own = ProcessMark::own().ok_or_else(|| refused("is /proc mounted?"))?;
    connection.send(&own, &[])?;
    let mut watching = Watching { what: set_up.watch, lookout, has_looked: false };
    attend(&connection, &mut quiesce, &mut watching);
    // What was tried in vain is written down.
    if quiesce.is_due() { quiesce.thaw() } else { Ok(()) }
}

/// Looks before each sync, and before writers are stopped if no sync has just come before that.
struct Watching {
    what: Option<String>,
    lookout: Lookout,
    has_looked: bool,
}

impl Watching {
    fn look(&mut self) -> Result<()> {
        self.what.as_deref().map_or(Ok(()), self.lookout)
    }

    fn before_sync(&mut self) -> Result<()> {
        self.has_looked = true;
        self.look()
    }

    fn before_stop(&mut self) -> Result<()> {
        if std::mem::take(&mut self.has_looked) { Ok(()) } else { self.look() }
    }
}

/// Does what is asked until the other end is gone.
fn attend(connection: &Connection, quiesce: &mut LocalQuiesce, watching: &mut Watching) {
    loop {
        let left = quiesce.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let question = match connection.receive(left) {
            Ok(Some(message)) => serde_json::from_value::<Question>(message.body),
            Err(error) if error.kind() == ErrorKind::Busy => {
                if let Err(error) = quiesce.expire() {
                    say(&error);
                }
                continue;
            }
            Ok(None) | Err(_) => return,
        };
        // Whoever asks what is not understood is none of ours.
        let Ok(Question { number, ask }) = question else { return };
        let done = match ask {
            Ask::Sync => watching.before_sync().and_then(|()| quiesce.sync_file_system()),
            Ask::Hook(limits) => {
                quiesce.set_limits(limits);
                watching.before_stop().and_then(|()| quiesce.run_hook()).map(|()| true)
            }
            Ask::Freeze(limits) => {
                quiesce.set_limits(limits);
                quiesce.freeze_file_system().map(|()| true)
            }
            Ask::Confirm => quiesce.confirm().map(|()| true),
            Ask::Thaw => quiesce.thaw().map(|()| true),
        };
        let answer = match done {
            Ok(done) => Answer { number, done: Some(done), failure: None },
            Err(error) => Answer { number, done: None, failure: Some(Failure::of(&error)) },
        };
        if connection.send(&answer, &[]).is_err() {
            return;
        }
    }
}
