//! What harvesting costs beside its system calls, against hand-written lower bounds in the same run: counting, a full
//! ring from meter to publish, the take, and the split of a budget. Every bench asserts the equal answer first.
//!
//! The adapter's bitmaps are its own source file, as they are no part of its interface.
#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use dirtylimit_core::{Claim, Counters, Entry, Page, PageRate, Ring, level};
use dirtylimit_kvm::Error;

#[expect(dead_code, reason = "not all of it is measured")]
#[path = "../../kvm-adapter/src/slots.rs"]
mod slots;
use slots::{Slot, Slots};

const SIZE: usize = 4096;
const LOGGED: u32 = 4032;
const SLOT: u32 = 1;
/// A slot of 1 GiB.
const PAGES: u64 = 1 << 18;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    count(&mut criterion);
    harvest(&mut criterion);
    take(&mut criterion);
    split(&mut criterion);
    criterion.final_summary();
}

/// Counting a turn's pages, against the loads and stores that it cannot do without.
fn count(criterion: &mut Criterion) {
    let (counters, plain) = (Counters::new(), [AtomicU32::new(0), AtomicU32::new(0)]);
    let ours = || black_box(&counters).add_pages(3, 5);
    let by_hand = || {
        let [net, gross] = black_box(&plain);
        net.store(net.load(Relaxed).wrapping_add(3), Relaxed);
        gross.store(gross.load(Relaxed).wrapping_add(5), Relaxed);
    };
    (0..10).for_each(|_| (ours(), by_hand()).0);
    assert_eq!((counters.counts().net, counters.counts().gross), (plain[0].load(Relaxed), plain[1].load(Relaxed)));
    let mut group = criterion.benchmark_group("count");
    group.bench_function("two loads and stores, by hand", |bencher| bencher.iter(by_hand));
    group.bench_function("Counters::add_pages", |bencher| bencher.iter(ours));
    group.finish();
}

/// The offset of the ring's entry `i`: spread, as a guest's writes are.
fn offset(i: u32) -> u64 {
    u64::from(i.wrapping_mul(0x9e37_79b9)) % PAGES
}

fn slots() -> Slots {
    let mut slots = Slots::default();
    let slot = Slot::new(SLOT, PAGES).expect("a good size");
    slots.add(SLOT, slot).expect("a new slot");
    slots
}

/// The dirty log of [`SLOT`], taken at once.
fn taken(slots: &mut Slots) -> Vec<u64> {
    let found = slots.find(SLOT).expect("there is one");
    let mut words = vec![0; found.words];
    slots.take(found, 0, &mut words).expect("the same");
    words
}

