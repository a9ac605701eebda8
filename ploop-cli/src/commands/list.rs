//! `ploop list`: the disks being served on this machine.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pcopy::freeze::FreezeRecord;
use pcopy::freeze::record::now_ms;
use ploop_core::device::runtime::{Runtime, State};
use ploop_core::error::shown;
use ploop_server::holders::{Holders, Mounted, OtherUse};
use serde::Serialize;

use crate::condition::{Condition, Word, utc};
use crate::exit::Outcome;
use crate::output::{Output, Report};

/// List the disks that are served
///
/// One line for each: block device, image (or descriptor), mount point, component.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also show the processes, the state, and what works on the disk
    #[arg(short = 'a', long = "all")]
    all: bool,

    /// End with an exit code that says whether a disk is not well: 17 one is being mounted or taken over, 20 writes wait for
    /// space on the host, 12 its keeper is dead, 16 a sync has failed, 2 nobody serves it any more or its server hangs. The
    /// worst counts
    #[arg(long)]
    check: bool,
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
    /// The word of `condition`.
    health: Word,
    condition: Condition,
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
            let device = line.device.as_ref().map_or_else(|| "-".into(), |device| shown(device));
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
            if self.all || line.health != Word::Running {
                let id = |id: Option<u32>| id.map_or_else(|| "-".to_owned(), |id| id.to_string());
                let health = line.health.text();
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
                write!(out, " [frozen since {} ({seconds} s)", utc(since / 1000))?;
                if let Some(failure) = &line.thaw_failure {
                    write!(out, ", the thaw failed: {failure}; free it with: ploop thaw {}", line.id)?;
                }
                write!(out, "]")?;
            }
            if line.health != Word::Running {
                write!(out, " {}", line.condition.explanation())?;
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
    let worst = disks.iter().filter(|line| line.health != Word::Running).max_by_key(|line| line.health);
    let error = worst.filter(|_| arguments.check).and_then(|line| line.condition.error(&line.disk));
    output.report(&Lines { disks, all: arguments.all })?;
    error.map_or(Ok(()), |error| Err(error.into()))
}

fn line(runtime: &Runtime, state: State) -> ploop_core::Result<Line> {
    let holders = state.loop_device.as_deref().map(Holders::of).transpose()?.unwrap_or_default();
    let here = holders.mounts.iter().filter(|mounted| mounted.namespace.is_here);
    let mount_points = here.map(|mounted| mounted.mount.point.to_string_lossy().into_owned()).collect();
    let users = holders.mounts.iter().map(Use::of).chain(holders.others.iter().map(Use::other));
    let (condition, status) = Condition::of(&runtime.entry(&state.id), &state);
    let (jobs, warnings) = status.map(|status| (status.jobs, status.warnings)).unwrap_or_default();
    // A record that cannot be read is one, and says that the disk stands.
    let frozen = FreezeRecord::read(&runtime.entry(&state.id).frozen_file());
    let (frozen_since_ms, thaw_failure) = match frozen {
        Ok(None) => (None, None),
        Ok(Some(record)) => (Some(record.since_ms), record.failure),
        Err(error) => (Some(now_ms()), Some(error.to_string())),
    };
    let top = state.images.last().map(|image| image.path.clone());
    Ok(Line {
        health: condition.word,
        condition,
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
