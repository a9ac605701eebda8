//! `ploop snapshot-list`: the states of a disk and how they hang together.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use ploop_core::format::Guid;
use ploop_core::ops::{SnapshotEntry, SnapshotList, snapshot_list};
use serde::Serialize;

use crate::exit::Outcome;
use crate::output::{Output, Report, human_bytes};
use crate::snapshots::{Target, guid};

/// List the snapshots of a disk
///
/// One line for each state; the current one is marked with a star.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// No heading
    #[arg(short = 'H', long = "no-header")]
    no_header: bool,

    /// Which columns
    #[arg(
        short = 'o',
        long = "output",
        value_name = "COLUMNS",
        value_delimiter = ',',
        default_values = ["parent_uuid", "current", "uuid", "fname"]
    )]
    columns: Vec<Column>,

    /// This state only
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Option<Guid>,

    /// Snapshots only, without the current state
    #[arg(short = 's', long = "snapshot")]
    snapshots_only: bool,

    /// For people: a tree with sizes and dates
    #[arg(long, conflicts_with_all = ["columns", "no_header"])]
    tree: bool,

    /// DiskDescriptor.xml or its folder, or the device or mount point of a mounted disk
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// Columns of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Column {
    /// GUID
    Uuid,
    /// GUID of the state below
    #[value(name = "parent_uuid")]
    ParentUuid,
    /// A star for the current state
    Current,
    /// Image file
    Fname,
    /// Size of the disk in that state, in bytes
    Size,
}

impl Column {
    fn heading(self) -> &'static str {
        match self {
            Self::Uuid => "UUID",
            Self::ParentUuid => "PARENT_UUID",
            Self::Current => "C",
            Self::Fname => "FNAME",
            Self::Size => "SIZE",
        }
    }

    /// Of the original, but for the size.
    fn width(self) -> usize {
        match self {
            Self::Uuid | Self::ParentUuid => 38,
            Self::Current => 1,
            Self::Fname => 32,
            Self::Size => 14,
        }
    }

    fn text(self, entry: &SnapshotEntry) -> String {
        match self {
            Self::Uuid => entry.uuid.to_string(),
            Self::ParentUuid => entry.parent_uuid.to_string(),
            Self::Current => if entry.current { "*" } else { " " }.to_owned(),
            Self::Fname => entry.fname.display().to_string(),
            Self::Size => entry.disk_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
        }
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    list: SnapshotList,
    #[serde(skip)]
    arguments: &'a Arguments,
}

impl Report for Shown<'_> {
    fn write_human(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.arguments.tree {
            return write_tree(out, &self.list.states);
        }
        let columns = &self.arguments.columns;
        let line = |texts: Vec<String>| {
            let padded: Vec<String> = columns
                .iter()
                .zip(texts)
                .map(|(column, text)| format!("{text:<width$}", width = column.width()))
                .collect();
            padded.join(" ").trim_end().to_owned()
        };
        if !self.arguments.no_header {
            writeln!(out, "{}", line(columns.iter().map(|column| column.heading().to_owned()).collect()))?;
        }
        for entry in &self.list.states {
            writeln!(out, "{}", line(columns.iter().map(|column| column.text(entry)).collect()))?;
        }
        Ok(())
    }
}

/// The states as a tree. A descriptor may say anything: what hangs on nothing, or on itself, is shown at the end.
fn write_tree(out: &mut dyn Write, states: &[SnapshotEntry]) -> io::Result<()> {
    let mut shown = BTreeSet::new();
    let is_root = |entry: &&SnapshotEntry| !states.iter().any(|other| other.uuid == entry.parent_uuid);
    for root in states.iter().filter(is_root) {
        write_branch(out, states, root, &mut shown)?;
    }
    for entry in states {
        if !shown.contains(&entry.uuid) {
            write_branch(out, states, entry, &mut shown)?;
        }
    }
    Ok(())
}

fn write_branch(
    out: &mut dyn Write,
    states: &[SnapshotEntry],
    root: &SnapshotEntry,
    shown: &mut BTreeSet<Guid>,
) -> io::Result<()> {
    // A chain has at most some hundred states, but a stack of its own costs nothing.
    let mut stack = vec![(root, String::new(), String::new())];
    while let Some((entry, lead, below)) = stack.pop() {
        if !shown.insert(entry.uuid) {
            continue;
        }
        let name = if entry.current { "* current".to_owned() } else { entry.uuid.to_string() };
        write!(out, "{lead}{name}")?;
        match entry.host_bytes {
            Some(bytes) => write!(out, "  {}", human_bytes(bytes))?,
            None => write!(out, "  file missing")?,
        }
        // All of one size is the rule.
        if let Some(bytes) = entry.disk_bytes
            && states.iter().any(|other| other.disk_bytes.is_some_and(|size| size != bytes))
        {
            write!(out, "  disk of {}", human_bytes(bytes))?;
        }
        if let Some(seconds) = entry.modified_unix_seconds {
            write!(out, "  {}", date(seconds))?;
        }
        if entry.names.is_some_and(|names| names > 1) {
            write!(out, "  shared with clones")?;
        }
        if let Some(transition) = entry.transition {
            write!(out, "  {}", transition.to_lowercase())?;
        }
        writeln!(out)?;
        let children: Vec<&SnapshotEntry> =
            states.iter().filter(|child| child.parent_uuid == entry.uuid).collect();
        let last = children.len().saturating_sub(1);
        for (number, child) in children.into_iter().enumerate().rev() {
            let (branch, stem) = if number == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            stack.push((child, format!("{below}{branch}"), format!("{below}{stem}")));
        }
    }
    Ok(())
}

/// Seconds since 1970 as a date in UTC.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since the first of March of a year 0 that begins eras of 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let target = Target::find(&arguments.disk)?;
    let mut list = snapshot_list(&target.descriptor)?;
    if let Some(snapshot) = arguments.snapshot {
        list.find(snapshot)?;
        list.states.retain(|entry| entry.uuid == snapshot);
    }
    if arguments.snapshots_only {
        list.states.retain(|entry| !entry.current);
    }
    output.report(&Shown { list, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(4_102_444_800), "2100-01-01 00:00 UTC");
    }

    #[test]
    fn trees_of_any_shape() {
        let guid =
            |number: u32| format!("{{00000000-0000-0000-0000-{number:012x}}}").parse::<Guid>().unwrap();
        let entry = |own: u32, parent: u32| SnapshotEntry {
            uuid: guid(own),
            parent_uuid: guid(parent),
            current: own == 9,
            fname: PathBuf::from("f"),
            transition: None,
            depth: None,
            disk_bytes: Some(1 << 30),
            file_bytes: Some(1),
            host_bytes: Some(1 << 20),
            modified_unix_seconds: None,
            names: Some(1),
        };
        let states = [entry(1, 0), entry(2, 1), entry(3, 1), entry(9, 2), entry(5, 6), entry(6, 5)];
        let mut text = Vec::new();
        write_tree(&mut text, &states).unwrap();
        let text = String::from_utf8(text).unwrap();
        let shown: Vec<&str> = text.lines().map(|line| line.split("  1 MiB").next().unwrap()).collect();
        assert_eq!(shown.len(), states.len(), "{text}");
        assert_eq!(shown[0], guid(1).to_string());
        assert_eq!(shown[1], format!("├─ {}", guid(2)));
        assert_eq!(shown[2], "│  └─ * current");
        assert_eq!(shown[3], format!("└─ {}", guid(3)));
    }
}
