//! `ploop stat`: what a running disk has done so far.
//!
//! The original prints counters of its kernel driver. Those do not exist here; these are the counters of the disk's server,
//! since that server started.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::device::Disk;
use ploop_core::device::runtime::Runtime;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::exit::Outcome;
use crate::output::{Output, Report};

/// What a server is asked for.
pub(crate) const VERB: &str = "statistics";

/// Show what a running disk has done: requests, bytes, syncs
///
/// Counted since its server started; a server that succeeds another begins at 0.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit codes: 40 the disk is not mounted.")]
pub(crate) struct Arguments {
    /// The disk, by its block device
    #[arg(short = 'd', long = "device", value_name = "DEVICE", required_unless_present = "disk")]
    device: Option<PathBuf>,

    /// Not here: a layout of the original's kernel counters
    #[arg(short = 'c', hide = true)]
    columns: bool,

    /// Not here: a layout of the original's kernel counters
    #[arg(short = 'l', hide = true)]
    line: bool,

    /// The disk, by its device, mount point, descriptor or image
    #[arg(value_name = "DISK", conflicts_with = "device")]
    disk: Option<PathBuf>,
}

/// Names and values, in the server's order.
#[derive(Serialize)]
#[serde(transparent)]
struct Counted(Map<String, Value>);

impl Report for Counted {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        for (name, value) in &self.0 {
            writeln!(out, "{name:<20} {value}")?;
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    if arguments.columns || arguments.line {
        return Err(Error::new(
            ErrorKind::Parameter,
            "stat: -c and -l show counters of a kernel driver that is not used",
        )
        .advise("without them the counters of the disk's server are shown; --json for programs")
        .into());
    }
    let disk = arguments.device.as_ref().or(arguments.disk.as_ref());
    let disk = disk.ok_or_else(|| Error::new(ErrorKind::Parameter, "stat: say which disk"))?;
    let runtime = Runtime::of_user()?;
    let Some(state) = runtime.find(disk)? else {
        return Err(Error::new(ErrorKind::NotMounted, "stat: this is no mounted disk of ploop")
            .at_path(disk)
            .advise("`ploop list` shows what is mounted; `ploop info` shows a disk that is not")
            .into());
    };
    let connection = crate::serving::connect(&runtime.entry(&state.id))?;
    connection.request(VERB, &Value::Null, &[])?;
    match connection.answer(VERB, None, drop)? {
        Value::Object(counted) => output.report(&Counted(counted)),
        other => Err(Error::new(ErrorKind::System, format!("stat: the server answered {other}")).into()),
    }
}

/// The server's answer.
pub(crate) fn count(disk: &Disk) -> Result<Value> {
    serde_json::to_value(disk.statistics())
        .map_err(|cause| Error::io(ErrorKind::System, "write the statistics", cause.into()))
}
