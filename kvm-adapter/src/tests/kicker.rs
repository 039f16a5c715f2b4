//! One vCPU's kicks on real KVM: which runs they end, whom they reach, what is left of them. The guest halts at once.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use dirtylimit_test_vm::kvm_or_skip;
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::Error;
use crate::fake::Fake;
use crate::kick::{Kick, Kicker};
use crate::shared::SharedVcpu;
use crate::sys::{KickSignal, RunPage, blocked_signals, claim};

/// Where the guest's code is.
const CODE: u64 = 0x1000;

struct Kicked {
    shared: SharedVcpu,
    kicker: Kicker,
    cpu: VcpuFd,
    _vm: VmFd,
}

fn signal() -> i32 {
    libc::SIGRTMAX() - 5
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn thread_id() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

/// Sends a signal to this thread.
fn raise(signal: i32) {
    // SAFETY: numbers in, a number out.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id(), signal) };
}

/// Blocks a signal in this thread, or opens it.
fn mask(how: i32, signal: i32) {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which the others write and read.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut());
    }
}

fn is_pending(signal: i32) -> bool {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigpending initialises the set.
    unsafe { libc::sigpending(set.as_mut_ptr()) == 0 && libc::sigismember(set.as_ptr(), signal) == 1 }
}

impl Kicked {
    /// A vCPU whose thread is not known yet; `None` without KVM.
    fn new(signal: i32) -> Option<Self> {
        if !kvm_or_skip() {
            return None;
        }
        assert!(claim(signal).unwrap());
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new page at an address of the kernel's choice, which stays; HLT is its first byte.
        let memory = unsafe {
            let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            page.cast::<u8>().write(0xF4);
            page.addr() as u64
        };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE,
            memory_size: 4096,
            userspace_addr: memory,
        };
        // SAFETY: the page above.
        unsafe { vm.set_user_memory_region(region).unwrap() };
        let cpu = vm.create_vcpu(0).unwrap();
        let mut sregs = cpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        cpu.set_sregs(&sregs).unwrap();
        let index = Fake::new().small().vm().limiter.register().unwrap();
        let kick = KickSignal::new(cpu.as_raw_fd(), signal).unwrap();
        let shared = SharedVcpu::new(0, index, RunPage::map(cpu.as_raw_fd()).unwrap(), Some(kick));
        Some(Self { shared, kicker: Kicker::new(Kick::Signal(signal)), cpu, _vm: vm })
    }

    /// One that runs on this thread, which is known.
    fn bound() -> Option<Self> {
        let mut kicked = Self::new(signal())?;
        kicked.disarm();
        kicked.disarm();
        Some(kicked)
    }

    /// As before each KVM_RUN.
    fn disarm(&mut self) {
        self.kicker.disarm(&self.shared, false).unwrap();
    }

    fn is_due(&self) -> bool {
        self.kicker.is_due(&self.shared)
    }

    /// Whether a kick ends the next KVM_RUN before the guest halts.
    fn is_run_ended(&mut self) -> bool {
        self.cpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..kvm_regs::default() }).unwrap();
        match self.cpu.run() {
            Err(error) if error.errno() == libc::EINTR => true,
            Ok(VcpuExit::Hlt) => false,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_kick_ends_one_run_and_the_first_is_tried() {
    let Some(mut kicked) = Kicked::new(signal()) else { return };
    assert!(kicked.is_due() && !kicked.is_run_ended(), "its thread is not known");
    kicked.disarm();
    assert!(kicked.is_due() && kicked.is_run_ended(), "a mask that a signal handler may have set is tried");
    let timer = format!("{:?}", kicked.kicker);
    for _ in 0..3 {
        kicked.disarm();
        assert_eq!(format!("{:?}", kicked.kicker).split("kicks").next(), timer.split("kicks").next(), "the same timer");
        assert!(!kicked.is_due() && !kicked.is_run_ended());
        kicked.shared.kick();
        assert!(kicked.is_due() && kicked.is_run_ended());
    }
}

#[test]
fn a_timers_kick_ends_a_run_and_nothing_is_left_of_it() {
    let Some(mut kicked) = Kicked::bound() else { return };
    kicked.kicker.arm(5_000);
    let start = Instant::now();
    while !is_pending(signal()) {
        assert!(start.elapsed() < Duration::from_secs(20), "it never kicks");
    }
    assert!(kicked.is_run_ended());
    kicked.kicker.disarm(&kicked.shared, true).unwrap();
    assert!(!is_pending(signal()) && !kicked.is_run_ended() && !kicked.is_due());
}

#[test]
fn kicks_go_to_the_thread_of_the_moment() {
    let Some(mut kicked) = Kicked::bound() else { return };
    for _ in 0..2 {
        thread::scope(|scope| {
            scope.spawn(|| {
                assert!(kicked.is_due(), "another thread");
                kicked.disarm();
                kicked.disarm();
                assert!(!kicked.is_due() && blocked_signals() & bit(signal()) != 0);
                kicked.shared.kick();
                assert!(is_pending(signal()) && kicked.is_run_ended());
            });
        });
        assert!(kicked.is_due() && !is_pending(signal()), "not this one yet");
        kicked.disarm();
        assert!(!kicked.is_due(), "the mask is known: nothing is tried");
        kicked.shared.kick();
        assert!(is_pending(signal()));
        kicked.disarm();
    }
}

#[test]
fn after_its_release_a_vcpu_is_not_kicked_and_no_kick_is_left() {
    let Some(mut kicked) = Kicked::bound() else { return };
    kicked.shared.kick();
    assert!(is_pending(signal()));
    kicked.kicker.release(&kicked.shared);
    let kicks = kicked.shared.kicks();
    kicked.shared.kick();
    assert!(!is_pending(signal()) && kicked.shared.kicks() == kicks);
    assert!(kicked.is_due(), "it has no timer");
    kicked.disarm();
    assert!(!kicked.is_due() && !kicked.is_run_ended());
}

#[test]
fn a_kick_that_finds_its_signal_open_blocks_it_and_ends_the_next_run() {
    // ThreadSanitizer holds signals back, and the handler runs where it can no longer block one.
    if std::env::var_os("DIRTYLIMIT_SANITIZED").is_some() {
        return;
    }
    let Some(mut kicked) = Kicked::new(signal()) else { return };
    let (signal, other) = (signal(), libc::SIGRTMAX() - 6);
    // Not to be seen by the guest either.
    mask(libc::SIG_BLOCK, other);
    raise(other);
    kicked.disarm();
    kicked.disarm();
    assert!(!kicked.is_run_ended());
    mask(libc::SIG_UNBLOCK, signal);
    kicked.shared.kick();
    assert_eq!(blocked_signals() & (bit(signal) | bit(other)), bit(signal) | bit(other));
    assert!(is_pending(signal) && kicked.is_due() && kicked.is_run_ended());
    // Now the mask is known to be none of a handler's: nothing is tried.
    kicked.disarm();
    assert!(!kicked.is_due() && !kicked.is_run_ended());
    kicked.shared.kick();
    assert!(kicked.is_run_ended());
}

#[test]
fn a_kick_of_a_thread_that_is_no_vcpus_leaves_its_mask() {
    let Some(kicked) = Kicked::new(signal()) else { return };
    kicked.shared.bind(thread_id());
    let before = blocked_signals();
    kicked.shared.kick();
    assert!(kicked.shared.kicks() == 1 && blocked_signals() == before && !is_pending(signal()));
}

#[test]
fn a_signal_that_is_no_longer_ours_is_told_before_it_is_used() {
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMAX() - 7;
    let Some(mut kicked) = Kicked::new(signal) else { return };
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(signal, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    assert!(matches!(kicked.kicker.disarm(&kicked.shared, false), Err(Error::KickSignalTaken(told)) if told == signal));
    assert_eq!(blocked_signals() & bit(signal), 0);
}
