//! Commands on the snapshots of a disk that is written to, killed at random moments, they or the server: the same command
//! again ends what was cut, nothing that was acknowledged is lost, and every snapshot holds what it held.
//!
//! `PLOOP_KILLS` says how many (default 20), `SEED` picks the moments as far as a machine repeats itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ploop_core::io::sim::Random;

use crate::ground::{Direct, Ground, can_take_over};

const BLOCK: usize = 16 << 10;
const BLOCKS: u64 = 160;
/// Kills in one life of a disk: one for each command.
const COMMANDS: u64 = 5;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn guid(number: u64) -> String {
    format!("{{00000000-0000-4000-8000-{number:012x}}}")
}

/// Where the `number`-th block that is written in each round lies.
fn place(number: u64) -> u64 {
    (number * 7 % BLOCKS) * BLOCK as u64
}

/// In which round each block was written, in the order in which they are; 0 for never.
fn rounds_of(device: &Direct) -> Vec<u64> {
    (0..BLOCKS)
        .map(|number| {
            let offset = place(number);
            let found = device.read(offset, BLOCK).expect("read");
            if found.iter().all(|&byte| byte == 0) {
                return 0;
            }
            let first = u64::from_le_bytes(found[..8].try_into().unwrap());
            let round = first.wrapping_sub(offset.rotate_left(20)) >> 1;
            crate::ground::expect_stamped(&found, offset, round);
            round
        })
        .collect()
}

/// One writer, one block after the other, round after round, checking what it wrote before.
struct Writer<'a> {
    direct: &'a Direct,
    stop: &'a AtomicBool,
    /// How many blocks were written in all.
    written: &'a AtomicU64,
}

impl Writer<'_> {
    fn run(&self, first_round: u64, start: &[u64]) {
        let mut rounds = start.to_vec();
        for round in first_round.. {
            for number in 0..BLOCKS {
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                let before = &mut rounds[usize::try_from(number).unwrap()];
                if *before > 0 {
                    self.direct.expect(place(number), BLOCK, *before);
                }
                self.direct.write(place(number), BLOCK, round).unwrap();
                *before = round;
                self.written.fetch_add(1, Ordering::SeqCst);
                if number % 40 == 0 {
                    self.direct.sync().unwrap();
                }
            }
        }
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A disk whose commands are killed.
struct Trial<'a> {
    ground: &'a Ground,
    folder: PathBuf,
    random: Random,
    /// How long each command takes that is not killed: moments are chosen within that.
    usual: BTreeMap<String, Duration>,
    kills: u64,
    ended_before: u64,
}

