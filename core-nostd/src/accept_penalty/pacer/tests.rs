use super::*;
use crate::rate::{EmissionInterval, PageRate};
use crate::set_penalty::Penalty;
use proptest::prelude::*;

struct Vcpu {
    vm: VmCell,
    cell: PenaltyCell,
    counters: Counters,
    pacer: Pacer,
    now: Nanos,
    longest: Nanos,
}

impl Vcpu {
    fn new(terms: Option<Terms>) -> Self {
        Self::starting_at(terms, 1000 * SECOND, 0)
    }

    fn starting_at(terms: Option<Terms>, now: Nanos, net: u32) -> Self {
        let (vm, cell, counters) = (VmCell::new(), PenaltyCell::new(), Counters::new());
        counters.add_pages(net, net);
        cell.set(terms.map_or(Penalty::NONE, Penalty::new));
        let pacer = Pacer::new(&counters);
        Self { vm, cell, counters, pacer, now, longest: 0 }
    }

    fn charge(&mut self) -> Charge {
        self.vm.renew(self.now);
        let mut settle = || self.pacer.charge(self.now, &self.vm, &self.cell, &self.counters);
        let charge = settle();
        assert_eq!(settle(), charge, "nothing new, another answer");
        charge
    }

    /// Writes `pages` in `time`, settles and pauses.
    fn turn(&mut self, pages: u32, time: Nanos) -> Option<u32> {
        self.counters.add_pages(pages, pages);
        self.now += time;
        let charge = self.charge();
        self.longest = self.longest.max(charge.until.saturating_sub(self.now));
        self.now = self.now.max(charge.until);
        charge.slice
    }

    /// Writes whole slices at `page_time` for `time`; returns the pages written.
    fn run(&mut self, page_time: Nanos, time: Nanos) -> u64 {
        let end = self.now + time;
        let mut slice = self.charge().slice.unwrap();
        let mut pages = 0;
        while self.now < end {
            pages += u64::from(slice);
            slice = self.turn(slice, page_time * u64::from(slice)).unwrap();
        }
        pages
    }
}

fn pace(pages: u32) -> Option<Terms> {
    Some(Terms::Pace(PageRate::from_pages_per_sec(pages).interval()))
}

#[test]
fn the_rate_is_exact_against_a_rational_oracle() {
    for (start, net) in [(1000 * SECOND, 0), (Nanos::MAX / 2, u32::MAX - 1000)] {
        for limit in [1, 7, 256, 512, 25_600, 102_400, 10_485_760] {
            for page_time in [1, 600, 2_600] {
                let mut vcpu = Vcpu::starting_at(pace(limit), start, net);
                let pages = vcpu.run(page_time, 100 * SECOND);
                let took = vcpu.now - start;
                let fastest = took / page_time;
                // The virtual clock never runs: pages × 1 s ÷ limit, to a slice, or what the vCPU can do.
                let oracle = (u128::from(took) * u128::from(limit) / u128::from(SECOND)).min(fastest.into());
                let slice = u128::from(limit) * u128::from(SLICE + TOLERANCE) / u128::from(SECOND) + 2;
                // One pause at most 10 ms: below 100 pages/s that is more than the limit.
                if limit >= 100 {
                    let miss = u128::from(pages).abs_diff(oracle);
                    assert!(
                        miss <= slice + oracle / 1_000_000,
                        "{limit} pages/s, {page_time} ns: {pages}, not {oracle}"
                    );
                }
                assert!(vcpu.longest <= 10_000_000);
            }
        }
    }
}

