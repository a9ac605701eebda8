//! `ploop list`: the disks being served on this machine.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pcopy::freeze::FreezeRecord;
use pcopy::freeze::record::now_ms;
use ploop_core::device::runtime::{Runtime, State};
use ploop_core::error::shown;
use ploop_server::holders::{Holders, Mounted, OtherUse};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report};
use crate::serving;

/// List the disks that are served
///
/// One line for each: block device, image (or descriptor), mount point, component.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also show the processes, the state, and what works on the disk
    #[arg(short = 'a', long = "all")]
    all: bool,
}

/// How a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    /// Served.
    Running,
    /// Served, and nobody would succeed the server: its keeper is dead.
    Unguarded,
    /// The server gives no sign of life.
    Hanging,
    /// About to be served, or a server is just succeeding another.
    Starting,
    /// A sync has failed: writes fail, reads go on.
    Poisoned,
    /// Nobody serves it any more.
    Failed,
}

/// A user of the device.
#[derive(Debug, Serialize)]
struct Use {
    /// For people.
    text: String,
    /// Where the file system is mounted, if it is one.
    mount_point: Option<String>,
    /// Its kind.
    file_system: Option<String>,
    /// The node that is used: the device, a partition of it, or what stands on it.
    node: Option<PathBuf>,
    /// A process of the mount namespace it is in, if that is another than ours.
    process: Option<u32>,
    /// Name of that process's program.
    command: Option<String>,
}

impl Use {
    fn of(mounted: &Mounted) -> Self {
        let elsewhere = Some(&mounted.namespace).filter(|namespace| !namespace.is_here);
        Self {
            text: mounted.to_string(),
            mount_point: Some(mounted.mount.point.to_string_lossy().into_owned()),
            file_system: Some(mounted.mount.kind.clone()),
            node: Some(mounted.node.path.clone()),
            process: elsewhere.map(|namespace| namespace.process),
            command: elsewhere.map(|namespace| namespace.command.clone()),
        }
    }

    fn other(other: &OtherUse) -> Self {
        let text = other.to_string();
        Self { text, mount_point: None, file_system: None, node: None, process: None, command: None }
    }
}

