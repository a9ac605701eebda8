//! The files of a served disk as its keeper holds them: a successor serves these very files, or none (K1).
//!
//! A name may be given to another file while a disk is served: a restore, an update of a template, a renamed folder, a mount
//! on top. So nothing that was open is opened by its name again. For every image and for the folder of the descriptor the
//! server makes a descriptor that only holds the file ([`identity`]): it carries neither a lock nor I/O, so it keeps no lock
//! of a dead server alive, whose end is what a successor waits for. These go to the keeper over a socket pair, and from
//! there to each successor. What was sent and not yet received outlives the server, too.
//!
//! *Which of them*: each set of files has a number. A chain that is about to be put in place is sent before a descriptor
//! names it, so that around a snapshot or a merge the keeper holds both sets; the number of the one in use is in the
//! [survivor memory](super::survivor), and a set with a higher number is one that the descriptor may name already
//! (see [`choose`]).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::control::{Connection, DESCRIPTORS_MAX};
use crate::device::runtime::OpenRequest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::chain::DEPTH_MAX;
use crate::format::{Chain, DiskDescriptor};
use crate::io::file::DirectoryFolder;
use crate::io::identity::{self, FileIdentity};

/// How long a successor waits for the files that its keeper sends before anything else.
const FILES_MAX: Duration = Duration::from_secs(30);

/// A file that is only held.
#[derive(Debug)]
pub struct HeldFile {
    /// Where it was when it was opened: for people.
    pub path: PathBuf,
    /// What it is.
    pub descriptor: OwnedFd,
}

impl HeldFile {
    /// Its identity.
    pub fn identity(&self) -> Result<FileIdentity> {
        FileIdentity::of(&self.descriptor)
            .map_err(|cause| Error::io(ErrorKind::Stat, "examine a held file", cause).at_path(&self.path))
    }

    /// Where it is now, or else was.
    pub fn current_path(&self) -> PathBuf {
        identity::current_path(self.descriptor.as_fd()).unwrap_or_else(|| self.path.clone())
    }
}

/// How a disk is opened, and what else a successor must know that is no file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The request of the first server.
    pub open: OpenRequest,
    /// Clusters of a raw base, in sectors; `None` if the base is an image.
    pub raw_cluster_sectors: Option<u64>,
}

/// The files of one chain.
#[derive(Debug)]
pub struct HeldFiles {
    /// Which set it is.
    pub number: u64,
    /// How it is opened.
    pub terms: Terms,
    /// The folder of the descriptor, if there is one.
    pub folder: Option<HeldFile>,
    /// The images, base first.
    pub images: Vec<HeldFile>,
}

impl HeldFiles {
    fn identities(&self) -> Result<Vec<FileIdentity>> {
        self.images.iter().map(HeldFile::identity).collect()
    }

    /// The identity of the top.
    pub fn top(&self) -> Result<FileIdentity> {
        let top = self.images.last();
        top.ok_or_else(|| Error::new(ErrorKind::Open, "no image is held"))?.identity()
    }

    /// The folder, open.
    pub fn open_folder(&self) -> Result<Option<DirectoryFolder>> {
        let Some(folder) = &self.folder else { return Ok(None) };
        DirectoryFolder::held(folder.descriptor.as_fd(), folder.current_path()).map(Some)
    }

    /// Sends these files, as a keeper does to a server and a server to its keeper.
    pub fn send(&self, to: &Connection) -> Result<()> {
        let all: Vec<&HeldFile> = self.folder.iter().chain(&self.images).collect();
        for (piece, files) in all.chunks(DESCRIPTORS_MAX).enumerate() {
            let said = files
                .iter()
                .map(|file| Ok((file.path.clone(), file.identity()?)))
                .collect::<Result<Vec<_>>>()?;
            let part = Message::Part(Part {
                number: self.number,
                first: piece * DESCRIPTORS_MAX,
                count: all.len(),
                has_folder: self.folder.is_some(),
                terms: (piece == 0).then(|| self.terms.clone()),
                files: said,
            });
            let descriptors: Vec<_> = files.iter().map(|file| file.descriptor.as_fd()).collect();
            to.send(&part, &descriptors)?;
        }
        Ok(())
    }
}

