//! What a user says about a disk whose descriptor and images contradict each other, and what a command that only reads
//! such a disk says about it.

use ploop_core::format::agreement::{Accepted, Disagreement};
use ploop_core::{Error, Result};

use crate::output::Output;

/// Options of the commands that may write such a disk all the same.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct Accepting {
    /// The disk is to be used although its image ends before the disk of its descriptor. For after a look: what is missing
    /// is lost
    #[arg(long)]
    force_short: bool,

    /// The base really is raw, although it begins with the header of an image that fits the disk. If it is an image, the
    /// first write destroys it
    #[arg(long)]
    force_raw: bool,
}

impl From<Accepting> for Accepted {
    fn from(typed: Accepting) -> Self {
        Self { short: typed.force_short, raw: typed.force_raw }
    }
}

/// The end of a command that has read such a disk: what it read is not the whole disk, or not the disk, and no script must
/// take it for that.
pub(crate) fn refuse_success(found: &[Disagreement], done: &str, output: &Output) -> Result<()> {
    let Some((first, rest)) = found.split_first() else { return Ok(()) };
    rest.iter().for_each(|other| output.warn(&other.describe()));
    let failure = first.failure();
    let advice = failure.advice().unwrap_or_default().to_owned();
    Err(Error::new(failure.kind(), format!("{done}, but {}", first.describe())).advise(advice))
}
