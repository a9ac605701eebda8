//! Sending the original's one-way stream ("family A"; see [`legacy`](crate::legacy) for its grammar), for receivers that
//! know nothing else.
//!
//! ```text
//! tracking · first pass · live passes · sync mark · sync of the file system · freeze · last passes · thaw
//! · table · header · end
//! ```
//!
//! The stream is an image file at file offsets, whatever the source is: [`SynthesizedImage`] places each cluster when it
//! is first sent, whole; later only what changed in it is sent. Clusters of zeros get no place. Table and header go
//! last, so a stream that is cut leaves no image. They depend on nothing that the guest still writes, and are sent after
//! the thaw.
//!
//! What keeps a copy complete: a loan is taken before its bytes are read (T2); one cluster is never being read twice at
//! the same time, so that what arrives later is never older; at the end, with the gate closed, nothing is dirty.
//! The format has no digests and the receiver cannot answer, but for the eight bytes after the sync mark where there
//! is a way back. Its exit code is the verdict.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::time::{Duration, Instant};

use ploop_core::io::IoBuf;
use ploop_core::{Error, ErrorKind, Extent, Result};

use crate::course::Course;
use crate::freeze::Quiesce;
use crate::legacy::{MARKER, SYNC_MARK_BYTES, SYNCED};
use crate::pass::Counts;
use crate::sender::SendOptions;
use crate::source::{Loan, Reader, Source};
use crate::standstill::{Attempt, Standstill, Sweeper};
use crate::stats::{Event, Observer, PassKind, SendReport};
use crate::target_synthesis::SynthesizedImage;
use crate::transport::{self, Link, Transport};

/// Bytes being read at the same time, as far as two clusters are not more.
const READ_AHEAD_BYTES: u64 = 8 << 20;
/// Loans kept at the same time.
const LOANS_MAX: usize = 4096;
/// The largest run that is taken at once.
const LOAN_BYTES: u64 = 64 << 20;
/// Table bytes in one packet.
const HEAD_PIECE_BYTES: u64 = 64 << 10;
/// Bytes of the first sector, which holds the header.
const SECTOR_BYTES: u64 = 512;

/// Copies `source` over `link` as the original does: success means that everything was sent. An input of the link is
/// where the receiver says how the sync mark went; without one, nothing is waited for.
///
/// The writers of the source go on in any case when this returns.
pub fn send_original(
    source: &mut dyn Source,
    quiesce: &mut dyn Quiesce,
    link: Link,
    options: &SendOptions,
    observer: &dyn Observer,
) -> Result<SendReport> {
    let output =
        link.output.ok_or_else(|| Error::new(ErrorKind::Parameter, "a sender needs somewhere to send to"))?;
    // Its answer to the sync mark is not in frames.
    let course = Course::new(source, options, observer, false)?;
    let patience = course.patience();
    let output = Transport::writer(output, patience.clone())?;
    let feedback = link.input.map(|input| Transport::reader(input, patience)).transpose()?;
    let mut sender = OriginalSender::begin(course, output, feedback)?;
    // Declared last, dropped first: after a panic, too, writers go on before all else.
    let mut standstill = Standstill::new(quiesce);
    let sent = sender.phases(&mut standstill).map_err(|error| {
        let released = standstill.release_known(error);
        let may_be_in_place = sender.is_ending;
        sender.course.tell(&Event::Failed { runs: released.is_ok(), may_be_in_place });
        match released {
            Ok(error) | Err(error) => error,
        }
    });
    sender.loans.clear();
    sender.course.source.stop_tracking();
    sent.map(|()| sender.course.report(false, String::new(), 0))
}

/// A read under way.
struct Reading {
    cluster: u64,
    extent: Extent,
}

struct OriginalSender<'a> {
    course: Course<'a>,
    output: Transport,
    feedback: Option<Transport>,
    reader: Box<dyn Reader>,
    image: SynthesizedImage,
    /// By token, which is the first byte.
    reading: HashMap<u64, Reading>,
    /// Clusters being read.
    clusters: HashSet<u64>,
    loans: Vec<Box<dyn Loan>>,
    /// The end of the stream may have left: the receiver may have all it needs.
    is_ending: bool,
}

