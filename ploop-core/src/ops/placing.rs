//! A new file under its final name: whole or not at all.

use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Guid;
use crate::io::{Folder, Storage, temporary};

/// Builds a file under a temporary name, gives it its own, which must be free, and makes that durable. `build` leaves
/// its content durable. After an error there is no file; a crash leaves at most one called `FILE.tmp.…`, which
/// [`temporary::remove_left_over`] removes.
pub(super) fn place_file<T>(
    folder: &dyn Folder,
    file: &str,
    build: impl FnOnce(&Arc<dyn Storage>) -> Result<T>,
) -> Result<T> {
    let (temporary, storage) = create_temporary(folder, file)?;
    let built = build(&storage).and_then(|built| {
        folder.rename_exclusive(&temporary, file).map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => Error::io(ErrorKind::Parameter, "the file exists by now", cause)
                .advise("choose another name; nothing was changed"),
            _ => Error::io(ErrorKind::Rename, "give the file its name", cause),
        })?;
        Ok(built)
    });
    let built = built.map_err(|error| remove(folder, &temporary, error))?;
    folder.sync().map_err(|cause| {
        let error = Error::io(ErrorKind::Sync, "sync the folder", cause);
        remove(folder, file, error)
    })?;
    Ok(built)
}

/// Makes a temporary file that is seen to be written; see [`temporary`].
fn create_temporary(folder: &dyn Folder, file: &str) -> Result<(String, Arc<dyn Storage>)> {
    let failed = |cause| Error::io(ErrorKind::Create, "create a file", cause);
    loop {
        let random = Guid::random().to_string();
        let name = temporary::new_name(file, &random);
        let storage = folder.create_exclusive(&name).map_err(failed)?;
        let Some(descriptor) = storage.descriptor() else { return Ok((name, storage)) };
        // Where there are no locks nobody removes it either.
        let is_ours = temporary::hold(descriptor).unwrap_or(true);
        // Between the two steps somebody may have taken it for a left-over.
        if is_ours && folder.exists(&name).map_err(failed)? {
            return Ok((name, storage));
        }
    }
}

/// Takes a file away after `error`; says so if that fails as well.
pub(super) fn remove(folder: &dyn Folder, name: &str, error: Error) -> Error {
    match folder.unlink(name) {
        Ok(()) => error,
        Err(cleaning) if cleaning.kind() == io::ErrorKind::NotFound => error,
        Err(cleaning) => {
            error.advise(format!("remove the file {name}, which could not be removed: {cleaning}"))
        }
    }
}
