//! Configurations that KVM refuses, slots and vCPU threads that come and go, several vCPUs under limits: no page is lost.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use dirtylimit_kvm::{Config, DirtyLimit, Error, Kick, PageRate};
use dirtylimit_test_vm::payload::{self, Mode};
use dirtylimit_test_vm::{Exit, Load, Machine, SLOT, kvm_or_skip};

use crate::common::{Copy, Limited, drive, machine, smallest_ring, vcpu};
use crate::rig::Watchdog;

const MIB: u64 = 1 << 20;

fn writer() -> [Load; 1] {
    [Load::new(Mode::Write, 16 * MIB)]
}

fn bare() -> Machine {
    Machine::new(&writer(), payload::image()).unwrap()
}

#[test]
fn ring_sizes_that_kvm_does_not_take_are_refused_and_the_next_try_succeeds() {
    if !kvm_or_skip() {
        return;
    }
    let machine = bare();
    let above = DirtyLimit::enable(bare().vm(), &Config::new()).unwrap().caps().max_entries * 2;
    for entries in [0, 1, 64, 128, 1000, above] {
        match DirtyLimit::enable(machine.vm(), &Config::new().ring_entries(entries)) {
            Err(Error::RingSize { entries: told, max, .. }) => assert_eq!((told, max), (entries, above / 2)),
            other => panic!("{entries}: {other:?}"),
        }
    }
    DirtyLimit::enable(machine.vm(), &Config::new()).unwrap();
}

#[test]
fn a_ring_is_enabled_once_and_before_the_first_vcpu() {
    if !kvm_or_skip() {
        return;
    }
    let twice = bare();
    let _first = DirtyLimit::enable(twice.vm(), &Config::new()).unwrap();
    let late = bare();
    let _vcpu = late.vm().create_vcpu(0).unwrap();
    for machine in [twice, late] {
        let error = DirtyLimit::enable(machine.vm(), &Config::new()).unwrap_err();
        assert!(matches!(error, Error::Enable { entries: 1024, .. }), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.to_string().contains("before the first vCPU"), "{error}");
    }
}

#[test]
fn a_descriptor_that_is_no_vm_is_refused() {
    let error = DirtyLimit::enable(&File::open("/dev/null").unwrap(), &Config::new()).unwrap_err();
    assert!(error.to_string().contains("VM's descriptor"), "{error}");
    assert_eq!(error.errno(), libc::ENOTTY);
    if !kvm_or_skip() {
        return;
    }
    let machine = bare();
    let limit = DirtyLimit::enable(machine.vm(), &Config::new()).unwrap();
    let error = limit.add_vcpu(0, machine.vm()).unwrap_err();
    assert!(error.to_string().contains("mapping the vCPU's"), "{error}");
}

#[test]
fn a_vcpu_that_is_not_the_vms_or_not_new_is_refused() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &Config::new().ring_entries(2048)).unwrap();
    let (mut cpu, handle) = vcpu(&machine, &limit, 0).unwrap();
    // Without a ring, and with a smaller one: to read it is a SIGBUS.
    let (without, smaller) = (bare(), bare());
    let _smaller = DirtyLimit::enable(smaller.vm(), &Config::new().ring_entries(smallest_ring())).unwrap();
    for other in [&without, &smaller] {
        let error = limit.add_vcpu(1, &other.vm().create_vcpu(0).unwrap()).unwrap_err();
        assert!(matches!(error, Error::NoRing { id: 1, entries: 2048 }), "{error}");
    }
    let error = limit.add_vcpu(1, cpu.fd()).unwrap_err();
    assert!(matches!(error, Error::SameVcpu { id: 1, known: 0 }), "{error}");
    let second = machine.vm().create_vcpu(1).unwrap();
    drop(handle);
    assert!(matches!(limit.add_vcpu(0, &second), Err(Error::OtherVcpu(0))));
    let handle = limit.add_vcpu(0, cpu.fd()).unwrap();
    drop(limit.add_vcpu(1, &second).unwrap());
    let mut limited = (cpu, handle);
    drive(&mut limited, |exit| exit == Exit::RingFull).unwrap();
    cpu = limited.0;
    drop(limited.1);
    limit.remove_vcpu(0).unwrap();
    assert!(matches!(limit.add_vcpu(0, cpu.fd()), Err(Error::UsedRing(0))));
    // One that never ran may come back.
    limit.remove_vcpu(1).unwrap();
    let _second = limit.add_vcpu(1, &second).unwrap();
    assert_eq!(limit.vcpus(), [1]);
}

