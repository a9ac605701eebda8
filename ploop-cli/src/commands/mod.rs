//! One file per command: `Arguments` says what may be typed, `run` does it and prints its report.

pub(crate) mod balloon;
pub(crate) mod check;
pub(crate) mod clone;
pub(crate) mod compact;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod copy;
pub(crate) mod delete;
pub(crate) mod diff;
pub(crate) mod export;
pub(crate) mod freeze_helper;
pub(crate) mod grow;
pub(crate) mod import;
pub(crate) mod info;
pub(crate) mod init;
pub(crate) mod keeper;
pub(crate) mod list;
pub(crate) mod man;
pub(crate) mod map;
pub(crate) mod merge;
pub(crate) mod mount;
pub(crate) mod refused;
pub(crate) mod resize;
pub(crate) mod restore_descriptor;
pub(crate) mod serve;
pub(crate) mod snapshot;
pub(crate) mod snapshot_delete;
pub(crate) mod snapshot_list;
pub(crate) mod snapshot_merge;
pub(crate) mod snapshot_switch;
pub(crate) mod stat;
pub(crate) mod thaw;
pub(crate) mod tsnapshot;
pub(crate) mod umount;

use crate::args::Command;
use crate::commands::refused::Refused;
use crate::exit::Outcome;
use crate::output::Output;

/// Runs one command.
pub(crate) fn run(command: &Command, output: &Output) -> Outcome {
    match command {
        Command::Init(arguments) => init::run(arguments, output),
        Command::Mount(arguments) => mount::run(arguments, output),
        Command::Umount(arguments) => umount::run(arguments, output),
        Command::Copy(arguments) => copy::run(arguments, output),
        Command::Resize(arguments) => resize::run(arguments, output),
        Command::Grow(arguments) => grow::run(arguments, output),
        Command::Convert(arguments) => convert::run(arguments, output),
        Command::Export(arguments) => export::run(arguments, output),
        Command::Import(arguments) => import::run(arguments, output),
        Command::RestoreDescriptor(arguments) => restore_descriptor::run(arguments, output),
        Command::Compact(arguments) => compact::run(arguments, output),
        Command::Balloon(arguments) => balloon::run(arguments, output),
        Command::Map(arguments) => map::run(arguments, output),
        Command::Info(arguments) => info::run(arguments, output),
        Command::Check(arguments) => check::run(arguments, output),
        Command::Fsck(arguments) => check::run_as_fsck(arguments, output),
        Command::List(arguments) => list::run(arguments, output),
        Command::Snapshot(arguments) => snapshot::run(arguments, output),
        Command::Tsnapshot(arguments) => tsnapshot::run(arguments, output),
        Command::SnapshotList(arguments) => snapshot_list::run(arguments, output),
        Command::SnapshotDelete(arguments) => snapshot_delete::run(arguments, output),
        Command::SnapshotMerge(arguments) => snapshot_merge::run(arguments, output),
        Command::SnapshotSwitch(arguments) => snapshot_switch::run(arguments, output),
        Command::Merge(arguments) => merge::run(arguments, output),
        Command::Thaw(arguments) => thaw::run(arguments, output),
        Command::Stat(arguments) => stat::run(arguments, output),
        Command::Start(words) => refused::run(Refused::Start, words),
        Command::Stop(words) => refused::run(Refused::Stop, words),
        Command::Clear(words) => refused::run(Refused::Clear, words),
        Command::TgInit(words) => refused::run(Refused::TgInit, words),
        Command::TgDeinit(words) => refused::run(Refused::TgDeinit, words),
        Command::TgStatus(words) => refused::run(Refused::TgStatus, words),
        Command::Degrade(words) => refused::run(Refused::Degrade, words),
        Command::Shuffle(words) => refused::run(Refused::Shuffle, words),
        Command::Encrypt(words) => refused::run(Refused::Encrypt, words),
        Command::Fscheck(words) => refused::run(Refused::Fscheck, words),
        Command::Replace(words) => refused::run(Refused::Replace, words),
        Command::Clone(arguments) => clone::run(arguments, output),
        Command::Diff(arguments) => diff::run(arguments, output),
        Command::Delete(arguments) => delete::run(arguments, output),
        Command::Man(arguments) => man::run(arguments, output),
        Command::Completions(arguments) => completions::run(arguments, output),
        Command::Serve(arguments) => serve::run(arguments, output),
        Command::Keeper(arguments) => keeper::run(arguments, output),
        Command::FreezeHelper(arguments) => freeze_helper::run(arguments, output),
    }
}
