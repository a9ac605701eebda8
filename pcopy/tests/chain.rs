//! Copies delta by delta: every state of the disk arrives with its name and its content, whatever is written meanwhile;
//! after a failure anywhere in the stream there is nothing, and the next attempt succeeds.
//!
//! `PLOOP_CHAIN_SEEDS` sets the number of random trees of each kind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod support;

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pcopy::memory::{Fault, MemoryDestination, MemoryDisk, MemorySnapshots, Outcome};
use pcopy::source::DiskSource;
use pcopy::source_chain::BundleSnapshots;
use pcopy::stats::PassKind;
use pcopy::target::{ImageDestination, ImageOptions};
use pcopy::wire::{FrameReader, ImageKind, Kind};
use pcopy::{Event, Link, NothingToQuiesce, ReceiveOptions, Silent};
use ploop_core::format::{DESCRIPTOR_NAME, Guid, Mode};
use ploop_core::io::Access;
use ploop_core::io::file::Caching;
use ploop_core::ops::create::CreateOptions;
use ploop_core::ops::live::{self, NoWriters, RunningBundle};
use ploop_core::ops::snapshot_list;
use ploop_core::units::Sectors;
use ploop_core::{ErrorKind, Extent};
use support::*;

const STALL: Duration = Duration::from_secs(30);
const LEN: u64 = 6 << 20;

fn seeds() -> u64 {
    std::env::var("PLOOP_CHAIN_SEEDS").ok().and_then(|value| value.parse().ok()).unwrap_or(4)
}

/// Frozen states, each with what it stands on; what the current one stands on, and its content.
type Tree = (Vec<(Option<u32>, Vec<u8>)>, u32, Vec<u8>);

/// A tree of random states in memory, and the current one.
fn tree(seed: u64) -> Tree {
    let mut random = Random(seed);
    let mut states = vec![(None, content(seed, LEN as usize))];
    let change = |below: &[u8], random: &mut Random| {
        let mut bytes = below.to_vec();
        for _ in 0..6 {
            let count = 512 * (1 + random.below(600)) as usize;
            let at = 512 * random.below((LEN - count as u64) / 512) as usize;
            // Zeros over data, too.
            bytes[at..at + count].fill(random.below(3) as u8);
        }
        bytes
    };
    for number in 1..=2 + random.below(3) {
        let parent = random.below(number) as u32;
        let bytes = change(&states[parent as usize].1, &mut random);
        states.push((Some(parent), bytes));
    }
    let on = random.below(states.len() as u64) as u32;
    let current = change(&states[on as usize].1, &mut random);
    (states, on, current)
}

#[test]
fn every_state_arrives_while_the_current_one_is_written_to() {
    for seed in 0..seeds() {
        let two_way = seed % 2 == 0;
        let (states, on, current) = tree(seed);
        let disk = MemoryDisk::on(states[on as usize].1.clone(), current);
        let mut snapshots = MemorySnapshots::new(states.clone(), on);
        let writer = Writer::start(&disk, LEN, seed, Duration::from_micros(300));
        let mut quiesce = TestQuiesce::new(&disk, Some(&writer));
        let mut destination = MemoryDestination::new();
        let source = &mut disk.clone();
        let events = RefCell::new(Vec::new());
        let sent = {
            let both = copy_chain_in_place((&mut snapshots, source), &mut quiesce, &mut destination, two_way);
            assert_eq!(both.1.as_ref().unwrap().deltas, states.len() as u32 + 1, "seed {seed}");
            let received = both.1.unwrap();
            assert_eq!(received.verified_bytes, received.data_bytes + received.zero_bytes);
            events.borrow_mut().extend(both.2);
            both.0.unwrap()
        };
        assert!(writer.is_alive());
        assert_eq!((quiesce.freezes, quiesce.thaws), (1, 1));
        assert_eq!(sent.committed, two_way);
        // Each frozen delta was read in one pass, before all others, and never again.
        let deltas = sent.passes.iter().take_while(|pass| pass.kind == PassKind::Delta).count();
        assert_eq!(deltas, states.len());
        assert!(sent.passes[deltas..].iter().all(|pass| pass.kind != PassKind::Delta));
        assert_eq!(sent.passes[deltas].kind, PassKind::First);
        assert_eq!(*events.borrow(), (1..=states.len() as u32 + 1).collect::<Vec<_>>());
        let arrived = destination.deltas();
        assert_eq!(arrived.len(), states.len() + 1);
        for (index, (delta, content)) in arrived.iter().enumerate() {
            let parent = states.get(index).map_or(Some(on), |state| state.0);
            assert_eq!((delta.index as usize, delta.parent), (index, parent));
            assert_eq!(delta.guid, [index as u8 + 1; 16]);
            let expected = states.get(index).map(|state| &state.1).or(quiesce.snapshot.as_ref()).unwrap();
            assert!(content == expected, "seed {seed}: state {index}");
        }
        drop(writer);
        assert!(!disk.is_tracked());
        let (closed, opened) = disk.gate_moves();
        assert_eq!(closed, opened);
        disk.write(0, &[1; 512]);
    }
}

