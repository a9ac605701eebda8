//! What a successor serves when the names of the files have changed meanwhile: the same files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::ground::{Direct, Ground, can_take_over, program, text};

const KIB: u64 = 1 << 10;
const CLUSTER: usize = 64 << 10;
/// The exit code of a refusal to unmount.
const STAYS: i32 = 46;

/// A disk that is served and has pending entries.
struct Case {
    ground: Ground,
    device: PathBuf,
    direct: Direct,
    image: PathBuf,
}

impl Case {
    fn new() -> Option<Self> {
        Self::at(|ground| ground.create("disk", 64, 64))
    }

    fn at(make: impl FnOnce(&Ground) -> PathBuf) -> Option<Self> {
        if !can_take_over() {
            ploop_testing::skip(
                ploop_testing::Need::Kernel(6, 9),
                "this kernel cannot repeat requests to a successor",
            );
            return None;
        }
        let ground = Ground::new()?;
        let image = make(&ground);
        let device = ground.mount(&["-n", text(&image)]);
        let direct = Direct::open(&device);
        for number in 0..16 {
            direct.write(number * 64 * KIB, CLUSTER, 1).unwrap();
        }
        direct.sync().unwrap();
        Some(Self { ground, device, direct, image })
    }

    fn folder(&self) -> &Path {
        self.image.parent().unwrap()
    }

    /// Acknowledged, in no table on disk.
    fn write_pending(&self, round: u64) {
        for number in 16..32 {
            self.direct.write(number * 64 * KIB, CLUSTER, round).unwrap();
        }
    }

    fn expect(&self, direct: &Direct, round: u64) {
        for number in 0..16 {
            direct.expect(number * 64 * KIB, CLUSTER, 1);
        }
        for number in 16..32 {
            direct.expect(number * 64 * KIB, CLUSTER, round);
        }
    }

    /// Two deaths, with writes before, between and after.
    fn dies_twice(&self) {
        self.ground.kill_server_and_wait();
        self.expect(&self.direct, 2);
        self.write_pending(3);
        self.direct.write(200 * 64 * KIB, CLUSTER, 3).unwrap();
        self.ground.kill_server_and_wait();
        self.expect(&self.direct, 3);
        self.direct.expect(200 * 64 * KIB, CLUSTER, 3);
        self.direct.sync().unwrap();
    }

    /// The end, and what is there afterwards under `image`.
    fn ends_whole_at(self, image: &Path) {
        let Self { ground, device, direct, image: old } = self;
        drop(direct);
        ground.ends_with(0, &["umount", text(&device)]);
        let device = ground.mount(&["-n", text(image)]);
        let direct = Direct::open(&device);
        let case = Self { ground, device, direct, image: old };
        case.expect(&case.direct, 3);
        case.direct.expect(200 * 64 * KIB, CLUSTER, 3);
    }
}

#[test]
fn another_file_in_the_place_of_the_image_is_never_served() {
    let Some(case) = Case::new() else { return };
    let other = case.folder().join("restored");
    fs::copy(&case.image, &other).unwrap();
    case.write_pending(2);
    fs::rename(&other, &case.image).unwrap();
    let foreign = fs::read(&case.image).unwrap();
    case.dies_twice();
    assert!(fs::read(&case.image).unwrap() == foreign, "the other file was written to");
    assert!(case.ground.logs().contains("names other files"), "{}", case.ground.logs());
    // Nothing that goes by names touches the other file either.
    let told = case.ground.ends_with(17, &["snapshot", "--crash-consistent", text(case.folder())]);
    assert!(told.contains("other images"), "{told}");
    assert!(fs::read(&case.image).unwrap() == foreign);
    // What has no name is not thrown away by an unmount.
    let listed = case.ground.ends_with(0, &["list"]);
    assert!(listed.contains("removed, or another file"), "{listed}");
    let told = case.ground.ends_with(STAYS, &["umount", text(&case.device)]);
    assert!(told.contains("--discard"), "{told}");
    case.expect(&case.direct, 3);
    let Case { ground, device, direct, image } = case;
    drop(direct);
    ground.ends_with(0, &["umount", "--discard", text(&device)]);
    assert!(fs::read(&image).unwrap() == foreign);
}

#[test]
fn a_removed_image_is_served_as_long_as_it_is_mounted() {
    let Some(case) = Case::new() else { return };
    case.write_pending(2);
    fs::remove_file(&case.image).unwrap();
    case.dies_twice();
    case.ground.ends_with(STAYS, &["umount", text(&case.device)]);
    let Case { ground, device, direct, .. } = case;
    drop(direct);
    ground.ends_with(0, &["umount", "--discard", text(&device)]);
}

