//! PREPARE: what a vCPU's ring told, as counters that anyone may read, and the dirty page rate made of them.

use core::mem::take;

use crate::rate::{Nanos, PageRate};
use crate::sync::{Ordering, Word, const_fn};

/// What is known of one vCPU's dirtying: free-running counters that wrap, behind the controller's cache line.
///
/// Each has one writer at a time, so adding is a load and a store, wait-free where there is no fetch-and-add. Readers
/// take differences within 2³² of each other.
#[derive(Debug)]
pub struct Counters {
    /// Pages newly dirty since each was last published. Written by whoever owns the ring.
    net: Word,
    /// The guest's ring entries. Written by the ring's owner.
    gross: Word,
    /// Exits with a full ring. Written by the vCPU's thread.
    full_exits: Word,
    /// Microseconds paused. Written by the vCPU's thread.
    paused: Word,
    /// Not a counter: microseconds of pause that a turn needs while the vCPU falls behind. Written by the vCPU's thread.
    needed_pause: Word,
    /// How often the vCPU's thread has settled. Written by it.
    charges: Word,
    /// How often it has paused for longer than the longest pause. Written by it.
    overlong: Word,
}

/// [`Counters`] as read, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Pages newly dirty.
    pub net: u32,
    /// The guest's ring entries; KVM's own (its steal-time page, say) are in the net pages alone, where they are new.
    pub gross: u32,
    /// Exits with a full ring.
    pub full_exits: u32,
    /// Microseconds paused.
    pub paused: u32,
}

impl Counts {
    /// What was counted since `earlier`.
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            net: self.net.wrapping_sub(earlier.net),
            gross: self.gross.wrapping_sub(earlier.gross),
            full_exits: self.full_exits.wrapping_sub(earlier.full_exits),
            paused: self.paused.wrapping_sub(earlier.paused),
        }
    }
}

