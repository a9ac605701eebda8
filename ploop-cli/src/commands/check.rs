//! `ploop check`: whether a disk is sound, and its repair.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::error::{one_line, shown};
use ploop_core::format::{Described, Guid};
use ploop_core::io::file::DirectoryFolder;
use ploop_core::ops::check::{
    self, CheckOptions, CheckReport, Class, Findings, ImageCheck, Outcome as Verdict,
};
use ploop_core::ops::descriptor_lock::lock_timeout;
use ploop_core::ops::repair::UndoReport;
use ploop_core::units::Sectors;
use ploop_core::{Error, ErrorKind};
use serde::Serialize;

use crate::exit::{Failure, Outcome};
use crate::open::{DESCRIPTOR_NAME, followed};
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::snapshots::guid_or_word;

/// Findings of one kind that people are shown with their place.
const EXAMPLES_SHOWN: usize = 5;
/// The level from which all that are kept are shown.
const ALL_FROM: i32 = 4;
/// The cluster size of a raw image unless said otherwise: 1 MiB.
const CLUSTER_SECTORS_DEFAULT: u64 = 2048;

/// Check whether a disk is sound, and repair it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without an option, an image marked as closed is skipped, one that was not closed is looked at \
                        and left (37), unless a descriptor is given: then what a crash leaves is repaired, as mounting \
                        does. Findings of class A are harmless, B follow from a crash, C are damage. Nothing is written \
                        to an image with a finding that may not be repaired.\n\n\
                        Exit codes: 0 sound, skipped or repaired; 11 damaged; 37 in use, or not closed and left; 7 a \
                        repair is needed but -r given; 38 images do not fit each other; 39 descriptor wrong."
)]
#[allow(clippy::struct_excessive_bools, reason = "what was typed")]
pub(crate) struct Arguments {
    /// Only the image of this snapshot ("base" for the lowest); needs a descriptor
    #[arg(short = 'u', value_name = "UUID", value_parser = guid_or_word)]
    snapshot: Option<String>,

    /// Look at the image although it is marked as closed; what is harmless is repaired
    #[arg(short = 'f', long = "force")]
    force: bool,

    /// As --repair, under the original's name; unlike there, two owners of a cluster both keep its bytes
    #[arg(short = 'F', long = "hard-force")]
    hard_force: bool,

    /// Look for clusters named twice. Always done; for scripts
    #[arg(short = 'c', long = "check")]
    detailed: bool,

    /// Change nothing
    #[arg(short = 'r', long = "ro", conflicts_with_all = ["hard_force", "repair", "fill_holes", "undo"])]
    read_only: bool,

    /// Print errors only
    #[arg(short = 's', long = "silent")]
    silent: bool,

    /// Repair what a crash leaves and clear the mark of an image that was not closed
    #[arg(short = 'd', long = "drop-inuse")]
    drop_in_use: bool,

    /// Write zeros into holes of the host file inside clusters in use, as old kernels want them
    #[arg(short = 'S', long = "repair-sparse")]
    fill_holes: bool,

    /// The image is raw
    #[arg(short = 'R', long = "raw")]
    raw: bool,

    /// Cluster size of a raw image, in sectors or with a suffix
    #[arg(short = 'b', value_name = "SIZE", value_parser = crate::args::size, requires = "raw")]
    cluster: Option<Sectors>,

    /// Not part of a check here; refused
    #[arg(short = 'D', long = "defrag", hide = true)]
    defragment: bool,

    /// Repair everything that can be, after writing an undo file beside the image
    #[arg(long)]
    repair: bool,

    /// Take a repair back: FILE is its undo file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["repair", "hard_force", "force", "drop_in_use", "raw", "snapshot"])]
    undo: Option<PathBuf>,

    /// The DiskDescriptor.xml of the disk, its folder, or one image file
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

/// What was found, for people.
#[derive(Serialize)]
#[serde(transparent)]
struct Checked<'a> {
    #[serde(serialize_with = "without_uncounted")]
    report: &'a CheckReport,
    #[serde(skip)]
    examples_max: usize,
}

