//! Signal handlers that come in the middle of the control plane's calls.

use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::Fake;
use crate::{DirtyLimit, PageRate, Shipped};

static LIMIT: OnceLock<DirtyLimit> = OnceLock::new();
static HANDLED: AtomicU32 = AtomicU32::new(0);

/// Takes the core's lock, as a VMM's handler might: for good, if the thread that it interrupts holds it.
extern "C" fn handler(_: libc::c_int) {
    if let Some(limit) = LIMIT.get() {
        std::hint::black_box(limit.vm().limiter.vm_limit());
    }
    HANDLED.fetch_add(1, Relaxed);
}

#[test]
fn a_handler_never_finds_the_limiters_lock_taken_by_its_own_thread() {
    let fake = Fake::new();
    let limit = LIMIT.get_or_init(|| fake.small());
    let _vcpus = [0, 1].map(|id| limit.add_vcpu(id, &fake.vcpu(1024)).unwrap());
    // SAFETY: the handler takes a lock that is only held with signals blocked, which is what is tested, and adds atomically.
    unsafe { libc::signal(libc::SIGUSR2, handler as *const () as libc::sighandler_t) };
    let control_plane = thread::spawn(|| {
        let rate = PageRate::from_pages_per_sec(1000);
        for _ in 0.. {
            limit.set_limit_all(rate);
            limit.set_limit(0, rate).unwrap();
            limit.set_weight(1, 2).unwrap();
            limit.set_vm_limit(Some(rate));
            limit.set_policy(Shipped::default());
            limit.tick();
            limit.meter();
            limit.query(1).unwrap();
            drop(limit.round().unwrap());
            limit.snapshot();
            limit.cancel_all();
            if HANDLED.load(Relaxed) > 5_000 {
                break;
            }
        }
    });
    let start = Instant::now();
    while !control_plane.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(60), "it hangs after {} signals", HANDLED.load(Relaxed));
        // SAFETY: the thread is not joined yet, so that its handle is its own.
        unsafe { libc::pthread_kill(control_plane.as_pthread_t(), libc::SIGUSR2) };
    }
    control_plane.join().unwrap();
}