impl Trial<'_> {
    fn snapshots(&self) -> Vec<String> {
        let list = self.ground.ends_with(0, &["snapshot-list", "-H", "-o", "uuid", text(&self.folder)]);
        let top = ploop_core::format::Guid::TOP.to_string();
        list.lines().map(|line| line.trim().to_owned()).filter(|line| *line != top).collect()
    }

    /// What a snapshot holds, looked at as a backup does.
    fn content(&self, snapshot: &str) -> Vec<u64> {
        let line = ["mount", "-n", "-r", "-u", snapshot, "-c", "look", text(&self.folder)];
        let mut device = PathBuf::new();
        // The server of a command that was killed may be about to note what its images are now: in use until then.
        self.ground.wait_until("the snapshot can be mounted", || {
            let ran = self.ground.run(&line);
            let printed = String::from_utf8_lossy(&ran.stdout).into_owned();
            let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
            assert!(matches!(ran.status.code(), Some(0 | 17 | 37)), "{line:?}: {complaint}");
            device = PathBuf::from(printed.lines().next().unwrap_or_default());
            ran.status.success()
        });
        let rounds = rounds_of(&Direct::open_to_read(&device));
        self.ground.ends_with(0, &["umount", "-c", "look", text(&self.folder)]);
        rounds
    }

    /// Runs a command line and kills it, or the server, at some moment; then gives it again until `is_done` says so.
    fn kill_in(&mut self, line: &[&str], may_hit_server: bool, is_done: impl Fn(&Self) -> bool) {
        let usual = self.usual.get(line[0]).copied().unwrap_or(Duration::from_millis(60));
        let moment = usual.mul_f64(self.random.below(1000) as f64 / 1000.0);
        let hits_server = may_hit_server && can_take_over() && self.random.chance(30);
        let mut command = self.ground.command(line);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(moment);
        self.kills += 1;
        if hits_server {
            self.ground.kill_server_and_wait();
            child.wait().unwrap();
        } else {
            match child.try_wait().unwrap() {
                Some(_) => self.ended_before += 1,
                None => child.kill().unwrap(),
            }
            child.wait().unwrap();
        }
        println!("{line:?}: the {} killed after {moment:?}", if hits_server { "server" } else { "command" });
        self.ground.wait_until("the same command has ended what was cut", || {
            if is_done(self) {
                return true;
            }
            let begun = Instant::now();
            let again = self.ground.run(line);
            let complaint = String::from_utf8_lossy(&again.stderr).into_owned();
            match again.status.code() {
                Some(0) => {
                    self.usual.insert(line[0].to_owned(), begun.elapsed());
                    is_done(self)
                }
                // What the killed one held, or had begun, goes in a moment.
                Some(17 | 23 | 37) => false,
                _ => {
                    assert!(is_done(self), "{line:?} again: {complaint}{}", self.ground.logs());
                    true
                }
            }
        });
    }

    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(&self.folder).unwrap().map(|item| item.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("disk.hds")).collect()
    }

    /// What happens beside the writer.
    fn beside_the_writer(&mut self, number: u64, written: &AtomicU64, before: &[u64]) {
        let (first, second) = (guid(10 * number + 1), guid(10 * number + 2));
        let disk = self.folder.clone();
        let disk = text(&disk);
        let more = |so_far: u64| {
            self.ground.wait_until("more is written", || written.load(Ordering::SeqCst) >= so_far + 60);
        };
        more(0);
        self.kill_in(&["snapshot", "--crash-consistent", "-u", &first, disk], true, |trial| {
            trial.snapshots().contains(&first)
        });
        let kept = self.content(&first);
        is_one_moment(&kept, before);
        let so_far = written.load(Ordering::SeqCst);
        self.ground.wait_until("more is written", || written.load(Ordering::SeqCst) >= so_far + 60);
        self.ground.ends_with(0, &["snapshot", "--crash-consistent", "-u", &second, disk]);
        let kept_second = self.content(&second);
        is_one_moment(&kept_second, before);
        assert_eq!(self.content(&first), kept);

        let clone = self.ground.path(&format!("clone{number}"));
        let line = ["clone", "-u", &first, disk, text(&clone)];
        self.kill_in(&line, false, |_| clone.join("DiskDescriptor.xml").exists());
        let device = self.ground.mount(&["-n", text(&clone)]);
        let cloned = Direct::open(&device);
        assert_eq!(rounds_of(&cloned), kept, "the clone is not its snapshot");
        cloned.write(0, BLOCK, 1 << 40).unwrap();
        drop(cloned);
        self.ground.ends_with(0, &["umount", text(&clone)]);
        fs::remove_dir_all(&clone).unwrap();
        assert_eq!(self.content(&first), kept, "a clone changed its base");

        // The one into the other; which of the two names stays is the command's business.
        let line = ["snapshot-merge", "-u", &second, disk];
        self.kill_in(&line, true, |trial| trial.snapshots().len() == 1);
        let left = self.snapshots().remove(0);
        let expected = if left == first { &kept } else { &kept_second };
        assert_eq!(self.content(&left), *expected, "a merge changed what is left");

        self.kill_in(&["snapshot-delete", "-u", &left, disk], true, |trial| trial.snapshots().is_empty());
        // What the last of them had no time to tidy up, the next one does.
        self.ground.ends_with(0, &["snapshot", "--crash-consistent", "-u", &second, disk]);
    }

    /// Back to the one snapshot that is left; nobody may write meanwhile.
    fn switch(&mut self) {
        let snapshot = self.snapshots().remove(0);
        let kept = self.content(&snapshot);
        let done = std::cell::Cell::new(false);
        let disk = self.folder.clone();
        // Another run of a switch is a switch to the same.
        self.kill_in(&["snapshot-switch", "-u", &snapshot, text(&disk)], false, |_| done.replace(true));
        let device = self.ground.mount(&["-n", "-r", text(&disk)]);
        let found = rounds_of(&Direct::open_to_read(&device));
        self.ground.ends_with(0, &["umount", text(&disk)]);
        // Cut before it had begun, it has changed nothing.
        self.ground.ends_with(0, &["snapshot-switch", "-u", &snapshot, text(&disk)]);
        let device = self.ground.mount(&["-n", "-r", text(&disk)]);
        assert_eq!(rounds_of(&Direct::open_to_read(&device)), kept);
        self.ground.ends_with(0, &["umount", text(&disk)]);
        assert!(found.iter().zip(&kept).all(|(found, kept)| found >= kept), "neither before nor after");
        self.ground.ends_with(0, &["snapshot-delete", "-u", &snapshot, text(&disk)]);
        assert_eq!(self.files().len(), 1, "left over: {:?}", self.files());
    }
}

