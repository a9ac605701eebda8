//! Clones of real files; crashes in simulated folders.

use super::*;
use crate::format::Mode;
use crate::io::StorageExt;
use crate::io::sim::{CrashLevel, CrashOptions, Fault, SimDisk};
use crate::ops::open::{OpenOptions, open};
use crate::ops::progress::Silent;
use crate::ops::snapshot::{SnapshotOptions, snapshot};
use crate::ops::testing::{guid, read, three};
use crate::ops::{create, merge};
use crate::units::Sectors;

fn base(mode: Mode) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("base")).unwrap();
    let options = create::CreateOptions {
        mode,
        cluster: Sectors(64),
        ..create::CreateOptions::new(place.path().join("base"), "root.hds", Sectors(64 * 16))
    };
    create::create(&options).unwrap();
    fill(&place.path().join("base"), 0, 5).unwrap();
    place
}

/// Writes a whole cluster of the current state.
fn fill(path: &Path, cluster: u32, byte: u8) -> Result<()> {
    let options = OpenOptions { lock_timeout: Duration::ZERO, ..OpenOptions::new(path, Access::ReadWrite) };
    let chain = open(&options)?.chain;
    let content = vec![byte; 32768];
    let write = |at: u64| chain.storage(chain.top()).write_all_at(at, &content).unwrap();
    match chain.prepare_write(crate::units::GuestCluster(cluster))? {
        crate::format::WriteTarget::InPlace(place) => write(place.0),
        crate::format::WriteTarget::Fresh(prepared) => {
            write(prepared.offset().0);
            prepared.publish();
        }
    }
    merge::copy::commit(&chain)?;
    chain.close()
}

/// The first byte of a cluster.
fn look(path: &Path, cluster: u64) -> u8 {
    let chain = open(&OpenOptions::new(path, Access::ReadOnly)).unwrap().chain;
    match chain.map(crate::units::GuestOffset(cluster * 32768), 1) {
        crate::format::Mapping::Zero { .. } => 0,
        crate::format::Mapping::Data { delta, offset, .. } => {
            let mut byte = [0];
            chain.storage(delta).read_exact_at(offset.0, &mut byte).unwrap();
            byte[0]
        }
    }
}

fn options(place: &Path, name: &str, snapshot: Option<Guid>) -> CloneOptions {
    CloneOptions {
        path: place.join("base"),
        new_folder: place.join(name),
        snapshot,
        lock_timeout: Duration::ZERO,
    }
}

