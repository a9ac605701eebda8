//! Sizes that differ along a chain: a disk with snapshots shrinks and grows again, and its snapshots are merged. Each
//! state is judged at its own size, and what a snapshot holds past the end of a later state is never seen in that.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ploop_core::device::{Disk, DiskOptions, Op, Request};
use ploop_core::error::{Error, ErrorKind};
use ploop_core::extent::Extent;
use ploop_core::format::{DiskDescriptor, Guid, examine};
use ploop_core::io::{
    Access, FileSlot, Folder, IoBuf, IoDone, IoOp, IoQueue, QueueChoice, Reaped, Storage, StorageExt, Wait,
    Waker,
};
use ploop_core::mutant::Mutant;
use ploop_core::ops::live;
use ploop_core::ops::merge::merge_in;
use ploop_core::ops::resize::{ResizeOptions, Shrink, resize_in};
use ploop_core::ops::snapshot::snapshot_in;
use ploop_core::ops::snapshot_delete::delete_in;
use ploop_core::ops::snapshot_switch::switch_in;
use ploop_core::ops::{DeleteOptions, MergeOptions, Silent, SnapshotOptions, SwitchOptions};
use ploop_core::units::{GuestCluster, Sectors};

use crate::bundle::{
    Bundle, CLUSTER_SECTORS, CLUSTERS, Shape, View, flush, guid, open_state, unchanged_but, write,
};
use crate::harness::{Case, explore, survives};
use crate::live::{Simulated, serving, warned};

/// How a chain came to its sizes.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The disk got so many clusters.
    To(u64),
    /// A snapshot of that number.
    Snapshot(usize),
    /// The guest wrote into that cluster, part of it or all.
    Write(u64),
    Fill(u64),
}

use Step::*;

fn to(folder: &dyn Folder, clusters: u64) -> Result<(), Error> {
    let disk = Sectors(clusters * CLUSTER_SECTORS);
    let options = ResizeOptions { shrink: Shrink::Discard, ..ResizeOptions::new("/bundle", disk) };
    resize_in(folder, &options, &Silent).map(drop)
}

fn made(shape: Shape, steps: &[Step]) -> Bundle {
    let disk = shape.bundle().disk(3);
    let folder = disk.folder();
    for (number, step) in steps.iter().enumerate() {
        let at_top = |work: &dyn Fn(&Arc<ploop_core::format::Chain>)| {
            let descriptor = DiskDescriptor::load(&folder, None).unwrap();
            let chain = open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).unwrap();
            work(&chain);
            flush(&chain);
            chain.close().unwrap();
        };
        let operation = 20 + number as u64;
        match *step {
            To(clusters) => to(&folder, clusters).unwrap(),
            Snapshot(number) => {
                let options = SnapshotOptions { snapshot: Some(guid(number)), temporary: false };
                snapshot_in(&folder, &options, &Silent).unwrap();
            }
            Write(cluster) => at_top(&|chain| write(chain, operation, cluster * CLUSTER_SECTORS + 9, 20)),
            Fill(cluster) => {
                at_top(&|chain| write(chain, operation, cluster * CLUSTER_SECTORS, CLUSTER_SECTORS));
            }
        }
    }
    Bundle::from_disk(&disk)
}

/// Snapshots are as they were; the top is as it was, or what it was up to the new end, and zeros.
fn judged(before: &View, found: &View, clusters: u64) -> Result<(), String> {
    let sectors = (clusters * CLUSTER_SECTORS) as usize;
    for (guid, old) in &before.states {
        let (old, new) = (old.sectors.as_slice(), found.sectors(*guid)?);
        if old == new {
            continue;
        }
        let common = old.len().min(sectors);
        let is_resized = *guid == Guid::TOP
            && new.len() == sectors
            && new[..common] == old[..common]
            && new[common..].iter().all(|&value| value == 0);
        if !is_resized {
            return Err(format!("the state {guid} of {} sectors holds something else", new.len()));
        }
    }
    if ![before.disk_sectors, sectors as u64].contains(&found.disk_sectors) {
        return Err(format!("the descriptor says {} sectors", found.disk_sectors));
    }
    Ok(())
}

fn resizing(name: &str, start: Bundle, clusters: u64) -> Case {
    Case::new(format!("{name} to {clusters} clusters"), start, move |folder| to(folder, clusters))
        .expecting(move |before, found| judged(before, found, clusters))
        .ending(move |view| {
            let sectors = clusters * CLUSTER_SECTORS;
            if view.disk_sectors == sectors && view.sectors(Guid::TOP)?.len() as u64 == sectors {
                return Ok(());
            }
            Err("it does not have the size that was asked for".to_owned())
        })
}