/// The reports of both sides and the deltas that the sender told of.
fn copy_chain_in_place<D: pcopy::Destination + Send>(
    (snapshots, source): (&mut MemorySnapshots, &mut MemoryDisk),
    quiesce: &mut dyn pcopy::Quiesce,
    destination: &mut D,
    two_way: bool,
) -> (ploop_core::Result<pcopy::SendReport>, ploop_core::Result<pcopy::ReceiveReport>, Vec<u32>) {
    let told = std::sync::Mutex::new(Vec::new());
    let observer = |event: &Event| {
        if let Event::DeltaStarted { delta, .. } = event {
            told.lock().unwrap().push(*delta);
        }
    };
    let options = send_options(STALL);
    let both =
        copy_chain((snapshots, source), quiesce, destination, ends(two_way, false), &options, &observer);
    (both.sent, both.received, told.into_inner().unwrap())
}

/// A state, what it stands on, whether it is the current one, its mark, when it was taken, and its content.
type State = (Guid, Guid, bool, Option<&'static str>, Option<u64>, Vec<u8>);

/// What a disk is like in all its states.
fn states_of(folder: &Path) -> Vec<State> {
    let list = snapshot_list(folder).unwrap();
    list.states
        .into_iter()
        .map(|state| {
            let content = content_of_state(folder, state.uuid);
            // That of the current one is when it was last written to.
            let time = state.modified_unix_seconds.filter(|_| !state.current);
            (state.uuid, state.parent_uuid, state.current, state.transition, time, content)
        })
        .collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lck"))
        .collect();
    names.sort();
    names
}

type Adjust = fn(&mut CreateOptions);

#[test]
fn image_files_with_a_branch_become_an_equal_tree_of_image_files() {
    let kinds: [Adjust; 5] = [
        |options| options.cluster = Sectors(2048),
        |options| options.cluster = Sectors(64),
        |options| (options.cluster, options.mode) = (Sectors(128), Mode::Raw),
        |options| (options.cluster, options.mode) = (Sectors(256), Mode::Preallocated),
        |options| (options.cluster, options.version) = (Sectors(128), ploop_core::format::Version::V1),
    ];
    for (seed, adjust) in (0u64..).zip(kinds) {
        let two_way = seed % 2 == 1;
        let root = referee::folder();
        let from = root.path().join("from");
        disk_with_snapshots(&from, LEN, seed, adjust);
        // Frozen deltas as the source has them; the current state changes.
        let before = states_of(&from);
        let served = Served::open(&from, None, Access::ReadWrite);
        let chain = served.disk.chain();
        assert_eq!(chain.depth(), 3);
        let mut snapshots = BundleSnapshots::open(&from.join(DESCRIPTOR_NAME), &chain).unwrap();
        drop(chain);
        let mut source = DiskSource::delta(&served.disk).unwrap();
        let writer = Writer::start(&served, LEN, seed, Duration::from_micros(500));
        let mut quiesce = TestQuiesce::new(&served, Some(&writer));
        let to = root.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        // Discards over what the deltas below hold must arrive as zeros.
        let wipe = served.client.clone();
        let observer = move |event: &Event| {
            if let Event::PassEnded(pass) = event
                && pass.kind == PassKind::First
            {
                let half = Extent::between(LEN / 3 / 512 * 512, LEN / 2);
                wipe.lock().unwrap().discard(half).unwrap();
            }
        };
        let options = send_options(STALL);
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut quiesce,
            &mut destination,
            ends(two_way, false),
            &options,
            &observer,
        );
        let received = both.received.unwrap();
        assert_eq!(both.sent.unwrap().deltas, 5);
        assert_eq!(received.deltas, 5);
        assert_eq!(received.verified_bytes, received.data_bytes + received.zero_bytes);
        assert!(writer.is_alive());
        drop((writer, source, snapshots, observer));
        let frozen = quiesce.snapshot.take().unwrap();
        drop(quiesce);
        served.close();
        assert_eq!(names(&to).len(), 6, "{:?}", names(&to));
        assert!(names(&to).contains(&"copy.hds".to_owned()));
        let arrived = states_of(&to);
        assert_eq!(arrived.len(), before.len());
        for (mut before, arrived) in before.into_iter().zip(arrived) {
            if before.2 {
                before.5.clone_from(&frozen);
            }
            let what = (before.0, before.1, before.2, before.3, before.4);
            assert_eq!((arrived.0, arrived.1, arrived.2, arrived.3, arrived.4), what, "kind {seed}");
            assert!(arrived.5 == before.5, "kind {seed}: {} differs", before.0);
        }
        // The copy is a disk like any other: it can be written to.
        let copy = Served::open(&to, None, Access::ReadWrite);
        copy.write(4096, &[9; 512]);
        copy.close();
    }
}

