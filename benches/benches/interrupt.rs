//! How soon a vCPU that is in a penalty pause is back in the VMM once it is interrupted. Needs KVM, and says so.

use std::time::Duration;

use criterion::Criterion;
use dirtylimit_bench::guest::kvm;
use dirtylimit_bench::scenario::interrupt::Paused;

fn main() {
    if let Err(error) = kvm::open() {
        println!("interrupt: not measured, {error:#}");
        return;
    }
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut paused = Paused::new().expect("a vCPU can be limited and paused");
    criterion.bench_function("interrupt a paused vCPU", |bench| {
        // Only the time from the call until the thread is back counts, not that until it is asleep again.
        bench.iter_custom(|times| (0..times).map(|_| paused.interrupt().expect("it comes back")).sum());
    });
    paused.stop().expect("it ends");
    criterion.final_summary();
}
