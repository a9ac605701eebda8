//! Merges of image files in real folders: contents, order, refusals.

use super::*;
use crate::format::Mode;
use crate::format::testing::guest_content;
use crate::io::StorageExt;
use crate::ops::create::{CreateOptions, create_in};
use crate::ops::progress::Silent;
use crate::ops::testing::{descriptor, guid, open_state, snapshot, write};

const CLUSTERS: u64 = 16;

struct Ground {
    folder: tempfile::TempDir,
    /// The highest first, the base last.
    images: Vec<PathBuf>,
    /// What the highest shows.
    content: Vec<u8>,
}

impl Ground {
    /// Three images on each other, and the descriptor that made them.
    fn new(mode: Mode) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let opened = DirectoryFolder::open(folder.path()).unwrap();
        let options = CreateOptions {
            cluster: Sectors(64),
            mode,
            ..CreateOptions::new("", "root.hds", Sectors(64 * CLUSTERS))
        };
        create_in(&opened, &options).unwrap();
        write(&opened, &[(0, 1), (1, 1), (2, 1), (9, 1)]);
        snapshot(&opened, 1);
        write(&opened, &[(1, 2), (3, 2), (4, 2), (10, 2)]);
        snapshot(&opened, 2);
        write(&opened, &[(2, 3), (4, 3), (5, 3), (9, 0), (11, 0)]);
        let known = descriptor(&opened);
        let chain = known.chain_for(Guid::TOP).unwrap();
        let images = chain.iter().rev().map(|image| folder.path().join(image.file())).collect();
        let content = guest_content(&open_state(&opened, Guid::TOP, Access::ReadOnly).unwrap());
        Self { folder, images, content }
    }

    /// The same without descriptor.
    fn bare(mode: Mode) -> Self {
        let ground = Self::new(mode);
        std::fs::remove_file(ground.descriptor()).unwrap();
        ground
    }

    fn descriptor(&self) -> PathBuf {
        at(self.folder.path())
    }

    fn options(&self, images: &[usize]) -> MergeFilesOptions {
        MergeFilesOptions {
            images: images.iter().map(|&index| self.images[index].clone()).collect(),
            ..MergeFilesOptions::default()
        }
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|path| std::fs::read(path).unwrap()).collect()
    }

    /// What files show, base first.
    fn shown(&self, files: &[&Path], raw: bool) -> Vec<u8> {
        let source = |(number, path): (usize, &&Path)| {
            let (folder, name) = folder_and_name(path).unwrap();
            let storage = open_image(&LockedFolder::open(&folder).unwrap(), &name, Access::ReadOnly).unwrap();
            Source { name: path.to_path_buf(), storage, raw: raw && number == 0 }
        };
        let sources: Vec<Source> = files.iter().enumerate().map(source).collect();
        guest_content(&open(sources, Access::ReadOnly, raw.then_some(Sectors(64))).unwrap())
    }
}

fn kind_of(options: &MergeFilesOptions) -> ErrorKind {
    merge_files(options, &Silent).unwrap_err().kind()
}

#[test]
fn deltas_go_into_the_base_and_stay() {
    for raw in [false, true] {
        let ground = Ground::bare(if raw { Mode::Raw } else { Mode::Expanded });
        let before = ground.bytes();
        let options = MergeFilesOptions { raw_base: raw, ..ground.options(&[0, 1, 2]) };
        let report = merge_files(&options, &Silent).unwrap();
        assert_eq!(report.file, ground.images[2]);
        assert_eq!(report.merged, ground.images[..2]);
        assert!(ground.shown(&[&ground.images[2]], raw) == ground.content);
        assert!(ground.bytes()[..2] == before[..2], "deltas are only read");
        // Once more changes nothing that is seen.
        merge_files(&options, &Silent).unwrap();
        assert!(
            ground.shown(&[&ground.images[2], &ground.images[1], &ground.images[0]], raw) == ground.content
        );
        assert!(ground.shown(&[&ground.images[2]], raw) == ground.content);
    }
}