/// Its ring is as large, so only a reset tells.
#[test]
fn a_vcpu_of_another_vm_is_told_by_the_first_reset_and_costs_no_page() {
    if !kvm_or_skip() {
        return;
    }
    let config = Config::new().ring_entries(1024);
    let (own, limit) = machine(&writer(), &config).unwrap();
    let (other, _others) = machine(&writer(), &config).unwrap();
    let mut first = vcpu(&own, &limit, 0).unwrap();
    let mut copy = Copy::new(own.memory());
    let cpu = other.vcpu(0).unwrap();
    let mut foreign = (limit.add_vcpu(1, cpu.fd()).unwrap(), cpu);
    while foreign.1.run().unwrap() != Exit::RingFull {}
    drive(&mut first, |exit| exit == Exit::RingFull).unwrap();
    let error = foreign.0.before_run().unwrap_err();
    assert!(matches!(error, Error::ForeignVcpu(1)), "{error}");
    assert!(matches!(limit.last_round().and_then(|round| round.take(SLOT)), Err(Error::ForeignVcpu(1))));
    drop(foreign.0);
    limit.remove_vcpu(1).unwrap();
    for _ in 0..3 {
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
        assert_eq!(copy.lost(), 0);
        drive(&mut first, |exit| exit == Exit::RingFull).unwrap();
    }
}

#[test]
fn a_slot_removed_while_it_is_logged_comes_back_clean() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &Config::new().ring_entries(1024)).unwrap();
    let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
    for _ in 0..3 {
        drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
        // The ring is full of its entries.
        limit.remove_slot(SLOT).unwrap();
        assert!(matches!(limit.last_round().and_then(|round| round.take(SLOT)), Err(Error::NoSlot(SLOT))));
        machine.unplug_memory().unwrap();
        limit.add_slot(SLOT, machine.memory().pages() as u64).unwrap();
        machine.plug_memory(true).unwrap();
        let log = limit.last_round().and_then(|round| round.take(SLOT)).unwrap();
        assert!(log.iter().all(|word| *word == 0), "the new slot inherits");
        let mut copy = Copy::new(machine.memory());
        for _ in 0..10 {
            drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
            copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
            assert_eq!(copy.lost(), 0);
        }
    }
}

#[test]
fn a_vcpus_thread_ends_and_another_takes_it_up() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &Config::new().ring_entries(1024)).unwrap();
    let mut copy = Copy::new(machine.memory());
    let mut cpu = machine.vcpu(0).unwrap();
    for generation in 0..5 {
        let vcpu = limit.add_vcpu(0, cpu.fd()).unwrap();
        assert!(matches!(limit.add_vcpu(0, cpu.fd()), Err(Error::VcpuBusy(0))));
        cpu = thread::spawn(move || {
            let mut limited: Limited = (cpu, vcpu);
            let mut exits = 0;
            // The last exit is left unserved.
            drive(&mut limited, |_| {
                exits += 1;
                exits > 6
            })
            .unwrap();
            limited.0
        })
        .join()
        .unwrap();
        let copied = copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
        assert!(copied > 1000, "{copied} pages in generation {generation}");
        assert_eq!(copy.lost(), 0);
    }
    limit.remove_vcpu(0).unwrap();
}

