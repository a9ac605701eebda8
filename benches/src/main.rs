//! `ploop-benches [NAME...]`: runs the named benches, or all.

use ploop_benches::report::Reporter;
use ploop_benches::work::Failure;
use ploop_benches::{
    chain_reads, check, convert, copy, device, downtime, merge, open, scattered_writes, snapshot_hold,
    tracker,
};
use std::process::ExitCode;

type Bench = fn(&Reporter) -> Result<(), Failure>;

const BENCHES: &[(&str, Bench)] = &[
    ("idle_pass", tracker::bench),
    ("open", open::bench),
    ("copy", copy::bench),
    ("convert", convert::bench),
    ("downtime", downtime::bench),
    ("device", device::bench),
    ("check", check::bench),
    ("chain_reads", chain_reads::bench),
    ("scattered_writes", scattered_writes::bench),
    ("snapshot_hold", snapshot_hold::bench),
    ("merge", merge::bench),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    // The freeze command of a bench.
    if let [word, device] = &wanted[..]
        && word == "scatter"
    {
        return match downtime::scatter(device.as_ref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("{word} {device}: {failure}");
                ExitCode::FAILURE
            }
        };
    }
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
