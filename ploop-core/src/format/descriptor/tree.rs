//! A whole tree of states at once, as a copy of a disk with its snapshots has it.

use crate::error::{Error, ErrorKind, Result};
use crate::units::Sectors;

use super::{DiskDescriptor, ENTRIES_MAX, Guid, Image, ImageKind, Mode, Rest, Shot, Transition};

/// One state of a tree and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeState {
    /// Its name.
    pub guid: Guid,
    /// The state it stands on; [`Guid::NONE`] for the base.
    pub parent: Guid,
    /// Its file, relative to the descriptor's folder.
    pub file: String,
    /// Whether it goes as soon as nobody uses it.
    pub temporary: bool,
}

impl DiskDescriptor {
    /// The descriptor of a disk with these states, in this order; `top` is the current one. Fails with
    /// [`ErrorKind::Descriptor`] if they are no tree on one base with a chain for each state, or could not be read
    /// back: a GUID or a file occurs twice, the top is temporary, others stand on it, a chain is too long.
    pub fn of_tree(
        mode: Mode,
        disk: Sectors,
        cluster: Sectors,
        top: Guid,
        states: &[TreeState],
    ) -> Result<Self> {
        let wrong =
            |message: String| Error::new(ErrorKind::Descriptor, format!("write descriptor: {message}"));
        let [first, ..] = states else { return Err(wrong("a disk without a state".to_owned())) };
        if states.len() > ENTRIES_MAX {
            return Err(wrong(format!("{} states, and there may be {ENTRIES_MAX}", states.len())));
        }
        let mut descriptor = Self::new_single(&first.file, mode, disk, cluster)?;
        let kind = if mode == Mode::Raw { ImageKind::Plain } else { ImageKind::Image };
        descriptor.images.clear();
        descriptor.shots.clear();
        descriptor.top = top;
        for state in states {
            let file = super::file_name(&state.file)?.to_owned();
            descriptor.images.push(Image {
                guid: state.guid,
                kind,
                file,
                outside: false,
                rest: Rest::default(),
            });
            descriptor.shots.push(Shot {
                guid: state.guid,
                parent: state.parent,
                transition: state.temporary.then_some(Transition::Temporary),
                rest: Rest::default(),
            });
        }
        descriptor.validate()?;
        if top != Guid::TOP && descriptor.shot(Guid::TOP).is_some() {
            return Err(wrong(format!("{} is not the current state", Guid::TOP)));
        }
        if descriptor.children(Guid::NONE).count() != 1 || descriptor.children(top).next().is_some() {
            return Err(wrong(
                "its states do not stand on one base, or one stands on the current state".to_owned(),
            ));
        }
        for state in states {
            descriptor.chain_for(state.guid)?;
        }
        Ok(descriptor)
    }

    /// The states of this disk, each after the one it stands on, the current one last. Fails with
    /// [`ErrorKind::Descriptor`] unless [`of_tree`](Self::of_tree) could make them, with [`ErrorKind::Busy`] if one of
    /// them is being merged.
    pub fn tree(&self) -> Result<Vec<&Shot>> {
        let refused = |message: String| {
            Error::new(ErrorKind::Descriptor, message).advise("copy the current state alone, without --chain")
        };
        let mut states = Vec::with_capacity(self.shots.len());
        for shot in &self.shots {
            if let Some(transition) = shot.transition.filter(|transition| !transition.is_readable()) {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("the snapshot {} is marked {}: it is being merged", shot.guid, transition.name()),
                )
                .advise("run the merge again to finish it"));
            }
            states.push((shot.guid == self.top, self.chain_for(shot.guid)?.len(), shot));
        }
        if self.children(Guid::NONE).count() != 1 {
            return Err(refused("the states of the disk stand on several bases".to_owned()));
        }
        if let Some(child) = self.children(self.top).next() {
            return Err(refused(format!("the snapshot {} stands on the current state", child.guid)));
        }
        // A state has a longer chain than the one it stands on. Nothing stands on the current one.
        states.sort_by_key(|(is_top, depth, _)| (*is_top, *depth));
        Ok(states.into_iter().map(|(_, _, shot)| shot).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guid(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    fn state(number: u8, parent: u8) -> TreeState {
        let parent = if parent == 0 { Guid::NONE } else { guid(parent) };
        TreeState { guid: guid(number), parent, file: format!("disk.{number}"), temporary: number == 4 }
    }

    fn of(states: &[TreeState], top: u8) -> Result<DiskDescriptor> {
        DiskDescriptor::of_tree(Mode::Expanded, Sectors(4096), Sectors(2048), guid(top), states)
    }

    #[test]
    fn a_tree_survives_in_its_order_and_is_given_out_parents_first() {
        let states = [state(5, 2), state(3, 1), state(2, 1), state(1, 0), state(4, 2)];
        let descriptor = of(&states, 5).unwrap();
        let back = DiskDescriptor::parse(&descriptor.to_bytes()).unwrap();
        let order: Vec<Guid> = back.shots().iter().map(Shot::guid).collect();
        assert_eq!(order, [guid(5), guid(3), guid(2), guid(1), guid(4)]);
        assert_eq!(descriptor.shot(guid(4)).unwrap().transition(), Some(Transition::Temporary));
        let tree: Vec<Guid> = descriptor.tree().unwrap().iter().map(|shot| shot.guid()).collect();
        assert_eq!(tree, [guid(1), guid(3), guid(2), guid(4), guid(5)]);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        for (what, states, top) in [
            ("two bases", vec![state(1, 0), state(2, 0)], 2),
            ("no base", vec![state(1, 2), state(2, 1)], 2),
            ("a missing parent", vec![state(1, 0), state(2, 3)], 2),
            ("a child of the top", vec![state(1, 0), state(2, 1)], 1),
            ("a GUID twice", vec![state(1, 0), state(2, 1), state(2, 1)], 2),
            ("a temporary top", vec![state(1, 0), state(4, 1)], 4),
            ("nothing", vec![], 1),
        ] {
            assert!(of(&states, top).is_err(), "{what}");
        }
        let mut called_top = vec![state(1, 0), state(2, 1)];
        called_top[0].guid = Guid::TOP;
        called_top[1].parent = Guid::TOP;
        assert!(of(&called_top, 2).is_err(), "the constant name of the current state at another one");
        let mut same_file = vec![state(1, 0), state(2, 1)];
        same_file[1].file = same_file[0].file.clone();
        assert!(of(&same_file, 2).is_err(), "a file twice");
        same_file[1].file = "../outside".to_owned();
        assert!(of(&same_file, 2).is_err(), "a file elsewhere");
        let mut merging = of(&[state(1, 0), state(2, 1), state(3, 2)], 3).unwrap();
        merging.begin_merge(guid(1), guid(2)).unwrap();
        assert_eq!(merging.tree().unwrap_err().kind(), ErrorKind::Busy);
    }
}
