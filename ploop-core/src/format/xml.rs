//! The little XML that a descriptor needs: elements, attributes and text, within limits.
//!
//! The input is hostile until shown otherwise (threat rule M2): its length, depth, number of elements and of
//! attributes are bounded, it must be UTF-8, and a document type or entity declaration is refused before a parser
//! sees it. Comments and processing instructions are skipped.
//!
//! Printing and reading give the same tree back: `parse(print(x)) == x` for every tree that was read.

use xml::reader::{EventReader, ParserConfig, XmlEvent};

use crate::error::{Error, ErrorKind, Result};

/// Most bytes of a document.
pub(crate) const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting of elements.
const DEPTH_MAX: usize = 16;
/// Most elements.
const ELEMENTS_MAX: usize = 16 * 1024;
/// Most attributes, and most declared name spaces, of one element.
const ATTRIBUTES_MAX: usize = 32;

/// One element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// With its prefix, if it has one.
    pub(crate) name: String,
    /// In the order they were given.
    pub(crate) attributes: Vec<(String, String)>,
    /// All text directly inside; trimmed when there are children as well.
    pub(crate) text: String,
    /// Elements inside.
    pub(crate) children: Vec<Node>,
}

impl Node {
    /// An element with nothing in it.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// An element with text in it.
    pub(crate) fn with_text(name: &str, text: impl ToString) -> Self {
        Self { text: text.to_string(), ..Self::new(name) }
    }
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Descriptor, format!("read descriptor: {}", message.into()))
}

