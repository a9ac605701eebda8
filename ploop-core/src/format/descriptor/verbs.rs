//! Changes of the tree of snapshots, each as a whole: a verb that fails has changed nothing.
//!
//! The tree is checked before and after each verb: the value as its module says, and that the chain of the top, and
//! of the states named, exists. A broken branch elsewhere does not stand in the way.
//!
//! A verb only says what the *next* descriptor is. What it names must be durable before it is
//! [stored](DiskDescriptor::store), and the files it no longer names may be removed only afterwards: until then they
//! stand in [`obsolete`](DiskDescriptor::obsolete), so that a crash between the two leaves nothing behind.

use crate::error::{Error, ErrorKind, Result};

use super::names::file_name;
use super::{CHAIN_IMAGES_MAX, DiskDescriptor, ENTRIES_MAX, Guid, Image, ImageKind, Rest, Shot, Transition};

/// Which file a merge leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeInto<'a> {
    /// That of the lowest image.
    Lower,
    /// That of the highest image.
    Upper,
    /// A new one: an image, whatever the others were.
    New(&'a str),
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Parameter, message)
}

fn unknown(guid: Guid) -> Error {
    Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {guid}"))
        .advise("list the snapshots of the disk and use one of their GUIDs")
}

/// A name for a new image file of a disk whose first image is called `first`: that name and a new GUID behind it.
pub fn image_name(first: &str) -> String {
    // What an earlier snapshot appended goes: else names grow when the first image is a snapshot's.
    let stem = match first.rfind(".{") {
        Some(at) if at > 0 && first[at + 1..].parse::<Guid>().is_ok() => &first[..at],
        _ => first,
    };
    // A file name has at most 255 bytes, of which the GUID and its dot take 39.
    let mut end = stem.len().min(255 - 39);
    while !stem.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{}", &stem[..end], Guid::random())
}

impl DiskDescriptor {
    /// A name for a new image file of this disk: that of the first image and a new GUID behind it.
    pub fn new_file_name(&self) -> String {
        image_name(self.images.first().map_or("image", |image| image.place().1))
    }

    /// The lowest image under the current state.
    pub fn base_guid(&self) -> Result<Guid> {
        let chain = self.chain_for(self.top)?;
        chain.first().map(|image| image.guid).ok_or_else(|| unknown(self.top))
    }

