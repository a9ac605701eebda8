//! The part of a sender that only a copy of all deltas has.
//!
//! ```text
//! for each frozen delta, each after the one it stands on:  Delta · one pass, durable · EndDelta
//! for the current state:                                   Delta · the passes of any copy
//! ```
//!
//! * A frozen delta does not change: it is read once, while the guest writes, and never again. Its digest is sealed by
//!   itself. Tracking starts only after the last of them, so that the first pass over the current state finds
//!   everything that was written meanwhile.
//! * Of each delta only what it holds itself is sent, its zeros, too: over data of the delta below they mean something.
//! * The snapshots must be the same at the end: [`check_snapshots`](super::Sender) comes before the seal.

use std::time::Instant;

use ploop_core::{Error, ErrorKind, Result};

use super::{PROGRESS_INTERVAL, Sender};
use crate::pass::{Counts, PassReader, Walk};
use crate::source::{DeltaDescription, Source};
use crate::stats::{Event, PassKind, hexadecimal, rate};
use crate::transport::Cancel;
use crate::wire::{Delta, EndPass, Kind};

fn out_of_order() -> Error {
    Error::new(ErrorKind::System, "the list of snapshots changed while they were copied")
}

/// The number of a delta as it travels.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl Sender<'_> {
    /// Deltas of the stream; 0 when it has the content alone.
    pub(super) fn deltas(&self) -> u32 {
        self.snapshots.as_ref().map_or(0, |snapshots| number(snapshots.deltas().len()))
    }

    /// Bytes of all frozen deltas, about.
    pub(super) fn frozen_bytes(&self) -> u64 {
        let deltas = self.snapshots.as_ref().map_or(&[][..], |snapshots| snapshots.deltas());
        let frozen = deltas.split_last().map_or(&[][..], |(_current, frozen)| frozen);
        frozen.iter().fold(0, |sum, delta| sum.saturating_add(delta.data_bytes))
    }

    /// Sends the frozen deltas, and says that the current state follows. Nothing of a disk without them.
    pub(super) fn frozen_deltas(&mut self) -> Result<()> {
        let Some(current) = self.deltas().checked_sub(1) else { return Ok(()) };
        self.check_snapshots()?;
        for index in 0..usize::try_from(current).unwrap_or(usize::MAX) {
            self.frozen_delta(index)?;
        }
        let (index, parent) =
            (usize::try_from(current).unwrap_or(usize::MAX), self.described(current)?.parent);
        if parent.is_some() != self.course.source.description().has_parent {
            return Err(out_of_order());
        }
        let delta = self.delta(index, &*self.course.source)?;
        self.begin_delta(&delta)
    }

    /// The deltas are still those that were announced.
    pub(super) fn check_snapshots(&self) -> Result<()> {
        self.snapshots.as_ref().map_or(Ok(()), |snapshots| snapshots.check())
    }

    fn described(&self, index: u32) -> Result<&DeltaDescription> {
        let deltas = self.snapshots.as_ref().map_or(&[][..], |snapshots| snapshots.deltas());
        usize::try_from(index).ok().and_then(|index| deltas.get(index)).ok_or_else(out_of_order)
    }

    /// What the frame says of the delta `index`, which `source` reads.
    fn delta(&self, index: usize, source: &dyn Source) -> Result<Delta> {
        let described = self.described(number(index))?;
        let description = source.description();
        let delta = Delta {
            index: number(index),
            parent: described.parent,
            guid: described.guid,
            place: described.place,
            temporary: described.temporary,
            image: description.image,
            version: description.version,
            cluster_sectors: description.cluster_sectors,
            disk_bytes: source.size_bytes(),
            data_bytes: description.data_bytes,
            modified_seconds: described.modified_seconds,
        };
        // What the receiver would refuse shall fail here, with the source's name.
        Delta::decode(&delta.encode()).map_err(|error| {
            Error::new(
                ErrorKind::Parameter,
                format!("the state {} cannot be copied: {error}", described.name),
            )
            .at_path(&description.name)
            .advise("copy the content alone, without --chain")
        })
    }

    fn begin_delta(&self, delta: &Delta) -> Result<()> {
        self.course.tell(&Event::DeltaStarted {
            delta: delta.index.saturating_add(1),
            deltas: self.deltas(),
            guid: hexadecimal(&delta.guid),
        });
        self.control(Kind::Delta, delta.encode())
    }

    fn frozen_delta(&mut self, index: usize) -> Result<()> {
        self.course.check()?;
        let mut source = self.snapshots.as_mut().ok_or_else(out_of_order)?.source(index)?;
        let delta = self.delta(index, &*source)?;
        self.begin_delta(&delta)?;
        let begun = Instant::now();
        let pass = self.pass + 1;
        let expected_bytes = if delta.data_bytes == 0 { delta.disk_bytes } else { delta.data_bytes };
        let kind = Some(PassKind::Delta);
        self.course.tell(&Event::PassStarted { pass, kind, expected_bytes });
        let sent = self.read_delta(&mut *source, pass, begun, expected_bytes)?;
        self.course.total.merge(sent);
        self.pass = pass;
        self.course.exchange.tell_pass(pass, true);
        self.control(Kind::EndPass, EndPass { pass, durable: true, last: false }.encode())?;
        let flushed = Instant::now();
        if self.two_way {
            self.course.exchange.wait_durable(pass)?;
        } else {
            self.outlet()?.barrier()?;
        }
        self.course.end_pass(pass, PassKind::Delta, sent, begun, flushed.elapsed());
        self.outlet()?.end_delta(delta.index)?;
        self.course
            .tell(&Event::DeltaEnded { delta: delta.index.saturating_add(1), data_bytes: sent.data_bytes });
        Ok(())
    }

    fn read_delta(
        &self,
        source: &mut dyn Source,
        pass: u32,
        begun: Instant,
        expected_bytes: u64,
    ) -> Result<Counts> {
        let mut reader = source.reader()?;
        // Of a base nothing was sent before: it is zero where nothing is said.
        let skips_zeros = !source.description().has_parent;
        let mut reading = PassReader::new(source, &mut *reader, self.outlet()?, &self.pool, skips_zeros);
        let (course, mut next_event) = (&self.course, Instant::now() + PROGRESS_INTERVAL);
        reading.run(&mut Walk::first(), |counts, _done, _source| {
            course.options.cancel.as_ref().map_or(Ok(()), Cancel::check)?;
            if Instant::now() >= next_event {
                next_event = Instant::now() + PROGRESS_INTERVAL;
                course.tell(&Event::Progress {
                    pass,
                    done_bytes: counts.data_bytes + counts.zero_bytes,
                    expected_bytes,
                    data_bytes: counts.data_bytes,
                    bytes_per_second: rate(counts.data_bytes, begun.elapsed()),
                    dirty_bytes: 0,
                    predicted_freeze_ms: None,
                });
            }
            Ok(())
        })?;
        Ok(reading.counts)
    }
}
