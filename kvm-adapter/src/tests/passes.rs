//! How much a running pass takes from the ring of a limited vCPU.

use std::thread::sleep;
use std::time::{Duration, Instant};

use dirtylimit_core::Page;

use crate::batch::Batch;
use crate::fake::{Fake, SLOT};
use crate::slots::{Slot, Slots};
use crate::{DirtyLimit, PageRate, Vcpu};

/// A VM whose vCPU, with 960 entries to its soft limit, has written `pages` and does not know of its limit of a page in
/// 10 ms: the host may stand still for seconds before the ring is what ends a pass.
fn unnoticed(pages: u64) -> (Fake, DirtyLimit, Vcpu) {
    let (fake, limit, _, vcpu) = super::vm();
    limit.set_limit(0, PageRate::from_pages_per_sec(100)).unwrap();
    limit.tick();
    fake.write_all(0, 0..pages);
    (fake, limit, vcpu)
}

#[test]
fn a_pass_takes_what_the_limit_allows_of_who_has_not_noticed_it() {
    let (fake, limit, _vcpu) = unnoticed(960);
    let before = Instant::now();
    assert_eq!((limit.pass().unwrap().published, limit.held_back(0).unwrap()), (0, 960));
    let (after, mut next, mut published, mut last) = (Instant::now(), 960, 0, Instant::now());
    for _ in 0..30 {
        // One page and a part of one.
        sleep(Duration::from_millis(16));
        limit.tick();
        last = Instant::now();
        let taken = limit.pass().unwrap().published;
        fake.write_all(0, next..next + taken);
        (published, next) = (published + taken, next + taken);
    }
    // No part of a page is lost from one pass to the next.
    let (least, most) = ((last - after).as_millis() / 10, before.elapsed().as_millis() / 10);
    assert!((least..=most + 1).contains(&u128::from(published)), "{published}, not {least} to {most}");
}

#[test]
fn what_the_limit_allowed_and_nobody_wrote_is_not_kept_for_later() {
    let (fake, limit, _vcpu) = unnoticed(10);
    limit.pass().unwrap();
    sleep(Duration::from_millis(200));
    limit.tick();
    assert_eq!(limit.pass().unwrap().published, 10, "all that there is");
    limit.tick();
    let before = Instant::now();
    fake.write_all(0, 10..910);
    let published = u128::from(limit.pass().unwrap().published);
    assert!(published <= before.elapsed().as_millis() / 10 + 1, "{published}");
}

#[test]
fn a_pass_takes_what_a_slice_frees_and_no_more() {
    let (fake, limit, _, _vcpu) = super::vm();
    fake.write_all(0, 0..960);
    limit.vm().lock().places.get_mut(&0).unwrap().vcpu.assign(Some(10), true, false);
    let pass = limit.pass().unwrap();
    assert_eq!((pass.published, pass.held_back), (10, 950));
}

#[test]
fn who_wrote_what_was_dirty_already_is_told_apart() {
    let mut slots = Slots::default();
    slots.add(SLOT, Slot::new(SLOT, 1024).unwrap()).unwrap();
    let page = |offset| Page { slot: SLOT, offset };
    for offset in 10..13 {
        slots.publish(page(offset), false);
    }
    let mut batch = Batch::new();
    for (vcpu, offset) in [(0, 0), (0, 1), (1, 10), (1, 11), (1, 12)] {
        slots.meter(page(offset));
        batch.push(vcpu, page(offset));
    }
    let mut merged = Vec::new();
    batch.publish(&mut slots, |vcpu, pages| merged.push((vcpu, pages)));
    assert_eq!(merged, [(0, 0), (1, 3)]);
}
