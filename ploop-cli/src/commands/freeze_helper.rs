//! `ploop freeze-helper`: freezes and thaws for a copy or a snapshot.

use std::process::exit;

use crate::exit::Outcome;
use crate::output::Output;

/// Freeze and thaw as told on standard input (started by copy and snapshot)
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> Outcome {
    match pcopy::helper_main(crate::quiesce::look_again) {
        0 => Ok(()),
        code => exit(i32::from(code)),
    }
}
