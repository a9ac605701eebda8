//! Compacting closed and running disks: what moves, what is freed, and that the guest sees the same.

use std::sync::Mutex;

use super::*;
use crate::device::DiskOptions;
use crate::extent::Extent;
use crate::io::sim::Random;
use crate::ops::create::{CreateOptions, create};
use crate::ops::open::open;
use crate::ops::progress::Silent;
use crate::units::Sectors;

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u64 = 200;

fn image(folder: &tempfile::TempDir) -> PathBuf {
    let options = CreateOptions {
        cluster: Sectors(CLUSTER / 512),
        ..CreateOptions::new(folder.path(), "root.hds", Sectors(CLUSTERS * CLUSTER / 512))
    };
    create(&options).unwrap().image
}

fn serve(path: &PathBuf) -> Arc<Disk> {
    let opened = open(&OpenOptions::new(path, Access::ReadWrite)).unwrap();
    Disk::open(opened.chain, DiskOptions::default()).unwrap()
}

fn client(disk: &Arc<Disk>) -> Client {
    Client::new(disk, best_io_queue(16).unwrap()).unwrap()
}

fn extent(cluster: u64) -> Extent {
    Extent::new(cluster * CLUSTER, CLUSTER).unwrap()
}

/// What a cluster is filled with.
fn byte_of(cluster: u64) -> u8 {
    u8::try_from(cluster + 1).unwrap()
}

/// A cluster's worth of a byte.
fn whole(byte: u8) -> Vec<u8> {
    vec![byte; usize::try_from(CLUSTER).unwrap()]
}

/// Fills 160 clusters and discards three of four, at random; which are left.
fn fill(disk: &Arc<Disk>) -> Vec<u64> {
    let mut client = client(disk);
    let mut random = Random::new(3);
    let mut left = Vec::new();
    for cluster in 0..160 {
        client.write(cluster * CLUSTER, &whole(byte_of(cluster))).unwrap();
    }
    client.flush().unwrap();
    for cluster in 0..160 {
        if random.chance(25) { left.push(cluster) } else { client.discard(extent(cluster)).unwrap() }
    }
    client.flush().unwrap();
    left
}

fn expect(disk: &Arc<Disk>, left: &[u64]) {
    let mut client = client(disk);
    for cluster in 0..160 {
        let byte = if left.contains(&cluster) { byte_of(cluster) } else { 0 };
        assert!(
            client.read(extent(cluster)).unwrap().as_slice().iter().all(|&found| found == byte),
            "{cluster}"
        );
    }
}

/// Cancels after so many bytes.
struct Until(Mutex<u64>);

impl Progress for Until {
    fn begin(&self, _phase: &str, _total_bytes: u64) {}
    fn advance(&self, bytes: u64) -> Result<()> {
        let mut left = self.0.lock().unwrap();
        *left = left.checked_sub(bytes).ok_or_else(|| Error::new(ErrorKind::Cancelled, "enough"))?;
        Ok(())
    }
}

#[test]
fn a_closed_image_becomes_as_short_as_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let disk = serve(&path);
    let left = fill(&disk);
    disk.close().unwrap();
    drop(disk);
    let options = CompactOptions { path: path.clone(), free_bytes: None };
    // Cancelled it has done a part, is closed, and goes on later.
    let error = compact(&options, &Until(Mutex::new(5 * CLUSTER))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let between = std::fs::metadata(&path).unwrap().len();
    let report = compact(&options, &Silent).unwrap();
    assert!(report.complete && !report.running && report.moved_clusters > 0, "{report:?}");
    assert_eq!(report.file_bytes_before, between);
    assert_eq!(report.file_bytes_after, (1 + left.len() as u64) * CLUSTER);
    assert_eq!(report.allocated_clusters, left.len() as u64);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), report.file_bytes_after);
    assert!(report.host_bytes_after <= report.file_bytes_after + CLUSTER);
    let again = compact(&options, &Silent).unwrap();
    assert_eq!((again.moved_clusters, again.file_bytes_after), (0, report.file_bytes_after));
    let disk = serve(&path);
    assert!(!disk.chain().repairs().was_in_use);
    expect(&disk, &left);
    disk.close().unwrap();
}

#[test]
fn as_much_is_freed_as_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let disk = serve(&path);
    let left = fill(&disk);
    disk.close().unwrap();
    drop(disk);
    let options = CompactOptions { path: path.clone(), free_bytes: Some(20 * CLUSTER) };
    let report = compact(&options, &Silent).unwrap();
    let freed = report.file_bytes_before - report.file_bytes_after;
    assert!((20 * CLUSTER..30 * CLUSTER).contains(&freed), "{report:?}");
    assert!(report.moved_clusters < left.len() as u64 / 2);
    expect(&serve(&path), &left);
}

#[test]
fn a_running_disk_is_compacted_while_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let disk = serve(&path);
    let left = fill(&disk);
    let (first, rest) = left.split_at(left.len() / 2);
    let report = std::thread::scope(|scope| {
        let (disk, path) = (&disk, path.clone());
        // A guest rewrites half of what there is, and takes and frees clusters behind it.
        let writer = scope.spawn(move || {
            let mut client = client(disk);
            for round in 0..30_u64 {
                for &cluster in first {
                    client.write(cluster * CLUSTER + 4096, &[byte_of(cluster); 8192]).unwrap();
                }
                client.write((170 + round % 20) * CLUSTER, &whole(7)).unwrap();
                client.discard(extent(170 + (round + 10) % 20)).unwrap();
                if round % 5 == 0 {
                    client.flush().unwrap();
                }
            }
            (170..190).for_each(|cluster| client.discard(extent(cluster)).unwrap());
            client.flush().unwrap();
        });
        let options = CompactOptions { path, free_bytes: None };
        let error = compact_running(disk, &options, &Until(Mutex::new(8 * CLUSTER))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        compact_running(disk, &options, &Silent).unwrap();
        writer.join().unwrap();
        compact_running(disk, &options, &Silent).unwrap()
    });
    assert!(report.complete && report.running, "{report:?}");
    assert_eq!(report.allocated_clusters, left.len() as u64);
    assert_eq!(report.file_bytes_after, (1 + left.len() as u64) * CLUSTER);
    assert!(!rest.is_empty());
    expect(&disk, &left);
    disk.close().unwrap();
    drop(disk);
    let disk = serve(&path);
    assert!(!disk.chain().repairs().was_in_use);
    expect(&disk, &left);
}

#[test]
fn a_raw_disk_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        mode: crate::format::Mode::Raw,
        ..CreateOptions::new(folder.path(), "root.raw", Sectors(4096))
    };
    create(&options).unwrap();
    let options = CompactOptions { path: folder.path().to_path_buf(), free_bytes: None };
    assert_eq!(compact(&options, &Silent).unwrap_err().kind(), ErrorKind::Parameter);
}