#[test]
fn a_folder_that_was_renamed_is_followed() {
    let Some(case) = Case::new() else { return };
    case.write_pending(2);
    let moved = case.ground.path("moved");
    fs::rename(case.folder(), &moved).unwrap();
    case.dies_twice();
    let listed = case.ground.ends_with(0, &["list"]);
    assert!(listed.contains(text(&moved)), "{listed}");
    // Commands on the snapshots find it, too.
    case.ground.ends_with(0, &["snapshot", "--crash-consistent", text(&moved)]);
    case.ground.kill_server_and_wait();
    case.ends_whole_at(&moved);
}

#[test]
fn another_disk_in_the_place_of_the_folder_is_left_alone() {
    let Some(case) = Case::new() else { return };
    case.write_pending(2);
    let moved = case.ground.path("moved");
    fs::rename(case.folder(), &moved).unwrap();
    let foreign = case.ground.create("disk", 64, 64);
    let before = fs::read(&foreign).unwrap();
    // It is not the one that is served, though it has its path.
    let status = case.ground.ends_with(0, &["snapshot-list", text(foreign.parent().unwrap())]);
    println!("{status}");
    case.dies_twice();
    case.ground.ends_with(0, &["snapshot", "--crash-consistent", text(&case.device)]);
    case.ground.kill_server_and_wait();
    assert!(fs::read(&foreign).unwrap() == before);
    assert_eq!(
        fs::read_dir(foreign.parent().unwrap())
            .unwrap()
            .filter(|item| { item.as_ref().unwrap().file_name().to_string_lossy().starts_with("disk.hds.") })
            .count(),
        0,
        "the snapshot went to the other disk"
    );
    case.ends_whole_at(&moved);
}

#[test]
fn a_second_name_of_the_image_does_not_matter() {
    let Some(case) = Case::new() else { return };
    case.write_pending(2);
    let copy = case.ground.path("backup");
    program("cp", &["-al", text(case.folder()), text(&copy)]);
    case.dies_twice();
    let image = case.image.clone();
    // The names of a link are no copy, and would keep the disk from being mounted.
    fs::remove_dir_all(&copy).unwrap();
    case.ends_whole_at(&image);
}

#[test]
fn a_mount_on_top_of_the_folder_does_not_matter() {
    let Some(case) = Case::new() else { return };
    case.write_pending(2);
    let folder = case.folder().to_path_buf();
    program("mount", &["-t", "tmpfs", "none", text(&folder)]);
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let above = Mounted(folder);
    case.dies_twice();
    drop(above);
    let image = case.image.clone();
    case.ends_whole_at(&image);
}

#[test]
fn a_bind_mount_that_is_gone_does_not_matter() {
    let mut real = PathBuf::new();
    let made = Case::at(|ground| {
        real = ground.create("disk", 64, 64);
        let bound = ground.make_folder("bound");
        program("mount", &["--bind", text(real.parent().unwrap()), text(&bound)]);
        bound.join("disk.hds")
    });
    let Some(case) = made else { return };
    case.write_pending(2);
    program("umount", &["-l", text(case.folder())]);
    case.dies_twice();
    case.ends_whole_at(&real);
}

#[test]
fn an_older_descriptor_does_not_matter_to_what_is_served() {
    let Some(case) = Case::new() else { return };
    let descriptor = case.folder().join("DiskDescriptor.xml");
    let older = fs::read(&descriptor).unwrap();
    case.ground.ends_with(0, &["snapshot", "--crash-consistent", text(&descriptor)]);
    let right = fs::read(&descriptor).unwrap();
    case.write_pending(2);
    fs::write(&descriptor, older).unwrap();
    case.dies_twice();
    let listed = case.ground.ends_with(0, &["list"]);
    assert!(listed.contains("does not name the images"), "{listed}");
    let away = case.ground.path("away.xml");
    fs::rename(&descriptor, &away).unwrap();
    case.ground.kill_server_and_wait();
    case.expect(&case.direct, 3);
    fs::write(&descriptor, right).unwrap();
    let folder = case.folder().to_path_buf();
    case.ends_whole_at(&folder);
}

#[test]
fn a_new_file_below_a_running_disk_does_not_matter() {
    let Some(case) = Case::new() else { return };
    case.ground.ends_with(0, &["snapshot", "--crash-consistent", text(case.folder())]);
    case.write_pending(2);
    // An update of the template: another file of the same name.
    let other = case.ground.create("other", 64, 64);
    let kept = case.ground.path("kept.hds");
    fs::hard_link(&case.image, &kept).unwrap();
    fs::rename(&other, &case.image).unwrap();
    let foreign = fs::read(&case.image).unwrap();
    case.dies_twice();
    assert!(fs::read(&case.image).unwrap() == foreign);
    fs::rename(&kept, &case.image).unwrap();
    let folder = case.folder().to_path_buf();
    case.ends_whole_at(&folder);
}
