use std::vec::Vec;

use super::*;
use crate::accept_penalty::Metered;
use crate::rate::{PageRate, SECOND};
use crate::ring::{PML, Page, Ring};
use crate::set_penalty::Terms;

const SIZE: u32 = 1024;
const SOFT: u32 = SIZE - crate::ring::RESERVED;
const MAX_PAUSE: Nanos = 10_000_000;

mod guest;
use guest::Guest;

fn is_enter(step: Step) -> bool {
    step == Step::Enter(Run::default())
}

#[test]
fn a_vcpu_without_a_limit_gets_its_whole_ring_and_does_not_pause() {
    let mut guest = Guest::new(false, false);
    for _ in 0..5 {
        assert_eq!(guest.write(u32::MAX), SOFT);
        assert!(is_enter(guest.exit()));
        assert!(guest.machine.is_quiet(&guest.cell) && !guest.machine.is_run_over(), "nothing is owed");
    }
    assert_eq!((guest.longest, guest.cell.counters.counts().full_exits), (0, 5));
}

#[test]
fn a_limit_is_held_from_the_first_slice_on_and_no_pause_is_longer_than_the_longest() {
    for rate in [100, 1000, 20_000, 150_000] {
        let mut guest = Guest::limited(rate);
        let (begin, dirty) = (guest.now, guest.dirty);
        while guest.now < begin + 2 * SECOND {
            let wrote = guest.write(u32::MAX);
            assert!((1..=SOFT / 2).contains(&wrote), "{rate}: a slice of {wrote}");
            assert!(is_enter(guest.exit()));
        }
        let expected = u64::from(rate) * (guest.now - begin) / SECOND;
        let wrote = u64::from(guest.dirty - dirty);
        assert!(wrote.abs_diff(expected) <= expected / 50 + 2, "{rate}: {wrote} of {expected}");
        // A wait for the reset comes on top, where one pause does not outlast the gap.
        assert!(guest.longest <= MAX_PAUSE, "{rate}: {}", guest.longest);
    }
}

#[test]
fn what_ends_a_pause_says_what_follows() {
    let mut guest = Guest::limited(100);
    guest.write(u32::MAX);
    let until = guest.now + MAX_PAUSE;
    let pause = |guest: &mut Guest, ended, after| {
        guest.machine.full_exit(&guest.cell);
        guest.vm.renew(guest.now);
        let step = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
        assert_eq!(step, Step::Harvest);
        let Step::Pause { until, .. } = guest.harvest() else { panic!("it owes") };
        assert!(until > guest.now);
        guest.pause(guest.now + after, ended)
    };
    assert!(matches!(pause(&mut guest, Ended::Wanted, 1000), Step::Return(_)));
    assert!(is_enter(pause(&mut guest, Ended::Hurry, 1000)));
    // Another penalty: charged anew, which takes the lock, since the ring is still full.
    guest.limit(200);
    assert_eq!(pause(&mut guest, Ended::Changed, 1000), Step::Harvest);
    // What was owed at first still is.
    let Step::Pause { until: again, .. } = guest.harvest() else { panic!("it owes") };
    assert!(again > guest.now && again <= until);
    let waited = u64::from(guest.cell.counters.counts().paused) * 1000;
    assert_eq!(waited, 3000, "each pause is counted");
}

#[test]
fn a_lock_that_somebody_else_has_is_tried_again_and_at_last_the_vcpu_is_let_through() {
    let mut guest = Guest::limited(20_000);
    guest.write(u32::MAX);
    guest.machine.full_exit(&guest.cell);
    let begin = guest.now;
    let mut step = guest.machine.begin(begin, &guest.vm, &guest.cell);
    let mut tries = 0u32;
    while step == Step::Harvest {
        let Step::Pause { until, .. } = guest.machine.busy(guest.now, &guest.cell) else { break };
        assert_eq!(until, guest.now + RETRY);
        step = guest.pause(until, Ended::Due);
        tries += 1;
    }
    assert_eq!(guest.now, begin + MAX_PAUSE + RESET_GAP);
    assert_eq!(u64::from(tries), (MAX_PAUSE + RESET_GAP) / RETRY);
    assert_eq!(guest.cell.counters.counts().paused, 0, "a wait for the lock is no pause");
    assert!(!guest.machine.is_quiet(&guest.cell), "its exit was not served");
    assert!(is_enter(guest.exit()));
}

