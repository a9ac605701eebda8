//! What lies on a device or in a part of it: asked of libblkid, which knows the signatures, by its program `blkid`.
//!
//! An answer that is not understood is an error, never "nothing": what is not known to be empty is not cut.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use ploop_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::disk_bytes::{DiskBytes, ShownDisk};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Content {
    /// Its name with libblkid: `ext4`, `swap`, `LVM2_member`, `linux_raid_member` ...
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    /// Its version.
    pub(crate) version: Option<String>,
    /// Its label.
    pub(crate) label: Option<String>,
    /// Its UUID.
    pub(crate) uuid: Option<String>,
    /// The kind of partition table: `dos`, `gpt` ...
    pub(crate) table: Option<String>,
    /// Several signatures that exclude each other.
    pub(crate) ambiguous: bool,
}

impl Content {
    /// Whether there is nothing that anybody knows.
    pub(crate) fn is_nothing(&self) -> bool {
        self.kind.is_none() && self.table.is_none() && !self.ambiguous
    }

    /// What people call it.
    pub(crate) fn name(&self) -> String {
        if self.ambiguous {
            return "several things at once (wipefs shows them)".to_owned();
        }
        let known = match self.kind.as_deref() {
            Some("swap") => "swap space",
            Some("LVM2_member") => "a physical volume of LVM",
            Some("crypto_LUKS") => "an encrypted device (LUKS)",
            Some("BitLocker") => "an encrypted device (BitLocker)",
            Some("linux_raid_member") => "a member of a RAID array",
            Some("zfs_member") => "a member of a ZFS pool",
            Some(kind) => return kind.to_owned(),
            None => {
                return match &self.table {
                    Some(table) => format!("a partition table ({table})"),
                    None => "nothing that is known".to_owned(),
                };
            }
        };
        format!("{known} [{}]", self.kind.as_deref().unwrap_or_default())
    }

    /// Whether its description lies at the end of the device, so that it is not found on a longer one.
    pub(crate) fn is_found_from_the_end(&self) -> bool {
        let version = self.version.as_deref().unwrap_or_default();
        match self.kind.as_deref() {
            Some("linux_raid_member") => !version.starts_with("1.1") && !version.starts_with("1.2"),
            Some(kind) => kind.ends_with("_raid_member") || kind == "drbd",
            None => false,
        }
    }
}

fn failed(path: &Path, problem: String) -> Error {
    Error::new(ErrorKind::System, format!("find out what is on the disk: {problem}"))
        .at_path(path)
        .advise("blkid and wipefs of util-linux are needed for this; nothing was changed")
}

/// Looks at the device or file `path`, or at a part of it: first byte and length.
pub(crate) fn probe(path: &Path, part: Option<(u64, u64)>) -> Result<Content> {
    let mut line: Vec<OsString> = ["--probe", "--output", "export"].map(OsString::from).into();
    if let Some((offset, len)) = part {
        line.extend(["--offset".into(), offset.to_string().into(), "--size".into(), len.to_string().into()]);
    }
    line.push(path.into());
    // What cannot be read is told here: blkid says as little of it as of an empty file.
    let disk = ShownDisk::open(path, false)?;
    let (start, len) = part.unwrap_or((0, disk.disk_bytes()));
    for offset in [start, (start + len).saturating_sub(512)] {
        disk.read_at(offset, &mut [0; 512])?;
    }
    let (status, found, said) = run("blkid", &line, path)?;
    match status {
        Some(0) => Ok(understand(&found)),
        Some(2) if said.is_empty() && found.is_empty() => nothing(path, part.is_none()),
        Some(8) => Ok(Content { ambiguous: true, ..Content::default() }),
        _ => Err(failed(path, format!("blkid ended with {status:?}: {said}"))),
    }
}

/// Makes sure that there is nothing where blkid has found nothing: it says the same of what it could not open. Its sister
/// must have looked at the file, and see no signature either.
fn nothing(path: &Path, is_whole: bool) -> Result<Content> {
    let line = ["--no-act", "--parsable"].map(OsString::from);
    let (status, found, said) = run("wipefs", &[&line[..], &[path.into()]].concat(), path)?;
    if status != Some(0) || !said.is_empty() {
        return Err(failed(path, format!("wipefs ended with {status:?}: {said}")));
    }
    let is_empty = found.lines().all(|line| line.starts_with('#') || line.trim().is_empty());
    Ok(Content { ambiguous: is_whole && !is_empty, ..Content::default() })
}

/// Runs a tool of util-linux: its exit code, what it printed and what it complained.
fn run(tool: &str, line: &[OsString], path: &Path) -> Result<(Option<i32>, String, String)> {
    let tools = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(tool)
        .args(line)
        .env("PATH", tools)
        .env("LC_ALL", "C")
        .env_remove("LIBBLKID_DEBUG")
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| failed(path, format!("run {tool}: {cause}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr).replace('\n', "; ")))
}

fn understand(text: &str) -> Content {
    let mut content = Content::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        // Blanks and signs come with a backslash for the shell.
        let mut plain = String::new();
        let mut letters = value.chars();
        while let Some(letter) = letters.next() {
            plain.extend(if letter == '\\' { letters.next() } else { Some(letter) });
        }
        let field = match key {
            "TYPE" => &mut content.kind,
            "VERSION" => &mut content.version,
            "LABEL" => &mut content.label,
            "UUID" => &mut content.uuid,
            "PTTYPE" => &mut content.table,
            _ => continue,
        };
        *field = Some(plain);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_understood() {
        let content =
            understand("DEVNAME=/dev/x\nUUID=AB-cd\nLABEL=my\\ disk\nVERSION=1.0\nTYPE=linux_raid_member\n");
        assert_eq!(content.kind.as_deref(), Some("linux_raid_member"));
        assert_eq!(content.label.as_deref(), Some("my disk"));
        assert_eq!(content.uuid.as_deref(), Some("AB-cd"));
        assert!(content.is_found_from_the_end() && !content.is_nothing());
        assert!(content.name().contains("RAID"));
        assert!(!understand("TYPE=linux_raid_member\nVERSION=1.2\n").is_found_from_the_end());
        assert!(understand("PART_ENTRY_SCHEME=gpt\n").is_nothing());
    }

    #[test]
    fn what_cannot_be_looked_at_is_not_called_empty() {
        let error = probe(Path::new("/nonexistent/disk"), None).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
        let error = nothing(Path::new("/nonexistent/disk"), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::System);
        assert!(error.advice().unwrap().contains("nothing was changed"), "{error}");
        let error = run("no-such-tool", &[], Path::new("x")).unwrap_err();
        assert!(error.advice().unwrap().contains("util-linux"), "{error}");
    }

    #[test]
    fn an_empty_file_is_empty_and_swap_is_swap() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert!(probe(&path, None).unwrap().is_nothing());
        assert!(probe(&path, Some((1 << 19, 1 << 18))).unwrap().is_nothing());
        let mut page = vec![0; 1 << 20];
        page[4086..4096].copy_from_slice(b"SWAPSPACE2");
        page[1024] = 1;
        page[1028] = 0xFF;
        std::fs::write(&path, &page).unwrap();
        assert_eq!(probe(&path, None).unwrap().kind.as_deref(), Some("swap"));
        // Past the end.
        assert!(probe(&path, Some((1 << 20, 512))).is_err());
    }
}
