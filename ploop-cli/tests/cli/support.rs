//! Running the command and cleaning up after it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::stage::{Ran, Stage};

/// The built command.
pub(crate) const PLOOP: &str = env!("CARGO_BIN_EXE_ploop");

/// A `ploop` command line, without input and not on a terminal.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(PLOOP);
    command.args(arguments).stdin(Stdio::null()).env_remove("COLUMNS").env_remove("PLOOP_RUN_DIR");
    command
}

/// Runs `ploop` and waits.
pub(crate) fn ploop(arguments: &[&str]) -> Ran {
    command(arguments).output().expect("start ploop").into()
}

/// Compares `text` with the golden file `name`; `PLOOP_BLESS=1` writes it instead.
#[track_caller]
pub(crate) fn golden(name: &str, text: &str) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden").join(name);
    if std::env::var_os("PLOOP_BLESS").is_some() {
        std::fs::write(&path, text).expect("write the golden file");
        return;
    }
    let expected = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; PLOOP_BLESS=1 writes it", path.display()));
    assert_eq!(
        text, expected,
        "{name} changed; if that is meant, run the test with PLOOP_BLESS=1 and look at the change"
    );
}

/// A stage in a new temporary folder, or nothing and the reason printed.
pub(crate) fn stage() -> Option<Stage> {
    if let Some(reason) = Stage::obstacle() {
        ploop_testing::skip(ploop_testing::Need::MountedDisks, reason);
        return None;
    }
    let folder = crate::referee::folder();
    Some(Stage::new(Path::new(PLOOP), folder).expect("make a stage"))
}
