//! A witness on a disk: a file of self-describing blocks that one thread rewrites all the time, and a real tree.
//!
//! Each block carries its number, the generation that wrote it and a digest of itself. Generations are written one
//! at a time and synced one at a time, so a disk frozen at any moment must show the file exactly as it was after
//! some generation G: every block at the last generation up to G that wrote it. A copy that mixes two moments, loses
//! a write or keeps an old block cannot pass.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::patience::becomes;

/// Bytes in a block.
pub(crate) const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"WITNESS1";
const DIGEST_BYTES: usize = 32;

/// The bytes of block `block` as generation `generation` writes it.
fn block_bytes(block: u64, generation: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&block.to_le_bytes());
    bytes.extend_from_slice(&generation.to_le_bytes());
    let mut filler = [0; BLOCK_BYTES - 24 - DIGEST_BYTES];
    blake3::Hasher::new().update(&bytes).finalize_xof().fill(&mut filler);
    bytes.extend_from_slice(&filler);
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

/// The generation a block says it has, if the block is whole.
fn generation_of(block: u64, bytes: &[u8]) -> Result<u64, String> {
    let generation = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
    if bytes != block_bytes(block, generation) {
        return Err(format!(
            "block {block} is not what any generation wrote: it starts {:02x?}",
            &bytes[..24]
        ));
    }
    Ok(generation)
}

struct State {
    stop: AtomicBool,
    issued: AtomicU64,
    synced: AtomicU64,
    stall_longest_us: AtomicU64,
    /// `log[g - 1]` is the block that generation `g` wrote.
    log: Mutex<Vec<u64>>,
}

/// The writer thread.
pub(crate) struct Witness {
    state: Arc<State>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Witness {
    /// Fills a file of `blocks` blocks and rewrites random ones until stopped, `pause` between two writes.
    pub(crate) fn start(path: &Path, blocks: u64, pause: Duration) -> io::Result<Self> {
        let file = OpenOptions::new().create_new(true).write(true).open(path)?;
        let state = Arc::new(State {
            stop: AtomicBool::new(false),
            issued: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            stall_longest_us: AtomicU64::new(0),
            log: Mutex::new(Vec::new()),
        });
        for block in 0..blocks {
            state.write(&file, block)?;
        }
        file.sync_all()?;
        state.synced.store(blocks, Ordering::SeqCst);
        let thread = std::thread::spawn({
            let state = Arc::clone(&state);
            move || state.run(&file, blocks, pause)
        });
        Ok(Self { state, thread: Some(thread) })
    }

    /// The last generation known to be durable.
    pub(crate) fn synced(&self) -> u64 {
        self.state.synced.load(Ordering::SeqCst)
    }

    /// The last generation whose write was begun.
    pub(crate) fn issued(&self) -> u64 {
        self.state.issued.load(Ordering::SeqCst)
    }

    /// The longest time that one write with its sync took.
    pub(crate) fn stall_longest(&self) -> Duration {
        Duration::from_micros(self.state.stall_longest_us.load(Ordering::SeqCst))
    }

    /// Whether the writer still makes progress.
    pub(crate) fn is_alive(&self) -> bool {
        // One may have been done before, and is only counted now.
        let before = self.synced() + 1;
        becomes(|| self.synced() > before)
    }

    /// What it wrote so far; it goes on.
    pub(crate) fn history(&self) -> History {
        History { log: self.state.log.lock().expect("no one panics with the log").clone() }
    }

    /// Stops the writer and returns what it wrote.
    pub(crate) fn stop(mut self) -> io::Result<History> {
        self.join()?;
        let log = std::mem::take(&mut *self.state.log.lock().expect("the writer has ended"));
        Ok(History { log })
    }

    fn join(&mut self) -> io::Result<()> {
        self.state.stop.store(true, Ordering::SeqCst);
        match self.thread.take() {
            Some(thread) => thread.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked"))),
            None => Ok(()),
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("witness: {error}");
        }
    }
}

impl State {
    fn write(&self, file: &File, block: u64) -> io::Result<u64> {
        let generation = {
            let mut log = self.log.lock().expect("no one panics with the log");
            log.push(block);
            log.len() as u64
        };
        self.issued.store(generation, Ordering::SeqCst);
        file.write_all_at(&block_bytes(block, generation), block * BLOCK_BYTES as u64)?;
        Ok(generation)
    }

