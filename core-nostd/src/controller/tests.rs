use super::*;
use crate::calculate::{Paced, Shipped, SteppedState};
use crate::rate::SECOND;

const TICK: Nanos = SECOND / 20;

fn rate(pages: u32) -> PageRate {
    PageRate::from_pages_per_sec(pages)
}

/// Ticks once, after each vCPU has dirtied its pages and paused.
fn tick<const N: usize>(limiter: &Limiter<Paced, Inline<N>>, now: &mut Nanos, did: &[(VcpuIndex, u32, Nanos)]) {
    for (index, pages, pause) in did {
        let counters = &limiter.cell(*index).unwrap().counters;
        counters.add_pages(*pages, *pages);
        counters.add_pause(*pause);
    }
    *now += TICK;
    limiter.tick(*now);
}

fn limit_of<const N: usize>(limiter: &Limiter<Paced, Inline<N>>, index: VcpuIndex) -> Option<u64> {
    limiter.query(index, SECOND).unwrap().effective_limit.map(PageRate::pages_per_sec)
}

#[test]
fn a_vcpu_takes_at_most_320_bytes() {
    assert_eq!(size_of::<VcpuCell>(), 128);
    assert!(size_of::<Option<Row<SteppedState>>>() <= 192, "{}", size_of::<Option<Row<SteppedState>>>());
    let (one, many) = (size_of::<Limiter<Shipped, Inline<1>>>(), size_of::<Limiter<Shipped, Inline<1024>>>());
    assert!((many - one) / 1023 <= 320, "{}", (many - one) / 1023);
}

#[test]
fn a_limit_is_in_force_before_the_first_tick_and_gone_when_cancelled() {
    static LIMITER: Limiter<Paced, Inline<2>> = Limiter::new(Paced);
    let index = LIMITER.register().unwrap();
    let cell = LIMITER.cell(index).unwrap();
    LIMITER.set_limit(index, Some(rate(256)));
    assert_eq!(cell.penalty.accept().terms(), Some(Terms::Pace(rate(256).interval())));
    assert_eq!(LIMITER.query(index, SECOND).unwrap().limit, Some(rate(256)));
    LIMITER.set_limit(index, None);
    assert_eq!(cell.penalty.accept(), Penalty::NONE);
    LIMITER.tick(SECOND);
    assert_eq!(cell.penalty.accept(), Penalty::NONE);
}

#[test]
fn places_run_out_are_reused_and_inherit_nothing() {
    let limiter = Limiter::<Paced, Inline<2>>::new(Paced);
    let (a, b) = (limiter.register().unwrap(), limiter.register().unwrap());
    assert_ne!(a, b);
    assert_eq!(limiter.register(), Err(Full { capacity: 2 }));
    limiter.set_limit(a, Some(rate(1)));
    limiter.cell(a).unwrap().counters.add_pages(1000, 1000);
    limiter.unregister(a);
    limiter.unregister(a);
    assert_eq!(limiter.cell(a).unwrap().penalty.accept(), Penalty::NONE);
    assert_eq!(limiter.query(a, SECOND), None);
    limiter.set_limit(a, Some(rate(1)));
    limiter.set_limit_all(Some(rate(7)));
    let again = limiter.register().unwrap();
    assert_eq!(again, a);
    let status = limiter.query(again, SECOND).unwrap();
    assert_eq!((status.limit, status.totals.net_pages), (Some(rate(7)), 0), "the limit for all, no history");
}

#[test]
fn a_limit_that_one_page_breaks_is_reported() {
    let limiter = Limiter::<Paced, Inline<1>>::new(Paced);
    let index = limiter.register().unwrap();
    limiter.set_limit(index, Some(rate(25)));
    assert_eq!(limiter.query(index, SECOND).unwrap().needs_pause, Some(SECOND / 25));
    limiter.vm().set_max_pause(SECOND / 25);
    assert_eq!(limiter.query(index, SECOND).unwrap().needs_pause, None);
    limiter.set_limit(index, Some(PageRate::ZERO));
    assert_eq!(limiter.query(index, SECOND).unwrap().limit, Some(PageRate::MIN_LIMIT));
}

