//! Servers and keepers that die.

use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use ploop_core::ops;

use crate::ground::{Direct, Ground, can_take_over, program, signal, text};
use crate::guests::Blocks;

const KIB: u64 = 1 << 10;

/// A ground on which a successor can take over.
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

#[test]
fn acknowledged_writes_survive_the_death_of_the_server() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    // Durable, to be overwritten, and to be discarded.
    for number in 0..32 {
        direct.write(number * 64 * KIB, 64 << 10, 1).unwrap();
    }
    direct.sync().unwrap();
    // Acknowledged, in no table on disk: new clusters, parts of clusters, cleared ones.
    for number in 32..96 {
        direct.write(number * 64 * KIB, 64 << 10, 2).unwrap();
    }
    direct.write(200 * 64 * KIB + 4096, 4096, 2).unwrap();
    direct.write(0, 4096, 2).unwrap();
    program("blkdiscard", &["-o", "524288", "-l", "524288", text(&device)]);
    direct.write(8 * 64 * KIB, 64 << 10, 3).unwrap();
    assert_ne!(ground.status()["pending_entries"], 0, "the test does not test");
    let expect = |direct: &Direct| {
        direct.expect(0, 4096, 2);
        direct.expect(4096, 60 << 10, 1);
        for number in 1..8 {
            direct.expect(number * 64 * KIB, 64 << 10, 1);
        }
        direct.expect(8 * 64 * KIB, 64 << 10, 3);
        assert!(direct.read(9 * 64 * KIB, 7 * (64 << 10)).unwrap().iter().all(|&byte| byte == 0));
        for number in 16..32 {
            direct.expect(number * 64 * KIB, 64 << 10, 1);
        }
        for number in 32..96 {
            direct.expect(number * 64 * KIB, 64 << 10, 2);
        }
        direct.expect(200 * 64 * KIB + 4096, 4096, 2);
        assert!(direct.read(200 * 64 * KIB, 4096).unwrap().iter().all(|&byte| byte == 0));
    };
    for death in 1..=3 {
        ground.kill_server_and_wait();
        assert_eq!(ground.state().takeovers, death);
        assert_ne!(ground.status()["pending_entries"], 0);
        expect(&direct);
    }
    // A successor goes on with the same log.
    direct.write(300 * 64 * KIB, 64 << 10, 4).unwrap();
    ground.kill_server_and_wait();
    direct.expect(300 * 64 * KIB, 64 << 10, 4);
    direct.sync().unwrap();
    assert_eq!(ground.status()["pending_entries"], 0);
    drop(direct);
    ground.ends_with(0, &["umount", text(&image)]);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    expect(&direct);
    direct.expect(300 * 64 * KIB, 64 << 10, 4);
}

#[test]
fn a_device_under_load_does_not_notice_that_servers_die() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let blocks = Blocks::new(6, 400);
    blocks.written_beside(&device, |guest| {
        for _ in 0..4 {
            guest.goes_on(&ground, 700);
            ground.kill_server_and_wait();
        }
    });
    assert_eq!(ground.state().takeovers, 4);
    ground.ends_with(0, &["umount", text(&image)]);
    blocks.expect(&ground.mount(&["-n", "-r", text(&image)]));
}

/// Changes a word of the memory that the keeper holds, as a dying server could have.
fn set_survivor_word(keeper: u32, offset: u64) {
    for item in std::fs::read_dir(format!("/proc/{keeper}/fd")).unwrap() {
        let path = item.unwrap().path();
        if std::fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains("ploop-survivor")) {
            let memory = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            memory.write_all_at(&1u64.to_ne_bytes(), offset).unwrap();
            return;
        }
    }
    panic!("the keeper holds no survivor memory");
}

#[test]
fn nobody_succeeds_a_server_whose_sync_had_failed() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    direct.write(0, 4096, 1).unwrap();
    let state = ground.state();
    set_survivor_word(state.keeper.unwrap().id, 24);
    signal(state.server.unwrap().id, Signal::SIGKILL);
    // Neither hangs nor lies.
    assert!(direct.write(4096, 4096, 1).is_err());
    assert!(direct.sync().is_err());
    assert!(direct.read(0, 4096).is_err());
    drop(direct);
    ground.wait_until("the keeper has ended", || !ground.state().is_running());
    let listed = ground.ends_with(0, &["list"]);
    assert!(listed.contains("failed") && listed.contains("sync"), "{listed}");
    // The device goes, and the reason is told once more, by the exit code too.
    ground.ends_with(16, &["umount", text(&image)]);
    assert!(ground.runtime().states().unwrap().is_empty());
    // What was not durable is gone; the image is sound and opens.
    ground.mount(&["-n", text(&image)]);
}