#[test]
fn no_window_has_more_than_the_tolerance_on_top() {
    let limit = 25_600u32;
    let mut vcpu = Vcpu::new(pace(limit));
    let mut slice = vcpu.charge().slice.unwrap();
    let mut log = vec![];
    for i in 0..4_000u64 {
        // Bursts at full speed, each after idling for anything between nothing and 40 ms.
        let idle = if i % 13 == 0 { i * 7_919 % 40_000_000 } else { 0 };
        log.push((vcpu.now + idle, slice));
        slice = vcpu.turn(slice, idle + 600 * u64::from(slice)).unwrap();
    }
    for window in [100_000_000, SECOND] {
        let allowed = u64::from(limit) * (window + TOLERANCE + SLICE) / SECOND + 1;
        for (i, (start, _)) in log.iter().enumerate() {
            let pages: u64 =
                log[i..].iter().take_while(|(at, _)| *at < start + window).map(|(_, n)| u64::from(*n)).sum();
            assert!(pages <= allowed, "{pages} pages in {window} ns, not {allowed}");
        }
    }
}

#[test]
fn a_writer_below_its_limit_never_pauses() {
    let mut vcpu = Vcpu::new(pace(25_600));
    assert!(vcpu.run(39_100, SECOND) >= SECOND / 39_100);
    assert_eq!(vcpu.longest, 0);
}

#[test]
fn who_is_metered_within_a_slice_does_not_pause_either() {
    let mut vcpu = Vcpu::new(pace(25_600));
    let mut left = vcpu.charge().slice.unwrap();
    for i in 0..1000 {
        // A pass comes by now and then.
        let pages = if i % 7 == 0 { left / 2 } else { left };
        left = vcpu.turn(pages, 100_000 * u64::from(pages)).unwrap();
    }
    assert_eq!(vcpu.longest, 0);
}

#[test]
fn a_turn_that_took_as_long_as_it_costs_is_free_and_leaves_no_credit() {
    // A page in 1 ms is allowed; of the time at most 24 ms are believed, and 6 of credit from before.
    for (pages, time, pause) in [(14, 14, 0), (14, 13, 1), (24, 24, 0), (24, 23, 1), (26, 40, 2), (5, 1, 0), (7, 1, 1)]
    {
        let mut vcpu = Vcpu::new(pace(1000));
        vcpu.charge();
        (0..3).for_each(|_| _ = vcpu.turn(0, 9_000_000));
        assert_eq!(vcpu.longest, 0);
        vcpu.turn(pages, time * 1_000_000);
        assert_eq!(vcpu.longest, pause * 1_000_000, "{pages} in {time} ms");
        let credit = u64::from(6u32.saturating_sub(pages));
        vcpu.longest = 0;
        vcpu.turn(6, 0);
        assert_eq!(vcpu.longest, (6 - credit) * 1_000_000, "after {pages} in {time} ms");
    }
}

#[test]
fn a_debt_is_paid_in_bounded_pauses_page_by_page() {
    let mut vcpu = Vcpu::new(pace(5_120));
    vcpu.charge();
    let start = vcpu.now;
    assert_eq!(vcpu.turn(4032, 2_000_000), Some(1)); // 787 ms: a drained ring
    while vcpu.turn(1, 600) == Some(1) {}
    let owed = (4032 + (vcpu.now - start).div_ceil(10_000_000)) * SECOND / 5_120;
    assert!((vcpu.now - start).abs_diff(owed) < 20_000_000, "{} ns", vcpu.now - start);
    assert_eq!(vcpu.longest, 10_000_000);
}

#[test]
fn no_debt_is_longer_than_a_second() {
    let mut vcpu = Vcpu::new(pace(1));
    vcpu.charge();
    vcpu.turn(u32::MAX, 1);
    assert!(vcpu.pacer.due - vcpu.now < MAX_DEBT);
}

#[test]
fn pages_from_before_the_limit_are_forgiven_once() {
    let mut vcpu = Vcpu::new(None);
    assert_eq!(vcpu.turn(4032, 1000), None);
    vcpu.cell.set(Penalty::new(pace(256).unwrap()));
    assert_eq!(vcpu.turn(4032, 1000), Some(1));
    assert_eq!(vcpu.longest, 0);
    vcpu.turn(2, 1000);
    assert!(vcpu.longest > 0);
}