/// The report without the counts of what was skipped: nothing was counted there, and 0 is a number.
fn without_uncounted<S: serde::Serializer>(
    report: &CheckReport,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let mut value = serde_json::to_value(report).map_err(serde::ser::Error::custom)?;
    let images = value.get_mut("images").and_then(serde_json::Value::as_array_mut);
    for (image, checked) in images.into_iter().flatten().zip(&report.images) {
        if let (Verdict::Skipped, Some(fields)) = (checked.outcome, image.as_object_mut()) {
            for uncounted in ["allocated_clusters", "free_clusters", "fragments"] {
                fields.remove(uncounted);
            }
        }
    }
    value.serialize(serializer)
}

fn verdict(outcome: Verdict) -> &'static str {
    match outcome {
        Verdict::Skipped => "skipped: marked as closed (-f looks at it)",
        Verdict::Sound => "sound",
        Verdict::Repaired => "repaired",
        Verdict::Harmless => "usable, with harmless findings",
        Verdict::Damaged => "DAMAGED",
    }
}

fn totals(findings: &Findings) -> String {
    let word = |(class, count): (&Class, &u64)| format!("{count} {}", class.word());
    findings.totals().iter().rev().map(word).collect::<Vec<_>>().join(", ")
}

impl Checked<'_> {
    fn write_findings(&self, out: &mut dyn Write, findings: &Findings) -> io::Result<()> {
        let mut shown = BTreeMap::new();
        for row in &findings.counts {
            writeln!(out, "  {:?} {:>8} x  {}", row.class, row.count, row.meaning)?;
            let of_this =
                findings.examples.iter().filter(|one| (one.kind, one.class) == (row.kind, row.class));
            for example in of_this.take(self.examples_max) {
                let mut places = Vec::new();
                places.extend(example.guest_cluster.map(|cluster| format!("guest cluster {cluster}")));
                places.extend(example.file_offset.map(|offset| format!("file byte {offset}")));
                let places =
                    if places.is_empty() { String::new() } else { format!("{}: ", places.join(", ")) };
                writeln!(out, "                {places}{}", one_line(&example.detail))?;
                *shown.entry(row.kind).or_insert(0u64) += 1;
            }
            let rest = row.count.saturating_sub(shown.get(&row.kind).copied().unwrap_or(0));
            if rest > 0
                && findings.examples.iter().any(|one| one.kind == row.kind && one.guest_cluster.is_some())
            {
                writeln!(out, "                and {rest} more")?;
            }
            if let Some(remedy) = row.remedy {
                writeln!(out, "                repair: {remedy}")?;
            }
        }
        Ok(())
    }

    fn write_image(&self, out: &mut dyn Write, image: &ImageCheck) -> io::Result<()> {
        let file = shown(&image.file);
        match image.outcome {
            Verdict::Skipped => return writeln!(out, "{file}: {}", verdict(image.outcome)),
            _ if image.findings.is_empty() => writeln!(out, "{file}: {}", verdict(image.outcome))?,
            _ => writeln!(out, "{file}: {} ({})", verdict(image.outcome), totals(&image.findings))?,
        }
        self.write_findings(out, &image.findings)?;
        if let Some(repair) = &image.repair {
            if repair.resumed {
                writeln!(out, "  finished an earlier repair that was cut")?;
            }
            writeln!(
                out,
                "  repaired: {} entries cleared, {} clusters copied, {} -> {}",
                repair.cleared_entries,
                repair.copied_clusters,
                human_bytes(repair.file_bytes_before),
                human_bytes(repair.file_bytes)
            )?;
            if let Some(undo) = &repair.undo_file {
                let path = image.file.with_file_name(undo);
                writeln!(out, "  to take it back: ploop check --undo {} {file}", shown(&path))?;
            }
        }
        if image.filled_hole_bytes > 0 {
            writeln!(out, "  holes filled: {}", human_bytes(image.filled_hole_bytes))?;
        }
        if image.entries > 0 && image.outcome != Verdict::Damaged {
            // As `info` counts them.
            let per_mille = (image.fragments * 1000).checked_div(image.neighbours).unwrap_or(0);
            let (percent, tenth) = (per_mille / 10, per_mille % 10);
            writeln!(
                out,
                "  {} of {} clusters allocated, {} free in the file, {percent}.{tenth}% fragmented",
                image.allocated_clusters, image.entries, image.free_clusters
            )?;
        }
        Ok(())
    }
}