#[test]
fn a_reset_is_shared_unless_its_vcpu_cannot_wait() {
    let reset = |guest: &mut Guest| {
        guest.write(u32::MAX);
        guest.machine.full_exit(&guest.cell);
        let mut step = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
        assert_eq!(step, Step::Harvest);
        step = guest.harvest();
        while let Step::Pause { until, .. } = step {
            step = guest.pause(until, Ended::Due);
        }
        assert_eq!(step, Step::Reset);
        let last = guest.now - 100_000;
        let until = match guest.machine.reset_later(guest.now, last, &guest.vm, &guest.cell) {
            Some(Step::Pause { until, .. }) => Some(until - last),
            Some(step) => panic!("{step:?}"),
            None => None,
        };
        let _ = guest.grant();
        until
    };
    let mut guest = Guest::limited(20_000);
    assert_eq!(reset(&mut guest), Some(RESET_GAP), "slices of 60 pages");
    guest.vm.set_max_pause(1_000_000);
    assert_eq!(reset(&mut guest), None, "it has paused for as long as it may");
    assert_eq!(reset(&mut Guest::limited(200_000)), None, "more than half its ring");
    let has_half = |rate: &u32| {
        let mut guest = Guest::limited(*rate);
        guest.write(u32::MAX);
        is_enter(guest.exit()) && guest.vcpu.slice() == Some(SIZE / 2)
    };
    let half = (170_000..172_000).step_by(20).find(has_half).unwrap();
    assert_eq!(reset(&mut Guest::limited(half)), None, "half of it");
    assert_eq!(reset(&mut Guest::new(false, false)), None, "no limit");
    let mut guest = Guest::limited(20_000);
    guest.vm.set_max_pause(1_000_000);
    reset(&mut guest);
    let (now, last) = (guest.now - 500_000, guest.now - 1_000_000);
    let later = guest.machine.reset_later(now, last, &guest.vm, &guest.cell);
    assert!(
        matches!(later, Some(Step::Pause { until, .. }) if until == last + 900_000),
        "nine tenths of the longest pause"
    );
    let mut scaled = Guest::limited(20_000);
    scaled.write(u32::MAX);
    // Every page was dirty already when it was published.
    scaled.vcpu.add_merged(SOFT);
    let _ = scaled.exit();
    assert!(scaled.vcpu.take_scaled(), "longer slices");
    assert_eq!(reset(&mut scaled), None);
}

#[test]
fn full_exits_that_move_nothing_are_waited_for_longer_and_longer_and_then_it_is_wedged() {
    let mut guest = Guest::new(false, false);
    let mut waits = Vec::new();
    let exits = loop {
        guest.machine.full_exit(&guest.cell);
        assert_eq!(guest.machine.begin(guest.now, &guest.vm, &guest.cell), Step::Harvest);
        match guest.harvest() {
            Step::Pause { until, .. } => {
                waits.push(until - guest.now);
                assert!(is_enter(guest.pause(until, Ended::Due)));
            }
            Step::Wedged(exits) => break exits,
            step => panic!("{step:?}"),
        }
    };
    assert_eq!((exits, waits.len()), (WEDGED, 63));
    assert_eq!((waits[0], waits[9], waits[62]), (2000, 1_024_000, 1_024_000));
    // A page in between begins anew, and so does one that somebody else has emptied meanwhile.
    let mut guest = Guest::new(false, false);
    for _ in 0..200 {
        guest.write(1);
        guest.vcpu.meter(&guest.cell, |_| Metered::New);
        guest.empty(1);
        assert!(is_enter(guest.exit()));
    }
}