/// What goes between keeper and server.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Message {
    /// Some of the files of a set.
    Part(Part),
    /// To the keeper: the number of the set in use has changed. To a server: these are all.
    Done,
}

#[derive(Serialize, Deserialize)]
struct Part {
    number: u64,
    /// How many files of the set came before.
    first: usize,
    /// How many there are.
    count: usize,
    /// The first of them is the folder.
    has_folder: bool,
    terms: Option<Terms>,
    files: Vec<(PathBuf, FileIdentity)>,
}

/// Sets of files that come in parts.
#[derive(Debug, Default)]
pub struct Incoming {
    terms: Terms,
    files: Vec<HeldFile>,
}

/// What has come.
#[derive(Debug)]
pub enum Came {
    /// A whole set.
    Files(HeldFiles),
    /// Nothing whole yet.
    Nothing,
    /// Of the sets that came, others are in use now; or these were all.
    Done,
    /// The other end is gone.
    End,
}

impl Incoming {
    /// Receives one message. [`ErrorKind::Busy`] when none comes in `time_max`. A set that is not what was said fails.
    pub fn receive(&mut self, from: &Connection, time_max: Option<Duration>) -> Result<Came> {
        let Some(message) = from.receive(time_max)? else { return Ok(Came::End) };
        let body = serde_json::from_value(message.body)
            .map_err(|cause| Error::io(ErrorKind::System, "read what came of held files", cause.into()))?;
        let part = match body {
            Message::Done => return Ok(Came::Done),
            Message::Part(part) => part,
        };
        let refuse = |what: &str| Err(Error::new(ErrorKind::System, format!("take over held files: {what}")));
        if part.first == 0 {
            *self = Self { terms: part.terms.unwrap_or_default(), files: Vec::new() };
        }
        if part.first != self.files.len() || part.count > DEPTH_MAX + 1 {
            return refuse("a part is missing");
        }
        if part.files.len() != message.descriptors.len() {
            return refuse("descriptors are missing");
        }
        for ((path, said), descriptor) in part.files.into_iter().zip(message.descriptors) {
            let file = HeldFile { path, descriptor };
            if file.identity()? != said {
                return refuse("a descriptor is not that of the file that was named");
            }
            self.files.push(file);
        }
        if self.files.len() < part.count {
            return Ok(Came::Nothing);
        }
        let mut files = std::mem::take(&mut self.files);
        if files.len() != part.count || files.len() < 1 + usize::from(part.has_folder) {
            return refuse("their number is not what was said");
        }
        let images = files.split_off(usize::from(part.has_folder));
        let terms = std::mem::take(&mut self.terms);
        Ok(Came::Files(HeldFiles { number: part.number, terms, folder: files.pop(), images }))
    }
}

/// All sets that a keeper holds.
#[derive(Debug, Default)]
pub struct Holdings(Mutex<BTreeMap<u64, HeldFiles>>);

impl Holdings {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, HeldFiles>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one more; of those that were only prepared, the last one counts.
    pub fn add(&self, files: HeldFiles, in_use: u64) {
        let mut all = self.lock();
        all.retain(|&number, _| number <= in_use);
        all.insert(files.number, files);
        all.retain(|&number, _| number >= in_use);
    }

