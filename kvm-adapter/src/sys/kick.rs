//! A signal that only KVM_RUN sees, and a timer that sends it to the thread that armed it.
//!
//! The signal is blocked in the vCPU's thread and open in its KVM_RUN (`KVM_SET_SIGNAL_MASK`), so a kick that comes before
//! KVM_RUN ends it at once instead of being lost, no handler is needed, and nothing else is interrupted.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use dirtylimit_core::{Nanos, SECOND};

use super::kvm::kvmio_write;

/// The kernel's `struct kvm_signal_mask` with its set, which is 8 bytes whatever the library's is.
#[repr(C, packed)]
struct KvmSignalMask {
    len: u32,
    set: u64,
}

/// The ioctl's number has the size of the struct without its set.
const KVM_SET_SIGNAL_MASK: libc::Ioctl = kvmio_write::<u32>(0x8B);

/// The kick signal of one vCPU's thread.
#[derive(Debug)]
pub(crate) struct KickSignal {
    signal: i32,
    vcpu: OwnedFd,
}

impl KickSignal {
    pub(crate) fn new(vcpu: RawFd, signal: i32) -> io::Result<Self> {
        if !(libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&signal) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: borrowed for the call alone; the caller has just mapped it.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu) }.try_clone_to_owned()?;
        Ok(Self { signal, vcpu })
    }

    /// Makes this thread the vCPU's: from now on its KVM_RUN has the signal mask that the thread has now, with the signal
    /// open, and the thread has it blocked. Returns the thread's id.
    pub(crate) fn bind(&self) -> io::Result<i32> {
        let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `mask` is initialised by the calls before it is read; a real-time signal is a valid one. The struct's
        // set is the first 64 bits of the library's: signals 1 to 64, as the kernel keeps them.
        unsafe {
            let only = self.only();
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const only, mask.as_mut_ptr());
            libc::sigdelset(mask.as_mut_ptr(), self.signal);
            let request = KvmSignalMask { len: 8, set: mask.as_ptr().cast::<u64>().read_unaligned() };
            if libc::ioctl(self.vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const request) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(libc::gettid())
        }
    }

    /// Sends it to a bound thread; to nobody if that has ended.
    pub(crate) fn send(&self, thread: i32) {
        // SAFETY: numbers in, a number out.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, self.signal) };
    }

    /// Takes back what was sent to this thread, so that it does not end the next KVM_RUN.
    fn drain(&self) {
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let only = self.only();
        // SAFETY: reads the set and the time; nothing is asked about the signal.
        while unsafe { libc::sigtimedwait(&raw const only, std::ptr::null_mut(), &raw const none) } == self.signal {}
    }

    fn only(&self) -> libc::sigset_t {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises it.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.signal);
            set.assume_init()
        }
    }
}

/// A POSIX timer that sends the kick signal to the thread that made it.
#[derive(Debug)]
pub(crate) struct Timer(libc::timer_t);

// SAFETY: a timer is the process's, not a thread's; arming takes `&mut self`.
unsafe impl Send for Timer {}
// SAFETY: as above.
unsafe impl Sync for Timer {}

impl Timer {
    pub(crate) fn new(signal: &KickSignal) -> io::Result<Self> {
        // SAFETY: a zeroed sigevent is valid; timer_create reads it and writes the timer's id.
        unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal.signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = zeroed();
            match libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) {
                0 => Ok(Self(timer)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Kicks once, after `time`.
    pub(crate) fn arm(&mut self, time: Nanos) {
        self.set(time.max(1));
    }

    /// Kicks no more, nor does what was sent before.
    pub(crate) fn disarm(&mut self, signal: &KickSignal) {
        self.set(0);
        signal.drain();
    }

    fn set(&mut self, time: Nanos) {
        let once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = libc::timespec {
            tv_sec: libc::time_t::try_from(time / SECOND).unwrap_or(libc::time_t::MAX),
            tv_nsec: (time % SECOND).try_into().unwrap_or(0),
        };
        let spec = libc::itimerspec { it_interval: once, it_value: value };
        // SAFETY: reads `spec`; the timer is ours and exists. It cannot fail with valid times.
        unsafe { libc::timer_settime(self.0, 0, &raw const spec, std::ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: our own timer.
        unsafe { libc::timer_delete(self.0) };
    }
}