#[derive(Debug, Serialize)]
struct Line {
    id: String,
    health: Health,
    device: Option<PathBuf>,
    disk: PathBuf,
    /// Those that can be reached here.
    mount_points: Vec<String>,
    /// All of them, and what else uses the device.
    used_by: Vec<Use>,
    component: Option<String>,
    read_only: bool,
    disk_bytes: Option<u64>,
    keeper: Option<u32>,
    server: Option<u32>,
    takeovers: u32,
    jobs: Vec<String>,
    /// Since when it stands still for a copy or a snapshot, in milliseconds since 1970.
    frozen_since_ms: Option<u64>,
    /// Why it could not be thawed.
    thaw_failure: Option<String>,
    failure: Option<String>,
    /// What is wrong, though the disk goes on.
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Lines {
    disks: Vec<Line>,
    #[serde(skip)]
    all: bool,
}

impl Report for Lines {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        for line in &self.disks {
            let device = line.device.as_ref().map_or_else(|| "-".into(), |device| shown(&device));
            write!(out, "{device:<12} {}", shown(&line.disk))?;
            for point in &line.mount_points {
                write!(out, " {}", shown(Path::new(point)))?;
            }
            for user in
                line.used_by.iter().filter(|user| user.mount_point.is_none() || user.process.is_some())
            {
                write!(out, " ({})", user.text)?;
            }
            if let Some(component) = &line.component {
                write!(out, " {component}")?;
            }
            if self.all || line.health != Health::Running {
                let id = |id: Option<u32>| id.map_or_else(|| "-".to_owned(), |id| id.to_string());
                let health = format!("{:?}", line.health).to_lowercase();
                write!(out, " [{health} keeper {} server {}", id(line.keeper), id(line.server))?;
                if line.takeovers > 0 {
                    write!(out, " takeovers {}", line.takeovers)?;
                }
                if !line.jobs.is_empty() {
                    write!(out, " works at {}", line.jobs.join(", "))?;
                }
                write!(out, "]")?;
            }
            if let Some(since) = line.frozen_since_ms {
                let seconds = now_ms().saturating_sub(since) / 1000;
                write!(out, " [frozen since {} ({seconds} s)", utc(since))?;
                if let Some(failure) = &line.thaw_failure {
                    write!(out, ", the thaw failed: {failure}; free it with: ploop thaw {}", line.id)?;
                }
                write!(out, "]")?;
            }
            if let Some(failure) = &line.failure {
                write!(out, " {failure}")?;
            }
            writeln!(out)?;
            for warning in &line.warnings {
                writeln!(out, "    {warning}")?;
            }
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let runtime = Runtime::of_user()?;
    runtime.sweep()?;
    let disks = runtime
        .states()?
        .into_iter()
        .map(|state| line(&runtime, state))
        .collect::<ploop_core::Result<Vec<_>>>()?;
    output.report(&Lines { disks, all: arguments.all })
}

/// A moment, in milliseconds since 1970, as UTC for people.
fn utc(moment_ms: u64) -> String {
    let seconds = moment_ms / 1000;
    let (days, in_day) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that the leap day is the last of its year; eras of 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn line(runtime: &Runtime, state: State) -> ploop_core::Result<Line> {
    let holders = state.loop_device.as_deref().map(Holders::of).transpose()?.unwrap_or_default();
    let here = holders.mounts.iter().filter(|mounted| mounted.namespace.is_here);
    let mount_points = here.map(|mounted| mounted.mount.point.to_string_lossy().into_owned()).collect();
    let users = holders.mounts.iter().map(Use::of).chain(holders.others.iter().map(Use::other));
    let has_keeper = state.keeper.is_some_and(|keeper| keeper.is_running());
    let mut warnings = Vec::new();
    let (health, jobs) = if state.failure.is_some() || (!state.is_running() && state.keeper.is_some()) {
        (Health::Failed, Vec::new())
    } else if let Some(trouble) = state.trouble.as_ref().filter(|_| has_keeper) {
        // A server that hangs is not asked.
        warnings.push(trouble.clone());
        (Health::Hanging, Vec::new())
    } else {
        match serving::status_of(&runtime.entry(&state.id)) {
            Ok(status) if status.poisoned => (Health::Poisoned, status.jobs),
            Ok(status) if status.ready && serving::is_unguarded(&state, &status) => {
                warnings.push(serving::UNGUARDED.to_owned());
                warnings.extend(status.warnings);
                (Health::Unguarded, status.jobs)
            }
            Ok(status) if status.ready => {
                warnings.extend(status.warnings);
                (Health::Running, status.jobs)
            }
            Ok(_) | Err(_) => (Health::Starting, Vec::new()),
        }
    };
    // A record that cannot be read is one, and says that the disk stands.
    let frozen = FreezeRecord::read(&runtime.entry(&state.id).frozen_file());
    let (frozen_since_ms, thaw_failure) = match frozen {
        Ok(None) => (None, None),
        Ok(Some(record)) => (Some(record.since_ms), record.failure),
        Err(error) => (Some(now_ms()), Some(error.to_string())),
    };
    let top = state.images.last().map(|image| image.path.clone());
    Ok(Line {
        health,
        disk: state.descriptor.map(|file| file.path).or(top).unwrap_or_default(),
        mount_points,
        used_by: users.collect(),
        component: state.component,
        read_only: state.open.read_only,
        disk_bytes: state.size_bytes,
        keeper: state.keeper.map(|process| process.id),
        server: state.server.map(|process| process.id),
        takeovers: state.takeovers,
        jobs,
        frozen_since_ms,
        thaw_failure,
        warnings,
        failure: state.failure.map(|failure| failure.message),
        id: state.id,
        device: state.loop_device,
    })
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn moments_are_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696_123), "2000-02-29T12:34:56Z");
        assert_eq!(utc(4_102_444_799_000), "2099-12-31T23:59:59Z");
    }
}
