//! Prints what the last test run skipped, with the reasons: the end of `make test`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let skipped = match ploop_testing::skipped() {
        Ok(skipped) => skipped,
        Err(error) => {
            eprintln!("skips: the records of skipped tests cannot be read: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("skipped here, wholly or in part: {}", skipped.len());
    for group in skipped.chunk_by(|one, other| one.why == other.why) {
        println!("  {}:", group[0].why);
        for skip in group {
            println!("    {}", skip.test);
        }
    }
    ExitCode::SUCCESS
}
