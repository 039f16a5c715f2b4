//! SET PENALTY and the wait-free half of ACCEPT PENALTY: what the controller tells a vCPU, and what the vCPU tells back.

use crate::rate::{EmissionInterval, Nanos};
use crate::sync::{Ordering, Word, const_fn};

/// What a vCPU owes for each page that it dirties, in one 32-bit word.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Penalty(u32);

/// What the interval of a page buys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Terms {
    /// Time, run or paused: the vCPU pauses until it has spent `interval` on each page. Holds a rate by itself.
    Pace(EmissionInterval),
    /// Sleep on top of the time that the page took. Holds a rate only if somebody steers the interval.
    Sleep(EmissionInterval),
}

impl Terms {
    /// What one page costs under them.
    #[inline]
    pub const fn interval(self) -> EmissionInterval {
        match self {
            Self::Pace(interval) | Self::Sleep(interval) => interval,
        }
    }
}

impl Penalty {
    /// The vCPU is not limited.
    pub const NONE: Self = Self(0);
    const SLEEP: u32 = EmissionInterval::BITS + 1;

    /// The penalty with `terms`; free pages are no penalty.
    pub const fn new(terms: Terms) -> Self {
        match terms {
            Terms::Pace(interval) => Self(interval.bits()),
            Terms::Sleep(interval) if interval.bits() == 0 => Self::NONE,
            Terms::Sleep(interval) => Self(Self::SLEEP | interval.bits()),
        }
    }

    /// Its terms; `None` where the vCPU is not limited.
    #[inline]
    pub const fn terms(self) -> Option<Terms> {
        let interval = EmissionInterval::from_bits(self.0);
        match self.0 {
            0 => None,
            word if word & Self::SLEEP == 0 => Some(Terms::Pace(interval)),
            _ => Some(Terms::Sleep(interval)),
        }
    }
}

impl core::fmt::Debug for Penalty {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.terms().fmt(f)
    }
}

/// The controller's word to one vCPU, on a cache line of its own. Wait-free on both sides: one store, one load.
#[derive(Debug)]
#[repr(align(64))]
pub struct PenaltyCell(Word);

impl PenaltyCell {
    const_fn! {
        /// No penalty.
        pub fn new() -> Self {
            Self(Word::new(Penalty::NONE.0))
        }
    }

    /// SET PENALTY: one store, by the controller alone (under its lock, so that the last call wins).
    ///
    /// Wait-free: at most 3 instructions.
    pub fn set(&self, penalty: Penalty) {
        // Release: pairs with the acquire in `accept`, so that whoever sees the penalty sees the lease renewed before it.
        self.0.store(penalty.0, Ordering::Release);
    }

    /// ACCEPT PENALTY: one load, from any thread; never older than one already seen.
    ///
    /// Wait-free: at most 3 instructions.
    #[inline]
    pub fn accept(&self) -> Penalty {
        // Acquire: pairs with the release in `set`.
        Penalty(self.0.load(Ordering::Acquire))
    }
}

impl Default for PenaltyCell {
    fn default() -> Self {
        Self::new()
    }
}

/// The controller's words to all vCPUs of a VM, on a cache line of their own: its lease, and how to pause.
#[derive(Debug)]
#[repr(align(64))]
pub struct VmCell {
    /// Time of the last tick, in units of 2²⁶ ns (67 ms; wraps in nine years). Written by `tick` alone.
    renewed: Word,
    /// The longest pause, in µs; 1 and up. Written by the control plane.
    max_pause: Word,
    /// When the dirty log was last taken, in the unit of `renewed`; 0: never. Written by the thread that takes it.
    taken: Word,
}

impl VmCell {
    /// Penalties lapse when no tick has come for this long: a dead controller cannot hold a guest. A vCPU whose own clock
    /// jumped meanwhile (it was stopped, or idle) gives the controller a second more.
    pub const LEASE: Nanos = 5 * crate::rate::SECOND;
    /// A dirty log that was last taken this long ago counts as one that nobody takes.
    const TAKEN: Nanos = 60 * crate::rate::SECOND;
    const UNIT_BITS: u32 = 26;
    /// 10 ms, in µs.
    const DEFAULT_MAX_PAUSE: u32 = 10_000;

    const_fn! {
        /// No lease yet; pauses of at most 10 ms.
        pub fn new() -> Self {
            Self { renewed: Word::new(0), max_pause: Word::new(Self::DEFAULT_MAX_PAUSE), taken: Word::new(0) }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "compared modulo 2^32")]
    const fn stamp(now: Nanos) -> u32 {
        (now >> Self::UNIT_BITS) as u32
    }

