//! KVM.md's rule 3 on real KVM: neither a storm of signals nor being stopped again and again during resets loses a page,
//! and both do so when the precaution against them is taken out.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use crate::common::{Copy, drive, machine, vcpu};
use dirtylimit_bench::guest::kvm::{Exit, Load, SLOT, kvm_or_skip};
use dirtylimit_bench::payload::Mode;
use dirtylimit_kvm::{Config, PlantedBug};

const PAGE: u64 = 4096;

fn config(entries: u32, bug: Option<PlantedBug>) -> Config {
    let config = Config::new().ring_entries(entries);
    match bug {
        Some(bug) => config.planted_bug(bug),
        None => config,
    }
}

/// Signals that the storm delivered.
static DELIVERED: AtomicU64 = AtomicU64::new(0);

/// A timer that signals the thread that made it, until it is dropped.
struct Storm(libc::timer_t);

impl Storm {
    fn every(period: Duration) -> Result<Self> {
        extern "C" fn count(_: libc::c_int) {
            DELIVERED.fetch_add(1, Relaxed);
        }
        let period = libc::timespec { tv_sec: 0, tv_nsec: period.subsec_nanos().into() };
        // SAFETY: the structures are zeroed, then filled as timer_create(2) wants them; the handler only adds to an atomic.
        // No SA_RESTART, so that calls are interrupted.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(libc::c_int) as libc::sighandler_t;
            ensure!(libc::sigaction(libc::SIGRTMIN() + 1, &raw const action, std::ptr::null_mut()) == 0);
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGRTMIN() + 1;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = std::mem::zeroed();
            ensure!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) == 0);
            let times = libc::itimerspec { it_interval: period, it_value: period };
            ensure!(libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()) == 0);
            Ok(Self(timer))
        }
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        // SAFETY: our own timer, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Rewrites 8,192 pages each round, under a signal every 40 µs; one thread runs, resets and copies. Returns the pages lost
/// after each round, up to the first that lost any.
fn storm(bug: Option<PlantedBug>, rounds: u32) -> Result<(u32, usize)> {
    const PAGES: u64 = 8192;
    let (machine, limit) = machine(&[Load::new(Mode::Write, PAGES * PAGE)], &config(4096, bug))?;
    let mut vcpu = vcpu(&machine, &limit, 0)?;
    let mut copy = Copy::new(machine.memory());
    let delivered = DELIVERED.load(Relaxed);
    let _storm = Storm::every(Duration::from_micros(40))?;
    for round in 1..=rounds {
        let goal = machine.stats(0).accesses() + PAGES;
        drive(&mut vcpu, |_| machine.stats(0).accesses() >= goal)?;
        copy.take(&limit.take_dirty_log(SLOT)?)?;
        if copy.lost() > 0 {
            return Ok((round, copy.lost()));
        }
    }
    let delivered = DELIVERED.load(Relaxed) - delivered;
    ensure!(delivered > u64::from(rounds) * 100, "{delivered} signals in {rounds} rounds are no storm");
    Ok((rounds, 0))
}

#[test]
fn a_signal_storm_loses_pages_only_where_resets_let_it_in() {
    if !kvm_or_skip() {
        return;
    }
    let start = Instant::now();
    for (bug, rounds) in
        [(None, 100), (Some(PlantedBug::TrustSuspects), 100), (Some(PlantedBug::OpenSignals), 100)]
    {
        let r = storm(bug, rounds).unwrap();
        eprintln!("{bug:?}: {r:?} {:?}", start.elapsed());
    }
}
