//! `ploop list`: the disks being served on this machine.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::device::runtime::{self, Runtime, State};
use serde::Serialize;

use crate::condition::{Condition, Word};
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
    /// space on the host, 16 a sync has failed, 2 nobody serves it any more. The worst counts
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Serialize)]
struct Line {
    id: String,
    /// The word of `condition`.
    health: Word,
    condition: Condition,
    device: Option<PathBuf>,
    disk: PathBuf,
    mount_points: Vec<PathBuf>,
    component: Option<String>,
    read_only: bool,
    disk_bytes: Option<u64>,
    keeper: Option<u32>,
    server: Option<u32>,
    takeovers: u32,
    jobs: Vec<String>,
    failure: Option<String>,
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
            let device =
                line.device.as_ref().map_or_else(|| "-".into(), |device| device.display().to_string());
            write!(out, "{device:<12} {}", line.disk.display())?;
            for point in &line.mount_points {
                write!(out, " {}", point.display())?;
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
            if line.health != Word::Running {
                write!(out, " {}", line.condition.explanation())?;
            }
            writeln!(out)?;
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
    let mount_points = match &state.loop_device {
        Some(device) => runtime::mount_points_of(device)?,
        None => Vec::new(),
    };
    let (condition, status) = Condition::of(&runtime.entry(&state.id), &state);
    let jobs = status.map_or_else(Vec::new, |status| status.jobs);
    let top = state.images.last().map(|image| image.path.clone());
    Ok(Line {
        health: condition.word,
        condition,
        disk: state.descriptor.map(|file| file.path).or(top).unwrap_or_default(),
        mount_points,
        component: state.component,
        read_only: state.open.read_only,
        disk_bytes: state.size_bytes,
        keeper: state.keeper.map(|process| process.id),
        server: state.server.map(|process| process.id),
        takeovers: state.takeovers,
        jobs,
        failure: state.failure.map(|failure| failure.message),
        id: state.id,
        device: state.loop_device,
    })
}
