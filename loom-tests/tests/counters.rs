//! A vCPU's counters, against a controller that reads them and across their wrap-around.

use std::sync::Arc;

use dirtylimit_loom::explore::{ALL, FULL, fails, holds};
use dirtylimit_loom::prepare::{Counters, RateEstimator};
use loom::sync::Mutex;
use loom::thread;

/// Counters start so close to their maximum that each wraps.
fn nearly_full() -> Counters {
    let counters = Counters::new();
    counters.add_pages(u32::MAX - 1, u32::MAX);
    counters
}

/// One thread counts what the ring's owner and what the vCPU's thread do, the controller reads meanwhile and once
/// after.
fn counters(step: fn(&Counters, u32)) {
    let counters = Arc::new(nearly_full());
    let controller = thread::spawn({
        let counters = counters.clone();
        move || {
            let mut estimator = RateEstimator::starting_at(nearly_full().counts());
            let mut sum = 0;
            for _ in 0..if FULL { 2 } else { 1 } {
                sum += estimator.read(&counters, 1_000_000).pages;
                assert!([0, 1, 4].contains(&sum), "{sum} pages");
            }
            (estimator, sum)
        }
    });
    step(&counters, 1);
    counters.add_full_exit();
    step(&counters, 3);
    counters.add_pause(2_500);
    let (mut estimator, sum) = controller.join().expect("no panic");
    assert!(estimator.totals(&counters).net_pages >= u64::from(sum), "totals never go back");
    estimator.read(&counters, 1_000_000);
    let totals = estimator.totals(&counters);
    assert_eq!((totals.net_pages, totals.gross_pages, totals.full_exits, totals.paused_us), (4, 5, 1, 2));
    assert_eq!(counters.net(), 2, "wrapped");
}

#[test]
fn nothing_is_lost_across_the_wrap() {
    holds("nothing_is_lost_across_the_wrap", ALL, 1000, || {
        counters(|counters, pages| counters.add_pages(pages, pages.max(2)))
    });
}

#[test]
fn twin_counts_in_halves() {
    // Counts up to the sum in two steps: a reader meets what never was a whole addition.
    fails("counted in halves", ALL, None, "pages", || {
        counters(|counters, pages| {
            counters.add_pages(pages - pages / 2, 1);
            counters.add_pages(pages / 2, pages.max(2) - 1);
        });
    });
}

/// The ring changes hands between two threads; `locked`: under its lock.
fn owners(locked: bool) {
    let (counters, ring) = (Arc::new(nearly_full()), Arc::new(Mutex::new(())));
    let before = counters.counts();
    let count = move |counters: &Counters, ring: &Mutex<()>| {
        let _owner = locked.then(|| ring.lock().expect("not poisoned"));
        counters.add_pages(2, 2);
    };
    let other = thread::spawn({
        let (counters, ring) = (counters.clone(), ring.clone());
        move || count(&counters, &ring)
    });
    count(&counters, &ring);
    other.join().expect("no panic");
    assert_eq!(counters.counts().since(before).net, 4, "pages uncounted");
}

#[test]
fn the_rings_lock_makes_one_writer() {
    holds("the_rings_lock_makes_one_writer", ALL, 6, || owners(true));
}

#[test]
fn twin_counts_without_the_rings_lock() {
    fails("two writers", ALL, None, "uncounted", || owners(false));
}