    /// Files that no image needs (any more, or yet): to be removed, if they are there, unless an image names them.
    pub fn obsolete(&self) -> impl Iterator<Item = &str> + '_ {
        let named = |file: &String| self.images.iter().any(|image| image.file == *file);
        self.obsolete.iter().filter(move |file| !named(file)).map(String::as_str)
    }

    /// Says, before it is made, that a file of this name is of no use unless a later descriptor names it as an image:
    /// what a crash leaves of it is then removed. Fails if the name cannot be an image's or is one's.
    pub fn announce(&mut self, file: &str) -> Result<()> {
        self.check_new_file(file)?;
        let file = file_name(file)?.to_owned();
        if !self.obsolete.contains(&file) {
            self.obsolete.push(file);
        }
        Ok(())
    }

    /// Whether files are still to be removed: an operation was cut, or is at work.
    pub fn has_obsolete(&self) -> bool {
        !self.obsolete.is_empty() || !self.gone.is_empty() && !self.is_merging()
    }

    /// Whether a merge was begun and has not ended.
    fn is_merging(&self) -> bool {
        self.shots.iter().any(|shot| shot.transition.is_some_and(|transition| !transition.is_readable()))
    }

    /// Says what an operation has removed before it goes on to remove more: stored with the next step, so that the same
    /// operation, cut there and run again, does not take what it has removed for what it never had.
    pub fn remember_gone(&mut self, states: &[Guid]) {
        self.gone = states.to_vec();
    }

    /// The states that the last operation removed, if it was cut before it removed their files; the last of them is
    /// the one it merged them into, if it was a merge and no [deletion](Self::was_a_deletion).
    pub fn gone(&self) -> &[Guid] {
        &self.gone
    }

    /// The merge into `upper`, just [finished](Self::finish_merge), is the deletion of what it took away: remembered
    /// without what remains, it is not taken for a merge that somebody asked for.
    pub fn was_a_deletion(&mut self, upper: Guid) {
        if self.gone.last() == Some(&upper) {
            self.gone.pop();
        }
    }

    /// Whether the last operation, which was cut before it removed its files, was the removal of the state `guid`.
    pub fn has_removed(&self, guid: Guid) -> bool {
        match self.gone.as_slice() {
            // The state below became the current one: its name went with it, its content did not.
            &[Guid::TOP, below, ..] if self.shot(below).is_none() => guid == Guid::TOP,
            gone => gone.contains(&guid) && self.shot(guid).is_none(),
        }
    }

    /// The files are gone. What was removed is remembered for as long as a merge that followed has not ended.
    pub fn forget_obsolete(&mut self) {
        self.obsolete.clear();
        if !self.is_merging() {
            self.gone.clear();
        }
    }

    /// The current state becomes the snapshot `snapshot`; a new, empty image in `file` stands on it and is the current
    /// state. Fails with `Parameter` if the GUID or the file is taken, or if there are too many images.
    pub fn add_snapshot(&mut self, snapshot: Guid, file: &str) -> Result<()> {
        self.change(&[], |next| {
            next.check_new_guid(snapshot)?;
            next.check_depth(next.top)?;
            next.rename(next.top, snapshot);
            next.push_top(snapshot, file)
        })
    }

    /// Removes a state that nothing stands on; its file becomes obsolete. If it is the current state, the one below
    /// becomes the current one: refused if that is in a transitional state or others stand on it.
    pub fn remove(&mut self, guid: Guid) -> Result<()> {
        self.change(&[guid], |next| {
            let parent = next.need_shot(guid)?.parent;
            if next.children(guid).next().is_some() {
                return Err(refused(format!("remove {guid}: other states stand on it"))
                    .advise("merge it with the state that stands on it"));
            }
            if parent == Guid::NONE {
                return Err(refused(format!("remove {guid}: it is the base"))
                    .advise("the base goes with the disk: remove the folder"));
            }
            next.check_not_needed(guid)?;
            let is_top = guid == next.top;
            if is_top {
                next.check_becomes_top(parent)?;
            }
            next.drop_entry(guid);
            if is_top {
                next.rename(parent, Guid::TOP);
                // Tells a removed current state from one that was switched away from.
                next.gone.push(parent);
            }
            Ok(())
        })
    }

    /// A new, empty image in `file` on the snapshot `to` becomes the current state. The former current state is kept as
    /// the snapshot `keep`, or removed, its file becoming obsolete.
    pub fn switch(&mut self, to: Guid, file: &str, keep: Option<Guid>) -> Result<()> {
        self.change(&[to], |next| {
            if to == next.top {
                return Err(refused(format!("switch to {to}: it is the current state"))
                    .advise("name the snapshot to go back to"));
            }
            if let Some(transition) = next.need_shot(to)?.transition {
                return Err(refused(format!("switch to {to}: it is marked {}", transition.name()))
                    .advise("it goes as soon as nothing needs it; switch to another snapshot"));
            }
            next.check_depth(to)?;
            match keep {
                Some(keep) => {
                    next.check_new_guid(keep)?;
                    next.rename(next.top, keep);
                }
                None => {
                    next.check_not_needed(next.top)?;
                    if next.children(next.top).next().is_some() {
                        return Err(refused("switch: other states stand on the current one")
                            .advise("keep it as a snapshot"));
                    }
                    next.drop_entry(next.top);
                }
            }
            next.push_top(to, file)
        })
    }

    /// The states from `lower` up to `upper`, lowest first. Fails with `Parameter` unless the one stands on the other.
    pub fn range(&self, lower: Guid, upper: Guid) -> Result<Vec<&Shot>> {
        self.need_shot(lower)?;
        self.need_shot(upper)?;
        let chain = self.chain_for(upper)?;
        let from = chain.iter().position(|image| image.guid == lower);
        let from = from.ok_or_else(|| refused(format!("{upper} does not stand on {lower}")))?;
        chain.into_iter().skip(from).map(|image| self.need_shot(image.guid)).collect()
    }

    /// Marks what a merge from `upper` down into `lower` goes through, all but `upper`, as being merged: those states
    /// can no longer be used. Refused if anything else stands on one of them.
    pub fn begin_merge(&mut self, lower: Guid, upper: Guid) -> Result<()> {
        self.change(&[upper], |next| {
            for guid in next.check_merge(lower, upper)? {
                next.set_transition(guid, Some(Transition::Merging))?;
            }
            Ok(())
        })
    }

    /// The states from `lower` up to `upper` have become one: `upper` remains, on what `lower` stood on. The other
    /// files become obsolete. Refused if anything else stands on one of those that go.
    pub fn finish_merge(&mut self, lower: Guid, upper: Guid, into: MergeInto<'_>) -> Result<()> {
        self.change(&[upper], |next| {
            let gone = next.check_merge(lower, upper)?;
            let parent = next.need_shot(lower)?.parent;
            let at = next.images.iter().position(|image| image.guid == lower);
            let from = next.images.iter().position(|image| image.guid == upper);
            let (Some(at), Some(from)) = (at, from) else { return Err(unknown(lower)) };
            match into {
                MergeInto::Upper => {}
                MergeInto::Lower => {
                    let file = next.images[at].file.clone();
                    let old = std::mem::replace(&mut next.images[from].file, file);
                    next.images[at].file = old;
                }
                MergeInto::New(file) => {
                    next.check_new_file(file)?;
                    let file = file_name(file)?.to_owned();
                    next.obsolete.retain(|obsolete| *obsolete != file);
                    let old = std::mem::replace(&mut next.images[from].file, file);
                    next.obsolete.push(old);
                    if parent == Guid::NONE && next.is_raw() {
                        // The base is no longer raw, and only the base ever was.
                        for image in &mut next.images {
                            image.kind = ImageKind::Image;
                        }
                    }
                }
            }
            // What remains stands where the lowest stood: the first image gives new files their name.
            next.images.swap(at, from);
            for guid in gone {
                next.drop_entry(guid);
            }
            if let Some(shot) = next.shots.iter_mut().find(|shot| shot.guid == upper) {
                shot.parent = parent;
            }
            next.gone.push(upper);
            Ok(())
        })
    }

    /// Marks a state that is not the current one.
    pub fn mark(&mut self, guid: Guid, transition: Transition) -> Result<()> {
        self.change(&[guid], |next| next.set_transition(guid, Some(transition)))
    }

    /// Takes its mark from a state.
    pub fn unmark(&mut self, guid: Guid) -> Result<()> {
        self.change(&[guid], |next| next.set_transition(guid, None))
    }

    /// The descriptor of a disk of its own that begins as the state `state` of this one: the images of that state under
    /// the names `files`, base first, the highest called `frozen`, and a new, empty current state in `top_file`.
    pub fn clone_of(&self, state: Guid, frozen: Guid, files: &[String], top_file: &str) -> Result<Self> {
        let chain: Vec<Guid> = self.chain_for(state)?.iter().map(|image| image.guid).collect();
        self.check_alive()?;
        let mut next = self.clone();
        if chain.len() != files.len() {
            return Err(refused(format!("clone: {} files for {} images", files.len(), chain.len())));
        }
        let mut images = Vec::new();
        let mut shots = Vec::new();
        for (guid, file) in chain.iter().zip(files) {
            let image = self.image(*guid).ok_or_else(|| unknown(*guid))?;
            images.push(Image { file: file_name(file)?.to_owned(), ..image.clone() });
            shots.push(Shot { transition: None, ..self.need_shot(*guid)?.clone() });
        }
        next.images = images;
        next.shots = shots;
        next.forget_obsolete();
        next.top = state;
        if state != frozen {
            next.check_new_guid(frozen)?;
            next.rename(state, frozen);
        }
        next.top = frozen;
        next.check_depth(frozen)?;
        next.push_top(frozen, top_file)?;
        next.check_tree(&[frozen])?;
        Ok(next)
    }

    /// Runs a change on a copy, which replaces this value only if it is sound.
    fn change(&mut self, named: &[Guid], verb: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.has_parent_volume() {
            return Err(Error::new(
                ErrorKind::Descriptor,
                "change snapshots: the disk is a volume that stands on a volume in another folder",
            )
            .advise("use the tool that made it"));
        }
        self.check_alive()?;
        let mut next = self.clone();
        next.convert_top()?;
        for &guid in named {
            if next.shot(guid).is_none() {
                return Err(unknown(guid));
            }
        }
        next.check_tree(named)?;
        verb(&mut next)?;
        next.check_tree(&[])?;
        *self = next;
        Ok(())
    }

    fn check_tree(&self, named: &[Guid]) -> Result<()> {
        self.validate()?;
        for &guid in [self.top].iter().chain(named) {
            self.chain_for(guid)?;
        }
        Ok(())
    }

    fn need_shot(&self, guid: Guid) -> Result<&Shot> {
        self.shot(guid).ok_or_else(|| unknown(guid))
    }

    fn check_new_guid(&self, guid: Guid) -> Result<()> {
        if guid == Guid::NONE || guid == Guid::TOP {
            return Err(refused(format!("{guid} has a meaning of its own and cannot name a snapshot")));
        }
        if self.shot(guid).is_some() || self.image(guid).is_some() {
            return Err(refused(format!("there is a snapshot {guid}")).advise("choose another GUID, or none"));
        }
        Ok(())
    }

    fn check_new_file(&self, file: &str) -> Result<()> {
        if self.images.iter().any(|image| image.file == file) {
            return Err(
                refused(format!("the file {file:?} belongs to an image")).advise("choose another name")
            );
        }
        Ok(())
    }

    /// Whether one more image may stand on `guid`.
    fn check_depth(&self, guid: Guid) -> Result<()> {
        let depth = self.chain_for(guid)?.len();
        if depth >= CHAIN_IMAGES_MAX || self.images.len() >= ENTRIES_MAX {
            return Err(refused(format!(
                "the disk has {depth} images on top of each other and {} in all; {CHAIN_IMAGES_MAX} and {ENTRIES_MAX} \
                 are the most",
                self.images.len()
            ))
            .advise("merge or delete snapshots first"));
        }
        Ok(())
    }

    /// Refuses what a merge under way has still to copy from.
    fn check_not_needed(&self, guid: Guid) -> Result<()> {
        let below = self.shot(self.need_shot(guid)?.parent);
        match below.and_then(|below| below.transition) {
            Some(transition) if !transition.is_readable() => Err(refused(format!(
                "{guid} cannot go: a merge with the state below it was cut, and needs it to finish"
            ))
            .advise("finish that merge: run it again")),
            _ => Ok(()),
        }
    }

    fn check_becomes_top(&self, guid: Guid) -> Result<()> {
        let shot = self.need_shot(guid)?;
        if let Some(transition) = shot.transition {
            return Err(refused(format!(
                "{guid} below cannot become the current state: it is marked {}",
                transition.name()
            ))
            .advise("switch to another snapshot instead"));
        }
        if self.children(guid).count() > 1 {
            return Err(refused(format!(
                "{guid} below cannot become the current state: other states stand on it"
            ))
            .advise("switch to it instead"));
        }
        Ok(())
    }

    /// What goes when `upper` is merged down into `lower`.
    fn check_merge(&self, lower: Guid, upper: Guid) -> Result<Vec<Guid>> {
        let mut gone: Vec<Guid> = self.range(lower, upper)?.iter().map(|shot| shot.guid).collect();
        gone.pop();
        if gone.is_empty() {
            return Err(refused(format!("merge {upper}: with itself")));
        }
        for &guid in &gone {
            let count = self.children(guid).count();
            if count != 1 {
                return Err(refused(format!("merge {upper} into {lower}: {count} states stand on {guid}"))
                    .advise("delete the other snapshots first"));
            }
        }
        Ok(gone)
    }

    fn set_transition(&mut self, guid: Guid, transition: Option<Transition>) -> Result<()> {
        if guid == self.top && transition.is_some() {
            return Err(refused("the current state cannot be marked").advise("make a snapshot of it first"));
        }
        let shot = self.shots.iter_mut().find(|shot| shot.guid == guid);
        shot.ok_or_else(|| unknown(guid))?.transition = transition;
        Ok(())
    }

    fn drop_entry(&mut self, guid: Guid) {
        let (gone, kept) = self.images.drain(..).partition(|image: &Image| image.guid == guid);
        self.images = kept;
        self.obsolete.extend(gone.into_iter().map(|image| image.file));
        self.gone.push(guid);
        self.shots.retain(|shot| shot.guid != guid);
    }

    fn push_top(&mut self, parent: Guid, file: &str) -> Result<()> {
        self.check_new_file(file)?;
        // As the original: in a raw disk every image is called plain, though only the base is.
        let kind = if self.is_raw() { ImageKind::Plain } else { ImageKind::Image };
        let file = file_name(file)?.to_owned();
        self.obsolete.retain(|obsolete| *obsolete != file);
        self.images.push(Image { guid: Guid::TOP, kind, file, outside: false, rest: Rest::default() });
        self.shots.push(Shot { guid: Guid::TOP, parent, transition: None, rest: Rest::default() });
        self.top = Guid::TOP;
        Ok(())
    }
}
