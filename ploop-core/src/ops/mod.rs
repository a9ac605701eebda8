//! Verbs over the layers: one file per command, each with its Options and its Report.
//!
//! Operations work on closed images and take the locks they need; they never print, exit or read the command line.
//! A Report is what was done or found, ready for people and for JSON.

pub mod agreement;
pub mod check;
pub mod clone;
pub mod compact;
pub mod convert;
pub mod create;
pub mod descriptor_lock;
pub mod diff;
pub mod dos_table;
pub mod export;
pub mod guest_bytes;
pub(crate) mod image_files;
pub mod import;
pub mod info;
pub mod live;
pub mod map;
#[cfg(test)]
mod matrix;
pub mod merge;
pub mod open;
mod placing;
mod plan;
pub mod progress;
pub mod repair;
pub mod resize;
pub mod restore_descriptor;
pub mod snapshot;
pub mod snapshot_delete;
pub mod snapshot_list;
pub mod snapshot_switch;
pub mod space;
#[cfg(test)]
mod testing;
mod transfer;

pub use check::{CheckOptions, CheckReport, check};
pub use clone::{CloneOptions, CloneReport, clone};
pub use compact::{CompactOptions, CompactReport, compact, compact_running};
pub use convert::{ConvertOptions, ConvertReport, convert};
pub use create::{CreateOptions, CreateReport, create};
pub use descriptor_lock::DescriptorLock;
pub use diff::{DiffOptions, DiffReport, diff};
pub use export::{ExportOptions, ExportReport, export};
pub use guest_bytes::GuestBytes;
pub use import::{ImportOptions, ImportReport, import};
pub use info::{InfoOptions, InfoReport, info};
pub use map::{MapExtent, MapHead, MapOptions, map};
pub use merge::{
    MergeCopy, MergeFilesOptions, MergeFilesReport, MergeOptions, MergeReport, merge, merge_files,
};
pub use open::{OpenOptions, OpenReport, Opened, Which, open};
pub use progress::{Progress, Silent};
pub use resize::{ResizeOptions, ResizeReport, Shrink, resize};
pub use restore_descriptor::{RestoreOptions, RestoreReport, restore_descriptor};
pub use snapshot::{SnapshotOptions, SnapshotReport, snapshot};
pub use snapshot_delete::{DeleteOptions, DeleteReport, delete};
pub use snapshot_list::{SnapshotEntry, SnapshotList, snapshot_list};
pub use snapshot_switch::{SwitchOptions, SwitchReport, switch};
pub use space::{Space, space_of_top};
