//! Making writers stand still, and letting them go again whatever happens.
//!
//! [`Quiesce`] is what a sender asks for. [`Frozen`] thaws when dropped. [`LocalQuiesce`] does it in this very process;
//! [`HelperQuiesce`] has it done by a [helper](helper), a small process of the disk's own that nobody's terminal, link or
//! death can hold up, and that thaws by itself when nobody is left who would ask it to. What is frozen is written down
//! before it is, in a [record](record), for whoever comes after a dead helper.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ploop_core::device::runtime::ProcessMark;
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::source::Gate;

pub mod helper;
mod hook;
pub mod record;

pub use helper::{HELPER_SUBCOMMAND, Helper, HelperQuiesce, HelperTicket, helper_main};
pub use hook::{FreezeHook, HOOK_TIMEOUT, Overseer, PHASE_VARIABLE, Phase, Unattended};
pub use record::{FreezeRecord, thaw_recorded};

/// How often a thaw is tried before it is called failed.
const THAW_TRIES: u32 = 3;
/// The pause between two of these.
const THAW_PAUSE: Duration = Duration::from_millis(300);

/// How long writers may be kept standing. Nothing here is a prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandstillLimits {
    /// From the end of the freeze command to the thaw, in milliseconds.
    pub freeze_ms_max: Option<u64>,
    /// From the start of the freeze command to the end of the thaw, in milliseconds.
    pub outage_ms_max: Option<u64>,
    /// From the end of the freeze command, in milliseconds: after this nobody who still works is expected to be at it.
    pub abandoned_ms: Option<u64>,
}

/// Stops and releases the writers of one disk. Called from the copy's thread, in this order: `sync_file_system` any
/// number of times, then `run_hook`, `freeze_file_system`, and `thaw` in any case once `run_hook` was called.
pub trait Quiesce: Send {
    /// Writes what the mounted file system still holds in memory, so that the freeze finds little to write. Whether
    /// anything was mounted.
    fn sync_file_system(&mut self) -> Result<bool>;
    /// Says how long what follows may take.
    fn set_limits(&mut self, _limits: StandstillLimits) {}
    /// Runs the operator's freeze command, if there is one. [`ErrorKind::NotQuiet`] when it fails, is missing or
    /// hangs.
    fn run_hook(&mut self) -> Result<()>;
    /// Freezes the mounted file system, if there is one. [`ErrorKind::NotQuiet`] when it cannot be frozen, or was so late
    /// that it has been thawed again.
    fn freeze_file_system(&mut self) -> Result<()>;
    /// Whether writers stand still since [`freeze_file_system`](Self::freeze_file_system); an error when they were let
    /// go meanwhile.
    fn confirm(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether there is a freeze command, which is not run twice unasked.
    fn has_hook(&self) -> bool {
        false
    }
    /// Undoes both, as far as they were done. Harmless a second time. [`ErrorKind::NotQuiet`], naming what still
    /// stands, when that cannot be done.
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

    pub(crate) fn confirm(&mut self) -> Result<()> {
        self.quiesce.as_mut().map_or(Ok(()), |quiesce| quiesce.confirm())
    }

    /// Keeps the gate closed until the thaw.
    pub(crate) fn hold(&mut self, gate: Box<dyn Gate>) {
        self.gate = Some(gate);
    }

    /// As [`thaw`](Self::thaw), of writers that may be stopped again.
    pub(crate) fn thaw_for_another(&mut self) -> Result<()> {
        self.gate = None;
        match &mut self.quiesce {
            None => Ok(()),
            Some(quiesce) => quiesce.thaw().or_else(|_| quiesce.thaw()),
        }
    }

    /// Gives back who stops them.
    pub(crate) fn into_quiesce(mut self) -> Option<&'a mut dyn Quiesce> {
        self.quiesce.take()
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

/// A mounted file system, held open: who acts on it acts on this very mount, whatever its path shows meanwhile.
#[derive(Debug)]
pub struct MountedFileSystem {
    /// A way to it that commands can use: its mount point.
    pub name: String,
    /// The root of the mount, opened for reading and verified by whoever found it.
    pub folder: OwnedFd,
}

impl MountedFileSystem {
    /// What is mounted at `path` now.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = sys::open_folder(path).map_err(|error| {
            Error::io(ErrorKind::Open, "open mount point", error)
                .at_path(path)
                .advise("see whether it is still mounted")
        })?;
        Ok(Self { name: path.display().to_string(), folder })
    }
}

