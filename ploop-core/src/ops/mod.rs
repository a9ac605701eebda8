//! Verbs over the layers: one file per command, each with its Options and its Report.
//!
//! Operations work on closed images and take the locks they need; they never print, exit or read the command line.
//! A Report is what was done or found, ready for people and for JSON.

pub mod create;
pub mod descriptor_lock;
pub mod info;
pub mod open;

pub use create::{CreateOptions, CreateReport, create};
pub use descriptor_lock::DescriptorLock;
pub use info::{InfoOptions, InfoReport, info};
pub use open::{OpenOptions, OpenReport, Opened, Which, open};
