//! SET and ACCEPT PENALTY, the lease, and the pacer between them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dirtylimit_loom::accept_penalty::Pacer;
use dirtylimit_loom::calculate::Policy;
use dirtylimit_loom::controller::{Inline, Limiter};
use dirtylimit_loom::explore::{ALL, FULL, fails, holds};
use dirtylimit_loom::prepare::{Counters, Sample};
use dirtylimit_loom::rate::{EmissionInterval, PageRate, SECOND};
use dirtylimit_loom::renew;
use dirtylimit_loom::set_penalty::{Penalty, PenaltyCell, Terms, VmCell};
use dirtylimit_loom::weaken::site;
use loom::sync::atomic::AtomicU32;
use loom::thread;

/// Of two kinds, so that a torn one would be neither.
const FIRST: Terms = Terms::Pace(EmissionInterval::from_nanos(1_000));
const THEN: Terms = Terms::Sleep(EmissionInterval::from_nanos(9_999_999));

/// The controller sets two penalties and cancels; the vCPU accepts three times.
fn set_and_accept(set: fn(&Cell, Option<Terms>), accept: fn(&Cell) -> Option<Terms>) {
    let cell = Arc::new(Cell::default());
    let orders = [None, Some(FIRST), Some(THEN), None];
    let vcpu = thread::spawn({
        let cell = cell.clone();
        move || {
            let mut newest = 0;
            for _ in 0..3 {
                let seen = accept(&cell);
                let found = (newest..orders.len()).find(|at| orders[*at] == seen);
                newest = found.unwrap_or_else(|| panic!("torn, or older than {newest}: {seen:?}"));
            }
        }
    });
    for terms in &orders[1..] {
        set(&cell, *terms);
    }
    vcpu.join().expect("no panic");
    assert_eq!(accept(&cell), None, "the cancel wins");
}

/// The real cell, and what a twin has in its place: the kind and the interval in a word each.
#[derive(Default)]
struct Cell {
    real: PenaltyCell,
    words: (AtomicU32, AtomicU32),
}

#[test]
fn a_penalty_is_never_torn_and_never_older() {
    holds("a_penalty_is_never_torn_and_never_older", ALL, 400, || {
        let set = |cell: &Cell, terms: Option<Terms>| cell.real.set(terms.map_or(Penalty::NONE, Penalty::new));
        set_and_accept(set, |cell| cell.real.accept().terms());
    });
}

#[test]
fn twin_has_a_penalty_of_two_words() {
    fails("penalty of two words", ALL, None, "torn", || {
        let set = |cell: &Cell, terms: Option<Terms>| {
            let (kind, nanos) = match terms {
                None => (0, 0),
                Some(Terms::Pace(interval)) => (1, interval.of(1)),
                Some(Terms::Sleep(interval)) => (2, interval.of(1)),
            };
            cell.words.1.store(u32::try_from(nanos).expect("small"), Ordering::Release);
            cell.words.0.store(kind, Ordering::Release);
        };
        set_and_accept(set, |cell| {
            let kind = cell.words.0.load(Ordering::Acquire);
            let interval = EmissionInterval::from_nanos(cell.words.1.load(Ordering::Acquire).into());
            [None, Some(Terms::Pace(interval)), Some(Terms::Sleep(interval))][kind as usize]
        });
    });
}

/// A penalty that tells which tick set it: a page costs the time since the tick before.
#[derive(Debug)]
struct Stamping;

impl Policy for Stamping {
    type State = ();

    fn penalty(&self, (): &mut (), reading: &Sample, _: PageRate, _: Penalty) -> Penalty {
        Penalty::new(Terms::Pace(EmissionInterval::from_nanos(reading.elapsed)))
    }
}

const EARLY: u64 = 1000 * SECOND;
/// The lease of a tick at `EARLY` is over.
const LATE: u64 = EARLY + 2 * VmCell::LEASE;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    Right,
    /// A twin: the controller sets the penalty before it renews the lease.
    PenaltyBeforeLease,
    /// A twin: the vCPU looks at the lease before the penalty.
    LeaseReadFirst,
}

/// A tick sets a first penalty long after the last tick. Whoever sees it must see the lease that came with it.
fn lease(order: Order) {
    let limiter = Arc::new(Limiter::<_, Inline<1>>::new(Stamping));
    let index = limiter.register().expect("room for one");
    limiter.set_limit(index, Some(PageRate::from_pages_per_sec(256)));
    limiter.tick(EARLY);
    let vcpu = thread::spawn({
        let limiter = limiter.clone();
        move || {
            let (vm, cell) = (limiter.vm(), limiter.cell(index).expect("registered"));
            let early = vm.is_leased(LATE);
            if cell.penalty.accept().terms().is_some() {
                let leased = if order == Order::LeaseReadFirst { early } else { vm.is_leased(LATE) };
                assert!(leased, "a penalty without its lease");
            }
        }
    });
    if order == Order::PenaltyBeforeLease {
        let (vm, cell) = (limiter.vm(), limiter.cell(index).expect("registered"));
        cell.penalty.set(Penalty::new(FIRST));
        renew(vm, LATE);
    } else {
        limiter.tick(LATE);
    }
    vcpu.join().expect("no panic");
    assert!(limiter.vm().is_leased(LATE));
}

#[test]
fn a_penalty_comes_with_its_lease() {
    holds("a_penalty_comes_with_its_lease", ALL, 25, || lease(Order::Right));
}

