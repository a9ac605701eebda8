//! What the commands on snapshots share: which disk is meant, whether a server must be asked, and names.

use std::path::{Path, PathBuf};

use ploop_core::device::runtime::{Entry, Runtime, State};
use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, Guid};
use ploop_core::{Error, ErrorKind, Result};

use crate::open;

/// How long the descriptor's lock is waited for, as in the original.
pub(crate) use ploop_core::ops::descriptor_lock::lock_timeout;

/// A disk with a descriptor, and the server that writes to it, if one does.
pub(crate) struct Target {
    /// The descriptor, absolute.
    pub(crate) descriptor: PathBuf,
    /// The server that has it open for writing.
    pub(crate) served: Option<(Entry, State)>,
}

impl Target {
    /// The disk named by a descriptor, its folder, or the device or mount point of a served one.
    pub(crate) fn find(name: &Path) -> Result<Self> {
        let runtime = Runtime::of_user()?;
        let descriptor = match of_path(name) {
            Some(descriptor) => descriptor,
            None => match runtime.find(name)?.and_then(|state| state.open.descriptor) {
                Some(descriptor) => descriptor,
                None => {
                    open::look_at(name)?;
                    return Err(Error::new(
                        ErrorKind::Parameter,
                        "only a disk with a descriptor has snapshots",
                    )
                    .at_path(name)
                    .advise(format!("give its {DESCRIPTOR_NAME} or the folder that has it")));
                }
            },
        };
        // By its path: each change of the snapshots gives the descriptor another inode.
        let served = runtime.states()?.into_iter().find(|state| {
            !state.open.read_only
                && state.open.descriptor.as_ref() == Some(&descriptor)
                && (state.is_running() || state.loop_device.is_some())
        });
        Ok(Self { descriptor, served: served.map(|state| (runtime.entry(&state.id), state)) })
    }

    /// What the descriptor says at the moment.
    pub(crate) fn load(&self) -> Result<DiskDescriptor> {
        open::load(&self.descriptor).map(|(_, descriptor)| descriptor)
    }

    /// Fails if the disk is served: for what can only be done to a closed one.
    pub(crate) fn need_closed(&self, what: &str) -> Result<()> {
        match &self.served {
            None => Ok(()),
            Some((_, state)) => {
                let device = state
                    .loop_device
                    .as_ref()
                    .map_or_else(|| state.id.clone(), |path| path.display().to_string());
                Err(Error::new(ErrorKind::InUse, format!("{what}: the disk is mounted as {device}"))
                    .at_path(&self.descriptor)
                    .advise("unmount it first"))
            }
        }
    }
}

/// The descriptor that a path names by itself.
fn of_path(name: &Path) -> Option<PathBuf> {
    let path = std::fs::canonicalize(open::followed(name).ok()?).ok()?;
    if path.is_dir() {
        let descriptor = path.join(DESCRIPTOR_NAME);
        return descriptor.is_file().then_some(descriptor);
    }
    path.file_name().is_some_and(|name| name == DESCRIPTOR_NAME).then_some(path)
}

/// The GUID of a snapshot as typed: `{xxxxxxxx-…}` or without the braces, in either case.
pub(crate) fn guid(text: &str) -> std::result::Result<Guid, String> {
    in_braces(text).parse().map_err(|error: Error| error.to_string())
}

/// A UUID as typed, in the braces that images and descriptors write; other words stay as they are.
fn in_braces(text: &str) -> String {
    const BARE_LEN: usize = 36;
    if text.len() == BARE_LEN && !text.starts_with('{') { format!("{{{text}}}") } else { text.to_owned() }
}

/// A snapshot as typed where a word may stand for one as well: a GUID gets its braces.
pub(crate) fn guid_or_word(text: &str) -> std::result::Result<String, std::convert::Infallible> {
    Ok(in_braces(text))
}

/// A rate as typed: a size for each second, at least one byte.
pub(crate) fn rate(text: &str) -> std::result::Result<u64, String> {
    let bytes = crate::args::size(text)?.checked_bytes();
    bytes.filter(|&bytes| bytes > 0).ok_or_else(|| "a rate is at least one sector in a second".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_read_with_and_without_braces() {
        let with = guid("{5FBAABE3-6958-40ff-92a7-860e329aab41}").unwrap();
        assert_eq!(guid("5fbaabe3-6958-40ff-92a7-860e329aab41").unwrap(), with);
        assert_eq!(guid_or_word("base").unwrap(), "base");
        let word = guid_or_word("5fbaabe3-6958-40ff-92a7-860e329aab41").unwrap();
        assert_eq!(word.parse::<Guid>().unwrap(), with);
        for wrong in [
            "",
            "5fbaabe3695840ff92a7860e329aab41",
            "{5fbaabe3-6958-40ff-92a7-860e329aab41",
            "5fbaabe3-6958-40ff-92a7-860e329aab4g",
        ] {
            assert!(guid(wrong).is_err(), "{wrong:?}");
        }
    }
}