    /// Every penalty holds for [`VmCell::LEASE`] from `now` on.
    pub(crate) fn renew(&self, now: Nanos) {
        // Relaxed: published by the release in `PenaltyCell::set`; for an older penalty a late view only lets it lapse
        // and be renewed.
        self.renewed.store(Self::stamp(now), Ordering::Relaxed);
    }

    /// Whether the last tick is recent enough at `now`; a clock some ticks behind the controller's counts as recent.
    ///
    /// Wait-free: at most 10 instructions.
    pub fn is_leased(&self, now: Nanos) -> bool {
        // Relaxed: the acquire in `PenaltyCell::accept`, before this, pairs with the release after `renew`.
        let age = Self::stamp(now).wrapping_sub(self.renewed.load(Ordering::Relaxed));
        let term = Self::stamp(Self::LEASE) + 1; // stamps are rounded down
        age <= term || age.wrapping_neg() <= term
    }

    /// Notes that dirty pages were handed out at `now`, so that they count again: from any thread.
    pub fn note_taken(&self, now: Nanos) {
        // Relaxed: a value by itself, for a verdict over seconds.
        self.taken.store(Self::stamp(now).max(1), Ordering::Relaxed);
    }

    /// Whether somebody took the dirty log in the minute before `now`.
    pub(crate) fn is_taken(&self, now: Nanos) -> bool {
        // Relaxed: as above.
        let taken = self.taken.load(Ordering::Relaxed);
        let age = Self::stamp(now).wrapping_sub(taken);
        taken != 0 && (age <= Self::stamp(Self::TAKEN) || age.wrapping_neg() <= Self::stamp(Self::TAKEN))
    }

    /// The longest single pause.
    ///
    /// Wait-free: at most 4 instructions.
    pub fn max_pause(&self) -> Nanos {
        // Relaxed: a value by itself.
        Nanos::from(self.max_pause.load(Ordering::Relaxed)) * 1000
    }

    /// Sets the longest single pause, rounded to 1 µs, from 100 µs to 1 s.
    pub fn set_max_pause(&self, pause: Nanos) {
        let micros = (pause / 1000).clamp(100, 1_000_000) as u32;
        // Relaxed: a value by itself.
        self.max_pause.store(micros, Ordering::Relaxed);
    }
}

impl Default for VmCell {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::{PageRate, SECOND};

    #[test]
    fn a_penalty_keeps_its_terms() {
        for rate in [1, 256, 25_600, 10_485_760, u32::MAX] {
            let interval = PageRate::from_pages_per_sec(rate).interval();
            for terms in [Terms::Pace(interval), Terms::Sleep(interval)] {
                assert_eq!(Penalty::new(terms).terms(), Some(terms));
            }
        }
        assert_eq!(Penalty::new(Terms::Sleep(EmissionInterval::FREE)), Penalty::NONE);
        assert_eq!(Penalty::new(Terms::Pace(EmissionInterval::FREE)).terms(), None);
    }

    #[test]
    fn the_two_directions_do_not_share_a_line() {
        assert_eq!((size_of::<PenaltyCell>(), align_of::<PenaltyCell>()), (64, 64));
        assert_eq!((size_of::<VmCell>(), align_of::<VmCell>()), (64, 64));
    }

    #[test]
    fn a_lease_lapses_and_is_renewed_across_the_wrap() {
        for start in [SECOND, (1 << (32 + VmCell::UNIT_BITS)) - SECOND, Nanos::MAX - 20 * SECOND] {
            let vm = VmCell::new();
            vm.renew(start);
            assert!(vm.is_leased(start) && vm.is_leased(start + VmCell::LEASE));
            assert!(vm.is_leased(start - SECOND), "a vCPU may have read its clock before the tick");
            assert!(!vm.is_leased(start + VmCell::LEASE + SECOND));
            vm.renew(start + VmCell::LEASE + SECOND);
            assert!(vm.is_leased(start + VmCell::LEASE + SECOND));
        }
    }

    #[test]
    fn a_log_is_taken_for_a_minute_and_was_never_taken_at_first() {
        let vm = VmCell::new();
        assert!(!vm.is_taken(0) && !vm.is_taken(1000 * SECOND));
        for now in [0, 1000 * SECOND] {
            vm.note_taken(now);
            assert!(vm.is_taken(now) && vm.is_taken(now + 59 * SECOND) && !vm.is_taken(now + 62 * SECOND));
        }
        assert!(vm.is_taken(999 * SECOND), "a tick may have read its clock before");
    }

    #[test]
    fn a_pause_has_bounds() {
        let vm = VmCell::new();
        assert_eq!(vm.max_pause(), 10_000_000);
        for (asked, got) in [(0, 100_000), (2_000_500, 2_000_000), (Nanos::MAX, SECOND)] {
            vm.set_max_pause(asked);
            assert_eq!(vm.max_pause(), got);
        }
    }
}
