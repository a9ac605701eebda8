//! The frames that make a stream one of a whole tree of deltas: what each delta is, and that all of it was sent.
//!
//! Between them stand ordinary passes in the guest bytes of that delta. One that is frozen has a single pass and then
//! its [`EndDelta`]; the last delta is the current state, ended by the seal of the stream.
//!
//! Nothing here names a file: a delta has a number, the number of the one it stands on, and the 16 bytes of its state's
//! GUID. The receiver makes the names.

use std::collections::BTreeSet;

use super::payload::{Fields, expect_length, image_byte, image_kind};
use super::{DISK_BYTES_LIMIT, Digest, ImageKind, SECTOR_BYTES, WireError};

/// The most deltas of one stream: as many as a descriptor can have.
pub const DELTAS_LIMIT: u32 = 1024;
/// The most deltas that stand on each other.
pub const DEPTH_LIMIT: u32 = 128;
/// The latest time a delta may say it was last written, in seconds since 1970.
pub(super) const MODIFIED_SECONDS_LIMIT: u64 = 1 << 38;

/// Payload of `Delta`: the delta whose content follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Its number, from 0: each stands on one with a smaller number.
    pub index: u32,
    /// The number of the delta it stands on; only the first stands on none.
    pub parent: Option<u32>,
    /// The GUID of its state.
    pub guid: [u8; 16],
    /// Its place in the list of snapshots, from 0.
    pub place: u32,
    /// Its state goes as soon as nobody uses it.
    pub temporary: bool,
    /// Kind of image: only the first may be raw.
    pub image: ImageKind,
    /// Format version, 1 or 2.
    pub version: u8,
    /// Cluster size in sectors.
    pub cluster_sectors: u32,
    /// Size in bytes of the disk it shows.
    pub disk_bytes: u64,
    /// Bytes it holds, as far as the sender knows; 0 when it does not.
    pub data_bytes: u64,
    /// When it was last written, in seconds since 1970; 0 when that is not known.
    pub modified_seconds: u64,
}

impl Delta {
    /// Encoded length.
    pub const BYTES: usize = 72;
    const NO_PARENT: u32 = u32::MAX;
    const TEMPORARY: u16 = 1;

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(self.index.to_le_bytes());
        bytes.extend(self.parent.unwrap_or(Self::NO_PARENT).to_le_bytes());
        bytes.extend(self.guid);
        bytes.extend(self.place.to_le_bytes());
        bytes.extend(self.cluster_sectors.to_le_bytes());
        bytes.extend(self.disk_bytes.to_le_bytes());
        bytes.extend(self.data_bytes.to_le_bytes());
        bytes.extend(self.modified_seconds.to_le_bytes());
        bytes.extend([self.version, image_byte(self.image)]);
        bytes.extend((if self.temporary { Self::TEMPORARY } else { 0 }).to_le_bytes());
        bytes.resize(Self::BYTES, 0);
        bytes
    }

    /// The payload in those bytes, every field within its limits.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "delta")?;
        let mut fields = Fields(payload);
        let index = fields.u32();
        let parent = Some(fields.u32()).filter(|parent| *parent != Self::NO_PARENT);
        let guid = fields.array();
        let place = fields.u32();
        let cluster_sectors = fields.u32();
        let disk_bytes = fields.u64();
        let data_bytes = fields.u64();
        let modified_seconds = fields.u64();
        let version = fields.u8();
        let image = image_kind(fields.u8())?;
        let flags = fields.u16();
        if flags & !Self::TEMPORARY != 0 || fields.array::<12>() != [0; 12] {
            return Err(WireError::Reserved);
        }
        if index >= DELTAS_LIMIT || place >= DELTAS_LIMIT {
            return Err(WireError::Field("number of a delta"));
        }
        if parent.is_none() != (index == 0) || parent.is_some_and(|parent| parent >= index) {
            return Err(WireError::Field("parent of a delta"));
        }
        if guid == [0; 16] {
            return Err(WireError::Field("GUID of a delta"));
        }
        if image == ImageKind::Preallocated || image == ImageKind::Raw && index != 0 {
            return Err(WireError::Field("image kind of a delta"));
        }
        if disk_bytes == 0 || disk_bytes > DISK_BYTES_LIMIT || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(WireError::Field("disk size of a delta"));
        }
        if !(1..=2).contains(&version) || cluster_sectors == 0 || modified_seconds > MODIFIED_SECONDS_LIMIT {
            return Err(WireError::Field("geometry of a delta"));
        }
        Ok(Self {
            index,
            parent,
            guid,
            place,
            temporary: flags & Self::TEMPORARY != 0,
            image,
            version,
            cluster_sectors,
            disk_bytes,
            data_bytes,
            modified_seconds,
        })
    }
}

