//! `ploop list`: the disks being served on this machine.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::device::runtime::{self, Runtime, State};
use ploop_core::error::shown;
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
    /// About to be served, or a server is just succeeding another.
    Starting,
    /// A sync has failed: writes fail, reads go on.
    Poisoned,
    /// Nobody serves it any more.
    Failed,
}

#[derive(Debug, Serialize)]
struct Line {
    id: String,
    health: Health,
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
            let device = line.device.as_ref().map_or_else(|| "-".into(), |device| shown(device));
            write!(out, "{device:<12} {}", shown(&line.disk))?;
            for point in &line.mount_points {
                write!(out, " {}", shown(point))?;
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
            if let Some(failure) = &line.failure {
                write!(out, " {failure}")?;
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
    output.report(&Lines { disks, all: arguments.all })
}

fn line(runtime: &Runtime, state: State) -> ploop_core::Result<Line> {
    let mount_points = match &state.loop_device {
        Some(device) => runtime::mount_points_of(device)?,
        None => Vec::new(),
    };
    let (health, jobs) = if state.failure.is_some() || (!state.is_running() && state.keeper.is_some()) {
        (Health::Failed, Vec::new())
    } else {
        match serving::status_of(&runtime.entry(&state.id)) {
            Ok(status) if status.poisoned => (Health::Poisoned, status.jobs),
            Ok(status) if status.ready => (Health::Running, status.jobs),
            Ok(_) | Err(_) => (Health::Starting, Vec::new()),
        }
    };
    let top = state.images.last().map(|image| image.path.clone());
    Ok(Line {
        health,
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