#[test]
fn many_clones_share_one_base_that_stays_as_it_is() {
    for mode in [Mode::Expanded, Mode::Raw] {
        let place = base(mode);
        for number in 0..20 {
            let report = clone(&options(place.path(), &format!("ct{number}"), None)).unwrap();
            assert_eq!(report.shared.len(), 1);
            let folder = place.path().join(format!("ct{number}"));
            fill(&folder, 1, number + 1).unwrap();
            fill(&folder, 0, number + 101).unwrap();
        }
        for number in 0..20 {
            let folder = place.path().join(format!("ct{number}"));
            assert_eq!((look(&folder, 0), look(&folder, 1)), (number + 101, number + 1));
        }
        let base = place.path().join("base");
        assert_eq!((look(&base, 0), look(&base, 1)), (5, 0));
        // The base refuses to change, in whatever way, and says why.
        let error = fill(&base, 0, 9).unwrap_err();
        assert!(error.kind() == ErrorKind::InUse && error.advice().unwrap().contains("snapshot"), "{error}");
        let into_base = merge::MergeOptions::default();
        let error = merge::merge(&place.path().join("ct3"), &into_base, Duration::ZERO, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert_eq!(look(&place.path().join("ct3"), 0), 104);
        // But it goes on above a snapshot, which may also be taken now.
        let frozen = SnapshotOptions { snapshot: Some(guid(1)), temporary: false };
        snapshot(&base, &frozen, Duration::ZERO, &Silent).unwrap();
        fill(&base, 0, 9).unwrap();
        assert_eq!((look(&base, 0), look(&place.path().join("ct5"), 0)), (9, 106));
        crate::ops::delete(
            &base,
            &crate::ops::DeleteOptions { snapshot: Guid::TOP },
            Duration::ZERO,
            &Silent,
        )
        .unwrap();
        assert_eq!(look(&base, 0), 5);
        // A clone becomes independent by a merge into a new file.
        let flat = merge::MergeOptions { all: true, new_file: Some("flat".to_owned()), ..into_base };
        merge::merge(&place.path().join("ct3"), &flat, Duration::ZERO, &Silent).unwrap();
        assert_eq!((look(&place.path().join("ct3"), 0), look(&place.path().join("ct3"), 1)), (104, 4));
        // The base goes, its clones stay; the last one may change what was shared.
        fs::remove_dir_all(&base).unwrap();
        for number in (0..20).filter(|&number| number != 3) {
            let folder = place.path().join(format!("ct{number}"));
            assert_eq!((look(&folder, 0), look(&folder, 1)), (number + 101, number + 1));
            if number < 19 {
                fs::remove_dir_all(&folder).unwrap();
            }
        }
        merge::merge(&place.path().join("ct19"), &merge::MergeOptions::default(), Duration::ZERO, &Silent)
            .unwrap();
        assert_eq!((look(&place.path().join("ct19"), 0), look(&place.path().join("ct19"), 1)), (120, 20));
    }
}

#[test]
fn the_base_goes_on_above_a_snapshot() {
    let place = base(Mode::Expanded);
    let base = place.path().join("base");
    let frozen = SnapshotOptions { snapshot: Some(guid(1)), temporary: false };
    snapshot(&base, &frozen, Duration::ZERO, &Silent).unwrap();
    // Also while the base is being written.
    let writer = open(&OpenOptions::new(&base, Access::ReadWrite)).unwrap();
    let refused = clone(&options(place.path(), "top", None)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse);
    assert!(!place.path().join("top").exists());
    clone(&options(place.path(), "ct", Some(guid(1)))).unwrap();
    writer.chain.close().unwrap();
    drop(writer);
    fill(&base, 0, 6).unwrap();
    fill(&place.path().join("ct"), 1, 7).unwrap();
    assert_eq!((look(&base, 0), look(&base, 1)), (6, 0));
    assert_eq!((look(&place.path().join("ct"), 0), look(&place.path().join("ct"), 1)), (5, 7));
    // Deleting the snapshot would merge into the shared image.
    let delete = crate::ops::DeleteOptions { snapshot: guid(1) };
    let error = crate::ops::delete(&base, &delete, Duration::ZERO, &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(crate::ops::snapshot_list(&base).unwrap().states.iter().all(|state| state.transition.is_none()));
    // A clone of a clone.
    let again = CloneOptions { path: place.path().join("ct"), ..options(place.path(), "ct2", None) };
    assert_eq!(clone(&again).unwrap().shared.len(), 2);
    assert_eq!(look(&place.path().join("ct2"), 1), 7);
}

#[test]
fn wrong_places_are_refused() {
    let place = base(Mode::Expanded);
    let error = clone(&options(place.path(), "base", None)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Create, "{error}");
    let unknown = clone(&options(place.path(), "ct", Some(guid(4)))).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NoSnapshot);
    fs::create_dir(place.path().join("full")).unwrap();
    fs::write(place.path().join("full/root.hds"), "mine").unwrap();
    let error = clone(&options(place.path(), "full", None)).unwrap_err();
    assert!(error.kind() == ErrorKind::Create && error.to_string().contains("root.hds"), "{error}");
    assert_eq!(fs::read(place.path().join("full/root.hds")).unwrap(), b"mine");
    assert_eq!(clone(&options(place.path(), "no/such", None)).unwrap_err().kind(), ErrorKind::MakeFolder);
    // What a clone that was cut has left is taken.
    fs::create_dir(place.path().join("cut")).unwrap();
    fs::hard_link(place.path().join("base/root.hds"), place.path().join("cut/root.hds")).unwrap();
    clone(&options(place.path(), "cut", None)).unwrap();
    assert_eq!(look(&place.path().join("cut"), 0), 5);
}

/// A simulated folder has no hard links; a synced copy of an image that nobody changes is as good.
fn copy_of(folder: &dyn Folder, storage: &dyn Storage, name: &str) -> Result<()> {
    let failed = |error| Error::io(ErrorKind::Create, "share", error);
    if exists(folder, name)? {
        return Ok(());
    }
    let mut bytes = vec![0; usize::try_from(storage.len().map_err(failed)?).unwrap()];
    storage.read_exact_at(0, &mut bytes).map_err(failed)?;
    // Complete under its name or not there, as a link is.
    let temporary = format!("{name}.link");
    if exists(folder, &temporary)? {
        folder.unlink(&temporary).map_err(failed)?;
    }
    let file = folder.create_exclusive(&temporary).map_err(failed)?;
    file.write_all_at(0, &bytes).and_then(|()| file.sync_data()).map_err(failed)?;
    folder.rename_exclusive(&temporary, name).map_err(failed)
}

fn clone_to(base: &SimDisk, new: &SimDisk) -> Result<()> {
    let folder = new.folder();
    let descriptor = crate::ops::testing::descriptor(&base.folder());
    let share = |storage: &dyn Storage, name: &str| copy_of(&folder, storage, name);
    let parts = CloneParts { descriptor: &descriptor, state: Some(guid(2)), share: &share };
    clone_in(&base.folder(), &folder, &parts).map(drop)
}

#[test]
fn every_crash_leaves_a_whole_clone_or_none() {
    let base = three(Mode::Expanded);
    let expected = read(&base.folder(), guid(2));
    let new = SimDisk::new(7);
    new.capture_every_operation(true);
    clone_to(&base, &new).unwrap();
    let (mut none, mut whole) = (0, 0);
    for snapshot in new.take_captured() {
        for state in snapshot.crash_states(&CrashOptions::new(CrashLevel::Sectors)) {
            let crashed = state.into_disk(8);
            if !crashed.folder().exists(DESCRIPTOR_NAME).unwrap() {
                none += 1;
                clone_to(&base, &crashed).unwrap();
            } else {
                whole += 1;
            }
            assert_eq!(read(&crashed.folder(), Guid::TOP), expected);
        }
    }
    assert!(none > 10 && whole > 0, "{none} {whole}");
}

#[test]
fn every_fault_can_be_tried_again() {
    let base = three(Mode::Expanded);
    for calls in 0.. {
        let new = SimDisk::new(7);
        new.inject(Fault::any(libc::EIO).after(calls));
        let cloned = clone_to(&base, &new);
        let happened = new.faults_happened();
        new.heal();
        if cloned.is_ok() {
            assert!(!happened, "an error was dropped");
            break;
        }
        if !new.folder().exists(DESCRIPTOR_NAME).unwrap() {
            clone_to(&base, &new).unwrap();
        }
        assert_eq!(read(&new.folder(), Guid::TOP), read(&base.folder(), guid(2)));
    }
}

#[test]
fn a_state_on_a_cut_merge_is_not_shared() {
    struct Impatient;
    impl crate::ops::Progress for Impatient {
        fn begin(&self, _phase: &str, _total_bytes: u64) {}
        fn advance(&self, _bytes: u64) -> Result<()> {
            Err(Error::new(ErrorKind::Cancelled, "enough"))
        }
    }
    let disk = three(Mode::Expanded);
    let options = merge::MergeOptions { snapshot: Some(guid(2)), ..merge::MergeOptions::default() };
    merge::merge_in(&disk.folder(), &options, &Impatient).unwrap_err();
    let new = SimDisk::new(3);
    let error = clone_to(&disk, &new).unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.advice().is_some(), "{error}");
    assert!(new.folder().list().unwrap().is_empty());
}