fn add(word: &Word, count: u32) {
    // Relaxed: one writer at a time, which the ring's lock or being the vCPU's thread provides; a count carries nothing
    // else with it.
    word.store(word.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

impl Counters {
    const_fn! {
        /// Nothing counted.
        pub fn new() -> Self {
            Self {
                net: Word::new(0),
                gross: Word::new(0),
                full_exits: Word::new(0),
                paused: Word::new(0),
                needed_pause: Word::new(0),
                charges: Word::new(0),
                overlong: Word::new(0),
            }
        }
    }

    /// Counts metered pages that are newly dirty, and the guest's entries. For the ring's owner alone.
    ///
    /// Wait-free: at most 7 instructions.
    pub fn add_pages(&self, net: u32, gross: u32) {
        add(&self.net, net);
        add(&self.gross, gross);
    }

    /// Counts an exit with a full ring. For the vCPU's thread alone.
    ///
    /// Wait-free: at most 4 instructions.
    pub fn add_full_exit(&self) {
        add(&self.full_exits, 1);
    }

    /// Counts a pause, in µs rounded down. For the vCPU's thread alone.
    ///
    /// Wait-free: at most 12 instructions, and a division by the compiler on 32-bit machines.
    pub fn add_pause(&self, pause: Nanos) {
        #[expect(clippy::cast_possible_truncation, reason = "a counter that wraps")]
        add(&self.paused, (pause / 1000) as u32);
    }

    /// Says what pause a turn would need that the vCPU does not get, so that it exceeds its limit; 0 while it keeps up. For
    /// the vCPU's thread alone.
    ///
    /// Wait-free: at most 15 instructions, and a division by the compiler on 32-bit machines.
    pub fn set_needed_pause(&self, pause: Nanos) {
        // Relaxed: a value by itself.
        self.needed_pause.store(u32::try_from(pause / 1000).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// What was said so, rounded down to 1 µs.
    pub fn needed_pause(&self) -> Nanos {
        // Relaxed: a value by itself.
        Nanos::from(self.needed_pause.load(Ordering::Relaxed)) * 1000
    }

    /// Counts a settlement. For the vCPU's thread alone.
    ///
    /// Wait-free: at most 4 instructions.
    pub fn add_charge(&self) {
        add(&self.charges, 1);
    }

    /// Settlements so far; wraps.
    pub fn charges(&self) -> u32 {
        // Relaxed: a count by itself.
        self.charges.load(Ordering::Relaxed)
    }

    /// Counts a pause that is longer than the longest, for a lump that nothing can end. For the vCPU's thread alone.
    ///
    /// Wait-free: at most 4 instructions.
    pub fn add_overlong_pause(&self) {
        add(&self.overlong, 1);
    }

    /// Pauses so counted; wraps.
    pub fn overlong_pauses(&self) -> u32 {
        // Relaxed: a count by itself.
        self.overlong.load(Ordering::Relaxed)
    }

    /// The net count: one load.
    ///
    /// Wait-free: at most 2 instructions.
    #[inline]
    pub fn net(&self) -> u32 {
        // Relaxed: a count by itself; the vCPU pays for what it sees, the rest at its next look.
        self.net.load(Ordering::Relaxed)
    }

    /// All counters.
    pub fn counts(&self) -> Counts {
        // Relaxed: as `net`.
        let load = |word: &Word| word.load(Ordering::Relaxed);
        Counts {
            net: self.net(),
            gross: load(&self.gross),
            full_exits: load(&self.full_exits),
            paused: load(&self.paused),
        }
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self::new()
    }
}

/// Sums since the vCPU was registered, which do not wrap.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Totals {
    /// Pages newly dirty since each was last published: what a migration has to send.
    pub net_pages: u64,
    /// The guest's ring entries: net pages, and those re-protected and written again before they were published.
    pub gross_pages: u64,
    /// Exits with a full ring.
    pub full_exits: u64,
    /// Microseconds paused.
    pub paused_us: u64,
}

impl Totals {
    /// These and `counts` more.
    pub const fn plus(self, counts: Counts) -> Self {
        Self {
            net_pages: self.net_pages.wrapping_add(counts.net as u64),
            gross_pages: self.gross_pages.wrapping_add(counts.gross as u64),
            full_exits: self.full_exits.wrapping_add(counts.full_exits as u64),
            paused_us: self.paused_us.wrapping_add(counts.paused as u64),
        }
    }
}

/// The controller's view of one vCPU's [`Counters`].
#[derive(Clone, Copy, Default, Debug)]
pub struct RateEstimator {
    seen: Counts,
    /// Folded into the totals, but not yet in a sample.
    unread: Unread,
    totals: Totals,
    rate: PageRate,
    demand: PageRate,
}

#[derive(Clone, Copy, Default, Debug)]
struct Unread {
    net: u32,
    /// In µs.
    paused: u32,
}

/// What a vCPU did between two ticks.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sample {
    /// Net pages.
    pub pages: u32,
    /// Nanoseconds between the ticks.
    pub elapsed: Nanos,
    /// Of those, paused.
    pub paused: Nanos,
}

impl RateEstimator {
    /// An estimator that starts from what the counters hold now.
    pub fn starting_at(counts: Counts) -> Self {
        Self { seen: counts, ..Self::default() }
    }

    /// Adds what was counted since the last call to the totals; to be called before a counter can wrap (2³² pages, or
    /// 71 minutes of pauses). Readings come out as without it.
    pub fn fold(&mut self, counters: &Counters) {
        let counts = counters.counts();
        let new = counts.since(self.seen);
        self.seen = counts;
        self.totals = self.totals.plus(new);
        let Unread { net, paused } = self.unread;
        self.unread = Unread { net: net.saturating_add(new.net), paused: paused.saturating_add(new.paused) };
    }

    /// Reads the counters, `elapsed` after the last sample; folds.
    pub fn read(&mut self, counters: &Counters, elapsed: Nanos) -> Sample {
        self.fold(counters);
        let new = take(&mut self.unread);
        let paused = Nanos::from(new.paused) * 1000;
        if elapsed > 0 {
            self.rate = smooth(self.rate, PageRate::measured(new.net, elapsed), elapsed);
            // Pauses end between ticks, so one sample may hold more than its share of them: at most all of it. Demand
            // follows at once, so that who has stopped frees its share; but who was only paused has shown none.
            let ran = elapsed.saturating_sub(paused);
            if new.net > 0 || ran >= elapsed / 4 {
                self.demand = PageRate::measured(new.net, ran.max(elapsed / 64));
            }
        }
        Sample { pages: new.net, elapsed, paused }
    }

    /// The counters as last read.
    pub(crate) fn counts(&self) -> Counts {
        self.seen
    }

    /// The smoothed dirty page rate.
    pub fn rate(&self) -> PageRate {
        self.rate
    }

    /// The rate that the vCPU would have without its pauses: pages over running time, between the last two samples.
    pub fn demand(&self) -> PageRate {
        self.demand
    }

    /// The sums up to now, from the counters.
    pub fn totals(&self, counters: &Counters) -> Totals {
        self.totals.plus(counters.counts().since(self.seen))
    }
}

/// A first-order low pass: after [`SMOOTHING`] half of a step has come through, and after twice that all of it.
fn smooth(old: PageRate, new: PageRate, elapsed: Nanos) -> PageRate {
    let weight = elapsed.min(2 * SMOOTHING) / (2 * SMOOTHING / 64); // of 64
    PageRate::from_raw((old.raw() * (64 - weight) + new.raw() * weight) / 64)
}

/// Time constant of the rates that people see: long against a slice, short against a person's patience.
const SMOOTHING: Nanos = 50_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::SECOND;

    #[test]
    fn a_steady_writer_is_measured_across_the_wrap() {
        let counters = Counters::new();
        counters.add_pages(u32::MAX - 700, u32::MAX - 700);
        let mut estimator = RateEstimator::starting_at(counters.counts());
        for _ in 0..20 {
            counters.add_pages(256, 512);
            counters.add_pause(9_000_000);
            counters.add_full_exit();
            counters.add_overlong_pause();
            let sample = estimator.read(&counters, SECOND / 100);
            assert_eq!(sample, Sample { pages: 256, elapsed: SECOND / 100, paused: 9_000_000 });
        }
        let totals = estimator.totals(&counters);
        assert_eq!((totals.net_pages, totals.gross_pages, totals.paused_us), (20 * 256, 20 * 512, 180_000));
        assert_eq!((totals.full_exits, counters.overlong_pauses()), (20, 20));
        for _ in 0..200 {
            counters.add_pages(256, 512);
            counters.add_pause(9_000_000);
            estimator.read(&counters, SECOND / 100);
        }
        assert!((25_590..=25_600).contains(&estimator.rate().pages_per_sec()), "{:?}", estimator.rate());
        assert!((255_900..=256_000).contains(&estimator.demand().pages_per_sec()), "{:?}", estimator.demand());
        let (rate, demand) = (estimator.rate(), estimator.demand());
        counters.add_pages(1, 1);
        estimator.read(&counters, 0);
        assert_eq!((estimator.rate(), estimator.demand()), (rate, demand), "no time, no rate");
    }

    #[test]
    fn counters_may_wrap_between_two_readings_where_somebody_folds() {
        let counters = Counters::new();
        let mut estimator = RateEstimator::default();
        for round in 1..=6 {
            counters.add_pages(1 << 31, 1 << 31);
            counters.add_pause(1 << 41);
            estimator.fold(&counters);
            let paused_us = round * ((1 << 41) / 1000);
            let totals = estimator.totals(&counters);
            assert_eq!((totals.net_pages, totals.gross_pages, totals.paused_us), (round << 31, round << 31, paused_us));
        }
        let sample = estimator.read(&counters, 1000 * SECOND);
        assert_eq!((sample.pages, sample.paused), (u32::MAX, Nanos::from(u32::MAX) * 1000), "it saturates");
        assert_eq!(estimator.read(&counters, SECOND).pages, 0);
    }

    #[test]
    fn a_reading_is_the_same_whether_or_not_somebody_folded_meanwhile() {
        let counters = Counters::new();
        let [mut folded, mut plain] = [RateEstimator::default(); 2];
        for pages in [100, 7, 3000] {
            counters.add_pages(pages, 2 * pages);
            folded.fold(&counters);
            counters.add_pause(3_000_000);
            folded.fold(&counters);
            assert_eq!(folded.read(&counters, SECOND / 20), plain.read(&counters, SECOND / 20));
            assert_eq!((folded.rate(), folded.demand()), (plain.rate(), plain.demand()));
            assert_eq!(folded.totals(&counters), plain.totals(&counters));
        }
    }

    #[test]
    fn demand_is_of_the_time_that_it_ran_and_only_a_pause_shows_none() {
        let counters = Counters::new();
        let mut estimator = RateEstimator::default();
        // Of 64 ms.
        for (pages, paused_ms, demand) in
            [(160, 48, 10_000), (0, 49, 10_000), (0, 64, 10_000), (0, 48, 0), (160, 64, 160_000), (0, 0, 0)]
        {
            counters.add_pages(pages, pages);
            counters.add_pause(paused_ms * 1_000_000);
            estimator.read(&counters, 64_000_000);
            assert_eq!(estimator.demand().pages_per_sec(), demand, "{pages} pages, {paused_ms} ms paused");
        }
    }

    #[test]
    fn half_of_a_step_comes_through_in_50_ms_and_all_of_it_in_100() {
        for (ms, expected) in [(25, 4_000), (50, 8_000), (100, 16_000), (1_000, 16_000)] {
            let counters = Counters::new();
            let mut estimator = RateEstimator::default();
            counters.add_pages(16 * ms, 16 * ms);
            estimator.read(&counters, Nanos::from(ms) * 1_000_000);
            assert_eq!(estimator.rate().pages_per_sec(), expected, "{ms} ms");
        }
    }

    #[test]
    fn odd_times_do_no_harm() {
        let counters = Counters::new();
        let mut estimator = RateEstimator::default();
        counters.add_pages(5, 5);
        estimator.read(&counters, 0);
        assert_eq!(estimator.rate(), PageRate::ZERO);
        counters.add_pages(u32::MAX, u32::MAX);
        counters.add_pause(Nanos::MAX);
        estimator.read(&counters, 1);
        estimator.read(&counters, Nanos::MAX);
        assert_eq!(estimator.rate(), PageRate::ZERO);
        assert_eq!(estimator.totals(&counters).net_pages, 5 + u64::from(u32::MAX));
    }
}