#[test]
fn what_is_in_the_way_is_refused_before_anything_is_written() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_with_snapshots(&from, LEN, 7, |_| {});
    let receive = |to: &Path, options: ImageOptions| {
        let (mut snapshots, mut source) = BundleSnapshots::open_closed(&from).unwrap();
        let mut destination = ImageDestination::new(to, options).unwrap();
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut NothingToQuiesce,
            &mut destination,
            ends(true, false),
            &send_options(STALL),
            &Silent,
        );
        let (sent, received) = (both.sent.err(), both.received.err());
        assert_eq!(sent.as_ref().map(|error| error.kind()), received.as_ref().map(|error| error.kind()));
        received.map(|error| error.kind())
    };
    let to = root.path().join("to");
    std::fs::create_dir(&to).unwrap();
    for options in [
        ImageOptions { image: Some(ImageKind::Raw), ..ImageOptions::default() },
        ImageOptions { version: Some(2), ..ImageOptions::default() },
        ImageOptions { cluster_sectors: Some(64), ..ImageOptions::default() },
    ] {
        assert_eq!(receive(&to.join("a.hds"), options), Some(ErrorKind::Parameter));
    }
    let plain = ImageOptions::default();
    std::fs::write(to.join("a.hds"), b"precious").unwrap();
    assert_eq!(receive(&to.join("a.hds"), plain), Some(ErrorKind::Create));
    std::fs::remove_file(to.join("a.hds")).unwrap();
    std::fs::write(to.join(DESCRIPTOR_NAME), b"<no descriptor").unwrap();
    assert_eq!(receive(&to.join("a.hds"), plain), Some(ErrorKind::Create));
    std::fs::remove_file(to.join(DESCRIPTOR_NAME)).unwrap();
    assert!(names(&to).is_empty());
    // Left-overs of killed ones go, whatever else there is stays.
    std::fs::write(to.join(format!("a.hds.incoming-{}-12", "0b".repeat(16))), vec![1; 5000]).unwrap();
    std::fs::write(to.join(format!("a.hds.incoming-{}-notes", "0b".repeat(16))), b"mine").unwrap();
    assert_eq!(receive(&to.join("a.hds"), plain), None);
    assert_eq!(names(&to).len(), 7);
    assert!(names(&to).iter().any(|name| name.ends_with("-notes")));
}