#[test]
fn shared_images_are_checked_and_only_damage_is_refused() {
    use crate::ops::check::{CheckOptions, Outcome, check};
    let place = base(Mode::Expanded);
    clone(&options(place.path(), "ct", None)).unwrap();
    for folder in ["base", "ct"] {
        let path = place.path().join(folder);
        for options in [
            CheckOptions::repair(&path),
            CheckOptions { read_only: false, ..CheckOptions::look(&path) },
            CheckOptions { fill_holes: true, ..CheckOptions::repair(&path) },
        ] {
            let report = check(&options, &Silent).unwrap();
            assert_eq!((report.outcome, report.exit_code), (Outcome::Sound, 0), "{report:?}");
        }
    }
    // An entry past the end of the file.
    let image = place.path().join("base/root.hds");
    let mut bytes = fs::read(&image).unwrap();
    bytes[64 + 4..64 + 8].copy_from_slice(&0x00FF_FFFFu32.to_le_bytes());
    fs::write(&image, &bytes).unwrap();
    assert_eq!(check(&CheckOptions::look(place.path().join("ct")), &Silent).unwrap().exit_code, 11);
    let error = check(&CheckOptions::repair(place.path().join("ct")), &Silent).unwrap_err();
    assert!(error.kind() == ErrorKind::InUse && error.advice().unwrap().contains("clones"), "{error}");
    assert_eq!(fs::read(&image).unwrap(), bytes);
}