impl Report for Checked<'_> {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        for image in &self.report.images {
            self.write_image(out, image)?;
        }
        let Some(descriptor) = &self.report.descriptor else { return Ok(()) };
        if !self.report.findings.is_empty() {
            writeln!(out, "{}: chain and folder ({})", shown(descriptor), totals(&self.report.findings))?;
            self.write_findings(out, &self.report.findings)?;
        }
        for note in &self.report.notes {
            writeln!(out, "  note: {note}")?;
        }
        for name in &self.report.files_removed {
            writeln!(out, "  removed {}", one_line(name))?;
        }
        writeln!(out, "{}: {}", shown(descriptor), verdict(self.report.outcome))
    }
}

/// A repair that was taken back.
#[derive(Serialize)]
#[serde(transparent)]
struct Undone<'a>(&'a UndoReport);

impl Report for Undone<'_> {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "as before the repair: {} sectors of header and table restored, {} long",
            self.0.restored_sectors,
            human_bytes(self.0.file_bytes)
        )
    }
}

/// The snapshot meant by what was typed.
fn snapshot(arguments: &Arguments, disk: &Path) -> Result<Option<Guid>, Error> {
    let Some(text) = &arguments.snapshot else { return Ok(None) };
    if text != "base" {
        return text.parse().map(Some);
    }
    let folder = match disk.is_dir() {
        true => disk.to_path_buf(),
        false => disk.parent().map_or_else(PathBuf::new, PathBuf::from),
    };
    let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
    let described = Described::load(&DirectoryFolder::open(&folder)?, Some(&folder), false)?;
    let descriptor = described.first();
    let chain = descriptor.chain_for(descriptor.top_guid())?;
    Ok(chain.first().map(|base| base.guid()))
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    if let Some(file) = &arguments.undo {
        let report = check::undo(file, &arguments.disk)?;
        return if arguments.silent { Ok(()) } else { output.report(&Undone(&report)) };
    }
    if arguments.defragment {
        return Err(Failure::Error(
            Error::new(ErrorKind::Parameter, "check: -D moves clusters, which a check does not do").advise(
                "`ploop compact` moves them together, on a closed or a running disk; then check without -D",
            ),
        ));
    }
    let disk = followed(&arguments.disk)?;
    let is_bundle = disk.is_dir() || disk.file_name().is_some_and(|name| name == DESCRIPTOR_NAME);
    let cluster = arguments.cluster.unwrap_or(Sectors(CLUSTER_SECTORS_DEFAULT));
    let options = CheckOptions {
        path: disk.clone(),
        snapshot: snapshot(arguments, &disk)?,
        force: arguments.force || arguments.hard_force || arguments.repair || arguments.fill_holes,
        read_only: arguments.read_only,
        // As mounting does.
        drop_in_use: arguments.drop_in_use || (is_bundle && !arguments.read_only),
        repair: arguments.repair || arguments.hard_force,
        fill_holes: arguments.fill_holes,
        raw_cluster: arguments.raw.then_some(cluster),
        raw_disk: None,
        lock_timeout: lock_timeout(),
    };
    if arguments.raw && is_bundle {
        return Err(Failure::Error(Error::new(
            ErrorKind::Parameter,
            "check: -R is for an image without a descriptor, which says itself what is raw",
        )));
    }
    let job = Job::begin(output, None)?;
    let report = check::check(&options, &job.meter())?;
    let examples_max = if output.verbosity() >= ALL_FROM { usize::MAX } else { EXAMPLES_SHOWN };
    if !arguments.silent {
        output.report(&Checked { report: &report, examples_max })?;
    }
    match report.failure() {
        None => Ok(()),
        Some(failure) => Err(Failure::Error(failure.at_path(&arguments.disk))),
    }
}

/// The old name of the command.
pub(crate) fn run_as_fsck(arguments: &Arguments, output: &Output) -> Outcome {
    output.warn("`ploop fsck` is an old name; use `ploop check`");
    run(arguments, output)
}
