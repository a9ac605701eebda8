//! The server spoken to as the kernel would, over a socket pair that keeps messages apart. No privileges needed.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};

use super::super::wire;
use super::*;
use crate::device::{DiskOptions, OnFull};
use crate::format::{Chain, ChainOptions, CreateOptions, Geometry, Source, Version, create_image};
use crate::io::file::{Caching, FileStorage};
use crate::io::sim::{Call, Fault, SimDisk};
use crate::io::{Access, Storage};
use crate::units::Sectors;

const DISK: u64 = 8 << 20;
const CLUSTER: u64 = 64 << 10;

/// The kernel's side.
struct Kernel {
    socket: OwnedFd,
    serving: Option<Serving>,
    disk: Arc<Disk>,
    survivor: Arc<Survivor>,
    _folder: tempfile::TempDir,
}

/// An answer: its number, error number, and body.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    unique: u64,
    errno: i32,
    body: Vec<u8>,
}

impl Kernel {
    fn new(options: &ServerOptions, read_only: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.hds");
        let storage = Arc::new(FileStorage::create_exclusive(&path, Caching::Cached).unwrap());
        let disk_options = DiskOptions { read_only, ..DiskOptions::default() };
        Self::over(storage, folder, options, disk_options)
    }

    /// Over a new image in an empty file.
    fn over(
        storage: Arc<dyn Storage>,
        folder: tempfile::TempDir,
        options: &ServerOptions,
        disk_options: DiskOptions,
    ) -> Self {
        let geometry = Geometry::new(Version::V2, Sectors(CLUSTER / 512), Sectors(DISK / 512)).unwrap();
        create_image(&*storage, &CreateOptions { geometry, preallocated: false }).unwrap();
        let access = if disk_options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let sources = vec![Source { name: "disk.hds".into(), storage, raw: false }];
        let chain =
            Chain::open(sources, &ChainOptions { access, raw_cluster: None, accept_in_use: false }).unwrap();
        let survivor = Arc::new(Survivor::create().unwrap());
        let disk_options = DiskOptions { pending_log: Arc::clone(&survivor) as _, ..disk_options };
        let disk = Disk::open(chain, disk_options).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        for end in [&socket, &other] {
            setsockopt(end, sockopt::SndBuf, &(4 << 20)).unwrap();
        }
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&other, flags).unwrap();
        let serving =
            Serving::start(FuseDevice::new(other), Arc::clone(&disk), Arc::clone(&survivor), options)
                .unwrap();
        Self { socket, serving: Some(serving), disk, survivor, _folder: folder }
    }

    fn send(&self, unique: u64, code: u32, arguments: &[u8], payload: &[u8]) {
        let total = 40 + arguments.len() + payload.len();
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(total).unwrap().to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(unique.to_ne_bytes());
        bytes.extend(wire::ROOT_NODE.to_ne_bytes());
        bytes.resize(40, 0);
        bytes.extend(arguments);
        bytes.extend(payload);
        assert_eq!(send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap(), bytes.len());
    }

    fn receive(&self) -> Reply {
        let mut bytes = vec![0; 2 << 20];
        let length = recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        let number = |at: usize| i32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(usize::try_from(number(0)).unwrap(), length);
        let unique = u64::from_ne_bytes(bytes[8..16].try_into().unwrap());
        Reply { unique, errno: -number(4), body: bytes[16..length].to_vec() }
    }

    fn ask(&self, code: u32, arguments: &[u8], payload: &[u8]) -> (i32, Vec<u8>) {
        self.send(77, code, arguments, payload);
        let reply = self.receive();
        assert_eq!(reply.unique, 77);
        (reply.errno, reply.body)
    }

    fn write(&self, offset: u64, payload: &[u8]) -> (i32, Vec<u8>) {
        self.ask(16, &transfer(offset, payload.len()), payload)
    }

    fn read(&self, offset: u64, size: usize) -> (i32, Vec<u8>) {
        self.ask(15, &transfer(offset, size), &[])
    }

    fn allocate(&self, offset: u64, length: u64, mode: u32) -> i32 {
        self.ask(43, &words(&[0, offset, length, u64::from(mode)]), &[]).0
    }

    fn seek(&self, offset: u64, whence: u32) -> std::result::Result<u64, i32> {
        match self.ask(46, &words(&[0, offset, u64::from(whence)]), &[]) {
            (0, body) => Ok(u64::from_ne_bytes(body.try_into().unwrap())),
            (errno, _) => Err(errno),
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.stop();
            serving.wait().unwrap();
        }
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The arguments of READ and WRITE.
fn transfer(offset: u64, size: usize) -> Vec<u8> {
    words(&[0, offset, size as u64, 0, 0])
}

fn kernel() -> Kernel {
    Kernel::new(&ServerOptions::default(), false)
}

#[test]
fn what_is_agreed_is_remembered_before_it_is_told() {
    let kernel = kernel();
    let mut arguments = vec![0; 64];
    arguments[..4].copy_from_slice(&7u32.to_ne_bytes());
    arguments[4..8].copy_from_slice(&39u32.to_ne_bytes());
    arguments[12..20].fill(0xff);
    let (errno, body) = kernel.ask(26, &arguments, &[]);
    assert_eq!((errno, body.len()), (0, 64));
    let agreement = kernel.survivor.legacy().unwrap().agreement.unwrap();
    assert!(agreement.can_resend());
    assert_eq!(body, wire::init_reply(&agreement));
}

#[test]
fn bytes_written_are_read_back_with_any_alignment() {
    let kernel = kernel();
    let payload: Vec<u8> = (0..150_000u32).flat_map(u32::to_le_bytes).take(150_000).collect();
    assert_eq!(kernel.write(CLUSTER - 512, &payload), (0, wire::write_reply(150_000).to_vec()));
    assert_eq!(kernel.write(5 * CLUSTER + 3, b"odd").0, 0);
    assert_eq!(kernel.read(CLUSTER - 512, 150_000), (0, payload.clone()));
    assert_eq!(kernel.read(CLUSTER + 1, 7), (0, payload[513..520].to_vec()));
    assert_eq!(kernel.read(5 * CLUSTER, 8), (0, b"\0\0\0odd\0\0".to_vec()));
    // At the end reads are short, and writes, too.
    assert_eq!(kernel.read(DISK - 10, 4096), (0, vec![0; 10]));
    assert_eq!(kernel.read(DISK, 4096), (0, vec![]));
    assert_eq!(kernel.read(u64::MAX - 5, 4096), (0, vec![]));
    assert_eq!(kernel.write(DISK - 4, b"12345678"), (0, wire::write_reply(4).to_vec()));
    assert_eq!(kernel.read(DISK - 4, 9), (0, b"1234".to_vec()));
    assert_eq!(kernel.write(DISK, b"x").0, libc::ENOSPC);
    assert_eq!(kernel.write(u64::MAX, b"xx").0, libc::ENOSPC);
}

#[test]
fn payloads_of_every_size_follow_each_other() {
    const SMALL: usize = 64 * 1024;
    let kernel = kernel();
    let sizes = [1, SMALL - 1, SMALL, SMALL + 1, SMALL + 512, 1 << 20];
    let mut round = 0u8;
    // Each after each: where a payload lands depends on the one before.
    for first in sizes {
        for second in sizes {
            for size in [first, second] {
                round += 1;
                let payload: Vec<u8> =
                    (0..size).map(|at| at.to_le_bytes()[0] ^ (at / 509).to_le_bytes()[0] ^ round).collect();
                let offset = u64::from(round % 3) * 512 + CLUSTER;
                let written = wire::write_reply(u32::try_from(size).unwrap()).to_vec();
                assert_eq!(kernel.write(offset, &payload), (0, written));
                assert!(kernel.read(offset, size) == (0, payload), "{size} bytes after {first}");
            }
        }
    }
}

#[test]
fn repeated_requests_keep_their_mark_and_change_nothing() {
    let kernel = kernel();
    for unique in [8, wire::RESENT | 8] {
        kernel.send(unique, 16, &transfer(0, 4), b"same");
        assert_eq!(kernel.receive(), Reply { unique, errno: 0, body: wire::write_reply(4).to_vec() });
    }
    assert_eq!(kernel.disk.chain().allocated_clusters(), 1);
    assert_eq!(kernel.read(0, 4).1, b"same");
}

#[test]
fn a_sync_makes_durable_and_is_never_unimplemented() {
    let kernel = kernel();
    kernel.write(0, &[1; 512]);
    assert_eq!(kernel.survivor.legacy().unwrap().entries.len(), 1);
    assert_eq!(kernel.ask(20, &[0; 16], &[]), (0, vec![]));
    assert_eq!(kernel.disk.chain().pending(), 0);
    assert_eq!(kernel.survivor.legacy().unwrap().entries.len(), 0);
}

#[test]
fn zeroed_ranges_read_as_zeros_and_data_is_found() {
    let kernel = kernel();
    for cluster in 0..4 {
        kernel.write(cluster * CLUSTER, &vec![9; 65536]);
    }
    assert_eq!(kernel.seek(0, wire::SEEK_HOLE), Ok(4 * CLUSTER));
    assert_eq!(kernel.seek(5 * CLUSTER, wire::SEEK_DATA), Err(libc::ENXIO));
    // From inside the first cluster to the end of the disk and far past it.
    assert_eq!(kernel.allocate(CLUSTER / 2, 1 << 40, wire::ALLOCATE_PUNCH), 0);
    assert_eq!(kernel.read(0, 2 * 65536).1, [vec![9; 32768], vec![0; 98304]].concat());
    assert_eq!(kernel.seek(1, wire::SEEK_HOLE), Ok(CLUSTER));
    assert_eq!(kernel.seek(CLUSTER, wire::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(kernel.seek(DISK, wire::SEEK_HOLE), Err(libc::ENXIO));
    assert_eq!(kernel.seek(0, 0), Err(libc::EINVAL));
    assert_eq!(kernel.allocate(512, 1024, wire::ALLOCATE_ZERO), 0);
    assert_eq!(kernel.read(0, 2048).1, [vec![9; 512], vec![0; 1024], vec![9; 512]].concat());
    assert_eq!(kernel.allocate(0, 4096, 0), libc::EOPNOTSUPP);
    assert_eq!(kernel.allocate(u64::MAX, 2, wire::ALLOCATE_PUNCH), libc::EFBIG);
    assert_eq!(kernel.allocate(DISK, 4096, wire::ALLOCATE_PUNCH), 0);
}

#[test]
fn attributes_tell_size_and_cluster() {
    let kernel = kernel();
    let (errno, body) = kernel.ask(3, &[0; 16], &[]);
    assert_eq!((errno, body[24..32].to_vec()), (0, DISK.to_ne_bytes().to_vec()));
    let (errno, body) = kernel.ask(17, &[], &[]);
    assert_eq!((errno, body[40..44].to_vec()), (0, u32::try_from(CLUSTER).unwrap().to_ne_bytes().to_vec()));
    // Neither the size nor the mode can be changed; a time may be, to no effect.
    let set = |valid: u32, size: u64| {
        let mut arguments = vec![0; 88];
        arguments[..4].copy_from_slice(&valid.to_ne_bytes());
        arguments[16..24].copy_from_slice(&size.to_ne_bytes());
        kernel.ask(4, &arguments, &[]).0
    };
    assert_eq!([set(8, 0), set(1, 0), set(8, DISK), set(32, 0)], [libc::EPERM, libc::EPERM, 0, 0]);
}

#[test]
fn unknown_and_bent_requests_are_answered() {
    let kernel = kernel();
    assert_eq!(kernel.ask(1, b"name\0", &[]).0, libc::ENOSYS);
    assert_eq!(kernel.ask(4711, &[], &[]).0, libc::ENOSYS);
    assert_eq!(kernel.ask(15, &[0; 8], &[]).0, libc::EINVAL);
    assert_eq!(kernel.ask(16, &transfer(0, 4096), b"less").0, libc::EINVAL);
    // These get no answer: the next one is that of the sync.
    kernel.send(5, 2, &[0; 8], &[]);
    kernel.send(6, 36, &[0; 8], &[]);
    assert_eq!(kernel.ask(20, &[0; 16], &[]).0, 0);
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let kernel = Kernel::new(&ServerOptions::default(), true);
    assert_eq!(kernel.write(0, b"x").0, libc::EROFS);
    assert_eq!(kernel.allocate(0, 4096, wire::ALLOCATE_PUNCH), libc::EROFS);
    assert_eq!(kernel.read(0, 4), (0, vec![0; 4]));
    assert_eq!(kernel.ask(20, &[0; 16], &[]).0, 0);
}

#[test]
fn more_requests_than_buffers_are_all_answered() {
    let options =
        ServerOptions { large_buffers: 2, small_buffers: 1, threads: 2, ..ServerOptions::default() };
    let kernel = Kernel::new(&options, false);
    for round in 0..4u64 {
        for number in 0..24u64 {
            let offset = number * 300_000;
            match (number + round) % 3 {
                0 => kernel.send(number, 15, &transfer(offset, 200_000), &[]),
                1 => kernel.send(number, 16, &transfer(offset, 100_000), &vec![1; 100_000]),
                _ => kernel.send(number, 20, &[0; 16], &[]),
            }
        }
        let mut answered: Vec<u64> = (0..24)
            .map(|_| {
                let reply = kernel.receive();
                assert_eq!(reply.errno, 0, "{}", reply.unique);
                reply.unique
            })
            .collect();
        answered.sort_unstable();
        assert!(answered.into_iter().eq(0..24));
    }
}

#[test]
fn the_end_of_the_mount_ends_the_server_and_the_image_closes() {
    let mut kernel = kernel();
    kernel.send(1, 16, &transfer(0, 512), &[1; 512]);
    nix::sys::socket::shutdown(kernel.socket.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
    kernel.serving.take().unwrap().wait().unwrap();
    assert_eq!(kernel.receive().unique, 1);
    kernel.disk.close().unwrap();
}

/// Nanoseconds on a processor of each server thread of this process.
fn busy_ns() -> std::collections::BTreeMap<String, u64> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
    let busy = |task: std::path::PathBuf| {
        let name = std::fs::read_to_string(task.join("comm")).ok()?;
        let times = std::fs::read_to_string(task.join("schedstat")).ok()?;
        let busy = times.split_whitespace().next()?.parse().ok()?;
        (name.trim() == "fuse").then(|| (task.to_string_lossy().into_owned(), busy))
    };
    tasks.filter_map(busy).collect()
}

#[test]
fn without_a_free_buffer_a_thread_sleeps() {
    use std::time::Duration;
    let options = ServerOptions { large_buffers: 2, small_buffers: 1, ..ServerOptions::default() };
    let kernel = Kernel::new(&options, false);
    let frozen = kernel.disk.freeze(Duration::from_secs(300)).unwrap();
    // Held at the gate, they keep their buffers.
    for unique in 1..=6 {
        kernel.send(unique, 16, &transfer(unique * 131_072, 131_072), &vec![7; 131_072]);
    }
    // Those of other tests may be busy for a while; one that never sleeps always is.
    let mut busiest = 0;
    let has_slept = (0..60).any(|_| {
        let before = busy_ns();
        std::thread::sleep(Duration::from_millis(500));
        let after = busy_ns();
        let spent = |(thread, busy): (&String, &u64)| after.get(thread).map_or(0, |after| after - busy);
        busiest = before.iter().map(spent).max().unwrap_or(0);
        busiest < 100_000_000
    });
    assert!(has_slept, "a thread was busy for {busiest} ns of 500 ms");
    drop(frozen);
    for _ in 1..=6 {
        assert_eq!(kernel.receive().errno, 0);
    }
}

/// A server on a host with room for little more than the table, and the host.
fn on_a_full_host(buffers: &ServerOptions, on_full: OnFull) -> (Kernel, SimDisk) {
    let host = SimDisk::new(1);
    let storage = Arc::new(host.create("disk.hds").unwrap());
    let disk_options = DiskOptions { on_full, ..DiskOptions::default() };
    let kernel = Kernel::over(storage, tempfile::tempdir().unwrap(), buffers, disk_options);
    assert_eq!(kernel.write(0, &[1; 4096]).0, 0);
    host.set_capacity(Some(0));
    (kernel, host)
}

/// The places that were reserved ahead are used up; then a write is left unanswered.
fn fill_up(kernel: &Kernel, first: u64) -> u64 {
    for cluster in first.. {
        kernel.send(1000 + cluster, 16, &transfer(cluster * CLUSTER, 4096), &[2; 4096]);
        for _ in 0..200 {
            if kernel.disk.waiting().is_some() {
                return cluster;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(kernel.receive().errno, 0);
    }
    unreachable!("the disk ends");
}

#[test]
fn more_waiting_writes_than_buffers_keep_nobody_else_waiting() {
    let buffers = ServerOptions { large_buffers: 2, small_buffers: 1, ..ServerOptions::default() };
    let (kernel, host) = on_a_full_host(&buffers, OnFull::Wait { timeout: None });
    let first = fill_up(&kernel, 1);
    let waiting: Vec<u64> = (first + 1..first + 20).collect();
    for &cluster in &waiting {
        let size = if cluster % 2 == 0 { 4096 } else { 60_000 };
        kernel.send(
            1000 + cluster,
            16,
            &transfer(cluster * CLUSTER, size),
            &vec![cluster.to_le_bytes()[0]; size],
        );
    }
    // Reads, writes in place, syncs and discards go on, more than once.
    for round in 0..30u8 {
        assert_eq!(kernel.write(4096, &[round; 8192]).0, 0);
        assert_eq!(kernel.read(4096, 8192), (0, vec![round; 8192]));
        assert_eq!(kernel.ask(20, &[0; 16], &[]).0, 0);
        let of_a_waiting_one = waiting[usize::from(round) % waiting.len()];
        assert_eq!(kernel.read(of_a_waiting_one * CLUSTER, 512), (0, vec![0; 512]));
        assert_eq!(kernel.allocate(of_a_waiting_one * CLUSTER + 8192, 4096, wire::ALLOCATE_PUNCH), 0);
    }
    let state = kernel.disk.waiting().unwrap();
    assert_eq!((state.writes, state.errno), (20, libc::ENOSPC));
    assert_eq!(state.bytes_needed, 20 * CLUSTER);
    let frozen = kernel.disk.freeze(std::time::Duration::from_secs(60)).unwrap();
    host.set_capacity(None);
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert_eq!(kernel.disk.waiting().unwrap().writes, 20, "a frozen disk stays as it is");
    drop(frozen);
    let mut answered: Vec<u64> = (0..20)
        .map(|_| {
            let reply = kernel.receive();
            assert_eq!(reply.errno, 0, "{reply:?}");
            reply.unique - 1000
        })
        .collect();
    answered.sort_unstable();
    assert!(answered.into_iter().eq(first..first + 20));
    assert_eq!(kernel.disk.waiting(), None);
    for &cluster in &waiting {
        let size = if cluster % 2 == 0 { 4096 } else { 60_000 };
        assert_eq!(
            kernel.read(cluster * CLUSTER, size),
            (0, vec![cluster.to_le_bytes()[0]; size]),
            "{cluster}"
        );
    }
    assert!(kernel.disk.statistics().space_waits >= 20);
}

#[test]
fn after_its_time_a_waiting_write_fails_and_later_ones_at_once_until_there_is_space() {
    let patience = std::time::Duration::from_millis(400);
    let (kernel, host) = on_a_full_host(&ServerOptions::default(), OnFull::Wait { timeout: Some(patience) });
    let begun = std::time::Instant::now();
    let first = fill_up(&kernel, 1);
    assert_eq!(kernel.receive().errno, libc::ENOSPC);
    assert!(begun.elapsed() >= patience);
    assert_eq!(kernel.write((first + 1) * CLUSTER, &[1; 512]).0, libc::ENOSPC);
    assert_eq!(kernel.disk.waiting(), None);
    host.set_capacity(None);
    assert_eq!(kernel.write((first + 1) * CLUSTER, &[1; 512]).0, 0);
    assert_eq!(kernel.read(first * CLUSTER, 512), (0, vec![0; 512]), "nothing of the failed write is there");
}

#[test]
fn a_server_that_is_stopped_leaves_what_waits_to_its_successor() {
    let (mut kernel, _host) = on_a_full_host(&ServerOptions::default(), OnFull::Wait { timeout: None });
    fill_up(&kernel, 1);
    let serving = kernel.serving.take().unwrap();
    serving.stop();
    serving.wait().unwrap();
    assert_eq!(kernel.disk.waiting(), None);
    kernel.disk.close().unwrap();
}

#[test]
fn a_used_up_quota_is_waited_for_like_space() {
    let (kernel, host) = on_a_full_host(&ServerOptions::default(), OnFull::Wait { timeout: None });
    host.set_capacity(None);
    host.inject(Fault::once(Call::Allocate, libc::EDQUOT).for_ever());
    let cluster = fill_up(&kernel, 1);
    assert_eq!(kernel.disk.waiting().unwrap().errno, libc::EDQUOT);
    host.heal();
    assert_eq!((kernel.receive().unique, kernel.disk.waiting()), (1000 + cluster, None));
}

/// On hosts that copy on write, or when another program made the table sparse, the table needs space as well: a failed
/// write of it would end all writing.
#[test]
fn a_table_that_finds_no_space_keeps_flushes_waiting_and_nothing_else() {
    let (kernel, host) = on_a_full_host(&ServerOptions::default(), OnFull::Wait { timeout: None });
    host.set_capacity(None);
    assert_eq!(kernel.write(CLUSTER, &[3; 4096]).0, 0);
    host.inject(Fault::once(Call::Write, libc::ENOSPC).for_ever());
    kernel.send(5, 20, &[0; 16], &[]);
    while kernel.disk.waiting().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let state = kernel.disk.waiting().unwrap();
    assert!(state.table && state.writes == 0, "{state:?}");
    assert_eq!(kernel.read(CLUSTER, 4096), (0, vec![3; 4096]));
    // Who replaces the chain would wait for it with the gate shut.
    let frozen = kernel.disk.freeze(std::time::Duration::from_secs(60)).unwrap();
    let error = frozen.replace_chain(|chain| Ok(Arc::clone(chain))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Allocate, "{error}");
    drop(frozen);
    assert!(!kernel.disk.is_poisoned());
    host.heal();
    let reply = kernel.receive();
    assert_eq!((reply.unique, reply.errno, kernel.disk.waiting()), (5, 0, None));
    assert!(!kernel.disk.is_poisoned());
}
