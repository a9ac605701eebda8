//! Disks in one image file: the ploop image format, the device that serves it, and its write tracker.
//!
//! ```text
//!   guest file system / VM / NBD client                  operator: ploop, pcopy
//!        │                                                    │
//!  ┌─────▼────────────────────────────────┐    control        │
//!  │ device   Disk · queue · gate         │◄──────────────────┤
//!  └──┬───────────────┬───────────────────┘                   │
//!     │ map, prepare  │ mark                                  │ ops: verbs on closed
//!  ┌──▼────────────┐ ┌▼──────────┐                            │ images or on a Disk
//!  │ format        │ │ tracker   │                            │
//!  └──┬────────────┘ └───────────┘                            │
//!  ┌──▼───────────────────────────────────┐                   │
//!  │ io       Storage · IoQueue · IoBuf   │◄──────────────────┘
//!  └──────────────────────────────────────┘
//! ```
//!
//! Each layer knows only the one below it; `tests/tidy.rs` checks that. The library never prints, exits or parses
//! arguments; the commands do.

pub mod device;
pub mod error;
pub mod extent;
pub mod format;
pub mod io;
pub mod mutant;
pub mod ops;
mod sync;
pub mod tracker;
pub mod units;

pub use error::{Context, Error, ErrorKind, Result};
pub use extent::{Extent, ExtentSet};
