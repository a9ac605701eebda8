//! The rules of docs/architecture.md that a machine can check: dependency direction, module size, where `unsafe` and
//! file access may stand, nothing left over.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a module, tests not counted, from which it is to be split.
const MODULE_LINES_MAX: usize = 700;

/// The files that may contain `unsafe`.
const UNSAFE_ALLOWED: &[&str] = &[
    "ploop-core/src/io/sys.rs",
    "ploop-core/src/io/uring.rs",
    "ploop-core/src/io/buffer.rs",
    "ploop-core/src/io/map.rs",
    "ploop-core/src/device/fuse/sys.rs",
    "ploop-core/src/device/ublk/sys.rs",
];

/// For each file or folder of the core: which of our layers it may not name.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("units.rs", &["io", "format", "tracker", "device", "ops"]),
    ("extent.rs", &["io", "format", "tracker", "device", "ops"]),
    ("error.rs", &["io", "format", "tracker", "device", "ops"]),
    ("mutant.rs", &["io", "format", "tracker", "device", "ops"]),
    ("io/", &["format", "tracker", "device", "ops"]),
    ("format/", &["tracker", "device", "ops"]),
    ("tracker/", &["io", "format", "device", "ops"]),
    ("device/", &["ops"]),
    ("ops/", &["tracker"]),
];

/// Modules that are compiled for tests only, besides those called `tests.rs`.
const TEST_MODULES: &[&str] = &[
    "ploop-core/src/format/model.rs",
    "ploop-core/src/format/descriptor/verbs_tests.rs",
    "ploop-core/src/format/testing.rs",
    "ploop-core/src/io/queue_tests.rs",
    "ploop-core/src/ops/check/faults.rs",
    "ploop-core/src/ops/testing.rs",
];

/// Modules above io that look at paths themselves: the lock beside a descriptor is a file of its own, and a bundle must
/// be found before there is a folder to ask; a clone makes its folder.
const PATHS_ALLOWED: &[&str] =
    &["ops/clone.rs", "ops/descriptor_lock.rs", "ops/open.rs", "ops/open/bundle.rs", "ops/open/place.rs"];

/// What only the io layer, the frontends and the commands may call.
const FILE_ACCESS: &[&str] = &["std::fs", "fs::File", "nix::fcntl", "nix::unistd", "Command::new"];

struct Source {
    /// Path from the workspace's root.
    name: String,
    text: String,
}