    fn run(&self, file: &File, blocks: u64, pause: Duration) -> io::Result<()> {
        let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
        while !self.stop.load(Ordering::SeqCst) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let begin = Instant::now();
            let generation = self.write(file, random % blocks)?;
            file.sync_data()?;
            self.synced.store(generation, Ordering::SeqCst);
            let took_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.stall_longest_us.fetch_max(took_us, Ordering::SeqCst);
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
        }
        Ok(())
    }
}

/// What a witness wrote.
pub(crate) struct History {
    log: Vec<u64>,
}

impl History {
    /// Checks that the file at `path` is exactly what generation G left, for one G in `at_least..=at_most`; says
    /// which G.
    pub(crate) fn verify(&self, path: &Path, at_least: u64, at_most: u64) -> Result<u64, String> {
        let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let blocks = self.log.iter().max().map_or(0, |last| last + 1);
        if bytes.len() as u64 != blocks * BLOCK_BYTES as u64 {
            return Err(format!("{}: {} bytes instead of {blocks} blocks", path.display(), bytes.len()));
        }
        let found = (0u64..)
            .zip(bytes.chunks_exact(BLOCK_BYTES))
            .map(|(block, bytes)| generation_of(block, bytes))
            .collect::<Result<Vec<u64>, String>>()?;
        let reached = found.iter().copied().max().unwrap_or(0);
        let mut expected = vec![0; found.len()];
        for (generation, block) in (1..=reached).zip(&self.log) {
            expected[usize::try_from(*block).expect("a block of the file")] = generation;
        }
        for (block, (found, expected)) in found.iter().zip(&expected).enumerate() {
            if found != expected {
                return Err(format!(
                    "block {block} has generation {found}; at generation {reached}, which another block has, it had \
                     {expected}"
                ));
            }
        }
        if !(at_least..=at_most).contains(&reached) {
            return Err(format!("the file shows generation {reached}, not one of {at_least}..={at_most}"));
        }
        Ok(reached)
    }
}

/// One thing in a tree, as [`manifest`] compares it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    mode: u32,
    owner: (u32, u32),
    content: Content,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Folder,
    File { len: u64, digest: [u8; 32] },
    Link(PathBuf),
    Other,
}

/// Everything below `root` with modes, owners, link targets and digests; `skip` is left out.
pub(crate) fn manifest(root: &Path, skip: &[&Path]) -> io::Result<BTreeMap<PathBuf, Entry>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            let path = folder.join(entry?.file_name());
            let full = root.join(&path);
            if skip.contains(&path.as_path()) {
                continue;
            }
            let meta = fs::symlink_metadata(&full)?;
            let kind = meta.file_type();
            let content = if kind.is_dir() {
                folders.push(path.clone());
                Content::Folder
            } else if kind.is_file() {
                let mut hasher = blake3::Hasher::new();
                let mut file = File::open(&full)?;
                let mut piece = vec![0; 1 << 20];
                loop {
                    let count = file.read(&mut piece)?;
                    if count == 0 {
                        break;
                    }
                    hasher.update(&piece[..count]);
                }
                Content::File { len: meta.len(), digest: *hasher.finalize().as_bytes() }
            } else if kind.is_symlink() {
                Content::Link(fs::read_link(&full)?)
            } else {
                Content::Other
            };
            found.insert(path, Entry { mode: meta.mode(), owner: (meta.uid(), meta.gid()), content });
        }
    }
    Ok(found)
}

