//! What a disk is: from its descriptor and the headers and tables of its images, changing and locking nothing.
//!
//! It may be asked of a disk that is in use; the numbers are then those of the files at that moment. What cannot be
//! found out about one image is said there and does not hide the rest.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::format::survey::survey;
use crate::format::{
    DESCRIPTOR_NAME, Described, DiskDescriptor, Geometry, Guid, Header, InUse, Probe, probe, stored_bitmap,
};
use crate::io::file::{self, FileStorage};
use crate::io::{Access, Storage, sys};
use crate::ops::agreement::{self, Disagreement};
use crate::ops::create::version_number;
use crate::ops::open::{Place, ReadBundle, oddities, open_image, place};
use crate::ops::space::{Space, space_of};
use crate::units::{SECTOR_BYTES, Sectors};

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoOptions {
    /// A descriptor, its folder, or an image.
    pub path: PathBuf,
    /// Folders that images outside of the bundle may be taken from; see
    /// [`OpenOptions::parents`](crate::ops::open::OpenOptions::parents).
    pub parents: Vec<PathBuf>,
}

impl InfoOptions {
    /// The disk at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), parents: Vec::new() }
    }
}

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InfoReport {
    /// The descriptor, if there is one.
    pub descriptor: Option<PathBuf>,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes; 0 if unknown (a raw image without descriptor).
    pub cluster_bytes: u64,
    /// Version of the image format, 1 or 2; none for a raw disk, or if the top cannot be read.
    pub version: Option<u8>,
    /// `raw`, `expanded` or `preallocated`.
    pub mode: &'static str,
    /// How many snapshots there are; the current state is none.
    pub snapshots: u64,
    /// Whether the top says that it was not closed.
    pub in_use: bool,
    /// Whether a program has one of the images open.
    pub open_by_program: bool,
    /// Clusters allocated in all images.
    pub allocated_clusters: u64,
    /// Length of all image files in bytes.
    pub file_bytes: u64,
    /// What all image files take on the host, in bytes.
    pub host_bytes: u64,
    /// Whole clusters inside the files that no entry names.
    pub free_clusters: u64,
    /// Of 1000 pairs of neighbouring clusters in one image, how many do not follow each other in the file.
    pub fragmentation_per_mille: u64,
    /// Storages that the disk is split into, each a chain of its own; 1 but for disks of other programs.
    pub storages: u64,
    /// Who encrypted the disk, if the descriptor says that somebody did.
    pub encryption: Option<String>,
    /// What is odd about the descriptor though the disk can be read.
    pub warnings: Vec<String>,
    /// The images, in the order of the descriptor.
    pub images: Vec<ImageReport>,
    /// What the images contradict the descriptor in: what is there is not the whole disk, or not the disk.
    pub disagreements: Vec<Disagreement>,
}

/// What one image is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// The file, as the descriptor names it.
    pub file: String,
    /// Its name, if there is a descriptor.
    pub guid: Option<String>,
    /// What it stands on; none for a base.
    pub parent: Option<String>,
    /// Whether it is the current state.
    pub current: bool,
    /// A state between two descriptors, in the descriptor's word.
    pub transition: Option<String>,
    /// Version of the format; none for a raw image.
    pub version: Option<u8>,
    /// Size of the disk that it describes, in bytes.
    pub disk_bytes: u64,
    /// Size of its clusters in bytes.
    pub cluster_bytes: u64,
    /// Clusters it holds.
    pub allocated_clusters: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// What the file takes on the host, in bytes.
    pub host_bytes: u64,
    /// Whole clusters inside the file that no entry names.
    pub free_clusters: u64,
    /// Pairs of clusters that follow each other on the guest's disk and lie in this image.
    pub neighbours: u64,
    /// Those among them that do not follow each other in the file.
    pub breaks: u64,
    /// The in-use mark: `closed`, `closed-with-extension`, `open` or its number; `none` for a raw image.
    pub in_use: String,
    /// Whether a program has it open.
    pub open_by_program: bool,
    /// The dirty bitmaps that are stored in it.
    pub bitmaps: Vec<BitmapReport>,
    /// Why it could not be examined.
    pub problem: Option<String>,
}

/// A dirty bitmap of a backup, as it is stored in a closed image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BitmapReport {
    /// Its name: a UUID; none if not even that can be read.
    pub id: Option<String>,
    /// Bytes of the disk that one bit stands for; 0 if that is not known.
    pub granularity_bytes: u64,
    /// Why it counts as "everything is dirty"; none if it is valid.
    pub invalid: Option<String>,
}