impl Source {
    /// The lines before the unit tests, with their numbers.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let tests = |line: &str| line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test");
        self.text
            .lines()
            .take_while(move |line| !tests(line))
            .enumerate()
            .map(|(index, line)| (index + 1, line))
    }

    /// The same without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines().filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// Whether it is compiled for tests only.
    fn is_test(&self) -> bool {
        self.name.ends_with("/tests.rs") || TEST_MODULES.contains(&self.name.as_str())
    }

    /// The part of the name inside the core's source folder.
    fn core_path(&self) -> Option<&str> {
        self.name.strip_prefix("ploop-core/src/")
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("readable source folder") {
        let path = entry.expect("folder entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Every Rust source of the workspace's `src` folders.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    let mut files = Vec::new();
    for member in ["ploop-core", "pcopy", "ploop-server", "ploop-cli", "ploop-testing", "fuzz", "benches"] {
        collect(&root.join(member).join("src"), &mut files);
    }
    files.sort();
    let name = |path: &Path| path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
    files
        .iter()
        .map(|path| Source { name: name(path), text: fs::read_to_string(path).expect("readable source") })
        .collect()
}

/// Fails with every place where `wrong` says what is wrong with a line of code of a source that `concerned` picks.
fn refuse(concerned: impl Fn(&Source) -> bool, wrong: impl Fn(&Source, &str) -> Option<String>) {
    let mut findings = String::new();
    for source in sources().iter().filter(|source| !source.is_test() && concerned(source)) {
        for (number, line) in source.code() {
            if let Some(why) = wrong(source, line) {
                let _ = writeln!(findings, "{}:{number}: {why}: {}", source.name, line.trim());
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn layers_know_only_what_lies_below() {
    refuse(
        |source| source.core_path().is_some(),
        |source, line| {
            let path = source.core_path()?;
            let (_, forbidden) = FORBIDDEN.iter().find(|(prefix, _)| path.starts_with(prefix))?;
            let layer = forbidden.iter().find(|layer| line.contains(&format!("crate::{layer}::")))?;
            Some(format!("may not know `{layer}`"))
        },
    );
}

/// The copy's frames know bytes and a hash; only its source and target know disks (rule 7).
#[test]
fn the_copy_knows_the_core_in_two_places_only() {
    let inside = |source: &Source, name: &str| source.name.starts_with(&format!("pcopy/src/{name}"));
    refuse(
        |source| {
            inside(source, "") && !["source", "target", "main.rs"].iter().any(|name| inside(source, name))
        },
        |source, line| {
            let wire = inside(source, "wire") && line.contains("ploop_core");
            let layer = ["ploop_core::device", "ploop_core::format", "ploop_core::ops"];
            // The helper that freezes is asked over a connection of processes, which knows nothing of a disk.
            let process = ["ploop_core::device::control", "ploop_core::device::runtime"];
            let helper = inside(source, "freeze") && process.iter().any(|module| line.contains(module));
            let above = layer.iter().any(|layer| line.contains(layer)) && !helper;
            (wire || above).then(|| "knows too much of the core".to_owned())
        },
    );
}

#[test]
fn unsafe_only_where_it_is_meant_to_be() {
    let marks = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code)"];
    refuse(
        |source| !UNSAFE_ALLOWED.contains(&source.name.as_str()),
        |_, line| marks.iter().any(|mark| line.contains(mark)).then(|| "unsafe outside its files".to_owned()),
    );
}

#[test]
fn files_are_touched_only_through_the_io_layer() {
    let engine = ["disk", "split", "queue", "allocating", "flusher", "gate", "client"];
    refuse(
        |source| {
            source.core_path().is_some_and(|path| {
                let layer = ["format/", "tracker/", "ops/"].iter().any(|layer| path.starts_with(layer));
                (layer && !PATHS_ALLOWED.contains(&path))
                    || engine.iter().any(|name| path == format!("device/{name}.rs"))
            })
        },
        |_, line| {
            FILE_ACCESS.iter().find(|call| line.contains(**call)).map(|call| format!("`{call}` above io"))
        },
    );
}

#[test]
fn libraries_do_not_print_or_exit() {
    let library = |source: &Source| {
        ["ploop-core/", "pcopy/", "ploop-server/"].iter().any(|one| source.name.starts_with(one))
    };
    refuse(
        |source| library(source) && !source.name.ends_with("/main.rs"),
        |_, line| {
            let call =
                ["println!", "print!(", "process::exit"].into_iter().find(|call| line.contains(call))?;
            Some(format!("`{call}` in a library"))
        },
    );
}

#[test]
fn modules_say_what_they_are_and_stay_readable() {
    let mut findings = String::new();
    for source in sources().into_iter().filter(|source| !source.is_test()) {
        let lines = source.lines().count();
        if lines > MODULE_LINES_MAX {
            let _ = writeln!(
                findings,
                "{}: {lines} lines before its tests; {MODULE_LINES_MAX} at most",
                source.name
            );
        }
        if !source.text.starts_with("//!") {
            let _ = writeln!(findings, "{}: begins without a module comment", source.name);
        }
        for part in source.name.split(['/', '.']) {
            if ["utils", "util", "common", "helpers", "misc"].contains(&part) {
                let _ = writeln!(findings, "{}: a name that says nothing", source.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn the_sources_are_really_read() {
    let sources = sources();
    assert!(sources.len() > 20, "only {} files found", sources.len());
    assert!(sources.iter().any(|source| source.code().count() > 100));
}

/// A test runner swallows what a passing test prints: skips go through the one place that keeps them.
#[test]
fn no_test_is_skipped_without_a_record() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    let mut files = Vec::new();
    for member in ["ploop-core", "pcopy", "ploop-server", "ploop-cli", "fuzz"] {
        for part in ["src", "tests"] {
            let folder = root.join(member).join(part);
            if folder.exists() {
                collect(&folder, &mut files);
            }
        }
    }
    let printed = concat!("println!(\"", "SKIP");
    let found: Vec<_> = files
        .into_iter()
        .filter(|path| fs::read_to_string(path).expect("readable source").contains(printed))
        .collect();
    assert!(
        found.is_empty(),
        "these print a skip and keep no record of it (ploop_testing::skip does): {found:?}"
    );
}
