//! What another size means for what is on a disk: found out and decided before anything is changed.
//!
//! Refused here is what would otherwise be refused half-way: a table that cannot be changed, a partition that is not the
//! last, something that cannot become smaller, a tool or a capability that is missing.

use std::path::Path;

use ploop_core::device::runtime::{OpenRequest, PartitionRange};
use ploop_core::ops::GuestBytes;
use ploop_core::ops::descriptor_lock::{DescriptorLock, lock_timeout};
use ploop_core::ops::open::Opened;
use ploop_core::ops::resize::Shrink;
use ploop_core::units::SECTOR_BYTES;
use ploop_core::{Error, ErrorKind, Result};

use crate::disk_bytes::DiskBytes;
use crate::inner_size::Inner;
use crate::open;
use crate::partition::TAIL_SECTORS;
use crate::partition_table::{Partition, Scheme, Table};
use crate::repartition;
use crate::serving::{self, ServeOptions};
use crate::signature::{self, Content};

/// Answers what lies on the disk, or on a part of it: first byte and length.
pub(crate) type Probe<'a> = &'a dyn Fn(Option<(u64, u64)>) -> Result<Content>;

/// What is to be done inside the disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// The table that was found.
    pub(crate) table: Option<Table>,
    /// The partition that changes, and the byte behind its new end.
    pub(crate) target: Option<(u32, u64)>,
    /// What is on it, or on the disk without one.
    pub(crate) content: Content,
    /// What of that changes its size.
    pub(crate) inner: Option<Inner>,
    /// How long that may be when the disk becomes smaller, in bytes.
    pub(crate) inner_bytes: u64,
}

impl Plan {
    /// Whether the disk must be served for it.
    pub(crate) fn concerns_the_inside(&self) -> bool {
        self.table.is_some() || self.inner.is_some()
    }

    /// How the disk is to be served for it.
    pub(crate) fn serve_options(&self, allow_reclaim_stall: bool) -> ServeOptions {
        ServeOptions {
            allow_reclaim_stall,
            whole_disk: self.table.is_none(),
            partition: self.target.map(|(number, _)| number.to_string()),
            without_device: self.table.is_some() && self.target.is_none(),
            ..ServeOptions::default()
        }
    }
}

/// A closed disk, open to look at.
pub(crate) struct Closed {
    opened: Opened,
}

impl Closed {
    /// Opens the disk for reading. Another command that works on it is waited for.
    pub(crate) fn open(request: &OpenRequest) -> Result<Self> {
        let _lock = match &request.descriptor {
            Some(descriptor) => Some(DescriptorLock::take(descriptor, lock_timeout())?),
            None => None,
        };
        let request = OpenRequest { read_only: true, ..request.clone() };
        Ok(Self { opened: open::open(&request)? })
    }

    /// The same without waiting for anybody and in nobody's way: for a look after which nothing is done.
    pub(crate) fn glance(request: &OpenRequest) -> Result<Self> {
        Ok(Self { opened: open::glance(request)? })
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> GuestBytes<'_> {
        GuestBytes::of(&self.opened.chain)
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.opened.chain.geometry().cluster_bytes()
    }

