//! vCPUs that are added, removed, and added where they do not belong.

use std::thread;
use std::time::Duration;

use super::vm;
use crate::fake::{Copy, Fake, Goes, PAGES, SLOT, pages};
use crate::{Error, PageRate, Shipped, Stepped};

#[test]
fn what_comes_while_a_vcpu_is_removed_is_not_lost() {
    let (fake, limit, _file, vcpu) = vm();
    fake.write_all(0, 0..70);
    drop(vcpu);
    // The last exit's own entries, say.
    fake.script([Goes::ThenWrites(9000), Goes::ThenWrites(9001)]);
    limit.remove_vcpu(0).unwrap();
    let mut copy = Copy::default();
    copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
    assert_eq!((copy.lost(&fake), fake.writes(9000), fake.writes(9001)), (0, 1, 1));
}

#[test]
fn a_removal_that_fails_changes_nothing_and_publishes_nothing() {
    for goes in [Goes::Fails(libc::EIO), Goes::Short(0), Goes::Short(30)] {
        let (fake, limit, file, vcpu) = vm();
        limit.set_limit(0, PageRate::from_pages_per_sec(77)).unwrap();
        fake.write_all(0, 0..100);
        drop(vcpu);
        fake.always(Some(goes));
        if limit.remove_vcpu(0).is_ok() {
            // A reset that makes progress may do for it.
            assert!(matches!(goes, Goes::Short(30)), "{goes:?}");
            continue;
        }
        assert_eq!(limit.query(0).unwrap().limit, Some(PageRate::from_pages_per_sec(77)));
        assert_eq!(pages(&limit.take_published(SLOT).unwrap()), [0; 0], "{goes:?}: published although still writable");
        // It has its shared state, and gives it back.
        drop(limit.add_vcpu(0, &file).unwrap());
        fake.always(None);
        limit.remove_vcpu(0).unwrap();
        assert_eq!(limit.vcpus(), [0; 0]);
        assert_eq!(pages(&limit.take_published(SLOT).unwrap()), (0..100).collect::<Vec<_>>());
    }
}

/// What a pass collected and could not reset is reset before its ring is forgotten.
#[test]
fn what_was_collected_is_reset_before_its_ring_is_forgotten() {
    let (fake, limit, _file, _vcpu) = vm();
    fake.write_all(0, 0..100);
    fake.script([Goes::Fails(libc::EIO)]);
    limit.last_round().map(drop).unwrap_err();
    limit.vm().lock().remove(0, &fake, &limit.vm().limiter).unwrap();
    let mut copy = Copy::default();
    copy.take(&fake, &limit.take_published(SLOT).unwrap());
    assert!(fake.write_all(0, 0..100) == 100 && copy.lost(&fake) == 100, "they are armed: the next write is logged");
    assert_eq!(fake.resets(), 2);
}

#[test]
fn a_place_is_given_back_as_often_as_it_is_taken() {
    let fake = Fake::new();
    let limit = fake.small();
    for round in 0..1100 {
        drop(limit.add_vcpu(3, &fake.vcpu(1024)).unwrap_or_else(|error| panic!("{round}: {error}")));
        limit.remove_vcpu(3).unwrap();
    }
}

#[test]
fn one_vcpu_has_one_id_and_an_id_one_vcpu() {
    let (fake, limit, file, vcpu) = vm();
    let other = fake.vcpu(1024);
    let own = file.try_clone().unwrap();
    assert!(matches!(limit.add_vcpu(1, &own), Err(Error::SameVcpu { id: 1, known: 0 })));
    drop(vcpu);
    assert!(matches!(limit.add_vcpu(1, &own), Err(Error::SameVcpu { id: 1, known: 0 })), "without a handle, too");
    assert!(matches!(limit.add_vcpu(0, &other), Err(Error::OtherVcpu(0))));
    let _vcpu = limit.add_vcpu(0, &own).unwrap();
    let _other = limit.add_vcpu(1, &other).unwrap();
    assert_eq!(limit.vcpus(), [0, 1]);
}

#[test]
fn a_vcpu_without_a_ring_of_the_vms_size_is_refused() {
    let (fake, limit, _file, _vcpu) = vm();
    for entries in [0, 256, 512] {
        let error = limit.add_vcpu(1, &fake.vcpu(entries)).unwrap_err();
        assert!(matches!(error, Error::NoRing { id: 1, entries: 1024 }), "{entries}: {error}");
    }
    assert_eq!(limit.vcpus(), [0]);
}