impl<'a> OriginalSender<'a> {
    fn begin(course: Course<'a>, output: Transport, feedback: Option<Transport>) -> Result<Self> {
        let description = course.source.description();
        let image = SynthesizedImage::new(
            description.version,
            description.cluster_sectors,
            course.source.size_bytes(),
        )
        .map_err(|error| error.at_path(&description.name))?;
        // Before the first byte is read (T6).
        course.source.start_tracking()?;
        let reader = course.source.reader().inspect_err(|_| course.source.stop_tracking())?;
        Ok(Self {
            course,
            output,
            feedback,
            reader,
            image,
            reading: HashMap::new(),
            clusters: HashSet::new(),
            loans: Vec::new(),
            is_ending: false,
        })
    }

    fn phases(&mut self, standstill: &mut Standstill<'_>) -> Result<()> {
        self.course.tell_started(false);
        self.first_pass()?;
        loop {
            while self.course.next_pass_helps()? {
                self.dirty_pass(PassKind::Live)?;
            }
            self.sync_mark()?;
            standstill.sync_file_system(&mut self.course)?;
            self.dirty_pass(PassKind::Synced)?;
            if standstill.freeze(&mut self.course)? == Attempt::Frozen {
                break;
            }
        }
        standstill.last_passes(self)?;
        // Loans of this stream end when they are sent.
        self.course.check_clean()?;
        standstill.thaw(&mut self.course)?;
        self.head()?;
        self.is_ending = true;
        self.packet(0, &[], 0)
    }

    fn first_pass(&mut self) -> Result<()> {
        let begun = self.begin_pass(PassKind::First);
        let mut cursor = 0;
        while let Some(data) = self.reader.next_data(cursor)? {
            cursor = self.read_clusters(data)?;
        }
        self.end_pass(PassKind::First, begun)
    }

    fn dirty_pass(&mut self, kind: PassKind) -> Result<()> {
        let begun = self.begin_pass(kind);
        let mut cursor = 0;
        while let Some(loan) = self.course.source.take_dirty(cursor, LOAN_BYTES) {
            let extent = loan.extent();
            self.loans.push(loan);
            self.read_clusters(extent)?;
            cursor = extent.end();
            if self.loans.len() >= LOANS_MAX {
                self.settle()?;
            }
        }
        self.end_pass(kind, begun)
    }

