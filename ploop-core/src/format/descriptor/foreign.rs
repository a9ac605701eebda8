//! What other programs say in a descriptor that decides whether its disk can be read as it lies there.

use crate::error::Result;

use super::document::number;
use super::names::shown;
use super::{DiskDescriptor, Rest, wrong};
use crate::format::xml::Node;

/// The engine of a disk that is not encrypted.
const ENGINE_NONE: &str = "00000000-0000-0000-0000-000000000000";

/// Who encrypted a disk. Its images hold ciphertext; the elements are kept when the descriptor is rewritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// The program that the disk belongs to, by this engine: nothing else can read it.
    Engine(String),
    /// LUKS on the device, with the key of this name.
    Key(String),
}

impl std::fmt::Display for Encryption {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(engine) => write!(formatter, "encrypted by its own program (engine {engine})"),
            Self::Key(key) => write!(formatter, "encrypted with the key {key:?} (LUKS on the device)"),
        }
    }
}

fn child<'a>(children: &'a [Node], name: &str) -> Option<&'a Node> {
    children.iter().find(|child| child.name == name)
}

fn text<'a>(node: &'a Node, name: &str) -> Option<&'a str> {
    child(&node.children, name).map(|node| node.text.trim()).filter(|text| !text.is_empty())
}

impl DiskDescriptor {
    /// Who encrypted the disk, if anybody did.
    pub fn encryption(&self) -> Option<Encryption> {
        let encryptions = self.rest.parameters.children.iter().filter(|node| node.name == "Encryption");
        encryptions
            .filter_map(|node| {
                let engine = text(node, "Engine")
                    .filter(|engine| engine.trim_matches(['{', '}']) != ENGINE_NONE)
                    .map(|engine| Encryption::Engine(shown(engine)));
                engine.or_else(|| text(node, "KeyId").map(|key| Encryption::Key(shown(key))))
            })
            .next()
    }

    /// Whether the descriptor says that a machine was suspended while it used the disk.
    pub fn is_suspended(&self) -> bool {
        let parameters = &self.rest.parameters.children;
        child(parameters, "Miscellaneous")
            .and_then(|node| text(node, "SuspendState"))
            .is_some_and(|state| number(state) != Some(0))
    }
}

/// Refuses sectors of another size: what the numbers of such a descriptor and its images count is not known.
pub(super) fn check_sector_size(parameters: &Rest) -> Result<()> {
    let Some(size) = child(&parameters.children, "LogicSectorSize") else { return Ok(()) };
    let size = size.text.trim();
    if size.is_empty() || number(size) == Some(512) {
        return Ok(());
    }
    Err(wrong(format!("<LogicSectorSize> is {:?}: only sectors of 512 bytes can be read", shown(size)))
        .advise(
            "make a disk with sectors of 512 bytes in the program it belongs to, and copy the content there",
        ))
}

/// Refuses a disk that does not begin at the beginning of its images.
pub(super) fn check_padding(padding: Option<Node>) -> Result<()> {
    let Some(padding) = padding else { return Ok(()) };
    let said = padding.text.trim();
    if said.is_empty() || number(said) == Some(0) {
        return Ok(());
    }
    Err(wrong(format!("<Padding> is {:?}, not 0: where such a disk begins is not known", shown(said)))
        .advise("convert the disk in the program it belongs to"))
}