/// A one-way stream of a small tree with nothing written to meanwhile, and where its frames begin.
fn recorded(from: &Path) -> (Vec<u8>, Vec<(Kind, usize, usize)>) {
    let (mut snapshots, mut source) = BundleSnapshots::open_closed(from).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let (write, read) = pair(false);
    let reading = std::thread::spawn({
        let mut copy = file.reopen().unwrap();
        move || std::io::copy(&mut std::fs::File::from(read), &mut copy).unwrap()
    });
    let link = Link { input: None, output: Some(write) };
    pcopy::send_chain(
        &mut snapshots,
        &mut source,
        &mut NothingToQuiesce,
        link,
        &send_options(STALL),
        &Silent,
    )
    .unwrap();
    reading.join().unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    let mut frames = Vec::new();
    let mut reader = FrameReader::new(&bytes[..]);
    loop {
        let at = reader.position() as usize;
        let Some(header) = reader.header().unwrap() else { break };
        reader.payload(&mut vec![0; header.length as usize]).unwrap();
        frames.push((header.kind, at, reader.position() as usize));
    }
    (bytes, frames)
}

/// Receives those bytes into an image in `to`: how that went.
fn play(bytes: &[u8], to: &Path) -> Option<ErrorKind> {
    let (write, read) = pair(true);
    let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
    let bytes = bytes.to_vec();
    let writing = std::thread::spawn(move || {
        // The receiver may give up before the end.
        let _ = std::io::Write::write_all(&mut std::fs::File::from(write), &bytes);
    });
    let link = Link { input: Some(read), output: None };
    let options = ReceiveOptions { stall_timeout: STALL, ..ReceiveOptions::default() };
    let received = pcopy::receive(link, &mut destination, &options, &Silent);
    writing.join().unwrap();
    received.err().map(|error| error.kind())
}

#[test]
fn a_cut_or_a_flipped_bit_at_any_frame_leaves_nothing() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_with_snapshots(&from, 2 << 20, 9, |options| options.cluster = Sectors(128));
    let (bytes, frames) = recorded(&from);
    let to = root.path().join("to");
    std::fs::create_dir(&to).unwrap();
    let mut random = Random(3);
    // Every frame of the kinds that make the tree, and some of the others.
    let chosen: Vec<_> = frames
        .iter()
        .filter(|frame| match frame.0 {
            Kind::Data => random.below(12) == 0,
            _ => true,
        })
        .collect();
    for kind in [Kind::Hello, Kind::Delta, Kind::Data, Kind::Zero, Kind::EndPass, Kind::EndDelta, Kind::Seal]
    {
        assert!(chosen.iter().any(|frame| frame.0 == kind), "no {kind:?} among the chosen frames");
    }
    for (kind, start, end) in chosen {
        let inside = start + random.below((end - start) as u64) as usize;
        for cut in [*start, inside, end - 1] {
            let found = play(&bytes[..cut], &to);
            assert_eq!(found, Some(ErrorKind::Read), "cut in {kind:?} at {cut}");
            assert!(names(&to).is_empty(), "{:?} after a cut in {kind:?}", names(&to));
        }
        let mut flipped = bytes.clone();
        let at = start + random.below((end - start) as u64) as usize;
        flipped[at] ^= 1 << random.below(8);
        assert_eq!(play(&flipped, &to), Some(ErrorKind::Protocol), "flipped in {kind:?} at {at}");
        assert!(names(&to).is_empty(), "{:?} after a flip in {kind:?}", names(&to));
    }
    assert_eq!(play(&bytes, &to), None);
    let (expected, arrived) = (states_of(&from), states_of(&to));
    assert!(expected == arrived);
}

