//! The `ploop` command: parse, run one command, turn its result into an exit code.
//!
//! Printing, prompting and exiting happen in this crate only; the libraries return reports and errors. Each
//! subcommand is one file in [`commands`]: its arguments, its options for the library, its report.

mod accepting;
mod args;
mod commands;
mod condition;
mod copy_ends;
mod copy_service;
mod disk_bytes;
mod exit;
mod file_system;
mod freeze_service;
mod full_host;
mod guarding;
mod inner_size;
mod job_service;
mod leash;
mod names;
mod open;
mod output;
mod partition;
mod partition_table;
mod progress;
mod qemu;
mod quiesce;
mod repartition;
mod resize_plan;
mod resize_service;
mod serving;
mod signals;
mod signature;
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
            // Not parsed, so only looked for: who wants JSON gets no text.
            if std::env::args_os().skip(1).take_while(|one| one != "--").any(|one| one == "--json") {
                let message = text.trim().strip_prefix("error: ").unwrap_or(text.trim());
                let (message, rest) = message.split_once("\n\n").unwrap_or((message, ""));
                let error = ploop_core::Error::new(ploop_core::ErrorKind::Parameter, message);
                let rest = rest.trim();
                let error = if rest.is_empty() { error } else { error.advise(rest) };
                output::Output::new(true, 0).error(&error);
                return ExitCode::from(exit::USAGE);
            }
            output::complain(&text);
            ExitCode::from(exit::USAGE)
        }
    }
}