/// How a disk on this machine is made quiet.
#[derive(Debug, Default)]
pub struct QuiesceOptions {
    /// The file systems on it; each is frozen, in this order, and thawed in the other.
    pub file_systems: Vec<MountedFileSystem>,
    /// The operator's freeze command.
    pub freeze_command: Option<String>,
    /// The operator's command that undoes it.
    pub thaw_command: Option<String>,
    /// How long either may take.
    pub hook_timeout: Option<Duration>,
    /// Where to write down what is frozen, absolute.
    pub record: Option<PathBuf>,
    /// What a helper hands to its [`Lookout`](helper::Lookout) right before writers are stopped.
    pub watch: Option<String>,
}

/// Freezes and thaws from this process.
pub struct LocalQuiesce {
    options: QuiesceOptions,
    overseer: Box<dyn Overseer + Send>,
    limits: StandstillLimits,
    record: Option<FreezeRecord>,
    /// Since when writers may stand still.
    begun: Option<Instant>,
    /// The hook was started: its thaw command is due.
    hook_begun: bool,
    /// Which of the file systems are frozen by us, in this order.
    frozen: Vec<usize>,
    /// When all of it is undone, whoever asks for it or not.
    deadline: Option<Instant>,
    /// That has come.
    is_expired: bool,
    /// It was tried for long to undo it, in vain.
    is_given_up: bool,
}

impl LocalQuiesce {
    /// Of these file systems, with these commands. They were opened before: opening one later could wait for its freeze.
    pub fn new(options: QuiesceOptions) -> Self {
        Self::overseen(options, Box::new(Unattended))
    }

    /// As [`new`](Self::new); `overseer` looks after the commands.
    pub(crate) fn overseen(options: QuiesceOptions, overseer: Box<dyn Overseer + Send>) -> Self {
        Self {
            options,
            overseer,
            limits: StandstillLimits::default(),
            record: None,
            begun: None,
            hook_begun: false,
            frozen: Vec::new(),
            deadline: None,
            is_expired: false,
            is_given_up: false,
        }
    }

    /// When [`expire`](Self::expire) is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether anything is to be undone that was not tried in vain.
    pub(crate) fn is_due(&self) -> bool {
        self.begun.is_some() && !self.is_given_up
    }

    /// Lets writers go, as the time is over.
    pub(crate) fn expire(&mut self) -> Result<()> {
        self.is_expired = true;
        self.undo()
    }

    fn hook_timeout(&self) -> Duration {
        self.options.hook_timeout.unwrap_or(HOOK_TIMEOUT)
    }

    /// From now on writers may stand still: that is written down before.
    fn begin(&mut self) -> Result<Instant> {
        if let Some(begun) = self.begun {
            return Ok(begun);
        }
        self.is_expired = false;
        if self.options.record.is_some() {
            self.record = Some(FreezeRecord::new(
                &self.options.file_systems,
                self.options.thaw_command.as_deref(),
                self.hook_timeout(),
            )?);
            if let (Some(record), Some(path)) = (&self.record, &self.options.record)
                && let Err(error) = record.create(path)
            {
                self.record = None;
                return Err(error);
            }
        }
        let now = Instant::now();
        self.begun = Some(now);
        Ok(now)
    }

    /// Writes the record as it is now.
    fn note(&self) -> Result<()> {
        match (&self.record, &self.options.record) {
            (Some(record), Some(path)) => record.write(path),
            _ => Ok(()),
        }
    }

    /// Undoes all, the rest also when a part fails.
    fn undo(&mut self) -> Result<()> {
        self.deadline = None;
        let mut result = Ok(());
        while let Some(file_system) = self.frozen.last().and_then(|last| self.options.file_systems.get(*last))
        {
            result = record::thaw_one(file_system);
            if result.is_err() {
                break;
            }
            self.frozen.pop();
        }
        if self.hook_begun {
            // Not to be cut short: nothing else would undo the freeze command.
            result = result.and(self.run_thaw_command());
        }
        self.is_given_up = result.is_err();
        match (&result, &mut self.record) {
            (Err(error), Some(record)) => {
                record.failure = Some(error.to_string());
                if self.frozen.is_empty() {
                    record.file_systems.clear();
                }
                // It says already what is frozen.
                let _ = self.note();
            }
            (Err(_), None) => {}
            (Ok(()), _) => {
                self.begun = None;
                self.record = None;
                if let Some(path) = &self.options.record {
                    return FreezeRecord::remove(path);
                }
            }
        }
        result
    }

