//! Bundles of several shapes on a simulated host, and what a reader finds in them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, OnceLock};

use ploop_core::error::{Error, ErrorKind};
use ploop_core::format::{
    Chain, ChainOptions, CreateOptions, DESCRIPTOR_NAME, DiskDescriptor, Geometry, Guid, InUse, Source,
    Transition, Version, WriteTarget, create_image, examine,
};
use ploop_core::io::sim::{SimDisk, Snapshot};
use ploop_core::io::{Access, Allocation, Folder, Storage, StorageExt};
use ploop_core::mutant::activate;
use ploop_core::units::{FileCluster, GuestCluster, Sectors};

use crate::pattern::{SECTOR, fill, stamp, values};
use crate::reading::{describe, read_all};

/// The smallest legal cluster: state spaces stay small.
pub(crate) const CLUSTER_SECTORS: u64 = 64;

/// Clusters of every disk.
pub(crate) const CLUSTERS: u64 = 6;

/// What a bundle is made of. States: `Guid::TOP` on top of [`Shape::snapshot`] (n) down to (0), the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    version: Version,
    /// Images in the chain of the current state.
    images: usize,
    /// The base is the bytes of the disk.
    raw: bool,
    /// A second leaf, [`Shape::branch`], stands on the base.
    branched: bool,
    /// The images have free places inside.
    holed: bool,
    /// The top was closed cleanly; else it has an entry past its end and a tail that nothing names.
    closed: bool,
    /// The disk ends inside a cluster.
    odd_end: bool,
}

impl Shape {
    /// A closed chain of `images` images of version 2.
    pub(crate) fn of(images: usize) -> Self {
        Self {
            version: Version::V2,
            images,
            raw: false,
            branched: false,
            holed: false,
            closed: true,
            odd_end: false,
        }
    }

    pub(crate) fn version_1(self) -> Self {
        Self { version: Version::V1, ..self }
    }

    pub(crate) fn on_raw(self) -> Self {
        Self { raw: true, ..self }
    }

    pub(crate) fn branched(self) -> Self {
        Self { branched: true, ..self }
    }

    pub(crate) fn holed(self) -> Self {
        Self { holed: true, ..self }
    }

    pub(crate) fn not_closed(self) -> Self {
        Self { closed: false, ..self }
    }

    pub(crate) fn with_odd_end(self) -> Self {
        Self { odd_end: true, ..self }
    }

    /// One of each kind, for operations that work on any bundle.
    pub(crate) fn several() -> Vec<Self> {
        vec![
            Self::of(1),
            Self::of(1).version_1().holed(),
            Self::of(1).holed().not_closed(),
            Self::of(2),
            Self::of(2).version_1().not_closed(),
            Self::of(2).on_raw(),
            Self::of(2).with_odd_end().holed(),
            Self::of(3).holed(),
            Self::of(3).branched(),
            Self::of(3).on_raw().not_closed(),
        ]
    }

    pub(crate) fn images(&self) -> usize {
        self.images
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.raw
    }

    /// Sectors of the disk.
    pub(crate) fn sectors(&self) -> u64 {
        CLUSTERS * CLUSTER_SECTORS - if self.odd_end { 27 } else { 0 }
    }

    /// A snapshot below the top; 0 is the base, `images() - 2` the top's parent.
    pub(crate) fn snapshot(&self, number: usize) -> Guid {
        assert!(number + 1 < self.images, "a chain of {} has no snapshot {number}", self.images);
        guid(number)
    }

    /// The leaf beside the top.
    pub(crate) fn branch(&self) -> Guid {
        assert!(self.branched, "there is no branch");
        guid(90)
    }

    /// The file of a state.
    pub(crate) fn file(&self, number: usize) -> String {
        format!("delta{number}.hds")
    }

    /// The bundle itself, made once and then copied.
    pub(crate) fn bundle(self) -> Bundle {
        static MADE: OnceLock<Mutex<HashMap<Shape, Snapshot>>> = OnceLock::new();
        let mut made = MADE.get_or_init(Mutex::default).lock().unwrap();
        let snapshot = made.entry(self).or_insert_with(|| {
            activate(None);
            self.build()
        });
        Bundle { snapshot: snapshot.clone() }
    }

    fn geometry(&self) -> Geometry {
        Geometry::for_testing(self.version, Sectors(CLUSTER_SECTORS), Sectors(self.sectors())).unwrap()
    }