#[test]
fn where_the_ring_cannot_end_a_slice_a_kick_does_and_its_time_is_learned() {
    let mut guest = Guest::new(true, false);
    guest.limit(20_000);
    assert!(matches!(guest.before_run(), Step::Enter(Run { kick_after: Some(_), timers: None })));
    assert!(guest.machine.is_run_over() && !guest.machine.is_quiet(&guest.cell));
    let mut wrote = 0;
    let mut last = 0;
    for _ in 0..200 {
        let Step::Enter(Run { kick_after: Some(time), .. }) = guest.before_run() else {
            panic!("its ring is nearly empty")
        };
        guest.now += time;
        // A page in 10 µs.
        last = guest.write(u32::try_from(time / 10_000).unwrap());
        wrote += last;
        guest.empty(guest.vcpu.ring().held_back());
    }
    assert!((10..=60).contains(&last), "about half a slice of 60: {last}");
    assert!(wrote > 1000);
}

#[test]
fn a_kick_before_the_guest_did_anything_is_followed_by_no_second_pause() {
    let mut guest = Guest::new(true, false);
    guest.limit(1000);
    guest.write(u32::MAX);
    assert!(is_enter(guest.exit()), "its ring ends the slice");
    guest.limit(50);
    assert!(guest.write(u32::MAX) > 1 && is_enter(guest.exit()));
    assert_eq!(guest.longest, MAX_PAUSE, "it owes more");
    // A limit that is news, a round, or the VMM's own signal.
    for _ in 0..3 {
        let before = guest.now;
        assert!(is_enter(guest.before_run()));
        assert_eq!(guest.now, before);
    }
    let (before, wrote) = (guest.now, guest.write(u32::MAX));
    assert!(wrote > 0 && is_enter(guest.exit()));
    assert_eq!(guest.now, before + MAX_PAUSE, "it owes still");
}

#[test]
fn lumps_are_ended_by_timers_and_paid_for_at_once_where_nothing_ends_them() {
    for timers in [true, false] {
        let mut guest = Guest::new(false, timers);
        guest.lump = PML;
        guest.limit(20_000);
        let mut step = Step::Enter(Run::default());
        for _ in 0..20 {
            guest.write(u32::MAX);
            guest.longest = 0;
            step = guest.exit();
        }
        let longest = guest.longest;
        if timers {
            // All came before the first timer, whose time cannot be shorter.
            let times = Some([20_000, 28_000, 40_000, 100_000]);
            assert_eq!(step, Step::Enter(Run { kick_after: None, timers: times }));
            assert!(longest <= MAX_PAUSE, "{longest}");
        } else {
            assert!(is_enter(step), "{step:?}");
            // 512 pages at 20,000 a second.
            assert!(longest > MAX_PAUSE && longest <= 26_000_000, "{longest}");
            assert!(guest.cell.counters.overlong_pauses() > 0);
        }
    }
}

#[test]
fn a_call_that_failed_leaves_the_ring_to_the_next() {
    let mut guest = Guest::limited(20_000);
    guest.write(u32::MAX);
    guest.machine.full_exit(&guest.cell);
    assert_eq!(guest.machine.begin(guest.now, &guest.vm, &guest.cell), Step::Harvest);
    let _ = guest.harvest();
    assert!(guest.cell.request.stands());
    guest.machine.failed(&guest.cell);
    // Freed by another thread before the next exit is looked at: that proves no lumps.
    guest.empty(guest.vcpu.to_grant());
    guest.vcpu.grant(&guest.cell);
    assert!(is_enter(guest.exit()) && !guest.vcpu.ring().has_lumps());
    assert!(!guest.cell.request.stands());
    assert!(guest.write(u32::MAX) > 0);
}

