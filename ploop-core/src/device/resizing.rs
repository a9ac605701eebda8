//! A running disk becomes larger.
//!
//! The work is that of [`growing`](super::growing), done while new writes are held: a longer table is short (4 bytes for
//! each cluster of the new range), so little lies in its way. When it is much, it is moved in several freezes, at most
//! 64 MiB in each; between them no new cluster is put into the way.
//!
//! Reads go on. Nobody reads a cluster at its old place once that is given up: it moves under its lock, taken alone, and
//! who reads in the top holds it until the transfer has ended. The flusher is locked out, nothing is pending, and punches
//! have completed, so nothing that began before can write into the room of the new table.
//!
//! Then the files are opened anew, with the sizes of the new header, and that chain replaces the old one, as for a
//! snapshot; the size the guest is told follows. A tracker covers the disk of its start: while one is active, a disk does
//! not grow, and while it grows none is started.
//!
//! Death of the server: before the header counts, the successor finds the old size and clusters at their old or their
//! new place; after it, the new size. The pending log is empty meanwhile, for what it says of places may become untrue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::allocating::{Grant, Mode, Waiter, Want};
use super::disk::{Disk, check_layout};
use super::flusher::Changed;
use super::growing::{self, Watch};
use super::inbox::{Inbox, Message};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Chain, Move};
use crate::io::Waker;
use crate::units::{FileCluster, Sectors};

/// Bytes moved while writes are held, at most, before they may go on for a while.
const FREEZE_BYTES: u64 = 64 << 20;
/// How long readers may take to leave a cluster.
const READERS_MAX: Duration = Duration::from_secs(30);

/// How a running disk is to become larger.
#[derive(Clone, Debug)]
pub struct GrowOptions {
    /// The new size, rounded up to whole clusters.
    pub disk: Sectors,
    /// Give every cluster of the new range its place at once.
    pub preallocate: bool,
    /// How long writes in flight may take to end before each freeze.
    pub freeze_timeout: Duration,
    /// Bytes moved in one freeze; 64 MiB but in tests.
    pub freeze_bytes: u64,
}

impl GrowOptions {
    /// The usual way to get to `disk`.
    pub fn new(disk: Sectors) -> Self {
        Self { disk, preallocate: false, freeze_timeout: Duration::from_secs(30), freeze_bytes: FREEZE_BYTES }
    }
}

/// What was done to a running disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Grown {
    /// Size before, in bytes.
    pub disk_bytes_before: u64,
    /// Size now, in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Clusters that lay in the way.
    pub moved_clusters: u64,
    /// Freezes it took.
    pub freezes: u32,
    /// How long writes were held, in all.
    pub held_ms: u64,
}

/// Keeps readers away from clusters that move.
struct Locks<'a> {
    disk: &'a Disk,
    inbox: Arc<Inbox>,
    held: Vec<u32>,
}

impl<'a> Locks<'a> {
    fn new(disk: &'a Disk) -> Self {
        let thread = std::thread::current();
        Self { disk, inbox: Arc::new(Inbox::new(Waker::new(move || thread.unpark()))), held: Vec::new() }
    }

    fn take(&mut self, cluster: u32) -> Result<()> {
        let waiter = || Waiter { inbox: Arc::clone(&self.inbox), token: u64::from(cluster) };
        if self.disk.locks.acquire(cluster, Want::Exclusive, waiter).is_none() {
            self.wait(cluster)?;
        }
        self.held.push(cluster);
        Ok(())
    }

    fn wait(&self, cluster: u32) -> Result<()> {
        let deadline = Instant::now() + READERS_MAX;
        loop {
            if self.is_granted() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let mut granted: Vec<Grant> = Vec::new();
                let in_line = self.disk.locks.cancel(cluster, &self.inbox, u64::from(cluster), &mut granted);
                self.disk.locks.deliver(&mut granted);
                // Granted at the last moment, the message is there.
                if !in_line && self.is_granted() {
                    return Ok(());
                }
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!(
                        "grow the disk: readers of a cluster did not finish in {} s",
                        READERS_MAX.as_secs()
                    ),
                )
                .at_cluster(u64::from(cluster))
                .advise("the host disk may be stuck or very slow; run the command again"));
            }
            std::thread::park_timeout(left);
        }
    }

    /// Only one lock is waited for at a time: any grant is that one.
    fn is_granted(&self) -> bool {
        let mut messages = std::collections::VecDeque::new();
        self.inbox.take(&mut messages);
        messages.iter().any(|message| matches!(message, Message::Granted { .. }))
    }

    fn release(&mut self) {
        let mut granted: Vec<Grant> = Vec::new();
        for cluster in self.held.drain(..) {
            self.disk.locks.release(cluster, Mode::Exclusive, &mut granted);
        }
        self.disk.locks.deliver(&mut granted);
    }
}

impl Watch for Locks<'_> {
    fn lock(&mut self, moves: &[Move]) -> Result<()> {
        for one in moves {
            if let Err(error) = self.take(one.guest.0) {
                self.release();
                return Err(error);
            }
        }
        Ok(())
    }

    fn unlock(&mut self, _moves: &[Move]) {
        self.release();
    }

    fn advance(&mut self, _bytes: u64) -> Result<()> {
        Ok(())
    }
}

