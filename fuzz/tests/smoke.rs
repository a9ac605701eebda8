//! The fuzzers for a moment, and the alarm: part of every test run.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::Command;

fn fuzz(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fuzz")).args(arguments).output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {}\n{out}\n{errors}", output.status);
    print!("{out}");
    out.into_owned()
}

#[test]
fn every_fuzzer_runs_and_finds_nothing() {
    let seconds = std::env::var("PLOOP_FUZZ_SECONDS").unwrap_or_else(|_| "45".to_owned());
    let out = fuzz(&["smoke", &seconds]);
    for name in ["open", "image_ops", "bat_arith", "descriptor", "check_repair", "dirty_bitmap", "wire"] {
        let line = out.lines().find(|line| line.starts_with(&format!("{name}: "))).unwrap();
        let executions: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(executions > 50, "{line}: too few to mean anything");
    }
    // Two million on two quiet processors; a busy machine gets less done in the same time.
    let sum = out.lines().find_map(|line| line.strip_prefix("fuzz: ")).unwrap();
    ploop_testing::count("fuzzers", &format!("\n{}", out.trim_end()));
    let executions: u64 = sum.split_whitespace().next().unwrap().parse().unwrap();
    assert!(executions > 20_000, "only {executions} executions");
}

#[test]
fn the_alarm_rings() {
    fuzz(&["canary"]);
}