/// A frame that is right by itself, in another place: deltas swapped, left out, doubled.
#[test]
fn frames_in_another_order_are_refused() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_with_snapshots(&from, 2 << 20, 10, |_| {});
    let (bytes, frames) = recorded(&from);
    let to = root.path().join("to");
    std::fs::create_dir(&to).unwrap();
    let deltas: Vec<_> = frames.iter().filter(|frame| frame.0 == Kind::Delta).collect();
    let (second, third) = (deltas[1], deltas[2]);
    let without = [&bytes[..second.1], &bytes[third.1..]].concat();
    let doubled = [&bytes[..third.1], &bytes[second.1..]].concat();
    for changed in [without, doubled] {
        assert_eq!(play(&changed, &to), Some(ErrorKind::Protocol));
        assert!(names(&to).is_empty());
    }
}

#[test]
fn a_silent_line_is_left_after_the_time_out_wherever_it_falls_silent() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_with_snapshots(&from, 2 << 20, 11, |_| {});
    let (_, frames) = recorded(&from);
    let mut kinds = Vec::new();
    for (index, (kind, start, _)) in frames.iter().enumerate() {
        // The first of each kind but the seal, whose place in another stream is not quite the same.
        if kinds.contains(kind) || *kind == Kind::Seal {
            continue;
        }
        kinds.push(*kind);
        let to = root.path().join(format!("to-{index}"));
        std::fs::create_dir(&to).unwrap();
        let (mut snapshots, mut source) = BundleSnapshots::open_closed(&from).unwrap();
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        let (near, far) = (ends(true, false), ends(true, false));
        let stall = Duration::from_millis(400);
        let trouble = Trouble::Stall(*start as u64);
        let stream =
            carry(near.receiver.input.unwrap(), far.sender.output.unwrap(), trouble, Random(1), stall * 4);
        let answers = carry(
            far.sender.input.unwrap(),
            near.receiver.output.unwrap(),
            Trouble::None,
            Random(2),
            stall * 4,
        );
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut NothingToQuiesce,
            &mut destination,
            Ends { sender: near.sender, receiver: far.receiver },
            &send_options(stall),
            &Silent,
        );
        assert!(both.sent.is_err() && both.received.is_err(), "silent before {kind:?}");
        stream.join().unwrap();
        answers.join().unwrap();
        assert!(names(&to).is_empty(), "{:?} after silence before {kind:?}", names(&to));
    }
    assert!(kinds.contains(&Kind::EndDelta) && kinds.contains(&Kind::Delta));
}

/// Answers that end or are damaged anywhere: there is a copy or there is none, and a sender that failed knows of none or says
/// that it does not know.
#[test]
fn trouble_in_the_answers_leaves_a_whole_copy_or_none() {
    let root = referee::folder();
    let from = root.path().join("from");
    disk_with_snapshots(&from, 2 << 20, 15, |_| {});
    let expected = states_of(&from);
    let mut trials = vec![Trouble::None];
    let mut answer_bytes = 0;
    let mut number = 0;
    while let Some(trouble) = trials.pop() {
        number += 1;
        let to = root.path().join(format!("to-{number}"));
        std::fs::create_dir(&to).unwrap();
        let (mut snapshots, mut source) = BundleSnapshots::open_closed(&from).unwrap();
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        let (near, far) = (ends(true, false), ends(true, false));
        let stream =
            carry(near.receiver.input.unwrap(), far.sender.output.unwrap(), Trouble::None, Random(1), STALL);
        let answers =
            carry(far.sender.input.unwrap(), near.receiver.output.unwrap(), trouble, Random(2), STALL);
        let both = copy_chain(
            (&mut snapshots, &mut source),
            &mut NothingToQuiesce,
            &mut destination,
            Ends { sender: near.sender, receiver: far.receiver },
            &send_options(STALL),
            &Silent,
        );
        let (sent, received) = (both.sent.err(), both.received.err());
        let what = format!("{trouble:?}: sender {sent:?}, receiver {received:?}");
        stream.join().unwrap();
        let carried = answers.join().unwrap();
        if trouble == Trouble::None {
            assert!(sent.is_none() && received.is_none(), "{what}");
            answer_bytes = carried;
            // Few come before the end; there every byte may decide.
            let tail = (0..200).step_by(23).map(|back| answer_bytes.saturating_sub(back));
            trials.extend(tail.flat_map(|at| [Trouble::Cut(at.max(1) - 1), Trouble::Flip(at.max(1) - 1, 2)]));
            trials.extend([Trouble::Cut(30), Trouble::Flip(70, 1), Trouble::Cut(answer_bytes / 2)]);
        }
        match received {
            None => {
                assert!(states_of(&to) == expected, "{what}");
                let kind = sent.as_ref().map(|error| error.kind());
                assert!(matches!(kind, None | Some(ErrorKind::OutcomeUnknown)), "{what}");
            }
            Some(_) => {
                assert!(sent.is_some() && names(&to).is_empty(), "{what}: {:?}", names(&to));
            }
        }
        // The judge would look at each of them.
        std::fs::remove_dir_all(&to).unwrap();
    }
    assert!(answer_bytes > 400 && number > 15);
}

