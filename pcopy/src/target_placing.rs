//! The moment in which the files of a copy get their names.
//!
//! ```text
//! the descriptor is written, durably, as NAME.incoming-COPY-plan
//! every image is renamed to its final name · the folder is synced
//! the plan is renamed to DiskDescriptor.xml · the folder is synced
//! ```
//!
//! * The last rename is the one moment of change, and takes the plan away with it: wherever a plan stands, the images it
//!   names belong to nobody, and the next copy to the same name [removes](recover) them.
//! * Whoever puts files in place holds the lock of the plan, so that nobody else takes it for a left-over.
//! * Nothing is removed in a folder with a descriptor, nothing that has another name than a copy gives, that somebody has
//!   open, or that was written to after the plan: then someone has made use of it, and the name counts as taken.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ploop_core::format::{DESCRIPTOR_NAME, DiskDescriptor, Guid, image_name};
use ploop_core::io::file;
use ploop_core::io::lock::{ImageLock, Ownership};
use ploop_core::io::temporary::stem;
use ploop_core::io::{Access, Folder, Storage};
use ploop_core::{Error, ErrorKind, Result};

/// How long to wait for the lock of a left-over.
const LEFT_OVER_PATIENCE: Duration = Duration::from_millis(500);
/// How far the times of two files may be off: the kernel's clock for them goes in steps.
const CLOCK_STEP: Duration = Duration::from_millis(50);
/// What stands between the name of a copy and its number as long as it is incoming.
pub(crate) const INCOMING: &str = ".incoming-";
/// What stands behind the number of a copy in the name of its plan.
const PLAN: &str = "-plan";

/// The name of the plan of the copy `copy_id` to `name`.
pub(crate) fn plan_name(name: &str, copy_id: &str) -> String {
    format!("{}{INCOMING}{copy_id}{PLAN}", stem(name))
}

fn is_copy_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
}

/// Whether it is what stands behind [`INCOMING`]: the number of a copy, and for a delta its own number.
fn is_number_of_copy(text: &str) -> bool {
    let (id, delta) = text.split_once('-').unwrap_or((text, "0"));
    is_copy_id(id) && (1..=4).contains(&delta.len()) && delta.bytes().all(|digit| digit.is_ascii_digit())
}

fn failed(path: &Path, kind: ErrorKind, operation: &str, error: io::Error) -> Error {
    file::explain(error, kind, operation, path)
}

fn unlink(folder: &dyn Folder, path: &Path, name: &str) -> Result<()> {
    match folder.unlink(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let path = path.with_file_name(name);
            Err(file::explain(error, ErrorKind::Unlink, "remove the unfinished copy", &path)
                .advise(format!("remove {} by hand", path.display())))
        }
        _ => Ok(()),
    }
}

