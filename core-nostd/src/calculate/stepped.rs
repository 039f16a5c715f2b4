//! The published two-strategy algorithm, freed of its faults.
//!
//! QEMU's dirty limit (`system/dirtylimit.c`, since 7.1) adjusts a sleep for each full ring: in proportion while the rate
//! is far from the limit, by a fixed step near it, and not within a tolerance. Its estimates are the whole VM's, in whole
//! MB/s, with a dead band of 25 MB/s. Here the sleep is per page, the estimates are the vCPU's own, in pages per second,
//! and the tolerance is relative.

use super::Policy;
use crate::prepare::Sample;
use crate::rate::{EmissionInterval, Nanos, PageRate};
use crate::set_penalty::{Penalty, Terms};

/// Sleep for each page, steered towards the limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stepped {
    /// Nanoseconds over which the rate is measured between two adjustments; long against a slice.
    pub period: Nanos,
    /// Beyond this many percent of the limit the sleep changes in proportion to |rate − limit|.
    pub far_percent: u8,
    /// Within this many percent of the limit nothing changes.
    pub near_percent: u8,
    /// The fixed step in between, in percent of the time that a page takes at the limit.
    pub step_percent: u8,
}

impl Default for Stepped {
    /// Adjusts four times a second; far beyond 10 %, done within 2 %, by steps of 2 %.
    fn default() -> Self {
        Self { period: 250_000_000, far_percent: 10, near_percent: 2, step_percent: 2 }
    }
}

/// What was seen since the last adjustment.
#[derive(Clone, Copy, Default, Debug)]
pub struct SteppedState {
    pages: u32,
    elapsed: Nanos,
    /// Whether the first sample under the limit, which holds time before it, was thrown away.
    primed: bool,
}

impl Policy for Stepped {
    type State = SteppedState;

    fn penalty(&self, state: &mut SteppedState, sample: &Sample, limit: PageRate, current: Penalty) -> Penalty {
        let sleep = match current.terms() {
            Some(Terms::Sleep(interval)) => interval.of(PAGES),
            _ => 0,
        };
        let sleep_of = |sleep| Penalty::new(Terms::Sleep(EmissionInterval::split(sleep, PAGES)));
        if sample.elapsed == 0 {
            return sleep_of(sleep);
        }
        if !state.primed {
            state.primed = true;
            return sleep_of(sleep);
        }
        state.pages = state.pages.saturating_add(sample.pages);
        state.elapsed = state.elapsed.saturating_add(sample.elapsed);
        if state.elapsed < self.period {
            return current;
        }
        let rate = PageRate::measured(state.pages, state.elapsed).raw();
        *state = SteppedState { primed: true, ..SteppedState::default() };
        sleep_of(self.adjust(sleep, rate, limit))
    }
}

/// Sleeps are reckoned for so many pages at once, so that a nanosecond is fine enough.
const PAGES: u32 = 1024;

impl Stepped {
    /// The new sleep for [`PAGES`] pages.
    fn adjust(&self, sleep: Nanos, rate: u64, limit: PageRate) -> Nanos {
        let allowed = limit.interval().of(PAGES); // what they take at the limit
        let limit = limit.raw().max(1);
        let distance = rate.abs_diff(limit);
        let within = |percent: u8| u128::from(distance) * 100 <= u128::from(limit) * u128::from(percent);
        if within(self.near_percent) {
            return sleep;
        }
        let change = if within(self.far_percent) {
            allowed / 100 * Nanos::from(self.step_percent)
        } else {
            // 1/limit − 1/rate, for each page: in proportion to the distance.
            let scaled = u128::from(allowed) * u128::from(distance) / u128::from(rate.max(1));
            Nanos::try_from(scaled).unwrap_or(Nanos::MAX)
        };
        // A page never sleeps longer than it takes at the limit; and one quiet period, or one lump that took several to pay,
        // does not set the vCPU free.
        if rate > limit { sleep.saturating_add(change).min(allowed) } else { sleep - change.min(sleep / 2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::SECOND;

    /// A vCPU that takes `run` ns a page and sleeps as it is told, read every 50 ms for `seconds`; its rate in each second.
    fn drive(run: Nanos, limit: u32, seconds: usize) -> [u64; 16] {
        let (policy, mut state) = (Stepped::default(), SteppedState::default());
        let limit = PageRate::from_pages_per_sec(limit);
        let mut penalty = policy.penalty(&mut state, &Sample::default(), limit, Penalty::NONE);
        let mut rates = [0; 16];
        for rate in rates.iter_mut().take(seconds) {
            for _ in 0..20 {
                let sleep = match penalty.terms() {
                    Some(Terms::Sleep(interval)) => interval.of(1),
                    _ => 0,
                };
                let pages = u32::try_from(SECOND / 20 / (run + sleep)).unwrap();
                *rate += u64::from(pages);
                let sample = Sample { pages, elapsed: SECOND / 20, paused: 0 };
                penalty = policy.penalty(&mut state, &sample, limit, penalty);
            }
        }
        rates
    }

    #[test]
    fn it_settles_within_two_seconds_and_stays() {
        for run in [600, 2_600, 30_000] {
            for limit in [512, 5_120, 25_600] {
                let rates = drive(run, limit, 10);
                for rate in &rates[2..10] {
                    let error = (*rate as f64 / f64::from(limit) - 1.0).abs();
                    assert!(error <= 0.04, "{run} ns a page, limit {limit}: {rates:?}");
                }
            }
        }
    }

    #[test]
    fn it_acts_on_anything_beyond_the_tolerance() {
        let limit = PageRate::from_pages_per_sec(1000);
        let adjust = |rate| Stepped::default().adjust(SECOND / 2, PageRate::from_pages_per_sec(rate).raw(), limit);
        assert_eq!([980, 1000, 1020].map(adjust), [SECOND / 2; 3]);
        assert!(adjust(1021) > SECOND / 2 && adjust(979) < SECOND / 2, "a per cent is not rounded");
    }

    #[test]
    fn it_leaves_a_slow_writer_alone() {
        let rates = drive(1_000_000, 25_600, 4);
        assert_eq!(rates[..4], [1000; 4]);
    }

    #[test]
    fn the_ends_of_the_range_do_not_overflow() {
        let policy = Stepped { period: 0, ..Stepped::default() };
        for limit in [PageRate::ZERO, PageRate::MIN_LIMIT, PageRate::MAX] {
            for pages in [0, 1, u32::MAX] {
                for elapsed in [1, SECOND, Nanos::MAX] {
                    let (mut state, mut penalty) = (SteppedState::default(), Penalty::NONE);
                    for _ in 0..4 {
                        let sample = Sample { pages, elapsed, paused: 0 };
                        penalty = policy.penalty(&mut state, &sample, limit, penalty);
                        if let Some(terms) = penalty.terms() {
                            assert!(
                                matches!(terms, Terms::Sleep(interval) if interval.of(1024) <= limit.interval().of(1024))
                            );
                        }
                    }
                }
            }
        }
    }
}
