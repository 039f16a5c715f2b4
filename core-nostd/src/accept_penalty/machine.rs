//! ACCEPT PENALTY, whole: one vCPU between two KVM_RUNs, without a clock, a lock or a system call.
//!
//! ```text
//!  begin ─► Harvest ─► harvested ┐         ┌► Pause ─► paused ─► (charge again, if the penalty changed)
//!           (lock had, metered)  ├► charge ┤
//!  begin ────────────────────────┘         └► Reset ─► reset_later · reset_done ─► Enter
//! ```
//! What happened goes in with the time, the next [`Step`] comes out. Its driver (an adapter, a simulator, a model)
//! takes the step and says how it went: with [`Machine::busy`] where the VM's lock was not to be had.

use core::mem::{replace, take};

use super::RESET_GAP;
use super::pacer::{Charge, Pacer, SLICE};
use super::run_time::{self, RunTime, TIMERS};
use super::vcpu_ring::VcpuRing;
use crate::rate::Nanos;
use crate::ring::Entry;
use crate::set_penalty::{Penalty, VmCell};
use crate::vcpu_cell::VcpuCell;

/// The most entries that are collected for one reset, so that nobody waits for longer than a fraction of a millisecond (the
/// largest ring of today's kernels takes sixteen); and the room that a vCPU without a limit waits for.
pub const BATCH: u32 = 4096;
/// When a thread that did not get the lock tries again: the kernel's timer slack, before which nobody wakes (PR_SET_TIMERSLACK).
const RETRY: Nanos = 50_000;
/// A ring is wedged after this number of full exits in a row that moved nothing; from the tenth on each is waited for by 1 ms.
const WEDGED: u32 = 64;
const _: () = assert!(RETRY * 4 < RESET_GAP && RESET_GAP < SLICE);

/// What the vCPU's thread is to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Step {
    /// Take the VM's lock, meter the vCPU's ring, and call [`Machine::harvested`].
    Harvest,
    /// Pause until then, or until the penalty is no longer this one or the VMM wants its thread, and call
    /// [`Machine::paused`]. In the past: look only whether the VMM wants its thread.
    Pause {
        /// When the pause is over.
        until: Nanos,
        /// The penalty that it is paid under.
        penalty: Penalty,
    },
    /// Take the VM's lock and ask [`Machine::reset_later`]; unless that has another step, grant what all vCPUs ask for, by
    /// one reset, and call [`Machine::reset_done`].
    Reset,
    /// Enter the guest.
    Enter(Run),
    /// The VMM wants its thread back. What is owed stays owed.
    Return(Run),
    /// Nothing ends this: the ring is said to be full, that number of times in a row, and nothing moves.
    Wedged(u32),
}

/// How the run that comes is to end where the ring does not end it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Run {
    /// Kick the vCPU after it has run for that long.
    pub kick_after: Option<Nanos>,
    /// Make the CPU hand its pages over, by a timer's interrupt, when it has run for that long: earliest first. Call
    /// [`Machine::armed`] just before.
    pub timers: Option<[Nanos; TIMERS]>,
}

/// Why a pause ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Its time was over.
    Due,
    /// The penalty is another.
    Changed,
    /// The VMM wants KVM_RUN to be entered, and left at once.
    Hurry,
    /// The VMM wants its thread back.
    Wanted,
}

/// One vCPU's way from an exit to the next entry. Owned by the vCPU's thread; no call waits or loops.
#[derive(Debug)]
pub struct Machine {
    pacer: Pacer,
    run_time: RunTime,
    /// Runs can be ended from outside, wherever the ring is.
    kicks: bool,
    /// A vCPU whose slice is smaller than that can wait for others' resets.
    patient_below: u32,
    /// A full exit has not been served.
    full: bool,
    /// KVM_RUN has returned with a full ring, which was not judged yet.
    exited: bool,
    /// It was last let go before its slice was freed: others may do so while it runs.
    unserved: bool,
    /// The slice last given, where only a kick can end it; and where timers are to make the CPU hand its pages over.
    kicked_slice: Option<u32>,
    timed_slice: Option<u32>,
    /// The run to come, or the one that is over, where a kick or timers are to end it.
    run: Option<Ending>,
    /// The run that is over had no page, so that no wait is to follow the pause before it: both are one to the guest.
    barren: bool,
    /// Ring entries counted at the end of the last pause.
    rested: u32,
    /// Full exits in a row that moved nothing, and the ring entries counted at the last of either kind.
    idle: u32,
    idle_gross: u32,
    call: Call,
}

