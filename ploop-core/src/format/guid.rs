//! Names of images and snapshots in a descriptor.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};

/// `{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}` in hexadecimal digits, equal whatever their case, printed in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid(Uuid);

impl Guid {
    /// The current writable image.
    pub const TOP: Self = Self(Uuid::from_u128(0x5fba_abe3_6958_40ff_92a7_860e_329a_ab41));
    /// The parent of a base: none.
    pub const NONE: Self = Self(Uuid::nil());

    /// A name nobody else has.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The name with those 16 bytes, in the order of its digits.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// Its 16 bytes, in the order of its digits.
    pub fn bytes(self) -> [u8; 16] {
        *self.0.as_bytes()
    }
}

impl FromStr for Guid {
    type Err = Error;

    /// Reads exactly the braced form; a bare UUID is refused, as the original does.
    fn from_str(text: &str) -> Result<Self> {
        let braced = text.len() == 38 && text.starts_with('{') && text.ends_with('}');
        braced.then(|| Uuid::try_parse(text).ok()).flatten().map(Self).ok_or_else(|| {
            let shown: String = text.chars().take(60).collect();
            Error::new(
                ErrorKind::Parameter,
                format!("{shown:?} is not of the form {{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}}"),
            )
        })
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{{{}}}", self.0.hyphenated())
    }
}

impl serde::Serialize for Guid {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Guid {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_does_not_matter() {
        let upper: Guid = "{5FBAABE3-6958-40FF-92A7-860E329AAB41}".parse().unwrap();
        assert_eq!(upper, Guid::TOP);
        assert_eq!(upper.to_string(), "{5fbaabe3-6958-40ff-92a7-860e329aab41}");
        assert_eq!("{00000000-0000-0000-0000-000000000000}".parse::<Guid>().unwrap(), Guid::NONE);
        assert_ne!(Guid::random(), Guid::random());
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "5fbaabe3-6958-40ff-92a7-860e329aab41",
            "{5fbaabe3695840ff92a7860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4g}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4é}",
            " {5fbaabe3-6958-40ff-92a7-860e329aab4}",
            "{5fbaabe3-695840ff--92a7-860e329aab41}",
        ] {
            assert!(text.parse::<Guid>().is_err(), "{text:?}");
        }
    }
}
