//! The machine and the payload on real KVM, with the ring served by hand: no limiter is involved.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::raw_ring::{self, RawRing};
use super::*;
use crate::payload::{self, Mode};

const RING: u32 = 1024;
const WORKLOAD: usize = 4096;

/// A machine, with a raw ring for each vCPU.
fn machine(loads: &[Load], image: &[u8]) -> Result<(Machine, Vec<(GuestCpu, RawRing)>)> {
    let machine = Machine::new(loads, image)?;
    raw_ring::enable(machine.vm(), RING)?;
    machine.plug_memory(true)?;
    let vcpus = (0..loads.len())
        .map(|index| {
            let cpu = machine.vcpu(index)?;
            let ring = RawRing::map(cpu.fd(), RING)?;
            Ok((cpu, ring))
        })
        .collect::<Result<_>>()?;
    Ok((machine, vcpus))
}

/// Runs one vCPU, its ring collected and reset whenever it is full, until `exits` says that it has seen enough.
fn drive(
    machine: &Machine,
    vcpu: &mut (GuestCpu, RawRing),
    mut enough: impl FnMut(Exit, &[u64]) -> bool,
) -> Result<()> {
    let (cpu, ring) = vcpu;
    cpu.bind_to_this_thread();
    loop {
        let exit = cpu.run()?;
        let mut pages = Vec::new();
        let collected = ring.collect(|slot, page| {
            assert_eq!(slot, SLOT);
            pages.push(page);
        });
        assert_eq!(raw_ring::reset(machine.vm())?, u32::try_from(collected)?);
        if enough(exit, &pages) {
            return Ok(());
        }
    }
}

fn bitmap(machine: &Machine, pages: &[u64]) -> Vec<u64> {
    let mut log = vec![0u64; machine.memory().pages().div_ceil(64)];
    for &page in pages {
        log[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
    }
    log
}

fn count_of(machine: &Machine, index: usize) -> Vec<u64> {
    let range = machine.workload(index);
    (range.start / 4096..range.end / 4096)
        .map(|page| machine.memory().page(usize::try_from(page).unwrap())[0].load(Relaxed))
        .collect()
}

/// The guest may have been stopped between a write and counting it.
fn assert_all_counted(machine: &Machine, counts: &[u64]) {
    let (written, counted) = (counts.iter().sum::<u64>(), machine.stats(0).accesses());
    assert!(written == counted || written == counted + 1, "{counted} accesses counted, {written} made");
}

#[test]
fn a_writer_fills_its_ring_and_its_copy_loses_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, mut vcpus) = machine(&[Load::new(Mode::Write, 16 << 20)], payload::image()).unwrap();
    let mut shadow = Shadow::new(machine.memory().clone()).unwrap();
    let mut rounds = 0;
    drive(&machine, &mut vcpus[0], |exit, pages| {
        assert_eq!(exit, Exit::RingFull);
        shadow.copy(&bitmap(&machine, pages)).unwrap();
        rounds += 1;
        rounds == 100
    })
    .unwrap();
    assert!(shadow.lost().is_empty());
    let counts = count_of(&machine, 0);
    assert_all_counted(&machine, &counts);
    let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
    assert!(most - least <= 1, "a loop over all pages in order writes them equally often, not {least} to {most} times");
    // The opposite, so that a copy that cannot fail is noticed: pages that were not copied are found.
    machine.memory().write(machine.workload(0).start, &[u64::MAX]);
    assert_eq!(shadow.lost(), [WORKLOAD]);
}

#[test]
fn two_vcpus_keep_to_their_own_memory() {
    if !kvm_or_skip() {
        return;
    }
    let loads = [Load::new(Mode::Random, 8 << 20), Load::new(Mode::Write, 3 * 4096)];
    let (machine, mut vcpus) = machine(&loads, payload::image()).unwrap();
    assert!(machine.workload(0).end <= machine.workload(1).start);
    let mut rounds = 0;
    drive(&machine, &mut vcpus[0], |_, _| {
        rounds += 1;
        rounds == 20
    })
    .unwrap();
    let counts = count_of(&machine, 0);
    let written = counts.iter().filter(|&&count| count > 0).count();
    assert!(written > counts.len() * 9 / 10, "only {written} of {} pages were drawn", counts.len());
    assert_all_counted(&machine, &counts);
    assert_eq!(count_of(&machine, 1), [0, 0, 0]);
    let outside = machine.workload(0).end / 4096;
    let stray = (usize::try_from(outside).unwrap()..machine.memory().pages())
        .find(|&page| machine.memory().page(page).iter().any(|word| word.load(Relaxed) != 0));
    assert_eq!(stray, None);
}

/// Runs vCPU 0 until it has made `accesses`, by kicks from another thread, and gives its exits but the full ones.
fn run_for(machine: &Machine, vcpu: &mut (GuestCpu, RawRing), accesses: u64) -> Result<Vec<Exit>> {
    let kicker = vcpu.0.kicker();
    let mut exits = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            drive(machine, vcpu, |exit, _| {
                exits.push(exit);
                machine.stats(0).accesses() >= accesses && exit == Exit::Interrupted || Instant::now() > deadline
            })
        });
        while !driver.is_finished() {
            std::thread::sleep(Duration::from_millis(2));
            kicker.kick();
        }
        driver.join().unwrap()
    })?;
    exits.retain(|&exit| exit != Exit::RingFull);
    Ok(exits)
}

#[test]
fn a_reader_changes_nothing_and_a_kick_gets_it_out() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, mut vcpus) = machine(&[Load::new(Mode::Read, 8 << 20)], payload::image()).unwrap();
    let exits = run_for(&machine, &mut vcpus[0], 10_000).unwrap();
    assert!(exits.iter().all(|&exit| exit == Exit::Interrupted), "{exits:?}");
    assert!(machine.stats(0).accesses() >= 10_000);
    assert!(count_of(&machine, 0).iter().all(|&count| count == 0));
}

