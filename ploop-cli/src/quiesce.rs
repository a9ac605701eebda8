//! Making the writers of a disk stand still, and what may be claimed of it then: as of what a copy or a snapshot is what
//! it is.
//!
//! Who holds the disk is found out before anything begins ([`DiskQuiesce::new`]) and once more right before the freeze,
//! since a copy takes long. A user that cannot be made to stand still is a reason to refuse, unless the operator's own
//! command does it (`-F`) or the state of a power loss is good enough (`--crash-consistent`), which is then said.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pcopy::freeze::{LocalQuiesce, MountedFileSystem, Quiesce, QuiesceOptions};
use pcopy::transport::Cancel;
use ploop_core::device::runtime::State;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::{Holders, OtherUse};
use serde_json::{Value, json};

/// How long somebody who has the device open for writing is waited for: programs look at new devices that way.
const PASSER_BY_MAX: Duration = Duration::from_secs(1);
/// How often.
const PASSER_BY_LOOK: Duration = Duration::from_millis(100);

/// What made the state of the disk that was copied or kept one that a file system understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum AsOf {
    /// Its file systems were frozen.
    FileSystemFrozen,
    /// The operator's freeze command had stopped the writers.
    QuiescedByHook,
    /// Nothing: it is as after a power loss at one moment.
    CrashConsistent,
    /// Nobody had it open for writing.
    #[default]
    Unused,
}

impl AsOf {
    /// The word for programs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::FileSystemFrozen => "file_system_frozen",
            Self::QuiescedByHook => "quiesced_by_hook",
            Self::CrashConsistent => "crash_consistent",
            Self::Unused => "unused",
        }
    }

    /// The words for people, of a report in which programs read `word`.
    pub(crate) fn phrase(word: Option<&str>) -> &'static str {
        match word {
            Some("file_system_frozen") => "file system frozen",
            Some("quiesced_by_hook") => "quiesced by the freeze command",
            Some("crash_consistent") => "crash-consistent, as after a power loss",
            Some("unused") => "nobody had it open for writing",
            _ => "not known",
        }
    }
}

/// What the operator accepts and gives.
#[derive(Debug, Default)]
pub(crate) struct Allowed {
    /// The state of a power loss is good enough where something cannot be made to stand still.
    pub(crate) crash_consistent: bool,
    /// File systems are left alone.
    pub(crate) no_freeze: bool,
    /// The operator's commands; the file systems are filled in.
    pub(crate) commands: QuiesceOptions,
    /// How to go on after a refusal.
    pub(crate) advice: &'static str,
}

/// Freezes and thaws what was found to be on the disk.
pub(crate) struct DiskQuiesce {
    inner: LocalQuiesce,
    device: Option<PathBuf>,
    rules: Rules,
    /// The file systems that will be frozen, as the table of mounts numbers them.
    frozen: Vec<(u64, u64)>,
    as_of: AsOf,
    details: Vec<String>,
    looked: bool,
}

/// What decides between going on and refusing.
#[derive(Clone, Copy, Debug)]
struct Rules {
    has_hook: bool,
    crash_consistent: bool,
    no_freeze: bool,
    advice: &'static str,
}

/// What was found, and what can be claimed if it stays so.
struct Found {
    as_of: AsOf,
    details: Vec<String>,
    file_systems: Vec<MountedFileSystem>,
    frozen: Vec<(u64, u64)>,
}

