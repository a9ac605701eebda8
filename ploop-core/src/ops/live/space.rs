//! Gives the space of a removed image back little by little.
//!
//! A host that frees a large file in one go keeps its disk busy meanwhile: where freed space is discarded, with single
//! requests of up to a gibibyte, behind which the guest waits for a third of a second. Therefore an image is held open
//! while it loses its name, and what it has is punched out of it afterwards: in stripes that do not touch each other, so that
//! the host cannot make one large request of them again, and with a sync behind each batch of them, for it is then
//! that they are freed.
//!
//! Nothing depends on this. The file has no name any more; should it be cut, cancelled or fail, the host frees the
//! rest at once, as it always does. It is not begun while reads that began with a former chain may be at the file,
//! nor if the file has another name, for then somebody keeps it, nor if somebody else has it open, who goes on reading what
//! has no name: of programs that lock images the writer's lock says so, and keeps them out as long as it is punched; of a
//! plain `cp` or `tar` the kernel's table of processes does ([`openers`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Bundle;
use super::pace::Pace;
use crate::device::Disk;
use crate::format::DiskDescriptor;
use crate::io::lock::Ownership;
use crate::io::{Allocation, Storage, openers, sys};
use crate::ops::Progress;

/// Bytes that are given back with one request.
const STRIPE_BYTES: u64 = 4 << 20;
/// Bytes between two syncs.
const BATCH_BYTES: u64 = 128 << 20;
/// What the guest gets in between, if it is at work.
const PAUSE: Duration = Duration::from_millis(150);
/// How long reads that began with a former chain may take to end.
const FORMER_READS_MAX: Duration = Duration::from_secs(30);
/// How often they are looked at.
const FORMER_READS_RETRY: Duration = Duration::from_millis(1);

/// Images that are about to lose their names.
pub(super) struct Held(Vec<Arc<dyn Storage>>);

impl Held {
    /// Opens the files that the descriptor says nobody needs. What cannot be opened is freed by the host as it likes.
    pub(super) fn obsolete(bundle: &dyn Bundle, descriptor: &DiskDescriptor) -> Self {
        Self(descriptor.obsolete().filter_map(|file| bundle.keep_image(file)).collect())
    }

    /// Frees what has no name any more. `former` are the same files as a former chain of the disk has them: their locks end.
    pub(super) fn give_back(self, disk: &Disk, former: &[Arc<dyn Storage>], progress: &dyn Progress) {
        let deadline = Instant::now() + FORMER_READS_MAX;
        while !self.0.is_empty() && !disk.former_reads_ended() {
            if Instant::now() > deadline || progress.advance(0).is_err() {
                return;
            }
            std::thread::sleep(FORMER_READS_RETRY);
        }
        // Two locks of one program on one file are in each other's way as any two are.
        if former.iter().any(|image| image.claim(None).is_err()) {
            return;
        }
        let mut pace = Pace::new(disk);
        for image in self.0 {
            // Somebody else reads it.
            if image.claim(Some(Ownership::Writer)).is_err() {
                continue;
            }
            // A failure is none of the merge, which is done.
            let _ = punch_all(&*image, &mut pace, progress);
        }
    }
}

