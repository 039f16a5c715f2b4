//! Which vCPUs are kicked, and when. The signal itself goes to the test's own thread, and does nothing there.

use std::sync::Arc;

use crate::fake::{Fake, PAGES, SLOT};
use crate::seat::Seat;
use crate::{Config, DirtyLimit, Kick, PageRate};

/// A VM with kicks and one vCPU, whose ring has 960 entries to its soft limit.
fn vm() -> (Fake, DirtyLimit, Arc<Seat>) {
    let fake = Fake::new();
    let kick = Kick::Signal(libc::SIGRTMAX() - 4);
    let limit = fake.limit(&Config::new().ring_entries(1024).kick(kick)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    drop(limit.add_vcpu(0, &fake.vcpu(1024)).unwrap());
    let seat = limit.vm().lock().places[&0].seat.clone();
    // SAFETY: takes nothing.
    seat.bind(unsafe { libc::gettid() });
    (fake, limit, seat)
}

/// Kicks by a tick that finds `pages` new ones under a limit, in pages a second, of which the vCPU's thread knows nothing.
fn kicks_by_a_tick(limit_of: u32, pages: u64) -> u32 {
    let (fake, limit, seat) = vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(limit_of)).unwrap();
    limit.tick();
    let before = seat.kicks();
    fake.write_all(0, 0..pages);
    limit.tick();
    seat.kicks() - before
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
    let (fake, limit, seat) = vm();
    fake.write_all(0, 0..960);
    let slice = |slice| limit.vm().lock().places.get_mut(&0).unwrap().vcpu.assign(slice, true, false);
    let swept = || {
        let before = seat.kicks();
        limit.last_round().map(drop).unwrap();
        (seat.kicks() - before, limit.vm().lock().places[&0].vcpu.slice())
    };
    slice(Some(960));
    assert_eq!(swept(), (0, Some(960)), "the empty ring ends that one");
    slice(Some(100));
    assert_eq!(swept(), (1, None));
    assert_eq!(swept(), (0, None), "once");
}

#[test]
fn a_limit_is_news_until_its_vcpus_thread_knows_it_and_while_there_is_one() {
    let (_, limit, seat) = vm();
    let is_news = || limit.vm().lock().places[&0].vcpu.is_news(seat.cell(&limit.vm().limiter), 1);
    assert!(!is_news(), "no limit");
    limit.set_limit(0, PageRate::from_pages_per_sec(4000)).unwrap();
    limit.tick();
    assert!(is_news());
    limit.vm().lock().places.get_mut(&0).unwrap().vcpu.assign(None, true, false);
    assert!(!is_news());
    limit.cancel(0).unwrap();
    limit.tick();
    assert!(!is_news());
}
