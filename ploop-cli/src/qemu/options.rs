//! Options of other programs' formats: which may be given, and with what values.
//!
//! They are passed on to `qemu-img`, whose options can name other files, keys and protocols. So only those listed here pass, and
//! their values are words, numbers and sizes, in which no path and no further option can hide. What a value means, and whether
//! it fits, `qemu-img` knows. Layouts that make several files are refused: an export is one file, or none.

use ploop_core::{Error, ErrorKind, Result};

use super::DiskFormat;

/// The longest value, in bytes.
const VALUE_LEN_MAX: usize = 32;
/// Options that may be given at once.
const COUNT_MAX: usize = 16;

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// `on` or `off`.
    Switch,
    /// A whole number.
    Number,
    /// A whole number and perhaps one of K, M, G, T.
    Size,
    /// One of these words.
    Word(&'static [&'static str]),
}

impl Value {
    fn takes(self, text: &str) -> bool {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match self {
            Self::Switch => matches!(text, "on" | "off"),
            Self::Number => is_number(text),
            Self::Size => is_number(text.strip_suffix(['k', 'K', 'M', 'G', 'T']).unwrap_or(text)),
            Self::Word(words) => words.contains(&text),
        }
    }

    fn expected(self) -> String {
        match self {
            Self::Switch => "on or off".to_owned(),
            Self::Number => "a whole number".to_owned(),
            Self::Size => "a number of bytes, or with one of K, M, G, T".to_owned(),
            Self::Word(words) => words.join(", "),
        }
    }
}

/// What may be given for a format.
fn known(format: DiskFormat) -> &'static [(&'static str, Value)] {
    match format {
        DiskFormat::Qcow2 => &[
            ("cluster_size", Value::Size),
            ("compat", Value::Word(&["0.10", "1.1", "v2", "v3"])),
            ("compression_type", Value::Word(&["zlib", "zstd"])),
            ("extended_l2", Value::Switch),
            ("lazy_refcounts", Value::Switch),
            ("preallocation", Value::Word(&["off", "metadata", "falloc", "full"])),
            ("refcount_bits", Value::Number),
        ],
        DiskFormat::Vmdk => &[
            ("adapter_type", Value::Word(&["ide", "lsilogic", "buslogic", "legacyESX"])),
            ("compat6", Value::Switch),
            ("hwversion", Value::Number),
            // The others are several files.
            ("subformat", Value::Word(&["monolithicSparse", "streamOptimized"])),
            ("toolsversion", Value::Number),
            ("zeroed_grain", Value::Switch),
        ],
        DiskFormat::Vdi => &[("static", Value::Switch)],
        DiskFormat::Vhdx => &[
            ("block_size", Value::Size),
            ("block_state_zero", Value::Switch),
            ("log_size", Value::Size),
            ("subformat", Value::Word(&["dynamic", "fixed"])),
        ],
        DiskFormat::Vpc => {
            &[("force_size", Value::Switch), ("subformat", Value::Word(&["dynamic", "fixed"]))]
        }
        DiskFormat::Qed => &[("cluster_size", Value::Size), ("table_size", Value::Number)],
        DiskFormat::Raw => &[],
    }
}

/// How a new file is laid out, as asked for on the command line and found harmless.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    compress: bool,
    options: Vec<String>,
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::Parameter, format!("export: {message}"))
}

