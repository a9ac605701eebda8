//! What can be done with a closed bundle, and what each of it makes of a model: one list of sectors for each state.

use std::collections::{BTreeMap, BTreeSet};

use ploop_core::error::Error;
use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, Guid, Mode, Transition, Version};
use ploop_core::io::Folder;
use ploop_core::io::sim::{Random, SimDisk};
use ploop_core::ops::check::{CheckOptions, check_bundle_in};
use ploop_core::ops::compact::{CompactOptions, compact_in};
use ploop_core::ops::convert::{ConvertOptions, convert_in};
use ploop_core::ops::merge::{MergeOptions, merge_in};
use ploop_core::ops::progress::Silent;
use ploop_core::ops::resize::{ResizeOptions, Shrink as Rest, resize_in};
use ploop_core::ops::restore_descriptor::{RestoreOptions, restore_descriptor_in};
use ploop_core::ops::snapshot::{SnapshotOptions, snapshot_in};
use ploop_core::ops::snapshot_delete::{DeleteOptions, delete_in};
use ploop_core::ops::snapshot_switch::{SwitchOptions, switch_in};
use ploop_core::units::Sectors;

use crate::bundle::{CLUSTER_SECTORS, View, guid, unnamed};

/// What a disk is converted to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Mode(Mode),
    Version(Version),
    /// Sectors of a cluster.
    Cluster(u64),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Command {
    Snapshot(Guid),
    /// It goes as soon as it can.
    Temporary(Guid),
    /// Marked only, where several states stand on it.
    Delete(Guid),
    /// The current state goes, and the one below it becomes the current one.
    DeleteTop,
    /// Into the one below; the name that remains is this one.
    Merge(Guid),
    /// The current state with the one below it, in a new file of this number.
    MergeIntoNew(usize),
    /// Everything below the current state.
    MergeAll,
    Switch(Guid),
    /// The current state is kept under the second name.
    SwitchKeeping(Guid, Guid),
    /// To so many sectors.
    Grow(u64),
    Shrink(u64),
    Compact,
    Convert(Form),
    /// A check that repairs.
    Repair,
    /// The descriptor is lost and made anew.
    RestoreDescriptor,
}

use Command::*;

