//! A vCPU's thread: full exits, slices, pauses and what ends them, handles that come and go.

use std::fs::File;
use std::thread;
use std::time::Duration;

use super::vm;
use crate::fake::{Fake, Goes, PAGES, SLOT, immediate_exit, pages};
use crate::{Config, Decision, DirtyLimit, Error, Interrupter, PageRate, Vcpu};

const SOFT: u32 = 960;

fn slice(limit: &DirtyLimit) -> Option<u32> {
    limit.vm().lock().rows[&0].vcpu.slice()
}

/// Limited so that a slice is `pages` or a few more or less, and served until the ring ends it.
fn throttled(fake: &Fake, limit: &DirtyLimit, vcpu: &mut Vcpu, rate: u32) -> u32 {
    limit.set_limit(0, PageRate::from_pages_per_sec(rate)).unwrap();
    limit.tick();
    assert_eq!(fake.write_all(0, 0..PAGES), SOFT);
    _ = vcpu.before_run().unwrap();
    slice(limit).expect("limited")
}

/// A limit at which one page is owed for a second.
fn one_page_a_second(fake: &Fake, limit: &DirtyLimit, vcpu: &mut Vcpu) {
    throttled(fake, limit, vcpu, 100_000);
    limit.set_limit(0, PageRate::from_pages_per_sec(1)).unwrap();
    assert!(fake.write_all(0, 2000..PAGES) > 0);
}

#[test]
fn an_unlimited_vcpu_gets_its_whole_ring_and_pays_nothing() {
    let (fake, limit, _file, mut vcpu) = vm();
    for round in 0..5 {
        assert_eq!(fake.write_all(0, (0..PAGES).cycle().skip(round * 1000)), SOFT);
        _ = vcpu.before_run().unwrap();
        assert_eq!(vcpu.paused(), Duration::ZERO);
    }
    assert_eq!((limit.query(0).unwrap().totals.full_exits, limit.stats().soft_limit), (5, SOFT));
}

#[test]
fn a_limited_vcpu_exits_after_exactly_its_slice() {
    let (fake, limit, _file, mut vcpu) = vm();
    let mut slice_now = throttled(&fake, &limit, &mut vcpu, 20_000);
    let mut paused = 0;
    for round in 1..8 {
        assert_eq!(fake.write_all(0, (0..PAGES).skip(1000 * round)), slice_now);
        _ = vcpu.before_run().unwrap();
        paused += vcpu.paused().as_micros();
        slice_now = slice(&limit).unwrap();
        // What the limit allows in 3 ms, and at most as much again for what was not used before.
        assert!((60..=120).contains(&slice_now), "{slice_now}");
        // Served twice for one exit, or without one: nothing changes.
        _ = vcpu.before_run().unwrap();
        paused += vcpu.paused().as_micros();
    }
    // But for parts of a microsecond.
    let counted = u128::from(limit.query(0).unwrap().totals.paused_us);
    assert!(counted > 0 && counted.abs_diff(paused) < 100, "{counted} of {paused}");
}

#[test]
fn a_pass_leaves_the_slice_alone_and_a_take_is_complete() {
    let (fake, limit, _file, mut vcpu) = vm();
    let slice = throttled(&fake, &limit, &mut vcpu, 20_000);
    let pass = limit.round().unwrap();
    assert_eq!((pass.published(), pass.held_back()), (0, u64::from(SOFT - slice)));
    assert_eq!((limit.held_back(0).ok(), limit.held_back(1).ok()), (Some(SOFT - slice), None));
    assert_eq!(pages(&limit.take_published(SLOT).unwrap()).len(), slice as usize);
    assert_eq!(limit.query(0).unwrap().totals.net_pages, u64::from(SOFT));
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).len(), (SOFT - slice) as usize);
    assert_eq!(limit.held_back(0).unwrap(), 0);
    let totals = limit.query(0).unwrap().totals;
    assert_eq!((totals.net_pages, totals.gross_pages), (u64::from(SOFT), u64::from(SOFT)));
}

#[test]
fn a_page_counts_as_often_as_it_is_to_be_sent() {
    for taken_between in [false, true] {
        let (fake, limit, _file, _vcpu) = vm();
        let counted = || {
            limit.meter();
            let totals = limit.query(0).unwrap().totals;
            (totals.net_pages, totals.gross_pages)
        };
        let take = || pages(&limit.take_published(SLOT).unwrap()).len();
        fake.write_all(0, 5000..5100);
        limit.last_round().map(drop).unwrap();
        fake.write_all(0, 5000..5040); // armed by the sync: logged again, not yet handed out
        assert_eq!(counted(), (140, 140));
        if taken_between {
            assert_eq!(take(), 100);
        }
        limit.last_round().map(drop).unwrap();
        assert_eq!((take(), counted()), (if taken_between { 40 } else { 100 }, (140, 140)));
        fake.write_all(0, 6000..6050);
        // Sent once after all, 40 pages were counted twice: as many are free.
        assert_eq!(counted(), (if taken_between { 190 } else { 150 }, 190));
        fake.write_all(0, 6050..6100);
        assert_eq!(counted(), (if taken_between { 240 } else { 200 }, 240), "once");
    }
}