#[test]
fn an_early_end_of_a_pause_leaves_the_rest_owed() {
    let mut vcpu = Vcpu::new(pace(25_600));
    vcpu.charge();
    vcpu.counters.add_pages(102, 102);
    assert!(vcpu.pacer.owes(&vcpu.counters));
    let until = vcpu.charge().until;
    for step in 1..4 {
        vcpu.now += 500_000;
        assert!(vcpu.pacer.owes(&vcpu.counters));
        assert_eq!(vcpu.charge().until, until, "interrupted {step} times");
    }
    vcpu.now = until;
    vcpu.charge();
    assert!(!vcpu.pacer.owes(&vcpu.counters));
}

#[test]
fn sleep_is_on_top_of_running() {
    let mut vcpu = Vcpu::new(Some(Terms::Sleep(EmissionInterval::from_nanos(10_000))));
    vcpu.charge();
    vcpu.turn(100, SECOND); // no credit for the second
    assert_eq!(vcpu.longest, 1_000_000);
}

#[test]
fn a_lapsed_lease_frees_the_vcpu_and_its_renewal_forgives() {
    let mut vcpu = Vcpu::new(pace(256));
    vcpu.charge();
    vcpu.counters.add_pages(100, 100);
    let mut charge = |now| vcpu.pacer.charge(now, &vcpu.vm, &vcpu.cell, &vcpu.counters);
    vcpu.now += 2 * VmCell::LEASE;
    assert!(charge(vcpu.now).slice.is_some(), "its clock has jumped");
    vcpu.now += GRACE;
    let charge = vcpu.pacer.charge(vcpu.now, &vcpu.vm, &vcpu.cell, &vcpu.counters);
    assert_eq!((charge.until, charge.slice), (vcpu.now, None));
    assert_eq!(vcpu.turn(4032, 1000), Some(1));
    assert_eq!(vcpu.longest, 0);
}

#[test]
fn who_rewrites_dirty_pages_gets_longer_slices_until_it_stops() {
    let mut vcpu = Vcpu::new(pace(256));
    assert_eq!(vcpu.charge().slice, Some(1));
    let mut again = |net, gross| {
        vcpu.counters.add_pages(net, gross);
        vcpu.charge().slice.unwrap()
    };
    assert_eq!([(); 5].map(|()| again(0, 100)), [2, 4, 8, 8, 8]);
    assert_eq!(again(0, 0), 8, "nothing seen, nothing learned");
    assert_eq!(again(1, 2), 1);
    assert_eq!([again(0, 100), again(0, 100)], [2, 4]);
    vcpu.pacer.forget_scale();
    let charge = vcpu.charge();
    assert_eq!((charge.slice, charge.scaled), (Some(1), false), "the log was taken");
    vcpu.counters.add_pages(0, 100);
    assert!(vcpu.charge().scaled);
}

#[test]
fn who_writes_a_scaled_slice_slower_than_allowed_never_pauses() {
    for (pages, time, pause) in
        [(24, 24_000_000, 0), (24, 23_000_000, 1_000_000), (24, 1_000, 10_000_000), (8, 24_000_000, 0)]
    {
        let mut vcpu = Vcpu::new(pace(1000));
        vcpu.charge();
        for _ in 0..3 {
            vcpu.counters.add_pages(0, 100);
            vcpu.charge();
        }
        vcpu.turn(pages, time);
        assert_eq!(vcpu.longest, pause, "{pages} in {time} ns");
    }
}

#[test]
fn another_limit_ends_a_scale_and_a_touch_of_it_does_not() {
    for (limit, slice) in [(10_000, 120), (12_000, 144), (8_000, 96), (14_000, 42), (6_000, 18)] {
        let mut vcpu = Vcpu::new(pace(10_000));
        vcpu.charge();
        for _ in 0..2 {
            vcpu.counters.add_pages(0, 100);
            vcpu.charge();
        }
        vcpu.cell.set(Penalty::new(pace(limit).unwrap()));
        assert_eq!(vcpu.charge().slice, Some(slice), "{limit} pages/s");
    }
}

