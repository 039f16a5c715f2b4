//! The instructions that the hot paths take, counted by callgrind: `ci/callgrind.sh` compares them with
//! `core-nostd/benches/callgrind.txt`. Run by itself it says how to.
//!
//! Each case sets up, and calls [`counted`], the only part that is counted, with the same work every time.

use std::hint::black_box;

use dirtylimit_core::{
    Counters, Ended, Entry, Inline, Limiter, Machine, Metered, Nanos, Pacer, Page, PageRate, PenaltyCell, Ring, SECOND,
    Shipped, Step, Stepped, VcpuIndex, VcpuRing,
};

/// Calls of the smaller paths; what the loop around them takes is counted too.
const CALLS: u32 = 1000;
const NOW: Nanos = 1000 * SECOND;

/// Callgrind collects while this runs.
#[inline(never)]
fn counted(mut work: impl FnMut()) {
    work();
}

fn main() {
    let case = std::env::args().nth(1).unwrap_or_default();
    match case.as_str() {
        "accept" => accept(),
        "report" => report(),
        "settle-paced" => settle(Shipped::default()),
        "settle-stepped" => settle(Shipped::Stepped(Stepped::default())),
        "exit" => exit(),
        "meter-4032" => meter(),
        "collect-4032" => collect(),
        "tick-1" => tick::<1>(Shipped::default(), false),
        "tick-64" => tick::<64>(Shipped::default(), false),
        "tick-64-stepped" => tick::<64>(Shipped::Stepped(Stepped::default()), false),
        "tick-64-budget" => tick::<64>(Shipped::default(), true),
        "tick-1024" => tick::<1024>(Shipped::default(), false),
        // What cargo bench and cargo test give.
        "" | "--bench" | "--test" => println!("instructions: counted by ci/callgrind.sh"),
        unknown => {
            eprintln!("instructions: no case {unknown}");
            std::process::exit(2);
        }
    }
}

/// A vCPU that owes nothing: what is looked at before each KVM_RUN.
fn accept() {
    let (cell, counts) = (PenaltyCell::new(), Counters::new());
    let pacer = Pacer::new(&counts);
    let all = (cell, counts, pacer);
    counted(|| {
        for _ in 0..CALLS {
            let (cell, counts, pacer) = black_box(&all);
            assert!(!pacer.owes(counts) && cell.accept().terms().is_none());
        }
    });
}

fn report() {
    let counters = Counters::new();
    counted(|| {
        for _ in 0..CALLS {
            let counters = black_box(&counters);
            counters.add_pages(3, 5);
            counters.add_full_exit();
            counters.add_pause(7000);
        }
    });
    let counts = counters.counts();
    assert_eq!((counts.net, counts.gross, counts.full_exits, counts.paused), (3000, 5000, 1000, 7000));
}

/// A limited vCPU's turns, each with the pages of a slice and the time that they cost.
fn settle(policy: Shipped) {
    let (limiter, vcpus) = limited::<1>(policy, false);
    let cell = limiter.cell(vcpus[0]).expect("registered");
    // Above its limit until the policy has a penalty for it.
    for round in 1..=20 {
        cell.counters.add_pages(2560, 2560);
        limiter.tick(NOW + round * SECOND / 20);
    }
    let mut pacer = Pacer::new(&cell.counters);
    let mut slices = 0;
    counted(|| {
        let mut now = NOW + SECOND;
        for _ in 0..CALLS {
            cell.counters.add_pages(100, 100);
            let charge = pacer.charge(now, limiter.vm(), &cell.penalty, &cell.counters);
            slices += u32::from(charge.slice.is_some());
            now += 4_000_000;
        }
    });
    assert_eq!(slices, CALLS, "limited all the time");
}

