//! Everything that may change while a guest works: slots, vCPUs and limits come and go, the throttle thread dies, the
//! CPU is taken away. No page is lost by it, and each test has a twin that copies too early and must lose some.

use std::env;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, Error, Kick, Paced, PageRate, Shipped, Stepped};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, kvm_or_skip};

use crate::common::{drive, here, machine, vcpu};
use crate::rig::{Copying, Rig};

const MIB: u64 = 1 << 20;

fn rate(pages: u32) -> PageRate {
    PageRate::from_pages_per_sec(pages)
}

fn loads() -> [Load; 3] {
    [Load::new(Mode::Write, 16 * MIB), Load::new(Mode::Random, 8 * MIB), Load::new(Mode::Write, 4 * MIB)]
}

fn config() -> Config {
    Config::new().ring_entries(1024).max_pause(Duration::from_millis(2))
}

/// The fault loses nothing, and would be seen to if it did.
#[track_caller]
fn loses_nothing(fault: impl Fn(&mut Rig) -> Result<()>) {
    let lost = |copying| {
        let mut rig = Rig::running(&loads(), &config(), copying)?;
        fault(&mut rig)?;
        rig.finish()
    };
    assert_eq!(lost(Copying::Right).unwrap(), 0);
    // A sanitizer's code is too slow for some faults to be seen.
    if env::var_os("DIRTYLIMIT_SANITIZED").is_some() {
        return;
    }
    // Whether a page is written in the moment between reading and taking is chance, and on a busy host a small one.
    let seen = (0..20).any(|_| lost(Copying::TooEarly).unwrap() > 0);
    assert!(seen, "a copy that is wrong passes, so this test shows nothing");
}

#[test]
fn slots_go_and_come_back_under_load() {
    if !kvm_or_skip() {
        return;
    }
    loses_nothing(|rig| {
        rig.limit.set_limit(0, rate(20_000))?;
        for round in 0..12 {
            let gone = 1 + round % 2;
            rig.stop(gone)?;
            rig.remove_slot(gone)?;
            ensure!(matches!(rig.limit.mark_dirty(u32::try_from(gone)?, 0..1), Err(Error::NoSlot(_))));
            rig.run_for(Duration::from_millis(20))?;
            rig.add_slot(gone)?;
            rig.start(gone)?;
            rig.run_for(Duration::from_millis(30))?;
        }
        ensure!(rig.limit.stats().dropped == 0, "{:?}", rig.limit.stats());
        Ok(())
    });
}

#[test]
fn vcpus_come_and_go_under_load() {
    if !kvm_or_skip() {
        return;
    }
    for kick in [Kick::Off, Kick::Signal(libc::SIGRTMIN() + 7)] {
        let mut rig = Rig::new(&loads(), &config().kick(kick), Copying::Right).unwrap();
        for round in 0..30 {
            // The first three are born, the others change threads.
            let index = round % 3;
            rig.stop(index).unwrap();
            rig.start(index).unwrap();
            if round % 5 == 0 {
                rig.limit.set_limit_all(rate(10_000));
            }
            rig.run_for(Duration::from_millis(10)).unwrap();
        }
        assert_eq!(rig.limit.vcpus(), [0, 1, 2]);
        assert_eq!(rig.finish().unwrap(), 0);
    }
    loses_nothing(|rig| {
        rig.limit.set_limit_all(rate(10_000));
        for round in 0..12 {
            rig.stop(round % 3)?;
            rig.start(round % 3)?;
            rig.run_for(Duration::from_millis(20))?;
        }
        Ok(())
    });
}

#[test]
fn a_thread_that_has_left_its_vcpu_is_not_kicked() {
    if !kvm_or_skip() {
        return;
    }
    let signal = libc::SIGRTMIN() + 7;
    let (machine, limit) = machine(&loads()[..1], &config().kick(Kick::Signal(signal))).unwrap();
    let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
    drive(&mut vcpu, |exit| exit == Exit::RingFull).unwrap();
    let kicked = || {
        limit.set_limit(0, rate(100_000)).unwrap();
        // SAFETY: sigpending fills the set, which is then read.
        unsafe {
            let mut pending = std::mem::zeroed();
            libc::sigpending(&raw mut pending);
            libc::sigismember(&raw const pending, signal) == 1
        }
    };
    assert!(kicked(), "a limit is told to who runs");
    _ = vcpu.1.before_run().unwrap(); // takes the signal back
    drop(vcpu.1);
    assert!(!kicked());
}

