//! `ploop merge`: image files given by name become one; the original's low-level command.
//!
//! On a running disk (`-d`) the images are known by their levels, and what is done is what `snapshot-merge` does.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::Runtime;
use ploop_core::ops::{MergeFilesOptions, MergeFilesReport, MergeOptions, merge_files};
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use super::mount::BaseFormat;
use super::snapshot_merge::{Merged, merge_served};
use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::snapshots::{Target, rate};

/// Merge image files that stand on each other, without a descriptor
///
/// What the deltas hold goes into BASE, or all of it into a new file (-n). Of a disk with a DiskDescriptor.xml use
/// `ploop snapshot-merge`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "ploop merge [-f raw] [-n FILE] DELTA... BASE\n       ploop merge -d DEVICE [-l LEVEL[..TOP]] [-n FILE]",
    after_help = "Nothing in an image says what it stands on: the order is yours to know, highest first, BASE last. The \
                  deltas are not removed. A merge into BASE that was cut is finished by the same command; until then \
                  BASE alone is neither old nor new. With -n no old file is changed.\n\n\
                  Exit codes: 37 a file is open elsewhere; 38 the files do not fit each other, or BASE is named by a \
                  DiskDescriptor.xml; 40 DEVICE is no mounted disk."
)]
pub(crate) struct Arguments {
    /// Format of BASE
    #[arg(short = 'f', value_name = "FORMAT", default_value = "ploop1", conflicts_with = "device")]
    base: BaseFormat,

    /// Merge into a new file, and change none of the old ones; with -d its name in the folder of the disk
    #[arg(short = 'n', long = "new-delta", value_name = "FILE")]
    new_file: Option<PathBuf>,

    /// A running disk with a descriptor, by its block device
    #[arg(short = 'd', long = "device", value_name = "DEVICE", conflicts_with = "files")]
    device: Option<PathBuf>,

    /// Merge the images above LEVEL, up to TOP or the next one, into it; 0 is the base. Without: the current state into
    /// the one below it
    #[arg(short = 'l', long = "level", value_name = "LEVEL[..TOP]", value_parser = levels, requires = "device")]
    levels: Option<Levels>,

    /// Copy at most this much in a second, as 100M
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    limit: Option<u64>,

    /// The images, highest first, the base last
    #[arg(value_name = "DELTA... BASE", required_unless_present = "device", num_args = 2..)]
    files: Vec<PathBuf>,
}

/// Places in a chain, 0 being the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Levels {
    lower: usize,
    upper: usize,
}

fn levels(text: &str) -> std::result::Result<Levels, String> {
    let number = |text: &str| match text.parse::<u16>() {
        Ok(number) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(usize::from(number)),
        _ => Err("expected LEVEL or LEVEL..TOP, as 0 or 0..2".to_owned()),
    };
    let levels = match text.split_once("..") {
        Some((lower, upper)) => Levels { lower: number(lower)?, upper: number(upper)? },
        None => number(text).map(|lower| Levels { lower, upper: lower + 1 })?,
    };
    if levels.lower >= levels.upper {
        return Err(format!("level {} is not below level {}", levels.lower, levels.upper));
    }
    Ok(levels)
}

#[derive(Serialize)]
#[serde(transparent)]
struct MergedFiles(MergeFilesReport);

impl Report for MergedFiles {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = &self.0;
        let images = if report.merged.len() == 1 { "image" } else { "images" };
        writeln!(
            out,
            "merged {} {images} into {}, {} copied",
            report.merged.len(),
            ploop_core::error::shown(&report.file),
            human_bytes(report.copied_bytes)
        )
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let job = Job::begin(output, arguments.limit)?;
    if let Some(device) = &arguments.device {
        return output.report(&Merged(merge_levels(device, arguments, &job)?));
    }
    if arguments.levels.is_some() {
        return Err(Error::new(ErrorKind::Parameter, "merge: -l names levels of a running disk")
            .advise("give it with --device; files are given by name")
            .into());
    }
    let options = MergeFilesOptions {
        images: arguments.files.clone(),
        raw_base: arguments.base == BaseFormat::Raw,
        new_file: arguments.new_file.clone(),
    };
    output.report(&MergedFiles(merge_files(&options, &job.meter())?))
}

/// Levels of a running disk are states of its descriptor.
fn merge_levels(device: &Path, arguments: &Arguments, job: &Job) -> Result<ploop_core::ops::MergeReport> {
    let refused = |message: String| Error::new(ErrorKind::Parameter, message).at_path(device);
    let Some(state) = Runtime::of_user()?.find(device)? else {
        return Err(Error::new(ErrorKind::NotMounted, "merge: this is no mounted disk of ploop")
            .at_path(device)
            .advise("`ploop list` shows what is mounted; of a closed disk give the files, or use `ploop snapshot-merge`"));
    };
    if state.open.descriptor.is_none() {
        return Err(refused(
            "merge: the disk was mounted from image files, which have no descriptor".to_owned(),
        )
        .advise("unmount it, then: ploop merge DELTA... BASE"));
    }
    if state.open.read_only {
        return Err(refused("merge: the disk is mounted read-only".to_owned())
            .advise("name it by its DiskDescriptor.xml: ploop snapshot-merge"));
    }
    let target = Target::find(device)?;
    let descriptor = target.load()?;
    let chain = descriptor.chain_for(descriptor.top_guid())?;
    let highest = chain.len().saturating_sub(1);
    let levels = match arguments.levels {
        Some(levels) => levels,
        None if highest > 0 => Levels { lower: highest - 1, upper: highest },
        None => return Err(refused("merge: the disk is one image".to_owned())),
    };
    let (Some(lower), Some(upper)) = (chain.get(levels.lower), chain.get(levels.upper)) else {
        return Err(refused(format!("merge: there is no level {}, {highest} is the highest", levels.upper))
            .advise("`ploop snapshot-list` shows what stands on what; level 0 is the base"));
    };
    let new_file = arguments.new_file.as_ref().map(|file| {
        file.to_str()
            .map(str::to_owned)
            .ok_or_else(|| refused("merge: the name of the new file is no text".to_owned()))
    });
    let options = MergeOptions {
        snapshot: Some(upper.guid()),
        other: Some(lower.guid()),
        all: false,
        new_file: new_file.transpose()?,
    };
    merge_served(&target, &options, job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_a_place_or_a_range() {
        assert_eq!(levels("0"), Ok(Levels { lower: 0, upper: 1 }));
        assert_eq!(levels("1..3"), Ok(Levels { lower: 1, upper: 3 }));
        for wrong in ["", "x", "-1", "+1", "3..1", "2..2", "1..", "..2", "1...3", "99999999999", "1..2..3"] {
            assert!(levels(wrong).is_err(), "{wrong:?} was taken");
        }
    }
}
