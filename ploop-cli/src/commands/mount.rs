//! `ploop mount`: a disk becomes a block device and, with a mount point, a mounted file system.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueEnum;
use ploop_core::device::runtime::{OpenRequest, PartitionRange};
use ploop_core::error::shown;
use ploop_core::format::Guid;
use ploop_core::format::agreement::Disagreement;
use ploop_core::ops::agreement;
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::accepting::{Accepting, refuse_success};
use crate::args;
use crate::disk_bytes::ShownDisk;
use crate::exit::Outcome;
use crate::full_host;
use crate::open::{self, Wanted};
use crate::output::{Output, Report};
use crate::partition_table;
use crate::serving::{self, ServeOptions, Served};
use crate::snapshots::guid_or_word;
use crate::space_used;
use crate::twin;

/// Make a disk a block device and mount its file system
///
/// Prints the block device. Without -m it only makes the device. If the disk has a partition table (GPT or DOS), the device
/// shows its first partition, or the one that --partition names.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Give the DiskDescriptor.xml of a disk or its folder, or its image files, base first. \
                        `ploop umount` undoes it.\n\n\
                        Exit codes: 37 the disk is mounted already or in use; 21 the file system cannot be mounted \
                        (the device is taken away again); 41 the check found errors it could not repair."
)]
pub(crate) struct Arguments {
    /// Refuse writes
    #[arg(short = 'r', long = "read-only")]
    read_only: bool,

    /// Check the file system, and repair what is safe, before it is mounted
    #[arg(short = 'F', long = "fsck")]
    check: bool,

    /// Format of the base image when there is no descriptor
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "ploop1")]
    format: BaseFormat,

    /// Cluster size for a raw base, in sectors
    #[arg(short = 'b', long = "blocksize", value_name = "SECTORS", value_parser = args::sectors)]
    cluster_sectors: Option<u64>,

    /// The loop device to use instead of a free one
    #[arg(short = 'd', long = "device", value_name = "DEVICE")]
    device: Option<PathBuf>,

    /// Where to mount the file system
    #[arg(short = 'm', long = "mount-point", value_name = "DIR")]
    mount_point: Option<PathBuf>,

    /// Type of the file system; found out by default
    #[arg(short = 't', long = "fstype", value_name = "FSTYPE", requires = "mount_point")]
    file_system: Option<String>,

    /// Options for mount(8)
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", requires = "mount_point")]
    options: Option<String>,

    /// The snapshot to open, read-only, by its GUID; base for the lowest image
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid_or_word)]
    snapshot: Option<String>,

    /// A name for this use of the disk, where several mount the same images read-only: `umount -c` finds it by it
    #[arg(short = 'c', long = "component", value_name = "COMPONENT", value_parser = component)]
    component: Option<String>,

    /// The partition to show: its number, or the label or UUID of the partition or of what is on it; the first by default
    #[arg(long, value_name = "N|LABEL|UUID", conflicts_with = "whole_disk")]
    partition: Option<String>,

    /// Show the whole disk, with its partition table
    #[arg(short = 'n', long = "no-partition")]
    whole_disk: bool,

    /// Threads that serve the disk
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    threads: u8,

    #[command(flatten)]
    on_full: full_host::Options,

    /// Serve also where the kernel refuses to protect the server against waiting for its own device when memory is
    /// short (no CAP_SYS_RESOURCE or CAP_IPC_LOCK): the machine may then stall. PLOOP_ALLOW_RECLAIM_STALL=1 in the
    /// environment says the same
    #[arg(long)]
    allow_reclaim_stall: bool,

    /// Take images that lie outside of the bundle, as a linked clone has them, from this folder; may be repeated. With -r
    #[arg(long = "allow-parent", value_name = "DIR")]
    parents: Vec<PathBuf>,
    #[command(flatten)]
    accepting: Accepting,
    /// Mount it although a file system with the same UUID is mounted here, as that of a disk is beside its copy; XFS gets
    /// the option nouuid
    #[arg(long, requires = "mount_point")]
    allow_twin: bool,

    /// DiskDescriptor.xml or its folder, or image files, base first
    #[arg(value_name = "DISK", required = true)]
    disks: Vec<PathBuf>,
}

/// Formats of a base image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BaseFormat {
    /// The bytes of the disk as they are
    Raw,
    /// An image with header and table
    #[value(name = "ploop1", alias = "expanded")]
    Image,
}

/// What was mounted.
#[derive(Debug, Serialize)]
pub(crate) struct Mounted {
    /// Its block device.
    pub(crate) device: PathBuf,
    mount_point: Option<PathBuf>,
    id: String,
    disk_bytes: Option<u64>,
    partition: Option<PartitionRange>,
    read_only: bool,
    /// Why what it shows is not the whole disk, or not the disk; only of a disk mounted for reading.
    disagreements: Vec<Disagreement>,
}

