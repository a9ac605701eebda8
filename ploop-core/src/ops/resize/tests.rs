//! Content stays, sizes change, whatever fails or crashes on the way.

use std::sync::Arc;

use super::*;
use crate::format::testing::{
    content, file_of, guest_content, open as open_chain, set_entry, set_mark, small,
};
use crate::format::{CreateOptions, Guid, Version, WriteTarget, create_image, examine};
use crate::io::sim::{CrashLevel, CrashOptions, Fault, SimDisk, SimStorage};
use crate::io::{Storage, StorageExt};
use crate::mutant::{self, Mutant};
use crate::ops::progress::Silent;
use crate::units::GuestCluster;

const CLUSTER: u64 = 512;
const NAME: &str = "root.hds";

fn geometry(version: Version, clusters: u64) -> Geometry {
    Geometry::for_testing(version, Sectors(1), Sectors(clusters)).unwrap()
}

/// A bundle with one image of clusters of one sector.
fn bundle(version: Version, clusters: u64, mode: Mode) -> SimDisk {
    let disk = SimDisk::new(3);
    let file = disk.create(NAME).unwrap();
    let sizes = geometry(version, clusters);
    if mode == Mode::Raw {
        file.set_len(clusters * CLUSTER).unwrap();
        file.sync_data().unwrap();
    } else {
        let options = CreateOptions { geometry: sizes, preallocated: mode == Mode::Preallocated };
        create_image(&file, &options).unwrap();
    }
    DiskDescriptor::new_single(NAME, mode, Sectors(clusters), Sectors(1))
        .unwrap()
        .store(&disk.folder())
        .unwrap();
    disk
}

fn chain(disk: &SimDisk, access: Access) -> Result<Arc<Chain>> {
    let descriptor = DiskDescriptor::load(&disk.folder(), None)?;
    let images = descriptor.chain_for(descriptor.top_guid())?;
    let count = images.len();
    let sources = images.iter().enumerate().map(|(number, image)| Source {
        name: image.file().into(),
        storage: Arc::new(
            disk.open(image.file(), if number + 1 == count { access } else { Access::ReadOnly }).unwrap(),
        ),
        raw: number == 0 && descriptor.is_raw(),
    });
    let raw_cluster = descriptor.is_raw().then_some(Sectors(1));
    Chain::open(sources.collect(), &ChainOptions { access, raw_cluster, accept_in_use: false })
}

fn byte_of(cluster: u64) -> u8 {
    u8::try_from(cluster % 251).unwrap() + 1
}

/// Writes clusters, each filled with its own byte, and closes the image.
fn fill(disk: &SimDisk, clusters: impl IntoIterator<Item = u64>) {
    let chain = chain(disk, Access::ReadWrite).unwrap();
    for cluster in clusters {
        let bytes = [byte_of(cluster); 512];
        let storage = chain.storage(chain.top());
        match chain.prepare_write(GuestCluster(u32::try_from(cluster).unwrap())).unwrap() {
            WriteTarget::InPlace(offset) => storage.write_all_at(offset.0, &bytes).unwrap(),
            WriteTarget::Fresh(prepared) => {
                storage.write_all_at(prepared.offset().0, &bytes).unwrap();
                prepared.publish();
            }
        }
    }
    crate::format::testing::flush(&chain);
    chain.close().unwrap();
}

fn guest(disk: &SimDisk) -> Vec<u8> {
    guest_content(&chain(disk, Access::ReadOnly).unwrap())
}

fn options(clusters: u64) -> ResizeOptions {
    ResizeOptions::new("", Sectors(clusters))
}

fn run(disk: &SimDisk, options: &ResizeOptions) -> Result<ResizeReport> {
    resize_in(&disk.folder(), options, &Silent)
}

