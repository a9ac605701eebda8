//! Random use of a chain against a model of the guest's sectors, with crashes after every operation of the host.
//!
//! The model knows of each sector what a crash may leave (G2 of the crash model): the value that was last made durable,
//! or one written since. Each crash state is opened for writing, compared, closed, examined (I1, I2, no tail) and
//! compared again. The same runs with a deliberate mistake must fail: see `mistakes_are_found`.

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::sync::Arc;

use super::Mapping;
use super::chain::{Chain, ChainOptions, Source, WriteTarget};
use super::commit::CommitPlan;
use super::delta::{CreateOptions, create_image, examine};
use super::header::InUse;
use super::testing::{small, try_guest_content};
use crate::io::sim::{CrashLevel, CrashOptions, Random, SimDisk};
use crate::io::{Access, Allocation, Folder, Storage, StorageExt};
use crate::mutant::{self, Mutant};
use crate::units::{FileCluster, GuestCluster, GuestOffset};

/// More than the 112 entries that share a sector with the header.
const CLUSTERS: u32 = 150;
const CLUSTER: usize = 4096;
const SECTOR: usize = 512;
const SECTORS: usize = CLUSTERS as usize * CLUSTER / SECTOR;
const SECTORS_PER_CLUSTER: usize = CLUSTER / SECTOR;

type Outcome<T = ()> = std::result::Result<T, String>;

/// What each sector may hold.
#[derive(Clone)]
struct Model {
    now: Vec<u8>,
    /// As of the last seal.
    sealed: Vec<u8>,
    durable: Vec<u8>,
    /// Written since `durable`, and before the last seal.
    before_seal: Vec<BTreeSet<u8>>,
    /// Written since the last seal.
    after_seal: Vec<BTreeSet<u8>>,
}

impl Model {
    fn new(content: Vec<u8>) -> Self {
        let none = vec![BTreeSet::new(); SECTORS];
        Self {
            now: content.clone(),
            sealed: content.clone(),
            durable: content,
            before_seal: none.clone(),
            after_seal: none,
        }
    }

    fn write(&mut self, sectors: std::ops::Range<usize>, value: u8) {
        for sector in sectors {
            self.now[sector] = value;
            self.after_seal[sector].insert(value);
        }
    }

    fn seal(&mut self) {
        self.sealed.clone_from(&self.now);
        for (before, after) in self.before_seal.iter_mut().zip(&mut self.after_seal) {
            before.append(after);
        }
    }

    fn committed(&mut self) {
        self.durable.clone_from(&self.sealed);
        self.before_seal.iter_mut().for_each(BTreeSet::clear);
    }

    fn compare(&self, content: &[u8], exactly: bool) -> Outcome {
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            let value = bytes[0];
            let legal = if exactly {
                value == self.now[sector]
            } else {
                value == self.durable[sector]
                    || self.before_seal[sector].contains(&value)
                    || self.after_seal[sector].contains(&value)
            };
            if !legal || bytes.iter().any(|&byte| byte != value) {
                return Err(format!(
                    "guest sector {sector} (cluster {}) holds {value}: now {}, durable {}, since {:?} {:?}",
                    sector / SECTORS_PER_CLUSTER,
                    self.now[sector],
                    self.durable[sector],
                    self.before_seal[sector],
                    self.after_seal[sector],
                ));
            }
        }
        Ok(())
    }
}

fn open(disk: &SimDisk, has_base: bool) -> Outcome<Arc<Chain>> {
    let source = |name: &str, access| Source {
        name: name.into(),
        storage: Arc::new(disk.open(name, access).unwrap()),
        raw: false,
    };
    let mut sources = vec![source("top", Access::ReadWrite)];
    if has_base {
        sources.insert(0, source("base", Access::ReadOnly));
    }
    let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use: false };
    Chain::open(sources, &options).map_err(|error| format!("open: {error}"))
}

fn guest_content(chain: &Chain) -> Outcome<Vec<u8>> {
    try_guest_content(chain).map_err(|error| format!("read: {error}"))
}