#[test]
fn one_reset_serves_all_who_wait() {
    let fake = Fake::new();
    let limit = fake.small();
    let files: Vec<File> = (0..4).map(|_| fake.vcpu(1024)).collect();
    let vcpus: Vec<Vcpu> = files.iter().zip(0..).map(|(file, id)| limit.add_vcpu(id, file).unwrap()).collect();
    for vcpu in 0..4 {
        fake.write_all(vcpu, (0..PAGES).skip(vcpu * 2000));
    }
    limit.meter();
    {
        let mut harvest = limit.vm().lock();
        for row in harvest.rows.values_mut() {
            row.vcpu.ask(row.shared.cell(&limit.vm().limiter), 100);
        }
        harvest.grant(&fake, &limit.vm().limiter).unwrap();
    }
    assert_eq!((fake.resets(), limit.stats().resets), (1, 400));
    for vcpu in 0..4 {
        assert_eq!(fake.write_all(vcpu, (0..PAGES).skip(vcpu * 2000 + 1000)), 100);
    }
    drop(vcpus);
}

#[test]
fn who_finds_the_lock_taken_lets_the_guest_try_again() {
    let (fake, limit, _file, mut vcpu) = vm();
    fake.write_all(0, 0..PAGES);
    let locked = limit.vm().lock();
    thread::scope(|scope| {
        _ = scope.spawn(|| vcpu.before_run().unwrap()).join().unwrap();
    });
    assert_eq!(vcpu.paused(), Duration::ZERO, "a wait for the lock is no pause");
    drop(locked);
    assert_eq!(fake.write_all(0, 0..PAGES), 0, "still full");
    _ = vcpu.before_run().unwrap();
    assert_eq!(fake.write_all(0, 5000..PAGES), SOFT);
}

#[test]
fn a_wedged_ring_is_an_error_after_a_bounded_number_of_exits() {
    let (fake, limit, _file, mut vcpu) = vm();
    fake.wedge(0);
    for exits in 1..=1000 {
        assert_eq!(fake.write_all(0, 0..1), 0);
        match vcpu.before_run() {
            Ok(_) => {}
            Err(Error::Wedged { id: 0, exits: told }) => {
                assert_eq!((told, exits), (64, 64));
                assert_eq!((limit.stats().resets, limit.stats().wedged), (0, 1));
                return;
            }
            Err(other) => panic!("{other}"),
        }
    }
    panic!("a thousand exits, and nobody says anything");
}

#[test]
fn what_a_reset_answers_reaches_the_vcpu_and_the_next_one_frees_it() {
    let (fake, limit, _file, mut vcpu) = vm();
    fake.write_all(0, 0..PAGES);
    fake.always(Some(Goes::Short(0)));
    assert!(matches!(vcpu.before_run(), Err(Error::ShortReset { .. })));
    assert_eq!(limit.stats().failed_resets, 1);
    fake.always(None);
    _ = vcpu.before_run().unwrap();
    assert!(fake.write(0, dirtylimit_core::Page { slot: SLOT, offset: 9000 }));
}

#[test]
fn immediate_exit_lets_through_unpaid() {
    let (fake, limit, file, mut vcpu) = vm();
    one_page_a_second(&fake, &limit, &mut vcpu);
    immediate_exit(&file, true);
    let paused = [(); 10].map(|()| {
        assert!(matches!(vcpu.before_run().unwrap(), Decision::Enter { .. }), "to complete what it has begun");
        vcpu.paused()
    });
    // The host may preempt it now and then.
    assert!(paused.iter().filter(|paused| **paused < Duration::from_millis(10)).count() > 5, "{paused:?}");
    immediate_exit(&file, false);
    assert!(matches!(vcpu.before_run().unwrap(), Decision::Enter { .. }));
    assert!(vcpu.paused() > Duration::from_millis(5), "it stays owed: {vcpu:?}");
}

#[test]
fn an_interrupt_before_a_pause_ends_it_and_only_it() {
    let (fake, limit, _file, mut vcpu) = vm();
    let interrupter: Interrupter = vcpu.interrupter();
    one_page_a_second(&fake, &limit, &mut vcpu);
    interrupter.interrupt();
    interrupter.interrupt();
    assert_eq!(vcpu.before_run().unwrap(), Decision::Return);
    assert_ne!(vcpu.before_run().unwrap(), Decision::Return, "two interrupts before a pause are one");
    let mut asked = 0;
    let stop = || {
        asked += 1;
        true
    };
    assert_eq!(vcpu.before_run_unless(stop).unwrap(), Decision::Return);
    assert_eq!(asked, 1);
}

