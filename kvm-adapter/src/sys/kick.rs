//! A signal that only KVM_RUN sees, and a timer that sends it to the thread that armed it.
//!
//! The signal is blocked in the vCPU's thread and open in its KVM_RUN (`KVM_SET_SIGNAL_MASK`), so a kick that comes before
//! KVM_RUN ends it at once instead of being lost, and nothing else is interrupted. A mask that is set inside a signal handler
//! ends with the handler: then the kick finds our own handler, which blocks it again where that lasts.

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

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

thread_local! {
    /// The number of this thread's mask: no other thread's, and another one when the kick was found open. 0 before the first.
    static MASK: Cell<u32> = const { Cell::new(0) };
    /// The signals that were blocked where the kick was found open.
    static FOUND: Cell<Option<u64>> = const { Cell::new(None) };
}

fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // Relaxed: a number by itself.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The kick, delivered: it is open where it was blocked. That was done in a signal handler of the VMM's, or the VMM has
/// opened it since. It is blocked where this handler returns to, and sent again, so that it ends the next KVM_RUN; the next
/// `before_run` sees another number and sets KVM_RUN's mask anew. Async-signal-safe.
extern "C" fn found_open(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    if MASK.get() == 0 {
        return; // No vCPU's thread: its number was another's before.
    }
    // SAFETY: the kernel passes the context that it goes back to; its set is the first 64 bits of the library's. Calls that
    // take numbers; errno is this thread's, and as before.
    unsafe {
        let blocked = (&raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>();
        FOUND.set(Some(blocked.read_unaligned()));
        blocked.write_unaligned(blocked.read_unaligned() | bit(signal));
        MASK.set(next_number());
        let errno = *libc::__errno_location();
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal);
        *libc::__errno_location() = errno;
    }
}

/// Makes a signal that nobody handles or ignores ours, for the whole process; whether it is.
pub(crate) fn claim(signal: i32) -> io::Result<bool> {
    let ours = found_open as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) as libc::sighandler_t;
    // SAFETY: the action is zeroed, then given a handler of the kind that SA_SIGINFO says.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        if libc::sigaction(signal, std::ptr::null(), &raw mut action) < 0 {
            return Err(io::Error::last_os_error());
        }
        if action.sa_sigaction != libc::SIG_DFL {
            return Ok(action.sa_sigaction == ours);
        }
        action.sa_sigaction = ours;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
        match libc::sigaction(signal, &raw const action, null_mut()) {
            0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// What [`KickSignal::bind`] did.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) timer: Timer,
    /// The thread's id.
    pub(crate) thread: i32,
    /// The mask may be a signal handler's, for all that is known: a kick now shows it.
    pub(crate) is_to_be_tried: bool,
}

/// The kick signal of one vCPU's thread.
#[derive(Debug)]
pub(crate) struct KickSignal {
    signal: i32,
    vcpu: OwnedFd,
}

impl KickSignal {
    /// With a real-time signal that is ours.
    pub(crate) fn new(vcpu: RawFd, signal: i32) -> io::Result<Self> {
        // SAFETY: borrowed for the call alone; the caller has just mapped it.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu) }.try_clone_to_owned()?;
        Ok(Self { signal, vcpu })
    }

    pub(crate) fn signal(&self) -> i32 {
        self.signal
    }

    /// Whether the signal is ours still.
    pub(crate) fn is_ours(&self) -> bool {
        claim(self.signal).unwrap_or(false)
    }