impl From<stored_bitmap::Listed> for BitmapReport {
    fn from(listed: stored_bitmap::Listed) -> Self {
        Self {
            id: listed.id.map(|id| uuid_text(&id)),
            granularity_bytes: u64::from(listed.granularity_sectors) * SECTOR_BYTES,
            invalid: listed.invalid,
        }
    }
}

/// 16 bytes as a UUID without braces.
fn uuid_text(id: &[u8; 16]) -> String {
    let mut text = String::new();
    for (at, byte) in id.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Examines a disk.
pub fn info(options: &InfoOptions) -> Result<InfoReport> {
    match place(&options.path)? {
        Place::Bundle(folder) => bundle(&folder, &options.parents),
        Place::Image(path) => single(&path),
    }
}

fn file_options() -> file::OpenOptions {
    file::OpenOptions::new(Access::ReadOnly).or_block_device()
}

fn bundle(path: &Path, parents: &[PathBuf]) -> Result<InfoReport> {
    let bundle = ReadBundle::open(path, !parents.is_empty())?;
    let mut images = Vec::new();
    match &bundle.described {
        Described::Whole(descriptor) => images_of(&bundle, descriptor, path, parents, &mut images),
        Described::Split(split) => {
            for part in split.parts() {
                images_of(&bundle, &part.descriptor, path, parents, &mut images);
            }
        }
    }
    let descriptor = bundle.described.first();
    let (disk, storages) = match &bundle.described {
        Described::Whole(descriptor) => (descriptor.disk_sectors(), 1),
        Described::Split(split) => (split.disk_sectors(), split.parts().len() as u64),
    };
    let report = InfoReport {
        descriptor: Some(path.join(DESCRIPTOR_NAME)),
        disk_bytes: disk.checked_bytes().unwrap_or(u64::MAX),
        cluster_bytes: descriptor.cluster_sectors().checked_bytes().unwrap_or(u64::MAX),
        mode: descriptor.mode().name(),
        snapshots: (descriptor.shots().len() as u64).saturating_sub(1),
        storages,
        encryption: descriptor.encryption().map(|encryption| encryption.to_string()),
        warnings: oddities(descriptor, path),
        disagreements: match &bundle.described {
            // What cannot be looked at is told with its image.
            Described::Whole(descriptor) => {
                agreement::of_state(&bundle.folder, descriptor, descriptor.top_guid()).unwrap_or_default()
            }
            Described::Split(_) => Vec::new(),
        },
        ..summary(images)
    };
    Ok(report)
}

/// Adds the images of one chain.
fn images_of(
    bundle: &ReadBundle,
    descriptor: &DiskDescriptor,
    path: &Path,
    parents: &[PathBuf],
    images: &mut Vec<ImageReport>,
) {
    for image in descriptor.images() {
        let shot = descriptor.shot(image.guid());
        let parent = shot.map(|shot| shot.parent()).filter(|&parent| parent != Guid::NONE);
        let raw = (descriptor.is_raw() && parent.is_none()).then(|| descriptor.cluster_sectors());
        let found = open_image(&bundle.folder, path, image, &file_options(), parents)
            .and_then(|(storage, file)| examine(&storage, raw).map_err(|error| error.at_path(file)));
        let found = found.unwrap_or_else(problem);
        images.push(ImageReport {
            guid: Some(image.guid().to_string()),
            parent: parent.map(|parent| parent.to_string()),
            current: image.guid() == descriptor.top_guid(),
            transition: shot
                .and_then(|shot| shot.transition())
                .map(|transition| transition.name().to_owned()),
            file: image.file().to_owned(),
            ..found
        });
    }
}

fn single(path: &Path) -> Result<InfoReport> {
    let storage = FileStorage::open(path, &file_options())?;
    let image = examine(&storage, None).map_err(|error| error.at_path(path))?;
    let image = ImageReport { file: path.display().to_string(), current: true, ..image };
    let preallocated = image.allocated_clusters > 0
        && image.cluster_bytes > 0
        && image.allocated_clusters == image.disk_bytes.div_ceil(image.cluster_bytes);
    let mode = if preallocated { "preallocated" } else { "expanded" };
    Ok(InfoReport {
        disk_bytes: image.disk_bytes,
        cluster_bytes: image.cluster_bytes,
        mode,
        ..summary(vec![image])
    })
}

/// What follows from the images.
fn summary(images: Vec<ImageReport>) -> InfoReport {
    let sum = |field: fn(&ImageReport) -> u64| images.iter().map(field).fold(0, u64::saturating_add);
    let top = images.iter().find(|image| image.current);
    InfoReport {
        descriptor: None,
        disk_bytes: 0,
        cluster_bytes: 0,
        version: top.and_then(|top| top.version),
        mode: "",
        snapshots: 0,
        in_use: top.is_some_and(|top| top.in_use == "open"),
        open_by_program: images.iter().any(|image| image.open_by_program),
        allocated_clusters: sum(|image| image.allocated_clusters),
        file_bytes: sum(|image| image.file_bytes),
        host_bytes: sum(|image| image.host_bytes),
        free_clusters: sum(|image| image.free_clusters),
        fragmentation_per_mille: Space {
            neighbours: sum(|image| image.neighbours),
            breaks: sum(|image| image.breaks),
            ..Space::default()
        }
        .fragmentation_per_mille(),
        storages: 1,
        encryption: None,
        warnings: Vec::new(),
        images,
        disagreements: Vec::new(),
    }
}

/// The report of an image that cannot be examined.
fn problem(error: Error) -> ImageReport {
    ImageReport { in_use: "unknown".to_owned(), problem: Some(error.to_string()), ..ImageReport::default() }
}

/// Examines one image; `raw` holds the cluster size of a raw one.
fn examine(storage: &FileStorage, raw: Option<Sectors>) -> Result<ImageReport> {
    let failed = |error| Error::io(ErrorKind::Stat, "examine image", error);
    let report = ImageReport {
        file_bytes: storage.len().map_err(failed)?,
        host_bytes: storage.allocated_bytes().map_err(failed)?,
        open_by_program: sys::is_locked_by_other(storage.as_fd(), LOCKED_BYTES.0, LOCKED_BYTES.1)
            .map_err(failed)?,
        ..ImageReport::default()
    };
    if let Some(cluster) = raw {
        let geometry = Geometry::raw(cluster, report.file_bytes)?;
        return Ok(ImageReport {
            allocated_clusters: u64::from(geometry.entries()),
            in_use: "none".to_owned(),
            ..sizes(report, &geometry)
        });
    }
    match probe(storage)? {
        Probe::Image(header) => {
            let geometry = header.geometry();
            let survey = survey(storage, geometry, report.file_bytes, 0)?;
            let (listed, taken) = stored_bitmap::list(storage, &header, report.file_bytes, &survey)?;
            let bytes = (report.file_bytes, report.host_bytes);
            let space = space_of(&survey, taken.count(), geometry, bytes);
            let bitmaps = listed.into_iter().map(BitmapReport::from).collect();
            Ok(ImageReport { in_use: mark(&header), bitmaps, ..sizes(report, geometry) }.with(&space))
        }
        Probe::NotAnImage => Err(Error::new(ErrorKind::Corrupt, "examine image: this is not a ploop image")
            .advise("a raw disk is known only by its descriptor: name that")),
    }
}

impl ImageReport {
    /// With the figures of the table; also for those of a running disk, which knows more than its file.
    #[must_use]
    pub fn with(self, space: &Space) -> Self {
        Self {
            allocated_clusters: space.allocated_clusters,
            file_bytes: space.file_bytes,
            host_bytes: space.host_bytes,
            free_clusters: space.free_clusters,
            neighbours: space.neighbours,
            breaks: space.breaks,
            ..self
        }
    }
}

impl InfoReport {
    /// The same disk with the figures of its top as its server has them.
    #[must_use]
    pub fn with_running_top(self, space: &Space) -> Self {
        let update = |image: ImageReport| if image.current { image.with(space) } else { image };
        let sums = summary(self.images.into_iter().map(update).collect());
        Self {
            allocated_clusters: sums.allocated_clusters,
            file_bytes: sums.file_bytes,
            host_bytes: sums.host_bytes,
            free_clusters: sums.free_clusters,
            fragmentation_per_mille: sums.fragmentation_per_mille,
            images: sums.images,
            ..self
        }
    }
}

fn sizes(report: ImageReport, geometry: &Geometry) -> ImageReport {
    ImageReport {
        version: version_number(geometry),
        disk_bytes: geometry.disk_bytes(),
        cluster_bytes: geometry.cluster_bytes(),
        ..report
    }
}

fn mark(header: &Header) -> String {
    match header.in_use() {
        InUse::Closed => "closed".to_owned(),
        InUse::ClosedWithExtension => "closed-with-extension".to_owned(),
        InUse::Open => "open".to_owned(),
        InUse::Other(value) => format!("{value:#010x}"),
    }
}

/// The bytes on which programs that have an image open hold locks: first and count.
const LOCKED_BYTES: (u64, u64) = (100, 205);

#[cfg(test)]
mod tests;
