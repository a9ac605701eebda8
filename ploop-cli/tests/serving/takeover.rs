//! What may not end a take-over, and what is said when there can be none.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use ploop_core::device::runtime::State;
use ploop_core::io::Access;
use ploop_core::io::sim::Random;
use ploop_core::ops;

use crate::ground::{Direct, Ground, can_take_over, program, signal, text};

const KIB: u64 = 1 << 10;
const CLUSTER: usize = 64 << 10;
/// Moments of kills, as far as a machine repeats itself.
const SEED: u64 = 22;

fn ground() -> Option<Ground> {
    if !can_take_over() {
        ploop_testing::skip(
            ploop_testing::Need::Kernel(6, 9),
            "this kernel cannot repeat requests to a successor",
        );
        return None;
    }
    Ground::new()
}

fn write(direct: &Direct, round: u64) {
    for number in 0..16 {
        direct.write(number * 64 * KIB, CLUSTER, round).unwrap();
    }
}

fn expect(direct: &Direct, round: u64) {
    for number in 0..16 {
        direct.expect(number * 64 * KIB, CLUSTER, round);
    }
}

/// The child of a keeper: the server that runs now, whatever the record says.
fn child_of(keeper: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn kill_server(state: &State) -> u32 {
    let server = child_of(state.keeper.unwrap().id).expect("the keeper has a child");
    signal(server, Signal::SIGKILL);
    server
}

struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_run_time_folder_ends_nothing() {
    let Some(ground) = ground() else { return };
    let run = ground.make_folder("run");
    program("mount", &["-t", "tmpfs", "-o", "size=256k,mode=700", "none", text(&run)]);
    let mounted = Tmpfs(run.clone());
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    write(&direct, 1);
    let state = ground.state();
    let filler = run.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[1; 512]).is_ok() {}
    for round in 2..5 {
        kill_server(&state);
        expect(&direct, round - 1);
        write(&direct, round);
    }
    assert_eq!(ground.state().takeovers, 0, "the run-time folder was not full");
    drop((direct, file));
    // The record is old; what is said is true all the same.
    ground.ends_with(0, &["umount", text(&device)]);
    fs::remove_file(&filler).unwrap();
    let device = ground.mount(&["-n", text(&image)]);
    expect(&Direct::open(&device), 4);
    ground.ends_with(0, &["umount", text(&device)]);
    drop(mounted);
}

#[test]
fn a_disk_that_is_given_up_beside_a_full_run_time_folder_is_saved() {
    let Some(ground) = ground() else { return };
    let run = ground.make_folder("run");
    program("mount", &["-t", "tmpfs", "-o", "size=256k,mode=700", "none", text(&run)]);
    let mounted = Tmpfs(run.clone());
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    let state = ground.state();
    let filler = run.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[1; 512]).is_ok() {}
    let mut last = 0;
    for round in 1..100 {
        // The last one is not answered: the device has been given up.
        if direct.write(0, CLUSTER, round).is_err() || !state.keeper.unwrap().is_running() {
            break;
        }
        last = round;
        let Some(server) = child_of(state.keeper.unwrap().id) else { break };
        signal(server, Signal::SIGKILL);
    }
    assert!(last > 5, "given up after {last}");
    drop(direct);
    ground.wait_until("the keeper has ended", || !state.keeper.unwrap().is_running());
    // Nothing could be recorded. The image is closed with everything in it, which is what success means.
    ground.ends_with(0, &["umount", text(&device)]);
    drop(file);
    fs::remove_file(&filler).unwrap();
    let device = ground.mount(&["-n", text(&image)]);
    Direct::open(&device).expect(0, CLUSTER, last);
    ground.ends_with(0, &["umount", text(&device)]);
    drop(mounted);
}

#[test]
fn a_run_time_folder_that_takes_no_socket_ends_nothing() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    write(&direct, 1);
    let (state, run) = (ground.state(), ground.path("run"));
    program("mount", &["--rbind", text(&run), text(&run)]);
    let above = Tmpfs(run.clone());
    program("mount", &["-o", "remount,bind,ro", text(&run)]);
    for round in 2..4 {
        kill_server(&state);
        expect(&direct, round - 1);
        write(&direct, round);
    }
    assert!(!ground.is_ready(), "the run-time folder took a socket");
    drop(above);
    // It can be asked again as soon as there can be a socket.
    ground.wait_until("the server listens", || ground.is_ready());
    expect(&direct, 3);
    drop(direct);
    ground.ends_with(0, &["umount", text(&device)]);
    let device = ground.mount(&["-n", text(&image)]);
    expect(&Direct::open(&device), 3);
}

