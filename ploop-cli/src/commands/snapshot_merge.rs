//! `ploop snapshot-merge`: images that stand on each other become one.

use std::io::{self, Write};
use std::path::PathBuf;

use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::ops::{self, MergeOptions, MergeReport};
use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::progress::Job;
use crate::snapshot_service::{self, MergeRequest};
use crate::snapshots::{Target, guid, lock_timeout};

/// Merge a state with the one below it
///
/// The state below goes, its image then holds both. Without options the current state is merged with the latest snapshot.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A merge that was cut cannot be undone; the same command, or any other on the snapshots, finishes it. \
                        With -n it is forgotten instead, and nothing has changed.\n\n\
                        Exit codes: 43 there is no such snapshot; 37 an image is open elsewhere, or clones share it; 38 \
                        other states stand on one that would go."
)]
pub(crate) struct Arguments {
    /// The GUID of the state that is merged with the one below it
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid, conflicts_with = "all")]
    snapshot: Option<Guid>,

    /// The other end of a range: everything between the two becomes one
    #[arg(short = 'U', long = "uuid2", value_name = "UUID", value_parser = guid, conflicts_with = "all")]
    other: Option<Guid>,

    /// Merge all snapshots under the current state
    #[arg(short = 'A', long = "all")]
    all: bool,

    /// Merge into a new file of this name, beside the old ones; they stay untouched until it is complete
    #[arg(short = 'n', long = "new-delta", value_name = "FILE")]
    new_file: Option<String>,

    /// Copy at most this much in a second, as 100M
    #[arg(long, value_name = "SIZE", value_parser = crate::snapshots::rate)]
    limit: Option<u64>,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Merged(pub(super) MergeReport);

impl Report for Merged {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        let count = self.0.merged.len();
        let states = if count == 1 { "snapshot" } else { "snapshots" };
        write!(out, "merged {count} {states} into {}", self.0.file)?;
        if self.0.copied_bytes > 0 {
            write!(out, ", {} copied", human_bytes(self.0.copied_bytes))?;
        }
        writeln!(out)
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let options = MergeOptions {
        snapshot: arguments.snapshot,
        other: arguments.other,
        all: arguments.all,
        new_file: arguments.new_file.clone(),
    };
    let target = Target::find(&arguments.disk)?;
    let job = Job::begin(output, arguments.limit)?;
    let report = if target.served.is_some() {
        merge_served(&target, &options, &job)?
    } else {
        ops::merge(&target.descriptor, &options, lock_timeout(), &job.meter())?
    };
    output.report(&Merged(report))
}

/// A running disk deletes one snapshot after the other: what stands on it is merged down. Into a new file all go at once.
pub(super) fn merge_served(target: &Target, options: &MergeOptions, job: &Job) -> Result<MergeReport> {
    let Some((entry, _)) = &target.served else {
        return target.need_closed("merge").map(|()| MergeReport::default());
    };
    let descriptor = target.load()?;
    let (upper, gone) = match (states_to_go(&descriptor, options), options) {
        // Perhaps a run that was cut had done it: the server knows.
        (Err(error), &MergeOptions { snapshot: Some(upper), other: Some(lower), new_file: Some(_), .. })
            if error.kind() == ErrorKind::NoSnapshot && descriptor.gone().contains(&lower) =>
        {
            (upper, vec![lower])
        }
        (states, _) => states?,
    };
    if let (Some(file), Some(&lower)) = (&options.new_file, gone.first()) {
        let request = MergeRequest { lower: lower.to_string(), upper: upper.to_string(), file: file.clone() };
        let done = snapshot_service::ask_merge(entry, &request, job)?;
        return Ok(MergeReport {
            state: Some(upper),
            merged: gone,
            file: file.clone(),
            copied_bytes: done["merged_bytes"].as_u64().unwrap_or(0),
            resumed: done["merged"].as_array().is_some_and(Vec::is_empty),
        });
    }
    let mut report = MergeReport { state: Some(upper), ..MergeReport::default() };
    for guid in gone {
        let done = snapshot_service::ask_delete(entry, &guid.to_string(), job)?;
        report.copied_bytes += done["merged_bytes"].as_u64().unwrap_or(0);
        report.merged.push(guid);
    }
    let descriptor = target.load()?;
    report.file = descriptor.image(upper).map(|image| image.file().to_owned()).unwrap_or_default();
    Ok(report)
}

/// The state that stays, and those that go, lowest first.
fn states_to_go(descriptor: &DiskDescriptor, options: &MergeOptions) -> Result<(Guid, Vec<Guid>)> {
    let top = descriptor.top_guid();
    let named = options.snapshot.unwrap_or(top);
    let (lower, upper) = match options.other {
        _ if options.all => (descriptor.base_guid()?, top),
        Some(other) if descriptor.range(other, named).is_ok() => (other, named),
        Some(other) => (named, other),
        None => {
            let below = descriptor.chain_for(named)?.iter().rev().nth(1).map(|image| image.guid());
            let nothing =
                || Error::new(ErrorKind::Parameter, format!("merge {named}: nothing lies below it"));
            (below.ok_or_else(nothing)?, named)
        }
    };
    let mut gone: Vec<Guid> = descriptor.range(lower, upper)?.iter().map(|shot| shot.guid()).collect();
    gone.pop();
    if gone.is_empty() {
        return Err(Error::new(ErrorKind::Parameter, "merge: there is only one state"));
    }
    if let Some(forked) = gone.iter().find(|&&guid| descriptor.children(guid).count() != 1) {
        return Err(Error::new(ErrorKind::Parameter, format!("merge: several states stand on {forked}"))
            .advise("delete the other snapshots first"));
    }
    Ok((upper, gone))
}