#[test]
fn an_interrupt_and_a_cancel_end_a_pause_that_has_begun() {
    for cancel in [false, true] {
        let fake = Fake::new();
        // Pauses of a second: the test would notice by how long it takes, were one not to end.
        let limit = fake.limit(&Config::new().ring_entries(1024).max_pause(Duration::from_secs(1))).unwrap();
        limit.add_slot(SLOT, PAGES).unwrap();
        let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        one_page_a_second(&fake, &limit, &mut vcpu);
        let interrupter = vcpu.interrupter();
        let (begun, waits) = std::sync::mpsc::channel();
        let (decision, paused) = thread::scope(|scope| {
            let paying = scope.spawn(move || {
                let stop = || {
                    let _ = begun.send(());
                    false
                };
                (vcpu.before_run_unless(stop).unwrap(), vcpu.paused())
            });
            waits.recv().unwrap();
            if cancel {
                limit.cancel(0).unwrap()
            } else {
                interrupter.interrupt()
            }
            paying.join().unwrap()
        });
        assert_eq!(decision == Decision::Return, !cancel);
        assert!(paused < Duration::from_secs(1), "{paused:?}");
    }
}

#[test]
fn a_handle_comes_back_to_the_same_ring() {
    let (fake, limit, file, vcpu) = vm();
    assert!(matches!(limit.add_vcpu(0, &file), Err(Error::VcpuBusy(0))));
    assert!(matches!(limit.remove_vcpu(0), Err(Error::VcpuBusy(0))));
    fake.write_all(0, 0..PAGES);
    drop(vcpu);
    let mut vcpu = limit.add_vcpu(0, &file).unwrap();
    _ = vcpu.before_run().unwrap();
    _ = vcpu.before_run().unwrap();
    assert_eq!(fake.write_all(0, 5000..PAGES), SOFT);
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).len(), 2 * SOFT as usize);
}

#[test]
fn a_removed_vcpu_leaves_its_pages_and_nothing_else() {
    let (fake, limit, _file, vcpu) = vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(1000)).unwrap();
    fake.write_all(0, 0..70);
    drop(vcpu);
    limit.remove_vcpu(0).unwrap();
    assert!(matches!(limit.remove_vcpu(0), Err(Error::NoVcpu(0))));
    assert!(matches!(limit.query(0), Err(Error::NoVcpu(0))));
    assert_eq!(limit.vcpus(), [0; 0]);
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).len(), 70);
    let _new = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let status = limit.query(0).unwrap();
    assert_eq!((status.limit, status.totals.net_pages), (None, 0));
}

#[test]
fn a_descriptor_that_is_no_vcpus_is_refused() {
    let (_fake, limit, _file, _vcpu) = vm();
    let error = limit.add_vcpu(1, &File::open("/dev/null").unwrap()).unwrap_err();
    assert!(error.to_string().contains("mapping the vCPU's"), "{error}");
    assert_eq!(limit.vcpus(), [0]);
}

#[test]
fn slices_of_a_rewriter_grow_until_the_log_is_taken() {
    let (fake, limit, _file, mut vcpu) = vm();
    throttled(&fake, &limit, &mut vcpu, 100_000);
    let mut offsets = (0..2000).cycle();
    let mut next = || {
        while fake.write_all(0, offsets.next()) == 1 {}
        _ = vcpu.before_run().unwrap();
        slice(&limit).unwrap()
    };
    assert!((0..100).any(|_| next() >= 2400), "eight times as long");
    limit.take_published(SLOT).unwrap();
    assert!(next() <= 600, "twice at most");
}

/// The time slice of this thread, in ns; 0 where Linux, before 6.12, does not tell.
fn time_slice() -> u64 {
    // SAFETY: the call writes the zeroed structure, whose size is its third argument; 0 is the calling thread.
    unsafe {
        let mut attr: libc::sched_attr = std::mem::zeroed();
        assert_eq!(libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size_of::<libc::sched_attr>(), 0), 0);
        attr.sched_runtime
    }
}

#[test]
fn a_limited_vcpus_thread_is_prompt_where_that_was_asked_for() {
    for prompt in [false, true] {
        let fake = Fake::new();
        let limit = fake.limit(&Config::new().ring_entries(1024).prompt(prompt)).unwrap();
        limit.add_slot(SLOT, PAGES).unwrap();
        let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        let mut after_an_exit = || {
            fake.exit_full(0);
            _ = vcpu.before_run().unwrap();
            time_slice()
        };
        let before = time_slice();
        assert_eq!(after_an_exit(), before, "no limit");
        limit.set_limit(0, PageRate::from_pages_per_sec(1000)).unwrap();
        limit.tick();
        assert_eq!(after_an_exit(), if prompt { before.min(500_000) } else { before });
        limit.cancel(0).unwrap();
        limit.tick();
        assert_eq!(after_an_exit(), before, "no more");
    }
}
