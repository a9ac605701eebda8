//! Typed addresses: no bare integer that is an address crosses a function of the format layer.
//!
//! Guest addresses say where something is on the disk that the guest sees, file addresses where it is in one
//! image file. The two meet only in a block allocation table. Conversions that need the cluster size are
//! methods of [`Geometry`](crate::format::Geometry), which has checked every product beforehand.

use std::fmt;

/// Bytes in a sector, the unit of every size in an image header (image format, section 1).
pub const SECTOR_BYTES: u64 = 512;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!($unit, " {}"), self.0)
            }
        }
    };
}

address!(
    /// A byte offset on the guest's disk.
    GuestOffset, u64, "guest byte"
);
address!(
    /// The number of a cluster of the guest's disk: an index into a block allocation table.
    GuestCluster, u32, "guest cluster"
);
address!(
    /// A byte offset in one image file.
    FileOffset, u64, "file byte"
);
address!(
    /// The number of a cluster slot in one image file, counted from the start of the file.
    FileCluster, u32, "file cluster"
);
address!(
    /// A count of 512-byte sectors.
    Sectors, u64, "sectors"
);

impl Sectors {
    /// The same amount in bytes, or `None` when that does not fit 64 bits.
    pub fn checked_bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_BYTES)
    }

    /// Sectors that hold `bytes`, rounded up.
    pub fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(SECTOR_BYTES))
    }
}

impl GuestOffset {
    /// This offset moved up by `bytes`; `None` past the end of 64 bits.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl FileOffset {
    /// This offset moved up by `bytes`; `None` past the end of 64 bits.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_round_up_and_do_not_overflow() {
        assert_eq!(Sectors::covering(0), Sectors(0));
        assert_eq!(Sectors::covering(1), Sectors(1));
        assert_eq!(Sectors::covering(513), Sectors(2));
        assert_eq!(Sectors(u64::MAX).checked_bytes(), None);
        assert_eq!(Sectors(2048).checked_bytes(), Some(1 << 20));
    }

    #[test]
    fn addresses_name_their_unit() {
        assert_eq!(GuestCluster(7).to_string(), "guest cluster 7");
        assert_eq!(FileOffset(512).to_string(), "file byte 512");
    }
}