/// The disk is sound, closed, of this size and descriptor, and holds what it held, then zeros.
fn assert_resized(disk: &SimDisk, clusters: u64, before: &[u8]) {
    let after = guest(disk);
    assert_eq!(after.len() as u64, clusters * CLUSTER);
    let kept = before.len().min(after.len());
    assert!(after[..kept] == before[..kept], "content has changed");
    assert!(after[kept..].iter().all(|&byte| byte == 0), "the new range is not empty");
    let descriptor = DiskDescriptor::load(&disk.folder(), None).unwrap();
    assert_eq!(descriptor.disk_sectors(), Sectors(clusters));
    if !descriptor.is_raw() {
        let top = descriptor.image(descriptor.top_guid()).unwrap().file().to_owned();
        let file = disk.open(&top, Access::ReadOnly).unwrap();
        let (header, verdict) = examine(&file).unwrap();
        assert_eq!((verdict.ambiguous_count, verdict.at_end.len(), header.in_use()), (0, 0, InUse::Closed));
        assert_eq!(header.obstacle(), None);
    }
}

#[test]
fn every_kind_of_image_grows_and_keeps_its_content() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        for version in [Version::V1, Version::V2] {
            for (from, to) in [(20, 21), (20, 112), (20, 113), (20, 1000), (500, 3000), (112, 113)] {
                let disk = bundle(version, from, mode);
                fill(&disk, (0..from).filter(|cluster| cluster % 7 != 3));
                let before = guest(&disk);
                let report = run(&disk, &options(to)).unwrap();
                assert_resized(&disk, to, &before);
                assert_eq!((report.disk_bytes_before, report.disk_bytes), (from * CLUSTER, to * CLUSTER));
                if mode == Mode::Expanded {
                    let tables =
                        geometry(version, to).data_start().0 - geometry(version, from).data_start().0;
                    assert_eq!(report.moved_clusters, tables / CLUSTER);
                }
                if mode == Mode::Preallocated {
                    let chain = chain(&disk, Access::ReadOnly).unwrap();
                    assert_eq!(chain.allocated_clusters(), to);
                }
                // All of it can be written afterwards.
                fill(&disk, 0..to);
                let full = guest(&disk);
                for cluster in 0..to {
                    let at = usize::try_from(cluster * CLUSTER).unwrap();
                    assert_eq!(full[at], byte_of(cluster), "{mode:?} {from} to {to}: cluster {cluster}");
                }
            }
        }
    }
}

#[test]
fn growing_again_and_again_keeps_all() {
    let disk = bundle(Version::V2, 10, Mode::Expanded);
    let mut clusters = 10;
    for step in 1..12u64 {
        fill(&disk, (0..clusters).filter(|cluster| cluster % 5 == step % 5));
        let before = guest(&disk);
        clusters += step * 37;
        run(&disk, &options(clusters)).unwrap();
        assert_resized(&disk, clusters, &before);
    }
}

#[test]
fn the_same_size_changes_nothing() {
    let disk = bundle(Version::V2, 20, Mode::Expanded);
    fill(&disk, 0..5);
    let before = content(&disk.open(NAME, Access::ReadOnly).unwrap());
    let report = run(&disk, &options(20)).unwrap();
    assert!(!report.changed);
    assert_eq!(content(&disk.open(NAME, Access::ReadOnly).unwrap()), before);
}

#[test]
fn shrinking_wants_to_be_asked_for() {
    for mode in [Mode::Expanded, Mode::Raw, Mode::Preallocated] {
        let disk = bundle(Version::V2, 1000, mode);
        fill(&disk, [0, 5, 900]);
        let before = guest(&disk);
        let file = content(&disk.open(NAME, Access::ReadOnly).unwrap());
        for shrink in [Shrink::Refuse, Shrink::IfEmpty] {
            let error = run(&disk, &ResizeOptions { shrink, ..options(100) }).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Parameter, "{error}");
            assert_eq!(guest(&disk), before);
            if shrink == Shrink::Refuse {
                assert_eq!(content(&disk.open(NAME, Access::ReadOnly).unwrap()), file, "not touched");
            }
        }
        let report = run(&disk, &ResizeOptions { shrink: Shrink::Discard, ..options(100) }).unwrap();
        assert_resized(&disk, 100, &before);
        match mode {
            Mode::Raw => assert_eq!(report.file_bytes, 100 * CLUSTER),
            Mode::Expanded => assert_eq!((report.freed_clusters, report.file_bytes), (1, 10 * CLUSTER)),
            Mode::Preallocated => assert_eq!(report.freed_clusters, 900),
        }
        // What was there does not come back.
        run(&disk, &options(1000)).unwrap();
        assert_resized(&disk, 1000, &before[..usize::try_from(100 * CLUSTER).unwrap()]);
    }
    let disk = bundle(Version::V2, 1000, Mode::Expanded);
    fill(&disk, [0, 5]);
    let before = guest(&disk);
    run(&disk, &ResizeOptions { shrink: Shrink::IfEmpty, ..options(100) }).unwrap();
    assert_resized(&disk, 100, &before);
}

