//! `ploop delete`, `ploop rm`: taking a delta from a running device, which is done by names here.

use std::path::PathBuf;

use ploop_core::{Error, ErrorKind};

use crate::exit::Outcome;
use crate::output::Output;

/// Not supported: see snapshot-delete
///
/// The original takes a delta from a device by its level. Here the descriptor says what belongs together, also while the disk
/// runs: use `ploop snapshot-delete -u UUID DISK`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Device
    #[arg(short = 'd', long = "device", value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// Level of the delta
    #[arg(short = 'l', long = "level", value_name = "LEVEL")]
    level: Option<String>,
}

pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> Outcome {
    Err(Error::new(ErrorKind::Parameter, "deltas are not taken from a device by their level")
        .advise("delete the snapshot by its name: ploop snapshot-delete -u UUID DISK; `ploop snapshot-list` shows them")
        .into())
}
