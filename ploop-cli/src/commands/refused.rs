//! Commands of the original that control its kernel driver, or that are not here: each is refused with what to use instead.

use std::ffi::OsString;

use ploop_core::{Error, ErrorKind};

use crate::exit::Outcome;

/// A command that is not here; what to use instead
///
/// The original's command of this name controls a kernel driver that is not used here, or a feature that is not here.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Whatever the original took
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<OsString>,
}

/// Which one was typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Low-level control of a device.
    Start,
    Stop,
    Clear,
    /// Device mapper targets of the 9.x kernel.
    TgInit,
    TgDeinit,
    TgStatus,
    Degrade,
    Shuffle,
    /// Not here.
    Encrypt,
    /// Of the 9.x line: a temporary snapshot and a look at its file system.
    Fscheck,
    /// Swaps an image under a running device.
    Replace,
}

impl Refused {
    /// Why, and what to do.
    fn words(self) -> (&'static str, &'static str) {
        const DRIVER: &str = "it controls a kernel driver that is not used here";
        const MAPPER: &str = "it controls a device mapper target of other kernels";
        match self {
            Self::Start => {
                (DRIVER, "`ploop mount` starts a disk, from its descriptor or from image files, base first")
            }
            Self::Stop => (DRIVER, "`ploop umount` stops a disk"),
            Self::Clear => (DRIVER, "`ploop umount` stops a disk, and leaves nothing to be cleared"),
            Self::TgInit | Self::TgDeinit | Self::TgStatus => (
                MAPPER,
                "`ploop copy` tracks what is written while it runs; `ploop diff` tells what differs between snapshots",
            ),
            Self::Degrade => (MAPPER, "`ploop umount` stops a disk"),
            Self::Shuffle => {
                ("it scatters the clusters of an image, for tests", "`ploop compact` puts them together")
            }
            Self::Encrypt => (
                "disks are not encrypted here",
                "make a LUKS container in the disk (cryptsetup), or put the images on encrypted storage",
            ),
            Self::Fscheck => (
                "the file system of a running disk is not checked here",
                "make a snapshot with `ploop snapshot`, show it with `ploop mount -r -u GUID`, and run the file system's \
                 own check on its device without writing (e2fsck -fn, xfs_repair -n); `ploop check` checks the image",
            ),
            Self::Replace => (
                "an image is not exchanged under a running disk",
                "unmount the disk, put the identical image in the place of the old one, and mount it again; a running disk \
                 goes to other storage with `ploop copy`",
            ),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Clear => "clear",
            Self::TgInit => "tg-init",
            Self::TgDeinit => "tg-deinit",
            Self::TgStatus => "tg-status",
            Self::Degrade => "degrade",
            Self::Shuffle => "shuffle",
            Self::Encrypt => "encrypt",
            Self::Fscheck => "fscheck",
            Self::Replace => "replace",
        }
    }
}

/// Refuses it; what was typed behind it does not matter.
pub(crate) fn run(which: Refused, _arguments: &Arguments) -> Outcome {
    let (why, instead) = which.words();
    Err(Error::new(ErrorKind::Parameter, format!("{}: {why}", which.name())).advise(instead).into())
}
