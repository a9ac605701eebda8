//! `ploop copy`: a disk moves through a pipe while it is written to.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use pcopy::freeze::{Helper, QuiesceOptions};
use pcopy::peer::Peer;
use pcopy::stats::Event;
use pcopy::target::{Destination, FileTarget, ImageDestination, ImageOptions, Target};
use pcopy::transport::{Cancel, Link};
use pcopy::wire::{Hello, ImageKind};
use pcopy::{ReceiveOptions, receive};
use ploop_core::device::control::Connection;
use ploop_core::device::runtime::{Entry, OpenRequest, Runtime, State};
use ploop_core::device::{Disk, DiskOptions};
use ploop_core::format::DESCRIPTOR_NAME;
use ploop_core::io::sys;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;
use serde_json::Value;

use crate::args;
use crate::commands::init::{Format, ImageVersion};
use crate::copy_ends::Ends;
use crate::copy_service::{CHAIN_VERB, CopyRequest, Freight, VERB, Wishes, descriptor_of_all, to_value};
use crate::exit::Outcome;
use crate::full_host::SpaceWatch;
use crate::open::{self, Wanted};
use crate::output::{Output, Report, complain, human_bytes};
use crate::progress::Progress;
use crate::quiesce::{Allowed, AsOf, Standing};
use crate::signals;
use crate::{freeze_service, leash};

/// Copy a disk, running or not, through a pipe
///
/// With -s it sends: to the command given with --to, into the file given with -d, else to stdout. Without -s it
/// receives from stdin into the file given with -d.
#[derive(Debug, clap::Args)]
#[command(
    group(clap::ArgGroup::new("end").args(["source", "target"]).required(true).multiple(true)),
    after_help = "One-way:  ploop copy -s /mnt | ssh HOST ploop copy -d disk.hds    the receiver's exit code is the verdict\n\
                  Two-way:  ploop copy -s /mnt --to 'ssh HOST ploop copy -d disk.hds'\n\
                  Local:    ploop copy -s /mnt -d disk.hds\n\
                  With all snapshots: any of these with --chain, into an empty folder\n\n\
                  A running disk is sent while it is written to; what changes meanwhile is sent again, pass by pass. For the \
                  last pass the freeze command runs, the file systems on the disk are frozen, and both are undone when the \
                  copy is proven equal or has failed. The disk keeps running here. A failed copy leaves no file under the \
                  final name.\n\n\
                  Exit codes: 0 sent completely (--to and -d: received, verified and durable); with --to and -d that of the \
                  receiver if it fails, such as 1 the target exists, 20 no space; 6 the other end is gone or silent; 7 it lives \
                  and nothing moves; 13 the stream is damaged; 14 the freeze command failed, the disk does not become quiet, \
                  something uses it that cannot be frozen, the freeze would last too long, or the thaw failed and the \
                  message says what still stands; 37 in use; 75 nobody here knows whether the copy is in place."
)]
pub(crate) struct Arguments {
    /// What to send: the device, the mount point, the image or the DiskDescriptor.xml of a disk
    #[arg(short = 's', long = "source", value_name = "DISK")]
    source: Option<PathBuf>,

    /// The image file to make; it must not exist
    #[arg(short = 'd', long = "target", value_name = "FILE")]
    target: Option<PathBuf>,

    /// Send every snapshot of the disk, delta by delta, so that the new disk has them, too. What does not change any more
    /// is sent first, once. The receiver needs an empty folder, and a version that knows this
    #[arg(long, requires = "source", conflicts_with_all = ["cluster_sectors", "version"])]
    chain: bool,

    /// Command that stops the writers before the last pass, run by sh
    #[arg(short = 'F', long = "freeze", value_name = "COMMAND", requires = "source")]
    freeze_command: Option<String>,

    /// Command that undoes the freeze command, run by sh when the disk runs again, also after a failure
    #[arg(long = "thaw", value_name = "COMMAND", requires = "freeze_command")]
    thaw_command: Option<String>,

