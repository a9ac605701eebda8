//! `ploop man`: the manual pages, made from the definition of the command.

use std::path::PathBuf;

use ploop_core::{Error, ErrorKind};

use crate::exit::{Outcome, TABLE};
use crate::output::Output;

/// Write the manual pages into a folder
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The folder; it must exist
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    let definition = crate::args::definition();
    for (name, text) in pages(&definition)? {
        let path = arguments.folder.join(&name);
        std::fs::write(&path, text)
            .map_err(|error| Error::io(ErrorKind::Write, "write a manual page", error).at_path(&path))?;
        output.note(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// The pages as (file name, text): one for the command, one for each subcommand that is not hidden.
fn pages(definition: &clap::Command) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let failed = |error| Error::io(ErrorKind::System, "make a manual page", error);
    let mut pages = Vec::new();
    let mut text = Vec::new();
    clap_mangen::Man::new(definition.clone()).render(&mut text).map_err(failed)?;
    text.extend_from_slice(b".SH \"EXIT STATUS\"\n");
    for (code, meaning) in TABLE {
        text.extend_from_slice(format!(".TP\n.B {code}\n{}\n", meaning.replace('\\', "\\\\")).as_bytes());
    }
    pages.push(("ploop.8".to_owned(), text));
    for command in definition.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("ploop-{}", command.get_name());
        let mut text = Vec::new();
        let command = command.clone().name(name.clone()).bin_name(name.replacen('-', " ", 1));
        clap_mangen::Man::new(command).section("8").render(&mut text).map_err(failed)?;
        pages.push((format!("{name}.8"), text));
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    #[test]
    fn pages_hold_commands_and_exit_codes() {
        let pages = super::pages(&crate::args::definition()).unwrap();
        let main = String::from_utf8(pages[0].1.clone()).unwrap();
        assert!(main.contains("EXIT STATUS") && main.contains(".B 37"));
        assert!(pages.iter().any(|page| page.0 == "ploop-init.8"));
        assert!(!pages.iter().any(|page| page.0 == "ploop-serve.8"));
    }
}