/// The guest's stats page is limited too, each time that its entry has gone round the ring: the pause for it is not to
/// look like part of the one before.
#[test]
fn the_guest_counts_each_pause_by_itself() {
    if !kvm_or_skip() {
        return;
    }
    let load = Load { stall: Duration::from_millis(1), ..writer()[0] };
    // A page at a time: two would be one pause of more than 2 ms.
    let config = Config::new().ring_entries(smallest_ring()).max_pause(Duration::from_millis(2)).kick(Kick::Off);
    let (machine, limit) = machine(&[load], &config).unwrap();
    let (mut cpu, mut vcpu) = vcpu(&machine, &limit, 0).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(512)).unwrap();
    let (mut pauses, mut dirtied) = (0, 0);
    while pauses < 600 {
        limit.tick();
        _ = vcpu.before_run().unwrap();
        limit.meter();
        // A guest that has dirtied nothing since the last pause is still in the same gap: its slice was not free yet.
        let gross = limit.query(0).unwrap().totals.gross_pages;
        if vcpu.paused() > load.stall && std::mem::replace(&mut dirtied, gross) != gross {
            pauses += 1;
        }
        cpu.run().unwrap();
    }
    // The guest may not have come to count the last of them.
    let gaps = machine.stats(0).histogram().iter().sum::<u64>();
    assert!(gaps + 2 >= pauses, "{gaps} gaps counted in {pauses} pauses");
}

#[test]
fn several_limited_vcpus_passed_and_taken_in_a_loop_lose_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(300));
    let loads = [
        Load::new(Mode::Write, 16 * MIB),
        Load::new(Mode::Random, 8 * MIB),
        Load::new(Mode::Read, 4 * MIB),
        Load::new(Mode::Write, 2 * MIB),
    ];
    let config = Config::new().ring_entries(1024).max_pause(Duration::from_millis(2));
    let (machine, limit) = machine(&loads, &config).unwrap();
    let vcpus: Vec<Limited> = (0..loads.len()).map(|index| vcpu(&machine, &limit, index).unwrap()).collect();
    let mut copy = Copy::new(machine.memory());
    let kickers: Vec<_> = vcpus.iter().map(|(cpu, _)| cpu.kicker()).collect();
    let stop = AtomicBool::new(false);
    let _throttle = limit.throttle_thread(Duration::from_millis(10)).unwrap();
    thread::scope(|scope| {
        let running: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let stop = &stop;
                scope.spawn(move || {
                    vcpu.0.bind_to_this_thread();
                    drive(&mut vcpu, |_| stop.load(Relaxed)).unwrap();
                    vcpu
                })
            })
            .collect();
        for round in 0..60u32 {
            thread::sleep(Duration::from_millis(10));
            match round % 8 {
                0 => limit.set_limit_all(PageRate::from_pages_per_sec(4000)),
                2 => limit.set_limit(round % 4, PageRate::from_pages_per_sec(200)).unwrap(),
                4 => limit.set_vm_limit(Some(PageRate::from_pages_per_sec(10_000))),
                6 => {
                    limit.set_vm_limit(None);
                    limit.cancel_all();
                }
                _ => {}
            }
            let log = if round % 3 == 0 {
                limit.last_round().and_then(|round| round.take(SLOT)).unwrap()
            } else {
                limit.round().and_then(|round| round.take(SLOT)).unwrap()
            };
            copy.take(&log).unwrap();
        }
        // On a busy host it may have had no more than a glimpse of the CPU by now.
        while (0..loads.len()).any(|index| machine.stats(index).accesses() <= 100) {
            thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Relaxed);
        while running.iter().any(|thread| !thread.is_finished()) {
            kickers.iter().for_each(dirtylimit_test_vm::Kicker::kick);
            thread::sleep(Duration::from_millis(1));
        }
        // Handed back, not dropped: the vCPUs' descriptors are open until the last take is done.
        let _stopped: Vec<Limited> = running.into_iter().map(|thread| thread.join().unwrap()).collect();
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
    });
    assert_eq!(copy.lost(), 0);
    assert_eq!(limit.stats().dropped, 0);
}
