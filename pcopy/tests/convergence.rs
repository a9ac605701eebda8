//! The pass policy against simulated writers: it freezes short when it can, bounds its passes, and says why it gives
//! up.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

use pcopy::converge::{ConvergenceOptions, Decision, Reason, decide, predict_freeze_ms};
use pcopy::stats::{PassKind, PassStats};

const MIB: f64 = 1048576.0;

/// A disk that is sent at one rate and dirtied at another, up to a working set.
struct Simulation {
    disk_mib: f64,
    pipe_mib_per_s: f64,
    dirtied_mib_per_s: fn(seconds: f64) -> f64,
    working_set_mib: f64,
    settle_seconds: f64,
}

impl Simulation {
    /// Runs passes until the policy ends them: the decision, the passes, and what the freeze would really take.
    fn run(&self, options: &ConvergenceOptions) -> (Decision, usize, f64) {
        let mut history = Vec::new();
        let (mut to_send, mut clock) = (self.disk_mib, 0.0);
        loop {
            let seconds = to_send / self.pipe_mib_per_s + self.settle_seconds;
            let dirtied = (self.dirtied_mib_per_s)(clock) * seconds;
            let dirty = dirtied.min(self.working_set_mib);
            clock += seconds;
            history.push(PassStats {
                pass: u32::try_from(history.len()).unwrap() + 1,
                kind: PassKind::Live,
                data_bytes: (to_send * MIB) as u64,
                zero_bytes: 0,
                wire_bytes: (to_send * MIB) as u64,
                frames: 1,
                seconds,
                settle_seconds: self.settle_seconds,
                dirty_bytes: (dirty * MIB) as u64,
            });
            match decide(&history, options) {
                Decision::NextPass => to_send = dirty,
                decision => {
                    let truth = (dirty / self.pipe_mib_per_s + self.settle_seconds) * 1000.0;
                    let predicted = predict_freeze_ms(&history, (dirty * MIB) as u64) as f64;
                    assert!((predicted - truth).abs() <= truth * 0.1 + 2.0, "{predicted} for {truth}");
                    return (decision, history.len(), truth);
                }
            }
            assert!(history.len() < 1000, "it never ends");
        }
    }
}

fn simulation(dirtied_mib_per_s: fn(f64) -> f64) -> Simulation {
    Simulation {
        disk_mib: 20_000.0,
        pipe_mib_per_s: 500.0,
        dirtied_mib_per_s,
        working_set_mib: 5_000.0,
        settle_seconds: 0.005,
    }
}

#[test]
fn an_idle_disk_takes_one_pass() {
    let (decision, passes, freeze_ms) = simulation(|_| 0.0).run(&ConvergenceOptions::default());
    assert_eq!((decision, passes), (Decision::Freeze, 1));
    assert!(freeze_ms < 10.0);
}

#[test]
fn a_slow_writer_leads_to_a_short_freeze_in_few_passes() {
    let (decision, passes, freeze_ms) = simulation(|_| 50.0).run(&ConvergenceOptions::default());
    assert_eq!(decision, Decision::Freeze);
    assert!(passes <= 5, "{passes} passes");
    assert!(freeze_ms <= 100.0, "{freeze_ms} ms");
}

#[test]
fn a_writer_as_fast_as_the_pipe_is_frozen_without_a_limit_and_given_up_with_one() {
    let fast = simulation(|_| 800.0);
    let (decision, passes, _) = fast.run(&ConvergenceOptions::default());
    assert_eq!(decision, Decision::Freeze);
    assert!(passes <= 6, "{passes} passes");
    let limited = ConvergenceOptions { freeze_ms_max: Some(500), ..Default::default() };
    assert_eq!(fast.run(&limited).0, Decision::GiveUp(Reason::NotShrinking));
}

#[test]
fn a_small_working_set_rewritten_for_ever_is_frozen_when_it_fits() {
    let hot = Simulation { working_set_mib: 100.0, ..simulation(|_| 2_000.0) };
    let limited = ConvergenceOptions { freeze_ms_max: Some(300), ..Default::default() };
    let (decision, passes, freeze_ms) = hot.run(&limited);
    assert_eq!(decision, Decision::Freeze);
    assert!(passes <= 6 && freeze_ms <= 300.0, "{passes} passes, {freeze_ms} ms");
}

#[test]
fn a_burst_is_waited_out() {
    let bursting = simulation(|clock| if clock < 60.0 { 600.0 } else { 20.0 });
    let limited = ConvergenceOptions { freeze_ms_max: Some(200), stalled_max: 10, ..Default::default() };
    let (decision, _, freeze_ms) = bursting.run(&limited);
    assert_eq!(decision, Decision::Freeze);
    assert!(freeze_ms <= 200.0);
}

#[test]
fn a_pass_limit_is_kept() {
    let slow = simulation(|_| 400.0);
    let limited = ConvergenceOptions { freeze_ms_max: Some(1), passes_max: 3, ..Default::default() };
    let (decision, passes, _) = slow.run(&limited);
    assert_eq!((decision, passes), (Decision::GiveUp(Reason::PassesExhausted), 3));
}