#[test]
fn shrinking_above_snapshots_survives_every_crash() {
    for shape in [
        Shape::of(2),
        Shape::of(2).version_1().not_closed(),
        Shape::of(2).on_raw(),
        Shape::of(3).holed(),
        Shape::of(3).branched(),
        Shape::of(2).with_odd_end(),
    ] {
        survives(&resizing(&format!("{shape:?}"), shape.bundle(), 3));
    }
}

fn to_grow_again() -> Vec<(String, Bundle)> {
    let ways: [(Shape, &[Step]); 5] = [
        (Shape::of(2), &[To(3)]),
        (Shape::of(2).on_raw(), &[To(2), Write(1)]),
        (Shape::of(3).version_1().holed(), &[To(3), Snapshot(60), Write(0)]),
        (Shape::of(2), &[To(3), To(5), Fill(4)]),
        (Shape::of(1), &[Snapshot(60), To(3), Snapshot(61), To(4), Write(3), Snapshot(62), To(2)]),
    ];
    ways.map(|(shape, steps)| (format!("{shape:?} {steps:?}"), made(shape, steps))).into()
}

#[test]
fn growing_again_brings_nothing_back_at_any_crash() {
    for (name, start) in to_grow_again() {
        survives(&resizing(&name, start, 9));
    }
}

#[test]
fn the_mutant_is_found() {
    let (name, start) = to_grow_again().remove(0);
    let found = explore(&resizing(&name, start, 9).breaking(Mutant::GrownUnhidden));
    println!("{}", found.expect_err("the mutant was not found"));
    ploop_testing::found(Mutant::GrownUnhidden);
}

/// Chains of different sizes, and a snapshot to delete.
fn to_merge() -> Vec<(String, Bundle, Guid)> {
    let ways: Vec<(Shape, &[Step], usize)> = vec![
        // The child is the top: smaller, smaller and grown again, larger.
        (Shape::of(2), &[To(3), Write(1)], 0),
        (Shape::of(2).on_raw(), &[To(3), Write(1)], 0),
        (Shape::of(2).holed(), &[To(3), To(5), Fill(4)], 0),
        (Shape::of(2).version_1().holed(), &[To(9), Fill(8), Write(6)], 0),
        (Shape::of(2).on_raw(), &[To(8), Write(7)], 0),
        // The child is a snapshot itself.
        (Shape::of(2), &[To(3), Snapshot(60), To(6), Write(4)], 0),
        (Shape::of(2).on_raw(), &[To(3), Snapshot(60), To(7), Write(0)], 0),
        (Shape::of(2), &[To(8), Fill(7), Snapshot(60), Write(7)], 0),
        (Shape::of(3), &[To(2), Snapshot(60), To(5), Snapshot(61), To(8), Write(3)], 60),
    ];
    let name = |shape: Shape, steps: &[Step], number| format!("delete {number} of {shape:?} {steps:?}");
    ways.into_iter()
        .map(|(shape, steps, number)| (name(shape, steps, number), made(shape, steps), guid(number)))
        .collect()
}