/// Locks what may be a left-over as its writer; `None` when somebody has it. The kernel may hold the file of a killed process a
/// little longer than the process.
fn lock_left_over(storage: &Arc<dyn Storage>, path: &Path) -> Option<ImageLock> {
    let end = Instant::now() + LEFT_OVER_PATIENCE;
    loop {
        match ImageLock::take(storage.descriptor()?, path, Ownership::Writer) {
            Ok(lock) => return Some(lock),
            Err(_) if Instant::now() >= end => return None,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Gives the closed and synced `files` their final names, in this order, durably, and then `descriptor` to the folder.
/// `path` is that of the copy, `plan` the name of its plan. After a failure none of it is there;
/// [`ErrorKind::OutcomeUnknown`] when even that is uncertain.
pub(crate) fn put_in_place(
    folder: &dyn Folder,
    path: &Path,
    (files, descriptor): (&[(&str, &str)], Option<&DiskDescriptor>),
    plan: &str,
) -> Result<()> {
    let mut placed = Vec::new();
    let put = write_plan(folder, path, plan, descriptor).and_then(|_lock| {
        rename_all(folder, path, files, &mut placed)?;
        folder.sync().map_err(|error| failed(path, ErrorKind::Sync, "sync the folder of the copy", error))?;
        descriptor.map_or(Ok(()), |_| commit(folder, path, plan))
    });
    put.map_err(|error| {
        // The descriptor first: none may name a file that is not there. It is ours only if it got its name. The plan
        // last: as long as a file is there, it tells whose.
        let written = error.kind() == ErrorKind::OutcomeUnknown;
        let withdrawn = if written { folder.unlink(DESCRIPTOR_NAME) } else { Ok(()) }
            .and_then(|()| placed.iter().try_for_each(|name| folder.unlink(name)))
            .and_then(|()| if placed.is_empty() { Ok(()) } else { folder.sync() })
            .and_then(|()| match folder.unlink(plan) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            });
        match withdrawn {
            Ok(()) if written => error.with_kind(ErrorKind::Sync),
            Ok(()) => error,
            // Nothing has a final name.
            Err(left) if placed.is_empty() => error.advise(format!("remove {plan} by hand: {left}")),
            Err(left) => Error::new(
                ErrorKind::OutcomeUnknown,
                format!("the copy could not be put in place ({error}), nor taken back: {left}"),
            )
            .at_path(path)
            .advise("repair the file system of the folder, then remove the copy and start again"),
        }
    })
}

/// The plan, durable and locked; nothing for files without a descriptor.
fn write_plan(
    folder: &dyn Folder,
    path: &Path,
    plan: &str,
    descriptor: Option<&DiskDescriptor>,
) -> Result<Option<ImageLock>> {
    let Some(descriptor) = descriptor else { return Ok(None) };
    descriptor.write_aside(folder, plan)?;
    let storage = folder
        .open(plan, Access::ReadWrite)
        .map_err(|error| failed(path, ErrorKind::Open, "open the plan of the copy", error))?;
    storage
        .descriptor()
        .map(|open| ImageLock::take(open, &path.with_file_name(plan), Ownership::Writer))
        .transpose()
}

fn rename_all<'n>(
    folder: &dyn Folder,
    path: &Path,
    files: &[(&str, &'n str)],
    placed: &mut Vec<&'n str>,
) -> Result<()> {
    for (incoming, name) in files {
        folder
            .rename_exclusive(incoming, name)
            .map_err(|error| failed(path, ErrorKind::Rename, "give the copy its name", error))?;
        placed.push(name);
    }
    Ok(())
}

fn commit(folder: &dyn Folder, path: &Path, plan: &str) -> Result<()> {
    let path = path.with_file_name(DESCRIPTOR_NAME);
    folder.rename_exclusive(plan, DESCRIPTOR_NAME).map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::AlreadyExists => ErrorKind::Create,
            _ => ErrorKind::Rename,
        };
        failed(&path, kind, "give the descriptor of the copy its name", error)
    })?;
    folder.sync().map_err(|error| {
        failed(&path, ErrorKind::OutcomeUnknown, "sync the folder of the copy", error)
            .advise("repair the file system of the folder, then look at it before going on")
    })
}

/// Removes what copies to `name` have put in place that were killed before their descriptor had its name.
pub(crate) fn recover(folder: &dyn Folder, path: &Path, name: &str) -> Result<()> {
    let names =
        folder.list().map_err(|error| failed(path, ErrorKind::Stat, "list the folder of the copy", error))?;
    if names.iter().any(|name| name == DESCRIPTOR_NAME) {
        return Ok(());
    }
    for plan in names {
        let id = plan.strip_prefix(&*stem(name)).and_then(|rest| rest.strip_prefix(INCOMING));
        if !id.and_then(|rest| rest.strip_suffix(PLAN)).is_some_and(is_copy_id) {
            continue;
        }
        let Ok(storage) = folder.open(&plan, Access::ReadWrite) else {
            // Gone meanwhile, or no file: not ours after all.
            continue;
        };
        let Some(_lock) = lock_left_over(&storage, &path.with_file_name(&plan)) else { continue };
        let planned = match DiskDescriptor::load_aside(folder, &plan) {
            Ok(descriptor) => descriptor.images().iter().map(|image| image.file().to_owned()).collect(),
            Err(error) if error.kind() == ErrorKind::Read => return Err(error),
            // It never was durable, so nothing was renamed.
            Err(_) => Vec::new(),
        };
        let Some(written) = modified(&storage) else { continue };
        let Some(found) = left_overs(folder, path, (name, &planned), written) else { continue };
        for (left, _held) in &found {
            unlink(folder, path, left)?;
        }
        // The plan goes last: until then the same removal can be repeated.
        folder.sync().map_err(|error| failed(path, ErrorKind::Sync, "sync the folder of the copy", error))?;
        unlink(folder, path, &plan)?;
    }
    Ok(())
}

fn modified(storage: &Arc<dyn Storage>) -> Option<SystemTime> {
    let file = File::from(storage.descriptor()?.try_clone_to_owned().ok()?);
    file.metadata().ok()?.modified().ok()
}

/// The files of a plan that are there, locked; `None` unless all of them may go.
fn left_overs<'p>(
    folder: &dyn Folder,
    path: &Path,
    (name, planned): (&str, &'p [String]),
    written: SystemTime,
) -> Option<Vec<(&'p str, ImageLock)>> {
    let mut found = Vec::new();
    for image in planned {
        if !is_name_of_copy(image, name) {
            return None;
        }
        let storage = match folder.open(image, Access::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.ok()?,
        };
        let lock = lock_left_over(&storage, &path.with_file_name(image))?;
        if modified(&storage)? > written + CLOCK_STEP {
            return None;
        }
        found.push((image.as_str(), lock));
    }
    Some(found)
}

