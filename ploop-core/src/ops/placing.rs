//! A new file under its final name: whole or not at all.

use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Guid;
use crate::io::{Folder, Storage};

/// Builds a file under a temporary name, gives it its own, which must be free, and makes that durable. `build` leaves
/// its content durable. After an error there is no file; a crash leaves at most one called `FILE.tmp.…`.
pub(super) fn place_file<T>(
    folder: &dyn Folder,
    file: &str,
    build: impl FnOnce(&Arc<dyn Storage>) -> Result<T>,
) -> Result<T> {
    let random = Guid::random().to_string();
    let temporary = format!("{file}.tmp.{}", random.trim_matches(['{', '}']));
    let storage = folder
        .create_exclusive(&temporary)
        .map_err(|cause| Error::io(ErrorKind::Create, "create a file", cause))?;
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
