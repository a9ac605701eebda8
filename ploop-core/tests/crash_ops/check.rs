//! Checking a bundle, with everything a repair may do to it: nothing of what is sound changes, at any crash.

use ploop_core::ops::Silent;
use ploop_core::ops::check::{CheckOptions, Outcome, check_bundle_in};

use crate::bundle::Shape;
use crate::harness::{Case, survives};

#[test]
fn checking_and_repairing_a_bundle_survives_every_crash() {
    for shape in Shape::several() {
        let case = Case::new(format!("check {shape:?}"), shape.bundle(), |folder| {
            let report = check_bundle_in(folder, &CheckOptions::repair(""), &Silent)?;
            if let Some(failure) = report.failure() {
                return Err(failure);
            }
            assert!(report.outcome <= Outcome::Repaired, "{report:?}");
            Ok(())
        });
        // Undo files are kept for people.
        survives(&case.leaving(|name| name.contains(".tmp.") || name.contains(".undo")));
    }
}
