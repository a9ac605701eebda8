//! Changes of the table that an earlier owner of the image made in memory only.
//!
//! When a server dies, its successor opens the image as the dead one left it (`accept_in_use`: nothing is cut off,
//! nothing is cleared) and enters what was acknowledged and is not yet in the table on disk. The changes come from
//! memory of this machine, and are believed no more than the image itself: each must point to a whole cluster of the
//! file that nobody else owns, or nothing is entered at all.

use std::collections::BTreeMap;

use super::chain::Chain;
use super::delta::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileCluster, GuestCluster};

impl Chain {
    /// Enters changes, oldest first: where a guest cluster is now, or `None` when it was cleared. Later ones for the same
    /// cluster hold. What the table on disk says already changes nothing. The changes are pending afterwards, like those
    /// of requests. Called before the first request, on a chain that is open for writing.
    ///
    /// Fails with [`ErrorKind::Corrupt`], with nothing entered, when a change does not fit the image.
    pub fn adopt(
        &self,
        changes: impl IntoIterator<Item = (GuestCluster, Option<FileCluster>)>,
    ) -> Result<()> {
        let top = self.top_delta();
        let last: BTreeMap<GuestCluster, Option<FileCluster>> = changes.into_iter().collect();
        if last.is_empty() {
            return Ok(());
        }
        let failed = |error: Error| error.at_path(&top.name);
        let Some(Image { bat, allocator: Some(allocator), .. }) = &top.image else {
            return Err(failed(Error::new(
                ErrorKind::Corrupt,
                "enter pending changes: the image has no table that is open for writing",
            )));
        };
        let geometry = self.geometry();
        let mut differing = Vec::new();
        for (&cluster, &place) in &last {
            let refuse = |why: &str| {
                failed(Error::new(ErrorKind::Corrupt, format!("enter a pending change: {why}")))
                    .at_cluster(u64::from(cluster.0))
            };
            if cluster.0 >= geometry.entries() {
                return Err(refuse("the disk has no such cluster"));
            }
            let now = geometry.entry_to_cluster(bat.table().entry(cluster)).map_err(failed)?;
            if now == place {
                continue;
            }
            let entry = match place {
                None => None,
                Some(place) => {
                    let raw = geometry
                        .cluster_to_entry(place)
                        .map_err(|_| refuse("the table cannot point there"))?;
                    Some((place, raw))
                }
            };
            differing.push((cluster, entry));
        }
        let places: Vec<FileCluster> =
            differing.iter().filter_map(|(_, entry)| entry.map(|(place, _)| place)).collect();
        allocator.adopt(&places).map_err(failed)?;
        for (cluster, entry) in differing {
            // What was there before is quarantined until the change is durable.
            bat.clear(cluster).map_err(failed)?;
            if let Some((_, raw)) = entry {
                bat.publish(cluster, raw);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::format::{ChainOptions, CreateOptions, Geometry, Source, Version, WriteTarget, create_image};
    use crate::io::file::{FileStorage, OpenOptions};
    use crate::io::{Access, Storage, StorageExt};
    use crate::units::{GuestOffset, Sectors};

    fn open(path: &PathBuf, accept_in_use: bool) -> Arc<Chain> {
        let storage: Arc<dyn Storage> =
            Arc::new(FileStorage::open(path, &OpenOptions::new(Access::ReadWrite)).unwrap());
        let source = Source { name: path.clone(), storage, raw: false };
        let options = ChainOptions { access: Access::ReadWrite, raw_cluster: None, accept_in_use };
        Chain::open(vec![source], &options).unwrap()
    }

    /// A new image of 64 clusters of 64 KiB.
    fn image(folder: &tempfile::TempDir) -> PathBuf {
        let path = folder.path().join("disk.hds");
        let storage = FileStorage::create_exclusive(&path, crate::io::file::Caching::Cached).unwrap();
        let geometry = Geometry::new(Version::V2, Sectors(128), Sectors(64 * 128)).unwrap();
        create_image(&storage, &CreateOptions { geometry, preallocated: false }).unwrap();
        path
    }

    /// Writes a cluster and publishes it, as a server does before it answers.
    fn write(chain: &Arc<Chain>, cluster: u32, byte: u8) -> FileCluster {
        let cluster = GuestCluster(cluster);
        let WriteTarget::Fresh(prepared) = chain.prepare_write(cluster).unwrap() else { panic!("allocated") };
        let place = prepared.place();
        chain.storage(0).write_all_at(prepared.offset().0, &vec![byte; 65536]).unwrap();
        prepared.publish();
        place
    }

    fn read(chain: &Chain, cluster: u32) -> Option<u8> {
        match chain.map(GuestOffset(u64::from(cluster) * 65536), 1) {
            crate::format::Mapping::Data { offset, .. } => {
                let mut byte = [0];
                chain.storage(0).read_exact_at(offset.0, &mut byte).unwrap();
                Some(byte[0])
            }
            crate::format::Mapping::Zero { .. } => None,
        }
    }

    fn commit(chain: &Chain) {
        let plan = chain.seal();
        chain.storage(0).sync_data().unwrap();
        for (offset, bytes) in &plan.writes {
            chain.storage(0).write_all_at(offset.0, bytes).unwrap();
        }
        chain.storage(0).sync_data().unwrap();
        for cluster in chain.committed(plan) {
            chain.release(cluster, false);
        }
    }

    #[test]
    fn a_successor_sees_what_its_predecessor_had_only_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let dead = open(&path, false);
        let (one, two) = (write(&dead, 1, 1), write(&dead, 2, 2));
        commit(&dead);
        // All in memory: one is cleared, two moves to another place, three is new.
        dead.clear(GuestCluster(1)).unwrap();
        dead.clear(GuestCluster(2)).unwrap();
        let moved = write(&dead, 2, 22);
        let three = write(&dead, 3, 3);
        drop(dead);

        let chain = open(&path, true);
        assert_eq!((read(&chain, 1), read(&chain, 2), read(&chain, 3)), (Some(1), Some(2), None));
        let changes =
            [(1, Some(one)), (2, Some(two)), (1, None), (2, None), (2, Some(moved)), (3, Some(three))];
        chain.adopt(changes.map(|(cluster, place)| (GuestCluster(cluster), place))).unwrap();
        assert_eq!((read(&chain, 1), read(&chain, 2), read(&chain, 3)), (None, Some(22), Some(3)));
        // None of the places, old or new, is handed out before the changes are durable.
        for cluster in 10..20 {
            let place = write(&chain, cluster, 9);
            assert!(![one, two, moved, three].contains(&place), "{place} was handed out");
        }
        commit(&chain);
        chain.close().unwrap();
        drop(chain);
        let chain = open(&path, false);
        assert!(!chain.repairs().was_in_use);
        assert_eq!((read(&chain, 1), read(&chain, 2), read(&chain, 3)), (None, Some(22), Some(3)));
    }

    #[test]
    fn changes_that_do_not_fit_are_refused_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let dead = open(&path, false);
        let one = write(&dead, 1, 1);
        commit(&dead);
        let two = write(&dead, 2, 2);
        drop(dead);
        let chain = open(&path, true);
        let good = (GuestCluster(2), Some(two));
        for wrong in [
            (GuestCluster(3), Some(one)),
            (GuestCluster(3), Some(two)),
            (GuestCluster(3), Some(FileCluster(0))),
            (GuestCluster(3), Some(FileCluster(1 << 20))),
            (GuestCluster(64), None),
        ] {
            let error = chain.adopt([good, wrong]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert_eq!(chain.pending(), 0);
        }
        chain.adopt([good]).unwrap();
        assert_eq!(read(&chain, 2), Some(2));
    }
}