/// A run that a kick or timers are to end.
#[derive(Clone, Copy, Debug)]
struct Ending {
    /// Ring entries counted when it began.
    gross: u32,
    timers: Timers,
}

#[derive(Clone, Copy, Debug)]
enum Timers {
    None,
    /// They were armed then.
    Armed(Nanos),
    /// They were armed, and the run took that time.
    Over(Nanos),
}

/// From [`Machine::begin`] to the entry.
#[derive(Debug)]
struct Call {
    /// No reset is waited for beyond, however often the limit changes meanwhile; and a gap later the vCPU is let through,
    /// come what may.
    latest: Nanos,
    /// It has not paused yet.
    is_new: bool,
    /// The ring was metered and charged, not left to another thread that has the lock; under which penalty; and whether there
    /// was a limit, and time to wait for others' resets.
    charged: bool,
    penalty: Penalty,
    limited: bool,
    patient: bool,
    until: Nanos,
}

impl Machine {
    /// A vCPU whose pages up to now are nobody's debt. `kicks`: runs can be ended from outside, wherever the ring is;
    /// `timers`: else by timers, where the CPU hands its pages over in lumps.
    pub fn new(cell: &VcpuCell, ring_entries: u32, kicks: bool, timers: bool) -> Self {
        Self {
            pacer: Pacer::new(&cell.counters),
            run_time: if timers { RunTime::with_timers() } else { RunTime::new() },
            kicks,
            patient_below: ring_entries / 2,
            full: false,
            exited: false,
            unserved: false,
            kicked_slice: None,
            timed_slice: None,
            run: None,
            barren: false,
            rested: 0,
            idle: 0,
            idle_gross: cell.counters.counts().gross,
            call: Call {
                latest: 0,
                is_new: true,
                charged: false,
                penalty: Penalty::NONE,
                limited: false,
                patient: false,
                until: 0,
            },
        }
    }

    /// Whether the vCPU may enter as it is: one load.
    #[inline]
    pub fn is_quiet(&self, cell: &VcpuCell) -> bool {
        !self.full && self.run.is_none() && !self.pacer.owes(&cell.counters)
    }

    /// Whether a kick or timers were to end the run that is over, which nobody metered yet.
    #[inline]
    pub const fn is_run_over(&self) -> bool {
        self.run.is_some()
    }

    /// KVM_RUN returned with a full ring.
    pub fn full_exit(&mut self, cell: &VcpuCell) {
        cell.counters.add_full_exit();
        (self.full, self.exited) = (true, true);
    }

    /// The run is over, and the vCPU is about to enter again.
    ///
    /// Wait-free: at most 1100 instructions, [`Pacer::charge`] among them.
    pub fn begin(&mut self, now: Nanos, vm: &VmCell, cell: &VcpuCell) -> Step {
        if let Some(Ending { timers, .. }) = &mut self.run {
            if let Timers::Armed(armed) = *timers {
                *timers = Timers::Over(now.saturating_sub(armed));
            }
        }
        (self.call.latest, self.call.is_new) = (now.saturating_add(vm.max_pause()), true);
        self.recharge(now, vm, cell)
    }

    /// Charges what was metered, where nobody needs the lock for that.
    ///
    /// Wait-free: at most 1000 instructions, [`Pacer::charge`] among them.
    fn recharge(&mut self, now: Nanos, vm: &VmCell, cell: &VcpuCell) -> Step {
        // Before the charge, so that no change between the two goes unseen.
        (self.call.charged, self.call.limited, self.call.penalty) = (false, false, cell.penalty.accept());
        if self.full || self.kicks {
            return Step::Harvest;
        }
        let charge = self.pacer.charge(now, vm, &cell.penalty, &cell.counters);
        self.timed_slice = self.timed_slice.filter(|_| charge.slice.is_some());
        self.decide(now, charge, cell)
    }

