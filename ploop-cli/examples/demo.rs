//! The main job, shown to a person in under a minute: a mounted disk with a real tree on it moves through a pipe
//! while a writer writes to it, and what arrives is checked in every way there is.
//!
//! Run it as root with `make demo`, or `cargo run --release --example demo` after building the command. The work
//! folder is made under `PLOOP_DEMO_DIR`, else under the folder for temporary files, and removed at the end.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared with the tests: a failure ends it"
)]

#[path = "../../ploop-core/tests/patience/mod.rs"]
mod patience;
#[path = "../../ploop-core/tests/referee/mod.rs"]
mod referee;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../tests/cli/stage.rs"]
mod stage;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../tests/cli/witness.rs"]
mod witness;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use stage::{Mounted, Stage, same_bytes};
use witness::{Witness, compare, copy_tree, manifest};

/// Size of the disk.
const DISK: &str = "1G";
/// About this much of a real tree is put on it.
const TREE_BYTES: u64 = 240 << 20;
/// Where the tree comes from.
const TREES: [&str; 2] = ["/usr/share", "/usr/lib"];
/// Blocks of the writer's file.
const BLOCKS: u64 = 2048;
/// Names that are no part of the tree.
const NOT_TREE: [&str; 2] = ["witness", "lost+found"];

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let begin = Instant::now();
    match demonstrate() {
        Ok(()) => {
            println!(
                "\nAll checks passed, in {:.1} s. Nothing is left behind.",
                begin.elapsed().as_secs_f64()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\ndemo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

/// A program of the system must succeed.
fn must(program: &str, arguments: &[&str]) -> Result<()> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("run {program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{program} {}: {}\n{out}{err}", arguments.join(" "), output.status).into())
}

/// The command, built beside this program.
fn ploop() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).ok_or("this program lies in no folder")?;
    let path = folder.join("ploop");
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("{} is missing: build the command first", path.display()).into())
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of the demo are text")
}

fn tree_of(point: &Path) -> Result<std::collections::BTreeMap<PathBuf, witness::Entry>> {
    Ok(manifest(point, &NOT_TREE.map(Path::new))?)
}