    /// Where something uses the disk that can neither be frozen nor is stopped by -F: go on, and say so. The copy is then
    /// as after a power loss
    #[arg(long, requires = "source")]
    crash_consistent: bool,

    /// Send to this command's stdin and read its answers from its stdout; quotes and backslashes as in a shell,
    /// nothing else of a shell
    #[arg(long = "to", value_name = "COMMAND", requires = "source", conflicts_with = "target")]
    to: Option<String>,

    /// Give up rather than freeze for longer than this, from the end of the freeze command to the thaw: before the freeze
    /// by prediction, later by the clock
    #[arg(long, value_name = "MILLISECONDS", requires = "source", value_parser = args::integer)]
    max_freeze: Option<u64>,

    /// Undo the freeze and give up when the disk would stand still for longer than this, from the start of the freeze
    /// command to the end of the thaw; the freeze command is ended then
    #[arg(long, value_name = "MILLISECONDS", requires = "source", value_parser = args::integer)]
    max_outage: Option<u64>,

    /// Try a freeze that turns out too long again also when that runs the freeze command once more
    #[arg(long, requires = "freeze_command")]
    retry_hooks: bool,

    /// How long the freeze command may take
    #[arg(long, value_name = "SECONDS", requires = "source", value_parser = args::integer)]
    freeze_timeout: Option<u64>,

    /// Give up when the other end moves nothing for this long
    #[arg(long, value_name = "SECONDS", value_parser = args::integer)]
    stall_timeout: Option<u64>,

    /// Thaw and give up when the receiver keeps the disk frozen for this much longer than predicted
    #[arg(long, value_name = "SECONDS", default_value = "10", requires = "source", value_parser = args::integer)]
    freeze_stall_timeout: u64,

    /// 1 sends the original's stream, to stdout or -o, for a receiver that knows no other. It has no checksums, and
    /// whether it arrived is known to the receiver alone
    #[arg(long, value_name = "1|2", default_value_t = 2, conflicts_with_all = ["target", "to"],
          value_parser = clap::value_parser!(u8).range(1..=2))]
    protocol: u8,

    /// How many passes to make at most before the freeze
    #[arg(long, value_name = "NUMBER", requires = "source", value_parser = args::integer)]
    passes: Option<u64>,

    /// Send to this open descriptor, a pipe or socket, instead of stdout
    #[arg(short = 'o', long = "output", value_name = "FD", requires = "source", conflicts_with_all = ["target", "to"],
          value_parser = clap::value_parser!(i32).range(0..))]
    output_descriptor: Option<i32>,

    /// Receive from this open descriptor, a pipe or socket, instead of stdin
    #[arg(short = 'i', long = "input", value_name = "FD", requires = "target", conflicts_with = "source",
          value_parser = clap::value_parser!(i32).range(0..))]
    input_descriptor: Option<i32>,

    /// FORMAT: that of the new image, as the source by default. FD: an open descriptor, a pipe or socket, that carries the
    /// receiver's answers; both ends of a copy have one, or neither
    #[arg(short = 'f', long = "format", value_name = "FORMAT|FD", value_parser = format_or_descriptor)]
    format: Option<FormatOrDescriptor>,

    /// Cluster size of the new image in sectors; as the source by default
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", requires = "target", value_parser = args::integer)]
    cluster_sectors: Option<u64>,

    /// Version of the new image; as the source by default
    #[arg(short = 'v', long = "version", value_name = "1|2", requires = "target")]
    version: Option<ImageVersion>,
}

/// What `-f` means: the original's `-f FD` of `copy`, and the format of all other commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FormatOrDescriptor {
    Format(Format),
    Descriptor(i32),
}

fn format_or_descriptor(text: &str) -> std::result::Result<FormatOrDescriptor, String> {
    if text.starts_with(|first: char| first.is_ascii_digit()) {
        return text
            .parse()
            .map(FormatOrDescriptor::Descriptor)
            .map_err(|_| "this is no number of a descriptor".to_owned());
    }
    Format::from_str(text, true)
        .map(FormatOrDescriptor::Format)
        .map_err(|_| "expected expanded, preallocated, raw, or the number of a descriptor".to_owned())
}