impl Report for Mounted {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", shown(&self.device))
    }
}

impl Arguments {
    /// Those that mount a snapshot, for a use of its own.
    pub(crate) fn of_snapshot(
        disk: PathBuf,
        snapshot: String,
        component: String,
        at: Option<PathBuf>,
    ) -> Self {
        Self {
            read_only: true,
            check: false,
            format: BaseFormat::Image,
            cluster_sectors: None,
            device: None,
            mount_point: at,
            file_system: None,
            options: None,
            snapshot: Some(snapshot),
            component: Some(component),
            partition: None,
            whole_disk: false,
            threads: 1,
            on_full: full_host::Options::default(),
            allow_reclaim_stall: false,
            parents: Vec::new(),
            accepting: Accepting::default(),
            allow_twin: false,
            disks: vec![disk],
        }
    }

    /// The same with options for mount(8).
    pub(crate) fn with_options(self, file_system: Option<String>, options: Option<String>) -> Self {
        Self { file_system, options, ..self }
    }

    /// The same with the partition to show.
    pub(crate) fn with_partition(self, partition: Option<String>) -> Self {
        Self { partition, ..self }
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let mounted = serve(arguments, output)?;
    output.report(&mounted)?;
    let done = format!("mounted for reading as {}", mounted.device.display());
    refuse_success(&mounted.disagreements, &done, output)?;
    Ok(())
}

/// Serves a disk and mounts it where that is asked for. Whatever fails is undone.
pub(crate) fn serve(arguments: &Arguments, output: &Output) -> Result<Mounted> {
    let read_only = arguments.read_only || is_snapshot(arguments.snapshot.as_deref());
    if !read_only && !arguments.parents.is_empty() {
        return Err(Error::new(
            ErrorKind::Parameter,
            "--allow-parent: what stands on images outside of the bundle is only read",
        )
        .advise("mount it with -r, or make a disk of its own of it: ploop import --allow-parent DIR"));
    }
    let request = open::resolve(&Wanted {
        disks: arguments.disks.clone(),
        read_only,
        raw_base: arguments.format == BaseFormat::Raw,
        cluster_sectors: arguments.cluster_sectors,
        snapshot: arguments.snapshot.clone(),
        parents: arguments.parents.clone(),
        accepted: arguments.accepting.into(),
    })?;
    if arguments.mount_point.is_some() || arguments.check {
        open::refuse_encrypted(&request, "mount its file system")?;
    }
    open::oddities_of(&request)?.1.iter().for_each(|text| output.warn(text));
    // Before it is served: for writing its server refuses them.
    let disagreements = if read_only { disagreements(&request)? } else { Vec::new() };
    let mount_point = arguments.mount_point.as_deref().map(check_mount_point).transpose()?;
    // Beside the base image of a disk with a descriptor that is written to; a backup's own use of it says nothing about it.
    let is_remembered = !read_only && arguments.component.is_none() && request.descriptor.is_some();
    let folder = request.descriptor.as_deref().filter(|_| is_remembered).and_then(Path::parent);
    let host_policy = arguments.on_full.policy(folder, output);
    let served = serving::start(
        request,
        &ServeOptions {
            allow_reclaim_stall: arguments.allow_reclaim_stall,
            threads: usize::from(arguments.threads),
            device: arguments.device.clone(),
            whole_disk: arguments.whole_disk,
            partition: arguments.partition.clone(),
            component: arguments.component.clone(),
            without_device: false,
            host_policy,
        },
    )?;
    if arguments.partition.is_none() {
        tell_of_others(&served, output);
    }
    match mount(&served, arguments, mount_point.as_deref(), output) {
        Ok(device) => Ok(Mounted {
            device,
            mount_point,
            id: served.state.id.clone(),
            disk_bytes: served.entry.state()?.size_bytes,
            partition: served.state.partition,
            read_only,
            disagreements,
        }),
        Err(error) => {
            if let Err(second) = serving::end(&served) {
                output.error(&second);
            }
            Err(error)
        }
    }
}

/// Says which partitions there are where one of several was taken without being asked for.
fn tell_of_others(served: &Served, output: &Output) {
    let Some(shown) = served.state.partition else { return };
    let table =
        ShownDisk::open(&served.entry.disk_file(), false).and_then(|disk| partition_table::read(&disk));
    if let Ok(Some(table)) = table
        && table.partitions.len() > 1
    {
        output.warn(&format!(
            "partition {} of several is shown: {}; choose with --partition",
            shown.number,
            table.summary()
        ));
    }
}

/// What contradicts the descriptor in the disk that is to be opened, as far as it is not accepted.
fn disagreements(request: &OpenRequest) -> Result<Vec<Disagreement>> {
    let Some(descriptor) = &request.descriptor else { return Ok(Vec::new()) };
    let mut found = agreement::of_disk(descriptor, open::snapshot_of(request)?)?;
    found.retain(|found| !found.is_accepted(request.accepted));
    Ok(found)
}

/// A name that the original would take as well: it goes into a field of 64 bytes.
pub(crate) fn component(text: &str) -> std::result::Result<String, String> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    if text.is_empty() || text.len() > 63 || !text.bytes().all(is_plain) {
        return Err("a name of at most 63 letters, digits and signs, without / and blanks".to_owned());
    }
    Ok(text.to_owned())
}