#[test]
fn a_receiver_that_fails_at_any_step_is_heard_and_nothing_is_there() {
    let mut faults: Vec<Fault> = (0..4).map(Fault::BeginDelta).collect();
    faults.extend((0..3).map(Fault::EndDelta));
    faults.extend([1, 30].map(Fault::Write));
    faults.extend([1, 30].map(Fault::WrongWrite));
    faults.extend((1..6).map(Fault::Sync));
    faults.push(Fault::Commit);
    let base = content(1, LEN as usize);
    let mut one = base.clone();
    one[..1 << 20].fill(3);
    let mut two = one.clone();
    two[1 << 20..2 << 20].fill(0);
    let states = vec![(None, base), (Some(0), one.clone()), (Some(1), two.clone())];
    for fault in faults {
        let mut snapshots = MemorySnapshots::new(states.clone(), 2);
        let mut disk = MemoryDisk::on(two.clone(), one.clone());
        let mut quiesce = TestQuiesce::new(&disk, None);
        let mut destination = MemoryDestination::with_fault(fault);
        let (sent, received, _) =
            copy_chain_in_place((&mut snapshots, &mut disk), &mut quiesce, &mut destination, true);
        let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
        assert_eq!(sent.kind(), received.kind(), "{fault:?}: {sent}; {received}");
        assert_eq!(destination.outcome(), Outcome::Nothing, "{fault:?}");
        assert_eq!(quiesce.freezes, quiesce.thaws, "{fault:?}");
        let (closed, opened) = disk.gate_moves();
        assert!(closed == opened && !disk.is_tracked(), "{fault:?}");
    }
}

#[test]
fn snapshots_that_change_meanwhile_end_the_copy_and_the_writers_go_on() {
    for at in [PassKind::Delta, PassKind::First, PassKind::Frozen] {
        for two_way in [true, false] {
            let (states, on, current) = tree(5);
            let mut disk = MemoryDisk::on(states[on as usize].1.clone(), current);
            let mut snapshots = MemorySnapshots::new(states, on);
            let changed = snapshots.changed();
            let mut quiesce = TestQuiesce::new(&disk, None);
            let mut destination = MemoryDestination::new();
            let observer = |event: &Event| {
                if matches!(event, Event::PassEnded(pass) if pass.kind == at) {
                    changed.store(true, Ordering::SeqCst);
                }
            };
            let both = copy_chain(
                (&mut snapshots, &mut disk),
                &mut quiesce,
                &mut destination,
                ends(two_way, false),
                &send_options(STALL),
                &observer,
            );
            assert_eq!(both.sent.unwrap_err().kind(), ErrorKind::Busy, "{at:?}");
            assert_eq!(both.received.unwrap_err().kind(), ErrorKind::Busy, "{at:?}: the sender says why");
            assert_eq!(destination.outcome(), Outcome::Nothing);
            assert_eq!(quiesce.freezes, quiesce.thaws);
            assert!(!disk.is_tracked());
        }
    }
}