    /// Lets `work` look at what is on the disk. A raw file is looked at where it lies; another disk is served for a
    /// moment, refusing writes: signatures lie anywhere.
    pub(crate) fn with_probe<T>(
        &self,
        request: &OpenRequest,
        allow_reclaim_stall: bool,
        work: impl FnOnce((&Path, Probe<'_>)) -> Result<T>,
    ) -> Result<T> {
        let chain = &self.opened.chain;
        let raw = chain.name(0);
        let is_file = chain.depth() == 1
            && chain.delta_geometry(0).is_raw()
            && std::fs::metadata(raw).is_ok_and(|file| file.len() == self.bytes().disk_bytes());
        if is_file {
            return work((raw, &|part| signature::probe(raw, part)));
        }
        let request = OpenRequest { read_only: true, ..request.clone() };
        let options = ServeOptions { allow_reclaim_stall, without_device: true, ..ServeOptions::default() };
        let served = serving::start(request, &options)?;
        let file = served.entry.disk_file();
        let done = work((&file, &|part| signature::probe(&file, part)));
        let ended = serving::end(&served);
        done.and_then(|done| ended.map(|()| done))
    }
}

fn refused(kind: ErrorKind, message: String, advice: &str) -> Error {
    Error::new(kind, message).advise(format!("{advice}; nothing was changed"))
}

fn holds_data(what: &str, at: u64) -> Error {
    refused(
        ErrorKind::Parameter,
        format!("{what} holds data past its new end, at byte {at} of the disk"),
        "with --force what lies there is lost",
    )
}

/// What becomes of something that is to end earlier.
fn shrinkable(content: &Content, place: &str, force: bool) -> Result<Option<Inner>> {
    match Inner::of(content) {
        Some(Inner::Xfs) => Err(refused(
            ErrorKind::ResizeFileSystem,
            format!("{place} holds xfs, which cannot be made smaller"),
            "make a smaller disk and copy the files there",
        )),
        Some(inner) => Ok(Some(inner)),
        None if force || content.is_nothing() => Ok(None),
        None => Err(refused(
            ErrorKind::ResizeFileSystem,
            format!("{place} holds {}, which ploop cannot make smaller", content.name()),
            "make that smaller with its own tools on the mounted disk, remove it (wipefs), or give --force, which loses it",
        )),
    }
}

/// Decides what must be done before a closed disk ends at byte `new`.
pub(crate) fn smaller(
    disk: &GuestBytes<'_>,
    table: Option<Table>,
    probe: Probe<'_>,
    new: u64,
    (wanted, force): (Option<&Partition>, bool),
) -> Result<(Plan, Shrink)> {
    let old = disk.disk_bytes();
    let keep = if force { Shrink::Discard } else { Shrink::IfEmpty };
    let whole = probe(None)?;
    let Some(table) = table else {
        // A table without a partition holds nothing.
        let is_empty_table = whole.kind.is_none() && matches!(whole.table.as_deref(), Some("dos" | "gpt"));
        let content = if is_empty_table { Content::default() } else { whole };
        let inner = shrinkable(&content, "the disk", force)?;
        if inner.is_none()
            && !force
            && let Some(at) = disk.first_data(new, old)?
        {
            return Err(holds_data("the disk", at));
        }
        let shrink = if inner.is_some() { Shrink::Discard } else { keep };
        return Ok((Plan { content, inner, inner_bytes: new, ..Plan::default() }, shrink));
    };
    if (whole.kind.is_some() || whole.ambiguous) && !force {
        shrinkable(
            &Content { kind: whole.kind.clone().or(Some("several things".to_owned())), ..whole },
            "beside its partitions, the disk",
            false,
        )?;
    }
    let limit = repartition::partition_end(table.scheme, new);
    if let Some(lost) = table.partitions.iter().find(|one| one.offset >= limit) {
        let content = probe(Some((lost.offset, lost.len)))?;
        return Err(refused(
            ErrorKind::PartitionTable,
            format!("partition {} begins past the new end and holds {}", lost.number, content.name()),
            "delete the partition first: ploop mount -n, then sfdisk --delete DEVICE NUMBER",
        ));
    }
    // One that ends exactly there was made smaller by a run that was cut.
    let cut = table.partitions.iter().find(|one| one.end() >= limit);
    if let Some(wanted) = wanted
        && cut.is_none_or(|cut| cut.number != wanted.number)
    {
        return Err(refused(
            ErrorKind::PartitionTable,
            format!("partition {} ends before the new end: it does not become smaller", wanted.number),
            "leave out --partition",
        ));
    }
    let tail = match table.scheme {
        Scheme::Gpt => TAIL_SECTORS * SECTOR_BYTES,
        Scheme::Dos => 0,
    };
    let mut plan = Plan { target: cut.map(|cut| (cut.number, limit)), ..Plan::default() };
    let mut behind = Some(new);
    if let Some(cut) = cut {
        let place = format!("partition {}", cut.number);
        plan.content = probe(Some((cut.offset, cut.len)))?;
        plan.inner = shrinkable(&plan.content, &place, force)?;
        plan.inner_bytes = limit - cut.offset;
        if plan.inner.is_none()
            && !force
            && let Some(at) = disk.first_data(limit, cut.end())?
        {
            return Err(holds_data(&place, at));
        }
        behind = (cut.end() > limit || plan.inner.is_none()).then_some(cut.end().max(new));
    }
    if let Some(behind) = behind.filter(|_| !force)
        && let Some(at) = disk.first_data(behind, old.saturating_sub(tail))?
    {
        return Err(holds_data("behind its partitions, the disk", at));
    }
    repartition::plan(disk, &table, new, plan.target).map_err(unchanged)?;
    plan.table = Some(table);
    // What lies past the end is accounted for, but for the second copy of the table.
    Ok((plan, Shrink::Discard))
}

/// Decides what follows when a disk grows to end at byte `new`. `shown` is the partition that a served disk shows.
pub(crate) fn larger(
    disk: &dyn DiskBytes,
    table: Option<Table>,
    probe: Probe<'_>,
    new: u64,
    (wanted, shown): (Option<&Partition>, Option<PartitionRange>),
) -> Result<Plan> {
    let Some(table) = table else {
        let content = probe(None)?;
        found_when_larger(&content, "the disk")?;
        let inner = Inner::of(&content);
        return Ok(Plan { content, inner, ..Plan::default() });
    };
    let Some(last) = table.last() else { return Ok(Plan::default()) };
    let meant = wanted.map(|wanted| wanted.number).or(shown.map(|shown| shown.number));
    if let Some(number) = meant
        && number != last.number
    {
        return Err(refused(
            ErrorKind::PartitionTable,
            format!(
                "partition {number} is not the last one of the disk, which is {}: it cannot grow",
                last.number
            ),
            "grow the last partition (of an unmounted disk, without --partition), or the image alone with `ploop grow` \
             and then move partitions with other tools",
        ));
    }
    // The device of a served disk shows the partition alone.
    if shown.is_none() {
        found_when_larger(&probe(None)?, "the disk")?;
    }
    let content = probe(Some((last.offset, last.len)))?;
    found_when_larger(&content, &format!("partition {}", last.number))?;
    let inner = Inner::of(&content);
    let target = Some((last.number, repartition::partition_end(table.scheme, new).max(last.end())));
    repartition::plan(disk, &table, new, target).map_err(unchanged)?;
    Ok(Plan { table: Some(table), target, content, inner, inner_bytes: 0 })
}

fn unchanged(error: Error) -> Error {
    let advice =
        error.advice().unwrap_or("repair the table, or change the image alone with `ploop grow`").to_owned();
    error.advise(format!("{advice}; nothing was changed"))
}

/// Refuses what would no longer be found on a longer device.
fn found_when_larger(content: &Content, place: &str) -> Result<()> {
    if !content.is_found_from_the_end() {
        return Ok(());
    }
    Err(refused(
        ErrorKind::ResizeFileSystem,
        format!("{place} holds {}, which is found from the end of the device", content.name()),
        "on a longer one it would be lost from sight; `ploop grow` makes the image larger all the same",
    ))
}
