//! Rings that are drained for the last rounds of a migration.

use std::time::Duration;

use dirtylimit_kvm::{Config, Error, Kick, PageRate};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, SLOT, kvm_or_skip};

use crate::common::{Copy, drive, machine, vcpu};
use crate::rig::Watchdog;

/// 20 MiB/s: slices of 51 pages.
const LIMIT: u32 = 5120;
const PAGES: u64 = 65_536;

#[test]
fn rounds_leave_nothing_in_a_ring_that_is_drained() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(120));
    let config = Config::new().ring_entries(4096).kick(Kick::Signal(libc::SIGRTMIN() + 7));
    let (machine, limit) = machine(&[Load::new(Mode::Write, PAGES * 4096)], &config).unwrap();
    let mut limited = vcpu(&machine, &limit, 0).unwrap();
    let mut copy = Copy::new(machine.memory());
    limited.0.bind_to_this_thread();
    let _throttle = limit.throttle_thread(Duration::from_millis(10)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT)).unwrap();
    let held_back = || {
        limit.meter();
        limit.held_back(0).unwrap()
    };
    // Kicks end its slices until the ring is filled, and from then on the ring.
    drive(&mut limited, |_| held_back() > 3900).unwrap();
    limit.set_draining(true).unwrap();
    let mut left = Vec::new();
    while left.len() < 20 {
        let mut runs = 0;
        drive(&mut limited, |_| {
            runs += 1;
            runs == 10
        })
        .unwrap();
        let round = limit.round().unwrap();
        left.push(round.held_back());
        copy.take(&round.take(SLOT).unwrap()).unwrap();
    }
    assert!(left.iter().all(|pages| *pages == 0), "{left:?}");
    assert!(limit.query(0).unwrap().totals.paused_us > 0);
    limit.set_draining(false).unwrap();
    drive(&mut limited, |_| held_back() > 3900).unwrap();
    copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
    assert_eq!(copy.lost(), 0);
}

#[test]
fn without_kicks_rings_cannot_be_drained() {
    if !kvm_or_skip() {
        return;
    }
    for kick in [Kick::Auto, Kick::Off] {
        let (_machine, limit) = machine(&[Load::new(Mode::Idle, 0)], &Config::new().kick(kick)).unwrap();
        let error = limit.set_draining(true).unwrap_err();
        assert!(matches!(error, Error::NoKick) && error.to_string().contains("ring_for"), "{error}");
        limit.set_draining(false).unwrap();
    }
}
