//! The `pcopy` command: the bare copy of a disk that nobody uses. Standard output is the wire, so people read standard
//! error. A running disk is copied by `ploop copy`, which knows its server.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use pcopy::source::DiskSource;
use pcopy::source_chain::BundleSnapshots;
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::wire::ImageKind;
use pcopy::{Event, Link, NothingToQuiesce, Peer, ReceiveOptions, SendOptions, Silent};
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind, Result};

/// Copy a disk that nobody uses through a pipe
///
/// One-way: pcopy send DISK | ssh HOST pcopy receive FILE. Two-way: pcopy send --to 'ssh HOST pcopy receive FILE' DISK.
#[derive(Parser)]
#[command(name = "pcopy", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send an image, or the disk of a descriptor, to standard output or to a receiver's command
    Send {
        /// The image file, its folder or its DiskDescriptor.xml
        disk: PathBuf,
        /// Start this receiver and talk to it both ways: words as for a shell, but no shell reads them
        #[arg(long, value_name = "COMMAND")]
        to: Option<String>,
        /// The file or block device is the bytes of the disk, without header
        #[arg(long)]
        raw: bool,
        /// Send all snapshots of the disk, delta by delta
        #[arg(long, conflicts_with = "raw")]
        chain: bool,
        /// Give up when the other side is silent for so long
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        stall_timeout: u64,
        /// Thaw and give up when the receiver keeps the disk frozen for so much longer than predicted
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        freeze_stall_timeout: u64,
    },
    /// Receive a copy from standard input into a new image file
    Receive {
        /// The file; it must not exist
        file: PathBuf,
        /// Kind of image; as the source by default
        #[arg(short = 'f', value_enum)]
        format: Option<Format>,
        /// Cluster size in sectors; as the source by default
        #[arg(short = 'b', value_name = "SECTORS")]
        cluster_sectors: Option<u32>,
        /// Format version; as the source by default
        #[arg(short = 'v', value_parser = clap::value_parser!(u8).range(1..=2))]
        format_version: Option<u8>,
        /// Give up when the other side is silent for so long
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        stall_timeout: u64,
    },
    /// Freezes and thaws for a copy
    #[command(name = pcopy::freeze::HELPER_SUBCOMMAND, hide = true)]
    FreezeHelper,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// An image that grows
    #[value(alias = "ploop1")]
    Expanded,
    /// The bytes of the disk
    Raw,
    /// An image with all its clusters in place
    Preallocated,
}

impl From<Format> for ImageKind {
    fn from(format: Format) -> Self {
        match format {
            Format::Expanded => Self::Expanded,
            Format::Raw => Self::Raw,
            Format::Preallocated => Self::Preallocated,
        }
    }
}

/// Cluster in which a raw disk is seen: it has none of its own.
const RAW_CLUSTER: Sectors = Sectors(2048);

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let is_help = !error.use_stderr();
            // Nothing can be said if this cannot.
            let _ = error.print();
            return if is_help { ExitCode::SUCCESS } else { ErrorKind::Parameter.exit_code().into() };
        }
    };
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            error.kind().exit_code().into()
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Send { disk, to, raw, chain, stall_timeout, freeze_stall_timeout } => {
            // Until the end: nobody else mounts it meanwhile.
            let _claim = if raw { claim_device(&disk)? } else { None };
            let (mut source, mut snapshots) = if chain {
                let (snapshots, source) = BundleSnapshots::open_closed(&disk)?;
                (source, Some(snapshots))
            } else {
                (DiskSource::open_closed(&disk, raw.then_some(RAW_CLUSTER))?, None)
            };
            let options = SendOptions {
                stall_timeout: seconds(stall_timeout)?,
                freeze_stall_timeout: seconds(freeze_stall_timeout)?,
                ..Default::default()
            };
            let (link, peer) = match to {
                Some(to) => {
                    let (link, peer) = Peer::spawn(&to, true)?;
                    (link, Some(peer))
                }
                None => (Link::standard_output()?, None),
            };
            let quiesce = &mut NothingToQuiesce;
            let observer = |event: &Event| {
                if let (Event::Started { .. }, Some(peer)) = (event, &peer) {
                    peer.answered();
                }
            };
            let sent = match &mut snapshots {
                Some(snapshots) => {
                    pcopy::send_chain(snapshots, &mut source, quiesce, link, &options, &observer)
                }
                None => pcopy::send(&mut source, quiesce, link, &options, &observer),
            };
            let report = match (sent, peer) {
                (Ok(report), None) => report,
                (Ok(report), Some(peer)) => {
                    if let Some(status) = peer.finish()?.status.filter(|status| !status.success()) {
                        eprintln!("pcopy: the copy is in place, though its receiver ended with {status}");
                    }
                    report
                }
                (Err(error), peer) => {
                    // Its message is on standard error already, and the error matters more than how it ended.
                    let _ = peer.map(Peer::give_up);
                    return Err(error);
                }
            };
            eprintln!(
                "pcopy: sent {} bytes of data in {:.1} s, as of: a closed disk",
                report.data_bytes, report.seconds
            );
        }
        Command::Receive { file, format, cluster_sectors, format_version, stall_timeout } => {
            let options =
                ImageOptions { image: format.map(Into::into), version: format_version, cluster_sectors };
            let mut destination = ImageDestination::new(&file, options)?;
            let options = ReceiveOptions { stall_timeout: seconds(stall_timeout)?, ..Default::default() };
            let report = pcopy::receive(Link::standard()?, &mut destination, &options, &Silent)?;
            eprintln!(
                "pcopy: {}: {} bytes of data in {:.1} s",
                file.display(),
                report.data_bytes,
                report.seconds
            );
        }
        Command::FreezeHelper => return Ok(pcopy::helper_main(|_| Ok(())).into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// A block device for ourselves alone, as long as it is held; nothing for a file, which is locked when it is opened.
fn claim_device(disk: &Path) -> Result<Option<File>> {
    let is_device = std::fs::metadata(disk).is_ok_and(|status| status.file_type().is_block_device());
    if !is_device {
        return Ok(None);
    }
    let opened = File::options().read(true).custom_flags(nix::libc::O_EXCL).open(disk);
    opened.map(Some).map_err(|cause| match cause.raw_os_error() {
        Some(nix::libc::EBUSY) => {
            Error::io(ErrorKind::InUse, "the device is mounted or otherwise in use", cause)
                .at_path(disk)
                .advise("unmount it; a running disk is copied by `ploop copy`")
        }
        _ => Error::io(ErrorKind::Open, "open the device", cause).at_path(disk),
    })
}

fn seconds(seconds: u64) -> Result<Duration> {
    if seconds == 0 {
        return Err(Error::new(ErrorKind::Parameter, "a time-out of 0 seconds"));
    }
    Ok(Duration::from_secs(seconds))
}

fn complain(error: &Error) {
    eprint!("pcopy: {error}");
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        eprint!(": {next}");
        cause = next.source();
    }
    eprintln!();
    if let Some(advice) = error.advice() {
        eprintln!("pcopy: {advice}");
    }
}
