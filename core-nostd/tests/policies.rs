//! Both policies over the whole range of rates, samples and times: nothing overflows, no limit lets a page go for less than
//! it costs, and a higher limit is never dearer.

use dirtylimit_core::{
    EmissionInterval, Nanos, Paced, PageRate, Penalty, Policy, SECOND, Sample, Shipped, Stepped, Terms,
};
use proptest::prelude::*;

/// Any rate from one page in 1,024 s to 2³² pages/s, evenly over its powers of two.
fn rate() -> impl Strategy<Value = PageRate> {
    // 1,024-byte pages: a byte is the rate's unit.
    (0u32..=42, any::<u64>())
        .prop_map(|(bits, any)| PageRate::from_bytes_per_sec((1 << bits) | (any & ((1 << bits) - 1)), 1024))
}

/// The rate in its unit, 1/1024 pages per second.
fn units(rate: PageRate) -> u128 {
    rate.bytes_per_sec(1024).into()
}

/// From a nanosecond to years.
fn time() -> impl Strategy<Value = Nanos> {
    (0u32..64, any::<u64>()).prop_map(|(bits, any)| (1 << bits) | (any & ((1 << bits) - 1)))
}

fn interval(penalty: Penalty) -> EmissionInterval {
    match penalty.terms() {
        None => EmissionInterval::FREE,
        Some(Terms::Pace(interval) | Terms::Sleep(interval)) => interval,
    }
}

/// What Stepped makes of a sample, when the sleep in force is that number of 1024ths of a page's time at `limit`.
fn stepped(limit: PageRate, sample: &Sample, current: Penalty) -> Penalty {
    let (policy, mut state) = (Stepped { period: 0, ..Stepped::default() }, Default::default());
    // The first sample only primes it.
    policy.penalty(&mut state, sample, limit, current);
    policy.penalty(&mut state, sample, limit, current)
}

/// Stepped at a limit of 1000 pages/s, shown so many pages in each so many ms; the sleep for 1024 pages after each, in ms.
fn steps(sleep_ms: u64, samples: &[(u32, u64)]) -> Vec<u64> {
    let (policy, mut state) = (Stepped::default(), Default::default());
    let mut penalty = Penalty::new(Terms::Sleep(EmissionInterval::split(sleep_ms * 1_000_000, 1024)));
    let each = |&(pages, ms): &(u32, u64)| {
        let sample = Sample { pages, elapsed: ms * 1_000_000, paused: 0 };
        penalty = policy.penalty(&mut state, &sample, PageRate::from_pages_per_sec(1000), penalty);
        (interval(penalty).of(1024) + 500_000) / 1_000_000
    };
    samples.iter().map(each).collect()
}

#[test]
fn a_policy_is_found_by_its_name_as_it_is_by_default() {
    assert_eq!(Shipped::named("paced"), Some(Shipped::default()));
    assert_eq!(Shipped::named("stepped"), Some(Shipped::Stepped(Stepped::default())));
    assert_eq!(Shipped::named("Paced"), None);
}

#[test]
fn stepped_looks_once_a_period_after_the_first_reading() {
    // 4000 pages/s: as much sleep as lacks, 3/4 of what a page takes at the limit.
    assert_eq!(steps(0, &[(9999, 250), (500, 125), (500, 125), (500, 125), (500, 125)]), [0, 0, 768, 768, 1024]);
    assert_eq!(steps(100, &[(0, 250), (300, 300), (300, 300)]), [100; 3], "at the limit");
    // 5 % above and below: by 2 % of what a page takes.
    assert_eq!(steps(500, &[(0, 1), (1050, 1000), (1050, 1000), (950, 1000)]), [500, 520, 541, 520]);
}

proptest! {
    #[test]
    fn a_page_never_costs_less_than_its_limit_says(limit in rate(), pages in any::<u32>()) {
        let penalty = Paced.penalty(&mut (), &Sample::default(), limit, Penalty::NONE);
        let exact = u128::from(pages) * u128::from(SECOND) * 1024 / units(limit);
        let priced = u128::from(interval(penalty).of(pages));
        // 31 bits keep an interval to 2^-14 at the fastest limits, rounded down.
        prop_assert!(priced <= exact && priced + exact / 8192 + 1 >= exact.min(u64::MAX.into()), "{priced}, not {exact}");
    }

    #[test]
    fn a_higher_limit_is_never_dearer(
        a in rate(), b in rate(), pages in any::<u32>(), elapsed in time(), share in 0u64..=1024,
    ) {
        let (low, high) = (a.min(b), a.max(b));
        let paced = |limit| interval(Paced.penalty(&mut (), &Sample::default(), limit, Penalty::NONE)).of(1024);
        prop_assert!(paced(low) >= paced(high));
        let sample = Sample { pages, elapsed, paused: 0 };
        let allowed = high.interval().of(1024);
        let sleep = u64::try_from(u128::from(allowed) * u128::from(share) / 1024).unwrap();
        let current = Penalty::new(Terms::Sleep(EmissionInterval::split(sleep, 1024)));
        let stepped = |limit| interval(stepped(limit, &sample, current)).of(1024);
        let (dear, cheap) = (stepped(low), stepped(high));
        // A step is a part of a page's time, so one down is larger at a lower limit. And an interval is rounded.
        let step = (low.interval().of(1024) - allowed) * u64::from(Stepped::default().step_percent) / 100;
        prop_assert!(dear + step + dear / (1 << 24) + 2 >= cheap, "{dear} at {low:?}, {cheap} at {high:?}");
        prop_assert!(cheap <= allowed + allowed / (1 << 24) + 1, "a page sleeps longer than it takes at the limit");
    }

    #[test]
    fn years_and_the_fastest_guests_overflow_nothing(
        limit in rate(),
        samples in prop::collection::vec((any::<u32>(), prop_oneof![Just(0), time(), Just(Nanos::MAX)], any::<u64>()), 1..40),
        period in time(), percents in any::<[u8; 3]>(),
    ) {
        let [far_percent, near_percent, step_percent] = percents;
        for policy in [Shipped::default(), Shipped::Stepped(Stepped { period, far_percent, near_percent, step_percent })] {
            let (mut state, mut penalty) = (Default::default(), Penalty::NONE);
            for &(pages, elapsed, paused) in &samples {
                penalty = policy.penalty(&mut state, &Sample { pages, elapsed, paused }, limit, penalty);
                let most = limit.interval().of(1024);
                prop_assert!(interval(penalty).of(1024) <= most, "{penalty:?} at {limit:?}");
            }
        }
    }
}
