//! The examples of the documents, run as they stand.
//!
//! Every block of `docs/commands/*.md`, of `docs/from-*.md` and of `README.md` that begins with three backticks and `console` is run, the
//! blocks of one document one after the other in one folder that is empty at first:
//!
//! ```text
//! $ ploop init -s 64M -t none disk.hds          a command, run by `sh`; the built `ploop` comes first in PATH
//! disk.hds: expanded of 64 MiB, [..]            what it prints, stdout and stderr together, line by line
//! $ ploop info --json nothing.hds \
//! > | head -1                                   a line that begins with `> ` goes on with the command
//! ...
//! ? 4                                           its exit code, when it is not 0
//! ```
//!
//! `[..]` stands for any text within a line, a line `...` for any number of lines, `[FOLDER]` for the folder the
//! example runs in. Everything else must be equal.
//!
//! A comment above a block says what is special about it, several words with commas between them:
//!
//! | comment | meaning |
//! |---|---|
//! | `<!-- example: root -->` | it mounts: needs root, `/dev/fuse` and loop devices |
//! | `<!-- example: needs qemu-img -->` | it needs this program |
//! | `<!-- example: fresh -->` | it begins in a new empty folder |
//! | `<!-- example: not run, REASON -->` | it only shows something, such as two machines |
//!
//! Where something is missing the block is skipped with a line `SKIP:`, and with it those after it up to the next
//! `fresh`. `PLOOP_EXAMPLE=NAME` runs only the documents whose name contains that. Whatever an example has mounted is
//! unmounted afterwards, also when it failed; an example that leaves something mounted has failed.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a failed test panics")]

mod document;
mod ground;
mod pattern;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use document::{Block, Need};
use ground::Ground;

/// The documents with examples.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    let mut found = vec![root.join("README.md")];
    let files = |folder: &str| std::fs::read_dir(root.join(folder)).into_iter().flatten();
    found.extend(files("docs/commands").map(|entry| entry.expect("list the documents").path()));
    let pages = files("docs").map(|entry| entry.expect("list the documents").path());
    let is_way_here =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("from-"));
    found.extend(pages.filter(is_way_here));
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    if let Ok(wanted) = std::env::var("PLOOP_EXAMPLE") {
        found.retain(|path| path.to_string_lossy().contains(&wanted));
    }
    found.sort();
    found
}

#[test]
fn the_examples_of_the_documents_are_true() {
    let mut report = Report::default();
    for path in documents() {
        let text = std::fs::read_to_string(&path).expect("read a document");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match document::blocks(&text) {
            Ok(blocks) => run_document(&name, &blocks, &mut report),
            Err(wrong) => report.failed(&format!("{name}:{wrong}")),
        }
    }
    println!("examples: {} commands run, {} blocks skipped", report.commands, report.skipped);
    assert!(report.failures.is_empty(), "\n{}", report.failures);
}

#[derive(Default)]
struct Report {
    commands: usize,
    skipped: usize,
    failures: String,
}

impl Report {
    fn failed(&mut self, what: &str) {
        let _ = writeln!(self.failures, "{what}\n");
    }
}

fn run_document(name: &str, blocks: &[Block], report: &mut Report) {
    let mut ground: Option<Ground> = None;
    let mut skipping = false;
    for block in blocks {
        if block.needs.contains(&Need::Fresh) {
            leave(name, ground.take(), report);
            skipping = false;
        }
        let obstacle = block.needs.iter().find_map(Need::obstacle);
        if let Some(reason) = &obstacle {
            ploop_testing::skip(ploop_testing::Need::Other, format!("{name}:{}: {reason}", block.line));
        }
        // What only shows something is nothing that others build on.
        let shown_only = block.needs.iter().any(|need| matches!(need, Need::NotRun(_)));
        skipping |= obstacle.is_some() && !shown_only;
        if skipping || shown_only {
            report.skipped += 1;
            continue;
        }
        let ground = ground.get_or_insert_with(Ground::new);
        for step in &block.steps {
            report.commands += 1;
            let ran = ground.run(&step.command);
            let text = ran.text.replace(&*ground.folder().to_string_lossy(), "[FOLDER]");
            let same = pattern::matches(&step.expected, &text);
            if !same || ran.code != step.code {
                report.failed(&format!(
                    "{name}:{}: $ {}\nexit code {} (expected {})\n--- expected\n{}\n--- printed\n{text}",
                    step.line,
                    step.command,
                    ran.code,
                    step.code,
                    step.expected.join("\n"),
                ));
                // What follows would only fail as well.
                skipping = true;
                break;
            }
        }
    }
    leave(name, ground, report);
}

fn leave(name: &str, ground: Option<Ground>, report: &mut Report) {
    let Some(ground) = ground else { return };
    let left = ground.clear();
    if !left.is_empty() {
        report.failed(&format!("{name}: its examples leave this mounted: {}", left.join(", ")));
    }
}
