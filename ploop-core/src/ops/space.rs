//! How an image uses its file: figures for `check` and `info`, from a table on disk or from a running disk.
//!
//! *Free clusters* are whole clusters between the start of the data and the end of the file that nothing uses: no entry, no extension, no bitmap; new
//! data go there first. *Fragmentation* compares neighbours: of all pairs of clusters that follow each other on the
//! guest's disk and lie in this image, it is the share whose second does not follow the first in the file.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::survey::{Neighbours, Survey};
use crate::format::{Chain, Geometry};

/// The figures of one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Clusters it holds.
    pub allocated_clusters: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// What the file takes on the host, in bytes.
    pub host_bytes: u64,
    /// Whole clusters inside the file that nothing uses.
    pub free_clusters: u64,
    /// Pairs of neighbouring guest clusters in this image.
    pub neighbours: u64,
    /// Those among them that do not follow each other in the file.
    pub breaks: u64,
}

impl Space {
    /// Breaks among 1000 neighbours; 0 when there are none.
    pub fn fragmentation_per_mille(&self) -> u64 {
        self.breaks.saturating_mul(1000).checked_div(self.neighbours).unwrap_or(0)
    }
}

/// The figures of an image whose table was looked at, and whose extension and bitmaps take `extension_clusters`.
pub(crate) fn space_of(
    survey: &Survey,
    extension_clusters: u64,
    geometry: &Geometry,
    (file_bytes, host_bytes): (u64, u64),
) -> Space {
    let taken = survey.used.count() + survey.skewed.count() + extension_clusters;
    figures(geometry, (survey.allocated, taken), survey.neighbours, (file_bytes, host_bytes))
}

fn figures(
    geometry: &Geometry,
    (allocated_clusters, taken): (u64, u64),
    neighbours: Neighbours,
    (file_bytes, host_bytes): (u64, u64),
) -> Space {
    let places = geometry.clusters_in(file_bytes).saturating_sub(geometry.first_data_cluster().0);
    Space {
        allocated_clusters,
        file_bytes,
        host_bytes,
        free_clusters: u64::from(places).saturating_sub(taken),
        neighbours: neighbours.pairs,
        breaks: neighbours.breaks,
    }
}

/// The figures of the top of an open chain, as its table in memory has them.
pub fn space_of_top(chain: &Chain) -> Result<Space> {
    let top = chain.top();
    let storage = chain.storage(top);
    let sizes = || Ok((storage.len()?, storage.allocated_bytes()?));
    let (file_bytes, host_bytes) = sizes()
        .map_err(|cause| Error::io(ErrorKind::Stat, "measure the image", cause).at_path(chain.name(top)))?;
    let geometry = chain.geometry();
    if geometry.is_raw() {
        let allocated_clusters = chain.allocated_clusters();
        return Ok(Space { allocated_clusters, file_bytes, host_bytes, ..Space::default() });
    }
    let (mut neighbours, mut allocated) = (Neighbours::default(), 0);
    chain.for_each_place(|cluster, place| {
        neighbours.add(cluster, place);
        allocated += 1;
    });
    Ok(figures(geometry, (allocated, allocated), neighbours, (file_bytes, host_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{FileCluster, GuestCluster};

    #[test]
    fn neighbours_and_breaks_are_counted() {
        let mut neighbours = Neighbours::default();
        for (cluster, place) in [(0, 1), (1, 2), (2, 9), (5, 10), (6, 11), (7, 3)] {
            neighbours.add(GuestCluster(cluster), FileCluster(place));
        }
        assert_eq!((neighbours.pairs, neighbours.breaks), (4, 2));
        let space = Space { neighbours: 4, breaks: 2, ..Space::default() };
        assert_eq!(space.fragmentation_per_mille(), 500);
        assert_eq!(Space::default().fragmentation_per_mille(), 0);
    }
}