/// A flush on its way.
enum Stage {
    Idle,
    Sealed(CommitPlan),
    Synced(CommitPlan),
    Written(CommitPlan, usize),
}

struct Run {
    disk: SimDisk,
    has_base: bool,
    chain: Arc<Chain>,
    model: Model,
    random: Random,
    stage: Stage,
    freed: VecDeque<FileCluster>,
    value: u8,
    states: usize,
}

impl Run {
    fn new(seed: u64, has_base: bool) -> Outcome<Self> {
        let disk = SimDisk::new(seed);
        let mut content = vec![0; SECTORS];
        let create = |name| {
            let file = disk.create(name).unwrap();
            let clusters = if name == "base" { CLUSTERS - 10 } else { CLUSTERS };
            create_image(&file, &CreateOptions { geometry: small(u64::from(clusters)), preallocated: false })
                .unwrap();
            file
        };
        if has_base {
            let base = create("base");
            for guest in [1u32, 2, 5, 7, 111, 113, 139] {
                let place = u64::from(guest % 64 + 1);
                base.write_all_at(place * CLUSTER as u64, &[251; CLUSTER]).unwrap();
                super::testing::set_entry(&base, u64::from(guest), u32::try_from(place).unwrap());
                content[guest as usize * SECTORS_PER_CLUSTER..][..SECTORS_PER_CLUSTER].fill(251);
            }
        }
        create("top");
        disk.folder().sync().unwrap();
        let chain = open(&disk, has_base)?;
        Ok(Self {
            disk,
            has_base,
            chain,
            model: Model::new(content),
            random: Random::new(seed),
            stage: Stage::Idle,
            freed: VecDeque::new(),
            value: 0,
            states: 0,
        })
    }

    fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(self.chain.storage(self.chain.top()))
    }

    /// Few clusters, so that they meet again: at both ends of the table and of its first sector.
    fn cluster(&mut self) -> GuestCluster {
        let places = [0, 1, 2, 3, 5, 7, 50, 110, 111, 112, 113, 139, 141, 149];
        GuestCluster(places[self.random.index(places.len())])
    }

    fn next_value(&mut self) -> u8 {
        self.value = self.value % 250 + 1;
        self.value
    }

    /// The bytes below the top, where a copy-up takes them.
    fn below(&self, cluster: GuestCluster) -> Vec<u8> {
        let mut bytes = vec![0; CLUSTER];
        let start = u64::from(cluster.0) * CLUSTER as u64;
        if let Mapping::Data { delta, offset, len } = self.chain.map_below(GuestOffset(start), CLUSTER as u64)
        {
            let len = usize::try_from(len).unwrap();
            self.chain.storage(delta).read_exact_at(offset.0, &mut bytes[..len]).unwrap();
        }
        bytes
    }

    fn write(
        &mut self,
        cluster: GuestCluster,
        within: std::ops::Range<usize>,
        value: u8,
        publish: bool,
    ) -> Outcome {
        let storage = self.storage();
        let bytes = vec![value; within.len() * SECTOR];
        let at = within.start * SECTOR;
        let first = cluster.0 as usize * SECTORS_PER_CLUSTER;
        let target = self.chain.prepare_write(cluster).map_err(|error| format!("prepare: {error}"))?;
        match target {
            WriteTarget::InPlace(offset) => {
                self.model.write(first + within.start..first + within.end, value);
                storage.write_all_at(offset.0 + at as u64, &bytes).unwrap();
            }
            WriteTarget::Fresh(prepared) => {
                if prepared.known_zero() && !self.chain.held_below(cluster) {
                    storage.write_all_at(prepared.offset().0 + at as u64, &bytes).unwrap();
                } else {
                    let mut whole = self.below(cluster);
                    whole[at..at + bytes.len()].copy_from_slice(&bytes);
                    storage.write_all_at(prepared.offset().0, &whole).unwrap();
                }
                if publish {
                    self.model.write(first + within.start..first + within.end, value);
                    prepared.publish();
                }
            }
        }
        Ok(())
    }

    fn discard(&mut self, cluster: GuestCluster) -> Outcome {
        if self.chain.held_below(cluster) {
            return self.write(cluster, 0..SECTORS_PER_CLUSTER, 0, true);
        }
        let first = cluster.0 as usize * SECTORS_PER_CLUSTER;
        self.model.write(first..first + SECTORS_PER_CLUSTER, 0);
        self.chain.clear(cluster).map(|_| ()).map_err(|error| format!("clear: {error}"))
    }

    /// One step of a flush.
    fn flush_step(&mut self) {
        let storage = self.storage();
        self.stage = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => {
                self.model.seal();
                Stage::Sealed(self.chain.seal())
            }
            Stage::Sealed(plan) => {
                storage.sync_data().unwrap();
                Stage::Synced(plan)
            }
            Stage::Synced(plan) if plan.is_empty() => self.commit(plan),
            Stage::Synced(plan) => Stage::Written(plan, 0),
            Stage::Written(plan, next) => match plan.writes.get(next) {
                Some((offset, bytes)) => {
                    storage.write_all_at(offset.0, bytes).unwrap();
                    Stage::Written(plan, next + 1)
                }
                None => {
                    storage.sync_data().unwrap();
                    self.commit(plan)
                }
            },
        };
    }

    fn commit(&mut self, plan: CommitPlan) -> Stage {
        self.freed.extend(self.chain.committed(plan));
        self.model.committed();
        Stage::Idle
    }

    fn flush(&mut self) {
        while !matches!(self.stage, Stage::Idle) {
            self.flush_step();
        }
        self.flush_step();
        while !matches!(self.stage, Stage::Idle) {
            self.flush_step();
        }
    }

    fn punch(&mut self) {
        if let Some(cluster) = self.freed.pop_front() {
            let offset = self.chain.geometry().file_offset(cluster).0;
            self.storage().allocate(offset, CLUSTER as u64, Allocation::Punch).unwrap();
            self.chain.release(cluster, true);
        }
    }

    fn reopen(&mut self) -> Outcome {
        self.flush();
        while !self.freed.is_empty() {
            self.punch();
        }
        self.chain.close().map_err(|error| format!("close: {error}"))?;
        self.chain = open(&self.disk, self.has_base)?;
        Ok(())
    }

    fn act(&mut self) -> Outcome {
        let cluster = self.cluster();
        match self.random.below(100) {
            0..35 => {
                let start = self.random.index(SECTORS_PER_CLUSTER);
                let end = start + 1 + self.random.index(SECTORS_PER_CLUSTER - start);
                let value = self.next_value();
                self.write(cluster, start..end, value, true)
            }
            35..45 => {
                let value = self.next_value();
                self.write(cluster, 0..SECTORS_PER_CLUSTER, value, true)
            }
            45..50 => {
                // A write that fails: in place its range is any mix, as the model has it; fresh it leaves nothing.
                let value = self.next_value();
                self.write(cluster, 0..2, value, false)
            }
            50..65 => self.discard(cluster),
            65..90 => {
                self.flush_step();
                Ok(())
            }
            90..96 => {
                self.punch();
                Ok(())
            }
            96..98 => self.reopen(),
            _ => self.model.compare(&guest_content(&self.chain)?, true),
        }
    }

    /// Judges some of the states that a crash during the last action may leave.
    fn judge(&mut self, before: &Model) -> Outcome {
        for snapshot in self.disk.take_captured() {
            if !self.random.chance(25) {
                continue;
            }
            let options = CrashOptions {
                exhaustive_max: 32,
                random_per_density: 2,
                metadata_bytes: 4096,
                seed: self.random.next_u64(),
                ..CrashOptions::new(CrashLevel::Sectors)
            };
            let states: Vec<_> = snapshot.crash_states(&options).collect();
            let step = states.len().div_ceil(10).max(1);
            let skip = self.random.index(step);
            for state in states.into_iter().skip(skip).step_by(step) {
                self.states += 1;
                let name = state.to_string();
                self.judge_state(&state.into_disk(1), before)
                    .map_err(|why| format!("{why}; crash after {:?}, {name}", snapshot.after()))?;
            }
        }
        Ok(())
    }

    fn judge_state(&self, disk: &SimDisk, before: &Model) -> Outcome {
        // What was durable before the action is so at each of its steps; what it writes may be there at each.
        let mut model = before.clone();
        for sector in 0..SECTORS {
            model.after_seal[sector].extend(&self.model.before_seal[sector]);
            model.after_seal[sector].extend(&self.model.after_seal[sector]);
            model.after_seal[sector].insert(self.model.durable[sector]);
        }
        let top = disk.open("top", Access::ReadOnly).unwrap();
        let (header, _) = examine(&top).map_err(|error| format!("examine: {error}"))?;
        if header.in_use() != InUse::Open {
            judge_closed(disk)?;
        }
        let chain = open(disk, self.has_base)?;
        let content = guest_content(&chain)?;
        model.compare(&content, false)?;
        chain.close().map_err(|error| format!("close: {error}"))?;
        judge_closed(disk)?;
        let again = open(disk, self.has_base)?;
        if again.repairs().was_in_use || guest_content(&again)? != content {
            return Err("the repaired image is not what was read".into());
        }
        Ok(())
    }
}

