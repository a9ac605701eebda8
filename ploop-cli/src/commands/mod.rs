//! One file per command: `Arguments` says what may be typed, `run` does it and prints its report.

pub(crate) mod completions;
pub(crate) mod copy;
pub(crate) mod guardian;
pub(crate) mod info;
pub(crate) mod init;
pub(crate) mod keeper;
pub(crate) mod list;
pub(crate) mod man;
pub(crate) mod mount;
pub(crate) mod serve;
pub(crate) mod umount;

use crate::args::Command;
use crate::exit::Outcome;
use crate::output::Output;

/// Runs one command.
pub(crate) fn run(command: &Command, output: &Output) -> Outcome {
    match command {
        Command::Init(arguments) => init::run(arguments, output),
        Command::Mount(arguments) => mount::run(arguments, output),
        Command::Umount(arguments) => umount::run(arguments, output),
        Command::Copy(arguments) => copy::run(arguments, output),
        Command::Info(arguments) => info::run(arguments, output),
        Command::List(arguments) => list::run(arguments, output),
        Command::Man(arguments) => man::run(arguments, output),
        Command::Completions(arguments) => completions::run(arguments, output),
        Command::Serve(arguments) => serve::run(arguments, output),
        Command::Keeper(arguments) => keeper::run(arguments, output),
        Command::Guardian(arguments) => guardian::run(arguments, output),
    }
}
