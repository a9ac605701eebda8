//! What a sender has taken from the tracker and the receiver has not made durable yet.

use crate::source::Loan;

/// Loans by the pass that sent them. Dropped, they all go back: their bytes are dirty again.
#[derive(Default)]
pub(crate) struct Loans {
    by_pass: Vec<(u32, Vec<Box<dyn Loan>>)>,
}

impl Loans {
    /// The loans of a pass that ends; passes come in ascending order.
    pub(crate) fn push(&mut self, pass: u32, loans: Vec<Box<dyn Loan>>) {
        if !loans.is_empty() {
            self.by_pass.push((pass, loans));
        }
    }

    /// The last pass but one that has loans.
    pub(crate) fn last_but_one(&self) -> Option<u32> {
        match self.by_pass.as_slice() {
            [.., (pass, _), _] => Some(*pass),
            _ => None,
        }
    }

    /// All up to this pass is durable on the other side.
    pub(crate) fn acknowledge(&mut self, durable_pass: u32) {
        for (_, loans) in self.by_pass.extract_if(.., |(pass, _)| *pass <= durable_pass) {
            for loan in loans {
                loan.acknowledge();
            }
        }
    }

    /// Nothing more will become durable.
    pub(crate) fn give_back(&mut self) {
        self.by_pass.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop_core::Extent;
    use ploop_core::tracker::Tracker;

    #[test]
    fn acknowledged_passes_are_forgotten_and_the_others_go_back() {
        let tracker = Tracker::new(1 << 20).unwrap();
        let mut loans = Loans::default();
        for pass in 1..=3u32 {
            let at = u64::from(pass) * 8192;
            tracker.mark(Extent::between(at, at + 4096));
            let taken: Box<dyn Loan> = Box::new(tracker.take(0, 1 << 20).unwrap());
            loans.push(pass, vec![taken]);
        }
        loans.push(4, Vec::new());
        assert_eq!(loans.last_but_one(), Some(2));
        assert_eq!(tracker.dirty_bytes(), 0);
        assert!(!tracker.is_clean());
        loans.acknowledge(2);
        loans.give_back();
        assert_eq!(tracker.dirty_bytes(), 4096);
        assert_eq!(tracker.take(0, 1 << 20).unwrap().extent().start(), 3 * 8192);
    }
}
