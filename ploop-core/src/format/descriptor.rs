//! The disk's descriptor, `DiskDescriptor.xml`: which images it has and how its snapshots hang together.
//!
//! A [`DiskDescriptor`] is a value: reading it from bytes checks it, writing it gives bytes; `descriptor_store.rs`
//! brings those to disk atomically (I10). Elements and attributes that we do not know are kept and written back
//! behind those we do; the layout is that of the original. Comments are not kept.
//!
//! Invariants of a value that was read or built here:
//!
//! * at least one image; every GUID occurs once among the images and once among the shots; each image has its shot
//!   and each shot its image (those without are set aside, `dead.rs`); the top is one of them and not temporary (but for volumes with a parent in another
//!   folder, which are kept and written but give no chain);
//! * every file name is one component, or a folder of the bundle and one component (threat rule M4), no file occurs
//!   twice, and none is the descriptor itself.
//!
//! Parents are **not** checked on reading, because one broken branch must not take the others with it:
//! [`DiskDescriptor::chain_for`] finds cycles, missing parents and chains that are too long.

use std::collections::BTreeSet;

use crate::error::{Error, ErrorKind, Result};
use crate::units::Sectors;

use super::geometry::{CLUSTER_SECTORS_READ_MAX, Geometry, cylinders_and_heads};
pub use super::guid::Guid;
use super::xml::Node;
use dead::Dead;
use names::file_name;

/// The name of every descriptor.
pub const DESCRIPTOR_NAME: &str = "DiskDescriptor.xml";
/// Most images in one chain.
pub const CHAIN_IMAGES_MAX: usize = 128;
/// Most images, and most shots, in one descriptor.
pub const ENTRIES_MAX: usize = 1024;

/// How the disk lies in its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The base is the bytes of the disk; snapshots above it are ordinary images.
    Raw,
    /// Clusters are allocated when first written.
    Expanded,
    /// All clusters were allocated at once.
    Preallocated,
}

impl Mode {
    /// The word used in commands and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Expanded => "expanded",
            Self::Preallocated => "preallocated",
        }
    }
}

/// What an image is said to be. Not to be trusted for any but the base: the original marks every image of a raw
/// disk as plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// An image with header and table ("Compressed").
    Image,
    /// The bytes of the disk ("Plain").
    Plain,
}

/// One file of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    guid: Guid,
    kind: ImageKind,
    file: String,
    /// It lies outside of the bundle: `file` is the path that the descriptor has.
    outside: bool,
    rest: Rest,
}

impl Image {
    /// Its name, shared with its shot.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// What it is said to be; see [`DiskDescriptor::is_raw`].
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// The file, relative to the descriptor's folder: `NAME` or `FOLDER/NAME`.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Whether the file lies outside of the bundle, and [`file`](Self::file) is a path that nobody follows by itself.
    /// Only where the reader of the descriptor asked for such images.
    pub fn is_outside(&self) -> bool {
        self.outside
    }

    /// The sub-folder, if the file lies in one, and the name in it.
    pub fn place(&self) -> (Option<&str>, &str) {
        match self.file.split_once('/') {
            Some((folder, name)) => (Some(folder), name),
            None => (None, &self.file),
        }
    }
}

/// A state on the way from one descriptor to the next. Kept as found; none of them may become the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transition {
    /// To be merged as soon as nothing uses it. The original also marks a merge under way with it.
    Temporary,
    /// A merge into its file, or through it, has begun: what it was can no longer be read, and only going on helps.
    /// Written as `Temporary`, which the original understands, and an element of our own.
    Merging,
    /// First half of a merge from above into below.
    TemporaryZero,
    /// Second half of it.
    TemporaryZeroSwap,
}

impl Transition {
    #[cfg(test)]
    const ALL: [Self; 4] = [Self::Temporary, Self::Merging, Self::TemporaryZero, Self::TemporaryZeroSwap];

    /// The descriptor's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Temporary => "Temporary",
            Self::Merging => "Merging",
            Self::TemporaryZero => "TemporaryZero",
            Self::TemporaryZeroSwap => "TemporaryZeroSwap",
        }
    }

    /// Whether the state of a shot so marked can still be read. Those that stand on it always can.
    pub fn is_readable(self) -> bool {
        self == Self::Temporary
    }
}