#[test]
fn a_budget_goes_to_who_needs_it() {
    let limiter = Limiter::<Paced, Inline<4>>::new(Paced);
    let vcpus = [(); 4].map(|()| limiter.register().unwrap());
    limiter.set_vm_limit(Some(rate(1000)));
    let mut now = SECOND;
    // Hot: paused nine tenths of the time at what it may dirty.
    let hot = |limiter: &Limiter<Paced, Inline<4>>, i: usize| {
        let limit = limit_of(limiter, vcpus[i]).unwrap();
        (vcpus[i], u32::try_from(limit / 20).unwrap(), TICK / 10 * 9)
    };
    for _ in 0..40 {
        tick(&limiter, &mut now, &[hot(&limiter, 0)]);
    }
    assert_eq!(limit_of(&limiter, vcpus[0]), Some(1000), "one alone has it all");
    for _ in 0..40 {
        let all = [0, 1, 2, 3].map(|i| hot(&limiter, i));
        tick(&limiter, &mut now, &all);
    }
    assert_eq!(vcpus.map(|vcpu| limit_of(&limiter, vcpu)), [Some(250); 4]);
    limiter.set_weight(vcpus[0], 2);
    limiter.set_limit(vcpus[1], Some(rate(100)));
    for _ in 0..40 {
        let all = [0, 1, 2, 3].map(|i| hot(&limiter, i));
        tick(&limiter, &mut now, &all);
    }
    assert_eq!(vcpus.map(|vcpu| limit_of(&limiter, vcpu)), [Some(450), Some(100), Some(225), Some(225)]);
    assert_eq!(limiter.vm_limit(), Some(rate(1000)));
    limiter.set_vm_limit(None);
    assert_eq!(limiter.vm_limit(), None);
    assert_eq!(vcpus.map(|vcpu| limit_of(&limiter, vcpu)), [None, Some(100), None, None]);
}

#[test]
fn odd_times_do_no_harm() {
    let limiter = Limiter::<Shipped, Inline<1>>::new(Shipped::Stepped(Default::default()));
    let index = limiter.register().unwrap();
    limiter.set_limit(index, Some(rate(100)));
    for now in [Nanos::MAX, 0, 5, 5, Nanos::MAX, 1] {
        limiter.cell(index).unwrap().counters.add_pages(u32::MAX, 1);
        limiter.tick(now);
    }
    limiter.set_policy(Shipped::default());
    assert_eq!(limiter.query(index, SECOND).unwrap().penalty.terms(), Some(Terms::Pace(rate(100).interval())));
}

#[test]
fn a_limit_that_is_not_enforced_says_why() {
    let limiter = Limiter::<Paced, Inline<2>>::new(Paced);
    let [index, other] = [(); 2].map(|()| limiter.register().unwrap());
    let why = |now| limiter.query(index, now).unwrap().unenforced;
    let mut now = 100 * SECOND;
    assert_eq!(why(now), None, "there is no limit");
    limiter.set_limit(index, Some(rate(1000)));
    assert_eq!(why(now), Some(Unenforced::Lapsed), "no tick came");
    limiter.tick(now);
    assert_eq!((why(now), why(now + VmCell::LEASE + SECOND)), (None, Some(Unenforced::Lapsed)));
    // Nobody lets it settle.
    (0..45).for_each(|_| tick(&limiter, &mut now, &[(index, 20_000, 0)]));
    assert_eq!(why(now), Some(Unenforced::NotAccepted));
    assert_eq!(limiter.news(), Some((index, Some(Unenforced::NotAccepted))));
    assert_eq!(limiter.news(), None);
    let turn = || limiter.cell(index).unwrap().counters.add_charge();
    (0..45).for_each(|_| {
        turn();
        tick(&limiter, &mut now, &[(index, 20_000, 0)]);
    });
    assert_eq!(why(now), Some(Unenforced::Exceeded));
    (0..45).for_each(|_| tick(&limiter, &mut now, &[(index, 10, 0), (other, 20_000, 0)]));
    assert_eq!((why(now), limiter.query(other, now).unwrap().unenforced), (None, None));
    // Pages again and again that nobody takes, until somebody does.
    let again = |now: &mut Nanos| {
        limiter.cell(index).unwrap().counters.add_pages(0, 20_000);
        tick(&limiter, now, &[]);
    };
    (0..45).for_each(|_| again(&mut now));
    assert_eq!(why(now), Some(Unenforced::LogNotTaken));
    limiter.vm().note_taken(now);
    (0..45).for_each(|_| again(&mut now));
    assert_eq!(why(now), None);
    limiter.set_limit(index, Some(rate(25)));
    assert_eq!(why(now), Some(Unenforced::NeedsPause), "told at once");
    assert_eq!(limiter.news(), Some((index, None)), "in the log once it stays");
    (0..45).for_each(|_| tick(&limiter, &mut now, &[(index, 1, 0)]));
    assert_eq!(limiter.news(), Some((index, Some(Unenforced::NeedsPause))));
    limiter.set_limit(index, None);
    assert_eq!(why(now), None);
}

#[test]
fn totals_do_not_wrap_where_somebody_asks_or_folds() {
    let limiter = Limiter::<Paced, Inline<2>>::new(Paced);
    let [asked, folded] = [(); 2].map(|()| limiter.register().unwrap());
    for round in 1..=5u64 {
        for index in [asked, folded] {
            limiter.cell(index).unwrap().counters.add_pages(1 << 31, 1 << 31);
        }
        assert_eq!(limiter.query(asked, 0).unwrap().totals.net_pages, round << 31);
        limiter.fold();
    }
    assert_eq!(limiter.query(folded, 0).unwrap().totals.net_pages, 5 << 31);
}
