//! What the tests of all crates share: what a machine must have for a test, and the record of what was skipped and
//! counted.
//!
//! A test that did not run says so. The test runner swallows what a passing test prints, so [`skip`] also keeps it in a
//! file below `target/tmp/skips`, and the program `skips` of this crate prints all of them, with their reasons, at the
//! end of `make test`. A test that skips for want of something that is there has a fault, and fails: each [`Need`] is
//! looked at anew, independently of how the test came to its conclusion.
//!
//! This crate knows none of the others, so that their unit tests can use it.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What a machine must have for a test to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// The effective user is root.
    Root,
    /// A program of that name in one of the folders of `PATH`.
    Program(&'a str),
    /// A file that can be opened for reading; also a device such as `/dev/fuse`.
    File(&'a Path),
    /// What a mounted disk needs: root, `/dev/fuse`, `/dev/loop-control`.
    MountedDisks,
    /// An effective capability, by its number in `linux/capability.h`.
    Capability(u32),
    /// io_uring, for this user.
    IoUring,
    /// A Linux kernel of that version or a later one.
    Kernel(u32, u32),
    /// A file system of that name, which the kernel knows already.
    FileSystem(&'a str),
    /// Something that nobody but the test itself can look for: nothing is checked, the skip is only kept.
    Other,
}

impl Need<'_> {
    /// Whether this machine has it. [`Need::Other`] is never met.
    pub fn is_met(self) -> bool {
        match self {
            Self::Root => nix::unistd::geteuid().is_root(),
            Self::Program(name) => finds_program(name),
            Self::File(path) => File::open(path).is_ok(),
            Self::MountedDisks => {
                Self::Root.is_met()
                    && ["/dev/fuse", "/dev/loop-control"].iter().all(|path| File::open(path).is_ok())
            }
            Self::Capability(number) => has_capability(number),
            Self::IoUring => io_uring::IoUring::new(2).is_ok(),
            Self::Kernel(major, minor) => kernel_version() >= (major, minor),
            Self::FileSystem(name) => fs::read_to_string("/proc/filesystems")
                .is_ok_and(|known| known.lines().any(|line| line.split('\t').next_back() == Some(name))),
            Self::Other => false,
        }
    }

    /// Whether this machine has it; kept as a skip where it has not, with `why`.
    pub fn is_met_or_skips(self, why: impl Display) -> bool {
        let is_met = self.is_met();
        if !is_met {
            keep_skip(&why.to_string());
        }
        is_met
    }
}

/// Whether there is a program of that name; kept as a skip where there is none.
pub fn has(program: &str) -> bool {
    Need::Program(program).is_met_or_skips(format_args!("{program} is not installed"))
}

/// Keeps that the running test, or a part of it, was skipped for want of `need`, and says `why`.
///
/// # Panics
///
/// If this machine has what is said to be missing: then nothing had to be skipped.
#[track_caller]
pub fn skip(need: Need<'_>, why: impl Display) {
    assert!(!need.is_met(), "skipped ({why}) although this machine has it: {need:?}");
    keep_skip(&why.to_string());
}

/// Keeps a count of this run under `name`, over that of the last run, and prints it: `make test` shows all of them at
/// its end, so that they do not shrink unseen.
pub fn count(name: &str, text: &str) {
    println!("{name}: {text}");
    let file: String =
        name.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect();
    let kept = records("counts")
        .and_then(|folder| fs::write(folder.join(format!("{file}.txt")), format!("{name}: {text}\n")));
    if let Err(error) = kept {
        println!("the count is not kept: {error}");
    }
}

/// Keeps that this run found `mutant`, a rule that was broken on purpose.
pub fn found(mutant: impl std::fmt::Debug) {
    let kept = records("mutants").and_then(|folder| fs::write(folder.join(format!("{mutant:?}")), ""));
    if let Err(error) = kept {
        println!("it is not kept that {mutant:?} was found: {error}");
    }
}

/// Whether `mutant` was found since the records were removed.
///
/// Fails if there is no place for records.
pub fn was_found(mutant: impl std::fmt::Debug) -> io::Result<bool> {
    records("mutants").map(|folder| folder.join(format!("{mutant:?}")).exists())
}

/// Everything that was skipped since the records were removed: test and reason, in order of the reasons.
///
/// Fails if the records cannot be read.
pub fn skipped() -> io::Result<Vec<Skip>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(records("skips")?)? {
        for line in fs::read_to_string(entry?.path())?.lines() {
            if let Some((test, why)) = line.split_once('\t') {
                all.push(Skip { why: why.to_owned(), test: test.to_owned() });
            }
        }
    }
    all.sort();
    all.dedup();
    Ok(all)
}

/// A test that was skipped, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skip {
    /// For what reason.
    pub why: String,
    /// The program and the test in it.
    pub test: String,
}

fn keep_skip(why: &str) {
    let why = why.replace(['\n', '\t'], " ");
    println!("SKIP: {why}");
    let keep = || -> io::Result<()> {
        let program = std::env::current_exe()?;
        let program = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // Cargo puts a hash behind the name.
        let program = program.rsplit_once('-').map_or(program.as_str(), |(name, _)| name);
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a thread of a test");
        let path = records("skips")?.join(format!("{}.txt", std::process::id()));
        // One write, so that lines of several threads do not mix.
        let line = format!("{program}: {test}\t{why}\n");
        OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
    };
    if let Err(error) = keep() {
        println!("the skip is not kept: {error}");
    }
}

/// The folder of the records of that kind, below the folder where Cargo builds; made when missing.
fn records(kind: &str) -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // Cargo marks the folder that it builds in.
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    let target =
        target.ok_or_else(|| io::Error::other("this program lies in no folder where Cargo builds"))?;
    let folder = target.join("tmp").join(kind);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn finds_program(name: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| {
        fs::metadata(folder.join(name))
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    })
}

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    1_u64.checked_shl(number).is_some_and(|bit| effective & bit != 0)
}

/// Major and minor number of the running kernel; zeros where it does not say.
fn kernel_version() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers =
        release.split(|letter: char| !letter.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_machine_has_is_found_and_nonsense_is_not() {
        for met in [
            Need::Program("sh"),
            Need::File(Path::new("/dev/null")),
            Need::Kernel(2, 6),
            Need::FileSystem("proc"),
        ] {
            assert!(met.is_met(), "{met:?}");
        }
        let missing = [
            Need::Program("no-such-program-here"),
            Need::File(Path::new("/no/such/file")),
            Need::Kernel(9999, 0),
            Need::FileSystem("nosuchfs"),
            Need::Capability(63),
            Need::Capability(64),
            Need::Other,
        ];
        for missing in missing {
            assert!(!missing.is_met(), "{missing:?}");
        }
    }

    #[test]
    #[should_panic(expected = "although this machine has it")]
    fn who_skips_for_want_of_what_is_there_fails() {
        skip(Need::Program("sh"), "no shell");
    }
}
