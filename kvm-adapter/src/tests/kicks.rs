//! Which vCPUs are kicked, and when. The signal itself goes to the test's own thread, and does nothing there.

use std::sync::Arc;
use std::time::Duration;

use crate::fake::{Fake, PAGES, SLOT};
use crate::shared::SharedVcpu;
use crate::{Config, Decision, DirtyLimit, Kick, PageRate};

/// A VM with kicks and one vCPU, whose ring has 960 entries to its soft limit.
fn vm() -> (Fake, DirtyLimit, Arc<SharedVcpu>) {
    let fake = Fake::new();
    let kick = Kick::Signal(libc::SIGRTMAX() - 4);
    let limit = fake.limit(&Config::new().ring_entries(1024).kick(kick)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    drop(limit.add_vcpu(0, &fake.vcpu(1024)).unwrap());
    let shared = limit.vm().lock().rows[&0].shared.clone();
    // SAFETY: takes nothing.
    shared.bind(unsafe { libc::gettid() });
    (fake, limit, shared)
}

/// Kicks by a tick that finds `pages` new ones under a limit, in pages a second, of which the vCPU's thread knows nothing.
fn kicks_by_a_tick(limit_of: u32, pages: u64) -> u32 {
    let (fake, limit, shared) = vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(limit_of)).unwrap();
    limit.tick();
    let before = shared.kicks();
    fake.write_all(0, 0..pages);
    limit.tick();
    shared.kicks() - before
}

#[test]
fn a_tick_kicks_who_writes_under_a_limit_that_is_news_unless_the_ring_is_better_left_to_fill() {
    // 16 pages in 4 ms: kicks end such slices well.
    assert_eq!([0, 1, 500].map(|pages| kicks_by_a_tick(4000, pages)), [0, 1, 1]);
    // They do not: left to fill where a quarter of its room is written from one tick to the next.
    assert_eq!([0, 1, 191, 192, 500].map(|pages| kicks_by_a_tick(1000, pages)), [0, 1, 1, 0, 0]);
}

#[test]
fn a_sweep_kicks_those_whose_rings_no_longer_end_their_slices() {
    let (fake, limit, shared) = vm();
    fake.write_all(0, 0..960);
    let slice = |slice| limit.vm().lock().rows.get_mut(&0).unwrap().vcpu.assign(slice, true, false);
    let swept = || {
        let before = shared.kicks();
        limit.last_round().map(drop).unwrap();
        (shared.kicks() - before, limit.vm().lock().rows[&0].vcpu.slice())
    };
    slice(Some(960));
    assert_eq!(swept(), (0, Some(960)), "the empty ring ends that one");
    slice(Some(100));
    assert_eq!(swept(), (1, None));
    assert_eq!(swept(), (0, None), "once");
}

#[test]
fn a_limit_is_news_until_its_vcpus_thread_knows_it_and_while_there_is_one() {
    let (_, limit, shared) = vm();
    let is_news = || limit.vm().lock().rows[&0].vcpu.is_news(shared.cell(&limit.vm().limiter), 1);
    assert!(!is_news(), "no limit");
    limit.set_limit(0, PageRate::from_pages_per_sec(4000)).unwrap();
    limit.tick();
    assert!(is_news());
    limit.vm().lock().rows.get_mut(&0).unwrap().vcpu.assign(None, true, false);
    assert!(!is_news());
    limit.cancel(0).unwrap();
    limit.tick();
    assert!(!is_news());
}

#[test]
fn a_descriptor_that_takes_no_signal_mask_is_told() {
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(1024).kick(Kick::Signal(libc::SIGRTMAX() - 4))).unwrap();
    let error = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap().before_run().unwrap_err();
    assert!(error.errno() == libc::ENOTTY && error.to_string().contains("KVM_SET_SIGNAL_MASK"), "{error}");
}

/// What a vCPU does after each of `runs`, in pages, under a limit in pages a second; `kick` is not the library's.
fn paid_after(runs: &[u64], limit_of: u32, kick: Kick) -> Vec<(Duration, Decision)> {
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(1024).kick(kick)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(limit_of)).unwrap();
    limit.tick();
    let mut next = 0;
    let mut run = |pages| {
        assert_eq!(u64::from(fake.write_all(0, next..next + pages)), pages);
        next += pages;
        let decision = vcpu.before_run().unwrap();
        (vcpu.paused(), decision)
    };
    // What was dirtied before the limit is noticed is forgiven.
    _ = run(10);
    limit.tick();
    runs.iter().map(|pages| run(*pages)).collect()
}

#[test]
fn a_slice_that_the_ring_does_not_end_is_kicked_after_a_time_that_is_learned() {
    let after = |kick| paid_after(&[0, 1, 1], 4000, kick).iter().map(|paid| paid.1).collect::<Vec<_>>();
    let enter = |kick_after: Option<u64>| Decision::Enter { kick_after: kick_after.map(Duration::from_micros) };
    assert_eq!(after(Kick::Vmm), [5, 10, 20].map(|time| enter(Some(time))));
    assert_eq!(after(Kick::Off), [enter(None); 3]);
}

#[test]
fn who_is_kicked_pays_for_a_run_with_pages_and_goes_on_after_one_without() {
    let paid = paid_after(&[0, 200, 0, 2], 4000, Kick::Vmm);
    let pauses = [0, 1, 2, 3].map(|run: usize| !paid[run].0.is_zero());
    assert_eq!(pauses, [false, true, false, true], "{paid:?}");
}

#[test]
fn where_a_kick_ends_slices_badly_a_fast_writer_fills_its_ring_and_owes_nothing_for_it() {
    let paid = paid_after(&[0, 200], 1000, Kick::Vmm);
    assert_eq!(paid[1], (Duration::ZERO, Decision::Enter { kick_after: Some(Duration::from_millis(100)) }));
}