impl Layout {
    /// `typed` are lists of `NAME=VALUE`, with commas between.
    pub(crate) fn new(format: DiskFormat, compress: bool, typed: &[String]) -> Result<Self> {
        let compresses = matches!(format, DiskFormat::Qcow2 | DiskFormat::Vmdk);
        if compress && !compresses {
            return Err(refused(format!("{format} files are not compressed")).advise(
                "leave --compress out, or use --format qcow2, or vmdk with -o subformat=streamOptimized",
            ));
        }
        let known = known(format);
        let mut options: Vec<String> = Vec::new();
        for one in typed.iter().flat_map(|list| list.split(',')) {
            let (name, value) = one.split_once('=').unwrap_or((one, ""));
            let Some((name, kind)) = known.iter().find(|(known, _)| *known == name) else {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                let advice = match names.is_empty() {
                    true => "leave -o out".to_owned(),
                    false => format!("it takes: {}", names.join(", ")),
                };
                return Err(refused(format!("{format} takes no option {name:?} here")).advise(advice));
            };
            if value.len() > VALUE_LEN_MAX || !kind.takes(value) {
                return Err(refused(format!("{name}={value:?} is no value for {format}"))
                    .advise(format!("{name} takes: {}", kind.expected())));
            }
            if options.iter().any(|other| other.split('=').next() == Some(*name))
                || options.len() >= COUNT_MAX
            {
                return Err(refused(format!("{name} is given twice")));
            }
            options.push(format!("{name}={value}"));
        }
        Ok(Self { compress, options })
    }

    /// As arguments of `qemu-img convert`.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.compress {
            arguments.push("-c".to_owned());
        }
        for option in &self.options {
            arguments.extend(["-o".to_owned(), option.clone()]);
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(format: DiskFormat, typed: &[&str]) -> Result<Layout> {
        let typed: Vec<String> = typed.iter().map(|&one| one.to_owned()).collect();
        Layout::new(format, false, &typed)
    }

    #[test]
    fn known_options_pass() {
        let made = layout(DiskFormat::Qcow2, &["compat=v2,cluster_size=64K", "lazy_refcounts=off"]).unwrap();
        let expected = ["-o", "compat=v2", "-o", "cluster_size=64K", "-o", "lazy_refcounts=off"];
        assert_eq!(made.arguments(), expected);
        assert_eq!(Layout::new(DiskFormat::Vmdk, true, &[]).unwrap().arguments(), ["-c"]);
        layout(DiskFormat::Vmdk, &["subformat=streamOptimized,hwversion=7"]).unwrap();
        layout(DiskFormat::Vhdx, &["block_size=1M", "subformat=fixed"]).unwrap();
        assert_eq!(layout(DiskFormat::Raw, &[]).unwrap(), Layout::default());
    }

    #[test]
    fn nothing_that_names_a_file_passes() {
        for (format, typed) in [
            (DiskFormat::Qcow2, "backing_file=/etc/shadow"),
            (DiskFormat::Qcow2, "data_file=/etc/shadow"),
            (DiskFormat::Qcow2, "file.filename=/etc/shadow"),
            (DiskFormat::Qcow2, "encrypt.key-secret=x"),
            (DiskFormat::Qcow2, "size=1"),
            (DiskFormat::Qcow2, "cluster_size=64K,,backing_file=x"),
            (DiskFormat::Qcow2, "cluster_size=/etc/shadow"),
            (DiskFormat::Qcow2, "cluster_size=-1"),
            (DiskFormat::Qcow2, "cluster_size="),
            (DiskFormat::Qcow2, "cluster_size"),
            (DiskFormat::Qcow2, "cluster_size=000000000000000000000000000000001"),
            (DiskFormat::Qcow2, "compat=v4"),
            (DiskFormat::Qcow2, "compat=v2,compat=v3"),
            (DiskFormat::Qcow2, ""),
            (DiskFormat::Qcow2, "help"),
            (DiskFormat::Qcow2, "?"),
            // Several files.
            (DiskFormat::Vmdk, "subformat=monolithicFlat"),
            (DiskFormat::Vmdk, "subformat=twoGbMaxExtentSparse"),
            (DiskFormat::Vmdk, "backing_file=x"),
            (DiskFormat::Vpc, "cluster_size=64K"),
            (DiskFormat::Raw, "preallocation=full"),
            (DiskFormat::Qed, "backing_fmt=raw"),
        ] {
            let error = layout(format, &[typed]).expect_err(typed);
            assert_eq!(error.kind(), ErrorKind::Parameter, "{typed}");
        }
        for format in [DiskFormat::Raw, DiskFormat::Vdi, DiskFormat::Vhdx, DiskFormat::Vpc, DiskFormat::Qed] {
            assert!(Layout::new(format, true, &[]).is_err(), "{format}");
        }
    }
}
