//! What was typed: the global options, the list of commands, and numbers with units.
//!
//! Options are spelled as in the original command. `-v` before the command raises verbosity and may carry a number
//! (`-v4`, `-v-1`); after `init`, `convert` and `copy` it is the image format version, as it always was.

use std::ffi::{OsStr, OsString};

use clap::error::ErrorKind as ClapErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands;

/// Verbosity without any option: results and warnings.
pub(crate) const VERBOSITY_DEFAULT: i32 = 3;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "ploop",
    version,
    about = "Disks in one image file: make them, serve them, move them while they run",
    max_term_width = 110,
    disable_help_subcommand = true,
    after_help = "Sizes: a number without a suffix counts sectors of 512 bytes; K, M, G and T (or KiB, MiB, GiB, TiB) \
                  count 1024, 1024^2 ... bytes, kB, MB, GB and TB 1000, 1000^2 ... bytes, B bytes; either case. 0x and 0 \
                  prefixes are read as hexadecimal and octal. No fractions.\n\n\
                  Exit codes are those of the original command; 38 is a wrong command line. `ploop man DIR` writes the \
                  manual pages."
)]
pub(crate) struct CommandLine {
    /// Say more; may be repeated. A number sets the level: -v-1 errors only, -v-2 nothing, -v4 time stamps
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    verbose: u8,

    /// The level set by the last `-vN`.
    #[arg(long, hide = true, allow_negative_numbers = true)]
    verbosity: Option<i32>,

    /// Print results as JSON on stdout, and errors as one JSON line on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl CommandLine {
    /// How much to say: -2 nothing, -1 errors only, 3 the usual, 4 with time stamps.
    pub(crate) fn verbosity(&self) -> i32 {
        self.verbosity.unwrap_or(VERBOSITY_DEFAULT).saturating_add(i32::from(self.verbose))
    }
}

/// The subcommands; the arguments of each stand in its file.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Init(commands::init::Arguments),
    Mount(commands::mount::Arguments),
    Umount(commands::umount::Arguments),
    Copy(commands::copy::Arguments),
    Resize(commands::resize::Arguments),
    Grow(commands::grow::Arguments),
    Convert(commands::convert::Arguments),
    Export(commands::export::Arguments),
    Import(commands::import::Arguments),
    RestoreDescriptor(commands::restore_descriptor::Arguments),
    Compact(commands::compact::Arguments),
    Balloon(commands::balloon::Arguments),
    Map(commands::map::Arguments),
    Info(commands::info::Arguments),
    List(commands::list::Arguments),
    Stat(commands::stat::Arguments),
    Check(commands::check::Arguments),
    #[command(hide = true)]
    Fsck(commands::check::Arguments),
    Snapshot(commands::snapshot::Arguments),
    Tsnapshot(commands::tsnapshot::Arguments),
    SnapshotList(commands::snapshot_list::Arguments),
    SnapshotDelete(commands::snapshot_delete::Arguments),
    SnapshotMerge(commands::snapshot_merge::Arguments),
    SnapshotSwitch(commands::snapshot_switch::Arguments),
    Thaw(commands::thaw::Arguments),
    Merge(commands::merge::Arguments),
    Clone(commands::clone::Arguments),
    Diff(commands::diff::Arguments),
    #[command(hide = true, alias = "rm")]
    Delete(commands::delete::Arguments),
    #[command(hide = true)]
    Start(commands::refused::Arguments),
    #[command(hide = true)]
    Stop(commands::refused::Arguments),
    #[command(hide = true)]
    Clear(commands::refused::Arguments),
    #[command(hide = true)]
    TgInit(commands::refused::Arguments),
    #[command(hide = true)]
    TgDeinit(commands::refused::Arguments),
    #[command(hide = true)]
    TgStatus(commands::refused::Arguments),
    #[command(hide = true)]
    Degrade(commands::refused::Arguments),
    #[command(hide = true)]
    Shuffle(commands::refused::Arguments),
    #[command(hide = true)]
    Encrypt(commands::refused::Arguments),
    #[command(hide = true)]
    Fscheck(commands::refused::Arguments),
    #[command(hide = true)]
    Replace(commands::refused::Arguments),
    Man(commands::man::Arguments),
    Completions(commands::completions::Arguments),
    #[command(hide = true)]
    Serve(commands::serve::Arguments),
    #[command(hide = true)]
    Keeper(commands::keeper::Arguments),
    #[command(hide = true)]
    FreezeHelper(commands::freeze_helper::Arguments),
}

