//! When to freeze: a pure function of what the passes so far have shown.
//!
//! Pre-copy works while the pipe is faster than the writers. After each pass the bytes dirtied meanwhile say how
//! long a freeze would last if it began now: those bytes at the rate of the last passes, and the time the receiver
//! needs to make a pass durable. Short enough: freeze. Shrinking: another pass. Neither: freeze anyway, unless the
//! operator set a limit, which is then the reason to give up. No clock is read here and nothing is remembered.

use std::fmt;

use crate::stats::{PassKind, PassStats};

/// Bytes per second that are assumed as long as nothing has been measured.
pub const RATE_ASSUMED: f64 = 100e6;
/// A pass that sent less than this says nothing about the rate.
pub const RATE_SAMPLE_BYTES: u64 = 1 << 20;
/// A pass counts as stalled when it left more than this part of what the pass before it had left.
pub const STALLED_ABOVE: f64 = 0.9;

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvergenceOptions {
    /// A freeze this short, in milliseconds, needs no further pass.
    pub freeze_ms_wanted: u64,
    /// From the end of the freeze command to the thaw, in milliseconds. A freeze predicted longer than this never begins,
    /// and one that turns out longer is undone. `None`: any freeze is better than none.
    pub freeze_ms_max: Option<u64>,
    /// From the start of the freeze command to the end of the thaw, in milliseconds: the freeze command is ended when
    /// it is over, and the disk thawed. `None`: no limit of its own.
    pub outage_ms_max: Option<u64>,
    /// How long freezing the file system itself usually takes, in milliseconds.
    pub file_system_ms: u64,
    /// Passes before the freeze, the first included.
    pub passes_max: u32,
    /// Stalled passes, in a row, after which more of them are no help.
    pub stalled_max: u32,
}

impl Default for ConvergenceOptions {
    fn default() -> Self {
        Self {
            freeze_ms_wanted: 100,
            freeze_ms_max: None,
            outage_ms_max: None,
            file_system_ms: 0,
            passes_max: 30,
            stalled_max: 3,
        }
    }
}

impl ConvergenceOptions {
    /// The longest freeze that is allowed, in milliseconds: the outage holds it.
    pub fn limit_ms(&self) -> u64 {
        self.freeze_ms_max.unwrap_or(u64::MAX).min(self.outage_ms_max.unwrap_or(u64::MAX))
    }
}

/// Why no freeze within the limit can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The disk is written to faster than it can be sent.
    NotShrinking,
    /// It shrinks, but too slowly for the number of passes allowed.
    PassesExhausted,
    /// Nothing is left to send: the freeze itself and the answer take too long.
    FreezeItself,
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotShrinking => "the disk is written to faster than it can be sent",
            Self::PassesExhausted => "the number of passes is used up",
            Self::FreezeItself => {
                "nothing is left to send, and freezing the file system and the receiver's answer take that long"
            }
        })
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what changed, the disk staying in use.
    NextPass,
    /// Stop the writers and send the rest.
    Freeze,
    /// A freeze would last longer than the operator allows.
    GiveUp(Reason),
}

impl Decision {
    /// Its name in events.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NextPass => "next_pass",
            Self::Freeze => "freeze",
            Self::GiveUp(_) => "give_up",
        }
    }
}

/// Bytes of disk per second that a pass moves, from the latest pass that was large enough to tell.
pub fn bytes_per_second(history: &[PassStats]) -> f64 {
    let rate = |pass: &PassStats| {
        let seconds = (pass.seconds - pass.settle_seconds).max(1e-6);
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
        let bytes = pass.wire_bytes as f64;
        bytes / seconds
    };
    history.iter().rev().find(|pass| pass.wire_bytes >= RATE_SAMPLE_BYTES).map_or(RATE_ASSUMED, rate).max(1.0)
}

/// How long a freeze that begins with `dirty_bytes` to send would last, in milliseconds.
pub fn predict_freeze_ms(history: &[PassStats], dirty_bytes: u64) -> u64 {
    // The first pass settles far more than the last one will; the shortest settling is the nearest to it.
    let settle = history.iter().map(|pass| pass.settle_seconds).fold(f64::INFINITY, f64::min);
    let settle = if settle.is_finite() { settle } else { 0.0 };
    #[expect(clippy::cast_precision_loss, reason = "a prediction needs no more than 52 bits")]
    let milliseconds = (dirty_bytes as f64 / bytes_per_second(history) + settle) * 1000.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
    let milliseconds = milliseconds.ceil() as u64;
    milliseconds
}

/// What to do after the passes in `history`, oldest first. Those over frozen deltas tell the rate and nothing else.
pub fn decide(history: &[PassStats], options: &ConvergenceOptions) -> Decision {
    let deltas = history.iter().take_while(|pass| pass.kind == PassKind::Delta).count();
    let (all, history) = (history, history.get(deltas..).unwrap_or_default());
    let Some(last) = history.last() else { return Decision::NextPass };
    let predicted = predict_freeze_ms(all, last.dirty_bytes).saturating_add(options.file_system_ms);
    let limit = options.limit_ms();
    if predicted <= limit && (last.dirty_bytes == 0 || predicted <= options.freeze_ms_wanted) {
        return Decision::Freeze;
    }
    // One more pass over nothing tells how long the answer takes; a second one would tell the same.
    if last.dirty_bytes == 0 && history.iter().rev().take(2).filter(|pass| pass.dirty_bytes == 0).count() == 2
    {
        return Decision::GiveUp(Reason::FreezeItself);
    }
    let stalled = stalled_passes(history) >= options.stalled_max.max(1);
    let exhausted = history.len() >= usize::try_from(options.passes_max.max(1)).unwrap_or(usize::MAX);
    match (stalled, exhausted) {
        (false, false) => Decision::NextPass,
        _ if predicted <= limit => Decision::Freeze,
        (true, _) => Decision::GiveUp(Reason::NotShrinking),
        (false, true) => Decision::GiveUp(Reason::PassesExhausted),
    }
}

