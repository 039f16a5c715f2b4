//! Everything at one moment, and the handle that keeps nothing alive.

use std::time::Duration;

use super::vm;
use crate::PageRate;

#[test]
fn a_snapshot_says_what_the_single_questions_say() {
    let (fake, limit, _file, _vcpu) = vm();
    let _other = limit.add_vcpu(70, &fake.vcpu(1024)).unwrap();
    let before = limit.snapshot();
    assert_eq!((before.leased, before.vm_limit, before.held_back), (false, None, 0));
    limit.set_vm_limit(Some(PageRate::from_pages_per_sec(500)));
    limit.set_limit(70, PageRate::from_pages_per_sec(100)).unwrap();
    limit.set_max_pause(Duration::from_millis(7));
    fake.write_all(0, 0..100);
    limit.last_round().map(drop).unwrap();
    fake.write_all(0, 100..130);
    fake.write_all(1, 200..205);
    limit.tick();
    let now = limit.snapshot();
    assert_eq!((now.leased, now.vm_limit), (true, Some(PageRate::from_pages_per_sec(500))));
    assert_eq!((now.max_pause, now.stats), (Duration::from_millis(7), limit.stats()));
    assert_eq!((now.held_back, limit.held_back(0).unwrap(), limit.held_back(70).unwrap()), (35, 30, 5));
    assert_eq!(now.vcpus.into_iter().collect::<Vec<_>>(), [0, 70].map(|id| (id, limit.query(id).unwrap())));
}

#[test]
fn a_weak_handle_is_one_while_a_strong_one_or_a_vcpu_is_there() {
    let (_fake, limit, _file, vcpu) = vm();
    let weak = limit.downgrade();
    drop(limit);
    assert_eq!(weak.upgrade().unwrap().vcpus(), [0]);
    drop(vcpu);
    assert!(weak.upgrade().is_none());
}
