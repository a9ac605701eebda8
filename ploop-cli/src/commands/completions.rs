//! `ploop completions`: the completion script of a shell, on stdout.

use crate::exit::Outcome;
use crate::output::{self, Output};

/// Print the completion script of a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(arguments: &Arguments, _output: &Output) -> Outcome {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut crate::args::definition(), "ploop", &mut text);
    output::print_bytes(&text)
}