/// How many of the last passes, in a row, left hardly less than the pass before them.
fn stalled_passes(history: &[PassStats]) -> u32 {
    #[expect(clippy::cast_precision_loss, reason = "a ratio needs no more than 52 bits")]
    let stalled =
        |pair: &[PassStats]| pair[1].dirty_bytes as f64 > pair[0].dirty_bytes as f64 * STALLED_ABOVE;
    let count = history.windows(2).rev().take_while(|pair| stalled(pair)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(wire_bytes: u64, seconds: f64, dirty_bytes: u64) -> PassStats {
        PassStats {
            pass: 1,
            kind: PassKind::Live,
            data_bytes: wire_bytes,
            zero_bytes: 0,
            wire_bytes,
            frames: 1,
            seconds,
            settle_seconds: 0.0,
            dirty_bytes,
        }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn nothing_known_means_a_pass() {
        assert_eq!(decide(&[], &ConvergenceOptions::default()), Decision::NextPass);
    }

    #[test]
    fn clean_means_freeze() {
        let options = ConvergenceOptions { freeze_ms_max: Some(0), ..Default::default() };
        assert_eq!(decide(&[pass(MIB, 1.0, 0)], &options), Decision::Freeze);
    }

    #[test]
    fn clean_is_no_excuse_for_a_freeze_that_is_too_long() {
        let mut settled = pass(MIB, 1.0, 0);
        settled.settle_seconds = 0.062;
        let options = ConvergenceOptions { freeze_ms_max: Some(50), ..Default::default() };
        // The first pass settles longer than the last one will: that is found out once.
        assert_eq!(decide(&[settled], &options), Decision::NextPass);
        let quick = PassStats { settle_seconds: 0.005, ..settled };
        assert_eq!(decide(&[settled, quick], &options), Decision::Freeze);
        assert_eq!(decide(&[settled, settled], &options), Decision::GiveUp(Reason::FreezeItself));
        let frozen = ConvergenceOptions { file_system_ms: 60, ..options };
        assert_eq!(decide(&[settled, quick], &frozen), Decision::GiveUp(Reason::FreezeItself));
        let outage = ConvergenceOptions { outage_ms_max: Some(50), freeze_ms_max: None, ..frozen };
        assert_eq!(decide(&[settled, quick], &outage), Decision::GiveUp(Reason::FreezeItself));
        assert_eq!(decide(&[settled, quick], &ConvergenceOptions::default()), Decision::Freeze);
    }

    #[test]
    fn prediction_is_bytes_over_rate_and_settling() {
        let mut slow = pass(100 * MIB, 2.0, 0);
        slow.settle_seconds = 1.0;
        assert_eq!(predict_freeze_ms(&[slow], 10 * MIB), 1100);
        assert_eq!(predict_freeze_ms(&[pass(100 * MIB, 1.0, 0), pass(10, 9.0, 0)], 10 * MIB), 100);
        assert_eq!(predict_freeze_ms(&[], 100_000_000), 1000);
    }

    #[test]
    fn short_enough_freezes_and_a_hard_limit_counts() {
        let history = [pass(100 * MIB, 1.0, 9 * MIB)];
        assert_eq!(decide(&history, &ConvergenceOptions::default()), Decision::Freeze);
        let options = ConvergenceOptions { freeze_ms_max: Some(50), ..Default::default() };
        assert_eq!(decide(&history, &options), Decision::NextPass);
    }

    #[test]
    fn stalled_passes_end_in_a_freeze_or_in_giving_up() {
        let history: Vec<_> = (0..4).map(|_| pass(100 * MIB, 1.0, 100 * MIB)).collect();
        assert_eq!(decide(&history[..3], &ConvergenceOptions::default()), Decision::NextPass);
        assert_eq!(decide(&history, &ConvergenceOptions::default()), Decision::Freeze);
        let limited = ConvergenceOptions { freeze_ms_max: Some(900), ..Default::default() };
        assert_eq!(decide(&history, &limited), Decision::GiveUp(Reason::NotShrinking));
        let enough = ConvergenceOptions { freeze_ms_max: Some(1100), ..Default::default() };
        assert_eq!(decide(&history, &enough), Decision::Freeze);
    }

    #[test]
    fn passes_over_frozen_deltas_tell_the_rate_and_nothing_else() {
        let delta = PassStats { kind: PassKind::Delta, ..pass(100 * MIB, 10.0, 0) };
        assert_eq!(decide(&[delta], &ConvergenceOptions::default()), Decision::NextPass);
        // The first pass itself was too small to tell.
        let history = [delta, delta, pass(10, 0.1, 10 * MIB)];
        assert_eq!(predict_freeze_ms(&history, 10 * MIB), 1000);
        // Neither are they stalled passes, nor do they use up their number.
        let options = ConvergenceOptions { passes_max: 2, stalled_max: 1, ..Default::default() };
        assert_eq!(decide(&history, &options), Decision::NextPass);
    }

    #[test]
    fn passes_are_bounded() {
        let history: Vec<_> =
            (0..30).map(|index| pass(100 * MIB, 1.0, (100 * MIB) >> (index / 10))).collect();
        let options = ConvergenceOptions { stalled_max: 99, freeze_ms_max: Some(1), ..Default::default() };
        assert_eq!(decide(&history, &options), Decision::GiveUp(Reason::PassesExhausted));
        assert_eq!(
            decide(&history, &ConvergenceOptions { freeze_ms_max: None, ..options }),
            Decision::Freeze
        );
    }
}