#[test]
fn twin_sets_the_penalty_before_the_lease() {
    fails("penalty before lease", ALL, None, "without its lease", || lease(Order::PenaltyBeforeLease));
}

#[test]
fn twin_reads_the_lease_first() {
    fails("lease read first", ALL, None, "without its lease", || lease(Order::LeaseReadFirst));
}

#[test]
fn twin_sets_relaxed() {
    let site = site("set_penalty.rs", "set");
    fails("set relaxed", ALL, Some(site), "without its lease", || lease(Order::Right));
}

#[test]
fn twin_accepts_relaxed() {
    let site = site("set_penalty.rs", "accept");
    fails("accept relaxed", ALL, Some(site), "without its lease", || lease(Order::Right));
}

/// A lease that was over is renewed while the vCPU settles; `forget`: with a pacer made anew each time.
fn expiry(steps: u64, forget: bool) {
    let limiter = Arc::new(Limiter::<_, Inline<1>>::new(Stamping));
    let index = limiter.register().expect("room for one");
    let cell = limiter.cell(index).expect("registered");
    limiter.set_limit(index, Some(PageRate::from_pages_per_sec(256)));
    limiter.tick(EARLY - SECOND);
    limiter.tick(EARLY); // one second a page, until EARLY + 5 s
    cell.counters.add_pages(1, 1);
    let vcpu = thread::spawn({
        let limiter = limiter.clone();
        move || {
            let (vm, cell) = (limiter.vm(), limiter.cell(index).expect("registered"));
            let mut pacer = Pacer::new(&cell.counters);
            let mut limited = false;
            for step in 0..steps {
                let now = LATE + step;
                if forget {
                    pacer = Pacer::new(&cell.counters);
                }
                cell.counters.add_pages(1, 1);
                assert!(pacer.owes(&cell.counters));
                let charge = pacer.charge(now, vm, &cell.penalty, &cell.counters);
                assert!(charge.until <= now + vm.max_pause(), "no pause is longer than the longest");
                assert!(charge.slice.is_some() || charge.until == now, "without a lease there is no pause");
                assert!(charge.slice.is_some() || !limited, "a lease once seen holds");
                let first = charge.slice.is_some() && !limited;
                assert!(!first || charge.until == now, "pages from before the lease are forgiven");
                assert!(first || !limited || charge.until > now, "and those under it are owed");
                limited |= charge.slice.is_some();
            }
        }
    });
    limiter.tick(LATE);
    vcpu.join().expect("no panic");
}

#[test]
fn a_lapsed_lease_frees_until_it_is_renewed() {
    holds("a_lapsed_lease_frees_until_it_is_renewed", ALL, 200, || expiry(if FULL { 2 } else { 1 }, false));
}

#[test]
fn twin_forgets_the_debt() {
    fails("debt forgotten", ALL, None, "are owed", || expiry(2, true));
}

/// What pays for a vCPU's pages at 1 ms each: the pacer, or its twin.
trait Payer: Send {
    fn charge(&mut self, counters: &Counters);
    /// In ms, all that was charged so far.
    fn charged(&self) -> u64;
}

/// The real pacer, at a time that stands still, with what it was told last.
struct Real {
    vm: VmCell,
    cell: PenaltyCell,
    pacer: Pacer,
    until: u64,
}

impl Payer for Real {
    fn charge(&mut self, counters: &Counters) {
        self.until = self.pacer.charge(EARLY, &self.vm, &self.cell, counters).until;
    }

    fn charged(&self) -> u64 {
        (self.until - EARLY) / 1_000_000
    }
}

/// The twin reads the count to charge for it, and again to note what it has charged.
struct ReadsTwice {
    paid: u32,
    charged: u64,
}

impl Payer for ReadsTwice {
    fn charge(&mut self, counters: &Counters) {
        self.charged += u64::from(counters.net().wrapping_sub(self.paid));
        self.paid = counters.net();
    }

    fn charged(&self) -> u64 {
        self.charged
    }
}

/// Another thread harvests the vCPU's ring and reports; the vCPU pays for all of it in the end.
fn harvested<P: Payer + 'static>(payer: impl Fn(&Counters) -> P) {
    let counters = Arc::new(Counters::new());
    counters.add_pages(u32::MAX - 1, u32::MAX - 1);
    let mut payer = payer(&counters);
    payer.charge(&counters);
    let vcpu = thread::spawn({
        let counters = counters.clone();
        move || {
            payer.charge(&counters);
            payer.charge(&counters);
            payer
        }
    });
    counters.add_pages(2, 2);
    counters.add_pages(3, 3);
    let mut payer = vcpu.join().expect("no panic");
    payer.charge(&counters);
    assert_eq!(payer.charged(), 5, "pages charged");
}

#[test]
fn every_harvested_page_is_charged_once() {
    holds("every_harvested_page_is_charged_once", ALL, 40, || {
        harvested(|counters| {
            let (vm, cell) = (VmCell::new(), PenaltyCell::new());
            renew(&vm, EARLY);
            cell.set(Penalty::new(Terms::Pace(EmissionInterval::from_nanos(1_000_000))));
            Real { vm, cell, pacer: Pacer::new(counters), until: EARLY }
        });
    });
}

#[test]
fn twin_reads_the_count_twice() {
    fails("count read twice", ALL, None, "pages charged", || {
        harvested(|counters| ReadsTwice { paid: counters.net(), charged: 0 });
    });
}