#[test]
fn a_vcpu_is_either_removed_or_attached_to() {
    if !kvm_or_skip() {
        return;
    }
    let loads: Vec<Load> = loads().into_iter().chain([Load::new(Mode::Idle, 4096)]).collect();
    let mut rig = Rig::new(&loads, &config(), Copying::Right).unwrap();
    // So that they leave the CPUs, of which there may be one, to the two that race.
    rig.limit.set_limit_all(rate(100));
    (0..3).try_for_each(|index| rig.start(index)).unwrap();
    let cpu = rig.birth(3).unwrap();
    let id = 3;
    let (limit, barrier) = (&rig.limit, &Barrier::new(2));
    drop(limit.add_vcpu(id, cpu.fd()).unwrap());
    let (mut removed, mut attached) = (0, 0);
    // More often than there is room for vCPUs, so that a place that is not given back is missed.
    for _ in 0..1100 {
        let (remove, add) = thread::scope(|scope| {
            let remove = scope.spawn(move || {
                barrier.wait();
                limit.remove_vcpu(id)
            });
            barrier.wait();
            let add = limit.add_vcpu(id, cpu.fd());
            (remove.join().unwrap(), add)
        });
        match (&remove, &add) {
            (Ok(()), Ok(_)) => (removed, attached) = (removed + 1, attached + 1),
            (Ok(()), Err(Error::VcpuBusy(3))) => removed += 1,
            (Err(Error::VcpuBusy(3)), Ok(_)) => attached += 1,
            other => panic!("{other:?}"),
        }
        assert_eq!(limit.vcpus().contains(&id), add.is_ok(), "{remove:?} {add:?}");
        if add.is_ok() {
            limit.set_limit(id, rate(100)).unwrap();
            assert!(matches!(limit.add_vcpu(id, cpu.fd()), Err(Error::VcpuBusy(3))));
        } else {
            assert!(matches!(limit.query(id), Err(Error::NoVcpu(3))));
            drop(limit.add_vcpu(id, cpu.fd()).unwrap());
        }
    }
    eprintln!("removed {removed} times, attached to {attached} times, of 1100");
    rig.check().unwrap();
    assert_eq!(rig.finish().unwrap(), 0);
}

/// Changes something of the limits, at random, and says what.
pub(crate) fn change_a_limit(rig: &Rig, vcpus: u32, random: &mut fastrand::Rng) -> String {
    let (limit, id) = (&rig.limit, random.u32(..vcpus));
    let pages = 1 << random.u32(4..20);
    match random.u8(..8) {
        // A vCPU that was not born yet has no limit.
        0 | 1 => format!("set_limit({id}, {pages}): {:?}", limit.set_limit(id, rate(pages)).err()),
        2 => format!("cancel({id}): {:?}", limit.cancel(id).err()),
        3 => {
            limit.set_limit_all(rate(pages));
            format!("set_limit_all({pages})")
        }
        4 => {
            limit.cancel_all();
            "cancel_all()".into()
        }
        5 => {
            let budget = random.bool().then_some(pages);
            limit.set_vm_limit(budget.map(rate));
            format!("set_vm_limit({budget:?})")
        }
        6 => {
            let stepped = random.bool();
            limit.set_policy(if stepped { Shipped::Stepped(Stepped::default()) } else { Shipped::Paced(Paced) });
            format!("set_policy(stepped: {stepped})")
        }
        _ => {
            let weight = random.u32(..5);
            format!("set_weight({id}, {weight}): {:?}", limit.set_weight(id, weight).err())
        }
    }
}

