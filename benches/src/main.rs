//! `ploop-benches [NAME...]`: runs the named benches, or all.

use ploop_benches::report::Reporter;
use ploop_benches::work::Failure;
use ploop_benches::{copy, device, downtime, tracker};
use std::process::ExitCode;

type Bench = fn(&Reporter) -> Result<(), Failure>;

const BENCHES: &[(&str, Bench)] = &[
    ("idle_pass", tracker::bench),
    ("copy", copy::bench),
    ("downtime", downtime::bench),
    ("device", device::bench),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| BENCHES.iter().all(|(known, _)| known != name)) {
        let known: Vec<_> = BENCHES.iter().map(|(name, _)| *name).collect();
        eprintln!("no bench is called {unknown}; there are: {}", known.join(", "));
        return ExitCode::from(2);
    }
    let reporter = Reporter::new();
    let mut failed = false;
    for (name, bench) in
        BENCHES.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|want| want == name))
    {
        eprintln!("{name} …");
        if let Err(failure) = bench(&reporter) {
            eprintln!("{name}: {failure}");
            failed = true;
        }
    }
    ExitCode::from(u8::from(failed))
}
