//! Rings that are full and stay so: a vCPU that is run without being served, entries that somebody else took away, a kernel
//! that writes past its reserve. Nothing is lost without a word, and nothing hangs.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use dirtylimit_kvm::{Config, DirtyLimit, Error};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::raw_ring::{self, RawRing};
use dirtylimit_test_vm::{Exit, Load, Machine, SLOT, kvm_or_skip};

use crate::common::{Copy, Limited, drive, machine, smallest_ring, vcpu};
use crate::rig::Watchdog;

const RING: u32 = 1024;
const MIB: u64 = 1 << 20;

#[test]
fn a_vcpu_that_runs_on_with_a_full_ring_gets_nowhere_and_loses_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    let (machine, limit) = machine(&[Load::new(Mode::Write, 16 * MIB)], &Config::new().ring_entries(RING)).unwrap();
    let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
    let mut copy = Copy::new(machine.memory());
    for _ in 0..5 {
        drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
        let before = machine.stats(0).accesses();
        for _ in 0..1000 {
            assert_eq!(vcpu.0.run().unwrap(), Exit::RingFull);
        }
        assert_eq!(machine.stats(0).accesses(), before);
        drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
        assert!(machine.stats(0).accesses() > before);
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
        assert_eq!(copy.lost(), 0);
    }
}

/// The first error of a vCPU that is run, or none in so many full exits.
fn run_to_an_error(vcpu: &mut Limited, full_exits: u32) -> Result<Option<Error>> {
    let mut exits = 0;
    match drive(vcpu, |exit| {
        exits += u32::from(exit == Exit::RingFull);
        exits >= full_exits
    }) {
        Ok(()) => Ok(None),
        Err(error) => error.downcast().map(Some),
    }
}

#[test]
fn a_ring_that_somebody_else_consumes_is_told() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    // Slow, so that it can be stopped before it has written as many pages as KVM keeps in reserve.
    let load = Load { delay: 1_000_000, ..Load::new(Mode::Write, 16 * MIB) };
    for steals_all in [false, true] {
        let (machine, limit) = machine(&[load], &Config::new().ring_entries(RING)).unwrap();
        let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
        let mut thief = RawRing::map(vcpu.0.fd(), RING).unwrap();
        if steals_all {
            drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
        } else {
            vcpu.0.bind_to_this_thread();
            let kicker = vcpu.0.kicker();
            thread::scope(|scope| {
                scope.spawn(|| {
                    while machine.stats(0).accesses() < 5 {
                        thread::yield_now();
                    }
                    kicker.kick();
                });
                drive(&mut vcpu, |exit| exit == Exit::Interrupted).unwrap();
            });
        }
        let stolen = thief.collect(|_, _| ());
        raw_ring::reset(machine.vm()).unwrap();
        let error = run_to_an_error(&mut vcpu, 1000).unwrap().expect("an error");
        eprintln!("{stolen} entries stolen: {error}");
        if steals_all {
            // The adapter waits for entries that KVM has not come to yet.
            assert!(matches!(error, Error::ForeignVcpu(0)), "{error}");
            assert!(matches!(limit.last_round().and_then(|round| round.take(SLOT)), Err(Error::ForeignVcpu(0))));
        } else {
            assert!(stolen < 64, "{stolen}");
            assert!(matches!(error, Error::Wedged { id: 0, exits: 64 }), "{error}");
        }
        // It goes on being told, and nothing else fails by it.
        assert!(run_to_an_error(&mut vcpu, 1000).unwrap().is_some());
        limit.tick();
        drop(vcpu);
        let _ = limit.remove_vcpu(0);
    }
}

/// For x86-64. Writes a page in every three instructions, from the start of its memory to the end, over and over.
#[cfg(target_arch = "x86_64")]
const TIGHT: &[u8] = &[
    0x4c, 0x8b, 0x65, 0x00, // mov r12, [rbp]
    0x4c, 0x8b, 0x6d, 0x08, // mov r13, [rbp + 8]
    0x4c, 0x89, 0xe2, // 8: mov rdx, r12
    0x48, 0xff, 0xc3, // inc rbx
    0x48, 0x89, 0x1a, // e: mov [rdx], rbx
    0x48, 0x81, 0xc2, 0x00, 0x10, 0x00, 0x00, // add rdx, 4096
    0x4c, 0x39, 0xea, // cmp rdx, r13
    0x72, 0xf1, // jb e
    0xeb, 0xe9, // jmp 8
];

/// At CPL 0, which a KVM without hardware's help emulates for many instructions before it looks at the ring.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_kernel_that_writes_past_its_reserve_is_told_or_loses_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    let machine = Machine::new(&[Load::new(Mode::Write, 16 * MIB)], TIGHT).unwrap();
    let limit = DirtyLimit::enable(machine.vm(), &Config::new().ring_entries(smallest_ring())).unwrap();
    limit.add_slot(SLOT, machine.memory().pages() as u64).unwrap();
    machine.plug_memory(true).unwrap();
    let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
    let mut sregs = vcpu.0.fd().get_sregs().unwrap();
    (sregs.cs.selector, sregs.cs.dpl, sregs.ss.selector, sregs.ss.dpl) = (0x10, 0, 0x18, 0);
    vcpu.0.fd().set_sregs(&sregs).unwrap();
    let mut copy = Copy::new(machine.memory());
    for round in 0..50 {
        let mut exits = 0;
        let ran = drive(&mut vcpu, |_| {
            exits += 1;
            exits >= 20
        });
        let taken = limit.last_round().and_then(|round| round.take(SLOT));
        match (ran, taken) {
            (Ok(()), Ok(log)) => {
                copy.take(&log).unwrap();
                assert_eq!(copy.lost(), 0, "in round {round}, and nothing was said");
            }
            (ran, taken) => {
                let error = ran.and(taken.map(drop).map_err(Into::into)).unwrap_err();
                eprintln!("round {round}: {error:#}");
                let error: Error = error.downcast().unwrap();
                assert!(matches!(error, Error::Overrun(0)), "{error}");
                // It goes on being told.
                assert!(matches!(limit.round(), Err(Error::Overrun(0))));
                return;
            }
        }
    }
}