impl Arguments {
    fn format(&self) -> Option<Format> {
        match self.format {
            Some(FormatOrDescriptor::Format(format)) => Some(format),
            _ => None,
        }
    }

    fn feedback_descriptor(&self) -> Option<i32> {
        match self.format {
            Some(FormatOrDescriptor::Descriptor(number)) => Some(number),
            _ => None,
        }
    }

    /// What clap cannot say of an option with two meanings.
    fn check(&self) -> Result<()> {
        if self.stall_timeout == Some(0) {
            return Err(Error::new(ErrorKind::Parameter, "--stall-timeout 0: nobody can answer in no time")
                .advise("leave it out for 120 s, or give a second at least"));
        }
        if self.chain && self.protocol == 1 {
            let message = "--chain with --protocol 1: the original's stream has no snapshots";
            return Err(Error::new(ErrorKind::Parameter, message)
                .advise("leave out --protocol 1, or copy the content alone, without --chain"));
        }
        if self.chain && self.format().is_some() {
            let message = "--chain with a format (-f): all snapshots are copied as they are";
            return Err(Error::new(ErrorKind::Parameter, message)
                .advise("leave out -f, or copy the content alone, without --chain"));
        }
        if self.format().is_some() && self.target.is_none() {
            return Err(Error::new(ErrorKind::Parameter, "a format (-f) without a new image (-d)"));
        }
        if self.feedback_descriptor().is_some()
            && self.source.is_some()
            && (self.target.is_some() || self.to.is_some())
        {
            let message = "-f with a descriptor goes with a stream to stdout or -o";
            return Err(Error::new(ErrorKind::Parameter, message)
                .advise("a copy with -d or --to gets its answers from the command that it starts"));
        }
        Ok(())
    }
}

/// An end of a copy that this program was started with.
fn inherited(number: i32, option: &str) -> Result<OwnedFd> {
    sys::inherited(number).map_err(|cause| {
        Error::io(ErrorKind::Parameter, format!("take descriptor {number} (-{option})"), cause)
            .advise("open it in the shell, for example: ploop copy -s DISK -o 3 3>&1")
    })
}

/// The figures of a sent copy. They may come from a server of another version: fields are looked up by name.
struct Sent(Value);

