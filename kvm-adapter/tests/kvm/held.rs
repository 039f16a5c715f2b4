//! Limits that hold where they did not: nothing brings the vCPU out of the guest, or the process has stood still.

use std::io::BufRead;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dirtylimit_kvm::{Config, PageRate, Unenforced};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, SLOT, kvm_or_skip};

use crate::common::{drive, here, machine, vcpu};
use crate::rig::{Copying, Rig, Watchdog};
use crate::stopped::{Halt, Halted, PAGE, alone};

/// 2 MiB/s.
const LIMIT: u32 = 512;

fn rig(pages: u64, ring: u32) -> Result<Rig> {
    let config = Config::new().ring_entries(ring);
    Rig::running(&[Load::new(Mode::Write, pages * PAGE)], &config, Copying::Passes)
}

/// Waits until the vCPU has paused, or has made `most` accesses, or for a minute; the accesses meanwhile.
fn accesses_to_the_first_pause(rig: &mut Rig, most: u64) -> Result<u64> {
    let (before, start) = (rig.accesses(0), Instant::now());
    loop {
        rig.run_for(Duration::from_millis(1))?;
        let written = rig.accesses(0) - before;
        if rig.limit.query(0)?.totals.paused_us > 0 || written > most || start.elapsed() > here(Duration::from_secs(40))
        {
            return Ok(written);
        }
    }
}

#[test]
fn a_ring_that_passes_would_empty_before_it_is_full_brings_a_limit_home() {
    if !kvm_or_skip() {
        return;
    }
    // Passes come every 3 ms: no guest fills such a ring in that time.
    let ring = 16_384;
    let mut rig = rig(4 * ring, 16_384).unwrap();
    rig.run_for(Duration::from_millis(100)).unwrap();
    rig.limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT)).unwrap();
    let most = 8 * ring;
    let written = accesses_to_the_first_pause(&mut rig, most).unwrap();
    assert!(rig.limit.query(0).unwrap().totals.paused_us > 0, "{written} pages written, and not a pause");
    assert!(written <= most, "{written} pages");
    assert_eq!(rig.finish().unwrap(), 0);
}

#[test]
fn a_vcpu_whose_ring_somebody_empties_again_and_again_is_told_to_be_unlimited() {
    if !kvm_or_skip() {
        return;
    }
    let mut rig = rig(65_536, 65_536).unwrap();
    rig.limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT)).unwrap();
    let start = Instant::now();
    let why = loop {
        // Complete, and so it leaves the vCPU a ring to run on.
        rig.limit.last_round().map(drop).unwrap();
        rig.run_for(Duration::from_millis(3)).unwrap();
        let why = rig.limit.query(0).unwrap().unenforced;
        if why.is_some() || start.elapsed() > here(Duration::from_secs(40)) {
            break why;
        }
    };
    assert_eq!(why, Some(Unenforced::NotAccepted));
    rig.limit.cancel(0).unwrap();
    assert_eq!(rig.limit.query(0).unwrap().unenforced, None);
    assert_eq!(rig.finish().unwrap(), 0);
}

#[test]
fn a_log_that_nobody_takes_is_told_until_somebody_does() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(120));
    let (machine, limit) = machine(&[Load::new(Mode::Write, 8192 * PAGE)], &Config::new()).unwrap();
    let mut vcpu = vcpu(&machine, &limit, 0).unwrap();
    let _throttle = limit.throttle_thread(Duration::from_millis(10)).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(2560)).unwrap();
    let why = || limit.query(0).unwrap().unenforced;
    drive(&mut vcpu, |_| why() == Some(Unenforced::LogNotTaken)).unwrap();
    limit.round().and_then(|round| round.take(SLOT)).unwrap();
    drive(&mut vcpu, |_| why().is_none()).unwrap();
}

/// How the child is told that it is one.
const ROLE: &str = "DIRTYLIMIT_TEST_STOOD_STILL";

/// The process that is stopped for longer than a lease; says how many pages its limited guest wrote after that, before the
/// next tick, and in which time (ms).
fn stand_still() -> Result<()> {
    let mut rig = rig(32_768, 4096)?;
    rig.limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT))?;
    accesses_to_the_first_pause(&mut rig, u64::MAX)?;
    // The next tick is ours.
    rig.throttle(false)?;
    // From each look to the next, and from before the word that brings the stop, so that no moment is left out.
    let (mut written, mut seen) = (rig.accesses(0), Instant::now());
    println!("\nrunning");
    let awake = loop {
        rig.run_for(Duration::from_millis(1))?;
        let now = Instant::now();
        if now - seen > Duration::from_secs(3) {
            break now;
        }
        (written, seen) = (rig.accesses(0), now);
    };
    rig.run_for(Duration::from_millis(200))?;
    println!("\nwrote {} {}", rig.accesses(0) - written, awake.elapsed().as_millis());
    rig.limit.tick();
    rig.finish().map(drop)
}

/// Stops a child for over a lease; what it says.
fn stop_for_six_seconds() -> Result<(u64, u64)> {
    let (child, says) = Halted::start((ROLE, "child"))?;
    for line in says.lines() {
        let line = line?;
        if line == "running" {
            child.halt(&Halt::Stop, Duration::from_secs(6))?;
        } else if let Some((pages, ms)) = line.strip_prefix("wrote ").and_then(|said| said.split_once(' ')) {
            return Ok((pages.parse()?, ms.parse()?));
        }
    }
    bail!("the child ended without a word")
}

#[test]
fn a_process_that_stood_still_for_longer_than_a_lease_finds_its_limits_in_force() {
    if !kvm_or_skip() {
        return;
    }
    if std::env::var(ROLE).is_ok() {
        return stand_still().unwrap();
    }
    let _alone = alone();
    let _watchdog = Watchdog::new(Duration::from_secs(300));
    // A second later it may well have lapsed: nobody ticks.
    let in_time = || (0..5).map(|_| stop_for_six_seconds()).find(|said| !matches!(said, Ok((_, 800..))));
    let (pages, ms) = in_time().context("the child is too slow each time").unwrap().unwrap();
    let allowed = u64::from(LIMIT) * ms / 1000 * 2 + 200;
    assert!(pages <= allowed, "{pages} pages in the first {ms} ms, {allowed} allowed");
}