/// Whether what was chosen is a frozen state, which is only ever read.
fn is_snapshot(chosen: Option<&str>) -> bool {
    chosen.is_some_and(|chosen| chosen.parse::<Guid>().ok() != Some(Guid::TOP))
}

/// The folder to mount at, absolute.
pub(crate) fn check_mount_point(point: &Path) -> Result<PathBuf> {
    let found = std::fs::canonicalize(point)
        .map_err(|cause| Error::io(ErrorKind::Mount, "find the mount point", cause).at_path(point))?;
    if found.is_dir() {
        Ok(found)
    } else {
        Err(Error::new(ErrorKind::Mount, "the mount point is no folder").at_path(point))
    }
}

/// Checks and mounts the file system as far as asked; the device.
fn mount(served: &Served, arguments: &Arguments, point: Option<&Path>, output: &Output) -> Result<PathBuf> {
    let read_only = served.state.open.read_only;
    let device = served.state.loop_device.clone().ok_or_else(|| {
        Error::new(ErrorKind::Device, "the disk has no loop device").at_path(served.entry.path())
    })?;
    if arguments.check {
        check_file_system(&device, arguments, read_only)?;
    }
    let Some(point) = point else { return Ok(device) };
    let content = twin::check(&served.state, &device, arguments.allow_twin, output)?;
    let mut options = arguments.options.clone();
    if arguments.allow_twin && content.kind.as_deref() == Some("xfs") {
        options = Some(options.map_or_else(|| "nouuid".to_owned(), |options| format!("{options},nouuid")));
    }
    // Remembered first: umount finds it also when somebody unmounts the file system by hand.
    served.entry.update(|state| state.mount_points.push(point.to_path_buf()))?;
    if let Some(folder) = space_used::record_folder(&served.state) {
        space_used::SpaceUsed::forget(&folder);
    }
    let mut line: Vec<OsString> = Vec::new();
    if read_only {
        line.push("-r".into());
    }
    for (option, value) in [("-t", &arguments.file_system), ("-o", &options)] {
        if let Some(value) = value {
            line.extend([option.into(), value.into()]);
        }
    }
    line.extend(["--".into(), device.clone().into(), point.into()]);
    let (status, text) = run_program("mount", &line, ErrorKind::Mount)?;
    if status != 0 {
        return Err(Error::new(
            ErrorKind::Mount,
            format!("mount {} at {}: {}", shown(&device), shown(point), text.trim()),
        )
        .advise("see the last lines of dmesg; -F checks the file system first, -t names its type"));
    }
    Ok(device)
}

fn check_file_system(device: &Path, arguments: &Arguments, read_only: bool) -> Result<()> {
    let mut line: Vec<OsString> = vec!["-T".into()];
    if let Some(kind) = &arguments.file_system {
        line.extend(["-t".into(), kind.into()]);
    }
    line.push(device.into());
    // Repairs what can be repaired without asking; looks only on a disk that refuses writes.
    line.push(if read_only { "-n" } else { "-p" }.into());
    let (status, text) = run_program("fsck", &line, ErrorKind::FileSystemCheck)?;
    // 1: errors were found and corrected.
    if status & !1 != 0 {
        return Err(Error::new(
            ErrorKind::FileSystemCheck,
            format!("check the file system on {}: exit code {status}: {}", shown(device), text.trim()),
        )
        .advise("mount without -m and -F and repair it by hand: fsck DEVICE"));
    }
    Ok(())
}

/// Runs a program and waits: its exit code and what it said.
pub(crate) fn run_program(name: &str, line: &[OsString], kind: ErrorKind) -> Result<(i32, String)> {
    let output = Command::new(name)
        .args(line)
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| Error::io(kind, format!("run {name}"), cause))?;
    let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
    if text.trim().is_empty() {
        text = String::from_utf8_lossy(&output.stdout).into_owned();
    }
    // Ended by a signal: no success.
    Ok((output.status.code().unwrap_or(255), text))
}
