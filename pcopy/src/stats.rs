//! What a copy tells about itself: events while it runs, figures at its end.
//!
//! The library measures and reports; it never prints. A command renders [`Event`]s as bars or as JSON lines.

use std::time::Duration;

use serde::Serialize;

/// What a pass was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PassKind {
    /// All of one frozen delta.
    Delta,
    /// Everything that holds data; of a disk that is sent delta by delta, everything that the current state holds.
    First,
    /// What changed meanwhile, the disk being written to.
    Live,
    /// What a sync of the file system wrote, shortly before the freeze.
    Synced,
    /// What changed up to the freeze; writers are stopped.
    Frozen,
}

/// Figures of one finished pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PassStats {
    /// Number of the pass, from 1.
    pub pass: u32,
    /// What it was for.
    pub kind: PassKind,
    /// Bytes sent in data frames.
    pub data_bytes: u64,
    /// Bytes covered by zero frames.
    pub zero_bytes: u64,
    /// Bytes written to the pipe, headers included.
    pub wire_bytes: u64,
    /// Frames sent.
    pub frames: u64,
    /// Seconds from its first read to its end being durable (two-way) or sent (one-way).
    pub seconds: f64,
    /// Seconds of these between the last frame being sent and the answer that all is durable.
    pub settle_seconds: f64,
    /// Bytes that were written to the disk meanwhile and wait for the next pass. What was discarded does not count.
    pub dirty_bytes: u64,
}

/// The time the writers stood still, in parts. Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Downtime {
    /// The freeze command.
    pub hook_ms: f64,
    /// The file system's own freeze, which writes what it still held.
    pub file_system_ms: f64,
    /// Reading and sending what was still dirty, until the last frame was handed over.
    pub last_pass_ms: f64,
    /// Waiting for the receiver: durable, read back, transcript equal. In one-way copies: for the pipe.
    pub seal_ms: f64,
    /// How long the gate was closed, a part of the two above.
    pub gate_ms: f64,
    /// Bytes sent while the writers stood still.
    pub bytes: u64,
    /// From the end of the freeze command to the thaw: what `--max-freeze` limits.
    pub freeze_ms: f64,
    /// From the start of the freeze command to the end of the thaw: the outage.
    pub total_ms: f64,
}

/// Something that happened in a copy.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The two sides have met, or the sender has begun a one-way stream.
    Started {
        /// The copy's name, in hexadecimal digits.
        copy_id: String,
        /// Size of the disk.
        disk_bytes: u64,
        /// Whether the receiver answers.
        two_way: bool,
    },
    /// A delta begins: a frozen one, or, as the last, that of the current state.
    DeltaStarted {
        /// Its number, from 1.
        delta: u32,
        /// How many there are.
        deltas: u32,
        /// The GUID of its state, in hexadecimal digits.
        guid: String,
    },
    /// A frozen delta is complete: sent (senders), or closed and equal (receivers).
    DeltaEnded {
        /// Its number, from 1.
        delta: u32,
        /// Data bytes in it.
        data_bytes: u64,
    },
    /// A pass begins.
    PassStarted {
        /// Its number, from 1.
        pass: u32,
        /// What it is for (senders only).
        #[serde(skip_serializing_if = "Option::is_none")]
        kind: Option<PassKind>,
        /// Bytes it will look at, as far as is known.
        expected_bytes: u64,
    },
    /// A pass goes on.
    Progress {
        /// Its number.
        pass: u32,
        /// Bytes of disk dealt with in this pass.
        done_bytes: u64,
        /// Bytes it will look at, as far as is known.
        expected_bytes: u64,
        /// Data bytes sent or received in this pass.
        data_bytes: u64,
        /// Data bytes per second in this pass.
        bytes_per_second: u64,
        /// Bytes dirty now (senders only).
        dirty_bytes: u64,
        /// How long a freeze would last if it began now (senders only).
        #[serde(skip_serializing_if = "Option::is_none")]
        predicted_freeze_ms: Option<u64>,
    },
    /// A pass has ended.
    PassEnded(PassStats),
    /// What the figures lead to: `next_pass`, `freeze` or `give_up`.
    Decided {
        /// The decision.
        decision: &'static str,
        /// How long a freeze would last.
        predicted_freeze_ms: u64,
    },
    /// The freeze begins: the command runs, then the file system is frozen.
    Freezing,
    /// Something that the operator should know.
    Warning {
        /// What.
        message: String,
    },
    /// Writers stand still.
    Frozen {
        /// Milliseconds of the freeze command.
        hook_ms: f64,
        /// Milliseconds of the file system's freeze.
        file_system_ms: f64,
    },
    /// The copy has failed, and all that could be undone is (senders only).
    Failed {
        /// Whether the writers of the source go on.
        runs: bool,
        /// Whether the copy may stand under its final name on the other side, or come there yet.
        may_be_in_place: bool,
    },
    /// The stream is sealed; the verdict is awaited (two-way) or left to the receiver (one-way).
    Sealed {
        /// Data bytes of the whole copy.
        data_bytes: u64,
        /// Frames of the whole copy.
        frames: u64,
    },
    /// The receiver has everything durable and equal.
    Verified,
    /// Writers go on.
    Thawed(Downtime),
    /// The copy stands under its final name.
    Committed,
}