#[test]
fn a_run_without_a_page_or_in_an_emptied_ring_is_followed_by_no_wait_for_others() {
    let paused = |guest: &mut Guest| {
        guest.machine.full_exit(&guest.cell);
        let step = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
        assert_eq!(step, Step::Harvest);
        let Step::Pause { until, .. } = guest.harvest() else { panic!("no pause") };
        guest.pause(until, Ended::Due)
    };
    let mut guest = Guest::limited(100_000);
    guest.write(u32::MAX);
    assert_eq!(paused(&mut guest), Step::Reset);
    // Let through all the same, it returns with a full ring at once.
    assert_eq!(guest.write(u32::MAX), 0);
    assert_eq!(paused(&mut guest), Step::Reset);
    assert_eq!(guest.machine.reset_later(guest.now, guest.now, &guest.vm, &guest.cell), None);
    let _ = guest.grant();
    // A sweep has emptied the ring before the vCPU's thread came.
    guest.write(u32::MAX);
    guest.vcpu.meter(&guest.cell, |_| Metered::New);
    guest.empty(SOFT);
    assert!(is_enter(paused(&mut guest)));
}

impl Guest {
    /// A full exit whose thread does not get the lock until it is let through.
    fn is_let_through(&mut self) {
        self.machine.full_exit(&self.cell);
        let mut step = self.machine.begin(self.now, &self.vm, &self.cell);
        while step == Step::Harvest {
            step = match self.machine.busy(self.now, &self.cell) {
                Step::Pause { until, .. } => self.pause(until, Ended::Due),
                step => step,
            };
        }
        assert!(is_enter(step));
    }
}

#[test]
fn a_slice_that_others_freed_between_the_exit_and_its_thread_proves_no_lumps() {
    let mut guest = Guest::limited(20_000);
    guest.write(u32::MAX);
    guest.machine.full_exit(&guest.cell);
    let _ = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
    let _ = guest.harvest();
    assert!(guest.cell.request.stands());
    guest.is_let_through();
    // KVM_RUN returns with a full ring at once, another thread's reset frees the slice, and only then the exit is looked at.
    guest.empty(guest.vcpu.to_grant());
    guest.vcpu.grant(&guest.cell);
    assert!(guest.vcpu.ring().occupied() < SOFT);
    assert!(is_enter(guest.exit()));
    assert!(!guest.vcpu.ring().has_lumps());
}

#[test]
fn entries_that_a_reset_has_not_given_back_are_waited_for() {
    let mut guest = Guest::limited(20_000);
    guest.write(u32::MAX);
    guest.vcpu.meter(&guest.cell, |_| Metered::New);
    guest.vcpu.collect(SOFT, |_| ());
    guest.machine.full_exit(&guest.cell);
    let _ = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
    let _ = guest.harvest();
    assert!(guest.cell.request.stands(), "its ring is as full as before");
    guest.empty(0);
    guest.vcpu.grant(&guest.cell);
    assert!(!guest.cell.request.stands());
}

#[test]
fn a_scaled_slice_grows_until_the_log_is_taken() {
    let mut guest = Guest::limited(20_000);
    let mut slices = Vec::new();
    for turn in 0..8 {
        guest.write(u32::MAX);
        guest.vcpu.add_merged(SOFT);
        if turn == 6 {
            guest.vcpu.take_scaled();
        }
        assert!(is_enter(guest.exit()));
        slices.push(guest.vcpu.slice().unwrap());
    }
    assert!(slices[3] >= 8 * 60 && slices[5] == slices[3], "{slices:?}");
    assert!(slices[6] < 4 * 60 && slices[7] > slices[6], "{slices:?}");
}

#[test]
fn lumps_without_a_limit_or_with_kicks_cost_no_timers_and_no_long_pause() {
    for kicks in [false, true] {
        let mut guest = Guest::new(kicks, !kicks);
        guest.lump = PML;
        if kicks {
            guest.limit(20_000);
        }
        for _ in 0..20 {
            guest.write(u32::MAX);
            let Step::Enter(run) = guest.exit() else { panic!("it enters") };
            assert!(run.timers.is_none() && run.kick_after.is_none_or(|_| kicks));
        }
        assert!(guest.vcpu.ring().has_lumps());
        assert!(guest.longest <= MAX_PAUSE && guest.cell.counters.overlong_pauses() == 0, "{}", guest.longest);
    }
}

