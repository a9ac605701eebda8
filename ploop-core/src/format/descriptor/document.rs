//! A descriptor as XML: reading element by element, and printing as the original does.
//!
//! Reading takes the elements we know out of their parents one by one; what stays is not ours and is kept.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{Error, Result};

use super::dead::Dead;
use super::names::{self, Names, file_name, shown};
use super::split::{Described, PARTS_MAX, SplitDescriptor};
use super::{
    DiskDescriptor, ENTRIES_MAX, Guid, Image, ImageKind, Rest, RestOf, Shot, Transition, cluster_sectors,
    foreign, names_parent, unique, wrong,
};
use crate::format::xml::{self, Node};

/// Our element for files that are to be removed.
const OBSOLETE: &str = "Obsolete";
/// Our element for a shot that a merge goes through.
const MERGING: &str = "Merging";

/// An element being read: known children are taken out one by one, what stays is not ours.
struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Node>,
}

impl Element {
    fn of(node: Node) -> Self {
        Self { name: node.name, attributes: node.attributes, children: node.children }
    }

    fn take_all(&mut self, name: &str) -> Vec<Node> {
        let (taken, kept) = self.children.drain(..).partition(|child| child.name == name);
        self.children = kept;
        taken
    }

    fn take(&mut self, name: &str) -> Result<Option<Node>> {
        let mut taken = self.take_all(name);
        if taken.len() > 1 {
            return Err(wrong(format!("<{}> has {} elements <{name}>, not one", self.name, taken.len())));
        }
        Ok(taken.pop())
    }

    fn need(&mut self, name: &str) -> Result<Node> {
        self.take(name)?.ok_or_else(|| wrong(format!("<{}> has no <{name}>", self.name)))
    }

    fn need_number(&mut self, name: &str) -> Result<u64> {
        let node = self.need(name)?;
        number(&node.text).ok_or_else(|| wrong(format!("<{name}> is not a number: {:?}", shown(&node.text))))
    }

    /// A number nobody depends on: 0 if it is missing or unreadable.
    fn number(&mut self, name: &str) -> Result<u64> {
        Ok(self.take(name)?.and_then(|node| number(&node.text)).unwrap_or(0))
    }

    fn need_guid(&mut self, name: &str) -> Result<Guid> {
        let node = self.need(name)?;
        node.text.trim().parse().map_err(|error: Error| wrong(format!("<{name}>: {error}")))
    }

    fn rest(self) -> Rest {
        Rest { attributes: self.attributes, children: self.children }
    }
}

/// A number as the original reads it: decimal, `0x` hexadecimal or `0` octal.
pub(super) fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

impl DiskDescriptor {
    /// As [`parse`](Self::parse) for a descriptor that lies in `folder`: absolute file names that begin with that
    /// folder, as old tools wrote them, are taken as names in it.
    pub fn parse_in(bytes: &[u8], folder: Option<&Path>) -> Result<Self> {
        Described::parse(bytes, &Names::of_document(folder))?.whole()
    }