/// What a command line asks for.
pub(crate) enum Parsed {
    /// Run this.
    Run(Box<CommandLine>),
    /// Help or version was asked for: print on stdout.
    Help(String),
    /// The command line is wrong or empty: print on stderr, exit 38.
    Usage(String),
}

/// The definition of the command, for parsing, manual pages and completions.
pub(crate) fn definition() -> clap::Command {
    CommandLine::command()
}

/// Reads the command line.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Parsed {
    let arguments = number_verbosity(arguments.into_iter().collect());
    if arguments.len() < 2 {
        return Parsed::Usage(definition().render_help().to_string());
    }
    let matches = match definition().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => {
            let text = error.render().to_string();
            return match error.kind() {
                ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion => Parsed::Help(text),
                _ => Parsed::Usage(text),
            };
        }
    };
    match CommandLine::from_arg_matches(&matches) {
        Ok(command_line) => Parsed::Run(Box::new(command_line)),
        Err(error) => Parsed::Usage(error.render().to_string()),
    }
}

/// Rewrites `-vN` before the command to `--verbosity=N`: an option with an optional attached number.
fn number_verbosity(mut arguments: Vec<OsString>) -> Vec<OsString> {
    for argument in arguments.iter_mut().skip(1) {
        let Some(text) = argument.to_str() else { break };
        if !text.starts_with('-') {
            break;
        }
        if let Some(level) = text.strip_prefix("-v").and_then(|number| number.parse::<i32>().ok()) {
            *argument = OsString::from(format!("--verbosity={level}"));
        }
    }
    // The last level wins, as it did in the original.
    let is_level = |argument: &OsStr| argument.to_str().is_some_and(|text| text.starts_with("--verbosity="));
    if let Some(last) = arguments.iter().rposition(|argument| is_level(argument)) {
        let mut index = 0;
        arguments.retain(|argument| {
            let keep = !is_level(argument) || index == last;
            index += 1;
            keep
        });
    }
    arguments
}

/// A size as typed: sectors without a suffix, bytes times a power of 1024 with one of K, M, G, T or KiB ... TiB, of 1000 with
/// kB (or KB) ... TB, and bytes with B.
///
/// The answer counts 512-byte sectors, rounded up. Fractions, signs and other suffixes are refused.
pub(crate) fn size(text: &str) -> Result<ploop_core::units::Sectors, String> {
    // No digit of a hexadecimal number is taken for a unit of bytes.
    let is_hexadecimal = text.starts_with("0x") || text.starts_with("0X");
    let (rest, base) = match text.strip_suffix('B').or_else(|| text.strip_suffix('b')) {
        Some(rest) if !is_hexadecimal => match rest.strip_suffix('i') {
            Some(rest) => (rest, Some(1024_u64)),
            None => (rest, Some(1000)),
        },
        _ => (text, None),
    };
    let power =
        |letter: char| "KMGT".find(letter.to_ascii_uppercase()).and_then(|at| u32::try_from(at + 1).ok());
    let last = rest.chars().next_back();
    let (digits, unit_bytes) = match (last.and_then(power), base) {
        (Some(power), base) => (&rest[..rest.len() - 1], base.unwrap_or(1024).pow(power)),
        (None, Some(1000)) => (rest, 1),
        (None, Some(_)) => (text, 1),
        (None, None) => (rest, ploop_core::units::SECTOR_BYTES),
    };
    let number = integer(digits).map_err(|error| {
        format!(
            "{error}: sectors of 512 bytes, or with a unit: K, M, G, T (or KiB ... TiB), kB, MB, GB, TB, B"
        )
    })?;
    number
        .checked_mul(unit_bytes)
        .map(ploop_core::units::Sectors::covering)
        .ok_or_else(|| "the size does not fit 64 bits".to_owned())
}