    fn build(&self) -> Snapshot {
        let disk = SimDisk::new(1);
        let folder = disk.folder();
        let mut shots: Vec<(Guid, Guid, String)> = Vec::new();
        for number in 0..self.images {
            let is_top = number + 1 == self.images;
            let below = if number == 0 { Guid::NONE } else { guid(number - 1) };
            let own = if is_top { Guid::TOP } else { guid(number) };
            self.create(&folder, number);
            shots.push((own, below, self.file(number)));
            let chain = self.chain(&folder, &shots, shots.len() - 1);
            self.fill(&chain, number, is_top);
            if is_top && !self.closed {
                drop(chain);
                self.tear(&folder, number);
            } else {
                chain.close().unwrap();
            }
        }
        if self.branched {
            self.create(&folder, 9);
            // Its chain is the base and itself.
            let pair = [shots[0].clone(), (guid(90), guid(0), self.file(9))];
            let chain = self.chain(&folder, &pair, 1);
            write(&chain, 9, CLUSTER_SECTORS + 11, 7);
            write(&chain, 9, 3 * CLUSTER_SECTORS, CLUSTER_SECTORS);
            flush(&chain);
            chain.close().unwrap();
            shots.insert(1, pair[1].clone());
        }
        let document = self.document(&shots);
        let descriptor = DiskDescriptor::parse(document.as_bytes()).unwrap();
        folder.sync().unwrap();
        descriptor.store_new(&folder).unwrap();
        disk.snapshot()
    }

    fn create(&self, folder: &dyn Folder, number: usize) {
        let storage = folder.create_exclusive(&self.file(number)).unwrap();
        if self.raw && number == 0 {
            storage.set_len(self.sectors() * SECTOR as u64).unwrap();
            storage.sync_data().unwrap();
        } else {
            create_image(&*storage, &CreateOptions { geometry: self.geometry(), preallocated: false })
                .unwrap();
        }
    }

    fn chain(&self, folder: &dyn Folder, shots: &[(Guid, Guid, String)], top: usize) -> Arc<Chain> {
        let source = |number: usize| Source {
            name: shots[number].2.clone().into(),
            storage: folder.open(&shots[number].2, Access::ReadWrite).unwrap(),
            raw: self.raw && number == 0,
        };
        let options = ChainOptions {
            access: Access::ReadWrite,
            raw_cluster: Some(Sectors(CLUSTER_SECTORS)),
            accept_in_use: false,
        };
        Chain::open((0..=top).map(source).collect(), &options).unwrap()
    }

    fn fill(&self, chain: &Arc<Chain>, number: usize, is_top: bool) {
        let cluster = CLUSTER_SECTORS;
        let operation = number as u64;
        let holed = self.holed && !(self.raw && number == 0);
        if holed {
            write(chain, 50 + operation, 5 * cluster, 30);
        }
        if is_top {
            write(chain, operation, 3, 9);
        }
        match number {
            0 => {
                write(chain, operation, cluster, cluster);
                write(chain, operation, 2 * cluster + 8, 24);
                write(chain, operation, 4 * cluster, cluster);
            }
            1 => {
                write(chain, operation, 2 * cluster + 20, 20);
                write(chain, operation, 3 * cluster, cluster);
            }
            _ => {
                write(chain, operation, cluster + 5, 2);
                write(chain, operation, 3 * cluster + 60, 8);
            }
        }
        flush(chain);
        if holed {
            chain.clear(GuestCluster(5)).unwrap();
            flush(chain);
        }
    }

    /// What a crash may leave of an image: an entry past the end of the file, whose flush never returned.
    fn tear(&self, folder: &dyn Folder, number: usize) {
        let storage = folder.open(&self.file(number), Access::ReadWrite).unwrap();
        let (header, _) = examine(&*storage).unwrap();
        let geometry = header.geometry();
        let mut table = vec![0; 4 * CLUSTERS as usize];
        storage.read_exact_at(64, &mut table).unwrap();
        let entries = table.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let places = entries.filter_map(|raw| geometry.entry_to_cluster(raw).unwrap());
        let last = places.max().unwrap();
        let past = geometry.cluster_to_entry(FileCluster(last.0 + 2)).unwrap();
        storage.write_all_at(64 + 4 * 5, &past.to_le_bytes()).unwrap();
        storage.set_len(geometry.file_end(last).0 + 512).unwrap();
        storage.sync_data().unwrap();
    }