#[test]
fn unused_time_makes_the_slice_longer() {
    let mut vcpu = Vcpu::new(pace(1000));
    assert_eq!(vcpu.charge().slice, Some(3));
    vcpu.now += 2_000_000;
    assert_eq!(vcpu.charge().slice, Some(5));
    vcpu.now += SECOND;
    assert_eq!(vcpu.charge().slice, Some(6), "no more than the tolerance");
}

#[test]
fn a_lump_of_sleep_is_paid_for_once() {
    let mut vcpu = Vcpu::new(Some(Terms::Sleep(EmissionInterval::from_nanos(100_000))));
    vcpu.charge();
    vcpu.turn(4032, 1_000_000);
    assert_eq!((vcpu.longest, vcpu.turn(0, 0)), (10_000_000, Some(30)));
}

#[test]
fn who_cannot_be_held_says_what_pause_it_would_take() {
    let mut vcpu = Vcpu::new(pace(5_120));
    vcpu.charge();
    vcpu.turn(4032, 1_000_000);
    assert_eq!(vcpu.counters.needed_pause(), 0, "a lump that can be paid off");
    for _ in 0..20 {
        vcpu.turn(512, 1_000_000);
    }
    assert_eq!(vcpu.counters.needed_pause(), 100_000_000);
    vcpu.turn(1, 1_000);
    assert_eq!(vcpu.counters.needed_pause(), 100_000_000, "it has not caught up");
    while vcpu.turn(1, 1_000) == Some(1) {}
    assert_eq!(vcpu.counters.needed_pause(), 0);
}

#[test]
fn a_turn_that_one_pause_pays_needs_no_longer_one() {
    let mut vcpu = Vcpu::new(pace(100));
    vcpu.charge();
    vcpu.turn(200, 0);
    // Its debt is at the bound, but a page costs just the longest pause.
    vcpu.counters.add_pages(1, 1);
    vcpu.charge();
    vcpu.counters.add_pages(1, 1);
    vcpu.charge();
    assert_eq!(vcpu.counters.needed_pause(), 2 * SECOND, "what the 200 would have taken");
}

#[test]
fn what_is_forgiven_is_not_owed() {
    let mut vcpu = Vcpu::new(pace(256));
    vcpu.charge();
    vcpu.pacer.forgive();
    vcpu.turn(100, 0);
    assert_eq!(vcpu.longest, 0);
    vcpu.turn(2, 0);
    assert_eq!(vcpu.longest, 2 * SECOND / 256, "once");
}

/// The virtual clock in exact arithmetic: `due` in ns × the rate's unit, so that a page costs a whole number of it.
struct Exact {
    raw: i128,
    due: i128,
    turned: Nanos,
}

impl Exact {
    fn charge(&mut self, now: Nanos, pages: u32) -> i128 {
        let at = |time: Nanos| i128::from(time) * self.raw;
        let cost = i128::from(pages) * i128::from(SECOND) * 1024;
        let after = |unused: Nanos| self.due.max(at(now - unused)) + cost;
        // By the tolerance; or nothing is owed, for a turn that took as long as it costs.
        let run = (now - std::mem::replace(&mut self.turned, now)).min(24_000_000);
        self.due = after(TOLERANCE).min(after(run).max(at(now)));
        self.due = self.due.max(at(now - TOLERANCE)).min(at(now + MAX_DEBT));
        self.due.min(at(now + 10_000_000)) / self.raw
    }
}