#[test]
fn pending_entries_that_are_not_all_known_end_the_device() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    direct.write(0, 4096, 1).unwrap();
    let state = ground.state();
    set_survivor_word(state.keeper.unwrap().id, 32);
    signal(state.server.unwrap().id, Signal::SIGKILL);
    assert!(direct.sync().is_err());
    drop(direct);
    ground.wait_until("the keeper has ended", || !ground.state().is_running());
    ground.ends_with(2, &["umount", text(&image)]);
}

#[test]
fn a_server_that_dies_too_often_is_given_up_with_everything_saved() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    // Five in a minute are allowed; on a slow machine some are older than that when the next one dies.
    let mut deaths = 0;
    while ground.state().is_running() {
        assert!(deaths < 100, "no end: {}", ground.logs());
        direct.write(deaths * 64 * KIB, 64 << 10, deaths).unwrap();
        assert_ne!(ground.status()["pending_entries"], 0);
        let before = ground.state();
        signal(before.server.unwrap().id, Signal::SIGKILL);
        ground.wait_until("a successor serves, or nobody any more", || {
            let state = ground.state();
            !state.is_running() || (state.server != before.server && ground.is_ready())
        });
        deaths += 1;
    }
    assert!(deaths > 5, "given up after {deaths} deaths");
    assert!(direct.sync().is_err());
    drop(direct);
    let told = ground.ends_with(2, &["umount", text(&image)]);
    assert!(told.contains("every acknowledged write is in the image"), "{told}");
    let info = ops::info(&ops::InfoOptions::new(&image)).unwrap();
    let info = serde_json::to_string(&info).unwrap();
    assert!(!info.contains("not closed"), "{info}");
    let device = ground.mount(&["-n", "-r", text(&image)]);
    let reader = std::fs::File::open(&device).unwrap();
    for write in 0..deaths {
        let mut found = vec![0; 64 << 10];
        reader.read_exact_at(&mut found, write * 64 * KIB).unwrap();
        crate::ground::expect_stamped(&found, write * 64 * KIB, write);
    }
}

#[test]
fn a_server_outlives_its_keeper() {
    let Some(ground) = ground() else { return };
    let image = ground.create("disk", 64, 64);
    let device = ground.mount(&["-n", text(&image)]);
    let direct = Direct::open(&device);
    direct.write(0, 4096, 1).unwrap();
    let keeper = ground.state().keeper.unwrap();
    signal(keeper.id, Signal::SIGKILL);
    ground.wait_until("the keeper is gone", || !keeper.is_running());
    direct.write(4096, 4096, 1).unwrap();
    direct.expect(0, 4096, 1);
    drop(direct);
    ground.ends_with(0, &["umount", text(&image)]);
    let device = ground.mount(&["-n", text(&image)]);
    Direct::open(&device).expect(4096, 4096, 1);
    // Both at once: nothing hangs, and what is left is cleared.
    let state = ground.state();
    // So that it starts no other keeper.
    signal(state.server.unwrap().id, Signal::SIGSTOP);
    signal(state.keeper.unwrap().id, Signal::SIGKILL);
    signal(state.server.unwrap().id, Signal::SIGKILL);
    assert!(Direct::open(&device).read(0, 4096).is_err());
    ground.wait_until("both are gone", || !ground.state().is_running());
    ground.run(&["umount", text(&image)]);
    assert!(ground.runtime().states().unwrap().is_empty());
    let device = ground.mount(&["-n", text(&image)]);
    Direct::open(&device).expect(4096, 4096, 1);
}

#[test]
fn a_disk_that_cannot_be_opened_leaves_nothing_behind() {
    let Some(ground) = Ground::new() else { return };
    let image = ground.create("disk", 64, 64);
    let mut bytes = std::fs::read(&image).unwrap();
    // A cluster size that no image has.
    bytes[28..32].copy_from_slice(&7u32.to_le_bytes());
    std::fs::write(&image, bytes).unwrap();
    let told = ground.ends_with(11, &["mount", text(&image)]);
    assert!(told.contains("disk.hds"), "{told}");
    assert!(ground.runtime().states().unwrap().is_empty());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(text(&ground.path("run"))), "{mounts}");
}