/// A bundle of a base and an empty top over it.
fn with_snapshot(base_clusters: u64, top_clusters: u64) -> SimDisk {
    let disk = bundle(Version::V2, base_clusters, Mode::Expanded);
    fill(&disk, 0..base_clusters);
    let top = disk.create("top").unwrap();
    create_image(&top, &CreateOptions { geometry: geometry(Version::V2, top_clusters), preallocated: false })
        .unwrap();
    let xml = format!(
        "<d><Disk_Parameters><Disk_size>{top_clusters}</Disk_size></Disk_Parameters><StorageData><Storage><Blocksize>1\
         </Blocksize><Image><GUID>{base}</GUID><Type>Compressed</Type><File>{NAME}</File></Image><Image><GUID>{top}\
         </GUID><Type>Compressed</Type><File>top</File></Image></Storage></StorageData><Snapshots><TopGUID>{top}\
         </TopGUID><Shot><GUID>{base}</GUID><ParentGUID>{none}</ParentGUID></Shot><Shot><GUID>{top}</GUID>\
         <ParentGUID>{base}</ParentGUID></Shot></Snapshots></d>",
        base = "{11111111-2222-3333-4444-555555555555}",
        top = Guid::TOP,
        none = Guid::NONE,
    );
    DiskDescriptor::parse(xml.as_bytes()).unwrap().store(&disk.folder()).unwrap();
    disk
}

#[test]
fn a_disk_with_snapshots_grows_in_its_top_only() {
    let disk = with_snapshot(60, 60);
    fill(&disk, [1, 2, 59]);
    let base = content(&disk.open(NAME, Access::ReadOnly).unwrap());
    let before = guest(&disk);
    run(&disk, &options(700)).unwrap();
    assert_resized(&disk, 700, &before);
    assert_eq!(
        content(&disk.open(NAME, Access::ReadOnly).unwrap()),
        base,
        "what others share is not touched"
    );
    fill(&disk, [699, 100]);
    let before = guest(&disk);
    run(&disk, &ResizeOptions { shrink: Shrink::Discard, ..options(50) }).unwrap();
    assert_resized(&disk, 50, &before);
    assert_eq!(content(&disk.open(NAME, Access::ReadOnly).unwrap()), base);
    // What the top and the snapshot had there does not come back.
    run(&disk, &options(700)).unwrap();
    assert_resized(&disk, 700, &before[..50 * 512]);
}

#[test]
fn bytes_of_a_larger_snapshot_do_not_come_to_light() {
    // With and without clusters of the top in the way of its longer table.
    for to in [80, 100, 400] {
        let disk = with_snapshot(100, 60);
        fill(&disk, [3, 4, 5, 6, 7]);
        let before = guest(&disk);
        run(&disk, &options(to)).unwrap();
        assert_resized(&disk, to, &before);
        fill(&disk, [70]);
        assert_eq!(guest(&disk)[70 * 512], byte_of(70));
    }
    for to in [80, 400] {
        hunt(&|| with_snapshot(100, 60), &options(to), None, true).unwrap();
    }
    let smaller = ResizeOptions { shrink: Shrink::Discard, ..options(20) };
    hunt(&|| with_snapshot(100, 60), &smaller, None, true).unwrap();
}

