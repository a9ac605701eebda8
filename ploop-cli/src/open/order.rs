//! Image files given by hand, against the descriptor that lies beside the top.
//!
//! A chain in another order, or without its base, is another disk: it can be read without any error, and what is read is
//! wrong. Where a descriptor knows the order, a list that contradicts it is refused. One that cannot be read says
//! nothing: files by hand are the way out of that.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use ploop_core::device::runtime::ImageFile;
use ploop_core::error::shown;
use ploop_core::format::{DESCRIPTOR_NAME, Described, DiskDescriptor, Guid, Image};
use ploop_core::io::file::DirectoryFolder;
use ploop_core::{Error, ErrorKind, Result};

/// Refuses `files`, base first, if the descriptor beside the last of them, or beside another, says otherwise.
pub(super) fn check(files: &[PathBuf]) -> Result<()> {
    let mut looked: Vec<&Path> = Vec::new();
    for folder in files.iter().rev().filter_map(|file| file.parent()) {
        if looked.contains(&folder) || !folder.join(DESCRIPTOR_NAME).is_file() {
            continue;
        }
        looked.push(folder);
        let described =
            DirectoryFolder::open(folder).and_then(|open| Described::load(&open, Some(folder), true));
        match described {
            Err(_) => {}
            Ok(Described::Whole(descriptor)) => against(&descriptor, folder, files)?,
            Ok(Described::Split(split)) => {
                split.parts().iter().try_for_each(|part| against(&part.descriptor, folder, files))?;
            }
        }
    }
    Ok(())
}

/// The image of `descriptor`, which lies in `folder`, that `file` is.
fn known(descriptor: &DiskDescriptor, folder: &Path, file: &Path) -> Option<Guid> {
    let identity = ImageFile::at(file).ok()?;
    let is_it = |image: &&Image| match image.is_outside() {
        // Of what lies elsewhere only the name is known.
        true => file.parent() != Some(folder) && Path::new(image.file()).file_name() == file.file_name(),
        false => ImageFile::at(&folder.join(image.file())).is_ok_and(|one| one.is_same_file(&identity)),
    };
    descriptor.images().iter().find(is_it).map(|image| image.guid())
}

fn against(descriptor: &DiskDescriptor, folder: &Path, files: &[PathBuf]) -> Result<()> {
    let given: Vec<Option<Guid>> = files.iter().map(|file| known(descriptor, folder, file)).collect();
    // The highest that it knows: what stands above may be a copy from elsewhere.
    let Some(highest) = given.iter().rposition(Option::is_some) else { return Ok(()) };
    let Some(top) = given[highest] else { return Ok(()) };
    let Ok(chain) = descriptor.chain_for(top) else { return Ok(()) };
    let below = &given[..=highest];
    let fits = below.len() == chain.len()
        && below.iter().zip(&chain).all(|(given, image)| given.is_none_or(|given| given == image.guid()));
    if fits {
        return Ok(());
    }
    let order: Vec<String> = chain
        .iter()
        .map(|image| {
            shown(Path::new(Path::new(image.file()).file_name().unwrap_or(OsStr::new(image.file()))))
        })
        .collect();
    Err(Error::new(
        ErrorKind::Parameter,
        format!(
            "the descriptor beside these files says that {} stand on each other in another way",
            files.len()
        ),
    )
    .at_path(folder.join(DESCRIPTOR_NAME))
    .advise(format!("base first: {}; or give the descriptor", order.join(" "))))
}
