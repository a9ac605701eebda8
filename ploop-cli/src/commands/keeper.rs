//! `ploop keeper`: the process that holds what must outlive a server.

use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ploop_core::device::control::Connection;
use ploop_core::device::fuse::keeper::{self, Keeper, Launch, Orphan, Protection};
use ploop_core::device::fuse::sys;
use ploop_core::device::runtime::{Entry, Failure, ProcessMark, State};
use ploop_core::{Error, ErrorKind, Result};

use crate::exit::Outcome;
use crate::guarding;
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

    /// Take the place of a keeper that died: the inherited descriptors of /dev/fuse, of its memory, of the connection to
    /// the server that goes on, and of that server's process
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', num_args = 1)]
    adopt: Vec<RawFd>,

    /// The run-time folder of the disk
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    guarding::name_process(c"ploop-keeper");
    let entry = Entry::at(&arguments.folder)?;
    let result = keep(&entry, arguments, output);
    if let Err(error) = &result {
        // Also a failure before the first server: whoever mounts waits for this.
        if entry.path().exists() {
            // One that cannot be written is in the log, as all of it.
            let _ = entry.update(|state| {
                state.failure.get_or_insert_with(|| Failure::of(error));
            });
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
    let adopted = adopted(&arguments.adopt)?;
    if adopted.is_none() {
        entry.update(|state| state.keeper = Some(own))?;
    }
    // A name for people: the run-time folder's, should the record not be there.
    let name = entry.state().map_or_else(|_| entry.path().to_path_buf(), |state| served_name(&state));
    let prepare = |launch: &Launch| {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(guarding::process_name("server", &name));
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
    let keeper = match adopted {
        None => Keeper::new(entry.clone())?,
        Some(orphan) => Keeper::adopting(entry.clone(), orphan)?,
    };
    keeper.run(prepare, &|text| output.warn(text))
}

/// What a server that has lost its keeper passes to this one; `None` for the first keeper of a disk.
fn adopted(numbers: &[RawFd]) -> Result<Option<Orphan>> {
    let &[fuse, memory, connection, process] = numbers else {
        return match numbers {
            [] => Ok(None),
            _ => Err(Error::new(ErrorKind::Parameter, "take a keeper's place: four descriptors are needed")),
        };
    };
    let inherited = |number: RawFd| {
        sys::inherited(number)
            .map_err(|cause| Error::io(ErrorKind::Parameter, "take over a descriptor of the server", cause))
    };
    let server = u32::try_from(nix::unistd::getppid().as_raw())
        .map_err(|_| Error::new(ErrorKind::System, "take a keeper's place: the server is gone"))?;
    Ok(Some(Orphan {
        fuse: inherited(fuse)?,
        memory: inherited(memory)?,
        connection: Connection::inherited(inherited(connection)?),
        process: (inherited(process)?, server),
    }))
}

/// What is served, for people.
fn served_name(state: &State) -> PathBuf {
    let top = state.images.last();
    state.descriptor.as_ref().or(top).map(|file| file.path.clone()).unwrap_or_default()
}