/// KVM does not tell it; the first reset that should have given its entries back does.
#[test]
fn a_vcpu_of_another_vm_is_told_until_it_is_removed_and_costs_no_page() {
    let (fake, limit, _file, mut vcpu) = vm();
    let other = Fake::new();
    let mut foreign = limit.add_vcpu(1, &other.vcpu(1024)).unwrap();
    fake.write_all(0, 0..100);
    other.write_all(0, 5000..PAGES);
    let mut copy = Copy::default();
    for _ in 0..2 {
        assert!(matches!(foreign.before_run(), Err(Error::ForeignVcpu(1))));
        assert!(matches!(limit.last_round().and_then(|round| round.take(SLOT)), Err(Error::ForeignVcpu(1))));
        assert!(matches!(limit.remove_vcpu(0), Err(Error::VcpuBusy(0))));
    }
    // The others wait until then, and are told why; a reset that was disturbed proves nothing.
    fake.write_all(0, 100..2000);
    assert!(matches!(vcpu.before_run(), Err(Error::ForeignVcpu(1))));
    fake.always(Some(Goes::FalseAlarm));
    assert!(matches!(limit.last_round().map(drop), Err(Error::ShortReset { .. })));
    fake.always(None);
    drop((vcpu, foreign));
    assert!(matches!(limit.remove_vcpu(0), Err(Error::ForeignVcpu(1))));
    assert_eq!(limit.vcpus(), [0, 1], "the VM's own stays");
    limit.remove_vcpu(1).unwrap();
    copy.take(&fake, &limit.last_round().and_then(|round| round.take(SLOT)).unwrap());
    assert_eq!((copy.lost(&fake), limit.vcpus()), (0, vec![0]));
    // One of which entries were given back is the VM's, whatever resets do later.
    fake.write_all(0, 0..10);
    fake.always(Some(Goes::Nothing));
    assert!(matches!(limit.remove_vcpu(0), Err(Error::ShortReset { .. })));
    fake.always(None);
    limit.remove_vcpu(0).unwrap();
}

#[test]
fn a_ring_that_was_consumed_is_refused_and_one_that_was_written_is_followed() {
    let (fake, limit, file, vcpu) = vm();
    fake.write_all(0, 0..40);
    drop(vcpu);
    limit.remove_vcpu(0).unwrap();
    limit.take_published(SLOT).unwrap();
    for id in [0, 1] {
        assert!(matches!(limit.add_vcpu(id, &file), Err(Error::UsedRing(told)) if told == id));
    }
    // One that ran before it was added: all of its entries are there.
    let early = fake.vcpu(1024);
    fake.write_all(1, 100..150);
    let _vcpu = limit.add_vcpu(1, &early).unwrap();
    assert_eq!(pages(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()), (100..150).collect::<Vec<_>>());
}

#[test]
fn enabling_takes_little_stack() {
    let enable = || drop(Fake::new().small());
    // Beyond that the process ends.
    thread::Builder::new().stack_size(128 << 10).spawn(enable).unwrap().join().unwrap();
}

/// A pausing thread looks again: by a word of the shared state's, which each call changes.
#[test]
fn everything_that_changes_a_penalty_wakes_who_pauses() {
    let (_fake, limit, _file, _vcpu) = vm();
    let rate = PageRate::from_pages_per_sec(1000);
    let calls: [(&str, &dyn Fn()); 8] = [
        ("set_limit", &|| limit.set_limit(0, rate).unwrap()),
        ("cancel", &|| limit.cancel(0).unwrap()),
        ("set_limit_all", &|| limit.set_limit_all(rate)),
        ("cancel_all", &|| limit.cancel_all()),
        ("set_vm_limit", &|| limit.set_vm_limit(Some(rate))),
        ("no VM limit", &|| limit.set_vm_limit(None)),
        ("set_policy", &|| limit.set_policy(Shipped::Stepped(Stepped::default()))),
        ("set_max_pause", &|| limit.set_max_pause(Duration::from_millis(5))),
    ];
    let shared = limit.vm().lock().rows[&0].shared.clone();
    for (name, call) in calls {
        let before = shared.wakes();
        call();
        assert_ne!(shared.wakes(), before, "{name}");
    }
}
