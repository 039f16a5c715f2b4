//! ACCEPT PENALTY: on the vCPU's thread, how long to pause for the pages it dirtied, and how many it may dirty next.

use core::mem::replace;

use super::RESET_GAP;
use crate::prepare::{Counters, Counts};
use crate::rate::{Nanos, SECOND};
use crate::set_penalty::{PenaltyCell, Terms, VmCell};

/// A slice is what the limit allows in this time, or in the longest pause if that is less; at least one page. On top comes
/// what was not used before, up to the tolerance.
///
/// A rate is judged over 100 ms, in which one slice more or less is 3 %; and a reset serves all slices that end within
/// [`RESET_GAP`](super::RESET_GAP), so a slice outlasts it.
pub const SLICE: Nanos = 3_000_000;
/// Few pages that cost less are one more: a slice that is over sooner would wait for its reset.
const SHORTEST: Nanos = RESET_GAP + RESET_GAP / 7;
const _: () = assert!(RESET_GAP < SHORTEST && SHORTEST < SLICE && SLICE * 33 <= 100_000_000);
/// How long a vCPU may have dirtied less than its limit and still catch up: one slice, whose pages are paid when it is
/// over, and as much again, which it may lose to an overslept pause or to the host's scheduler (the bound of a window is
/// one slice and this above the limit: `no_window_has_more_than_the_tolerance_on_top`).
const TOLERANCE: Nanos = 2 * SLICE;
/// The most that a vCPU can owe. What others drained from its ring beyond that is forgiven.
pub const MAX_DEBT: Nanos = SECOND;
/// A vCPU that finds its lease lapsed, and its own clock further on by this than at the last charge, gives the controller as
/// long again: both may have stood still. Ten ticks of the slowest controller.
const GRACE: Nanos = SECOND;
const _: () = assert!(GRACE < VmCell::LEASE && LONGEST_SLICE < MAX_DEBT);

/// Slices of a vCPU that rewrites dirty pages grow up to 2^this times.
const MAX_SCALE: u32 = 3;
const LONGEST_SLICE: Nanos = SLICE << MAX_SCALE;

/// What the vCPU is to do before it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Charge {
    /// Pause until then; in the past where nothing is owed.
    pub until: Nanos,
    /// When all of it is paid: later than `until` where the longest pause does not cover it.
    pub due: Nanos,
    /// Pages that it may dirty before its next full exit; `None`: as many as the ring takes.
    pub slice: Option<u32>,
    /// The slice is longer than the limit asks for, because the vCPU mostly rewrites what is dirty already.
    pub scaled: bool,
}

/// One vCPU's virtual clock: it is due at `due`, having paid for every page up to then (GCRA, the leaky bucket of
/// ITU-T I.371). Owned by the vCPU's thread; no call waits or loops.
///
/// Pages of a vCPU that was not limited at its last charge are forgiven: they were allowed when they were written, and
/// a full ring of them, at a low limit, would freeze the guest for seconds.
#[derive(Debug)]
pub struct Pacer {
    /// What was counted up to the last charge; net pages up to there were charged.
    charged: Counts,
    due: Nanos,
    /// When it last turned.
    turned: Nanos,
    /// Until when a lapsed lease counts all the same; 0 while it has not lapsed.
    grace: Nanos,
    limited: bool,
    /// What the limit asked for as a slice at the last charge, and given was that × 2^`scale`: see [`Pacer::slice`].
    nominal: u32,
    scale: u32,
    /// What the net count is while nothing is owed: as charged, or out of its reach where `due` was ahead at the last charge.
    quiet: u32,
}

/// No vCPU dirties so many pages between two turns.
const UNREACHABLE: u32 = 1 << 31;

impl Pacer {
    /// A pacer for a vCPU whose pages up to now are nobody's debt.
    pub fn new(counters: &Counters) -> Self {
        counters.set_needed_pause(0);
        let charged = counters.counts();
        Self { charged, due: 0, turned: 0, grace: 0, limited: false, nominal: 0, scale: 0, quiet: charged.net }
    }

    /// Whether [`Pacer::charge`] has anything to charge or to wait for: one load.
    ///
    /// Wait-free: at most 6 instructions.
    #[inline]
    pub fn owes(&self, counters: &Counters) -> bool {
        counters.net() != self.quiet
    }

