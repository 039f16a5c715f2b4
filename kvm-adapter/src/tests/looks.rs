//! How often a vCPU's thread looks about: once where it goes on at once, and once more for each wait.

use std::fs::File;
use std::time::Duration;

use super::vm;
use crate::fake::{Fake, PAGES, SLOT};
use crate::{Config, Decision, DirtyLimit, PageRate, Vcpu};

/// How long `before_run` pauses, and how often it looks about.
fn before_run(vcpu: &mut Vcpu) -> (Duration, u128) {
    let mut looks = 0;
    let decision = vcpu.before_run_unless(|| {
        looks += 1;
        false
    });
    assert_ne!(decision.unwrap(), Decision::Return);
    (vcpu.paused(), looks)
}

/// A VM whose vCPU has a limit that it knows, in pages a second, and 960 entries to its soft limit.
fn limited(limit_of: u32, max_pause: Duration) -> (Fake, DirtyLimit, File, Vcpu) {
    let fake = Fake::new();
    let limit = fake.limit(&Config::new().ring_entries(1024).max_pause(max_pause)).unwrap();
    limit.add_slot(SLOT, PAGES).unwrap();
    let file = fake.vcpu(1024);
    let mut vcpu = limit.add_vcpu(0, &file).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(limit_of)).unwrap();
    limit.tick();
    fake.write_all(0, 0..PAGES);
    _ = vcpu.before_run().unwrap();
    (fake, limit, file, vcpu)
}

#[test]
fn a_vcpu_that_owes_nothing_is_let_through_without_a_look() {
    let (fake, _limit, _file, mut vcpu) = vm();
    fake.write_all(0, 0..100);
    assert_eq!(before_run(&mut vcpu), (Duration::ZERO, 0));
}

#[test]
fn a_pause_looks_about_a_hundred_times_a_second_at_most() {
    let (fake, limit, _file, mut vcpu) = limited(100_000, Duration::from_millis(50));
    limit.set_limit(0, PageRate::from_pages_per_sec(1)).unwrap();
    fake.write_all(0, 2000..PAGES);
    let (paid, looks) = before_run(&mut vcpu);
    assert!(looks > 1 && looks <= 4 + paid.as_millis() / 10, "{looks}, {paid:?}");
}

#[test]
fn a_pause_goes_on_where_its_limit_becomes_another() {
    let (fake, limit, _file, mut vcpu) = limited(100_000, Duration::from_millis(100));
    fake.write_all(0, 2000..PAGES);
    limit.set_limit(0, PageRate::from_pages_per_sec(1)).unwrap();
    let mut others = Some(2);
    let stop = || {
        if let Some(other) = others.take() {
            limit.set_limit(0, PageRate::from_pages_per_sec(other)).unwrap();
        }
        false
    };
    _ = vcpu.before_run_unless(stop).unwrap();
    assert!(vcpu.paused() >= Duration::from_millis(90), "{vcpu:?}");
}
