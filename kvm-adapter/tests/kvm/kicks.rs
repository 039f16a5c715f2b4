//! Kicks of the library's own on real KVM: handles that are dropped, that move from thread to thread, that are first used
//! inside a signal handler. A kick ends one run, of the thread that the vCPU has now, and never the process.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use dirtylimit_kvm::{Config, Decision, DirtyLimit, Error, Kick, PageRate};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, kvm_or_skip};

use crate::common::{Limited, drive, here, machine, vcpu};
use crate::rig::Watchdog;

fn signal() -> i32 {
    libc::SIGRTMIN() + 7
}

/// Larger than the writer's memory, so that nothing but a kick ends its runs under a limit.
fn config() -> Config {
    Config::new().ring_entries(16_384).kick(Kick::Signal(signal()))
}

fn writer() -> [Load; 1] {
    [Load::new(Mode::Write, 2048 * 4096)]
}

/// Sends a signal to the calling thread.
fn raise(signal: i32) {
    // SAFETY: numbers in, a number out.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}

#[test]
fn a_kick_left_pending_does_not_freeze_the_next_handle() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &config()).unwrap();
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    let (mut cpu, mut handle) = vcpu(&machine, &limit, 0).unwrap();
    cpu.bind_to_this_thread();
    for _ in 0..3 {
        _ = handle.before_run().unwrap();
        raise(signal()); // as its timer may, at any time
        drop(handle);
        handle = limit.add_vcpu(0, cpu.fd()).unwrap();
        raise(signal()); // and one that was on its way
        let accesses = machine.stats(0).accesses();
        let mut runs = 0;
        while machine.stats(0).accesses() == accesses {
            _ = handle.before_run().unwrap();
            // What gets it out of the guest again.
            let kicker = cpu.kicker();
            thread::scope(|scope| {
                let run = scope.spawn(|| {
                    thread::sleep(Duration::from_millis(20));
                    kicker.kick();
                });
                cpu.run().unwrap();
                run.join().unwrap();
            });
            runs += 1;
            assert!(runs < 100, "every KVM_RUN ends at once");
        }
    }
}

/// Runs until kicks have ended that number of runs; fails where one goes on for 20 s (of a fast machine).
fn kicked(limited: &mut Limited, limit: &DirtyLimit, times: u32) -> Result<()> {
    let (mut kicks, mut armed) = (0, false);
    limited.0.bind_to_this_thread();
    let kicker = limited.0.kicker();
    let (late, patience) = (AtomicBool::new(false), here(Duration::from_secs(20)));
    thread::scope(|scope| {
        let (alive, watched) = mpsc::channel::<()>();
        scope.spawn({
            let late = &late;
            move || {
                if watched.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                    late.store(true, Relaxed);
                    kicker.kick();
                }
            }
        });
        while kicks < times && !late.load(Relaxed) {
            limit.tick();
            limit.last_round().and_then(|round| round.take(0))?; // so that it has pages to dirty
            let decision = limited.1.before_run()?;
            let exit = limited.0.run()?;
            kicks += u32::from(armed && exit == Exit::Interrupted);
            armed = matches!(decision, Decision::Enter { kick_after: Some(_) });
        }
        drop(alive);
        Ok::<_, anyhow::Error>(())
    })?;
    assert!(!late.load(Relaxed), "after {kicks} kicks one is lost");
    Ok(())
}

#[test]
fn a_handle_that_moves_to_another_thread_is_kicked_there() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &config()).unwrap();
    let mut limited = vcpu(&machine, &limit, 0).unwrap();
    limit.set_limit(0, PageRate::from_pages_per_sec(2000)).unwrap();
    for _ in 0..5 {
        let limit = limit.clone();
        let thread = thread::spawn(move || {
            kicked(&mut limited, &limit, 3).unwrap();
            limited
        });
        limited = thread.join().unwrap();
    }
    // And to one that lives on, and back.
    for _ in 0..3 {
        kicked(&mut limited, &limit, 3).unwrap();
        thread::scope(|scope| scope.spawn(|| kicked(&mut limited, &limit, 3).unwrap()).join().unwrap());
    }
}

thread_local! {
    /// The vCPU of a VMM that pays inside its signal handler, as kvmtool does.
    static HANDLED: RefCell<Option<Limited>> = const { RefCell::new(None) };
}
static PAID: AtomicU32 = AtomicU32::new(0);

#[test]
fn a_handle_may_be_used_first_inside_a_signal_handler() {
    if !kvm_or_skip() {
        return;
    }
    extern "C" fn pay(_: libc::c_int) {
        HANDLED.with_borrow_mut(|limited| {
            if let Some((_, vcpu)) = limited {
                _ = vcpu.before_run().unwrap();
                PAID.fetch_add(1, Relaxed);
            }
        });
    }
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    let own = libc::SIGRTMIN() + 9;
    // SAFETY: the action is zeroed, then filled as sigaction(2) wants it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = pay as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(own, &raw const action, std::ptr::null_mut());
    }
    let (machine, limit) = machine(&writer(), &config()).unwrap();
    HANDLED.set(Some(vcpu(&machine, &limit, 0).unwrap()));
    // SAFETY: takes nothing.
    let this = unsafe { libc::gettid() };
    let run = || {
        let (mut cpu, vcpu) = HANDLED.take().unwrap();
        let exit = cpu.run().unwrap();
        HANDLED.set(Some((cpu, vcpu)));
        exit
    };
    // Unlimited: nothing but the VMM's own signal ends its runs, which must be open in them.
    for _ in 0..3 {
        raise(own);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                    // SAFETY: numbers in, a number out.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), this, own) };
                }
            });
            for _ in 0..20 {
                run();
            }
            over.store(true, Relaxed);
        });
    }
    // And under a limit kicks do.
    limit.set_limit(0, PageRate::from_pages_per_sec(2000)).unwrap();
    for _ in 0..100 {
        limit.tick();
        limit.last_round().and_then(|round| round.take(0)).unwrap();
        raise(own);
        run();
    }
    assert!(PAID.load(Relaxed) > 100);
    HANDLED.take();
}

#[test]
fn a_signal_that_gets_a_handler_of_the_vmms_is_told_by_the_first_call_that_can_know() {
    if !kvm_or_skip() {
        return;
    }
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMIN() + 11;
    let (machine, limit) = machine(&writer(), &config().kick(Kick::Signal(signal))).unwrap();
    let (_cpu, mut handle) = vcpu(&machine, &limit, 0).unwrap();
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(signal, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    assert!(matches!(handle.before_run(), Err(Error::KickSignalTaken(told)) if told == signal));
}

/// A kick that is sent as KVM_RUN begins or ends, again and again, ends one run each at most, and never the process.
#[test]
fn kicks_from_everywhere_end_no_more_than_runs() {
    if !kvm_or_skip() {
        return;
    }
    let (machine, limit) = machine(&writer(), &config()).unwrap();
    let mut limited = vcpu(&machine, &limit, 0).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut rates = [100_000, 50_000].into_iter().cycle();
            while !over.load(Relaxed) {
                limit.set_limit(0, PageRate::from_pages_per_sec(rates.next().unwrap())).unwrap();
            }
        });
        let goal = machine.stats(0).accesses() + 500;
        drive(&mut limited, |_| machine.stats(0).accesses() >= goal).unwrap();
        over.store(true, Relaxed);
    });
}