/// A check that may repair; its verdict must be "nothing left to do".
pub(crate) fn repair(folder: &dyn Folder) -> Result<(), Error> {
    let report = check_bundle_in(folder, &CheckOptions::repair(""), &Silent)?;
    match report.failure() {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

impl Command {
    pub(crate) fn run(self, folder: &dyn Folder) -> Result<(), Error> {
        let make = |snapshot, temporary| {
            snapshot_in(folder, &SnapshotOptions { snapshot: Some(snapshot), temporary }, &Silent).map(drop)
        };
        let delete = |snapshot| delete_in(folder, &DeleteOptions { snapshot }, &Silent).map(drop);
        let merge = |options: MergeOptions| merge_in(folder, &options, &Silent).map(drop);
        let switch = |snapshot, keep| switch_in(folder, &SwitchOptions { snapshot, keep }, &Silent).map(drop);
        let resize = |sectors, shrink: Rest| {
            let options = ResizeOptions { shrink, ..ResizeOptions::new("", Sectors(sectors)) };
            resize_in(folder, &options, &Silent).map(drop)
        };
        match self {
            Snapshot(snapshot) => make(snapshot, false),
            Temporary(snapshot) => make(snapshot, true),
            Delete(snapshot) => delete(snapshot),
            DeleteTop => delete(Guid::TOP),
            Merge(snapshot) => merge(MergeOptions { snapshot: Some(snapshot), ..MergeOptions::default() }),
            MergeIntoNew(number) => {
                let new_file = Some(format!("new{number}.hds"));
                merge(MergeOptions { new_file, ..MergeOptions::default() })
            }
            MergeAll => merge(MergeOptions { all: true, ..MergeOptions::default() }),
            Switch(snapshot) => switch(snapshot, None),
            SwitchKeeping(snapshot, keep) => switch(snapshot, Some(keep)),
            Grow(sectors) => resize(sectors, Rest::Refuse),
            Shrink(sectors) => resize(sectors, Rest::Discard),
            Compact => {
                let report = compact_in(folder, &CompactOptions::default(), &Silent)?;
                assert!(report.complete, "{report:?}");
                Ok(())
            }
            Convert(form) => {
                let mut options = ConvertOptions::new("");
                match form {
                    Form::Mode(mode) => options.mode = Some(mode),
                    Form::Version(version) => options.version = Some(version),
                    Form::Cluster(sectors) => options.cluster = Some(Sectors(sectors)),
                }
                convert_in(folder, folder, &options, &Silent).map(drop)
            }
            Repair => repair(folder),
            RestoreDescriptor => {
                if let Ok(descriptor) = DiskDescriptor::load(folder, None) {
                    // An undo file, a plan and the like are nothing that the image needs.
                    assert_eq!(descriptor.images().len(), 1);
                    folder.unlink(DESCRIPTOR_NAME).unwrap();
                    folder.sync().unwrap();
                }
                let names = folder.list().unwrap();
                let image = names.iter().find(|name| !name.contains(".tmp.") && !name.contains(".undo"));
                let image = image.map(String::as_str).unwrap_or_default();
                restore_descriptor_in(folder, image, &RestoreOptions::new("", image)).map(drop)
            }
        }
    }

    /// The state that a merge leaves.
    fn merges_into(self) -> Option<Guid> {
        match self {
            Merge(snapshot) => Some(snapshot),
            MergeIntoNew(_) | MergeAll => Some(Guid::TOP),
            _ => None,
        }
    }

    /// Whether it is the very command that `cut` was, which had done all that can be seen when it was cut: it finds
    /// itself done, also where another of the kind is meant.
    pub(crate) fn repeats(self, cut: Self) -> bool {
        let is_merge = self.merges_into().is_some() && self.merges_into() == cut.merges_into();
        is_merge || matches!((self, cut), (DeleteTop, DeleteTop))
    }

    /// What may have to be finished once it is done, after `earlier` was cut at its end.
    pub(crate) fn leaves(self, earlier: Option<Self>, is_cut_at_end: bool) -> Option<Self> {
        match self {
            // A check says nothing of what people did, and forgets nothing of it.
            Repair => earlier,
            // These have nothing to remember, and may be cut before they have changed anything.
            Grow(_) | Shrink(_) | Compact | Convert(_) | RestoreDescriptor if is_cut_at_end => earlier,
            _ if is_cut_at_end => Some(self),
            _ => None,
        }
    }
}

/// What is in a bundle.
#[derive(Clone)]
pub(crate) struct Model {
    /// Content and parent of each state.
    pub(crate) states: BTreeMap<Guid, (Vec<u64>, Guid)>,
    /// Those that go as soon as they can: by any command, so the bundle itself says which are left.
    pub(crate) temporary: BTreeSet<Guid>,
    raw: bool,
    /// Sectors of a cluster.
    cluster: u64,
}

impl Model {
    pub(crate) fn of(view: &View) -> Self {
        let states = view.states.iter();
        Self {
            states: states.map(|(&guid, state)| (guid, (state.sectors.clone(), state.parent))).collect(),
            temporary: BTreeSet::new(),
            raw: view.raw,
            cluster: CLUSTER_SECTORS,
        }
    }

    /// For a disk whose clusters are no longer those of its shape.
    pub(crate) fn with_cluster(self, sectors: u64) -> Self {
        Self { cluster: sectors, ..self }
    }

    fn children(&self, guid: Guid) -> usize {
        self.states.values().filter(|(_, parent)| *parent == guid).count()
    }

    fn top(&self) -> &(Vec<u64>, Guid) {
        &self.states[&Guid::TOP]
    }

    /// Takes a state out; what stood on it stands on what it stood on.
    fn remove(&mut self, guid: Guid) {
        self.temporary.remove(&guid);
        let Some((_, parent)) = self.states.remove(&guid) else { return };
        for (_, below) in self.states.values_mut() {
            if *below == guid {
                *below = parent;
            }
        }
    }

    /// The states under the current one.
    fn below_top(&self) -> Vec<Guid> {
        let mut below = vec![self.top().1];
        while let Some((_, parent)) = below.last().and_then(|guid| self.states.get(guid)) {
            below.push(*parent);
        }
        below.pop();
        below
    }

    pub(crate) fn apply(&mut self, command: Command) {
        match command {
            Snapshot(snapshot) | Temporary(snapshot) => {
                let (sectors, parent) = self.top().clone();
                self.states.insert(snapshot, (sectors.clone(), parent));
                self.states.insert(Guid::TOP, (sectors, snapshot));
                if matches!(command, Temporary(_)) {
                    self.temporary.insert(snapshot);
                }
            }
            Delete(snapshot) if self.children(snapshot) > 1 => drop(self.temporary.insert(snapshot)),
            Delete(snapshot) => self.remove(snapshot),
            DeleteTop => {
                let below = self.top().1;
                if let Some(state) = self.states.remove(&below) {
                    self.states.insert(Guid::TOP, state);
                }
            }
            Merge(snapshot) => self.remove(self.states[&snapshot].1),
            MergeIntoNew(_) => {
                let below = self.top().1;
                // A base is no longer raw when it is in a new image.
                self.raw &= self.states.get(&below).is_some_and(|(_, parent)| *parent != Guid::NONE);
                self.remove(below);
            }
            MergeAll => self.below_top().into_iter().for_each(|guid| self.remove(guid)),
            Switch(snapshot) | SwitchKeeping(snapshot, _) => {
                let sectors = self.states[&snapshot].0.clone();
                let old = self.states.insert(Guid::TOP, (sectors, snapshot));
                if let (SwitchKeeping(_, keep), Some(old)) = (command, old) {
                    self.states.insert(keep, old);
                }
            }
            Grow(sectors) | Shrink(sectors) => {
                if let Some((content, _)) = self.states.get_mut(&Guid::TOP) {
                    content.resize(sectors as usize, 0);
                }
            }
            Convert(Form::Mode(mode)) => self.raw = mode == Mode::Raw,
            Convert(Form::Cluster(sectors)) => self.cluster = sectors,
            Convert(Form::Version(_)) | Compact | Repair | RestoreDescriptor => {}
        }
    }

    /// The states that a command takes away: between its steps they may be anything, or gone.
    fn vanishing(&self, command: Command) -> Vec<Guid> {
        let mut vanishing: Vec<Guid> = self.temporary.iter().copied().collect();
        match command {
            Delete(snapshot) => vanishing.push(snapshot),
            Merge(snapshot) => vanishing.push(self.states[&snapshot].1),
            DeleteTop | MergeIntoNew(_) => vanishing.push(self.top().1),
            MergeAll => vanishing.extend(self.below_top()),
            _ => {}
        }
        vanishing
    }

    /// A command that can be done now.
    pub(crate) fn choose(&self, random: &mut Random, next: &mut usize) -> Option<Command> {
        let snapshots: Vec<Guid> = self.states.keys().copied().filter(|&guid| guid != Guid::TOP).collect();
        let one = (!snapshots.is_empty()).then(|| snapshots[random.index(snapshots.len())]);
        let lasting = one.filter(|guid| !self.temporary.contains(guid));
        let (top, below) = self.top();
        let sectors = top.len() as u64;
        let alone = snapshots.is_empty();
        let mergeable = |guid: Guid| {
            self.states.contains_key(&guid) && self.children(guid) == 1 && !self.temporary.contains(&guid)
        };
        let mut new = || {
            *next += 1;
            *next
        };
        match random.index(19) {
            0 | 1 if snapshots.len() < 6 => Some(Snapshot(guid(new()))),
            2 if snapshots.len() < 6 => Some(Temporary(guid(new()))),
            3 | 4 => lasting.map(Delete),
            5 if mergeable(*below) => Some(DeleteTop),
            6 => {
                let all: Vec<Guid> = self.states.keys().copied().collect();
                let upper = all[random.index(all.len())];
                let is_lasting = !self.temporary.contains(&upper);
                (is_lasting && mergeable(self.states[&upper].1)).then_some(Merge(upper))
            }
            7 if mergeable(*below) => Some(MergeIntoNew(new())),
            8 if !alone && self.below_top().into_iter().all(mergeable) => Some(MergeAll),
            9 => lasting.map(Switch),
            10 if snapshots.len() < 6 => lasting.map(|snapshot| SwitchKeeping(snapshot, guid(new()))),
            11 | 12 if sectors < 40 * self.cluster => {
                let grown = sectors.next_multiple_of(self.cluster) + self.cluster * (1 + random.below(20));
                Some(Grow(grown))
            }
            13 if alone && sectors > self.cluster => {
                Some(Shrink(self.cluster * (1 + random.below(sectors / self.cluster))))
            }
            14 if !(alone && self.raw) => Some(Compact),
            15 | 16 if self.temporary.is_empty() => self.choose_form(random).map(Convert),
            17 => Some(Repair),
            18 if alone && !self.raw => Some(RestoreDescriptor),
            _ => None,
        }
    }

    fn choose_form(&self, random: &mut Random) -> Option<Form> {
        let alone = self.states.len() == 1;
        let fits = |cluster: u64| {
            self.states.values().all(|(sectors, _)| (sectors.len() as u64).is_multiple_of(cluster))
        };
        if !fits(self.cluster) {
            return None;
        }
        match random.index(4) {
            0 if alone => Some(Form::Mode([Mode::Raw, Mode::Expanded, Mode::Preallocated][random.index(3)])),
            1 => Some(Form::Mode(Mode::Expanded)),
            2 if !(alone && self.raw) => Some(Form::Version([Version::V1, Version::V2][random.index(2)])),
            3 => {
                let cluster = CLUSTER_SECTORS << random.below(2);
                fits(cluster).then_some(Form::Cluster(cluster))
            }
            _ => None,
        }
    }

    /// Whether a bundle is what the model says; then the model without the temporary states that have gone.
    pub(crate) fn reached(&self, disk: &SimDisk) -> Result<Self, String> {
        let view = View::read(&disk.folder())?;
        let mut model = self.clone();
        for gone in self.temporary.iter().filter(|guid| !view.states.contains_key(guid)) {
            model.remove(*gone);
        }
        let expected: Vec<_> = model.states.keys().collect();
        let found: Vec<_> = view.states.keys().collect();
        if expected != found {
            return Err(format!("states {found:?} instead of {expected:?}"));
        }
        for (guid, (sectors, parent)) in &model.states {
            let state = &view.states[guid];
            let transition = model.temporary.contains(guid).then_some(Transition::Temporary);
            if state.parent != *parent || state.transition != transition {
                return Err(format!("{guid} stands on {} ({:?})", state.parent, state.transition));
            }
            same(&state.sectors, sectors).map_err(|why| format!("state {guid}: {why}"))?;
        }
        if view.disk_sectors != model.top().0.len() as u64 {
            return Err(format!("the descriptor says {} sectors", view.disk_sectors));
        }
        if view.raw != model.raw {
            return Err(format!("raw: {}", view.raw));
        }
        let is_kept = |name: &String| !name.contains(".tmp.") && !name.contains(".undo");
        let left: Vec<_> = unnamed(&disk.folder())?.into_iter().filter(is_kept).collect();
        if left.is_empty() { Ok(model) } else { Err(format!("left over: {left:?}")) }
    }

    /// In the middle of a command: every state that stays reads as ever; the current one as before or after.
    pub(crate) fn check_cut(&self, disk: &SimDisk, command: Command, after: &Self) -> Result<(), String> {
        let view = View::read(&disk.folder())?;
        if !view.exists && matches!(command, RestoreDescriptor) {
            return Ok(());
        }
        let vanishing = self.vanishing(command);
        for (guid, (sectors, _)) in &self.states {
            let Some(found) = view.states.get(guid) else {
                if vanishing.contains(guid) {
                    continue;
                }
                return Err(format!("the state {guid} is gone"));
            };
            let becomes = after.states.get(guid).map(|(sectors, _)| sectors);
            if becomes.is_some_and(|sectors| same(&found.sectors, sectors).is_ok()) {
                continue;
            }
            if vanishing.contains(guid) && found.transition.is_some() {
                continue;
            }
            if let (Guid::TOP, Grow(size) | Shrink(size)) = (*guid, command) {
                resizing(&found.sectors, sectors, size as usize, view.disk_sectors)
                    .map_err(|why| format!("{command:?}: {why}"))?;
                continue;
            }
            same(&found.sectors, sectors).map_err(|why| format!("state {guid}: {why}"))?;
        }
        Ok(())
    }
}

/// A current state in the middle of a change of its size: the common part is as it was. Until the descriptor says
/// otherwise all of the old content is there; what is new is zeros.
fn resizing(found: &[u64], old: &[u64], size: usize, disk_sectors: u64) -> Result<(), String> {
    let is_smaller_now = disk_sectors == size as u64 && size < old.len();
    let kept = if is_smaller_now { size } else { old.len() };
    if found.len() < kept || found.len() > old.len().max(size) {
        return Err(format!("{} sectors, the descriptor says {disk_sectors}", found.len()));
    }
    same(&found[..kept], &old[..kept])?;
    if size > old.len() && found[kept..].iter().any(|&value| value != 0) {
        return Err("what is new is not zeros".to_owned());
    }
    Ok(())
}

pub(crate) fn same(found: &[u64], expected: &[u64]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} sectors instead of {}", found.len(), expected.len()));
    }
    match (0..found.len()).find(|&sector| found[sector] != expected[sector]) {
        Some(sector) => {
            Err(format!("sector {sector} holds {:#x}, not {:#x}", found[sector], expected[sector]))
        }
        None => Ok(()),
    }
}