/// The root element of a document.
pub(crate) fn parse(bytes: &[u8]) -> Result<Node> {
    if bytes.len() > DOCUMENT_BYTES_MAX {
        return Err(refused(format!("more than {DOCUMENT_BYTES_MAX} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| refused("not UTF-8 text").caused_by(error))?;
    if text.contains('\0') {
        return Err(refused("not UTF-8 text"));
    }
    let upper = text.to_ascii_uppercase();
    if upper.contains("<!DOCTYPE") || upper.contains("<!ENTITY") {
        return Err(refused("it declares a document type or entities, which no descriptor needs"));
    }
    let config = ParserConfig::new()
        .cdata_to_characters(true)
        .whitespace_to_characters(true)
        .ignore_comments(true)
        .allow_multiple_root_elements(false)
        .max_attributes(ATTRIBUTES_MAX);
    build(config.create_reader(bytes))
}

fn build(mut reader: EventReader<&[u8]>) -> Result<Node> {
    // Elements that are open, each with the name spaces known in it.
    let mut open: Vec<(Node, Vec<(String, String)>)> = Vec::new();
    let mut elements = 0;
    let mut root = None;
    loop {
        let event = reader.next().map_err(|error| refused("not well-formed XML").caused_by(error))?;
        match event {
            XmlEvent::StartElement { name, attributes, namespace } => {
                elements += 1;
                if elements > ELEMENTS_MAX {
                    return Err(refused(format!("more than {ELEMENTS_MAX} elements")));
                }
                if open.len() >= DEPTH_MAX {
                    return Err(refused(format!("elements nested deeper than {DEPTH_MAX}")));
                }
                if namespace.0.len() > ATTRIBUTES_MAX {
                    return Err(refused(format!("more than {ATTRIBUTES_MAX} name spaces")));
                }
                let known: Vec<(String, String)> = namespace
                    .0
                    .into_iter()
                    .filter(|(prefix, uri)| {
                        !(matches!(prefix.as_str(), "xml" | "xmlns") || prefix.is_empty() && uri.is_empty())
                    })
                    .collect();
                let outer = open.last().map_or(&[][..], |(_, known)| known);
                let mut node = Node::new(&qualified(name.prefix, name.local_name));
                for declaration in known.iter().filter(|declaration| !outer.contains(declaration)) {
                    let prefix = Some("xmlns".to_owned());
                    let name = match declaration.0.as_str() {
                        "" => "xmlns".to_owned(),
                        local => qualified(prefix, local.to_owned()),
                    };
                    node.attributes.push((name, declaration.1.clone()));
                }
                for attribute in attributes {
                    let name = qualified(attribute.name.prefix, attribute.name.local_name);
                    node.attributes.push((name, attribute.value));
                }
                open.push((node, known));
            }
            XmlEvent::EndElement { .. } => {
                let Some((mut node, _)) = open.pop() else { return Err(refused("not well-formed XML")) };
                if !node.children.is_empty() {
                    node.text = node.text.trim().to_owned();
                }
                match open.last_mut() {
                    Some((parent, _)) => parent.children.push(node),
                    None => root = Some(node),
                }
            }
            XmlEvent::Characters(text) | XmlEvent::CData(text) | XmlEvent::Whitespace(text) => {
                if let Some((node, _)) = open.last_mut() {
                    node.text.push_str(&text);
                }
            }
            XmlEvent::Doctype { .. } => return Err(refused("it declares a document type")),
            XmlEvent::EndDocument => return root.ok_or_else(|| refused("no element")),
            XmlEvent::StartDocument { .. }
            | XmlEvent::ProcessingInstruction { .. }
            | XmlEvent::Comment(_) => {}
        }
    }
}

fn qualified(prefix: Option<String>, local: String) -> String {
    match prefix {
        Some(prefix) if !prefix.is_empty() => format!("{prefix}:{local}"),
        _ => local,
    }
}

/// The document with `root` in it: declaration, two spaces for each level, a newline at the end.
pub(crate) fn print(root: &Node) -> String {
    let mut out = String::from("<?xml version=\"1.0\"?>\n");
    print_node(root, 0, &mut out);
    out
}

fn print_node(node: &Node, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    out.push_str(&indent);
    out.push('<');
    out.push_str(&node.name);
    for (name, value) in &node.attributes {
        out.push(' ');
        out.push_str(name);
        out.push_str("=\"");
        escape(value, true, out);
        out.push('"');
    }
    if node.text.is_empty() && node.children.is_empty() {
        out.push_str("/>\n");
        return;
    }
    out.push('>');
    escape(&node.text, false, out);
    if !node.children.is_empty() {
        out.push('\n');
        for child in &node.children {
            print_node(child, depth + 1, out);
        }
        out.push_str(&indent);
    }
    out.push_str("</");
    out.push_str(&node.name);
    out.push_str(">\n");
}

fn escape(text: &str, in_attribute: bool, out: &mut String) {
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' if in_attribute => out.push_str("&quot;"),
            // A parser would make other white space of these.
            '\r' => out.push_str("&#13;"),
            '\n' if in_attribute => out.push_str("&#10;"),
            '\t' if in_attribute => out.push_str("&#9;"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(text: &str) -> String {
        parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn limits_hold() {
        let deep = |depth: usize| "<a>".repeat(depth) + &"</a>".repeat(depth);
        assert!(parse(deep(16).as_bytes()).is_ok());
        assert!(refusal(&deep(17)).contains("deeper"));
        assert!(refusal(&"<a>".repeat(300_000)).contains("deeper"), "without using up the stack");
        let many = format!("<r>{}</r>", "<a/>".repeat(ELEMENTS_MAX));
        assert!(refusal(&many).contains("more than 16384 elements"));
        let long = format!("<r>{}</r>", "x".repeat(DOCUMENT_BYTES_MAX));
        assert!(refusal(&long).contains("bytes"));
        let names: String = (0..2000).map(|number| format!(" xmlns:n{number}=\"u\"")).collect();
        assert!(parse(format!("<r{names}/>").as_bytes()).is_err());
        let attributes: String = (0..2000).map(|number| format!(" n{number}=\"u\"")).collect();
        assert!(parse(format!("<r{attributes}/>").as_bytes()).is_err());
    }

    #[test]
    fn declarations_are_refused_before_parsing() {
        for text in [
            "<!DOCTYPE r [<!ENTITY a \"b\">]><r>&a;</r>",
            "<!doctype r SYSTEM \"file:///etc/passwd\"><r/>",
            "<r><!ENTITY a \"b\"></r>",
        ] {
            assert!(refusal(text).contains("document type"), "{text}");
        }
        let wide: Vec<u8> = "<!DOCTYPE r><r/>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(parse(&wide).unwrap_err().to_string().contains("UTF-8"));
        assert!(parse(b"<r>&a;</r>").is_err(), "an entity that nobody declared");
        assert!(parse(b"").is_err() && parse(b"<a>").is_err() && parse(b"<a/><b/>").is_err());
    }

    #[test]
    fn white_space_and_mixed_content() {
        let read =
            parse(b"<?xml version=\"1.0\"?>\n<r a=\"1\">\n one <b> two </b>\n<!-- c -->three<c/>\n</r>")
                .unwrap();
        assert_eq!(read.children[0].text, " two ");
        assert_eq!(read.text.split_whitespace().collect::<Vec<_>>(), ["one", "three"]);
        assert_eq!(parse(print(&read).as_bytes()).unwrap(), read);
    }

    #[test]
    fn name_spaces_stay_with_their_elements() {
        let text = "<r xmlns=\"urn:a\"><x:b xmlns:x=\"urn:b\" x:c=\"1\"><x:d/></x:b></r>";
        let read = parse(text.as_bytes()).unwrap();
        assert_eq!(read.name, "r");
        assert_eq!(read.children[0].name, "x:b");
        let printed = print(&read);
        assert!(printed.contains("<r xmlns=\"urn:a\">") && printed.contains("<x:d/>"), "{printed}");
        assert_eq!(parse(printed.as_bytes()).unwrap(), read);
    }

    fn tree() -> impl Strategy<Value = Node> {
        let leaf = ("[a-z][a-z0-9]{0,5}", prop::collection::vec(any::<u8>(), 0..2), "[ -~é\r\n\t]{0,12}")
            .prop_map(|(name, keys, text)| Node {
                name,
                attributes: keys
                    .into_iter()
                    .enumerate()
                    .map(|(number, value)| (format!("k{number}"), format!("<\"{value}\n&\t'>")))
                    .collect(),
                text,
                children: Vec::new(),
            });
        leaf.prop_recursive(8, 64, 5, |inner| {
            (prop::collection::vec(inner, 1..5), "[a-z]{1,4}", "[ -~]{0,12}").prop_map(
                |(children, name, text)| Node {
                    name,
                    attributes: Vec::new(),
                    text: text.trim().to_owned(),
                    children,
                },
            )
        })
    }

    proptest! {
        #[test]
        fn printing_and_reading_give_the_same(node in tree()) {
            prop_assert_eq!(parse(print(&node).as_bytes()).unwrap(), node);
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), text in "[<>/a!?\"'=&;# \\-\\[\\]]{0,60}") {
            let _ = parse(&bytes);
            let _ = parse(text.as_bytes());
        }
    }
}
