//! Says which of the rules that are broken on purpose the last test run has noticed: the end of `make test`.
//!
//! The list itself is gone through: a mutant that nobody hunts is one that nobody finds.

use std::process::ExitCode;

use ploop_core::mutant::Mutant;

fn main() -> ExitCode {
    let missed: Vec<Mutant> = Mutant::ALL
        .iter()
        .copied()
        .filter(|mutant| !ploop_testing::was_found(mutant).is_ok_and(|was_found| was_found))
        .collect();
    println!("mutants: {} of {} found", Mutant::ALL.len() - missed.len(), Mutant::ALL.len());
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("the tests do not notice: {missed:?}");
    ExitCode::FAILURE
}
