//! Exit codes: those of the original command, so that scripts keep working.
//!
//! A failure's code is that of its [`ErrorKind`](ploop_core::ErrorKind); a wrong command line is 38. A reader that
//! closes stdout early (`ploop list | head -1`) is no failure: the rest of the text is dropped and the code stays 0.

use std::io;
use std::process::ExitCode;

use ploop_core::Error;

use crate::output::Output;

/// A wrong or empty command line.
pub(crate) const USAGE: u8 = 38;

/// One row of the table: code and meaning.
pub(crate) type Row = (u8, &'static str);

/// Every exit code of this command with its meaning, in order; printed in the manual page.
pub(crate) const TABLE: &[Row] = &[
    (0, "success"),
    (1, "a file cannot be created, or exists already"),
    (2, "a device cannot be opened or allocated"),
    (3, "a device refused a command"),
    (4, "a file cannot be opened"),
    (5, "not enough memory"),
    (6, "a read failed, or the input ended early"),
    (7, "a write failed"),
    (11, "the image is corrupt"),
    (12, "another system call or an external command failed"),
    (13, "the peer of a copy sent what it must not: wrong, damaged or cut data"),
    (14, "the copy cannot finish: the frozen file system still changes, or the freeze command failed"),
    (15, "a file cannot be examined"),
    (16, "a sync failed: what was written may be lost"),
    (17, "another operation is in progress"),
    (18, "a lock cannot be taken"),
    (19, "a file cannot be truncated or extended"),
    (20, "space cannot be allocated"),
    (21, "a file system cannot be mounted"),
    (22, "a file system cannot be unmounted"),
    (23, "the descriptor is locked by another command"),
    (24, "a file system cannot be made"),
    (26, "a file system cannot be resized"),
    (27, "a folder cannot be made"),
    (28, "a file cannot be renamed"),
    (29, "the operation was cancelled"),
    (30, "a cluster cannot be moved to another place"),
    (33, "the partition table cannot be read or written"),
    (35, "a file cannot be removed"),
    (37, "the image or device is in use"),
    (38, "wrong command line or parameter"),
    (39, "the descriptor is missing or wrong"),
    (40, "the device is not mounted"),
    (41, "the file system check failed"),
    (43, "there is no such snapshot"),
    (46, "the file system is busy and stays mounted"),
    (75, "a hand-over was cut at a moment when its outcome cannot be known from this side"),
];

/// Why a command ended without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something went wrong; it is told on stderr.
    Error(Error),
    /// stdout was closed by its reader.
    OutputClosed,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The result of a command.
pub(crate) type Outcome = std::result::Result<(), Failure>;

/// Tells a failure and gives its exit code.
pub(crate) fn code_of(outcome: &Outcome, output: &Output) -> ExitCode {
    match outcome {
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(Failure::Error(error)) => {
            output.error(error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// The exit code after printing help.
pub(crate) fn printed(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(ploop_core::ErrorKind::Write.exit_code()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_core::ErrorKind;

    #[test]
    fn the_table_is_the_kinds_and_success() {
        let kinds = (1..=u8::MAX).filter(|code| ErrorKind::from_exit_code(*code).is_some());
        let codes: Vec<u8> = std::iter::once(0).chain(kinds).collect();
        let documented: Vec<u8> = TABLE.iter().map(|row| row.0).collect();
        assert_eq!(codes, documented);
    }

    #[test]
    fn usage_is_the_code_of_a_wrong_parameter() {
        assert_eq!(USAGE, ErrorKind::Parameter.exit_code());
    }
}