/// How a round ended.
struct Round {
    moved: u64,
    finished: bool,
}

impl Disk {
    /// Makes the disk larger while it is used. Its queues are driven by other threads meanwhile. Nothing is done to one
    /// that has the size already.
    ///
    /// Fails with `Busy` while a tracker is active (a copy runs) or somebody else holds the writes, with `Parameter` for a
    /// smaller size or one beyond a limit. After any failure the disk goes on with its old size, unless a write of table
    /// or header failed, which poisons it. The same call again goes on.
    pub fn grow(self: &Arc<Self>, options: &GrowOptions) -> Result<Grown> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::Parameter, "grow the disk: it is served for reading only"));
        }
        self.flusher.poison().check()?;
        let before = self.chain().geometry().clone();
        let wanted = before.resized(before.rounded(options.disk))?;
        let mut grown = Grown {
            disk_bytes_before: before.disk_bytes(),
            disk_bytes: wanted.disk_bytes(),
            cluster_bytes: wanted.cluster_bytes(),
            moved_clusters: 0,
            freezes: 0,
            held_ms: 0,
        };
        if wanted.disk_bytes() == before.disk_bytes() {
            return Ok(grown);
        }
        if wanted.disk_bytes() < before.disk_bytes() {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!(
                    "the disk has {} bytes, more than the {} asked for: a disk in use does not become smaller",
                    before.disk_bytes(),
                    wanted.disk_bytes()
                ),
            )
            .advise("unmount it, then resize it"));
        }
        let resizing = self.trackers.resizing().ok_or_else(|| {
            Error::new(
                ErrorKind::Busy,
                "grow the disk: its writes are being tracked, for a copy of the present size",
            )
            .advise("wait for the end of the copy, or end it; this command has changed nothing")
        })?;
        match self.grow_rounds(wanted.disk_sectors(), options, &mut grown) {
            Ok(()) => {
                resizing.set_disk_bytes(self.size_bytes());
                Ok(grown)
            }
            Err(error) => {
                // What was kept free for the longer table may be used.
                self.chain().lift_floor();
                Err(error)
            }
        }
    }

    fn grow_rounds(self: &Arc<Self>, disk: Sectors, options: &GrowOptions, grown: &mut Grown) -> Result<()> {
        loop {
            // With the gate open: the flush behind it is then short.
            self.flush()?;
            let start = Instant::now();
            let round = self.grow_round(&disk, options);
            grown.freezes += 1;
            grown.held_ms += u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            let round = round?;
            grown.moved_clusters += round.moved;
            if round.finished {
                return Ok(());
            }
        }
    }

    /// Waits until nothing is under way that began with another chain than the one in use: then places that only the
    /// former one knew are free.
    pub(crate) fn former_reads_end(&self) -> Result<()> {
        self.flusher.former_reads_end()
    }

    /// One freeze: all that is left, or the next part of the moves.
    fn grow_round(self: &Arc<Self>, disk: &Sectors, options: &GrowOptions) -> Result<Round> {
        let _frozen = self.freeze(options.freeze_timeout)?;
        self.flush()?;
        let mut round = Round { moved: 0, finished: false };
        let (result, chain) = self.flusher.exclusively(|chain| {
            let plan = match chain.plan_resize(*disk, options.preallocate) {
                Ok(plan) => plan,
                Err(error) => return Changed { chain: None, result: Err(error), poisoned: false },
            };
            let floor = plan.geometry.first_data_cluster();
            let mut locks = Locks::new(self);
            let done = if plan.moved_bytes() > options.freeze_bytes {
                let done = growing::move_some(chain, &plan, options.freeze_bytes, &mut locks);
                let moved = options.freeze_bytes / plan.geometry.cluster_bytes();
                round.moved = moved.max(1);
                done.and_then(|()| {
                    chain.reopened(floor).map_err(|error| growing::Cut { error, moved: true, poisoned: true })
                })
            } else {
                round.moved = plan.moves.len() as u64;
                round.finished = true;
                growing::apply(chain, &plan, &mut locks)
            };
            match done.and_then(|chain| {
                // The clusters lie as they lay: this cannot fail where it did not before.
                check_layout(&chain, false).map_err(|error| growing::Cut {
                    error,
                    moved: true,
                    poisoned: true,
                })?;
                Ok(chain)
            }) {
                Ok(chain) => Changed { chain: Some(chain), result: Ok(()), poisoned: false },
                Err(cut) => after_cut(chain, cut),
            }
        });
        if let Some(chain) = chain {
            self.install(chain);
        }
        result.map(|()| round)
    }
}

/// What to go on with after a failure: the same sizes, but places may be others than this chain believes.
fn after_cut(chain: &Arc<Chain>, cut: growing::Cut) -> Changed {
    if cut.poisoned || !cut.moved {
        return Changed { chain: None, result: Err(cut.error), poisoned: cut.poisoned };
    }
    match chain.reopened(FileCluster(0)) {
        Ok(chain) => Changed { chain: Some(chain), result: Err(cut.error), poisoned: false },
        Err(error) => {
            let error = cut.error.advise(format!("the image could not be read again either: {error}"));
            Changed { chain: None, result: Err(error), poisoned: true }
        }
    }
}