/// A full ring: metered, collected, reset, reclaimed, published. By hand: each entry is copied, marked, emptied, its bit
/// set in one bitmap.
fn harvest(criterion: &mut Criterion) {
    let full = || -> Vec<Entry> {
        let entries: Vec<Entry> = (0..SIZE).map(|_| Entry::new()).collect();
        entries.iter().zip(0..LOGGED).for_each(|(entry, i)| entry.push(Page { slot: SLOT, offset: offset(i) }));
        entries
    };
    let ours = |entries: &Vec<Entry>, slots: &mut Slots, batch: &mut Vec<Page>| {
        let mut ring = Ring::new(entries.as_slice()).expect("a good size");
        let mut net = 0;
        ring.meter(|page| net += u32::from(slots.meter(page) == dirtylimit_core::Metered::New));
        ring.collect(LOGGED, |page| batch.push(page));
        entries.iter().map_while(Entry::reset).for_each(drop); // the kernel's part
        ring.reclaim();
        let merged = batch.drain(..).filter(|page| slots.publish(*page, false)).count();
        (net, merged)
    };
    let plain = || -> Vec<[AtomicU64; 2]> {
        (0..LOGGED).map(|i| [(1 | u64::from(SLOT) << 32).into(), offset(i).into()]).collect()
    };
    let by_hand = |entries: &Vec<[AtomicU64; 2]>, bitmap: &mut [u64], batch: &mut Vec<u64>| {
        for [flags, offset] in entries {
            batch.push(offset.load(Relaxed));
            flags.store(2, Relaxed);
        }
        entries.iter().for_each(|[flags, _]| flags.store(0, Relaxed));
        let mut net = 0;
        for offset in batch.drain(..) {
            let word = &mut bitmap[(offset / 64) as usize];
            net += u32::from(*word >> (offset % 64) & 1 == 0);
            *word |= 1 << (offset % 64);
        }
        net
    };
    let (mut dirty, mut bitmap) = (slots(), vec![0; PAGES as usize / 64]);
    let (mut batch, mut offsets) = (Vec::with_capacity(SIZE), Vec::with_capacity(SIZE));
    assert_eq!(ours(&full(), &mut dirty, &mut batch), (by_hand(&plain(), &mut bitmap, &mut offsets), 0));
    assert_eq!(taken(&mut dirty), bitmap);

    let mut group = criterion.benchmark_group("harvest");
    group.throughput(Throughput::Elements(LOGGED.into()));
    group.bench_function("copy and set bits, by hand", |bencher| {
        bencher.iter_batched_ref(plain, |entries| by_hand(entries, &mut bitmap, &mut offsets), BatchSize::LargeInput);
    });
    group.bench_function("meter, collect, reset, publish", |bencher| {
        bencher.iter_batched_ref(full, |entries| ours(entries, &mut dirty, &mut batch), BatchSize::LargeInput);
    });
    group.finish();
}

/// Taking the dirty log of 1 GiB, against moving its words.
fn take(criterion: &mut Criterion) {
    let dirty = || {
        let mut slots = slots();
        for i in 0..LOGGED {
            slots.publish(Page { slot: SLOT, offset: offset(i) }, false);
        }
        slots
    };
    let plain = || taken(&mut dirty());
    let by_hand = |words: &mut Vec<u64>| -> Vec<u64> { words.iter_mut().map(std::mem::take).collect() };
    assert_eq!(taken(&mut dirty()), by_hand(&mut plain()));
    let mut group = criterion.benchmark_group("take");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("move the words, by hand", |bencher| {
        bencher.iter_batched_ref(plain, by_hand, BatchSize::LargeInput);
    });
    group.bench_function("Slots::take", |bencher| {
        bencher.iter_batched_ref(dirty, taken, BatchSize::LargeInput);
    });
    group.finish();
}

/// Splitting a budget among 1,024 vCPUs of equal weight, against filling up from the least demand in a sorted list.
fn split(criterion: &mut Criterion) {
    const BUDGET: u32 = 1024 * 10_000;
    let demand = |i: u32| i.wrapping_mul(0x9e37_79b9) % 40_000;
    let claims: Vec<Claim> = (0..1024).map(|i| Claim::new(PageRate::from_pages_per_sec(demand(i)), 1)).collect();
    let mut sorted: Vec<u64> = (0..1024).map(|i| u64::from(demand(i)) << 10).collect();
    sorted.sort_unstable();
    let ours = |claims: &mut Vec<Claim>| level(claims.iter().copied(), PageRate::from_pages_per_sec(BUDGET));
    let by_hand = || {
        let mut left = u64::from(BUDGET) << 10;
        for (demand, sharers) in black_box(&sorted).iter().zip((1..=1024).rev()) {
            if demand * sharers > left {
                return Some(left / sharers);
            }
            left -= demand;
        }
        None
    };
    let pages = |level: u64| level >> 10;
    assert_eq!(ours(&mut claims.clone()).map(PageRate::pages_per_sec), by_hand().map(pages));
    let mut group = criterion.benchmark_group("split");
    group.throughput(Throughput::Elements(1024));
    group.bench_function("one pass over a sorted list, by hand", |bencher| bencher.iter(by_hand));
    group.bench_function("level", |bencher| {
        bencher.iter_batched_ref(|| claims.clone(), ours, BatchSize::LargeInput);
    });
    group.finish();
}