#[test]
fn only_an_empty_end_goes_unasked() {
    let disk = with_snapshot(60, 60);
    let if_empty = |clusters| ResizeOptions { shrink: Shrink::IfEmpty, ..options(clusters) };
    // The top holds nothing, but its snapshot does.
    let error = run(&disk, &if_empty(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Parameter, "{error}");
    run(&disk, &options(90)).unwrap();
    run(&disk, &if_empty(60)).unwrap();
}

#[test]
fn slots_past_the_end_and_junk_behind_the_table_do_not_become_data() {
    // A table of 40 slots for a disk of 20 clusters, with an entry in one of the others.
    let disk = bundle(Version::V2, 40, Mode::Expanded);
    fill(&disk, [0, 30]);
    let file = disk.open(NAME, Access::ReadWrite).unwrap();
    file.write_all_at(36, &20u64.to_le_bytes()).unwrap();
    // Junk between the end of the table and the data.
    file.write_all_at(64 + 4 * 40, &[0xFF; 512 - 64 - 160]).unwrap();
    file.sync_data().unwrap();
    let before = guest(&disk);
    assert_eq!(before.len(), 20 * 512);
    run(&disk, &options(200)).unwrap();
    assert_resized(&disk, 200, &before);
}

#[test]
fn the_rest_of_a_cluster_cut_by_the_end_is_zeroed() {
    let file = file_of(&[]);
    let sizes = Geometry::for_testing(Version::V2, Sectors(8), Sectors(8 * 3 + 2)).unwrap();
    create_image(&file, &CreateOptions { geometry: sizes, preallocated: false }).unwrap();
    file.write_all_at(4096, &[7; 4096]).unwrap();
    file.sync_data().unwrap();
    set_entry(&file, 3, 1);
    let before = guest_content(&open_chain(&[&file], Access::ReadOnly).unwrap());
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    resize_files(None, &[source], &options(8 * 5000), &Silent).unwrap();
    let after = guest_content(&open_chain(&[&file], Access::ReadOnly).unwrap());
    assert!(after[..before.len()] == before[..]);
    assert!(after[before.len()..].iter().all(|&byte| byte == 0));
}

#[test]
fn odd_old_images_grow() {
    // Version 1 with clusters of 63 sectors and data right behind the table, the offset not stored.
    let file = file_of(&[]);
    let sizes = Geometry::for_testing(Version::V1, Sectors(63), Sectors(63 * 10)).unwrap();
    create_image(&file, &CreateOptions { geometry: sizes, preallocated: false }).unwrap();
    file.write_all_at(48, &0u32.to_le_bytes()).unwrap();
    file.set_len(512 + 3 * 63 * 512).unwrap();
    for (cluster, place) in [(0u64, 1u32), (4, 1 + 63), (9, 1 + 126)] {
        file.write_all_at(u64::from(place) * 512, &vec![byte_of(cluster); 63 * 512]).unwrap();
        set_entry(&file, cluster, place);
    }
    let before = guest_content(&open_chain(&[&file], Access::ReadOnly).unwrap());
    assert_eq!(before[4 * 63 * 512], byte_of(4));
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    let report = resize_files(None, &[source], &options(63 * 9000), &Silent).unwrap();
    assert_eq!(report.moved_clusters, 2);
    let chain = open_chain(&[&file], Access::ReadWrite).unwrap();
    assert_eq!(chain.geometry().phase_bytes(), 512);
    let after = guest_content(&chain);
    assert!(after[..before.len()] == before[..] && after[before.len()..].iter().all(|&byte| byte == 0));
}

#[test]
fn limits_are_said_before_anything_is_touched() {
    let disk = bundle(Version::V1, 20, Mode::Expanded);
    let before = content(&disk.open(NAME, Access::ReadOnly).unwrap());
    for clusters in [1 << 32, u64::MAX, 0] {
        let error = run(&disk, &options(clusters)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parameter, "{clusters}: {error}");
    }
    assert_eq!(content(&disk.open(NAME, Access::ReadOnly).unwrap()), before);
    let usual = Geometry::new(Version::V2, Sectors(64), Sectors(64 * 100)).unwrap();
    assert!(usual.resized(Sectors((16 << 31) - 64)).is_ok(), "16 TiB less a cluster of 32 KiB");
    let error = usual.resized(Sectors(16 << 31)).unwrap_err();
    assert!(error.to_string().contains("clusters") && error.advice().is_some());
    let mib = Geometry::new(Version::V2, Sectors(2048), Sectors(2048)).unwrap();
    assert_eq!(mib.resized(Sectors(16 << 31)).unwrap().first_data_cluster().0, 65);
    let old = Geometry::new(Version::V1, Sectors(2048), Sectors(2048)).unwrap();
    assert_eq!(old.rounded(Sectors(0xFFFF_FFFF)), Sectors(0xFFFF_F800));
    // 2 TiB of clusters behind the table do not fit below 2 TiB.
    assert!(old.resized(Sectors(0xFFFF_F800)).is_err());
    assert!(old.resized(Sectors(0xFFFF_F800 - 16 * 2048)).is_ok());
}

/// Tables longer than one cluster of the usual size: 200 GiB to 3 TiB, with clusters in the way.
#[test]
fn large_disks_grow_far() {
    let disk = SimDisk::new(1);
    let file = disk.create(NAME).unwrap();
    let sizes = Geometry::new(Version::V2, Sectors(2048), Sectors(200 << 21)).unwrap();
    create_image(&file, &CreateOptions { geometry: sizes, preallocated: false }).unwrap();
    // Entries in the second half of the table and at its end point to the first places behind it.
    let places = [(262_200u64 - 60_000, 1u32), (5, 2), (204_799, 3), (100_000, 12), (17, 13), (18, 11)];
    for (cluster, place) in places {
        file.write_all_at(u64::from(place) << 20, &[byte_of(cluster); 4096]).unwrap();
        set_entry(&file, cluster, place);
    }
    file.set_len(14 << 20).unwrap();
    file.sync_data().unwrap();
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    let report = resize_files(None, &[source], &options(3 << 31), &Silent).unwrap();
    // The table takes 13 clusters afterwards.
    assert_eq!(report.moved_clusters, 5);
    let chain = open_chain(&[&file], Access::ReadWrite).unwrap();
    assert_eq!(chain.geometry().disk_bytes(), 3 << 40);
    for (cluster, _) in places {
        let offset = chain.held_at(0, GuestCluster(u32::try_from(cluster).unwrap())).unwrap();
        let mut bytes = [0; 4097];
        file.read_exact_at(offset.0, &mut bytes).unwrap();
        assert!(bytes[..4096].iter().all(|&byte| byte == byte_of(cluster)) && bytes[4096] == 0, "{cluster}");
    }
    assert_eq!(chain.allocated_clusters(), 6);
    assert_eq!(examine(&file).unwrap().1.ambiguous_count, 0);
}

#[test]
fn a_cut_that_was_not_closed_is_repaired_on_the_way() {
    let disk = bundle(Version::V2, 20, Mode::Expanded);
    fill(&disk, 0..10);
    let before = guest(&disk);
    let file = disk.open(NAME, Access::ReadWrite).unwrap();
    set_mark(&file, InUse::Open);
    file.set_len(file.len().unwrap() + 5000).unwrap();
    file.sync_data().unwrap();
    run(&disk, &options(20)).unwrap();
    assert_resized(&disk, 20, &before);
    set_mark(&file, InUse::Open);
    run(&disk, &options(300)).unwrap();
    assert_resized(&disk, 300, &before);
}

#[test]
fn a_cancelled_growth_leaves_the_old_size() {
    struct Stop;
    impl Progress for Stop {
        fn begin(&self, _phase: &str, _total_bytes: u64) {}
        fn advance(&self, _bytes: u64) -> Result<()> {
            Err(Error::new(ErrorKind::Cancelled, "stopped"))
        }
    }
    let disk = bundle(Version::V2, 20, Mode::Expanded);
    fill(&disk, 0..20);
    let before = guest(&disk);
    assert_eq!(resize_in(&disk.folder(), &options(3000), &Stop).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_resized(&disk, 20, &before);
    run(&disk, &options(3000)).unwrap();
    assert_resized(&disk, 3000, &before);
}

#[test]
fn a_full_host_changes_nothing() {
    for mode in [Mode::Expanded, Mode::Preallocated] {
        let disk = bundle(Version::V2, 20, mode);
        fill(&disk, 0..20);
        let before = guest(&disk);
        let used = disk.open(NAME, Access::ReadOnly).unwrap().allocated_bytes().unwrap();
        disk.set_capacity(Some(used + 12 * 4096));
        let error = run(&disk, &options(60_000)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Allocate, "{error}");
        disk.set_capacity(None);
        assert_resized(&disk, 20, &before);
        run(&disk, &options(60_000)).unwrap();
        assert_resized(&disk, 60_000, &before);
    }
}

/// What may be after a crash: the old or the new size, the same content; and the command finishes it.
fn judge(
    disk: &SimDisk,
    before: &[u8],
    options: &ResizeOptions,
    keep: usize,
) -> std::result::Result<(), String> {
    let told = |error: Error| error.to_string();
    let chain = chain(disk, Access::ReadOnly).map_err(|error| format!("open: {error}"))?;
    let seen = crate::format::testing::try_guest_content(&chain).map_err(|error| error.to_string())?;
    drop(chain);
    let kept = keep.min(seen.len());
    if seen[..kept] != before[..kept] {
        return Err("content has changed".into());
    }
    if seen.len() > before.len() && seen[before.len()..].iter().any(|&byte| byte != 0) {
        return Err("the new range is not empty".into());
    }
    let descriptor = DiskDescriptor::load(&disk.folder(), None).map_err(told)?;
    let sizes = [before.len() as u64 / 512, options.disk.0];
    // The length of a file may be anything between after a crash.
    let fits = |sectors: u64| match descriptor.is_raw() {
        true => (sizes[0].min(sizes[1])..=sizes[0].max(sizes[1])).contains(&sectors),
        false => sizes.contains(&sectors),
    };
    if !sizes.contains(&descriptor.disk_sectors().0) || !fits(seen.len() as u64 / 512) {
        return Err(format!("odd size: {}, {}", descriptor.disk_sectors(), seen.len()));
    }
    Ok(())
}

/// Crashes everywhere, and everywhere in the command that finishes it; what went wrong, if anything.
fn hunt(
    make: &dyn Fn() -> SimDisk,
    options: &ResizeOptions,
    mutant: Option<Mutant>,
    again: bool,
) -> std::result::Result<usize, String> {
    let disk = make();
    let before = guest(&disk);
    let keep = before.len().min(usize::try_from(options.disk.0 * 512).unwrap());
    let crash =
        CrashOptions { exhaustive_max: 64, random_per_density: 3, ..CrashOptions::new(CrashLevel::Sectors) };
    let captured = |disk: &SimDisk| {
        disk.capture_every_operation(true);
        mutant::activate(mutant);
        let result = run(disk, options);
        mutant::activate(None);
        result.map_err(|error| format!("run: {error}"))?;
        let mut captured = disk.take_captured();
        captured.push(disk.snapshot());
        Ok::<_, String>(captured)
    };
    let mut seen = std::collections::HashSet::new();
    for snapshot in captured(&disk)? {
        for state in snapshot.crash_states(&crash) {
            if !seen.insert(state.hash()) {
                continue;
            }
            let cut = state.into_disk(9);
            judge(&cut, &before, options, keep)?;
            let begin = cut.snapshot().killed();
            run(&cut, options).map_err(|error| format!("second run: {error}"))?;
            let after = guest(&cut);
            if after.len() as u64 != options.disk.0 * 512 || after[..keep] != before[..keep] {
                return Err("the second run did not finish it".into());
            }
            assert_resized(&cut, options.disk.0, &before[..keep]);
            if again && seen.len() % 16 == 0 {
                let cut = begin.into_disk(10);
                for snapshot in captured(&cut)? {
                    for state in snapshot.crash_states(&crash).take(6) {
                        let cut = state.into_disk(11);
                        judge(&cut, &before, options, keep)?;
                        run(&cut, options).map_err(|error| format!("third run: {error}"))?;
                        assert_resized(&cut, options.disk.0, &before[..keep]);
                    }
                }
            }
        }
    }
    Ok(seen.len())
}

fn filled(version: Version, clusters: u64, mode: Mode) -> impl Fn() -> SimDisk {
    move || {
        let disk = bundle(version, clusters, mode);
        fill(&disk, (0..clusters).filter(|cluster| cluster % 4 != 2).take(12));
        disk
    }
}

#[test]
fn every_crash_of_a_growth_leaves_the_content_and_is_finished_by_the_same_command() {
    let mut states = 0;
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        for version in [Version::V1, Version::V2] {
            states += hunt(&filled(version, 20, mode), &options(600), None, true).unwrap();
        }
    }
    let chain = || {
        let disk = with_snapshot(20, 20);
        fill(&disk, 3..9);
        disk
    };
    states += hunt(&chain, &options(600), None, true).unwrap();
    assert!(states > 250, "only {states} states");
}

#[test]
fn every_crash_of_a_shrinking_keeps_what_stays() {
    for mode in [Mode::Expanded, Mode::Preallocated, Mode::Raw] {
        let smaller = ResizeOptions { shrink: Shrink::Discard, ..options(9) };
        hunt(&filled(Version::V2, 300, mode), &smaller, None, true).unwrap();
    }
}

#[test]
fn mutants_are_found() {
    let make = filled(Version::V2, 20, Mode::Expanded);
    for mutant in [Mutant::MoveNotSynced, Mutant::HeaderBeforeTableSync] {
        let make: &dyn Fn() -> SimDisk = &|| {
            let disk = make();
            // What lies in the way reads as entries of a table.
            let file = disk.open(NAME, Access::ReadWrite).unwrap();
            file.write_all_at(512, &10u32.to_le_bytes().repeat(512)).unwrap();
            file.sync_data().unwrap();
            disk
        };
        let found = hunt(make, &options(600), Some(mutant), false);
        assert!(found.is_err(), "{mutant:?} was not found");
        ploop_testing::found(mutant);
        hunt(make, &options(600), None, false).unwrap();
    }
}

#[test]
fn every_fault_is_told_and_survived() {
    for (mode, to) in [(Mode::Expanded, 600), (Mode::Preallocated, 600), (Mode::Expanded, 9), (Mode::Raw, 9)]
    {
        let make = filled(Version::V2, 40, mode);
        let options = ResizeOptions { shrink: Shrink::Discard, ..options(to) };
        let mut failed = 0;
        for calls in 0.. {
            let disk = make();
            let before = guest(&disk);
            let keep = before.len().min(usize::try_from(to * 512).unwrap());
            disk.inject(Fault::any(libc::EIO).after(calls));
            let result = run(&disk, &options);
            let happened = disk.faults_happened();
            disk.heal();
            if !happened {
                result.unwrap();
                break;
            }
            failed += usize::from(result.is_err());
            judge(&disk, &before, &options, keep)
                .unwrap_or_else(|why| panic!("{mode:?} call {calls}: {why}"));
            run(&disk, &options).unwrap_or_else(|error| panic!("{mode:?} call {calls}, again: {error}"));
            assert_resized(&disk, to, &before[..keep]);
        }
        assert!(failed > 10, "{mode:?}: only {failed} calls could fail");
    }
}

#[test]
fn an_image_without_descriptor_grows() {
    let file: SimStorage = file_of(&[]);
    create_image(&file, &CreateOptions { geometry: small(20), preallocated: false }).unwrap();
    let source = Source { name: "image".into(), storage: Arc::new(file.clone()), raw: false };
    let report = resize_files(None, &[source], &options(8 * 40 - 3), &Silent).unwrap();
    assert_eq!(report.disk_bytes, 40 * 4096, "rounded up to whole clusters");
    assert!(report.changed && report.descriptor.is_none());
}
