//! `fuzz NAME SEED [COUNT]`, `fuzz smoke [SECONDS]`, `fuzz canary`.

use ploop_fuzz::{FUZZERS, Fuzzer};
use std::io::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Runs one seed; tells whether it passed.
fn try_seed(fuzzer: &Fuzzer, seed: u64) -> bool {
    let input = (fuzzer.generate)(&mut fastrand::Rng::with_seed(seed));
    panic::catch_unwind(AssertUnwindSafe(|| (fuzzer.run)(&input))).is_ok()
}

fn smoke(seconds: u64) -> ExitCode {
    let fuzzers: Vec<_> = FUZZERS.iter().filter(|fuzzer| fuzzer.name != "canary").collect();
    let share = Duration::from_secs(seconds) / u32::try_from(fuzzers.len()).unwrap_or(1);
    let mut failed = 0u64;
    let mut passed = 0u64;
    for fuzzer in fuzzers {
        let started = Instant::now();
        let mut executions = 0u64;
        // The same seeds each time: smoke repeats; a nightly run asks for others by name and seed.
        while started.elapsed() < share && failed < 3 {
            if try_seed(fuzzer, executions) {
                passed += 1;
            } else {
                failed += 1;
                eprintln!(
                    "SEED={executions}: repeat with: cargo run -p ploop-fuzz -- {} {executions}",
                    fuzzer.name
                );
            }
            executions += 1;
        }
        println!("{}: {executions} executions", fuzzer.name);
    }
    println!("fuzz: {passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

/// Good only if the alarm rings.
fn canary() -> ExitCode {
    let Some(fuzzer) = FUZZERS.iter().find(|fuzzer| fuzzer.name == "canary") else {
        return ExitCode::from(1);
    };
    let silent = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let rang = (0..100_000).any(|seed| !try_seed(fuzzer, seed));
    panic::set_hook(silent);
    println!("canary: {}", if rang { "the alarm rings" } else { "THE ALARM IS SILENT" });
    ExitCode::from(u8::from(!rang))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<u64>().ok());
    match arguments.first().map(String::as_str) {
        Some("smoke") => smoke(number(1).unwrap_or(60)),
        Some("canary") => canary(),
        Some(name) => {
            let Some(fuzzer) = FUZZERS.iter().find(|fuzzer| fuzzer.name == name) else {
                eprintln!("no fuzzer is called {name}");
                return ExitCode::from(2);
            };
            let first = number(1).unwrap_or(0);
            let failed =
                (first..first.saturating_add(number(2).unwrap_or(1))).find(|&seed| !try_seed(fuzzer, seed));
            if let Some(seed) = failed {
                eprintln!("SEED={seed}: repeat with: cargo run -p ploop-fuzz -- {name} {seed}");
            }
            ExitCode::from(u8::from(failed.is_some()))
        }
        None => {
            let _ = writeln!(
                std::io::stderr(),
                "usage: fuzz NAME SEED [COUNT] | fuzz smoke [SECONDS] | fuzz canary"
            );
            let names: Vec<_> = FUZZERS.iter().map(|fuzzer| fuzzer.name).collect();
            let _ = writeln!(std::io::stderr(), "names: {}", names.join(", "));
            ExitCode::from(2)
        }
    }
}