#[test]
fn a_full_ring_that_nobody_frees_is_not_wedged() {
    let mut guest = Guest::limited(20_000);
    guest.write(u32::MAX);
    for _ in 0..2 * WEDGED {
        guest.machine.full_exit(&guest.cell);
        let _ = guest.machine.begin(guest.now, &guest.vm, &guest.cell);
        let Step::Pause { until, .. } = guest.harvest() else { panic!("it has entries, which a reset may take") };
        assert!(matches!(guest.pause(until, Ended::Wanted), Step::Return(_)));
    }
}

#[test]
fn where_kicks_end_slices_badly_a_ring_that_ends_them_is_paid_for() {
    let mut guest = Guest::new(true, false);
    guest.limit(1000);
    assert!(matches!(guest.before_run(), Step::Enter(Run { kick_after: Some(_), .. })));
    guest.now += 1_000_000;
    assert_eq!(guest.write(u32::MAX), SOFT);
    guest.machine.full_exit(&guest.cell);
    assert_eq!(guest.machine.begin(guest.now, &guest.vm, &guest.cell), Step::Harvest);
    let Step::Pause { until, .. } = guest.harvest() else { panic!("it owes") };
    assert_eq!(until, guest.now + MAX_PAUSE);
}

#[test]
fn a_ring_that_is_drained_is_emptied_by_sweeps_alone_and_kicks_end_its_slices() {
    let [(filled, _), (drained, resets)] = [false, true].map(|draining| {
        let mut guest = Guest::new(true, false);
        guest.limit(20_000);
        guest.write(u32::MAX);
        assert!(is_enter(guest.exit()));
        guest.vcpu.set_draining(draining);
        let (mut most, mut wrote, mut resets, from) = (0, 0, 0, guest.now);
        for run in 0..400 {
            // A round, each 30 to 40 ms.
            if run % 10 == 0 {
                guest.vcpu.meter(&guest.cell, |_| Metered::New);
                let count = guest.vcpu.plan_sweep(&guest.cell, guest.now, || None);
                guest.empty(count);
                let _ = guest.vcpu.take_emptied();
                most = if run >= 100 { most.max(guest.dirty - guest.reset) } else { 0 };
                resets = 0;
            }
            let before = guest.reset;
            let Step::Enter(Run { kick_after, timers: None }) = guest.before_run() else { panic!("{run}") };
            assert!(kick_after.is_some() || !draining, "nothing else ends run {run}");
            // A page in 10 µs.
            let time = kick_after.unwrap_or(Nanos::MAX);
            let pages = guest.write(u32::try_from(time / 10_000).unwrap_or(u32::MAX));
            guest.now += Nanos::from(pages) * 10_000;
            if kick_after.is_none() {
                guest.machine.full_exit(&guest.cell);
            }
            resets += u32::from(guest.reset != before);
            wrote += pages;
        }
        let allowed = u32::try_from((guest.now - from) / 50_000).unwrap();
        assert!(wrote.abs_diff(allowed) <= allowed / 20 + 200, "{draining}: {wrote} of {allowed}");
        (most, resets)
    });
    assert!(filled >= SOFT - 200 && drained == 0, "left by a round: {filled}, {drained}");
    assert_eq!(resets, 0, "of an exit: a vCPU that has room needs none");
}

#[test]
fn a_ring_that_is_drained_is_not_left_to_fill() {
    for draining in [false, true] {
        let mut guest = Guest::new(true, false);
        guest.vcpu.set_draining(draining);
        guest.limit(1000);
        let fills = (0..12).any(|_| {
            let step = guest.before_run();
            let Step::Enter(Run { kick_after: Some(time), .. }) = step else { panic!("{step:?}") };
            // A page in 2 µs.
            guest.write(u32::try_from(time / 2_000).unwrap());
            guest.now += time;
            time > 10_000_000
        });
        assert_eq!(fills, !draining);
    }
}