    fn run_thaw_command(&mut self) -> Result<()> {
        let Some(command) = self.options.thaw_command.clone() else {
            self.hook_begun = false;
            return Ok(());
        };
        let timeout = self.hook_timeout();
        let hook = FreezeHook { phase: Phase::Thaw, command: command.clone(), timeout };
        let mut overseer = Lenient(&mut *self.overseer);
        record::thaw_command(&command, || hook.run(&mut overseer))?;
        self.hook_begun = false;
        Ok(())
    }
}

/// Never revokes: a thaw is carried through.
struct Lenient<'a>(&'a mut dyn Overseer);

impl Overseer for Lenient<'_> {
    fn begins(&mut self, _group: u32) -> Result<()> {
        Ok(())
    }
    fn is_revoked(&mut self) -> bool {
        false
    }
    fn printed(&mut self, text: &[u8]) {
        self.0.printed(text);
    }
}

/// Writes down which freeze command runs before it begins.
struct Noting<'a> {
    overseer: &'a mut dyn Overseer,
    record: Option<(&'a mut FreezeRecord, &'a Path)>,
}

impl Overseer for Noting<'_> {
    fn begins(&mut self, group: u32) -> Result<()> {
        if let Some((record, path)) = &mut self.record {
            record.hook = ProcessMark::of(group);
            record.hook_begun = true;
            record.write(path)?;
        }
        self.overseer.begins(group)
    }
    fn is_revoked(&mut self) -> bool {
        self.overseer.is_revoked()
    }
    fn printed(&mut self, text: &[u8]) {
        self.overseer.printed(text);
    }
}

impl Quiesce for LocalQuiesce {
    fn sync_file_system(&mut self) -> Result<bool> {
        for MountedFileSystem { name, folder } in &self.options.file_systems {
            sys::sync_file_system(folder.as_fd())
                .map_err(|error| Error::io(ErrorKind::Sync, "sync file system", error).at_path(name))?;
        }
        Ok(!self.options.file_systems.is_empty())
    }

    fn set_limits(&mut self, limits: StandstillLimits) {
        self.limits = limits;
    }

    fn has_hook(&self) -> bool {
        self.options.freeze_command.is_some()
    }

    fn run_hook(&mut self) -> Result<()> {
        let begun = self.begin()?;
        let Some(command) = self.options.freeze_command.clone() else { return Ok(()) };
        let mut timeout = self.hook_timeout();
        let outage = self.limits.outage_ms_max.map(Duration::from_millis);
        let is_outage = outage.is_some_and(|outage| outage < timeout);
        if let Some(outage) = outage {
            timeout = timeout.min(outage.saturating_sub(begun.elapsed()));
        }
        self.hook_begun = true;
        let hook = FreezeHook { phase: Phase::Freeze, command, timeout };
        let started = Instant::now();
        let record = self.record.as_mut().zip(self.options.record.as_deref());
        let ran = hook.run(&mut Noting { overseer: &mut *self.overseer, record });
        if let Some(record) = &mut self.record {
            record.hook = None;
            self.note()?;
        }
        ran.map_err(|error| match outage {
            Some(outage) if is_outage && started.elapsed() >= timeout => Error::new(
                ErrorKind::NotQuiet,
                format!("{error}: the whole outage may last {} ms", outage.as_millis()),
            )
            .advise("allow a longer outage (--max-outage), or make the freeze command faster"),
            _ => error,
        })
    }

    fn freeze_file_system(&mut self) -> Result<()> {
        // Again, for a caller that has no hook to run.
        let begun = self.begin()?;
        let hooked = Instant::now();
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
        let took = hooked.elapsed();
        let end =
            |from: Instant, ms: Option<u64>| ms.and_then(|ms| from.checked_add(Duration::from_millis(ms)));
        let limits = self.limits;
        let ends = [
            end(hooked, limits.freeze_ms_max),
            end(begun, limits.outage_ms_max),
            end(hooked, limits.abandoned_ms),
        ];
        self.deadline = ends.into_iter().flatten().min();
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            // A freeze cannot be cut short from outside; its length is known at its end.
            self.expire()?;
            let (ms, option) = match limits.freeze_ms_max {
                Some(ms) if took >= Duration::from_millis(ms) => (ms, "the freeze may last"),
                _ => (limits.outage_ms_max.or(limits.abandoned_ms).unwrap_or(0), "the outage may last"),
            };
            let message =
                format!("freezing the file system took {} ms, and {option} {ms} ms in all", took.as_millis());
            return Err(Error::new(ErrorKind::NotQuiet, message)
                .advise("the disk runs again; allow more, or copy when less is written"));
        }
        Ok(())
    }

    fn confirm(&mut self) -> Result<()> {
        if !self.is_expired {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotQuiet,
            "the time for which the disk may stand still was over, and it was thawed",
        )
        .advise("allow a longer freeze, or copy when less is written"))
    }

    fn thaw(&mut self) -> Result<()> {
        if self.begun.is_none() && self.frozen.is_empty() && !self.hook_begun {
            return Ok(());
        }
        self.undo()
    }
}

