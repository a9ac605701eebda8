//! What `grow` and `resize` share: which disk is meant, who serves it, and the size of its image and descriptor.

use std::path::{Path, PathBuf};

use ploop_core::device::loop_device;
use ploop_core::device::runtime::{ImageFile, OpenRequest, Runtime};
use ploop_core::format::Mode;
use ploop_core::ops::resize::{ResizeOptions, ResizeReport, Shrink, record_size, resize};
use ploop_core::units::{SECTOR_BYTES, Sectors};
use ploop_core::{Error, ErrorKind, Result};

use crate::open::{self, DESCRIPTOR_NAME, Wanted};
use crate::output::Output;
use crate::progress::Job;
use crate::resize_service;
use crate::serving::Served;

/// The disk that is meant.
pub(crate) enum Target {
    /// Its server runs.
    Served(Box<Served>),
    /// Nobody serves it.
    Closed(OpenRequest),
}

/// What happened to the image.
#[derive(Clone, Debug)]
pub(crate) struct ImageSize {
    pub(crate) disk_bytes_before: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) moved_clusters: u64,
    /// How long writes were held, where the disk is served.
    pub(crate) held_ms: Option<u64>,
}

/// Finds the disk that `name` means: a device, a mount point, an image, a descriptor or its folder.
pub(crate) fn find(name: &Path, raw: bool) -> Result<Target> {
    let runtime = Runtime::of_user()?;
    if let Some(state) = runtime.find(name)? {
        // Without a keeper it is just being started, which its server's silence will tell.
        if !state.is_running() && (state.keeper.is_some() || state.failure.is_some()) {
            return Err(Error::new(ErrorKind::Device, "the server of this disk has died")
                .at_path(name)
                .advise(format!(
                    "clear what it left with: ploop umount {}",
                    ploop_core::error::shown(name)
                )));
        }
        let entry = runtime.entry(&state.id);
        return Ok(Target::Served(Box::new(Served { entry, state })));
    }
    if is_device(name) {
        return Err(Error::new(ErrorKind::NotMounted, "no served disk shows itself as this device")
            .at_path(name)
            .advise("`ploop list` shows what is mounted"));
    }
    let wanted = Wanted { disks: vec![name.to_path_buf()], raw_base: raw, ..Wanted::default() };
    open::resolve(&wanted).map(Target::Closed)
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// The path to give to an operation on a closed disk.
pub(crate) fn path_of(request: &OpenRequest) -> Result<PathBuf> {
    request.descriptor.clone().or_else(|| request.images.first().cloned()).ok_or_else(|| {
        Error::new(ErrorKind::Parameter, "no disk is named").advise(format!("give its {DESCRIPTOR_NAME}"))
    })
}

/// Changes the size of a closed disk: image and descriptor.
pub(crate) fn closed(
    request: &OpenRequest,
    disk: Sectors,
    shrink: Shrink,
    output: &Output,
) -> Result<ResizeReport> {
    let job = Job::begin(output, None)?;
    let options = ResizeOptions {
        shrink,
        accepted: request.accepted,
        raw_cluster: (request.raw_base && request.descriptor.is_none())
            .then_some(Sectors(u64::from(ploop_core::format::geometry::CLUSTER_SECTORS_DEFAULT))),
        ..ResizeOptions::new(path_of(request)?, disk)
    };
    resize(&options, &job.meter())
}

/// Makes a served disk larger: image, descriptor, and the device if it shows the whole disk.
pub(crate) fn served(served: &Served, disk: Sectors, output: &Output) -> Result<ImageSize> {
    // The descriptor is changed here, by its name.
    open::check_names(&served.entry.state()?)?;
    let job = Job::begin(output, None)?;
    let descriptor = served.state.descriptor.as_ref().map(|file| file.path.clone());
    let preallocate = match &descriptor {
        Some(path) => open::load(path)?.1.mode() == Mode::Preallocated,
        None => false,
    };
    let grown = resize_service::ask(&served.entry, disk, preallocate, &job)?;
    if let Some(path) = &descriptor {
        record_size(path, Sectors(grown.disk_bytes / SECTOR_BYTES))?;
        let replaced = ImageFile::at(path)?;
        served.entry.update(|state| state.descriptor = Some(replaced))?;
    }
    let state = served.entry.state()?;
    if let (Some(device), None) = (&state.loop_device, state.partition) {
        loop_device::refresh_size(device, &served.entry.disk_file())?;
    }
    Ok(ImageSize {
        disk_bytes_before: grown.disk_bytes_before,
        disk_bytes: grown.disk_bytes,
        moved_clusters: grown.moved_clusters,
        held_ms: Some(grown.held_ms),
    })
}

impl From<ResizeReport> for ImageSize {
    fn from(report: ResizeReport) -> Self {
        Self {
            disk_bytes_before: report.disk_bytes_before,
            disk_bytes: report.disk_bytes,
            moved_clusters: report.moved_clusters,
            held_ms: None,
        }
    }
}