    fn document(&self, shots: &[(Guid, Guid, String)]) -> String {
        let size = self.sectors();
        let mut images = String::new();
        let mut states = String::new();
        for (guid, parent, file) in shots {
            // As the original does: every image of a raw disk is called plain.
            let kind = if self.raw { "Plain" } else { "Compressed" };
            images += &format!("<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>");
            states += &format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>");
        }
        format!(
            "<Parallels_disk_image Version=\"1.0\"><Disk_Parameters><Disk_size>{size}</Disk_size>\
             <Cylinders>1</Cylinders><Heads>16</Heads><Sectors>32</Sectors><Padding>0</Padding></Disk_Parameters>\
             <StorageData><Storage><Start>0</Start><End>{size}</End><Blocksize>{CLUSTER_SECTORS}</Blocksize>{images}\
             </Storage></StorageData><Snapshots><TopGUID>{}</TopGUID>{states}</Snapshots></Parallels_disk_image>",
            Guid::TOP
        )
    }
}

/// A GUID of the tests.
pub(crate) fn guid(number: usize) -> Guid {
    format!("{{00000000-0000-4000-8000-{number:012x}}}").parse().unwrap()
}

/// A bundle, or a folder without one, all durable.
#[derive(Clone)]
pub(crate) struct Bundle {
    snapshot: Snapshot,
}

impl Bundle {
    /// An empty folder.
    pub(crate) fn none() -> Self {
        Self { snapshot: SimDisk::new(1).snapshot() }
    }

    /// What somebody left on a host; what is not durable becomes so.
    pub(crate) fn from_disk(disk: &SimDisk) -> Self {
        Self { snapshot: disk.snapshot().killed().into_disk(1).snapshot() }
    }

    /// A host with it.
    pub(crate) fn disk(&self, seed: u64) -> SimDisk {
        self.snapshot.killed().into_disk(seed)
    }
}

/// Writes a run of sectors in the way of a queue: whole clusters, content before the table.
pub(crate) fn write(chain: &Arc<Chain>, operation: u64, first: u64, count: u64) {
    let storage = chain.storage(chain.top()).clone();
    let cluster_sectors = u64::from(chain.geometry().cluster_sectors());
    let mut at = first;
    while at < first + count {
        let cluster = at / cluster_sectors;
        let stop = ((cluster + 1) * cluster_sectors).min(first + count);
        let mut bytes = vec![0; (stop - at) as usize * SECTOR];
        fill(&mut bytes, at, |sector| stamp(operation, sector));
        let within = (at % cluster_sectors) * SECTOR as u64;
        match chain.prepare_write(GuestCluster(cluster as u32)).unwrap() {
            WriteTarget::InPlace(offset) => storage.write_all_at(offset.0 + within, &bytes).unwrap(),
            WriteTarget::Fresh(prepared) => {
                let all = read_all(chain).unwrap();
                let first = cluster * cluster_sectors;
                let mut whole = vec![0; chain.geometry().cluster_bytes() as usize];
                let old = |sector: u64| all.get(sector as usize).copied().unwrap_or(0);
                fill(&mut whole, first, old);
                let within = within as usize;
                whole[within..within + bytes.len()].copy_from_slice(&bytes);
                storage.write_all_at(prepared.offset().0, &whole).unwrap();
                prepared.publish();
            }
        }
        at = stop;
    }
}

/// One group of flushes; cleared clusters are punched and freed.
pub(crate) fn flush(chain: &Chain) {
    let storage = chain.storage(chain.top());
    let plan = chain.seal();
    storage.sync_data().unwrap();
    for (offset, bytes) in &plan.writes {
        storage.write_all_at(offset.0, bytes).unwrap();
    }
    storage.sync_data().unwrap();
    for cluster in chain.committed(plan) {
        let offset = chain.geometry().file_offset(cluster).0;
        storage.allocate(offset, chain.geometry().cluster_bytes(), Allocation::Punch).unwrap();
        storage.sync_data().unwrap();
        chain.release(cluster, true);
    }
}

/// Opens a state of a bundle, as `ops::open` does in a real folder.
pub(crate) fn open_state(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    state: Guid,
    access: Access,
) -> Result<Arc<Chain>, Error> {
    let images = descriptor.chain_for(state)?;
    let mut sources = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let access = if number + 1 == images.len() { access } else { Access::ReadOnly };
        let storage = folder
            .open(image.file(), access)
            .map_err(|error| Error::io(ErrorKind::Open, "open an image", error).at_path(image.file()))?;
        sources.push(Source { name: image.file().into(), storage, raw: number == 0 && descriptor.is_raw() });
    }
    let raw_cluster = descriptor.is_raw().then(|| descriptor.cluster_sectors());
    Chain::open(sources, &ChainOptions { access, raw_cluster, accept_in_use: false })
}

