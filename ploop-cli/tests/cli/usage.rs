//! Help texts, wrong command lines and their exit codes.

use std::process::Stdio;

use crate::support::{command, golden, ploop};

/// The commands that the summary shows.
fn commands(summary: &str) -> Vec<String> {
    let listed = summary.split("Commands:\n").nth(1).expect("a list of commands");
    let listed = listed.lines().take_while(|line| !line.is_empty());
    let names = listed.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn help_texts() {
    let summary = ploop(&["--help"]).succeeded();
    golden("ploop.txt", &summary);
    for name in commands(&summary) {
        golden(&format!("ploop-{name}.txt"), &ploop(&[&name, "--help"]).succeeded());
    }
}

#[test]
fn nothing_typed_prints_a_summary_on_stderr() {
    let ran = ploop(&[]);
    ran.failed_with(38, &["Usage: ploop", "init", "copy"]);
    assert!(ran.stdout.is_empty());
}

#[test]
fn wrong_command_lines_are_38_and_say_how_to_go_on() {
    for line in [
        &["frobnicate"][..],
        &["init"],
        &["init", "-s", "1.5G", "x"],
        &["init", "-s", "1G", "-t", "ntfs", "x"],
        &["init", "-s", "1G", "-v", "3", "x"],
        &["info", "--no-such-option"],
        &["copy"],
        &["copy", "-s", "a", "-F"],
        &["mount"],
        &["umount"],
        &["convert", "-f", "raw", "-v", "1"],
        &["convert", "-f", "qcow2"],
        &["export", "x"],
        &["import", "x"],
        &["import", "--format", "floppy", "x", "y"],
        &["restore-descriptor", "x"],
    ] {
        let ran = ploop(line);
        ran.failed_with(38, &["--help"]);
        assert!(ran.stdout.is_empty(), "{line:?} printed on stdout: {}", ran.stdout);
    }
}

#[test]
fn a_size_error_says_what_is_expected() {
    ploop(&["init", "-s", "10GBytes", "x"]).failed_with(38, &["10GBytes", "sectors", "K, M, G, T"]);
}

#[test]
fn hidden_commands_are_not_in_the_summary() {
    let text = ploop(&["--help"]).succeeded();
    for hidden in ["serve", "keeper", "freeze-helper", "fsck"] {
        assert!(!text.lines().any(|line| line.trim_start().starts_with(hidden)), "{hidden} is shown");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = command(&["--help"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
}

#[test]
fn manual_pages_and_completions() {
    let folder = crate::referee::folder();
    ploop(&["man", folder.path().to_str().unwrap()]).succeeded();
    let page = std::fs::read_to_string(folder.path().join("ploop-copy.8")).unwrap();
    assert!(page.contains(".TH"), "{page}");
    ploop(&["man", "/nonexistent/folder"]).failed_with(7, &["/nonexistent/folder", "cause: No such file"]);
    for shell in ["bash", "zsh", "fish"] {
        assert!(ploop(&["completions", shell]).succeeded().contains("umount"));
    }
}