/// Payload of `EndDelta`: everything of a frozen delta that both sides can count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndDelta {
    /// Digest over the frames of this delta, from its `Delta` up to here.
    pub transcript: Digest,
    /// Its number.
    pub index: u32,
    /// Numbered frames since its `Delta`, which counts.
    pub frames: u64,
    /// Bytes in its `Data` frames.
    pub data_bytes: u64,
    /// Bytes covered by its `Zero` frames.
    pub zero_bytes: u64,
}

impl EndDelta {
    /// Encoded length.
    pub const BYTES: usize = 64;

    /// The payload as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.transcript.to_vec();
        bytes.extend(u64::from(self.index).to_le_bytes());
        for number in [self.frames, self.data_bytes, self.zero_bytes] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// The payload in those bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        expect_length(payload, Self::BYTES, "end of a delta")?;
        let mut fields = Fields(payload);
        Ok(Self {
            transcript: fields.array(),
            index: u32::try_from(fields.u64()).map_err(|_| WireError::Field("number of a delta"))?,
            frames: fields.u64(),
            data_bytes: fields.u64(),
            zero_bytes: fields.u64(),
        })
    }
}

/// What has been said of the deltas of a stream so far, and what of the present one was counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    /// Deltas announced; 0 in a stream of the content alone.
    deltas: u32,
    /// How many stand below each that was begun, itself counted.
    depths: Vec<u32>,
    guids: BTreeSet<[u8; 16]>,
    places: BTreeSet<u32>,
    /// Counts of the stream before the present delta.
    before: Counted,
}

/// Frames and bytes of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) frames: u64,
    pub(super) data_bytes: u64,
    pub(super) zero_bytes: u64,
}

impl Tree {
    pub(super) fn new(deltas: u32) -> Self {
        Self { deltas, ..Self::default() }
    }

    /// Whether the stream is one of deltas.
    pub(super) fn is_announced(&self) -> bool {
        self.deltas > 0
    }

    /// Whether the present delta is frozen: another one follows.
    pub(super) fn is_frozen(&self) -> bool {
        self.depths.len() < usize::try_from(self.deltas).unwrap_or(usize::MAX)
    }

    /// Bytes that belong to the deltas before the present one.
    pub(super) fn bytes_before(&self) -> u64 {
        self.before.data_bytes.saturating_add(self.before.zero_bytes)
    }

    /// Takes in a delta that begins; `counted` is the stream before its frame.
    pub(super) fn begin(
        &mut self,
        delta: &Delta,
        disk_bytes: u64,
        counted: Counted,
    ) -> Result<(), WireError> {
        if u32::try_from(self.depths.len()) != Ok(delta.index) || delta.place >= self.deltas {
            return Err(WireError::Field("number of a delta"));
        }
        let below = match delta.parent {
            None => 0,
            Some(parent) => {
                let depth = usize::try_from(parent).ok().and_then(|parent| self.depths.get(parent));
                *depth.ok_or(WireError::Field("parent of a delta"))?
            }
        };
        if below >= DEPTH_LIMIT {
            return Err(WireError::TooMany("deltas on each other"));
        }
        if !self.guids.insert(delta.guid) || !self.places.insert(delta.place) {
            return Err(WireError::Field("GUID or place of a delta"));
        }
        self.depths.push(below + 1);
        self.before = counted;
        if !self.is_frozen() && (delta.disk_bytes != disk_bytes || delta.temporary) {
            return Err(WireError::Field("the current state"));
        }
        Ok(())
    }

