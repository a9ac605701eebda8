//! Whether the files that are served still have the names they were opened by. What is served does not depend on them; what
//! is found after the unmount does.

use std::path::PathBuf;

use ploop_core::device::fuse::held;
use ploop_core::format::{Chain, DESCRIPTOR_NAME};
use ploop_core::io::Folder;
use ploop_core::io::file::DirectoryFolder;
use ploop_core::io::identity;

use crate::open;

/// What is wrong with the names of the files of a served disk.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// An image without any name: the kernel removes it with its last use.
    pub(crate) nameless: Option<PathBuf>,
    /// All that is odd, in words.
    pub(crate) warnings: Vec<String>,
}

/// Looks at the names of the files of `chain`, which is that of `snapshot` (the current state if none) in `folder`.
pub(crate) fn examine(chain: &Chain, folder: Option<&DirectoryFolder>, snapshot: Option<&str>) -> Names {
    let mut found = Names::default();
    for delta in 0..chain.depth() {
        let (name, Some(file)) = (chain.name(delta), chain.storage(delta).descriptor()) else { continue };
        if identity::names(file).is_ok_and(|names| names == 0) {
            found.warnings.push(format!(
                "{}: the image that is served was removed, or another file put in its place; it goes on, and is gone with \
                 the unmount",
                name.display()
            ));
            found.nameless.get_or_insert_with(|| name.to_path_buf());
        } else if let Some(path) = identity::current_path(file)
            && path != name
        {
            found.warnings.push(format!(
                "{}: the image that is served is {} now",
                name.display(),
                path.display()
            ));
        }
    }
    if let Some(folder) = folder
        && found.nameless.is_none()
        && !is_named(chain, folder, snapshot)
    {
        let path = folder.real_path().unwrap_or_else(|| folder.path().to_path_buf());
        found.warnings.push(format!(
            "{}: the descriptor does not name the images that are served, so what is written now is not in the disk it \
             describes; put the right one back (ploop restore-descriptor) after the unmount",
            path.join(DESCRIPTOR_NAME).display()
        ));
    }
    found
}

/// Whether a descriptor is there that names the files of `chain`. One that names files elsewhere is not judged.
fn is_named(chain: &Chain, folder: &DirectoryFolder, snapshot: Option<&str>) -> bool {
    match held::named_in(folder, snapshot) {
        Ok(named) => open::identities_of(chain).is_ok_and(|open| open == named),
        Err(_) => folder.identity_of(DESCRIPTOR_NAME).is_ok(),
    }
}
