//! Storms: a guest that is copied all the time while something is thrown at the process, for as long as is asked for. No page
//! may be lost, nothing may fail, and when the memory slot has been armed again no page may be left suspect. Storms that halt
//! the process, which no mask prevents, then blow once more at one that trusts what an interrupted reset left: it loses pages.
//!
//! By hand for longer: `ci/storms.sh`. What is thrown at a process comes from another: a child does the work.

use std::io::BufRead;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dirtylimit_kvm::{Config, PlantedBug};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, SLOT, kvm_or_skip};

use crate::common::{Copy, Limited, drive, here, machine, vcpu};
use crate::rig::{Copying, Rig, Watchdog};
use crate::stopped::{Freezer, Halt, Halted, PAGE, alone};

/// How the child is told what to do: which guest, what is wrong with it, for how many seconds, how many resets must be cut.
const ROLE: &str = "DIRTYLIMIT_TEST_STORM";
/// What the child says just before it resets.
const RESETS: &str = "resets";
/// The blows then, one upon the other: a reset is short, and the child does not get far between two of them.
const BLOWS: u32 = 10;
/// How much longer a storm blows, if it has not done by then what it is for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Seconds of each storm.
fn seconds() -> u64 {
    std::env::var("DIRTYLIMIT_STORM_SECONDS").map_or(2, |text| text.parse().expect("DIRTYLIMIT_STORM_SECONDS"))
}

/// Signals to the thread that resets: all 64 numbers, but for the two that nobody can catch.
mod signals {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
    use std::thread;
    use std::time::Duration;

    use crate::common::here;

    static DELIVERED: AtomicU64 = AtomicU64::new(0);

    /// glibc's own, by which `setresuid` reaches every thread.
    const SETXID: i32 = 33;

    extern "C" fn count(_: libc::c_int) {
        DELIVERED.fetch_add(1, Relaxed);
    }

    /// The kernel's `struct sigaction`, as large as any machine's.
    type Action = [u64; 8];

    fn raw_action(signal: i32, new: *const Action, old: *mut Action) {
        // SAFETY: reads and writes the kernel's structure, which `Action` has room for; its set of signals has 8 bytes.
        assert_eq!(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, 8usize) }, 0);
    }

    fn handle_all() -> Vec<i32> {
        let handled = (1..=64).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP, SETXID].contains(signal));
        // The C library has one for its own signals only when it needs it, and sets none for us: one that it made is copied.
        let mut action: Action = [0; 8];
        let model = libc::SIGRTMIN() + 2;
        // SAFETY: the handler adds to an atomic.
        unsafe { libc::signal(model, count as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        raw_action(model, std::ptr::null(), &raw mut action);
        // One at a time: a stack has an end.
        action[3] = u64::MAX;
        handled.inspect(|signal| raw_action(*signal, &raw const action, std::ptr::null_mut())).collect()
    }

    /// A storm on the calling thread, until it is dropped.
    #[derive(Debug)]
    pub(super) struct Storm(Arc<AtomicBool>);

    impl Storm {
        pub(super) fn new() -> Self {
            let (over, numbers) = (Arc::new(AtomicBool::new(false)), handle_all());
            // SAFETY: the first takes nothing; without an alternative stack, which is too small for two of them, handlers run
            // on the thread's own.
            let target = unsafe {
                let none = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                assert_eq!(libc::sigaltstack(&raw const none, std::ptr::null_mut()), 0);
                libc::gettid()
            };
            let is_over = over.clone();
            thread::spawn(move || {
                for number in numbers.iter().cycle().take_while(|_| !is_over.load(Relaxed)) {
                    // SAFETY: numbers in; each has a handler.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), target, *number) };
                    thread::sleep(here(Duration::from_micros(20)));
                }
            });
            let is_over = over.clone();
            thread::spawn(move || {
                while !is_over.load(Relaxed) {
                    // SAFETY: numbers in; changes nothing. It signals every thread and waits for each.
                    unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) };
                    DELIVERED.fetch_add(1, Relaxed);
                }
            });
            Self(over)
        }

        pub(super) fn delivered(&self) -> u64 {
            DELIVERED.load(Relaxed)
        }
    }

    impl Drop for Storm {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
}

