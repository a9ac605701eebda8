//! Writes that come to a cluster while it is being copied up go out with the copy.
//!
//! Who gives a cluster a place in the top reads what lies around the guest's bytes and writes all of it. Meanwhile further writes
//! to the cluster wait in line for its lock; a guest that writes in sequence has many of them. Just before the
//! cluster is written, those of the same queue are taken out of the line and laid over it as well: one write for all of them
//! instead of one for each. They overlap nothing that was answered, so their order is free.
//!
//! A folded part holds no lock and has no transfer of its own. It ends with the part that carries it, behind the
//! publication of the cluster; if that failed, it stands in line again and is written by itself: a failed write
//! fails one request alone (E2).

use super::Op;
use super::allocating::Want;
use super::assembling::Assembly;
use super::queue::Queue;
use super::transferring::{Part, Work};
use crate::extent::Extent;

impl Queue {
    /// Lays over the piece what waits for the cluster that part `number` fills. The piece is complete but for that.
    pub(super) fn fold_in(&mut self, number: usize, assembly: &mut Assembly) {
        let Some(&Part { request, locked: Some(locked), prepared: Some(ref prepared), .. }) =
            self.parts.get(number)
        else {
            return;
        };
        let is_write =
            |request| matches!(self.requests.get(request), Some(one) if matches!(one.op, Op::Write { .. }));
        if prepared.is_move() || !is_write(request) || self.parts.len() == 1 {
            return;
        }
        let layout = self.disk.layout();
        let start = layout.cluster_start(prepared.cluster());
        let within = |part: &Part| {
            let from = part.extent.start().checked_sub(start)?;
            Some(Extent::between(from, from + part.extent.len()))
        };
        let waits = |part: &Part| {
            matches!(part.work, Work::Waiting(cluster) if cluster == locked.first)
                && part.locked.is_none()
                && part.data.is_some()
                && is_write(part.request)
                && within(part).is_some_and(|at| at.clip(&assembly.piece()) == at)
        };
        let waiting: Vec<usize> =
            self.parts.numbers().filter(|&other| self.parts.get(other).is_some_and(&waits)).collect();
        let mut folded = Vec::new();
        for other in waiting {
            // Not if it has been let in meanwhile, which the lock's owner could not have missed.
            if !self.disk.locks.cancel(locked.first, &self.inbox, other as u64, &mut self.granted) {
                continue;
            }
            let Some(part) = self.parts.get_mut(other) else { continue };
            let is_laid = match (within(part), &part.data) {
                (Some(at), Some(data)) => assembly.lay(at, data.as_slice()),
                _ => false,
            };
            if is_laid {
                part.work = Work::Folded;
                folded.push(other);
            } else {
                self.ask_for_lock(other, Want::Allocate);
            }
        }
        if let Some(part) = self.parts.get_mut(number) {
            part.folded.append(&mut folded);
        }
    }

    /// The part that carried them has ended.
    pub(super) fn end_folded(&mut self, folded: Vec<usize>, is_written: bool) {
        for number in folded {
            if is_written {
                self.end_part(number, Ok(()));
            } else {
                self.ask_for_lock(number, Want::Allocate);
            }
        }
    }
}