impl Serialize for Sent {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Report for Sent {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let (report, downtime) = (&self.0, &self.0["downtime"]);
        let bytes = report["data_bytes"].as_u64().unwrap_or(0);
        let seconds = report["seconds"].as_f64().unwrap_or(0.0);
        let passes = report["passes"].as_array().map_or(0, Vec::len);
        let committed = report["committed"].as_bool().unwrap_or(false);
        let as_of = AsOf::phrase(report["as_of"].as_str());
        let state = if committed {
            format!("copied, verified and durable, {as_of}")
        } else {
            format!("sent, {as_of}; the receiver tells whether it arrived")
        };
        let mib_per_second = bytes as f64 / f64::from(1 << 20) / seconds.max(1e-3);
        let deltas = match report["deltas"].as_u64() {
            None | Some(0) => String::new(),
            Some(1) => " of 1 delta".to_owned(),
            Some(deltas) => format!(" of {deltas} deltas"),
        };
        writeln!(
            out,
            "{state}: {}{deltas} in {passes} passes and {seconds:.2} s ({mib_per_second:.0} MiB/s)",
            human_bytes(bytes)
        )?;
        let ms = |name: &str| downtime[name].as_f64().unwrap_or(0.0);
        writeln!(
            out,
            "frozen for {:.1} ms: freeze command {:.1}, file system {:.1}, last pass {:.1} ({}), seal {:.1}",
            ms("total_ms"),
            ms("hook_ms"),
            ms("file_system_ms"),
            ms("last_pass_ms"),
            human_bytes(downtime["bytes"].as_u64().unwrap_or(0)),
            ms("seal_ms"),
        )?;
        let details = report["as_of_details"].as_array().map_or(&[][..], Vec::as_slice);
        let details: Vec<_> = details.iter().filter_map(Value::as_str).collect();
        match details.as_slice() {
            [] => writeln!(out, "as of: {as_of}"),
            details => writeln!(out, "as of: {as_of}: {}", details.join("; ")),
        }?;
        if report["as_of"] == AsOf::FileSystemFrozen.word() {
            writeln!(
                out,
                "note: the file systems of the copy have the UUIDs of these; on one machine, mount one of the two"
            )?;
        }
        Ok(())
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    arguments.check()?;
    match (&arguments.source, &arguments.target) {
        (Some(source), target) => send_disk(arguments, source, target.as_deref(), output),
        (None, Some(target)) => receive_disk(arguments, target, output),
        (None, None) => {
            Err(Error::new(ErrorKind::Parameter, "say what to send (-s) or where to receive (-d)").into())
        }
    }
}

fn receive_disk(arguments: &Arguments, target: &Path, output: &Output) -> Outcome {
    // Taken before this program opens anything that could have the same number.
    let input = arguments.input_descriptor.map(|number| inherited(number, "i")).transpose()?;
    let feedback = arguments.feedback_descriptor().map(|number| inherited(number, "f")).transpose()?;
    if input.is_none() && io::stdin().is_terminal() {
        return Err(Error::new(
            ErrorKind::Parameter,
            "a copy is received from a pipe, standard input is a terminal",
        )
        .advise("ploop copy -s DISK | ploop copy -d FILE; or give what to copy with -s")
        .into());
    }
    let cancel = Cancel::new()?;
    signals::cancel(&cancel)?;
    let mut options =
        ReceiveOptions { cancel: Some(cancel), feedback: feedback.is_some(), ..ReceiveOptions::default() };
    if let Some(seconds) = arguments.stall_timeout {
        options.stall_timeout = Duration::from_secs(seconds);
    }
    open::check_new_file("copy", target)?;
    open::warn_of_name(target, output);
    let mut destination = NewImage { path: target, options: wanted_image(arguments)? };
    // Two sets of bars on one terminal would draw over each other; the sender has one.
    let progress = output.is_json().then(|| Progress::new(output));
    let observer = observer(progress.as_ref());
    let mut link = Link::standard()?;
    link.input = input.or(link.input);
    link.output = feedback.or(link.output);
    let report = receive(link, &mut destination, &options, &observer)?;
    // Standard output belongs to the answers of a two-way copy: figures go to standard error.
    if let (Some(progress), Ok(figures)) = (&progress, serde_json::to_value(&report)) {
        progress.done(&figures);
    }
    Ok(())
}

/// The image to come, looked at only when the stream has begun: whatever is wrong with it is then told to a sender
/// that waits for answers, too.
struct NewImage<'a> {
    path: &'a Path,
    options: ImageOptions,
}

impl Destination for NewImage<'_> {
    fn create(&mut self, hello: &Hello) -> Result<Box<dyn Target>> {
        ImageDestination::new(self.path, self.options)?.create(hello)
    }

    fn create_file(&mut self) -> Result<Box<dyn FileTarget>> {
        ImageDestination::new(self.path, self.options)?.create_file()
    }
}

/// The image that the operator wants, where that is not as the source.
fn wanted_image(arguments: &Arguments) -> Result<ImageOptions> {
    let cluster_sectors = arguments.cluster_sectors.map(|sectors| {
        u32::try_from(sectors).map_err(|_| {
            Error::new(ErrorKind::Parameter, format!("clusters of {sectors} sectors"))
                .advise("a power of two from 64 (32 KiB) to 131072 (64 MiB)")
        })
    });
    Ok(ImageOptions {
        image: arguments.format().map(|format| match format {
            Format::Expanded => ImageKind::Expanded,
            Format::Preallocated => ImageKind::Preallocated,
            Format::Raw => ImageKind::Raw,
        }),
        version: arguments.version.map(|version| match version {
            ImageVersion::One => 1,
            ImageVersion::Two => 2,
        }),
        cluster_sectors: cluster_sectors.transpose()?,
    })
}