/// Whether a copy to `name` gives that name to an image.
fn is_name_of_copy(image: &str, name: &str) -> bool {
    let example = image_name(name);
    let stem = example.rfind('{').and_then(|at| example.get(..at));
    let guid = stem.and_then(|stem| image.strip_prefix(stem));
    image == name || guid.is_some_and(|guid| guid.parse::<Guid>().is_ok())
}

/// What failed or killed copies to `name` have left under incoming names. A copy that is still running holds its lock.
pub(crate) fn remove_left_overs(folder: &dyn Folder, path: &Path, name: &str) -> Result<()> {
    let names = folder.list().map_err(|error| failed(path, ErrorKind::Stat, "list the folder", error))?;
    for left in names {
        let id = left.strip_prefix(&*stem(name)).and_then(|rest| rest.strip_prefix(INCOMING));
        if !id.is_some_and(is_number_of_copy) {
            continue;
        }
        let Ok(storage) = folder.open(&left, Access::ReadWrite) else {
            // Gone meanwhile, or no file: not ours after all.
            continue;
        };
        if let Some(_lock) = lock_left_over(&storage, path) {
            unlink(folder, path, &left)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_core::format::{Mode, TreeState};
    use ploop_core::io::file::DirectoryFolder;
    use ploop_core::units::Sectors;
    use std::sync::atomic::{AtomicI64, Ordering};

    const ID: &str = "0123456789abcdef0123456789abcdef";

    /// A folder of a process that is killed before one of its changes: from then on it does nothing any more.
    struct Mortal<'a>(&'a DirectoryFolder, AtomicI64);

    impl Mortal<'_> {
        fn step(&self) -> io::Result<()> {
            match self.1.fetch_sub(1, Ordering::SeqCst) {
                1.. => Ok(()),
                _ => Err(io::Error::other("killed")),
            }
        }
    }

    impl Folder for Mortal<'_> {
        fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
            self.0.open(name, access)
        }
        fn create_exclusive(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
            self.step().and_then(|()| self.0.create_exclusive(name))
        }
        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            self.step().and_then(|()| self.0.rename(from, to))
        }
        fn rename_exclusive(&self, from: &str, to: &str) -> io::Result<()> {
            self.step().and_then(|()| self.0.rename_exclusive(from, to))
        }
        fn unlink(&self, name: &str) -> io::Result<()> {
            self.step().and_then(|()| self.0.unlink(name))
        }
        fn exists(&self, name: &str) -> io::Result<bool> {
            self.0.exists(name)
        }
        fn list(&self) -> io::Result<Vec<String>> {
            self.0.list()
        }
        fn sync(&self) -> io::Result<()> {
            self.step().and_then(|()| self.0.sync())
        }
    }

    fn names(folder: &DirectoryFolder) -> Vec<String> {
        let mut names = folder.list().unwrap();
        names.sort();
        names
    }

    /// The files of a copy and its descriptor.
    fn incoming(folder: &DirectoryFolder) -> (Vec<(String, String)>, DiskDescriptor) {
        let mut files = Vec::new();
        let mut states = Vec::new();
        for number in 0..3_u8 {
            let (guid, parent) = (Guid::from_bytes([number + 1; 16]), Guid::from_bytes([number; 16]));
            let file = if number == 0 { "disk.hds".to_owned() } else { format!("disk.hds.{guid}") };
            let from = format!("disk.hds{INCOMING}{ID}-{number}");
            folder.create_exclusive(&from).unwrap();
            files.insert(0, (from, file.clone()));
            let parent = if number == 0 { Guid::NONE } else { parent };
            states.push(TreeState { guid, parent, file, temporary: false });
        }
        let top = Guid::from_bytes([3; 16]);
        let sizes = (Sectors(1 << 12), Sectors(64));
        let descriptor = DiskDescriptor::of_tree(Mode::Expanded, sizes.0, sizes.1, top, &states).unwrap();
        (files, descriptor)
    }

    fn put(
        folder: &dyn Folder,
        path: &Path,
        files: &[(String, String)],
        descriptor: &DiskDescriptor,
    ) -> Result<()> {
        let files: Vec<_> = files.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
        put_in_place(folder, path, (&files, Some(descriptor)), &plan_name("disk.hds", ID))
    }

    #[test]
    fn killed_before_any_change_it_is_whole_or_gone_with_the_next_attempt() {
        let (mut whole, mut gone) = (0, 0);
        for steps in 0..20 {
            let root = tempfile::tempdir().unwrap();
            let folder = DirectoryFolder::open(root.path()).unwrap();
            let path = root.path().join("disk.hds");
            let (files, descriptor) = incoming(&folder);
            let done = put(&Mortal(&folder, AtomicI64::new(steps)), &path, &files, &descriptor);
            // The recovery is killed, too, wherever it can be, and comes again.
            for steps in 0..12 {
                let _ = recover(&Mortal(&folder, AtomicI64::new(steps)), &path, "disk.hds");
            }
            recover(&folder, &path, "disk.hds").unwrap();
            remove_left_overs(&folder, &path, "disk.hds").unwrap();
            let left = names(&folder);
            if left.is_empty() {
                gone += 1;
                assert!(done.is_err(), "{steps}");
            } else {
                whole += 1;
                assert_eq!(left.len(), 4, "{steps}: {left:?}");
                DiskDescriptor::load(&folder, None).unwrap();
            }
        }
        assert!(whole > 3 && gone > 6, "{whole} {gone}");
    }

    #[test]
    fn a_failure_that_is_no_death_takes_everything_back() {
        let root = tempfile::tempdir().unwrap();
        let folder = DirectoryFolder::open(root.path()).unwrap();
        let path = root.path().join("disk.hds");
        let (files, descriptor) = incoming(&folder);
        // The last name is taken by something that is not ours, be it a link to nowhere.
        std::os::unix::fs::symlink("/nowhere", &path).unwrap();
        let refused = put(&folder, &path, &files, &descriptor).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Create);
        remove_left_overs(&folder, &path, "disk.hds").unwrap();
        assert_eq!(names(&folder), ["disk.hds"]);
        std::fs::remove_file(&path).unwrap();
        // A descriptor that came meanwhile.
        let (files, descriptor) = incoming(&folder);
        std::fs::write(root.path().join(DESCRIPTOR_NAME), "theirs").unwrap();
        assert_eq!(put(&folder, &path, &files, &descriptor).unwrap_err().kind(), ErrorKind::Create);
        remove_left_overs(&folder, &path, "disk.hds").unwrap();
        assert_eq!(names(&folder), [DESCRIPTOR_NAME]);
    }

    #[test]
    fn what_somebody_may_use_stays() {
        type Spoil = fn(&Path) -> Option<(Arc<dyn Storage>, Option<ImageLock>)>;
        let plan = plan_name("disk.hds", ID);
        let spoilers: [Spoil; 4] = [
            // A descriptor names it by now.
            |root| {
                std::fs::write(root.join(DESCRIPTOR_NAME), "another").unwrap();
                None
            },
            // Somebody reads it.
            |root| {
                let folder = DirectoryFolder::open(root).unwrap();
                let storage = folder.open("disk.hds", Access::ReadWrite).unwrap();
                let lock = ImageLock::take(storage.descriptor().unwrap(), root, Ownership::Reader).unwrap();
                Some((storage, Some(lock)))
            },
            // Somebody wrote to it.
            |root| {
                let file = File::options().write(true).open(root.join("disk.hds")).unwrap();
                file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
                None
            },
            // It is another file than it was.
            |root| {
                std::fs::remove_file(root.join("disk.hds")).unwrap();
                std::os::unix::fs::symlink("/nowhere", root.join("disk.hds")).unwrap();
                None
            },
        ];
        for (number, spoil) in spoilers.into_iter().enumerate() {
            let root = tempfile::tempdir().unwrap();
            let folder = DirectoryFolder::open(root.path()).unwrap();
            let path = root.path().join("disk.hds");
            let (files, descriptor) = incoming(&folder);
            put(&folder, &path, &files, &descriptor).unwrap();
            folder.rename(DESCRIPTOR_NAME, &plan).unwrap();
            let held = spoil(root.path());
            let before = names(&folder);
            recover(&folder, &path, "disk.hds").unwrap();
            assert_eq!(names(&folder), before, "spoiler {number}");
            drop(held);
        }
        // A plan with names that no copy to this name gives, and one of another name.
        let root = tempfile::tempdir().unwrap();
        let folder = DirectoryFolder::open(root.path()).unwrap();
        let path = root.path().join("other.hds");
        let (files, descriptor) = incoming(&folder);
        put(&folder, &path, &files, &descriptor).unwrap();
        folder.rename(DESCRIPTOR_NAME, &plan_name("other.hds", ID)).unwrap();
        for name in ["other.hds", "disk.hds", "disk"] {
            recover(&folder, &path, name).unwrap();
            assert_eq!(names(&folder).len(), 4);
        }
    }
}