#[test]
fn merging_states_of_different_sizes_survives_every_crash() {
    for (name, start, gone) in to_merge() {
        let deleted =
            move |folder: &dyn Folder| match delete_in(folder, &DeleteOptions { snapshot: gone }, &Silent) {
                Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                other => other.map(drop),
            };
        survives(
            &Case::new(name, start, deleted)
                .living_on_lies()
                .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

#[test]
fn merging_all_of_it_survives_every_crash() {
    for (shape, steps, new_file) in [
        (Shape::of(3), &[To(3), Snapshot(60), To(5), Write(4)][..], None),
        (Shape::of(2).on_raw(), &[To(8), Snapshot(60), To(2)][..], None),
        (Shape::of(2), &[To(3), Snapshot(60), To(8)][..], Some("new.hds")),
    ] {
        let merged = move |folder: &dyn Folder| {
            let new_file = new_file.map(str::to_owned);
            let options = MergeOptions { all: true, new_file, ..MergeOptions::default() };
            match merge_in(folder, &options, &Silent) {
                Err(error) if error.to_string().contains("nothing lies below") => Ok(()),
                other => other.map(drop),
            }
        };
        let gone = [guid(0), guid(1), guid(60)];
        survives(
            &Case::new(format!("merge {shape:?} {steps:?}"), made(shape, steps), merged)
                .living_on_lies()
                .expecting(move |before, found| unchanged_but(before, found, &gone)),
        );
    }
}

#[test]
fn merging_while_it_runs_survives_every_crash() {
    for (name, start, gone) in to_merge() {
        survives(
            &Case::new(format!("running, {name}"), start, move |folder| {
                serving(folder, |disk, bundle| {
                    match live::delete(disk, bundle, &Silent, &live::DeleteOptions::new(gone)) {
                        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                        other => warned(other?.warnings),
                    }
                })
            })
            .living_on_lies()
            .expecting(move |before, found| unchanged_but(before, found, &[gone])),
        );
    }
}

/// Past the end of what a merge cut, nothing is left that a growth could bring back.
#[test]
fn nothing_comes_back_after_a_merge() {
    for (name, start, gone) in to_merge() {
        for served in [false, true] {
            let disk = start.disk(4);
            let folder = disk.folder();
            let before = View::read(&folder).unwrap();
            if served {
                serving(&folder, |disk, bundle| {
                    live::delete(disk, bundle, &Silent, &live::DeleteOptions::new(gone))
                })
                .unwrap();
            } else {
                delete_in(&folder, &DeleteOptions { snapshot: gone }, &Silent).unwrap();
            }
            to(&folder, CLUSTERS + 6).unwrap();
            let found = View::read(&folder).unwrap();
            let (old, new) = (before.sectors(Guid::TOP).unwrap(), found.sectors(Guid::TOP).unwrap());
            assert_eq!(new[..old.len()], *old, "{name}");
            assert!(new[old.len()..].iter().all(|&value| value == 0), "{name}, served: {served}");
        }
    }
}

/// A table that has to be longer than its place: clusters of the parent lie in its way.
#[test]
fn a_parent_whose_clusters_are_in_the_way_grows_while_it_is_served() {
    let start = made(Shape::of(3), &[To(8200), Fill(8190), Snapshot(60), Write(1)]);
    let gone = guid(1);
    let disk = start.disk(4);
    let folder = disk.folder();
    let before = View::read(&folder).unwrap();
    disk.capture_every_operation(true);
    serving(&folder, |disk, bundle| live::delete(disk, bundle, &Silent, &live::DeleteOptions::new(gone)))
        .unwrap();
    let captured = disk.take_captured();
    disk.capture_every_operation(false);
    unchanged_but(&before, &View::read(&folder).unwrap(), &[gone]).unwrap();
    let options = ploop_core::io::sim::CrashOptions::new(ploop_core::io::sim::CrashLevel::Sectors);
    for (number, snapshot) in captured.iter().enumerate() {
        for state in snapshot.crash_states(&options).take(40).step_by(7 + number % 5) {
            let what = format!("after {:?}: {state}", snapshot.after());
            let disk = state.into_disk(6);
            let folder = disk.folder();
            let found = View::read(&folder).unwrap_or_else(|why| panic!("{why} {what}"));
            unchanged_but(&before, &found, &[gone]).unwrap_or_else(|why| panic!("{why} {what}"));
            if number % 6 == 0 {
                serving(&folder, |disk, bundle| {
                    match live::delete(disk, bundle, &Silent, &live::DeleteOptions::new(gone)) {
                        Err(error) if error.kind() == ErrorKind::NoSnapshot => Ok(()),
                        other => other.map(drop),
                    }
                })
                .unwrap_or_else(|why| panic!("{why} {what}"));
                let found = View::read(&folder).unwrap();
                assert!(!found.states.contains_key(&gone), "{what}");
                unchanged_but(&before, &found, &[gone]).unwrap_or_else(|why| panic!("{why} {what}"));
            }
        }
    }
}

/// The disk has the size of the snapshot that it goes back to.
#[test]
fn switching_to_another_size_survives_every_crash() {
    for (steps, keep) in [(&[To(3), Write(1)][..], true), (&[To(9), Write(8)][..], false)] {
        let shape = Shape::of(2);
        let kept = keep.then(|| guid(50));
        let switched = move |folder: &dyn Folder| {
            if keep && DiskDescriptor::load(folder, None)?.shot(guid(50)).is_some() {
                return Ok(());
            }
            switch_in(folder, &SwitchOptions { snapshot: shape.snapshot(0), keep: kept }, &Silent).map(drop)
        };
        survives(
            &Case::new(format!("switch after {steps:?}"), made(shape, steps), switched)
                .expecting(move |before, found| {
                    let (old, new) = (before.sectors(Guid::TOP)?, found.sectors(Guid::TOP)?);
                    if new != old && new != before.sectors(shape.snapshot(0))? {
                        return Err("the current state is neither".to_owned());
                    }
                    if keep && found.states.contains_key(&guid(50)) && found.sectors(guid(50))? != old {
                        return Err("what was kept is not what was there".to_owned());
                    }
                    if new.len() as u64 != found.disk_sectors {
                        return Err(format!(
                            "{} sectors, the descriptor says {}",
                            new.len(),
                            found.disk_sectors
                        ));
                    }
                    Ok(())
                })
                .ending(move |view| {
                    let same = view.sectors(Guid::TOP)? == view.sectors(shape.snapshot(0))?;
                    if same { Ok(()) } else { Err("the current state is not the snapshot".to_owned()) }
                }),
        );
    }
}

/// A queue that begins what it was given only when it is let.
struct Late {
    inner: Box<dyn IoQueue>,
    waiting: Vec<IoOp>,
    hold: Arc<AtomicBool>,
}

impl IoQueue for Late {
    fn attach(&mut self, storage: Arc<dyn Storage>) -> io::Result<FileSlot> {
        self.inner.attach(storage)
    }
    fn submit(&mut self, operation: IoOp) -> Result<(), IoOp> {
        self.waiting.push(operation);
        Ok(())
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<IoDone>) -> io::Result<Reaped> {
        if !self.hold.load(Ordering::SeqCst) {
            for operation in self.waiting.drain(..) {
                assert!(self.inner.submit(operation).is_ok(), "the queue is full");
            }
        }
        self.inner.reap(wait, done)
    }
    fn in_flight(&self) -> usize {
        self.waiting.len() + self.inner.in_flight()
    }
    fn waker(&self) -> Waker {
        self.inner.waker()
    }
    fn watch(&mut self, descriptor: Option<RawFd>) -> io::Result<()> {
        self.inner.watch(descriptor)
    }
}

/// The room of the longer table is not touched while a read is on its way to what lay there.
#[test]
fn a_read_that_began_before_the_parent_grows_gets_its_bytes() {
    let start = made(Shape::of(3), &[To(8200), Fill(8190), Snapshot(60), Write(1)]);
    let host = start.disk(4);
    let folder = host.folder();
    let descriptor = DiskDescriptor::load(&folder, None).unwrap();
    let chain = open_state(&folder, &descriptor, Guid::TOP, Access::ReadWrite).unwrap();
    // Held by the parent that has to grow, at the first place behind its table.
    let cluster = GuestCluster(2);
    let place = chain.held_at(1, cluster).unwrap();
    assert!(chain.held_at(2, cluster).is_none() && chain.held_at(3, cluster).is_none());
    assert_eq!(place, chain.delta_geometry(1).data_start());
    let mut expected = vec![0; 4096];
    chain.storage(1).read_exact_at(place.0 + 8192, &mut expected).unwrap();
    assert!(expected.iter().any(|&byte| byte != 0));
    let disk = Disk::open(chain, DiskOptions { manual_flusher: true, ..DiskOptions::default() }).unwrap();
    let hold = Arc::new(AtomicBool::new(true));
    let late =
        Late { inner: QueueChoice::Pool.queue(4).unwrap(), waiting: Vec::new(), hold: Arc::clone(&hold) };
    let mut queue = disk.queue(Box::new(late)).unwrap();
    let at = u64::from(cluster.0) * CLUSTER_SECTORS * 512 + 8192;
    let buffer = Some(IoBuf::try_zeroed(4096).unwrap());
    queue.submit(Request { id: 1, op: Op::Read, extent: Extent::new(at, 4096).unwrap(), buffer });
    let mut ended = Vec::new();
    for _ in 0..5 {
        queue.run(Wait::No, &mut ended).unwrap();
    }
    assert!(ended.is_empty(), "it is on its way");
    let before = disk.chain();
    std::thread::scope(|scope| {
        let merging = scope
            .spawn(|| live::delete(&disk, &Simulated(&folder), &Silent, &live::DeleteOptions::new(guid(1))));
        let deadline = Instant::now() + Duration::from_secs(200);
        while Arc::ptr_eq(&disk.chain(), &before) && !merging.is_finished() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let (header, _) = examine(&*folder.open("delta1.hds", Access::ReadOnly).unwrap()).unwrap();
        let is_grown = header.geometry().disk_sectors() != Sectors(CLUSTERS * CLUSTER_SECTORS);
        let is_replaced = !Arc::ptr_eq(&disk.chain(), &before);
        hold.store(false, Ordering::SeqCst);
        while ended.is_empty() {
            queue.run(Wait::Yes, &mut ended).unwrap();
        }
        let report = merging.join().unwrap();
        assert!(is_replaced && !is_grown, "replaced: {is_replaced}, grown: {is_grown}");
        report.unwrap();
    });
    assert_eq!(ended[0].buffer.as_ref().unwrap().as_slice(), expected);
    drop(queue);
    disk.close().unwrap();
}
