//! `ploop guardian`: thaws a file system when the copy that froze it is gone.

use std::process::exit;

use crate::exit::Outcome;
use crate::output::Output;

/// Thaw when the freezer is gone (started by copy)
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> Outcome {
    match pcopy::freeze::guardian_main() {
        0 => Ok(()),
        code => exit(i32::from(code)),
    }
}
