//! `compact`: what a guest reads is the same at every moment, and in the end the file is as short as what it holds.

use ploop_core::error::Error;
use ploop_core::io::Folder;
use ploop_core::mutant::Mutant;
use ploop_core::ops::compact::{CompactOptions, compact_in};
use ploop_core::ops::progress::Silent;

use crate::bundle::{Bundle, Shape};
use crate::harness::{Case, hunt, survives};

fn case(name: &str, start: Bundle) -> Case {
    let compact = |folder: &dyn Folder| -> Result<(), Error> {
        let report = compact_in(folder, &CompactOptions::default(), &Silent)?;
        assert!(report.complete, "{report:?}");
        Ok(())
    };
    Case::new(format!("compact {name}"), start, compact)
}

#[test]
fn compacting_survives_every_crash() {
    for shape in Shape::several() {
        survives(&case(&format!("{shape:?}"), shape.bundle()));
    }
}

#[test]
fn mutants_are_found() {
    let broken = [
        Mutant::StaleHeaderSector,
        Mutant::TableBeforeContentSync,
        Mutant::NoContentSync,
        Mutant::CutBeforeTableSync,
    ];
    let case = || case("broken", Shape::of(1).holed().bundle());
    hunt("compacting", broken.into_iter().map(|mutant| (mutant, case())).collect());
}