    /// Lets go of those before the set in use.
    pub fn forget_before(&self, in_use: u64) {
        self.lock().retain(|&number, _| number >= in_use);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Sends all to a server.
    pub fn send(&self, to: &Connection) -> Result<()> {
        let all = self.lock();
        all.values().try_for_each(|files| files.send(to))?;
        to.send(&Message::Done, &[])
    }
}

/// All that a keeper sends to a successor.
pub fn receive_all(from: &Connection) -> Result<Vec<HeldFiles>> {
    let (mut incoming, mut all) = (Incoming::default(), Vec::new());
    loop {
        match incoming.receive(from, Some(FILES_MAX))? {
            Came::Files(files) => all.push(files),
            Came::Nothing => {}
            Came::Done => return Ok(all),
            Came::End => {
                return Err(Error::new(ErrorKind::Device, "succeed a dead server: the keeper is gone"));
            }
        }
    }
}

/// What a successor is to serve.
#[derive(Debug)]
pub struct Chosen {
    /// These files.
    pub files: HeldFiles,
    /// The highest number of a set so far.
    pub number_max: u64,
    /// What is wrong with their names.
    pub warning: Option<String>,
}

/// Of the sets that a keeper holds, the one that a successor serves: that in use; unless nothing is pending and the
/// descriptor names the files of one that was prepared after it. Then the death came between the two steps of a snapshot or
/// a merge, both sets hold the same content, and what is written from now on must be where the descriptor says.
///
/// A descriptor that names other files than either does not matter to what is served.
pub fn choose(mut held: Vec<HeldFiles>, in_use: u64, is_pending: bool) -> Result<Chosen> {
    let number_max = held.iter().map(|files| files.number).max().unwrap_or(0);
    let Some(current) = held.iter().position(|files| files.number == in_use) else {
        return Err(Error::new(
            ErrorKind::Device,
            "succeed a dead server: the keeper does not hold the files it had open",
        )
        .advise("unmount what is left with ploop umount, then check the image and its file system"));
    };
    let named = named_files(&held[current]);
    let mut chosen = current;
    if let Ok(named) = &named
        && !is_pending
        && *named != held[current].identities()?
    {
        for (index, files) in held.iter().enumerate() {
            if files.number > in_use && *named == files.identities()? {
                chosen = index;
            }
        }
    }
    let files = held.swap_remove(chosen);
    let place = files.folder.as_ref().map(HeldFile::current_path);
    let warning = match (named, place) {
        (_, None) => None,
        (Ok(named), _) if named == files.identities()? => None,
        (Ok(_), Some(place)) => Some(format!(
            "{}: the descriptor names other files than those that are served, which go on",
            place.display()
        )),
        (Err(error), Some(place)) => Some(format!(
            "{}: the descriptor cannot tell which files are served, which go on: {error}",
            place.display()
        )),
    };
    Ok(Chosen { files, number_max, warning })
}

/// The files that the descriptor in the held folder names, base first.
fn named_files(held: &HeldFiles) -> Result<Vec<FileIdentity>> {
    match held.open_folder()? {
        Some(folder) => named_in(&folder, held.terms.open.snapshot.as_deref()),
        None => held.identities(),
    }
}

/// The files that the descriptor in `folder` names for a state (the current one if none), base first, as they are now.
pub fn named_in(folder: &DirectoryFolder, snapshot: Option<&str>) -> Result<Vec<FileIdentity>> {
    let descriptor = DiskDescriptor::load(folder, Some(folder.path()))?;
    let state = match snapshot {
        None => descriptor.top_guid(),
        Some("base") => descriptor
            .chain_for(descriptor.top_guid())?
            .first()
            .map_or(descriptor.top_guid(), |image| image.guid()),
        Some(text) => text.parse()?,
    };
    descriptor.chain_for(state)?.into_iter().map(|image| folder.identity_of(image.file())).collect()
}

/// A server's way to hand files to its keeper.
#[derive(Debug)]
pub struct Handing {
    open: OpenRequest,
    folder: Option<HeldFile>,
    last: Mutex<Last>,
}

/// To whom files were handed, and which.
#[derive(Debug)]
struct Last {
    keeper: Connection,
    /// Number of the last set that was sent.
    number: u64,
    /// Its files.
    identities: Vec<FileIdentity>,
}

impl Handing {
    /// Over `keeper`, for a disk that is opened as `open` says and whose descriptor is in `folder`. The next set will have
    /// the number behind `number`.
    pub fn new(
        keeper: Connection,
        open: OpenRequest,
        folder: Option<&DirectoryFolder>,
        number: u64,
    ) -> Result<Self> {
        let hold = |folder: &DirectoryFolder| {
            identity::hold(folder.as_fd())
                .map(|descriptor| HeldFile { path: folder.path().to_path_buf(), descriptor })
                .map_err(|cause| Error::io(ErrorKind::Open, "hold the folder", cause).at_path(folder.path()))
        };
        let folder = folder.map(hold).transpose()?;
        let last = Mutex::new(Last { keeper, number, identities: Vec::new() });
        Ok(Self { open, folder, last })
    }

