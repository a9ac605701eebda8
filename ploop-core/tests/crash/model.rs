//! What a guest may find after a crash: the sector-history rule (G1, G2).

use ploop_core::io::sim::Random;

use crate::pattern::{UNREADABLE, stamp};

/// What one write left in the history of a sector.
#[derive(Clone, Copy)]
struct Entry {
    value: u64,
    /// The operation that wrote it.
    operation: u64,
    /// When it was answered with success.
    answered: Option<u64>,
}

/// Per sector, the values it may hold after a crash, oldest first.
#[derive(Clone)]
pub(crate) struct Model {
    sectors: Vec<Vec<Entry>>,
    /// What the disk held when it was last opened: what a header that says "closed" stands for.
    at_open: Vec<u64>,
    /// A clean close has begun.
    closing: bool,
    tick: u64,
}

fn name(value: u64) -> String {
    if value == 0 {
        "zeros".to_owned()
    } else {
        format!("write {} of sector {}", (value >> 16) - 1, value & 0xffff)
    }
}

impl Model {
    /// A disk that durably holds `values`, just opened.
    pub(crate) fn new(values: &[u64]) -> Self {
        let entry = |&value: &u64| vec![Entry { value, operation: u64::MAX, answered: Some(0) }];
        Self {
            sectors: values.iter().map(entry).collect(),
            at_open: values.to_vec(),
            closing: false,
            tick: 1,
        }
    }

    /// A moment in time; later ones are larger.
    pub(crate) fn tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// From now on the sectors may hold what `value` says.
    pub(crate) fn begin_write(&mut self, operation: u64, first: u64, count: u64, value: impl Fn(u64) -> u64) {
        for sector in first..first + count {
            self.sectors[sector as usize].push(Entry { value: value(sector), operation, answered: None });
        }
    }

    /// The write was answered with success; `durable` for a FUA write.
    pub(crate) fn answer_write(&mut self, operation: u64, first: u64, count: u64, durable: bool) {
        let tick = self.tick();
        for history in &mut self.sectors[first as usize..(first + count) as usize] {
            if let Some(at) = history.iter().position(|entry| entry.operation == operation) {
                history[at].answered = Some(tick);
                if durable {
                    history.drain(..at);
                }
            }
        }
    }

    /// A flush that was submitted at `submitted` was answered with success.
    pub(crate) fn answer_flush(&mut self, submitted: u64) {
        for history in &mut self.sectors {
            let covered = |entry: &Entry| entry.answered.is_some_and(|answered| answered <= submitted);
            if let Some(at) = history.iter().rposition(covered) {
                history.drain(..at);
            }
        }
    }

    /// A clean close begins.
    pub(crate) fn begin_close(&mut self) {
        self.closing = true;
    }

    /// What each sector holds as long as nothing crashes, if that is certain; what a read may return otherwise.
    pub(crate) fn is_current(&self, sector: u64, value: u64) -> bool {
        let history = &self.sectors[sector as usize];
        let last = history.iter().rposition(|entry| entry.answered.is_some()).unwrap_or(0);
        history[last..].iter().any(|entry| entry.value == value)
    }

    /// Whether `found` may be read after a crash now (G2). `says_closed`: the header claims a clean close (I6).
    pub(crate) fn check(&self, found: &[u64], says_closed: bool) -> Result<(), String> {
        for (sector, (&value, history)) in found.iter().zip(&self.sectors).enumerate() {
            if value == UNREADABLE {
                // Only what was written and not made durable may be lost (T2), and never under a header that vouches.
                if history.len() < 2 {
                    return Err(format!("sector {sector} cannot be read, though nothing was written to it"));
                }
                if says_closed {
                    return Err(format!("the header says \"closed\", but sector {sector} cannot be read"));
                }
                continue;
            }
            if !history.iter().any(|entry| entry.value == value) {
                let allowed: Vec<String> = history.iter().map(|entry| name(entry.value)).collect();
                return Err(format!(
                    "sector {sector} holds {}, where only {} may be",
                    name(value),
                    allowed.join(" or ")
                ));
            }
            let as_closed =
                self.at_open[sector] == value || self.closing && self.is_current(sector as u64, value);
            if says_closed && !as_closed {
                return Err(format!("the header says \"closed\", but sector {sector} holds {}", name(value)));
            }
        }
        Ok(())
    }

    /// Equal for models that allow the same.
    pub(crate) fn hash(&self) -> u64 {
        let mut hash = u64::from(self.closing);
        let mut fold = |value: u64| hash = Random::new(hash ^ value.rotate_left(17)).next_u64();
        for (history, &at_open) in self.sectors.iter().zip(&self.at_open) {
            history.iter().for_each(|entry| fold(entry.value));
            fold(!at_open);
        }
        hash
    }
}

#[test]
fn a_flush_covers_what_was_answered_before_it_was_submitted() {
    let mut model = Model::new(&[0]);
    let write = |model: &mut Model, operation| {
        model.begin_write(operation, 0, 1, |sector| stamp(operation, sector));
        model.answer_write(operation, 0, 1, false);
    };
    write(&mut model, 1);
    let submitted = model.tick();
    write(&mut model, 2);
    assert!(model.check(&[0], false).is_ok());
    model.answer_flush(submitted);
    assert!(model.check(&[0], false).is_err());
    assert!(model.check(&[stamp(1, 0)], false).is_ok() && model.check(&[stamp(2, 0)], false).is_ok());
    assert!(model.check(&[stamp(2, 0)], true).is_err(), "it is not closed");
    model.begin_close();
    assert!(model.check(&[stamp(2, 0)], true).is_ok() && model.check(&[stamp(1, 0)], true).is_err());
    let mut model = Model::new(&[0]);
    assert!(model.check(&[UNREADABLE], false).is_err(), "only what was being written may be unreadable");
    write(&mut model, 3);
    assert!(model.check(&[UNREADABLE], false).is_ok() && model.check(&[UNREADABLE], true).is_err());
}
