//! A bundle: its images one by one, then what they say about each other, what the descriptor says about them, and what
//! else lies in the folder.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::split_refused;
use crate::format::descriptor_store::TEMPORARY_PREFIX;
use crate::format::{
    DESCRIPTOR_NAME, DiskDescriptor, Guid, Image, Probe, SplitDescriptor, Transition, probe,
};
use crate::io::file::DirectoryFolder;
use crate::io::temporary::stem;
use crate::io::{Access, Folder};
use crate::ops::Progress;
use crate::ops::agreement::{self, Disagreement};
use crate::ops::clone::holds_nothing;
use crate::ops::open::{Bundle, oddities};
use crate::ops::plan;
use crate::ops::repair::undo_file;
use crate::units::Sectors;

use super::finding::{Class, Findings, Kind};
use super::image::Standing;
use super::{CheckOptions, CheckReport, ImageCheck, check_in, conclude, open_locked};

/// A GUID in a name, with or without braces, is this long.
const GUID_LEN: usize = 36;

/// Checks the images of an open bundle; `path` is its folder, for messages.
pub(super) fn check_bundle(
    bundle: &Bundle,
    path: &Path,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let check_other = |image: &Image, standing, options: &CheckOptions| -> Result<Option<ImageCheck>> {
        let (Some(folder), name) = image.place() else { return Ok(None) };
        let folder = bundle.folder.open_folder(folder)?;
        check_in(&folder, name, &path.join(image.file()), standing, options, progress).map(Some)
    };
    check_bundle_in(&bundle.folder, &bundle.descriptor, path, &check_other, options, progress)
}

/// How an image in another folder than the descriptor's is checked; none if it is not in another one.
type CheckOther<'a> = &'a dyn Fn(&Image, Standing, &CheckOptions) -> Result<Option<ImageCheck>>;

/// As [`check_bundle`], in any folder.
pub(super) fn check_bundle_in(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    path: &Path,
    check_other: CheckOther<'_>,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    if let Some(guid) = options.snapshot.filter(|&guid| descriptor.image(guid).is_none()) {
        return Err(Error::new(ErrorKind::NoSnapshot, format!("check: there is no snapshot {guid}"))
            .at_path(path.join(DESCRIPTOR_NAME))
            .advise("list the snapshots of the disk and use one of their GUIDs"));
    }
    let mut findings = Findings::default();
    let mut images = Vec::new();
    check_images(folder, descriptor, path, check_other, (options, progress), (&mut findings, &mut images))?;
    let (mut removed, mut disagreements) = (Vec::new(), Vec::new());
    if options.snapshot.is_none() {
        disagreements = check_agreement(descriptor, &images, &mut findings);
        check_chain(descriptor, &images, &mut findings);
        check_folder(folder, descriptor, options, &mut findings, &mut removed)?;
    }
    let report = conclude(findings, images, removed, options);
    Ok(CheckReport { notes: notes(descriptor, path), disagreements, ..report })
}

/// Checks a split disk, which is only looked at: each part as a disk of its own, and that each is as long as its range.
pub(super) fn check_split(
    folder: &DirectoryFolder,
    split: &SplitDescriptor,
    path: &Path,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    if options.repair || options.fill_holes {
        return Err(split_refused(split.parts().len()).at_path(path.join(DESCRIPTOR_NAME)));
    }
    let options = &CheckOptions { read_only: true, drop_in_use: false, ..options.clone() };
    let (mut findings, mut all) = (Findings::default(), Vec::new());
    for part in split.parts() {
        let check_other = |image: &Image, standing, options: &CheckOptions| -> Result<Option<ImageCheck>> {
            let (Some(inner), name) = image.place() else { return Ok(None) };
            let inner = folder.open_folder(inner)?;
            check_in(&inner, name, &path.join(image.file()), standing, options, progress).map(Some)
        };
        let mut images = Vec::new();
        let (descriptor, found) = (&part.descriptor, (&mut findings, &mut images));
        check_images(folder, descriptor, path, &check_other, (options, progress), found)?;
        if options.snapshot.is_none() {
            check_chain(descriptor, &images, &mut findings);
        }
        let range_bytes = descriptor.disk_sectors().checked_bytes().unwrap_or(u64::MAX);
        for image in images.iter().filter(|image| image.cluster_bytes > 0 && image.disk_bytes != range_bytes)
        {
            let detail = format!(
                "the storage that starts at sector {} has {range_bytes} bytes, {} {}",
                part.start.0,
                image.file.display(),
                image.disk_bytes
            );
            findings.add_for_people(Kind::Mismatch, Class::C, detail);
        }
        all.extend(images);
    }
    let mut notes = notes(split.first(), path);
    notes.push(format!(
        "the disk is split into {} storages: it can be read, not changed",
        split.parts().len()
    ));
    Ok(CheckReport { notes, ..conclude(findings, all, Vec::new(), options) })
}