fn observer(progress: Option<&Progress>) -> impl Fn(&Event) + Sync {
    move |event: &Event| {
        if let Some(progress) = progress
            && let Ok(event) = serde_json::to_value(event)
        {
            progress.event(&event);
        }
    }
}

fn send_disk(arguments: &Arguments, source: &Path, target: Option<&Path>, output: &Output) -> Outcome {
    // Taken before this program opens anything that could have the same number.
    let stream = arguments.output_descriptor.map(|number| inherited(number, "o")).transpose()?;
    let feedback = arguments.feedback_descriptor().map(|number| inherited(number, "f")).transpose()?;
    let to_standard_output = target.is_none() && arguments.to.is_none();
    if to_standard_output && stream.is_none() && io::stdout().is_terminal() {
        return Err(Error::new(ErrorKind::Parameter, "the copy would go to a terminal")
            .advise("pipe it into `ploop copy -d FILE`, or give the receiver's command with --to or a file with -d")
            .into());
    }
    let cancel = Cancel::new()?;
    signals::cancel(&cancel)?;
    if let Some(target) = target {
        open::check_new_file("copy", target)?;
        open::warn_of_name(target, output);
    }
    let from = Origin::find(source)?;
    from.warn(output);
    let progress = Progress::new(output);
    let _watch = match &from {
        Origin::Served(_, entry) => Some(SpaceWatch::begin(entry, source, "the copy", false, *output)?),
        Origin::Closed(_) => None,
    };
    let (link, peer) = match (target, &arguments.to) {
        (Some(target), _) => {
            let command = &mut receiver_command(arguments, target);
            Peer::start(command, false).map(|(link, peer)| (link, Some(peer)))?
        }
        // Under --json standard error is for events.
        (None, Some(command)) => {
            Peer::spawn(command, !output.is_json()).map(|(link, peer)| (link, Some(peer)))?
        }
        (None, None) => {
            let output = stream
                .map_or_else(|| Link::standard_output().map(|link| link.output), |stream| Ok(Some(stream)));
            (Link { input: feedback, output: output? }, None)
        }
    };
    let ends = Ends::new(peer, arguments.to.clone(), !output.is_json());
    let show = |event: &Value| {
        ends.see(event);
        progress.event(event);
    };
    let sent = from.send(arguments, link, &cancel, &show);
    let figures = ends.finish(sent)?;
    progress.done(&figures);
    if figures["as_of"] == AsOf::CrashConsistent.word() {
        output.warn("the copy is crash-consistent, as after a power loss: something that used the disk was not stopped");
    }
    if !progress.is_watched() {
        // A person has seen them as they came.
        for warning in figures["warnings"].as_array().into_iter().flatten() {
            output.warn(warning.as_str().unwrap_or_default());
        }
    }
    if !to_standard_output {
        return output.report(&Sent(figures));
    }
    if progress.is_watched() {
        let mut text = Vec::new();
        if Sent(figures).write_human(&mut text).is_ok() {
            complain(&String::from_utf8_lossy(&text));
        }
    }
    Ok(())
}

/// This program as the receiver of a local copy: what it has to say comes back over the link.
fn receiver_command(arguments: &Arguments, target: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["-v-2", "copy", "-d"]).arg(target);
    if let Some(format) = arguments.format().and_then(|format| format.to_possible_value()) {
        command.arg("-f").arg(format.get_name());
    }
    if let Some(sectors) = arguments.cluster_sectors {
        command.arg("-b").arg(sectors.to_string());
    }
    if let Some(version) = arguments.version.and_then(|version| version.to_possible_value()) {
        command.arg("-v").arg(version.get_name());
    }
    if let Some(seconds) = arguments.stall_timeout {
        command.arg("--stall-timeout").arg(seconds.to_string());
    }
    command
}