/// One state of a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) parent: Guid,
    pub(crate) transition: Option<Transition>,
    /// The value of each sector, 0 for zeros.
    pub(crate) sectors: Vec<u64>,
}

/// All that a reader finds in a bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// There is a descriptor.
    pub(crate) exists: bool,
    /// Size of the disk as the descriptor says.
    pub(crate) disk_sectors: u64,
    pub(crate) raw: bool,
    pub(crate) states: BTreeMap<Guid, State>,
}

impl View {
    /// Reads a bundle; what is unsound in it is an error: a descriptor that does not parse (I10), a file that is named
    /// and not there, a table with findings that no repair may decide (class C), an unreadable state.
    pub(crate) fn read(folder: &dyn Folder) -> Result<Self, String> {
        if !folder.exists(DESCRIPTOR_NAME).map_err(|error| error.to_string())? {
            return Ok(Self::default());
        }
        let descriptor = DiskDescriptor::load(folder, None).map_err(|error| describe(&error))?;
        let mut view = Self {
            exists: true,
            disk_sectors: descriptor.disk_sectors().0,
            raw: descriptor.is_raw(),
            states: BTreeMap::new(),
        };
        let is_base = |guid| descriptor.shot(guid).is_some_and(|shot| shot.parent() == Guid::NONE);
        for image in descriptor.images() {
            let file = folder
                .open(image.file(), Access::ReadOnly)
                .map_err(|error| format!("the descriptor names {}: {error}", image.file()))?;
            if !(descriptor.is_raw() && is_base(image.guid())) {
                check_image(&*file).map_err(|why| format!("{}: {why}", image.file()))?;
            }
        }
        for shot in descriptor.shots() {
            let state = shot.guid();
            let sectors = open_state(folder, &descriptor, state, Access::ReadOnly)
                .map_err(|error| describe(&error))
                .and_then(|chain| read_all(&chain))
                .map_err(|why| format!("state {state}: {why}"))?;
            view.states
                .insert(state, State { parent: shot.parent(), transition: shot.transition(), sectors });
        }
        Ok(view)
    }

    /// The content of a state.
    pub(crate) fn sectors(&self, state: Guid) -> Result<&[u64], String> {
        let found = self.states.get(&state).ok_or_else(|| format!("the state {state} is gone"))?;
        Ok(&found.sectors)
    }
}

/// Files of a folder that its descriptor does not name.
pub(crate) fn unnamed(folder: &dyn Folder) -> Result<Vec<String>, String> {
    let mut names: BTreeSet<String> = folder.list().map_err(|error| error.to_string())?.into_iter().collect();
    if names.remove(DESCRIPTOR_NAME) {
        let descriptor = DiskDescriptor::load(folder, None).map_err(|error| describe(&error))?;
        for image in descriptor.images() {
            names.remove(image.file());
        }
    }
    Ok(names.into_iter().collect())
}

/// Only findings of class A, and of class B where the image was not closed.
fn check_image(file: &dyn Storage) -> Result<(), String> {
    let (header, verdict) = examine(file).map_err(|error| describe(&error))?;
    if let Some(wrong) = verdict.ambiguous.first() {
        return Err(format!("entry {:#x} of {} {}", wrong.raw, wrong.cluster, wrong.finding));
    }
    match (header.in_use(), verdict.at_end.first()) {
        (InUse::Other(mark), _) => Err(format!("the in-use mark is {mark:#x}")),
        (InUse::Closed | InUse::ClosedWithExtension, Some(wrong)) => {
            Err(format!("closed, but entry {:#x} of {} {}", wrong.raw, wrong.cluster, wrong.finding))
        }
        _ => Ok(()),
    }
}

/// All states that were there are there and read the same, sector by sector and in size; those that are new hold what
/// some state held.
pub(crate) fn unchanged(before: &View, found: &View) -> Result<(), String> {
    unchanged_but(before, found, &[])
}

/// As [`unchanged`]; but the states `vanishing` may be gone, or be marked as in transition and hold anything.
pub(crate) fn unchanged_but(before: &View, found: &View, vanishing: &[Guid]) -> Result<(), String> {
    compare(before, found, vanishing, |old, new| {
        if old.len() != new.len() {
            return Err(format!("{} sectors became {}", old.len(), new.len()));
        }
        same_start(old, new)
    })?;
    if before.disk_sectors != found.disk_sectors {
        return Err(format!("the descriptor's size was {}, is {}", before.disk_sectors, found.disk_sectors));
    }
    Ok(())
}