/// A limited vCPU's exits with a full ring, each up to its next entry: what the machine and the ring take beside the entries of
/// a slice.
fn exit() {
    let (limiter, vcpus) = limited::<1>(Shipped::default(), false);
    let (vm, cell) = (limiter.vm(), limiter.cell(vcpus[0]).expect("registered"));
    let entries = full_ring();
    let mut vcpu = VcpuRing::new(Ring::new(entries.as_slice()).expect("a good size"));
    let mut machine = Machine::new(cell, 4096, false, false);
    let at = |index: u32| &entries[index as usize % entries.len()];
    let (mut now, mut dirty, mut reset, mut entered) = (NOW, 4032, 0, 0);
    counted(|| {
        for _ in 0..CALLS {
            machine.full_exit(cell);
            let mut step = machine.begin(now, vm, cell);
            loop {
                step = match step {
                    Step::Harvest => {
                        vcpu.meter(cell, |_| Metered::New);
                        machine.harvested(now, vm, cell, &mut vcpu, false)
                    }
                    Step::Pause { until, .. } => {
                        let from = now;
                        now = now.max(until);
                        machine.paused(from, now, Ended::Due, vm, cell)
                    }
                    Step::Reset => {
                        vcpu.collect(vcpu.to_grant(), |_| ());
                        // The kernel, and the guest's next slice.
                        while at(reset).reset().is_some() {
                            at(dirty).push(Page { slot: 1, offset: dirty.into() });
                            (dirty, reset) = (dirty + 1, reset + 1);
                        }
                        vcpu.reclaim();
                        vcpu.grant(cell);
                        machine.reset_done(now, cell)
                    }
                    Step::Enter(_) | Step::Return(_) | Step::Wedged(_) => break,
                };
            }
            entered += 1;
        }
    });
    assert_eq!((entered, cell.counters.counts().full_exits), (CALLS, CALLS));
    assert!(cell.counters.counts().net > 4032 + 50 * CALLS, "it runs on");
}

fn full_ring() -> Vec<Entry> {
    let entries: Vec<Entry> = (0..4096).map(|_| Entry::new()).collect();
    entries.iter().zip(0..4032).for_each(|(entry, offset)| entry.push(Page { slot: 1, offset }));
    entries
}

fn meter() {
    let entries = full_ring();
    let mut ring = Ring::new(entries.as_slice()).expect("a good size");
    let mut sum = 0;
    counted(|| assert_eq!(black_box(&mut ring).meter(|page| sum += page.offset), 4032));
    assert_eq!(sum, 4032 * 4031 / 2);
}

fn collect() {
    let entries = full_ring();
    let mut ring = Ring::new(entries.as_slice()).expect("a good size");
    assert_eq!(ring.meter(|_| ()), 4032);
    let mut sum = 0;
    counted(|| assert_eq!(black_box(&mut ring).collect(4032, |page| sum += page.offset), 4032));
    assert_eq!(sum, 4032 * 4031 / 2);
}

/// `N` vCPUs limited to 100 MiB/s, with a budget of half of that if asked for.
fn limited<const N: usize>(policy: Shipped, budget: bool) -> (Box<Limiter<Shipped, Inline<N>>>, Vec<VcpuIndex>) {
    let limiter = Box::new(Limiter::new(policy));
    limiter.set_limit_all(Some(PageRate::from_pages_per_sec(25_600)));
    let vcpus: Vec<_> = (0..N).map(|_| limiter.register().expect("room for all")).collect();
    if budget {
        limiter.set_vm_limit(Some(PageRate::from_pages_per_sec(12_800 * 64)));
    }
    limiter.tick(NOW);
    (limiter, vcpus)
}

/// The vCPUs dirty from nothing to twice their limits, and the tick that follows.
fn tick_once<const N: usize>(limiter: &Limiter<Shipped, Inline<N>>, vcpus: &[VcpuIndex], round: u64) {
    for (vcpu, number) in vcpus.iter().zip(1u32..) {
        let pages = 2560 - number.wrapping_mul(0x9e37_79b9) % 2560;
        limiter.cell(*vcpu).expect("registered").counters.add_pages(pages, pages);
    }
    limiter.tick(NOW + round * SECOND / 20);
}

fn tick<const N: usize>(policy: Shipped, budget: bool) {
    let (limiter, vcpus) = limited::<N>(policy, budget);
    (1..20).for_each(|round| tick_once(&limiter, &vcpus, round));
    counted(|| tick_once(&limiter, &vcpus, 20));
    let penalised = vcpus.iter().filter(|vcpu| limiter.query(**vcpu, 0).expect("registered").penalty.terms().is_some());
    assert!(penalised.count() >= N / 3);
}
