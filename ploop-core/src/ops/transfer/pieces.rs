//! Working through pieces, several at a time, while the calling thread hands them out, tells the progress and decides
//! when to stop.
//!
//! A piece is stored; when a group of them is, the target is synced; then each piece of the group is read back and
//! compared, while others are stored. So a disk that reads and writes at once is kept busy with both, and what is
//! compared has been durable before.
//!
//! Locking: one mutex for the lists of what is to be done; it is never held during a transfer.

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::io::IoBuf;
use crate::ops::Progress;

use super::{Digest, Target};

/// The target is synced after this many bytes, to compare them.
const GROUP_BYTES: u64 = 128 << 20;

/// A piece of the disk.
pub(in crate::ops) struct Piece {
    /// Its guest bytes; begins at a multiple of the size of pieces.
    pub(in crate::ops) extent: Extent,
    /// The bytes, if they were read already: as long as pieces are, zeros behind the end.
    pub(in crate::ops) bytes: Option<IoBuf>,
}

/// Fills targets and tells the progress.
pub(in crate::ops) struct Pipeline<'a> {
    /// Who is told, and may cancel. Of what is read back it is told, too.
    pub(in crate::ops) progress: &'a dyn Progress,
    /// What was stored is read back and compared.
    pub(in crate::ops) read_back: bool,
}

/// How a piece gets into the target: read if need be, then [`Target::put`]. There is no digest if nothing is read back.
pub(in crate::ops) trait Store:
    Fn(&Piece, &mut [u8]) -> Result<Option<Digest>> + Sync
{
}
impl<F: Fn(&Piece, &mut [u8]) -> Result<Option<Digest>> + Sync> Store for F {}

impl Pipeline<'_> {
    /// How many bytes the progress is told of for `data_bytes` that are stored.
    pub(in crate::ops) fn total_bytes(&self, data_bytes: u64) -> u64 {
        if self.read_back { data_bytes.saturating_mul(2) } else { data_bytes }
    }

    /// Calls `store` for every piece that `next` gives, on `threads` threads, each with a buffer of `piece_bytes`, and
    /// reads back from `target` what was stored. The first failure ends it.
    pub(in crate::ops) fn fill(
        &self,
        target: &dyn Target,
        (piece_bytes, threads): (u64, usize),
        next: impl FnMut() -> Result<Option<Piece>>,
        store: impl Store,
    ) -> Result<()> {
        let work = Work { target, store: &store };
        let shared = Shared::default();
        if threads <= 1 {
            let mut buffer = buffer(piece_bytes)?;
            return self.hand_out(&shared, next, |job| {
                work.perform(&shared, job, &mut buffer)?;
                Ok(true)
            });
        }
        let (sender, receiver) = mpsc::sync_channel::<Job>(0);
        let receiver = Mutex::new(receiver);
        let fed = std::thread::scope(|scope| {
            let mut started = 0;
            for _ in 0..threads {
                let spawned = std::thread::Builder::new()
                    .name("ploop-transfer".into())
                    .spawn_scoped(scope, || work.work_through(&shared, &receiver, piece_bytes));
                match spawned {
                    Ok(_) => started += 1,
                    Err(cause) if started == 0 => {
                        return Err(Error::io(ErrorKind::System, "start a thread", cause));
                    }
                    // Fewer do as well.
                    Err(_) => break,
                }
            }
            let fed = self.hand_out(&shared, next, |job| Ok(sender.send(job).is_ok()));
            drop(sender);
            fed
        });
        match shared.lock().failure.take() {
            Some(error) => Err(error),
            None => fed,
        }
    }

    /// Gives all there is to be done to `give`, which says whether somebody has taken it.
    fn hand_out(
        &self,
        shared: &Shared,
        mut next: impl FnMut() -> Result<Option<Piece>>,
        mut give: impl FnMut(Job) -> Result<bool>,
    ) -> Result<()> {
        let mut ended = false;
        loop {
            let (job, bytes) = match shared.choose(ended) {
                Choice::Job(job) => {
                    let bytes = if let Job::Compare(extent, _) = &job { extent.len() } else { 0 };
                    (job, bytes)
                }
                Choice::Next => match next()? {
                    None => {
                        ended = true;
                        continue;
                    }
                    Some(piece) => {
                        shared.lock().storing += 1;
                        let bytes = piece.extent.len();
                        (Job::Store(piece), bytes)
                    }
                },
                Choice::End => return Ok(()),
            };
            if !give(job)? {
                return Ok(());
            }
            self.progress.advance(bytes)?;
        }
    }
}

/// Something to be done by one thread.
enum Job {
    /// Store a piece.
    Store(Piece),
    /// Make these durable.
    Sync(Vec<(Extent, Digest)>),
    /// Read back, and compare with the digest of what was stored.
    Compare(Extent, Digest),
}