    /// The number of the last set.
    pub fn number(&self) -> u64 {
        self.lock().number
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on to another keeper, who is sent the files of `chain`, the one in use.
    pub fn change_keeper(&self, keeper: Connection, chain: &Chain) -> Result<()> {
        let mut last = self.lock();
        last.keeper = keeper;
        last.identities.clear();
        drop(last);
        self.hand(chain)
    }

    /// Sends the files of `chain`, unless they were sent last. Nothing to do for a keeper that is gone: there will be no
    /// successor then.
    pub fn hand(&self, chain: &Chain) -> Result<()> {
        let files = files_of(chain)?;
        let identities = files.iter().map(HeldFile::identity).collect::<Result<Vec<_>>>()?;
        let mut last = self.lock();
        if last.identities == identities {
            return Ok(());
        }
        let held = HeldFiles {
            number: last.number + 1,
            terms: Terms {
                open: self.open.clone(),
                raw_cluster_sectors: chain
                    .header(0)
                    .is_none()
                    .then(|| u64::from(chain.geometry().cluster_sectors())),
            },
            folder: match &self.folder {
                Some(folder) => Some(second(folder)?),
                None => None,
            },
            images: files,
        };
        match held.send(&last.keeper) {
            Err(error) if !last.keeper.is_closed() => return Err(error),
            _ => {}
        }
        last.number += 1;
        last.identities = identities;
        Ok(())
    }

    /// Tells that the set in use is another one.
    pub fn replaced(&self) {
        // A keeper that does not hear of it holds a file longer than it must.
        let _ = self.lock().keeper.send(&Message::Done, &[]);
    }
}

fn second(file: &HeldFile) -> Result<HeldFile> {
    let descriptor = file
        .descriptor
        .try_clone()
        .map_err(|cause| Error::io(ErrorKind::Open, "hold a file", cause).at_path(&file.path))?;
    Ok(HeldFile { path: file.path.clone(), descriptor })
}

/// The files of a chain, held.
fn files_of(chain: &Chain) -> Result<Vec<HeldFile>> {
    let hold = |delta: usize| {
        let path = chain.name(delta).to_path_buf();
        let descriptor = chain
            .storage(delta)
            .descriptor()
            .ok_or_else(|| Error::new(ErrorKind::Open, "an image of the disk is no file").at_path(&path))?;
        let descriptor = identity::hold(descriptor)
            .map_err(|cause| Error::io(ErrorKind::Open, "hold the image", cause).at_path(&path))?;
        Ok(HeldFile { path, descriptor })
    };
    (0..chain.depth()).map(hold).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Guid;
    use crate::ops;
    use crate::units::Sectors;
    use std::fs::File;
    use std::path::Path;

    fn held(number: u64, folder: &Path, files: &[&str]) -> HeldFiles {
        let hold = |path: PathBuf| {
            let file = File::open(&path).unwrap();
            HeldFile { descriptor: identity::hold(file.as_fd()).unwrap(), path }
        };
        HeldFiles {
            number,
            terms: Terms::default(),
            folder: Some(hold(folder.to_path_buf())),
            images: files.iter().map(|file| hold(folder.join(file))).collect(),
        }
    }

    /// A disk, and what it has after a snapshot: the files before, those after.
    fn snapshot(folder: &Path) -> (HeldFiles, HeldFiles) {
        let options = ops::create::CreateOptions::new(folder, "disk.hds", Sectors(2048 * 8));
        ops::create(&options).unwrap();
        let before = held(1, folder, &["disk.hds"]);
        let mut after = DiskDescriptor::load(&DirectoryFolder::open(folder).unwrap(), None).unwrap();
        after.add_snapshot(Guid::random(), "disk.hds.new").unwrap();
        std::fs::copy(folder.join("disk.hds"), folder.join("disk.hds.new")).unwrap();
        let prepared = held(2, folder, &["disk.hds", "disk.hds.new"]);
        std::fs::copy(folder.join("DiskDescriptor.xml"), folder.join("before.xml")).unwrap();
        after.store(&DirectoryFolder::open(folder).unwrap()).unwrap();
        (before, prepared)
    }

    #[test]
    fn around_a_snapshot_the_descriptor_says_which_files_are_served() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        let (before, after) = snapshot(&path);
        // Renamed, and nothing pending: the new ones, also from a folder that was moved.
        let moved = folder.path().join("moved");
        std::fs::rename(&path, &moved).unwrap();
        let chosen = choose(vec![before, after], 1, false).unwrap();
        assert_eq!((chosen.files.number, chosen.number_max, chosen.warning), (2, 2, None));
        std::fs::rename(&moved, &path).unwrap();
        let sets = || vec![held(1, &path, &["disk.hds"]), held(2, &path, &["disk.hds", "disk.hds.new"])];
        // Not renamed: the old ones.
        let renamed = path.join("renamed.xml");
        std::fs::rename(path.join("DiskDescriptor.xml"), &renamed).unwrap();
        std::fs::rename(path.join("before.xml"), path.join("DiskDescriptor.xml")).unwrap();
        let chosen = choose(sets(), 1, false).unwrap();
        assert_eq!((chosen.files.number, chosen.warning), (1, None));
        // In use already: these, whatever the descriptor says.
        let chosen = choose(sets(), 2, false).unwrap();
        assert!(chosen.files.number == 2 && chosen.warning.is_some());
        // Entries that are pending belong to the files in use.
        std::fs::rename(&renamed, path.join("DiskDescriptor.xml")).unwrap();
        let chosen = choose(sets(), 1, true).unwrap();
        assert!(chosen.files.number == 1 && chosen.warning.is_some());
        // Names that were given to other files, and no descriptor at all.
        std::fs::copy(path.join("disk.hds"), path.join("other")).unwrap();
        let kept = sets();
        std::fs::rename(path.join("other"), path.join("disk.hds")).unwrap();
        let chosen = choose(kept, 1, false).unwrap();
        assert!(chosen.files.number == 1 && chosen.warning.unwrap().contains("other files"));
        let kept = sets();
        std::fs::remove_file(path.join("DiskDescriptor.xml")).unwrap();
        assert!(choose(kept, 2, false).unwrap().warning.is_some());
        // Files that nobody holds are served by nobody.
        assert!(choose(sets(), 3, false).is_err());
    }

