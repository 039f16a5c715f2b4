//! What the core costs, against hand-written lower bounds in the same run.
//!
//! Criterion measures each pair; afterwards the two sides of each are timed in turns and their ratio of medians printed,
//! because on a shared machine only what was measured side by side compares. Every bench asserts its answer first.
#![expect(clippy::cast_possible_truncation, reason = "numbers of vCPUs")]

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use dirtylimit_core::{
    Counters, Entry, Inline, Limiter, Pacer, Page, PageRate, Penalty, PenaltyCell, Ring, SECOND, Shipped, Stepped,
    Terms, VcpuIndex,
};

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    accept(&mut criterion);
    meter(&mut criterion);
    tick(&mut criterion);
    criterion.final_summary();
}

/// Nanoseconds that one of `calls` calls takes, the median of many turns for each of `sides`, taken in turns.
fn medians<const N: usize>(calls: u32, mut sides: [&mut dyn FnMut(); N]) -> [f64; N] {
    const TURNS: usize = 301;
    let mut times = [[0.0; TURNS]; N];
    for turn in 0..TURNS {
        for (side, times) in sides.iter_mut().zip(&mut times) {
            let start = Instant::now();
            side();
            times[turn] = start.elapsed().as_secs_f64() * 1e9 / f64::from(calls);
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[TURNS / 2]
    })
}

fn report(what: &str, ours: f64, bound: f64, most: f64) {
    println!("{what}: {ours:.3} ns, by hand {bound:.3} ns: {:.2} x (at most {most})", ours / bound);
}

/// Accepting when there is no penalty, against one relaxed load.
fn accept(criterion: &mut Criterion) {
    const CALLS: u32 = 10_000;
    let (cell, counts) = (PenaltyCell::new(), Counters::new());
    let (word, pacer) = (AtomicU32::new(0), Pacer::new(&counts));
    // Seen to tell a penalty, and pages, from none.
    cell.set(Penalty::new(Terms::Pace(PageRate::from_pages_per_sec(1).interval())));
    assert!(cell.accept().terms().is_some());
    cell.set(Penalty::NONE);
    assert!(cell.accept().terms().is_none() && !pacer.owes(&counts));
    counts.add_pages(1, 1);
    assert!(pacer.owes(&counts));
    let pacer = Pacer::new(&counts);

    // Behind one opaque reference, so that each side loads all that it looks at every time, and nothing more.
    let all = &(word, cell, counts, pacer, 0u32);
    fn each<T>(all: &T, nothing: impl Fn(&T) -> bool) {
        // Eight in a row, so that how a loop happens to be aligned does not count.
        for _ in 0..CALLS / 8 {
            for _ in 0..8 {
                assert!(nothing(black_box(all)));
            }
        }
    }
    let mut load = || each(all, |(word, ..)| word.load(Ordering::Relaxed) == 0);
    let mut compare = || each(all, |(word, .., seen)| word.load(Ordering::Relaxed) == *seen);
    let mut accepts = || each(all, |(_, cell, ..)| cell.accept().terms().is_none());
    let mut owes = || each(all, |(_, _, counts, pacer, _)| !pacer.owes(counts));

    let mut group = criterion.benchmark_group("accept");
    group.throughput(Throughput::Elements(CALLS.into()));
    group.bench_function("relaxed load, by hand", |bencher| bencher.iter(&mut load));
    group.bench_function("PenaltyCell::accept", |bencher| bencher.iter(&mut accepts));
    group.bench_function("Pacer::owes", |bencher| bencher.iter(&mut owes));
    group.finish();
    let [by_hand, compared, accept, owes] = medians(CALLS, [&mut load, &mut compare, &mut accepts, &mut owes]);
    report("PenaltyCell::accept", accept, by_hand, 1.2);
    report("Pacer::owes", owes, by_hand, 1.2);
    println!("  which also looks at a word of its own; that by hand: {compared:.3} ns, {:.2} x", owes / compared);
}

/// The kernel's entry as anybody would write it.
#[repr(C)]
struct Plain {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// Metering a full ring of 4096 entries, against a loop over the same number of plain ones.
fn meter(criterion: &mut Criterion) {
    const SIZE: usize = 4096;
    const LOGGED: u32 = 4032;
    let entries: Vec<Entry> = (0..SIZE).map(|_| Entry::new()).collect();
    let mut plain: Vec<Plain> = vec![];
    for (i, entry) in (0..).zip(&entries) {
        let dirty = u32::from(i < u64::from(LOGGED));
        if dirty == 1 {
            entry.push(Page { slot: 1, offset: i });
        }
        plain.push(Plain { flags: dirty.into(), slot: 1.into(), offset: i.into() });
    }
    let expected = (LOGGED, u64::from(LOGGED) * u64::from(LOGGED - 1) / 2 + u64::from(LOGGED));

    let ours = || {
        let mut sum = 0u64;
        let mut ring = Ring::new(black_box(entries.as_slice())).expect("a good size");
        let count = ring.meter(|page| sum += page.offset + u64::from(page.slot));
        (count, sum)
    };
    let by_hand = || {
        let (mut sum, mut count) = (0u64, 0);
        for entry in black_box(plain.as_slice()) {
            if entry.flags.load(Ordering::Acquire) != 1 {
                break;
            }
            let page = Page { slot: entry.slot.load(Ordering::Relaxed), offset: entry.offset.load(Ordering::Relaxed) };
            sum += page.offset + u64::from(page.slot);
            count += 1;
        }
        (count, sum)
    };
    assert_eq!((ours(), by_hand()), (expected, expected));

    let mut group = criterion.benchmark_group("meter");
    group.throughput(Throughput::Elements(LOGGED.into()));
    group.bench_function("4032 entries, by hand", |bencher| bencher.iter(by_hand));
    group.bench_function("Ring::meter", |bencher| bencher.iter(ours));
    group.finish();
    // As a counter by page would: the closure stores somewhere.
    const ROUNDS: u32 = 20;
    let repeat = |run: &dyn Fn() -> (u32, u64)| (0..ROUNDS).for_each(|_| assert_eq!(black_box(run()), expected));
    let [hand, ring] = medians(LOGGED * ROUNDS, [&mut || repeat(&by_hand), &mut || repeat(&ours)]);
    report("Ring::meter, an entry", ring, hand, 1.3);
}

/// How the vCPUs of a tick are limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Limits {
    Paced,
    Stepped,
    /// Paced, and a budget of half of what the vCPUs' own limits allow.
    Budget,
}