    /// Takes in the end of the present delta; `counted` is the stream before its frame.
    pub(super) fn end(&self, end: &EndDelta, counted: Counted) -> Result<(), WireError> {
        let index = u32::try_from(self.depths.len()).ok().and_then(|count| count.checked_sub(1));
        let found = Counted { frames: end.frames, data_bytes: end.data_bytes, zero_bytes: end.zero_bytes };
        let expected = Counted {
            frames: counted.frames.saturating_sub(self.before.frames),
            data_bytes: counted.data_bytes.saturating_sub(self.before.data_bytes),
            zero_bytes: counted.zero_bytes.saturating_sub(self.before.zero_bytes),
        };
        if Some(end.index) == index && found == expected {
            Ok(())
        } else {
            Err(WireError::Field("counts of a delta"))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn delta(index: u32, deltas: u32) -> Delta {
        Delta {
            index,
            parent: index.checked_sub(1),
            guid: [u8::try_from(index % 250).unwrap() + 1; 16],
            place: deltas - 1 - index,
            temporary: false,
            image: ImageKind::Expanded,
            version: 2,
            cluster_sectors: 2048,
            disk_bytes: 1 << 30,
            data_bytes: 9,
            modified_seconds: 1_700_000_000,
        }
    }

    #[test]
    fn payloads_survive_and_their_limits_hold() {
        let whole = Delta { temporary: true, ..delta(3, 9) };
        assert_eq!(Delta::decode(&whole.encode()).unwrap(), whole);
        let raw = Delta { image: ImageKind::Raw, ..delta(0, 9) };
        assert_eq!(Delta::decode(&raw.encode()).unwrap(), raw);
        for change in [
            |delta: &mut Delta| delta.index = DELTAS_LIMIT,
            |delta: &mut Delta| delta.place = DELTAS_LIMIT,
            |delta: &mut Delta| delta.parent = None,
            |delta: &mut Delta| delta.parent = Some(3),
            |delta: &mut Delta| delta.guid = [0; 16],
            |delta: &mut Delta| delta.image = ImageKind::Raw,
            |delta: &mut Delta| delta.image = ImageKind::Preallocated,
            |delta: &mut Delta| delta.disk_bytes = 513,
            |delta: &mut Delta| delta.disk_bytes = DISK_BYTES_LIMIT + 512,
            |delta: &mut Delta| delta.version = 3,
            |delta: &mut Delta| delta.cluster_sectors = 0,
            |delta: &mut Delta| delta.modified_seconds = u64::MAX,
        ] {
            let mut changed = delta(3, 9);
            change(&mut changed);
            assert!(matches!(Delta::decode(&changed.encode()), Err(WireError::Field(_))), "{changed:?}");
        }
        let end = EndDelta { transcript: [3; 32], index: 4, frames: 5, data_bytes: 6, zero_bytes: 7 };
        assert_eq!(EndDelta::decode(&end.encode()).unwrap(), end);
    }

    #[test]
    fn a_tree_takes_each_delta_once_and_no_deeper_than_a_chain_can_be() {
        let none = Counted::default();
        let deltas = DEPTH_LIMIT + 2;
        let mut tree = Tree::new(deltas);
        for index in 0..DEPTH_LIMIT {
            let mut one = delta(index, deltas);
            one.guid[..4].copy_from_slice(&index.to_be_bytes());
            let twice = Delta { index: index + 1, parent: Some(index), ..one.clone() };
            assert!(tree.clone().begin(&twice, 1 << 30, none).is_err(), "a gap");
            tree.begin(&one, 1 << 30, none).unwrap();
            assert!(tree.clone().begin(&twice, 1 << 30, none).is_err(), "the GUID occurs twice");
        }
        let mut deeper = delta(DEPTH_LIMIT, deltas);
        deeper.guid = [255; 16];
        assert_eq!(
            tree.clone().begin(&deeper, 1 << 30, none),
            Err(WireError::TooMany("deltas on each other"))
        );
        tree.begin(&Delta { parent: Some(0), ..deeper.clone() }, 1 << 30, none).unwrap();
        assert!(tree.is_frozen());
        let top =
            Delta { index: DEPTH_LIMIT + 1, parent: Some(0), place: 0, guid: [254; 16], ..delta(1, deltas) };
        assert!(tree.clone().begin(&top, 1 << 29, none).is_err(), "another size than announced");
        assert!(
            tree.clone().begin(&Delta { temporary: true, ..top.clone() }, 1 << 30, none).is_err(),
            "a temporary current state"
        );
        tree.begin(&top, 1 << 30, none).unwrap();
        assert!(!tree.is_frozen());
    }

    #[test]
    fn the_end_of_a_delta_counts_only_what_is_its_own() {
        let mut tree = Tree::new(2);
        let before = Counted { frames: 1, data_bytes: 100, zero_bytes: 10 };
        tree.begin(&delta(0, 2), 1 << 30, before).unwrap();
        let counted = Counted { frames: 5, data_bytes: 612, zero_bytes: 10 };
        let end = EndDelta { transcript: [0; 32], index: 0, frames: 4, data_bytes: 512, zero_bytes: 0 };
        tree.end(&end, counted).unwrap();
        assert!(tree.end(&EndDelta { index: 1, ..end }, counted).is_err());
        assert!(tree.end(&EndDelta { frames: 5, ..end }, counted).is_err());
        assert!(tree.end(&EndDelta { data_bytes: 612, ..end }, counted).is_err());
    }
}