/// As [`unchanged`]; but every state may have its old size or `sectors`: what is new is zeros, what remains is the
/// same.
pub(crate) fn resized(before: &View, found: &View, sectors: u64) -> Result<(), String> {
    let fits = |len: usize, old: usize| len == old || len as u64 == sectors;
    compare(before, found, &[], |old, new| {
        if !fits(new.len(), old.len()) {
            return Err(format!("{} sectors became {}", old.len(), new.len()));
        }
        same_start(old, new)
    })?;
    if !fits(found.disk_sectors as usize, before.disk_sectors as usize) {
        return Err(format!("the descriptor's size was {}, is {}", before.disk_sectors, found.disk_sectors));
    }
    Ok(())
}

/// The common part is the same; what is longer is zeros.
fn same_start(old: &[u64], new: &[u64]) -> Result<(), String> {
    if let Some(sector) = (0..old.len().min(new.len())).find(|&sector| old[sector] != new[sector]) {
        return Err(format!("sector {sector} was {:#x}, is {:#x}", old[sector], new[sector]));
    }
    match (old.len()..new.len()).find(|&sector| new[sector] != 0) {
        Some(sector) => Err(format!("sector {sector}, which is new, holds {:#x}", new[sector])),
        None => Ok(()),
    }
}

fn compare(
    before: &View,
    found: &View,
    vanishing: &[Guid],
    same: impl Fn(&[u64], &[u64]) -> Result<(), String>,
) -> Result<(), String> {
    if before.exists != found.exists {
        return Err("the descriptor appeared or is gone".to_owned());
    }
    for (guid, old) in &before.states {
        match found.states.get(guid) {
            None if vanishing.contains(guid) => {}
            Some(new) if vanishing.contains(guid) && new.transition.is_some() => {}
            None => return Err(format!("the state {guid} is gone")),
            Some(new) => same(&old.sectors, &new.sectors).map_err(|why| format!("state {guid}: {why}"))?,
        }
    }
    for (guid, new) in found.states.iter().filter(|(guid, _)| !before.states.contains_key(guid)) {
        if !before.states.values().any(|old| same(&old.sectors, &new.sectors).is_ok()) {
            return Err(format!("the new state {guid} holds what no state held"));
        }
    }
    Ok(())
}

#[test]
fn every_shape_reads_as_it_was_written() {
    for shape in Shape::several() {
        let disk = shape.bundle().disk(2);
        assert_eq!(disk.snapshot().pending(), 0, "{shape:?}");
        let view = View::read(&disk.folder()).unwrap();
        assert!(
            view.exists && view.states.len() == shape.images() + usize::from(shape.branched),
            "{shape:?}"
        );
        let top = view.sectors(Guid::TOP).unwrap();
        assert_eq!(top.len() as u64, shape.sectors());
        let writer = |sector: u64| match top[sector as usize] {
            0 => None,
            value => {
                assert_eq!(value & 0xffff, sector);
                Some((value >> 16) - 1)
            }
        };
        let last = shape.images() as u64 - 1;
        assert_eq!((writer(0), writer(3)), (None, Some(last)));
        assert_eq!(writer(4 * CLUSTER_SECTORS + 10), Some(0), "through the whole chain");
        assert_eq!(writer(2 * CLUSTER_SECTORS + 39), if last > 0 { Some(1) } else { None });
        assert_eq!(writer(5 * CLUSTER_SECTORS), None, "holes read as zeros");
        assert_eq!(unchanged(&view, &view), Ok(()));
        assert!(unnamed(&disk.folder()).unwrap().is_empty());
        if shape.branched {
            assert_ne!(view.sectors(shape.branch()).unwrap(), top);
        }
        for number in 0..shape.images() {
            let storage = disk.open(&shape.file(number), Access::ReadOnly).unwrap();
            if shape.raw && number == 0 {
                assert_eq!(storage.len().unwrap(), shape.sectors() * SECTOR as u64);
                continue;
            }
            let (header, _) = examine(&storage).unwrap();
            let is_top = number + 1 == shape.images();
            assert_eq!(header.in_use() == InUse::Open, is_top && !shape.closed, "{shape:?} {number}");
            assert_eq!(header.geometry().disk_sectors(), Sectors(shape.sectors()));
        }
    }
    assert_eq!(values(&[0; SECTOR], 0), Ok(vec![0]));
}