impl DiskQuiesce {
    /// Finds out who holds a served disk, opens and verifies what will be frozen, and starts the guardian. A closed disk
    /// is `None`. [`ErrorKind::NotQuiet`] when somebody holds it who cannot be made to stand still, and that is not allowed.
    pub(crate) fn new(served: Option<&State>, allowed: Allowed, cancel: Option<Cancel>) -> Result<Self> {
        let rules = Rules {
            has_hook: allowed.commands.freeze_command.is_some(),
            crash_consistent: allowed.crash_consistent || allowed.no_freeze,
            no_freeze: allowed.no_freeze,
            advice: allowed.advice,
        };
        // What refuses writes for all is at rest.
        let writable = served.filter(|state| !state.open.read_only);
        let device = writable.and_then(|state| state.loop_device.clone());
        let found = match (&device, writable) {
            (Some(device), _) => rules.find(device)?,
            (None, None) => Found::nobody(),
            (None, Some(_)) => rules.judge(
                Vec::new(),
                Vec::new(),
                vec!["it is served without a block device, to a program".to_owned()],
            )?,
        };
        let options = QuiesceOptions { file_systems: found.file_systems, ..allowed.commands };
        Ok(Self {
            inner: LocalQuiesce::new(options, cancel)?,
            device,
            rules,
            frozen: found.frozen,
            as_of: found.as_of,
            details: found.details,
            looked: true,
        })
    }

    /// As of what it is, as found at last.
    pub(crate) fn as_of(&self) -> AsOf {
        self.as_of
    }

    /// Which file systems are frozen, or who was not made to stand still.
    pub(crate) fn details(&self) -> &[String] {
        &self.details
    }

    /// Says in a report as of what it is.
    pub(crate) fn tell(&self, report: &mut Value) {
        if let Value::Object(fields) = report {
            fields.insert("as_of".to_owned(), json!(self.as_of.word()));
            fields.insert("as_of_details".to_owned(), json!(self.details));
        }
    }

    /// Somebody may have come, or gone, since the beginning.
    fn look_again(&mut self) -> Result<()> {
        self.looked = true;
        let Some(device) = &self.device else { return Ok(()) };
        let found = self.rules.find(device)?;
        if let Some(new) = found.frozen.iter().position(|one| !self.frozen.contains(one)) {
            let name = found.file_systems.get(new).map_or("a file system", |one| one.name.as_str());
            return Err(Error::new(
                ErrorKind::NotQuiet,
                format!("{name} was mounted while the disk was copied"),
            )
            .at_path(device)
            .advise("copy again: it is frozen then like any other"));
        }
        // What has gone meanwhile is frozen all the same: it is held open here.
        if found.as_of != AsOf::Unused || self.frozen.is_empty() {
            (self.as_of, self.details) = (found.as_of, found.details);
        }
        Ok(())
    }
}

impl Rules {
    /// Who holds `device`, and what that means.
    fn find(self, device: &Path) -> Result<Found> {
        let deadline = Instant::now() + PASSER_BY_MAX;
        let holders = loop {
            let mut holders = Holders::of(device)?;
            holders.look_at_processes();
            let is_passing =
                |other: &OtherUse| matches!(other, OtherUse::Raw { .. } | OtherUse::Unknown { .. });
            let may_refuse = !self.has_hook && !self.crash_consistent;
            if !may_refuse || Instant::now() >= deadline || !holders.others.iter().any(is_passing) {
                break holders;
            }
            std::thread::sleep(PASSER_BY_LOOK);
        };
        let (mut file_systems, mut frozen, mut unfrozen) = (Vec::new(), Vec::new(), Vec::new());
        for mounted in holders.file_systems() {
            if self.no_freeze {
                unfrozen.push(format!("{mounted} was not to be frozen"));
            } else if mounted.can_freeze() {
                match holders.open_file_system(mounted) {
                    Ok(opened) => {
                        frozen.push(opened.device);
                        file_systems.push(MountedFileSystem { name: opened.name, folder: opened.folder });
                    }
                    Err(error) => unfrozen.push(error.to_string()),
                }
            } else if !mounted.mount.read_only {
                unfrozen.push(format!("{mounted} is {}, which cannot be frozen", mounted.mount.kind));
            }
        }
        for other in &holders.others {
            match other {
                OtherUse::Lingering { .. } if !self.no_freeze => match holders.open_lingering(other) {
                    Ok(opened) if frozen.contains(&opened.device) => {}
                    Ok(opened) => {
                        frozen.push(opened.device);
                        file_systems.push(MountedFileSystem { name: opened.name, folder: opened.folder });
                    }
                    Err(error) => unfrozen.push(error.to_string()),
                },
                other => unfrozen.push(other.to_string()),
            }
        }
        self.judge(file_systems, frozen, unfrozen).map_err(|error| error.at_path(device))
    }

