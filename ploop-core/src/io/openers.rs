//! Who else has a file open, as the kernel's table of processes (`/proc`, proc(5)) tells it.
//!
//! Locks speak for programs that take them. A plain `cp`, `tar` or `rsync` takes none; whoever is about to change what it
//! may still read has to look. The answer stays true only for a file without a name: nobody new can open that one.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

/// Whether another process has `file` open, or that cannot be found out: processes that may not be looked into count as
/// such. What is mapped only, or held by the kernel itself (a loop device, an NFS client's file), is not seen.
///
/// Fails if there is no `/proc`.
pub fn is_open_elsewhere(file: BorrowedFd<'_>) -> io::Result<bool> {
    let wanted = nix::sys::stat::fstat(file)?;
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let is_another = process
            .file_name()
            .to_str()
            .is_some_and(|name| name != own && name.bytes().all(|digit| digit.is_ascii_digit()));
        if !is_another {
            continue;
        }
        let open = match fs::read_dir(process.path().join("fd")) {
            Ok(open) => open,
            Err(error) if has_gone(&error) => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
            Err(error) => return Err(error),
        };
        for one in open {
            // Of the file itself, whatever its name means by now.
            match one.and_then(|one| fs::metadata(one.path())) {
                Ok(found) if (found.dev(), found.ino()) == (wanted.st_dev, wanted.st_ino) => return Ok(true),
                Ok(_) => {}
                Err(error) if has_gone(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(false)
}

/// A process that may not be looked into: then [`is_open_elsewhere`] is true of every file. For tests, which say so.
#[cfg(test)]
pub(crate) fn hidden_process() -> io::Result<Option<u32>> {
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let Some(id) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let seen = fs::read_dir(process.path().join("fd"))
            .and_then(|mut open| open.next().map_or(Ok(()), |one| fs::metadata(one?.path()).map(drop)));
        if seen.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// The process, or its descriptor, ended meanwhile.
fn has_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn another_process_is_seen_as_long_as_it_has_the_file() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let file = fs::File::open(&path).unwrap();
        let mut reader = Command::new("sleep").arg("600").stdin(file.try_clone().unwrap()).spawn().unwrap();
        std::fs::remove_file(&path).unwrap();
        let with_reader = is_open_elsewhere(file.as_fd());
        reader.kill().unwrap();
        reader.wait().unwrap();
        assert!(with_reader.unwrap());
        match hidden_process().unwrap() {
            None => assert!(!is_open_elsewhere(file.as_fd()).unwrap()),
            // As good as one that has it open.
            Some(_) => assert!(is_open_elsewhere(file.as_fd()).unwrap()),
        }
    }
}
