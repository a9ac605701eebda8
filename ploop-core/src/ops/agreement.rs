//! What the images of a disk contradict its descriptor in, looked for in its folder ([`format::agreement`]). Every command
//! that changes a disk looks before it changes anything.
//!
//! [`format::agreement`]: crate::format::agreement

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
pub use crate::format::agreement::{Accepted, Disagreement};
pub(crate) use crate::format::agreement::{header_fits, look, says_raw, shortfall, sizes_of};
use crate::format::{Described, DiskDescriptor, Guid};
use crate::io::{Access, Folder};
use crate::ops::image_files::open_image;
use crate::ops::open::{Place, ReadBundle, place};

/// Whether an error says that there is no such image, rather than that it cannot be looked at.
pub(crate) fn is_missing(error: &Error) -> bool {
    use std::io::ErrorKind as Cause;
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let is_other_thing = |cause: &std::io::Error| {
        matches!(
            cause.kind(),
            Cause::NotFound | Cause::NotADirectory | Cause::IsADirectory
        ) || cause.raw_os_error() == Some(libc::ELOOP)
            // Our own word for a name that can be no file's, and for what is no regular file.
            || cause.kind() == Cause::InvalidInput && cause.raw_os_error().is_none()
    };
    error.kind() == ErrorKind::Open && source.is_some_and(is_other_thing)
}

/// What is found in the images of the state `state`, unlocked. Images that cannot be opened are for those who need them.
pub(crate) fn of_state(
    folder: &dyn Folder,
    descriptor: &DiskDescriptor,
    state: Guid,
) -> Result<Vec<Disagreement>> {
    let mut found = Vec::new();
    let Ok(images) = descriptor.chain_for(state) else { return Ok(found) };
    for image in images {
        if image.guid() != descriptor.top_guid() && !says_raw(descriptor, image.guid()) {
            continue;
        }
        let storage = match open_image(folder, image.file(), Access::ReadOnly) {
            Ok(storage) => storage,
            Err(error) if is_missing(&error) || error.kind() == ErrorKind::InUse => continue,
            Err(error) => return Err(error),
        };
        found.extend(look(descriptor, image, &*storage).map_err(|error| error.at_path(image.file()))?);
    }
    Ok(found)
}

/// What is found in the disk whose descriptor is at `path` (or in the folder `path`): the current state, or `state`.
pub fn of_disk(path: &Path, state: Option<Guid>) -> Result<Vec<Disagreement>> {
    let Place::Bundle(path) = place(path)? else { return Ok(Vec::new()) };
    let bundle = ReadBundle::open(&path, true)?;
    match &bundle.described {
        Described::Whole(descriptor) => {
            of_state(&bundle.folder, descriptor, state.unwrap_or(descriptor.top_guid()))
        }
        // Each part is compared with its range when they are joined.
        Described::Split(_) => Ok(Vec::new()),
    }
}

/// Refuses to change a disk that contradicts its descriptor, before anything is changed.
pub(crate) fn require(folder: &dyn Folder, descriptor: &DiskDescriptor) -> Result<()> {
    match of_state(folder, descriptor, descriptor.top_guid())?.first() {
        Some(found) => Err(found.failure()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