#[test]
fn frozen_images_are_kept_from_commands_that_would_change_them() {
    use ploop_core::ops::{self, DeleteOptions, SnapshotOptions, SwitchOptions};
    let root = referee::folder();
    let from = root.path().join("from");
    let guids = disk_with_snapshots(&from, LEN, 12, |_| {});
    let wait = Duration::from_millis(100);
    let before = snapshot_list(&from).unwrap();
    let (snapshots, source) = BundleSnapshots::open_closed(&from).unwrap();
    // A leaf that the current state does not stand on.
    for guid in [guids[3], guids[0]] {
        let deleted = ops::delete(&from, &DeleteOptions { snapshot: guid }, wait, &ops::Silent);
        assert_eq!(deleted.unwrap_err().kind(), ErrorKind::InUse, "deleting {guid}");
    }
    let options = SwitchOptions { snapshot: guids[0], keep: None };
    let switched = ops::switch(&from, &options, wait, &ops::Silent);
    assert_eq!(switched.unwrap_err().kind(), ErrorKind::InUse, "a switch");
    assert_eq!(snapshot_list(&from).unwrap().states.len(), before.states.len());
    pcopy::Snapshots::check(&snapshots).unwrap();
    // A snapshot changes no image that is there: it is made, and the copy is told.
    ops::snapshot(&from, &SnapshotOptions::default(), wait, &ops::Silent).unwrap();
    assert_eq!(pcopy::Snapshots::check(&snapshots).unwrap_err().kind(), ErrorKind::Busy);
    drop((snapshots, source));
    ops::delete(&from, &DeleteOptions { snapshot: guids[3] }, wait, &ops::Silent).unwrap();
}

#[test]
fn a_mounted_snapshot_is_not_the_disk() {
    let root = referee::folder();
    let from = root.path().join("from");
    let guids = disk_with_snapshots(&from, LEN, 13, |_| {});
    let options = ploop_core::ops::OpenOptions {
        snapshot: Some(guids[2]),
        ..ploop_core::ops::OpenOptions::new(&from, Access::ReadOnly)
    };
    let opened = ploop_core::ops::open(&options).unwrap();
    let refused = BundleSnapshots::open(&from.join(DESCRIPTOR_NAME), &opened.chain).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.advice().is_some());
    let image = BundleSnapshots::open_closed(&from.join("root.hds")).err().unwrap();
    assert_eq!(image.kind(), ErrorKind::Parameter, "an image has no snapshots: {image}");
}

/// The disk gets another chain while its content is copied: what is written then is in images that were not there when
/// the copy began.
#[test]
fn a_snapshot_during_a_copy_of_the_content_loses_nothing() {
    for two_way in [true, false] {
        let root = referee::folder();
        let from = root.path().join("from");
        let served = new_disk(&from, LEN, 14, |options| options.cluster = Sectors(128));
        let to = root.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let mut source = DiskSource::new(&served.disk).unwrap();
        let mut destination = ImageDestination::new(&to.join("copy.hds"), ImageOptions::default()).unwrap();
        let mut quiesce = TestQuiesce::new(&served, None);
        let running = served.clone();
        let observer = |event: &Event| {
            if matches!(event, Event::PassEnded(pass) if pass.kind == PassKind::First) {
                let bundle = RunningBundle::open(&from, Caching::Direct).unwrap();
                let options = live::SnapshotOptions::default();
                live::snapshot(&running.disk, &bundle, &mut NoWriters, &options).unwrap();
                // Where there was something, and where there was nothing.
                for at in (0..LEN).step_by(64 << 10) {
                    running.write(at, &[0x5a; 1024]);
                }
            }
        };
        let both = copy_observed(
            &mut source,
            &mut quiesce,
            &mut destination,
            ends(two_way, false),
            &send_options(STALL),
            &observer,
        );
        both.sent.unwrap();
        both.received.unwrap();
        assert!(content_of(&to, None) == quiesce.snapshot.take().unwrap(), "two-way {two_way}");
        drop((source, quiesce, running));
        served.close();
    }
}