/// Punches everything out of a file that has no name and that no other process has open. `None`: that was not done.
fn punch_all(image: &dyn Storage, pace: &mut Pace<'_>, progress: &dyn Progress) -> Option<()> {
    let file = image.descriptor()?;
    // In this order: what has no name is opened by nobody new.
    if sys::link_count(file).ok()? > 0 || openers::is_open_elsewhere(file).ok()? {
        return None;
    }
    let len = image.len().ok()?;
    let mut unsynced = 0;
    for first in [0, STRIPE_BYTES] {
        let mut at = first;
        while at < len {
            image.allocate(at, STRIPE_BYTES.min(len - at), Allocation::Punch).ok()?;
            at = at.checked_add(2 * STRIPE_BYTES)?;
            unsynced += STRIPE_BYTES;
            if unsynced >= BATCH_BYTES {
                unsynced = 0;
                image.sync_data().ok()?;
                progress.advance(0).ok()?;
                if pace.spares() {
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
    image.sync_data().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::device::{Client, DiskOptions};
    use crate::format::Guid;
    use crate::io::file::{Caching, FileStorage};
    use crate::io::{Access, best_io_queue};
    use crate::ops::live::{
        DeleteOptions, MergeNewOptions, NoWriters, RunningBundle, SnapshotOptions, delete, merge_new,
        snapshot,
    };
    use crate::ops::{self, Silent};
    use crate::units::Sectors;

    fn disk_in(folder: &std::path::Path) -> Arc<Disk> {
        let chain = ops::open(&ops::OpenOptions::new(folder, Access::ReadWrite)).unwrap().chain;
        Disk::open(chain, DiskOptions::default()).unwrap()
    }

    #[test]
    fn only_a_file_without_a_name_is_punched() {
        const LEN: usize = 9 << 20;
        let folder = tempfile::tempdir().unwrap();
        ops::create(&ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(1 << 15))).unwrap();
        let disk = disk_in(folder.path());
        let path = folder.path().join("image");
        let image: Arc<dyn Storage> =
            Arc::new(FileStorage::create_exclusive(&path, Caching::Cached).unwrap());
        assert_eq!(image.write_at(0, &vec![7; LEN]).unwrap(), LEN);
        let mut pace = Pace::new(&disk);
        assert_eq!(punch_all(&*image, &mut pace, &Silent), None);
        let mut found = vec![0; LEN];
        assert_eq!(image.read_at(0, &mut found).unwrap(), LEN);
        assert!(found.iter().all(|byte| *byte == 7));
        std::fs::remove_file(path).unwrap();
        if let Some(process) = openers::hidden_process().unwrap() {
            assert_eq!(punch_all(&*image, &mut pace, &Silent), None, "it could have the file open");
            let why = format!("process {process} may not be looked into, and could have the files open");
            ploop_testing::skip(ploop_testing::Need::Other, why);
            return;
        }
        if punch_all(&*image, &mut pace, &Silent).is_none() {
            ploop_testing::skip(
                ploop_testing::Need::Other,
                "the file system of the temporary folder punches no holes",
            );
            return;
        }
        assert_eq!(image.read_at(0, &mut found).unwrap(), LEN);
        assert!(found.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_merged_image_that_somebody_keeps_by_another_name_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        ops::create(&ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(1 << 15))).unwrap();
        let disk = disk_in(folder.path());
        let bundle = RunningBundle::open(folder.path(), Caching::Direct).unwrap();
        let mut client = Client::new(&disk, best_io_queue(4).unwrap()).unwrap();
        client.write(0, &vec![1; 1 << 20]).unwrap();
        let guid = Guid::random();
        let options = SnapshotOptions { snapshot: Some(guid), ..SnapshotOptions::default() };
        let made = snapshot(&disk, &bundle, &mut NoWriters, &options).unwrap();
        client.write(0, &vec![2; 1 << 20]).unwrap();
        let kept = folder.path().join("kept");
        std::fs::hard_link(folder.path().join(&made.file), &kept).unwrap();
        client.flush().unwrap();
        let before = std::fs::read(&kept).unwrap();
        delete(&disk, &bundle, &Silent, &DeleteOptions::new(guid)).unwrap();
        assert!(!folder.path().join(&made.file).exists());
        assert!(std::fs::read(&kept).unwrap() == before);
    }
    /// Whether the file system of a folder can make holes.
    fn punches(folder: &std::path::Path) -> bool {
        let path = folder.join("probe");
        let probe = FileStorage::create_exclusive(&path, Caching::Cached).unwrap();
        std::fs::remove_file(path).unwrap();
        probe.allocate(0, 4096, Allocation::Punch).is_ok()
    }

    #[test]
    fn who_copies_a_file_without_a_lock_copies_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        ops::create(&ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(1 << 15))).unwrap();
        let disk = disk_in(folder.path());
        let bundle = RunningBundle::open(folder.path(), Caching::Direct).unwrap();
        let mut client = Client::new(&disk, best_io_queue(4).unwrap()).unwrap();
        client.write(0, &vec![1; 1 << 20]).unwrap();
        let first = snapshot(&disk, &bundle, &mut NoWriters, &SnapshotOptions::default()).unwrap();
        client.write(0, &vec![2; 1 << 20]).unwrap();
        let second = snapshot(&disk, &bundle, &mut NoWriters, &SnapshotOptions::default()).unwrap();
        let path = folder.path().join("disk.hds");
        let before = std::fs::read(&path).unwrap();
        let mut copied = std::fs::File::open(&path).unwrap();
        let mut copying = std::process::Command::new("sleep")
            .arg("600")
            .stdin(copied.try_clone().unwrap())
            .spawn()
            .unwrap();
        let done = merge_new(
            &disk,
            &bundle,
            &Silent,
            &MergeNewOptions::new(first.snapshot, second.snapshot, "new.hds"),
        );
        let mut after = Vec::new();
        let read = std::io::Read::read_to_end(&mut copied, &mut after);
        copying.kill().unwrap();
        copying.wait().unwrap();
        done.unwrap();
        read.unwrap();
        assert!(!path.exists() && after == before);
    }

    #[test]
    fn files_that_nobody_has_are_empty_before_they_end() {
        let folder = tempfile::tempdir().unwrap();
        if !punches(folder.path()) {
            ploop_testing::skip(
                ploop_testing::Need::Other,
                "the file system of the temporary folder punches no holes",
            );
            return;
        }
        if let Some(process) = openers::hidden_process().unwrap() {
            ploop_testing::skip(
                ploop_testing::Need::Other,
                format!("process {process} may not be looked into, and could have the files open"),
            );
            return;
        }
        ops::create(&ops::create::CreateOptions::new(folder.path(), "disk.hds", Sectors(1 << 15))).unwrap();
        let disk = disk_in(folder.path());
        let bundle = RunningBundle::open(folder.path(), Caching::Direct).unwrap();
        let mut client = Client::new(&disk, best_io_queue(4).unwrap()).unwrap();
        // Not locked: nobody's disk.
        let mut files = vec![std::fs::File::open(folder.path().join("disk.hds")).unwrap()];
        let mut snapshots = Vec::new();
        for value in 1..4 {
            client.write(0, &vec![value; 1 << 20]).unwrap();
            let made = snapshot(&disk, &bundle, &mut NoWriters, &SnapshotOptions::default()).unwrap();
            files.push(std::fs::File::open(folder.path().join(&made.file)).unwrap());
            snapshots.push(made.snapshot);
        }
        let ended = || {
            let ended: Vec<_> =
                files.iter().map(|file| file.metadata().unwrap()).filter(|file| file.nlink() == 0).collect();
            assert!(ended.iter().all(|file| file.blocks() == 0));
            ended.len()
        };
        assert_eq!(ended(), 0);
        merge_new(&disk, &bundle, &Silent, &MergeNewOptions::new(snapshots[0], snapshots[1], "new.hds"))
            .unwrap();
        assert_eq!(ended(), 2);
        // What stands on it goes, which is the running top.
        delete(&disk, &bundle, &Silent, &DeleteOptions::new(snapshots[2])).unwrap();
        assert_eq!(ended(), 3);
    }
}