/// What is to be done next.
enum Choice {
    Job(Job),
    /// The next piece is to be stored.
    Next,
    /// Nothing is left, or a thread has failed.
    End,
}

#[derive(Default)]
struct Lists {
    /// Pieces that are being stored.
    storing: usize,
    /// Stored, not durable for certain, and how many bytes.
    stored: Vec<(Extent, Digest)>,
    stored_bytes: u64,
    /// Somebody makes a group durable.
    syncing: bool,
    /// Durable, to be compared.
    durable: VecDeque<(Extent, Digest)>,
    /// The last that was handed out was to be compared: now it is the turn of one to be stored.
    compared: bool,
    failure: Option<Error>,
    failed: bool,
}

/// What the threads of a run share.
#[derive(Default)]
struct Shared {
    lists: Mutex<Lists>,
    /// Something was stored or synced, or has failed.
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lists> {
        // Nothing panics while it holds this lock.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done next; `ended`: no piece is left to be stored. Waits while others have it in hand.
    fn choose(&self, ended: bool) -> Choice {
        let mut lists = self.lock();
        loop {
            if lists.failed {
                return Choice::End;
            }
            if (ended || !lists.compared)
                && let Some((extent, digest)) = lists.durable.pop_front()
            {
                lists.compared = true;
                return Choice::Job(Job::Compare(extent, digest));
            }
            let is_due = lists.stored_bytes >= GROUP_BYTES || ended && lists.storing == 0;
            if is_due && !lists.syncing && !lists.stored.is_empty() {
                lists.syncing = true;
                lists.stored_bytes = 0;
                return Choice::Job(Job::Sync(std::mem::take(&mut lists.stored)));
            }
            if !ended {
                lists.compared = false;
                return Choice::Next;
            }
            if lists.storing == 0 && !lists.syncing && lists.stored.is_empty() {
                return Choice::End;
            }
            lists = self.changed.wait(lists).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the threads do.
struct Work<'a, S> {
    target: &'a dyn Target,
    store: &'a S,
}

impl<S: Store> Work<'_, S> {
    fn perform(&self, shared: &Shared, job: Job, own: &mut IoBuf) -> Result<()> {
        match job {
            Job::Store(mut piece) => {
                let digest = match piece.bytes.take() {
                    Some(mut bytes) => (self.store)(&piece, bytes.as_mut_slice())?,
                    None => (self.store)(&piece, own.as_mut_slice())?,
                };
                let mut lists = shared.lock();
                lists.storing = lists.storing.saturating_sub(1);
                if let Some(digest) = digest {
                    lists.stored.push((piece.extent, digest));
                    lists.stored_bytes = lists.stored_bytes.saturating_add(piece.extent.len());
                }
            }
            Job::Sync(group) => {
                self.target.sync()?;
                let mut lists = shared.lock();
                lists.syncing = false;
                lists.durable.extend(group);
            }
            Job::Compare(extent, digest) => {
                if self.target.digest(extent, own.as_mut_slice())? != digest {
                    return Err(differs(extent));
                }
                return Ok(());
            }
        }
        shared.changed.notify_one();
        Ok(())
    }

    fn work_through(&self, shared: &Shared, receiver: &Mutex<Receiver<Job>>, piece_bytes: u64) {
        let mut own = match buffer(piece_bytes) {
            Ok(buffer) => buffer,
            Err(error) => return drain(shared, receiver, error),
        };
        while let Some(job) = receive(receiver) {
            if let Err(error) = self.perform(shared, job, &mut own) {
                return drain(shared, receiver, error);
            }
        }
    }
}

/// What was read back is not what was stored.
pub(in crate::ops) fn differs(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("compare what was written with what is read back: {what} differs"))
        .advise("nothing was replaced; look at the health of the host's disk and memory before trying again")
}

/// Keeps the first failure, and takes what is still being handed out so that nobody waits for ever.
fn drain(shared: &Shared, receiver: &Mutex<Receiver<Job>>, error: Error) {
    let mut lists = shared.lock();
    lists.failure.get_or_insert(error);
    lists.failed = true;
    drop(lists);
    shared.changed.notify_one();
    while receive(receiver).is_some() {}
}

fn receive(receiver: &Mutex<Receiver<Job>>) -> Option<Job> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// A buffer for one piece.
pub(in crate::ops) fn buffer(piece_bytes: u64) -> Result<IoBuf> {
    usize::try_from(piece_bytes)
        .map_err(|_| std::io::ErrorKind::OutOfMemory.into())
        .and_then(IoBuf::try_zeroed)
        .map_err(|cause| Error::io(ErrorKind::Memory, "take memory for a piece of the disk", cause))
}
