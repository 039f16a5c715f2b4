//! Signals: never inside of a reset, and never in a thread that holds the lock.

use std::mem::zeroed;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Fake, PAGES};
use crate::spawn_without_signals;
use crate::sys::blocked_signals;
use crate::throttle::ThrottleThread;
use crate::vm::Vm;

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// All that anybody can block.
const ALL: u64 = !(bit(libc::SIGKILL) | bit(libc::SIGSTOP));

#[test]
fn a_reset_runs_with_all_64_signals_blocked() {
    let fake = Fake::new();
    let limit = fake.small();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let before = blocked_signals();
    for _ in 0..3 {
        fake.write_all(0, 0..PAGES);
        limit.last_round().map(drop).unwrap();
        fake.write_all(0, 0..PAGES);
        _ = vcpu.before_run().unwrap();
    }
    let blocked = fake.blocked();
    assert!(blocked.len() >= 6 && blocked.iter().all(|blocked| *blocked == ALL), "{blocked:x?}");
    assert_eq!(blocked_signals(), before);
}

#[test]
fn a_thread_of_ours_takes_no_signal_but_the_c_librarys() {
    let (say, hear) = mpsc::channel();
    let tick = move || say.send(blocked_signals()).is_ok();
    let thread = ThrottleThread::spawn(tick, Duration::from_millis(1)).unwrap();
    let open = (32..libc::SIGRTMIN()).map(bit).fold(0, |set, bit| set | bit);
    assert_eq!(hear.recv_timeout(Duration::from_secs(60)).unwrap(), ALL & !open);
    let (say, hear) = mpsc::channel();
    let before = blocked_signals();
    let helper = spawn_without_signals("helper", move || say.send(blocked_signals()).unwrap()).unwrap();
    assert_eq!((helper.thread().name(), hear.recv().unwrap()), (Some("helper"), ALL & !open));
    assert_eq!(blocked_signals(), before);
    helper.join().unwrap();
    let (say, done) = mpsc::channel();
    thread::spawn(move || {
        // SAFETY: numbers in; nothing is changed. It waits for every thread to take the C library's signal.
        say.send(unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) })
    });
    assert_eq!(done.recv_timeout(Duration::from_secs(60)), Ok(0), "setresuid hangs");
    drop(thread);
}

static VM: OnceLock<Arc<Vm>> = OnceLock::new();
static HANDLED: AtomicU32 = AtomicU32::new(0);
static FOUND_TAKEN: AtomicU32 = AtomicU32::new(0);

/// The lock of one VM that only the calling thread takes, and a signal whose handler tries it, as a VMM's does that pauses
/// its vCPU there.
fn lock_and_signal() -> (MutexGuard<'static, ()>, &'static Vm, i32) {
    static ALONE: Mutex<()> = Mutex::new(());
    extern "C" fn handler(_: libc::c_int) {
        if VM.get().is_some_and(|vm| vm.try_lock().is_none()) {
            FOUND_TAKEN.fetch_add(1, Relaxed);
        }
        HANDLED.fetch_add(1, Relaxed);
    }
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (vm, signal) = (VM.get_or_init(|| Fake::new().small().vm().clone()), libc::SIGRTMIN() + 9);
    HANDLED.store(0, Relaxed);
    FOUND_TAKEN.store(0, Relaxed);
    // SAFETY: the action is zeroed, then filled as sigaction(2) wants it; the handler tries a lock and adds to atomics.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
    }
    (alone, vm, signal)
}

fn send(thread: i32, signal: i32) {
    // SAFETY: numbers in; the signal has a handler.
    assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) }, 0);
}

#[test]
fn a_signal_that_comes_under_the_lock_is_handled_after_it() {
    let (_alone, vm, signal) = lock_and_signal();
    // SAFETY: takes nothing.
    let own = unsafe { libc::gettid() };
    for round in 1..=10 {
        let held = vm.lock();
        send(own, signal);
        assert_eq!(HANDLED.load(Relaxed), 2 * round - 2);
        drop(held);
        assert_eq!(HANDLED.load(Relaxed), 2 * round - 1);
        let held = vm.try_lock().unwrap();
        send(own, signal);
        drop(held);
        assert_eq!((HANDLED.load(Relaxed), FOUND_TAKEN.load(Relaxed)), (2 * round, 0));
    }
}

/// Signals this thread every 20 µs, until it is dropped.
struct Timer(libc::timer_t);

impl Timer {
    fn new(signal: i32) -> Self {
        let period = libc::timespec { tv_sec: 0, tv_nsec: 20_000 };
        // SAFETY: the structures are zeroed, then filled as timer_create(2) wants them.
        unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = zeroed();
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer), 0);
            let times = libc::itimerspec { it_interval: period, it_value: period };
            assert_eq!(libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()), 0);
            Self(timer)
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: our own timer, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[test]
fn no_signal_comes_between_the_lock_and_the_mask() {
    let (_alone, vm, signal) = lock_and_signal();
    let timer = Timer::new(signal);
    let give_up = Instant::now() + Duration::from_secs(60);
    while HANDLED.load(Relaxed) < 5000 && Instant::now() < give_up {
        drop(vm.lock());
        drop(vm.try_lock());
    }
    drop(timer);
    assert!(HANDLED.load(Relaxed) >= 500, "{HANDLED:?} signals show nothing");
    assert_eq!(FOUND_TAKEN.load(Relaxed), 0, "of {HANDLED:?} handlers");
}
