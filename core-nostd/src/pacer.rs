//! ACCEPT PENALTY: on the vCPU's thread, how long to pause for the pages it dirtied, and how many it may dirty next.

use core::mem::replace;

use crate::meter::Report;
use crate::penalty::{PenaltyCell, Terms, VmCell};
use crate::rate::{Nanos, SECOND};

/// A slice is what the limit allows in so long, or in the longest pause if that is less; at least one page.
///
/// Short against the 100 ms in which a rate is judged, long against the cost of an exit.
const SLICE: Nanos = 4_000_000;
/// How long a vCPU may have dirtied less than its limit and still catch up: one slice, whose pages are paid when it is
/// over, and what it may lose to an overslept pause or to the host's scheduler.
const BURST: Nanos = SLICE + 6_000_000;
/// The most that a vCPU can owe. What others drained from its ring beyond that is forgiven.
pub const MAX_DEBT: Nanos = SECOND;

/// What the vCPU is to do before it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Pause until then; in the past where nothing is owed.
    pub until: Nanos,
    /// Pages that it may dirty before its next full exit; `None`: as many as the ring takes.
    pub slice: Option<u32>,
}

/// One vCPU's virtual clock: it is due at `due`, having paid for every page up to then (GCRA, the leaky bucket of
/// ITU-T I.371). Owned by the vCPU's thread; no call waits or loops.
///
/// Pages of a vCPU that was not limited when it last settled are forgiven: they were allowed when they were written, and
/// a full ring of them, at a low limit, would freeze the guest for seconds.
#[derive(Debug)]
pub struct Pacer {
    /// The report's net count up to which pages were charged.
    paid: u32,
    due: Nanos,
    limited: bool,
    /// What the net count is while nothing is owed: `paid`, or out of its reach where `due` was ahead at the last turn.
    quiet: u32,
}

/// No vCPU dirties so many pages between two turns.
const UNREACHABLE: u32 = 1 << 31;

impl Pacer {
    /// A pacer for a vCPU whose pages up to now are nobody's debt.
    pub fn new(report: &Report) -> Self {
        let paid = report.net();
        Self { paid, due: 0, limited: false, quiet: paid }
    }

    /// Whether [`Pacer::settle`] has anything to charge or to wait for: one load.
    #[inline]
    pub fn owes(&self, report: &Report) -> bool {
        report.net() != self.quiet
    }

    /// Charges the pages metered since the last call, by whomever, and says what follows from it at `now`.
    ///
    /// Idempotent while nothing is metered. A pause that ended early is not lost: the rest is still due.
    pub fn settle(&mut self, now: Nanos, vm: &VmCell, penalty: &PenaltyCell, report: &Report) -> Turn {
        let net = report.net();
        let pages = net.wrapping_sub(replace(&mut self.paid, net));
        // The penalty first: its acquire makes the lease renewed with it visible.
        let Some(terms) = penalty.accept().terms().filter(|_| vm.is_leased(now)) else {
            (self.limited, self.quiet) = (false, net);
            return Turn { until: now, slice: None };
        };
        let (price, credit) = match terms {
            Terms::Pace(price) => (price, BURST),
            Terms::Sleep(price) => (price, 0),
        };
        let was_limited = replace(&mut self.limited, true);
        let due =
            if was_limited { self.due.max(now.saturating_sub(credit)).saturating_add(price.of(pages)) } else { now };
        self.due = due.min(now.saturating_add(MAX_DEBT));
        self.quiet = if self.due > now { net.wrapping_add(UNREACHABLE) } else { net };
        let max_pause = vm.max_pause();
        let until = self.due.min(now.saturating_add(max_pause));
        // What one pause does not cover stays owed, and the vCPU goes on page by page.
        let slice = if self.due > until { 1 } else { price.pages_for(SLICE.min(max_pause)).max(1) };
        Turn { until, slice: Some(slice) }
    }
}

#[cfg(test)]
mod tests;