    /// Makes this thread the vCPU's: from now on its KVM_RUN has the signal mask that the thread has now, with the signal
    /// open, and the thread has it blocked; what was sent to it before is taken back.
    pub(crate) fn bind(&self) -> io::Result<Bound> {
        let bit = bit(self.signal);
        let mut before = 0u64;
        // SAFETY: reads one set of 64 signals and writes the other.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const bit, &raw mut before, 8) };
        if MASK.get() == 0 {
            MASK.set(next_number());
        }
        let found = FOUND.get();
        let request = KvmSignalMask { len: 8, set: found.unwrap_or(before) & !bit };
        // SAFETY: reads the struct.
        if unsafe { libc::ioctl(self.vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.drain();
        let timer = Timer::new(self.signal)?;
        // SAFETY: takes nothing.
        let thread = unsafe { libc::gettid() };
        Ok(Bound { timer, thread, is_to_be_tried: before & bit == 0 && found.is_none() })
    }

    /// Sends it to a bound thread; to nobody if that has ended.
    pub(crate) fn send(&self, thread: i32) {
        // SAFETY: numbers in, a number out.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, self.signal) };
    }

    /// Takes back what was sent to this thread, so that it does not end the next KVM_RUN.
    fn drain(&self) {
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut only = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set; sigtimedwait reads it and the time, and nothing is asked of the signal.
        unsafe {
            libc::sigemptyset(only.as_mut_ptr());
            libc::sigaddset(only.as_mut_ptr(), self.signal);
            while libc::sigtimedwait(only.as_ptr(), null_mut(), &raw const none) == self.signal {}
        }
    }
}

/// A POSIX timer that sends the kick signal to the thread that made it.
#[derive(Debug)]
pub(crate) struct Timer {
    id: libc::timer_t,
    /// The number of that thread's mask.
    mask: u32,
}

// SAFETY: a timer is the process's, not a thread's; arming takes `&mut self`.
unsafe impl Send for Timer {}
// SAFETY: as above.
unsafe impl Sync for Timer {}

impl Timer {
    fn new(signal: i32) -> io::Result<Self> {
        // SAFETY: a zeroed sigevent is valid; timer_create reads it and writes the timer's id.
        unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut id = zeroed();
            match libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) {
                0 => Ok(Self { id, mask: MASK.get() }),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Whether it kicks the calling thread, and the signal was not found open there since. One load.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        self.mask == MASK.get()
    }

    /// Kicks once, after `time`.
    pub(crate) fn arm(&mut self, time: Nanos) {
        self.set(time.max(1));
    }

    /// Kicks no more, nor does what was sent before. On its own thread.
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
        unsafe { libc::timer_settime(self.id, 0, &raw const spec, null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: our own timer.
        unsafe { libc::timer_delete(self.id) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time that a timer has left; `None` where there is no such timer.
    fn left(id: libc::timer_t) -> Option<Nanos> {
        // SAFETY: writes the zeroed structure; an id that is no timer's is refused.
        unsafe {
            let mut spec: libc::itimerspec = zeroed();
            let found = libc::timer_gettime(id, &raw mut spec) == 0;
            found.then(|| spec.it_value.tv_sec.unsigned_abs() * SECOND + spec.it_value.tv_nsec.unsigned_abs())
        }
    }

    #[test]
    fn a_timer_is_armed_for_its_time_and_gone_when_it_is_dropped() {
        let mut timer = Timer::new(libc::SIGRTMAX()).unwrap();
        assert_eq!(left(timer.id), Some(0));
        for time in [100 * SECOND, 200 * SECOND + SECOND / 2] {
            timer.arm(time);
            let left = left(timer.id).unwrap();
            assert!(left <= time && left > time - 60 * SECOND, "{left} of {time}");
        }
        timer.set(0);
        assert_eq!(left(timer.id), Some(0));
        let id = timer.id;
        drop(timer);
        assert_eq!(left(id), None);
    }

    #[test]
    fn a_claimed_signals_handler_knows_its_context_restarts_calls_and_has_its_own_stack() {
        let signal = libc::SIGRTMAX() - 8;
        assert!(claim(signal).unwrap() && claim(signal).unwrap(), "ours, again too");
        // SAFETY: writes the zeroed structure.
        let action = unsafe {
            let mut action: libc::sigaction = zeroed();
            assert_eq!(libc::sigaction(signal, std::ptr::null(), &raw mut action), 0);
            action
        };
        let wanted = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
        assert_eq!(action.sa_flags & wanted, wanted);
        assert!(claim(0).is_err() && claim(libc::SIGKILL).is_err());
    }
}