    /// The document. Reading it gives this very value back.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut parameters = vec![Node::with_text("Disk_size", self.disk_sectors)];
        if let Some(sectors) = self.delta_sectors_max {
            parameters.push(Node::with_text("Max_delta_size", sectors));
        }
        let surfaces = self.cylinders.saturating_mul(self.heads);
        parameters.extend([
            Node::with_text("Cylinders", self.cylinders),
            Node::with_text("Heads", self.heads),
            Node::with_text("Sectors", self.disk_sectors.checked_div(surfaces).unwrap_or(0)),
            Node::with_text("Padding", 0),
        ]);
        let mut storage = vec![
            Node::with_text("Start", 0),
            Node::with_text("End", self.disk_sectors),
            Node::with_text("Blocksize", self.cluster_sectors),
        ];
        if self.preallocated {
            storage.push(Node::with_text("Preallocated", 1));
        }
        storage.extend(self.images.iter().chain(&self.dead.images).map(Image::node));
        let mut snapshots = vec![Node::with_text("TopGUID", self.top)];
        snapshots.extend(self.shots.iter().chain(&self.dead.shots).map(Shot::node));
        let rest = &self.rest;
        let mut data: Vec<Node> = self.volume.clone().into_iter().collect();
        data.push(rest.storage.around("Storage", storage));
        let mut sections = vec![
            rest.parameters.around("Disk_Parameters", parameters),
            rest.data.around("StorageData", data),
            rest.snapshots.around("Snapshots", snapshots),
        ];
        if !(self.obsolete.is_empty() && self.gone.is_empty()) {
            let files = self.obsolete.iter().map(|file| Node::with_text("File", file));
            let children = files.chain(self.gone.iter().map(|guid| Node::with_text("GUID", guid))).collect();
            sections.push(Node { children, ..Node::new(OBSOLETE) });
        }
        xml::print(&rest.root.around(&self.root, sections)).into_bytes()
    }
}

impl Described {
    /// Reads and checks a descriptor beside files of which `is_there` knows the names; `outside` as in
    /// [`load`](Self::load). Errors are of kind [`ErrorKind::Descriptor`](crate::error::ErrorKind::Descriptor).
    pub fn parse_beside(bytes: &[u8], is_there: &dyn Fn(&str) -> bool, outside: bool) -> Result<Self> {
        Self::parse(bytes, &Names { folder: None, is_there, outside })
    }

    /// Reads and checks a descriptor, of a whole or of a split disk.
    pub(crate) fn parse(bytes: &[u8], names: &Names<'_>) -> Result<Self> {
        let mut root = Element::of(xml::parse(bytes)?);
        let mut parameters = Element::of(root.need("Disk_Parameters")?);
        let mut data = Element::of(root.need("StorageData")?);
        let volume = data.take("Volume")?;
        let storages = data.take_all("Storage");
        let mut snapshots = Element::of(root.need("Snapshots")?);
        let (obsolete, gone) = root.take(OBSOLETE)?.map(read_obsolete).unwrap_or_default();

        let disk_sectors = parameters.need_number("Disk_size")?;
        let delta_sectors_max = Some(parameters.number("Max_delta_size")?).filter(|&sectors| sectors > 0);
        let cylinders = parameters.number("Cylinders")?;
        let heads = parameters.number("Heads")?;
        parameters.number("Sectors")?;
        foreign::check_padding(parameters.take("Padding")?)?;
        let top = match snapshots.take("TopGUID")? {
            Some(node) => {
                Some(node.text.trim().parse().map_err(|error: Error| wrong(format!("<TopGUID>: {error}")))?)
            }
            None => None,
        };
        let shots = read_entries(snapshots.take_all("Shot"), read_shot)?;
        let rest = RestOf {
            parameters: parameters.rest(),
            data: data.rest(),
            storage: Rest::default(),
            snapshots: snapshots.rest(),
            root: Rest { attributes: root.attributes.clone(), children: std::mem::take(&mut root.children) },
        };
        foreign::check_sector_size(&rest.parameters)?;
        if storages.len() > PARTS_MAX {
            return Err(wrong(format!("more than {PARTS_MAX} elements <Storage>")));
        }
        let storages = storages.into_iter().map(read_storage).collect::<Result<Vec<_>>>()?;
        let describe = |storage: ReadStorage, disk_sectors: u64| {
            let ReadStorage { cluster_sectors, preallocated, images, texts, rest: storage_rest, .. } =
                storage;
            let named = names::resolve(&texts, names)?;
            let mut notes = Vec::new();
            let mut images: Vec<Image> = images
                .into_iter()
                .zip(named)
                .map(|(image, named)| {
                    notes.extend(named.note);
                    Image { file: named.file, outside: named.outside, ..image }
                })
                .collect();
            let mut shots = shots.clone();
            let has_parent_volume = volume.as_ref().is_some_and(names_parent);
            if !has_parent_volume {
                add_missing_shot(&images, &mut shots);
            }
            let top = match top {
                Some(top) => top,
                None if shots.iter().any(|shot| shot.guid == Guid::TOP) => Guid::TOP,
                None => {
                    return Err(wrong(format!("no <TopGUID>, and no <Shot> is {}", Guid::TOP))
                        .advise("add <TopGUID> with the GUID of the writable image"));
                }
            };
            unique("Image", images.iter().map(|image| image.guid))?;
            unique("Shot", shots.iter().map(|shot| shot.guid))?;
            let dead = match has_parent_volume {
                true => Dead::default(),
                false => Dead::set_aside(&mut images, &mut shots, top),
            };
            let descriptor = DiskDescriptor {
                root: root.name.clone(),
                disk_sectors,
                delta_sectors_max,
                cylinders,
                heads,
                cluster_sectors,
                preallocated,
                images,
                shots,
                top,
                volume: volume.clone(),
                obsolete: obsolete.clone(),
                gone: gone.clone(),
                dead,
                notes,
                rest: RestOf { storage: storage_rest, ..rest.clone() },
            };
            descriptor.validate()?;
            Ok(descriptor)
        };
        match <[ReadStorage; 1]>::try_from(storages) {
            Ok([single]) if single.start == 0 => {
                describe(single, disk_sectors).map(Box::new).map(Self::Whole)
            }
            Ok([part]) => Self::split(vec![part], disk_sectors, describe),
            Err(parts) if parts.is_empty() => Err(wrong("<StorageData> has no <Storage>")),
            Err(parts) => Self::split(parts, disk_sectors, describe),
        }
    }