/// A snapshot, or the current state: which image it is and what that stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    guid: Guid,
    parent: Guid,
    transition: Option<Transition>,
    rest: Rest,
}

impl Shot {
    /// Its name, shared with its image.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// The shot below, [`Guid::NONE`] for a base.
    pub fn parent(&self) -> Guid {
        self.parent
    }

    /// The transitional state it is in, if it is in one.
    pub fn transition(&self) -> Option<Transition> {
        self.transition
    }
}

/// What of an element is not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rest {
    attributes: Vec<(String, String)>,
    children: Vec<Node>,
}

/// What a `DiskDescriptor.xml` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDescriptor {
    root: String,
    disk_sectors: u64,
    delta_sectors_max: Option<u64>,
    cylinders: u64,
    heads: u64,
    cluster_sectors: u32,
    preallocated: bool,
    images: Vec<Image>,
    shots: Vec<Shot>,
    top: Guid,
    volume: Option<Node>,
    /// Files that no image needs any more and that may still be there.
    obsolete: Vec<String>,
    /// The states whose files those were.
    gone: Vec<Guid>,
    /// Entries without a counterpart.
    dead: Dead,
    /// What was done to find the images.
    notes: Vec<String>,
    rest: RestOf,
}

/// What is not ours in each of the fixed elements.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RestOf {
    root: Rest,
    parameters: Rest,
    data: Rest,
    storage: Rest,
    snapshots: Rest,
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Descriptor, format!("read descriptor: {}", message.into()))
}

impl DiskDescriptor {
    /// The descriptor of a disk of one image without snapshots. `file` is its name in the descriptor's folder.
    pub fn new_single(file: &str, mode: Mode, disk: Sectors, cluster: Sectors) -> Result<Self> {
        let cluster_sectors = cluster_sectors(cluster.0)?;
        let kind = if mode == Mode::Raw { ImageKind::Plain } else { ImageKind::Image };
        let mut descriptor = Self {
            root: "Parallels_disk_image".to_owned(),
            disk_sectors: 0,
            delta_sectors_max: None,
            cylinders: 0,
            heads: 0,
            cluster_sectors,
            preallocated: mode == Mode::Preallocated,
            images: vec![Image {
                guid: Guid::TOP,
                kind,
                file: file_name(file)?.to_owned(),
                outside: false,
                rest: Rest::default(),
            }],
            shots: vec![Shot {
                guid: Guid::TOP,
                parent: Guid::NONE,
                transition: None,
                rest: Rest::default(),
            }],
            top: Guid::TOP,
            volume: None,
            obsolete: Vec::new(),
            gone: Vec::new(),
            dead: Dead::default(),
            notes: Vec::new(),
            rest: RestOf::default(),
        };
        descriptor.set_disk_sectors(disk)?;
        Ok(descriptor)
    }

    /// As [`new_single`](Self::new_single) for an image of this geometry.
    pub fn for_image(file: &str, geometry: &Geometry, preallocated: bool) -> Result<Self> {
        let mode = match (geometry.is_raw(), preallocated) {
            (true, _) => Mode::Raw,
            (false, true) => Mode::Preallocated,
            (false, false) => Mode::Expanded,
        };
        let cluster = Sectors(u64::from(geometry.cluster_sectors()));
        Self::new_single(file, mode, geometry.disk_sectors(), cluster)
    }