    /// Charges the pages metered since the last call, by whomever, and says what follows from it at `now`.
    ///
    /// Idempotent while nothing is metered. A pause that ended early is not lost: the rest is still due.
    ///
    /// Wait-free: at most 720 instructions, and the compiler's divisions of 64 bits on 32-bit machines.
    pub fn charge(&mut self, now: Nanos, vm: &VmCell, penalty: &PenaltyCell, counters: &Counters) -> Charge {
        counters.add_charge();
        let counts = counters.counts();
        let new = counts.since(replace(&mut self.charged, counts));
        // The penalty first: its acquire makes the lease renewed with it visible.
        let Some(terms) = penalty.accept().terms().filter(|_| self.is_held(now, vm)) else {
            (self.limited, self.quiet) = (false, counts.net);
            counters.set_needed_pause(0);
            return Charge { until: now, due: now, slice: None, scaled: false };
        };
        let max_pause = vm.max_pause();
        let run = now.saturating_sub(replace(&mut self.turned, now));
        let (interval, credit, most) = match terms {
            Terms::Pace(interval) => (interval, TOLERANCE, MAX_DEBT),
            // What steers the interval sees what a lump did to the rate: it is not to be paid for twice.
            Terms::Sleep(interval) => (interval, 0, max_pause),
        };
        let was_limited = replace(&mut self.limited, true);
        let cost = interval.of(new.net);
        let after = |unused| self.due.max(now.saturating_sub(unused)).saturating_add(cost);
        let due = if !was_limited {
            now
        } else if credit > 0 {
            // A charge may be more than the tolerance: its slice was scaled, or a pass made room in the middle of it. Who
            // took so long for it owes nothing for it either, and has no credit.
            after(credit).min(after(run.min(LONGEST_SLICE)).max(now))
        } else {
            after(credit)
        };
        self.due = due.max(now.saturating_sub(credit)).min(now.saturating_add(most));
        // Whose debt is at its bound does not catch up: its turns cost more than they may pause.
        if self.due < due && cost > max_pause {
            counters.set_needed_pause(cost);
        } else if self.due <= now.saturating_add(max_pause) {
            counters.set_needed_pause(0);
        }
        self.quiet = if self.due > now { counts.net.wrapping_add(UNREACHABLE) } else { counts.net };
        let until = self.due.min(now.saturating_add(max_pause));
        let nominal = interval
            .pages_for(SLICE)
            .max(interval.pages_for(SHORTEST).saturating_add(1))
            .min(interval.pages_for(max_pause))
            .max(1);
        let nominal = self.slice(nominal, new);
        let unused = interval.pages_for(now.saturating_sub(self.due));
        let slice = match self.due {
            // What one pause does not cover stays owed, and the vCPU goes on page by page.
            due if due > until => 1,
            // No slice may cost more than the tolerance: who writes it slower than allowed owes nothing for it.
            _ => nominal.saturating_add(unused).min(interval.pages_for(credit)).max(nominal),
        };
        Charge { until, due: self.due, slice: Some(slice), scaled: self.scale > 0 }
    }

    /// Whether penalties are in force at `now`. A lease lapses by time that the vCPU saw go by: after a jump of its clock
    /// (the process was stopped, or the vCPU idle) the controller has [`GRACE`] to tick, once for each lapse.
    fn is_held(&mut self, now: Nanos, vm: &VmCell) -> bool {
        if vm.is_leased(now) {
            self.grace = 0;
            return true;
        }
        if self.limited && self.grace == 0 && now.saturating_sub(self.turned) >= GRACE {
            self.grace = now.saturating_add(GRACE);
        }
        self.limited && now < self.grace
    }

    /// Nothing is dirty any more: the next slice is a plain one. For who hands out the dirty log.
    pub(crate) fn forget_scale(&mut self) {
        self.scale = 0;
    }

    /// Nothing that is dirtied up to the next charge is owed: for a vCPU that is left to fill its ring, because nothing else can
    /// end a slice.
    pub(crate) fn forgive(&mut self) {
        self.limited = false;
    }

    /// The next slice. A slice is used up by entries, but paid for by net pages: a vCPU that mostly rewrites what is dirty
    /// already owes little, so its slices grow, or it would exit, and have the VM reset, for every few pages it touches.
    fn slice(&mut self, nominal: u32, new: Counts) -> u32 {
        let before = replace(&mut self.nominal, nominal);
        if nominal.abs_diff(before) > before / 4 {
            self.scale = 0; // another limit
        } else if new.gross >= nominal {
            let mostly_again = new.net < new.gross.div_ceil(2);
            self.scale = if mostly_again { (self.scale + 1).min(MAX_SCALE) } else { 0 };
        }
        nominal.saturating_mul(1 << self.scale)
    }
}

#[cfg(test)]
mod tests;
