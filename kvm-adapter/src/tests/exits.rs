//! What a full exit is, and what only looks like one: stale exit reasons, exits that the VMM forgets to tell of, rings that
//! somebody else empties first.

use std::time::{Duration, Instant};

use super::vm;
use crate::fake::{Fake, PAGES, SLOT, immediate_exit};
use crate::{Config, Decision, DirtyLimit, PageRate};

fn full_exits(limit: &DirtyLimit) -> u64 {
    limit.meter();
    limit.query(0).unwrap().totals.full_exits
}

#[test]
fn a_stale_exit_reason_is_no_full_exit() {
    let (fake, limit, _file, mut vcpu) = vm();
    for _ in 0..1000 {
        _ = vcpu.before_run().unwrap();
    }
    assert_eq!(full_exits(&limit), 0, "its ring was never full");
    fake.write_all(0, 0..PAGES);
    for _ in 0..1000 {
        _ = vcpu.before_run().unwrap();
    }
    assert_eq!(full_exits(&limit), 1, "one exit, however often its reason is read");
}

#[test]
fn kicks_while_a_full_exit_waits_are_no_full_exits() {
    let (fake, limit, file, mut vcpu) = vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(1)).unwrap();
    limit.tick();
    fake.write_all(0, 0..PAGES);
    _ = vcpu.before_run().unwrap();
    fake.write_all(0, 2000..PAGES);
    limit.last_round().map(drop).unwrap();
    immediate_exit(&file, true);
    let mut paused = 0;
    for _ in 0..1000 {
        assert!(matches!(vcpu.before_run().unwrap(), Decision::Enter { .. }), "KVM_RUN is to see the kick");
        paused += u32::from(vcpu.paused() > Duration::from_millis(1));
    }
    assert!(paused < 50, "{paused} of 1,000 took a millisecond: the host preempts fewer");
}

#[test]
fn a_full_exit_that_the_vmm_does_not_tell_of_is_served() {
    let (fake, limit, _file, mut vcpu) = vm();
    for round in 0..5 {
        assert_eq!(fake.write_all(0, (0..PAGES).cycle().skip(round * 1000)), 960, "round {round}");
        _ = vcpu.before_run().unwrap();
    }
    assert_eq!(full_exits(&limit), 5);
}

#[test]
fn a_ring_that_a_copier_empties_before_its_vcpu_is_not_wedged() {
    let (fake, limit, _file, mut vcpu) = vm();
    for round in 0..300 {
        assert_eq!(fake.write_all(0, (0..PAGES).cycle().skip(round * 17)), 960, "round {round}");
        limit.last_round().map(drop).unwrap();
        _ = vcpu.before_run().unwrap();
    }
}

#[test]
fn a_pause_is_no_longer_however_often_its_limit_changes() {
    const MAX: Duration = Duration::from_secs(1);
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(1024).max_pause(MAX)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(1)).unwrap();
    limit.tick();
    fake.write_all(0, 0..PAGES);
    _ = vcpu.before_run().unwrap();
    fake.write_all(0, 2000..PAGES);
    let (start, mut limits, mut late) = (Instant::now(), [2, 1].into_iter().cycle(), 0);
    // Called at each look, 10 ms apart or more. The last change comes late in the pause, and is not to begin another.
    let toggle = || {
        match start.elapsed() {
            early if early < MAX * 3 / 4 => {}
            time if time < MAX => limit.set_limit(0, PageRate::from_pages_per_sec(limits.next().unwrap())).unwrap(),
            _ => late += 1,
        }
        false
    };
    _ = vcpu.before_run_unless(toggle).unwrap();
    assert!(vcpu.paused() >= MAX * 3 / 4, "{vcpu:?}");
    assert!(late < 10, "{late} looks after its end: {vcpu:?}");
}