    /// Reads and checks a descriptor (module documentation). Errors are of kind [`ErrorKind::Descriptor`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Self::parse_in(bytes, None)
    }

    fn validate(&self) -> Result<()> {
        let mut files = BTreeSet::new();
        for image in self.images.iter().chain(&self.dead.images) {
            if !files.insert(&image.file) {
                return Err(wrong(format!("the file {:?} belongs to two images", image.file)));
            }
        }
        let images = unique("Image", self.images.iter().map(|image| image.guid))?;
        let shots = unique("Shot", self.shots.iter().map(|shot| shot.guid))?;
        if images.contains(&Guid::NONE) || shots.contains(&Guid::NONE) {
            return Err(wrong(format!("an image or shot has the GUID {}, which means none", Guid::NONE)));
        }
        if self.preallocated && self.is_raw() {
            return Err(wrong("<Preallocated> is 1 and an image is Plain: a disk cannot be both"));
        }
        if self.disk_sectors == 0 || Sectors(self.disk_sectors).checked_bytes().is_none() {
            return Err(wrong(format!("<Disk_size> of {} sectors is no size", self.disk_sectors)));
        }
        if self.has_parent_volume() {
            return Ok(());
        }
        if images.is_empty() {
            return Err(wrong("no <Image>"));
        }
        // All others without a counterpart are set aside: this one is the disk.
        if images.contains(&self.top) != shots.contains(&self.top) {
            let (has, lacks) = if images.contains(&self.top) { ("Image", "Shot") } else { ("Shot", "Image") };
            return Err(wrong(format!("the <{has}> {}, the current state, has no <{lacks}>", self.top)).advise(
                "restore the descriptor (there may be a copy, DiskDescriptor.xml.Backup); or read what is there by its \
                 image files, base first",
            ));
        }
        if let Some(lonely) = images.symmetric_difference(&shots).next() {
            return Err(wrong(format!("{lonely} is an image or a snapshot, not both")));
        }
        let top = self.shots.iter().find(|shot| shot.guid == self.top);
        match top.map(|shot| shot.transition) {
            None => Err(wrong(format!("<TopGUID> {} is no <Shot>", self.top))),
            Some(Some(transition)) => {
                Err(wrong(format!("<TopGUID> {} is marked {}", self.top, transition.name())))
            }
            Some(None) => Ok(()),
        }
    }

    /// What was done to find the images where the descriptor does not name them rightly, in words.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Size of the disk.
    pub fn disk_sectors(&self) -> Sectors {
        Sectors(self.disk_sectors)
    }

    /// Makes the disk this size (more than 0) and computes what depends on it.
    pub fn set_disk_sectors(&mut self, disk: Sectors) -> Result<()> {
        if disk.0 == 0 || disk.checked_bytes().is_none() {
            return Err(Error::new(ErrorKind::Parameter, format!("a disk of {disk} is no size")));
        }
        let (cylinders, heads) = cylinders_and_heads(disk.0);
        self.disk_sectors = disk.0;
        self.cylinders = u64::from(cylinders);
        self.heads = u64::from(heads);
        Ok(())
    }

    /// Size of a cluster.
    pub fn cluster_sectors(&self) -> Sectors {
        Sectors(u64::from(self.cluster_sectors))
    }

    /// How the disk lies in its images.
    pub fn mode(&self) -> Mode {
        if self.images.iter().any(|image| image.kind == ImageKind::Plain) {
            Mode::Raw
        } else if self.preallocated {
            Mode::Preallocated
        } else {
            Mode::Expanded
        }
    }

    /// Whether the base is the bytes of the disk, without header and table.
    pub fn is_raw(&self) -> bool {
        self.mode() == Mode::Raw
    }

    /// The images, in the order of the file.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The snapshots and the current state, in the order of the file.
    pub fn shots(&self) -> &[Shot] {
        &self.shots
    }

    /// The current state. [`Guid::TOP`] but in old descriptors and in volumes.
    pub fn top_guid(&self) -> Guid {
        self.top
    }

    /// The image of a shot.
    pub fn image(&self, guid: Guid) -> Option<&Image> {
        self.images.iter().find(|image| image.guid == guid)
    }

    /// The shot of an image.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots.iter().find(|shot| shot.guid == guid)
    }

    /// The shots that stand directly on `guid`.
    pub fn children(&self, guid: Guid) -> impl Iterator<Item = &Shot> + '_ {
        self.shots.iter().filter(move |shot| shot.parent == guid)
    }

    /// Whether this is a volume that stands on one in another folder. Such a one gives no chain.
    pub fn has_parent_volume(&self) -> bool {
        self.volume.as_ref().is_some_and(names_parent)
    }

    /// The images that make up the state `guid`, base first. Fails with [`ErrorKind::NoSnapshot`] for an unknown
    /// GUID, with [`ErrorKind::Descriptor`] if a parent is missing, parents go in a circle, or there are more than
    /// [`CHAIN_IMAGES_MAX`].
    pub fn chain_for(&self, guid: Guid) -> Result<Vec<&Image>> {
        if self.has_parent_volume() {
            return Err(Error::new(
                ErrorKind::Descriptor,
                "open disk: it is a volume that stands on a volume in another folder",
            )
            .advise(
                "such volumes cannot be opened; clone it to a disk of its own with the tool that made it",
            ));
        }
        let mut chain = Vec::new();
        let mut seen = BTreeSet::new();
        let mut at = guid;
        while at != Guid::NONE || chain.is_empty() {
            let (Some(shot), Some(image)) = (self.shot(at), self.image(at)) else {
                if chain.is_empty() {
                    return Err(Error::new(ErrorKind::NoSnapshot, format!("there is no snapshot {guid}"))
                        .advise("list the snapshots of the disk and use one of their GUIDs"));
                }
                return Err(wrong(format!("the chain of {guid} needs the shot {at}, which does not exist")));
            };
            if !seen.insert(at) {
                return Err(wrong(format!("the chain of {guid} goes in a circle at {at}")));
            }
            if chain.len() == CHAIN_IMAGES_MAX {
                return Err(wrong(format!("the chain of {guid} has more than {CHAIN_IMAGES_MAX} images"))
                    .advise("merge snapshots with the tool that made them"));
            }
            chain.push(image);
            at = shot.parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// Gives the top its constant GUID, as every writer does since long: renamed wherever it occurs. Nothing happens
    /// if it has it, or in a volume on another one, whose top keeps its own.
    pub fn convert_top(&mut self) -> Result<()> {
        if self.top == Guid::TOP || self.has_parent_volume() {
            return Ok(());
        }
        if self.shot(Guid::TOP).is_some() || self.image(Guid::TOP).is_some() {
            return Err(Error::new(
                ErrorKind::Descriptor,
                format!(
                    "write descriptor: {} is not the top, yet another image is called {}",
                    self.top,
                    Guid::TOP
                ),
            )
            .advise("give that image another GUID in the descriptor"));
        }
        let old = self.top;
        self.rename(old, Guid::TOP);
        self.top = Guid::TOP;
        Ok(())
    }

    /// Renames a GUID wherever it occurs but in `top`.
    fn rename(&mut self, old: Guid, new: Guid) {
        for image in self.images.iter_mut().filter(|image| image.guid == old) {
            image.guid = new;
        }
        for shot in &mut self.shots {
            for guid in [&mut shot.guid, &mut shot.parent] {
                if *guid == old {
                    *guid = new;
                }
            }
        }
    }
}

/// Whether a volume stands on another one.
fn names_parent(volume: &Node) -> bool {
    volume.children.iter().any(|child| child.name == "Parent")
}

fn cluster_sectors(sectors: u64) -> Result<u32> {
    u32::try_from(sectors).ok().filter(|sectors| (1..=CLUSTER_SECTORS_READ_MAX).contains(sectors)).ok_or_else(
        || {
            wrong(format!(
                "a cluster of {sectors} sectors (<Blocksize>) is not in 1..={CLUSTER_SECTORS_READ_MAX}"
            ))
        },
    )
}

fn unique(element: &str, guids: impl Iterator<Item = Guid>) -> Result<BTreeSet<Guid>> {
    let mut seen = BTreeSet::new();
    for guid in guids {
        if !seen.insert(guid) {
            return Err(wrong(format!("two elements <{element}> have the GUID {guid}"))
                .advise("give each its own; which one is meant cannot be known"));
        }
    }
    Ok(seen)
}

mod dead;
mod document;
mod foreign;
#[cfg(test)]
mod foreign_tests;
mod layout;
mod names;
mod split;
#[cfg(test)]
mod tests;
mod tree;
mod verbs;
#[cfg(test)]
mod verbs_tests;

pub use foreign::Encryption;
pub(crate) use names::Names;
pub(crate) use split::refused as split_refused;
pub use split::{Described, Part, SplitDescriptor};
pub use tree::TreeState;
pub use verbs::{MergeInto, image_name};
