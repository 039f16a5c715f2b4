//! The control plane's calls against a tick and against each other.

use std::sync::Arc;

use dirtylimit_loom::calculate::{Shipped, Stepped};
use dirtylimit_loom::controller::{Inline, Limiter, VcpuIndex};
use dirtylimit_loom::explore::{ALL, fails, holds};
use dirtylimit_loom::rate::{PageRate, SECOND};
use dirtylimit_loom::set_penalty::{Penalty, Terms};
use loom::thread;

const START: u64 = 1000 * SECOND;

type Two = Limiter<Shipped, Inline<2>>;

fn rate(pages: u32) -> Option<PageRate> {
    Some(PageRate::from_pages_per_sec(pages))
}

fn pace(pages: u32) -> Option<Terms> {
    rate(pages).map(|rate| Terms::Pace(rate.interval()))
}

fn accepted(limiter: &Two, index: VcpuIndex) -> Option<Terms> {
    limiter.cell(index).expect("within the capacity").penalty.accept().terms()
}

/// One tick; a twin would calculate under the lock and set the penalty when it has let go of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tick {
    Real,
    SetsLate,
}

impl Tick {
    fn run(self, limiter: &Two, index: VcpuIndex) {
        match self {
            Self::Real => limiter.tick(START + SECOND),
            Self::SetsLate => {
                if let Some(status) = limiter.query(index, SECOND) {
                    limiter.cell(index).expect("within the capacity").penalty.set(status.penalty);
                }
            }
        }
    }
}

/// Two vCPUs at 256 pages/s, ticked once; `call` on this thread, a tick on another.
fn against_a_tick(tick: Tick, call: impl Fn(&Two, VcpuIndex, VcpuIndex), check: impl Fn(&Two, VcpuIndex, VcpuIndex)) {
    let limiter = Arc::new(Two::new(Shipped::default()));
    limiter.set_limit_all(rate(256));
    let (a, b) = (limiter.register().expect("room"), limiter.register().expect("room"));
    limiter.tick(START);
    let ticker = thread::spawn({
        let limiter = limiter.clone();
        move || tick.run(&limiter, a)
    });
    call(&limiter, a, b);
    ticker.join().expect("no panic");
    check(&limiter, a, b);
}

/// Lowers, raises and cancels.
fn limits(tick: Tick) {
    let call = |limiter: &Two, a, _| {
        limiter.set_limit(a, rate(100));
        assert_ne!(accepted(limiter, a), pace(256), "a new limit is in force when the call returns");
        limiter.set_limit(a, None);
        assert_eq!(accepted(limiter, a), None, "a cancel wins");
    };
    against_a_tick(tick, call, |limiter, a, b| {
        assert_eq!((accepted(limiter, a), accepted(limiter, b)), (None, pace(256)), "a cancel wins");
    });
}

#[test]
fn the_last_limit_wins() {
    holds("the_last_limit_wins", ALL, 50, || limits(Tick::Real));
}

#[test]
fn twin_lets_a_tick_undo_a_cancel() {
    fails("limit against a late penalty", ALL, None, "a cancel wins", || limits(Tick::SetsLate));
}

/// A vCPU goes and another takes its place, while the first one's last pages are still unread.
fn places(tick: Tick) {
    let call = |limiter: &Two, a, _| {
        limiter.cell(a).expect("registered").counters.add_pages(7, 7);
        limiter.unregister(a);
        limiter.set_limit(a, rate(1));
        limiter.set_weight(a, 3);
        assert_eq!(limiter.query(a, SECOND), None);
        assert_eq!(accepted(limiter, a), None, "who left is free");
        limiter.set_limit_all(None);
        assert_eq!(limiter.register(), Ok(a), "the free place");
    };
    against_a_tick(tick, call, |limiter, a, _| {
        let status = limiter.query(a, SECOND).expect("registered");
        assert_eq!((status.limit, status.totals.net_pages), (None, 0), "inherits nothing");
        assert_eq!(accepted(limiter, a), None, "who left is free");
    });
}

