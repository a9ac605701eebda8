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

/// What one thread did with its share of the seeds.
#[derive(Clone, Copy, Default)]
struct Share {
    executions: u64,
    failed: u64,
}

/// Every `threads`-th seed from `first` on until the time is over or a few have failed.
fn run_share(fuzzer: &Fuzzer, first: u64, threads: u64, time: Duration) -> Share {
    let started = Instant::now();
    let mut share = Share::default();
    let mut seed = first;
    while started.elapsed() < time && share.failed < 3 {
        // The clock is asked now and then only: some executions take less than asking.
        for _ in 0..32 {
            if !try_seed(fuzzer, seed) {
                share.failed += 1;
                eprintln!("SEED={seed}: repeat with: cargo run -p ploop-fuzz -- {} {seed}", fuzzer.name);
            }
            share.executions += 1;
            seed += threads;
        }
    }
    share
}

/// All fuzzers one after the other, on all processors. The same seeds from 0 each time; `PLOOP_FUZZ_SEED` lets them begin
/// elsewhere, for runs that are to find something new.
fn smoke(seconds: u64) -> ExitCode {
    let first = std::env::var("PLOOP_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0u64);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let weights: u32 = FUZZERS.iter().map(|fuzzer| fuzzer.weight).sum();
    let mut sum = Share::default();
    for fuzzer in FUZZERS.iter().filter(|fuzzer| fuzzer.weight > 0) {
        let time = Duration::from_secs(seconds) * fuzzer.weight / weights.max(1);
        let shares: Vec<Option<Share>> = std::thread::scope(|scope| {
            let share = |thread| scope.spawn(move || run_share(fuzzer, first + thread, threads, time));
            let running: Vec<_> = (0..threads).map(share).collect();
            running.into_iter().map(|thread| thread.join().ok()).collect()
        });
        // A thread that broke outside of an execution counts as a failure.
        let broken = Share { executions: 0, failed: 1 };
        let executions: u64 = shares.iter().map(|share| share.unwrap_or(broken).executions).sum();
        sum.failed += shares.iter().map(|share| share.unwrap_or(broken).failed).sum::<u64>();
        sum.executions += executions;
        println!("{}: {executions} executions", fuzzer.name);
    }
    println!("fuzz: {} executions, {} failed", sum.executions, sum.failed);
    ExitCode::from(u8::from(sum.failed > 0))
}

/// Good only if the alarm rings, for made-up findings and for a planted bug.
fn canary() -> ExitCode {
    let silent = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let mut is_silent = false;
    for fuzzer in FUZZERS.iter().filter(|fuzzer| fuzzer.weight == 0) {
        let found = (0..20_000u64).find(|&seed| !try_seed(fuzzer, seed));
        match found {
            Some(seed) => println!("{}: the alarm rings after {} executions", fuzzer.name, seed + 1),
            None => println!("{}: THE ALARM IS SILENT", fuzzer.name),
        }
        is_silent |= found.is_none();
    }
    panic::set_hook(silent);
    ExitCode::from(u8::from(is_silent))
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