impl Drop for LocalQuiesce {
    fn drop(&mut self) {
        if self.is_due() {
            // Nobody could be told of a failure; the record stays.
            let _ = self.thaw();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thaw_command_runs_also_after_a_failed_hook() {
        let folder = tempfile::tempdir().unwrap();
        let thawed = folder.path().join("thawed");
        let options = QuiesceOptions {
            freeze_command: Some("exit 1".into()),
            thaw_command: Some(format!("echo x >> {}", thawed.display())),
            ..Default::default()
        };
        let mut quiesce = LocalQuiesce::new(options);
        {
            let mut frozen = Frozen::begin(&mut quiesce);
            assert!(frozen.run_hook().is_err());
        }
        drop(quiesce);
        assert_eq!(std::fs::read_to_string(thawed).unwrap(), "x\n", "once");
    }

    #[test]
    fn a_thaw_command_that_fails_is_tried_again_and_what_stands_stays_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let (tries, record) = (folder.path().join("tries"), folder.path().join("frozen.json"));
        let count = || std::fs::read_to_string(&tries).unwrap_or_default().len();
        let quiesce = |succeeds_at: usize| {
            std::fs::remove_file(&tries).ok();
            let tries = tries.display();
            LocalQuiesce::new(QuiesceOptions {
                freeze_command: Some("true".into()),
                thaw_command: Some(format!("printf x >> {tries}; [ $(wc -c < {tries}) -ge {succeeds_at} ]")),
                record: Some(record.clone()),
                ..Default::default()
            })
        };
        let mut once = quiesce(2);
        once.run_hook().unwrap();
        assert!(FreezeRecord::read(&record).unwrap().unwrap().hook_begun);
        once.thaw().unwrap();
        assert_eq!((count(), record.exists()), (2, false));
        let mut always = quiesce(99);
        always.run_hook().unwrap();
        let error = always.thaw().unwrap_err();
        assert_eq!((error.kind(), count()), (ErrorKind::NotQuiet, 3));
        assert!(error.to_string().contains("still stands") && error.advice().is_some(), "{error}");
        let noted = FreezeRecord::read(&record).unwrap().unwrap();
        assert!(noted.failure.is_some() && noted.what_stands().1.contains("printf x"), "{noted:?}");
        // Nobody need tell how: what is written down is enough.
        always.hook_begun = false;
        always.begun = None;
        std::fs::write(&tries, "x".repeat(98)).unwrap();
        assert!(thaw_recorded(&record, true, || Ok(Vec::new())).unwrap());
        assert_eq!((count(), record.exists()), (99, false));
        assert!(!thaw_recorded(&record, true, || Ok(Vec::new())).unwrap(), "nothing is left");
    }

    #[test]
    fn an_outage_that_is_over_ends_the_hook_and_the_thaw_command_runs() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("thawed");
        let mut quiesce = LocalQuiesce::new(QuiesceOptions {
            freeze_command: Some("sleep 1000".into()),
            thaw_command: Some(format!("touch {}", mark.display())),
            ..Default::default()
        });
        quiesce.set_limits(StandstillLimits { outage_ms_max: Some(50), ..Default::default() });
        let error = quiesce.run_hook().unwrap_err();
        assert!(error.to_string().contains("the whole outage may last 50 ms"), "{error}");
        quiesce.thaw().unwrap();
        assert!(mark.exists());
    }

    #[test]
    fn what_was_let_go_is_not_confirmed() {
        let mut quiesce = LocalQuiesce::new(QuiesceOptions::default());
        quiesce.set_limits(StandstillLimits { abandoned_ms: Some(100_000), ..Default::default() });
        quiesce.run_hook().unwrap();
        quiesce.freeze_file_system().unwrap();
        quiesce.confirm().unwrap();
        assert!(quiesce.deadline().is_some());
        quiesce.expire().unwrap();
        assert_eq!(quiesce.confirm().unwrap_err().kind(), ErrorKind::NotQuiet);
        quiesce.thaw().unwrap();
        quiesce.set_limits(StandstillLimits { freeze_ms_max: Some(0), ..Default::default() });
        assert!(quiesce.freeze_file_system().unwrap_err().to_string().contains("may last 0 ms"));
    }
}