#[test]
fn a_place_is_handed_on_clean() {
    holds("a_place_is_handed_on_clean", ALL, 150, || places(Tick::Real));
}

#[test]
fn twin_penalises_who_has_left() {
    fails("unregister against a late penalty", ALL, None, "who left is free", || places(Tick::SetsLate));
}

/// A budget, a policy and weights come and go.
fn budget(tick: Tick) {
    let call = |limiter: &Two, a, _| {
        limiter.set_vm_limit(rate(100));
        limiter.set_weight(a, 2);
        limiter.set_policy(Shipped::Stepped(Stepped::default()));
        limiter.set_policy(Shipped::default());
        limiter.set_limit_all(None);
        limiter.set_vm_limit(rate(50));
    };
    against_a_tick(tick, call, |limiter, a, b| {
        assert_eq!(limiter.vm_limit(), rate(50));
        for index in [a, b] {
            let status = limiter.query(index, SECOND).expect("registered");
            // Nobody is known to want anything, so that either may have it all.
            assert!(status.effective_limit >= rate(50) && status.effective_limit <= rate(100), "{status:?}");
            let terms = status.effective_limit.map(|limit| Terms::Pace(limit.interval()));
            assert_eq!(accepted(limiter, index), terms, "the budget in force");
        }
    });
}

#[test]
fn the_last_budget_wins() {
    holds("the_last_budget_wins", ALL, 80, || budget(Tick::Real));
}

#[test]
fn twin_lets_a_tick_undo_a_budget() {
    fails("budget against a late penalty", ALL, None, "the budget in force", || budget(Tick::SetsLate));
}

/// Two threads set different limits, a third asks; `locked`: by `query`, or by two looks at what is published.
fn queried(locked: bool) {
    let limiter = Arc::new(Two::new(Shipped::default()));
    let index = limiter.register().expect("room");
    let asker = thread::spawn({
        let limiter = limiter.clone();
        move || {
            let first = accepted(&limiter, index);
            let status = limiter.query(index, SECOND).expect("registered");
            let terms = if locked { status.penalty.terms() } else { first };
            let expected = status.effective_limit.map(|limit| Terms::Pace(limit.interval()));
            assert_eq!(terms, expected, "of one moment");
        }
    });
    let other = thread::spawn({
        let limiter = limiter.clone();
        move || limiter.set_limit_all(rate(9))
    });
    limiter.set_limit(index, rate(5));
    other.join().expect("no panic");
    asker.join().expect("no panic");
    let status = limiter.query(index, SECOND).expect("registered");
    assert!([rate(5), rate(9)].contains(&status.limit), "one of the two");
    assert_eq!(accepted(&limiter, index), Penalty::terms(status.penalty), "what is set is what is told");
}

#[test]
fn a_query_tells_of_one_moment() {
    holds("a_query_tells_of_one_moment", ALL, 500, || queried(true));
}

#[test]
fn twin_looks_twice() {
    fails("limit and penalty by two looks", ALL, None, "of one moment", || queried(false));
}

/// The longest pause is changed while a vCPU reads it.
fn longest_pause(set: fn(&Two, u64)) {
    let limiter = Arc::new(Two::new(Shipped::default()));
    let vcpu = thread::spawn({
        let limiter = limiter.clone();
        move || {
            let (first, second) = (limiter.vm().max_pause(), limiter.vm().max_pause());
            assert!([10_000_000, 2_000_000].contains(&first), "{first} was never set");
            assert!(second <= first, "older than one already seen, or never set: {second}");
        }
    });
    set(&limiter, 2_000_000);
    vcpu.join().expect("no panic");
}

#[test]
fn the_longest_pause_changes_at_once() {
    holds("the_longest_pause_changes_at_once", ALL, 10, || {
        longest_pause(|limiter, pause| limiter.vm().set_max_pause(pause))
    });
}

#[test]
fn twin_sets_the_longest_pause_in_two_steps() {
    fails("pause reset, then set", ALL, None, "never set", || {
        longest_pause(|limiter, pause| {
            limiter.vm().set_max_pause(0);
            limiter.vm().set_max_pause(pause);
        });
    });
}