proptest! {
    #[test]
    fn the_clock_is_the_exact_one(
        raw in prop_oneof![1i128..1 << 22, (1i128 << 22)..1 << 42],
        turns in prop::collection::vec((prop_oneof![Just(0u32), 1u32..50, 1u32..5000], 0u64..50_000_000), 1..100),
    ) {
        let limit = PageRate::from_raw(u64::try_from(raw).unwrap());
        let mut vcpu = Vcpu::new(Some(Terms::Pace(limit.interval())));
        vcpu.charge();
        let mut exact = Exact { raw, due: i128::from(vcpu.now) * raw, turned: vcpu.now };
        let mut slack = 0;
        for (pages, time) in turns {
            vcpu.now += time;
            vcpu.counters.add_pages(pages, pages);
            let (found, expected) = (i128::from(vcpu.charge().until), exact.charge(vcpu.now, pages));
            // Each cost is rounded down to a nanosecond, of an interval that is kept to 2^-13 or better.
            slack += 1 + i128::from(pages) * i128::from(SECOND) * 1024 / raw / 8192;
            prop_assert!(found <= expected + 1 && found + slack >= expected, "until {found}, not {expected}");
        }
    }
}

/// A writer that turns every 3 ms under a limit that was renewed at its start, for `ran`; its clock then jumps by
/// `stopped`. Turns each 10 ms from there; for how long it is still held.
fn held_after(ran: Nanos, stopped: Nanos, ticks_again_after: Option<Nanos>) -> Nanos {
    let mut vcpu = Vcpu::new(pace(512));
    let start = vcpu.now;
    vcpu.vm.renew(start);
    let mut settle = |now: Nanos, vm: &VmCell| {
        vcpu.counters.add_pages(2, 2);
        vcpu.pacer.charge(now, vm, &vcpu.cell, &vcpu.counters).slice.is_some()
    };
    let mut now = start;
    while now < start + ran {
        assert!(settle(now, &vcpu.vm), "{}", now - start);
        now += 3_000_000;
    }
    now += stopped;
    let awake = now;
    while settle(now, &vcpu.vm) && now < awake + 20 * SECOND {
        now += 10_000_000;
        if ticks_again_after.is_some_and(|after| now - awake == after) {
            vcpu.vm.renew(now);
        }
    }
    now - awake
}

#[test]
fn a_vcpu_that_stood_still_with_its_controller_is_held_until_that_can_tick() {
    for stopped in [5 * SECOND + SECOND / 2, 6 * SECOND, 3600 * SECOND] {
        let held = held_after(SECOND / 2, stopped, None);
        assert_eq!(held, GRACE, "{stopped}: a dead controller holds it no longer");
        let held = held_after(SECOND / 2, stopped, Some(SECOND / 2));
        assert!((5 * SECOND..6 * SECOND).contains(&(held - SECOND / 2)), "{stopped}: renewed, for a lease: {held}");
    }
    // Its last tick was most of a lease ago.
    assert_eq!(held_after(4 * SECOND, 3 * SECOND, None), GRACE);
}

#[test]
fn a_lease_that_lapses_while_the_vcpu_runs_lapses_at_once_and_its_grace_is_given_once() {
    assert!(held_after(0, 0, None).abs_diff(VmCell::LEASE) < SECOND / 5);
    // A vCPU whose every turn is as far from the last as the grace is long.
    let mut vcpu = Vcpu::new(pace(1));
    let start = vcpu.now;
    vcpu.vm.renew(start);
    let mut held = 0;
    for second in 0..60 {
        vcpu.counters.add_pages(1, 1);
        let charge = vcpu.pacer.charge(start + second * SECOND, &vcpu.vm, &vcpu.cell, &vcpu.counters);
        held += u32::from(charge.slice.is_some());
    }
    assert!((6..=8).contains(&held), "{held} s");
    vcpu.vm.renew(start + 60 * SECOND);
    let charge = vcpu.pacer.charge(start + 60 * SECOND, &vcpu.vm, &vcpu.cell, &vcpu.counters);
    assert!(charge.slice.is_some(), "and a tick holds it again");
}

#[test]
fn each_settlement_is_counted() {
    let mut vcpu = Vcpu::new(pace(1000));
    for turns in (2..20).step_by(2) {
        vcpu.charge();
        assert_eq!(vcpu.counters.charges(), turns, "each is asked twice");
    }
}
