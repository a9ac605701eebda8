//! The `ploop` command: parse, run one command, turn its result into an exit code.
//!
//! Printing, prompting and exiting happen in this crate only; the libraries return reports and errors. Each
//! subcommand is one file in [`commands`]: its arguments, its options for the library, its report.

mod args;
mod commands;
mod copy_service;
mod exit;
mod file_system;
mod inner_size;
mod job_service;
mod leash;
mod open;
mod output;
mod partition;
mod progress;
mod qemu;
mod quiesce;
mod repartition;
mod resize_service;
mod serving;
mod signals;
mod sizing;
mod snapshot_service;
mod snapshots;
mod space_used;
mod twin;

use std::process::ExitCode;

use args::Parsed;

fn main() -> ExitCode {
    match args::parse(std::env::args_os()) {
        Parsed::Run(command_line) => {
            let output = output::Output::new(command_line.json, command_line.verbosity());
            let result = commands::run(&command_line.command, &output);
            exit::code_of(&result, &output)
        }
        Parsed::Help(text) => exit::printed(output::print_text(&text)),
        Parsed::Usage(text) => {
            output::complain(&text);
            ExitCode::from(exit::USAGE)
        }
    }
}