    /// The VM's lock is somebody else's.
    ///
    /// Wait-free: at most 200 instructions.
    pub fn busy(&mut self, now: Nanos, cell: &VcpuCell) -> Step {
        self.pause_until(now.saturating_add(RETRY), now, cell)
    }

    /// The ring was metered, under the VM's lock: charges that and asks for the next slice. `has_timers`: there are some to
    /// make the CPU hand its pages over.
    pub fn harvested<E: AsRef<[Entry]>>(
        &mut self,
        now: Nanos,
        vm: &VmCell,
        cell: &VcpuCell,
        vcpu: &mut VcpuRing<E>,
        has_timers: bool,
    ) -> Step {
        match self.full {
            true if self.exited && !self.unserved => vcpu.ring.full_exit_of_kvm(),
            true => vcpu.ring.full_exit(),
            false => {}
        }
        if !vcpu.scaled {
            self.pacer.forget_scale();
        }
        let mut charge = self.pacer.charge(now, vm, &cell.penalty, &cell.counters);
        let limited = charge.slice.is_some();
        let in_lumps = limited && !self.kicks && vcpu.ring.has_lumps();
        let is_timed = in_lumps && has_timers;
        let slice = charge.slice.unwrap_or(BATCH);
        // Timers are not exact: whatever is handed over from half a slice on ends it.
        let room = if is_timed { slice.div_ceil(2) } else { slice };
        let waits = vcpu.ring.to_collect(room) > 0 || (self.full && vcpu.ring.awaiting_reset() > 0);
        vcpu.ask(cell, if waits { room } else { 0 });
        let gross = cell.counters.counts().gross;
        self.barren = gross == self.rested;
        let kicked_slice = charge.slice.filter(|slice| self.kicks && !vcpu.ends(*slice));
        let given = self.kicked_slice.or(replace(&mut self.timed_slice, charge.slice.filter(|_| is_timed)));
        let penalty = cell.penalty.accept();
        let was_to_be_kicked = self.learn(given.unwrap_or(slice), gross);
        let may_fill = was_to_be_kicked && kicked_slice.is_some() && !vcpu.is_draining();
        if may_fill && self.run_time.is_to_fill(penalty, vcpu.ring.room()) {
            self.pacer.forgive();
            charge.until = now;
        }
        // Others kick too: a limit that is news, a round that has emptied the ring, the VMM.
        let may_be_barren = was_to_be_kicked || self.kicks && !self.full;
        if may_be_barren && !run_time::is_to_pause(penalty, gross.wrapping_sub(self.rested), vm.max_pause()) {
            charge.until = charge.until.min(now);
        }
        if in_lumps && run_time::is_to_pay_all(penalty, &charge, now, is_timed) {
            cell.counters.add_overlong_pause();
            charge.until = charge.due;
        }
        let by_ring = charge.slice.filter(|_| kicked_slice.is_none()).map(|_| room);
        vcpu.assign(by_ring, limited, charge.scaled);
        // A kick is not exact: half a slice, give or take as much, is no more than one.
        self.kicked_slice = kicked_slice.map(|slice| slice.div_ceil(2));
        if take(&mut self.exited) {
            // What others took from the ring since the last full exit was counted, too.
            let moved = gross != replace(&mut self.idle_gross, gross) || vcpu.ring.occupied() > 0;
            self.idle = if moved { 0 } else { self.idle.saturating_add(1) };
            match self.idle {
                0 => {}
                exits if exits < WEDGED => charge.until = charge.until.max(now.saturating_add(1000 << exits.min(10))),
                exits => {
                    self.unserved = cell.request.stands();
                    return Step::Wedged(exits);
                }
            }
        }
        self.decide(now, charge, cell)
    }

