//! Opening for writing, which repairs an image that was not closed, and closing cleanly.

use ploop_core::format::{DiskDescriptor, Guid};
use ploop_core::io::Access;

use crate::bundle::{Shape, open_state};
use crate::harness::{Case, survives};

#[test]
fn opening_and_closing_survive_every_crash() {
    for shape in Shape::several() {
        let case = Case::new(format!("open and close {shape:?}"), shape.bundle(), |folder| {
            let descriptor = DiskDescriptor::load(folder, None)?;
            open_state(folder, &descriptor, Guid::TOP, Access::ReadWrite)?.close()
        });
        survives(&case);
    }
}