#[test]
fn only_the_upper_two_are_merged_and_zeros_go_on_hiding_what_is_below() {
    let ground = Ground::bare(Mode::Expanded);
    let base = ground.bytes()[2].clone();
    merge_files(&ground.options(&[0, 1]), &Silent).unwrap();
    assert!(ground.bytes()[2] == base);
    let shown = ground.shown(&[&ground.images[2], &ground.images[1]], false);
    assert!(shown == ground.content, "cluster 9 is zeros over data of the base");
}

#[test]
fn a_new_file_gets_all_and_nothing_else_changes() {
    for raw in [false, true] {
        // The descriptor may be there: nothing it names is written.
        let ground = Ground::new(if raw { Mode::Raw } else { Mode::Expanded });
        let before = ground.bytes();
        let new = ground.folder.path().join("new.hds");
        let options =
            MergeFilesOptions { raw_base: raw, new_file: Some(new.clone()), ..ground.options(&[0, 1, 2]) };
        let report = merge_files(&options, &Silent).unwrap();
        assert_eq!((&report.file, report.merged.len()), (&new, 3));
        assert!(ground.shown(&[&new], false) == ground.content);
        assert!(ground.bytes() == before);
        assert_eq!(kind_of(&options), ErrorKind::Parameter, "the file exists");
        let names = std::fs::read_dir(ground.folder.path()).unwrap();
        let names: Vec<_> = names.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| name.contains(".tmp.")), "{names:?}");
    }
}

#[test]
fn what_a_descriptor_knows_better_is_refused() {
    let ground = Ground::new(Mode::Expanded);
    let before = ground.bytes();
    let refuse = |options: &MergeFilesOptions, kind: ErrorKind, why: &str| {
        let error = merge_files(options, &Silent).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(why), "{error:?}");
        assert!(ground.bytes() == before);
    };
    refuse(&ground.options(&[0, 1]), ErrorKind::Parameter, "an image of its disk");
    let new = |images: &[usize]| MergeFilesOptions {
        new_file: Some(ground.folder.path().join("new.hds")),
        ..ground.options(images)
    };
    refuse(&new(&[1, 0]), ErrorKind::Parameter, "does not stand on");
    refuse(&new(&[0, 2]), ErrorKind::Parameter, "does not stand on");
    // A merge that was cut has half changed the image below.
    let opened = DirectoryFolder::open(ground.folder.path()).unwrap();
    let mut known = descriptor(&opened);
    known.begin_merge(guid(1), guid(2)).unwrap();
    known.store(&opened).unwrap();
    refuse(&new(&[1, 2]), ErrorKind::Busy, "was cut");
    // Who knows what a descriptor says that nobody can read?
    std::fs::write(ground.descriptor(), "<nonsense").unwrap();
    let error = merge_files(&ground.options(&[0, 1, 2]), &Silent).unwrap_err();
    assert!(error.advice().unwrap().contains("is not known"), "{error:?}");
    merge_files(&new(&[0, 1, 2]), &Silent).unwrap();
    assert!(ground.bytes() == before);
}

