//! `ploop keeper`: the process that holds what must outlive a server.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use ploop_core::device::fuse::keeper::{self, Keeper, Launch, Protection};
use ploop_core::device::runtime::{Entry, Failure, ProcessMark};
use ploop_core::{Error, ErrorKind, Result};

use crate::exit::Outcome;
use crate::output::Output;

/// Hold what outlives a server (started by mount)
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Go on where the kernel cannot protect a server against waiting for its own device
    #[arg(long)]
    allow_reclaim_stall: bool,

    /// Threads of a server
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    threads: usize,

    /// The run-time folder of the disk
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let entry = Entry::at(&arguments.folder)?;
    let result = keep(&entry, arguments, output);
    if let Err(error) = &result {
        // Also a failure before the first server: whoever mounts waits for this.
        if entry.path().exists() {
            entry.update(|state| {
                state.failure.get_or_insert_with(|| Failure::of(error));
            })?;
        }
    }
    Ok(result?)
}

fn keep(entry: &Entry, arguments: &Arguments, output: &Output) -> Result<()> {
    // Its own session: the end of the terminal is none of its business. It fails when it has one already.
    let _ = nix::unistd::setsid();
    // It must be able to start a successor while memory is short, and dirty pages wait for that one.
    let protection = Protection { allow_reclaim_stall: arguments.allow_reclaim_stall, lock_memory: true };
    keeper::protect_process(&protection)?;
    let own = ProcessMark::own().ok_or_else(|| {
        Error::new(ErrorKind::System, "find out when this process started: is /proc mounted?")
    })?;
    entry.update(|state| state.keeper = Some(own))?;
    let prepare = |launch: &Launch| {
        let mut command = Command::new("/proc/self/exe");
        command.arg("serve").arg("--mode").arg(launch.mode.word());
        command.arg("--fuse").arg(launch.fuse.to_string()).arg("--memory").arg(launch.memory.to_string());
        command.arg("--keeper").arg(launch.keeper.to_string());
        command.arg("--threads").arg(arguments.threads.to_string());
        if arguments.allow_reclaim_stall {
            command.arg("--allow-reclaim-stall");
        }
        // Its words go where the keeper's go: to the log.
        command.arg(entry.path()).stdin(Stdio::null());
        command
    };
    Keeper::new(entry.clone())?.run(prepare, &|text| output.warn(text))
}