fn demonstrate() -> Result<()> {
    if let Some(obstacle) = Stage::obstacle() {
        return Err(obstacle.into());
    }
    let root = std::env::var_os("PLOOP_DEMO_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    fs::create_dir_all(&root)?;
    let folder = tempfile::Builder::new().prefix("ploop-demo-").tempdir_in(root)?;
    let stage = Stage::new(&ploop()?, folder.into())?;

    say("1. A disk of 1 GiB in one image file, ext4 inside, mounted:");
    let image = stage.init("source", &["-s", DISK, "-t", "ext4", "-n"]);
    let source = stage.mount(&image, &[]);
    say(format!("     {}  ->  {}  ->  {}", image.display(), source.device.display(), source.point.display()));
    let (mut bytes, mut things) = (0, 0);
    for tree in TREES.map(Path::new) {
        let target = source.point.join(tree.file_name().unwrap_or_default());
        let copied = copy_tree(tree, &target, TREE_BYTES / TREES.len() as u64)?;
        (bytes, things) = (bytes + copied.0, things + copied.1);
    }
    must("sync", &["-f", text(&source.point)])?;
    say(format!("     filled with {things} files and links of /usr, {} MiB", bytes >> 20));

    say("\n2. A writer rewrites blocks that carry number, generation and checksum, one fsync after each:");
    let tree = tree_of(&source.point)?;
    let witness = Witness::start(&source.point.join("witness"), BLOCKS, Duration::ZERO)?;
    std::thread::sleep(Duration::from_millis(300));
    say(format!("     {} generations so far", witness.issued()));

    move_it(&stage, &source, &witness, &tree)?;
    exactly(&stage, &source)?;
    if !witness.is_alive() {
        return Err("the writer on the source stands still".into());
    }
    witness.stop()?;
    stage.umount(&source);
    Ok(())
}

/// The copy under load, its figures, and the checks of what arrived.
fn move_it(
    stage: &Stage,
    source: &Mounted,
    witness: &Witness,
    tree: &std::collections::BTreeMap<PathBuf, witness::Entry>,
) -> Result<()> {
    fs::create_dir(stage.path("target"))?;
    let target = stage.path("target").join("disk.hds");
    let hook = stage.hook("hook");
    say("\n3. It moves, while the writer writes, as two processes with a pipe between them:");
    say(format!(
        "     ploop copy -s {} -F COMMAND | ploop copy -d {}",
        source.point.display(),
        target.display()
    ));
    let (at_hook, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (sent, received) = std::thread::scope(|scope| {
        scope.spawn(|| {
            hook.answer(&stop, || at_hook.store(witness.synced(), Ordering::SeqCst));
        });
        let command = hook.command();
        let sender = ["copy", "--json", "-s", text(&source.point), "-F", &command];
        let ran = stage.copy(&sender, &["copy", "-d", text(&target)], show);
        stop.store(true, Ordering::SeqCst);
        ran
    });
    let (durable, issued) = (at_hook.load(Ordering::SeqCst), witness.issued());
    if (sent.code, received.code) != (0, 0) {
        return Err(format!(
            "sender: {}\n{}\nreceiver: {}\n{}",
            sent.code, sent.stderr, received.code, received.stderr
        )
        .into());
    }
    let history = witness.history();
    let alive = witness.is_alive();
    figures(&sent.events())?;
    say(format!(
        "     the writer's longest wait for one fsync: {:.1} ms",
        witness.stall_longest().as_secs_f64() * 1e3
    ));

    say("\n4. What arrived:");
    stage.ploop(&["info", text(&target)]).succeeded();
    let copy = stage.mount(&target, &["-r"]);
    compare(tree, &tree_of(&copy.point)?)?;
    say(format!("     tree equal: {} files, folders and links by content, mode and owner", tree.len()));
    let reached = history.verify(&copy.point.join("witness"), durable, issued)?;
    say(format!(
        "     writer's file exactly as after generation {reached}: not before {durable} (durable when the freeze \
         began), not after {issued}"
    ));
    must("umount", &[text(&copy.point)])?;
    must("e2fsck", &["-f", "-n", text(&copy.device)])?;
    say("     file system clean (e2fsck -f)");
    if !alive {
        return Err("the writer on the source stands still".into());
    }
    say("     the source runs on, its writer too");
    Ok(())
}

/// A second copy with the operator's own freeze, which outlasts it: the two disks are compared byte for byte.
fn exactly(stage: &Stage, source: &Mounted) -> Result<()> {
    say("\n5. Once more, frozen by the freeze command itself until both disks are compared byte for byte:");
    fs::create_dir(stage.path("exact"))?;
    let target = stage.path("exact").join("disk.hds");
    let freeze = format!("fsfreeze -f '{}'", source.point.display());
    let sender = ["copy", "-s", text(&source.point), "-F", &freeze];
    let (sent, received) = stage.copy(&sender, &["copy", "-d", text(&target)], |_| {});
    let compared = if (sent.code, received.code) == (0, 0) {
        let copy = stage.mount(&target, &["-r"]);
        same_bytes(&source.device, &copy.device)
    } else {
        Err(format!(
            "sender: {}\n{}\nreceiver: {}\n{}",
            sent.code, sent.stderr, received.code, received.stderr
        ))
    };
    must("fsfreeze", &["-u", text(&source.point)])?;
    say(format!("     equal, all {} MiB", compared? >> 20));
    Ok(())
}

/// One line per pass, as it ends.
fn show(line: &str) {
    let Ok(event) = serde_json::from_str::<Value>(line) else { return };
    if event["event"] == "pass_ended" {
        say(format!(
            "     pass {:>2} {:7} {:>9.2} MiB in {:>6.3} s, {:>7.2} MiB dirty after it",
            event["pass"],
            event["kind"].as_str().unwrap_or_default(),
            mib(&event["data_bytes"]),
            event["seconds"].as_f64().unwrap_or_default(),
            mib(&event["dirty_bytes"]),
        ));
    }
}

fn mib(bytes: &Value) -> f64 {
    bytes.as_f64().unwrap_or_default() / f64::from(1 << 20)
}

/// What the sender measured.
fn figures(events: &[Value]) -> Result<()> {
    let report =
        events.iter().rev().find(|event| event["event"] == "done").ok_or("the sender gave no figures")?;
    let downtime = &report["downtime"];
    let ms = |name: &str| downtime[name].as_f64().unwrap_or_default();
    let seconds = report["seconds"].as_f64().unwrap_or_default();
    say(format!(
        "     {:.1} MiB of data in {} passes and {seconds:.2} s: {:.0} MiB/s",
        mib(&report["data_bytes"]),
        report["passes"].as_array().map_or(0, Vec::len),
        mib(&report["data_bytes"]) / seconds.max(1e-3),
    ));
    say(format!(
        "     time frozen {:.1} ms: freeze command {:.1}, file system {:.1}, last pass {:.1} ({:.0} KiB), seal {:.1}",
        ms("total_ms"),
        ms("hook_ms"),
        ms("file_system_ms"),
        ms("last_pass_ms"),
        ms("bytes") / 1024.0,
        ms("seal_ms"),
    ));
    Ok(())
}
