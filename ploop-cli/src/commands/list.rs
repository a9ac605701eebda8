//! `ploop list`: the disks being served on this machine.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::loop_device;
use ploop_core::device::runtime::{Runtime, State};
use ploop_server::holders::{Holders, Mounted, OtherUse, printable};
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
    /// Served, but its keeper is dead: nobody would follow its server.
    Unprotected,
    /// An umount was refused half way: the device goes when its last user closes it.
    Detaching,
    /// Served, but without a block device: an umount was cut, or a program uses the exported file.
    Deviceless,
    /// Nobody serves it any more.
    Failed,
}

impl Health {
    /// What that means for whoever has to do something about it, and what.
    fn advice(self) -> Option<&'static str> {
        match self {
            Self::Running | Self::Starting => None,
            Self::Poisoned => {
                Some("writes fail: save what can be read, then umount; its exit code tells why")
            }
            Self::Unprotected => {
                Some("what was written is not safe if the server dies: umount and mount again")
            }
            Self::Detaching => Some("end what has the device open, then umount again"),
            Self::Deviceless => Some("umount ends it; an export or import at work does by itself"),
            Self::Failed => Some("umount clears what is left"),
        }
    }
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
    failure: Option<String>,
    /// What to do about a disk that is not well.
    advice: Option<String>,
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
                write!(out, " {}", printable(Path::new(point)))?;
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
            if let Some(failure) = &line.failure {
                write!(out, " {failure}")?;
            }
            if let Some(advice) = &line.advice {
                write!(out, "; {advice}")?;
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
    let holders = state.loop_device.as_deref().map(Holders::of).transpose()?.unwrap_or_default();
    let here = holders.mounts.iter().filter(|mounted| mounted.namespace.is_here);
    let mount_points = here.map(|mounted| mounted.mount.point.to_string_lossy().into_owned()).collect();
    let users = holders.mounts.iter().map(Use::of).chain(holders.others.iter().map(Use::other));
    let (health, jobs) = if state.failure.is_some() || (!state.is_running() && state.keeper.is_some()) {
        (Health::Failed, Vec::new())
    } else {
        match serving::status_of(&runtime.entry(&state.id)) {
            Ok(status) if status.poisoned => (Health::Poisoned, status.jobs),
            Ok(status) if status.ready => (served_as(&state), status.jobs),
            Ok(_) | Err(_) => (Health::Starting, Vec::new()),
        }
    };
    let top = state.images.last().map(|image| image.path.clone());
    let failure = state.failure.as_ref();
    let advice = failure.and_then(|failure| failure.advice.clone());
    Ok(Line {
        health,
        advice: advice.or_else(|| health.advice().map(str::to_owned)),
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
        failure: state.failure.map(|failure| failure.message),
        id: state.id,
        device: state.loop_device,
    })
}

/// How a disk is that answers and takes writes.
fn served_as(state: &State) -> Health {
    let Some(device) = &state.loop_device else { return Health::Deviceless };
    if loop_device::is_going(device) {
        Health::Detaching
    } else if state.keeper.is_some_and(|keeper| !keeper.is_running()) {
        Health::Unprotected
    } else {
        Health::Running
    }
}