/// Says how two trees differ, or that they do not.
pub(crate) fn compare(
    left: &BTreeMap<PathBuf, Entry>,
    right: &BTreeMap<PathBuf, Entry>,
) -> Result<(), String> {
    for (path, entry) in left {
        match right.get(path) {
            Some(other) if other == entry => {}
            Some(other) => return Err(format!("{} differs: {entry:?} and {other:?}", path.display())),
            None => return Err(format!("{} is missing in the copy", path.display())),
        }
    }
    match right.keys().find(|path| !left.contains_key(*path)) {
        Some(path) => Err(format!("{} is in the copy only", path.display())),
        None => Ok(()),
    }
}

/// Copies what lies below `from` to `to`, until about `bytes_max` of content; returns bytes and number of things.
pub(crate) fn copy_tree(from: &Path, to: &Path, bytes_max: u64) -> io::Result<(u64, u64)> {
    let (mut bytes, mut things) = (0, 0);
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        fs::create_dir_all(to.join(&folder))?;
        let mut names: Vec<_> = fs::read_dir(from.join(&folder))?.collect::<Result<_, _>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for entry in names {
            if bytes >= bytes_max {
                return Ok((bytes, things));
            }
            let path = folder.join(entry.file_name());
            let (source, target) = (from.join(&path), to.join(&path));
            let meta = fs::symlink_metadata(&source)?;
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_symlink() {
                symlink(fs::read_link(&source)?, &target)?;
            } else if meta.is_file() && bytes + meta.len() <= bytes_max + bytes_max / 8 {
                fs::copy(&source, &target)?;
                fs::set_permissions(&target, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
                bytes += meta.len();
            }
            things += 1;
        }
    }
    Ok((bytes, things))
}

#[test]
fn the_witness_sees_what_a_copy_may_do_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks");
    let witness = Witness::start(&path, 16, Duration::ZERO).unwrap();
    assert!(witness.is_alive());
    while witness.issued() < 64 {
        std::thread::yield_now();
    }
    let history = witness.stop().unwrap();
    let last = history.log.len() as u64;
    assert_eq!(history.verify(&path, last, last), Ok(last));
    assert!(history.verify(&path, last + 1, last + 1).is_err(), "too old was not seen");

    let file = OpenOptions::new().write(true).open(&path).unwrap();
    // An old block: the file as no moment ever had it.
    let block = (0..16).find(|block| *block != *history.log.last().unwrap()).unwrap();
    let old = (1..).zip(&history.log).find(|(_, written)| **written == block).unwrap().0;
    let now = (1..).zip(&history.log).filter(|(_, written)| **written == block).last().unwrap().0;
    if old != now {
        file.write_all_at(&block_bytes(block, old), block * BLOCK_BYTES as u64).unwrap();
        assert!(history.verify(&path, 0, u64::MAX).is_err(), "a lost write was not seen");
        file.write_all_at(&block_bytes(block, now), block * BLOCK_BYTES as u64).unwrap();
    }
    assert_eq!(history.verify(&path, last, last), Ok(last));
    file.write_all_at(&[0xff], 100).unwrap();
    assert!(history.verify(&path, 0, u64::MAX).is_err(), "a flipped byte was not seen");
}

#[test]
fn trees_are_compared_by_content() {
    let folder = tempfile::tempdir().unwrap();
    let (left, right) = (folder.path().join("left"), folder.path().join("right"));
    fs::create_dir_all(left.join("sub")).unwrap();
    fs::write(left.join("sub/file"), "content").unwrap();
    symlink("sub/file", left.join("link")).unwrap();
    copy_tree(&left, &right, u64::MAX / 2).unwrap();
    let whole = manifest(&left, &[]).unwrap();
    assert_eq!(whole.len(), 3);
    compare(&whole, &manifest(&right, &[]).unwrap()).unwrap();
    fs::write(right.join("sub/file"), "kontent").unwrap();
    assert!(compare(&whole, &manifest(&right, &[]).unwrap()).is_err());
}