    /// Number of the pass that runs.
    fn pass(&self) -> u32 {
        u32::try_from(self.course.history.len()).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn begin_pass(&self, kind: PassKind) -> (Instant, Counts) {
        self.course.begin_pass(self.pass(), kind);
        (Instant::now(), self.course.total)
    }

    fn end_pass(&mut self, kind: PassKind, (begun, before): (Instant, Counts)) -> Result<()> {
        self.settle()?;
        let sent = self.course.total.since(before);
        self.course.end_pass(self.pass(), kind, sent, begun, Duration::ZERO);
        Ok(())
    }

    /// Waits until everything that was read is sent. Nobody will say that it is durable: loans end here.
    fn settle(&mut self) -> Result<()> {
        while self.reader.in_flight() > 0 {
            self.send_one()?;
        }
        self.loans.drain(..).for_each(Loan::acknowledge);
        Ok(())
    }

    /// Reads what an extent has in each cluster, or all of a cluster without a place; where the last one ends.
    fn read_clusters(&mut self, extent: Extent) -> Result<u64> {
        let cluster_bytes = self.image.cluster_bytes();
        let disk_bytes = self.course.source.size_bytes();
        let mut at = extent.start();
        while at < extent.end() {
            self.course.check()?;
            let cluster = at / cluster_bytes;
            let start = cluster * cluster_bytes;
            let end = start.saturating_add(cluster_bytes).min(disk_bytes);
            if self.clusters.contains(&cluster) {
                // Else an older content could arrive after a newer one.
                self.settle_cluster(cluster)?;
            }
            let wanted = match self.image.find(cluster)? {
                Some(_) => Extent::between(at, extent.end().min(end)),
                None => Extent::between(start, end),
            };
            self.read(cluster, wanted)?;
            at = end;
        }
        Ok(at)
    }

    fn settle_cluster(&mut self, cluster: u64) -> Result<()> {
        while self.clusters.contains(&cluster) {
            self.send_one()?;
        }
        Ok(())
    }

    fn read(&mut self, cluster: u64, extent: Extent) -> Result<()> {
        let depth = (READ_AHEAD_BYTES / self.image.cluster_bytes()).clamp(2, 64);
        while self.reader.in_flight() as u64 >= depth {
            self.send_one()?;
        }
        let len = usize::try_from(extent.len())
            .map_err(|_| Error::new(ErrorKind::Memory, "a cluster is too large for this machine"))?;
        let buffer = IoBuf::try_zeroed(len)
            .map_err(|cause| Error::io(ErrorKind::Memory, "take memory for a read", cause))?;
        self.reader.submit(extent.start(), extent.start(), buffer)?;
        self.clusters.insert(cluster);
        self.reading.insert(extent.start(), Reading { cluster, extent });
        Ok(())
    }

    /// Sends one read that has finished.
    fn send_one(&mut self) -> Result<()> {
        let lost = || Error::new(ErrorKind::Read, "a read was lost");
        let (token, buffer) = self.reader.finish()?.ok_or_else(lost)?;
        let Reading { cluster, extent } = self.reading.remove(&token).ok_or_else(lost)?;
        self.clusters.remove(&cluster);
        let bytes = buffer.as_slice();
        let cluster_bytes = self.image.cluster_bytes();
        let start = cluster * cluster_bytes;
        let place = match self.image.find(cluster)? {
            Some(place) => place,
            None if bytes.iter().all(|byte| *byte == 0) => return Ok(()),
            None => self.image.place(cluster)?,
        };
        // The last cluster of a disk may be cut; in the file it is whole.
        let is_last = extent.start() == start && extent.end() == self.course.source.size_bytes();
        let padding = if is_last { cluster_bytes.saturating_sub(extent.len()) } else { 0 };
        self.course.total.data_bytes += extent.len();
        self.packet(place + (extent.start() - start), bytes, padding)
    }

    /// One packet: bytes, then so many zeros.
    fn packet(&mut self, position: u64, bytes: &[u8], padding: u64) -> Result<()> {
        self.course.check()?;
        let too_long = || Error::new(ErrorKind::System, "a packet is too long");
        let len = u64::try_from(bytes.len()).ok().and_then(|len| len.checked_add(padding));
        let size = len.and_then(|len| u32::try_from(len).ok()).ok_or_else(too_long)?;
        let mut head = [0; 16];
        head[..4].copy_from_slice(&MARKER);
        head[4..8].copy_from_slice(&size.to_le_bytes());
        head[8..].copy_from_slice(&position.to_le_bytes());
        let zeros = vec![0; usize::try_from(padding).map_err(|_| too_long())?];
        let written = self.output.write_both(&head, bytes).and_then(|()| self.output.write_both(&zeros, &[]));
        written.map_err(|error| match self.course.check() {
            // The pipe was left because the freeze had lasted too long.
            Err(limit) => limit,
            Ok(()) => transport::explain(ErrorKind::Write, "send the stream", error),
        })?;
        self.course.total.wire_bytes += 16 + u64::from(size);
        self.course.total.frames += 1;
        Ok(())
    }

    /// Has everything so far made durable before the freeze, and hears how that went, if there is a way back.
    fn sync_mark(&mut self) -> Result<()> {
        // An old receiver writes these bytes, which are the right ones.
        let bytes = self.image.head(0, u64::from(SYNC_MARK_BYTES))?;
        self.packet(0, &bytes, 0)?;
        let Some(feedback) = &mut self.feedback else { return Ok(()) };
        let mut answer = [0; 8];
        feedback.read_exact(&mut answer).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::io(ErrorKind::Protocol, "the receiver left without a word", error)
            }
            _ => transport::explain(ErrorKind::Read, "hear of the receiver's sync", error),
        })?;
        match &answer {
            _ if answer == *SYNCED => Ok(()),
            b"FAILURE\n" => {
                Err(Error::new(ErrorKind::Sync, "the receiver could not sync the copy")
                    .advise("see its message"))
            }
            _ => Err(Error::new(ErrorKind::Protocol, "the receiver answers something else than it should")
                .advise("see whether something prints into the pipe of -f")),
        }
    }

    /// The table, then the sector with the header: only with it the file is an image.
    fn head(&mut self) -> Result<()> {
        let end = self.image.head_bytes();
        let mut at = SECTOR_BYTES;
        while at < end {
            let len = HEAD_PIECE_BYTES.min(end - at);
            let piece = self.image.head(at, len)?;
            self.packet(at, &piece, 0)?;
            at += len;
        }
        let header = self.image.head(0, SECTOR_BYTES.min(end))?;
        self.packet(0, &header, 0)?;
        self.course.tell_sealed();
        Ok(())
    }
}

impl<'a> Sweeper<'a> for OriginalSender<'a> {
    fn course(&mut self) -> &mut Course<'a> {
        &mut self.course
    }

    fn sweep_frozen(&mut self, _last: bool) -> Result<()> {
        self.dirty_pass(PassKind::Frozen)
    }
}
