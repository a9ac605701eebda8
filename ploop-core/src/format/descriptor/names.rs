//! The names of image files in a descriptor: what may stand there, and which file is meant.
//!
//! The names come from whoever wrote the descriptor, perhaps on another machine: none of them leads out of the bundle
//! by itself (threat rule M4). Three forms are met halfway, each only by a file that lies in the bundle: an absolute
//! path of a bundle that was moved, white space around a name, and the other Unicode form of a name (one file system
//! composes letters, another takes them apart).

use std::collections::BTreeSet;
use std::path::Path;

use unicode_normalization::UnicodeNormalization;

use super::{DESCRIPTOR_NAME, wrong};
use crate::error::Result;

/// Longest path out of the bundle that is looked at, in bytes.
const OUTSIDE_BYTES_MAX: usize = 4096;

/// How names are read.
#[derive(Clone, Copy)]
pub(crate) struct Names<'a> {
    /// Where the bundle is: absolute names below it, as old tools wrote them, are names in it.
    pub(crate) folder: Option<&'a Path>,
    /// Whether the bundle has a file of that name.
    pub(crate) is_there: &'a dyn Fn(&str) -> bool,
    /// Names that lead out of the bundle are kept, for a reader who was told what folders to take them from.
    pub(crate) outside: bool,
}

impl<'a> Names<'a> {
    /// Of a document alone: there is no folder to look into.
    pub(crate) fn of_document(folder: Option<&'a Path>) -> Self {
        Self { folder, is_there: &|_| false, outside: false }
    }
}

/// The file that a name stands for.
pub(super) struct Named {
    pub(super) file: String,
    /// It leads out of the bundle.
    pub(super) outside: bool,
    /// What was done to find it, in words.
    pub(super) note: Option<String>,
}

/// The files that the names of all images stand for, in their order.
pub(super) fn resolve(texts: &[String], names: &Names<'_>) -> Result<Vec<Named>> {
    // A path of another machine is given a file of the bundle only if no other image has that.
    let plain: BTreeSet<&str> = texts.iter().map(|text| last_component(text.trim())).collect();
    let may_be_moved = plain.len() == texts.len();
    texts.iter().map(|text| resolve_one(text, names, may_be_moved)).collect()
}

fn last_component(text: &str) -> &str {
    // Paths of other systems, too.
    text.rsplit(['/', '\\']).next().unwrap_or(text)
}

fn is_absolute(name: &str) -> bool {
    let bytes = name.as_bytes();
    name.starts_with('/') || (bytes.len() > 2 && bytes[1] == b':' && matches!(bytes[2], b'\\' | b'/'))
}

fn resolve_one(text: &str, names: &Names<'_>, may_be_moved: bool) -> Result<Named> {
    let in_bundle = |file: &str| Named { file: file.to_owned(), outside: false, note: None };
    let name = if text.trim() == text || (names.is_there)(text) { text } else { text.trim() };
    let inside = names
        .folder
        .filter(|folder| folder.is_absolute())
        .and_then(|folder| Path::new(name).strip_prefix(folder).ok()?.to_str());
    let name = inside.unwrap_or(name);
    if is_absolute(name) && may_be_moved {
        let last = last_component(name);
        if let (Ok(file), Some(found)) = (file_name(last), other_form(last, names)) {
            let note = format!(
                "the descriptor names {:?}, a path of another place: {file:?} beside the descriptor is taken",
                shown(name)
            );
            return Ok(Named { note: Some(note), ..in_bundle(&found) });
        }
    }
    let leads_out = is_absolute(name) || name.split('/').any(|part| part == "..");
    if leads_out && names.outside {
        if name.len() > OUTSIDE_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(wrong(format!("the file name {:?} is no path", shown(name))));
        }
        return Ok(Named { outside: true, ..in_bundle(name) });
    }
    let file = file_name(name)?;
    // Nearly all names: there is no other form to look for.
    if file.is_ascii() {
        return Ok(in_bundle(file));
    }
    match other_form(file, names) {
        Some(found) if found != file => {
            let note =
                format!("the file {found:?} is taken: its name has the same letters in another Unicode form");
            Ok(Named { note: Some(note), ..in_bundle(&found) })
        }
        _ => Ok(in_bundle(file)),
    }
}

/// The name as the bundle has it: as it is, composed, or taken apart.
fn other_form(name: &str, names: &Names<'_>) -> Option<String> {
    if (names.is_there)(name) {
        return Some(name.to_owned());
    }
    if name.is_ascii() {
        return None;
    }
    let forms = [name.nfc().collect::<String>(), name.nfd().collect()];
    forms.into_iter().find(|form| form.len() <= 2 * 255 && (names.is_there)(form))
}

/// The beginning of a text, for messages.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

/// Checks the name of an image file (threat rule M4) and gives it back without a leading `./`.
pub(super) fn file_name(name: &str) -> Result<&str> {
    let refused = |why: &str| Err(wrong(format!("the file name {:?} {why}", shown(name))));
    let move_it =
        "images lie in the descriptor's folder: move the file there and write its name alone into <File>";
    let give_parent = "for a linked clone give --allow-parent DIR, the folder that its parent's file is to be taken from; or \
                       the image files themselves, base first. Else images lie in the descriptor's folder: move the file \
                       there and write its name alone into <File>";
    if is_absolute(name) {
        return refused("is an absolute path").map_err(|error| error.advise(give_parent));
    }
    let relative = name.strip_prefix("./").unwrap_or(name);
    let components: Vec<&str> = relative.split('/').collect();
    if components.contains(&"..") {
        return refused("leads out of the folder").map_err(|error| error.advise(give_parent));
    }
    let refused = |why: &str| refused(why).map_err(|error| error.advise(move_it));
    if components.len() > 2 {
        return refused("lies deeper than one folder");
    }
    if components.iter().any(|part| part.is_empty() || *part == "." || part.len() > 255) {
        return refused("is not the name of a file");
    }
    if relative.chars().any(char::is_control) {
        return refused("has control characters in it");
    }
    if components.len() == 1 && relative.starts_with(DESCRIPTOR_NAME) {
        return refused("belongs to the descriptor itself");
    }
    Ok(relative)
}