/// What becomes of the events of a copy.
type Show<'a> = &'a (dyn Fn(&Value) + Sync);

/// Where a copy comes from.
enum Origin {
    /// A disk with a server, which sends it.
    Served(Box<State>, Entry),
    /// A closed disk, sent by this process.
    Closed(OpenRequest),
}

impl Origin {
    /// Says what is odd about the disk, and that what decrypts it does not go with a copy.
    fn warn(&self, output: &Output) {
        let request = match self {
            Self::Served(state, _) => &state.open,
            Self::Closed(request) => request,
        };
        // Whoever opens it tells what is wrong with the descriptor.
        let Ok((encryption, warnings)) = open::oddities_of(request) else { return };
        warnings.iter().for_each(|text| output.warn(text));
        if encryption.is_some() {
            output.warn(
                "the copy will be ciphertext as well, and what its key is found by stands in DiskDescriptor.xml, which is not \
                 copied: keep the descriptor of the source",
            );
        }
    }

    fn find(source: &Path) -> Result<Self> {
        let source = &open::followed(source)?;
        let runtime = Runtime::of_user()?;
        if let Some(state) = runtime.find(source)? {
            let entry = runtime.entry(&state.id);
            return Ok(Self::Served(Box::new(state), entry));
        }
        let kind = std::fs::metadata(source)
            .map_err(|cause| Error::io(ErrorKind::Open, "find the disk to copy", cause).at_path(source))?;
        if kind.file_type().is_block_device() || (kind.is_dir() && !source.join(DESCRIPTOR_NAME).exists()) {
            return Err(Error::new(ErrorKind::NotMounted, "this is no mounted disk of ploop")
                .at_path(source)
                .advise("`ploop list` shows what is mounted; a disk that is not is given by its image or descriptor"));
        }
        let disks = vec![source.to_owned()];
        open::resolve(&Wanted { disks, read_only: true, ..Wanted::default() }).map(Self::Closed)
    }

    /// What people call it.
    fn name(&self) -> OsString {
        let path = match self {
            Self::Served(state, _) => match &state.descriptor {
                Some(descriptor) => Some(&descriptor.path),
                None => state.images.last().map(|image| &image.path),
            },
            Self::Closed(request) => request.descriptor.as_ref().or(request.images.last()),
        };
        path.map(|path| path.as_os_str().to_owned()).unwrap_or_default()
    }

    fn send(&self, arguments: &Arguments, link: Link, cancel: &Cancel, show: Show<'_>) -> Result<Value> {
        let served = match self {
            Self::Served(state, entry) => Some((&**state, entry)),
            Self::Closed(_) => None,
        };
        let commands = QuiesceOptions {
            freeze_command: arguments.freeze_command.clone(),
            thaw_command: arguments.thaw_command.clone(),
            hook_timeout: arguments.freeze_timeout.map(Duration::from_secs),
            ..QuiesceOptions::default()
        };
        let allowed = Allowed {
            crash_consistent: arguments.crash_consistent,
            no_freeze: false,
            commands,
            advice: "end that use; or give a command that stops it (-F) and one that undoes that (--thaw); or copy the disk \
                     as after a power loss, with --crash-consistent",
        };
        let (options, claim) = Standing::find(served.map(|(state, _)| state), allowed)?.split();
        let copy_id = uuid::Uuid::new_v4();
        let to = arguments.target.as_ref().map(|target| target.as_os_str().to_owned());
        let peer = to.or_else(|| arguments.to.clone().map(OsString::from)).unwrap_or_default();
        let helper = freeze_service::start(
            options,
            served,
            &[
                ("PLOOP_DISK", self.name()),
                ("PLOOP_COPY", copy_id.simple().to_string().into()),
                ("PLOOP_PEER", peer),
            ],
        )?;
        let wishes = Wishes {
            copy_id: Some(*copy_id.as_bytes()),
            outage_ms_max: arguments.max_outage,
            retry_hooks: arguments.retry_hooks,
            freeze_ms_max: arguments.max_freeze,
            passes_max: arguments.passes.map(|passes| u32::try_from(passes).unwrap_or(u32::MAX)),
            stall_timeout_s: arguments.stall_timeout,
            freeze_stall_timeout_s: Some(arguments.freeze_stall_timeout),
            is_original: arguments.protocol == 1,
            is_crash_consistent: arguments.crash_consistent,
        };
        let is_chain = arguments.chain;
        let sent = match self {
            Self::Served(_, entry) => send_served(entry, (is_chain, wishes), link, helper, cancel, show),
            Self::Closed(request) => send_closed(request, (is_chain, wishes), link, helper, cancel, show),
        };
        sent.map(|mut figures| {
            claim.tell(&mut figures);
            figures
        })
    }
}