const LIMIT: u32 = 25_600;
const TICK: u64 = SECOND / 20;

/// `N` vCPUs under a controller; each dirties pages at a rate of its own, from nothing to twice its limit.
struct Vm<const N: usize> {
    limiter: Box<Limiter<Shipped, Inline<N>>>,
    vcpus: Vec<VcpuIndex>,
    now: u64,
}

impl<const N: usize> Vm<N> {
    fn new(limits: Limits) -> Self {
        let policy = match limits {
            Limits::Stepped => Shipped::Stepped(Stepped::default()),
            Limits::Paced | Limits::Budget => Shipped::default(),
        };
        let limiter = Box::new(Limiter::new(policy));
        limiter.set_limit_all(Some(PageRate::from_pages_per_sec(LIMIT)));
        let vcpus = (0..N).map(|_| limiter.register().expect("room for all")).collect();
        if limits == Limits::Budget {
            limiter.set_vm_limit(Some(PageRate::from_pages_per_sec(LIMIT / 2 * N as u32)));
        }
        Self { limiter, vcpus, now: 1000 * SECOND }
    }

    /// What a vCPU dirties in a tick.
    fn pages(&self, vcpu: VcpuIndex) -> u32 {
        const MOST: u32 = LIMIT / 10; // twice the limit, in a twentieth of a second
        MOST - (vcpu.get() as u32).wrapping_mul(0x9e37_79b9) % MOST
    }

    /// One tick, and what the vCPUs report before it: a few ns more than the tick.
    fn tick(&mut self) {
        for vcpu in &self.vcpus {
            let pages = self.pages(*vcpu);
            self.limiter.cell(*vcpu).expect("registered").counters.add_pages(pages, pages);
        }
        self.now += TICK;
        self.limiter.tick(self.now);
    }

    /// Rates are what was dirtied, and whoever is above the limit has a penalty of the right kind.
    fn assert_limited(&self, limits: Limits) {
        for vcpu in &self.vcpus {
            let status = self.limiter.query(*vcpu, 0).expect("registered");
            let rate = u64::from(self.pages(*vcpu)) * 20;
            assert!(status.rate.pages_per_sec().abs_diff(rate) <= 1, "{status:?}, not {rate}");
            match (limits, status.penalty.terms()) {
                (Limits::Stepped, None) => assert!(rate <= u64::from(LIMIT) * 102 / 100, "{status:?}"),
                (Limits::Stepped, Some(Terms::Sleep(_))) => {}
                (Limits::Paced | Limits::Budget, Some(Terms::Pace(interval))) => {
                    assert!(interval.of(1_000_000) >= PageRate::from_pages_per_sec(LIMIT).interval().of(1_000_000));
                }
                (_, terms) => panic!("{limits:?}: {terms:?}"),
            }
        }
    }
}

fn tick(criterion: &mut Criterion) {
    for limits in [Limits::Paced, Limits::Stepped, Limits::Budget] {
        let each = [
            tick_of::<1>(criterion, limits),
            tick_of::<4>(criterion, limits),
            tick_of::<16>(criterion, limits),
            tick_of::<64>(criterion, limits),
            tick_of::<256>(criterion, limits),
            tick_of::<1024>(criterion, limits),
        ];
        let each = each.map(|time| format!("{time:.1}")).join(", ");
        println!("tick, {limits:?}, at 1, 4, 16, 64, 256, 1024 vCPUs: {each} ns a vCPU (at most 60 at 1024)");
    }
}

/// Nanoseconds a vCPU.
fn tick_of<const N: usize>(criterion: &mut Criterion, limits: Limits) -> f64 {
    let mut vm = Vm::<N>::new(limits);
    for _ in 0..100 {
        vm.tick();
    }
    vm.assert_limited(limits);
    let mut group = criterion.benchmark_group(format!("tick/{limits:?}"));
    group.throughput(Throughput::Elements(N as u64));
    group.bench_function(BenchmarkId::from_parameter(N), |bencher| bencher.iter(|| vm.tick()));
    group.finish();
    let ticks = (20_000 / N as u32).max(10);
    let [time] = medians(ticks * N as u32, [&mut || (0..ticks).for_each(|_| vm.tick())]);
    vm.assert_limited(limits);
    time
}