/// A cluster size as typed, which is a [`size`]; in sectors.
pub(crate) fn sectors(text: &str) -> Result<u64, String> {
    size(text).map(|sectors| sectors.0)
}

/// A whole number: decimal, `0x` hexadecimal, or octal with a leading `0`.
pub(crate) fn integer(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    // `from_str_radix` would take a sign.
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err("expected a whole number".to_owned());
    }
    u64::from_str_radix(digits, radix).map_err(|_| "the number does not fit 64 bits".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(text: &str) -> u64 {
        super::sectors(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn sizes_are_sectors_unless_a_suffix_says_otherwise() {
        assert_eq!(counted("2048"), 2048);
        assert_eq!(counted("1k"), 2);
        assert_eq!(counted("1M"), 2048);
        assert_eq!(counted("10G"), 10 << 21);
        assert_eq!(counted("16t"), 16 << 31);
        assert_eq!(counted("0x10"), 16);
        assert_eq!(counted("0x10M"), 16 << 11);
        assert_eq!(counted("010"), 8);
        assert_eq!(counted("0"), 0);
    }

    #[test]
    fn units_of_1000_and_1024_are_told_apart() {
        assert_eq!(counted("10GiB"), counted("10G"));
        assert_eq!(counted("1kib"), 2);
        assert_eq!(counted("16TiB"), 16 << 31);
        // A disk in a shop: 10^10 bytes.
        assert_eq!(counted("10GB"), 10_000_000_000 / 512);
        assert_eq!(counted("1MB"), 1954);
        assert_eq!(counted("512kB"), 1000);
        assert_eq!(counted("1024B"), 2);
        assert_eq!(counted("513B"), 2);
        // A digit, not a unit.
        assert_eq!(counted("0x1B"), 27);
        assert_eq!(counted("0x1bK"), 54);
    }

    #[test]
    fn other_sizes_are_refused() {
        for wrong in [
            "",
            "G",
            "1.5G",
            "1,5",
            "-1",
            "+1",
            "1Gi",
            "1iB",
            "1GBB",
            "1KMB",
            "GiB",
            "B",
            "1 GB",
            " 1",
            "0x",
            "09",
            "1e3",
            "20000000T",
            "٣",
            "1µ",
        ] {
            assert!(size(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
    }

    fn verbosity_of(line: &[&str]) -> i32 {
        let arguments = std::iter::once("ploop").chain(line.iter().copied()).map(OsString::from);
        match parse(arguments) {
            Parsed::Run(command_line) => command_line.verbosity(),
            Parsed::Help(text) | Parsed::Usage(text) => panic!("{text}"),
        }
    }

    #[test]
    fn verbosity_counts_or_is_set() {
        assert_eq!(verbosity_of(&["list"]), 3);
        assert_eq!(verbosity_of(&["-v", "list"]), 4);
        assert_eq!(verbosity_of(&["-vv", "list"]), 5);
        assert_eq!(verbosity_of(&["-v4", "list"]), 4);
        assert_eq!(verbosity_of(&["-v-1", "list"]), -1);
        assert_eq!(verbosity_of(&["-v0", "-v-2", "list"]), -2);
    }

    #[test]
    fn nothing_typed_is_a_usage_error() {
        assert!(matches!(parse([OsString::from("ploop")]), Parsed::Usage(_)));
        assert!(matches!(parse(["ploop", "--help"].map(OsString::from)), Parsed::Help(_)));
        assert!(matches!(parse(["ploop", "frobnicate"].map(OsString::from)), Parsed::Usage(_)));
    }
}