fn send_closed(
    request: &OpenRequest,
    (is_chain, wishes): (bool, Wishes),
    link: Link,
    helper: Option<Helper>,
    cancel: &Cancel,
    show: Show<'_>,
) -> Result<Value> {
    let mut quiesce = freeze_service::quiesce(helper, Some(cancel), None);
    let descriptor = is_chain.then(|| descriptor_of_all(request)).transpose()?;
    let opened = open::open(request)?;
    // The receiver would call what it has complete.
    if let Some(found) = opened.report.disagreements.first() {
        return Err(found.failure());
    }
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = Disk::open(Arc::clone(&opened.chain), options)?;
    let sent = {
        let mut freight = Freight::of(&disk, descriptor.as_deref())?;
        let observer = |event: &Event| {
            if let Ok(event) = serde_json::to_value(event) {
                show(&event);
            }
        };
        wishes.send(&mut freight, &mut *quiesce, link, cancel.clone(), &observer)
    };
    let closed = disk.close();
    let report = sent?;
    closed?;
    to_value(&report)
}

/// Lets the server send the disk, which asks the helper itself; shows how far it is.
fn send_served(
    entry: &Entry,
    (is_chain, wishes): (bool, Wishes),
    link: Link,
    helper: Option<Helper>,
    cancel: &Cancel,
    show: Show<'_>,
) -> Result<Value> {
    let connection = crate::serving::connect(entry)?;
    let verb = if is_chain { CHAIN_VERB } else { VERB };
    let output =
        link.output.ok_or_else(|| Error::new(ErrorKind::Parameter, "a copy needs somewhere to go"))?;
    let ticket = helper.as_ref().map(|helper| helper.ticket.clone());
    let request = CopyRequest { two_way: link.input.is_some(), wishes, helper: ticket };
    let leash = leash::hold(cancel)?;
    cancel_when_closed(connection.try_clone()?, cancel.clone())?;
    {
        let mut descriptors = vec![output.as_fd()];
        descriptors.extend(link.input.as_ref().map(AsFd::as_fd));
        descriptors.push(leash.as_fd());
        descriptors.extend(helper.as_ref().map(|helper| helper.connection.as_fd()));
        connection.request(verb, &request, &descriptors)?;
    }
    // The server has them now; kept here, the other end would never see its end.
    drop((output, link.input, leash, helper));
    connection.answer(verb, None, |message| {
        freeze_service::refuse_old_server(&connection, &message);
        show(&message);
    })
}

/// Cancels when the server is gone: a freeze command that runs just then has nothing to wait for.
fn cancel_when_closed(connection: Connection, cancel: Cancel) -> Result<()> {
    let watch = move || {
        while !connection.wait_closed(Duration::from_secs(3600)) {}
        cancel.cancel();
    };
    std::thread::Builder::new()
        .name("server-watch".into())
        .spawn(watch)
        .map(drop)
        .map_err(|cause| Error::io(ErrorKind::System, "start the thread that watches the server", cause))
}