    #[test]
    fn files_go_over_a_socket_in_parts_and_outlive_who_sent_them() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..DEPTH_MAX).map(|number| format!("image{number}")).collect();
        for name in &names {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let sent = held(7, folder.path(), &names);
        let identities = sent.identities().unwrap();
        let (server, keeper) = Connection::pair().unwrap();
        sent.send(&server).unwrap();
        // Half of another set, and death.
        let part = Part {
            number: 8,
            first: 0,
            count: 2,
            has_folder: false,
            terms: None,
            files: vec![(PathBuf::from("x"), sent.images[0].identity().unwrap())],
        };
        server.send(&Message::Part(part), &[sent.images[0].descriptor.as_fd()]).unwrap();
        drop((server, sent));
        let (holdings, mut incoming) = (Holdings::default(), Incoming::default());
        loop {
            match incoming.receive(&keeper, None).unwrap() {
                Came::Files(files) => holdings.add(files, 0),
                Came::End => break,
                Came::Nothing | Came::Done => {}
            }
        }
        let (keeper, successor) = Connection::pair().unwrap();
        holdings.send(&keeper).unwrap();
        let came = receive_all(&successor).unwrap();
        assert_eq!(came.len(), 1);
        assert_eq!((came[0].number, came[0].identities().unwrap()), (7, identities));
        assert!(came[0].folder.is_some());
        // What is not what was said is refused.
        let wrong = FileIdentity { device: 0, inode: 0 };
        let part = Part {
            number: 9,
            first: 0,
            count: 1,
            has_folder: false,
            terms: None,
            files: vec![(PathBuf::from("x"), wrong)],
        };
        keeper.send(&Message::Part(part), &[came[0].images[0].descriptor.as_fd()]).unwrap();
        assert!(Incoming::default().receive(&successor, None).is_err());
    }
}