/// Of a writer that writes one block after the other there is one moment that a snapshot shows.
#[track_caller]
fn is_one_moment(found: &[u64], before: &[u64]) {
    let newest = found.iter().copied().max().unwrap();
    let until = found.iter().take_while(|&&round| round == newest).count();
    let previous = |number: usize| match newest - 1 {
        round if round > before.iter().copied().max().unwrap() => round,
        _ => before[number],
    };
    for (number, &round) in found.iter().enumerate().skip(until) {
        assert_eq!(round, previous(number), "block {number} of {found:?}");
    }
}

#[test]
fn commands_and_servers_that_are_killed_lose_nothing() {
    let Some(ground) = Ground::new() else { return };
    let number = |name: &str, usual: u64| std::env::var(name).map_or(usual, |text| text.parse().unwrap());
    let (seed, kills) = (number("SEED", 1), number("PLOOP_KILLS", 20));
    let image = ground.create("disk", 16, 64);
    let mut trial = Trial {
        ground: &ground,
        folder: image.parent().unwrap().to_path_buf(),
        random: Random::new(seed),
        usual: BTreeMap::new(),
        kills: 0,
        ended_before: 0,
    };
    let mut before = vec![0; usize::try_from(BLOCKS).unwrap()];
    for life in 0..kills.div_ceil(COMMANDS) {
        let device = ground.mount(&["-n", text(&trial.folder)]);
        let direct = Direct::open(&device);
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        let first_round = before.iter().copied().max().unwrap() + 1;
        assert_eq!(rounds_of(&direct), before, "what was there when the disk was closed");
        std::thread::scope(|scope| {
            let _ending = StopOnDrop(&stop);
            let writer = Writer { direct: &direct, stop: &stop, written: &written };
            let start = &before;
            scope.spawn(move || writer.run(first_round, start));
            trial.beside_the_writer(life, &written, start);
        });
        let now = rounds_of(&direct);
        is_one_moment(&now, &before);
        drop(direct);
        ground.ends_with(0, &["umount", text(&trial.folder)]);
        trial.switch();
        let device = ground.mount(&["-n", "-r", text(&trial.folder)]);
        before = rounds_of(&Direct::open_to_read(&device));
        ground.ends_with(0, &["umount", text(&trial.folder)]);
    }
    println!(
        "SEED={seed}: {} kills, {} of them of commands that had just ended",
        trial.kills, trial.ended_before
    );
}