/// A closed image has no wrong entry and no tail.
fn judge_closed(disk: &SimDisk) -> Outcome {
    let top = disk.open("top", Access::ReadOnly).unwrap();
    let (header, verdict) = examine(&top).map_err(|error| format!("examine: {error}"))?;
    let end = super::alloc::trimmed_bytes(header.geometry(), verdict.highest());
    if header.in_use() != InUse::Closed || header.raw().extension_sectors != 0 {
        return Err(format!("closed, but marked {:?}", header.in_use()));
    }
    if verdict.ambiguous_count > 0 || !verdict.at_end.is_empty() {
        return Err(format!("closed with wrong entries: {:?} {:?}", verdict.ambiguous, verdict.at_end));
    }
    let len = top.len().unwrap();
    if len != end { Err(format!("closed with {len} bytes where {end} are used")) } else { Ok(()) }
}

/// One run; how many crash states were judged, or what was wrong.
fn run(seed: u64, actions: usize, mutant: Option<Mutant>) -> Outcome<usize> {
    mutant::activate(None);
    let mut run = Run::new(seed, seed % 2 == 1)?;
    run.disk.capture_every_operation(true);
    let mut result = Ok(());
    for action in 0..actions {
        let before = run.model.clone();
        mutant::activate(mutant);
        result = run.act();
        mutant::activate(None);
        result = result
            .and_then(|()| run.judge(&before))
            .map_err(|why| format!("seed {seed} action {action}: {why}"));
        if result.is_err() {
            break;
        }
    }
    result?;
    run.reopen()?;
    run.model.compare(&guest_content(&run.chain)?, true)?;
    run.chain.close().map_err(|error| error.to_string())?;
    judge_closed(&run.disk)?;
    Ok(run.states)
}

#[test]
fn every_crash_leaves_what_it_may() {
    let mut states = 0;
    for seed in 0..24 {
        states += run(seed, 120, None).unwrap();
    }
    assert!(states > 4000, "only {states} states");
}

#[test]
fn mistakes_are_found() {
    for mutant in [
        Mutant::ReuseBeforeClearDurable,
        Mutant::ClosedBeforeLastSync,
        Mutant::StaleHeaderSector,
        Mutant::ExtensionNotSynced,
        Mutant::CopyUpMisplaced,
    ] {
        let found = (0..40).find_map(|seed| run(seed, 120, Some(mutant)).err());
        assert!(found.is_some(), "{mutant:?} is not noticed");
        println!("{mutant:?}: {}", found.unwrap_or_default());
    }
}