#[test]
fn an_idle_vcpu_rings_the_doorbell_and_touches_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, mut vcpus) = machine(&[Load::new(Mode::Idle, 0)], payload::image()).unwrap();
    let mut rung = 0;
    drive(&machine, &mut vcpus[0], |exit, _| {
        rung += u32::from(exit == Exit::Doorbell);
        rung == 100
    })
    .unwrap();
    assert_eq!(machine.stats(0).accesses(), 0);
}

#[test]
fn a_burst_writes_and_rests_by_turns() {
    if !kvm_or_skip() {
        return;
    }
    let load = Load { half_period: Duration::from_millis(20), ..Load::new(Mode::Burst, 4 << 20) };
    let (machine, mut vcpus) = machine(&[load], payload::image()).unwrap();
    let (mut bursts, mut before) = (0u64, 0);
    drive(&machine, &mut vcpus[0], |exit, _| {
        let accesses = machine.stats(0).accesses();
        if exit == Exit::Doorbell && accesses > before {
            before = accesses;
            bursts += 1;
        }
        bursts == 5
    })
    .unwrap();
    // Five times on and four times off are complete, by the guest's own clock.
    let half_period = vcpus[0].0.tsc_hz() / 50;
    assert!(machine.stats(0).running() >= 9 * half_period, "{} ticks", machine.stats(0).running());
    assert!(before > bursts, "a burst is more than one access");
}

#[test]
fn gaps_are_counted_where_they_belong_and_forgotten_on_request() {
    if !kvm_or_skip() {
        return;
    }
    // Every gap is a stall of more than 0 ticks here, and the delay makes each of them long.
    let load = Load { delay: 5_000, stall: Duration::ZERO, ..Load::new(Mode::Read, 4096) };
    let (machine, mut vcpus) = machine(&[load], payload::image()).unwrap();
    run_for(&machine, &mut vcpus[0], 1_000).unwrap();
    let stats = machine.stats(0);
    let histogram = stats.histogram();
    let fine = stats.fine();
    // It may have been stopped between counting a gap and the access after it.
    for gaps in [&histogram[..], &fine] {
        assert!(gaps.iter().sum::<u64>().abs_diff(stats.accesses()) <= 1, "{} accesses: {gaps:?}", stats.accesses());
    }
    let last = fine.iter().rposition(|&count| count > 0).unwrap() as u64;
    assert_eq!(last, (stats.longest() >> payload::stats::fine_shift(vcpus[0].0.tsc_hz())).min(fine.len() as u64 - 1));
    let highest = 63 - histogram.iter().rev().position(|&count| count > 0).unwrap();
    assert_eq!(stats.longest().ilog2() as usize, highest);
    assert!(
        histogram[..8].iter().sum::<u64>() < stats.accesses() / 10,
        "5,000 turns in under 256 ticks: {histogram:?}"
    );
    stats.begin_phase();
    assert_eq!((stats.longest(), stats.histogram()), (0, [0; 64]));
    assert!(stats.fine().iter().all(|&count| count == 0));
    assert!(stats.accesses() >= 1_000, "accesses are the guest's own");
}

#[test]
fn a_payload_that_faults_is_an_error_not_a_panic() {
    if !kvm_or_skip() {
        return;
    }
    for &(what, image) in arch::images::FAULTY {
        let (machine, mut vcpus) = machine(&[Load::new(Mode::Write, 4096)], image).unwrap();
        let error = drive(&machine, &mut vcpus[0], |_, _| false).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("vCPU 0 stopped at") && text.contains(arch::FAULT), "{what}: {text}");
    }
}

#[test]
fn a_guest_that_never_exits_can_be_kicked_before_and_while_it_runs() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, mut vcpus) = machine(&[Load::new(Mode::Write, 4096)], arch::images::SPIN).unwrap();
    let cpu = &mut vcpus[0].0;
    let kicker = cpu.kicker();
    kicker.kick();
    cpu.bind_to_this_thread();
    let (back, watchdog) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let late = scope.spawn(move || {
            let late = watchdog.recv_timeout(Duration::from_secs(10)).is_err();
            kicker.kick();
            late
        });
        assert_eq!(cpu.run().unwrap(), Exit::Interrupted);
        back.send(()).unwrap_or(());
        assert!(!late.join().unwrap(), "a kick before the run was lost");
    });
    assert!(!run_for(&machine, &mut vcpus[0], 0).unwrap().is_empty());
}

#[test]
fn an_impossible_machine_is_refused() {
    if !kvm_or_skip() {
        return;
    }
    let image = payload::image();
    let write = |bytes| Load::new(Mode::Write, bytes);
    for (loads, image, says) in [
        (&[][..], image, "0 vCPUs"),
        (&[write(4096); MAX_VCPUS + 1], image, "65 vCPUs"),
        (&[write(4096), write(0)], image, "vCPU 1"),
        (&[write(5000)], image, "5000"),
        (&[write(1 << 40)], image, "GiB"),
        (&[write(u64::MAX - 4095)], image, "GiB"),
        (&[Load::new(Mode::Random, 3 * 4096)], image, "power of two"),
        (&[write(4096)], &[], "empty"),
        (&[write(4096)], &[0x90; payload::IMAGE_MAX + 1], "larger"),
    ] {
        let text = format!("{:#}", Machine::new(loads, image).unwrap_err());
        assert!(text.contains(says), "{says}: {text}");
    }
    assert!(Machine::new(&[write(4096); MAX_VCPUS], image).is_ok());
}