    fn judge(
        self,
        file_systems: Vec<MountedFileSystem>,
        frozen: Vec<(u64, u64)>,
        unfrozen: Vec<String>,
    ) -> Result<Found> {
        let names = || file_systems.iter().map(|one| one.name.clone()).collect();
        let (as_of, details) = match (unfrozen.is_empty(), file_systems.is_empty()) {
            (true, true) if self.has_hook => (AsOf::QuiescedByHook, Vec::new()),
            (true, true) => (AsOf::Unused, Vec::new()),
            (true, false) => (AsOf::FileSystemFrozen, names()),
            (false, _) if self.has_hook => (AsOf::QuiescedByHook, unfrozen),
            (false, _) if self.crash_consistent => (AsOf::CrashConsistent, unfrozen),
            (false, _) => {
                let message =
                    format!("the disk is in use and would not stand still: {}", unfrozen.join("; "));
                return Err(Error::new(ErrorKind::NotQuiet, message).advise(self.advice));
            }
        };
        Ok(Found { as_of, details, file_systems, frozen })
    }
}

impl Found {
    fn nobody() -> Self {
        Self { as_of: AsOf::Unused, details: Vec::new(), file_systems: Vec::new(), frozen: Vec::new() }
    }
}

impl Quiesce for DiskQuiesce {
    fn sync_file_system(&mut self) -> Result<bool> {
        self.look_again()?;
        self.inner.sync_file_system()
    }

    fn run_hook(&mut self) -> Result<()> {
        if !self.looked {
            self.look_again()?;
        }
        self.looked = false;
        self.inner.run_hook()
    }

    fn freeze_file_system(&mut self) -> Result<()> {
        self.inner.freeze_file_system()
    }

    fn thaw(&mut self) -> Result<()> {
        self.inner.thaw()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Rules =
        Rules { has_hook: false, crash_consistent: false, no_freeze: false, advice: "try" };

    fn judged(rules: Rules, unfrozen: &[&str]) -> Result<AsOf> {
        let unfrozen = unfrozen.iter().map(|&text| text.to_owned()).collect();
        rules.judge(Vec::new(), Vec::new(), unfrozen).map(|found| found.as_of)
    }

    #[test]
    fn who_does_not_stand_still_is_a_reason_to_refuse_or_is_told() {
        assert_eq!(judged(NOTHING, &[]).unwrap(), AsOf::Unused);
        let error = judged(NOTHING, &["swap", "fat"]).unwrap_err();
        assert_eq!((error.kind(), error.advice()), (ErrorKind::NotQuiet, Some("try")));
        assert!(error.to_string().ends_with("swap; fat"), "{error}");
        let hooked = Rules { has_hook: true, ..NOTHING };
        assert_eq!(judged(hooked, &["swap"]).unwrap(), AsOf::QuiescedByHook);
        let lenient = Rules { crash_consistent: true, ..NOTHING };
        assert_eq!(judged(lenient, &["swap"]).unwrap(), AsOf::CrashConsistent);
        assert_eq!(judged(lenient, &[]).unwrap(), AsOf::Unused, "nothing worse is said than is");
    }

    #[test]
    fn every_state_has_words() {
        for as_of in [AsOf::FileSystemFrozen, AsOf::QuiescedByHook, AsOf::CrashConsistent, AsOf::Unused] {
            assert_ne!(AsOf::phrase(Some(as_of.word())), AsOf::phrase(None));
        }
    }
}