#[test]
fn a_stopped_command_that_holds_the_locks_holds_up_no_takeover() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    write(&direct, 1);
    let state = ground.state();
    let lock = |path: PathBuf| {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        Flock::lock(file.unwrap(), FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).unwrap()
    };
    let entry = ground.runtime().entry(&state.id);
    let held = [lock(ground.path("run/.lock")), lock(entry.path().join(".lock"))];
    let begun = Instant::now();
    kill_server(&state);
    expect(&direct, 1);
    let paused = begun.elapsed();
    println!("the guest paused for {paused:?}");
    assert!(paused.as_secs() < 9, "the lock was waited for: {paused:?}");
    drop(held);
    // The record comes when it can.
    ground.wait_until("the record is written", || ground.state().takeovers == 1);
}

#[test]
fn keeper_and_server_hold_nothing_of_who_mounts() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let (lock, program) = (ground.path("script.lock"), env!("CARGO_BIN_EXE_ploop"));
    let script = r#"exec 9>"$1" 8<"$1"; flock 9 || exit 3; "$2" mount -n "$3""#;
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh", text(&lock), program, text(&image)])
        .env("PLOOP_RUN_DIR", ground.path("run"))
        .env("PLOOP_ALLOW_RECLAIM_STALL", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let file = File::open(&lock).unwrap();
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).expect("nobody holds it");
    let state = ground.state();
    for process in [state.keeper, state.server] {
        let folder = format!("/proc/{}/fd", process.unwrap().id);
        for item in fs::read_dir(folder).unwrap() {
            let target = fs::read_link(item.unwrap().path()).unwrap_or_default();
            assert_ne!(target, lock);
        }
    }
    let short = |id: u32| fs::read_to_string(format!("/proc/{id}/comm")).unwrap();
    assert_eq!(short(state.keeper.unwrap().id), "ploop-keeper\n");
    assert_eq!(short(state.server.unwrap().id), "ploop-server\n");
    let named = |id: u32| fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap();
    let disk = text(image.parent().unwrap());
    assert!(named(state.keeper.unwrap().id).starts_with(&format!("ploop-keeper: {disk}")));
    assert!(named(state.server.unwrap().id).starts_with(&format!("ploop-server: {disk}")));
}

#[test]
fn a_server_that_lost_its_keeper_gets_another_one() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    for round in 1..4 {
        write(&direct, round);
        let before = ground.state();
        signal(before.keeper.unwrap().id, Signal::SIGKILL);
        ground.wait_until("another keeper is there", || {
            let keeper = ground.state().keeper;
            keeper != before.keeper && keeper.unwrap().is_running()
        });
        // Acknowledged under the new keeper, in no table on disk.
        direct.write(100 * 64 * KIB, CLUSTER, round).unwrap();
        let before = ground.state();
        signal(before.server.unwrap().id, Signal::SIGKILL);
        ground.wait_for_successor(&before);
        expect(&direct, round);
        direct.expect(100 * 64 * KIB, CLUSTER, round);
    }
    let listed = ground.ends_with(0, &["list"]);
    assert!(!listed.contains("unguarded"), "{listed}");
    drop(direct);
    ground.ends_with(0, &["umount", text(&image)]);
    let device = ground.mount(&["-n", text(&image)]);
    expect(&Direct::open(&device), 3);
}

#[test]
fn a_new_keeper_removes_the_mount_at_the_end_of_its_server() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    let before = ground.state();
    signal(before.keeper.unwrap().id, Signal::SIGKILL);
    write(&direct, 1);
    drop(direct);
    ground.wait_until("another keeper is there", || ground.state().keeper != before.keeper);
    ground.ends_with(0, &["umount", text(&image)]);
    assert!(ground.runtime().states().unwrap().is_empty());
    let device = ground.mount(&["-n", text(&image)]);
    expect(&Direct::open(&device), 1);
}

#[test]
fn an_unmount_after_both_have_died_is_no_success() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    write(&direct, 1);
    let state = ground.state();
    // So that it starts no other keeper.
    signal(state.server.unwrap().id, Signal::SIGSTOP);
    signal(state.keeper.unwrap().id, Signal::SIGKILL);
    signal(state.server.unwrap().id, Signal::SIGKILL);
    drop(direct);
    ground.wait_until("both are gone", || !ground.state().is_running());
    let told = ground.ends_with(2, &["umount", text(&image)]);
    assert!(told.contains("written last is not in the image"), "{told}");
    assert!(ground.runtime().states().unwrap().is_empty());
}