#[test]
fn limits_change_a_thousand_times_a_second() {
    if !kvm_or_skip() {
        return;
    }
    loses_nothing(|rig| {
        thread::scope(|scope| {
            for seed in 0..3 {
                let rig = &*rig;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    for _ in 0..700 {
                        change_a_limit(rig, 3, &mut random);
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
        });
        // It ends with a limit, so that the guest does not write everything again before it is stopped.
        rig.limit.set_vm_limit(None);
        rig.limit.set_limit_all(rate(10_000));
        rig.run_for(Duration::from_millis(100))
    });
}

/// Keeps the CPUs busy for a while, with all threads of the rig ranking below that work.
pub(crate) fn starve(rig: &mut Rig, time: Duration) -> Result<()> {
    let rank = |rig: &Rig, policy| {
        let lowest = libc::sched_param { sched_priority: 0 };
        for thread in rig.threads() {
            // SAFETY: reads the parameter; the thread is one of this process's.
            ensure!(unsafe { libc::sched_setscheduler(thread, policy, &raw const lowest) } == 0);
        }
        Ok(())
    };
    rank(rig, libc::SCHED_IDLE)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 * thread::available_parallelism()?.get() {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let starved = rig.run_for(time);
        over.store(true, Relaxed);
        starved
    })?;
    rank(rig, libc::SCHED_OTHER)
}

#[test]
fn the_cpu_is_taken_away() {
    if !kvm_or_skip() {
        return;
    }
    loses_nothing(|rig| {
        rig.limit.set_limit_all(rate(10_000));
        starve(rig, Duration::from_secs(1))?;
        // It goes on.
        for index in 0..3 {
            let (before, start) = (rig.accesses(index), Instant::now());
            while rig.accesses(index) == before {
                ensure!(start.elapsed() < here(Duration::from_secs(20)), "vCPU {index} stands still");
                rig.run_for(Duration::from_millis(1))?;
            }
        }
        Ok(())
    });
}

/// A throttle thread that is stuck is to all others one that has ended: it holds nothing while it waits.
#[test]
fn without_a_throttle_thread_a_guest_runs_free_after_the_lease_and_is_held_again_without_a_jump() {
    if !kvm_or_skip() {
        return;
    }
    const LIMIT: u32 = 400;
    const RING: u64 = 1024;
    let mut rig = Rig::running(&loads()[..1], &config(), Copying::Passes).unwrap();
    rig.limit.set_limit(0, rate(LIMIT)).unwrap();
    // Accesses, and what the limit allows for the time that they took, with half of it and two rings as slack.
    let written_in = |rig: &mut Rig, time| {
        let (before, start) = (rig.accesses(0), Instant::now());
        rig.run_for(time).unwrap();
        let written = rig.accesses(0) - before;
        #[expect(clippy::cast_possible_truncation, reason = "a few seconds")]
        (written, u64::from(LIMIT) * start.elapsed().as_millis() as u64 * 3 / 2000 + 2 * RING)
    };
    written_in(&mut rig, Duration::from_millis(300));
    rig.throttle(false).unwrap();
    let (written, allowed) = written_in(&mut rig, Duration::from_secs(3));
    assert!(written <= allowed, "{written} pages under a lease that lasts, {allowed} allowed");
    rig.run_for(Duration::from_secs(3)).unwrap();
    let (before, start) = (rig.accesses(0), Instant::now());
    // However little of the CPU a busy host leaves it.
    while rig.accesses(0) - before <= u64::from(LIMIT) * (start.elapsed().as_secs() + 1) * 3 / 2 + 2 * RING {
        assert!(start.elapsed() < here(Duration::from_secs(100)), "limited without a lease");
        rig.run_for(Duration::from_millis(10)).unwrap();
    }
    rig.throttle(true).unwrap();
    for _ in 0..2 {
        let (written, allowed) = written_in(&mut rig, Duration::from_secs(1));
        assert!(written <= allowed, "{written} pages under the limit again, {allowed} allowed");
        assert!(written > u64::from(LIMIT) / 10, "{written} pages: the guest pays for what it wrote when it was free");
    }
    assert_eq!(rig.finish().unwrap(), 0);
}
