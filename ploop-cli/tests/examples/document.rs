//! Finding the examples of a document.

use std::process::{Command, Stdio};

/// What a block needs, or what is special about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Root, FUSE and loop devices.
    Root,
    /// This program.
    Program(String),
    /// A new folder.
    Fresh,
    /// It is not run at all, and why.
    NotRun(String),
}

impl Need {
    fn parse(words: &str) -> Result<Vec<Self>, String> {
        if let Some(reason) = words.strip_prefix("not run") {
            return Ok(vec![Self::NotRun(reason.trim_start_matches([',', ':', ' ']).to_owned())]);
        }
        words
            .split(',')
            .map(|word| match word.trim() {
                "root" => Ok(Self::Root),
                "fresh" => Ok(Self::Fresh),
                other => match other.strip_prefix("needs ") {
                    Some(program) => Ok(Self::Program(program.trim().to_owned())),
                    None => Err(format!("the words {other:?} mean nothing to the runner of the examples")),
                },
            })
            .collect()
    }

    /// Why this keeps the block from being run here.
    pub(crate) fn obstacle(&self) -> Option<String> {
        match self {
            Self::Fresh => None,
            Self::NotRun(reason) => Some(format!("it only shows something: {reason}")),
            Self::Program(name) => {
                let found =
                    Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
                found.is_err().then(|| format!("{name} is not installed"))
            }
            Self::Root if !nix::unistd::geteuid().is_root() => Some("mounting needs root".to_owned()),
            Self::Root => ["/dev/fuse", "/dev/loop-control"]
                .into_iter()
                .find(|path| !std::path::Path::new(path).exists())
                .map(|path| format!("no {path}")),
        }
    }
}

/// One command with what it prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Its line in the document.
    pub(crate) line: usize,
    /// For `sh`.
    pub(crate) command: String,
    /// Lines with wildcards.
    pub(crate) expected: Vec<String>,
    /// Exit code.
    pub(crate) code: i32,
}

/// A block of commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Its first line in the document.
    pub(crate) line: usize,
    /// The words of the comment above it.
    pub(crate) needs: Vec<Need>,
    /// Its commands.
    pub(crate) steps: Vec<Step>,
}

/// The blocks of a document; or the line and what is wrong there.
pub(crate) fn blocks(text: &str) -> Result<Vec<Block>, String> {
    let mut found = Vec::new();
    let mut needs = Vec::new();
    let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    while let Some((number, line)) = lines.next() {
        let trimmed = line.trim();
        if let Some(words) = trimmed.strip_prefix("<!-- example:").and_then(|rest| rest.strip_suffix("-->")) {
            needs.extend(Need::parse(words.trim()).map_err(|wrong| format!("{number}: {wrong}"))?);
        } else if trimmed == "```console" {
            let body: Vec<_> = lines.by_ref().take_while(|(_, line)| line.trim() != "```").collect();
            let steps = steps(&body)?;
            found.push(Block { line: number, needs: std::mem::take(&mut needs), steps });
        } else if trimmed.starts_with("```") {
            // Another block: nothing in it is ours.
            lines.by_ref().take_while(|(_, line)| line.trim() != "```").for_each(drop);
        }
    }
    if needs.is_empty() { Ok(found) } else { Err("a comment for an example that does not follow".to_owned()) }
}

fn steps(body: &[(usize, &str)]) -> Result<Vec<Step>, String> {
    let mut steps: Vec<Step> = Vec::new();
    for &(line, text) in body {
        if let Some(command) = text.strip_prefix("$ ") {
            let command = command.to_owned();
            steps.push(Step { line, command, expected: Vec::new(), code: 0 });
            continue;
        }
        let Some(step) = steps.last_mut() else {
            return Err(format!("{line}: an example begins with a line that begins with `$ `"));
        };
        if let Some(more) = text.strip_prefix("> ").filter(|_| step.expected.is_empty()) {
            step.command.push('\n');
            step.command.push_str(more);
        } else if let Some(code) = text.strip_prefix("? ").and_then(|code| code.trim().parse().ok()) {
            step.code = code;
        } else {
            step.expected.push(text.trim_end().to_owned());
        }
    }
    // A blank line between two commands is for the eye.
    for step in &mut steps {
        while step.expected.last().is_some_and(String::is_empty) {
            step.expected.pop();
        }
    }
    Ok(steps)
}

#[test]
fn blocks_are_found_with_their_words() {
    let text = "# a\n```console\n$ one \\\n> two\nout\n? 3\n\n$ three\n```\n```sh\n$ not ours\n```\n\
                <!-- example: root, needs qemu-img -->\n\n```console\n$ four\n```\n";
    let blocks = blocks(text).unwrap();
    assert_eq!(blocks.len(), 2);
    assert_eq!(blocks[0].steps[0].command, "one \\\ntwo");
    assert_eq!((blocks[0].steps[0].code, blocks[0].steps[0].line), (3, 3));
    assert_eq!(blocks[0].steps[0].expected, ["out"]);
    assert_eq!(blocks[0].steps[1].command, "three");
    assert_eq!(blocks[1].needs, [Need::Root, Need::Program("qemu-img".to_owned())]);
    assert!(self::blocks("<!-- example: rooot -->\n```console\n$ a\n```").is_err());
    assert!(self::blocks("<!-- example: root -->\nnothing").is_err());
    assert!(self::blocks("```console\nno command\n```").is_err());
}
