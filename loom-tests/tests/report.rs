//! The counters of a report, against a controller that reads them and across their wrap-around.

use std::sync::Arc;

use dirtylimit_loom::explore::{ALL, FULL, fails, holds};
use dirtylimit_loom::meter::{Meter, Report};
use loom::sync::Mutex;
use loom::thread;

/// Counters start so close to their maximum that each wraps.
fn nearly_full() -> Report {
    let report = Report::new();
    report.add_pages(u32::MAX - 1, u32::MAX);
    report
}

/// One thread counts what the ring's owner and what the vCPU's thread do, the controller reads meanwhile and once
/// after.
fn counters(step: fn(&Report, u32)) {
    let report = Arc::new(nearly_full());
    let controller = thread::spawn({
        let report = report.clone();
        move || {
            let mut meter = Meter::starting_at(nearly_full().counts());
            let mut sum = 0;
            for _ in 0..if FULL { 2 } else { 1 } {
                sum += meter.read(&report, 1_000_000).pages;
                assert!([0, 1, 4].contains(&sum), "{sum} pages");
            }
            (meter, sum)
        }
    });
    step(&report, 1);
    report.add_full_exit();
    step(&report, 3);
    report.add_pause(2_500);
    let (mut meter, sum) = controller.join().expect("no panic");
    assert!(meter.totals(&report).net_pages >= u64::from(sum), "totals never go back");
    meter.read(&report, 1_000_000);
    let totals = meter.totals(&report);
    assert_eq!((totals.net_pages, totals.gross_pages, totals.full_exits, totals.paused_us), (4, 5, 1, 2));
    assert_eq!(report.net(), 2, "wrapped");
}

#[test]
fn nothing_is_lost_across_the_wrap() {
    holds("nothing_is_lost_across_the_wrap", ALL, 1000, || {
        counters(|report, pages| report.add_pages(pages, pages.max(2)))
    });
}

#[test]
fn twin_counts_in_halves() {
    // Counts up to the sum in two steps: a reader meets what never was a whole addition.
    fails("counted in halves", ALL, None, "pages", || {
        counters(|report, pages| {
            report.add_pages(pages - pages / 2, 1);
            report.add_pages(pages / 2, pages.max(2) - 1);
        });
    });
}

/// The ring changes hands between two threads; `locked`: under its lock.
fn owners(locked: bool) {
    let (report, ring) = (Arc::new(nearly_full()), Arc::new(Mutex::new(())));
    let before = report.counts();
    let count = move |report: &Report, ring: &Mutex<()>| {
        let _owner = locked.then(|| ring.lock().expect("not poisoned"));
        report.add_pages(2, 2);
    };
    let other = thread::spawn({
        let (report, ring) = (report.clone(), ring.clone());
        move || count(&report, &ring)
    });
    count(&report, &ring);
    other.join().expect("no panic");
    assert_eq!(report.counts().since(before).net, 4, "pages uncounted");
}

#[test]
fn the_rings_lock_makes_one_writer() {
    holds("the_rings_lock_makes_one_writer", ALL, 6, || owners(true));
}

#[test]
fn twin_counts_without_the_rings_lock() {
    fails("two writers", ALL, None, "uncounted", || owners(false));
}
