//! Making the writers of a disk stand still, and what may be claimed of it then: as of what a copy or a snapshot is what
//! it is.
//!
//! Who holds the disk is found out before anything begins ([`Standing::find`]) and once more right before the freeze
//! ([`look_again`]), since a copy takes long. A user that cannot be made to stand still is a reason to refuse, unless the operator's own
//! command does it (`-F`) or the state of a power loss is good enough (`--crash-consistent`), which is then said.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pcopy::freeze::{MountedFileSystem, QuiesceOptions};
use ploop_core::device::runtime::State;
use ploop_core::{Error, ErrorKind, Result};
use ploop_server::holders::{Holders, OpenedFileSystem, OtherUse};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long somebody who has the device open for writing is waited for: programs look at new devices that way.
const PASSER_BY_MAX: Duration = Duration::from_secs(1);
/// How often.
const PASSER_BY_LOOK: Duration = Duration::from_millis(100);

/// What made the state of the disk that was copied or kept one that a file system understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

/// What can be claimed of a disk once its writers stand still as `options` say.
pub(crate) struct Standing {
    /// What is to be frozen, by which commands, and what is looked at again right before.
    pub(crate) options: QuiesceOptions,
    as_of: AsOf,
    details: Vec<String>,
}

/// What is looked at again right before the freeze, by the process that freezes.
#[derive(Debug, Serialize, Deserialize)]
struct Watch {
    device: PathBuf,
    rules: Rules,
    /// The file systems that will be frozen, as the table of mounts numbers them.
    frozen: Vec<(u64, u64)>,
    /// What the report will say.
    as_of: AsOf,
}

/// What decides between going on and refusing.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Rules {
    has_hook: bool,
    crash_consistent: bool,
    no_freeze: bool,
    advice: String,
}

/// What was found, and what can be claimed if it stays so.
struct Found {
    as_of: AsOf,
    details: Vec<String>,
    file_systems: Vec<MountedFileSystem>,
    frozen: Vec<(u64, u64)>,
}

impl Standing {
    /// Finds out who holds a served disk, and opens and verifies what will be frozen. A closed disk is `None`.
    /// [`ErrorKind::NotQuiet`] when somebody holds it who cannot be made to stand still, and that is not allowed.
    pub(crate) fn find(served: Option<&State>, allowed: Allowed) -> Result<Self> {
        let rules = Rules {
            has_hook: allowed.commands.freeze_command.is_some(),
            crash_consistent: allowed.crash_consistent || allowed.no_freeze,
            no_freeze: allowed.no_freeze,
            advice: allowed.advice.to_owned(),
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
        let watch = match device.filter(|_| !rules.no_freeze) {
            None => None,
            Some(device) => {
                let watch = Watch { device, rules, frozen: found.frozen, as_of: found.as_of };
                Some(serde_json::to_string(&watch).map_err(|cause| {
                    Error::io(ErrorKind::System, "say what is looked at before a freeze", cause.into())
                })?)
            }
        };
        let options = QuiesceOptions { file_systems: found.file_systems, watch, ..allowed.commands };
        Ok(Self { options, as_of: found.as_of, details: found.details })
    }

    /// The options, and what is to be said of the outcome.
    pub(crate) fn split(self) -> (QuiesceOptions, Claim) {
        (self.options, Claim { as_of: self.as_of, details: self.details })
    }
}

/// As of what a copy or a snapshot is what it is.
pub(crate) struct Claim {
    /// In one word.
    pub(crate) as_of: AsOf,
    /// Which file systems were frozen, or who was not made to stand still.
    pub(crate) details: Vec<String>,
}

impl Claim {
    /// Says it in a report.
    pub(crate) fn tell(&self, report: &mut Value) {
        if let Value::Object(fields) = report {
            fields.insert("as_of".to_owned(), json!(self.as_of.word()));
            fields.insert("as_of_details".to_owned(), json!(self.details));
        }
    }
}

/// Somebody may have come since [`Standing::find`], as a copy takes long: what would make its claim untrue is an error.
/// What has gone is frozen all the same, for it is held open.
pub(crate) fn look_again(watch: &str) -> Result<()> {
    let watch: Watch = serde_json::from_str(watch).map_err(|cause| {
        Error::io(ErrorKind::System, "read what is looked at before a freeze", cause.into())
    })?;
    let found = watch.rules.find(&watch.device)?;
    let came = |what: &str| {
        Error::new(ErrorKind::NotQuiet, format!("{what} while the disk was copied"))
            .at_path(&watch.device)
            .advise("copy again: it is reckoned with from the start then")
    };
    if let Some(new) = found.frozen.iter().position(|one| !watch.frozen.contains(one)) {
        let name = found.file_systems.get(new).map_or("a file system", |one| one.name.as_str());
        return Err(came(&format!("{name} was mounted")));
    }
    if found.as_of == AsOf::CrashConsistent && watch.as_of != AsOf::CrashConsistent {
        return Err(came(&format!("this began: {}", found.details.join("; "))));
    }
    Ok(())
}

/// Every file system on a served disk that can be frozen, opened and verified.
pub(crate) fn file_systems_of(state: &State) -> Result<Vec<MountedFileSystem>> {
    let Some(device) = state.loop_device.as_deref() else { return Ok(Vec::new()) };
    let all = Rules { crash_consistent: true, ..Rules::default() };
    Ok(all.find(device)?.file_systems)
}

impl Rules {
    /// Who holds `device`, and what that means.
    fn find(&self, device: &Path) -> Result<Found> {
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
                        file_systems.push(standing(opened));
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
                        file_systems.push(standing(opened));
                    }
                    Err(error) => unfrozen.push(error.to_string()),
                },
                other => unfrozen.push(other.to_string()),
            }
        }
        self.judge(file_systems, frozen, unfrozen).map_err(|error| error.at_path(device))
    }

    fn judge(
        &self,
        file_systems: Vec<(String, MountedFileSystem)>,
        frozen: Vec<(u64, u64)>,
        unfrozen: Vec<String>,
    ) -> Result<Found> {
        let (names, file_systems): (Vec<_>, Vec<_>) = file_systems.into_iter().unzip();
        let (as_of, details) = match (unfrozen.is_empty(), file_systems.is_empty()) {
            (true, true) if self.has_hook => (AsOf::QuiescedByHook, Vec::new()),
            (true, true) => (AsOf::Unused, Vec::new()),
            (true, false) => (AsOf::FileSystemFrozen, names),
            (false, _) if self.has_hook => (AsOf::QuiescedByHook, unfrozen),
            (false, _) if self.crash_consistent => (AsOf::CrashConsistent, unfrozen),
            (false, _) => {
                let message =
                    format!("the disk is in use and would not stand still: {}", unfrozen.join("; "));
                return Err(Error::new(ErrorKind::NotQuiet, message).advise(self.advice.clone()));
            }
        };
        Ok(Found { as_of, details, file_systems, frozen })
    }
}

