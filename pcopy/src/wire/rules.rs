//! What may come when, in both directions: asked before a payload is read or memory for it is taken.

use super::delta::{Counted, Tree};
use super::{
    Delta, EndDelta, EndPass, FRAMES_LIMIT, Header, Hello, KEEPALIVES_LIMIT, Kind, PASSES_LIMIT,
    ROUNDS_LIMIT, SMALL_STREAM_BYTES, Seal, WireError,
};

/// Where a sender's stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamState {
    Start,
    /// A delta must begin.
    Deltas,
    /// After the `Hello`, a `Delta` or an `EndPass`, or inside a pass.
    Passes,
    /// After the pass of a frozen delta.
    DeltaEnd,
    /// After the last `EndPass`.
    Last,
    Sealed,
    Done,
}

/// What a sender may send: the receiver asks before it reads a payload.
#[derive(Clone, Debug)]
pub struct StreamRules {
    state: StreamState,
    sequence: u64,
    two_way: bool,
    disk_bytes: u64,
    /// Of the present delta, or of the disk.
    bytes_max: u64,
    tree: Tree,
    payload_bytes_max: u32,
    /// End of the last range of the running pass.
    cursor: u64,
    /// Passes that have ended.
    passes: u32,
    data_bytes: u64,
    zero_bytes: u64,
    keepalives: u32,
}

impl Default for StreamRules {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamRules {
    /// The rules before the `Hello`.
    pub fn new() -> Self {
        Self {
            state: StreamState::Start,
            sequence: 0,
            two_way: false,
            disk_bytes: 0,
            bytes_max: 0,
            tree: Tree::default(),
            payload_bytes_max: 0,
            cursor: 0,
            passes: 0,
            data_bytes: 0,
            zero_bytes: 0,
            keepalives: 0,
        }
    }

    /// Whether that header may come now; if so it has come. Called before its payload is read.
    pub fn admit(&mut self, header: &Header) -> Result<(), WireError> {
        if !header.kind.is_numbered() {
            return admit_unnumbered(header.kind, self.state != StreamState::Start, &mut self.keepalives);
        }
        let legal = match self.state {
            StreamState::Start => header.kind == Kind::Hello,
            StreamState::Deltas => header.kind == Kind::Delta,
            StreamState::Passes => matches!(header.kind, Kind::Data | Kind::Zero | Kind::EndPass),
            StreamState::DeltaEnd => header.kind == Kind::EndDelta,
            StreamState::Last => header.kind == Kind::Seal,
            StreamState::Sealed => self.two_way && header.kind == Kind::Commit,
            StreamState::Done => false,
        };
        if !legal {
            let state = match self.state {
                StreamState::Start => "first",
                StreamState::Deltas => "before a delta",
                StreamState::Passes => "in a pass",
                StreamState::DeltaEnd => "after the pass of a delta",
                StreamState::Last => "after the last pass",
                StreamState::Sealed => "after the seal",
                StreamState::Done => "after the end",
            };
            return Err(WireError::State { kind: header.kind, state });
        }
        next_sequence(&mut self.sequence, header)?;
        self.keepalives = 0;
        if matches!(header.kind, Kind::Data | Kind::Zero) {
            self.admit_range(header)?;
        }
        match header.kind {
            Kind::EndPass => {
                self.cursor = 0;
                self.passes += 1;
                if self.passes > PASSES_LIMIT {
                    return Err(WireError::TooMany("passes"));
                }
            }
            Kind::Seal => self.state = StreamState::Sealed,
            Kind::Commit => self.state = StreamState::Done,
            _ => {}
        }
        Ok(())
    }

    fn admit_range(&mut self, header: &Header) -> Result<(), WireError> {
        let end = header.offset.checked_add(header.extent).ok_or(WireError::Place(header.kind))?;
        if end > self.bytes_max {
            return Err(WireError::PastEnd { end, disk_bytes: self.bytes_max });
        }
        if header.offset < self.cursor {
            return Err(WireError::NotAscending { offset: header.offset });
        }
        if header.length > self.payload_bytes_max {
            return Err(WireError::Length { kind: header.kind, length: header.length });
        }
        self.cursor = end;
        let sum = if header.kind == Kind::Data { &mut self.data_bytes } else { &mut self.zero_bytes };
        *sum = sum.saturating_add(header.extent);
        // A frozen delta has one pass, which ascends: only the passes over the current state could be endless.
        let limit = self.disk_bytes.saturating_mul(ROUNDS_LIMIT).saturating_add(SMALL_STREAM_BYTES);
        let covered = self.data_bytes.saturating_add(self.zero_bytes);
        if covered.saturating_sub(self.tree.bytes_before()) > limit {
            return Err(WireError::TooMany("bytes"));
        }
        Ok(())
    }

    /// Takes in the `Hello`, after its header was admitted and its digest checked.
    pub fn hello(&mut self, hello: &Hello) {
        self.tree = Tree::new(hello.deltas);
        self.state = if self.tree.is_announced() { StreamState::Deltas } else { StreamState::Passes };
        self.two_way = hello.two_way;
        self.disk_bytes = hello.disk_bytes;
        self.bytes_max = hello.disk_bytes;
        self.payload_bytes_max = hello.payload_bytes_max;
    }

