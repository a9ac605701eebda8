//! Working through pieces, several at a time, while the calling thread hands them out, tells the progress and decides
//! when to stop.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::io::IoBuf;
use crate::ops::Progress;

use super::Digest;

/// A piece of the disk.
pub(in crate::ops) struct Piece {
    /// Its guest bytes; begins at a multiple of the size of pieces.
    pub(in crate::ops) extent: Extent,
    /// The bytes, if they were read already: as long as pieces are, zeros behind the end.
    pub(in crate::ops) bytes: Option<IoBuf>,
}

/// What was stored: a digest for each piece.
#[derive(Debug, Default)]
pub(in crate::ops) struct Recorded {
    pieces: BTreeMap<u64, (u64, Digest)>,
}

impl Recorded {
    /// The pieces in order.
    pub(in crate::ops) fn pieces(&self) -> impl Iterator<Item = (Extent, Digest)> + '_ {
        self.pieces.iter().map(|(&start, &(end, digest))| (Extent::between(start, end), digest))
    }

    fn insert(&mut self, extent: Extent, digest: Digest) {
        self.pieces.insert(extent.start(), (extent.end(), digest));
    }
}

/// Runs phases and tells their progress.
pub(in crate::ops) struct Pipeline<'a> {
    /// Who is told, and may cancel.
    pub(in crate::ops) progress: &'a dyn Progress,
}

impl Pipeline<'_> {
    /// Calls `work` for every piece that `next` gives, on `threads` threads, each with a buffer of `piece_bytes`. The
    /// first failure ends it.
    pub(in crate::ops) fn run(
        &self,
        piece_bytes: u64,
        threads: usize,
        mut next: impl FnMut() -> Result<Option<Piece>>,
        work: impl Fn(&Piece, &mut [u8]) -> Result<Digest> + Sync,
    ) -> Result<Recorded> {
        if threads <= 1 {
            let mut recorded = Recorded::default();
            let mut buffer = buffer(piece_bytes)?;
            while let Some(mut piece) = next()? {
                let digest = run_one(&mut piece, &mut buffer, &work)?;
                recorded.insert(piece.extent, digest);
                self.progress.advance(piece.extent.len())?;
            }
            return Ok(recorded);
        }
        let shared =
            Shared { recorded: Mutex::default(), failure: Mutex::new(None), failed: AtomicBool::new(false) };
        let (sender, receiver) = mpsc::sync_channel::<Piece>(0);
        let receiver = Mutex::new(receiver);
        let fed = std::thread::scope(|scope| {
            let mut started = 0;
            for _ in 0..threads {
                let spawned = std::thread::Builder::new()
                    .name("ploop-transfer".into())
                    .spawn_scoped(scope, || shared.work_through(&receiver, piece_bytes, &work));
                match spawned {
                    Ok(_) => started += 1,
                    Err(cause) if started == 0 => {
                        return Err(Error::io(ErrorKind::System, "start a thread", cause));
                    }
                    // Fewer do as well.
                    Err(_) => break,
                }
            }
            let fed = (|| {
                while !shared.failed.load(Ordering::Acquire)
                    && let Some(piece) = next()?
                {
                    let bytes = piece.extent.len();
                    if sender.send(piece).is_err() {
                        break;
                    }
                    self.progress.advance(bytes)?;
                }
                Ok(())
            })();
            drop(sender);
            fed
        });
        let failure = shared.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(error) => Err(error),
            None => fed.map(|()| shared.recorded.into_inner().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// What the threads of a run share.
struct Shared {
    recorded: Mutex<Recorded>,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
}

impl Shared {
    fn work_through(
        &self,
        receiver: &Mutex<Receiver<Piece>>,
        piece_bytes: u64,
        work: &(impl Fn(&Piece, &mut [u8]) -> Result<Digest> + Sync),
    ) {
        let mut own = match buffer(piece_bytes) {
            Ok(buffer) => buffer,
            Err(error) => return self.drain(receiver, error),
        };
        while let Some(mut piece) = receive(receiver) {
            match run_one(&mut piece, &mut own, work) {
                Ok(digest) => {
                    self.recorded.lock().unwrap_or_else(PoisonError::into_inner).insert(piece.extent, digest)
                }
                Err(error) => return self.drain(receiver, error),
            }
        }
    }

    /// Keeps the first failure, and takes what is still being handed out so that nobody waits for ever.
    fn drain(&self, receiver: &Mutex<Receiver<Piece>>, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        while receive(receiver).is_some() {}
    }
}

fn receive(receiver: &Mutex<Receiver<Piece>>) -> Option<Piece> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn run_one(
    piece: &mut Piece,
    own: &mut IoBuf,
    work: &impl Fn(&Piece, &mut [u8]) -> Result<Digest>,
) -> Result<Digest> {
    match piece.bytes.take() {
        Some(mut bytes) => work(piece, bytes.as_mut_slice()),
        None => work(piece, own.as_mut_slice()),
    }
}

/// A buffer for one piece.
pub(in crate::ops) fn buffer(piece_bytes: u64) -> Result<IoBuf> {
    usize::try_from(piece_bytes)
        .map_err(|_| std::io::ErrorKind::OutOfMemory.into())
        .and_then(IoBuf::try_zeroed)
        .map_err(|cause| Error::io(ErrorKind::Memory, "take memory for a piece of the disk", cause))
}