#[test]
fn successors_that_die_while_they_take_over_are_succeeded() {
    let Some(ground) = ground() else { return };
    let mut random = Random::new(SEED);
    let image = ground.create("disk", 64, 64);
    for life in 1..4 {
        let device = ground.mount(&["-n", text(&image)]);
        let direct = Direct::open(&device);
        write(&direct, life);
        let keeper = ground.state().keeper.unwrap().id;
        let mut last = kill_server(&ground.state());
        // Three in a row would be given up.
        for _ in 0..2 {
            let mut next = None;
            ground.wait_until("a successor is started", || {
                next = child_of(keeper).filter(|&child| child != last);
                next.is_some()
            });
            last = next.unwrap();
            std::thread::sleep(Duration::from_millis(random.next_u64() % 60));
            signal(last, Signal::SIGKILL);
        }
        expect(&direct, life);
        direct.write(100 * 64 * KIB, CLUSTER, life).unwrap();
        drop(direct);
        ground.ends_with(0, &["umount", text(&device)]);
        let device = ground.mount(&["-n", text(&image)]);
        let direct = Direct::open(&device);
        expect(&direct, life);
        direct.expect(100 * 64 * KIB, CLUSTER, life);
        drop(direct);
        ground.ends_with(0, &["umount", text(&device)]);
    }
}

#[test]
fn an_unmount_whose_server_is_killed_loses_nothing_and_says_what_is_true() {
    let Some(ground) = ground() else { return };
    let mut random = Random::new(SEED);
    let image = ground.create("disk", 64, 64);
    for round in 1..9 {
        let device = ground.mount(&["-n", text(&image)]);
        let direct = Direct::open(&device);
        write(&direct, round);
        drop(direct);
        let keeper = ground.state().keeper.unwrap().id;
        let unmounting = ground.start(&["umount", text(&device)]);
        std::thread::sleep(Duration::from_millis(random.next_u64() % 120));
        // It may have ended already.
        if let Some(server) = child_of(keeper) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(server).unwrap()),
                Signal::SIGKILL,
            );
        }
        let ended = unmounting.wait();
        assert!(ended.success(), "{ended}: {}", ground.logs());
        assert!(ground.runtime().states().unwrap().is_empty());
        let device = ground.mount(&["-n", text(&image)]);
        expect(&Direct::open(&device), round);
        ground.ends_with(0, &["umount", text(&device)]);
    }
}

#[test]
fn an_image_that_somebody_else_has_had_meanwhile_is_served_by_nobody() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    write(&direct, 1);
    let state = ground.state();
    // A machine so busy that the keeper does not come to it.
    signal(state.keeper.unwrap().id, Signal::SIGSTOP);
    signal(state.server.unwrap().id, Signal::SIGKILL);
    ground.wait_until("the server is gone", || !state.server.unwrap().is_running());
    // As any program that knows the locks and nothing of this disk: it opens the image, repairs and closes it.
    let options = ops::open::OpenOptions::new(&image, Access::ReadWrite);
    let mut opened = None;
    ground.wait_until("the lock is free", || {
        opened = ops::open::open(&options).ok();
        opened.is_some()
    });
    opened.unwrap().chain.close().unwrap();
    signal(state.keeper.unwrap().id, Signal::SIGCONT);
    assert!(direct.write(0, CLUSTER, 2).is_err(), "pending entries were laid over a table that was changed");
    drop(direct);
    ground.wait_until("the keeper has ended", || !state.keeper.unwrap().is_running());
    let told = ground.ends_with(2, &["umount", text(&image)]);
    assert!(told.contains("another program has opened the image"), "{told}");
}

#[test]
fn a_server_that_hangs_is_said_to() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    ground.mount(&["-n", text(&image)]);
    let server = ground.state().server.unwrap().id;
    ground.wait_until("the server has beaten", || ground.is_ready());
    std::thread::sleep(Duration::from_millis(1500));
    signal(server, Signal::SIGSTOP);
    ground.wait_until("it is listed as hanging", || ground.ends_with(0, &["list"]).contains("[hanging"));
    assert!(ground.logs().contains("the server hangs"), "{}", ground.logs());
    // An unmount would wait for it without an end.
    let told = ground.ends_with(46, &["umount", text(&image)]);
    assert!(told.contains("kill -CONT"), "{told}");
    signal(server, Signal::SIGCONT);
    ground.wait_until("it runs again", || !ground.ends_with(0, &["list"]).contains("hanging"));
}

#[test]
fn successors_take_over_quickly_every_time() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    let state = ground.state();
    let mut pauses = Vec::new();
    for round in 1..5 {
        write(&direct, round);
        let begun = Instant::now();
        kill_server(&state);
        direct.expect(0, CLUSTER, round);
        pauses.push(begun.elapsed());
    }
    println!("paused for {pauses:?}");
    // A machine that is busy with other tests makes any of them slow, but hardly all.
    assert!(pauses.iter().min().unwrap().as_millis() < 1000, "{pauses:?}");
}