/// What is frozen, known to commands by a way to it, and what people call it.
fn standing(opened: OpenedFileSystem) -> (String, MountedFileSystem) {
    let name = opened.way.display().to_string();
    (opened.name, MountedFileSystem { name, folder: opened.folder })
}

impl Found {
    fn nobody() -> Self {
        Self { as_of: AsOf::Unused, details: Vec::new(), file_systems: Vec::new(), frozen: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Rules {
        Rules { advice: "try".to_owned(), ..Rules::default() }
    }

    fn judged(rules: &Rules, unfrozen: &[&str]) -> Result<AsOf> {
        let unfrozen = unfrozen.iter().map(|&text| text.to_owned()).collect();
        rules.judge(Vec::new(), Vec::new(), unfrozen).map(|found| found.as_of)
    }

    #[test]
    fn who_does_not_stand_still_is_a_reason_to_refuse_or_is_told() {
        assert_eq!(judged(&nothing(), &[]).unwrap(), AsOf::Unused);
        let error = judged(&nothing(), &["swap", "fat"]).unwrap_err();
        assert_eq!((error.kind(), error.advice()), (ErrorKind::NotQuiet, Some("try")));
        assert!(error.to_string().ends_with("swap; fat"), "{error}");
        let hooked = Rules { has_hook: true, ..nothing() };
        assert_eq!(judged(&hooked, &["swap"]).unwrap(), AsOf::QuiescedByHook);
        let lenient = Rules { crash_consistent: true, ..nothing() };
        assert_eq!(judged(&lenient, &["swap"]).unwrap(), AsOf::CrashConsistent);
        assert_eq!(judged(&lenient, &[]).unwrap(), AsOf::Unused, "nothing worse is said than is");
    }

    #[test]
    fn every_state_has_words() {
        for as_of in [AsOf::FileSystemFrozen, AsOf::QuiescedByHook, AsOf::CrashConsistent, AsOf::Unused] {
            assert_ne!(AsOf::phrase(Some(as_of.word())), AsOf::phrase(None));
        }
    }
}
