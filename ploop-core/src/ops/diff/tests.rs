//! Differences against the bytes themselves.

use super::*;
use crate::format::Mode;
use crate::ops::testing::{CLUSTER, guid, open_state, read, three};

#[test]
fn all_that_differs_is_told_and_little_else() {
    for mode in [Mode::Expanded, Mode::Raw] {
        let disk = three(mode);
        let folder = disk.folder();
        let states = [guid(1), guid(2), Guid::TOP];
        for from in states {
            for to in states {
                let chain = |state| open_state(&folder, state, Access::ReadOnly).unwrap();
                let extents = differences(&chain(from), &chain(to));
                let told = |cluster: usize| {
                    let at = (cluster * CLUSTER) as u64;
                    extents.iter().any(|extent| extent.start <= at && at < extent.start + extent.length)
                };
                let (old, new) = (read(&folder, from), read(&folder, to));
                for (cluster, (old, new)) in old.iter().zip(&new).enumerate() {
                    assert!(told(cluster) || old == new, "{from} {to}: cluster {cluster}");
                    assert!(!told(cluster) || from != to);
                }
                let ordered = extents.windows(2).all(|pair| pair[0].start + pair[0].length <= pair[1].start);
                assert!(ordered && extents.iter().all(|extent| extent.length > 0));
            }
        }
        let top = differences(
            &open_state(&folder, guid(2), Access::ReadOnly).unwrap(),
            &open_state(&folder, Guid::TOP, Access::ReadOnly).unwrap(),
        );
        let clusters: u64 = top.iter().map(|extent| extent.length / CLUSTER as u64).sum();
        assert_eq!(clusters, 5, "what the top holds: {top:?}");
        assert!(top.iter().all(|extent| extent.present && !extent.zero && !extent.beyond_from));
    }
}