    /// Learns from the run that is over, which was given `slice`; whether a kick or timers were to end it.
    fn learn(&mut self, slice: u32, gross: u32) -> bool {
        let Some(run) = self.run.take() else {
            self.run_time.begin();
            return false;
        };
        let pages = gross.wrapping_sub(run.gross);
        match run.timers {
            Timers::Over(took) => self.run_time.learn_timed(took, slice, pages),
            Timers::None | Timers::Armed(_) => self.run_time.learn(slice, pages),
        }
        true
    }

    #[inline]
    fn decide(&mut self, now: Nanos, charge: Charge, cell: &VcpuCell) -> Step {
        let is_short = charge.slice.is_some_and(|slice| slice < self.patient_below);
        (self.call.charged, self.call.limited) = (true, charge.slice.is_some());
        self.call.patient = is_short && !charge.scaled && !self.barren;
        if self.call.is_new {
            // A lump may take longer.
            self.call.latest = self.call.latest.max(charge.until);
        }
        self.pause_until(charge.until.min(self.call.latest), now, cell)
    }

    #[inline]
    fn pause_until(&mut self, until: Nanos, now: Nanos, cell: &VcpuCell) -> Step {
        if !replace(&mut self.call.is_new, false) && now >= self.call.latest.saturating_add(RESET_GAP) {
            return Step::Enter(self.run(cell));
        }
        self.call.until = until;
        Step::Pause { until, penalty: self.call.penalty }
    }

    /// A pause that began at `from` is over at `now`.
    ///
    /// Wait-free: at most 1400 instructions, [`Pacer::charge`] among them.
    pub fn paused(&mut self, from: Nanos, now: Nanos, ended: Ended, vm: &VmCell, cell: &VcpuCell) -> Step {
        if self.has_paused(from) {
            cell.counters.add_pause(now.saturating_sub(from));
            self.rested = cell.counters.counts().gross;
        }
        if ended == Ended::Wanted {
            return Step::Return(self.run(cell));
        }
        if ended == Ended::Changed || ended == Ended::Due && !self.call.charged {
            return self.recharge(now, vm, cell);
        }
        if ended == Ended::Due {
            if cell.request.stands() {
                return Step::Reset;
            }
            self.full = false;
        }
        Step::Enter(self.run(cell))
    }

    /// Whether what a vCPU has waited for since `from` was a pause under a limit.
    pub fn has_paused(&self, from: Nanos) -> bool {
        self.call.until > from && self.call.limited
    }

    /// Under the VM's lock, with slices last freed at `last`: what to do first, where a reset is better shared with vCPUs that
    /// will want one soon. `None`: reset now.
    ///
    /// Wait-free: at most 260 instructions.
    pub fn reset_later(&mut self, now: Nanos, last: Nanos, vm: &VmCell, cell: &VcpuCell) -> Option<Step> {
        let gap = RESET_GAP.min(vm.max_pause() / 10 * 9);
        let next = last.saturating_add(gap).min(self.call.latest);
        (now < next && self.call.patient).then(|| self.pause_until(next, now, cell))
    }

    /// A reset has granted what it could.
    ///
    /// Wait-free: at most 360 instructions.
    pub fn reset_done(&mut self, now: Nanos, cell: &VcpuCell) -> Step {
        // What is left over is for the next full exit.
        let left = cell.request.stands();
        self.full &= left;
        if left { self.busy(now, cell) } else { Step::Enter(self.run(cell)) }
    }

    #[inline]
    fn run(&mut self, cell: &VcpuCell) -> Run {
        self.unserved = cell.request.stands();
        let run = Run {
            kick_after: self.kicked_slice.map(|_| self.run_time.get()),
            timers: self.timed_slice.map(|_| self.run_time.timers()),
        };
        if run != Run::default() {
            self.run = Some(Ending { gross: cell.counters.counts().gross, timers: Timers::None });
        }
        run
    }

    /// The timers of the run to come are armed now.
    pub const fn armed(&mut self, now: Nanos) {
        if let Some(run) = &mut self.run {
            run.timers = Timers::Armed(now);
        }
    }

    /// A reset, or the VM's lock, was in error: the call is over.
    pub fn failed(&mut self, cell: &VcpuCell) {
        self.unserved = cell.request.stands();
    }
}

#[cfg(test)]
mod tests;
