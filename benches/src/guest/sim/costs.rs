//! What the modelled machine's operations take, in ns, from what was measured on a real one; and its dice.

use dirtylimit_core::Nanos;

/// The guest touches a page that it need not fault on.
pub(super) const TOUCH: Nanos = 100;
/// Work that `slow` does between two writes.
pub(super) const SLOW_WORK: Nanos = 10_000;
/// The same of `steady`: a million pages a second, less what the rest takes.
pub(super) const STEADY_WORK: Nanos = 900;
/// Half a period of `burst`.
pub(super) const HALF_PERIOD: Nanos = 100_000_000;
/// The guest counts gaps between two accesses from here on as stalls.
pub(super) const STALL: Nanos = 50_000;
/// The CPU notes a page in its modification log.
pub(super) const LOGGED: Nanos = 60;
/// From the guest to the VMM and back.
pub(super) const EXIT: Nanos = 3_000;
/// From the guest to the kernel and back.
pub(super) const KERNEL_EXIT: Nanos = 1_200;
/// Host timer interrupts, at each of which the CPU hands its modification log over.
pub(super) const TIMER: Nanos = 4_000_000;
/// A reset's system call and its locks.
const RESET: Nanos = 3_000;
/// Collecting and resetting an entry.
const RESET_ENTRY: Nanos = 50;
/// A reset waits until another CPU's TLB is flushed …
const REMOTE_FLUSH: Nanos = 40_000;
/// … which interrupts that CPU for so long.
pub(super) const FLUSHED: Nanos = 2_000;

/// How long a reset of `entries` takes while other vCPUs are in the guest, or none is.
pub(super) fn reset(entries: u32, others_run: bool) -> Nanos {
    RESET + RESET_ENTRY * Nanos::from(entries) + if others_run { REMOTE_FLUSH } else { 0 }
}

/// SplitMix64: small, and good enough for dice.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    /// Dice of their own for each `who`.
    pub(super) fn new(seed: u64, who: u64) -> Self {
        Self(seed ^ who.wrapping_mul(0xd605_bbb5_8c8a_bbc9))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Evenly from `low..high`.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + ((u128::from(self.next()) * u128::from(high - low)) >> 64) as u64
    }

    /// Evenly from `0..count`.
    #[expect(clippy::cast_possible_truncation, reason = "below count")]
    pub(super) fn below(&mut self, count: usize) -> usize {
        self.between(0, count as u64) as usize
    }

    /// A write fault that makes a page writable: 2 to 2.9 µs, so that a free writer touches about 1,500 MiB/s.
    pub(super) fn fault(&mut self) -> Nanos {
        self.between(2_000, 2_900)
    }

    /// How much later than asked a sleeper wakes: 20 to 80 µs, and one in 64 of them up to half a millisecond.
    pub(super) fn oversleep(&mut self) -> Nanos {
        match self.next() % 64 {
            0 => self.between(80_000, MAX_OVERSLEEP),
            _ => self.between(20_000, 80_000),
        }
    }

    /// From the last timer armed until the guest is entered: 2 to 4 µs, and one in 64 times up to 20.
    pub(super) fn entry(&mut self) -> Nanos {
        match self.next() % 64 {
            0 => self.between(4_000, 20_000),
            _ => self.between(2_000, 4_000),
        }
    }

    /// From a timer, or from who sends a signal, until the guest is left: 2 to 10 µs.
    pub(super) fn signal(&mut self) -> Nanos {
        self.between(2_000, 10_000)
    }

    /// The host's scheduler takes the CPU away after so long …
    pub(super) fn undisturbed(&mut self) -> Nanos {
        self.between(2_000_000, 40_000_000)
    }

    /// … and for so long.
    pub(super) fn preempted(&mut self) -> Nanos {
        self.between(5_000, MAX_PREEMPTED)
    }
}

/// The longest that anybody oversleeps.
pub(super) const MAX_OVERSLEEP: Nanos = 500_000;
/// The longest that the scheduler gives a CPU to somebody else.
pub(super) const MAX_PREEMPTED: Nanos = 150_000;