/// Who wants to know. Called from the copy's own thread: must not wait for long.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// Nobody wants to know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: &Event) {}
}

impl<F: Fn(&Event) + Sync> Observer for F {
    fn event(&self, event: &Event) {
        self(event);
    }
}

/// Figures of a finished copy, as its sender knows them.
#[derive(Clone, Debug, Serialize)]
pub struct SendReport {
    /// The copy's name, in hexadecimal digits.
    pub copy_id: String,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Whether the receiver said that the copy is in place. False in one-way copies, where only the receiver knows.
    pub committed: bool,
    /// Every pass.
    pub passes: Vec<PassStats>,
    /// Deltas sent one by one; 0 when the content alone was sent.
    pub deltas: u32,
    /// The time the writers stood still.
    pub downtime: Downtime,
    /// Bytes written to the pipe.
    pub wire_bytes: u64,
    /// Data bytes sent.
    pub data_bytes: u64,
    /// Seconds from start to end.
    pub seconds: f64,
    /// The transcript both sides agree on, in hexadecimal digits.
    pub transcript: String,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Figures of a finished copy, as its receiver knows them.
#[derive(Clone, Debug, Serialize)]
pub struct ReceiveReport {
    /// The copy's name, in hexadecimal digits; empty for the original's stream, which has none.
    pub copy_id: String,
    /// Size of the disk (for the original's stream: of the file).
    pub disk_bytes: u64,
    /// Passes received.
    pub passes: u32,
    /// Deltas received one by one; 0 when the content alone was sent.
    pub deltas: u32,
    /// Data bytes received.
    pub data_bytes: u64,
    /// Bytes covered by zero frames.
    pub zero_bytes: u64,
    /// Bytes read back from the new image and found equal.
    pub verified_bytes: u64,
    /// Seconds from start to end.
    pub seconds: f64,
    /// Whether the sender could be told that the copy is in place (always true in one-way copies).
    pub sender_told: bool,
    /// Whether it was the original's one-way stream.
    pub legacy: bool,
}

/// Bytes as hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('?'));
        }
        text
    })
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Bytes per second, for people.
pub(crate) fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let milliseconds = elapsed.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / milliseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_json_lines_with_a_name() {
        let event = Event::Progress {
            pass: 1,
            done_bytes: 2,
            expected_bytes: 3,
            data_bytes: 4,
            bytes_per_second: 5,
            dirty_bytes: 6,
            predicted_freeze_ms: None,
        };
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(
            line,
            r#"{"event":"progress","pass":1,"done_bytes":2,"expected_bytes":3,"data_bytes":4,"bytes_per_second":5,"dirty_bytes":6}"#
        );
        let stats = PassStats {
            pass: 1,
            kind: PassKind::First,
            data_bytes: 1,
            zero_bytes: 0,
            wire_bytes: 1,
            frames: 1,
            seconds: 0.5,
            settle_seconds: 0.0,
            dirty_bytes: 0,
        };
        let line = serde_json::to_string(&Event::PassEnded(stats)).unwrap();
        assert!(line.starts_with(r#"{"event":"pass_ended","pass":1,"kind":"first""#), "{line}");
    }

    #[test]
    fn hexadecimal_digits() {
        assert_eq!(hexadecimal(&[0, 0x1f, 0xff]), "001fff");
    }
}