/// Runs the guest until its ring is full, a signal comes, or it has written enough.
fn run_a_while(vcpu: &mut Limited) -> Result<()> {
    let mut exits = 0;
    drive(vcpu, |exit| {
        exits += 1;
        exit == Exit::RingFull || exits > 200
    })
}

/// The process at which things are thrown.
fn be_stormed(role: &str) -> Result<()> {
    let [mode, kind, seconds, cut] = role.split(' ').collect::<Vec<_>>()[..] else { bail!("{role}") };
    let (least, cut) = (Duration::from_secs(seconds.parse()?), cut.parse::<u64>()?);
    let most = least + here(PATIENCE);
    let mode = if mode == "random" { Mode::Random } else { Mode::Write };
    let config = Config::new().ring_entries(4096);
    let config = if kind == "trusting" { config.planted_bug(PlantedBug::TrustSuspects) } else { config };
    let (machine, limit) = machine(&[Load::new(mode, 8192 * PAGE)], &config)?;
    let mut vcpu = vcpu(&machine, &limit, 0)?;
    let mut copy = Copy::new(machine.memory());
    let storm = (kind == "signalled").then(signals::Storm::new);
    println!("\nready");
    let start = Instant::now();
    let mut takes = 0;
    while start.elapsed() < least || (limit.stats().suspect_resets < cut && start.elapsed() < most) {
        run_a_while(&mut vcpu)?;
        limit.meter(); // so that little but resets is left to do
        println!("{RESETS}");
        copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
        takes += 1;
        if copy.lost() > 0 {
            break;
        }
    }
    let (lost, stats) = (copy.lost(), limit.stats());
    if let Some(storm) = storm {
        ensure!(storm.delivered() > takes, "{} signals in {takes} takes are no storm", storm.delivered());
    }
    // As a VMM does that wants no page twice.
    machine.plug_memory(false)?;
    machine.plug_memory(true)?;
    copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
    limit.trust_slot(SLOT)?;
    let left = limit.last_round().and_then(|round| round.take(SLOT))?.iter().map(|word| word.count_ones()).sum::<u32>();
    println!("\nended {lost} {} {} {left} {takes}", stats.suspect_resets, stats.suspect_pages);
    Ok(())
}

/// What a child said at its end.
#[derive(Debug)]
struct End {
    lost: u64,
    /// Resets cut or disturbed, and the pages suspect before the slot was armed again, and after it.
    resets: u64,
    suspect: u64,
    left: u64,
}

/// What is thrown at a child.
struct Storm<'a> {
    /// At most from one blow to the next, on a fast machine.
    apart: Duration,
    blow: &'a mut dyn FnMut(&Halted) -> Result<()>,
}

