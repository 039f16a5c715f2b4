//! A timer that signals the thread that armed it, so that its KVM_RUN returns.

use std::io;
use std::mem::zeroed;

use dirtylimit_core::{Nanos, SECOND};

/// What a kick that found its thread just before KVM_RUN is repeated after; it did nothing the first time.
const REPEAT: Nanos = 1_000_000;

/// Makes `signal` interrupt system calls and do nothing else, in the whole process.
pub(crate) fn handle(signal: i32) -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: a zeroed sigaction is valid: no flags (no SA_RESTART), an empty mask; the handler does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// This thread's id.
pub(crate) fn thread() -> i32 {
    // SAFETY: reads a number.
    unsafe { libc::gettid() }
}

/// Sends `signal` to a thread of this process; to nobody if it has ended.
pub(crate) fn kick(thread: i32, signal: i32) {
    // SAFETY: sends a signal that has a handler; numbers in, numbers out.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}

/// A POSIX timer of one thread.
#[derive(Debug)]
pub(crate) struct Timer {
    timer: libc::timer_t,
    thread: i32,
}

// SAFETY: a timer is the process's; which thread it signals is told apart by `for_this_thread`.
unsafe impl Send for Timer {}
// SAFETY: as above; arming takes `&mut self`.
unsafe impl Sync for Timer {}

impl Timer {
    /// `timer`, if it is this thread's, or a new one.
    pub(crate) fn for_this_thread(timer: Option<Self>, signal: i32) -> io::Result<Self> {
        let thread = thread();
        if let Some(timer) = timer.filter(|timer| timer.thread == thread) {
            return Ok(timer);
        }
        // SAFETY: a zeroed sigevent is valid; timer_create reads it and writes the timer's id.
        unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = thread;
            let mut timer = zeroed();
            match libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) {
                0 => Ok(Self { timer, thread }),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Signals the thread after `time` and then every millisecond, until disarmed.
    pub(crate) fn arm(&mut self, time: Nanos) {
        self.set(time.max(1), REPEAT);
    }

    /// No more signals, but for one on its way.
    pub(crate) fn disarm(&mut self) {
        self.set(0, 0);
    }

    fn set(&mut self, value: Nanos, interval: Nanos) {
        let spec = |nanos: Nanos| libc::timespec {
            tv_sec: libc::time_t::try_from(nanos / SECOND).unwrap_or(libc::time_t::MAX),
            tv_nsec: (nanos % SECOND).try_into().unwrap_or(0),
        };
        let spec = libc::itimerspec { it_interval: spec(interval), it_value: spec(value) };
        // SAFETY: reads `spec`; the timer is ours and exists. It cannot fail with valid times.
        unsafe { libc::timer_settime(self.timer, 0, &raw const spec, std::ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: our own timer.
        unsafe { libc::timer_delete(self.timer) };
    }
}