    fn split(
        parts: Vec<ReadStorage>,
        disk_sectors: u64,
        describe: impl Fn(ReadStorage, u64) -> Result<DiskDescriptor>,
    ) -> Result<Self> {
        let parts = parts.into_iter().map(|part| {
            let (start, end) = (part.start, part.end);
            // What is no range is refused with the others.
            let sectors = end.checked_sub(start).filter(|&sectors| sectors > 0).ok_or_else(|| {
                wrong(format!("a <Storage> ends at sector {end}, not after its start at {start}"))
            })?;
            Ok((start, end, describe(part, sectors)?))
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let mut files = BTreeSet::new();
        for file in parts.iter().flat_map(|(.., part)| part.images.iter().map(|image| &image.file)) {
            if !files.insert(file) {
                return Err(wrong(format!("the file {file:?} belongs to two images")));
            }
        }
        SplitDescriptor::new(parts, disk_sectors).map(Self::Split)
    }
}

/// A storage as it was read; the names of its images are not yet looked at.
struct ReadStorage {
    start: u64,
    end: u64,
    cluster_sectors: u32,
    preallocated: bool,
    images: Vec<Image>,
    texts: Vec<String>,
    rest: Rest,
}

fn read_storage(node: Node) -> Result<ReadStorage> {
    let mut storage = Element::of(node);
    let start = storage.number("Start")?;
    let end = storage.number("End")?;
    let cluster_sectors = cluster_sectors(storage.need_number("Blocksize")?)?;
    let preallocated = match storage.take("Preallocated")?.map(|node| number(&node.text)) {
        None | Some(Some(0)) => false,
        Some(Some(1)) => true,
        Some(_) => return Err(wrong("<Preallocated> is neither 0 nor 1")),
    };
    let (images, texts) =
        read_entries(storage.take_all("Image"), read_image)?.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
    Ok(ReadStorage { start, end, cluster_sectors, preallocated, images, texts, rest: storage.rest() })
}

fn read_entries<T>(nodes: Vec<Node>, read: impl Fn(Element) -> Result<T>) -> Result<Vec<T>> {
    if nodes.len() > ENTRIES_MAX {
        return Err(wrong(format!("more than {ENTRIES_MAX} images or shots")));
    }
    nodes.into_iter().map(|node| read(Element::of(node))).collect()
}

/// An image, and the text of its <File>.
fn read_image(mut image: Element) -> Result<(Image, String)> {
    let guid = image.need_guid("GUID")?;
    let kind = match image.need("Type")?.text.trim() {
        "Compressed" => ImageKind::Image,
        "Plain" => ImageKind::Plain,
        other => return Err(wrong(format!("the image {guid} is of the unknown type {:?}", shown(other)))),
    };
    let text = image.need("File")?.text;
    Ok((Image { guid, kind, file: String::new(), outside: false, rest: image.rest() }, text))
}

fn read_shot(mut shot: Element) -> Result<Shot> {
    let guid = shot.need_guid("GUID")?;
    let parent = shot.need_guid("ParentGUID")?;
    // Ours, beside the original's word for "to be merged".
    let merging = shot.take(MERGING)?.is_some();
    let mut transition = None;
    for candidate in [Transition::Temporary, Transition::TemporaryZero, Transition::TemporaryZeroSwap] {
        if shot.take(candidate.name())?.is_some() && transition.replace(candidate).is_some() {
            return Err(wrong(format!("the shot {guid} is in two transitional states at once")));
        }
    }
    let transition = match (merging, transition) {
        (true, None | Some(Transition::Temporary)) => Some(Transition::Merging),
        (true, Some(_)) => {
            return Err(wrong(format!("the shot {guid} is in two transitional states at once")));
        }
        (false, transition) => transition,
    };
    Ok(Shot { guid, parent, transition, rest: shot.rest() })
}

/// Files to be removed, and the states they were. A name that would not be taken for an image's is not taken here:
/// nothing is removed by it.
fn read_obsolete(node: Node) -> (Vec<String>, Vec<Guid>) {
    let named = |name: &'static str| {
        node.children.iter().filter(move |child| child.name == name).map(|child| child.text.trim())
    };
    let files = named("File").filter_map(|file| file_name(file).ok().map(str::to_owned));
    let gone = named("GUID").filter_map(|guid| guid.parse().ok());
    (files.take(ENTRIES_MAX).collect(), gone.take(ENTRIES_MAX).collect())
}

/// The one repair of the original: the top's image without a shot is a disk that never had a snapshot. Of several images
/// it would be another disk: the top without what it stands on.
fn add_missing_shot(images: &[Image], shots: &mut Vec<Shot>) {
    if shots.is_empty() && matches!(images, [only] if only.guid == Guid::TOP) {
        shots.push(Shot { guid: Guid::TOP, parent: Guid::NONE, transition: None, rest: Rest::default() });
    }
}

impl Rest {
    /// The element: what is ours first, then this.
    fn around(&self, name: &str, mut ours: Vec<Node>) -> Node {
        ours.extend(self.children.iter().cloned());
        Node { attributes: self.attributes.clone(), children: ours, ..Node::new(name) }
    }
}

impl Image {
    fn node(&self) -> Node {
        let kind = match self.kind {
            ImageKind::Image => "Compressed",
            ImageKind::Plain => "Plain",
        };
        let ours = vec![
            Node::with_text("GUID", self.guid),
            Node::with_text("Type", kind),
            Node::with_text("File", &self.file),
        ];
        self.rest.around("Image", ours)
    }
}

impl Shot {
    fn node(&self) -> Node {
        let mut ours = vec![Node::with_text("GUID", self.guid), Node::with_text("ParentGUID", self.parent)];
        if self.transition == Some(Transition::Merging) {
            ours.push(Node::new(Transition::Temporary.name()));
        }
        ours.extend(self.transition.map(|transition| Node::new(transition.name())));
        self.rest.around("Shot", ours)
    }
}
