//! KVM.md's rule 3 on real KVM: a storm of signals loses no page, and does so when the precaution against it is taken out.

use std::fs;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::common::{Copy, here, machine, vcpu};
use crate::rig::{Copying, Rig};
use crate::stopped::{PAGE, alone};
use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, PageRate, PlantedBug};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, SLOT, kvm_or_skip};

fn config(entries: u32, bug: Option<PlantedBug>) -> Config {
    let config = Config::new().ring_entries(entries);
    match bug {
        Some(bug) => config.planted_bug(bug),
        None => config,
    }
}

/// Signals that the storm delivered.
static DELIVERED: AtomicU64 = AtomicU64::new(0);

/// The storm's signal, with a handler that counts. No SA_RESTART, so that calls are interrupted.
fn signal() -> i32 {
    extern "C" fn count(_: libc::c_int) {
        DELIVERED.fetch_add(1, Relaxed);
    }
    static ONCE: Once = Once::new();
    let signal = libc::SIGRTMIN() + 1;
    ONCE.call_once(|| {
        // SAFETY: the action is zeroed, then filled as sigaction(2) wants it; the handler only adds to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    });
    signal
}

/// A timer that signals the thread that made it, until it is dropped.
struct Storm(libc::timer_t);

impl Storm {
    fn every(period: Duration) -> Result<Self> {
        let period = libc::timespec { tv_sec: 0, tv_nsec: period.subsec_nanos().into() };
        // SAFETY: the structures are zeroed, then filled as timer_create(2) wants them.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = std::mem::zeroed();
            ensure!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) == 0);
            let times = libc::itimerspec { it_interval: period, it_value: period };
            ensure!(libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()) == 0);
            Ok(Self(timer))
        }
    }
}

/// Keeps the storm out for as long as `calm` takes: KVM_RUN would come to nothing in it.
fn sheltered<T>(calm: impl FnOnce() -> T) -> T {
    let mask = |how| {
        // SAFETY: the set is made by sigemptyset before it is used, and only this thread's mask changes.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal());
            libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut());
        }
    };
    mask(libc::SIG_BLOCK);
    let result = calm();
    mask(libc::SIG_UNBLOCK);
    result
}

impl Drop for Storm {
    fn drop(&mut self) {
        // SAFETY: our own timer, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Rewrites 8,192 pages each round, under a signal every 40 µs of a fast machine; one thread runs, resets and copies.
/// Returns how many pages were lost in the first round that lost any.
fn storm(bug: Option<PlantedBug>, rounds: u32) -> Result<usize> {
    const PAGES: u64 = 8192;
    let (machine, limit) = machine(&[Load::new(Mode::Write, PAGES * PAGE)], &config(4096, bug))?;
    let mut vcpu = vcpu(&machine, &limit, 0)?;
    let mut copy = Copy::new(machine.memory());
    let delivered = DELIVERED.load(Relaxed);
    let _storm = Storm::every(here(Duration::from_micros(40)))?;
    for round in 1..=rounds {
        let goal = machine.stats(0).accesses() + PAGES;
        while machine.stats(0).accesses() < goal {
            _ = vcpu.1.before_run()?;
            sheltered(|| vcpu.0.run())?;
        }
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
        if copy.lost() > 0 {
            eprintln!("{bug:?}: {} pages lost in round {round}", copy.lost());
            return Ok(copy.lost());
        }
    }
    let delivered = DELIVERED.load(Relaxed) - delivered;
    // Those that come while they are blocked are delivered as one; how many that leaves is a matter of the host's speed.
    ensure!(delivered >= u64::from(rounds), "{delivered} signals in {rounds} rounds are no storm");
    Ok(0)
}

#[test]
fn a_signal_storm_loses_pages_only_where_resets_let_it_in() {
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    assert_eq!(storm(None, 40).unwrap(), 0);
    // The mask alone suffices, without any page being suspect; so it is the mask that the third one lacks.
    assert_eq!(storm(Some(PlantedBug::TrustSuspects), 30).unwrap(), 0);
    // The first or second round has always lost some hundred pages.
    assert!(
        storm(Some(PlantedBug::OpenSignals), 100).unwrap() > 0,
        "the storm does no harm, so this test shows nothing"
    );
}

/// The threads of this process that are called so.
fn threads_called(name: &str) -> Result<Vec<i32>> {
    let mut threads = Vec::new();
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?;
        // One that has ended has no name.
        if fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            threads.push(thread.file_name().to_string_lossy().parse()?);
        }
    }
    Ok(threads)
}

/// Signals every thread of a rig: of vCPUs, of passes and takes, of ticks; for a time, and until at least `signals`
/// were delivered.
pub(crate) fn storm_everywhere(rig: &mut Rig, time: Duration, signals: u64) -> Result<()> {
    let mut threads = rig.threads();
    threads.extend(threads_called("dirtylimit")?);
    let (end, before) = (Instant::now() + time, DELIVERED.load(Relaxed));
    while Instant::now() < end || DELIVERED.load(Relaxed) - before < signals {
        for thread in &threads {
            // SAFETY: numbers in, a number out; the signal has a handler.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), *thread, signal()) };
        }
        rig.run_for(here(Duration::from_micros(100)))?;
    }
    Ok(())
}

/// That this storm would do harm is what the test above shows, on a thread that it reaches more often.
#[test]
fn a_storm_over_all_threads_loses_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    let loads = [Load::new(Mode::Write, 16 << 20), Load::new(Mode::Random, 16 << 20)];
    let mut rig = Rig::running(&loads, &config(1024, None), Copying::Right).unwrap();
    rig.limit.set_limit(1, PageRate::from_pages_per_sec(20_000)).unwrap();
    storm_everywhere(&mut rig, Duration::from_secs(1), 1000).unwrap();
    assert_eq!(rig.finish().unwrap(), 0);
}