    /// Takes in a `Delta`, after its header was admitted and its digest checked.
    pub fn delta(&mut self, delta: &Delta) -> Result<(), WireError> {
        self.tree.begin(delta, self.disk_bytes, self.counted())?;
        self.bytes_max = delta.disk_bytes;
        self.state = StreamState::Passes;
        Ok(())
    }

    /// Takes in an `EndDelta`, after its header was admitted and its digest checked.
    pub fn end_delta(&mut self, end: &EndDelta) -> Result<(), WireError> {
        self.tree.end(end, self.counted())?;
        self.state = StreamState::Deltas;
        Ok(())
    }

    /// The stream before the frame that was admitted last.
    fn counted(&self) -> Counted {
        Counted {
            frames: self.sequence.saturating_sub(1),
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
        }
    }

    /// Takes in an `EndPass`, after its header was admitted and its digest checked.
    pub fn end_pass(&mut self, end: &EndPass) -> Result<(), WireError> {
        if end.pass != self.passes {
            return Err(WireError::Field("pass"));
        }
        if self.tree.is_frozen() {
            if end.last || !end.durable {
                return Err(WireError::Field("pass flags"));
            }
            self.state = StreamState::DeltaEnd;
        } else if end.last {
            self.state = StreamState::Last;
        }
        Ok(())
    }

    /// Whether the counts of a `Seal` are those of the stream; called after its header was admitted.
    pub fn check_seal(&self, seal: &Seal) -> Result<(), WireError> {
        let counted = [self.disk_bytes, self.sequence.saturating_sub(1), self.data_bytes, self.zero_bytes];
        if [seal.disk_bytes, seal.frames, seal.data_bytes, seal.zero_bytes] == counted {
            Ok(())
        } else {
            Err(WireError::Field("counts of the seal"))
        }
    }

    /// Whether the `Seal` has come.
    pub fn is_sealed(&self) -> bool {
        matches!(self.state, StreamState::Sealed | StreamState::Done)
    }

    /// Bytes in `Data` frames, and covered by `Zero` frames, so far.
    pub fn bytes(&self) -> (u64, u64) {
        (self.data_bytes, self.zero_bytes)
    }
}

fn admit_unnumbered(kind: Kind, keepalive_legal: bool, keepalives: &mut u32) -> Result<(), WireError> {
    if kind == Kind::Keepalive {
        if !keepalive_legal {
            return Err(WireError::State { kind, state: "first" });
        }
        *keepalives += 1;
        if *keepalives > KEEPALIVES_LIMIT {
            return Err(WireError::TooMany("signs of life"));
        }
    }
    Ok(())
}

fn next_sequence(sequence: &mut u64, header: &Header) -> Result<(), WireError> {
    if header.sequence != *sequence {
        return Err(WireError::Sequence { expected: *sequence, found: header.sequence });
    }
    *sequence += 1;
    if *sequence > FRAMES_LIMIT { Err(WireError::TooMany("frames")) } else { Ok(()) }
}

/// What the sender has told the receiver, as far as it decides which answers are legal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// The last pass that ended.
    pub passes: u32,
    /// Bytes of numbered frames.
    pub bytes: u64,
    /// The `Seal` was sent.
    pub sealed: bool,
    /// The `Commit` was sent.
    pub committed: bool,
}

/// What a receiver may answer: the sender asks before it reads a payload.
#[derive(Clone, Debug, Default)]
pub struct AnswerRules {
    sequence: u64,
    acknowledged: bool,
    verdict: bool,
    committed: bool,
    keepalives: u32,
    credited: u64,
    durable: u32,
}

impl AnswerRules {
    /// The rules before the `HelloAck`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether that header may come now; if so it has come. Called before its payload is read.
    pub fn admit(&mut self, header: &Header, told: &Told) -> Result<(), WireError> {
        if !header.kind.is_numbered() {
            return admit_unnumbered(header.kind, true, &mut self.keepalives);
        }
        let legal = match header.kind {
            Kind::HelloAck => !self.acknowledged,
            Kind::Credit | Kind::PassDurable => self.acknowledged && !self.verdict,
            Kind::Verdict => self.acknowledged && !self.verdict && told.sealed,
            Kind::Committed => self.verdict && told.committed && !self.committed,
            _ => false,
        };
        if !legal {
            let state = match (self.acknowledged, self.verdict, self.committed) {
                (false, ..) => "as the first answer",
                (true, false, _) => "before the verdict",
                (_, true, false) => "after the verdict",
                (.., true) => "after the end",
            };
            return Err(WireError::State { kind: header.kind, state });
        }
        next_sequence(&mut self.sequence, header)?;
        self.keepalives = 0;
        match header.kind {
            Kind::HelloAck => self.acknowledged = true,
            Kind::Verdict => self.verdict = true,
            Kind::Committed => self.committed = true,
            _ => {}
        }
        Ok(())
    }

    /// Takes in a `Credit`: it may not go back, nor beyond what was sent.
    pub fn credit(&mut self, credited: u64, told: &Told) -> Result<(), WireError> {
        if credited < self.credited || credited > told.bytes {
            return Err(WireError::Field("credit"));
        }
        self.credited = credited;
        Ok(())
    }

    /// Takes in a `PassDurable`: passes become durable in order, after they ended.
    pub fn durable(&mut self, pass: u32, told: &Told) -> Result<(), WireError> {
        if pass <= self.durable || pass > told.passes {
            return Err(WireError::Field("durable pass"));
        }
        self.durable = pass;
        Ok(())
    }
}
