//! An embedding of uhyve's shape: the kick signal is blocked but in KVM_RUN, which has a signal mask of its own. So a kick that
//! comes in a pause stays pending, KVM_RUN returns at once for as long as it does, and only a thread that takes it back goes on.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Once};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, Decision, PageRate};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, SLOT, kvm_or_skip};

use crate::common::{Copy, Limited, machine, smallest_ring, vcpu};
use crate::rig::Watchdog;

fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 9
}

/// A set of the kick signal alone.
fn kick_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), kick_signal());
        set.assume_init()
    }
}

fn is_kicked() -> bool {
    let mut pending = MaybeUninit::uninit();
    // SAFETY: sigpending initialises the set.
    unsafe { libc::sigpending(pending.as_mut_ptr()) == 0 && libc::sigismember(pending.as_ptr(), kick_signal()) == 1 }
}

fn take_kick() {
    let (set, now) = (kick_set(), libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: reads the set and the time.
    unsafe { libc::sigtimedwait(&raw const set, null_mut(), &raw const now) };
}

/// Blocks the kick in this thread, and opens it in the vCPU's KVM_RUN.
fn open_kick_in_run(vcpu: &Limited) -> Result<()> {
    #[repr(C)]
    struct Mask {
        len: u32,
        set: [u32; 2],
    }
    extern "C" fn nothing(_: libc::c_int) {}
    static HANDLER: Once = Once::new();
    let set = kick_set();
    // SAFETY: the handler does nothing; the set and the mask are read, the mask of eight bytes as it says.
    unsafe {
        HANDLER.call_once(|| {
            libc::signal(kick_signal(), nothing as extern "C" fn(libc::c_int) as libc::sighandler_t);
        });
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
        let open = Mask { len: 8, set: [0, 0] };
        ensure!(libc::ioctl(vcpu.0.fd().as_raw_fd(), 0x4004_ae8b, &raw const open) == 0, "KVM_SET_SIGNAL_MASK");
    }
    Ok(())
}

/// The vCPU's thread, until it is to stop; how often it went around, and its vCPU.
fn run(mut limited: Limited, stop: &AtomicBool) -> Result<(u32, Limited)> {
    open_kick_in_run(&limited)?;
    let mut turns = 0;
    while !stop.load(Relaxed) {
        match limited.1.before_run_unless(is_kicked)? {
            Decision::Enter { .. } => _ = limited.0.run()?,
            Decision::Return => {}
        }
        turns += 1;
        take_kick();
    }
    Ok((turns, limited))
}

#[test]
fn a_vmm_that_blocks_its_kick_outside_kvm_run_stops_at_once_and_does_not_spin() {
    if !kvm_or_skip() {
        return;
    }
    let _watchdog = Watchdog::new(Duration::from_secs(120));
    let loads = [Load::new(Mode::Write, 8 << 20)];
    let (machine, limit) = machine(&loads, &Config::new().ring_entries(smallest_ring())).unwrap();
    let mut limited = vcpu(&machine, &limit, 0).unwrap();
    let mut copy = Copy::new(machine.memory());
    // A page in 10 ms: its ring is full, or its vCPU pauses, nearly all the time.
    limit.set_limit(0, PageRate::from_pages_per_sec(100)).unwrap();
    let mut around = 0;
    for _ in 0..8 {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = stop.clone();
            move || run(limited, &stop)
        });
        for _ in 0..10 {
            limit.tick();
            thread::sleep(Duration::from_millis(10));
            // A kick that is for nothing, as for a device's interrupt.
            // SAFETY: the thread is not joined.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
        stop.store(true, Relaxed);
        // SAFETY: as above.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        let (turns, back) = thread.join().unwrap().unwrap();
        limited = back;
        // One for each page and each kick, and a few where the ring was full before the limit; a busy host may give it no time.
        assert!(turns <= 200, "{turns} times around");
        around += turns;
    }
    assert!(around > 0);
    copy.take(&limit.last_round().and_then(|round| round.take(SLOT)).unwrap()).unwrap();
    assert_eq!(copy.lost(), 0);
}