/// Starts a child and throws `storm` at it until it says how it went: at random times, and each time that it resets.
fn weather(guest: &str, kind: &str, cut: u64, storm: &mut Storm<'_>) -> Result<End> {
    let seconds = seconds();
    let (child, says) = Halted::start((ROLE, &format!("{guest} {kind} {seconds} {cut}")))?;
    let (said, heard) = mpsc::channel();
    thread::spawn(move || says.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    let _watchdog = Watchdog::new(Duration::from_secs(seconds) + 2 * PATIENCE);
    while heard.recv().context("the child ended at once")? != "ready" {}
    let mut blows = 0;
    let end = loop {
        let now = match heard.recv_timeout(up_to(here(storm.apart))) {
            Ok(line) if line.starts_with("ended ") => break line,
            Ok(line) if line == RESETS => BLOWS,
            Ok(_) => 0,
            Err(mpsc::RecvTimeoutError::Timeout) => 1,
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the child ended without a word, after {blows} blows"),
        };
        // It may have ended meanwhile.
        blows += (0..now).filter(|_| (storm.blow)(&child).is_ok()).count();
    };
    let numbers: Vec<u64> = end.split(' ').skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let [lost, resets, suspect, left, takes] = numbers[..] else { bail!("{end}") };
    let end = End { lost, resets, suspect, left };
    eprintln!("{guest}, {kind}: {blows} blows, {takes} takes, {end:?}");
    Ok(end)
}

/// A storm that may not do harm, and must cut that number of resets.
fn storm(kind: &str, cut: u64, mut storm: Storm<'_>) {
    let _alone = alone();
    for guest in ["write", "random"] {
        let end = weather(guest, kind, cut, &mut storm).unwrap_or_else(|error| panic!("{guest}: {error:#}"));
        assert_eq!(end.lost, 0, "{guest}: {end:?}");
        assert_eq!(end.left, 0, "{guest}: dirty of a guest that stands still, its slot armed again: {end:?}");
        assert!(end.resets >= cut, "{guest}: none cut a reset, so this test shows nothing: {end:?}");
        assert!(end.suspect <= 64 * end.resets, "{guest}: {end:?}");
    }
}

/// A storm that halts the process: it does no harm, but to one that trusts what it left.
fn halt(apart: Duration, blow: &mut dyn FnMut(&Halted) -> Result<()>) {
    storm("honest", 1, Storm { apart, blow });
    let _alone = alone();
    let end = weather("random", "trusting", u64::MAX, &mut Storm { apart, blow }).unwrap();
    assert!(end.lost > 0, "the storm does no harm, so this test shows nothing: {end:?}");
}

/// Whether this process is a child of the test; then it has done its part.
fn is_child() -> bool {
    std::env::var(ROLE).is_ok_and(|role| {
        be_stormed(&role).unwrap();
        true
    })
}

/// A random time.
fn up_to(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

/// Short of what a sleep can measure.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn a_storm_of_all_signals() {
    if kvm_or_skip() && !is_child() {
        // None of them reaches a reset.
        storm("signalled", 0, Storm { apart: Duration::from_secs(1), blow: &mut |_| Ok(()) });
    }
}

#[test]
fn being_stopped_in_resets() {
    if kvm_or_skip() && !is_child() {
        let apart = Duration::from_micros(3000);
        halt(apart, &mut |child| child.halt(&Halt::Stop, up_to(Duration::from_micros(2000))));
    }
}

#[test]
fn being_stopped_for_microseconds_in_resets() {
    if kvm_or_skip() && !is_child() {
        let apart = Duration::from_micros(200);
        halt(apart, &mut |child| child.stop_and_continue(|| spin(up_to(Duration::from_micros(20)))));
    }
}

#[test]
fn being_traced_in_resets() {
    if kvm_or_skip() && !is_child() {
        let apart = Duration::from_micros(2000);
        halt(apart, &mut |child| child.halt(&Halt::Trace, up_to(Duration::from_micros(500))));
    }
}

#[test]
fn being_frozen_in_resets() {
    if kvm_or_skip() && !is_child() {
        for freezer in Freezer::all().unwrap() {
            let (freeze, mut inside) = (Halt::Freeze(freezer.clone()), None);
            halt(Duration::from_micros(3000), &mut |child| {
                if inside != Some(child.id()) {
                    child.prepare(&freeze)?;
                    inside = Some(child.id());
                }
                child.halt(&freeze, up_to(Duration::from_micros(2000)))
            });
            freezer.remove().unwrap();
        }
    }
}

#[test]
fn a_storm_of_slots_and_vcpus_that_come_and_go() {
    if !kvm_or_skip() {
        return;
    }
    let loads = [Load::new(Mode::Write, 16 << 20), Load::new(Mode::Random, 16 << 20), Load::new(Mode::Random, 4 << 20)];
    let end = Instant::now() + Duration::from_secs(seconds());
    let mut rounds = 0;
    while rounds == 0 || Instant::now() < end {
        rounds += 1;
        let mut rig = Rig::running(&loads, &Config::new().ring_entries(1024), Copying::Right).unwrap();
        for step in 0..20 {
            let index = 1 + step % 2;
            rig.stop(index).unwrap();
            if step % 3 == 0 {
                rig.remove_slot(index).unwrap();
                rig.run_for(Duration::from_millis(5)).unwrap();
                rig.add_slot(index).unwrap();
            }
            rig.start(index).unwrap();
            rig.run_for(Duration::from_millis(20)).unwrap();
        }
        // While a slot changes, a reset waits for it, and cannot tell that from being stopped.
        let stats = rig.limit.stats();
        assert!(stats.suspect_pages <= 64 * 3 * stats.suspect_resets, "{stats:?}");
        rig.rearm().unwrap();
        assert_eq!(rig.limit.stats().suspect_pages, 0);
        assert_eq!(rig.finish().unwrap(), 0, "round {rounds}");
    }
}