#[test]
fn wrong_files_are_refused_before_anything_changes() {
    let ground = Ground::bare(Mode::Expanded);
    let before = ground.bytes();
    for (options, kind) in [
        (ground.options(&[0]), ErrorKind::Parameter),
        (ground.options(&[]), ErrorKind::Parameter),
        (ground.options(&[0, 0]), ErrorKind::Parameter),
        (MergeFilesOptions { raw_base: true, ..ground.options(&[0, 0]) }, ErrorKind::Parameter),
    ] {
        assert_eq!(kind_of(&options), kind, "{options:?}");
    }
    let link = ground.folder.path().join("link");
    std::os::unix::fs::symlink(&ground.images[0], &link).unwrap();
    let mut options = ground.options(&[0]);
    options.images.push(link);
    assert!(merge_files(&options, &Silent).unwrap_err().to_string().contains("same file"));
    // Clusters of another size.
    let other = tempfile::tempdir().unwrap();
    let create = CreateOptions {
        cluster: Sectors(128),
        ..CreateOptions::new(other.path(), "other.hds", Sectors(64 * CLUSTERS))
    };
    crate::ops::create(&create).unwrap();
    let mut options = ground.options(&[0]);
    options.images.push(other.path().join("other.hds"));
    // Its own descriptor names it, so it would not be written either.
    std::fs::remove_file(at(other.path())).unwrap();
    assert!(merge_files(&options, &Silent).unwrap_err().to_string().contains("clusters of"));
    // A larger base would lose its end; it can go into a new file.
    let sized = |name: &str, clusters: u64| {
        let storage = LockedFolder::open(other.path()).unwrap().create_exclusive(name).unwrap();
        let geometry =
            format::Geometry::new(format::Version::V2, Sectors(64), Sectors(64 * clusters)).unwrap();
        create_image(&*storage, &format::CreateOptions { geometry, preallocated: false }).unwrap();
        other.path().join(name)
    };
    let larger = sized("larger.hds", CLUSTERS + 1);
    let mut options = ground.options(&[0]);
    options.images.push(larger.clone());
    let error = merge_files(&options, &Silent).unwrap_err();
    assert!(error.kind() == ErrorKind::Parameter && error.advice().unwrap().contains("-n"), "{error:?}");
    let new = other.path().join("new.hds");
    merge_files(&MergeFilesOptions { new_file: Some(new.clone()), ..options }, &Silent).unwrap();
    assert!(ground.shown(&[&new], false) == ground.shown(&[&larger, &ground.images[0]], false));
    // A smaller one grows.
    let smaller = sized("smaller.hds", CLUSTERS - 1);
    let expected = ground.shown(&[&smaller, &ground.images[0]], false);
    let mut options = ground.options(&[0]);
    options.images.push(smaller.clone());
    merge_files(&options, &Silent).unwrap();
    assert!(ground.shown(&[&smaller], false) == expected);
    assert!(ground.bytes() == before);
}

#[test]
fn what_somebody_has_open_or_clones_share_is_refused() {
    let ground = Ground::bare(Mode::Expanded);
    let before = ground.bytes();
    let folder = LockedFolder::open(ground.folder.path()).unwrap();
    let name = |index: usize| folder_and_name(&ground.images[index]).unwrap().1;
    // A writer of any, a reader of the base.
    for (index, access) in [(0, Access::ReadWrite), (1, Access::ReadWrite), (2, Access::ReadOnly)] {
        let held = folder.open(&name(index), access).unwrap();
        assert_eq!(kind_of(&ground.options(&[0, 1, 2])), ErrorKind::InUse, "{index}");
        drop(held);
    }
    let second = ground.folder.path().join("second-name");
    std::fs::hard_link(&ground.images[2], &second).unwrap();
    let error = merge_files(&ground.options(&[0, 1, 2]), &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.advice().unwrap().contains("-n"), "{error:?}");
    assert!(ground.bytes() == before);
    std::fs::remove_file(second).unwrap();
    // A raw base that is shorter than the disk grows.
    let raw = Ground::bare(Mode::Raw);
    let file = std::fs::OpenOptions::new().write(true).open(&raw.images[2]).unwrap();
    file.set_len(10 * 32768).unwrap();
    drop(file);
    let options = MergeFilesOptions { raw_base: true, ..raw.options(&[0, 1, 2]) };
    merge_files(&options, &Silent).unwrap();
    let storage = folder_and_name(&raw.images[2]).unwrap().1;
    let storage = LockedFolder::open(raw.folder.path()).unwrap().open(&storage, Access::ReadOnly).unwrap();
    let mut bytes = vec![0; raw.content.len()];
    storage.read_exact_at(0, &mut bytes).unwrap();
    assert!(bytes == raw.content);
}