/// What is odd about the descriptor and no finding.
fn notes(descriptor: &DiskDescriptor, path: &Path) -> Vec<String> {
    let found = descriptor.dead_words();
    oddities(descriptor, path).into_iter().filter(|odd| !found.contains(odd)).collect()
}

/// Checks the images of one chain, one by one.
fn check_images(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    path: &Path,
    check_other: CheckOther<'_>,
    (options, progress): (&CheckOptions, &dyn Progress),
    (findings, images): (&mut Findings, &mut Vec<ImageCheck>),
) -> Result<()> {
    for image in descriptor.images() {
        if options.snapshot.is_some_and(|guid| guid != image.guid()) {
            continue;
        }
        let frozen = descriptor.children(image.guid()).next().is_some();
        let standing = if frozen { Standing::Frozen } else { Standing::Top };
        let is_base = descriptor.shot(image.guid()).is_some_and(|shot| shot.parent() == Guid::NONE);
        let raw_cluster = (descriptor.is_raw() && is_base).then(|| descriptor.cluster_sectors());
        let is_top = image.guid() == descriptor.top_guid();
        let raw_disk = is_top.then(|| descriptor.disk_sectors());
        let options = CheckOptions { raw_cluster, raw_disk, ..options.clone() };
        let file = path.join(image.file());
        let checked = match check_other(image, standing, &options) {
            Ok(None) => check_in(folder, image.place().1, &file, standing, &options, progress),
            Ok(Some(checked)) => Ok(checked),
            Err(error) => Err(error),
        };
        match checked {
            Ok(checked) => images.push(ImageCheck { guid: Some(image.guid().to_string()), ..checked }),
            // That one is missing says nothing against looking at the others. What keeps us from it (rights, a read-only or
            // failing host, too many files, another program) says nothing about the disk at all.
            Err(error) if agreement::is_missing(&error) => {
                findings.add_for_people(Kind::Missing, Class::C, describe(&error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What the images contradict the descriptor in, as findings that are people's to settle.
fn check_agreement(
    descriptor: &DiskDescriptor,
    images: &[ImageCheck],
    findings: &mut Findings,
) -> Vec<Disagreement> {
    let mut found = Vec::new();
    for image in descriptor.images() {
        let guid = image.guid();
        let Some(checked) = images.iter().find(|one| one.guid.as_deref() == Some(guid.to_string().as_str()))
        else {
            continue;
        };
        let is_raw = agreement::says_raw(descriptor, guid);
        if let Some(sizes) = checked.header_in_raw.filter(|_| is_raw)
            && agreement::header_fits(descriptor, guid, sizes, checked.file_bytes)
        {
            found.push(Disagreement::ImageSaidRaw {
                file: image.file().to_owned(),
                header_disk_bytes: sizes.0.checked_bytes().unwrap_or(u64::MAX),
            });
        }
        // A header that makes no sense says nothing.
        if checked.cluster_bytes > 0 {
            let held = if is_raw { checked.file_bytes } else { checked.disk_bytes };
            found.extend(agreement::shortfall(descriptor, image, Sectors::covering(held), is_raw));
        }
    }
    let cluster_bytes = descriptor.cluster_sectors().checked_bytes().unwrap_or(u64::MAX).max(1);
    for one in &found {
        match one {
            Disagreement::Short { held_bytes, is_raw, .. } => {
                findings.count(Kind::MissingEnd, Class::C, 1, None);
                let place = (is_raw.then_some(*held_bytes), Some(held_bytes / cluster_bytes));
                findings.example(Kind::MissingEnd, Class::C, place, one.describe());
            }
            Disagreement::ImageSaidRaw { .. } => {
                findings.count(Kind::SaidRaw, Class::C, 1, None);
                findings.example(Kind::SaidRaw, Class::C, (Some(0), None), one.describe());
            }
        }
    }
    found
}

fn describe(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// The images against each other and against the descriptor.
fn check_chain(descriptor: &DiskDescriptor, images: &[ImageCheck], findings: &mut Findings) {
    let by_guid: BTreeMap<&str, &ImageCheck> =
        images.iter().filter_map(|image| Some((image.guid.as_deref()?, image))).collect();
    let of =
        |guid: Guid| by_guid.get(guid.to_string().as_str()).copied().filter(|image| image.cluster_bytes > 0);
    for words in descriptor.dead_words() {
        findings.add_for_people(Kind::DeadEntry, Class::A, words);
    }
    for shot in descriptor.shots() {
        if let Err(error) = descriptor.chain_for(shot.guid()) {
            findings.add_for_people(Kind::BrokenChain, Class::C, error.to_string());
        }
        match shot.transition() {
            None => {}
            Some(Transition::Temporary) => findings.add_for_people(
                Kind::Transition,
                Class::A,
                format!("{} is temporary: it will be merged when nothing uses it", shot.guid()),
            ),
            Some(transition) => findings.add_for_people(
                Kind::Transition,
                Class::A,
                format!(
                    "{} is in the state {}: a merge was cut. What stands on it is whole, it alone is no state any more; the \
                     merge, run again, or any other change of snapshots, finishes it",
                    shot.guid(),
                    transition.name()
                ),
            ),
        }
        let (Some(child), Some(parent)) = (of(shot.guid()), of(shot.parent())) else { continue };
        if child.cluster_bytes != parent.cluster_bytes {
            let detail = format!(
                "clusters of {} in {}, of {} in its parent {}",
                child.cluster_bytes,
                child.file.display(),
                parent.cluster_bytes,
                parent.file.display()
            );
            findings.add_for_people(Kind::Mismatch, Class::C, detail);
        }
        if let (Some(version), Some(below)) = (child.version, parent.version)
            && version != below
        {
            let detail = format!(
                "version {version} in {}, version {below} in its parent {}",
                child.file.display(),
                parent.file.display()
            );
            findings.add_for_people(Kind::Mismatch, Class::C, detail);
        }
    }
    let Some(top) = of(descriptor.top_guid()) else { return };
    let said_bytes = descriptor.disk_sectors().checked_bytes().unwrap_or(u64::MAX);
    if said_bytes < top.disk_bytes {
        let detail = format!(
            "the descriptor says the disk has {said_bytes} bytes, its image says {}: a resize was probably cut, run it again",
            top.disk_bytes
        );
        findings.add_for_people(Kind::DescriptorSize, Class::A, detail);
    }
    let said_cluster = descriptor.cluster_sectors().checked_bytes().unwrap_or(u64::MAX);
    if said_cluster != top.cluster_bytes {
        let detail = format!(
            "the descriptor says clusters have {said_cluster} bytes, its image says {}; the image counts",
            top.cluster_bytes
        );
        findings.add_for_people(Kind::DescriptorSize, Class::A, detail);
    }
}

/// What else lies in the folder. Left-overs of ours are removed unless nothing may be changed.
fn check_folder(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    options: &CheckOptions,
    findings: &mut Findings,
    removed: &mut Vec<String>,
) -> Result<()> {
    let failed = |kind, operation: &'static str| move |source| Error::io(kind, operation, source);
    let planned = plan::left_over(folder, descriptor)?;
    let mut names = folder.list().map_err(failed(ErrorKind::Read, "check: list the folder"))?;
    names.sort();
    for name in names {
        let is_named = descriptor.images().iter().map(Image::file).chain(descriptor.dead_files());
        if name == DESCRIPTOR_NAME || is_named.into_iter().any(|file| file == name) {
            continue;
        }
        if planned.contains(&name) {
            findings.add(Kind::Leftover, Class::A, None, &name);
        } else if is_leftover(descriptor, &name)
            || is_obsolete(folder, descriptor, &name)
            || is_empty_child(folder, descriptor, &name)?
        {
            findings.add(Kind::Leftover, Class::A, None, &name);
            if !options.read_only {
                folder.unlink(&name).map_err(|source| {
                    Error::io(ErrorKind::Unlink, "check: remove a left-over file", source).at_path(&name)
                })?;
                removed.push(name);
            }
        } else if is_image(folder, &name)? {
            findings.add_for_people(Kind::Unreferenced, Class::A, &name);
        }
    }
    if !removed.is_empty() {
        folder.sync().map_err(failed(ErrorKind::Sync, "check: sync the folder"))?;
    }
    if !options.read_only && !planned.is_empty() {
        plan::recover(folder, Some(descriptor))?;
        removed.extend(planned);
    }
    Ok(())
}

/// Whether an operation that was cut has left a file that the descriptor says is of no use, and nobody writes it.
fn is_obsolete(folder: &dyn Folder, descriptor: &DiskDescriptor, name: &str) -> bool {
    descriptor.obsolete().any(|obsolete| obsolete == name)
        && open_locked(folder, name, Path::new(name), Access::ReadOnly).is_ok()
}

fn is_guid(text: &str) -> bool {
    text.len() == GUID_LEN && format!("{{{text}}}").parse::<Guid>().is_ok()
}

/// Files that our commands make under such names and rename or remove before they end.
fn is_leftover(descriptor: &DiskDescriptor, name: &str) -> bool {
    if name.strip_prefix(TEMPORARY_PREFIX).is_some_and(is_guid) {
        return true;
    }
    descriptor
        .images()
        .iter()
        .filter_map(|image| name.strip_prefix(&*stem(image.file())))
        .any(|rest| rest == undo_file::UNFINISHED || rest.strip_prefix(".tmp.").is_some_and(is_guid))
}

/// The child that a cut snapshot leaves: named as one, with nothing in it.
fn is_empty_child(folder: &dyn Folder, descriptor: &DiskDescriptor, name: &str) -> Result<bool> {
    let Some(first) = descriptor.images().first() else { return Ok(false) };
    let stem = first.file().split_once(".{").map_or(first.file(), |(stem, _)| stem);
    let braced = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(".{")?.strip_suffix('}'));
    if !braced.is_some_and(is_guid) {
        return Ok(false);
    }
    // The lock: nobody is just making it.
    let Ok((storage, _lock)) = open_locked(folder, name, Path::new(name), Access::ReadOnly) else {
        return Ok(false);
    };
    // Not one byte behind the header: an image whose table was lost still holds what can be saved.
    holds_nothing(&*storage)
        .map_err(|source| Error::io(ErrorKind::Read, "check: look at an empty image", source).at_path(name))
}

/// Whether a file has our header. What cannot be opened as a file (a folder, a link) has not.
fn is_image(folder: &dyn Folder, name: &str) -> Result<bool> {
    let storage = match folder.open(name, Access::ReadOnly) {
        Ok(storage) => storage,
        Err(source) if !is_no_file(&source) => {
            return Err(Error::io(ErrorKind::Open, "check: open a file of the folder", source).at_path(name));
        }
        Err(_) => return Ok(false),
    };
    match probe(&storage) {
        Ok(probed) => Ok(matches!(probed, Probe::Image(_))),
        // Our signature and nothing that makes sense: whatever it is, it is no image of this disk.
        Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
        Err(error) => Err(error.at_path(name)),
    }
}

/// Whether an error says that something is no file for us, rather than that the host is in trouble.
fn is_no_file(error: &std::io::Error) -> bool {
    const NO_FILE: [i32; 8] = [
        libc::ENOENT,
        libc::EACCES,
        libc::EPERM,
        libc::ELOOP,
        libc::EISDIR,
        libc::ENOTDIR,
        libc::ENXIO,
        libc::EINVAL,
    ];
    error.raw_os_error().is_none_or(|number| NO_FILE.contains(&number))
}
