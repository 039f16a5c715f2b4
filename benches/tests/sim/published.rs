//! QEMU's dirty limit, to show what its faults do. Its rule as published (QEMU, `system/dirtylimit.c`: `dirtylimit_set_throttle`
//! and what it calls), in our own words; not shipped.
//!
//! Once a second it compares the rate of the last second with the limit, both in whole MiB/s, and changes how long the vCPU
//! sleeps for each full ring. Its faults, none of which [`dirtylimit_core::Stepped`] has: within 25 MiB/s of the limit
//! nothing changes, so a limit of 20 may well be 45; the time in which a ring fills is estimated by the highest rate that
//! *any* vCPU ever had, so every step is the size of the fastest writer's, and a slow one takes many; a sleep is for a whole
//! ring, so a pause is as long as the limit takes for that many pages; and a ring that never fills never sleeps.

use std::cell::Cell;

use dirtylimit_bench::guest::sim::{Fault, Machine};
use dirtylimit_bench::plan::KickKind;
use dirtylimit_core::{EmissionInterval, Nanos, PageRate, Penalty, Policy, RESERVED, SECOND, Sample, Terms};

/// The machine under it: each full ring is emptied, and pauses are as long as they come. Nobody kicks.
pub(crate) const MACHINE: Machine =
    Machine { seed: 1, pml: false, kick: KickKind::Off, steal_time: false, fault: Some(Fault::NothingHeldBack) };

/// MiB/s in which nothing is done.
const TOLERANCE: u64 = 25;
/// Percent of the greater of rate and limit beyond which the sleep changes in proportion.
const LINEAR: u64 = 50;
/// The most that a vCPU sleeps, in times that a ring takes to fill.
const MAX_SLEEP: u64 = 99;
/// How often it looks.
const PERIOD: Nanos = SECOND;

/// The rule.
#[derive(Debug)]
pub(crate) struct Published {
    ring: u32,
    /// MiB/s: the highest rate of any vCPU so far.
    fastest: Cell<u64>,
}

/// What it remembers of a vCPU.
#[derive(Default, Debug)]
pub(crate) struct State {
    pages: u64,
    elapsed: Nanos,
    /// Microseconds for each full ring.
    sleep: u64,
}

impl Published {
    pub(crate) fn new(ring: u32) -> Self {
        Self { ring, fastest: Cell::new(0) }
    }

    fn adjust(&self, sleep: u64, rate: u64, limit: u64) -> u64 {
        let (low, high) = (rate.min(limit), rate.max(limit));
        if high - low <= TOLERANCE {
            return sleep;
        }
        if rate == 0 {
            return 0;
        }
        self.fastest.set(self.fastest.get().max(rate));
        let fill = (u64::from(self.ring) >> 8) * 1_000_000 / self.fastest.get();
        let distance = (high - low) * 100 / high;
        let step = if distance > LINEAR { fill * distance / (100 - distance) } else { fill / 10 };
        let sleep = if rate > limit { sleep + step } else { sleep.saturating_sub(step) };
        sleep.min(fill * MAX_SLEEP)
    }
}

impl Policy for Published {
    type State = State;

    fn penalty(&self, state: &mut State, sample: &Sample, limit: PageRate, _: Penalty) -> Penalty {
        state.pages += u64::from(sample.pages);
        state.elapsed += sample.elapsed;
        if state.elapsed >= PERIOD {
            let rate = (state.pages >> 8) * SECOND / state.elapsed;
            state.sleep = self.adjust(state.sleep, rate, limit.bytes_per_sec(4096) >> 20);
            (state.pages, state.elapsed) = (0, 0);
        }
        Penalty::new(Terms::Sleep(EmissionInterval::split(state.sleep * 1000, self.ring - RESERVED)))
    }
}
